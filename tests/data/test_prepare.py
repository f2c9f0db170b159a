"""Preparing datasets: sources, counts, reuse, and the command line."""

import collections
import concurrent.futures
import dataclasses
import io
import json
import subprocess
import sys

import fsspec
import numpy as np
import PIL.Image
import pytest
import soundfile
import tokenizers

from mmjax.data import prepare as prepare_lib
from mmjax.data import sources
from mmjax.data import tokenizer as tokenizer_lib
from mmjax.data.document import BadDocument, Document, Image, Text, Video
from mmjax.data.example import to_example
from mmjax.data.media import ImageRule, decode_image
from mmjax.data.prepare import prepare
from mmjax.data.report import text as report
from mmjax.data.store import Dataset
from mmjax.data.writer import InUse


def png(color, size=(4, 4), form='PNG'):
  file = io.BytesIO()
  PIL.Image.new('RGB', size, color).save(file, form)
  return file.getvalue()


@pytest.fixture
def folder(tmp_path):
  """A jsonl file of three good documents and its images."""
  path = tmp_path / 'in'
  (path / 'images').mkdir(parents=True)
  (path / 'images' / 'a.png').write_bytes(png('red'))
  (path / 'images' / 'b.png').write_bytes(png('blue', (3, 5)))
  write(
    path,
    {'spans': [{'image': 'images/a.png'}, {'text': 'what?'},
               {'text': ' a', 'trained': True}]},
    {'spans': [{'image': 'images/b.png'}, {'text': 'b', 'trained': True}], 'id': 'second',
     'meta': {'types': ['x']}},
    {'spans': [{'text': 'c', 'trained': True}], 'split': 'test'},
  )  # fmt: skip
  return path


def write(path, *lines, mode='w'):
  with open(path / 'd.jsonl', mode) as file:
    for line in lines:
      file.write((line if isinstance(line, str) else json.dumps(line)) + '\n')


def run(folder, **options):
  return prepare(f'jsonl:{folder / "d.jsonl"}', folder / 'out', progress=False, **options)


def refuses(match, *args, **options):
  with pytest.raises(ValueError, match=match) as error:
    prepare(*args, progress=False, **options)
  assert '\n' not in str(error.value)


def test_jsonl_lines_become_documents(folder):
  meta = run(folder)
  assert meta['dropped'] == {}
  train = Dataset(folder / 'out', 'train')
  first, second = train[0], train[1]
  assert first.spans[1:] == (Text('what?'), Text(' a', trained=True))
  assert first.spans[0].content == png('red')
  assert (first.id, second.id, second.meta) == ('1', 'second', {'types': ['x']})
  assert train.index.item_size.tolist() == [[1, 4, 4], [1, 5, 3]]
  assert len(Dataset(folder / 'out', 'test')) == 1


def test_lines_may_have_branches(folder):
  said = [{'text': 'q', 'branch': 1}, {'text': 'a', 'trained': True, 'branch': 1}]
  write(folder, {'spans': [{'image': 'images/a.png'}, *said]}, mode='w')
  run(folder)
  got = Dataset(folder / 'out', 'train')[0].spans
  assert got[1:] == (Text('q', False, 1), Text('a', True, 1)) and got[0].branch == 0


def test_sound_and_video_are_carried_as_files(folder):
  soundfile.write(folder / 's.wav', np.zeros((80, 2)), 8000)
  sound, picture = ((folder / name).read_bytes() for name in ('s.wav', 'images/a.png'))
  line = {'spans': [{'video': ['images/a.png'] * 2, 'fps': 25}, {'audio': 's.wav'},
                    {'text': 'a', 'trained': True}]}  # fmt: skip
  write(folder, line)
  run(folder)
  data = Dataset(folder / 'out', 'train')
  video, audio, _ = data[0].spans
  assert isinstance(video, Video)
  assert (video.frames, video.fps, audio.wave) == ((picture, picture), 25, sound)
  assert data.index.item_kind.tolist() == [2, 1]
  height, width, _ = decode_image(picture).shape
  assert data.index.item_size.tolist() == [[80, height, width], [80, 8000, 1]]


def test_jsonl_in_a_bucket_is_as_on_a_disk(folder, monkeypatch):
  bad = ({'spans': [{'image': name}]} for name in ('../secret.png', 'nowhere.png'))
  write(folder, *bad, mode='a')
  monkeypatch.setattr('mmjax.data.jsonl._LINES', 2)
  bucket = f'memory://{folder.parent.name}'
  fsspec.filesystem('memory').put(str(folder), f'{bucket}/in', recursive=True)
  there = sources.build(f'jsonl:{bucket}/in/d.jsonl')
  here = sources.build(f'jsonl:{folder / "d.jsonl"}')
  assert list(there.pieces()) == list(here.pieces()) and len(here.pieces()) > 1
  assert there.fingerprint() == here.fingerprint()

  def told(record):
    split, got = record
    return split, got.reason if isinstance(got, BadDocument) else repr(got)

  assert [told(r) for r in there.records()] == [told(r) for r in here.records()]
  meta = prepare(f'jsonl:{bucket}/in/d.jsonl', folder / 'out', progress=False)
  assert meta['dropped'] == {'missing_file': 1, 'path_outside': 1}
  assert Dataset(folder / 'out', 'train')[0].spans[0].content == png('red')
  refuses('no such file', f'jsonl:{bucket}/no.jsonl', folder / 'other')


BAD = [
  ('{"spans": [', 'bad_json'),
  ('[' * 10**5, 'bad_json'),
  ('[1]', 'bad_line'),
  ({'text': 'a'}, 'bad_line'),
  ({'spans': []}, 'empty'),
  ({'spans': [{'text': 'a'}]}, 'nothing_trained'),
  ({'spans': [{'text': 3, 'trained': True}]}, 'bad_line'),
  ({'spans': [{'text': 'a', 'trained': 'yes'}]}, 'bad_line'),
  ({'spans': [{'text': 'a', 'trained': True}], 'meta': {'types': [1]}}, 'bad_line'),
  ({'spans': [{'text': 'a', 'trained': True, 'branch': '1'}]}, 'bad_line'),
  ({'spans': [{'text': 'a', 'trained': True, 'branch': -1}]}, 'bad_line'),
  ({'spans': [{'text': 'a', 'trained': True, 'branch': b} for b in (1, 0, 1)]},
   'bad_branch'),
  ({'spans': [{'text': '\ud800', 'trained': True}]}, 'not_unicode'),
  ({'spans': [{'smell': 'a'}]}, 'unknown_span'),
  ({'spans': ['a']}, 'unknown_span'),
  ({'spans': [{'text': 'a', 'image': 'images/a.png'}]}, 'unknown_span'),
  ({'spans': [{'image': 'nowhere.png'}]}, 'missing_file'),
  ({'spans': [{'image': 'images'}]}, 'missing_file'),
  ({'spans': [{'image': 'a\0b'}]}, 'path_outside'),
  ({'spans': [{'image': '../secret.png'}]}, 'path_outside'),
  ({'spans': [{'image': '/etc/hostname'}]}, 'path_outside'),
  ({'spans': [{'image': 'link.png'}]}, 'path_outside'),
  ({'spans': [{'image': 'd.jsonl'}, {'text': 'a', 'trained': True}]}, 'not_image'),
  ({'spans': [{'image': 'half.png'}, {'text': 'a', 'trained': True}]}, 'truncated_image'),
  ({'spans': [{'image': 'images/b.png'}, {'text': 'a', 'trained': True}],
    'id': 'big'}, None),
  ({'spans': [{'audio': 'half.png', 'rate': 'high'}]}, 'bad_line'),
  ({'spans': [{'audio': ['images/a.png']}]}, 'bad_line'),
  ({'spans': [{'video': ['images/a.png', 3]}]}, 'bad_line'),
  ({'spans': [{'video': ['images/a.png', 'nowhere.png']}]}, 'missing_file'),
  ({'spans': [{'video': [], 'fps': 1}, {'text': 'a', 'trained': True}]}, 'no_frames'),
  ({'spans': [{'video': ['images/a.png']}, {'text': 'a', 'trained': True}]}, 'bad_rate'),
  ({'spans': [{'video': 'half.png'}, {'text': 'a', 'trained': True}]}, 'not_video'),
  ({'spans': [{'audio': 'half.png'}, {'text': 'a', 'trained': True}]}, 'not_audio'),
  ({'spans': [{'text': 'a', 'trained': True}], 'split': '../x'}, 'bad_split'),
  ({'spans': [{'text': 'a', 'trained': True}], 'split': 3}, 'bad_split'),
]  # fmt: skip


def test_bad_lines_are_counted_and_named(folder):
  (folder.parent / 'secret.png').write_bytes(png('red'))
  (folder / 'link.png').symlink_to(folder.parent / 'secret.png')
  rng = np.random.default_rng(0)
  file = io.BytesIO()
  PIL.Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(file, 'PNG')
  (folder / 'half.png').write_bytes(file.getvalue()[:1000])
  write(folder, *(line for line, _ in BAD), mode='a')
  meta = run(folder, max_dropped=1)
  want = collections.Counter(reason for _, reason in BAD if reason)
  assert meta['dropped'] == dict(sorted(want.items()))
  assert meta['splits']['train']['documents'] == 3
  assert meta['dropped_first']['bad_json'].startswith('d.jsonl line 4: ')
  assert meta['dropped_first']['not_image'].startswith('26: ')
  assert f'  first bad_json: {meta["dropped_first"]["bad_json"]}' in report(meta)


def test_each_bad_line_has_its_reason(folder):
  (folder.parent / 'secret.png').write_bytes(png('red'))
  (folder / 'link.png').symlink_to(folder.parent / 'secret.png')
  (folder / 'half.png').write_bytes(b'half')
  late = ('bad_branch', 'empty', 'nothing_trained', 'not_image', 'truncated_image', None,
          'no_frames', 'bad_rate', 'not_video', 'not_audio')  # fmt: skip
  for line, reason in BAD:
    write(folder, line)
    ((_, got),) = sources.build(f'jsonl:{folder / "d.jsonl"}').records()
    if reason in late:  # these are found when lengths are measured
      assert isinstance(got, Document)
    else:
      assert isinstance(got, BadDocument) and got.reason == reason, line
      assert '\n' not in str(got)


def test_images_above_the_limit_are_dropped(folder):
  meta = run(folder, max_pixels=15)
  assert meta['dropped'] == {'too_many_pixels': 1}
  assert [d.id for d in iterate(folder / 'out')] == ['second']


def iterate(path, split='train'):
  data = Dataset(path, split)
  return [data[i] for i in range(len(data))]


def test_splits_can_be_chosen(folder):
  assert list(run(folder, splits=('test',))['splits']) == ['test']
  source = f'jsonl:{folder / "d.jsonl"}'
  refuses("nothing usable in split 'dev'", source, folder / 'o2', splits=('dev', 'test'))
  assert not (folder / 'o2').exists()


def test_a_source_of_nothing_is_an_error(folder):
  write(folder, {'spans': []})
  refuses(
    'nothing usable; .*dropped: 1 empty', f'jsonl:{folder / "d.jsonl"}', folder / 'o'
  )


def test_bpe_is_trained_on_the_first_split_alone(folder):
  write(folder, *[{'spans': [{'text': 'zebra zebra', 'trained': True}]}] * 9)
  run(folder, tokenizer='bpe:300')
  alone = Dataset(folder / 'out', 'train').tokenizer.hash
  other = {'spans': [{'text': 'giraffe giraffe', 'trained': True}], 'split': 'test'}
  write(folder, '{', *[other] * 9, mode='a')
  prepare(
    f'jsonl:{folder / "d.jsonl"}', folder / 'o2', tokenizer='bpe:300', progress=False
  )
  data = Dataset(folder / 'o2', 'train')
  assert data.tokenizer.hash == alone
  assert len(data.tokenizer.encode('zebra')) == 1


def test_what_is_there_is_reused_if_made_the_same_way(folder, monkeypatch):
  first = run(folder, tokenizer='bpe:300')
  before = (folder / 'out' / 'meta.json').stat().st_mtime_ns
  monkeypatch.setattr(prepare_lib.writer_lib, 'Place', None)
  assert run(folder, tokenizer='bpe:300') == first
  assert (folder / 'out' / 'meta.json').stat().st_mtime_ns == before
  source = f'jsonl:{folder / "d.jsonl"}'
  refuses(
    "tokenizer='bpe:300', not 'bytes'; remove it",
    source,
    folder / 'out',
    tokenizer='bytes',
  )
  refuses('max_pixels=', source, folder / 'out', tokenizer='bpe:300', max_pixels=9)
  refuses("source='jsonl:.*, not 'easy_vqa'", 'easy_vqa', folder / 'out')
  # The source may be gone; but if it has changed, the data is of something else.
  content = (folder / 'd.jsonl').read_bytes()
  (folder / 'd.jsonl').unlink()
  assert run(folder, tokenizer='bpe:300') == first
  (folder / 'd.jsonl').write_bytes(content + b'\n')
  refuses('fingerprint=', source, folder / 'out', tokenizer='bpe:300')


def test_two_at_once_prepare_it_once(folder):
  with concurrent.futures.ThreadPoolExecutor() as pool:
    one, other = [pool.submit(run, folder) for _ in range(2)]
  assert one.result() == other.result()
  assert sorted(p.name for p in folder.iterdir()) == ['d.jsonl', 'images', 'out']


def test_other_things_at_the_place_are_left_alone(folder):
  (folder / 'out').mkdir()
  (folder / 'out' / 'thesis.txt').write_text('')
  with pytest.raises(InUse, match='is there already'):
    run(folder)
  assert [p.name for p in (folder / 'out').iterdir()] == ['thesis.txt']


@pytest.mark.parametrize(
  'source, options, match',
  [
    ('csv:a', {}, 'choose among: coco, easy_vqa, emoji, html, jsonl, .*webdataset'),
    ('jsonl', {}, 'should read jsonl:FILE'),
    ('easy_vqa:1', {}, 'should read easy_vqa'),
    ('jsonl:nowhere.jsonl', {}, 'no such file'),
    ('jsonl:a', {'image': 'x'}, "no option 'image'; there are: none"),
    ('tfds:a', {'imag': 'x'}, "no option 'imag'; there are: data_dir, image"),
  ],
)
def test_wrong_sources_are_one_line(tmp_path, source, options, match):
  refuses(match, source, tmp_path / 'o', **options)
  assert list(tmp_path.iterdir()) == []


def test_command_line(folder, capsys):
  args = [
    f'jsonl:{folder / "d.jsonl"}',
    '--out',
    str(folder / 'o'),
    '--splits=train,test',
  ]
  assert prepare_lib.main(args) == 0
  out = capsys.readouterr().out
  assert 'train: 2 documents, 5 spans, ' in out and 'dropped: none' in out
  assert prepare_lib.main(['csv:a', '--out', str(folder / 'p')]) == 1
  captured = capsys.readouterr()
  assert captured.err.startswith("prepare: source 'csv:a'; choose")
  assert captured.err.count('\n') == 1


def test_easy_vqa_has_all_questions(tmp_path):
  easy_vqa = pytest.importorskip('easy_vqa', reason='needs the package easy-vqa')
  meta = prepare('easy_vqa', tmp_path / 'd', tokenizer='bpe:512', progress=False)
  assert meta['dropped'] == {}
  for split, images, questions in (('train', 4000, 38575), ('test', 1000, 9673)):
    data = Dataset(tmp_path / 'd', split)
    assert len(data) == images
    turns, types = [], collections.defaultdict(set)
    for document in iterate(tmp_path / 'd', split):
      image, *texts = document.spans
      assert isinstance(image, Image)
      asked, answers = texts[::2], texts[1::2]
      assert not any(t.trained for t in asked) and all(t.trained for t in answers)
      branches = list(range(1, 1 + len(asked)))  # no question sees another
      assert [t.branch for t in asked] == [t.branch for t in answers] == branches
      number = int(document.id.removeprefix(f'{split}/'))
      turns += [(a.text, b.text.strip(), number) for a, b in zip(asked, answers)]
      for kind, answer in zip(document.meta['types'], answers, strict=True):
        types[kind].add(answer.text.strip())
    asked, answers, numbers = getattr(easy_vqa, f'get_{split}_questions')()
    assert len(turns) == questions
    assert sorted(turns) == sorted(zip(asked, answers, numbers))
    shapes = {'circle', 'rectangle', 'triangle'}
    assert types == {
      'shape': shapes,
      'color': set(easy_vqa.get_answers()) - shapes - {'yes', 'no'},
      'yes/no: shape': {'yes', 'no'},
      'yes/no: color': {'yes', 'no'},
    }
    # An answer is one token, and a question is few.
    ids = data.tokenizer.encode_batch([f' {a}' for a in easy_vqa.get_answers()])
    assert all(len(one) == 1 for one in ids)
    assert data.index.text_tokens.sum() / questions < 9.5
    made = to_example(
      data[0],
      tokenizer=data.tokenizer,
      rules={'image': ImageRule(8, 'fixed', 64)},
      slots=lambda item: item.grid,
    )
    assert len(made) == 64 + data.index.text_tokens[0]


def test_easy_vqa_missing_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'easy_vqa', None)
  refuses(r"pip install 'mmjax\[quickstart\]'", 'easy_vqa', tmp_path / 'o')


TFDS = """
import io, sys
import tensorflow_datasets as tfds
from mmjax.data import prepare

class TinyPairs(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    image = tfds.features.Image(shape=(None, None, 3))
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
      'image': image,
      'images': tfds.features.Sequence(image),
      'label': tfds.features.ClassLabel(names=['red', 'blue']),
      'question': tfds.features.Text(),
      'answers': tfds.features.Sequence(tfds.features.Text()),
    }))

  def _split_generators(self, manager):
    return {'train': self._generate_examples(3), 'test': self._generate_examples(2)}

  def _generate_examples(self, n):
    for i in range(n):
      def png():
        return io.BytesIO(open(f'{sys.argv[1]}/{i}.jpg', 'rb').read())
      yield i, {'image': png(), 'images': [png() for _ in range(i)], 'label': i % 2,
                'question': f'what is {i}?', 'answers': ['a', 'b'][:i]}

where = ['--tfds-data-dir', sys.argv[1], '--workers=0']
for name, args in {
  'labels': ['--tfds-prompt=question', '--tfds-text=label'],
  'several': ['--tfds-image=images', '--tfds-text=answers', '--splits=train'],
  'none': ['--tfds-text=caption'],
  'uneven': ['--tfds-prompt=question', '--tfds-text=answers', '--max-dropped=1'],
}.items():
  print(name, prepare.main(['tfds:tiny_pairs', '--out', f'{sys.argv[1]}/{name}',
                            *where, *args]))
print('nowhere', prepare.main(['tfds:no_such_set', '--out', f'{sys.argv[1]}/no', *where]))
print('tensorflow', 'tensorflow' in sys.modules)
"""


def test_tfds_features_become_spans(tmp_path):
  """In a process of its own: TFDS warns while it is imported."""
  files = [png('red', (4, 4 + i), 'JPEG') for i in range(3)]
  for i in range(3):
    (tmp_path / f'{i}.jpg').write_bytes(files[i])
  done = subprocess.run(
    [sys.executable, '-c', TFDS, str(tmp_path)],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  results = dict(
    line.split() for line in done.stdout.splitlines() if line.count(' ') == 1
  )
  want = dict(labels='0', several='0', none='1', uneven='0', nowhere='1')
  assert {name: results[name] for name in want} == want, done.stderr
  assert results['tensorflow'] == 'False'
  errors = [line for line in done.stderr.splitlines() if line.startswith('prepare: ')]
  assert "no feature 'caption'; there are: " in errors[0]
  assert 'no_such_set' in errors[1] and len(errors) == 2

  by_height = {}
  for document in iterate(tmp_path / 'labels'):
    image, prompt, answer = document.spans
    i = decode_image(image.content).shape[0] - 4
    assert image.content == files[i]  # stored as it was
    assert prompt == Text(f'what is {i}?')
    by_height[i] = answer
  assert by_height == {i: Text([' red', ' blue'][i % 2], True) for i in range(3)}
  assert len(Dataset(tmp_path / 'labels', 'test')) == 2

  several = sorted(iterate(tmp_path / 'several'), key=lambda d: len(d.spans))
  kinds = [[type(span) for span in document.spans] for document in several]
  assert kinds == [[Image, Text], [Image, Image, Text, Text]]
  assert several[1].spans[2:] == (Text('a', True, 1), Text('b', True, 2))
  meta = json.loads((tmp_path / 'several' / 'meta.json').read_text())
  assert meta['dropped'] == {'empty': 1} and list(meta['splits']) == ['train']
  uneven = json.loads((tmp_path / 'uneven' / 'meta.json').read_text())
  assert uneven['dropped'] == {'bad_record': 3}  # 0 or 2 answers to one question


def test_sources_are_plain_data():
  for name, cls in sources.SOURCES.items():
    assert dataclasses.is_dataclass(cls), name


def test_delimiters_stand_in_the_documents_and_in_the_lengths(folder):
  texts = ['what? a b c']
  made = tokenizer_lib.train_bpe(texts, 270)
  library = tokenizers.Tokenizer.from_str(made._content.decode())
  library.add_special_tokens(['<s>', '</s>'])
  library.save(str(folder / 't.json'))
  spec = dict(tokenizer=str(folder / 't.json'), end='</s>')
  run(folder, delimiters='llama', **spec)
  data = Dataset(folder / 'out', 'train')
  first = data[0].spans[0]
  assert (first.text, first.special, first.trained) == ('<s>', True, False)
  begin = data.tokenizer.token_id('<s>')
  example = to_example(
    data[0], tokenizer=data.tokenizer, rules={'image': ImageRule(2, 'fixed', size=4)},
    slots=lambda item: item.grid,
  )  # fmt: skip
  assert example.tokens[0] == begin and list(example.tokens).count(begin) == 1
  assert len(example) == data.index.text_tokens[0] + 4
  with pytest.raises(ValueError, match='was prepared with delimiters='):
    run(folder, **spec)
  with pytest.raises(ValueError, match="the tokenizer has no special token '<s>'"):
    prepare(f'jsonl:{folder / "d.jsonl"}', folder / 'b', delimiters='llama')


def test_dialogues_are_written_by_a_template(folder):
  run(folder, chat_template='plain')
  spans = Dataset(folder / 'out', 'train')[0].spans
  assert [(s.text, s.trained) for s in spans[1:]] == [('what?', False), ('a', True)]
  with pytest.raises(ValueError, match="no special token '<.im_start.>'"):
    prepare(f'jsonl:{folder / "d.jsonl"}', folder / 'b', chat_template='chatml')
  with pytest.raises(ValueError, match="unknown chat template 'chatlm'"):
    prepare(f'jsonl:{folder / "d.jsonl"}', folder / 'b', chat_template='chatlm')
