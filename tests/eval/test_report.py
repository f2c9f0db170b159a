import base64
import html
import io
import json
import re

import numpy as np
import PIL.Image
import pytest

from mmjax.eval import report
from mmjax.eval.vqa import Result, summarise

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>\'"&'


def _records(count=100, right=0.9, shuffled=0.5, **fields):
  records = []
  for i in range(count):
    ok = i % 10 < 10 * right
    records.append(
      {
        'index': i // 2,
        'document': f'd{i // 2}',
        'turn': i % 2,
        'type': ('color', 'yes/no')[i % 2],
        'question': f'question {i}?',
        'answer': 'yes',
        'prediction': 'yes' if ok else 'no',
        'prediction_shuffled': 'yes' if (7 * i) % 10 < 10 * shuffled else 'no',
        'prediction_blank': 'no',
        'shuffled_from': (i // 2 + 1) % (count // 2),
        'correct': ok,
        **fields,
      }
    )
  return records


def _picture(index):
  return [np.full((8, 8, 3), (index * 37) % 256, np.uint8)]


def _result(records, pictures=_picture, published=()):
  return Result(summarise(records), records, dict(published), pictures)


def _page(records, **kwargs):
  return report.page(7, {'vqa': _result(records, **kwargs)})


def _cards(page):
  return re.findall(r'<article class="card( wrong)?".*?</article>', page, re.S)


def test_page_escapes_questions_answers_types_and_names():
  fields = ('question', 'answer', 'prediction', 'prediction_shuffled',
            'prediction_blank', 'document', 'type')  # fmt: skip
  for field in fields:
    page = _page(_records(4, **{field: EVIL}))
    assert '<script>alert' not in page
    assert '<img src=x' not in page
    assert EVIL not in page
    assert html.escape('<script>alert(') in page, field  # it is shown, as text
  page = _page(_records(4), published={EVIL: 0.5})
  assert '<script>alert' not in page
  assert page.count('<script>') == page.count('</script>') == 1


def test_page_needs_no_network():
  page = _page(_records())
  assert 'http' not in page
  assert not re.search(r'(src|href)\s*=', page)
  urls = re.findall(r'url\(([^)]*)\)', page)
  assert urls
  assert all(u.startswith('data:image/png;base64,') for u in urls)


def test_all_wrong_ones_come_first():
  records = _records(100, right=0.8)
  page = _page(records)
  kinds = _cards(page)
  assert kinds == [' wrong'] * 20 + [''] * 60
  for r in records:
    if not r['correct']:
      assert page.index(r['question']) < page.index('class="card" ')
  assert 'Not on this page: 0 wrong and 20 right ones' in page


def test_cards_are_capped_and_the_rest_is_told():
  page = _page(_records(1000, right=0.5))
  assert _cards(page) == [' wrong'] * 200 + [''] * 60
  assert 'Not on this page: 300 wrong and 440 right ones; all are in 7.json.' in page


def test_page_with_every_answer_says_nothing_of_others():
  assert 'Not on this page' not in _page(_records(10))


def test_big_pictures_keep_the_page_small_and_wrong_ones_are_kept():
  noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)

  def look(index):
    return [np.roll(noise, index, axis=0)]

  page = _page(_records(400, right=0.5), pictures=look)
  assert len(page) < 3_000_000
  kinds = _cards(page)
  assert 5 < len(kinds) < 100
  assert set(kinds) == {' wrong'}
  assert f'Not on this page: {200 - len(kinds)} wrong and 200 right ones' in page


def test_each_picture_is_on_the_page_once_as_the_png_it_was():
  page = _page(_records(20))
  data = re.findall(r'base64,([^)]*)\)', page)
  assert len(data) == len(set(data)) == 10  # two questions each
  shades = {
    int(np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(d)))).mean()) for d in data
  }
  assert shades == {(i * 37) % 256 for i in range(10)}


def test_two_evaluators_do_not_mix_up_their_pictures():
  other = _result(_records(4), pictures=lambda i: [np.full((8, 8, 3), 255, np.uint8)])
  page = report.page(1, {'a': _result(_records(4)), 'b': other})
  names = re.findall(r'\.(p\d+) \{ background-image', page)
  assert len(names) == len(set(names)) == 4


def test_page_without_pictures_or_types():
  page = _page(_records(10, type='', shuffled_from=None), pictures=None)
  assert 'class="pic ' not in page
  assert '<td>all</td>' in page


@pytest.mark.parametrize(
  'right, shuffled, looks, words',
  [
    (0.9, 0.5, True, 'Uses its images: +40.0 points over shuffled images'),
    (0.5, 0.5, False, 'No sign that it uses its images: +0.0 points'),
    (0.2, 0.7, False, 'Worse with its own images: -50.0 points'),
  ],
)
def test_verdict_in_plain_words(right, shuffled, looks, words):
  records = _records(200, right, shuffled)
  assert report.verdict(records)[0] == looks
  assert report.verdict(records)[1].startswith(words)
  page = _page(records)
  assert words in page
  assert ('class="verdict no"' in page) == (not looks)
  assert ('class="bar own no"' in page) == (not looks)


def test_published_numbers_stand_only_where_given():
  assert 'class="line"' not in _page(_records())
  page = _page(_records(), published={'majority': 0.373, 'CNN+LSTM': 0.876})
  assert page.count('class="line"') == 2
  assert 'CNN+LSTM<br>87.6\u00a0%' in page


def test_write_leaves_two_whole_files_and_read_gives_them_back(tmp_path):
  records = _records(10, question='größer? ' + EVIL)
  paths = report.write(tmp_path, 7, {'vqa': _result(records)})
  names = sorted(p.name for p in (tmp_path / 'eval').iterdir())
  assert names == ['7.html', '7.json']
  content = report.read(tmp_path, 7)
  assert content == json.loads(paths['json'].read_text())
  assert content['step'] == 7
  assert content['results']['vqa']['predictions'] == records
  assert content['results']['vqa']['metrics']['vqa/accuracy'] == 0.9
  assert report.read(tmp_path, 8) is None
  paths['json'].write_text('{"step": 7')
  with pytest.raises(ValueError, match='7.json is not an evaluation'):
    report.read(tmp_path, 7)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  report.write(tmp_path, 7, {'vqa': _result(_records(10))})
  before = (tmp_path / 'eval/7.json').read_text()

  def full(*_):
    raise OSError('no space left on device')

  monkeypatch.setattr(report.os, 'replace', full)
  with pytest.raises(OSError, match='no space'):
    report.write(tmp_path, 7, {'vqa': _result(_records(12))})
  assert (tmp_path / 'eval/7.json').read_text() == before
  assert sorted(p.name for p in (tmp_path / 'eval').iterdir()) == ['7.html', '7.json']


def test_same_predictions_compares_question_by_question(tmp_path):
  report.write(tmp_path, 7, {'vqa': _result(_records(10))})
  before = report.read(tmp_path, 7)
  same = report.same_predictions({'vqa': _result(_records(10))}, before)
  assert same == 'vqa: 10 questions in common, identical predictions'
  changed = _records(12)
  changed[3]['prediction_blank'] = 'maybe'
  told = report.same_predictions({'vqa': _result(changed)}, before)
  assert told == 'vqa: 10 questions in common, 1 of them differ'
