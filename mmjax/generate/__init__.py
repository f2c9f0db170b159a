"""Generation: `generate(model, params, batch, max_new=..., end_id=...)`."""

from mmjax.generate.decode import generate, make_generate
from mmjax.generate.sampling import Greedy, Sample

__all__ = ['Greedy', 'Sample', 'generate', 'make_generate']
