"""The loss of mask prediction against transformers' EomtLoss; learning from panoptic files, on every mesh alike."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fmcv_jax import trainer
from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.dense.eomt import QueryMasks, attention_mask, eomt
from fmcv_jax.objectives.mask_points import Points, bilinear, by_gathers, by_products, draw_points, pixel_centers
from fmcv_jax.objectives.mask_prediction import MaskPrediction, class_map
from tests.systems import experiments

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
modeling = pytest.importorskip('transformers.models.eomt.modeling_eomt', reason='pip install fmcv-jax[parity]')

ENCODER = {'variant': 'mu/8', 'image_size': 32, 'registers': 4, 'class_token_has_position': False, 'layer_scale': 1.0}


def small(num_classes=3, queries=6, **options):
  return eomt(vit(**ENCODER), num_classes, queries, blocks=2, upscales=1, **options)


def make_batch(draw, rows=5, classes=3, size=32):
  """Masks bool [3, rows, size, size] with 3, 0 and `rows` segments in random rows, and their classes."""
  numbers = np.full((3, rows), -1, np.int32)
  masks = np.zeros((3, rows, size, size), bool)
  for image, count in enumerate((3, 0, rows)):
    places = np.sort(draw.choice(rows, count, replace=False))
    numbers[image, places] = draw.integers(0, classes, count)
    for place in places:
      top, left = draw.integers(0, size - 8, 2)
      masks[image, place, top : top + draw.integers(4, 16), left : left + draw.integers(4, 16)] = True
  return masks, numbers


def reference(objective, found, masks, classes, rand, monkeypatch):
  """Losses of transformers, weighted; `rand` stands for torch.rand."""
  network = objective.network
  config = modeling.EomtConfig(
    num_labels=network.num_classes,
    class_weight=objective.class_weight,
    mask_weight=objective.mask_weight,
    dice_weight=objective.dice_weight,
    no_object_weight=objective.no_object_weight,
    train_num_points=objective.num_points or found.mask_logits[0, 0].size,
    oversample_ratio=objective.oversample_ratio if objective.num_points else 1.0,
    importance_sample_ratio=objective.importance_sample_ratio if objective.num_points else 1.0,
  )
  criterion = modeling.EomtLoss(config, {})
  monkeypatch.setattr(modeling.torch, 'rand', rand)
  real = classes >= 0
  losses = criterion(
    torch.tensor(np.asarray(found.mask_logits)),
    torch.tensor(np.asarray(found.class_logits)),
    [torch.tensor(own[rows], dtype=torch.float32) for own, rows in zip(masks, real, strict=True)],
    [torch.tensor(own[rows].astype(np.int64)) for own, rows in zip(classes, real, strict=True)],
  )
  weights = {'cross_entropy': config.class_weight, 'mask': config.mask_weight, 'dice': config.dice_weight}
  return sum(weights[name.removeprefix('loss_')] * float(value) for name, value in losses.items())


def random_predictions(draw, queries=6, classes=3, side=8):
  logits = draw.normal(size=(3, queries, classes + 1)), 3 * draw.normal(size=(3, queries, side, side))
  return QueryMasks(*(x.astype(np.float32) for x in logits))


def our_loss(objective, found, masks, classes, points):
  sums = jax.jit(objective.image_sums)(jax.tree.map(jnp.asarray, found), masks, classes, points)
  return float(objective.couple({}, sums, {}, {'mask_probability': jnp.ones(2)}).value)


@pytest.mark.parametrize('seed', range(3))
def test_the_loss_at_equal_points_is_that_of_transformers(seed, monkeypatch):
  draw = np.random.default_rng(seed)
  objective = MaskPrediction(small(), max_segments=5, num_points=20)
  found, (masks, classes) = random_predictions(draw), make_batch(draw)
  shared, candidates, rest = (draw.uniform(size=shape).astype(np.float32) for shape in ((3, 20, 2), (60, 2), (5, 2)))
  points = Points(shared[:, None], *(jnp.broadcast_to(x, (3, 5, *x.shape)) for x in (candidates, rest)))
  images = iter(shared)

  def rand(count, number, _, **options):
    if number == 20:
      return torch.tensor(next(images))[None]
    return torch.tensor({60: candidates, 5: rest}[number]).repeat(count, 1, 1)

  expected = reference(objective, found, masks, classes, rand, monkeypatch)
  np.testing.assert_allclose(our_loss(objective, found, masks, classes, points), expected, rtol=1e-5)


def test_the_loss_over_all_pixels_is_that_of_transformers_at_their_centers(monkeypatch):
  draw = np.random.default_rng(3)
  objective = MaskPrediction(small(), max_segments=5, num_points=0)
  found, (masks, classes) = random_predictions(draw), make_batch(draw)
  centers = torch.tensor(np.array(pixel_centers(8, 8)))[0]
  expected = reference(
    objective, found, masks, classes, lambda count, *_, **__: centers.repeat(count, 1, 1), monkeypatch
  )
  np.testing.assert_allclose(our_loss(objective, found, masks, classes, None), expected, rtol=1e-5)


def test_masks_are_read_between_pixels_as_by_grid_sample():
  draw = np.random.default_rng(0)
  masks = draw.normal(size=(2, 3, 5, 9)).astype(np.float32)
  points = draw.uniform(-0.1, 1.1, (2, 3, 40, 2)).astype(np.float32)
  expected = torch.nn.functional.grid_sample(
    torch.tensor(masks.reshape(6, 1, 5, 9)), torch.tensor(2 * points.reshape(6, 40, 1, 2) - 1), align_corners=False
  )
  np.testing.assert_allclose(bilinear(masks, points), expected.numpy().reshape(2, 3, 40), atol=1e-5)
  shared = bilinear(masks, points[:, :1])
  np.testing.assert_allclose(shared[:, 0], bilinear(masks, points)[:, 0], atol=1e-6)


def test_products_and_gathers_give_equal_values_and_gradients():
  """Products are for TPUs, gathers for all others."""
  draw = np.random.default_rng(1)
  masks = jnp.asarray(draw.normal(size=(2, 3, 5, 9)), jnp.float32)
  for count in (1, 3):
    points = jnp.asarray(draw.uniform(size=(2, count, 40, 2)), jnp.float32)
    (ours, pull), (others, pull_others) = (
      jax.vjp(lambda x, call=call, points=points: call(x, points), masks) for call in (by_products, by_gathers)
    )
    np.testing.assert_allclose(ours, others, atol=1e-5)
    np.testing.assert_allclose(pull(jnp.ones_like(ours))[0], pull_others(jnp.ones_like(ours))[0], atol=1e-4)
  boxes = jnp.asarray(draw.uniform(size=(2, 3, 5, 9)) < 0.5)
  np.testing.assert_allclose(by_products(boxes, points), by_gathers(boxes, points), atol=1e-5)


def test_points_are_as_many_as_the_paper_draws():
  points = draw_points(jax.random.key(0), 2, 3, 12_544, 3.0, 0.75)
  assert [x.shape for x in points] == [(2, 1, 12_544, 2), (2, 3, 37_632, 2), (2, 3, 3_136, 2)]


@pytest.mark.parametrize(
  ('variant', 'blocks', 'parameters'), [('S/16', 3, 23_975_942), ('B/16', 3, 93_663_110), ('L/16', 4, 316_695_686)]
)
def test_networks_have_the_published_sizes(variant, blocks, parameters):
  encoder = vit(variant, image_size=640, registers=4, class_token_has_position=False, layer_scale=1e-5)
  network = eomt(encoder, 133, blocks=blocks)
  shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 640, 640, 3)))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == parameters


def test_a_masked_query_sees_the_patches_of_its_mask_and_all_other_tokens():
  mask_logits = -np.ones((1, 2, 4, 4), np.float32)
  mask_logits[0, :, :2, :2] = 1
  allowed = np.asarray(attention_mask(mask_logits, np.array([[True, False]]), (2, 2), prefix=3))[0, 0]
  assert allowed.shape == (9, 9)
  expected = np.ones((9, 9), bool)
  expected[0, 6:] = False  # the first query: of four patches the first one
  np.testing.assert_array_equal(allowed, expected)


def test_without_masks_training_and_inference_predict_the_same():
  """With the probability 0 the attention of training is that of the plain ViT; with 1 it is another one."""
  network, images = small(), jax.random.normal(jax.random.key(1), (2, 32, 48, 3))
  params = network.init(jax.random.key(0), images)
  (plain,) = network.apply(params, images)
  assert plain.mask_logits.shape == (2, 6, 8, 12)

  def trained(probability):
    return network.apply(params, images, mask_probability=jnp.full(2, probability), train=True,
                         rngs={'dropout': jax.random.key(2)})  # fmt: skip

  *early, last = trained(0.0)
  assert len(early) == 2
  np.testing.assert_allclose(last.mask_logits, plain.mask_logits, rtol=1e-5, atol=1e-5)
  assert np.abs(trained(1.0)[-1].mask_logits - plain.mask_logits).max() > 1e-3


def test_masks_end_block_by_block_between_one_and_five_sixths():
  objective = MaskPrediction(small(), max_segments=5)
  found = np.array([objective.mask_probability(progress) for progress in (0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1)])
  half = 0.5**0.9
  np.testing.assert_allclose(found.T, [[1, 1, half, 0, 0, 0, 0], [1, 1, 1, 1, half, 0, 0]], atol=1e-6)


def test_the_class_map_is_the_best_sum_over_queries():
  draw = np.random.default_rng(0)
  found = random_predictions(draw)
  masks = torch.nn.functional.interpolate(torch.tensor(found.mask_logits), size=(32, 32), mode='bilinear').sigmoid()
  classes = torch.tensor(found.class_logits).softmax(-1)[..., :-1]
  expected = torch.einsum('bqc,bqhw->bchw', classes, masks).argmax(1).numpy()
  np.testing.assert_array_equal(class_map(jax.tree.map(jnp.asarray, found), (32, 32), 8), expected)


def write_panoptic(folder):
  """Sixteen images of a colored square on a ground, in COCO's panoptic format."""
  draw = np.random.default_rng(0)
  (folder / 'images').mkdir()
  (folder / 'panoptic').mkdir()
  images, annotations = [], []
  for number, kind in zip(range(1, 17), itertools.cycle((0, 1))):
    pixels, ids = np.full((32, 32, 3), 120, np.uint8), np.full((32, 32, 3), (7, 0, 0), np.uint8)
    top, left = draw.integers(0, 18, 2)
    box = slice(top, top + 14), slice(left, left + 14)
    pixels[box], ids[box] = ((230, 30, 30), (30, 30, 230))[kind], (9, 1, 0)
    Image.fromarray(pixels).save(folder / 'images' / f'{number}.png')
    Image.fromarray(ids).save(folder / 'panoptic' / f'{number}.png')
    images.append({'id': number, 'file_name': f'{number}.png', 'height': 32, 'width': 32})
    segments = [{'id': 7, 'category_id': 30, 'iscrowd': 0}, {'id': 265, 'category_id': 10 + kind, 'iscrowd': 0}]
    annotations.append({'image_id': number, 'file_name': f'{number}.png', 'segments_info': segments})
  categories = [
    {'id': number, 'name': name, 'isthing': thing}
    for number, name, thing in ((10, 'red', 1), (11, 'blue', 1), (30, 'ground', 0))
  ]
  whole = {'images': images, 'annotations': annotations, 'categories': categories}
  (folder / 'panoptic.json').write_text(json.dumps(whole))


@pytest.fixture(scope='module')
def panoptic(tmp_path_factory):
  folder = tmp_path_factory.mktemp('panoptic')
  write_panoptic(folder)
  return folder


def config(folder, **objective):
  encoder = {'name': 'vit', **ENCODER}
  network = {'name': 'eomt', 'encoder': encoder, 'num_classes': 3, 'queries': 6, 'blocks': 2, 'upscales': 1}
  own = {'name': 'mask_prediction', 'network': network, 'max_segments': 4, 'stuff': (2,), 'num_points': 64}
  source = {'name': 'coco_panoptic', 'annotations': f'{folder}/panoptic.json', 'images': f'{folder}/images'}
  return experiments.make_config(
    own | objective, 'none', data={'source': source, 'image': {'name': 'resize_pad', 'size': 32}}
  )


def test_eomt_learns_from_panoptic_files(panoptic, tmp_path):
  losses, run, model = experiments.trained(config(panoptic, augment=({'name': 'flip'},)), tmp_path)
  experiments.assert_falls(losses)
  assert run.experiment.objective.annealing_steps == experiments.STEPS
  np.testing.assert_array_equal(model.extra['mask_probability'], [0, 0])
  assert model.outputs['segments'].kind == 'map'


def test_classes_of_stuff_have_to_be_those_of_the_data(panoptic, tmp_path):
  with pytest.raises(UserError, match=r'stuff: class 2 \(ground\) is one of stuff in the data; set stuff to \[2\]'):
    trainer.train(config(panoptic, stuff=()), tmp_path / 'none')
  with pytest.raises(UserError, match=r'stuff: class 1 \(blue\) is one of things in the data'):
    trainer.train(config(panoptic, stuff=(1, 2)), tmp_path / 'more')


@pytest.mark.slow
def test_eomt_trains_equally_on_all_meshes_and_in_microbatches(panoptic):
  # Each microbatch draws its own points, so that all pixels are compared here; and its own masked queries while masks
  # end, so that they end after the first step.
  whole = config(panoptic, num_points=0, annealing=(0.0, 1.0), annealing_steps=1)
  more = [('fsdp, microbatches', (*experiments.MESHES['fsdp'], 'train.grad_accum_steps=2'))]
  experiments.assert_equal_losses_on_all_meshes(whole, more=more)


def test_random_points_are_equal_on_all_meshes(panoptic):
  overrides = ('train.steps=3', 'optimizer.schedule.warmup_steps=1')
  data, tensor = (
    experiments.losses_on(config(panoptic), (*experiments.MESHES[name], *overrides))
    for name in ('data', 'data x tensor')
  )
  # Looser than 1e-5: rounding may change which points are the most uncertain.
  np.testing.assert_allclose(data, tensor, rtol=1e-4)


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match='max_segments: 7 segments cannot be matched to 6 queries'):
    MaskPrediction(small(), max_segments=7)
  with pytest.raises(ValueError, match='stuff: 3 is not one of the 3 classes'):
    MaskPrediction(small(), max_segments=5, stuff=(3,))
  with pytest.raises(ValueError, match='blocks: the encoder has 2, not 4'):
    eomt(vit(**ENCODER), 3)
