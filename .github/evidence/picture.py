# SPDX-License-Identifier: MIT
"""python .github/evidence/picture.py RUN PHOTO...: patches.png, each photo under one kind of
distortion, in their order, and patches-all.png, all under all (pip install matplotlib)."""
import argparse
import json
import sys
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from accuracy import distill, load_vit
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

KINDS = {"blur": "blur, σ {:g} px", "noise": "noise, σ {:g}", "mask": "{:.0%} missing"}
NAMES = ["photo", "distorted", "original ViT,\nclean photo", "original ViT,\nbad photo",
         "student,\nbad photo"]

@torch.no_grad()
def row_of(photo, kind):
    """Five pictures, and what to write below each."""
    clean = center_crop(resize(distill.read_image(photo), cfg.data_size), cfg.data_size)
    clean = pil_to_tensor(clean)[None] / 255
    severity = cfg.severities[kind][1]
    distorted = distill.distort(clean, torch.Generator().manual_seed(0), **{kind: severity})
    inputs = ((teacher, clean), (teacher, distorted), (student, distorted))
    patches = [vit(vit.prepare(images)).patches[0] for vit, images in inputs]
    patches = [z - patches[0].mean(0) for z in patches]  # as in the loss, but of one photo
    match = [F.cosine_similarity(z, patches[0], dim=1).mean().item() for z in patches]
    match = [round(m, 2) + 0.0 for m in match]  # no -0.00
    print(f"| {Path(photo).stem} | {kind} {severity:g} | {match[1]:.2f} → {match[2]:.2f} |")
    axes = torch.linalg.svd(patches[0]).Vh[:3].T  # three main directions of the clean photo
    width = 4 * (patches[0] @ axes).std(0)
    side = round(len(patches[0]) ** 0.5)
    colours = [(0.5 + z @ axes / width).clamp(0, 1).view(side, side, 3) for z in patches]
    pictures = [clean[0].permute(1, 2, 0), distorted[0].permute(1, 2, 0), *colours]
    texts = ["", KINDS[kind].format(severity), "target", *[f"match {m:.2f}" for m in match[1:]]]
    return pictures, texts

def draw(path, rows):
    figure, axes = plt.subplots(len(rows), 5, figsize=(10, 2.18 * len(rows)), layout="constrained")
    for i, (pictures, texts) in enumerate(rows):
        for j, (ax, picture, text) in enumerate(zip(axes[i], pictures, texts, strict=True)):
            style = {"color": "#c2500a" if j == 4 else "black", "fontsize": 14}
            ax.imshow(picture.numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[], frame_on=False)
            ax.set_xlabel(text, **style)
            if i == 0:
                ax.set_title(NAMES[j], **style)
    figure.savefig(path, dpi=85, facecolor="white")

run, *photos = sys.argv[1:]
cfg = argparse.Namespace(**json.loads(Path(run, "config.json").read_text()))
teacher, student = [load_vit(f"{run}/{who}.pth", cfg) for who in ("teacher", "student")]
everything = {(photo, kind): row_of(photo, kind) for photo in photos for kind in KINDS}
draw("patches-all.png", list(everything.values()))
draw("patches.png", [everything[pair] for pair in zip(photos, cycle(KINDS))])
