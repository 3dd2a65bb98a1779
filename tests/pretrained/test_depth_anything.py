"""Depth Anything against transformers, with random weights as it saves them."""

import json

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import fmcv_jax
from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.errors import UserError

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')


def reference(folder, **changes):
  """A random model with five blocks, saved with its processor, and in evaluation mode."""
  backbone = transformers.Dinov2Config(
    hidden_size=32,
    num_hidden_layers=5,
    num_attention_heads=2,
    image_size=56,
    patch_size=14,
    out_indices=changes.pop('out_indices', [2, 3, 4, 5]),
    reshape_hidden_states=False,
    apply_layernorm=changes.pop('apply_layernorm', True),
  )
  config = transformers.DepthAnythingConfig(
    backbone_config=backbone,
    reassemble_hidden_size=32,
    neck_hidden_sizes=[8, 12, 16, 20],
    fusion_hidden_size=16,
    head_hidden_size=8,
    **changes,
  )
  torch.manual_seed(0)
  model = transformers.DepthAnythingForDepthEstimation(config).eval()
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      parameter.add_((0.3 if name.startswith(('neck', 'head')) else 0.1) * torch.randn_like(parameter))
  model.save_pretrained(folder)
  transformers.DPTImageProcessor(
    size={'height': 56, 'width': 56},
    ensure_multiple_of=14,
    keep_aspect_ratio=True,
    image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225],
  ).save_pretrained(folder)
  return model


def theirs(model, images):
  with torch.no_grad():
    return model(pixel_values=torch.tensor(images.transpose(0, 3, 1, 2))).predicted_depth.numpy()


def ours(run, images):
  apply = jax.jit(run.experiment.objective.network.apply)
  return np.asarray(apply({'params': run.restored_model()[0].params}, images))


def pixels(height, width, seed=0):
  noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
  return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
  'kind',
  [{}, {'depth_estimation_type': 'metric', 'max_depth': 20}, {'out_indices': [1, 2, 4, 5]}],
  ids=['relative', 'metric', 'taps'],
)
@pytest.mark.parametrize('size', [(56, 56), (42, 98)])
def test_depth_equals_that_of_transformers_and_goes_back(kind, size, tmp_path):
  model = reference(tmp_path / 'theirs', **kind)
  images = np.random.default_rng(1).normal(size=(2, *size, 3)).astype(np.float32)
  expected = theirs(model, images)
  assert expected.std() > 0.01 * np.abs(expected).max()
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  assert run.experiment.objective.network.max_depth == (20 if kind.get('max_depth') else None)
  params = run.restored_model()[0].params
  assert sum(x.size for x in jax.tree.leaves(params)) == sum(p.numel() for p in model.parameters())
  np.testing.assert_allclose(ours(run, images), expected, atol=1e-4 * np.abs(expected).max())
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'transformers')
  again = transformers.DepthAnythingForDepthEstimation.from_pretrained(tmp_path / 'out').eval()
  np.testing.assert_array_equal(theirs(again, images), expected)


@pytest.mark.parametrize(
  ('part', 'values', 'message'),
  [
    ('backbone_config', {'out_indices': [2, 2, 3, 4]}, r'out_indices is \[2, 2, 3, 4\].*numbers of blocks from 1 to 5'),
    ('backbone_config', {'apply_layernorm': False}, 'apply_layernorm is false'),
    ('backbone_config', {'model_type': 'dinov3_vit'}, 'model_type is "dinov3_vit"'),
    (None, {'reassemble_factors': [4, 2, 1, 1]}, 'reassemble_factors'),
    (None, {'head_in_index': 0}, 'head_in_index is 0'),
    (None, {'max_depth': 80}, 'max_depth is 80'),
    (None, {'depth_estimation_type': 'ordinal'}, 'depth_estimation_type is "ordinal"'),
    (None, {'backbone': 'vit_small_patch14_dinov2'}, 'backbone is'),
  ],
)
def test_what_the_network_does_not_compute_is_refused(part, values, message, tmp_path):
  reference(tmp_path / 'theirs')
  file = tmp_path / 'theirs' / 'config.json'
  config = json.loads(file.read_text())
  (config if part is None else config[part]).update(values)
  file.write_text(json.dumps(config))
  with pytest.raises(UserError, match=message):
    import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))


def test_the_original_names_are_the_same_network(tmp_path, capsys):
  """The arrays of a file of transformers under the names of the original repositories (its conversion script)."""
  model = reference(tmp_path / 'theirs', depth_estimation_type='metric', max_depth=20)
  arrays = load_file(tmp_path / 'theirs' / 'model.safetensors')
  torch.save(original_names(arrays), tmp_path / 'depth.pth')
  images = np.random.default_rng(1).normal(size=(1, 56, 70, 3)).astype(np.float32)
  run = import_checkpoint(
    str(tmp_path / 'depth.pth'),
    str(tmp_path / 'ours'),
    overrides=[
      'objective.network.max_depth=20',
      'objective.network.encoder.num_heads=2',
      'objective.network.taps=(2,3,4,5)',
    ],
  )
  expected = theirs(model, images)
  np.testing.assert_allclose(ours(run, images), expected, atol=1e-4 * np.abs(expected).max())
  capsys.readouterr()
  import_checkpoint(str(tmp_path / 'depth.pth'), str(tmp_path / 'relative'))
  said = capsys.readouterr().err
  assert 'objective.network.max_depth=None' in said
  assert 'objective.network.taps=' in said


def original_names(arrays):
  found = {}
  for name, x in arrays.items():
    for old, new in (
      ('backbone.embeddings.patch_embeddings.projection', 'pretrained.patch_embed.proj'),
      ('backbone.embeddings.position_embeddings', 'pretrained.pos_embed'),
      ('backbone.embeddings.', 'pretrained.'),
      ('backbone.encoder.layer.', 'pretrained.blocks.'),
      ('backbone.layernorm', 'pretrained.norm'),
      ('attention.output.dense', 'attn.proj'),
      ('layer_scale1.lambda1', 'ls1.gamma'),
      ('layer_scale2.lambda1', 'ls2.gamma'),
      ('head.conv1', 'depth_head.scratch.output_conv1'),
      ('head.conv2', 'depth_head.scratch.output_conv2.0'),
      ('head.conv3', 'depth_head.scratch.output_conv2.2'),
      *((f'neck.convs.{i}', f'depth_head.scratch.layer{i + 1}_rn') for i in range(4)),
      *((f'neck.reassemble_stage.layers.{i}.projection', f'depth_head.projects.{i}') for i in range(4)),
      *((f'neck.reassemble_stage.layers.{i}.resize', f'depth_head.resize_layers.{i}') for i in range(4)),
      *((f'neck.fusion_stage.layers.{i}', f'depth_head.scratch.refinenet{4 - i}') for i in range(4)),
      ('refinenet', 'refinenet'),
      ('residual_layer', 'resConfUnit'),
      ('convolution', 'conv'),
    ):
      name = name.replace(old, new)
    name = name.replace('.projection', '.out_conv') if 'refinenet' in name else name
    found[name] = x.clone()
  for name in [name for name in found if '.attention.attention.query' in name]:
    block, _, kind = name.partition('.attention.attention.query.')
    parts = [found.pop(f'{block}.attention.attention.{part}.{kind}') for part in ('query', 'key', 'value')]
    found[f'{block}.attn.qkv.{kind}'] = torch.cat(parts)
  return found


@pytest.mark.parametrize('size', [(40, 60), (90, 51), (56, 56), (33, 200)])
def test_images_are_resized_as_by_their_processor(size, tmp_path):
  reference(tmp_path / 'theirs')
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  image = pixels(*size)
  found = run.experiment.data.image(np.asarray(image), np.random.default_rng(0)).astype(float)
  processor = transformers.DPTImageProcessorPil.from_pretrained(tmp_path / 'theirs')
  expected = processor(images=image, return_tensors='np')['pixel_values'][0].transpose(1, 2, 0)
  expected = (expected * processor.image_std + processor.image_mean) * 255
  assert found.shape == expected.shape
  np.testing.assert_allclose(found, expected, atol=1e-3)


def test_depth_of_files_equals_that_of_the_pipeline_of_transformers(tmp_path):
  """Preprocessing, network, and the resize to the size of each image, for images of three sizes and one broken file."""
  model = reference(tmp_path / 'theirs')
  import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  processor = transformers.DPTImageProcessorPil.from_pretrained(tmp_path / 'theirs')
  sizes = [(40, 60), (90, 51), (80, 120), (40, 60)]
  files = []
  for number, size in enumerate(sizes):
    pixels(*size, seed=number).save(tmp_path / f'{number}.png')
    files.append(str(tmp_path / f'{number}.png'))
  (tmp_path / 'broken.png').write_bytes((tmp_path / '0.png').read_bytes()[:60])
  found = fmcv_jax.load(tmp_path / 'ours', unreadable='nan').depth([files[0], tmp_path / 'broken.png', *files[1:]])
  assert found.pop(1) is None
  for file, size, depth in zip(files, sizes, found, strict=True):
    inputs = processor(images=Image.open(file), return_tensors='pt')
    with torch.no_grad():
      outputs = model(**inputs)
    expected = processor.post_process_depth_estimation(outputs, [size])[0]['predicted_depth'].numpy()
    assert depth.shape == size
    np.testing.assert_allclose(depth, expected, atol=1e-4 * np.abs(expected).max())
  with pytest.raises(UserError, match=r'images: .*broken.png cannot be read'):
    fmcv_jax.load(tmp_path / 'ours').depth([tmp_path / 'broken.png'])
  one = fmcv_jax.load(tmp_path / 'ours').depth(files[0])
  np.testing.assert_allclose(one, found[0], rtol=1e-5, atol=1e-5)
