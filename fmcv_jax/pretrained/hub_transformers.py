"""Maps config.json of transformers to our configs.

Keys that a file leaves out have the defaults of the library's own configuration classes.
"""

import math
from collections.abc import Callable
from typing import Any

from fmcv_jax.errors import UserError, did_you_mean
from fmcv_jax.models.backbones.efficientnet import SIZES as EFFICIENTNETS
from fmcv_jax.models.backbones.efficientnet import TABLE
from fmcv_jax.models.backbones.vit import ViT
from fmcv_jax.pretrained import efficientnet, hub_depth_anything, hub_gemma, hub_sam
from fmcv_jax.pretrained.hub_file import ACTIVATION, Has, HubFile, Sets, Table
from fmcv_jax.pretrained.hub_vit import side

# What changes nothing that a network computes when it is not trained.
IGNORED = (
  r'_.*|architectures|model_type|transformers_version|torch_dtype|dtype|name_or_path|auto_map|attn_implementation',
  r'initializer_.*|.*dropout.*|drop_path_rate|drop_connect_rate|layerscale_value|mask_ratio|batch_norm_momentum',
  r'id2label|label2id|num_labels|problem_type|finetuning_task|return_dict|use_return_dict|use_cache|tie_.*|torchscript',
  r'output_.*|chunk_size_feed_forward|pruned_heads|is_decoder|is_encoder_decoder|add_cross_attention|cross_.*',
  r'encoder_stride|pooler_.*|stage_names|out_features|out_indices|reshape_hidden_states|apply_layernorm|use_mask_token',
  r'bos_token_id|pad_token_id|sep_token_id|cls_token_id|unk_token_id|decoder_start_token_id|prefix|task_specific_params',
  # How texts are generated, which version 4 wrote into every configuration.
  r'(max|min)_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_k|top_p',
  r'typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids',
  r'num_return_sequences|forced_(bos|eos)_token_id|remove_invalid_values|exponential_decay_length_penalty',
  r'suppress_tokens|begin_suppress_tokens|tokenizer_class|gradient_checkpointing|tf_legacy_loss|use_bfloat16',
  r'logit_scale_init_value|decoder_.*',
)


def _blocks(activation: str, eps: float, *, heads: int = 12) -> dict[str, Sets | Has]:
  return {
    'num_attention_heads': Sets('num_heads', heads),
    'hidden_act': Sets('activation', activation, ACTIVATION),
    'layer_norm_eps': Sets('eps', eps, float),
    'hidden_size': Has(lambda network: network.width),
    'num_hidden_layers': Has(lambda network: network.stack.depth),
    'intermediate_size': Has(lambda network: network.stack.block.mlp_dim),
  }


_PATCHES: Table = {'patch_size': Has(lambda network: network.patch_size), 'num_channels': Has(3)}


def _tower(activation: str, eps: float) -> Table:
  return {**_blocks(activation, eps), **_PATCHES}


def _encoder(eps: float) -> Table:
  return {**_tower('gelu', eps), 'qkv_bias': Sets('qkv_bias', True)}


def _text(activation: str, eps: float, *, heads: int) -> dict[str, Sets | Has]:
  return {
    **_blocks(activation, eps, heads=heads),
    'vocab_size': Has(lambda network: network.vocab_size),
    'max_position_embeddings': Has(lambda network: network.length),
  }


_WIDTH_OF_EMBEDDING = {'projection_dim': Has(lambda network: network.num_classes or network.width)}
_TOWERS: dict[str, Table] = {
  'clip_vision': _tower('quick_gelu', 1e-5),
  'clip_text': {**_text('quick_gelu', 1e-5, heads=8)},
  'siglip_vision': {
    **_tower('gelu_pytorch_tanh', 1e-6),
    'vision_use_head': Has(lambda network: network.pool == 'map', True),
  },
  'siglip_text': {
    **_text('gelu_pytorch_tanh', 1e-6, heads=12),
    'projection_size': Has(lambda network: network.num_classes or network.width),
  },
}

# By model_type: the keys of what is one network of ours.
_DINOV2: Table = {
  **{key: rule for key, rule in _encoder(1e-6).items() if key != 'intermediate_size'},
  'use_swiglu_ffn': Has(lambda network: network.stack.block.gated_mlp, False),
}
_ENCODERS: dict[str, Table] = {
  'vit': _encoder(1e-12),
  'deit': _encoder(1e-12),
  'vit_mae': _encoder(1e-12),
  'vit_msn': _encoder(1e-6),
  'dinov2': _DINOV2,
  'dinov2_with_registers': {**_DINOV2, 'num_register_tokens': Has(lambda network: network.registers, 4)},
}
_MASKED: Table = {
  'decoder_num_attention_heads': Sets('num_heads', 16),
  'decoder_hidden_size': Has(lambda network: network.decoder.width),
  'decoder_num_hidden_layers': Has(lambda network: network.decoder.stack.depth),
  'decoder_intermediate_size': Has(lambda network: network.decoder.stack.block.mlp_dim, 2048),
}
_SWIN: Table = {
  'layer_norm_eps': Has(1e-5, 1e-5),  # which its embedding and its merges have, whatever the file says
  'hidden_act': Has('gelu', 'gelu'),
  'window_size': Has(lambda network: network.window),
  'patch_size': Has(lambda network: network.smallest_patch),
  'embed_dim': Has(lambda network: network.width),
  'depths': Has(lambda network: network.depths),
  'num_heads': Has(lambda network: [block.num_heads for block in network.blocks]),
  'mlp_ratio': Has(lambda network: network.blocks[0].mlp_dim / network.width, 4.0),
  'qkv_bias': Has(True, True),
  'use_absolute_embeddings': Has(False, False),
  'num_channels': Has(3),
  'num_layers': Has(lambda network: len(network.depths)),
  'hidden_size': Has(lambda network: network.width * 2 ** (len(network.depths) - 1)),
}
_EFFICIENTNET: Table = {
  'image_size': Sets('image_size', 600),
  'width_coefficient': Has(lambda network: _scales(network)[0]),
  'depth_coefficient': Has(lambda network: _scales(network)[1]),
  'hidden_dim': Has(lambda network: network.top),
  'num_channels': Has(3),
  'depth_divisor': Has(8, 8),
  'kernel_sizes': Has([row.size for row in TABLE]),
  'in_channels': Has([32, *(row.features for row in TABLE[:-1])]),
  'out_channels': Has([row.features for row in TABLE]),
  'strides': Has([row.stride for row in TABLE]),
  'num_block_repeats': Has([row.repeats for row in TABLE]),
  'expand_ratios': Has([row.ratio for row in TABLE]),
  'squeeze_expansion_ratio': Has(0.25, 0.25),
  'batch_norm_eps': Has(1e-3, 1e-3),
  'pooling_type': Has('mean', 'mean'),
}


_EOMT_ENCODER: Table = {
  **{key: rule for key, rule in _encoder(1e-6).items() if key not in ('intermediate_size', 'qkv_bias')},
  'num_attention_heads': Sets('num_heads', 16),
  'hidden_act': Has('gelu', 'gelu'),
  'use_swiglu_ffn': Has(False, False),
  'num_register_tokens': Has(lambda network: network.registers, 4),
  'mlp_ratio': Has(lambda network: network.stack.block.mlp_dim / network.width, 4),
}
_EOMT: Table = {
  'num_blocks': Has(lambda network: network.blocks, 4),
  'num_upscale_blocks': Has(lambda network: network.upscales, 2),
  'num_queries': Has(lambda network: network.queries, 200),
}
_EOMT_LOSS: Table = {
  **{f'{name}_weight': Sets(f'{name}_weight', value) for name, value in (('class', 2.0), ('mask', 5.0), ('dice', 5.0))},
  'no_object_weight': Sets('no_object_weight', 0.1),
  'train_num_points': Sets('num_points', 12_544),
  'oversample_ratio': Sets('oversample_ratio', 3.0),
  'importance_sample_ratio': Sets('importance_sample_ratio', 0.75),
}


def read(file: HubFile, config: dict[str, Any], objective: Any) -> None:
  """Reads config.json into its findings; UserError for a model of another type, or what none of ours computes."""
  network = getattr(objective, 'network', None)
  kind, path = file.get('model_type'), 'objective.network'
  ours = config['objective']['network']['name']
  reader = _READERS.get(kind)
  if reader is None or ours not in reader[0]:
    known = [name for name, (networks, _) in _READERS.items() if ours in networks]
    raise UserError(
      f'{file.shown}: model_type is {kind!r}, but its arrays are those of {ours}; {did_you_mean(kind, known)}'
    )
  reader[1](file, str(kind), path, network)
  file.done(IGNORED)


def text_tower(file: HubFile, path: str, network: Any) -> None:
  """CLIP's text tower by itself, as in the pipelines of Stable Diffusion, or below the key text_config."""
  inner = file.part('text_config') if 'text_config' in file else file
  _clip_text(inner, path, network)
  inner.done(IGNORED)


def _vision(file: HubFile, kind: str, path: str, network: ViT) -> None:
  file.apply(_ENCODERS[kind], path, network)
  if kind.startswith('dinov2'):
    block, ratio = network.stack.block, file.get('mlp_ratio', 4)
    hidden = gated_width(network.width, ratio) if block.gated_mlp else int(network.width * ratio)
    if hidden != block.mlp_dim:
      raise file.refusal('mlp_ratio', ratio, f'MLPs of {block.mlp_dim}, from their arrays')
    if block.gated_mlp:  # whose activation does not follow hidden_act
      file.set(f'{path}.activation', 'silu')
  side(file, 'image_size', path, network, 224)
  # Where positions are interpolated, of these only the one with registers filters what is made smaller.
  file.set(f'{path}.position_antialias', kind == 'dinov2_with_registers')


def _depth_anything(file: HubFile, kind: str, path: str, network: Any) -> None:
  backbone = file.part('backbone_config')
  backbone.agree('model_type', backbone.get('model_type', 'dinov2'), 'dinov2')
  hub_depth_anything.taps(backbone, path, network)
  _vision(backbone, 'dinov2', f'{path}.encoder', network.encoder)
  backbone.done(IGNORED)
  hub_depth_anything.head(file, path, network)


def _masked(file: HubFile, kind: str, path: str, network: Any) -> None:
  if isinstance(network, ViT):  # the encoder by itself
    return _vision(file, kind, path, network)
  file.apply(_encoder(1e-12), f'{path}.encoder', network.encoder)
  side(file, 'image_size', f'{path}.encoder', network.encoder, 224)
  file.apply(_MASKED, path, network)
  file.set('objective.norm_pix_loss', bool(file.get('norm_pix_loss', False)))
  if 'mask_ratio' in file:
    file.set('objective.mask_ratio', float(file.get('mask_ratio')))


def _swin(file: HubFile, kind: str, path: str, network: Any) -> None:
  file.apply(_SWIN, path, network)
  side(file, 'image_size', path, network, 224)


def _efficientnet(file: HubFile, kind: str, path: str, network: Any) -> None:
  file.apply(_EFFICIENTNET, path, network)
  if ACTIVATION(file.get('hidden_act', 'swish')) != 'silu':
    raise file.refusal('hidden_act', file.get('hidden_act'), 'swish')


def _scales(network: Any) -> tuple[float, float]:
  variant = efficientnet.variant_of(network.stem, [row.repeats for row in network.stages])
  return EFFICIENTNETS[variant][0], EFFICIENTNETS[variant][1]


def _pair(family: str) -> Callable[[HubFile, str, str, Any], None]:
  """Both towers of a model of images and texts, or, where the arrays are those of one tower, that one."""

  def reader(file: HubFile, kind: str, path: str, network: Any) -> None:
    both = hasattr(network, 'text')
    vision, text = file.part('vision_config'), file.part('text_config')
    if both or isinstance(network, ViT):
      _image_tower(vision, family, f'{path}.image' if both else path, network.image if both else network)
    if both or not isinstance(network, ViT):
      _words(text, family, kind, f'{path}.text' if both else path, network.text if both else network)
    if family == 'clip':
      _embedding(file, path, network.text if both else network, whole=both)
    for key, inner in (('vision_config_dict', vision), ('text_config_dict', text)):
      for name, value in (file.get(key) or {}).items():  # of the oldest files; transformers lets them win
        if value is not None and inner.values.get(name, value) != value:
          raise UserError(f'{file.shown}: {key} says {name} {value!r}, but {inner.shown} says {inner.values[name]!r}')
    for inner in (vision, text):
      inner.done((*IGNORED, 'projection_dim'))

  return reader


def _single(family: str, part: str) -> Callable[[HubFile, str, str, Any], None]:
  def reader(file: HubFile, kind: str, path: str, network: Any) -> None:
    if part == 'vision':
      _image_tower(file, family, path, network)
    else:
      _words(file, family, kind, path, network)
    if family == 'clip':
      _embedding(file, path, network, whole=False)

  return reader


def _embedding(file: HubFile, path: str, tower: Any, *, whole: bool) -> None:
  """The width of embeddings; a tower alone (not `whole`) may be without a projection to it."""
  if whole or tower.num_classes:
    file.apply(_WIDTH_OF_EMBEDDING, path, tower)
  else:
    file.get('projection_dim')


def _paligemma(file: HubFile, kind: str, path: str, network: Any) -> None:
  vision, text = file.part('vision_config'), file.part('text_config')
  _image_tower(vision, 'siglip', f'{path}.image', network.image)
  vision.agree('model_type', vision.get('model_type', 'siglip_vision_model'), 'siglip_vision_model')
  file.set(f'{path}.image.pool', 'gap')  # nothing reads what is pooled
  hub_gemma.read(text, f'{path}.text', network.text)
  file.apply({'projection_dim': Has(network.text.width)}, path, network)
  for key in ('hidden_size', 'vocab_size', 'image_token_index', 'ignore_index'):  # which the model does not use
    file.get(key)
  for inner in (vision, text):
    inner.done((*IGNORED, 'projection_dim', 'num_image_tokens', 'projector_hidden_act'))


def _owl(file: HubFile, kind: str, path: str, network: Any) -> None:
  vision, text, towers = file.part('vision_config'), file.part('text_config'), f'{path}.towers'
  vision.apply(_TOWERS['clip_vision'], f'{towers}.image', network.image)
  side(vision, 'image_size', f'{towers}.image', network.image, 768)
  vision.set(f'{towers}.image.position_antialias', False)
  _clip_text(text, f'{towers}.text', network.text)
  _embedding(file, towers, network.text, whole=True)
  for inner in (vision, text):
    inner.done((*IGNORED, 'projection_dim'))


def _eomt(file: HubFile, kind: str, path: str, network: Any) -> None:
  file.apply(_EOMT_ENCODER, f'{path}.encoder', network.encoder)
  side(file, 'image_size', f'{path}.encoder', network.encoder, 640)
  file.apply(_EOMT, path, network)
  file.apply(_EOMT_LOSS, 'objective', network)


def _image_tower(file: HubFile, family: str, path: str, network: ViT) -> None:
  file.apply(_TOWERS[f'{family}_vision'], path, network)
  side(file, 'image_size', path, network, 224)
  file.set(f'{path}.position_antialias', False)


def _words(file: HubFile, family: str, kind: str, path: str, network: Any) -> None:
  if family == 'clip':
    _clip_text(file, path, network, legacy=not kind.startswith('metaclip'))
  else:
    file.apply(_TOWERS['siglip_text'], path, network)
    file.get('eos_token_id')  # which nothing reads: its texts are pooled at their last place


def _clip_text(file: HubFile, path: str, network: Any, *, legacy: bool = True) -> None:
  """`legacy`: transformers reads an end id of 2 in CLIP's configurations as 'the largest id'."""
  file.apply(_TOWERS['clip_text'], path, network)
  file.get('projection_dim')
  end = file.get('eos_token_id', 49_407)
  if not isinstance(end, int):
    raise file.refusal('eos_token_id', end, 'one id')
  if end != network.vocab_size - 1 and not (legacy and end == 2):
    file.set(f'{path}.end_id', end)


_CLIP_KINDS = ('clip', 'metaclip_2')
_READERS: dict[Any, tuple[tuple[str, ...], Callable[[HubFile, str, str, Any], None]]] = {
  **{kind: (('vit',), _vision) for kind in _ENCODERS},
  'vit_mae': (('mae', 'vit'), _masked),
  'swin': (('swin',), _swin),
  'depth_anything': (('dpt',), _depth_anything),
  'efficientnet': (('efficientnet',), _efficientnet),
  **{kind: (('dual_encoder', 'vit', 'text_transformer'), _pair('clip')) for kind in _CLIP_KINDS},
  'siglip': (('dual_encoder', 'vit', 'text_transformer'), _pair('siglip')),
  **{f'{kind}_vision_model': (('vit',), _single('clip', 'vision')) for kind in _CLIP_KINDS},
  **{f'{kind}_text_model': (('text_transformer',), _single('clip', 'text')) for kind in _CLIP_KINDS},
  'paligemma': (('prefix_lm',), _paligemma),
  **{kind: (('owl_detector',), _owl) for kind in ('owlvit', 'owlv2')},
  'eomt': (('eomt',), _eomt),
  'sam': (('sam',), lambda file, kind, path, network: hub_sam.read(file, path, network, IGNORED)),
  'siglip_vision_model': (('vit',), _single('siglip', 'vision')),
  'siglip_text_model': (('text_transformer',), _single('siglip', 'text')),
}


def gated_width(width: int, ratio: float) -> int:
  """Hidden width of DINOv2's SwiGLU: two thirds of an MLP's, in multiples of 8."""
  return math.ceil(int(int(width * ratio) * 2 / 3) / 8) * 8
