# SPDX-License-Identifier: MIT
"""python eval.py runs/stripes-mixture: what distortions cost a run's teacher, and what its student
wins back, also of kinds never trained on. Prints a table; adds results.json and patches.png.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.utils import save_image

import distill

# ---- The linear probe ----------------------------------------------------------------------------
def fit_probe(x, y):
    """Multinomial logistic regression of labels y [n] on features x [n, D], as a function from
    features [m, D] to labels [m]. Of five L2 penalties it takes the best on a held-out fifth."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    classes, y = y[order].unique(return_inverse=True)  # from here on y are indices of classes
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0) + 1e-6
    x = (x[order] - mean) / std
    def fit(x, y, penalty):
        linear = nn.Linear(x.shape[1], len(classes), device=x.device)
        solver = torch.optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")
        def closure():
            solver.zero_grad()
            loss = F.cross_entropy(linear(x), y) + penalty * linear.weight.square().sum()
            loss.backward()
            return loss
        solver.step(closure)
        return linear
    fifth = len(y) // 5
    def score(penalty):
        linear = fit(x[fifth:], y[fifth:], penalty)
        return (linear(x[:fifth]).argmax(dim=1) == y[:fifth]).sum()
    best = fit(x, y, penalty=max([1.0, 0.1, 0.01, 1e-3, 1e-4], key=score))
    return lambda x: classes[best((x - mean) / std).argmax(dim=1)]

# ---- The table -----------------------------------------------------------------------------------
def evaluate(cfg, teacher, student, train, test):
    """Print and yield a row for clean images, for the run's own distortions, and for fixed ones.
    "probe": accuracy of classifiers fitted on each ViT's own features of images distorted alike;
    "clean_probe": of a single classifier, fitted on the teacher's features of clean images."""
    scale = cfg.data_size / 32  # of blur, which is in pixels
    fixed = [{"blur": 1.4 * scale}, {"noise": 0.15}, {"noise": 0.3}, {"mask": 0.5}, {"salt": 0.1},
             {"contrast": 0.7}, {"blur": 0.7 * scale, "noise": 0.1, "mask": 0.2}]
    train_y, test_y = [torch.cat([y for _, y in part]).to(cfg.device) for part in (train, test)]
    for severities in ({}, cfg.severities, *fixed):
        trained = severities is cfg.severities
        one_of = trained and cfg.one_of
        train_x, _ = distill.compare(teacher, student, train, cfg, severities, one_of, seed=0)
        test_x, distances = distill.compare(teacher, student, test, cfg, severities, one_of, seed=1)
        row = {"distortion": distill.describe(severities, one_of), "trained": trained, **distances}
        if len(train_y.unique()) > 1:  # else there is nothing to tell apart
            if not severities:  # clean images come first
                clean_probe = fit_probe(train_x["teacher"], train_y)
            for who, x in test_x.items():
                probe = fit_probe(train_x[who], train_y)
                row[f"probe_{who}"] = (probe(x) == test_y).float().mean().item()
                row[f"clean_probe_{who}"] = (clean_probe(x) == test_y).float().mean().item()
        name = "trained" if trained else row["distortion"]
        unseen = severities and severities.keys().isdisjoint(cfg.severities)
        cells = [f"{row[f'{t}_teacher']:.3f} → {row[f'{t}_student']:.3f}" for t in distill.TERMS]
        cells += [f"{100 * row[f'{p}_teacher']:.1f} → {100 * row[f'{p}_student']:.1f}"
                  for p in ("probe", "clean_probe") if f"{p}_teacher" in row]
        print(f"{name:15.15} {'unseen' if unseen else '':6}", *cells, sep="  ", flush=True)
        yield row

# ---- The picture ---------------------------------------------------------------------------------
@torch.inference_mode()
def draw_patches(path, cfg, teacher, student, images):
    """A row for each of images [n, 3, S, S], distorted as in training at the highest severity, with
    patch features along the first three principal components of the teacher's at clean images."""
    highest = {name: max(ends) for name, ends in cfg.severities.items()}
    images = images.to(cfg.device) / 255
    distorted = distill.distort(images, one_of=cfg.one_of, **highest)
    good, bad = [distill.prepare(x, cfg.img_size, cfg.mean, cfg.std) for x in (images, distorted)]
    found = (teacher(good), teacher(bad), student(bad))
    patches = torch.stack([features.patches for features in found]).cpu()  # [3 views, n, N, D]
    mean = patches[0].mean(dim=1, keepdim=True)
    axes = torch.linalg.svd(patches[0] - mean).Vh[:, :3].mT  # [n, D, 3]
    colours = (patches - mean) @ axes  # [3 views, n, N, 3 colours]
    colours = 0.5 + colours / (4 * colours[0].std(dim=1, keepdim=True))  # 0, 1: -2, 2 deviations
    colours = colours.mT.unflatten(3, (round(colours.shape[2] ** 0.5), -1))  # [3, n, 3, h, w]
    cells = [F.interpolate(x, 224) for x in (images.cpu(), distorted.cpu(), *colours)]
    save_image(torch.stack(cells, dim=1).flatten(0, 1), path, nrow=5, pad_value=1)
    print(f"{path}: clean, distorted, patches of the teacher at clean, then of both at distorted")

# ---- The command line ----------------------------------------------------------------------------
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="folder of a run of distill.py")
    parser.add_argument("--max-images", type=int, default=1000, help="of each split [1000]")
    parser.add_argument("--device", choices=distill.DEVICES, default=distill.DEVICES[-1])
    args = parser.parse_args()
    torch.manual_seed(0)  # of the probes' first weights and the picture's distortions
    try:
        config = json.loads(Path(args.run, "config.json").read_text())
        cfg = argparse.Namespace(**{**config, "workers": 2, **vars(args)})
        cfg.dtype = "float32" if cfg.device == "cpu" else cfg.dtype
        if cfg.max_images < 1:
            raise distill.UserError("--max-images is not positive")
        vits = [distill.load_vit(f"{cfg.run}/{who}.pth", cfg.img_size, cfg.num_heads).to(cfg.device)
                for who in ("teacher", "student")]
        train, test = [list(distill.make_loader(dataset, cfg, cfg.batch_size))
                       for dataset in distill.load_data(cfg)]
        epoch = len(Path(cfg.run, "log.jsonl").read_text().splitlines())
        print(f"{cfg.run} after epoch {epoch} of {cfg.epochs}: teacher → student")
        print(f"{'':24}global         patch          attn           probe, %     clean probe, %")
        rows = list(evaluate(cfg, *vits, train, test))
        results = json.dumps({"config": vars(cfg), "epoch": epoch, "rows": rows}, indent=1)
        Path(cfg.run, "results.json").write_text(results)
        draw_patches(f"{cfg.run}/patches.png", cfg, *vits, test[0][0][:6])  # of the first batch
    except (distill.UserError, OSError) as error:
        parser.error(str(error).splitlines()[-1])

if __name__ == "__main__":
    main()
