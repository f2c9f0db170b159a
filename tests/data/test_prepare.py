"""Preparing datasets: sources, counts, reuse."""

import pytest

from mmjax.data import store
from mmjax.data.prepare import prepare


def test_easy_vqa_has_all_questions(tmp_path):
  pytest.importorskip('easy_vqa', reason='needs the package easy-vqa')
  meta = prepare('easy_vqa', tmp_path / 'd', tokenizer='bpe:512', progress=False)
  assert meta['dropped'] == {}
  for split, images, questions in (('train', 4000, 38575), ('test', 1000, 9673)):
    data = store.Dataset(tmp_path / 'd', split)
    assert len(data) == images
    turns = sum(len(data[i].meta['types']) for i in range(len(data)))
    assert turns == questions
