# SPDX-License-Identifier: MIT
"""python .github/evidence/rivals.py N STUDENTS...: README's table, for run folders of one teacher
(a student's seeds joined by commas) and N training photos. Restoring (pip install scikit-image)
knows kind and severity; its best method is chosen on the test photos. Columns: original ViT; its
classifier refitted with 1,000 labels, N guesses, N guesses at the mixture; features mapped back;
students. "nearest": which of the original, mapped back, and students find their clean photo."""
import sys

import numpy as np
import torch
from accuracy import F, cell, embed, fit_probe, load, load_vit
from skimage import filters, restoration
from alternatives import fill_in

def deblur(image, balance):
    kernel = np.exp(-np.arange(-10, 11) ** 2 / 18)  # σ 3
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    wide = np.pad(image.transpose(2, 0, 1), ((0, 0), (20, 20), (20, 20)), "symmetric").astype(float)
    return np.stack([restoration.wiener(x, kernel, balance) for x in wide], 2)[20:-20, 20:-20]

def each(function, **options):
    def one(image):
        return torch.tensor(function(image.permute(1, 2, 0).numpy(), **options)).permute(2, 0, 1)
    return lambda images: torch.stack([one(image) for image in images]).float().clamp(0, 1)

TESTS = {"clean": ({}, {}), "mask": ({"mask": 0.6}, {"filled": fill_in}), "blur": ({"blur": 3}, {
    f"Wiener {b}": each(deblur, balance=b) for b in (0.0003, 0.001, 0.003, 0.01)})}
TESTS["noise"] = {"noise": 0.4}, {
    **{f"Gauss {s}": each(filters.gaussian, sigma=s, channel_axis=2) for s in (1, 1.5, 2, 2.5, 3)},
    **{f"median {k}": each(filters.median, footprint=np.ones((k, k, 1))) for k in (3, 5)},
    "means": each(restoration.denoise_nl_means, sigma=0.4, h=0.32, patch_size=5, channel_axis=2)}
groups = [group.split(",") for group in sys.argv[2:]]
cfg, (train, train_y), (test, y) = load(groups[0][0], int(sys.argv[1]))
vits = [[load_vit(f"{run}/student.pth", cfg) for run in group] for group in groups]
vit = load_vit(f"{groups[0][0]}/teacher.pth", cfg)
clean, sharp = [embed(vit, cfg, photos, {}, 0) for photos in (train, test)]
original = fit_probe(clean[:1000], train_y[:1000])
guesses, index, own = original(clean), F.normalize(sharp).T, torch.arange(len(y))
mixed = fit_probe(embed(vit, cfg, train, dict(cfg.severities, one_of=1, clean=0.2), 0), guesses)
for name, (cut, fixes) in TESTS.items():
    tried = {m: original(embed(vit, cfg, test, cut, 1, fixes[m])) == y for m in fixes}
    print(f"**{name}**", *[f"{m}: {cell([right])}" for m, right in tried.items()], flush=True)
    rivals, students = [], []
    for how in [None, *sorted(tried, key=lambda m: tried[m].sum())[-1:]]:
        x, many = [embed(vit, cfg, *z, fixes.get(how)) for z in ((test, cut, 1), (train, cut, 0))]
        back = torch.linalg.lstsq(F.pad(many, (0, 1), value=1), clean).solution
        back = F.pad(x, (0, 1), value=1) @ back  # the clean features, as a linear map predicts them
        fits = original, fit_probe(many[:1000], train_y[:1000]), fit_probe(many, guesses), mixed
        rivals += [(z == y)[None] for z in (*[fit(x) for fit in fits], original(back))]
        seen = [[embed(v, cfg, test, cut, 1, fixes.get(how)) for v in group] for group in vits]
        students += [[original(z) == y for z in group] for group in seen]
        print(how or "as it is", *map(cell, rivals[-5:] + students[-len(vits):]), sep=" | ")
        found = [[(z @ index).argmax(1) == own for z in group] for group in [[x], [back], *seen]]
        print("nearest", *map(cell, found), sep=" | ", flush=True)
    guess = [sum(z)[None] / len(z) for z, g in zip(students, groups * 2) if "guess" in g[0]]
    best = [max(others, key=torch.sum)[0].float() for others in (rivals, guess) if others]
    for right in students:  # the lead over the best rival, over guess: mean, 95% by resampling
        lead = 100 * (torch.stack(right).float().mean(0) - torch.stack(best)).numpy()
        draws = np.random.default_rng(0).choice(lead, (10_000, len(y)), axis=1).mean(2)
        print(lead.mean(1).round(1), *np.percentile(draws, [2.5, 97.5], 1).T.round(1), flush=True)
