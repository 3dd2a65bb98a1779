"""Small images of one color and files of them, as newcomers have them, for the tests of fine-tuning."""

import io
import tarfile

import numpy as np
from PIL import Image

from fmcv_jax import experiment

COLORS = {'blue': (20, 20, 230), 'green': (20, 200, 20), 'red': (230, 20, 20)}
NAMES = list(COLORS)


def pixels(color, seed, side=20):
  noise = np.random.default_rng(seed).integers(-20, 21, (side, side, 3))
  return np.clip(np.array(COLORS[color]) + noise, 0, 255).astype(np.uint8)


def draw(path, color, seed, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels(color, seed, **options)).save(path)
  return path


def class_folder(path, count=31, names=('blue', 'green', 'red')):
  for index in range(count):
    draw(path / names[index % len(names)] / f'{index}.png', names[index % len(names)], index)
  return path


def encoded(color, seed):
  file = io.BytesIO()
  Image.fromarray(pixels(color, seed)).save(file, 'PNG')
  return file.getvalue()


def completed(path, model, *overrides):
  fields = [f'data.source.path={str(path)!r}', f'init_from.params.workdir={model!r}', *overrides]
  return experiment.load_config('configs/finetune.py', fields)


def table(path, content):
  draw(path / 'a.png', 'red', 1)
  draw(path / 'b.png', 'blue', 2)
  (path / 't.csv').write_text(content)


def tar(path, samples):
  """A shard of samples, member -> bytes or text."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as out:
    for number, sample in enumerate(samples):
      for member, content in sample.items():
        data = content if isinstance(content, bytes) else content.encode()
        info = tarfile.TarInfo(f'{number:04d}.{member}')
        info.size = len(data)
        out.addfile(info, io.BytesIO(data))
  return path
