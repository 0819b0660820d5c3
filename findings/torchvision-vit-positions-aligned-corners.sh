#!/usr/bin/env bash
# torchvision 0.29.1 (torch 2.14.1): vision_transformer.interpolate_embeddings, which fits a ViT's
# position embeddings to another image size, samples with align_corners=True: the outermost patches
# keep their values whatever the size, and all others move. timm, DINO, DINOv2 and MAE do not.
# Guess before running: align_corners=False, as everybody's.
# Observed: on a ramp over 14 columns resized to 7 it gives the end values themselves, 0 and 13.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31
"$dir/venv/bin/python" - <<'PY'
from collections import OrderedDict

import torch
from timm.layers import resample_abs_pos_embed
from torchvision.models.vision_transformer import interpolate_embeddings

ramp = torch.arange(14.0).expand(14, 14).reshape(1, 196, 1)
positions = torch.cat([torch.zeros(1, 1, 1), ramp], dim=1)
state = OrderedDict({"encoder.pos_embedding": positions})
theirs = interpolate_embeddings(112, 16, state)["encoder.pos_embedding"][0, 1:8, 0]
timms = resample_abs_pos_embed(positions, [7, 7])[0, 1:8, 0]
print("torchvision:", [round(x, 2) for x in theirs.tolist()])
print("timm:       ", [round(x, 2) for x in timms.tolist()])
assert abs(theirs[0]) < 1e-4 and abs(theirs[-1] - 13) < 1e-4
assert timms[0] > 0.4 and timms[-1] < 12.6
PY
