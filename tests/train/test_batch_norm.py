"""Running statistics are those of the global batch: the same on any mesh, and in any number of steps."""

import jax
import numpy as np
import pytest

from fmcv_jax.models.backbones.efficientnet import EfficientNet, Row
from fmcv_jax.models.backbones.text import text_transformer
from fmcv_jax.models.multimodal.dual_encoder import DualEncoder
from fmcv_jax.objectives.contrastive import Contrastive
from fmcv_jax.parallel.mesh import MeshShape
from tests.train.tiny import Trainer, batch_of


def tiny_align():
  image = EfficientNet((Row(2, 16, 3, 2, 2),), stem=8, top=0, image_size=16, drop_path=0.3)
  text = text_transformer(
    64, 8, 16, 1, 2, causal=False, pool='first', attend_padding=False, num_classes=16, head_bias=True, post_norm=True
  )
  return Contrastive(DualEncoder(image, text, 1.0), label_smoothing=0.1)


@pytest.mark.slow
def test_align_trains_equally_on_one_device_and_on_eight_with_the_same_statistics():
  objective = tiny_align()
  one, eight = Trainer(objective, devices=1), Trainer(objective, MeshShape(data=2, fsdp=2, tensor=2))
  losses = [trainer.run([batch_of(objective)]) for trainer in (one, eight)]
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
  statistics = [jax.device_get(trainer.state.extra['batch_stats']) for trainer in (one, eight)]
  for a, b in zip(*(jax.tree.leaves(tree) for tree in statistics), strict=True):
    np.testing.assert_allclose(b, a, rtol=2e-5, atol=1e-8)
  assert abs(statistics[0]['image']['norm']['mean']).min() > 0
  expand = eight.state.params['image']['stage1']['blocks']['expand']['kernel']
  assert expand.shape == (1, 16, 32)
  assert expand.addressable_shards[0].data.shape == (1, 8, 16)
  # From here on Adam moves what a following norm takes away again, whose gradient is but rounding, at random.
  losses = [trainer.run([batch_of(objective, seed) for seed in (1, 2, 3)]) for trainer in (one, eight)]
  np.testing.assert_allclose(losses[1], losses[0], rtol=2e-5)


@pytest.mark.slow
def test_microbatches_average_their_statistics_and_embed_twice_alike():
  """The gradient is that of embeddings computed with the statistics of each microbatch."""
  objective = tiny_align()
  trainer = Trainer(objective, microbatches=2)
  losses = trainer.run([batch_of(objective, seed) for seed in range(3)])
  assert np.isfinite(losses).all()
  assert np.isfinite(trainer.metrics['gradient_norm'])
