"""Vision and text transformers as Google's releases name them: ViT and AugReg, and big_vision's, SigLIP among them."""

from collections.abc import Iterable, Iterator

from fmcv_jax.pretrained.layout import (
  BATCHED,
  INTO_HEADS,
  OUT_OF_HEADS,
  SCALAR_AS_1D,
  ArrayTransform,
  Layout,
  Row,
  Rows,
  patches,
  with_prefix,
)


def _plain(ours: str, theirs: str, *leaves: str) -> Rows:
  return tuple(Row(f'{ours}/{leaf}', f'{theirs}/{leaf}') for leaf in leaves)


def _attention(ours: str, theirs: str) -> Rows:
  into = tuple(
    Row(f'{ours}/{part}/{leaf}', f'{theirs}/{part}/{leaf}', INTO_HEADS)
    for part in ('query', 'key', 'value')
    for leaf in ('kernel', 'bias')
  )
  return (
    *into,
    Row(f'{ours}/out/kernel', f'{theirs}/out/kernel', OUT_OF_HEADS),
    Row(f'{ours}/out/bias', f'{theirs}/out/bias'),
  )


def _mlp(ours: str, theirs: str) -> Rows:
  return (
    *_plain(f'{ours}/up', f'{theirs}/Dense_0', 'kernel', 'bias'),
    *_plain(f'{ours}/down', f'{theirs}/Dense_1', 'kernel', 'bias'),
  )


def _blocks(theirs: str, numbers: tuple[int, int, int, int] = (0, 0, 1, 0)) -> Rows:
  """`numbers` as flax counted the parts of a block: of its first norm, attention, second norm and MLP."""
  first, attention, second, mlp = numbers
  return (
    *_plain('blocks/norm1', f'{theirs}/LayerNorm_{first}', 'scale', 'bias'),
    *_attention('blocks/attention', f'{theirs}/MultiHeadDotProductAttention_{attention}'),
    *_plain('blocks/norm2', f'{theirs}/LayerNorm_{second}', 'scale', 'bias'),
    *_mlp('blocks/mlp', f'{theirs}/MlpBlock_{mlp}'),
  )


def _tower(position: str, blocks: Iterable[Row], position_form: ArrayTransform = BATCHED) -> Rows:
  return (
    Row('class_token', 'cls', BATCHED),
    Row('position', position, position_form),
    Row('patch/kernel', 'embedding/kernel', patches(3)),
    Row('patch/bias', 'embedding/bias'),
    *blocks,
    *_plain('norm', 'Transformer/encoder_norm', 'scale', 'bias'),
    *_plain('head', 'head', 'kernel', 'bias'),
  )


def augreg() -> Layout:
  """The .npz files of Dosovitskiy et al. 2021 and Steiner et al. 2022."""
  blocks = _blocks('Transformer/encoderblock_{i}', (0, 1, 2, 3))
  return Layout(_tower('Transformer/posembed_input/pos_embedding', blocks))


def _image(*, stacked: bool) -> Rows:
  block = 'Transformer/encoderblock' if stacked else 'Transformer/encoderblock_{i}'
  pool = 'MAPHead_0'
  return (
    *_tower('pos_embedding', _blocks(block)),
    Row('map_pool/probe', f'{pool}/probe', BATCHED),
    *_attention('map_pool/attention', f'{pool}/MultiHeadDotProductAttention_0'),
    *_plain('map_pool/norm', f'{pool}/LayerNorm_0', 'scale', 'bias'),
    *_mlp('map_pool/mlp', f'{pool}/MlpBlock_0'),
  )


def _text(*, stacked: bool) -> Rows:
  block = 'Encoder_0/encoderblock' if stacked else 'Encoder_0/encoderblock_{i}'
  return (
    Row('tokens/embedding', 'Embed_0/embedding'),
    Row('position', 'pos_embedding', BATCHED),
    *_blocks(block),
    *_plain('norm', 'Encoder_0/encoder_norm', 'scale', 'bias'),
    *_plain('head', 'head', 'kernel', 'bias'),
  )


def big_vision(prefix: str = 'params/') -> Iterator[Layout]:
  """ViTs of big_vision, layers apart or stacked; `prefix` 'params/img/' for the image tower of a pair."""
  for stacked in (False, True):
    yield Layout(with_prefix('', _image(stacked=stacked), prefix))


def siglip_text() -> Iterator[Layout]:
  """SigLIP's text tower alone."""
  for stacked in (False, True):
    yield Layout(with_prefix('', _text(stacked=stacked), 'params/txt/'))


def siglip() -> Iterator[Layout]:
  """SigLIP (Zhai et al. 2023) and, stacked, SigLIP 2 (Tschannen et al. 2025)."""
  for stacked in (False, True):
    rows = (
      *with_prefix('image', _image(stacked=stacked), 'params/img/'),
      *with_prefix('text', _text(stacked=stacked), 'params/txt/'),
      Row('temperature', 'params/t', SCALAR_AS_1D),
      Row('bias', 'params/b', SCALAR_AS_1D),
    )
    yield Layout(rows)
