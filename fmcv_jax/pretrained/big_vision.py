"""Vision and text transformers as Google's releases name them: ViT and AugReg, and big_vision's, SigLIP among them."""

import itertools
from collections.abc import Iterable, Iterator

from fmcv_jax.pretrained.layout import (
  BATCHED,
  ONE,
  Form,
  Layout,
  Row,
  Rows,
  below,
  into_heads,
  out_of_heads,
  patches,
)

HEAD_WIDTHS = (64, 72, 80, 88, 96, 104)  # those of S to L, So400m, H, g, g-opt, G


def _plain(ours: str, theirs: str, *leaves: str) -> Rows:
  return tuple(Row(f'{ours}/{leaf}', f'{theirs}/{leaf}') for leaf in leaves)


def _attention(ours: str, theirs: str, width: int) -> Rows:
  into = tuple(
    Row(f'{ours}/{part}/{leaf}', f'{theirs}/{part}/{leaf}', into_heads(width))
    for part in ('query', 'key', 'value')
    for leaf in ('kernel', 'bias')
  )
  return (
    *into,
    Row(f'{ours}/out/kernel', f'{theirs}/out/kernel', out_of_heads(width)),
    Row(f'{ours}/out/bias', f'{theirs}/out/bias'),
  )


def _mlp(ours: str, theirs: str) -> Rows:
  return (
    *_plain(f'{ours}/up', f'{theirs}/Dense_0', 'kernel', 'bias'),
    *_plain(f'{ours}/down', f'{theirs}/Dense_1', 'kernel', 'bias'),
  )


def _blocks(theirs: str, width: int, numbers: tuple[int, int, int, int] = (0, 0, 1, 0)) -> Rows:
  """`numbers` as flax counted the parts of a block: of its first norm, attention, second norm and MLP."""
  first, attention, second, mlp = numbers
  return (
    *_plain('blocks/norm1', f'{theirs}/LayerNorm_{first}', 'scale', 'bias'),
    *_attention('blocks/attention', f'{theirs}/MultiHeadDotProductAttention_{attention}', width),
    *_plain('blocks/norm2', f'{theirs}/LayerNorm_{second}', 'scale', 'bias'),
    *_mlp('blocks/mlp', f'{theirs}/MlpBlock_{mlp}'),
  )


def _tower(position: str, blocks: Iterable[Row], position_form: Form = BATCHED) -> Rows:
  return (
    Row('class_token', 'cls', BATCHED),
    Row('position', position, position_form),
    Row('patch/kernel', 'embedding/kernel', patches(3)),
    Row('patch/bias', 'embedding/bias'),
    *blocks,
    *_plain('norm', 'Transformer/encoder_norm', 'scale', 'bias'),
    *_plain('head', 'head', 'kernel', 'bias'),
  )


def augreg() -> Iterator[Layout]:
  """The .npz files of Dosovitskiy et al. 2021 and Steiner et al. 2022, one layout for each width of a head."""
  for width in HEAD_WIDTHS:
    blocks = _blocks('Transformer/encoderblock_{i}', width, (0, 1, 2, 3))
    yield Layout(_tower('Transformer/posembed_input/pos_embedding', blocks))


def _image(width: int, *, stacked: bool) -> Rows:
  block = 'Transformer/encoderblock' if stacked else 'Transformer/encoderblock_{i}'
  pool = 'MAPHead_0'
  return (
    *_tower('pos_embedding', _blocks(block, width)),
    Row('map_pool/probe', f'{pool}/probe', BATCHED),
    *_attention('map_pool/attention', f'{pool}/MultiHeadDotProductAttention_0', width),
    *_plain('map_pool/norm', f'{pool}/LayerNorm_0', 'scale', 'bias'),
    *_mlp('map_pool/mlp', f'{pool}/MlpBlock_0'),
  )


def _text(width: int, *, stacked: bool) -> Rows:
  block = 'Encoder_0/encoderblock' if stacked else 'Encoder_0/encoderblock_{i}'
  return (
    Row('tokens/embedding', 'Embed_0/embedding'),
    Row('position', 'pos_embedding', BATCHED),
    *_blocks(block, width),
    *_plain('norm', 'Encoder_0/encoder_norm', 'scale', 'bias'),
    *_plain('head', 'head', 'kernel', 'bias'),
  )


def _variants() -> Iterator[tuple[int, bool]]:
  yield from itertools.product(HEAD_WIDTHS, (False, True))


def big_vision(prefix: str = 'params/') -> Iterator[Layout]:
  """ViTs of big_vision, layers apart or stacked; `prefix` 'params/img/' for the image tower of a pair."""
  for width, stacked in _variants():
    yield Layout(below('', _image(width, stacked=stacked), prefix))


def siglip_text() -> Iterator[Layout]:
  """SigLIP's text tower alone."""
  for width, stacked in _variants():
    yield Layout(below('', _text(width, stacked=stacked), 'params/txt/'))


def siglip() -> Iterator[Layout]:
  """SigLIP (Zhai et al. 2023) and, stacked, SigLIP 2 (Tschannen et al. 2025), whose g-opt reads with So400m's tower."""
  for image, text in (*((width, width) for width in HEAD_WIDTHS), (96, 72)):
    for stacked in (False, True):
      rows = (
        *below('image', _image(image, stacked=stacked), 'params/img/'),
        *below('text', _text(text, stacked=stacked), 'params/txt/'),
        Row('temperature', 'params/t', ONE),
        Row('bias', 'params/b', ONE),
      )
      yield Layout(rows)
