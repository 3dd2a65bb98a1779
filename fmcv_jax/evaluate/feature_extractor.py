"""Another trained network that looks at pictures, made and real: FID and its like by whatever features one has."""

from collections.abc import Sequence

import numpy as np

from fmcv_jax.data.loader import Pipeline
from fmcv_jax.data.sources.in_memory import InMemoryImages
from fmcv_jax.data.transforms import Resize
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, Metrics
from fmcv_jax.evaluate.distances import cmmd, fid, kid, precision_recall


class FeatureExtractor:
  """The network of a workdir, opened once and kept by the subject: pictures uint8 [N, H, W, 3] -> features [N, D].

  They are embeddings, of unit length, where it knows texts (`reads`), else its 'features'. Images of another
  size than it takes are resized, with antialiasing.
  """

  def __init__(self, subject: EvaluatedModel, workdir: str, batch: int):
    reopen = subject.reopen
    assert reopen is not None
    self._judge: EvaluatedModel = subject.cached(('judge', workdir), lambda: reopen(workdir))
    offered = self._judge.outputs
    self.reads = {'embed_image', 'embed_text'} <= set(offered)
    self._name = next((name for name in ('embed_image', 'features') if name in offered), '')
    if not self._name:
      raise UserError(
        f'config.evaluators: feature_extractor: {workdir} has no features; its outputs are {", ".join(offered)}'
      )
    ways = self._judge.placement.mesh.size
    self._batch = -(-batch // ways) * ways

  def __call__(self, pictures: np.ndarray) -> np.ndarray:
    size = self._judge.image_size
    pipeline = Pipeline(InMemoryImages(pictures), Resize(size) if size else None, max_bad=0.0)
    return self._judge.map_dataset(self._name, pipeline, self._batch).values

  def read(self, texts: Sequence[str]) -> np.ndarray:
    return self._judge.embed_texts(texts, self._batch)

  def compare(self, made: np.ndarray, real: np.ndarray) -> Metrics:
    """'fid', 'kid', 'precision' and 'recall' of two sets of features and, of embeddings, 'cmmd'."""
    precision, recall = precision_recall(made, real)
    figures = {'fid': fid(made, real), 'kid': kid(made, real), 'precision': precision, 'recall': recall}
    return figures | ({'cmmd': cmmd(made, real)} if self._name == 'embed_image' else {})
