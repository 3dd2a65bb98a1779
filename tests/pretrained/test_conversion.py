"""Import and export without the reference libraries: kinds of files, what is refused, and use."""

import dataclasses
import errno
import io
import json
import re
import zipfile

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import fmcv_jax
from fmcv_jax.__main__ import main
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.objectives.classification import Classification
from fmcv_jax.parallel.rules import path_of
from fmcv_jax.pretrained import vit as names
from fmcv_jax.pretrained.families import family_of, variant_of
from fmcv_jax.pretrained.hub_classes import names_in
from fmcv_jax.pretrained.layout import write
from fmcv_jax.pretrained.tensors import LazyArray, open_tensors, write_tensors
from fmcv_jax.run import Run, keep_class_names
from fmcv_jax.train import checksums
from fmcv_jax.train.checkpoint import Checkpointer
from tests import runs


@pytest.fixture(scope='module')
def published():
  """A small classifier with registers, as timm has it."""
  size = {'width': 64, 'depth': 2, 'num_heads': 1, 'mlp_dim': 96}
  network = vit(
    'mu/8', image_size=16, num_classes=5, registers=2, class_token_has_position=False, layer_scale=0.5, **size
  )
  params = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 16, 16, 3)))['params']
  noise = np.random.default_rng(0)
  flat = {
    path_of(path): np.asarray(x + 0.1 * noise.normal(size=x.shape), np.float32)
    for path, x in jax.tree_util.tree_flatten_with_path(params)[0]
  }
  return {name: np.asarray(x) for name, x in write(names.timm(), flat, network).items()}


def run(*arguments):
  return main([str(x) for x in arguments])


def one_line(capsys):
  errors = capsys.readouterr().err
  lines = [line for line in errors.splitlines() if line.startswith('fmcv ')]
  assert len(lines) == 1
  assert 'Traceback' not in errors
  return lines[0]


def in_shards(folder, tensors):
  folder.mkdir()
  halves = sorted(tensors)[::2], sorted(tensors)[1::2]
  for number, half in enumerate(halves):
    write_tensors(folder / f'model-{number}.safetensors', {name: tensors[name] for name in half})
  index = {name: f'model-{number}.safetensors' for number, half in enumerate(halves) for name in half}
  (folder / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
  return folder


def test_a_file_a_folder_of_shards_and_an_npz_come_back_bitwise(published, tmp_path):
  write_tensors(tmp_path / 'one.safetensors', published)
  np.savez(tmp_path / 'one.npz', **published)
  for given in (tmp_path / 'one.safetensors', in_shards(tmp_path / 'shards', published), tmp_path / 'one.npz'):
    to = tmp_path / f'{given.name}.run'
    assert run('import', given, '--as', 'dinov2', '--to', to) == 0
    assert run('export', to, '--format', 'timm', '--to', tmp_path / 'back.safetensors') == 0
    back = open_tensors(tmp_path / 'back.safetensors')
    assert set(back.shapes) == set(published)
    for name, x in published.items():
      np.testing.assert_array_equal(back[name], x, err_msg=name)


def test_what_is_written_is_the_librarys_own_file_byte_for_byte(published, tmp_path):
  tensors = published | {'scalar': np.float32(3), 'counts': np.arange(3), 'none': np.zeros((0, 2), np.float32)}
  tensors['turned'] = LazyArray(lambda: np.arange(6, dtype=np.float32).reshape(2, 3).T)
  write_tensors(tmp_path / 'ours.safetensors', tensors)
  contiguous = {name: np.asarray(x, order='C') for name, x in tensors.items()}
  save_file(contiguous, tmp_path / 'theirs.safetensors', metadata={'format': 'pt'})
  assert (tmp_path / 'ours.safetensors').read_bytes() == (tmp_path / 'theirs.safetensors').read_bytes()


def test_each_array_goes_to_its_place_on_the_mesh(published, tmp_path, monkeypatch):
  saved = []
  monkeypatch.setattr(Checkpointer, 'save', lambda store, state, *rest: saved.append(state))
  write_tensors(tmp_path / 'x.safetensors', published)
  mesh = ['--config.mesh.data=1', '--config.mesh.fsdp=-1']
  assert run('import', tmp_path / 'x.safetensors', '--as', 'dinov2', '--to', tmp_path / 'run', *mesh) == 0
  kernel = saved[0].params['blocks']['mlp']['up']['kernel']
  assert kernel.shape == (2, 64, 96)
  assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 8, 96)}
  np.testing.assert_array_equal(kernel[1], published['blocks.1.mlp.fc1.weight'].T)


def test_an_imported_model_is_used_in_four_lines(published, tmp_path):
  write_tensors(tmp_path / 'one.safetensors', published)
  assert run('import', tmp_path / 'one.safetensors', '--to', tmp_path / 'run') == 0
  images = [np.full((20, 30, 3), 40 * i, np.uint8) for i in range(3)]
  model = fmcv_jax.load(tmp_path / 'run', batch=8)
  probabilities = model.classify(images)
  assert probabilities.shape == (3, 5)
  np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
  assert model.encode_image(images).shape == (3, 64)
  half = fmcv_jax.load(tmp_path / 'run', batch=8, dtype='bfloat16').classify(images)
  np.testing.assert_allclose(half, probabilities, atol=0.05)
  assert np.abs(half - probabilities).max() > 0
  with pytest.raises(fmcv_jax.errors.UserError, match='has no text encoder'):
    model.encode_text(['a cat'])


def without(tensors, name):
  return {key: x for key, x in tensors.items() if key != name}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda t: without(t, 'blocks.1.norm2.bias'), 'blocks.1.norm2.bias is missing'),
    (lambda t: t | {'blocks.0.attn.relative': np.ones(3)}, 'no layout of any family contains blocks.0.attn.relative'),
    (lambda t: t | {'norm.weight': np.full(64, np.nan, np.float32)}, 'norm.weight contains NaN or Inf'),
    (lambda t: t | {'norm.weight': np.ones(63, np.float32)}, r'norm.weight is \(63,\), but the network needs \(64,\)'),
    (lambda t: {}, 'is empty|contains an empty file|holds nothing'),
  ],
)
def test_a_checkpoint_that_is_not_whole_is_one_line_and_writes_nothing(published, tmp_path, capsys, change, message):
  np.savez(tmp_path / 'x.npz', **change(published))
  assert run('import', tmp_path / 'x.npz', '--to', tmp_path / 'run') == 2
  assert re.search(message, one_line(capsys))
  assert not (tmp_path / 'run').exists()


def test_files_that_are_no_checkpoints_are_one_line(published, tmp_path, capsys):
  write_tensors(tmp_path / 'x.safetensors', published)
  np.savez(tmp_path / 'x.npz', **published)
  for kind in ('safetensors', 'npz'):
    whole = (tmp_path / f'x.{kind}').read_bytes()
    (tmp_path / f'cut.{kind}').write_bytes(whole[: len(whole) // 2])
  (tmp_path / 'noise.safetensors').write_bytes(b'\x00' * 64)
  (tmp_path / 'noise.npz').write_bytes(b'PK\x03\x04nonsense')
  np.savez(tmp_path / 'objects.npz', bomb=np.array([object()], dtype=object))
  (tmp_path / 'x.txt').write_text('x')
  shards = in_shards(tmp_path / 'shards', published)
  (shards / 'model-1.safetensors').unlink()
  outside = in_shards(tmp_path / 'outside', published)
  index = json.dumps({'weight_map': {'norm.weight': '../x.safetensors'}})
  (outside / 'model.safetensors.index.json').write_text(index)
  for name, message in {
    'cut.safetensors': 'not a complete safetensors file',
    'cut.npz': 'not a complete npz file',
    'noise.safetensors': 'not a complete safetensors file',
    'noise.npz': 'not a complete npz file',
    'objects.npz': 'objects',
    'x.txt': 'unknown kind of file',
    'missing.npz': 'no such file',
    'shards': 'names the shard model-1.safetensors, which is not in',
    'outside': 'names the shard ../x.safetensors, which is not in',
  }.items():
    assert run('import', tmp_path / name, '--to', tmp_path / 'run') == 2
    assert message in one_line(capsys)
  assert not (tmp_path / 'run').exists()


def test_a_family_and_a_size_are_held_against_the_file(published, tmp_path, capsys):
  write_tensors(tmp_path / 'x.safetensors', published)
  for name, message in {
    'clip': "no layout of family 'clip' contains",
    'dinov3': "did you mean 'dinov2'",
    'dinov2_l14': 'is of no named size, not l14',
    'deit_b16_distilled': 'is of no named size, not b16',
  }.items():
    assert run('import', tmp_path / 'x.safetensors', '--as', name, '--to', tmp_path / 'run') == 2
    assert message in one_line(capsys)
  assert not (tmp_path / 'run').exists()
  network = vit('Ti/16', image_size=32, distilled=True, num_classes=3)
  shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))['params']
  zeros = {path_of(path): np.zeros(x.shape, np.float32) for path, x in jax.tree_util.tree_flatten_with_path(shapes)[0]}
  write_tensors(tmp_path / 'ti.safetensors', write(names.timm(), zeros, network))
  assert run('import', tmp_path / 'ti.safetensors', '--as', 'deit_s16', '--to', tmp_path / 'run') == 2
  assert 'is of the size Ti/16, not s16' in one_line(capsys)
  assert run('import', tmp_path / 'ti.safetensors', '--as', 'deit_ti16_distilled', '--to', tmp_path / 'run') == 0


def test_places_that_cannot_be_written_are_one_line(published, tmp_path, capsys):
  write_tensors(tmp_path / 'x.safetensors', published)
  assert run('import', tmp_path / 'x.safetensors', '--as', 'dinov2', '--to', tmp_path / 'run') == 0
  (tmp_path / 'file').write_text('x')
  capsys.readouterr()
  for to, message in {
    tmp_path / 'file': 'cannot create the folder',
    tmp_path / 'file' / 'x.safetensors': 'cannot be written',
    tmp_path / 'x.pth': 'only .safetensors, .npz and folders are written',
  }.items():
    assert run('export', tmp_path / 'run', '--format', 'timm', '--to', to) == 2
    assert message in one_line(capsys)
  assert run('export', tmp_path / 'run', '--format', 'onnx', '--to', tmp_path / 'x') == 2
  assert 'known: fmcv, official, timm, transformers' in one_line(capsys)


def test_a_full_disk_is_one_line_and_leaves_nothing_in_the_way(published, tmp_path, capsys, monkeypatch):
  write_tensors(tmp_path / 'x.safetensors', published)
  command = 'import', tmp_path / 'x.safetensors', '--as', 'dinov2', '--to', tmp_path / 'run'
  with monkeypatch.context() as full:

    def write(folder):
      raise OSError(errno.ENOSPC, 'No space left on device')

    full.setattr(checksums, 'write', write)
    assert run(*command) == 2
  assert 'No space left on device' in one_line(capsys)
  assert not (tmp_path / 'run').exists()
  assert run(*command) == 0


def test_a_zip_bomb_is_one_line(tmp_path, capsys):
  np.savez_compressed(tmp_path / 'packed.npz', **{'norm.weight': np.zeros(5_000_000, np.float32)})
  plain = io.BytesIO()
  np.save(plain, np.zeros(8, np.float32))
  with zipfile.ZipFile(tmp_path / 'says.npz', 'w') as archive:
    said = plain.getvalue().replace(b"'shape': (8,), }       ", b"'shape': (80000000,), }")
    archive.writestr('norm.weight.npy', said)
  for name, message in {
    'packed.npz': 'would grow from',
    'says.npz': 'says it is (80000000,), but is not as long',
  }.items():
    assert run('import', tmp_path / name, '--to', tmp_path / 'run') == 2
    assert message in one_line(capsys)
  assert not (tmp_path / 'run').exists()


class Bomb:
  def __init__(self, file):
    self.file = file

  def __reduce__(self):
    return open, (str(self.file), 'w')


def test_a_pickle_bomb_is_one_line_and_does_not_go_off(published, tmp_path, capsys):
  torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
  state = {name: torch.from_numpy(x.copy()) for name, x in published.items()}
  for modern in (True, False):
    torch.save(state | {'bomb': Bomb(tmp_path / 'went_off')}, tmp_path / 'x.pth', _use_new_zipfile_serialization=modern)
    assert run('import', tmp_path / 'x.pth', '--to', tmp_path / 'run') == 2
    assert 'holds more than tensors, which only running' in one_line(capsys)
  torch.save(state, tmp_path / 'x.pth')
  (tmp_path / 'cut.pth').write_bytes((tmp_path / 'x.pth').read_bytes()[:5000])
  with zipfile.ZipFile(tmp_path / 'packed.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('x/data/0', bytes(20_000_000))
  for name, message in {'cut.pth': 'is not a complete file of plain tensors', 'packed.pth': 'would grow from'}.items():
    assert run('import', tmp_path / name, '--to', tmp_path / 'run') == 2
    assert message in one_line(capsys)
  assert not (tmp_path / 'went_off').exists()
  assert not (tmp_path / 'run').exists()
  assert run('import', tmp_path / 'x.pth', '--to', tmp_path / 'run') == 0


@dataclasses.dataclass(frozen=True)
class WithProjector(Classification):
  """A classification with parameters of its own, under the name that another objective trains with."""

  @property
  def logical_axes(self):
    return (*super().logical_axes, ('projector/kernel', (None, None)))

  def init(self, rng):
    params, extra = super().init(rng)
    return {**params, 'projector': {'kernel': jax.numpy.ones((2, 3))}}, extra


def test_a_parameter_that_its_objective_does_not_call_auxiliary_is_never_omitted(tmp_path, capsys):
  config = runs.classification(runs.image_folder(tmp_path / 'images'))
  config['objective']['name'] = 'tests.pretrained.test_conversion:WithProjector'
  workdir = runs.untrained(config, tmp_path / 'run')
  assert run('export', workdir, '--format', 'timm', '--to', tmp_path / 'x') == 2
  assert 'projector' in one_line(capsys)
  assert not (tmp_path / 'x').exists()


def test_parameters_that_are_used_in_training_only_are_omitted_by_name(tmp_path, capsys):
  workdir = runs.untrained(runs.autoencoder(runs.image_folder(tmp_path / 'images')), tmp_path / 'run')
  assert run('export', workdir, '--format', 'diffusers', '--to', tmp_path / 'x.safetensors') == 0
  assert 'not exported, used in training only: discriminator (' in capsys.readouterr().err
  params = Run.reopen(workdir).abstract_state.params
  assert set(params) == {'autoencoder', 'discriminator'}
  with safe_open(tmp_path / 'x.safetensors', 'numpy') as file:
    assert len(file.keys()) == len(jax.tree.leaves(params['autoencoder']))


@pytest.mark.parametrize('format', ['timm', 'transformers'])
def test_class_names_are_exported_and_come_back(format, tmp_path, capsys):
  folder = runs.image_folder(tmp_path / 'images')
  config = runs.classification(folder, objective__network__pool='cls')
  workdir = runs.untrained(config, tmp_path / 'run')
  keep_class_names(Run.reopen(workdir))
  assert run('export', workdir, '--format', format, '--to', tmp_path / format) == 0
  stored = json.loads((tmp_path / format / 'config.json').read_text())
  if format == 'timm':
    assert stored['label_names'] == ['a', 'b', 'c']
  else:
    theirs = pytest.importorskip('transformers').AutoConfig.from_pretrained(tmp_path / format)
    assert theirs.id2label == {0: 'a', 1: 'b', 2: 'c'}
    assert theirs.label2id == {'a': 0, 'b': 1, 'c': 2}
  assert run('import', tmp_path / format, '--to', tmp_path / 'back') == 0
  assert '3 class names (a, b, c)' in capsys.readouterr().err
  image = folder / 'a/0.png'
  assert fmcv_jax.load(tmp_path / 'back').class_names == ('a', 'b', 'c')
  ours, back = (dict(fmcv_jax.load(path).predict(image)) for path in (workdir, tmp_path / 'back'))
  assert ours == pytest.approx(back, abs=1e-5)


def test_names_that_do_not_name_every_class_are_not_read():
  assert names_in({'label_names': {'0': 'a', '1': 'b'}}) == ('a', 'b')
  assert names_in({'id2label': {'1': 'b', '0': 'a'}}) == ('a', 'b')
  for config in ({}, {'id2label': {'0': 'LABEL_0', '1': 'LABEL_1'}}, {'label_names': {'0': 'a', '7': 'b'}}):
    assert names_in(config) == ()


def test_a_run_that_adapts_stable_diffusion_2_is_of_its_family():
  shapes = {'network/encoder/conv_in/kernel': (3, 3, 4, 320)}
  own = {'name': 'diffusion', 'network': {'name': 'unet', 'variant': 'sd2'}}
  assert family_of(shapes, variant_of(own)) == 'sd2'
  assert family_of(shapes, variant_of({'name': 'finetune', 'objective': own})) == 'sd2'
  assert variant_of({'name': 'autoencoder'}) == ''
