"""Files of a model's outputs, written by their kind: PNG, animated PNG, JSON lines and NPZ."""

import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import IO, Any

import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.data.tokenizers import Tokenizer
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.text_generator import decode_generated
from fmcv_jax.inference.image_files import make_grid, save_png
from fmcv_jax.objectives.outputs import Kind
from fmcv_jax.parallel.distributed import is_main
from fmcv_jax.parallel.rules import path_of

UNREADABLE = 'the image cannot be read'
_RANGE_TOLERANCE = 1e-3  # of float images, whose range is [0, 1]


def files_of(folder: pathlib.Path, name: str) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
  """Paths that `write_output` may write: the JSON lines, the NPZ file, and the folder of files per input."""
  return folder / f'{name}.jsonl', folder / f'{name}.npz', folder / name


def write_output(
  name: str,
  kind: Kind,
  records: Iterable[tuple[str, Any]],
  folder: str | pathlib.Path,
  *,
  class_names: Sequence[str] = (),
  tokenizer: Tokenizer | None = None,
  input_size: tuple[int, int] | None = None,
  about: Mapping[str, Any] | None = None,
  frames_per_second: float = 8.0,
) -> tuple[int, int]:
  """Writes an output of N inputs as its kind is read; returns the numbers of inputs that are written and left out.

  FOLDER/NAME.jsonl has one row per input, in order: its 'file', and 'error' for one without a value, or

    tokens          'tokens' int [L], and their 'text' where there is a tokenizer
    boxes           'boxes' [N, 4] and the other arrays of the output, 'names' of the classes, and 'input_width' and
                    'input_height', the size of the image that the boxes are in, in pixels
    logits          'classes': index, name and logit of each, largest first; without class names, as an embedding
    image, video    'output', a PNG: NAME/000000.png. Axes before those of the image are columns; float values in [0, 1]
                    become 8 bits. A video is an animated PNG that repeats
    masks, map      'output': a PNG of 8 bits (bool: 0 and 255) or 16 bits for [rows, columns] of bool, uint8 and
                    uint16, otherwise an NPZ of the input's own
    embedding, array, and anything else: 'row' in NAME.npz, whose 'files' are the inputs

  Arrays keep their dtypes in an NPZ, except bfloat16, which becomes float32. It has an array per leaf of the output:
  NAME, or 'NAME/key' for a tree.

  records      (file, tree of arrays [...]) of each input, or (file, None) for one that cannot be read
  about        kept in the text chunk 'fmcv' of each PNG, with the file and, for a video, the frames per second

  Nothing is overwritten: raises UserError where one of the files exists. Also raises it for values that the kind does
  not allow: images outside of [0, 1] or not finite, and another number of logits than of class names.

  All processes iterate over the records; the first one writes.
  """
  folder = pathlib.Path(folder)
  check_free(folder, name)
  if not is_main():
    done = [value is not None for _, value in records]
    return sum(done), len(done) - sum(done)
  lines, archive, pieces = files_of(folder, name)
  table: dict[str, list[np.ndarray]] = {}
  files: list[str] = []
  left_out = 0

  def in_table(value: Any) -> dict[str, Any]:
    for key, array in _arrays(name, value).items():
      table.setdefault(key, []).append(array)
    return {'row': len(files)}

  def own_file(number: int, suffix: str, save: Callable[[pathlib.Path], None]) -> dict[str, Any]:
    pieces.mkdir(exist_ok=True)
    save(pieces / f'{number:06d}{suffix}')
    return {'output': f'{name}/{number:06d}{suffix}'}

  def row_of(number: int, file: str, value: Any) -> dict[str, Any]:
    noted = {'file': file, **(about or {})}
    if kind == 'tokens':
      return _tokens(np.asarray(value), tokenizer)
    if kind == 'boxes':
      return _boxes(value, class_names, input_size)
    if kind == 'logits' and class_names:
      return {'classes': _classes(name, np.asarray(value), class_names)}
    if kind in ('image', 'video'):
      image = _in_columns(eight_bits(name, np.asarray(value)), axes=3 if kind == 'image' else 4)
      noted |= {'frames_per_second': frames_per_second} if kind == 'video' else {}
      return own_file(number, '.png', lambda path: save_png(image, path, noted, frames_per_second=frames_per_second))
    if kind in ('masks', 'map'):
      if (gray := _gray(value)) is not None:
        return own_file(number, '.png', lambda path: save_png(gray, path, noted))
      return own_file(number, '.npz', lambda path: np.savez(path, **_arrays(name, value)))
    return in_table(value)

  folder.mkdir(parents=True, exist_ok=True)
  with lines.open('x', encoding='utf-8') as output:
    for number, (file, value) in enumerate(records):
      if value is None:
        left_out += 1
        write_row(output, {'file': file, 'error': UNREADABLE})
        continue
      write_row(output, {'file': file, **row_of(number, file, value)})
      files.append(file)
  if table:
    columns: dict[str, Any] = {key: np.stack(rows) for key, rows in table.items()}
    np.savez(archive, files=np.array(files), **columns)
  return len(files), left_out


def check_free(folder: pathlib.Path, name: str) -> None:
  """Raises UserError if `write_output` would overwrite something, or the folder is a file."""
  if folder.exists() and not folder.is_dir():
    raise UserError(f'{folder}: is a file; give a folder')
  if there := [path for path in files_of(folder, name) if path.exists()]:
    raise UserError(f'{there[0]}: exists and would be overwritten; move it, or give another folder')


def write_row(output: IO[str], row: Mapping[str, Any]) -> None:
  """Appends one JSON object as a line, complete when this returns. Numbers that JSON does not have become null."""
  output.write(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + '\n')
  output.flush()


def _finite(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


def storable(value: Any) -> np.ndarray:
  """The array with a dtype that numpy has: bfloat16 becomes float32, the others stay."""
  value = np.asarray(value)
  return value.astype(np.float32) if value.dtype == jnp.bfloat16 else value


def eight_bits(name: str, images: np.ndarray) -> np.ndarray:
  """Images in [0, 1] as uint8; UserError, which names the output, for values outside. uint8 stays as it is."""
  if images.dtype == np.uint8:
    return images
  images = np.asarray(images, np.float32)
  low, high = (float(images.min()), float(images.max())) if np.isfinite(images).all() else (math.nan, math.nan)
  if not (low >= -_RANGE_TOLERANCE and high <= 1 + _RANGE_TOLERANCE):
    raise UserError(f'{name}: values from {low:g} to {high:g} are not an image, whose values lie in [0, 1]')
  return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def _in_columns(images: np.ndarray, axes: int) -> np.ndarray:
  """[..., H, W, 3] (or a clip, axes=4) as one image: those of the leading axes next to each other."""
  if images.ndim == axes:
    return images
  images = images.reshape(-1, *images.shape[-axes:])
  return make_grid(images, columns=len(images))


def _gray(value: Any) -> np.ndarray | None:
  """A map that a PNG holds without loss, as uint8 or uint16 [rows, columns]; None for others."""
  if not isinstance(value, (np.ndarray, jax.Array)) or value.ndim != 2:
    return None
  value = np.asarray(value)
  if value.dtype == bool:
    return value.astype(np.uint8) * 255
  return value if value.dtype in (np.uint8, np.uint16) else None


def _arrays(name: str, value: Any) -> dict[str, Any]:
  """The arrays of a tree, as an NPZ names them."""
  leaves = jax.tree_util.tree_flatten_with_path(value)[0]
  return {'/'.join(filter(None, (name, path_of(path)))): storable(x) for path, x in leaves}


def _tokens(value: np.ndarray, tokenizer: Tokenizer | None) -> dict[str, Any]:
  row: dict[str, Any] = {'tokens': value.tolist()}
  return row if tokenizer is None else {'text': decode_generated(tokenizer, value[None])[0], **row}


def _boxes(value: Mapping[str, Any], names: Sequence[str], input_size: tuple[int, int] | None) -> dict[str, Any]:
  row = {key: storable(x).tolist() for key, x in value.items()}
  if names and 'classes' in value:
    row['names'] = [names[at] if 0 <= at < len(names) else None for at in row['classes']]
  if input_size is not None:
    row |= {'input_width': input_size[1], 'input_height': input_size[0]}
  return row


def _classes(name: str, logits: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
  if logits.shape != (len(names),):
    raise UserError(f'{name}: {list(logits.shape)} logits of one image, but {len(names)} class names')
  values = storable(logits).astype(float)
  order = np.argsort(-values, kind='stable')
  return [{'index': int(at), 'name': names[at], 'logit': float(values[at])} for at in order]
