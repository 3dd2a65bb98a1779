"""Several views of each image: their shapes, their randomness, and independence of the number of processes."""

import numpy as np
import pytest

from fmcv_jax.data.loader import TrainLoader
from fmcv_jax.data.pipeline import MultiCrop, Pipeline
from fmcv_jax.data.sources.image_folder import ImageFolder
from fmcv_jax.data.transforms import RandomResizedCrop, Resize
from fmcv_jax.errors import UserError
from tests import runs
from tests.data.counting import Textured

VIEWS = {
  'global_views': MultiCrop(RandomResizedCrop(8, scale=(0.4, 1.0)), 2),
  'local_views': MultiCrop(RandomResizedCrop(4, scale=(0.05, 0.4)), 3),
}


def take(pipeline, count=2, **options):
  loader = TrainLoader(pipeline, **{'batch': 6, 'seed': 0, 'fields': tuple(VIEWS), **options})
  try:
    return [next(loader) for _ in range(count)]
  finally:
    loader.close()


def test_views_are_stacks_of_different_crops_of_one_image():
  first, second = take(Pipeline(Textured(6), views=VIEWS, shuffle=False))
  assert {name: (x.shape, x.dtype.name) for name, x in first.items()} == {
    'global_views': ((6, 2, 8, 8, 3), 'uint8'),
    'local_views': ((6, 3, 4, 4, 3), 'uint8'),
  }
  for views in first.values():
    assert (views[:, 0] != views[:, 1]).any((1, 2, 3)).all()
  assert (first['local_views'] != second['local_views']).any((1, 2, 3, 4)).all()  # the same images, an epoch later
  whole = {'global_views': MultiCrop(Resize(12), 2)}
  (batch,) = take(Pipeline(Textured(6), views=whole, shuffle=False), 1, fields=('global_views', 'label'))
  np.testing.assert_array_equal(batch['global_views'][:, 0], batch['global_views'][:, 1])
  np.testing.assert_array_equal(batch['global_views'][3, 0], Resize(12)(Textured(6)[3]['image'], None))


def test_two_processes_make_the_views_of_one(tmp_path):
  pipeline = Pipeline(ImageFolder(str(runs.image_folder(tmp_path, count=12))), views=VIEWS)
  whole = take(pipeline)
  parts = [take(pipeline, process_index=index, process_count=2) for index in range(2)]
  for step, batch in enumerate(whole):
    for name, views in batch.items():
      np.testing.assert_array_equal(views, np.concatenate([part[step][name] for part in parts]))


def test_views_that_nobody_described_are_one_clear_line():
  with pytest.raises(UserError, match=r'has no local_views; it provides image.*, and data\.views gives global_views'):
    take(Pipeline(Textured(6), views={'global_views': VIEWS['global_views']}))
  with pytest.raises(ValueError, match=r"views: \['image'\] are fields already"):
    Pipeline(Textured(6), views={'image': VIEWS['global_views']})
