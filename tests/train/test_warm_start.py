"""Parts of one run initialize parts of another by path; skipped parts keep their initial values."""

import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.errors import UserError
from fmcv_jax.models.common.positions import resize_grid
from fmcv_jax.train.state import TrainState
from fmcv_jax.train.warm_start import InitFrom, load_partial_state, pad_input_channels, resized, resized_patches


def initial_state():
  params = {'encoder': {'head': {'bias': jnp.zeros(3)}, 'patch': jnp.zeros((2, 2))}, 'scale': jnp.zeros(())}
  extra = {'teacher': {'patch': jnp.zeros((2, 2))}, 'center': jnp.zeros(4)}
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    step=zero, skipped=zero, streak=zero, rng=zero, params=params, opt_state={}, extra=extra, ema=params
  )


TRAINED = {
  'runs/a': {'params': {'patch': jnp.full((2, 2), 3.0), 'head': {'bias': jnp.full(5, 3.0)}}, 'extra': {}},
  'runs/b': {'params': {'vision': {'patch': jnp.full((2, 2), 4.0)}}, 'extra': {'center': jnp.full(4, 5.0)}},
}


def test_parts_of_several_runs_initialize_parameters_and_extra_state():
  state = load_partial_state(
    initial_state(),
    {
      'params/encoder': InitFrom('runs/a', skip=('head/.*',)),
      'extra/teacher': InitFrom('runs/b', 'params/vision'),
      'extra/center': InitFrom('runs/b', 'extra/center'),
    },
    TRAINED.__getitem__,
  )
  np.testing.assert_array_equal(state.params['encoder']['patch'], 3.0)
  np.testing.assert_array_equal(state.ema['encoder']['patch'], 3.0)
  np.testing.assert_array_equal(state.params['encoder']['head']['bias'], 0.0)
  np.testing.assert_array_equal(state.params['scale'], 0.0)
  np.testing.assert_array_equal(state.extra['teacher']['patch'], 4.0)
  np.testing.assert_array_equal(state.extra['center'], 5.0)


@pytest.mark.parametrize(('old', 'new', 'special'), [(17, 37, 1), (16, 9, 0), (18, 51, 2)])
def test_a_table_of_positions_is_resized_behind_its_special_tokens(old, new, special):
  table = jnp.asarray(np.random.default_rng(0).normal(size=(2, old, 3)), jnp.float32)
  got = resized(table, new)
  assert got.shape == (2, new, 3)
  np.testing.assert_array_equal(got[:, :special], table[:, :special])
  sides = [(round((rows - special) ** 0.5),) * 2 for rows in (old, new)]
  for one, other in zip(got, table, strict=True):
    np.testing.assert_allclose(one[special:], resize_grid(other[special:], *sides), atol=1e-6)
  assert resized(table, new + 1) is table


@pytest.mark.parametrize(('old', 'new'), [(14, 16), (16, 8)])
def test_a_kernel_of_patches_is_resized_as_by_timm(old, new):
  layers = pytest.importorskip('timm.layers', reason='pip install fmcv-jax[parity]')
  torch = pytest.importorskip('torch')
  theirs = np.random.default_rng(0).normal(size=(5, 3, old, old)).astype(np.float32)
  expected = layers.resample_patch_embed(torch.tensor(theirs), [new, new]).numpy()
  ours = resized_patches(jnp.asarray(theirs.transpose(2, 3, 1, 0).reshape(old * old * 3, 5)), new * new * 3)
  expected = expected.transpose(2, 3, 1, 0).reshape(new * new * 3, 5)
  np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max())
  assert resized_patches(ours, 100) is ours


def test_resolution_changes_where_it_is_asked_for():
  position = {'position': jnp.arange(17 * 3.0).reshape(17, 3)}
  zero = jnp.zeros((), jnp.int32)
  own = {'position': jnp.zeros((10, 3))}
  state = TrainState(step=zero, skipped=zero, streak=zero, rng=zero, params=own, opt_state={}, extra={}, ema=None)
  trained = {'runs/a': {'params': position}}.__getitem__
  state_now = load_partial_state(state, {'params': InitFrom('runs/a', resize=('position',))}, trained)
  np.testing.assert_allclose(state_now.params['position'], resized(position['position'], 10))
  with pytest.raises(UserError, match=r'or to config\.init_from\.params\.resize for a positional table'):
    load_partial_state(state, {'params': InitFrom('runs/a')}, trained)


@pytest.mark.parametrize(
  ('target', 'part', 'message'),
  [
    ('params/encoder', InitFrom('runs/a'), r'init_from\.params/encoder: head/bias is \(5,\) in runs/a and \(3,\) here'),
    (
      'params/encoder',
      InitFrom('runs/b', 'params/vision'),
      'head/bias is missing in runs/b .* add a pattern for it to',
    ),
    (
      'extra/techer',
      InitFrom('runs/a'),
      r"the state of this run has nothing at 'extra/techer'; did you mean 'extra/teach",
    ),
    (
      'extra/teacher',
      InitFrom('runs/b', 'params/vison'),
      r"runs/b has nothing at 'params/vison'; did you mean 'params/vi",
    ),
  ],
)
def test_missing_and_mismatched_parts_are_named(target, part, message):
  with pytest.raises(UserError, match=message):
    load_partial_state(initial_state(), {target: part}, TRAINED.__getitem__)


def test_a_kernel_padded_with_input_channels_computes_the_same():
  rng = np.random.default_rng(0)
  kernel, x = jnp.asarray(rng.normal(size=(3, 3, 4, 5))), rng.normal(size=(3, 3, 9))
  wide = pad_input_channels(kernel, (3, 3, 9, 5))
  np.testing.assert_allclose(np.tensordot(x, wide, 3), np.tensordot(x[..., :4], kernel, 3), rtol=1e-12)
  for other in ((3, 3, 3, 5), (3, 3, 4, 5), (9, 5)):
    assert pad_input_channels(kernel, other) is kernel
  state = load_partial_state(
    initial_state(),
    {'params/encoder': InitFrom('runs/c', skip=('head/.*',), widen=('patch',))},
    {'runs/c': {'params': {'patch': jnp.full((1, 2), 3.0)}, 'extra': {}}}.__getitem__,
  )
  np.testing.assert_array_equal(state.params['encoder']['patch'], [[3.0, 3.0], [0.0, 0.0]])
