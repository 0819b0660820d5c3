#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.14.1): a Dinov2Model made with its default attention (sdpa) and asked
# for output_attentions=True returns an empty tuple and says so in a log line only.
# Guess before running: it falls back to the eager product and returns one map a block.
# With attn_implementation="eager" it does return them.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet torch==2.14.1 transformers==5.24.0
"$dir/venv/bin/python" - <<'PY'
import torch
from transformers import Dinov2Config, Dinov2Model

small = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 28}
images = torch.rand(1, 3, 28, 28)
default = Dinov2Model(Dinov2Config(**small)).eval()
eager = Dinov2Model(Dinov2Config(**small, attn_implementation="eager")).eval()
print("default:", default.config._attn_implementation)
empty = default(images, output_attentions=True).attentions
maps = eager(images, output_attentions=True).attentions
print("default gives", empty, "; eager gives", [tuple(a.shape) for a in maps])
assert default.config._attn_implementation == "sdpa" and empty == () and len(maps) == 2
PY
