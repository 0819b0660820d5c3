# SPDX-License-Identifier: MIT
"""python .github/evidence/curves.py RUN...: accuracy by severity, within and beyond what was
trained on, for runs of one teacher. Writes curves.json, which chart.py draws.
"""
import json
import sys
from pathlib import Path

import torch.nn.functional as F
from measure import accuracy, embed, evaluation, load, vit

SEVERITIES = {"blur": [0, 1, 2, 3, 4.5, 6], "noise": [0, 0.1, 0.2, 0.4, 0.6, 0.8],
              "mask": [0, 0.15, 0.3, 0.6, 0.75, 0.9]}


def median(images):
    """A 3 x 3 median filter."""
    windows = F.unfold(F.pad(images, [1, 1, 1, 1], mode="reflect"), 3).unflatten(1, (3, 9))
    return windows.median(dim=2).values.view_as(images)


runs = sys.argv[1:]
cfg, (images, labels), (test, test_labels) = load(runs[0], 1000, 1000)
teacher = vit(runs[0], cfg, "teacher")
students = [vit(run, cfg) for run in runs]
clean_probe = evaluation.fit_probe(embed(teacher, images, cfg, {}, 0), labels)


def measure(severities):
    def right(model, probe=clean_probe, change=None):
        x = embed(model, test, cfg, severities, 1, change=change)
        return accuracy(probe, x, test_labels)
    x = embed(teacher, images, cfg, severities, 0)
    anew = evaluation.fit_probe(x, labels)
    return {"teacher": right(teacher), "fitted anew": right(teacher, anew),
            "median": right(teacher, change=median), "student": [right(vit) for vit in students]}


clean = measure({})
rows = []
for kind, severities in SEVERITIES.items():
    for severity in severities:
        found = measure({kind: severity}) if severity else clean
        rows.append({"kind": kind, "severity": severity, **found})
        print(rows[-1], flush=True)
Path("curves.json").write_text(json.dumps(rows))
