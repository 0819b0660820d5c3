# SPDX-License-Identifier: MIT
"""python .github/evidence/chart.py TABLE CHART.png: bars of what rivals.py printed for four groups:
students, students of filled photos, and the same two by --guesses (pip install matplotlib)."""
import sys

import matplotlib.pyplot as plt

KINDS = {"clean": "clean", "blur": "blur\nσ = 3 of 64 px", "noise": "noise\nσ = 0.4",
         "mask": "60% missing,\nfilled (grey: not)"}
BARS = {"original ViT": "#999999",
        "original ViT, photos restored, linear layer refitted": "#9cc3ea",
        "whole ViT fine-tuned on its own guesses": "#3f7fc1", "student (this method)": "#e8702a"}
TITLES = "Right by the classifier, %", "Own clean photo found among 1,000 by the embedding, %"
lines = [[cell.strip() for cell in line.split("|")] for line in open(sys.argv[1])]
columns = {title: [] for title in TITLES}
for kind in KINDS:
    start = [line[0].startswith(f"**{kind}**") for line in lines].index(True)
    rows = [line[1:] for line in lines[start + 1:start + 5] if len(line) > 1]
    bad, found = rows[:2]  # as it is
    better, better_found = rows[2:] or rows  # restored
    use, use_found, of = (better, better_found, 1) if kind == "mask" else (bad, found, 0)
    columns[TITLES[0]].append([bad[0], better[2], use[7 + of], use[5 + of]])
    columns[TITLES[1]].append([found[0], better_found[1], use_found[4 + of], use_found[2 + of]])
figure, axes = plt.subplots(2, 1, figsize=(9, 7.6), layout="constrained")
for ax, (title, values) in zip(axes, columns.items(), strict=True):
    for i, (label, colour) in enumerate(BARS.items()):
        for x, column in enumerate(values):
            height, *spread = [float(part) for part in column[i].split(" ± ")]
            at = x + 0.21 * (i - 1.5)
            ax.bar(at, height, 0.2, color=colour, yerr=spread or None, label="" if x else label)
            ax.text(at, height + sum(spread) + 1, f"{height:.0f}", ha="center", fontsize=12,
                    weight="bold" if i == 3 else "normal")
    ax.set(xlim=(-0.5, 3.5), ylim=(0, 112), yticks=range(0, 101, 25), xticks=range(4))
    ax.set_xticklabels(KINDS.values(), fontsize=12)
    ax.set_title(title, fontsize=13, loc="left")
    ax.spines[["top", "right"]].set_visible(False)
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2,
              frameon=False, fontsize=11.5)
figure.savefig(sys.argv[2], dpi=100, facecolor="white")
