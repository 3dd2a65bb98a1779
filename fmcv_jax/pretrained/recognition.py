"""Detects the family and layout of a checkpoint from its tensor names and shapes."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.pretrained.arrays import Tensors
from fmcv_jax.pretrained.families import FAMILIES, by_signs
from fmcv_jax.pretrained.layout import Layout, Shape
from fmcv_jax.pretrained.shape_inference import MissingPath, Shapes, has, infer_shapes, name_of
from fmcv_jax.pretrained.spellings import only, spellings, starts
from fmcv_jax.pretrained.unread import seems


class Recognized(NamedTuple):
  """Result of the detection.

  name         its family
  format_name  format of the layout
  shapes       shapes of our parameters in the checkpoint, by path
  tensors      arrays of the checkpoint, as the layout names and shapes them
  config       config of the network and of its preprocessing
  """

  name: str
  format_name: str
  layout: Layout
  shapes: Shapes
  tensors: Tensors
  config: dict[str, Any]


class _Complaint(NamedTuple):
  """Reason to reject a layout, and its distance: the number of unknown names, or less."""

  distance: float
  text: str


def recognize(tensors: Tensors, name: str | None, what: str) -> Recognized:
  """Detects the family and layout; `name` None tries all families. Reads names and shapes only, no data.

  UserError for an unknown name, for arrays that fit no layout, with the nearest layout's complaint, and for a missing
  array without which the network's size cannot be inferred.
  """
  family, size = (None, ()) if name is None else _named(name)
  candidates = [family] if family else list(FAMILIES)
  best = _Complaint(math.inf, '')
  for spelled in spellings(tensors):
    for found in _matches(spelled, candidates, best.distance):
      if isinstance(found, _Complaint):
        best = min(best, found, key=lambda complaint: complaint.distance)
        continue
      own, format_name, layout, shapes = found
      own = own if family else by_signs(own, shapes)
      config = _config(own, layout, shapes, what)
      _check_size(size, config, f'--as {name}: {what}')
      return Recognized(own, format_name, layout, shapes, spelled, config)
  raise UserError(f'{what}: {_refusal(tensors, candidates, best)}')


def _matches(
  tensors: Tensors, candidates: list[str], limit: float
) -> Iterator[_Complaint | tuple[str, str, Layout, Shapes]]:
  """Yields each matching layout, or a complaint for one that does not match."""
  for candidate in candidates:
    for format_name, layout in FAMILIES[candidate].layouts:
      shapes, unknown = infer_shapes(layout, tensors, limit)
      missing = next((part for part in FAMILIES[candidate].parts if not has(shapes, part)), None)
      if unknown:
        limit = min(limit, len(unknown))
        yield _Complaint(len(unknown), _unknown(unknown, tensors.shapes, candidates))
      elif not shapes:
        yield _Complaint(math.inf, '')
      elif not _mlps_agree(shapes):
        yield _Complaint(0.5, f'{name_of(layout, "blocks/mlp/down/kernel")} takes other widths than its MLP has')
      elif missing is not None:
        first = next(row.ours for row in layout.rows if row.ours.startswith(missing))
        yield _Complaint(0.5, f'{name_of(layout, first)} is missing, and all else of {missing.rstrip("/")}')
      else:
        yield candidate, format_name, layout, shapes


def _unknown(names: list[str], shapes: Mapping[str, Shape], candidates: list[str]) -> str:
  name = min(names)
  more = f' and {len(names) - 1} more' if len(names) > 1 else ''
  return f'no layout of {_whose(candidates)} contains {name} of the shape {tuple(shapes[name])}{more}'


def _whose(candidates: list[str]) -> str:
  return f'family {candidates[0]!r}' if len(candidates) == 1 else 'any family'


def _config(name: str, layout: Layout, shapes: Shapes, what: str) -> dict[str, Any]:
  try:
    for row in layout.rows:
      if row.ours.endswith('mlp/gate/kernel') and row.ours.replace('gate', 'up') in shapes:
        shapes[row.ours]  # its names are those of a gated MLP alone
    return FAMILIES[name].config(shapes)
  except MissingPath as missing:
    raise UserError(f'{what}: {name_of(layout, missing.path)} is missing, for a checkpoint of {name!r}') from missing
  except UserError as error:
    raise UserError(f'{what}: {error}') from error


def _refusal(tensors: Tensors, candidates: list[str], best: _Complaint) -> str:
  if not tensors.shapes:
    return 'is empty'
  if other := seems(tensors.shapes):
    return f'seems to be {other}'
  if doubt := _doubt(tensors, candidates, best.distance):
    return doubt
  return best.text or f'holds nothing of {_whose(candidates)}'


def _doubt(tensors: Tensors, candidates: list[str], distance: float) -> str | None:
  """Message if tensors below one prefix form a network and fewer than `distance` others are outside it; else None."""
  found = starts(tensors.shapes)
  for start, count in found.items():
    if not start or not 0 < len(tensors.shapes) - count < distance:
      continue
    inner = only(tensors, start)
    for spelled in spellings(inner):
      for match in _matches(spelled, candidates, 0):
        if not isinstance(match, _Complaint):
          others = sorted(name for name in tensors.shapes if not name.startswith(start))
          more = f' and {len(others) - 1} more' if len(others) > 1 else ''
          return (
            f'the tensors below {start!r} look like {match[0]!r}, but the file also has {others[0]}{more}; '
            'save only the tensors of the network to a file of their own'
          )
  return None


def _named(name: str) -> tuple[str, tuple[str, ...]]:
  """The family of 'dinov2', or of 'dinov2_l14' with what its shapes then have to be."""
  if name in FAMILIES:
    return name, ()
  spelled = {family: family for family in FAMILIES} | {'sd15': 'sd1', 'controlnet_sd15': 'controlnet_sd1'}
  for spelling in sorted(spelled, key=len, reverse=True):
    if f'{name}_'.startswith(f'{spelling}_'):
      return spelled[spelling], tuple(name[len(spelling) + 1 :].split('_')) if name != spelling else ()
  raise UserError(f'--as {name}: unknown family; {did_you_mean(name, FAMILIES)}')


def _check_size(words: tuple[str, ...], config: Mapping[str, Any], what: str) -> None:
  """Raises UserError unless the network has the requested size: its variant, and distilled or not."""
  network = config['objective']['network']
  network = network.get('image') or network.get('encoder') or network
  size = network.get('variant', '').lower().replace('/', '').replace('-', '')
  is_named = 'width' not in network and 'block_out_channels' not in network
  for word in words:
    if not (word == size and is_named if word != 'distilled' else network.get('distilled')):
      found = f'of the size {network["variant"]}' if is_named else 'of no named size'
      raise UserError(f'{what} is {found}, not {word}')


def _mlps_agree(shapes: Mapping[str, Shape]) -> bool:
  """True if up and down projections of MLPs agree in width: timm gives gated and plain MLPs the same names."""
  ups = (path for path in shapes if path.endswith('mlp/up/kernel'))
  downs = ((shapes[path], shapes.get(path.replace('mlp/up', 'mlp/down'))) for path in ups)
  return all(down is None or up[-1] == down[-2] for up, down in downs)
