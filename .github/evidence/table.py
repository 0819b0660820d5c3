# SPDX-License-Identifier: MIT
"""python .github/evidence/table.py OUT.json RUN... [--train N] [--test N] [--data FOLDER
--data-size S] [--anew]: the teacher's classifier of clean images, behind each run's student.
"""
import argparse
import json
from pathlib import Path

from measure import accuracy, embed, evaluation, load, vit

KINDS = {"clean": {}, "blur1.4": {"blur": 1.4}, "noise0.3": {"noise": 0.3},
         "mask0.5": {"mask": 0.5}, "salt0.1": {"salt": 0.1}, "contrast0.7": {"contrast": 0.7},
         "stacked": {"blur": 0.7, "noise": 0.1, "mask": 0.2}}
parser = argparse.ArgumentParser()
parser.add_argument("out")
parser.add_argument("runs", nargs="+")
parser.add_argument("--train", type=int, default=10000)
parser.add_argument("--test", type=int, default=5000)
parser.add_argument("--data")
parser.add_argument("--data-size", type=int)
parser.add_argument("--anew", action="store_true", help="also a probe fitted anew on the teacher")
args = parser.parse_args()
changes = {"data": args.data, "data_size": args.data_size} if args.data else {}
cfg, (images, labels), (test, test_labels) = load(args.runs[0], args.train, args.test, **changes)
teacher = vit(args.runs[0], cfg, "teacher")
students = {run: vit(run, cfg) for run in args.runs}
clean_probe = evaluation.fit_probe(embed(teacher, images, cfg, {}, 0), labels)
rows = {"teacher": {}, "anew": {}, **{run: {} for run in students}}
for kind, severities in KINDS.items():
    x = embed(teacher, test, cfg, severities, 1)
    rows["teacher"][kind] = accuracy(clean_probe, x, test_labels)
    if args.anew:
        probe = evaluation.fit_probe(embed(teacher, images, cfg, severities, 0), labels)
        rows["anew"][kind] = accuracy(probe, x, test_labels)
    for run, student in students.items():
        x = embed(student, test, cfg, severities, 1)
        rows[run][kind] = accuracy(clean_probe, x, test_labels)
    print(kind, {name: row.get(kind) for name, row in rows.items()}, flush=True)
Path(args.out).write_text(json.dumps(rows))
