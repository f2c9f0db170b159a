"""COCO's captions in its own folders; made here."""

import pytest
from published import found, picture, reasons, write_json

from mmjax.data import sources
from mmjax.data.prepare import prepare


def captions(root, subset, number, year='2017'):
  """annotations/captions_SUBSET.json and SUBSET/*.jpg of `number` images."""
  (root / f'{subset}{year}').mkdir(parents=True)
  images, annotations = [], []
  for i in range(number):
    key = 391895 + i
    name = f'{key:012d}.jpg'
    if year == '2014':
      name = f'COCO_{subset}2014_{name}'
    (root / f'{subset}{year}' / name).write_bytes(picture(i))
    images.append({'license': 3, 'file_name': name, 'height': 6, 'width': 8, 'id': key,
                   'coco_url': f'http://images/{name}', 'date_captured': ''})  # fmt: skip
  for k in range(5):  # of an image, they don't stand together
    annotations += [
      {'image_id': i['id'], 'id': 9 * i['id'] + k, 'caption': f'{k} of {i["id"]}. \n'}
      for i in images
    ]
  tree = {'info': {'year': int(year)}, 'images': images, 'licenses': [],
          'annotations': annotations}  # fmt: skip
  write_json(root / 'annotations' / f'captions_{subset}{year}.json', tree)
  return tree


@pytest.mark.parametrize('year', ['2014', '2017'])
def test_five_captions_are_branches(tmp_path, year):
  captions(tmp_path, 'train', 3, year)
  captions(tmp_path, 'val', 2, year)
  spec = f'coco:{tmp_path}/annotations/captions_{{train,val}}{year}.json'
  good, bad = found(spec)
  prefix = 'COCO_train2014_' if year == '2014' else ''
  first = f'captions_train{year}.json/{prefix}000000391895.jpg'
  texts = [(f'{k} of 391895.', True, k + 1) for k in range(5)]
  assert list(good)[0] == first and not bad
  assert good[first] == ('train', [(picture(0), 0), *texts])
  assert [split for split, _ in good.values()] == ['train'] * 3 + ['val'] * 2
  source = sources.build(spec)
  assert (source.total(), source.total(['val'])) == (5, 2)
  moved = (tmp_path / f'val{year}').rename(tmp_path / 'pictures')
  assert found(spec, ['val'], images=str(moved))[0] == {
    k: v for k, v in good.items() if v[0] == 'val'
  }
  meta = prepare(spec, tmp_path / 'out', progress=False, splits=('train',))
  assert meta['splits']['train']['documents'] == 3


def test_what_cannot_be_used_is_counted(tmp_path):
  tree = captions(tmp_path, 'train', 4)
  first, second, third, _ = tree['images']
  third['file_name'] = '../annotations/captions_train2017.json'
  (tmp_path / 'train2017' / second['file_name']).unlink()
  for one in tree['annotations']:
    if one['image_id'] == first['id']:
      one['caption'] = one['caption'] if one['caption'][0] in '02' else ' '
  tree['images'].append({'id': 1, 'file_name': 'lonely.jpg'})
  tree['images'].append({'id': 2, 'file_name': 'silent.jpg'})
  tree['annotations'] += [{'image_id': 2, 'caption': ''}, {'image_id': 3, 'caption': 'x'}]
  file = write_json(tmp_path / 'annotations' / 'captions_train2017.json', tree)
  good, bad = found(f'coco:{file}')
  assert len(good) == 2
  spans = good[f'captions_train2017.json/{first["file_name"]}'][1]
  assert [s[-1] for s in spans] == [0, 1, 2]
  assert reasons(bad) == sorted(
    ['missing_file', 'path_outside', 'no_text', 'unknown_image'] + ['empty_text'] * 4
  )
  write_json(file, {'images': []})
  with pytest.raises(ValueError, match="no captions as of COCO: KeyError 'annotations'"):
    found(f'coco:{file}')
