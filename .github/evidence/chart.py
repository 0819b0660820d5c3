# SPDX-License-Identifier: MIT
"""python .github/evidence/chart.py TABLE CHART.png: bars of what rivals.py printed for students of
the mixture and students of filled photos, the original ViT's best (pip install matplotlib)."""
import sys

import matplotlib.pyplot as plt

COLUMNS = ["clean", "blur\nσ = 3 of 64 px", "noise\nσ = 0.4",
           "60% missing,\nstudent of filled photos"]
BARS = {"original ViT": "#999999", "original ViT, photos restored first": "#9cc3ea",
        "the same, refitted on its guesses for 10,000 photos": "#3f7fc1",
        "student, original classifier, no labels": "#e8702a"}
rows = {}
for line in open(sys.argv[1]):
    name, *cells = [cell.strip() for cell in line.split("|")]
    if name.startswith("**"):
        kind = name.split("**")[1]
    elif cells:
        rows[kind, name] = [[float(x) for x in cell.split(" ± ")] for cell in cells]
columns = []
for kind in ("clean", "blur", "noise", "mask"):
    bad = rows[kind, "as it is"]
    restored = rows.get((kind, "restored"), bad)
    student = restored[4] if kind == "mask" else bad[3]
    columns.append([bad[0], restored[0], restored[2], student])
figure, ax = plt.subplots(figsize=(9, 4.6), layout="constrained")
for i, (label, colour) in enumerate(BARS.items()):
    at = [x + 0.21 * (i - 1.5) for x in range(4)]
    heights = [column[i][0] for column in columns]
    spread = [column[i][1] if len(column[i]) > 1 else 0 for column in columns]
    weight = "bold" if i == 3 else "normal"
    ax.bar(at, heights, 0.2, color=colour, label=label, yerr=spread if i == 3 else None)
    for x, height, over in zip(at, heights, spread, strict=True):
        ax.text(x, height + over + 1, f"{height:.0f}", ha="center", fontsize=12, weight=weight)
ax.axhline(5, color="#555555", linestyle=":")
ax.text(4, 6, "guessing", ha="right", fontsize=11)
ax.set(xlim=(-0.5, 4), ylim=(0, 122), ylabel="accuracy, %")
ax.set(yticks=range(0, 101, 25), xticks=range(4))
ax.set_xticklabels(COLUMNS, fontsize=12)
ax.legend(frameon=False, ncols=2, loc="upper center", fontsize=10.5)
ax.spines[["top", "right"]].set_visible(False)
figure.savefig(sys.argv[2], dpi=100, facecolor="white")
