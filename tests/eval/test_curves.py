import io
import json

import numpy as np
import PIL.Image
import pytest

from mmjax.eval import curves

RECORDS = [
  *({'step': s, 'train/loss': 2 / s, 'train/accuracy': 1 - 1 / s} for s in range(1, 100)),
  {'step': 50, 'eval/vqa/accuracy': 0.6, 'eval/vqa/accuracy_shuffled': 0.5},
  {'step': 99, 'eval/vqa/accuracy': 0.9, 'eval/vqa/accuracy_shuffled': 0.5},
]


def _pixels(png):
  return np.asarray(PIL.Image.open(io.BytesIO(png)).convert('RGB'))


def test_the_same_records_give_the_same_picture():
  png = curves.draw(RECORDS, 'a run')
  assert png == curves.draw(RECORDS, 'a run')
  assert (_pixels(png) != 255).any(axis=-1).mean() > 0.01
  assert png != curves.draw(RECORDS[:-1], 'a run')


def test_a_run_without_anything_logged_still_has_a_picture():
  assert _pixels(curves.draw([])).shape == (480, 1200, 3)


def test_write_reads_the_log_and_forgives_a_cut_last_line(tmp_path):
  log = ''.join(json.dumps(r) + '\n' for r in RECORDS)
  (tmp_path / 'metrics.jsonl').write_text(log + '{"step": 1')
  path = curves.write(tmp_path)
  assert path.read_bytes() == curves.draw(RECORDS)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['curves.png', 'metrics.jsonl']


@pytest.mark.parametrize('line', ['{"step"', '[]', '{"loss": 1}'])
def test_a_damaged_line_is_told_with_its_number(tmp_path, line):
  (tmp_path / 'metrics.jsonl').write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
  with pytest.raises(ValueError, match='metrics.jsonl, line 2: not a record'):
    curves.write(tmp_path)


def test_series_is_ordered_and_keeps_the_last_of_a_step():
  records = [
    {'step': 20, 'x': 1.0},
    {'step': 10, 'x': 3},
    {'step': 30, 'y': 1.0},
    {'step': 40, 'x': float('nan')},
    {'step': 20, 'x': 2.0},  # logged again after a resume
  ]
  steps, values = curves.series(records, 'x')
  assert steps.tolist() == [10, 20]
  assert values.tolist() == [3.0, 2.0]


def test_smooth_against_a_loop():
  values = np.random.default_rng(0).normal(size=23)
  want = []
  for i in range(23):
    reach = min(i, 22 - i, 5 // 2)
    want.append(values[i - reach : i + reach + 1].mean())
  np.testing.assert_allclose(curves.smooth(values, 5), want, rtol=1e-12)


def test_retrieval_has_its_curves():
  records = [{'step': 5, 'train/accuracy_text': 0.5}]
  for key in ('image_to_text/r1', 'text_to_image/r10'):
    more = [*records, {'step': 5, f'eval/retrieval/{key}': 0.25}]
    assert curves.draw(more) != curves.draw(records)
    records = more
