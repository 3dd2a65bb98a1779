import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.data.loader import TrainLoader
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.scattered_digits import Scattered
from fmcv_jax.data.transforms import RandomResizedCrop
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.evaluate.segmentation import MeanIou, ious
from fmcv_jax.objectives.outputs import Output
from fmcv_jax.objectives.segmentation import confusions
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement

TRUE = np.array([[[0, 0, 1], [1, 2, 255]]], np.uint8)
FOUND = np.array([[[0, 1, 1], [1, 0, 3]]], np.uint8)


def test_mean_iou_by_hand():
  counts = np.asarray(confusions(jnp.array(FOUND), jnp.array(TRUE), 4))
  np.testing.assert_array_equal(counts[0], [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
  figures = ious(counts.sum(0))
  # Class 0: 1 of 3; class 1: 2 of 3; class 2: none of 1; class 3 is neither true nor found where the truth is known.
  assert figures == pytest.approx({'mean_iou': (1 / 3 + 2 / 3 + 0) / 3, 'pixel_accuracy': 3 / 5})


def test_over_the_mesh_perfect_predictions_score_one_and_background_alone_an_eleventh():
  placement = Placement(make_mesh(MeshShape(data=4, fsdp=2)))
  scenes = Pipeline(Scattered('test', copies=1, clutter=1))
  for answer, right in ((lambda segments: segments, True), (lambda segments: segments * 0, False)):
    subject = EvaluatedModel(
      {'confusion': Output(lambda p, e, batch: confusions(answer(batch['segments']), batch['segments'], 11),  # noqa: B023
                            reads=('segments',))},
      placement, params={}, extra={},
    )  # fmt: skip
    figures = MeanIou(scenes, batch_size=64)(subject)
    if right:
      assert figures == {'mean_iou': 1.0, 'pixel_accuracy': 1.0}
    else:
      assert figures['mean_iou'] == pytest.approx(figures['pixel_accuracy'] / 11)


def test_the_loader_crops_segments_as_it_crops_the_image():
  crop = RandomResizedCrop(16, scale=(0.3, 0.9))
  batch = next(TrainLoader(Pipeline(Scattered(clutter=0), crop), batch=32, seed=0, fields=('image', 'segments')))
  assert (batch['segments'].shape, batch['segments'].dtype) == ((32, 16, 16), np.uint8)
  ink, inside = batch['image'][..., 0] >= 64, batch['segments'] > 0
  assert inside.any(axis=(1, 2)).mean() > 0.9
  assert (ink == inside).mean() > 0.95  # but for the rim, where the image is interpolated
