"""`fmcv_jax.load`: one image or many, texts and labels, and one clear line for each mistake."""

import io
import logging
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import fmcv_jax
from fmcv_jax.errors import UserError
from tests import runs
from tests.train.tiny import shaken


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return runs.image_folder(tmp_path_factory.mktemp('images'))


@pytest.fixture(scope='module')
def clip(folder, tmp_path_factory):
  config = runs.contrastive(folder, data__image={'name': 'resize', 'size': 16})
  return fmcv_jax.load(runs.untrained(config, tmp_path_factory.mktemp('clip'), changed=shaken), batch=8)


@pytest.fixture(scope='module')
def classifier(folder, tmp_path_factory):
  config = runs.classification(folder)
  return fmcv_jax.load(runs.untrained(config, tmp_path_factory.mktemp('labels'), changed=shaken), batch=8)


def test_one_image_gives_what_a_list_gives_without_its_axis(folder, clip, classifier):
  file = folder / 'a' / '0.png'
  same = [str(file), file, file.read_bytes(), Image.open(file), np.asarray(Image.open(file).convert('RGB'))]
  for call in (clip.encode_image, classifier.encode_image, classifier.classify):
    many = call(same)
    assert many.ndim == 2
    np.testing.assert_allclose(many, np.broadcast_to(many[0], many.shape), atol=1e-6)
    for image in same:
      np.testing.assert_allclose(call(image), many[0], atol=1e-6)
  np.testing.assert_allclose(classifier.classify(file).sum(), 1, atol=1e-6)
  np.testing.assert_array_equal(clip.encode_text('a red image'), clip.encode_text(['a red image'])[0])
  np.testing.assert_allclose(np.linalg.norm(clip.encode_text('a red image')), 1, atol=1e-6)


def test_classify_is_the_softmax_of_scaled_cosines_with_the_label_texts(folder, clip):
  images, labels = [folder / 'a' / '0.png', folder / 'b' / '1.png'], ['red', 'green', 'blue']
  assert clip.templates == ('{}',)  # the templates of training captions
  cosines = clip.encode_image(images).astype(np.float64) @ clip.encode_text(labels).T
  logits = np.exp(float(clip._subject.params['temperature'])) * cosines
  expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(clip.classify(images, labels), expected, atol=1e-5)
  np.testing.assert_allclose(clip.classify(images[0], labels, templates='{}'), expected[0], atol=1e-5)


def test_templates_are_those_of_the_evaluator_before_those_of_training(folder, tmp_path):
  data = {'source': {'name': 'image_folder', 'path': str(folder)}, 'image': {'name': 'resize', 'size': 16}}
  zero_shot = {'name': 'zero_shot', 'batch_size': 16, 'templates': ('my {}',), 'data': data}
  config = runs.contrastive(folder, data__caption_templates=('a {}', 'the {}'))
  assert fmcv_jax.load(runs.untrained(config, tmp_path / 'trained')).templates == ('a {}', 'the {}')
  evaluated = {**config, 'evaluators': {'val': zero_shot}}
  assert fmcv_jax.load(runs.untrained(evaluated, tmp_path / 'evaluated')).templates == ('my {}',)


def test_a_template_that_leaves_no_room_for_a_label_is_refused_and_a_cut_label_is_said(folder, clip, caplog):
  image, template = folder / 'a' / '0.png', 'xq zj vw kp photo of a {}.'  # more than the 8 tokens of a text
  with pytest.raises(UserError, match=r"templates: 'xq zj .*' leaves no room for a label in the 8 tokens"):
    clip.classify(image, ['red', 'green'], templates=[template])
  with caplog.at_level(logging.WARNING):
    clip.classify(image, ['red', 'green'])
    assert not caplog.records
    clip.classify(image, ['red', 'green xq zj vw kp'])
  assert '1 of 2 texts are longer than 8 tokens and are truncated' in caplog.text
  assert "'green xq zj vw kp' to 'green" in caplog.text


def test_outputs_say_their_kinds_and_what_they_read(clip, classifier):
  found = {name: (output.kind, output.reads) for name, output in clip.outputs.items()}
  image, text = ('embedding', ('image',)), ('embedding', ('tokens',))
  assert found == {'embed_image': image, 'embed_text': text, 'features': image}
  assert {name: output.kind for name, output in classifier.outputs.items()} == {
    'features': 'embedding', 'logits': 'logits', 'patch_features': 'map', 'attention': 'map',
  }  # fmt: skip
  assert repr(clip.outputs['embed_text']) == "Output(kind='embedding', reads=('tokens',))"


def test_mistakes_are_one_clear_line(folder, clip, classifier):
  image, zeros = folder / 'a' / '0.png', np.zeros((16, 16, 3), np.uint8)
  for call, message in [
    (lambda: classifier.classify('nowhere.png'), r"images: no file 'nowhere\.png'"),
    (lambda: classifier.classify([]), 'images: give at least one image'),
    (lambda: classifier.classify(zeros / 255), r'float64 \[16, 16, 3\] is not an image; expected uint8'),
    (
      lambda: classifier.classify(zeros / 255),
      r'for pixels from 0 to 1 give \(255 \* x\)\.round\(\)\.astype\(np\.uint8\)$',
    ),
    (lambda: classifier.classify(zeros.transpose(2, 0, 1)), r'move the channels last: x\.transpose\(1, 2, 0\)$'),
    (lambda: classifier.classify(zeros / 255), '^data: image 0 cannot be read: float64'),
    (lambda: classifier.classify([3]), 'int is not an image'),
    (lambda: classifier.classify(3), 'images: int is not an image; give .*, or a list of these'),
    (lambda: classifier.classify(None), 'images: NoneType is not an image'),
    (lambda: classifier.classify(io.BytesIO()), 'images: BytesIO is not an image'),
    (lambda: classifier.classify(folder / 'a'), 'is a folder; give the files in it'),
    (lambda: classifier.classify(folder / 'captions.csv'), r'captions\.csv'),
    (lambda: classifier.classify(image, ['cat', 'dog']), 'has no text encoder; its outputs are features, logits'),
    (lambda: classifier.encode_text('a cat'), 'has no text encoder'),
    (lambda: clip.classify(image), 'no classifier head; pass labels'),
    (lambda: clip.classify(image, 'cat'), "labels: 'cat' is one text; give a list"),
    (lambda: clip.classify(image, ['cat'], templates='a photo'), "templates: each needs one '{}'"),
    (lambda: clip.classify(image, ['cat', 'dog', 'cat']), "labels: 'cat' is given twice"),
    (lambda: clip.classify(image, ['cat', ' ']), 'labels: label 1 is empty'),
    (lambda: clip.classify(image, 3), 'labels: expected a list of texts, got int'),
    (lambda: clip.encode_text(3), 'texts: expected a list of texts, got int'),
    (lambda: clip.encode_text(['a', None]), 'texts: item 1 is NoneType, not a text'),
    (lambda: clip.encode_text([]), 'texts: give at least one text'),
    (lambda: clip.generate(['cat']), 'does not generate images; its outputs are embed_image'),
  ]:
    with pytest.raises(UserError, match=message):
      call()


def test_arrays_of_other_libraries_and_iterators_give_the_same_as_numpy(folder, classifier):
  torch = pytest.importorskip('torch')
  pixels = np.asarray(Image.open(folder / 'a' / '0.png').convert('RGB'))
  expected = classifier.classify(folder / 'a' / '0.png')
  for one in (pixels, jnp.asarray(pixels), torch.tensor(pixels)):
    np.testing.assert_array_equal(classifier.classify(one), expected)
    np.testing.assert_array_equal(classifier.classify([one, one]), [expected, expected])
  several = torch.tensor(np.stack([pixels, pixels]))
  np.testing.assert_array_equal(classifier.classify(several), [expected, expected])
  np.testing.assert_array_equal(classifier.classify(image for image in [pixels]), [expected])
  with pytest.raises(UserError, match=r'^images: .*detach\(\)'):
    classifier.classify([torch.zeros(16, 16, 3, requires_grad=True)])


def test_a_truncated_text_is_said_when_it_is_encoded(clip, caplog):
  caplog.set_level('WARNING')
  clip.encode_text(['a cat', 'a very long text ' * 50])
  assert 'texts: 1 of 2 texts are longer than' in caplog.text
  caplog.clear()
  clip.encode_text('a cat')
  assert not caplog.text


def test_a_wrong_keyword_is_a_type_error_of_the_public_function(folder, clip, tmp_path):
  with pytest.raises(TypeError, match=r"classify\(\) got an unexpected keyword argument 'labelz'"):
    clip.classify(folder / 'a' / '0.png', labelz=['cat'])
  with pytest.raises(TypeError, match=r"load\(\) got an unexpected keyword argument 'stepz'"):
    fmcv_jax.load(str(tmp_path), stepz=3)
  generator = fmcv_jax.load(runs.untrained(runs.class_to_image(folder), tmp_path / 'class_to_image'), batch=8)
  with pytest.raises(TypeError, match=r"^generate.* unexpected .*'guidanse'; did you mean 'guidance'"):
    generator.generate(['a'], guidanse=3.0)


def test_a_diffusion_samples_as_its_generator_does(folder, tmp_path):
  generator = fmcv_jax.load(runs.untrained(runs.class_to_image(folder), tmp_path, changed=shaken), batch=8)
  batch = {'label': jnp.array([0, 2]), 'index': jnp.arange(2)}
  sampled = jax.jit(generator.outputs['samples'].call)(generator._subject.params, generator._subject.extra, batch)
  expected = generator.generate(['a', 'c'], steps=20, guidance=1.0, seed=0)
  np.testing.assert_allclose(np.asarray(sampled, int), expected.astype(int), atol=1)
  one = generator.generate('a', steps=20, guidance=1.0, seed=0)
  np.testing.assert_allclose(one.astype(int), expected[0].astype(int), atol=1)


def test_predict_names_the_best_classes_by_the_names_of_training(folder, clip, classifier):
  file = folder / 'a' / '0.png'
  assert classifier.class_names == ('a', 'b', 'c')
  probabilities = classifier.classify(file)
  order = np.argsort(-probabilities)
  assert classifier.predict(file, count=2) == [('abc'[at], float(probabilities[at])) for at in order[:2]]
  labels = ['red', 'green', 'blue']
  scores = clip.classify([file, file], labels)
  assert [found[0][0] for found in clip.predict([file, file], labels)] == [labels[at] for at in scores.argmax(1)]
  assert clip.class_names == ()
  with pytest.raises(UserError, match='count: expected at least 1, got 0'):
    classifier.predict(file, count=0)


def test_a_dtype_is_set_in_every_network_or_refused(folder, tmp_path):
  workdir = runs.untrained(runs.classification(folder), tmp_path / 'run')
  half = fmcv_jax.load(workdir, dtype='bfloat16')
  assert half._run.experiment.objective.network.stack.block.dtype == 'bfloat16'
  with pytest.raises(UserError, match=r"^dtype: 'float16' is not one of 'float32', 'bfloat16'; did you mean"):
    fmcv_jax.load(workdir, dtype='float16')


def test_opening_a_model_in_python_prints_nothing():
  code = 'import fmcv_jax.inference.model'
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert (done.stdout, done.stderr) == ('', '')
