"""Does a file of sampled documents go on only if it is what it was?"""

import json

import pytest

from gemma_qat import errors
from gemma_qat.training import sampled_file

_SETTINGS = {'seed': 7}
_RECORD = {'text': 'ab', 'gemma_tokens': [5, 6, 7]}


def test_what_was_written_is_counted_when_it_goes_on(tmp_path):
  path = tmp_path / 'x.jsonl'
  sampled_file.SampledFile(path, _SETTINGS).append([_RECORD] * 2)
  file = sampled_file.SampledFile(path, _SETTINGS)
  assert (file.documents, file.tokens) == (2, 6)


@pytest.mark.parametrize('name, word', [
    ('x.jsonl', 'line 3, is not as it was written'),
    ('x.jsonl.json', 'cannot be read'),
])
@pytest.mark.parametrize('content', ['[' * 100_000, '9' * 5_000, '{"a": '])
def test_what_is_no_json_is_refused(tmp_path, name, word, content):
  path = tmp_path / 'x.jsonl'
  sampled_file.SampledFile(path, _SETTINGS).append([_RECORD] * 2)
  if name == path.name:
    with open(path, 'a', encoding='utf-8') as file:
      file.write(content + '\n' + json.dumps(_RECORD) + '\n')
  else:
    (tmp_path / name).write_text(content)
  with pytest.raises(errors.UserError, match=word):
    sampled_file.SampledFile(path, _SETTINGS)
