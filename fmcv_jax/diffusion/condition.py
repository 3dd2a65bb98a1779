"""What a denoiser is conditioned on: a mapping from names to arrays, of which each network reads the keys it names.

The names that the package uses; a network outside of it may read others:

  label          int32 [B]; the number of classes itself stands for 'no class'
  text           embeddings of the text tokens, float [B, L, E]
  text_mask      bool [B, L], which of them are real tokens; absent where all are attended to
  pooled_text    embedding of the whole text, float [B, P]
  image          extra input channels, concatenated to x: float [B, H, W, K], such as an inpainting mask and the
                 masked image
  control        the control image of a ControlNet, float [B, rows, columns, 3] in [0, 1]
  control_scale  float [B], its conditioning scale; absent for 1
  second_time    float [B], a second time next to the first, for networks of a step between two times

A network names its keys in `condition_keys`, and in `condition_shapes` (key -> jax.ShapeDtypeStruct of one example)
those that are batch fields of the same name, such as `action` of a world model. Its `never_dropped`, if it has one,
names further keys that classifier-free guidance does not drop, such as the past frames of a world model.
"""

from collections.abc import Mapping

import jax

Condition = Mapping[str, jax.Array]

UNCONDITIONAL: Condition = {}

# Keys that classifier-free guidance does not drop: without them the network's task is another one.
NEVER_DROPPED = frozenset({'image', 'control', 'control_scale', 'second_time'})


def make_condition(**arrays: jax.Array | None) -> dict[str, jax.Array]:
  """A condition of the arrays that are given: entries that are None are left out."""
  return {name: array for name, array in arrays.items() if array is not None}
