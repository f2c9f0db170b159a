"""Text, images, sound and video of one JSONL file, trained on by the config alone."""

import io
import json

import av
import jax
import numpy as np
import PIL.Image
import pytest
import soundfile
from ml_collections import ConfigDict

from mmjax.data import media
from mmjax.data.document import Audio, Video
from mmjax.data.example import to_example
from mmjax.data.pack import fit_budget, pack
from mmjax.data.pipeline import Pipeline
from mmjax.data.prepare import prepare
from mmjax.data.store import Dataset
from mmjax.train import build, config, log, loop

KINDS = ('audio', 'image', 'video')


def film(n):
  rng = np.random.default_rng(n)
  return rng.integers(0, 256, (n, 16, 16, 3), np.uint8)


def picture(pixels):
  file = io.BytesIO()
  PIL.Image.fromarray(pixels).save(file, 'PNG')
  return file.getvalue()


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A JSONL file whose lines have some or all kinds of media, and a few bad ones."""
  folder = tmp_path_factory.mktemp('source')
  rng = np.random.default_rng(0)
  for i, frame in enumerate(film(3)):
    (folder / f'{i}.png').write_bytes(picture(frame))
  for name, rate in (('a.flac', 8000), ('b.wav', 22_050)):
    wave = 0.1 * rng.normal(size=(rate // 5, 2))
    soundfile.write(folder / name, wave, rate)
  holes = np.full(1600, np.nan, np.float32)
  soundfile.write(folder / 'nan.wav', holes, 8000, subtype='FLOAT')
  soundfile.write(folder / 'none.wav', holes[:0], 8000)
  with av.open(str(folder / 'c.mp4'), 'w') as out:
    stream = out.add_stream('libx264', rate=10)
    stream.height = stream.width = 16
    for frame in film(15):
      out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, 'rgb24')))
    out.mux(stream.encode())
  sound, film_, pages = (
    {'audio': 'a.flac'},
    {'video': 'c.mp4'},
    ['0.png', '1.png', '2.png'],
  )
  other, slides, shown = (
    {'audio': 'b.wav'},
    {'video': pages, 'fps': 2},
    {'image': '0.png'},
  )
  lines = [
    [sound], [other], [film_], [slides], [shown], [], [shown, sound, film_],
    [other, slides], [film_, film_], [{'audio': 'none.wav'}], [{'audio': '0.png'}],
    [{'video': 'a.flac'}], [{'audio': 'nan.wav'}],
  ]  # fmt: skip
  with open(folder / 'data.jsonl', 'w') as file:
    for i, spans in enumerate(lines):
      texts = {'text': 'what?'}, {'text': f' it is {i}', 'trained': True}
      file.write(json.dumps({'spans': [*spans, *texts]}) + '\n')
  return f'jsonl:{folder / "data.jsonl"}'


@pytest.fixture
def run(source, tmp_path):
  return config.resolve(
    ConfigDict(
      dict(
        data=dict(
          source=source,
          path=str(tmp_path / 'data'),
          rows=2,
          image=dict(patch=8, resize='fixed', size=16),
          audio=dict(bins=16, patch=4, ticks=25),
          video=dict(patch=8, size=16, fps=2, tubelet=2, ticks=25),
          budget=dict(
            stream=128,
            targets=64,
            image=dict(patches=16, items=4),
            audio=dict(patches=32, items=4),
            video=dict(patches=32, items=4),
          ),
          max_bad_share=0.5,
        ),
        model=dict(
          name='unified', embed_dim=16, num_layers=1, num_heads=2, num_kv_heads=2,
          head_dim=8, mlp_dim=16,
        ),
        sharding=dict(max_replicated=1.0),
        train=dict(steps=2, log_every=1, checkpoint_every=2),
      )
    )
  )  # fmt: skip


def test_all_media_are_trained_on_by_the_config_alone(run, tmp_path):
  meta = prepare(run.data.source, run.data.path, progress=False)
  assert meta['dropped'] == {'not_audio': 1, 'not_video': 1, 'zero_length': 1}
  counts = meta['splits']['train']
  assert {k: counts[k] for k in KINDS} == {'audio': 5, 'image': 2, 'video': 6}

  loop.train(run, tmp_path / 'run', jax.devices()[:1])
  steps = [x for x in log.read(tmp_path / 'run' / 'metrics.jsonl') if 'train/loss' in x]
  assert len(steps) == 2 and all(np.isfinite(x['train/loss']) for x in steps)

  data, parts = Dataset(run.data.path, 'train'), build.build(run, 300)
  pipeline = Pipeline(
    data, budget=parts.budget, rows=2, rules=parts.media_rules, slots=parts.model.slots,
    max_bad_share=0.5,
  )  # fmt: skip
  plan, bad, seen = pipeline.plan, [], 0
  assert plan.dropped == {} and plan.num_documents == 10
  it = pipeline.iterate()
  for _ in range(plan.num_rows):  # two epochs
    loaded = next(it)
    seen += loaded.stats['documents']
    bad += [(k, v) for k, v in loaded.stats.items() if k.startswith('bad/')]
  it.close()
  assert bad == [('bad/not_finite', 1.0)] * 2 and seen == 18


def test_packed_equals_unpacked(run):
  prepare(run.data.source, run.data.path, progress=False)
  data, parts = Dataset(run.data.path, 'train'), build.build(run, 300)
  for kind in KINDS:
    channels, dtype = {
      'image': (192, 'uint8'), 'audio': (64, 'float32'), 'video': (384, 'uint8'),
    }[kind]  # fmt: skip
    bank = parts.budget.bank[kind]
    assert (bank.channels, bank.dtype) == (channels, dtype)
  examples = [
    to_example(
      data[i], tokenizer=data.tokenizer, rules=parts.media_rules, slots=parts.model.slots
    )
    for i in (0, 2, 6, 7, 8)
  ]
  budget = fit_budget(examples, parts.budget)
  budget = type(budget)(
    5 * budget.stream,
    5 * budget.targets,
    {k: parts.budget.bank[k].__class__(80, 8, b.channels, b.dtype)
     for k, b in budget.bank.items()},
  )  # fmt: skip
  weights = jax.jit(parts.model.init)(jax.random.key(0), budget.empty(1))
  apply = jax.jit(parts.model.apply)
  together = apply(weights, pack([examples], budget))[0]
  at = 0
  for example in examples:
    alone = apply(weights, pack([[example]], budget))[0]
    n = len(example)
    np.testing.assert_allclose(together[at : at + n], alone[:n], atol=1e-5)
    at += n

  # What a medium shows matters for the text after it, of every kind.
  whole = to_example(
    data[6], tokenizer=data.tokenizer, rules=parts.media_rules, slots=parts.model.slots
  )
  want = apply(weights, pack([[whole]], budget))[0, len(whole) - 1]
  for kind in KINDS:
    batch = pack([[whole]], budget)
    batch.bank[kind].values[:] = 0
    assert np.abs(apply(weights, batch)[0, len(whole) - 1] - want).max() > 1e-3


def test_sound_and_video_share_a_clock(run):
  rules = build.rules_of(run)
  sound = Audio(np.zeros(16_000 * 3, np.float32), 16_000)
  film_ = Video(film(30), 10)
  for kind, span, step in (('audio', sound, 0.04), ('video', film_, 1.0)):
    times = rules[kind].times(*media.native_size(span))
    assert times.tolist() == [round(25 * step * i) for i in range(len(times))]
    np.testing.assert_allclose(rules[kind].seconds(times)[-1] + step, 3)


def test_unknown_fields_are_told(run):
  run.data.audio.hopp = 1
  with pytest.raises(
    ValueError, match="config.data.audio has no 'hopp'; did you mean 'h"
  ):
    build.rules_of(run)
