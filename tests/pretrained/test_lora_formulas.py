"""Merged weights against the published formulas in float64, for all kinds of adapters, ranks, alphas and dtypes."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from fmcv_jax.errors import UserError
from fmcv_jax.pretrained.layout import LINEAR, POINT, SAME, SPATIAL, Layout, Row
from fmcv_jax.pretrained.lora.adapter_file import AdapterFile
from fmcv_jax.pretrained.lora.merge import merge

# A network of one layer of each kind: stacked matrices, queries and values in one matrix, convolutions of one pixel and
# of 3 x 3, a norm and an embedding.
LAYOUT = Layout(
  (
    Row('blocks/up/kernel', 'blocks.{i}.up.weight', LINEAR),
    Row('blocks/up/bias', 'blocks.{i}.up.bias'),
    Row('query/kernel', 'qv.weight', LINEAR),
    Row('value/kernel', 'qv.weight', LINEAR),
    Row('enter/kernel', 'proj_in.weight', POINT),
    Row('conv/kernel', 'conv.weight', SPATIAL),
    Row('norm/scale', 'norm.weight'),
    Row('norm/bias', 'norm.bias'),
    Row('tokens/embedding', 'tokens.weight', SAME),
  )
)
SHAPES = {
  'blocks/up/kernel': (3, 6, 8),
  'blocks/up/bias': (3, 8),
  'query/kernel': (6, 4),
  'value/kernel': (6, 4),
  'enter/kernel': (6, 8),
  'conv/kernel': (3, 3, 6, 8),
  'norm/scale': (8,),
  'norm/bias': (8,),
  'tokens/embedding': (8, 6),
}
RNG = np.random.default_rng(0)
PARAMS = {path: RNG.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}


def theirs(name, params=PARAMS):
  """An array in the shape that PyTorch has it, float64."""
  params = {path: x.astype(np.float64) for path, x in params.items()}
  return {
    'up.0': params['blocks/up/kernel'][0].T,
    'up.2': params['blocks/up/kernel'][2].T,
    'up.1': params['blocks/up/kernel'][1].T,
    'qv': np.concatenate([params['query/kernel'].T, params['value/kernel'].T]),
    'proj_in': params['enter/kernel'].T[..., None, None],
    'conv': params['conv/kernel'].transpose(3, 2, 0, 1),
    'tokens': params['tokens/embedding'],
  }[name]


def merged(folder, tensors, scale=1.0, metadata=None, config=None):
  file = folder / 'adapter_model.safetensors'
  save_file({key: np.asarray(x) for key, x in tensors.items()}, file, metadata)
  (folder / 'adapter_config.json').unlink(missing_ok=True)
  if config is not None:
    (folder / 'adapter_config.json').write_text(json.dumps(config))
  return {**PARAMS, **merge(AdapterFile(str(file)), scale, [LAYOUT], PARAMS, 'the test network')}


def drawn(seed, dtype, **shapes):
  rng = np.random.default_rng(seed)
  return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def as64(x):
  return np.asarray(x).astype(np.float64)


# Layer of the file, its place above, and the shape of its weight.
LAYERS = [
  ('blocks.2.up', 'up.2', (8, 6)),
  ('qv', 'qv', (8, 6)),
  ('proj_in', 'proj_in', (8, 6, 1, 1)),
  ('conv', 'conv', (8, 6, 3, 3)),
]
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp('adapters')


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
  layer=st.sampled_from(LAYERS),
  rank=st.integers(1, 9),
  alpha=st.none() | st.floats(0.25, 32),
  dtype=st.sampled_from(DTYPES),
  scale=st.sampled_from([1.0, 0.8, -0.5]),
  kohya=st.booleans(),
)
def test_lora_adds_alpha_over_rank_times_up_down(folder, layer, rank, alpha, dtype, scale, kohya):
  name, place, (out, into, *pixels) = layer
  x = drawn(rank, dtype, down=(rank, into, *pixels), up=(out, rank, *(1 for _ in pixels)))
  if kohya:
    start = f'lora_unet_{name.replace(".", "_")}'
    tensors = {f'{start}.lora_down.weight': x['down'], f'{start}.lora_up.weight': x['up']}
  else:
    start = f'diffusion_model.{name}'
    tensors = {f'{start}.lora_A.weight': x['down'], f'{start}.lora_B.weight': x['up']}
  if alpha is not None:
    tensors[f'{start}.alpha'] = np.array(alpha, dtype)
    alpha = float(tensors[f'{start}.alpha'])
  factor = scale * (1.0 if alpha is None else alpha / rank)
  after = merged(folder, tensors, scale)
  delta = np.einsum('or,ri...->oi...', as64(x['up']).reshape(out, rank), as64(x['down']))
  expected = theirs(place) + factor * delta
  bound = 1e-6 * (np.abs(theirs(place)) + abs(factor) * np.abs(delta).max() + 1)
  np.testing.assert_array_less(np.abs(theirs(place, after) - expected), bound)
  changed = {path for path in SHAPES if not np.array_equal(after[path], PARAMS[path])}
  assert (
    changed
    == {
      'up.2': {'blocks/up/kernel'},
      'qv': {'query/kernel', 'value/kernel'},
      'proj_in': {'enter/kernel'},
      'conv': {'conv/kernel'},
    }[place]
  )
  np.testing.assert_array_equal(after['blocks/up/kernel'][:2], PARAMS['blocks/up/kernel'][:2])


def close(after, place, expected):
  np.testing.assert_allclose(theirs(place, after), expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_ranks_and_alphas_are_those_of_each_layer(folder):
  x = drawn(1, np.float32, a=(2, 6), b=(8, 2), c=(5, 6), d=(8, 5))
  keys = {'lora_unet_blocks_0_up.lora_down.weight': x['a'], 'lora_unet_blocks_0_up.lora_up.weight': x['b']}
  keys |= {'lora_unet_blocks_1_up.lora_down.weight': x['c'], 'lora_unet_blocks_1_up.lora_up.weight': x['d']}
  after = merged(folder, {**keys, 'lora_unet_blocks_0_up.alpha': np.float32([16.0])})
  close(after, 'up.0', theirs('up.0') + 8 * as64(x['b']) @ as64(x['a']))
  close(after, 'up.1', theirs('up.1') + as64(x['d']) @ as64(x['c']))  # no alpha: that of its rank


def test_a_tucker_convolution(folder):
  x = drawn(2, np.float32, down=(4, 6, 1, 1), up=(8, 4, 1, 1), mid=(4, 4, 3, 3))
  keys = {f'lora_unet_conv.lora_{part}.weight': array for part, array in x.items()}
  delta = np.einsum('oa,abkl,bi->oikl', as64(x['up'])[..., 0, 0], as64(x['mid']), as64(x['down'])[..., 0, 0])
  close(merged(folder, {**keys, 'lora_unet_conv.alpha': np.float32(1)}), 'conv', theirs('conv') + delta / 4)


def loha(x, tucker):
  halves = []
  for n in (1, 2):
    a, b = as64(x[f'hada_w{n}_a']), as64(x[f'hada_w{n}_b'])
    halves.append(np.einsum('abkl,ao,bi->oikl', as64(x[f'hada_t{n}']), a, b) if tucker else a @ b)
  return halves[0] * halves[1]


@pytest.mark.parametrize('kind', ['matrix', 'convolution', 'tucker'])
def test_loha(folder, kind):
  tucker, into = kind == 'tucker', 54 if kind == 'convolution' else 6
  side = (4, 8) if tucker else (8, 4)
  shapes = {f'hada_w{n}_{end}': shape for n in (1, 2) for end, shape in (('a', side), ('b', (4, into)))}
  x = drawn(3, np.float32, **shapes, **({f'hada_t{n}': (4, 4, 3, 3) for n in (1, 2)} if tucker else {}))
  name, place = ('blocks_2_up', 'up.2') if kind == 'matrix' else ('conv', 'conv')
  keys = {f'lora_unet_{name}.{part}': array for part, array in x.items()}
  expected = theirs(place) + 2 / 4 * loha(x, tucker).reshape(theirs(place).shape)
  close(merged(folder, {**keys, f'lora_unet_{name}.alpha': np.float32(2)}), place, expected)


LOKR = {
  'full': ({'lokr_w1': (2, 3), 'lokr_w2': (4, 2)}, 'up.2', None),  # two full factors have no rank to divide by
  'second': ({'lokr_w1': (2, 3), 'lokr_w2_a': (4, 3), 'lokr_w2_b': (3, 2)}, 'up.2', 3),
  'first': ({'lokr_w1_a': (2, 3), 'lokr_w1_b': (3, 3), 'lokr_w2': (4, 2)}, 'up.2', 3),
  'both': ({'lokr_w1_a': (2, 3), 'lokr_w1_b': (3, 3), 'lokr_w2_a': (4, 3), 'lokr_w2_b': (3, 2)}, 'up.2', 3),
  'convolution': ({'lokr_w1': (2, 3), 'lokr_w2': (4, 2, 3, 3)}, 'conv', None),
  'flat': ({'lokr_w1': (2, 3), 'lokr_w2_a': (4, 3), 'lokr_w2_b': (3, 18)}, 'conv', 3),
  'pixels': ({'lokr_w1': (2, 3), 'lokr_w2_a': (4, 3), 'lokr_w2_b': (3, 2, 3, 3)}, 'conv', 3),
  'tucker': ({'lokr_w1': (2, 3), 'lokr_t2': (3, 3, 3, 3), 'lokr_w2_a': (3, 4), 'lokr_w2_b': (3, 2)}, 'conv', 3),
}


@pytest.mark.parametrize('kind', LOKR)
def test_lokr(folder, kind):
  shapes, place, rank = LOKR[kind]
  x = drawn(4, np.float32, **shapes)
  first = as64(x['lokr_w1']) if 'lokr_w1' in x else as64(x['lokr_w1_a']) @ as64(x['lokr_w1_b'])
  if kind == 'tucker':
    second = np.einsum('abkl,ao,bi->oikl', as64(x['lokr_t2']), as64(x['lokr_w2_a']), as64(x['lokr_w2_b']))
  elif 'lokr_w2' in x:
    second = as64(x['lokr_w2'])
  else:
    second = np.tensordot(as64(x['lokr_w2_a']), as64(x['lokr_w2_b']), 1)
  pixels = (3, 3) if place == 'conv' else ()
  second = second.reshape(4, 2, *pixels)
  # Kronecker: [o1 * o2, i1 * i2], with the first factor's places outermost.
  delta = np.einsum('ab,cd...->acbd...', first, second).reshape(8, 6, *pixels)
  name = {'up.2': 'blocks_2_up', 'conv': 'conv'}[place]
  keys = {f'lora_unet_{name}.{part}': array for part, array in x.items()} | {f'lora_unet_{name}.alpha': np.float32(6)}
  close(merged(folder, keys), place, theirs(place) + (1 if rank is None else 6 / rank) * delta)


@pytest.mark.parametrize('axis', ['outputs', 'inputs'])
@pytest.mark.parametrize('scale', [1.0, 0.5])
@pytest.mark.parametrize('layer', [('conv', 'conv', (3, 3)), ('blocks_2_up', 'up.2', ())], ids=['conv', 'matrix'])
def test_dora_sets_the_norms_of_the_sum(folder, axis, scale, layer):
  name, place, pixels = layer
  rest = tuple(1 for _ in pixels)
  magnitude = (8, 1, *rest) if axis == 'outputs' else (1, 6, *rest)
  x = drawn(5, np.float32, lora_down=(4, 6, *pixels), lora_up=(8, 4, *rest), dora=magnitude)
  x['dora'] = np.abs(x['dora'])
  keys = {f'lora_unet_{name}.{part}.weight': x[part] for part in ('lora_down', 'lora_up')}
  keys |= {f'lora_unet_{name}.dora_scale': x['dora'], f'lora_unet_{name}.alpha': np.float32(8)}
  total = theirs(place) + 2 * np.einsum('or,ri...->oi...', as64(x['lora_up']).reshape(8, 4), as64(x['lora_down']))
  axes = (1, 2, 3) if axis == 'outputs' else (0, 2, 3)
  norm = np.sqrt((total**2).sum(axis=axes[: total.ndim - 1], keepdims=True))
  decomposed = as64(x['dora']) * total / norm
  expected = theirs(place) + scale * (decomposed - theirs(place))
  close(merged(folder, keys, scale), place, expected)


def test_full_differences_of_weights_biases_and_norms(folder):
  x = drawn(6, np.float32, conv=(8, 6, 3, 3), bias=(8,), scale=(8,), shift=(8,))
  keys = {'lora_unet_conv.diff': x['conv'], 'lora_unet_blocks_1_up.diff_b': x['bias']}
  after = merged(folder, {**keys, 'lora_unet_norm.w_norm': x['scale'], 'lora_unet_norm.b_norm': x['shift']}, 0.5)
  close(after, 'conv', theirs('conv') + 0.5 * as64(x['conv']))
  for path, part in (('norm/scale', 'scale'), ('norm/bias', 'shift')):
    np.testing.assert_allclose(after[path], as64(PARAMS[path]) + 0.5 * as64(x[part]), atol=1e-6)
  np.testing.assert_allclose(after['blocks/up/bias'][1], as64(PARAMS['blocks/up/bias'][1]) + 0.5 * as64(x['bias']))
  np.testing.assert_array_equal(after['blocks/up/bias'][[0, 2]], PARAMS['blocks/up/bias'][[0, 2]])


@pytest.mark.parametrize('on_input', [False, True])
def test_ia3_multiplies_rows_or_columns(folder, on_input):
  x = drawn(7, np.float32, factors=(6 if on_input else 8,))['factors']
  factors = as64(x)[None] if on_input else as64(x)[:, None]
  keys = {'lora_unet_blocks_2_up.weight': x, 'lora_unet_blocks_2_up.on_input': np.array(on_input)}
  close(merged(folder, keys, 0.5), 'up.2', theirs('up.2') * (1 + 0.5 * factors))  # LyCORIS stores factors less 1
  keys = {'base_model.model.blocks.2.up.ia3_l': x[None] if on_input else x[:, None]}
  after = merged(folder, keys, config={'peft_type': 'IA3'})
  close(after, 'up.2', theirs('up.2') * factors)
  bias = as64(PARAMS['blocks/up/bias'][2]) * (1 if on_input else as64(x))
  np.testing.assert_allclose(after['blocks/up/bias'][2], bias, atol=1e-6)


def test_settings_of_peft_give_each_layer_its_scale(folder):
  x = drawn(8, np.float32, a=(4, 6), b=(8, 4), c=(2, 6), d=(8, 2), e=(4, 8), f=(6, 4))
  keys = {}
  for name, (down, up) in {'blocks.0.up': 'ab', 'blocks.1.up': 'cd'}.items():
    keys |= {f'base_model.model.{name}.lora_A.weight': x[down], f'base_model.model.{name}.lora_B.weight': x[up]}
  keys |= {'base_model.model.tokens.lora_embedding_A': x['e'], 'base_model.model.tokens.lora_embedding_B': x['f']}
  keys['base_model.model.norm.weight'] = np.arange(8, dtype=np.float32)  # of its modules_to_save
  config = {'peft_type': 'LORA', 'r': 4, 'lora_alpha': 6, 'rank_pattern': {'1.up': 2}, 'alpha_pattern': {'1.up': 5}}
  after = merged(folder, keys, config=config)
  close(after, 'up.0', theirs('up.0') + 6 / 4 * as64(x['b']) @ as64(x['a']))
  close(after, 'up.1', theirs('up.1') + 5 / 2 * as64(x['d']) @ as64(x['c']))
  close(after, 'tokens', theirs('tokens') + 6 / 4 * (as64(x['f']) @ as64(x['e'])).T)
  np.testing.assert_array_equal(after['norm/scale'], np.arange(8))
  after = merged(folder, keys, config={**config, 'use_rslora': True})
  close(after, 'up.0', theirs('up.0') + 6 / math.sqrt(4) * as64(x['b']) @ as64(x['a']))
  with pytest.raises(UserError, match=r'says rank 8 for blocks\.1\.up, whose arrays have rank 2'):
    merged(folder, keys, config={**config, 'rank_pattern': {'1.up': 8}})


def test_several_adapters_add_up_in_float32(folder):
  x = drawn(9, np.float32, a=(2, 6), b=(8, 2), c=(3, 6), d=(8, 3))
  files = []
  for name, down, up in (('one', 'a', 'b'), ('two', 'c', 'd')):
    files.append(folder / f'{name}.safetensors')
    keys = {'unet.blocks.2.up.lora_A.weight': x[down], 'unet.blocks.2.up.lora_B.weight': x[up]}
    save_file(keys, files[-1])
  params = PARAMS
  for file, scale in zip(files, (0.8, -0.3), strict=True):
    params = params | merge(AdapterFile(str(file)), scale, [LAYOUT], params, 'the test network')
  expected = theirs('up.2') + 0.8 * as64(x['b']) @ as64(x['a']) - 0.3 * as64(x['d']) @ as64(x['c'])
  close(params, 'up.2', expected)
