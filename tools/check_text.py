"""Checks the wording of code and docs, and the length of files; `make lint` runs it.

    python tools/check_text.py [FILE ...] [--summary]     # every finding as path:line, or a count per file

The project uses the terms of its field. Each retired word below has the term that replaces it; an exception is one line
in `ALLOWED`, with the exact text.
"""

import ast
import pathlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ('fmcv_jax', 'configs', 'docs', 'benchmarks', 'findings', 'launch', 'tools', 'tests', '.github')
FILES = ('*.md', '*.py', 'Makefile', 'mkdocs.yml', 'CITATION.cff')
SUFFIXES = {'.py', '.md', '.yml', '.yaml', '.sh', '.c'}
MAX_LINES = 400  # of a Python file

# Pattern (matched within words joined by underscores too) -> the field's term.
RETIRED = {
  r'told': 'conditioned on, given',
  r'paint(s|er|ers|ed|ing|ings)?': 'generate, sample; ImageGenerator',
  r'canvas(es)?': 'image, sampler',
  r'manners?': 'options, config',
  r'judg(e|es|ed|ing)': 'feature extractor; evaluate, score, detect',
  r'besides?': 'next to, in addition to, with; concatenated',
  # 'seen' in quotes names the classes of the training set, as zero-shot learning does (an emoji split, an evaluator).
  r'(?<![\'"/])seen(?![\'"/=]|\.png)': 'input; trained on, in training',
  r'worth': 'the metric',
  r'from nothing': 'from scratch',
  r'side by side': 'unrolled',
  r'learnt': 'learned',
  r'(go|goes|going|went|gone) on': 'resume, continue',
  r'born': 'initialized',
  r'pictures?': 'image',
  r'steer(s|ed|ing)?': 'control, condition',
  r'holes?': 'mask, masked region',
  r'chances?': 'probability; baseline',
  r'rivals?|contestants?': 'baseline, library',
  r'(a|another|new|two|three|same) hands?': 'artist',
  r'(does|do) not divide': 'is not divisible by',
  r'(?<!there )is no(?! (longer|more|less|doubt))': 'is not a',
  r'(a|the|this|its|what) share of': 'fraction of',
  r'what became of': 'say the result',
  r'the house|one room|one door': 'architecture, module, entry point',
  r'what (the|a|an|its|our) \w+ says?': 'output',
}
PATTERN = re.compile(
  '|'.join(rf'(?P<w{i}>(?<![A-Za-z])(?:{word})(?![A-Za-z]))' for i, word in enumerate(RETIRED)), re.IGNORECASE
)
OPENING = re.compile(r'(What|How|Where|Which|Whether)\b')  # a docstring begins with a verb or the field's noun

# (file, exact text of the line without its indentation): quotations and names that are not ours.
ALLOWED: set[tuple[str, str]] = {
  (
    'CONTRIBUTING.md',
    '5. Write "is not an X" instead of "is no X", "Y is not divisible by X" (which one is divided is then clear).',
  ),
  ('fmcv_jax/config_aliases.py', "'beside': ('extra_in_channels',),"),
  ('fmcv_jax/config_aliases.py', "'holes': ('image_condition.inpainting',),"),
  ('fmcv_jax/config_aliases.py', "'judge': ('feature_extractor',),"),
  ('tests/test_config_aliases.py', "('image_condition', 'inpainting'): ('inpainting', 'holes'),"),
}


class Finding(NamedTuple):
  path: str
  line: int
  text: str


def files() -> Iterator[pathlib.Path]:
  """All files that are checked, this one left out."""
  inside = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob('*')) if path.suffix in SUFFIXES)
  for path in (*inside, *(path for pattern in FILES for path in sorted(ROOT.glob(pattern)))):
    if path.is_file() and path != pathlib.Path(__file__).resolve():
      yield path


def findings(path: pathlib.Path) -> Iterator[Finding]:
  name, text = str(path.relative_to(ROOT)), path.read_text()
  lines = text.splitlines()
  for number, line in enumerate(lines, 1):
    if (name, line.strip()) in ALLOWED or (name == 'CHANGELOG.md' and line.startswith('| `')):  # old names
      continue
    for match in PATTERN.finditer(line):
      term = list(RETIRED.values())[int(match.lastgroup[1:])]
      yield Finding(name, number, f'{match[0]!r} is retired: {term}')
  if path.suffix == '.py':
    if len(lines) > MAX_LINES:
      yield Finding(name, len(lines), f'{len(lines)} lines; at most {MAX_LINES}')
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        opening = OPENING.match(ast.get_docstring(node) or '')
        if opening and not name.startswith('tests/'):
          yield Finding(name, node.body[0].lineno, f'docstring begins with {opening[0]!r}: use a verb or a noun')


def main(arguments: list[str]) -> int:
  given = [pathlib.Path(name).resolve() for name in arguments if not name.startswith('--')]
  found = [finding for path in given or files() for finding in findings(path)]
  if '--summary' in arguments:
    for path, count in Counter(finding.path for finding in found).most_common():
      print(f'{count:5}  {path}')
  else:
    for finding in found:
      print(f'{finding.path}:{finding.line}: {finding.text}')
  if found:
    print(f'{len(found)} findings in {len({finding.path for finding in found})} files', file=sys.stderr)
  return bool(found)


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
