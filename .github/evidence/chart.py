# SPDX-License-Identifier: MIT
"""python .github/evidence/chart.py: draw chart.png from curves.json (pip install matplotlib)."""
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

GREY = "#808080"  # readable on white and on black
LINES = {"student": ("student", "#e8743b", "-"),
         "fitted anew": ("teacher, classifier fitted anew", "#5b8fd0", "--"),
         "median": ("teacher behind a 3 x 3 median filter", "#4aa564", ":"),
         "teacher": ("teacher", GREY, "-")}
AXES = {"blur": ("blur, sigma in pixels of 64", 3), "noise": ("noise, standard deviation", 0.4),
        "mask": ("share of pixels missing", 0.6)}
for part in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
    plt.rcParams[part] = GREY
rows = json.loads(Path("curves.json").read_text())
figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), sharey=True, layout="constrained")
for ax, (kind, (title, trained)) in zip(axes, AXES.items(), strict=True):
    found = [row for row in rows if row["kind"] == kind]
    x = [row["severity"] for row in found]
    for key, (label, colour, style) in LINES.items():
        y = np.array([row[key] for row in found]).reshape(len(x), -1)  # [severities, seeds]
        ax.plot(x, y.mean(axis=1), style, color=colour, label=label, linewidth=2, marker="o",
                markersize=3)
        ax.fill_between(x, y.min(axis=1), y.max(axis=1), color=colour, alpha=0.25, linewidth=0)
    ax.axvspan(0, trained, color=GREY, alpha=0.12, linewidth=0, zorder=0)
    ax.text(trained / 2, 2, "trained", ha="center", fontsize=9)
    ax.set_xlabel(title)
    ax.set_xlim(0, x[-1])
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("accuracy, %")
axes[0].set_ylim(0, None)
handles, names = axes[0].get_legend_handles_labels()
figure.legend(handles, names, frameon=False, ncols=4, loc="outside upper center", fontsize=9)
figure.savefig("chart.png", dpi=110, transparent=True)
