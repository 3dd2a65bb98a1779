"""Images and clips in files."""

import json

import numpy as np
from PIL import Image, ImageSequence

from fmcv_jax.inference.image_files import make_grid, save_png

CLIPS = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 5, 3), np.uint8)


def test_a_clip_is_an_animated_png_of_its_frames(tmp_path):
  file = tmp_path / 'clip.png'
  save_png(CLIPS[0], file, {'prompt': 'é'}, frames_per_second=10)
  opened = Image.open(file)
  frames = [np.asarray(frame.convert('RGB')) for frame in ImageSequence.Iterator(opened)]
  np.testing.assert_array_equal(np.stack(frames), CLIPS[0])
  assert opened.info['duration'] == 100
  assert json.loads(opened.text['fmcv']) == {'prompt': 'é'}


def test_an_image_keeps_its_pixels_and_what_is_said_about_it(tmp_path):
  file = tmp_path / 'image.png'
  save_png(CLIPS[0, 0], file, {'seed': 3})
  np.testing.assert_array_equal(np.asarray(Image.open(file)), CLIPS[0, 0])
  assert json.loads(Image.open(file).text['fmcv']) == {'seed': 3}


def test_a_grid_of_clips_has_the_grid_of_each_frame():
  grid = make_grid(CLIPS, columns=2)
  assert grid.shape[0] == CLIPS.shape[1]
  for frame in range(CLIPS.shape[1]):
    np.testing.assert_array_equal(grid[frame], make_grid(CLIPS[:, frame], columns=2))
