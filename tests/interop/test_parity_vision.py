"""ViT, CLIP and SigLIP of transformers, small and random, give our numbers; and back.

For us the images are bytes, cut into patches, several to a row, and the texts stand end
to end; for them each is alone. Needs the extra `parity`.
"""

import functools
import importlib.util
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmjax.batch import BankBudget, Budget
from mmjax.data.media import patchify
from mmjax.interop import huggingface as hf

pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('ignore'),
  pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ('torch', 'transformers')),
    reason="needs torch and transformers: pip install 'mmjax[parity]'",
  ),
]

P, SIZE, V = 8, 32, 40
VISION = dict(
  hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
  image_size=SIZE, patch_size=P,
)  # fmt: skip
TEXT = dict(
  hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
  vocab_size=V, max_position_embeddings=12, bos_token_id=V - 2, eos_token_id=V - 1,
)  # fmt: skip
PAIR = dict(vision_config=VISION, text_config=TEXT)
# Config and model class of transformers, its config's fields.
THEIRS = {
  'vit': ('ViTConfig', 'ViTModel', VISION),
  'vit-classes': ('ViTConfig', 'ViTForImageClassification', dict(VISION, num_labels=3)),
  'clip': ('CLIPConfig', 'CLIPModel', dict(PAIR, projection_dim=10)),
  'clip-vision': ('CLIPVisionConfig', 'CLIPVisionModel', VISION),
  'siglip': (
    'SiglipConfig', 'SiglipModel',
    dict(PAIR, text_config=dict(TEXT, projection_size=16)),
  ),
  'siglip-vision': ('SiglipVisionConfig', 'SiglipVisionModel', VISION),
}  # fmt: skip
COLOURS = {
  'clip': (
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
  ),
}  # fmt: skip
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, SIZE, SIZE, 3), np.uint8)
TEXTS = [RNG.integers(2, V - 2, n) for n in (3, 7, 1, 5, 6)]
WHERE = [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2)]  # row, and which of the row


def quiet(f, *args, **kwargs):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return f(*args, **kwargs)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """name -> (their model, its directory), made when first asked for."""
  import torch

  transformers = quiet(importlib.import_module, 'transformers')
  known = {}

  def make(name):
    if name not in known:
      config, cls, fields = THEIRS[name]
      torch.manual_seed(0)
      config = quiet(getattr(transformers, config), **fields)
      config._attn_implementation = 'eager'
      model = quiet(getattr(transformers, cls), config).eval()
      with torch.no_grad():  # so that also biases and norms are far from 0 and 1
        for p in model.parameters():
          p.add_(0.3 * torch.randn_like(p))
      path = tmp_path_factory.mktemp(name)
      quiet(model.save_pretrained, path)
      known[name] = model, path
    return known[name]

  return make


def ids(name, text):
  """The token that ends a text; and SigLIP's padding, which takes part."""
  text = [*text, V - 1]
  return text + [1] * (12 - len(text)) if name == 'siglip' else text


@functools.cache
def batch(name):
  P_ = (SIZE // P) ** 2
  empty = Budget(38, 38, {'image': BankBudget(3 * P_ + 2, 4, P * P * 3)}).empty(2)
  s, bank, at = empty.stream, empty.bank['image'], [0, 0]
  for (b, i), image, text in zip(WHERE, IMAGES, TEXTS, strict=True):
    text = ids(name, text)
    here = b, slice(at[b], at[b] + len(text))
    at[b] += len(text)
    s.tokens[here], s.segment_ids[here] = text, i
    s.order[here] = s.last[here] = np.arange(len(text))
    s.positions[here] = np.arange(len(text))[:, None]
    here = b, slice((i - 1) * P_, i * P_)
    bank.values[here], bank.items[here] = patchify(image, P), i
    bank.positions[here] = np.indices((1, SIZE // P, SIZE // P)).reshape(3, -1).T
    bank.item_segments[b, i - 1] = i
  return empty


def pixel_values(name):
  import torch

  mean, std = (np.array(a) for a in COLOURS.get(name[:4], ([0.5] * 3, [0.5] * 3)))
  values = (IMAGES / 255 - mean) / std
  return torch.tensor(values.transpose(0, 3, 1, 2), dtype=torch.float32)


def theirs(name, model, **options):
  """What they give for the images (and texts), as torch tensors by name."""
  import torch

  images = pixel_values(name)
  if name in ('clip', 'siglip'):
    longest = max(len(ids(name, text)) for text in TEXTS)
    rows = [ids(name, text) for text in TEXTS]
    rows = [row + [1] * (longest - len(row)) for row in rows]
    out = model(input_ids=torch.tensor(rows), pixel_values=images, **options)
    return {k: out[k] for k in ('image_embeds', 'text_embeds', 'logits_per_image')}
  out = model(pixel_values=images, output_hidden_states=True, **options)
  last = out.hidden_states[-1] if name == 'vit-classes' else out.last_hidden_state
  if name == 'clip-vision':  # which norms what it pools only
    last = model.post_layernorm(last)
  if name == 'vit-classes':
    last = model.vit.layernorm(last)
  return {
    'tokens': last if name == 'siglip-vision' else last[:, 1:],
    **(
      {'logits': out.logits} if name == 'vit-classes' else {'pooled': out.pooler_output}
    ),
  }


def ours(name, model, params, made):
  """The same of ours, item by item."""
  rows, each = map(np.array, zip(*WHERE))
  variables = {'params': params}
  if name in ('clip', 'siglip'):
    pairs = model.apply(variables, made)
    scale, bias = model.apply(variables, method='temperature')
    image, text = pairs.image[rows, each - 1], pairs.text[rows, each - 1]
    logits = scale * image @ text.T + bias
    return dict(image_embeds=image, text_embeds=text, logits_per_image=logits)
  bank = made.bank['image']
  out = model.apply(variables, bank)
  tokens = jnp.stack(
    [out.values[b, (SIZE // P) ** 2 * (i - 1) : (SIZE // P) ** 2 * i] for b, i in WHERE]
  )
  if model.num_classes:
    logits = model.apply(variables, out.pooled[rows, each - 1], method='logits')
    return dict(tokens=tokens, logits=logits)
  return dict(tokens=tokens, pooled=out.pooled[rows, each - 1])


def largest(got, want):
  assert got.keys() == want.keys()
  differences = {}
  for key, x in want.items():
    x = x.detach().numpy()
    assert got[key].shape == x.shape and x.std() > 0.05  # there is something to agree on
    differences[key] = np.abs(np.asarray(got[key]) - x).max()
  return differences


@pytest.mark.parametrize('name', sorted(THEIRS))
def test_outputs_agree(name, made):
  theirs_, path = made(name)
  model, params = hf.load(path)
  run = jax.jit(ours, static_argnums=(0, 1))
  found = largest(run(name, model, params, batch(name)), theirs(name, theirs_))
  print(name, {k: f'{v:.1e}' for k, v in found.items()})
  assert max(found.values()) <= 1e-4, found


def test_a_table_of_their_size_is_read_as_it_is(made):
  """Theirs is read bicubically at other sizes, ours bilinearly."""
  theirs_, path = made('siglip-vision')
  model, params = hf.load(path)
  want = theirs('siglip-vision', theirs_, interpolate_pos_encoding=True)
  found = largest(ours('siglip-vision', model, params, batch('siglip-vision')), want)
  assert max(found.values()) <= 1e-4, found


def test_a_part_of_a_tower(made):
  """What LLaVA reads: the patches after the last layer but one, without a norm."""
  theirs_, path = made('clip-vision')
  part = dict(pool='none', class_token=True, num_layers=1, final_norm=False)
  model, params = hf.load(path, **part)
  out = theirs_(pixel_values=pixel_values('clip'), output_hidden_states=True)
  want = out.hidden_states[-2][:, 1:].detach().numpy()
  got = model.apply({'params': params}, batch('clip').bank['image']).values
  got = np.stack([got[b, 16 * (i - 1) : 16 * i] for b, i in WHERE])
  np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize('name', ['clip', 'siglip'])
def test_gradients_agree(name, made, tmp_path):
  """Of sum(cos(logits)); theirs are read as if they were weights, so names are tested."""
  theirs_, path = made(name)
  theirs_.zero_grad()
  theirs(name, theirs_)['logits_per_image'].cos().sum().backward()
  grads = {n: p.grad.numpy().copy() for n, p in theirs_.named_parameters()}
  shutil.copy(path / 'config.json', tmp_path)
  save_file(grads, tmp_path / 'model.safetensors')
  _, want = hf.load(tmp_path)
  model, params = hf.load(path)

  @jax.jit
  def gradients(params):
    def loss(params):
      return jnp.cos(ours(name, model, params, batch(name))['logits_per_image']).sum()

    return jax.grad(loss)(params)

  errors, most = {}, max(np.linalg.norm(w) for w in jax.tree.leaves(want))
  got = jax.tree.leaves(gradients(params))
  for (where, w), g in zip(jax.tree_util.tree_leaves_with_path(want), got, strict=True):
    where = jax.tree_util.keystr(where, simple=True, separator='/')
    scale = np.linalg.norm(w)
    if where.endswith('key_bias'):  # which softmax doesn't feel: rounding
      assert scale <= 1e-4 * most
      continue
    errors[where] = float(np.linalg.norm(g - w) / scale)
  print(f'{name}: largest relative difference of gradients {max(errors.values()):.1e}')
  assert max(errors.values()) <= 1e-3, errors


@pytest.mark.parametrize('name', sorted(THEIRS))
def test_transformers_opens_what_we_export(name, made, tmp_path):
  import torch
  import transformers

  model, path = made(name)
  hf.export(*hf.load(path), tmp_path)
  again = quiet(type(model).from_pretrained, tmp_path, attn_implementation='eager').eval()
  want, got = model.state_dict(), again.state_dict()
  assert want.keys() == got.keys()
  assert all(torch.equal(got[key], x) for key, x in want.items())
  before, after = theirs(name, model), theirs(name, again)
  assert all(torch.equal(after[key], x) for key, x in before.items())
  processor = quiet(transformers.AutoImageProcessor.from_pretrained, tmp_path)
  pixels = processor(images=list(IMAGES), return_tensors='np')['pixel_values']
  np.testing.assert_allclose(pixels, pixel_values(name), atol=2e-6)
