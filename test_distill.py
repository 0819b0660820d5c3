# SPDX-License-Identifier: MIT
"""Tests: python -m pytest -q test_distill.py"""
import argparse
import ast
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
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

def close(a, b, tolerance=1e-4):
    return (a - b).norm() <= tolerance * b.norm()

def random_features(seed, maps=2, B=3, N=4, D=8, heads=2):
    g = torch.Generator().manual_seed(seed)
    attn = tuple(torch.rand(B, heads, N + 1, N + 1, generator=g).softmax(-1) for _ in range(maps))
    return distill.Features(torch.randn(B, D, generator=g), torch.randn(B, N, D, generator=g), attn)

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder of 16-pixel images of two classes, and a ViT's weights, for runs of a second."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for split, n in (("train", 24), ("val", 8)):
        for label in range(2):
            folder = root / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(n):
                stripes = np.arange(16) % (2 + 2 * label) * 60
                pixels = rng.integers(0, 100, (16, 16, 3)) + stripes[None, :, None]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    torch.save(small_vit().state_dict(), root / "vit.pth")
    return root

def options(world, out, more=""):
    return shlex.split(f"--data {world}/images --weights {world}/vit.pth --root {world}/cache "
                       "--data-size 16 --img-size 16 --batch-size 8 --workers 0 --device cpu "
                       f"--epochs 2 --out {out} {more}")

def call(monkeypatch, module, arguments):
    """The exit status of a command line run in this process."""
    if isinstance(arguments, str):
        arguments = shlex.split(arguments)
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *arguments])
    try:
        distill.run(module.main)
    except SystemExit as exit:
        return exit.code
    return 0

def start(arguments, launcher=(), **env):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    command = [sys.executable, *launcher, str(HERE / "distill.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=env)

def error_of(capsys):
    """The one line of an error."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines and "error: " in lines[-1] and "Traceback" not in "".join(lines), lines
    return lines[-1]

def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

def same(a, b):
    a, b = (torch.load(folder / "student.pth", weights_only=True) for folder in (a, b))
    return all(torch.equal(a[key], b[key]) for key in a)

# ---- The ViT -------------------------------------------------------------------------------------

def from_torchvision(state):
    """torchvision's names to DINO's."""
    rename = {"class_token": "cls_token", "conv_proj": "patch_embed.proj", "encoder.ln": "norm",
              "encoder.pos_embedding": "pos_embed", "ln_1": "norm1", "ln_2": "norm2",
              "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj",
              "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}
    out = {}
    for key, value in state.items():
        key = re.sub(r"encoder\.layers\.encoder_layer_(\d+)", r"blocks.\1", key)
        for old, new in rename.items():
            key = re.sub(rf"(^|\.){re.escape(old)}", rf"\1{new}", key)
        out[key] = value
    return {key: value for key, value in out.items() if not key.startswith("heads")}

def test_vit_agrees_with_torchvision():
    torch.manual_seed(1)
    theirs = VisionTransformer(image_size=32, patch_size=8, num_layers=3, num_heads=2,
                               hidden_dim=128, mlp_dim=256).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours = distill.ViT(32, 8, 128, 3, 2, mlp_ratio=2)
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    images, maps = torch.randn(4, 3, 32, 32), []
    with torch.no_grad():
        cls = theirs.class_token.expand(4, -1, -1)
        tokens = torch.cat([cls, theirs._process_input(images)], dim=1)
        x = tokens + theirs.encoder.pos_embedding
        for layer in theirs.encoder.layers:
            y = layer.ln_1(x)
            maps.append(layer.self_attention(y, y, y, average_attn_weights=False)[1])
            x = layer(x)
        tokens = theirs.encoder(tokens)
        plain, mapped = ours(images), ours(images, attn_blocks=2)
    for features in (plain, mapped):
        assert close(features.cls, tokens[:, 0]) and close(features.patches, tokens[:, 1:])
    assert plain.attn == () and len(mapped.attn) == 2
    assert all(close(a, b) for a, b in zip(mapped.attn, maps[1:], strict=True))

@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_vit_agrees_with_timm(name):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model(name, img_size=28, depth=2, num_classes=0).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    registers = 4 if "reg4" in name else 0
    ours = distill.ViT(28, 14, 384, 2, 6, num_registers=registers, layer_scale=True)
    state = theirs.state_dict()
    if registers:  # the README's rename, the other way round
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], dim=1)
    ours.load_state_dict(state)  # strict: the names are the same
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        tokens, found = theirs.forward_features(images), ours(images, attn_blocks=1)
    assert close(found.cls, tokens[:, 0]) and close(found.patches, tokens[:, 1 + registers:])
    assert found.attn[0].shape == (2, 6, 5 + registers, 5 + registers)

def test_maps_are_float32_distributions_also_under_autocast():
    vit, images = small_vit(num_heads=2, num_registers=2), torch.randn(2, 3, 16, 16)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.15)
    with torch.no_grad():
        exact = vit(images, attn_blocks=2)
        with torch.autocast("cpu", torch.bfloat16):
            rough, mapless = vit(images, attn_blocks=2), vit(images)
    for attn in exact.attn + rough.attn:
        assert attn.shape == (2, 2, 7, 7) and attn.dtype == torch.float32
        assert (attn.sum(-1) - 1).abs().max() < 1e-5
    assert close(rough.cls.float(), exact.cls, 0.05) and close(mapless.cls.float(), exact.cls, 0.05)

def test_the_fused_kernel_gives_the_explicit_path_s_gradients(monkeypatch):
    vit, images = small_vit(depth=1), torch.randn(4, 3, 16, 16)
    fused, calls, gradients = F.scaled_dot_product_attention, [], []
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *qkv: calls.append(1) or fused(*qkv))
    for attn_blocks in (0, 1):
        vit.zero_grad()
        vit(images, attn_blocks).patches.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in vit.parameters()]))
    assert close(*gradients) and len(calls) == 1

# ---- Weights -------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [
    {}, {"num_registers": 3, "layer_scale": True, "mlp_ratio": 2.0},
    {"depth": 3, "embed_dim": 128, "num_heads": 2, "patch_size": 4}])
def test_architecture_is_read_off_the_state_dict(tmp_path, changes):
    vit = small_vit(**changes)
    state = {key: value.half() for key, value in vit.state_dict().items()}
    state["mask_token"] = state["head.weight"] = state["head_dist.bias"] = torch.zeros(1, 64)
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
    state, urls = small_vit().state_dict(), []
    def fetch(url, **options):
        assert options["weights_only"]
        urls.append(url)
        return state
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    for name in distill.WEIGHTS:
        vit = distill.load_vit(name, 16)
    base = "https://dl.fbaipublicfiles.com/"
    assert f"{base}dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth" in urls
    assert len(set(urls)) == 11
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
    def offline(*arguments, **options):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(distill.UserError, match=f"{cached}.*--weights scratch.*no network"):
        distill.load_vit("dinov2_vits14", 16)

NOT_OURS = {  # what is wrong: a change to the state dict, a word of the message
    "missing key": (lambda s: s.pop("blocks.1.norm2.bias"), "blocks.1.norm2.bias"),
    "unexpected key": (lambda s: s.update(extra=torch.zeros(1)), "extra"),
    "shape": (lambda s: s.update({"blocks.0.mlp.fc2.weight": torch.zeros(3, 3)}), "fc2"),
    "no patches": (lambda s: s.pop("patch_embed.proj.weight"), "patch_embed.proj.weight"),
    "grid": (lambda s: s.update(pos_embed=torch.zeros(1, 4, 64)), "w.pth"),
    "flat positions": (lambda s: s.update(pos_embed=torch.zeros(5)), "w.pth"),
    "no tensors": (lambda s: s.update(pos_embed="none"), "w.pth"),
    "width": (lambda s: s.update(distill.ViT(16, 8, 96, 1, 1).state_dict()), "96"),
}

@pytest.mark.parametrize("case", NOT_OURS)
def test_other_architectures_are_refused_by_name(tmp_path, case):
    change, message = NOT_OURS[case]
    state = dict(small_vit().state_dict())
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(distill.UserError, match=message):
        distill.load_vit(str(tmp_path / "w.pth"), 16)

def test_weight_files_are_data(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)
    torch.save({"cls_token": Attack()}, tmp_path / "w.pth")
    with pytest.raises(distill.UserError, match="w.pth"):
        distill.load_vit(str(tmp_path / "w.pth"), 16)
    assert not (tmp_path / "attacked").exists()

def test_prepare_looks_at_both_sides_and_normalizes():
    images = torch.rand(2, 3, 16, 8)
    found = distill.prepare(images, 8)
    small = F.interpolate(images, size=(8, 8), mode="bicubic", antialias=True)
    for channel, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        assert close(found[:, channel], (small[:, channel] - mean) / std)

# ---- Distortions ---------------------------------------------------------------------------------

@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.7])
def test_blur_is_torchvisions(sigma):
    images = torch.rand(3, 3, 20, 24)
    kernel = 2 * int(np.ceil(2 * sigma)) + 1
    assert close(distill.distort(images, blur=sigma), gaussian_blur(images, kernel, sigma), 1e-5)

def test_a_range_of_blur_is_one_sigma_an_image():
    images, sigma = torch.rand(5, 3, 16, 16), torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0])
    found = distill.blur(images, sigma.view(5, 1, 1, 1), 2.0, None)
    assert torch.equal(found[0], images[0])
    for i in range(1, 5):
        assert close(found[i], gaussian_blur(images[i], 9, sigma[i].item()), 1e-5)

def test_each_kind_has_the_asked_strength_and_range():
    grey, images = torch.full((40, 3, 32, 32), 0.5), torch.rand(2, 3, 8, 8)
    g = torch.Generator().manual_seed(0)
    noisy = distill.distort(grey, g, noise=0.1)
    assert abs(noisy.std() - 0.1) < 1e-3 and abs(noisy.mean() - 0.5) < 1e-3
    masked = distill.distort(grey, g, mask=0.3) == 0
    assert abs(masked.float().mean() - 0.3) < 0.01
    assert torch.equal(masked[:, 0], masked[:, 1]) and torch.equal(masked[:, 0], masked[:, 2])
    salted = distill.distort(grey, g, salt=0.3)
    for value, share in ((0.0, 0.15), (1.0, 0.15), (0.5, 0.7)):
        assert abs((salted == value).float().mean() - share) < 0.01
    assert torch.equal(salted[:, 0], salted[:, 1]) and torch.equal(salted[:, 0], salted[:, 2])
    assert close(distill.distort(images, contrast=0.7), 0.5 + 0.3 * (images - 0.5))
    assert (distill.distort(images, contrast=1.0) == 0.5).all()
    assert (distill.distort(images, mask=1.0) == 0).all()
    assert set(distill.distort(images, salt=1.0).unique().tolist()) == {0, 1}
    shares = (distill.distort(grey, g, mask=(0.1, 0.9)) == 0).float().mean((1, 2, 3))
    assert 0.05 < shares.min() < 0.3 and 0.7 < shares.max() < 0.95

def test_the_order_is_the_camera_s_whatever_the_order_of_the_words():
    images = torch.rand(2, 3, 16, 16)
    a = distill.distort(images, torch.Generator().manual_seed(5), blur=1.0, noise=0.5, mask=0.4)
    b = distill.distort(images, torch.Generator().manual_seed(5), mask=0.4, noise=0.5, blur=1.0)
    assert torch.equal(a, b) and a.min() == 0 and a.max() == 1
    assert abs((a == 0).all(dim=1).float().mean() - 0.4) < 0.15  # masked last: no noise on top
    assert list(distill.DISTORTIONS) == ["blur", "contrast", "noise", "salt", "mask"]

def test_with_one_of_each_image_shows_exactly_one_kind():
    images = torch.full((300, 3, 16, 16), 0.25)
    found = distill.distort(images, torch.Generator().manual_seed(0), one_of=True,
                            contrast=0.5, salt=0.5, mask=0.5)
    contrast = (found == 0.375).all(dim=(1, 2, 3))
    salt = (found == 1).any(dim=1).flatten(1).any(dim=1)
    mask = (found == 0).any(dim=1).flatten(1).any(dim=1) & ~salt
    for kind in (contrast, salt, mask):
        assert 70 < kind.sum() < 130
    assert (contrast.int() + salt.int() + mask.int() == 1).all()

def test_the_clean_share_is_left_bit_for_bit():
    images = torch.rand(400, 3, 8, 8)
    g = torch.Generator().manual_seed(0)
    found = distill.distort(images, g, clean=0.3, noise=0.2, blur=1.0)
    equal = (found == images).flatten(1).all(dim=1)
    assert 90 < equal.sum() < 150
    assert torch.equal(distill.distort(images, clean=1.0, noise=0.2), images)
    assert not (distill.distort(images, noise=0.2) == images).flatten(1).all(dim=1).any()

def test_random_numbers_come_from_the_generator_alone_and_in_float32():
    images, state = torch.rand(2, 3, 8, 8), torch.get_rng_state()
    kinds = {"noise": (0.1, 0.4), "blur": 0.5, "mask": (0, 0.5), "salt": 0.1, "contrast": (0, 1)}
    a, b = (distill.distort(images, torch.Generator().manual_seed(1), True, 0.1, **kinds)
            for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        c = distill.distort(images, torch.Generator().manual_seed(1), True, 0.1, **kinds)
    assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(state, torch.get_rng_state())
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
    arguments = options(world, "x", "--invert 0.2 1 --noise 0.1 --one-of")
    arguments = [word for word in arguments if word not in ("--out", "x")]
    assert call(monkeypatch, distill, arguments) == 0
    out = Path("runs/images-noise0.1-or-invert0.2-1")
    assert json.loads((out / "config.json").read_text())["invert"] == [0.2, 1]
    assert call(monkeypatch, evaluation, f"{out} --seeds 1") == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert rows[1]["distortion"] == "noise=0.1 or invert=0.2-1"
    monkeypatch.setitem(distill.DISTORTIONS, "later", invert)  # older runs go on without it
    assert call(monkeypatch, distill, f"--resume {out}") == 0

# ---- The loss ------------------------------------------------------------------------------------

def test_loss_is_the_formula_written_another_way():
    s, t = random_features(0), random_features(1)
    total, terms = distill.distill_loss(s, t, (1.0, 2.0, 3.0))
    unit = [[x / x.norm(dim=-1, keepdim=True) for x in (f.cls, f.patches)] for f in (s, t)]
    expected = {"global": 1 - (unit[0][0] * unit[1][0]).sum() / 3,
                "patch": 1 - (unit[0][1] * unit[1][1]).sum() / 12,
                "attn": sum((b * (b.log() - a.log())).sum() for a, b in
                            zip(s.attn, t.attn, strict=True)) / (2 * 3 * 2 * 5)}
    for name, value in expected.items():
        assert torch.allclose(terms[name], value, atol=1e-6)
    weighted = expected["global"] + 2 * expected["patch"] + 3 * expected["attn"]
    assert torch.allclose(total, weighted, atol=1e-5)
    assert all(abs(value) < 1e-6 for value in distill.distill_loss(s, s)[1].values())
    with torch.autocast("cpu", torch.bfloat16):
        assert distill.distill_loss(s, t, (1.0, 2.0, 3.0))[0] == total
    total, terms = distill.distill_loss(random_features(0, maps=0), random_features(1, maps=0))
    assert terms["attn"] == 0 and torch.allclose(total, terms["global"] + terms["patch"])

def test_loss_is_finite_for_one_hot_maps():
    s, t = random_features(0, maps=1), random_features(1, maps=1)
    logits = (torch.randn(3, 2, 5, 5) * 300).requires_grad_()
    s = s._replace(attn=(logits.softmax(-1),))
    t = t._replace(attn=(torch.eye(5).expand(3, 2, 5, 5),))
    loss = distill.distill_loss(s, t)[0]
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()

def test_info_nce_is_float32_also_under_autocast():
    a, b = torch.randn(8, 32), torch.randn(8, 32)
    cosines = F.cosine_similarity(a[:, None], b[None], dim=-1)
    expected = -(cosines / 0.1).log_softmax(dim=1).diagonal().mean()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(distill.info_nce(a, b), expected, atol=1e-5)

# ---- What the pieces refuse, alone and in others' files ------------------------------------------

IMAGE, VIT, FEATURES = torch.rand(1, 3, 8, 8), small_vit(), random_features(0)
POINTS = (torch.rand(9, 3), torch.arange(9) % 2)
REFUSED = [
    lambda: distill.ViT(15, 8, 64, 1, 1), lambda: distill.ViT(16, 8, 64, 1, 3),
    lambda: distill.ViT(16, 0, 64, 1, 1), lambda: VIT(torch.zeros(1, 3, 8, 8)),
    lambda: VIT(torch.zeros(1, 1, 16, 16)), lambda: VIT(torch.zeros(3, 16, 16)),
    lambda: VIT(torch.zeros(1, 3, 16, 16), 3), lambda: VIT(torch.zeros(1, 3, 16, 16), -1),
    *(lambda kinds=kinds: distill.distort(IMAGE, **kinds) for kinds in (
        {"noise": -0.1}, {"noise": float("nan")}, {"noise": float("inf")}, {"mask": 1.1},
        {"salt": 1.1}, {"contrast": 1.1}, {"blur": -1}, {"blur": 4.0}, {"noise": (0.5, 0.1)},
        {"mask": (0.5, 1.5)}, {"noise": (1, 2, 3)}, {"fog": 1}, {"clean": 1.5, "noise": 0.1})),
    lambda: distill.distort(IMAGE[0], noise=0.1), lambda: distill.distort(IMAGE[:, :1], noise=0.1),
    lambda: distill.distort((IMAGE * 255).byte(), noise=0.1),
    *(lambda w=w: distill.distill_loss(FEATURES, FEATURES, w) for w in (
        (1, 1), (1, -1, 1), (0, 0, 0), (1, 1, float("nan")), (1, 1, float("inf")))),
    *(lambda change=change: distill.distill_loss(FEATURES, random_features(1, **change))
      for change in ({"maps": 1}, {"D": 9}, {"N": 5})),
    lambda: distill.load_vit("vit_giant", 16),
    lambda: evaluation.fit_probe(POINTS[0][0], POINTS[1]),
    lambda: evaluation.fit_probe(POINTS[0], POINTS[1][:-1]),
    lambda: evaluation.fit_probe(POINTS[0][:0], POINTS[1][:0]),
    lambda: evaluation.fit_probe(POINTS[0] * float("nan"), POINTS[1]),
]

@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_bad_arguments_are_value_errors(case):
    with pytest.raises(ValueError):
        REFUSED[case]()

@pytest.mark.parametrize("file, names, use", [
    ("distill.py", ["Features", "PatchEmbed", "Attention", "Mlp", "LayerScale", "Block", "ViT"],
     "ViT(16, 8, 64, 2, 1, layer_scale=True)(torch.rand(2, 3, 16, 16), 1).attn[0]"),
    ("distill.py", [*distill.DISTORTIONS, "DISTORTIONS", "distort"],
     "distort(torch.rand(2, 3, 16, 16), noise=(0, 0.1), blur=1.0, mask=0.3, salt=0.1, contrast=1)"),
    ("distill.py", ["distill_loss"],
     "distill_loss(F, F) if 0 else distill_loss(*[type('f', (), dict(cls=torch.rand(2, 4), "
     "patches=torch.rand(2, 3, 4), attn=()))] * 2)"),
    ("eval.py", ["fit_probe"],
     "fit_probe(torch.rand(50, 3), torch.arange(50) % 3)(torch.rand(4, 3))")])
def test_each_piece_runs_when_cut_out(file, names, use):
    text = (HERE / file).read_text()
    pieces = []
    for node in ast.parse(text).body:
        name = getattr(node, "name", "") or getattr(getattr(node, "targets", [None])[0], "id", "")
        if name in names:
            pieces.append(ast.get_source_segment(text, node))
    assert len(pieces) == len(names)
    head = ("import math\nfrom typing import NamedTuple\nimport torch\nimport torch.nn as nn\n"
            "import torch.nn.functional as F\n")
    exec(head + "\n\n".join(pieces) + "\n\n" + use, {})

def test_imports_do_nothing_and_need_no_torchvision(tmp_path):
    program = ("import sys; sys.modules['torchvision'] = sys.modules['PIL'] = None; "
               "import distill, eval; print(distill.draw_stripes(20, 32, 0)[0].shape)")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(HERE)})
    assert done.stdout == "(20, 32, 32, 3)\n" and not list(tmp_path.iterdir()), done.stderr

# ---- The probe -----------------------------------------------------------------------------------

def blobs(n, D=20, classes=4, spread=1.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, D, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (n,), generator=g)
    return centres[y] + spread * torch.randn(n, D, generator=g), y

def test_probe_is_within_a_point_of_scikit_learns_best():
    linear_model = pytest.importorskip("sklearn.linear_model")
    (x, y), (test_x, test_y) = blobs(2500), blobs(5000, seed=1)
    mean, std = x.mean(0), x.std(0)
    scores = []
    for C in 10.0 ** np.arange(-5, 3):
        theirs = linear_model.LogisticRegression(C=C, max_iter=500).fit((x - mean) / std, y)
        scores.append(theirs.score((test_x - mean) / std, test_y))
    assert abs(evaluation.linear_probe(x, y, test_x, test_y) - max(scores)) < 0.01

def test_probe_copes_with_constants_absent_classes_few_images_gradients_and_inference_mode():
    x, y = blobs(60)
    x[:, 3], x[:, 4] = 0.1, 0
    kept = y != 2
    predict = evaluation.fit_probe(x[kept], y[kept] * 10)
    assert set(predict(x).tolist()) == {0, 10, 30}
    moved = x.clone()
    moved[:, 3] = 7.0  # a constant that changes at test time counts for nothing
    assert torch.equal(predict(x), predict(moved))
    assert evaluation.fit_probe(x[:1], y[:1])(x).unique().tolist() == [y[0]]
    assert evaluation.linear_probe(x[:6], y[:6], x[:6], y[:6]) == 1
    torch.manual_seed(5)
    assert torch.equal(predict(x), evaluation.fit_probe(x[kept].numpy(), y[kept].numpy() * 10)(x))
    assert torch.equal(predict(x), evaluation.fit_probe(x[kept].requires_grad_(), y[kept] * 10)(x))
    with torch.inference_mode():
        assert torch.equal(predict(x), evaluation.fit_probe(x[kept] * 1, y[kept] * 10)(x))

# ---- The data ------------------------------------------------------------------------------------

def config(folder, **changes):
    base = {"data": f"{folder}/images", "root": f"{folder}/cache", "data_size": 16,
            "max_images": None, "seed": 0, "workers": 0}
    return argparse.Namespace(**{**base, **changes})

def test_stripes_are_drawn_from_the_seed():
    (a, labels), (b, _), (c, _) = (distill.draw_stripes(200, 32, seed) for seed in (1, 1, 2))
    assert a.dtype == np.uint8 and np.array_equal(a, b) and not np.array_equal(a, c)
    assert np.bincount(labels).tolist() == [20] * 10

def test_subsets_are_class_balanced_and_fixed_by_the_seed():
    labels = np.repeat([0, 1, 2], [50, 20, 5])
    counts = np.bincount(labels[distill.balanced_subset(labels, 30, 1)]).tolist()
    assert counts in ([13, 12, 5], [12, 13, 5])
    assert np.bincount(labels[distill.balanced_subset(labels, 3, 1)]).tolist() == [1, 1, 1]
    first, again, other = (distill.balanced_subset(labels, 9, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(distill.balanced_subset(labels, 75, 3), np.arange(75))

def make_folder(folder, splits=("train", "test"), name="a b[1]"):
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8))
    for split in splits:
        (folder / split / name).mkdir(parents=True)
        for i, mode in enumerate(("RGB", "L", "P", "RGBA", "CMYK", "LA")):
            image = rgb.resize((30 + i, 50 - i)).convert(mode)
            image.save(folder / split / name / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")

def test_folders_of_all_modes_and_sizes_are_decoded_once(tmp_path):
    make_folder(tmp_path / "images")
    cfg = config(tmp_path, workers=2)
    images, labels, test, _ = distill.load_data(cfg)
    assert images.shape == (6, 16, 16, 3) and isinstance(images, np.memmap)
    assert labels.tolist() == [0] * 6
    with Image.open(tmp_path / "images/train/a b[1]/0.png") as image:  # 30 x 50: crop 30 x 30
        expected = np.asarray(image.crop((0, 10, 30, 40)).resize((16, 16)))
    assert np.abs(images[0].astype(int) - expected).mean() < 3
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert np.array_equal(distill.load_data(cfg)[0], images) and len(cached) == 2
    assert cached == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    (tmp_path / "images/train/a b[1]/0.png").unlink()
    assert len(distill.load_data(cfg)[0]) == 5

def test_two_projects_with_one_relative_path_share_no_pixels(tmp_path, monkeypatch):
    pixels = []
    for project, value in (("a", 10), ("b", 200)):
        folder = tmp_path / project
        for split in ("train", "val"):
            (folder / "images" / split / "x").mkdir(parents=True)
            path = folder / "images" / split / "x" / "0.bmp"
            Image.new("RGB", (16, 16), (value, value, value)).save(path)
            os.utime(path, (1, 1))
        monkeypatch.chdir(folder)
        pixels.append(distill.load_data(config(folder, data="images", root=tmp_path / "cache"))[0])
    assert pixels[0].mean() == 10 and pixels[1].mean() == 200

@pytest.mark.parametrize("kind", ["text", "16 bits", "float", "half a file"])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_and_leaves_nothing(tmp_path, monkeypatch, capsys, world, kind,
                                                         workers):
    make_folder(tmp_path / "images", ("train", "val"), "a")
    bad = tmp_path / "images/train/a/bad.tif"
    if kind == "text":
        bad.write_text("no image")
    elif kind == "half a file":
        bad.write_bytes((tmp_path / "images/train/a/0.png").read_bytes()[:900])
    else:
        dtype = np.uint16 if kind == "16 bits" else np.float32
        Image.fromarray(np.full((9, 9), 3, dtype)).save(bad)
    more = f"--data {tmp_path}/images --root {tmp_path}/c --workers {workers}"
    assert call(monkeypatch, distill, options(world, tmp_path / "run", more)) == 2
    assert "bad.tif" in error_of(capsys) and not list(tmp_path.glob("c/*"))
    assert not (tmp_path / "run").exists()

def test_two_runs_decode_the_same_folder_at_once(tmp_path, world):
    make_folder(tmp_path / "images", ("train", "val"), "a")
    runs = [start(options(world, tmp_path / name, f"--data {tmp_path}/images --root {tmp_path}/c "
                          "--batch-size 2 --max-steps 2 --noise 0.1")) for name in "ab"]
    for run in runs:
        assert run.wait(120) == 0, run.stdout.read()
    assert same(tmp_path / "a", tmp_path / "b") and len(list(tmp_path.glob("c/*"))) == 2

@pytest.mark.parametrize("data, size", [("cifar10", 32), ("cifar100", 16), ("stl10", 96)])
def test_torchvisions_data_and_their_resizing(data, size, tmp_path, monkeypatch):
    from torchvision import datasets
    pixels = np.full((7, 32, 32, 3), 90, np.uint8)
    class Fake:
        url = "http://example.org/x.tar.gz"
        def __init__(self, root, split, download):
            assert split in (True, False, "train", "test") and download
            if data == "stl10":
                self.data = np.full((7, 3, 96, 96), 90, np.uint8)
            else:
                self.data = pixels
            self.labels = self.targets = [0, 1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(datasets, data.upper(), Fake)
    images, labels, *_ = distill.load_data(config(tmp_path, data=data, data_size=size))
    assert images.shape == (7, size, size, 3) and (images == 90).all()
    assert labels.tolist() == list(range(7)) and labels.dtype == np.int64

# ---- Runs ----------------------------------------------------------------------------------------

FIGURES = {f"{figure}_{who}" for figure in ("cos", "probe", "clean_probe")
           for who in ("teacher", "student")} | {"recovered"}

@pytest.mark.parametrize("method", ["distill", "contrastive", "supervised"])
def test_a_run_leaves_its_folder_and_is_evaluated(world, tmp_path, monkeypatch, capsys, method):
    out = tmp_path / "run"
    command = options(world, out, f"--noise 0.1 0.3 --mask 0.2 --clean 0.1 --method {method}")
    assert call(monkeypatch, distill, command) == 0
    rows = log_of(out)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 6), (2, 12)]
    assert set(rows[0]) == {"epoch", "step", "loss", "global", "patch", "attn", "lr",
                            "images_per_s", "cos_teacher", "cos_student"}
    assert (rows[0]["patch"] is None) == (method != "distill") and rows[0]["lr"] > rows[1]["lr"]
    saved = json.loads((out / "config.json").read_text())
    assert saved["noise"] == [0.1, 0.3] and saved["mask"] == 0.2 and saved["lr"] == 1e-4
    states = [torch.load(out / f"{who}.pth", weights_only=True) for who in ("teacher", "student")]
    original = torch.load(world / "vit.pth", weights_only=True)
    assert all(torch.equal(states[0][key], original[key]) for key in original)
    assert states[1].keys() == original.keys()
    assert not torch.equal(states[1]["norm.weight"], original["norm.weight"])
    assert call(monkeypatch, distill, command) == 2  # a run is not overwritten
    assert "--resume" in error_of(capsys)

    assert call(monkeypatch, evaluation, f"{out} --labels 1.0 0.2 --seeds 2") == 0
    results = json.loads((out / "results.json").read_text())
    names = [row["distortion"] for row in results["rows"]]
    assert names[:2] == ["clean", "noise=0.1-0.3+mask=0.2"] and len(names) == 11
    assert [row["seen"] for row in results["rows"]] == [False, True] + [False] * 9
    clean, trained = results["rows"][:2]
    assert clean["recovered"] is None and clean["cos_teacher"][0] == pytest.approx(1)
    for row in results["rows"]:
        assert set(row) == FIGURES | {"distortion", "seen"}
        assert all(len(row[key]) == 2 for key in FIGURES - {"recovered"})
    assert [label["share"] for label in results["labels"]] == [1.0, 0.2]
    assert results["labels"][0]["probe_student"] == trained["probe_student"]
    assert Image.open(out / "attention.png").size == (5 * 18 * 10, 6 * 18 * 10)
    assert names[1] in capsys.readouterr().out

def test_the_pictures_of_one_s_own_need_no_data(world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert call(monkeypatch, distill, options(world, out, "--noise 0.3 --max-steps 2")) == 0
    Image.new("RGB", (50, 30), (200, 10, 10)).save(tmp_path / "own.png")
    (out / "attention.png").unlink(missing_ok=True)
    assert call(monkeypatch, evaluation, f"{out} --pictures {tmp_path}/own.png --data none") == 0
    picture = np.asarray(Image.open(out / "attention.png"))
    assert picture.shape == (18 * 10, 5 * 18 * 10, 3) and (picture[90, 90] == [200, 10, 10]).all()
    assert not (out / "results.json").exists()

def test_the_default_run_trains_its_teacher_first_and_needs_no_torchvision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("torchvision", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    assert call(monkeypatch, distill, "--max-images 400 --pretrain-epochs 3 --max-steps 3 "
                                      "--batch-size 40 --device cpu") == 0
    out = tmp_path / "runs" / "stripes-mixture"
    assert [(row["epoch"], row["step"]) for row in log_of(out)] == [(1, 3)]
    assert json.loads((out / "config.json").read_text())["one_of"] is True
    assert call(monkeypatch, evaluation, f"{out} --seeds 1 --max-images 60") == 0
    assert (out / "results.json").exists() and (out / "attention.png").exists()

@pytest.mark.parametrize("more, name", [
    ("--noise 0.1", "noise0.1"), ("--noise 0 0.4 --blur 1", "blur1+noise0-0.4"), ("", "mixture"),
    ("--mask 0.5 --blur 2 --one-of --clean 0.2 --method contrastive",
     "blur2-or-mask0.5-clean0.2-contrastive")])
def test_the_names_of_runs(more, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["distill.py", *shlex.split(f"--data x/cifar10 {more}")])
    assert distill.configure().out == f"runs/cifar10-{name}"

def test_distillation_brings_the_student_to_the_teacher(world, tmp_path, monkeypatch):
    more = "--noise 0.5 --lr 2e-3 --epochs 30"
    assert call(monkeypatch, distill, options(world, tmp_path / "run", more)) == 0
    first, *_, last = log_of(tmp_path / "run")
    assert last["loss"] < 0.8 * first["loss"] and last["cos_student"] > last["cos_teacher"]
    assert last["lr"] < 1e-4

def test_a_killed_run_resumes_to_the_same_bits(world, tmp_path):
    more = "--epochs 40 --noise 0.2 --mask 0 0.5 --one-of --clean 0.1"
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(options(world, whole, more))
    assert process.wait(120) == 0, process.stdout.read()
    rng, last = np.random.default_rng(0), broken / "last.pt"
    for attempt in range(5):
        process = start(["--resume", str(broken)] if attempt else options(world, broken, more))
        begun = last.stat().st_mtime_ns if last.exists() else 0
        while process.poll() is None and not (last.exists() and last.stat().st_mtime_ns > begun):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert 0 < len(log_of(broken)) < 40  # else nothing was interrupted
    process = start(["--resume", str(broken)])
    assert process.wait(120) == 0, process.stdout.read()
    assert same(whole, broken)
    logs = [[{**row, "images_per_s": 0} for row in log_of(folder)] for folder in (whole, broken)]
    assert logs[0] == logs[1] and len(logs[0]) == 40

def test_out_of_memory_is_no_reason_to_delete_a_checkpoint(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert call(monkeypatch, distill, options(world, out, "--noise 0.1 --max-steps 1")) == 0
    def full(*arguments, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", full)
    assert call(monkeypatch, distill, f"--resume {out}") == 2
    message = error_of(capsys)
    assert "--batch-size" in message and "delete" not in message

def test_pretraining_leaves_no_gradients_that_would_count_when_clipping(tmp_path, monkeypatch):
    command = "--max-images 64 --epochs 2 --pretrain-epochs 1 --device cpu --lr 0.02 --out"
    assert call(monkeypatch, distill, f"{command} {tmp_path}/whole") == 0
    write, files = distill.write, []
    def stop(path, chunks):
        write(path, chunks)
        files.append(path)
        if path.endswith("last.pt"):
            raise KeyboardInterrupt
    monkeypatch.setattr(distill, "write", stop)
    assert call(monkeypatch, distill, f"{command} {tmp_path}/broken") == 2
    monkeypatch.setattr(distill, "write", write)
    assert len(log_of(tmp_path / "broken")) == 1
    assert call(monkeypatch, distill, f"--resume {tmp_path}/broken") == 0
    assert same(tmp_path / "whole", tmp_path / "broken")

def test_resume_refuses_what_does_not_fit(world, tmp_path, monkeypatch, capsys):
    out, last = tmp_path / "run", tmp_path / "run" / "last.pt"
    make_folder(tmp_path / "images", ("train", "val"), "a")
    assert call(monkeypatch, distill, f"--resume {out}") == 2
    assert str(out) in error_of(capsys)
    more = f"--data {tmp_path}/images --noise 0.1 --batch-size 2"
    assert call(monkeypatch, distill, options(world, out, more)) == 0
    assert call(monkeypatch, distill, f"--resume {out} --workers 1 --device cpu") == 0
    assert "finished" in capsys.readouterr().out
    assert call(monkeypatch, distill, f"--resume {out} --lr 0.1") == 2
    assert "--lr" in error_of(capsys)
    before = last.read_bytes()
    (tmp_path / "images/train/a/0.png").unlink()
    assert call(monkeypatch, distill, f"--resume {out}") == 2
    assert "data have changed" in error_of(capsys) and last.read_bytes() == before
    make_folder(tmp_path / "images", ("train", "val"), "b")
    assert call(monkeypatch, distill, f"--resume {out}") == 2
    assert "data have changed" in error_of(capsys)
    last.write_bytes(before[:1000])
    assert call(monkeypatch, distill, f"--resume {out}") == 2
    assert "last.pt" in error_of(capsys)
    torch.save({"epoch": 3}, last)
    assert call(monkeypatch, distill, f"--resume {out}") == 2
    assert "last.pt" in error_of(capsys)
    last.unlink()
    assert call(monkeypatch, distill, f"--resume {out}") == 0 and last.exists()

def test_two_runs_cannot_share_a_folder(world, tmp_path):
    runs = [start(options(world, tmp_path / "run", "--noise 0.1 --epochs 20")) for _ in range(2)]
    assert sorted(run.wait(120) for run in runs) == [0, 2]
    assert len(log_of(tmp_path / "run")) == 20

@pytest.mark.parametrize("method", ["distill", "contrastive"])
def test_two_processes_end_where_one_does(world, tmp_path, method):
    more = f"--noise 0.1 0.3 --max-steps 8 --lr 1e-3 --method {method}"
    one = start(options(world, tmp_path / "one", more))
    assert one.wait(120) == 0, one.stdout.read()
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    two = start(options(world, tmp_path / "two", more), launcher)
    assert two.wait(120) == 0, two.stdout.read()
    files = world / "vit.pth", tmp_path / "one" / "student.pth", tmp_path / "two" / "student.pth"
    begin, one, two = (torch.cat([value.flatten() for value in
                                  torch.load(file, weights_only=True).values()]) for file in files)
    assert (one - two).norm() < 0.05 * (one - begin).norm()
    logs = [log_of(tmp_path / name)[-1] for name in ("one", "two")]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-3)

def test_a_compiled_run_is_one_graph_and_ends_like_an_eager_one(world, tmp_path, monkeypatch):
    compiled, graphs = torch.compile, []
    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile",
                        lambda f, **more: compiled(f, backend=count, fullgraph=True, **more))
    for name in ("no-compile", "compile"):
        more = f"--noise 0.2 --epochs 4 --batch-size 10 --{name}"
        assert call(monkeypatch, distill, options(world, tmp_path / name, more)) == 0
    assert len(graphs) == 2  # the trial, and one that is whole and not compiled again
    assert same(tmp_path / "no-compile", tmp_path / "compile")

def test_without_a_c_compiler_a_run_is_not_compiled_and_says_so(world, tmp_path):
    process = start(options(world, tmp_path / "run", "--noise 0.2 --compile"), CXX="/nowhere/c++")
    assert process.wait(120) == 0 and "warning" in process.stdout.read()

def test_fresh_weights_are_the_seed_s_with_or_without_decoding(world, tmp_path, monkeypatch):
    more = f"--noise 0.1 --method supervised --max-steps 3 --root {tmp_path}/cache --workers 1"
    for name in ("decoding", "decoded"):
        assert call(monkeypatch, distill, options(world, tmp_path / name, more)) == 0
    assert same(tmp_path / "decoding", tmp_path / "decoded")

def test_a_loss_that_is_not_finite_stops_the_run_with_the_last_good_checkpoint(
        world, tmp_path, monkeypatch, capsys):
    state = torch.load(world / "vit.pth", weights_only=True)
    state["norm.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    more = f"--noise 0.1 --weights {tmp_path}/nan.pth"
    assert call(monkeypatch, distill, options(world, tmp_path / "a", more)) == 2
    assert "step 1" in error_of(capsys) and not (tmp_path / "a" / "last.pt").exists()

    loss, calls = distill.distill_loss, []
    def explode(*arguments):  # at the last step of the second epoch the gradient alone is bad
        total, terms = loss(*arguments)
        calls.append(1)
        bad = len(calls) - 1 == 12  # configure() has looked at the weights once
        return (total + 0 * total.detach().new_zeros(()).log() * total if bad else total), terms
    monkeypatch.setattr(distill, "distill_loss", explode)
    assert call(monkeypatch, distill, options(world, tmp_path / "b", "--noise 0.1 --epochs 3")) == 2
    assert "step 12" in error_of(capsys) and len(log_of(tmp_path / "b")) == 1
    assert torch.load(tmp_path / "b" / "last.pt", weights_only=True)["log"][-1]["epoch"] == 1

def test_a_full_disk_is_an_error_and_no_more(world, tmp_path):
    """With a limit on the size of files, which ends a write as a full disk does."""
    program = f"""
import resource, runpy, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
runpy.run_path({str(HERE / "distill.py")!r}, run_name="__main__")"""
    for name, root in (("decoding", tmp_path / "cache"), ("checkpoint", world / "cache")):
        more = f"--noise 0.1 --root {root} --batch-size 4"
        if name == "decoding":
            more += " --data-size 32 --img-size 32"
        command = [sys.executable, "-c", program, *options(world, tmp_path / name, more)]
        done = subprocess.run(command, text=True, capture_output=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(lines) == 1 and "cannot write" in lines[0], lines
        assert not list(tmp_path.glob("**/*.part")) and not (tmp_path / name / "last.pt").exists()
    assert not list((tmp_path / "cache").iterdir())

# ---- What users do wrong -------------------------------------------------------------------------

BAD = {  # options: a word of the message
    "--data nowhere": "nowhere", "--data {tmp}": "{tmp}", "--weights vit_giant": "vit_giant",
    "--weights {tmp}": "weights", "--weights {text}": "damaged", "--img-size 20": "20",
    "--weights scratch --img-size 20": "20", "--noise -1": "noise", "--noise inf": "noise",
    "--mask 1.5": "mask", "--salt 2": "salt", "--mask 0.1 0.2 0.3": "mask", "--blur 8": "blur",
    "--noise 0.5 0.1": "noise", "--clean 1.5": "clean", "--batch-size 1000": "1000",
    "--batch-size 0": "batch",
    "--lr 0": "lr", "--lr nan": "lr", "--epochs 0": "epochs", "--pretrain-epochs 0": "pretrain",
    "--max-steps 0": "max-steps", "--max-images 0": "max-images", "--img-size 0": "img-size",
    "--data-size -16": "data-size", "--loss-weights 1 -1 1": "weights", "--warmup 2": "warmup",
    "--loss-weights 0 0 0": "weights", "--loss-weights 0 0 1 --attn-blocks 0": "loss",
    "--noise 0": "loss", "--clean 1": "loss", "--method contrastive --batch-size 1": "loss",
    "--attn-blocks 3": "attn-blocks", "--attn-blocks -1": "attn-blocks",
    "--device cuda:99": "cuda:99", "--device abacus": "abacus",
    "--weight-decay -1": "decay", "--seed -1": "seed",
    "--seed 100000000000000": "seed", "--data-size 1000000": "memory", "--out {text}": "text",
    "--method magic": "magic", "--frobnicate 1": "frobnicate",
}

@pytest.mark.parametrize("case", BAD)
def test_bad_options_end_in_one_line(case, world, tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text("hello")
    places = {"tmp": tmp_path, "text": tmp_path / "text"}
    more = case.format(**places)
    more += "" if any(f"--{kind}" in more for kind in distill.DISTORTIONS) else " --noise 0.1"
    assert call(monkeypatch, distill, options(world, tmp_path / "run", more)) == 2
    assert BAD[case].format(**places) in error_of(capsys)
    assert (tmp_path / "text").read_text() == "hello" and not (tmp_path / "run").exists()

@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_in_one_split_alone_is_named(split, world, tmp_path, monkeypatch, capsys):
    make_folder(tmp_path, ("train", "val"), "both")
    make_folder(tmp_path, (split,), "lonely")
    command = options(world, tmp_path / "run", f"--data {tmp_path} --batch-size 2 --noise 0.1")
    assert call(monkeypatch, distill, command) == 2
    assert "lonely" in error_of(capsys)

def test_torchvision_and_the_network_are_named_where_they_are_missing(
        world, tmp_path, monkeypatch, capsys):
    from torchvision import datasets
    def offline(*arguments, **more):
        raise OSError("no network")
    for module in (datasets.cifar, datasets.stl10):
        monkeypatch.setattr(module, "download_and_extract_archive", offline)
    for data in ("cifar10", "stl10"):
        more = f"--data {data} --root {tmp_path}/data --noise 0.1"
        assert call(monkeypatch, distill, options(world, tmp_path / "run", more)) == 2
        message = error_of(capsys)
        assert "http" in message and f"{tmp_path}/data" in message and "stripes" in message
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')")
    broken = start(options(world, tmp_path / "run", "--noise 0.1"), PYTHONPATH=str(tmp_path))
    assert broken.wait(60) == 2
    assert broken.stdout.read().startswith("error: torchvision does not work")

def test_a_bug_keeps_its_traceback(world, tmp_path, monkeypatch):
    def buggy(*arguments, **more):
        [_, _] = (1,)
    monkeypatch.setattr(distill, "info_nce", buggy)
    with pytest.raises(ValueError, match="not enough values"):
        call(monkeypatch, distill,
             options(world, tmp_path / "run", "--noise 0.1 --method contrastive"))

@pytest.mark.parametrize("files, arguments, word", [
    ({}, "", "run"), ({"config.json": "[1"}, "", "run"), ({"config.json": "[1, 2]"}, "", "run"),
    ({"config.json": '{"hidden_size": 8}'}, "", "run"), ("run", "", "teacher.pth"),
    ("run", "--labels 0", "labels"), ("run", "--labels 1.5", "labels"),
    ("run", "--seeds 0", "seeds"), ("run", "--max-images 0", "max-images"),
    ("run", "--dtype float8", "float8"), ("run", "--device cuda:9", "cuda:9")])
def test_bad_input_to_the_evaluation(files, arguments, word, world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    if files == "run":
        assert call(monkeypatch, distill, options(world, out, "--noise 0.1 --max-steps 1")) == 0
        (out / "teacher.pth").unlink()
    else:
        out.mkdir()
        for name, text in files.items():
            (out / name).write_text(text)
    assert call(monkeypatch, evaluation, f"{out} {arguments}") == 2
    assert word in error_of(capsys)
