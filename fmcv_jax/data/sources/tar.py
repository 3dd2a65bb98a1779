"""Locates the members of a tar file from its POSIX (ustar and pax) and GNU headers, without reading their data."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
_FILES = (b'0', b'\0', b'7')
_MAX_EXTENSION = 1 << 20  # bytes of a header extension


class Member(NamedTuple):
  """A member: `header` is the offset of its first header block, its data are bytes `start` to `start + size`."""

  name: str
  header: int
  start: int
  size: int


class TarDamaged(Exception):
  """The file is truncated or not a tar; the members yielded before are complete."""

  def __init__(self, reason: str):
    super().__init__(reason)
    self.reason = reason


def members(read: Callable[[int, int], bytes], size: int) -> Iterator[Member]:
  """Yields every regular file in a tar of `size` bytes; read(start, count) returns bytes of it.

  Raises TarDamaged after the last complete member if the end-of-archive marker is missing.
  """
  at, begin = 0, 0
  extended: dict[str, str] = {}  # from extension headers that precede the header of a member
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
      raise TarDamaged(f'it is truncated: a member ends at byte {start + length} of {size}')
    if kind in (b'x', b'L', b'K', b'g'):
      if length > _MAX_EXTENSION:
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
  """True if 512 bytes are a tar header, by its checksum."""
  try:
    return len(block) == BLOCK and sum(block[:148]) + 256 + sum(block[156:]) == int(block[148:156].strip(b' \0'), 8)
  except ValueError:
    return False


def size_in(block: bytes) -> int | None:
  """The member size in a tar header, in bytes; None if the block is not a header."""
  return _number(block[124:136]) if is_header(block) else None


def name_in(header: bytes) -> str:
  """Member name in a tar header of 512 bytes, with the prefix field of ustar."""
  name, prefix = (part.split(b'\0')[0].decode('utf-8', 'replace') for part in (header[:100], header[345:500]))
  return f'{prefix}/{name}' if prefix and header[257:263] == b'ustar\0' else name


def _number(field: bytes) -> int:
  if field[0] & 0x80:  # GNU base-256 encoding of 8 GiB and more
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
