"""Global batches from the rows that each process holds."""

from collections.abc import Mapping

import jax
import numpy as np

from fmcv_jax.parallel.rules import Placement


def to_devices(local: Mapping[str, np.ndarray], placement: Placement) -> dict[str, jax.Array]:
  """The global batch, sharded over the mesh, of which this process holds the rows `local`."""
  processes = jax.process_count()
  shapes = {k: jax.ShapeDtypeStruct((len(v) * processes, *v.shape[1:]), v.dtype) for k, v in local.items()}
  shardings = placement.batch(shapes)
  return {k: jax.make_array_from_process_local_data(shardings[k], v, shapes[k].shape) for k, v in local.items()}
