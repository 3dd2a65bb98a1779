import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax import experiment
from fmcv_jax.__main__ import main
from fmcv_jax.apps import precompute
from fmcv_jax.config import override
from fmcv_jax.data.images.decode import decode
from fmcv_jax.data.loader import TrainLoader, evaluation_batches
from fmcv_jax.data.packing import ShardWriter
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.array_record import ArrayRecord, decode_record, encode_record
from fmcv_jax.data.sources.base import Source
from fmcv_jax.data.sources.subset import Subset
from fmcv_jax.data.tokenizers import ClipBpe
from fmcv_jax.data.transforms import Resize
from fmcv_jax.errors import UserError
from fmcv_jax.objectives.base import Objective
from fmcv_jax.objectives.outputs import Output
from fmcv_jax.run import Run, load_trained_params
from tests import runs
from tests.train.tiny import shaken


def first_batch(run, pipeline):
  e = run.experiment
  loader = TrainLoader(pipeline, batch=16, seed=0, fields=tuple(e.objective.example_batch), tokenizer=e.tokenizer)
  try:
    return next(loader)
  finally:
    loader.close()


def config_file(path, config):
  path.write_text(f'import json\n\ndef get_config():\n  return json.loads({json.dumps(config)!r})\n')
  return str(path)


def with_coder(tmp_path, coder):
  """A text-to-image config whose autoencoder comes from the run `coder`."""
  begin = {'extra/autoencoder': {'workdir': str(coder), 'part': 'extra/autoencoder'}}
  return config_file(tmp_path / 'c.py', {**runs.text_to_image(tmp_path / 'images', seed=1), 'init_from': begin})


def test_latents_of_the_frozen_autoencoder_are_written_once_for_each_record(tmp_path, monkeypatch):
  runs.image_folder(tmp_path / 'images')
  config = with_coder(tmp_path, 'runs/coder')
  objective = Run(experiment.load_config(config)).experiment.objective
  coder = jax.jit(objective.latent_space.autoencoder.init)(jax.random.key(7), np.zeros((1, 16, 16, 3), np.float32))[
    'params'
  ]
  monkeypatch.setattr(precompute, 'load_trained_params', {'runs/coder': {'extra': {'autoencoder': coder}}}.get)
  write, to, written = ShardWriter.write, tmp_path / 'latents', []

  def interrupted(self, shard, examples, skipped=None):
    if shard == 2:
      raise KeyboardInterrupt
    write(self, shard, examples, skipped)

  monkeypatch.setattr(ShardWriter, 'write', interrupted)
  with pytest.raises(KeyboardInterrupt):
    precompute.run(['latents'], str(to), config=config, shards=3)
  assert not to.exists()
  monkeypatch.setattr(
    ShardWriter, 'write', lambda self, shard, *rest: written.append(shard) or write(self, shard, *rest)
  )
  assert main(['precompute', 'latents', '--config', config, '--to', str(to)]) == 0
  assert written == [2]

  source, images = ArrayRecord(str(to)), Run(experiment.load_config(config)).experiment.data.source
  assert [source[index]['key'] for index in range(24)] == [images.key_of(index) for index in range(24)]
  assert [source[index]['texts'] for index in range(24)] == [images.texts_of(index) for index in range(24)]
  pixels = np.stack([decode(images[index]['image']) for index in range(24)])
  small = np.stack([Resize(16)(image, np.random.default_rng()) for image in pixels]).astype(np.float32) / 127.5 - 1
  latent = jax.jit(lambda x: objective.latent_space.autoencoder.apply({'params': coder}, x, method='encode'))(small)
  expected = np.concatenate([latent.mean, latent.log_variance], axis=-1)
  loader = TrainLoader(Pipeline(source, shuffle=False), batch=24, seed=0, fields=('latents',))
  given = next(loader)['latents']
  loader.close()
  assert given.dtype == np.float16
  np.testing.assert_allclose(given, expected, atol=2e-3 * np.abs(expected).max())


@pytest.mark.slow
def test_training_on_latents_equals_training_on_the_images(tmp_path):
  runs.image_folder(tmp_path / 'images')
  (tmp_path / 'coder').mkdir()
  config = with_coder(tmp_path, runs.untrained(runs.text_to_image(tmp_path / 'images'), tmp_path / 'coder'))
  precompute.run(['latents'], str(tmp_path / 'latents'), config=config)
  run = Run(experiment.load_config(config))
  cached = Run(experiment.load_config(config, ['objective.latent_space.precomputed=True']))
  of_images = first_batch(run, run.experiment.data)
  of_latents = first_batch(cached, Pipeline(ArrayRecord(str(tmp_path / 'latents'))))
  np.testing.assert_array_equal(of_latents['tokens'], of_images['tokens'])
  extra = load_trained_params(str(tmp_path / 'coder'))['extra']
  params, _ = jax.jit(run.experiment.objective.init)(jax.random.key(0))
  losses = [
    float(jax.jit(objective.loss)(params, batch, jax.random.key(2), extra)[0])
    for objective, batch in [(run.experiment.objective, of_images), (cached.experiment.objective, of_latents)]
  ]
  assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('padding', ['masked', 'end'])
def test_training_on_precomputed_text_equals_training_on_the_texts(tmp_path, padding):
  runs.image_folder(tmp_path / 'images')
  config = runs.text_to_image(
    tmp_path / 'images', objective__text_condition__padding=padding, objective__condition_dropout=0.5
  )
  model = runs.untrained(config, tmp_path / 'model', changed=shaken)
  precompute.run(['words', 'whole_text'], str(tmp_path / 'embedded'), model=str(model), images=True)
  cached = Run(experiment.resolve(override(config, ['objective.text_condition.precomputed=True'])))
  batch = first_batch(cached, Pipeline(ArrayRecord(str(tmp_path / 'embedded')), Resize(16)))
  run, state = Run(config), load_trained_params(str(model))
  from_texts = first_batch(run, Pipeline(ArrayRecord(str(tmp_path / 'embedded')), Resize(16)))
  np.testing.assert_array_equal(batch['image'], from_texts['image'])
  # Of two texts the first one was written; training draws one of them.
  source = {bytes(row['whole_text']): row['texts'][0] for row in ArrayRecord(str(tmp_path / 'embedded'))}
  from_texts['tokens'] = run.experiment.tokenizer([source[bytes(whole)] for whole in batch['whole_text']])
  losses = [
    float(jax.jit(run.experiment.objective.loss)(state['params'], given, jax.random.key(2), state['extra'])[0])
    for run, given in ((run, from_texts), (cached, batch))
  ]
  assert losses[0] == pytest.approx(losses[1], rel=1e-4)
  other = np.roll(batch['words'], 1, axis=0), np.roll(batch['whole_text'], 1, axis=0)
  loss, _ = jax.jit(cached.experiment.objective.loss)(
    state['params'], {**batch, 'words': other[0], 'whole_text': other[1]}, jax.random.key(2), state['extra']
  )
  assert float(loss) != pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_embeddings_equal_those_of_the_evaluators(tmp_path):
  folder, workdir = runs.image_folder(tmp_path / 'images'), tmp_path / 'clip'
  workdir.mkdir()
  runs.untrained(runs.contrastive(folder, data__image={'name': 'resize', 'size': 16}), workdir)
  precompute.run(['embed_image', 'embed_text'], str(tmp_path / 'embedded'), model=str(workdir), shards=2)
  source, run = ArrayRecord(str(tmp_path / 'embedded')), Run.reopen(workdir)
  subject, _ = run.restored_model()
  images = subject.map_dataset('embed_image', run.experiment.data, 16).values
  texts = subject.map_dataset('embed_text', run.experiment.data, 16).values
  assert len(source) == len(images) == 24
  for index in range(24):
    for name, expected in (('embed_image', images), ('embed_text', texts)):
      assert source[index][name].dtype == np.float32
      np.testing.assert_allclose(source[index][name], expected[index], atol=1e-6)


def test_networks_without_weights_are_refused(tmp_path):
  bare = config_file(tmp_path / 'bare.py', runs.text_to_image(runs.image_folder(tmp_path / 'images')))
  message = r"latents: needs networks that config.init_from does not load .*'autoencoder'.* pass --model"
  with pytest.raises(UserError, match=message):
    precompute.run(['latents'], str(tmp_path / 'other'), config=bare)
  with pytest.raises(UserError, match="'latent' is not an output of this objective; did you mean 'latents'"):
    precompute.run(['latent'], str(tmp_path / 'other'), config=bare)


def test_arrays_of_records_survive_encoding_and_are_given_by_their_names():
  arrays = {'a': np.arange(6, dtype=np.float16).reshape(2, 3), 'b': np.array(3, np.int32), 'c': np.zeros((0, 2))}
  stored = decode_record(encode_record({'label': 1, **arrays}))
  assert stored['label'] == 1
  for name, array in arrays.items():
    assert stored[name].dtype == array.dtype
    np.testing.assert_array_equal(stored[name], array)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'objective__augment': ({'name': 'flip'},)},
      'latent_space.precomputed: augment, repa and image_condition need the images',
    ),
    (
      {'objective__latent_space__autoencoder': None, 'objective__network__image_size': 16},
      'latent_space: precomputed: latents are those of an autoenc',
    ),
    (
      {'objective__text_condition__precomputed': True, 'objective__text_condition__train': True},
      'text_condition: precomputed: needs a frozen text encoder',
    ),
  ],
)
def test_augmentation_of_latents_is_refused(tmp_path, changes, message):
  config = runs.text_to_image(tmp_path, objective__latent_space__precomputed=True, **changes)
  with pytest.raises(UserError, match=message):
    Run(config)


@dataclasses.dataclass(frozen=True)
class TokenIds(Objective):
  """An objective of texts alone; the tokens, shifted, are its output."""

  shift: int = 49_108
  scale: float = 1.0

  @property
  def example_batch(self):
    return {'tokens': jax.ShapeDtypeStruct((8,), jnp.int32)}

  def init(self, rng):
    return {'zero': jnp.zeros(())}, {}

  def loss(self, params, batch, rng, extra):
    raise NotImplementedError

  def outputs(self):
    def call(params, extra, batch):
      ids = batch['tokens'] + self.shift
      floats = {'mean': ids.astype(jnp.float32).mean(-1) * self.scale, 'half': ids.astype(jnp.bfloat16) / 256}
      return {'ids': ids, 'floats': floats}

    return {'text': Output(call, 'tokens', ('tokens',)), 'key': Output(call, 'tokens', ('tokens',))}


@pytest.fixture(scope='module')
def token_model(tmp_path_factory):
  folder = runs.image_folder(tmp_path_factory.mktemp('images'))
  config = runs.contrastive(folder)
  config['objective'] = {'name': 'tests.apps.test_precompute:TokenIds'}
  config['rules'] = {'parameters': (('zero', ()),)}
  return runs.untrained(experiment.resolve(config), tmp_path_factory.mktemp('tokens'))


def test_trees_of_outputs_that_read_texts_become_fields_in_their_own_dtypes(token_model, tmp_path):
  precompute.run(['text'], str(tmp_path / 'own'), model=str(token_model))
  precompute.run(['text'], str(tmp_path / 'short'), model=str(token_model), dtype='float16')
  run = Run.reopen(token_model)
  texts = [run.experiment.data.source.texts_of(index)[0] for index in range(24)]
  expected = run.experiment.tokenizer(texts) + 49_108
  assert expected.max() == 49_407  # which float16 would round to 49,408
  for name, dtype in (('own', np.float32), ('short', np.float16)):
    rows = [ArrayRecord(str(tmp_path / name))[index] for index in range(24)]
    np.testing.assert_array_equal([row['text/ids'] for row in rows], expected)
    assert rows[0]['text/ids'].dtype == np.int32
    assert (rows[0]['text/floats/mean'].dtype, rows[0]['text/floats/half'].dtype) == (dtype, dtype)
    means = [float(row['text/floats/mean']) for row in rows]
    np.testing.assert_allclose(means, expected.mean(1), rtol=1e-6 if dtype == np.float32 else 2**-11)


def test_values_that_float16_cannot_hold_are_refused_by_name(token_model, tmp_path):
  scaled = ['objective.scale=2.0']
  with pytest.raises(UserError, match=r'--dtype float16: text/floats/mean of record 0 has values up to 98'):
    precompute.run(['text'], str(tmp_path / 'x'), scaled, model=str(token_model), dtype='float16')


def test_an_output_does_not_replace_a_field_of_the_records(token_model, tmp_path):
  to = str(tmp_path / 'once')
  precompute.run(['text'], to, model=str(token_model))
  again = ["data.source={'name': 'array_record', 'path': " + repr(to) + '}']
  with pytest.raises(UserError, match="the records already have a field 'text/floats/half'"):
    precompute.run(['text'], str(tmp_path / 'twice'), again, model=str(token_model))


def test_class_names_are_the_texts_of_records_without_any(tmp_path):
  @dataclasses.dataclass(frozen=True)
  class Bare(Source):
    names = ('cat', 'dog', 'owl')

    def __len__(self):
      return 3

    def __getitem__(self, index):
      return {'image': np.zeros((4, 4, 3), np.uint8), 'label': index}

  part = Pipeline(Subset(Bare(), np.array([2, 0])))
  tokenizer = ClipBpe(8)
  (batch,) = evaluation_batches(part, batch=2, fields=('tokens',), tokenizer=tokenizer)
  np.testing.assert_array_equal(batch['tokens'], tokenizer(['owl', 'cat']))
