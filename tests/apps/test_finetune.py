"""Fine-tuning on a newcomer's own data: what is read, what follows from it, and the names of predictions."""

import json
import re

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
from tests.apps.own_images import COLORS, class_folder, completed, draw, encoded, pixels


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


def test_one_step_has_no_warm_up(tmp_path, classifier):
  for steps, warmup in ((1, 0), (2, 1), (30, 3)):
    config = completed(class_folder(tmp_path / 'own'), classifier, f'train.steps={steps}')
    assert config['optimizer']['schedule']['warmup_steps'] == warmup


TINY = {'name': 'cosine', 'peak_lr': 1e-9, 'warmup_steps': 0, 'end': 0.0}


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
