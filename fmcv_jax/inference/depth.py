"""Depth of images in their own size, with a model of the objective `depth`."""

import logging
from collections.abc import Iterator

import numpy as np

from fmcv_jax.data.pillow_resize import ResizeToMultiple
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import UNREADABLE, Source, reason_of
from fmcv_jax.data.sources.subset import Subset
from fmcv_jax.data.transforms import ImageTransform
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.models.common.positions import cubic_matrix
from fmcv_jax.objectives.outputs import encoder_of, listed

logger = logging.getLogger(__name__)

_PER_DEVICE = 8  # images at once: a map has many more pixels than a label


class DepthEstimator:
  """The depth of an `EvaluatedModel`, over all of its devices.

  image  data.image of its config, used where it is `resize_to_multiple`; otherwise images are scaled, with their aspect
         ratio, to the size that the network was trained with
  batch  images at once, at most 8 for each device

  `output` is 'depth', in meters, or 'inverse_depth', up to scale and shift. UserError for a model with neither.
  """

  def __init__(self, subject: EvaluatedModel, image: ImageTransform | None, batch: int):
    names = [name for name in ('depth', 'inverse_depth') if name in subject.outputs]
    if not names:
      raise UserError(f'this model does not predict depth; its outputs are {listed(subject.outputs)}')
    self.output = names[0]
    self._subject = subject
    self._ways = subject.placement.mesh.size
    self._batch = min(batch, _PER_DEVICE * self._ways)
    if isinstance(image, ResizeToMultiple):
      self._image = image
    else:
      network = encoder_of(subject.outputs)(subject.params, subject.extra).network
      self._image = ResizeToMultiple(subject.image_size or 518, network.patch_size)  # type: ignore[attr-defined]

  def maps(self, source: Source) -> Iterator[tuple[int, np.ndarray | None]]:
    """(number, float32 [height, width]) of every image, or None for one that cannot be read, which is logged.

    Images that come to the same size are computed together, by a program for each size, and are so out of order. A map
    is resized to the size of its image by cubic interpolation, as transformers does.
    """
    sizes: dict[tuple[int, int], list[tuple[int, tuple[int, int]]]] = {}
    rng = np.random.default_rng(0)
    for number in range(len(source)):
      try:
        image = self._image.open(source[number]['image'])
      except UNREADABLE as error:
        logger.warning('skipped %s: %s', source.key_of(number), reason_of(error))
        yield number, None
        continue
      own = image.height, image.width
      sizes.setdefault(self._image.draw(*own, rng).size, []).append((number, own))
    for members in sizes.values():
      numbers = [number for number, _ in members]
      pipeline = Pipeline(Subset(source, np.array(numbers)), self._image)
      batch = -(-min(self._batch, len(numbers)) // self._ways) * self._ways
      found = self._subject.map_records((self.output,), pipeline, batch)
      for (number, own), values in zip(members, found, strict=True):
        assert values is not None  # it was decoded before
        yield number, resized(values[self.output], own)

  def in_order(self, source: Source) -> list[np.ndarray | None]:
    """The maps of all images, in their order; None for one that cannot be read."""
    found = dict(self.maps(source))
    return [found[number] for number in range(len(source))]


def resized(depth: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """A map float32 [H, W] at another size (height, width), by cubic interpolation without a filter (Keys' a = -0.75)."""
  rows, columns = (cubic_matrix(old, new) for old, new in zip(depth.shape, size, strict=True))
  return np.asarray(rows @ depth @ columns.T)
