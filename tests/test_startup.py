"""The account of a run before its first step, and the contradictions that end it there."""

import json
import re

import numpy as np
import pytest

from fmcv_jax import startup, trainer
from fmcv_jax.errors import UserError
from fmcv_jax.run import Run
from tests import runs


@pytest.fixture
def folder(tmp_path):
  return runs.image_folder(tmp_path / 'images')


def test_an_account_names_records_classes_evaluators_and_parameters(folder, tmp_path):
  (folder / 'a' / 'notes.pdf').write_bytes(b'%PDF')
  (folder / 'empty').mkdir()
  lines = startup.account(Run(runs.classification(folder, optimizer__weight_decay=0.1), tmp_path / 'run'))
  text = '\n'.join(lines)
  for expected in ('data: 24 records', 'classes', '.pdf', 'evaluators.val: ', 'of them have weight decay'):
    assert expected in text, (expected, text)
  startup.write(tmp_path, lines)
  assert (tmp_path / startup.FILE).read_text().splitlines() == lines


def test_more_classes_in_the_data_than_in_the_network_end_the_run_before_its_first_step(folder, tmp_path):
  config = runs.classification(folder, objective__network__num_classes=2)
  with pytest.raises(UserError, match=r'labels go from 0 to 2, but the network has 2 classes, 0 to 1; set the number'):
    trainer.train(config, tmp_path / 'run')
  lines = startup.account(Run(runs.classification(folder, objective__network__num_classes=5)))
  assert 'labels: the network has 5 classes, the data 3: the others are never learned' in lines


@pytest.mark.parametrize(
  ('field', 'values', 'message'),
  [
    ('label', [0, 3], 'data: label 3 of record second is not one of the 3 classes of the network, 0 to 2'),
    ('label', [-1, 0], 'data: label -1 of record first is not one of the 3 classes'),
    ('segments', [[[0, 255]], [[9, 0]]], 'data: segments 9 of record second is not one of the 3 classes'),
  ],
)
def test_a_class_that_the_network_lacks_is_named_with_its_record(field, values, message):
  counts = {field: (3, 255 if field == 'segments' else None)}
  with pytest.raises(UserError, match=re.escape(message)):
    startup.check_labels({field: np.array(values)}, counts, lambda: ['first', 'second'])
  startup.check_labels({field: np.clip(np.array(values), 0, 2)}, counts, lambda: [])


def test_images_of_an_evaluator_that_the_network_cannot_take_end_the_run_before_its_first_step(folder):
  config = runs.classification(folder, evaluators__val__data__image__size=20)
  with pytest.raises(UserError, match=r'evaluators\.val\.data\.image\.size: 20, but the network takes images of 16'):
    startup.account(Run(config))


def test_texts_of_which_only_the_template_is_left_are_refused_and_cut_ones_are_counted(folder, tmp_path):
  long = 'a very long template that fills every token of the text before the caption {}'
  with pytest.raises(UserError, match=r'data\.caption_templates: of .* for every caption, so all texts are one'):
    startup.account(Run(runs.contrastive(folder, data__caption_templates=(long,)), tmp_path / 'run'))


def test_a_warm_start_names_the_fields_in_which_the_networks_differ(folder, tmp_path):
  earlier = runs.classification(folder, objective__network__eps=1e-5, objective__network__activation='gelu_tanh')
  (tmp_path / 'earlier').mkdir()
  (tmp_path / 'earlier' / 'config.json').write_text(json.dumps(earlier))
  run = Run(runs.classification(folder, init_from={'params': {'workdir': str(tmp_path / 'earlier')}}))
  lines = [line for line in startup.account(run) if line.startswith('init_from.params: ')]
  assert lines[1:] == [
    "init_from.params: activation is 'gelu_tanh' there and 'gelu' here",
    'init_from.params: eps is 1e-05 there and 1e-06 here',
  ]
