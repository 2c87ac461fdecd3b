"""Prune or merge layer after layer, each on what the reduced ones before it give; refit what is left, and round it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcsmoe import console
from mcsmoe.methods import MAX_MIN
from mcsmoe.workflow import options
from mcsmoe.workflow.method_options import add_method

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mcsmoe.calibration.layer_major import Options
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.transform.in_sequence import Texts
    from mcsmoe.types import Batch, LayerId

EXAMPLE = (
    "python workflow_scripts/reduce.py --model full --train train.parquet --experts 4 --criterion gram --refit "
    "--out merged --groups groups.parquet"
)


def parse() -> argparse.Namespace:
    parser = console.parser(__doc__, EXAMPLE)
    parser.add_argument("--model", type=Path, required=True, help="the full model")
    parser.add_argument("--train", type=Path, required=True, help="training examples to draw from")
    parser.add_argument(
        "--routing", type=Path, help="routing statistics, for a budget that spreads experts over layers"
    )
    parser.add_argument("--seed", type=int, default=0, help="which examples and tokens are drawn")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--experts", type=int, required=True, help="experts to keep per layer, on average; 0 keeps all")
    add_method(parser, ("criterion", "dropped", "novice_rank", "refit", "refit_target", "bits", "merge"))
    add_method(parser, ("similarity", "grouping", "budget", "linkage", "alignment", "capacity"))
    parser.add_argument(
        "--mixture", type=json.loads, help='share of each domain in the calibration, JSON, or "max-min"; all alike'
    )
    parser.add_argument("--out", type=Path, required=True, help="written: checkpoint folder")
    parser.add_argument("--groups", type=Path, required=True, help="written: who was kept, and who answers for whom")
    options.add_tokens(parser)
    options.add_section(parser, "data", only=("max_input", "max_label"))
    options.add_section(parser, "calibration")
    options.add_section(parser, "merge", only=("exclude_layers",))
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    import tempfile

    import torch

    from mcsmoe.artefacts.tables import frame_of, write_table
    from mcsmoe.calibration.layer_major import Options
    from mcsmoe.checkpoint.lineage import EXPECTED
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.device import pick
    from mcsmoe.transform.in_sequence import reduced_in_sequence
    from mcsmoe.transform.layers import SparseLayer
    from mcsmoe.transform.reduce import Merging, Pruning, Reduction
    from mcsmoe.transform.refit import Refitting
    from mcsmoe.transform.rounding import round_layer
    from mcsmoe.transform.unfinished import Unfinished

    torch.set_num_threads(arguments.threads)
    source = Streamed(arguments.model)
    refitting = Refitting(target=arguments.refit_target) if arguments.refit else None
    how: Pruning | Merging
    if arguments.merge is None:
        how = Pruning(arguments.criterion or "gram", arguments.dropped, arguments.novice_rank)
    else:
        how = options.record(Merging, arguments)
    kept = counts(source, arguments)
    rows: list[dict[str, Any]] = []
    expected: dict[LayerId, float] = {}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".reduced-", dir=arguments.out.parent) as folder:
        settings = Options(device=pick(arguments.device), reservoir=arguments.reservoir, seed=arguments.seed)
        reduction = Reduction(how, refitting, seed=arguments.seed)
        run = Unfinished(Path(folder), {}, settings.cache_memory, True, reduction.needs_whole)
        given = texts(source, arguments)
        if arguments.mixture == MAX_MIN:
            given = weighed(given, kept, arguments, settings, Path(folder) / "statistics")
        for layer, reduced in reduced_in_sequence(arguments.model, given, reduction, kept, settings, run):
            rows += reduced.grouping.rows(layer, reduced.share_E)
            # Rounding adds an error that nobody foretells.
            if reduced.expected is not None and arguments.bits is None:
                expected[layer] = reduced.expected

        def change(layer: LayerId) -> None:
            here = SparseLayer(source.model, source.adapter, layer)
            run.get(layer).install(here)
            if arguments.bits is not None and layer not in arguments.exclude_layers:
                round_layer(here, arguments.bits)

        names = (
            "experts",
            "criterion",
            "dropped",
            "novice_rank",
            "refit",
            "refit_target",
            "bits",
            "merge",
            "mixture",
            "seed",
        )
        told = {name: getattr(arguments, name) for name in names}
        provenance = {"stage": "reduce", "settings": told, EXPECTED: expected, **source.origin}
        source.rewrite(arguments.out, change, provenance)
    write_table(arguments.groups, frame_of(rows, "groups"), "groups")


def counts(source: Streamed, arguments: argparse.Namespace) -> dict[LayerId, int]:
    """By layer the number of experts to keep, all of those of excluded layers."""
    from mcsmoe.calibration.files import load_statistics
    from mcsmoe.criteria.quadratic import Limits
    from mcsmoe.transform.budget import SPREADS
    from mcsmoe.types import chosen_layers

    total = {layer: source.adapter.num_experts(source.model, layer) for layer in source.layers}
    if not arguments.experts:
        return total
    free = chosen_layers(source.layers, arguments.exclude_layers)
    spread = dict.fromkeys(free, arguments.experts)
    if arguments.budget in SPREADS and arguments.experts < max(total.values()):
        if arguments.routing is None:
            raise ValueError(f"budget is {arguments.budget!r}, which takes routing statistics; give --routing")
        found = load_statistics(arguments.routing, source.lineage)
        bounds = {layer: Limits.none(total[layer]) for layer in free}
        statistics = {layer: found.layers[layer] for layer in free}
        fewest = int(getattr(source.model.config.get_text_config(), "num_experts_per_tok", 1) or 1)
        criterion = arguments.criterion or "frequency"
        spread = SPREADS[arguments.budget](statistics, arguments.experts, criterion, bounds, fewest)
    return total | spread


def weighed(
    given: Texts, kept: Mapping[LayerId, int], arguments: argparse.Namespace, settings: Options, folder: Path
) -> Texts:
    """The same texts, each domain with the weight by which the worst domain's predicted error is smallest."""
    from mcsmoe.calibration.collect import Domain, collect
    from mcsmoe.calibration.folder import FolderLayers, open_statistics
    from mcsmoe.checkpoint.streaming import Streamed
    from mcsmoe.transform.domains import mixed
    from mcsmoe.transform.in_sequence import Texts

    domains: dict[str, list[Batch]] = {}
    for batch in given.batches:
        domains.setdefault(batch.domain, []).append(batch.inputs)
    if len(domains) < 2:
        raise ValueError(f"mixture is {MAX_MIN!r}, but all texts are of domain {next(iter(domains))!r}; leave it out")
    collect(Streamed(arguments.model), [Domain(name, batches) for name, batches in domains.items()], folder, settings)
    found = open_statistics(folder).layers
    assert isinstance(found, FolderLayers)
    _, mixture = mixed(found.by_domain, kept, arguments.criterion or "gram", {}, seed=arguments.seed)
    return Texts(given.batches, mixture.weights)


def texts(source: Streamed, arguments: argparse.Namespace) -> Texts:
    """Calibration rows of the training examples, of each domain its share where a mixture is given."""
    from mcsmoe.artefacts.tables import read_table
    from mcsmoe.calibration.layer_major import DomainBatch
    from mcsmoe.checkpoint.load import load_tokenizer
    from mcsmoe.data.collate import domain_batches, tokenize
    from mcsmoe.data.vocabulary import vocabulary_of
    from mcsmoe.evaluate.encoding import is_causal
    from mcsmoe.transform.in_sequence import Texts

    causal = is_causal(source.model)
    examples = read_table(arguments.train, "examples")
    mixture = arguments.mixture
    if mixture == MAX_MIN:  # as many rows of each; their weights are found afterwards
        mixture = dict.fromkeys(sorted(set(examples["group"])), 1.0)
    rows = tokenize(
        examples,
        load_tokenizer(arguments.model),
        *(arguments.max_input, arguments.max_label, arguments.tokens),
        vocabulary=vocabulary_of(source.model),
        where=arguments.train,
        causal=causal,
    )
    found = domain_batches(
        rows,
        examples["group"].tolist(),
        *(arguments.samples, arguments.batch_size, arguments.seed),
        mixture=mixture,
    )
    names = ("input_ids", "attention_mask") if causal else ("input_ids", "attention_mask", "labels")
    # Rows were drawn in the proportions that were asked for, so each token counts once.
    return Texts([DomainBatch(domain, {name: batch[name] for name in names}) for domain, batch in found])


if __name__ == "__main__":
    console.run(main, parse())
