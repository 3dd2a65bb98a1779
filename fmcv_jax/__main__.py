"""The one door: `python -m fmcv_jax <command>`, or `fmcv <command>`."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fmcv_jax.errors import UserError

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: run the same command again


def train(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax import experiment, trainer

  trainer.train(experiment.load_config(args.config, overrides), args.workdir)


def evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import evaluation

  evaluation.evaluate_workdirs(args.workdir, overrides, step=args.step)


def demo(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import demo as demo_app

  demo_app.run(args.config, args.workdir, overrides)


def explain(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import explain as explain_app

  explain_app.run(args.image, args.model, args.text, args.output, step=args.step, size=args.size)


def generate(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import generate as generate_app

  generate_app.run(
    args.prompt,
    args.model,
    args.output,
    step=args.step,
    overrides=overrides,
    count=args.n,
    image=args.image,
    mask=args.mask,
    expand=args.expand,
    strength=args.strength,
    interpolate=args.interpolate,
    control=args.control,
    drawn=args.drawn,
    control_scale=args.control_scale,
    negative=args.negative,
    **_sampling(args),
  )


def synthesize(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import synthesize as synthesize_app

  synthesize_app.run(
    args.model,
    args.to,
    per_prompt=args.n,
    prompts=args.prompts,
    step=args.step,
    overrides=overrides,
    **_sampling(args),
  )


def gallery(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import emoji_report as gallery_app

  gallery_app.run(args.model, args.judge, steps=args.steps, guidance=args.guidance, seed=args.seed)


def import_(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import conversion

  conversion.import_checkpoint(args.file, args.to, args.family, overrides)


def export(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import conversion

  conversion.export_checkpoint(args.workdir, args.to, args.format, args.step)


def report(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import report as report_app

  report_app.run(args.workdir)


def replay(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import replay as replay_app

  replay_app.run(args.workdir, args.at, overrides)


def pack(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import pack as pack_app

  pack_app.run(args.source, args.to, overrides, shards=args.shards, workers=args.workers, max_bad=args.max_bad)


def data(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import data_bench, data_show

  if args.show is None and not args.bench:
    raise UserError('give --show N, --bench or both')
  if args.show is not None:
    data_show.run(args.config, overrides, count=args.show, output=args.output)
  if args.bench:
    data_bench.run(args.config, overrides, seconds=args.seconds, step=not args.no_step)


def precompute(args: argparse.Namespace, overrides: list[str]) -> None:
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
  )


def plan(args: argparse.Namespace, overrides: list[str]) -> None:
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


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
  return {
    'steps': args.steps,
    'guidance': args.guidance,
    'seed': args.seed,
    'batch': args.batch,
    'solver': args.solver,
    'spacing': args.spacing,
    'interval': args.interval and tuple(args.interval),
    'rescale': args.rescale,
  }


def parser() -> argparse.ArgumentParser:
  top = argparse.ArgumentParser(prog='fmcv', description='Pretrain vision foundation models in JAX.')
  commands = top.add_subparsers(dest='command', required=True, metavar='command')

  def add(
    function: Callable[..., None],
    summary: str,
    *,
    config: str | None = None,
    model: bool = False,
    workdir: bool = True,
    fields: bool = True,
  ) -> argparse.ArgumentParser:
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
      sub.add_argument('--config', metavar='FILE.py[:ARG]', help='a python file with get_config()', **given)
    if model:
      sub.add_argument('--model', metavar='DIR', required=True, help='workdir of a trained model (local or gs://)')
      sub.add_argument('--step', type=int, help='step of the checkpoint (default: the newest)')
    elif workdir:
      sub.add_argument('--workdir', required=True, help='folder of the run: checkpoints, metrics (local or gs://)')
    sub.add_argument('--cpu-devices', type=int, metavar='N', help='emulate a mesh of N devices on the CPU')
    return sub

  add(train, 'Train a config; the same command goes on from where its workdir stands.', config='')
  sub = add(
    evaluate, 'Run the evaluators of trained workdirs on a checkpoint each, and print one table.', workdir=False
  )
  sub.add_argument('--workdir', nargs='+', required=True, metavar='DIR', help='folders of runs (local or gs://)')
  sub.add_argument('--step', type=int, help='step of the checkpoint (default: the newest)')
  sub = add(replay, 'Compute one step of a run again, and name what is not finite in it.')
  sub.add_argument('--at', type=int, required=True, metavar='STEP', help='the step, the first being 1')
  sub = add(import_, 'Make a workdir of a checkpoint that others published.', workdir=False)
  sub.add_argument('file', metavar='FILE', help='.safetensors, .npz, .pth, or a folder of .safetensors')
  sub.add_argument('--as', dest='family', metavar='FAMILY', help='vit, dinov2_l14, clip, ... (default: judged)')
  sub.add_argument('--to', required=True, metavar='DIR', help='a new folder')
  sub = add(export, 'Write what a workdir has learnt so that other libraries open it.', workdir=False, fields=False)
  sub.add_argument('workdir', metavar='DIR', help='of `fmcv train` or `fmcv import` (local or gs://)')
  sub.add_argument(
    '--format',
    required=True,
    help='timm, open_clip, transformers, diffusers, or that of a release: official, dit, compvis, augreg, big_vision',
  )
  sub.add_argument(
    '--to',
    required=True,
    metavar='FILE',
    help='a .safetensors or .npz file, or a folder that the library opens',
  )
  sub.add_argument('--step', type=int, help='step of the checkpoint (default: the newest)')
  add(report, 'Say where the time of a run went, and what became of its loss.', fields=False)
  add(demo, 'Train the demo and draw what it learnt.', config='configs/demo/clip.py')
  sub = add(explain, 'Draw what a trained vision transformer looks at in images.', model=True, fields=False)
  sub.add_argument('image', nargs='+', metavar='IMAGE', help='an image file')
  sub.add_argument('--text', nargs='+', default=[], help='texts to look for (a model that knows texts)')
  sub.add_argument('--output', default='explained', metavar='DIR', help='folder for the pictures (default: explained)')
  sub.add_argument('--size', type=int, help="pixels a side (default: the model's; more gives finer maps)")

  def add_sampling(sub: argparse.ArgumentParser) -> None:
    sub.add_argument('--steps', type=int, default=20, help='of the sampler (default: 20)')
    sub.add_argument('--guidance', type=float, default=4.0, help='weight of the prompt; 1: as trained (default: 4)')
    sub.add_argument('--seed', type=int, default=0)
    sub.add_argument('--batch', type=int, default=64, help='pictures at once, on all devices together (default: 64)')
    sub.add_argument('--solver', default='dpm++', help='ddim, ddpm, euler, heun, dpm++, unipc, ... (default: dpm++)')
    sub.add_argument('--spacing', default='trailing', choices=['trailing', 'leading', 'uniform', 'quadratic', 'karras'])
    sub.add_argument('--interval', type=float, nargs=2, metavar='TIME', help='guide only from and to these times')
    sub.add_argument(
      '--rescale', type=float, default=0.0, metavar='SHARE', help="of guidance's gain in contrast undone"
    )

  sub = add(generate, 'Paint pictures with a trained diffusion model.', model=True)
  sub.add_argument('prompt', nargs='*', metavar='PROMPT', help='a text, or a class by name or number')
  sub.add_argument('-n', type=int, default=4, help='pictures of each prompt (default: 4)')
  add_sampling(sub)
  sub.add_argument('--negative', default='', metavar='TEXT', help='a text to move away from')
  sub.add_argument('--image', metavar='FILE', help='paint over this picture')
  sub.add_argument('--strength', type=float, help='how much of the picture is lost (default: 0.6)')
  sub.add_argument('--mask', metavar='FILE', help='paint anew only where this picture is white')
  sub.add_argument('--expand', type=float, metavar='SHARE', help='paint a margin of this share around the picture')
  sub.add_argument('--control', metavar='FILE', help='a picture to follow (a model with a ControlNet)')
  sub.add_argument(
    '--drawn', action='store_true', help='that picture shows the edges (or what it was trained on) itself'
  )
  sub.add_argument('--control-scale', type=float, metavar='X', help='how much to follow it (default: 1)')
  sub.add_argument('--interpolate', action='store_true', help='go from the first prompt to the second in n pictures')
  sub.add_argument('--output', default='generated', metavar='DIR', help='folder for the pictures (default: generated)')
  sub = add(synthesize, 'Paint a labelled data set with a trained diffusion model.', model=True)
  sub.add_argument('--to', required=True, metavar='DIR', help='a new folder of ArrayRecord shards')
  sub.add_argument('-n', type=int, default=10, help='pictures of each prompt (default: 10)')
  sub.add_argument('--prompts', metavar='FILE', help='a prompt a line (default: the names of the training data)')
  add_sampling(sub)
  sub = add(
    gallery,
    "Paint a sheet of a text-to-image model's prompts, and judge it by a trained CLIP.",
    model=True,
    fields=False,
  )
  sub.add_argument('--judge', required=True, metavar='DIR', help='workdir of `fmcv demo`')
  sub.add_argument('--steps', type=int, default=20, help='of the sampler (default: 20)')
  sub.add_argument('--guidance', type=float, default=4.0, help='weight of the prompt (default: 4)')
  sub.add_argument('--seed', type=int, default=0)
  sub = add(data, "Show what a config's model sees, or how fast its data comes.", config='', workdir=False)
  sub.add_argument('--show', type=int, metavar='N', help='draw so many examples as the network is given them')
  sub.add_argument('--output', default='data.png', metavar='FILE', help='for the picture (default: data.png)')
  sub.add_argument('--bench', action='store_true', help='images a second of every stage, and the bottleneck')
  sub.add_argument('--seconds', type=float, default=5.0, help='for each stage of --bench (default: 5)')
  sub.add_argument('--no-step', action='store_true', help='bench the input alone, without the train step')
  sub = add(pack, 'Write any data source as ArrayRecord shards; run again, it goes on.', workdir=False)
  sub.add_argument('source', metavar='SOURCE', help="a config's FILE.py[:ARG], a path, or a name such as emoji")
  sub.add_argument('--to', required=True, metavar='DIR', help='a new folder')
  sub.add_argument('--shards', type=int, metavar='N', help='files (default: of half a GiB)')
  sub.add_argument('--workers', type=int, metavar='N', help='processes (default: one a core)')
  sub.add_argument('--max-bad', type=float, default=0.01, metavar='SHARE', help='may be unreadable (default: 0.01)')
  sub = add(precompute, 'Write what networks make of every record, such as latents, to train on.', workdir=False)
  sub.add_argument('name', nargs='+', metavar='NAME', help='latents, features, embed_image, ...')
  sub.add_argument('--to', required=True, metavar='DIR', help='a new folder of ArrayRecord shards')
  sub.add_argument('--config', metavar='FILE.py[:ARG]', help='whose frozen networks compute')
  sub.add_argument('--model', metavar='DIR', help='or the workdir of a trained model')
  sub.add_argument('--step', type=int, help='step of its checkpoint (default: the newest)')
  sub.add_argument('--batch', type=int, help='images at a time (default: as in training)')
  sub.add_argument('--shards', type=int, metavar='N', help='files (default: of 8192 records)')
  sub.add_argument('--images', action='store_true', help='keep the images too')
  sub = add(plan, 'Compile a config for a TPU pod that is not here: memory, exchanges, cost.', config='', workdir=False)
  sub.add_argument('--topology', help="such as v5e:16x16 or v5p:4x4x8 (default: the config's)")
  sub.add_argument('--slices', type=int, default=1, help='of that topology, joined by the data-centre network')
  sub.add_argument('--utilization', type=float, default=0.4, help='at which days are counted (default: 0.4)')
  sub.add_argument('--json', metavar='FILE', help='also write the figures there')
  sub.add_argument('--search', action='store_true', help='try meshes, remat and --batches, and list what fits')
  sub.add_argument('--batches', type=int, nargs='+', metavar='N', help="to search among (default: the config's)")
  return top


def _keep_compiled() -> None:
  """Programs that take a second or more to compile are kept in the cache, where the next start finds them."""
  import jax

  from fmcv_jax.data.storage import cache_folder

  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:  # which may be a gs:// folder
    jax.config.update('jax_compilation_cache_dir', str(cache_folder() / 'compiled'))


@contextlib.contextmanager
def _suppress_tensorstore_shutdown_errors() -> Iterator[None]:
  """Once a write has failed, threads of tensorstore find the event loop of the others closed, and each says so."""
  usual = sys.unraisablehook

  def hook(told):
    if told.exc_type is not RuntimeError or str(told.exc_value) != 'Event loop is closed':
      usual(told)

  sys.unraisablehook = hook
  try:
    yield
  finally:
    sys.unraisablehook = usual


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit status: 0 done, 2 a user's error, 75 stopped and saved."""
  args, rest = parser().parse_known_args(argv)
  overrides = [item.removeprefix('--config.') for item in rest if item.startswith('--config.')]
  unknown = [item for item in rest if not (args.fields and item.startswith('--config.'))]
  if unknown:
    print(f'fmcv {args.command}: unknown argument {unknown[0]!r}; see fmcv {args.command} --help', file=sys.stderr)
    return EXIT_USER_ERROR

  from fmcv_jax.parallel import distributed

  if args.cpu_devices:
    distributed.emulate(args.cpu_devices)
  if args.command != 'plan':  # which compiles to look, not to run
    _keep_compiled()
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  for library in ('absl', 'asyncio'):  # their own notes; what a user must know, we say
    logging.getLogger(library).setLevel(logging.CRITICAL)
  from fmcv_jax.train.loop import Preempted

  with _suppress_tensorstore_shutdown_errors():
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
