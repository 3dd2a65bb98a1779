"""A set detector from outside of the package: boxes of unequal numbers, a search in the step, trees as its output."""

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert, generalized_box_iou

from fmcv_jax.data.loader import evaluation_batches
from fmcv_jax.data.pipeline import Pipeline
from tests.systems import detector, experiments
from tests.systems.sources import Rectangles


class Sized(nn.Module):
  """An encoder of which only the size of its images is asked."""

  image_size: int = 16


def config(augment=({'name': 'flip'},)):
  encoder = {'name': 'vit', 'variant': 'mu/8', 'image_size': 16, 'depth': 1}
  return experiments.make_config(
    {
      'name': 'tests.systems.detector:Detection',
      'network': {'name': 'tests.systems.detector:set_detector', 'encoder': encoder},
      'augment': augment,
    },
    'tests.systems.sources:Rectangles',
  )


def test_a_set_detector_learns_and_gives_boxes(tmp_path):
  losses, run, model = experiments.trained(config(), tmp_path)
  experiments.assert_falls(losses)
  found = experiments.map_all(run, model, truth=('boxes', 'classes'))['detections']
  assert model.outputs['detections'].kind == 'boxes'
  assert {name: x.dtype for name, x in found.values.items()} == {
    'boxes': np.float32,
    'classes': np.int32,
    'scores': np.float32,
  }
  assert found.values['boxes'].shape == (32, 6, 4)
  for index in range(32):
    record = Rectangles()[index]
    count = len(record['classes'])
    np.testing.assert_array_equal(found.truth['boxes'][index, :count], record['boxes'])
    np.testing.assert_array_equal(found.truth['classes'][index], [*record['classes'], *[-1] * (4 - count)])


def test_the_loss_is_that_of_scipys_assignment_and_torchvisions_overlaps():
  draw = np.random.default_rng(0)
  logits, boxes = draw.normal(size=(16, 6, 3)), draw.uniform(0.2, 0.8, (16, 6, 4))
  pipeline = Pipeline(Rectangles(16)).padded_as(detector.Detection(detector.set_detector(Sized())).example_batch)
  (true,) = evaluation_batches(pipeline, batch=16, fields=('image', 'boxes', 'classes'))
  total = count = 0.0
  for row in range(16):
    real = true['classes'][row] >= 0
    classes = true['classes'][row][real]
    ours, theirs = torch.tensor(boxes[row]), torch.tensor(true['boxes'][row][real] / 16, dtype=torch.float64)
    theirs = box_convert(theirs, 'xyxy', 'cxcywh')
    overlap = generalized_box_iou(*(box_convert(x, 'cxcywh', 'xyxy') for x in (ours, theirs))).numpy()
    distance = torch.cdist(ours, theirs, p=1).numpy()
    log_probability = logits[row] - np.log(np.exp(logits[row]).sum(-1, keepdims=True))
    queries, rows = linear_sum_assignment(5 * distance - 2 * overlap - np.exp(log_probability)[:, classes])
    target = np.full(6, 2)
    target[queries] = classes[rows]
    total -= (np.where(target == 2, 0.1, 1) * log_probability[np.arange(6), target]).sum()
    total += (5 * distance + 2 * (1 - overlap))[queries, rows].sum()
    count += real.sum()

  class Given(detector.Detection):
    def _apply(self, params, images):
      return np.float32(logits), np.float32(boxes)

  true = {name: true[name] for name in ('image', 'boxes', 'classes')}
  loss = jax.jit(Given(detector.set_detector(Sized())).loss)({}, true, jax.random.key(0), {})
  assert float(loss.weight) == count == 24
  np.testing.assert_allclose(float(loss.total), total, rtol=1e-5)


@pytest.mark.slow
def test_a_set_detector_trains_equally_on_all_meshes_and_in_microbatches():
  # Each microbatch draws its own flips, so that there are none here.
  more = [('fsdp, microbatches', (*experiments.MESHES['fsdp'], 'train.grad_accum_steps=2'))]
  experiments.assert_equal_losses_on_all_meshes(config(augment=()), more=more)
