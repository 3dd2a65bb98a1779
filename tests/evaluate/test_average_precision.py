"""Average precision against pycocotools on files that it reads itself, and against values worked out by hand."""

import contextlib
import io
import json

import numpy as np
import pytest

from fmcv_jax.errors import UserError
from fmcv_jax.evaluate import average_precision as module
from fmcv_jax.evaluate.average_precision import average_precision

coco = pytest.importorskip('pycocotools.coco', reason='pip install fmcv-jax[detection]')
cocoeval = pytest.importorskip('pycocotools.cocoeval')


def random_set(seed, images=12, classes=5):
  """Objects with crowds and absent classes, and detections near them, with ties, and more than 100 in an image."""
  draw = np.random.default_rng(seed)
  true, boxes, numbers = [], [], []
  for number in range(images):
    count = 0 if number == 3 else int(draw.integers(1, 9))
    corner = draw.uniform(0, 400, (count, 2))
    own = np.concatenate([corner, corner + draw.uniform(4, 200, (count, 2))], 1)
    labels = draw.integers(0, classes - 1, count)  # the last class has no object
    crowd = draw.uniform(size=count) < 0.15
    area = (own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1]) * draw.uniform(0.5, 1, count)
    true.append({'boxes': own, 'classes': labels, 'crowd': crowd, 'area': area, 'image_id': 1000 - 7 * number})
    near = own[draw.integers(0, count, 130)] if count else draw.uniform(0, 400, (130, 4))
    noise = draw.normal(scale=draw.choice([1, 20], (130, 1)), size=(130, 4))
    found = near + noise
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    boxes.append(found)
    wrong = draw.uniform(size=130) < 0.2
    numbers.append(
      np.where(wrong, draw.integers(0, classes, 130), labels[draw.integers(0, count, 130)] if count else 0)
    )
  scores = np.round(draw.uniform(size=(images, 130)), 1)  # many are equal
  return true, {'boxes': np.array(boxes), 'classes': np.array(numbers), 'scores': scores}, classes


def by_files(true, found, classes, folder):
  """The figures of pycocotools from JSON files, as its own demonstration computes them; ids begin at 0 and 1."""
  annotations, results = [], []
  for image, boxes, numbers, scores in zip(true, found['boxes'], found['classes'], found['scores'], strict=True):
    for box, label, crowd, area in zip(image['boxes'], image['classes'], image['crowd'], image['area'], strict=True):
      sides = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
      annotations.append(dict(id=len(annotations) + 1, image_id=image['image_id'], category_id=int(label), bbox=sides,
                              area=float(area), iscrowd=int(crowd)))  # fmt: skip
    for box, label, score in zip(boxes, numbers, scores, strict=True):
      sides = [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()]
      results.append(dict(image_id=image['image_id'], category_id=int(label), bbox=sides, score=float(score)))
  content = {
    'images': [{'id': image['image_id']} for image in true],
    'annotations': annotations,
    'categories': [{'id': number} for number in range(classes)],
  }
  (folder / 'true.json').write_text(json.dumps(content))
  (folder / 'found.json').write_text(json.dumps(results))
  with contextlib.redirect_stdout(io.StringIO()):
    truth = coco.COCO(str(folder / 'true.json'))
    run = cocoeval.COCOeval(truth, truth.loadRes(str(folder / 'found.json')), 'bbox')
    run.evaluate()
    run.accumulate()
    run.summarize()
  return run.stats


@pytest.mark.parametrize('seed', range(4))
def test_figures_are_those_of_pycocotools_on_its_own_files(seed, tmp_path):
  true, found, classes = random_set(seed)
  ours = average_precision(true, found, classes)
  assert len(ours) == 12
  np.testing.assert_allclose(list(ours.values()), by_files(true, found, classes, tmp_path), rtol=0, atol=1e-6)
  assert 0.05 < ours['ap'] < 0.95


def test_one_of_two_objects_found_first_is_half():
  """Precision 1 up to a recall of 0.5: 51 of the 101 recall thresholds."""
  true = [{'boxes': np.array([[0.0, 0, 50, 50], [100, 100, 150, 150]]), 'classes': np.array([0, 0])}]
  found = {
    'boxes': np.array([[[0.0, 0, 50, 50], [60, 60, 90, 90]]]),
    'classes': np.zeros((1, 2), int),
    'scores': np.array([[0.9, 0.8]]),
  }
  figures = average_precision(true, found, 1)
  assert figures['ap'] == pytest.approx(51 / 101)
  assert figures['ar100'] == pytest.approx(0.5)
  assert 'ap_large' not in figures  # no object is large


def test_the_first_object_counts_although_ids_begin_with_it():
  """pycocotools takes an annotation with the id 0 for one that is not matched."""
  true = [{'boxes': np.array([[0.0, 0, 50, 50]]), 'classes': np.array([0])}]
  found = {'boxes': np.array([[[0.0, 0, 50, 50]]]), 'classes': np.zeros((1, 1), int), 'scores': np.ones((1, 1))}
  assert average_precision(true, found, 1)['ap'] == pytest.approx(1.0)


def test_images_of_two_data_sets_with_the_same_id_stay_apart():
  true, found, classes = random_set(0)
  apart = average_precision(true, found, classes)
  joined = [{**image, 'image_id': number % 6} for number, image in enumerate(true)]
  same = average_precision([{**image, 'image_id': number} for number, image in enumerate(true)], found, classes)
  assert average_precision(joined, found, classes) == same
  assert same['ap'] == pytest.approx(apart['ap'], abs=0.02)  # equal scores are in another order


@pytest.mark.parametrize(
  ('image', 'message'),
  [
    ({'label': 1}, 'needs boxes and classes; the source has label'),
    ({'boxes': [], 'classes': [], 'negatives': []}, 'LVIS knows only some classes'),
    ({'boxes': [], 'classes': [], 'difficult': np.array([True])}, 'set difficult=False'),
  ],
)
def test_data_with_other_rules_is_refused(image, message):
  with pytest.raises(UserError, match=message):
    module._check(image)
