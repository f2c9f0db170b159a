"""Dialogues in LLaVA's JSON and its kin; made here."""

import json
import tarfile

import pytest
from published import found, picture, reasons, write_json

from mmjax.data import sources
from mmjax.data.document import BadDocument
from mmjax.data.layouts import branches, dialogue, interleaved
from mmjax.data.llava import Llava
from mmjax.data.prepare import prepare

A, B = picture(1), picture(2)


def says(*turns):
  return [
    {'from': ('human', 'gpt')[i % 2], 'value': turn} for i, turn in enumerate(turns)
  ]


def entry(i, *turns, **more):
  return {'id': f'{i:012d}', 'image': 'coco/train2017/a.jpg'} | more | {
    'conversations': says(*turns)
  }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
  (tmp_path / 'coco' / 'train2017').mkdir(parents=True)
  (tmp_path / 'coco' / 'train2017' / 'a.jpg').write_bytes(A)
  (tmp_path / 'b.png').write_bytes(B)
  return tmp_path


def test_marks_are_where_the_images_stand(folder):
  two = ['coco/train2017/a.jpg', 'b.png']
  write_json(folder / 'llava_v1_5_mix665k.json', [
    entry(0, '<image>\nWhat is it?', 'A bus.', 'Is it red?', ' Yes.'),
    entry(1, 'Describe it.\n<image>', 'A bus.'),
    entry(2, '<image> or <image>?', 'The first.', image=two),
    entry(3, 'before <image>', 'one', 'and <image>', 'two', images=two, image=None),
    {'id': 'text only', 'conversations': says('Hi', 'Ho')},
  ])  # fmt: skip
  good, bad = found(f'llava:{folder}/llava_v1_5_mix665k.json')
  assert reasons(bad) == ['image_marks']  # 3: "image" is there, and null
  assert [s for _, s in good.values()] == [
    [(A, 0), ('\nWhat is it?', False, 0), (' A bus.', True, 0), ('Is it red?', False, 0),
     (' Yes.', True, 0)],
    [('Describe it.\n', False, 0), (A, 0), ('A bus.', True, 0)],
    [(A, 0), (' or ', False, 0), (B, 0), ('?', False, 0), (' The first.', True, 0)],
    [('Hi', False, 0), (' Ho', True, 0)],
  ]  # fmt: skip
  assert list(good)[0] == 'llava_v1_5_mix665k.json#0'


def test_messages(folder):
  user, tom = {'role': 'user'}, {'role': 'assistant', 'content': 'Tom'}
  parts = [{'type': 'image', 'image': 'b.png'}, {'type': 'text', 'text': 'Who?'}]
  url = [{'type': 'image_url', 'image_url': {'url': 'b.png'}}]
  write_json(folder / 'x.json', [
    {'messages': [{**user, 'content': '<image>Who?'}, tom], 'images': ['b.png']},
    {'messages': [{'role': 'system', 'content': 'Be kind.'}, {**user, 'content': parts},
                  {'role': 'assistant', 'content': [{'type': 'text', 'text': 'Tom'}]}]},
    {'messages': [{**user, 'content': [{'type': 'image'}, parts[1]]}, tom],
     'images': ['b.png']},
    {'messages': [{**user, 'content': url + parts[1:]}, tom]},
  ])  # fmt: skip
  good, bad = found(f'llava:{folder}/x.json')
  want = [(B, 0), ('Who?', False, 0), (' Tom', True, 0)]
  system = [('Be kind.', False, 0), *want]
  assert [s for _, s in good.values()] == [want, system, want, want] and not bad
  documents = [d for _, d in sources.build(f'llava:{folder}/x.json').records()]
  assert documents[1].meta == {'roles': ['system', 'user', 'user', 'assistant']}


def test_what_cannot_be_used_is_counted(folder):
  (folder / 'secret').symlink_to('/etc/hostname')
  q = '<image>Q'
  entries = {
    'image_marks': [entry(0, '<image><image>', 'A'), entry(0, 'no mark', 'A')],
    'missing_file': [entry(0, q, 'A', image='no.png'), entry(0, q, 'A', image=[7]),
                     entry(0, q, 'A', image='coco')],
    'path_outside': [entry(0, q, 'A', image=i) for i in ('../a', '/etc/x', 'secret')],
    'image_remote': [entry(0, q, 'A', image='http://a/b.jpg')],
    'empty_text': [entry(0, q, ' \n')],
    'unknown_role': [{'conversations': [{'from': 'observer', 'value': 'x'}]}],
    'bad_turn': [7, {}, {'conversations': []}, {'conversations': ['x']},
                 {'messages': [{'role': 'user', 'content': None}]},
                 {'messages': [{'role': 'user', 'content': [{'type': 'text'}]}]}],
    'unsupported_video': [entry(0, '<video>Q', 'A'), entry(0, 'Q', 'A', video='a.mp4'),
                          {'messages': [{'role': 'user',
                                         'content': [{'type': 'video'}]}]}],
    'unsupported_audio': [entry(0, '<audio>Q', 'A')],
  }  # fmt: skip
  write_json(folder / 'x.json', [e for some in entries.values() for e in some])
  good, bad = found(f'llava:{folder}/x.json')
  assert not good
  assert reasons(bad) == sorted(r for r, some in entries.items() for _ in some)
  assert all(error.message.startswith('x.json#') for error in bad)


def test_pieces_total_splits_and_files(folder):
  write_json(folder / 'train.json', [entry(i, f'<image>{i}', 'A') for i in range(1100)])
  write_json(folder / 'val.json', [entry(i, '<image>', 'A') for i in range(3)])
  (folder / 'broken.json').write_text('[{')
  write_json(folder / 'object.json', {'a': 1})
  spec = f'llava:{folder}/{{train,val}}.json'
  source = sources.build(spec)
  want = [f'{folder}/{p}' for p in ('train.json#0', 'train.json#512', 'train.json#1024',
                                    'val.json#0')]  # fmt: skip
  assert source.pieces() == want and source.pieces(['val']) == want[3:]
  assert (source.total(), source.total(['val'])) == (1103, 3)
  counts = [len(list(source.read(piece))) for piece in want]
  assert counts == [512, 512, 76, 3]
  before = source.fingerprint()
  write_json(folder / 'val.json', [])
  assert source.fingerprint() != before and source.total() == 1100
  good, bad = found(f'llava:{folder}/*.json')
  assert len(good) == 1100 and reasons(bad) == ['bad_json'] * 2
  for name, match in (('broken', 'broken.json: Expecting'), ('object', 'no list')):
    with pytest.raises(ValueError, match=match):
      found(f'llava:{folder}/{name}.json')
  pieces = source.pieces()
  (folder / 'train.json').unlink()
  records = [r for piece in pieces for _, r in source.read(piece)]
  assert [r.reason for r in records] == ['missing_file'] * 3
  assert Llava(str(folder / 'no')).fingerprint() is None


def test_held_out_dialogues_are_not_read(folder):
  names = [f'{i}.png' for i in range(40)]
  write_json(folder / 'x.json', [entry(i, '<image>', 'A', image=n)
                                 for i, n in enumerate(names)])  # fmt: skip
  for name in names:
    (folder / name).write_bytes(A)
  spec = f'llava:{folder}/x.json'
  assert sources.build(spec, test_share=0.25).total(['train']) is None
  test = found(spec, ['test'], test_share=0.25)[0]
  assert 3 < len(test) < 20 and {s for s, _ in test.values()} == {'test'}
  for i, name in enumerate(names):
    if f'x.json#{i}' not in test:
      (folder / name).unlink()
  assert found(spec, ['test'], test_share=0.25) == (test, [])


def test_lines_and_a_tar_of_images(folder):
  lines = [json.dumps(entry(i, '<image>', 'A', image='b.png')) for i in range(3)]
  (folder / 'x.jsonl').write_text('\n'.join([*lines[:2], '', '{', lines[2]]))
  with tarfile.open(folder / 'images.tar', 'w') as tar:
    tar.add(folder / 'b.png', 'b.png')
  (folder / 'b.png').unlink()
  good, bad = found(f'llava:{folder}/x.jsonl', images=str(folder / 'images.tar'))
  assert list(good) == [f'x.jsonl#{i}' for i in (1, 2, 5)]
  assert good['x.jsonl#5'][1] == [(B, 0), ('A', True, 0)]
  assert reasons(bad) == ['bad_json'] and bad[0].message.startswith('x.jsonl#4: ')
  assert sources.build(f'llava:{folder}/x.jsonl').total() is None
  write_json(folder / 'y.json', [entry(0, '<image>', 'A', image='b.png')])
  good, _ = found(f'llava:{folder}/{{x.jsonl,y.json}}', images=f'{folder}/images.tar')
  assert len(good) == 4


def test_prepares(folder):
  write_json(folder / 'x.json', [entry(0, '<image>\nQ?', 'A'), entry(1, 'Q', 'A')])
  meta = prepare(f'llava:{folder}/x.json', folder / 'out', progress=False)
  assert meta['splits']['train']['image'] == 1
  assert meta['dropped'] == {'image_marks': 1}
  assert meta['dropped_first']['image_marks'] == 'x.json#1: 0 marks for 1 images'


def test_an_index_beyond_the_images_is_counted():
  turn = {'role': 'user', 'content': [{'type': 'image', 'index': 1}]}
  with pytest.raises(BadDocument, match='image_marks'):
    dialogue([turn], ['a'], str.encode)
  turn['content'][0]['index'] = 0
  spans, _ = dialogue([turn], ['a'], str.encode)
  assert [s.content for s in spans] == [b'a']


def test_spans_of_layouts():
  spans = branches([], [('', 'a'), ('q', 'b')])
  assert [(s.text, s.branch) for s in spans] == [('a', 0), ('q', 0), (' b', 0)]
  loaded = []
  with pytest.raises(BadDocument, match='2 marks for 1 images'):
    dialogue(says('<image><image>', 'x'), ['a'], loaded.append)
  assert not loaded  # nothing is read in vain
  assert dialogue([], [], loaded.append) == ([], [])
  assert interleaved([]) == [] and interleaved([' ', '']) == []
