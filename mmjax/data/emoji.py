"""Emoji as pairs of picture and name: two sets of drawings, 28 languages.

  train/1F600   Image(Twitter's drawing)   Text('grinning face')
  test/1F600    Image(Google's drawing)    Text('grinning face')

So a model is tested on drawings of a hand that it has never seen: 3,786 of each. The
packages are on npm (emoji-datasource 16.0.0: MIT, the drawings CC-BY 4.0 and Apache 2.0;
emojibase-data 17.0.0: MIT, names and keywords of Unicode's CLDR). Nothing is downloaded
here; this puts them under data/npm/node_modules:

  npm install --prefix data/npm emoji-datasource-twitter@16.0.0 \\
      emoji-datasource-google@16.0.0 emojibase-data@17.0.0

(or `npm pack` each, and unpack it as DIR/NAME-VERSION/package).
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from mmjax.data.document import BadDocument, Document, Image, Text
from mmjax.data.source import Record, Source, parse_range, ranges
from mmjax.names import closest

VENDORS = {'train': 'twitter', 'test': 'google'}  # by split
NAMES = 'emojibase-data'
_PIECE = 128  # emoji, with their skin tones


@dataclasses.dataclass(frozen=True)
class Emoji(Source):
  """The emoji that both vendors draw and that have a name.

  directory: where the packages are.
  language: of the names that are the documents' texts, e.g. 'fr'.

  A document's meta has 'label' (its subcategory in words, for classification),
  'category', 'emoji' and, for each language there is, 'name/<language>'.
  """

  directory: str
  language: str = 'en'

  def fingerprint(self) -> str | None:
    """The packages' versions; None, if they can't be read."""
    try:
      packages = [self._package(name) for name in (*self._sets().values(), NAMES)]
      versions = [_json(p / 'package.json')['version'] for p in packages]
    except (ValueError, KeyError):
      return None
    return 'emoji ' + ' '.join(map(str, versions))

  def pieces(self, splits: Sequence[str] | None = None) -> Sequence[str]:
    names = self._names
    if self.language not in names:
      raise ValueError(
        f'source emoji: no language {self.language!r}{closest(self.language, names)}'
      )
    return [
      piece
      for split in self._sets()
      if splits is None or split in splits
      for piece in ranges(split, len(self._entries(split)), _PIECE)
    ]

  def read(self, piece: str, splits: Sequence[str] | None = None) -> Iterator[Record]:
    split, start, end = parse_range(piece)
    names = self._names
    pictures = self._package(self._sets()[split]) / 'img' / VENDORS[split] / '64'
    for entry in self._entries(split)[start:end]:
      for one in (entry, *entry.get('skin_variations', {}).values()):
        code = one['unified']
        name = names[self.language].get(_key(code))
        if not name or not one.get(f'has_img_{VENDORS[split]}', True):
          continue
        meta = {
          'label': entry['subcategory'].replace('-', ' '),
          'category': entry['category'],
          'emoji': ''.join(chr(int(part, 16)) for part in code.split('-')),
        }
        meta |= {f'name/{k}': n[_key(code)] for k, n in names.items() if _key(code) in n}
        yield split, _document(pictures / one['image'], name, f'{split}/{code}', meta)

  def _sets(self) -> dict[str, str]:
    return {split: f'emoji-datasource-{vendor}' for split, vendor in VENDORS.items()}

  def _package(self, name: str) -> pathlib.Path:
    """The folder of a package.

    Raises:
      ValueError: it isn't there, with how to get it.
    """
    root = pathlib.Path(self.directory)
    places = [root / 'node_modules' / name, root / name]
    places += sorted(p / 'package' for p in root.glob(f'{name}-[0-9]*'))
    for place in places:
      if (place / 'package.json').is_file():
        return place
    raise ValueError(
      f'source emoji: no package {name} in {root}; npm install --prefix {root} {name}'
    )

  def _entries(self, split: str) -> list[dict[str, Any]]:
    return _json(self._package(self._sets()[split]) / 'emoji.json')

  @functools.cached_property
  def _names(self) -> dict[str, dict[str, str]]:
    """By language: from an emoji's code to its name."""
    names = {}
    for file in sorted(self._package(NAMES).glob('*/data.json')):
      known = names[file.parent.name] = {}
      for entry in _json(file):
        for one in (entry, *entry.get('skins', ())):
          known[_key(one['hexcode'])] = one['label']
    return names


def _key(code: str) -> str:
  """A code without the mark that asks for colours, which some leave out."""
  return '-'.join(part for part in code.split('-') if part != 'FE0F')


def _document(file, name, id_, meta) -> Document | BadDocument:
  try:
    picture = file.read_bytes()
  except OSError as error:
    return BadDocument('missing_file', f'{id_}: {file}: {error.strerror}')
  return Document((Image(picture), Text(name, True)), id_, meta)


def _json(file: pathlib.Path):
  try:
    return json.loads(file.read_text(encoding='utf-8'))
  except (OSError, ValueError) as error:
    raise ValueError(f'source emoji: {file} can not be read: {error}') from None
