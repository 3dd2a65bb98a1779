"""Outputs in files: each kind is read back with the library that reads such files, and has the values written."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageSequence

from fmcv_jax.data.tokenizers import ClipBpe
from fmcv_jax.errors import UserError
from fmcv_jax.inference.output_files import write_output

RNG = np.random.default_rng(0)
FILES = ('a/0.jpg', 'b/0.jpg', 'b/broken.jpg')


def written(folder, kind, values, **options):
  """Rows of the JSON lines of two values and of an input that cannot be read."""
  records = zip(FILES, (*values, None), strict=True)
  assert write_output('out', kind, records, folder, **options) == (2, 1)
  rows = [json.loads(line) for line in (folder / 'out.jsonl').read_text().splitlines()]
  assert [row.pop('file') for row in rows] == list(FILES)
  assert rows[2] == {'error': 'the image cannot be read'}
  return rows[:2]


def pixels(path):
  return np.asarray(Image.open(path))


def test_an_image_is_a_png_whose_text_names_its_file(tmp_path):
  images = RNG.integers(0, 256, (2, 6, 5, 3), np.uint8)
  rows = written(tmp_path, 'image', images, about={'model': 'runs/x'})
  assert [row['output'] for row in rows] == ['out/000000.png', 'out/000001.png']
  for row, image, file in zip(rows, images, FILES):
    np.testing.assert_array_equal(pixels(tmp_path / row['output']), image)
    assert json.loads(Image.open(tmp_path / row['output']).text['fmcv']) == {'file': file, 'model': 'runs/x'}


def test_an_image_in_0_to_1_is_rounded_to_the_nearest_of_256_levels(tmp_path):
  levels = RNG.integers(0, 256, (2, 4, 4, 3))
  off_by_rounding = (levels + RNG.uniform(-0.4, 0.4, levels.shape)).clip(0, 255) / 255
  [row, _] = written(tmp_path, 'image', jnp.asarray(off_by_rounding, jnp.float32))
  np.testing.assert_array_equal(pixels(tmp_path / row['output']), levels[0])


@pytest.mark.parametrize('value', [-0.5, 1.5, np.nan])
def test_values_that_are_not_an_image_are_refused(tmp_path, value):
  with pytest.raises(UserError, match=r'out: values from .* are not an image'):
    write_output('out', 'image', [('a', np.full((4, 4, 3), value, np.float32))], tmp_path)


def test_several_images_of_one_input_stand_next_to_each_other(tmp_path):
  pairs = RNG.integers(0, 256, (2, 2, 4, 5, 3), np.uint8)  # as the input and its reconstruction
  [row, _] = written(tmp_path, 'image', pairs)
  together = pixels(tmp_path / row['output'])
  np.testing.assert_array_equal(together[1:5, 1:6], pairs[0, 0])
  np.testing.assert_array_equal(together[1:5, 7:12], pairs[0, 1])


def test_a_video_is_an_animated_png_at_its_frame_rate(tmp_path):
  clips = RNG.integers(0, 256, (2, 3, 4, 5, 3), np.uint8)
  [row, _] = written(tmp_path, 'video', clips, frames_per_second=4.0)
  opened = Image.open(tmp_path / row['output'])
  frames = [np.asarray(frame.convert('RGB')) for frame in ImageSequence.Iterator(opened)]
  np.testing.assert_array_equal(np.stack(frames), clips[0])
  assert opened.info['duration'] == 250
  assert json.loads(opened.text['fmcv'])['frames_per_second'] == 4.0


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_a_map_of_classes_is_a_gray_png_without_loss(tmp_path, dtype):
  maps = RNG.integers(0, np.iinfo(dtype).max + 1, (2, 6, 5)).astype(dtype)
  [row, _] = written(tmp_path, 'map', maps)
  np.testing.assert_array_equal(pixels(tmp_path / row['output']), maps[0])


def test_a_mask_is_a_black_and_white_png(tmp_path):
  masks = RNG.random((2, 6, 5)) < 0.5
  [row, _] = written(tmp_path, 'masks', masks)
  np.testing.assert_array_equal(pixels(tmp_path / row['output']), masks[0] * 255)


@pytest.mark.parametrize('dtype', [np.float32, np.float16, np.int32])
def test_other_maps_keep_their_dtype_in_a_file_of_their_own(tmp_path, dtype):
  maps = (100 * RNG.normal(size=(2, 3, 6, 5))).astype(dtype)
  [row, _] = written(tmp_path, 'map', maps)
  assert row['output'] == 'out/000000.npz'
  found = np.load(tmp_path / row['output'])['out']
  assert found.dtype == dtype
  np.testing.assert_array_equal(found, maps[0])


def test_embeddings_are_rows_of_one_npz_with_their_files(tmp_path):
  embedded = RNG.normal(size=(2, 4)).astype(np.float32)
  assert written(tmp_path, 'embedding', embedded) == [{'row': 0}, {'row': 1}]
  found = np.load(tmp_path / 'out.npz')
  assert found['files'].tolist() == ['a/0.jpg', 'b/0.jpg']
  np.testing.assert_array_equal(found['out'], embedded)


def test_a_tree_has_an_array_per_leaf_and_bfloat16_becomes_float32(tmp_path):
  values = [{'x': np.asarray(jnp.full(3, 1.5, jnp.bfloat16)), 'y': {'z': np.int64(index)}} for index in range(2)]
  written(tmp_path, 'array', values)
  found = np.load(tmp_path / 'out.npz')
  assert found['out/x'].dtype == np.float32
  np.testing.assert_array_equal(found['out/x'], np.full((2, 3), 1.5))
  assert found['out/y/z'].dtype == np.int64
  assert found['out/y/z'].tolist() == [0, 1]


def test_logits_are_named_largest_first(tmp_path):
  logits = np.array([[1, 3, 2], [0, -1, np.inf]], np.float32)
  rows = written(tmp_path, 'logits', logits, class_names=('crane', 'cat', 'crane'))  # as in ImageNet
  assert [(c['index'], c['name'], c['logit']) for c in rows[0]['classes']] == [
    (1, 'cat', 3.0), (2, 'crane', 2.0), (0, 'crane', 1.0),
  ]  # fmt: skip
  assert [c['logit'] for c in rows[1]['classes']] == [None, 0.0, -1.0]  # JSON has no infinity
  with pytest.raises(UserError, match=r'out: \[3\] logits of one image, but 2 class names'):
    write_output('out', 'logits', [('a', logits[0])], tmp_path / 'other', class_names=('a', 'b'))


def test_logits_without_names_are_rows_of_one_npz(tmp_path):
  logits = RNG.normal(size=(2, 3)).astype(np.float32)
  written(tmp_path, 'logits', logits)
  np.testing.assert_array_equal(np.load(tmp_path / 'out.npz')['out'], logits)


def test_boxes_have_their_classes_names_and_the_size_they_are_in(tmp_path):
  boxes = np.array([[[0, 1, 2, 3], [4, 5, 6, 7]]] * 2, np.float32)
  values = [{'boxes': b, 'classes': np.array([1, -1]), 'scores': np.array([0.5, 0.25], np.float32)} for b in boxes]
  [row, _] = written(tmp_path, 'boxes', values, class_names=('a', 'b'), input_size=(8, 16))
  assert row == {
    'boxes': [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]],
    'classes': [1, -1],
    'scores': [0.5, 0.25],
    'names': ['b', None],
    'input_width': 16,
    'input_height': 8,
  }


def test_generated_tokens_are_decoded_up_to_their_end(tmp_path):
  tokenizer = ClipBpe(8)
  generated = tokenizer(['a red heart', 'a dog'])[:, 1:]  # without the start, as a language model gives them
  rows = written(tmp_path, 'tokens', generated, tokenizer=tokenizer)
  assert [row['text'] for row in rows] == ['a red heart', 'a dog']
  assert rows[1]['tokens'] == generated[1].tolist()
  assert written(tmp_path / 'ids', 'tokens', generated) == [{'tokens': row.tolist()} for row in generated]


@pytest.mark.parametrize('there', ['out.jsonl', 'out.npz', 'out'])
def test_nothing_is_overwritten(tmp_path, there):
  (tmp_path / there).mkdir()
  with pytest.raises(UserError, match=f'{there}: exists and would be overwritten'):
    write_output('out', 'embedding', [('a', np.zeros(3))], tmp_path)
  assert [path.name for path in tmp_path.iterdir()] == [there]
