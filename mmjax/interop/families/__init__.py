"""Architectures of Hugging Face by the model_type of their config.json."""

from mmjax.interop.families.bert import BERT
from mmjax.interop.families.family import Family
from mmjax.interop.families.fuyu import FUYU
from mmjax.interop.families.gpt2 import GPT2
from mmjax.interop.families.llama import GEMMA, LLAMA, QWEN2

FAMILIES = {
  'llama': LLAMA,
  'qwen2': QWEN2,
  'gemma': GEMMA,
  'gpt2': GPT2,
  'bert': BERT,
  'fuyu': FUYU,
}

__all__ = ['FAMILIES', 'Family']
