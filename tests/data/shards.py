"""Writes data sets in the formats of others, for tests."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def encoded_image(index, size=(20, 24)):
  """An encoded image of noise; JPEG, PNG or WebP by turns."""
  noise = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
  kind = ('JPEG', 'PNG', 'WEBP')[index % 3]
  file = io.BytesIO()
  Image.fromarray(noise).save(file, kind, quality=90)
  return file.getvalue(), {'JPEG': 'jpg', 'PNG': 'png', 'WEBP': 'webp'}[kind]


def write_tars(folder, samples, shards=3, **options):
  """Samples 0 to `samples` as img2dataset writes them, with a class each."""
  folder.mkdir(exist_ok=True)
  for shard in range(shards):
    with tarfile.open(folder / f'{shard:05d}.tar', 'w', **options) as out:
      for index in range(samples * shard // shards, samples * (shard + 1) // shards):
        image, extension = encoded_image(index)
        members = {
          extension: image,
          'txt': f'caption {index}'.encode(),
          'json': json.dumps({'caption': f'caption {index}', 'nested': {'label': index % 7}}).encode(),
          'cls': str(index % 7).encode(),
        }
        for name, data in members.items():
          info = tarfile.TarInfo(f'{index:09d}.{name}')
          info.size = len(data)
          out.addfile(info, io.BytesIO(data))


def write_parquet(folder, samples, files=2, group=3, damage=None, **options):
  """Samples 0 to `samples` as the `datasets` library writes them."""
  import pyarrow
  import pyarrow.parquet

  folder.mkdir(exist_ok=True)
  features = {'image': {'_type': 'Image'}, 'label': {'names': list('abcdefg'), '_type': 'ClassLabel'}}
  metadata = {'huggingface': json.dumps({'info': {'features': features}})}
  for number in range(files):
    rows = range(samples * number // files, samples * (number + 1) // files)
    table = pyarrow.table(
      {
        'image': [{'bytes': encoded_image(index)[0], 'path': None} for index in rows],
        'label': [index % 7 for index in rows],
        'caption': [f'caption {index}' for index in rows],
        'captions': [[f'caption {index}', f'other {index}'] for index in rows],
      }
    )
    path = folder / f'train-{number:05d}-of-{files:05d}.parquet'
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=group, **options)
