"""Which English text does every installation of this project carry?

Nothing is downloaded and no module is imported for its text: docstrings and
comments are read from the .py files with `ast`. The text depends on the
versions that are installed; its order does not depend on the machine.
"""

import ast
import html.parser
import importlib.metadata
import pathlib
import pydoc_data.topics
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator

# The requirements of this project and what they bring, as far as they hold
# prose. A fixed list: another package in the environment changes nothing.
# Without jaxlib, pygments and gguf, whose large files are tables and generated
# code: a sixth of the time for a twentieth of the text.
DISTRIBUTIONS = (
    'absl-py',
    'array-record',
    'chex',
    'contourpy',
    'cycler',
    'etils',
    'flax',
    'fonttools',
    'fsspec',
    'grain',
    'humanize',
    'jax',
    'kiwisolver',
    'markdown-it-py',
    'matplotlib',
    'ml-collections',
    'ml-dtypes',
    'msgpack',
    'numpy',
    'opt-einsum',
    'optax',
    'orbax-checkpoint',
    'packaging',
    'pillow',
    'prometheus-client',
    'protobuf',
    'psutil',
    'pyparsing',
    'python-dateutil',
    'pyyaml',
    'rich',
    'safetensors',
    'scipy',
    'sentencepiece',
    'tensorboardx',
    'toolz',
    'tqdm',
    'treescope',
    'typing-extensions',
    'xllamacpp',
)

# Not text: tests, vendored copies, tables, scripts of old Python versions.
_SKIPPED_FOLDERS = re.compile(
    r'(^|/)(tests?|testing|idle_test|site-packages|_vendor|vendored|encodings'
    r'|lib2to3|turtledemo|__pycache__|pydoc_data)/'
)
_COMMENT_BLOCK = re.compile(r'(?:^[ \t]*#(?:[ \t].*)?\n){4,}', re.MULTILINE)
# Shorter docstrings ('Return the name.') teach nothing about prose.
_MIN_DOCSTRING = 60


def docstrings() -> Iterator[tuple[str, str]]:
  """Yields (name, text) of each module's docstrings and long comments.

  First the standard library, then `DISTRIBUTIONS`; within each by path. A
  docstring that an earlier module already held is left out.
  """
  seen = set()
  stdlib = pathlib.Path(sysconfig.get_path('stdlib'))
  for name in sorted(_python_files(stdlib)):
    yield f'python/{name}', _module_text(stdlib / name, seen)
  for package, files in _distribution_files():
    for name, path in files:
      if name.endswith('.py') and not _SKIPPED_FOLDERS.search(name):
        yield f'{package}/{name}', _module_text(path, seen)


def readmes() -> Iterator[tuple[str, str]]:
  """Yields (name, text) of project descriptions, licences and help pages.

  Long paragraphs that an earlier document held are left out: a hundred
  licences quote each other.
  """
  seen = set()
  for name, text in _whole_readmes():
    paragraphs = []
    for paragraph in re.split(r'\n\s*\n', text):
      key = ' '.join(paragraph.split())
      if len(key) < 100 or key not in seen:
        seen.add(key)
        paragraphs.append(paragraph)
    yield name, '\n\n'.join(paragraphs)


def topics() -> Iterator[tuple[str, str]]:
  """Yields (name, text) of the language reference that `help()` shows."""
  for name, text in sorted(pydoc_data.topics.topics.items()):
    yield f'topics/{name}', text


def _whole_readmes() -> Iterator[tuple[str, str]]:
  stdlib = pathlib.Path(sysconfig.get_path('stdlib'))
  # IDLE and the licence are left out by some packagers of Python.
  for name in (
      'LICENSE.txt',
      'email/architecture.rst',
      'idlelib/NEWS.txt',
      'idlelib/README.txt',
      'idlelib/help.html',
  ):
    if (stdlib / name).is_file():
      yield f'python/{name}', _read_prose(stdlib / name)
  for package, files in _distribution_files():
    description = importlib.metadata.metadata(package).get_payload()
    yield f'{package}/METADATA', _strip_tags(description or '')
    for name, path in files:
      is_readme = name.endswith(('.md', '.rst'))
      is_licence = '.dist-info/' in name and 'licen' in name.lower()
      if (is_readme or is_licence) and not _SKIPPED_FOLDERS.search(name):
        yield f'{package}/{name}', _read_prose(path)


def _python_files(root: pathlib.Path) -> Iterator[str]:
  for path in root.rglob('*.py'):
    name = path.relative_to(root).as_posix()
    if not _SKIPPED_FOLDERS.search(name):
      yield name


def _distribution_files():
  """Yields (distribution, sorted (name, path) pairs), absent ones left out."""
  for package in DISTRIBUTIONS:
    try:
      distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
      continue
    files = {f.as_posix(): f for f in distribution.files or ()}
    pairs = [(n, pathlib.Path(f.locate())) for n, f in sorted(files.items())]
    yield package, [(n, p) for n, p in pairs if p.is_file()]


def _module_text(path: pathlib.Path, seen: set[str]) -> str:
  """Joins the docstrings and comment blocks of a file that are not `seen`."""
  source = path.read_text('utf-8', 'replace')
  try:
    with warnings.catch_warnings():
      # Invalid escapes in other people's files are not our concern.
      warnings.simplefilter('ignore')
      tree = ast.parse(source)
  except (SyntaxError, ValueError):
    return ''
  parts = []
  for heading, docstring in _docstrings(tree):
    if len(docstring) >= _MIN_DOCSTRING and docstring not in seen:
      seen.add(docstring)
      parts.append(f'{heading}\n\n{docstring}' if heading else docstring)
  for block in _COMMENT_BLOCK.findall(source):
    lines = (line.lstrip().removeprefix('#') for line in block.splitlines())
    prose = textwrap.dedent('\n'.join(lines)).strip()
    if prose not in seen:
      seen.add(prose)
      parts.append(prose)
  return '\n\n'.join(parts)


def _docstrings(node: ast.AST) -> Iterator[tuple[str, str]]:
  """Yields (signature, docstring) in source order.

  Only bodies are entered: `ast.walk`, which looks into every expression,
  takes four times as long.
  """
  text = ast.get_docstring(node)
  if text:
    yield _heading(node), text
  for child in node.body:
    if isinstance(
        child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    ):
      yield from _docstrings(child)


def _heading(node: ast.AST) -> str:
  if isinstance(node, ast.Module):
    return ''
  if isinstance(node, ast.ClassDef):
    return f'class {node.name}'
  return f'{node.name}({ast.unparse(node.args)})'


def _read_prose(path: pathlib.Path) -> str:
  text = path.read_text('utf-8', 'replace')
  is_page = path.suffix in ('.html', '.md')
  return _strip_tags(text) if is_page else text


class _TextOnly(html.parser.HTMLParser):
  """Keeps what a reader of the page would see."""

  def __init__(self):
    super().__init__()
    self.parts = []
    self._hidden = 0

  def handle_starttag(self, tag, attrs):
    self._hidden += tag in ('script', 'style', 'head')

  def handle_endtag(self, tag):
    self._hidden -= tag in ('script', 'style', 'head') and self._hidden > 0

  def handle_data(self, data):
    if not self._hidden:
      self.parts.append(data)


def _strip_tags(text: str) -> str:
  if '</' not in text:
    return text
  parser = _TextOnly()
  parser.feed(text)
  parser.close()
  return re.sub(r'\n{3,}', '\n\n', ''.join(parser.parts))
