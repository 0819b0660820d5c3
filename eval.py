# SPDX-License-Identifier: MIT
"""python eval.py runs/stripes-mixture: what distortions, some of kinds not trained on, cost a run's
teacher, and what its student wins back. Prints a table and writes results.json into the folder.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import DataLoader

import distill

TESTS = [  # the rows below "clean" and "trained"; blur: for images of 32 pixels
    ("blur 1.4", {"blur": 1.4}), ("noise 0.15", {"noise": 0.15}), ("noise 0.3", {"noise": 0.3}),
    ("mask 0.5", {"mask": 0.5}), ("salt 0.1", {"salt": 0.1}),
    ("all at once", {"blur": 0.7, "noise": 0.1, "mask": 0.2})]
# probe: fitted to each ViT in each row; clean_probe: fitted once, to the teacher at clean images
COLUMNS = ("global", "patch", "attn", "probe", "clean_probe")

# ---- The linear probe ----------------------------------------------------------------------------
def fit_linear(x, y, num_classes, penalty):
    """Logistic regression of labels y [n], from 0 to num_classes - 1, on features x [n, D]."""
    linear = nn.Linear(x.shape[1], num_classes, device=x.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    solver = optim.LBFGS(linear.parameters(), max_iter=200, line_search_fn="strong_wolfe")
    def closure():
        solver.zero_grad()
        loss = F.cross_entropy(linear(x), y) + penalty * linear.weight.square().sum()
        loss.backward()
        return loss
    solver.step(closure)
    return linear

def fit_probe(x, y):
    """A linear classifier of features x [n, D] with labels y [n], as a function from features
    [m, D] to labels [m]. Of five L2 penalties it takes the best on a held-out fifth."""
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    classes, y = y[order].unique(return_inverse=True)  # y: indices into classes, in the new order
    mean = x.mean(0)
    std = x.std(0) + 1e-6
    x = (x[order] - mean) / std
    fifth = len(y) // 5
    most_right = -1
    for penalty in (1.0, 0.1, 0.01, 1e-3, 1e-4):
        linear = fit_linear(x[fifth:], y[fifth:], len(classes), penalty)
        right = (linear(x[:fifth]).argmax(1) == y[:fifth]).sum()
        if right > most_right:
            best_penalty, most_right = penalty, right
    linear = fit_linear(x, y, len(classes), best_penalty)
    return lambda new: classes[linear((new - mean) / std).argmax(1)]

# ---- The comparison ------------------------------------------------------------------------------
@torch.no_grad()
def compare(teacher, student, batches, severities, one_of=False, seed=0):
    """Give both ViTs the same distorted copies of a list of (images uint8 [B, 3, S, S], labels).
    Returns two dictionaries by "teacher" and "student": embeddings [n, D], and {term: float}, the
    loss's terms between that ViT at distorted images and the teacher at clean ones."""
    generator = torch.Generator(teacher.mean.device).manual_seed(seed)
    vits = {"teacher": teacher, "student": student}
    embeddings = {"teacher": [], "student": []}
    distances = {"teacher": {}, "student": {}}
    counted = sum(len(images) for images, _ in batches if len(images) > 1)
    for images, _ in batches:
        images = images.to(teacher.mean.device) / 255
        target = teacher(teacher.prepare(images), attn_blocks=1)
        distorted = distill.distort(images, generator, one_of, **severities)
        weight = len(images) / counted if len(images) > 1 else 0  # global needs two images
        for who, vit in vits.items():
            features = vit(vit.prepare(distorted), attn_blocks=1)
            embeddings[who].append(features.cls.clone())  # a view would keep all tokens
            for term, value in distill.distill_loss(features, target).items():
                distances[who][term] = distances[who].get(term, 0) + weight * value.item()
    embeddings = {who: torch.cat(parts) for who, parts in embeddings.items()}
    return embeddings, distances

# ---- The table -----------------------------------------------------------------------------------
def print_row(name, row):
    cells = []
    for column in COLUMNS:
        if f"{column}_teacher" in row:
            before, after = row[f"{column}_teacher"], row[f"{column}_student"]
            cells.append(f"{abs(before):.3f} -> {abs(after):.3f}")  # never -0.000
    print(f"{name:20}", *cells, sep="  ", flush=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run of distill.py")
    parser.add_argument("--data", help="where its images have moved, or other images")
    parser.add_argument("--max-images", type=int, default=1000, help="of each split [1000]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    run = args.run
    config = json.loads((run / "config.json").read_text())
    options = argparse.Namespace(**config)
    options.max_images = args.max_images
    options.data = args.data or options.data
    vit_options = (options.img_size, options.num_heads, options.mean, options.std)
    teacher = distill.load_vit(run / "teacher.pth", *vit_options).to(args.device)
    student = distill.load_vit(run / "student.pth", *vit_options).to(args.device)
    train = list(DataLoader(distill.load_data(options, "train"), options.batch_size))
    test = list(DataLoader(distill.load_data(options, "test"), options.batch_size))
    train_y = torch.cat([y for _, y in train]).to(args.device)
    test_y = torch.cat([y for _, y in test]).to(args.device)
    epoch = len((run / "log.jsonl").read_text().splitlines())
    print(f"{run} after epoch {epoch} of {options.epochs}: teacher -> student")
    print(f"{'':20}", *[f"{column:14}" for column in COLUMNS], sep="  ")
    rows = []
    tests = [("clean", {}), ("trained", options.severities), *TESTS]  # "trained" without --clean
    for name, severities in tests:
        trained = name == "trained"
        if "blur" in severities and not trained:  # the run's own is in pixels already
            severities = severities | {"blur": severities["blur"] * options.data_size / 32}
        one_of = trained and options.one_of
        train_x, _ = compare(teacher, student, train, severities, one_of, seed=0)
        test_x, distances = compare(teacher, student, test, severities, one_of, seed=1)
        row = {"distortion": name, "trained": trained}
        for who, terms in distances.items():
            for term, distance in terms.items():
                row[f"{term}_{who}"] = distance
        if len(train_y.unique()) > 1:  # else there is nothing to tell apart
            if name == "clean":  # the first row
                clean_probe = fit_probe(train_x["teacher"], train_y)
            for who, x in test_x.items():
                probe = fit_probe(train_x[who], train_y)
                for column, fitted in (("probe", probe), ("clean_probe", clean_probe)):
                    right = fitted(x) == test_y
                    row[f"{column}_{who}"] = right.float().mean().item()
        rows.append(row)
        if severities and severities.keys().isdisjoint(options.severities):
            name += " (unseen)"
        print_row(name, row)
    results = {"config": vars(options), "epoch": epoch, "rows": rows}
    (run / "results.json").write_text(json.dumps(results, indent=1))

if __name__ == "__main__":
    main()
