"""A slow-down is told, noise isn't: the judgement, on a clock that the test moves."""

import dataclasses
import importlib.util
import itertools
import pathlib
import sys

import pytest

PATH = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'check.py'


@pytest.fixture(scope='module')
def check():
  spec = importlib.util.spec_from_file_location('check', PATH)
  sys.modules['check'] = module = importlib.util.module_from_spec(spec)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(PATH.parent)
    spec.loader.exec_module(module)
  return module


@dataclasses.dataclass
class Clock:
  now: float = 0.0

  def __call__(self):
    return self.now

  def run(self, *seconds):
    """A function that takes these seconds, call by call, over and over."""
    following = itertools.cycle(seconds)

    def run():
      self.now += next(following)

    return run


def cases(check, clock, **ours):
  for name, seconds in ours.items():
    yield check.Case(name, clock.run(*seconds), clock.run(0.2), share=2.0)


def test_what_lost_is_told(check):
  clock = Clock()
  recorded = {'same': 1.0, 'slower': 1.0, 'faster': 1.0, 'a little': 1.0}
  made = cases(
    check, clock, same=[0.4], slower=[0.52], faster=[0.1], **{'a little': [0.45]}
  )
  ratios, lost = check.judge(made, recorded, clock=clock)
  assert ratios == {'same': 1.0, 'slower': 1.3, 'faster': 0.25, 'a little': 1.125}
  assert lost == ['slower: 1.300 x its reference, it was 1.000: 30% slower']


def test_one_slow_turn_is_noise(check):
  clock = Clock()
  made = cases(check, clock, case=[0.4] * 5 + [9.0, 9.0])
  assert check.judge(made, {'case': 1.0}, clock=clock) == ({'case': 1.0}, [])


def test_who_lost_once_is_asked_again(check):
  """All of the first seven turns are slow, what comes after isn't."""
  clock, seconds = Clock(), [0.4, 0.4] + [0.8] * 7 + [0.4] * 100
  ratios, lost = check.judge(
    cases(check, clock, case=seconds), {'case': 1.0}, clock=clock
  )
  assert ratios == {'case': 1.0} and not lost


def test_short_runs_are_repeated(check):
  clock = Clock()
  case = check.Case('x', clock.run(0.001), clock.run(0.1))
  assert check.ratio(case, 3, clock) == pytest.approx(0.01)
  assert clock.now >= 6 * check.TURN


def test_a_case_without_a_record_fails(check):
  clock = Clock()
  _, lost = check.judge(cases(check, clock, new=[0.4]), {}, clock=clock)
  assert lost == ['new: 1.000 x its reference, and nothing is recorded']
