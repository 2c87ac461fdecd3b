"""Fine-tune the full model on a task: every expert, the routers and all the rest; or a dense one to compare with."""

from __future__ import annotations

import argparse

from mcsmoe import console
from mcsmoe.workflow import options

EXAMPLE = (
    "python workflow_scripts/finetune.py --model base --task SST-2 --train train.parquet "
    "--selection selection.parquet --out full --training training.parquet --selected selected.parquet "
    "--state .state/full --epochs 3"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--dense", action="store_true", help="the model has no experts")
    options.add_training(parser, "finetune")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.train.objectives import TaskObjective
    from mcsmoe.train.stages import Job, JobSettings

    job = Job.of(options.record(JobSettings, arguments), options.settings(arguments, "finetune"))
    weights = {key: job.settings[key] for key in ("balance_weight", "z_weight")}
    adapter = None if arguments.dense else adapter_for(job.model)
    job.run(__file__, TaskObjective(adapter, **weights))
    job.save(stage="finetune")


if __name__ == "__main__":
    console.run(main, parse())
