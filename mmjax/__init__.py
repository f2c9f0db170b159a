"""mmjax: train, evaluate and reuse multimodal models in JAX."""

__version__ = '0.1.0'
