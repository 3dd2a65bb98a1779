"""Names of the classes of a run."""

from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.zero_shot import ZeroShot
from fmcv_jax.run import CLASSES, Run


def class_names_of(run: Run) -> tuple[str, ...]:
  """Names of the classes that a model names without labels, by index.

  Those kept in its workdir; of a model with class labels the training classes; of an image-text model the classes of
  its zero_shot evaluator, the one with the most if it has several; without one the training classes. () for other
  models, and where the data is missing.
  """
  objective, evaluators = run.experiment.objective, run.experiment.evaluators.values()
  if objective.class_counts or (run.workdir / CLASSES).exists():
    return tuple(run.class_names())
  if 'embed_text' not in objective.outputs():
    return ()
  zero_shot = [evaluator for evaluator in evaluators if isinstance(evaluator, ZeroShot)]
  if not zero_shot:
    return tuple(run.class_names())
  try:
    return max((tuple(evaluator.data.source.names) for evaluator in zero_shot), key=len)
  except (UserError, OSError):
    return ()
