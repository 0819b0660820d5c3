# SPDX-License-Identifier: MIT
"""Evaluate a run of distill.py: what distortions cost its teacher and what its student wins back,
also of kinds never trained on. Prints a table; writes results.json and patches.png into the run.

    python eval.py runs/cifar10-noise0.1 [--pictures a.jpg b.jpg] [--test bad/fog bad/rain]
"""
import argparse
import json
import math
import os
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import save_image
from tqdm import tqdm

import distill


# ---- The linear probe ----------------------------------------------------------------------------
@torch.inference_mode(False)  # it learns, whatever the caller has set
def fit_probe(x, y):
    """Multinomial logistic regression of labels y [n] on standardized features x [n, D], as a
    function from features [m, D] to labels [m]: cross-entropy + strength * |weight|^2, with the
    best of six strengths on a held-out fifth. ValueError for x not finite or not as long as y.
    """
    x = torch.as_tensor(x).detach().float()
    if len(x) != len(y) or not x.isfinite().all():
        raise ValueError("x is not finite, or not as long as y")
    classes, y = torch.as_tensor(y, device=x.device).unique(return_inverse=True)  # y: their indices
    mean = x.mean(dim=0)
    std = x.std(dim=0, correction=0)
    std[std <= 1e-6 * mean.abs()] = torch.inf  # a constant feature counts as 0
    normal = (x - mean) / std
    covariance = (normal.T @ normal / len(x)).cpu()  # mps has no eigh
    variance, axes = [part.to(x.device) for part in torch.linalg.eigh(covariance)]
    scale = (variance.clamp(min=0) + 0.1).rsqrt()
    def transform(x):  # [n, D + 1]: turned and scaled for L-BFGS's speed alone, as is 0.1
        return F.pad(((x - mean) / std) @ (axes * scale), (0, 1), value=1.0)  # 1 for the bias
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    x = transform(x)[order]
    y = y[order]
    weight = torch.zeros(x.shape[1], len(classes), device=x.device, requires_grad=True)

    def fit(x, y, strength):  # changes weight, from where it is to the best for this strength
        optimizer = torch.optim.LBFGS([weight], max_iter=300, history_size=10,
                                      tolerance_change=1e-5, line_search_fn="strong_wolfe")
        def loss():
            optimizer.zero_grad()
            penalty = (weight[:-1] * scale[:, None]).square().sum()  # of the unscaled weight
            value = F.cross_entropy(x @ weight, y) + strength * penalty
            value.backward()
            return value
        optimizer.step(loss)

    fifth = len(y) // 5  # held out
    right = {}
    for strength in (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5):
        fit(x[fifth:], y[fifth:], strength)
        right[strength] = ((x[:fifth] @ weight).argmax(dim=1) == y[:fifth]).sum().item()
    fit(x, y, max(right, key=right.get))

    def predict(x):
        x = torch.as_tensor(x).to(mean)  # its device and dtype
        return classes[(transform(x) @ weight).argmax(dim=1)]
    return predict

def accuracy(predict, x, y):
    return (predict(x).cpu() == torch.as_tensor(y).cpu()).float().mean().item()

def linear_probe(train_x, train_y, test_x, test_y):
    """The test accuracy, in [0, 1], of fit_probe on the training features and labels."""
    return accuracy(fit_probe(train_x, train_y), test_x, test_y)

# ---- The table -----------------------------------------------------------------------------------
COLUMNS = [*distill.TERMS, "probe", "clean_probe", "recovered"]

def kinds_of(cfg):
    """A run's tests, (severities, one_of): clean, what it was trained on, nine that all get."""
    scale = cfg.data_size / 32  # of blur, which is in pixels
    fixed = [{"blur": 1.4 * scale}, {"blur": 2 * scale}, {"noise": 0.15}, {"noise": 0.3},
             {"mask": 0.25}, {"mask": 0.5}, {"salt": 0.1}, {"contrast": 0.7},
             {"blur": 0.7 * scale, "noise": 0.1, "mask": 0.2}]
    return [({}, False), (cfg.severities, cfg.one_of)] + [(kind, False) for kind in fixed]

def open_test(folder, cfg, classes):
    """Images of a folder of class folders, of those classes that the run's data have."""
    dataset = distill.Folder(folder, distill.square(cfg.data_size))
    known = {i: classes.index(name) for i, name in enumerate(dataset.classes) if name in classes}
    if not known or len(classes) == 1:
        raise distill.UserError(f"--test {folder} shares no classes to tell apart with {cfg.data}")
    if len(known) < len(dataset.classes):
        print(f"{folder}: {len(dataset.classes) - len(known)} classes left out, not in {cfg.data}")
    samples = [(path, known[label]) for path, label in dataset.samples if label in known]
    np.random.default_rng(0).shuffle(samples)
    dataset.samples = samples[:cfg.max_images]
    return dataset

def evaluate(cfg, vits, train_set, test_set, classes, tests):
    """Yields the rows of results.json; those of tests, {folder: data set}, come last."""
    def show(dataset, kinds, **more):
        batches = distill.make_loader(dataset, cfg, cfg.batch_size)
        batches = tqdm(batches, "evaluating", unit_scale=cfg.batch_size, **distill.BAR)
        return distill.compare(vits, batches, cfg, kinds, **more)
    kinds = kinds_of(cfg)
    test_y, test_x, distances = show(test_set, kinds, seed=2 * cfg.seed + 1)
    if len(classes) > 1:
        train_y, train_x, _ = show(train_set, kinds, seed=2 * cfg.seed, with_distances=False)
        clean_probe = fit_probe(train_x[0]["teacher"], train_y)
        clean_accuracy = accuracy(clean_probe, test_x[0]["teacher"], test_y)
    for i, kind in enumerate(kinds):
        row = {"distortion": distill.describe(*kind), "trained": i == 1, **distances[i]}
        if len(classes) > 1:
            for who in vits:
                x = test_x[i][who]
                row[f"probe_{who}"] = linear_probe(train_x[i][who], train_y, x, test_y)
                row[f"clean_probe_{who}"] = accuracy(clean_probe, x, test_y)
            lost = clean_accuracy - row["probe_teacher"]
            won = row["probe_student"] - row["probe_teacher"]
            row["recovered"] = won / lost if round(lost, 4) >= 0.01 else None
        yield row
    for folder, dataset in tests.items():
        test_y, [test_x], _ = show(dataset, [({}, False)], with_distances=False)
        right = {f"clean_probe_{who}": accuracy(clean_probe, test_x[who], test_y) for who in vits}
        yield {"distortion": folder, "trained": False, **right}

def print_row(row):
    cells = []
    for name in COLUMNS:
        keys = (f"{name}_teacher", f"{name}_student", name)  # a pair of figures, or one
        # + 0.0: no "-0.000"
        values = [f"{round(row[key], 3) + 0.0:.3f}" for key in keys if row.get(key) is not None]
        cells.append(" -> ".join(values))
    print(f"{row['distortion']:38}", *(f"{cell:>14}" for cell in cells), flush=True)

# ---- The picture ---------------------------------------------------------------------------------
@torch.inference_mode()
def draw_patches(path, cfg, vits, images):
    """Save a picture with a row for each of images, uint8 [3, S, S]: clean, distorted at the
    highest severity (with --one-of the kinds in turn), then patch features:
    the teacher's at clean, the teacher's and the student's at distorted, along the first three
    principal components of the first as red, green, blue.
    """
    highest = {name: np.max(value) for name, value in cfg.severities.items()}
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    clean = torch.stack(images).to(cfg.device) / 255  # [n, 3, S, S]
    kinds = [{name: high} for name, high in highest.items()] if cfg.one_of else [highest]
    distorted = torch.cat([distill.distort(image, generator, **severities)
                           for image, severities in zip(clean.split(1), cycle(kinds))])
    patches = []  # each [n, N, D]
    for who, x in (("teacher", clean), ("teacher", distorted), ("student", distorted)):
        x = distill.prepare(x, cfg.img_size, cfg.mean, cfg.std)
        patches.append(vits[who](x).patches.cpu())
    target = patches[0]
    mean = target.mean(dim=1, keepdim=True)
    axes = torch.linalg.svd(target - mean, full_matrices=False).Vh[:, :3].mT  # [n, D, 3]
    deviation = ((target - mean) @ axes).std(dim=1, keepdim=True)
    side = math.isqrt(target.shape[1])
    cells = [clean.cpu(), distorted.cpu()]
    for x in patches:
        colours = 0.5 + (x - mean) @ axes / (4 * deviation)  # 1 is two deviations away
        cells.append(colours.mT.unflatten(2, (side, side)))  # [n, 3, side, side]
    cells = [F.interpolate(x, 224) for x in cells]
    save_image(torch.stack(cells, dim=1).flatten(0, 1), path, nrow=5, pad_value=1)
    print(f"{path}: clean, distorted, patches of the teacher at clean, then of both at distorted")

# ---- The command line ----------------------------------------------------------------------------
def make_parser():
    parser = argparse.ArgumentParser(
        usage="%(prog)s RUN [options]", description=__doc__.split("\n\n")[0])
    count = distill.at_least(1)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run of distill.py, whose options are the defaults")
    add("--pictures", nargs="+", default=[], help="files: only draw these images' patches")
    add("--img-size", type=count, help="side in pixels for the ViT, in table and picture")
    add("--test", nargs="+", default=[], help="folders of distorted images, by class: a row each")
    add("--labels", type=count, help="training images that the probes see [all that are read]")
    add("--max-images", type=count, help="of either split [the run's, 1000 at most]")
    add("--seed", type=distill.at_least(0), help="of the distortions [0]")
    for name in ("--data", "--root", "--device"):
        add(name)
    add("--dtype", choices=["float32", "bfloat16"])
    add("--batch-size", type=count)
    add("--workers", type=distill.at_least(0))
    return parser

def parse_options(parser):
    """The options that were typed, and the run's for the rest."""
    run = Path(parser.parse_args().run)
    if not (run / "student.pth").exists():
        raise distill.UserError(f"{run} is no run of distill.py that has finished an epoch")
    config = json.loads((run / "config.json").read_text())
    config["max_images"] = min(1000, config["max_images"] or 1000)
    config["seed"] = 0  # of the distortions, not of the training
    parser.set_defaults(**config)
    cfg = parser.parse_args()  # again, with the run's options for what was not typed
    cfg.epoch = len((run / "log.jsonl").read_text().splitlines())
    print(f"{run}: the student after epoch {cfg.epoch} of {cfg.epochs}")
    distill.check_device(cfg)
    return cfg

def main():
    parser = make_parser()
    try:
        cfg = parse_options(parser)
        vits = {}
        for who in ("teacher", "student"):
            vit = distill.load_vit(f"{cfg.run}/{who}.pth", cfg.img_size, cfg.num_heads)
            vits[who] = vit.to(cfg.device)
        square = distill.square(cfg.data_size)
        images = [square(distill.read_image(path)) for path in cfg.pictures]
        if not images:
            train_set, test_set, classes = distill.load_data(cfg)
            train_set.indices = train_set.indices[:cfg.labels]
            tests = {folder: open_test(folder, cfg, classes) for folder in cfg.test}
            results = Path(cfg.run, "results.json")
            if results.exists():
                print(f"{results} is replaced")
            print(f"{'teacher -> student':38}", *(f"{name:>14}" for name in COLUMNS))
            rows = []
            for row in evaluate(cfg, vits, train_set, test_set, classes, tests):
                print_row(row)
                rows.append(row)
                content = {"config": vars(cfg), "epoch": cfg.epoch, "rows": rows}
                Path(f"{results}.part").write_text(json.dumps(content, indent=1))
                os.replace(f"{results}.part", results)
            images = [image for image, _ in islice(test_set, 6)]
        draw_patches(f"{cfg.run}/patches.png", cfg, vits, images)
    except (distill.UserError, OSError) as error:
        parser.error((str(error) or repr(error)).splitlines()[-1])  # after a loader's traceback

if __name__ == "__main__":
    main()
