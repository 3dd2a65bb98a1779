import hashlib
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from fmcv_jax.__main__ import main
from fmcv_jax.apps import pack as pack_app
from fmcv_jax.data.loader import TrainLoader
from fmcv_jax.data.packing import PackingPlan, pack, unfinished
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.array_record import ArrayRecord
from fmcv_jax.data.sources.image_folder import ImageFolder
from fmcv_jax.data.sources.parquet import Parquet
from fmcv_jax.data.sources.webdataset import WebDataset
from fmcv_jax.data.tokenizers import ClipBpe
from fmcv_jax.data.transforms import RandomResizedCrop
from fmcv_jax.errors import UserError
from tests.data.counting import Counting, Suicidal
from tests.data.shards import encoded_image, write_parquet, write_tars

EVERYTHING = ('image', 'label', 'tokens')


def tree(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_folder(folder, samples):
  for label in 'abcdefg':
    (folder / label).mkdir(parents=True)
  lines = []
  for index in range(samples):
    image, extension = encoded_image(index)
    (folder / f'{index:09d}.{extension}').write_bytes(image)
    lines.append(json.dumps({'image': f'{index:09d}.{extension}', 'caption': f'caption {index}'}))
  (folder / 'captions.jsonl').write_text('\n'.join(lines))


def batches(source, fields):
  pipeline = Pipeline(source, image=RandomResizedCrop(8), caption_templates=('a {}', '{}'))
  loader = TrainLoader(pipeline, batch=7, seed=3, fields=fields, tokenizer=ClipBpe(9))
  try:
    return [next(loader) for _ in range(5)]
  finally:
    loader.close()


def test_batches_of_a_seed_are_the_same_bytes_in_every_format_and_after_packing(tmp_path):
  pytest.importorskip('pyarrow')
  write_folder(tmp_path / 'folder', 20)
  write_tars(tmp_path / 'tars', 20)
  write_parquet(tmp_path / 'tables', 20)
  folder = ImageFolder(str(tmp_path / 'folder'), captions='captions.jsonl')
  tars, tables = WebDataset(str(tmp_path / 'tars')), Parquet(str(tmp_path / 'tables'), text='caption', label='label')
  alike = {'tars': tars}
  for name, source in {'tars': tars, 'tables': tables, 'folder': folder}.items():
    pack(source, tmp_path / 'packed' / name, origin=name, shards=3)
    alike[f'packed {name}'] = ArrayRecord(str(tmp_path / 'packed' / name))
  alike['packed again'] = ArrayRecord(str(tmp_path / 'again'))
  pack(alike['packed tables'], tmp_path / 'again', origin='packed', shards=1)
  reference = batches(tars, EVERYTHING)
  texts = batches(folder, ('image', 'tokens'))
  for name, source in alike.items():
    fields = ('image', 'tokens') if 'folder' in name else EVERYTHING
    for ours, theirs, others in zip(batches(source, fields), reference, texts):
      for field in fields:
        np.testing.assert_array_equal(ours[field], theirs[field], err_msg=f'{name} {field}')
        if field in others and 'folder' in name:
          np.testing.assert_array_equal(ours[field], others[field])
  assert alike['packed tables'].names == tuple('abcdefg')


def test_a_packed_set_has_counts_and_checksums_that_sha256sum_knows(tmp_path):
  reports = []
  made = pack(Counting(23), tmp_path / 'set', origin={'a': 1}, shards=4, progress=lambda *at: reports.append(at))
  info = json.loads((tmp_path / 'set/info.json').read_text())
  assert info == {'records': 23, 'shards': 4, 'names': [], 'counts': [5, 6, 6, 6], 'skipped': 0, 'origin': {'a': 1}}
  assert reports[0] == (0, 23)
  assert reports[-1] == (23, 23)
  files = tree(tmp_path / 'set')
  sums = dict(line.split('  ')[::-1] for line in files.pop('SHA256SUMS').decode().splitlines())
  del files['info.json']
  assert sums == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
  assert made == {'records': 23, 'bytes': sum(map(len, files.values())), 'skipped': 0, 'reasons': {}}
  source = ArrayRecord(str(tmp_path / 'set'))
  assert [source[index]['label'] for index in range(23)] == [*range(23)]
  assert [path.name for path in tmp_path.iterdir()] == ['set']


KILLED = """
from fmcv_jax.data.packing import pack
from fmcv_jax.data.sources.webdataset import WebDataset
pack(WebDataset({tars!r}), {to!r}, origin=1, shards=60)
"""


def test_a_killed_pack_resumes_and_writes_the_bytes_of_an_uninterrupted_one(tmp_path):
  write_tars(tmp_path / 'tars', 300, shards=2)
  source = WebDataset(str(tmp_path / 'tars'))
  pack(source, tmp_path / 'alone', origin=1, shards=60)
  partial = tmp_path / '.killed.partial'
  script = KILLED.format(tars=str(tmp_path / 'tars'), to=str(tmp_path / 'killed'))
  process = subprocess.Popen([sys.executable, '-c', script])
  deadline = time.time() + 60
  while len(list(partial.glob('data-*.json'))) < 5 and time.time() < deadline:
    time.sleep(0.002)
  process.kill()
  process.wait()
  assert not (tmp_path / 'killed').exists()
  notes = sorted(partial.glob('data-*.json'))
  assert 5 <= len(notes) < 60
  kept = [note.with_suffix('.array_record') for note in notes]
  times = [path.stat().st_mtime_ns for path in kept]
  kept[1].write_bytes(kept[1].read_bytes()[:-7])  # as a machine that lost its power may leave it
  with unfinished(tmp_path / 'killed', PackingPlan(300, 9, (), 1)) as begun:
    assert len(begun.missing()) == 60 - len(notes) + 1
    with pytest.raises(UserError, match='another process is writing it'):
      pack(source, tmp_path / 'killed', origin=1)
  pack(source, tmp_path / 'killed', origin=1)
  assert tree(tmp_path / 'killed') == tree(tmp_path / 'alone')
  now = [(tmp_path / 'killed' / path.name).stat().st_mtime_ns for path in kept]
  assert [old == new for old, new in zip(times, now)] == [index != 1 for index in range(len(kept))]


def test_unreadable_records_are_left_out_and_named_up_to_a_fraction(tmp_path):
  source = Counting(40, bad=(3, 30))
  with pytest.raises(UserError, match=r'2 of 40 records cannot be read, more than --max-bad 0.01; .*/3: is bad'):
    pack(source, tmp_path / 'set', origin=1, shards=2)
  assert not (tmp_path / 'set').exists()
  made = pack(source, tmp_path / 'set', origin=1, max_bad=0.05)
  assert (made['records'], made['skipped']) == (38, 2)
  assert made['reasons'] == {'counting/3': 'is bad', 'counting/30': 'is bad'}
  assert ArrayRecord(str(tmp_path / 'set'))[3]['label'] == 4


def test_a_dead_worker_and_other_data_are_one_clear_line(tmp_path):
  with pytest.raises(
    UserError, match=r'a worker process died.*; the same command resumes from the shards that are written'
  ):
    pack(Suicidal(40, last=35), tmp_path / 'set', origin=1, shards=8, workers=2)
  with pytest.raises(UserError, match=r'was started from different data .records was 40, now 41.'):
    pack(Counting(41), tmp_path / 'set', origin=1)
  pack(Counting(40), tmp_path / 'set', origin=1)
  assert json.loads((tmp_path / 'set/info.json').read_text())['shards'] == 8
  with pytest.raises(UserError, match='exists already'):
    pack(Counting(40), tmp_path / 'set', origin=1)
  for shards, source, message in [(9, Counting(3), '--shards 9: expected between'), (None, Counting(0), 'no records')]:
    with pytest.raises(UserError, match=message):
      pack(source, tmp_path / 'other', origin=1, shards=shards)


def test_the_command_packs_and_says_how_to_read_it(tmp_path, capsys):
  write_tars(tmp_path / 'tars', 5)
  (tmp_path / 'tars/00003.tar').write_bytes(b'')
  command = ['pack', str(tmp_path / 'tars'), '--to', str(tmp_path / 'set'), '--workers', '1']
  assert main(command) == 2
  assert '00003.tar: it is empty: 0 bytes; fetch it again' in capsys.readouterr().err
  assert main([*command, '--config.on_truncated=skip_tail']) == 0
  assert f'MB in {tmp_path}/set: data.source.name=array_record' in capsys.readouterr().out
  assert ArrayRecord(str(tmp_path / 'set'))[4]['text'] == 'caption 4'


def test_what_is_packed_is_a_config_a_path_or_a_name(tmp_path):
  write_tars(tmp_path / 'tars', 3)
  (tmp_path / 'images').mkdir()
  (tmp_path / 'images/a.png').write_bytes(encoded_image(1)[0])
  pack(Counting(3), tmp_path / 'packed', origin=1)
  (tmp_path / 'images/metadata.parquet').write_bytes(b'')
  (tmp_path / 'hive/year=2024').mkdir(parents=True)
  (tmp_path / 'hive/year=2024/0.parquet').write_bytes(b'')
  kinds = {'tars': 'webdataset', 'tars/*.tar': 'webdataset', 'images': 'image_folder', 'hive': 'parquet'}
  for path, name in kinds.items():
    assert pack_app.source_spec(str(tmp_path / path))['name'] == name
  assert pack_app.source_spec(str(tmp_path / 'packed'))['name'] == 'array_record'
  assert pack_app.source_spec(str(tmp_path / 'tars'), ['text=json/caption'])['text'] == 'json/caption'
  assert pack_app.source_spec('emoji') == {'name': 'emoji', **pack_app.source_spec('emoji')}
  config = pathlib.Path(__file__).parents[2] / 'configs/demo/clip.py'
  assert pack_app.source_spec(str(config))['name'] == 'emoji'
  with pytest.raises(UserError, match=r"path or source name .*; did you mean 'emoji'"):
    pack_app.source_spec('emojis')
  with pytest.raises(UserError, match=r'config.txt: unknown field'):
    pack_app.source_spec(str(tmp_path / 'tars'), ['txt=json/caption'])
