"""PaliGemma and PaliGemma 2, fine-tuned for captions or questions (Beyer et al. 2024, appendix J; Steiner et al. 2024).

Published after these fine-tunings, at 224 and 448 pixels: CIDEr of COCO captions 141.9 and 144.6, accuracy on VQAv2
83.2 and 85.6 (PaliGemma 3B). Not measured here. Batches of 256, peak learning rate 1e-5, cosine with 5 % of warm-up,
Adam with b2 = 0.999, gradients clipped at 1; captions 5 epochs, questions 10. The published weight decay of 1e-6 is not
multiplied by the peak learning rate (big_vision/optax.py); that of optax is, so it is 0.1 here.

    fmcv import paligemma2-3b-pt-448 --to runs/paligemma2
    fmcv train --config configs/paligemma.py:paligemma2_3b,448,captions --workdir runs/captions \
        --config.init_from.params.workdir=runs/paligemma2 \
        --config.tokenizer.words.file=paligemma2-3b-pt-448/tokenizer.json
"""

import ml_collections

from fmcv_jax.dataset_statistics import HALF

EPOCHS = {'captions': 5, 'questions': 10}
RECORDS = {'captions': 118_287, 'questions': 443_757}  # images of COCO train2017, and questions of VQAv2's train2014
PROMPTS = {'captions': 'caption en\n{}', 'questions': 'answer en {}'}
LENGTHS = {'captions': 48, 'questions': 64}
BATCH = 256


def source(task, split):
  if task == 'captions':
    return dict(
      name='coco_captions', annotations=f'coco/annotations/captions_{split}2017.json', images=f'coco/{split}2017'
    )
  return dict(
    name='vqa',
    questions=f'vqa/v2_OpenEnded_mscoco_{split}2014_questions.json',
    annotations=f'vqa/v2_mscoco_{split}2014_annotations.json',
    images=f'coco/{split}2014',
  )


def get_config(variant='paligemma_3b,224,captions'):
  model, size, task = variant.split(',')
  size, length = int(size), LENGTHS[task]
  image = dict(name='resize', size=size)
  c = ml_collections.ConfigDict()
  c.init_from = dict(params=dict(workdir='runs/paligemma'))
  c.objective = dict(
    name='language',
    network=dict(name='paligemma', variant=model, image_size=size, length=length, dtype='bfloat16'),
    normalize=HALF,
  )
  c.tokenizer = dict(
    name='prompted',
    length=length,
    start='<bos>',
    end='<eos>',
    words=dict(name='tokenizer_json', file='paligemma-3b-pt-224/tokenizer.json'),
  )
  c.data = dict(source=source(task, 'train'), image=image, workers=32, caption_templates=(PROMPTS[task],))
  decoding = dict(max_tokens=32, beams=2) if task == 'captions' else dict(max_tokens=16)
  c.evaluators = dict(
    val=dict(
      name='captioning' if task == 'captions' else 'vqa',
      every=1_000,
      decoding=decoding,
      data=dict(source=source(task, 'val'), image=image, workers=32),
    )
  )
  c.train = dict(steps=EPOCHS[task] * RECORDS[task] // BATCH, batch_size=BATCH)
  c.optimizer = dict(
    rule=dict(name='adamw', b1=0.9, b2=0.999),
    schedule=dict(name='cosine', peak_lr=1e-5, warmup_steps=c.train.steps // 20),
    weight_decay=0.1,
    clip_norm=1.0,
  )
  c.checkpoint = dict(every=500)
  c.mesh = dict(data=1, fsdp=-1, max_fsdp=16)
  c.topology = 'v5e:16x16'
  return c
