"""Segment Anything against transformers, with random weights as it saves them."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import fmcv_jax
from fmcv_jax.__main__ import main
from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.errors import UserError
from fmcv_jax.models.dense.sam import make_prompts

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')

SIDE = 128
POINTS = np.array([[[[20.0, 30.5], [90.0, 7.0]], [[64.0, 64.0], [127.0, 0.0]]]])  # [1, 2, 2, 2]
LABELS = np.array([[[1, 0], [1, 1]]])
BOXES = np.array([[[10.0, 20.0, 80.5, 100.0], [0.0, 0.0, 127.0, 127.0]]])
PROMPTS = {
  'points': {'input_points': POINTS, 'input_labels': LABELS},
  'boxes': {'input_boxes': BOXES},
  'both': {'input_points': POINTS, 'input_labels': LABELS, 'input_boxes': BOXES},
  'none': {},
}


def reference(folder, **vision):
  """A random model in evaluation mode, with 8 x 8 patches in windows of 3 x 3; saved with its processor."""
  config = transformers.SamConfig(
    vision_config={
      **dict(
        hidden_size=32, num_hidden_layers=12, num_attention_heads=2, image_size=SIDE, patch_size=16, window_size=3
      ),
      **dict(mlp_dim=64, output_channels=32, num_pos_feats=16),
      **vision,
    },
    prompt_encoder_config=dict(hidden_size=32, image_size=SIDE, patch_size=16),
    mask_decoder_config=dict(hidden_size=32, mlp_dim=64, iou_head_hidden_dim=24),
  )
  torch.manual_seed(0)
  model = transformers.SamModel(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      if not name.endswith('positional_embedding'):
        parameter.add_(0.2 * torch.randn_like(parameter))
  model.save_pretrained(folder)
  size, pad = {'longest_edge': SIDE}, {'height': SIDE, 'width': SIDE}
  transformers.SamImageProcessorPil(size=size, pad_size=pad).save_pretrained(folder)
  return model


def theirs(model, images, prompts):
  """logits and IoU of all four masks."""
  inputs = {
    name: torch.tensor(x, dtype=torch.long if 'labels' in name else torch.float32) for name, x in prompts.items()
  }
  with torch.no_grad():
    outputs = [
      model(torch.tensor(images.transpose(0, 3, 1, 2)), **inputs, multimask_output=several) for several in (False, True)
    ]
  return [np.concatenate([getattr(x, name).numpy() for x in outputs], 2) for name in ('pred_masks', 'iou_scores')]


def ours(run, images, prompts):
  named = {name.removeprefix('input_'): x.astype(np.float32) for name, x in prompts.items()}
  found = jax.jit(run.experiment.objective.network.apply)(
    {'params': run.restored_model()[0].params}, images, make_prompts(**named)
  )
  return [found.logits, found.iou]


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  folder = tmp_path_factory.mktemp('sam')
  model = reference(folder / 'theirs')
  return model, import_checkpoint(str(folder / 'theirs'), str(folder / 'ours')), folder


@pytest.fixture(scope='module')
def loaded(imported):
  return fmcv_jax.load(imported[2] / 'ours')


@pytest.mark.parametrize('kind', PROMPTS)
def test_masks_and_scores_equal_those_of_transformers(kind, imported):
  model, run, _ = imported
  images = np.random.default_rng(0).normal(size=(1, SIDE, SIDE, 3)).astype(np.float32)
  for found, expected in zip(ours(run, images, PROMPTS[kind]), theirs(model, images, PROMPTS[kind]), strict=True):
    assert expected.std() > 0.01 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_an_export_is_read_back_with_the_same_outputs(imported, tmp_path):
  model, _, folder = imported
  export_checkpoint(str(folder / 'ours'), str(tmp_path / 'out'), 'transformers')
  again = transformers.SamModel.from_pretrained(tmp_path / 'out').eval()
  images = np.random.default_rng(0).normal(size=(1, SIDE, SIDE, 3)).astype(np.float32)
  for x, expected in zip(theirs(again, images, PROMPTS['both']), theirs(model, images, PROMPTS['both']), strict=True):
    np.testing.assert_array_equal(x, expected)


def test_the_network_has_as_many_parameters(imported):
  model, run, _ = imported
  count = sum(x.size for x in jax.tree.leaves(run.restored_model()[0].params))
  assert count == sum(p.numel() for p in model.parameters())


def test_an_earlier_mask_is_embedded_as_by_transformers(imported):
  model, run, _ = imported
  mask = np.random.default_rng(1).normal(size=(1, 1, SIDE // 4, SIDE // 4)).astype(np.float32)
  with torch.no_grad():
    expected = model.prompt_encoder(None, None, None, torch.tensor(mask))[1].numpy().transpose(0, 2, 3, 1)
  network = run.experiment.objective.network
  found = network.apply(
    {'params': run.restored_model()[0].params},
    mask,
    method=lambda module, masks: module.prompt(make_prompts()._replace(masks=masks))[1],
  )
  np.testing.assert_allclose(found[:, 0], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize('size', [(60, 100), (150, 90), (128, 128)])
@pytest.mark.parametrize('kind', ['points', 'boxes'])
def test_masks_of_images_equal_those_of_the_processor_of_transformers(size, kind, imported, loaded):
  """Resizing, padding, and the way back to the size of the image; up to pixels whose logit is near 0, as the resizes of
  images differ by less than two levels."""
  model, _, folder = imported
  noise = np.random.default_rng(2).integers(0, 256, (6, 8, 3), dtype=np.uint8)
  image = Image.fromarray(noise).resize(size[::-1], Image.Resampling.BICUBIC)
  processor = transformers.SamProcessor.from_pretrained(folder / 'theirs')
  named = {
    'points': {'input_points': [[[30, 20], [50, 40]]], 'input_labels': [[1, 0]]},
    'boxes': {'input_boxes': [[[10, 5, 60, 50]]]},
  }
  inputs = processor(images=image, return_tensors='pt', **named[kind])
  with torch.no_grad():
    outputs = model(
      **{name: x.float() if x.dtype == torch.float64 else x for name, x in inputs.items() if 'sizes' not in name}
    )
  pad = {'height': SIDE, 'width': SIDE}
  sizes = inputs['original_sizes'], inputs['reshaped_input_sizes']
  logits = processor.image_processor.post_process_masks(outputs.pred_masks, *sizes, binarize=False, pad_size=pad)[0]
  expected, scores = logits.numpy()[0], outputs.iou_scores.numpy()[0, 0]
  own = {'points': {'points': [[30, 20], [50, 40]], 'point_labels': [1, 0]}, 'boxes': {'boxes': [10, 5, 60, 50]}}
  found = loaded.segment(image, **own[kind])
  order = np.argsort(-scores, kind='stable')
  np.testing.assert_allclose([x.score for x in found], scores[order], atol=0.02 * np.abs(scores).max())
  for mask, at in zip(found, order, strict=True):
    assert mask.mask.shape == size
    sure = np.abs(expected[at]) > 0.05 * np.abs(expected[at]).max()
    np.testing.assert_array_equal(mask.mask[sure], (expected[at] > 0)[sure])
    assert sure.mean() > 0.5


def test_an_image_is_encoded_once_for_several_prompts(loaded):
  image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
  encoded = loaded.encode_for_prompts(image)
  for prompt in ({'points': [[30, 20]]}, {'boxes': [10, 5, 60, 50]}):
    again, whole = encoded.segment(**prompt), loaded.segment(image, **prompt)
    assert [x.score for x in again] == [x.score for x in whole]
    assert all((a.mask == b.mask).all() for a, b in zip(again, whole, strict=True))
  both = encoded.segment(points=[[[30, 20]], [[80, 50]]])
  assert len(both) == 2
  assert [x.score for x in both[0]] == pytest.approx([x.score for x in encoded.segment(points=[[30, 20]])], abs=1e-5)
  assert len(encoded.segment(points=[[30, 20]], multimask=False)) == 1


@pytest.mark.parametrize(
  ('prompt', 'message'),
  [
    ({}, 'points, boxes: give at least a point'),
    ({'points': [[30, 20]], 'task': 'semantic'}, 'task, threshold: a promptable model has neither'),
    ({'points': [[130, 20]]}, 'a point lies outside of the image of 100 x 60 pixels'),
    ({'points': [[20, 30]], 'point_labels': [2]}, 'point_labels: expected 0 or 1'),
    ({'points': [20, 30]}, r'points: expected \[N, 2\]'),
    ({'boxes': [60, 5, 10, 50]}, 'boxes: a right or bottom edge'),
    ({'boxes': [10, 5, 60, 70]}, 'boxes: a box reaches out of the image'),
    ({'points': [[[1, 2]], [[3, 4]]], 'boxes': [[1, 2, 3, 4]]}, 'boxes: 1 boxes, but points of 2 objects'),
  ],
)
def test_prompts_that_mean_nothing_are_refused(prompt, message, loaded):
  image = np.zeros((60, 100, 3), np.uint8)
  with pytest.raises(UserError, match=message):
    loaded.segment(image, **prompt)


def test_the_original_names_are_the_same_network(imported, tmp_path):
  """The arrays of a file of transformers under the names of the original repository (its conversion script)."""
  model, _, folder = imported
  found = {}
  for name, x in load_file(folder / 'theirs' / 'model.safetensors').items():
    if name == 'shared_image_embedding.positional_embedding':
      name = 'prompt_encoder.pe_layer.positional_encoding_gaussian_matrix'
    for old, new in (
      ('prompt_encoder.mask_embed.conv1', 'prompt_encoder.mask_downscaling.0'),
      ('prompt_encoder.mask_embed.layer_norm1', 'prompt_encoder.mask_downscaling.1'),
      ('prompt_encoder.mask_embed.conv2', 'prompt_encoder.mask_downscaling.3'),
      ('prompt_encoder.mask_embed.layer_norm2', 'prompt_encoder.mask_downscaling.4'),
      ('prompt_encoder.mask_embed.conv3', 'prompt_encoder.mask_downscaling.6'),
      ('upscale_conv1', 'output_upscaling.0'),
      ('upscale_layer_norm', 'output_upscaling.1'),
      ('upscale_conv2', 'output_upscaling.3'),
      ('prompt_encoder.point_embed.', 'prompt_encoder.point_embeddings.'),
      ('vision_encoder.layers', 'image_encoder.blocks'),
      ('vision_encoder', 'image_encoder'),
      ('neck.conv1', 'neck.0'),
      ('neck.layer_norm1', 'neck.1'),
      ('neck.conv2', 'neck.2'),
      ('neck.layer_norm2', 'neck.3'),
      ('patch_embed.projection', 'patch_embed.proj'),
      ('layer_norm_final_attn', 'norm_final_attn'),
      ('.layer_norm', '.norm'),
    ):
      name = name.replace(old, new)
    if 'hypernetworks' in name or 'iou_prediction_head' in name:
      name = name.replace('layers.0', 'layers.1').replace('proj_in', 'layers.0').replace('proj_out', 'layers.2')
    found[name] = x.clone()
  found['pixel_mean'] = torch.zeros(3, 1, 1)
  torch.save(found, tmp_path / 'sam.pth')
  overrides = ['objective.network.decoder_eps=1e-6']  # of transformers, whose weights they are
  run = import_checkpoint(str(tmp_path / 'sam.pth'), str(tmp_path / 'ours'), overrides=overrides)
  images = np.random.default_rng(0).normal(size=(1, SIDE, SIDE, 3)).astype(np.float32)
  for x, expected in zip(ours(run, images, PROMPTS['both']), theirs(model, images, PROMPTS['both']), strict=True):
    np.testing.assert_allclose(x, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
  ('part', 'values', 'message'),
  [
    ('vision_config', {'global_attn_indexes': [1, 5, 8, 11]}, r'global_attn_indexes is \[1, 5, 8, 11\]'),
    ('vision_config', {'use_rel_pos': False}, 'use_rel_pos is false'),
    ('vision_config', {'window_size': 4}, 'window_size is 4'),
    ('mask_decoder_config', {'num_multimask_outputs': 4}, 'num_multimask_outputs is 4'),
    ('prompt_encoder_config', {'hidden_act': 'relu'}, 'hidden_act is "relu"'),
  ],
)
def test_what_the_network_does_not_compute_is_refused(part, values, message, imported, tmp_path):
  folder = imported[2]
  for file in (folder / 'theirs').iterdir():
    (tmp_path / file.name).symlink_to(file)
  config = json.loads((folder / 'theirs' / 'config.json').read_text())
  config[part] |= values
  (tmp_path / 'config.json').unlink()
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match=message):
    import_checkpoint(str(tmp_path), str(tmp_path / 'ours'))


def test_the_command_writes_masks_and_names_what_it_cannot_read(imported, tmp_path, capsys):
  image = np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8)
  Image.fromarray(image).save(tmp_path / 'photo.png')
  (tmp_path / 'broken.jpg').write_bytes(b'nothing')
  files, to = [str(tmp_path / 'photo.png'), str(tmp_path / 'broken.jpg')], tmp_path / 'out'
  args = ['--model', str(imported[2] / 'ours'), '--points', '30,20', '50,40,0', '--to', str(to)]
  assert main(['segment', *files, *args]) == 0
  captured = capsys.readouterr()
  assert '1 of 2 images cannot be read and are left out' in captured.err
  rows = [json.loads(line) for line in (to / 'masks.jsonl').read_text().splitlines()]
  expected = fmcv_jax.load(imported[2] / 'ours').segment(image, points=[[30, 20], [50, 40]], point_labels=[1, 0])
  assert [row['score'] for row in rows] == [mask.score for mask in expected]
  for row, mask in zip(rows, expected, strict=True):
    np.testing.assert_array_equal(np.asarray(Image.open(to / row['mask'])), mask.mask * np.uint8(255))
    assert f'{files[0]}  {row["score"]:.3f}  {row["pixels"]} pixels' in captured.out
  assert Image.open(to / '00000_photo.png').size == (100, 60)
  for wrong, message in (
    (['--points', '30'], "--points: '30' is not 2 or 3 numbers"),
    (['--box', '1,2,3,4', '--to', str(to)], 'masks.jsonl exists there'),
    (['--box', '1,2,3,4', '--task', 'semantic'], '--task and --threshold: not with --points or --box'),
    (['--single'], '--single: needs --points or a --box'),
  ):
    assert main(['segment', *files, '--model', str(imported[2] / 'ours'), *wrong]) == 2
    assert message in capsys.readouterr().err
