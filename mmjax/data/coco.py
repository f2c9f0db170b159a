"""COCO's captions (1504.00325): an image, five captions that don't see each other.

  annotations/captions_train2017.json        {"images": [{"id", "file_name", ...}, ...],
  train2017/000000391895.jpg                  "annotations": [{"image_id", "caption"}]}

The same layout serves Flickr30k, NoCaps and others that were put into it.
"""

import collections
import dataclasses
import posixpath
import re
from collections.abc import Iterator
from typing import Any

from mmjax.data import paths
from mmjax.data.annotations import Annotations
from mmjax.data.document import BadDocument, Document, Image
from mmjax.data.folder import Folder
from mmjax.data.layouts import branches


@dataclasses.dataclass(frozen=True)
class Coco(Annotations):
  """Images in the order of the file, with all their captions as branches.

  files: captions_*.json; a pattern, see `paths.expand`.
  images: the folder (or .tar, .zip) of the images; by default, of
    annotations/captions_NAME.json, the folder NAME beside annotations.
  split, test_share: see `source.Files`.

  Dropped by reason: 'no_text' (an image without captions), 'empty_text' (captions),
  'unknown_image' (captions of none), 'missing_file', 'path_outside', 'bad_json'.
  """

  files: str
  images: str | None = None
  split: str | None = None
  test_share: float = 0.0

  @staticmethod
  def entries(*trees: Any) -> list[Any]:
    """(file name, captions) of each image, then captions of none."""
    (tree,) = trees
    try:
      files = {image['id']: str(image['file_name']) for image in tree['images']}
      captions = collections.defaultdict(list)
      for one in tree['annotations']:
        captions[one['image_id']].append(str(one['caption']))
    except (KeyError, TypeError) as error:
      raise BadDocument(
        'bad_json', f'no captions as of COCO: {type(error).__name__} {error}'
      ) from None
    entries = [(name, captions.get(key, [])) for key, name in files.items()]
    for key in captions.keys() - files.keys():
      error = BadDocument('unknown_image', f'captions of image {key!a}')
      entries += [error] * len(captions[key])
    return entries

  def name_of(self, entry: Any, file: str, number: int) -> str:
    return f'{self.name(file)}/{entry[0]}'

  def documents(self, entry: Any, file: str, name: str) -> Iterator[Document]:
    image, captions = entry
    texts = [text for caption in captions if (text := caption.strip())]
    if not texts:
      reason = 'empty_text' if captions else 'no_text'
      raise BadDocument(reason, 'an image without captions')
    content = Folder(self._images(file)).read(image)
    pairs = [('', text) for text in texts]
    yield Document(tuple(branches([Image(content)], pairs)), name)
    for _ in captions[len(texts) :]:
      yield BadDocument('empty_text', f'{name}: a caption without text')

  def _images(self, file: str) -> str:
    if self.images is not None:
      return self.images
    named = re.search(r'_([^_]+)\.json$', posixpath.basename(file))
    root = paths.parent(paths.parent(paths.absolute(file)))
    return f'{root}/{named[1]}' if named else paths.parent(file)
