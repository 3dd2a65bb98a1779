"""Images in memory, or in files of which there is no more than a list."""

import pathlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from fmcv_jax.data.sources.base import Example, Source

ImageLike = np.ndarray | Image.Image | bytes | str | pathlib.Path


class InMemoryImages(Source):
  """Images in memory or in files, as a source."""

  def __init__(self, images: Sequence[ImageLike] | np.ndarray):
    self._images = images

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> Example:
    image = self._images[index]
    if isinstance(image, (str, pathlib.Path)):
      image = pathlib.Path(image).read_bytes()
    elif isinstance(image, Image.Image):
      image = np.asarray(image.convert('RGB'))
    return {'image': image, 'key': str(index)}
