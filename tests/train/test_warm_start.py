"""Parts of one run become parts of another: by path, with what is skipped left as it was born."""

import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.errors import UserError
from fmcv_jax.train.state import TrainState
from fmcv_jax.train.warm_start import Part, begin_with


def born():
  params = {'encoder': {'head': {'bias': jnp.zeros(3)}, 'patch': jnp.zeros((2, 2))}, 'scale': jnp.zeros(())}
  extra = {'teacher': {'patch': jnp.zeros((2, 2))}, 'centre': jnp.zeros(4)}
  zero = jnp.zeros((), jnp.int32)
  return TrainState(
    step=zero, skipped=zero, streak=zero, rng=zero, params=params, opt_state={}, extra=extra, ema=params
  )


LEARNT = {
  'runs/a': {'params': {'patch': jnp.full((2, 2), 3.0), 'head': {'bias': jnp.full(5, 3.0)}}, 'extra': {}},
  'runs/b': {'params': {'vision': {'patch': jnp.full((2, 2), 4.0)}}, 'extra': {'centre': jnp.full(4, 5.0)}},
}


def test_parts_of_several_runs_fill_parameters_and_what_is_carried_along():
  state = begin_with(
    born(),
    {
      'params/encoder': Part('runs/a', skip=('head/.*',)),
      'extra/teacher': Part('runs/b', 'params/vision'),
      'extra/centre': Part('runs/b', 'extra/centre'),
    },
    LEARNT.__getitem__,
  )
  np.testing.assert_array_equal(state.params['encoder']['patch'], 3.0)
  np.testing.assert_array_equal(state.ema['encoder']['patch'], 3.0)
  np.testing.assert_array_equal(state.params['encoder']['head']['bias'], 0.0)
  np.testing.assert_array_equal(state.params['scale'], 0.0)
  np.testing.assert_array_equal(state.extra['teacher']['patch'], 4.0)
  np.testing.assert_array_equal(state.extra['centre'], 5.0)


@pytest.mark.parametrize(
  ('target', 'part', 'message'),
  [
    ('params/encoder', Part('runs/a'), r'init_from\.params/encoder: head/bias is \(5,\) in runs/a and \(3,\) here'),
    ('params/encoder', Part('runs/b', 'params/vision'), 'head/bias is missing in runs/b .* add a pattern for it to'),
    ('extra/techer', Part('runs/a'), r"the state of this run has nothing at 'extra/techer'; did you mean 'extra/teach"),
    ('extra/teacher', Part('runs/b', 'params/vison'), r"runs/b has nothing at 'params/vison'; did you mean 'params/vi"),
  ],
)
def test_what_is_not_there_or_does_not_fit_is_named(target, part, message):
  with pytest.raises(UserError, match=message):
    begin_with(born(), {target: part}, LEARNT.__getitem__)
