"""Multimodal C4 (2304.06939): pages as lists of sentences, images matched to some.

  {"text_list": ["A bus.", "It is red.", ...], "url": ...,
   "image_info": [{"image_name": "b9040a0dbb22.jpg", "raw_url": ..., "matched_sim": 0.27,
                   "matched_text_index": 1, ...}, ...],
   "similarity_matrix": [[...], ...]}

  'A bus.', image, 'It is red. ...'

An image stands right before its sentence. Sentences without an image between them are
one text. The set comes as a .jsonl.zip per shard, and has the images' addresses only;
they are fetched by others, under their image_name.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator

from mmjax.data.document import BadDocument, Document, Image
from mmjax.data.folder import Folder
from mmjax.data.layouts import interleaved
from mmjax.data.llava import json_lines
from mmjax.data.source import Files, Found


@dataclasses.dataclass(frozen=True)
class Mmc4(Files):
  """Pages of .jsonl files; all text is trained.

  files: a pattern of docs_*.jsonl.zip, or of .jsonl, see `paths.expand`; a piece is a
    file.
  images: the folder (or .tar or .zip) of the images.
  min_images: pages of fewer are left out.
  split, test_share: see `source.Files`.

  A document's meta has 'similarities', CLIP's of each image and its sentence.

  Dropped by reason: 'missing_file' and 'path_outside' (images), 'bad_index' (an image
  matched to no sentence), 'few_images', 'bad_line', 'bad_json'; of zips 'bad_zip',
  'too_large' and 'path_outside', too.
  """

  files: str
  images: str | None = None
  min_images: int = 1
  split: str | None = None
  test_share: float = 0.0

  def found(self, piece: str, wanted: Callable[[str], bool]) -> Iterator[Found]:
    if self.images is None:
      raise ValueError('source mmc4: name the folder of images by the option images')
    folder = Folder(os.fspath(self.images))
    for number, page in json_lines(piece):
      name = f'{self.name(piece)}#{number}'
      if not wanted(name):
        continue
      bad = [page] if isinstance(page, BadDocument) else []
      if not bad:
        try:
          yield name, self._page(page, folder, name, bad)
        except BadDocument as error:
          bad.append(error)
      for error in bad:
        yield name, BadDocument(error.reason, f'{name}: {error.message}')

  def _page(self, page, folder, name, bad) -> Document:
    try:
      texts = [str(text) for text in page['text_list']]
      infos = [
        (str(i['image_name']), i['matched_text_index'], i.get('matched_sim'))
        for i in page['image_info']
      ]
    except (KeyError, TypeError, AttributeError) as error:
      raise BadDocument('bad_line', f'no page of MMC4: {error}') from None
    before = [[] for _ in texts]
    for image, index, similarity in infos:
      try:
        if type(index) is not int or not 0 <= index < len(texts):
          raise BadDocument('bad_index', f'{image}: {index!a} of {len(texts)} texts')
        before[index].append((Image(folder.read(image)), similarity))
      except BadDocument as error:
        bad.append(error)
    shown = [similarity for some in before for _, similarity in some]
    if len(shown) < self.min_images:
      raise BadDocument('few_images', f'{len(shown)}')
    parts = []
    for text, some in zip(texts, before):
      parts += [*(image for image, _ in some), text]
    meta = {'similarities': [str(one) for one in shown]}
    return Document(tuple(interleaved(parts, ' ')), name, meta)
