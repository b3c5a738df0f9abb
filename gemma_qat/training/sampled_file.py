"""How does a file of sampled documents grow, and go on after a kill?

One JSON object a line, appended batch by batch. A file beside it, FILE.json,
says with which settings it was begun: only those go on with it.
"""

import json
import os
import pathlib
from typing import Any, Iterable, Mapping

from gemma_qat import errors
from gemma_qat.checkpoints import atomic
from gemma_qat.data import readers


class SampledFile:
  """The documents so far, counted.

  Attributes:
    documents: how many there are.
    tokens: of them all.
  """

  def __init__(self, path: pathlib.Path, settings: Mapping[str, Any]):
    """Begins a file, or goes on with one.

    Raises:
      UserError: the file was begun with other settings or by something else,
        is damaged, or cannot be written.
    """
    self._path = path
    self.documents = self.tokens = 0
    self._claim(dict(settings))
    if path.exists():
      self._count()

  def append(self, records: Iterable[Mapping[str, Any]]) -> None:
    """Adds documents, and returns when they are on the disk.

    Raises:
      UserError: they cannot be written.
    """
    records = list(records)
    lines = ''.join(json.dumps(r) + '\n' for r in records)
    try:
      with open(self._path, 'ab') as file:
        file.write(lines.encode())
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
      raise errors.UserError(
          f'{self._path} could not be written ({error.strerror}): make room, '
          'then the same command goes on.'
      ) from error
    self.documents += len(records)
    self.tokens += sum(len(r[readers.TOKENS]) for r in records)

  def _claim(self, settings):
    beside = self._path.with_name(f'{self._path.name}.json')
    if not beside.exists():
      if self._path.exists():
        raise errors.UserError(
            f'{self._path} was not begun by this command ({beside.name} is '
            'missing): choose another file.'
        )
      atomic.make_folder(self._path.parent)
      with atomic.whole_file(beside) as temporary:
        temporary.write_text(
            json.dumps(settings, indent=2) + '\n', encoding='utf-8'
        )
      return
    try:
      old = json.loads(beside.read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError) as error:
      raise errors.UserError(
          f'{beside} cannot be read ({error}): choose another file.'
      ) from error
    new = json.loads(json.dumps(settings))
    old = old if isinstance(old, dict) else {}
    for name in sorted(old.keys() | new.keys()):
      if old.get(name) != new.get(name):
        raise errors.UserError(
            f'{self._path} was begun with other settings ({name} was '
            f'{old.get(name)!r}, now {new.get(name)!r}): choose another file, '
            'or the settings that began it.'
        )

  def _count(self):
    """Counts what there is; a line that was torn by a kill is cut off."""
    whole = 0
    try:
      with open(self._path, 'r+b') as file:
        for line in file:
          if not line.endswith(b'\n'):
            break
          self.tokens += len(json.loads(line)[readers.TOKENS])
          self.documents += 1
          whole += len(line)
        file.truncate(whole)
    except (
        OSError, ValueError, KeyError, TypeError, RecursionError
    ) as error:
      raise errors.UserError(
          f'{self._path}, line {self.documents + 1}, is not as it was written '
          f'({error}): remove that line and those behind it, or choose another '
          'file.'
      ) from error
