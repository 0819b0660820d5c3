# SPDX-License-Identifier: MIT
"""python .github/evidence/rivals.py STUDENTS...: README's table, for run folders of one teacher at
64 pixels (the seeds of one student joined by commas). Restoring knows kind and severity, and the
best of several methods is taken on the test photos themselves (pip install scikit-image)."""
import sys
from functools import partial

import numpy as np
import torch
from accuracy import cell, embed, load, load_vit
from alternatives import fill_in
from scipy.ndimage import median_filter
from skimage import filters
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, wiener

from eval import fit_probe

def deblur(image, balance):
    axis = np.arange(-10, 11)
    kernel = np.exp(-0.5 * (axis[:, None] ** 2 + axis ** 2) / 3 ** 2)
    wide = np.pad(image, ((20, 20), (20, 20), (0, 0)), "symmetric").astype(float)
    planes = [wiener(wide[..., i], kernel / kernel.sum(), balance) for i in range(3)]
    return np.stack(planes, 2)[20:-20, 20:-20]

def each(function, images, **options):
    images = [function(image.permute(1, 2, 0).numpy(), **options) for image in images]
    return torch.tensor(np.array(images)).float().permute(0, 3, 1, 2).clamp(0, 1)

colour = {"channel_axis": 2}
means = partial(each, denoise_nl_means, sigma=0.4, patch_size=5, patch_distance=6, **colour)
TESTS = {"clean": ({}, {}), "blur 3": ({"blur": 3}, {
    f"Wiener {b}": partial(each, deblur, balance=b) for b in (0.001, 0.003, 0.01, 0.03)}),
    "noise 0.4": ({"noise": 0.4}, {
        **{f"Gaussian {s}": partial(each, filters.gaussian, sigma=s, **colour) for s in (1, 1.5, 2)},
        **{f"median {k}": partial(each, median_filter, size=(k, k, 1)) for k in (3, 5)},
        **{f"variation {w}": partial(each, denoise_tv_chambolle, weight=w, **colour) for w in (0.2, 0.4)},
        **{f"means {h}": partial(means, h=h) for h in (0.24, 0.32)}}),
    "mask 0.6": ({"mask": 0.6}, {"filled": fill_in})}
groups = [group.split(",") for group in sys.argv[1:]]
cfg, (train, train_y), (test, y) = load(groups[0][0], None)
vits = [[load_vit(f"{run}/student.pth", cfg) for run in group] for group in groups]
teacher = load_vit(f"{groups[0][0]}/teacher.pth", cfg)
clean = embed(teacher, cfg, train, {}, 0)
original = fit_probe(clean[:1000], train_y[:1000])
draws = torch.randint(len(y), (10_000, len(y)), generator=torch.Generator().manual_seed(0))
for name, (severities, methods) in TESTS.items():
    tried = {}
    for method, restore in methods.items():
        tried[method] = (original(embed(teacher, cfg, test, severities, 1, restore)) == y).sum()
    print(name, {method: right.item() / 10 for method, right in tried.items()})
    rivals, students = {}, {}
    for state in ["as it is", *sorted(tried, key=tried.get)[-1:]]:
        x = embed(teacher, cfg, test, severities, 1, methods.get(state))
        many = embed(teacher, cfg, train, severities, 0, methods.get(state))
        fits = {"original": original, "refitted, 1,000 labels": fit_probe(many[:1000], train_y[:1000]),
                "refitted, 10,000 guesses": fit_probe(many, original(clean))}
        ...
