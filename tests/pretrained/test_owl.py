"""OWL-ViT and OWLv2 against transformers, with random weights as it saves them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')

TEXTS = np.array([[6, 3, 7, 9, 98, 0, 0, 0], [6, 50, 98, 0, 0, 0, 0, 0], [0] * 8], np.int64)


def reference(kind, folder):
  """A random model whose biases and heads are far from their initialization; saved, and in evaluation mode."""
  name = {'owlvit': 'OwlViT', 'owlv2': 'Owlv2'}[kind]
  vision = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1, image_size=64, patch_size=16
  )
  text = dict(vocab_size=99, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=1,
              max_position_embeddings=8, bos_token_id=97, eos_token_id=98, pad_token_id=0)  # fmt: skip
  config = getattr(transformers, f'{name}Config')(vision_config=vision, text_config=text, projection_dim=64)
  torch.manual_seed(0)
  model = getattr(transformers, f'{name}ForObjectDetection')(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  model.save_pretrained(folder)
  return model


def outputs(model, images):
  """logits of the first two texts, boxes and objectness of a model of transformers."""
  repeated = torch.tensor(TEXTS).repeat(len(images), 1)
  with torch.no_grad():
    found = model(
      input_ids=repeated,
      pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)),
      attention_mask=(repeated != 0).long(),
    )
  return [found.logits[..., :2].numpy(), found.pred_boxes.numpy()] + (
    [found.objectness_logits.numpy()] if hasattr(found, 'objectness_logits') else []
  )


def ours(run, images):
  params = run.restored_model()[0].params
  found, texts = run.experiment.objective.network.apply({'params': params}, images, jnp.asarray(TEXTS, jnp.int32))
  out = [found.logits(texts)[..., :2], found.boxes]
  return out + ([found.objectness] if run.experiment.objective.network.has_objectness else [])


@pytest.mark.parametrize('kind', ['owlvit', 'owlv2'])
def test_owl_finds_what_transformers_finds_and_goes_back(kind, tmp_path):
  model = reference(kind, tmp_path / 'theirs')
  images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
  expected = outputs(model, images)
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  assert run.config['objective']['network']['objectness'] == (kind == 'owlv2')
  assert sum(x.size for x in jax.tree.leaves(run.restored_model()[0].params)) == sum(
    p.numel() for p in model.parameters()
  )
  for found, theirs in zip(ours(run, images), expected, strict=True):
    np.testing.assert_allclose(found, theirs, atol=1e-4 * np.abs(theirs).max())
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'transformers')
  again = type(model).from_pretrained(tmp_path / 'out').eval()
  for found, theirs in zip(outputs(again, images), expected, strict=True):
    np.testing.assert_array_equal(found, theirs)


def test_owlv2_images_are_padded_and_resized_as_by_its_processor(tmp_path):
  reference('owlv2', tmp_path / 'theirs')
  processor = transformers.Owlv2ImageProcessor(size={'height': 240, 'width': 240})
  processor.save_pretrained(tmp_path / 'theirs')
  noise = np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8)
  image = Image.fromarray(noise).resize((900, 600), Image.Resampling.BICUBIC)
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  ours = run.experiment.data.image(np.asarray(image), np.random.default_rng(0)).astype(float)
  theirs = processor(images=image, return_tensors='np')['pixel_values'][0].transpose(1, 2, 0)
  theirs = (theirs * processor.image_std + processor.image_mean) * 255
  assert ours.shape == theirs.shape == (240, 240, 3)
  np.testing.assert_allclose(ours[162:], theirs[162:], atol=1e-3)  # the padding
  difference = np.abs(ours - theirs)[:158]
  assert difference.max() < 2
  assert difference.mean() < 0.4
