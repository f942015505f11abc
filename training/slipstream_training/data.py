"""Turns texts into one stream of token ids and cuts random training windows from it."""

from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from .tokenizer import END_OF_TEXT_ID


def encode_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Encodes all texts into one `uint16` stream; every text is ended by the end-of-text token."""
    pieces = []
    for start in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 256], add_special_tokens=False):
            pieces.append(np.asarray([*encoding.ids, END_OF_TEXT_ID], dtype=np.uint16))
    return np.concatenate(pieces)


def decode_stream(tokenizer: Tokenizer, stream: np.ndarray) -> list[str]:
    """The texts that `encode_stream` made the stream of."""
    ends = np.flatnonzero(stream == END_OF_TEXT_ID)
    return [tokenizer.decode(part[part != END_OF_TEXT_ID].tolist()) for part in np.split(stream, ends + 1) if len(part)]


def token_byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """UTF-8 bytes that each id stands for; the end-of-text token stands for none."""
    lengths = [len(tokenizer.id_to_token(token)) for token in range(tokenizer.get_vocab_size())]
    lengths[END_OF_TEXT_ID] = 0
    return np.asarray(lengths)


class Windows:
    """Random windows `[batch, length]` of a token stream, drawn from a seeded generator."""

    def __init__(self, stream: np.ndarray, seed: int, device: str = "cpu"):
        self.stream = torch.from_numpy(stream.astype(np.int32)).to(device)
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self, batch: int, length: int) -> Tensor:
        """Ids `[batch, length]` as int64, on the stream's device."""
        starts = torch.randint(0, len(self.stream) - length, (batch, 1), generator=self.generator)
        return self.stream[(starts + torch.arange(length)).to(self.stream.device)].long()

    def state_dict(self) -> dict:
        """Where the generator is."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a state of `state_dict`."""
        self.generator.set_state(state["generator"])
