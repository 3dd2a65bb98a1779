"""Feature quality of one small ViT on scattered digits, trained with and without labels.

Digits have random positions and sizes; classifiers are fitted to the features of 1,437 scenes and evaluated on 1,440
held-out scenes with held-out digits. Measured on 2 busy cores (seed 0; CPU minutes include training and evaluation):

| method     | steps x batch | CPU minutes | k-NN  | ridge | logistic regression | own answers |
|------------|---------------|-------------|-------|-------|---------------------|-------------|
| raw pixels |               |             | 0.485 | 0.156 |                     |             |
| untrained  |               |             | 0.321 | 0.347 | 0.323               |             |
| mae        | 1000 x 128    | 1.5         | 0.191 | 0.308 | 0.274               |             |
| dino       | 600 x 64      | 1.9         | 0.524 | 0.341 | 0.365               |             |
| supervised | 300 x 128     | 0.8         | 0.776 | 0.767 | 0.785               | 0.758       |
| mae_tuned  | 300 x 128     | 0.5         | 0.836 | 0.813 | 0.838               | 0.819       |
| dino_tuned | 300 x 128     | 1.5         | 0.839 | 0.818 | 0.862               | 0.826       |

    make demo-features        # all of them, and their table
    fmcv train --config configs/demo/features.py:dino --workdir runs/features/dino
"""

import ml_collections

from fmcv_jax.dataset_statistics import SCATTERED_DIGITS

SIZE, SMALL = 20, 12
STEPS = dict(untrained=1, mae=1000, dino=600, supervised=300, mae_tuned=300, dino_tuned=300)
PEAK = dict(untrained=1e-12, mae=6e-3, dino=3e-3, supervised=6e-3, mae_tuned=6e-3, dino_tuned=6e-3)
ENCODER = dict(mae_tuned=('mae', 'params/encoder'), dino_tuned=('dino', 'extra/teacher/encoder'))  # of which run

NETWORK = dict(
  name='vit',
  variant='mu/4',
  image_size=SIZE,
  width=64,
  depth=3,
  num_heads=4,
  mlp_dim=256,
  pool='gap',
  pos_embed='sincos2d',
  activation='quick_gelu',
  unroll=3,
)
AFFINE = dict(name='affine', scale=(0.8, 1.25), ratio=(0.8, 1.25), rotation=15.0, translate=0.1, shear=0.2, fill=0.0)


def get_config(method='dino'):
  c = ml_collections.ConfigDict()
  digits = dict(name='scattered', size=SIZE, clutter=0)
  labels = method in ('supervised', *ENCODER)
  # 64 scenes of each digit to learn from without labels, one with its label.
  c.data = dict(source=dict(digits, copies=1 if labels else 64))
  if method == 'mae':
    network = dict(name='mae', encoder=NETWORK, width=32, depth=1, num_heads=4)
    c.objective = dict(name='mae', network=network, norm_pix_loss=False, normalize=SCATTERED_DIGITS)
  elif method == 'dino':
    c.objective = dict(
      name='dino',
      network=dict(name='dino', encoder=NETWORK, prototypes=128, hidden=128, bottleneck=64, learn_prototype_norms=True),
      momentum=0.95,
      local_crops_number=2,
      local_size=SMALL,
      # Of an untrained network all scores are alike: at 0.05 its targets are, too, and hundreds of steps teach nothing.
      centering='sinkhorn_knopp',
      teacher_temperature=(0.02, 0.02),
      koleo_weight=0.5,
      global_augments=((AFFINE,), (AFFINE,)),
      local_augment=(AFFINE,),
      normalize=SCATTERED_DIGITS,
    )
    crop = dict(name='random_resized_crop')
    c.data.views = dict(
      global_views=dict(count=2, image=dict(crop, size=SIZE, scale=(0.5, 1.0))),
      local_crops_number=dict(count=2, image=dict(crop, size=SMALL, scale=(0.3, 0.6))),
    )
  else:
    c.objective = dict(
      name='classification', network=dict(NETWORK, num_classes=10), augment=(AFFINE,), normalize=SCATTERED_DIGITS
    )
  if method in ENCODER:
    run, part = ENCODER[method]
    c.init_from = dict(params=dict(workdir=f'runs/features/{run}', part=part, skip=('head/.*',)))
  test = dict(data=dict(source=dict(digits, split='test', copies=4)))
  asked = dict(test, train_data=dict(source=dict(digits, copies=1)))
  c.evaluators = dict(
    knn=dict(asked, name='knn', ks=(10,)),
    ridge=dict(asked, name='linear_probe'),
    logistic=dict(asked, name='linear_probe', method='logistic', strengths=(1e-4, 1e-3, 1e-2)),
    pixels_knn=dict(asked, name='knn', ks=(10,), features='pixels'),  # what features have to beat
    pixels_ridge=dict(asked, name='linear_probe', features='pixels'),
  )
  if labels:
    c.evaluators.answers = dict(test, name='accuracy')
  c.optimizer = dict(
    rule=dict(name='muon'),
    schedule=dict(name='cosine', peak_lr=PEAK[method], warmup_steps=min(50, STEPS[method] // 2)),
    weight_decay=0.05,
    clip_norm=1.0,
  )
  c.train = dict(steps=STEPS[method], batch_size=64 if method == 'dino' else 128)
  c.log = dict(every=50)
  return c
