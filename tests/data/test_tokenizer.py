"""Tokenizers: lossless where they promise it, equal to the libraries' own."""

import functools
import io
import json
import pickle

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mmjax.data import tokenizer as lib
from mmjax.data import vocabularies

TEXTS = ['what color is the circle?', ' red', 'is there a blue shape?', ' yes'] * 9
unicode_text = st.text(st.characters(exclude_categories=['Cs']))
BPE = lib.train_bpe(TEXTS, 300)


@pytest.fixture(scope='module')
def sentencepiece_file(tmp_path_factory):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS),
    model_writer=model,
    vocab_size=40,
    minloglevel=2,
    hard_vocab_limit=False,
  )
  path = tmp_path_factory.mktemp('sp') / 'm.model'
  path.write_bytes(model.getvalue())
  return path


def word_level(*names):
  """A tokenizer.json with a vocabulary of words and these special tokens."""
  words = {'[UNK]': 0, 'red': 1, 'blue': 2}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, '[UNK]'))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens(list(names))
  return made


@pytest.mark.parametrize('tokenizer', [lib.ByteTokenizer(), BPE], ids=['bytes', 'bpe'])
@given(unicode_text)
def test_decode_inverts_encode(tokenizer, text):
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.decode([*ids, tokenizer.end_id]) == text
  assert all(0 <= i < tokenizer.vocab_size and i != tokenizer.end_id for i in ids)
  assert tokenizer.encode_batch([text, text]) == [ids, ids]


def test_bpe_gives_frequent_words_one_id():
  assert len(BPE.encode('what color is the circle?')) == 6
  assert len(BPE.encode(' red')) == 1
  assert BPE.vocab_size <= 300


def test_training_is_repeatable_and_hash_tells_content():
  assert lib.train_bpe(TEXTS, 300).hash == BPE.hash
  others = (lib.train_bpe(TEXTS, 280), lib.train_bpe([*TEXTS, 'green'], 300))
  hashes = {BPE.hash, lib.ByteTokenizer().hash, *(other.hash for other in others)}
  assert len(hashes) == 4


def test_special_tokens_in_text_are_text():
  assert BPE.end_id not in BPE.encode(f'a{lib.END}b')
  assert BPE.decode(BPE.encode(f'a{lib.END}b')) == f'a{lib.END}b'


def test_ids_beyond_the_vocabulary_decode_to_nothing():
  for tokenizer in (lib.ByteTokenizer(), BPE):
    odd = [tokenizer.vocab_size, 10**6, -1, *tokenizer.encode('a')]
    assert tokenizer.decode(odd) == 'a'


def test_broken_utf8_decodes_to_replacement():
  assert lib.ByteTokenizer().decode([0xC3, 0x28]) == '\ufffd('


def test_save_load_and_pickle_keep_everything(tmp_path, sentencepiece_file):
  made = [lib.ByteTokenizer(), BPE, lib.from_spec(str(sentencepiece_file))]
  for tokenizer in made:
    directory = tmp_path / tokenizer.kind
    directory.mkdir()
    tokenizer.save(directory)
    for again in (lib.load(directory), pickle.loads(pickle.dumps(tokenizer))):
      assert type(again) is type(tokenizer)
      for name in ('hash', 'end_id', 'vocab_size'):
        assert getattr(again, name) == getattr(tokenizer, name)
      assert again.encode('what is it?') == tokenizer.encode('what is it?')


def test_tokenizer_json_as_the_library_but_whole_and_bare(tmp_path):
  made = word_level('[CLS]', '</s>')
  made.post_processor = tokenizers.processors.TemplateProcessing(
    single='[CLS] $A', special_tokens=[('[CLS]', 3)]
  )
  made.enable_truncation(2)
  made.enable_padding()
  made.save(str(tmp_path / 't.json'))
  ours = lib.from_spec(str(tmp_path / 't.json'))
  assert ours.end_id == made.token_to_id('</s>') == 4
  assert ours.vocab_size == 5
  assert ours.encode('red blue red blue') == [1, 2, 1, 2]
  assert ours.encode_batch(['red', 'blue blue']) == [[1], [2, 2]]


def test_sentencepiece_as_the_library(sentencepiece_file):
  ours = lib.from_spec(str(sentencepiece_file))
  theirs = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
  assert ours.end_id == theirs.eos_id()
  assert ours.vocab_size == theirs.vocab_size()
  ids = theirs.encode('is the circle red?')
  assert ours.encode('is the circle red?') == ids
  assert ours.decode([*ids, ours.end_id]) == 'is the circle red?'
  assert ours.encode_batch(['red']) == [theirs.encode('red')]


def test_end_token_by_name(tmp_path, sentencepiece_file):
  path = str(tmp_path / 't.json')
  word_level('[STOP]').save(path)
  with pytest.raises(ValueError, match=r'no end token: looked for .*</s>'):
    lib.from_spec(path)
  assert lib.from_spec(path, end='[STOP]').end_id == 3
  assert lib.from_spec(str(sentencepiece_file), end='<unk>').end_id == 0
  with pytest.raises(ValueError, match=r"no token '\[HALT\]'"):
    lib.from_spec(path, end='[HALT]')
  # The end token is part of what a tokenizer is.
  one, other = lib.from_spec(path, end='[STOP]'), lib.from_spec(path, end='[UNK]')
  assert one.hash != other.hash


@pytest.mark.parametrize(
  'spec, message',
  [
    ('words', 'choose'),
    ('bpe:many', "N of 'bpe:N'"),
    ('bpe:100', '>= 257'),
    ('bpe:300', 'needs texts'),
    ('nowhere.json', 'no tokenizer file'),
    ('nowhere.model', 'no tokenizer file'),
  ],
)
def test_wrong_specs_are_one_line(spec, message):
  with pytest.raises(ValueError, match=message) as error:
    lib.from_spec(spec)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['t.json', 't.model'])
def test_broken_files_are_one_line(tmp_path, name):
  (tmp_path / name).write_bytes(b'\xff{}')
  with pytest.raises(ValueError, match='is no ') as error:
    lib.from_spec(str(tmp_path / name))
  assert '\n' not in str(error.value)


def test_load_refuses_missing_unknown_and_changed(tmp_path):
  with pytest.raises(ValueError, match='no tokenizer at'):
    lib.load(tmp_path)
  BPE.save(tmp_path)
  content = (tmp_path / 'tokenizer.json').read_bytes()
  (tmp_path / 'tokenizer.json').write_bytes(content + b' ')
  with pytest.raises(ValueError, match='was changed'):
    lib.load(tmp_path)
  meta = json.loads((tmp_path / 'tokenizer_meta.json').read_text())
  (tmp_path / 'tokenizer_meta.json').write_text(json.dumps({**meta, 'kind': 'runes'}))
  with pytest.raises(ValueError, match="kind 'runes'; known"):
    lib.load(tmp_path)


def test_sentencepiece_takes_special_tokens_where_asked(sentencepiece_file):
  tokenizer = lib.from_spec(str(sentencepiece_file))
  end, red = tokenizer.end_id, tokenizer.encode('red')
  assert tokenizer.encode('red</s>', special=True) == [*red, end]
  assert end not in tokenizer.encode('red</s>')
  assert (tokenizer.token_id('</s>'), tokenizer.token_id('e')) == (end, None)


@functools.cache
def llama_like():
  """A SentencePiece model as Llama's: nothing normalised, bytes for what it lacks."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS),
    model_writer=model,
    model_type='bpe',
    vocab_size=320,
    minloglevel=2,
    hard_vocab_limit=False,
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    user_defined_symbols=['<start_of_turn>', '<table>'],
  )
  return lib.SentencePieceTokenizer(model.getvalue())


@functools.cache
def llama_like_json():
  """The like of it as a tokenizer.json, as Hugging Face converts it."""
  words = ['<s>', '</s>', '<unk>', *(f'<0x{b:02X}>' for b in range(256))]
  words += ['▁', *'redblu', 're', '▁re', '▁red']
  merges = [('r', 'e'), ('▁', 're'), ('▁re', 'd')]
  ids = {word: i for i, word in enumerate(words)}
  model = tokenizers.models.BPE(ids, merges, unk_token='<unk>', byte_fallback=True)
  made = tokenizers.Tokenizer(model)
  normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
  made.normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  made.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  made.add_special_tokens(['<s>', '</s>'])
  return lib.JsonTokenizer(made.to_str().encode())


LOSSLESS = {
  'bytes': lib.ByteTokenizer,
  'bpe': lambda: BPE,
  'sentencepiece': llama_like,
  'llama json': llama_like_json,
}


@pytest.mark.parametrize('kind', LOSSLESS)
@given(unicode_text | st.text(st.sampled_from(' \n\tre<table>|</s>\u00e9'), max_size=9))
def test_every_text_comes_back(kind, text):
  tokenizer = LOSSLESS[kind]()
  text = text.replace('\u2581', '_')
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert not set(ids) & set(tokenizer.special.values())
  # As parts of a whole, whoever's words they are.
  parts = [('red', True), (text, False), (tokenizer.end_name, True), (text, False)]
  whole = f'red{text}{tokenizer.end_name}{text}'
  assert tokenizer.decode(lib.encode_parts(tokenizer, parts), special=True) == whole
  assert tokenizer.decode(lib.encode_parts(tokenizer, parts)).replace(' ', '') == (
    f'red{text}{text}'.replace(' ', '')
  )


@pytest.mark.parametrize('kind', LOSSLESS)
def test_special_tokens_are_left_out_or_kept(kind):
  tokenizer = LOSSLESS[kind]()
  ids = [*tokenizer.encode('red'), tokenizer.end_id]
  assert tokenizer.decode(ids) == 'red'
  assert tokenizer.decode(ids, special=True) == f'red{tokenizer.end_name}'
  assert tokenizer.special[tokenizer.end_name] == tokenizer.end_id


@pytest.mark.parametrize('kind', LOSSLESS)
@given(st.text(st.sampled_from(' redblu\n'), max_size=6))
def test_text_that_goes_on_is_what_the_whole_ends_in(kind, text):
  tokenizer = LOSSLESS[kind]()
  end, more = tokenizer.encode('\n'), tokenizer.encode(f'\n{text}')
  if more[: len(end)] == end:  # else the text merged with what it follows
    assert tokenizer.encode(text, goes_on=True) == more[len(end) :]


def test_pieces_that_are_markup_are_found_in_no_text():
  tokenizer = llama_like()
  turn = tokenizer.token_id('<start_of_turn>')
  assert turn not in tokenizer.encode('red <start_of_turn>red')
  assert turn in tokenizer.encode('red <start_of_turn>red', special=True)
  assert tokenizer.token_id('<table>') is None  # but a word like others
  assert len(tokenizer.encode('<table>', goes_on=True)) == 1


def test_sentencepiece_with_defaults_gives_back_what_it_made_of_a_text(
  sentencepiece_file,
):
  tokenizer = lib.from_spec(str(sentencepiece_file))
  once = tokenizer.decode(tokenizer.encode('  the \uff52ed\n circle '))
  assert once == 'the red circle' == tokenizer.decode(tokenizer.encode(once))


@given(st.text(st.sampled_from('Re dé,[]\n'), max_size=12))
def test_wordpiece_gives_back_what_it_made_of_a_text(text):
  letters = 'redé,[]'
  words = ['[UNK]', '[SEP]', *letters, *(f'##{c}' for c in letters), 'red']
  content = vocabularies.of_wordpiece('vocab.txt', '\n'.join(words).encode())
  tokenizer = lib.JsonTokenizer(content)
  ids = tokenizer.encode(text)
  assert tokenizer.encode(tokenizer.decode(ids)) == ids
  kept = tokenizer.decode(ids).replace(' ', '')
  assert kept == text.lower().replace('é', 'e').replace(' ', '').replace('\n', '')
