"""Textual inversions give prompts the features that diffusers gives them."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from fmcv_jax.__main__ import main
from fmcv_jax.apps.adapters import import_adapters
from fmcv_jax.apps.conversion import export_checkpoint, import_checkpoint
from fmcv_jax.data.tokenizers import ClipBpe
from fmcv_jax.errors import UserError
from fmcv_jax.inference.adapters import add_adapters
from fmcv_jax.pretrained.tensors import open_tensors
from fmcv_jax.pretrained.textual_inversion import read_inversion
from tests.pretrained.references import sd_parts

torch = pytest.importorskip('torch', reason='pip install fmcv-jax[parity]')
diffusers = pytest.importorskip('diffusers', reason='pip install fmcv-jax[parity]')

RNG = np.random.default_rng(0)
CAT, DOG = (RNG.normal(size=shape).astype(np.float32) for shape in ((3, 64), (64,)))


def written(file):
  """One word of three vectors, in the form of a file's name."""
  name = file.name
  if name == 'emb_params.safetensors':
    save_file({'emb_params': CAT}, file)
  elif name == 'words.safetensors':
    save_file({'<cat>': CAT}, file)
  elif name == 'a1111.pt':
    torch.save({'string_to_token': {'*': 265}, 'string_to_param': {'*': torch.from_numpy(CAT)}, 'name': '<cat>'}, file)
  elif name == 'first.pt':
    torch.save({'string_to_param': torch.nn.ParameterDict({'*': torch.from_numpy(CAT)})}, file)
  elif name == 'learned_embeds.bin':
    torch.save({'<cat>': torch.from_numpy(CAT)}, file)
  return file


WORDS = {'emb_params.safetensors': 'emb_params', 'words.safetensors': '<cat>', 'a1111.pt': '<cat>'}
WORDS |= {'first.pt': 'first', 'learned_embeds.bin': '<cat>'}


@pytest.mark.parametrize('name', WORDS)
def test_all_forms_of_files_give_the_same_vectors(tmp_path, name):
  file = str(written(tmp_path / name))
  found = read_inversion(open_tensors(file), file, 64)
  assert list(found) == [WORDS[name]]
  np.testing.assert_array_equal(found[WORDS[name]], CAT)
  with pytest.raises(UserError, match=r'has the shape \(3, 64\), but the text tower has vectors of 768'):
    read_inversion(open_tensors(file), file, 768)


def test_the_embeddings_of_sdxl_are_refused(tmp_path):
  save_file({'clip_l': np.ones((2, 768)), 'clip_g': np.ones((2, 1280))}, tmp_path / 'x.safetensors')
  with pytest.raises(UserError, match=r'clip_[lg] is an embedding of SDXL'):
    read_inversion(open_tensors(tmp_path / 'x.safetensors'), 'x.safetensors', 768)


def test_an_added_word_is_all_its_ids():
  plain, own = ClipBpe(length=12), ClipBpe(length=12, added=('<cat>', '<cat>_1', '<cat>_2', 'Dog'))
  assert (own.vocab_size, own.start_id, own.end_id) == (49_412, 49_406, 49_407)
  texts = ['a photo of a tree', 'a &amp; b']
  np.testing.assert_array_equal(own(texts), plain(texts))
  a, on = (plain([text])[0, 1] for text in ('a', 'on'))
  row = [49_406, a, 49_408, 49_409, 49_410, on, 49_411, 49_407, 0, 0, 0, 0]
  np.testing.assert_array_equal(own(['A <CAT> on dog'])[0], row)
  assert own.decode(own(['a <cat> on dog'])) == ['a <cat> on dog']
  with pytest.raises(ValueError, match="'dog' is empty or there twice"):
    ClipBpe(added=('Dog', 'dog'))


def test_prompts_with_new_words_have_the_features_of_diffusers(tmp_path, monkeypatch, capsys):
  torch.manual_seed(0)
  sd_parts(tmp_path / 'theirs', 'sd1')
  base = import_checkpoint(str(tmp_path / 'theirs'), str(tmp_path / 'base'), 'sd1')
  export_checkpoint(str(tmp_path / 'base'), str(tmp_path / 'pipe'), 'diffusers')
  pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / 'pipe', safety_checker=None)
  files = [str(written(tmp_path / 'words.safetensors')), str(tmp_path / 'dog.bin')]
  torch.save({'<dog>': torch.from_numpy(DOG)}, files[1])
  for file in files:
    pipe.load_textual_inversion(file)
  lora = {'lora_te_text_model_encoder_layers_0_mlp_fc1.diff_b': np.zeros(128, np.float32)}
  save_file(lora, tmp_path / 'lora.safetensors')
  monkeypatch.setenv('COLUMNS', '400')
  given = [*files, f'{tmp_path}/lora.safetensors:0.5']
  main(['import', *given, '--onto', str(tmp_path / 'base'), '--to', str(tmp_path / 'ours')])
  assert '<cat> in prompts' in capsys.readouterr().err
  from fmcv_jax.run import Run

  run = Run.reopen(tmp_path / 'ours')
  subject, _ = run.restored_model()
  prompts = ['a photo of <cat> next to a <dog>, at night', 'a tree']
  texts = [pipe.maybe_convert_prompt(prompt, pipe.tokenizer) for prompt in prompts]
  ids = pipe.tokenizer(texts, padding='max_length', max_length=77, truncation=True, return_tensors='pt').input_ids
  tokens = subject.tokenizer(prompts)
  ends = np.where(tokens == 0, 49_407, tokens)  # diffusers pads texts of Stable Diffusion 1 with the end
  np.testing.assert_array_equal(ends, ids.numpy())
  with torch.no_grad():
    theirs = pipe.text_encoder(ids).last_hidden_state.numpy()
  encoder = run.experiment.objective.text_condition.encoder
  ours = encoder.apply({'params': subject.extra['text']}, ends).tokens
  np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
  with pytest.raises(UserError, match='<cat> is a word of this model already'):
    import_adapters(files[:1], str(tmp_path / 'ours'), str(tmp_path / 'again'))
  with pytest.raises(UserError, match='is a word, which has no scale'):
    import_adapters([f'{files[0]}:0.5'], str(tmp_path / 'base'), str(tmp_path / 'again'))
  with pytest.raises(UserError, match='<cat> is a word of a textual inversion, which is not written'):
    export_checkpoint(str(tmp_path / 'ours'), str(tmp_path / 'out'), 'diffusers')
  with pytest.raises(UserError, match='is a textual inversion: it adds words'):
    add_adapters(base, base.restored_model()[0], files[:1])
  assert not (tmp_path / 'again').exists()
