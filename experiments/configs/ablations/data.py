"""Question: is text that the teacher writes as good as text that people wrote?

Documentation, or text sampled from the teacher itself, for calibration and for
training; either way judged on documentation that neither has seen. Sampled text
needs no corpus; 49,152 tokens of it took 12 minutes, a point takes 10.

  gemma-qat generate-data gemma3-270m --to=runs/sampled.jsonl \
      --tokens=49152
  gemma-qat sweep --config=experiments/configs/ablations/data.py \
      --workdir=runs/data
  gemma-qat report runs/data

Answer: no, if text like that of its use is at hand: 0.0482 nats with
documentation, 0.0572 with half of each, 0.0760 with sampled text, which from
BOS alone is web pages and code in many languages. Still, text that asks for no
corpus at all wins 83 % of the KL divergence back. And judged on such web pages,
half of each is far better than documentation: 0.1090 nats, not 0.1563. (Held-out
text is of each point's own kind: those figures do not compare.)
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
