"""Pages of Multimodal C4; made here."""

import json
import zipfile

import pytest
from published import found, picture, reasons

from mmjax.data import sources
from mmjax.data.prepare import prepare


def page(texts, images):
  """images: (name, index of its sentence) each."""
  return {
    'url': 'http://a/b', 'text_list': texts, 'could_have_url_duplicate': 0,
    'image_info': [
      {'face_detections': None, 'image_name': name, 'matched_sim': 0.25 + i / 8,
       'matched_text_index': index, 'raw_url': f'http://a/{name}'}
      for i, (name, index) in enumerate(images)],
    'similarity_matrix': [[0.1] * len(texts) for _ in images],
  }  # fmt: skip


def write(folder, pages):
  (folder / 'images').mkdir(exist_ok=True)
  for name, shade in (('a.jpg', 1), ('b.png', 2)):
    (folder / 'images' / name).write_bytes(picture(shade))
  lines = [p if isinstance(p, str) else json.dumps(p) for p in pages]
  (folder / 'docs_no_face_shard_0_v3.jsonl').write_text('\n'.join(lines))
  return f'mmc4:{folder}/docs_no_face_shard_*_v3.jsonl', str(folder / 'images')


A, B = (picture(1), 0), (picture(2), 0)


def test_images_stand_before_their_sentences(tmp_path):
  texts = ['One.', ' Two. ', 'Three.', 'Four.']
  spec, images = write(tmp_path, [
    page(texts, [('b.png', 3), ('a.jpg', 1)]),
    page(texts, [('b.png', 0), ('a.jpg', 0)]),
  ])  # fmt: skip
  good, bad = found(spec, images=images)
  assert list(good) == [f'docs_no_face_shard_0_v3.jsonl#{i}' for i in (1, 2)] and not bad
  first, second = (s for _, s in good.values())
  assert first == [('One.', True, 0), A, ('Two. Three.', True, 0), B, ('Four.', True, 0)]
  assert second == [B, A, ('One. Two. Three. Four.', True, 0)]
  documents = [d for _, d in sources.build(spec, images=images).records()]
  assert documents[0].meta == {'similarities': ['0.375', '0.25']}
  meta = prepare(spec, tmp_path / 'out', progress=False, images=images)
  assert meta['splits']['train']['image'] == 4


def test_what_cannot_be_used_is_counted(tmp_path):
  spec, images = write(tmp_path, [
    page(['x', 'y'], [('a.jpg', 0), ('no.jpg', 1), ('../a', 1), ('b.png', 2),
                      ('b.png', None)]),
    page(['x'], [('no.jpg', 0)]), page(['x'], []), '{', '[]', '{"text_list": ["x"]}', '',
  ])  # fmt: skip
  good, bad = found(spec, images=images)
  assert [s for _, s in good.values()] == [[A, ('x y', True, 0)]]
  assert reasons(bad) == sorted(
    ['missing_file'] * 2 + ['path_outside'] + ['bad_index'] * 2 + ['few_images'] * 2
    + ['bad_json'] + ['bad_line'] * 2
  )  # fmt: skip
  good, _ = found(spec, images=images, min_images=0)
  assert [s for _, s in good.values()][1:] == [[('x', True, 0)]] * 2
  with pytest.raises(ValueError, match='name the folder of images by the option images'):
    found(spec)


def test_shards_as_published_are_zips_of_lines(tmp_path):
  plain, images = write(tmp_path, [page(['One.', 'Two.'], [('b.png', 1), ('a.jpg', 0)])])
  want = found(plain, images=images)[0]
  (shard,) = tmp_path.glob('*.jsonl')
  with zipfile.ZipFile(f'{shard}.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
    archive.write(shard, shard.name)
  with zipfile.ZipFile(tmp_path / 'images.zip', 'w') as archive:
    for file in (tmp_path / 'images').iterdir():
      archive.write(file, file.name)
  (tmp_path / 'docs_no_face_shard_1_v3.jsonl.zip').write_bytes(b'no zip')
  spec = f'mmc4:{tmp_path}/docs_no_face_shard_{{0..2}}_v3.jsonl.zip'
  good, bad = found(spec, images=str(tmp_path / 'images.zip'))
  assert list(good.values()) == list(want.values())
  assert list(good) == ['docs_no_face_shard_0_v3.jsonl.zip#1']
  assert reasons(bad) == ['bad_zip', 'missing_file']
