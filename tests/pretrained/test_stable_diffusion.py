"""Stable Diffusion and ControlNet, as diffusers writes them, give their outputs and come back bitwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.diffusion.condition import make_condition
from fmcv_jax.errors import UserError
from fmcv_jax.models.generative.controlnet import controlnet
from fmcv_jax.pretrained import families as known
from fmcv_jax.pretrained.tensors import open_tensors
from tests.pretrained.references import CODER, comes_back, equal, published, sd_parts, to_torch, unet_config

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
diffusers = pytest.importorskip('diffusers', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')

SIZES = ['objective.network.image_size=8', 'objective.latent_space.autoencoder.image_size=16']
FAMILIES = [pytest.param('sd1', marks=pytest.mark.slow), 'sd2']


@pytest.mark.parametrize('family', FAMILIES)
def test_stable_diffusion(tmp_path, family):
  unet, _, tower = sd_parts(tmp_path / 'theirs', family)
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), family)
  objective = run.experiment.objective  # of the sides and the scale that the folder tells
  assert (
    objective.network.image_size,
    objective.latent_space.autoencoder.image_size,
    objective.latent_space.scale,
  ) == (8, 16, 0.2)
  subject, _ = run.restored_model()
  x = np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype(np.float32)
  prompts, time = ['a red apple', ''], np.array([7, 900])
  generator = objective.generator(subject.params, subject.extra)
  batch = {'tokens': subject.tokenizer(prompts)}
  ours = jax.jit(generator.denoise)(jnp.asarray(x), jnp.asarray(time), generator.condition(batch))
  ends = np.where(batch['tokens'] == 0, 49_407 if family == 'sd1' else 0, batch['tokens'])
  with torch.no_grad():
    words = tower(torch.from_numpy(ends).long()).last_hidden_state
    theirs = unet(to_torch(x), torch.from_numpy(time), words).sample
  equal(ours, theirs)
  comes_back(tmp_path / 'theirs', tmp_path, 'diffusers')
  as_compvis(tmp_path, run, family)


def as_compvis(tmp_path, run, family):
  """The file of the original release, as diffusers itself turns it into its own names."""
  from diffusers.loaders import single_file_utils

  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'one.safetensors'), 'compvis')
  whole, theirs = load_file(tmp_path / 'one.safetensors'), open_tensors(tmp_path / 'theirs')
  state = {name: torch.from_numpy(x) for name, x in whole.items()}
  config = {'layers_per_block': 2, **unet_config(family)}
  parts = {
    'unet.': single_file_utils.convert_ldm_unet_checkpoint(dict(state), config),
    'vae.': single_file_utils.convert_ldm_vae_checkpoint(dict(state), CODER),
  }
  if family == 'sd2':
    tower = transformers.CLIPTextModel(transformers.CLIPTextConfig(hidden_size=64))
    parts['text_encoder.'] = single_file_utils.convert_open_clip_checkpoint(tower, dict(state))
  for prefix, converted in parts.items():
    assert {f'{prefix}{name}' for name in converted} == {name for name in theirs.shapes if name.startswith(prefix)}
    for name, x in converted.items():
      np.testing.assert_array_equal(x.numpy(), theirs[prefix + name].reshape(x.shape), err_msg=name)
  if family == 'sd2':  # published files hold weights that generation does not use
    tower = 'cond_stage_model.model.'
    unused = {f'{tower}transformer.resblocks.23.ln_1.weight': np.ones(64), f'{tower}logit_scale': np.ones(())}
    save_file(whole | unused | {f'{tower}text_projection': np.ones((64, 64))}, tmp_path / 'one.safetensors')
  again = import_checkpoint(str(tmp_path / 'one.safetensors'), str(tmp_path / 'again'), family, SIZES)
  first, second = (jax.device_get(r.restored_model()[0]) for r in (run, again))
  jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
  jax.tree.map(np.testing.assert_array_equal, first.extra, second.extra)


@pytest.mark.slow
def test_an_inpainting_unet(tmp_path):
  """Nine channels: the noisy latent, the mask, and the latent of the masked image."""
  unet, _, _ = sd_parts(tmp_path / 'theirs', 'sd2', channels=9)
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), 'sd2', SIZES)
  subject, _ = run.restored_model()
  rng = np.random.default_rng(0)
  x, words = rng.normal(size=(2, 8, 8, 9)).astype(np.float32), rng.normal(size=(2, 5, 64)).astype(np.float32)
  time = np.array([7, 900])
  condition = make_condition(text=jnp.asarray(words), image=jnp.asarray(x[..., 4:]))
  params = {'params': subject.params['network']}
  ours = jax.jit(run.experiment.objective.network.apply)(params, x[..., :4], jnp.asarray(time), condition)
  with torch.no_grad():
    equal(ours, unet(to_torch(x), torch.from_numpy(time), torch.from_numpy(words)).sample)
  comes_back(tmp_path / 'theirs', tmp_path, 'diffusers')


def test_a_unet_alone_gets_the_text_tower_of_its_version():
  for family, (width, depth, heads) in {'sd1': (768, 12, 12), 'sd2': (1024, 23, 16)}.items():
    context = {'network/encoder/middle_attention0/blocks/cross_attention/key/kernel': (1, width, 1280)}
    levels = {f'network/encoder/down{i}_block0/norm1/scale': (320,) for i in range(4)}
    widths = zip(range(4), (320, 640, 1280, 1280), strict=True)
    levels |= {f'network/encoder/down{i}_block0/conv1/kernel': (3, 3, 320, width) for i, width in widths}
    layers = {'network/encoder/down0_block1/norm1/scale': (320,), 'network/encoder/conv_in/kernel': (3, 3, 4, 320)}
    text = known.FAMILIES[family].config({**context, **levels, **layers})['objective']['text_condition']['encoder']
    assert (text['width'], text['depth'], text['num_heads']) == (width, depth, heads)


@pytest.mark.slow
def test_a_controlnet_on_top_of_its_base_model(tmp_path):
  base = tmp_path / 'base'
  sd_parts(tmp_path / 'theirs_base', 'sd1')
  import_checkpoint(str(tmp_path / 'theirs_base'), str(base), 'sd1', SIZES)
  config = unet_config('sd1')
  del config['up_block_types'], config['sample_size']
  model = diffusers.ControlNetModel(**config, conditioning_embedding_out_channels=(16, 32))
  published(model, tmp_path / 'theirs')
  given = [
    *SIZES,
    'objective.latent_space.autoencoder.channels=(128,128)',
    'objective.latent_space.autoencoder.layers=1',
  ]
  given += [
    f'objective.text_condition.encoder.{field}' for field in ('width=64', 'depth=2', 'num_heads=1', 'mlp_dim=128')
  ]
  with pytest.raises(UserError, match='also needs autoencoder, network, text, which the file does not contain'):
    import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), 'controlnet_sd1', given)
  for name, part in (('network', 'params/network'), ('autoencoder', 'extra/autoencoder'), ('text', 'extra/text')):
    given += [f'init_from.extra/{name}.workdir={base}', f'init_from.extra/{name}.part={part}']
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), 'controlnet_sd1', given)
  subject, _ = run.restored_model()
  rng = np.random.default_rng(0)
  x, words = rng.normal(size=(2, 8, 8, 4)), rng.normal(size=(2, 5, 64))
  x, words, hint = x.astype(np.float32), words.astype(np.float32), rng.uniform(size=(2, 16, 16, 3)).astype(np.float32)
  time = np.array([7, 900])
  network = controlnet(run.experiment.objective.network, 2)
  condition = make_condition(text=jnp.asarray(words), control=jnp.asarray(hint))
  ours = jax.jit(network.apply)({'params': subject.params['control']}, x, jnp.asarray(time), condition)
  with torch.no_grad():
    theirs = model(to_torch(x), torch.from_numpy(time), torch.from_numpy(words), to_torch(hint), return_dict=False)
  for one, other in zip((*ours[0], ours[1]), (*theirs[0], theirs[1]), strict=True):
    equal(one, other)
  comes_back(tmp_path / 'theirs', tmp_path, 'diffusers')
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'folder'), 'diffusers')
  again = diffusers.ControlNetModel.from_pretrained(tmp_path / 'folder')
  for key, value in model.state_dict().items():
    torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)
  # A CompVis file holds the ControlNet with its base model, and needs no other file.
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'one.safetensors'), 'compvis')
  whole = import_checkpoint(str(tmp_path / 'one.safetensors'), str(tmp_path / 'whole'), 'controlnet_sd1', SIZES)
  jax.tree.map(np.testing.assert_array_equal, whole.restored_model()[0].params, subject.params)
