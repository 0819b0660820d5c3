# SPDX-License-Identifier: MIT
"""python .github/evidence/picture.py RUN FILE...: each photo under each kind of the mixture at its
highest severity, as eval.py draws them into RUN/patches.png; cosines of embedding and patches
with the teacher's at the clean photo, teacher → student; and README.png, of three of the rows.
"""
import sys

import torch
import torch.nn.functional as F
from measure import distill, evaluation, load, vit
from PIL import Image

run, *files = sys.argv[1:]
cfg, _, _ = load(run, 1, 1, seed=0)
vits = {who: vit(run, cfg, who) for who in ("teacher", "student")}
square = distill.square(cfg.data_size)
kinds = list(cfg.severities)
images = [square(distill.read_image(file)) for file in files for _ in kinds]
evaluation.draw_patches(f"{run}/patches.png", cfg, vits, images)
generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
for i, image in enumerate(images):
    clean = image[None] / 255
    kind = kinds[i % len(kinds)]
    severity = max(cfg.severities[kind])
    distorted = distill.distort(clean, generator, **{kind: severity})  # eval.py's draws
    inputs = (cfg.img_size, cfg.mean, cfg.std)
    with torch.inference_mode():
        target = vits["teacher"](distill.prepare(clean, *inputs))
        found = {who: vit(distill.prepare(distorted, *inputs)) for who, vit in vits.items()}
    cls = [F.cosine_similarity(x.cls, target.cls).item() for x in found.values()]
    patches = [F.cosine_similarity(x.patches, target.patches, dim=-1).mean().item()
               for x in found.values()]
    print(f"| {files[i // len(kinds)]} | {kind} {severity:g} | {cls[0]:.2f} → {cls[1]:.2f} "
          f"| {patches[0]:.2f} → {patches[1]:.2f} |")
whole = Image.open(f"{run}/patches.png")
shown = [1, 5, 7]  # rocket under noise, coffee with missing pixels, astronaut under noise
picture = Image.new("RGB", (whole.width, 2 + 226 * len(shown)), "white")
for place, row in enumerate(shown):
    picture.paste(whole.crop((0, 226 * row, whole.width, 226 * row + 228)), (0, 226 * place))
picture.resize((picture.width * 3 // 4, picture.height * 3 // 4)).quantize(255).save("README.png")
