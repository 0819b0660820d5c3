# SPDX-License-Identifier: MIT
"""python .github/evidence/chart.py TABLE.md CHART.png: draw what accuracy.py prints for one student
of the mixture at 64 pixels, of distortions with several severities (pip install matplotlib)."""
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt

TRAINED = {"blur": (3, "blur: σ in pixels (of 64)"), "noise": (0.4, "noise: σ (pixels are 0 to 1)"),
           "mask": (0.6, "share of pixels missing")}  # the end of its range, and its label
LINES = ((0, "original ViT", "#333333", "o"), (2, "student", "#e8702a", "o"),
         (1, "original ViT, classifier\nrefitted at each severity", "#5b8fd0", "s"))
table, chart = sys.argv[1:]
points = {kind: [] for kind in TRAINED}  # (severity, accuracies)
for line in Path(table).read_text().splitlines()[2:]:
    name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
    accuracies = [float(cell.split()[0]) for cell in cells]
    kind, severity = re.fullmatch(r"([a-z]+)([\d.]*)", name).groups()
    for k in points if kind == "clean" else [kind]:
        points[k].append((float(severity or 0), accuracies))
figure, axes = plt.subplots(1, 3, figsize=(11, 4), sharey=True, layout="constrained")
for ax, (kind, (end, label)) in zip(axes, TRAINED.items(), strict=True):
    for i, text, colour, marker in LINES:
        ax.plot([x for x, _ in points[kind]], [y[i] for _, y in points[kind]], color=colour,
                marker=marker, label=text, linewidth=2.5)
    ax.axvspan(0, end, color="#fdf3d0", zorder=0)
    ax.axhline(5, color="#999999", linestyle=":")
    ax.set(xlabel=label, ylim=(0, 100))
axes[0].set_ylabel("accuracy, %")
figure.suptitle("ViT-Ti/16: in the range it was trained on (shaded) the student is ahead, without "
                "labels of bad photos. Dotted: guessing")
axes[2].legend(frameon=False, fontsize=9)
figure.savefig(chart, dpi=90)
