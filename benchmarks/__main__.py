"""All benchmarks of the model work on this machine, in one run: `python -m benchmarks`, or `make bench`.

Sampling and fusion against the released code and the stock pipeline (`benchmarks.fusion`), and training against batch 1
(`benchmarks.training`, on the shapes world's U-Net). It takes about ten minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks import fusion, training
from benchmarks.measuring import Output, Write, finish, parser_of, set_up
from benchmarks.nets import SD_LAYOUTS


def main(write: Write = sys.stdout.write) -> None:
    """Command line."""
    parser = parser_of(__doc__)
    fusion.add_arguments(parser)
    training.add_arguments(parser)
    parser.add_argument("--training-unet", choices=(*SD_LAYOUTS, "shapes"), default="shapes")
    arguments = parser.parse_args()
    set_up(arguments)
    output = Output(write)
    float32 = arguments.dtype == "float32"

    output(fusion.heading(arguments))
    figures, goals = fusion.report(fusion.measure(arguments), float32, output)
    steps = min(arguments.steps, fusion.SHORT_STEPS) if arguments.short else arguments.steps
    of_training = argparse.Namespace(**(vars(arguments) | {"unet": arguments.training_unet, "steps": steps}))
    training_figures, training_goals = training.report(training.measure(of_training), float32, output)
    finish(arguments, figures | training_figures, [*goals, *training_goals], output)


if __name__ == "__main__":
    main()
