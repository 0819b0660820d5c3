# SPDX-License-Identifier: MIT
"""Evaluate a run of distill.py: what distortions cost its teacher and what its student wins back,
also of kinds never seen in training. Prints a table; writes results.json and attention.png.
"""
import argparse
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from distill import (
    UserError,
    balanced_subset,
    best_device,
    describe,
    distort,
    embed,
    load_data,
    load_vit,
    prepare,
    read_config,
    read_image,
    run,
    severities_of,
    to_float,
    write,
)

HELD_OUT = [  # severities, the same for every run
    {"blur": 0.7}, {"blur": 1.4}, {"noise": 0.15}, {"noise": 0.3}, {"mask": 0.25}, {"mask": 0.5},
    {"salt": 0.1}, {"contrast": 0.7}, {"blur": 0.7, "noise": 0.1, "mask": 0.2},
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
        return F.linear((x - mean) / std, weights[:, :-1], weights[:, -1])

    def solve(x, y, strength):
        weights = torch.zeros(len(classes), x.shape[1] + 1, device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")
        def loss():
            optimizer.zero_grad()
            fit = F.cross_entropy(scores(x, weights), y)
            value = fit + strength * weights[:, :-1].square().sum()
            value.backward()
            return value
        optimizer.step(loss)
        return weights.detach()

    with torch.inference_mode(False), torch.enable_grad():
        x, mean, std = x.clone(), mean.clone(), std.clone()  # inference tensors take no gradient
        classes, y = y.unique(return_inverse=True)
        chance = torch.Generator().manual_seed(0)
        held = (torch.randperm(len(y), generator=chance) < len(y) // 5).to(x.device)
        best = (-1, 0.0)
        for strength in (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
            weights = solve(x[~held], y[~held], strength)
            right = (scores(x[held], weights).argmax(dim=1) == y[held]).sum().item()
            best = max(best, (right, strength))
        weights = solve(x, y, best[1])
    return lambda x: classes[scores(torch.as_tensor(x).detach().to(mean), weights).argmax(dim=1)]

def accuracy(predict, x, y):
    return (predict(x).cpu() == torch.as_tensor(y).cpu()).float().mean().item()

def linear_probe(train_x, train_y, test_x, test_y):
    """The test accuracy, in [0, 1], of fit_probe on the training features and labels."""
    return accuracy(fit_probe(train_x, train_y), test_x, test_y)

# ---- The table -----------------------------------------------------------------------------------

def probe_both(features, labels, test_labels):
    """The accuracy of each ViT's own probe, from {"teacher": (training, test), "student": …}."""
    return {f"probe_{who}": linear_probe(x, labels, test_x, test_labels)
            for who, (x, test_x) in features.items()}

def summary(runs):
    """[mean, standard deviation] over runs of each figure, None where a run has none."""
    result = {}
    for key in runs[0]:
        values = [figures[key] for figures in runs]
        result[key] = None if None in values else [float(np.mean(values)), float(np.std(values))]
    return result

def evaluate(cfg, vits, data, shares, seeds):
    """The rows and the label shares of results.json."""
    images, labels, test_images, test_labels = data
    clean = embed(vits["teacher"], test_images, cfg, {})
    clean_probe = fit_probe(embed(vits["teacher"], images, cfg, {}), labels)
    clean_accuracy = accuracy(clean_probe, clean, test_labels)
    tests = [({}, False), (severities_of(cfg), cfg.one_of), *((kinds, False) for kinds in HELD_OUT)]
    rows = []
    label_runs = {share: [] for share in shares}
    for severities, one_of in tqdm(tests, "evaluating", disable=None):
        seen = len(rows) == 1
        runs = []
        for seed in range(seeds if severities else 1):
            features = {}
            for who, vit in vits.items():
                x = embed(vit, images, cfg, severities, one_of, 2 * seed)
                features[who] = x, embed(vit, test_images, cfg, severities, one_of, 2 * seed + 1)
            figures = probe_both(features, labels, test_labels)
            for who, (_, test_x) in features.items():
                figures[f"cos_{who}"] = F.cosine_similarity(test_x, clean).mean().item()
                figures[f"clean_probe_{who}"] = accuracy(clean_probe, test_x, test_labels)
            lost = clean_accuracy - figures["probe_teacher"]
            won = figures["probe_student"] - figures["probe_teacher"]
            figures["recovered"] = won / lost if lost >= 0.01 else None
            runs.append(figures)
            for share in shares if seen else []:
                kept = balanced_subset(labels, math.ceil(share * len(labels)), seed)
                fewer = {who: (x[kept], test_x) for who, (x, test_x) in features.items()}
                label_runs[share].append(probe_both(fewer, labels[kept], test_labels))
        rows.append({"distortion": describe(severities, one_of), "seen": seen, **summary(runs)})
    return rows, [{"share": share, **summary(runs)} for share, runs in label_runs.items()]

def print_table(rows, trained):
    """Figures in %; ** marks the distortion trained on, * those of a kind trained on."""
    keys = ["cos", "probe", "clean_probe"]
    columns = [f"{key}_{who}" for key in keys for who in ("teacher", "student")] + ["recovered"]
    print(f"{'in %':31}", *(f"{column.replace('_', ' '):>19}" for column in columns))
    for row in rows:
        kinds = [name for name in trained if name in row["distortion"]]
        mark = "**" if row.get("seen") else "*" * bool(kinds)
        cells = []
        for column in columns:
            mean, std = row.get(column) or (math.nan, math.nan)
            cells.append(f"{100 * mean:.1f} ± {100 * std:.1f}")
        print(f"{row['distortion'][:28]:28} {mark:2}", *(f"{cell:>19}" for cell in cells))

# ---- The picture ---------------------------------------------------------------------------------

@torch.inference_mode()
def draw_attention(path, cfg, vits, images):
    """Save a row for each uint8 image [S, S, 3]: clean; distorted, as strongly as in training; and,
    over the clean image in grey, where the last block's global token looks (mean of the heads): the
    teacher at the clean image, then the teacher and the student at the distorted one.
    """
    from PIL import Image  # which torchvision brings
    clean = to_float(images, cfg.device)
    highest = {name: float(np.max(value)) for name, value in severities_of(cfg).items()}
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    distorted = distort(clean, generator, cfg.one_of, **highest)
    columns = [clean, distorted]
    for who, seen in (("teacher", clean), ("teacher", distorted), ("student", distorted)):
        features = vits[who](prepare(seen, cfg.img_size), attn_blocks=1)
        num_patches = features.patches.shape[1]
        heat = features.attn[0][:, :, 0, -num_patches:].mean(dim=1)  # [B, N]
        heat = heat / heat.amax(dim=1, keepdim=True)
        heat = heat.unflatten(1, (1, math.isqrt(num_patches), -1))
        heat = F.interpolate(heat, clean.shape[2:], mode="bilinear")
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
    add("--labels", type=float, nargs="+", default=[1.0], help="shares of the labels [1.0]")
    add("--seeds", type=int, default=3, help="draws of distortions and labels [3]")
    add("--max-images", type=int, help="of either split [the run's; of stripes 500]")
    add("--batch-size", type=int, help="[the run's]")
    add("--device", help="[the run's, or the best there is]")
    add("--dtype", choices=["float32", "bfloat16"], help="[the run's]")
    add("--workers", type=int, help="[the run's]")
    add("--data", help="[the run's]")
    add("--root", help="[the run's]")
    config = read_config(parser.parse_args().run)
    if config["device"] != "cpu":
        config["device"] = best_device()
    if config["data"] == "stripes":
        config["max_images"] = config["max_images"] or 500
    parser.set_defaults(**config)
    cfg = parser.parse_args()
    if min(cfg.seeds, cfg.batch_size, cfg.max_images or 1) < 1:
        raise UserError("--seeds, --batch-size or --max-images is below 1")
    if not all(0 < share <= 1 for share in cfg.labels):
        raise UserError("--labels are not shares above 0 and up to 1")

    vits = {}
    for who in ("teacher", "student"):
        vits[who] = load_vit(f"{cfg.run}/{who}.pth", cfg.img_size).to(cfg.device)
    if cfg.pictures:
        images = np.stack([read_image(path, cfg.data_size) for path in cfg.pictures])
    else:
        data = load_data(cfg)
        rows, shares = evaluate(cfg, vits, data, cfg.labels, cfg.seeds)
        results = {"config": vars(cfg), "rows": rows, "labels": shares}
        write(f"{cfg.run}/results.json", [json.dumps(results, indent=1).encode()])
        trained = [name for name, value in severities_of(cfg).items() if np.any(value)]
        named = [{"distortion": f"{100 * row['share']:g}% of the labels", **row} for row in shares]
        print_table(rows + named, trained)
        images = data[2][balanced_subset(data[3], 6, cfg.seed)]
    draw_attention(f"{cfg.run}/attention.png", cfg, vits, images)

if __name__ == "__main__":
    run(main)
