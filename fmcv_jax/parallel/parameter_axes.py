"""Logical axes of parameters, by rows that stand with the modules that make them.

A module class names the axes of its parameters in an attribute, first match first:

  class Adapter(nn.Module):
    logical_axes = ((r'(.*/)?adapter/kernel', ('embed', None)),)

Patterns match the whole path of a parameter; below a scope named `blocks`, parameters are stacked over depth, and their
leading axis is `layers`, which rows leave out. Modules outside of this package bring their rows in the same way.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax

from fmcv_jax.errors import UserError

LogicalAxes = tuple[str | None, ...]
Row = tuple[str, LogicalAxes]
Rows = Mapping[str, Sequence[Row]]  # by the class whose rows they are

T = TypeVar('T')


def trace_init(init: Callable[[], T]) -> tuple[T, dict[str, Sequence[Row]]]:
  """(shapes and dtypes of what init() returns, rows of all modules that it calls); nothing is allocated."""
  rows: dict[str, Sequence[Row]] = {}

  def collect(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    own = getattr(type(context.module), 'logical_axes', ())
    if own:
      rows[class_name(type(context.module))] = own
    return call(*args, **kwargs)

  with nn.intercept_methods(collect):
    # A new function, so that JAX has not traced it before.
    return jax.eval_shape(lambda: init()), rows


def class_name(cls: type) -> str:
  """Full name of a class, for errors: 'package.module.Class'."""
  return f'{cls.__module__}.{cls.__qualname__}'


def axes_of(path: str, shape: tuple[int, ...], first: Sequence[Row], rows: Rows) -> LogicalAxes:
  """Logical axes of the parameter at `path`, such as 'image/blocks/mlp/up/kernel'; rows in `first` precede `rows`.

  UserError where no row matches, the number of axes is not that of the shape, or two classes name different axes.
  """
  row = _first_match(path, first)
  if row is None:
    matches = {owner: match for owner, own in rows.items() if (match := _first_match(path, own))}
    if not matches:
      raise UserError(
        f'config.rules.parameters: no pattern matches the parameter {path} of shape {shape}; '
        f'add {_example(path, shape)}, or `logical_axes` to the module that makes it'
      )
    if len({axes for _, axes in matches.values()}) > 1:
      named = '; '.join(f'{owner} has {list(axes)} for {pattern!r}' for owner, (pattern, axes) in matches.items())
      raise UserError(
        f'config.rules.parameters: the axes of {path} of shape {shape} are ambiguous: {named}; '
        f'add {_example(path, shape)}, which decides'
      )
    row = next(iter(matches.values()))
  pattern, axes = row
  if 'blocks' in path.split('/'):
    axes = ('layers', *axes)
  if len(axes) != len(shape):
    raise UserError(f'config.rules.parameters: {pattern!r} names {len(axes)} axes, but {path} has shape {shape}')
  return axes


def _first_match(path: str, rows: Sequence[Row]) -> tuple[str, LogicalAxes] | None:
  return next(((pattern, tuple(axes)) for pattern, axes in rows if re.fullmatch(pattern, path)), None)


def _example(path: str, shape: tuple[int, ...]) -> str:
  count = len(shape) - ('blocks' in path.split('/'))
  return f'a row such as [{re.escape(path)!r}, [{", ".join(["null"] * count)}]]'
