"""Small random multimodal models of transformers give our numbers; and back.

Documents of text and pictures are packed for us and come one by one to them, without
their processors: token ids and normalised pixels. Needs the extra `parity`.
"""

import importlib.util
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmjax.batch import PLACEHOLDER, BankBudget, Budget
from mmjax.interop import huggingface as hf

pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('ignore'),
  pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ('torch', 'transformers')),
    reason="needs torch and transformers: pip install 'mmjax[parity]'",
  ),
]

PATCH, SIZE = 4, 8  # pixels; a picture is 2 x 2 patches
IMAGE = 39  # their token at a picture's slot
TEXT = dict(
  vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
  intermediate_size=24, max_position_embeddings=32,
)  # fmt: skip
VISION = dict(
  hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=20,
  image_size=SIZE, patch_size=PATCH,
)  # fmt: skip
RESAMPLER = dict(
  use_resampler=True, resampler_n_latents=3, resampler_depth=2, resampler_n_heads=2,
  resampler_head_dim=6,
)  # fmt: skip
# Pieces: a number of words, or i for a picture; row of the batch, and its place there.
DOCUMENTS = (('3i2', 0, 0), ('i4', 0, 12), ('1i1i2', 1, 3))


def quiet(f, *args, **kwargs):
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return f(*args, **kwargs)


def fuyu(t):
  text = dict(TEXT, model_type='persimmon', rope_theta=100.0)
  config = t.FuyuConfig(text_config=text, patch_size=PATCH, image_token_id=IMAGE)
  return t.FuyuForCausalLM(config)


def llava(t):
  config = t.LlavaConfig(
    vision_config=t.CLIPVisionConfig(**VISION),
    text_config=t.LlamaConfig(**TEXT, num_key_value_heads=2),
    image_token_index=IMAGE,
  )
  return t.LlavaForConditionalGeneration(config)


def paligemma(t):
  text = t.GemmaConfig(**TEXT, num_key_value_heads=1, head_dim=8)
  vision = t.SiglipVisionConfig(**VISION, vision_use_head=False)
  config = t.PaliGemmaConfig(
    vision_config={**vision.to_dict(), 'projection_dim': TEXT['hidden_size']},
    text_config=text.to_dict(),
    projection_dim=TEXT['hidden_size'],
    image_token_index=IMAGE,
  )
  return t.PaliGemmaForConditionalGeneration(config)


def idefics(t, **more):
  vision = {k: v for k, v in VISION.items() if k != 'hidden_size'}
  config = t.IdeficsConfig(
    **TEXT, **more, additional_vocab_size=2, use_resampler=True, cross_layer_interval=2,
    vision_config=dict(vision, embed_dim=VISION['hidden_size']),
    perceiver_config=dict(RESAMPLER, qk_layer_norms_perceiver='qk_layer_norms' in more),
  )  # fmt: skip
  return t.IdeficsForVisionText2Text(config)


def idefics_vector(t):
  return idefics(t, qk_layer_norms=True, alpha_type='vector', tie_word_embeddings=True)


THEIRS = {
  'fuyu': fuyu,
  'llava': llava,
  'paligemma': paligemma,
  'idefics': idefics,
  'idefics-vector': idefics_vector,
}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """name -> (their model, its directory), made when first asked for."""
  import torch

  transformers = quiet(importlib.import_module, 'transformers')
  known = {}

  def make(name):
    if name not in known:
      torch.manual_seed(0)
      model = quiet(THEIRS[name], transformers).eval()
      model.set_attn_implementation('eager')
      with torch.no_grad():  # so that also biases, norms and gates are far from 0 and 1
        for p in model.parameters():
          p.add_(0.3 * torch.randn_like(p))
      path = tmp_path_factory.mktemp(name)
      quiet(model.save_pretrained, path, max_shard_size='16KB')
      known[name] = model, path
    return known[name]

  return make


def pieces(text, seed):
  """What a document is made of: ids i[n], or the pixels f[SIZE, SIZE, 3] of a picture."""
  rng = np.random.default_rng(seed)
  return [
    rng.normal(size=(SIZE, SIZE, 3)).astype('f')
    if letter == 'i'
    else rng.integers(1, IMAGE, int(letter))
    for letter in text
  ]


def patches(pixels):
  """f[4, PATCH * PATCH * 3], rows of pixels inside, colours last."""
  n = SIZE // PATCH
  cut = pixels.reshape(n, PATCH, n, PATCH, 3).transpose(0, 2, 1, 3, 4)
  return cut.reshape(n * n, -1)


def slots(name):
  return 1 if name.startswith('idefics') else 4


def batch(name):
  """(our batch, [(row, slice) of each document])."""
  bank = {'image': BankBudget(12, 3, PATCH * PATCH * 3, 'float32')}
  made, places = Budget(24, 24, bank).empty(2), []
  s, bank = made.stream, made.bank['image']
  used = [0, 0]
  for segment, (text, row, start) in enumerate(DOCUMENTS, 1):
    parts, t = pieces(text, segment), start
    for piece in parts:
      n = len(piece) if piece.ndim == 1 else slots(name)
      here = row, slice(t, t + n)
      s.tokens[here] = piece if piece.ndim == 1 else PLACEHOLDER['image']
      if piece.ndim > 1:
        i, there = used[row], (row, slice(4 * used[row], 4 * used[row] + 4))
        s.source[here] = i * n + np.arange(n)
        bank.values[there] = patches(piece)
        bank.items[there] = i + 1
        bank.positions[there] = [[0, r, c] for r in range(2) for c in range(2)]
        bank.item_segments[row, i], bank.item_order[row, i] = segment, t - start
        used[row] += 1
      t += n
    here, order = (row, slice(start, t)), np.arange(t - start)
    s.segment_ids[here] = segment
    s.positions[here] = order[:, None]
    if name == 'paligemma':  # all but the last word is a prompt, and sees itself
      order = np.where(order < order[-1], 0, order)
      bank.item_order[row, bank.item_segments[row] == segment] = 0
    s.order[here] = s.last[here] = order
    places.append(here)
  return made, places


def theirs(name, model):
  """Logits of each document, as torch tensors."""
  import torch

  for segment, (text, _, _) in enumerate(DOCUMENTS, 1):
    parts = pieces(text, segment)
    ids = [p if p.ndim == 1 else np.full(slots(name), IMAGE) for p in parts]
    ids = torch.tensor(np.concatenate(ids))[None]
    pictures = [p for p in parts if p.ndim > 1]
    more = {}
    if name == 'fuyu':
      pixels = torch.tensor(np.stack([patches(p) for p in pictures]))
    else:
      pixels = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2)
    if name == 'paligemma':
      more['token_type_ids'] = torch.zeros_like(ids)
      more['token_type_ids'][0, -1] = 1
    if name.startswith('idefics'):
      ids[ids == IMAGE] = 41
      pixels, seen = pixels[None], torch.cumsum(ids[0] == 41, 0)
      mask = seen[:, None] == 1 + torch.arange(pixels.shape[1])[None]
      more['image_attention_mask'] = mask[None].long()
    yield model(input_ids=ids, pixel_values=pixels, use_cache=False, **more).logits[0]


def run(model, params, batch):
  hidden = model.apply({'params': params}, batch)
  return model.apply({'params': params}, hidden, method='logits')


@pytest.mark.parametrize('name', THEIRS)
def test_outputs_agree(name, made):
  model, path = made(name)
  ours, params = hf.load(path)
  packed, places = batch(name)
  got = jax.jit(run, static_argnums=0)(ours, params, packed)
  largest = 0.0
  for where, want in zip(places, theirs(name, model)):
    want = want.detach().numpy()
    assert np.abs(want).max() > 0.5  # there is something to agree on
    largest = max(largest, np.abs(np.asarray(got[where]) - want).max())
  print(f'{name}: max |difference| {largest:.1e}')
  assert largest <= 1e-4


@pytest.mark.parametrize('name', [n for n in THEIRS if n in ('llava', 'idefics')])
def test_gradients_agree(name, made, tmp_path):
  """Of sum(cos(logits)); theirs are read as if they were weights, so names are tested."""
  model, path = made(name)
  model.requires_grad_(True)
  model.zero_grad()
  sum(logits.cos().sum() for logits in theirs(name, model)).backward()
  # Where the weights are stored under other names than the model's own.
  kept = {n: p.detach().clone() for n, p in model.named_parameters()}
  import torch

  with torch.no_grad():
    for p in model.parameters():
      p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
    quiet(model.save_pretrained, tmp_path)
    for n, p in model.named_parameters():
      p.copy_(kept[n])
  _, want = hf.load(tmp_path)
  ours, params = hf.load(path)
  packed, places = batch(name)

  @jax.jit
  def gradients(params):
    def loss(params):
      y = run(ours, params, packed)
      return sum(jnp.cos(y[where]).sum() for where in places)

    return jax.grad(loss)(params)

  errors = {}
  pairs = zip(
    jax.tree_util.tree_leaves_with_path(gradients(params)),
    jax.tree.leaves(want),
    strict=True,
  )
  for (place, g), w in pairs:
    key = jax.tree_util.keystr(place, simple=True, separator='/')
    # Softmax doesn't feel a constant added to all keys: that gradient is rounding.
    if not key.endswith('key_bias'):
      errors[key] = float(np.linalg.norm(g - w) / np.linalg.norm(w))
  largest = max(errors.values())
  print(f'{name}: largest relative difference of gradients {largest:.1e}')
  assert largest <= 1e-3, errors


@pytest.mark.parametrize('name', THEIRS)
def test_transformers_opens_what_we_export(name, made, tmp_path):
  model, path = made(name)
  ours, params = hf.load(path)
  tokens = dict.fromkeys(
    {'fuyu': ['image_token_id']}.get(name, ['image_token_index']), IMAGE
  )
  hf.export(ours, params, tmp_path, **({} if name.startswith('idefics') else tokens))
  again, same = hf.load(tmp_path)
  assert again == ours
  jax.tree.map(np.testing.assert_array_equal, same, params)
  opened = quiet(type(model).from_pretrained, tmp_path, attn_implementation='eager')
  for got, want in zip(theirs(name, opened.eval()), theirs(name, model)):
    np.testing.assert_array_equal(got.detach(), want.detach())


def test_names_of_other_versions_are_read(made, tmp_path):
  """The same weights as transformers' modules call them, without a renaming."""
  model, path = made('fuyu')
  tensors = {}
  for file in path.glob('*.safetensors'):
    tensors |= load_file(file)
  renamed = {}
  for name, x in tensors.items():
    if name.startswith('language_model.model.'):
      name = 'model.language_model.' + name.removeprefix('language_model.model.')
    elif name.startswith('language_model.lm_head'):
      name = name.removeprefix('language_model.')
    else:
      name = f'model.{name}'
    renamed[name] = x
  assert renamed.keys() == model.state_dict().keys()
  shutil.copy(path / 'config.json', tmp_path)
  save_file(renamed, tmp_path / 'model.safetensors')
  for a, b in zip(hf.load(path), hf.load(tmp_path)):
    jax.tree.map(np.testing.assert_array_equal, a, b) if isinstance(a, dict) else None
