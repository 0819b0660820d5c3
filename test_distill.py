# SPDX-License-Identifier: MIT
import ast
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
from torchvision import datasets
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.transforms.functional import gaussian_blur

import distill
import eval as evaluation

HERE = Path(__file__).parent

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
    with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *shlex.split(words)]):
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

def weights_of(path):
    return torch.cat([v.flatten() for v in torch.load(path, weights_only=True).values()])

def same_students(*runs):
    return torch.equal(*[weights_of(run / "student.pth") for run in runs])

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for split, n in (("train", 24), ("val", 8)):
        for label in range(2):
            folder = root / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 56, (16, 16, 3)) + rng.integers(0, 100, 3) + 100 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    odd = shutil.copytree(root / "images", root / "odd")
    shutil.copytree(odd / "val" / "class0", odd / "val" / "lonely")
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

@pytest.mark.parametrize("name, registers", [
    ("vit_small_patch14_dinov2", 0), ("vit_small_patch14_reg4_dinov2", 4)])
def test_vit_agrees_with_timm(name, registers, tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, img_size=28, depth=2, num_classes=0).eval()
    randomize(theirs)
    state = {**theirs.state_dict(), "mask_token": torch.ones(1), "head.weight": torch.ones(1)}
    if registers:  # the README's rename, the other way round
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], dim=1)
    torch.save({"model": state, "epoch": 3}, tmp_path / "w.pth")
    ours = distill.load_vit(tmp_path / "w.pth", 28)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        tokens = theirs.forward_features(images)
        found = ours(images, attn_blocks=1)
    assert close(found.cls, tokens[:, 0]) and close(found.patches, tokens[:, 1 + registers:])

@pytest.mark.parametrize("side", [5, 8, 12])
@pytest.mark.parametrize("registers", [0, 4])
def test_position_embeddings_are_resized_as_their_publishers_do(side, registers):
    grid = torch.randn(8, 8, 2, generator=seeded(0))
    found = distill.resize_pos_embed(
        torch.cat([torch.ones(1, 1, 2), grid.view(1, 64, 2)], dim=1), side, registers)
    assert (found[:, 0] == 1).all()
    if side == 8:
        expected = grid
    elif registers:  # antialiased as in Pillow
        planes = [Image.fromarray(plane.numpy()) for plane in grid.permute(2, 0, 1).contiguous()]
        planes = [np.asarray(plane.resize((side, side), Image.BICUBIC)) for plane in planes]
        expected = torch.tensor(np.stack(planes, axis=2))
    else:  # at the points where DINO's scale, a little larger, puts the samples; edges repeated
        points = (torch.arange(side) + 0.5) * 2 / (side + 0.1) - 1  # from -1 to 1
        y, x = torch.meshgrid(points, points, indexing="ij")
        planes = F.grid_sample(grid.permute(2, 0, 1)[None], torch.stack([x, y], dim=2)[None],
                               mode="bicubic", padding_mode="border", align_corners=False)
        expected = planes[0].permute(1, 2, 0)
    assert close(found[0, 1:].view(side, side, 2), expected)

def test_names_are_fetched_by_torch_hub(monkeypatch):
    fetch = mock.Mock(return_value=small_vit().state_dict())
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    for name, url in distill.WEIGHTS.items():
        distill.load_vit(name, 16)
        fetch.assert_called_with(url, map_location="cpu", weights_only=True)
    fetch.side_effect = OSError("no network")
    with pytest.raises(ValueError, match="no network.*offline.*checkpoints"):
        distill.load_vit("dinov2_vits14", 16)

class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)

@pytest.mark.parametrize("key, value, message", [
    ("blocks.1.norm2.bias", None, "blocks.1.norm2.bias"), ("extra", torch.zeros(1), "extra"),
    ("blocks.0.mlp.fc2.weight", torch.zeros(3, 3), "fc2"), ("cls_token", Attack(), "w.pth"),
    ("patch_embed.proj.weight", None, "patch_embed.proj.weight"),
    ("patch_embed.proj.weight", torch.zeros(96, 3, 8, 8), "width 96")])
def test_foreign_weights_are_refused_and_run_no_code(tmp_path, monkeypatch, key, value, message):
    monkeypatch.chdir(tmp_path)
    state = {**small_vit().state_dict(), key: value}
    torch.save({key: value for key, value in state.items() if value is not None}, "w.pth")
    with pytest.raises(ValueError, match=message):
        distill.load_vit("w.pth", 16)
    assert os.listdir() == ["w.pth"]

def test_prepare_looks_at_both_sides_and_normalizes():
    images = torch.rand(2, 3, 16, 8)
    found = distill.prepare(images, 8)
    small = F.interpolate(images, size=(8, 8), mode="bicubic", antialias=True)
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        assert close(found[:, channel], (small[:, channel] - mean) / std)

# ---- Distortions and losses ----------------------------------------------------------------------
def test_blur_is_torchvisions_also_with_a_sigma_an_image():
    images = torch.rand(5, 3, 20, 24)
    for sigma, taps in ((0.3, 3), (1.0, 7), (2.7, 19)):  # up to three sigma
        assert close(distill.distort(images, blur=sigma), gaussian_blur(images, taps, sigma), 1e-5)
    sigmas = [0.0, 0.5, 1.0, 1.5, 2.0]
    found = distill.blur(images, torch.tensor(sigmas).view(5, 1, 1, 1), 2.0, None)
    assert torch.equal(found[0], images[0])
    for i in range(1, 5):
        assert close(found[i], gaussian_blur(images[i], 13, sigmas[i]), 1e-5)

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
        """share of inversion"""
        return images + severity * (1 - 2 * images)
    monkeypatch.setitem(distill.DISTORTIONS, "invert", (invert, 1))
    monkeypatch.chdir(tmp_path)
    more = "--invert 0.2 1 --noise 0.1 --one-of --method contrastive"
    call(distill, command(world, "''", more))  # an empty --out: the default
    call(evaluation, "runs/images-noise0.1-or-invert0.2-1-contrastive")

def test_loss_is_the_formula_written_another_way():
    s = random_features(0)
    t = random_features(1)
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
    cosines = F.cosine_similarity(s.cls[:, None], t.cls[None], dim=-1)
    nce = -(cosines / 0.1).log_softmax(dim=1).diagonal().mean()
    assert torch.allclose(distill.info_nce(s.cls, t.cls), nce, atol=1e-5)
    logits = (torch.randn(3, 2, 5, 5) * 300).requires_grad_()  # of maps that are all but one-hot
    one_hot = t._replace(attn=(torch.eye(5).expand(3, 2, 5, 5),))
    loss, _ = distill.distill_loss(s._replace(attn=(logits.softmax(-1),)), one_hot)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()

# ---- The pieces: what they refuse; alone; the probe ----------------------------------------------
@pytest.mark.parametrize("bad", [
    "ViT(15, 8, 64, 1, 1)", "small_vit()(torch.zeros(1, 3, 8, 8))", "load_vit('vit_giant', 16)",
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

@pytest.mark.parametrize("file, names, use", [
    ("distill.py", "Features Attention LayerScale Block ViT",
     "ViT(16, 8, 64, 2, 1, layer_scale=True)(torch.rand(2, 3, 16, 16), 1).attn[0]"),
    ("distill.py", " ".join(distill.DISTORTIONS) + " DISTORTIONS distort",
     "distort(torch.rand(2, 3, 16, 16), noise=(0, 0.1), blur=1.0, mask=0.3, salt=0.1, contrast=1)"),
    ("distill.py", "Features distill_loss",
     "distill_loss(*[Features(torch.rand(2, 4), torch.rand(2, 3, 4))] * 2)"),
    ("eval.py", "fit_probe", "fit_probe(torch.rand(50, 3), torch.arange(50))(torch.rand(4, 3))")])
def test_each_piece_runs_when_cut_out(file, names, use):
    text = (HERE / file).read_text()
    pieces = ["import math", "from collections import OrderedDict", "from typing import NamedTuple",
              "import numpy as np", "import torch", "from torch import nn",
              "import torch.nn.functional as F"]
    for node in ast.parse(text).body:
        piece = ast.get_source_segment(text, node)
        if getattr(node, "name", piece.split()[0]) in names.split():  # or NAME = …
            pieces.append(piece)
    assert len(pieces) == 7 + len(names.split())
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
    mean = x.mean(0)
    std = x.std(0)
    scores = []
    for C in 10.0 ** np.arange(-5, 3):
        theirs = linear_model.LogisticRegression(C=C, max_iter=500).fit((x - mean) / std, y)
        scores.append(theirs.score((test_x - mean) / std, test_y))
    assert abs(evaluation.linear_probe(x, y, test_x, test_y) - max(scores)) < 0.01

def test_probe_copes_with_constants_absent_classes_few_images_and_inference_mode():
    x, y = blobs(60)
    x[:, 3] = 0.1
    x[:, 4] = 0
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

def test_a_folder_of_all_modes(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 30, 3), np.uint8))
    for split in ("train", "test"):
        folder = tmp_path / split / "a b[1]"
        folder.mkdir(parents=True)
        for mode in ("RGB", "L", "P", "RGBA", "CMYK", "LA"):
            rgb.convert(mode).save(folder / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
    (images, labels), _, classes = load(data=str(tmp_path), data_size=16, workers=2)
    assert images.dtype == torch.uint8 and labels.tolist() == [0] * 6 and classes == ["a b[1]"]
    expected = np.asarray(rgb.crop((0, 10, 30, 40)).resize((16, 16)), float)
    distances = np.abs(images.permute(0, 2, 3, 1).numpy() - expected).mean((1, 2, 3))
    assert (distances < 6).sum() >= 2  # of those in RGB and RGBA
    part = load(data=str(tmp_path), data_size=16, max_images=3)[0][0]
    assert torch.equal(part, images[:3])

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
    for n, (images, labels) in zip((45, 9), splits, strict=True):
        assert images.shape == (n, 3, 16, 16) and labels.dtype == torch.int64
        assert torch.equal(images[:, 0, 0, 0], labels) and labels[:9].tolist() != [*range(9)]

# ---- Runs ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["distill", "contrastive", "supervised"])
def test_a_run_learns_and_leaves_its_folder(world, tmp_path, method):
    out = tmp_path / "run"
    more = f"--noise 0.3 0.6 --lr 2e-3 --epochs 40 --method {method}"
    with mock.patch.object(distill, "learning_rate", wraps=distill.learning_rate) as rate:
        call(distill, command(world, out, more))
    assert [request.args for request in rate.mock_calls] == [(i, 240, 2e-3) for i in range(240)]
    assert distill.learning_rate(0, 100, 3) == 1 and distill.learning_rate(99, 100, 3) < 1e-3
    rows = log_of(out)
    terms = ["global", "patch", "attn"]
    keys = ["epoch", "loss", *(terms if method == "distill" else []), "images_per_s"]
    assert list(rows[0]) == keys + [f"{t}_{who}" for who in ("teacher", "student") for t in terms]
    assert len(rows) == 40 and rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert method != "distill" or all(
        rows[-1][f"{term}_student"] < rows[-1][f"{term}_teacher"] for term in terms)
    assert torch.equal(weights_of(out / "teacher.pth"), weights_of(world / "vit.pth"))
    small_vit().load_state_dict(torch.load(out / "student.pth", weights_only=True))

def test_evaluation_leaves_the_table_and_the_picture(world, tmp_path, capsys):
    out = tmp_path / "run"
    call(distill, command(world, out, "--noise 0.1 0.3 --mask 0.2 --clean 0.1"))
    Image.new("RGB", (50, 30), (200, 10, 10)).save(tmp_path / "own.png")
    call(evaluation, f"{out} --pictures {tmp_path}/own.png --data none")
    picture = np.asarray(Image.open(out / "attention.png"))
    assert picture.shape == (220, 1012, 3) and (picture[100, 90] == [200, 10, 10]).all()
    for words in ("--labels 0", "--device cuda:9", "--test nowhere", f"--test {world}/odd/val"):
        message = "lonely" if "odd" in words else words.split()[1]
        assert message in error_of(capsys, evaluation, f"{out} {words}")
    assert f"{tmp_path} is no run" in error_of(capsys, evaluation, str(tmp_path))
    assert not (out / "results.json").exists()
    for i in range(2):
        shutil.copytree(world / f"images/val/class{i}", tmp_path / f"fog/{i}/class{i}")
    folders = [f"{tmp_path}/fog/0", f"{tmp_path}/fog/1", f"{world}/images/val"]
    call(evaluation, f"{out} --labels 30 --test {' '.join(folders)}")
    rows = json.loads((out / "results.json").read_text())["rows"]
    names = [row["distortion"] for row in rows]
    assert names[:2] == ["clean", "noise0.1-0.3+mask0.2"] and names[11:] == folders
    assert [row["trained"] for row in rows] == [False, True] + [False] * 12
    assert all(len(row) == 13 for row in rows[:11]) and rows[1]["attn_teacher"] > 0
    assert rows[0]["recovered"] is None and abs(rows[0]["patch_teacher"]) < 1e-6
    for row in rows[1:11]:
        lost = rows[0]["probe_teacher"] - row["probe_teacher"]
        won = row["probe_student"] - row["probe_teacher"]
        assert (row["recovered"] or 0) == (pytest.approx(won / lost) if lost > 0.009 else 0)
    first, second, both = [row["clean_probe_teacher"] for row in rows[11:]]
    assert both == rows[0]["clean_probe_teacher"] == (first + second) / 2 and len(rows[11]) == 4

def test_the_default_run_trains_its_teacher_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(distill, "--max-images 64 --pretrain-epochs 1 --epochs 1 --device cpu")
    config = json.loads(Path("runs/stripes-mixture/config.json").read_text())
    assert (config["one_of"], config["clean"], config["blur"]) == (True, 0.2, [0, 1.5])
    call(evaluation, "runs/stripes-mixture --max-images 60")

@pytest.mark.parametrize("more", ["", "--weights scratch --method supervised --pretrain-epochs 1"])
def test_a_killed_run_goes_on_to_the_same_bits(world, tmp_path, capsys, more):
    more += " --epochs 30 --noise 0.2 --mask 0 0.5 --one-of --clean 0.1"
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    finish(start(command(world, whole, more)))
    last = broken / "last.pt"
    words = command(world, broken, more)
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
    call(distill, words)
    assert f"{broken} is finished" in capsys.readouterr().out
    assert "seed 0, not 1" in error_of(capsys, distill, f"{words} --seed 1")

def test_two_processes_end_where_one_does(world, tmp_path):
    more = "--blur 1.0 --contrast 0.5 --lr 1e-3"
    finish(start(command(world, tmp_path / "one", more)))
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    finish(start(command(world, tmp_path / "two", more), launcher))
    one, two = [weights_of(tmp_path / name / "student.pth") for name in ("one", "two")]
    assert (one - two).norm() < 0.05 * (one - weights_of(world / "vit.pth")).norm()
    assert np.ptp([log_of(tmp_path / name)[-1]["loss"] for name in ("one", "two")]) < 1e-4

def test_a_compiled_run_is_one_graph_and_ends_like_an_eager_one(world, tmp_path, monkeypatch):
    torch_compile = torch.compile
    backend = mock.Mock(side_effect=lambda graph, inputs: graph.forward)
    monkeypatch.setattr(torch, "compile", lambda function, **more: torch_compile(
        function, backend=backend, fullgraph=True, **more))
    for name in ("no-compile", "compile"):
        more = f"--noise 0.2 --epochs 4 --batch-size 10 --{name}"
        call(distill, command(world, tmp_path / name, more))
    assert backend.call_count == 1  # whole, and not compiled again
    assert same_students(tmp_path / "no-compile", tmp_path / "compile")

# ---- What goes wrong -----------------------------------------------------------------------------
BAD = (  # options / what the message says
    "--img-size 0/--img-size, --data-size -16/--data-size, --batch-size 0/--batch-size, "
    "--batch-size 1000/--batch-size, --epochs 0/--epochs, --pretrain-epochs 0/--pretrain-epochs, "
    "--max-images 0/--max-images, --attn-blocks 3/--attn-blocks, --attn-blocks 0/--attn-blocks, "
    "--weights vit_giant/vit_giant, --weights {tmp}/{tmp}, --weights {text}/{text}, "
    "--weights scratch --scratch 96 4/--scratch, --weights scratch --img-size 20/--img-size, "
    "--img-size 20/img_size=20, --data nowhere/nowhere, --data {tmp}/{tmp}, "
    "--data {odd}/lonely, --out {text}/{text}, --noise -1/noise, --blur 8/blur, "
    "--mask 0.5 1.1/mask, --clean 1.5/clean, --noise 1 2 3/shape, --lr 1e9/not finite, "
    "--device cuda:99/cuda:99, --device abacus/abacus, --data-size 1000000/memory").split(", ")

@pytest.mark.parametrize("case", BAD)
def test_bad_options_end_in_one_line(case, world, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("hello")
    more, message = case.split("/")
    places = {"tmp": tmp_path, "text": text, "odd": world / "odd"}
    words = command(world, tmp_path / "run", f"--noise 0.1 {more.format(**places)}")
    assert message.format(**places) in error_of(capsys, distill, words)
    assert text.read_text() == "hello" and not (tmp_path / "run" / "last.pt").exists()

@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["16 bits", "half a file"])
def test_an_unreadable_image_is_named(kind, workers, tmp_path, capsys, world):
    shutil.copytree(world / "images", tmp_path / "images")
    bad = tmp_path / "images/train/class0/bad.tif"
    Image.fromarray(np.full((9, 9), 3, np.uint16)).save(bad)
    if kind == "half a file":
        bad.write_bytes(bad.with_name("0.png").read_bytes()[:300])
    more = f"--noise 0.1 --data {tmp_path}/images --workers {workers}"
    assert "bad.tif" in error_of(capsys, distill, command(world, tmp_path / "run", more))

@pytest.mark.parametrize("data, module", [("cifar100", "cifar"), ("stl10", "stl10")])
def test_a_missing_network_is_an_error(data, module, tmp_path, monkeypatch, capsys):
    offline = mock.Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(getattr(datasets, module), "download_and_extract_archive", offline)
    words = f"--data {data} --root {tmp_path}/here --device cpu --out {tmp_path}/run"
    assert "no network" in error_of(capsys, distill, words)
