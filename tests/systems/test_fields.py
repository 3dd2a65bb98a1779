"""Fields of records from outside of the package, compared with what the objective expects."""

import dataclasses

import numpy as np
import pytest

from fmcv_jax import trainer
from fmcv_jax.errors import UserError
from tests.systems import test_clips
from tests.systems.sources import MovingBars


@dataclasses.dataclass(frozen=True)
class FloatBars(MovingBars):
  """The same clips in [0, 1]."""

  def __getitem__(self, index: int):
    record = super().__getitem__(index)
    return {**record, 'image': record['image'].astype(np.float32) / 255}


def test_images_in_0_to_1_are_refused_where_bytes_are_expected(tmp_path):
  config = test_clips.config()
  config['data']['source'] = {'name': 'tests.systems.test_fields:FloatBars', 'count': 32}
  message = r'config\.data gives image of dtype float32, but the objective expects uint8'
  with pytest.raises(UserError, match=message):
    trainer.train(config, tmp_path)
