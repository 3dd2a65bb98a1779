import jax
import jax.numpy as jnp
import pytest

from fmcv_jax.augment.warp import warp
from fmcv_jax.models.common.attention.dispatch import attention
from fmcv_jax.models.common.attention.masks import PrefixMask
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement
from fmcv_jax.plan import kernels, planning

FORWARD = ('short_attention_forward', ((2, 50, 128),))
BACKWARD = ('short_attention_backward', ((2, 50, 128),) * 3)

SCHEDULES = {
  '17-forward_short_attention_forward_.1-00-schedule-analysis_final_bundles.txt': 300,
  '18-forward_short_attention_forward_.1-00-schedule-analysis_final_bundles.txt': 100,
  '18-loop_fusion.3-00-schedule-analysis_final_bundles.txt': 5000,
}
CALL = '= (bf16[2,50,128]{2,1,0}) custom-call(%p), custom_call_target="tpu_custom_call"'
TEXT = f"""
%body (p: f32[]) -> f32[] {{
  %forward_short_attention_forward_.1 {CALL}
}}
%condition (p: f32[]) -> pred[] {{
}}
ENTRY %main (p: f32[]) -> f32[] {{
  %forward_short_attention_forward_.2 {CALL}
  %w = f32[] while(%p), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  %other.5 = (bf16[7]{{0}}) custom-call(%p), custom_call_target="tpu_custom_call"
}}
"""


def test_the_grid_of_each_kernel_is_found_in_loops_and_gradients():
  def loss(x):
    def layer(x, _):
      return attention(x, x, x, backend='short'), None

    with Placement(make_mesh(MeshShape(data=1), jax.devices()[:1])).active():
      return jax.lax.scan(layer, x, length=3)[0].sum()

  found = kernels.steps(jax.make_jaxpr(jax.grad(loss))(jnp.ones((2, 50, 2, 64))).jaxpr)
  assert found == {FORWARD: 2, BACKWARD: 2}


def test_equal_kernels_count_as_often_as_they_run_by_the_newest_schedule_of_one(monkeypatch, tmp_path):
  monkeypatch.setattr(kernels, 'record', lambda: tmp_path)
  for name, bundles in SCHEDULES.items():
    (tmp_path / name).write_text(f'Schedule analysis:\n\ttotal scheduled bundles:    {bundles}\n')
  assert kernels.cycles(TEXT, {FORWARD: 64, BACKWARD: 64}) == (1 + 3) * 64 * 100
  assert not any(tmp_path.iterdir())
  assert kernels.cycles(TEXT, {FORWARD: 64}) == 0


@pytest.mark.parametrize(
  ('tokens', 'dim', 'heads', 'text'),
  [(196, 64, 12, None), (197, 128, 4, None), (256, 72, 16, None), (257, 80, 16, None), (576, 64, 16, None),
   (1024, 64, 12, None), (77, 64, 8, 'causal'), (304, 256, 8, 'prefix')],
)  # fmt: skip
def test_the_kernel_of_few_tokens_compiles_for_a_tpu_and_its_cycles_are_counted(tokens, dim, heads, text):
  pytest.importorskip('libtpu')
  device = planning.pod('v5e:2x2')[:1]
  placement = Placement(make_mesh(MeshShape(data=1), device))
  shape = jax.ShapeDtypeStruct((2, tokens, heads, dim), jnp.bfloat16)
  keys = jax.ShapeDtypeStruct((2, tokens, heads // 2 if text == 'prefix' else heads, dim), jnp.bfloat16)
  whole = placement.sharding(('batch', None, None, None), shape.shape, 'inputs')
  first = jnp.arange(tokens) < 50
  mask = {None: None, 'causal': first[None, None, None], 'prefix': PrefixMask(jnp.stack([first, first]))}[text]
  options = dict(causal=text == 'causal', mask=mask, softcap=50.0 if text == 'prefix' else None, backend='short')

  def gradients(query, key, value):
    with placement.active():
      return jax.grad(lambda *args: attention(*args, **options).astype(jnp.float32).sum(), (0, 1, 2))(query, key, value)

  traced = jax.jit(gradients, in_shardings=(whole,) * 3, out_shardings=(whole,) * 3).trace(shape, keys, keys)
  text = traced.lower(lowering_platforms=('tpu',)).compile().as_text()
  grids = kernels.steps(traced.jaxpr.jaxpr)
  # Five products of the backward pass alone, in each of which a cycle meets eight rows with one tile of 128 x 128.
  least = 2 * heads * 5 * (tokens / 8) * (tokens / 128) * -(-dim // 128)
  assert kernels.cycles(text, grids) > least / 4  # of four matrix units


@pytest.mark.parametrize('dim', [256, 384, 512])
def test_heads_up_to_the_autoencoders_fit_the_chip(dim):
  """512: the one head of kl-f8, which looks at 4,096 pixels of the latents of 512 x 512 pixels."""
  pytest.importorskip('libtpu')
  placement = Placement(make_mesh(MeshShape(), planning.pod('v5e:2x2')))
  x = jax.ShapeDtypeStruct((8, 4096, 1, dim), jnp.bfloat16, sharding=placement.batch(jnp.zeros((8, 1, 1, 1))))

  def total(query, key, value):
    with placement.active():
      return attention(query, key, value).astype(jnp.float32).sum()

  text = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, x, x).compile().as_text()
  assert text.count('tpu_custom_call') >= 3  # the kernel, and one for each half of its gradient


@pytest.mark.parametrize('side', [32, 224, 384])
def test_on_a_tpu_a_warp_gathers_nothing(side):
  pytest.importorskip('libtpu')
  placement = Placement(make_mesh(MeshShape(data=4), planning.pod('v5e:2x2')))
  images, matrix = jnp.zeros((8, side, side, 3)), jnp.zeros((8, 2, 3))
  shapes = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement.batch({'image': x})['image']) for x in (images, matrix)
  ]

  def warped(images, matrix):
    with placement.active():
      return warp(images, matrix, 0.5)

  text = jax.jit(warped).lower(*shapes).compile().as_text()
  assert text.count('tpu_custom_call') == 1
  assert ' gather(' not in text
