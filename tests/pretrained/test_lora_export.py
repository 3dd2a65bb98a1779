"""The LoRA of our runs opens in diffusers and PEFT, with the outputs of the run, and comes back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

import fmcv_jax
from fmcv_jax.__main__ import main
from fmcv_jax.apps.adapters import import_adapters
from fmcv_jax.apps.conversion import import_checkpoint, untrained_state, write_run
from fmcv_jax.apps.export_adapters import export_adapters
from fmcv_jax.diffusion.condition import make_condition
from fmcv_jax.errors import UserError
from fmcv_jax.experiment import resolve
from fmcv_jax.inference.adapters import add_adapters, by_path
from fmcv_jax.run import Run
from tests.pretrained.references import IMAGE, published, sd_parts, to_torch

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
diffusers = pytest.importorskip('diffusers', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')

ATTENTION = r'(.*/)?(attention|cross_attention)/(query|value|out)/kernel'


def finetuned(base, folder, targets, trainable=(), alpha=6.0):
  """A workdir of LoRA, rank 4, and whole layers on top of another run, as if they had been trained."""
  inner = base.config['objective']
  lora = {'rank': 4, 'alpha': alpha, 'targets': list(targets)}
  spec = {'name': 'finetune', 'objective': inner, 'trainable': list(trainable), 'lora': lora}
  run = Run(resolve({**base.config, 'objective': spec}), folder)
  subject, _ = base.restored_model()
  rng = np.random.default_rng(0)
  params, extra = jax.eval_shape(lambda: run.experiment.objective.init(jax.random.key(0)))
  whole = flatten_dict(subject.params, sep='/')
  learned = {
    path: 0.2 * rng.normal(size=x.shape).astype(np.float32) + (np.asarray(whole[path]) if path in whole else 0)
    for path, x in flatten_dict(params, sep='/').items()
  }
  frozen = {path: whole[path] for path in flatten_dict(extra['frozen'], sep='/')}
  tree = {
    'params': unflatten_dict(learned, sep='/'),
    'extra': {**subject.extra, 'frozen': unflatten_dict(frozen, sep='/')},
  }
  tree = jax.tree.map(jnp.asarray, tree)
  write_run(run, untrained_state(run, jax.tree.leaves(tree)), {})
  return run


@pytest.fixture(scope='module')
def finetuned_sd(tmp_path_factory):
  """(folder of diffusers, our run of it, a run that fine-tunes it)."""
  folder = tmp_path_factory.mktemp('sd1')
  torch.manual_seed(0)
  sd_parts(folder / 'theirs', 'sd1')
  base = import_checkpoint(str(folder / 'theirs'), str(folder / 'ours'), 'sd1')
  convs = r'network/encoder/down0_attention0/(enter|leave)/kernel'
  return folder / 'theirs', base, finetuned(base, folder / 'lora', [f'network/{ATTENTION}', r'.*/mlp/up/kernel', convs])


def outputs(run, x, time, words):
  """Of the UNet of a fine-tuning run."""
  subject, _ = run.restored_model()
  outer = run.experiment.objective
  params = outer.full_params(subject.params, subject.extra)
  return jax.jit(outer.objective.network.apply)({'params': params['network']}, x, time, make_condition(text=words))


def noise():
  rng = np.random.default_rng(0)
  x, words = rng.normal(size=(2, 8, 8, 4)).astype(np.float32), rng.normal(size=(2, 5, 64)).astype(np.float32)
  return x, np.array([7, 900]), words


def equal_outputs(unet, run):
  x, time, words = noise()
  with torch.no_grad():
    theirs = unet(to_torch(x), torch.from_numpy(time), torch.from_numpy(words)).sample.numpy()
  ours = outputs(run, x, jnp.asarray(time), jnp.asarray(words))
  np.testing.assert_allclose(ours, theirs.transpose(0, 2, 3, 1), atol=1e-4 * np.abs(theirs).max())


def test_kohyas_file_opens_in_diffusers(finetuned_sd, tmp_path):
  pytest.importorskip('peft', reason='pip install fmcv-jax[parity]')
  folder, _, run = finetuned_sd
  file = tmp_path / 'lora.safetensors'
  export_adapters(str(run.workdir), str(file), 'kohya')
  with safe_open(file, 'np') as stored:
    header, names = stored.metadata(), list(stored.keys())
    alphas = {float(stored.get_tensor(name)) for name in names if name.endswith('.alpha')}
  assert (header['ss_base_model_version'], header['ss_v2'], header['ss_network_dim']) == ('sd_v1', 'False', '4')
  assert header['modelspec.architecture'] == 'stable-diffusion-v1/lora'
  assert alphas == {6.0}
  assert all(name.startswith('lora_unet_') for name in names)
  unet = diffusers.UNet2DConditionModel.from_pretrained(folder / 'unet')
  pipe = diffusers.StableDiffusionPipeline(
    vae=diffusers.AutoencoderKL.from_pretrained(folder / 'vae'),
    unet=unet,
    text_encoder=transformers.CLIPTextModel.from_pretrained(folder / 'text_encoder'),
    tokenizer=None,
    scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
  )
  pipe.load_lora_weights(str(file))
  equal_outputs(pipe.unet, run)


def test_a_folder_of_peft_opens_in_peft(finetuned_sd, tmp_path):
  peft = pytest.importorskip('peft', reason='pip install fmcv-jax[parity]')
  folder, _, run = finetuned_sd
  export_adapters(str(run.workdir), str(tmp_path / 'adapter'), 'peft')
  unet = diffusers.UNet2DConditionModel.from_pretrained(folder / 'unet')
  equal_outputs(peft.PeftModel.from_pretrained(unet, str(tmp_path / 'adapter')), run)


@pytest.mark.parametrize('format', ['kohya', 'peft'])
def test_an_export_merged_into_its_base_is_the_run(finetuned_sd, tmp_path, format):
  _, base, run = finetuned_sd
  file = tmp_path / ('lora.safetensors' if format == 'kohya' else 'adapter')
  export_adapters(str(run.workdir), str(file), format)
  subject, _ = base.restored_model()
  add_adapters(base, subject, [file])
  trained, _ = run.restored_model()
  expected = by_path(run.experiment.objective.full_params(trained.params, trained.extra), {})
  for path, x in by_path(subject.params, {}).items():
    np.testing.assert_allclose(x, expected[path], atol=2e-6, err_msg=path)


def test_names_of_the_original_release_are_the_same_layers(finetuned_sd, tmp_path):
  """The first of two levels: input_blocks.1.1 is down_blocks.0.attentions.0, and so on."""
  _, base, _ = finetuned_sd
  rng = np.random.default_rng(0)
  block = 'transformer_blocks.0.attn1.to_q'
  layers = {
    f'unet.down_blocks.0.attentions.0.{block}': f'input_blocks.1.1.{block}',
    f'unet.up_blocks.1.attentions.2.{block}': f'output_blocks.5.1.{block}',
    'unet.mid_block.resnets.1.conv2': 'middle_block.2.out_layers.3',
    'text_encoder.text_model.encoder.layers.1.mlp.fc2': 'text_model.encoder.layers.1.mlp.fc2',
  }
  files = {'diffusers': {}, 'comfyui': {}, 'kohya': {}}
  for name, original in layers.items():
    is_text, pixels = name.startswith('text'), (3, 3) if 'conv' in name else ()
    out = 64 if is_text else 128
    down = rng.normal(size=(2, 128, *pixels)).astype(np.float32)
    up = rng.normal(size=(out, 2, *(1 for _ in pixels))).astype(np.float32)
    start = 'text_encoders.clip_l.transformer.' if is_text else 'diffusion_model.'
    flat = ('lora_te_' if is_text else 'lora_unet_') + original.replace('.', '_')
    files['diffusers'] |= {f'{name}.lora_A.weight': down, f'{name}.lora_B.weight': up}
    files['comfyui'] |= {f'{start}{original}.lora_A.weight': down, f'{start}{original}.lora_B.weight': up}
    files['kohya'] |= {f'{flat}.lora_down.weight': down, f'{flat}.lora_up.weight': up}
  merged = {}
  for name, tensors in files.items():
    save_file(tensors, tmp_path / f'{name}.safetensors')
    subject, _ = base.restored_model()
    add_adapters(base, subject, [tmp_path / f'{name}.safetensors'])
    merged[name] = by_path(subject.params, subject.extra)
  untouched, _ = base.restored_model()
  before = by_path(untouched.params, untouched.extra)
  for path, x in merged['diffusers'].items():
    np.testing.assert_array_equal(merged['comfyui'][path], x, err_msg=path)
    np.testing.assert_array_equal(merged['kohya'][path], x, err_msg=path)
  assert sum(not np.array_equal(before[path], x) for path, x in merged['diffusers'].items()) == len(layers)


@pytest.mark.slow
def test_generate_with_adapters_gives_the_images_of_the_merged_model(finetuned_sd, tmp_path):
  _, base, run = finetuned_sd
  export_adapters(str(run.workdir), str(tmp_path / 'lora.safetensors'), 'kohya')
  given = f'{tmp_path}/lora.safetensors:0.5'
  import_adapters([given], str(base.workdir), str(tmp_path / 'merged'))
  options = ['-n', '1', '--steps', '1', '--batch', '8']
  main(['generate', 'a tree', '--model', str(tmp_path / 'merged'), '--output', str(tmp_path / 'one'), *options])
  main(
    ['generate', 'a tree', '--model', str(base.workdir), '--lora', given, '--output', str(tmp_path / 'two'), *options]
  )
  first, second = (np.asarray(Image.open(tmp_path / name / '0000.png')) for name in ('one', 'two'))
  np.testing.assert_array_equal(first, second)
  assert given in Image.open(tmp_path / 'two' / '0000.png').text['fmcv']


def test_a_classifier_takes_its_whole_layers_to_peft(tmp_path):
  peft = pytest.importorskip('peft', reason='pip install fmcv-jax[parity]')
  model = published(
    transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE, layer_norm_eps=1e-6, num_labels=7)),
    tmp_path / 'theirs',
  )
  base = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'base'), 'vit')
  targets = ['blocks/attention/(query|value)/kernel', 'blocks/mlp/up/kernel']
  run = finetuned(base, tmp_path / 'lora', targets, trainable=['head/.*'])
  export_adapters(str(run.workdir), str(tmp_path / 'adapter'), 'peft')
  assert json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())['modules_to_save'] == ['classifier']
  x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
  with torch.no_grad():
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / 'adapter'))(to_torch(x)).logits.numpy()
  subject, _ = run.restored_model()
  outer = run.experiment.objective
  params = {'params': outer.full_params(subject.params, subject.extra)}
  ours = outer.objective.network.apply(params, x).output
  np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
  again, _ = base.restored_model()
  add_adapters(base, again, [tmp_path / 'adapter'])
  for path, leaf in by_path(again.params, {}).items():
    np.testing.assert_allclose(leaf, by_path(params['params'], {})[path], atol=2e-6, err_msg=path)
  import_adapters([str(tmp_path / 'adapter')], str(tmp_path / 'base'), str(tmp_path / 'merged'))
  image = np.random.default_rng(1).integers(0, 256, (40, 40, 3), dtype=np.uint8)
  in_memory = fmcv_jax.load(tmp_path / 'base', lora=[tmp_path / 'adapter']).classify(image)
  np.testing.assert_array_equal(in_memory, fmcv_jax.load(tmp_path / 'merged').classify(image))
  assert np.abs(in_memory - fmcv_jax.load(tmp_path / 'base').classify(image)).max() > 1e-3
  with pytest.raises(UserError, match="kohya's layout is that of Stable Diffusion"):
    export_adapters(str(run.workdir), str(tmp_path / 'x.safetensors'), 'kohya')
  with pytest.raises(UserError, match='has no LoRA; --format peft writes that of a run'):
    export_adapters(str(base.workdir), str(tmp_path / 'x'), 'peft')
  with pytest.raises(UserError, match='is a run of partial fine-tuning'):
    add_adapters(run, run.restored_model()[0], [tmp_path / 'adapter'])
