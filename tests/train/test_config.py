"""Whatever is wrong in a config is one line with the closest right word."""

import json

import pytest
from absl import flags
from ml_collections import ConfigDict

from mmjax import models
from mmjax.data.media import ImageRule
from mmjax.train import config as lib

FILE = """
from ml_collections import ConfigDict

def get_config(variant=''):
  if variant not in ('', 'tiny'):
    raise ValueError(f'no variant {variant!r}')
  config = ConfigDict(dict(
    data=dict(source='easy_vqa', path='data/x', image=dict(patch=8, size=64)),
    model=dict(name='unified', embed_dim=32),
    train=dict(steps=20),
  ))
  if variant == 'tiny':
    config.train.steps = 2
  return config
"""


@pytest.fixture
def parse(tmp_path):
  file = tmp_path / 'experiment.py'
  file.write_text(FILE)

  def run(*args, variant=''):
    values = flags.FlagValues()
    flags.DEFINE_string('workdir', None, 'x', flag_values=values)
    lib.parse(['train.py', f'--config={file}{variant}', *args], values)
    return values.config

  return run


def test_overrides_and_variants(parse):
  config = parse(
    '--config.train.steps=30',
    '--config.model.qk_norm=True',
    '--config.model.reach=64',
    '--config.optim.clip_norm=0.5',
    '--config.optim.learning_rate=1',
    "--config.optim.options={'b2': 0.9}",
    "--config.optim.freeze=('embed/*',)",
    '--config.sharding.mesh.data=2',
    '--config.data.path',
    'elsewhere',
  )
  assert (config.train.steps, config.model.qk_norm, config.model.reach) == (30, True, 64)
  assert (config.optim.clip_norm, config.optim.learning_rate) == (0.5, 1.0)
  assert config.optim.options.b2 == 0.9
  assert config.optim.freeze == ('embed/*',)
  assert config.sharding.mesh.data == 2
  assert config.data.path == 'elsewhere'
  assert config.model.num_layers == 4  # the model's own default is filled in
  assert parse(variant=':tiny').train.steps == 2


@pytest.mark.parametrize(
  ('arg', 'message'),
  [
    (
      '--config.train.stepz=3',
      "unknown config key 'train.stepz'; did you mean 'train.steps'",
    ),
    ('--config.steps=3', "unknown config key 'steps'; did you mean 'train.steps'"),
    ('--config.traim.steps=3', "'traim.steps'; did you mean 'train.steps'"),
    ('--config.train.steps.x=3', "unknown config key 'train.steps.x'"),
    ('--config.model.embed_dims=3', "did you mean 'model.embed_dim'"),
    ('--config.train.steps=abc', '--config.train.steps=abc: must be int'),
    ('--config.train.steps=2.5', '--config.train.steps=2.5: must be int'),
    ('--config.optim.clip_norm=x', '--config.optim.clip_norm=x: must be float'),
    ('--config.train.steps=0', 'config.train.steps = 0: must be at least 1'),
    (
      '--config.train.accumulate=3',
      'accumulate = 3 does not divide config.data.rows = 8',
    ),
    ('--config.optim.name=adamm', "config.optim.name = 'adamm'; did you mean 'adamw'"),
    ('--config.optim.schedule.name=cosin', "'cosin'; did you mean 'cosine'"),
    (
      '--config.model.name=unifid',
      "config.model.name = 'unifid'; did you mean 'unified'",
    ),
    ('--config.sharding.preset=fsd', "'fsd'; did you mean 'fsdp'"),
    ('--config.train.task=next', "config.train.task = 'next'"),
    ('--workdirr=x', "Unknown command line flag 'workdirr'. Did you mean: workdir"),
  ],
)
def test_mistakes_are_one_line(parse, arg, message):
  with pytest.raises((ValueError, flags.Error)) as caught:
    parse(arg)
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


def test_exit_code_and_stderr(tmp_path, capsys):
  with pytest.raises(SystemExit) as caught:
    lib.parse_flags(['train.py', f'--config={tmp_path}/quickstart.py'])
  assert caught.value.code == 2
  err = capsys.readouterr().err
  assert err.startswith('error: no config file') and err.count('\n') == 1
  with pytest.raises(SystemExit):
    lib.parse_flags(['train.py'])
  assert 'error: no config; for example' in capsys.readouterr().err


def test_the_closest_file(tmp_path):
  (tmp_path / 'quickstart.py').write_text(FILE)
  with pytest.raises(ValueError, match='no config file.*did you mean.*quickstart.py'):
    lib.load(str(tmp_path / 'quikstart.py'))
  with pytest.raises(ValueError, match="no variant 'tinyy'"):
    lib.load(str(tmp_path / 'quickstart.py:tinyy'))
  argv = ['train.py', '--config', 'configs/quickstart.py:tiny']
  assert lib.spec_name(argv) == 'quickstart_tiny'


def given(**sections):
  base = dict(data=dict(source='a', path='b'))
  return ConfigDict(
    {k: {**base.get(k, {}), **sections.get(k, {})} for k in base | sections}
  )


def test_mistakes_in_a_file():
  for config, message in (
    (
      given(train=dict(step=3)),
      "unknown config key 'train.step'; did you mean 'train.steps'",
    ),
    (given(trian=dict(steps=3)), "unknown config key 'trian'"),
    (given(train=dict(steps='3')), "config.train.steps = '3': must be int"),
    (ConfigDict(dict(train=3)), 'config.train = 3: must be a section'),
  ):
    with pytest.raises(ValueError, match=message.replace('.', r'\.')):
      lib.resolve(config)
  with pytest.raises(ValueError, match='config.data.path is not set'):
    lib.check(lib.resolve(ConfigDict()))
  with pytest.raises(
    ValueError, match="config.data.image has no 'sizes'; did you mean 's"
  ):
    lib.fields_of(ConfigDict(dict(sizes=3)), ImageRule, 'data.image')


def test_json_and_back():
  config = lib.resolve(given(optim=dict(multipliers=(('embed/*', 0.5),), ema=0.9)))
  text = lib.to_json(config)
  back = lib.from_json(text)
  assert json.loads(lib.to_json(back)) == json.loads(text)
  assert lib.refuse_changes(config, back) == []
  assert back.optim.ema == 0.9 and back.optim.clip_norm is None


def test_what_a_resumed_run_may_change():
  old = lib.resolve(given(eval=dict(vqa=dict(rows=8))))
  new = lib.resolve(
    given(
      eval=dict(vqa=dict(rows=16, limit=5)),
      train=dict(log_every=7),
      sharding=dict(preset='fsdp'),
    )
  )
  assert lib.refuse_changes(old, new) == [
    'eval.vqa.limit', 'eval.vqa.rows', 'sharding.preset', 'train.log_every',
  ]  # fmt: skip
  new = lib.resolve(given(optim=dict(learning_rate=0.5), data=dict(rows=16)))
  with pytest.raises(ValueError) as caught:
    lib.refuse_changes(old, new)
  assert 'data.rows (8 -> 16), optim.learning_rate (0.001 -> 0.5)' in str(caught.value)
  assert 'these may differ: data.workers' in str(caught.value)


@pytest.mark.parametrize(
  ('schedule', 'allowed'),
  [
    (dict(name='cosine'), False),
    (dict(name='constant'), True),
    (dict(name='cosine', decay_steps=100), True),
  ],
)
def test_more_steps_only_where_the_rate_does_not_depend_on_them(schedule, allowed):
  old, new = (
    lib.resolve(given(optim=dict(schedule=schedule), train=dict(steps=n)))
    for n in (10, 20)
  )
  if allowed:
    assert lib.refuse_changes(old, new) == ['train.steps']
  else:
    with pytest.raises(ValueError, match='train.steps .10 -> 20'):
      lib.refuse_changes(old, new)


def test_is_ours():
  try:
    lib.load('nowhere.py')
  except ValueError as error:
    assert lib.is_ours(error)
  try:
    int('x')
  except ValueError as error:
    assert not lib.is_ours(error)


def test_parts_of_a_model_are_sections_with_defaults(tmp_path):
  given = ConfigDict(
    dict(
      model=dict(
        name='flamingo', lm=dict(name='unified', num_layers=2), vision=dict(name='vit'),
        resampler=dict(num_latents=8),
      )
    )
  )  # fmt: skip
  made = lib.resolve(given)
  assert made.model.lm.num_layers == 2 and made.model.lm.mlp_dim == 384
  assert made.model.vision.pool == 'none' and 'channels' not in made.model.vision
  assert made.model.resampler.num_layers == 6
  assert lib.refuse_changes(made, lib.from_json(lib.to_json(made))) == []
  assert 'mlp_dim' not in given.model.lm  # what was given stays as it is
  model = models.build(
    **made.model.to_dict(), vocab_size=9, media=[['image', 12]], shared=dict(chunk=7)
  )
  assert model.vision.channels == 12 and model.lm.vocab_size == 9
  given.model.vision.name = 'vitt'
  with pytest.raises(ValueError, match="vision: unknown name 'vitt'; did you mean 'vit'"):
    lib.resolve(given)


def mixed(**mixture):
  given = {name: ConfigDict(of) for name, of in mixture.items()}
  return lib.resolve(ConfigDict(dict(data=dict(mixture=given))))


def test_a_mixture_stands_for_path_and_source_and_goes_through_json():
  config = mixed(a=dict(path='a', weight=((0, 1.0), (9, 2.0))), b=dict(path='b'))
  lib.check(config)
  again = lib.from_json(lib.to_json(config))
  lib.check(again)
  assert lib.refuse_changes(config, again) == []
  weights = lib.weights(again.data.mixture)
  assert [list(pair) for pair in weights['a']] == [[0, 1.0], [9, 2.0]]
  assert weights['b'] == 1.0
  config.eval = dict(vqa=dict())
  with pytest.raises(ValueError, match='config.data.path is not set'):
    lib.check(config)


@pytest.mark.parametrize(
  'mixture,message',
  [
    (dict(a=dict(path='a', wieght=2.0)), "mixture.a has no 'wieght'.*weight"),
    (dict(a=dict(weight=2.0)), 'config.data.mixture.a.path is not set'),
    (dict(a=dict(path='a', weight=-1.0)), "weight -1.0 of 'a': must be"),
  ],
)
def test_mistakes_in_a_mixture(mixture, message):
  with pytest.raises(ValueError, match=message):
    lib.check(mixed(**mixture))


def test_a_source_of_a_mixture_is_a_section():
  config = lib.resolve(ConfigDict(dict(data=dict(mixture=dict(a=3)))))
  with pytest.raises(ValueError, match='config.data.mixture.a = 3: must be a section'):
    lib.check(config)
