"""`fmcv explain` on untrained models: every figure is written and is not empty; unsupported requests are refused."""

import jax
import numpy as np
import pytest
from PIL import Image

from fmcv_jax import __main__ as cli
from fmcv_jax import experiment
from fmcv_jax.apps import explain
from fmcv_jax.errors import UserError
from fmcv_jax.interpret import activation_maps
from fmcv_jax.models.backbones.efficientnet import efficientnet
from fmcv_jax.models.backbones.swin import swin
from fmcv_jax.objectives.encoder import PretrainedEncoder
from fmcv_jax.objectives.outputs import encoder_of
from tests import runs


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return runs.image_folder(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def clip(folder, tmp_path_factory):
  return runs.untrained(runs.contrastive(folder), tmp_path_factory.mktemp('clip'))


def shows_something(path):
  figure = np.asarray(Image.open(path).convert('RGB'))
  return min(figure.shape[:2]) > 200 and figure.std() > 10


def test_texts_are_located_in_several_images(folder, clip, tmp_path, capsys):
  images = [str(folder / 'a' / '0.png'), str(folder / 'b' / '1.png')]
  args = ['explain', *images, '--model', str(clip), '--text', 'a red image', 'green', '--output', str(tmp_path)]
  assert cli.main([*args, '--size', '24']) == 0
  names = {path.stem for path in tmp_path.iterdir()}
  assert names == {'attention', 'rollout', 'features', 'similarity', 'relevance'}
  assert all(shows_something(path) for path in tmp_path.iterdir())
  printed = capsys.readouterr().out.replace('\n', '')
  assert f'{images[1]}: similarity' in printed
  assert "to 'green'" in printed


@pytest.mark.slow
def test_classifier_figures_are_attention_rollout_features_and_relevance(folder, tmp_path, capsys):
  workdir = runs.untrained(runs.classification(folder), tmp_path)
  written = explain.run([str(folder / 'c' / '2.png')], str(workdir), output=tmp_path / 'out')
  assert [path.stem for path in written] == ['attention', 'rollout', 'features', 'relevance']
  # Its head is initialized to zero, so all classes tie and the first one is shown.
  assert 'top-1 class a' in capsys.readouterr().out.replace('\n', ' ')
  with pytest.raises(UserError, match='is not an image-text model'):
    explain.run([str(folder / 'c' / '2.png')], str(workdir), ['a cat'], tmp_path)


@pytest.mark.slow
def test_masked_autoencoder_shows_what_it_fills_in(folder, tmp_path):
  config = runs.classification(folder)
  network = {'name': 'mae', 'width': 16, 'depth': 1, 'num_heads': 2}
  network['encoder'] = {'name': 'vit', 'variant': 'mu/8', 'image_size': 32, 'pos_embed': 'sincos2d'}
  source = {'name': 'image_folder', 'path': str(folder)}
  config |= {'objective': {'name': 'mae', 'network': network}, 'evaluators': {}}
  config |= {'data': {'source': source, 'image': {'name': 'resize', 'size': 32}}}
  workdir = runs.untrained(experiment.resolve(config), tmp_path)
  written = explain.run([str(folder / 'c' / '2.png')], str(workdir), output=tmp_path / 'out')
  assert [path.stem for path in written] == ['attention', 'rollout', 'features', 'reconstruction']
  assert all(shows_something(path) for path in written)


def test_wrong_inputs_are_one_clear_line(folder, clip, tmp_path):
  image = str(folder / 'a' / '0.png')
  with pytest.raises(UserError, match='--size: 20 is not divisible by the patch size 8'):
    explain.run([image], str(clip), output=tmp_path, size=20)
  with pytest.raises(UserError, match=r'nowhere\.png: no such image file'):
    explain.run(['nowhere.png'], str(clip), output=tmp_path)
  with pytest.raises(UserError, match=r'captions\.csv: '):
    explain.run([str(folder / 'captions.csv')], str(clip), output=tmp_path)
  with pytest.raises(UserError, match='no run here'):
    explain.run([image], str(tmp_path), output=tmp_path)


def swin_classifier(folder):
  config = runs.classification(folder)
  network = {'name': 'swin', 'variant': 'mu', 'image_size': 32, 'window': 4, 'num_classes': 3}
  image = {'name': 'resize', 'size': 32}
  return experiment.resolve(
    config
    | {
      'objective': {'name': 'classification', 'network': network},
      'evaluators': {},
      'data': {'source': {'name': 'image_folder', 'path': str(folder)}, 'image': image},
    }
  )


def test_swin_figures_are_features_and_relevance(folder, tmp_path, capsys):
  workdir = runs.untrained(swin_classifier(folder), tmp_path)
  written = explain.run([str(folder / 'c' / '2.png')], str(workdir), output=tmp_path / 'out', size=44)
  assert [path.stem for path in written] == ['features', 'relevance']
  assert 'top-1 class a' in capsys.readouterr().out.replace('\n', ' ')


@pytest.mark.slow
def test_a_convolutional_dual_encoder_shows_where_a_text_is(folder, tmp_path):
  network = {'name': 'align', 'variant': 'mu', 'image_size': 32, 'vocab_size': 300, 'length': 8}
  config = runs.contrastive(folder, objective__network=network, data__image={'name': 'resize', 'size': 32})
  workdir = runs.untrained(config, tmp_path)
  image = [str(folder / 'c' / '2.png')]
  written = explain.run(image, str(workdir), ['a red image'], output=tmp_path / 'out', size=96)
  assert [path.stem for path in written] == ['features', 'similarity']


@pytest.mark.parametrize(
  'network', [swin('mu', image_size=32, window=4, num_classes=5), efficientnet('mu', num_classes=5)]
)
def test_activation_maps_average_to_the_output(network):
  images = jax.random.normal(jax.random.key(0), (2, 52, 68, 3))
  initial = jax.jit(network.init)(jax.random.key(1), images)
  head = jax.random.normal(jax.random.key(2), initial['params']['head']['kernel'].shape)
  params = {**initial['params'], 'head': {'kernel': head, 'bias': np.arange(5, dtype=np.float32)}}
  stats = {name: tree for name, tree in initial.items() if name != 'params'}
  variables = {'params': params, **stats}
  _, given = jax.jit(activation_maps.class_activation_maps, static_argnums=0)(network, variables, images)
  output = jax.jit(network.apply)(variables, images).output
  assert given.shape[1] < given.shape[2]
  np.testing.assert_allclose(given.mean((1, 2)), output, rtol=1e-4, atol=1e-4)


def test_an_imported_efficientnet_is_explained_with_its_batch_statistics(folder, tmp_path):
  network = {'name': 'efficientnet', 'variant': 'mu', 'image_size': 32, 'num_classes': 3}
  workdir = runs.untrained(experiment.resolve({'objective': {'name': 'encoder', 'network': network}}), tmp_path / 'run')
  written = explain.run([str(folder / 'c' / '2.png')], str(workdir), output=tmp_path / 'out')
  assert [path.stem for path in written] == ['features', 'relevance']

  objective = PretrainedEncoder(efficientnet('mu', image_size=32, num_classes=3))
  params, extra = jax.jit(objective.init)(jax.random.key(0))
  leaves, tree = jax.tree.flatten(extra)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  extra = tree.unflatten([jax.random.uniform(key, x.shape, minval=0.5, maxval=2.0) for key, x in zip(keys, leaves)])
  params['head']['kernel'] = jax.random.normal(jax.random.key(2), params['head']['kernel'].shape)
  images = jax.random.randint(jax.random.key(3), (2, 32, 32, 3), 0, 256).astype(np.uint8)
  encoder = encoder_of(objective.outputs())(params, extra)
  places = explain._activation_maps(encoder, encoder.normalized(images))[1]
  variables = {'params': params, 'batch_stats': extra['batch_stats']}
  expected = objective.network.apply(variables, objective.normalize(images / np.float32(255))).output
  np.testing.assert_allclose(places.mean((1, 2)), expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(objective.outputs()['logits'].call(params, extra, {'image': images}), expected, atol=1e-4)
