"""Semantic, instance and panoptic segments against transformers' image processor."""

from types import SimpleNamespace

import numpy as np
import pytest

from fmcv_jax.data.transforms import ResizeCrop, ResizePad
from fmcv_jax.evaluate.segments import class_segments, instance_segments, make_segments, panoptic_segments

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')

SIZE = 64
RNG = np.random.default_rng(0)


def queries(seed, count=12, classes=4):
  """Smooth masks of which some overlap, and confident classes, of which some are 'no object'."""
  draw = np.random.default_rng(seed)
  y, x = np.mgrid[:16, :16]
  center = np.stack(np.divmod(np.arange(count), 4), -1) * (5, 4) + (2.5, 2) + draw.uniform(-1.5, 1.5, (count, 2))
  radius = draw.uniform(1.5, 3, count)
  distance = np.hypot(y - center[:, :1, None], x - center[:, 1:, None])
  masks = 1.5 * (radius[:, None, None] - distance) + 0.2 * draw.normal(size=(count, 16, 16))
  logits = draw.normal(size=(count, classes + 1))
  logits[np.arange(count), draw.integers(0, classes + 1, count)] += 6
  return logits.astype(np.float32), masks.astype(np.float32)


def theirs(kind, logits, masks, height, width, **options):
  processor = transformers.EomtImageProcessor(size={'shortest_edge': SIZE, 'longest_edge': SIZE}, do_pad=True)
  outputs = SimpleNamespace(
    class_queries_logits=torch.tensor(logits)[None], masks_queries_logits=torch.tensor(masks)[None], patch_offsets=None
  )
  call = getattr(processor, f'post_process_{kind}_segmentation')
  (found,) = call(outputs, target_sizes=[(height, width)], **options)
  return found


def geometry(height, width):
  return ResizePad(SIZE).draw(height, width, RNG)


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('sides', [(64, 64), (50, 100), (120, 75)])
def test_panoptic_segments_are_those_of_the_processor(seed, sides):
  logits, masks = queries(seed)
  for stuff in ((), (0, 2)):
    expected = theirs('panoptic', logits, masks, *sides, stuff_classes=list(stuff))
    found = panoptic_segments(logits, masks, geometry(*sides), stuff=stuff)
    assert len(found.labels) == len(expected['segments_info']) > 1
    of_theirs = {row['id']: row for row in expected['segments_info']}
    map_ = expected['segmentation'].numpy()
    for number, (mask, label, score) in enumerate(zip(found.masks, found.labels, found.scores, strict=True)):
      other = np.bincount(map_[mask].astype(int) + 1).argmax() - 1
      assert ((map_ == other) != mask).sum() <= 1  # a probability that is 0.5 but for rounding
      np.testing.assert_array_equal(found.map == number, mask)
      assert of_theirs[int(other)]['label_id'] == label
      assert of_theirs[int(other)]['score'] == pytest.approx(score, abs=1e-6)
    assert abs((found.map == -1).sum() - (map_ == -1).sum()) <= 1


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('sides', [(64, 64), (50, 100)])
def test_instances_are_those_of_the_processor(seed, sides):
  logits, masks = queries(seed)
  expected = theirs('instance', logits, masks, *sides, threshold=0.5)['segments_info']
  found = instance_segments(logits, masks, geometry(*sides), threshold=0.5)
  assert len(found.labels) > 3
  rows = sorted(((row['score'], row['label_id']) for row in expected), reverse=True)
  np.testing.assert_allclose(found.scores, [score for score, _ in rows], atol=2e-6)
  np.testing.assert_array_equal(found.labels, [label for _, label in rows])
  best = found.masks[0]
  assert (found.map[best] == 0).all()  # the better one lies above


def test_the_class_map_is_that_of_the_processor():
  logits, masks = queries(0)
  for side in (64, 96):
    expected = theirs('semantic', logits, masks, side, side).numpy()
    found = class_segments(logits, masks, geometry(side, side))
    np.testing.assert_array_equal(found.class_map, expected)
    assert (found.scores > 0).all()


def test_pixels_that_a_center_crop_cuts_off_have_no_segment():
  logits, masks = queries(0)
  crop = ResizeCrop(SIZE, crop=1.0).draw(64, 128, RNG)
  for found in (panoptic_segments(logits, masks, crop), class_segments(logits, masks, crop)):
    assert found.map.shape == (64, 128)
    assert (found.map[:, :32] == -1).all()
    assert (found.map[:, 96:] == -1).all()
    assert (found.map[:, 32:96] >= 0).any()


def test_the_best_pairs_of_queries_and_classes_may_share_a_mask():
  logits, masks = queries(0)
  found = instance_segments(logits, masks, geometry(64, 64), threshold=0.0, pairs=20)
  assert len(found.labels) == 20
  assert (np.diff(found.scores) <= 0).all()
  assert len({mask.tobytes() for mask in found.masks}) <= 12


def test_no_segment_is_an_empty_set_of_the_size_of_the_image():
  found = make_segments([], [], [], (3, 4))
  assert found.masks.shape == (0, 3, 4)
  assert (found.map == -1).all()
  assert (found.class_map == -1).all()
