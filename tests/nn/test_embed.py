import jax
import jax.numpy as jnp
import numpy as np
import pytest
from documents import pack, random_document
from flax import nnx

from mmjax.batch import PLACEHOLDER, Budget, PackedBatch
from mmjax.nn.embed import MediaProjection, StreamEmbed, pixels

MEDIA = (('image', 6),)


def example(**fields):
  rng = np.random.default_rng(0)
  batch = pack([[random_document(rng, 'tit'), random_document(rng, 'it')]] * 2)
  module = StreamEmbed(40, 8, MEDIA, **fields)
  return module, module.init(jax.random.key(0), batch), batch


@pytest.mark.parametrize('modality', [False, True])
@pytest.mark.parametrize('scale', [False, True])
def test_each_slot_gets_its_word_or_its_patch(scale, modality):
  module, variables, batch = example(scale=scale, modality=modality)
  got, p, s = module.apply(variables, batch), variables['params'], batch.stream
  for b, t in np.ndindex(s.tokens.shape):
    if s.tokens[b, t] == PLACEHOLDER['image']:
      values = batch.bank['image'].values[b, s.source[b, t]] / 127.5 - 1
      want, kind = values @ p['image']['kernel'] + p['image']['bias'], 1
    else:
      want, kind = p['text'][s.tokens[b, t]] * (8**0.5 if scale else 1), 0
    if modality:
      want = want + p['modality'][kind]
    np.testing.assert_allclose(got[b, t], want, atol=1e-6)


def test_words_and_patches_enter_with_one_size():
  rng = np.random.default_rng(0)
  batch = pack([[random_document(rng, 'titititi') for _ in range(8)]], T=300, P=200, I=32)
  module = StreamEmbed(40, 64, MEDIA)
  x, _ = jax.jit(module.init_with_output)(jax.random.key(0), batch)
  media = batch.stream.tokens < 0
  assert 0.3 < np.std(x[media]) / np.std(x[~media]) < 1.5


def test_pixels():
  got = pixels(jnp.asarray([[0, 255]], jnp.uint8), 'float32')
  np.testing.assert_array_equal(got, [[-1, 1]])
  frames = jnp.asarray([[0.5, 3.0]])
  np.testing.assert_array_equal(pixels(frames, 'bfloat16'), frames.astype(jnp.bfloat16))


def test_a_batch_without_a_kind_uses_the_same_parameters():
  module, variables, batch = example()
  text = pack([[[('text', np.arange(1, 6), True)]]])
  bare = PackedBatch(text.stream, {})
  np.testing.assert_array_equal(
    module.apply(variables, bare), module.apply(variables, text)
  )
  made = module.init(jax.random.key(0), bare)
  assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, variables)


def test_refuses_media_that_are_not_the_models():
  _, _, batch = example()
  with pytest.raises(ValueError, match=r"batch has media 'image', the model has \[\]"):
    StreamEmbed(40, 8).init(jax.random.key(0), batch)
  with pytest.raises(
    ValueError, match='image patches have 6 channels, the model takes 9'
  ):
    StreamEmbed(40, 8, (('image', 9),)).init(jax.random.key(0), batch)


@pytest.mark.parametrize('name', ['projection', 'stream'])
def test_bridges_to_nnx(name):
  _, _, batch = example()
  if name == 'stream':
    module, x = StreamEmbed(40, 8, MEDIA), batch
  else:
    module, x = MediaProjection(6, 8), batch.bank['image'].values
  bridged = nnx.bridge.lazy_init(nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)), x)
  params = nnx.to_pure_dict(nnx.state(bridged, nnx.Param))
  np.testing.assert_array_equal(bridged(x), module.apply({'params': params}, x))


def test_learned_positions_are_looked_up_in_time_and_nan_beyond_the_table():
  batch = Budget(4, 1).empty(1)
  batch.stream.tokens[:] = 7
  batch.stream.positions[0, :, 0] = [0, 2, 3, -1]
  module = StreamEmbed(40, 8, max_positions=3)
  params = module.init(jax.random.key(0), batch)['params']
  got = module.apply({'params': params}, batch)[0]
  want = params['text'][np.array([7])] * 8**0.5 + params['positions'][np.array([0, 2])]
  np.testing.assert_allclose(got[:2], want, rtol=1e-6)
  assert np.isnan(got[2:]).all()
