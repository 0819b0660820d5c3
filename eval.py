#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Evaluate a run of distill.py: what distortion took, what the student won back, whether it holds for
distortions it never saw. Prints a table; writes results.json and attention.png into the run folder.

    python eval.py runs/cifar10-noise0.1 --labels 1.0 0.1 0.01
"""
import argparse
import json
import os

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from distill import (KINDS, check, describe, distort, embed, fail, find_device, load_data, load_vit,
                     prepare, run, seed_from, subset, to_float, write)

# ---- The linear probe ----------------------------------------------------------------------------

def fit_probe(x, y):
    """Fit multinomial logistic regression to features x [N, D] and integer labels y [N], and return
    predict, which maps features [M, D] to labels [M].

    Features are standardized; mean cross-entropy + strength * |weights|^2 is minimized by full-batch
    L-BFGS; the strength is the one of six that does best on a held-out fifth (on all five in turn
    below 2,000 images), the largest among equals. Deterministic. Raises ValueError for unequal
    lengths, no rows, or values that are not finite."""
    x, y = torch.as_tensor(x).float(), torch.as_tensor(y)
    if x.ndim != 2 or y.shape != x.shape[:1] or len(x) == 0 or not x.isfinite().all():
        raise ValueError(f"a probe needs finite features [N, D] and labels [N], N > 0, got "
                         f"{list(x.shape)} and {list(y.shape)}")
    classes, y = y.unique(return_inverse=True)
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs(), std, 1)  # constant up to rounding: left at 0
    x = (x - mean) / std

    def solve(x, y, strength, weights):  # weights [D + 1, classes]; the last row is the bias
        weights = weights.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weights], max_iter=100, tolerance_change=1e-7,
                                      line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            value = F.cross_entropy(torch.addmm(weights[-1], x, weights[:-1]), y)
            value = value + strength * weights[:-1].square().sum()
            value.backward()
            return value
        with torch.enable_grad():
            optimizer.step(loss)
        return weights.detach()

    strengths = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    zero = x.new_zeros(x.shape[1] + 1, len(classes))
    part = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).to(x.device) % 5
    right = [0.0] * len(strengths)
    for held_out in range(5 if len(x) < 2000 else 1) if len(x) >= 10 else ():
        train, test, weights = part != held_out, part == held_out, zero
        for i, strength in enumerate(strengths):  # from strong to weak, each from the last one's end
            weights = solve(x[train], y[train], strength, weights)
            logits = torch.addmm(weights[-1], x[test], weights[:-1])
            right[i] += (logits.argmax(1) == y[test]).sum().item()
    weights = solve(x, y, strengths[right.index(max(right))], zero)

    def predict(x):
        x = (torch.as_tensor(x).to(mean) - mean) / std
        return classes[torch.addmm(weights[-1], x, weights[:-1]).argmax(1)]
    return predict

def accuracy(predict, x, y):
    return (predict(x) == torch.as_tensor(y).to(x.device)).float().mean().item()

def linear_probe(train_x, train_y, test_x, test_y):
    """The test accuracy, in [0, 1], of fit_probe on the training features and labels."""
    return accuracy(fit_probe(train_x, train_y), torch.as_tensor(test_x), test_y)

# ---- Distortions that no student was trained on --------------------------------------------------

def pixelate(x, g, share):
    small = F.interpolate(x, scale_factor=share, mode="area")
    return F.interpolate(small, size=x.shape[-2:], mode="nearest")

def salt_and_pepper(x, g, share):
    dice = torch.rand(len(x), 1, *x.shape[2:], generator=g, device=x.device)
    return torch.where(dice < share, (dice < share / 2).to(x), x)

def square(x, g, share):
    sides = torch.tensor(x.shape[-2:], device=x.device)
    corner = torch.rand(len(x), 2, 1, generator=g, device=x.device) * (1 - share) * sides[:, None]
    rows, cols = (torch.arange(n, device=x.device) - corner[:, i] for i, n in enumerate(x.shape[-2:]))
    rows, cols = (((d >= 0) & (d < share * n)).to(x) for d, n in zip((rows, cols), x.shape[-2:]))
    return x * (1 - rows[:, None, :, None] * cols[:, None, None, :])

HELD_OUT = {  # name in the table: distortion(images [B, 3, H, W], generator)
    "noise=0.2": lambda x, g: distort(x, noise=0.2, generator=g),
    "blur=1": lambda x, g: distort(x, blur=1.0, generator=g),
    "mask=0.5": lambda x, g: distort(x, mask=0.5, generator=g),
    "noise=0.1+blur=0.7": lambda x, g: distort(x, noise=0.1, blur=0.7, generator=g),
    "contrast=0.3": lambda x, g: 0.5 + 0.3 * (x - 0.5),
    "pixelate=0.5": lambda x, g: pixelate(x, g, 0.5),
    "salt-and-pepper=0.1": lambda x, g: salt_and_pepper(x, g, 0.1),
    "square=0.5": lambda x, g: square(x, g, 0.5),
}

def distortions(cfg):
    """The table's rows, name: distortion: clean, the trained one, milder and stronger, others."""
    rows = {"clean": None}
    for factor in (1, 0.5, 1.5):
        top = {"noise": 1e6, "blur": (cfg.data_size - 1) / 2, "mask": 0.95 if factor > 1 else 1}
        sev = {kind: np.minimum(np.multiply(getattr(cfg, kind), factor), top[kind]).tolist()
               for kind in KINDS}
        rows[describe(sev)] = lambda x, g, sev=sev: distort(x, **sev, generator=g)
    return {**rows, **{name: d for name, d in HELD_OUT.items() if name not in rows}}

# ---- The evaluation ------------------------------------------------------------------------------

def evaluate(cfg, vits, data, shares, seeds):
    """The rows and label shares of results.json: every figure is [mean, standard deviation] over the
    seeds, each of which draws the distortions and the labelled images anew."""
    images, labels, test_images, test_labels = data
    table, trained, rows, runs_by_share = distortions(cfg), describe(vars(cfg)), [], {}
    bar = tqdm(total=2 * (len(labels) + len(test_labels)) * (1 + seeds * (len(table) - 1)), unit="img",
               unit_scale=True, desc="features", disable=None)

    def features(name, seed):  # of the training and test images, each [teacher's, student's]
        return [[f.to(cfg.device) for f in
                 embed(vits, part, cfg, table[name], seed_from("eval", seed, name, i), bar)]
                for i, part in enumerate((images, test_images))]

    clean = features("clean", 0)
    clean_probe = fit_probe(clean[0][0], labels)

    def probes(train, test, keep=slice(None)):
        return {f"probe_{who}": linear_probe(train[i][keep], labels[keep], test[i], test_labels)
                for i, who in enumerate(("teacher", "student"))}

    def summary(runs):
        columns = {key: [run[key] for run in runs] for key in runs[0]}
        return {key: None if None in values else [np.mean(values), np.std(values)]
                for key, values in columns.items()}

    for name in table:
        runs = []
        for seed in range(seeds):
            if name != "clean" or not runs:
                train, test = clean if name == "clean" else features(name, seed)
                run = {}
                for i, who in enumerate(("teacher", "student")):
                    run[f"cos_{who}"] = F.cosine_similarity(test[i], clean[1][0]).mean().item()
                    run[f"clean_probe_{who}"] = accuracy(clean_probe, test[i], test_labels)
                run.update(probes(train, test))
                taken = (rows[0]["probe_teacher"][0] if rows else 0) - run["probe_teacher"]
                won = run["probe_student"] - run["probe_teacher"]
                run["recovered"] = won / taken if taken >= 0.01 else None
            runs.append(run)
            for share in shares if name == trained else ():
                n = max(round(share * len(labels)), len(np.unique(labels)))
                keep = subset(labels, n, seed_from("labels", seed))
                runs_by_share.setdefault(share, []).append(probes(train, test, keep))
        rows.append({"distortion": name, "seen": name == trained != "clean", **summary(runs)})
    bar.close()
    return rows, [{"share": share, **summary(runs)} for share, runs in runs_by_share.items()]

def print_table(rows, shares):
    def cell(figure):
        return f"{100 * figure[0]:.1f} ± {100 * figure[1]:.1f}" if figure else "-"

    columns = [f"{kind}_{who}" for kind in ("cos", "probe", "clean_probe") for who in ("teacher", "student")]
    print(f"{'in %':23}" + "".join(f"{head:^30}" for head in ("cosine", "probe", "clean probe")))
    print(f"{'distortion':23}" + f"{'teacher':>14}{'student':>14}  " * 3 + f"{'recovered':>14}")
    for row in rows:
        cells = [f"{cell(row[c]):>14}" + ("  " if c.endswith("student") else "") for c in columns]
        print(f"{row['distortion'] + ' *' * row['seen']:23}" + "".join(cells) + f"{cell(row['recovered']):>14}")
    print("* the distortion trained on; recovered: the share of the teacher's loss in probe accuracy")
    for row in shares:
        print(f"probe with {row['share']:g} of the labels: teacher {cell(row['probe_teacher'])}, "
              f"student {cell(row['probe_student'])}")

@torch.inference_mode()
def draw_attention(path, cfg, vits, images):
    """A row for each image: clean, distorted, and where the global token looks in the last block,
    heads averaged: teacher on clean, teacher on distorted, student on distorted."""
    from torchvision.utils import save_image
    generator = torch.Generator(cfg.device).manual_seed(0)
    clean = to_float(images, cfg.device)
    distorted = distort(clean, cfg.noise, cfg.blur, cfg.mask, generator)
    columns, zoom = [clean, distorted], -(-160 // clean.shape[-1])
    for vit, x in ((vits[0], clean), (vits[0], distorted), (vits[1], distorted)):
        attn = vit(prepare(x, cfg.img_size), attn_blocks=1).attn[0]  # [B, heads, T, T]
        attn = attn[:, :, 0, 1 + vit.num_registers:].mean(1)  # [B, N]
        heat = attn.sub(attn.amin(1, keepdim=True)) / attn.amax(1, keepdim=True)
        heat = heat.view(len(x), 1, *[int(heat.shape[1] ** 0.5)] * 2)
        heat = F.interpolate(heat, size=x.shape[-2:], mode="bilinear")
        hot = torch.cat([(3 * heat - i).clamp(0, 1) for i in range(3)], dim=1)  # black to white
        columns.append(0.35 * x + 0.65 * hot)
    cells = torch.stack(columns, dim=1).flatten(0, 1)
    cells = cells.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    save_image(cells, path, nrow=len(columns), padding=4, pad_value=1)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error, add = fail, parser.add_argument
    add("run_dir", help="a folder that distill.py wrote")
    add("--labels", type=float, nargs="+", default=[1.0], help="shares of the labels to probe with (1.0)")
    add("--seeds", type=int, default=3, help="each draws distortions and labelled images anew (3)")
    for name in ("max-images", "batch-size", "workers"):
        add(f"--{name}", type=int, help="(the run's)")
    add("--device", help="cuda, mps or cpu (the run's, or the first there is)")
    add("--dtype", choices=("float32", "bfloat16"), help="(the run's)")
    add("--data", help="(the run's)")
    add("--root", help="(the run's)")
    args = parser.parse_args()
    config = os.path.join(args.run_dir, "config.json")
    if not os.path.isfile(config):
        raise ValueError(f"no run in {args.run_dir}: there is no config.json")
    with open(config) as f:
        cfg = argparse.Namespace(**json.load(f))
    check(args, {"labels": 1e-9, "seeds": 1, "max_images": 1, "batch_size": 1, "workers": 0})
    if max(args.labels) > 1:
        raise ValueError(f"--labels {max(args.labels)} is more than all labels, 1")
    try:
        cfg.device = find_device(args.device or cfg.device)
    except ValueError:
        if args.device:
            raise
        cfg.device = find_device("auto")
    for name in ("max_images", "batch_size", "workers", "dtype", "data", "root"):
        if getattr(args, name) is not None:
            setattr(cfg, name, getattr(args, name))
    vits = [load_vit(os.path.join(args.run_dir, f"{who}.pth"), cfg.img_size).to(cfg.device)
            for who in ("teacher", "student")]
    data = load_data(cfg.data, cfg.root, cfg.data_size, cfg.max_images, cfg.seed, cfg.workers, labelled=True)
    rows, shares = evaluate(cfg, vits, data, args.labels, args.seeds)
    print_table(rows, shares)
    write(os.path.join(args.run_dir, "results.json"),
          json.dumps({"config": vars(cfg), "rows": rows, "labels": shares}, indent=1))
    picked = data[2][subset(data[3], 6, cfg.seed)]
    draw_attention(os.path.join(args.run_dir, "attention.png"), cfg, vits, picked)

if __name__ == "__main__":
    run(main)
