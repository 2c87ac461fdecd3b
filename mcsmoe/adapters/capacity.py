"""What Switch and NLLB-MoE have in common: an encoder and a decoder with experts that are modules of their own, behind routers
that limit how many tokens an expert takes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from mcsmoe.adapters.base import Capture
from mcsmoe.adapters.redirecting import NEVER, ExpertShape, Place, RedirectingAdapter, recording
from mcsmoe.modules import RedirectedExperts
from mcsmoe.types import IGNORED, ExpertActivation, ExpertWeights, LayerId, Role, RoutedBatch, RouterWeights


class InputActivation:
    """The model's activation function applied to the input projection; a class so that models stay picklable, copyable."""

    def __init__(self, function: nn.Module, name: str) -> None:
        self.function, self.name = function, name

    def __call__(self, outputs: Mapping[str, Tensor]) -> Tensor:
        return cast(Tensor, self.function(outputs[self.name]))


class CapacityAdapter(RedirectingAdapter):
    """Encoder-decoder and encoder-only models; encoder and decoder may differ in depth and sparse step.

    Attributes:
        model_class: of the family's models.
        sparse_class: of their sparse layers.
        matrices: role of each matrix of an expert, by the name of its linear module; the input projection first.
        biases: whether these have biases.
    """

    model_class: ClassVar[type[nn.Module]]
    sparse_class: ClassVar[type[nn.Module]]
    matrices: ClassVar[dict[str, Role]]
    biases: ClassVar[bool] = False

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return isinstance(model, cls.model_class) and any(
            isinstance(module, cls.sparse_class) for module in model.modules()
        )

    # -- structure -----------------------------------------------------------------------------------------------
    def layers(self, model: nn.Module) -> list[LayerId]:
        return [path for path, module in model.named_modules() if isinstance(module, self.sparse_class)]

    def _mlp(self, model: nn.Module, layer: LayerId) -> Any:
        try:
            module = model.get_submodule(layer)
        except AttributeError:
            module = None
        if not isinstance(module, self.sparse_class):
            raise ValueError(f"layer {layer!r} is not a sparse layer of this model; it has {self.layers(model)}")
        return module

    def _experts_name(self, model: nn.Module, layer: LayerId) -> str:
        self._mlp(model, layer)
        return "experts"

    def _place(self, model: nn.Module, layer: LayerId) -> Place:
        return Place(self._experts_name(model, layer), "router", "classifier")

    def num_experts(self, model: nn.Module, layer: LayerId) -> int:
        return int(self._mlp(model, layer).router.num_experts)

    def activation(self, model: nn.Module, layer: LayerId) -> ExpertActivation:
        experts: Any = self._experts(model, layer)
        return experts.activation if isinstance(experts, RedirectedExperts) else self._stock_activation(experts)

    # -- stock experts -------------------------------------------------------------------------------------------
    def _stock_activation(self, experts: Any) -> InputActivation:
        return InputActivation(experts["expert_0"].act, next(iter(self.matrices)))

    def _stock_shape(self, experts: Any) -> ExpertShape:
        shapes = {name: tuple(getattr(experts["expert_0"], name).weight.shape) for name in self.matrices}
        return ExpertShape(shapes, dict(self.matrices), tuple(self.matrices) if self.biases else ())

    def _linears(self, experts: Any, name: str) -> list[nn.Linear]:
        count = sum(child.startswith("expert_") for child, _ in experts.named_children())
        return [getattr(experts[f"expert_{index}"], name) for index in range(count)]

    def _stock_read(self, experts: Any) -> ExpertWeights:
        tensors: dict[str, Tensor] = {}
        for name in self.matrices:
            tensors[name] = torch.stack([linear.weight.detach() for linear in self._linears(experts, name)])
        for name in self.matrices if self.biases else ():
            tensors[f"{name}_bias"] = torch.stack([linear.bias.detach() for linear in self._linears(experts, name)])
        return ExpertWeights(tensors, self._stock_shape(experts).all_roles())

    def _stock_write(self, experts: Any, weights: ExpertWeights) -> None:
        for name in self.matrices:
            for index, linear in enumerate(self._linears(experts, name)):
                linear.weight.copy_(weights.tensors[name][index])
                if self.biases:
                    linear.bias.copy_(weights.tensors[f"{name}_bias"][index])

    # -- router --------------------------------------------------------------------------------------------------
    def read_router(self, model: nn.Module, layer: LayerId) -> RouterWeights:
        classifier = self._mlp(model, layer).router.classifier
        bias = None if classifier.bias is None else classifier.bias.detach().clone()
        return RouterWeights(classifier.weight.detach().clone(), bias)

    @torch.no_grad()
    def mask_router(self, model: nn.Module, layer: LayerId, dropped_E: Tensor) -> None:
        # The stock router's own bias, so that the checkpoint needs nothing new; the configuration asks for it everywhere.
        config: Any = model.config
        config.router_bias = True
        for path in self.layers(model):
            classifier = self._mlp(model, path).router.classifier
            if classifier.bias is None:
                classifier.bias = nn.Parameter(classifier.weight.new_zeros(classifier.out_features))
        bias_E = self._mlp(model, layer).router.classifier.bias
        bias_E.masked_fill_(dropped_E.to(bias_E.device), NEVER)

    def router_parameters(self, model: nn.Module) -> list[str]:
        return [
            f"{layer}.router.{name}"
            for layer in self.layers(model)
            for name, _ in self._mlp(model, layer).router.named_parameters()
        ]

    # -- capture -------------------------------------------------------------------------------------------------
    @abstractmethod
    def _routed(self, layer: LayerId, router: Any, hidden: Tensor, result: Any, mask: Tensor | None) -> RoutedBatch:
        """What a router's ``result`` on ``hidden`` says; ``mask`` is of the positions that are no padding."""

    @contextmanager
    def capture(self, model: nn.Module, detach: bool = True) -> Iterator[Capture]:
        captured, call, hooks = Capture(), {}, []  # type: ignore[var-annotated]

        def record(layer: LayerId, router: nn.Module, hidden: Tensor, result: Any) -> None:
            batch = self._routed(layer, router, hidden, result, _mask(call, layer))
            captured.batches[layer] = batch.detached() if detach else batch

        for layer in self.layers(model):
            hooks.append(
                self._mlp(model, layer).router.register_forward_hook(
                    lambda router, inputs, result, layer=layer: record(layer, router, inputs[0], result)
                )
            )
        with recording(model, hooks, captured, call):
            yield captured


def _mask(call: Mapping[str, Any], layer: LayerId) -> Tensor | None:
    """bool [B, S]: encoder positions with attention, decoder positions with a label (else with attention)."""
    if "decoder" not in layer.split("."):
        return call.get("attention_mask")
    if call.get("labels") is not None:
        return cast(Tensor, call["labels"] != IGNORED)
    return call.get("decoder_attention_mask")
