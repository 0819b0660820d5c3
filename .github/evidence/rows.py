# SPDX-License-Identifier: MIT
"""python .github/evidence/rows.py RUN...: the rows of eval.py's tables, means over runs."""
import json
import sys
from pathlib import Path

from measure import evaluation, spread

tables = [json.loads(Path(run, "results.json").read_text())["rows"] for run in sys.argv[1:]]
print("| |", " | ".join(evaluation.COLUMNS), "|")
print("| --- |" + " --- |" * len(evaluation.COLUMNS))
for rows in zip(*tables, strict=True):
    cells = []
    for name in evaluation.COLUMNS:
        texts = []
        for key in (f"{name}_teacher", f"{name}_student", name):
            values = [row[key] for row in rows if row.get(key) is not None]
            if len(values) == len(rows):
                texts.append(spread(values))
        cells.append(" → ".join(texts))
    print(f"| {rows[0]['distortion']} |", " | ".join(cells), "|")
