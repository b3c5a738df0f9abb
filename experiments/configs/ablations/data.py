"""Question: is text that the teacher writes as good as text that people wrote?

Documentation, or text sampled from the teacher itself, for calibration and for
training; either way judged on documentation that neither has seen. Sampled text
needs no corpus. Not run yet.

  gemma-qat generate-data gemma3-270m --to=runs/sampled.jsonl \
      --tokens=65536
  gemma-qat sweep --config=experiments/configs/ablations/data.py \
      --workdir=runs/data
  gemma-qat report runs/data
"""

from experiments.configs import gemma3_270m_small

get_config = gemma3_270m_small.get_config


def sweep(add) -> None:
  sampled = 'jsonl:runs/sampled.jsonl'
  for name, source in {
      'documentation': 'python_docs',
      'sampled': sampled,
      'half_of_each': f'0.5*python_docs + 0.5*{sampled}',
  }.items():
    add(name, {'data.train': source})
