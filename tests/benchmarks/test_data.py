"""The contestants of the loading benchmark do the same work."""

import importlib.util
import itertools
import pathlib

import numpy as np
import PIL.Image
import pytest

from mmjax.data import media
from mmjax.data.document import Image

BENCHMARK = pathlib.Path(__file__).parents[2] / 'benchmarks' / 'data.py'


@pytest.fixture(scope='module')
def bench():
  spec = importlib.util.spec_from_file_location('bench_data', BENCHMARK)
  module = importlib.util.module_from_spec(spec)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(BENCHMARK.parent)
    spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='module')
def out(bench, tmp_path_factory):
  out = tmp_path_factory.mktemp('bench')
  bench.make_files(None, out, jpegs=3, pngs=2)
  return out


@pytest.mark.parametrize('case', ['fixed', 'native'])
def test_every_contestant_makes_the_same_pictures(bench, out, case):
  files = sorted(p for p in (out / 'files').iterdir() if p.suffix != '.txt')
  assert len(files) == 5
  for path in files:
    with PIL.Image.open(path) as image:
      assert 0.5 < image.width * image.height / {'.jpg': 280e3, '.png': 70e3}[
        path.suffix
      ] < 1.5  # fmt: skip
    grid, patches = bench.rule(case, 'area').patches_of(Image(path.read_bytes()))
    ours = media.unpatchify(patches, *grid[1:], bench.PATCH)
    others = bench.pillow(path, case), bench.bare(path, case, 'area')
    assert {x.shape for x in others} == {ours.shape}
    gaps = [np.abs(ours.astype(int) - x).mean() for x in others]
    assert gaps[0] < 4 and gaps[1] < 1, (path, gaps)


def test_the_pipeline_packs_every_image(bench, out):
  steps = itertools.islice(bench.contestant('mmjax-thread', out, 'native', 1), 4)
  assert sum(steps) >= 5


@pytest.mark.slow
def test_memory_stays_flat(bench):
  seen = bench.memory(0, documents=6000, first=2000, size=500)
  assert seen['6000'] - seen['2000'] < 16  # MB: an image of each would be 12 more
