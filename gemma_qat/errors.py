"""What a user can do wrong, said in one line."""

from collections.abc import Iterator
import contextlib
import os

# More is a damaged file's own text, not what is said of it.
_MOST_LETTERS = 2_000


class UserError(Exception):
  """Bad input from outside: the message says what is wrong and what to do.

  The commands print it without a traceback and exit with code 2. Mistakes of
  the program itself are ordinary exceptions and keep their traceback.

  Messages quote names out of files: whatever those hold, a message is one
  printable line (no terminal obeys it) of bounded length.
  """

  def __init__(self, message: str):
    message = ''.join(
        c if c.isprintable() else ascii(c)[1:-1] for c in message
    )
    if len(message) > _MOST_LETTERS:
      half = _MOST_LETTERS // 2 - 3
      message = f'{message[:half]} ... {message[-half:]}'
    super().__init__(message)


class Stopped(Exception):
  """A run that was asked to stop, saved itself and can go on."""

  # As of BSD's sysexits.h: temporary failure, the same command can go on.
  exit_code = 75


@contextlib.contextmanager
def about(source: str | os.PathLike) -> Iterator[None]:
  """Puts the name of a source before the message of a UserError."""
  try:
    yield
  except UserError as error:
    raise UserError(f'{os.fspath(source)}: {error}') from error
