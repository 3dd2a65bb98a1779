"""Panoptic quality against COCO's definition, segment by segment, and values worked out by hand."""

import numpy as np
import pytest

from fmcv_jax.evaluate.panoptic import Counts, count_segments, quality, segment_map

CLASSES = 4


def random_image(seed):
  """Maps of blocks with void, crowds (of one class at most one), unlabeled pixels, and predictions near the truth."""
  draw = np.random.default_rng(seed)
  blocks = draw.integers(-1, 7, (6, 8))
  true = np.kron(blocks, np.ones((5, 5), int))
  labels = draw.integers(0, CLASSES, 7)
  crowd = np.zeros(7, bool)
  for number in range(CLASSES):
    of_class = np.flatnonzero(labels == number)
    if len(of_class) > 1:
      crowd[of_class[0]] = draw.uniform() < 0.5
  found = np.roll(true, draw.integers(-2, 3, 2), axis=(0, 1))
  found[draw.uniform(size=found.shape) < 0.05] = -1
  found_labels = np.where(draw.uniform(size=7) < 0.2, draw.integers(0, CLASSES, 7), labels)
  return found, found_labels, true, labels, crowd


def by_definition(found, found_labels, true, labels, crowd):
  """The counts by loops over pairs of segments, as panopticapi's pq_compute describes them."""
  out = Counts(*(np.zeros(CLASSES) for _ in range(4)))
  matched_true, matched_found = set(), set()
  for t in set(true.ravel().tolist()) - {-1}:
    for f in set(found.ravel().tolist()) - {-1}:
      both = ((true == t) & (found == f)).sum()
      if not both or crowd[t] or labels[t] != found_labels[f]:
        continue
      union = (true == t).sum() + (found == f).sum() - both - ((true == -1) & (found == f)).sum()
      if both / union > 0.5:
        out.matched[labels[t]] += 1
        out.iou[labels[t]] += both / union
        matched_true.add(t)
        matched_found.add(f)
  for t in set(true.ravel().tolist()) - {-1} - matched_true:
    out.missed[labels[t]] += not crowd[t]
  for f in set(found.ravel().tolist()) - {-1} - matched_found:
    ignored = ((true == -1) & (found == f)).sum()
    for t in np.flatnonzero(crowd & (labels == found_labels[f])):
      ignored += ((true == t) & (found == f)).sum()
    out.wrong[found_labels[f]] += not ignored / (found == f).sum() > 0.5
  return out


@pytest.mark.parametrize('seed', range(20))
def test_counts_are_those_of_the_definition(seed):
  image = random_image(seed)
  for ours, expected in zip(count_segments(*image, CLASSES), by_definition(*image), strict=True):
    np.testing.assert_allclose(ours, expected, rtol=1e-12)


def test_one_match_one_miss_and_one_wrong_segment():
  """A match with an IoU of 0.8, a segment not found and one that is not there: 0.8 / (1 + 1/2 + 1/2)."""
  true, found = np.full((10, 20), -1), np.full((10, 20), -1)
  true[:, :10], true[:, 15:] = 0, 1
  found[:8, :10] = 0
  counts = count_segments(found, np.array([0]), true, np.array([0, 0]), np.array([False, False]), 2)
  assert quality(counts, np.array([True, True])) == pytest.approx({'pq': 0.8 / 1.5, 'sq': 0.8, 'rq': 1 / 1.5})
  found[:, 15:] = 1
  counts = count_segments(found, np.array([0, 1]), true, np.array([0, 0]), np.array([False, False]), 2)
  assert quality(counts, np.array([True, False])) == pytest.approx({'pq': 0.8 / 1.5, 'sq': 0.8, 'rq': 1 / 1.5})
  assert quality(counts, np.array([False, True])) == {'pq': 0.0, 'sq': 0.0, 'rq': 0.0}


def test_an_overlap_of_half_the_union_is_no_match_and_void_is_not_part_of_it():
  true, found = np.full((4, 4), -1), np.zeros((4, 4), int)
  true[:2] = 0
  true[2:] = 1
  labels, none = np.array([0, 1]), np.array([False, False])
  assert count_segments(found, np.array([0]), true, labels, none, 2).matched.sum() == 0  # 8 of 16 pixels
  true[2:] = -1
  assert count_segments(found, np.array([0]), true, labels, none, 2).iou[0] == 1


def test_what_lies_on_a_crowd_of_its_class_is_not_wrong():
  true, found = np.zeros((4, 4), int), np.zeros((4, 4), int)
  for label, wrong in ((0, 0), (1, 1)):
    counts = count_segments(found, np.array([label]), true, np.array([0]), np.array([True]), 2)
    assert counts.wrong.sum() == wrong
    assert counts.missed.sum() == 0


def test_later_masks_lie_above_earlier_ones():
  masks = np.zeros((2, 2, 2), bool)
  masks[0, :, 0], masks[1, 0] = True, True
  np.testing.assert_array_equal(segment_map(masks), [[1, 1], [0, -1]])
