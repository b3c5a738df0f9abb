"""Question: how much text should GPTQ see?

The statistics of 4,096, 16,384 and 65,536 tokens of training text; all else is
the same. Layer after layer every statistic is gathered of the teacher and of
the student, so time grows with the text.

  gemma-qat sweep --config=experiments/configs/ablations/calibration.py \
      --workdir=runs/calibration
  gemma-qat report runs/calibration
"""

from experiments.configs import gemma3_270m_small

get_config = gemma3_270m_small.get_config


def sweep(add) -> None:
  for tokens in (4_096, 16_384, 65_536):
    add(f'tokens_{tokens}', {'quant.calibration_tokens': tokens})
