"""What config.json of timm says, and what the names of its architectures stand for; expected: timm's own code."""

import json

import jax
import numpy as np
import pytest

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.pretrained import hub_timm
from fmcv_jax.pretrained.hub_file import Findings, HubFile
from tests.pretrained.references import PIXELS, to_torch

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
timm = pytest.importorskip('timm', reason='pip install fmcv-jax[parity]')

SMALL = {'img_size': 32, 'patch_size': 8, 'embed_dim': 128, 'depth': 2}


def published(folder, name, **more):
  """A folder as timm's own save_for_hf writes it, with weights that are no initial values."""
  model = timm.create_model(name, **{**SMALL, **more})
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
  timm.models.save_for_hf(model.eval(), folder, safe_serialization=True)
  return model


def says(run):
  params = {'params': jax.device_get(run.restored_model()[0].params)}
  return run.experiment.objective.network.apply(params, PIXELS).output


FOLDERS = {
  'quickgelu': ('vit_base_patch16_clip_quickgelu_224', {'num_heads': 4}),
  'clip eps': ('vit_base_patch32_clip_224', {'num_heads': 4}),
  'act_layer': ('vit_base_patch16_224', {'num_heads': 4, 'act_layer': 'gelu_tanh'}),
  'relu': ('deit3_base_patch16_224', {'num_heads': 4, 'act_layer': 'relu'}),
  'no qkv_bias': ('vit_base_patch16_224_miil', {'num_heads': 4}),
  'qkv_bias given': ('vit_base_patch16_224', {'num_heads': 4, 'qkv_bias': False}),
  'gap without a norm of its own': ('vit_base_patch16_224', {'num_heads': 4, 'global_pool': 'avg', 'fc_norm': False}),
  'gap': ('vit_base_patch16_224', {'num_heads': 4, 'global_pool': 'avg'}),
  'gap_224': ('vit_base_patch16_gap_224', {}),
  'siglip_gap': ('vit_base_patch16_siglip_gap_224', {'num_heads': 4}),
  'siglip 2 gap': ('vit_giantopt_patch16_siglip_gap_256', {'num_heads': 4}),
  'registers': ('vit_base_patch14_reg4_dinov2', {'num_heads': 4}),
  'distilled': ('deit_base_distilled_patch16_224', {'num_heads': 4}),
}


@pytest.mark.parametrize('name', FOLDERS)
def test_a_folder_computes_what_timm_computes(tmp_path, name):
  architecture, more = FOLDERS[name]
  model = published(tmp_path / 'theirs', architecture, num_classes=7, **more)
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  with torch.no_grad():
    theirs = model(to_torch(PIXELS)).numpy()
  np.testing.assert_allclose(says(run), theirs, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize('name', ['quickgelu', 'clip eps', 'relu', 'qkv_bias given', 'gap', 'siglip 2 gap'])
def test_our_own_export_is_read_back_whole(tmp_path, name):
  architecture, more = FOLDERS[name]
  model = published(tmp_path / 'theirs', architecture, num_classes=7, **more)
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'timm')
  opened = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
  with torch.no_grad():
    torch.testing.assert_close(opened(to_torch(PIXELS)), model(to_torch(PIXELS)), rtol=0, atol=1e-5)
  again = import_checkpoint(str(tmp_path / 'out'), str(tmp_path / 'again'))
  np.testing.assert_allclose(says(again), says(run), atol=1e-6)
  assert again.config['data']['image'] == run.config['data']['image']


class Recorded(Exception):
  pass


def architectures(monkeypatch):
  """(name, constructor's arguments) of all that timm builds of its VisionTransformer."""
  from timm.models import deit, vision_transformer

  def build(cls, variant, pretrained, **arguments):
    raise Recorded(cls.__name__, arguments)

  for module in (vision_transformer, deit):
    monkeypatch.setattr(module, 'build_model_with_cfg', build)
  for name in timm.list_models():
    make = timm.models.model_entrypoint(name)
    if make.__module__.rpartition('.')[2] in ('vision_transformer', 'deit'):
      try:
        make()
      except Recorded as recorded:
        yield name, recorded.args[1]


# What our networks have no field for.
BEYOND = ('attn_layer', 'block_fn', 'embed_norm_layer', 'qk_norm', 'scale_attn_norm', 'pool_include_prefix')
BEYOND += ('final_norm', 'proj_bias')


def test_every_architecture_is_what_timm_builds_or_is_refused(monkeypatch):
  known = 0
  for name, arguments in architectures(monkeypatch):
    norm = arguments.get('norm_layer')
    eps = getattr(norm, 'keywords', {}).get('eps', 1e-6)
    layer = getattr(norm, 'func', norm)
    beyond = any(key in arguments for key in BEYOND) or 'rms' in str(getattr(layer, '__name__', layer)).lower()
    width, pool = arguments.get('embed_dim', 768), arguments.get('global_pool', 'token')
    fc_norm = pool == 'avg' if arguments.get('fc_norm') is None else arguments['fc_norm']
    has_class_token = arguments.get('class_token', True)
    gated = 'mlp_layer' in arguments
    ours = vit(
      'B/16',
      width=width,
      num_heads=1,
      gated_mlp=gated,
      pool={'token': 'cls', 'avg': 'gap', 'map': 'map'}[pool],
      class_token=has_class_token and pool == 'avg',
      fc_norm=fc_norm and pool == 'avg',
    )
    findings = Findings()
    empty = HubFile({}, 'config.json: model_args', findings)
    try:
      hub_timm.network(HubFile({}, 'config.json', findings), empty, name, 'network', ours)
    except UserError:
      assert beyond, name
      continue
    assert not beyond, name
    known += 1
    found = {path.removeprefix('network.'): value for path, value in findings.overrides.items()}
    activation = arguments.get('act_layer') or 'gelu'
    activation = activation if isinstance(activation, str) else activation.__name__.lower()
    assert found['num_heads'] == arguments.get('num_heads', 12), name
    assert found['activation'] == activation, name
    assert found['eps'] == eps, name
    assert found['qkv_bias'] == arguments.get('qkv_bias', True), name
    assert found['pool'] == ours.pool, name
  assert known > 100


REFUSED = {
  'architecture': ({'architecture': 'vit_relpos_base_patch16_224'}, "architecture 'vit_relpos_base_patch16_224'"),
  'global_pool': ({'model_args': {**SMALL, 'global_pool': 'avgmax'}}, 'global_pool is "avgmax"'),
  'norm_layer': ({'model_args': {**SMALL, 'norm_layer': 'rmsnorm'}}, 'norm_layer is "rmsnorm"'),
  'act_layer': ({'model_args': {**SMALL, 'act_layer': 'mish'}}, "act_layer is 'mish'"),
  'embed_dim': ({'model_args': {**SMALL, 'embed_dim': 64}}, 'embed_dim is 64'),
  'crop_mode': ({'pretrained_cfg': {'crop_mode': 'five'}}, 'crop_mode is "five"'),
  'input_size': ({'pretrained_cfg': {'input_size': [3, 32, 40]}}, 'input_size is'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_would_be_computed_otherwise_is_refused_by_name(tmp_path, name):
  change, line = REFUSED[name]
  published(tmp_path / 'theirs', 'vit_base_patch16_224', num_heads=4, num_classes=7)
  path = tmp_path / 'theirs' / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(UserError) as caught:
    import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  assert 'config.json' in str(caught.value)
  assert line in str(caught.value)


def test_an_unknown_argument_is_reported(tmp_path, capsys):
  published(tmp_path / 'theirs', 'vit_base_patch16_224', num_heads=4)
  path = tmp_path / 'theirs' / 'config.json'
  said = json.loads(path.read_text())
  said['model_args'] = {**said['model_args'], 'attn_type': 'linear'}
  path.write_text(json.dumps(said))
  import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  assert 'not understood, and not used: config.json: model_args: attn_type="linear"' in capsys.readouterr().err
