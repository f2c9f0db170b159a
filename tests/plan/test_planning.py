"""From a config to a plan, as far as it goes without a compiler."""

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest

from mmjax.plan import compile as compile_lib
from mmjax.plan import report, search, topology
from mmjax.plan.chips import GIB
from mmjax.plan.readout import Op, Readout
from mmjax.plan.wire import Collective
from mmjax.train import build
from mmjax.train import config as config_lib

ROOT = pathlib.Path(__file__).parents[2]
V5E = topology.parse('v5e:2x2')


def config(name='unified_8b', **data):
  made = config_lib.load(f'{ROOT}/configs/{name}.py:tiny')
  made.data.update(data)
  return made


READ = Readout(
  chip=V5E.chip,
  num_devices=4,
  hbm_peak=10 * GIB,
  hbm={'params': 3 * GIB, 'optimizer': 2 * GIB, 'batch': GIB, 'temporaries': 4 * GIB},
  flops=3 * 10**12,
  hbm_bytes=10**9,
  collectives=(
    Collective('all-gather', ('fsdp',), 500, 0.5, True, 4, 'ag', 'jit(step)/ag'),
    Collective('all-reduce', ('data', 'fsdp'), 700, 0.25, False, 1, 'ar', ''),
  ),
  compute_seconds=0.75,
  ops=tuple(Op(f'op{i}', f'a/b/c/d/e/f{i}', 0.1, 2, 7, 8) for i in range(60)),
  kernels=60,
)
PLAN = compile_lib.Plan(
  topology=V5E,
  mesh={'data': 2, 'fsdp': 2},
  rows=8,
  tokens=4096,
  held={'params': 2 * GIB, 'optimizer': 2 * GIB, 'gradients': GIB, 'batch': GIB},
  model_flops=2 * 10**12,
  readout=READ,
)


def test_parts_of_the_memory_add_up_to_the_peak():
  parts = report.parts(PLAN)
  assert sum(parts.values()) == PLAN.peak == 10 * GIB
  assert parts['tiling'] == GIB and parts['temporaries'] == 3 * GIB
  refused = dataclasses.replace(PLAN, readout=None, needed=20 * GIB)
  assert not refused.fits and refused.peak == 20 * GIB
  assert sum(report.parts(refused).values()) == 20 * GIB
  assert 'does not fit by 4.25 GiB; the largest part: temporaries' in report.text(refused)


def test_table_and_data_say_the_same():
  text, tree = report.text(PLAN), report.to_json(PLAN)
  assert json.loads(json.dumps(tree)) == tree
  assert tree['modelled']['seconds'] == pytest.approx(0.75 + 0.25)
  assert tree['modelled']['mfu'] == pytest.approx(2e12 / 1.0 / 197e12)
  assert tree['modelled']['tokens_per_second'] == pytest.approx(4096)
  assert tree['wire'] == {'all-reduce over data+fsdp': 700, 'all-gather over fsdp': 500}
  assert tree['wire_bytes'] == 1200 and len(tree['ops']) == 10
  for said in (
    '10.00  of 15.75: 5.75 left',
    'data 2 x fsdp 2',
    'not measured',
    'op9  b/',
  ):
    assert said in text
  assert 'op10' not in text


def test_what_is_kept_is_what_was_read():
  kept = json.loads(json.dumps(compile_lib._to_json(READ, None)))
  again, needed = compile_lib._from_json(kept)
  assert needed is None and again == dataclasses.replace(READ, ops=READ.ops[:40])
  assert compile_lib._from_json(json.loads('{"needed": 7}')) == (None, 7)


def test_vocabulary_is_known_without_a_file():
  assert compile_lib.vocabulary(config()) == 640
  assert compile_lib.vocabulary(config(vocab_size=None)) == 512
  assert compile_lib.vocabulary(config(vocab_size=None, tokenizer='bytes')) == 257
  with pytest.raises(ValueError, match='config.data.vocab_size is not set'):
    compile_lib.vocabulary(config(vocab_size=None, tokenizer='a/tokenizer.json'))


def test_tables_have_rows_to_spare():
  made = config()
  budget = build.budget_of(made, build.rules_of(made))
  assert build.model_of(made, 512, budget).vocab_size == 640
  with pytest.raises(ValueError, match='vocab_size = 640: the tokenizer has 641 ids'):
    build.model_of(made, 641, budget)


def test_lowers_for_devices_that_are_there_too():
  made = config()
  made.sharding.mesh.update(data=2, fsdp=2)
  parts, lowered = compile_lib.lower(made, jax.devices()[:4])
  assert 'sharding' in lowered.as_text()
  held = compile_lib.held(parts.abstract.params)
  whole = sum(x.size * 4 for x in jax.tree.leaves(parts.abstract.params))
  assert held == whole // 2
  # 6 x weights x slots, less the patches' own gradient, more attention.
  needed, D, V = compile_lib.needed_flops(made, parts), 64, 640
  slots, targets, patches = 4 * 512, 4 * 80, 4 * 256
  layers = 2 * (2 * D * D + 2 * D * 32 + 3 * D * 128)
  attention = 3 * 2 * 2 * 4 * 512**2 * 64 * 2 // 2
  want = 6 * (slots * layers + targets * V * D) + 4 * patches * 192 * D + attention
  assert needed == want


class TestChoices:
  """4 devices, 4 rows."""

  def test_all_divide(self):
    made = config()
    every = list(search.choices(made, V5E))
    assert len(set(every)) == len(every)
    for choice in every:
      assert choice.data * choice.fsdp * choice.tensor == 4
      assert 4 % (choice.data * choice.fsdp * choice.accumulate) == 0
    assert {c.tensor for c in every} == {1, 2, 4}
    made.sharding.preset = 'dp'
    assert {c.tensor for c in search.choices(made, V5E)} == {1}

  def test_are_told_as_flags(self):
    made = config()
    choice = search.Choice(2, 1, 2, 'dots', 2)
    changed = choice.apply(made)
    assert changed.sharding.preset == 'fsdp+tensor' and changed.model.remat == 'dots'
    flags = choice.flags(made)
    for flag in ('--config.model.remat=dots', '--config.train.accumulate=2',
                 '--config.sharding.mesh.tensor=2'):  # fmt: skip
      assert flag in flags
    config_lib.check(changed)

  def test_frozen_encoders_keep_nothing(self):
    made = config('flamingo_3b')
    changed = search.Choice(4, 1, 1, 'none', 1).apply(made)
    assert changed.model.lm.remat == 'none' and changed.model.resampler.remat == 'none'
    made.model.vision.remat = 'full'
    assert search.Choice(4, 1, 1, 'none', 1).apply(made).model.vision.remat == 'full'


class TestSearch:
  """Guesses without a compiler: (fsdp, remat) -> what it would say."""

  REMAT = {'none': (20, 1.0), 'dots': (5, 1.1), 'full': (2, 1.4)}

  def guess(self, fsdp, remat):
    held, seconds = self.REMAT[remat]
    choice = search.Choice(256 // fsdp, fsdp, 1, remat, 1)
    return search.Guess(choice, GIB * (held + 64 / fsdp), seconds + fsdp / 1e3)

  def truth(self, guess):
    """'dots' is slower than guessed and larger; 'full' is as guessed."""
    worse = 1.5 if guess.choice.remat == 'dots' else 1.0
    fits = guess.bytes * worse < 16 * GIB
    return search.Found(
      '', fits, guess.bytes * worse, guess.seconds * worse if fits else math.inf, 0.5, 0
    )

  def test_finds_the_best_and_leaves_out_what_cannot_win(self):
    every = [self.guess(2**k, r) for k in range(1, 9) for r in self.REMAT]
    queue, now = [g for g in every if g.bytes <= 16 * GIB], self.guess(64, 'full')
    queue.remove(now)
    seen = [(now, self.truth(now))]
    while one := search.following(queue, seen, 16 * GIB):
      queue.remove(one)
      seen.append((one, self.truth(one)))
    assert seen[1][0].choice.remat == 'dots'
    best = min(found.seconds for _, found in seen)
    assert best == min(self.truth(g).seconds for g in every if self.truth(g).fits)
    assert len(queue) > 5

  def test_what_was_found_corrects_what_is_near(self):
    near, far = self.guess(32, 'dots'), self.guess(64, 'full')
    one = self.guess(16, 'dots')
    assert search.corrected(near, []) == near
    refused = search.Found('', False, 2 * one.bytes, math.inf, 0, 0)
    assert search.corrected(near, [(one, refused)]).bytes == 2 * near.bytes
    assert search.corrected(near, [(one, refused)]).seconds == near.seconds
    seen = [(one, self.truth(one)), (far, self.truth(far))]
    assert search.corrected(near, seen).seconds == pytest.approx(1.5 * near.seconds)
    assert search.corrected(self.guess(2, 'full'), seen).seconds == pytest.approx(
      self.guess(2, 'full').seconds
    )

  def test_begins_with_what_the_config_says(self):
    made = config()
    now = search.present(made, V5E)
    assert now == search.Choice(1, 4, 1, made.model.remat, 1)
    assert 'mesh' not in now.flags(made) or '-1' not in now.flags(made)
    assert 'offload' not in {c.remat for c in search.choices(made, V5E)}


def test_nearest_change_that_fits(monkeypatch):
  """Where the truth is some thousand times what is guessed of so small a model."""
  made, tried = config(rows=8), []
  made.sharding.mesh.update(data=2, fsdp=2)
  made.model.remat = 'none'
  monkeypatch.setattr(search.topology_lib, 'devices', lambda t: jax.devices()[:4])
  guess = search.Guesser(made, V5E)
  factor = 20 * GIB / guess(search.present(made, V5E)).bytes

  def plan(config, topology, cache):
    tried.append(search.present(config, topology))
    more = 10 if len(tried) == 1 else 1  # the first one takes more than it should
    read = dataclasses.replace(READ, hbm_peak=more * factor * guess(tried[-1]).bytes)
    return dataclasses.replace(PLAN, readout=read)

  monkeypatch.setattr(search.compile_lib, 'plan', plan)
  said = search.nearest(made, V5E, None, 20 * GIB)
  assert said.startswith('nearest change that fits (') and len(tried) == 2
  for key in ('remat', 'accumulate'):
    value = getattr(tried[-1], key)
    assert value == getattr(search.present(made, V5E), key) or f'{key}={value}' in said
  assert [c.remat == 'full' or c.accumulate > 1 for c in tried] == [True] * 2
  tried.clear()
  said = search.nearest(made, V5E, None, 20 * GIB, tries=1)
  assert said == '1 nearest changes were compiled and do not fit either'
  said = search.nearest(made, V5E, None, 9**9 * GIB)
  assert said.startswith('no mesh, remat or microbatches fit it on v5e:2x2: more chips')


@pytest.mark.parametrize(
  ('flags', 'said'),
  [
    (['--topology=v5e:3x3'], "error: v5e has no slice of shape '3x3'"),
    (['--topology=v5e:4x4', 'more'], "error: unknown argument 'more'"),
  ],
)
def test_what_is_wrong_is_one_line(flags, said):
  spec = f'--config={ROOT}/configs/unified_8b.py:tiny'
  command = [sys.executable, '-m', 'mmjax.plan', spec, *flags]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 2
  assert done.stderr.startswith(said) and done.stderr.count('\n') == 1
