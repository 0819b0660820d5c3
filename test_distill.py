# SPDX-License-Identifier: MIT
"""Tests: python -m pytest -q test_distill.py"""
import argparse
import ast
import json
import os
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

def random_features(seed, maps=2, B=3, N=4, D=8, heads=2):
    g = seeded(seed)
    attn = tuple(torch.rand(B, heads, N + 1, N + 1, generator=g).softmax(-1) for _ in range(maps))
    return distill.Features(torch.randn(B, D, generator=g), torch.randn(B, N, D, generator=g), attn)

def command(world, out, more=""):
    """distill.py's options for a run of a second; what is typed last counts."""
    return (f"--data {world}/images --weights {world}/vit.pth --root {world}/cache --data-size 16 "
            f"--img-size 16 --batch-size 8 --workers 0 --device cpu --epochs 2 --out {out} {more}")

def call(module, words):
    """The exit status of a command line run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *shlex.split(words)])
        try:
            distill.run(module.main)
        except SystemExit as exit:
            return exit.code
    return 0

def error_of(capsys, module, words):
    """The one line with which a command line fails."""
    capsys.readouterr()
    assert call(module, words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert "error: " in lines[-1] and "Traceback" not in "".join(lines), lines
    return lines[-1]

def start(words, launcher="", **env):
    """distill.py in a process of its own, with one thread."""
    line = [sys.executable, *shlex.split(launcher), str(HERE / "distill.py"), *shlex.split(words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=env)

def finish(process, status=0):
    """What a process has printed, once it has ended as expected."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == status, output
    return output

def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

def json_of(path):
    return json.loads(path.read_text())

def weights_of(path):
    """All values of a state dict, as one vector."""
    state = torch.load(path, weights_only=True)
    return torch.cat([value.flatten() for value in state.values()])

def same_students(a, b):
    return torch.equal(weights_of(a / "student.pth"), weights_of(b / "student.pth"))

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder of 16-pixel images of two classes, and a ViT's weights."""
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
    for split in ("train", "val"):  # a class that is in one split alone
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

# ---- The ViT -------------------------------------------------------------------------------------

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
        plain = ours(images)
        mapped = ours(images, attn_blocks=2)
    for features in (plain, mapped):
        assert close(features.cls, tokens[:, 0]) and close(features.patches, tokens[:, 1:])
    assert plain.attn == () and len(mapped.attn) == 2
    assert all(close(a, b) for a, b in zip(mapped.attn, maps[1:], strict=True))

@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_vit_agrees_with_timm(name):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, img_size=28, depth=2, num_classes=0).eval()
    randomize(theirs)
    registers = 4 if "reg4" in name else 0
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

def test_maps_are_float32_distributions_also_under_autocast():
    vit = small_vit(num_heads=2, num_registers=2)
    randomize(vit)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        exact = vit(images, attn_blocks=2)
        with torch.autocast("cpu", torch.bfloat16):
            rough = vit(images, attn_blocks=2)
            mapless = vit(images)
    for attn in exact.attn + rough.attn:
        assert attn.shape == (2, 2, 7, 7) and attn.dtype == torch.float32
        assert (attn.sum(-1) - 1).abs().max() < 1e-5
    assert close(rough.cls.float(), exact.cls, 0.05) and close(mapless.cls.float(), exact.cls, 0.05)

def test_only_blocks_without_a_map_use_the_fused_kernel_with_equal_gradients(monkeypatch):
    vit = small_vit(depth=1)
    images = torch.randn(4, 3, 16, 16)
    fused = mock.Mock(side_effect=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    gradients = []
    for attn_blocks in (0, 1):
        vit.zero_grad()
        vit(images, attn_blocks).patches.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in vit.parameters()]))
    assert close(*gradients) and fused.call_count == 1

# ---- Weights -------------------------------------------------------------------------------------

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
    assert all(parameter.dtype == torch.float32 for parameter in found.parameters())

def test_position_embeddings_are_resized_bicubically(tmp_path):
    vit = small_vit(img_size=64)
    torch.save(vit.state_dict(), tmp_path / "w.pth")
    found = distill.load_vit(str(tmp_path / "w.pth"), 40).pos_embed
    grid = vit.pos_embed[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=5, mode="bicubic", align_corners=False)
    expected = torch.cat([vit.pos_embed[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    assert close(found, expected)
    assert torch.equal(distill.load_vit(str(tmp_path / "w.pth"), 64).pos_embed, vit.pos_embed)

def test_names_are_fetched_by_torch_hub_and_copied(monkeypatch):
    state = small_vit().state_dict()
    fetch = mock.Mock(return_value=state)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    for name in distill.WEIGHTS:
        vit = distill.load_vit(name, 16)
    urls = {request.args[0] for request in fetch.mock_calls}
    assert urls == set(distill.WEIGHTS.values()) and len(urls) == 11
    assert all(request.kwargs["weights_only"] for request in fetch.mock_calls)
    with torch.no_grad():
        vit.cls_token.add_(1)
    assert not torch.equal(vit.cls_token, state["cls_token"])

def test_a_truncated_download_and_what_to_do_offline_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cached = tmp_path / "checkpoints" / "dinov2_vits14_pretrain.pth"
    cached.parent.mkdir()
    torch.save(small_vit().state_dict(), cached)
    cached.write_bytes(cached.read_bytes()[:5000])
    with pytest.raises(distill.UserError, match=f"delete {cached}"):
        distill.load_vit("dinov2_vits14", 16)
    offline = mock.Mock(side_effect=OSError("no network"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(distill.UserError, match=f"{cached}.*--weights scratch.*no network"):
        distill.load_vit("dinov2_vits14", 16)

class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)

FOREIGN = {  # what differs from a ViT's state dict, None for a missing key: a word of the message
    "blocks.1.norm2.bias": (None, "blocks.1.norm2.bias"),
    "extra": (torch.zeros(1), "extra"),
    "blocks.0.mlp.fc2.weight": (torch.zeros(3, 3), "fc2"),
    "patch_embed.proj.weight": (None, "patch_embed.proj.weight"),
    "patch_embed.proj.weight of width 96": (torch.zeros(96, 3, 8, 8), "96"),
    "pos_embed of no square": (torch.zeros(1, 4, 64), "w.pth"),
    "pos_embed that is text": ("none", "w.pth"),
    "cls_token that runs code": (Attack(), "w.pth"),
}

@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_weights_are_refused_by_name_and_run_no_code(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    value, message = FOREIGN[case]
    state = dict(small_vit().state_dict())
    state[case.split()[0]] = value
    torch.save({key: value for key, value in state.items() if value is not None}, "w.pth")
    with pytest.raises(distill.UserError, match=message):
        distill.load_vit("w.pth", 16)
    assert os.listdir() == ["w.pth"]

def test_prepare_looks_at_both_sides_and_normalizes():
    images = torch.rand(2, 3, 16, 8)
    found = distill.prepare(images, 8)
    small = F.interpolate(images, size=(8, 8), mode="bicubic", antialias=True)
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        assert close(found[:, channel], (small[:, channel] - mean) / std)

# ---- Distortions ---------------------------------------------------------------------------------

def test_blur_is_torchvisions_also_with_a_sigma_an_image():
    images = torch.rand(5, 3, 20, 24)
    for sigma, taps in ((0.3, 3), (1.0, 5), (2.7, 13)):
        assert close(distill.distort(images, blur=sigma), gaussian_blur(images, taps, sigma), 1e-5)
    sigmas = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0])
    found = distill.blur(images, sigmas.view(5, 1, 1, 1), 2.0, None)
    assert torch.equal(found[0], images[0])
    for i in range(1, 5):
        assert close(found[i], gaussian_blur(images[i], 9, sigmas[i].item()), 1e-5)

def test_each_kind_has_the_asked_strength_range_and_order():
    grey = torch.full((40, 3, 32, 32), 0.5)
    images = torch.rand(2, 3, 8, 8)
    g = seeded(0)
    noisy = distill.distort(grey, g, noise=0.1)
    assert abs(noisy.std() - 0.1) < 1e-3 and abs(noisy.mean() - 0.5) < 1e-3
    masked = distill.distort(grey, g, mask=0.3)
    assert abs((masked == 0).float().mean() - 0.3) < 0.01
    salted = distill.distort(grey, g, salt=0.3)
    for value, share in ((0.0, 0.15), (1.0, 0.15), (0.5, 0.7)):
        assert abs((salted == value).float().mean() - share) < 0.01
    for found in (masked, salted):  # the channels go together
        assert torch.equal(found[:, 0], found[:, 1]) and torch.equal(found[:, 0], found[:, 2])
    assert close(distill.distort(images, contrast=0.7), 0.5 + 0.3 * (images - 0.5))
    assert (distill.distort(images, contrast=1.0) == 0.5).all()
    assert (distill.distort(images, mask=1.0) == 0).all()
    assert set(distill.distort(images, salt=1.0).unique().tolist()) == {0, 1}
    both = distill.distort(grey, g, mask=0.3, noise=0.4)  # masked last: no noise on top
    assert abs((both == 0).all(dim=1).float().mean() - 0.3) < 0.01
    assert both.min() == 0 and both.max() == 1
    assert list(distill.DISTORTIONS) == ["blur", "contrast", "noise", "salt", "mask"]
    shares = (distill.distort(grey, g, mask=(0.1, 0.9)) == 0).float().mean((1, 2, 3))
    assert 0.05 < shares.min() < 0.3 and 0.7 < shares.max() < 0.95

def test_with_one_of_each_image_shows_one_kind_or_is_left_bit_for_bit():
    images = torch.full((400, 3, 16, 16), 0.25)
    found = distill.distort(images, seeded(0), one_of=True, clean=0.25, contrast=0.5, salt=0.5,
                            mask=0.5)
    clean = (found == images).all(dim=(1, 2, 3))
    contrast = (found == 0.375).all(dim=(1, 2, 3))
    salt = (found == 1).any(dim=(1, 2, 3))
    mask = (found == 0).any(dim=(1, 2, 3)) & ~salt
    for share in (clean, contrast, salt, mask):
        assert 70 < share.sum() < 130
    assert (torch.stack([clean, contrast, salt, mask]).sum(dim=0) == 1).all()

    images = torch.rand(400, 3, 8, 8)
    for share, least, most in ((0.0, 0, 0), (0.3, 90, 150), (1.0, 400, 400)):
        found = distill.distort(images, seeded(0), clean=share, noise=0.2, blur=1.0)
        assert least <= (found == images).all(dim=(1, 2, 3)).sum() <= most

def test_random_numbers_come_from_the_generator_alone_whatever_the_dtype_and_the_words_order():
    images = torch.rand(2, 3, 8, 8)
    state = torch.get_rng_state()
    kinds = {"noise": (0.1, 0.4), "blur": 0.5, "mask": (0, 0.5), "salt": 0.1, "contrast": (0, 1)}
    found = distill.distort(images, seeded(1), True, 0.1, **kinds)
    backwards = dict(reversed(kinds.items()))
    assert torch.equal(distill.distort(images, seeded(1), True, 0.1, **backwards), found)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distill.distort(images, seeded(1), True, 0.1, **kinds), found)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(distill.distort(images), images) and distill.distort(images) is not images
    assert distill.distort(images[:0], blur=1.0, noise=0.1).shape == (0, 3, 8, 8)

def test_a_new_kind_is_one_function_and_one_line(monkeypatch, world, tmp_path):
    def invert(images, severity, highest, generator):
        """share of inversion"""
        return images + severity * (1 - 2 * images)
    monkeypatch.setitem(distill.DISTORTIONS, "invert", invert)
    images = torch.rand(2, 3, 8, 8)
    assert close(distill.distort(images, invert=1.0), 1 - images)
    monkeypatch.chdir(tmp_path)
    more = "--invert 0.2 1 --noise 0.1 --one-of --clean 0.2 --method contrastive"
    assert call(distill, command(world, "''", more)) == 0  # an empty --out: the default
    out = Path("runs/images-noise0.1-or-invert0.2-1-clean0.2-contrastive")
    assert json_of(out / "config.json")["invert"] == [0.2, 1]
    assert call(evaluation, f"{out} --seeds 1") == 0
    rows = json_of(out / "results.json")["rows"]
    assert rows[1]["distortion"] == "noise=0.1 or invert=0.2-1"
    monkeypatch.setitem(distill.DISTORTIONS, "later", invert)  # older runs go on without it
    assert call(distill, f"--resume {out}") == 0

# ---- The losses ----------------------------------------------------------------------------------

def test_loss_is_the_formula_written_another_way():
    s = random_features(0)
    t = random_features(1)
    cls = (s.cls * t.cls).sum(-1) / s.cls.norm(dim=-1) / t.cls.norm(dim=-1)
    patch = (s.patches * t.patches).sum(-1) / s.patches.norm(dim=-1) / t.patches.norm(dim=-1)
    kl = [(b * (b.log() - a.log())).sum(-1) for a, b in zip(s.attn, t.attn, strict=True)]
    expected = {"global": 1 - cls.mean(), "patch": 1 - patch.mean(), "attn": sum(kl).mean() / 2}
    total, terms = distill.distill_loss(s, t, (1.0, 2.0, 3.0))
    for name, value in expected.items():
        assert torch.allclose(terms[name], value, atol=1e-6)
    weighted = expected["global"] + 2 * expected["patch"] + 3 * expected["attn"]
    assert torch.allclose(total, weighted, atol=1e-5)
    assert all(abs(value) < 1e-6 for value in distill.distill_loss(s, s)[1].values())
    with torch.autocast("cpu", torch.bfloat16):
        assert distill.distill_loss(s, t, (1.0, 2.0, 3.0))[0] == total
    total, terms = distill.distill_loss(s._replace(attn=()), t._replace(attn=()))
    assert terms["attn"] == 0 and torch.allclose(total, terms["global"] + terms["patch"])

def test_loss_is_finite_for_one_hot_maps():
    logits = (torch.randn(3, 2, 5, 5) * 300).requires_grad_()
    s = random_features(0)._replace(attn=(logits.softmax(-1),))
    t = random_features(1)._replace(attn=(torch.eye(5).expand(3, 2, 5, 5),))
    loss = distill.distill_loss(s, t)[0]
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()

def test_info_nce_is_float32_also_under_autocast():
    a = torch.randn(8, 32)
    b = torch.randn(8, 32)
    cosines = F.cosine_similarity(a[:, None], b[None], dim=-1)
    expected = -(cosines / 0.1).log_softmax(dim=1).diagonal().mean()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(distill.info_nce(a, b), expected, atol=1e-5)

# ---- The pieces: what they refuse, alone, in others' files ---------------------------------------

REFUSED = {  # a function: arguments
    "ViT": ["0, 8, 64, 1, 1", "15, 8, 64, 1, 1", "16, 8, 64, 1, 3", "16, 0, 64, 1, 1"],
    "vit": ["zeros(1, 3, 8, 8)", "zeros(1, 1, 16, 16)", "zeros(3, 16, 16)",
            "zeros(1, 3, 16, 16), 3", "zeros(1, 3, 16, 16), -1"],
    "load_vit": ["'vit_giant', 16"],
    "distort": [
        "images, noise=-0.1", "images, noise=nan", "images, noise=inf", "images, noise=(0.5, 0.1)",
        "images, noise=(1, 2, 3)", "images, mask=1.1", "images, mask=(0.5, 1.5)",
        "images, salt=1.1", "images, contrast=1.1", "images, blur=-1", "images, blur=4.0",
        "images, fog=1", "images, noise=0.1, clean=1.5", "images[0], noise=0.1",
        "images[:, :1], noise=0.1", "images.byte(), noise=0.1"],
    "distill_loss": [
        "features, features, (1, 1)", "features, features, (1, -1, 1)",
        "features, features, (0, 0, 0)", "features, features, (1, 1, nan)",
        "features, features, (1, 1, inf)", "features, random_features(1, maps=1)",
        "features, random_features(1, D=9)", "features, random_features(1, N=5)"],
    "fit_probe": ["x[0], y", "x, y[:-1]", "x[:0], y[:0]", "x * nan, y"],
    "linear_probe": ["x, y, x, y[:1]", "x, y, x, y[:, None]", "x, y, x[:0], y[:0]"],
}

@pytest.mark.parametrize("name, arguments", [(name, a) for name in REFUSED for a in REFUSED[name]])
def test_bad_arguments_are_value_errors(name, arguments):
    names = {**vars(distill), **vars(evaluation), "vit": small_vit(),
             "images": torch.rand(1, 3, 8, 8), "zeros": torch.zeros, "nan": np.nan, "inf": np.inf,
             "features": random_features(0), "random_features": random_features,
             "x": torch.rand(9, 3), "y": torch.arange(9) % 2}
    with pytest.raises(ValueError):
        eval(f"{name}({arguments})", names)

@pytest.mark.parametrize("file, names, use", [
    ("distill.py", "Features PatchEmbed Attention Mlp LayerScale Block ViT",
     "ViT(16, 8, 64, 2, 1, layer_scale=True)(torch.rand(2, 3, 16, 16), 1).attn[0]"),
    ("distill.py", " ".join(distill.DISTORTIONS) + " DISTORTIONS distort",
     "distort(torch.rand(2, 3, 16, 16), noise=(0, 0.1), blur=1.0, mask=0.3, salt=0.1, contrast=1)"),
    ("distill.py", "Features distill_loss",
     "distill_loss(*[Features(torch.rand(2, 4), torch.rand(2, 3, 4))] * 2)"),
    ("eval.py", "fit_probe",
     "fit_probe(torch.rand(50, 3), torch.arange(50) % 3)(torch.rand(4, 3))")])
def test_each_piece_runs_when_cut_out(file, names, use):
    text = (HERE / file).read_text()
    pieces = []
    for node in ast.parse(text).body:
        piece = ast.get_source_segment(text, node)
        words = piece.replace("(", " ").replace(":", " ").split()
        if words[0] in names.split() or words[1] in names.split():  # NAME = or def NAME
            pieces.append(piece)
    assert len(pieces) == len(names.split())
    imports = ["import math", "from typing import NamedTuple", "import torch",
               "import torch.nn as nn", "import torch.nn.functional as F"]
    exec("\n".join([*imports, *pieces, use]), {})

def test_imports_do_nothing_and_need_no_torchvision(tmp_path):
    program = ("import sys; sys.modules['torchvision'] = sys.modules['PIL'] = None; "
               "import distill, eval; print(distill.draw_stripes(20, 32, 0)[0].shape)")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.stdout == "(20, 32, 32, 3)\n" and not list(tmp_path.iterdir()), done.stderr

# ---- The probe -----------------------------------------------------------------------------------

def blobs(n, seed=0, D=20, classes=4):
    """n noisy points around a centre for each class, and their labels."""
    centres = torch.randn(classes, D, generator=seeded(99))
    g = seeded(seed)
    y = torch.randint(classes, (n,), generator=g)
    return centres[y] + 1.5 * torch.randn(n, D, generator=g), y

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

def test_probe_copes_with_constants_absent_classes_few_images_gradients_and_inference_mode():
    x, y = blobs(60)
    x[:, 3] = 0.1
    x[:, 4] = 0
    few_x = x[y != 2]
    few_y = 10 * y[y != 2]
    predict = evaluation.fit_probe(few_x, few_y)
    found = predict(x)
    assert set(found.tolist()) == {0, 10, 30}
    moved = x.clone()
    moved[:, 3] = 7.0  # a constant that changes at test time counts for nothing
    assert torch.equal(predict(moved), found)
    assert evaluation.fit_probe(x[:1], y[:1])(x).unique().tolist() == [y[0]]
    assert evaluation.linear_probe(x[:6], y[:6], x[:6], y[:6]) == 1
    torch.manual_seed(5)
    assert torch.equal(evaluation.fit_probe(few_x.numpy(), few_y.numpy())(x), found)
    with torch.inference_mode():
        assert torch.equal(evaluation.fit_probe(few_x * 1, few_y)(x), found)
    with torch.autocast("cpu", torch.bfloat16):  # which would keep rounded copies of old weights
        assert (evaluation.fit_probe(few_x, few_y)(x) == found).float().mean() > 0.95
    assert torch.equal(evaluation.fit_probe(few_x.requires_grad_(), few_y)(x), found)

# ---- The data ------------------------------------------------------------------------------------

def test_stripes_and_subsets_are_balanced_and_fixed_by_the_seed():
    first, again, other = (distill.draw_stripes(200, 32, seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.bincount(distill.draw_stripes(200, 32, 1)[1]).tolist() == [20] * 10
    labels = np.repeat([0, 1, 2], [50, 20, 5])
    first, again, other = (distill.balanced_subset(labels, 9, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    for n, counts in ((3, [1, 1, 1]), (15, [5, 5, 5]), (29, [12, 12, 5]), (75, [50, 20, 5])):
        kept = distill.balanced_subset(labels, n, 1)
        assert np.bincount(labels[kept]).tolist() == counts and (np.diff(kept) > 0).all()

def load(folder, **changes):
    """The four arrays of a data set, with its decoded files in folder/cache."""
    base = {"data_size": 16, "max_images": None, "seed": 0, "workers": 0}
    return distill.load_data(argparse.Namespace(root=f"{folder}/cache", **{**base, **changes}))

def test_folders_of_all_modes_and_sizes_are_decoded_once(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8))
    for split in ("train", "test"):
        (tmp_path / split / "a b[1]").mkdir(parents=True)
        for i, mode in enumerate(("RGB", "L", "P", "RGBA", "CMYK", "LA")):
            file = tmp_path / split / "a b[1]" / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}"
            rgb.resize((30 + i, 50 - i)).convert(mode).save(file)
    images, labels, _, _ = load(tmp_path, data=str(tmp_path), workers=2)
    assert images.shape == (6, 16, 16, 3) and isinstance(images, np.memmap)
    assert labels.tolist() == [0] * 6
    expected = np.asarray(rgb.resize((30, 50)).crop((0, 10, 30, 40)).resize((16, 16)))
    assert np.abs(images[0].astype(int) - expected).mean() < 3
    times = [path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()]
    assert np.array_equal(load(tmp_path, data=str(tmp_path))[0], images) and len(times) == 2
    assert times == [path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()]
    (tmp_path / "train/a b[1]/0.png").unlink()
    assert len(load(tmp_path, data=str(tmp_path))[0]) == 5

def test_two_projects_with_one_relative_path_share_no_pixels(tmp_path, monkeypatch):
    for project, value in (("a", 10), ("b", 200)):
        for split in ("train", "val"):
            path = tmp_path / project / "images" / split / "x" / "0.bmp"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (16, 16), (value, value, value)).save(path)
            os.utime(path, (1, 1))
        monkeypatch.chdir(tmp_path / project)
        assert (load(tmp_path, data="images")[0] == value).all()

UNREADABLE = {
    "text": lambda path: path.write_text("no image"),
    "16 bits": lambda path: Image.fromarray(np.full((9, 9), 3, np.uint16)).save(path),
    "float": lambda path: Image.fromarray(np.full((9, 9), 3, np.float32)).save(path),
    "half a file": lambda path: path.write_bytes(path.with_name("0.png").read_bytes()[:300]),
}

@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_and_leaves_nothing(kind, workers, tmp_path, capsys, world):
    shutil.copytree(world / "images", tmp_path / "images")
    UNREADABLE[kind](tmp_path / "images/train/class0/bad.tif")
    more = f"--noise 0.1 --data {tmp_path}/images --root {tmp_path}/cache --workers {workers}"
    assert "bad.tif" in error_of(capsys, distill, command(world, tmp_path / "run", more))
    assert not list(tmp_path.glob("cache/*")) and not (tmp_path / "run").exists()

@pytest.mark.parametrize("data, size", [("cifar10", 32), ("cifar100", 16), ("stl10", 96)])
def test_torchvisions_data_and_their_resizing(data, size, tmp_path, monkeypatch):
    shape = (7, 3, 96, 96) if data == "stl10" else (7, 32, 32, 3)
    class Fake:
        url = "http://example.org/x.tar.gz"
        def __init__(self, root, split, download):
            assert split in (True, False, "train", "test") and download
            self.data = np.full(shape, 90, np.uint8)
            self.labels = self.targets = list(range(7))
    monkeypatch.setattr(datasets, data.upper(), Fake)
    images, labels, _, _ = load(tmp_path, data=data, data_size=size)
    assert images.shape == (7, size, size, 3) and (images == 90).all()
    assert labels.tolist() == list(range(7)) and labels.dtype == np.int64

# ---- Runs ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["distill", "contrastive", "supervised"])
def test_a_run_learns_and_leaves_its_folder(world, tmp_path, capsys, method):
    out = tmp_path / "run"
    words = command(world, out, f"--noise 0.3 0.6 --lr 2e-3 --epochs 30 --method {method}")
    assert call(distill, words) == 0
    rows = log_of(out)
    assert [(row["epoch"], row["step"]) for row in rows] == [(i, 6 * i) for i in range(1, 31)]
    assert " ".join(rows[0]) == ("epoch step loss global patch attn lr images_per_s cos_teacher "
                                 "cos_student")
    assert (rows[0]["patch"] is None) == (method != "distill")
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"] and rows[-1]["lr"] < 1e-4
    assert method != "distill" or rows[-1]["cos_student"] > rows[-1]["cos_teacher"]
    config = json_of(out / "config.json")
    assert (config["noise"], config["mask"], config["weight_decay"]) == ([0.3, 0.6], 0, 0.05)
    assert torch.equal(weights_of(out / "teacher.pth"), weights_of(world / "vit.pth"))
    assert not torch.equal(weights_of(out / "student.pth"), weights_of(world / "vit.pth"))
    student = torch.load(out / "student.pth", weights_only=True)
    assert student.keys() == small_vit().state_dict().keys()
    assert "--resume" in error_of(capsys, distill, words)  # a run is not overwritten

def test_evaluation_leaves_the_table_and_the_picture(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    Image.new("RGB", (50, 30), (200, 10, 10)).save(tmp_path / "own.png")
    assert call(evaluation, f"{out} --pictures {tmp_path}/own.png --data none") == 0
    picture = np.asarray(Image.open(out / "attention.png"))
    assert picture.shape == (20 + 18 * 10, 5 * 18 * 10, 3)  # a line of titles stands above
    assert (picture[110, 90] == [200, 10, 10]).all()
    assert not (out / "results.json").exists()

    assert call(evaluation, f"{out} --labels 1.0 0.2 --seeds 2") == 0
    results = json_of(out / "results.json")
    rows = results["rows"]
    names = [row["distortion"] for row in rows]
    assert names[:2] == ["clean", "noise=0.1-0.3+mask=0.2"] and len(names) == 11
    assert [row["seen"] for row in rows] == [False, True] + [False] * 9
    assert rows[0]["recovered"] is None and rows[0]["cos_teacher"][0] == pytest.approx(1)
    for row in rows:
        for figure in ("cos", "probe", "clean_probe"):
            assert len(row[f"{figure}_teacher"]) == len(row[f"{figure}_student"]) == 2
        assert len(row) == 9 and "recovered" in row
    assert [label["share"] for label in results["labels"]] == [1.0, 0.2]
    assert results["labels"][0]["probe_student"] == rows[1]["probe_student"]
    assert Image.open(out / "attention.png").size == (5 * 18 * 10, 20 + 6 * 18 * 10)
    assert names[1] in capsys.readouterr().out

def test_recovered_is_won_over_lost_seed_by_seed(monkeypatch):
    monkeypatch.setattr(evaluation, "HELD_OUT", [])
    monkeypatch.setattr(distill, "embed", mock.Mock(return_value=torch.ones(4, 2)))
    monkeypatch.setattr(evaluation, "fit_probe", mock.Mock())
    monkeypatch.setattr(evaluation, "accuracy", mock.Mock(return_value=0.9))
    vits = {"teacher": None, "student": None}
    cfg = argparse.Namespace(labels=[], seeds=2, one_of=False, noise=0.1)
    for second, expected in ((0.4, [0.75, 0.25]), (0.895, None)):  # None: less than a point lost
        found = [0.9, 0.9, 0.5, 0.7, second, 0.9]  # teacher and student: clean, then by seed
        monkeypatch.setattr(evaluation, "linear_probe", mock.Mock(side_effect=found))
        rows, _ = evaluation.evaluate(cfg, vits, [None] * 4)
        assert rows[0]["recovered"] is None
        assert rows[1]["recovered"] == (expected and pytest.approx(expected))

@pytest.mark.parametrize("words, name, blur", [
    ("", "stripes-mixture", [0, 1.5]),  # pixels, of 32 and of 224
    ("--data /x/photos --clean 0", "photos-mixture-clean0", [0, 10.5]),
    ("--data photos --noise 0.1 --clean 0", "photos-noise0.1", 0)])
def test_the_default_mixture_and_what_a_run_is_called(words, name, blur, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distill.py", *words.split(), "--device", "cpu"])
    cfg = distill.configure()
    assert (cfg.out, cfg.blur) == (f"runs/{name}", blur)

def test_the_default_run_trains_its_teacher_first_and_needs_no_torchvision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    words = "--max-images 400 --pretrain-epochs 3 --max-steps 3 --batch-size 40 --device cpu"
    assert call(distill, words) == 0
    out = tmp_path / "runs" / "stripes-mixture"
    assert [(row["epoch"], row["step"]) for row in log_of(out)] == [(1, 3)]
    config = json_of(out / "config.json")
    assert (config["one_of"], config["clean"]) == (True, 0.2)
    assert call(evaluation, f"{out} --seeds 1 --max-images 60") == 0
    assert (out / "results.json").exists() and (out / "attention.png").exists()

def test_a_killed_run_resumes_to_the_same_bits(world, tmp_path):
    more = "--epochs 40 --noise 0.2 --mask 0 0.5 --one-of --clean 0.1"
    whole = tmp_path / "whole"
    broken = tmp_path / "broken"
    finish(start(command(world, whole, more)))
    rng = np.random.default_rng(0)
    last = broken / "last.pt"
    words = command(world, broken, more)
    for _ in range(5):
        begun = last.stat().st_mtime_ns if last.exists() else 0
        process = start(words)
        while process.poll() is None and not (last.exists() and last.stat().st_mtime_ns > begun):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        words = f"--resume {broken}"
    assert 0 < len(log_of(broken)) < 40  # else nothing was interrupted
    finish(start(words))
    assert same_students(whole, broken)
    logs = [[{**row, "images_per_s": 0} for row in log_of(out)] for out in (whole, broken)]
    assert logs[0] == logs[1] and len(logs[0]) == 40

def test_an_interrupted_run_with_a_teacher_of_its_own_resumes_to_the_same_bits(
        tmp_path, monkeypatch):
    """No gradients of the teacher's training are left that would count when clipping."""
    words = "--max-images 64 --epochs 2 --pretrain-epochs 1 --device cpu --lr 0.02 --out"
    assert call(distill, f"{words} {tmp_path}/whole") == 0
    write = distill.write
    def write_and_stop(path, chunks):
        write(path, chunks)
        if path.endswith("last.pt"):
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(distill, "write", write_and_stop)
        assert call(distill, f"{words} {tmp_path}/broken") == 2
    assert len(log_of(tmp_path / "broken")) == 1
    assert call(distill, f"--resume {tmp_path}/broken") == 0
    assert same_students(tmp_path / "whole", tmp_path / "broken")

def test_resume_refuses_what_does_not_fit(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    last = out / "last.pt"
    again = f"--resume {out}"
    assert str(out) in error_of(capsys, distill, again)
    train = shutil.copytree(world / "images", tmp_path / "images") / "train"
    words = command(world, out, f"--data {tmp_path}/images --noise 0.1 --max-steps 1")
    assert call(distill, words) == 0
    before = last.read_bytes()
    assert "--lr" in error_of(capsys, distill, f"{again} --lr 0.1")
    assert call(distill, f"{again} --workers 1 --device cpu") == 0
    assert "finished" in capsys.readouterr().out

    config = (out / "config.json").read_text()
    (out / "config.json").write_text(config.replace('"seed": 0', '"seed": 0, "img_size": 8'))
    teacher = (out / "teacher.pth").read_bytes()
    assert "last.pt is not of this run" in error_of(capsys, distill, again)
    assert (out / "teacher.pth").read_bytes() == teacher  # nothing is written before it is refused
    (out / "config.json").write_text(config)

    (train / "class0/0.png").rename(tmp_path / "0.png")
    assert "data have changed" in error_of(capsys, distill, again)
    for split in ("train", "val"):
        (tmp_path / "images" / split / "class2").mkdir()
        shutil.copy(tmp_path / "0.png", tmp_path / "images" / split / "class2")
    assert "data have changed" in error_of(capsys, distill, again)  # as many images, a class more
    assert last.read_bytes() == before

    last.write_bytes(before[:1000])  # damaged, of something else, gone
    assert "last.pt" in error_of(capsys, distill, again)
    torch.save({"epoch": 3}, last)
    assert "last.pt" in error_of(capsys, distill, again)
    last.unlink()
    assert call(distill, again) == 0 and last.exists()

    full = mock.Mock(side_effect=RuntimeError("can't allocate memory"))  # no reason to delete it
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", full)
    message = error_of(capsys, distill, again)
    assert "--batch-size" in message and "delete" not in message

def test_runs_started_at_once_decode_a_folder_together_but_share_no_run(world, tmp_path):
    more = f"--noise 0.1 --method supervised --workers 1 --root {tmp_path}/cache"
    runs = [start(command(world, tmp_path / out, more)) for out in ("a", "b", "b")]
    output = "".join(run.communicate(timeout=300)[0] for run in runs)
    assert runs[0].returncode == 0 and {run.returncode for run in runs[1:]} == {0, 2}, output
    assert len(log_of(tmp_path / "b")) == 2 and len(list(tmp_path.glob("cache/*"))) == 2
    finish(start(command(world, tmp_path / "c", more)))  # finds all decoded: no other fresh weights
    assert same_students(tmp_path / "a", tmp_path / "b")
    assert same_students(tmp_path / "a", tmp_path / "c")

@pytest.mark.parametrize("method", ["distill", "contrastive"])
def test_two_processes_end_where_one_does(world, tmp_path, method):
    more = f"--noise 0.1 0.3 --max-steps 8 --lr 1e-3 --method {method}"
    finish(start(command(world, tmp_path / "one", more)))
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    finish(start(command(world, tmp_path / "two", more), launcher))
    begin = weights_of(world / "vit.pth")
    one = weights_of(tmp_path / "one" / "student.pth")
    two = weights_of(tmp_path / "two" / "student.pth")
    assert (one - two).norm() < 0.05 * (one - begin).norm()
    losses = [log_of(tmp_path / name)[-1]["loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)

def test_with_several_processes_the_one_that_fails_says_why_and_the_others_end(world, tmp_path):
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    process = start(command(world, tmp_path / "run", "--data nowhere --noise 0.1"), launcher)
    output = finish(process, status=1)
    assert "error: --data nowhere is none of" in output and "[rank1]" not in output

def test_a_compiled_run_is_one_graph_and_ends_like_an_eager_one(world, tmp_path, monkeypatch):
    torch_compile = torch.compile
    graphs = []
    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    def compile(function, **more):
        return torch_compile(function, backend=count, fullgraph=True, **more)
    monkeypatch.setattr(torch, "compile", compile)
    for name in ("no-compile", "compile"):
        more = f"--noise 0.2 --epochs 4 --batch-size 10 --{name}"
        assert call(distill, command(world, tmp_path / name, more)) == 0
    assert len(graphs) == 2  # the trial, and one that is whole and not compiled again
    assert same_students(tmp_path / "no-compile", tmp_path / "compile")
    process = start(command(world, tmp_path / "none", "--noise 0.2 --compile"), CXX="/nowhere/c++")
    assert "warning" in finish(process)  # without a C compiler

# ---- What goes wrong -----------------------------------------------------------------------------

def test_a_gradient_that_is_not_finite_ends_the_run_with_the_last_good_checkpoint(
        world, tmp_path, monkeypatch, capsys):
    loss = distill.distill_loss
    def explode(*arguments):
        total, terms = loss(*arguments)
        if exploding.call_count == 10:
            total = total + (total - total.detach()).sqrt()  # 0, with an infinite gradient
        return total, terms
    exploding = mock.Mock(side_effect=explode)
    monkeypatch.setattr(distill, "distill_loss", exploding)
    words = command(world, tmp_path / "run", "--noise 0.1 --epochs 3")
    assert "at step 10:" in error_of(capsys, distill, words)
    assert len(log_of(tmp_path / "run")) == 1
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["log"][-1]["epoch"] == 1
    words = command(world, tmp_path / "last", "--noise 0.1 --max-steps 1 --lr 1e9 --warmup 0")
    assert "--lr" in error_of(capsys, distill, words)  # the last step of all, which no loss follows
    assert not (tmp_path / "last" / "student.pth").exists()

def test_a_full_disk_is_an_error_and_no_more(world, finished, tmp_path):
    """With a limit on the size of files, which ends a write as a full disk does."""
    (tmp_path / "limit.py").write_text("""
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")""")
    decoding = f"--data-size 32 --img-size 32 --root {tmp_path}/cache"
    for more, file in ((decoding, "cache/decoded-32"), ("", "run/teacher.pth")):
        words = command(world, tmp_path / "run", f"--noise 0.1 {more}")
        output = finish(start(words, launcher=f"{tmp_path}/limit.py"), status=2)
        assert f"error: cannot write {tmp_path}/{file}" in output and "Traceback" not in output
        assert not list(tmp_path.glob("**/*.part")) and not (tmp_path / file).exists()
    assert not list((tmp_path / "cache").iterdir())

def test_an_interrupt_ends_in_one_line_and_a_bug_in_its_traceback(
        world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distill, "load_data", mock.Mock(side_effect=KeyboardInterrupt))
    words = command(world, tmp_path / "run", "--noise 0.1 --method contrastive")
    assert "--resume" in error_of(capsys, distill, words)
    full = mock.Mock(side_effect=OSError(12, "Cannot allocate memory"))
    monkeypatch.setattr(distill, "load_data", full)
    assert "--batch-size" in error_of(capsys, distill, words)
    monkeypatch.undo()
    monkeypatch.setattr(distill, "info_nce", mock.Mock(side_effect=ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        call(distill, words)

OUT_OF_RANGE = (  # the message names the option
    "--noise -1, --blur 8, --mask 0.1 0.2 0.3, --clean 1.5, --img-size 0, --data-size -16, "
    "--batch-size 0, --batch-size 1000, --lr 0, --lr nan, --warmup 2, --weight-decay -1, "
    "--epochs 0, --pretrain-epochs 0, --max-steps 0, --max-images 0, --seed -1, "
    "--seed 100000000000000, --attn-blocks 3, --attn-blocks -1, --loss-weights 1 -1 1, "
    "--device cuda:99, --device abacus").split(", ")
BAD = {  # options: what the message says
    **{more: more.split()[0].strip("-") for more in OUT_OF_RANGE},
    "--data nowhere": "nowhere",
    "--data {tmp}": "{tmp}",
    "--data {world}/odd-train": "lonely",  # a class of one split alone
    "--data {world}/odd-val": "lonely",
    "--weights vit_giant": "vit_giant",
    "--weights {tmp}": "--weights",
    "--weights {text}": "{text} is damaged",
    "--out {text}": "{text}",
    "--img-size 20": "img_size=20",
    "--weights scratch --img-size 20": "--img-size 20",
    "--data-size 1000000": "memory",
    "--loss-weights 0 0 0": "the loss would be 0",
    "--loss-weights 0 0 1 --attn-blocks 0": "the loss would be 0",
    "--noise 0": "the loss would be 0",
    "--clean 1": "the loss would be 0",
    "--method contrastive --batch-size 1": "the loss would be 0",
}

@pytest.mark.parametrize("more, message", BAD.items())
def test_bad_options_end_in_one_line(more, message, world, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("hello")
    places = {"tmp": tmp_path, "text": text, "world": world}
    words = command(world, tmp_path / "run", f"--noise 0.1 {more.format(**places)}")
    assert message.format(**places) in error_of(capsys, distill, words)
    assert text.read_text() == "hello" and not (tmp_path / "run").exists()

def test_bad_input_to_the_evaluation(finished, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for words in ("--labels 0", "--labels 1.5", "--seeds 0", "--max-images 0", "--device cuda:9"):
        assert words.split()[0] in error_of(capsys, evaluation, f"{out} {words}")
    for name, message in (("teacher.pth", "teacher.pth"), ("student.pth", f"--resume {out}")):
        (out / name).unlink()
        assert message in error_of(capsys, evaluation, str(out))
        shutil.copy(finished / name, out)
    older = (out / "config.json").read_text().replace("batch_size", "batch")
    for config in ("[1", "[1, 2]", '{"hidden_size": 8}', older):
        (out / "config.json").write_text(config)
        assert f"{out} holds no run" in error_of(capsys, evaluation, str(out))
    assert "holds no run" in error_of(capsys, evaluation, str(tmp_path))

def test_torchvision_and_the_network_are_named_where_they_are_missing(
        world, tmp_path, monkeypatch, capsys):
    offline = mock.Mock(side_effect=OSError("no network"))
    for module in (datasets.cifar, datasets.stl10):
        monkeypatch.setattr(module, "download_and_extract_archive", offline)
    for data in ("cifar10", "stl10"):
        more = f"--data {data} --root {tmp_path}/data --noise 0.1"
        message = error_of(capsys, distill, command(world, tmp_path / "run", more))
        assert "http" in message and f"{tmp_path}/data" in message and "stripes" in message
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')")
    words = command(world, tmp_path / "run", "--noise 0.1")
    output = finish(start(words, PYTHONPATH=str(tmp_path)), status=2)
    assert "\nerror: torchvision does not work" in output
