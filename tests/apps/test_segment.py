"""A small EoMT, trained on colored squares: its figures, `Model.segment`, `fmcv segment`; and a linear segmenter."""

import json

import numpy as np
import pytest
from PIL import Image

import fmcv_jax
from fmcv_jax import experiment, trainer
from fmcv_jax.__main__ import main
from fmcv_jax.errors import UserError
from fmcv_jax.train.storage import read_metrics
from tests.objectives.test_mask_prediction import ENCODER, config, write_panoptic

coco_mask = pytest.importorskip('pycocotools.mask', reason='pip install fmcv-jax[detection]')
STEPS = 240


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  folder = tmp_path_factory.mktemp('panoptic')
  write_panoptic(folder)
  return folder


def train(run, folder, steps):
  run = run | {
    'train': {'steps': steps, 'batch_size': 16},
    'checkpoint': {'every': steps},
    'optimizer': {'schedule': {'name': 'cosine', 'peak_lr': 3e-3, 'warmup_steps': 20}, 'clip_norm': 1.0},
    'log': {'every': steps},
  }
  trainer.train(experiment.resolve(run), folder)
  return folder


@pytest.fixture(scope='module')
def workdir(data, tmp_path_factory):
  run = dict(config(data))
  pipeline = {**run['data'], 'source': {**run['data']['source'], 'crowds': True}}
  own = {'data': pipeline, 'batch_size': 16}
  run['evaluators'] = {
    'pq': {'name': 'panoptic_quality', **own},
    'masks': {'name': 'average_precision', 'of': 'masks', **own},
    'boxes': {'name': 'average_precision', **own},
    'iou': {'name': 'mean_iou', **own},
  }
  return train(run, tmp_path_factory.mktemp('eomt'), STEPS)


@pytest.fixture
def file(data, tmp_path):
  """The first image, twice as wide and twice as high as the network's images."""
  path = tmp_path / 'one.png'
  Image.open(data / 'images' / '1.png').resize((64, 64), Image.Resampling.NEAREST).save(path)
  return path


def square_of(file):
  """The pixels of the colored square."""
  return (np.asarray(Image.open(file)) != 120).any(-1)


def iou(a, b):
  return (a & b).sum() / (a | b).sum()


def test_a_trained_model_finds_the_segments_of_its_data(workdir):
  figures = read_metrics(workdir / 'metrics.jsonl')[-1]
  assert figures['pq/pq'] > 0.7
  assert {'pq/pq_things', 'pq/pq_stuff', 'pq/sq', 'pq/rq'} <= set(figures)
  assert figures['pq/pq_stuff'] > 0.8
  assert figures['masks/ap50'] > 0.5
  assert figures['boxes/ap50'] > 0.5
  assert figures['iou/mean_iou'] > 0.7


def test_segments_are_those_of_the_file_with_names(workdir, file):
  model, square = fmcv_jax.load(workdir), square_of(file)
  found = model.segment(str(file))
  assert found.masks.shape[1:] == found.map.shape == (64, 64)
  assert sorted(found.names) == ['ground', 'red']
  assert iou(found.masks[found.names.index('red')], square) > 0.7
  assert iou(found.masks[found.names.index('ground')], ~square) > 0.8
  assert (found.class_map[found.map >= 0] == found.labels[found.map[found.map >= 0]]).all()
  (objects,) = model.segment([str(file)], 'instance', threshold=0.5)
  assert objects.names == ('red',)  # stuff has no objects
  classes = model.segment(np.asarray(Image.open(file)), 'semantic')
  assert (classes.map >= 0).all()
  assert iou(classes.class_map == 0, square) > 0.7


def test_the_command_writes_coco_json_and_drawings(workdir, file, tmp_path, capsys):
  (tmp_path / 'broken.jpg').write_bytes(b'nothing')
  args = ['segment', str(file), str(tmp_path / 'broken.jpg'), '--model', str(workdir)]
  assert main([*args, '--to', str(tmp_path / 'out')]) == 0
  captured = capsys.readouterr()
  assert '1 of 2 images cannot be read and are left out' in captured.err
  whole = json.loads((tmp_path / 'out' / 'segments.json').read_text())
  assert whole['images'] == [{'id': 1, 'file_name': str(file), 'height': 64, 'width': 64}]
  names = {category['id']: category['name'] for category in whole['categories']}
  assert names == {1: 'red', 3: 'ground'}
  found = fmcv_jax.load(workdir).segment(str(file))
  for row, annotation in enumerate(whole['annotations']):
    np.testing.assert_array_equal(coco_mask.decode(annotation['segmentation']).astype(bool), found.masks[row])
    assert names[annotation['category_id']] == found.names[row]
    assert annotation['area'] == found.masks[row].sum()
    assert f'{file}  {found.names[row]}  {annotation["score"]:.3f}  {annotation["area"]} pixels' in captured.out
  assert Image.open(next((tmp_path / 'out').glob('*_one.png'))).size == (64, 64)
  assert main([*args, '--to', str(tmp_path / 'out')]) == 2
  assert 'segments.json exists there' in capsys.readouterr().err


def test_what_cannot_be_segmented_is_said(workdir, file, tmp_path, capsys):
  model = fmcv_jax.load(workdir)
  with pytest.raises(UserError, match="task: 'panoptc' is not one of semantic, instance, panoptic; did you mean"):
    model.segment(str(file), 'panoptc')
  with pytest.raises(UserError, match='threshold: semantic segments have none'):
    model.segment(str(file), 'semantic', threshold=0.5)
  with pytest.raises(UserError, match='threshold: expected a number from 0 to 1, got 2'):
    model.segment(str(file), threshold=2)
  (tmp_path / 'broken.jpg').write_bytes(b'nothing')
  with pytest.raises(UserError, match=r'broken.jpg cannot be read'):
    model.segment([str(file), str(tmp_path / 'broken.jpg')])
  assert main(['segment', str(file), '--model', 'demo']) == 2
  assert 'this model does not segment images; its outputs are' in capsys.readouterr().err


def test_a_linear_segmenter_gives_a_segment_for_each_class(data, file, tmp_path):
  run = dict(config(data))
  network = {'name': 'segmenter', 'encoder': {'name': 'vit', **ENCODER}, 'num_classes': 3}
  run['objective'] = {'name': 'segmentation', 'network': network}
  model, square = fmcv_jax.load(train(run, tmp_path / 'run', 80)), square_of(file)
  found = model.segment(str(file))
  assert iou(found.masks[found.names.index('red')], square) > 0.5
  assert found.map.shape == (64, 64)
  assert ((found.scores > 0.3) & (found.scores <= 1)).all()
  with pytest.raises(UserError, match="task: 'panoptic' is not one of semantic"):
    model.segment(str(file), 'panoptic')
