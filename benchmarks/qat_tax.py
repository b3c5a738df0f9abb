"""Claim: fake quantization costs a training step next to nothing.

Ours is the step of a mode, other the step of ordinary training: the same
program, norms and weights trained, without quantization. Time, and the
temporaries that the two compiled programs allocate.

  python -m benchmarks.qat_tax --mode=derived
  python -m benchmarks.qat_tax --size=1b --layers=0 --vocabulary=0 \
      --tokens=8192 --length=1024 --remat=products

The tax is one of weights, not of tokens: the more tokens a step, the less of
it. The mode `codes` trains scales and no weights, so that its Adam has less to
do than the one it is compared with.
"""

from benchmarks import measure
from benchmarks import training_step


def main(argv=None):
  parser = measure.make_parser(__doc__, repeats=5)
  parser.add_argument(
      '--mode', default='derived', choices=training_step.MODES
  )
  training_step.add_flags(parser, layers=6, vocabulary=16_384, tokens=1024)
  a = parser.parse_args(argv)
  steppers = []
  for mode in (a.mode, None):
    case = training_step.make_case(a, mode)
    steppers.append(training_step.Stepper(case.job.program.step, case))
  ours, other = steppers
  measure.emit(
      f'training step, {a.mode} against no quantization',
      training_step.describe(a),
      measure.interleave(ours, other, a.repeats),
      ours_temporary_gb=measure.temporary_gb(ours.lowered),
      other_temporary_gb=measure.temporary_gb(other.lowered),
  )


if __name__ == '__main__':
  main()
