# SPDX-License-Identifier: MIT
"""What the other scripts share. They are run from the repository's root, where distill.py lies."""
import argparse
import json
import sys
from pathlib import Path

import torch
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).parents[2]))
import distill  # noqa: E402
import eval as evaluation  # noqa: E402


def load(run, train_images, test_images, **changes):
    """A run's options, and its first training and test images with their labels, as tensors."""
    cfg = argparse.Namespace(**{**json.loads(Path(run, "config.json").read_text()), **changes})
    cfg.max_images = max(train_images, test_images)
    train_set, test_set, _ = distill.load_data(cfg)
    found = []
    for dataset, n in ((train_set, train_images), (test_set, test_images)):
        batches = list(distill.make_loader(Subset(dataset, range(len(dataset))[:n]), cfg, 64))
        images = [images for images, _ in batches]
        found.append((torch.cat(images), torch.cat([labels for _, labels in batches])))
    return cfg, *found


def vit(run, cfg, who="student"):
    return distill.load_vit(f"{run}/{who}.pth", cfg.img_size, cfg.num_heads)


@torch.inference_mode()
def embed(vit, images, cfg, severities, seed, one_of=False, change=None):
    """Global embeddings of images, distorted alike for every model; change comes after."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for batch in images.split(64):
        batch = distill.distort(batch / 255, generator, one_of, **severities)
        batch = change(batch) if change else batch
        with distill.autocast(cfg):
            features = vit(distill.prepare(batch, cfg.img_size, cfg.mean, cfg.std))
        parts.append(features.cls.float().clone())
    return torch.cat(parts)


def accuracy(probe, x, y):
    """In %."""
    return round(100 * evaluation.accuracy(probe, x, y), 2)


def spread(values):
    """Mean and standard deviation over seeds, as text."""
    values = torch.tensor(values, dtype=torch.float64)
    return f"{values.mean():.3f} ± {values.std():.3f}" if len(values) > 1 else f"{values[0]:.3f}"
