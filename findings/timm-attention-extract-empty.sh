#!/usr/bin/env bash
# timm 1.0.31 (torch 2.14.1): timm.utils.AttentionExtract on a ViT with fused attention, the default.
# With method="hook" it returns an empty dictionary without a word; with method="fx" it raises a
# RuntimeError about node names. Guess before running: it turns the fused kernel off by itself.
# After timm.layers.set_fused_attn(False) both give the maps.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31
"$dir/venv/bin/python" - <<'PY'
import timm
import torch
from timm.utils import AttentionExtract

images = torch.rand(1, 3, 32, 32)


def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()


by_hook = AttentionExtract(vit(), method="hook")(images)
print("hook:", by_hook)
try:
    AttentionExtract(vit(), method="fx")
    by_fx = "no error"
except RuntimeError as error:
    by_fx = str(error)
print("fx:", by_fx)
timm.layers.set_fused_attn(False)
shapes = [tuple(a.shape) for a in AttentionExtract(vit(), method="hook")(images).values()]
print("hook, fused attention off:", shapes)
assert by_hook == {} and "No node names" in by_fx and len(shapes) == 2
PY
