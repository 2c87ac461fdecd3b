"""Win the quality of a merged model back: trained on with its routers frozen, distilled from the full model."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console
from mcsmoe.workflow import options

EXAMPLE = (
    "python workflow_scripts/recover.py --model merged --task SST-2 --train train.parquet "
    "--selection selection.parquet --teacher teacher --out recovered --training training.parquet "
    "--selected selected.parquet --state .state/recovered --epochs 1"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--teacher", type=Path, help="cache of the full model's answers; none trains without a teacher")
    options.add_training(parser, "recover")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.checkpoint.lineage import origin
    from mcsmoe.train.objectives import RecoveryObjective, freeze_routers
    from mcsmoe.train.stages import Job, JobSettings, teacher_of

    job = Job.of(options.record(JobSettings, arguments), options.settings(arguments, "recover"))
    freeze_routers(job.model, adapter_for(job.model))
    objective = RecoveryObjective(
        teacher_of(arguments.teacher, job.train), job.settings["distillation_weight"], job.settings["temperature"]
    )
    job.run(__file__, objective, inputs=[arguments.teacher] if arguments.teacher else [])
    job.save(stage="recover", **origin(arguments.model))


if __name__ == "__main__":
    console.run(main, parse())
