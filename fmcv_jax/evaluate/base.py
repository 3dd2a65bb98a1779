"""A model under evaluation, and the contract of an evaluator."""

import abc
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.data.loader import evaluation_batches
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.data.transforms import ImageTransform
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.fields import ImageSize
from fmcv_jax.objectives.outputs import Output
from fmcv_jax.parallel.batches import to_devices
from fmcv_jax.parallel.rules import Placement

Metrics = dict[str, float]


class DatasetOutputs(NamedTuple):
  """An output over the readable records of a data set, in the source's order.

  values   tree of arrays [N, ...], in the dtypes of the output
  indices  int [N], the number of each record
  truth    the batch fields that were asked for, [N, ...]
  """

  values: Any
  indices: np.ndarray
  truth: dict[str, np.ndarray]


@dataclasses.dataclass
class EvaluatedModel:
  """A trained model on a mesh: its outputs, each compiled once, and its current parameters.

  Every model also has the output 'pixels' [B, D], the baseline that features have to beat.

  reopen       opens the model of a workdir
  image_size   size of the images that the outputs take; None for any
  image        transform of images of any size as in the evaluation of the model; None for a model without images
  example_batch  shapes of one example of training, to whose rows of objects evaluation data is padded
  class_names  the names of the training classes by label, empty where they have none; read when they are needed
  between_batches  called before every batch; what it raises ends the evaluation, as a request to stop does
  """

  outputs: Mapping[str, Output]
  placement: Placement
  tokenizer: Tokenizer | None = None
  params: Any = None
  extra: Any = None
  reopen: Callable[[str], 'EvaluatedModel'] | None = None
  image_size: ImageSize | None = None
  image: ImageTransform | None = None
  example_batch: Mapping[str, jax.ShapeDtypeStruct] = dataclasses.field(default_factory=dict)
  between_batches: Callable[[], None] = lambda: None
  class_names: Callable[[], Sequence[str]] = tuple

  def __post_init__(self) -> None:
    self._kept: dict[Any, Any] = {}

  def cached(self, name: Any, make: Callable[[], Any]) -> Any:
    """The value that `make` returned the first time: for what evaluators open or compile once for all their calls."""
    if name not in self._kept:
      self._kept[name] = make()
    return self._kept[name]

  def map_dataset(
    self,
    name: str,
    pipeline: Pipeline,
    batch_size: int,
    truth: Sequence[str] = (),
    shared: Mapping[str, np.ndarray] = MappingProxyType({}),
  ) -> DatasetOutputs:
    """One output over every readable record of a pipeline, with the batch fields `truth` of these records.

    The output is fed exactly the fields that it reads, of which `shared` holds those that are equal for all examples,
    such as embeddings of texts. Each process reads and computes its part; all of them return everything.
    """
    batches = [
      jax.tree.map(lambda x, fields=fields: x[fields['mask']], (values[name], fields))
      for values, fields in self.map_batches((name,), pipeline, batch_size, truth, shared=shared)
    ]
    values, fields = jax.tree.map(lambda *parts: np.concatenate(parts), *batches)
    return DatasetOutputs(values, fields['index'], {field: fields[field] for field in truth})

  def map_batches(
    self,
    names: Sequence[str],
    pipeline: Pipeline,
    batch_size: int,
    truth: Sequence[str] = (),
    own: Mapping[str, Output] = MappingProxyType({}),
    shared: Mapping[str, np.ndarray] = MappingProxyType({}),
  ) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """For each global batch of one pass in the source's order: the outputs by name, trees of arrays [B, ...], and the
    fields `truth`, 'index' int32 [B] and 'mask' bool [B].

    own     outputs of the caller, in addition to those of the model, each compiled once for its name
    shared  fields that are equal for all examples, without their batch axis

    mask is False for rows that stand in for records that cannot be read, and for those that fill up the last batch.
    """
    outputs = {name: own[name] if name in own else self._output(name) for name in names}
    program = self._program(outputs, tuple(truth))
    for local in self._batches(outputs, pipeline, batch_size, truth, shared):
      rows = len(local['index'])
      yield self._run(program, local | {field: np.broadcast_to(x, (rows, *x.shape)) for field, x in shared.items()})

  def check_dataset(
    self, name: str, pipeline: Pipeline, batch_size: int, truth: Sequence[str] = (), shared: Sequence[str] = ()
  ) -> None:
    """Raises the UserErrors of `map_dataset` that one record shows: an unknown output, fields that the data lacks."""
    self._batches({name: self._output(name)}, pipeline, batch_size, truth, shared)

  def check_texts(self) -> None:
    """Raises the UserErrors of `embed_texts` that do not depend on the texts."""
    if self.tokenizer is None:
      raise UserError('config.tokenizer: an evaluator embeds texts, but no tokenizer is configured')
    self._output('embed_text')

  def _batches(
    self,
    outputs: Mapping[str, Output],
    pipeline: Pipeline,
    batch_size: int,
    truth: Sequence[str],
    shared: Collection[str] = (),
  ) -> Iterator[dict[str, np.ndarray]]:
    """This process's batches of the fields that the outputs read, and of `truth`; reads the first record at once."""
    reads = (field for output in outputs.values() for field in output.reads if field not in shared)
    return evaluation_batches(
      pipeline.padded_as(self.example_batch),
      batch=batch_size,
      fields=tuple(dict.fromkeys((*reads, *truth))),
      tokenizer=self.tokenizer,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def map_records(
    self, names: Sequence[str], pipeline: Pipeline, batch_size: int, truth: Sequence[str] = ()
  ) -> Iterator[dict[str, Any] | None]:
    """For each record in the source's order: the outputs and the fields `truth` by name, trees of arrays [...], or None
    for an unreadable one.

    The arguments are those of `map_batches`.
    """
    left = len(pipeline.source)
    for values, fields in self.map_batches(names, pipeline, batch_size, truth):
      whole = values | {name: fields[name] for name in truth}
      for row in range(min(batch_size, left)):  # the last batch is padded
        yield jax.tree.map(lambda x, row=row: x[row], whole) if fields['mask'][row] else None
      left -= batch_size

  def embed_texts(self, texts: Sequence[str], batch_size: int) -> np.ndarray:
    """Embeddings of texts, float32 [N, E], in their order."""
    self.check_texts()
    assert self.tokenizer is not None
    tokens, program = self.tokenizer(texts), self._program({'embed_text': self._output('embed_text')}, ())
    outputs = []
    for start in range(0, len(tokens), batch_size):
      piece = tokens[start : start + batch_size]
      padded = np.concatenate([piece, np.repeat(piece[-1:], batch_size - len(piece), axis=0)])
      rows = len(padded) // jax.process_count()
      local = {'tokens': padded[jax.process_index() * rows : (jax.process_index() + 1) * rows]}
      values, _ = self._run(program, local)
      outputs.append(values['embed_text'][: len(piece)])
    return np.concatenate(outputs)

  def _run(self, program: Callable[..., Any], local: dict[str, np.ndarray]) -> Any:
    """One global batch from this process' rows."""
    self.between_batches()
    return jax.device_get(program(self.params, self.extra, to_devices(local, self.placement)))

  def _output(self, name: str) -> Output:
    outputs = {**BASELINES, **self.outputs}
    if name not in outputs:
      raise UserError(
        f'{name!r} is not an output of this model ({", ".join(self.outputs) or "none"}); {did_you_mean(name, outputs)}'
      )
    return outputs[name]

  def _program(self, outputs: Mapping[str, Output], truth: tuple[str, ...]) -> Callable[..., Any]:
    """(params, extra, batch) -> the outputs of a global batch, and its fields `truth`, 'index' and 'mask'."""

    def program(params: Any, extra: Any, batch: Any) -> Any:
      drawn = {}
      if 'index' in batch:
        drawn = {'index': batch['index'], 'rng': jax.random.fold_in(jax.random.key(0), batch['index'][0])}
      with self.placement.active():
        values = {
          name: output.call(params, extra, {**{field: batch[field] for field in output.reads}, **drawn})
          for name, output in outputs.items()
        }
      return values, {field: batch[field] for field in (*truth, 'index', 'mask') if field in batch}

    return self.cached(
      ('program', *outputs, truth), lambda: jax.jit(program, out_shardings=self.placement.replicated())
    )


def pixels(params: Any, extra: Any, batch: Mapping[str, jax.Array], side: int = 16) -> jax.Array:
  """Features that any model has to beat: float32 [B, D], the image itself, averaged to `side` x `side` pixels or so."""
  images = batch['image'].astype(jnp.float32) / 255
  step = max(1, images.shape[1] // side), max(1, images.shape[2] // side)
  window = (1, *step, 1)
  small = jax.lax.reduce_window(images, 0.0, jax.lax.add, window, window, 'VALID') / (step[0] * step[1])
  return small.reshape(len(images), -1)


BASELINES = {'pixels': Output(pixels, 'embedding')}


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
  def __call__(self, subject: EvaluatedModel) -> Metrics:
    """Measures `subject`; metrics by name, without the evaluator's own name."""


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
