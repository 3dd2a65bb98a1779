"""EoMT against transformers, with random weights as it saves them: logits, images, and what its processor makes."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import fmcv_jax
from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.errors import UserError

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')


def reference(folder, *, masked=0.0, size=64, classes=5, **processor):
  """A random model whose parameters are far from their initialization, in evaluation mode; saved with a processor."""
  config = transformers.EomtConfig(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=size,
    patch_size=16,
    num_blocks=2,
    num_queries=7,
    num_labels=classes,
    id2label={number: f'class {number}' for number in range(classes)},
    dice_weight=4.0,
  )
  torch.manual_seed(0)
  model = transformers.EomtForUniversalSegmentation(config).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
    model.attn_mask_probs.fill_(masked)
  model.save_pretrained(folder)
  own = {'size': {'shortest_edge': size, 'longest_edge': size}, 'do_pad': True} | processor
  transformers.EomtImageProcessor(**own).save_pretrained(folder)
  return model


def outputs(model, images):
  with torch.no_grad():
    found = model(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2)))
  return found.class_queries_logits.numpy(), found.masks_queries_logits.numpy()


def test_eomt_predicts_what_transformers_predicts_and_goes_back(tmp_path):
  model = reference(tmp_path / 'theirs')
  images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
  expected = outputs(model, images)
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  params = run.restored_model()[0].params
  assert sum(x.size for x in jax.tree.leaves(params)) == sum(p.numel() for p in model.parameters())
  assert run.experiment.objective.dice_weight == 4.0
  assert run.class_names() == tuple(f'class {number}' for number in range(5))
  (found,) = run.experiment.objective.network.apply({'params': params}, images)
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'transformers')
  again = transformers.EomtForUniversalSegmentation.from_pretrained(tmp_path / 'out').eval()
  assert again.config.id2label[4] == 'class 4'
  for ours, theirs in zip(outputs(again, images), expected, strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_images_are_fitted_and_padded_as_by_its_processor(tmp_path):
  reference(tmp_path / 'theirs', size=240)
  noise = np.random.default_rng(0).integers(0, 256, (30, 45, 3), dtype=np.uint8)
  image = Image.fromarray(noise).resize((900, 600), Image.Resampling.BICUBIC)
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  ours = run.experiment.data.image(np.asarray(image), np.random.default_rng(0)).astype(float)
  processor = transformers.EomtImageProcessor.from_pretrained(tmp_path / 'theirs')
  theirs = np.asarray(processor(images=image, return_tensors='pt')['pixel_values'][0]).transpose(1, 2, 0)
  theirs = (theirs * processor.image_std + processor.image_mean) * 255
  assert ours.shape == theirs.shape == (240, 240, 3)
  np.testing.assert_allclose(ours[160:], theirs[160:], atol=1e-3)  # the padding
  assert np.abs(ours - theirs)[:160].max() <= 1.01  # rounding


def test_an_imported_model_segments_a_file_as_transformers_does(tmp_path):
  model = reference(tmp_path / 'theirs')
  image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
  image.save(tmp_path / 'image.png')
  processor = transformers.EomtImageProcessor.from_pretrained(tmp_path / 'theirs')
  with torch.no_grad():
    found = model(pixel_values=processor(images=image, return_tensors='pt')['pixel_values'])
  (expected,) = processor.post_process_instance_segmentation(found, target_sizes=[(64, 64)], threshold=0.0)
  import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'), overrides=['objective.task=instance'])
  ours = fmcv_jax.load(tmp_path / 'ours').segment(str(tmp_path / 'image.png'), threshold=0.0)
  rows = sorted(expected['segments_info'], key=lambda row: -row['score'])
  assert len(rows) > 3
  np.testing.assert_allclose(ours.scores, [row['score'] for row in rows], atol=1e-4)
  assert ours.names == tuple(f'class {row["label_id"]}' for row in rows)


@pytest.mark.parametrize(
  ('file', 'values', 'message'),
  [
    ('config.json', {'hidden_act': 'relu'}, 'hidden_act is "relu"'),
    ('config.json', {'num_blocks': 1}, 'num_blocks is 1, but this would be computed with 2'),
    ('preprocessor_config.json', {'do_split_image': True}, 'do_split_image is true'),
    ('preprocessor_config.json', {'do_pad': False}, 'do_pad is'),
    ('preprocessor_config.json', {'size': {'shortest_edge': 32, 'longest_edge': 64}}, 'a square'),
  ],
)
def test_what_would_be_computed_otherwise_is_refused_by_field(file, values, message, tmp_path):
  reference(tmp_path / 'theirs')
  path = tmp_path / 'theirs' / file
  path.write_text(json.dumps(json.loads(path.read_text()) | values))
  with pytest.raises(UserError, match=message):
    import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))


def test_weights_whose_attention_is_still_masked_are_refused(tmp_path):
  reference(tmp_path / 'theirs', masked=1.0)
  with pytest.raises(UserError, match='attn_mask_probs is not the table that this network computes'):
    import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
