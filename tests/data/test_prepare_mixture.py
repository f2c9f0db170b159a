"""Mixtures: a dataset each, one tokenizer, wrong files told in one line."""

import collections
import json

import pytest

from mmjax.data import prepare as prepare_lib
from mmjax.data import store, tokenizer
from mmjax.data.prepare_mixture import prepare_mixture, read
from mmjax.data.store import Dataset


@pytest.fixture
def folder(tmp_path):
  for name, word in (('a', 'zebra'), ('b', 'giraffe'), ('c', 'hippopotamus')):
    line = {'spans': [{'text': f'{word} {word}', 'trained': True}]}
    (tmp_path / f'{name}.jsonl').write_text(f'{json.dumps(line)}\n' * 30)
  return tmp_path


def write(folder, tree):
  (folder / 'm.json').write_text(tree if isinstance(tree, str) else json.dumps(tree))
  return folder / 'm.json'


def entries(folder, *names, **more):
  return {n: {'source': f'jsonl:{folder}/{n}.jsonl', **more.get(n, {})} for n in names}


def test_all_have_the_one_tokenizer_that_was_trained_on_all(folder, capsys):
  mixture = entries(folder, 'a', 'b', b={'rules': {'max_words': 9}, 'share': 2})
  args = ['--out', str(folder / 'out'), '--tokenizer=bpe:300', '--workers=0']
  args += ['--mixture', str(write(folder, mixture))]
  assert prepare_lib.main(args) == 0
  said = capsys.readouterr().out
  assert said.count('train: 30 documents') == 2 and f'{folder / "out" / "b"}\n' in said
  a, b = (Dataset(folder / 'out' / name, 'train') for name in 'ab')
  assert a.tokenizer.hash == b.tokenizer.hash
  for word in ('zebra', 'giraffe'):
    assert len(a.tokenizer.encode(word)) == 1
  assert len(a.tokenizer.encode('hippopotamus')) > 3
  assert b.meta['rules'] == {'max_words': 9} and a.meta['rules'] == {}
  assert a.meta['tokenizer'] == 'bpe:300'
  names = {p.name for p in (folder / 'out').iterdir()}
  assert names == {'a', 'b', 'tokenizer'}

  # Again: found done. What was only begun goes on with the tokenizer that is there.
  before = (folder / 'out' / 'a' / 'meta.json').stat().st_mtime_ns
  (folder / 'out' / 'b').rename(folder / 'elsewhere')
  assert prepare_lib.main(args) == 0
  assert (folder / 'out' / 'a' / 'meta.json').stat().st_mtime_ns == before
  assert store.read_meta(folder / 'out' / 'b') == store.read_meta(folder / 'elsewhere')

  # One more source makes another tokenizer, which the old datasets don't have.
  write(folder, entries(folder, 'a', 'b', 'c'))
  capsys.readouterr()
  assert prepare_lib.main(args) == 1
  assert "mixture 'a': " in (said := capsys.readouterr().err) and said.count('\n') == 1
  given = args[:2] + args[3:] + [f'--tokenizer={folder}/out/a/tokenizer.json']
  write(folder, entries(folder, 'c'))
  assert prepare_lib.main(given) == 0
  assert Dataset(folder / 'out' / 'c', 'train').tokenizer.hash == a.tokenizer.hash


def test_training_text_is_shared_out(folder, monkeypatch):
  counts = collections.Counter()

  def train(texts, size):
    for text in texts:
      counts[text.split()[0]] += len(text)
    return tokenizer.ByteTokenizer()

  monkeypatch.setattr(tokenizer, 'train_bpe', train)
  monkeypatch.setattr(prepare_lib, 'TRAINING_TEXT', 400)
  mixture = entries(folder, 'a', 'b', a={'share': 3})
  prepare_mixture(mixture, folder / 'out', tokenizer='bpe:300', progress=False)
  assert 300 <= counts['zebra'] < 312 and 100 <= counts['giraffe'] < 116


@pytest.mark.parametrize(
  'tree, match',
  [
    ('{', 'm.json: no JSON'),
    ('[]', 'm.json: no object of names'),
    ({}, 'names no source'),
    ({'a': 'jsonl:x'}, "mixture 'a': 'jsonl:x' is no object"),
    ({'a': {}}, '"source" must be a string, not None'),
    ({'a': {'sorce': 'x'}}, "unknown key 'sorce'; did you mean 'source'.*choices: op"),
    ({'a': {'source': 'jsonl:x', 'options': 3}}, "'options' must be an object"),
    ({'a': {'source': 'jsonl:x', 'options': {'b': 1}}}, "'a': .*no option 'b'"),
    ({'a': {'source': 'jsonl:x', 'rules': {'b': 1}}}, "'a': unknown rule 'b'"),
    ({'a': {'source': 'jsonl:x', 'share': 0}}, 'share 0 must be a number > 0'),
    ({'a': {'source': 'jsonl:x', 'splits': 'train'}}, '"splits" must be a list'),
    ({'../a': {'source': 'jsonl:x'}}, "'../a': no plain name"),
    ({'tokenizer': {'source': 'jsonl:x'}}, 'no plain name'),
    ({'a': {'source': 'jsonl:nowhere'}}, "mixture 'a': .*nowhere: no such file"),
  ],
)
def test_wrong_mixtures_are_one_line(folder, tree, match):
  with pytest.raises(ValueError, match=match) as error:
    prepare_mixture(read(write(folder, tree)), folder / 'out', progress=False)
  assert '\n' not in str(error.value)
  assert not [p for p in folder.rglob('meta.json')]


def test_mixture_or_source(folder, capsys):
  out = f'--out={folder / "out"}'
  mixture = f'--mixture={write(folder, entries(folder, "a"))}'
  for args, match in (
    ([], 'name a source, or a file with --mixture'),
    (['easy_vqa', mixture], 'name a source, or'),
    ([mixture, '--rules-min-words=3'], 'rules of a mixture, like min_words, stand in'),
    ([mixture, '--tfds-text=3'], 'options of a mixture, like text, stand in its file'),
    ([f'--mixture={folder}/nowhere'], 'nowhere: No such file'),
  ):
    assert prepare_lib.main([out, *args]) == 1
    assert match in (said := capsys.readouterr().err) and said.count('\n') == 1
