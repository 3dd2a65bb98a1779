#!/bin/bash
# cykooz.resizer 4.0.1: Lanczos differs from Pillow by tens of levels where the filter overshoots.
#
# Both resize with a separable, antialiasing Lanczos filter on 8-bit images, and round and clip to 0..255 between the two
# passes. Pillow filters rows first, cykooz.resizer columns first. Where the first pass overshoots 0 or 255 the clipping
# loses something else, so on images with hard edges the results differ by far more than rounding; on smooth ones they
# agree to a level or two. A model that is shown images by one and was trained on images by the other sees the difference.
#
# Observed on 2026-11-30 with Python 3.11, pillow 13.0.0, numpy 2.4.6: checkerboard of thin lines, 97 x 83 to 32 x 32: largest
# difference above 10 levels; a smooth gradient: at most 2.
# Exits with 0 while that holds, and with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'cykooz.resizer==4.0.1' 'pillow==13.0.0' 'numpy==2.4.6'
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, Resizer, ResizeOptions
from PIL import Image

SIZE = 32


def by_pillow(pixels):
  return np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.LANCZOS), int)


def by_cykooz(pixels):
  source = ImageData(pixels.shape[1], pixels.shape[0], PixelType.U8x3, pixels.tobytes())
  target = ImageData(SIZE, SIZE, PixelType.U8x3)
  Resizer().resize(source, target, ResizeOptions(ResizeAlg.convolution(FilterType.lanczos3)))
  return np.frombuffer(target.get_buffer(), np.uint8).reshape(SIZE, SIZE, 3).astype(int)


rows, columns = np.mgrid[:83, :97]
edges = np.where((rows // 7 + columns // 5) % 2, 255, 0).astype(np.uint8)
smooth = (rows + columns).astype(np.uint8)
found = {}
for name, gray in (('edges', edges), ('smooth', smooth)):
  pixels = np.ascontiguousarray(np.repeat(gray[..., None], 3, axis=-1))
  found[name] = int(np.abs(by_pillow(pixels) - by_cykooz(pixels)).max())
print(found)
assert found['edges'] > 10 and found['smooth'] <= 2
PYTHON
