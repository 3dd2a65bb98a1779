"""What the tests against reference libraries share: small sizes, inputs, and the way of weights in and out."""

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.experiment import resolve
from fmcv_jax.pretrained.tensors import PARTS, open_tensors
from fmcv_jax.run import Run
from fmcv_jax.train.checkpoint import Checkpointer
from fmcv_jax.train.storage import write_json

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')

TOWER = {'hidden_size': 128, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 192}
IMAGE = {**TOWER, 'image_size': 32, 'patch_size': 8}
TEXT = {
  **TOWER,
  'vocab_size': 92,
  'max_position_embeddings': 6,
  'bos_token_id': 90,
  'eos_token_id': 91,
  'pad_token_id': 0,
}
# Wide enough for the groups of the norms to be as many as in the published sizes.
CODER = {
  'block_out_channels': (128, 128),
  'down_block_types': ('DownEncoderBlock2D',) * 2,
  'up_block_types': ('UpDecoderBlock2D',) * 2,
  'layers_per_block': 1,
}
PIXELS = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
TOKENS = np.array([[90, 5, 7, 91, 0, 0], [90, 62, 9, 11, 3, 91]], np.int32)


def published(model, folder):
  """A folder as the hub has it, with weights that are no initial values."""
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
  model.eval().save_pretrained(folder)
  return model


def imported(folder, tmp_path, family):
  run = import_checkpoint(str(folder), str(tmp_path / 'ours'), family)
  subject, _ = run.restored_model()
  return run.experiment.objective, jax.device_get(subject.params)


def comes_back(folder, tmp_path, form):
  several = any((folder / part).is_dir() for part in PARTS)
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out' / ('' if several else 'model.safetensors')), form)
  first, again = open_tensors(folder), open_tensors(tmp_path / 'out')
  for name, shape in again.shapes.items():
    assert first.shapes[name] == shape, name
    np.testing.assert_array_equal(first[name], again[name], err_msg=name)
  left = {name for name in set(first.shapes) - set(again.shapes) if 'position_ids' not in name and 'index' not in name}
  assert not left


def to_torch(x):
  """Images [B, H, W, C] as torch wants them."""
  return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def equal(ours, theirs):
  """ours [B, H, W, C] and theirs [B, C, H, W], to 3e-5 of the largest value."""
  theirs = theirs.detach().numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(ours, theirs, atol=3e-5 * np.abs(theirs).max())


def initialized(folder, objective):
  """A workdir with the initial parameters of a run: zero training steps."""
  run = Run(resolve({'objective': objective}), folder)
  state = run.init()
  folder.mkdir(parents=True)
  write_json(run.workdir / 'config.json', run.config)
  store = Checkpointer(run.workdir)
  store.save(state, {})
  store.wait()
  store.close()
  return run


def sd_parts(folder, family, channels=4):
  """A small Stable Diffusion as diffusers has it on disk: (UNet, autoencoder, text tower)."""
  import diffusers
  import transformers

  unet = diffusers.UNet2DConditionModel(**unet_config(family, channels))
  coder = diffusers.AutoencoderKL(**CODER, scaling_factor=0.2)
  activation = {'sd1': 'quick_gelu', 'sd2': 'gelu'}[family]
  tokens = {'vocab_size': 49_408, 'max_position_embeddings': 77, 'eos_token_id': 49_407, 'bos_token_id': 49_406}
  small = {'hidden_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 1, 'intermediate_size': 128}
  text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**small, **tokens, hidden_act=activation))
  for name, part in (('unet', unet), ('vae', coder), ('text_encoder', text)):
    published(part, folder / name)
  file = folder / 'text_encoder' / 'model.safetensors'
  # As the hub's files have it; transformers 5 writes it without the prefix.
  save_file({f'text_model.{name.removeprefix("text_model.")}': x for name, x in load_file(file).items()}, file)
  return unet, coder, text


def unet_config(family, channels=4):
  return {
    'in_channels': channels,
    'block_out_channels': (128, 128),
    'down_block_types': ('CrossAttnDownBlock2D', 'DownBlock2D'),
    'up_block_types': ('UpBlock2D', 'CrossAttnUpBlock2D'),
    'cross_attention_dim': 64,
    'attention_head_dim': 8 if family == 'sd1' else (2, 2),  # in truth the number of heads
    'use_linear_projection': family == 'sd2',
    'sample_size': 8,
  }
