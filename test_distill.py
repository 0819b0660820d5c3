# SPDX-License-Identifier: MIT
import argparse
import copy
import functools
import hashlib
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
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
def small_vit():
    torch.manual_seed(0)
    return distill.ViT(img_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=1)

def randomize(vit):
    for parameter in vit.parameters():  # large enough that attention is not uniform
        torch.nn.init.normal_(parameter, std=0.1)

def close(a, b, tolerance=1e-4):
    return (a - b).norm() <= tolerance * b.norm()

def seeded(seed):
    return torch.Generator().manual_seed(seed)

def random_features(seed, maps=2):
    torch.manual_seed(seed)
    attn = tuple(torch.rand(3, 2, 5, 5).softmax(-1) for _ in range(maps))
    return distill.Features(torch.randn(3, 8), torch.randn(3, 4, 8), attn)

def command(world, out, more=""):
    return (f"--data {world}/images --weights {world}/vit.pth --data-size 16 --img-size 16 "
            f"--batch-size 8 --workers 0 --device cpu --epochs 2 --out {out} {more}")

def call(module, words):
    with mock.patch.object(sys, "argv", [module.__file__, *shlex.split(words)]):
        module.main()

def error_of(capsys, module, words):
    with pytest.raises(SystemExit, match="2"):
        call(module, words)
    return capsys.readouterr().err.strip().splitlines()[-1].split("error: ")[1]

def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]

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
    for name in ("odd", "deep", "half"):
        shutil.copytree(root / "images", root / name)
    shutil.copytree(root / "images/val/class0", root / "odd/val/lonely")
    for split in ("train", "val"):
        shutil.copytree(root / f"images/{split}/class0", root / f"one/{split}/all")
    Image.fromarray(np.full((9, 9), 3, np.uint16)).save(root / "deep/train/class0/bad.png")
    (root / "half/train/class0/bad.jpg").write_text("no image")
    torch.save(small_vit().state_dict(), root / "vit.pth")
    return root

# ---- The ViT and its weights ---------------------------------------------------------------------
@pytest.mark.parametrize("name", [
    "small_patch14_dinov2", "small_patch14_reg4_dinov2", "tiny_patch16_224", "huge_patch14_224"])
def test_features_and_maps_are_timms(name, tmp_path):
    timm = pytest.importorskip("timm")
    timm.layers.set_fused_attn(False)  # so that there are maps
    side = 28 if "14" in name else 32
    theirs = timm.create_model(f"vit_{name}", img_size=side, depth=3, num_classes=0).eval()
    randomize(theirs)
    maps = []
    for block in theirs.blocks:
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, x: maps.append(x))
    state = {**theirs.state_dict(), "mask_token": torch.ones(1), "head.weight": torch.ones(1)}
    if "reg4" in name:  # timm's other name, and its other place for the first positions
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), state["pos_embed"]], dim=1)
    torch.save({"model": state, "epoch": 3}, tmp_path / "w.pth")
    ours = distill.load_vit(tmp_path / "w.pth", side)
    images = torch.randn(2, 3, side, side)
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
    vit = small_vit()
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(vit, (torch.rand(2, 3, 16, 16),), dynamic_shapes=shapes)
    images = torch.rand(5, 3, 16, 16)
    assert close(exported.module()(images)[0], vit(images).cls, 1e-5)

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

def prefixed(prefix, more=0):
    return {prefix + name: value + more for name, value in small_vit().state_dict().items()}

@pytest.mark.parametrize("checkpoint", [
    prefixed("_orig_mod.module."), {"state_dict": prefixed("model.")},
    {"student": prefixed("module.backbone.", 1), "teacher": prefixed("backbone."), "epoch": 3},
    {"args": argparse.Namespace(lr=0.1), "model": {
        **prefixed(""), "decoder_blocks.0.norm1.weight": torch.ones(1),
        "mask_token": torch.ones(1), "head_dist.weight": torch.ones(1)}},
    {"teacher": {name.replace("blocks.", "blocks.0."): x  # in chunks
                 for name, x in prefixed("backbone.").items()}}])
def test_a_vit_is_found_in_checkpoints(tmp_path, checkpoint):
    torch.save(checkpoint, tmp_path / "w.pth")
    found = distill.load_vit(tmp_path / "w.pth", 16).state_dict()
    assert all(torch.equal(found[name], value) for name, value in prefixed("").items())

class Attack:
    def __reduce__(self):
        return os.mkdir, ("attacked",)

@pytest.mark.parametrize("key, value, message", [
    ("blocks.1.norm2.bias", None, "blocks.1.norm2.bias"), ("extra", torch.zeros(1), "extra"),
    ("patch_embed.proj.weight", None, "patch_embed"), ("cls_token", Attack(), "Unpickling"),
    ("patch_embed.proj.weight", torch.zeros(96, 3, 8, 8), "num_heads")])
def test_foreign_weights_are_refused_and_run_no_code(tmp_path, monkeypatch, key, value, message):
    monkeypatch.chdir(tmp_path)
    state = {**small_vit().state_dict(), key: value}
    torch.save({key: value for key, value in state.items() if value is not None}, "w.pth")
    with pytest.raises(ValueError, match=message):
        distill.load_vit("w.pth", 16)
    assert os.listdir() == ["w.pth"]

@pytest.mark.parametrize("before, after", [(32, 112), (64, 24)])
def test_prepare_resizes_as_pillow_and_normalizes(before, after):
    images = torch.rand(2, 3, before, before)
    mean_std = ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    found = distill.prepare(images.double(), after, *mean_std)
    for x, plane, mean, std in zip(found[1], images[1], *mean_std, strict=True):
        assert close(x, (pillow_resized(plane, after) - mean) / std, 1e-5)
    assert found.dtype == torch.float32

# ---- Distortions and loss ------------------------------------------------------------------------
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
    masked, salted = distill.distort(grey, g, mask=0.3), distill.distort(grey, g, salt=0.3)
    for found, value, share in ((masked, 0, 0.3), (salted, 0, 0.15), (salted, 1, 0.15)):
        assert abs((found == value).all(dim=1).float().mean() - share) < 0.01
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
    assert torch.equal(state, torch.get_rng_state())  # only the generator's numbers are drawn
    salt = (found == 1).any(dim=(1, 2, 3))
    shows = [(found == images).all(dim=(1, 2, 3)), (found == 0.375).all(dim=(1, 2, 3)), salt,
             (found == 0).any(dim=(1, 2, 3)) & ~salt]
    assert all(70 < share.sum() < 130 for share in shows) and (sum(shows) == 1).all()

def test_loss_is_the_formula_written_another_way():
    s, t = map(random_features, (0, 1))
    cls = (s.cls * t.cls).sum(-1) / s.cls.norm(dim=-1) / t.cls.norm(dim=-1)
    patch = (s.patches * t.patches).sum(-1) / s.patches.norm(dim=-1) / t.patches.norm(dim=-1)
    kl = [(b * (b.log() - a.log())).sum(-1) for a, b in zip(s.attn, t.attn, strict=True)]
    expected = {"global": 1 - cls.mean(), "patch": 1 - patch.mean(), "attn": sum(kl).mean() / 2}
    total, terms = distill.distill_loss(s, t, (1.0, 2.0, 3.0))
    for name, value in expected.items():
        assert torch.allclose(terms[name], value, atol=1e-6)
    weighted = expected["global"] + 2 * expected["patch"] + 3 * expected["attn"]
    assert torch.allclose(total, weighted, atol=1e-5)

def test_loss_of_sharp_attention_is_exact():
    student, teacher = 20 * torch.randn(2, 3, 2, 5, 5, generator=seeded(2))  # sharp, as block 0's
    target, features = teacher.softmax(-1), random_features(0)
    student.requires_grad_()
    pair = [features._replace(attn=(attn,)) for attn in (student.softmax(-1), target)]
    found = distill.distill_loss(*pair)[1]["attn"]
    exact = F.kl_div(student.log_softmax(-1), target, reduction="none").sum(-1).mean()
    grads = [torch.autograd.grad(loss, student)[0] for loss in (found, exact)]
    assert close(found, exact) and close(*grads)

def test_the_method_is_a_module_that_leaves_the_teacher_alone():
    teacher = small_vit()
    randomize(teacher)
    teacher.norm = torch.nn.Sequential(teacher.norm, torch.nn.Dropout(0.5))
    student = copy.deepcopy(teacher).eval()
    module = distill.Distillation(teacher, student, 2, (1, 2, 3))
    clean, distorted = torch.rand(2, 3, 3, 16, 16)
    loss, _ = module(clean, distorted)
    features = student(distorted, 2), student(clean, 2)  # of the same weights, without dropout
    assert torch.allclose(loss, distill.distill_loss(*features, (1, 2, 3))[0], atol=1e-5)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())

@pytest.mark.skipif(torch.__version__ < (2, 9), reason="there FakeTensorMode wants a driver")
def test_the_method_mixes_no_devices_on_a_gpu():
    with FakeTensorMode(), torch.device("cuda"):  # shapes and devices without a card
        module = distill.Distillation(small_vit(), small_vit())
        clean = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8) / 255
        kinds = dict.fromkeys(distill.DISTORTIONS, (0, 0.5))
        for one_of in (False, True):
            distorted = distill.distort(clean, None, one_of, 0.2, **kinds)
            loss, terms = module(distill.prepare(clean, 16), distill.prepare(distorted, 16))
            assert {x.device.type for x in (distorted, loss, *terms.values())} == {"cuda"}

@pytest.mark.parametrize("bad", [
    "ViT(15, 8, 64, 1, 1)", "small_vit()(torch.rand(1, 3, 20, 20))", "load_vit('vit_giant', 16)",
    "prepare((255 * x).byte(), 8)", "distort((255 * x).byte(), noise=0.1)",
    "distort(x[0], noise=0.1)", "distort(x, noise=-0.1)", "distort(x, noise=math.nan)",
    "distort(x, noise=math.inf)", "distort(x, noise=(0.5, 0.1))", "distort(x, noise=(1, 2, 3))",
    "distort(x, mask=1.1)", "distort(x, blur=4.0)", "distort(x, salt=(0.5, 1.1))",
    "distort(x, fog=1)", "distort(x, noise=0.1, clean=1.5)", "distill_loss(f(0), f(1, maps=1))"])
def test_bad_arguments_are_value_errors(bad):
    with pytest.raises(ValueError):
        eval(bad, {**vars(distill), **globals(), "f": random_features, "x": torch.rand(1, 3, 8, 8)})

def test_probe_is_within_a_point_of_scikit_learns_best():
    sklearn = pytest.importorskip("sklearn.linear_model")
    from sklearn.datasets import make_blobs
    x, y = make_blobs(7500, 20, centers=4, center_box=(-1, 1), cluster_std=1.5, random_state=0)
    x, y = torch.tensor(x).float(), torch.tensor(y)
    x[:, 3] = 7.0  # a constant
    order = y[:2500].argsort()  # sorted by class: the probe shuffles by itself
    found = evaluation.fit_probe(x[:2500][order], 10 * y[:2500][order])(x[2500:])
    x = (x - x[:2500].mean(0)) / (x[:2500].std(0) + 1e-6)
    best = max(sklearn.LogisticRegression(C=C, max_iter=500).fit(x[:2500], y[:2500]).score(
        x[2500:], y[2500:]) for C in 10.0 ** np.arange(-5, 3))
    assert abs((found == 10 * y[2500:]).float().mean() - best) < 0.01 and best < 0.95

def test_images_are_read_upright_and_in_colour(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 30, 3), np.uint8))
    for mode in ("L", "P", "RGBA", "CMYK", "LA"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        rgb.convert(mode).save(path)
        assert distill.read_image(path).mode == "RGB"
    sideways = Image.Exif()
    sideways[0x112] = 6
    rgb.rotate(90, expand=True).save(path.with_suffix(".webp"), lossless=True, exif=sideways)
    assert distill.read_image(path.with_suffix(".webp")).tobytes() == rgb.tobytes()

def test_the_headline_command_with_its_downloads(world, tmp_path, monkeypatch, capsys):
    def digest(path):
        return hashlib.md5(path.read_bytes()).hexdigest()
    batches = tmp_path / "served/cifar-10-batches-py"
    batches.mkdir(parents=True)
    content = {"data": np.zeros((24, 3072), np.uint8), "labels": [0, 1] * 12, "label_names": "ab"}
    files = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        (batches / name).write_bytes(pickle.dumps(content))
        files[name] = [name, digest(batches / name)]
    archive = Path(shutil.make_archive(
        batches.parent / "cifar-10-python", "gztar", batches.parent, batches.name))
    shutil.copy(world / "vit.pth", batches.parent / "dinov2.pth")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=batches.parent)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    changes = {"url": f"{url}/{archive.name}", "tgz_md5": digest(archive),
               "train_list": list(files.values())[:5], "test_list": [files["test_batch"]],
               "meta": {**datasets.CIFAR10.meta, "md5": files["batches.meta"][1]}}
    for name, value in changes.items():
        monkeypatch.setattr(datasets.CIFAR10, name, value)
    monkeypatch.setitem(distill.WEIGHTS, "dinov2_vits14", f"{url}/dinov2.pth")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    words = "--data cifar10 --noise 0.1 --img-size 16 --epochs 1 --device cpu --workers 0"
    call(distill, words)
    server.shutdown()
    server.server_close()
    first = Path("runs/cifar10-noise0.1")
    assert torch.equal(weights_of(first / "teacher.pth"), weights_of(world / "vit.pth"))
    call(distill, f"{words} --out runs/again")  # the server is gone
    assert same_students(first, Path("runs/again"))
    shutil.rmtree("hub")
    assert "checkpoints" in error_of(capsys, distill, f"{words} --out runs/third")
    assert not Path("runs/third").exists()  # a run that cannot begin owns no folder

# ---- Training and runs ---------------------------------------------------------------------------
def test_a_run_learns_and_leaves_its_folder(world, tmp_path, capsys):
    out = tmp_path / "run"
    call(distill, command(world, out, "--noise 0.3 0.6 --lr 2e-3 --epochs 40"))
    rows = log_of(out)
    pairs = [f"{t}_{who}" for who in ("teacher", "student") for t in distill.TERMS]
    assert list(rows[0]) == ["epoch", "loss", *pairs, "images_per_s"]
    assert len(rows) == 40 and rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert all(rows[-1][f"{t}_student"] < rows[-1][f"{t}_teacher"] for t in distill.TERMS)
    assert torch.equal(weights_of(out / "teacher.pth"), weights_of(world / "vit.pth"))
    assert "epoch 40/40  loss 0." in capsys.readouterr().out

def test_a_new_kind_is_a_function_and_a_line(world, tmp_path, monkeypatch, capsys):
    def invert(images, severity, highest, generator):
        return images + severity * (1 - 2 * images)
    monkeypatch.setitem(distill.DISTORTIONS, "invert", (invert, 1))
    monkeypatch.chdir(tmp_path)
    call(distill, command(world, "''", "--invert 0.2 1 --noise 0.1 --one-of"))  # no --out
    out = Path("runs/images-noise0.1-or-invert0.2-1")
    (out / "log.jsonl").write_text((out / "log.jsonl").read_text().splitlines()[0] + "\n")
    capsys.readouterr()
    call(evaluation, str(out))
    printed = capsys.readouterr().out.splitlines()
    assert "epoch 1 of 2" in printed[0] and max(map(len, printed[:-1])) <= 100
    assert [line.split()[0] for line in printed if "unseen" in line] == [
        "blur0.7", "mask0.5", "salt0.1", "contrast0.7"]
    _, epoch, rows = json.loads((out / "results.json").read_text()).values()
    assert [row["distortion"] for row in rows[:2]] == ["clean", out.name.removeprefix("images-")]
    assert epoch == 1 and [row["trained"] for row in rows] == [False, True] + [False] * 7
    assert all(len(row) == 12 and 0 <= row["clean_probe_student"] <= 1 for row in rows)
    assert rows[1]["attn_teacher"] > 0 and abs(rows[0]["patch_teacher"]) < 1e-6
    assert np.asarray(Image.open(out / "patches.png")).shape == (226 * 6 + 2, 1132, 3)
    assert "--max-images" in error_of(capsys, evaluation, f"{out} --max-images 0")

def test_distances_are_those_of_the_loss():
    cfg = mock.Mock(device="cpu", dtype="float32", img_size=16, mean=[0.5] * 3, std=[0.5] * 3)
    teacher, student = small_vit(), small_vit()
    randomize(student)
    images = torch.randint(256, (7, 3, 16, 16), generator=seeded(0)).byte()
    batches = [(images[:4], None), (images[4:], None)]
    embeddings, distances = distill.compare(teacher, student, batches, cfg, {"contrast": 0.5})
    x = student(2 * distill.distort(images / 255, contrast=0.5) - 1, 1)
    assert close(embeddings["student"], x.cls)
    for term, value in distill.distill_loss(x, teacher(images / 127.5 - 1, 1))[1].items():
        assert abs(distances[f"{term}_student"] - value) < 1e-5

def test_the_default_run_trains_its_teacher_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(distill, "--max-images 64 --epochs 1 --device cpu")
    config = json.loads(Path("runs/stripes-mixture/config.json").read_text())
    severities = {"blur": [0, 1.5], "noise": [0, 0.4], "mask": [0, 0.6]}
    assert (config["one_of"], config["clean"], config["severities"]) == (True, 0.2, severities)

@pytest.mark.parametrize("more", ["", "--weights scratch"])
def test_a_run_goes_on_to_the_same_bits(world, tmp_path, capsys, more):
    more += " --epochs 4 --noise 0.2 --mask 0 0.5 --one-of --clean 0.1"
    whole, broken = [tmp_path / name for name in ("whole", "broken")]
    call(distill, command(world, whole, more))
    words = command(world, broken, f"{more} --workers 2")
    for writes in (1, 4, 3):  # as if killed before the teacher, a last.pt, a student is written
        effects = [mock.DEFAULT] * (writes - 1) + [KeyboardInterrupt]
        stop = mock.patch.object(distill, "save", wraps=distill.save, side_effect=effects)
        with stop, pytest.raises(KeyboardInterrupt):
            call(distill, words)
    call(distill, words)
    assert same_students(whole, broken)
    logs = [[{**row, "images_per_s": 0} for row in log_of(out)] for out in (whole, broken)]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    assert "other options" in error_of(capsys, distill, f"{words} --seed 1")
    (broken / "last.pt").unlink()
    call(distill, words)  # begins anew, and ends there, too
    assert same_students(whole, broken)
    (broken / "config.json").unlink()
    assert "choose another --out" in error_of(capsys, distill, words)

def test_two_processes_end_where_one_does(world, tmp_path):
    two = "-m torch.distributed.run --standalone --nproc-per-node 2"
    for out, more in (("one", ""), ("two", two)):
        line = command(world, tmp_path / out, "--blur 1.0 --lr 1e-3")
        subprocess.run([sys.executable, *more.split(), distill.__file__, *line.split()], check=True)
    one, two = [weights_of(tmp_path / name / "student.pth") for name in ("one", "two")]
    assert (one - two).norm() < 0.05 * (one - weights_of(world / "vit.pth")).norm()

def test_a_compiled_run_is_one_graph_and_ends_like_an_eager_one(world, tmp_path, monkeypatch):
    torch_compile = torch.compile
    backend = mock.Mock(side_effect=lambda graph, inputs: graph.forward)
    monkeypatch.setattr(torch, "compile", lambda function, **more: torch_compile(
        function, backend=backend, fullgraph=True, **more))
    for name in ("no-compile", "compile"):
        more = f"--data {world}/one --noise 0.2 --batch-size 10 --{name}"
        call(distill, command(world, tmp_path / name, more))
    assert backend.call_count == 1
    assert same_students(tmp_path / "no-compile", tmp_path / "compile")
    call(evaluation, f"{tmp_path}/compile")  # of one class there are distances and no probes
    rows = json.loads((tmp_path / "compile/results.json").read_text())["rows"]
    assert len(rows) == 9 and all(len(row) == 8 for row in rows)

BAD = (  # options | what the message says
    "--img-size 0|--img-size, --data-size -16|--data-size, --batch-size 0|--batch-size, --lr 0|lr, "
    "--batch-size 1000|--batch-size, --epochs 0|--epochs, --max-images 0|--max-images, "
    "--weights vit_giant|vit_giant, --weights {text}|{text}, --img-size 20|img_size=20, --seed -1|"
    "--seed, --weights scratch --num-heads 3|num_heads=3, --workers -1|--workers, --lr nan|--lr, "
    "--data nowhere|nowhere, --data {world}/images/val|train/all, --data {world}/odd|other, "
    "--data {world}/deep --workers 2|bad.png, --data {world}/half|bad.jpg, --out {text}|text, "
    "--data stripes|stripes are 32, --noise -1|noise, --blur 8|blur, --mask 0.5 1.1|mask, --clean "
    "1.5|clean, --noise 1 2 3|shape, --lr 1e9|not finite, --device abacus|abacus").split(", ")

@pytest.mark.parametrize("case", BAD)
def test_bad_options_end_in_one_line(case, world, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("hello")
    more, message = case.split("|")
    places = {"text": text, "world": world}
    words = command(world, tmp_path / "run", f"--noise 0.1 {more.format(**places)}")
    assert message.format(**places) in error_of(capsys, distill, words)
    assert text.read_text() == "hello" and not list(tmp_path.glob("run/student.pth"))
