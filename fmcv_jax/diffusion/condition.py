"""Conditioning inputs of denoisers: a mapping from names to arrays, of which each network reads the keys it declares.

Keys used in this package; external networks may define others:

  label          int32 [B]; the value num_classes means 'no class'
  text           embeddings of the text tokens, float [B, L, E]
  text_mask      bool [B, L], True for real tokens; absent if all tokens are attended to
  pooled_text    sentence embedding, float [B, P]
  image          channels concatenated to x: float [B, H, W, K], such as an inpainting mask and the masked image
  control        control image of a ControlNet, float [B, rows, columns, 3] in [0, 1]
  control_scale  ControlNet conditioning scale, float [B]; 1 if absent
  second_time    float [B], a second time, for networks that predict the step between two times

A network lists its keys in `condition_keys`. Keys that are batch fields of the same name, such as `action` of a world
model, are also listed in `condition_shapes` (key -> jax.ShapeDtypeStruct of one example). Its `never_dropped`, if it
has one, lists further keys that classifier-free guidance does not drop, such as the past frames of a world model. Its
`condition_kinds` (key -> Field), if it has them, state what moves with the pixels of the image in augmentation.
"""

from collections.abc import Mapping

import jax

Condition = Mapping[str, jax.Array]

UNCONDITIONAL: Condition = {}

# Keys that classifier-free guidance does not drop: without them the network's task is another one.
NEVER_DROPPED = frozenset({'image', 'control', 'control_scale', 'second_time'})


def make_condition(**arrays: jax.Array | None) -> dict[str, jax.Array]:
  """A condition from keyword arguments; entries that are None are omitted."""
  return {name: array for name, array in arrays.items() if array is not None}
