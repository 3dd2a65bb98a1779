#!/bin/bash
# webdataset 1.0.2: a member whose name begins with a dot neither starts nor ends a sample, so two samples can become one.
#
# Samples are runs of members with the same base name. A hidden file between two members of the same base name, such as
# '.marker' or what a desktop leaves behind, is skipped without ending the sample: the members on both sides are joined. A
# reader that groups by "the name changed" counts two samples there, and rows of two programs over one tar no longer agree.
#
# Observed on 2026-11-30 with Python 3.11: members a.txt, .marker, a.cls give one sample with txt and cls; with marker.txt
# between them they are three samples.
# Exits with 0 while that holds, and with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'webdataset==1.0.2'
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import io
import tarfile

import webdataset


def samples(names):
  with tarfile.open('set.tar', 'w') as tar:
    for name in names:
      data = name.encode()
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  read = webdataset.WebDataset('set.tar', shardshuffle=False)
  return [sorted(key for key in sample if not key.startswith('__')) for sample in read]


hidden, visible = samples(['a.txt', '.marker', 'a.cls']), samples(['a.txt', 'marker.txt', 'a.cls'])
print('hidden file between:', hidden, 'visible file between:', visible)
assert hidden == [['cls', 'txt']]
assert visible == [['txt'], ['txt'], ['cls']]
PYTHON
