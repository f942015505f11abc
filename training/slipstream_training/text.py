"""The text of a pair: collected once, tokenised once, kept in the work folder.

Owns the cache's layout. Streams are compressed, so that they travel to another machine in little space.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from . import corpus
from .data import encode_stream, token_byte_lengths
from .tokenizer import train_tokenizer


@dataclass(frozen=True)
class Text:
    """What the networks learn from (`train`), are chosen by (`validation`) and are reported on (`test`)."""

    tokenizer: Tokenizer
    streams: dict[str, np.ndarray]
    manifest: dict

    def bytes_per_token(self, split: str) -> float:
        """Mean UTF-8 bytes per token of one split."""
        return float(token_byte_lengths(self.tokenizer)[self.streams[split]].mean())


def write_text(crates: list[corpus.Crate], record: dict, vocabulary: int, rules: str, folder: Path) -> None:
    """Learns the tokenizer and encodes every split into `folder`; the manifest is written last and marks completion."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus.texts(crates, "train"), vocabulary, rules)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    for split in corpus.SPLITS:
        np.savez_compressed(folder / f"{split}.npz", ids=encode_stream(tokenizer, corpus.texts(crates, split)))
    (folder / "corpus-manifest.json").write_text(json.dumps(record, indent=1) + "\n")


def read_text(folder: Path) -> Text:
    """Reads what `write_text` left."""
    streams = {split: np.load(folder / f"{split}.npz")["ids"] for split in corpus.SPLITS}
    record = json.loads((folder / "corpus-manifest.json").read_text())
    return Text(Tokenizer.from_file(str(folder / "tokenizer.json")), streams, record)


def prepare_text(repository: Path, vocabulary: int, rules: str, work: Path) -> Text:
    """Collects the corpus and returns its streams, from the work folder when they are there.

    A work folder that already has a finished `text` is taken as it is: so a machine without cargo and
    without the sources can train on streams that another one prepared.
    """
    folder = work / "text"
    if not (folder / "corpus-manifest.json").exists():
        crates = corpus.collect(repository)
        write_text(crates, corpus.manifest(crates), vocabulary, rules, folder)
    text = read_text(folder)
    if text.tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"{folder} holds another vocabulary: take another --work-dir")
    sizes = text.manifest["bytes"]
    print(f"corpus: {len(text.manifest['crates'])} crates, {sizes['train'] / 1e6:.1f} MB to learn from, "
          f"{sizes['validation'] / 1e6:.1f} MB to choose by, {sizes['test'] / 1e6:.1f} MB to report on")
    print(f"tokens: {len(text.streams['train']) / 1e6:.1f} M to learn from, "
          f"{text.bytes_per_token('test'):.2f} bytes each on the test crates", flush=True)
    return text
