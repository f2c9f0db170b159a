import pytest

from mmjax import models
from mmjax.models.unified import Unified


def test_builds_from_config_values():
  model = models.build(
    'unified', vocab_size=9, media=[['image', 12]], dropout=0, reach=None
  )
  assert isinstance(model, Unified) and hash(model) is not None
  assert model.media == (('image', 12),) and model.dropout == 0.0


@pytest.mark.parametrize(
  ('name', 'fields', 'message'),
  [
    ('unifid', {}, "unknown model 'unifid'; did you mean 'unified'"),
    ('unified', dict(num_layer=2), "has no field 'num_layer'; did you mean 'num_layers'"),
    ('unified', {}, "model 'unified' needs field 'vocab_size'"),
    ('unified', dict(vocab_size='9'), "'vocab_size' must be int, got '9' \\(str\\)"),
    ('unified', dict(vocab_size=9, qk_norm=1), "'qk_norm' must be bool, got 1"),
    ('unified', dict(vocab_size=True), "'vocab_size' must be int, got True"),
    ('unified', dict(vocab_size=9, reach=1.5), "'reach' must be int | None, got 1.5"),
    ('unified', dict(vocab_size=9, media=['image']), "'media' must be tuple"),
    ('unified', dict(vocab_size=9, parent=None), "has no field 'parent'"),
    ('unified', dict(vocab_size=9, remat='ful'), "remat='ful' is none of"),
    ('unified', dict(vocab_size=9, dtype='f31'), "dtype='f31' is no floating type"),
    ('unified', dict(vocab_size=9, extra_words=9), 'extra_words=9 is not in 0..8'),
    ('unified', dict(vocab_size=9, rotary_dim=33), 'rotary_dim=33 is not in 1..head'),
    ('unified', dict(vocab_size=0), 'vocab_size must be at least 1, got 0'),
    ('unified', dict(vocab_size=9, media=[['imag', 3]]), "kind 'imag'; kinds are"),
  ],
)  # fmt: skip
def test_refuses_in_one_line(name, fields, message):
  with pytest.raises(ValueError, match=message) as error:
    models.build(name, **fields)
  assert '\n' not in str(error.value)
