"""The detection loss against scipy's assignment, torchvision's boxes and focal loss; learning, on every mesh alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from fmcv_jax.data.sources.base import Source
from fmcv_jax.models.backbones.text import text_transformer
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.dense.owl import PatchObjects, owl, owl_detector
from fmcv_jax.models.multimodal.dual_encoder import dual_encoder
from fmcv_jax.objectives.detection import Detection
from tests.systems import experiments
from tests.systems.sources import COLORS, Words

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
ops = pytest.importorskip('torchvision.ops')

WORDS = ('a', 'red', 'green', 'blue', 'white')
TOWERS = {
  'name': 'dual_encoder',
  'image': {'name': 'vit', 'variant': 'mu/8', 'image_size': 32, 'num_classes': 16, 'head_bias': False},
  'text': {
    'name': 'text_transformer', 'vocab_size': 8, 'length': 5, 'width': 16, 'depth': 1, 'num_heads': 2,
    'num_classes': 16,
  },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ColoredBoxes(Source):
  """One to three rectangles on a gray ground, uint8 [32, 32, 3], whose class is their color."""

  count: int = 32

  @property
  def names(self):
    return tuple(COLORS)

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    draw = np.random.default_rng(index)
    image = np.full((32, 32, 3), 128, np.uint8)
    count = 1 + index % 3
    classes = draw.permutation(len(COLORS))[:count]
    boxes = []
    for place, number in enumerate(classes):
      left, top = 1 + 11 * place, int(draw.integers(1, 20))
      right, bottom = left + int(draw.integers(5, 10)), top + int(draw.integers(5, 12))
      image[top:bottom, left:right] = list(COLORS.values())[number]
      boxes.append((left, top, right, bottom))
    return {'image': image, 'boxes': np.float32(boxes), 'classes': classes.astype(np.int32), 'key': str(index)}


def small(objectness=True):
  image = vit('mu/8', image_size=32, num_classes=16, head_bias=False)
  text = text_transformer(8, 5, 16, 1, 2, num_classes=16)
  return owl_detector(dual_encoder(image, text), objectness)


def config(**objective):
  network = {'name': 'owl_detector', 'towers': TOWERS}
  return experiments.make_config(
    {'name': 'detection', 'network': network, 'max_boxes': 4, 'num_queries': 4, **objective},
    'tests.objectives.test_detection:ColoredBoxes',
    data={
      'source': {'name': 'tests.objectives.test_detection:ColoredBoxes'},
      'queries': {'count': 4, 'templates': ('{}', 'a {}')},
    },
    tokenizer={'name': 'tests.systems.sources:Words', 'words': WORDS, 'length': 5},
  )


def test_the_loss_is_that_of_scipys_assignment_and_torchvisions_losses():
  draw = np.random.default_rng(0)
  batch, patches, texts, rows = 5, 16, 4, 6
  objective = Detection(small(), max_boxes=rows, num_queries=texts, class_weight=1.0, l1_weight=5.0, giou_weight=2.0)
  classes = np.full((batch, rows), -1, np.int32)
  boxes = np.zeros((batch, rows, 4), np.float32)
  for row, count in enumerate((3, 0, 6, 1, 2)):
    places = np.sort(draw.choice(rows, count, replace=False))
    classes[row, places] = draw.integers(0, texts - 1, count)
    corner = draw.uniform(0, 20, (count, 2))
    boxes[row, places] = np.concatenate([corner, corner + draw.uniform(2, 12, (count, 2))], -1)
  queries = np.ones((batch, texts, 5), np.int32)
  queries[:, -1] = 0  # a text that is not there
  found = PatchObjects(
    embeddings=draw.normal(size=(batch, patches, 16)).astype(np.float32),
    shift=draw.normal(size=(batch, patches)).astype(np.float32),
    scale=draw.uniform(0.5, 2, (batch, patches)).astype(np.float32),
    boxes=draw.uniform(0.2, 0.8, (batch, patches, 4)).astype(np.float32),
    objectness=draw.normal(size=(batch, patches)).astype(np.float32),
  )
  embeddings = draw.normal(size=(batch, texts, 16)).astype(np.float32)
  given = {'boxes': boxes, 'classes': classes, 'queries': queries, 'image': np.zeros((batch, 32, 32, 3), np.uint8)}
  ours = jax.jit(objective.sums)(jax.tree.map(jnp.asarray, found), embeddings, given)

  expected = dict.fromkeys(('class', 'l1', 'giou', 'objectness'), 0.0)
  for row in range(batch):
    logits = (found.embeddings[row] @ embeddings[row].T + found.shift[row][:, None]) * found.scale[row][:, None]
    logits, real = torch.tensor(logits.astype(np.float64)), classes[row] >= 0
    true, numbers = torch.tensor(boxes[row][real] / 32, dtype=torch.float64), classes[row][real]
    predicted = ops.box_convert(torch.tensor(found.boxes[row], dtype=torch.float64), 'cxcywh', 'xyxy')

    def focal(logits, target):
      return ops.sigmoid_focal_loss(logits, torch.full_like(logits, target), alpha=0.3, gamma=2.0)

    cost = 5 * torch.cdist(predicted, true, p=1) - 2 * ops.generalized_box_iou(predicted, true)
    cost += (focal(logits, 1.0) - focal(logits, 0.0))[:, numbers]
    chosen, place = linear_sum_assignment(cost.numpy())
    target, objects = torch.zeros_like(logits), torch.zeros(patches, dtype=torch.float64)
    target[chosen, numbers[place]], objects[chosen] = 1.0, 1.0
    loss = ops.sigmoid_focal_loss(logits, target, alpha=0.3, gamma=2.0)
    expected['class'] += float(loss[:, :-1].sum())
    objectness = torch.tensor(found.objectness[row].astype(np.float64))
    expected['objectness'] += float(ops.sigmoid_focal_loss(objectness, objects, alpha=0.3, gamma=2.0).sum())
    expected['l1'] += float((predicted[chosen] - true[place]).abs().sum())
    expected['giou'] += float(ops.generalized_box_iou_loss(predicted[chosen], true[place]).sum())
  assert float(ours.pop('count')) == 12
  for name, value in expected.items():
    np.testing.assert_allclose(float(ours[name]), value, rtol=1e-5, err_msg=name)


def test_an_untrained_patch_predicts_a_box_of_one_patch_at_its_corner():
  network = small()
  images, texts = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 2, 5), jnp.int32)
  found, embeddings = network.apply(network.init(jax.random.key(0), images, texts), images, texts)
  np.testing.assert_allclose(found.boxes[0, 6], [3 / 4, 2 / 4, 1 / 4, 1 / 4], atol=1e-3)
  assert embeddings.shape == (1, 2, 16)


@pytest.mark.parametrize(
  ('variant', 'objectness', 'parameters'),
  [
    ('B/32', False, 153_231_879),
    ('B/16', False, 152_789_511),
    ('L/14', False, 433_888_519),
    ('B/16', True, 154_966_792),
    ('L/14', True, 437_610_760),
  ],
)
def test_networks_have_the_published_sizes(variant, objectness, parameters):
  network = owl(variant, objectness=objectness)
  images, texts = jnp.zeros((1, *network.input_shape)), jnp.zeros((1, 2, 16), jnp.int32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), images, texts)
  assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters


def test_boxes_are_found_by_the_names_of_their_colors(tmp_path):
  losses, run, model = experiments.trained(config(), tmp_path)
  experiments.assert_falls(losses)
  assert isinstance(run.experiment.tokenizer, Words)
  assert model.outputs['detections'].kind == 'boxes'


@pytest.mark.slow
def test_detection_trains_equally_on_all_meshes_and_in_microbatches():
  # Each microbatch draws its own flips, so that there are none here.
  more = [('fsdp, microbatches', (*experiments.MESHES['fsdp'], 'train.grad_accum_steps=2'))]
  experiments.assert_equal_losses_on_all_meshes(config(), more=more)


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='max_boxes: 17 objects cannot be matched to 16 patches'):
    Detection(small(), max_boxes=17)
  with pytest.raises(ValueError, match='the image tower has to be a vit with pool=cls'):
    owl_detector(dual_encoder(vit('mu/8', image_size=32, num_classes=16, pool='gap'), small().text))
