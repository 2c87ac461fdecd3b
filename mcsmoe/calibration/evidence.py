"""What calibration found out about a model, as the stages after it read it."""

from __future__ import annotations

from collections.abc import Mapping
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
    def read(routing: Path, gradients: Path | None = None, permutation: Path | None = None) -> Evidence:
        """Read the files that the stages before have written."""
        moved: dict[LayerId, Tensor] = {}
        if permutation is not None:
            from mcsmoe.artefacts.tables import read_table

            for layer, rows in read_table(permutation, "permutation").groupby("layer", sort=False):
                moved[str(layer)] = torch.from_numpy(
                    np.stack(rows.sort_values("expert")["permutation"].tolist()).astype(np.int64)
                )
        found = {} if gradients is None else load_tensors(gradients)
        return Evidence(load_statistics(routing), found, moved)

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
