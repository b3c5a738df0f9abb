"""Which are the lowest versions that setup.cfg allows, as pip's constraints?

  python .ci/lowest.py setup.cfg > lowest.txt

Every 'NAME>=VERSION' becomes 'NAME==VERSION'. What these packages need
themselves is left to pip: a user with an old environment has them already.
"""

import configparser
import re
import sys

# Extras that are installed with the tests; others ask for the same packages.
_EXTRAS = ('test',)


def main(argv: list[str]) -> int:
  config = configparser.ConfigParser(interpolation=None)
  with open(argv[1], encoding='utf-8') as file:
    config.read_file(file)
  lines = config['options']['install_requires'].split('\n')
  for extra in _EXTRAS:
    lines += config['options.extras_require'][extra].split('\n')
  print('\n'.join(constraints(lines)))
  return 0


def constraints(requirements: list[str]) -> list[str]:
  """'NAME==VERSION' of every 'NAME>=VERSION' (and of every '==')."""
  found = []
  for line in filter(None, map(str.strip, requirements)):
    match = re.fullmatch(r'([\w.-]+)\s*(?:>=|==)\s*([\w.]+)', line)
    if match is None:
      raise SystemExit(f'{line!r} in setup.cfg gives no lowest version.')
    found.append('=='.join(match.groups()))
  return found


if __name__ == '__main__':
  sys.exit(main(sys.argv))
