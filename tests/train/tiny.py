"""Small objectives and batches that the training tests share."""

import jax
import numpy as np

from fmcv_jax.models.backbones.text import text_transformer
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.multimodal.dual_encoder import DualEncoder
from fmcv_jax.objectives.classification import Classification
from fmcv_jax.objectives.contrastive import Contrastive
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement
from fmcv_jax.train.optim import AdamW, Optimizer
from fmcv_jax.train.schedules import Cosine
from fmcv_jax.train.state import init_state, state_shardings, trace_state
from fmcv_jax.train.step import make_train_step

BATCH = 16
MESHES = {
  'data': MeshShape(),
  'fsdp': MeshShape(data=1, fsdp=8),
  'tensor': MeshShape(data=4, tensor=2),
  'data x fsdp x tensor': MeshShape(data=2, fsdp=2, tensor=2),
}


def contrastive(loss_name='softmax', **options):
  image = vit('mu/8', image_size=16, num_classes=16, head_bias=False)
  text = text_transformer(64, 8, 32, 2, 2, num_classes=16)
  bias = -10.0 if loss_name == 'sigmoid' else None
  return Contrastive(DualEncoder(image, text, 10.0, bias), loss_name=loss_name, **options)


def classification(network=None, **options):
  return Classification(network or vit('mu/8', image_size=16, num_classes=10), **options)


def batch_of(objective, seed=0):
  generator = np.random.default_rng(seed)
  limits = {'label': 10, 'tokens': 64, 'segments': 11}
  return {
    name: generator.integers(0, limits.get(name, 256), (BATCH, *x.shape)).astype(x.dtype)
    for name, x in objective.example_batch.items()
  }


def shaken(tree):
  """Moves parameters away from initialization, so that zero-initialized gates and last layers affect the output."""
  generator = np.random.default_rng(7)  # numpy, because a JAX program that draws this many arrays compiles slowly
  return jax.tree.map(lambda x: x + 0.1 * generator.normal(size=x.shape).astype(x.dtype), tree)


class Trainer:
  """A state and its step on a mesh of the first `devices` devices."""

  def __init__(
    self,
    objective,
    mesh=MeshShape(),
    devices=8,
    *,
    rule=AdamW(),
    microbatches=1,
    ema=None,
    clip_norm=1.0,
    steps=20,
  ):
    optimizer = Optimizer(Cosine(1e-3, warmup_steps=2), rule, weight_decay=0.1, clip_norm=clip_norm)
    tx = optimizer.make(steps)
    self.placement = Placement(make_mesh(mesh, jax.devices()[:devices]))
    init = lambda: init_state(objective, tx, 0, ema=ema is not None)  # noqa: E731
    abstract, rows = trace_state(objective, tx, 0, ema=ema is not None)
    self.shardings = state_shardings(abstract, self.placement, rows, objective.frozen_networks)
    self.state = jax.jit(init, out_shardings=self.shardings)()
    self.batch_shardings = self.placement.batch(batch_of(objective))
    self.step = make_train_step(
      objective,
      tx,
      optimizer.schedule(steps),
      self.placement,
      self.shardings,
      self.batch_shardings,
      microbatches=microbatches,
      ema=ema,
    )

  def run(self, batches):
    """The loss of each step."""
    losses = []
    for batch in batches:
      self.state, metrics = self.step(self.state, jax.device_put(batch, self.batch_shardings))
      losses.append(float(metrics['loss']))
    self.metrics = {name: float(value) for name, value in metrics.items()}
    return np.array(losses)
