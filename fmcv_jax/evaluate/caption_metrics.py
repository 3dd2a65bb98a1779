"""CIDEr, BLEU and ROUGE-L of captions with several references each, as COCO's caption evaluation computes them.

The formulas are those of pycocoevalcap 1.2 (Chen et al. 2015), whose scorers give the same values to rounding.
"""

import collections
import math
from collections.abc import Sequence

import numpy as np

Words = Sequence[str]
Counts = collections.Counter[tuple[str, ...]]

_LONGEST = 4  # words of an n-gram


def caption_scores(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, float]:
  """'cider', 'bleu1' to 'bleu4', 'rouge_l' and 'exact_match' of N captions, each with one or more references, in words.

  'exact_match' is the fraction of captions that have the words of one of their references.
  """
  scores = {'cider': float(np.mean(cider(captions, references)))}
  scores |= {f'bleu{n}': score for n, score in enumerate(bleu(captions, references), 1)}
  pairs = list(zip(captions, references, strict=True))
  scores['rouge_l'] = float(np.mean([rouge_l(*pair) for pair in pairs]))
  scores['exact_match'] = float(np.mean([any(list(caption) == list(text) for text in own) for caption, own in pairs]))
  return scores


def cider(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> np.ndarray:
  """CIDEr-D (Vedantam et al. 2015, section 8) of each caption, float64 [N], from 0 to 10.

  Ten times the mean, over references and n = 1 to 4, of the cosine of TF-IDF vectors of n-grams, with the counts of the
  caption clipped at those of the reference, times a Gaussian of the difference in length (of bigrams, as there) with a
  standard deviation of 6. Documents are the references of an image, so scores depend on the data set, and are all 0 for
  one image alone.
  """
  referenced = [[_counts(reference) for reference in own] for own in references]
  documents = collections.Counter(gram for own in referenced for gram in set().union(*own))

  def vector(counts: Counts) -> tuple[dict[tuple[str, ...], float], np.ndarray, int]:
    weights = {gram: count * math.log(len(captions) / max(1, documents[gram])) for gram, count in counts.items()}
    squares = np.zeros(_LONGEST)
    for gram, weight in weights.items():
      squares[len(gram) - 1] += weight**2
    return weights, np.sqrt(squares), sum(count for gram, count in counts.items() if len(gram) == 2)

  scores = []
  for caption, own in zip(captions, referenced, strict=True):
    weights, norms, length = vector(_counts(caption))
    total = np.zeros(_LONGEST)
    for reference in own:
      others, other_norms, other_length = vector(reference)
      products = np.zeros(_LONGEST)
      for gram in weights.keys() & others.keys():
        products[len(gram) - 1] += min(weights[gram], others[gram]) * others[gram]
      scale = norms * other_norms
      cosines = np.divide(products, scale, out=products, where=scale > 0)
      total += cosines * math.exp(-((length - other_length) ** 2) / (2 * 6.0**2))
    scores.append(10 * total.mean() / len(own))
  return np.array(scores)


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> list[float]:
  """BLEU-1 to BLEU-4 (Papineni et al. 2002) of the whole set, from 0 to 1.

  Geometric means of the clipped n-gram precisions, times the brevity penalty, for which the reference of the closest
  length counts, of two the shorter.
  """
  matched, guessed, length, closest = np.zeros(_LONGEST), np.zeros(_LONGEST), 0, 0
  for caption, own in zip(captions, references, strict=True):
    counts, most = _counts(caption), collections.Counter[tuple[str, ...]]()
    for reference in own:
      most |= _counts(reference)
    for gram, count in (counts & most).items():
      matched[len(gram) - 1] += count
    guessed += np.maximum(len(caption) - np.arange(_LONGEST), 0)
    length += len(caption)
    closest += min((abs(len(reference) - len(caption)), len(reference)) for reference in own)[1]
  if not length:
    return [0.0] * _LONGEST
  precisions = np.divide(matched, guessed, out=np.zeros(_LONGEST), where=guessed > 0)
  penalty = min(1.0, math.exp(1 - closest / length))
  return [float(penalty * np.prod(precisions[:n]) ** (1 / n)) for n in range(1, _LONGEST + 1)]


def rouge_l(caption: Words, references: Sequence[Words], beta: float = 1.2) -> float:
  """ROUGE-L (Lin 2004) from 0 to 1: F measure of the longest common subsequence, of which recall counts beta times.

  Precision and recall are each the largest over the references.
  """
  if not caption:
    return 0.0
  common = [_common(caption, reference) for reference in references]
  precision = max(common) / len(caption)
  recall = max(count / max(len(own), 1) for count, own in zip(common, references, strict=True))
  if not precision or not recall:
    return 0.0
  return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def _counts(words: Words) -> Counts:
  """The n-grams of a text, n = 1 to 4."""
  return collections.Counter(
    tuple(words[start : start + n]) for n in range(1, _LONGEST + 1) for start in range(len(words) - n + 1)
  )


def _common(a: Words, b: Words) -> int:
  """Length of the longest common subsequence."""
  row = [0] * (len(b) + 1)
  for word in a:
    before = 0
    for place, other in enumerate(b, 1):
      before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
  return row[-1]
