"""Training of a byte-pair vocabulary (Sennrich et al. 2016) by the `tokenizers` package."""

from collections.abc import Iterator


def train_bpe(texts: Iterator[str], vocab_size: int, lowercase: bool) -> str:
  """The JSON of a tokenizer with ids <pad> 0, <start> 1 and <end> vocab_size - 1, the same for the same texts."""
  import tokenizers
  from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

  bpe = tokenizers.Tokenizer(models.BPE())
  clean = [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r'\s+'), ' '), normalizers.Strip()]
  bpe.normalizer = normalizers.Sequence(clean + ([normalizers.Lowercase()] if lowercase else []))
  bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # a word is the same word at the start
  bpe.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=vocab_size - 1,
    special_tokens=['<pad>', '<start>'],  # ids 0 and 1
    initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    show_progress=False,
  )
  bpe.train_from_iterator(texts, trainer)
  unused = range(bpe.get_vocab_size(), vocab_size - 1)
  bpe.add_special_tokens([*(f'<unused{i}>' for i in unused), '<end>'])
  return bpe.to_str(pretty=True)
