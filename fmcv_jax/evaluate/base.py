"""What an evaluator is given and what it gives back."""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.data.loader import Pipeline, evaluation_batches
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.diffusion.generator import Generator
from fmcv_jax.errors import UserError
from fmcv_jax.parallel.batches import to_devices
from fmcv_jax.parallel.rules import Placement

Metrics = dict[str, float]


class Outputs(NamedTuple):
  """What a function made of images: values [N, ...], their record indices int [N], labels int [N] (-1 without)."""

  values: np.ndarray
  indices: np.ndarray
  labels: np.ndarray


@dataclasses.dataclass
class EvaluatedModel:
  """A model under evaluation: its functions, jitted over the mesh once, and the parameters of the moment.

  'pixels', what features have to beat, and 'image' are functions of every model.

  make_generator        (params, extra) -> the Generator of a model that make_generator pictures, else None
  reopen       a workdir -> its model, as another subject
  image_size   sides of the pictures that the functions take; None for any
  between_batches  called before every batch; what it raises ends the evaluation, as a request to stop does
  """

  functions: Mapping[str, Callable[..., jax.Array]]
  placement: Placement
  tokenizer: Tokenizer | None = None
  params: Any = None
  extra: Any = None
  make_generator: Callable[[Any, Any], Generator | None] | None = None
  reopen: Callable[[str], 'EvaluatedModel'] | None = None
  image_size: int | None = None
  between_batches: Callable[[], None] = lambda: None

  def __post_init__(self):
    self._jitted: dict[str, Callable[..., Any]] = {}
    self._kept: dict[Any, Any] = {}

  def cached(self, name: Any, make: Callable[[], Any]) -> Any:
    """What `make` returned the first time: what evaluators open or compile once for all their calls."""
    if name not in self._kept:
      self._kept[name] = make()
    return self._kept[name]

  def map_dataset(
    self, name: str, pipeline: Pipeline, batch: int, *, texts: bool = False, also: tuple[str, ...] = ()
  ) -> 'Outputs':
    """Runs function `name` over every readable image of a pipeline, in the source's order.

    The function is given the images and their labels, if there are any; with `texts` the first text of each, and what
    else it reads is named by `also`.

    Each process reads and computes its share; all of them return everything.
    """
    fields = ('image',) + ('label',) * bool(pipeline.source.names) + ('tokens',) * texts + also
    batches = evaluation_batches(
      pipeline,
      batch=batch,
      fields=fields,
      tokenizer=self.tokenizer,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    values, index, mask, *labels = map(np.concatenate, zip(*(self._run(name, local) for local in batches)))
    return Outputs(values[mask], index[mask], labels[0][mask] if labels else np.full(mask.sum(), -1))

  def embed_texts(self, texts: Sequence[str], batch: int) -> np.ndarray:
    """Embeds texts, float32 [N, E], in their order."""
    if self.tokenizer is None:
      raise UserError('config.tokenizer: an evaluator embeds texts, but no tokenizer is configured')
    tokens = self.tokenizer(texts)
    outputs = []
    for start in range(0, len(tokens), batch):
      piece = tokens[start : start + batch]
      padded = np.concatenate([piece, np.repeat(piece[-1:], batch - len(piece), axis=0)])
      rows = len(padded) // jax.process_count()
      local = padded[jax.process_index() * rows : (jax.process_index() + 1) * rows]
      outputs.append(self._run('embed_text', {'tokens': local})[0][: len(piece)])
    return np.concatenate(outputs)

  def _run(self, name: str, local: dict[str, np.ndarray]) -> list[np.ndarray]:
    """One global batch from this process' rows: the outputs, then index, mask and label where the batch has them."""
    function = {'pixels': pixels, 'image': whole_image, **self.functions}.get(name)
    if function is None:
      raise UserError(f'an evaluator needs {name!r}, which this objective does not offer; it has: '
                      f'{", ".join(self.functions) or "nothing"}')  # fmt: skip
    if name not in self._jitted:

      def both(params, extra, batch):
        with self.placement.active():
          return [function(params, extra, batch)] + [batch[k] for k in ('index', 'mask', 'label') if k in batch]

      self._jitted[name] = jax.jit(both, out_shardings=self.placement.replicated())
    self.between_batches()
    batch = to_devices(local, self.placement)
    return jax.device_get(self._jitted[name](self.params, self.extra, batch))


def pixels(params: Any, extra: Any, batch: Mapping[str, jax.Array], side: int = 16) -> jax.Array:
  """Features that any model has to beat: float32 [B, D], the image itself, averaged to `side` x `side` pixels or so."""
  images = batch['image'].astype(jnp.float32) / 255
  step = max(1, images.shape[1] // side), max(1, images.shape[2] // side)
  window = (1, *step, 1)
  small = jax.lax.reduce_window(images, 0.0, jax.lax.add, window, window, 'VALID') / (step[0] * step[1])
  return small.reshape(len(images), -1)


def whole_image(params: Any, extra: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
  """The image itself, float32 [B, H, W, 3] in [0, 1]."""
  return batch['image'].astype(jnp.float32) / 255


class Evaluator(abc.ABC):
  """A measurement of a model, as a frozen dataclass.

  every   training steps between two, 0 for at the end only
  batch   images (of all processes) in one pass
  """

  every: int
  batch_size: int

  def prepare(self, subject: EvaluatedModel) -> None:  # noqa: B027 (most need nothing)
    """Opens what is needed, before the first step of a run: a mistake in a config should not show after hours."""

  @abc.abstractmethod
  def __call__(self, subject: EvaluatedModel) -> Metrics: ...


def topk_accuracy(scores: np.ndarray, labels: np.ndarray, k: int) -> float:
  """Share of rows of scores [N, C] whose label is among the k best."""
  best = np.argpartition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k]
  return float((best == labels[:, None]).any(axis=1).mean())


def chunks(n: int, size: int) -> Iterator[slice]:
  """Slices that cover range(n) in pieces of `size`."""
  return (slice(start, min(start + size, n)) for start in range(0, n, size))


def evaluate(subject: EvaluatedModel, evaluators: Mapping[str, Evaluator]) -> dict[str, float]:
  """Metrics of a model as {'evaluator/figure': value}."""
  figures = {}
  for name, evaluator in evaluators.items():
    figures.update({f'{name}/{figure}': value for figure, value in evaluator(subject).items()})
  return figures
