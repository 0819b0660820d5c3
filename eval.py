# SPDX-License-Identifier: MIT
"""Evaluate a run of distill.py: what distortions cost its teacher and what its student wins back,
also of kinds never seen in training. Prints a table; writes results.json and attention.png.
"""
import argparse
import json
import math
import os
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import distill

HELD_OUT = [  # severities, the same for every run
    {"blur": 1.4},
    {"blur": 2.0},
    {"noise": 0.15},
    {"noise": 0.3},
    {"mask": 0.25},
    {"mask": 0.5},
    {"salt": 0.1},
    {"contrast": 0.7},
    {"blur": 0.7, "noise": 0.1, "mask": 0.2},
]

# ---- The linear probe ----------------------------------------------------------------------------

def fit_probe(x, y):
    """Multinomial logistic regression of labels y [N] on features x [N, D], as a function from
    features [M, D] to labels [M].

    Features are standardized; L-BFGS minimizes cross-entropy + strength * |weights|^2, with that of
    six strengths which is best on a held-out fifth. Deterministic. Raises ValueError for other
    shapes, no images, and features that are not finite.
    """
    x = torch.as_tensor(x).detach().float()
    y = torch.as_tensor(y).to(x.device)
    if x.ndim != 2 or y.shape != x.shape[:1] or len(y) == 0 or not x.isfinite().all():
        raise ValueError(f"x {list(x.shape)}, y {list(y.shape)} are not finite [N, D] and [N]")
    mean = x.mean(dim=0)
    std = x.std(dim=0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs(), std, torch.inf)  # a constant feature counts as 0

    def scores(x, weights):  # [N, classes]; the last column of weights [classes, D + 1] is the bias
        return F.linear(x, weights[:, :-1], weights[:, -1])

    def solve(x, y, strength):  # y [N] indexes classes, which are found below
        weights = torch.zeros(len(classes), x.shape[1] + 1, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=100, tolerance_change=1e-5,
                                      line_search_fn="strong_wolfe")
        def loss():
            optimizer.zero_grad()
            fit = F.cross_entropy(scores(x, weights), y)
            value = fit + strength * weights[:, :-1].square().sum()
            value.backward()
            return value
        optimizer.step(loss)
        return weights.detach()

    with torch.inference_mode(False), torch.enable_grad():
        x = (x.clone() - mean) / std  # cloned, because inference tensors take no gradient
        classes, y = y.unique(return_inverse=True)
        generator = torch.Generator().manual_seed(0)
        held = (torch.randperm(len(y), generator=generator) < len(y) // 5).to(x.device)
        def right(strength):
            found = scores(x[held], solve(x[~held], y[~held], strength)).argmax(dim=1)
            return (found == y[held]).sum().item()
        strength = max([1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5], key=right)  # ties go to the stronger
        weights = solve(x, y, strength)

    def predict(x):
        x = torch.as_tensor(x).detach().to(mean)
        return classes[scores((x - mean) / std, weights).argmax(dim=1)]
    return predict

def accuracy(predict, x, y):
    return (predict(x).cpu() == torch.as_tensor(y).cpu()).float().mean().item()

def linear_probe(train_x, train_y, test_x, test_y):
    """The test accuracy, in [0, 1], of fit_probe on the training features and labels."""
    return accuracy(fit_probe(train_x, train_y), test_x, test_y)

# ---- The table -----------------------------------------------------------------------------------

def summary(figures):
    """[mean, standard deviation] of each list of figures, None where a seed has none."""
    result = {}
    for key, values in figures.items():
        result[key] = None if None in values else [float(np.mean(values)), float(np.std(values))]
    return result

def evaluate(cfg, vits, data):
    """The rows and the label shares of results.json."""
    images, labels, test_images, test_labels = data
    clean = distill.embed(vits["teacher"], images, cfg, {})
    clean_test = distill.embed(vits["teacher"], test_images, cfg, {})
    clean_probe = fit_probe(clean, labels)
    clean_accuracy = accuracy(clean_probe, clean_test, test_labels)
    rows = []
    by_share = {share: defaultdict(list) for share in cfg.labels}
    tests = [({}, False), (distill.severities_of(cfg), True)]  # True: seen in training
    tests += [(severities, False) for severities in HELD_OUT]
    for severities, seen in tqdm(tests, "evaluating", disable=None):
        one_of = seen and cfg.one_of
        shares = cfg.labels if seen else []
        figures = defaultdict(list)  # a value for each seed
        for seed in range(cfg.seeds if severities else 1):
            for who, vit in vits.items():
                # Even seeds distort the training images, odd ones the test images.
                x = distill.embed(vit, images, cfg, severities, one_of, 2 * seed)
                test_x = distill.embed(vit, test_images, cfg, severities, one_of, 2 * seed + 1)
                cosine = F.cosine_similarity(test_x, clean_test).mean().item()
                figures[f"cos_{who}"].append(cosine)
                figures[f"probe_{who}"].append(linear_probe(x, labels, test_x, test_labels))
                figures[f"clean_probe_{who}"].append(accuracy(clean_probe, test_x, test_labels))
                for share in shares:
                    kept = distill.balanced_subset(labels, max(1, round(share * len(labels))), seed)
                    found = linear_probe(x[kept], labels[kept], test_x, test_labels)
                    by_share[share][f"probe_{who}"].append(found)
            teacher = figures["probe_teacher"][-1]
            lost = clean_accuracy - teacher
            won = figures["probe_student"][-1] - teacher
            figures["recovered"].append(won / lost if lost >= 0.01 else None)
        name = distill.describe(severities, one_of)
        rows.append({"distortion": name, "seen": seen, **summary(figures)})
    return rows, [{"share": share, **summary(found)} for share, found in by_share.items()]

COLUMNS = {  # of the printed table; T is the teacher, S the student
    "cos_teacher": "cosine T",
    "cos_student": "cosine S",
    "probe_teacher": "probe T",
    "probe_student": "probe S",
    "clean_probe_teacher": "clean probe T",
    "clean_probe_student": "clean probe S",
    "recovered": "recovered",
}

def print_table(rows, trained):
    print(f"{'in %; ** trained on, * its kinds':32}", *(f"{name:>13}" for name in COLUMNS.values()))
    for row in rows:
        name = row["distortion"]
        mark = "*" if any(kind in name for kind in trained) else ""
        if row.get("seen"):
            mark = "**"
        cells = []
        for key in COLUMNS:
            figures = row.get(key)
            cells.append(f"{100 * figures[0]:.1f} ± {100 * figures[1]:.1f}" if figures else "-")
        print(f"{name[:29]:29} {mark:2}", *(f"{cell:>13}" for cell in cells))

# ---- The picture ---------------------------------------------------------------------------------

@torch.inference_mode()
def draw_attention(path, cfg, vits, images):
    """Save a row for each uint8 image [S, S, 3]: clean; distorted as strongly as in training, by
    each kind in turn where the run is one-of; and, over the clean image in grey, where the last
    block's global token looks (mean of heads): teacher at clean, teacher and student at distorted.
    """
    from PIL import Image  # which torchvision brings
    clean = distill.to_float(images, cfg.device)
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    trained = distill.severities_of(cfg).items()
    strongest = {name: float(np.max(value)) for name, value in trained}
    kinds = [strongest]
    if cfg.one_of and strongest:
        kinds = [{name: value} for name, value in strongest.items()]
    distorted = []
    for i, image in enumerate(clean):
        severities = kinds[i % len(kinds)]
        distorted.append(distill.distort(image[None], generator, **severities))
    distorted = torch.cat(distorted)

    columns = [clean, distorted]
    for who, seen in (("teacher", clean), ("teacher", distorted), ("student", distorted)):
        features = vits[who](distill.prepare(seen, cfg.img_size), attn_blocks=1)
        num_patches = features.patches.shape[1]
        heat = features.attn[0][:, :, 0, -num_patches:].mean(dim=1)  # [B, N]
        heat = heat / heat.amax(dim=1, keepdim=True)
        heat = heat.unflatten(1, (1, math.isqrt(num_patches), -1))
        heat = F.interpolate(heat, clean.shape[2:], mode="bilinear")
        # From black over red and yellow to white as heat rises.
        colour = torch.cat([3 * heat, 3 * heat - 1, 3 * heat - 2], dim=1).clamp(0, 1)
        columns.append(0.4 * clean.mean(dim=1, keepdim=True) + 0.6 * colour)

    cells = F.pad(torch.stack(columns, dim=1), (1, 1, 1, 1), value=1.0)  # [B, 5, 3, S + 2, S + 2]
    pixels = (255 * cells).byte().permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).cpu().numpy()
    zoom = math.ceil(160 / clean.shape[2])
    Image.fromarray(pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)).save(path)

# ---- The command line ----------------------------------------------------------------------------

def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("run", metavar="RUN", help="the folder of a run of distill.py")
    add("--pictures", nargs="+", metavar="FILE", help="only draw these images")
    share = distill.between(1e-9, 1)
    add("--labels", type=share, nargs="+", default=[1.0], help="shares of the labels [1.0]")
    add("--seeds", type=distill.COUNT, default=3, help="draws of distortions and labels [3]")
    add("--max-images", type=distill.COUNT, help="of either split [the run's; of stripes 300]")
    add("--batch-size", type=distill.COUNT, help="distortions are drawn by batch [the run's]")
    add("--device", help="[the run's]")
    add("--dtype", choices=["float32", "bfloat16"], help="[the run's]")
    add("--workers", type=distill.NATURAL, help="[the run's]")
    add("--data", help="[the run's]")
    add("--root", help="[the run's]")
    run = parser.parse_args().run
    parser.set_defaults(**distill.read_config(run))  # for what was not typed
    cfg = parser.parse_args()
    distill.use_device(cfg.device)
    if cfg.data == "stripes":
        cfg.max_images = cfg.max_images or 300

    vits = {}
    for who in ("teacher", "student"):
        path = f"{cfg.run}/{who}.pth"
        if not os.path.exists(path):
            raise distill.UserError(f"{path} is not there yet: distill.py --resume {cfg.run}")
        vits[who] = distill.load_vit(path, cfg.img_size).to(cfg.device)
    if cfg.pictures:
        images = np.stack([distill.read_image(path, cfg.data_size) for path in cfg.pictures])
    else:
        data = distill.load_data(cfg)
        rows, shares = evaluate(cfg, vits, data)
        results = {"config": vars(cfg), "rows": rows, "labels": shares}
        distill.write(f"{cfg.run}/results.json", [json.dumps(results, indent=1).encode()])
        named = [{"distortion": f"{100 * row['share']:g}% of the labels", **row} for row in shares]
        print_table(rows + named, distill.severities_of(cfg))
        images = data[2][distill.balanced_subset(data[3], 6, cfg.seed)]
    draw_attention(f"{cfg.run}/attention.png", cfg, vits, images)

if __name__ == "__main__":
    distill.run(main)
