"""The one door: `python -m fmcv_jax <command>`, or `fmcv <command>`."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from fmcv_jax.errors import UserError

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: run the same command again


def train(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax import experiment

  experiment.train(experiment.load_config(args.config, overrides), args.workdir)


def evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import evaluation

  evaluation.evaluate_workdir(args.workdir, overrides, step=args.step)


def demo(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import demo as demo_app

  demo_app.run(args.config, args.workdir, overrides)


def explain(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import explain as explain_app

  explain_app.run(args.image, args.model, args.text, args.output, step=args.step, size=args.size)


def parser() -> argparse.ArgumentParser:
  top = argparse.ArgumentParser(prog='fmcv', description='Pretrain vision foundation models in JAX.')
  commands = top.add_subparsers(dest='command', required=True, metavar='command')

  def add(
    function: Callable[..., None], summary: str, *, config: str | None = None, model: bool = False
  ) -> argparse.ArgumentParser:
    sub = commands.add_parser(
      function.__name__,
      help=summary,
      description=summary,
      epilog='Any field of the config is set by --config.path.to.field=value, such as --config.train.steps=200.',
    )
    sub.set_defaults(function=function)
    if config is not None:
      given = {'default': config} if config else {'required': True}
      sub.add_argument('--config', metavar='FILE.py[:ARG]', help='a python file with get_config()', **given)
    if model:
      sub.add_argument('--model', metavar='DIR', required=True, help='workdir of a trained model (local or gs://)')
      sub.add_argument('--step', type=int, help='step of the checkpoint (default: the newest)')
    else:
      sub.add_argument('--workdir', required=True, help='folder of the run: checkpoints, metrics (local or gs://)')
    sub.add_argument('--cpu-devices', type=int, metavar='N', help='emulate a mesh of N devices on the CPU')
    return sub

  add(train, 'Train a config; the same command goes on from where its workdir stands.', config='')
  sub = add(evaluate, "Run a trained workdir's evaluators on a checkpoint.")
  sub.add_argument('--step', type=int, help='step of the checkpoint (default: the newest)')
  add(demo, 'Train the demo and draw what it learnt.', config='configs/demo/clip.py')
  sub = add(explain, 'Draw what a trained vision transformer looks at in images.', model=True)
  sub.add_argument('image', nargs='+', metavar='IMAGE', help='an image file')
  sub.add_argument('--text', nargs='+', default=[], help='texts to look for (a model that knows texts)')
  sub.add_argument('--output', default='explained', metavar='DIR', help='folder for the pictures (default: explained)')
  sub.add_argument('--size', type=int, help="pixels a side (default: the model's; more gives finer maps)")
  return top


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one command; returns the exit status: 0 done, 2 a user's error, 75 stopped and saved."""
  args, rest = parser().parse_known_args(argv)
  overrides = [item.removeprefix('--config.') for item in rest if item.startswith('--config.')]
  unknown = [item for item in rest if not item.startswith('--config.')]
  if unknown:
    print(f'fmcv {args.command}: unknown argument {unknown[0]!r}; see fmcv {args.command} --help', file=sys.stderr)
    return EXIT_USER_ERROR

  from fmcv_jax.parallel import distributed

  if args.cpu_devices:
    distributed.emulate(args.cpu_devices)
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  logging.getLogger('absl').setLevel(logging.ERROR)  # libraries' own notes; what a user must know, we say
  from fmcv_jax.train.loop import Preempted

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
