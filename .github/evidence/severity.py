# SPDX-License-Identifier: MIT
"""python .github/evidence/severity.py NAME RUN...: accuracy by severity, within and beyond what was
trained on, for runs of one teacher: NAME.json and NAME.png (pip install matplotlib)."""
import argparse
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import distill
import eval as evaluation

KINDS = {"blur": ([1, 2, 3, 4.5, 6], 3, "blur: σ in pixels (of 64)"),  # the end trained on, label
         "noise": ([0.1, 0.2, 0.4, 0.6, 0.8], 0.4, "noise: σ (pixels are 0 to 1)"),
         "mask": ([0.15, 0.3, 0.6, 0.75, 0.9], 0.6, "share of pixels missing")}
name, *runs = sys.argv[1:]
torch.manual_seed(0)
cfg = argparse.Namespace(**json.loads(Path(runs[0], "config.json").read_text()))
vars(cfg).update(device="cpu", workers=1, max_images=1000)
splits = [list(distill.make_loader(dataset, cfg, 50)) for dataset in distill.load_data(cfg)]
train_y, test_y = [torch.cat([y for _, y in split]) for split in splits]
paths = [f"{runs[0]}/teacher.pth", *[f"{run}/student.pth" for run in runs]]
teacher, *students = [distill.load_vit(path, cfg.img_size, cfg.num_heads) for path in paths]
@torch.inference_mode()
def embed(vit, k, severities):
    """Embeddings of the images of split k, which are distorted alike for each vit."""
    generator, parts = torch.Generator().manual_seed(k), []
    for images, _ in splits[k]:
        images = distill.distort(images / 255, generator, **severities)
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            cls = vit(distill.prepare(images, cfg.img_size, cfg.mean, cfg.std)).cls
        parts.append(cls.float().clone())
    return torch.cat(parts)
original, rows = evaluation.fit_probe(embed(teacher, 0, {}), train_y), []
for kind, severity in [("clean", 0), *[(k, s) for k in KINDS for s in KINDS[k][0]]]:
    severities = {kind: severity} if severity else {}
    refitted = evaluation.fit_probe(embed(teacher, 0, severities), train_y)
    x = embed(teacher, 1, severities)
    guesses = [original(x), refitted(x), *[original(embed(vit, 1, severities)) for vit in students]]
    right = [round(100 * (guess == test_y).float().mean().item(), 1) for guess in guesses]
    rows.append([kind, severity, right[0], right[1], right[2:]])
    print(f"| {kind} {severity} | {right[0]} | {right[1]} | {right[2:]} |", flush=True)
Path(f"{name}.json").write_text(json.dumps(rows))
_, axes = plt.subplots(1, 3, figsize=(11, 4), sharey=True, layout="constrained")
for ax, (kind, (_, end, label)) in zip(axes, KINDS.items(), strict=True):
    shown = [row for row in rows if row[0] in ("clean", kind)]
    for i, text, colour in ((2, "original ViT", "#777777"), (4, "student", "#e8702a"),
                            (3, "original ViT, classifier\nrefitted at each severity", "#5b8fd0")):
        y = [np.mean(row[i]) for row in shown]
        ax.plot([row[1] for row in shown], y, color=colour, marker="o", label=text, linewidth=2.5)
    ax.axvspan(0, end, color="#eeeeee", zorder=0)
    ax.axhline(100 / len(test_y.unique()), color="#999999", linestyle=":")
    ax.set(xlabel=label, ylim=(0, 100), ylabel="accuracy, %")
plt.suptitle("The student is ahead where it was trained (grey), without labels. Dotted: chance")
axes[2].legend(frameon=False, fontsize=9)
plt.savefig(f"{name}.png", dpi=90)
