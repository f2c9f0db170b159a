"""Few-shot documents: lengths as planned, repeatable, and nobody supports itself."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmjax.batch import BankBudget, Budget
from mmjax.data import chat, fewshot, store
from mmjax.data import tokenizer as tokenizer_lib
from mmjax.data.document import BadDocument, Document, Image, Text
from mmjax.data.example import to_example
from mmjax.data.media import ImageRule
from mmjax.data.pack import needs_of
from mmjax.data.plan import Lengths, PackPlan
from mmjax.data.writer import Writer, measure

RULES = {'image': ImageRule(2, 'native', max_patches=12)}
TOKENIZER = tokenizer_lib.train_bpe(['what shape is it? circle red'] * 9, 290)
END = TOKENIZER.end_name


def slots(item):
  return item.grid


def image(n):
  return Image(np.full((2 + 2 * (n % 3), 4, 3), n % 256, np.uint8))


def vqa(n):
  """A document of 1 to 3 questions; each text says whose it is."""
  spans = [image(n)]
  for b in range(1, 2 + n % 3):
    spans += [Text(f'is it {n}.{b}?', branch=b), Text(f' yes {n}.{b}', True, b)]
  return Document(tuple(spans), f'd{n}', {'types': ['t'] * (1 + n % 3)})


class Memory(list):
  """A dataset in memory with the index that preparation would write."""

  tokenizer = TOKENIZER

  @property
  def index(self):
    found = [measure(document, TOKENIZER) for document in self]
    items = [item for *_, some in found for item in some]
    return store.Index(
      np.array([n for n, *_ in found], np.int32),
      np.array([n for _, n, _ in found], np.int32),
      np.cumsum([0, *(len(some) for *_, some in found)]),
      np.array([kind for kind, _ in items], np.uint8),
      np.array([size for _, size in items], np.int32).reshape(-1, 3),
    )


def texts(document):
  return [s.text for s in document.spans if isinstance(s, Text) and s.text]


def test_the_picture_in_the_docstring():
  data = Memory(vqa(n) for n in range(9))
  made = fewshot.FewShot(data, np.tile([3, 6], (9, 1)) * (np.arange(9) == 8)[:, None]
                         + np.array([[1, 2]]) * (np.arange(9) == 0)[:, None]
                         + np.array([[0, 0]]), Memory(data), seed=1)  # fmt: skip
  document = made[8]
  assert document.id == 'd8' and document.meta == data[8].meta
  assert document.spans[-len(data[8].spans) :] == data[8].spans
  before = document.spans[: -len(data[8].spans)]
  assert all(s.branch == 0 and not getattr(s, 'trained', False) for s in before)
  assert texts(Document(before)) == [
    'is it 3.1?', ' yes 3.1', END, 'is it 6.1?', ' yes 6.1', END,
  ]  # fmt: skip
  pictures = [s.content[0, 0, 0] for s in document.spans if isinstance(s, Image)]
  assert pictures == [3, 6, 8]


def test_supports_read_as_they_would_trained():
  data = Memory(vqa(3 * n) for n in range(3))
  supports = np.array([[1], [2], [0]])
  options = dict(tokenizer=TOKENIZER, rules=RULES, slots=slots)
  plain, trained = (
    to_example(fewshot.FewShot(data, supports, trained=t)[0], **options)
    for t in (False, True)
  )
  assert plain.tokens.tolist() == trained.tokens.tolist()
  assert plain.weights.sum() < trained.weights.sum()
  assert fewshot.FewShot(data, supports, trained=True)[0].meta['types'] == ['', 't']


spans = st.lists(
  st.one_of(
    st.builds(Text, st.sampled_from(['', 'is it? ', ' red', '  x'])),
    st.builds(Text, st.sampled_from(['', ' red']), st.just(True)),
    st.builds(Text, st.sampled_from(['what', END]), special=st.just(True)),
    st.builds(image, st.integers(0, 5)),
  ),
  max_size=4,
)


@st.composite
def documents(draw):
  """A trunk, and branches that have something to train."""
  trunk = draw(spans)
  if not draw(st.booleans()):
    return Document((*trunk, Text(' red', True)))
  out = list(trunk)
  for branch in range(1, 1 + draw(st.integers(1, 3))):
    for span in (*draw(spans), Text(' red', True)):
      kind = dict(vars(span), branch=branch)
      out.append(type(span)(**kind))
  return Document(tuple(out))


@settings(max_examples=40, deadline=None)
@given(st.lists(documents(), min_size=3, max_size=5), st.integers(0, 2), st.booleans())
def test_lengths_planned_are_lengths_made(some, k, trained):
  data = Memory(some)
  made = fewshot.build(data, k, seed=k, trained=trained)
  lengths = Lengths.of(made.index, RULES, slots)
  for i in range(len(data)):
    example = to_example(made[i], tokenizer=TOKENIZER, rules=RULES, slots=slots)
    planned = dict(zip(lengths.names, lengths.needs[i].tolist()))
    assert {name: n for name, n in planned.items() if n} == needs_of(example)


@given(st.integers(2, 30), st.integers(0, 5), st.integers(0, 9), st.booleans())
def test_random_supports(count, k, seed, same):
  k = min(k, count - same)
  made = fewshot.random_supports(count, count, k, seed, same)
  assert made.shape == (count, k) and made.dtype == np.int32
  for i, row in enumerate(made.tolist()):
    assert len(set(row)) == k and set(row) <= set(range(count)) - ({i} if same else set())
  if not same:  # pure in seed and document: others don't matter
    fewer = fewshot.random_supports(count - 1, count, k, seed, same)
    assert fewer.tolist() == made[:-1].tolist()


def test_random_supports_are_even_and_differ_by_seed():
  made = fewshot.random_supports(2000, 2000, 2, 0, True)
  others = (made - np.arange(2000)[:, None]) % 2000  # 1..1999, each as likely
  counts = np.bincount(others.reshape(-1) * 10 // 2000, minlength=10)
  assert counts.min() > 330 and counts.max() < 470  # 400 each, sigma 19
  assert (made != fewshot.random_supports(2000, 2000, 2, 1, True)).mean() > 0.99


def test_nearest_supports_by_the_cosine_nearest_last(monkeypatch):
  monkeypatch.setattr(fewshot, '_BLOCK', 3)
  rng = np.random.default_rng(0)
  pool, asked = rng.normal(size=(20, 4)), rng.normal(size=(7, 4))
  for same, queries in ((False, asked), (True, pool)):
    made = fewshot.nearest_supports(queries, pool, 5, same)
    for i, row in enumerate(made.tolist()):
      near = [
        -2 if same and i == j else
        queries[i] @ p / np.linalg.norm(queries[i]) / np.linalg.norm(p)
        for j, p in enumerate(pool)
      ]  # fmt: skip
      assert row == sorted(range(20), key=near.__getitem__)[-5:]
  ties = fewshot.nearest_supports(np.ones((1, 2)), np.ones((4, 2)), 3, False)
  assert ties.tolist() == [[2, 1, 0]]


def test_answers_of_the_document_are_not_in_its_supports():
  data = Memory(vqa(n) for n in range(12))
  made = fewshot.build(data, 3, seed=4)
  for i in range(12):
    own, whole = texts(data[i]), texts(made[i])
    assert whole[-len(own) :] == own
    assert not any(f' {i}.' in text for text in whole[: -len(own)])
  again = fewshot.build(data, 3, seed=4)
  assert [texts(d) for d in again] == [texts(d) for d in made]


def test_dialogues_of_a_template_are_not_read_into_each_other():
  turns = [chat.Turn('user', 'what'), chat.Turn('assistant', 'red')]
  template = chat.Template(user=('is ', ' it'), assistant=('? ', '  '), system=None)
  data = Memory(chat.document(turns, template) for _ in range(3))
  made = fewshot.build(data, 2)
  parts = [to_example(d, tokenizer=TOKENIZER, rules={}, slots=slots) for d in data]
  whole = to_example(made[0], tokenizer=TOKENIZER, rules={}, slots=slots)
  assert len(whole) == len(parts[0]) * 3


def test_a_prepared_dataset_is_planned_with_its_supports(tmp_path):
  with Writer(tmp_path / 'd', TOKENIZER, {}) as writer:
    for n in range(12):
      writer.add('train' if n < 8 else 'test', vqa(n))
  train, test = (store.Dataset(tmp_path / 'd', s) for s in ('train', 'test'))
  np.save(tmp_path / 'train.npy', np.eye(8, 4, dtype=np.float32))
  np.save(tmp_path / 'test.npy', np.eye(4, dtype=np.float32))
  made = fewshot.build(
    test, 2, train, files=(str(tmp_path / 'test.npy'), str(tmp_path / 'train.npy')),
  )  # fmt: skip
  assert made.supports[:, -1].tolist() == [0, 1, 2, 3]
  plan = PackPlan(
    Lengths.of(made.index, RULES, slots),
    Budget(200, 40, {'image': BankBudget(40, 6, 12)}),
  )
  assert plan.num_documents == 4 and not plan.dropped
  assert 'is it 1.' in texts(made[1])[3]


def test_a_support_that_is_unreadable_is_an_error_of_its_document():
  class Broken(Memory):
    def __getitem__(self, i):
      if i == 1:
        raise BadDocument('unreadable_record', 'gone')
      return list.__getitem__(self, i)

  data = Broken(vqa(n) for n in range(3))
  made = fewshot.FewShot(data, np.array([[1], [2], [0]]))
  assert texts(made[2])[0].startswith('is it 0.')
  for i in (0, 1):
    with pytest.raises(BadDocument, match='gone'):
      made[i]


def test_what_is_wrong_is_one_line(tmp_path):
  data = Memory(vqa(n) for n in range(3))
  ones = np.ones((3, 2))
  other = Memory(data)
  other.tokenizer = tokenizer_lib.ByteTokenizer()
  np.save(tmp_path / 'a.npy', np.ones((2, 2)))
  for call, message in (
    (lambda: fewshot.build(data, 3), '3 supports out of 2 documents'),
    (lambda: fewshot.FewShot(data, np.zeros((2, 1), int)), r'are \[2, 1\], not \[3, k\]'),
    (lambda: fewshot.FewShot(data, np.full((3, 1), 3)), 'places in a pool of 3'),
    (lambda: fewshot.FewShot(data, np.zeros((3, 1), int)), 'is its own support'),
    (lambda: fewshot.FewShot(data, np.zeros((3, 1), int), other), 'another tokenizer'),
    (lambda: fewshot.nearest_supports(ones[:, :1], ones, 1, False), 'both must be'),
    (lambda: fewshot.nearest_supports(ones * np.nan, ones, 1, False), 'not all finite'),
    (lambda: fewshot.nearest_supports(ones[:2], ones, 1, True), 'cannot be a pool of 3'),
    (lambda: fewshot.embeddings(tmp_path / 'b.npy', 3), 'No such file'),
    (lambda: fewshot.embeddings(tmp_path / 'a.npy', 3), r'are \[2, 2\], not \[3, D\]'),
    (
      lambda: fewshot.build(data, 1, data, files=('a',)),
      'embeddings of the dataset and of the pool',
    ),
  ):
    with pytest.raises(ValueError, match=message) as error:
      call()
    assert '\n' not in str(error.value)
