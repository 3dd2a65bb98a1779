"""Feature extractor for FID and similar metrics: any other trained network."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.in_memory import InMemoryImages
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.data.transforms import Resize
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel, Metrics
from fmcv_jax.evaluate.distances import cmmd, fid, kid, precision_recall


class FeatureExtractor:
  """The network of a workdir, or of the package ('demo'), opened once and cached.

  Called with images uint8 [N, H, W, 3] it returns features [N, D].

  Features are unit-length embeddings for an image-text model (`reads` is True), otherwise the output 'features'. Images
  of other sizes are resized with antialiasing.
  """

  def __init__(self, subject: EvaluatedModel, workdir: str, batch: int):
    reopen = subject.reopen
    assert reopen is not None
    self._model: EvaluatedModel = subject.cached(('feature_extractor', workdir), lambda: reopen(workdir))
    offered = self._model.outputs
    self.reads = {'embed_image', 'embed_text'} <= set(offered)
    self._name = next((name for name in ('embed_image', 'features') if name in offered), '')
    if not self._name:
      raise UserError(
        f'config.evaluators: feature_extractor: {workdir} has no features; its outputs are {", ".join(offered)}'
      )
    devices = self._model.placement.mesh.size
    self._batch = -(-batch // devices) * devices

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """Features float32 [N, D] of images uint8 [N, H, W, 3], resized to the size that the model takes."""
    size = self._model.image_size
    pipeline = Pipeline(InMemoryImages(images), Resize(size) if size else None, max_bad=0.0)
    return self._model.map_dataset(self._name, pipeline, self._batch).values

  def of_records(self, data: Pipeline) -> np.ndarray:
    """Features float32 [N, D] of all images of a pipeline, with the evaluation transform of this network.

    UserError for an image that cannot be read.
    """
    data = dataclasses.replace(data, image=self._model.image, max_bad=0.0)
    return self._model.map_dataset(self._name, data, self._batch).values

  @property
  def tokenizer(self) -> Tokenizer:
    """The tokenizer of the texts that it reads."""
    if self._model.tokenizer is None:
      raise UserError('config.evaluators: the image-text model has no tokenizer')
    return self._model.tokenizer

  def read(self, texts: Sequence[str]) -> np.ndarray:
    """Embeddings of texts, float32 [N, E], in the space of the image features."""
    return self._model.embed_texts(texts, self._batch)

  def compare(self, made: np.ndarray, real: np.ndarray) -> Metrics:
    """'fid', 'kid', 'precision' and 'recall' of two sets of features and, of embeddings, 'cmmd'."""
    precision, recall = precision_recall(made, real)
    metrics = {'fid': fid(made, real), 'kid': kid(made, real), 'precision': precision, 'recall': recall}
    return metrics | ({'cmmd': cmmd(made, real)} if self._name == 'embed_image' else {})
