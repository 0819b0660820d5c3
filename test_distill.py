# SPDX-License-Identifier: MIT
import argparse
import json
import math
import os
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
    with mock.patch.object(sys, "argv", [module.__file__, *words.split()]):
        module.main()

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
            assert close(found.cls, tokens[:, 0]) and close(found.patches, tokens[:, -4:])
            assert all(close(a, b) for a, b in zip(found.attn, maps[3 - attn_blocks:], strict=True))

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

class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)

@pytest.mark.parametrize("content, refused", [
    (prefixed("_orig_mod.module."), ""), ({"state_dict": prefixed("model.")}, ""),
    ({"student": prefixed("backbone.", 1), "teacher": prefixed("backbone."), "epoch": 3}, ""),
    ({**prefixed("student.", 1), **prefixed("teacher.")}, ""),
    ({"args": argparse.Namespace(lr=0.1), "model": {
        **prefixed(), "decoder_blocks.0.norm1.weight": 1, "mask_token": 1, "head.weight": 1}}, ""),
    ({name.replace("blocks.", "blocks.0."): x for name, x in prefixed().items()}, ""),  # chunks
    ({**prefixed("a."), **prefixed("b.")}, "w.pth.*'a.', 'b.'"), ({"weight": 1}, "w.pth"),
    ({**prefixed(), "extra": 1}, "extra"), ({**prefixed(), "cls_token": Attack()}, "posix.mkdir"),
    ({"patch_embed.proj.weight": torch.ones(96, 3, 8, 8), "blocks.0.mlp.fc1.weight":
      torch.ones(9, 9)}, "num_heads")])
def test_a_vit_is_found_or_refused_and_no_code_is_run(tmp_path, monkeypatch, content, refused):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "w.pth")
    if refused:
        with pytest.raises(Exception, match=refused):
            distill.load_vit("w.pth", 16)
    else:
        found = distill.load_vit("w.pth", 16).state_dict()
        assert all(torch.equal(found[name], value) for name, value in prefixed().items())
    assert os.listdir() == ["w.pth"]

@pytest.mark.parametrize("before, after", [(32, 112), (64, 24), (16, 16)])
def test_prepare_resizes_as_pillow_and_normalizes(before, after):
    mean, std, images = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), torch.rand(2, 3, before, before)
    vit = distill.ViT(after, 8, 64, 1, 1, mean=mean, std=std)
    found = vit.prepare(images.double())
    for i in range(3):
        assert close(found[1, i], (pillow_resized(images[1, i], after) - mean[i]) / std[i], 1e-5)
    assert found.dtype == torch.float32 and not {"mean", "std"} & vit.state_dict().keys()

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

def test_each_kind_has_its_strength_for_each_image_place_and_channel():
    grey = torch.full((40, 3, 32, 32), 0.5)
    noise = distill.distort(grey, seeded(0), noise=0.1) - 0.5
    assert abs(noise.std() - 0.1) < 1e-3 and abs(noise.mean()) < 1e-3
    assert (torch.corrcoef(noise.view(120, 1024)) - torch.eye(120)).abs().max() < 0.2
    masked, salted, both = (distill.distort(grey, seeded(0), **kinds) for kinds in (
        {"mask": 0.3}, {"salt": 0.3}, {"mask": 0.3, "noise": 0.4}))  # masked last: no noise on top
    for found, value, share in (
            (masked, 0, 0.3), (salted, 0, 0.15), (salted, 1, 0.15), (both, 0, 0.3)):
        assert abs((found == value).all(dim=1).float().mean() - share) < 0.01
    assert (masked == 0).any(dim=1).eq((masked == 0).all(dim=1)).all()
    many = distill.distort(grey.repeat(20, 1, 1, 1), seeded(0), mask=(0.1, 0.9))
    shares = (many == 0).float().mean((1, 2, 3))
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
    "small_vit().prepare((255 * x).byte())", "distort((255 * x).byte())", "distort(x[0])",
    "distort(x, noise=-0.1)", "distort(x, noise=math.nan)", "distort(x, noise=25)",
    "distort(x, noise=(0.5, 0.1))", "distort(x, noise=(0, 0.1, 0.2))", "distort(x, fog=1)",
    "distort(x, blur=math.inf)", "distort(x, clean=1.5)", "distill_loss(f(0), f(1, maps=1))"])
def test_bad_arguments_are_value_errors(bad):
    names = {**vars(distill), **globals(), "f": random_features, "x": torch.rand(1, 3, 8, 8)}
    with pytest.raises(ValueError):
        eval(bad, names)

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
        kinds = dict.fromkeys(distill.DISTORTIONS, (0, 0.5))
        bad = distill.distort(clean, None, True, 0.2, **kinds)
        for attn_blocks in (0, 2):
            with mock.patch.object(distill.copy, "deepcopy", vit_on_a_gpu):
                module = distill.Distillation(vit, attn_blocks=attn_blocks)
            loss, terms = module(vit.prepare(clean), vit.prepare(bad))
            assert {x.device.type for x in (bad, loss, *terms.values())} == {"cuda"}

def test_images_are_read_upright_and_in_colour(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 30, 3), np.uint8))
    rgb.convert("LA").save(tmp_path / "a.png")
    assert distill.read_image(tmp_path / "a.png").mode == "RGB"
    sideways = Image.Exif()
    sideways[0x112] = 6
    rgb.rotate(90, expand=True).save(tmp_path / "side.png", exif=sideways)
    assert distill.read_image(tmp_path / "side.png").tobytes() == rgb.tobytes()
    Image.fromarray(np.full((9, 9), 3, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(OSError, match="deep.png"):
        distill.read_image(tmp_path / "deep.png")

def test_a_part_of_a_folder_is_random(world, tmp_path):
    args = argparse.Namespace(data=f"{world}/images", data_size=8, max_images=16)
    assert 4 <= sum(y for _, y in distill.load_data(args, "train")) <= 12  # not of one class
    args.data = tmp_path
    (tmp_path / "train").symlink_to(world / "images/train")
    (tmp_path / "val").symlink_to(world / "one/val")
    with pytest.raises(ValueError, match="classes"):
        distill.load_data(args, "test")

def test_the_stripes_teacher_learns_from_labels():
    data, args = distill.draw_stripes(2000, 32, 1), (32, 1, [0.5] * 3, [0.2] * 3, 0, "cpu")
    images, y = distill.draw_stripes(600, 32, 0).tensors
    right = []
    for part in (data, torch.utils.data.Subset(data, range(16))):
        vit = distill.train_teacher(part, *args)
        x = vit(vit.prepare(images / 255)).cls.detach()
        right.append(evaluation.fit_probe(x[:300], y[:300])(x[300:]) == y[300:])
    assert right[0].sum() > right[1].sum() + 60

def test_a_run_is_the_method_written_another_way(world, tmp_path, monkeypatch, capsys):
    steps, distort = [], distill.distort
    def record(images, *args, **more):
        steps.append((images, distort(images, *args, **more)))
        return steps[-1][1]
    monkeypatch.setattr(distill, "distort", record)
    options = "--noise 0 0.6 --lr 2e-3 --epochs 12 --loss-weights 30 10 20"
    call(distill, command(world, tmp_path, f"{options} --mean 0.5 0.4 0.3 --std 0.2 0.3 0.4"))
    assert len(steps) == 72
    sums = torch.stack([clean.sum((1, 2, 3)) for clean, _ in steps]).view(12, 48)  # epochs, images
    assert len(sums.sort()[0].unique(dim=0)) == 1 and len(sums[0].unique()) == 48  # each in each
    assert len(sums.unique(dim=0)) == 12  # in another order
    noise = [bad - clean for clean, bad in steps]
    assert all((a - b).abs().mean() > 0.05 for a, b in zip(noise, noise[6:] + noise[:6]))
    teacher, student = (distill.load_vit(world / "vit.pth", 16) for _ in range(2))
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.05)
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.4]]).view(2, 3, 1, 1)
    losses = []
    for i, (clean, bad) in enumerate(steps):
        target = teacher.requires_grad_(False)((clean - mean) / std, 1)
        found = student((bad - mean) / std, 1)
        loss = 20 * F.kl_div(found.attn[0].log(), target.attn[0], reduction="sum") / 8 / 5
        for weight, a, b in zip((30, 10), found, target):
            center = b.flatten(0, -2).mean(0)
            loss = loss + weight * (1 - F.cosine_similarity(a - center, b - center, dim=-1).mean())
        grads = torch.autograd.grad(loss, list(student.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm()  # far above 1 in the first steps
        for p, g in zip(student.parameters(), grads):
            p.grad = g / max(norm, 1)
        cosine = 1e-3 * (1 + math.cos(math.pi * i / 72))
        optimizer.param_groups[0]["lr"] = min(2e-3 * (i + 1) / 3, cosine)
        optimizer.step()
        losses.append(loss.item())
    end, start = (torch.cat([x.flatten() for x in vit.state_dict().values()])
                  for vit in (student, teacher))
    assert close(weights_of(tmp_path / "student.pth") - start, end - start, 1e-2)
    assert torch.equal(weights_of(tmp_path / "teacher.pth"), start)
    rows, means = log_of(tmp_path), np.reshape(losses, (12, 6)).mean(1)
    assert [row["loss"] for row in rows] == pytest.approx(means, rel=1e-2)
    assert list(rows[0]) == ["epoch", "loss", "global", "patch", "attn"]
    _, first, *_, last = capsys.readouterr().out.splitlines()
    assert abs(float(first.split()[2]) - losses[0]) < 2e-3 and last.startswith("epoch 12/12  loss ")

def test_seed_and_dtype_matter_and_compile_is_one_graph(world, tmp_path, monkeypatch):
    backend, compile = mock.Mock(side_effect=lambda graph, inputs: graph.forward), torch.compile
    monkeypatch.setattr(torch, "compile", lambda x: compile(x, backend=backend, fullgraph=True))
    found = []
    for i, more in enumerate(("", "--seed 1", "--dtype bfloat16", "--compile")):
        call(distill, command(world, tmp_path / str(i), f"--noise 0.3 --batch-size 10 {more}"))
        found.append(log_of(tmp_path / str(i))[1]["loss"])
    assert len(set(found)) == 3 and found[2] == pytest.approx(found[0], rel=0.05)
    assert found[3] == found[0] and backend.call_count == 1

def test_the_first_commands_have_the_right_data_and_weights(world, tmp_path, monkeypatch):
    def cifar(root, train, transform, download):
        return datasets.FakeData(128 if train and download else 0, (3, 32, 32), 10, transform)
    load = mock.Mock(side_effect=lambda url, **more: torch.load(world / "vit.pth", **more))
    moved, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: moved.append(cpu(x).clone()) or moved[-1])
    monkeypatch.setattr(distill, "save", mock.Mock(wraps=distill.save))
    monkeypatch.setattr(datasets, "CIFAR10", cifar)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
    monkeypatch.chdir(tmp_path)
    call(distill, "--data cifar10 --noise 0.1 --img-size 16 --epochs 1 --device cpu --no-compile")
    assert load.call_args.args == (distill.WEIGHTS["dinov2_vits14"],)
    student = distill.save.call_args_list[1].args[0].values()
    assert all(any(x is y for y in moved) for x in student)  # student.pth is for any machine
    call(distill, "--max-images 64 --epochs 1 --device cpu --no-compile")
    cifar, stripes = (json.loads(Path(f"runs/{name}/config.json").read_text())
                      for name in ("cifar10-noise", "stripes-mixture"))
    assert cifar["severities"] == {"noise": [0.1, 0.1]} and not (cifar["clean"] or cifar["one_of"])
    assert (cifar["lr"], cifar["batch_size"], cifar["data_size"]) == (3e-5, 64, 32)
    severities = {"blur": [0, 1.5], "noise": [0, 0.4], "mask": [0, 0.6]}
    assert (stripes["severities"], stripes["clean"], stripes["one_of"]) == (severities, 0.2, True)

@pytest.mark.parametrize("data", ["", "--data stripes --img-size 8 --data-size 8"])
def test_a_run_goes_on_to_the_same_bits(world, tmp_path, monkeypatch, capsys, data):
    draw = distill.draw_stripes
    monkeypatch.setattr(distill, "draw_stripes", lambda n, size, seed: draw(64, size, seed))
    def words(out, more=""):
        line = command(world, out, f"--epochs 4 --noise 0.2 --mask 0 0.5 --one-of {data} {more}")
        return line.replace(f"--weights {world}/vit.pth", "") if data else line
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
    with pytest.raises(SystemExit, match="2"):
        call(distill, words(broken, "--seed 1 --epochs 5"))
    assert "epochs, seed" in capsys.readouterr().err
    (broken / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        call(distill, words(broken))

TWO = """
import sys, torch, distill
distort, record = distill.distort, []
def spy(images, generator, *args, **more):
    record.append((generator.initial_seed(), images.sum((1, 2, 3)).tolist()))
    return distort(images, generator, *args, **more)
distill.distort = spy
distill.main()
torch.save(record, sys.argv[-1] + f"/seen{distill.os.environ.get('RANK', 0)}.pt")"""

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
    alone, a, b = (torch.load(tmp_path / f"{name}.pt") for name in (
        "one/seen0", "two/seen0", "two/seen1"))
    assert len({seed for seed, _ in a + b}) == 12 and len({seed for seed, _ in alone}) == 6
    for i in range(6):  # together the images of one process's step
        assert sorted(a[i][1] + b[i][1]) == pytest.approx(sorted(alone[i][1]))

@pytest.mark.parametrize("more, message", [
    ("--noise 25", "--noise"), ("--mask 0.5 1.1", "--mask"), ("--noise 0.2 0.1", "--noise"),
    ("--noise 0 0.1 0.2", "--noise"), ("--batch-size 100", "48"), ("--batch-size 1", "from 2"),
    ("--std 0 0 0", "non-finite")])  # the last one ends in torch's own error
def test_what_an_option_gets_wrong_ends_before_it_saves(world, tmp_path, capsys, more, message):
    with pytest.raises((SystemExit, RuntimeError)) as error:
        call(distill, command(world, tmp_path / "run", f"--blur 1 {more}"))
    assert message in f"{error.value} {capsys.readouterr().err.split('error:')[-1]}"
    assert not (tmp_path / "run/student.pth").exists()

def test_probe_is_within_a_point_of_scikit_learns_best_and_never_varies():
    sklearn = pytest.importorskip("sklearn.linear_model")
    from sklearn.datasets import make_blobs
    x, y = make_blobs(7500, 20, centers=4, center_box=(-1, 1), cluster_std=1.5, random_state=0)
    x, y = torch.tensor(x).float() * torch.logspace(-4, 4, 20), torch.tensor(y)
    x[:, 3] = 7.0  # a constant
    order = y[:2500].argsort()  # sorted by class: the probe shuffles by itself
    found = [evaluation.fit_probe(x[:2500][order], 10 * y[:2500][order])(x[2500:])
             for seed in (1, 2) if torch.manual_seed(seed)]
    x = (x - x[:2500].mean(0)) / (x[:2500].std(0) + 1e-6)
    best = max(sklearn.LogisticRegression(C=C, max_iter=500).fit(x[:2500], y[:2500]).score(
        x[2500:], y[2500:]) for C in 10.0 ** np.arange(-5, 3))
    assert abs((found[0] == 10 * y[2500:]).float().mean() - best) < 0.01 and torch.equal(*found)

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
    torch.save({name: 0 * x for name, x in prefixed().items()}, tmp_path / "student.pth")
    rows = {}
    for data in ("images", "flipped", "one"):
        call(evaluation, f"{tmp_path} --data {world}/{data} --device cpu")
        printed = capsys.readouterr().out
        results = json.loads((tmp_path / "results.json").read_text())
        rows[data] = {row["distortion"]: row for row in results["rows"]}
        assert results["epoch"] == 1 and "epoch 1 of 1" in printed and printed.isascii()
        assert "mask 0.5 (unseen)" in printed and "noise 0.3 (" not in printed
        assert f"{'clean':20}  0.000 -> " in printed
    clean, trained, *_, masked, _, _ = rows["images"].values()
    assert trained["trained"] and not clean["trained"] and len(rows["images"]) == 8
    assert clean["global_teacher"] < 1e-5 and clean["global_student"] > 0.5
    assert masked["clean_probe_teacher"] < masked["probe_teacher"]  # that one has seen masks
    for probe in ("probe", "clean_probe"):
        assert clean[f"{probe}_teacher"] > 0.9 and clean[f"{probe}_student"] == 0.5
        assert rows["flipped"]["clean"][f"{probe}_teacher"] < 0.1  # fitted on train, shown on val
    assert trained["attn_teacher"] > 0 and len(rows["one"]["clean"]) == 8  # one class: no probes
