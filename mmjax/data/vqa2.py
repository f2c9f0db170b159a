"""VQA v2 (1612.00837): an image, then questions that don't see each other.

  v2_OpenEnded_mscoco_train2014_questions.json    {"data_subtype": "train2014",
      "questions": [{"image_id": 458752, "question": "What is ...?", "question_id": ...}]}
  v2_mscoco_train2014_annotations.json            {"annotations": [{"question_id": ...,
      "multiple_choice_answer": "net", "answers": [{"answer": "net", ...}, ten of them],
      "question_type": "what is this", "answer_type": "other", "image_id": 458752}]}
  train2014/COCO_train2014_000000458752.jpg

Trained is the most frequent answer. All ten go along, so that answers can be scored as
the set does: min(people who gave it / 3, 1).
"""

import collections
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

from mmjax.data import paths
from mmjax.data.annotations import Annotations
from mmjax.data.document import BadDocument, Document, Image
from mmjax.data.folder import Folder
from mmjax.data.layouts import branches


@dataclasses.dataclass(frozen=True)
class Vqa2(Annotations):
  """Images in the order of their first question, with all their questions.

  files: 'QUESTIONS.json,ANNOTATIONS.json'; both patterns, see `paths.expand`.
  images: the folder (or .tar, .zip) of images; by default the folder that the questions
    call their data_subtype (train2014), beside them. Names are those of COCO 2014
    (COCO_train2014_000000458752.jpg) or of 2017 (000000458752.jpg).
  split, test_share: see `source.Files`.

  A document's meta has, one for each question: 'types' (yes/no, number, other),
  'question_types', 'question_ids' and 'answers' (the ten, as a JSON list).

  Dropped by reason: 'no_text' (a question without an annotation), 'empty_text',
  'unknown_question' (an annotation without one), 'missing_file', 'bad_json'.
  """

  files: str
  images: str | None = None
  split: str | None = None
  test_share: float = 0.0

  def sets(self) -> list[tuple[str, ...]]:
    both = _both(self.files)
    if len(both) != 2:
      raise ValueError(
        f'source vqa2: {self.files!r} should read QUESTIONS.json,ANNOTATIONS.json'
      )
    questions, annotations = (paths.expand(one) for one in both)
    if len(questions) != len(annotations):
      raise ValueError(
        f'source vqa2: {len(questions)} files of questions, {len(annotations)} of '
        'annotations'
      )
    return list(zip(questions, annotations))

  def name(self, file: str) -> str:
    return paths.relative(file, _both(self.files)[0])

  @staticmethod
  def entries(*trees: Any) -> list[Any]:
    """(subset, image's number, [(question, kinds, answer, ten), ...]) of each image."""
    questions, annotations = trees
    try:
      subset = str(questions['data_subtype'])
      answers = {one['question_id']: one for one in annotations['annotations']}
      images, bad = collections.defaultdict(list), []
      for one in questions['questions']:
        found = answers.pop(one['question_id'], None)
        if found is None:
          bad.append(BadDocument('no_text', f'question {one["question_id"]}'))
          continue
        kinds = str(found['answer_type']), str(found['question_type'])
        gold = str(found['multiple_choice_answer']).strip()
        ten = [str(answer['answer']) for answer in found['answers']]
        if not str(one['question']).strip() or not gold:
          bad.append(BadDocument('empty_text', f'question {one["question_id"]}'))
          continue
        images[int(one['image_id'])].append((one, kinds, gold, ten))
    except (KeyError, TypeError, ValueError) as error:
      raise BadDocument(
        'bad_json',
        f'no questions and answers as of VQA v2: {type(error).__name__} {error}',
      ) from None
    bad += [BadDocument('unknown_question', f'annotation {key}') for key in answers]
    return [(subset, image, turns) for image, turns in images.items()] + bad

  def name_of(self, entry: Any, file: str, number: int) -> str:
    return f'{self.name(file)}#{entry[1]}'

  def documents(self, entry: Any, file: str, name: str) -> Iterator[Document]:
    subset, image, turns = entry
    folder = f'{paths.parent(file)}/{subset}' if self.images is None else self.images
    content = _read(Folder(folder), subset, image)
    pairs = [(str(one['question']).strip(), gold) for one, _, gold, _ in turns]
    meta = {
      'types': [kind for _, (kind, _), _, _ in turns],
      'question_types': [kind for _, (_, kind), _, _ in turns],
      'question_ids': [str(one['question_id']) for one, _, _, _ in turns],
      'answers': [json.dumps(ten, ensure_ascii=False) for _, _, _, ten in turns],
    }
    yield Document(tuple(branches([Image(content)], pairs)), name, meta)


def _both(files: str) -> list[str]:
  return re.split(r',(?![^{}]*})', files)  # not at commas in braces


def _read(folder: Folder, subset: str, image: int) -> bytes:
  try:
    return folder.read(f'COCO_{subset}_{image:012d}.jpg')
  except BadDocument as error:
    try:
      return folder.read(f'{image:012d}.jpg')
    except BadDocument:
      raise error from None
