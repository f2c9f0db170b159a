"""Small random models of transformers, on CPU torch, give our numbers; and back.

The documents are packed for us and come one by one to them, so that what agrees
here is also that packing changes nothing. Needs the extra `parity`.
"""

import importlib.util
import json
import shutil
import warnings

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from mmjax.batch import Budget
from mmjax.interop import huggingface as hf

pytestmark = [
  pytest.mark.slow,
  pytest.mark.filterwarnings('ignore'),
  pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ('torch', 'transformers')),
    reason="needs torch and transformers: pip install 'mmjax[parity]'",
  ),
]

SIZES = dict(
  vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
  intermediate_size=24, max_position_embeddings=12,
)  # fmt: skip
GPT2 = dict(
  vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=12, bos_token_id=0,
  eos_token_id=0,
)  # fmt: skip
# Config and model class of transformers, its config's fields.
THEIRS = {
  'llama': ('LlamaConfig', 'LlamaForCausalLM', dict(num_key_value_heads=2, head_dim=8)),
  'llama-bias': (
    'LlamaConfig', 'LlamaForCausalLM',
    dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_theta=100.0),
  ),
  'llama3': (
    'LlamaConfig', 'LlamaForCausalLM',
    dict(num_key_value_heads=2, head_dim=8, rope_parameters=dict(
      rope_type='llama3', rope_theta=100.0, factor=8.0, low_freq_factor=1.0,
      high_freq_factor=4.0, original_max_position_embeddings=10,
    )),
  ),
  'llama-linear': (
    'LlamaConfig', 'LlamaForCausalLM',
    dict(rope_parameters=dict(rope_type='linear', rope_theta=100.0, factor=4.0)),
  ),
  'qwen2': ('Qwen2Config', 'Qwen2ForCausalLM', dict(num_key_value_heads=2)),
  'gemma': ('GemmaConfig', 'GemmaForCausalLM', dict(num_key_value_heads=1, head_dim=8)),
  'gpt2': ('GPT2Config', 'GPT2LMHeadModel', GPT2),
  'gpt2-base': ('GPT2Config', 'GPT2Model', GPT2),
  'bert': ('BertConfig', 'BertForMaskedLM', {}),
  'bert-base': ('BertConfig', 'BertModel', {}),
}  # fmt: skip
DOCUMENTS = [np.random.default_rng(i).integers(1, 40, n) for i, n in enumerate((4, 7, 5))]
# Row, and where in the row.
PLACES = [(0, slice(0, 4)), (0, slice(4, 11)), (1, slice(2, 7))]


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
      fields = fields if name.startswith('gpt2') else {**SIZES, **fields}
      torch.manual_seed(0)
      config = quiet(getattr(transformers, config), **fields)
      config._attn_implementation = 'eager'
      model = quiet(getattr(transformers, cls), config).eval()
      with torch.no_grad():  # so that also biases and norms are far from 0 and 1
        for p in model.parameters():
          p.add_(0.3 * torch.randn_like(p))
      path = tmp_path_factory.mktemp(name)
      quiet(model.save_pretrained, path, max_shard_size='8KB')
      known[name] = model, path
    return known[name]

  return make


def batch():
  made = Budget(14, 14).empty(2)
  s = made.stream
  for i, (ids, (b, where)) in enumerate(zip(DOCUMENTS, PLACES), 1):
    here = b, where
    s.tokens[here] = ids
    s.segment_ids[here] = i
    s.order[here] = s.last[here] = np.arange(len(ids))
    s.positions[here] = np.arange(len(ids))[:, None]
  return made


def theirs(model):
  """Hidden states and logits (or pooled) of each document, as torch tensors."""
  import torch

  for ids in DOCUMENTS:
    out = model(torch.tensor(ids)[None], output_hidden_states=True)
    yield out.hidden_states[-1][0], out.get('logits'), out.get('pooler_output')


@pytest.mark.parametrize('name', sorted(THEIRS))
def test_outputs_agree(name, made):
  model, path = made(name)
  assert (path / 'model.safetensors.index.json').exists()
  ours, params = hf.load(path)
  hidden = jax.jit(ours.apply)({'params': params}, batch())
  largest = 0.0
  for (b, where), (want, logits, pooled) in zip(PLACES, theirs(model)):
    got = hidden[b, where]
    pairs = [(got, want)]
    if logits is not None:
      pairs += [(ours.apply({'params': params}, got, method='logits'), logits[0])]
    if pooled is not None:
      pairs += [(ours.apply({'params': params}, got[:1], method='pool'), pooled)]
    for x, y in pairs:
      y = y.detach().numpy()
      assert np.abs(y).max() > 0.5  # there is something to agree on
      largest = max(largest, np.abs(np.asarray(x) - y).max())
  print(f'{name}: max |difference| {largest:.1e}')
  assert largest <= 1e-4


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'bert'])
def test_gradients_agree(name, made, tmp_path):
  """Of sum(cos(logits)); theirs are read as if they were weights, so names are tested."""
  model, path = made(name)
  model.zero_grad()
  total = 0.0
  for _, logits, _ in theirs(model):
    total = total + logits.cos().sum()
  total.backward()
  grads = {
    n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None
  }
  shutil.copy(path / 'config.json', tmp_path)
  save_file(grads, tmp_path / 'model.safetensors')
  _, want = hf.load(tmp_path)
  ours, params = hf.load(path)

  @jax.jit
  def gradients(params):
    def loss(params):
      hidden = ours.apply({'params': params}, batch())
      y = ours.apply({'params': params}, hidden, method='logits')
      return sum(jax.numpy.cos(y[b, where]).sum() for b, where in PLACES)

    return jax.grad(loss)(params)

  errors = jax.tree.map(
    lambda g, w: float(np.linalg.norm(g - w) / np.linalg.norm(w)), gradients(params), want
  )
  # Softmax doesn't feel a constant added to all keys: that gradient is rounding.
  errors['transformer']['layers']['attention'].pop('key_bias', None)
  largest = max(jax.tree.leaves(errors))
  print(f'{name}: largest relative difference of gradients {largest:.1e}')
  assert largest <= 1e-3, errors


@pytest.mark.parametrize('name', sorted(THEIRS))
def test_transformers_opens_what_we_export(name, made, tmp_path):
  import torch

  model, path = made(name)
  hf.export(*hf.load(path), tmp_path, max_position_embeddings=12)
  again = quiet(type(model).from_pretrained, tmp_path, attn_implementation='eager')
  want = model.state_dict()
  got = again.state_dict()
  assert want.keys() == got.keys()
  assert all(torch.equal(got[key], x) for key, x in want.items())
  for (a, *_), (b, *_) in zip(theirs(again.eval()), theirs(model)):
    assert torch.equal(a, b)
  kept = json.loads((path / 'config.json').read_text())
  assert json.loads((tmp_path / 'config.json').read_text())['dtype'] == kept['dtype']


def test_text_needs_no_sections(made):
  """Three equal positions are the one of theirs, however pairs are dealt to axes."""
  model, path = made('llama')
  outputs = []
  for sections in (None, (1, 1, 2), (4, 0, 0)):
    ours, params = hf.load(path, rope_sections=sections)
    outputs.append(np.asarray(jax.jit(ours.apply)({'params': params}, batch())))
  np.testing.assert_array_equal(outputs[0], outputs[1])
  np.testing.assert_array_equal(outputs[0], outputs[2])
  b, where = PLACES[1]
  want = list(theirs(model))[1][0].detach().numpy()
  np.testing.assert_allclose(outputs[1][b, where], want, atol=1e-4)
