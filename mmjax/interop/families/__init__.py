"""Architectures of Hugging Face by the model_type of their config.json."""

from mmjax.interop.families.bert import BERT
from mmjax.interop.families.clip import CLIP, CLIP_VISION
from mmjax.interop.families.family import Family
from mmjax.interop.families.fuyu import FUYU
from mmjax.interop.families.gpt2 import GPT2
from mmjax.interop.families.idefics import IDEFICS
from mmjax.interop.families.llama import GEMMA, LLAMA, QWEN2
from mmjax.interop.families.llava import LLAVA, PALIGEMMA
from mmjax.interop.families.resnet import RESNET
from mmjax.interop.families.siglip import SIGLIP, SIGLIP_VISION
from mmjax.interop.families.vit import VIT

FAMILIES = {
  'llama': LLAMA,
  'qwen2': QWEN2,
  'gemma': GEMMA,
  'gpt2': GPT2,
  'bert': BERT,
  'fuyu': FUYU,
  'idefics': IDEFICS,
  'llava': LLAVA,
  'paligemma': PALIGEMMA,
  'vit': VIT,
  'resnet': RESNET,
  'clip': CLIP,
  'clip_vision_model': CLIP_VISION,
  'siglip': SIGLIP,
  'siglip_vision_model': SIGLIP_VISION,
}

__all__ = ['FAMILIES', 'Family']
