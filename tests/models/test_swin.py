import jax
import numpy as np
import pytest

from fmcv_jax.models.backbones.swin import relative_index, shift_mask, swin, to_windows
from fmcv_jax.parallel.mesh import MeshShape
from tests.train.tiny import Trainer, batch_of, classification


def test_a_rolled_window_holds_only_neighbors_of_the_image():
  grid, window, shift = (6, 9), 3, 1
  rows, columns = np.indices(grid)
  place = to_windows(np.roll(np.stack([rows, columns], -1), (-shift, -shift), (0, 1))[None], window)[0]
  distance = np.abs(place[:, :, None] - place[:, None]).max(-1)
  np.testing.assert_array_equal(shift_mask(grid, window, shift), distance < window)


def test_the_index_of_relative_places_is_that_of_the_offset():
  index = relative_index(3)
  assert index.shape == (9, 9)
  assert len(np.unique(index)) == 25
  assert index[0, 0] == index[4, 4] == 12
  assert index[1, 0] == index[5, 4] == 13  # the query one column to the right of its key


def test_the_pyramid_halves_its_sides_and_doubles_its_width():
  network = swin('mu', image_size=32)
  images = jax.ShapeDtypeStruct((2, 40, 32, 3), np.float32)
  variables = jax.eval_shape(network.init, jax.random.key(0), images)
  levels = jax.eval_shape(lambda v, x: [y.map() for y in network.apply(v, x, method='pyramid')], variables, images)
  assert [level.shape for level in levels] == [(2, 10, 8, 32), (2, 5, 4, 64)]
  assert network.patch_size == 8


@pytest.mark.parametrize('options', [{'depths': (3, 2)}, {'num_heads': (2,)}, {'variant': 'X'}, {'image_size': 30}])
def test_a_wrong_size_is_a_clear_error(options):
  with pytest.raises(ValueError, match=r'depths|unknown Swin|is not divisible'):
    swin(**{'variant': 'mu', 'image_size': 32, **options})


@pytest.mark.slow
def test_training_on_eight_devices_with_remat_equals_one():
  def learner(**options):
    return classification(swin('mu', image_size=16, patch_size=2, window=4, num_classes=10, drop_path=0.3, **options))

  batches = [batch_of(learner(), seed) for seed in range(3)]
  one = Trainer(learner(), devices=1).run(batches)
  eight = Trainer(learner(remat='full', unroll=2), MeshShape(data=2, fsdp=2, tensor=2)).run(batches)
  np.testing.assert_allclose(eight, one, rtol=2e-5)
  assert len(set(one)) == 3
