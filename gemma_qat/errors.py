"""What a user can do wrong, said in one line."""


class UserError(Exception):
  """Bad input from outside: the message says what is wrong and what to do.

  The commands print it without a traceback and exit with code 2. Mistakes of
  the program itself are ordinary exceptions and keep their traceback.
  """


class Stopped(Exception):
  """A run that was asked to stop, saved itself and can go on."""
