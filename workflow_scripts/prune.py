"""Fine-tune the base model while the experts that this task hardly uses fall away (task-specific expert pruning)."""

from __future__ import annotations

import argparse
from pathlib import Path

from mcsmoe import console
from mcsmoe.workflow import options

EXAMPLE = (
    "python workflow_scripts/prune.py --model base --task SST-2 --train train.parquet --selection selection.parquet "
    "--experts 4 --out pruned --groups groups.parquet --training training.parquet --selected selected.parquet "
    "--state .state/pruned --epochs 3"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--experts", type=int, required=True, help="experts that each layer keeps")
    parser.add_argument("--groups", type=Path, required=True, help="written: which experts are left")
    options.add_section(parser, "prune")
    options.add_section(parser, "merge", only=("exclude_layers",))
    options.add_training(parser, "finetune")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    from mcsmoe.adapters.registry import adapter_for
    from mcsmoe.artefacts.tables import frame_of, write_table
    from mcsmoe.train import processes
    from mcsmoe.train.objectives import TaskObjective
    from mcsmoe.train.stages import Job, JobSettings, total_steps
    from mcsmoe.train.task_specific import UsagePruner, remove_fallen
    from mcsmoe.types import chosen_layers

    job = Job.of(options.record(JobSettings, arguments), options.settings(arguments, "finetune"))
    adapter = adapter_for(job.model)
    steps, _ = total_steps(job.settings, len(job.train))
    pruner = UsagePruner(
        model=job.model,
        adapter=adapter,
        layers=chosen_layers(adapter.layers(job.model), arguments.exclude_layers),
        experts=arguments.experts,
        steps=steps,
        **options.settings(arguments, "prune"),
    )
    weights = {key: job.settings[key] for key in ("balance_weight", "z_weight")}
    job.run(__file__, TaskObjective(adapter, **weights, usage=pruner.count), pruner)
    groupings = pruner.groupings()
    remove_fallen(job.model, adapter, groupings)
    if processes.is_main():
        # A living expert has the whole weight of its group.
        rows = [row for layer, grouping in groupings.items() for row in grouping.rows(layer, grouping.leads())]
        write_table(arguments.groups, frame_of(rows, "groups"), "groups")
    job.save(stage="prune", experts=arguments.experts)


if __name__ == "__main__":
    console.run(main, parse())
