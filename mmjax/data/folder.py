"""Images by name: in a folder, or in a tar or zip of one.

  Folder('coco/train2017').read('000000391895.jpg')
  Folder('gs://bucket/mmc4/images.tar').read('b9040a0dbb22.jpg')

A tar is read through once for the places of its members, of a zip the list that it has;
nothing is unpacked.
"""

import dataclasses
import functools
import os
import posixpath
import tarfile

from mmjax.data import paths, zips
from mmjax.data.document import BadDocument


@dataclasses.dataclass(frozen=True)
class Folder:
  """A folder, or a file NAME.tar or NAME.zip."""

  path: str

  def read(self, name: str) -> bytes:
    """The bytes of a file.

    Raises:
      BadDocument: 'missing_file', 'path_outside', or 'image_remote' for a URL; of a
        zip 'too_large' and 'bad_zip'.
      ValueError: a tar or zip that can't be read.
    """
    path = paths.inside(self.path, name)
    try:
      if self.path.endswith('.zip'):
        return zips.read(self.path, posixpath.normpath(name))
      if not self.path.endswith('.tar'):
        return paths.read(path)
      return paths.read(self.path, *_members(self.path)[posixpath.normpath(name)])
    except (FileNotFoundError, KeyError, IsADirectoryError, NotADirectoryError):
      raise BadDocument('missing_file', f'{name!a} is not in {self.path}') from None


@functools.lru_cache(4)
def _members(path: str) -> dict[str, tuple[int, int]]:
  """(first byte, bytes) of the plain files of a tar, by name."""
  found = {}
  try:
    with (
      paths.open_file(path) as file,
      tarfile.open(fileobj=file, mode='r:') as tar,
    ):
      while (member := tar.next()) is not None:
        if member.isreg() and not member.issparse():
          found[posixpath.normpath(member.name)] = (member.offset_data, member.size)
        tar.members.clear()  # it would keep them all
  except tarfile.TarError as error:
    raise ValueError(f'{os.fspath(path)}: no tar of images: {error}') from None
  return found
