"""The releases of AugReg and big_vision, against transformers' files of the same weights, and against timm's reader."""

import jax
import numpy as np
import pytest

from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from tests.pretrained.references import IMAGE, PIXELS, TEXT, initialized, published, to_torch

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
transformers = pytest.importorskip('transformers', reason='pip install fmcv-jax[parity]')


def flax_of(state, heads):
  """Arrays of a SigLIP of transformers, as big_vision names and shapes them."""
  found = {}

  def dense(name, theirs):
    found[f'{name}/kernel'], found[f'{name}/bias'] = state[f'{theirs}.weight'].T, state[f'{theirs}.bias']

  def norm(name, theirs):
    found[f'{name}/scale'], found[f'{name}/bias'] = state[f'{theirs}.weight'], state[f'{theirs}.bias']

  def attention(name, parts, out):
    for part, (weight, bias) in parts.items():
      width = weight.shape[0] // heads
      found[f'{name}/{part}/kernel'] = np.stack([w.T for w in np.split(weight, heads)], 1)
      found[f'{name}/{part}/bias'] = bias.reshape(heads, width)
    weight = state[f'{out}.weight']
    found[f'{name}/out/kernel'] = np.stack([w.T for w in np.split(weight, heads, axis=1)])
    found[f'{name}/out/bias'] = state[f'{out}.bias']

  def tower(prefix, block, theirs):
    for layer in range(2):
      own, name = f'{prefix}/{block}_{layer}', f'{theirs}.encoder.layers.{layer}'
      norm(f'{own}/LayerNorm_0', f'{name}.layer_norm1')
      parts = {
        part: (state[f'{name}.self_attn.{part[0]}_proj.weight'], state[f'{name}.self_attn.{part[0]}_proj.bias'])
        for part in ('query', 'key', 'value')
      }
      attention(f'{own}/MultiHeadDotProductAttention_0', parts, f'{name}.self_attn.out_proj')
      norm(f'{own}/LayerNorm_1', f'{name}.layer_norm2')
      dense(f'{own}/MlpBlock_0/Dense_0', f'{name}.mlp.fc1')
      dense(f'{own}/MlpBlock_0/Dense_1', f'{name}.mlp.fc2')

  image, text, head = 'params/img', 'params/txt', 'vision_model.head'
  tower(f'{image}/Transformer', 'encoderblock', 'vision_model')
  tower(f'{text}/Encoder_0', 'encoderblock', 'text_model')
  norm(f'{image}/Transformer/encoder_norm', 'vision_model.post_layernorm')
  norm(f'{text}/Encoder_0/encoder_norm', 'text_model.final_layer_norm')
  patch = 'vision_model.embeddings.patch_embedding'
  found[f'{image}/embedding/kernel'] = state[f'{patch}.weight'].transpose(2, 3, 1, 0)
  found[f'{image}/embedding/bias'] = state[f'{patch}.bias']
  found[f'{image}/pos_embedding'] = state['vision_model.embeddings.position_embedding.weight'][None]
  found[f'{text}/pos_embedding'] = state['text_model.embeddings.position_embedding.weight'][None]
  found[f'{text}/Embed_0/embedding'] = state['text_model.embeddings.token_embedding.weight']
  dense(f'{text}/head', 'text_model.head')
  pool = f'{image}/MAPHead_0'
  found[f'{pool}/probe'] = state[f'{head}.probe']
  weights = np.split(state[f'{head}.attention.in_proj_weight'], 3)
  biases = np.split(state[f'{head}.attention.in_proj_bias'], 3)
  parts = dict(zip(('query', 'key', 'value'), zip(weights, biases)))
  attention(f'{pool}/MultiHeadDotProductAttention_0', parts, f'{head}.attention.out_proj')
  norm(f'{pool}/LayerNorm_0', f'{head}.layernorm')
  dense(f'{pool}/MlpBlock_0/Dense_0', f'{head}.mlp.fc1')
  dense(f'{pool}/MlpBlock_0/Dense_1', f'{head}.mlp.fc2')
  found['params/t'], found['params/b'] = state['logit_scale'], state['logit_bias']
  return {name: np.ascontiguousarray(x) for name, x in found.items()}


def stacked(arrays):
  """The same with the layers of a tower as one array."""
  found = {name: x for name, x in arrays.items() if 'encoderblock_' not in name}
  for name in (name for name in arrays if 'encoderblock_0' in name):
    layers = [arrays[name.replace('encoderblock_0', f'encoderblock_{i}')] for i in range(2)]
    found[name.replace('encoderblock_0', 'encoderblock')] = np.stack(layers)
  return found


def values(workdir):
  from fmcv_jax.run import Run

  return jax.device_get(Run.reopen(workdir).restored_model()[0].params)


def test_siglip_is_the_same_from_google_and_from_transformers(tmp_path):
  model = published(
    transformers.SiglipModel(transformers.SiglipConfig(vision_config=IMAGE, text_config=TEXT)), tmp_path / 'hub'
  )
  arrays = flax_of({name: x.detach().numpy() for name, x in model.state_dict().items()}, heads=2)
  np.savez(tmp_path / 'apart.npz', **arrays)
  np.savez(tmp_path / 'stacked.npz', **stacked(arrays))
  import_checkpoint(str(tmp_path / 'hub'), str(tmp_path / 'a'), 'siglip')
  expected = values(tmp_path / 'a')
  for name in ('apart', 'stacked'):
    import_checkpoint(str(tmp_path / f'{name}.npz'), str(tmp_path / name), None)
    jax.tree.map(np.testing.assert_array_equal, values(tmp_path / name), expected)


def test_augreg_as_timm_reads_it(tmp_path):
  timm = pytest.importorskip('timm', reason='pip install timm')
  model = timm.models.vision_transformer.VisionTransformer(
    img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2, num_classes=7
  ).eval()
  rng = np.random.default_rng(0)
  arrays = {'cls': (1, 1, 128), 'embedding/kernel': (8, 8, 3, 128), 'embedding/bias': (128,), 'head/kernel': (128, 7)}
  arrays |= {'head/bias': (7,), 'Transformer/posembed_input/pos_embedding': (1, 17, 128)}
  arrays |= {f'Transformer/encoder_norm/{leaf}': (128,) for leaf in ('scale', 'bias')}
  for layer in range(2):
    block = f'Transformer/encoderblock_{layer}'
    arrays |= {f'{block}/LayerNorm_{i}/{leaf}': (128,) for i in (0, 2) for leaf in ('scale', 'bias')}
    own = f'{block}/MultiHeadDotProductAttention_1'
    for part in ('query', 'key', 'value'):
      arrays |= {f'{own}/{part}/kernel': (128, 2, 64), f'{own}/{part}/bias': (2, 64)}
    arrays |= {f'{own}/out/kernel': (2, 64, 128), f'{own}/out/bias': (128,)}
    arrays |= {f'{block}/MlpBlock_3/Dense_0/kernel': (128, 512), f'{block}/MlpBlock_3/Dense_0/bias': (512,)}
    arrays |= {f'{block}/MlpBlock_3/Dense_1/kernel': (512, 128), f'{block}/MlpBlock_3/Dense_1/bias': (128,)}
  arrays = {name: 0.1 * rng.normal(size=shape).astype(np.float32) for name, shape in arrays.items()}
  np.savez(tmp_path / 'augreg.npz', **arrays)
  model.load_pretrained(str(tmp_path / 'augreg.npz'))
  run = import_checkpoint(str(tmp_path / 'augreg.npz'), str(tmp_path / 'ours'), None)
  params = values(tmp_path / 'ours')
  with torch.no_grad():
    theirs = model(to_torch(PIXELS)).numpy()
  np.testing.assert_allclose(
    run.experiment.objective.network.apply({'params': params}, PIXELS).output, theirs, atol=1e-4
  )
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'again.npz'), 'augreg')
  again = np.load(tmp_path / 'again.npz')
  assert set(again.files) == set(arrays)
  for name, x in arrays.items():
    np.testing.assert_array_equal(again[name], x, err_msg=name)


WIDTHS = {'H/14': (1280, 16, 80), 'So400m/14': (1152, 16, 72), 'gopt/16': (1536, 16, 96)}


@pytest.mark.parametrize('variant', WIDTHS)
@pytest.mark.parametrize('form', ['augreg', 'big_vision'])
def test_heads_of_the_published_sizes_are_as_wide_as_published(tmp_path, variant, form):
  width, heads, each = WIDTHS[variant]
  side = int(variant.partition('/')[2]) * 2
  network = {'name': 'vit', 'variant': variant, 'depth': 1, 'image_size': side}
  initialized(tmp_path / 'ours', {'name': 'encoder', 'network': network})
  export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out.npz'), form)
  arrays = np.load(tmp_path / 'out.npz')
  attention = [name for name in arrays.files if 'MultiHeadDotProductAttention' in name]
  expected = {'kernel': (width, heads, each), 'bias': (heads, each)}
  for name in attention:
    part, leaf = name.split('/')[-2:]
    shape = expected[leaf] if part != 'out' else {'kernel': (heads, each, width), 'bias': (width,)}[leaf]
    assert arrays[name].shape == shape, name
  again = import_checkpoint(str(tmp_path / 'out.npz'), str(tmp_path / 'again'), 'vit')
  assert again.experiment.objective.network.stack.block.num_heads == heads


def test_each_tower_of_google_has_the_heads_of_its_arrays(tmp_path):
  image, text = {**IMAGE, 'num_attention_heads': 4}, {**TEXT, 'num_attention_heads': 8}
  config = transformers.SiglipConfig(vision_config=image, text_config={**text, 'projection_size': 128})
  model = published(transformers.SiglipModel(config), tmp_path / 'hub')
  import_checkpoint(str(tmp_path / 'hub'), str(tmp_path / 'a'), 'siglip')
  export_checkpoint(str(tmp_path / 'a'), str(tmp_path / 'out.npz'), 'big_vision')
  run = import_checkpoint(str(tmp_path / 'out.npz'), str(tmp_path / 'b'), None)
  words = np.random.default_rng(0).integers(0, 92, (2, 6)).astype(np.int32)
  ours = run.experiment.objective.network.apply({'params': values(tmp_path / 'b')}, PIXELS, words)
  with torch.no_grad():
    theirs = model(pixel_values=to_torch(PIXELS), input_ids=torch.from_numpy(words).long())
  np.testing.assert_allclose(ours.image, theirs.image_embeds, atol=1e-5)
  np.testing.assert_allclose(ours.text, theirs.text_embeds, atol=1e-5)
