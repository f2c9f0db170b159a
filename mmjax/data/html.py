"""Folders of HTML pages as interleaved documents: text with figures in their places.

  <h2>Blur</h2>            [heading] [text] [image] [text] | [heading] [text] [image]
  <p>These filters ...     '---------- page.html#0 -------'  '---- page.html#1 ------'
  <img src="a.png">
  <p>A larger radius ...   a page is cut at the ends of paragraphs, before headings and
                           images if it can be, into pieces of at most so many words

What pages have around their content is left out (as in OBELICS, 2306.16527): navigation
and scripts by their elements (see `data.page`), banners because the same picture, by its
bytes, is on many pages, icons by their size.
"""

import collections
import dataclasses
import fnmatch
import functools
import hashlib
import io
import os
import posixpath
import re
import urllib.parse
from collections.abc import Iterator, Sequence

from mmjax.data import media, paths
from mmjax.data.document import BadDocument, Document, Image, Text
from mmjax.data.page import Block, read_page
from mmjax.data.page import pieces as cut_page
from mmjax.data.source import Record, Source, parse_range, ranges, share_of

_SUFFIXES = ('.html', '.htm', '.xhtml')
_FEW = 4  # pages that may share an image in a folder of any size
_PIECE = 16  # pages


@dataclasses.dataclass(frozen=True)
class Html(Source):
  """Folders of HTML pages (offline manuals, say); all text is trained.

  folders: one or several, 'DIR,DIR', also of buckets, see `data.paths`. 'DIR:PATTERN'
    takes only pages whose file name matches, as in 'opencv4/html:tutorial_*'.
  max_words, max_images: of a piece.
  min_images: pieces of fewer are left out.
  min_side, max_aspect: of an image, in pixels and as long : short side.
  max_share: an image on more than this share of a folder's pages is furniture.
  max_side: larger images are scaled down; None = files stay as they are.
  figures_first: the image of a figure before its caption, wherever that stands.
  test_share: of the pages; by a hash of the page's path, so no page is in both splits.
    A piece of a test page with an image that also stands on a training page is left
    out ('image_of_training'), so no image is either.
  """

  folders: str
  max_words: int = 256
  max_images: int = 4
  min_images: int = 1
  min_side: int = 48
  max_aspect: float = 8.0
  max_share: float = 0.02
  max_side: int | None = None
  figures_first: bool = False
  test_share: float = 0.1

  left_out = frozenset(
    ('image_remote', 'image_small', 'image_thin', 'image_furniture', 'long_text')
    + ('few_images', 'image_of_training')
  )

  def __post_init__(self):
    for name in ('max_words', 'max_images', 'max_side'):
      value = getattr(self, name)
      if value is not None and value < 1:
        raise ValueError(f'source html: {name}={value} must be >= 1')
    for name in ('max_share', 'test_share'):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(f'source html: {name}={getattr(self, name)} is no share')

  def fingerprint(self) -> str | None:
    """A hash of all pages and their images; None = they can't be read."""
    found = hashlib.sha256()
    try:
      for name, page in self._pages:
        found.update(repr((name, page.digest, page.blocks, page.images)).encode())
    except ValueError:
      return None
    return found.hexdigest()

  def pieces(self, splits: Sequence[str] | None = None) -> Sequence[str]:
    return ranges('pages', len(self._pages), _PIECE)

  def read(self, piece: str, splits: Sequence[str] | None = None) -> Iterator[Record]:
    """Cuts some pages, in the order of the pages' paths.

    What was left out comes as BadDocument: 'missing_file' and 'path_outside' for pages
    and images; 'not_html', 'image_unreadable', and those of `left_out`.
    """
    _, start, end = parse_range(piece)
    for name, page in self._pages[start:end]:
      split = self._split(page)
      if splits is not None and split not in splits:
        continue
      for error in page.bad:
        yield split, error
      for k, part in enumerate(cut_page(page.blocks, self.max_words, self.max_images)):
        where = f'{name}#{k}'
        long = [b for b in part if b.words > self.max_words]
        if long:
          error = BadDocument('long_text', f'{where}: {long[0].words} words in one')
          yield split, error
        elif sum(b.kind == 'image' for b in part) < self.min_images:
          yield split, BadDocument('few_images', where)
        elif split == 'test' and self._known & {page.images.get(b.value) for b in part}:
          yield split, BadDocument('image_of_training', where)
        else:
          yield split, Document(self._spans(part), where)

  @functools.cached_property
  def _known(self) -> set[str]:
    """Digests of the images of training pages."""
    training = (page for _, page in self._pages if self._split(page) == 'train')
    return {digest for page in training for digest in page.images.values()}

  def _split(self, page: 'Page') -> str:
    return 'test' if share_of(page.path) < self.test_share else 'train'

  def _spans(self, piece: Sequence[Block]) -> tuple[Text | Image, ...]:
    spans, lines = [], []
    for block in [*piece, None]:
      if block is not None and block.kind != 'image':
        lines.append(block.value)
        continue
      if lines:
        spans.append(Text('\n'.join(lines), True))
        lines = []
      if block is not None:
        spans.append(Image(shrink(paths.read(block.value), self.max_side)))
    return tuple(spans)

  @functools.cached_property
  def _pages(self) -> list[tuple[str, 'Page']]:
    """(name, page) of all folders. Images that were left out are no blocks any more."""
    roots = []
    for entry in self.folders.split(','):
      folder, pattern = re.fullmatch(r'((?:\w+://)?[^:]*):?(.*)', entry).groups()
      if not paths.is_dir(folder):
        raise ValueError(f'source html: no folder {folder!r}')
      root = folder.rstrip('/') if paths.scheme(folder) else os.path.realpath(folder)
      roots.append((root, pattern or '*'))
    common = os.path.commonpath([_place(root) for root, _ in roots])
    found = []
    for root, pattern in roots:
      pages = read_folder(root, pattern, self)
      if not pages:
        raise ValueError(f'source html: no page {pattern!r} in {root!r}')
      inside = os.path.relpath(_place(root), common)
      found += [(os.path.normpath(f'{inside}/{page.path}'), page) for page in pages]
    return found


@dataclasses.dataclass(frozen=True)
class Page:
  """A page as read.

  path: in the folder; digest: of the file; blocks: text, and images by their files;
  bad: what was left out; images: digests by file.
  """

  path: str
  digest: str
  blocks: list[Block]
  bad: list[BadDocument]
  images: dict[str, str] = dataclasses.field(default_factory=dict)


def _place(root: str) -> str:
  return f'/{root}' if paths.scheme(root) else root


def read_folder(root: str, pattern: str, rules: Html) -> list[Page]:
  """All pages under a folder, sorted by path; image blocks hold paths of good files."""
  pages, pictures, on_pages = [], {}, collections.Counter()
  for path in sorted(paths.files(root)):
    name = os.path.basename(path)
    if not name.lower().endswith(_SUFFIXES) or not fnmatch.fnmatch(name, pattern):
      continue
    bad = []
    try:
      content = _read(root, paths.inside(root, path))
      blocks = read_page(content, rules.figures_first)
    except BadDocument as error:
      content, blocks = b'', []
      bad.append(BadDocument(error.reason, f'{path}: {error.message}'))
    kept = []
    for block in blocks:
      if block.kind != 'image':
        kept.append(block)
        continue
      try:
        file = _linked(root, os.path.dirname(path), block.value)
        if file not in pictures:
          pictures[file] = _picture(_read(root, file))
        kept.append(Block('image', file))
      except BadDocument as error:
        bad.append(BadDocument(error.reason, f'{path}: {error.message}'))
    pages.append(Page(path, hashlib.sha256(content).hexdigest(), kept, bad))
    hashes = {pictures[b.value][0] for b in kept if b.kind == 'image'}
    on_pages.update(hashes)

  most = max(_FEW, rules.max_share * len(pages))
  for page in pages:
    kept = []
    for block in page.blocks:
      reason = ''
      if block.kind == 'image':
        digest, size = pictures[block.value]
        reason = _wrong(size, rules) or ('furniture' if on_pages[digest] > most else '')
      if reason:
        name = block.value.removeprefix(f'{root}/')
        page.bad.append(BadDocument(f'image_{reason}', f'{page.path}: {name}'))
      else:
        kept.append(block)
        if block.kind == 'image':
          page.images[block.value] = digest
    page.blocks[:] = kept
  return pages


def _linked(root: str, folder: str, link: str) -> str:
  """The file that a link of a page in `folder` means.

  Raises:
    BadDocument: 'image_remote' or 'path_outside'.
  """
  if re.match(r'(\w[\w+.-]*:|//)', link):
    raise BadDocument('image_remote', link[:60])
  link = urllib.parse.unquote(re.split('[?#]', link)[0])
  return paths.inside(root, posixpath.join(folder, link))


def _read(root: str, file: str) -> bytes:
  try:
    if paths.is_file(file):
      return paths.read(file)
    why = ''
  except (OSError, ValueError) as error:
    why = f': {error}'
  raise BadDocument('missing_file', f'{file.removeprefix(f"{root}/")!a}{why}')


def _picture(content: bytes) -> tuple[str, tuple[int, int] | None]:
  """(hash of a file, size as its header says); no size if it is no image."""
  try:
    size = media.image_size(content)
  except BadDocument:
    size = None
  return hashlib.sha256(content).hexdigest(), size


def _wrong(size: tuple[int, int] | None, rules: Html) -> str:
  if size is None:
    return 'unreadable'
  if min(size) < rules.min_side:
    return 'small'
  return 'thin' if max(size) > rules.max_aspect * min(size) else ''


def shrink(content: bytes, max_side: int | None) -> bytes:
  """An image file with no side above `max_side`; smaller ones as they are.

  Raises:
    BadDocument: see `media.decode_image`.
  """
  import PIL.Image

  if max_side is None or max(media.image_size(content)) <= max_side:
    return content
  image = PIL.Image.fromarray(media.decode_image(content))
  image.thumbnail((max_side, max_side), PIL.Image.Resampling.BICUBIC)
  lossy = content[:2] == b'\xff\xd8'  # JPEG's first bytes
  out = io.BytesIO()
  image.save(
    out, *(('JPEG',) if lossy else ('PNG',)), **({'quality': 90} if lossy else {})
  )
  return out.getvalue()
