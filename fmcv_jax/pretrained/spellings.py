"""Converts alternative names and shapes of the same arrays to those of the layouts.

Equivalent names and shapes are converted silently; tensors that belong to no network are dropped and noted.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from typing_extensions import override

from fmcv_jax.pretrained.arrays import Tensors

Shape = tuple[int, ...]


class _Source(NamedTuple):
  """Source of an array: its name in the file, its shape here, and the function that converts the stored array."""

  name: str
  shape: Shape
  make: Callable[[np.ndarray], np.ndarray] = lambda x: x


class Respelled(Tensors):
  """View of another set of arrays with other names and shapes."""

  def __init__(self, tensors: Tensors, sources: Mapping[str, _Source], *notes: str):
    self._tensors, self._sources = tensors, sources
    self.notes = (*tensors.notes, *notes)

  @property
  @override
  def shapes(self) -> Mapping[str, Shape]:
    return {name: source.shape for name, source in self._sources.items()}

  def __getitem__(self, name: str) -> np.ndarray:
    source = self._sources[name]
    return source.make(self._tensors[source.name])


def spellings(tensors: Tensors) -> Iterator[Tensors]:
  """Yields the arrays as stored, then with one wrapper after the other removed from their names."""
  current: Tensors | None = tensors
  while current is not None:
    yield canonical(current)
    current = _inner(current)


def canonical(tensors: Tensors) -> Tensors:
  """The tensors under the names that the layouts use, whichever version of a library wrote them."""
  for change in (_without_chunks, _with_text_model, _square_attention, _placed_registers, _without_pre_logits):
    tensors = change(tensors)
  return tensors


def starts(names: Iterable[str]) -> dict[str, int]:
  """Counts names by first component, including its dot or slash, most common first; '' for names of one component."""
  counts: dict[str, int] = {}
  for name in names:
    start = _start(name)
    counts[start] = counts.get(start, 0) + 1
  return dict(sorted(counts.items(), key=lambda item: -item[1]))


def only(tensors: Tensors, prefix: str, *notes: str) -> Tensors:
  """Arrays whose names begin with a prefix, with the prefix removed."""
  names = [name for name in tensors.shapes if name.startswith(prefix)]
  return _renamed(tensors, {name.removeprefix(prefix): name for name in names}, *notes)


def _renamed(tensors: Tensors, names: Mapping[str, str], *notes: str) -> Tensors:
  """`names`: new -> old."""
  shapes = tensors.shapes
  return Respelled(tensors, {new: _Source(old, shapes[old]) for new, old in names.items()}, *notes)


def _start(name: str) -> str:
  found = re.match(r'[^./]+[./]', name)
  return found[0] if found else ''


# Entries of self-distillation checkpoints: networks and losses at the top level, heads next to a backbone.
_DISTILLED = re.compile(r'(teacher|student|center|.*loss|criterion)[./]?')
_HEADS = re.compile(r'(head|dino_head|ibot_head|projector|projection_head)\.(mlp|last_layer2?)\..*')


def _inner(tensors: Tensors) -> Tensors | None:
  """Unwraps a checkpoint: the teacher of self-distillation, a backbone without its head, or a single common prefix."""
  names, found = tensors.shapes, starts(tensors.shapes)
  if 'teacher.' in found and all(_DISTILLED.fullmatch(start) for start in found):
    others = [start.rstrip('.') for start in found if start != 'teacher.']
    return only(tensors, 'teacher.', *(['the teacher was taken; left out: ' + ', '.join(others)] if others else []))
  if 'backbone.' in found and len(found) > 1:
    others = [name for name in names if not name.startswith('backbone.')]
    if all(_HEADS.fullmatch(name) for name in others):
      heads = sorted({_start(name).rstrip('.') for name in others})
      return only(tensors, 'backbone.', f'the backbone was taken; left out: {", ".join(heads)}')
  start = next(iter(found), '')
  return only(tensors, start) if start and len(found) == 1 else None


def _without_chunks(tensors: Tensors) -> Tensors:
  """DINOv2 trains with blocks in chunks, 'blocks.1.7.' for the seventh block, which it counts through."""
  chunk = re.compile(r'(blocks\.)\d+\.(\d+\..*)')
  if not any(re.match(r'blocks\.\d+\.\d+\.(norm1|attn)\.', name) for name in tensors.shapes):
    return tensors
  names = {chunk.sub(r'\1\2', name): name for name in tensors.shapes}
  return _renamed(tensors, names) if len(names) == len(tensors.shapes) else tensors


def _with_text_model(tensors: Tensors) -> Tensors:
  """transformers 5 and some files of Stable Diffusion have the text tower without 'text_model.'."""
  short = re.compile(r'(cond_stage_model\.transformer\.)((embeddings|encoder|final_layer_norm)\..*)')
  if not any(short.fullmatch(name) for name in tensors.shapes):
    return tensors
  return _renamed(tensors, {short.sub(r'\1text_model.\2', name): name for name in tensors.shapes})


_CONVOLVED = re.compile(r'(first_stage_model\.)?(en|de)coder\.mid\.attn_1\.(q|k|v|proj_out)\.weight')
_MULTIPLIED = re.compile(
  r'(vae\.)?(en|de)coder\.mid_block\.attentions\.0\.(to_q|to_k|to_v|to_out\.0|query|key|value|proj_attn)\.weight'
)


def _square_attention(tensors: Tensors) -> Tensors:
  """An autoencoder's attention has matrices: of CompVis as convolutions of one pixel, of diffusers without pixels."""
  shapes = tensors.shapes
  changed: dict[str, _Source] = {}
  for name, shape in shapes.items():
    square = shape[:2]
    if _CONVOLVED.fullmatch(name) and len(shape) in (2, 3):
      changed[name] = _Source(name, (*square, 1, 1), lambda x: x.reshape(*x.shape[:2], 1, 1))
    elif _MULTIPLIED.fullmatch(name) and len(shape) in (3, 4) and math.prod(shape[2:]) == 1:
      changed[name] = _Source(name, square, lambda x: x.reshape(x.shape[:2]))
  return _changed(tensors, changed)


def _changed(tensors: Tensors, changed: Mapping[str, _Source], *notes: str, left: Iterable[str] = ()) -> Tensors:
  if not changed and not left:
    return tensors
  same = {name: _Source(name, shape) for name, shape in tensors.shapes.items() if name not in set(left)}
  return Respelled(tensors, {**same, **changed}, *notes)


def _placed_registers(tensors: Tensors) -> Tensors:
  """timm can place registers behind the class token: their positions, which are added to them, become part of them."""
  shapes = tensors.shapes
  registers, places = shapes.get('reg_token', (1, 0, 0)), shapes.get('pos_embed', (1, 0, 0))
  if len(registers) != 3 or len(places) != 3 or not registers[1]:
    return tensors
  special = int('cls_token' in shapes)
  end = special + registers[1]
  if _is_square(places[1]) or _is_square(places[1] - special) or not _is_square(places[1] - end):
    return tensors
  table = tensors  # read when it is asked for

  def with_places(x: np.ndarray) -> np.ndarray:
    return x + table['pos_embed'][:, special:end]

  def without(x: np.ndarray) -> np.ndarray:
    return np.delete(x, np.s_[special:end], axis=1)

  changed = {
    'reg_token': _Source('reg_token', registers, with_places),
    'pos_embed': _Source('pos_embed', (1, places[1] - registers[1], places[2]), without),
  }
  return _changed(tensors, changed, 'the positions of the registers were added to them')


def _is_square(number: int) -> bool:
  return number > 0 and math.isqrt(number) ** 2 == number


def _without_pre_logits(tensors: Tensors) -> Tensors:
  """The layer between features and classes of ViTs trained on ImageNet-21k, which no later network has."""
  left = [name for name in tensors.shapes if re.match(r'pre_logits[./]', name)]
  if not left:
    return tensors
  left += [name for name in tensors.shapes if re.match(r'head[./]', name)]
  return _changed(tensors, {}, 'pre_logits, and the head on top of it, were left out: features are read', left=left)
