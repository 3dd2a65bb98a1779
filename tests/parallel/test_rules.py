import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.multimodal.dual_encoder import clip, siglip
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.parameter_axes import trace_init
from fmcv_jax.parallel.rules import AXIS_RULES, Placement, Rules, with_logical_constraint

MESH = make_mesh(MeshShape(data=2, fsdp=2, tensor=2))


def traced(module, *inputs):
  variables, rows = trace_init(lambda: module.init(jax.random.key(0), *inputs))
  return variables['params'], rows


def test_every_parameter_of_every_family_has_axes_and_fsdp_and_tensor_split_its_matrices():
  image, tokens = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 8), jnp.int32)
  for tree, rows in (
    traced(vit('mu/8', image_size=32, num_classes=10, registers=4, layer_scale=0.1, gated_mlp=True), image),
    traced(clip('B/32', length=8), jnp.zeros((1, 224, 224, 3)), tokens),
    traced(siglip('B/32', length=8), jnp.zeros((1, 224, 224, 3)), tokens),
  ):
    shardings = Placement(MESH).parameters(tree, rows)
    specs = {
      jax.tree_util.keystr(k, simple=True, separator='/'): s.spec for k, s in jax.tree.leaves_with_path(shardings)
    }
    up = next(spec for path, spec in specs.items() if path.endswith('mlp/up/kernel'))
    assert up == P(None, ('fsdp',), ('tensor',))
    assert all(spec == P() for path, spec in specs.items() if 'norm' in path)


def test_unmatched_parameter_is_an_error_that_names_it():
  with pytest.raises(UserError, match=r'no pattern matches the parameter adapter/weight of shape \(4, 4\)'):
    Placement(MESH).parameters({'adapter': {'weight': jnp.zeros((4, 4))}}, {})


def test_rows_of_the_config_come_first():
  rules = Rules(parameters=((r'adapter/weight', ('embed', None)),), axes={'embed': ('data',)})
  sharding = Placement(MESH, rules).parameters({'adapter': {'weight': jnp.zeros((4, 4))}}, {})['adapter']['weight']
  assert sharding.spec == P(('data',))


@pytest.mark.parametrize(
  ('axes', 'shape', 'message'),
  [
    (('batch', 'embed'), (8, 8), "would use the mesh axis 'fsdp' twice, for 'batch' and 'embed'"),
    (('batch', None), (6, 8), "axis 'batch' of size 6 .* is not divisible by data=2 x fsdp=2"),
    (('batch', 'widht'), (8, 8), "no rule for the logical axis 'widht' .*did you mean 'width'"),
    (('batch',), (8, 8), r'1 logical axes .* for an array of shape \(8, 8\)'),
  ],
)
def test_rules_raise_instead_of_falling_back(axes, shape, message):
  with pytest.raises(UserError, match=message):
    Placement(MESH).sharding(axes, shape, 'an array')


def test_constrain_is_the_identity_without_a_placement_and_pins_with_one():
  x = jnp.ones((8, 4, 16))
  assert with_logical_constraint(x, 'batch', 'tokens', 'width') is x

  def f(x):
    with Placement(MESH).active():
      return with_logical_constraint(x * 2, 'batch', 'tokens', 'width')

  assert jax.jit(f)(x).sharding.spec == P(('data', 'fsdp'))
  assert jax.jit(f).lower(x).as_text().count('sharding_constraint') == 1


def test_a_training_step_pins_its_activations():
  """Guards against constraints that silently do nothing: their number in a lowered forward pass is known."""
  module = vit('mu/8', image_size=32, num_classes=10)
  image = jnp.zeros((8, 32, 32, 3))
  params = module.init(jax.random.key(0), image)

  def forward(params, image):
    with Placement(MESH).active():
      return module.apply(params, image).output

  text = jax.jit(forward).lower(params, image).as_text()
  # patches; in the scanned block: in, query, key, value, hidden units, out
  assert text.count('sharding_constraint') == 1 + 6


def test_every_logical_axis_has_a_rule_over_axes_of_the_mesh():
  assert {name for axes in AXIS_RULES.values() for name in axes} <= set(MESH.shape)
