# SPDX-License-Identifier: MIT
"""Asymmetric multi-level distillation, after arXiv 2604.22529: a frozen Vision Transformer, the
teacher, sees clean images; a student that starts from the same weights sees distorted copies and
learns, without labels, to match the teacher's global embedding, patch features and attention maps.

    python distill.py                               draws images, trains its own teacher first
    python eval.py runs/stripes-mixture             what distortions cost teacher and student
    python distill.py --data cifar10 --noise 0.1    downloads CIFAR-10 and DINOv2's ViT-S/14

Shapes in comments: B images, N patches, T = 1 + registers + N tokens, D the width of a token.
"""
import argparse
import copy
import json
import math
import os
import re
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps  # which torchvision brings
from torch import distributed, nn, optim
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset
from torchvision import datasets, transforms
from tqdm import tqdm

# ---- The Vision Transformer: all parameters are named as in DINO and DINOv2 ----------------------
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]

class Features(NamedTuple):
    """What a ViT gives: embeddings after the final norm, and attention probabilities."""
    cls: torch.Tensor  # [B, D], the global embedding
    patches: torch.Tensor  # [B, N, D], row by row
    attn: tuple = ()  # [B, heads, T, T] in float32, one for each of the last attn_blocks blocks

class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, need_map):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # [B, T, 3, heads, D / heads]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each [B, heads, T, D / heads]
        # The fused kernel gives no map, and in bfloat16 it is slow on CPUs.
        if need_map or (q.dtype == torch.bfloat16 and q.is_cpu):
            logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5  # [B, heads, T, T]
            attn = logits.float().softmax(-1)
            y = attn.to(v.dtype) @ v
        else:
            attn = None
            y = F.scaled_dot_product_attention(q, k, v)
        y = y.transpose(1, 2).flatten(2)  # [B, T, D]
        return self.proj(y), attn

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
    2309.16588), patches. Image and patch size in pixels. ValueError if a size does not divide."""
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio=4.0,
                 num_registers=0, layer_scale=False, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        if img_size % patch_size or num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"not whole: {img_size} / {patch_size} or {embed_dim} / {num_heads}")
        self.img_size = img_size
        self.num_registers = num_registers
        proj = nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))  # named as in DINO
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        num_positions = 1 + (img_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.randn(1, num_positions, embed_dim) / 50)
        if num_registers:
            self.register_tokens = nn.Parameter(torch.randn(1, num_registers, embed_dim) / 50)
        block_args = (embed_dim, num_heads, round(embed_dim * mlp_ratio), layer_scale)
        self.blocks = nn.ModuleList(Block(*block_args) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mean = nn.Buffer(torch.tensor(mean), persistent=False)  # in no checkpoint
        self.std = nn.Buffer(torch.tensor(std), persistent=False)

    def prepare(self, images):
        """Makes forward's input of images [B, 3, h, w] in [0, 1]: resized to img_size pixels a side
        by Pillow's bicubic kernel and normalized, in float32. Raises ValueError for integers."""
        if not images.is_floating_point():
            raise ValueError(f"images are {images.dtype}, not floats in [0, 1]")
        images = images.float()
        if images.shape[2:] != (self.img_size, self.img_size):
            images = F.interpolate(images, self.img_size, mode="bicubic", antialias=True)
        return (images - self.mean.view(3, 1, 1)) / self.std.view(3, 1, 1)

    def forward(self, images, attn_blocks=0):
        """Features of prepared images [B, 3, img_size, img_size], with the attention maps of the
        last attn_blocks blocks. Raises ValueError for images of another size."""
        if images.shape[2:] != (self.img_size, self.img_size):
            raise ValueError(f"images are {list(images.shape)}, not {self.img_size} pixels a side")
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]  # [B, N, D]
        prefix = self.cls_token + self.pos_embed[:, :1]
        if self.num_registers:  # they get no position embedding
            prefix = torch.cat([prefix, self.register_tokens], 1)
        x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], dim=1)  # [B, T, D]
        first_map = len(self.blocks) - attn_blocks
        maps = []
        for i, block in enumerate(self.blocks):
            x, attn = block(x, need_map=i >= first_map)
            if i >= first_map:
                maps.append(attn)
        x = self.norm(x)
        return Features(x[:, 0], x[:, 1 + self.num_registers:], tuple(maps))

# ---- Distortions ---------------------------------------------------------------------------------
# Each takes images, a severity for each image [B, 1, 1, 1], the highest possible severity (it
# sizes blur's kernel) and a generator. A function's docstring is its option's --help.
def blur(images, severity, highest, generator):
    """sigma of a Gaussian in pixels, edges reflected"""
    B, _, H, W = images.shape
    if 3 * highest > min(H, W) - 1:  # reflection cannot pad further
        raise ValueError(f"blur {highest:g} is too wide for {H} x {W} pixels")
    radius = math.ceil(3 * highest)
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    taps = torch.exp(-0.5 * (offsets / severity.clamp(min=1e-3)) ** 2)  # [B, 1, 1, 2 * radius + 1]
    taps = taps / taps.sum(dim=-1, keepdim=True)
    # With the images as channels, a convolution in B groups blurs each one by its own sigma.
    planes = F.pad(images, [radius] * 4, mode="reflect").transpose(0, 1)  # [3, B, ...]
    planes = F.conv2d(planes, taps, groups=B)  # along rows
    planes = F.conv2d(planes, taps.mT, groups=B)  # along columns
    return planes.transpose(0, 1)

def noise(images, severity, highest, generator):
    """standard deviation of Gaussian noise, of pixels in [0, 1]"""
    return images + severity * torch.randn(images.shape, generator=generator, device=images.device)

def salt(images, severity, highest, generator):
    """share of pixels set to black or white, half each"""
    chance = torch.rand(images[:, :1].shape, generator=generator, device=images.device)
    images = torch.where(chance < severity / 2, 0.0, images)  # black
    return torch.where(chance >= 1 - severity / 2, 1.0, images)  # white

def mask(images, severity, highest, generator):
    """share of pixels set to black"""
    chance = torch.rand(images[:, :1].shape, generator=generator, device=images.device)
    return images * (chance >= severity)

DISTORTIONS = {  # option: (function, limit of its severity), in the order of their use
    "blur": (blur, math.inf), "noise": (noise, 1), "salt": (salt, 1), "mask": (mask, 1)}

def distort(images, generator=None, one_of=False, clean=0.0, **severities):
    """Distorted copies of images [B, 3, H, W] in [0, 1], of the same shape and range, in float32.
    severities: by name, a number or a range (low, high) to draw from for each image. All apply, or
    with one_of a random one to each image; an image stays as it is with probability clean.
    generator: on the images' device. ValueError for other shapes, types, names and severities."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images are {images.dtype} {list(images.shape)}, not floats [B, 3, H, W]")
    if not 0 <= clean <= 1 or severities.keys() - DISTORTIONS.keys():
        raise ValueError(f"{clean=} is outside [0, 1], or a name is unknown: {list(severities)}")
    distorted = images = images.float()
    per_image = {"size": (len(images), 1, 1, 1), "generator": generator, "device": images.device}
    kinds = [name for name in DISTORTIONS if name in severities]
    chosen = torch.randint(len(kinds) or 1, **per_image)  # an image's kind, if one_of
    for i, name in enumerate(kinds):
        function, limit = DISTORTIONS[name]
        given = severities[name]
        low, high = given if np.ndim(given) else (given, given)
        if not 0 <= low <= high <= limit:
            raise ValueError(f"{name} from {low} to {high} is not within 0 to {limit}")
        severity = low + (high - low) * torch.rand(**per_image)
        with torch.autocast(images.device.type, enabled=False):  # keeps blur's in float32
            changed = function(distorted, severity, high, generator)
        if one_of:  # each kind changes only images that drew it
            changed = torch.where(chosen == i, changed, distorted)
        distorted = changed
    return torch.where(torch.rand(**per_image) < clean, images, distorted).clamp(0, 1)

# ---- The method ----------------------------------------------------------------------------------
# Only the paper's abstract and introduction could be read: which layers, KL direction and weights
# it uses is not known, and what follows is this repository's choice.
def cosine_distance(student, teacher, dims):
    """1 - mean cosine of vectors [..., D], both centred by the teacher's mean over dims."""
    mean = teacher.float().mean(dims, keepdim=True)  # the student's own would hide a shift
    cosines = F.cosine_similarity(student - mean, teacher - mean, dim=-1)
    return 1 - cosines.mean()

def distill_loss(student, teacher):
    """The terms between two Features of one batch (two images or more), in float32. "global" and
    "patch": cosine_distance of cls and patches, 0 if equal, about 1 if student is the same for all
    images. "attn": mean over queries of KL(teacher map || student map) in nats, 0 without maps."""
    attn = torch.zeros((), device=teacher.cls.device)
    for student_map, teacher_map in zip(student.attn, teacher.attn, strict=True):
        log_student = student_map.float().clamp(1e-30).log()  # 0 has no finite logarithm
        kl = F.kl_div(log_student, teacher_map.float(), reduction="none")  # [B, heads, T, T]
        attn = attn + kl.sum(-1).mean() / len(student.attn)
    return {"global": cosine_distance(student.cls, teacher.cls, 0),  # centred over images
            "patch": cosine_distance(student.patches, teacher.patches, (0, 1)),  # and places
            "attn": attn}

class Distillation(nn.Module):
    """The method, as one module for torch.compile and DistributedDataParallel. Freezes teacher (any
    module that returns Features); student is a trainable copy of it. weights: of the global,
    patch and attn term. attn_blocks: how many of the last blocks' attention maps are compared."""
    def __init__(self, teacher, weights=(1.0, 1.0, 1.0), attn_blocks=1):
        super().__init__()
        self.student = copy.deepcopy(teacher).requires_grad_().train()
        self.teacher = teacher.requires_grad_(False).eval()
        self.weights = weights
        self.attn_blocks = attn_blocks

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()  # always
        return self

    def forward(self, clean, distorted):
        """Two batches of prepared images: the loss, and its terms by name."""
        with torch.no_grad():
            target = self.teacher(clean, self.attn_blocks)
        terms = distill_loss(self.student(distorted, self.attn_blocks), target)
        loss = sum(w * term for w, term in zip(self.weights, terms.values(), strict=True))
        return loss, terms

# ---- Weights, images, and the stripes with their teacher -----------------------------------------
WEIGHTS = {  # all under Apache 2.0
    "dinov2_vits14": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "dinov2_vitb14": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "dinov2_vits14_reg": "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"}

def resize_pos_embed(pos_embed, side, registers):
    """Position embeddings [1, 1 + n * n, D] for side * side patches, as in DINO and DINOv2."""
    n = math.isqrt(pos_embed.shape[1] - 1)
    if n == side:
        return pos_embed
    grid = pos_embed[:, 1:].float().transpose(1, 2).unflatten(2, (n, n))  # [1, D, n, n]
    if registers:  # as DINOv2 does for its models with registers
        grid = F.interpolate(grid, side, mode="bicubic", antialias=True)
    else:  # DINO and DINOv2 add 0.1 so that rounding loses no patch (dino issue 8)
        grid = F.interpolate(grid, scale_factor=(side + 0.1) / n, mode="bicubic")
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

def find_vit(checkpoint, source):
    """The tensors of a checkpoint's ViT, or of its EMA teacher, under DINO's names, without prefix,
    heads and mask tokens. Raises ValueError, naming source, unless exactly one ViT is left."""
    for key in ("teacher", "model", "state_dict"):
        checkpoint = checkpoint.get(key, checkpoint)  # go in, if it has the key
    tail = "patch_embed.proj.weight"
    prefixes = [name.removesuffix(tail) for name in checkpoint if tail in name]
    prefixes = [prefix for prefix in prefixes if "teacher" in prefix] or prefixes  # all, if none
    if len(prefixes) != 1:
        raise ValueError(f"{source}: needs one ViT with DINO's names, has them at {prefixes}")
    state = {}
    dropped = ("head", "mask", "decoder")
    for name, tensor in checkpoint.items():
        short = name.removeprefix(prefixes[0])
        if name.startswith(prefixes[0]) and not short.startswith(dropped):
            # DINOv2's training code has blocks.<group>.<number>; the number is the block's.
            state[re.sub(r"^blocks\.\d+\.(\d+)", r"blocks.\1", short)] = tensor
    return state

def load_vit(weights, img_size, num_heads=None, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    """The ViT of a name in WEIGHTS or of a checkpoint's path, for images of img_size pixels a side.
    num_heads: by default width / 64, or 16 if wider than 1024. Raises ValueError for a file without
    DINO's names, KeyError or RuntimeError for a ViT built otherwise. Runs no code in a file."""
    load = torch.hub.load_state_dict_from_url if weights in WEIGHTS else torch.load
    with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's files hold one
        checkpoint = load(WEIGHTS.get(weights, weights), map_location="cpu", weights_only=True)
    state = find_vit(checkpoint, weights)
    embed_dim, _, _, patch_size = state["patch_embed.proj.weight"].shape
    depth = sum(name.endswith(".norm1.weight") for name in state)  # one a block
    mlp_ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    if num_heads is None:  # the shapes do not tell
        if embed_dim % 64:
            raise ValueError(f"{weights}: {embed_dim} wide, so num_heads has to be given")
        num_heads = 16 if embed_dim > 1024 else embed_dim // 64
    vit = ViT(img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, registers,
              layer_scale="blocks.0.ls1.gamma" in state, mean=mean, std=std)
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], img_size // patch_size, registers)
    vit.load_state_dict(state)
    return vit

def read_image(path):
    """An image file as an upright RGB PIL.Image. Raises OSError, with the path, for one that Pillow
    cannot read or that is grey with more than 8 bits."""
    try:
        image = Image.open(path)
        if image.mode.startswith(("I", "F")):  # Pillow's modes of 16 and 32 bits
            raise ValueError("it has more than 8 bits a channel")
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # Pillow raises many kinds
        raise OSError(f"cannot read the image {path}: {error}") from error

def load_data(args, split):
    """The images of args.data, split "train" or "test" (a folder's val), as a dataset of (uint8
    [3, data_size, data_size], label), shuffled once with a fixed seed; at most max_images."""
    size, train = args.data_size, split == "train"
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)  # the shorter side
    transform = transforms.Compose([resize, transforms.CenterCrop(size), transforms.PILToTensor()])
    if args.data == "stripes":
        dataset = draw_stripes(8000 if train else 1000, size, seed=int(train))
    elif args.data == "cifar10":
        dataset = datasets.CIFAR10("data", train, transform, download=True)
    else:
        if os.path.isdir(f"{args.data}/val") and not train:
            split = "val"
        dataset = datasets.ImageFolder(f"{args.data}/{split}", transform, loader=read_image)
        if dataset.classes != datasets.folder.find_classes(f"{args.data}/train")[0]:
            raise ValueError(f"{args.data} has other classes in {split} than in train")
    order = np.random.default_rng(0).permutation(len(dataset))
    return Subset(dataset, order[:args.max_images])

def draw_stripes(n, size, seed):
    """A dataset of n drawings of a striped disc; the label tells which of ten directions it has."""
    uniform = np.random.default_rng(seed).uniform
    y, x = np.mgrid[:size, :size] / size  # lengths are in sides of the image
    images = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        angle = np.pi / 10 * (i % 10 + uniform(0, 0.8))
        across = x * np.cos(angle) + y * np.sin(angle)
        periods = across / uniform(0.12, 0.22) + uniform()  # random wavelength and phase
        wave = np.sin(2 * np.pi * periods)[..., None]  # [size, size, 1]
        dark, light = uniform(0, 0.45, 3), uniform(0.55, 1, 3)
        stripes = dark + (light - dark) * (1 + wave) / 2
        disc = np.hypot(x - uniform(0.3, 0.7), y - uniform(0.3, 0.7)) < uniform(0.28, 0.48)
        ground = uniform(0.2, 0.8, 3)
        images[i] = 255 * np.where(disc[..., None], stripes, ground)
    return TensorDataset(torch.tensor(images).permute(0, 3, 1, 2), torch.arange(n) % 10)

def learning_rate(step, total_steps, peak):
    """peak times the lower of a linear warm-up over 3% of the steps and half a cosine to zero."""
    warmup = math.ceil(0.03 * total_steps)
    return peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / total_steps))

def train_teacher(dataset, img_size, num_heads, mean, std, seed, device):
    """A small ViT, trained for one epoch on the labels of the stripes."""
    torch.manual_seed(seed)
    vit = ViT(img_size, 4, embed_dim=64, depth=4, num_heads=num_heads, mean=mean, std=std)
    vit, head = nn.ModuleList([vit, nn.Linear(64, 10)]).to(device)  # moves both
    optimizer = optim.AdamW([*vit.parameters(), *head.parameters()], weight_decay=0.05)
    bar = tqdm(DataLoader(dataset, 16, shuffle=True), "teacher", disable=None)
    for step, (images, labels) in enumerate(bar):
        images = vit.prepare(images.to(device) / 255)
        logits = head(vit(images).cls)
        loss = F.cross_entropy(logits, labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        # A higher rate would make its attention sharper, which is harder to distil.
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(bar), 5e-4)
        optimizer.step()
    return vit

# ---- The run -------------------------------------------------------------------------------------
MIXTURE = {"blur": [0, 1.5], "noise": [0, 0.4], "mask": [0, 0.6]}  # blur: for images of 32 pixels
PRETRAINED = {"weights": "dinov2_vits14", "img_size": 224, "batch_size": 64, "lr": 3e-5}
STRIPES = {"img_size": 32, "num_heads": 1, "batch_size": 16, "lr": 3e-3}  # without --weights

def get_args():
    """The options, and the parser for its error()."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", epilog="Without a distortion: "
        "--blur 0 1.5 (for 32 pixels) --noise 0 0.4 --mask 0 0.6 --one-of --clean 0.2")
    add = parser.add_argument
    add("--data", default="stripes", help="stripes, cifar10 or a folder [stripes]")
    add("--max-images", type=int, help="a random part of each split [all]")
    add("--data-size", type=int, help="side in pixels when distorted [224; stripes, cifar10 32]")
    for name, (function, _) in DISTORTIONS.items():
        add(f"--{name}", type=float, nargs="+", help=f"{function.__doc__}; or a range")
    add("--one-of", action="store_true", help="each image gets one of the distortions, not all")
    add("--clean", type=float, help="share of images that stay clean [0]")
    add("--weights", help=f"{', '.join(WEIGHTS)} or a file [dinov2_vits14; stripes train one]")
    add("--img-size", type=int, help="side of what the ViT gets [224; own teacher 32]")
    add("--num-heads", type=int, help="of the weights [width / 64, or 16 if wider than 1024]")
    add("--mean", type=float, nargs=3, default=IMAGENET_MEAN)
    add("--std", type=float, nargs=3, default=IMAGENET_STD)
    add("--loss-weights", type=float, nargs=3, default=[1, 1, 1], help="global patch attn [1 1 1]")
    add("--epochs", type=int, default=4, help="of the student [4]")
    add("--batch-size", type=int, help="of all processes together [64; own teacher 16]")
    add("--lr", type=float, help="the student's highest [3e-5; own teacher 3e-3]")
    add("--seed", type=int, default=0, help="of weights, order and distortions [0]")
    add("--out", help="run folder, where the same command resumes [runs/<data>-<distortions>]")
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    add("--device", default=device)
    add("--dtype", choices=["float32", "bfloat16"], help="[bfloat16 on cuda, else float32]")
    add("--compile", action=argparse.BooleanOptionalAction, default=device == "cuda")
    add("--workers", type=int, default=min(8, os.cpu_count()), help="that read images [up to 8]")
    args = parser.parse_args()

    defaults = STRIPES if args.data == "stripes" and args.weights is None else PRETRAINED
    for name, value in defaults.items():
        if vars(args)[name] is None:
            setattr(args, name, value)
    if args.data_size is None:
        args.data_size = 32 if args.data in ("stripes", "cifar10") else 224
    args.severities = {}
    for name, (_, limit) in DISTORTIONS.items():
        ends = vars(args).pop(name)  # a number or two
        if ends is not None:
            if len(ends) > 2 or not 0 <= ends[0] <= ends[-1] <= limit:
                parser.error(f"--{name} takes a number, or two in order, from 0 to {limit}")
            args.severities[name] = [ends[0], ends[-1]]
    kinds = "+".join(args.severities) or "mixture"
    args.out = args.out or f"runs/{Path(args.data).resolve().name}-{kinds}"
    if not args.severities:
        args.severities = MIXTURE | {"blur": [0, MIXTURE["blur"][1] * args.data_size / 32]}
        args.one_of = True
        args.clean = 0.2 if args.clean is None else args.clean
    args.clean = args.clean or 0.0
    return args, parser

def save(content, path):  # a kill leaves path whole or as it was
    torch.save(content, f"{path}.part")
    os.replace(f"{path}.part", path)

def print_row(name, row):
    cells = [f"{key} {row[key]:.3f}" for key in row]
    print(f"{name:9}", *cells, sep="  ", flush=True)

def main():
    args, parser = get_args()
    out, device = Path(args.out), args.device
    cuda = device == "cuda"
    rank = int(os.environ.get("RANK", 0))  # this process's number, if torchrun started several
    world = int(os.environ.get("WORLD_SIZE", 1))
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        distributed.init_process_group("nccl" if cuda else "gloo")

    # A run resumes if its folder's config.json has the same options, except for these.
    ignored = ("out", "device", "compile", "workers")
    config = {name: value for name, value in vars(args).items() if name not in ignored}
    if out.is_dir() and os.listdir(out):
        old = json.loads((out / "config.json").read_text())
        other = [name for name in config if config[name] != old.get(name)]
        if other:
            parser.error(f"{out} holds a run with other {', '.join(other)}: take another --out")

    train_set = load_data(args, "train")
    if args.batch_size not in range(2 * world, len(train_set) + 1, world):  # global needs two each
        parser.error(f"--batch-size takes multiples of {world} from {2 * world} to the number of "
                     f"images, {len(train_set)}")
    sampler = DistributedSampler(train_set, world, rank, seed=1000 * args.seed, drop_last=True)
    workers = 0 if args.data == "stripes" else args.workers  # stripes are in memory already
    loader = DataLoader(train_set, args.batch_size // world, sampler=sampler, drop_last=True,
                        num_workers=workers, persistent_workers=workers > 0, pin_memory=cuda)

    vit_options = (args.img_size, args.num_heads, args.mean, args.std)
    saved = out / "teacher.pth"
    weights = saved if saved.exists() else args.weights  # the run's own, if it resumes
    if weights:
        teacher = load_vit(weights, *vit_options)
    else:
        teacher = train_teacher(train_set, *vit_options, args.seed, device)
    module = Distillation(teacher, args.loss_weights).to(device)
    student = module.student
    optimizer = optim.AdamW(student.parameters(), weight_decay=0.05, fused=True)
    log = []  # a row an epoch
    if (out / "last.pt").exists():
        last = torch.load(out / "last.pt", map_location="cpu", weights_only=True)
        student.load_state_dict(last["student"])
        optimizer.load_state_dict(last["optimizer"])
        log = last["log"]

    bfloat16 = args.dtype == "bfloat16"
    if args.dtype is None and cuda:
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    model = torch.compile(module) if args.compile else module
    if world > 1:  # also sends the first process's weights, even the frozen ones, to all
        model = nn.parallel.DistributedDataParallel(model)

    if rank == 0:  # no race: DDP's constructor waited until all had looked into out
        out.mkdir(parents=True, exist_ok=True)  # stays empty until config.json is whole
        Path(f"{out}.part").write_text(json.dumps(config, indent=1))
        os.replace(f"{out}.part", out / "config.json")
        save(teacher.state_dict(), saved)
        print(f"{out}: {len(train_set):,} images of {args.data}; ViT of {len(teacher.blocks)} "
              f"blocks; {device}, {'bfloat16' if bfloat16 else 'float32'}")

    generator = torch.Generator(device)
    for epoch in range(len(log), args.epochs):
        sampler.set_epoch(epoch)  # the order follows from its seed + epoch
        totals = {}
        bar = tqdm(loader, f"epoch {epoch + 1}", unit=" images", unit_scale=args.batch_size,
                   leave=False, disable=rank > 0 or None)
        for step, (images, _) in enumerate(bar, epoch * len(bar)):
            images = images.to(device, non_blocking=cuda) / 255
            # Each step and process draws its own, also after an interruption.
            generator.manual_seed((1_000_000 * args.seed + step) * world + rank)
            distorted = distort(images, generator, args.one_of, args.clean, **args.severities)
            with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
                loss, terms = model(teacher.prepare(images), teacher.prepare(distorted))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 1.0, error_if_nonfinite=True)
            rate = learning_rate(step, args.epochs * len(bar), args.lr)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            for name, value in {"loss": loss, **terms}.items():
                totals[name] = totals.get(name, 0) + value.detach()
            if step == 0 and rank == 0:  # the student was still the teacher
                print_row("start", totals)

        if rank == 0:
            row = {name: (total / len(bar)).item() for name, total in totals.items()}  # of rank 0
            print_row(f"epoch {epoch + 1}/{args.epochs}", row)
            log.append({"epoch": epoch + 1, **row})
            state = {name: tensor.cpu() for name, tensor in student.state_dict().items()}
            save(state, out / "student.pth")
            (out / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
            last = {"student": state, "optimizer": optimizer.state_dict(), "log": log}
            save(last, out / "last.pt")  # saved last: if killed earlier, the epoch is repeated
    if world > 1:
        distributed.destroy_process_group()

if __name__ == "__main__":
    main()
