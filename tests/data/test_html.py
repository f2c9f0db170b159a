"""Pages of HTML as interleaved documents; the folders are made here."""

import io
import os
import pathlib
import random

import fsspec
import numpy as np
import PIL.Image
import pytest

from mmjax.data import html, sources
from mmjax.data.document import BadDocument, Image, Text
from mmjax.data.html import Html, shrink
from mmjax.data.media import decode_image, image_size
from mmjax.data.page import Block, decode, pieces, read_page
from mmjax.data.prepare import main, prepare
from mmjax.data.store import Dataset


def picture(shade, width=64, height=64, form='PNG'):
  file = io.BytesIO()
  PIL.Image.new('RGB', (width, height), (shade, 0, 0)).save(file, form)
  return file.getvalue()


@pytest.fixture
def manual(tmp_path):
  """A folder of ten pages with an own figure each, a logo and an icon."""
  root = tmp_path / 'manual'
  (root / 'images').mkdir(parents=True)
  (root / 'images' / 'logo.png').write_bytes(picture(1))
  (root / 'images' / 'logo2.png').write_bytes(picture(1))
  (root / 'images' / 'icon.png').write_bytes(picture(2, 16, 16))
  for i in range(10):
    (root / 'images' / f'{i} a.png').write_bytes(picture(100 + i))
    (root / f'page{i}.html').write_text(
      f'<html><head><title>t</title></head><body><nav>menu</nav>'
      f'<img src="images/logo{"2" if i % 2 else ""}.png"><h1>Page {i}</h1>'
      f'<p>before <img src="images/icon.png"> it</p><img src="images/{i}%20a.png?x#y">'
      f'<p>after <b>figure</b> {i}</p><div class="toc x">contents</div></body></html>'
    )
  return root


def found(folder, **options):
  records = list(Html(str(folder), **options).records())
  good = [(s, r) for s, r in records if not isinstance(r, BadDocument)]
  bad = [r for _, r in records if isinstance(r, BadDocument)]
  return good, bad


def reasons(bad):
  return sorted(error.reason for error in bad)


def test_text_and_figures_in_reading_order_without_furniture(manual):
  good, bad = found(manual)
  assert [document.id for _, document in good] == [f'page{i}.html#0' for i in range(10)]
  first, image, last = good[3][1].spans
  assert first == Text('Page 3\nbefore\nit', True)
  assert image.content == (manual / 'images' / '3 a.png').read_bytes()
  assert last == Text('after figure 3', True)
  # One logo under two names is one picture.
  assert reasons(bad) == ['image_furniture'] * 10 + ['image_small'] * 10
  good, _ = found(manual, max_share=1.0, min_side=1)
  assert sum(isinstance(s, Image) for s in good[0][1].spans) == 3


@pytest.mark.parametrize(
  'body, want',
  [
    ('<p>a  b\n c</p> d', ['a b c', 'd']),
    ('<p>a<p>b', ['a', 'b']),  # never closed
    ('<ul><li>a<li>b</ul>c<br>d', ['a', 'b', 'c', 'd']),
    ('<pre>x = 1\n  y\n\n<b>z</b>\n</pre>', ['x = 1\n  y\nz']),
    ('<pre>a<br>b</pre>', ['a\nb']),
    ('<table><tr><td>a</td><td>b<tr><td>c</table>', ['a b', 'c']),
    ('a<script>b</script>c<style>d</style>', ['ac']),
    ('<div role="navigation">a</div>b<div class="x navfooter">c</div>d', ['b', 'd']),
    ('<div id="top">a</div><p class="top">b</p>', ['b']),
    ('<header>a</header><footer>b</footer><p>c &amp; &eacute;</p>', ['c & é']),
    ('<!-- a --><p>b<?php c ?></p>', ['b']),
    ('<p></p> \n', []),
  ],
)
def test_text_of_a_page(body, want):
  assert [b.value for b in read_page(f'<body>{body}</body>'.encode())] == want
  assert [b.value for b in read_page(body.encode())] == want  # what is no whole page


def test_headings_and_figures():
  page = (
    b'<h2>one <i>two</i></h2>text<div class="figure"><p>title</p><img src="a.png">'
    b'<div class="figure">in<img src="b.png"></div></div><figure><img src="c.png">'
    b'<figcaption>c</figcaption></figure><img alt="no source">'
  )
  head = [Block('heading', 'one two'), Block('text', 'text')]
  a, b, c = (Block('image', f'{name}.png') for name in 'abc')
  title, inner, caption = (Block('text', t) for t in ('title', 'in', 'c'))
  assert read_page(page) == [*head, title, a, inner, b, c, caption]
  assert read_page(page, figures_first=True) == [*head, a, b, title, inner, c, caption]


@pytest.mark.parametrize(
  'content, want',
  [
    ('<meta charset="latin-1">é'.encode('latin-1'), 'é'),
    ('<?xml version="1.0" encoding="koi8-r"?><p>д</p>'.encode('koi8-r'), 'д'),
    ('\ufeff<p>д'.encode('utf-16-le'), 'д'),
    ('\ufeff<meta charset="latin-1">д'.encode(), 'д'),
    ('<p>д'.encode(), 'д'),
    (b'<p>\x93q\x94 \x81', '“q” \ufffd'),
    ('<meta charset="unheard-of">é'.encode(), 'é'),
  ],
)
def test_encodings(content, want):
  assert want in decode(content)
  assert [b.value for b in read_page(content)] == [want]


def test_pages_in_a_bucket_are_as_on_a_disk(manual, tmp_path):
  (manual / 'sub').mkdir()
  (manual / 'sub' / 'deep.HTM').write_text(
    '<p>a</p><img src="../images/3 a.png"><img src="../../x.png"><img src="no.png">'
  )
  bucket = f'memory://{tmp_path.name}/a/manual'
  fsspec.filesystem('memory').put(str(manual), bucket, recursive=True)
  good, bad = found(bucket)
  want, want_bad = found(manual)
  assert [d.id for _, d in good][-1] == 'sub/deep.HTM#0'
  assert repr(good) == repr(want)
  assert [str(e) for e in bad] == [str(e) for e in want_bad]
  assert {'missing_file', 'path_outside', 'image_furniture'} <= set(reasons(bad))
  before = Html(bucket).fingerprint()
  assert before == Html(bucket).fingerprint()
  fsspec.filesystem('memory').pipe_file(f'{bucket}/images/3 a.png', picture(77))
  assert before != Html(bucket).fingerprint()
  few, _ = found(f'{manual}:page[12].html,{bucket}:page3*', test_share=0.0)
  assert [d.id.rpartition('/')[2] for _, d in few] == [
    f'page{i}.html#0' for i in (1, 2, 3)
  ]
  with pytest.raises(ValueError, match='no folder .memory://nowhere'):
    found('memory://nowhere')


def test_what_cannot_be_used_is_counted(manual, tmp_path):
  (tmp_path / 'secret.png').write_bytes(picture(9))
  (tmp_path / 'secret.html').write_text('secret')
  (manual / 'link.png').symlink_to(tmp_path / 'secret.png')
  (manual / 'link.html').symlink_to(tmp_path / 'secret.html')
  (manual / 'wide.png').write_bytes(picture(9, 600, 60))
  (manual / 'broken.png').write_bytes(b'no picture')
  (manual / 'empty.html').write_bytes(b'')
  names = ('nowhere.png', '../secret.png', '/etc/hostname', 'link.png', 'http://a/b.png',
           'data:image/png;base64,AA', '//a/b.png', 'wide.png', 'broken.png', 'a%00b.png',
           'images')  # fmt: skip
  links = ''.join(f'<img src="{name}">' for name in names)
  (manual / 'page0.html').write_text(f'<p>a</p>{links}<p>b</p>')
  good, bad = found(manual)
  assert not [d for _, d in good if d.id == 'page0.html#0']
  mine = [e for e in bad if e.message.startswith(('page0', 'link', 'empty'))]
  want = ['few_images', 'image_thin', 'image_unreadable', 'not_html']
  want += ['image_remote'] * 3 + ['missing_file'] * 2 + ['path_outside'] * 5
  assert reasons(mine) == sorted(want)
  good, _ = found(manual, min_images=0)
  assert [d.spans for _, d in good if d.id == 'page0.html#0'] == [(Text('a\nb', True),)]


def test_no_page_is_in_both_splits(tmp_path):
  pages = tmp_path / 'p'
  pages.mkdir()
  for i in range(200):
    (pages / f'{i}.png').write_bytes(picture(i))
    text = f'<img src="{i}.png"><p>one two three.</p>' * 3
    (pages / f'{i}.html').write_text(text)
  good, _ = found(pages, max_words=3, max_share=1.0, test_share=0.25)
  assert len(good) == 600
  by_split = {'train': set(), 'test': set()}
  for split, document in good:
    by_split[split].add(document.id.partition('#')[0])
  assert not by_split['train'] & by_split['test']
  assert 30 <= len(by_split['test']) <= 70
  # The split is the page's own: other pages, or another place, change nothing.
  for i in range(100):
    (pages / f'{i}.html').unlink()
  moved = pages.rename(tmp_path / 'q')
  for split, document in found(moved, max_share=1.0, test_share=0.25)[0]:
    assert document.id.partition('#')[0] in by_split[split]
  source = Html(str(moved), max_share=1.0)
  assert {split for split, _ in source.records(['test'])} == {'test'}


def test_no_image_is_in_both_splits(tmp_path):
  """Every second page shows page 0's image in a second piece."""
  for i in range(60):
    (tmp_path / f'{i}.png').write_bytes(picture(i))
    shared = f'<h1>two</h1><img src="{0 if i % 2 else i}.png"><p>three four.</p>'
    own = f'<img src="{i}.png"><p>one two three.</p>'
    (tmp_path / f'{i}.html').write_text(own + shared)
  rules = dict(max_words=4, max_images=1, max_share=1.0, test_share=0.3)
  good, bad = found(tmp_path, **rules)
  images = {'train': set(), 'test': set()}
  for split, document in good:
    images[split] |= {s.content for s in document.spans if isinstance(s, Image)}
  assert images['train'] and images['test'] and not images['train'] & images['test']
  assert 'image_of_training' in str(bad)
  # Nothing is lost of training.
  assert sum(split == 'train' for split, _ in good) % 2 == 0


def test_pieces_are_whole_blocks_within_bounds():
  rng = random.Random(0)
  for _ in range(200):
    kinds = rng.choices(['text', 'heading', 'image'], [5, 1, 2], k=rng.randrange(30))
    blocks = [Block(k, f'{i} ' + 'w ' * rng.randrange(9)) for i, k in enumerate(kinds)]
    cut = list(pieces(blocks, 20, 3))
    assert [b for piece in cut for b in piece] == blocks and all(cut)
    for piece in cut:
      assert sum(b.words for b in piece) <= 20
      assert sum(b.kind == 'image' for b in piece) <= 3
    for piece, following in zip(cut, cut[1:]):
      # What stands before its text stays with it, if there is room.
      if piece[-1].kind != 'text' and piece[0].kind == 'text':
        tail = next(i for i, b in enumerate(reversed(piece)) if b.kind == 'text')
        moved = [*piece[len(piece) - tail :], following[0]]
        words, images = sum(b.words for b in moved), [b.kind for b in moved]
        assert words > 20 or images.count('image') > 3


def test_pieces_begin_with_headings_and_images():
  text = Block('text', 'one two three four five')
  heading, image = Block('heading', 'h'), Block('image', 'a.png')
  got = list(pieces([text, heading, text, text, heading, image, text], 10, 2))
  assert got == [[text], [heading, text], [text], [heading, image, text]]
  got = list(pieces([heading, text, image, text, image, image, text], 10, 2))
  assert got == [[heading, text], [image, text], [image, image, text]]


def test_long_text_is_cut_at_lines_or_sentences_or_dropped(tmp_path):
  lines = Block('text', 'a b c\nd e\nf g h i')
  assert [b.value for p in pieces([lines], 5, 1) for b in p] == ['a b c\nd e', 'f g h i']
  prose = Block('text', 'One two. Three four! Five six seven?')
  assert [[b.value for b in p] for p in pieces([prose], 4, 1)] == [
    ['One two. Three four!'],
    ['Five six seven?'],
  ]
  (tmp_path / 'a.png').write_bytes(picture(5))
  (tmp_path / 'a.html').write_text(f'<img src=a.png><p>x</p><p>{"word " * 9}</p>')
  good, bad = found(tmp_path, max_words=8)
  assert [d.spans[1:] for _, d in good] == [(Text('x', True),)]
  assert reasons(bad) == ['long_text']


def test_several_folders_patterns_and_options(manual, tmp_path):
  other = tmp_path / 'other'
  other.mkdir()
  (other / 'a.png').write_bytes(picture(7))
  for name in ('tutorial_a', 'b'):
    (other / f'{name}.html').write_text('<img src="a.png">x')
  spec = f'html:{manual},{other}:tutorial_*'
  ids = [r.id for _, r in sources.build(spec, min_images=1).records() if hasattr(r, 'id')]
  want = [f'manual/page{i}.html#0' for i in range(10)] + ['other/tutorial_a.html#0']
  assert ids == want
  source = sources.build(spec)
  assert source.fingerprint() == sources.build(spec).fingerprint()
  (other / 'tutorial_a.html').write_text('<img src="a.png">y')
  assert source.fingerprint() != sources.build(spec).fingerprint()
  assert source.total() is None
  assert Html(str(tmp_path / 'no')).fingerprint() is None
  for folder, match in (
    (tmp_path / 'no', 'no folder'),
    (f'{other}:z*', "no page 'z\\*'"),
  ):
    with pytest.raises(ValueError, match=match):
      list(Html(str(folder)).records())
  for name, value in (('max_words', 0), ('max_side', 0), ('test_share', 1.5)):
    with pytest.raises(ValueError, match=f'{name}={value}'):
      Html('a', **{name: value})
  with pytest.raises(ValueError, match="no option 'words'"):
    sources.build('html:a', words=3)


def test_large_images_are_scaled_down_only_if_asked(manual):
  rng = np.random.default_rng(0)
  for form in ('PNG', 'JPEG'):
    file = io.BytesIO()
    noise = rng.integers(0, 256, (100, 400, 3), np.uint8)
    PIL.Image.fromarray(noise).save(file, form)
    whole = file.getvalue()
    assert shrink(whole, None) is whole and shrink(whole, 400) is whole
    small = shrink(whole, 200)
    assert image_size(small) == decode_image(small).shape[:2] == (50, 200)
    assert PIL.Image.open(io.BytesIO(small)).format == form


def test_prepares_from_the_command_line(manual, capsys):
  out = manual.parent / 'out'
  (manual / 'bad.html').write_text('<img src="nowhere.png">text')
  command = [f'html:{manual}', '--out', str(out), '--html-max-side=32']
  assert main([*command, '--html-test-share=0.5']) == 0
  said = capsys.readouterr().out
  assert '10 image_furniture' in said and '1 missing_file' in said
  train, test = (Dataset(out, split) for split in ('train', 'test'))
  assert len(train) + len(test) == 10 and len(train) and len(test)
  assert train.index.item_size[0].tolist() == [1, 32, 32]
  assert prepare(f'html:{manual}', out, progress=False, max_side=32, test_share=0.5)
  assert main([f'html:{manual}', '--out', str(out) + '2', '--tfds-text=a']) == 1
  assert "source html has no option 'text'" in capsys.readouterr().err


def test_shares_are_even():
  shares = [html.share_of(f'page{i}.html') for i in range(2000)]
  assert abs(np.mean(shares) - 0.5) < 0.03 and 0 <= min(shares) < max(shares) < 1


@pytest.mark.slow
@pytest.mark.parametrize(
  'package, pattern, pages, images',
  [
    ('gimp-help-en', '*', 354, 1776),
    ('python-sklearn-doc', '*', 284, 732),
    ('opencv-doc', '*tutorial*', 159, 757),
    ('grass-doc', '*', 90, 380),
    ('python-skimage-doc', '*', 62, 286),
  ],
)
def test_pages_with_two_images_of_real_manuals(package, pattern, pages, images):
  """Against a count by another parser (Beautiful Soup), without a limit on aspect."""
  root = pathlib.Path(os.environ.get('REFDATA', '')) / 'deb' / package
  if 'REFDATA' not in os.environ or not root.is_dir():
    pytest.skip(f'{package} is not unpacked in $REFDATA/deb (apt-get download {package})')
  read = html.read_folder(str(root), pattern, Html(str(root), max_aspect=1e9))
  shown = [{b.value for b in page.blocks if b.kind == 'image'} for page in read]
  assert sum(len(one) >= 2 for one in shown) == pages
  assert len(set().union(*shown)) == images
