from mmjax.names import closest


def test_the_closest_name_and_all_there_are():
  table = {'unified': 1, 'flamingo': 2}
  assert closest('unifed', table) == (
    "; did you mean 'unified'? (choices: flamingo, unified)"
  )
  assert closest('x', table) == ' (choices: flamingo, unified)'
  assert closest(3, (1, 30)) == "; did you mean '30'? (choices: 1, 30)"
  assert closest('x', iter(())) == ' (choices: )'
