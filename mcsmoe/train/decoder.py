"""Build a decoder-only model with experts in every layer, and train it to predict the next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mcsmoe.train.pretrain import Ids, check_corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_COMMON = {
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_experts": "num_experts",
    "num_heads": "num_attention_heads",
    "experts_per_token": "num_experts_per_tok",
}
FAMILIES: dict[str, dict[str, str]] = {
    "qwen3_moe": {**_COMMON, "d_ff": "moe_intermediate_size", "d_kv": "head_dim"},
    "olmoe": {**_COMMON, "d_ff": "intermediate_size"},
}
"""By model type of the library, what it calls the fields of ``model.architecture``."""

# Combine weights sum to one whatever is left of them, and no loss of the library's is added to ours.
_FIXED: dict[str, Any] = {"norm_topk_prob": True, "output_router_logits": False, "tie_word_embeddings": True}


def build_decoder(
    architecture: dict[str, Any], vocab_size: int, positions: int, seed: int, end: int, pad: int
) -> nn.Module:
    """A decoder-only model with random weights, every layer sparse.

    Args:
        architecture: section ``model.architecture`` of the configuration.
        positions: longest sequence.
        end, pad: ids of these tokens.

    Raises:
        ValueError: a family that is not known, or heads that do not share the width evenly.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    family = architecture["family"]
    if family not in FAMILIES:
        raise ValueError(f"model.architecture.family is {family!r}; decoder-only ones are {', '.join(FAMILIES)}")
    named = {theirs: architecture[ours] for ours, theirs in FAMILIES[family].items()}
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        num_key_value_heads=architecture["num_heads"],
        max_position_embeddings=positions,
        eos_token_id=end,
        pad_token_id=pad,
        bos_token_id=None,
        **_FIXED,
        **named,
    )
    torch.manual_seed(seed)
    made: nn.Module = AutoModelForCausalLM.from_config(config)
    return made


@dataclass(frozen=True)
class NextToken:
    """Batches of step ``s`` from one long stream of tokens; the same step always gives the same batch.

    Args:
        stream: [N] token ids of the whole corpus, documents one after another.
        window: tokens of an example.
    """

    stream: Ids
    window: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        check_corpus(self.stream, self.window + 1, self.batch_size)

    @property
    def windows(self) -> int:
        return (len(self.stream) - 1) // self.window

    @property
    def steps_per_epoch(self) -> int:
        return self.windows // self.batch_size

    def batch(self, step: int) -> dict[str, Tensor]:
        """input_ids, attention_mask, and labels: the token after each, of step ``step`` (from 0).

        Every epoch cuts the stream elsewhere.
        """
        epoch, place = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.seed, epoch))
        offset = int(order.integers(0, len(self.stream) - self.windows * self.window))
        chosen = order.permutation(self.windows)[place * self.batch_size : (place + 1) * self.batch_size]
        starts_B1 = offset + chosen[:, None] * self.window
        window_BT = self.stream[starts_B1 + np.arange(self.window + 1)]
        input_ids = torch.from_numpy(window_BT[:, :-1].copy())
        labels = torch.from_numpy(window_BT[:, 1:].copy())
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": labels}


def train_byte_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-pair pieces over bytes, as decoder-only families have them: every text is its tokens, white space included.

    Raises:
        ValueError: a vocabulary too small for all bytes and the special tokens; names the field.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from mcsmoe.train.tokenizer import EOS, PAD

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(
            f"model.tokenizer.vocab_size is {vocab_size}; all bytes take at least {len(alphabet) + 2}, raise it"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], show_progress=False, initial_alphabet=sorted(alphabet)
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, model_input_names=names)
