# SPDX-License-Identifier: MIT
"""Draws the README's chart from results.json of its runs: pip install matplotlib, then
python .github/chart.py in the folder that holds runs/.
"""
import json

import matplotlib.pyplot as plt
import numpy as np

ROWS = {"clean": 0, "blur 2": 3, "noise 0.3": 5, "mask 0.5": 7, "salt 0.1": 8,
        "contrast\n0.7": 9, "stacked": 10}
PANELS = {
    "CIFAR-10, small ViT (three training seeds)": ["mixture-0", "mixture-1", "mixture-2"],
    "photos of 20 kinds, ViT-S/14 (one training seed)": ["tiny-mixture"],
}
GREY = "#808080"  # readable on white and on black

parts = ["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"]
plt.rcParams.update(dict.fromkeys(parts, GREY))
figure, axes = plt.subplots(1, 2, figsize=(11, 3.3), sharey=True, layout="constrained")
for ax, (title, runs) in zip(axes, PANELS.items(), strict=True):
    results = [json.load(open(f"runs/{run}/results.json"))["rows"] for run in runs]
    for who, shift, colour in (("teacher", -0.2, "#909090"), ("student", 0.2, "#e8743b")):
        key = f"clean_probe_{who}"
        heights = np.mean([[100 * rows[i][key][0] for i in ROWS.values()] for rows in results], 0)
        bars = ax.bar(np.arange(len(ROWS)) + shift, heights, 0.38, label=who, color=colour)
        ax.bar_label(bars, fmt="%.0f", color=GREY, fontsize=8)
    ax.set_xticks(range(len(ROWS)), ROWS, fontsize=9)
    ax.set_title(title, fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
axes[0].set_ylabel("accuracy, %")
axes[0].legend(frameon=False, ncols=2, loc="upper right")
figure.savefig(".github/chart.png", dpi=120, transparent=True)
