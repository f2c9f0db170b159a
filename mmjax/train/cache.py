"""Compiled programs are kept, so that a restart doesn't wait for the compiler again.

  config.train.compilation_cache = 'auto'     ~/.cache/mmjax/compiled
                                   'off'
                                   a folder   (on a pod: one that all hosts see, or gs://)

What the environment says to JAX itself comes first (JAX_COMPILATION_CACHE_DIR,
JAX_ENABLE_COMPILATION_CACHE). A home that can't be written is no error: then nothing
is kept.
"""

import os
import pathlib

import jax

from mmjax import files


def use(setting: str) -> str | None:
  """Has JAX keep what it compiles; the folder, or None if it won't.

  Args:
    setting: of the config, see above.

  Raises:
    ValueError: a folder that was named can't be written, or a `files.place` can't be.
  """
  if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
    return jax.config.jax_compilation_cache_dir
  if setting == 'off':
    return None
  if files.in_bucket(setting):
    path = files.place(setting, 'config.train.compilation_cache')
    jax.config.update('jax_compilation_cache_dir', str(path))
    return str(path)
  root = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  folder = f'{root}/mmjax/compiled' if setting == 'auto' else setting
  try:
    path = pathlib.Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    writable = os.access(path, os.W_OK)
  except (OSError, RuntimeError):  # RuntimeError: nobody's home
    writable = False
  if not writable:
    if setting == 'auto':
      return None
    raise ValueError(f"config.train.compilation_cache = '{setting}' can't be written")
  jax.config.update('jax_compilation_cache_dir', str(path))
  return str(path)
