# SPDX-License-Identifier: MIT
"""Tests: python -m pytest -q test_distill.py"""

import ast
import json
import os
import re
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

import distill
import eval as evaluation

HERE = Path(__file__).parent
torch.set_num_threads(2)


# ---- Helpers -------------------------------------------------------------------------------------


def small_vit(**changes):
    sizes = dict(img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=1)
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


def options(world, out, *more):
    return [
        "--data",
        f"{world}/images",
        "--weights",
        f"{world}/vit.pth",
        "--root",
        f"{world}/cache",
        "--data-size",
        "16",
        "--img-size",
        "16",
        "--batch-size",
        "8",
        "--workers",
        "0",
        "--device",
        "cpu",
        "--epochs",
        "2",
        "--out",
        str(out),
        *map(str, more),
    ]


def call(monkeypatch, module, *arguments):
    """The exit status of a command line run in this process."""
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    try:
        module.run(module.main)
    except SystemExit as e:
        return e.code
    return 0


def start(*arguments, launcher=()):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.Popen(
        [sys.executable, *launcher, str(HERE / "distill.py"), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=env,
    )


# ---- The ViT -------------------------------------------------------------------------------------


def from_torchvision(state):
    """torchvision's names to DINO's."""
    rename = {
        "class_token": "cls_token",
        "conv_proj": "patch_embed.proj",
        "encoder.pos_embedding": "pos_embed",
        "encoder.ln": "norm",
        "ln_1": "norm1",
        "ln_2": "norm2",
        "self_attention.in_proj_": "attn.qkv.",
        "self_attention.out_proj": "attn.proj",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
    }
    out = {}
    for key, value in state.items():
        key = re.sub(r"encoder\.layers\.encoder_layer_(\d+)", r"blocks.\1", key)
        for old, new in rename.items():
            key = re.sub(rf"(^|\.){re.escape(old)}", rf"\1{new}", key)
        out[key] = value
    return {k: v for k, v in out.items() if not k.startswith("heads")}


def test_vit_agrees_with_torchvision():
    models = pytest.importorskip("torchvision.models.vision_transformer")
    torch.manual_seed(1)
    theirs = models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=3, num_heads=2, hidden_dim=128, mlp_dim=256
    ).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.1)
    ours = distill.ViT(32, 8, 128, 3, 2, mlp_ratio=2)
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    images, maps = torch.randn(4, 3, 32, 32), []
    with torch.no_grad():
        tokens = torch.cat(
            [theirs.class_token.expand(4, -1, -1), theirs._process_input(images)], dim=1
        )
        x = tokens + theirs.encoder.pos_embedding
        for layer in theirs.encoder.layers:
            y = layer.ln_1(x)
            maps.append(layer.self_attention(y, y, y, average_attn_weights=False)[1])
            x = layer(x)
        tokens = theirs.encoder(tokens)
        plain, mapped = ours(images), ours(images, attn_blocks=2)
    assert close(plain.cls, tokens[:, 0]) and close(plain.patches, tokens[:, 1:])
    assert close(mapped.cls, tokens[:, 0]) and close(mapped.patches, tokens[:, 1:])
    assert plain.attn == () and len(mapped.attn) == 2
    assert all(close(a, b) for a, b in zip(mapped.attn, maps[1:]))


def test_vit_with_registers_and_layer_scale_agrees_with_timm():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=28, depth=2).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.1)
    ours = distill.ViT(28, 14, 384, 2, 6, num_registers=4, layer_scale=True)
    state = ours.state_dict()
    state.update({k: v for k, v in theirs.state_dict().items() if k in state})
    state["register_tokens"] = theirs.reg_token.data
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), theirs.pos_embed.data], dim=1)
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        tokens, found = theirs.forward_features(images), ours(images, attn_blocks=1)
    assert close(found.cls, tokens[:, 0]) and close(found.patches, tokens[:, 5:])
    assert found.attn[0].shape == (2, 6, 9, 9)


def test_student_loads_strictly_into_timm():
    timm = pytest.importorskip("timm")
    state = distill.ViT(28, 14, 384, 12, 6, layer_scale=True).state_dict()
    timm.create_model("vit_small_patch14_dinov2", img_size=28, num_classes=0).load_state_dict(state)


@pytest.mark.parametrize("changes", [{}, dict(num_registers=3), dict(layer_scale=True)])
def test_parameter_names_are_dinos(changes):
    names = set(small_vit(**changes).state_dict())
    block = {
        f"{m}.{p}"
        for m in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for p in ("weight", "bias")
    } | ({"ls1.gamma", "ls2.gamma"} if "layer_scale" in changes else set())
    expected = {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
        "norm.weight",
        "norm.bias",
    } | {f"blocks.{i}.{name}" for i in range(2) for name in block}
    assert names == expected | ({"register_tokens"} if "num_registers" in changes else set())


def test_maps_are_float32_distributions_also_under_autocast():
    vit, images = small_vit(num_heads=2, num_registers=2), torch.randn(2, 3, 16, 16)
    for p in vit.parameters():
        nn.init.normal_(p, std=0.15)
    with torch.no_grad():
        exact = vit(images, attn_blocks=2)
        with torch.autocast("cpu", torch.bfloat16):
            rough, mapless = vit(images, attn_blocks=2), vit(images)
    for features in (exact, rough):
        for attn in features.attn:
            assert attn.shape == (2, 2, 7, 7) and attn.dtype == torch.float32
            assert (attn.sum(-1) - 1).abs().max() < 1e-5
    assert close(rough.cls.float(), exact.cls, 0.05) and close(mapless.cls.float(), exact.cls, 0.05)


def test_fast_attention_path_gives_the_plain_path_s_gradients():
    vit, images = small_vit(depth=1), torch.randn(4, 3, 16, 16)
    gradients = []
    for attn_blocks in (0, 1):  # the fused kernel, and explicit attention
        vit.zero_grad()
        vit(images, attn_blocks).patches.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in vit.parameters()]))
    assert close(*gradients)


@pytest.mark.parametrize("arguments", [(15, 8, 64, 1, 1), (16, 8, 64, 1, 3), (16, 0, 64, 1, 1)])
def test_vit_refuses_sizes_that_do_not_divide(arguments):
    with pytest.raises(ValueError):
        distill.ViT(*arguments)


def test_vit_refuses_other_images_and_too_many_maps():
    vit = small_vit()
    for images, blocks in (
        (torch.zeros(1, 3, 8, 8), 0),
        (torch.zeros(1, 1, 16, 16), 0),
        (torch.zeros(3, 16, 16), 0),
        (torch.zeros(1, 3, 16, 16), 3),
        (torch.zeros(1, 3, 16, 16), -1),
    ):
        with pytest.raises(ValueError):
            vit(images, blocks)


# ---- Weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(num_registers=3, layer_scale=True, mlp_ratio=2.0),
        dict(depth=3, embed_dim=128, num_heads=2, patch_size=4),
    ],
)
def test_architecture_is_read_off_the_state_dict(tmp_path, changes):
    vit = small_vit(**changes)
    state = {k: v.half() for k, v in vit.state_dict().items()}
    state |= {
        "mask_token": torch.zeros(1, 64),
        "head.weight": torch.zeros(2),
        "head_dist.bias": torch.zeros(1),
    }
    torch.save({"model": state, "epoch": 3}, tmp_path / "w.pth")
    found = distill.load_vit(str(tmp_path / "w.pth"), 16)
    images = torch.randn(2, 3, 16, 16)
    assert found.blocks[0].num_heads == vit.blocks[0].num_heads
    assert close(found(images).patches, vit(images).patches, 1e-2)
    assert all(p.dtype == torch.float32 for p in found.parameters())


def test_position_embeddings_are_resized_bicubically(tmp_path):
    vit = small_vit(img_size=64)
    torch.save(vit.state_dict(), tmp_path / "w.pth")
    found = distill.load_vit(str(tmp_path / "w.pth"), 40).pos_embed
    grid = vit.pos_embed[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    grid = (
        F.interpolate(grid, size=5, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    )
    assert close(found, torch.cat([vit.pos_embed[:, :1], grid], dim=1))
    assert torch.equal(distill.load_vit(str(tmp_path / "w.pth"), 64).pos_embed, vit.pos_embed)


def test_names_are_fetched_by_torch_hub_and_copied(monkeypatch):
    state, urls = small_vit().state_dict(), []

    def fetch(url, **kwargs):
        assert kwargs["weights_only"]
        urls.append(url)
        return state

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    for name in distill.WEIGHTS:
        vit = distill.load_vit(name, 16)
    assert (
        "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth"
        in urls
    )
    assert len(set(urls)) == 11
    with torch.no_grad():
        vit.cls_token.add_(1)
    assert not torch.equal(vit.cls_token, state["cls_token"])


def damage(state, case):
    if case == "missing key":
        del state["blocks.1.norm2.bias"]
    elif case == "unexpected key":
        state["blocks.0.extra"] = torch.zeros(1)
    elif case == "no patches":
        del state["patch_embed.proj.weight"]
    elif case == "shape":
        state["blocks.0.mlp.fc2.weight"] = torch.zeros(3, 3)
    elif case == "grid":
        state["pos_embed"] = torch.zeros(1, 4, 64)
    elif case == "width":
        state = distill.ViT(16, 8, 96, 1, 1).state_dict()
    elif case == "narrow":
        state = distill.ViT(16, 8, 32, 1, 1).state_dict()
    elif case == "flat positions":
        state["pos_embed"] = torch.zeros(5)
    elif case == "no tensors":
        state = {"pos_embed": "none"}
    elif case == "a list":
        state = [torch.zeros(1)]
    return state


@pytest.mark.parametrize(
    "case, message",
    [
        ("missing key", "blocks.1.norm2.bias"),
        ("unexpected key", "blocks.0.extra"),
        ("shape", "fc2"),
        ("no patches", "patch_embed.proj.weight"),
        ("grid", "architecture"),
        ("width", "96"),
        ("narrow", "32"),
        ("flat positions", "w.pth"),
        ("no tensors", "w.pth"),
        ("a list", "w.pth"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, case, message):
    torch.save(damage(small_vit().state_dict(), case), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        distill.load_vit(str(tmp_path / "w.pth"), 16)


def test_weight_files_are_data(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "attacked"),)

    torch.save({"cls_token": Attack()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth"):
        distill.load_vit(str(tmp_path / "w.pth"), 16)
    assert not (tmp_path / "attacked").exists()


# ---- The distortion ------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.7])
def test_blur_is_torchvisions(sigma):
    gaussian_blur = pytest.importorskip("torchvision.transforms.functional").gaussian_blur
    images = torch.rand(3, 3, 20, 24)
    kernel = 2 * int(np.ceil(2 * sigma)) + 1
    assert close(distill.distort(images, blur=sigma), gaussian_blur(images, kernel, sigma), 1e-5)


def test_a_range_of_blur_is_one_sigma_per_image():
    gaussian_blur = pytest.importorskip("torchvision.transforms.functional").gaussian_blur
    images, g = torch.rand(5, 3, 16, 16), torch.Generator()
    found = distill.distort(images, blur=(0.5, 2.0), generator=g.manual_seed(3))
    sigmas = 0.5 + 1.5 * torch.rand(5, 1, 1, 1, generator=g.manual_seed(3))
    for image, sigma, ours in zip(images, sigmas.flatten().tolist(), found):
        assert close(ours, gaussian_blur(image, 9, sigma), 1e-5)
    assert torch.isfinite(distill.distort(images, blur=(0.0, 1.0), generator=g)).all()


def test_noise_and_mask_have_the_asked_strength():
    grey, g = torch.full((8, 3, 64, 64), 0.5), torch.Generator().manual_seed(0)
    noisy = distill.distort(grey, noise=0.1, generator=g)
    assert abs(noisy.std() - 0.1) < 1e-3 and abs(noisy.mean() - 0.5) < 1e-3
    masked = distill.distort(grey, mask=0.3, generator=g)
    black = masked == 0
    assert abs(black.float().mean() - 0.3) < 0.01
    assert torch.equal(black[:, 0], black[:, 1]) and torch.equal(black[:, 0], black[:, 2])
    assert (distill.distort(grey, mask=1.0) == 0).all()
    shares = (distill.distort(grey, mask=(0.1, 0.9), generator=g) == 0).float().mean((1, 2, 3))
    assert shares.min() > 0.05 and shares.max() < 0.95 and shares.std() > 0.05


def test_order_is_blur_noise_mask_clamp():
    images, seed = torch.rand(2, 3, 16, 16), 5
    found = distill.distort(images, 0.5, 1.0, 0.4, torch.Generator().manual_seed(seed))
    g = torch.Generator().manual_seed(seed)
    expected = distill.distort(images, blur=1.0) + 0.5 * torch.randn(images.shape, generator=g)
    expected = expected * (torch.rand(2, 1, 16, 16, generator=g) >= 0.4)
    assert torch.allclose(found, expected.clamp(0, 1))
    assert found.min() == 0 and found.max() == 1


def test_random_numbers_come_from_the_generator_alone():
    images = torch.rand(2, 3, 8, 8)
    state = torch.get_rng_state()
    a, b = (
        distill.distort(images, (0.1, 0.4), 0.5, (0, 0.5), torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert torch.equal(a, b) and torch.equal(state, torch.get_rng_state())
    assert torch.equal(distill.distort(images), images) and distill.distort(images) is not images


@pytest.mark.parametrize(
    "severity",
    [
        dict(noise=-0.1),
        dict(noise=float("nan")),
        dict(noise=float("inf")),
        dict(mask=1.1),
        dict(mask=-1),
        dict(blur=-1),
        dict(blur=4.0),
        dict(noise=(0.5, 0.1)),
        dict(mask=(0.5, 1.5)),
        dict(noise=(1, 2, 3)),
    ],
)
def test_severities_out_of_range_are_refused(severity):
    with pytest.raises(ValueError):
        distill.distort(torch.rand(1, 3, 8, 8), **severity)


@pytest.mark.parametrize(
    "images",
    [torch.rand(3, 8, 8), torch.rand(1, 1, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)],
)
def test_distort_refuses_what_are_no_images(images):
    with pytest.raises(ValueError):
        distill.distort(images, noise=0.1)


# ---- The loss ------------------------------------------------------------------------------------


def test_loss_is_the_formula_written_another_way():
    s, t = random_features(0), random_features(1)
    total, terms = distill.distill_loss(s, t, (1.0, 2.0, 3.0))
    unit = [[x / x.norm(dim=-1, keepdim=True) for x in (f.cls, f.patches)] for f in (s, t)]
    globally = 1 - (unit[0][0] * unit[1][0]).sum() / 3
    patch = 1 - (unit[0][1] * unit[1][1]).sum() / 12
    attn = sum(F.kl_div(a.log(), b, reduction="sum") for a, b in zip(s.attn, t.attn)) / (
        2 * 3 * 2 * 5
    )
    for name, value in (("global", globally), ("patch", patch), ("attn", attn)):
        assert torch.allclose(terms[name], value, atol=1e-6)
    assert torch.allclose(total, globally + 2 * patch + 3 * attn, atol=1e-5)


def test_loss_of_equals_is_zero_and_without_maps_has_no_attention_term():
    f = random_features(0)
    assert all(abs(v) < 1e-6 for v in distill.distill_loss(f, f)[1].values())
    total, terms = distill.distill_loss(random_features(0, maps=0), random_features(1, maps=0))
    assert terms["attn"] == 0 and torch.allclose(total, terms["global"] + terms["patch"])


def test_loss_is_finite_for_one_hot_maps():
    s, t = random_features(0, maps=1), random_features(1, maps=1)
    logits = (torch.randn(3, 2, 5, 5) * 300).requires_grad_()
    s.attn, t.attn = (logits.softmax(-1),), (torch.eye(5).expand(3, 2, 5, 5),)
    loss = distill.distill_loss(s, t)[0]
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()


def test_loss_is_float32_under_autocast():
    s, t = random_features(0), random_features(1)
    with torch.autocast("cpu", torch.bfloat16):
        rough = distill.distill_loss(distill.Features(s.cls, s.patches, s.attn), t)[0]
    assert rough.dtype == torch.float32 and rough == distill.distill_loss(s, t)[0]


@pytest.mark.parametrize("weights", [(1, 1), (1, -1, 1), (0, 0, 0), (1, 1, float("nan"))])
def test_loss_refuses_bad_weights(weights):
    with pytest.raises(ValueError):
        distill.distill_loss(random_features(0), random_features(1), weights)


def test_loss_refuses_unequal_shapes():
    for other in (random_features(1, maps=1), random_features(1, D=9), random_features(1, N=5)):
        with pytest.raises(ValueError):
            distill.distill_loss(random_features(0), other)


# ---- The probe -----------------------------------------------------------------------------------


def blobs(n, D=20, classes=4, spread=1.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, D, generator=torch.Generator().manual_seed(99))
    y = torch.randint(classes, (n,), generator=g)
    return centres[y] + spread * torch.randn(n, D, generator=g), y


def test_probe_is_within_a_point_of_scikit_learns_best():
    linear_model = pytest.importorskip("sklearn.linear_model")
    (x, y), (test_x, test_y) = blobs(2500), blobs(5000, seed=1)
    scores = [
        linear_model.LogisticRegression(C=C, max_iter=500)
        .fit((x - x.mean(0)) / x.std(0), y)
        .score((test_x - x.mean(0)) / x.std(0), test_y)
        for C in 10.0 ** np.arange(-5, 3)
    ]
    assert evaluation.linear_probe(x, y, test_x, test_y) > max(scores) - 0.01


def test_probe_is_near_the_best_there_is():
    (x, y), (test_x, test_y) = blobs(2500), blobs(5000, seed=1)
    centres = torch.randn(4, 20, generator=torch.Generator().manual_seed(99))
    bayes = (torch.cdist(test_x, centres).argmin(1) == test_y).float().mean()  # knows the centres
    assert bayes - 0.02 < evaluation.linear_probe(x, y, test_x, test_y) <= bayes + 0.02


def test_probe_copes_with_constant_features_absent_classes_and_few_images():
    x, y = blobs(60)
    x[:, 3], x[:, 4] = 0.1, 0
    kept = y != 2
    predict = evaluation.fit_probe(x[kept], y[kept] * 10)
    assert set(predict(x).tolist()) == {0, 10, 30}
    x[:, 3] = 7.0  # a constant that changes at test time counts for nothing
    assert torch.equal(predict(x)[kept], evaluation.fit_probe(x[kept], y[kept] * 10)(x)[kept])
    assert evaluation.fit_probe(x[:1], y[:1])(x).unique().tolist() == [y[0]]
    assert evaluation.linear_probe(x[:6], y[:6], x[:6], y[:6]) == 1


def test_probe_is_deterministic_and_refuses_bad_input():
    x, y = blobs(300)
    torch.manual_seed(5)
    first = evaluation.fit_probe(x, y)(x)
    torch.manual_seed(6)
    assert torch.equal(first, evaluation.fit_probe(x.numpy(), y.numpy())(x))
    for bad in ((x, y[:-1]), (x[:0], y[:0]), (x * float("nan"), y), (x[0], y[:1])):
        with pytest.raises(ValueError):
            evaluation.fit_probe(*bad)


# ---- Pieces to copy, imports ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, names, use",
    [
        (
            "distill.py",
            ["Features", "Block", "ViT"],
            "ViT(16, 8, 64, 2, 1)(torch.rand(2, 3, 16, 16), 1).attn[0]",
        ),
        ("distill.py", ["distort"], "distort(torch.rand(2, 3, 16, 16), (0, 0.1), 1.0, 0.3)"),
        (
            "distill.py",
            ["Features", "distill_loss"],
            "distill_loss(Features(torch.rand(2, 4), torch.rand(2, "
            "3, 4)), Features(torch.rand(2, 4), torch.rand(2, 3, 4)))",
        ),
        (
            "eval.py",
            ["fit_probe"],
            "fit_probe(torch.rand(50, 3), torch.arange(50) % 3)(torch.rand(4, 3))",
        ),
    ],
)
def test_each_piece_runs_when_cut_out(file, names, use):
    text = (HERE / file).read_text()
    pieces = [
        ast.get_source_segment(text, node)
        for node in ast.parse(text).body
        if getattr(node, "name", "") in names
    ]
    assert len(pieces) == len(names)
    head = "import torch\nimport torch.nn as nn\nimport torch.nn.functional as F\n"
    exec(head + "\n\n".join(pieces) + "\n\n" + use, {})


def test_imports_do_nothing_and_need_no_torchvision(tmp_path):
    program = (
        "import sys; sys.modules['torchvision'] = None; import distill, eval; "
        "print(distill.textures(20, 32, 0)[0].shape)"
    )
    out = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    assert out.stdout == "(20, 32, 32, 3)\n" and not list(tmp_path.iterdir()), out.stderr


def test_the_two_files_stay_short():
    lines = [
        line for f in ("distill.py", "eval.py") for line in (HERE / f).read_text().splitlines()
    ]
    assert len(lines) <= 700 and max(map(len, lines)) <= 100


# ---- The data ------------------------------------------------------------------------------------


def config(world, **changes):
    from argparse import Namespace

    base = dict(
        data=f"{world}/images",
        root=f"{world}/cache",
        data_size=16,
        max_images=None,
        seed=0,
        workers=0,
    )
    return Namespace(**{**base, **changes})


def test_textures_are_drawn_from_the_seed():
    (a, labels), (b, _), (c, _) = (distill.textures(200, 32, seed) for seed in (1, 1, 2))
    assert a.dtype == np.uint8 and np.array_equal(a, b) and not np.array_equal(a, c)
    assert np.bincount(labels).tolist() == [20] * 10


def test_subsets_are_class_balanced_and_fixed_by_the_seed():
    labels = np.repeat([0, 1, 2], [50, 20, 5])
    assert np.bincount(labels[distill.subset(labels, 30, 1)]).tolist() == [
        13,
        12,
        5,
    ] or np.bincount(labels[distill.subset(labels, 30, 1)]).tolist() == [12, 13, 5]
    assert np.bincount(labels[distill.subset(labels, 3, 1)]).tolist() == [1, 1, 1]
    assert np.array_equal(distill.subset(labels, 9, 1), distill.subset(labels, 9, 1))
    assert not np.array_equal(distill.subset(labels, 9, 1), distill.subset(labels, 9, 2))
    assert np.array_equal(distill.subset(labels, 75, 3), np.arange(75))


def test_folders_of_all_modes_and_sizes_are_read_as_rgb_once(tmp_path):
    pytest.importorskip("torchvision")
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8))
    for split in ("train", "test"):
        (tmp_path / split / "a b[1]").mkdir(parents=True)
        for i, mode in enumerate(("RGB", "L", "P", "RGBA", "CMYK", "LA")):
            rgb.resize((30 + i, 50 - i)).convert(mode).save(
                tmp_path / split / "a b[1]" / f"{i}.{'jpg' if mode == 'CMYK' else 'png'}"
            )
    cfg = config(tmp_path, data=str(tmp_path), root=str(tmp_path / "cache"), workers=2)
    images, labels, test, _ = distill.load_data(cfg, True)
    assert (
        images.shape == (6, 16, 16, 3)
        and isinstance(images, np.memmap)
        and labels.tolist() == [0] * 6
    )
    cached = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    assert np.array_equal(distill.load_data(cfg, True)[0], images)
    assert cached == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    (tmp_path / "train" / "a b[1]" / "0.png").unlink()
    assert len(distill.load_data(cfg, True)[0]) == 5


def test_an_unreadable_image_is_named_and_leaves_no_array(world, tmp_path):
    pytest.importorskip("torchvision")
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        (tmp_path / split / "a" / "broken.jpg").write_bytes(b"no image")
    for workers in (0, 1):
        with pytest.raises(ValueError, match="broken.jpg"):
            distill.load_data(
                config(world, data=str(tmp_path), root=str(tmp_path / "c"), workers=workers), True
            )
    assert not list(tmp_path.glob("c/*.npy"))


# ---- Runs ----------------------------------------------------------------------------------------


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["distill", "contrastive", "supervised"])
def test_a_run_leaves_its_folder_and_is_evaluated(world, tmp_path, monkeypatch, capsys, method):
    out = tmp_path / "run"
    more = ["--noise", 0.1, 0.3, "--mask", 0.2, "--method", method]
    assert call(monkeypatch, distill, *options(world, out, *more)) == 0
    rows = log_of(out)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 6), (2, 12)]
    assert {"loss", "lr", "images_per_s", "cos_teacher", "cos_student"} <= set(rows[0])
    assert (rows[0]["patch"] is None) == (method != "distill")
    saved = json.loads((out / "config.json").read_text())
    assert saved["noise"] == [0.1, 0.3] and saved["mask"] == 0.2 and saved["lr"] == 1e-4
    states = [torch.load(out / f"{who}.pth", weights_only=True) for who in ("teacher", "student")]
    original = torch.load(world / "vit.pth", weights_only=True)
    assert all(torch.equal(states[0][k], original[k]) for k in original)
    assert states[1].keys() == original.keys() and not torch.equal(
        states[1]["norm.weight"], original["norm.weight"]
    )
    assert call(monkeypatch, distill, *options(world, out, *more)) == 2  # a run is not overwritten
    assert "--resume" in capsys.readouterr().err

    assert call(monkeypatch, evaluation, out, "--labels", 1.0, 0.2, "--seeds", 2) == 0
    results = json.loads((out / "results.json").read_text())
    rows = {row["distortion"]: row for row in results["rows"]}
    names = list(rows)
    assert names[:2] == ["clean", "noise=0.1-0.3+mask=0.2"] and len(names) >= 9
    assert [name for name in names if rows[name]["seen"]] == names[1:2]
    assert rows["clean"]["recovered"] is None and rows["clean"]["cos_teacher"][0] == pytest.approx(
        1
    )
    for row in results["rows"]:
        assert {
            "cos_teacher",
            "cos_student",
            "probe_teacher",
            "probe_student",
            "clean_probe_teacher",
            "clean_probe_student",
            "recovered",
        } <= set(row)
        assert all(len(row[k]) == 2 for k in row if k.startswith(("cos", "probe", "clean_")))
    assert [label["share"] for label in results["labels"]] == [1.0, 0.2]
    assert results["labels"][0]["probe_student"] == rows[names[1]]["probe_student"]
    assert Image.open(out / "attention.png").size[0] > 5 * 160
    assert names[1] in capsys.readouterr().out


def test_scratch_trains_its_teacher_first_and_needs_no_torchvision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert (
        call(
            monkeypatch,
            distill,
            "--max-images",
            400,
            "--pretrain-epochs",
            3,
            "--max-steps",
            3,
            "--batch-size",
            40,
            "--device",
            "cpu",
        )
        == 0
    )
    out = tmp_path / "runs" / "textures-noise0.08+blur1.4"
    assert log_of(out)[0]["step"] == 3 and log_of(out)[0]["epoch"] == 1
    assert call(monkeypatch, evaluation, out, "--seeds", 1, "--max-images", 60) == 0
    assert (out / "results.json").exists() and Image.open(out / "attention.png").size == (850, 1020)


def test_distillation_brings_the_student_to_the_teacher(world, tmp_path, monkeypatch):
    out = tmp_path / "run"
    more = ["--noise", 0.5, "--lr", 2e-3, "--epochs", 30]
    assert call(monkeypatch, distill, *options(world, out, *more)) == 0
    first, last = log_of(out)[0], log_of(out)[-1]
    assert last["loss"] < 0.8 * first["loss"] and last["cos_student"] > last["cos_teacher"]
    assert first["lr"] > last["lr"] and last["lr"] < 1e-4


def same(a, b):
    a, b = (torch.load(f / "student.pth", weights_only=True) for f in (a, b))
    return all(torch.equal(a[k], b[k]) for k in a)


def test_a_killed_run_resumes_to_the_same_bits(world, tmp_path):
    more = ["--epochs", 40, "--noise", 0.2]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    process = start(*options(world, whole, *more))
    assert process.wait(120) == 0, process.stdout.read()
    rng = np.random.default_rng(0)
    for attempt in range(5):
        process = start(*options(world, broken, *more, *(["--resume"] if attempt else [])))
        while process.poll() is None and not (broken / "config.json").exists():
            time.sleep(0.01)
        begun = (broken / "last.pt").stat().st_mtime_ns if (broken / "last.pt").exists() else 0
        while process.poll() is None and not (
            (broken / "last.pt").exists() and (broken / "last.pt").stat().st_mtime_ns > begun
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    process = start(*options(world, broken, *more, "--resume"))
    assert process.wait(120) == 0, process.stdout.read()
    assert same(whole, broken)
    strip = [
        [{k: v for k, v in row.items() if k != "images_per_s"} for row in log_of(f)]
        for f in (whole, broken)
    ]
    assert strip[0] == strip[1] and len(strip[0]) == 40


@pytest.mark.parametrize("method", ["distill", "contrastive"])
def test_two_processes_end_where_one_does(world, tmp_path, method):
    more = ["--noise", 0.1, 0.3, "--max-steps", 8, "--lr", 1e-3, "--method", method]
    process = start(*options(world, tmp_path / "one", *more))
    two = start(
        *options(world, tmp_path / "two", *more),
        launcher=["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    )
    assert process.wait(120) == 0 and two.wait(120) == 0, two.stdout.read()
    begin, one, two = (
        torch.cat([v.flatten() for v in torch.load(f, weights_only=True).values()])
        for f in (
            world / "vit.pth",
            tmp_path / "one" / "student.pth",
            tmp_path / "two" / "student.pth",
        )
    )
    assert (one - two).norm() < 0.05 * (one - begin).norm()
    logs = [log_of(tmp_path / f)[-1] for f in ("one", "two")]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-3)


def test_compiled_and_eager_steps_agree(world):
    from argparse import Namespace

    cfg = Namespace(method="distill", img_size=16, attn_blocks=1, loss_weights=[1.0, 1.0, 1.0])
    results = []
    for transform in (lambda m: m, lambda m: torch.compile(m, fullgraph=True, dynamic=False)):
        student, teacher = small_vit(), small_vit()
        objective = distill.Objective(student, cfg, 2)
        torch.manual_seed(3)
        clean = torch.rand(4, 3, 8, 8)
        with torch.no_grad():
            target = transform(lambda x: teacher(distill.prepare(x, 16), 1))(clean)
        loss, terms = transform(objective)(torch.rand(4, 3, 8, 8), target, torch.zeros(4))
        loss.backward()
        results.append([loss.detach()[None], *(p.grad.flatten() for p in student.parameters())])
    assert close(*(torch.cat(result) for result in results))


@pytest.mark.parametrize("method", ["distill", "contrastive"])
def test_keeping_the_teachers_features_changes_no_bit(world, tmp_path, monkeypatch, method):
    forward, calls = distill.ViT.forward, []

    def count(vit, images, *rest):
        calls.append(torch.is_grad_enabled() or torch.is_inference_mode_enabled())
        return forward(vit, images, *rest)

    monkeypatch.setattr(distill.ViT, "forward", count)
    steps = []
    for name in ("kept", "computed"):
        if name == "computed":  # as if the features of an image filled a disk
            monkeypatch.setattr(torch.Tensor, "nbytes", 10**12)
        calls.clear()
        more = ["--noise", 0.2, "--epochs", 4, "--lr", 1e-3, "--method", method]
        assert call(monkeypatch, distill, *options(world, tmp_path / name, *more)) == 0
        steps.append([log_of(tmp_path / name)[-1]["step"], calls.count(False)])
    total, per_epoch = steps[1][0], steps[1][0] // 4
    assert steps[1][1] == total and per_epoch <= steps[0][1] < total
    assert same(tmp_path / "kept", tmp_path / "computed")


def test_embedding_keeps_no_patches_in_memory():
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("no /proc")
    from argparse import Namespace

    pages = []

    def vit(x):
        pages.append(int(statm.read_text().split()[1]))
        tokens = torch.ones(len(x), 2001, 256)
        return distill.Features(tokens[:, 0], tokens[:, 1:])

    cfg = Namespace(device="cpu", batch_size=32, dtype="float32", img_size=8)
    found = distill.embed(vit, np.zeros((512, 8, 8, 3), np.uint8), cfg)
    assert found.shape == (512, 256)  # of 1 GB of tokens
    assert (max(pages) - pages[0]) * os.sysconf("SC_PAGE_SIZE") < 4e8


def test_a_compiled_run_compiles_each_graph_once(world, tmp_path, monkeypatch):
    compiled, graphs = torch.compile, []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **more: compiled(f, backend=count, **more))
    for name in ("off", "on"):
        more = ["--noise", 0.2, "--epochs", 4, "--batch-size", 10, "--compile", name]
        assert call(monkeypatch, distill, *options(world, tmp_path / name, *more)) == 0
    assert len(graphs) == 2  # the teacher's features and the student's loss, whole
    assert same(tmp_path / "off", tmp_path / "on")


def test_fresh_weights_are_the_seed_s_whether_images_were_decoded_or_not(
    world, tmp_path, monkeypatch
):
    more = ["--method", "supervised", "--max-steps", 3, "--root", tmp_path / "cache"]
    for name in ("decoding", "decoded"):
        assert call(monkeypatch, distill, *options(world, tmp_path / name, *more)) == 0
    assert same(tmp_path / "decoding", tmp_path / "decoded")


def test_a_loss_that_is_not_finite_stops_the_run(world, tmp_path, monkeypatch, capsys):
    state = torch.load(world / "vit.pth", weights_only=True)
    state["norm.weight"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    out = tmp_path / "run"
    arguments = options(world, out)
    arguments[arguments.index("--weights") + 1] = str(tmp_path / "nan.pth")
    assert call(monkeypatch, distill, *arguments) == 2
    assert "step 1" in capsys.readouterr().err and not (out / "last.pt").exists()


def test_resume_refuses_what_does_not_fit_and_ends_what_has(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert call(monkeypatch, distill, *options(world, out, "--resume")) == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert call(monkeypatch, distill, *options(world, out, "--max-steps", 7)) == 0
    before = (out / "last.pt").read_bytes()
    assert call(monkeypatch, distill, *options(world, out, "--max-steps", 7, "--resume")) == 0
    assert "finished" in capsys.readouterr().out
    assert (
        call(monkeypatch, distill, *options(world, out, "--max-steps", 7, "--lr", 0.5, "--resume"))
        == 2
    )
    assert "--lr" in capsys.readouterr().err and (out / "last.pt").read_bytes() == before
    (out / "last.pt").write_bytes(before[:1000])
    assert call(monkeypatch, distill, *options(world, out, "--max-steps", 7, "--resume")) == 2
    assert "last.pt" in capsys.readouterr().err
    (out / "last.pt").unlink()
    assert call(monkeypatch, distill, *options(world, out, "--max-steps", 7, "--resume")) == 0
    assert (out / "last.pt").exists()


def test_memory_does_not_grow_with_epochs(world, tmp_path, monkeypatch):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1])

    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc")
    sizes, write = [], distill.write

    def measure(path, content):
        if path.endswith("student.pth"):
            sizes.append(resident())
        write(path, content)

    monkeypatch.setattr(distill, "write", measure)
    assert (
        call(
            monkeypatch,
            distill,
            *options(world, tmp_path / "run", "--epochs", 60, "--max-images", 8),
        )
        == 0
    )
    assert len(sizes) == 60 and sizes[-1] < 1.05 * sizes[10]


BAD = {  # what is wrong: (options, a word of the message)
    "unknown data": (["--data", "nowhere"], "nowhere"),
    "empty folder": (["--data", "{tmp}"], "train"),
    "unknown weights": (["--weights", "vit_giant"], "vit_giant"),
    "weights are a folder": (["--weights", "{tmp}"], "weights"),
    "weights are text": (["--weights", "{text}"], "damaged"),
    "image no multiple of the patch": (["--img-size", 20], "multiple"),
    "negative noise": (["--noise", -1], "noise"),
    "noise without end": (["--noise", "inf"], "noise"),
    "noise a word": (["--noise", "much"], "noise"),
    "mask above 1": (["--mask", 1.5], "mask"),
    "three masks": (["--mask", 0.1, 0.2, 0.3], "values"),
    "range upside down": (["--noise", 0.5, 0.1], "noise"),
    "blur wider than the image": (["--blur", 8], "blur"),
    "negative blur": (["--blur", -2], "blur"),
    "batch larger than the data": (["--batch-size", 1000], "1000"),
    "no batch": (["--batch-size", 0], "batch"),
    "half a batch": (["--batch-size", 2.5], "batch"),
    "no learning": (["--lr", 0], "lr"),
    "learning backwards": (["--lr", -1e-3], "lr"),
    "learning rate not a number": (["--lr", "nan"], "lr"),
    "no epochs": (["--epochs", 0], "epochs"),
    "negative epochs": (["--epochs", -3], "epochs"),
    "no pretraining": (["--pretrain-epochs", 0], "pretrain"),
    "no steps": (["--max-steps", 0], "max-steps"),
    "no images": (["--max-images", 0], "max-images"),
    "no pixels": (["--img-size", 0], "img-size"),
    "negative pixels": (["--data-size", -16], "data-size"),
    "negative weight": (["--loss-weights", 1, -1, 1], "loss"),
    "no weights": (["--loss-weights", 0, 0, 0], "loss"),
    "two weights": (["--loss-weights", 1, 1], "loss"),
    "weight not a number": (["--loss-weights", 1, 1, "nan"], "loss"),
    "too many maps": (["--attn-blocks", 3], "3"),
    "negative maps": (["--attn-blocks", -1], "attn"),
    "absent device": (["--device", "cuda:99"], "cuda:99"),
    "unknown device": (["--device", "abacus"], "abacus"),
    "unknown method": (["--method", "magic"], "magic"),
    "unknown dtype": (["--dtype", "float8"], "float8"),
    "warm-up longer than the run": (["--warmup", 2], "warmup"),
    "negative decay": (["--weight-decay", -1], "decay"),
    "negative seed": (["--seed", -1], "seed"),
    "endless seed": (["--seed", 10**14], "seed"),
    "image larger than memory": (["--data-size", 1000000], "memory"),
    "negative workers": (["--workers", -1], "workers"),
    "unknown option": (["--frobnicate", 1], "frobnicate"),
    "output is a file": (["--out", "{text}"], "text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line(case, world, tmp_path, monkeypatch, capsys):
    (tmp_path / "text").write_text("hello")
    more, word = BAD[case]
    more = [str(m).format(tmp=tmp_path, text=tmp_path / "text") for m in more]
    out = tmp_path / "run"
    assert call(monkeypatch, distill, *options(world, out, *more)) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and word in errors[0], errors
    assert (tmp_path / "text").read_text() == "hello" and not (out / "last.pt").exists()


@pytest.mark.parametrize("data, arguments", [("cifar10", []), ("stl10", [])])
def test_without_a_network_the_message_says_what_to_do(
    data, arguments, tmp_path, monkeypatch, capsys
):
    datasets = pytest.importorskip("torchvision.datasets")

    def offline(*args, **kwargs):
        raise OSError("no network")

    for module in (datasets.cifar, datasets.stl10):
        monkeypatch.setattr(module, "download_and_extract_archive", offline)
    assert (
        call(
            monkeypatch,
            distill,
            "--data",
            data,
            "--root",
            tmp_path,
            "--out",
            tmp_path / "run",
            "--weights",
            "scratch",
            "--device",
            "cpu",
        )
        == 2
    )
    message = capsys.readouterr().err
    assert (
        message.count("\n") == 1
        and "http" in message
        and str(tmp_path) in message
        and "textures" in message
    )


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["{tmp}/none"], "none"),
        (["{tmp}"], "config.json"),
        (["{run}", "--labels", 0], "labels"),
        (["{run}", "--labels", 1.5], "labels"),
        (["{run}", "--seeds", 0], "seeds"),
        (["{run}"], "teacher.pth"),
        (["{run}", "--data", "nowhere"], ""),
        (["{run}", "--dtype", "float8"], "float8"),
        ([], "run_dir"),
    ],
)
def test_bad_input_to_the_evaluation(arguments, word, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(
        json.dumps(
            dict(
                device="cpu",
                dtype="float32",
                data="textures",
                img_size=16,
                data_size=16,
                max_images=20,
            )
        )
    )
    arguments = [str(a).format(tmp=tmp_path, run=tmp_path / "run") for a in arguments]
    assert call(monkeypatch, evaluation, *arguments) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and word in errors[0], errors
