"""Image processors: preprocessor_config.json of transformers, timm's pretrained_cfg, OpenCLIP's preprocess_cfg.

All become a transform of ours that gives the same pixels, and a mean and deviation of pixels from 0 to 1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fmcv_jax.dataset_statistics import CLIP, HALF, IMAGENET
from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.pretrained import hub_depth_anything, hub_sam
from fmcv_jax.pretrained.eomt import image_config
from fmcv_jax.pretrained.hub_file import HubFile, one_of
from fmcv_jax.pretrained.owl import BLACK

_FILTERS = one_of(dict(enumerate(('nearest', 'lanczos', 'bilinear', 'bicubic', 'box', 'hamming'))))  # Pillow's numbers
_IGNORED = (
  r'.*processor.*|feature_extractor_type|use_fast|data_format|input_data_format|return_tensors|device|_.*',
  r'disable_grouping|image_seq_length|auto_map|default_to_square|use_square_size|size_divisor|pad_size|do_reduce_labels|num_channels',
)
# Keys of timm that do not affect preprocessing: origin of the weights, training and fine-tuning options.
_OF_TIMM = (
  r'url|file|hf_hub_.*|source|architecture|tag|custom_load|(test|min)_.*|fixed_input_size|num_classes|label_.*|pool_size',
  r'first_conv|classifier|license|description|origin_url|paper_.*|notes|num_features|global_pool|model_args',
)


class _Defaults(NamedTuple):
  """Defaults of a transformers image processor for keys missing in its file; `square`: an integer `size` is square."""

  size: dict[str, int]
  crop: int | None = None
  resample: int = 3
  statistics: Mapping[str, Sequence[float]] = IMAGENET
  square: bool = True
  rgb: bool = False


def _square(side: int) -> dict[str, int]:
  return {'height': side, 'width': side}


_PROCESSORS = {
  'ViT': _Defaults(_square(224), None, 2, HALF),
  'DeiT': _Defaults(_square(256), 224, 3, HALF),
  'Siglip': _Defaults(_square(224), None, 3, HALF),
  'CLIP': _Defaults({'shortest_edge': 224}, 224, 3, CLIP, square=False),
  'Bit': _Defaults({'shortest_edge': 224}, 224, 3, CLIP, square=False),
  'ConvNext': _Defaults({'shortest_edge': 384}, None, 3, IMAGENET, square=False),
  'OwlViT': _Defaults(_square(768), None, 3, CLIP),
  'Owlv2': _Defaults(_square(960), None, 2, CLIP),
  'Eomt': _Defaults({'shortest_edge': 640, 'longest_edge': 640}, None, 2, IMAGENET),
  'EfficientNet': _Defaults(_square(346), None, 3, HALF),
  'Sam': _Defaults({'longest_edge': 1024}, None, 2, IMAGENET),
  'DPT': _Defaults(_square(384), None, 3, HALF),
}
_SPELLINGS = ('FeatureExtractor', 'ImageProcessorFast', 'ImageProcessorPil', 'ImageProcessor')


def transformers(file: HubFile, config: dict[str, Any]) -> None:
  """Reads preprocessor_config.json; UserError for an unknown or unsupported processor."""
  said = str(file.get('image_processor_type') or file.get('feature_extractor_type') or _usual(config))
  name = next((said.removesuffix(end) for end in _SPELLINGS if said.endswith(end)), said)
  if name not in _PROCESSORS:
    raise UserError(f'{file.shown}: image_processor_type is {said!r}; {did_you_mean(name, _PROCESSORS)}')
  usual = _PROCESSORS[name]
  if name == 'Owlv2':
    return _owlv2(file, usual)
  if name == 'Eomt':
    return _eomt(file, usual)
  if name == 'Sam':
    if config['objective']['network']['name'] != 'sam':
      raise file.refusal('image_processor_type', said, 'images of one size')
    file.set('data.image', hub_sam.images(file, config['objective']['network']['image_size']))
    _normalize(file, name, usual)
    return file.done(_IGNORED)
  for key in ('do_pad', 'do_flip_channel_order', 'do_color_quantize'):
    if file.get(key):
      raise file.refusal(key, True, 'False')
  file.get('do_convert_rgb')
  if not file.get('do_resize', True):
    raise file.refusal('do_resize', False, 'images of one size')
  if name == 'DPT':
    _check_crop(file)
    network = config['objective']['network']
    if network['name'] != 'dpt':
      raise file.refusal('image_processor_type', said, 'images of one size')
    spec = hub_depth_anything.images(file, int(network['encoder']['variant'].partition('/')[2]))
  else:
    spec = {'name': 'pillow_resize', **_geometry(file, name, usual)}
  try:
    spec['interpolation'] = _FILTERS(file.get('resample', usual.resample))
  except ValueError as error:
    raise UserError(f'{file.shown}: resample is {file.get("resample")!r}: {error}') from error
  file.set('data.image', spec)
  _normalize(file, name, usual)
  file.done(_IGNORED)


def _check_crop(file: HubFile) -> None:
  if file.get('do_center_crop'):
    raise file.refusal('do_center_crop', True, 'False')
  file.get('crop_size')  # without a meaning then


def _owlv2(file: HubFile, usual: _Defaults) -> None:
  """Black at the right or bottom up to a square, which is then resized."""
  for key in ('do_pad', 'do_resize'):
    if not file.get(key, True):
      raise file.refusal(key, False, 'True')
  size = file.get('size', usual.size)
  if set(size) != {'height', 'width'} or size['height'] != size['width']:
    raise file.refusal('size', size, 'a square')
  for key in ('do_convert_rgb', 'resample'):
    file.get(key)
  spec = {'name': 'resize_pad', 'size': size['height'], 'fill': BLACK, 'interpolation': 'bilinear'}
  file.set('data.image', spec)
  _normalize(file, 'Owlv2', usual)
  file.done(_IGNORED)


def _eomt(file: HubFile, usual: _Defaults) -> None:
  """Fits into a square, and is black at the right or bottom."""
  if file.get('do_split_image', False):
    raise file.refusal('do_split_image', True, 'whole images, resized and padded')
  for key, default in (('do_resize', True), ('do_pad', False)):
    if not file.get(key, default):
      raise file.refusal(key, False, 'True')
  size = file.get('size', usual.size)
  if set(size) != {'shortest_edge', 'longest_edge'} or len(set(size.values())) > 1:
    raise file.refusal('size', size, 'a square')
  for key in ('do_convert_rgb', 'ignore_index'):
    file.get(key)
  try:
    interpolation = _FILTERS(file.get('resample', usual.resample))
  except ValueError as error:
    raise UserError(f'{file.shown}: resample is {file.get("resample")!r}: {error}') from error
  file.set('data.image', image_config(size['longest_edge'], interpolation))
  _normalize(file, 'Eomt', usual)
  file.done(_IGNORED)


def _usual(config: dict[str, Any]) -> str:
  network = config['objective']['network']
  if network['name'] == 'efficientnet':
    return 'EfficientNetImageProcessor'
  if network['name'] == 'prefix_lm':
    return 'SiglipImageProcessor'
  if network['name'] == 'eomt':
    return 'EomtImageProcessor'
  if network['name'] == 'sam':
    return 'SamImageProcessor'
  if network['name'] == 'dpt':
    return 'DPTImageProcessor'
  if network['name'] == 'owl_detector':
    return 'Owlv2ImageProcessor' if network['objectness'] else 'OwlViTImageProcessor'
  if network['name'] == 'dual_encoder':
    return 'CLIPImageProcessor' if config['objective'].get('loss_name') != 'sigmoid' else 'SiglipImageProcessor'
  return 'ViTImageProcessor'


def _geometry(file: HubFile, name: str, usual: _Defaults) -> dict[str, Any]:
  size = file.get('size', usual.size)
  if isinstance(size, int):
    size = _square(size) if usual.square else {'shortest_edge': size}
  if isinstance(size, (list, tuple)):
    size = dict(zip(('height', 'width'), size, strict=True))
  size = {key: value for key, value in size.items() if value is not None}
  if name == 'ConvNext':
    return _convnext(file, size)
  cut = file.get('crop_size') if file.get('do_center_crop', usual.crop is not None) else None
  if cut is None and file.get('do_center_crop', usual.crop is not None):
    cut = file.get('crop_size', usual.crop)
  if not file.get('do_center_crop', usual.crop is not None):
    file.get('crop_size')  # without a meaning then
  if isinstance(cut, dict):
    cut = cut.get('height') if cut.get('height') == cut.get('width') else cut
  if file.get('crop_pct') is not None:
    raise file.refusal('crop_pct', file.get('crop_pct'), 'size and crop_size')
  if set(size) == {'shortest_edge'} and isinstance(cut, int):
    resize, side = 'shortest', size['shortest_edge']
  elif set(size) == {'height', 'width'} and size['height'] == size['width'] and (cut is None or isinstance(cut, int)):
    resize, side = 'squash', size['height']
  else:
    raise file.refusal('size', {**size, 'crop_size': cut}, 'squares')
  if cut is not None and cut > side:
    raise file.refusal('crop_size', cut, f'at most the size, {side}')
  return {'size': cut or side, 'mode': resize, 'crop': (cut or side) / side, 'center': 'floor'}


def _convnext(file: HubFile, size: dict[str, int]) -> dict[str, Any]:
  """ConvNeXt preprocessing: the whole image from 384 pixels on, a center crop for smaller sizes."""
  side = size.get('shortest_edge')
  if set(size) != {'shortest_edge'} or side is None:
    raise file.refusal('size', size, 'a shortest_edge')
  share = file.get('crop_pct', 224 / 256)
  if side >= 384:
    return {'size': side, 'mode': 'squash', 'crop': 1.0, 'center': 'floor'}
  return {'size': side, 'mode': 'shortest', 'crop': side / int(side / share), 'center': 'floor'}


def _normalize(file: HubFile, name: str, usual: _Defaults) -> None:
  """(x * factor - offset - mean) / deviation of bytes x, as a mean and deviation of x / 255."""
  factor = file.get('rescale_factor', 1 / 255) if file.get('do_rescale', True) else 1.0
  offset = 1.0 if file.get('rescale_offset', False) and file.get('do_rescale', True) else 0.0
  mean: tuple[float, ...] = (0.0,) * 3
  std: tuple[float, ...] = (1.0,) * 3
  given = (
    _three(file.get('image_mean', tuple(usual.statistics['mean']))),
    _three(file.get('image_std', tuple(usual.statistics['std']))),
  )
  if file.get('do_normalize', True):
    mean, std = given
  again = given[1] if name == 'EfficientNet' and file.get('include_top', True) else (1.0,) * 3
  file.set('objective.normalize.mean', tuple(_clean((m + offset) / (255 * factor)) for m in mean))
  file.set('objective.normalize.std', tuple(_clean(s * t / (255 * factor)) for s, t in zip(std, again, strict=True)))


def timm(file: HubFile, side: int) -> None:
  """Reads timm's pretrained_cfg (or a file of before there was one, which is it); `side`: that of the network."""
  channels, height, width = file.get('input_size', (3, side, side))
  share, mode = file.get('crop_pct', 0.875), file.get('crop_mode', 'center')
  modes = {'center': 'shortest', 'squash': 'squash', 'border': 'longest'}
  if channels != 3 or height != width:
    raise file.refusal('input_size', [channels, height, width], 'squares of three channels')
  if mode not in modes:
    raise file.refusal('crop_mode', mode, f'one of {", ".join(modes)}')
  if share > 1:
    raise file.refusal('crop_pct', share, 'at most 1')
  filters = {'bilinear', 'bicubic', 'nearest', 'lanczos', 'box', 'hamming'}
  interpolation = file.get('interpolation', 'bicubic')
  if interpolation not in filters:
    raise file.refusal('interpolation', interpolation, f'one of {", ".join(sorted(filters))}')
  mean, std = _three(file.get('mean', IMAGENET['mean'])), _three(file.get('std', IMAGENET['std']))
  spec = {'name': 'pillow_resize', 'size': height, 'mode': modes[mode], 'crop': _share(height, share)}
  fill = {'fill': tuple(round(255 * m) for m in mean)} if mode == 'border' else {}
  file.set('data.image', {**spec, 'interpolation': interpolation, **fill})
  file.set('objective.normalize.mean', mean)
  file.set('objective.normalize.std', std)
  file.done(_OF_TIMM)


def open_clip(file: HubFile, side: int) -> None:
  """Reads OpenCLIP's preprocess_cfg; the image size is that of the image tower."""
  size = file.get('size')
  if size is not None:
    file.agree('size', size[0] if isinstance(size, (list, tuple)) else size, side)
  mode, modes = file.get('resize_mode', 'shortest'), ('shortest', 'squash', 'longest')
  if mode not in modes:
    raise file.refusal('resize_mode', mode, f'one of {", ".join(modes)}')
  interpolation = file.get('interpolation', 'bicubic')
  interpolation = 'bicubic' if interpolation == 'random' else interpolation
  if interpolation not in ('bicubic', 'bilinear'):
    raise file.refusal('interpolation', interpolation, 'bicubic or bilinear')
  file.agree('mode', file.get('mode', 'RGB'), 'RGB')
  fill = int(file.get('fill_color', 0))
  spec = {'name': 'pillow_resize', 'size': side, 'mode': mode, 'crop': 1.0, 'interpolation': interpolation}
  file.set('data.image', {**spec, **({'fill': (fill,) * 3} if mode == 'longest' else {})})
  file.set('objective.normalize.mean', _three(file.get('mean', CLIP['mean'])))
  file.set('objective.normalize.std', _three(file.get('std', CLIP['std'])))
  file.done()


def _share(size: int, share: float) -> float:
  """Crop fraction by which `size` becomes the whole number of pixels that timm resizes to."""
  return size / math.floor(size / share)


def _three(value: Any) -> tuple[float, ...]:
  value = (value,) if isinstance(value, (int, float)) else tuple(float(x) for x in value)
  return value * 3 if len(value) == 1 else value


def _clean(value: float) -> float:
  return float(f'{value:.9g}')
