# SPDX-License-Identifier: MIT
"""Evaluate a run of distill.py: what distortion took, what the student won back, and whether that
holds for distortions it never saw. Prints a table; writes results.json and attention.png."""
import argparse, functools, json, math, pathlib
import numpy as np, torch, torch.nn.functional as F
from tqdm import tqdm
from distill import (OPTIONS, check, describe, distort, distortion_of, embed, settle,
                     load_data, load_vit, number, prepare, run, subset, to_float, write)

# ---- The linear probe ----------------------------------------------------------------------------
def fit_probe(x, y):
    """Multinomial logistic regression on features x [N, D] and integer labels y [N]: a function of
    features [M, D] to labels [M]. L-BFGS minimizes mean cross-entropy + strength * |weights|^2 on
    standardized features, with the strength of six that is best on a held-out fifth (below 2,000
    images, on all in turn). Deterministic. Raises ValueError for bad shapes, values not finite."""
    x, y = torch.as_tensor(x).float(), torch.as_tensor(y)
    if x.ndim != 2 or y.shape != x.shape[:1] or len(x) == 0 or not x.isfinite().all():
        raise ValueError(f"not finite x [N, D] with labels [N]: {list(x.shape)}, {list(y.shape)}")
    classes, y = y.to(x.device).unique(return_inverse=True)
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs(), std, torch.inf)  # / inf: constants become 0
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

def linear_probe(train_x, train_y, test_x, test_y):
    """The test accuracy, in [0, 1], of fit_probe on the training features and labels."""
    return np.mean(fit_probe(train_x, train_y)(test_x).cpu().numpy() == np.asarray(test_y)).item()

# ---- The evaluation ------------------------------------------------------------------------------
HELD_OUT = {  # name: images [B, 3, H, W] in [0, 1] and a generator -> distorted images
    **{f"{kind}={value}": functools.partial(distort, **{kind: value}) for kind, values in dict(
        noise=(0.12, 0.45), blur=(0.7, 1.4), mask=(0.35, 0.65)).items() for value in values},
    "salt-and-pepper=0.1": lambda x, generator: (dice := torch.rand(
        x.shape, generator=generator, device=x.device)).lt(0.05) + x * dice.ge(0.1),
    "contrast=0.3": lambda x, generator: 0.5 + 0.3 * (x - 0.5),
    "pixelate=2": lambda x, generator: F.interpolate(F.avg_pool2d(x, 2), x.shape[2:]),
    "square=0.5": lambda x, generator: x * F.interpolate(  # black, in the middle, of half the side
        F.pad(x.new_zeros(1, 1, 2, 2), (1, 1, 1, 1), value=1), x.shape[2:])}
FIXED = ("clean", "blur=0.7", "blur=1.4", "contrast=0.3", "pixelate=2", "square=0.5")  # chance-free

def evaluate(cfg, vits, data, shares, seeds):
    """Rows and label shares of results.json; figures are [mean, standard deviation] over seeds."""
    images, labels, test_images, test_labels = data
    trained, rows, runs_by_share = describe(cfg), [], {share: [] for share in shares}
    table = {"clean": None, trained: distortion_of(cfg), **HELD_OUT}
    def features(name, seed):  # of training and of test images, of either ViT
        return [{who: embed(vit, part, cfg, table[name], 2 * seed + i) for who, vit in vits.items()}
                for i, part in enumerate((images, test_images))]
    def probes(train, test, keep=slice(None)):
        return {f"probe_{who}": linear_probe(train[who][keep], labels[keep], test[who], test_labels)
                for who in vits}
    def summary(runs):
        columns = {key: [run[key] for run in runs] for key in runs[0]}
        return {key: None if None in values else [float(np.mean(values)), float(np.std(values))]
                for key, values in columns.items()}
    clean = features("clean", 0)
    clean_probe = fit_probe(clean[0]["teacher"], labels)
    for name in tqdm(table, "evaluating", disable=None):
        runs = []
        for seed in range(seeds if name == trained or name not in FIXED else 1):
            train, test = clean if name == "clean" else features(name, seed)
            run = probes(train, test)
            for who, found in test.items():
                run[f"cos_{who}"] = F.cosine_similarity(found, clean[1]["teacher"]).mean().item()
                run[f"clean_probe_{who}"] = np.mean(clean_probe(found).cpu().numpy() == test_labels)
            lost = rows[0]["probe_teacher"][0] - run["probe_teacher"] if rows else 0
            won = run["probe_student"] - run["probe_teacher"]
            runs.append({**run, "recovered": won / lost if lost >= 0.01 else None})
            for share in shares if name == trained else ():
                n = max(round(share * len(labels)), len(np.unique(labels)))
                runs_by_share[share].append(probes(train, test, subset(labels, n, seed)))
        rows.append({"distortion": name, "seen": name == trained != "clean", **summary(runs)})
    return rows, [{"share": share, **summary(runs)} for share, runs in runs_by_share.items()]

@torch.inference_mode()
def draw_attention(path, cfg, vits, images):
    """Save a row per image: clean, distorted, and where the global token looks (see README)."""
    from PIL import Image  # which torchvision brings
    clean = to_float(images, cfg.device)
    distorted = distortion_of(cfg)(clean, generator=torch.Generator(cfg.device).manual_seed(0))
    columns, zoom = [clean, distorted], -(-160 // clean.shape[2])
    for who, x in (("teacher", clean), ("teacher", distorted), ("student", distorted)):
        attn = vits[who](prepare(x, cfg.img_size), attn_blocks=1).attn[0]  # [B, heads, T, T]
        heat = attn[:, :, 0, 1 + vits[who].num_registers:].mean(1)  # [B, N]
        heat = (heat / heat.amax(1, keepdim=True)).view(len(x), 1, *[math.isqrt(heat.shape[1])] * 2)
        heat = F.interpolate(heat, x.shape[2:], mode="bilinear")
        columns.append(0.35 * x + 0.65 * torch.cat([3 * heat - i for i in range(3)], 1).clamp(0, 1))
    cells = F.pad(torch.stack(columns, dim=1), (1, 1, 1, 1), value=1)  # [rows, columns, 3, h, w]
    pixels = cells.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).mul(255).byte().cpu()
    Image.fromarray(pixels.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy()).save(path)

def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add, parser.error = parser.add_argument, functools.partial(check, False)
    add("out", metavar="run_dir", help="a folder that distill.py wrote")
    add("--labels", type=number(float, 1e-9, 1), nargs="+", default=[1.0], help="shares [1.0]")
    add("--seeds", type=number(int, 1), default=3, help="draws of distortions and labels [3]")
    for name in ("max_images", "batch_size", "device", "dtype", "workers", "data", "root"):
        kind = {"choices": kind} if isinstance(kind := OPTIONS[name][0], tuple) else {"type": kind}
        add("--" + name.replace("_", "-"), **kind, help="[the run's; see README]")
    args = parser.parse_args()
    cfg = argparse.Namespace(**json.loads(pathlib.Path(args.out, "config.json").read_text()))
    cfg.device = "cpu" if cfg.device == "cpu" else "auto"
    vars(cfg).update({name: value for name, value in vars(args).items() if value is not None})
    cfg.max_images = cfg.max_images or {"textures": 2000}.get(cfg.data)  # probes in a minute
    settle(cfg)
    vits = {who: load_vit(f"{cfg.out}/{who}.pth", cfg.img_size).to(cfg.device)
            for who in ("teacher", "student")}
    data = load_data(cfg, labelled=True)
    rows, shares = evaluate(cfg, vits, data, cfg.labels, cfg.seeds)
    write(f"{cfg.out}/results.json", json.dumps(dict(config=vars(cfg), rows=rows, labels=shares)))
    keys = [f"{k}_{who}" for k in ("cos", "probe", "clean_probe") for who in vits] + ["recovered"]
    print(f"{'in % (* trained)':24}", *(f"{key.replace('_', ' ')[:13]:>13}" for key in keys))
    for row in [*rows, *({"distortion": f"{s['share']:g} of the labels", **s} for s in shares)]:
        cells = [100 * np.array(row.get(key) or [np.nan] * 2) for key in keys]
        cells = [f"{mean:.1f} ± {std:.1f}".replace("nan ± nan", "-") for mean, std in cells]
        print(f"{row['distortion'] + ' *' * row.get('seen', 0):24}", *(f"{c:>13}" for c in cells))
    draw_attention(f"{cfg.out}/attention.png", cfg, vits, data[2][subset(data[3], 6, cfg.seed)])

if __name__ == "__main__":
    run(main)
