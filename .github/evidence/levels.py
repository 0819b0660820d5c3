# SPDX-License-Identifier: MIT
"""python .github/evidence/levels.py RUN...: distances at the three levels from the first run's
teacher at clean held-out images, for that teacher and for each run's student. Writes levels.json.
"""
import json
import sys
from pathlib import Path

from measure import distill, load, vit

KINDS = [{"blur": 2.8}, {"noise": 0.3}, {"mask": 0.5}, {"salt": 0.1}, {"contrast": 0.7},
         {"blur": 1.4, "noise": 0.1, "mask": 0.2}]
runs = sys.argv[1:]
cfg, _, (test, labels) = load(runs[0], 1, 1000)
vits = {"teacher": vit(runs[0], cfg, "teacher"), **{run: vit(run, cfg) for run in runs}}
batches = zip(test.split(64), labels.split(64), strict=True)
_, _, found = distill.compare(vits, batches, cfg, [(kind, False) for kind in KINDS], seed=1)
rows = {}
for kind, distances in zip(KINDS, found, strict=True):
    rows[distill.describe(kind, False)] = {name: round(x, 4) for name, x in distances.items()}
    print(kind, distances, flush=True)
Path("levels.json").write_text(json.dumps(rows))
