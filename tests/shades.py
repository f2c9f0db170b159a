"""A run that is over in seconds: is the picture light or dark?

40 documents of a 4 x 4 picture, a question and its answer, and a config that train.py
takes. For tests that start processes, and benchmarks/faults.py.
"""

import numpy as np

from mmjax.data.document import Document, Image, Text
from mmjax.data.tokenizer import ByteTokenizer
from mmjax.data.writer import Writer

_CONFIG = """
from ml_collections import ConfigDict

def get_config():
  return ConfigDict(dict(
    data=dict(
      source='none', path={path!r}, rows=2, image=dict(patch=2, resize='fixed', size=4),
      budget=dict(stream=32, targets=16, image=dict(patches=8, items=2)),
    ),
    model=dict(embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
               mlp_dim=32, dropout=0.1),
    **{sections!r},
  ))
"""


def write(folder, **sections):
  """Writes the data and the config, with these sections; returns the config's file."""
  rng = np.random.default_rng(0)
  with Writer(folder / 'data', ByteTokenizer(), {}) as out:
    for i in range(40):
      light = int(rng.integers(0, 2))
      image = Image((rng.integers(0, 100, (4, 4, 3)) + 150 * light).astype(np.uint8))
      spans = (image, Text('?', trained=False), Text('light' if light else 'dark', True))
      out.add('train' if i < 30 else 'test', Document(spans, id=f'doc{i}'))
  file = folder / 'shades.py'
  file.write_text(_CONFIG.format(path=str(folder / 'data'), sections=sections))
  return file
