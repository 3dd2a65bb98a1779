"""Small PaliGemmas with weights, tokenizer and processor as transformers saves them."""

import numpy as np
from PIL import Image

from tests.pretrained.references import published

VISION = {
  'model_type': 'siglip_vision_model',
  'hidden_size': 64,
  'intermediate_size': 96,
  'num_hidden_layers': 2,
  'num_attention_heads': 4,
  'image_size': 32,
  'patch_size': 8,
  'vision_use_head': False,
}
TEXT = {
  'initializer_range': 0.25,
  'hidden_size': 48,
  'intermediate_size': 80,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'head_dim': 16,
}
# Heads of keys and a query scale that are not the defaults; softcaps that bend the logits of a small model.
TEXTS = {
  'paligemma': {**TEXT, 'model_type': 'gemma', 'num_key_value_heads': 1},
  'paligemma2': {
    **TEXT,
    'model_type': 'gemma2',
    'num_key_value_heads': 2,
    'query_pre_attn_scalar': 7,
    'attn_logit_softcapping': 20.0,
    'final_logit_softcapping': 3.0,
  },
}
EMBEDDINGS = 0.2  # scale of the embeddings of PaliGemma 2
SENTENCES = ('caption en', 'answer en how many cats?', 'a red cat and a dog on the table', 'two of them', 'détect chat')
IMAGES = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 40, 3)).astype(np.uint8)) for i in range(3)]


def tokenizer():
  """One of Gemma's kind: byte fallback, blanks as '▁', <bos>, <eos> and <pad>."""
  import tokenizers
  import transformers

  special = ['<pad>', '<eos>', '<bos>', '<unk>']
  model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token='<unk>', byte_fallback=True, fuse_unk=True))
  model.normalizer = tokenizers.normalizers.Replace(' ', '▁')
  model.decoder = tokenizers.decoders.Sequence(
    [tokenizers.decoders.Replace('▁', ' '), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
  )
  model.pre_tokenizer = tokenizers.pre_tokenizers.Split('\n', 'isolated')
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=340,
    special_tokens=special + [f'<0x{byte:02X}>' for byte in range(256)],
    initial_alphabet=['\n'],
    show_progress=False,
  )
  model.train_from_iterator(SENTENCES, trainer)
  names = {'pad_token': '<pad>', 'eos_token': '<eos>', 'bos_token': '<bos>', 'unk_token': '<unk>'}
  return transformers.PreTrainedTokenizerFast(tokenizer_object=model, padding_side='left', **names)


def paligemma(folder, family, **text):
  """(model, processor), saved to the folder."""
  import transformers as T

  images = T.SiglipImageProcessorPil(size={'height': 32, 'width': 32}, image_seq_length=16)
  images.image_seq_length = 16
  processor = T.PaliGemmaProcessor(images, tokenizer())
  words = len(processor.tokenizer)
  config = T.PaliGemmaConfig(
    vision_config=VISION,
    text_config={**TEXTS[family], 'vocab_size': words + 3, **text},
    projection_dim=48,
    hidden_size=48,
    image_token_index=processor.image_token_id,
  )
  model = T.PaliGemmaForConditionalGeneration(config)
  if family == 'paligemma2':  # whose branches are normalized: with larger embeddings, texts repeat one token
    model.model.language_model.embed_tokens.weight.data *= EMBEDDINGS
  published(model, folder)
  processor.save_pretrained(folder)
  return model, processor
