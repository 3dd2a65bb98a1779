"""Ranges of config fields, as part of their types: `label_smoothing: Fraction` is a number from 0 to 1.

`config.resolve` checks them, so a value out of range is a one-line error with the field's path before anything runs.
"""

import dataclasses
import math
import re
from typing import Annotated


@dataclasses.dataclass(frozen=True)
class Interval:
  """Numbers from `low` to `high`, both included unless `above` (low itself is excluded) or `below` (high itself is)."""

  low: float = -math.inf
  high: float = math.inf
  above: bool = False
  below: bool = False

  def problem(self, value: float) -> str | None:
    """Message about an invalid value, or None; NaN and infinities are invalid."""
    inside = self.low <= value <= self.high and not (self.above and value == self.low)
    if inside and math.isfinite(value) and not (self.below and value == self.high):
      return None
    return f'expected {self}, got {value!r}'

  def __str__(self) -> str:
    low = f'above {self.low:g}' if self.above else f'at least {self.low:g}'
    high = f'below {self.high:g}' if self.below else f'at most {self.high:g}'
    parts = [text for text, end in ((low, self.low), (high, self.high)) if math.isfinite(end)]
    return 'a number ' + ' and '.join(parts) if parts else 'a finite number'


@dataclasses.dataclass(frozen=True)
class RegularExpression:
  """Text that compiles as a regular expression."""

  def problem(self, value: str) -> str | None:
    """Message about an invalid pattern, or None."""
    try:
      re.compile(value)
    except re.error as error:
      return f'{value!r} is not a regular expression: {error}'
    return None


PositiveInt = Annotated[int, Interval(1)]
NonNegativeInt = Annotated[int, Interval(0)]
PositiveFloat = Annotated[float, Interval(0, above=True)]
NonNegativeFloat = Annotated[float, Interval(0)]
Fraction = Annotated[float, Interval(0, 1)]
PositiveFraction = Annotated[float, Interval(0, 1, above=True)]
Decay = Annotated[float, Interval(0, 1, below=True)]
OpenFraction = Annotated[float, Interval(0, 1, above=True, below=True)]
Finite = Annotated[float, Interval()]  # unbounded on purpose: any sign and size has a meaning
HueShift = Annotated[float, Interval(0, 0.5)]  # half of the color wheel, in both directions
Byte = Annotated[int, Interval(0, 255)]
AxisSize = Annotated[int, Interval(-1)]  # of a mesh; -1 takes the devices that the other axes leave
Seed = Annotated[int, Interval(0, 2**32 - 1)]
Pattern = Annotated[str, RegularExpression()]
