"""CLIPScore and RefCLIPScore of captions (Hessel et al. 2021), from unit embeddings of any image-text model."""

from collections.abc import Sequence

import numpy as np

WEIGHT = 2.5  # w, section 3 there


def clip_score(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
  """2.5 * max(cosine, 0) of unit embeddings [N, E] of images and of captions: float [N], from 0 to 2.5."""
  return WEIGHT * np.maximum((images * captions).sum(axis=1), 0)


def ref_clip_score(images: np.ndarray, captions: np.ndarray, references: Sequence[np.ndarray]) -> np.ndarray:
  """Harmonic mean of `clip_score` and the largest cosine of caption and references, at least 0: float [N].

  references  unit embeddings [R, E] of the references of each image; R may differ. Values are from 0 to 10 / 7.
  """
  score = clip_score(images, captions)
  nearest = [max(float((own @ caption).max()), 0.0) for caption, own in zip(captions, references, strict=True)]
  total = score + nearest
  return np.divide(2 * score * nearest, total, out=np.zeros_like(total), where=total > 0)
