import numpy as np
import pytest
from scipy import ndimage

from fmcv_jax.evaluate.reconstruction import psnr, ssim


def test_psnr_of_a_known_error():
  true = np.zeros((2, 12, 12, 3))
  np.testing.assert_allclose(psnr(true, true + np.array([0.1, 0.01]).reshape(2, 1, 1, 1)), [20, 40])


def test_ssim_equals_its_definition():
  generator = np.random.default_rng(0)
  true = generator.uniform(size=(24, 20, 3))
  made = np.clip(true + 0.1 * generator.normal(size=true.shape), 0, 1)

  def blurred(x):
    return ndimage.gaussian_filter(x, 1.5, radius=5)[5:-5, 5:-5]

  values = []
  for c in range(3):
    a, b = true[..., c], made[..., c]
    ma, mb = blurred(a), blurred(b)
    va, vb, vab = blurred(a * a) - ma**2, blurred(b * b) - mb**2, blurred(a * b) - ma * mb
    values.append(((2 * ma * mb + 1e-4) * (2 * vab + 9e-4) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean())
  assert ssim(true, made) == pytest.approx(np.mean(values), abs=1e-5)
  assert ssim(true, true) == pytest.approx(1)
