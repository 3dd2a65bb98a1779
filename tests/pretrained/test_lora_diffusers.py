"""Adapter files on Stable Diffusion give the weights and outputs that diffusers and PEFT give with them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from fmcv_jax.apps.adapters import import_adapters
from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.diffusion.condition import make_condition
from fmcv_jax.inference.adapters import add_adapters, by_path
from fmcv_jax.pretrained.tensors import open_tensors
from tests.pretrained.references import sd_parts, to_torch

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
diffusers = pytest.importorskip('diffusers', reason='pip install fmcv-jax[parity]')
peft = pytest.importorskip('peft', reason='pip install fmcv-jax[parity]')

BLOCK = 'down_blocks.0.attentions.0.transformer_blocks.0'
UNET = {  # layer: weight of PyTorch
  f'{BLOCK}.attn1.to_q': (128, 128),
  f'{BLOCK}.attn2.to_k': (128, 64),
  f'{BLOCK}.attn1.to_out.0': (128, 128),
  f'{BLOCK}.ff.net.0.proj': (1024, 128),
  'up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_v': (128, 64),
}
CONVS = {
  'down_blocks.0.resnets.0.conv1': (128, 128, 3, 3),
  'up_blocks.1.resnets.0.conv_shortcut': (128, 256, 1, 1),
  'down_blocks.0.attentions.0.proj_in': (128, 128, 1, 1),
  'down_blocks.0.downsamplers.0.conv': (128, 128, 3, 3),
  'mid_block.resnets.0.time_emb_proj': (128, 512),
}
TEXT = {
  'text_model.encoder.layers.0.self_attn.q_proj': (64, 64),
  'text_model.encoder.layers.1.self_attn.out_proj': (64, 64),
  'text_model.encoder.layers.1.mlp.fc1': (128, 64),
}


@pytest.fixture(scope='module')
def sd1(tmp_path_factory):
  """(folder of diffusers, our run of it)."""
  folder = tmp_path_factory.mktemp('sd1')
  torch.manual_seed(0)
  sd_parts(folder / 'theirs', 'sd1')
  return folder / 'theirs', import_checkpoint(str(folder / 'theirs'), str(folder / 'ours'), 'sd1')


def pipeline(folder):
  import transformers

  return diffusers.StableDiffusionPipeline(
    vae=diffusers.AutoencoderKL.from_pretrained(folder / 'vae'),
    unet=diffusers.UNet2DConditionModel.from_pretrained(folder / 'unet'),
    text_encoder=transformers.CLIPTextModel.from_pretrained(folder / 'text_encoder'),
    tokenizer=None,
    scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    safety_checker=None,
    feature_extractor=None,
    requires_safety_checker=False,
  )


def matrices(layers, rank, seed=0, more=0):
  """{layer: (down, up)} as PyTorch has them, every second with `more` ranks."""
  rng = np.random.default_rng(seed)
  return {
    name: (
      0.2 * rng.normal(size=(rank + n % 2 * more, into, *pixels)).astype(np.float32),
      0.2 * rng.normal(size=(out, rank + n % 2 * more, *(1 for _ in pixels))).astype(np.float32),
    )
    for n, (name, (out, into, *pixels)) in enumerate(layers.items())
  }


def kohya(unet, text=None, alphas=True):
  tensors = {}
  for start, layers in (('lora_unet_', unet), ('lora_te_', text or {})):
    for name, (down, up) in layers.items():
      flat = start + name.replace('.', '_')
      tensors |= {f'{flat}.lora_down.weight': down, f'{flat}.lora_up.weight': up}
      tensors |= {f'{flat}.alpha': np.array(1.5, np.float32)} if alphas else {}
  return tensors


def peft_names(unet, text=None, ends=('lora_A', 'lora_B')):
  tensors = {}
  for start, layers in (('unet.', unet), ('text_encoder.', text or {})):
    for name, (down, up) in layers.items():
      tensors |= {f'{start}{name}.{ends[0]}.weight': down, f'{start}{name}.{ends[1]}.weight': up}
  return tensors


def processors(unet, text):
  """Names of diffusers before 0.22: attention only."""
  tensors = {}
  for name, (down, up) in unet.items():
    layer = name.replace('.to_', '.processor.to_').replace('to_out.0', 'to_out') + '_lora'
    tensors |= {f'unet.{layer}.down.weight': down, f'unet.{layer}.up.weight': up}
  for name, (down, up) in text.items():
    tensors |= {f'text_encoder.{name}.lora_linear_layer.down.weight': down}
    tensors |= {f'text_encoder.{name}.lora_linear_layer.up.weight': up}
  return tensors


U, C, T = matrices(UNET, 4), matrices(CONVS, 4, 1), matrices(TEXT, 4, 2)
RANKS = matrices(UNET, 4, 3, more=1) | matrices(CONVS, 2, 4, more=2)
ATTENTION = {name: pair for name, pair in U.items() if '.attn' in name}
SELF = {name: pair for name, pair in T.items() if 'self_attn' in name}
HEADER = {
  'lora_adapter_metadata': json.dumps(
    {'unet.r': 4, 'unet.lora_alpha': 10, 'unet.target_modules': sorted(UNET), 'unet.peft_type': 'LORA'}
  )
}
# Of different alphas in one file diffusers 0.42 takes one for all attention layers, against kohya's own scripts: what
# each layer's own alpha does is compared with the formula, in test_lora_formulas.py.
FILES = {
  'kohya, with convolutions and text': (kohya(U | C, T), None),
  'kohya without alphas': (kohya(RANKS, T, alphas=False), None),
  'diffusers': (peft_names(RANKS, T), None),
  'diffusers with alphas in its header': (peft_names(U), HEADER),
  'diffusers 0.22': (peft_names(RANKS, ends=('lora.down', 'lora.up')) | processors({}, SELF), None),
  'attention processors': (processors(ATTENTION, SELF), None),
}


def weights(run, subject):
  """Our parameters as diffusers names them."""
  from fmcv_jax.inference.adapters import family_and_layouts
  from fmcv_jax.pretrained.layout import write

  own = by_path(subject.params, subject.extra)
  layout = next(layout for _, layout in family_and_layouts(run, own)[1] if layout.files)
  return {name: np.asarray(x) for name, x in write(layout, own, None).items()}


def fused(pipe):
  pipe.unload_lora_weights()
  parts = {'unet.': pipe.unet, 'text_encoder.text_model.': pipe.text_encoder}
  return {
    start + name.removeprefix('text_model.'): x.numpy()
    for start, part in parts.items()
    for name, x in part.state_dict().items()
  }


def same_weights(folder, run, file, layers):
  """Ours and theirs with a file at 0.7 of its scale; `layers` of the UNet are changed by it."""
  pipe = pipeline(folder)
  before = {key: x.clone() for key, x in pipe.unet.state_dict().items()}
  pipe.load_lora_weights(str(file))
  pipe.fuse_lora(lora_scale=0.7)
  expected = fused(pipe)
  subject, _ = run.restored_model()
  add_adapters(run, subject, [(file, 0.7)])
  ours = weights(run, subject)
  changed = 0
  for key, x in expected.items():
    if 'position_ids' not in key:
      np.testing.assert_allclose(ours[key], x, atol=2e-6, err_msg=key)
      own = key.removeprefix('unet.')
      changed += own in before and not np.allclose(x, before[own], atol=1e-3)
  assert changed == layers


@pytest.mark.parametrize('name', FILES)
def test_weights_are_those_that_diffusers_fuses(sd1, tmp_path, name):
  tensors, metadata = FILES[name]
  save_file(tensors, tmp_path / 'lora.safetensors', {'format': 'pt', **(metadata or {})})
  layers = sum(key.endswith(('up.weight', 'lora_B.weight')) for key in tensors if 'unet' in key)
  same_weights(*sd1, tmp_path / 'lora.safetensors', layers)


@pytest.mark.slow
def test_stable_diffusion_2_has_matrices_where_1_has_convolutions(tmp_path):
  sd_parts(tmp_path / 'theirs', 'sd2')
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), 'sd2')
  layers = U | matrices({'down_blocks.0.attentions.0.proj_in': (128, 128)}, 4)
  save_file(kohya(layers, T), tmp_path / 'lora.safetensors', {'ss_base_model_version': 'sd_v2', 'ss_v2': 'True'})
  same_weights(tmp_path / 'theirs', run, tmp_path / 'lora.safetensors', len(layers))


def test_outputs_of_two_adapters_are_those_of_diffusers(sd1, tmp_path):
  folder, run = sd1
  files = [tmp_path / 'one.safetensors', tmp_path / 'two.safetensors']
  save_file(kohya(U | C, T), files[0])
  save_file(peft_names(matrices(UNET, 2, 7)), files[1])
  pipe = pipeline(folder)
  for name, file in zip(('one', 'two'), files, strict=True):
    pipe.load_lora_weights(str(file), adapter_name=name)
  pipe.set_adapters(['one', 'two'], [0.8, -0.4])
  merged = import_adapters([f'{files[0]}:0.8', f'{files[1]}:-0.4'], str(run.workdir), str(tmp_path / 'merged'))
  subject, _ = merged.restored_model()
  objective = merged.experiment.objective
  rng = np.random.default_rng(0)
  x, time, tokens = rng.normal(size=(2, 8, 8, 4)).astype(np.float32), np.array([7, 900]), rng.integers(1, 900, (2, 77))
  read = objective.text_condition.encoder.apply({'params': subject.extra['text']}, tokens.astype(np.int32)).tokens
  params = {'params': subject.params['network']}
  ours = jax.jit(objective.network.apply)(params, x, jnp.asarray(time), make_condition(text=read))
  with torch.no_grad():
    words = pipe.text_encoder(torch.from_numpy(tokens)).last_hidden_state
    theirs = pipe.unet(to_torch(x), torch.from_numpy(time), words).sample.numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(read, words.numpy(), atol=1e-4 * np.abs(words.numpy()).max())
  np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())


def test_a_merged_workdir_is_exported_as_any_other(sd1, tmp_path):
  _, run = sd1
  save_file(kohya(U, T), tmp_path / 'lora.safetensors')
  merged = import_adapters([str(tmp_path / 'lora.safetensors')], str(run.workdir), str(tmp_path / 'merged'))
  export_checkpoint(str(tmp_path / 'merged'), str(tmp_path / 'out'), 'diffusers')
  ours, written = weights(merged, merged.restored_model()[0]), open_tensors(tmp_path / 'out')
  for name in (f'unet.{next(iter(UNET))}.weight', f'text_encoder.{next(iter(TEXT))}.weight'):
    np.testing.assert_array_equal(written[name], ours[name])


CONFIGS = {
  'LORA': lambda targets: peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, rank_pattern={'to_k': 5}),
  'rsLoRA': lambda targets: peft.LoraConfig(r=4, lora_alpha=7, target_modules=targets, use_rslora=True),
  'DoRA': lambda targets: peft.LoraConfig(r=4, lora_alpha=7, target_modules=targets, use_dora=True),
  'LOHA': lambda targets: peft.LoHaConfig(r=4, alpha=6, target_modules=targets, use_effective_conv2d=True),
  'LOHA, flat': lambda targets: peft.LoHaConfig(r=4, alpha=6, target_modules=targets),
  'LOKR': lambda targets: peft.LoKrConfig(r=4, alpha=6, target_modules=targets, use_effective_conv2d=True),
  'LOKR, flat': lambda targets: peft.LoKrConfig(r=2, alpha=6, target_modules=targets, decompose_both=True),
  'LOKR, full': lambda targets: peft.LoKrConfig(r=200, alpha=50, target_modules=targets),
  'IA3': lambda targets: peft.IA3Config(
    target_modules=[one for one in targets if one not in CONVS], feedforward_modules=[f'{BLOCK}.ff.net.0.proj']
  ),
}


QUICK = ('LORA', 'DoRA', 'LOKR, flat')  # the formulas of the others are in test_lora_formulas.py


@pytest.mark.parametrize('kind', [x if x in QUICK else pytest.param(x, marks=pytest.mark.slow) for x in CONFIGS])
def test_folders_of_peft_give_its_merged_weights(sd1, tmp_path, kind):
  folder, run = sd1
  unet = diffusers.UNet2DConditionModel.from_pretrained(folder / 'unet')
  model = peft.get_peft_model(unet, CONFIGS[kind]([*UNET, *CONVS]))
  generator = torch.Generator().manual_seed(3)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if parameter.requires_grad:
        start = 1.0 if 'ia3_l' in name else parameter
        parameter.copy_(start + 0.1 * torch.randn(parameter.shape, generator=generator))
  model.save_pretrained(tmp_path / 'adapter')
  expected = {f'unet.{name}': x.numpy() for name, x in model.merge_and_unload().state_dict().items()}
  subject, _ = run.restored_model()
  add_adapters(run, subject, [tmp_path / 'adapter'])
  ours, base = weights(run, subject), open_tensors(folder)
  for name, x in expected.items():
    np.testing.assert_allclose(ours[name], x, atol=3e-6 * max(1, np.abs(x).max()), err_msg=name)
  changed = [name for name, x in expected.items() if name.endswith('.weight') and not np.allclose(x, base[name], 1e-3)]
  assert len(changed) == len(UNET) + (0 if kind == 'IA3' else len(CONVS))
