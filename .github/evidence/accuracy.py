# SPDX-License-Identifier: MIT
"""python .github/evidence/accuracy.py "clean blur3 blur0.7+noise0.1" RUN... [-n 1000] [--data D]:
accuracies in %, a row a distortion. Columns: the teacher with a linear classifier of clean images
("original"), with one fitted on n images distorted alike ("refitted"); students with the first.
Runs are folders, the seeds of one student joined by commas; --data: other images than theirs."""
import argparse
import json
import re
import statistics
from pathlib import Path

import torch
from alternatives import distill  # which finds it, and adds distortions of one's own
from torch.utils.data import DataLoader

from eval import fit_probe

def load(run, n=1000, data=None):
    """A run's options, and its training and test images: for each, batches and labels."""
    cfg = argparse.Namespace(**json.loads(Path(run, "config.json").read_text()))
    cfg.data, cfg.max_images = data or cfg.data, n
    splits = [list(DataLoader(distill.load_data(cfg, split), 50)) for split in ("train", "test")]
    return cfg, *[(split, torch.cat([y for _, y in split])) for split in splits]

def load_vit(path, cfg):
    return distill.load_vit(path, cfg.img_size, cfg.num_heads, cfg.mean, cfg.std)

@torch.no_grad()
def embed(vit, cfg, batches, severities, seed, restore=None):
    """Embeddings of images, which are distorted alike for each vit, and restored if so wanted."""
    generator, parts = torch.Generator().manual_seed(seed), []
    for images, _ in batches:
        images = distill.distort(images / 255, generator, **severities)
        images = restore(images) if restore else images
        with torch.autocast("cpu", torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            parts.append(vit(vit.prepare(images)).cls.float().clone())
    return torch.cat(parts)

def cell(right):  # which images were right, for each seed
    means = [100 * x.float().mean().item() for x in right]
    spread = f" ± {statistics.stdev(means):.1f}" if len(means) > 1 else ""
    return f"{statistics.mean(means):.1f}{spread}"

def main(distortions, runs, n, data):
    groups = [group.split(",") for group in runs]
    cfg, (train, train_y), (test, y) = load(groups[0][0], n, data)
    vits = [[load_vit(f"{run}/student.pth", cfg) for run in group] for group in groups]
    teacher = load_vit(f"{groups[0][0]}/teacher.pth", cfg)
    original = fit_probe(embed(teacher, cfg, train, {}, 0), train_y)
    print("|", " | ".join(["", "original", "refitted", *[group[0] for group in groups]]), "|")
    print("| --- " * (3 + len(groups)) + "|", flush=True)
    for text in distortions.split():
        severities = {kind: float(x) for kind, x in re.findall(r"([a-z]+)([\d.]+)", text)}
        refitted = fit_probe(embed(teacher, cfg, train, severities, 0), train_y)
        x = embed(teacher, cfg, test, severities, 1)
        right = [[original(x) == y], [refitted(x) == y]]
        for group in vits:
            right.append([original(embed(vit, cfg, test, severities, 1)) == y for vit in group])
        print("|", " | ".join([text, *map(cell, right)]), "|", flush=True)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    for name, options in {"distortions": {}, "runs": {"nargs": "+"},
                          "-n": {"type": int, "default": 1000}, "--data": {}}.items():
        parser.add_argument(name, **options)
    main(**vars(parser.parse_args()))
