"""Memory of the 8B step against the vocabulary, compiled for TPUs that aren't here.

  python benchmarks/vocabulary_memory.py                  # 32,000 to 256,000 words
  python benchmarks/vocabulary_memory.py --words=256000 --loss=plain

One JSON line per case: the whole train step of configs/unified_8b.py, 4,096 slots a row
and all of them targets, with the loss in `blocks` of words (`ops.vocabulary`) and with a
`plain` one, which makes the logits [B, T, V] and lets JAX differentiate them. `peak_gib`
is libtpu's peak per chip, `wire_gb` what it sends, if it fits. Needs jax[tpu]; nothing
runs.
"""

import argparse
import json
import pathlib

import compiled  # noqa: F401  before JAX
import jax
import jax.numpy as jnp

from mmjax.batch import Stream
from mmjax.ops.losses import next_token_loss, previous_slots, trained_slots
from mmjax.ops.vocabulary import Head
from mmjax.plan import topology
from mmjax.plan.compile import plan
from mmjax.train import config as config_lib
from mmjax.train import tasks

CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'unified_8b.py'


def plain(hidden: jax.Array, head: Head, stream: Stream, num_targets: int, *, z_loss=0.0):
  """`next_token_loss` by the logits of all slots; the sums that the step asks for."""
  # The slot before a target tells its logits.
  slots = jnp.maximum(previous_slots(stream), 0)
  logits = head.logits(jnp.take_along_axis(hidden, slots[..., None], 1))
  tokens = jnp.maximum(stream.tokens, 0)
  right = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
  log_z, best = jax.nn.logsumexp(logits, -1), jnp.argmax(logits, -1)
  weights = jnp.where(trained_slots(stream), stream.weights, 0.0)
  ce, z = jnp.sum(weights * (log_z - right)), z_loss * jnp.sum(weights * log_z**2)
  correct = jnp.sum(jnp.where(best == tokens, weights, 0.0))
  return ce + z, jnp.sum(weights), {'ce': ce, 'correct': correct, 'lost': jnp.zeros(())}


LOSSES = {'blocks': next_token_loss, 'plain': plain}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--words', default='32000,128256,256000')
  parser.add_argument('--loss', choices=LOSSES, default=None)
  parser.add_argument('--topology', default='v5e:16x16')
  args = parser.parse_args()
  for words in map(int, args.words.split(',')):
    config = config_lib.load(str(CONFIG))
    config.data.vocab_size = words
    config_lib.check(config)
    for name in [args.loss] if args.loss else LOSSES:
      tasks.next_token_loss = LOSSES[name]
      made = plan(config, topology.parse(args.topology))
      line = {
        'loss': name,
        'words': words,
        'topology': args.topology,
        'fits': made.fits,
        'peak_gib': round(made.peak / 2**30, 2),
      }
      if made.fits:
        line['wire_gb'] = round(made.readout.wire_bytes / 1e9, 1)
      print(json.dumps(line), flush=True)


if __name__ == '__main__':
  main()
