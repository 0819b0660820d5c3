# SPDX-License-Identifier: MIT
"""python .github/evidence/rivals.py N STUDENTS...: README's table, for run folders of one teacher
(the seeds of one student joined by commas). Restoring (pip install scikit-image) knows kind and
severity, and its best method is chosen on the test photos. Columns: the original ViT, refitted
with 1,000 labels, refitted with its own guesses for N photos; students."""
import sys

import numpy as np
import torch
from accuracy import cell, embed, load, load_vit
from alternatives import fill_in
from scipy.ndimage import median_filter
from skimage.filters import gaussian
from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, wiener
from eval import fit_probe  # which accuracy's imports find

def deblur(image, balance):
    axis = np.arange(-10, 11)
    kernel = np.exp(-0.5 * (axis[:, None] ** 2 + axis ** 2) / 3 ** 2)
    wide = np.pad(image, ((20, 20), (20, 20), (0, 0)), "symmetric").astype(float)
    wide = [wiener(x, kernel / kernel.sum(), balance) for x in np.moveaxis(wide, 2, 0)]
    return np.stack(wide, 2)[20:-20, 20:-20]

def each(function, **options):
    def restore(images):
        parts = [function(image.permute(1, 2, 0).numpy(), **options) for image in images]
        return torch.tensor(np.array(parts)).float().permute(0, 3, 1, 2).clamp(0, 1)
    return restore

TESTS = {"clean": ({}, {}), "mask": ({"mask": 0.6}, {"filled": fill_in}), "blur": ({"blur": 3}, {
    f"Wiener {b}": each(deblur, balance=b) for b in (0.001, 0.003, 0.01, 0.03)})}
TESTS["noise"] = {"noise": 0.4}, {
    **{f"Gaussian {s}": each(gaussian, sigma=s, channel_axis=2) for s in (1, 1.5, 2)},
    **{f"median {k}": each(median_filter, size=(k, k, 1)) for k in (3, 5)},
    **{f"variation {w}": each(denoise_tv_chambolle, weight=w, channel_axis=2) for w in (0.2, 0.4)},
    **{f"means {h}": each(denoise_nl_means, sigma=0.4, h=0.4 * h, patch_size=5, patch_distance=6,
                          channel_axis=2) for h in (0.6, 0.8)}}
groups = [group.split(",") for group in sys.argv[2:]]
cfg, (train, train_y), (test, y) = load(groups[0][0], int(sys.argv[1]))
vits = [[load_vit(f"{run}/student.pth", cfg) for run in group] for group in groups]
teacher = load_vit(f"{groups[0][0]}/teacher.pth", cfg)
clean, draws = embed(teacher, cfg, train, {}, 0), torch.randint(len(y), (10_000, len(y)))
original, all_labels = fit_probe(clean[:1000], train_y[:1000]), fit_probe(clean, train_y)
print("N labels:", cell([all_labels(embed(teacher, cfg, test, {}, 1)) == y]))
for name, (cut, methods) in TESTS.items():
    tried = {m: original(embed(teacher, cfg, test, cut, 1, methods[m])) == y for m in methods}
    tried = {m: right.sum().item() for m, right in tried.items()}
    print(f"**{name}** {tried}", *[group[0] for group in groups], sep=" | ")
    rivals, students = [], []
    for restore in [None, *[methods[m] for m in sorted(tried, key=tried.get)[-1:]]]:
        x, many = [embed(teacher, cfg, *z, restore) for z in ((test, cut, 1), (train, cut, 0))]
        fits = original, fit_probe(many[:1000], train_y[:1000]), fit_probe(many, original(clean))
        rivals += [fit(x) == y for fit in fits]
        students += [[original(embed(v, cfg, test, cut, 1, restore)) == y for v in g] for g in vits]
        rows = [*[[right] for right in rivals[-3:]], *students[-len(vits):]]
        print("restored" if restore else "as it is", *map(cell, rows), sep=" | ", flush=True)
    for right in students:  # the lead over the best rival, and 95% of resampled test photos
        lead = 100 * (torch.stack(right).float().mean(0) - max(rivals, key=torch.sum).float())
        low, high = lead[draws].mean(1).quantile(torch.tensor([0.025, 0.975]))
        print(f"{lead.mean():+.1f} ({low:+.1f} to {high:+.1f})", flush=True)
