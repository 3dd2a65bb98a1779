"""Images are shown to an imported model as its publisher's processor shows them, and features agree.

The table of families whose pixels are the processor's: transformers' processors (by their Pillow backend), timm's
evaluation transform and OpenCLIP's, on images that are not square, of 16 bits, and turned by EXIF.
"""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageOps

import fmcv_jax
from fmcv_jax.apps.conversion import import_checkpoint
from fmcv_jax.run import evaluated_as
from tests.pretrained.references import IMAGE, TEXT, published

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
T = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')

DINO = {key: value for key, value in IMAGE.items() if key != 'intermediate_size'}


def noise(height, width, seed=0):
  """Sharp edges and smooth parts: filters that overshoot, and boxes that are off by a pixel, show."""
  rng = np.random.default_rng(seed)
  coarse = Image.fromarray(rng.integers(0, 256, (height // 7, width // 7, 3), np.uint8)).resize((width, height))
  pixels = np.asarray(coarse).copy()
  pixels[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 2, 3) * 255
  return pixels


def encoded(image, form, **options):
  data = io.BytesIO()
  image.save(data, form, **options)
  return data.getvalue()


def turned(pixels):
  exif = Image.Exif()
  exif[0x0112] = 6
  return encoded(Image.fromarray(pixels), 'PNG', exif=exif.tobytes())


def gray16(pixels):
  return encoded(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), 'PNG')


# Encoded image, and the input of the reference processor: upright 8-bit RGB.
IMAGES = {
  'wide': (encoded(Image.fromarray(noise(131, 270)), 'PNG'), noise(131, 270)),
  'tall': (encoded(Image.fromarray(noise(301, 97)), 'PNG'), noise(301, 97)),
  'small': (encoded(Image.fromarray(noise(21, 28)), 'PNG'), noise(21, 28)),
  'turned': (
    turned(noise(131, 270)),
    np.asarray(Image.fromarray(noise(131, 270)).transpose(Image.Transpose.ROTATE_270)),
  ),
  '16 bits': (gray16(noise(131, 270)), np.repeat(noise(131, 270)[..., :1], 3, axis=-1)),
}

SQUARE = {'height': 32, 'width': 32}
PROCESSORS = {
  'ViT': ('ViTImageProcessorPil', {'size': SQUARE}),
  'ViT, old file': ('ViTImageProcessorPil', {'size': 32, 'resample': 3}),
  'DeiT': ('DeiTImageProcessorPil', {'size': {'height': 37, 'width': 37}, 'crop_size': SQUARE}),
  'CLIP': ('CLIPImageProcessorPil', {'size': {'shortest_edge': 32}, 'crop_size': SQUARE}),
  'CLIP, old file': ('CLIPImageProcessorPil', {'size': 32, 'crop_size': 32}),
  'Bit': ('BitImageProcessorPil', {'size': {'shortest_edge': 37}, 'crop_size': SQUARE}),
  'Siglip': ('SiglipImageProcessorPil', {'size': SQUARE, 'resample': 2}),
  'lanczos': ('SiglipImageProcessorPil', {'size': SQUARE, 'resample': 1}),
  'nearest': ('SiglipImageProcessorPil', {'size': SQUARE, 'resample': 0}),
  'box': ('SiglipImageProcessorPil', {'size': SQUARE, 'resample': 4}),
  'ConvNext': ('ConvNextImageProcessorPil', {'size': {'shortest_edge': 32}, 'crop_pct': 0.9}),
  'rescaled': ('ViTImageProcessorPil', {'size': SQUARE, 'rescale_factor': 1 / 127.5}),
  'bytes': (
    'ViTImageProcessorPil',
    {'size': SQUARE, 'do_rescale': False, 'image_mean': [99.0] * 3},
  ),
  'not normalized': ('ViTImageProcessorPil', {'size': SQUARE, 'do_normalize': False}),
}


@pytest.fixture(scope='module')
def dinov2(tmp_path_factory):
  folder = tmp_path_factory.mktemp('dinov2') / 'theirs'
  return folder, published(T.Dinov2Model(T.Dinov2Config(**DINO)), folder).eval()


def agree(model, expected):
  """`expected`: pixel values [B, 3, H, W] of each image -> features, by the reference's network and processor."""
  for name, (data, pixels) in IMAGES.items():
    values, features = expected(Image.fromarray(pixels))
    run = model._run
    shown = evaluated_as(run)(data, np.random.default_rng(0))
    normalize = run.experiment.objective.normalize
    ours = np.asarray(normalize(shown.astype(np.float32) / 255))
    levels = np.abs(ours - values[0].transpose(1, 2, 0)) * 255 * np.asarray(normalize.std)
    assert levels.max() < 1.0, (name, levels.max())
    scale = np.abs(features).max()
    np.testing.assert_allclose(model.encode_image([data])[0] / scale, features[0] / scale, atol=1e-4, err_msg=name)


@pytest.mark.parametrize('name', PROCESSORS)
def test_a_processor_of_transformers(dinov2, tmp_path, name):
  folder, network = dinov2
  kind, options = PROCESSORS[name]
  processor = getattr(T, kind)(**options)
  processor.save_pretrained(folder)
  if 'old file' in name:  # as version 4.20 and before wrote them
    path = folder / 'preprocessor_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
  import_checkpoint(str(folder), str(tmp_path / 'ours'), 'dinov2')

  def expected(image):
    values = processor(image, return_tensors='np')['pixel_values']
    with torch.no_grad():
      return values, network(torch.from_numpy(np.asarray(values, np.float32))).pooler_output.numpy()

  agree(fmcv_jax.load(tmp_path / 'ours', batch=1), expected)


def test_dinov2_is_shown_smaller_images_than_its_positions_are_for(tmp_path):
  network = published(T.Dinov2Model(T.Dinov2Config(**{**DINO, 'image_size': 72})), tmp_path / 'theirs')
  processor = T.BitImageProcessorPil(size={'shortest_edge': 37}, crop_size={'height': 32, 'width': 32})
  processor.save_pretrained(tmp_path / 'theirs')
  import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))

  def expected(image):
    values = processor(image, return_tensors='np')['pixel_values']
    with torch.no_grad():
      return values, network(torch.from_numpy(values)).pooler_output.numpy()

  agree(fmcv_jax.load(tmp_path / 'ours', batch=1), expected)


def test_sides_that_the_patch_does_not_divide(tmp_path):
  """So400m/14 at 384: the last pixels fill no patch, and are left out by the convolution."""
  vision = {**IMAGE, 'image_size': 38}
  config = T.SiglipConfig(vision_config=vision, text_config={**TEXT, 'projection_size': 128})
  network = published(T.SiglipModel(config), tmp_path / 'theirs')
  processor = T.SiglipImageProcessorPil(size={'height': 38, 'width': 38})
  processor.save_pretrained(tmp_path / 'theirs')
  import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))

  def expected(image):
    values = processor(image, return_tensors='np')['pixel_values']
    with torch.no_grad():
      found = network.get_image_features(torch.from_numpy(values))
    found = found if isinstance(found, torch.Tensor) else found.pooler_output
    return values, (found / found.norm(dim=-1, keepdim=True)).numpy()

  agree(fmcv_jax.load(tmp_path / 'ours', batch=1), expected)


TIMM = {
  'center': {'crop_pct': 0.9, 'interpolation': 'bicubic'},
  'squash': {'crop_pct': 0.9, 'crop_mode': 'squash', 'interpolation': 'bilinear'},
  'border': {'crop_pct': 1.0, 'crop_mode': 'border'},
  'border, cut': {'crop_pct': 0.8, 'crop_mode': 'border', 'mean': [0.3, 0.6, 0.9]},
  'one mean': {'mean': [0.25], 'std': [0.5]},
}


@pytest.mark.parametrize('name', TIMM)
def test_an_evaluation_transform_of_timm(tmp_path, name):
  timm = pytest.importorskip('timm', reason='pip install fmcv-jax[parity]')
  sizes = {'img_size': 32, 'patch_size': 8, 'embed_dim': 128, 'depth': 2, 'num_heads': 2, 'num_classes': 0}
  network = timm.create_model('vit_base_patch16_224', **sizes).eval()
  timm.models.save_for_hf(network, tmp_path / 'theirs', safe_serialization=True)
  path = tmp_path / 'theirs' / 'config.json'
  said = json.loads(path.read_text())
  said['pretrained_cfg'].update(TIMM[name])
  path.write_text(json.dumps(said))
  data = timm.data.resolve_data_config({}, pretrained_cfg=said['pretrained_cfg'])
  data['input_size'] = (3, 32, 32)
  transform = timm.data.create_transform(**data)
  import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))

  def expected(image):
    values = transform(image)[None]
    with torch.no_grad():
      return values.numpy(), network(values).numpy()

  agree(fmcv_jax.load(tmp_path / 'ours', batch=1), expected)


@pytest.mark.parametrize('mode', ['shortest', 'squash', 'longest'])
def test_a_preprocess_of_open_clip(tmp_path, mode):
  transforms = pytest.importorskip('open_clip.transform', reason='pip install fmcv-jax[parity]')
  from tests.pretrained import test_hub_open_clip as small

  network = small.published(
    tmp_path / 'theirs', small.CONFIGS['heads'], {'resize_mode': mode, 'interpolation': 'bilinear'}
  )
  path = tmp_path / 'theirs' / 'open_clip_config.json'
  said = json.loads(path.read_text())
  said['preprocess_cfg']['fill_color'] = 77
  path.write_text(json.dumps(said))
  cfg = transforms.PreprocessCfg(**transforms.merge_preprocess_dict({}, said['preprocess_cfg']), size=32)
  transform = transforms.image_transform_v2(cfg, is_train=False)
  import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))

  def expected(image):
    values = transform(image)[None]
    with torch.no_grad():
      return values.numpy(), network.encode_image(values, normalize=True).numpy()

  agree(fmcv_jax.load(tmp_path / 'ours', batch=1), expected)


@pytest.mark.parametrize(('offset', 'top'), [(False, True), (True, True), (True, False), (False, False)])
def test_efficientnet_is_normalized_again_where_its_file_says_so(tmp_path, offset, top):
  sizes = {'width_coefficient': 1.0, 'depth_coefficient': 1.1, 'hidden_dim': 1280, 'image_size': 64}
  network = T.EfficientNetForImageClassification(T.EfficientNetConfig(**sizes, num_labels=7))
  network.save_pretrained(tmp_path / 'theirs')
  options = {'rescale_offset': offset, 'include_top': top, 'rescale_factor': 1 / 127.5 if offset else 1 / 255}
  options |= {'image_mean': [0.485, 0.456, 0.406], 'image_std': [0.229, 0.224, 0.225]}
  processor = T.EfficientNetImageProcessorPil(size={'height': 64, 'width': 64}, **options)
  processor.save_pretrained(tmp_path / 'theirs')
  run = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'ours'))
  data, pixels = IMAGES['wide']
  theirs = processor(Image.fromarray(pixels), return_tensors='np')['pixel_values'][0].transpose(1, 2, 0)
  shown = evaluated_as(run)(data, np.random.default_rng(0))
  ours = run.experiment.objective.normalize(shown.astype(np.float32) / 255)
  np.testing.assert_allclose(ours, theirs, atol=1e-4)


FORMS = {
  'RGB': Image.fromarray(noise(40, 60)),
  'RGBA': Image.fromarray(np.dstack([noise(40, 60), noise(40, 60, 1)[..., 0]])),
  'LA': Image.fromarray(noise(40, 60)).convert('LA'),
  'L': Image.fromarray(noise(40, 60)[..., 0]),
  'I;16': Image.fromarray(noise(40, 60)[..., 0].astype(np.uint16) * 257),
  'P': Image.fromarray(noise(40, 60)).quantize(16),
}


@pytest.mark.parametrize('mode', [*FORMS, 'EXIF'])
def test_an_image_has_the_same_pixels_however_it_is_given(dinov2, tmp_path, mode):
  folder, _ = dinov2
  import_checkpoint(str(folder), str(tmp_path / 'ours'), 'dinov2')
  model = fmcv_jax.load(tmp_path / 'ours', batch=4)
  data = turned(noise(40, 60)) if mode == 'EXIF' else encoded(FORMS[mode], 'PNG')
  (tmp_path / 'x.png').write_bytes(data)
  features = model.encode_image([data, tmp_path / 'x.png', str(tmp_path / 'x.png'), Image.open(io.BytesIO(data))])
  for other in features[1:]:
    np.testing.assert_array_equal(features[0], other)
  if mode == 'EXIF':
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(model.encode_image([upright])[0], features[0])
