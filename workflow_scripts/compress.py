"""Split every expert into low-rank and sparse parts, and prune the sparse part row by row while training on."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console
from mcsmoe.workflow import options

EXAMPLE = (
    "python workflow_scripts/compress.py --model recovered --task SST-2 --train train.parquet "
    "--selection selection.parquet --teacher teacher --out compressed --training training.parquet "
    "--selected selected.parquet --state .state/compressed --rank 8 --keep 0.1 --epochs 1"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--teacher", type=Path, help="cache of the full model's answers; none trains without a teacher")
    parser.add_argument("--routing", type=Path, help="routing statistics, for the activation-aware decomposition")
    parser.add_argument("--decomposition", choices=["svd", "whitened"], default="svd", help="how experts are split")
    options.add_section(parser, "merge", only=("exclude_layers",))
    options.add_training(parser, "compress")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    from mcsmoe import modules
    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.calibration.files import load_statistics
    from mcsmoe.checkpoint.lineage import lineage, origin
    from mcsmoe.compress.residual import KeptSchedule, ResidualPruner
    from mcsmoe.train.objectives import RecoveryObjective, freeze_routers
    from mcsmoe.train.stages import Job, JobSettings, teacher_of, total_steps
    from mcsmoe.transform.compress import CompressSettings, compress_layers
    from mcsmoe.transform.layers import ModelLayers

    job = Job.of(options.record(JobSettings, arguments), options.settings(arguments, "compress"))
    settings = job.settings
    adapter = adapter_for(job.model)
    statistics = load_statistics(arguments.routing, lineage(arguments.model)) if arguments.routing else None
    splitting = CompressSettings(settings["rank"], exclude_layers=arguments.exclude_layers)
    compress_layers(ModelLayers(job.model, adapter), splitting, statistics)
    freeze_routers(job.model, adapter)
    steps, _ = total_steps(settings, len(job.train))
    schedule = KeptSchedule(
        settings["keep"],
        steps,
        warmup=round(settings["initial_fraction"] * steps),
        cooldown=round(settings["final_fraction"] * steps),
    )
    pruner = ResidualPruner(modules.residuals(job.model), schedule, settings["smoothing"])
    objective = RecoveryObjective(
        teacher_of(arguments.teacher, job.train), settings["distillation_weight"], settings["temperature"]
    )
    inputs = [path for path in (arguments.teacher, arguments.routing) if path]
    job.run(__file__, objective, pruner, inputs)
    modules.pack(job.model)
    job.save(stage="compress", decomposition=arguments.decomposition, **origin(arguments.model))


if __name__ == "__main__":
    console.run(main, parse())
