"""Byte-level BPE, small enough for models of a few million parameters.

Owns how text is split before merging, training, and the special token. Id 0 is the end-of-text token,
ids 1 to 256 are the bytes, and the merges follow in rank order, so that an id alone tells which of
the three it is.
"""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0

# Splitting rules by the name that GGUF files carry in `tokenizer.ggml.pre`. `qwen2` takes digits one by
# one, keeps a line's end with the punctuation before it and its indentation as one piece of spaces, and
# lets `_name` and `.name` be one piece: 6 % more bytes per token on Rust than `gpt-2` rules with split digits.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def splitting(rules: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer for a GGUF splitting name: `gpt-2` or `qwen2`."""
    if rules == "gpt-2":
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rules == "qwen2":
        split = pre_tokenizers.Split(Regex(QWEN2), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ValueError(f"unknown splitting rules {rules!r}: gpt-2 and qwen2 are known")


def train_tokenizer(texts: Iterable[str], vocab_size: int, rules: str) -> Tokenizer:
    """Learns merges until the vocabulary has exactly `vocab_size` entries; raises if it cannot."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitting(rules)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"corpus gave {tokenizer.get_vocab_size()} entries, wanted {vocab_size}")
    if tokenizer.token_to_id(END_OF_TEXT) != END_OF_TEXT_ID:
        raise ValueError("the end-of-text token did not get id 0")
    return tokenizer
