import collections
import io
import itertools
import logging
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fmcv_jax.config import build
from fmcv_jax.data.loader import TrainLoader, evaluation_batches, fingerprint, resume
from fmcv_jax.data.order import WindowedOrder
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.base import Source
from fmcv_jax.data.sources.digits import Digits
from fmcv_jax.data.sources.image_folder import ImageFolder
from fmcv_jax.data.sources.mixture import Mixture
from fmcv_jax.data.tokenizers import Bpe, ClipBpe
from fmcv_jax.data.transforms import RandomResizedCrop, Resize
from fmcv_jax.errors import UserError
from tests.data.counting import Counting

EVERYTHING = ('image', 'label', 'tokens')


def take(pipeline, count, *, batch=8, seed=0, fields=('label',), **kwargs):
  loader = TrainLoader(pipeline, batch=batch, seed=seed, fields=fields, **kwargs)
  try:
    return [next(loader) for _ in range(count)]
  finally:
    loader.close()


def drain(loader, count):
  for _ in range(count):
    next(loader)


def labels(batches):
  return np.concatenate([batch['label'] for batch in batches]).tolist()


def assert_equal(first, second):
  assert len(first) == len(second)
  for a, b in zip(first, second):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def rich(**kwargs):
  """Random crops, captions and prompts of real images."""
  return Pipeline(
    Digits('test'), image=RandomResizedCrop(8), caption_templates=('a {}', 'the digit {}', '{}'), **kwargs
  )


def test_batches_have_the_documented_shapes_and_types():
  (batch,) = take(rich(), 1, fields=EVERYTHING, tokenizer=ClipBpe(9))
  assert {k: (v.shape, v.dtype.name, type(v)) for k, v in batch.items()} == {
    'image': ((8, 8, 8, 3), 'uint8', np.ndarray),
    'label': ((8,), 'int32', np.ndarray),
    'tokens': ((8, 9), 'int32', np.ndarray),
  }


@given(records=st.integers(1, 40), batch=st.integers(1, 9), shuffle=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_every_record_comes_once_per_epoch_and_batches_straddle_epochs(records, batch, shuffle, seed):
  pipeline = Pipeline(Counting(records), shuffle=shuffle)
  drawn = labels(take(pipeline, -(-3 * records // batch), batch=batch, seed=seed))
  for epoch in range(3):
    assert sorted(drawn[epoch * records : (epoch + 1) * records]) == list(range(records))


@pytest.mark.parametrize('processes', [1, 2, 3, 4])
def test_the_union_over_processes_is_the_same_global_batch(processes):
  alone = take(rich(), 4, batch=12, fields=EVERYTHING, tokenizer=ClipBpe(9))
  shares = [
    take(rich(), 4, batch=12, fields=EVERYTHING, tokenizer=ClipBpe(9), process_index=index, process_count=processes)
    for index in range(processes)
  ]
  joined = [{key: np.concatenate([share[key] for share in step]) for key in EVERYTHING} for step in zip(*shares)]
  assert_equal(joined, alone)


@pytest.mark.parametrize('stop', [0, 1, 2, 5])
def test_a_resumed_run_continues_bitwise(stop):
  pipeline, kwargs = rich(), {'fields': EVERYTHING, 'tokenizer': ClipBpe(9), 'batch': 100, 'seed': 5}
  whole = take(pipeline, 8, **kwargs)  # more than two epochs
  loader = TrainLoader(pipeline, **kwargs)
  for _ in range(stop):
    next(loader)
  state = loader.state()
  loader.close()
  assert state['examples'] == stop * 100
  assert_equal(take(pipeline, 8 - stop, start=resume(state, pipeline, 5), **kwargs), whole[stop:])


class Blocks(Counting):
  """Read in blocks of three neighbors."""

  def order(self, seed, shuffle):
    return WindowedOrder(np.array([*range(3, self.records, 3), self.records]), 2, seed, shuffle)


@given(
  kind=st.sampled_from([Counting, Blocks, lambda records: Mixture({'a': Counting(3), 'b': Blocks(records)})]),
  records=st.integers(1, 40),
  legs=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 5)), min_size=1, max_size=4),
  seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_the_order_continues_whatever_the_processes_and_batch_sizes_of_each_run(kind, records, legs, seed):
  pipeline, drawn = Pipeline(kind(records)), []
  for processes, share, steps in legs:
    position = {'process_count': processes, 'batch': processes * share, 'start': len(drawn)}
    shares = [take(pipeline, steps, seed=seed, process_index=index, **position) for index in range(processes)]
    drawn += [label for step in zip(*shares, strict=True) for batch in step for label in batch['label'].tolist()]
  assert not drawn or drawn == labels(take(pipeline, len(drawn), batch=1, seed=seed))
  every = sorted(pipeline.source[index]['label'] for index in range(len(pipeline.source)))
  for epoch in range(len(drawn) // len(every)):
    assert sorted(drawn[epoch * len(every) : (epoch + 1) * len(every)]) == every


def test_start_may_be_any_number_of_examples():
  pipeline = Pipeline(Counting(10))
  whole = labels(take(pipeline, 40, batch=1))
  for start in (1, 7, 10, 13, 29):
    assert labels(take(pipeline, 2, batch=3, start=start)) == whole[start : start + 6]


def test_crops_differ_between_epochs_and_seeds_but_not_between_runs():
  pipeline = Pipeline(Digits('test'), image=RandomResizedCrop(8), shuffle=False)
  first, second = take(pipeline, 2, batch=360, fields=('image',))
  again, _ = take(pipeline, 2, batch=360, fields=('image',))
  other, _ = take(pipeline, 2, batch=360, fields=('image',), seed=1)
  np.testing.assert_array_equal(first['image'], again['image'])
  assert (first['image'] != second['image']).any((1, 2, 3)).mean() > 0.9
  assert (first['image'] != other['image']).any((1, 2, 3)).mean() > 0.9


def test_captions_and_prompts_are_drawn_evenly():
  tokenizer = Bpe(600, 20, corpus=Counting(40))
  pipeline = Pipeline(Counting(40), caption_templates=('see {}', 'hear {} now'))
  texts = [
    text
    for batch in take(pipeline, 20, batch=40, fields=('tokens',), tokenizer=tokenizer)
    for text in tokenizer.decode(batch['tokens'])
  ]
  kinds = collections.Counter((text.split()[0], text.split()[1]) for text in texts)
  assert set(kinds) == set(itertools.product(('see', 'hear'), ('record', 'number')))
  assert min(kinds.values()) > 150
  assert all(text.endswith(' now') == text.startswith('hear') for text in texts)


def test_a_class_name_is_the_text_of_a_source_without_captions(tmp_path):
  class Named(Counting):
    names = tuple('abc')

    def __getitem__(self, index):
      return {'label': index}

  tokenizer = ClipBpe(7)
  (batch,) = take(
    Pipeline(Named(3), caption_templates=('a {}',), shuffle=False), 1, batch=3, fields=('tokens',), tokenizer=tokenizer
  )
  assert tokenizer.decode(batch['tokens']) == ['a a', 'a b', 'a c']


# Records that cannot be read.


def png(value):
  file = io.BytesIO()
  Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(file, 'PNG')
  return file.getvalue()


@pytest.fixture
def damaged_folder(tmp_path):
  (tmp_path / 'c').mkdir()
  for i in range(20):
    (tmp_path / 'c' / f'{i:02d}.png').write_bytes(png(i) if i != 13 else png(i)[:-40])
  return ImageFolder(str(tmp_path))


def test_a_truncated_image_is_skipped_and_reported_once_and_the_rest_is_complete(damaged_folder, caplog):
  pipeline = Pipeline(damaged_folder, image=Resize(16), max_bad=0.1)
  loader = TrainLoader(pipeline, batch=20, seed=0, fields=('image',))
  with caplog.at_level(logging.WARNING):
    epochs = [next(loader)['image'][:, 0, 0, 0].tolist() for _ in range(3)]
  loader.close()
  for epoch in epochs:
    counts = collections.Counter(epoch)
    assert set(counts) == set(range(20)) - {13}
    assert sorted(counts.values()) == [1] * 18 + [2]  # the stand-in
  assert loader.skipped.keys() == {'c/13.png'}
  assert 'truncated' in loader.skipped['c/13.png']
  assert [r.getMessage() for r in caplog.records] == [f'skipped c/13.png: {loader.skipped["c/13.png"]}']
  assert loader.state()['examples'] == 60


def test_stand_ins_are_the_same_after_a_restart_and_on_other_processes():
  pipeline = Pipeline(Counting(30, bad=(3, 4, 20)), max_bad=0.5)
  whole = labels(take(pipeline, 6, batch=10))
  assert not {3, 4, 20} & set(whole)
  assert labels(take(pipeline, 4, batch=10, start=20)) == whole[20:]
  shares = [labels(take(pipeline, 6, batch=10, process_index=p, process_count=2)) for p in range(2)]
  assert sorted(shares[0] + shares[1]) == sorted(whole)


def test_a_source_of_bad_records_only_stops_at_once():
  with pytest.raises(UserError, match=r'10 consecutive records could not be read; the first, counting/.: is bad'):
    TrainLoader(Pipeline(Counting(10, bad=tuple(range(10)))), batch=2, seed=0, fields=('label',))


def test_more_bad_records_than_allowed_stop_the_run_with_their_names():
  pipeline = Pipeline(Counting(3000, bad=tuple(range(0, 3000, 20))), max_bad=0.02)
  loader = TrainLoader(pipeline, batch=100, seed=0, fields=('label',))
  message = r'26 of 300 records \(8.7%\) cannot be read, more than max_bad=0.02; repair .* counting/2880: is bad; '
  with pytest.raises(UserError, match=message):
    drain(loader, 30)
  assert loader.state()['examples'] == 200


def test_a_fraction_of_bad_records_below_the_limit_does_not_stop_the_run():
  drawn = labels(take(Pipeline(Counting(3000, bad=tuple(range(0, 3000, 200))), max_bad=0.01), 60, batch=100))
  assert len(drawn) == 6000


def test_no_bad_record_is_allowed_when_max_bad_is_zero():
  loader = TrainLoader(
    Pipeline(Counting(3000, bad=(5,)), max_bad=0.0, shuffle=False), batch=4, seed=0, fields=('label',)
  )
  assert next(loader)['label'].tolist() == [0, 1, 2, 3]
  with pytest.raises(UserError, match='1 of 8 records'):
    next(loader)


def test_a_bug_in_a_source_is_not_counted_as_a_bad_record():
  class Broken(Counting):
    def __getitem__(self, index):
      raise KeyError('a typing mistake')

  with pytest.raises(KeyError, match='typing mistake'):
    TrainLoader(Pipeline(Broken(9)), batch=2, seed=0, fields=('label',))


# What cannot be given.


class Bare(Counting):
  def __getitem__(self, index):
    return {'image': png(index), 'key': 'k'}


@pytest.mark.parametrize(
  ('pipeline', 'kwargs', 'message'),
  [
    (
      Pipeline(Bare(3), image=Resize(4)),
      {'fields': ('image', 'label')},
      'needs the fields image, label, but Bare has no label; it provides image',
    ),
    (
      Pipeline(Bare(3)),
      {'fields': ('tokens',), 'tokenizer': ClipBpe()},
      'needs the fields tokens, but Bare has no text; it provides image',
    ),
    (Pipeline(Bare(3)), {'fields': ('image',)}, "encoded images; set the pipeline's image"),
    (Pipeline(Counting(3)), {'fields': ('tokens',)}, 'the objective needs tokens but config.tokenizer is not set'),
    (Pipeline(Counting(3)), {'fields': ('depth',)}, 'Counting has no depth; it provides image, label, text'),
    (Pipeline(Counting(3)), {'batch': 9, 'process_count': 2}, 'batch of 9 cannot be divided among 2 processes'),
    (Pipeline(Counting(0)), {}, 'the source Counting has no records'),
  ],
)
def test_fields_that_are_not_available_are_one_clear_line(pipeline, kwargs, message):
  with pytest.raises(UserError, match=message):
    TrainLoader(pipeline, **{'batch': 2, 'seed': 0, 'fields': ('label',), **kwargs})


def test_images_of_several_sizes_are_one_clear_line():
  class Ragged(Counting):
    def __getitem__(self, index):
      return {'image': np.zeros((index + 1, 2, 3), np.uint8)}

  loader = TrainLoader(Pipeline(Ragged(3)), batch=3, seed=0, fields=('image',))
  with pytest.raises(UserError, match=r"images differ in size: .* set the pipeline's image"):
    next(loader)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'caption_templates': ('a photo',)}, "caption_templates: each needs one '{}'"),
    ({'caption_templates': ()}, 'caption_templates: '),
    ({'workers': -1}, 'workers: expected a number at least 0, got -1'),
    ({'max_bad': 2.0}, 'max_bad: expected a number at least 0 and at most 1, got 2'),
    ({'timeout': 0.0}, 'timeout: expected a number above 0, got 0'),
  ],
)
def test_a_wrong_field_is_one_line_with_its_path(fields, message):
  spec = {'source': {'name': 'counting', 'records': 3}, **fields}
  with pytest.raises(UserError, match=f'^config.data.{{1,2}}{message}'):
    build(Pipeline, spec, {Source: {'counting': Counting}}, 'config.data')


# Restoring.


def test_a_state_of_another_order_is_refused_with_both_named():
  state = {'examples': 64, 'fingerprint': fingerprint(Pipeline(Counting(10)), 0)}
  assert resume(state, Pipeline(Counting(10), workers=4, max_bad=0.5), 0) == 64
  for pipeline, seed in [
    (Pipeline(Counting(11)), 0),
    (Pipeline(Counting(10)), 1),
    (Pipeline(Counting(10), shuffle=False), 0),
  ]:
    with pytest.raises(UserError, match=r'trained on \(Counting records=10 shuffle=True seed=0\), this run reads'):
      resume(state, pipeline, seed)
  with pytest.raises(UserError, match='Bare'):
    resume(state, Pipeline(Bare(10)), 0)


# Evaluation.


@pytest.mark.parametrize('processes', [1, 2, 3])
@pytest.mark.parametrize('records', [1, 6, 7, 25])
def test_an_evaluation_sees_every_record_once_on_as_many_batches_everywhere(records, processes):
  shares = [
    list(
      evaluation_batches(
        Pipeline(Counting(records)), batch=6, fields=('label', 'image'), process_index=p, process_count=processes
      )
    )
    for p in range(processes)
  ]
  assert {len(share) for share in shares} == {-(-records // 6)}
  real = []
  for batch in itertools.chain(*shares):
    assert batch['label'].shape == batch['mask'].shape == batch['index'].shape == (6 // processes,)
    assert (batch['mask'].dtype, batch['index'].dtype) == (np.bool_, np.int32)
    np.testing.assert_array_equal(batch['index'], batch['label'])
    np.testing.assert_array_equal(batch['image'][:, 0, 0, 0], batch['label'])
    real += batch['index'][batch['mask']].tolist()
  assert sorted(real) == list(range(records))


def test_an_evaluation_uses_the_first_caption_and_prompt():
  tokenizer = ClipBpe(12)
  pipeline = Pipeline(Counting(5), caption_templates=('see {}', 'hear {}'))
  (batch,) = evaluation_batches(pipeline, batch=5, fields=('tokens',), tokenizer=tokenizer)
  assert tokenizer.decode(batch['tokens']) == [f'see record {i}' for i in range(5)]


def test_an_evaluation_masks_what_cannot_be_read():
  batches = list(evaluation_batches(Pipeline(Counting(10, bad=(4,)), max_bad=0.2), batch=4, fields=('label',)))
  real = [i for batch in batches for i in batch['index'][batch['mask']].tolist()]
  assert real == [0, 1, 2, 3, 5, 6, 7, 8, 9]
  with pytest.raises(UserError, match='1 of 8 records'):
    list(evaluation_batches(Pipeline(Counting(10, bad=(4,))), batch=4, fields=('label',)))


def test_an_evaluation_checks_its_fields_before_its_first_batch():
  with pytest.raises(UserError, match='no label'):
    evaluation_batches(Pipeline(Bare(3)), batch=2, fields=('label',))


def test_a_pipeline_is_small_and_picklable():
  pipeline = rich()
  take(pipeline, 1)
  assert pickle.loads(pickle.dumps(pipeline)) == pipeline
