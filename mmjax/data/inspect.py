"""Shows what the model sees: the packed batch of a step, as a page to click in.

  python -m mmjax.data.inspect --config=configs/quickstart.py --step=7 --out=page.html
  python -m mmjax.data.inspect --config=configs/quickstart.py --stats --steps=50

The config and what is set over it are as train.py takes them; the dataset has to be
prepared. Exit code 2 = something in the command, the config or the data doesn't fit.
A script of the rank of train.py, so that it alone in `data` may import `train` and
`eval`, and nothing may import it (tests/test_layout.py).
"""

import contextlib
import itertools
import pathlib
import sys

import jax
from absl import app, flags, logging

from mmjax import files
from mmjax.eval import batch_page, batch_stats
from mmjax.train import build, datasets
from mmjax.train import config as config_lib

_STEP = flags.DEFINE_integer('step', 0, 'Which step of the run.')
_OUT = flags.DEFINE_string('out', 'batch.html', 'Where the page goes.')
_ROWS = flags.DEFINE_integer('rows', 8, 'At most so many rows are shown.')
_STATS = flags.DEFINE_boolean('stats', False, 'Also count over --steps steps.')
_STEPS = flags.DEFINE_integer('steps', 20, 'Steps that --stats counts over.')


def inspect(config, name, out, step=0, rows=8, steps=0) -> str:
  """Writes the page of a step to `out`; returns what to print.

  Args:
    config: resolved and checked; name: of it, for the title.
    rows: at most so many are shown; steps: that are counted, 0 = no numbers.

  Raises:
    ValueError: a number that makes no sense, no dataset, or what a run's parts raise.
  """
  for flag, value, least in (('step', step, 0), ('rows', rows, 1), ('steps', steps, 0)):
    if value < least:
      raise ValueError(f'--{flag}={value}: must be at least {least}')
  dataset = datasets.load(config)
  rules = build.rules_of(config)
  budget = build.budget_of(config, rules)
  model = build.model_of(config, dataset.tokenizer.vocab_size, budget)
  pipeline = build.pipeline_of(config, dataset, model, budget, rules)
  with contextlib.closing(pipeline.iterate(step)) as loading:
    loaded = list(itertools.islice(loading, max(steps, 1)))
  batch = jax.device_put(loaded[0].batch)
  batch, tags = jax.device_get((batch, model.attention_tags(batch)))
  stats = batch_stats.gather(loaded, pipeline.plan.dropped) if steps else None
  title = f'{name} · {config.model.name} · step {step:,}'
  page = batch_page.page(
    batch, tags, dataset.tokenizer, model.slots, title=title, rows=rows, stats=stats
  )
  out.parent.mkdir(parents=True, exist_ok=True)
  files.replace(out, page)
  return f'{stats.table()}\n{out}' if stats else str(out)


def main(argv):
  logging.set_verbosity(logging.WARNING)
  try:
    if len(argv) > 1:
      sys.exit(config_lib.refuse(ValueError(f'unknown argument {argv[1]!r}')))
    name, out = config_lib.spec_name(sys.argv), pathlib.Path(_OUT.value)
    steps = _STEPS.value if _STATS.value else 0
    print(inspect(flags.FLAGS.config, name, out, _STEP.value, _ROWS.value, steps))
  except (OSError, ValueError) as error:
    if isinstance(error, ValueError) and not config_lib.is_ours(error):
      raise
    sys.exit(config_lib.refuse(error))


if __name__ == '__main__':
  app.run(main, flags_parser=config_lib.parse_flags)
