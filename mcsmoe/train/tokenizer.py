"""A T5-style tokenizer trained on the spot: byte-pair pieces, pad 0, end 1, unknown 2, and sentinels for span corruption."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"


def sentinel(index: int) -> str:
    """Name of the sentinel that marks masked span ``index``."""
    return f"<extra_id_{index}>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, sentinels: int, lowercase: bool) -> PreTrainedTokenizerFast:
    """Train byte-pair pieces on ``texts``.

    Args:
        vocab_size: pieces in all, special ones included; fewer where the texts do not give as many.
        sentinels: number of ``<extra_id_i>`` tokens, the last in the vocabulary.
        lowercase: fold case before anything else.

    Raises:
        ValueError: a vocabulary too small for the special tokens; names the field.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, EOS, UNKNOWN]
    if vocab_size <= len(special) + sentinels:
        raise ValueError(
            f"tokenizer vocab_size={vocab_size} leaves no room beside {len(special) + sentinels} special tokens; raise it"
        )
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    steps = [normalizers.NFKC()] + ([normalizers.Lowercase()] if lowercase else [])
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - sentinels, special_tokens=special, show_progress=False, limit_alphabet=200
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    extra = [sentinel(index) for index in range(sentinels)]
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=extra,
        model_input_names=["input_ids", "attention_mask"],
    )
    return wrapped


def sentinel_ids(tokenizer: PreTrainedTokenizerFast) -> Sequence[int]:
    """Ids of ``<extra_id_0>``, ``<extra_id_1>``, ... in order.

    Raises:
        ValueError: the tokenizer has none, so it cannot serve span corruption.
    """
    found: list[int] = []
    while (token := tokenizer.convert_tokens_to_ids(sentinel(len(found)))) not in (None, tokenizer.unk_token_id):
        found.append(token)
    if not found:
        raise ValueError(f"the tokenizer has no {sentinel(0)} token, which span corruption needs")
    return found
