"""The peer: the unified early-fusion model in plain PyTorch, as one would write it.

Same mathematics as `mmjax.models.unified` (pre-norm RMSNorm, rotary positions
over time, height and width, SwiGLU, tags for visibility), written with
`nn.Linear`, `F.scaled_dot_product_attention` and fused AdamW. Two ways to take
the loss: `head='all'` computes the logits of every position, as most
implementations do; `head='trained'` only of those that are trained.
"""

import torch
import torch.nn.functional as F
from torch import nn


def rotary_angles(positions, head_dim, base, axes):
  """Angles f32[B, T, H/2] of positions i64[B, T, 3]; pair i turns by axis axes[i]."""
  frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
  return positions.float()[..., axes] * frequency


def rotate(x, angles):
  """Rotates x f[B, N, T, H] (first half with second half) by angles f[B, T, H/2]."""
  cos, sin = torch.cos(angles)[:, None], torch.sin(angles)[:, None]
  a, b = x.chunk(2, dim=-1)
  return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Block(nn.Module):
  def __init__(self, c):
    super().__init__()
    D, width = c['embed_dim'], c['num_heads'] * c['head_dim']
    kv = c['num_kv_heads'] * c['head_dim']
    self.heads, self.kv_heads = c['num_heads'], c['num_kv_heads']
    self.norm_attention = nn.RMSNorm(D, eps=1e-6)
    self.norm_mlp = nn.RMSNorm(D, eps=1e-6)
    self.query = nn.Linear(D, width, bias=False)
    self.key = nn.Linear(D, kv, bias=False)
    self.value = nn.Linear(D, kv, bias=False)
    self.out = nn.Linear(width, D, bias=False)
    self.gate = nn.Linear(D, c['mlp_dim'], bias=False)
    self.up = nn.Linear(D, c['mlp_dim'], bias=False)
    self.down = nn.Linear(c['mlp_dim'], D, bias=False)

  def forward(self, x, angles, mask):
    B, T, _ = x.shape
    h = self.norm_attention(x)
    q = rotate(self.query(h).view(B, T, self.heads, -1).transpose(1, 2), angles)
    k = rotate(self.key(h).view(B, T, self.kv_heads, -1).transpose(1, 2), angles)
    v = self.value(h).view(B, T, self.kv_heads, -1).transpose(1, 2)
    y = F.scaled_dot_product_attention(
      q, k, v, attn_mask=mask[:, None], enable_gqa=self.heads != self.kv_heads
    )
    x = x + self.out(y.transpose(1, 2).reshape(B, T, -1))
    h = self.norm_mlp(x)
    return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Unified(nn.Module):
  def __init__(self, c):
    super().__init__()
    self.c = c
    self.embed = nn.Embedding(c['vocab_size'], c['embed_dim'])
    self.patch = nn.Linear(c['patch_channels'], c['embed_dim'])
    self.blocks = nn.ModuleList(Block(c) for _ in range(c['num_layers']))
    self.norm = nn.RMSNorm(c['embed_dim'], eps=1e-6)
    self.head = nn.Linear(c['embed_dim'], c['vocab_size'], bias=False)

  def forward(self, batch):
    """Hidden states f[B, T, D]."""
    tokens, source = batch['tokens'], batch['source']
    x = self.embed(tokens.clamp(min=0))
    patches = self.patch(batch['patches'].float() / 127.5 - 1)
    at = source.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1])
    x = torch.where((source >= 0)[..., None], torch.gather(patches, 1, at), x)
    angles = rotary_angles(
      batch['positions'], self.c['head_dim'], self.c['rope_base'], self.c['rope_axes']
    )
    order = batch['order'][:, None, :]
    segments = batch['segment_ids']
    mask = segments[:, :, None] == segments[:, None, :]
    mask &= (batch['first'][:, :, None] <= order) & (order <= batch['last'][:, :, None])
    mask |= (segments == 0)[:, :, None]  # padding must see something, or it is NaN
    for block in self.blocks:
      x = block(x, angles, mask)
    return self.norm(x)

  def loss(self, batch, head='all'):
    """Mean cross-entropy over the trained tokens."""
    hidden = self(batch)[:, :-1]
    targets, weights = batch['tokens'][:, 1:].clamp(min=0), batch['weights'][:, 1:]
    if head == 'trained':
      keep = weights > 0
      hidden, targets, weights = hidden[keep], targets[keep], weights[keep]
    logits = self.head(hidden)
    ce = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction='none')
    return (ce * weights.flatten()).sum() / weights.sum()


def make_step(model, learning_rate, head='all', bf16=False):
  """A training step: forward, backward, clipping, AdamW. batch -> loss (float)."""
  params = list(model.parameters())
  optimizer = torch.optim.AdamW(params, lr=learning_rate, weight_decay=0.1, fused=True)

  def step(batch):
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast('cpu', torch.bfloat16, enabled=bf16):
      loss = model.loss(batch, head)
    loss.backward()
    nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()
    return float(loss.detach())

  return step
