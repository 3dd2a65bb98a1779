"""Visualizes a trained model on images: attention, relevance, features, similarity to texts."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmcv_jax.apps import figures
from fmcv_jax.console import make_console
from fmcv_jax.data.sources.base import BadRecord
from fmcv_jax.data.transforms import ResizeCrop
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.interpret import activation_maps, attention_maps
from fmcv_jax.models.common.norms import l2_normalize
from fmcv_jax.models.common.outputs import AttentionNetwork, AveragePooledNetwork, Features
from fmcv_jax.models.common.patches import patch_features
from fmcv_jax.objectives.outputs import ImageEncoder, encoder_of
from fmcv_jax.pretrained import packaged
from fmcv_jax.run import Run


def run(
  files: Sequence[str],
  model: str,
  texts: Sequence[str] = (),
  output: str | pathlib.Path = 'explained',
  *,
  step: int | None = None,
  size: int | None = None,
) -> list[pathlib.Path]:
  """Explains image files by the model in a workdir; writes PNGs to `output` and returns their paths.

  For a vision transformer (an `AttentionNetwork`):
  attention        attention from the class token to the patches in the last layer, per head
  rollout          attention rollout over all layers (Abnar & Zuidema 2020)
  features         the first three principal components of the patch features, over all images, as RGB
  relevance        relevance of each patch for the top-1 class, or for each text (Chefer et al. 2021)
  similarity       similarity of each patch to each text
  reconstruction   masked input and reconstruction (masked autoencoders)

  For a network with global average pooling (an `AveragePooledNetwork`, such as Swin and EfficientNet): features, and
  class activation maps for the top-1 class (relevance) or for each text (similarity; Zhou et al. 2016).
  """
  console, reopened = make_console(), Run.reopen(packaged.locate(model))
  subject, step = reopened.restored_model(step)
  try:
    tower = encoder_of(subject.outputs)(subject.params, subject.extra)
  except UserError as error:
    raise UserError(f'{model}: {error}') from error
  transformer = isinstance(tower.network, AttentionNetwork)
  if not transformer and not isinstance(tower.network, AveragePooledNetwork):
    raise UserError(
      f'{model}: explain needs a network that offers its attention (ViT), or that averages its last map (Swin, '
      f'EfficientNet); {type(tower.network).__name__} does neither'
    )
  if texts and 'embed_text' not in subject.outputs:
    raise UserError(f'--text: {model} is not an image-text model')
  network, params = tower.network, tower.params
  own, multiple = network.input_shape[:2], network.size_multiple
  if own[0] != own[1]:
    raise UserError(f'{model}: explain draws square images only; the network takes {own[0]} x {own[1]} pixels')
  size = size or own[0]
  if size % multiple:
    raise UserError(f'--size: {size} is not divisible by the patch size {multiple}')

  pixels = np.stack([_read(file, size) for file in files])
  folder, written = pathlib.Path(output), []
  folder.mkdir(parents=True, exist_ok=True)

  def draw(name: str, maps: Any, title: str, **options: Any) -> None:
    written.append(folder / f'{name}.png')
    figures.overlay_sheet(pixels, maps, written[-1], title=f'{title}\n{model}, step {step}', **options)

  images = tower.normalized(jnp.asarray(pixels))
  if transformer:
    attention, rolled, features = jax.device_get(jax.jit(_attention, static_argnums=0)(network, params, images))
    heads = {f'head {head}': attention[:, head] for head in range(attention.shape[1])}
    draw('attention', {'mean of heads': attention.mean(1), **heads}, 'Attention of the last layer')
    draw('rollout', {'rollout': rolled}, 'Attention rollout (all layers)')
  else:
    features = jax.device_get(_activation_maps(tower, images)[0])
  draw('features', {'features': attention_maps.pca_rgb(features)}, 'Patch features: principal components')
  if texts:
    similarity, relevant, scores = (_of_texts if transformer else _activation_maps_of_texts)(
      subject, tower, images, texts
    )
    draw('similarity', dict(zip(texts, similarity)), 'Similarity of patches and texts', shared=True)
    if relevant is not None:
      draw('relevance', dict(zip(texts, relevant)), 'Relevance for the similarity to each text')
    for text, row in zip(texts, scores, strict=True):
      for file, score in zip(files, row, strict=True):
        console.print(f'{file}: similarity {score:.3f} to {text!r}', highlight=False)
  elif 'logits' in subject.outputs:
    relevant, best = (_of_classes if transformer else _activation_maps_of_classes)(tower, images)
    names = reopened.class_names()
    draw('relevance', {'relevance': relevant}, 'Relevance for the top-1 class')
    for file, index in zip(files, best, strict=True):
      console.print(f'{file}: top-1 class {names[index] if names else index}', highlight=False)
  if 'reconstruct' in subject.outputs and size == own[0]:
    pairs = jax.jit(subject.outputs['reconstruct'].call)(subject.params, subject.extra, {'image': pixels})
    masked, filled = np.moveaxis(np.asarray(pairs), 1, 0)
    draw('reconstruction', {'masked input': masked, 'reconstruction': filled}, 'Masked input and reconstruction')
  console.print('\n'.join(map(str, written)), highlight=False)
  return written


def _read(file: str, size: int) -> np.ndarray:
  path = pathlib.Path(file)
  if not path.is_file():
    raise UserError(f'{file}: no such image file')
  try:
    return ResizeCrop(size, crop=1.0)(path.read_bytes(), np.random.default_rng(0))
  except BadRecord as error:
    raise UserError(f'{file}: {error}') from error


def _attention(network: AttentionNetwork, params: Any, images: jax.Array) -> Any:
  """Attention of the last layer [B, H, rows, columns], rollout [B, rows, columns], features [B, rows, columns, D]."""
  _, projections = attention_maps.apply_with_intermediates(network, params, images)
  weights = projections.weights()
  last = attention_maps.from_class_token(weights[-1], network)
  rolled = attention_maps.from_class_token(attention_maps.rollout(weights), network)
  grids = (attention_maps.on_grid(x, network, images) for x in (last, rolled))
  return *grids, patch_features(network, params, images)


def _relevance(
  network: AttentionNetwork, params: Any, images: jax.Array, score: Callable[[Features], jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Relevance of each patch for the score of its image, [B, rows, columns], and the scores [B]."""
  flow, scores = attention_maps.relevance(network, params, images, score)
  given = attention_maps.from_class_token(flow - jnp.eye(flow.shape[-1]), network)  # without the identity term
  return attention_maps.on_grid(given, network, images), scores


def _of_texts(subject: EvaluatedModel, tower: ImageEncoder, images: jax.Array, texts: Sequence[str]) -> Any:
  """Patch similarity and relevance per text, both [texts, B, rows, columns], and scores [texts, B]."""
  network, params = tower.network, tower.params
  assert isinstance(network, AttentionNetwork)

  @jax.jit
  def compare(params: Any, images: jax.Array, embedded: jax.Array) -> Any:
    patches = attention_maps.patch_embeddings(network, params, images)
    similarity = jnp.einsum('brce,te->tbrc', patches, embedded)
    relevant, scores = jax.lax.map(
      lambda text: _relevance(network, params, images, lambda features: l2_normalize(features.output) @ text), embedded
    )
    return similarity, relevant, scores

  return jax.device_get(compare(params, images, subject.embed_texts(texts, jax.device_count())))


def _of_classes(tower: ImageEncoder, images: jax.Array) -> Any:
  """Relevance of each patch for the top-1 class, [B, rows, columns], and that class, [B]."""
  network, params = tower.network, tower.params
  assert isinstance(network, AttentionNetwork)

  @jax.jit
  def explain(params: Any, images: jax.Array) -> Any:
    relevant, _ = _relevance(network, params, images, lambda features: features.output.max(-1))
    features: Any = network.apply({'params': params}, images)
    return relevant, features.output.argmax(-1)

  return jax.device_get(explain(params, images))


def _activation_maps(tower: ImageEncoder, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Last feature map [B, rows, columns, D] of a network with global average pooling, and activation maps [..., E]."""
  maps = jax.jit(activation_maps.class_activation_maps, static_argnums=0)
  return maps(tower.network, tower.variables, images)


def _activation_maps_of_texts(
  subject: EvaluatedModel, tower: ImageEncoder, images: jax.Array, texts: Sequence[str]
) -> Any:
  """As _of_texts, without relevance: the score of an image is the mean of its similarity map."""
  given = _activation_maps(tower, images)[1]
  whole = jnp.linalg.norm(given.mean((1, 2)), axis=-1)[:, None, None, None]
  similarity = jnp.einsum('brce,te->tbrc', given / whole, subject.embed_texts(texts, jax.device_count()))
  return jax.device_get(similarity), None, jax.device_get(similarity.mean((2, 3)))


def _activation_maps_of_classes(tower: ImageEncoder, images: jax.Array) -> Any:
  """As _of_classes: the mean of the activation map of an image is the logit of its top-1 class."""
  given = _activation_maps(tower, images)[1]
  best = given.mean((1, 2)).argmax(-1)
  return jax.device_get((jnp.take_along_axis(given, best[:, None, None, None], axis=-1)[..., 0], best))
