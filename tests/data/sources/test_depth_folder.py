import numpy as np
import pytest
from PIL import Image

from fmcv_jax.data.loader import TrainLoader
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.data.sources.depth_folder import DepthFolder
from fmcv_jax.data.transforms import Resize
from fmcv_jax.errors import UserError

DEPTH = np.array([[1000, 0, 65535], [250, 2, 3]], np.uint16)


@pytest.fixture
def folders(tmp_path):
  images, depths = tmp_path / 'rgb', tmp_path / 'maps'
  for folder in (images / 'a', depths / 'a'):
    folder.mkdir(parents=True)
  for name in ('a/0.jpg', 'a/1.jpg', '2.png'):
    Image.new('RGB', (3, 2), (9, 99, 199)).save(images / name)
  Image.fromarray(DEPTH).save(depths / 'a' / '0.png')
  np.save(depths / 'a' / '1.npy', np.array([[1.5, np.nan, -1], [np.inf, 2, 3]], np.float32))
  np.save(depths / 'other.npy', np.ones((2, 3)))
  return images, depths


def test_maps_are_read_in_meters_and_unknown_pixels_are_zero(folders):
  source = DepthFolder(*map(str, folders), scale=0.001)
  assert [source.key_of(index) for index in range(len(source))] == ['a/0.jpg', 'a/1.jpg']
  np.testing.assert_allclose(source[0]['depth'], DEPTH / 1000, rtol=1e-6)
  assert source[0]['depth'].dtype == np.float32
  meters = DepthFolder(*map(str, folders), scale=1.0)
  np.testing.assert_array_equal(meters[1]['depth'], [[1.5, 0, 0], [0, 2, 3]])
  said = '\n'.join(source.account().lines())
  assert 'images without a map of depth: 1 (2.png)' in said
  assert 'maps of depth without an image: 1 (other.npy)' in said


def test_a_resize_takes_the_nearest_depth(folders):
  pipeline = Pipeline(DepthFolder(*map(str, folders), scale=1.0), Resize((4, 6)), shuffle=False)
  batch = next(TrainLoader(pipeline, batch=2, seed=0, fields=('image', 'depth')))
  np.testing.assert_array_equal(batch['depth'][0], DEPTH.repeat(2, 0).repeat(2, 1))


def test_maps_of_other_kinds_are_bad_records(folders):
  images, depths = folders
  source = DepthFolder(str(images), str(depths), scale=1.0)
  len(source)
  Image.new('L', (3, 2)).save(depths / 'a' / '0.png')
  with pytest.raises(BadRecord, match=r'a/0.png is a PNG of mode L; a map of depth is gray, of 16 bits'):
    source[0]
  np.save(depths / 'a' / '1.npy', np.ones((2, 3, 3)))
  with pytest.raises(BadRecord, match=r'a/1.npy float64 \[2, 3, 3\] is not numbers'):
    source[1]


def test_folders_that_do_not_belong_together_are_refused(folders, tmp_path):
  images, depths = folders
  with pytest.raises(UserError, match='depths: no folder'):
    len(DepthFolder(str(images), str(tmp_path / 'none'), scale=1.0))
  (images / '2.png').unlink()
  with pytest.raises(UserError, match=r'none of the 2 images in .* has a map'):
    len(DepthFolder(str(images), str(images), scale=1.0))
  np.save(depths / 'a' / '0.npy', np.ones((2, 3)))
  with pytest.raises(UserError, match=r'has both a/0\.(npy and a/0\.png|png and a/0\.npy); remove one'):
    len(DepthFolder(str(images), str(depths), scale=1.0))
