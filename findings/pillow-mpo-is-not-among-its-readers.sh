#!/usr/bin/env bash
# Pillow 13.0.0: which endings can be read? Image.OPEN holds the formats with a reader, and
# registered_extensions() maps endings to formats; but .mpo (photos of phones and 3-D cameras) maps
# to "MPO", which is not in Image.OPEN, although such files open: the JPEG reader takes them over.
# Guess before running: an ending whose format is not in Image.OPEN cannot be read.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet pillow==13.0.0
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
from PIL import Image

frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
frames[0].save("two.mpo", save_all=True, append_images=frames[1:])
Image.init()
kind = Image.registered_extensions()[".mpo"]
opened = Image.open("two.mpo")
print(f".mpo is {kind}, in Image.OPEN: {kind in Image.OPEN}; opened as {opened.format} {opened.size}")
assert kind not in Image.OPEN and opened.format == "MPO"
PY
