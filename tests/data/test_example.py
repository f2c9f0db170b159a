"""Examples: tags, positions and media of one document, against plain loops."""

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmjax.batch import FOREVER, PLACEHOLDER, KeyTags, QueryTags, visible
from mmjax.data import media
from mmjax.data.document import Audio, BadDocument, Document, Image, Text, Video
from mmjax.data.example import to_example
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import measure

TOKENIZER = ByteTokenizer()
END = TOKENIZER.end_id
RULE = media.ImageRule(2, 'native', max_patches=12)


def pixels(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def example(*spans, slots=lambda item: item.grid, rules=None, attention='block'):
  rules = {'image': RULE} if rules is None else rules
  return to_example(
    Document(spans),
    tokenizer=TOKENIZER,
    rules=rules,
    slots=slots,
    image_attention=attention,
  )


spans = st.lists(
  st.one_of(
    st.builds(Text, st.text('abé', max_size=3), st.booleans()),
    st.builds(lambda h, w: Image(pixels(h, w)), st.integers(1, 9), st.integers(1, 9)),
  ),
  max_size=6,
)


def test_the_picture_in_the_docstring():
  made = example(Image(pixels(4, 2)), Text('pq'), Text('a', trained=True))
  assert made.tokens.tolist() == [-1, -1, ord('p'), ord('q'), ord('a'), END]
  assert made.order.tolist() == made.last.tolist() == [0, 0, 1, 2, 3, 4]
  assert made.first.tolist() == [0] * 6
  assert made.weights.tolist() == [0, 0, 0, 0, 1, 1]
  assert made.source.tolist() == [0, 1, -1, -1, -1, -1]
  want = [[0, 0, 0], [0, 1, 0], [2, 2, 2], [3, 3, 3], [4, 4, 4], [5, 5, 5]]
  assert made.positions.tolist() == want
  assert made.media['image'].values.shape == (2, 12)
  assert made.media['image'].positions.tolist() == [[0, 0, 0], [0, 1, 0]]
  assert made.media['image'].items.tolist() == [1, 1]
  assert made.media['image'].item_order.tolist() == [0]


def reference(document, attention):
  """The rules of tags, slot by slot: (token, order, position, weight, source)."""
  rows, rank, p, seen = [], 0, 0, 0
  for span in document:
    if isinstance(span, Text):
      for token in [*span.text.encode(), *([END] if span.trained else [])]:
        rows.append((token, rank, (p, p, p), float(span.trained), -1))
        rank, p = rank + 1, p + 1
      continue
    _, height, width = RULE.grid(*span.content.shape[:2])
    for r in range(height):
      for c in range(width):
        rows.append((PLACEHOLDER['image'], rank, (p, p + r, p + c), 0.0, seen))
        rank, seen = rank + (attention == 'causal'), seen + 1
    rank, p = rank + (attention == 'block'), p + max(1, height, width)
  if rows:
    rows[0] = (*rows[0][:3], 0.0, rows[0][4])
  return rows


@pytest.mark.parametrize('attention', ['block', 'causal'])
@given(some=spans)
def test_tags_follow_the_rules(attention, some):
  rows = reference(some, attention)
  if not any(weight for *_, weight, _ in rows):
    with pytest.raises(BadDocument) as error:
      example(*some, attention=attention)
    assert error.value.reason == ('nothing_trained' if rows else 'empty')
    return
  made = example(*some, attention=attention)
  assert len(made) == len(rows)
  tokens, order, positions, weights, source = zip(*rows)
  for name, want in (
    ('tokens', tokens), ('order', order), ('last', order), ('first', [0] * len(rows)),
    ('positions', positions), ('weights', weights), ('source', source),
  ):  # fmt: skip
    array = getattr(made, name)
    np.testing.assert_array_equal(array, want, err_msg=name)
    assert array.dtype == (np.float32 if name == 'weights' else np.int32)


def branched(spans, seed):
  """The spans, some of them in branches."""
  rng, branch, last = np.random.default_rng(seed), 0, 0
  for span in spans:
    move = rng.integers(3)
    if move:
      branch = 0 if move == 1 else last + 1
      last = max(last, branch)
    yield dataclasses.replace(span, branch=branch)


@given(some=spans, seed=st.integers(0, 99))
def test_the_sidecar_foretells_the_lengths(some, seed):
  some = list(branched(some, seed))
  try:
    text_tokens, targets, items = measure(Document(tuple(some)), TOKENIZER)
  except BadDocument as error:
    with pytest.raises(BadDocument, match=error.reason):
      example(*some)
    return
  made = example(*some)
  grids = [RULE.grid(*size[1:]) for _, size in items]
  assert len(made) == text_tokens + sum(int(np.prod(grid)) for grid in grids)
  assert (made.weights > 0).sum() == targets
  if grids:
    assert len(made.media['image'].values) == sum(int(np.prod(grid)) for grid in grids)


@given(some=spans)
def test_media_are_the_patches_of_each_image_in_order(some):
  made = example(*some, Text('a', True))
  images = [span for span in some if isinstance(span, Image)]
  if not images:
    assert made.media == {}
    return
  arrays = made.media['image']
  for i, image in enumerate(images, 1):
    mine = arrays.items == i
    np.testing.assert_array_equal(arrays.values[mine], RULE.patches(image.content))
    _, rows, cols = RULE.grid(*image.content.shape[:2])
    want = [(0, r, c) for r in range(rows) for c in range(cols)]
    assert arrays.positions[mine].tolist() == list(map(list, want))
    # Its slots in the stream carry its rank.
    mine_too = np.isin(made.source, np.flatnonzero(mine))
    assert set(made.order[mine_too]) == {arrays.item_order[i - 1]}


def sees(made):
  segments = np.ones((1, len(made)), np.int32)
  order = made.order[None]
  query = QueryTags(segments, made.first[None], made.last[None], order)
  return visible(query, KeyTags(segments, order, made.until[None]))[0]


def test_patches_of_an_image_see_each_other_only_in_blocks():
  spans = (Text('a'), Image(pixels(4, 4)), Text('b', True))
  causal = np.tril(np.ones((7, 7), bool))
  block = causal.copy()
  block[1:5, 1:5] = True
  np.testing.assert_array_equal(sees(example(*spans)), block)
  np.testing.assert_array_equal(sees(example(*spans, attention='causal')), causal)


def test_the_picture_of_branches():
  made = example(
    Image(pixels(2, 2)), Text('ab', branch=1), Text('', True, 1), Text('c', branch=5),
    Text('', True, 5), Text('d'), Text('', True),
  )  # fmt: skip
  assert made.order.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
  assert made.until.tolist() == [FOREVER, 3, 3, 3, 5, 5, FOREVER, FOREVER]
  assert made.positions[:, 0].tolist() == [0, 1, 2, 3, 1, 2, 1, 2]


BRANCH = st.lists(
  st.one_of(
    st.builds(Text, st.text('ab', min_size=1, max_size=3), st.booleans()),
    st.builds(lambda h, w: Image(pixels(h, w)), st.integers(1, 5), st.integers(1, 5)),
  ),
  min_size=1,
  max_size=3,
)


@given(BRANCH, st.lists(st.tuples(st.booleans(), BRANCH), min_size=1, max_size=4))
def test_a_branch_is_as_if_the_others_were_not(trunk, parts):
  """Each slot sees the tokens, at the positions, of its document without the (other)
  branches."""

  def on(branch, spans):
    return [dataclasses.replace(s, branch=branch) for s in spans]

  end = Text('!', True)
  whole = list(trunk)
  for i, (branched, part) in enumerate(parts, 1):
    whole += on(i if branched else 0, part)
  made = example(*whole, end)
  sizes = [len(example(*on(0, [span]), end)) - 2 for span in whole]
  branch_of = np.append(np.repeat([span.branch for span in whole], sizes), [0, 0])
  facts, seen = np.column_stack([made.tokens, made.positions]), sees(made)
  for branch in np.unique(branch_of):
    alone = example(*on(0, [s for s in whole if s.branch in (0, branch)]), end)
    same = np.flatnonzero(np.isin(branch_of, (0, branch)))  # its slots in the whole
    want, view = np.column_stack([alone.tokens, alone.positions]), sees(alone)
    for i, t in enumerate(same):
      if branch_of[t] == branch:
        np.testing.assert_array_equal(facts[seen[t]], want[view[i]])


@pytest.mark.parametrize('branches', [[1, 0, 1], [1, 2, 1], [-1]])
def test_a_branch_stands_in_one_place(branches):
  with pytest.raises(BadDocument, match='bad_branch: document .* branch -?1 ') as error:
    example(Text('a'), *(Text('b', True, branch) for branch in branches))
  assert error.value.reason == 'bad_branch'


def test_slots_are_the_models_answer():
  made = example(
    Text('a'), Image(pixels(4, 6)), Image(pixels(2, 2)), Text('b', True),
    slots=lambda item: (1, 1, 3) if item.grid == (1, 2, 3) else (1, 1, 1),
  )  # fmt: skip
  assert made.tokens.tolist() == [ord('a'), -1, -1, -1, -1, ord('b'), END]
  assert made.source.tolist() == [-1, 0, 1, 2, 3, -1, -1]
  assert made.order.tolist() == [0, 1, 1, 1, 2, 3, 4]
  want = [[0] * 3, [1, 1, 1], [1, 1, 2], [1, 1, 3], [4] * 3, [5] * 3, [6] * 3]
  assert made.positions.tolist() == want
  assert made.media['image'].items.tolist() == [1] * 6 + [2]


def test_an_image_without_slots_still_has_a_rank():
  spans = (Text('a'), Image(pixels(2, 2)), Text('b', True))
  for attention in ('block', 'causal'):
    made = example(*spans, slots=lambda item: (1, 0, 0), attention=attention)
    assert made.tokens.tolist() == [ord('a'), ord('b'), END]
    assert made.order.tolist() == [0, 2, 3]
    assert made.media['image'].item_order.tolist() == [1]


@dataclasses.dataclass(frozen=True)
class Windows:
  """A rule for sound: windows of four samples."""

  def grid(self, samples, rate, _):
    return (samples // 4, 1, 1)

  def patches(self, span):
    return span.wave.reshape(-1, 4)


def test_sound_needs_a_rule_and_works_with_one():
  wave = np.arange(8, dtype=np.float32)
  spans = (Audio(wave, 8000), Text('a', True))
  made = example(*spans, rules={'audio': Windows()})
  assert made.tokens.tolist() == [-2, -2, ord('a'), END]
  np.testing.assert_array_equal(made.media['audio'].values, wave.reshape(2, 4))
  assert made.positions.tolist() == [[0, 0, 0], [1, 0, 0], [2] * 3, [3] * 3]


@pytest.mark.parametrize(
  'spans, reason',
  [
    ((), 'empty'),
    ((Text(''),), 'empty'),
    ((Text('a'),), 'nothing_trained'),
    ((Text('', True),), 'nothing_trained'),  # its end token stands first
    ((Image(pixels(2, 2)),), 'nothing_trained'),
    ((Audio(np.zeros(4, np.float32), 1), Text('a', True)), 'unsupported_audio'),
    ((Video(b'', 1), Text('a', True)), 'unsupported_video'),
    ((Image(b'junk'), Text('a', True)), 'not_image'),
    (('text', Text('a', True)), 'unknown_span'),
  ],
)
def test_bad_documents_name_their_reason(spans, reason):
  with pytest.raises(BadDocument) as error:
    example(*spans)
  assert error.value.reason == reason


def test_the_pixel_limit_is_the_rules():
  rule = dataclasses.replace(RULE, max_pixels=15)
  with pytest.raises(BadDocument, match='too_many_pixels'):
    example(Image(pixels(4, 4)), Text('a', True), rules={'image': rule})


def test_attention_is_one_of_two():
  with pytest.raises(ValueError, match="choose 'block' or 'causal'"):
    example(Text('a', True), attention='full')


def test_prompts_that_see_themselves():
  """One rank for what stands together untrained, and the rule of visibility holds."""
  document = Document(
    (
      Image(pixels(4, 2)), Text('pq'), Text('a', trained=True), Text('r'),
      Image(pixels(2, 2)), Text('b', trained=True),
      Text('s', branch=1), Text('c', trained=True, branch=1),
      Text('t', branch=2), Text('d', trained=True, branch=2),
    )
  )  # fmt: skip
  make = functools.partial(
    to_example,
    document,
    tokenizer=TOKENIZER,
    rules={'image': RULE},
    slots=lambda item: item.grid,
  )
  made, causal = make(prompt_attention='block'), make()
  assert made.order.tolist() == [0] * 4 + [1, 2, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11]
  assert made.last.tolist() == made.order.tolist()
  assert made.until.tolist() == [FOREVER] * 10 + [8] * 3 + [11] * 3
  assert made.media['image'].item_order.tolist() == [0, 3]
  for name in ('tokens', 'positions', 'weights', 'source'):
    np.testing.assert_array_equal(getattr(made, name), getattr(causal, name))

  def seen(e):
    ones = np.ones_like(e.order)[None]
    query = QueryTags(ones, e.first[None], e.last[None], e.order[None])
    return visible(query, KeyTags(ones, e.order[None], e.until[None]))[0]

  more = seen(made) & ~seen(causal)
  assert not (seen(causal) & ~seen(made)).any()
  # A run of untrained slots of one branch sees itself, and nobody sees more than that.
  run = [[0, 1, 2, 3], [6, 7]]
  want = np.zeros_like(more)
  for slots in run:
    want[np.ix_(slots, slots)] = True
  np.testing.assert_array_equal(more, want & ~seen(causal))


def test_positions_that_count_on():
  made = to_example(
    Document((Text('p'), Image(pixels(4, 4)), Text('a', trained=True))),
    tokenizer=TOKENIZER,
    rules={'image': RULE},
    slots=lambda item: item.grid,
    image_positions='count',
  )
  np.testing.assert_array_equal(made.positions, np.arange(7)[:, None].repeat(3, 1))
  assert made.media['image'].positions.tolist() == [
    [0, 0, 0],
    [0, 0, 1],
    [0, 1, 0],
    [0, 1, 1],
  ]


@pytest.mark.parametrize(
  'name', ['image_attention', 'prompt_attention', 'image_positions']
)
def test_refuses_unknown_options(name):
  with pytest.raises(ValueError, match=f"{name}='blok'; choose "):
    to_example(
      Document((Text('a', trained=True),)), tokenizer=TOKENIZER, rules={},
      slots=lambda item: item.grid, **{name: 'blok'},
    )  # fmt: skip
