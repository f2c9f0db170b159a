import importlib.util
import json
import pathlib

import pytest

PATH = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'table.py'
ROW = {'seconds': 2.5, 'cpu_seconds': 4.75, 'mmjax_is_faster': 0.5}
REPORT = {
  'model': 'clip',
  'case': 'fixed',
  'processor': 'Some',
  'threads': 2,
  'malloc': 'glibc',
  'results': {'mmjax': ROW, 'torch unlocked': {**ROW, 'peak_gb': 9.25}},
}


@pytest.fixture
def run(tmp_path, monkeypatch):
  spec = importlib.util.spec_from_file_location('table', PATH)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  path = tmp_path / 'report.jsonl'
  path.write_text('a line of something else\n' + json.dumps(REPORT))

  def run(*into):
    monkeypatch.setattr('sys.argv', ['table.py', str(path), *map(str, into)])
    module.main()

  return run


def test_prints_each_contestant(run, capsys):
  run()
  first, *rest = capsys.readouterr().out.splitlines()
  assert first == 'clip, full rows; Some, 2 threads, glibc:'
  rows = [line.split(' | ') for line in rest if line.startswith('|')]
  assert len({len(r) for r in rows}) == 1
  assert rows[2][:3] == ['| mmjax', '2.5', '4.75']
  assert rows[3][0] == '| PyTorch, MKL unlocked'
  assert '9.25' in rows[3] and '9.25' not in rows[2]


def test_writes_between_the_marks(run, tmp_path):
  page = tmp_path / 'page.md'
  page.write_text('before\n<!-- train_step -->\nold\n<!-- /train_step -->\nafter\n')
  run(page)
  once = page.read_text()
  assert 'old' not in once and 'Some' in once
  assert once.startswith('before\n<!-- train_step -->\n')
  assert once.endswith('<!-- /train_step -->\nafter\n')
  run(page)
  assert page.read_text() == once


def test_refuses_a_page_without_marks(run, tmp_path):
  page = tmp_path / 'page.md'
  page.write_text('<!-- /train_step -->\n<!-- train_step -->\n')
  with pytest.raises(SystemExit, match='needs the lines'):
    run(page)


def test_runs_of_one_case_are_one_table(run, tmp_path, capsys):
  more = {**REPORT, 'results': {'mmjax-bf16': ROW}}
  other = {**more, 'malloc': 'jemalloc'}
  lines = map(json.dumps, (REPORT, other, more))
  (tmp_path / 'report.jsonl').write_text('\n'.join(lines))
  run()
  first, second = capsys.readouterr().out.split('clip, full rows')[1:]
  names = [line.split(' | ')[0] for line in first.splitlines() if line.startswith('| ')]
  assert names[2:] == ['| mmjax', '| PyTorch, MKL unlocked', '| mmjax, bfloat16']
  assert 'jemalloc' in second and 'peak' in first and 'peak' not in second
