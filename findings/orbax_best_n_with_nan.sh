#!/bin/bash
# orbax-checkpoint 0.12.8: BestN(n=1) drops the best checkpoint when a metric is NaN.
#
# A NaN metric (one diverged evaluation is enough) compares false with every number, so the sort by which BestN ranks
# checkpoints leaves the list in the order in which it came, and the last entry counts as the best. Of the metrics 0.9,
# NaN, 0.3 the policy preserves the checkpoint with 0.3 and lets the one with 0.9 be deleted. One would expect NaN to be
# ranked last, or refused.
#
# Observed on 2026-11-30 with Python 3.11: preserved [False, False, True]; without the NaN [True, False].
# Exits with 0 while that holds, and with 1 once it changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check 'orbax-checkpoint==0.12.8' 'jax==0.10.2' 'flax==0.12.8'
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PYTHON'
import datetime
import math
import types

from orbax.checkpoint import checkpoint_managers


def preserved(values):
  policy = checkpoint_managers.BestN(get_metric_fn=lambda metrics: metrics['accuracy'], n=1)
  infos = [
    types.SimpleNamespace(step=step, metrics={'accuracy': value}, time=datetime.datetime(2026, 1, 1))
    for step, value in enumerate(values)
  ]
  return list(policy.should_preserve(infos, context=None))


with_nan, without = preserved([0.9, math.nan, 0.3]), preserved([0.9, 0.3])
print('with NaN', with_nan, 'without', without)
assert (with_nan, without) == ([False, False, True], [True, False])
PYTHON
