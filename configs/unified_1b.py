"""Untagged early fusion at the widths of Llama-3.2-1B: `unified_8b` for a smaller pod.

Data and step as of configs/unified_8b.py: 512 rows of 4,096 slots, raw patches and text.

Model: 1.24 B parameters, all trained.

Expect: no score; it was planned, never trained at this size. Modelled, by the compiler's
estimates, for 256 chips of v5e (the second command): 7.1 GiB a chip, 7.6e9 bytes sent,
MFU 0.51; see docs/planning.md.

COMMAND: python train.py --config=configs/unified_1b.py --workdir=runs/unified_1b
What it takes: python -m mmjax.plan --config=configs/unified_1b.py --topology=v5e:16x16
In under a minute, on a CPU (easy-VQA; all of it works, nothing is learnt):
  python train.py --config=configs/unified_1b.py:tiny --workdir=runs/unified_1b_tiny
"""

import pathlib
import runpy

from ml_collections import ConfigDict

LARGER = pathlib.Path(__file__).with_name('unified_8b.py')


def get_config(variant: str = '') -> ConfigDict:
  config = runpy.run_path(str(LARGER))['get_config'](variant)
  if not variant:
    config.model.update(
      embed_dim=2048,
      num_layers=16,
      num_heads=32,
      num_kv_heads=8,
      head_dim=64,
      mlp_dim=8192,
      tie_embeddings=True,
      remat='attention+mlp',
    )
    config.sharding.mesh.fsdp = 32
  return config
