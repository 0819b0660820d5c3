# SPDX-License-Identifier: MIT
"""Print a table of accuracies in %, a row a distortion, for runs of one teacher. Columns: the
teacher with a linear classifier of its embeddings of clean images ("original"); the teacher with
one fitted anew on images distorted alike ("refitted"); each student with the original classifier.
"""
import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import distill
import eval as evaluation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("distortions", help='such as "clean blur1 blur3 blur0.7+noise0.1"')
parser.add_argument("runs", nargs="+", help="folders; the seeds of one student joined by commas")
parser.add_argument("--max-images", type=int, default=1000, help="of each split [1000]")
args = parser.parse_args()
torch.manual_seed(0)
groups = [group.split(",") for group in args.runs]
cfg = argparse.Namespace(**json.loads(Path(groups[0][0], "config.json").read_text()))
vars(cfg).update(device="cpu", workers=1, max_images=args.max_images)
splits = [list(distill.make_loader(dataset, cfg, 50)) for dataset in distill.load_data(cfg)]
train_y, test_y = [torch.cat([y for _, y in split]) for split in splits]

def load(path):
    return distill.load_vit(path, cfg.img_size, cfg.num_heads)

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

teacher = load(f"{groups[0][0]}/teacher.pth")
students = [[load(f"{run}/student.pth") for run in group] for group in groups]
original = evaluation.fit_probe(embed(teacher, 0, {}), train_y)
print("|", " | ".join(["", "original", "refitted", *[group[0] for group in groups]]), "|")
print("| --- " * (3 + len(groups)) + "|", flush=True)
for text in args.distortions.split():
    severities = {kind: float(x) for kind, x in re.findall(r"([a-z]+)([\d.]+)", text)}
    refitted = evaluation.fit_probe(embed(teacher, 0, severities), train_y)
    x = embed(teacher, 1, severities)
    guesses = [[original(x)], [refitted(x)]]
    guesses += [[original(embed(vit, 1, severities)) for vit in group] for group in students]
    right = [[100 * (y == test_y).float().mean().item() for y in group] for group in guesses]
    cells = [f"{statistics.mean(group):.1f}" for group in right]
    cells = [f"{cell} ± {statistics.stdev(group):.1f}" if len(group) > 1 else cell
             for cell, group in zip(cells, right, strict=True)]
    print("|", " | ".join([text, *cells]), "|", flush=True)
