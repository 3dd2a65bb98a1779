#!/bin/bash
# safetensors 0.8.0: whether a bfloat16 array can be read with framework='np' depends on what else was imported.
#
# safe_open(FILE, 'np').get_tensor of a bfloat16 array fails in a process that has not imported ml_dtypes, and works in one
# that has, although both have the package installed: numpy knows the name 'bfloat16' only once ml_dtypes has registered it.
# A program that imports jax first works by accident. float8 arrays fail in both.
#
# Observed on 2026-11-30 with Python 3.11, numpy 2.4.6 and ml_dtypes 0.6.0: an error, then [1.0, 2.5], then an error for float8.
# Exits with 0 while that holds, and with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  'safetensors==0.8.0' 'numpy==2.4.6' 'ml_dtypes==0.6.0'
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import struct

# Written by hand, so that no library chooses the type: 1.0 and 2.5 as bfloat16, 1.0 as float8_e4m3fn.
for name, kind, data, shape in (('bfloat16', 'BF16', b'\x80\x3f\x20\x40', [2]), ('float8', 'F8_E4M3', b'\x38', [1])):
  header = json.dumps({'x': {'dtype': kind, 'shape': shape, 'data_offsets': [0, len(data)]}}).encode()
  header += b' ' * (-len(header) % 8)
  with open(f'{name}.safetensors', 'wb') as file:
    file.write(struct.pack('<Q', len(header)) + header + data)
PYTHON
cat > read.py <<'PYTHON'
import sys

from safetensors import safe_open

if sys.argv[2] == 'imported':
  import ml_dtypes  # noqa: F401
try:
  with safe_open(sys.argv[1], 'np') as file:
    print(file.get_tensor('x').astype('float32').tolist())
except Exception as error:
  print('error', type(error).__name__)
PYTHON
run() { "$folder/venv/bin/python" read.py "$@"; }
alone=$(run bfloat16.safetensors alone)
imported=$(run bfloat16.safetensors imported)
float8=$(run float8.safetensors imported)
printf '%s\n' "bfloat16 without ml_dtypes: $alone" "with it: $imported" "float8 with it: $float8"
[[ "$alone" == error* && "$imported" == '[1.0, 2.5]' && "$float8" == error* ]]
