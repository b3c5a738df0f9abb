"""What did a reader do, while it read one input, that no reader may?

Python tells an audit hook of every file it opens, every process it starts and
every code it runs. What native code does is seen from outside: new files in
the watched folders, and the peak of the process's memory. A file that native
code wrote anywhere else would not be noticed.

The limit is on RLIMIT_DATA, what a process could write to: RLIMIT_AS would
also count address space that is only reserved (the stacks and arenas of every
thread of XLA and tensorstore, mapped files), which is gigabytes at the start.
"""

import ast
import os
import pathlib
import re
import resource
import sys

GIB = 2**30
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_FORBIDDEN = frozenset((
    'os.system', 'os.exec', 'os.fork', 'os.forkpty', 'os.posix_spawn',
    'os.spawn', 'pty.spawn', 'subprocess.Popen', 'os.kill', 'os.chmod',
    'os.chown', 'os.link', 'os.mkdir', 'os.putenv', 'os.remove', 'os.rename',
    'os.rmdir', 'os.symlink', 'os.truncate', 'os.utime', 'shutil.copyfile',
    'shutil.move', 'shutil.rmtree', 'socket.connect', 'socket.bind',
    'socket.getaddrinfo', 'pickle.find_class', 'ctypes.dlopen',
    'code.__new__', 'function.__new__', 'builtins.input', 'urllib.Request',
    'webbrowser.open', 'sys.addaudithook', 'tempfile.mkstemp',
    'tempfile.mkdtemp',
))
_STATUS = pathlib.Path('/proc/self/status')
_CLEAR = pathlib.Path('/proc/self/clear_refs')


class Guard:
  """Watches while a reader reads. There is one in a process, for good.

  Args:
    roots: where code may come from that was not loaded before.
    folders: where no file may appear.
  """

  def __init__(self, roots: list[str], folders: list[pathlib.Path]):
    self._roots = tuple(roots)
    self.watch(folders)
    self._is_on, self._seen, self._data = False, [], b''
    sys.addaudithook(self._hear)

  def watch(self, folders: list[pathlib.Path]) -> None:
    """Takes other folders, with all folders in them, where no file may appear.
    """
    # Once: a folder that is new changes the one it lies in.
    self._watched = [where for f in folders for where, _, _ in os.walk(f)]

  def begin(self, data: bytes, path: pathlib.Path) -> None:
    """Begins to watch.

    Args:
      data: the input, for what is named in it.
      path: what was damaged, which may be a folder now.
    """
    self._data, self._seen = data, []
    is_folder = path.is_dir() and not path.is_symlink()
    self._folders = self._watched + [path] * is_folder
    # Sets the peak back to what is in use now.
    _CLEAR.write_bytes(b'5')
    self._before = _kilobytes('VmRSS')
    self._times = self._changed_at()
    self._is_on = True

  def end(self) -> tuple[list[str], int]:
    """Returns what was done that may not be, and bytes of memory taken."""
    self._is_on = False
    taken = 1024 * max(0, _kilobytes('VmHWM') - self._before)
    seen = self._seen
    if taken > GIB:
      seen.append(f'memory: {taken:,} bytes')
    times = self._changed_at()
    seen += [
        f'file: something appeared in {folder}'
        for folder in times if times[folder] != self._times.get(folder)
    ]
    return list(dict.fromkeys(seen)), taken

  def _changed_at(self):
    return {f: os.stat(f).st_mtime_ns for f in self._folders}

  def _hear(self, event, arguments):
    if not self._is_on:
      return
    if event == 'open':
      path, _, flags = arguments
      if isinstance(flags, int) and flags & _WRITING:
        self._seen.append(f'open: {path!r:.200} for writing')
    elif event in _FORBIDDEN:
      self._seen.append(f'{event}: {arguments!r:.200}')
    elif event == 'exec':
      name = getattr(arguments[0], 'co_filename', '')
      if not name.startswith(self._roots):
        self._seen.append(f'exec: {arguments[0]!r:.200}')
    elif event == 'compile' and arguments[0] is not None:
      # A syntax tree runs nothing: who logs a traceback makes some.
      if sys._getframe(1).f_code.co_filename == ast.__file__:
        return
      self._seen.append(f'compile: {arguments[0]!r:.200}')
    elif event == 'import' and str(arguments[0]).encode() in self._data:
      self._seen.append(f'import: {arguments[0]!r:.200}')


def limit_memory() -> None:
  """Lets this process take no more than 1 GiB on top of what it has now.

  To be called again now and then: what compiled code takes is no finding.
  """
  limit = 1024 * _kilobytes('VmData') + GIB
  _, hard = resource.getrlimit(resource.RLIMIT_DATA)
  resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _kilobytes(field):
  return int(re.search(rf'{field}:\s+(\d+)', _STATUS.read_text())[1])
