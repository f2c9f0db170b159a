"""A page of HTML as blocks: headings, paragraphs and images in reading order.

  <nav>Home</nav><h2>Blur</h2>      heading  Blur
  <p>These filters <b>soften</b>    text     These filters soften
  <img src="a.png"> edges.          image    a.png
  <pre>x = 1                        text     edges.
  y = 2</pre>                       text     x = 1 / y = 2

Navigation, scripts and the like are left out, by their elements, roles and classes.
A page is cut into pieces between blocks.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mmjax.data.document import BadDocument


def _set(words: str) -> frozenset[str]:
  return frozenset(words.split())


_BLOCKS = _set(
  'address article aside blockquote body br caption center dd details div dl dt fieldset'
  ' figcaption figure footer h1 h2 h3 h4 h5 h6 header hr li main nav ol p pre section'
  ' summary table tbody tfoot thead tr ul'
)
_HEADINGS = frozenset(('h1', 'h2', 'h3', 'h4', 'h5', 'h6'))
_FURNITURE = _set(
  'script style nav header footer noscript template button select textarea svg iframe'
  ' object audio video'
)
_ROLES = frozenset(('navigation', 'banner', 'contentinfo', 'search'))
# Classes and ids that generators give to what isn't content.
_NAMES = _set(
  'navheader navfooter toc'  # DocBook
  ' sphinxsidebar related headerlink sphx-glr-footer'  # Sphinx
  ' header footer summary #top #nav-path'  # Doxygen
  ' navbar sidebar breadcrumb breadcrumbs'
)
_FIGURES = frozenset(('figure', 'informalfigure'))  # elements and classes
_CHARSET = re.compile(rb'(?:charset|encoding)\s*=\s*["\']?\s*([\w.:-]+)', re.I)


class Block(NamedTuple):
  """A piece of a page that is never cut: 'text', 'heading' or 'image' (its `src`)."""

  kind: str
  value: str

  @property
  def words(self) -> int:
    return 0 if self.kind == 'image' else len(self.value.split())


def decode(content: bytes) -> str:
  """The text of a page: by its byte order mark, its own word, UTF-8, or Windows-1252."""
  marks = (
    (b'\xef\xbb\xbf', 'utf-8-sig'),
    (b'\xff\xfe', 'utf-16'),
    (b'\xfe\xff', 'utf-16'),
  )
  named = [name for mark, name in marks if content.startswith(mark)]
  named += [m.decode() for m in _CHARSET.findall(content[:2048])]
  for name in [*named, 'utf-8']:
    try:
      return content.decode(name)
    except (UnicodeError, LookupError):
      continue
  return content.decode('cp1252', errors='replace')


def read_page(content: bytes, figures_first: bool = False) -> list[Block]:
  """The blocks of a page in reading order, furniture left out; images as linked.

  Raises:
    BadDocument: 'not_html'.
  """
  from lxml import etree

  text = decode(content).replace('\0', '')
  # The parser is told UTF-8, whatever the page says of itself.
  parser = etree.HTMLParser(encoding='utf-8', remove_comments=True, remove_pis=True)
  try:
    tree = etree.fromstring(text.encode('utf-8', errors='replace'), parser)
  except etree.XMLSyntaxError as error:
    raise BadDocument('not_html', str(error)) from None
  if tree is None:
    raise BadDocument('not_html', 'nothing in it')
  body = tree.find('body')
  reader = _Reader(figures_first)
  walk = etree.iterwalk(tree if body is None else body, events=('start', 'end'))
  for event, element in walk:
    if event == 'start':
      if _is_furniture(element):
        walk.skip_subtree()
        if element.tag in _BLOCKS:
          reader.close()
      else:
        reader.start(element)
    else:
      if not _is_furniture(element):
        reader.end(element)
      if element is not body:
        reader.add(element.tail)
  reader.close()
  return reader.blocks


def _words_of(element) -> set[str]:
  return {*(element.get('class') or '').split(), '#' + (element.get('id') or '')}


def _is_furniture(element) -> bool:
  return (
    element.tag in _FURNITURE
    or element.tag == 'head'
    or element.get('role') in _ROLES
    or not _NAMES.isdisjoint(_words_of(element))
  )


class _Reader:
  """Collects blocks while a tree is walked."""

  def __init__(self, figures_first: bool):
    self.blocks: list[Block] = []
    self._figures_first = figures_first
    self._figures: list[int] = []  # where those that are open began
    self._text: list[str] = []  # of the paragraph
    self._pre = 0  # depth of <pre>
    self._heading = False

  def start(self, element):
    tag = element.tag
    if tag in _BLOCKS and not (tag == 'br' and self._pre):
      self.close()
    if tag == 'img':
      self.close()
      if src := (element.get('src') or '').strip():
        self.blocks.append(Block('image', src))
    elif tag == 'br' and self._pre:
      self._text.append('\n')
    elif tag in ('td', 'th'):
      self._text.append(' ')
    self._pre += tag == 'pre'
    self._heading = self._heading or tag in _HEADINGS
    if _is_figure(element):
      self._figures.append(len(self.blocks))
    self.add(element.text)

  def end(self, element):
    if element.tag in _BLOCKS and not (element.tag == 'br' and self._pre):
      self.close()
    self._pre -= element.tag == 'pre'
    self._heading = self._heading and element.tag not in _HEADINGS
    if _is_figure(element):
      begin = self._figures.pop()
      if self._figures_first:
        inside = self.blocks[begin:]
        self.blocks[begin:] = sorted(inside, key=lambda b: b.kind != 'image')

  def add(self, text: str | None):
    if text:
      self._text.append(text if self._pre else re.sub(r'\s+', ' ', text))

  def close(self):
    """Ends the paragraph."""
    text, self._text = ''.join(self._text), []
    if self._pre:
      lines = (line.rstrip() for line in text.splitlines())
      text = '\n'.join(line for line in lines if line)
    else:
      text = re.sub(' +', ' ', text).strip()
    if text.strip():
      self.blocks.append(Block('heading' if self._heading else 'text', text))


def _is_figure(element) -> bool:
  return element.tag == 'figure' or not _FIGURES.isdisjoint(_words_of(element))


def pieces(
  blocks: Sequence[Block], max_words: int, max_images: int
) -> Iterator[list[Block]]:
  """Cuts a page into pieces of at most so many words and images.

  A piece that is half full ends before a heading or an image, and those go on to the
  next piece if there is room: text stands after what it is about. A block of too many
  words is first cut at the ends of lines or sentences; where it can't be, it is a
  piece of its own.
  """
  piece: list[Block] = []

  def fits(some):
    few = sum(b.kind == 'image' for b in some) <= max_images
    return few and sum(b.words for b in some) <= max_words

  for block in (part for whole in blocks for part in _cut(whole, max_words)):
    begins = block.kind != 'text' and sum(b.words for b in piece) * 2 >= max_words
    if piece and (begins or not fits([*piece, block])):
      rest = len(piece)
      while rest and piece[rest - 1].kind != 'text':
        rest -= 1
      rest = rest if rest and fits([*piece[rest:], block]) else len(piece)
      yield piece[:rest]
      piece = piece[rest:]
    piece.append(block)
  if piece:
    yield piece


def _cut(block: Block, max_words: int) -> Iterator[Block]:
  """A block in parts of at most `max_words`, as far as lines or sentences allow."""
  if block.words <= max_words:
    yield block
    return
  lines = block.value.split('\n')
  glue, parts = '\n', lines
  if len(lines) == 1:
    glue, parts = ' ', re.split(r'(?<=[.!?]) ', block.value)
  held: list[str] = []
  for part in parts:
    if held and sum(len(p.split()) for p in [*held, part]) > max_words:
      yield Block(block.kind, glue.join(held))
      held = []
    held.append(part)
  yield Block(block.kind, glue.join(held))
