"""Painting with a trained diffusion model on all devices: any number of pictures, by one program for each config."""

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

INPAINT_NOISE_OFFSET = 1 << 20  # the draws with which what is known of a picture is noised


class SamplerConfig(NamedTuple):
  """How pictures are painted, as far as the program depends on it.

  solver     one of SOLVERS; times: as from `sampling_timesteps`, or their end for pictures that are painted over
  guided     whether there is guidance; interval and rescale: as in `guided`
  drawn      whether `control` is what the network is shown itself
  """

  solver: str
  times: tuple[float, ...]
  guided: bool
  interval: tuple[float, float] | None = None
  rescale: float = 0.0
  drawn: bool = False


class ShardedSampler:
  """The generator of a model, jitted over the mesh once for each config.

  generator   (params, extra) -> Generator
  batch       pictures at once, rounded up to a multiple of the devices
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
    """Images uint8 [N, H, W, 3], whole on every process.

    fields [N, ...], the same on every process: 'number', which tells a picture's noise; what the model is told; of what
    it is told less, 'without_NAME', and how much less, 'guidance'; 'other_tokens' and 'share', the way to another text;
    'image' to paint over, 'mask' where it is to be painted anew, 'control' to follow with its 'control_scale'
    """
    program, made = self._program(config), []
    for start in range(0, len(fields['number']), self._batch):
      piece = {name: value[start : start + self._batch] for name, value in fields.items()}
      real, ways = len(piece['number']), self._placement.mesh.size
      rows = min(self._batch, -(-real // ways) * ways)
      padded = {name: np.concatenate([v, np.repeat(v[-1:], rows - real, axis=0)]) for name, v in piece.items()}
      local = rows // jax.process_count()
      mine = {name: v[jax.process_index() * local : (jax.process_index() + 1) * local] for name, v in padded.items()}
      pictures = program(params, extra, to_devices(mine, self._placement), jnp.int32(seed))
      made.append(np.asarray(pictures)[:real])
      progress(real)
    return np.concatenate(made)

  @functools.lru_cache(maxsize=8)  # noqa: B019 (a sampler lives as long as what it compiled)
  def _program(self, config: SamplerConfig):
    def program(params, extra, batch, seed):
      with self._placement.active():
        return sample_batch(self._generator(params, extra), batch, seed, config)

    return jax.jit(program, out_shardings=self._placement.replicated())


def sample_batch(
  g: Generator, batch: Mapping[str, jax.Array], seed: jax.Array | int, config: SamplerConfig
) -> jax.Array:
  """Images uint8 [B, H, W, 3] of one batch, whose fields are those of `ShardedSampler.sample`."""
  keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), batch['number'])
  image = batch['image'].astype(jnp.float32) / 255 if 'image' in batch else None

  def shown(condition):
    if g.control is not None:
      pictures = batch['control'].astype(jnp.float32) / 255
      pictures = pictures if config.drawn else g.control(pictures)
      condition = {**condition, 'control': pictures, 'control_scale': batch['control_scale']}
    if g.around is not None:  # without a mask, all is to be painted
      nothing = jnp.zeros((len(keys), g.size, g.size))
      masks = batch.get('mask', jnp.ones_like(nothing, bool))
      condition = {**condition, 'image': g.around(nothing[..., None] if image is None else image, masks)}
    return condition

  condition = g.condition(batch)
  if 'share' in batch:
    condition = interpolate_conditions(
      condition, g.condition({**batch, 'tokens': batch['other_tokens']}), batch['share']
    )
  condition = shown(condition)

  def denoise(x, time):
    return g.denoise(x, time, condition)

  if config.guided:
    told = {name.removeprefix('without_'): v for name, v in batch.items() if name.startswith('without_')}
    without = shown(g.condition({**batch, **told}, told=bool(told)))
    denoise = guided(g.denoise, condition, without, batch['guidance'], interval=config.interval, rescale=config.rescale)
  told_around = 'mask' in batch and g.around is not None
  known = jnp.zeros((len(keys), *g.shape)) if image is None or told_around else g.encode(image)
  start, adjust = known, None
  if 'mask' in batch and not told_around:
    start = jnp.zeros_like(known)
    new = jax.image.resize(batch['mask'].astype(jnp.float32), (*known.shape[:3],), 'linear')[..., None] > 0
    fixed = jax.vmap(lambda key: jax.random.fold_in(key, INPAINT_NOISE_OFFSET))(keys)

    def adjust(x, alpha, sigma, call):
      return jnp.where(new, x, alpha * known + sigma * normal(fixed, g.shape, call))

  times = np.array(config.times)
  x = add_noise(g.process, start, keys, g.shape, times[0])
  x = sample(denoise, g.process, x, times, solver=SOLVERS[config.solver], keys=keys, adjust=adjust)
  pictures = jnp.round(255 * g.decode(x)).astype(jnp.uint8)
  return jnp.where(batch['mask'][..., None], pictures, batch['image']) if 'mask' in batch else pictures


def interpolate_conditions(first: Condition, last: Condition, share: jax.Array) -> Condition:
  """The conditions [B, ...] at a share [B] of the way."""

  def mix(a, b):
    if a.dtype == bool:
      return a | b
    weight = share.reshape(-1, *(1,) * (a.ndim - 1))
    return (1 - weight) * a + weight * b

  return jax.tree.map(mix, first, last)
