"""Real data and weights, as packages carry them; absent = the test is skipped.

Installed packages are found as a user's are, `package:NAME/FILE`. MMJAX_TEST_DATA may
name a folder of unpacked ones instead, <folder>/<anything>/NAME/FILE.
"""

import os
import pathlib

import pytest

from mmjax.files import find


def package_file(name: str, file: str, install: str) -> pathlib.Path:
  """The path of a package's file; skips the test with how to install it."""
  for folder in pathlib.Path(os.environ.get('MMJAX_TEST_DATA', '/nowhere')).glob('*'):
    if (folder / name / file).exists():
      return folder / name / file
  try:
    return find(f'package:{name}/{file}')
  except ValueError as error:
    pytest.skip(f'{error}; pip install {install}, or set MMJAX_TEST_DATA')
