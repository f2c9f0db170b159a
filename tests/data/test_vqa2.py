"""VQA v2's questions and annotations; made here."""

import json

import pytest
from published import found, picture, reasons, write_json

from mmjax.data import sources
from mmjax.data.prepare import prepare
from mmjax.data.store import Dataset
from mmjax.eval.prompts import questions


def vqa(root, subset='train2014', images=2, each=3):
  """Files named and laid out as those of visualqa.org."""
  asked, answered = [], []
  (root / subset).mkdir(parents=True, exist_ok=True)
  for i in range(images):
    image = 458752 + i
    (root / subset / f'COCO_{subset}_{image:012d}.jpg').write_bytes(picture(i))
    for k in range(each):
      key = image * 1000 + k
      asked.append({'image_id': image, 'question': f'Is it {k}?', 'question_id': key})
      ten = ['yes'] * 6 + ['no'] * 3 + ['maybe é']
      answered.append({
        'question_type': 'is it', 'multiple_choice_answer': 'yes', 'image_id': image,
        'answers': [{'answer': a, 'answer_confidence': 'yes', 'answer_id': n + 1}
                    for n, a in enumerate(ten)],
        'answer_type': 'yes/no', 'question_id': key,
      })  # fmt: skip
  head = {'info': {'version': '2.0'}, 'data_type': 'mscoco', 'data_subtype': subset,
          'license': {}}  # fmt: skip
  q = root / f'v2_OpenEnded_mscoco_{subset}_questions.json'
  a = root / f'v2_mscoco_{subset}_annotations.json'
  write_json(q, {**head, 'task_type': 'Open-Ended', 'questions': asked})
  write_json(a, {**head, 'annotations': answered[::-1]})
  return q, a


def test_questions_of_an_image_are_branches(tmp_path):
  q, a = vqa(tmp_path)
  good, bad = found(f'vqa2:{q},{a}')
  assert list(good) == [f'{q.name}#458752', f'{q.name}#458753'] and not bad
  split, spans = good[f'{q.name}#458753']
  assert split == 'train' and spans[0] == (picture(1), 0)
  assert spans[1:] == [
    turn
    for k in range(3)
    for turn in ((f'Is it {k}?', False, k + 1), (' yes', True, k + 1))
  ]
  prepare(f'vqa2:{q},{a}', tmp_path / 'out', progress=False)
  document = Dataset(tmp_path / 'out', 'train')[0]
  ten = json.loads(document.meta['answers'][1])
  assert len(ten) == 10 and ten.count('yes') == 6 and ten[-1] == 'maybe é'
  assert document.meta['question_types'] == ['is it'] * 3
  assert document.meta['question_ids'] == ['458752000', '458752001', '458752002']
  assert [(x.answer, x.type) for x in questions(document)] == [('yes', 'yes/no')] * 3


def test_several_splits_and_other_images(tmp_path):
  vqa(tmp_path)
  vqa(tmp_path, 'val2014', 1, 2)
  spec = (f'vqa2:{tmp_path}/v2_OpenEnded_mscoco_{{train,val}}2014_questions.json,'
          f'{tmp_path}/v2_mscoco_{{train,val}}2014_annotations.json')  # fmt: skip
  good, bad = found(spec)
  assert [s for s, _ in good.values()] == ['train', 'train', 'val'] and not bad
  assert sources.build(spec).total(['val']) == 1
  folder = tmp_path / 'val2017'
  folder.mkdir()
  old = tmp_path / 'val2014' / 'COCO_val2014_000000458752.jpg'
  old.rename(folder / '000000458752.jpg')
  assert found(spec, ['val'])[1][0].reason == 'missing_file'
  one = found(spec, ['val'], images=str(folder))[0]
  assert one == {k: v for k, v in good.items() if v[0] == 'val'}


def test_what_cannot_be_used_is_counted(tmp_path):
  q, a = vqa(tmp_path, images=3)
  asked, answered = json.loads(q.read_text()), json.loads(a.read_text())
  asked['questions'][0]['question_id'] = 7
  asked['questions'][1]['question'] = ' '
  answered['annotations'][0]['multiple_choice_answer'] = ''
  write_json(q, asked), write_json(a, answered)
  (tmp_path / 'train2014' / 'COCO_train2014_000000458753.jpg').unlink()
  good, bad = found(f'vqa2:{q},{a}')
  assert [len(s) for _, s in good.values()] == [3, 5]
  assert reasons(bad) == ['empty_text'] * 2 + [
    'missing_file',
    'no_text',
    'unknown_question',
  ]
  with pytest.raises(ValueError, match='should read QUESTIONS.json,ANNOTATIONS.json'):
    found(f'vqa2:{q}')
  with pytest.raises(ValueError, match='1 files of questions, 2 of annotations'):
    found(f'vqa2:{q},{tmp_path}/*.json')
  with pytest.raises(ValueError, match='no such file'):
    found(f'vqa2:{q},{tmp_path}/no.json')
  with pytest.raises(ValueError, match="as of VQA v2: KeyError 'data_subtype'"):
    write_json(q, {})
    found(f'vqa2:{q},{a}')
