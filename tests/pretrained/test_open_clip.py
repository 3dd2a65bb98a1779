"""Dual encoders that OpenCLIP writes, in the real sizes of their names: in, their embeddings, and out bitwise."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'family'), [('ViT-B-32', 'clip'), ('ViT-B-32-quickgelu', 'clip_openai'), ('ViT-B-16-SigLIP', 'siglip')]
)
def test_embeddings_and_arrays(tmp_path, name, family):
  open_clip = pytest.importorskip('open_clip', reason='pip install open_clip_torch')
  model = open_clip.create_model(name).eval()
  save_file({key: x.numpy() for key, x in model.state_dict().items()}, tmp_path / 'theirs.safetensors')
  run = import_checkpoint(str(tmp_path / 'theirs.safetensors'), str(tmp_path / 'ours'), family)
  subject, _ = run.restored_model()
  rng = np.random.default_rng(0)
  pixels = rng.normal(size=(2, 224, 224, 3)).astype(np.float32)
  length, vocabulary = model.context_length, model.vocab_size
  tokens = rng.integers(1, vocabulary - 1, (2, length))
  tokens[:, -1] = vocabulary - 1
  ours = run.experiment.objective.network.apply({'params': subject.params}, pixels, tokens)
  with torch.no_grad():
    image = model.encode_image(torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()), normalize=True)
    text = model.encode_text(torch.from_numpy(tokens), normalize=True)
  # OpenCLIP computes SigLIP's GELU exactly, not by the tanh with which it was trained.
  atol = 1e-3 if family == 'siglip' else 1e-5
  np.testing.assert_allclose(ours.image, image, atol=atol)
  np.testing.assert_allclose(ours.text, text, atol=atol)
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out.safetensors'), 'open_clip')
  first, again = load_file(tmp_path / 'theirs.safetensors'), load_file(tmp_path / 'out.safetensors')
  assert set(again) == {key for key in first if key != 'attn_mask'}
  for key, x in again.items():
    assert first[key].shape == x.shape
    np.testing.assert_array_equal(first[key], x, err_msg=key)
