# SPDX-License-Identifier: MIT
import argparse
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import datasets
from torchvision.transforms.functional import gaussian_blur

import distill
import eval as evaluation

torch.set_num_threads(1)  # two would wait for each other where other work runs

# ---- Helpers -------------------------------------------------------------------------------------
def randomize(module):
    for name, parameter in module.named_parameters():  # so that attention is not uniform
        std = parameter[0].numel() ** -0.5 if parameter.ndim in (2, 4) else 0.1
        torch.nn.init.normal_(parameter, float(".norm" in "." + name and "weight" in name), std)
    return module

def small_vit(seed=0):
    torch.manual_seed(seed)
    return randomize(distill.ViT(img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=1))

def close(a, b, tolerance=1e-4):
    return (a - b).norm() <= tolerance * b.norm()

def seeded(seed):
    return torch.Generator().manual_seed(seed)

def random_features(seed, maps=2):
    torch.manual_seed(seed)
    attn = tuple(torch.rand(3, 2, 5, 5).softmax(-1) for _ in range(maps))
    return distill.Features(torch.randn(3, 8) + 1, torch.randn(3, 4, 8) + 1, attn)

def command(world, out, more=""):
    return (f"--data {world}/images --weights {world}/vit.pth --data-size 16 --img-size 16 "
            f"--batch-size 8 --workers 0 --device cpu --no-compile --epochs 2 --out {out} {more}")

def call(module, words):
    with mock.patch.object(sys, "argv", [module.__file__, *shlex.split(words)]):
        module.main()

def error_of(capsys, words):
    with pytest.raises(SystemExit, match="2"):
        call(distill, words)
    return capsys.readouterr().err.strip().splitlines()[-1].split("error: ")[1]

def weights_of(path):
    return torch.cat([x.flatten() for x in torch.load(path, weights_only=True).values()])

def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folders of dark images, class0, and bright ones, class1; and the weights of a small ViT."""
    root, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    for split, label, n in (("train", 0, 24), ("train", 1, 24), ("val", 0, 8), ("val", 1, 8)):
        other = f"class{label ^ (split == 'val')}"  # in flipped, val has the classes exchanged
        folders = [f"images/{split}/class{label}", f"flipped/{split}/{other}", f"one/{split}/all"]
        for i in range(n):
            pixels = rng.integers(0, 56, (16, 16, 3)) + rng.integers(0, 60, 3) + 130 * label
            for folder in folders:
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(root / folder / f"{i}-{label}.png")
    torch.save(small_vit().state_dict(), root / "vit.pth")
    return root

@pytest.fixture
def steps(monkeypatch):
    """What distort was given and gave, and how the optimizer was set, in each step."""
    steps, distort, step = [], distill.distort, torch.optim.AdamW.step
    def record(images, *args, **more):
        steps.append({"clean": images, "bad": distort(images, *args, **more)})
        return steps[-1]["bad"]
    def record_step(optimizer, *args):
        steps[-1].update(optimizer.param_groups[0])
        return step(optimizer, *args)
    monkeypatch.setattr(distill, "distort", record)
    monkeypatch.setattr(torch.optim.AdamW, "step", record_step)
    return steps

# ---- The ViT and its weights ---------------------------------------------------------------------
@pytest.mark.parametrize("name", [
    "small_patch14_dinov2", "small_patch14_reg4_dinov2", "tiny_patch16_224", "huge_patch14_224"])
def test_features_and_maps_are_timms(name, tmp_path):
    timm = pytest.importorskip("timm")
    timm.layers.set_fused_attn(False)  # so that there are maps
    side, maps = 28 if "14" in name else 32, []
    theirs = timm.create_model(f"vit_{name}", img_size=side, depth=3, num_classes=0)
    for block in randomize(theirs.eval()).blocks:
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, x: maps.append(x))
    state = {**theirs.state_dict(), "mask_token": torch.ones(1), "head.weight": torch.ones(1)}
    if "reg4" in name:  # timm's other name, and its other place for the first positions
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], dim=1)
    torch.save({"model": state, "epoch": 3}, tmp_path / "w.pth")
    ours, images = distill.load_vit(tmp_path / "w.pth", side), torch.randn(2, 3, side, side)
    with torch.no_grad():
        tokens = theirs.forward_features(images)
        for attn_blocks in (0, 2):
            found = ours(images, attn_blocks)
            assert found.patches.shape[1] == 4
            assert close(found.cls, tokens[:, 0]) and close(found.patches, tokens[:, -4:])
            assert all(close(a, b) for a, b in zip(found.attn, maps[3 - attn_blocks:], strict=True))
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(images, 1).attn[0].dtype == torch.float32

def test_an_exported_vit_takes_any_number_of_images():
    vit, images = small_vit(), torch.rand(5, 3, 16, 16)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(vit, (images[:2],), dynamic_shapes=shapes)
    assert close(exported.module()(images)[0], vit(images).cls, 1e-5)

def pillow_resized(plane, side):
    plane = Image.fromarray(plane.numpy())
    return torch.tensor(np.asarray(plane.resize((side, side), Image.BICUBIC)))

@pytest.mark.parametrize("side, registers", [(5, 0), (8, 0), (12, 0), (5, 4), (12, 4)])
def test_position_embeddings_are_resized_as_their_publishers_do(side, registers):
    planes = torch.randn(2, 8, 8, generator=seeded(0))
    grid = torch.cat([torch.ones(1, 1, 2), planes.flatten(1).T[None]], dim=1)  # [1, 65, 2]
    found = distill.resize_pos_embed(grid, side, registers)
    if registers:  # antialiased as in Pillow
        planes = torch.stack([pillow_resized(plane, side) for plane in planes])
    elif side != 8:  # at the points where DINO's larger scale puts the samples; edges repeated
        points = (torch.arange(side) + 0.5) * 2 / (side + 0.1) - 1  # from -1 to 1
        points = torch.stack(torch.meshgrid(points, points, indexing="xy"), dim=2)[None]
        planes = F.grid_sample(planes[None], points, "bicubic", "border", align_corners=False)[0]
    assert close(found[0, 1:].T, planes.flatten(1)) and (found[:, 0] == 1).all()

def prefixed(prefix="", more=0):
    return {prefix + name: value + more for name, value in small_vit().state_dict().items()}

@pytest.mark.parametrize("checkpoint", [
    prefixed("_orig_mod.module."), {"state_dict": prefixed("model.")},
    {"student": prefixed("module.backbone.", 1), "teacher": prefixed("backbone."), "epoch": 3},
    {**prefixed("student.", 1), **prefixed("teacher.")},
    {"args": argparse.Namespace(lr=0.1), "model": {
        **prefixed(), "decoder_blocks.0.norm1.weight": 1, "mask_token": 1, "head_dist.weight": 1}},
    {"teacher": {name.replace("blocks.", "blocks.0."): x  # in chunks
                 for name, x in prefixed("backbone.").items()}}])
def test_a_vit_is_found_in_checkpoints(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "w.pth")
    found = distill.load_vit(tmp_path / "w.pth", 16).state_dict()
    assert all(torch.equal(found[name], value) for name, value in prefixed().items())

class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)

@pytest.mark.parametrize("content, error, message", [
    ({**prefixed("a."), **prefixed("b.")}, ValueError, "w.pth.*'a.', 'b.'"),
    ({"weight": 1}, ValueError, "w.pth"), ({**prefixed(), "extra": 1}, RuntimeError, "extra"),
    ({**prefixed(), "patch_embed.proj.weight": torch.zeros(96, 3, 8, 8)}, ValueError, "num_heads"),
    ({**prefixed(), "cls_token": Attack()}, Exception, "posix.mkdir")])
def test_foreign_weights_are_refused_and_run_no_code(tmp_path, monkeypatch, content, error, message):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "w.pth")
    with pytest.raises(error, match=message):
        distill.load_vit("w.pth", 16)
    assert os.listdir() == ["w.pth"]

@pytest.mark.parametrize("before, after", [(32, 112), (64, 24), (16, 16)])
def test_prepare_resizes_as_pillow_and_normalizes(before, after):
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    vit, images = distill.ViT(after, 8, 64, 1, 1, mean=mean, std=std), torch.rand(2, 3, before, before)
    found = vit.prepare(images.double())
    for i in range(3):
        expected = (pillow_resized(images[1, i], after) - mean[i]) / std[i]
        assert close(found[1, i], expected, 1e-5)
    assert found.dtype == torch.float32 and not {"mean", "std"} & vit.state_dict().keys()

# ---- Distortions ---------------------------------------------------------------------------------
def test_blur_is_torchvisions_also_with_a_sigma_an_image():
    images = torch.rand(5, 3, 20, 24)
    for sigma, taps in ((0.3, 3), (1.0, 7), (2.7, 19)):  # up to three sigma
        found = distill.distort(images, blur=sigma)
        assert close(found, gaussian_blur(images, taps, sigma), 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(distill.distort(images, blur=sigma), found)
    found = distill.blur(images, torch.arange(5).view(5, 1, 1, 1) / 2, 2.0, None)
    assert torch.equal(found[0], images[0])
    assert all(close(found[i], gaussian_blur(images[i], 13, i / 2), 1e-5) for i in range(1, 5))

def test_noise_is_another_at_each_place_channel_and_image():
    found = distill.distort(torch.full((40, 3, 32, 32), 0.5), seeded(0), noise=0.1) - 0.5
    assert abs(found.std() - 0.1) < 1e-3 and abs(found.mean()) < 1e-3
    rows = found.flatten(2).flatten(0, 1)  # one a channel of an image
    assert (torch.corrcoef(rows) - torch.eye(120)).abs().max() < 0.2

def test_pixels_are_lost_in_all_channels_and_in_the_asked_share():
    grey = torch.full((40, 3, 32, 32), 0.5)
    masked, salted, both = (distill.distort(grey, seeded(0), **kinds) for kinds in (
        {"mask": 0.3}, {"salt": 0.3}, {"mask": 0.3, "noise": 0.4}))  # masked last: no noise on top
    for found, value, share in ((masked, 0, 0.3), (salted, 0, 0.15), (salted, 1, 0.15), (both, 0, 0.3)):
        assert abs((found == value).all(dim=1).float().mean() - share) < 0.01
    assert (masked == 0).any(dim=1).eq((masked == 0).all(dim=1)).all()

def test_each_image_draws_its_own_severity_evenly_from_the_range():
    grey = torch.full((800, 3, 16, 16), 0.5)
    shares = (distill.distort(grey, seeded(0), mask=(0.1, 0.9)) == 0).float().mean((1, 2, 3))
    found = shares.quantile(torch.tensor([0.02, 0.25, 0.5, 0.75, 0.98]))
    assert (found - torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])).abs().max() < 0.06

def test_with_one_of_each_image_shows_one_kind_or_is_left_bit_for_bit():
    images = torch.rand(400, 3, 16, 16, generator=seeded(1)) / 4 + 0.25
    state = torch.get_rng_state()
    found = distill.distort(images, seeded(0), True, 0.25, blur=1.0, salt=0.5, mask=0.5)
    assert torch.equal(state, torch.get_rng_state())  # only the generator's numbers are drawn
    white = (found == 1).any(dim=(1, 2, 3))
    blurred = (found - gaussian_blur(images, 7, 1.0)).abs().amax(dim=(1, 2, 3)) < 1e-5
    shows = [(found == images).all(dim=(1, 2, 3)), blurred, white,
             (found == 0).any(dim=(1, 2, 3)) & ~white]
    assert all(70 < share.sum() < 130 for share in shows) and (sum(shows) == 1).all()

@pytest.mark.parametrize("bad", [
    "ViT(15, 8, 64, 1, 1)", "ViT(16, 8, 64, 1, 0)", "small_vit()(torch.rand(1, 3, 20, 20))",
    "small_vit().prepare((255 * x).byte())", "distort((255 * x).byte(), noise=0.1)",
    "distort(x[0], noise=0.1)", "distort(x, noise=-0.1)", "distort(x, noise=math.nan)",
    "distort(x, noise=25)", "distort(x, noise=(0.5, 0.1))", "distort(x, noise=(0, 0.1, 0.2))",
    "distort(x, blur=4.0)", "distort(x, blur=math.inf)", "distort(x, fog=1)",
    "distort(x, noise=0.1, clean=1.5)", "distill_loss(f(0), f(1, maps=1))"])
def test_bad_arguments_are_value_errors(bad):
    names = {**vars(distill), **globals(), "f": random_features, "x": torch.rand(1, 3, 8, 8)}
    with pytest.raises(ValueError):
        eval(bad, names)

# ---- The method ----------------------------------------------------------------------------------
def terms_another_way(student, teacher):
    def distance(s, t):
        s, t = ((x - t.mean(0)).numpy() for x in (s, t))  # rows [n, D]
        return 1 - np.mean((s * t).sum(1) / np.sqrt((s * s).sum(1) * (t * t).sum(1)))
    s, t = ([x.detach().double() for x in (f.cls, f.patches.flatten(0, 1), *f.attn)]
            for f in (student, teacher))
    kl = [(b * (b.log() - a.log())).sum(-1).mean() for a, b in zip(s[2:], t[2:], strict=True)]
    return {"global": distance(s[0], t[0]), "patch": distance(s[1], t[1]), "attn": np.mean(kl)}

def test_loss_is_the_formula_written_another_way():
    s, t = map(random_features, (0, 1))
    assert distill.distill_loss(s, t) == pytest.approx(terms_another_way(s, t), abs=1e-5)
    assert distill.distill_loss(s._replace(attn=()), t._replace(attn=()))["attn"] == 0
    many = t._replace(cls=torch.randn(4000, 8) + 1)
    same = s._replace(cls=torch.randn(8).expand(4000, 8))  # one answer to every image
    assert distill.distill_loss(same, many)["global"] == pytest.approx(1, abs=0.05)

def test_loss_of_sharp_attention_is_exact():
    student, teacher = 20 * torch.randn(2, 3, 2, 5, 5, generator=seeded(2))  # sharp, as block 0's
    student.requires_grad_()
    s, t = (random_features(0)._replace(attn=(x.softmax(-1),)) for x in (student, teacher))
    exact = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1).mean()
    found = distill.distill_loss(s, t)["attn"]
    grads = [torch.autograd.grad(loss, student)[0] for loss in (found, exact)]
    assert close(found, exact) and close(*grads)

def test_the_method_is_a_module_that_leaves_the_teacher_alone():
    teacher = small_vit()
    teacher.norm = torch.nn.Sequential(teacher.norm, torch.nn.Dropout(0.5))
    for _ in range(2):  # a second student of the same teacher is trainable, too
        module = distill.Distillation(teacher, (1, 2, 3), 2).train()
        assert module.student.training and not module.teacher.training
        module.student.norm[1].p = 0.0
        clean, bad = torch.rand(2, 3, 3, 16, 16)
        loss, terms = module(clean, bad)
        expected = terms_another_way(module.student(bad, 2), teacher(clean, 2))
        assert {name: x.item() for name, x in terms.items()} == pytest.approx(expected, abs=1e-5)
        assert loss.item() == pytest.approx(np.dot([1, 2, 3], list(expected.values())), abs=1e-5)
        loss.backward()
        assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
        assert all(p.grad is not None for p in module.student.parameters())

@pytest.mark.skipif(torch.__version__ < (2, 9), reason="there FakeTensorMode wants a driver")
def test_a_step_mixes_no_devices_on_a_gpu():
    def vit_on_a_gpu(*_):
        with torch.device("cuda"):
            return small_vit()
    with FakeTensorMode():  # shapes and devices without a card; it refuses to mix devices
        vit = vit_on_a_gpu()
        clean = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, device="cuda") / 255
        for attn_blocks in (0, 2):
            with mock.patch.object(distill.copy, "deepcopy", vit_on_a_gpu):
                module = distill.Distillation(vit, attn_blocks=attn_blocks)
            kinds = dict.fromkeys(distill.DISTORTIONS, (0, 0.5))
            bad = distill.distort(clean, None, attn_blocks > 0, 0.2, **kinds)
            loss, terms = module(vit.prepare(clean), vit.prepare(bad))
            assert {x.device.type for x in (bad, loss, *terms.values())} == {"cuda"}

# ---- Images --------------------------------------------------------------------------------------
def test_images_are_read_upright_and_in_colour(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 30, 3), np.uint8))
    for mode, name in (("L", "a.png"), ("P", "b.png"), ("CMYK", "c.jpg"), ("LA", "d.png")):
        rgb.convert(mode).save(tmp_path / name)
        assert distill.read_image(tmp_path / name).mode == "RGB"
    sideways = Image.Exif()
    sideways[0x112] = 6
    rgb.rotate(90, expand=True).save(tmp_path / "e.webp", lossless=True, exif=sideways)
    assert distill.read_image(tmp_path / "e.webp").tobytes() == rgb.tobytes()
    Image.fromarray(np.full((9, 9), 3, np.uint16)).save(tmp_path / "deep.png")
    for name in ("deep.png", "text.png"):
        with pytest.raises(OSError, match=name):
            distill.read_image(tmp_path / name)

def test_a_part_of_a_folder_is_random_and_always_the_same(world, tmp_path):
    args = argparse.Namespace(data=f"{world}/images", data_size=8, max_images=16)
    first, second = (distill.load_data(args, "train") for _ in range(2))
    labels = [label for _, label in first]
    assert labels == [label for _, label in second] and 4 <= sum(labels) <= 12
    image = Image.open(first.dataset.samples[first.indices[0]][0]).resize((8, 8), Image.BICUBIC)
    assert np.array_equal(first[0][0].permute(1, 2, 0), np.asarray(image))
    args.data = tmp_path
    (tmp_path / "train").symlink_to(world / "images/train")
    (tmp_path / "val").symlink_to(world / "one/val")
    with pytest.raises(ValueError, match="classes"):
        distill.load_data(args, "test")

def test_the_label_of_stripes_is_their_direction():
    images, labels = distill.draw_stripes(400, 32, 0).tensors
    y, x = np.gradient(images.double().mean(1).numpy(), axis=(1, 2))
    twice = np.arctan2((2 * x * y).mean((1, 2)), (x * x - y * y).mean((1, 2)))  # the angle, doubled
    off = np.angle(np.exp(1j * (twice - 2 * np.pi / 10 * (labels.numpy() + 0.4)))) / 2
    assert np.median(np.abs(off)) < np.pi / 20 and len(labels.unique()) == 10

def test_the_stripes_teacher_learns_from_labels():
    data, args = distill.draw_stripes(2000, 32, 1), (32, 1, [0.5] * 3, [0.2] * 3, 0, "cpu")
    images, y = distill.draw_stripes(600, 32, 0).tensors
    right = []
    for part in (data, torch.utils.data.Subset(data, range(16))):
        vit = distill.train_teacher(part, *args)
        x = vit(vit.prepare(images / 255)).cls.detach()
        found = evaluation.fit_probe(x[:300], y[:300])(x[300:])
        right.append((found == y[300:]).float().mean())
    assert right[0] > right[1] + 0.2

# ---- Runs ----------------------------------------------------------------------------------------
def test_a_run_is_the_method_written_another_way(world, tmp_path, monkeypatch, capsys, steps):
    options = "--noise 0 0.6 --lr 2e-3 --epochs 12 --loss-weights 30 10 20"
    call(distill, command(world, tmp_path, f"{options} --mean 0.5 0.4 0.3 --std 0.2 0.3 0.4"))
    monkeypatch.undo()
    assert len(steps) == 72
    sums = [torch.cat([s["clean"] for s in steps[i:i + 6]]).sum((1, 2, 3)) for i in range(0, 72, 6)]
    assert all(torch.equal(x.sort()[0], sums[0].sort()[0]) for x in sums)  # each image in each
    assert len({tuple(x.tolist()) for x in sums}) == 12 and len(sums[0].unique()) == 48
    noise = [s["bad"] - s["clean"] for s in steps]
    assert all((a - b).abs().mean() > 0.05 for a, b in zip(noise, noise[6:] + noise[:6]))
    teacher, student = (distill.load_vit(world / "vit.pth", 16) for _ in range(2))
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.05)
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.4]]).view(2, 3, 1, 1)
    losses = []
    for i, s in enumerate(steps):
        rate = min(2e-3 * (i + 1) / 3, 1e-3 * (1 + math.cos(math.pi * i / 72)))
        assert s["lr"] == pytest.approx(rate) and s["weight_decay"] == 0.05
        with torch.no_grad():
            target = teacher((s["clean"] - mean) / std, 1)
        found = student((s["bad"] - mean) / std, 1)
        loss = 20 * F.kl_div(found.attn[0].log(), target.attn[0], reduction="sum") / 8 / 5
        for weight, a, b in zip((30, 10), found, target):
            center = b.flatten(0, -2).mean(0)
            loss = loss + weight * (1 - F.cosine_similarity(a - center, b - center, dim=-1).mean())
        grads = torch.autograd.grad(loss, list(student.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        assert norm > 1 or i > 20  # so that clipping matters
        for p, g in zip(student.parameters(), grads):
            p.grad = g / max(norm, 1)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    end, start = (torch.cat([x.flatten() for x in v.state_dict().values()]) for v in (student, teacher))
    assert close(weights_of(tmp_path / "student.pth") - start, end - start, 1e-2)
    assert torch.equal(weights_of(tmp_path / "teacher.pth"), start)
    rows = log_of(tmp_path)
    means = np.reshape(losses, (12, 6)).mean(1)
    assert [row["loss"] for row in rows] == pytest.approx(means, rel=1e-2)
    assert list(rows[0]) == ["epoch", "loss", "global", "patch", "attn"]
    assert all(rows[-1][term] < 0.9 * rows[0][term] for term in ("global", "patch", "attn"))
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 14 and printed[1].split("  ")[0] == "start"
    assert float(printed[1].split()[2]) == pytest.approx(losses[0], abs=1e-3)
    assert printed[-1].startswith(f"epoch 12/12  loss {rows[-1]['loss']:.3f}  global 0.")

def test_other_seeds_and_bfloat16_give_other_runs(world, tmp_path):
    found = []
    for i, more in enumerate(("", "--seed 1", "--dtype bfloat16")):
        call(distill, command(world, tmp_path / str(i), f"--noise 0.3 --epochs 1 {more}"))
        found.append(log_of(tmp_path / str(i))[0]["loss"])
    assert len(set(found)) == 3 and found[2] == pytest.approx(found[0], rel=0.05)

def test_the_default_run_trains_its_teacher_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = mock.patch.object(distill, "train_teacher", wraps=distill.train_teacher)
    with teacher as train_teacher:
        call(distill, "--max-images 64 --epochs 1 --device cpu --no-compile")
    out, severities = Path("runs/stripes-mixture"), {"blur": [0, 1.5], "noise": [0, 0.4], "mask": [0, 0.6]}
    config = json.loads((out / "config.json").read_text())
    assert (config["one_of"], config["clean"], config["severities"]) == (True, 0.2, severities)
    assert train_teacher.call_count == 1 and (out / "teacher.pth").exists()

def test_the_headline_command_has_the_right_data_and_weights(world, tmp_path, monkeypatch, steps):
    def cifar(root, train, transform, download):
        return datasets.FakeData(128 if train and download else 0, (3, 32, 32), 10, transform)
    load = mock.Mock(side_effect=lambda url, **more: torch.load(world / "vit.pth", **more))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "CIFAR10", cifar)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
    call(distill, "--data cifar10 --noise 0.1 --img-size 16 --epochs 1 --device cpu --no-compile")
    assert load.call_args.args == (distill.WEIGHTS["dinov2_vits14"],) and len(steps) == 2
    config = json.loads(Path("runs/cifar10-noise/config.json").read_text())
    assert config["severities"] == {"noise": [0.1, 0.1]} and steps[0]["lr"] == 3e-5
    assert (config["clean"], config["one_of"], steps[0]["clean"].shape[0]) == (0, False, 64)

@pytest.mark.parametrize("own_teacher", [False, True])
def test_a_run_goes_on_to_the_same_bits(world, tmp_path, monkeypatch, capsys, own_teacher):
    draw = distill.draw_stripes
    monkeypatch.setattr(distill, "draw_stripes", lambda n, size, seed: draw(64, size, seed))
    def words(out, more=""):
        line = command(world, out, "--epochs 4 --noise 0.2 --mask 0 0.5 --one-of --lr 1e-3 " + more)
        return line.replace(f"--weights {world}/vit.pth", "--data stripes") if own_teacher else line
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    call(distill, words(whole))
    for writes in (1, 4, 3):  # as if killed before the teacher, a last.pt, a student is written
        effects = [mock.DEFAULT] * (writes - 1) + [KeyboardInterrupt]
        stop = mock.patch.object(distill, "save", wraps=distill.save, side_effect=effects)
        with stop, pytest.raises(KeyboardInterrupt):
            call(distill, words(broken, "--workers 2"))
    call(distill, words(broken))
    assert torch.equal(weights_of(whole / "student.pth"), weights_of(broken / "student.pth"))
    assert log_of(whole) == log_of(broken) and len(log_of(whole)) == 4
    assert "epochs, seed" in error_of(capsys, words(broken, "--seed 1 --epochs 5"))
    (broken / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        call(distill, words(broken))

def test_a_student_is_saved_from_the_cpu(world, tmp_path, monkeypatch):
    moved, cpu, saved = [], torch.Tensor.cpu, {}
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: moved.append(cpu(x).clone()) or moved[-1])
    monkeypatch.setattr(distill, "save", lambda content, path: saved.update({path.name: content}))
    call(distill, command(world, tmp_path / "run", "--noise 0.2"))
    assert all(any(x is y for y in moved) for x in saved["student.pth"].values())

TWO = """
import sys, torch, distill
distort, record = distill.distort, []
def spy(images, generator, *args, **more):
    record.append((generator.initial_seed(), images.sum((1, 2, 3)).tolist()))
    return distort(images, generator, *args, **more)
distill.distort = spy
distill.main()
torch.save(record, sys.argv[-1] + f"/seen{distill.os.environ.get('RANK', 0)}.pt")
"""

def test_two_processes_share_the_work_and_end_where_one_does(world, tmp_path):
    (tmp_path / "run.py").write_text(TWO)
    environment = {**os.environ, "PYTHONPATH": str(Path(distill.__file__).parent)}
    two = "-m torch.distributed.run --standalone --nproc-per-node 2"
    for out, more in (("one", ""), ("two", two)):
        line = command(world, tmp_path / out, f"--blur 1.0 --batch-size 16 --out {tmp_path / out}")
        words = [sys.executable, *more.split(), tmp_path / "run.py", *line.split()]
        subprocess.run(words, check=True, env=environment)
    one, two, start = (weights_of(path) for path in (
        tmp_path / "one/student.pth", tmp_path / "two/student.pth", world / "vit.pth"))
    assert close(two - start, one - start, 0.25)
    files = ("one/seen0.pt", "two/seen0.pt", "two/seen1.pt")
    alone, a, b = (torch.load(tmp_path / name) for name in files)
    assert len({seed for seed, _ in a + b}) == 12 and len({seed for seed, _ in alone}) == 6
    for i in range(6):  # together the images of one process's step
        assert sorted(a[i][1] + b[i][1]) == pytest.approx(sorted(alone[i][1]))

def test_a_compiled_run_is_one_graph_and_ends_like_an_eager_one(world, tmp_path, monkeypatch):
    backend, compile = mock.Mock(side_effect=lambda graph, inputs: graph.forward), torch.compile
    monkeypatch.setattr(torch, "compile", lambda x: compile(x, backend=backend, fullgraph=True))
    for name in ("no-compile", "compile"):
        call(distill, command(world, tmp_path / name, f"--noise 0.2 --batch-size 10 --{name}"))
    assert backend.call_count == 1 and log_of(tmp_path / "compile") == log_of(tmp_path / "no-compile")

@pytest.mark.parametrize("more, message", [
    ("--noise 25", "--noise"), ("--mask 0.5 1.1", "--mask"), ("--noise 0.2 0.1", "--noise"),
    ("--noise 0 0.1 0.2", "--noise"), ("--batch-size 100", "48"), ("--batch-size 1", "from 2")])
def test_what_an_option_gets_wrong_ends_in_a_line(world, tmp_path, capsys, more, message):
    assert message in error_of(capsys, command(world, tmp_path / "run", f"--blur 1 {more}"))
    assert not (tmp_path / "run").exists()

def test_a_training_that_is_not_finite_saves_nothing(world, tmp_path):
    with pytest.raises(RuntimeError, match="non-finite"):
        call(distill, command(world, tmp_path / "run", "--noise 0.3 --std 0 0 0"))
    assert not (tmp_path / "run/student.pth").exists()

# ---- The evaluation ------------------------------------------------------------------------------
def test_probe_is_within_a_point_of_scikit_learns_best_and_never_varies():
    sklearn = pytest.importorskip("sklearn.linear_model")
    from sklearn.datasets import make_blobs
    x, y = make_blobs(7500, 20, centers=4, center_box=(-1, 1), cluster_std=1.5, random_state=0)
    x, y = torch.tensor(x).float() * torch.logspace(-4, 4, 20), torch.tensor(y)
    x[:, 3] = 7.0  # a constant
    order, found = y[:2500].argsort(), []  # sorted by class: the probe shuffles by itself
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(evaluation.fit_probe(x[:2500][order], 10 * y[:2500][order])(x[2500:]))
    x = (x - x[:2500].mean(0)) / (x[:2500].std(0) + 1e-6)
    best = max(sklearn.LogisticRegression(C=C, max_iter=500).fit(x[:2500], y[:2500]).score(
        x[2500:], y[2500:]) for C in 10.0 ** np.arange(-5, 3))
    assert abs((found[0] == 10 * y[2500:]).float().mean() - best) < 0.01 and best < 0.95
    assert torch.equal(*found)

def test_distances_are_those_of_the_loss():
    teacher, student = small_vit(), small_vit(1)
    images = torch.randint(256, (7, 3, 16, 16), generator=seeded(0)).byte()
    batches = [(images[:4], None), (images[4:6], None), (images[6:], None)]  # one image at last
    embeddings, distances = evaluation.compare(teacher, student, batches, {"blur": 1.0})
    for who, vit in (("teacher", teacher), ("student", student)):
        bad = [vit(vit.prepare(gaussian_blur(x / 255, 7, 1.0)), 1) for x, _ in batches]
        good = [teacher(teacher.prepare(x / 255), 1) for x, _ in batches]
        a, b = map(terms_another_way, bad[:2], good[:2])
        expected = {term: (4 * a[term] + 2 * b[term]) / 6 for term in a}
        assert distances[who] == pytest.approx(expected, abs=1e-5)
        assert close(embeddings[who], torch.cat([features.cls for features in bad]))

def test_the_table_has_the_right_columns_rows_and_splits(world, tmp_path, capsys):
    call(distill, command(world, tmp_path, "--blur 0 0.5 --noise 0.1 --one-of --epochs 1"))
    worthless = {name: 0 * x for name, x in prefixed().items()}  # it tells nothing apart
    torch.save(worthless, tmp_path / "student.pth")
    rows = {}
    for data in ("images", "flipped", "one"):
        capsys.readouterr()
        call(evaluation, f"{tmp_path} --data {world}/{data} --device cpu")
        printed = capsys.readouterr().out
        results = json.loads((tmp_path / "results.json").read_text())
        rows[data] = {row["distortion"]: row for row in results["rows"]}
        assert results["epoch"] == 1 and "epoch 1 of 1" in printed and printed.isascii()
        assert "mask 0.5 (unseen)" in printed and "noise 0.3 (" not in printed
        assert max(map(len, printed.splitlines()[1:])) <= 100
    clean, trained = rows["images"]["clean"], rows["images"]["trained"]
    assert trained["trained"] and not clean["trained"] and len(rows["images"]) == 8
    assert abs(clean["global_teacher"]) < 1e-5 < 0.5 < clean["global_student"]
    for probe in ("probe", "clean_probe"):
        assert clean[f"{probe}_teacher"] > 0.9 and clean[f"{probe}_student"] == 0.5
        assert rows["flipped"]["clean"][f"{probe}_teacher"] < 0.1  # fitted on train, shown on val
    assert trained["attn_teacher"] > 0 and len(rows["one"]["clean"]) == 8  # one class: no probes
