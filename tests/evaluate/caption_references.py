"""Writes tests/fixtures/caption_scores.json with pycocoevalcap 1.2 and Stanford's PTBTokenizer 3.4.1 in it.

Needs Java and `pip install pycocoevalcap==1.2` (100 MB, of which the scorers are a few files):
python tests/evaluate/caption_references.py
"""

import importlib.metadata
import json
import pathlib

import numpy as np

FILE = pathlib.Path(__file__).parent.parent / 'fixtures' / 'caption_scores.json'

WORDS = tuple('a the man dog cat red blue large sits runs on in with bench park ball and two of near'.split())  # noqa: SIM905


def corpus(seed, images):
  """(captions, references): random captions of 0 to 14 words, some close to one of 1 to 5 references."""
  draw = np.random.default_rng(seed)

  def sentence(low, high):
    return [str(word) for word in draw.choice(WORDS, draw.integers(low, high))]

  captions, references = [], []
  for image in range(images):
    own = [sentence(1, 13) for _ in range(draw.integers(1, 6))]
    caption = list(own[0]) if image % 2 else sentence(0, 15)
    if image % 4 == 1:
      caption[: len(caption) // 2] = sentence(0, 8)
    captions.append(' '.join(caption))
    references.append([' '.join(words) for words in own])
  return captions, references


CORPORA = {'many': (0, 24), 'two': (1, 2), 'one': (2, 1)}


def scores(captions, references):
  from pycocoevalcap.bleu.bleu import Bleu
  from pycocoevalcap.cider.cider import Cider
  from pycocoevalcap.rouge.rouge import Rouge

  res = {i: [caption] for i, caption in enumerate(captions)}
  gts = dict(enumerate(references))
  bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
  return {
    'cider': Cider().compute_score(gts, res)[1].tolist(),
    'bleu': [float(score) for score in bleu],
    'rouge_l': Rouge().compute_score(gts, res)[1].tolist(),
  }


def words(captions):
  from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

  found = PTBTokenizer().tokenize({i: [{'caption': caption}] for i, caption in enumerate(captions)})
  return [[caption, found[i][0]] for i, caption in enumerate(captions)]


def main():
  captions = [caption for caption, _ in json.loads(FILE.read_text())['words']]
  made = {
    'version': f'pycocoevalcap {importlib.metadata.version("pycocoevalcap")}',
    'words': words(captions),
    'scores': {name: scores(*corpus(*arguments)) for name, arguments in CORPORA.items()},
  }
  FILE.write_text(json.dumps(made, indent=1, ensure_ascii=False) + '\n')


if __name__ == '__main__':
  main()
