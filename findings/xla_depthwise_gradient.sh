#!/bin/bash
# jax 0.10.2 and 0.12.0.1: the gradient of a depthwise convolution's kernel is multiplied on a mesh with a second axis.
#
# A mesh has the axes data and tensor, the images are split over data alone, and the kernel [3, 3, 1, D] is held by every
# device: what data parallelism looks like in a program whose other layers are also split over tensor. The partitioner sums
# the gradient of the kernel over the devices of tensor too, although they hold the same images: with two of them it is
# twice as large, with four four times. The loss, the gradient of the images and gradients of ordinary convolutions are
# right, so that training continues, with the learning rate of one layer multiplied; adaptive optimizers hide most of it.
# With the convolution inside of jax.shard_map, which sums by itself, the gradient is right.
#
# Observed on 2026-11-30 on 8 emulated CPU devices, with Python 3.11 (jax 0.10.2) and 3.13 (jax 0.12.0.1); other backends
# were not tried. Exits with 0 while that holds, and with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'jax==0.10.2' 'jaxlib==0.10.2'
JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 TF_CPP_MIN_LOG_LEVEL=3 "$folder/venv/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

rng = np.random.default_rng(0)
images = rng.normal(size=(8, 6, 6, 16)).astype(np.float32)
kernel = rng.normal(size=(3, 3, 1, 16)).astype(np.float32)


def convolution(images, kernel):
  layout = ('NHWC', 'HWIO', 'NHWC')
  return jax.lax.conv_general_dilated(images, kernel, (1, 1), 'SAME', dimension_numbers=layout, feature_group_count=16)


def gradient(kernel, images, convolution=convolution):
  return jax.grad(lambda kernel: jnp.tanh(convolution(images, kernel)).sum())(kernel)


expected = np.asarray(jax.jit(gradient)(kernel, images))
for shape in ((8, 1), (4, 2), (2, 4)):
  mesh = Mesh(np.array(jax.devices()).reshape(shape), ('data', 'tensor'))
  split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (('data',), ()))
  placed = jax.device_put(kernel, whole), jax.device_put(images, split)
  factor = float(np.median(np.asarray(jax.jit(gradient, out_shardings=whole)(*placed)) / expected))
  inside = jax.shard_map(
    convolution, mesh=mesh, in_specs=(split.spec, whole.spec), out_specs=split.spec, check_vma=False
  )
  mapped = jax.jit(lambda *args, inside=inside: gradient(*args, inside), out_shardings=whole)(*placed)
  mended = float(np.median(np.asarray(mapped) / expected))
  print(f'mesh of {shape[0]} x {shape[1]}: factor {factor:.4f}, in a shard_map {mended:.4f}')
  assert abs(factor - shape[1]) < 1e-3
  assert abs(mended - 1) < 1e-3
PYTHON
