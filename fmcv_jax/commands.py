"""The commands of `fmcv`: from parsed arguments to the apps, which are imported only when they run."""

import argparse
from typing import Any

from fmcv_jax.errors import UserError


def train(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax import experiment, trainer

  trainer.train(experiment.load_config(args.config, overrides), args.workdir)


def classify(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import classify as classify_app

  classify_app.run(args.image, args.model, args.text, step=args.step, top=args.top, json_file=args.json)


def search(args: argparse.Namespace, overrides: list[str]) -> None:
  from fmcv_jax.apps import search as search_app

  search_app.run(
    args.path, args.model, text=args.text, image=args.image, step=args.step, top=args.top, json_file=args.json
  )


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
  from fmcv_jax.apps import emoji_report as gallery_app

  gallery_app.run(args.model, args.feature_extractor, steps=args.steps, guidance=args.guidance, seed=args.seed)


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
    dtype=args.dtype,
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


def _sampling(args: argparse.Namespace, **more: Any) -> Any:
  """The SamplingOptions of the arguments."""
  from fmcv_jax.apps.arguments import command_line_errors
  from fmcv_jax.diffusion.options import SamplingOptions

  names = ('steps', 'guidance', 'seed', 'solver', 'spacing', 'interval', 'rescale')
  with command_line_errors():
    return SamplingOptions(**{name: getattr(args, name) for name in names}, **more)
