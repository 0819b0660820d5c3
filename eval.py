# SPDX-License-Identifier: MIT
"""Evaluate a run of distill.py: what distortions cost its teacher and what its student wins back,
also of kinds never trained on. Prints a table; writes results.json and attention.png into the run.

    python eval.py runs/cifar10-noise0.1 [--pictures a.jpg b.jpg] [--test bad/fog bad/rain]
"""
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import distill

# ---- The linear probe ----------------------------------------------------------------------------

@torch.inference_mode(False)  # to learn also where the caller has turned gradients off
def fit_probe(x, y):
    """Multinomial logistic regression of labels y [n] on features x [n, D], as a function from
    features [m, D] to labels [m]. x is standardized; L-BFGS minimizes cross-entropy + strength *
    |weight|^2, with the best of six strengths on a held-out fifth. ValueError for unfit x or y.
    """
    x = torch.as_tensor(x).detach().float()
    if len(x) != len(y) or not x.isfinite().all():
        raise ValueError("x is not finite, or not as long as y")
    mean = x.mean(dim=0)
    std = x.std(dim=0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs(), std, torch.inf)  # a constant feature counts as 0
    classes, y = torch.as_tensor(y).to(x.device).unique(return_inverse=True)  # y indexes classes

    def standardize(x):
        return F.pad((x - mean) / std, (0, 1), value=1.0)  # [n, D + 1], the last for the bias

    def fit(x, y, strength):
        weight = torch.zeros(x.shape[1], len(classes), device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight], max_iter=100, tolerance_change=1e-5, line_search_fn="strong_wolfe")
        def loss():
            optimizer.zero_grad()
            value = F.cross_entropy(x @ weight, y) + strength * weight[:-1].square().sum()
            value.backward()
            return value
        optimizer.step(loss)
        return weight.detach()

    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(x.device)
    x = standardize(x)[order]
    y = y[order]
    fifth = len(y) // 5
    strengths = [1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5]
    right = []
    for strength in strengths:
        weight = fit(x[fifth:], y[fifth:], strength)
        right.append(((x[:fifth] @ weight).argmax(dim=1) == y[:fifth]).sum().item())
    weight = fit(x, y, strengths[np.argmax(right)])  # of equals the first, the strongest

    def predict(x):
        x = torch.as_tensor(x).to(mean)  # its device and dtype
        return classes[(standardize(x) @ weight).argmax(dim=1)]
    return predict

def accuracy(predict, x, y):
    found = predict(x)
    return (found == torch.as_tensor(y).to(found.device)).float().mean().item()

def linear_probe(train_x, train_y, test_x, test_y):
    """The test accuracy, in [0, 1], of fit_probe on the training features and labels."""
    return accuracy(fit_probe(train_x, train_y), test_x, test_y)

# ---- The table -----------------------------------------------------------------------------------
def tested_on(size):
    """What every run is tested on; blur is in pixels of images of this size."""
    scale = size / 32
    return [
        {"blur": 1.4 * scale}, {"blur": 2 * scale},
        {"noise": 0.15}, {"noise": 0.3},
        {"mask": 0.25}, {"mask": 0.5},
        {"salt": 0.1}, {"contrast": 0.7},
        {"blur": 0.7 * scale, "noise": 0.1, "mask": 0.2},
    ]

def evaluate(cfg, vits, data):
    """The rows of results.json, for the data of distill.load_data and for --test."""
    (images, labels), (test_images, test_labels), classes = data
    images = images[:cfg.labels]
    labels = labels[:cfg.labels]
    tests = {folder: distill.open_folder(folder, cfg) for folder in cfg.test}
    unknown = {name for dataset in tests.values() for name in dataset.classes} - set(classes)
    if unknown:
        raise distill.UserError(f"--test has classes {sorted(unknown)}, which {cfg.data} has not")
    trained = distill.severities_of(cfg)
    rows = []
    for severities in tqdm([{}, trained, *tested_on(cfg.data_size)], "evaluating", disable=None):
        one_of = cfg.one_of and severities is trained
        x, _ = distill.compare(vits, images, cfg, severities, one_of, cfg.seed)
        test_x, row = distill.compare(vits, test_images, cfg, severities, one_of, cfg.seed + 1)
        probes = {who: fit_probe(x[who], labels) for who in vits}
        if not rows:  # the first row is clean
            clean_probe = probes["teacher"]
        for who in vits:
            row[f"probe_{who}"] = accuracy(probes[who], test_x[who], test_labels)
            row[f"clean_probe_{who}"] = accuracy(clean_probe, test_x[who], test_labels)
        name = distill.describe(severities, one_of)
        rows.append({"distortion": name, "trained": severities is trained, **row})
        lost = rows[0]["probe_teacher"] - row["probe_teacher"]
        won = row["probe_student"] - row["probe_teacher"]
        rows[-1]["recovered"] = won / lost if round(lost, 4) >= 0.01 else None
    for folder, dataset in tests.items():
        images, labels = distill.read_split(dataset, cfg)
        labels = torch.tensor([classes.index(name) for name in dataset.classes])[labels]
        x, _ = distill.compare(vits, images, cfg, {})
        row = {f"clean_probe_{who}": accuracy(clean_probe, x[who], labels) for who in vits}
        rows.append({"distortion": folder, "trained": False, **row})
    return rows

def print_table(rows):
    columns = ["global", "patch", "attn", "probe", "clean_probe", "recovered"]
    width = max(len(row["distortion"]) for row in rows)
    print("teacher > student".ljust(width), *(f"{name:>13}" for name in columns))
    for row in rows:
        cells = []
        for name in columns:
            keys = (f"{name}_teacher", f"{name}_student", name)  # a pair of figures, or one
            values = [f"{row[key]:.3f}" for key in keys if row.get(key) is not None]
            cells.append(" > ".join(values))
        print(f"{row['distortion']:{width}}", *(f"{cell:>13}" for cell in cells))

# ---- The picture ---------------------------------------------------------------------------------
@torch.inference_mode()
def draw_attention(path, cfg, vits, images):
    """Save a picture with a row for each of images, uint8 [n, 3, S, S]: clean, distorted at the
    highest severity, and three times, in red, where the last block's global token looks.
    """
    clean = images.to(cfg.device) / 255
    strongest = {name: np.max(value).item() for name, value in distill.severities_of(cfg).items()}
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    distorted = distill.distort(clean, generator, cfg.one_of, **strongest)
    grey = clean.mean(dim=1, keepdim=True) / 2
    cells = [clean, distorted]
    for who, shown in (("teacher", clean), ("teacher", distorted), ("student", distorted)):
        attn = vits[who](distill.prepare(shown, cfg.img_size), attn_blocks=1).attn[0]
        heat = attn[:, :, 0, 1 + vits[who].num_registers:].mean(dim=1)  # over heads: [n, N]
        heat = heat / heat.amax(dim=1, keepdim=True)
        heat = heat.unflatten(1, (1, math.isqrt(heat.shape[1]), -1))
        heat = F.interpolate(heat, cfg.data_size, mode="bilinear")  # [n, 1, S, S]
        cells.append(torch.cat([heat, grey, grey], dim=1))
    picture = make_grid(torch.stack(cells, dim=1).flatten(0, 1), nrow=5, pad_value=1)
    save_image(F.interpolate(picture[None], scale_factor=160 // cfg.data_size + 1), path)
    print(f"{path}: clean, distorted, teacher at clean, teacher at distorted, student at distorted")

# ---- The command line ----------------------------------------------------------------------------
def main():
    parser = distill.make_parser("%(prog)s RUN [options]", __doc__)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run of distill.py, whose options are the defaults")
    add("--pictures", nargs="+", default=[], metavar="FILE", help="only draw these images")
    add("--test", nargs="+", default=[], metavar="FOLDER", help="distorted images, by class")
    add("--labels", type=distill.positive_int, help="training images that the probes see [all]")
    run = parser.parse_args().run
    try:
        if not Path(run, "last.pt").exists():
            raise distill.UserError(f"{run} is no run of distill.py that has finished an epoch")
        config = json.loads(Path(run, "config.json").read_text())
        parser.set_defaults(**{**config, "seed": 0})  # runs of one batch size are distorted alike
        cfg = parser.parse_args()  # what was not typed is now as in the run
        distill.resolve(cfg)
        if cfg.data == "stripes" and cfg.max_images is None:
            cfg.max_images = 1000
        vits = {who: distill.load_vit(f"{run}/{who}.pth", cfg.img_size).to(cfg.device)
                for who in ("teacher", "student")}
        if cfg.pictures:
            square = distill.square(cfg.data_size)
            images = torch.stack([square(distill.read_image(path)) for path in cfg.pictures])
        else:
            data = distill.load_data(cfg)
            rows = evaluate(cfg, vits, data)
            results = json.dumps({"config": vars(cfg), "rows": rows}, indent=1)
            Path(run, "results.json").write_text(results)
            print_table(rows)
            images = data[1][0][:6]
        draw_attention(f"{run}/attention.png", cfg, vits, images)
    except (distill.UserError, OSError) as error:
        parser.error(str(error).splitlines()[-1])

if __name__ == "__main__":
    main()
