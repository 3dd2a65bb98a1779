"""Whole runs without labels: views from files to the teacher, an exact resumption, and every evaluator of features."""

import pytest

from fmcv_jax import experiment, trainer
from fmcv_jax.train.storage import read_metrics
from tests import runs

pytestmark = pytest.mark.slow


def config_of(kind, folder):
  source = {'name': 'image_folder', 'path': str(folder)}
  encoder = {'name': 'vit', 'variant': 'mu/8', 'image_size': 32, 'depth': 1, 'mask_token': kind == 'dino'}
  crop = {'name': 'random_resized_crop', 'size': 32}
  if kind == 'dino':
    network = {'name': 'dino', 'encoder': encoder, 'prototypes': 16, 'hidden': 16, 'bottleneck': 8}
    objective = {'name': 'dino', 'network': network, 'local_views': 1, 'local_size': 16}
    objective |= {'patch_weight': 1.0, 'koleo_weight': 0.1, 'freeze_steps': 2}
    views = {'global_views': {'count': 2, 'image': crop}, 'local_views': {'count': 1, 'image': {**crop, 'size': 16}}}
    data = {'source': source, 'views': views}
  else:
    network = {'name': 'mae', 'encoder': {**encoder, 'pos_embed': 'sincos2d'}, 'width': 16, 'depth': 1, 'num_heads': 2}
    objective, data = {'name': 'mae', 'network': network}, {'source': source, 'image': crop}
  features = {'data': {'source': source, 'image': {'name': 'resize', 'size': 32}}, 'batch_size': 16}
  banked = {**features, 'train_data': features['data']}
  return experiment.resolve(
    {
      'objective': objective,
      'data': data,
      'evaluators': {
        'knn': {'name': 'knn', 'ks': (1,), **banked},
        'ridge': {'name': 'linear_probe', **banked},
        'few': {'name': 'few_shot', 'ways': 3, 'shots': (1,), 'episodes': 10, **features},
      },
      'optimizer': {'schedule': {'name': 'cosine', 'peak_lr': 3e-3, 'warmup_steps': 2}, 'weight_decay_end': 0.4},
      'train': {'steps': 6, 'batch_size': 16},
      'log': {'every': 1, 'tensorboard': False},
    }
  )


@pytest.mark.parametrize('kind', ['dino', 'mae'])
def test_resumed_run_is_bitwise_equal_and_its_features_are_evaluated(kind, tmp_path):
  config = config_of(kind, runs.image_folder(tmp_path / 'images'))
  straight = trainer.train(config, tmp_path / 'straight')
  runs.stopped(config, tmp_path / 'stopped', 3)
  resumed = trainer.train(config, tmp_path / 'stopped')
  runs.assert_bitwise_equal(straight, resumed)
  last = read_metrics(tmp_path / 'straight' / 'metrics.jsonl')[-1]
  assert {'knn/k1_top1', 'ridge/top1', 'few/3_way_1_shot'} <= last.keys()
  assert last['knn/k1_top1'] == 1.0  # each image is its own neighbor
