"""Shows what the model sees: the packed batch of a step, as a page to click in.

  python -m mmjax.data.inspect --config=configs/quickstart.py --step=7 --out=page.html
  python -m mmjax.data.inspect --config=configs/quickstart.py --stats --steps=50

The config, and --config.x.y=... over it, as train.py takes them; the dataset has to be
prepared. Exit code 2 = something in the command, the config or the data doesn't fit.

A script of the rank of train.py, so that it alone in `data` may import `train` and
`eval` (tests/test_layout.py); nothing imports it.
"""

import contextlib
import itertools
import pathlib
import sys

import jax
from absl import app, flags, logging

from mmjax.data import store
from mmjax.eval import batch_page, batch_stats, report
from mmjax.train import build
from mmjax.train import config as config_lib

_STEP = flags.DEFINE_integer('step', 0, 'Which step of the run.')
_OUT = flags.DEFINE_string('out', 'batch.html', 'Where the page goes.')
_ROWS = flags.DEFINE_integer('rows', 8, 'At most so many rows are shown.')
_STATS = flags.DEFINE_boolean('stats', False, 'Also count over --steps steps.')
_STEPS = flags.DEFINE_integer('steps', 20, 'Steps that --stats counts over.')


def inspect(config) -> str:
  """Writes the page; returns what to print.

  Raises:
    ValueError: a number that makes no sense, no dataset, or what the parts of a run
      raise; one line.
  """
  for flag, least in ((_STEP, 0), (_ROWS, 1), (_STEPS, 1)):
    if flag.value < least:
      raise ValueError(f'--{flag.name}={flag.value}: must be at least {least}')
  data, step = config.data, _STEP.value
  dataset = store.Dataset(data.path, data.split)
  rules = build.rules_of(config)
  budget = build.budget_of(config, rules)
  model = build.model_of(config, dataset.tokenizer.vocab_size, budget)
  pipeline = build.pipeline_of(config, dataset, model, budget, rules)
  with contextlib.closing(pipeline.iterate(step)) as steps:
    loaded = list(itertools.islice(steps, _STEPS.value if _STATS.value else 1))
  batch = jax.device_put(loaded[0].batch)
  batch, tags = jax.device_get((batch, model.attention_tags(batch)))
  stats = batch_stats.gather(loaded, pipeline.plan.dropped) if _STATS.value else None
  title = f'{config_lib.spec_name(sys.argv)} · {model.__class__.__name__} · step {step:,}'
  page = batch_page.page(
    batch, tags, dataset.tokenizer, model.slots,
    title=title, rows=_ROWS.value, stats=stats,
  )  # fmt: skip
  out = pathlib.Path(_OUT.value)
  out.parent.mkdir(parents=True, exist_ok=True)
  report.replace(out, page)
  return f'{stats.table()}\n{out}' if stats else str(out)


def main(argv):
  logging.set_verbosity(logging.WARNING)
  try:
    if len(argv) > 1:
      raise SystemExit(config_lib.refuse(ValueError(f'unknown argument {argv[1]!r}')))
    print(inspect(flags.FLAGS.config))
  except (OSError, ValueError) as error:
    if not config_lib.is_ours(error) and not isinstance(error, OSError):
      raise
    sys.exit(config_lib.refuse(error))


if __name__ == '__main__':
  app.run(main, flags_parser=config_lib.parse_flags)
