"""Where the members of a tar file lie: POSIX (ustar and pax) and GNU headers, read without the data between them."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
_FILES = (b'0', b'\0', b'7')
_MODEST = 1 << 20  # bytes of a header's own extension


class Member(NamedTuple):
  """`header` is where all that belongs to it begins, its data are the bytes from `start` to `start + size`."""

  name: str
  header: int
  start: int
  size: int


class TarDamaged(Exception):
  """The file ends too early, or is no tar; all members that came before are whole."""

  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


def members(read: Callable[[int, int], bytes], size: int) -> Iterator[Member]:
  """Every regular file in a tar of `size` bytes, of which read(start, count) gives a piece.

  Raises TarDamaged after the last member that is whole, if the archive's end mark does not follow.
  """
  at, begin = 0, 0
  extended: dict[str, str] = {}  # by the headers before a member's own
  while True:
    header = read(at, BLOCK)
    if len(header) < BLOCK:
      raise TarDamaged(f'it is truncated: {size} bytes, and no end mark' if at else f'it is empty: {size} bytes')
    if not any(header):
      return
    if not is_header(header):
      raise TarDamaged(f'there is no tar header at byte {at}')
    kind, length = header[156:157], int(extended.get('size', 0)) or _number(header[124:136])
    start, after = at + BLOCK, at + BLOCK + -(-length // BLOCK) * BLOCK
    if start + length > size:
      raise TarDamaged(f'it is truncated: a member goes on to byte {start + length} of {size}')
    if kind in (b'x', b'L', b'K', b'g'):
      if length > _MODEST:
        raise TarDamaged(f'the header at byte {at} has an extension of {length} bytes')
      if kind == b'x':
        extended |= _pax(read(start, length))
      elif kind == b'L':
        extended['path'] = read(start, length).rstrip(b'\0').decode('utf-8', 'replace')
    else:
      if kind in _FILES:
        yield Member(extended.get('path') or name_in(header), begin, start, length)
      extended, begin = {}, after
    at = after


def is_header(block: bytes) -> bool:
  """Whether 512 bytes are a tar header, by its checksum."""
  try:
    return len(block) == BLOCK and sum(block[:148]) + 256 + sum(block[156:]) == int(block[148:156].strip(b' \0'), 8)
  except ValueError:
    return False


def size_in(block: bytes) -> int | None:
  """The size that a tar header gives of its member; None for what is no header."""
  return _number(block[124:136]) if is_header(block) else None


def name_in(header: bytes) -> str:
  name, prefix = (part.split(b'\0')[0].decode('utf-8', 'replace') for part in (header[:100], header[345:500]))
  return f'{prefix}/{name}' if prefix and header[257:263] == b'ustar\0' else name


def _number(field: bytes) -> int:
  if field[0] & 0x80:  # GNU's way with 8 GiB and more
    return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], 'big')
  try:
    return int(field.strip(b' \0') or b'0', 8)
  except ValueError as error:
    raise TarDamaged(f'a header gives its size as {field!r}') from error


def _pax(data: bytes) -> dict[str, str]:
  """The records 'length key=value' of a pax header."""
  found: dict[str, str] = {}
  while data:
    length, space, _ = data.partition(b' ')
    if not space or not length.isdigit() or not 0 < int(length) <= len(data):
      raise TarDamaged('a pax header is damaged')
    key, _, value = data[len(length) + 1 : int(length) - 1].partition(b'=')
    found[key.decode('utf-8', 'replace')] = value.decode('utf-8', 'replace')
    data = data[int(length) :]
  return found
