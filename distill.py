# SPDX-License-Identifier: MIT
"""Asymmetric multi-level distillation (arXiv 2604.22529): Vision Transformers learn to see through
noise, blur and missing pixels. A frozen teacher sees clean images; a student that starts from its
weights sees distorted copies and learns to give the teacher's global embedding, patch features and
attention maps. Shapes: B images, N patches, T = 1 + registers + N tokens, D the width."""
import argparse, copy, datetime, functools, glob, hashlib, json, math, os, pathlib, sys, time
import numpy as np, torch, torch.distributed as dist, torch.nn as nn, torch.nn.functional as F
from tqdm import tqdm

# ---- The Vision Transformer: parameters are named as in DINO, DINOv2 and timm --------------------
class Features:
    """What a ViT gives: `cls` [B, D] and `patches` [B, N, D] after the final norm, and `attn`, a
    tuple of the last blocks' attention probabilities, each [B, heads, T, T] in float32."""
    def __init__(self, cls, patches, attn=()):
        self.cls, self.patches, self.attn = cls, patches, attn

class Block(nn.Module):  # the ModuleDicts and ParameterDicts are for the parameters' names alone
    def __init__(self, dim, num_heads, hidden, layer_scale):
        super().__init__()
        self.num_heads, self.layer_scale = num_heads, layer_scale
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})
        for name in ("ls1", "ls2") if layer_scale else ():
            self.add_module(name, nn.ParameterDict({"gamma": torch.full((dim,), 1e-5)}))
    def forward(self, x, need_map):
        B, T, D = x.shape
        qkv = self.attn.qkv(self.norm1(x)).view(B, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, T, D / heads]
        # The fused kernel builds no map, but takes 2 to 5 times as long for bfloat16 on a CPU.
        if need_map or (q.dtype == torch.bfloat16 and q.device.type == "cpu"):
            attn = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # [B, heads, T, T]
            attn = (attn.float() if need_map else attn).softmax(-1)
            y = attn.to(v.dtype) @ v
        else:
            y, attn = F.scaled_dot_product_attention(q, k, v), None
        y = self.attn.proj(y.transpose(1, 2).reshape(B, T, D))
        x = x + (y * self.ls1.gamma if self.layer_scale else y)
        y = self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x))))
        return x + (y * self.ls2.gamma if self.layer_scale else y), attn

class ViT(nn.Module):
    """A pre-norm Vision Transformer (arXiv 2010.11929) that also gives its attention; img_size and
    patch_size in pixels a side, registers (arXiv 2309.16588) and layer scale (arXiv 2103.17239) as
    in DINOv2. Tokens: cls, registers (which have no position embedding), patches row by row. Raises
    ValueError if patch_size does not divide img_size, or num_heads embed_dim."""
    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio=4.0,
                 num_registers=0, layer_scale=False):
        super().__init__()
        if min(patch_size, num_heads) < 1 or img_size % patch_size or embed_dim % num_heads:
            raise ValueError(f"no multiple: {img_size=}, {patch_size=}; {embed_dim=}, {num_heads=}")
        self.img_size, self.num_registers = img_size, num_registers
        num_patches = (img_size // patch_size) ** 2
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + num_patches, embed_dim))
        if num_registers:
            self.register_tokens = nn.Parameter(0.02 * torch.randn(1, num_registers, embed_dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, embed_dim, patch_size, patch_size)})
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, round(embed_dim * mlp_ratio),
                                          layer_scale) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
    def forward(self, images, attn_blocks=0):
        """Features of normalized images [B, 3, img_size, img_size], with the maps of the last
        attn_blocks blocks. Raises ValueError for another shape or more blocks than there are."""
        if images.shape[1:] != (3, self.img_size, self.img_size):
            raise ValueError(f"images {list(images.shape)} are not [B, 3], {self.img_size} square")
        if not 0 <= attn_blocks <= len(self.blocks):
            raise ValueError(f"{attn_blocks} attention blocks of a ViT that has {len(self.blocks)}")
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2)  # [B, N, D]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        if self.num_registers:
            x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], dim=1)
        maps = []
        for i, block in enumerate(self.blocks, start=attn_blocks - len(self.blocks)):
            x, attn = block(x, need_map=i >= 0)  # i >= 0: one of the last attn_blocks
            maps += [attn] if i >= 0 else []
        x = self.norm(x)
        return Features(x[:, 0], x[:, 1 + self.num_registers:], tuple(maps))

# ---- Pretrained weights --------------------------------------------------------------------------
META = "https://dl.fbaipublicfiles.com/"
WEIGHTS = {  # name: the publisher's file
    **{f"dinov2_{s}14{r}": f"{META}dinov2/dinov2_{s}14/dinov2_{s}14{r and '_reg4'}_pretrain.pth"
       for s in ("vits", "vitb", "vitl") for r in ("", "_reg")},
    **{f"dino_{name}": f"{META}dino/dino_{file}_pretrain/dino_{file}_pretrain.pth" for name, file in
       (("vits16", "deitsmall16"), ("vits8", "deitsmall8"), ("vitb16", "vitbase16"))},
    "deit_tiny": META + "deit/deit_tiny_patch16_224-a1311bcf.pth",
    "deit_small": META + "deit/deit_small_patch16_224-cd65a155.pth"}

def check(good, message):
    if not good:
        raise ValueError(message)

def read_file(path, load=torch.load):
    """What torch.save wrote: tensors and plain containers only, so that no file can run code."""
    try:
        return load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever the zip and pickle readers meet
        check(isinstance(e, OSError), f"{path} is damaged or not tensors only: {type(e).__name__}")
        raise

def load_vit(weights, img_size):
    """The ViT of a state dict in DINO naming, for images of img_size pixels a side. weights is a
    path or a name in WEIGHTS (downloaded once, by torch.hub). Its architecture is read off it, with
    heads 64 wide; position embeddings are resized bicubically, as in DINO. Raises ValueError for
    unknown weights, no network, another architecture, an img_size the patches do not divide."""
    path, named = WEIGHTS.get(weights, weights), weights in WEIGHTS
    check(named or os.path.isfile(path),
          f"unknown weights {path}: neither a file nor one of scratch, {', '.join(WEIGHTS)}")
    try:
        state = read_file(path, torch.hub.load_state_dict_from_url if named else torch.load)
        state = {k: v.float() for k, v in state.get("model", state).items()
                 if not k.startswith(("mask_token", "head"))}
        dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
        pos, registers = state["pos_embed"], state.get("register_tokens", torch.empty(1, 0, dim))
        grid, side = math.isqrt(pos.shape[1] - 1), img_size // patch_size
        vit = ViT(img_size, patch_size, dim, num_heads=max(1, dim // 64),
                  depth=len({k.split(".")[1] for k in state if k.startswith("blocks.")}),
                  mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / dim,
                  num_registers=registers.shape[1], layer_scale="blocks.0.ls1.gamma" in state)
        new = pos[:, 1:].reshape(1, grid, grid, dim).permute(0, 3, 1, 2)
        new = F.interpolate(new, size=(side, side), mode="bicubic").flatten(2).transpose(1, 2)
        state["pos_embed"] = torch.cat([pos[:, :1], new], dim=1)
        missing, unexpected = vit.load_state_dict(state, strict=False)
    except OSError as e:
        raise ValueError(f"cannot get {path} ({e}): put it into {torch.hub.get_dir()}/checkpoints "
                         "or use --weights PATH or --weights scratch") from e
    except (KeyError, IndexError, AttributeError, RuntimeError) as e:  # no such key, shape, dict
        raise ValueError(f"{path} is of another architecture: {e!r}") from e
    check(dim % 64 == 0 and not missing + unexpected, f"{path} is of another architecture: width "
          f"{dim}, missing {missing[:1]}, unexpected {unexpected[:1]}")
    return vit

def prepare(images, img_size):
    """The ViT's input: images [B, 3, h, w] in [0, 1] resized bicubically and normalized."""
    if images.shape[-1] != img_size:
        images = F.interpolate(images, size=(img_size, img_size), mode="bicubic",
                               antialias=img_size < images.shape[-1])
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
    return torch.stack([(x - m) / s for x, m, s in zip(images.unbind(1), mean, std)], dim=1)

# ---- The distortion ------------------------------------------------------------------------------
def distort(images, noise=0.0, blur=0.0, mask=0.0, generator=None):
    """Distorted copies of images [B, 3, H, W] in [0, 1], in the order of a camera. blur: sigma in
    pixels of a Gaussian of 2 * ceil(2 * sigma) + 1 taps, edges reflected; noise: standard deviation
    of Gaussian noise; mask: each pixel's probability of turning black; then all is clamped. Each is
    a number, or a pair (low, high) from which every image draws. A generator, if given, is the
    only source of chance. Raises ValueError for severities out of range and other images."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"images are {images.dtype} {list(images.shape)}, not floats [B, 3, H, W]")
    B, _, H, W = images.shape
    def draw(sampler, *shape):
        return sampler(shape, generator=generator, device=(generator or images).device).to(images)
    def severity(name, value, top):  # its upper end, and itself or [B, 1, 1, 1] for a range
        low, *more, high = value if isinstance(value, (tuple, list)) else (value, value)
        if more or not 0 <= low <= high <= top:
            raise ValueError(f"{name}: {value} is not 1 or 2 values from 0 to {top:g}, in order")
        return high, low if low == high else low + (high - low) * draw(torch.rand, B, 1, 1, 1)
    largest, sigma = severity("blur", blur, (min(H, W) - 1) / 2)  # reflection needs radius < side
    if largest > 0:
        radius = int(-(-2 * largest // 1))  # rounded up
        offsets = torch.arange(-radius, radius + 1, device=images.device)
        sigma = (images.new_zeros(B, 1, 1, 1) + sigma).clamp(min=1e-3)  # 0 would give 0 / 0
        taps = torch.exp(-0.5 * (offsets / sigma) ** 2).view(B, -1)  # [B, 2 * radius + 1]
        taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, dim=0)  # a row a channel
        x = F.pad(images, [radius] * 4, mode="reflect").flatten(0, 1)[None]  # [1, 3 * B, ...]
        x = F.conv2d(x, taps[:, None, :, None], groups=3 * B)
        images = F.conv2d(x, taps[:, None, None, :], groups=3 * B).view(B, 3, H, W)
    largest, deviation = severity("noise", noise, 1e6)
    if largest > 0:
        images = images + deviation * draw(torch.randn, B, 3, H, W)
    largest, share = severity("mask", mask, 1)
    if largest > 0:
        images = images * (draw(torch.rand, B, 1, H, W) >= share)
    return images.clamp(0, 1)

# ---- The loss ------------------------------------------------------------------------------------
def distill_loss(student, teacher, weights=(1, 1, 1)):
    """The weighted sum of the paper's three terms (arXiv 2604.22529) between Features of one shape,
    and a dict of the terms: "global" = 1 - cosine of cls; "patch" = 1 - cosine of each patch,
    averaged; "attn" = KL(teacher map || student map) in nats of each query, averaged over queries,
    heads, blocks and batch, 0 without maps. Float32 whatever the autocast. Raises ValueError for
    unequal shapes and for weights other than three finite numbers from 0, one above."""
    if len(weights) != 3 or not all(0 <= w < float("inf") for w in weights) or not any(weights):
        raise ValueError(f"loss weights {weights} are not three finite numbers from 0, one above")
    pairs = [(student.cls, teacher.cls), (student.patches, teacher.patches),
             *zip(student.attn, teacher.attn)]
    if len(student.attn) != len(teacher.attn) or any(s.shape != t.shape for s, t in pairs):
        raise ValueError("the student's and the teacher's features differ in shape")
    with torch.autocast(student.cls.device.type, enabled=False):
        pairs = [(s.float(), t.float()) for s, t in pairs]
        cosines = [F.cosine_similarity(s, t, dim=-1).mean() for s, t in pairs[:2]]
        kl = torch.zeros_like(cosines[0])
        for s, t in pairs[2:]:  # clamped, so that the logarithm of a 0 is finite
            log_ratio = t.clamp(min=1e-8).log() - s.clamp(min=1e-8).log()
            kl = kl + (t * log_ratio).sum(-1).mean() / len(student.attn)
        terms = {"global": 1 - cosines[0], "patch": 1 - cosines[1], "attn": kl}
        return sum(w * term for w, term in zip(weights, terms.values())), terms

class Objective(nn.Module):
    """Distorted images, as target the teacher's Features of clean ones, labels: to loss, terms."""
    def __init__(self, student, cfg, num_classes):
        super().__init__()
        self.student, self.cfg = student, cfg
        self.maps = cfg.attn_blocks if cfg.method == "distill" else 0
        supervised = cfg.method == "supervised"
        self.head = nn.Linear(len(student.norm.weight), num_classes) if supervised else None
    def forward(self, distorted, target, labels):
        cfg, student = self.cfg, self.student(prepare(distorted, self.cfg.img_size), self.maps)
        if cfg.method == "supervised":
            return F.cross_entropy(self.head(student.cls).float(), labels.to(distorted.device)), {}
        if cfg.method == "distill":
            return distill_loss(student, target, cfg.loss_weights)
        # InfoNCE (arXiv 2110.07439): find one's own teacher embedding among all processes' images
        found, targets = F.normalize(student.cls.float()), F.normalize(target.cls.float())
        if WORLD > 1:
            dist.all_gather(shards := [torch.empty_like(targets) for _ in range(WORLD)], targets)
            targets = torch.cat(shards)
        own = torch.arange(len(found), device=found.device) + RANK * len(found)
        return F.cross_entropy(found @ targets.T / 0.1, own), {}

# ---- The data: uint8 images [N, H, W, 3] and labels [N], in memory or memory-mapped --------------
def textures(n, size, seed):
    """n images of a disc of one of ten textures on a shaded ground, and the textures as labels."""
    rng = np.random.default_rng(seed)
    u = lambda low, high, *shape: np.float32(rng.uniform(low, high, (n, *(shape or (1, 1)))))
    stripes = lambda angle: np.sin(k * (x * np.cos(angle) + y * np.sin(angle)) + p)
    labels, axis, radius = rng.permutation(n) % 10, np.float32(range(size)), u(0.28, 0.48) * size
    x, y = (a - 0.8 * radius - u(0, 1) * (size - 1.6 * radius) for a in (axis, axis[:, None]))
    distance, k, p, q = np.hypot(x, y), 6.28 / (u(0.12, 0.22) * size), u(0, 6.28), u(0, 6.28)
    across, down = np.sin(k * x + p), np.sin(k * y + q)
    waves = [*(stripes(u(-0.17, 0.17) + turn * 0.785) for turn in range(4)), 2 * across * down,
             2 * np.maximum(across, down) - 1, np.sin(k * distance + p),
             np.sin(u(4, 8).round() * np.arctan2(y, x) + p),
             np.sin(k * (y + 0.09 * size * np.sin(0.7 * k * x)) + p),
             sum(stripes(u(0, 3.14)) for _ in range(3))]
    wave = np.clip(0.5 + np.choose(labels[:, None, None], waves), 0, 1)[..., None]
    disc, slope = np.clip(radius - distance, 0, 1)[..., None], (u(-0.5, 0.5) * x / size)[..., None]
    dark, light, ground = u(0, 0.45, 1, 1, 3), u(0.55, 1, 1, 1, 3), u(0.2, 0.8, 1, 1, 3) + slope
    images = disc * (dark + (light - dark) * wave) + (1 - disc) * ground
    return (255 * images.clip(0, 1)).astype(np.uint8), labels

def subset(labels, n, seed):
    """Indices, ascending, of n images drawn by the seed, classes as even as can be."""
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # class by class
    turn = np.concatenate([np.arange(c) for c in np.unique(labels, return_counts=True)[1]])  # rank
    return np.sort(order[np.argsort(turn, kind="stable")[:n]])

def read_image(path, size):
    """An image file of any mode as RGB, the shorter side resized to size pixels, centre-cropped."""
    try:
        from torchvision.datasets.folder import default_loader
        from torchvision.transforms.functional import center_crop, resize
        return np.asarray(center_crop(resize(default_loader(path), size), size))
    except Exception as e:  # whatever the decoders raise
        raise ValueError(f"cannot read image {path} ({e}): repair or remove it") from e

def decode(paths, cfg):
    """The images, memory-mapped from a file made once for these paths."""
    key = hashlib.sha256(repr([(path, os.stat(path).st_mtime_ns) for path in paths]).encode())
    path = f"{cfg.root}/decoded-{cfg.data_size}-{key.hexdigest()[:16]}.npy"
    if not os.path.exists(path):
        os.makedirs(cfg.root, exist_ok=True)
        shape = len(paths), cfg.data_size, cfg.data_size, 3
        array = np.lib.format.open_memmap(path + ".part", "w+", np.uint8, shape)
        read = functools.partial(read_image, size=cfg.data_size)
        loader = torch.utils.data.DataLoader(paths, None, num_workers=cfg.workers, collate_fn=read)
        for i, image in enumerate(tqdm(loader, "decoding images", disable=None)):
            array[i] = image
        os.replace(path + ".part", path)
    return np.load(path, mmap_mode="r")

def load_data(cfg, labelled):
    """Training images, labels, test images, labels: uint8 [N, data_size, data_size, 3], int64 [N];
    labelled leaves out STL-10's images without one. Raises ValueError for unusable data."""
    if cfg.data == "textures":
        chunks = [textures(1000, cfg.data_size, seed) for seed in range(9)]
        splits = [[np.concatenate(part) for part in zip(*chunks[1:])], chunks[0]]
    elif cfg.data in ("cifar10", "cifar100", "stl10"):
        from torchvision import datasets
        source, stl = getattr(datasets, cfg.data.upper()), cfg.data == "stl10"
        parts = ("train" if labelled else "train+unlabeled", "test") if stl else (True, False)
        try:
            splits = [source(cfg.root, part, download=True) for part in parts]
        except (OSError, RuntimeError) as e:
            raise ValueError(f"cannot load {cfg.data} ({e}): download {source.url} and put it into "
                             f"{cfg.root}, or use --data textures or --data FOLDER, offline") from e
        splits = [(s.data.transpose(0, 2, 3, 1), s.labels) if stl else (s.data, np.array(s.targets))
                  for s in splits]
    else:
        val = "val" if os.path.isdir(f"{cfg.data}/val") else "test"
        files = [sorted(glob.glob(f"{glob.escape(cfg.data)}/{p}/*/*")) for p in ("train", val)]
        classes = [[path.split(os.sep)[-2] for path in paths] for paths in files]
        check(all(files) and {*classes[1]} <= {*classes[0]}, f"{cfg.data} is not textures, cifar10,"
              " cifar100, stl10 or a folder of train/CLASS/* and val/CLASS/* or test/CLASS/*")
        splits = [(np.array(paths, object), np.searchsorted(sorted({*classes[0]}), names))
                  for paths, names in zip(files, classes)]
    arrays = []
    for images, labels in splits:
        keep = subset(labels, cfg.max_images or len(labels), cfg.seed)
        images = decode(images[keep].tolist(), cfg) if images.ndim == 1 else images[keep]
        check(images.shape[1] == cfg.data_size, f"{cfg.data} needs --data-size {images.shape[1]}")
        arrays += [images, labels[keep].astype(np.int64)]
    return arrays

# ---- Training ------------------------------------------------------------------------------------
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                           (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # set by torchrun

def to_float(images, device):
    """uint8 images [B, H, W, 3] as floats [B, 3, H, W] in [0, 1] on the device."""
    x = torch.from_numpy(images).pin_memory() if device == "cuda" else torch.from_numpy(images)
    return x.to(device, non_blocking=device == "cuda").permute(0, 3, 1, 2).contiguous() / 255

def distortion_of(cfg):
    return functools.partial(distort, noise=cfg.noise, blur=cfg.blur, mask=cfg.mask)

@torch.inference_mode()
def embed(vit, images, cfg, distortion=None, seed=0):
    """Global embeddings, float32 [N, D], of uint8 images, distorted first if so wished."""
    generator, found = torch.Generator(cfg.device).manual_seed(seed), []
    for i in range(0, len(images), cfg.batch_size):
        x = to_float(images[i:i + cfg.batch_size].copy(), cfg.device)  # a memory map is read-only
        x = prepare(distortion(x, generator=generator) if distortion else x, cfg.img_size)
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            found.append(vit(x).cls.clone())  # a view would keep the patches in memory
    return torch.cat(found)

def write(path, content):
    """Write text, or what torch.save takes, whole or not at all: a crash leaves the old file."""
    with open(f"{path}.part", "wb") as f:
        f.write(content.encode()) if isinstance(content, str) else torch.save(content, f)
    os.replace(f"{path}.part", path)

def train(objective, teacher, images, labels, cfg, checkpoint=None, held_out=None):
    """Train over cfg's schedule. If held_out gives figures, write log, student and checkpoint."""
    size, per_epoch = cfg.batch_size, len(labels) // cfg.batch_size
    total = min(cfg.epochs * per_epoch, cfg.max_steps or sys.maxsize)
    warmup = round(cfg.warmup * total)
    groups = [{"params": [p for p in objective.parameters() if (p.ndim in (2, 4)) == decay],
               "weight_decay": cfg.weight_decay * decay} for decay in (True, False)]
    optimizer = torch.optim.AdamW(groups, cfg.lr, fused=True)  # decays matrices and kernels alone
    start, log, sums = 0, [], torch.zeros(4, device=cfg.device)  # of loss and terms
    if checkpoint:
        start, log, sums = checkpoint["step"], checkpoint["log"], checkpoint["sums"].to(cfg.device)
        objective.load_state_dict(checkpoint["objective"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    look = torch.no_grad()(lambda clean: teacher(prepare(clean, cfg.img_size), objective.maps))
    fast = functools.partial(torch.compile, dynamic=False) if cfg.compile == "on" else lambda f: f
    step_fn, look = fast(objective), fast(look)
    step_fn = nn.parallel.DistributedDataParallel(step_fn) if WORLD > 1 else step_fn
    share = slice(RANK * size // WORLD, (RANK + 1) * size // WORLD)  # of the batch, this process's
    distortion, generator = distortion_of(cfg), torch.Generator(cfg.device)
    bad_step, target = torch.full((), math.inf, device=cfg.device), None
    room = 4e9 if WORLD == 1 and total > per_epoch else 0  # bytes, at most, in memory
    memory = {}  # image index: the teacher's cls [D], patches [N, D] and maps, alike in all epochs
    live, times, reported = RANK == 0 and sys.stderr.isatty(), [], start
    bar = tqdm(None, cfg.method if teacher else "scratch", total, initial=start, disable=not live)
    clock = saved = time.perf_counter()
    for step in range(start, total):
        epoch, i = divmod(step, per_epoch)
        if i == 0 or step == start:
            order = np.random.default_rng((cfg.seed, epoch)).permutation(len(labels))
        batch = order[i * size:(i + 1) * size]
        clean, own = to_float(images[batch], cfg.device), batch[share].tolist()
        # Each process distorts the whole batch: the result does not depend on how many there are.
        distorted = distortion(clean, generator=generator.manual_seed(1_000_003 * cfg.seed + step))
        cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(total - warmup, 1))
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * ((step + 1) / warmup if step < warmup else cosine)
        with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            if cfg.method != "supervised" and not {*own} <= memory.keys():
                target = look(clean[share])
                parts = target.cls, target.patches, *target.attn
                if sum(t[0].nbytes for t in parts) * len(labels) < room:
                    memory.update((j, [t.clone() for t in p]) for j, p in zip(own, zip(*parts)))
            if {*own} <= memory.keys():
                cls, patches, *maps = map(torch.stack, zip(*(memory[j] for j in own)))
                target = Features(cls, patches, tuple(maps))
            loss, terms = step_fn(distorted[share], target, torch.from_numpy(labels[own]))
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        stats = torch.stack([loss, *terms.values()]).detach() / WORLD
        if WORLD > 1:
            dist.all_reduce(stats)
        sums[:len(stats)] += stats
        bad_step = torch.where((norm + stats[0]).isfinite(), bad_step, bad_step.clamp(max=step + 1))
        ends, waited = step + 1 == total or i + 1 == per_epoch, time.perf_counter() - clock
        if RANK or not (ends or step < start + 3 or waited > (0.3 if live else 10)):
            continue  # what follows waits for the device
        *values, bad = torch.cat([stats, bad_step[None]]).tolist()
        check(bad == math.inf, f"loss or gradient not finite at step {bad:.0f}: try a lower --lr")
        times = [] if reported == start + 3 else times  # drop those of three warm-up steps
        times.append((time.perf_counter() - clock) / (step + 1 - reported))
        row = dict(zip(("loss", *terms), values), images_per_s=size / float(np.median(times)))
        bar.update(step + 1 - bar.n)
        bar.set_postfix({k: f"{v:.3g}" for k, v in row.items()})
        if ends:
            row.update(zip(("loss", *terms), (sums / (i + 1)).tolist()))  # the epoch's means
            row = {"epoch": epoch + 1, "step": step + 1, "loss": 0, "global": None, "patch": None,
                   "attn": None, "lr": group["lr"], **row, **(held_out() if held_out else {})}
            log, times, sums = [*log, row], [], torch.zeros_like(sums)
        if ends or not live:
            tqdm.write("  ".join(f"{k} {v:.4g}" for k, v in row.items() if v is not None))
        if held_out and (ends or time.perf_counter() - saved > 120):
            write(f"{cfg.out}/student.pth", objective.student.state_dict())
            write(f"{cfg.out}/log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
            write(f"{cfg.out}/last.pt", dict(step=step + 1, total=total, log=log, sums=sums,
                  optimizer=optimizer.state_dict(), objective=objective.state_dict()))
            saved = time.perf_counter()
        reported, clock = step + 1, time.perf_counter()
    bar.close()

# ---- The command line ----------------------------------------------------------------------------
def number(kind, low, high=sys.float_info.max):  # an argparse type
    def parse(text):
        check(low <= kind(text) <= high, text)
        return kind(text)
    parse.__name__ = f"{kind.__name__} from {low:g} to {high:g}"
    return parse

WHOLE, COUNT, REAL = number(int, 1), number(int, 0, 2**32 - 1), number(float, 0)
OPTIONS = {  # name: type or choices, default, help with the default in brackets
    "data": (str, "textures", "cifar10, cifar100, stl10, a folder, or drawn [textures]"),
    "root": (str, "data", "folder for downloaded and decoded images [data]"),
    "max_images": (WHOLE, None, "size of a class-balanced subset of either split [all]"),
    "weights": (str, None, f"{' '.join(WEIGHTS)} scratch PATH [dinov2_vits14; textures: scratch]"),
    "data_size": (WHOLE, None, "pixels as distorted [32, stl10: 96, folder: 224]"),
    "img_size": (WHOLE, None, "pixels as the ViT sees them [224, scratch: --data-size]"),
    "noise": (REAL, [], "standard deviation; two values, as for blur and mask, are a range [0]"),
    "blur": (REAL, [], "sigma in pixels [0; without any distortion --noise 0.08 --blur 1.4]"),
    "mask": (REAL, [], "share of pixels [0]"), "attn_blocks": (COUNT, 1, "last blocks matched [1]"),
    "method": (("distill", "contrastive", "supervised"), "distill", "whose loss [distill]"),
    "loss_weights": (REAL, [1.0, 1.0, 1.0], "of the global, patch and attention term [1 1 1]"),
    "epochs": (WHOLE, 10, "[10]"), "pretrain_epochs": (WHOLE, 5, "on clean images, of scratch [5]"),
    "max_steps": (WHOLE, None, "[no limit]"), "batch_size": (WHOLE, 64, "of all processes [64]"),
    "lr": (number(float, 1e-12), None, "peak learning rate [1e-4, scratch: 3e-3]"),
    "weight_decay": (REAL, 0.05, "[0.05]"), "warmup": (number(float, 0, 1), 0.1, "share [0.1]"),
    "dtype": (("auto", "float32", "bfloat16"), "auto", "[bfloat16 on a GPU that has it]"),
    "compile": (("auto", "on", "off"), "auto", "[on a GPU for over 200,000 images]"),
    "device": (str, "auto", "[the first of cuda, mps, cpu]"), "workers": (COUNT, 2, "decoders [2]"),
    "seed": (COUNT, 0, "[0]"), "out": (str, None, "run folder [runs/<data>-<distortions>]")}

def settle(cfg):
    mps = torch.backends.mps.is_available()
    best = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    check(cfg.device in ("auto", "cpu", best), f"there is no device {cfg.device} here: use {best}")
    cfg.device = best if cfg.device == "auto" else cfg.device
    if cfg.dtype == "auto":
        fast = cfg.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        cfg.dtype = "bfloat16" if fast else "float32"

def describe(cfg):
    """As in noise=0.1, noise=0.1-0.5 for a range, noise=0.1+blur=1 for a mixture."""
    kinds = [(kind, np.ravel(getattr(cfg, kind))) for kind in ("noise", "blur", "mask")]
    parts = [f"{kind}={'-'.join(f'{v:g}' for v in pair)}" for kind, pair in kinds if any(pair)]
    return "+".join(parts) or "clean"

def run(main):  # bad input, too little memory and Ctrl-C end in one line
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; distill.py goes on with the same options and --resume")
    except (ValueError, OSError, ImportError) as e:  # a worker's ends a traceback
        message = str(e).strip().split("\n")[-1].removeprefix("ValueError: ")
    except (MemoryError, RuntimeError) as e:  # torch.OutOfMemoryError is a RuntimeError
        if not any(text in repr(e) for text in ("MemoryError", "out of memory", "allocate memory")):
            raise
        message = "out of memory: lower --batch-size or --img-size"
    print("error:", message, file=sys.stderr)
    sys.exit(2)

def configure():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.error = functools.partial(check, False)
    for name, (kind, default, text) in OPTIONS.items():
        kind = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        parser.add_argument("--" + name.replace("_", "-"), **kind, default=default, help=text,
                            nargs="+" if isinstance(default, list) else None)
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    cfg = parser.parse_args()
    cfg.weights = cfg.weights or ("scratch" if cfg.data == "textures" else "dinov2_vits14")
    scratch, own = cfg.weights == "scratch", dict(textures=32, cifar10=32, cifar100=32, stl10=96)
    cfg.data_size = cfg.data_size or own.get(cfg.data, 224)
    cfg.img_size = cfg.img_size or (cfg.data_size if scratch else 224)
    cfg.lr = cfg.lr or (3e-3 if scratch else 1e-4)
    if not cfg.noise + cfg.blur + cfg.mask:  # hurts a textures teacher, yet can be undone
        cfg.noise, cfg.blur = [0.08], [1.4]
    for kind in ("noise", "blur", "mask"):  # one value is a number, two are a range
        value = getattr(cfg, kind) or [0.0]
        setattr(cfg, kind, value if len(value) > 1 else value[0])
    distort(blank := torch.zeros(1, 3, cfg.data_size, cfg.data_size), cfg.noise, cfg.blur, cfg.mask)
    distill_loss(Features(blank, blank), Features(blank, blank), cfg.loss_weights)  # both may raise
    settle(cfg)
    parts = os.path.basename(os.path.abspath(cfg.data)), describe(cfg).replace("=", ""), cfg.method
    cfg.out = cfg.out or "runs/" + "-".join(parts).removesuffix("-distill")
    return cfg

def main():
    cfg = configure()
    config, last, checkpoint = f"{cfg.out}/config.json", f"{cfg.out}/last.pt", None
    if cfg.resume:
        check(os.path.exists(config), f"nothing to resume in {cfg.out}: it has no config.json")
        before = json.loads(pathlib.Path(config).read_text())
        for name in [n for n in OPTIONS if n not in "device workers compile out root".split()]:
            check(before.get(name) == getattr(cfg, name), f"--{name.replace('_', '-')} was "
                  f"{before.get(name)} in {cfg.out}, now it is {getattr(cfg, name)}")
        checkpoint = read_file(last) if os.path.exists(last) else None
        check(checkpoint is None or "total" in {*checkpoint}, f"{last} is damaged: delete it")
        if checkpoint and checkpoint["step"] == checkpoint["total"]:
            return print(f"{cfg.out} is finished; next: python eval.py {cfg.out}")
    check(cfg.resume or not os.path.exists(last), f"{cfg.out} holds a run: use --resume or --out")
    check(cfg.batch_size % WORLD == 0, f"--batch-size {cfg.batch_size} does not split into {WORLD}")
    if WORLD > 1:
        day = datetime.timedelta(days=1)  # for a long download or decoding
        dist.init_process_group("nccl" if cfg.device == "cuda" else "gloo", timeout=day)
    if cfg.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    if LOCAL_RANK:  # a machine's first process downloads and decodes alone
        dist.barrier()
    path = f"{cfg.out}/teacher.pth" if checkpoint else cfg.weights
    images, labels, test, test_y = load_data(cfg, labelled=cfg.method == "supervised")
    torch.manual_seed(cfg.seed)
    known = labels[labels >= 0]  # all but STL-10's unlabelled images, which come last
    teacher = ViT(cfg.img_size, 8, 128, 4, 2) if path == "scratch" else load_vit(path, cfg.img_size)
    if WORLD > 1 and not LOCAL_RANK:
        dist.barrier()
    teacher(torch.zeros(1, 3, cfg.img_size, cfg.img_size), cfg.attn_blocks)  # raises if too many
    check(cfg.batch_size <= len(known), f"--batch-size {cfg.batch_size}: but {len(known)} images")
    if cfg.compile == "auto":  # "on" where the run is long enough to win the minute's wait back
        visits = min(cfg.epochs * len(labels), (cfg.max_steps or sys.maxsize) * cfg.batch_size)
        cfg.compile = "on" if cfg.device == "cuda" and visits > 200_000 else "off"
    if RANK == 0:
        os.makedirs(cfg.out, exist_ok=True)
        write(config, json.dumps(vars(cfg), indent=1))
        print(*(f"{name}={value}" for name, value in vars(cfg).items()), flush=True)
    num_classes, teacher = int(labels.max()) + 1, teacher.to(cfg.device)
    if path == "scratch":
        clean = dict(method="supervised", noise=0, blur=0, mask=0, max_steps=None, lr=2e-3)
        clean = argparse.Namespace(**{**vars(cfg), **clean, "epochs": cfg.pretrain_epochs})
        train(Objective(teacher, clean, num_classes).to(cfg.device), None, images, known, clean)
    if RANK == 0:
        write(f"{cfg.out}/teacher.pth", teacher.state_dict())
    student, test = copy.deepcopy(teacher), test[subset(test_y, 500, 0)]
    target = embed(teacher, test, cfg)
    def cosine(vit):
        found = embed(vit, test, cfg, distortion_of(cfg), cfg.seed)
        return F.cosine_similarity(found, target).mean().item()
    cos_teacher, objective = cosine(teacher), Objective(student, cfg, num_classes)
    train(objective.to(cfg.device), teacher, images, labels, cfg, checkpoint,
          lambda: {"cos_teacher": cos_teacher, "cos_student": cosine(student)})

if __name__ == "__main__":
    run(main)
