"""Command-line entry point: `fmcv <command>`, or `python -m fmcv_jax <command>`."""

import argparse
import inspect
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fmcv_jax.console import suppress_shutdown_errors
from fmcv_jax.errors import UserError

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: run the same command again


def train(args: argparse.Namespace, overrides: list[str]) -> None:
  """Train a config. Running the same command again resumes from the latest checkpoint."""
  from fmcv_jax import experiment, trainer

  trainer.train(experiment.load_config(args.config, overrides), args.workdir)


def finetune(args: argparse.Namespace, overrides: list[str]) -> None:
  """Fine-tune a model on your own images."""
  from fmcv_jax.apps import finetune as finetune_app

  finetune_app.run(args.data, args.model, args.workdir, overrides, config=args.config)


def classify(args: argparse.Namespace, overrides: list[str]) -> None:
  """Print the most probable classes of images."""
  from fmcv_jax.apps import classify as classify_app

  classify_app.run(args.image, args.model, args.text, step=args.step, top=args.top)


def evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
  """Run the evaluators of trained runs and print one table."""
  from fmcv_jax.apps import evaluation

  evaluation.evaluate_workdirs(args.workdir, overrides, step=args.step)


def demo(args: argparse.Namespace, overrides: list[str]) -> None:
  """Train the demo model and plot its results."""
  from fmcv_jax.apps import demo as demo_app

  demo_app.run(args.config, args.workdir, overrides)


def explain(args: argparse.Namespace, overrides: list[str]) -> None:
  """Visualize attention, relevance and features of a trained model."""
  from fmcv_jax.apps import explain as explain_app

  explain_app.run(args.image, args.model, args.text, args.output, step=args.step, size=args.size)


def generate(args: argparse.Namespace, overrides: list[str]) -> None:
  """Generate images with a trained diffusion model."""
  from fmcv_jax.apps import generate as generate_app

  generate_app.run(
    args.prompt,
    args.model,
    args.output,
    _sampling(args, negative=args.negative, control_preprocessed=args.control_preprocessed),
    step=args.step,
    batch=args.batch,
    overrides=overrides,
    count=args.n,
    image=args.image,
    mask=args.mask,
    expand=args.expand,
    strength=args.strength,
    interpolate=args.interpolate,
    control=args.control,
    control_scale=args.control_scale,
  )


def synthesize(args: argparse.Namespace, overrides: list[str]) -> None:
  """Generate a labeled synthetic dataset with a trained diffusion model."""
  from fmcv_jax.apps import synthesize as synthesize_app

  synthesize_app.run(
    args.model,
    args.to,
    _sampling(args),
    per_prompt=args.n,
    prompts=args.prompts,
    step=args.step,
    batch=args.batch,
    overrides=overrides,
  )


def gallery(args: argparse.Namespace, overrides: list[str]) -> None:
  """Generate a grid of samples from a text-to-image model and score it with a CLIP."""
  from fmcv_jax.apps import emoji_report as gallery_app

  gallery_app.run(args.model, args.feature_extractor, steps=args.steps, guidance=args.guidance, seed=args.seed)


def import_(args: argparse.Namespace, overrides: list[str]) -> None:
  """Import a published checkpoint into a new workdir."""
  from fmcv_jax.apps import conversion

  conversion.import_checkpoint(args.file, args.to, args.family, overrides)


def export(args: argparse.Namespace, overrides: list[str]) -> None:
  """Export a trained model for timm, OpenCLIP, transformers or diffusers."""
  from fmcv_jax.apps import conversion

  conversion.export_checkpoint(args.workdir, args.to, args.format, args.step)


def report(args: argparse.Namespace, overrides: list[str]) -> None:
  """Summarize a run: time breakdown, restarts and loss curve."""
  from fmcv_jax.apps import report as report_app

  report_app.run(args.workdir)


def replay(args: argparse.Namespace, overrides: list[str]) -> None:
  """Re-run one training step and report which values are not finite."""
  from fmcv_jax.apps import replay as replay_app

  replay_app.run(args.workdir, args.at, overrides)


def pack(args: argparse.Namespace, overrides: list[str]) -> None:
  """Convert a data source to ArrayRecord shards (resumable)."""
  from fmcv_jax.apps import pack as pack_app

  pack_app.run(args.source, args.to, overrides, shards=args.shards, workers=args.workers, max_bad=args.max_bad)


def data(args: argparse.Namespace, overrides: list[str]) -> None:
  """Preview a config's training inputs, or benchmark its input pipeline."""
  from fmcv_jax.apps import data_bench, data_show

  if args.show is None and not args.bench:
    raise UserError('give --show N, --bench or both')
  if args.show is not None:
    data_show.run(args.config, overrides, count=args.show, output=args.output)
  if args.bench:
    data_bench.run(args.config, overrides, seconds=args.seconds, step=not args.no_step)


def precompute(args: argparse.Namespace, overrides: list[str]) -> None:
  """Precompute latents, embeddings or other outputs for every record."""
  from fmcv_jax.apps import precompute as precompute_app

  precompute_app.run(
    args.name,
    args.to,
    overrides,
    config=args.config,
    model=args.model,
    step=args.step,
    batch=args.batch,
    shards=args.shards,
    images=args.images,
    dtype=args.dtype,
  )


def plan(args: argparse.Namespace, overrides: list[str]) -> None:
  """Compile a config for a remote TPU topology and report memory, communication and cost."""
  from fmcv_jax.plan import planning

  planning.run(
    args.config,
    overrides,
    topology=args.topology,
    slices=args.slices,
    utilization=args.utilization,
    json_file=args.json,
    searched=args.search,
    batches=args.batches,
  )


def _sampling(args: argparse.Namespace, **more: Any) -> Any:
  """The SamplingOptions of the arguments."""
  from fmcv_jax.apps.arguments import command_line_errors
  from fmcv_jax.diffusion.options import SamplingOptions

  names = ('steps', 'guidance', 'seed', 'solver', 'spacing', 'interval', 'rescale')
  with command_line_errors():
    return SamplingOptions(**{name: getattr(args, name) for name in names}, **more)


def parser() -> argparse.ArgumentParser:
  """The parser of the command line; the help of a command is the docstring of its function."""
  top = argparse.ArgumentParser(prog='fmcv', description='Pretrain vision foundation models in JAX.')
  commands = top.add_subparsers(dest='command', required=True, metavar='command')

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
    sub = commands.add_parser(
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
      sub.add_argument('--model', metavar='DIR', required=True, help='workdir of a trained model (local or gs://)')
      sub.add_argument('--step', type=int, help='checkpoint step (default: the latest)')
    elif workdir:
      sub.add_argument('--workdir', required=True, help='run folder for checkpoints and metrics (local or gs://)')
    sub.add_argument('--cpu-devices', type=int, metavar='N', help='emulate N devices on the CPU')
    return sub

  add(train, config='')
  sub = add(finetune, config='configs/finetune.py', workdir=False)
  sub.add_argument('data', metavar='DIR_OR_FILE', help='class folders, a table of captions or labels, or Parquet')
  sub.add_argument('--model', metavar='DIR_OR_FILE', help='workdir of a trained model, or published weights')
  sub.add_argument('--workdir', help='run folder (default: runs/ and the name of the data)')
  sub = add(classify, model=True, fields=False)
  sub.add_argument('image', nargs='+', metavar='IMAGE', help='image file')
  sub.add_argument('--text', nargs='+', default=[], metavar='LABEL', help='labels (image-text models only)')
  sub.add_argument('--top', type=int, default=3, metavar='N', help='classes per image (default: 3)')
  sub = add(evaluate, workdir=False)
  sub.add_argument('--workdir', nargs='+', required=True, metavar='DIR', help='run folders (local or gs://)')
  sub.add_argument('--step', type=int, help='checkpoint step (default: the latest)')
  sub = add(replay)
  sub.add_argument('--at', type=int, required=True, metavar='STEP', help='step number, counted from 1')
  sub = add(import_, workdir=False)
  sub.add_argument('file', metavar='FILE', help='.safetensors, .npz, .pth, or a folder of .safetensors')
  sub.add_argument(
    '--as', dest='family', metavar='FAMILY', help='model family, e.g. vit, dinov2_l14, clip (default: detected)'
  )
  sub.add_argument('--to', required=True, metavar='DIR', help='new folder')
  sub = add(export, workdir=False, fields=False)
  sub.add_argument('workdir', metavar='DIR', help='workdir of `fmcv train` or `fmcv import` (local or gs://)')
  sub.add_argument(
    '--format',
    required=True,
    help='timm, open_clip, transformers, diffusers, or an original layout: official, dit, compvis, augreg, big_vision',
  )
  sub.add_argument(
    '--to', required=True, metavar='FILE', help='.safetensors or .npz file, or a folder that the library opens'
  )
  sub.add_argument('--step', type=int, help='checkpoint step (default: the latest)')
  add(report, fields=False)
  add(demo, config='configs/demo/clip.py')
  sub = add(explain, model=True, fields=False)
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

  sub = add(generate, model=True)
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
    '--control-preprocessed', action='store_true', help='the control image is already a control map, such as edges'
  )
  sub.add_argument('--control-scale', type=float, metavar='X', help='ControlNet conditioning scale (default: 1)')
  sub.add_argument('--interpolate', action='store_true', help='interpolate between two prompts in n images')
  sub.add_argument('--output', default='generated', metavar='DIR', help='output folder (default: generated)')
  sub = add(synthesize, model=True)
  sub.add_argument('--to', required=True, metavar='DIR', help='new folder for ArrayRecord shards')
  sub.add_argument('-n', type=int, default=10, help='images per prompt (default: 10)')
  sub.add_argument(
    '--prompts', metavar='FILE', help='file with one prompt per line (default: class names of the training data)'
  )
  add_sampling(sub)
  sub = add(
    gallery,
    model=True,
    fields=False,
  )
  sub.add_argument('--feature-extractor', required=True, metavar='DIR', help='workdir of `fmcv demo`')
  sub.add_argument('--steps', type=int, default=20, help='number of sampling steps (default: 20)')
  sub.add_argument('--guidance', type=float, default=4.0, help='classifier-free guidance scale (default: 4)')
  sub.add_argument('--seed', type=int, default=0)
  sub = add(data, config='', workdir=False)
  sub.add_argument('--show', type=int, metavar='N', help='draw N examples exactly as the network receives them')
  sub.add_argument('--output', default='data.png', metavar='FILE', help='output image (default: data.png)')
  sub.add_argument(
    '--bench', action='store_true', help='measure images per second of every stage, and name the bottleneck'
  )
  sub.add_argument('--seconds', type=float, default=5.0, help='seconds per stage of --bench (default: 5)')
  sub.add_argument('--no-step', action='store_true', help='benchmark the input pipeline alone, without the train step')
  sub = add(pack, workdir=False)
  sub.add_argument('source', metavar='SOURCE', help='config FILE.py[:ARG], path, or source name such as emoji')
  sub.add_argument('--to', required=True, metavar='DIR', help='new folder')
  sub.add_argument('--shards', type=int, metavar='N', help='number of files (default: half a GiB each)')
  sub.add_argument('--workers', type=int, metavar='N', help='worker processes (default: one per core)')
  sub.add_argument(
    '--max-bad', type=float, default=0.01, metavar='X', help='maximum fraction of unreadable records (default: 0.01)'
  )
  sub = add(precompute, workdir=False)
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
  sub = add(
    plan,
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
