"""The table of docs/generation.md: DDIM steps of a DiT-S/2 on the CPU, compared with diffusers with the same weights.

    pip install torch diffusers
    GLIBC_TUNABLES=... taskset -c 0 python benchmarks/sampling.py    # as in the Makefile, so that XLA keeps its memory

Both generate the same images from the same noise, in turn, in one process, here on one core. Reported are wall time
and CPU time, which does not depend on other load on the machine. The overhead of the sampler is measured with a trivial
network.
"""

import argparse
import functools
import pathlib
import statistics
import tempfile
import time

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fmcv_jax.diffusion.condition import make_condition
from fmcv_jax.diffusion.process import Process
from fmcv_jax.diffusion.samplers import Ddim, sample, sampling_timesteps
from fmcv_jax.models.generative.dit import DiT, dit
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.pretrained import dit as names
from fmcv_jax.pretrained.layout import read
from fmcv_jax.pretrained.tensors import open_tensors, write_tensors

SIZE, CHANNELS, CLASSES = 32, 4, 1000
PROCESS = Process('linear', 'noise')


def reference() -> diffusers.DiTTransformer2DModel:
  """DiT-S/2 with random weights, also where it is initialized with zeros: zero gates would disable the blocks."""
  torch.manual_seed(0)
  model = diffusers.DiTTransformer2DModel(
    num_attention_heads=6,
    attention_head_dim=64,
    in_channels=CHANNELS,
    out_channels=CHANNELS,
    num_layers=12,
    sample_size=SIZE,
    patch_size=2,
    norm_eps=1e-6,
    num_embeds_ada_norm=CLASSES,
  )
  first = model.transformer_blocks[0].norm1.emb
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.02 * torch.randn(parameter.shape)
    for block in model.transformer_blocks:
      # As in the original DiT: a single embedding of time and class, which diffusers stores and computes in every
      # block, and frequencies above 1 / 10,000.
      block.norm1.emb.load_state_dict(first.state_dict())
      block.norm1.emb.time_proj.downscale_freq_shift = 0
  return model.eval()


def converted(model: torch.nn.Module, network: DiT, shapes: dict) -> dict:
  tensors = {name: x.numpy() for name, x in model.state_dict().items()}
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / 'dit.safetensors'
    write_tensors(file, tensors)
    flat, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    wanted = {path_of(path): x.shape for path, x in flat}
    values = dict(read(names.diffusers(), open_tensors(file), wanted, network, str(file)))
  return jax.tree_util.tree_unflatten(treedef, [jnp.asarray(values[path]) for path in wanted])


@torch.inference_mode()
def theirs(model, noise: np.ndarray, label: np.ndarray, steps: int) -> np.ndarray:
  scheduler = diffusers.DDIMScheduler(
    beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=True, timestep_spacing='trailing'
  )
  scheduler.set_timesteps(steps)
  x, classes = torch.from_numpy(np.moveaxis(noise, -1, 1).copy()), torch.from_numpy(label).long()
  for when in scheduler.timesteps:
    output = model(x, when.expand(len(x)), classes).sample
    x = scheduler.step(output, when, x).prev_sample
  return np.moveaxis(x.numpy(), 1, -1)


def timed(call) -> tuple[float, float, np.ndarray]:
  """(seconds, CPU seconds, result)."""
  start, cpu = time.perf_counter(), time.process_time()
  result = np.asarray(call())
  return time.perf_counter() - start, time.process_time() - cpu, result


def main() -> None:
  arguments = argparse.ArgumentParser()
  arguments.add_argument('--steps', type=int, default=20)
  arguments.add_argument('--batches', type=int, nargs='+', default=[1, 16])
  arguments.add_argument('--rounds', type=int, default=3)
  args = arguments.parse_args()
  model, network = reference(), dit('S/2', image_size=SIZE, num_classes=CLASSES)
  inputs = jnp.zeros((1, SIZE, SIZE, CHANNELS)), jnp.zeros(1), make_condition(label=jnp.zeros(1, jnp.int32))
  shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)['params']
  params = converted(model, network, {'network': shapes})['network']
  times = sampling_timesteps(PROCESS, args.steps)

  def sampled(params, noise, label):
    def denoise(x, time):
      return network.apply({'params': params}, x, time, make_condition(label=label))

    return sample(denoise, PROCESS, noise, times, solver=Ddim())

  def alone(params, noise, label):
    return sample(lambda x, time: 0.5 * x, PROCESS, noise, times, solver=Ddim())

  table = Table(title=f'{args.steps} steps of DiT-S/2, float32, median of {args.rounds}: wall (CPU) seconds')
  for heading in ('batch', 'diffusers', 'fmcv_jax', 'speedup', 'difference', 'sampler overhead'):
    table.add_column(heading, justify='right')
  for batch in args.batches:
    draws = np.random.default_rng(batch)
    noise = draws.normal(size=(batch, SIZE, SIZE, CHANNELS)).astype(np.float32)
    label = draws.integers(0, CLASSES, batch).astype(np.int32)
    programs = {
      'theirs': lambda noise=noise, label=label: theirs(model, noise, label, args.steps),
      'ours': functools.partial(jax.jit(sampled).lower(params, noise, label).compile(), params, noise, label),
      'alone': functools.partial(jax.jit(alone).lower(params, noise, label).compile(), params, noise, label),
    }
    theirs(model, noise, label, 1)  # warms up
    runs: dict[str, list] = {name: [] for name in programs}
    for _ in range(args.rounds):
      for name, call in programs.items():
        runs[name].append(timed(call))
    clock, cpu = ({name: statistics.median(run[i] for run in found) for name, found in runs.items()} for i in range(2))
    difference = np.abs(runs['ours'][0][2] - runs['theirs'][0][2]).max() / np.abs(runs['theirs'][0][2]).max()
    table.add_row(
      str(batch),
      *(f'{clock[name]:.2f} ({cpu[name]:.2f})' for name in ('theirs', 'ours')),
      f'{clock["theirs"] / clock["ours"]:.2f}x ({cpu["theirs"] / cpu["ours"]:.2f}x)',
      f'{difference:.1e} of the maximum',
      f'{clock["alone"] / clock["ours"]:.2%} ({cpu["alone"] / cpu["ours"]:.2%})',
    )
  Console(width=120).print(table)


if __name__ == '__main__':
  main()
