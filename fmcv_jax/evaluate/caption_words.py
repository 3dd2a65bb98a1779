"""Words of captions as COCO's caption evaluation counts them, without Java.

That evaluation runs Stanford's PTBTokenizer 3.4.1 with lower case, and drops punctuation. These rules are a restatement
of what it does to captions in English; smileys, for one, it splits in other places.
"""

import re

# They keep their period, as single letters with a period each do, such as 'u.s.' and 'p.m.'.
_ABBREVIATIONS = 'mr|mrs|ms|dr|prof|st|ave|blvd|rd|mt|jr|sr|vs|etc|no|inc|co|corp|ltd'
_TOKEN = re.compile(
  rf"""
    https?://\S+
  | (?:(?<![^\W_])[^\W\d_]\.){{2,}}                         # u.s.
  | (?<![^\W_])(?:{_ABBREVIATIONS})\.
  | \d+(?:[.,:/]\d+)+(?![^\W_])                             # 3.5  1,000  3:30
  | '(?:\d\ds|tis|twas)(?![^\W_])                           # '90s
  | [^\W_]+(?:['./_-][^\W_]+)*                              # t-shirt  and/or  doesn't
  | \?[?!]+ | ![?!]+                                        # several of them are a word, a single one is not
  | \S
  """,
  re.VERBOSE,
)
_CLITIC = re.compile(r"(n't|'(?:s|m|d|re|ve|ll))$")
_SPLIT = {'cannot': 'can not', 'gonna': 'gon na', 'gotta': 'got ta', 'wanna': 'wan na', 'lemme': 'lem me'}
_SPLIT |= {'gimme': 'gim me', "'tis": "'t is", "'twas": "'t was", "y'all": "y' all"}
_BRACKETS = {'(': '-lrb-', ')': '-rrb-', '[': '-lsb-', ']': '-rsb-', '{': '-lcb-', '}': '-rcb-'}
_DROPPED = frozenset('.?!,:;-\'"`')
# Typographic apostrophes, quotation marks, dashes and the ellipsis.
_PLAIN = str.maketrans({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: '-', 0x2014: '-', 0x2026: '.'})


def caption_words(text: str) -> list[str]:
  """Lower-case words of a caption; brackets are words such as '-lrb-', and punctuation is left out."""
  words = []
  for token in _TOKEN.findall(text.lower().translate(_PLAIN)):
    words += [word for word in _parts(token) if word not in _DROPPED]
  return words


def _parts(token: str) -> list[str]:
  if token in _BRACKETS:
    return [_BRACKETS[token]]
  clitics: list[str] = []
  while "'" in token and (found := _CLITIC.search(token)) and found.start():
    clitics.insert(0, found[1])
    token = token[: found.start()]
  return [*_SPLIT.get(token, token).split(), *clitics]
