# SPDX-License-Identifier: MIT
"""Asymmetric multi-level distillation (arXiv 2604.22529): a frozen teacher sees clean images; a
student that starts from the same Vision Transformer's weights sees distorted copies and learns,
without labels, to give the teacher's global embedding, patch features and attention maps.

Shapes: B images, N patches, T = 1 + registers + N tokens, D the width of an embedding, S the side
in pixels at which images are stored and distorted. Tested against torchvision's and timm's ViTs.
"""
import argparse
import contextlib
import copy
import datetime
import functools
import hashlib
import io
import json
import math
import os
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# Set by torchrun: global rank, rank on this machine, number of processes.
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

class UserError(ValueError):
    """A mistake that the user can mend: the message says what is wrong and what to do."""

@contextlib.contextmanager
def explain(message, *errors):
    """Turn these errors into UserErrors whose messages begin with this one."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except errors as error:
        raise UserError(f"{message}: {error}") from error

# ---- The Vision Transformer: parameters are named as in DINO and DINOv2 --------------------------

class Features(NamedTuple):
    """What a ViT gives: embeddings after the final norm, and attention probabilities."""
    cls: torch.Tensor  # [B, D], the global embedding
    patches: torch.Tensor  # [B, N, D], row by row
    attn: tuple = ()  # of [B, heads, T, T], one for each block asked for, the last block's last

class PatchEmbed(nn.Module):
    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, N, D]

class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, need_map):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [B, T, 3, heads, D / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, T, D / heads]
        # The fused kernel returns no map, and in bfloat16 on a CPU it is 2 to 5 times slower.
        if need_map or (q.dtype == torch.bfloat16 and q.device.type == "cpu"):
            logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # [B, heads, T, T]
            attn = logits.float().softmax(dim=-1)
            y = attn.to(v.dtype) @ v
        else:
            attn = None
            y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2)), attn

class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))

class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))  # arXiv 2103.17239

    def forward(self, x):
        return x * self.gamma

class Block(nn.Module):
    def __init__(self, dim, num_heads, hidden_dim, layer_scale):
        super().__init__()
        scale = LayerScale if layer_scale else nn.Identity  # Identity ignores its argument
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = scale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden_dim)
        self.ls2 = scale(dim)

    def forward(self, x, need_map):
        y, attn = self.attn(self.norm1(x), need_map)
        x = x + self.ls1(y)
        return x + self.ls2(self.mlp(self.norm2(x))), attn

class ViT(nn.Module):
    """A pre-norm Vision Transformer (arXiv 2010.11929) that also gives its attention maps.

    img_size and patch_size are sides in pixels; registers are those of arXiv 2309.16588. Tokens:
    cls, registers, patches. Raises ValueError for sizes below 1, and unless patch_size divides
    img_size and num_heads divides embed_dim.
    """
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio=4.0,
                 num_registers=0, layer_scale=False):
        super().__init__()
        if min(img_size, patch_size, embed_dim, depth, num_heads) < 1:
            raise ValueError("img_size, patch_size, embed_dim, depth and num_heads are at least 1")
        if img_size % patch_size or embed_dim % num_heads:
            raise ValueError(f"not divisible: {img_size=} {patch_size=} {embed_dim=} {num_heads=}")
        self.img_size = img_size
        self.num_registers = num_registers
        num_patches = (img_size // patch_size) ** 2
        hidden_dim = round(embed_dim * mlp_ratio)

        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + num_patches, embed_dim))
        if num_registers:
            self.register_tokens = nn.Parameter(0.02 * torch.randn(1, num_registers, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, hidden_dim, layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, images, attn_blocks=0):
        """Features of normalized images [B, 3, img_size, img_size], with the float32 attention maps
        of the last attn_blocks blocks. Raises ValueError for other shapes and for more blocks than
        there are.
        """
        if images.shape[1:] != (3, self.img_size, self.img_size):
            raise ValueError(f"images {list(images.shape)} are not {self.img_size} pixels a side")
        if not 0 <= attn_blocks <= len(self.blocks):
            raise ValueError(f"{attn_blocks} attention blocks of a ViT that has {len(self.blocks)}")
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        if self.num_registers:  # they get no position embedding
            registers = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)  # [B, T, D]

        first_map = len(self.blocks) - attn_blocks
        maps = []
        for i, block in enumerate(self.blocks):
            x, attn = block(x, need_map=i >= first_map)
            maps.append(attn)
        x = self.norm(x)
        return Features(x[:, 0], x[:, 1 + self.num_registers:], tuple(maps[first_map:]))

# ---- Pretrained weights --------------------------------------------------------------------------

WEIGHTS = {  # name: the publisher's file
    "dinov2_vits14":
      "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "dinov2_vitb14":
      "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "dinov2_vitl14":
      "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "dinov2_vits14_reg":
      "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
    "dinov2_vitb14_reg":
      "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
    "dinov2_vitl14_reg":
      "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
    "dino_vits16":
      "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino_vits8":
      "https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    "dino_vitb16":
      "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "deit_tiny": "https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small": "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth",
}

def read_tensors(path):
    """What torch.save wrote: tensors in containers and no more, so that no file runs code."""
    with explain(f"{path} is damaged or holds more than tensors", Exception):
        return torch.load(path, map_location="cpu", weights_only=True)

def download(url):
    """The state dict at this URL, which torch.hub keeps."""
    file = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    hint = (f"cannot load {url}: delete {file} if it exists, it is damaged; without a network put "
            "it there, or use --weights PATH or --weights scratch")
    with explain(hint, Exception):
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)

def load_vit(weights, img_size):
    """The ViT of pretrained weights, for images of img_size pixels a side.

    weights is a name in WEIGHTS or the path of a state dict with DINO's names, which may lie under
    "model". The architecture is read off it, but for the number of heads, which no shape tells:
    they are taken to be 64 wide, as in all of WEIGHTS. Raises UserError (a ValueError) for unknown
    or damaged weights, without a network, for another architecture or an unfit size.
    """
    if weights in WEIGHTS:
        state = download(WEIGHTS[weights])
    elif os.path.isfile(weights):
        state = read_tensors(weights)
    else:
        raise UserError(f"--weights {weights} is neither a file nor scratch, {', '.join(WEIGHTS)}")
    with explain(f"{weights} does not fit", Exception):  # whatever a foreign file may lack
        state = state.get("model", state)
        dropped = ("mask_token", "head")
        state = {key: value for key, value in state.items() if not key.startswith(dropped)}
        embed_dim, _, _, patch_size = state["patch_embed.proj.weight"].shape
        if embed_dim % 64:
            raise ValueError(f"its width {embed_dim} is not a multiple of 64")
        depth = sum(key.endswith(".norm1.weight") for key in state)  # one a block
        num_registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        vit = ViT(img_size, patch_size, embed_dim, depth, num_heads=embed_dim // 64,
                  mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / embed_dim,
                  num_registers=num_registers, layer_scale="blocks.0.ls1.gamma" in state)

        # Position embeddings are resized bicubically to the new grid of patches, as in DINO.
        pos = state["pos_embed"].float()
        side = math.isqrt(pos.shape[1] - 1)
        grid = pos[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # [1, D, side, side]
        grid = F.interpolate(grid, img_size // patch_size, mode="bicubic")
        grid = grid.flatten(2).transpose(1, 2)  # [1, N, D]
        state["pos_embed"] = torch.cat([pos[:, :1], grid], dim=1)
        vit.load_state_dict(state)  # copies the values
    return vit

# Mean and standard deviation of the channels, each [3, 1, 1].
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)

def prepare(images, img_size):
    """A ViT's input: images [B, 3, h, w] in [0, 1] resized bicubically to img_size pixels a side,
    antialiased when made smaller, and normalized with ImageNet's mean and standard deviation.
    """
    if images.shape[2:] != (img_size, img_size):
        smaller = img_size < max(images.shape[2:])
        images = F.interpolate(images, img_size, mode="bicubic", antialias=smaller)
    mean, std = IMAGENET.to(images.device, non_blocking=True)
    return (images - mean) / std

# ---- Distortions ---------------------------------------------------------------------------------
# To add one, write a function and list it in DISTORTIONS: its option, the names of runs and the
# evaluation come for free. It takes images [B, 3, H, W] in [0, 1], a severity for each image
# [B, 1, 1, 1], the upper end of the severities' range and a generator. Its docstring becomes the
# option's help. (A share, which is at most 1, may also be listed in distort's check.)

def blur(images, severity, highest, generator):
    """sigma of a Gaussian in pixels, with taps up to twice the highest, edges reflected"""
    B, _, H, W = images.shape
    radius = math.ceil(2 * highest)
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
    """share of pixels set to black or white, half each"""
    chance = torch.rand(images[:, :1].shape, generator=generator, device=images.device)
    images = torch.where(chance < severity / 2, 0.0, images)  # the lowest black, the highest white
    return torch.where(chance >= 1 - severity / 2, 1.0, images)

def mask(images, severity, highest, generator):
    """share of pixels set to black"""
    chance = torch.rand(images[:, :1].shape, generator=generator, device=images.device)
    return images * (chance >= severity)

DISTORTIONS = {  # in the order in which a camera would apply them
    "blur": blur,
    "contrast": contrast,
    "noise": noise,
    "salt": salt,
    "mask": mask,
}

def distort(images, generator=None, one_of=False, clean=0.0, **severities):
    """Distorted copies of images [B, 3, H, W] in [0, 1], of the same shape and range, in float32.

    severities go by the names of DISTORTIONS: a number, or a pair (low, high) from which each image
    draws its own, uniformly. All kinds above 0 are applied in DISTORTIONS's order; with one_of each
    image gets one of them. With probability clean an image is left as it is. Random numbers come
    from generator alone, if given, which has to be on the images' device. Raises ValueError for
    other images, unknown kinds, and severities or shares out of range.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images are {images.dtype} {list(images.shape)}, not float [B, 3, H, W]")
    if not severities.keys() <= DISTORTIONS.keys():
        raise ValueError(f"{[*severities]} are not all among {[*DISTORTIONS]}")
    if not 0 <= clean <= 1:
        raise ValueError(f"clean {clean} is not in [0, 1]")
    kinds = {}
    for name in DISTORTIONS:
        value = severities.get(name, 0)
        pair = value if isinstance(value, (tuple, list)) else (value, value)
        most = 1 if name in ("contrast", "salt", "mask") else 1e9  # the three are shares
        if len(pair) != 2 or not 0 <= pair[0] <= pair[1] <= most:
            raise ValueError(f"{name} {value} is no number or ascending pair from 0 to {most:g}")
        if pair[1] > 0:
            kinds[name] = pair
    if not kinds or len(images) == 0:
        return images.float().clamp(0, 1)

    with torch.autocast(images.device.type, enabled=False):
        images = images.float()
        per_image = (len(images), 1, 1, 1)
        source = {"generator": generator, "device": images.device}
        choice = torch.randint(len(kinds), per_image, **source)  # for one_of
        distorted = images
        for i, (name, (low, high)) in enumerate(kinds.items()):
            severity = low + (high - low) * torch.rand(per_image, **source)
            # With one_of an image changes only in its own kind's turn, so is still clean then.
            changed = DISTORTIONS[name](distorted, severity, high, generator)
            distorted = torch.where(choice == i, changed, distorted) if one_of else changed
        unchanged = torch.rand(per_image, **source) < clean
        return torch.where(unchanged, images, distorted).clamp(0, 1)

# ---- Losses --------------------------------------------------------------------------------------

def distill_loss(student, teacher, weights=(1, 1, 1)):
    """The weighted sum of the three terms (arXiv 2604.22529) between two Features, and the terms.

    "global" = 1 - cosine of cls; "patch" = 1 - cosine of each patch, averaged; "attn" = KL(teacher
    map || student map) in nats of each query's row, averaged over rows, heads, blocks and batch, 0
    without maps. In float32 also under autocast. Raises ValueError for unequal shapes and for
    weights that are not three finite numbers >= 0, not all 0.
    """
    if len(weights) != 3 or min(weights) < 0 or not 0 < sum(weights) < math.inf:
        raise ValueError(f"weights {weights} are not three finite numbers >= 0, not all 0")
    shapes = [x.shape for x in (student.cls, student.patches, *student.attn)]
    if shapes != [x.shape for x in (teacher.cls, teacher.patches, *teacher.attn)]:
        raise ValueError("the student's and the teacher's features differ in shape")

    with torch.autocast(student.cls.device.type, enabled=False):
        cls = 1 - F.cosine_similarity(student.cls.float(), teacher.cls.float(), dim=-1).mean()
        cosines = F.cosine_similarity(student.patches.float(), teacher.patches.float(), dim=-1)
        patch = 1 - cosines.mean()
        attn = torch.zeros_like(cls)
        for student_map, teacher_map in zip(student.attn, teacher.attn, strict=True):
            q = student_map.float().clamp(min=1e-8)  # 0 has no finite logarithm
            kl = F.kl_div(q.log(), teacher_map.float(), reduction="none")  # [B, heads, T, T]
            attn = attn + kl.sum(dim=-1).mean() / len(student.attn)
        total = weights[0] * cls + weights[1] * patch + weights[2] * attn
    return total, {"global": cls, "patch": patch, "attn": attn}

def info_nce(student_cls, teacher_cls, temperature=0.1):
    """InfoNCE as in the closest earlier work (arXiv 2110.07439): each student embedding [B, D] has
    to find its own image's teacher embedding among those of the batch. In float32.
    """
    with torch.autocast(student_cls.device.type, enabled=False):
        student_cls = F.normalize(student_cls.float())
        teacher_cls = F.normalize(teacher_cls.float())
        if WORLD > 1:
            shards = [torch.empty_like(teacher_cls) for _ in range(WORLD)]
            dist.all_gather(shards, teacher_cls)
            teacher_cls = torch.cat(shards)
        logits = student_cls @ teacher_cls.T / temperature
        target = RANK * len(logits) + torch.arange(len(logits), device=logits.device)
        return F.cross_entropy(logits, target)

class Objective(nn.Module):
    """A step's forward pass as one module, which torch.compile and DistributedDataParallel take."""
    def __init__(self, student, teacher, cfg, num_classes):
        super().__init__()
        self.cfg = cfg
        self.student = student
        self.teacher = teacher
        if cfg.method == "supervised":
            self.head = nn.Linear(student.cls_token.shape[-1], num_classes)

    def forward(self, clean, distorted, labels):
        """Images [B, 3, S, S] in [0, 1], labels [B]: the loss, and the terms of method distill."""
        cfg = self.cfg
        attn_blocks = cfg.attn_blocks if cfg.method == "distill" else 0
        student = self.student(prepare(distorted, cfg.img_size), attn_blocks)
        if cfg.method == "supervised":
            return F.cross_entropy(self.head(student.cls).float(), labels), {}
        with torch.no_grad():
            teacher = self.teacher(prepare(clean, cfg.img_size), attn_blocks)
        if cfg.method == "contrastive":
            return info_nce(student.cls, teacher.cls), {}
        return distill_loss(student, teacher, cfg.loss_weights)

# ---- Data: uint8 images [N, S, S, 3], in memory or memory-mapped, and integer labels [N] ---------

NATIVE_SIZE = {"stripes": 32, "cifar10": 32, "cifar100": 32, "stl10": 96}  # else a folder

def draw_stripes(n, size, seed):
    """n images of a disc of stripes on a plain ground; the label is their direction, one of ten."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(n) % 10
    images = np.empty((n, size, size, 3), np.uint8)
    y, x = np.mgrid[:size, :size] / size
    for i, label in enumerate(labels):
        angle = label * np.pi / 10 + rng.uniform(-0.12, 0.12)
        frequency = 2 * np.pi / rng.uniform(0.12, 0.22)
        across = x * np.cos(angle) + y * np.sin(angle)
        wave = 0.5 + 0.5 * np.sin(frequency * across + rng.uniform(0, 2 * np.pi))
        radius = rng.uniform(0.28, 0.48)
        center_x, center_y = rng.uniform(0.8 * radius, 1 - 0.8 * radius, size=2)
        disc = np.hypot(x - center_x, y - center_y) < radius
        dark = rng.uniform(0, 0.45, size=3)
        light = rng.uniform(0.55, 1, size=3)
        ground = rng.uniform(0.2, 0.8, size=3)
        stripes = dark + (light - dark) * wave[:, :, None]
        images[i] = 255 * np.where(disc[:, :, None], stripes, ground)
    return images, labels

def list_data(cfg):
    """For the training and the test split: images, or the paths of image files, and labels."""
    if cfg.data == "stripes":
        return draw_stripes(8000, cfg.data_size, seed=1), draw_stripes(1000, cfg.data_size, seed=0)
    with explain(f"torchvision does not work with torch {torch.__version__}", Exception):
        from torchvision import datasets
    if cfg.data not in NATIVE_SIZE:
        test = "val" if os.path.isdir(f"{cfg.data}/val") else "test"
        known = ", ".join(NATIVE_SIZE)
        with explain(f"--data {cfg.data} is none of {known}, nor a folder of images", OSError):
            splits = [datasets.ImageFolder(f"{cfg.data}/{split}") for split in ("train", test)]
        odd = set(splits[0].classes) ^ set(splits[1].classes)
        if odd:
            raise UserError(f"{cfg.data} has {sorted(odd)} in only one of train and {test}")
        return [(np.array([path for path, _ in split.samples]), split.targets) for split in splits]

    dataset = getattr(datasets, cfg.data.upper())
    names = ["train", "test"] if cfg.data == "stl10" else [True, False]  # CIFAR's train=
    offline = f"put {dataset.url} into {cfg.root}, or use --data stripes or --data FOLDER"
    with explain(f"cannot download {cfg.data}, {offline}", OSError, RuntimeError):
        splits = [dataset(cfg.root, name, download=True) for name in names]
    if cfg.data == "stl10":
        return [(split.data.transpose(0, 2, 3, 1), split.labels) for split in splits]
    return [(split.data, split.targets) for split in splits]

def read_image(path, size):
    """An image file as uint8 [size, size, 3]: the shorter side resized, the centre cropped."""
    with explain(f"cannot read the image {path}; convert or remove it", Exception):
        from PIL import Image, ImageOps  # which torchvision brings
        image = ImageOps.exif_transpose(Image.open(path))
        if image.mode.startswith(("I", "F")):
            raise ValueError("it has more than 8 bits a channel")
        return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size)))

def write(path, chunks):
    """Write bytes to a temporary file, then rename it, so that path is never half-written."""
    part = f"{path}.{os.getpid()}-{time.time_ns()}.part"
    try:
        with explain(f"cannot write {path}", OSError), open(part, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)

def decode(paths, cfg):
    """The images of these files, memory-mapped from a file under cfg.root that is made once."""
    key = hashlib.sha256()
    for path in paths:
        stat = os.stat(path)
        line = f"{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}\n"
        key.update(os.fsencode(line))  # whatever bytes the name has
    target = f"{cfg.root}/decoded-{cfg.data_size}-{key.hexdigest()[:16]}.raw"
    if not os.path.exists(target):
        os.makedirs(cfg.root, exist_ok=True)
        read = functools.partial(read_image, size=cfg.data_size)
        # With batch_size=None collate_fn gets each path alone.
        loader = torch.utils.data.DataLoader(
            paths, batch_size=None, num_workers=cfg.workers, collate_fn=read)
        write(target, (image.tobytes() for image in tqdm(loader, "decoding images", disable=None)))
    return np.memmap(target, np.uint8, "r", shape=(len(paths), cfg.data_size, cfg.data_size, 3))

def balanced_subset(labels, n, seed):
    """The indices, ascending, of n images drawn with this seed, classes as even as can be."""
    rng = np.random.default_rng(seed)
    turn = rng.random(len(labels))  # the fraction orders the classes within a turn
    for label in np.unique(labels):
        members = labels == label
        turn[members] += rng.permutation(members.sum())  # a class's images take turns 0, 1, 2, …
    return np.sort(np.argsort(turn)[:n])

def load_data(cfg):
    """Training images, training labels, test images, test labels."""
    four = []
    for items, labels in list_data(cfg):
        labels = np.array(labels, np.int64)
        kept = balanced_subset(labels, cfg.max_images or len(labels), cfg.seed)
        images = items[kept]
        if cfg.data not in NATIVE_SIZE:  # then the items are paths
            images = decode(images.tolist(), cfg)
        elif images.shape[1] != cfg.data_size:
            from PIL import Image
            size = (cfg.data_size, cfg.data_size)
            images = np.stack([np.asarray(Image.fromarray(image).resize(size)) for image in images])
        four += [images, labels[kept]]
    return four

# ---- Training ------------------------------------------------------------------------------------

def autocast(cfg):
    """bfloat16 where the run asks for it."""
    kind = torch.device(cfg.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=cfg.dtype == "bfloat16")

def to_device(array, device):
    """A numpy array as a tensor; a GPU fetches it from pinned memory while the CPU goes on."""
    tensor = torch.tensor(array)
    if device.startswith("cuda"):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)

def to_float(images, device):
    """uint8 images [B, S, S, 3] as floats [B, 3, S, S] in [0, 1], contiguous."""
    return to_device(images, device).permute(0, 3, 1, 2).contiguous() / 255

def severities_of(cfg):
    """The run's kinds of distortion, without those at 0 or unknown to an older run."""
    return {name: vars(cfg)[name] for name in DISTORTIONS if np.any(vars(cfg).get(name, 0))}

@torch.inference_mode()
def embed(vit, images, cfg, severities, one_of=False, seed=0):
    """Global embeddings [N, D], float32, of uint8 images [N, S, S, 3] distorted with this seed."""
    generator = torch.Generator(cfg.device).manual_seed(seed)
    found = []
    for start in range(0, len(images), cfg.batch_size):
        batch = to_float(images[start:start + cfg.batch_size], cfg.device)
        batch = distort(batch, generator, one_of, **severities)
        with autocast(cfg):
            features = vit(prepare(batch, cfg.img_size))
        found.append(features.cls.float().clone())  # a view would keep the patches in memory
    return torch.cat(found)

def learning_rate(step, total_steps, cfg):
    """Linear warm-up over a share of the steps, then half a cosine to zero."""
    warmup_steps = round(cfg.warmup * total_steps)
    if step < warmup_steps:
        return cfg.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return cfg.lr * (1 + math.cos(math.pi * progress)) / 2

def make_optimizer(objective, cfg):
    """AdamW, which leaves alone what gets no gradient: the frozen teacher."""
    return torch.optim.AdamW(
        objective.parameters(), cfg.lr, weight_decay=cfg.weight_decay, fused=True)

def count_steps(labels, cfg):
    """Steps of an epoch, without the ragged last batch, and of the run."""
    per_epoch = len(labels) // cfg.batch_size
    return per_epoch, min(cfg.epochs * per_epoch, cfg.max_steps or sys.maxsize)

def train(objective, optimizer, images, labels, cfg, first_epoch=0):
    """Train on uint8 images [N, S, S, 3]: a generator that yields a row of figures per epoch.

    The order of images depends on (seed, epoch), the distortion of a batch on (seed, step): a
    step's number is the whole random state. Raises UserError where the loss or its gradient is not
    finite.
    """
    steps_per_epoch, total_steps = count_steps(labels, cfg)
    own = slice(RANK, None, WORLD)  # this process's part of a batch: every WORLD-th image
    severities = severities_of(cfg)
    generator = torch.Generator(cfg.device)
    model = torch.compile(objective, dynamic=False) if cfg.compile else objective
    if WORLD > 1:
        model = nn.parallel.DistributedDataParallel(model)

    for epoch in range(first_epoch, math.ceil(total_steps / steps_per_epoch)):
        start = time.perf_counter()
        order = np.random.default_rng((cfg.seed, epoch)).permutation(len(labels))
        steps = range(epoch * steps_per_epoch, min((epoch + 1) * steps_per_epoch, total_steps))
        bar = tqdm(steps, f"epoch {epoch + 1}", unit=" images", unit_scale=cfg.batch_size,
                   disable=RANK > 0 or not sys.stderr.isatty())
        history = []  # of the steps' figures
        for step in bar:
            first = (step - steps[0]) * cfg.batch_size
            batch = order[first:first + cfg.batch_size]
            own_labels = to_device(labels[batch[own]], cfg.device)
            clean = to_float(images[batch], cfg.device)
            # All processes distort the whole batch alike: together they train as one would. (No two
            # seeds share a number in runs below a million steps.)
            generator.manual_seed(1_000_003 * cfg.seed + step)
            distorted = distort(clean, generator, cfg.one_of, cfg.clean, **severities)

            group = optimizer.param_groups[0]  # the only one
            group["lr"] = learning_rate(step, total_steps, cfg)
            with autocast(cfg):
                loss, terms = model(clean[own], distorted[own], own_labels)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(group["params"], 1.0)
            optimizer.step()

            figures = {"norm": norm, "loss": loss, **terms}
            history.append(torch.stack([*figures.values()]).detach())
            if step % 20 == 0 or step == steps[-1]:  # reading waits for the device: 20 at once
                finite = torch.stack(history[-20:]).isfinite().all(dim=1).tolist()
                if not all(finite):
                    bad = step + 2 - len(finite) + finite.index(False)  # from 1, as in the log
                    raise UserError(f"loss or gradient not finite at step {bad}: lower --lr")
                bar.set_postfix(zip(figures, history[-1].tolist(), strict=True))

        means = torch.stack(history).mean(dim=0)
        if WORLD > 1:
            dist.all_reduce(means)
        means = dict(zip(figures, (means / WORLD).tolist(), strict=True))
        rate = len(steps) * cfg.batch_size / (time.perf_counter() - start)
        yield {"epoch": epoch + 1, "step": step + 1, "loss": means["loss"],
               "global": means.get("global"), "patch": means.get("patch"),
               "attn": means.get("attn"), "lr": group["lr"], "images_per_s": rate}

# ---- The command line ----------------------------------------------------------------------------

def between(low, high, kind=float):
    """For argparse's type=: a number from low to high."""
    def number(text):
        value = kind(text)
        if not low <= value <= high:  # also for NaN
            raise argparse.ArgumentTypeError(f"{text} is out of range, from {low:g} to {high:g}")
        return value
    return number

COUNT = between(1, 10**12, int)
NATURAL = between(0, 10**12, int)
SHARE = between(0, 1)

def add_machine_options(parser):
    """Those that --resume takes: they say where and how to compute, not what."""
    add = parser.add_argument
    add("--resume", metavar="RUN", help="continue this run with its own options")
    add("--root", default="data", help="where data are downloaded and decoded to [data]")
    add("--device", help="[the first of cuda, mps, cpu]")
    add("--workers", type=NATURAL, default=2, help="processes that decode image files [2]")
    add("--compile", action=argparse.BooleanOptionalAction, help="[on a GPU]")

def add_run_options(parser):
    add = parser.add_argument
    add("--data", default="stripes", help=f"{', '.join(NATIVE_SIZE)} or a folder [stripes]")
    add("--max-images", type=COUNT, help="size of a class-balanced subset of either split [all]")
    add("--weights", help="a name, a path or scratch [dinov2_vits14; for stripes scratch]")
    add("--data-size", type=COUNT, help="pixels a side as distorted [32; stl10 96; a folder 224]")
    add("--img-size", type=COUNT, help="pixels a side for the ViT [224; scratch: data size]")
    for name, function in DISTORTIONS.items():
        add(f"--{name}", type=float, nargs="+", help=f"{function.__doc__}; two values: a range [0]")
    add("--one-of", action="store_true", help="one distortion per image, not all [off, mixture on]")
    add("--clean", type=SHARE, help="share of images that stay clean [0, mixture 0.2]")
    add("--method", default="distill", choices=["distill", "contrastive", "supervised"],
        help="[distill]")
    add("--loss-weights", type=between(0, 1e9), nargs=3, default=[1.0, 1.0, 1.0],
        metavar=("G", "P", "A"), help="of the global, the patch and the attention term [1 1 1]")
    add("--attn-blocks", type=NATURAL, default=1, help="last blocks whose maps are compared [1]")
    add("--epochs", type=COUNT, default=6, help="[6]")
    add("--pretrain-epochs", type=COUNT, default=3, help="with labels, of a scratch teacher [3]")
    add("--max-steps", type=COUNT, help="where to stop if sooner than the epochs [none]")
    add("--batch-size", type=COUNT, help="over all processes together [64; scratch 32]")
    add("--lr", type=between(1e-12, 1e9), help="peak learning rate [1e-4; scratch 2e-3]")
    add("--weight-decay", type=between(0, 1e9), default=0.05, help="[0.05]")
    add("--warmup", type=SHARE, default=0.1, help="share of the steps [0.1]")
    add("--dtype", choices=["float32", "bfloat16"], help="[bfloat16 on a GPU that has it]")
    add("--seed", type=NATURAL, default=0, help="of order, distortions and fresh weights [0]")
    add("--out", help="run folder [runs/<data>-<distortions>]")

def describe(severities, one_of):
    """Distortions as text: noise=0.1, noise=0-0.4, blur=1+noise=0.1, or blur=1 or noise=0.1."""
    parts = []
    for name, value in severities.items():
        ends = [f"{end:g}" for end in np.unique(value)]  # one, or both of a range
        parts.append(f"{name}={'-'.join(ends)}")
    return (" or " if one_of else "+").join(parts) or "clean"

def best_device():
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"

def use_device(device):
    """Check that this process has the device; plain cuda is the GPU of its local rank."""
    message = f"there is no --device {device} for process {LOCAL_RANK} of this machine"
    with explain(message, RuntimeError, AssertionError):
        if device == "cuda":
            torch.cuda.set_device(LOCAL_RANK)
        torch.zeros(1, device=device)
        torch.Generator(device)  # which the device meta lacks

def run_name(cfg, mixture):
    """The run's name, from what was typed: cifar10-blur1-or-noise0-0.3-clean0.2."""
    name = "mixture" if mixture else describe(severities_of(cfg), cfg.one_of)
    name = name.replace("=", "").replace(" or ", "-or-")
    if cfg.clean or (mixture and cfg.clean == 0):
        name += f"-clean{cfg.clean:g}"
    if cfg.method != "distill":
        name += f"-{cfg.method}"
    return f"{os.path.basename(os.path.abspath(cfg.data))}-{name}"

def set_defaults(cfg):
    """Fill in what depends on other options or on the machine."""
    cfg.data_size = cfg.data_size or NATIVE_SIZE.get(cfg.data, 224)
    mixture = all(getattr(cfg, name) is None for name in DISTORTIONS)
    if mixture:
        cfg.blur = [0, 3 / 64 * cfg.data_size]  # 1.5 pixels of 32, 10.5 of 224
        cfg.noise = [0, 0.4]
        cfg.mask = [0, 0.6]
        cfg.one_of = True
    for name in DISTORTIONS:  # one value is a number, two are a range
        values = getattr(cfg, name) or [0.0]
        setattr(cfg, name, values[0] if len(values) == 1 else values)
    cfg.out = cfg.out or f"runs/{run_name(cfg, mixture)}"  # --clean, not typed, is still None
    if cfg.clean is None:
        cfg.clean = 0.2 if mixture else 0.0

    cfg.weights = cfg.weights or ("scratch" if cfg.data == "stripes" else "dinov2_vits14")
    scratch = cfg.weights == "scratch"
    cfg.img_size = cfg.img_size or (cfg.data_size if scratch else 224)
    cfg.lr = cfg.lr or (2e-3 if scratch else 1e-4)
    cfg.batch_size = cfg.batch_size or (32 if scratch else 64)
    cfg.device = cfg.device or best_device()
    on_gpu = cfg.device.startswith("cuda")
    fast = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    cfg.dtype = cfg.dtype or ("bfloat16" if fast else "float32")
    cfg.compile = on_gpu if cfg.compile is None else cfg.compile

def check_options(cfg):
    """Raise UserError for values that make no sense."""
    if cfg.batch_size % WORLD:
        raise UserError(f"--batch-size {cfg.batch_size} is not a multiple of {WORLD} processes")
    if cfg.weights == "scratch" and cfg.img_size % 8:
        raise UserError(f"--img-size {cfg.img_size} is not a multiple of 8, as scratch needs")

    use_device(cfg.device)
    if WORLD > 1 and ":" in cfg.device:
        raise UserError(f"--device {cfg.device} is one GPU for {WORLD} processes; say cuda")
    with explain("an option is out of range", ValueError):
        # Every distortion knows its own limits: try them on a black image.
        black = torch.zeros(1, 3, cfg.data_size, cfg.data_size)
        distort(black, **severities_of(cfg))
    distorted = cfg.clean < 1 and severities_of(cfg)
    on_cls, on_patches, on_maps = cfg.loss_weights
    compared = on_cls or on_patches or (on_maps and cfg.attn_blocks)
    if cfg.method == "distill" and not (distorted and compared):
        raise UserError("the loss would be 0 throughout: nothing is distorted, or nothing compared")
    if cfg.method == "contrastive" and cfg.batch_size == 1:
        raise UserError("the loss would be 0 throughout: --batch-size 1 has nothing to tell apart")

def read_config(folder):
    """The options of the run in this folder."""
    parser = argparse.ArgumentParser()
    add_machine_options(parser)
    add_run_options(parser)
    options = vars(parser.parse_args([])).keys()
    with explain(f"{folder} holds no run of distill.py", OSError, ValueError, TypeError):
        with open(f"{folder}/config.json") as file:
            cfg = argparse.Namespace(**json.load(file))
        missing = options - vars(cfg).keys() - DISTORTIONS.keys()  # a distortion may be newer
        if missing:
            raise ValueError(f"its config.json lacks {sorted(missing)}")
    cfg.out = folder
    return cfg

def configure():
    """The options of this run, resolved and checked; with --resume those that it began with."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add_machine_options(parser)
    if any(word.startswith("--resume") for word in sys.argv):  # which leaves few other options
        cfg = read_config(parser.parse_args().resume)  # refuses all other options
        cfg = parser.parse_args(namespace=cfg)  # what is typed overrides them
    else:
        add_run_options(parser)
        cfg = parser.parse_args()
        set_defaults(cfg)
    check_options(cfg)
    if cfg.compile:
        try:  # on something small: is there a compiler?
            torch.compile(lambda x: x + 1)(torch.zeros(2, device=cfg.device))
        except Exception as error:
            print(f"warning: eager, since torch.compile fails: {error!r:.200}", file=sys.stderr)
            cfg.compile = False
    return cfg

def save(path, content):
    """torch.save, which leaves a file whole or as it was."""
    buffer = io.BytesIO()  # straight to disk, torch.save would hide why a write failed
    torch.save(content, buffer)
    write(path, [buffer.getbuffer()])

def check_data(labels, cfg):
    """Raise UserError where there are too few images or classes for the options."""
    if cfg.batch_size > len(labels):
        raise UserError(f"--batch-size {cfg.batch_size} is more than the {len(labels)} images")
    if labels.max() == 0 and (cfg.weights == "scratch" or cfg.method == "supervised"):
        raise UserError("there is only one class, so there is nothing to learn from labels")

def make_teacher(cfg):
    """The teacher: pretrained, or a small ViT that is yet to be trained."""
    torch.manual_seed(cfg.seed)
    if cfg.weights == "scratch":
        teacher = ViT(cfg.img_size, cfg.img_size // 8, embed_dim=128, depth=4, num_heads=2)
    else:
        teacher = load_vit(cfg.weights, cfg.img_size)
    if cfg.attn_blocks > len(teacher.blocks):
        raise UserError(f"--attn-blocks is more than the ViT has, which is {len(teacher.blocks)}")
    return teacher.to(cfg.device)

def say(text):
    if RANK == 0:
        print(text, flush=True)

def pretrain(teacher, images, labels, num_classes, cfg):
    """Train a teacher with labels on clean images, as method supervised does on distorted ones."""
    cfg = copy.copy(cfg)
    for name in DISTORTIONS:
        setattr(cfg, name, 0)
    cfg.method = "supervised"
    cfg.epochs = cfg.pretrain_epochs
    cfg.max_steps = None
    objective = Objective(teacher, None, cfg, num_classes).to(cfg.device)
    for row in train(objective, make_optimizer(objective, cfg), images, labels, cfg):
        say(f"teacher: {json.dumps(row)}")

def create_run(cfg):
    """Make the run's folder with its config.json; refuse a folder that holds a run."""
    hint = f"choose another, or --resume {cfg.out} if it holds a run"
    with explain(f"cannot begin a run in --out {cfg.out}, {hint}", OSError):
        os.makedirs(cfg.out, exist_ok=True)
        with open(f"{cfg.out}/config.json", "x") as file:  # not over that of another run
            json.dump(vars(cfg), file, indent=1)

def restore(path, objective, optimizer, facts):
    """Load a checkpoint and return its log; refuse it where the data have changed since."""
    checkpoint = read_tensors(path)
    with explain(f"{path} is not of this run; delete it", Exception):  # whatever it may hold
        if checkpoint["facts"] != facts:
            raise UserError(f"the data have changed: {checkpoint['facts']} then, {facts} now")
        objective.load_state_dict(checkpoint["objective"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        return checkpoint["log"]

def held_out_cosine(vit, images, target, cfg):
    """Mean cosine of vit's embeddings of these images, distorted, with the target embeddings."""
    embeddings = embed(vit, images, cfg, severities_of(cfg), cfg.one_of, cfg.seed)
    mean = F.cosine_similarity(embeddings, target).mean().item()
    if not math.isfinite(mean):  # the epoch's last update can do this, and no loss follows it
        raise UserError("the embeddings are not finite: lower --lr")
    return mean

def main():
    cfg = configure()
    if WORLD > 1:
        day = datetime.timedelta(days=1)  # which downloading and decoding may take
        dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo", timeout=day)
    say("  ".join(f"{name}={value}" for name, value in vars(cfg).items()))
    last = f"{cfg.out}/last.pt"
    resumed = cfg.resume is not None and os.path.exists(last)
    if resumed:
        cfg.weights = f"{cfg.out}/teacher.pth"  # the teacher it began with
    if LOCAL_RANK > 0:  # a machine's first process downloads and decodes alone; the others wait
        with explain("another process has failed and says why", RuntimeError):
            dist.barrier()
    images, labels, test_images, test_labels = load_data(cfg)
    check_data(labels, cfg)
    teacher = make_teacher(cfg)
    if RANK == 0 and cfg.resume is None:
        create_run(cfg)
    if WORLD > 1 and LOCAL_RANK == 0:  # now it lets them go on
        dist.barrier()

    num_classes = int(labels.max()) + 1
    if cfg.weights == "scratch":
        pretrain(teacher, images, labels, num_classes, cfg)
    if RANK == 0 and not resumed:
        save(f"{cfg.out}/teacher.pth", teacher.state_dict())
    student = copy.deepcopy(teacher)  # before the teacher is frozen
    teacher.requires_grad_(False)
    objective = Objective(student, teacher, cfg, num_classes).to(cfg.device)
    optimizer = make_optimizer(objective, cfg)
    facts = {"images": len(labels), "classes": num_classes, "steps": count_steps(labels, cfg)[1]}
    log = restore(last, objective, optimizer, facts) if resumed else []

    sample = test_images[balanced_subset(test_labels, 500, seed=0)]  # the same in every run
    target = embed(teacher, sample, cfg, {})
    cos_teacher = held_out_cosine(teacher, sample, target, cfg)
    for row in train(objective, optimizer, images, labels, cfg, first_epoch=len(log)):
        cos_student = held_out_cosine(student, sample, target, cfg)
        log.append({**row, "cos_teacher": cos_teacher, "cos_student": cos_student})
        say(json.dumps(log[-1]))
        if RANK == 0:
            write(f"{cfg.out}/log.jsonl", [json.dumps(row).encode() + b"\n" for row in log])
            save(f"{cfg.out}/student.pth", student.state_dict())
            save(last, {"facts": facts, "log": log, "objective": objective.state_dict(),
                        "optimizer": optimizer.state_dict()})
    say(f"finished; next: python eval.py {cfg.out}")
    if WORLD > 1:
        dist.destroy_process_group()

def out_of_memory(error):
    """Whether memory ran out, of a GPU too; a GPU's illegal memory access is something else."""
    signs = ("MemoryError", "of memory", "allocate memory", "ALLOC_FAILED")
    return any(sign in repr(error) for sign in signs)

def run(main):
    """Call main; what the user can mend ends in one line and exit status 2."""
    try:
        return main()
    except KeyboardInterrupt:
        message = "interrupted; a run that has begun goes on with distill.py --resume RUN"
    except Exception as error:
        if out_of_memory(error):
            message = "out of memory: lower --batch-size, --img-size, --data-size or --max-images"
        elif isinstance(error, (UserError, OSError)):
            # A worker that decodes images puts its traceback in front of the message.
            message = str(error).split("UserError: ")[-1]
        else:  # a bug keeps its traceback
            raise
    print("error:", *message.split(), file=sys.stderr)  # on one line
    sys.exit(2)

if __name__ == "__main__":
    run(main)
