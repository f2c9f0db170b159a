"""The laws of the layout: who may import whom, and how long a file may be."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
CONTRACTS = {'batch', 'files', 'names', 'shape', 'sharding'}
MODEL_SIDE = [CONTRACTS, {'ops'}, {'nn'}, {'models'}, {'generate', 'interop'}]
USERS = {'train', 'eval', 'plan'}
# Of the rank of train.py: it may import anything, and nothing may import it.
SCRIPT = 'data/inspect.py'


def _allowed(room):
  """The rooms that a room may import from (itself included)."""
  if room == 'data':
    return {'data', 'batch', 'files', 'names', 'shape'}
  if room in USERS:
    return set.union(*MODEL_SIDE, USERS, {'data'})
  left = set()
  for rooms in MODEL_SIDE:
    left |= rooms
    if room in rooms:
      return left if rooms is CONTRACTS else (left - rooms) | {room}
  raise ValueError(f'mmjax/{room} is not in the layout; add it here on purpose')


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      if node.level:
        raise ValueError(f'{path}: relative import; write the full name')
      if node.module == 'mmjax':
        yield from (f'mmjax.{alias.name}' for alias in node.names)
      else:
        yield node.module
    elif isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)


def _modules():
  for path in sorted((ROOT / 'mmjax').rglob('*.py')):
    room = path.relative_to(ROOT / 'mmjax').parts[0].removesuffix('.py')
    if room != '__init__':
      yield room, path


def test_rooms_import_only_from_their_left():
  wrong = []
  count = 0
  for room, path in _modules():
    script = path == ROOT / 'mmjax' / SCRIPT
    for name in _imports(path):
      if name.split('.')[0] == 'mmjax' and name.count('.'):
        count += 1
        if not script and name.split('.')[1] not in _allowed(room):
          wrong.append(f'{path.relative_to(ROOT)} imports {name}')
  assert not wrong, wrong
  assert count > 20  # the walk found the project


def test_nothing_imports_the_script():
  assert (ROOT / 'mmjax' / SCRIPT).exists()
  name = 'mmjax.' + SCRIPT.removesuffix('.py').replace('/', '.')
  room = name.rpartition('.')[0]
  for path in [*ROOT.glob('*.py'), *(path for _, path in _modules())]:
    found = set(_imports(path))
    text = path.read_text()
    assert name not in found and f'from {room} import inspect' not in text, path


def test_ops_do_not_know_flax_and_nothing_needs_torch():
  wrong = []
  for room, path in _modules():
    for name in _imports(path):
      top = name.split('.')[0]
      if top in ('torch', 'transformers', 'tensorflow', 'pickle'):
        wrong.append(f'{path.relative_to(ROOT)} imports {name}')
      if room == 'ops' and top == 'flax':
        wrong.append(f'{path.relative_to(ROOT)} imports {name}')
  assert not wrong, wrong


def test_files_stay_short():
  scripts = {ROOT / 'train.py': 80, ROOT / 'eval.py': 80}
  scripts[ROOT / 'mmjax' / SCRIPT] = 80
  long = [
    f'{path.relative_to(ROOT)}: {lines} lines, at most {limit}'
    for path in [*(path for _, path in _modules()), *scripts]
    for limit in [scripts.get(path, 500)]
    if (lines := len(path.read_text().splitlines())) > limit
  ]
  assert not long, long
