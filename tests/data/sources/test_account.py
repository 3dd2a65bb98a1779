"""The account of a source before a run: counts by name; everything that is left out is reported."""

from fmcv_jax.data.sources.account import Account, LeftOut, left_out, other_files
from fmcv_jax.data.sources.array_record import ArrayRecord, write_array_record
from fmcv_jax.data.sources.image_folder import ImageFolder
from fmcv_jax.data.sources.mixture import Mixture
from fmcv_jax.data.sources.subset import evenly_spaced
from tests import runs


def test_names_are_grouped_by_reason_the_most_frequent_first():
  found = left_out([('b', '1'), ('a', '2'), ('a', '3'), ('a', '4'), ('a', '5')])
  assert found == (LeftOut('a', 4, ('2', '3', '4')), LeftOut('b', 1, ('1',)))
  assert [str(left) for left in found] == ['a: 4 (2, 3, 4, ...)', 'b: 1 (1)']
  assert [left.reason for left in other_files(['x.HEIC', 'LICENSE'])] == ['files .heic', 'files without an extension']


def test_lines_say_each_fact_once():
  account = Account(
    records=10,
    fields={'image': '10 .png', 'label': 'class folders'},
    classes=('cat', 'dog', 'emu', 'gnu'),
    class_counts=(4, 3, 0, 3),
    label_range=(0, 3),
    split='train',
    missing={'text': 2, 'label': 0},
    left_out=(LeftOut('files .heic', 1, ('x.heic',)),),
  )
  assert account.lines() == [
    "10 records of split 'train'",
    'image: 10 .png',
    'label: class folders',
    '4 classes: cat, dog, emu, ...',
    'records of a class: 0 (emu) to 4',
    'labels: 0 to 3',
    '2 records have no text',
    'left out: files .heic: 1 (x.heic)',
  ]


def test_a_mixture_adds_up_classes_by_name_and_names_whose_files_are_left_out(tmp_path):
  runs.image_folder(tmp_path / 'one', count=5, classes=2)
  runs.image_folder(tmp_path / 'two', count=4, classes=3)
  (tmp_path / 'two' / 'a').rename(tmp_path / 'two' / 'z')
  (tmp_path / 'two' / 'x.heic').write_bytes(b'')
  account = Mixture({'one': ImageFolder(str(tmp_path / 'one')), 'two': ImageFolder(str(tmp_path / 'two'))}).account()
  assert account.records == 9
  assert account.classes == ('a', 'b', 'c', 'z')
  assert account.class_counts == (3, 2 + 1, 1, 2)
  assert account.fields['image'] == 'one: 5 .png; two: 4 .png'
  assert LeftOut('files .heic of two', 1, ('x.heic',)) in account.left_out


def test_a_part_of_a_source_counts_its_own_records(tmp_path):
  whole = ImageFolder(str(runs.image_folder(tmp_path, count=6)))
  part = evenly_spaced(whole, 2).account()
  assert (part.records, part.class_counts, part.classes) == (2, None, whole.names)
  assert part.left_out == whole.account().left_out


def test_a_packed_set_keeps_the_names_of_its_classes(tmp_path):
  write_array_record(ImageFolder(str(runs.image_folder(tmp_path / 'in', count=6))), str(tmp_path / 'out'))
  account = ArrayRecord(str(tmp_path / 'out')).account()
  assert (account.records, account.classes, account.left_out) == (6, ('a', 'b', 'c'), ())
