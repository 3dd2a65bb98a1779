"""The table of docs/data.md: 500 x 375 JPEGs to random-resized crops of 224 pixels, images per second and core.

    python -m venv peers && peers/bin/pip install tensorflow-cpu torch torchvision webdataset pillow
    python benchmarks/input.py --peers peers/bin/python

The libraries run in turn, each in a process of its own. Measured is the CPU time of all threads, so that other load on
the machine does not matter. The images are crops of the two photographs of scikit-learn.
"""

import argparse
import io
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

import numpy as np
from PIL import Image

FILES, BATCH, SIZE = 256, 64, 224
WARM, COUNTED = 4, 24  # batches


def write_files(folder: pathlib.Path, quality: int) -> float:
  """Writes FILES images as files and as one tar; returns their mean size in bytes."""
  from sklearn.datasets import load_sample_images

  photos = [Image.fromarray(photo) for photo in load_sample_images().images]
  draws = np.random.default_rng(0)
  (folder / 'images').mkdir()
  with tarfile.open(folder / 'images.tar', 'w') as tar:
    for index in range(FILES):
      photo = photos[index % len(photos)]
      height = int(photo.height * draws.uniform(0.7, 1))
      width = height * 4 // 3
      left, top = draws.integers(photo.width - width + 1), draws.integers(photo.height - height + 1)
      cut = photo.crop((left, top, left + width, top + height)).resize((500, 375), Image.Resampling.BICUBIC)
      path = folder / 'images' / f'{index:05d}.jpg'
      cut.save(path, quality=quality)
      tar.add(path, path.name)
  return sum(path.stat().st_size for path in (folder / 'images').iterdir()) / FILES


def ours(folder: pathlib.Path, interpolation='bilinear'):
  from fmcv_jax.data.loader import TrainLoader
  from fmcv_jax.data.pipeline import Pipeline
  from fmcv_jax.data.sources.image_folder import ImageFolder
  from fmcv_jax.data.transforms import RandomResizedCrop

  pipeline = Pipeline(ImageFolder(str(folder / 'images')), RandomResizedCrop(SIZE, interpolation=interpolation))
  return (batch['image'] for batch in TrainLoader(pipeline, batch=BATCH, seed=0, fields=('image',)))


def ours_bicubic(folder: pathlib.Path):
  return ours(folder, 'bicubic')


def ours_by_packages(folder: pathlib.Path):
  os.environ['CC'] = 'none'  # crops as on a machine without a C compiler
  return ours(folder)


def crop_pil(image, interpolation=Image.Resampling.BILINEAR):
  """torchvision's RandomResizedCrop of a PIL image."""
  for _ in range(10):
    area = image.height * image.width * random.uniform(0.08, 1)
    aspect = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= image.width and 0 < h <= image.height:
      left, top = random.randint(0, image.width - w), random.randint(0, image.height - h)
      break
  else:
    left, top, w, h = 0, 0, image.width, image.height
  return np.asarray(image.crop((left, top, left + w, top + h)).resize((SIZE, SIZE), interpolation))


def torch_pil(folder: pathlib.Path, interpolation=Image.Resampling.BILINEAR):
  import torch

  files = sorted((folder / 'images').iterdir())

  class Files(torch.utils.data.Dataset):
    def __len__(self):
      return 1 << 20

    def __getitem__(self, index):
      return torch.from_numpy(crop_pil(Image.open(files[index % FILES]).convert('RGB'), interpolation).copy())

  torch.set_num_threads(1)
  return iter(torch.utils.data.DataLoader(Files(), batch_size=BATCH, shuffle=True))


def torch_pil_bicubic(folder: pathlib.Path):
  return torch_pil(folder, Image.Resampling.BICUBIC)


def torchvision(folder: pathlib.Path):
  import torch
  from torchvision.transforms import v2

  files = sorted((folder / 'images').iterdir())
  transform = v2.Compose([v2.RandomResizedCrop(SIZE), v2.PILToTensor()])

  class Files(torch.utils.data.Dataset):
    def __len__(self):
      return 1 << 20

    def __getitem__(self, index):
      return transform(Image.open(files[index % FILES]).convert('RGB'))

  torch.set_num_threads(1)
  return iter(torch.utils.data.DataLoader(Files(), batch_size=BATCH, shuffle=True))


def webdataset(folder: pathlib.Path):
  import webdataset as wds

  def decoded(sample):
    return (crop_pil(Image.open(io.BytesIO(sample['jpg'])).convert('RGB')),)

  data = wds.WebDataset(str(folder / 'images.tar'), shardshuffle=False, empty_check=False).repeat()
  return iter(data.shuffle(100).map(decoded).batched(BATCH))


def tf_data(folder: pathlib.Path, antialias=False):
  import tensorflow as tf

  def decoded(file):
    data = tf.io.read_file(file)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
      tf.image.extract_jpeg_shape(data),
      tf.zeros([1, 0, 4]),
      area_range=(0.08, 1.0),
      aspect_ratio_range=(3 / 4, 4 / 3),
      max_attempts=10,
      use_image_if_no_bounding_boxes=True,
    )
    window = tf.concat([begin[:2], size[:2]], 0)
    image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
    image = tf.image.resize(image, (SIZE, SIZE), antialias=antialias)
    return tf.cast(tf.round(image), tf.uint8)

  options = tf.data.Options()
  options.threading.private_threadpool_size = 1
  data = tf.data.Dataset.list_files(str(folder / 'images' / '*.jpg')).repeat().shuffle(FILES)
  return data.map(decoded).batch(BATCH).prefetch(1).with_options(options).as_numpy_iterator()


def tf_data_antialiased(folder: pathlib.Path):
  return tf_data(folder, antialias=True)


LIBRARIES = {
  'fmcv, bilinear': ours,
  'fmcv, bicubic': ours_bicubic,
  'fmcv without a C compiler, bilinear': ours_by_packages,
  'tf.data, bilinear': tf_data_antialiased,
  'tf.data, bilinear without antialiasing': tf_data,
  'torch DataLoader and torchvision, bilinear': torchvision,
  'torch DataLoader and PIL, bilinear': torch_pil,
  'torch DataLoader and PIL, bicubic': torch_pil_bicubic,
  'webdataset and PIL, bilinear': webdataset,
}


def measure(name: str, folder: pathlib.Path) -> float:
  """Images per second of CPU time."""
  batches = LIBRARIES[name](folder)
  for _ in range(WARM):
    next(batches)
  start = time.process_time()
  for _ in range(COUNTED):
    next(batches)
  return COUNTED * BATCH / (time.process_time() - start)


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  flags.add_argument('--peers', metavar='PYTHON', help='interpreter that has tensorflow, torch and webdataset')
  flags.add_argument('--rounds', type=int, default=5)
  flags.add_argument('--quality', type=int, default=90, help='JPEG quality (default: 90)')
  flags.add_argument('--one', nargs=2, metavar=('NAME', 'FOLDER'), help=argparse.SUPPRESS)
  args = flags.parse_args()
  if args.one:
    print(measure(args.one[0], pathlib.Path(args.one[1])), flush=True)
    return
  with tempfile.TemporaryDirectory() as folder:
    mean = write_files(pathlib.Path(folder), args.quality)
    rates: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    for _ in range(args.rounds):
      for name, measured in rates.items():
        python = sys.executable if name.startswith('fmcv') else args.peers
        if python:
          command = [python, __file__, '--one', name, folder]
          run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
          measured.append(float(run.stdout.split()[-1]))
          print(f'{name}: {measured[-1]:,.0f}', file=sys.stderr, flush=True)
  print(f'{args.rounds} rounds, files of {mean / 1000:.0f} kB, images per second and core: median (min to max)')
  for name, measured in rates.items():
    if measured:
      print(f'| {name} | {statistics.median(measured):,.0f} | {min(measured):,.0f} to {max(measured):,.0f} |')


if __name__ == '__main__':
  main()
