# SPDX-License-Identifier: MIT
"""Evaluate a run of distill.py: what distortions cost its teacher and what its student wins back,
also of kinds never trained on. Prints a table; writes results.json and patches.png into the run.

    python eval.py runs/cifar10-noise0.1 [--pictures a.jpg b.jpg] [--test bad/fog bad/rain]
"""
import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Subset
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import distill


# ---- The linear probe ----------------------------------------------------------------------------
@torch.inference_mode(False)  # to learn also where the caller has turned gradients off
def fit_probe(x, y):
    """Multinomial logistic regression of labels y [n] on features x [n, D], as a function from
    features [m, D] to labels [m]. x is standardized; L-BFGS minimizes cross-entropy + strength *
    |weight|^2, with the best of six strengths on a held-out fifth, the strongest if several are.
    Raises ValueError for x that is not finite or not as long as y.
    """
    x = torch.as_tensor(x).detach().float()
    if len(x) != len(y) or not x.isfinite().all():
        raise ValueError("x is not finite, or not as long as y")
    mean = x.mean(dim=0)
    std = x.std(dim=0, correction=0)
    std = torch.where(std > 1e-6 * mean.abs(), std, torch.inf)  # a constant feature counts as 0
    classes, y = torch.as_tensor(y).to(x.device).unique(return_inverse=True)  # y indexes classes
    normal = (x - mean) / std
    variance, axes = torch.linalg.eigh(normal.T @ normal / len(x))
    scale = (variance.clamp(min=0) + 0.1).rsqrt()

    def transform(x):  # [n, D + 1]: along scaled principal axes, which spares L-BFGS most steps
        return F.pad((x - mean) / std @ (axes * scale), (0, 1), value=1.0)  # the last for the bias

    def fit(x, y, strength, weight):
        """The best weight [D + 1, classes] for one strength, looked for from the given one on."""
        weight = weight.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([weight], max_iter=300, history_size=10,
                                      tolerance_change=1e-6, line_search_fn="strong_wolfe")
        def loss():
            optimizer.zero_grad()
            penalty = (weight[:-1] * scale[:, None]).square().sum()  # of the unscaled weight
            value = F.cross_entropy(x @ weight, y) + strength * penalty
            value.backward()
            return value
        optimizer.step(loss)
        return weight.detach()

    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(x.device)
    x = transform(x)[order]
    y = y[order]
    fifth = len(y) // 5
    strengths = [1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5]
    weight = torch.zeros(x.shape[1], len(classes), device=x.device)
    right = []
    for strength in strengths:  # each from the one before on
        weight = fit(x[fifth:], y[fifth:], strength, weight)
        right.append(((x[:fifth] @ weight).argmax(dim=1) == y[:fifth]).sum().item())
    weight = fit(x, y, strengths[np.argmax(right)], weight)

    def predict(x):
        x = torch.as_tensor(x).to(mean)  # its device and dtype
        return classes[(transform(x) @ weight).argmax(dim=1)]
    return predict

def accuracy(predict, x, y):
    found = predict(x)
    return (found == torch.as_tensor(y).to(found.device)).float().mean().item()

def linear_probe(train_x, train_y, test_x, test_y):
    """The test accuracy, in [0, 1], of fit_probe on the training features and labels."""
    return accuracy(fit_probe(train_x, train_y), test_x, test_y)

# ---- The table -----------------------------------------------------------------------------------
COLUMNS = [*distill.TERMS, "probe", "clean_probe", "recovered"]

def kinds_of(cfg):
    """What a run is tested on, as (severities, one_of): clean images, what it was trained on, and
    the same for every run; blur is in pixels, which grows with the images.
    """
    scale = cfg.data_size / 32
    fixed = [{"blur": 1.4 * scale}, {"blur": 2 * scale}, {"noise": 0.15}, {"noise": 0.3},
             {"mask": 0.25}, {"mask": 0.5}, {"salt": 0.1}, {"contrast": 0.7},
             {"blur": 0.7 * scale, "noise": 0.1, "mask": 0.2}]
    return [({}, False), (cfg.severities, cfg.one_of), *((kind, False) for kind in fixed)]

def open_test(folder, cfg, classes):
    """Images of a folder of class folders, of those classes that the run's data have."""
    dataset = distill.Folder(folder, distill.square(cfg.data_size))
    known = [i for i, label in enumerate(dataset.targets) if dataset.classes[label] in classes]
    unknown = set(dataset.classes) - set(classes)
    if not known or len(classes) == 1:
        raise distill.UserError(f"--test {folder} shares no classes to tell apart with {cfg.data}")
    if unknown:
        print(f"{folder}: {len(unknown)} classes are left out, which {cfg.data} has not")
    known = np.random.default_rng(0).permutation(known)[:cfg.max_images]
    return Subset(dataset, known.tolist())

def evaluate(cfg, vits, train_set, test_set, classes, tests):
    """Yields the rows of results.json; those of tests, {folder: data set}, come last."""
    def show(dataset, kinds, **more):
        loader = distill.make_loader(dataset, cfg, cfg.batch_size)
        bar = tqdm(loader, "evaluating", unit_scale=cfg.batch_size, **distill.BAR)
        return distill.compare(vits, bar, cfg, kinds, **more)
    kinds = kinds_of(cfg)
    labels, found = show(test_set, kinds, seed=2 * cfg.seed + 1)
    if len(classes) > 1:
        train_set = Subset(train_set, range(len(train_set))[:cfg.labels])
        train_labels, train = show(train_set, kinds, seed=2 * cfg.seed, with_distances=False)
        clean_probe = fit_probe(train[0]["teacher"], train_labels)
        clean_accuracy = accuracy(clean_probe, found[0]["teacher"], labels)
    for i, kind in enumerate(kinds):
        row = {"distortion": distill.describe(*kind), "trained": i == 1}
        row |= {name: x.mean().item() for name, x in found[i].items() if name not in vits}
        if len(classes) > 1:
            for who in vits:
                probe = fit_probe(train[i][who], train_labels)
                row[f"probe_{who}"] = accuracy(probe, found[i][who], labels)
                row[f"clean_probe_{who}"] = accuracy(clean_probe, found[i][who], labels)
            lost = clean_accuracy - row["probe_teacher"]
            won = row["probe_student"] - row["probe_teacher"]
            row["recovered"] = won / lost if round(lost, 4) >= 0.01 else None
        yield row
    for folder, dataset in tests.items():
        labels, [row] = show(dataset, [({}, False)], with_distances=False)
        names = dataset.dataset.classes
        labels = torch.tensor([classes.index(names[label]) for label in labels])
        right = {f"clean_probe_{who}": accuracy(clean_probe, row[who], labels) for who in vits}
        yield {"distortion": folder, "trained": False, **right}

def table_line(row, width):
    cells = []
    for name in COLUMNS:
        keys = (f"{name}_teacher", f"{name}_student", name)  # a pair of figures, or one
        values = [round(row[key], 3) + 0.0 for key in keys if row.get(key) is not None]
        cells.append(" -> ".join(f"{value:.3f}" for value in values).rjust(14))
    return " ".join([row["distortion"].ljust(width), *cells])

# ---- The picture ---------------------------------------------------------------------------------
@torch.inference_mode()
def draw_patches(path, cfg, vits, images):
    """Save a picture with a row for each of images, uint8 [n, 3, S, S]: clean, distorted at the
    highest severity (of one kind after the other, where each image gets one), and three times the
    patch features: the teacher's at the clean image, the teacher's and the student's at the
    distorted one. Red, green and blue are the first three principal components of the first.
    """
    generator = torch.Generator(cfg.device).manual_seed(cfg.seed)
    strongest = {name: float(np.max(value)) for name, value in cfg.severities.items()}
    def patches_of(who, image):
        image = distill.prepare(image, cfg.picture_size, cfg.mean, cfg.std)
        return vits[who](image).patches[0].float().cpu()  # [N, D]
    cells = []
    for i, image in enumerate(images):
        clean = image[None].to(cfg.device) / 255
        kind = list(strongest)[i % len(strongest)]
        severities = {kind: strongest[kind]} if cfg.one_of else strongest
        distorted = distill.distort(clean, generator, **severities)
        target = patches_of("teacher", clean)
        mean = target.mean(dim=0)
        axes = torch.linalg.svd(target - mean, full_matrices=False).Vh[:3].T  # [D, 3]
        deviation = ((target - mean) @ axes).std(dim=0)
        cells += [clean.cpu(), distorted.cpu()]
        for patches in (target, patches_of("teacher", distorted), patches_of("student", distorted)):
            colours = 0.5 + (patches - mean) @ axes / (4 * deviation)  # 1 is two deviations away
            side = math.isqrt(len(colours))
            colours = colours.clamp(0, 1).T.unflatten(1, (side, side))[None]  # [1, 3, side, side]
            cells.append(F.interpolate(colours, cfg.data_size))
    picture = make_grid(torch.cat(cells), nrow=5, pad_value=1)
    save_image(F.interpolate(picture[None], scale_factor=160 // cfg.data_size + 1), path)
    print(f"{path}: clean, distorted, patches of the teacher at clean, of the teacher and of the "
          "student at distorted")

# ---- The command line ----------------------------------------------------------------------------
def make_parser():
    parser = argparse.ArgumentParser(
        usage="%(prog)s RUN [options]", description=__doc__.split("\n\n")[0],
        argument_default=argparse.SUPPRESS)
    count = distill.at_least(1)
    add = parser.add_argument
    add("run", metavar="RUN", help="folder of a run of distill.py, whose options are the defaults")
    add("--pictures", nargs="+", metavar="FILE", help="only draw these images' patches")
    add("--img-size", dest="picture_size", type=count, help="side in pixels for the picture's ViT")
    add("--test", nargs="+", metavar="FOLDER", help="distorted images, by class: a row each")
    add("--labels", type=count, help="training images that the probes see [all that are read]")
    add("--max-images", type=count, help="of either split [the run's, 1000 at most]")
    add("--seed", type=distill.at_least(0), help="of the distortions [0]")
    add("--results", help="[RUN/results.json]")
    for name in ("data", "root", "device"):
        add(f"--{name}")
    add("--dtype", choices=["float32", "bfloat16"])
    add("--batch-size", type=count)
    add("--workers", type=distill.at_least(0))
    return parser

def read_run(typed):
    """The options of an evaluation: those typed, else the run's."""
    run = Path(typed.run)
    if not (run / "student.pth").exists():
        raise distill.UserError(f"{run} is no run of distill.py that has finished an epoch")
    config = json.loads((run / "config.json").read_text())
    defaults = {"pictures": [], "test": [], "labels": None, "seed": 0,
                "picture_size": config["img_size"], "results": f"{run}/results.json",
                "max_images": min(1000, config["max_images"] or 1000)}
    cfg = argparse.Namespace(**{**config, **defaults, **vars(typed)})
    cfg.epoch = len((run / "log.jsonl").read_text().splitlines())
    print(f"{run}: the student after epoch {cfg.epoch} of {cfg.epochs}")
    distill.check_device(cfg)
    return cfg

def main():
    parser = make_parser()
    try:
        cfg = read_run(parser.parse_args())
        def load(size):
            vits = {}
            for who in ("teacher", "student"):
                vit = distill.load_vit(f"{cfg.run}/{who}.pth", size, cfg.num_heads)
                vits[who] = vit.to(cfg.device)
            return vits
        square = distill.square(cfg.data_size)
        images = [square(distill.read_image(path)) for path in cfg.pictures]
        if not images:
            *splits, classes = distill.load_data(cfg)
            tests = {folder: open_test(folder, cfg, classes) for folder in cfg.test}
            names = [distill.describe(*kind) for kind in kinds_of(cfg)] + cfg.test
            width = max(map(len, names))
            if os.path.exists(cfg.results):
                print(f"{cfg.results} is replaced")
            print("teacher -> student".ljust(width), *(name.rjust(14) for name in COLUMNS))
            rows = []
            for row in evaluate(cfg, load(cfg.img_size), *splits, classes, tests):
                rows.append(row)
                print(table_line(row, width), flush=True)
                content = {"config": vars(cfg), "epoch": cfg.epoch, "rows": rows}
                Path(f"{cfg.results}.part").write_text(json.dumps(content, indent=1))
                os.replace(f"{cfg.results}.part", cfg.results)
            images = [image for image, _ in Subset(splits[1], range(6))]
        draw_patches(f"{cfg.run}/patches.png", cfg, load(cfg.picture_size), images)
    except (distill.UserError, OSError) as error:
        parser.error((str(error) or repr(error)).splitlines()[-1])

if __name__ == "__main__":
    main()
