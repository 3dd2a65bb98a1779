"""ALIGN at 289 px on your own noisy pairs (Jia et al. 2021, section 5.1): EfficientNet-L2 and BERT-Large.

Published after 1.2 M steps of 16,384 of 1.8 B private pairs, on 1024 TPUv3 cores: zero-shot ImageNet-1k top-1 76.4,
Flickr30k R@1 88.6 (image to text) and 75.7 (text to image), COCO 58.6 and 45.6. Not measured here. B7 is the size of
Kakao's align-base, with BERT-Base.

Counted for 289 pixels and 64 tokens: L2 873 M parameters, 69.9 + 19.5 GMAC a pair, 8.8 PFLOP a step; B7 224.5 M, 9.6 +
5.5 GMAC, 1.5 PFLOP. Compiled for its pod (fifteen CPU minutes) B7 takes 4.1 GiB of a chip and 823 ms a step by the
compiler's cycles, 4 % of the chip's peak: convolutions of one channel each have no products, and their maps are written
and read again. L2's pod is an estimate.

Pairs are ArrayRecord shards below data/pairs/train and data/pairs/val; any other source is one override away. The
vocabulary is trained on the captions; batch norms take their statistics from the global batch.

    fmcv train --config configs/align.py:L2 --workdir gs://BUCKET/align_l2
"""

import ml_collections

BATCH = 16_384
STEPS = 1_200_000
PODS = {'B7': 'v5e:16x16', 'L2': 'v5p:8x8x8'}


def get_config(variant='L2'):
  size = 289
  c = ml_collections.ConfigDict()
  c.objective = dict(
    name='contrastive',
    label_smoothing=0.1,
    augment=(dict(name='flip'),),
    network=dict(name='align', variant=variant, image_size=size, dtype='bfloat16', remat='full'),
  )
  pairs = dict(name='array_record', path='data/pairs/train')
  c.tokenizer = dict(name='bpe', vocab_size=100_000, length=64, corpus=pairs)
  # The published crop is one of 289 x 289 out of 346 x 346: 0.7 of the area.
  crop = dict(name='random_resized_crop', size=size, scale=(0.7, 0.7), ratio=(1.0, 1.0))
  c.data = dict(source=pairs, image=crop, workers=16)
  c.evaluators = dict(
    retrieval=dict(
      name='retrieval',
      every=20_000,
      batch_size=1024,
      data=dict(
        source=dict(name='array_record', path='data/pairs/val'),
        image=dict(name='resize_crop', size=size, crop=size / 346),
        workers=16,
      ),
    )
  )
  c.optimizer = dict(
    rule=dict(name='lamb'),
    schedule=dict(name='linear', peak_lr=1e-3, warmup_steps=10_000),
    weight_decay=1e-5,
  )
  c.train = dict(steps=STEPS, batch_size=BATCH)
  c.checkpoint = dict(every=5000)
  c.mesh = dict(data=-1, fsdp=8)  # the narrowest layers have 8 x an odd number of channels
  c.topology = PODS[variant]
  return c
