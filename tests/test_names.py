import pytest

from mmjax.names import closest, pick


def test_the_closest_name_and_all_there_are():
  table = {'unified': 1, 'flamingo': 2}
  assert closest('unifed', table) == (
    "; did you mean 'unified'? (choices: flamingo, unified)"
  )
  assert closest('x', table) == ' (choices: flamingo, unified)'
  assert closest(3, (1, 30)) == "; did you mean '30'? (choices: 1, 30)"
  assert closest('x', iter(())) == ' (choices: )'


def test_an_entry_by_its_name():
  table = {'unified': 1, 'flamingo': None}
  assert pick('model', 'unified', table) == 1 and pick('model', 'flamingo', table) is None
  with pytest.raises(ValueError, match="^unknown model 'unifed'; did you mean 'unified'"):
    pick('model', 'unifed', table)
