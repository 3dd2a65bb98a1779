"""Reads the tokenizer of a published model from its folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmcv_jax.data import clip_vocabulary
from fmcv_jax.data.tokenizers import SentencePiece, TokenizerJson
from fmcv_jax.pretrained.hub_file import Findings, opened

CLIP_SIZE = 49_408


def read(folder: Path, config: Mapping[str, Any], findings: Findings) -> dict[str, Any] | None:
  """Returns the `tokenizer` section of our config, or None for a model without a supported tokenizer."""
  own = config.get('tokenizer')
  network = config['objective']['network']
  text = network.get('text') or config['objective'].get('text_condition', {}).get('encoder')
  if network['name'] == 'text_transformer':
    text = network
  if text is None:
    return own
  size, length = text['vocab_size'], text['length']
  if network['name'] == 'prefix_lm':
    return _prompted(folder, size, length, findings)
  if own is not None and size == CLIP_SIZE and _is_clips(folder):
    return {**own, 'length': length}
  found = _of_folder(folder, length, siglip=text.get('pool') == 'last', findings=findings)
  if found is None:
    return None
  spec, words = found
  findings.said.append(f'{Path(spec["file"]).name}: {words} words of a table of {size}')
  return spec


def padding(folder: Path, findings: Findings) -> str | None:
  """Text padding of Stable Diffusion from tokenizer/tokenizer_config.json: 'end' or 'zeros'."""
  file = opened(folder / 'tokenizer' / 'tokenizer_config.json', 'tokenizer/tokenizer_config.json', findings)
  if file is None or 'pad_token' not in file:
    return None
  token = _content(file.get('pad_token'))
  findings.said.append(f'tokenizer/tokenizer_config.json: pad_token={token!r}')
  if token not in ('!', '<|endoftext|>'):
    raise file.refusal('pad_token', token, "'!' or '<|endoftext|>'")
  return 'zeros' if token == '!' else 'end'


def _is_clips(folder: Path) -> bool:
  """True if the folder has CLIP's vocabulary, or none."""
  if (file := opened(folder / 'vocab.json', 'vocab.json', Findings())) is not None:
    return file.values == clip_vocabulary.token_ids()
  if (file := opened(folder / 'tokenizer.json', 'tokenizer.json', Findings())) is not None:
    return dict(file.values.get('model', {})).get('vocab') == clip_vocabulary.token_ids()
  return True


def _of_folder(folder: Path, length: int, *, siglip: bool, findings: Findings) -> tuple[dict[str, Any], int] | None:
  """Returns (our tokenizer config, vocabulary size)."""
  if (file := folder / 'spiece.model').is_file() and siglip:
    return {'name': 'sentencepiece', 'file': str(file), 'length': length}, SentencePiece(str(file), length).vocab_size
  file = folder / 'tokenizer.json'
  if not file.is_file():
    return None
  spec: dict[str, Any] = {'name': 'tokenizer_json', 'file': str(file), 'length': length}
  if siglip:  # SigLIP 2, whose file says neither
    spec |= {'end': '<eos>', 'lowercase': True}
  said = opened(folder / 'tokenizer_config.json', 'tokenizer_config.json', findings)
  for field, key in (('padding', 'pad_token'), ('end', 'eos_token')):
    if said is not None and (token := _content(said.get(key))):
      spec[field] = token
  if said is not None:
    read = ', '.join(f'{field}={spec[field]}' for field in ('padding', 'end') if field in spec)
    findings.said.append(f'tokenizer_config.json: {read}')
  return spec, TokenizerJson(str(file), length).vocab_size


def _prompted(folder: Path, size: int, length: int, findings: Findings) -> dict[str, Any] | None:
  """The tokenizer of a prefix language model; special tokens that tokenizer_config.json does not name are Gemma's."""
  file = folder / 'tokenizer.json'
  if not file.is_file():
    return None
  said = opened(folder / 'tokenizer_config.json', 'tokenizer_config.json', findings)
  names = {'padding': ('pad_token', '<pad>'), 'start': ('bos_token', '<bos>'), 'end': ('eos_token', '<eos>')}
  special = {
    field: (None if said is None else _content(said.get(key))) or usual for field, (key, usual) in names.items()
  }
  words = {'name': 'tokenizer_json', 'file': str(file), 'padding': special.pop('padding')}
  findings.said.append(f'tokenizer.json: {TokenizerJson(str(file)).vocab_size} words of a table of {size}')
  return {'name': 'prompted', 'words': words, 'length': length, **special}


def _content(token: Any) -> str | None:
  return token.get('content') if isinstance(token, Mapping) else token
