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
import tarfile
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
    torch.manual_seed(seed)
    attn = tuple(torch.rand(3, 2, 5, 5).softmax(-1) for _ in range(maps))
    return distill.Features(torch.randn(3, 8), torch.randn(3, 4, 8), attn)

def command(world, out, more=""):
    """distill.py's options for a run of a second; what is typed last counts."""
    return (f"--data {world}/images --weights {world}/vit.pth --data-size 16 --img-size 16 "
            f"--batch-size 8 --workers 0 --device cpu --epochs 2 --out {out} {more}")

def call(module, words):
    with mock.patch.object(sys, "argv", [module.__file__, *shlex.split(words)]):
        module.main()

def error_of(capsys, module, words):
    """The line with which a command fails."""
    with pytest.raises(SystemExit, match="2"):
        call(module, words)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in line
    return line

def launch(words, launcher=""):
    line = [sys.executable, *launcher.split(), str(HERE / "distill.py"), *shlex.split(words)]
    subprocess.run(line, check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})

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
    Image.fromarray(np.full((9, 9), 3, np.uint16)).save(root / "deep/train/class0/bad.png")
    png = (root / "images/val/class0/0.png").read_bytes()
    (root / "half/train/class0/bad.jpg").write_bytes(png[:99])
    torch.save(small_vit().state_dict(), root / "vit.pth")
    return root

# ---- The ViT and its weights ---------------------------------------------------------------------
@pytest.mark.parametrize("name", [
    "small_patch14_dinov2", "small_patch14_reg4_dinov2", "tiny_patch16_224", "huge_patch14_224"])
def test_features_and_maps_are_timms(name, tmp_path, monkeypatch):
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
            found = ours(images, 1)
    assert close(found.cls.float(), tokens[:, 0], 0.1) and found.attn[0].dtype == torch.float32

def test_an_exported_vit_takes_any_number_of_images():
    vit = small_vit()
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(vit, (torch.rand(2, 3, 16, 16),), dynamic_shapes=dynamic)
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
    ("pos_embed", torch.zeros(1, 4, 64), "unflatten"), ("cls_token", Attack(), "Unpickling"),
    ("patch_embed.proj.weight", None, "patch_embed.proj.weight"),
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
    images = torch.rand(2, 3, before, before, dtype=torch.float64)
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    found = distill.prepare(images, after, mean, std)
    for channel in range(3):
        plane = pillow_resized(images[1, channel].float(), after)
        assert close(found[1, channel], (plane - mean[channel]) / std[channel], 1e-5)
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
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distill.distort(images, seeded(0), True, 0.25, **kinds), found)
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
    assert distill.distill_loss(s._replace(attn=()), t._replace(attn=()))[1]["attn"] == 0

def test_loss_of_sharp_attention_is_exact():
    student, teacher = 20 * torch.randn(2, 3, 2, 5, 5, generator=seeded(2))  # sharp, as block 0's
    target, features = teacher.softmax(-1), random_features(0)
    student.requires_grad_()
    pair = [features._replace(attn=(attn,)) for attn in (student.softmax(-1), target)]
    found = distill.distill_loss(*pair)[1]["attn"]
    exact = F.kl_div(student.log_softmax(-1), target, reduction="none").sum(-1).mean()
    grads = [torch.autograd.grad(loss, student)[0] for loss in (found, exact)]
    assert close(found, exact) and close(*grads)

class DroppingViT(distill.ViT):
    def forward(self, images, attn_blocks=0):
        return super().forward(F.dropout(images, 0.5, self.training), attn_blocks)

def test_the_method_is_a_module_that_leaves_the_teacher_alone():
    teacher = DroppingViT(16, 8, 64, 2, 1)
    randomize(teacher)
    student = copy.deepcopy(teacher).eval()
    module = distill.Distillation(teacher, student, 2, (1, 2, 3))
    clean, distorted = torch.rand(2, 3, 3, 16, 16)
    loss, _ = module(clean, distorted)
    features = student(distorted, 2), student(clean, 2)  # of the same weights, without dropout
    assert torch.allclose(loss, distill.distill_loss(*features, (1, 2, 3))[0], atol=1e-5)
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())

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
    "ViT(15, 8, 64, 1, 1)", "small_vit()(torch.rand(1, 3, 20, 20))",
    "load_vit('vit_giant', 16)", "prepare((255 * images).byte(), 8)",
    "distort((255 * images).byte(), noise=0.1)", "distort(images[0], noise=0.1)",
    "distort(images, noise=-0.1)", "distort(images, noise=math.nan)",
    "distort(images, noise=math.inf)", "distort(images, noise=(0.5, 0.1))",
    "distort(images, noise=(1, 2, 3))", "distort(images, mask=1.1)", "distort(images, blur=4.0)",
    "distort(images, salt=(0.5, 1.1))", "distort(images, contrast=1.1)", "distort(images, fog=1)",
    "distort(images, noise=0.1, clean=1.5)", "distill_loss(f(0), f(1, maps=1))"])
def test_bad_arguments_are_value_errors(bad):
    names = {**vars(distill), "small_vit": small_vit, "f": random_features,
             "images": torch.rand(1, 3, 8, 8)}
    with pytest.raises(ValueError):
        eval(bad, names)

def blobs(n, seed=0):
    """n noisy points around a centre for each of four classes, and their labels."""
    g = seeded(seed)
    y = torch.randint(4, (n,), generator=g)
    return torch.randn(4, 20, generator=seeded(99))[y] + 1.5 * torch.randn(n, 20, generator=g), y

def test_probe_is_within_a_point_of_scikit_learns_best():
    linear_model = pytest.importorskip("sklearn.linear_model")
    (x, y), (test_x, test_y) = blobs(2500), blobs(5000, seed=1)
    x[:, 3] = test_x[:, 3] = 7.0  # a constant
    order = (10 * y).argsort()  # sorted by class: the probe shuffles by itself
    found = evaluation.fit_probe(x[order], 10 * y[order])(test_x)
    right = (found == 10 * test_y).float().mean()
    x, test_x = [(features - x.mean(0)) / (x.std(0) + 1e-6) for features in (x, test_x)]
    models = [linear_model.LogisticRegression(C=C, max_iter=500) for C in 10.0 ** np.arange(-5, 3)]
    assert abs(right - max(model.fit(x, y).score(test_x, test_y) for model in models)) < 0.01

# ---- The data ------------------------------------------------------------------------------------
def test_a_folder_of_what_people_have(tmp_path):
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 30, 3), np.uint8))
    sideways = Image.Exif()
    sideways[0x112] = 6
    for split in ("train", "test"):
        folder = tmp_path / split / "a b[1]"
        folder.mkdir(parents=True)
        for mode in ("RGB", "L", "P", "RGBA", "CMYK", "LA"):
            rgb.convert(mode).save(folder / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}")
        rgb.rotate(90, expand=True).save(folder / "turned.webp", lossless=True, exif=sideways)
        (folder / "notes.txt").write_text("no image")
    cfg = argparse.Namespace(data=str(tmp_path), data_size=16, max_images=None)
    images = torch.stack([image for image, _ in distill.load_data(cfg)[0]])
    assert images.shape == (7, 3, 16, 16) and images.dtype == torch.uint8
    expected = np.asarray(rgb.crop((0, 10, 30, 40)).resize((16, 16)), float)
    distances = np.abs(images.permute(0, 2, 3, 1).numpy() - expected).mean((1, 2, 3))
    assert (distances < 6).sum() >= 3  # RGB, RGBA and the one that was turned

def test_the_headline_command_with_its_downloads(world, tmp_path, monkeypatch, capsys):
    """CIFAR-10 and DINOv2 by torchvision's and torch.hub's own code, from a server of small ones;
    the second time from disk."""
    def digest(path):
        return hashlib.md5(path.read_bytes()).hexdigest()
    batches = tmp_path / "served/cifar-10-batches-py"
    batches.mkdir(parents=True)
    pixels = np.arange(24, dtype=np.uint8).repeat(3072).reshape(24, 3072)
    content = {"data": pixels, "labels": [0, 1] * 12, "label_names": ["cat", "dog"]}
    files = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch", "batches.meta"]:
        (batches / name).write_bytes(pickle.dumps(content))
        files[name] = [name, digest(batches / name)]
    archive = batches.parent / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(batches, batches.name)
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
    first, second = Path("runs/cifar10-noise0.1"), Path("runs/again")
    assert torch.equal(weights_of(first / "teacher.pth"), weights_of(world / "vit.pth"))
    call(distill, f"{words} --out {second}")  # without a server
    assert same_students(first, second)
    shutil.rmtree("hub")
    assert "checkpoints" in error_of(capsys, distill, f"{words} --out runs/third")
    assert not Path("runs/third").exists()  # a run that cannot begin owns no folder
    shutil.rmtree("data")
    assert "--data cifar10" in error_of(capsys, distill, words)

# ---- Training and runs ---------------------------------------------------------------------------
def test_a_run_learns_and_leaves_its_folder(world, tmp_path, capsys):
    out = tmp_path / "run"
    with mock.patch.object(distill, "learning_rate", wraps=distill.learning_rate) as rate:
        call(distill, command(world, out, "--noise 0.3 0.6 --lr 2e-3 --epochs 40"))
    assert [c.args for c in rate.mock_calls] == [(i, 240, 2e-3) for i in range(240)]
    rows = log_of(out)
    assert list(rows[0]) == ["epoch", "loss", *[
        f"{term}_{who}" for who in ("teacher", "student") for term in distill.TERMS],
        "images_per_s"]
    assert len(rows) == 40 and rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert all(rows[-1][f"{t}_student"] < rows[-1][f"{t}_teacher"] for t in distill.TERMS)
    assert torch.equal(weights_of(out / "teacher.pth"), weights_of(world / "vit.pth"))
    printed = capsys.readouterr().out
    assert "epoch 40/40  loss 0." in printed and f"next: python eval.py {out}" in printed

def test_a_new_kind_is_one_function_and_one_line_also_in_the_evaluation(
        world, tmp_path, monkeypatch, capsys):
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
    results = json.loads((out / "results.json").read_text())
    assert results["epoch"] == 1 and results["config"]["epochs"] == 2
    rows = results["rows"]
    assert [row["distortion"] for row in rows[:2]] == ["clean", out.name.removeprefix("images-")]
    assert [row["trained"] for row in rows] == [False, True] + [False] * 7
    assert all(len(row) == 12 and 0 <= row["clean_probe_student"] <= 1 for row in rows)
    assert rows[1]["attn_teacher"] > 0 and abs(rows[0]["patch_teacher"]) < 1e-6
    assert np.asarray(Image.open(out / "patches.png")).shape == (226 * 6 + 2, 1132, 3)
    assert "--max-images 0" in error_of(capsys, evaluation, f"{out} --max-images 0")
    assert "config.json" in error_of(capsys, evaluation, str(tmp_path))

def test_images_of_one_class_have_distances_and_no_probes(world, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(world / f"images/{split}/class0", tmp_path / f"one/{split}/all")
    call(distill, command(world, tmp_path / "run", f"--noise 0.2 --data {tmp_path}/one"))
    call(evaluation, f"{tmp_path}/run")
    rows = json.loads((tmp_path / "run/results.json").read_text())["rows"]
    assert len(rows) == 9 and all(len(row) == 8 for row in rows)

def test_distances_are_those_of_the_loss():
    half = (0.5,) * 3
    cfg = argparse.Namespace(device="cpu", dtype="float32", img_size=16, mean=half, std=half)
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
    call(evaluation, "runs/stripes-mixture --max-images 60")

@pytest.mark.parametrize("more", ["", "--weights scratch"])
def test_a_run_goes_on_to_the_same_bits(world, tmp_path, capsys, more):
    more += " --epochs 4 --noise 0.2 --mask 0 0.5 --one-of --clean 0.1"
    whole, broken = [tmp_path / name for name in ("whole", "broken")]
    call(distill, command(world, whole, more))
    words = command(world, broken, f"{more} --workers 2")
    save = distill.save
    for writes in (1, 4, 3):  # as if killed before the teacher, a last.pt, a student is written
        effects = [save] * (writes - 1) + [KeyboardInterrupt]
        def stop(content, path, effects=effects):
            effect = effects.pop(0)
            if effect is KeyboardInterrupt:
                raise effect
            effect(content, path)
        with mock.patch.object(distill, "save", stop), pytest.raises(KeyboardInterrupt):
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
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2"
    more = "--blur 1.0 --lr 1e-3"
    launch(command(world, tmp_path / "one", more))
    launch(command(world, tmp_path / "two", more), launcher)
    one, two = [weights_of(tmp_path / name / "student.pth") for name in ("one", "two")]
    assert (one - two).norm() < 0.05 * (one - weights_of(world / "vit.pth")).norm()

def test_a_compiled_run_is_one_graph_and_ends_like_an_eager_one(world, tmp_path, monkeypatch):
    torch_compile = torch.compile
    backend = mock.Mock(side_effect=lambda graph, inputs: graph.forward)
    monkeypatch.setattr(torch, "compile", lambda function, **more: torch_compile(
        function, backend=backend, fullgraph=True, **more))
    for name in ("no-compile", "compile"):
        more = f"--noise 0.2 --epochs 4 --batch-size 10 --{name}"
        call(distill, command(world, tmp_path / name, more))
    assert backend.call_count == 1
    assert same_students(tmp_path / "no-compile", tmp_path / "compile")

# ---- What goes wrong -----------------------------------------------------------------------------
BAD = (  # options | what the message says
    "--img-size 0|--img-size, --data-size -16|--data-size, --batch-size 0|--batch-size, "
    "--batch-size 1000|--batch-size, --epochs 0|--epochs, --max-images 0|--max-images, "
    "--weights vit_giant|vit_giant, --weights {text}|{text}, --img-size 20|img_size=20, "
    "--weights scratch --num-heads 3|num_heads=3, --seed -1|--seed, --workers -1|--workers, "
    "--lr 0|--lr, --lr nan|--lr, --data nowhere|nowhere, --data {world}/images/val|train/all, "
    "--data {world}/odd|other classes, --data {world}/deep --workers 2|bad.png, "
    "--data {world}/half|bad.jpg, --data stripes|stripes are 32, --out {text}|{text}, "
    "--noise -1|noise, --blur 8|blur, --mask 0.5 1.1|mask, --clean 1.5|clean, "
    "--noise 1 2 3|shape, --lr 1e9|not finite, --device abacus|abacus").split(", ")

@pytest.mark.parametrize("case", BAD)
def test_bad_options_end_in_one_line(case, world, tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("hello")
    more, message = case.split("|")
    places = {"text": text, "world": world}
    words = command(world, tmp_path / "run", f"--noise 0.1 {more.format(**places)}")
    assert message.format(**places) in error_of(capsys, distill, words)
    assert text.read_text() == "hello" and not list(tmp_path.glob("run/student.pth"))
