"""A bucket on this machine: gcp-storage-emulator, and what it lacks.

For TensorStore generations and conditions on them, for gcsfs moving:

  GET ...?alt=media          x-goog-generation among the headers of the answer
  ifGenerationMatch=N        412 unless the object is of generation N (0: isn't there)
  ifGenerationNotMatch=N     304 (read), 412 (else) if it is
  POST .../o/A/moveTo/o/B    A is called B from there on
"""

import functools
import http.server
import importlib.util
import re
import sys
import threading
import urllib.parse

from gcp_storage_emulator import server, storage
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets, objects

if importlib.util.find_spec('gcsfs') is None:  # imported once its environment is set
  raise ModuleNotFoundError('gcsfs')
_OBJECT = (
  r'(?:/(?:upload|download))?(?:/storage/v1)?/b/([^/]+)/o(?:/([^/]+))?(?:/moveTo/.*)?'
)


class Bucket:
  """A server with one bucket, 'bucket', in memory, while used as a context."""

  def __init__(self):
    self._storage = storage.Storage(use_memory_fs=True)
    buckets.create_bucket('bucket', self._storage)
    handler = functools.partial(_Handler, self)
    self._server = _Server(('127.0.0.1', 0), handler)
    self.lock = threading.RLock()
    self.refusing = False  # to be written to
    self.environment = {
      'STORAGE_EMULATOR_HOST': f'http://127.0.0.1:{self._server.server_port}',
      'TENSORSTORE_GCS_HTTP_URL': f'http://127.0.0.1:{self._server.server_port}',
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'anybody',
      # It would ask Google which kind of bucket this is.
      'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
      'NO_GCE_CHECK': 'true',
    }

  def __enter__(self):
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_):
    self._server.shutdown()
    self._server.server_close()

  def names(self, prefix=''):
    """Of all objects below a prefix, sorted."""
    with self.lock:
      found, _ = self._storage.get_file_list('bucket', prefix, None)
    return sorted(x['name'] for x in found)

  def read(self, name):
    with self.lock:
      return bytes(self._storage.get_file('bucket', name))

  def cut(self, name):
    """Leaves the first half of an object."""
    with self.lock:
      half = self.read(name)
      half = half[: len(half) // 2]
      about = objects._make_object_resource('', 'bucket', name, None, str(len(half)))
      self._storage.create_file('bucket', name, half, objects._checksums(half, about))

  def of(self, name, bucket='bucket'):
    """The generation of an object; 0 = there is none."""
    try:
      return int(self._storage.get_file_obj(bucket, name)['generation'])
    except NotFound:
      return 0


class _Server(http.server.ThreadingHTTPServer):
  def handle_error(self, request, client_address):
    """A client that has its answer already hangs up: gcsfs asks two things at once."""
    if not isinstance(sys.exc_info()[1], ConnectionError):
      super().handle_error(request, client_address)


class _Handler(server.RequestHandler):
  def __init__(self, bucket, *args):
    self._bucket, self._generation = bucket, 0
    super().__init__(bucket._storage, *args)

  def _handle(self, method):
    url = urllib.parse.urlsplit(self.path)
    query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
    with self._bucket.lock:
      found = re.fullmatch(_OBJECT, url.path)
      name = found and urllib.parse.unquote(found[2] or query.get('name', ''))
      self._generation = self._bucket.of(name, found[1]) if name else 0
      now = str(self._generation)
      if method == 'POST' and self._bucket.refusing:
        self._refuse(403)
      elif query.get('ifGenerationMatch', now) != now:
        self._refuse(412)
      elif query.get('ifGenerationNotMatch') == now:
        self._refuse(304 if method == 'GET' else 412)
      elif '/moveTo/' not in url.path:
        server.Router(self).handle(method)
      elif self._generation:
        self._move(url.path)
      else:
        self._refuse(404)

  def _move(self, path):
    bucket, name = re.fullmatch(_OBJECT, path).groups()
    self.path = path.replace('/moveTo/', f'/copyTo/b/{bucket}/')
    server.Router(self).handle('POST')
    self.storage.delete_file(bucket, urllib.parse.unquote(name))

  def _refuse(self, code):
    self.rfile.read(int(self.headers.get('Content-Length') or 0))
    self.send_response(code)
    self.send_header('Content-Length', '0')
    self.end_headers()

  def end_headers(self):
    if self._generation:
      self.send_header('x-goog-generation', str(self._generation))
    super().end_headers()

  def do_GET(self):
    self._handle('GET')

  def do_POST(self):
    self._handle('POST')

  def do_PUT(self):
    self._handle('PUT')

  def do_PATCH(self):
    self._handle('PATCH')

  def do_DELETE(self):
    self._handle('DELETE')
