import importlib.util
import json
import pathlib

import pytest

PATH = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'table.py'


@pytest.fixture
def table():
  spec = importlib.util.spec_from_file_location('table', PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_prints_each_contestant_of_each_case(table, tmp_path, monkeypatch, capsys):
  row = {'seconds': 2.5, 'cpu_seconds': 4.75, 'mmjax_is_faster': 0.5}
  report = {
    'processor': 'Some',
    'fixed': {'mmjax': row, 'torch unlocked': {**row, 'peak_gb': 9.25}},
  }
  path = tmp_path / 'report.json'
  path.write_text('a line of something else\n' + json.dumps(report))
  monkeypatch.setattr('sys.argv', ['table.py', str(path)])
  table.main()
  first, *rest = capsys.readouterr().out.splitlines()
  assert first == 'processor: Some'
  rows = [line.split(' | ') for line in rest if line.startswith('|')]
  assert len({len(r) for r in rows[2:] + rows[:1]}) == 1
  assert rows[2][:3] == ['| mmjax', '2.5', '4.75']
  assert rows[3][0] == '| PyTorch, logits of all positions, MKL unlocked'
  assert '9.25' in rows[3] and '9.25' not in rows[2]
