"""Evaluators of captions and answers, with a model whose text follows from the brightest channel of the image."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmcv_jax.augment.normalize import Normalize
from fmcv_jax.data.pipeline import Pipeline
from fmcv_jax.data.prompts import Prompted
from fmcv_jax.data.sources.base import BadRecord, Source
from fmcv_jax.data.tokenizers import Bpe, Tokenizer
from fmcv_jax.decoding.language_model import LanguageModel
from fmcv_jax.decoding.options import DecodingOptions
from fmcv_jax.errors import UserError
from fmcv_jax.evaluate.base import EvaluatedModel
from fmcv_jax.evaluate.caption_metrics import caption_scores
from fmcv_jax.evaluate.captioning import Captioning
from fmcv_jax.evaluate.question_answering import QuestionAnswering
from fmcv_jax.objectives.outputs import ImageEncoder, Output
from fmcv_jax.parallel.mesh import MeshShape, make_mesh
from fmcv_jax.parallel.rules import Placement

CAPTIONS = ('a red square on the left', 'two green squares in a row', 'the blue square lies below')
ANSWERS = ('red', 'green', 'blue')
BROKEN = 5


@dataclasses.dataclass(frozen=True)
class Squares(Source):
  """21 images of one color each, of which one cannot be read, with 1 to 3 captions, a question and answers.

  drop   a field that the records do not have
  people number of answers
  """

  people: int = 10
  drop: str = ''
  count: int = 21

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    if index == BROKEN:
      raise BadRecord('broken')
    image = np.full((4, 4, 3), index, np.uint8)
    image[..., index % 3] = 255
    return {'image': image, **self.annotations_of(index)}

  def texts_of(self, index):
    return (CAPTIONS[index % 3], 'a square', f'number {index}')[: 1 + index % 2 * 2] if self.drop != 'texts' else ()

  def annotations_of(self, index):
    own, other = ANSWERS[index % 3], ANSWERS[(index + 1) % 3]
    several = (f'The {own}.', *[own] * (1 + index // 3), *[other] * 10)
    fields = {
      'texts': self.texts_of(index),
      'question': f'which color has square {index}?',
      'answers': (own,) if self.people == 1 else several[: self.people],
      'answer_type': 'first' if index < 9 else 'other',
    }
    return {name: value for name, value in fields.items() if name != self.drop}


@pytest.fixture(scope='module')
def tokenizer():
  return Prompted(Bpe(400, 48, corpus=Squares()), 48)


MEAN = (0.2, 0.6, 0.1)  # without images, the model sees most green


def model_of(tokenizer, texts, mesh=MeshShape(data=1), devices=1):
  """A model of the mesh whose text is that of the channel in which the first pixel is brightest."""
  rows = jnp.asarray(tokenizer.answers(texts))
  ids = jnp.concatenate([rows, jnp.full((len(texts), 64), tokenizer.pad_id, jnp.int32)], axis=1)

  def logits(colors, step):
    return 20 * jax.nn.one_hot(ids[colors, step], tokenizer.vocab_size)

  def prefill(batch, capacity):
    colors = jnp.argmax(batch['image'][:, 0, 0].astype(jnp.int32), axis=-1)
    return logits(colors, 0), colors

  def language(params, extra):
    return LanguageModel(
      prefill,
      lambda tokens, state, step: (logits(state, step + 1), state),
      lambda state, rows: state[rows],
      tokenizer.pad_id,
      tokenizer.end_id,
    )

  def encoder(params, extra):
    return ImageEncoder(None, {}, Normalize(MEAN, (1.0, 1.0, 1.0)))

  outputs = {'caption': Output(lambda *_: None, language=language, encoder=encoder)}
  placement = Placement(make_mesh(mesh, jax.devices()[:devices]))
  return EvaluatedModel(outputs, placement, tokenizer, params={}, extra={})


def squares(**options):
  return Pipeline(Squares(**options), max_bad=0.1)


SHORT = DecodingOptions(max_tokens=40)


@pytest.mark.parametrize(('mesh', 'devices', 'batch'), [(MeshShape(data=1), 1, 5), (MeshShape(data=4, tensor=2), 8, 8)])
def test_captions_are_scored_against_the_references_of_their_own_image(tokenizer, mesh, devices, batch):
  """Without the images all captions are those of green."""
  model = model_of(tokenizer, CAPTIONS, mesh, devices)
  found = Captioning(squares(), decoding=SHORT, batch_size=batch)(model)
  read = [index for index in range(21) if index != BROKEN]
  references = [[text.split() for text in Squares().texts_of(index)] for index in read]
  expected = caption_scores([CAPTIONS[index % 3].split() for index in read], references)
  blind = caption_scores([CAPTIONS[1].split()] * len(read), references)
  assert found == pytest.approx({**expected, **{f'blind_{name}': score for name, score in blind.items()}})
  assert found['bleu4'] == pytest.approx(1)
  assert found['blind_cider'] < 0.6 * found['cider']
  assert set(Captioning(squares(), decoding=SHORT, batch_size=batch, blind=False)(model)) == set(expected)


@dataclasses.dataclass(frozen=True)
class ColorWords(Tokenizer):
  """Rows of start, the number of the color in a text or 3, and end."""

  length: int = 3
  vocab_size: int = 6
  pad_id = 0
  start_id = 4
  end_id = 5

  def __call__(self, texts):
    colors = [next((i for i, color in enumerate(ANSWERS) if color in text), 3) for text in texts]
    return np.array([[self.start_id, color, self.end_id] for color in colors], np.int32)

  def decode(self, tokens):
    return [str(row[1]) for row in tokens]


def image_text_model():
  """Embeddings are the color of an image or a text; of a text without one, the mean of all."""
  texts = jnp.concatenate([jnp.eye(3), jnp.full((1, 3), 3**-0.5)])

  def embed_image(params, extra, batch):
    return jnp.eye(3)[jnp.argmax(batch['image'][:, 0, 0].astype(jnp.int32), axis=-1)]

  outputs = {
    'embed_image': Output(embed_image, 'embedding'),
    'embed_text': Output(lambda params, extra, batch: texts[batch['tokens'][:, 1]], 'embedding', ('tokens',)),
  }
  placement = Placement(make_mesh(MeshShape(data=1), jax.devices()[:1]))
  return EvaluatedModel(outputs, placement, ColorWords(), params={}, extra={})


def test_clip_scores_are_those_of_each_image_with_its_own_caption(tokenizer):
  """A caption of the right color has the cosines 1 and 1, one of another color 0 with the image."""
  model = dataclasses.replace(model_of(tokenizer, CAPTIONS), reopen=lambda workdir: image_text_model())
  found = Captioning(squares(), decoding=SHORT, image_text_model='clip', batch_size=8)(model)
  assert (found['clip_score'], found['ref_clip_score']) == pytest.approx((2.5, 10 / 7))
  green = 7 / 20
  assert (found['blind_clip_score'], found['blind_ref_clip_score']) == pytest.approx((2.5 * green, 10 / 7 * green))
  encoder = dataclasses.replace(image_text_model(), outputs={'features': image_text_model().outputs['embed_image']})
  other = dataclasses.replace(model_of(tokenizer, CAPTIONS), reopen=lambda workdir: encoder)
  with pytest.raises(UserError, match='image_text_model: clip does not embed texts'):
    Captioning(squares(), image_text_model='clip').prepare(other)


@pytest.mark.parametrize('closed', [(), ANSWERS])
def test_answers_are_scored_by_vqa_accuracy_and_by_type(tokenizer, closed):
  model = model_of(tokenizer, ANSWERS, MeshShape(data=4), 4)
  found = QuestionAnswering(squares(), answers=closed, decoding=SHORT, batch_size=8)(model)
  # 2 + i // 3 people gave the color, one of them as 'The red.', and the others the next color. Without the image the
  # answer is green: the color of every third, and the next color of red.
  own = {i: _of_people(2 + i // 3) for i in range(21) if i != BROKEN}
  blind = {i: (_of_people(8 - i // 3), own[i], 0.0)[i % 3] for i in own}

  def means(scores):
    return {
      'accuracy': np.mean(list(scores.values())),
      'answer_type/first': np.mean([score for i, score in scores.items() if i < 9]),
      'answer_type/other': np.mean([score for i, score in scores.items() if i >= 9]),
    }

  expected = {**means(own), **{f'blind_{name}': score for name, score in means(blind).items()}}
  assert found == pytest.approx(expected)


def _of_people(count):
  """Accuracy of an answer that `count` of ten people gave."""
  return (count * min(1, (count - 1) / 3) + (10 - count) * min(1, count / 3)) / 10


def test_one_answer_is_an_exact_match(tokenizer):
  model = model_of(tokenizer, ('red', 'green one', 'blue'))
  found = QuestionAnswering(squares(people=1), decoding=SHORT, batch_size=8, blind=False, by=())(model)
  assert found == {'accuracy': pytest.approx(13 / 20)}  # seven of 20 are green


@pytest.mark.parametrize(
  ('evaluator', 'message'),
  [
    (
      Captioning(squares(drop='texts')),
      'captioning: 21 of 21 records cannot be compared with; squares[0]: ',
    ),
    (Captioning(squares(count=1)), 'CIDEr weighs words by how few images have them; give several images'),
    (Captioning(squares(), prompt='word ' * 40), "prompt: 'word word"),
    (QuestionAnswering(squares(drop='answers')), "squares[0] has no 'answers'; did you mean 'answer_type'?"),
    (QuestionAnswering(squares(drop='question')), "squares[0] has no 'question'"),
    (
      QuestionAnswering(squares(people=3)),
      'squares[0]: 3 answers; VQA accuracy is defined for 10, exact',
    ),
    (QuestionAnswering(squares(), by=('answer_typ',)), "has no 'answer_typ'; did you mean 'answer_type'?"),
  ],
)
def test_a_mistake_is_one_line_before_the_first_step(tokenizer, evaluator, message):
  with pytest.raises(UserError) as error:
    evaluator.prepare(model_of(tokenizer, CAPTIONS))
  assert message in str(error.value)
  assert '\n' not in str(error.value)


def test_models_without_texts_or_tokenizer_are_refused(tokenizer):
  with pytest.raises(UserError, match='this model does not generate texts'):
    Captioning(squares()).prepare(dataclasses.replace(model_of(tokenizer, CAPTIONS), outputs={}))
  with pytest.raises(UserError, match=r'config.tokenizer: the model has no tokenizer'):
    QuestionAnswering(squares()).prepare(dataclasses.replace(model_of(tokenizer, CAPTIONS), tokenizer=None))
  unprompted = dataclasses.replace(model_of(tokenizer, CAPTIONS), tokenizer=tokenizer.words)
  with pytest.raises(UserError, match='answers: a closed list needs a model with the tokenizer prompted'):
    QuestionAnswering(squares(), answers=ANSWERS).prepare(unprompted)


def test_values_of_a_config_are_checked():
  with pytest.raises(ValueError, match=r"template: needs one '\{\}'"):
    QuestionAnswering(squares(), template='answer en')
  with pytest.raises(ValueError, match="answers: 'yes' is there twice"):
    QuestionAnswering(squares(), answers=('yes', 'no', 'yes'))
  with pytest.raises(ValueError, match=r"clip_template: needs one '\{\}'"):
    Captioning(squares(), clip_template='A photo')


def test_new_parameters_are_evaluated_without_compiling_again(tokenizer):
  """Evaluators run again and again on one model, whose parameters are replaced."""
  model = model_of(tokenizer, CAPTIONS)
  language = model.outputs['caption'].language

  def shifted(params, extra):
    inner = language(params, extra)

    def prefill(batch, capacity):
      image = jnp.roll(batch['image'], params, axis=-1)
      return inner.prefill({**batch, 'image': image}, capacity)

    return inner._replace(prefill=prefill)

  traces = []

  def counted(params, extra):
    traces.append(1)
    return shifted(params, extra)

  model.outputs = {'caption': dataclasses.replace(model.outputs['caption'], language=counted)}
  evaluator = Captioning(squares(), decoding=SHORT, batch_size=8)
  figures = []
  for shift in (0, 1):
    model.params = jnp.int32(shift)
    figures.append(evaluator(model))
  assert figures[0]['bleu4'] == pytest.approx(1)
  assert figures[1]['bleu4'] < 0.5
  assert len(traces) == 2  # with the images and without
