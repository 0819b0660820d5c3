# SPDX-License-Identifier: MIT
"""python .github/evidence/accuracy.py "clean blur3 blur0.7+noise0.1" "RUN RUN" [accuracy [IMAGES]]:
accuracies in %, a row a distortion: the teacher with a linear classifier of 1,000 clean images,
students with the same (seeds joined by commas), the teacher with one of 1,000 distorted images. For
cls or patches instead: how often the nearest clean image's (at the same place) are one's own."""
import argparse
import json
import re
import sys
from pathlib import Path

import torch
from alternatives import F, distill  # which finds it, and adds distortions of one's own
from torch.utils.data import DataLoader
from eval import fit_probe

def load(run, n=None, data=None):
    cfg = argparse.Namespace(**json.loads(Path(run, "config.json").read_text()))
    cfg.data, cfg.max_images = data or cfg.data, n
    splits = [list(DataLoader(distill.load_data(cfg, split), 50)) for split in ("train", "test")]
    return cfg, *[(split, torch.cat([y for _, y in split])) for split in splits]

def load_vit(path, cfg):
    return distill.load_vit(path, cfg.img_size, cfg.num_heads, cfg.mean, cfg.std)

@torch.no_grad()
def embed(vit, cfg, batches, severities, seed, restore=None, name="cls"):
    generator, parts = torch.Generator().manual_seed(seed), []
    for images, _ in batches:
        images = distill.distort(images / 255, generator, **severities)
        images = restore(images) if restore else images
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            parts.append(getattr(vit(vit.prepare(images)), name).float().clone())
    return torch.cat(parts)

def cell(right):  # which were right, for each seed
    means = 100 * torch.stack(list(right)).float().flatten(1).mean(1)
    return f"{means.mean():.1f}" + (f" ± {means.std():.1f}" if len(means) > 1 else "")

if __name__ == "__main__":
    distortions, runs, find, data = sys.argv[1:] + ["accuracy", None][len(sys.argv) - 3:]
    name = "cls" if find == "accuracy" else find
    groups = [group.split(",") for group in runs.split()]
    cfg, (train, train_y), (test, y) = load(groups[0][0], 1000, data)
    vits = [[load_vit(f"{run}/student.pth", cfg) for run in group] for group in groups]
    teacher = load_vit(f"{groups[0][0]}/teacher.pth", cfg)
    original = fit_probe(embed(teacher, cfg, train, {}, 0), train_y)
    clean = F.normalize(embed(teacher, cfg, test, {}, 1, name=name), dim=-1)
    def right(x):
        if find == "accuracy":
            return original(x) == y
        cosines = torch.einsum("i...d,j...d->...ij", F.normalize(x, dim=-1), clean)
        return cosines.argmax(-1) == torch.arange(len(x))  # the photo's own
    for text in distortions.split():
        cut = {kind: float(x) for kind, x in re.findall(r"([a-z]+)([\d.]+)", text)}
        rows = [[embed(vit, cfg, test, cut, 1, name=name) for vit in g] for g in [[teacher], *vits]]
        refitted = fit_probe(embed(teacher, cfg, train, cut, 0), train_y)
        cells = [cell([right(x) for x in row]) for row in rows]
        cells += [cell([refitted(rows[0][0]) == y])] if find == "accuracy" else []
        print("|", " | ".join([text, *cells]), "|", flush=True)
