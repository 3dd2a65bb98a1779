"""COCO's captions and VQA from small files in the official layout."""

import copy
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from fmcv_jax.data.loader import evaluation_batches
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.sources.array_record import ArrayRecord, write_array_record
from fmcv_jax.data.sources.coco_captions import CocoCaptions
from fmcv_jax.data.sources.mixture import Mixture
from fmcv_jax.data.sources.subset import Subset
from fmcv_jax.data.sources.vqa import Vqa
from fmcv_jax.errors import UserError
from tests.systems.sources import Words

CAPTIONS = {
  'info': {'year': 2017},
  'licenses': [],
  'images': [
    {'id': 9, 'file_name': '000000000009.jpg', 'height': 8, 'width': 8, 'coco_url': '', 'license': 3},
    {'id': 4, 'file_name': '000000000004.jpg', 'height': 8, 'width': 8, 'coco_url': '', 'license': 3},
    {'id': 7, 'file_name': '000000000007.jpg', 'height': 8, 'width': 8, 'coco_url': '', 'license': 3},
  ],
  'annotations': [
    {'image_id': 4, 'id': 1, 'caption': 'A cat.'},
    {'image_id': 9, 'id': 2, 'caption': 'Two  dogs\n'},
    {'image_id': 4, 'id': 3, 'caption': 'A small, gray cat.'},
    {'image_id': 9, 'id': 4, 'caption': ' '},
    {'image_id': 4, 'id': 5, 'caption': 'An animal'},
  ],
}
QUESTIONS = {
  'info': {},
  'task_type': 'Open-Ended',
  'data_type': 'mscoco',
  'license': {},
  'data_subtype': 'val2014',
  'questions': [
    {'image_id': 4, 'question': 'What animal is this?', 'question_id': 4001},
    {'image_id': 9, 'question': 'How many\tdogs? ', 'question_id': 9000},
    {'image_id': 4, 'question': 'Is it a cat?', 'question_id': 4000},
  ],
}
PEOPLE = [['dog'] + ['cat'] * 8 + ['a cat'], ['2'] * 9 + [''], ['yes'] * 10]
ANNOTATIONS = {
  'info': {},
  'license': {},
  'data_subtype': 'val2014',
  'annotations': [
    {
      'question_type': kind,
      'multiple_choice_answer': max(answers, key=answers.count),
      'answers': [
        {'answer': answer, 'answer_confidence': 'yes', 'answer_id': i} for i, answer in enumerate(answers, 1)
      ],
      'image_id': question['image_id'],
      'answer_type': answer_type,
      'question_id': question['question_id'],
    }
    for question, answers, kind, answer_type in zip(
      QUESTIONS['questions'],
      PEOPLE,
      ('what animal is', 'how many', 'is it a'),
      ('other', 'number', 'yes/no'),
      strict=True,
    )
  ][::-1],
}


@pytest.fixture
def folder(tmp_path):
  for number in (4, 7, 9):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(file, 'png')
    for name in (f'{number:012d}.jpg', f'COCO_val2014_{number:012d}.jpg'):
      (tmp_path / name).write_bytes(file.getvalue())
  return tmp_path


def write(folder, **contents):
  for name, content in contents.items():
    (folder / f'{name}.json').write_text(json.dumps(content))
  return folder


def captions(folder, content=CAPTIONS, images=None):
  return CocoCaptions(str(write(folder, captions=content) / 'captions.json'), str(images or folder))


def vqa(folder, questions=QUESTIONS, annotations=ANNOTATIONS, **options):
  write(folder, questions=questions, annotations=annotations)
  return Vqa(str(folder / 'questions.json'), str(folder / 'annotations.json'), str(folder), **options)


def test_each_coco_image_has_all_of_its_captions(folder):
  source = captions(folder)
  assert [source.texts_of(i) for i in range(len(source))] == [
    ('Two dogs',),
    ('A cat.', 'A small, gray cat.', 'An animal'),
  ]
  assert source[1]['image'] == (folder / '000000000004.jpg').read_bytes()
  assert source[1]['text'] == 'A cat.'
  assert source.key_of(0) == source[0]['key'] == '000000000009.jpg'
  assert source.account().lines() == [
    '2 records',
    f'image: {folder}',
    'text: 4 captions, 1 to 3 of an image',
    'left out: blank captions: 1 (9)',
    'left out: images without a caption: 1 (000000000007.jpg)',
  ]
  assert pickle.loads(pickle.dumps(source)).texts_of(0) == ('Two dogs',)


def test_each_vqa_question_has_its_answers_and_types(folder):
  source = vqa(folder)
  assert [source.annotations_of(i)['question'] for i in range(3)] == [
    'What animal is this?',
    'How many dogs?',
    'Is it a cat?',
  ]
  assert [source.annotations_of(i)['answers'] for i in range(3)] == [tuple(answers) for answers in PEOPLE]
  first = source[0]
  assert (first['question_type'], first['answer_type']) == ('what animal is', 'other')
  assert first['image'] == (folder / 'COCO_val2014_000000000004.jpg').read_bytes()
  # The most frequent answer first, each as often as it was given, without blanks.
  question = 'What animal is this?\n'
  assert source.texts_of(0) == (*[f'{question}cat'] * 8, f'{question}dog', f'{question}a cat')
  assert source.texts_of(1) == ('How many dogs?\n2',) * 9
  assert source.key_of(0) == 'question 4001'
  assert vqa(folder, image_name='{id:012d}.jpg')[0]['image'] == (folder / '000000000004.jpg').read_bytes()
  assert source.account().fields == {
    'image': f'{folder}: 2 images',
    'question': 'question',
    'answers': '10 of a question',
  }


def test_packed_questions_are_those_of_the_files(folder, tmp_path):
  source = vqa(folder)
  write_array_record(source, str(tmp_path / 'packed'))
  packed = ArrayRecord(str(tmp_path / 'packed'))
  assert [packed[i] for i in range(3)] == [source[i] for i in range(3)]
  assert packed.annotations_of(0) == source.annotations_of(0)


def test_wrappers_pass_annotations_on(folder):
  source = vqa(folder)
  assert Subset(source, np.array([2, 0])).annotations_of(1) == source.annotations_of(0)
  both = Mixture({'a': source, 'b': captions(folder)})
  assert both.annotations_of(1) == source.annotations_of(1)
  assert both.annotations_of(4)['texts'] == ('A cat.', 'A small, gray cat.', 'An animal')
  assert 'image' not in both.annotations_of(4)


def test_training_reads_the_most_frequent_answer_of_a_question(folder):
  words = Words(('answer', 'en', 'What', 'animal', 'is', 'this?', 'cat', 'How', 'many', 'dogs?', '2'), 12)
  pipeline = Pipeline(Subset(vqa(folder), np.array([0, 1])), caption_templates=('answer en {}',))
  batch = next(evaluation_batches(pipeline, batch=2, fields=('tokens',), tokenizer=words))
  assert words.decode(batch['tokens']) == ['answer en What animal is this? cat', 'answer en How many dogs? 2']


def changed(content, *path, **values):
  """A copy with fields of one object replaced, or removed where the value is None."""
  content = copy.deepcopy(content)
  node = content
  for key in path:
    node = node[key]
  for name, value in values.items():
    node[name] = value
    if value is None:
      del node[name]
  return content


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ([], 'expected a JSON object, got a list'),
    (changed(CAPTIONS, images=None), "has no list 'images'"),
    (changed(CAPTIONS, annotations={}), "'annotations' is an object, not a list"),
    (changed(CAPTIONS, 'images', 1, id=9), 'images: id 9 occurs twice'),
    (changed(CAPTIONS, 'annotations', 1, caption=None), "annotations[1] has no 'caption'; known:"),
    (changed(CAPTIONS, 'annotations', 1, caption=7), 'annotations[1].caption is 7, expected a text'),
    (changed(CAPTIONS, 'annotations', 0, image_id=5), "caption 'A cat.' is of image 5, which is not listed"),
    (changed(CAPTIONS, 'annotations', 0, image_id='5'), "is of image '5', which is not listed"),
    (changed(CAPTIONS, annotations=[]), 'no image has a caption'),
    (changed(CAPTIONS, 'images', 0, file_name='x.jpg'), "no image 'x.jpg' in "),
  ],
)
def test_a_mistake_in_a_caption_file_is_one_line(folder, content, message):
  with pytest.raises(UserError) as error:
    len(captions(folder, content))
  assert message in str(error.value)
  assert str(error.value).startswith('coco captions: ')


@pytest.mark.parametrize(
  ('questions', 'annotations', 'message'),
  [
    (changed(QUESTIONS, 'questions', 0, question_id=9000), ANNOTATIONS, 'question_id 9000 occurs twice'),
    (changed(QUESTIONS, 'questions', 0, question_id=1), ANNOTATIONS, 'annotations.json: question 1 is missing'),
    (QUESTIONS, changed(ANNOTATIONS, 'annotations', 0, image_id=7), 'question 4000 is about image 7, but 4 in'),
    (QUESTIONS, changed(ANNOTATIONS, 'annotations', 0, answers='yes'), "answers is 'yes', expected a list"),
    (QUESTIONS, changed(ANNOTATIONS, 'annotations', 0, answers=[]), 'question 4000 has no answers'),
    (QUESTIONS, changed(ANNOTATIONS, 'annotations', 0, answers=['yes']), "question 4000: answers[0] is 'yes', not an"),
    (changed(QUESTIONS, 'questions', 0, question=' \n'), ANNOTATIONS, 'questions.json: question 4001 is blank'),
    (changed(QUESTIONS, data_subtype=None), ANNOTATIONS, "has no 'data_subtype' for the names of images"),
    (changed(QUESTIONS, data_subtype='train2014'), ANNOTATIONS, "no image 'COCO_train2014_000000000004.jpg' in "),
  ],
)  # fmt: skip
def test_a_mistake_in_vqa_files_is_one_line(folder, questions, annotations, message):
  with pytest.raises(UserError) as error:
    len(vqa(folder, questions, annotations))
  assert message in str(error.value)
  assert str(error.value).startswith('vqa: ')


def test_files_that_are_missing_or_not_json_are_one_line(folder):
  with pytest.raises(UserError, match=r"coco captions: no file 'none\.json'"):
    len(CocoCaptions('none.json', str(folder)))
  (folder / 'captions.json').write_text('{')
  with pytest.raises(UserError, match=r'captions\.json: cannot be read as JSON'):
    len(CocoCaptions(str(folder / 'captions.json'), str(folder)))
  with pytest.raises(ValueError, match=r'image_name: expected \{id\} and'):
    vqa(folder, image_name='{number}.jpg')
