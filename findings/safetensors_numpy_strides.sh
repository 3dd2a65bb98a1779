#!/bin/bash
# safetensors 0.8.0: the numpy writer stores the memory of a transposed array under the transposed shape.
#
# safetensors.numpy.save_file takes an array that is not C-contiguous, such as `kernel.T`, without an error. The file has
# the shape of the transposed array and the bytes of the original order, so it loads as other values. (The torch writer
# refuses such tensors.) np.ascontiguousarray before saving gives the right file.
#
# Observed on 2026-11-30 with Python 3.11 and numpy 2.4.6: [[0, 3], [1, 4], [2, 5]] comes back as [[0, 1], [2, 3], [4, 5]].
# Exits with 0 while that holds, and with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'safetensors==0.8.0' 'numpy==2.4.6'
FILE="$folder/kernel.safetensors" "$folder/venv/bin/python" - <<'PYTHON'
import os

import numpy as np
from safetensors.numpy import load_file, save_file

kernel = np.arange(6, dtype=np.int32).reshape(2, 3).T
save_file({'kernel': kernel}, os.environ['FILE'])
loaded = load_file(os.environ['FILE'])['kernel']
print('saved', kernel.tolist(), 'loaded', loaded.tolist())
assert kernel.tolist() == [[0, 3], [1, 4], [2, 5]]
assert loaded.tolist() == [[0, 1], [2, 3], [4, 5]]
PYTHON
