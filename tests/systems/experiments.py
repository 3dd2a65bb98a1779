"""A system from outside of the package, from its config to the outputs of the trained model."""

import jax
import numpy as np

from fmcv_jax import experiment, trainer
from fmcv_jax.config import override
from fmcv_jax.data.loader import TrainLoader
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.parallel.batches import to_devices
from fmcv_jax.run import Run
from fmcv_jax.train.storage import read_metrics

STEPS = 20
MESHES = {
  'data': ('mesh.data=8',),
  'fsdp': ('mesh.data=1', 'mesh.fsdp=8'),
  'data x tensor': ('mesh.data=4', 'mesh.tensor=2'),
}


def make_config(objective, source, *, peak_lr=3e-3, **fields):
  """A resolved config of `STEPS` steps of 16 examples."""
  return experiment.resolve(
    {
      'objective': objective,
      'data': {'source': {'name': source}},
      'optimizer': {'schedule': {'name': 'cosine', 'peak_lr': peak_lr, 'warmup_steps': 2}, 'clip_norm': 1.0},
      'train': {'steps': STEPS, 'batch_size': 16},
      'checkpoint': {'every': STEPS},
      'log': {'every': 1, 'tensorboard': False},
      **fields,
    }
  )


def losses_on(config, overrides):
  """The loss of each step, float [STEPS], on the mesh that the overrides name."""
  run = Run(override(config, overrides))
  state = jax.jit(run.init, out_shardings=run.shardings)()
  step, e = run.train_step(), run.experiment
  loader = TrainLoader(
    e.data, batch=e.train.batch_size, seed=e.seed, fields=tuple(run.batch_shapes), tokenizer=e.tokenizer
  )
  losses = []
  for _ in range(e.train.steps):
    state, metrics = step(state, to_devices(next(loader), run.placement))
    losses.append(float(metrics['loss']))
  loader.close()
  return np.array(losses)


def assert_equal_losses_on_all_meshes(config, rtol=1e-5, more=()):
  """`more` are further pairs of a mesh's name and overrides that change nothing but how the loss is computed."""
  losses = {name: losses_on(config, overrides) for name, overrides in [*MESHES.items(), *more]}
  for name, others in losses.items():
    np.testing.assert_allclose(others, losses['data'], rtol=rtol, err_msg=name)
  assert_falls(losses['data'])


def assert_falls(losses, to=0.9):
  """The mean of the last four losses is at most `to` times that of the first four."""
  assert np.isfinite(losses).all()
  assert losses[-4:].mean() < to * losses[:4].mean()


def trained(config, workdir) -> tuple[np.ndarray, Run, EvaluatedModel]:
  """The losses of a whole run in a workdir, and the model that it leaves there."""
  trainer.train(config, workdir)
  losses = np.array([row['train/loss'] for row in read_metrics(workdir / 'metrics.jsonl') if 'train/loss' in row])
  run = Run.reopen(workdir)
  return losses, run, run.restored_model()[0]


def map_all(run, model, truth=()):
  """Every output over the training data by name, each a tree of arrays in the dtypes and shapes of its function."""
  data = run.experiment.data
  found = {}
  for name, output in model.outputs.items():
    batch = {field: np.zeros((16, *x.shape), x.dtype) for field, x in run.experiment.objective.example_batch.items()}
    batch |= {'index': np.arange(16, dtype=np.int32), 'rng': jax.random.key(0)}
    own = jax.eval_shape(output.call, model.params, model.extra, batch)
    found[name] = model.map_dataset(name, data, 16, truth)
    of_all = jax.tree.map(lambda x: (x.shape[1:], np.dtype(x.dtype)), found[name].values)
    assert of_all == jax.tree.map(lambda x: (x.shape[1:], np.dtype(x.dtype)), own), name
    assert {len(x) for x in jax.tree.leaves(found[name].values)} == {len(data.source)}, name
  return found
