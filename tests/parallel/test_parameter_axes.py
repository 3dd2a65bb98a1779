"""Parameters keep the axes of the single table that modules' own rows replaced (parameter_axes.json)."""

import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

from fmcv_jax.errors import UserError
from fmcv_jax.models.common.layers import dense
from fmcv_jax.parallel.parameter_axes import axes_of, class_name, trace_init
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.registry import KINDS
from fmcv_jax.train.state import trace_state
from tests.parallel.axes_cases import CASES

TABLE = json.loads(pathlib.Path(__file__).with_name('parameter_axes.json').read_text())


@pytest.mark.parametrize('name', CASES)
def test_every_parameter_of_every_network_has_the_axes_that_it_had(name):
  objective = CASES[name]()
  state, rows = trace_state(objective, optax.identity(), 0, ema=False)
  frozen = {name: state.extra[name] for name in objective.frozen_networks}
  for tree, parameters in {'params': state.params, **frozen}.items():
    expected = {
      path: () if axes == 'scalar' else tuple(None if axis == '-' else axis for axis in axes.split())
      for axes, paths in TABLE[f'{name}: {tree}'].items()
      for path in paths
    }
    found = {
      path_of(key_path): axes_of(path_of(key_path), x.shape, (), rows)
      for key_path, x in jax.tree_util.tree_leaves_with_path(parameters)
    }
    assert found == expected


def test_every_network_of_the_registry_is_a_case():
  """Some names are published sizes of other networks, and text towers are parts of pairs."""
  sizes = {'align', 'cappa', 'clip', 'coca', 'depth_anything', 'owl', 'paligemma', 'siglip'}
  sizes |= {'caption_decoder', 'cross_decoder', 'text_decoder', 'text_transformer'}
  assert set(KINDS[nn.Module]) - sizes <= {name.split(',')[0] for name in CASES}


class Adapter(nn.Module):
  """A module that is not of this package, around a layer that is."""

  logical_axes = ((r'(.*/)?adapter/kernel', ('embed', None)), (r'(.*/)?adapter/bias', (None,)))

  @nn.compact
  def __call__(self, x):
    return dense(4, 'float32', 'adapter')(x)


class Gate(nn.Module):
  logical_axes = ((r'(.*/)?adapter/kernel', (None, 'mlp')),)

  @nn.compact
  def __call__(self, x):
    return x * self.param('gate', nn.initializers.ones, ())


class Both(nn.Module):
  @nn.compact
  def __call__(self, x):
    return Gate(name='gate')(Adapter(name='inner')(x))


def rows_of(module):
  return trace_init(lambda: module.init(jax.random.key(0), jnp.ones((1, 4))))[1]


def test_a_module_from_elsewhere_brings_its_rows_and_each_trace_finds_them():
  module = nn.Sequential([Adapter()])
  assert rows_of(module) == rows_of(module) == {class_name(Adapter): Adapter.logical_axes}
  assert axes_of('network/adapter/kernel', (4, 4), (), rows_of(module)) == ('embed', None)


def test_layers_that_are_scanned_and_rematerialized_bring_their_rows():
  scanned = nn.scan(nn.remat(Adapter), {'params': 0}, {'params': True}, length=3)

  class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
      def layer(module, x, _):
        return module(x), None

      return nn.scan(layer, {'params': 0}, split_rngs={'params': True}, length=3)(Adapter(name='blocks'), x, None)[0]

  assert scanned.logical_axes == Adapter.logical_axes
  assert axes_of('blocks/adapter/kernel', (3, 4, 4), (), rows_of(Deep())) == ('layers', 'embed', None)


def test_two_modules_that_disagree_are_both_named_unless_the_config_decides():
  rows = rows_of(Both())
  message = r"the axes of inner/adapter/kernel .*Adapter has \['embed', None\] .*Gate has \[None, 'mlp'\]"
  with pytest.raises(UserError, match=message):
    axes_of('inner/adapter/kernel', (4, 4), (), rows)
  assert axes_of('inner/adapter/kernel', (4, 4), ((r'inner/adapter/kernel', (None, None)),), rows) == (None, None)


def test_rows_that_agree_are_no_conflict_and_the_first_of_one_module_wins():
  row = (r'(.*/)?kernel', ('embed', None))
  rows = {'a': (row, (r'x/kernel', (None, None))), 'b': (row,)}
  assert axes_of('x/kernel', (4, 4), (), rows) == ('embed', None)


def test_a_row_with_another_number_of_axes_is_refused():
  with pytest.raises(UserError, match=r"'x' names 1 axes, but x has shape \(4, 4\)"):
    axes_of('x', (4, 4), (), {'a': (('x', ('embed',)),)})
