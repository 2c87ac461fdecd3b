"""What calibration found out about a model, as the stages after it read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mcsmoe import align
from mcsmoe.calibration.files import expert_tensors, load_statistics, load_tensors
from mcsmoe.statistics.layer import LayerStatistics
from mcsmoe.statistics.routing import RoutingStatistics
from mcsmoe.types import ExpertWeights, LayerId


@dataclass(frozen=True)
class Evidence:
    """What calibration found out about a model: routing statistics, gradients, and how its neurons were moved since."""

    routing: RoutingStatistics
    tensors: Mapping[str, Tensor]
    permutations: Mapping[LayerId, Tensor]

    @staticmethod
    def read(
        routing: Path,
        gradients: Path | None = None,
        permutation: Path | None = None,
        lineage: Sequence[str] | None = None,
    ) -> Evidence:
        """Read the files that the stages before have written.

        Args:
            lineage: fingerprints of the weights that the statistics may have been taken on; None asks for none.

        Raises:
            ValueError: a file that is unreadable, of another model or of other experts than the others; names it.
        """
        found = {} if gradients is None else load_tensors(gradients)
        statistics = load_statistics(routing, lineage)
        moved = {} if permutation is None else _permutations(permutation, statistics)
        return Evidence(statistics, found, moved)

    def check_against(self, layer: LayerId, weights: ExpertWeights) -> None:
        """Raise ValueError, naming the layer, unless statistics and permutations can be of experts of this shape."""
        self.layer(layer).check_against(layer, weights.num_experts, weights.d_model)
        if self.permutations:
            shape, wanted = tuple(self.permutations[layer].shape), (weights.num_experts, weights.width)
            if shape != wanted:
                raise ValueError(
                    f"layer {layer!r}: the permutation is of {shape[0]} experts with {shape[1]} neurons, the layer has "
                    f"{wanted[0]} with {wanted[1]}; it was made for another model"
                )

    def layer(self, layer: LayerId) -> LayerStatistics:
        """Statistics of one layer.

        Raises:
            ValueError: they are of another model; names the layer.
        """
        if layer not in self.routing.layers:
            raise ValueError(f"layer {layer!r}: no routing statistics; they have {sorted(self.routing.layers)}")
        return self.routing.layers[layer]

    def per_weight(self, kind: str, layer: LayerId, like: ExpertWeights) -> ExpertWeights | None:
        """Gradients (``gradient``) or Fisher information (``fisher``), in the neuron order of ``like``."""
        if not self.tensors:
            return None
        found = expert_tensors(dict(self.tensors), kind, layer, like)
        return align.apply_permutation(found, self.permutations[layer], layer) if layer in self.permutations else found


def _permutations(file: Path, statistics: RoutingStatistics) -> dict[LayerId, Tensor]:
    """Table ``permutation``: by layer [E, F] int64, complete for all layers that ``statistics`` are of.

    Raises:
        ValueError: a layer that is in one of them only, or has another number of experts; names file and layer.
    """
    from mcsmoe.artefacts.tables import read_table

    moved: dict[LayerId, Tensor] = {}
    for layer, rows in read_table(file, "permutation").groupby("layer", sort=False):
        stacked = np.stack(rows.sort_values("expert")["permutation"].tolist()).astype(np.int64)
        moved[str(layer)] = torch.from_numpy(stacked)
    for layer in sorted(set(moved) ^ set(statistics.layers)):
        where = "the permutation" if layer in statistics.layers else "the routing statistics"
        raise ValueError(f"{file}: layer {layer!r} is missing in {where}; they are of different models")
    for layer, permutation_EF in moved.items():
        experts = statistics.layers[layer].num_experts
        if len(permutation_EF) != experts:
            raise ValueError(
                f"{file}: layer {layer!r} has a permutation for {len(permutation_EF)} experts, the routing statistics are "
                f"of {experts}; delete it and run again"
            )
    return moved
