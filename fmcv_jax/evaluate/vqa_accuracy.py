"""VQA accuracy of an answer against those of ten people (Antol et al. 2015), with the published normalization.

The rules are those of the evaluation code of VQA v2 (March 2021), its peculiarities included, so that figures compare.
"""

import re
from collections.abc import Sequence

PEOPLE = 10  # who answered each question

_DIGITS = {'none': '0', 'zero': '0', 'one': '1', 'two': '2', 'three': '3', 'four': '4', 'five': '5', 'six': '6'}
_DIGITS |= {'seven': '7', 'eight': '8', 'nine': '9', 'ten': '10'}
_ARTICLES = ('a', 'an', 'the')
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r'\d,\d')
_PERIOD = re.compile(r'\.(?!\d)')
_MOST_PERIODS = 32  # the reference passes a flag where the number of replacements stands

_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've
who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_TWO_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've y'all'll you'd've
"""
# A contraction without its apostrophe, or without one of its two, gets what is missing.
_CONTRACTIONS = {word.replace("'", ''): word for word in _ONE_APOSTROPHE.split()}
_CONTRACTIONS |= {
  word[:at] + word[at + 1 :]: word for word in _TWO_APOSTROPHES.split() for at in (word.index("'"), word.rindex("'"))
}
_CONTRACTIONS |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
_CONTRACTIONS |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
_CONTRACTIONS["somebody'd"] = 'somebodyd'


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
  """Accuracy from 0 to 1 of an answer, given those of ten people.

  The mean over the ten choices of nine people of min(1, people who gave that answer / 3). All answers are normalized
  first, unless the ten are the same.
  """
  answer, answers = stripped(answer), [stripped(other) for other in answers]
  if len(set(answers)) > 1:
    answer, answers = normalized(answer), [normalized(other) for other in answers]
  same = answers.count(answer)
  others = [same - (other == answer) for other in answers]
  return sum(min(1.0, count / 3) for count in others) / len(others)


def normalized(answer: str) -> str:
  """Lower case, without punctuation and articles, with digits for zero to ten and apostrophes in contractions."""
  comma = _COMMA_IN_NUMBER.search(answer) is not None
  text = answer
  for mark in _PUNCTUATION:
    next_to_blank = f'{mark} ' in answer or f' {mark}' in answer
    text = text.replace(mark, '' if next_to_blank or comma else ' ')
  words = _PERIOD.sub('', text, count=_MOST_PERIODS).lower().split()
  numbered = (_DIGITS.get(word, word) for word in words)
  return ' '.join(_CONTRACTIONS.get(word, word) for word in numbered if word not in _ARTICLES)


def stripped(answer: str) -> str:
  """The answer on one line, without blanks around it."""
  return answer.replace('\n', ' ').replace('\t', ' ').strip()
