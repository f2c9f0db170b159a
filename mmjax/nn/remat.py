"""What a layer keeps for its backward pass, by name; all else is made anew there.

Kept per layer and token, in entries of the compute dtype (D, N, K, H, F as of the
layer; F instead of 2 F where the MLP isn't gated), and made anew:

  name            on the device                            made anew
  none            everything                               nothing
  full            D                                        the layer
  attention       D + N H [+ N in f32]                     all but attention
  attention+up    D + N H + F [+ N in f32]                 all but these products
  attention+mlp   D + N H + 2 F [+ N in f32]               norms, queries, keys, values
  dots            2 D + (N + 2 K) H + 2 F                  attention, norms, activations
  dots+attention  2 D + 2 (N + K) H + 2 F [+ N in f32]     norms, activations
  all_dots        dots, and N S, attention's logits        norms, softmax, activations
  offload         D, on the host D + 2 (N + K) H + 2 F     norms, activations

The D is the layer's input, a second one what attention adds to it. 'attention' means
what `ops.attention` names: its output and, where a kernel's backward pass asks for it,
the log-sum-exp of each query, so that a kernel that reads and writes once isn't run
again. Attention in chunks (XLA) makes its logits anew whatever is kept. 'offload' needs
a device that reaches the host's memory: TPUs, GPUs and, for tests, CPUs do. Sources:
Chen et al. 1604.06174; Korthikanti et al. 2205.05198 (which to keep).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from mmjax.ops.attention import NAMES

_policies = jax.checkpoint_policies
# What an MLP's first product is called here; of a gated one, the one without activation.
MLP_UP = 'mlp_up'
MLP_GATE = 'mlp_gate'  # the product with the activation
_attention = _policies.save_only_these_names(*NAMES)
_dots = _policies.dots_with_no_batch_dims_saveable
_dots_attention = _policies.save_from_both_policies(_dots, _attention)


def _offload(prim, *args, **params):
  """What 'dots+attention' keeps goes to the host, and comes back."""
  to_host = _policies.offload_dot_with_no_batch_dims('device', 'pinned_host')
  named = _policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(NAMES),
    offload_src='device',
    offload_dst='pinned_host',
  )
  policy = named if prim.name == 'name' else to_host
  return policy(prim, *args, **params)


REMAT = {
  'none': None,
  'full': _policies.nothing_saveable,
  'attention': _attention,
  'attention+up': _policies.save_only_these_names(*NAMES, MLP_UP),
  'attention+mlp': _policies.save_only_these_names(*NAMES, MLP_UP, MLP_GATE),
  'dots': _dots,
  'dots+attention': _dots_attention,
  'all_dots': _policies.dots_saveable,
  'offload': _offload,
}


def remat(target: Any, name: str, prevent_cse: bool = True) -> Any:
  """A module class, or a function of arrays, that keeps what `name` says.

  Args:
    prevent_cse: False inside of a scan, which is barrier enough.
  """
  if name == 'none':
    return target
  wrap: Callable = nn.remat if isinstance(target, type) else jax.checkpoint
  return wrap(target, prevent_cse=prevent_cse, policy=REMAT[name])
