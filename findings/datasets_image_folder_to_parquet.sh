#!/bin/bash
# datasets 5.2.0: to_parquet of an image folder writes the paths of the images, not the images.
#
# load_dataset('imagefolder') followed by Dataset.to_parquet gives a table whose `image` column is a struct of `bytes` and
# `path`. One expects a file that can be moved to another machine; `bytes` is null in every row, and `path` is the absolute
# path on this machine, so the images are gone elsewhere. Dataset.save_to_disk, and push_to_hub, embed the bytes.
#
# Observed on 2026-11-30 with Python 3.11, pyarrow 26.0.1 and pillow 12.3.0: of two images, no bytes and two absolute paths.
# Exits with 0 while that holds, and with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'datasets==5.2.0' 'pyarrow==26.0.1' 'pillow==12.3.0'
cd "$folder"
HF_HOME="$folder/hub" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - <<'PYTHON'
import pathlib

import datasets
import pyarrow.parquet as pq
from PIL import Image

datasets.disable_progress_bars()
for name, color in (('cat', 'red'), ('dog', 'blue')):
  pathlib.Path('photos', name).mkdir(parents=True)
  Image.new('RGB', (8, 8), color).save(pathlib.Path('photos', name, 'one.png'))
table = datasets.load_dataset('imagefolder', data_dir='photos', split='train')
assert table[0]['image'].size == (8, 8)
table.to_parquet('photos.parquet')
rows = pq.read_table('photos.parquet')['image'].to_pylist()
print([(row['bytes'], pathlib.Path(row['path']).name) for row in rows])
assert len(rows) == 2
assert all(row['bytes'] is None and pathlib.Path(row['path']).is_absolute() for row in rows)
PYTHON
