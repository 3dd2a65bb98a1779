"""Average precision against pycocotools on files that it reads itself, and against values worked out by hand."""

import contextlib
import io
import json

import numpy as np
import pytest

from fmcv_jax.errors import UserError
from fmcv_jax.evaluate import average_precision as module
from fmcv_jax.evaluate.average_precision import Found, average_precision

coco = pytest.importorskip('pycocotools.coco', reason='pip install fmcv-jax[detection]')
cocoeval = pytest.importorskip('pycocotools.cocoeval')
coco_mask = pytest.importorskip('pycocotools.mask')


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
  return true, [Found(*row) for row in zip(boxes, numbers, scores, strict=True)], classes


def by_files(true, found, classes, folder):
  """The figures of pycocotools from JSON files, as its own demonstration computes them; ids begin at 0 and 1."""
  annotations, results = [], []
  for image, (boxes, numbers, scores, _) in zip(true, found, strict=True):
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


@pytest.mark.parametrize('seed', range(2))
def test_figures_of_masks_are_those_of_pycocotools_on_its_own_files(seed, tmp_path):
  """Masks of boxes with a corner cut off, so that they are no rectangles."""
  draw, classes = np.random.default_rng(seed), 3
  annotations, results, true, found = [], [], [], []

  def shapes(count):
    masks = np.zeros((count, 60, 80), bool)
    for mask in masks:
      top, left = draw.integers(0, 30, 2)
      mask[top : top + draw.integers(6, 30), left : left + draw.integers(6, 40)] = True
      mask[top : top + 4, left : left + 4] = False
    return masks

  for image_id in range(1, 7):
    own = shapes(5)
    labels, crowd = draw.integers(0, classes, 5), draw.uniform(size=5) < 0.2
    near = np.roll(own[draw.integers(0, 5, 20)], draw.integers(-2, 3), axis=2)
    numbers, scores = draw.integers(0, classes, 20), np.round(draw.uniform(size=20), 1)
    encoded = [coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in near]
    boxes = np.array([coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask, np.uint8))) for mask in own])
    boxes[:, 2:] += boxes[:, :2]
    area = own.sum((1, 2))
    record = {'boxes': boxes, 'classes': labels, 'crowd': crowd, 'area': area, 'masks': own, 'image_id': image_id}
    true.append(record)
    found.append(Found(np.zeros((20, 4)), numbers, scores, encoded))
    for mask, label, is_crowd in zip(own, labels, crowd, strict=True):
      rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
      annotations.append(dict(id=len(annotations) + 1, image_id=image_id, category_id=int(label), iscrowd=int(is_crowd),
                              area=int(mask.sum()), bbox=coco_mask.toBbox(rle).tolist(),
                              segmentation={**rle, 'counts': rle['counts'].decode()}))  # fmt: skip
    for rle, label, score in zip(encoded, numbers, scores, strict=True):
      results.append(dict(image_id=image_id, category_id=int(label), score=float(score),
                          segmentation={**rle, 'counts': rle['counts'].decode()}))  # fmt: skip
  whole = {'images': [{'id': number, 'height': 60, 'width': 80} for number in range(1, 7)], 'annotations': annotations,
           'categories': [{'id': number} for number in range(classes)]}  # fmt: skip
  (tmp_path / 'true.json').write_text(json.dumps(whole))
  (tmp_path / 'found.json').write_text(json.dumps(results))
  with contextlib.redirect_stdout(io.StringIO()):
    truth = coco.COCO(str(tmp_path / 'true.json'))
    run = cocoeval.COCOeval(truth, truth.loadRes(str(tmp_path / 'found.json')), 'segm')
    run.evaluate()
    run.accumulate()
    run.summarize()
  ours = average_precision(true, found, classes, 'masks')
  expected = [value for value in run.stats if value >= 0]
  np.testing.assert_allclose(list(ours.values()), expected, rtol=0, atol=1e-6)
  assert 0.01 < ours['ap'] < 0.95


def test_nothing_found_is_an_average_precision_of_zero():
  true = [{'boxes': np.array([[0.0, 0, 50, 50]]), 'classes': np.array([0])}]
  assert average_precision(true, [Found(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))], 1)['ap'] == 0


def test_one_of_two_objects_found_first_is_half():
  """Precision 1 up to a recall of 0.5: 51 of the 101 recall thresholds."""
  true = [{'boxes': np.array([[0.0, 0, 50, 50], [100, 100, 150, 150]]), 'classes': np.array([0, 0])}]
  found = [Found(np.array([[0.0, 0, 50, 50], [60, 60, 90, 90]]), np.zeros(2, int), np.array([0.9, 0.8]))]
  figures = average_precision(true, found, 1)
  assert figures['ap'] == pytest.approx(51 / 101)
  assert figures['ar100'] == pytest.approx(0.5)
  assert 'ap_large' not in figures  # no object is large


def test_the_first_object_counts_although_ids_begin_with_it():
  """pycocotools takes an annotation with the id 0 for one that is not matched."""
  true = [{'boxes': np.array([[0.0, 0, 50, 50]]), 'classes': np.array([0])}]
  found = [Found(np.array([[0.0, 0, 50, 50]]), np.zeros(1, int), np.ones(1))]
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
