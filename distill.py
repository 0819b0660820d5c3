# SPDX-License-Identifier: MIT
"""Asymmetric multi-level distillation, after arXiv 2604.22529: a frozen Vision Transformer, the
teacher, sees clean images; a student that starts from the same weights sees distorted copies and
learns, without labels, to give the teacher's global embedding, patch features and attention maps.

    python distill.py                               draws images, trains its own teacher first
    python eval.py runs/stripes-mixture             what distortions cost both, as a table
    python distill.py --data cifar10 --noise 0.1    downloads CIFAR-10 and DINOv2's ViT-S/14

Shapes in comments: B images, N patches, T = 1 + registers + N tokens, D the width of a token.
"""
import argparse
import copy
import json
import math
import os
import re
import time
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps  # which torchvision brings
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset
from torchvision import datasets, transforms
from tqdm import tqdm

# ---- The Vision Transformer: all parameters are named as in DINO and DINOv2 ----------------------
class Features(NamedTuple):
    """What a ViT gives: embeddings after the final norm, and attention probabilities."""
    cls: torch.Tensor  # [B, D], the global embedding
    patches: torch.Tensor  # [B, N, D], row by row
    attn: tuple = ()  # a map [B, heads, T, T] in float32 for each block asked for, in order

class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, need_map):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [B, T, 3, heads, D / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, T, D / heads]
        # The fused kernel gives no map, and is slow in bfloat16 on a CPU.
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
    """A pre-norm Vision Transformer (arXiv 2010.11929) whose tokens are cls, registers (arXiv
    2309.16588), patches. Sizes in pixels. Raises ValueError if patches or heads do not fit."""
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio=4.0,
                 num_registers=0, layer_scale=False):
        super().__init__()
        if img_size % patch_size or not num_heads or embed_dim % num_heads:
            raise ValueError(f"{img_size=} / {patch_size=}, {embed_dim=} / {num_heads=} not whole")
        self.img_size = img_size
        self.num_registers = num_registers
        num_patches = (img_size // patch_size) ** 2
        proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + num_patches, embed_dim))
        if num_registers:
            self.register_tokens = nn.Parameter(0.02 * torch.randn(1, num_registers, embed_dim))
        block_args = (embed_dim, num_heads, round(embed_dim * mlp_ratio), layer_scale)
        self.blocks = nn.ModuleList(Block(*block_args) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, images, attn_blocks=0):
        """Features of normalized images [B, 3, img_size, img_size], with the maps of the last
        attn_blocks blocks. Raises ValueError for images of another size."""
        if images.shape[2:] != (self.img_size, self.img_size):
            raise ValueError(f"images are {list(images.shape)}, not {self.img_size} pixels a side")
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]  # [B, N, D]
        first = self.cls_token + self.pos_embed[:, :1]
        if self.num_registers:  # they get no position embedding
            first = torch.cat([first, self.register_tokens], dim=1)
        x = torch.cat([first.expand(x.shape[0], -1, -1), x], dim=1)  # [B, T, D]
        first_map = len(self.blocks) - attn_blocks
        maps = []
        for i, block in enumerate(self.blocks):
            x, attn = block(x, need_map=i >= first_map)
            if i >= first_map:
                maps.append(attn)
        x = self.norm(x)
        return Features(x[:, 0], x[:, 1 + self.num_registers:], tuple(maps))

# ---- Pretrained weights --------------------------------------------------------------------------
WEIGHTS = {  # all under Apache 2.0
    "dinov2_vits14": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "dinov2_vitb14": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "dinov2_vits14_reg": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

class UserError(ValueError):
    """A mistake that the user can mend: main prints its message instead of a traceback."""

def resize_pos_embed(pos_embed, side, registers):
    """Position embeddings [1, 1 + n * n, D] for side * side patches, as in DINO and DINOv2."""
    n = math.isqrt(pos_embed.shape[1] - 1)
    if n == side:
        return pos_embed
    grid = pos_embed[:, 1:].float().transpose(1, 2).unflatten(2, (n, n))  # [1, D, n, n]
    if registers:  # as in DINOv2's models with registers
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    else:  # DINO and DINOv2 add 0.1, lest rounding lose a patch (dino issue 8)
        grid = F.interpolate(grid, scale_factor=(side + 0.1) / n, mode="bicubic")
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)

def find_vit(checkpoint):
    """The tensors of the first ViT in a checkpoint, under DINO's names without any prefix."""
    for key in ("teacher", "model", "state_dict"):
        checkpoint = checkpoint.get(key, checkpoint)  # unwrapped, if it has the key
    last = "patch_embed.proj.weight"
    prefix = next((name.removesuffix(last) for name in checkpoint if name.endswith(last)), "")
    state = {name.removeprefix(prefix): tensor for name, tensor in checkpoint.items()
             if name.startswith(prefix)}
    others = ("head", "mask", "decoder", "dino_head", "ibot_head")
    # DINOv2's training code names its blocks blocks.<group>.<number>: the number is the block's.
    return {re.sub(r"^blocks\.\d+\.(\d+)", r"blocks.\1", name): tensor
            for name, tensor in state.items() if not name.startswith(others)}

def load_vit(weights, img_size, num_heads=None):
    """The ViT of a name in WEIGHTS or of a checkpoint's path, for images of img_size pixels a side.
    num_heads: by default 16 for what is wider than 1024, else width / 64. Raises ValueError if the
    weights cannot be had or do not fit. No code in a file is run."""
    load = torch.hub.load_state_dict_from_url if weights in WEIGHTS else torch.load
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's files hold one
            checkpoint = load(WEIGHTS.get(weights, weights), map_location="cpu", weights_only=True)
        state = find_vit(checkpoint)
        embed_dim, _, _, patch_size = state["patch_embed.proj.weight"].shape
        depth = sum(name.endswith(".norm1.weight") for name in state)  # one a block
        mlp_ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim
        registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
        if num_heads is None and embed_dim % 64 == 0:  # the shapes do not tell
            num_heads = 16 if embed_dim > 1024 else embed_dim // 64
        vit = ViT(img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, registers,
                  layer_scale="blocks.0.ls1.gamma" in state)
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], img_size // patch_size, registers)
        vit.load_state_dict(state)  # an error if any name is missing or unknown
        return vit
    except Exception as error:  # missing, damaged and foreign files raise many kinds
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise UserError(f"cannot load weights {weights}: {reason}. Known are {', '.join(WEIGHTS)}; "
                        f"offline: from {torch.hub.get_dir()}/checkpoints") from error

def prepare(images, img_size, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """A ViT's input: images [B, 3, h, w] in [0, 1] resized to img_size pixels a side by Pillow's
    bicubic kernel and normalized, in float32. Raises ValueError for images that are not floats."""
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}, not floats in [0, 1]")
    images = images.float()
    if images.shape[2:] != (img_size, img_size):  # antialias: Pillow's kernel
        images = F.interpolate(images, (img_size, img_size), mode="bicubic", antialias=True)
    # non_blocking: else a GPU would wait here at every step.
    mean = torch.tensor(mean).view(3, 1, 1).to(images.device, non_blocking=True)
    std = torch.tensor(std).view(3, 1, 1).to(images.device, non_blocking=True)
    return (images - mean) / std

# ---- Distortions ---------------------------------------------------------------------------------
# To add one, write a function and list it in DISTORTIONS: option and run name follow. It takes
# images [B, 3, H, W], the severity of each [B, 1, 1, 1], the highest that may occur (it sizes
# blur's kernel) and a generator. Its docstring is the option's help.
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
    """standard deviation of Gaussian noise, of pixels in [0, 1]"""
    return images + severity * torch.randn(images.shape, generator=generator, device=images.device)

def salt(images, severity, highest, generator):
    """share of pixels set to black or white, half each"""
    chance = torch.rand(images[:, :1].shape, generator=generator, device=images.device)
    images = torch.where(chance < severity / 2, 0.0, images)  # the lowest chances black,
    return torch.where(chance >= 1 - severity / 2, 1.0, images)  # the highest white

def mask(images, severity, highest, generator):
    """share of pixels set to black"""
    chance = torch.rand(images[:, :1].shape, generator=generator, device=images.device)
    return images * (chance >= severity)

DISTORTIONS = {  # name: (function, limit of its severity), in the order of their use
    "blur": (blur, math.inf), "contrast": (contrast, 1), "noise": (noise, math.inf),
    "salt": (salt, 1), "mask": (mask, 1)}

def distort(images, generator=None, one_of=False, clean=0.0, **severities):
    """Distorted copies of images [B, 3, H, W] in [0, 1], of the same shape and range, in float32.
    severities: for names of DISTORTIONS a number, or (low, high) from which each image draws its
    own. All are applied in turn, or with one_of only one, chosen for each image; with probability
    clean an image stays as it is. generator: on the images' device. Raises ValueError for what is
    out of range, unknown kinds, and images of another shape or not in floats."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images are {images.dtype} {list(images.shape)}, not floats [B, 3, H, W]")
    if not 0 <= clean <= 1:
        raise ValueError(f"{clean=} is not from 0 to 1")
    names = sorted(severities, key=list(DISTORTIONS).index)  # a ValueError for an unknown kind
    with torch.autocast(images.device.type, enabled=False):
        distorted = images = images.float()
        per_image = (images.shape[0], 1, 1, 1)
        source = {"generator": generator, "device": images.device}
        chosen = torch.randint(max(1, len(names)), per_image, **source)  # for one_of
        for i, name in enumerate(names):
            function, limit = DISTORTIONS[name]
            low, high = np.broadcast_to(severities[name], 2).tolist()  # a number is both ends
            if not (0 <= low <= high <= limit and high < math.inf):
                raise ValueError(f"{name} from {low} to {high} is not within 0 to {limit}")
            severity = low + (high - low) * torch.rand(per_image, **source)
            changed = function(distorted, severity, high, generator)
            distorted = torch.where(chosen == i, changed, distorted) if one_of else changed
        untouched = torch.rand(per_image, **source) < clean
        return torch.where(untouched, images, distorted).clamp(0, 1)

# ---- The loss ------------------------------------------------------------------------------------
# Only the paper's abstract and introduction could be read: which layers, directions and weights it
# uses is not known, and what follows is this repository's choice.
TERMS = ("global", "patch", "attn")

def distill_loss(student, teacher, weights=(1,) * len(TERMS)):
    """The terms between two Features, as their weighted sum and by name: "global" = 1 - cosine of
    cls; "patch" = 1 - cosine of each patch; "attn" = KL(teacher map || student map) in nats of each
    query's row, 0 without maps; all are means, in float32 also under autocast."""
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
    """The method, as one module for torch.compile and DistributedDataParallel. Freezes teacher."""
    def __init__(self, teacher, student, attn_blocks=1, term_weights=(1,) * len(TERMS)):
        super().__init__()
        self.teacher = teacher.requires_grad_(False).eval()
        self.student = student
        self.attn_blocks = attn_blocks
        self.term_weights = term_weights

    def forward(self, clean, distorted):
        """Two batches of a ViT's inputs (see prepare): the loss, and its terms by name."""
        with torch.no_grad():
            target = self.teacher(clean, self.attn_blocks)
        return distill_loss(self.student(distorted, self.attn_blocks), target, self.term_weights)

# ---- Data ----------------------------------------------------------------------------------------
CIFAR = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}

def draw_stripes(n, seed):
    """n drawings of a striped disc; the label is the direction of the stripes, one of ten."""
    uniform = np.random.default_rng(seed).uniform
    y, x = np.mgrid[:32, :32] / 32  # lengths are in sides of the image
    images = []
    for i in range(n):
        angle = np.pi * (i % 10) / 10 + uniform(-0.12, 0.12)
        across = x * np.cos(angle) + y * np.sin(angle)
        wave = np.sin(2 * np.pi * (across / uniform(0.12, 0.22) + uniform()))[..., None]
        dark, light, ground = uniform(0, 0.45, 3), uniform(0.55, 1, 3), uniform(0.2, 0.8, 3)
        radius = uniform(0.28, 0.48)
        center_x, center_y = uniform(0.8 * radius, 1 - 0.8 * radius, size=2)
        disc = np.hypot(x - center_x, y - center_y)[..., None] < radius
        stripes = dark + (light - dark) * (1 + wave) / 2  # [32, 32, 3]
        images.append(255 * np.where(disc, stripes, ground))
    images = torch.tensor(np.stack(images), dtype=torch.uint8).permute(0, 3, 1, 2)
    return TensorDataset(images, torch.arange(n) % 10)

def read_image(path):
    """An image file as an upright RGB PIL.Image. Raises OSError, with the path, for one that Pillow
    cannot read or that is grey with more than 8 bits."""
    try:
        image = Image.open(path)
        if image.mode[0] in "IF":
            raise ValueError("it has more than 8 bits a channel")
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        raise OSError(f"cannot read the image {path}: {error}") from error

def load_data(cfg):
    """The training and the test set, of (uint8 [3, S, S], label), a random part if so asked."""
    resize = transforms.Resize(cfg.data_size, transforms.InterpolationMode.BICUBIC)  # shorter side
    transform = transforms.Compose(
        [resize, transforms.CenterCrop(cfg.data_size), transforms.PILToTensor()])
    try:
        if cfg.data == "stripes":
            splits = [draw_stripes(8000, seed=1), draw_stripes(1000, seed=0)]
        elif cfg.data in CIFAR:
            splits = [CIFAR[cfg.data]("data", train, transform, download=True)
                      for train in (True, False)]
        else:
            second = "val" if os.path.isdir(f"{cfg.data}/val") else "test"
            splits = [datasets.ImageFolder(f"{cfg.data}/{name}", transform, loader=read_image)
                      for name in ("train", second)]
            if splits[0].classes != splits[1].classes:
                raise UserError(f"other classes in train than in {second}")
    except (OSError, RuntimeError, UserError) as error:
        raise UserError(f"cannot get --data {cfg.data}: {error}. A folder has train/CLASS/* and "
                        "val/CLASS/* or test/CLASS/*; no labels: train/all, val/all") from error
    return [Subset(split, np.random.default_rng(0).permutation(len(split))[:cfg.max_images])
            for split in splits]

def make_loader(dataset, cfg, batch_size, sampler=None):  # a sampler is for training
    workers = 0 if cfg.data == "stripes" else cfg.workers  # stripes are in memory already
    return DataLoader(dataset, batch_size, sampler=sampler, drop_last=sampler is not None,
                      num_workers=workers, pin_memory=cfg.device == "cuda")

# ---- Training ------------------------------------------------------------------------------------
RANK = int(os.environ.get("RANK", 0))  # set by torchrun: this process's number,
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))  # its number on this machine,
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many there are

def learning_rate(step, total_steps, peak):
    """The lower of a linear warm-up over 3% of the steps and half a cosine to zero."""
    warmup = math.ceil(0.03 * total_steps)
    return peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / total_steps))

def save(content, path):
    """torch.save that leaves path whole or as it was."""
    torch.save(content, f"{path}.part")
    os.replace(f"{path}.part", path)

def train_teacher(teacher, dataset, cfg):
    """Train a ViT on labels for an epoch, at a low rate: a higher one makes it hard to distil."""
    classes = getattr(dataset.dataset, "classes", range(10))  # stripes have ten, without names
    module = nn.ModuleDict({"vit": teacher, "head": nn.Linear(64, len(classes))}).to(cfg.device)
    optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.05, fused=True)
    sampler = DistributedSampler(dataset, 1, 0, seed=1000 * cfg.seed)  # of one process: a shuffle
    loader = make_loader(dataset, cfg, cfg.batch_size, sampler)
    for step, (images, labels) in enumerate(tqdm(loader, "teacher", leave=False, disable=None)):
        images = prepare(images.to(cfg.device) / 255, cfg.img_size, cfg.mean, cfg.std)
        loss = F.cross_entropy(module["head"](teacher(images).cls), labels.to(cfg.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(loader), 5e-4)
        optimizer.step()
    print(f"teacher  loss {loss.item():.3f} in its last step")

@torch.inference_mode()
def compare(teacher, student, batches, cfg, severities, one_of=False, seed=0):
    """Give both ViTs the same distorted copies of batches of (images, labels). Returns embeddings
    {"teacher": [n, D], "student": [n, D]}, and distances {f"{term}_{who}"}: that term of the loss,
    between that ViT's features of the distorted images and the teacher's of the clean ones."""
    generator = torch.Generator(cfg.device).manual_seed(seed)
    embeddings = {"teacher": [], "student": []}
    totals = {f"{term}_{who}": 0.0 for who in embeddings for term in TERMS}
    for images, _ in batches:
        images = images.to(cfg.device) / 255
        pair = (images, distort(images, generator, one_of, **severities))
        clean, distorted = [prepare(x, cfg.img_size, cfg.mean, cfg.std) for x in pair]
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            target = teacher(clean, attn_blocks=1)
            for who, vit in (("teacher", teacher), ("student", student)):
                features = vit(distorted, attn_blocks=1)
                embeddings[who].append(features.cls.float().clone())  # a view would keep all tokens
                for term, value in distill_loss(features, target)[1].items():
                    totals[f"{term}_{who}"] += len(images) * value.item()
    embeddings = {who: torch.cat(parts) for who, parts in embeddings.items()}
    n = len(embeddings["teacher"])  # below, max: rounding can give less than 0
    return embeddings, {name: max(total / n, 0.0) for name, total in totals.items()}

def train(teacher, train_set, test_set, cfg):
    """Distil the teacher into a copy of it, or go on after the last epoch that was finished."""
    student = copy.deepcopy(teacher)
    module = Distillation(teacher, student, term_weights=cfg.loss_weights).to(cfg.device)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.05, fused=True)
    log = []  # a row an epoch
    if os.path.exists(f"{cfg.out}/last.pt"):
        last = torch.load(f"{cfg.out}/last.pt", map_location="cpu", weights_only=True)
        student.load_state_dict(last["student"])
        optimizer.load_state_dict(last["optimizer"])
        log = last["log"]
    model = torch.compile(module) if cfg.compile else module
    if WORLD > 1:  # sends all the first process's weights to the others, the frozen ones too
        model = nn.parallel.DistributedDataParallel(model)
    sampler = DistributedSampler(train_set, WORLD, RANK, seed=1000 * cfg.seed, drop_last=True)
    loader = make_loader(train_set, cfg, cfg.batch_size // WORLD, sampler)
    held_out = make_loader(Subset(test_set, range(min(500, len(test_set)))), cfg, cfg.batch_size)
    generator = torch.Generator(cfg.device)
    for epoch in range(len(log), cfg.epochs):
        sampler.set_epoch(epoch)  # another order, which no interruption changes
        total_loss = 0
        bar = tqdm(loader, f"epoch {epoch + 1}", leave=False, disable=RANK > 0 or None)
        for step, (images, _) in enumerate(bar, start=epoch * len(loader)):
            images = images.to(cfg.device, non_blocking=True) / 255
            generator.manual_seed((1_000_000 * cfg.seed + step) * WORLD + RANK)
            distorted = distort(images, generator, cfg.one_of, cfg.clean, **cfg.severities)
            clean = prepare(images, cfg.img_size, cfg.mean, cfg.std)
            distorted = prepare(distorted, cfg.img_size, cfg.mean, cfg.std)
            with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
                loss, _ = model(clean, distorted)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.param_groups[0]["lr"] = learning_rate(step, cfg.epochs * len(loader), cfg.lr)
            optimizer.step()
            total_loss += loss.detach()
            if step % len(loader) == 0:  # the clock starts after the first step, which compiles
                total_loss.item()  # waits for the device
                start = time.perf_counter()
        mean_loss = total_loss.item() / len(loader)  # of this process's images
        rate = (len(loader) - 1) * cfg.batch_size / (time.perf_counter() - start)
        if RANK == 0:
            _, distances = compare(teacher, student, held_out, cfg, cfg.severities, cfg.one_of)
            row = {"epoch": epoch + 1, "loss": mean_loss, **distances, "images_per_s": rate}
            if not all(map(math.isfinite, row.values())):
                raise UserError(f"epoch {epoch + 1} is not finite: lower --lr, in another --out")
            log.append(row)
            shown = [f"{t} {row[f'{t}_teacher']:.3f} → {row[f'{t}_student']:.3f}" for t in TERMS]
            print(f"epoch {epoch + 1}/{cfg.epochs}", f"loss {mean_loss:.3f}", *shown,
                  f"{rate:.0f} images/s", sep="  ", flush=True)
            save(student.state_dict(), f"{cfg.out}/student.pth")
            Path(cfg.out, "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
            save({"student": student.state_dict(), "optimizer": optimizer.state_dict(),
                  "log": log}, f"{cfg.out}/last.pt")  # saved last: a kill before repeats the epoch

# ---- The run -------------------------------------------------------------------------------------
def run(cfg):
    """The whole run, in this process and in those that torchrun has started beside it."""
    if WORLD > 1:
        dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo")
        if LOCAL_RANK > 0:
            dist.barrier()  # A: until this machine's first process has loaded all, and is at B
    # A folder belongs to the options in its config.json; those of the machine may change.
    options = json.dumps({name: value for name, value in vars(cfg).items()
                          if name not in ("out", "device", "workers", "compile")}, indent=1)
    config, teacher_path = Path(cfg.out, "config.json"), Path(cfg.out, "teacher.pth")
    if config.exists() and config.read_text() != options:
        raise UserError(f"{cfg.out} holds a run with other options: choose another --out")
    if teacher_path.exists() and not config.exists():
        raise UserError(f"{teacher_path} has no config.json beside it: choose another --out")
    train_set, test_set = load_data(cfg)
    if cfg.batch_size > len(train_set) or cfg.batch_size % WORLD:
        raise UserError(f"--batch-size {cfg.batch_size} of {len(train_set)} images, {WORLD} parts")
    try:  # first a black image, to see whether the distortions are possible
        distort(torch.zeros(1, 3, cfg.data_size, cfg.data_size), clean=cfg.clean, **cfg.severities)
        source = teacher_path if teacher_path.exists() else cfg.weights  # its own, when going on
        if source == "scratch":  # a small ViT of width 64 and depth 4 on a grid of 8 by 8 patches
            torch.manual_seed(cfg.seed)
            teacher = ViT(cfg.img_size, cfg.img_size // 8 or 1, 64, 4, cfg.num_heads or 1)
        else:
            teacher = load_vit(source, cfg.img_size, cfg.num_heads)
    except ValueError as error:
        raise UserError(error) from error
    if WORLD > 1 and LOCAL_RANK == 0:
        dist.barrier()  # B: now the processes that wait at A may load
    if RANK == 0:
        os.makedirs(cfg.out, exist_ok=True)
        Path(f"{config}.part").write_text(options)
        os.replace(f"{config}.part", config)
        print(f"{cfg.out}: {len(train_set):,} images of {cfg.data}, {cfg.data_size} pixels; ViT of "
              f"{len(teacher.blocks)} blocks, {cfg.weights}; {cfg.device}, {cfg.dtype}", flush=True)
        if source == "scratch":  # the other processes get it by DistributedDataParallel
            train_teacher(teacher, train_set, cfg)
        save(teacher.state_dict(), teacher_path)
        print("held-out distances from the teacher at clean images, teacher → student")
    train(teacher, train_set, test_set, cfg)
    if WORLD > 1:
        dist.destroy_process_group()

# ---- The options ---------------------------------------------------------------------------------
DEVICES = sorted({"cpu", str(torch.accelerator.current_accelerator(check_available=True) or "cpu")})

def describe(severities, one_of):
    """Distortions as text: noise0.1, blur1+noise0-0.4, blur1-or-noise0.1."""
    parts = [name + "-".join(f"{end:g}" for end in np.unique(x)) for name, x in severities.items()]
    return ("-or-" if one_of else "+").join(parts) or "clean"

def main():
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description=__doc__.split("\n\n")[0],
        epilog="Without a distortion the images get a mixture: --blur 0 1.5 (per 32 pixels) "
               "--noise 0 0.4 --mask 0 0.6 --one-of --clean 0.2")
    add = parser.add_argument
    add("--data", default="stripes", help=f"stripes, {', '.join(CIFAR)}, or a folder [stripes]")
    add("--max-images", type=int, help="a random part of each split [all]")
    add("--weights", help="a name, a file, or scratch [dinov2_vits14; stripes scratch]")
    add("--num-heads", type=int, help="of the weights [width / 64; wider than 1024 16]")
    add("--mean", type=float, nargs=3, default=IMAGENET_MEAN, help="of the weights [ImageNet's]")
    add("--std", type=float, nargs=3, default=IMAGENET_STD, help="of the weights [ImageNet's]")
    add("--data-size", type=int, help="side in pixels when distorted [32; folder 224]")
    add("--img-size", type=int, help="side in pixels for the ViT [224; scratch the data size]")
    for name, (function, _) in DISTORTIONS.items():
        add(f"--{name}", type=float, nargs="+", metavar="X", help=f"{function.__doc__}; or a range")
    add("--one-of", action="store_true", help="each image gets one of the distortions, not all")
    add("--clean", type=float, help="share of images that stay clean [0]")
    add("--loss-weights", type=float, nargs=len(TERMS), default=[1.0] * len(TERMS), metavar=TERMS)
    add("--epochs", type=int, default=4, help="of the student [4]")
    add("--batch-size", type=int, help="of all processes together [64; scratch 16]")
    add("--lr", type=float, help="the student's highest [3e-5; scratch 3e-3]")
    add("--seed", type=int, default=0, help="of weights, order and distortions [0]")
    add("--out", help="run folder; the same command goes on there [runs/<data>-<distortions>]")
    add("--device", choices=DEVICES, default=DEVICES[-1], help=f"[{DEVICES[-1]}]")  # cpu is first
    add("--dtype", choices=["float32", "bfloat16"], help="bfloat16 is slow on a CPU without "
        "AVX512-BF16 or AMX [cuda bfloat16, else float32]")
    add("--compile", action=argparse.BooleanOptionalAction, help="[on cuda with Triton]")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="that read images [up to 8]")
    cfg = parser.parse_args()
    try:
        for name, value in vars(cfg).items():
            smallest = 0 if name in ("seed", "workers", "clean", "one_of", "compile") else 1e-12
            if isinstance(value, (int, float)) and not smallest <= value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {value} is out of range")
        cfg.weights = cfg.weights or ("scratch" if cfg.data == "stripes" else "dinov2_vits14")
        scratch = cfg.weights == "scratch"
        cfg.data_size = cfg.data_size or (32 if cfg.data in ("stripes", *CIFAR) else 224)
        if cfg.data == "stripes" and cfg.data_size != 32:
            raise UserError("stripes are 32 pixels, no other --data-size")
        cfg.img_size = cfg.img_size or (cfg.data_size if scratch else 224)
        cfg.batch_size = cfg.batch_size or (16 if scratch else 64)
        cfg.lr = cfg.lr or (3e-3 if scratch else 3e-5)
        cfg.severities = {name: x for name, x in vars(cfg).items() if name in DISTORTIONS and x}
        distortions = describe(cfg.severities, cfg.one_of) if cfg.severities else "mixture"
        if not cfg.severities:
            cfg.one_of = True
            blur = [0, 1.5 * cfg.data_size / 32]
            cfg.severities = {"blur": blur, "noise": [0, 0.4], "mask": [0, 0.6]}
            cfg.clean = 0.2 if cfg.clean is None else cfg.clean
        cfg.clean = cfg.clean or 0.0
        cfg.out = cfg.out or f"runs/{Path(cfg.data).resolve().name}-{distortions}"
        if cfg.device == "cuda":
            torch.cuda.set_device(LOCAL_RANK)
        native = cfg.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        cfg.dtype = cfg.dtype or ("bfloat16" if native else "float32")
        if cfg.compile is None:
            cfg.compile = cfg.device == "cuda" and find_spec("triton") is not None
        run(cfg)
        if RANK == 0:
            print(f"{cfg.out} is finished; next: python eval.py {cfg.out}")
    except (UserError, OSError) as error:
        parser.error(str(error).splitlines()[-1])  # a loader's error begins with a traceback

if __name__ == "__main__":
    main()
