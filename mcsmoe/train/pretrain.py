"""Build a Switch Transformer and pre-train it by span corruption (section 3.1.4 of T5, arXiv 1910.10683)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from transformers import SwitchTransformersForConditionalGeneration, T5ForConditionalGeneration

Ids = NDArray[np.int64]
_OF_EXPERTS = (
    *("num_sparse_encoder_layers", "num_sparse_decoder_layers", "num_experts", "expert_capacity"),
    "router_jitter_noise",
)
_OF_DECODERS = ("family", "experts_per_token")  # a Switch Transformer has no such fields
_NEAR, _FAR = 2.0, 8.0  # logits a neighbour's head loses per position, and at most


def build_switch(
    architecture: dict[str, Any], vocab_size: int, seed: int, near_heads: bool = True, residual_scale: float = 1.0
) -> SwitchTransformersForConditionalGeneration:
    """A Switch Transformer with random weights; ``architecture`` holds fields of its configuration class.

    With ``near_heads`` its attention heads start at different ranges, the nearest at the neighbours. ``residual_scale`` is
    the size of what blocks read and write, relative to the library's start; the function computed stays the same.
    """
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    own = {name: value for name, value in architecture.items() if name not in _OF_DECODERS}
    config = SwitchTransformersConfig(
        vocab_size=vocab_size, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **own
    )
    torch.manual_seed(seed)
    model = SwitchTransformersForConditionalGeneration(config)
    _start(model, near_heads, residual_scale)
    return model


def build_dense(
    architecture: dict[str, Any], vocab_size: int, seed: int, near_heads: bool = True, residual_scale: float = 1.0
) -> T5ForConditionalGeneration:
    """A T5 with random weights and the layers of ``build_switch``'s model, every one of them dense: what a token passes
    through is of the same size. (The library's Switch keeps one sparse layer where none is asked for.)
    """
    from transformers import T5Config, T5ForConditionalGeneration

    layers = {name: value for name, value in architecture.items() if name not in (*_OF_EXPERTS, *_OF_DECODERS)}
    config = T5Config(vocab_size=vocab_size, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **layers)
    torch.manual_seed(seed)
    model = T5ForConditionalGeneration(config)
    _start(model, near_heads, residual_scale)
    return model


def _start(model: Any, near_heads: bool, residual_scale: float) -> None:
    if near_heads:
        _look_near(model)
    _scale_residual(model, residual_scale)


@torch.no_grad()
def _scale_residual(model: Any, scale: float) -> None:
    """Make everything that is added up in the residual stream smaller by ``scale``, and the last norm make up for it.

    The library starts embeddings with a deviation of 1. AdamW moves each entry by about a learning rate a step, so a rare
    word never leaves its random start, which then acts as noise on unseen text. Norms at the entry of every layer
    undo the scale, so the function is unchanged and only how fast it is learnt differs.
    """
    model.shared.weight.mul_(scale)
    model.decoder.final_layer_norm.weight.div_(scale)
    for name, parameter in model.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            parameter.mul_(scale)


@torch.no_grad()
def _look_near(model: Any) -> None:
    """Start attention heads at different ranges: at the neighbour before, the neighbour after, and ever wider.

    AdamW moves a position bias by about one learning rate a step, so from the near-zero start of the library a head needs
    thousands of steps to look at a neighbour. The slopes of the wider heads halve as in ALiBi (arXiv 2108.12409).
    """
    for stack in (model.encoder, model.decoder):
        attention = stack.block[0].layer[0].SelfAttention
        buckets, heads = attention.relative_attention_bias.weight.shape
        span = torch.arange(-(buckets // 2) + 1, buckets // 2)  # memory position minus query position
        place = attention._relative_position_bucket(
            span,
            bidirectional=not stack.is_decoder,
            num_buckets=buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        for head in range(heads):
            if head == 0:
                bias = -_NEAR * (span + 1).abs()
            elif head == 1 and not stack.is_decoder:
                bias = -_NEAR * (span - 1).abs()
            else:
                bias = -(0.5**head) * span.abs()
            # A bucket takes the value of the nearest position in it, or of the farthest of all if it has none.
            column = torch.full((buckets,), float(bias.min()))
            column.scatter_reduce_(0, place, bias.to(column), "amax", include_self=False)
            attention.relative_attention_bias.weight[:, head] = column.clamp(min=-_FAR)


def noise_mask(length: int, density: float, mean_span: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """[length] bool: tokens to corrupt, in spans of ``mean_span`` on average, ``density`` of all; never starts with noise.

    Noise and kept tokens are each cut into as many segments as there are spans, at random places, and interleaved.
    """
    noisy = int(np.clip(round(length * density), 1, length - 1))
    spans = int(np.clip(round(noisy / mean_span), 1, min(noisy, length - noisy)))

    def segments(total: int) -> Ids:
        cuts = np.sort(rng.permutation(total - 1)[: spans - 1]) + 1
        return np.diff(np.concatenate([[0], cuts, [total]])).astype(np.int64)

    lengths = np.stack([segments(length - noisy), segments(noisy)], axis=1).ravel()
    return np.repeat(np.tile([False, True], spans), lengths)


def corrupt(window: Ids, mask: NDArray[np.bool_], sentinels: Sequence[int], eos: int) -> tuple[Ids, Ids]:
    """(input, target): each masked span becomes one sentinel in the input; the target lists sentinels and spans."""
    starts = mask & ~np.concatenate([[False], mask[:-1]])
    markers = np.asarray(sentinels)[np.cumsum(starts) - 1]

    def collapse(hidden: NDArray[np.bool_], first: NDArray[np.bool_], names: Ids) -> Ids:
        tokens = np.where(first, names, window)
        return np.append(tokens[~hidden | first], eos)

    ends = ~mask & ~np.concatenate([[False], ~mask[:-1]])
    kept_markers = np.asarray(sentinels)[np.clip(np.cumsum(ends) - 1, 0, None)]
    return collapse(mask, starts, markers), collapse(~mask, ends, kept_markers)


def check_corpus(stream: Ids, window: int, batch_size: int) -> None:
    """Raise ValueError where the corpus is too short for one batch of ``batch_size`` windows."""
    if len(stream) < window * batch_size:
        raise ValueError(
            f"the corpus has {len(stream)} tokens, fewer than one batch of {batch_size} x {window}; "
            "give more text or lower pretrain.batch_size or pretrain.window"
        )


@dataclass(frozen=True)
class SpanCorruption:
    """Batches of step ``s`` from one long stream of tokens; the same step always gives the same batch.

    Args:
        stream: [N] token ids of the whole corpus, documents one after another.
        window: tokens per example before corruption.
    """

    stream: Ids
    window: int
    batch_size: int
    sentinels: Sequence[int]
    eos: int
    density: float
    mean_span: float
    seed: int

    def __post_init__(self) -> None:
        check_corpus(self.stream, self.window, self.batch_size)

    @property
    def windows(self) -> int:
        return len(self.stream) // self.window

    @property
    def steps_per_epoch(self) -> int:
        return self.windows // self.batch_size

    def batch(self, step: int) -> dict[str, Tensor]:
        """input_ids, attention_mask and labels of step ``step`` (from 0); every epoch cuts the stream elsewhere."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch))
        offset = int(order.integers(0, len(self.stream) - self.windows * self.window + 1))
        chosen = order.permutation(self.windows)[place * self.batch_size : (place + 1) * self.batch_size]
        rng = np.random.default_rng((self.seed, epoch, place))
        # One mask a batch, rolled differently in each row: spans differ, lengths agree, nothing is padded.
        inputs, targets = [], []
        for index in chosen:
            start = offset + int(index) * self.window
            mask = noise_mask(self.window, self.density, self.mean_span, rng)
            ids, target = corrupt(self.stream[start : start + self.window], mask, self.sentinels, self.eos)
            inputs.append(ids)
            targets.append(target)
        input_ids = torch.from_numpy(np.stack(inputs))
        labels = torch.from_numpy(np.stack(targets))
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}
