# SPDX-License-Identifier: MIT
"""python .github/evidence/picture.py RUN PHOTO...: draw the README's picture, patches.png: each
photo under one kind of distortion; all under all in patches-all.png (pip install matplotlib)."""
import argparse
import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

sys.path.insert(0, str(Path(__file__).parents[2]))
import distill

run, *photos = sys.argv[1:]
cfg = argparse.Namespace(**json.loads(Path(run, "config.json").read_text()))
teacher, student = [distill.load_vit(f"{run}/{who}.pth", cfg.img_size, cfg.num_heads)
                    for who in ("teacher", "student")]
kinds = {"blur": "blur, σ = {:g} px", "noise": "noise, σ = {:g}", "mask": "{:.0%} missing"}
generator = torch.Generator().manual_seed(0)
names = ["photo", "distorted", "original ViT,\nclean photo", "original ViT,\nbad photo",
         "student,\nbad photo"]

@torch.inference_mode()
def row_of(photo, kind):
    """Five pictures, and what to write below each."""
    clean = center_crop(resize(distill.read_image(photo), cfg.data_size), cfg.data_size)
    clean = pil_to_tensor(clean)[None] / 255
    severity = max(cfg.severities[kind])
    distorted = distill.distort(clean, generator, **{kind: severity})
    x, y = [distill.prepare(z, cfg.img_size, cfg.mean, cfg.std) for z in (clean, distorted)]
    patches = [vit(z).patches[0] for vit, z in ((teacher, x), (teacher, y), (student, y))]
    mean = patches[0].mean(dim=0)
    axes = torch.linalg.svd(patches[0] - mean).Vh[:3].T
    deviation = ((patches[0] - mean) @ axes).std(dim=0)
    side = round(len(patches[0]) ** 0.5)
    colours = [(0.5 + (z - mean) @ axes / (4 * deviation)).clamp(0, 1) for z in patches]
    match = [F.cosine_similarity(z, patches[0], dim=1).mean().item() for z in patches]
    print(f"| {Path(photo).stem} | {kind} {severity:g} | {match[1]:.2f} → {match[2]:.2f} |")
    pictures = [clean[0].permute(1, 2, 0), distorted[0].permute(1, 2, 0)]
    texts = ["", kinds[kind].format(severity), "target", *[f"match {m:.2f}" for m in match[1:]]]
    return [*pictures, *[z.view(side, side, 3) for z in colours]], texts

everything = {(photo, kind): row_of(photo, kind) for photo in photos for kind in kinds}
few = [everything[pair] for pair in zip(photos, ("mask", "blur", "noise", "noise"), strict=False)]
for path, rows in (("patches.png", few), ("patches-all.png", list(everything.values()))):
    figure, axes = plt.subplots(len(rows), 5, figsize=(10, 2.18 * len(rows)), layout="constrained")
    for i, (pictures, texts) in enumerate(rows):
        for j, (ax, picture, text) in enumerate(zip(axes[i], pictures, texts, strict=True)):
            colour = "#d95f0e" if j == 4 else "black"
            ax.imshow(picture.numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[], frame_on=False)
            ax.set_xlabel(text, color=colour, fontsize=11)
            if i == 0:
                ax.set_title(names[j], color=colour, fontsize=11)
    figure.savefig(path, dpi=85)
