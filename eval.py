# SPDX-License-Identifier: MIT
"""Evaluate a run of distill.py: what distortion took, what the student won back, and whether that
holds for distortions it never saw. Prints a table; writes results.json and attention.png."""
import argparse, functools, json, math, os

import numpy as np, torch, torch.nn.functional as F
from tqdm import tqdm

from distill import (OPTIONS, check, describe, distort, distortion_of, embed, find_device, load_data,
                     load_vit, number, prepare, run, subset, to_float, write)

# ---- The linear probe ----------------------------------------------------------------------------
def fit_probe(x, y):
    """Multinomial logistic regression on features x [N, D] and integer labels y [N]: the function
    from features [M, D] to labels [M]. Features are standardized; full-batch L-BFGS minimizes mean
    cross-entropy + strength * |weights|^2, with the strength of six that does best on a held-out
    fifth (below 2,000 images, on each fifth in turn). Deterministic. Raises ValueError for unequal
    lengths, no images and values that are not finite."""
    x, y = torch.as_tensor(x).float(), torch.as_tensor(y)
    if x.ndim != 2 or y.shape != x.shape[:1] or len(x) == 0 or not x.isfinite().all():
        raise ValueError(f"not finite features [N, D], labels [N]: {list(x.shape)}, {list(y.shape)}")
    classes, y = y.to(x.device).unique(return_inverse=True)
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs(), std, 1)  # a constant feature, up to rounding, stays 0
    def columns(x):  # [D + 1, N], which multiplies fastest; the last row is the bias's
        return torch.cat([((x - mean) / std).T, x.new_ones(1, len(x))])
    def solve(x, y, strength, weights):  # weights [classes, D + 1] to start from
        def loss():
            optimizer.zero_grad()
            value = F.cross_entropy((weights @ x).T, y) + strength * weights[:, :-1].square().sum()
            value.backward()
            return value
        weights = weights.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weights], max_iter=100, tolerance_change=1e-5,
                                      line_search_fn="strong_wolfe")
        optimizer.step(torch.enable_grad()(loss))
        return weights.detach()

    strengths, zero = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5), x.new_zeros(len(classes), x.shape[1] + 1)
    fifth = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(x.device) % 5
    right, x = [0] * len(strengths), columns(x)
    for part in range(0 if len(y) < 10 else 5 if len(y) < 2000 else 1):
        held, weights = fifth == part, zero
        kept_x, kept_y = x[:, ~held], y[~held]
        for i, strength in enumerate(strengths):  # each starts where the stronger one ended
            weights = solve(kept_x, kept_y, strength, weights)
            right[i] += ((weights @ x[:, held]).argmax(0) == y[held]).sum().item()
    weights = solve(x, y, strengths[right.index(max(right))], zero)
    return lambda x: classes[(weights @ columns(torch.as_tensor(x).to(mean))).argmax(0)]

def accuracy(predict, x, y):
    return (predict(x).cpu() == torch.as_tensor(y).cpu()).float().mean().item()

def linear_probe(train_x, train_y, test_x, test_y):
    """The test accuracy, in [0, 1], of fit_probe on the training features and labels."""
    return accuracy(fit_probe(train_x, train_y), test_x, test_y)

# ---- The evaluation ------------------------------------------------------------------------------
def salt_and_pepper(x, generator, share=0.1):
    dice = torch.rand(x.shape, generator=generator, device=x.device)
    return torch.where(dice < share, (dice < share / 2).to(x), x)

HELD_OUT = {  # name: images [B, 3, H, W] in [0, 1] and a generator -> distorted images
    **{f"{kind}={value}": functools.partial(distort, **{kind: value}) for kind, value in (
        ("noise", 0.12), ("noise", 0.45), ("blur", 0.7), ("blur", 1.4), ("mask", 0.35), ("mask", 0.65))},
    "contrast=0.3": lambda x, generator: 0.5 + 0.3 * (x - 0.5),
    "pixelate=2": lambda x, generator: F.interpolate(F.avg_pool2d(x, 2), x.shape[2:]),
    "salt-and-pepper=0.1": salt_and_pepper,
    "square=0.5": lambda x, generator: x * F.interpolate(  # black, in the middle, of half the side
        F.pad(x.new_zeros(1, 1, 2, 2), (1, 1, 1, 1), value=1), x.shape[2:])}

def evaluate(cfg, vits, data, shares, seeds):
    """The rows and label shares of results.json: each figure is [mean, standard deviation] over the
    seeds, each of which draws the distortions and the labelled images anew."""
    train_images, labels, test_images, test_labels = data
    trained, rows, runs_by_share, who = describe(cfg), [], {}, ("teacher", "student")
    table = {"clean": None, trained: distortion_of(cfg), **HELD_OUT}

    def features(distortion, seed):  # of training and of test images, each teacher's and student's
        return [[embed(vit, images, cfg, distortion, 2 * seed + i) for vit in vits]
                for i, images in enumerate((train_images, test_images))]
    def probes(train, test, keep=slice(None)):
        return {f"probe_{w}": linear_probe(train[i][keep], labels[keep], test[i], test_labels)
                for i, w in enumerate(who)}
    def summary(runs):
        columns = {key: [run[key] for run in runs] for key in runs[0]}
        return {key: None if None in values else [float(np.mean(values)), float(np.std(values))]
                for key, values in columns.items()}

    clean = features(None, 0)
    clean_probe = fit_probe(clean[0][0], labels)
    for name, distortion in tqdm(table.items(), "evaluating", disable=None):
        runs = []
        for seed in range(seeds if distortion else 1):
            train, test = features(distortion, seed) if distortion else clean
            run = probes(train, test)
            for w, found in zip(who, test):
                run[f"cos_{w}"] = F.cosine_similarity(found, clean[1][0]).mean().item()
                run[f"clean_probe_{w}"] = accuracy(clean_probe, found, test_labels)
            lost = rows[0]["probe_teacher"][0] - run["probe_teacher"] if rows else 0
            won = run["probe_student"] - run["probe_teacher"]
            runs.append({**run, "recovered": won / lost if lost >= 0.01 else None})
            for share in shares if name == trained else ():
                n = max(round(share * len(labels)), len(np.unique(labels)))
                found = probes(train, test, subset(labels, n, seed))
                runs_by_share[share] = [*runs_by_share.get(share, []), found]
        rows.append({"distortion": name, "seen": name == trained != "clean", **summary(runs)})
    return rows, [{"share": share, **summary(runs)} for share, runs in runs_by_share.items()]

@torch.inference_mode()
def draw_attention(cfg, vits, images):
    """A picture [3, height, width], a row per image: clean, distorted, and the last block's attention
    from the global token, heads averaged: teacher on clean, teacher and student on distorted."""
    from torchvision.utils import make_grid
    clean = to_float(images, cfg.device)
    noisy = distortion_of(cfg)(clean, generator=torch.Generator(cfg.device).manual_seed(0))
    columns, zoom = [clean, noisy], -(-160 // clean.shape[2])
    for vit, x in ((vits[0], clean), (vits[0], noisy), (vits[1], noisy)):
        heat = vit(prepare(x, cfg.img_size), attn_blocks=1).attn[0][:, :, 0, 1 + vit.num_registers:].mean(1)
        heat = (heat / heat.amax(1, keepdim=True)).view(len(x), 1, *[math.isqrt(heat.shape[1])] * 2)
        heat = F.interpolate(heat, x.shape[2:], mode="bilinear")
        columns.append(0.35 * x + 0.65 * torch.cat([(3 * heat - i).clamp(0, 1) for i in range(3)], 1))
    cells = torch.stack(columns, dim=1).flatten(0, 1).repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    return make_grid(cells, len(columns), padding=4, pad_value=1)

def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add, parser.error = parser.add_argument, functools.partial(check, False)
    add("run_dir", help="a folder that distill.py wrote")
    add("--labels", type=number(float, 1e-9, 1), nargs="+", default=[1.0], help="shares of them [1.0]")
    add("--seeds", type=number(int, 1), default=3, help="draws of distortions and labels [3]")
    for name in ("max_images", "batch_size", "device", "dtype", "workers", "data", "root"):
        kind, _, text = OPTIONS[name]
        add("--" + name.replace("_", "-"), type=str if isinstance(kind, tuple) else kind, help=text)
    args = parser.parse_args()
    check(os.path.isfile(f"{args.run_dir}/config.json"), f"no run in {args.run_dir}: no config.json")
    with open(f"{args.run_dir}/config.json") as f:
        cfg = argparse.Namespace(**json.load(f))
    if cfg.data == "textures" and cfg.max_images is None:
        cfg.max_images = 2500  # enough for a probe in a minute
    vars(cfg).update({name: value for name, value in vars(args).items() if value is not None})
    cfg.device = find_device(args.device or ("cpu" if cfg.device == "cpu" else "auto"))
    who = ("teacher", "student")
    vits = [load_vit(f"{args.run_dir}/{w}.pth", cfg.img_size).to(cfg.device) for w in who]
    data = load_data(cfg, labelled=True)
    rows, shares = evaluate(cfg, vits, data, args.labels, args.seeds)
    names = [f"{figure}_{w}" for figure in ("cos", "probe", "clean_probe") for w in who] + ["recovered"]
    print("in %, teacher then student".ljust(26) + "".join(f"{name[:-8] or name:>14}" for name in names))
    for row in [*rows, *shares]:
        head = row["distortion"] + " *" * row["seen"] if "seen" in row else f"* {row['share']:g} of labels"
        cells = [row.get(name) and "{:.1f} ± {:.1f}".format(*np.multiply(100, row[name])) for name in names]
        print(head.ljust(26) + "".join(f"{cell or '-':>14}" for cell in cells))
    write(f"{args.run_dir}/results.json", json.dumps(dict(config=vars(cfg), rows=rows, labels=shares)))
    from torchvision.utils import save_image
    picture = draw_attention(cfg, vits, data[2][subset(data[3], 6, cfg.seed)])
    save_image(picture, f"{args.run_dir}/attention.png")

if __name__ == "__main__":
    run(main)
