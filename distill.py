# SPDX-License-Identifier: MIT
"""Asymmetric multi-level distillation (arXiv 2604.22529): a frozen Vision Transformer sees clean
images; a student that starts from the same weights sees distorted copies and learns, without
labels, to give the teacher's global embedding, patch features and attention maps.

    python distill.py                               draws images, trains its own teacher first
    python eval.py runs/stripes-mixture             distorted: teacher 77%, student 96% (means of
                                                    4 seeds, 102 s on one CPU core, 2026)
    python distill.py --data cifar10 --noise 0.1    downloads CIFAR-10 and DINOv2's ViT-S/14

Shapes: B images, N patches, T = 1 + registers + N tokens, width D, S pixels a side when distorted.
"""
import argparse
import copy
import json
import math
import os
import pickle
import time
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps, TiffImagePlugin  # which torchvision brings
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import datasets, transforms
from tqdm import tqdm

RANK = int(os.environ.get("RANK", 0))  # set by torchrun: this process's number,
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # its number on this machine,
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many there are
BAR = {"unit": " images", "disable": RANK > 0 or None}  # None: shown on a screen, not in a file
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

class UserError(ValueError):
    """A mistake that the user can mend: main prints its message instead of a traceback."""

# ---- The Vision Transformer: all parameters are named as in DINO and DINOv2 ----------------------
class Features(NamedTuple):
    """What a ViT gives: embeddings after the final norm, and attention probabilities."""
    cls: torch.Tensor  # [B, D], the global embedding
    patches: torch.Tensor  # [B, N, D], row by row
    attn: tuple = ()  # a map [B, heads, T, T] in float32 for each block asked for, in order

class Attention(nn.Module):
    # x86 processors ("AVX2", "AVX512") without AVX512-BF16 or AMX emulate bfloat16.
    bfloat16_is_emulated = torch.backends.cpu.get_cpu_capability().startswith("AVX") and not (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, need_map):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [B, T, 3, heads, D / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, T, D / heads]
        # The fused kernel gives no map. On a CPU with bfloat16 it is 2 to 5 times slower than the
        # product; on one that emulates bfloat16 it is 10 to 17 times faster.
        cpu_bfloat16 = q.dtype == torch.bfloat16 and q.device.type == "cpu"
        if need_map or (cpu_bfloat16 and not self.bfloat16_is_emulated):
            logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # [B, heads, T, T]
            attn = logits.float().softmax(dim=-1)
            y = attn.to(v.dtype) @ v
        else:
            attn = None
            y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2)), attn

class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))  # arXiv 2103.17239

    def forward(self, x):
        return x * self.gamma

class Block(nn.Module):
    def __init__(self, dim, num_heads, hidden_dim, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, hidden_dim), act=nn.GELU(), fc2=nn.Linear(hidden_dim, dim)))
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x, need_map):
        y, attn = self.attn(self.norm1(x), need_map)
        x = x + self.ls1(y)
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x, attn

class ViT(nn.Module):
    """A pre-norm Vision Transformer (arXiv 2010.11929) whose tokens are cls, registers (arXiv
    2309.16588), patches. Sizes in pixels. Raises ValueError unless patch_size divides img_size."""
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio=4.0,
                 num_registers=0, layer_scale=False):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"{img_size=} is not a multiple of {patch_size=}")
        self.num_registers = num_registers
        num_patches = (img_size // patch_size) ** 2
        hidden_dim = round(embed_dim * mlp_ratio)
        proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + num_patches, embed_dim))
        if num_registers:
            self.register_tokens = nn.Parameter(0.02 * torch.randn(1, num_registers, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, hidden_dim, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, images, attn_blocks=0):
        """Features of normalized images [B, 3, img_size, img_size], maps of attn_blocks blocks."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]  # [B, N, D]
        first = self.cls_token + self.pos_embed[:, :1]
        if self.num_registers:  # they get no position embedding
            first = torch.cat([first, self.register_tokens], dim=1)
        x = torch.cat([first.expand(len(x), -1, -1), x], dim=1)  # [B, T, D]
        maps = []
        for i, block in enumerate(self.blocks):
            need_map = i >= len(self.blocks) - attn_blocks
            x, attn = block(x, need_map)
            if need_map:
                maps.append(attn)
        x = self.norm(x)
        return Features(x[:, 0], x[:, 1 + self.num_registers:], tuple(maps))

# ---- Pretrained weights --------------------------------------------------------------------------
WEIGHTS = {  # all under Apache 2.0
    "dinov2_vits14": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "dinov2_vitb14": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "dinov2_vitl14": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "dinov2_vits14_reg": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
    "dino_vits16": "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino_vitb16": "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
}

def resize_pos_embed(pos_embed, side, num_registers):
    """Position embeddings [1, 1 + n * n, D] for side * side patches, as in DINO and DINOv2."""
    n = math.isqrt(pos_embed.shape[1] - 1)
    if n * n != pos_embed.shape[1] - 1:
        raise UserError(f"pos_embed has {pos_embed.shape[1]} rows, not one for cls and n * n")
    if n == side:
        return pos_embed
    grid = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (n, n))  # [1, D, n, n]
    if num_registers:  # as in DINOv2's models with registers
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    else:  # DINO and DINOv2 add 0.1 (dino issue 8); so do we for others' weights
        grid = F.interpolate(grid, scale_factor=(side + 0.1) / n, mode="bicubic")
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

def flatten(content, prefix=""):
    """Nested dicts as a single one: {"model": {"norm.bias": x}} as {"model.norm.bias": x}."""
    flat = {}
    for name, value in content.items():
        name = f"{prefix}{name}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat

def find_vit(checkpoint):
    """The state dict of the ViT in a checkpoint: "teacher.backbone.norm.bias" as "norm.bias"."""
    flat = flatten(checkpoint)
    end = "patch_embed.proj.weight"
    prefixes = [name.removesuffix(end) for name in flat if name.endswith(end)]
    for word in ("model", "teacher", "student", "state_dict"):  # of several ViTs, those with it
        prefixes = [p for p in prefixes if word in p.split(".")] or prefixes
    prefix = prefixes[0] if prefixes else ""
    others = ("head", "mask_token", "masked_embed", "decoder", "dino_head", "ibot_head",
              "pre_logits")
    vit = {name.removeprefix(prefix): x for name, x in flat.items() if name.startswith(prefix)}
    return {name: x for name, x in vit.items() if not name.startswith(others)}

def build_vit(state, img_size, num_heads):
    """The ViT of a state dict with DINO's names, whose architecture is read off it."""
    embed_dim, _, _, patch_size = state["patch_embed.proj.weight"].shape
    depth = sum(name.endswith(".norm1.weight") for name in state)  # one a block
    mlp_ratio = len(state["blocks.0.mlp.fc1.weight"]) / embed_dim
    num_registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    if num_heads is None:  # no shape tells; a fraction is refused
        num_heads = 16 if embed_dim in (1280, 1408, 1664) else embed_dim / 64
    if embed_dim % num_heads or num_heads != int(num_heads):
        raise UserError(f"its width {embed_dim} has no {num_heads:g} heads: see --num-heads")
    vit = ViT(img_size, patch_size, embed_dim, depth, int(num_heads), mlp_ratio, num_registers,
              layer_scale="blocks.0.ls1.gamma" in state)
    pos_embed = state["pos_embed"].float()
    state["pos_embed"] = resize_pos_embed(pos_embed, img_size // patch_size, num_registers)
    missing, unexpected = vit.load_state_dict(state, strict=False)  # copies the values
    if missing or unexpected:
        raise UserError(f"it lacks {missing[:4]}, and has {unexpected[:4]} besides")
    if not all(p.isfinite().all() for p in vit.parameters()):
        raise UserError("it holds NaN or infinity")
    return vit

def load_vit(weights, img_size, num_heads=None):
    """The ViT of a name in WEIGHTS or a checkpoint's path, for images of img_size pixels a side.
    num_heads: 16 for widths 1280, 1408 and 1664, else width / 64. Raises ValueError if the weights
    cannot be had or do not fit, img_size included."""
    options = {"map_location": "cpu", "weights_only": True}  # so that no file runs code
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # their training's options
            if weights in WEIGHTS:
                checkpoint = torch.hub.load_state_dict_from_url(WEIGHTS[weights], **options)
            else:
                checkpoint = torch.load(weights, **options)
        return build_vit(find_vit(checkpoint), img_size, num_heads)
    except KeyError as error:
        reason = f"it has no {error}"
    except pickle.UnpicklingError:
        reason = "it is no file of tensors and plain values alone: save the state dict"
    except Exception as error:  # what is missing, damaged or foreign raises many kinds
        reason = " ".join(str(error).split())[:300]
    raise UserError(f"cannot load weights {weights}: {reason}. Known are {', '.join(WEIGHTS)}; "
                    f"offline, put their files into {torch.hub.get_dir()}/checkpoints")

def prepare(images, img_size, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """A ViT's input: images [B, 3, h, w] in [0, 1] resized to img_size pixels a side by Pillow's
    bicubic kernel and normalized, in float32. Raises ValueError for images that are not floats."""
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}, not floats in [0, 1]")
    images = images.float()
    if images.shape[2:] != (img_size, img_size):  # antialias: Pillow's kernel
        images = F.interpolate(images, (img_size, img_size), mode="bicubic", antialias=True)
    mean = torch.tensor(mean, device=images.device).view(3, 1, 1)
    std = torch.tensor(std, device=images.device).view(3, 1, 1)
    return (images - mean) / std

# ---- Distortions ---------------------------------------------------------------------------------
# To add one, write a function and list it in DISTORTIONS: option, run name and the evaluation of
# such runs follow. It takes images [B, 3, H, W], the severity of each [B, 1, 1, 1], the highest
# that may occur (it sizes blur's kernel) and a generator. Its docstring is the option's help.
def blur(images, severity, highest, generator):
    """sigma of a Gaussian in pixels, edges reflected"""
    B, _, H, W = images.shape
    radius = math.ceil(3 * highest)
    if radius >= min(H, W):  # reflection cannot pad further
        raise ValueError(f"blur {highest:g} is too wide for {H} x {W} pixels")
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    taps = torch.exp(-0.5 * (offsets / severity.clamp(min=1e-3)) ** 2)  # [B, 1, 1, 2 * radius + 1]
    taps = taps / taps.sum(dim=-1, keepdim=True)
    # With the images as channels, a convolution in B groups blurs each one by its own sigma.
    planes = F.pad(images, [radius] * 4, mode="reflect").transpose(0, 1)  # [3, B, ...]
    planes = F.conv2d(planes, taps, groups=B)  # along rows
    planes = F.conv2d(planes, taps.transpose(2, 3), groups=B)  # along columns
    return planes.transpose(0, 1)

def contrast(images, severity, highest, generator):
    """share of the contrast lost, towards mid grey"""
    return images + severity * (0.5 - images)

def noise(images, severity, highest, generator):
    """standard deviation of Gaussian noise"""
    return images + severity * torch.randn(images.shape, generator=generator, device=images.device)

def salt(images, severity, highest, generator):
    """share of pixels set to black or white, half each (ImageNet-C's dots are coloured)"""
    chance = torch.rand(images[:, :1].shape, generator=generator, device=images.device)
    images = torch.where(chance < severity / 2, 0.0, images)  # the lowest black, the highest white
    return torch.where(chance >= 1 - severity / 2, 1.0, images)

def mask(images, severity, highest, generator):
    """share of pixels set to black"""
    chance = torch.rand(images[:, :1].shape, generator=generator, device=images.device)
    return images * (chance >= severity)

DISTORTIONS = {  # name: (function, limit of its severity), in a camera's order
    "blur": (blur, math.inf),
    "contrast": (contrast, 1),
    "noise": (noise, math.inf),
    "salt": (salt, 1),
    "mask": (mask, 1),
}

def distort(images, generator=None, one_of=False, clean=0.0, **severities):
    """Distorted copies of images [B, 3, H, W] in [0, 1], of the same shape and range, in float32.
    severities: for names of DISTORTIONS a number, or (low, high) from which each image draws its
    own. All are applied in turn, or with one_of one to an image; with probability clean it stays as
    it is. generator: on the images' device. Raises ValueError for what is out of range, unknown
    kinds, and images that are not floats."""
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}, not floats in [0, 1]")
    unknown = severities.keys() - DISTORTIONS.keys()
    if unknown or not 0 <= clean <= 1:
        raise ValueError(f"{clean=} is not from 0 to 1, or {unknown} not in {list(DISTORTIONS)}")
    kinds = []
    for name, (function, limit) in DISTORTIONS.items():
        ends = np.atleast_1d(severities.get(name, 0)).tolist()  # [number] or [low, high]
        if len(ends) > 2 or not 0 <= ends[0] <= ends[-1] <= limit or math.isinf(ends[-1]):
            raise ValueError(f"{name} {ends} is no number or range from 0 to {limit}")
        if ends[-1] > 0:
            kinds.append((function, ends[0], ends[-1]))
    with torch.autocast(images.device.type, enabled=False):
        images = images.float()
        per_image = (len(images), 1, 1, 1)
        source = {"generator": generator, "device": images.device}
        own_kind = torch.randint(len(kinds) or 1, per_image, **source)  # randint needs a 1
        distorted = images
        for i, (function, low, high) in enumerate(kinds):
            severity = low + (high - low) * torch.rand(per_image, **source)
            changed = function(distorted, severity, high, generator)
            if one_of:  # all others keep what they have
                changed = torch.where(own_kind == i, changed, distorted)
            distorted = changed
        untouched = torch.rand(per_image, **source) < clean
        return torch.where(untouched, images, distorted).clamp(0, 1)

# ---- The loss ------------------------------------------------------------------------------------
# Only the paper's abstract and introduction could be read: which layers, directions and weights it
# uses is not known. What follows is this repository's choice.
# To add a term, list it here and compute it in distill_loss: weight, log and table follow.
TERMS = ("global", "patch", "attn")

def distill_loss(student, teacher, weights=(1,) * len(TERMS)):
    """The weighted sum of the terms between two Features, and the terms by name: "global" = 1 -
    cosine of cls; "patch" = 1 - cosine of each patch; "attn" = KL(teacher map || student map) in
    nats of each query's row, 0 without maps; all are means, in float32 also under autocast."""
    cls = 1 - F.cosine_similarity(student.cls.float(), teacher.cls.float(), dim=-1).mean()
    patch = 1 - F.cosine_similarity(student.patches.float(), teacher.patches.float(), dim=-1).mean()
    attn = torch.zeros_like(cls)
    for student_map, teacher_map in zip(student.attn, teacher.attn, strict=True):
        log = student_map.float().clamp(min=1e-30).log()  # 0 has no finite logarithm
        kl = F.kl_div(log, teacher_map.float(), reduction="none")  # [B, heads, T, T]
        attn = attn + kl.sum(dim=-1).mean() / len(student.attn)
    terms = {"global": cls, "patch": patch, "attn": attn}
    total = sum(weight * terms[name] for name, weight in zip(TERMS, weights, strict=True))
    return total, terms

class Distillation(nn.Module):
    """The method, as one module for torch.compile and DistributedDataParallel; freezes teacher."""
    def __init__(self, teacher, student, img_size, mean, std, attn_blocks=1,
                 term_weights=(1,) * len(TERMS)):
        super().__init__()
        self.teacher = teacher.requires_grad_(False)
        self.student = student
        self.prepare_args = (img_size, mean, std)
        self.attn_blocks = attn_blocks
        self.term_weights = term_weights

    def forward(self, clean, distorted, labels=None):
        """Images [B, 3, S, S] in [0, 1] (labels are not used): the loss, and its terms by name."""
        with torch.no_grad():
            target = self.teacher(prepare(clean, *self.prepare_args), self.attn_blocks)
        features = self.student(prepare(distorted, *self.prepare_args), self.attn_blocks)
        return distill_loss(features, target, self.term_weights)

class Classifier(nn.Module):
    """A ViT and a linear layer that learn labels [B] of distorted images: without severities, as a
    scratch teacher is trained, these are the clean ones."""
    def __init__(self, vit, num_classes, img_size, mean, std):
        super().__init__()
        self.vit = vit
        self.head = nn.Linear(vit.cls_token.shape[-1], num_classes)
        self.prepare_args = (img_size, mean, std)

    def forward(self, clean, distorted, labels):
        logits = self.head(self.vit(prepare(distorted, *self.prepare_args)).cls)  # [B, num_classes]
        return F.cross_entropy(logits.float(), labels), {}

# ---- Data ----------------------------------------------------------------------------------------
def draw_stripes(root, transform, download, n, seed):
    """n drawings of a disc of stripes; the label is their direction, one of ten. Called as
    torchvision's data sets are: see DATA."""
    uniform = np.random.default_rng(seed).uniform
    y, x = np.mgrid[:32, :32] / 32  # lengths are in sides of the image
    images = []
    for i in range(n):
        angle = np.pi * (i % 10) / 10 + uniform(-0.12, 0.12)
        across = x * np.cos(angle) + y * np.sin(angle)
        wave = np.sin(2 * np.pi * (across / uniform(0.12, 0.22) + uniform()))
        dark = uniform(0, 0.45, size=3)
        light = uniform(0.55, 1, size=3)
        ground = uniform(0.2, 0.8, size=3)
        radius = uniform(0.28, 0.48)
        center_x, center_y = uniform(0.8 * radius, 1 - 0.8 * radius, size=2)
        disc = np.hypot(x - center_x, y - center_y) < radius
        stripes = dark + (light - dark) * (1 + wave[..., None]) / 2  # [32, 32, 3]
        image = 255 * np.where(disc[..., None], stripes, ground)
        images.append(transform(Image.fromarray(image.astype(np.uint8))))
    dataset = TensorDataset(torch.stack(images), torch.arange(n) % 10)
    dataset.classes = list("0123456789")
    return dataset

# To add a data set of torchvision in colour, list it here: its class is called with root, transform
# and download, and has to have a list of classes.
DATA = {  # name: (side in pixels, class, what it takes for the training split, for the test split)
    "stripes": (32, draw_stripes, {"n": 8000, "seed": 1}, {"n": 1000, "seed": 0}),
    "cifar10": (32, datasets.CIFAR10, {"train": True}, {"train": False}),
    "cifar100": (32, datasets.CIFAR100, {"train": True}, {"train": False}),
    "stl10": (96, datasets.STL10, {"split": "train"}, {"split": "test"}),
}

def read_image(path):
    """An image file as an upright RGB PIL.Image. Raises OSError, with the path, for what Pillow
    cannot read or reads wrongly."""
    try:
        image = Image.open(path)
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        bits = max(tags.get(TiffImagePlugin.BITSPERSAMPLE, [8]))
        in_planes = tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2  # Pillow halves their bits
        if image.mode[0] in "IF" or (in_planes and bits > 8):
            raise ValueError("it has more than 8 bits a channel")
        image.getexif()  # called for its cache, from which exif_transpose takes the orientation
        image.info.pop("exif", None)  # exif_transpose rewrites these two, and odd tags make it fail
        image.info.pop("Raw profile type exif", None)
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        raise OSError(f"cannot read the image {path}: {error}") from error

def square(size):
    """The transform of an image into uint8 [3, size, size]: its shorter side resized, cropped."""
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(size), transforms.PILToTensor()])

class Folder(datasets.ImageFolder):
    """The images in a folder's class folders: all that Pillow opens, no hidden folders or files."""
    def __init__(self, root, transform):
        super().__init__(root, transform, loader=read_image, is_valid_file=self.is_image)

    def find_classes(self, directory):
        classes = [name for name in super().find_classes(directory)[0] if name[0] != "."]
        return classes, {name: i for i, name in enumerate(classes)}

    def is_image(self, path):
        name = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
        # Some formats Pillow only writes or leaves to other programs; some are no photos.
        others = (None, "BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF")
        return name not in others and f"{os.sep}." not in path.removeprefix(self.root)

def load_data(cfg):
    """The training and the test set, of (uint8 [3, S, S], label), --max-images of each in a random
    order of seed 0, and the classes' names."""
    transform = square(cfg.data_size)
    try:
        if cfg.data in DATA:
            _, dataset_class, *splits = DATA[cfg.data]
            both = [dataset_class(cfg.root, transform=transform, download=True, **split)
                    for split in splits]
        else:
            second = "val" if os.path.isdir(f"{cfg.data}/val") else "test"
            both = [Folder(f"{cfg.data}/{split}", transform) for split in ("train", second)]
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot get --data {cfg.data}: {error}. Known are {', '.join(DATA)}, and "
                        "folders of train/<class>/* and val/<class>/* or test/<class>/*; offline, "
                        f"put what torchvision would load into {cfg.root}") from error
    classes = both[0].classes
    odd = set(classes) ^ set(both[1].classes)
    if odd:
        raise UserError(f"{cfg.data} has {sorted(odd)} in one of its two splits only")
    def part(dataset):
        order = np.random.default_rng(0).permutation(len(dataset))
        return Subset(dataset, order[:cfg.max_images].tolist())
    return part(both[0]), part(both[1]), classes

def make_loader(dataset, cfg, batch_size, order=None):
    """Batches of a data set, in its own order or that of given indices, read by --workers."""
    return DataLoader(
        dataset, batch_size, sampler=order, num_workers=cfg.workers,
        persistent_workers=cfg.workers > 0, pin_memory=cfg.device.startswith("cuda"),
        generator=torch.Generator())  # of its own, for users of the global one

# ---- Training ------------------------------------------------------------------------------------
def autocast(cfg):
    device_type = torch.device(cfg.device).type
    return torch.autocast(device_type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")

def learning_rate(step, total_steps, peak):
    """The lower of a linear warm-up over 3% of the steps and half a cosine to zero."""
    warmup = math.ceil(0.03 * total_steps)
    return peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / total_steps))

class Muon(torch.optim.Optimizer):
    """Muon (kellerjordan.github.io/posts/muon) for matrices: their momentum is made orthogonal by
    five Newton-Schulz steps and scaled to twice the size of AdamW's updates (arXiv 2502.16982).
    Matrices of one shape go together, in batched products."""
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        lr = self.param_groups[0]["lr"]
        same_shape = defaultdict(list)
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                same_shape[p.shape].append(p)
        for (m, n), params in same_shape.items():
            grads = torch.stack([p.grad for p in params])  # [k, m, n]
            state = self.state[params[0]]  # of all matrices of this shape
            momentum = state.setdefault("momentum", torch.zeros_like(grads))
            momentum.lerp_(grads, 1 - 0.9)
            x = grads.lerp(momentum, 0.9)  # Nesterov's
            x = x.mT if m > n else x
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                s = x @ x.mT
                x = 3.4445 * x + (-4.775 * s + 2.0315 * s @ s) @ x
            x = x.mT if m > n else x
            for p, update in zip(params, x, strict=True):
                p.mul_(1 - lr * 0.05)  # weight decay, AdamW's
                p.sub_(update, alpha=lr * 0.4 * max(m, n) ** 0.5)

def make_optimizers(trained, optimizer, lr):
    """AdamW for parameters {name: p}, or Muon for the blocks' matrices and AdamW for the rest."""
    matrices = [name for name, p in trained.items()
                if optimizer == "muon" and "blocks." in name and p.ndim == 2]
    others = [p for name, p in trained.items() if name not in matrices]
    optimizers = [torch.optim.AdamW(others, lr, weight_decay=0.05, fused=True)]
    if matrices:
        optimizers.append(Muon([trained[name] for name in matrices], lr))
    return optimizers

def random_order(num_images, n, seed, epochs):
    """This process's share of indices of images, n to an epoch, one epoch after the other."""
    for epoch in epochs:
        order = np.random.default_rng((seed, epoch)).permutation(num_images)
        yield from order[:n][RANK::WORLD].tolist()

def train(module, dataset, cfg, epochs, lr, severities, state=None):
    """Train a module with the interface of Distillation. Yields a row of figures an epoch and the
    state from which to go on, to be saved before the next. The order of images depends on (seed,
    epoch), a distortion on (seed, step, process), for up to a million steps."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    optimizers = make_optimizers(trained, cfg.optimizer, lr)
    if state:
        module.load_state_dict(state["module"], strict=False)  # what is frozen is not in it
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    model = torch.compile(module, dynamic=False) if cfg.compile else module
    if WORLD > 1:
        model = nn.parallel.DistributedDataParallel(model)
    generator = torch.Generator(cfg.device)
    steps = len(dataset) // cfg.batch_size  # an epoch, without the ragged last batch
    epochs_left = range(state["epoch"] if state else 0, epochs)
    # One stream of batches for all epochs, so that the loader reads on while an epoch ends.
    order = random_order(len(dataset), steps * cfg.batch_size, cfg.seed, epochs_left)
    batches = iter(make_loader(dataset, cfg, cfg.batch_size // WORLD, order))
    for epoch in epochs_left:
        sums = 0  # of loss and terms; a tensor from the first step on
        bar = tqdm(range(steps), f"epoch {epoch + 1}", unit_scale=cfg.batch_size, **BAR)
        for i in bar:
            images, labels = next(batches)
            if i == 0:
                start = time.perf_counter()  # by now the loader's processes have started
            step = epoch * steps + i
            clean = images.to(cfg.device, non_blocking=True) / 255
            generator.manual_seed((1_000_000 * cfg.seed + step) * WORLD + RANK)
            distorted = distort(clean, generator, cfg.one_of, cfg.clean, **severities)
            with autocast(cfg):
                loss, terms = model(clean, distorted, labels.to(cfg.device, non_blocking=True))
            module.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained.values(), 1.0)
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = learning_rate(step, epochs * steps, lr)
                optimizer.step()
            figures = {"loss": loss, **terms}
            sums += torch.stack([*figures.values()]).detach()
            if i % 20 == 0:  # reading the figures waits for the device
                bar.set_postfix({name: value.item() for name, value in figures.items()})
        if WORLD > 1:
            dist.all_reduce(sums)
        means = dict(zip(figures, (sums / steps / WORLD).tolist(), strict=True))
        rate = steps * cfg.batch_size / (time.perf_counter() - start)
        row = {"epoch": epoch + 1, **means, "images_per_s": rate}
        yield row, {"epoch": epoch + 1, "module": {name: p.detach() for name, p in trained.items()},
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers]}

@torch.inference_mode()
def compare(vits, batches, cfg, conditions, seed=0, with_distances=True):
    """Give vits {"teacher": …, "student": …} the same distorted copies of batches of (images,
    labels), once for each condition k, a pair (severities, one_of). Returns labels [n], embeddings
    [k][who] of shape [n, D], and distances [k][f"{term}_{who}"]: that term of distill_loss, with
    the teacher's features of the clean images as its target."""
    attn_blocks = cfg.attn_blocks if with_distances else 0
    def features_of(vit, images):
        with autocast(cfg):
            return vit(prepare(images, cfg.img_size, cfg.mean, cfg.std), attn_blocks)
    generators = [torch.Generator(cfg.device).manual_seed(1000 * seed + k)
                  for k in range(len(conditions))]
    all_labels = []
    parts = [{who: [] for who in vits} for _ in conditions]  # of the embeddings, by batches
    sums = [defaultdict(float) for _ in conditions]  # of the distances, over images
    for images, labels in batches:
        all_labels.append(labels)
        clean = images.to(cfg.device, non_blocking=True) / 255
        target = features_of(vits["teacher"], clean)
        for k, (severities, one_of) in enumerate(conditions):
            distorted = distort(clean, generators[k], one_of, **severities)
            for who, vit in vits.items():
                if who == "teacher" and not severities:
                    features = target  # these are the clean images: a pass is spared
                else:
                    features = features_of(vit, distorted)
                parts[k][who].append(features.cls.float().clone())  # a view would keep all tokens
                terms = distill_loss(features, target)[1] if with_distances else {}
                for term, value in terms.items():
                    sums[k][f"{term}_{who}"] += value * len(images)
    labels = torch.cat(all_labels)
    embeddings = [{who: torch.cat(part[who]) for who in vits} for part in parts]
    distances = [{name: x.item() / len(labels) for name, x in total.items()} for total in sums]
    return labels, embeddings, distances

# ---- The run -------------------------------------------------------------------------------------
def say(text):
    if RANK == 0:
        print(text, flush=True)

def save(content, path):
    """In the first process, torch.save that leaves path whole or as it was."""
    if RANK == 0:
        torch.save(content, f"{path}.part")
        os.replace(f"{path}.part", path)

def read_checkpoint(out):
    """A run's last.pt, or None where it has not yet finished an epoch."""
    path = f"{out}/last.pt"
    if not os.path.exists(path):
        if os.path.exists(f"{out}/student.pth"):
            raise UserError(f"--out {out} holds a student, and no last.pt from which to go on")
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is damaged raises many kinds
        raise UserError(f"{path} is damaged: to begin anew, move {out} away") from error

def make_teacher(cfg, weights):
    """The ViT of weights; for "scratch" a small one with a grid of 8 by 8 patches."""
    if weights != "scratch":
        teacher = load_vit(weights, cfg.img_size, cfg.num_heads)
    elif cfg.img_size % 8 or 64 % (cfg.num_heads or 1):
        raise UserError(f"--img-size {cfg.img_size} is not a multiple of 8, or --num-heads "
                        "does not divide a width of 64")
    else:
        torch.manual_seed(cfg.seed)
        teacher = ViT(cfg.img_size, patch_size=cfg.img_size // 8, embed_dim=64, depth=4,
                      num_heads=cfg.num_heads or 1)
    if cfg.attn_blocks > len(teacher.blocks):
        raise UserError(f"--attn-blocks {cfg.attn_blocks} of a ViT of {len(teacher.blocks)}")
    return teacher

def open_run(cfg, num_images):
    """See whether the options fit together; returns the teacher and the last checkpoint, if any."""
    if cfg.batch_size > num_images or cfg.batch_size % WORLD:
        raise UserError(f"--batch-size {cfg.batch_size} of {num_images} images in {WORLD} parts")
    try:
        distort(torch.zeros(1, 3, cfg.data_size, cfg.data_size), clean=cfg.clean, **cfg.severities)
    except (ValueError, RuntimeError) as error:  # RuntimeError: more than the memory
        raise UserError(f"at {cfg.data_size} pixels: {error}") from error
    checkpoint = read_checkpoint(cfg.out)
    weights = f"{cfg.out}/teacher.pth" if checkpoint else cfg.weights
    return make_teacher(cfg, weights), checkpoint

def claim(cfg):
    """Make --out this run's by its config.json; returns that file, locked until it is closed."""
    os.makedirs(cfg.out, exist_ok=True)
    path = Path(cfg.out, "config.json")
    file = open(path, "a")  # creates it where it is missing
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.register_at_fork(after_in_child=file.close)  # a worker left over would keep the lock
    except BlockingIOError:
        raise UserError(f"another process is at work in {cfg.out}") from None
    except (ImportError, OSError):  # Windows and some network folders have no locks
        pass
    options = json.dumps(vars(cfg), indent=1)
    if not path.read_text():  # just created
        file.write(options)
        file.flush()
    old = json.loads(path.read_text())
    for name, value in json.loads(options).items():  # with lists for tuples, as in the file
        if old.get(name) != value and name not in ("out", "root", "device", "workers", "compile"):
            file.close()
            raise UserError(f"{cfg.out} holds a run with {name} {old.get(name)}, not {value}")
    return file

def train_teacher(teacher, cfg, train_set, num_classes):
    """Teach a scratch ViT the labels of clean images."""
    classifier = Classifier(teacher, num_classes, cfg.img_size, cfg.mean, cfg.std)
    classifier.to(cfg.device)
    # At the student's higher rate attention gets too sharp to distil.
    for row, _ in train(classifier, train_set, cfg, cfg.pretrain_epochs, 1e-3, severities={}):
        say(f"teacher: {json.dumps(row)}")

def train_student(teacher, cfg, train_set, test_set, checkpoint):
    """Distil the teacher, from the checkpoint on if there is one; write the run's folder."""
    student = copy.deepcopy(teacher)  # before the teacher is frozen
    torch.manual_seed(cfg.seed)  # for parameters of a module put in Distillation's place
    module = Distillation(teacher, student, cfg.img_size, cfg.mean, cfg.std, cfg.attn_blocks,
                          cfg.loss_weights)
    module.to(cfg.device)
    if not checkpoint:
        save(teacher.state_dict(), f"{cfg.out}/teacher.pth")
    log = checkpoint["log"] if checkpoint else []
    def save_student():
        save(student.state_dict(), f"{cfg.out}/student.pth")
        if RANK == 0:
            Path(cfg.out, "log.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in log))
    vits = {"teacher": teacher, "student": student}
    held_out = make_loader(Subset(test_set, range(len(test_set))[:500]), cfg, cfg.batch_size)
    for row, state in train(module, train_set, cfg, cfg.epochs, cfg.lr, cfg.severities, checkpoint):
        _, _, [distances] = compare(vits, held_out, cfg, [(cfg.severities, cfg.one_of)])
        row |= distances
        log.append(row)
        say(json.dumps(row))
        if not all(math.isfinite(value) for value in row.values()):
            raise UserError("the last row is not finite: lower --lr, with another --out")
        save({**state, "log": log}, f"{cfg.out}/last.pt")  # before what can be made from it
        save_student()
    save_student()  # also where no epoch was left: then train has only loaded the checkpoint

def end_together(error):
    """Raise this process's error, if it has one; if only another has, end without a word."""
    errors = [error] * WORLD
    if WORLD > 1:
        dist.all_gather_object(errors, error)
    if error:
        raise error
    if any(errors):
        raise SystemExit(2)

def run(cfg):
    """The whole run, in this process and in those that torchrun has started beside it."""
    if WORLD > 1:
        print(f"process {RANK} waits for the other {WORLD - 1}", flush=True)
        on_gpu = cfg.device == "cuda"
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    error = claimed = data = None
    found = [None, None]  # teacher and checkpoint; all but the first process receive them below
    try:
        if LOCAL_RANK == 0:  # a machine's first process downloads, the others wait
            data = load_data(cfg)
        if RANK == 0:
            found = list(open_run(cfg, len(data[0])))
            claimed = claim(cfg)
    except (UserError, OSError) as caught:
        error = caught  # not raised before all have met in end_together, or they would wait
    try:
        end_together(error)
        if WORLD > 1:
            dist.broadcast_object_list(found)
        teacher, checkpoint = found
        train_set, test_set, classes = data or load_data(cfg)
        say(json.dumps(vars(cfg)))
        if cfg.weights == "scratch" and not checkpoint:
            train_teacher(teacher, cfg, train_set, len(classes))
        train_student(teacher, cfg, train_set, test_set, checkpoint)
        say(f"{cfg.out} is finished; next: python eval.py {cfg.out}")
    finally:
        if claimed:
            claimed.close()
            if not os.path.exists(f"{cfg.out}/last.pt"):  # nothing was saved
                os.unlink(f"{cfg.out}/config.json")

# ---- The options ---------------------------------------------------------------------------------
def describe(severities, one_of):
    """Distortions as text: noise0.1, blur1+noise0-0.4, blur1-or-noise0.1."""
    parts = [name + "-".join(f"{end:g}" for end in np.unique(value))
             for name, value in severities.items()]
    return ("-or-" if one_of else "+").join(parts) or "clean"

def at_least(low, number=int):
    """A type for argparse: finite numbers from low on."""
    def parse(text):
        if not low <= number(text) < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a number from {low} on")
        return number(text)
    parse.__name__ = number.__name__  # for argparse's message
    return parse

def make_parser():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__.split("\n\n")[0])
    best = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    count = at_least(1)
    share = at_least(0, float)
    add = parser.add_argument
    # What is read
    add("--data", default="stripes", help=f"{', '.join(DATA)}, or a folder of images [stripes]")
    add("--root", default="data", help="where data sets are downloaded to [data]")
    add("--max-images", type=count, help="a random part of either split [all]")
    add("--weights", help="a name, file or scratch, a small ViT [dinov2_vits14; stripes scratch]")
    add("--num-heads", type=count, help="[width / 64; of the widths 1280, 1408 and 1664 16]")
    add("--mean", type=share, nargs=3, default=IMAGENET_MEAN, help="of the weights [ImageNet's]")
    add("--std", type=at_least(1e-6, float), nargs=3, default=IMAGENET_STD, help="[ImageNet's]")
    add("--data-size", type=count, help="side in pixels when distorted [32; stl10 96; folder 224]")
    add("--img-size", type=count, help="side in pixels for the ViT [224; scratch the data size]")
    # Distortions
    for name, (function, _) in DISTORTIONS.items():
        add(f"--{name}", type=share, nargs="+", help=f"{function.__doc__}; a value or a range [0]")
    add("--one-of", action="store_true", help="each image gets one of the distortions, not all")
    add("--clean", type=share, help="share of images that stay clean [0]. Without a distortion: "
        "--blur 0 1.5 (per 32 pixels) --noise 0 0.4 --mask 0 0.6 --one-of --clean 0.2")
    # Training
    add("--loss-weights", type=share, nargs=len(TERMS), default=[1.0] * len(TERMS), metavar=TERMS)
    add("--attn-blocks", type=count, default=1, help="last blocks whose maps are compared [1]")
    add("--epochs", type=count, default=4, help="of the student [4]")
    add("--pretrain-epochs", type=count, default=1, help="of a scratch teacher [1]")
    add("--batch-size", type=count, help="of all processes together [64; scratch 16]")
    add("--optimizer", choices=["adamw", "muon"], help="muon: of the blocks' matrices [adamw; "
        "scratch muon]")
    add("--lr", type=at_least(1e-9, float), help="the student's highest [3e-5; scratch 5e-3]")
    add("--seed", type=at_least(0), default=0, help="of weights, order and distortions [0]")
    # The machine
    add("--device", default=best, help=f"cuda, mps or cpu [{best}]")
    add("--dtype", choices=["float32", "bfloat16"], help="[cuda bfloat16, else float32]")
    add("--compile", action=argparse.BooleanOptionalAction, help="[on cuda, where it works]")
    add("--workers", type=at_least(0), default=2 if best == "cpu" else 8, help="[2; GPU 8]")
    add("--out", help="run folder; the same command goes on there [runs/<data>-<distortions>]")
    return parser

def check_device(cfg):
    """Raise UserError for a device that is not there; say where bfloat16 will be slow."""
    try:
        if cfg.device == "cuda":
            torch.cuda.set_device(LOCAL_RANK)
        torch.zeros(1, device=cfg.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {cfg.device}: {error!r:.200}") from error
    if (cfg.device, cfg.dtype) == ("cpu", "bfloat16") and Attention.bfloat16_is_emulated:
        say("this processor emulates bfloat16: --dtype float32 is many times faster")

def can_compile(device):
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=device))
    except Exception:  # no C compiler, no Triton, an old card: each raises its own kind
        return False
    return True

def fill_in(cfg):
    """Give options that were not typed their values, which depend on others."""
    cfg.data_size = cfg.data_size or (DATA[cfg.data][0] if cfg.data in DATA else 224)
    cfg.severities = {}
    for name in DISTORTIONS:
        value = vars(cfg).pop(name)
        if value:  # None was not typed; [0.0] was, and counts
            cfg.severities[name] = value
    if cfg.severities:
        distortions = describe(cfg.severities, cfg.one_of)
        cfg.clean = cfg.clean or 0.0
    else:
        distortions = "mixture"
        blur = [0, 1.5 * cfg.data_size / 32]
        cfg.severities = {"blur": blur, "noise": [0, 0.4], "mask": [0, 0.6]}
        cfg.one_of = True
        cfg.clean = 0.2 if cfg.clean is None else cfg.clean
    seed = f"-seed{cfg.seed}" if cfg.seed else ""
    cfg.out = cfg.out or f"runs/{Path(cfg.data).resolve().name}-{distortions}{seed}"
    cfg.weights = cfg.weights or ("scratch" if cfg.data == "stripes" else "dinov2_vits14")
    scratch = cfg.weights == "scratch"
    cfg.img_size = cfg.img_size or (cfg.data_size if scratch else 224)
    cfg.batch_size = cfg.batch_size or (16 if scratch else 64)
    cfg.optimizer = cfg.optimizer or ("muon" if scratch else "adamw")
    cfg.lr = cfg.lr or (5e-3 if scratch else 3e-5)
    on_gpu = cfg.device.startswith("cuda")
    cfg.dtype = cfg.dtype or ("bfloat16" if on_gpu else "float32")
    check_device(cfg)
    if cfg.compile is None:  # not typed
        cfg.compile = on_gpu and can_compile(cfg.device)
    elif cfg.compile and not can_compile(cfg.device):
        raise UserError("this machine cannot compile: try --no-compile")

def main():
    parser = make_parser()
    cfg = parser.parse_args()
    try:
        fill_in(cfg)
        run(cfg)
    except (UserError, OSError) as error:
        parser.error((str(error) or repr(error)).splitlines()[-1])  # after a loader's traceback
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
