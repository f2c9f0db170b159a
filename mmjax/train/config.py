"""Configuration: plain data in, one clear line out when something is wrong.

  configs/quickstart.py:tiny   a file with get_config(variant) -> ConfigDict
  --config.train.steps=20      overrides, through ml_collections' config_flags
  <workdir>/config.json        what was resolved; a resumed run must agree with it

A config file names only what it changes; `defaults()` is the complete table, so
every key can be overridden and a wrong one is told with the closest right one.
"""

import dataclasses
import difflib
import importlib.util
import json
import pathlib
import re
import sys
import traceback
import typing
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from mmjax.data.mixture import Shares
from mmjax.names import closest
from mmjax.sharding import RULES

OPTIONAL = config_dict.placeholder
# Sections whose keys are the fields of something else, which checks them itself.
_OPEN = ('model', 'init', 'optim.options', 'data.options', 'data.rules', 'data.mixture',
         'data.image', 'data.audio', 'data.video', 'data.budget.image',
         'data.budget.audio', 'data.budget.video', 'sharding.mesh', 'sharding.rules',
         'eval')  # fmt: skip
# Of config.data.mixture.<name>.
_SOURCE = ('path', 'source', 'options', 'rules', 'weight')
# What a resumed run may change: nothing of it changes the parameters' way
# (`sharding` only by rounding).
MAY_DIFFER = ('data.workers', 'data.threads', 'data.path', 'data.max_bad_share', 'eval.',
              'sharding.',
              'train.log_every', 'train.checkpoint_every', 'train.keep',
              'train.max_skipped', 'train.evaluate_first', 'train.spikes.',
              'train.watchdog', 'train.compilation_cache')  # fmt: skip


def defaults() -> ConfigDict:
  """Every key that there is, with its default; None stands for "not set"."""
  return ConfigDict(
    dict(
      seed=0,
      data=dict(
        source=OPTIONAL(str),  # what mmjax.data.prepare makes `path` from
        path=OPTIONAL(str),
        options=dict(),  # of the source
        rules=dict(),  # of the preparation: fields of mmjax.data.rules.Rules
        mixture=dict(),  # instead, by name: path, source, options, rules, weight
        tokenizer='bytes',
        vocab_size=OPTIONAL(int),  # rows of the model's tables; None = the tokenizer's
        chat_template=OPTIONAL(str),  # how dialogues are written, see mmjax.data.chat
        delimiters=OPTIONAL(str),  # around images, see mmjax.data.delimiters
        split='train',
        rows=8,  # rows of one step, over all devices and processes
        image=dict(),  # fields of mmjax.data.media.ImageRule
        audio=dict(),  # fields of mmjax.data.audio.AudioRule
        video=dict(),  # fields of mmjax.data.video.VideoRule
        image_attention='block',
        prompt_attention='causal',
        image_positions='grid',
        augment=(),  # names of mmjax.data.augment.AUGMENTATIONS, or with fields
        # dict(name='crop', scale=(0.5, 1.0))
        shots=dict(  # support documents before each one, see mmjax.data.fewshot
          count=0,
          split=OPTIONAL(str),  # where they come from; None = from among the documents
          embeddings=(),  # .npy files: of the documents, of the split; () = at random
          trained=False,
        ),
        budget=dict(stream=1024, targets=256, image=dict(), audio=dict(), video=dict()),
        workers=0,  # processes that read; 0 = threads of this one
        threads=1,
        max_bad_share=0.01,
      ),
      model=dict(name='unified'),
      init=dict(),  # by part of the model, or 'model': see mmjax.train.begin
      optim=dict(
        name='adamw',
        learning_rate=1e-3,
        schedule=dict(
          name='cosine', warmup_steps=0, decay_steps=OPTIONAL(int), final_share=0.0
        ),
        weight_decay=0.0,
        clip_norm=OPTIONAL(float),
        no_decay=(),  # patterns of parameter paths, beside norms, biases, embeddings
        multipliers=(),  # pairs (pattern, factor of the learning rate)
        freeze=(),  # patterns of parameter paths
        ema=OPTIONAL(float),  # decay of the moving average of the parameters
        options=dict(),  # arguments of the optimizer, e.g. b2=0.95
        state_dtype=OPTIONAL(str),  # of moments: float32 (None) or bfloat16
        grad_dtype=OPTIONAL(str),  # of what devices send: as parameters (None), bfloat16
      ),
      sharding=dict(
        preset='dp',
        mesh=dict(data=-1),
        rules=dict(),
        max_replicated=0.02,
        cpu_devices=OPTIONAL(int),  # without accelerators: devices made of the CPU
      ),
      train=dict(
        task='next_token',
        steps=1000,
        z_loss=0.0,
        contrastive=dict(loss='infonce', chunk=1024),  # of the task of that name
        accumulate=1,
        max_skipped=10,  # non-finite updates in a row before the run stops
        log_every=20,
        checkpoint_every=500,
        evaluate_first=False,  # also before the first step
        keep=3,
        compilation_cache='auto',  # 'off', or a folder; see mmjax.train.cache
        watchdog=60.0,  # seconds from which a step may count as stuck; 0 = off
        spikes=dict(
          mads=20.0, keep=3
        ),  # see mmjax.train.spikes; mads 0: not finite alone
      ),
      eval=dict(),
    )
  )


def load(spec: str, model: str | None = None) -> ConfigDict:
  """Loads 'file.py' or 'file.py:variant' and fills in the defaults (see `resolve`).

  Raises:
    ValueError: no such file (the closest is told), or keys that don't exist.
  """
  path, _, variant = spec.partition(':')
  file = pathlib.Path(path)
  if not file.is_file():
    near = closest(path, [str(p) for p in sorted(file.parent.glob('*.py'))])
    raise ValueError(f'no config file {path!r}{near}')
  module_spec = importlib.util.spec_from_file_location(f'config_{file.stem}', file)
  module = importlib.util.module_from_spec(module_spec)
  module_spec.loader.exec_module(module)
  return resolve(module.get_config(*([variant] if variant else [])), model)


def resolve(given: ConfigDict, model: str | None = None) -> ConfigDict:
  """The given keys over the defaults, in the order of `defaults`.

  Args:
    given: what a config file says.
    model: the model whose fields are filled in, if another than the given one.

  Raises:
    ValueError: an unknown key or a value of the wrong type.
  """
  config = defaults()
  _merge(config, given, '')
  cls = _models().get(model or config.model.name)
  if cls is not None:
    _fill(config.model, cls, theirs=('vocab_size', 'media'))
  return config


def _fill(section: ConfigDict, cls: type, theirs: tuple[str, ...]) -> None:
  """The defaults of a module's fields, and of its parts'; not what the data says."""
  from mmjax import models

  types = typing.get_type_hints(cls)
  for name, field in models.fields_of(cls).items():
    if name in section and isinstance(section[name], ConfigDict):
      part = models.part_of(types[name], section[name], f'config.model.{name}')
      _fill(section[name], part, theirs=('vocab_size', 'channels', 'media'))
    elif name not in (*section, *theirs) and field.default is not dataclasses.MISSING:
      section[name] = OPTIONAL(object) if field.default is None else field.default


def _merge(into: ConfigDict, given: Any, prefix: str) -> None:
  for key in given:
    path, value = prefix + key, given[key]
    section = path.rpartition('.')[0]
    if key not in into:
      if not any(section == p or section.startswith(p + '.') for p in _OPEN):
        raise ValueError(f'unknown config key {path!r}{near_key(path, defaults())}')
      if isinstance(value, ConfigDict):
        value = value.copy_and_resolve_references()
      into[key] = OPTIONAL(object) if value is None else value
      continue
    old = into[key]
    if isinstance(old, ConfigDict):
      if not isinstance(value, ConfigDict):
        raise ValueError(f'config.{path} = {value!r}: must be a section')
      _merge(into[key], value, path + '.')
    elif value is not None:
      try:
        into[key] = tuple(value) if isinstance(value, list) else value
      except TypeError:
        want = into.get_type(key).__name__
        raise ValueError(f'config.{path} = {value!r}: must be {want}') from None


def near_key(path: str, config: ConfigDict) -> str:
  """The closest right key, for an error: by the whole path, or by its last word."""
  paths = flat(config)
  sections = {p.rpartition('.')[0] for p in paths} - {''}
  words = {p.rpartition('.')[2]: p for p in paths}
  section, _, word = path.rpartition('.')
  near = [p for p in paths if p.rpartition('.')[0] == section]
  near = difflib.get_close_matches(path, near, 1)
  near = near or [p for w, p in words.items() if w == word]
  near = near or difflib.get_close_matches(path, [*paths, *sections], 1)
  near = near or [words[w] for w in difflib.get_close_matches(word, words, 1)]
  hint = f'; did you mean {near[0]!r}?' if near else ''
  inside = [p.rpartition('.')[2] for p in paths if p.rpartition('.')[0] == section]
  return f'{hint} (choices: {", ".join(inside or config)})'


def parse_flags(argv: list[str]) -> list[str]:
  """For `absl.app.run(main, flags_parser=parse_flags)`; sets FLAGS.config.

  Anything wrong is one line on stderr and exit code 2.
  """
  try:
    return parse(argv, flags.FLAGS)
  except (ValueError, flags.Error) as e:
    sys.exit(refuse(e))


def parse(argv: list[str], flag_values: flags.FlagValues) -> list[str]:
  """Parses --config=FILE[:VARIANT] and --config.a.b=value into flag_values.config.

  Raises:
    ValueError: no config, an unknown key, a value of the wrong type, or names
      that `check` refuses.
  """
  if any(re.match(r'--?help(short|full|xml)?$', a) for a in argv):
    return flag_values(argv)
  argv = _join(argv)
  specs = [a.partition('=')[2] for a in argv if re.match('--?config=', a)]
  if not specs:
    raise ValueError('no config; for example --config=configs/quickstart.py')
  rest = [a for a in argv if not re.match('--?config=', a)]
  models = [a.partition('=')[2] for a in argv if re.match('--?config.model.name=', a)]
  config = load(specs[-1], models[-1] if models else None)
  for arg in rest:
    if hit := re.match(r'--?(no)?config\.([^=]+)', arg):
      _known(hit.group(2), config)
  config_flags.DEFINE_config_dict(
    'config', config, flag_values=flag_values, sys_argv=rest
  )
  try:
    out = flag_values(rest)
  except flags.IllegalFlagValueError as e:
    key = re.match(r'flag --config\.([^=]+)=(.*?): ', str(e))
    if not key:
      raise
    kind = _type(key.group(1), config)
    raise ValueError(f'--config.{key[1]}={key[2]}: must be {kind}') from None
  check(flag_values.config)
  return out


def _join(argv):
  """['--config', 'x'] -> ['--config=x'], for --config alone."""
  out = []
  for arg in argv:
    if out and out[-1] in ('-config', '--config'):
      out[-1] += '=' + arg
    else:
      out.append(arg)
  return out


def _known(path: str, config: ConfigDict) -> None:
  node = config
  for word in path.split('.'):
    if not isinstance(node, ConfigDict) or word not in node:
      raise ValueError(f'unknown config key {path!r}{near_key(path, config)}')
    node = node[word]


def _type(path, config):
  section, _, key = path.rpartition('.')
  for word in section.split('.') if section else ():
    config = config[word]
  return config.get_type(key).__name__


def check(config: ConfigDict) -> None:
  """Checks every name that picks something from a table, before anything is built.

  Raises:
    ValueError: one line with the closest right name.
  """
  from mmjax.ops import contrastive
  from mmjax.train import optim, tasks

  for path, table in (
    ('optim.name', optim.OPTIMIZERS),
    ('optim.schedule.name', optim.SCHEDULES),
    ('sharding.preset', RULES),
    ('train.task', tasks.TASKS),
    ('train.contrastive.loss', contrastive.LOSSES),
    ('model.name', _models()),
  ):
    name = flat(config)[path]
    if name not in table:
      raise ValueError(f'config.{path} = {name!r}{closest(name, table)}')
  for path in ('data.path', 'data.source'):
    # What is evaluated is in `data.path`, also beside a mixture.
    needed = not config.data.mixture or (path == 'data.path' and config.eval)
    if needed and flat(config)[path] is None:
      raise ValueError(f'config.{path} is not set')
  _check_mixture(config.data.mixture)
  for path in (
    'train.steps', 'train.accumulate', 'train.log_every', 'train.checkpoint_every',
    'train.keep', 'train.max_skipped', 'data.rows',
  ):  # fmt: skip
    if flat(config)[path] < 1:
      raise ValueError(f'config.{path} = {flat(config)[path]}: must be at least 1')
  if config.data.rows % config.train.accumulate:
    raise ValueError(
      f'config.train.accumulate = {config.train.accumulate} does not divide'
      f' config.data.rows = {config.data.rows}'
    )


def _check_mixture(mixture: ConfigDict) -> None:
  for name, given in mixture.items():
    where = f'config.data.mixture.{name}'
    if not isinstance(given, ConfigDict):
      raise ValueError(f'{where} = {given!r}: must be a section')
    for key in given:
      if key not in _SOURCE:
        raise ValueError(f'{where} has no {key!r}{closest(key, _SOURCE)}')
    if given.get('path') is None:
      raise ValueError(f'{where}.path is not set')
  if mixture:
    Shares.of(dict.fromkeys(mixture, 1), weights(mixture))


def weights(mixture: ConfigDict) -> dict[str, Any]:
  """By name of a mixture's sources, the weight."""
  return {name: given.get('weight', 1.0) for name, given in mixture.items()}


def _models():
  from mmjax.models import MODELS

  return MODELS


def flat(config: ConfigDict, prefix: str = '') -> dict[str, Any]:
  """{'a.b': value} of every key."""
  out = {}
  for key in config:
    value = config[key]
    if isinstance(value, ConfigDict):
      out |= flat(value, f'{prefix}{key}.')
    else:
      out[prefix + key] = value
  return out


def to_json(config: ConfigDict) -> str:
  return json.dumps(config.to_dict(), indent=2) + '\n'


def from_json(text: str) -> ConfigDict:
  """The config of a workdir's config.json."""
  return resolve(ConfigDict(json.loads(text)))


def refuse_changes(old: ConfigDict, new: ConfigDict) -> list[str]:
  """Compares the config of a workdir with the one given now.

  `train.steps` may change where the learning rate doesn't depend on it (a
  constant or rsqrt schedule, or decay_steps set).

  Returns:
    The keys that differ, all of them allowed to.

  Raises:
    ValueError: a key differs that would change the run.
  """
  a, b = (flat(ConfigDict(json.loads(to_json(c)))) for c in (old, new))
  missing = object()
  differ = [k for k in sorted(a | b) if a.get(k, missing) != b.get(k, missing)]
  schedule = new.optim.schedule
  free = schedule.name in ('constant', 'rsqrt') or schedule.decay_steps is not None
  allowed = MAY_DIFFER + (('train.steps',) if free else ())

  def may(key):
    return any(key == p or (p.endswith('.') and key.startswith(p)) for p in allowed)

  bad = [k for k in differ if not may(k)]
  if bad:
    told = ', '.join(f'{k} ({a.get(k)!r} -> {b.get(k)!r})' for k in bad)
    raise ValueError(
      f'the workdir holds a run with another config: {told}; use another --workdir'
      f' (these may differ: {", ".join(allowed)})'
    )
  return differ


def refuse(error: BaseException) -> int:
  """Prints an error as one line; returns the exit code, 2."""
  line = ' '.join(str(error).split())
  print(f'error: {line}', file=sys.stderr, flush=True)
  return 2


def is_ours(error: BaseException) -> bool:
  """Whether the error was raised by mmjax itself, so that its one line says all."""
  frames = traceback.extract_tb(error.__traceback__)
  root = str(pathlib.Path(__file__).parent.parent)
  return bool(frames) and frames[-1].filename.startswith(root)


def fields_of(config: ConfigDict, cls: type, where: str) -> Any:
  """`cls(**config)` with unknown fields told in one line.

  Raises:
    ValueError: a key that isn't a field of the dataclass.
  """
  names = [f.name for f in dataclasses.fields(cls)]
  for key in config:
    if key not in names:
      raise ValueError(f'config.{where} has no {key!r}{closest(key, names)}')
  return cls(**config.to_dict())


def spec_name(argv: list[str]) -> str:
  """'quickstart_tiny' for --config=configs/quickstart.py:tiny."""
  spec = [a.partition('=')[2] for a in _join(argv) if re.match('--?config=', a)][-1]
  path, _, variant = spec.partition(':')
  return pathlib.Path(path).stem + (f'_{variant}' if variant else '')
