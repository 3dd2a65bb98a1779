"""EfficientNet and ALIGN equal transformers', on random weights in float32: outputs, losses, gradients."""

import re

import jax
import numpy as np
import pytest

from fmcv_jax.models.backbones.efficientnet import EfficientNet, Row
from fmcv_jax.models.backbones.text import text_transformer
from fmcv_jax.models.multimodal.dual_encoder import DualEncoder
from fmcv_jax.objectives.contrastive import Contrastive

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')

from tests.models.test_parity import (  # noqa: E402
  IMAGES,
  TOKENS,
  assert_same_gradients,
  randomized,
  to_ours,
  to_torch,
)

ROWS = (Row(1, 16, 3, 1, 1), Row(3, 24, 5, 2, 6))
SIZES = {
  'image_size': 32,
  'width_coefficient': 1.0,
  'depth_coefficient': 1.0,
  'kernel_sizes': [row.size for row in ROWS],
  'in_channels': [32, *(row.features for row in ROWS[:-1])],
  'out_channels': [row.features for row in ROWS],
  'strides': [row.stride for row in ROWS],
  'num_block_repeats': [row.repeats for row in ROWS],
  'expand_ratios': [row.ratio for row in ROWS],
  'drop_connect_rate': 0.0,
}
NETWORK = {'stages': ROWS, 'stem': 32, 'image_size': 32, 'drop_path': 0.0}

# What test_parity's table does not know, before it.
SPELLING = (
  (r'embeddings\.convolution', 'conv'),
  (r'embeddings\.batchnorm', 'norm'),
  (r'(expansion|depthwise_conv|projection)\.(\w+)_conv', r'\2'),
  (r'(expansion|depthwise_conv|projection)\.(\w+)_(bn|norm)', r'\2_norm'),
  (r'squeeze_excite\.reduce', 'squeeze'),
  (r'squeeze_excite\.expand', 'excite'),
  ('top_conv', 'top'),
  ('top_bn', 'top_norm'),
  ('running_', ''),
  (r'embeddings\.LayerNorm', 'embed_norm'),
  (r'word_embeddings\.weight', 'tokens.embedding'),
  (r'attention\.self', 'attention'),
  (r'attention\.output\.LayerNorm', 'norm1'),
  (r'attention\.output\.dense', 'attention.out'),
  (r'output\.LayerNorm', 'norm2'),
  (r'intermediate\.dense', 'mlp.up'),
  (r'output\.dense', 'mlp.down'),
)
PLACES = [
  f'stage{n}.{f"blocks.{i - 1}" if i else "first"}' for n, row in enumerate(ROWS, 1) for i in range(row.repeats)
]
UNUSED = re.compile('num_batches_tracked|position_ids|token_type|pooler')


def spelled(tensors):
  found = {}
  for name, tensor in tensors:
    if UNUSED.search(name):
      continue
    name = re.sub(r'^efficientnet\.', '', name)
    name = re.sub(r'encoder\.blocks\.(\d+)', lambda m: PLACES[int(m[1])], name)
    for pattern, replacement in SPELLING:
      name = re.sub(pattern, replacement, name)
    found[name] = tensor
  return found


def with_gradients(reference):
  """The reference whose every parameter's gradient is called as the parameter is here, for assert_same_gradients."""
  reference.named_parameters = lambda: spelled(type(reference).named_parameters(reference)).items()
  return reference


def shaken(reference):
  """Random running statistics too; scales are about 1 (initialized near 0 there), so that images differ to the end."""
  generator = torch.Generator().manual_seed(1)
  for module in reference.modules():
    if isinstance(module, torch.nn.BatchNorm2d):
      torch.nn.init.ones_(module.weight)
      module.running_mean.copy_(0.3 * torch.rand(module.running_mean.shape, generator=generator))
      module.running_var.copy_(0.1 + 0.3 * torch.rand(module.running_var.shape, generator=generator))
  return randomized(reference)


@pytest.mark.slow
def test_efficientnet_classifier_in_training():
  config = transformers.EfficientNetConfig(**SIZES, hidden_dim=1280, num_labels=7, dropout_rate=0.0)
  reference = shaken(transformers.EfficientNetForImageClassification(config))
  network = EfficientNet(**NETWORK, top=1280, num_classes=7)
  shapes = jax.eval_shape(network.init, jax.random.key(0), IMAGES)
  params = to_ours(spelled(reference.named_parameters()), shapes['params'])
  statistics = to_ours(spelled(reference.named_buffers()), shapes['batch_stats'])
  theirs = reference.train()(to_torch(IMAGES)).logits
  weights = np.random.default_rng(1).normal(size=theirs.shape).astype(np.float32)
  (theirs * torch.from_numpy(weights)).sum().backward()

  def weighed(params):
    variables = {'params': params, 'batch_stats': statistics}
    ours = network.apply(variables, IMAGES, train=True, mutable=['batch_stats'])[0].output
    return (ours * weights).sum(), ours

  gradients, ours = jax.jit(jax.grad(weighed, has_aux=True))(params)
  largest = np.abs(theirs.detach().numpy()).max()
  np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=1e-5 * largest)
  assert_same_gradients(gradients, with_gradients(reference), shapes['params'])


def test_align():
  text = {'vocab_size': 92, 'hidden_size': 48, 'num_hidden_layers': 2, 'num_attention_heads': 4}
  text |= {'intermediate_size': 96, 'max_position_embeddings': 6, 'layer_norm_eps': 0.01}
  config = transformers.AlignConfig(text_config=text, vision_config={**SIZES, 'hidden_dim': 24}, projection_dim=24)
  reference = shaken(transformers.AlignModel(config))
  tower = text_transformer(
    92, 6, 48, 2, 4, mlp_dim=96, causal=False, pool='first', attend_padding=False, num_classes=24, head_bias=True,
    eps=0.01, post_norm=True,
  )  # fmt: skip
  network = DualEncoder(EfficientNet(**NETWORK, top=0), tower, initial_scale=1.0)
  shapes = jax.eval_shape(network.init, jax.random.key(0), IMAGES, TOKENS)
  tensors = dict(reference.named_parameters())
  kind = tensors['text_model.embeddings.token_type_embeddings.weight'][:1]
  tensors['text_model.embeddings.position_embeddings.weight'] = (
    tensors['text_model.embeddings.position_embeddings.weight'] + kind
  )
  temperature = tensors['temperature'].detach()
  tensors['temperature'] = -torch.log(temperature)
  params = to_ours(spelled(tensors.items()), shapes['params'])
  statistics = to_ours(spelled(reference.named_buffers()), shapes['batch_stats'])
  theirs = reference(
    input_ids=to_torch(TOKENS), pixel_values=to_torch(IMAGES), attention_mask=to_torch(TOKENS) != 0, return_loss=True
  )
  theirs.loss.backward()
  reference.temperature.grad *= -temperature
  objective = Contrastive(network, label_smoothing=0.1)

  def loss(params):
    pairs = network.apply({'params': params, 'batch_stats': statistics}, IMAGES, TOKENS)
    return objective.couple(params, (pairs.image, pairs.text), {}, {})[0], pairs

  (ours, pairs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
  np.testing.assert_allclose(pairs.image, theirs.image_embeds.detach(), rtol=0, atol=1e-5)
  np.testing.assert_allclose(pairs.text, theirs.text_embeds.detach(), rtol=0, atol=1e-5)
  np.testing.assert_allclose(ours, theirs.loss.detach(), rtol=1e-5)
  # The towers' are small sums, over all pixels, of what the loss takes from one image and gives to another: 1e-6, with
  # differences of 2e-9, where the loss is 1.
  assert_same_gradients(gradients, with_gradients(reference), shapes['params'], near=2e-3)
