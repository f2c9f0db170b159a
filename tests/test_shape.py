import numpy as np
import pytest

from mmjax.shape import check


def test_returns_the_size_of_each_letter():
  sizes = check('B T D', np.zeros((2, 3, 4)), 'B T 3', np.zeros((2, 3, 3)))
  assert sizes == {'B': 2, 'T': 3, 'D': 4}


def test_scalar_has_no_axes():
  assert check('', np.zeros(())) == {}


@pytest.mark.parametrize(
  'pairs, message',
  [
    (('B T', np.zeros((2, 3, 4))), "expected axes 'B T', got shape (2, 3, 4)"),
    (('B T', np.zeros((2, 3)), 'B D', np.zeros((5, 3))), 'axis B is 2 and 5'),
    (('B 3', np.zeros((2, 4))), 'axis 3 is 3 and 4'),
    (('B B', np.zeros((2, 3))), 'axis B is 2 and 3'),
  ],
)
def test_mismatch_is_one_line_that_names_the_axis(pairs, message):
  with pytest.raises(ValueError) as error:
    check(*pairs)
  assert message in str(error.value)
  assert '\n' not in str(error.value)
