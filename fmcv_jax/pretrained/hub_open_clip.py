"""Maps open_clip_config.json of OpenCLIP to our configs."""

from typing import Any

from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.text import TextTransformer
from fmcv_jax.models.backbones.vit import ViT
from fmcv_jax.models.multimodal.captioner import ContrastiveCaptioner
from fmcv_jax.pretrained import hub_timm
from fmcv_jax.pretrained.hub_file import UNSET, Has, HubFile, Sets, Table
from fmcv_jax.pretrained.hub_vit import side

# Keys that do not affect inference, or that follow from the names of arrays.
IGNORED = (
  r'init_logit_scale|init_logit_bias|nonscalar_logit_scale|custom_text|ls_init_value|patch_dropout|output_tokens',
  r'dim_head|n_queries',
  r'timm_model_pretrained|timm_drop|timm_drop_path|timm_proj.*|pretrained_(image|hf)|hf_tokenizer_name|tokenizer_mode',
  r'attn_pooler_.*|proj_bias|proj_type|pad_id|embed_cls|hf_model_pretrained|block_type|timm_pool|text_mask',
)
# Blocks that our networks do not support.
_BLOCKS: Table = {
  key: Has(False, False)
  for key in ('qk_norm', 'scaled_cosine_attn', 'scale_heads', 'scale_attn_inner', 'scale_attn', 'scale_fc')
}
_TEXT: Table = {
  **_BLOCKS,
  'width': Has(lambda tower: tower.width),
  'heads': Sets('num_heads', 8),
  'layers': Has(lambda tower: tower.stack.depth),
  'mlp_ratio': Has(lambda tower: tower.stack.block.mlp_dim / tower.width),
  'vocab_size': Has(lambda tower: tower.vocab_size),
  'context_length': Has(lambda tower: tower.length),
}
_VISION: Table = {
  **_BLOCKS,
  'width': Has(lambda tower: tower.width),
  'layers': Has(lambda tower: tower.stack.depth),
  'patch_size': Has(lambda tower: tower.patch_size, 16),
  'mlp_ratio': Has(lambda tower: tower.stack.block.mlp_dim / tower.width),
  'attentional_pool': Has(lambda tower: tower.pool == 'queries', False),
  'pos_embed_type': Has('learnable', 'learnable'),
}
_QUERIES: Table = {
  'attn_pooler_queries': Has(lambda tower: tower.queries, 256),
  'attn_pooler_heads': Sets('query_heads', 8),
}
# Both towers of a CoCa give their tokens to the decoder; text towers have the mask of the published weights.
_COCA_VISION: Table = {'output_tokens': Has(True, False)}
_COCA_TEXT: Table = {
  'output_tokens': Has(True, False),
  'embed_cls': Has(True, False),
  'no_causal_mask': Has(False, False),
  'correct_cls_mask': Has(False, False),
  'pad_id': Has(0, 0),
}
_DECODER: Table = {
  'width': Has(lambda decoder: decoder.width, 512),
  'heads': Sets('num_heads', 8),
  'layers': Has(lambda decoder: decoder.stack.depth, 12),
}


def read(file: HubFile, config: dict[str, Any], objective: Any) -> None:
  """Reads `model_cfg` into the findings, of both towers or of the one whose arrays these are.

  UserError for values that our networks do not support.
  """
  model, ours = file.part('model_cfg'), config['objective']['network']['name']
  quick = bool(model.get('quick_gelu', False))
  vision, text = model.part('vision_cfg'), model.part('text_cfg')
  image, path = image_tower(objective)
  words, path_of_words = text_tower(objective)
  whole = objective.network
  decoder = whole.decoder if isinstance(whole, ContrastiveCaptioner) else None
  if image is None and words is None:
    raise UserError(f'{file.shown}: describes images and texts, but the arrays are those of {ours}')
  if image is not None:
    if 'timm_model_name' in vision:
      _of_timm(vision, path, image)
    else:
      _vision(vision, path, image, quick)
    if decoder is not None:
      vision.apply(_COCA_VISION, path, image)
      if image.pool != 'queries' and vision.get('final_ln_after_pool'):
        raise vision.refusal('final_ln_after_pool', True, 'a norm of the patches, which the decoder reads')
    vision.done(IGNORED)
  if words is not None:
    if 'hf_model_name' in text:
      raise UserError(f'{text.shown}: hf_model_name is {text.get("hf_model_name")!r}, a tower that is not known here')
    if decoder is not None:
      text.apply(_COCA_TEXT, path_of_words, words)
    _text(text, path_of_words, words, quick)
    text.done(IGNORED)
  if decoder is not None:
    model.agree('pad_id', model.get('pad_id', 0), 0)
    _decoder(model.part('multimodal_cfg'), decoder, words, quick)
  tower, width = image if words is None else words, model.get('embed_dim')
  if width is not None and (tower.num_classes or tower is not objective.network):  # one tower may have no projection
    model.agree('embed_dim', width, tower.num_classes or tower.width)
  for part in (model, file):
    part.done((*IGNORED, 'preprocess_cfg'))


def image_tower(objective: Any) -> tuple[Any, str]:
  """The image tower, None for a text tower alone, and its path in our config."""
  return _tower(objective, 'image', ViT)


def text_tower(objective: Any) -> tuple[Any, str]:
  """The text tower, None for an image tower alone, and its path in our config."""
  return _tower(objective, 'text', TextTransformer)


def _tower(objective: Any, part: str, kind: type) -> tuple[Any, str]:
  network, path = objective.network, 'objective.network'
  if hasattr(network, 'image') and hasattr(network, 'text'):
    return getattr(network, part), f'{path}.{part}'
  return (network, path) if isinstance(network, kind) else (None, path)


def _vision(file: HubFile, path: str, tower: Any, quick: bool) -> None:
  file.apply(_VISION, path, tower)
  file.set(f'{path}.num_heads', tower.width // int(file.get('head_width', 64)))
  _layers(file, path, quick)
  file.set(f'{path}.pre_norm', not file.get('no_ln_pre', False))
  side(file, 'image_size', path, tower, 224)
  pool, late = file.get('pool_type', 'tok'), bool(file.get('final_ln_after_pool', False))
  if tower.pool == 'queries':
    file.apply(_QUERIES, path, tower)
    norms = dict(file.get('norm_kwargs') or {})
    if pool != 'tok':
      raise file.refusal('pool_type', pool, "'tok', the first query of the attentional pool")
    if norms.get('eps', 1e-5) != 1e-5:
      raise file.refusal('norm_kwargs', norms, 'an eps of 1e-05, which that of the attentional pool is')
    file.set(f'{path}.pool', 'queries')
    return
  if pool not in ('tok', 'avg'):
    raise file.refusal('pool_type', pool, "'tok' or 'avg'")
  if pool == 'avg':
    file.set(f'{path}.pool', 'gap')
    file.set(f'{path}.class_token', True)
    if late:
      file.set(f'{path}.fc_norm', True)
      prefix = 'image/' if path.endswith('.image') else ''
      file.findings.renamed[f'{prefix}norm/'] = f'{prefix}pooled_norm/'


def _of_timm(file: HubFile, path: str, tower: Any) -> None:
  """Reads a timm image tower: architecture name and pooling; OpenCLIP passes no other arguments."""
  arguments = file.part('timm_model_name_arguments')
  arguments.values = {'global_pool': file.get('timm_pool', 'avg')}
  arguments.shown = f'{file.shown}: timm_pool'
  hub_timm.network(file, arguments, str(file.get('timm_model_name')), path, tower)
  side(file, 'image_size', path, tower, 224)


def _text(file: HubFile, path: str, tower: Any, quick: bool) -> None:
  file.apply(_TEXT, path, tower)
  _layers(file, path, quick)
  file.set(f'{path}.causal', not file.get('no_causal_mask', False))
  file.get('final_ln_after_pool')  # one token is pooled, so before and after are the same
  if tower.pool == 'cls':
    for key in ('pool_type', 'eos_id'):  # the class token is pooled in any case
      file.get(key)
    file.set(f'{path}.pool', 'cls')
    return
  pool = file.get('pool_type', 'argmax')
  pools = {'argmax': 'eot', 'eos': 'eot', 'first': 'first', 'last': 'last'}
  if pool not in pools:
    raise file.refusal('pool_type', pool, f'one of {", ".join(pools)}')
  file.set(f'{path}.pool', pools[pool])
  if pool == 'eos':
    file.set(f'{path}.end_id', int(file.get('eos_id', 2)))
  else:
    file.get('eos_id', UNSET)


def _decoder(file: HubFile, decoder: Any, words: Any, quick: bool) -> None:
  path = 'objective.network.decoder'
  file.apply(_DECODER, path, decoder)
  file.set(f'{path}.activation', 'quick_gelu' if quick else 'gelu')
  file.set(f'{path}.eps', 1e-5)
  for key, ours in (('act_kwargs', 'the activation of quick_gelu or gelu'), ('norm_kwargs', 'an eps of 1e-05')):
    if (value := file.get(key)) is not None:  # which the library does not use
      raise file.refusal(key, value, ours)
  for key in ('mlp_ratio', 'vocab_size'):  # the arrays show them
    file.get(key)
  if (length := file.get('context_length', 77)) < words.length - 1:
    raise file.refusal('context_length', length, f'{words.length - 1} tokens or more, as many as the text has')
  file.done(IGNORED)


def _layers(file: HubFile, path: str, quick: bool) -> None:
  """Reads activation and eps of a tower made of OpenCLIP's own blocks."""
  given = dict(file.get('act_kwargs') or {})
  tanh = given.pop('approximate', 'none')
  if given or tanh not in ('none', 'tanh') or (quick and tanh == 'tanh'):
    raise file.refusal('act_kwargs', file.get('act_kwargs'), 'gelu, its approximation by tanh, or quick_gelu')
  file.set(f'{path}.activation', 'quick_gelu' if quick else 'gelu_tanh' if tanh == 'tanh' else 'gelu')
  norms = dict(file.get('norm_kwargs') or {})
  file.set(f'{path}.eps', float(norms.pop('eps', 1e-5)))
  if norms:
    raise file.refusal('norm_kwargs', file.get('norm_kwargs'), 'LayerNorm with an eps')
