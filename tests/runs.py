"""A dataset of real files and small configs on it, for tests that run whole experiments."""

import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from fmcv_jax import experiment, trainer
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.run import Run, keep_tokenizer, load_trained_params
from fmcv_jax.train import loop
from fmcv_jax.train.checkpoint import Checkpointer
from fmcv_jax.train.storage import read_metrics

REPOSITORY = pathlib.Path(__file__).parent.parent
UNET = {
  'name': 'unet',
  'variant': 'mu',
  'image_size': 16,
  'channels': 3,
  'block_out_channels': (16,),
  'depths': (0,),
  'layers': 1,
  'cross_attention_dim': 0,
}
LOCAL = ('launch/local.py', '--processes', '2', '--devices', '2', '--')


def image_folder(path, count=24, classes=3, size=20):
  """`count` PNGs in class folders, and captions.csv with two captions for each; every class has its own color."""
  generator = np.random.default_rng(0)
  rows = ['image,caption']
  for index in range(count):
    label = index % classes
    pixels = generator.integers(0, 60, (size, size, 3))
    pixels[..., label] += 180
    file = path / 'abc'[label] / f'{index}.png'
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(file)
    color = ('red', 'green', 'blue')[label]
    rows += [f'{"abc"[label]}/{index}.png,a {color} image', f'{"abc"[label]}/{index}.png,{color}']
  (path / 'captions.csv').write_text('\n'.join(rows) + '\n')
  return path


def classification(folder, **changes):
  return _resolved(
    {
      'objective': {
        'name': 'classification',
        'mixup': 0.2,
        'augment': ({'name': 'flip'},),
        'network': {'name': 'vit', 'variant': 'mu/8', 'image_size': 16, 'num_classes': 3, 'drop_path': 0.1},
      },
      'data': {
        'source': {'name': 'image_folder', 'path': str(folder)},
        'image': {'name': 'random_resized_crop', 'size': 16},
      },
      'evaluators': {
        'val': {
          'name': 'accuracy',
          'every': 4,
          'batch_size': 16,
          'data': {'source': {'name': 'image_folder', 'path': str(folder)}, 'image': {'name': 'resize', 'size': 16}},
        }
      },
      'optimizer': {'schedule': {'name': 'cosine', 'peak_lr': 3e-3, 'warmup_steps': 2}, 'clip_norm': 1.0},
      'train': {'steps': 8, 'batch_size': 16, 'ema_decay': 0.9},
      'checkpoint': {'every': 3},
      'log': {'every': 1, 'tensorboard': False},
    },
    changes,
  )


def contrastive(folder, **changes):
  source = {'name': 'image_folder', 'path': str(folder), 'captions': 'captions.csv'}
  return _resolved(
    {
      'objective': {
        'name': 'contrastive',
        'network': {
          'name': 'dual_encoder',
          'image': {'name': 'vit', 'variant': 'mu/8', 'image_size': 16, 'num_classes': 16, 'head_bias': False},
          'text': {
            'name': 'text_transformer',
            'vocab_size': 300,
            'length': 8,
            'width': 32,
            'depth': 1,
            'num_heads': 2,
            'num_classes': 16,
          },
        },
      },
      'tokenizer': {'name': 'bpe', 'vocab_size': 300, 'length': 8, 'corpus': source},
      'data': {'source': source, 'image': {'name': 'random_resized_crop', 'size': 16}},
      'optimizer': {'schedule': {'name': 'cosine', 'peak_lr': 3e-3, 'warmup_steps': 2}},
      'train': {'steps': 4, 'batch_size': 16},
      'log': {'every': 1, 'tensorboard': False},
    },
    changes,
  )


def language(folder, **changes):
  """Captions by a prefix language model, scored at the end."""
  source = {'name': 'image_folder', 'path': str(folder), 'captions': 'captions.csv'}
  data = {'source': source, 'image': {'name': 'resize', 'size': 16}}
  network = {'name': 'paligemma', 'variant': 'paligemma_mu', 'image_size': 16, 'vocab_size': 300, 'length': 40}
  words = {'name': 'bpe', 'vocab_size': 300, 'length': 40, 'corpus': source}
  return _resolved(
    {
      'objective': {'name': 'language', 'network': network},
      'tokenizer': {'name': 'prompted', 'length': 40, 'words': words},
      'data': {**data, 'caption_templates': ('caption en\n{}',)},
      'evaluators': {'val': {'name': 'captioning', 'data': data, 'batch_size': 16, 'decoding': {'max_tokens': 6}}},
      'optimizer': {'schedule': {'name': 'cosine', 'peak_lr': 3e-3, 'warmup_steps': 2}},
      'train': {'steps': 4, 'batch_size': 16},
      'log': {'every': 1, 'tensorboard': False},
    },
    changes,
  )


def text_to_image(folder, **changes):
  """Latent diffusion conditioned on text; its text encoder is frozen at its initial values."""
  text = {
    'vocab_size': 300,
    'length': 8,
    'width': 16,
    'depth': 1,
    'num_heads': 2,
    'causal': False,
    'attend_padding': False,
  }
  source = {'name': 'image_folder', 'path': str(folder), 'captions': 'captions.csv'}
  coder = {'channels': (4, 4), 'layers': 1, 'latent_channels': 4, 'image_size': 16, 'middle_attention': False}
  network = {'variant': 'mu/2', 'image_size': 8, 'channels': 4, 'cross_attention': True, 'pooled_text': True}
  return _resolved(
    {
      'objective': {
        'name': 'diffusion',
        'network': {'name': 'dit', **network},
        'process': {'schedule': 'flow', 'prediction': 'flow'},
        'latent_space': {'autoencoder': {'name': 'autoencoder', **coder}},
        'text_condition': {'encoder': {'name': 'text_transformer', **text}},
      },
      'tokenizer': {'name': 'bpe', 'vocab_size': 300, 'length': 8, 'corpus': source},
      'data': {'source': source, 'image': {'name': 'resize', 'size': 16}},
      'evaluators': {
        'val': {
          'name': 'denoising',
          'batch_size': 16,
          'data': {'source': source, 'image': {'name': 'resize', 'size': 16}},
        }
      },
      'optimizer': {'schedule': {'name': 'cosine', 'peak_lr': 3e-3, 'warmup_steps': 2}},
      'train': {'steps': 4, 'batch_size': 16},
      'log': {'every': 1, 'tensorboard': False},
    },
    changes,
  )


def class_to_image(folder, **changes):
  """Pixel diffusion conditioned on classes."""
  return _resolved(
    {
      'objective': {
        'name': 'diffusion',
        'network': {'name': 'dit', 'variant': 'mu/4', 'image_size': 16, 'channels': 3, 'num_classes': 3},
        'process': {'schedule': 'cosine', 'prediction': 'velocity'},
      },
      'data': {
        'source': {'name': 'image_folder', 'path': str(folder)},
        'image': {'name': 'random_resized_crop', 'size': 16},
      },
      'optimizer': {'schedule': {'name': 'cosine', 'peak_lr': 3e-3, 'warmup_steps': 2}},
      'train': {'steps': 4, 'batch_size': 16},
      'log': {'every': 1, 'tensorboard': False},
    },
    changes,
  )


def controlnet(folder, **changes):
  """Class-conditional pixel diffusion with a ControlNet for edges."""
  objective = {
    'name': 'diffusion',
    'network': {**UNET, 'num_classes': 3},
    'image_condition': {'control': {'name': 'edges'}},
  }
  return _resolved({**class_to_image(folder), 'objective': objective}, changes)


def inpainting(folder, **changes):
  """Pixel diffusion for inpainting, conditioned on a mask and the masked image."""
  objective = {
    'name': 'diffusion',
    'network': {**UNET, 'extra_in_channels': 4},
    'image_condition': {'inpainting': {'full_mask_probability': 0.5}},
  }
  return _resolved({**class_to_image(folder), 'objective': objective}, changes)


def autoencoder(folder, **changes):
  """An autoencoder trained with a discriminator."""
  network = {'channels': (4, 4), 'layers': 1, 'latent_channels': 4, 'image_size': 16, 'middle_attention': False}
  objective = {'name': 'autoencoding', 'network': {'name': 'autoencoder', **network}, 'adversarial_start': 2}
  return _resolved(
    {**class_to_image(folder), 'objective': {**objective, 'discriminator_width': 8, 'discriminator_layers': 1}}, changes
  )


def untrained(config, workdir, changed=lambda params: params):
  """Writes a workdir that holds the state before the first step, with `changed` applied to its parameters."""
  run = Run(config, workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'config.json').write_text(json.dumps(config))
  keep_tokenizer(run)

  def initial():
    state = run.init()
    return state.replace(params=changed(state.params))

  store = Checkpointer(workdir)
  store.save(jax.jit(initial, out_shardings=run.shardings)(), {})
  store.close()
  return workdir


def _resolved(config, changes):
  from fmcv_jax.config import override

  return experiment.resolve(override(config, [f'{path.replace("__", ".")}={value}' for path, value in changes.items()]))


def stopped(config, workdir, step):
  """Runs a config in this process up to `step`, where it is preempted."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(loop.PreemptionGuard, 'requested', lambda self, now: now == step)
    with pytest.raises(loop.Preempted, match=f'at step {step}: saved'):
      trainer.train(config, workdir)


def assert_bitwise_equal(a, b):
  for x, y in zip(jax.tree.leaves(jax.device_get(a)), jax.tree.leaves(jax.device_get(b)), strict=True):
    np.testing.assert_array_equal(x, y)


def start(config, workdir, *, launcher=('-m', 'fmcv_jax'), **options):
  """Starts a run in a process of its own; `launcher` holds the arguments between python and `train`."""
  file = pathlib.Path(f'{workdir}.py')
  file.write_text(f'import json\n\n\ndef get_config():\n  return json.loads({json.dumps(config)!r})\n')
  command = [sys.executable, *launcher, 'train', '--config', file, '--workdir', workdir]
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
  return subprocess.Popen([str(x) for x in command], cwd=REPOSITORY, text=True, **pipes, **options)


def steps_of(workdir):
  """The steps for which a run has written metrics so far."""
  return [row['step'] for row in read_metrics(epath.Path(workdir) / 'metrics.jsonl')]


def parameters(workdir):
  """The learned parameters of a run, as {path: array}."""
  params = load_trained_params(str(workdir))['params']
  return {path_of(path): np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
