"""The commands of `fmcv`: from parsed arguments to the apps, which are imported only when they run."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fmcv_jax.errors import UserError

if TYPE_CHECKING:
  from fmcv_jax.diffusion.options import SamplingOptions


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

  classify_app.run(args.image, args.model, args.text, step=args.step, top=args.top, json_file=args.json)


def detect(args: argparse.Namespace, overrides: list[str]) -> None:
  """Find objects in images by texts or by example images."""
  from fmcv_jax.apps import detect as detect_app

  detect_app.run(args.path, args.model, args.text, like=args.like, threshold=args.threshold, step=args.step, to=args.to)


def segment(args: argparse.Namespace, overrides: list[str]) -> None:
  """Segment images: classes, objects or both, or what points or a box indicate."""
  from fmcv_jax.apps import prompted_segment
  from fmcv_jax.apps import segment as segment_app

  if args.points or args.box:
    if args.task is not None or args.threshold is not None:
      raise UserError('--task and --threshold: not with --points or --box')
    prompted_segment.run(
      args.path, args.model, args.points, args.box, multimask=not args.single, step=args.step, to=args.to
    )
    return
  if args.single:
    raise UserError('--single: needs --points or a --box')
  segment_app.run(args.path, args.model, args.task, threshold=args.threshold, step=args.step, to=args.to)


def depth(args: argparse.Namespace, overrides: list[str]) -> None:
  """Write the depth of images: PNG of 16 bits or .npy, and colored images."""
  from fmcv_jax.apps import depth as depth_app

  depth_app.run(args.path, args.model, args.to, npy=args.npy, step=args.step, batch=args.batch)


def search(args: argparse.Namespace, overrides: list[str]) -> None:
  """Find the images that are nearest to a text or to another image."""
  from fmcv_jax.apps import search as search_app

  search_app.run(
    args.path, args.model, text=args.text, image=args.image, step=args.step, top=args.top, json_file=args.json
  )


def evaluate(args: argparse.Namespace, overrides: list[str]) -> None:
  """Run the evaluators of trained runs and print one table."""
  from fmcv_jax.apps import evaluation

  evaluation.evaluate_workdirs(args.workdir, overrides, step=args.step)


def demo(args: argparse.Namespace, overrides: list[str]) -> None:
  """Train a demo and plot its results: clip, zero-shot classification; words, captions and answers about scenes."""
  from fmcv_jax.apps import demo as clip_demo
  from fmcv_jax.apps import words_demo

  run = {'clip': clip_demo.run, 'words': words_demo.run}[args.demo]
  run(args.config or f'configs/demo/{args.demo}.py', args.workdir, overrides)


def explain(args: argparse.Namespace, overrides: list[str]) -> None:
  """Visualize attention, relevance and features of a trained model."""
  from fmcv_jax.apps import explain as explain_app

  explain_app.run(args.image, args.model, args.text, args.output, step=args.step, size=args.size)


def generate(args: argparse.Namespace, overrides: list[str]) -> None:
  """Generate images with a trained diffusion model."""
  from fmcv_jax.apps import generate as generate_app

  if args.strength is not None and (not args.image or args.mask is not None or args.expand is not None):
    raise UserError('--strength: needs an --image, and no --mask or --expand')
  if not args.control and (args.control_preprocessed or args.control_scale is not None):
    raise UserError('--control-preprocessed and --control-scale: need a --control')
  generate_app.run(
    args.prompt,
    args.model,
    args.output,
    _sampling(args, 'negative', 'control_preprocessed', 'strength', 'control_scale'),
    step=args.step,
    batch=args.batch,
    overrides=overrides,
    count=args.n,
    image=args.image,
    mask=args.mask,
    expand=args.expand,
    interpolate=args.interpolate,
    control=args.control,
    lora=args.lora,
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
  """Import a published checkpoint, or adapters onto one, into a new workdir."""
  from fmcv_jax.apps import adapters, conversion

  if args.onto is not None:
    if args.family is not None:
      raise UserError('--as: names the family of a checkpoint; adapters have that of --onto')
    adapters.import_adapters(args.file, args.onto, args.to, overrides)
    return
  if len(args.file) > 1:
    raise UserError(f'{args.file[1]}: a checkpoint is one file or folder; several adapters need --onto')
  conversion.import_checkpoint(args.file[0], args.to, args.family, overrides)


def export(args: argparse.Namespace, overrides: list[str]) -> None:
  """Export a trained model for timm, OpenCLIP, transformers or diffusers, or its LoRA for PEFT or kohya's scripts."""
  from fmcv_jax.apps import conversion, export_adapters

  if args.format in export_adapters.FORMATS:
    export_adapters.export_adapters(args.workdir, args.to, args.format, args.step)
    return
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


def compute(args: argparse.Namespace, overrides: list[str]) -> None:
  """Compute an output of a model for image files: PNG, JSON lines or NPZ, by its kind."""
  from fmcv_jax.apps import compute as compute_app

  compute_app.run(args.name, args.path, args.model, args.to, step=args.step, batch=args.batch, overrides=overrides)


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


def caption(args: argparse.Namespace, overrides: list[str]) -> None:
  """Caption images with a trained language model (JSON lines, resumable)."""
  _texts(args, overrides, args.file, args.prompt)


def ask(args: argparse.Namespace, overrides: list[str]) -> None:
  """Answer a question about images with a trained language model (JSON lines, resumable)."""
  if args.template.count('{}') != 1:
    raise UserError(f"--template: needs one '{{}}' for the question, got {args.template!r}")
  _texts(args, overrides, [args.file], args.template.replace('{}', args.question), args.answers)


def _texts(
  args: argparse.Namespace, overrides: list[str], files: list[str], prompt: str | None, answers: Sequence[str] = ()
) -> None:
  from fmcv_jax.apps import caption as caption_app
  from fmcv_jax.apps.arguments import command_line_errors
  from fmcv_jax.decoding.options import DecodingOptions

  names = ('max_tokens', 'min_tokens', 'temperature', 'top_k', 'top_p', 'beams', 'length_penalty', 'seed')
  with command_line_errors():
    caption_app.run(
      files,
      args.model,
      prompt,
      answers=answers,
      to=args.to,
      options=DecodingOptions(**{name: getattr(args, name) for name in names}),
      step=args.step,
      batch=args.batch,
      overrides=overrides,
    )


def _sampling(args: argparse.Namespace, *more: str) -> 'SamplingOptions':
  """The SamplingOptions of the arguments that every command has, and of `more`; their defaults for those not given."""
  from fmcv_jax.apps.arguments import command_line_errors
  from fmcv_jax.diffusion.options import SamplingOptions

  names = ('steps', 'guidance', 'seed', 'solver', 'spacing', 'interval', 'rescale', *more)
  given = {name: value for name in names if (value := getattr(args, name)) is not None}
  with command_line_errors():
    return SamplingOptions(**given)
