"""`fmcv export --format fmcv`: a trained model as one small folder, which opens like a workdir."""

import pathlib

import jax
from etils import epath

from fmcv_jax.config import to_plain_dict
from fmcv_jax.inference.class_names import class_names_of
from fmcv_jax.pretrained import packaged
from fmcv_jax.run import CLASSES, Run, tokenizer_file
from fmcv_jax.train.storage import write_json

# Fields of a config that name files of the machine that trained it, or matter to training alone.
TRAINING_ONLY = ('init_from', 'checkpoint', 'mesh', 'rules', 'topology')


def package(workdir: str | pathlib.Path, to: str | pathlib.Path, step: int | None = None) -> int:
  """Writes the config, the tokenizer, the class names and the parameters of a checkpoint to the folder `to`.

  Parameters are the moving average where the run keeps one; frozen networks, such as a text encoder, are included.
  Returns the size of the parameters in bytes.
  """
  run, folder = Run.reopen(workdir), epath.Path(to)
  config = {name: value for name, value in to_plain_dict(run.config).items() if name not in TRAINING_ONLY}
  subject, step = run.restored_model(step)
  names = class_names_of(run)
  folder.mkdir(parents=True, exist_ok=True)
  write_json(folder / 'config.json', config)
  if (spec := config.get('tokenizer')) and (file := tokenizer_file(spec)):
    (run.workdir / file).copy(folder / file, overwrite=True)
  if names:
    write_json(folder / CLASSES, list(names))
  arrays = jax.device_get({'params': subject.params, 'extra': subject.extra})
  packaged.write_params(folder / packaged.PARAMS, arrays, step)
  return (folder / packaged.PARAMS).stat().length
