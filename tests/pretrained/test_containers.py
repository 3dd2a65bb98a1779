"""Files as people have them: every container, variant, wrapper and prefix gives the arrays that the library saved."""

import argparse
import collections
import json

import numpy as np
import pytest

from fmcv_jax.errors import UserError
from fmcv_jax.pretrained.recognition import recognize
from fmcv_jax.pretrained.tensors import open_tensors

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
timm = pytest.importorskip('timm', reason='pip install fmcv-jax[parity]')
diffusers = pytest.importorskip('diffusers', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')
from safetensors.torch import save_file  # noqa: E402

from tests.pretrained.references import CODER, IMAGE  # noqa: E402

SMALL = {'img_size': 16, 'patch_size': 8, 'embed_dim': 64, 'depth': 2, 'num_heads': 1, 'num_classes': 3}


def network(seed=0):
  torch.manual_seed(seed)
  return timm.create_model('vit_base_patch16_224', **SMALL)


def equal(tensors, state):
  assert set(tensors.shapes) == set(state)
  for name, x in state.items():
    assert tensors.shapes[name] == tuple(x.shape)
    np.testing.assert_array_equal(tensors[name], x.detach().float().numpy(), err_msg=name)


@pytest.mark.parametrize(
  'dtype', ['float64', 'float32', 'float16', 'bfloat16', 'float8_e4m3fn', 'float8_e5m2', 'float8_e4m3fnuz', 'int8']
)
@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
def test_every_type_of_numbers_is_read(tmp_path, dtype, suffix):
  x = (8 * torch.randn(3, 5)).to(getattr(torch, dtype))
  state = {'x': x, 'scalar': x[0, 0].clone(), 'none': x[:0]}
  (save_file if suffix == 'safetensors' else torch.save)(state, tmp_path / f'x.{suffix}')
  tensors = open_tensors(tmp_path / f'x.{suffix}')
  for name, value in state.items():
    np.testing.assert_array_equal(tensors[name], value.double().numpy(), strict=False)
    assert tensors[name].shape == tuple(value.shape)
  assert tensors['x'].dtype.itemsize >= (4 if 'float' in dtype else 1)


def saved(folder, **how):
  torch.manual_seed(1)
  model = diffusers.AutoencoderKL(**CODER)
  model.save_pretrained(folder, **how)
  return {name: x.half() if how.get('variant') else x for name, x in model.state_dict().items()}


@pytest.mark.parametrize('safe', [True, False])
@pytest.mark.parametrize('shards', [True, False])
@pytest.mark.parametrize('variant', [None, 'fp16'])
def test_folders_of_diffusers_are_read(tmp_path, safe, shards, variant):
  how = {'safe_serialization': safe, 'variant': variant, **({'max_shard_size': '1MB'} if shards else {})}
  if variant:  # save_pretrained names it and leaves the numbers as they are
    torch.manual_seed(1)
    model = diffusers.AutoencoderKL(**CODER).half()
    model.save_pretrained(tmp_path, **how)
    state = model.state_dict()
  else:
    state = saved(tmp_path, **how)
  assert len(list(tmp_path.glob('*-of-*'))) >= (2 if shards else 0)
  tensors = open_tensors(tmp_path)
  equal(tensors, state)
  assert ['fp16' in note for note in tensors.notes] == ([True] if variant else [])


def test_full_precision_goes_before_a_variant_and_safetensors_before_bin(tmp_path):
  diffusers.AutoencoderKL(**CODER).half().save_pretrained(tmp_path, variant='fp16')
  diffusers.AutoencoderKL(**CODER).save_pretrained(tmp_path, safe_serialization=False)
  torch.save({'state': {}, 'param_groups': []}, tmp_path / 'optimizer.bin')
  state = torch.load(tmp_path / 'diffusion_pytorch_model.bin')
  equal(open_tensors(tmp_path), state)
  state = saved(tmp_path)
  equal(open_tensors(tmp_path), state)


def test_a_pipeline_of_bin_files_is_read(tmp_path):
  unet = saved(tmp_path / 'vae', safe_serialization=False)
  text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**{**IMAGE, 'vocab_size': 99}))
  (tmp_path / 'text_encoder').mkdir()
  torch.save(text.state_dict(), tmp_path / 'text_encoder' / 'pytorch_model.bin')
  named = {f'vae.{name}': x for name, x in unet.items()}
  equal(open_tensors(tmp_path), named | {f'text_encoder.{name}': x for name, x in text.state_dict().items()})


def args():
  return argparse.Namespace(lr=0.1, model='vit')


# What training frameworks save: of the state dicts of the network meant, of an optimizer, and of another network.
WRAPPED = {
  'timm': lambda s, o, n: {'epoch': 3, 'arch': 'x', 'state_dict': s, 'optimizer': o, 'args': args()},
  'timm, averaged': lambda s, o, n: {'state_dict': n, 'state_dict_ema': s, 'metric': np.float64(0.5)},
  'DeiT, MAE': lambda s, o, n: {'model': s, 'optimizer': o, 'epoch': 1, 'scaler': {}, 'args': args()},
  'DeiT, averaged': lambda s, o, n: {'model': n, 'model_ema': s, 'optimizer': o},
  'DeepSpeed': lambda s, o, n: {'module': s, 'optimizer': o, 'global_steps': 5},
  'Lightning': lambda s, o, n: {'state_dict': s, 'optimizer_states': [o], 'pytorch-lightning_version': '2'},
  'MoCo': lambda s, o, n: {'epoch': 1, 'arch': 'vit', 'state_dict': s, 'optimizer': o},
  'BasicSR': lambda s, o, n: {'params': n, 'params_ema': s},
  'torchvision': lambda s, o, n: {
    'model': s,
    'lr_scheduler': {'last_epoch': 1},
    'model_ema': s,
    'args': args(),
  },
  'an example of PyTorch': lambda s, o, n: {
    'model_state_dict': s,
    'optimizer_state_dict': o,
    'loss': torch.ones(()),
  },
  'in two': lambda s, o, n: {'model': {'state_dict': collections.OrderedDict(s)}},
  'by another name': lambda s, o, n: {'my_net': s, 'optimizer': o},
  'DINO': lambda s, o, n: {'student': n, 'teacher': s, 'optimizer': o, 'args': args()},
}


@pytest.mark.parametrize('name', WRAPPED)
def test_the_weights_of_a_training_checkpoint_are_read(tmp_path, name):
  model, other = network(), network(1)
  optimizer = torch.optim.AdamW(model.parameters())
  for x in model.parameters():
    x.grad = torch.ones_like(x)
  optimizer.step()
  state = model.state_dict()
  torch.save(WRAPPED[name](state, optimizer.state_dict(), other.state_dict()), tmp_path / 'x.pth.tar')
  tensors = open_tensors(tmp_path / 'x.pth.tar')
  equal(tensors, state)
  assert bool(tensors.notes) == (name in {'timm, averaged', 'DeiT, averaged', 'BasicSR', 'DINO', 'torchvision'})


def test_timm_takes_the_same_of_its_own_checkpoint(tmp_path):
  from timm.models import load_state_dict
  from timm.utils import CheckpointSaver, ModelEmaV3

  model = network()
  average = ModelEmaV3(model, decay=0.5)
  with torch.no_grad():
    for x in model.parameters():
      x += 1
  average.update(model)
  optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
  saver = CheckpointSaver(model, optimizer, args=args(), model_ema=average, checkpoint_dir=str(tmp_path))
  saver.save_checkpoint(0, metric=0.5)
  equal(open_tensors(tmp_path / 'last.pth.tar'), load_state_dict(str(tmp_path / 'last.pth.tar'), use_ema=True))


def test_parameters_that_keep_their_gradients_are_read(tmp_path):
  model = network()
  torch.save(dict(model.named_parameters()), tmp_path / 'x.pt')
  torch.save(model.state_dict(), tmp_path / 'old.pt', _use_new_zipfile_serialization=False)
  for name in ('x.pt', 'old.pt'):
    equal(open_tensors(tmp_path / name), dict(model.named_parameters()))


PREFIXES = (
  *('module.', 'model.', '_orig_mod.', '_orig_mod.module.', 'module._orig_mod.', 'backbone.', 'encoder.'),
  *('model.backbone.', 'net.vit.', 'student.backbone.'),
)


@pytest.mark.parametrize('prefix', PREFIXES)
@pytest.mark.parametrize('suffix', ['safetensors', 'pth'])
def test_a_prefix_of_all_names_is_taken_off(tmp_path, prefix, suffix):
  state = network().state_dict()
  named = {prefix + name: x for name, x in state.items()}
  (save_file if suffix == 'safetensors' else torch.save)(named, tmp_path / f'x.{suffix}')
  found = recognize(open_tensors(tmp_path / f'x.{suffix}'), None, 'x')
  assert found.name == 'vit'
  equal(found.tensors, state)


def test_a_prefix_of_some_names_is_in_doubt(tmp_path):
  named = {f'backbone.{name}': x for name, x in network().state_dict().items()}
  save_file({**named, 'neck.weight': torch.ones(3, 3)}, tmp_path / 'x.safetensors')
  with pytest.raises(UserError, match=r"below 'backbone\.' look like 'deit', but the file also has neck.weight"):
    recognize(open_tensors(tmp_path / 'x.safetensors'), None, 'x')


POINTER = b'version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 100\n'


def lora():
  return {'unet.down.lora_A.weight': torch.ones(4, 8), 'unet.down.lora_B.weight': torch.ones(8, 4)}


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('x.safetensors', POINTER, 'pointer of Git LFS'),
    ('x.bin', POINTER, 'pointer of Git LFS'),
    ('x.gguf', b'GGUF\x03\x00\x00\x00', 'a GGUF file'),
    ('x.bin', b'GGUF\x03\x00\x00\x00', 'a GGUF file'),
    ('x.h5', b'\x89HDF\r\n\x1a\n', 'an HDF5 file'),
    ('x.pth', b'<!DOCTYPE html><html>not found</html>', 'a page of the web'),
    ('x.pth.gz', b'\x1f\x8b\x08', 'packed by gzip'),
    ('x.pt', b'', 'is empty'),
    ('x.safetensors', lora(), 'a LoRA or another adapter'),
    ('x.safetensors', {'emb_params': torch.ones(4, 768)}, 'a textual inversion'),
    ('x.bin', {'<cat-toy>': torch.ones(768)}, 'a textual inversion'),
    ('x.pt', {'string_to_token': {'*': 265}, 'string_to_param': {'*': torch.ones(2, 768)}}, 'a textual inversion'),
    ('x.pt', {'string_to_param': torch.nn.ParameterDict({'*': torch.ones(2, 768)})}, 'a textual inversion'),
    ('x.bin', torch.optim.SGD([torch.ones(3)], momentum=0.9).state_dict(), 'state of an optimizer'),
    ('x.pth', [torch.ones(3)], 'holds no tensors with names'),
    ('x.pth', {'epoch': 3}, 'holds no tensors with names'),
    ('x.pth', {'gen': {'w': torch.ones(3)}, 'disc': {'w': torch.ones(3)}}, 'several sets of weights, disc, gen'),
    ('x.pth', {'w': torch.ones(3, 3).to_sparse()}, 'w is not a plain tensor'),
    ('x.pth', torch.nn.Linear(2, 3), r'only running torch\.nn\.modules\.linear\.Linear could read'),
    ('x.safetensors', {'a.weight': torch.ones(3, 3), 'a.weight.absmax': torch.ones(3)}, 'quantized'),
  ],
)
def test_what_is_no_checkpoint_of_a_network_is_named(tmp_path, name, content, message):
  if isinstance(content, bytes):
    (tmp_path / name).write_bytes(content)
  else:
    (save_file if name.endswith('safetensors') else torch.save)(content, tmp_path / name)
  with pytest.raises(UserError, match=message) as error:
    use(tmp_path / name)
  assert str(error.value).startswith(f'{tmp_path / name}: ')
  assert '\n' not in str(error.value)


def use(file):
  tensors = open_tensors(file)
  if 'w' in tensors.shapes:
    return tensors['w']
  return recognize(tensors, None, str(file))


def test_a_pointer_in_place_of_a_shard_or_an_index_is_named(tmp_path):
  saved(tmp_path, max_shard_size='1MB')
  next(tmp_path.glob('*-of-*')).write_bytes(POINTER)
  with pytest.raises(UserError, match=r'-of-.*pointer of Git LFS'):
    open_tensors(tmp_path)
  (tmp_path / 'diffusion_pytorch_model.safetensors.index.json').write_bytes(POINTER)
  with pytest.raises(UserError, match=r'index\.json: is a pointer of Git LFS'):
    open_tensors(tmp_path)


def test_an_index_that_is_none_is_one_line(tmp_path):
  saved(tmp_path, max_shard_size='1MB')
  index = tmp_path / 'diffusion_pytorch_model.safetensors.index.json'
  for content in ('[]', '{}', json.dumps({'weight_map': 3}), 'nonsense'):
    index.write_text(content)
    with pytest.raises(UserError, match='is not an index of shards'):
      open_tensors(tmp_path)
