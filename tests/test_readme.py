"""What the README shows, runs."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BLOCKS = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.S)


@pytest.mark.parametrize('block', BLOCKS, ids=range(len(BLOCKS)))
def test_python_of_the_readme_runs(block):
  names = {}
  exec(compile(block, 'README.md', 'exec'), names)
  result = names['y'] if 'y' in names else names['hidden']
  assert result.ndim >= 3


def test_every_config_is_in_the_table():
  readme = (ROOT / 'README.md').read_text()
  for path in (ROOT / 'configs').glob('*.py'):
    assert f'configs/{path.name}' in readme, path.name


def test_files_that_are_linked_exist():
  readme = (ROOT / 'README.md').read_text()
  links = re.findall(r'\]\(([^)#:]+)\)', readme)
  assert links
  for link in links:
    assert (ROOT / link).exists(), link
