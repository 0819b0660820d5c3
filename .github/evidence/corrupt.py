# SPDX-License-Identifier: MIT
"""python .github/evidence/corrupt.py FOLDER SIZE QUALITY: FOLDER's test images behind JPEG's
artefacts, and behind a black square of half the side, into FOLDER-jpeg/ and FOLDER-square/.
"""
import io
import sys
from pathlib import Path

import numpy as np
from PIL import Image

folder, size, quality = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
test = folder / ("val" if (folder / "val").exists() else "test")
place = np.random.default_rng(0)
for path in sorted(test.glob("*/*")):
    image = Image.open(path).convert("RGB").resize((size, size))
    coded = io.BytesIO()
    image.save(coded, "JPEG", quality=quality)
    hidden = image.copy()
    left, top = place.integers(0, size // 2, 2, endpoint=True).tolist()
    hidden.paste((0, 0, 0), (left, top, left + size // 2, top + size // 2))
    for name, changed in (("jpeg", Image.open(coded)), ("square", hidden)):
        out = Path(f"{folder.name}-{name}", path.parent.name, f"{path.stem}.png")
        out.parent.mkdir(parents=True, exist_ok=True)
        changed.save(out)
