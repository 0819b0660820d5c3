# SPDX-License-Identifier: MIT
"""Tests: python -m pytest -q test_distill.py"""
import ast
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision import datasets
from torchvision.models.vision_transformer import VisionTransformer
from torchvision.transforms.functional import gaussian_blur

import distill
import eval as evaluation

HERE = Path(__file__).parent
torch.set_num_threads(2)

# ---- Helpers -------------------------------------------------------------------------------------
def small_vit(**changes):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
    torch.manual_seed(0)
    return distill.ViT(**{**sizes, **changes})

def randomize(vit):
    """Weights large enough that attention is not uniform and every layer counts."""
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.1)

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
    """The exit status of a command line run in this process."""
    with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *shlex.split(words)]):
        try:
            module.main()
        except SystemExit as exit:
            return exit.code
    return 0

def error_of(capsys, module, words):
    """The one line, after the usage, with which a command line fails."""
    capsys.readouterr()
    assert call(module, words) == 2
    usage, line = capsys.readouterr().err.strip().splitlines()
    assert usage.startswith("usage: ") and "error: " in line
    return line

def start(words, launcher=""):
    """distill.py in a process of its own, with one thread."""
    line = [sys.executable, *shlex.split(launcher), str(HERE / "distill.py"), *shlex.split(words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})

def finish(process):
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output

def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

def weights_of(path):
    """All values of a state dict, as one vector."""
    return torch.cat([v.flatten() for v in torch.load(path, weights_only=True).values()])

def same_students(a, b):
    return torch.equal(weights_of(a / "student.pth"), weights_of(b / "student.pth"))

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder of 16-pixel images of two classes, two with a class too many, a ViT's weights."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for split, n in (("train", 24), ("val", 8)):
        for label in range(2):
            folder = root / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            stripes = np.arange(16) % (2 + 2 * label) * 60
            for i in range(n):
                pixels = rng.integers(0, 100, (16, 16, 3)) + stripes[None, :, None]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    for split in ("train", "val"):
        odd = shutil.copytree(root / "images", root / f"odd-{split}")
        shutil.copytree(odd / split / "class0", odd / split / "lonely")
    torch.save(small_vit().state_dict(), root / "vit.pth")
    return root

@pytest.fixture(scope="session")
def finished(world):
    """The folder of a finished run, not to be written to."""
    out = world / "finished"
    assert call(distill, command(world, out, "--noise 0.1 0.3 --mask 0.2 --clean 0.1")) == 0
    return out

# ---- The ViT and its weights ---------------------------------------------------------------------
def test_vit_agrees_with_torchvision():
    torch.manual_seed(1)
    theirs = VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=2,
                               hidden_dim=128, mlp_dim=256).eval()
    randomize(theirs)
    ours = distill.ViT(32, 8, 128, 3, 2, mlp_ratio=2)
    values = list(theirs.state_dict().values())[:-2]  # of the same parameters, less the head
    values.insert(1, values.pop(3))  # the position embedding stands after the global token in ours
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
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
            assert len(found.attn) == attn_blocks
            assert all(close(a, b) for a, b in zip(found.attn, maps[3 - attn_blocks:], strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            for attn_blocks in (0, 2):
                found = ours(images, attn_blocks)
                assert close(found.cls.float(), tokens[:, 0], 0.05)
                assert all(attn.dtype == torch.float32 for attn in found.attn)

@pytest.mark.parametrize("registers", [0, 4])
def test_vit_agrees_with_timm(registers):
    timm = pytest.importorskip("timm")
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    theirs = timm.create_model(name, img_size=28, depth=2, num_classes=0).eval()
    randomize(theirs)
    ours = distill.ViT(28, 14, 384, 2, 6, num_registers=registers, layer_scale=True)
    state = theirs.state_dict()
    if registers:  # the README's rename, the other way round
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], dim=1)
    ours.load_state_dict(state)  # strict: the names are the same
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        tokens = theirs.forward_features(images)
        found = ours(images, attn_blocks=1)
    assert close(found.cls, tokens[:, 0]) and close(found.patches, tokens[:, 1 + registers:])
    assert found.attn[0].shape == (2, 6, 5 + registers, 5 + registers)

@pytest.mark.parametrize("changes", [
    {}, {"num_registers": 3, "layer_scale": True, "mlp_ratio": 2.0},
    {"depth": 3, "embed_dim": 128, "num_heads": 2, "patch_size": 4}])
def test_architecture_is_read_off_the_state_dict(tmp_path, changes):
    vit = small_vit(**changes)
    state = {key: value.half() for key, value in vit.state_dict().items()}
    for dropped in ("mask_token", "head.weight", "head_dist.bias"):
        state[dropped] = torch.zeros(1, 64)
    torch.save({"model": state, "epoch": 3}, tmp_path / "w.pth")
    found = distill.load_vit(str(tmp_path / "w.pth"), 16)
    images = torch.randn(2, 3, 16, 16)
    assert found.blocks[0].attn.num_heads == vit.blocks[0].attn.num_heads
    assert close(found(images).patches, vit(images).patches, 1e-2)

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
    else:  # cubic convolution (Keys, 1981) where DINO's scale, a little larger, puts the samples
        matrix = torch.zeros(side, 8)
        for i in range(side):
            centre = (i + 0.5) * 8 / (side + 0.1) - 0.5
            for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
                x = abs(j - centre)
                near = 1.25 * x ** 3 - 2.25 * x ** 2 + 1
                far = -0.75 * (x ** 3 - 5 * x ** 2 + 8 * x - 4)
                matrix[i, min(max(j, 0), 7)] += near if x < 1 else far  # edges repeated
        expected = torch.einsum("yj,xi,jid->yxd", matrix, matrix, grid)
    assert close(found[0, 1:].view(side, side, 2), expected)

def test_names_are_fetched_by_torch_hub(monkeypatch):
    fetch = mock.Mock(return_value=small_vit().state_dict())
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    for name in distill.WEIGHTS:
        distill.load_vit(name, 16)
    assert [request.args[0] for request in fetch.mock_calls] == [*distill.WEIGHTS.values()]
    assert all(request.kwargs["weights_only"] for request in fetch.mock_calls)
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
    sigmas = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0])
    found = distill.blur(images, sigmas.view(5, 1, 1, 1), 2.0, None)
    assert torch.equal(found[0], images[0])
    for i in range(1, 5):
        assert close(found[i], gaussian_blur(images[i], 13, sigmas[i].item()), 1e-5)

def test_each_kind_has_the_asked_strength_range_and_order():
    grey = torch.full((40, 3, 32, 32), 0.5)
    images = torch.rand(2, 3, 8, 8)
    g = seeded(0)
    noisy = distill.distort(grey, g, noise=0.1)
    assert abs(noisy.std() - 0.1) < 1e-3 and abs(noisy.mean() - 0.5) < 1e-3
    masked = distill.distort(grey, g, mask=0.3)
    salted = distill.distort(grey, g, salt=0.3)
    for found, value, share in ((masked, 0, 0.3), (salted, 0, 0.15), (salted, 1, 0.15)):
        assert abs((found == value).float().mean() - share) < 0.01
        assert torch.equal(found[:, 0], found[:, 1])  # the channels go together
    assert close(distill.distort(images, contrast=0.7), 0.5 + 0.3 * (images - 0.5))
    assert (distill.distort(images, contrast=1) == 0.5).all()
    assert (distill.distort(images, mask=1) == 0).all()
    both = distill.distort(grey, g, mask=0.3, noise=0.4)  # masked last: no noise on top
    assert abs((both == 0).all(dim=1).float().mean() - 0.3) < 0.01
    assert both.min() == 0 and both.max() == 1
    assert list(distill.DISTORTIONS) == ["blur", "contrast", "noise", "salt", "mask"]
    shares = (distill.distort(grey, g, mask=(0.1, 0.9)) == 0).float().mean((1, 2, 3))
    assert 0.05 < shares.min() < 0.3 and 0.7 < shares.max() < 0.95

def test_with_one_of_each_image_shows_one_kind_or_is_left_bit_for_bit():
    images = torch.full((400, 3, 16, 16), 0.25)
    found = distill.distort(images, seeded(0), True, 0.25, contrast=0.5, salt=0.5, mask=0.5)
    clean = (found == images).all(dim=(1, 2, 3))
    contrast = (found == 0.375).all(dim=(1, 2, 3))
    salt = (found == 1).any(dim=(1, 2, 3))
    mask = (found == 0).any(dim=(1, 2, 3)) & ~salt
    for share in (clean, contrast, salt, mask):
        assert 70 < share.sum() < 130
    assert (torch.stack([clean, contrast, salt, mask]).sum(dim=0) == 1).all()
    for share, least, most in ((0.0, 0, 0), (0.3, 90, 150), (1.0, 400, 400)):
        found = distill.distort(images, seeded(0), clean=share, noise=0.2, blur=1.0)
        assert least <= (found == images).all(dim=(1, 2, 3)).sum() <= most

def test_random_numbers_come_from_the_generator_alone_whatever_the_dtype_and_the_words_order():
    images = torch.rand(2, 3, 8, 8)
    state = torch.get_rng_state()
    kinds = {"noise": (0.1, 0.4), "blur": 0.5, "mask": (0, 0.5), "salt": 0.1, "contrast": (0, 1)}
    found = distill.distort(images, seeded(1), True, 0.1, **kinds)
    backwards = dict(reversed(kinds.items()))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distill.distort(images, seeded(1), True, 0.1, **backwards), found)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(distill.distort(images), images)

def test_a_new_kind_is_one_function_and_one_line(monkeypatch, world, tmp_path):
    def invert(images, severity, highest, generator):
        """share of inversion"""
        return images + severity * (1 - 2 * images)
    monkeypatch.setitem(distill.DISTORTIONS, "invert", (invert, 1))
    monkeypatch.chdir(tmp_path)
    more = "--invert 0.2 1 --noise 0.1 --one-of --method contrastive"
    assert call(distill, command(world, "''", more)) == 0  # an empty --out: the default
    assert call(evaluation, "runs/images-noise0.1-or-invert0.2-1-contrastive") == 0

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

def test_loss_is_finite_for_one_hot_maps():
    logits = (torch.randn(3, 2, 5, 5) * 300).requires_grad_()
    s = random_features(0)._replace(attn=(logits.softmax(-1),))
    t = random_features(1)._replace(attn=(torch.eye(5).expand(3, 2, 5, 5),))
    loss = distill.distill_loss(s, t)[0]
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
    ("eval.py", "fit_probe", "fit_probe(torch.rand(50, 3), torch.arange(50) % 3)(torch.rand(4, 3))")])
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
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8))
    for split in ("train", "test"):
        (tmp_path / split / "a b[1]").mkdir(parents=True)
        for i, mode in enumerate(("RGB", "L", "P", "RGBA", "CMYK", "LA")):
            file = tmp_path / split / "a b[1]" / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}"
            rgb.resize((30, 50)).convert(mode).save(file)
    (images, labels), _, classes = load(data=str(tmp_path), data_size=16, workers=2)
    assert images.dtype == torch.uint8 and labels.tolist() == [0] * 6 and classes == ["a b[1]"]
    expected = np.asarray(rgb.resize((30, 50)).crop((0, 10, 30, 40)).resize((16, 16)), float)
    distances = np.abs(images.permute(0, 2, 3, 1).numpy() - expected).mean((1, 2, 3))
    assert distances.shape == (6,) and distances.min() < 6  # of the one in RGB
    part = load(data=str(tmp_path), data_size=16, max_images=3)[0][0]
    assert torch.equal(part, images[:3])

def test_torchvisions_data_sets_are_read_from_their_own_files(tmp_path, monkeypatch):
    pixels = np.arange(9, dtype=np.uint8).repeat(3072)
    for folder in ("cifar-10-batches-py", "stl10_binary"):
        (tmp_path / folder).mkdir()
    for split in ("train", "test", "meta"):
        content = {"data": pixels.reshape(9, 3072), "labels": [*range(9)], "label_names": "abcdefghi"}
        (tmp_path / f"cifar-10-batches-py/{split}").write_bytes(pickle.dumps(content))
        (tmp_path / f"stl10_binary/{split}_X.bin").write_bytes(pixels.repeat(9).tobytes())
        (tmp_path / f"stl10_binary/{split}_y.bin").write_bytes(bytes(range(1, 10)))
    (tmp_path / "stl10_binary/class_names.txt").write_text("\n".join("abcdefghi"))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["train", None]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test", None]])
    monkeypatch.setitem(datasets.CIFAR10.meta, "filename", "meta")
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", None)
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    for data, size in (("cifar10", 16), ("stl10", 96)):
        *splits, classes = load(data=data, data_size=size, root=str(tmp_path))
        assert "".join(classes) == "abcdefghi"
        for images, labels in splits:
            assert images.shape == (9, 3, size, size) and labels.dtype == torch.int64
            assert torch.equal(images[:, 0, 0, 0], labels) and labels.tolist() != [*range(9)]

# ---- Runs ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["distill", "contrastive", "supervised"])
def test_a_run_learns_and_leaves_its_folder(world, tmp_path, method):
    out = tmp_path / "run"
    more = f"--noise 0.3 0.6 --lr 2e-3 --epochs 40 --method {method}"
    assert call(distill, command(world, out, more)) == 0
    rows = log_of(out)
    terms = ["global", "patch", "attn"]
    assert list(rows[0]) == ["epoch", "loss", *(terms if method == "distill" else []),
                             "images_per_s", *(f"{term}_teacher" for term in terms),
                             *(f"{term}_student" for term in terms)]
    assert len(rows) == 40 and rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert method != "distill" or all(
        rows[-1][f"{term}_student"] < rows[-1][f"{term}_teacher"] for term in terms)
    assert json.loads((out / "config.json").read_text())["noise"] == [0.3, 0.6]
    assert torch.equal(weights_of(out / "teacher.pth"), weights_of(world / "vit.pth"))
    student = torch.load(out / "student.pth", weights_only=True)
    assert student.keys() == small_vit().state_dict().keys()

def test_evaluation_leaves_the_table_and_the_picture(world, finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    Image.new("RGB", (50, 30), (200, 10, 10)).save(tmp_path / "own.png")
    assert call(evaluation, f"{out} --pictures {tmp_path}/own.png --data none") == 0
    picture = np.asarray(Image.open(out / "attention.png"))
    assert picture.shape == (200, 920, 3) and (picture[100, 90] == [200, 10, 10]).all()
    assert "lonely" in error_of(capsys, evaluation, f"{out} --test {world}/odd-val/val")
    assert not (out / "results.json").exists()

    fog = tmp_path / "fog" / "3"
    shutil.copytree(world / "images/val/class1", fog / "class1")
    assert call(evaluation, f"{out} --labels 30 --test {fog} {world}/images/val") == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    names = [row["distortion"] for row in rows]
    assert names[:2] == ["clean", "noise0.1-0.3+mask0.2"] and len(names) == 13
    assert [row["trained"] for row in rows] == [False, True] + [False] * 11
    assert all(len(row) == 13 for row in rows[:-2]) and rows[1]["attn_teacher"] > 0
    assert rows[0]["recovered"] is None and abs(rows[0]["patch_teacher"]) < 1e-6
    for row in rows[1:-2]:
        lost = rows[0]["probe_teacher"] - row["probe_teacher"]
        won = row["probe_student"] - row["probe_teacher"]
        assert row["recovered"] == (pytest.approx(won / lost) if lost > 0.009 else None)
    assert names[-2:] == [str(fog), f"{world}/images/val"] and len(rows[-1]) == 4
    assert rows[-1]["clean_probe_teacher"] == rows[0]["clean_probe_teacher"]
    assert names[1] in capsys.readouterr().out

def test_the_default_run_trains_its_teacher_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(distill, "--max-images 64 --pretrain-epochs 1 --epochs 1 --device cpu") == 0
    config = json.loads(Path("runs/stripes-mixture/config.json").read_text())
    assert (config["one_of"], config["clean"], config["blur"]) == (True, 0.2, [0, 1.5])
    assert call(evaluation, "runs/stripes-mixture --max-images 60") == 0

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
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(torch.load(last, weights_only=True)["log"]) < 30  # else nothing was interrupted
    finish(start(words))
    assert same_students(whole, broken)
    logs = [[{**row, "images_per_s": 0} for row in log_of(out)] for out in (whole, broken)]
    assert logs[0] == logs[1] and len(logs[0]) == 30
    before = last.read_bytes()
    assert call(distill, words) == 0 and f"{broken} is finished" in capsys.readouterr().out
    assert "seed 0, not 1" in error_of(capsys, distill, f"{words} --seed 1")
    assert last.read_bytes() == before

def test_two_processes_end_where_one_does(world, tmp_path):
    more = "--blur 1.0 --contrast 0.5 --lr 1e-3"
    finish(start(command(world, tmp_path / "one", more)))
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    finish(start(command(world, tmp_path / "two", more), launcher))
    begin = weights_of(world / "vit.pth")
    one, two = [weights_of(tmp_path / name / "student.pth") for name in ("one", "two")]
    assert (one - two).norm() < 0.05 * (one - begin).norm()
    losses = [log_of(tmp_path / name)[-1]["loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)

def test_a_compiled_run_is_one_graph_and_ends_like_an_eager_one(world, tmp_path, monkeypatch):
    torch_compile = torch.compile
    backend = mock.Mock(side_effect=lambda graph, inputs: graph.forward)
    monkeypatch.setattr(torch, "compile", lambda function, **more: torch_compile(
        function, backend=backend, fullgraph=True, **more))
    for name in ("no-compile", "compile"):
        more = f"--noise 0.2 --epochs 4 --batch-size 10 --{name}"
        assert call(distill, command(world, tmp_path / name, more)) == 0
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
    "--data {world}{sep}odd-train/lonely, --data {world}{sep}odd-val/lonely, --out {text}/{text}, "
    "--noise -1/noise, --blur 8/blur, --mask 0.5 1.1/mask, --clean 1.5/clean, --noise 1 2 3/shape, "
    "--device cuda:99/cuda:99, --device abacus/abacus, --data-size 1000000/memory, "
    "--lr 1e9/not finite").split(", ")

@pytest.mark.parametrize("case", BAD)
def test_bad_options_end_in_one_line(case, world, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("hello")
    more, message = case.split("/")
    places = {"tmp": tmp_path, "text": text, "world": world, "sep": "/"}
    words = command(world, tmp_path / "run", f"--noise 0.1 {more.format(**places)}")
    assert message.format(**places) in error_of(capsys, distill, words)
    assert text.read_text() == "hello" and not (tmp_path / "run" / "last.pt").exists()

@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["text", "16 bits", "half a file"])
def test_an_unreadable_image_is_named(kind, workers, tmp_path, capsys, world):
    shutil.copytree(world / "images", tmp_path / "images")
    bad = tmp_path / "images/train/class0/bad.tif"
    bad.write_bytes(bad.with_name("0.png").read_bytes()[:300])
    if kind == "text":
        bad.write_text("no image")
    elif kind == "16 bits":
        Image.fromarray(np.full((9, 9), 3, np.uint16)).save(bad)
    more = f"--noise 0.1 --data {tmp_path}/images --workers {workers}"
    assert "bad.tif" in error_of(capsys, distill, command(world, tmp_path / "run", more))

def test_bad_input_to_the_evaluation_and_no_network(finished, tmp_path, monkeypatch, capsys):
    for words in ("--labels 0", "--max-images 0", "--device cuda:9", "--test nowhere"):
        assert words.split()[1] in error_of(capsys, evaluation, f"{finished} {words}")
    assert f"{tmp_path} is no run" in error_of(capsys, evaluation, str(tmp_path))
    offline = mock.Mock(side_effect=OSError("no network"))
    for module in (datasets.cifar, datasets.stl10):
        monkeypatch.setattr(module, "download_and_extract_archive", offline)
    for data in ("cifar10", "stl10"):
        words = f"--data {data} --root {tmp_path}/here --device cpu --out {tmp_path}/run"
        message = error_of(capsys, distill, words)
        assert "no network" in message and "offline, put" in message and "here" in message
