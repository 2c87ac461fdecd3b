"""Task-specific expert pruning inside the training loop (Chen et al., arXiv 2206.00277).

While the base model is fine-tuned, the usage of its experts is averaged over steps. Every ``interval`` steps the experts
that a task hardly uses fall away; at ``until`` of the training each layer comes down to the number it may keep, and what
is left is fine-tuned to the end. The router is masked, so that no token is ever sent to an expert that has fallen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mcsmoe.adapters.base import Adapter
from mcsmoe.train import processes
from mcsmoe.train.usage import TaskSpecificPruner, UsageAverage, living_grouping
from mcsmoe.types import Grouping, LayerId


class UsagePruner:
    """Takes in the usage of each step, and masks the routers on schedule; a ``Pruner`` of the training loop.

    Args:
        layers: the layers that are pruned; the others keep all their experts.
        experts: experts that each of them keeps.
        steps: of the whole training.
        threshold: an expert falls whose share among the living is below ``threshold`` / (number alive).
        interval: steps between two decisions.
        until: share of the steps after which each layer has ``experts`` experts.
        decay: weight of the past in the average usage.

    Raises:
        ValueError: a layer has fewer experts than it shall keep, or a router that cannot be masked; names the layer.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        layers: Sequence[LayerId],
        experts: int,
        steps: int,
        threshold: float = 0.5,
        interval: int = 50,
        until: float = 0.5,
        decay: float = 0.9,
    ) -> None:
        self.model, self.adapter, self.interval = model, adapter, interval
        self.last = max(1, min(steps, round(until * steps)))
        self.average, self.pruner = UsageAverage(decay), TaskSpecificPruner(threshold, experts)
        self._counts: dict[LayerId, Tensor] = {}
        for layer in layers:
            found = adapter.num_experts(model, layer)
            if found < experts:
                raise ValueError(f"layer {layer!r} has {found} experts; it cannot keep {experts}, lower experts")
            self.pruner.alive[layer] = torch.ones(found, dtype=torch.bool)
            # The place of the mask must be there before the optimiser and a saved state look at the parameters.
            adapter.mask_router(model, layer, torch.zeros(found, dtype=torch.bool))
        self._masks = [name for name in adapter.router_parameters(model) if name.endswith("bias")]
        for name in self._masks:
            model.get_parameter(name).requires_grad_(False)

    def count(self, layer: LayerId, counts_E: Tensor) -> None:
        """Add the tokens that chose each expert in part of a step (int64 [E])."""
        if layer in self.pruner.alive:
            self._counts[layer] = self._counts[layer] + counts_E if layer in self._counts else counts_E.clone()

    def observe(self) -> None:
        """Take the step's counts, of all processes, into the average."""
        self.average.update({layer: processes.summed(counts_E).cpu() for layer, counts_E in self._counts.items()})
        self._counts = {}

    def apply(self, step: int) -> float:
        """Let experts fall where it is time.

        Returns:
            The fraction of all experts that is alive.
        """
        done = step + 1
        if done == self.last or (done < self.last and done % self.interval == 0):
            usage = {layer: self.average.frequency.get(layer, even) for layer, even in self._even().items()}
            for layer, alive_E in self.pruner.prune(usage, to_minimum=done == self.last).items():
                self.adapter.mask_router(self.model, layer, ~alive_E)
        alive = [alive_E.double().mean().item() for alive_E in self.pruner.alive.values()]
        return sum(alive) / len(alive)

    def _even(self) -> dict[LayerId, Tensor]:
        return {layer: torch.full(alive_E.shape, 1.0 / len(alive_E)) for layer, alive_E in self.pruner.alive.items()}

    def finished(self, step: int) -> bool:
        """Whether every layer has come down to the experts it keeps."""
        return step + 1 >= self.last

    def groupings(self) -> dict[LayerId, Grouping]:
        """Every living expert in a group of its own; the fallen, which nothing can reach, are with the most used one."""
        usage = self._even() | self.average.frequency
        return {layer: living_grouping(alive_E, usage[layer]) for layer, alive_E in self.pruner.alive.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Average usage and who is alive, by layer."""
        parts = {"usage": self.average.state_dict(), "alive": self.pruner.state_dict()}
        return {f"{part}/{layer}": tensor for part, tensors in parts.items() for layer, tensor in tensors.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore ``state_dict``; the masks stand in the model's own state.

        A saved state is sorted by name. Layers stay in forward order, or a resumed run would write its groups in another.
        """
        layers = list(self.pruner.alive)
        for part, owner in (("usage", self.average), ("alive", self.pruner)):
            owner.load_state_dict({layer: state[f"{part}/{layer}"] for layer in layers if f"{part}/{layer}" in state})


def remove_fallen(model: nn.Module, adapter: Adapter, groupings: Mapping[LayerId, Grouping]) -> None:
    """Leave only the living experts in ``model``, in place; the routers are masked already."""
    for layer, grouping in groupings.items():
        kept = adapter.read_experts(model, layer).select(grouping.dominant)
        adapter.write_experts(model, layer, kept, grouping.expert_to_group)
