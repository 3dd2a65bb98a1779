"""Every family of the understanding half: the same losses whatever splits it, and a stop that leaves no trace."""

import functools

import numpy as np
import pytest

from fmcv_jax import experiment, trainer
from fmcv_jax.augment.geometry import Flip
from fmcv_jax.augment.three_augment import ThreeAugment
from fmcv_jax.models.backbones.efficientnet import EfficientNet, Row
from fmcv_jax.models.backbones.swin import swin
from fmcv_jax.models.backbones.text import text_transformer
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.dense.segmenter import segmenter
from fmcv_jax.models.multimodal.captioner import cappa, coca
from fmcv_jax.models.multimodal.dual_encoder import DualEncoder
from fmcv_jax.models.multimodal.prefix_lm import paligemma
from fmcv_jax.models.self_supervised.dino import dino
from fmcv_jax.models.self_supervised.mae import mae
from fmcv_jax.objectives.adapted import Lora, PartialFineTuning
from fmcv_jax.objectives.contrastive import Contrastive
from fmcv_jax.objectives.contrastive_captioning import ContrastiveCaptioning
from fmcv_jax.objectives.dino import SelfDistillation
from fmcv_jax.objectives.distillation import Distillation
from fmcv_jax.objectives.language import Language, SpecialIds
from fmcv_jax.objectives.mae import MaskedAutoencoding
from fmcv_jax.objectives.segmentation import Segmentation
from tests import runs
from tests.train.tiny import MESHES, Trainer, batch_of, classification

pytestmark = pytest.mark.slow

VIT = functools.partial(vit, 'mu/8', image_size=16, depth=1)
BERT = {'causal': False, 'pool': 'first', 'attend_padding': False, 'head_bias': True, 'post_norm': True}
FAMILIES = {
  'mae': lambda: MaskedAutoencoding(mae(VIT(pos_embed='sincos2d'), width=16, depth=1, num_heads=2), hidden=0.5),
  'dino': lambda: SelfDistillation(
    dino(VIT(), prototypes=16, hidden=16, bottleneck=8), local_crops_number=1, local_size=8, momentum_steps=4
  ),
  'dinov2': lambda: SelfDistillation(
    dino(
      VIT(mask_token=True, registers=1, gated_mlp=True, activation='silu', layer_scale=0.1),
      prototypes=16,
      hidden=16,
      bottleneck=8,
      learn_prototype_norms=True,
    ),
    local_crops_number=1,
    local_size=8,
    momentum_steps=4,
    targets='sinkhorn',
    ibot_loss_weight=1.0,
    koleo_weight=0.1,
  ),
  'deit': lambda: classification(VIT(num_classes=10, distilled=True), distillation=Distillation(VIT(num_classes=10))),
  'deit iii': lambda: classification(
    VIT(num_classes=10, class_token_has_position=False, layer_scale=0.1, drop_path=0.2, drop_path_rise=False),
    loss_name='sigmoid',
    mixup=0.8,
    cutmix=1.0,
    augment=(ThreeAugment(),),
  ),
  'lora': lambda: PartialFineTuning(classification(VIT(num_classes=10)), trainable=('head/.*',), lora=Lora(rank=2)),
  'swin': lambda: classification(swin('mu', image_size=16, patch_size=2, window=4, num_classes=10)),
  'align': lambda: Contrastive(
    DualEncoder(
      EfficientNet((Row(1, 16, 3, 2, 2),), stem=8, top=0, image_size=16),
      text_transformer(64, 8, 16, 1, 2, num_classes=16, **BERT),
      1.0,
    ),
    label_smoothing=0.1,
  ),
  'language': lambda: Language(
    paligemma('paligemma2_mu', image_size=16, vocab_size=64, length=8), 0.1, special=SpecialIds(0, 1, 4)
  ),
  'coca': lambda: ContrastiveCaptioning(
    coca('mu/8', image_size=16, vocab_size=64, length=8), label_smoothing=0.1, special=SpecialIds(0, 1, None)
  ),
  'cappa': lambda: Language(
    cappa('mu/8', image_size=16, vocab_size=64, length=8, depth=1),
    parallel_fraction=0.75,
    special=SpecialIds(0, 1, None),
  ),
  'segmentation': lambda: Segmentation(segmenter(VIT(), 11), augment=(Flip(),)),
}


@pytest.mark.parametrize('family', FAMILIES)
def test_losses_are_those_of_one_device_however_the_model_is_split(family):
  objective = FAMILIES[family]()
  batches = [batch_of(objective, seed) for seed in range(3)]
  one = Trainer(objective, devices=1).run(batches)
  assert len(set(one)) == 3
  for name, mesh in MESHES.items():
    np.testing.assert_allclose(Trainer(objective, mesh).run(batches), one, rtol=2e-5, err_msg=name)


NETWORKS = {
  'deit': {'name': 'vit', 'variant': 'mu/8', 'image_size': 16, 'depth': 1, 'num_classes': 3, 'distilled': True},
  'deit iii': {'name': 'vit', 'variant': 'mu/8', 'image_size': 16, 'depth': 1, 'num_classes': 3, 'layer_scale': 1e-4},
  'swin': {
    'name': 'swin',
    'variant': 'mu',
    'image_size': 16,
    'patch_size': 2,
    'window': 4,
    'num_classes': 3,
    'drop_path': 0.2,
  },
  'efficientnet': {'name': 'efficientnet', 'variant': 'mu', 'image_size': 16, 'num_classes': 3, 'dropout': 0.2},
}


def config_of(family, folder):
  if family == 'language':
    return runs.language(folder)
  if family == 'align':
    config = runs.contrastive(folder)
    network = {'name': 'align', 'variant': 'mu', 'image_size': 16, 'vocab_size': 300, 'length': 8}
  else:
    config, network = runs.classification(folder), NETWORKS[family]
  objective = {**config['objective'], 'network': network}
  if family == 'deit':
    teacher = {'name': 'vit', 'variant': 'mu/8', 'image_size': 16, 'depth': 1, 'num_classes': 3}
    objective['distillation'] = {'teacher': teacher}
  if family == 'deit iii':
    objective |= {'loss_name': 'sigmoid', 'cutmix': 1.0, 'augment': ({'name': 'three_augment'},)}
    config = {**config, 'optimizer': {**config['optimizer'], 'rule': {'name': 'lamb'}}}
  return experiment.resolve({**config, 'objective': objective, 'train': {**config['train'], 'steps': 4}})


@pytest.mark.parametrize('family', [*NETWORKS, 'align', 'language'])
def test_a_resumed_run_is_bitwise_the_one_that_never_stopped(family, tmp_path):
  config = config_of(family, runs.image_folder(tmp_path / 'images'))
  straight = trainer.train(config, tmp_path / 'straight')
  runs.stopped(config, tmp_path / 'stopped', 2)
  resumed = trainer.train(config, tmp_path / 'stopped')
  assert ('batch_stats' in straight.extra) == (family in ('efficientnet', 'align'))
  runs.assert_bitwise_equal(straight, resumed)
