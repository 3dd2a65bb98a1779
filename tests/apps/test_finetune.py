"""Fine-tuning on a newcomer's own data: what is read, what follows from it, and the names of predictions."""

import io
import json
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

import fmcv_jax
from fmcv_jax import __main__ as cli
from fmcv_jax import experiment, trainer
from fmcv_jax.apps import finetune_data
from fmcv_jax.apps.finetune_model import described
from fmcv_jax.data.sources.image_folder import ImageFolder
from fmcv_jax.data.sources.random_split import RandomSplit
from fmcv_jax.errors import UserError
from fmcv_jax.models.backbones.vit import vit
from fmcv_jax.models.multimodal.dual_encoder import clip, siglip
from fmcv_jax.run import Run
from tests import runs

COLORS = {'blue': (20, 20, 230), 'green': (20, 200, 20), 'red': (230, 20, 20)}


def pixels(color, seed, side=20):
  noise = np.random.default_rng(seed).integers(-20, 21, (side, side, 3))
  return np.clip(np.array(COLORS[color]) + noise, 0, 255).astype(np.uint8)


def draw(path, color, seed, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels(color, seed, **options)).save(path)
  return path


def class_folder(path, count=31, names=('blue', 'green', 'red')):
  for index in range(count):
    draw(path / names[index % len(names)] / f'{index}.png', names[index % len(names)], index)
  return path


def encoded(color, seed):
  file = io.BytesIO()
  Image.fromarray(pixels(color, seed)).save(file, 'PNG')
  return file.getvalue()


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
  """A workdir of an untrained classifier of three other classes."""
  path = tmp_path_factory.mktemp('classifier')
  config = runs.classification(runs.image_folder(path / 'images'), objective__network__drop_path=0.0)
  return str(runs.untrained(config, path / 'run'))


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
  """A workdir of an untrained image-text model."""
  path = tmp_path_factory.mktemp('pairs')
  return str(runs.untrained(runs.contrastive(runs.image_folder(path / 'images')), path / 'run'))


def completed(path, model, *overrides):
  fields = [f'data.source.path={str(path)!r}', f'init_from.params.workdir={model!r}', *overrides]
  return experiment.load_config('configs/finetune.py', fields)


def test_31_images_of_class_folders_are_learned_and_named_afterwards(tmp_path, classifier, capsys):
  data, workdir = class_folder(tmp_path / 'own'), tmp_path / 'run'
  options = ['--config.train.steps=60', '--config.optimizer.schedule.peak_lr=0.003', '--config.log.every=30']
  assert cli.main(['finetune', str(data), '--model', classifier, '--workdir', str(workdir), *options]) == 0
  printed = capsys.readouterr().out
  for line in (
    'finetune: 31 images of 3 classes (blue, green, red): 25 to train, 6 held out (stratified, seed 0)',
    f'finetune: model: {classifier}, with a new head of 3 classes',
    'finetune: batch 8; 60 steps = 19.2 epochs, the first 6 warm up',
    'init_from.params: 2 arrays are new, not from there: head/bias, head/kernel',
    'held_out/top1 1.000 on 6 images',
    f'use it: fmcv classify FILE --model {workdir}',
  ):
    assert line in printed, (line, printed)
  assert json.loads((workdir / 'classes.json').read_text()) == ['blue', 'green', 'red']

  other = draw(tmp_path / 'other.png', 'green', 99)
  for path in data.iterdir():  # predictions need none of the data
    path.rename(tmp_path / path.name)
  model = fmcv_jax.load(workdir)
  assert model.class_names == ('blue', 'green', 'red')
  (best, probability), *rest = model.predict(str(other))
  assert best == 'green'
  assert len(rest) == 2
  np.testing.assert_allclose(probability, model.classify(str(other))[1])
  assert [found[0][0] for found in model.predict([pixels('red', 77), pixels('blue', 78)], count=1)] == ['red', 'blue']
  assert cli.main(['classify', str(other), '--model', str(workdir), '--top', '1']) == 0
  assert re.search(rf'{other}\W+green\W+[01]\.\d+', capsys.readouterr().out)


def test_steps_batch_and_warm_up_follow_from_the_data_unless_they_are_set(tmp_path, classifier):
  config = completed(class_folder(tmp_path / 'own'), classifier)
  assert (config['train']['batch_size'], config['train']['steps']) == (8, 200)  # 25 / 3 as a power of two
  assert config['optimizer']['schedule']['warmup_steps'] == 20
  assert config['checkpoint']['best'] == 'held_out/top1'
  network = config['objective']['network']
  saved = Run.reopen(classifier).config['objective']
  assert {**network, 'num_classes': 0} == {**saved['network'], 'num_classes': 0}
  assert config['objective']['normalize'] == saved['normalize']
  own = completed(tmp_path / 'own', classifier, 'train.steps=50', 'train.batch_size=16', 'evaluators={}', 'seed=3')
  assert (own['train']['batch_size'], own['train']['steps']) == (16, 50)
  assert own['optimizer']['schedule']['warmup_steps'] == 5
  assert own['evaluators'] == {}
  assert own['checkpoint']['best'] is None


def test_copies_of_an_image_are_on_one_side_and_unreadable_files_on_none(tmp_path):
  data = class_folder(tmp_path / 'own')
  for index in range(12):  # the same pixels in other files
    Image.open(data / 'red' / '2.png').save(data / 'red' / f'copy{index}.bmp')
  (data / 'red' / 'broken.png').write_bytes((data / 'red' / '5.png').read_bytes()[:150])
  source = ImageFolder(str(data))
  train, held_out = (RandomSplit(source, part) for part in ('train', 'held_out'))
  keys = [[part.key_of(index) for index in range(len(part))] for part in (train, held_out)]
  readable = [source.key_of(index) for index in range(len(source)) if 'broken' not in source.key_of(index)]
  assert sorted(keys[0] + keys[1]) == sorted(readable)
  copies = {key for key in keys[0] + keys[1] if key == 'red/2.png' or 'copy' in key}
  assert copies <= set(keys[0]) or copies <= set(keys[1])
  left = [str(left) for left in train.account().left_out]
  assert any('truncated' in line and 'red/broken.png' in line for line in left), left
  again = RandomSplit(ImageFolder(str(data)), 'held_out')
  assert [again.key_of(index) for index in range(len(again))] == keys[1]
  assert RandomSplit(source, 'held_out', seed=1)._rows.tolist() != held_out._rows.tolist()


def test_a_split_holds_out_the_same_fraction_of_every_class(tmp_path):
  for name, count in (('blue', 20), ('green', 10), ('red', 1)):
    for index in range(count):
      draw(tmp_path / name / f'{index}.png', name, 100 * index + count)
  train, held_out = (RandomSplit(ImageFolder(str(tmp_path)), part) for part in ('train', 'held_out'))
  assert held_out.account().class_counts == (4, 2, 0)  # a fifth; the only image of a class is for training
  assert train.account().class_counts == (16, 8, 1)


def test_an_image_in_two_classes_is_trained_on_and_named(tmp_path, classifier, capsys):
  data = class_folder(tmp_path / 'own')
  Image.open(data / 'red' / '2.png').save(data / 'blue' / 'same.png')
  completed(data, classifier)
  assert '1 images are in several classes, first blue/same.png and red/2.png' in capsys.readouterr().out
  held_out = RandomSplit(ImageFolder(str(data)), 'held_out')
  assert not {'blue/same.png', 'red/2.png'} & {held_out.key_of(index) for index in range(len(held_out))}


def test_the_datas_own_splits_are_used_and_shared_images_named(tmp_path, classifier, capsys):
  data = tmp_path / 'own'
  class_folder(data / 'train')
  for name in ('blue', 'green'):
    draw(data / 'val' / name / 'x.png', name, 500)
  Image.open(data / 'train' / 'red' / '2.png').save(tmp_path / 'copy.png')
  (data / 'val' / 'red').mkdir()
  (tmp_path / 'copy.png').rename(data / 'val' / 'red' / 'x.png')
  class_folder(data / 'test', 6)
  config = completed(data, classifier)
  assert list(config['evaluators']) == ['validation', 'test']
  assert config['checkpoint']['best'] == 'validation/top1'
  assert config['evaluators']['test']['every'] == 0
  printed = capsys.readouterr().out
  assert 'finetune: 31 images of 3 classes (blue, green, red): 31 to train, 3 validation, 6 test' in printed
  assert 'finetune: 1 images of validation are also images to train on' in printed
  (data / 'val' / 'yellow').mkdir()
  draw(data / 'val' / 'yellow' / 'x.png', 'red', 3)
  with pytest.raises(UserError, match=r'validation has classes that training has not \(yellow\)'):
    completed(data, classifier)


@pytest.mark.parametrize('kind', ['csv', 'tsv', 'jsonl', 'metadata'])
def test_a_table_of_captions_trains_both_encoders(kind, tmp_path, pairs, capsys):
  column = 'file_name' if kind == 'metadata' else 'image'
  rows = []
  for index in range(20):
    color = list(COLORS)[index % 3]
    file = draw(tmp_path / 'own' / 'images' / f'{index}.png', color, index)
    rows.append({column: f'images/{file.name}', 'caption': f'a {color}, number {index}'})
  import pandas

  frame = pandas.DataFrame(rows)
  table = tmp_path / 'own' / {'metadata': 'metadata.jsonl'}.get(kind, f'captions.{kind}')
  if table.suffix == '.jsonl':
    frame.to_json(table, orient='records', lines=True)
  else:
    frame.to_csv(table, index=False, sep='\t' if kind == 'tsv' else ',')
  config = completed(tmp_path / 'own', pairs)
  assert config['objective']['name'] == 'contrastive'
  assert config['tokenizer']['file'] == f'{pairs}/tokenizer.json'
  assert config['evaluators']['held_out']['name'] == 'retrieval'
  assert 'finetune: 20 images with captions: 16 to train, 4 held out (seed 0)' in capsys.readouterr().out
  if kind in ('csv', 'tsv', 'jsonl'):
    assert completed(table, pairs)['data']['source'] == config['data']['source']
  source = Run(config).experiment.data.source
  assert set(source.texts_of(0)) <= {row['caption'] for row in rows}


def test_captions_are_learned_to_the_end_and_labels_can_be_asked(tmp_path, pairs, capsys):
  lines = ['image\tcaption']
  for index in range(24):
    color = list(COLORS)[index % 3]
    draw(tmp_path / 'own' / f'{index}.png', color, index)
    lines.append(f'{index}.png\ta {color} image')
  (tmp_path / 'own' / 'texts.tsv').write_text('\n'.join(lines) + '\n')
  workdir = str(tmp_path / 'run')
  args = ['finetune', str(tmp_path / 'own'), '--model', pairs, '--workdir', workdir]
  options = ['--config.train.steps=40', '--config.optimizer.schedule.peak_lr=0.003', '--config.log.tensorboard=False']
  assert cli.main([*args, *options]) == 0
  printed = capsys.readouterr().out
  assert f'use it: fmcv classify FILE --model {workdir}' in printed
  assert '--text "LABEL" "LABEL"' in printed
  assert 'held_out/image_to_text_r1 1.000 on 5 images' in printed  # three texts; any image of the color is right
  file = str(draw(tmp_path / 'new.png', 'red', 99))
  texts = ['a red image', 'a blue image', 'a green image']
  assert fmcv_jax.load(workdir).predict(file, texts)[0][0] == 'a red image'


def test_hub_datasets_of_images_and_parquet_shards_with_labels_or_captions(tmp_path, classifier, pairs):
  datasets = pytest.importorskip('datasets')
  names = list(COLORS)
  rows = {
    'image': [{'bytes': encoded(names[i % 3], i), 'path': None} for i in range(30)],
    'label': [i % 3 for i in range(30)],
  }
  features = datasets.Features({'image': datasets.Image(), 'label': datasets.ClassLabel(names=names)})
  labeled = datasets.Dataset.from_dict(rows, features)
  (tmp_path / 'labels').mkdir()
  labeled.to_parquet(tmp_path / 'labels' / 'train-00000-of-00001.parquet')
  config = completed(tmp_path / 'labels', classifier)
  source = Run(config).experiment.data.source
  assert (source.names, len(source)) == (tuple(names), 24)
  labeled.select(range(6)).to_parquet(tmp_path / 'labels' / 'test-00000-of-00001.parquet')
  assert list(completed(tmp_path / 'labels', classifier)['evaluators']) == ['test']

  captioned = datasets.Dataset.from_dict(
    {'img': rows['image'], 'captions': [[f'a {names[i % 3]}', f'number {i}'] for i in range(30)]},
    datasets.Features({'img': datasets.Image(), 'captions': datasets.Sequence(datasets.Value('string'))}),
  )
  captioned.to_parquet(tmp_path / 'pairs.parquet')
  config = completed(tmp_path / 'pairs.parquet', pairs)
  inner = config['data']['source']['source']
  assert (inner['image'], inner['text'], inner['label']) == ('img', 'captions', None)
  assert Run(config).experiment.data.source.texts_of(0)[0].startswith('a ')


def test_columns_of_other_names_can_be_set(tmp_path, classifier, pairs):
  pyarrow = pytest.importorskip('pyarrow')
  parquet = pytest.importorskip('pyarrow.parquet')
  rows = [f'{index}.png,{list(COLORS)[index % 3]},a {list(COLORS)[index % 3]} thing' for index in range(12)]
  for index in range(12):
    draw(tmp_path / 'own' / f'{index}.png', list(COLORS)[index % 3], index)
  table = tmp_path / 'own' / 'table.csv'
  table.write_text('\n'.join(['image,kind,description', *rows]) + '\n')
  with pytest.raises(UserError, match=r'has neither captions .* nor labels .* \(image, kind, description\)'):
    completed(table, classifier)
  named = completed(table, classifier, 'data.source.label_column=kind')
  assert Run(named).experiment.data.source.names == tuple(COLORS)
  paired = completed(table, pairs, 'data.source.caption_column=description')
  assert Run(paired).experiment.data.source.texts_of(0)[0].endswith('thing')

  columns = {'x': [encoded(list(COLORS)[i % 3], i) for i in range(12)], 'kind': [i % 3 for i in range(12)]}
  both = columns | {'label': columns['kind'], 'text': [f'number {i}' for i in range(12)]}
  parquet.write_table(pyarrow.table(both), tmp_path / 'both.parquet')
  assert completed(tmp_path / 'both.parquet', classifier)['objective']['name'] == 'classification'
  asked = completed(tmp_path / 'both.parquet', pairs, 'data.source.label=None')
  assert (asked['objective']['name'], asked['data']['source']['source']['text']) == ('contrastive', 'text')


def test_a_table_of_labels_is_a_classification(tmp_path, classifier):
  lines = ['image,label'] + [f'{index}.png,{list(COLORS)[index % 3]}' for index in range(12)]
  for index in range(12):
    draw(tmp_path / 'own' / f'{index}.png', list(COLORS)[index % 3], index)
  (tmp_path / 'own' / 'labels.csv').write_text('\n'.join(lines) + '\n')
  config = completed(tmp_path / 'own', classifier)
  assert Run(config).experiment.data.source.names == tuple(COLORS)
  assert config['objective']['network']['num_classes'] == 3


def test_the_image_encoder_of_an_image_text_model_classifies_with_its_own_weights(tmp_path, pairs):
  config = completed(class_folder(tmp_path / 'own'), pairs, 'train.steps=2', 'log.tensorboard=False')
  assert config['init_from']['params']['part'] == 'params/image'
  trained = trainer.train({**config, 'optimizer': {**config['optimizer'], 'schedule': TINY}}, tmp_path / 'run')
  before, after = runs.parameters(pairs), runs.parameters(str(tmp_path / 'run'))
  assert int(trained.step) == 2
  for path, value in after.items():
    if not path.startswith('head/'):  # a rate of 1e-9 has changed nothing else
      np.testing.assert_allclose(value, before[f'image/{path}'], atol=1e-6)


@pytest.mark.parametrize('pair', [clip('B/32'), clip('L/14', image_size=336, dtype='bfloat16'), siglip('So400m/14')])
def test_the_image_encoder_of_a_published_name_is_described_field_by_field(pair):
  spec = described(pair.image, 'runs/clip')
  assert spec.pop('name') == 'vit'
  assert vit(**spec) == pair.image


TINY = {'name': 'cosine', 'peak_lr': 1e-9, 'warmup_steps': 0, 'end': 0.0}


@pytest.mark.parametrize(
  ('prepare', 'message'),
  [
    (lambda path: None, 'own: no such folder or file'),
    (lambda path: path.mkdir(), 'own: is empty; give a folder of images'),
    (lambda path: class_folder(path, 5, ('red',)), r"own: has one class \('red'\); at least two are needed"),
    (lambda path: [draw(path / f'{i}.png', 'red', i) for i in range(5)], 'have neither classes nor captions'),
    (lambda path: [path.mkdir(), (path / 'a.pdf').write_bytes(b'%PDF')], 'no images in'),
    (lambda path: [class_folder(path), (path / 'x').mkdir()], r'1 of 4 classes have no image to train on \(x\)'),
    (lambda path: [draw(path / name / '0.png', name, 1) for name in COLORS], 'no image is left to hold out'),
    (lambda path: [class_folder(path / 'test'), class_folder(path / 'val')], 'none to train on; rename one to train'),
    (
      lambda path: [draw(path / 'a.png', 'red', 1), (path / 't.csv').write_text('image,x\na.png,1\n')],
      'neither captions',
    ),
    (lambda path: [path.mkdir(), (path / 'a.tar').write_bytes(b'')], r'a\.tar'),
    (
      lambda path: tar(path / 'a.tar', [{'png': encoded('red', 0)}]),
      'neither labels .* nor captions .*, only png; set',
    ),
    (lambda path: table(path, ''), r't\.csv: has no rows below line 1'),
    (lambda path: table(path, 'image,label\n'), r't\.csv: has no rows below line 1'),
    (
      lambda path: table(path, 'a.png,red\nb.png,blue\n'),
      r'no column of images .* \(a\.png, red\), which line 1 names',
    ),
    (
      lambda path: [class_folder(path / 'train'), class_folder(path / 'extra')],
      r"'train' and 'extra' in .* have the same subfolders \(blue, green, red\), as splits have, but 'extra' is not",
    ),
    (
      lambda path: [
        *(draw(path / split / f'{i}.png', 'red', i) for split in ('train', 'test') for i in range(4)),
        (path / 'metadata.csv').write_text('file_name,label\ntrain/0.png,1\ntest/0.png,0\n'),
      ],
      'metadata.csv. is next to the folder of the split .train., where it is not read',
    ),
    (lambda path: [path.mkdir(), (path / 'a.parquet').write_bytes(b'PAR1')], 'is not a Parquet table'),
  ],
)
def test_data_that_cannot_be_used_is_one_line(prepare, message, tmp_path, classifier, capsys):
  prepare(tmp_path / 'own')
  args = ['finetune', str(tmp_path / 'own'), '--model', classifier, '--workdir', str(tmp_path / 'run')]
  assert cli.main(args) == 2
  error = capsys.readouterr().err
  assert re.search(message, error), error
  assert error.count('\n') == 1
  assert not (tmp_path / 'run').exists()


def table(path, content):
  draw(path / 'a.png', 'red', 1)
  draw(path / 'b.png', 'blue', 2)
  (path / 't.csv').write_text(content)


def tar(path, samples):
  """A shard of samples, member -> bytes or text."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as out:
    for number, sample in enumerate(samples):
      for member, content in sample.items():
        data = content if isinstance(content, bytes) else content.encode()
        info = tarfile.TarInfo(f'{number:04d}.{member}')
        info.size = len(data)
        out.addfile(info, io.BytesIO(data))
  return path


NAMES = list(COLORS)
SHARDS = {
  'numbers': (lambda i: {'cls': str(i % 3)}, (), 'label'),
  'names': (lambda i: {'cls': NAMES[i % 3], 'txt': 'a ball'}, tuple(NAMES), 'label'),
  'json numbers': (lambda i: {'json': json.dumps({'label': i % 3, 'caption': 'a'})}, (), 'label'),
  'json names': (lambda i: {'json': json.dumps({'Category': NAMES[i % 3]})}, tuple(NAMES), 'label'),
  'captions': (lambda i: {'txt': f'a {NAMES[i % 3]} ball'}, (), 'text'),
  'json captions': (lambda i: {'json': json.dumps({'caption': f'a {NAMES[i % 3]} ball', 'url': 'x'})}, (), 'text'),
}


@pytest.mark.parametrize('kind', SHARDS)
def test_tar_shards_are_a_classification_or_pairs_by_their_members(kind, tmp_path, classifier, pairs):
  members, names, field = SHARDS[kind]
  samples = [{'png': encoded(NAMES[i % 3], i), **members(i)} for i in range(12)]
  tar(tmp_path / 'own/0.tar', samples[:5])
  tar(tmp_path / 'own/1.tar', samples[5:])
  for path in (tmp_path / 'own', tmp_path / 'own/{0..1}.tar'):
    config = completed(path, classifier if field == 'label' else pairs)
    source = Run(config).experiment.data.source.source
    assert source.names == names
    examples = [source[index] for index in range(12)]
    if field == 'text':
      assert config['objective']['name'] == 'contrastive'
      assert [example['text'] for example in examples] == [f'a {NAMES[i % 3]} ball' for i in range(12)]
    else:
      assert config['objective']['network']['num_classes'] == 3
      assert [example['label'] for example in examples] == [i % 3 for i in range(12)]
      assert not any('text' in example for example in examples)


def test_damaged_tar_shards_are_read_as_far_as_they_are_whole(tmp_path, classifier, capsys):
  samples = [{'png': encoded(NAMES[i % 3], i), 'json': json.dumps({'label': NAMES[i % 3]})} for i in range(13)]
  samples[0]['json'] = '{'
  path = tar(tmp_path / '0.tar', samples)
  path.write_bytes(path.read_bytes()[:-11_000])  # the end of the archive, and a part of the last sample
  with pytest.raises(UserError, match='skip_tail'):
    completed(path, classifier)
  config = completed(path, classifier, 'data.source.on_truncated=skip_tail')
  assert Run(config).experiment.data.source.source.names == tuple(NAMES)
  assert 'left out: its .json is not JSON' in capsys.readouterr().out


def test_tar_shards_are_split_by_their_names(tmp_path, classifier, capsys):
  for split, count in (('train', 9), ('val', 3)):
    samples = [{'png': encoded(NAMES[i % 3], len(split) * 100 + i), 'cls': NAMES[i % 3]} for i in range(count)]
    tar(tmp_path / f'own/{split}-00000.tar', samples)
  config = completed(tmp_path / 'own', classifier)
  assert '9 images of 3 classes (blue, green, red): 9 to train, 3 validation' in capsys.readouterr().out
  assert Run(config).experiment.data.source.account().split == 'train'


@pytest.mark.parametrize(
  'header', ['Filename,Class', 'path,LABEL', ' image , label ', 'file_name;category', 'img\tfine_label']
)
def test_usual_names_of_columns_are_found_however_they_are_written(header, tmp_path, classifier):
  separator = next(mark for mark in ';\t,' if mark in header)
  rows = [f'{index}.png{separator}{NAMES[index % 3]}' for index in range(12)]
  for index in range(12):
    draw(tmp_path / 'own' / f'{index}.png', NAMES[index % 3], index)
  for name in ('t.csv', 'metadata.csv'):
    (tmp_path / 'own' / name).write_text('\n'.join([header, *rows]))
    source = Run(completed(tmp_path / 'own', classifier)).experiment.data.source.source
    assert source.names == tuple(NAMES)
    assert {source.key_of(row): NAMES[source[row]['label']] for row in range(12)} == {
      f'{index}.png': NAMES[index % 3] for index in range(12)
    }
    (tmp_path / 'own' / name).unlink()


def test_a_table_of_other_facts_leaves_class_folders_as_they_are(tmp_path, classifier, capsys):
  class_folder(tmp_path / 'own')
  (tmp_path / 'own/metadata.csv').write_text('id,camera\n1,x\n')
  assert completed(tmp_path / 'own', classifier)['objective']['network']['num_classes'] == 3
  assert 'left out: files .csv: 1 (metadata.csv)' in capsys.readouterr().out


def test_one_step_has_no_warm_up(tmp_path, classifier):
  for steps, warmup in ((1, 0), (2, 1), (30, 3)):
    config = completed(class_folder(tmp_path / 'own'), classifier, f'train.steps={steps}')
    assert config['optimizer']['schedule']['warmup_steps'] == warmup


def test_a_folder_around_the_data_is_not_a_class(tmp_path, classifier, pairs, capsys):
  class_folder(tmp_path / 'a/data')
  config = completed(tmp_path / 'a', classifier)
  assert config['objective']['network']['num_classes'] == 3
  assert f'finetune: the data is read from {tmp_path}/a/data\n' in capsys.readouterr().out
  completed(f'{tmp_path}/a/data/', classifier)
  assert 'is read from' not in capsys.readouterr().out
  for index in range(6):
    draw(tmp_path / f'b/images/{index}.png', NAMES[index % 3], index)
    (tmp_path / f'b/images/{index}.txt').write_text(f'a {NAMES[index % 3]} ball')
  assert completed(tmp_path / 'b', pairs)['objective']['name'] == 'contrastive'


def test_classes_that_are_probably_not_meant_are_said(tmp_path, classifier, capsys):
  def said(labels, header='image,label'):
    for index in range(len(labels)):
      draw(tmp_path / f'{header}{labels[0]}' / f'{index}.png', NAMES[index % 3], index)
    rows = [f'{index}.png,{label}' for index, label in enumerate(labels)]
    (tmp_path / f'{header}{labels[0]}' / 't.csv').write_text('\n'.join([header, *rows]))
    completed(tmp_path / f'{header}{labels[0]}', classifier)
    return capsys.readouterr().out

  assert 'finetune: 1 of 4 classes have no record (0)\n' in said([1, 2, 3] * 4)
  assert 'finetune: 898 of 901 classes have no record (1, 2, 3, ...)\n' in said([0, 5, 900] * 4)
  assert "finetune: classes 'Red' and 'red' are taken as different\n" in said(['red', 'Red', 'blue'] * 4)
  assert 'left out: columns that are not read: 1 (id)\n' in said(['a,1', 'b,2', 'c,3'] * 4, 'image,label,id')
  plain = said(['x', 'y', 'z'] * 4)
  assert 'no record' not in plain
  assert 'taken as different' not in plain
  for index in range(6):
    draw(tmp_path / f'nested/{NAMES[index % 2]}/inner/{index}.png', NAMES[index % 3], index)
  completed(tmp_path / 'nested', classifier)
  assert 'folders inside them are not classes: blue/inner, green/inner)' in capsys.readouterr().out


def test_a_model_that_cannot_be_used_is_one_line(tmp_path, classifier, capsys):
  data = class_folder(tmp_path / 'own')
  own = ['finetune', str(data), '--workdir', str(tmp_path / 'run')]
  with pytest.raises(UserError, match=r'config\.init_from\.params\.workdir: missing; give the model'):
    experiment.load_config('configs/finetune.py', [f'data.source.path={str(data)!r}'])
  assert cli.main([*own, '--model', str(tmp_path / 'none')]) == 2
  assert 'none: no such file or folder' in capsys.readouterr().err
  (data / 'metadata.csv').write_text('file_name,text\nred/2.png,a red one\nred/5.png,another\nblue/0.png,a blue one\n')
  assert cli.main([*own, '--model', classifier]) == 2
  error = capsys.readouterr().err
  assert 'the data has captions, but this model' in error
  assert error.count('\n') == 1


def test_without_a_model_that_of_the_package_is_trained(tmp_path, capsys):
  args = ['finetune', str(class_folder(tmp_path / 'own')), '--workdir', str(tmp_path / 'run')]
  assert cli.main([*args, '--config.train.steps=2', '--config.log.tensorboard=False']) == 0
  printed = capsys.readouterr().out
  assert '--model demo: a small model of drawings of 32 pixels' in printed
  assert 'init_from.params: 2 arrays are new, not from there: head/bias, head/kernel' in printed
  assert fmcv_jax.load(tmp_path / 'run').class_names == tuple(COLORS)


def test_classes_that_change_between_two_starts_of_a_run_are_refused(tmp_path):
  folder = runs.image_folder(tmp_path / 'images')
  config = runs.classification(folder, objective__network__num_classes=4, train__steps=2, evaluators={})
  config = {**config, 'optimizer': {**config['optimizer'], 'schedule': TINY}}
  trainer.train(config, tmp_path / 'run')
  (folder / 'a').rename(folder / 'z')
  with pytest.raises(UserError, match=r'classes have changed since the run began \(a, z\)'):
    trainer.train(config, tmp_path / 'run')


@pytest.mark.slow
def test_published_weights_are_imported_once_into_the_workdir(tmp_path, capsys):
  transformers = pytest.importorskip('transformers')
  sizes = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'intermediate_size': 64}
  network = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **sizes))
  network.save_pretrained(tmp_path / 'published')
  args = ['finetune', str(class_folder(tmp_path / 'own')), '--model', str(tmp_path / 'published')]
  args += ['--workdir', str(tmp_path / 'run'), '--config.train.steps=4', '--config.log.tensorboard=False']
  assert cli.main(args) == 0
  assert 'use it: fmcv classify' in capsys.readouterr().out
  imported = list((tmp_path / 'run' / 'pretrained').iterdir())
  assert len(imported) == 1
  assert cli.main(args) == 0  # nothing is left to do
  assert list((tmp_path / 'run' / 'pretrained').iterdir()) == imported
  table = finetune_data.source_of(str(tmp_path / 'own'))
  assert table == {'name': 'image_folder', 'path': str(tmp_path / 'own')}
