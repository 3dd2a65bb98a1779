"""A small detector, trained on colored rectangles: average precision, `Model.detect`, `fmcv detect`."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import fmcv_jax
from fmcv_jax import experiment, trainer
from fmcv_jax.__main__ import main
from fmcv_jax.errors import UserError
from fmcv_jax.train.storage import read_metrics
from tests.objectives.test_detection import ColoredBoxes, config

pytest.importorskip('pycocotools', reason='pip install fmcv-jax[detection]')
SOURCE = 'tests.objectives.test_detection:ColoredBoxes'
STEPS = 200


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  run = dict(config(l1_weight=5.0, giou_weight=2.0))
  run['data'] = {**run['data'], 'source': {'name': SOURCE, 'count': 512}}
  run |= {
    'train': {'steps': STEPS, 'batch_size': 16},
    'checkpoint': {'every': STEPS},
    'optimizer': {'schedule': {'name': 'cosine', 'peak_lr': 5e-3, 'warmup_steps': 20}, 'clip_norm': 1.0},
    'evaluators': {'ap': {'name': 'average_precision', 'batch_size': 16, 'data': {'source': {'name': SOURCE}}}},
  }
  folder = tmp_path_factory.mktemp('detector')
  trainer.train(experiment.resolve(run), folder)
  return folder


@pytest.fixture
def file(tmp_path):
  """An image with two objects, twice as wide and twice as high as the network's images."""
  path = tmp_path / 'two.png'
  Image.fromarray(ColoredBoxes()[1]['image'].repeat(2, 0).repeat(2, 1)).save(path)
  return path


def overlap(a, b):
  inter = np.prod(np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0))
  return inter / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter)


def test_average_precision_rises_far_above_that_of_an_untrained_model(workdir):
  figures = read_metrics(workdir / 'metrics.jsonl')[-1]
  assert figures['ap/ap50'] > 0.4
  assert figures['ap/ap50'] > figures['ap/ap75']


def test_objects_are_found_by_text_in_pixels_of_the_file(workdir, file):
  model, record = fmcv_jax.load(workdir), ColoredBoxes()[1]
  names = [ColoredBoxes().names[number] for number in record['classes']]
  for name, box in zip(names, record['boxes'], strict=True):
    found = model.detect(str(file), [name], threshold=0.0)
    assert {thing.label for thing in found} == {name}
    assert [thing.score for thing in found] == sorted((thing.score for thing in found), reverse=True)
    assert overlap(np.array(found[0].box), 2 * box) > 0.4
  one, several = model.detect(str(file), names), model.detect([str(file)] * 2, names)
  assert several == [one, one]
  assert all(thing.score >= 0.2 for thing in one)


def test_an_example_image_stands_for_a_text(workdir, file, tmp_path):
  (found,) = fmcv_jax.load(workdir).detect([str(file)], like=[str(file)], threshold=0.0)
  assert {thing.label for thing in found} == {str(file)}


def test_the_command_writes_coco_json_and_drawings(workdir, file, tmp_path, capsys):
  (tmp_path / 'broken.jpg').write_bytes(b'nothing')
  args = ['detect', str(file), str(tmp_path / 'broken.jpg'), '--model', str(workdir), '--text', 'red', 'green']
  assert main([*args, '--threshold', '0', '--to', str(tmp_path / 'out')]) == 0
  captured = capsys.readouterr()
  assert '1 of 2 images cannot be read and are left out' in captured.err
  whole = json.loads((tmp_path / 'out' / 'detections.json').read_text())
  assert whole['images'] == [{'id': 1, 'file_name': str(file), 'height': 64, 'width': 64}]
  assert whole['categories'] == [{'id': 1, 'name': 'red'}, {'id': 2, 'name': 'green'}]
  first = whole['annotations'][0]
  left, top, width, height = first['bbox']
  assert min(left, top) >= 0
  assert max(left + width, top + height) <= 64.001
  line = f'{file}  {whole["categories"][first["category_id"] - 1]["name"]}  {first["score"]:.3f}'
  assert captured.out.startswith(line)
  drawing = Image.open(next((tmp_path / 'out').glob('*_two.png')))
  assert drawing.size == (64, 64)
  assert main([*args, '--to', str(tmp_path / 'out')]) == 2
  assert 'detections.json exists there' in capsys.readouterr().err


def test_no_box_lies_in_the_padding_of_an_image(workdir, tmp_path):
  padded = shutil.copytree(workdir, tmp_path / 'padded')
  config = json.loads((padded / 'config.json').read_text())
  config['data']['image'] = {'name': 'resize_pad', 'size': 32}
  (padded / 'config.json').write_text(json.dumps(config))
  wide = ColoredBoxes()[1]['image'].repeat(8, 1)[:16]  # 256 x 16: of the 32 rows of the network 30 are padding
  found = fmcv_jax.load(padded).detect(wide, 'red', threshold=0.0)
  boxes = np.array([thing.box for thing in found])
  assert len(boxes) < 16  # patches
  assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_what_cannot_be_found_is_said(workdir, file, capsys):
  model = fmcv_jax.load(workdir)
  with pytest.raises(UserError, match='texts: give at least one text to find'):
    model.detect(str(file))
  with pytest.raises(UserError, match='texts: one of them is empty'):
    model.detect(str(file), ['red', ' '])
  with pytest.raises(UserError, match="texts: 'red' is given twice"):
    model.detect(str(file), ['red', 'green', 'red'])
  with pytest.raises(UserError, match='no embedding of a whole image to compare with labels'):
    model.classify(str(file), ['red', 'green'])
  with pytest.raises(UserError, match='threshold: expected a number from 0 to 1, got 2'):
    model.detect(str(file), ['red'], threshold=2)
  assert main(['detect', str(file), '--model', 'demo', '--text', 'red']) == 2
  assert 'this model does not detect objects by texts; its outputs are' in capsys.readouterr().err
