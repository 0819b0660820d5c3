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

HELD_OUT = [  # tested on beside the run's own distortion
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

@torch.inference_mode(False)  # to learn also where the caller has turned gradients off
@torch.enable_grad()
def fit_probe(x, y):
    """Multinomial logistic regression of labels y [N] on features x [N, D], as a function from
    features [M, D] to labels [M].

    Features are standardized; L-BFGS minimizes cross-entropy + strength * |weight|^2, with that of
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
    x = (x - mean) / std
    classes, y = y.unique(return_inverse=True)  # from here on y indexes classes

    def fit(x, y, strength):
        weight = torch.zeros(len(classes), x.shape[1], device=x.device, requires_grad=True)
        bias = torch.zeros(len(classes), device=x.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, tolerance_change=1e-5,
                                      line_search_fn="strong_wolfe")
        def loss():
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(x, weight, bias), y) + strength * weight.square().sum()
            value.backward()
            return value
        with torch.autocast(x.device.type, enabled=False):  # it would go on using old weights
            optimizer.step(loss)
        return weight.detach(), bias.detach()

    generator = torch.Generator().manual_seed(0)
    held = (torch.randperm(len(y), generator=generator) < len(y) // 5).to(x.device)
    def right(strength):
        weight, bias = fit(x[~held], y[~held], strength)
        return (F.linear(x[held], weight, bias).argmax(dim=1) == y[held]).sum().item()
    strength = max([1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5], key=right)  # ties go to the stronger
    weight, bias = fit(x, y, strength)

    def predict(x):
        x = torch.as_tensor(x).detach().to(mean)
        return classes[F.linear((x - mean) / std, weight, bias).argmax(dim=1)]
    return predict

def accuracy(predict, x, y):
    found = predict(x)
    y = torch.as_tensor(y).to(found.device)
    if found.shape != y.shape or len(y) == 0:
        raise ValueError(f"{list(found.shape)} predictions, {list(y.shape)} labels to test on")
    return (found == y).float().mean().item()

def linear_probe(train_x, train_y, test_x, test_y):
    """The test accuracy, in [0, 1], of fit_probe on the training features and labels."""
    return accuracy(fit_probe(train_x, train_y), test_x, test_y)

# ---- The table -----------------------------------------------------------------------------------

def summary(figures):
    """[mean, standard deviation] over the seeds, of each list of figures."""
    return {key: [np.mean(found).item(), np.std(found).item()] for key, found in figures.items()}

def evaluate(cfg, vits, data):
    """The rows of results.json, and its labels: probes with a share of the labels."""
    images, labels, test_images, test_labels = data
    clean_test = distill.embed(vits["teacher"], test_images, cfg, {})
    clean_probe = fit_probe(distill.embed(vits["teacher"], images, cfg, {}), labels)
    clean_accuracy = accuracy(clean_probe, clean_test, test_labels)
    trained = distill.severities_of(cfg)  # all images are distorted here, whatever --clean was
    rows = []
    by_share = {share: defaultdict(list) for share in cfg.labels}
    for severities in tqdm([{}, trained, *HELD_OUT], "evaluating", disable=None):
        seen = severities is trained  # not ==: one that is held out may be equal
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
        teacher = np.array(figures["probe_teacher"])
        lost = clean_accuracy - teacher
        if lost.min() > 0.00999:  # with every seed a point (0.01, but for rounding) or more
            figures["recovered"] = (figures["probe_student"] - teacher) / lost
        name = distill.describe(severities, one_of)
        rows.append({"distortion": name, "seen": seen, "recovered": None, **summary(figures)})
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
    width = max(len(row["distortion"]) for row in rows)
    print("in %; ** trained on, * a trained kind")
    print(" " * (width + 3), *(f"{name:>13}" for name in COLUMNS.values()))
    for row in rows:
        name = row["distortion"]
        mark = "*" if any(kind in name for kind in trained) else ""
        if row.get("seen"):
            mark = "**"
        cells = []
        for key in COLUMNS:
            figures = row.get(key)
            cells.append(f"{100 * figures[0]:.1f} ± {100 * figures[1]:.1f}" if figures else "-")
        print(f"{name:{width}} {mark:2}", *(f"{cell:>13}" for cell in cells))

# ---- The picture ---------------------------------------------------------------------------------

TITLES = ["clean", "distorted", "teacher at clean", "teacher at distorted", "student at distorted"]

@torch.inference_mode()
def draw_attention(path, cfg, vits, images):
    """Save a picture with a row of the cells TITLES for each uint8 image [S, S, 3].

    Distorted is as strongly as in training, by each kind in turn where the run is one-of. The last
    three show, over the clean image in grey and on one scale a row, where the last block's global
    token looks (mean of heads).
    """
    from PIL import Image, ImageDraw  # which torchvision brings
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

    heats = []
    for who, shown in (("teacher", clean), ("teacher", distorted), ("student", distorted)):
        features = vits[who](distill.prepare(shown, cfg.img_size), attn_blocks=1)
        num_patches = features.patches.shape[1]
        heats.append(features.attn[0][:, :, 0, -num_patches:].mean(dim=1))  # [B, N]
    heat = torch.stack(heats, dim=1)  # [B, 3, N]
    heat = heat / heat[:, :1].amax(dim=2, keepdim=True)  # 1 is the teacher's highest at clean
    heat = heat.unflatten(2, (math.isqrt(num_patches), -1))
    heat = F.interpolate(heat, clean.shape[2:], mode="bilinear").clamp(max=1)  # [B, 3, S, S]
    # From black over red and yellow to white as heat rises.
    colours = torch.stack([3 * heat, 3 * heat - 1, 3 * heat - 2], dim=2).clamp(0, 1)
    grey = clean.mean(dim=1)[:, None, None]  # [B, 1, 1, S, S]

    cells = torch.stack([clean, distorted], dim=1)  # [B, 2, 3, S, S]
    cells = torch.cat([cells, 0.4 * grey + 0.6 * colours], dim=1)  # [B, 5, 3, S, S]
    cells = F.pad(cells, (1, 1, 1, 1), value=1.0)
    rows = torch.cat(cells.unbind(1), dim=3)  # [B, 3, S + 2, 5 * (S + 2)]
    picture = torch.cat(rows.unbind(0), dim=1)  # [3, B * (S + 2), 5 * (S + 2)]
    pixels = (255 * picture).byte().permute(1, 2, 0).cpu().numpy()
    zoom = math.ceil(160 / clean.shape[2])
    pixels = pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)

    canvas = Image.fromarray(np.pad(pixels, ((20, 0), (0, 0), (0, 0)), constant_values=255))
    for i, title in enumerate(TITLES):
        left = i * canvas.width // len(TITLES)
        ImageDraw.Draw(canvas).text((left + 4, 2), title, fill="black", font_size=14)
    canvas.save(path)

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
    cfg = distill.read_config(parser.parse_args().run)
    cfg = parser.parse_args(namespace=cfg)  # what is typed overrides the run's options
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
