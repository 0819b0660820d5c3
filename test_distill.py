# SPDX-License-Identifier: MIT
import argparse
import ast
import copy
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import datasets
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.transforms.functional import gaussian_blur

import distill
import eval as evaluation

HERE = Path(__file__).parent
MEAN_STD = (distill.IMAGENET_MEAN, distill.IMAGENET_STD)

# ---- Helpers -------------------------------------------------------------------------------------
def small_vit():
    torch.manual_seed(0)
    return distill.ViT(img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=1)

def randomize(vit):
    """Weights large enough that attention is not uniform and every layer counts."""
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.1)

def close(a, b, tolerance=1e-4):
    return (a - b).norm() <= tolerance * b.norm()

def seeded(seed):
    return torch.Generator().manual_seed(seed)

def random_features(seed, maps=2):
    g = seeded(seed)
    attn = tuple(torch.rand(3, 2, 5, 5, generator=g).softmax(-1) for _ in range(maps))
    return distill.Features(torch.randn(3, 8, generator=g), torch.randn(3, 4, 8, generator=g), attn)

def command(world, out, more=""):
    """distill.py's options for a run of a second; what is typed last counts."""
    return (f"--data {world}/images --weights {world}/vit.pth --data-size 16 --img-size 16 "
            f"--batch-size 8 --workers 0 --device cpu --epochs 2 --out {out} {more}")

def call(module, words):
    with mock.patch.object(sys, "argv", [module.__file__, *shlex.split(words)]):
        module.main()

def error_of(capsys, module, words):
    """The one line, after the usage, with which a command line fails."""
    with pytest.raises(SystemExit, match="2"):
        call(module, words)
    usage, line = capsys.readouterr().err.strip().splitlines()[-2:]
    assert usage.startswith("usage: ") and "error: " in line
    return line

def start(words, launcher=""):
    line = [sys.executable, *shlex.split(launcher), str(HERE / "distill.py"), *shlex.split(words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})

def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

def rows_of(out):
    return json.loads((out / "results.json").read_text())["rows"]

def weights_of(path):
    return torch.cat([v.flatten() for v in torch.load(path, weights_only=True).values()])

def same_students(a, b):
    return torch.equal(weights_of(a / "student.pth"), weights_of(b / "student.pth"))

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for split, label, n in (("train", 0, 24), ("train", 1, 24), ("val", 0, 8), ("val", 1, 8)):
        folder = root / f"images/{split}/class{label}"
        folder.mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 56, (16, 16, 3)) + rng.integers(0, 100, 3) + 100 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    shutil.copytree(root / "images", root / "odd")
    shutil.copytree(root / "images/val/class0", root / "odd/val/lonely")
    torch.save(small_vit().state_dict(), root / "vit.pth")
    return root

# ---- The ViT and its weights ---------------------------------------------------------------------
def test_vit_agrees_with_torchvision(tmp_path):
    torch.manual_seed(1)
    theirs = VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=2,
                               hidden_dim=128, mlp_dim=256).eval()
    randomize(theirs)
    values = list(theirs.state_dict().values())[:-2]  # of the same parameters, less the head
    values.insert(1, values.pop(3))  # the position embedding stands after the global token in ours
    keys = distill.ViT(32, 8, 128, 3, 2, mlp_ratio=2).state_dict()
    torch.save(dict(zip(keys, values, strict=True)), tmp_path / "w.pth")
    ours = distill.load_vit(tmp_path / "w.pth", 32)
    images = torch.randn(4, 3, 32, 32)
    maps = []
    with torch.no_grad():
        cls = theirs.class_token.expand(4, -1, -1)
        tokens = torch.cat([cls, theirs._process_input(images)], dim=1)
        x = tokens + theirs.encoder.pos_embedding
        for layer in theirs.encoder.layers:
            y = layer.ln_1(x)
            maps.append(layer.self_attention(y, y, y, average_attn_weights=False)[1])
            x = layer(x)
        tokens = theirs.encoder(tokens)
        for attn_blocks in (0, 2):
            found = ours(images, attn_blocks)
            assert close(found.cls, tokens[:, 0]) and close(found.patches, tokens[:, 1:])
            assert all(close(a, b) for a, b in zip(found.attn, maps[3 - attn_blocks:], strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            found = ours(images, 1)
        assert close(found.cls.float(), tokens[:, 0], 0.05)
        assert found.attn[0].dtype == torch.float32

@pytest.mark.parametrize("name", [
    "small_patch14_dinov2", "small_patch14_reg4_dinov2", "tiny_patch16_224", "large_patch14_224",
    "huge_patch14_224", "giant_patch14_224", "gigantic_patch14_224", "small_patch16_224 12"])
def test_vit_agrees_with_timm(name, tmp_path):
    timm = pytest.importorskip("timm")
    name, *heads = name.split()
    side = 28 if "14" in name else 32
    more = {"num_heads": int(heads[0])} if heads else {}
    theirs = timm.create_model(f"vit_{name}", img_size=side, depth=1, num_classes=0, **more).eval()
    randomize(theirs)
    state = {**theirs.state_dict(), "mask_token": torch.ones(1), "head.weight": torch.ones(1)}
    if "reg4" in name:  # the README's rename, the other way round
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], dim=1)
    torch.save({"model": state, "epoch": 3}, tmp_path / "w.pth")
    ours = distill.load_vit(tmp_path / "w.pth", side, **more)
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        tokens = theirs.forward_features(images)
        found = ours(images, attn_blocks=1)
    n = found.patches.shape[1]
    assert n == 4 and close(found.cls, tokens[:, 0]) and close(found.patches, tokens[:, -n:])

def pillow_resized(plane, side):
    plane = Image.fromarray(plane.numpy())
    return torch.tensor(np.asarray(plane.resize((side, side), Image.BICUBIC)))

@pytest.mark.parametrize("side", [5, 8, 12])
@pytest.mark.parametrize("registers", [0, 4])
def test_position_embeddings_are_resized_as_their_publishers_do(side, registers):
    grid = torch.randn(8, 8, 2, generator=seeded(0))
    found = distill.resize_pos_embed(
        torch.cat([torch.ones(1, 1, 2), grid.view(1, 64, 2)], dim=1), side, registers)
    assert (found[:, 0] == 1).all()
    planes = grid.permute(2, 0, 1).contiguous()  # [2, 8, 8]
    if registers:  # antialiased as in Pillow
        planes = torch.stack([pillow_resized(plane, side) for plane in planes])
    elif side != 8:  # at the points where DINO's larger scale puts the samples; edges repeated
        points = (torch.arange(side) + 0.5) * 2 / (side + 0.1) - 1  # from -1 to 1
        y, x = torch.meshgrid(points, points, indexing="ij")
        planes = F.grid_sample(planes[None], torch.stack([x, y], dim=2)[None], mode="bicubic",
                               padding_mode="border", align_corners=False)[0]
    assert close(found[0, 1:].view(side, side, 2), planes.permute(1, 2, 0))

def test_names_are_fetched_by_torch_hub(monkeypatch):
    fetch = mock.Mock(return_value=small_vit().state_dict())
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    for name, url in distill.WEIGHTS.items():
        distill.load_vit(name, 16)
        fetch.assert_called_with(url, map_location="cpu", weights_only=True)
    fetch.side_effect = OSError("no network")
    with pytest.raises(ValueError, match="no network.*offline.*checkpoints"):
        distill.load_vit("dinov2_vits14", 16)

def prefixed(prefix, more=0):
    return {prefix + name: value + more for name, value in small_vit().state_dict().items()}

@pytest.mark.parametrize("checkpoint", [
    prefixed("module."), prefixed("_orig_mod.module."), {"state_dict": prefixed("model.")},
    {"student": prefixed("module.backbone.", 1), "teacher": prefixed("backbone."), "epoch": 3},
    {"net": {"inner": prefixed("")}, "optimizer": {"state": {0: torch.ones(1)}}},
    {"args": argparse.Namespace(lr=0.1), "model_ema": prefixed("", 1), "model": "vit",
     "state_dict": prefixed("")} | {"model": prefixed("")},
    {**prefixed("student.", 1), **prefixed("teacher.")},
    {"model": {**prefixed(""), "decoder_blocks.0.norm1.weight": torch.ones(1),
               "mask_token": torch.ones(1), "head_dist.weight": torch.ones(1)}}])
def test_a_vit_is_found_in_checkpoints(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "w.pth")
    found = distill.load_vit(tmp_path / "w.pth", 16).state_dict()
    assert all(torch.equal(found[name], value) for name, value in prefixed("").items())

class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)

@pytest.mark.parametrize("key, value, message", [
    ("blocks.1.norm2.bias", None, "blocks.1.norm2.bias"), ("extra", torch.zeros(1), "extra"),
    ("dist_token", torch.zeros(1), "dist_token"), ("pos_embed", None, "pos_embed"),
    ("pos_embed", torch.zeros(1, 4, 64), "cls"), ("norm.bias", torch.full((64,), np.nan), "NaN"),
    ("blocks.0.mlp.fc2.weight", torch.zeros(3, 3), "fc2"), ("cls_token", Attack(), "state dict"),
    ("path", Path("a"), "state dict"), ("blocks.0.mlp.fc1.weight", None, "fc1"),
    ("patch_embed.proj.weight", None, "patch_embed.proj.weight"),
    ("patch_embed.proj.weight", torch.zeros(96, 3, 8, 8), "width 96.*--num-heads")])
def test_foreign_weights_are_refused_and_run_no_code(tmp_path, monkeypatch, key, value, message):
    monkeypatch.chdir(tmp_path)
    state = {**small_vit().state_dict(), key: value}
    torch.save({key: value for key, value in state.items() if value is not None}, "w.pth")
    with pytest.raises(ValueError, match=message) as caught:
        distill.load_vit("w.pth", 16)
    assert os.listdir() == ["w.pth"] and "weights_only" not in str(caught.value)

@pytest.mark.parametrize("before, after", [(32, 112), (32, 224), (64, 24)])
def test_prepare_resizes_as_pillow_and_normalizes(before, after):
    images = torch.rand(2, 3, before, before)
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    found = distill.prepare(images, after, mean, std)
    default = distill.prepare(images.double(), after)
    for channel in range(3):
        plane = pillow_resized(images[1, channel], after)
        assert close(found[1, channel], (plane - mean[channel]) / std[channel], 1e-5)
        plane = (plane - (0.485, 0.456, 0.406)[channel]) / (0.229, 0.224, 0.225)[channel]
        assert close(default[1, channel], plane, 1e-5)
    assert found.dtype == default.dtype == torch.float32

# ---- Distortions and losses ----------------------------------------------------------------------
def test_blur_is_torchvisions_also_with_a_sigma_an_image():
    images = torch.rand(5, 3, 20, 24)
    for sigma, taps in ((0.3, 3), (1.0, 7), (2.7, 19)):  # up to three sigma
        assert close(distill.distort(images, blur=sigma), gaussian_blur(images, taps, sigma), 1e-5)
    found = distill.blur(images, torch.arange(5).view(5, 1, 1, 1) / 2, 2.0, None)
    assert torch.equal(found[0], images[0])
    for i in range(1, 5):
        assert close(found[i], gaussian_blur(images[i], 13, i / 2), 1e-5)

def test_each_kind_has_the_asked_strength_range_and_order():
    grey = torch.full((40, 3, 32, 32), 0.5)
    g = seeded(0)
    assert abs(distill.distort(grey, g, noise=0.1).std() - 0.1) < 1e-3
    masked = distill.distort(grey, g, mask=0.3)
    salted = distill.distort(grey, g, salt=0.3)
    for found, value, share in ((masked, 0, 0.3), (salted, 0, 0.15), (salted, 1, 0.15)):
        assert abs((found == value).float().mean() - share) < 0.01
        assert torch.equal(found[:, 0], found[:, 1])  # the channels go together
    assert close(distill.distort(grey / 5, contrast=0.7), 0.5 + 0.3 * (grey / 5 - 0.5))
    both = distill.distort(grey, g, mask=0.3, noise=0.4)  # masked last: no noise on top
    assert abs((both == 0).all(dim=1).float().mean() - 0.3) < 0.01
    shares = (distill.distort(grey, g, mask=(0.1, 0.9)) == 0).float().mean((1, 2, 3))
    assert 0.05 < shares.min() < 0.3 and 0.7 < shares.max() < 0.95  # each its own

def test_with_one_of_each_image_shows_one_kind_or_is_left_bit_for_bit():
    images = torch.full((400, 3, 16, 16), 0.25)
    state = torch.get_rng_state()
    kinds = {"contrast": 0.5, "salt": 0.5, "mask": 0.5}
    found = distill.distort(images, seeded(0), True, 0.25, **kinds)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distill.distort(images, seeded(0), True, 0.25, **kinds), found)
    assert torch.equal(state, torch.get_rng_state())  # only the generator's numbers are drawn
    clean = (found == images).all(dim=(1, 2, 3))
    contrast = (found == 0.375).all(dim=(1, 2, 3))
    salt = (found == 1).any(dim=(1, 2, 3))
    mask = (found == 0).any(dim=(1, 2, 3)) & ~salt
    for share in (clean, contrast, salt, mask):
        assert 70 < share.sum() < 130
    assert (torch.stack([clean, contrast, salt, mask]).sum(dim=0) == 1).all()
    found = distill.distort(images, seeded(0), clean=0.3, noise=0.2, blur=1.0)
    assert 90 < (found == images).all(dim=(1, 2, 3)).sum() < 150

def test_a_new_kind_is_one_function_and_one_line(monkeypatch, world, tmp_path):
    def invert(images, severity, highest, generator):
        return images + severity * (1 - 2 * images)
    monkeypatch.setitem(distill.DISTORTIONS, "invert", (invert, 1))
    monkeypatch.chdir(tmp_path)
    call(distill, command(world, "''", "--invert 0.2 1 --noise 0.1 --one-of --seed 1"))
    call(evaluation, "runs/images-noise0.1-or-invert0.2-1-seed1")  # --out was not given

def test_a_new_term_is_one_name_and_one_line(world, tmp_path):
    text = (HERE / "distill.py").read_text()
    for old, new in (('TERMS = ("global",', 'TERMS = ("norm", "global",'),
                     ('terms = {"global"', 'terms = {"norm": student.cls.norm(), "global"')):
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "distill.py").write_text(text)
    shutil.copy(HERE / "eval.py", tmp_path)
    words = command(world, tmp_path, "--loss-weights 0.5 1 1 1 --noise 0.1")
    for line in (f"distill.py {words}", f"eval.py {tmp_path}"):
        subprocess.run([sys.executable, *line.split()], cwd=tmp_path, check=True)
    assert {"norm", "norm_student"} <= log_of(tmp_path)[0].keys()
    assert rows_of(tmp_path)[3]["norm_teacher"] > 0

def test_loss_is_the_formula_written_another_way():
    s, t = map(random_features, (0, 1))
    cls = (s.cls * t.cls).sum(-1) / s.cls.norm(dim=-1) / t.cls.norm(dim=-1)
    patch = (s.patches * t.patches).sum(-1) / s.patches.norm(dim=-1) / t.patches.norm(dim=-1)
    kl = [(b * (b.log() - a.log())).sum(-1) for a, b in zip(s.attn, t.attn, strict=True)]
    expected = {"global": 1 - cls.mean(), "patch": 1 - patch.mean(), "attn": sum(kl).mean() / 2}
    with torch.autocast("cpu", torch.bfloat16):
        total, terms = distill.distill_loss(s, t, (1.0, 2.0, 3.0))
    for name, value in expected.items():
        assert torch.allclose(terms[name], value, atol=1e-6)
    weighted = expected["global"] + 2 * expected["patch"] + 3 * expected["attn"]
    assert torch.allclose(total, weighted, atol=1e-5)
    assert all(abs(value) < 1e-6 for value in distill.distill_loss(s, s)[1].values())
    assert distill.distill_loss(s._replace(attn=()), t._replace(attn=()))[1]["attn"] == 0

def test_loss_of_sharp_attention_is_exact_and_of_one_hot_finite():
    def attn_loss(logits, target):
        attn = (logits.requires_grad_().softmax(-1),)
        features = random_features(0)
        loss = distill.distill_loss(features._replace(attn=attn), features._replace(attn=(target,)))
        loss[1]["attn"].backward()
        return loss[1]["attn"], logits.grad
    found = attn_loss(torch.randn(3, 2, 5, 5) * 300, torch.eye(5).expand(3, 2, 5, 5))
    assert all(x.isfinite().all() for x in found)
    student, teacher = 20 * torch.randn(2, 3, 2, 5, 5, generator=seeded(2))  # sharp, as block 0's
    found, grad = attn_loss(student.clone(), teacher.softmax(-1))
    exact = student.requires_grad_().log_softmax(-1)
    kl = F.kl_div(exact, teacher.softmax(-1), reduction="none").sum(-1).mean()
    kl.backward()
    assert close(found, kl) and close(grad, student.grad)

def test_the_method_is_a_module_that_leaves_the_teacher_alone():
    teacher = small_vit()
    randomize(teacher)
    student = copy.deepcopy(teacher)
    module = distill.Distillation(teacher, student, 16, *MEAN_STD, 2, (1, 2, 3))
    clean = torch.rand(3, 3, 16, 16)
    distorted = distill.distort(clean, seeded(0), noise=0.3)
    loss, terms = module(clean, distorted, torch.zeros(3))
    mean, std = torch.tensor(MEAN_STD).view(2, 3, 1, 1)
    features = [vit((x - mean) / std, 2) for vit, x in ((student, distorted), (teacher, clean))]
    expected, expected_terms = distill.distill_loss(*features, (1, 2, 3))
    assert torch.allclose(loss, expected, atol=1e-5)
    assert terms.keys() == expected_terms.keys() == set(distill.TERMS)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    classifier = distill.Classifier(small_vit(), 5, 16, *MEAN_STD)
    loss, terms = classifier(clean, distorted, torch.tensor([0, 4, 2]))
    logits = classifier.head(classifier.vit(distill.prepare(distorted, 16)).cls)
    picked = logits.softmax(dim=1)[range(3), [0, 4, 2]]
    assert torch.allclose(loss, -picked.log().mean(), atol=1e-5) and terms == {}

# ---- The pieces: what they refuse; alone; the probe ----------------------------------------------
@pytest.mark.parametrize("bad", [
    "ViT(15, 8, 64, 1, 1)", "load_vit('vit_giant', 16)", "prepare((255 * images).byte(), 8)",
    "distort((255 * images).byte(), noise=0.1)", "distort(images.long(), blur=0.1)",
    "distort(images, noise=-0.1)", "distort(images, noise=math.nan)",
    "distort(images, noise=math.inf)", "distort(images, noise=(0.5, 0.1))",
    "distort(images, noise=(1, 2, 3))", "distort(images, mask=1.1)", "distort(images, blur=4.0)",
    "distort(images, salt=(0.5, 1.1))", "distort(images, contrast=1.1)", "distort(images, fog=1)",
    "distort(images, noise=0.1, clean=1.5)", "distill_loss(f(0), f(1, maps=1))",
    "fit_probe(torch.full((9, 3), math.nan), torch.arange(9))"])
def test_bad_arguments_are_value_errors(bad):
    names = {**vars(evaluation), **vars(distill), "small_vit": small_vit, "f": random_features,
             "images": torch.rand(1, 3, 8, 8)}
    with pytest.raises(ValueError):
        eval(bad, names)

IMPORTS = ["import math", "from collections import OrderedDict", "from typing import NamedTuple",
           "import numpy as np", "import torch", "from torch import nn",
           "import torch.nn.functional as F"]

@pytest.mark.parametrize("file, names, use", [
    ("distill.py", "Features Attention LayerScale Block ViT",
     "ViT(16, 8, 64, 2, 1, layer_scale=True)(torch.rand(2, 3, 16, 16), 1).attn[0]"),
    ("distill.py", " ".join(distill.DISTORTIONS) + " DISTORTIONS distort",
     "distort(torch.rand(2, 3, 16, 16), noise=(0, 0.1), blur=1.0, mask=0.3, salt=0.1, contrast=1)"),
    ("distill.py", "Features TERMS distill_loss",
     "distill_loss(*[Features(torch.rand(2, 4), torch.rand(2, 3, 4))] * 2)"),
    ("eval.py", "fit_probe", "fit_probe(torch.rand(50, 3), torch.arange(50))(torch.rand(4, 3))")])
def test_each_piece_runs_when_cut_out(file, names, use):
    text = (HERE / file).read_text()
    pieces = IMPORTS.copy()
    for node in ast.parse(text).body:
        piece = ast.get_source_segment(text, node)
        if getattr(node, "name", piece.split()[0]) in names.split():  # or NAME = …
            pieces.append(piece)
    assert len(pieces) == len(IMPORTS) + len(names.split())
    exec("\n".join([*pieces, use]), {})

def blobs(n, seed=0):
    """n noisy points around a centre for each of four classes, and their labels."""
    g = seeded(seed)
    y = torch.randint(4, (n,), generator=g)
    return torch.randn(4, 20, generator=seeded(99))[y] + 1.5 * torch.randn(n, 20, generator=g), y

def test_probe_is_within_a_point_of_scikit_learns_best():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(2500)
    test_x, test_y = blobs(5000, seed=1)
    found = evaluation.linear_probe(x, y, test_x, test_y)
    x, test_x = [(features - x.mean(0)) / x.std(0) for features in (x, test_x)]
    models = [linear_model.LogisticRegression(C=C, max_iter=500) for C in 10.0 ** np.arange(-5, 3)]
    assert abs(found - max(model.fit(x, y).score(test_x, test_y) for model in models)) < 0.01

def test_probe_copes_with_constants_absent_classes_few_images_and_inference_mode():
    x, y = blobs(60)
    x[:, 3:5] = torch.tensor([0.1, 0])
    few_x = x[y != 2]
    few_y = 10 * y[y != 2]
    predict = evaluation.fit_probe(few_x, few_y)
    found = predict(x)
    assert set(found.tolist()) == {0, 10, 30}
    assert torch.equal(predict(x + 7.0 * (torch.arange(20) == 3)), found)  # a constant's new value
    assert evaluation.fit_probe(x[:1], y[:1])(x).unique().tolist() == [y[0]]
    with torch.inference_mode():
        assert torch.equal(evaluation.fit_probe(few_x * 1, few_y)(x), found)

# ---- The data ------------------------------------------------------------------------------------
def load(**changes):
    return distill.load_data(mock.Mock(**{"max_images": None, "workers": 0, **changes}))

def test_a_folder_of_what_people_have(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 30, 3), np.uint8))
    sideways = Image.Exif()
    sideways[0x112] = 6
    for split in ("train", "test"):
        folder = tmp_path / split / "a b[1]"
        for hidden in (folder / ".thumbs", tmp_path / split / ".ipynb_checkpoints"):
            hidden.mkdir(parents=True)
            rgb.save(hidden / "copy.png")
        for mode in ("RGB", "L", "P", "RGBA", "CMYK", "LA"):
            rgb.convert(mode).save(folder / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
        rgb.save(folder / "edge.JFIF", "jpeg")
        rgb.save(folder / "1.gif")
        rgb.rotate(90, expand=True).save(folder / "turned.webp", lossless=True, exif=sideways)
        for name in ("._a.png", "a.pdf", "b.h5", "c.mpg", "notes.txt", "none"):
            (folder / name).write_text("no image")
    train, test, classes = load(data=str(tmp_path), data_size=16)
    assert len(train) == len(test) == 9 and classes == ["a b[1]"]
    expected = np.asarray(rgb.crop((0, 10, 30, 40)).resize((16, 16)), float)
    images = torch.stack([image for image, _ in train])
    assert images.dtype == torch.uint8 and {label for _, label in train} == {0}
    distances = np.abs(images.permute(0, 2, 3, 1).numpy() - expected).mean((1, 2, 3))
    assert (distances < 6).sum() >= 3  # RGB, RGBA and the one that was turned
    part = load(data=str(tmp_path), data_size=16, max_images=3)[0]
    assert all(torch.equal(part[i][0], train[i][0]) for i in range(3)) and len(part) == 3

def test_cifar10_is_read_by_torchvision(tmp_path, monkeypatch):
    pixels = np.arange(9, dtype=np.uint8).repeat(3072).reshape(9, 3072)
    content = {"data": pixels, "labels": [*range(9)], "label_names": [*"abcdefghi"]}
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        (folder / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(datasets.cifar, "check_integrity", lambda *more: True)
    *splits, classes = load(data="cifar10", data_size=16, root=str(tmp_path))
    assert "".join(classes) == "abcdefghi"
    for n, dataset in zip((45, 9), splits, strict=True):
        images, labels = zip(*dataset, strict=True)
        assert [int(image[0, 0, 0]) for image in images] == [*labels] and len(labels) == n
        assert labels[:9] != (*range(9),) and images[0].shape == (3, 16, 16)

@pytest.mark.parametrize("kind", ["16 bits", "planar", "half a file"])
def test_an_unreadable_image_is_named(kind, tmp_path, capsys, world):
    shutil.copytree(world / "images", tmp_path / "images")
    bad = tmp_path / "images/train/class0/bad.tif"
    Image.fromarray(np.full((9, 9), 3, np.uint16)).save(bad)
    if kind == "planar":
        pytest.importorskip("tifffile").imwrite(
            bad, np.zeros((3, 9, 9), np.uint16), photometric="rgb", planarconfig="separate")
    if kind == "half a file":
        bad.write_bytes(bad.with_name("0.png").read_bytes()[:300])
    more = f"--noise 0.1 --data {tmp_path}/images --batch-size 7 --workers {len(kind) % 2}"
    assert "bad.tif" in error_of(capsys, distill, command(world, tmp_path / "run", more))
    assert not (tmp_path / "run/config.json").exists()

# ---- Training and runs ---------------------------------------------------------------------------
def test_muon_is_the_formula_in_double_precision():
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (6, 4), (3, 5))]
    expected = [p.detach().double() for p in params]
    buffers = [torch.zeros_like(p) for p in expected]
    optimizer = distill.Muon(params, lr=0.1)
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            grad = p.grad.double()
            buffers[i] = 0.9 * buffers[i] + 0.1 * grad
            update = 0.1 * grad + 0.9 * buffers[i]
            u, s, vh = torch.linalg.svd(update, full_matrices=False)
            s = s / s.norm()
            for _ in range(5):  # Newton-Schulz acts on singular values
                s = 3.4445 * s - 4.775 * s ** 3 + 2.0315 * s ** 5
            step = 0.4 * max(p.shape) ** 0.5 * (u * s) @ vh
            expected[i] -= 0.1 * (0.05 * expected[i] + step)
        optimizer.step()
    assert all(close(p.double(), e, 1e-5) for p, e in zip(params, expected, strict=True))

def test_train_takes_any_module_with_its_interface(world):
    class Rotation(distill.Classifier):  # learns by how many quarters an image was turned
        def forward(self, clean, distorted, labels):
            turned = torch.cat([clean.rot90(k, (2, 3)) for k in range(4)])
            loss, _ = super().forward(turned, turned, torch.arange(4).repeat_interleave(len(clean)))
            return loss, {"rotation": loss.detach()}
    cfg = argparse.Namespace(seed=0, batch_size=8, device="cpu", dtype="float32", compile=False,
                             workers=0, one_of=False, clean=0.0, optimizer="muon")
    dataset, _, _ = load(data=f"{world}/images", data_size=16)
    rows = list(distill.train(Rotation(small_vit(), 4, 16, *MEAN_STD), dataset, cfg, 3, 1e-3, {}))
    assert [row["epoch"] for row, _ in rows] == [1, 2, 3]
    assert rows[2][0]["rotation"] == rows[2][0]["loss"] < rows[0][0]["loss"]

def test_a_run_learns_and_leaves_its_folder(world, tmp_path):
    out = tmp_path / "run"
    with mock.patch.object(distill, "learning_rate", wraps=distill.learning_rate) as rate:
        call(distill, command(world, out, "--noise 0.3 0.6 --lr 2e-3 --epochs 40"))
    steps = sorted({request.args for request in rate.mock_calls})
    assert steps == [(i, 240, 2e-3) for i in range(240)]
    assert distill.learning_rate(0, 100, 3) == 1 and distill.learning_rate(99, 100, 3) < 1e-3
    rows = log_of(out)
    terms = ["global", "patch", "attn"]
    assert list(rows[0]) == ["epoch", "loss", *terms, "images_per_s"] + [
        f"{term}_{who}" for who in ("teacher", "student") for term in terms]
    assert len(rows) == 40 and rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert all(rows[-1][f"{term}_student"] < rows[-1][f"{term}_teacher"] for term in terms)
    assert torch.equal(weights_of(out / "teacher.pth"), weights_of(world / "vit.pth"))
    small_vit().load_state_dict(torch.load(out / "student.pth", weights_only=True))

def test_evaluation_leaves_the_table_and_the_picture(world, tmp_path, capsys):
    out = tmp_path / "run"
    call(distill, command(world, out, "--noise 0.1 0.3 --mask 0.2 --clean 0.1"))
    Image.new("RGB", (50, 30), (200, 10, 10)).save(tmp_path / "own.png")
    call(evaluation, f"{out} --pictures {tmp_path}/own.png --data none --img-size 32")
    picture = np.asarray(Image.open(out / "patches.png"))
    assert picture.shape == (228, 1132, 3) and (picture[100, 90] == [200, 10, 10]).all()
    for words in ("--labels 0", "--device cuda:9", "--test nowhere", "--dtype int8"):
        assert words.split()[1] in error_of(capsys, evaluation, f"{out} {words}")
    assert f"{tmp_path} is no run" in error_of(capsys, evaluation, str(tmp_path))
    assert not (out / "results.json").exists()
    for i in range(2):
        shutil.copytree(world / f"images/val/class{i}", tmp_path / f"fog/{i}/class{i}")
    shutil.copytree(world / "odd/val", tmp_path / "broken")
    (tmp_path / "broken/class1/x.png").write_text("no image")
    folders = [f"{tmp_path}/fog/0", f"{tmp_path}/fog/1", f"{world}/odd/val", f"{tmp_path}/broken"]
    (out / "log.jsonl").write_text((out / "log.jsonl").read_text().splitlines()[0] + "\n")
    (out / "last.pt").unlink()
    line = error_of(capsys, evaluation, f"{out} --labels 30 --test {' '.join(folders)}")
    assert "x.png" in line  # what was found until then is kept
    results = json.loads((out / "results.json").read_text())
    assert results["epoch"] == 1 and results["config"]["epochs"] == 2
    rows = results["rows"]
    names = [row["distortion"] for row in rows]
    assert names[:2] == ["clean", "noise0.1-0.3+mask0.2"] and names[11:] == folders[:3]
    assert [row["trained"] for row in rows] == [False, True] + [False] * 12
    assert all(len(row) == 13 for row in rows[:11]) and rows[1]["attn_teacher"] > 0
    assert rows[0]["recovered"] is None and abs(rows[0]["patch_teacher"]) < 1e-6
    for row in rows[1:11]:
        lost = rows[0]["probe_teacher"] - row["probe_teacher"]
        won = row["probe_student"] - row["probe_teacher"]
        assert (row["recovered"] or 0) == (pytest.approx(won / lost) if lost > 0.009 else 0)
    first, second, both = [row["clean_probe_teacher"] for row in rows[11:]]
    assert both == rows[0]["clean_probe_teacher"] == (first + second) / 2 and len(rows[11]) == 4
    call(evaluation, f"{out} --labels 30")
    printed = capsys.readouterr().out
    assert "epoch 1 of 2" in printed and "is replaced" in printed and "-0.000" not in printed
    assert rows_of(out) == rows[:11]

def test_images_of_one_class_have_distances_and_no_probes(world, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(world / f"images/{split}/class0", tmp_path / f"one/{split}/all")
    call(distill, command(world, tmp_path / "run", f"--noise 0.2 --data {tmp_path}/one"))
    call(evaluation, f"{tmp_path}/run")
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 11 and all(len(row) == 8 for row in rows)

def test_distances_are_those_of_the_loss():
    half = (0.5,) * 3
    cfg = argparse.Namespace(device="cpu", dtype="float32", img_size=16, attn_blocks=2, mean=half,
                             std=half)
    vits = {"teacher": small_vit(), "student": small_vit()}
    randomize(vits["student"])
    images = torch.randint(256, (7, 3, 16, 16), generator=seeded(0)).byte()
    batches = [(images[:4], torch.arange(4)), (images[4:], torch.arange(4, 7))]
    kinds = [({}, False), ({"contrast": 0.5}, False)]
    labels, embeddings, distances = distill.compare(vits, batches, cfg, kinds)
    assert torch.equal(labels, torch.arange(7))
    for k, (severities, _) in enumerate(kinds):
        for who, vit in vits.items():
            target = vits["teacher"](images / 127.5 - 1, 2)
            x = vit(2 * distill.distort(images / 255, **severities) - 1, 2)
            assert close(embeddings[k][who], x.cls)
            for term, value in distill.distill_loss(x, target)[1].items():
                assert abs(distances[k][f"{term}_{who}"] - value) < 1e-5

def test_the_default_run_trains_its_teacher_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(distill, "--max-images 64 --pretrain-epochs 1 --epochs 1 --device cpu")
    config = json.loads(Path("runs/stripes-mixture/config.json").read_text())
    severities = {"blur": [0, 1.5], "noise": [0, 0.4], "mask": [0, 0.6]}
    assert (config["one_of"], config["clean"], config["severities"]) == (True, 0.2, severities)
    call(evaluation, "runs/stripes-mixture --max-images 60")

@pytest.mark.parametrize("more", ["", "--weights scratch --pretrain-epochs 1 --num-heads 2"])
def test_a_killed_run_goes_on_to_the_same_bits(world, tmp_path, capsys, more):
    more += " --epochs 30 --noise 0.2 --mask 0 0.5 --one-of --clean 0.1"
    whole, broken = [tmp_path / name for name in ("whole", "broken")]
    finish(start(command(world, whole, more)))
    last = broken / "last.pt"
    words = command(world, broken, f"{more} --workers 2")  # which outlive a killed run for a while
    for wait in (0.0, 0.02, 0.07):
        begun = last.stat().st_mtime_ns if last.exists() else 0
        process = start(words)
        while process.poll() is None and not (last.exists() and last.stat().st_mtime_ns > begun):
            time.sleep(0.005)
        time.sleep(wait)
        process.kill()
        process.wait()
    assert len(torch.load(last, weights_only=True)["log"]) < 30  # else nothing was interrupted
    finish(start(words))
    assert same_students(whole, broken)
    logs = [[{**row, "images_per_s": 0} for row in log_of(out)] for out in (whole, broken)]
    assert logs[0] == logs[1] and len(logs[0]) == 30
    shutil.copy(world / "vit.pth", broken / "student.pth")  # as if stopped before it was written
    call(distill, words)
    assert f"{broken} is finished" in capsys.readouterr().out and same_students(whole, broken)
    assert "seed 0, not 1" in error_of(capsys, distill, f"{words} --seed 1")
    last.write_bytes(last.read_bytes()[:1000])
    assert "last.pt is damaged" in error_of(capsys, distill, words)
    last.unlink()
    assert "no last.pt" in error_of(capsys, distill, words) and same_students(whole, broken)

def test_a_folder_is_one_runs_at_a_time(world, tmp_path, capsys):
    out = tmp_path / "run"
    words = command(world, out, "--noise 0.2 --epochs 400")
    process = start(words)
    while not (out / "config.json").exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(0.1)
    assert "another process" in error_of(capsys, distill, words)
    process.kill()
    process.wait()
    for name in ("last.pt", "student.pth"):
        (out / name).unlink(missing_ok=True)
    assert "epochs 400, not 2" in error_of(capsys, distill, f"{words} --epochs 2")
    interrupt = mock.patch.object(distill, "train", side_effect=KeyboardInterrupt)
    with interrupt, pytest.raises(KeyboardInterrupt):
        call(distill, words)
    call(distill, f"{words} --epochs 2")  # the claim was taken away

def test_two_processes_end_where_one_does(world, tmp_path):
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    more = "--blur 1.0 --contrast 0.5 --lr 1e-3 --optimizer muon"
    finish(start(command(world, tmp_path / "one", more)))
    finish(start(command(world, tmp_path / "two", more), launcher))
    one, two = [weights_of(tmp_path / name / "student.pth") for name in ("one", "two")]
    assert (one - two).norm() < 0.05 * (one - weights_of(world / "vit.pth")).norm()
    assert np.ptp([log_of(tmp_path / name)[-1]["loss"] for name in ("one", "two")]) < 1e-4
    process = start(command(world, tmp_path / "one", f"{more} --seed 3"), launcher)
    output, _ = process.communicate(timeout=300)
    assert output.count("error: ") == 1 and "seed 0, not 3" in output

def test_an_error_on_another_machine_ends_all_and_takes_the_claim_away(world, tmp_path):
    machines = []
    for rank, data in enumerate((world / "images", "nowhere")):
        place = {"RANK": f"{rank}", "LOCAL_RANK": "0", "WORLD_SIZE": "2",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{20000 + os.getpid() % 20000}"}
        with mock.patch.dict(os.environ, place):
            machines.append(start(command(world, tmp_path / "run", f"--noise 0.1 --data {data}")))
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert machines[0].returncode != 0 and "Traceback" not in outputs[0]
    assert machines[1].returncode == 2 and "error: cannot get --data nowhere" in outputs[1]
    assert (tmp_path / "run").exists() and not (tmp_path / "run/config.json").exists()

def test_a_compiled_run_is_one_graph_and_ends_like_an_eager_one(world, tmp_path, monkeypatch):
    torch_compile = torch.compile
    backend = mock.Mock(side_effect=lambda graph, inputs: graph.forward)
    monkeypatch.setattr(torch, "compile", lambda function, **more: torch_compile(
        function, backend=backend, fullgraph=True, **more))
    for name in ("no-compile", "compile"):
        more = f"--noise 0.2 --epochs 4 --batch-size 10 --{name}"
        call(distill, command(world, tmp_path / name, more))
    assert backend.call_count == 2  # a trial, then the whole: never compiled again
    assert same_students(tmp_path / "no-compile", tmp_path / "compile")

def test_the_evidence_runs(world, tmp_path):
    out = tmp_path / "run"
    evidence = HERE / ".github/evidence"
    words = command(world, out, "--noise 0 0.2 --blur 0 1 --one-of --epochs 1")
    for line in (f"alternatives.py contrastive {words}", f"rows.py {out}", f"labels.py {out}",
                 f"table.py {tmp_path}/t.json {out} --anew", f"corrupt.py {world}/images 16 10"):
        if line.startswith("rows"):
            call(evaluation, str(out))
        done = subprocess.run([sys.executable, *f"{evidence}/{line}".split()], cwd=tmp_path,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "t.json").read_text())
    assert rows.keys() == {"teacher", "anew", str(out)} and len(rows["anew"]) == 7
    assert len(list(tmp_path.glob("images-*/*/*.png"))) == 32
    for path in evidence.glob("*.py"):
        compile(path.read_text(), path, "exec")

# ---- What goes wrong -----------------------------------------------------------------------------
BAD = (  # options / what the message says
    "--img-size 0/--img-size, --data-size -16/--data-size, --batch-size 0/--batch-size, "
    "--batch-size 1000/--batch-size, --epochs 0/--epochs, --pretrain-epochs 0/--pretrain-epochs, "
    "--max-images 0/--max-images, --attn-blocks 3/--attn-blocks, --attn-blocks 0/--attn-blocks, "
    "--weights vit_giant/vit_giant, --weights {tmp}/{tmp}, --weights {text}/{text}, "
    "--weights scratch --img-size 20/--img-size, --img-size 20/img_size=20, "
    "--num-heads 3/width 64, --seed -1/--seed, --workers -1/--workers, --lr 0/--lr, "
    "--std 1 0 1/--std, --data nowhere/nowhere, --data {tmp}/{tmp}, "
    "--data {odd}/lonely, --out {text}/{text}, --noise -1/noise, --blur 8/blur, "
    "--mask 0.5 1.1/mask, --clean 1.5/clean, --noise 1 2 3/noise, --lr 1e9/not finite, "
    "--device cuda:99/cuda:99, --device abacus/abacus, --data-size 1000000/memory").split(", ")

@pytest.mark.parametrize("case", BAD)
def test_bad_options_end_in_one_line(case, world, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("hello")
    more, message = case.split("/")
    places = {"tmp": tmp_path, "text": text, "odd": world / "odd"}
    words = command(world, tmp_path / "run", f"--noise 0.1 {more.format(**places)}")
    assert message.format(**places) in error_of(capsys, distill, words)
    assert text.read_text() == "hello" and not list(tmp_path.glob("run/config.json"))

@pytest.mark.parametrize("data, module", [("cifar100", "cifar"), ("stl10", "stl10")])
def test_a_missing_network_is_an_error(data, module, tmp_path, monkeypatch, capsys):
    offline = mock.Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(getattr(datasets, module), "download_and_extract_archive", offline)
    words = f"--data {data} --root {tmp_path}/here --device cpu --out {tmp_path}/run"
    assert "no network" in error_of(capsys, distill, words)

def test_a_missing_compiler_and_emulated_bfloat16_are_said(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=RuntimeError("no compiler")))
    words = command(world, tmp_path / "run", "--noise 0.2 --compile")
    assert "--no-compile" in error_of(capsys, distill, words)
    for emulated in (False, True):
        monkeypatch.setattr(distill.Attention, "bfloat16_is_emulated", emulated)
        call(distill, command(world, tmp_path / f"{emulated}", "--noise 0.2 --dtype bfloat16"))
        assert ("emulates" in capsys.readouterr().out) == emulated
