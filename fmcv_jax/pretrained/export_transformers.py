"""Writes the model, image processor and tokenizer configs of transformers, so that `from_pretrained` loads them."""

import math
from pathlib import Path
from typing import Any

from fmcv_jax.data import clip_vocabulary
from fmcv_jax.data.pillow_resize import as_pillow_resize
from fmcv_jax.data.tokenizers import ClipBpe, SentencePiece, Tokenizer, TokenizerJson
from fmcv_jax.data.transforms import ImageTransform, ResizePad
from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.efficientnet import SIZES, EfficientNet
from fmcv_jax.models.backbones.swin import Swin
from fmcv_jax.models.backbones.text import TextTransformer
from fmcv_jax.models.backbones.vit import ViT
from fmcv_jax.models.common.layers import BlockConfig, Stack
from fmcv_jax.pretrained import efficientnet, export_depth_anything, export_eomt, export_paligemma, export_sam
from fmcv_jax.pretrained.hub_vit import exported_side

Files = dict[str, Any]  # by name: data for JSON, a text, or the path of a file to copy

ACTIVATIONS = {
  'gelu': 'gelu',
  'gelu_tanh': 'gelu_pytorch_tanh',
  'quick_gelu': 'quick_gelu',
  'silu': 'silu',
  'relu': 'relu',
}
_FILTERS = ('nearest', 'lanczos', 'bilinear', 'bicubic', 'box', 'hamming')  # in the order of Pillow's numbers


def files(family: str, objective: Any, image: ImageTransform | None, tokenizer: Tokenizer | None) -> Files:
  """All files except model.safetensors; UserError for a network that transformers does not have."""
  network = objective.network
  if family.startswith('paligemma'):
    return _paligemma(objective, image, tokenizer)
  if family.startswith('owl'):
    return _owl(family, objective, image, tokenizer)
  if family == 'eomt':
    return export_eomt.files(objective, _dinov2(objective.network.encoder), image)
  if family == 'sam':
    activation = ACTIVATIONS[network.encoder.block.activation]
    return export_sam.files(network, image, objective.normalize, activation)
  if family == 'depth_anything':
    return {
      'config.json': export_depth_anything.config(network, _dinov2(network.encoder)),
      'preprocessor_config.json': export_depth_anything.images(network, image, objective.normalize),
    }
  configs = {
    'clip': _clip,
    'clip_openai': _clip,
    'siglip': _siglip,
    'mae_pretrain': lambda _: _masked(objective),
    'swin': _swin,
    'efficientnet': _efficientnet,
    'deit': lambda own: _encoder('deit', 'DeiT', own, 'ForImageClassificationWithTeacher'),
    'dinov2': _dinov2,
  }
  config = configs.get(family, lambda own: _encoder('vit', 'ViT', own, 'ForImageClassification'))(network)
  found: Files = {'config.json': config}
  if image is not None:
    found['preprocessor_config.json'] = _images(image, objective.normalize)
  return found | (texts(tokenizer) if tokenizer is not None else {})


def _paligemma(objective: Any, image: ImageTransform | None, tokenizer: Tokenizer | None) -> Files:
  network = objective.network
  patches = _patches(network.image)
  token = export_paligemma.image_token_of(tokenizer, network.text.vocab_size)
  found: Files = {'config.json': export_paligemma.config(network, patches, token)}
  if image is not None:
    own = {'processor_class': 'PaliGemmaProcessor', 'image_seq_length': math.prod(network.image.grid)}
    found['preprocessor_config.json'] = {**_images(image, objective.normalize), **own}
  return found | export_paligemma.texts(tokenizer)


def _owl(kind: str, objective: Any, image: ImageTransform | None, tokenizer: Tokenizer | None) -> Files:
  network = objective.network
  name = {'owlvit': 'OwlViT', 'owlv2': 'Owlv2'}[kind]
  text = {**text_tower(network.text), 'model_type': f'{kind}_text_model'}
  del text['architectures']
  found: Files = {
    'config.json': {
      'model_type': kind,
      'architectures': [f'{name}ForObjectDetection'],
      'projection_dim': network.text.num_classes,
      'vision_config': {'model_type': f'{kind}_vision_model', **_patches(network.image)},
      'text_config': text,
    }
  }
  if image is not None:
    own = {'image_processor_type': f'{name}ImageProcessor', 'size': _square(network.image.image_size)}
    mean_std = {'image_mean': list(objective.normalize.mean), 'image_std': list(objective.normalize.std)}
    found['preprocessor_config.json'] = {**own, 'do_resize': True, 'do_normalize': True, **mean_std}
    if kind == 'owlv2':
      if not (isinstance(image, ResizePad) and image.size == network.image.image_size):
        raise UserError(
          'transformers pads the images of OWLv2 to a square at the right or bottom: data.image=resize_pad'
        )
    elif as_pillow_resize(image).mode != 'squash':
      raise UserError('transformers resizes the images of OWL-ViT to a square: data.image.mode=squash')
  return found | (texts(tokenizer, padding='!') if tokenizer is not None else {})


def plain(block: BlockConfig, library: str, *, qkv_bias: bool = True) -> BlockConfig:
  """UserError for blocks whose structure the library does not support; qkv_bias: a bias is required."""
  if block.parallel or block.post_norm or block.qk_norm or (qkv_bias and not block.qkv_bias):
    raise UserError(f'{library} has no such blocks: parallel, post_norm, qk_norm or without qkv_bias')
  return block


def _blocks(stack: Stack, width: int, *, qkv_bias: bool = True) -> dict[str, Any]:
  block = plain(stack.block, 'transformers', qkv_bias=qkv_bias)
  return {
    'hidden_size': width,
    'num_hidden_layers': stack.depth,
    'num_attention_heads': block.num_heads,
    'intermediate_size': block.mlp_dim,
    'hidden_act': ACTIVATIONS[block.activation],
    'layer_norm_eps': block.eps,
  }


def _patches(network: ViT, *, qkv_bias: bool = True) -> dict[str, Any]:
  sizes = {'image_size': exported_side(network, 'transformers'), 'patch_size': network.patch_size, 'num_channels': 3}
  return {**_blocks(network.stack, network.width, qkv_bias=qkv_bias), **sizes}


def _labels(outputs: int) -> dict[str, Any]:
  return {'id2label': {str(i): f'LABEL_{i}' for i in range(outputs)}} if outputs else {}


def _encoder(kind: str, name: str, network: ViT, head: str) -> dict[str, Any]:
  if network.pool != 'cls' or not network.class_token_has_position or network.registers:
    raise UserError(f'transformers has no {name} without a class token that has a place, or with registers')
  suffix = head if network.num_classes else 'Model'
  own = {'model_type': kind, 'architectures': [f'{name}{suffix}'], 'qkv_bias': network.stack.block.qkv_bias}
  return {**own, **_patches(network, qkv_bias=False), **_labels(network.num_classes)}


def _dinov2(network: ViT) -> dict[str, Any]:
  block, registers = network.stack.block, network.registers
  ratio: float = block.mlp_dim / network.width
  if block.gated_mlp:  # theirs is rounded up to a multiple of 8 after taking two thirds
    ratio = 4 if math.ceil(int(4 * network.width * 2 / 3) / 8) * 8 == block.mlp_dim else 1.5 * ratio
  numbers = _patches(network, qkv_bias=False)
  del numbers['intermediate_size']
  return {
    'model_type': 'dinov2_with_registers' if registers else 'dinov2',
    'architectures': ['Dinov2WithRegistersModel' if registers else 'Dinov2Model'],
    **numbers,
    'hidden_act': 'gelu' if block.gated_mlp else numbers['hidden_act'],
    'mlp_ratio': int(ratio) if ratio == int(ratio) else ratio,
    'use_swiglu_ffn': block.gated_mlp,
    'qkv_bias': block.qkv_bias,
    **({'num_register_tokens': registers} if registers else {}),
  }


def _masked(objective: Any) -> dict[str, Any]:
  network = objective.network
  decoder = network.decoder
  return {
    'model_type': 'vit_mae',
    'architectures': ['ViTMAEForPreTraining'],
    **_patches(network.encoder),
    'decoder_hidden_size': decoder.width,
    'decoder_num_hidden_layers': decoder.stack.depth,
    'decoder_num_attention_heads': decoder.stack.block.num_heads,
    'decoder_intermediate_size': decoder.stack.block.mlp_dim,
    'mask_ratio': objective.mask_ratio,
    'norm_pix_loss': objective.norm_pix_loss,
  }


def _swin(network: Swin) -> dict[str, Any]:
  first = network.blocks[0]
  return {
    'model_type': 'swin',
    'architectures': ['SwinForImageClassification' if network.num_classes else 'SwinModel'],
    'image_size': exported_side(network, 'transformers'),
    'patch_size': network.smallest_patch,
    'embed_dim': network.width,
    'depths': list(network.depths),
    'num_heads': [block.num_heads for block in network.blocks],
    'window_size': network.window,
    'mlp_ratio': first.mlp_dim / network.width,
    'hidden_act': ACTIVATIONS[first.activation],
    'layer_norm_eps': first.eps,
    **_labels(network.num_classes),
  }


def _efficientnet(network: EfficientNet) -> dict[str, Any]:
  variant = efficientnet.variant_of(network.stem, [row.repeats for row in network.stages])
  if not network.top:
    raise UserError('transformers has no EfficientNet without its last convolution')
  width, depth, _, dropout = SIZES[variant]
  return {
    'model_type': 'efficientnet',
    'architectures': ['EfficientNetForImageClassification' if network.num_classes else 'EfficientNetModel'],
    'image_size': exported_side(network, 'transformers'),
    'width_coefficient': width,
    'depth_coefficient': depth,
    'hidden_dim': network.top,
    'dropout_rate': dropout,
    **_labels(network.num_classes),
  }


def _clip(network: Any) -> dict[str, Any]:
  projection = network.text.num_classes
  if network.image.pool != 'cls' or not network.image.pre_norm or network.image.registers:
    raise UserError('transformers has CLIP with a class token that is read, and a norm before the first block')
  # transformers reads an end id of 2 as that of the last word in CLIP, and as it stands in MetaCLIP 2.
  kind, name = ('metaclip_2', 'MetaClip2Model') if network.text.end_id == 2 else ('clip', 'CLIPModel')
  return {
    'model_type': kind,
    'architectures': [name],
    'projection_dim': projection,
    'vision_config': {'model_type': f'{kind}_vision_model', 'projection_dim': projection, **_patches(network.image)},
    'text_config': {**text_tower(network.text), 'model_type': f'{kind}_text_model'},
  }


def text_tower(network: TextTransformer) -> dict[str, Any]:
  """Files of CLIP's text tower, which pools at the end token."""
  if network.pool != 'eot' or not network.stack.block.causal or not network.attend_padding:
    raise UserError('transformers has CLIP with causal texts that are read at their end')
  last = network.vocab_size - 1
  return {
    'model_type': 'clip_text_model',
    'architectures': ['CLIPTextModel'],
    **_blocks(network.stack, network.width),
    'vocab_size': network.vocab_size,
    'max_position_embeddings': network.length,
    'projection_dim': network.num_classes or network.width,
    'bos_token_id': last - 1,
    'eos_token_id': last if network.end_id is None else network.end_id,
    'pad_token_id': 0,
  }


def _siglip(network: Any) -> dict[str, Any]:
  text = network.text
  if text.pool != 'last' or text.stack.block.causal or network.image.pool != 'map':
    raise UserError('transformers has SigLIP with images that are pooled by attention and texts by their last token')
  words = {'vocab_size': text.vocab_size, 'max_position_embeddings': text.length, 'projection_size': text.num_classes}
  return {
    'model_type': 'siglip',
    'architectures': ['SiglipModel'],
    'vision_config': {'model_type': 'siglip_vision_model', 'vision_use_head': True, **_patches(network.image)},
    'text_config': {'model_type': 'siglip_text_model', **_blocks(text.stack, text.width), **words},
  }


def _images(image: ImageTransform, normalize: Any) -> dict[str, Any]:
  own = as_pillow_resize(image)
  if own.mode == 'longest':
    raise UserError('transformers has no such image processor: data.image.mode=longest')
  cut = {'do_center_crop': True, 'crop_size': _square(own.size)}
  common = {
    'do_resize': True,
    'do_rescale': True,
    'rescale_factor': 1 / 255,
    'do_normalize': True,
    'image_mean': list(normalize.mean),
    'image_std': list(normalize.std),
    'do_convert_rgb': True,
  }
  if own.mode == 'shortest':
    geometry: Files = {'image_processor_type': 'CLIPImageProcessor', 'size': {'shortest_edge': own.side}, **cut}
  elif own.crop < 1:
    geometry = {'image_processor_type': 'DeiTImageProcessor', 'size': _square(own.side), **cut}
  else:
    geometry = {'image_processor_type': 'SiglipImageProcessor', 'size': _square(own.size)}
  return {**geometry, 'resample': _FILTERS.index(own.interpolation), **common}


def _square(side: int) -> dict[str, int]:
  return {'height': side, 'width': side}


def texts(tokenizer: Tokenizer, padding: str = '<|endoftext|>') -> Files:
  """Tokenizer files for published tokenizers; none for a tokenizer that was trained here."""
  common = {'model_max_length': tokenizer.length}
  if isinstance(tokenizer, ClipBpe):
    if tokenizer.added:
      raise UserError(
        f'{tokenizer.added[0]} is a word of a textual inversion, which is not written into tokenizer files'
      )
    start, end = clip_vocabulary.START, clip_vocabulary.END
    special = {'bos_token': start, 'eos_token': end, 'unk_token': end, 'pad_token': padding}
    merges = '\n'.join(('#version: 0.2', *clip_vocabulary.merges(), ''))
    config = {'tokenizer_class': 'CLIPTokenizer', **special, **common}
    return {'vocab.json': clip_vocabulary.token_ids(), 'merges.txt': merges, 'tokenizer_config.json': config}
  if isinstance(tokenizer, SentencePiece):
    special = {'eos_token': '</s>', 'unk_token': '<unk>', 'pad_token': '</s>'}
    config = {'tokenizer_class': 'SiglipTokenizer', 'do_lower_case': True, **special, **common}
    return {'spiece.model': Path(tokenizer.file), 'tokenizer_config.json': config}
  if isinstance(tokenizer, TokenizerJson):
    special = {'pad_token': tokenizer.padding, **({'eos_token': tokenizer.end} if tokenizer.end else {})}
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', **special, **common}
    return {'tokenizer.json': Path(tokenizer.file), 'tokenizer_config.json': config}
  return {}
