"""Sampling from a trained diffusion model on all devices: any number of images, one compiled program per config."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.diffusion.condition import Condition
from fmcv_jax.diffusion.generator import Generator
from fmcv_jax.diffusion.guidance import guided
from fmcv_jax.diffusion.samplers import SOLVERS, add_noise, normal, sample
from fmcv_jax.parallel.batches import to_devices
from fmcv_jax.parallel.rules import Placement

INPAINT_NOISE_OFFSET = 1 << 20  # the draws that noise the known part of an image
NEGATIVE = 'negative_'  # prefix of the fields of the negative condition


class SamplerConfig(NamedTuple):
  """Sampling options that are compiled into the program.

  solver                one of SOLVERS
  times                 from `sampling_timesteps`, or a suffix of them for img2img
  guided                True to apply guidance; interval and rescale are those of `guided`
  control_preprocessed  True if `control` holds control maps, False if they are computed from the images in `control`
  """

  solver: str
  times: tuple[float, ...]
  guided: bool
  interval: tuple[float, float] | None = None
  rescale: float = 0.0
  control_preprocessed: bool = False


class ShardedSampler:
  """Samples from the generator of a model, jitted over the mesh once per config.

  generator   (params, extra) -> Generator
  batch       global batch size, rounded up to a multiple of the number of devices
  """

  def __init__(self, generator: Callable[[Any, Any], Generator], placement: Placement, batch: int):
    self._generator, self._placement = generator, placement
    ways = placement.mesh.size
    self._batch = -(-batch // ways) * ways

  def sample(
    self,
    params: Any,
    extra: Any,
    fields: Mapping[str, np.ndarray],
    config: SamplerConfig,
    *,
    seed: int,
    progress: Callable[[int], Any] = lambda ready: None,
  ) -> np.ndarray:
    """Images uint8 [N, H, W, 3], complete on every process.

    fields [N, ...], the same on every process:
      number                   int32, seed of the noise of each image
      the `condition_fields`   of the generator
      negative_NAME, guidance  the fields of the negative condition (none: the unconditional one), and the scale
      other_tokens, fraction   a second text, and the interpolation weight towards it
      image, mask              an image to edit, and True where pixels are regenerated (without mask: everywhere)
      control, control_scale   control image and conditioning scale (ControlNet models)
    """
    program, made = self._program(config), []
    for start in range(0, len(fields['number']), self._batch):
      piece = {name: value[start : start + self._batch] for name, value in fields.items()}
      real, ways = len(piece['number']), self._placement.mesh.size
      rows = min(self._batch, -(-real // ways) * ways)
      padded = {name: np.concatenate([v, np.repeat(v[-1:], rows - real, axis=0)]) for name, v in piece.items()}
      local = rows // jax.process_count()
      mine = {name: v[jax.process_index() * local : (jax.process_index() + 1) * local] for name, v in padded.items()}
      images = program(params, extra, to_devices(mine, self._placement), jnp.int32(seed))
      made.append(np.asarray(images)[:real])
      progress(real)
    return np.concatenate(made)

  @functools.lru_cache(maxsize=8)  # noqa: B019 (a sampler lives as long as what it compiled)
  def _program(self, config: SamplerConfig) -> Any:
    def program(params: Any, extra: Any, batch: Mapping[str, jax.Array], seed: jax.Array) -> jax.Array:
      with self._placement.active():
        return sample_batch(self._generator(params, extra), batch, seed, config)

    return jax.jit(program, out_shardings=self._placement.replicated())


def sample_batch(
  g: Generator, batch: Mapping[str, jax.Array], seed: jax.Array | int, config: SamplerConfig
) -> jax.Array:
  """Images uint8 [B, *image_shape] of one batch; fields as in `ShardedSampler.sample`."""
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), batch['number'])
  image = batch['image'].astype(jnp.float32) / 255 if 'image' in batch else None

  def with_images(condition: Condition) -> Condition:
    if g.control is not None:
      control = batch['control'].astype(jnp.float32) / 255
      control = control if config.control_preprocessed else g.control(control)
      condition = {**condition, 'control': control, 'control_scale': batch['control_scale']}
    if g.inpaint_condition is not None:  # without a mask, all of the image is missing
      blank = jnp.zeros((len(keys), *g.image_shape))
      masks = batch.get('mask', jnp.ones(blank.shape[:-1], bool))
      condition = {**condition, 'image': g.inpaint_condition(blank if image is None else image, masks)}
    return condition

  condition = g.condition(batch)
  if 'fraction' in batch:
    other = g.condition({**batch, 'tokens': batch['other_tokens']})
    condition = interpolate_conditions(condition, other, batch['fraction'])
  condition = with_images(condition)

  if not config.guided:
    denoise: Callable[[jax.Array, jax.Array], jax.Array] = lambda x, time: g.denoise(x, time, condition)  # noqa: E731
  else:
    negative = {name.removeprefix(NEGATIVE): v for name, v in batch.items() if name.startswith(NEGATIVE)}
    without = with_images(g.condition({**batch, **negative}, conditional=bool(negative)))
    denoise = guided(g.denoise, condition, without, batch['guidance'], interval=config.interval, rescale=config.rescale)
  inpainting_model = 'mask' in batch and g.inpaint_condition is not None
  known = jnp.zeros((len(keys), *g.input_shape)) if image is None or inpainting_model else g.encode(image)
  start, adjust = known, None
  if 'mask' in batch and not inpainting_model:
    start = jnp.zeros_like(known)
    missing = jax.image.resize(batch['mask'].astype(jnp.float32), known.shape[:-1], 'linear')[..., None] > 0
    fixed = jax.vmap(lambda key: jax.random.fold_in(key, INPAINT_NOISE_OFFSET))(keys)

    def adjust(x: jax.Array, alpha: Any, sigma: Any, call: Any) -> jax.Array:
      return jnp.where(missing, x, alpha * known + sigma * normal(fixed, g.input_shape, call))

  times = np.array(config.times)
  x = add_noise(g.process, start, keys, g.input_shape, times[0])
  x = sample(denoise, g.process, x, times, solver=SOLVERS[config.solver], keys=keys, adjust=adjust)
  images = jnp.round(255 * g.decode(x)).astype(jnp.uint8)
  return jnp.where(batch['mask'][..., None], images, batch['image']) if 'mask' in batch else images


def interpolate_conditions(first: Condition, last: Condition, fraction: jax.Array) -> Condition:
  """Conditions [B, ...] interpolated between `first` and `last` with weights `fraction` [B]."""

  def mix(a: jax.Array, b: jax.Array) -> jax.Array:
    if a.dtype == bool:
      return a | b
    weight = fraction.reshape(-1, *(1,) * (a.ndim - 1))
    return (1 - weight) * a + weight * b

  return jax.tree.map(mix, first, last)
