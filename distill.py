# SPDX-License-Identifier: MIT
"""Asymmetric multi-level distillation (arXiv 2604.22529): Vision Transformers that see through
noise, blur and missing pixels. A frozen teacher sees clean images; a student that starts from the
same weights sees distorted copies and learns, without labels, to give the teacher's global
embedding, patch features and attention maps.

    python distill.py                               draws images, trains its own teacher first
    python eval.py runs/stripes-mixture             distorted: teacher 79%, student 94% (CPU, 2026)
    python distill.py --data cifar10 --noise 0.1    downloads CIFAR-10 and DINOv2's ViT-S/14

Shapes: B images, N patches, T = 1 + registers + N tokens, D an embedding's width, S the side in
pixels at which images are held and distorted.
"""
import argparse
import copy
import datetime
import json
import math
import os
import time
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps  # which torchvision brings
from torch.utils.data import DataLoader, Subset, TensorDataset
from torchvision import datasets, transforms
from tqdm import tqdm

# Set by torchrun: this process's number, its number on this machine, how many there are.
RANK = int(os.environ.get("RANK", 0))
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
# The first process shows bars that count images, unless output is redirected (None).
BAR = {"unit": " images", "disable": True if RANK > 0 else None}

class UserError(ValueError):
    """A mistake that the user can mend: main prints its message instead of a traceback."""

# ---- The Vision Transformer: all parameters are named as in DINO and DINOv2 ----------------------
class Features(NamedTuple):
    """What a ViT gives: embeddings after the final norm, and attention probabilities."""
    cls: torch.Tensor  # [B, D], the global embedding
    patches: torch.Tensor  # [B, N, D], row by row
    attn: tuple = ()  # one map [B, heads, T, T] for each block asked for, in order

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
    """A pre-norm Vision Transformer (arXiv 2010.11929) that also gives its attention maps.

    Sizes are sides in pixels; registers are those of arXiv 2309.16588. Tokens: cls, registers,
    patches. Raises ValueError unless patch_size divides img_size.
    """
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio=4.0,
                 num_registers=0, layer_scale=False):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"{img_size=} is not a multiple of {patch_size=}")
        self.img_size = img_size
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
        """Features of normalized images [B, 3, img_size, img_size], with the attention maps of the
        last attn_blocks blocks in float32. Raises ValueError for images of another size.
        """
        if images.shape[1:] != (3, self.img_size, self.img_size):
            raise ValueError(f"images {list(images.shape)} are not {self.img_size} pixels a side")
        x = self.patch_embed(images).flatten(2).transpose(1, 2)  # [B, N, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        if self.num_registers:  # they get no position embedding
            registers = self.register_tokens.expand(len(x), -1, -1)
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)  # [B, T, D]
        first_map = len(self.blocks) - attn_blocks
        maps = []
        for i, block in enumerate(self.blocks):
            need_map = i >= first_map
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
    "dinov2_vitb14_reg": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
    "dinov2_vitl14_reg": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
    "dino_vits16": "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino_vits8": "https://dl.fbaipublicfiles.com/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    "dino_vitb16": "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "deit_tiny": "https://dl.fbaipublicfiles.com/deit/deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small": "https://dl.fbaipublicfiles.com/deit/deit_small_patch16_224-cd65a155.pth",
}

def resize_pos_embed(pos_embed, side, has_registers):
    """Position embeddings [1, 1 + n * n, D] for side * side patches, as in DINO and DINOv2."""
    n = math.isqrt(pos_embed.shape[1] - 1)
    if n == side:
        return pos_embed
    grid = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (n, n))  # [1, D, n, n]
    if has_registers:  # as in DINOv2's models with registers
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    else:
        # DINO and DINOv2 scale by a little more (dino issue 8), which moves every value. DeiT's
        # code does not; to treat it like the others is this project's choice.
        grid = F.interpolate(grid, scale_factor=(side + 0.1) / n, mode="bicubic")
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

def load_vit(weights, img_size):
    """The ViT of pretrained weights, for images of img_size pixels a side. weights is a name in
    WEIGHTS or the path of a state dict with DINO's names, which may lie under "model". The
    architecture is read off it, but heads are taken to be 64 wide: no shape tells. Raises
    ValueError if the weights cannot be had or do not fit, img_size included.
    """
    options = {"map_location": "cpu", "weights_only": True}  # so that no file runs code
    try:
        if weights in WEIGHTS:
            state = torch.hub.load_state_dict_from_url(WEIGHTS[weights], **options)
        else:
            state = torch.load(weights, **options)
        state = state.get("model", state)
        state = {k: v for k, v in state.items() if not k.startswith(("mask_token", "head"))}
        embed_dim, _, _, patch_size = state["patch_embed.proj.weight"].shape
        if embed_dim % 64:
            raise ValueError(f"its width {embed_dim} is not a multiple of 64")
        depth = sum(key.endswith(".norm1.weight") for key in state)  # one a block
        mlp_ratio = len(state["blocks.0.mlp.fc1.weight"]) / embed_dim
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        layer_scale = "blocks.0.ls1.gamma" in state
        vit = ViT(img_size, patch_size, embed_dim, depth, embed_dim // 64, mlp_ratio, registers,
                  layer_scale)
        pos_embed = state["pos_embed"].float()
        state["pos_embed"] = resize_pos_embed(pos_embed, img_size // patch_size, registers)
        vit.load_state_dict(state)  # copies the values
    except Exception as error:  # what is missing, damaged or foreign raises many kinds
        raise UserError(
            f"cannot load weights {weights}: {error!r:.300}. Known names: {', '.join(WEIGHTS)}; "
            f"offline, put their files into {torch.hub.get_dir()}/checkpoints") from error
    return vit

def prepare(images, img_size):
    """A ViT's input: images [B, 3, h, w] in [0, 1] resized bicubically to img_size pixels a side
    (antialiased if made smaller), normalized with ImageNet's mean and standard deviation.
    """
    if images.shape[2:] != (img_size, img_size):
        smaller = img_size < max(images.shape[2:])
        images = F.interpolate(images, (img_size, img_size), mode="bicubic", antialias=smaller)
    mean = torch.tensor([0.485, 0.456, 0.406], device=images.device).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=images.device).view(3, 1, 1)
    return (images - mean) / std

# ---- Distortions ---------------------------------------------------------------------------------
# To add one, write a function and list it in DISTORTIONS: its option, the names of runs and the
# evaluation follow. It takes images [B, 3, H, W], the severity of each [B, 1, 1, 1], the highest
# that may occur (which sizes blur's kernel) and a generator. Its docstring is the option's help.

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
    """share of pixels set to black or white, half each"""
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
    severities go by the names of DISTORTIONS: a number, or a pair (low, high) from which each image
    draws its own, uniformly. All kinds above 0 are applied in DISTORTIONS's order; with one_of each
    image gets one of them. With probability clean an image is left as it is. Random numbers come
    from generator, which has to be on the images' device. Raises ValueError for unknown kinds and
    for severities or shares out of range.
    """
    unknown = severities.keys() - DISTORTIONS.keys()
    if unknown or not 0 <= clean <= 1:
        raise ValueError(f"{clean=} is not from 0 to 1, or {unknown} not in {list(DISTORTIONS)}")
    kinds = []
    for name, (function, limit) in DISTORTIONS.items():
        low, high = np.broadcast_to(severities.get(name, 0), 2).tolist()  # a number is both
        if not 0 <= low <= high <= limit or math.isinf(high):
            raise ValueError(f"{name} {low, high} does not ascend from 0 to {limit}")
        if high > 0:
            kinds.append((function, low, high))

    with torch.autocast(images.device.type, enabled=False):
        images = images.float()
        per_image = (len(images), 1, 1, 1)
        source = {"generator": generator, "device": images.device}
        choice = torch.randint(max(1, len(kinds)), per_image, **source)  # for one_of
        distorted = images
        for i, (function, low, high) in enumerate(kinds):
            severity = low + (high - low) * torch.rand(per_image, **source)
            # With one_of an image takes only its own kind's change; until then it is undistorted.
            changed = function(distorted, severity, high, generator)
            distorted = torch.where(choice == i, changed, distorted) if one_of else changed
        unchanged = torch.rand(per_image, **source) < clean
        return torch.where(unchanged, images, distorted).clamp(0, 1)

# ---- Losses --------------------------------------------------------------------------------------
def distill_loss(student, teacher, weights=(1, 1, 1)):
    """The weighted sum of the three terms (arXiv 2604.22529) between two Features, and the terms:
    "global" = 1 - cosine of cls; "patch" = 1 - cosine of each patch, averaged; "attn" = KL(teacher
    map || student map) in nats of each query's row, averaged over rows, heads, blocks and batch, 0
    without maps. In float32 also under autocast.
    """
    with torch.autocast(student.cls.device.type, enabled=False):
        cls = 1 - F.cosine_similarity(student.cls.float(), teacher.cls.float(), dim=-1).mean()
        cosines = F.cosine_similarity(student.patches.float(), teacher.patches.float(), dim=-1)
        patch = 1 - cosines.mean()
        attn = torch.zeros_like(cls)
        for student_map, teacher_map in zip(student.attn, teacher.attn, strict=True):
            log = student_map.float().clamp(min=1e-8).log()  # 0 has no finite logarithm
            kl = F.kl_div(log, teacher_map.float(), reduction="none")  # [B, heads, T, T]
            attn = attn + kl.sum(dim=-1).mean() / len(student.attn)
        total = weights[0] * cls + weights[1] * patch + weights[2] * attn
    return total, {"global": cls, "patch": patch, "attn": attn}

def info_nce(student_cls, teacher_cls, temperature=0.1):
    """InfoNCE as in the closest earlier work (arXiv 2110.07439): each student embedding [B, D] has
    to find its own image's teacher embedding among those of its process. In float32.
    """
    with torch.autocast(student_cls.device.type, enabled=False):
        student_cls = F.normalize(student_cls.float())
        teacher_cls = F.normalize(teacher_cls.float())
        logits = student_cls @ teacher_cls.T / temperature  # [B, B]
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

class Objective(nn.Module):
    """A step's forward pass as one module, which torch.compile and DistributedDataParallel take."""
    def __init__(self, method, student, teacher, num_classes, cfg):
        super().__init__()
        if cfg.attn_blocks > len(student.blocks):
            raise UserError(f"--attn-blocks {cfg.attn_blocks} of a ViT of {len(student.blocks)}")
        self.method = method
        self.student = student  # or a scratch teacher, while it is trained with labels
        self.teacher = teacher
        self.cfg = cfg
        if method == "supervised":
            self.head = nn.Linear(student.cls_token.shape[-1], num_classes)

    def forward(self, clean, distorted, labels):
        """Images [B, 3, S, S] in [0, 1], labels [B]: the loss, and the terms of distill_loss."""
        img_size = self.cfg.img_size
        attn_blocks = self.cfg.attn_blocks if self.method == "distill" else 0
        student = self.student(prepare(distorted, img_size), attn_blocks)
        if self.method == "supervised":
            return F.cross_entropy(self.head(student.cls).float(), labels), {}
        with torch.no_grad():
            teacher = self.teacher(prepare(clean, img_size), attn_blocks)
        if self.method == "contrastive":
            return info_nce(student.cls, teacher.cls), {}
        return distill_loss(student, teacher, self.cfg.loss_weights)

# ---- Data ----------------------------------------------------------------------------------------
NATIVE_SIZE = {"stripes": 32, "cifar10": 32, "cifar100": 32, "stl10": 96}  # other --data: a folder

def draw_stripes(n, size, seed):
    """n drawings of a disc of stripes; the label is the stripes' direction, one of ten."""
    uniform = np.random.default_rng(seed).uniform
    images = np.empty((n, 3, size, size), np.uint8)
    y, x = np.mgrid[:size, :size] / size  # lengths are in sides of the image
    for i in range(n):
        angle = np.pi * (i % 10) / 10 + uniform(-0.12, 0.12)
        across = x * np.cos(angle) + y * np.sin(angle)
        wave = np.sin(2 * np.pi * (across / uniform(0.12, 0.22) + uniform()))
        dark = uniform(0, 0.45, size=(3, 1, 1))
        light = uniform(0.55, 1, size=(3, 1, 1))
        ground = uniform(0.2, 0.8, size=(3, 1, 1))
        radius = uniform(0.28, 0.48)
        center_x, center_y = uniform(0.8 * radius, 1 - 0.8 * radius, size=2)
        disc = np.hypot(x - center_x, y - center_y) < radius
        stripes = dark + (light - dark) * (1 + wave) / 2  # [3, S, S]
        images[i] = 255 * np.where(disc, stripes, ground)
    dataset = TensorDataset(torch.from_numpy(images), torch.arange(n) % 10)
    dataset.classes = list("0123456789")  # as torchvision's data sets have them
    return dataset

def read_image(path):
    """An image file, upright and in RGB."""
    try:
        image = Image.open(path)
        if image.mode[0] in "IF" or ";16" in str(image.tile):  # grey, or colour of 16 bits
            raise ValueError("it has more than 8 bits a channel")
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        raise OSError(f"cannot read the image {path}: {error}") from error

def square(size):
    """The transform of an image into uint8 [3, size, size]: its shorter side resized, cropped."""
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(size), transforms.PILToTensor()])

def open_folder(folder, cfg):
    return datasets.ImageFolder(folder, square(cfg.data_size), loader=read_image)

def read_split(dataset, cfg):
    """At most --max-images images, uint8 [B, 3, S, S], and labels [B], in an order of seed 0."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    dataset = Subset(dataset, order[:cfg.max_images].tolist())
    loader = DataLoader(dataset, batch_size=64, num_workers=cfg.workers)
    images = torch.empty(len(dataset), 3, cfg.data_size, cfg.data_size, dtype=torch.uint8)
    labels = torch.empty(len(dataset), dtype=torch.int64)
    for i, (batch, batch_labels) in enumerate(tqdm(loader, "reading", unit_scale=64, **BAR)):
        part = slice(64 * i, 64 * i + len(batch))
        images[part] = batch
        labels[part] = batch_labels
    return images, labels

def load_data(cfg):
    """The training split's (images, labels), the test split's, and the names of the classes."""
    try:
        if cfg.data == "stripes":
            train = draw_stripes(8000, cfg.data_size, seed=1)
            test = draw_stripes(1000, cfg.data_size, seed=0)
        elif cfg.data in NATIVE_SIZE:
            dataset = getattr(datasets, cfg.data.upper())
            splits = ("train", "test") if cfg.data == "stl10" else (True, False)  # CIFAR's train=
            train, test = [dataset(cfg.root, split, transform=square(cfg.data_size), download=True)
                           for split in splits]
        else:
            splits = ("train", "val" if os.path.isdir(f"{cfg.data}/val") else "test")
            train, test = [open_folder(f"{cfg.data}/{split}", cfg) for split in splits]
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot get --data {cfg.data}: {error}. Known are {', '.join(NATIVE_SIZE)} and "
            "folders that hold train/<class>/* and val/<class>/* or test/<class>/*; offline, put "
            f"what torchvision would download into {cfg.root}") from error
    odd = set(train.classes) ^ set(test.classes)
    if odd:
        raise UserError(f"{cfg.data} has {sorted(odd)} in one of its two splits only")
    return read_split(train, cfg), read_split(test, cfg), train.classes

# ---- Training ------------------------------------------------------------------------------------
def to_device(tensor, cfg):
    """The tensor on the run's device; a GPU fetches it while the CPU goes on."""
    if cfg.device.startswith("cuda"):
        tensor = tensor.pin_memory()
    return tensor.to(cfg.device, non_blocking=True)

def autocast(cfg):
    kind = torch.device(cfg.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=cfg.dtype == "bfloat16")

def severities_of(cfg):
    return {name: vars(cfg)[name] for name in DISTORTIONS if vars(cfg).get(name)}

def learning_rate(step, total_steps, peak):
    """The lower of a linear warm-up over 3% of the steps and half a cosine to zero."""
    warmup = math.ceil(0.03 * total_steps)
    return peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / total_steps))

def train(objective, data, cfg, epochs, lr, severities, state=None):
    """Train on data = (images, labels), distorted anew each time. Yields, after each epoch, a row
    of figures and the state from which training can go on: since an epoch's order depends on
    (seed, epoch) and a distortion on (seed, step, process), no random state is in it.
    """
    images, labels = data
    trained = [p for p in objective.parameters() if p.requires_grad]  # not the frozen teacher
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.05, fused=True)
    if state:
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
    model = torch.compile(objective, dynamic=False) if cfg.compile else objective
    if WORLD > 1:
        model = nn.parallel.DistributedDataParallel(model)
    generator = torch.Generator(cfg.device)
    own_size = cfg.batch_size // WORLD  # this process's part of a batch
    steps_per_epoch = len(images) // cfg.batch_size  # without the ragged last batch

    for epoch in range(state["epoch"] if state else 0, epochs):
        order = np.random.default_rng((cfg.seed, epoch)).permutation(len(images))[RANK::WORLD]
        sums = 0
        start = time.perf_counter()
        bar = tqdm(range(steps_per_epoch), f"epoch {epoch + 1}", unit_scale=cfg.batch_size, **BAR)
        for i in bar:
            step = epoch * steps_per_epoch + i
            batch = order[i * own_size:(i + 1) * own_size]
            clean = to_device(images[batch], cfg) / 255
            generator.manual_seed((1_000_000 * cfg.seed + step) * WORLD + RANK)
            distorted = distort(clean, generator, cfg.one_of, cfg.clean, **severities)

            optimizer.param_groups[0]["lr"] = learning_rate(step, epochs * steps_per_epoch, lr)
            with autocast(cfg):
                loss, terms = model(clean, distorted, to_device(labels[batch], cfg))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()

            figures = torch.stack([loss, *terms.values()]).detach()
            sums = sums + figures
            if i % 20 == 0:  # reading the figures waits for the device
                bar.set_postfix(zip(["loss", *terms], figures.tolist(), strict=True))
        if WORLD > 1:
            dist.all_reduce(sums)
        means = (sums / steps_per_epoch / WORLD).tolist()
        rate = steps_per_epoch * cfg.batch_size / (time.perf_counter() - start)
        row = dict(zip(["loss", *terms], means, strict=True))
        state = {"objective": objective.state_dict(), "optimizer": optimizer.state_dict()}
        yield {"epoch": epoch + 1, **row, "images_per_s": rate}, {"epoch": epoch + 1, **state}

@torch.inference_mode()
def compare(vits, images, cfg, severities, one_of=False, seed=0):
    """Show ViTs, by name, the same distorted copies of images, uint8 [B, 3, S, S]. Returns global
    embeddings [B, D] of each, and how far its features are from those that vits["teacher"] has of
    the clean images, in distill_loss's terms: {"global_teacher": 0.3, ...}.
    """
    generator = torch.Generator(cfg.device).manual_seed(seed)
    embeddings = defaultdict(list)
    distances = defaultdict(float)
    for batch in images.split(cfg.batch_size):
        clean = to_device(batch, cfg) / 255
        distorted = distort(clean, generator, one_of, **severities)
        with autocast(cfg):
            target = vits["teacher"](prepare(clean, cfg.img_size), cfg.attn_blocks)
            for who, vit in vits.items():
                features = vit(prepare(distorted, cfg.img_size), cfg.attn_blocks)
                embeddings[who].append(features.cls.float().clone())  # a view keeps patches too
                for term, value in distill_loss(features, target)[1].items():
                    distances[f"{term}_{who}"] += value.item() * len(batch) / len(images)
    return {who: torch.cat(parts) for who, parts in embeddings.items()}, distances

# ---- The run -------------------------------------------------------------------------------------
def positive_int(text):
    if int(text) < 1:
        raise ValueError  # argparse says of which option
    return int(text)

def make_parser(usage, description):
    parser = argparse.ArgumentParser(usage=usage, description=description.split("\n\n")[0])
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    add = parser.add_argument
    add("--data", default="stripes", help=f"{', '.join(NATIVE_SIZE)} or a folder [stripes]")
    add("--root", default="data", help="where data sets are downloaded to [data]")
    add("--max-images", type=positive_int, help="of either split [all; eval.py on stripes 1000]")
    add("--data-size", type=positive_int, help="side when distorted [32; stl10 96; a folder 224]")
    add("--batch-size", type=positive_int, help="of all processes together [64; scratch 32]")
    add("--dtype", choices=["float32", "bfloat16"], help="[cuda: bfloat16, else float32]")
    add("--device", default=str(best), help=f"[{best}]")
    add("--workers", type=int, default=2, help="processes that read images [2]")
    add("--seed", type=int, default=0, help="of fresh weights, order and distortions [0]")
    return parser

def describe(severities, one_of):
    """Distortions as text: noise0.1, blur1+noise0-0.4, blur1-or-noise0.1."""
    parts = []
    for name, value in severities.items():
        parts.append(name + "-".join(f"{end:g}" for end in np.unique(value)))
    return ("-or-" if one_of else "+").join(parts) or "clean"

def resolve(cfg):
    """Fill in the options that depend on others; raise UserError where they cannot be met."""
    cfg.data_size = cfg.data_size or NATIVE_SIZE.get(cfg.data, 224)
    mixture = not severities_of(cfg)  # none was typed ([0.0] is one)
    if mixture:
        pixels = [0, 1.5 * cfg.data_size / 32]
        vars(cfg).update(blur=pixels, noise=[0, 0.4], mask=[0, 0.6], one_of=True)
    if cfg.clean is None:
        cfg.clean = 0.2 if mixture else 0.0
    data = os.path.basename(os.path.abspath(cfg.data))
    kinds = "mixture" if mixture else describe(severities_of(cfg), cfg.one_of)
    method = "" if cfg.method == "distill" else f"-{cfg.method}"
    cfg.out = cfg.out or f"runs/{data}-{kinds}{method}"
    cfg.weights = cfg.weights or ("scratch" if cfg.data == "stripes" else "dinov2_vits14")
    scratch = cfg.weights == "scratch"
    cfg.img_size = cfg.img_size or (cfg.data_size if scratch else 224)
    cfg.batch_size = cfg.batch_size or (32 if scratch else 64)
    cfg.lr = cfg.lr or (5e-3 if scratch else 1e-4)
    on_gpu = cfg.device.startswith("cuda")
    cfg.dtype = cfg.dtype or ("bfloat16" if on_gpu else "float32")
    cfg.compile = on_gpu if cfg.compile is None else cfg.compile
    if cfg.batch_size % WORLD:
        raise UserError(f"--batch-size {cfg.batch_size} is not a multiple of {WORLD} processes")
    if scratch and (cfg.img_size % 8 or cfg.scratch[0] % 64):
        raise UserError("--img-size has to be a multiple of 8, --scratch's width of 64")
    try:  # the device, and every distortion's own limits
        if cfg.device == "cuda":
            torch.cuda.set_device(LOCAL_RANK)
        black = torch.zeros(1, 3, cfg.data_size, cfg.data_size, device=cfg.device)
        distort(black, clean=cfg.clean, **severities_of(cfg))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"on {cfg.device}: {error!r:.300}") from error

def say(text):
    if RANK == 0:
        print(text, flush=True)

def save(content, path):
    """torch.save that leaves path whole or as it was."""
    torch.save(content, f"{path}.part")
    os.replace(f"{path}.part", path)

def read_checkpoint(cfg):
    """The last checkpoint of the run in --out, which has to have the same options."""
    checkpoint = torch.load(f"{cfg.out}/last.pt", map_location="cpu", weights_only=True)
    for name, value in vars(cfg).items():
        old = checkpoint.get("config", {}).get(name)
        if old != value and name not in ("out", "root", "device", "workers", "compile"):
            raise UserError(f"--out {cfg.out} holds a run with {name} {old}, not {value}")
    return checkpoint

def make_teacher(weights, data, num_classes, cfg):
    """The pretrained teacher, or a small one with an 8 by 8 grid, trained here with labels."""
    if weights != "scratch":
        return load_vit(weights, cfg.img_size).to(cfg.device)
    width, depth = cfg.scratch
    teacher = ViT(cfg.img_size, cfg.img_size // 8, width, depth, num_heads=width // 64)
    objective = Objective("supervised", teacher, None, num_classes, cfg).to(cfg.device)
    lr = 0.128 / width  # 2e-3 at 64; at the student's 5e-3 attention gets too sharp to distil
    for row, _ in train(objective, data, cfg, cfg.pretrain_epochs, lr, severities={}):
        say(f"teacher: {json.dumps(row)}")
    return teacher

def run(cfg, checkpoint):
    os.makedirs(cfg.out, exist_ok=True)
    if LOCAL_RANK > 0:  # a machine's first process downloads data, the others wait
        dist.barrier()
    data, (test_images, _), classes = load_data(cfg)
    if LOCAL_RANK == 0 and WORLD > 1:
        dist.barrier()
    if cfg.batch_size > len(data[0]):
        raise UserError(f"--batch-size {cfg.batch_size} is more than the {len(data[0])} images")
    torch.manual_seed(cfg.seed)
    weights = f"{cfg.out}/teacher.pth" if checkpoint else cfg.weights
    teacher = make_teacher(weights, data, len(classes), cfg)
    if RANK == 0 and not checkpoint:
        Path(cfg.out, "config.json").write_text(json.dumps(vars(cfg), indent=1))
        save(teacher.state_dict(), f"{cfg.out}/teacher.pth")
    student = copy.deepcopy(teacher)  # before the teacher is frozen
    teacher.requires_grad_(False)
    vits = {"teacher": teacher, "student": student}
    objective = Objective(cfg.method, student, teacher, len(classes), cfg).to(cfg.device)
    severities = severities_of(cfg)
    log = checkpoint["log"] if checkpoint else []
    for row, state in train(objective, data, cfg, cfg.epochs, cfg.lr, severities, checkpoint):
        _, distances = compare(vits, test_images[:500], cfg, severities, cfg.one_of)
        log.append({**row, **distances})
        say(json.dumps(log[-1]))
        if not all(math.isfinite(value) for value in log[-1].values()):
            raise UserError("the last row is not finite: lower --lr, with another --out")
        if RANK == 0:
            Path(cfg.out, "log.jsonl").write_text("\n".join(map(json.dumps, log)) + "\n")
            save(student.state_dict(), f"{cfg.out}/student.pth")
            save({**state, "config": vars(cfg), "log": log}, f"{cfg.out}/last.pt")

def main():
    parser = make_parser("%(prog)s [options]", __doc__)
    add = parser.add_argument
    add("--weights", help="a name, a file or scratch [dinov2_vits14; of stripes scratch]")
    add("--scratch", type=positive_int, nargs=2, default=[64, 4], metavar=("WIDTH", "DEPTH"),
        help="of a scratch teacher, which is first trained with labels [64 4]")
    add("--img-size", type=positive_int, help="side for the ViT [224; of scratch the data size]")
    for name, (function, _) in DISTORTIONS.items():
        add(f"--{name}", type=float, nargs="+", help=f"{function.__doc__}, or a range [0]")
    add("--one-of", action="store_true", help="one distortion an image, not all")
    add("--clean", type=float, help="share of images that stay clean [0]. Without a distortion: "
        "--blur 0 1.5 (per 32 pixels) --noise 0 0.4 --mask 0 0.6 --one-of --clean 0.2")
    add("--method", default="distill", choices=["distill", "contrastive", "supervised"])
    add("--loss-weights", type=float, nargs=3, default=[1.0, 1.0, 1.0], metavar=("G", "P", "A"),
        help="of the global, the patch and the attention term [1 1 1]")
    add("--attn-blocks", type=positive_int, default=1, help="last blocks of that term [1]")
    add("--epochs", type=positive_int, default=5, help="[5]")
    add("--pretrain-epochs", type=positive_int, default=2, help="of a scratch teacher [2]")
    add("--lr", type=float, help="highest learning rate of the student [1e-4; scratch 5e-3]")
    add("--compile", action=argparse.BooleanOptionalAction, help="[cuda: on, else off]")
    add("--out", help="run folder; the same command goes on there [runs/<data>-<distortions>]")
    cfg = parser.parse_args()
    try:
        resolve(cfg)
        checkpoint = read_checkpoint(cfg) if os.path.exists(f"{cfg.out}/last.pt") else None
        if WORLD > 1:
            day = datetime.timedelta(days=1)  # a download may be long
            dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo", timeout=day)
        if checkpoint is None or checkpoint["epoch"] < cfg.epochs:
            say(json.dumps(vars(cfg)))
            run(cfg, checkpoint)
        say(f"{cfg.out} is finished; next: python eval.py {cfg.out}")
    except (UserError, OSError) as error:
        parser.error(str(error).splitlines()[-1])  # a worker's begins with its traceback
    if WORLD > 1:
        dist.destroy_process_group()

if __name__ == "__main__":
    main()
