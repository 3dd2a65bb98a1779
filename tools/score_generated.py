"""Scores a text-to-image model of emoji by a CLIP, and draws a sheet of images.

python tools/score_generated.py runs/emoji_text_to_image demo --sheet sheet.png

Prints the top-1 and top-5 accuracy of the CLIP on one generated image for each of 150 training names, among all names,
and for each of the 100 held-out names, among those.
"""

import argparse
import json
import pathlib

import numpy as np

import fmcv_jax
from fmcv_jax.data.sources.emoji import Emoji
from fmcv_jax.evaluate.base import topk_accuracy
from fmcv_jax.inference.generator import ImageGenerator
from fmcv_jax.inference.image_files import make_grid, save_png

# Some of these names, such as 'cat face', 'blue heart' and 'green circle', are held out of training.
SHEET = (
  *('grinning face', 'angry face', 'cat face', 'a blue cat face', 'dog face', 'a green dog face', 'pig face', 'bear'),
  *('red apple', 'green apple', 'banana', 'pizza', 'hamburger', 'birthday cake', 'mushroom', 'a red mushroom'),
  *('red heart', 'blue heart', 'green circle', 'star', 'sun', 'full moon', 'rainbow', 'cloud'),
  *('flag of Japan', 'flag of France', 'soccer ball', 'automobile', 'house', 'palm tree', 'rose', 'a purple rose'),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('model', help='text-to-image model')
  parser.add_argument('extractor', help='image-text model')
  parser.add_argument('--guidance', type=float, default=4.0)
  parser.add_argument('--steps', type=int, default=20)
  parser.add_argument('--number', type=int, default=150, help='training names')
  parser.add_argument('--sheet', type=pathlib.Path, help='PNG of the images of some prompts, in rows of 8')
  args = parser.parse_args()
  generator = ImageGenerator(args.model, batch=32)

  def generate(prompts):
    return generator.generate(list(prompts), steps=args.steps, guidance=args.guidance)

  if args.sheet:
    save_png(make_grid(generate(SHEET), 8), args.sheet, {'prompts': SHEET, 'guidance': args.guidance})
  if not args.number:
    return
  clip = fmcv_jax.load(args.extractor, batch=256)
  known, held_out = (Emoji(split=split).names for split in ('seen', 'held_out'))
  chosen = sorted(np.random.default_rng(0).choice(len(Emoji().names), args.number, replace=False))
  scores = {}
  for kind, names, labels in (('training', known, chosen), ('held_out', held_out, range(len(held_out)))):
    similarity = clip.encode_image(generate(names[label] for label in labels)) @ clip.encode_text(names).T
    scores |= {f'{kind}/top{k}': topk_accuracy(similarity, np.array(labels), k) for k in (1, 5)}
  print(json.dumps(scores))


if __name__ == '__main__':
  main()
