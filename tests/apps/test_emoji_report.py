import numpy as np

from fmcv_jax.apps import emoji_report


class FeatureExtractor:
  """Finds two names as near as they have letters in common."""

  def embed_texts(self, texts, batch):
    letters = np.array([[letter in text for letter in 'abcdefgh'] for text in texts], np.float32)
    return letters / np.linalg.norm(letters, axis=1, keepdims=True)


def test_the_hard_negative_is_the_nearest_drawing_of_another_name():
  names = ['ab', 'ab', 'abc', 'abc', 'fgh', 'abd', 'abd', 'a', 'a']
  source = [{'text': name, 'image': np.full((2, 2, 3), index)} for index, name in enumerate(names)]
  drawn = emoji_report._nearest(source, ['ab', 'fg'], FeatureExtractor(), 8).reshape(2, emoji_report.COLUMNS, -1)[
    ..., 0
  ]
  assert set(drawn[0, :4]) == {2, 3, 5, 6}  # not the drawings of the same name
  assert set(drawn[0, 4:]) == {7, 8}
  assert drawn[1, 0] == 4
