# SPDX-License-Identifier: MIT
"""python .github/evidence/labels.py RUN...: probes of their own on the mixture, with fewer and
fewer labels. Writes labels.json.
"""
import json
import sys
from pathlib import Path

from measure import accuracy, embed, evaluation, load, vit

runs = sys.argv[1:]
cfg, (images, labels), (test, test_labels) = load(runs[0], 10000, 5000)
vits = {"teacher": vit(runs[0], cfg, "teacher"), **{run: vit(run, cfg) for run in runs}}
rows = {}
for name, model in vits.items():
    x = embed(model, images, cfg, cfg.severities, 0, True)
    test_x = embed(model, test, cfg, cfg.severities, 1, True)
    rows[name] = [accuracy(evaluation.fit_probe(x[:n], labels[:n]), test_x, test_labels)
                  for n in (10000, 2000, 200)]
    print(name, rows[name], flush=True)
Path("labels.json").write_text(json.dumps(rows))
