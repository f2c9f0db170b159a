import json
import os
import pathlib

import numpy as np
import pytest

from mmjax.data import media, sources
from mmjax.data.document import BadDocument
from mmjax.data.emoji import Emoji, _key


@pytest.fixture
def packages(tmp_path):
  """Three packages in little: a plain emoji, one with two skins, one without a name."""
  entries = [
    dict(unified='1F600', image='1f600.png', category='Faces', subcategory='smiling'),
    dict(
      unified='261D-FE0F', image='261d-fe0f.png', category='Body', subcategory='hand',
      skin_variations={'1F3FB': dict(unified='261D-1F3FB', image='261d-1f3fb.png')},
    ),
    dict(unified='1F4A9', image='1f4a9.png', category='Faces', subcategory='face'),
  ]  # fmt: skip
  picture = np.zeros((4, 4, 3), np.uint8)
  for vendor in ('twitter', 'google'):
    root = tmp_path / 'node_modules' / f'emoji-datasource-{vendor}'
    folder = root / 'img' / vendor / '64'
    folder.mkdir(parents=True)
    (root / 'package.json').write_text(json.dumps({'version': '16.0.0'}))
    (root / 'emoji.json').write_text(json.dumps(entries))
    import PIL.Image

    for name in ('1f600', '261d-fe0f', '261d-1f3fb', '1f4a9'):
      PIL.Image.fromarray(picture).save(folder / f'{name}.png')
  names = tmp_path / 'emojibase-data-17.0.0' / 'package'
  for language, words in (('en', ('grin', 'point', 'dark')), ('fr', ('rire', 'doigt'))):
    (names / language).mkdir(parents=True)
    skins = [{'hexcode': '261D-1F3FB', 'label': word} for word in words[2:]]
    (names / language / 'data.json').write_text(json.dumps([
      {'hexcode': '1F600', 'label': words[0]},
      {'hexcode': '261D', 'label': words[1], 'skins': skins},
    ]))  # fmt: skip
  (names / 'package.json').write_text(json.dumps({'version': '17.0.0'}))
  return tmp_path


def test_pairs_of_both_vendors_by_split(packages):
  source = sources.build(f'emoji:{packages}')
  found = list(source.records())
  assert [split for split, _ in found] == ['train'] * 3 + ['test'] * 3
  assert [d.id for _, d in found[:3]] == ['train/1F600', 'train/261D-FE0F',
                                         'train/261D-1F3FB']  # fmt: skip
  first = found[0][1]
  assert [first.spans[1].text, first.spans[1].trained] == ['grin', True]
  assert first.meta == {'label': 'smiling', 'category': 'Faces', 'emoji': '😀',
                        'name/en': 'grin', 'name/fr': 'rire'}  # fmt: skip
  assert 'name/fr' not in found[2][1].meta  # that skin has no French name
  assert media.pixels(first.spans[0]).shape == (4, 4, 3)
  assert [s for s, _ in source.records(['test'])] == ['test'] * 3
  assert source.fingerprint() == 'emoji 16.0.0 16.0.0 17.0.0'
  assert source.total() is None


def test_another_language(packages):
  texts = [d.spans[1].text for _, d in Emoji(str(packages), 'fr').records(['test'])]
  assert texts == ['rire', 'doigt']


def test_what_is_missing_is_told(packages):
  with pytest.raises(ValueError, match="no language 'rf' .choices: en, fr"):
    list(Emoji(str(packages), 'rf').records())
  twitter = packages / 'node_modules' / 'emoji-datasource-twitter'
  (twitter / 'img' / 'twitter' / '64' / '1f600.png').unlink()
  split, bad = next(Emoji(str(packages)).records())
  assert isinstance(bad, BadDocument) and bad.reason == 'missing_file'
  (twitter / 'emoji.json').write_text('[')
  with pytest.raises(ValueError, match='emoji.json can not be read'):
    list(Emoji(str(packages)).records())
  (twitter / 'package.json').unlink()
  with pytest.raises(ValueError, match='no package emoji-datasource-twitter in .* npm'):
    list(Emoji(str(packages)).records())
  assert Emoji(str(packages)).fingerprint() is None


def test_the_real_ones():
  root = pathlib.Path(os.environ.get('REFDATA', '')) / 'npm'
  if 'REFDATA' not in os.environ or not root.is_dir():
    pytest.skip('the packages of `mmjax.data.emoji` are not in $REFDATA/npm')
  found = list(Emoji(str(root)).records())
  counts = {s: sum(split == s for split, _ in found) for s in ('train', 'test')}
  assert counts == {'train': 3786, 'test': 3786}
  languages = {k for _, d in found for k in d.meta if k.startswith('name/')}
  assert len(languages) == 28
  assert _key('261D-FE0F-20E3') == '261D-20E3'
