"""Command-line entry point: `fmcv <command>`, or `python -m fmcv_jax <command>`."""

import argparse
import inspect
import logging
import sys
from collections.abc import Callable, Sequence

from fmcv_jax import commands
from fmcv_jax.console import suppress_shutdown_errors
from fmcv_jax.errors import UserError

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: run the same command again


def parser() -> argparse.ArgumentParser:
  """The parser of the command line; the help of a command is the docstring of its function."""
  top = argparse.ArgumentParser(prog='fmcv', description='Pretrain vision foundation models in JAX.')
  subparsers = top.add_subparsers(dest='command', required=True, metavar='command')

  def add(
    function: Callable[..., None],
    *,
    config: str | None = None,
    model: bool = False,
    workdir: bool = True,
    fields: bool = True,
  ) -> argparse.ArgumentParser:
    summary = inspect.getdoc(function)
    example = '--config.mesh.fsdp=-1' if model else '--config.train.steps=200'
    sub = subparsers.add_parser(
      function.__name__.rstrip('_'),
      help=summary,
      description=summary,
      epilog=f'Any field of the config is set by --config.path.to.field=value, such as {example}.' if fields else None,
    )
    sub.set_defaults(function=function, fields=fields)
    if config is not None:
      given = {'default': config} if config else {'required': True}
      sub.add_argument('--config', metavar='FILE.py[:ARG]', help='Python file that defines get_config()', **given)
    if model:
      sub.add_argument(
        '--model',
        metavar='DIR',
        required=True,
        help="workdir of a trained model (local or gs://), or demo: the package's own",
      )
      sub.add_argument('--step', type=int, help='checkpoint step (default: the latest)')
    elif workdir:
      sub.add_argument('--workdir', required=True, help='run folder for checkpoints and metrics (local or gs://)')
    sub.add_argument('--cpu-devices', type=int, metavar='N', help='emulate N devices on the CPU')
    return sub

  add(commands.train, config='')
  sub = add(commands.finetune, config='configs/finetune.py', workdir=False)
  sub.add_argument(
    'data', metavar='DIR_OR_FILE', help='class folders, a table of captions or labels, Parquet or tar shards'
  )
  sub.add_argument(
    '--model', metavar='DIR_OR_FILE', default='demo', help='a workdir, or published weights (default: the demo model)'
  )
  sub.add_argument('--workdir', help='run folder (default: runs/ and the name of the data)')
  sub = add(commands.classify, model=True, fields=False)
  sub.add_argument('image', nargs='+', metavar='PATH', help='image file or folder')
  sub.add_argument('--text', nargs='+', default=[], metavar='LABEL', help='labels (image-text models only)')
  sub.add_argument('--top', type=int, default=3, metavar='N', help='classes per image (default: 3)')
  sub.add_argument('--json', metavar='FILE', help='also write the results to this file')
  sub = add(commands.detect, model=True, fields=False)
  sub.add_argument('path', nargs='+', metavar='PATH', help='image file or folder')
  sub.add_argument('--text', nargs='+', default=[], metavar='TEXT', help='what to find')
  sub.add_argument('--like', nargs='+', default=[], metavar='FILE', help='images that each show an example')
  sub.add_argument('--threshold', type=float, default=0.2, metavar='P', help='least score, 0 to 1 (default: 0.2)')
  sub.add_argument('--to', metavar='FOLDER', help='also write COCO JSON and drawings there')
  sub = add(commands.segment, model=True, fields=False)
  sub.add_argument('path', nargs='+', metavar='PATH', help='image file or folder')
  sub.add_argument(
    '--task', choices=['semantic', 'instance', 'panoptic'], help='what to segment (default: as in training)'
  )
  sub.add_argument('--threshold', type=float, metavar='P', help='least score, 0 to 1 (default: 0.8)')
  sub.add_argument('--points', nargs='+', default=[], metavar='X,Y', help='pixels of an object; X,Y,0: not of it (SAM)')
  sub.add_argument('--box', metavar='X0,Y0,X1,Y1', help='box of an object: left, top, right, bottom in pixels (SAM)')
  sub.add_argument('--single', action='store_true', help='one mask instead of three that a point may mean (SAM)')
  sub.add_argument('--to', metavar='FOLDER', help='also write COCO JSON or masks, and drawings there')
  sub = add(commands.depth, model=True, fields=False)
  sub.add_argument('path', nargs='+', metavar='PATH', help='image file or folder')
  sub.add_argument('--to', required=True, metavar='FOLDER', help='new folder for maps, depth.jsonl and colored images')
  sub.add_argument('--npy', action='store_true', help='write .npy (float32) instead of PNGs of 16 bits')
  sub.add_argument('--batch', type=int, default=8, metavar='N', help='images at once (default: 8)')
  sub = add(commands.search, model=True, fields=False)
  sub.add_argument('path', nargs='+', metavar='PATH', help='image file or folder')
  query = sub.add_mutually_exclusive_group(required=True)
  query.add_argument('--text', help='text query (image-text models only)')
  query.add_argument('--image', metavar='FILE', help='image query')
  sub.add_argument('--top', type=int, default=10, metavar='N', help='number of images (default: 10)')
  sub.add_argument('--json', metavar='FILE', help='also write the results to this file')
  sub = add(commands.evaluate, workdir=False)
  sub.add_argument('--workdir', nargs='+', required=True, metavar='DIR', help='run folders (local or gs://)')
  sub.add_argument('--step', type=int, help='checkpoint step (default: the latest)')
  sub = add(commands.replay)
  sub.add_argument('--at', type=int, required=True, metavar='STEP', help='step number, counted from 1')
  sub = add(commands.import_, workdir=False)
  sub.add_argument(
    'file',
    nargs='+',
    metavar='FILE',
    help='.safetensors, .npz, .pth, or a folder of .safetensors; with --onto FILE[:SCALE] of adapters',
  )
  sub.add_argument('--onto', metavar='DIR', help='workdir whose weights the adapters (LoRA, ...) are merged into')
  sub.add_argument(
    '--as', dest='family', metavar='FAMILY', help='model family, e.g. vit, dinov2_l14, clip (default: detected)'
  )
  sub.add_argument('--to', required=True, metavar='DIR', help='new folder')
  sub = add(
    commands.export,
    workdir=False,
    fields=False,
  )
  sub.add_argument('workdir', metavar='DIR', help='workdir of `fmcv train` or `fmcv import` (local or gs://)')
  sub.add_argument(
    '--format',
    required=True,
    help='timm, open_clip, transformers, diffusers, an original layout (official, dit, compvis, augreg, big_vision), '
    'fmcv: one folder for --model, or peft, kohya: the LoRA of a fine-tuning run',
  )
  sub.add_argument(
    '--to', required=True, metavar='FILE', help='.safetensors or .npz file, or a folder that the library opens'
  )
  sub.add_argument('--step', type=int, help='checkpoint step (default: the latest)')
  add(commands.report, fields=False)
  sub = add(commands.demo)
  sub.add_argument('demo', nargs='?', default='clip', choices=['clip', 'words'], help='default: clip')
  sub.add_argument('--config', metavar='FILE.py', help="config (default: the demo's, in configs/demo)")
  sub = add(commands.explain, model=True, fields=False)
  sub.add_argument('image', nargs='+', metavar='IMAGE', help='image file')
  sub.add_argument('--text', nargs='+', default=[], help='text queries (image-text models only)')
  sub.add_argument('--output', default='explained', metavar='DIR', help='output folder (default: explained)')
  sub.add_argument('--size', type=int, help="image side in pixels (default: the model's; larger gives finer maps)")

  def add_sampling(sub: argparse.ArgumentParser) -> None:
    sub.add_argument('--steps', type=int, default=20, help='number of sampling steps (default: 20)')
    sub.add_argument(
      '--guidance', type=float, default=4.0, help='classifier-free guidance scale; 1 disables it (default: 4)'
    )
    sub.add_argument('--seed', type=int, default=0)
    sub.add_argument('--batch', type=int, default=64, help='global batch size for sampling (default: 64)')
    sub.add_argument(
      '--solver', default='dpm++', help='sampler: ddim, ddpm, euler, heun, dpm++, unipc, ... (default: dpm++)'
    )
    sub.add_argument('--spacing', default='trailing', choices=['trailing', 'leading', 'uniform', 'quadratic', 'karras'])
    sub.add_argument(
      '--interval', type=float, nargs=2, metavar='TIME', help='apply guidance only between these timesteps'
    )
    sub.add_argument(
      '--rescale', type=float, default=0.0, metavar='PHI', help='CFG rescale factor phi (Lin et al. 2024; default: 0)'
    )

  sub = add(commands.generate, model=True)
  sub.add_argument('prompt', nargs='*', metavar='PROMPT', help='text prompt, or a class by name or index')
  sub.add_argument('-n', type=int, default=4, help='images per prompt (default: 4)')
  add_sampling(sub)
  sub.add_argument('--negative', default='', metavar='TEXT', help='negative prompt')
  sub.add_argument('--image', metavar='FILE', help='image to start from (img2img)')
  sub.add_argument('--strength', type=float, help='denoising strength, 0 to 1 (default: 0.6)')
  sub.add_argument('--mask', metavar='FILE', help='inpainting mask: white pixels are regenerated')
  sub.add_argument('--expand', type=float, metavar='FRACTION', help='outpaint a margin of this fraction of the side')
  sub.add_argument('--control', metavar='FILE', help='control image (ControlNet models)')
  sub.add_argument(
    '--lora', action='append', default=[], metavar='FILE[:SCALE]', help='adapter file (LoRA, ...); may be repeated'
  )
  sub.add_argument(
    '--control-preprocessed', action='store_true', help='the control image is already a control map, such as edges'
  )
  sub.add_argument('--control-scale', type=float, metavar='X', help='ControlNet conditioning scale (default: 1)')
  sub.add_argument('--interpolate', action='store_true', help='interpolate between two prompts in n images')
  sub.add_argument('--output', default='generated', metavar='DIR', help='output folder (default: generated)')
  sub = add(commands.synthesize, model=True)
  sub.add_argument('--to', required=True, metavar='DIR', help='new folder for ArrayRecord shards')
  sub.add_argument('-n', type=int, default=10, help='images per prompt (default: 10)')
  sub.add_argument(
    '--prompts', metavar='FILE', help='file with one prompt per line (default: class names of the training data)'
  )
  add_sampling(sub)
  sub = add(
    commands.gallery,
    model=True,
    fields=False,
  )
  sub.add_argument('--feature-extractor', required=True, metavar='DIR', help='workdir of `fmcv demo`')
  sub.add_argument('--steps', type=int, default=20, help='number of sampling steps (default: 20)')
  sub.add_argument('--guidance', type=float, default=4.0, help='classifier-free guidance scale (default: 4)')
  sub.add_argument('--seed', type=int, default=0)

  def add_decoding(sub: argparse.ArgumentParser) -> None:
    sub.add_argument('--to', metavar='FILE.jsonl', help='output file; run again to complete it (default: stdout)')
    sub.add_argument('--batch', type=int, default=64, help='global batch size (default: 64)')
    sub.add_argument('--max-tokens', type=int, default=64, help='largest number of tokens of a text (default: 64)')
    sub.add_argument('--min-tokens', type=int, default=0, help='smallest number of tokens before the end (default: 0)')
    sub.add_argument('--temperature', type=float, default=0.0, help='0 takes the most likely token (default: 0)')
    sub.add_argument('--top-k', type=int, metavar='K', help='sample from the K most likely tokens')
    sub.add_argument('--top-p', type=float, metavar='P', help='sample from the fewest tokens of total probability P')
    sub.add_argument('--beams', type=int, default=1, help='beams of a beam search (default: 1)')
    sub.add_argument('--length-penalty', type=float, default=1.0, help='exponent of the length of beams (default: 1)')
    sub.add_argument('--seed', type=int, default=0)

  sub = add(commands.caption, model=True)
  sub.add_argument('file', nargs='+', metavar='FILE', help='image files and folders')
  sub.add_argument('--prompt', help="text before the caption (default: 'caption en', for models with prompts)")
  add_decoding(sub)
  sub = add(commands.ask, model=True)
  sub.add_argument('file', metavar='FILE', help='image file or folder')
  sub.add_argument('question', metavar='QUESTION')
  sub.add_argument('--answers', nargs='+', default=[], metavar='TEXT', help='closed list of answers to choose from')
  sub.add_argument(
    '--template', default='answer en {}', help="prompt with a '{}' for the question (default: 'answer en {}')"
  )
  add_decoding(sub)
  sub = add(commands.data, config='', workdir=False)
  sub.add_argument('--show', type=int, metavar='N', help='draw N examples exactly as the network receives them')
  sub.add_argument('--output', default='data.png', metavar='FILE', help='output image (default: data.png)')
  sub.add_argument(
    '--bench', action='store_true', help='measure images per second of every stage, and name the bottleneck'
  )
  sub.add_argument('--seconds', type=float, default=5.0, help='seconds per stage of --bench (default: 5)')
  sub.add_argument('--no-step', action='store_true', help='benchmark the input pipeline alone, without the train step')
  sub = add(commands.pack, workdir=False)
  sub.add_argument('source', metavar='SOURCE', help='config FILE.py[:ARG], path, or source name such as emoji')
  sub.add_argument('--to', required=True, metavar='DIR', help='new folder')
  sub.add_argument('--shards', type=int, metavar='N', help='number of files (default: half a GiB each)')
  sub.add_argument('--workers', type=int, metavar='N', help='worker processes (default: one per core)')
  sub.add_argument(
    '--max-bad', type=float, default=0.01, metavar='X', help='maximum fraction of unreadable records (default: 0.01)'
  )
  sub = add(commands.precompute, workdir=False)
  sub.add_argument('name', nargs='+', metavar='NAME', help='output name: latents, features, embed_image, ...')
  sub.add_argument('--to', required=True, metavar='DIR', help='new folder for ArrayRecord shards')
  sub.add_argument('--config', metavar='FILE.py[:ARG]', help='config whose frozen networks are used')
  sub.add_argument('--model', metavar='DIR', help='workdir of a trained model (instead of --config)')
  sub.add_argument('--step', type=int, help='checkpoint step (default: the latest)')
  sub.add_argument('--batch', type=int, help='global batch size (default: as in training)')
  sub.add_argument('--shards', type=int, metavar='N', help='number of files (default: 8192 records each)')
  sub.add_argument('--images', action='store_true', help='also store the images')
  sub.add_argument(
    '--dtype', choices=['float16', 'float32'], help='dtype of stored floats (default: the dtype of each output)'
  )
  sub = add(commands.compute, model=True)
  sub.add_argument('name', metavar='NAME', help='output name: features, logits, reconstruct, segments, attention, ...')
  sub.add_argument('path', nargs='+', metavar='PATH', help='image file or folder')
  sub.add_argument('--to', required=True, metavar='DIR', help='output folder; nothing in it is overwritten')
  sub.add_argument('--batch', type=int, default=64, help='global batch size (default: 64)')
  sub = add(
    commands.plan,
    config='',
    workdir=False,
  )
  sub.add_argument('--topology', help="TPU topology such as v5e:16x16 or v5p:4x4x8 (default: the config's)")
  sub.add_argument(
    '--slices', type=int, default=1, help='number of slices of that topology, joined by the data-center network'
  )
  sub.add_argument('--utilization', type=float, default=0.4, help='assumed MFU for the time estimate (default: 0.4)')
  sub.add_argument('--json', metavar='FILE', help='also write the results to this file')
  sub.add_argument('--search', action='store_true', help='try meshes, remat policies and --batches, and list what fits')
  sub.add_argument(
    '--batches', type=int, nargs='+', metavar='N', help="batch sizes for --search (default: the config's)"
  )
  return top


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit status: 0 success, 2 user error, 75 preempted after saving."""
  argv = list(sys.argv[1:] if argv is None else argv)
  # Removed first: argparse takes an argument that contains a space, such as a dict, as a value of the option before it.
  fields = [item for item in argv if item.startswith('--config.')]
  args, unknown = parser().parse_known_args([item for item in argv if not item.startswith('--config.')])
  overrides = [item.removeprefix('--config.') for item in fields]
  unknown += [] if args.fields else fields
  if unknown:
    print(f'fmcv {args.command}: unknown argument {unknown[0]!r}; see fmcv {args.command} --help', file=sys.stderr)
    return EXIT_USER_ERROR

  from fmcv_jax.apps.environment import keep_compiled
  from fmcv_jax.parallel import distributed

  if args.cpu_devices:
    distributed.emulate(args.cpu_devices)
  if args.command != 'plan':  # compiles for a target that is not attached
    keep_compiled()
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  for library in ('absl', 'asyncio'):  # not addressed to users
    logging.getLogger(library).setLevel(logging.CRITICAL)
  from fmcv_jax.train.loop import Preempted

  with suppress_shutdown_errors():
    try:
      distributed.initialize()
      args.function(args, overrides)
    except UserError as error:
      print(f'fmcv {args.command}: {error}', file=sys.stderr)
      return EXIT_USER_ERROR
    except Preempted as notice:
      print(f'fmcv {args.command}: {notice}', file=sys.stderr)
      return EXIT_PREEMPTED
    except KeyboardInterrupt:
      print(f'fmcv {args.command}: interrupted', file=sys.stderr)
      return 130
  return 0


if __name__ == '__main__':
  sys.exit(main())
