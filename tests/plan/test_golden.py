import importlib.metadata
import json

import pytest

from tests.plan import golden


def test_a_changed_sharding_is_reported_number_by_number():
  before = {'temporaries, MiB': 100.0, 'all-gather over fsdp, times': 4, 'all-reduce over data, times': 1}
  now = {'temporaries, MiB': 101.0, 'all-gather over fsdp, times': 8, 'all-to-all over data, times': 2}
  assert golden.differences(before, now, tolerance=0.02) == [
    'all-gather over fsdp, times: was 4, is 8',
    'all-reduce over data, times: was 1, is None',
    'all-to-all over data, times: was None, is 2',
  ]


FAST = 'CLIP L/14 on v5p'  # the others take minutes each to compile


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
  'name', [pytest.param(name, marks=() if name == FAST else pytest.mark.slow) for name in golden.CASES]
)
def test_a_pod_run_stores_and_sends_what_the_golden_file_says(name):
  pytest.importorskip('libtpu')
  written = json.loads(golden.FILE.read_text())
  if written['libtpu'] != importlib.metadata.version('libtpu'):
    pytest.skip(f'the figures are those of libtpu {written["libtpu"]}')
  assert not golden.differences(written['runs'][name], golden.figures(golden.CASES[name]), tolerance=0.02)
