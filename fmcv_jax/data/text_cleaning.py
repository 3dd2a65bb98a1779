"""Cleaning of texts before tokenization."""

import html

import ftfy


def clip_cleaned(text: str) -> str:
  """A text as CLIP cleans it: repaired (ftfy), without HTML entities, in lower case, with single blanks."""
  # Most captions are printable ASCII without entities, which ftfy leaves as they are. It resolves entities itself, and
  # some that html does not, before html resolves them twice.
  if not (text.isascii() and text.isprintable()) or '&' in text:
    text = ftfy.fix_text(text)
  text = html.unescape(html.unescape(text))
  return ' '.join(encodable(text).split()).lower()


def encodable(text: str) -> str:
  """A text that UTF-8 can hold."""
  return text.encode('utf-8', 'replace').decode()  # half an emoji, as in broken JSON, is not Unicode
