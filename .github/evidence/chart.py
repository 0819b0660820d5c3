# SPDX-License-Identifier: MIT
"""python .github/evidence/chart.py TABLE CHART.png: bars of what rivals.py printed for students of
the mixture and students of filled photos (pip install matplotlib)."""
import sys

import matplotlib.pyplot as plt

COLUMNS = ["clean", "blur\nσ = 3 of 64 px", "noise\nσ = 0.4", "60% of pixels\nmissing (black)",
           "60% missing,\nfilled"]
BARS = {"original ViT": "#999999", "with the classifier refitted on 1,000 labels": "#9cc3ea",
        "on its own guesses for 10,000 clean photos": "#3f7fc1",
        "student, original classifier, no labels": "#e8702a"}
found = {}
for line in open(sys.argv[1]):
    name, *cells = [cell.strip() for cell in line.split("|")]
    if name.startswith("**"):
        kind = name.split("**")[1]
    elif cells:
        found[kind, name] = [[float(x) for x in cell.split(" ± ")] for cell in cells]
columns = [found["clean", "as it is"], found["blur", "as it is"], found["noise", "as it is"],
           found["mask", "as it is"], found["mask", "restored"]]
columns[4][3] = columns[4][4]  # on filled photos the student of filled photos
figure, ax = plt.subplots(figsize=(10, 4.4), layout="constrained")
for i, (label, colour) in enumerate(BARS.items()):
    at = [x + 0.2 * (i - 1.5) for x in range(5)]
    heights = [column[i][0] for column in columns]
    spread = [column[i][1] if len(column[i]) > 1 else 0 for column in columns]
    weight = "bold" if i == 3 else "normal"
    ax.bar(at, heights, 0.19, color=colour, label=label, yerr=spread if i == 3 else None)
    for x, height, over in zip(at, heights, spread, strict=True):
        ax.text(x, height + over + 1, f"{height:.0f}", ha="center", fontsize=10, weight=weight)
ax.axhline(5, color="#555555", linestyle=":")
ax.set(ylabel="accuracy, %", ylim=(0, 112), xticks=range(5), xticklabels=COLUMNS)
ax.tick_params(axis="x", labelsize=11)
ax.legend(frameon=False, ncols=2, loc="upper center", fontsize=10)
ax.spines[["top", "right"]].set_visible(False)
figure.savefig(sys.argv[2], dpi=100, facecolor="white")
