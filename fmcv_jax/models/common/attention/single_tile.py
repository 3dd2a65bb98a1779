"""Attention over a few hundred tokens on TPUs: a Pallas kernel that keeps all logits of a head in VMEM.

XLA writes the logits and weights of such attentions to HBM several times in each direction; splash attention requires
padding to whole tiles of tokens and lanes, and heads before tokens. Here the tokens of an image are one block in the
layout of the projections, [B, T, H x K]: nothing is padded, transposed or copied, and only queries, keys and values are
saved for the backward pass, which recomputes the weights. The math follows Dao et al. 2022, algorithms 2 and 4, with
one tile.

Several heads of queries may share one of keys and values (Ainslie et al. 2023): the blocks of keys stay where they are
while those heads pass, and their gradients are summed in VMEM.

A head whose K is not a multiple of 128 lanes shares its registers with its neighbors: products run over the aligned
window of lanes around it, with zeros in place of the neighbors on one side.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fmcv_jax.models.common.attention.fused import LANES, on_devices
from fmcv_jax.parallel.rules import num_shards, platform

# Limits of one step of the kernel: bytes of blocks, which are double-buffered, and number of logits, since they are
# unrolled in the program and its length determines the compile time.
BLOCK_BYTES, BLOCK_LOGITS = 24 * 2**20, 2**20
MOST_TOKENS, MOST_LOGITS = 1280, 6 * 2**20  # bounds by VMEM size, and by half a minute of compile time
VMEM_BYTES = 64 * 2**20  # VMEM limit of the kernel
_MASKED = -1e30  # finite: fully masked queries return the mean of all values

_NN, _NT, _TN = ((((a,), (b,)), ((), ())) for a, b in ((1, 0), (1, 1), (0, 0)))


class _Logits(NamedTuple):
  """Operations on the logits of a head before the softmax.

  causal    a query attends to the keys up to its own place, and with `prefix` to those that the vector marks
  softcap   bounds the scaled logits to +-softcap by tanh; None for none
  """

  causal: bool
  prefix: bool
  softcap: float | None
  interpret: bool


def fits(queries: int, tokens: int, heads: int, dim: int) -> bool:
  """True if the kernel supports these sizes; heads that share registers must be in one block."""
  return tokens <= MOST_TOKENS and min(heads, math.lcm(dim, LANES) // dim) * queries * tokens <= MOST_LOGITS


def shares_keys(kv_heads: int, dim: int) -> bool:
  """True if the kernel reads fewer key-value heads than heads; otherwise they are to be repeated."""
  return dim % LANES == 0 and (kv_heads == 1 or kv_heads % num_shards('heads') == 0)


def short_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  valid: jax.Array | None = None,
  *,
  causal: bool = False,
  prefix: jax.Array | None = None,
  softcap: float | None = None,
) -> jax.Array:
  """query [B, Q, H, K], key and value [B, T, G, K], valid [B, T] bool (None: all) -> [B, Q, H, K].

  G is H, or a divisor of it if `shares_keys`; each of G serves H / G adjacent heads.

  prefix: bool [B, T], Q = T, the tokens that all attend to; attention after them is causal, and all tokens are valid.

  softcap: bounds the scaled logits to softcap * tanh(logits / softcap).

  Logits and softmax are float32. On platforms other than TPU the kernel is interpreted, which is slow. ValueError for
  sizes that `fits` rejects.
  """
  tokens, dim = key.shape[1], query.shape[-1]
  if not fits(query.shape[1], tokens, *query.shape[2:]):
    raise ValueError(f"attention='short': {tokens} tokens and heads of {dim} are too many for one block; use splash")

  rule = _Logits(causal, prefix is not None, softcap, platform() != 'tpu')

  def local(query: jax.Array, key: jax.Array, value: jax.Array, keys: jax.Array | None) -> jax.Array:
    bias = None if keys is None else jnp.where(keys, 0.0, _MASKED).astype(jnp.float32)
    flat = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
    return _attention(query.shape[2], rule, *flat, bias).reshape(query.shape)

  return on_devices(local, query, key, value, valid if prefix is None else prefix)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
  heads: int, rule: _Logits, query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array | None
) -> jax.Array:
  rows = None if bias is None else bias[:, None]
  return _call(_forward, heads, rule, (query, key, value), rows, (query,))[0]


def _attention_forward(heads: int, rule: _Logits, *inputs: Any) -> Any:
  return _attention(heads, rule, *inputs), inputs


def _attention_backward(heads: int, rule: _Logits, inputs: Any, gradient: jax.Array) -> Any:
  query, key, value, bias = inputs
  columns = None if bias is None else bias[:, :, None]
  args = (query, key, value, gradient.astype(query.dtype))
  return *_call(_backward, heads, rule, args, columns, (query, key, value)), None


_attention.defvjp(_attention_forward, _attention_backward)


def _call(
  kernel: Callable[..., None],
  heads: int,
  rule: _Logits,
  args: Sequence[jax.Array],
  bias: jax.Array | None,
  like: Any,
) -> list[jax.Array]:
  """Runs the kernel on each example and on as many heads at once as fit; results have the shapes of `like`."""
  # Imported here: Pallas takes a second to load, and few runs need it.
  from jax.experimental import pallas
  from jax.experimental.pallas import tpu

  batch, queries, width = args[0].shape
  tokens, dim = args[1].shape[1], width // heads
  shared = width // args[1].shape[2]  # heads of queries to one of keys
  bytes_of_a_lane = 2 * sum(x.shape[1] * x.dtype.itemsize for x in (*args, *like))
  most = min(BLOCK_BYTES // bytes_of_a_lane, BLOCK_LOGITS * dim // (queries * tokens))
  lanes = _lanes(heads, dim, most) if shared == 1 else dim

  def block(x: jax.Array) -> Any:
    if x.shape[2] == width:
      return pallas.BlockSpec((1, x.shape[1], lanes), lambda example, group, head: (example, 0, group * shared + head))
    return pallas.BlockSpec((1, x.shape[1], lanes), lambda example, group, head: (example, 0, group))

  specs = [block(x) for x in args]
  if bias is not None:
    specs.append(pallas.BlockSpec((1, *bias.shape[1:]), lambda example, group, head: (example, 0, 0)))
  # The gradients of keys and values, summed over the heads that share them.
  sums = [tpu.VMEM((tokens, lanes), jnp.float32)] * 2 if shared > 1 and kernel is _backward else []
  products = 2 if kernel is _forward else 5
  return pallas.pallas_call(
    functools.partial(kernel, dim=dim, rule=rule, masked=bias is not None),
    grid=(batch, width // lanes // shared, shared),
    in_specs=specs,
    out_specs=[block(x) for x in like],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in like],
    scratch_shapes=sums,
    interpret=rule.interpret,
    name=f'short_attention{kernel.__name__}',
    compiler_params=tpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary'), vmem_limit_bytes=VMEM_BYTES
    ),
    cost_estimate=pallas.CostEstimate(
      flops=2 * products * batch * queries * tokens * width,
      transcendentals=(1 if rule.softcap is None else 2) * batch * heads * queries * tokens,
      bytes_accessed=sum(x.nbytes for x in (*args, *like)),
    ),
  )(*args, *([] if bias is None else [bias]))


def _lanes(heads: int, dim: int, most: int) -> int:
  """Lanes of one block: as many whole heads as `most` allows, in whole registers if there is more than one block."""
  width, unit = heads * dim, math.lcm(dim, LANES)
  widths = [lanes for lanes in range(unit, width, unit) if not width % lanes] + [width]
  return max([lanes for lanes in widths if lanes <= most] or widths[:1])


def _heads(lanes: int, dim: int) -> Iterator[tuple[slice, jax.Array]]:
  """For each head the aligned window of lanes around it, and a mask of its own lanes, [1, window]."""
  for start in range(0, lanes, dim):
    first, last = start // LANES * LANES, min(-(-(start + dim) // LANES) * LANES, lanes)
    lane = first + jax.lax.broadcasted_iota(jnp.int32, (1, last - first), 1)
    yield slice(first, last), (lane >= start) & (lane < start + dim)


def _forward(query_ref: Any, key_ref: Any, value_ref: Any, *refs: Any, dim: int, rule: _Logits, masked: bool) -> None:
  bias, (out_ref,) = refs[:masked], refs[masked:]
  for window, own in _heads(query_ref.shape[2], dim):
    query, key, value = (ref[0, :, window] for ref in (query_ref, key_ref, value_ref))
    logits = _capped(_dot(jnp.where(own, query, 0), key, _NT), dim, rule.softcap)
    weights = _exponentials(_masked(logits, [ref[0] for ref in bias], rule, queries=0), dim, axis=1)
    total = jnp.sum(weights, axis=1, keepdims=True)
    _write(out_ref, window, own, _dot(weights.astype(value.dtype), value, _NN) / total)


def _backward(
  query_ref: Any,
  key_ref: Any,
  value_ref: Any,
  gradient_ref: Any,
  *refs: Any,
  dim: int,
  rule: _Logits,
  masked: bool,
) -> None:
  """Logits and weights are transposed, [T, Q], so that only one of five products transposes an operand."""
  bias, (query_out, key_out, value_out, *sums) = refs[:masked], refs[masked:]
  for window, own in _heads(query_ref.shape[2], dim):
    query, key, value, gradient = (ref[0, :, window] for ref in (query_ref, key_ref, value_ref, gradient_ref))
    query, gradient = jnp.where(own, query, 0), jnp.where(own, gradient, 0)
    logits = _capped(_dot(key, query, _NT), dim, rule.softcap)
    weights = _exponentials(_masked(logits, [ref[0] for ref in bias], rule, queries=1), dim, axis=0)
    weights = weights * (1 / jnp.sum(weights, axis=0, keepdims=True))
    of_weights = _dot(value, gradient, _NT)
    of_logits = weights * (of_weights - jnp.sum(weights * of_weights, axis=0, keepdims=True))
    if rule.softcap is not None:  # the derivative of tanh
      of_logits = of_logits * (1 - jnp.square(logits * (dim**-0.5 / rule.softcap)))
    of_logits = of_logits.astype(query.dtype)
    of_value = _dot(weights.astype(gradient.dtype), gradient, _NN)
    of_key = _dot(of_logits, query, _NN) * dim**-0.5
    if sums:
      of_key, of_value = (_sum_over_heads(*pair) for pair in zip(sums, (of_key, of_value), strict=True))
    _write(value_out, window, own, of_value)
    _write(key_out, window, own, of_key)
    _write(query_out, window, own, _dot(of_logits, key, _TN) * dim**-0.5)


def _sum_over_heads(ref: Any, x: jax.Array) -> jax.Array:
  """The sum of x over the heads so far that share the same keys."""
  from jax.experimental import pallas

  ref[...] = jnp.where(pallas.program_id(2) == 0, x, ref[...] + x)
  return ref[...]


def _dot(a: jax.Array, b: jax.Array, dimensions: Any) -> jax.Array:
  return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _capped(logits: jax.Array, dim: int, softcap: float | None) -> jax.Array:
  """Logits, which are not yet scaled by K ** -0.5, with that scale bounded to +-softcap."""
  if softcap is None:
    return logits
  # tanh by one exponential: Mosaic's own takes half of the kernel's cycles. The error is that of 1 in float32.
  tanh = 1 - 2 / (jnp.exp(logits * (2 * dim**-0.5 / softcap)) + 1)
  return softcap * dim**0.5 * tanh


def _masked(logits: jax.Array, bias: Sequence[jax.Array], rule: _Logits, *, queries: int) -> jax.Array:
  """bias: empty, or one [1, T] or [T, 1]; `queries`: the query axis of logits."""
  if rule.causal or rule.prefix:
    places = [jax.lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (queries, 1 - queries)]
    allowed = places[0] >= places[1]
  if rule.prefix:
    return logits + jnp.where(allowed, 0.0, bias[0])
  for mask in bias:
    logits = logits + mask
  return jnp.where(allowed, logits, _MASKED) if rule.causal else logits


def _exponentials(logits: jax.Array, dim: int, *, axis: int) -> jax.Array:
  """exp of the scaled logits minus their maximum along the axis."""
  return jnp.exp((logits - jnp.max(logits, axis=axis, keepdims=True)) * dim**-0.5)


def _write(ref: Any, window: slice, own: jax.Array, x: jax.Array) -> None:
  """Writes x to the lanes of this head; lanes of other heads are left unchanged."""
  ref[0, :, window] = jnp.where(own, x.astype(ref.dtype), ref[0, :, window])
