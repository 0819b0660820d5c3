#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Distil a Vision Transformer into a copy of itself that sees through noise, blur and missing pixels.

A frozen teacher sees clean images. A student, which starts from the same weights, sees distorted
copies and learns to give the teacher's global embedding, patch features and attention maps. No
labels are used. This is asymmetric multi-level distillation (arXiv 2604.22529) in one file:

    python distill.py --data cifar10 --noise 0.1    # trains, writes runs/cifar10-noise0.1
    python eval.py runs/cifar10-noise0.1            # linear probe, held-out distortions, picture

To be read from top to bottom: the ViT, pretrained weights, the distortion, the loss, the data,
training, the command line. Shapes: B images, N patches, T = 1 + registers + N tokens, D wide.
"""
import argparse
import copy
import hashlib
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ---- The Vision Transformer: parameters are named as in DINO, DINOv2 and timm -------------------

class Features:
    """What a ViT gives: `cls` [B, D] and `patches` [B, N, D] after the final norm, and `attn`, a
    tuple of the last blocks' attention probabilities, each [B, heads, T, T] in float32."""

    def __init__(self, cls, patches, attn=()):
        self.cls, self.patches, self.attn = cls, patches, attn

    def __iter__(self):  # cls, patches, attn = vit(images)
        return iter((self.cls, self.patches, self.attn))

class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, need_map):
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, T, D / heads]
        attn = None
        # The fused kernel never builds the map, but in bfloat16 on a CPU it is 2 to 5 times slower.
        if need_map or (q.dtype == torch.bfloat16 and q.device.type == "cpu"):
            attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, heads, T, T]
            attn = (attn.float() if need_map else attn).softmax(-1)
            x = attn.to(v.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, T, D)), attn

class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 1e-5))

    def forward(self, x):
        return x * self.gamma

class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio, layer_scale):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = round(dim * mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(self, x, need_map):
        y, attn = self.attn(self.norm1(x), need_map)
        x = x + self.ls1(y)
        y = self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))
        return x + self.ls2(y), attn

class ViT(nn.Module):
    """A pre-norm Vision Transformer (arXiv 2010.11929) whose forward pass also gives its attention.

    img_size and patch_size are pixels along a side. Registers (arXiv 2309.16588) and layer scale
    (arXiv 2103.17239) are DINOv2's. Tokens are cls, registers (which get no position embedding),
    patches row by row. Raises ValueError if patch_size does not divide img_size, or num_heads
    embed_dim."""

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio=4.0,
                 num_registers=0, layer_scale=False):
        super().__init__()
        if min(img_size, patch_size, embed_dim, depth, num_heads) < 1:
            raise ValueError("a ViT's sizes are all at least 1")
        if img_size % patch_size or embed_dim % num_heads:
            raise ValueError(f"image size {img_size} is not a multiple of the patch size {patch_size}"
                             if img_size % patch_size else
                             f"width {embed_dim} is not a multiple of the number of heads {num_heads}")
        self.img_size, self.num_registers = img_size, num_registers
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size // patch_size) ** 2, embed_dim))
        if num_registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, num_registers, embed_dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, patch_size)})
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, layer_scale)
                                    for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                nn.init.trunc_normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, images, attn_blocks=0):
        """Features of images [B, 3, img_size, img_size], normalized (see prepare), with the maps of
        the last attn_blocks blocks. Raises ValueError for another shape, or more blocks than are."""
        if images.ndim != 4 or images.shape[1:] != (3, self.img_size, self.img_size):
            raise ValueError(f"expected images [B, 3, {self.img_size}, {self.img_size}], "
                             f"got {list(images.shape)}")
        if not 0 <= attn_blocks <= len(self.blocks):
            raise ValueError(f"{attn_blocks} attention blocks of a ViT that has {len(self.blocks)}")
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)  # [B, N, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        if self.num_registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        maps = []
        for i, block in enumerate(self.blocks):
            x, attn = block(x, need_map=i >= len(self.blocks) - attn_blocks)  # [B, T, D]
            maps.append(attn)
        x = self.norm(x)
        return Features(x[:, 0], x[:, 1 + self.num_registers:], tuple(maps[len(maps) - attn_blocks:]))

# ---- Pretrained weights --------------------------------------------------------------------------

META = "https://dl.fbaipublicfiles.com/"
WEIGHTS = {  # name: the publisher's file
    **{f"dinov2_vit{s}14{name}": f"{META}dinov2/dinov2_vit{s}14/dinov2_vit{s}14{file}_pretrain.pth"
       for s in "sbl" for name, file in (("", ""), ("_reg", "_reg4"))},
    **{f"dino_{name}": f"{META}dino/dino_{file}_pretrain/dino_{file}_pretrain.pth" for name, file in
       (("vits16", "deitsmall16"), ("vits8", "deitsmall8"), ("vitb16", "vitbase16"))},
    "deit_tiny": META + "deit/deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small": META + "deit/deit_small_patch16_224-cd65a155.pth",
}

def read_file(path, load=torch.load):
    """What torch.save wrote: tensors and plain containers only, so that no file can run code.
    Raises OSError if it can't be had, ValueError if it is damaged."""
    try:
        return load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as e:  # whatever the zip and pickle readers meet
        raise ValueError(f"{path} is damaged or more than tensors ({type(e).__name__}): delete or "
                         "replace it") from e

def load_vit(weights, img_size):
    """The ViT of a state dict in DINO naming, for square images of img_size pixels.

    weights is a name in WEIGHTS (downloaded once, into torch.hub's folder) or a path. Width, depth,
    patch size, registers, layer scale and MLP ratio are read off the state dict; heads are 64 wide.
    Position embeddings are resized bicubically, without antialiasing, as in DINO. Raises ValueError
    for an unknown name, no network, a state dict that does not fit (its first missing or unexpected
    key is named), and an img_size that is no multiple of the patch size."""
    path = WEIGHTS.get(weights, weights)
    if path == weights and not os.path.isfile(path):
        raise ValueError(f"unknown weights {str(path)!r}: neither a file nor one of scratch, "
                         + ", ".join(WEIGHTS))
    try:
        state = read_file(path, torch.load if path == weights else torch.hub.load_state_dict_from_url)
    except OSError as e:
        raise ValueError(f"cannot read {path} ({e}): put this file into {torch.hub.get_dir()}/checkpoints"
                         " yourself, or use --weights PATH or --weights scratch") from e
    state = state["model"] if isinstance(state, dict) and "model" in state else state
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{path} holds no state dict")
    state = {k: v.float() for k, v in state.items() if k != "mask_token" and not k.startswith("head")}
    try:
        dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
        pos, registers = state["pos_embed"], state.get("register_tokens", torch.empty(1, 0, dim))
        grid, side = math.isqrt(pos.shape[1] - 1), img_size // patch_size
        depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
        vit = ViT(img_size, patch_size, dim, depth, dim / 64 if dim % 64 else dim // 64,
                  state["blocks.0.mlp.fc1.weight"].shape[0] / dim, registers.shape[1],
                  layer_scale="blocks.0.ls1.gamma" in state)
        if grid != side:
            old = pos[:, 1:].reshape(1, grid, grid, dim).permute(0, 3, 1, 2)
            new = F.interpolate(old, size=(side, side), mode="bicubic")
            state["pos_embed"] = torch.cat([pos[:, :1], new.flatten(2).transpose(1, 2)], dim=1)
        wrong = vit.load_state_dict(state, strict=False)
        for kind, keys in (("missing", wrong.missing_keys), ("unexpected", wrong.unexpected_keys)):
            if keys:
                raise RuntimeError(f"{kind} key {keys[0]}")
    except (KeyError, RuntimeError) as e:
        reason = f"missing key {e}" if isinstance(e, KeyError) else str(e).splitlines()[-1].strip()
        raise ValueError(f"{path} is of another architecture: {reason}") from e
    return vit

def prepare(images, img_size):
    """The ViT's input: images [B, 3, h, w] in [0, 1], resized bicubically to img_size pixels and
    normalized with ImageNet's mean and standard deviation."""
    if images.shape[-1] != img_size:
        images = F.interpolate(images, size=(img_size, img_size), mode="bicubic",
                               antialias=img_size < images.shape[-1])
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return torch.stack([(x - m) / s for x, m, s in zip(images.unbind(1), mean, std)], dim=1)

# ---- The distortion ------------------------------------------------------------------------------

def distort(images, noise=0.0, blur=0.0, mask=0.0, generator=None):
    """Distorted copies of images [B, 3, H, W] in [0, 1], in the order of a camera.

    blur: sigma in pixels of a Gaussian with 2 * ceil(2 * sigma) + 1 taps, edges reflected; noise:
    standard deviation of additive Gaussian noise; mask: each pixel's probability of turning black,
    in all channels; then all is clamped to [0, 1]. Each is a number, or a pair (low, high) from
    which every image draws its own, uniformly. Random numbers come from the generator alone if one
    is given. Raises ValueError for a severity out of range and for images of another shape or type."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError("expected floating-point images [B, 3, H, W], "
                         f"got {list(images.shape)} of {images.dtype}")
    B, _, H, W = images.shape

    def draw(sampler, *shape):
        device = images.device if generator is None else generator.device
        return sampler(shape, generator=generator, device=device).to(images)

    def severity(name, value, top):  # its largest value, and its values, [B, 1, 1, 1] for a range
        low, high = value if isinstance(value, (tuple, list)) else (value, value)
        if not 0 <= low <= high <= top:
            raise ValueError(f"{name} {value} is out of range: a number from 0 to {top:g}, or two "
                             "numbers, the lower first")
        return high, low if low == high else low + (high - low) * draw(torch.rand, B, 1, 1, 1)

    highest, sigma = severity("blur", blur, (min(H, W) - 1) / 2)  # reflection needs radius < side
    if highest > 0:
        radius = int(-(-2 * highest // 1))  # rounded up
        offsets = torch.arange(-radius, radius + 1, device=images.device)
        sigma = (images.new_zeros(B, 1, 1, 1) + sigma).clamp(min=1e-3)  # 0 would give 0 / 0
        taps = torch.exp(-0.5 * (offsets / sigma) ** 2).view(B, -1)  # [B, 2 * radius + 1]
        taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, dim=0)  # one row a channel
        x = F.pad(images, [radius] * 4, mode="reflect").flatten(0, 1)[None]  # [1, 3 * B, ...]
        x = F.conv2d(x, taps[:, None, :, None], groups=3 * B)
        images = F.conv2d(x, taps[:, None, None, :], groups=3 * B).view(B, 3, H, W)
    highest, deviation = severity("noise", noise, 1e6)
    if highest > 0:
        images = images + deviation * draw(torch.randn, B, 3, H, W)
    highest, share = severity("mask", mask, 1)
    if highest > 0:
        images = images * (draw(torch.rand, B, 1, H, W) >= share)
    return images.clamp(0, 1)

# ---- The loss ------------------------------------------------------------------------------------

def distill_loss(student, teacher, weights=(1, 1, 1)):
    """The weighted sum of three terms between two Features of equal shapes, and a dict of the terms,
    unweighted scalars: "global" = 1 - cosine of cls; "patch" = 1 - cosine of each patch, averaged;
    "attn" = KL(teacher map || student map) in nats for each query, averaged over queries, heads,
    blocks and batch (0 without maps). The three levels are the paper's (arXiv 2604.22529). All is in
    float32 whatever the autocast. Raises ValueError for unequal shapes, and for weights that are
    not three finite numbers, none negative and not all zero."""
    if len(weights) != 3 or not all(0 <= w < float("inf") for w in weights) or not any(weights):
        raise ValueError(f"loss weights {list(weights)} are not three finite numbers, none negative "
                         "and not all zero")
    pairs = list(zip((student.cls, student.patches, *student.attn),
                     (teacher.cls, teacher.patches, *teacher.attn)))
    if len(student.attn) != len(teacher.attn) or any(s.shape != t.shape for s, t in pairs):
        raise ValueError("the student's and the teacher's features differ in shape")
    with torch.autocast(student.cls.device.type, enabled=False):
        pairs = [(s.float(), t.float()) for s, t in pairs]
        cosines = [F.cosine_similarity(s, t, dim=-1).mean() for s, t in pairs[:2]]
        kl = pairs[0][0].new_zeros(())
        for s, t in pairs[2:]:  # the clamp keeps log finite for a probability of 0
            log_ratio = t.clamp(min=1e-8).log() - s.clamp(min=1e-8).log()
            kl = kl + (t * log_ratio).sum(-1).mean() / len(student.attn)
        terms = {"global": 1 - cosines[0], "patch": 1 - cosines[1], "attn": kl}
        return sum(w * term for w, term in zip(weights, terms.values())), terms

def info_nce(student, teacher, temperature=0.1):
    """The loss of the closest earlier work (arXiv 2110.07439): each student embedding [b, D] is to
    pick its own image's teacher embedding out of the whole batch's, all processes' together."""
    if WORLD > 1:
        shards = [torch.empty_like(teacher) for _ in range(WORLD)]
        dist.all_gather(shards, teacher)
        teacher = torch.cat(shards)  # [B, D]
    student, teacher = F.normalize(student.float(), dim=-1), F.normalize(teacher.float(), dim=-1)
    own = torch.arange(len(student), device=student.device) + RANK * len(student)
    return F.cross_entropy(student @ teacher.T / temperature, own)

class Objective(nn.Module):
    """The inner step, which torch.compile takes whole: distorted and clean images [B, 3, h, w] in
    [0, 1] and labels [B] to the loss and its terms."""

    def __init__(self, student, teacher, cfg, num_classes):
        super().__init__()
        self.student, self.teacher, self.cfg = student, teacher, cfg
        if cfg.method == "supervised":
            self.head = nn.Linear(len(student.norm.weight), num_classes)

    def forward(self, distorted, clean, labels):
        maps = self.cfg.attn_blocks if self.cfg.method == "distill" else 0
        student = self.student(prepare(distorted, self.cfg.img_size), maps)
        if self.cfg.method == "supervised":
            return F.cross_entropy(self.head(student.cls).float(), labels), {}
        with torch.no_grad():
            teacher = self.teacher(prepare(clean, self.cfg.img_size), maps)
        if self.cfg.method == "contrastive":
            return info_nce(student.cls, teacher.cls), {}
        return distill_loss(student, teacher, self.cfg.loss_weights)

# ---- The data: uint8 images [N, H, W, 3] and labels [N], in memory or memory-mapped --------------

def textures(n, size, seed):
    """n images of a disc of one of ten textures on a shaded ground, and their labels: stripes in
    four directions, checks, grid, rings, rays, waves, patches."""
    rng = np.random.default_rng(seed)

    def u(low, high, *shape):
        return rng.uniform(low, high, (n, *(shape or (1, 1)))).astype(np.float32)

    def stripes(angle, k):
        return np.sin(k * (x * np.cos(angle) + y * np.sin(angle)) + u(0, 6.28))

    labels = rng.permutation(n) % 10
    radius, axis = u(0.28, 0.48) * size, np.arange(size, dtype=np.float32)
    x = axis - 0.8 * radius - u(0, 1) * (size - 1.6 * radius)  # from the disc's centre
    y = axis[:, None] - 0.8 * radius - u(0, 1) * (size - 1.6 * radius)
    distance, k = np.hypot(x, y), 6.28 / (u(0.12, 0.22) * size)
    across, down = (stripes(np.float32(angle), k) for angle in (0, np.pi / 2))
    waves = [stripes(u(-0.17, 0.17) + quarter * np.pi / 4, k) for quarter in range(4)] + [
        2 * across * down, 2 * np.maximum(across, down) - 1, np.sin(k * distance + u(0, 6.28)),
        np.sin(u(4, 8).round() * np.arctan2(y, x) + u(0, 6.28)),
        np.sin(k * (y + 0.09 * size * np.sin(0.7 * k * x)) + u(0, 6.28)),
        sum(stripes(u(0, 3.14), 0.8 * k) for _ in range(3))]
    wave = np.clip(0.5 + np.choose(labels[:, None, None], waves), 0, 1)[..., None]
    disc = np.clip(radius - distance, 0, 1)[..., None]
    dark, light, ground = u(0, 0.45, 1, 1, 3), u(0.55, 1, 1, 1, 3), u(0.2, 0.8, 1, 1, 3)
    shade = (u(-0.3, 0.3) * x + u(-0.3, 0.3) * y)[..., None] / size
    images = disc * (dark + (light - dark) * wave) + (1 - disc) * (ground + shade)
    return (255 * images.clip(0, 1)).astype(np.uint8), labels

def subset(labels, n, seed):
    """Indices, ascending, of n images drawn by the seed, classes as even as can be."""
    order = np.random.default_rng(seed).permutation(len(labels))
    turn = np.empty(len(labels), int)  # how many of its class come before an image
    for c in np.unique(labels):
        members = order[labels[order] == c]
        turn[members] = np.arange(len(members))
    return np.sort(order[np.argsort(turn[order], kind="stable")[:n]])

def load_image(path):
    from torchvision.datasets.folder import default_loader
    try:
        return default_loader(path)  # as RGB, whatever the file's mode
    except Exception as e:  # whatever the decoders raise
        raise ValueError(f"cannot read image {path} ({e}): repair or remove it") from e

def decode(folder, keep, size, root, workers):
    """Images keep of a torchvision ImageFolder, memory-mapped from a file under root that is reused
    while the images' names, sizes and times stay as they are."""
    stats = [(path, os.stat(path)) for path, _ in (folder.samples[i] for i in keep)]
    key = repr([size] + [(path, s.st_size, s.st_mtime_ns) for path, s in stats])
    path = Path(root) / f"decoded-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        loader = torch.utils.data.DataLoader(torch.utils.data.Subset(folder, keep), batch_size=64,
                                             num_workers=workers, collate_fn=list)
        try:
            array = np.lib.format.open_memmap(part, "w+", np.uint8, (len(keep), size, size, 3))
            for i, batch in enumerate(tqdm(loader, "decoding images", disable=None)):
                array[64 * i:64 * (i + 1)] = [image for image, _ in batch]
            array.flush()
            os.replace(part, path)
        except ValueError as e:  # out of a worker it comes as a traceback that ends in the message
            raise ValueError(str(e).splitlines()[-1].removeprefix("ValueError: ")) from e
        finally:
            part.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")

def load_data(data, root, data_size, max_images=None, seed=0, workers=0, labelled=False):
    """Training images and labels, test images and labels: uint8 [N, data_size, data_size, 3], int64
    [N]. max_images keeps a class-balanced subset of either split; labelled leaves out images that
    have no label (STL-10's 100,000). Raises ValueError for unknown data, no network, an empty
    folder or an unreadable image."""
    if data == "textures":
        chunks = [textures(2000, data_size, chunk) for chunk in range(7)]
        splits = [[np.concatenate(part) for part in zip(*chunks[1:])], chunks[0]]
    elif data in ("cifar10", "cifar100", "stl10"):
        from torchvision import datasets
        source, stl = getattr(datasets, data.upper()), data == "stl10"
        parts = ("train" if labelled else "train+unlabeled", "test") if stl else (True, False)
        try:
            splits = [source(root, part, download=True) for part in parts]
        except (OSError, RuntimeError) as e:
            raise ValueError(f"cannot load {data} ({e}): download {source.url} and put it into {root},"
                             " or use --data textures or --data FOLDER, which need no download") from e
        splits = [(s.data.transpose(0, 2, 3, 1), s.labels) if stl else (s.data, np.array(s.targets))
                  for s in splits]
    elif os.path.isdir(data):
        from torchvision import datasets, transforms
        resize = transforms.Compose([transforms.Resize(data_size), transforms.CenterCrop(data_size),
                                     np.asarray])
        test = "val" if os.path.isdir(os.path.join(data, "val")) else "test"
        try:
            train, test = (datasets.ImageFolder(os.path.join(data, part), resize, loader=load_image)
                           for part in ("train", test))
            labels = np.array([train.class_to_idx[name] for name in test.classes])[test.targets]
        except (FileNotFoundError, KeyError) as e:
            raise ValueError(f"{data}: {e}; a data folder holds train/CLASS/* and val/CLASS/* or "
                             "test/CLASS/*, with the same classes in both") from e
        splits = [(train, np.array(train.targets)), (test, labels)]
    else:
        raise ValueError(f"unknown data {data!r}: neither a folder nor one of textures, cifar10, "
                         "cifar100, stl10")
    arrays = []
    for images, labels in splits:
        keep = subset(labels, max_images or len(labels), seed)
        if not isinstance(images, np.ndarray):
            images = decode(images, keep, data_size, root, workers)
        elif images.shape[1] == data_size:
            images = images[keep]
        else:
            images = torch.from_numpy(images[keep]).permute(0, 3, 1, 2)
            images = F.interpolate(images, (data_size, data_size), mode="bicubic", antialias=True)
            images = images.permute(0, 2, 3, 1).numpy()
        arrays += [images, labels[keep].astype(np.int64)]
    return arrays

# ---- Training ------------------------------------------------------------------------------------

RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # set by torchrun

def seed_from(*key):
    """A seed that is a function of the key alone: so a step's number is all its random state."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1

def to_float(images, device):
    """uint8 images [B, H, W, 3] as floats [B, 3, H, W] in [0, 1] on the device."""
    images = torch.from_numpy(images)
    images = images.pin_memory() if device == "cuda" else images
    return images.to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous().float() / 255

@torch.inference_mode()
def embed(vits, images, cfg, distortion=None, seed=0, bar=None):
    """The ViTs' global embeddings, a float32 [N, D] on the CPU for each, of uint8 images that
    distortion(images, generator) has distorted, the same for all."""
    generator, embeddings = torch.Generator(cfg.device).manual_seed(seed), []
    for i in range(0, len(images), cfg.batch_size):
        x = to_float(images[i:i + cfg.batch_size], cfg.device)
        x = prepare(distortion(x, generator) if distortion else x, cfg.img_size)
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            embeddings.append([vit(x).cls.float() for vit in vits])
        if bar:
            bar.update(len(x) * len(vits))
    return [torch.cat(batches).cpu() for batches in zip(*embeddings)]

def write(path, content):
    """Write text, or what torch.save takes, whole or not at all: a crash leaves the old file."""
    with open(f"{path}.part", "wb") as f:
        f.write(content.encode()) if isinstance(content, str) else torch.save(content, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(f"{path}.part", path)

def cpu_state(module):
    return {k: v.cpu() for k, v in module.state_dict().items() if not k.startswith("teacher.")}

def train(stage, objective, images, labels, cfg, checkpoint=None, held_out=dict):
    """Train the objective over cfg's schedule, onward from the checkpoint if it is of this stage.
    At each epoch's end held_out() is added to the log, and log, student and checkpoint written."""
    per_epoch = len(labels) // cfg.batch_size
    total = min(cfg.epochs * per_epoch, cfg.max_steps or sys.maxsize)
    warmup = round(cfg.warmup * total)
    params = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    decayed = [name.endswith("weight") and p.ndim > 1 for name, p in params]  # not tokens, positions
    optimizer = torch.optim.AdamW(
        [{"params": [p for (_, p), d in zip(params, decayed) if d == which], "weight_decay": decay}
         for which, decay in ((True, cfg.weight_decay), (False, 0.0))], lr=cfg.lr, fused=True)
    start, log, sums = 0, [], torch.zeros(4, device=cfg.device)  # sums: loss, terms over the epoch
    if checkpoint and checkpoint["stage"] == stage:
        start, log = checkpoint["step"], checkpoint["log"]
        objective.load_state_dict(checkpoint["objective"], strict=False)
        optimizer.load_state_dict(checkpoint["optimizer"])
        sums.copy_(checkpoint["sums"])
    step_fn = torch.compile(objective, dynamic=False) if cfg.compile == "on" else objective
    if WORLD > 1:
        step_fn = nn.parallel.DistributedDataParallel(step_fn)
    share = slice(RANK * cfg.batch_size // WORLD, (RANK + 1) * cfg.batch_size // WORLD)
    generator, bad_step = torch.Generator(cfg.device), torch.full((), math.inf, device=cfg.device)
    live = sys.stderr.isatty()
    bar = tqdm(desc=stage, total=total, initial=start, disable=RANK > 0 or not live)
    times, seen, clock, saved = [], start, time.perf_counter(), time.perf_counter()
    for step in range(start, total):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == start:
            order = np.random.default_rng(seed_from(cfg.seed, "order", epoch)).permutation(len(labels))
        batch = order[i * cfg.batch_size:(i + 1) * cfg.batch_size]
        clean = to_float(images[batch], cfg.device)
        # Every process draws the whole batch's random numbers: their number changes no result.
        generator.manual_seed(seed_from(cfg.seed, "distortion", step))
        distorted = distort(clean, cfg.noise, cfg.blur, cfg.mask, generator)[share]
        y = torch.from_numpy(labels[batch][share]).to(cfg.device, non_blocking=True)
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(total - warmup, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr = cfg.lr * ((step + 1) / warmup if step < warmup else cosine)
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            loss, terms = step_fn(distorted, clean[share], y)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([p for _, p in params], 1.0)
        optimizer.step()
        stats = torch.stack([loss, *terms.values()]).detach() / WORLD
        if WORLD > 1:
            dist.all_reduce(stats)
        sums[:len(stats)] += stats
        fine = norm.isfinite() & stats[0].isfinite()
        bad_step = torch.where(fine, bad_step, bad_step.clamp(max=step + 1))

        ends = step + 1 == total or i + 1 == per_epoch
        waited = time.perf_counter() - clock
        if RANK or not (ends or step < start + 3 or waited > (0.3 if live else 10)):
            continue  # what follows waits for the device
        *values, bad = torch.cat([stats, bad_step[None]]).tolist()
        if bad < math.inf:
            raise ValueError(f"the loss or its gradient is not finite at step {int(bad)}; the last good "
                             "checkpoint is kept; a lower --lr may help")
        times += [(time.perf_counter() - clock) / (step + 1 - seen)] * (step + 1 - seen)
        steady = times[3:] if step - len(times) < start and times[3:] else times
        row = dict(zip(("loss", *terms), values), images_per_s=cfg.batch_size / np.median(steady))
        bar.update(step + 1 - bar.n)
        bar.set_postfix({k: f"{v:.3g}" for k, v in row.items()})
        if ends:
            means = (sums / (i + 1)).tolist()[:1 + len(terms)] + [None] * (3 - len(terms))
            row = {"epoch": epoch + 1, "step": step + 1,
                   **dict(zip(("loss", "global", "patch", "attn"), means)), "lr": lr,
                   "images_per_s": row["images_per_s"], **held_out()}
            log.append(row)
            sums.zero_()
            times = []
        if ends or not live:
            tqdm.write(f"{stage}: " + "  ".join(f"{k} {v:.4g}" for k, v in row.items() if v is not None))
        if ends or time.perf_counter() - saved > 120:
            if stage == "student":
                write(f"{cfg.out}/student.pth", cpu_state(objective.student))
                write(f"{cfg.out}/log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
            write(f"{cfg.out}/last.pt", {
                "stage": stage, "step": step + 1, "total": total, "log": log, "sums": sums.cpu(),
                "objective": cpu_state(objective), "optimizer": optimizer.state_dict()})
            saved = time.perf_counter()
        seen, clock = step + 1, time.perf_counter()
    bar.close()

# ---- The command line ----------------------------------------------------------------------------

KINDS = ("noise", "blur", "mask")

def describe(severities):
    """As in noise=0.1, noise=0.1-0.5 for a range, noise=0.1+blur=1 for a mixture."""
    return "+".join(f"{kind}=" + "-".join(f"{v:g}" for v in np.ravel(severities[kind]))
                    for kind in KINDS if np.any(severities[kind])) or "clean"

def fail(message):
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)

def run(main):
    """Run main; bad input, too little memory and Ctrl-C end in one line."""
    try:
        main()
    except (ValueError, OSError, ImportError) as e:
        fail(e)
    except (RuntimeError, MemoryError) as e:
        if "memory" not in f"{type(e).__name__} {e}".lower():
            raise
        fail(f"out of memory: lower --batch-size, --img-size or --attn-blocks ({str(e)[:100]})")
    except KeyboardInterrupt:
        print(f"\ninterrupted; continue with: python {shlex.join(sys.argv)} --resume", file=sys.stderr)
        sys.exit(130)

def check(options, limits):
    """Raise ValueError for an option below its lowest sensible value, or not finite."""
    for name, low in limits.items():
        for value in np.ravel([] if getattr(options, name) is None else getattr(options, name)):
            if not low <= value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value} makes no sense: it is at least {low}")

def find_device(name):
    """cuda, mps or cpu, the first there is for auto. Raises ValueError for an absent device."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(device for device in here if here[device]) if name == "auto" else name
    if not here.get(name):
        raise ValueError(f"device {name!r} is not here: choose of {[d for d in here if here[d]]}")
    return name

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.error, add = fail, parser.add_argument
    add("--data", default="textures", help="textures, cifar10, cifar100, stl10, or a folder of "
        "train/CLASS/* and val/CLASS/* (textures: drawn images, no download)")
    add("--root", default="data", help="where data is downloaded to and decoded (data)")
    add("--max-images", type=int, help="keep a class-balanced subset of either split (all)")
    add("--weights", help="scratch (a small ViT, first trained on the clean images with labels), a "
        f"path, or {', '.join(WEIGHTS)} (textures: scratch, else: dinov2_vits14)")
    add("--data-size", type=int, help="pixels at which images are distorted (textures, CIFAR: 32, "
        "stl10: 96, folder: 224)")
    add("--img-size", type=int, help="pixels the ViT is fed (scratch: --data-size, else: 224)")
    for kind, unit in zip(KINDS, ("standard deviation", "sigma in pixels", "share of the pixels")):
        add(f"--{kind}", type=float, nargs="+", metavar="X", help=f"{unit}; two values: a range that "
            "each image draws from (0; --noise 0.3 if no distortion is given)")
    add("--method", choices=("distill", "contrastive", "supervised"), default="distill",
        help="the paper's, InfoNCE on embeddings, or fine-tuning with labels (distill)")
    add("--loss-weights", type=float, nargs=3, default=[1.0, 1.0, 1.0], metavar=("G", "P", "A"),
        help="of the global, patch and attention terms (1 1 1)")
    add("--attn-blocks", type=int, default=1, help="last blocks whose maps are compared (1)")
    add("--epochs", type=int, help="(scratch: 20, else: 10)")
    add("--pretrain-epochs", type=int, default=20, help="of the scratch teacher (20)")
    add("--max-steps", type=int, help="at most so many steps (no limit)")
    add("--batch-size", type=int, default=128, help="over all processes together (128)")
    add("--lr", type=float, help="peak learning rate (scratch: 1e-3, else: 1e-4)")
    add("--weight-decay", type=float, default=0.05, help="of matrices (0.05)")
    add("--warmup", type=float, default=0.1, help="share of the steps (0.1)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="of matrix products (auto: bfloat16 on a GPU that has it, else float32)")
    add("--compile", choices=("auto", "on", "off"), default="auto",
        help="torch.compile the step (auto: if the run is long enough to win the wait back)")
    add("--device", default="auto", help="cuda, mps or cpu (auto: the first there is)")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="processes to decode images (8)")
    add("--seed", type=int, default=0, help="(0)")
    add("--out", help="run folder (runs/<data>-<distortions>)")
    add("--resume", action="store_true", help="continue the run in --out")
    cfg = parser.parse_args()
    cfg.weights = cfg.weights or ("scratch" if cfg.data == "textures" else "dinov2_vits14")
    scratch, own_size = cfg.weights == "scratch", {"textures": 32, "cifar10": 32, "cifar100": 32, "stl10": 96}
    for name, value in (("data_size", own_size.get(cfg.data, 224)), ("epochs", 20 if scratch else 10),
                        ("lr", 1e-3 if scratch else 1e-4)):
        if getattr(cfg, name) is None:
            setattr(cfg, name, value)
    if cfg.img_size is None:
        cfg.img_size = cfg.data_size if scratch else 224
    if not (cfg.noise or cfg.blur or cfg.mask):
        cfg.noise = [0.3]
    for kind in KINDS:  # one value is a number, two are a range
        value = getattr(cfg, kind) or [0.0]
        setattr(cfg, kind, value if len(value) > 1 else value[0])
    whole = ("data_size", "img_size", "epochs", "pretrain_epochs", "batch_size", "max_steps", "max_images")
    check(cfg, {**dict.fromkeys(whole, 1), "lr": 1e-30, "attn_blocks": 0, "loss_weights": 0,
                "weight_decay": 0, "warmup": 0, "workers": 0, "seed": 0})
    if cfg.warmup > 1:
        raise ValueError(f"--warmup {cfg.warmup} is more than all the steps, 1")
    blank = torch.zeros(1, 3, cfg.data_size, cfg.data_size)
    distort(blank, cfg.noise, cfg.blur, cfg.mask)  # raises for severities out of range, before any work
    distill_loss(Features(blank, blank), Features(blank, blank), cfg.loss_weights)
    cfg.device = find_device(cfg.device)
    if cfg.dtype == "auto":
        fast = cfg.device == "cuda" and torch.cuda.get_device_capability()[0] >= 8
        cfg.dtype = "bfloat16" if fast else "float32"
    suffix = "" if cfg.method == "distill" else f"-{cfg.method}"
    name = f"{Path(cfg.data).resolve().name}-{describe(vars(cfg)).replace('=', '')}{suffix}"
    cfg.out = cfg.out or os.path.join("runs", name)
    return cfg

def find_checkpoint(cfg):
    """The checkpoint to go on from, or None to start. Raises ValueError if the run folder does not
    fit the request."""
    config, last = Path(cfg.out) / "config.json", Path(cfg.out) / "last.pt"
    if not cfg.resume:
        if last.exists():
            raise ValueError(f"{cfg.out} holds a run: continue it with --resume, or choose another --out")
        return None
    if not config.exists():
        raise ValueError(f"nothing to resume in {cfg.out}: there is no config.json")
    before = json.loads(config.read_text())
    for name, value in vars(cfg).items():
        if name not in ("device", "workers", "compile", "out", "root", "resume") and before.get(name) != value:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but was {before.get(name)} in "
                             f"{cfg.out}: resume with the options of the run")
    checkpoint = read_file(last) if last.exists() else None
    if last.exists() and (not isinstance(checkpoint, dict) or "optimizer" not in checkpoint):
        raise ValueError(f"{last} is damaged: delete it to start over")
    return checkpoint

def main():
    cfg = parse_args()
    checkpoint = find_checkpoint(cfg)
    student_stage = checkpoint is not None and checkpoint["stage"] == "student"
    if student_stage and checkpoint["step"] == checkpoint["total"]:
        return print(f"{cfg.out} is finished; evaluate it with: python eval.py {cfg.out}")
    if cfg.batch_size % WORLD:
        raise ValueError(f"--batch-size {cfg.batch_size} is not a multiple of the {WORLD} processes")
    if cfg.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD > 1:
        dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo")
    if LOCAL_RANK:
        dist.barrier()  # the machine's first process downloads and decodes alone
    images, labels, test_images, test_labels = load_data(
        cfg.data, cfg.root, cfg.data_size, cfg.max_images, cfg.seed, cfg.workers,
        labelled=cfg.method == "supervised" or cfg.weights == "scratch")
    if len(labels) < cfg.batch_size:
        raise ValueError(f"--batch-size {cfg.batch_size} is more than the {len(labels)} training images")
    torch.manual_seed(cfg.seed)
    if student_stage:
        teacher = load_vit(f"{cfg.out}/teacher.pth", cfg.img_size)
    elif cfg.weights == "scratch":
        teacher = ViT(cfg.img_size, patch_size=8, embed_dim=128, depth=4, num_heads=2)
    else:
        teacher = load_vit(cfg.weights, cfg.img_size)
    if WORLD > 1 and not LOCAL_RANK:
        dist.barrier()
    if cfg.attn_blocks > len(teacher.blocks):
        raise ValueError(f"--attn-blocks {cfg.attn_blocks} is more than the ViT's {len(teacher.blocks)} blocks")
    if cfg.compile == "auto":  # from the work of four forward passes, so the same at each resume
        steps = min(cfg.epochs * (len(labels) // cfg.batch_size), cfg.max_steps or sys.maxsize)
        work = 8 * sum(p.numel() for p in teacher.blocks.parameters()) * teacher.pos_embed.shape[1]
        cfg.compile = "on" if steps * cfg.batch_size * work > {"cuda": 2e16}.get(cfg.device, math.inf) else "off"
    if RANK == 0:
        os.makedirs(cfg.out, exist_ok=True)
        write(f"{cfg.out}/config.json", json.dumps(vars(cfg), indent=1))
        print(" ".join(f"{name}={value}" for name, value in vars(cfg).items()))
    teacher.to(cfg.device)
    classes = int(labels.max()) + 1
    if cfg.weights == "scratch" and not student_stage:
        clean = argparse.Namespace(**{**vars(cfg), "method": "supervised", **dict.fromkeys(KINDS, 0.0),
                                      "epochs": cfg.pretrain_epochs, "max_steps": None, "lr": 2e-3})
        objective = Objective(teacher, None, clean, classes).to(cfg.device)
        train("teacher", objective, images, labels, clean, checkpoint)
    teacher.requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_(True)
    if RANK == 0:
        write(f"{cfg.out}/teacher.pth", cpu_state(teacher))
    test_images = test_images[subset(test_labels, 500, 0)]
    (target,) = embed([teacher], test_images, cfg)

    def cosine(vit):
        distortion = lambda x, g: distort(x, cfg.noise, cfg.blur, cfg.mask, g)
        (found,) = embed([vit], test_images, cfg, distortion, seed_from(cfg.seed, "held out"))
        return F.cosine_similarity(found, target).mean().item()
    cos_teacher = cosine(teacher)
    train("student", Objective(student, teacher, cfg, classes).to(cfg.device), images, labels, cfg,
          checkpoint, lambda: {"cos_teacher": cos_teacher, "cos_student": cosine(student)})

if __name__ == "__main__":
    run(main)
