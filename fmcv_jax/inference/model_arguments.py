"""Checks of the arguments of `Model`: images, lists of texts, templates and dtypes; and probabilities from scores."""

import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, get_args

import numpy as np

from fmcv_jax.config import paths_of
from fmcv_jax.data.sources.in_memory import ImageLike, InMemoryImages
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.models.common.layers import Dtype
from fmcv_jax.run import Run


def image_source(images: Sequence[ImageLike] | np.ndarray) -> InMemoryImages:
  """Several images as a source; UserError for none, and for a file that does not exist."""
  if len(images) == 0:
    raise UserError('images: give at least one image')
  for image in images:
    if isinstance(image, (str, os.PathLike)) and not os.path.isfile(image):
      if os.path.isdir(image):
        raise UserError(f'images: {os.fspath(image)!r} is a folder; give the files in it')
      raise UserError(f'images: no file {os.fspath(image)!r} (relative to {os.getcwd()})')
  return InMemoryImages(images)


def checked_templates(templates: str | Sequence[str]) -> Sequence[str]:
  """Templates as a sequence; UserError for none, and for one without a single '{}'."""
  templates = [templates] if isinstance(templates, str) else templates
  if not templates or (bad := [template for template in templates if template.count('{}') != 1]):
    raise UserError(f"templates: each needs one '{{}}' for the label, got {bad[0] if templates else templates!r}")
  return templates


def text_list(argument: str, texts: Any) -> list[str]:
  """Texts as a list; UserError for anything that is not a text."""
  if not isinstance(texts, Iterable):
    raise UserError(f'{argument}: expected a list of texts, got {type(texts).__name__}')
  listed_texts = list(texts)
  for at, text in enumerate(listed_texts):
    if not isinstance(text, str):
      raise UserError(f'{argument}: item {at} is {type(text).__name__}, not a text')
  return listed_texts


def softmax(scores: np.ndarray) -> np.ndarray:
  """Probabilities along the last axis."""
  shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
  return shifted / shifted.sum(axis=-1, keepdims=True)


def dtypes_of(workdir: str | pathlib.Path) -> list[str]:
  """Config paths of all `dtype` fields of the objective."""
  return paths_of(Run.reopen(workdir).config['objective'], 'dtype', 'objective')


def computing_in(dtype: str, workdir: str) -> tuple[str, ...]:
  """The config overrides that set the computation dtype. Raises UserError where a model cannot compute in it."""
  known = get_args(Dtype)
  if dtype not in known:
    raise UserError(f'dtype: {dtype!r} is not one of {", ".join(map(repr, known))}; {did_you_mean(dtype, known)}')
  paths = dtypes_of(workdir)
  if not paths and dtype != 'float32':
    raise UserError(f'dtype: the network of {workdir} computes in float32 only, got {dtype!r}')
  return tuple(f'{path}={dtype}' for path in paths)
