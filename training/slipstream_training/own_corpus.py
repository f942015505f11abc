"""An operator's text: read from a folder or a JSONL file, split, and encoded with the verifier's tokenizer.

Owns what counts as text, what is held out, and the windows cut from it. Knows no networks.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from .data import Windows
from .refusal import Refusal
from .teacher import Vocabulary

HELD_OUT = 0.05
MAX_FILE_BYTES = 64 << 20
MAX_CORPUS_BYTES = 2 << 30


@dataclass(frozen=True)
class Corpus:
    """Texts to learn from and texts held out, how they were split, and what was left out by reason."""

    learn: list[str]
    held_out: list[str]
    split: str
    skipped: dict[str, int]

    def digest(self) -> str:
        """Identity of the text and its split."""
        total = hashlib.sha256()
        for part in (self.learn, self.held_out):
            for text in part:
                total.update(hashlib.sha256(text.encode()).digest())
            total.update(b"|")
        return total.hexdigest()[:16]

    def summary(self) -> str:
        """One or two lines for the operator."""
        left = ", ".join(f"{count} {reason}" for reason, count in sorted(self.skipped.items()))
        sizes = [sum(len(text.encode()) for text in part) / 1e6 for part in (self.learn, self.held_out)]
        return (f"corpus: {len(self.learn)} texts, {sizes[0]:.2f} MB to learn from; {len(self.held_out)} texts, "
                f"{sizes[1]:.2f} MB held out ({self.split})" + (f"\nskipped: {left}" if left else ""))


def key_of(name: str) -> str:
    """Where a text stands in the order of the split: random, and the same on every machine."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def folder_paths(folder: Path) -> list[Path]:
    """All files below `folder` in split order; hidden ones and links to folders are not entered."""
    paths = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(paths, key=lambda path: key_of(path.relative_to(folder).as_posix()))


def read_text(path: Path, skipped: Counter) -> str | None:
    """A file's text, or None and one more under the reason why it is none."""
    if not path.is_file():
        reason = "not a regular file"
    elif path.stat().st_size > MAX_FILE_BYTES:
        reason = f"over {MAX_FILE_BYTES >> 20} MiB"
    else:
        content = path.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            text = "\0"
        if "\0" not in text:
            return text
        reason = "not UTF-8 text"
    skipped[reason] += 1
    return None


def jsonl_texts(path: Path, fields: Sequence[str], skipped: Counter) -> Iterator[tuple[str, str]]:
    """(name, text) of every line whose object has a string in one of `fields`, the first such field."""
    with path.open("rb") as file:
        for number, line in enumerate(file):
            try:
                record = json.loads(line)
            except ValueError:
                skipped["lines that are no JSON"] += 1
                continue
            values = [record.get(field) for field in fields] if isinstance(record, dict) else []
            text = next((value for value in values if isinstance(value, str)), None)
            if text is None:
                skipped[f"records without a text in {' or '.join(fields)}"] += 1
            else:
                yield f"line {number}", text


def texts_of(path: Path, fields: Sequence[str], skipped: Counter) -> Iterator[tuple[str, str]]:
    """(name, text) of everything at `path`, in split order."""
    if path.is_dir():
        for file in folder_paths(path):
            text = read_text(file, skipped)
            if text is not None:
                yield file.relative_to(path).as_posix(), text
    elif path.suffix == ".jsonl":
        yield from sorted(jsonl_texts(path, fields, skipped), key=lambda pair: key_of(pair[0]))
    elif path.is_file():
        text = read_text(path, skipped)
        if text is not None:
            yield path.name, text
    else:
        raise Refusal(f"--corpus: {path} does not exist")


def distinct(named: Iterator[tuple[str, str]], skipped: Counter) -> list[str]:
    """Texts without the empty ones, repeated ones (they would be learnt and held out), and what exceeds the bound."""
    texts, seen, size = [], set(), 0
    for _, text in named:
        content = text.encode("utf-8", "replace")
        mark = hashlib.sha256(content).digest()
        if not text.strip():
            skipped["empty"] += 1
        elif mark in seen:
            skipped["repeated"] += 1
        elif size + len(content) > MAX_CORPUS_BYTES:
            skipped[f"beyond {MAX_CORPUS_BYTES >> 30} GiB"] += 1
        else:
            seen.add(mark)
            size += len(content)
            texts.append(content.decode())
    return texts


def split(texts: list[str], skipped: dict[str, int]) -> Corpus:
    """Holds out whole texts, in order, up to `HELD_OUT` of all; too few or too large ones lose their ends instead."""
    wanted = HELD_OUT * sum(map(len, texts))
    held, size = [], 0
    for number, text in enumerate(texts):
        if size < wanted and len(text) <= 2 * wanted:
            held.append(number)
            size += len(text)
    if size >= wanted / 2:
        chosen = set(held)
        learn = [text for number, text in enumerate(texts) if number not in chosen]
        return Corpus(learn, [texts[number] for number in held], "whole texts", skipped)
    cuts = [round(len(text) * (1.0 - HELD_OUT)) for text in texts]
    learn = [text[:cut] for text, cut in zip(texts, cuts, strict=True)]
    ends = [text[cut:] for text, cut in zip(texts, cuts, strict=True)]
    return Corpus(learn, ends, "the end of every text, as they are few", skipped)


def read_corpus(path: Path, fields: Sequence[str]) -> Corpus:
    """Reads and splits what is at `path`."""
    skipped: Counter = Counter()
    texts = distinct(texts_of(path, fields, skipped), skipped)
    if not texts:
        left = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "it is empty"
        hint = "; name the field with --field" if path.suffix == ".jsonl" else ""
        raise Refusal(f"--corpus: no text found in {path} ({left}){hint}")
    return split(texts, dict(skipped))


def encode(vocabulary: Vocabulary, texts: Sequence[str]) -> np.ndarray:
    """One stream of all texts, each ended by the verifier's end-of-text id (and begun as its template begins texts)."""
    begin = [] if vocabulary.begin_id is None else [vocabulary.begin_id]
    pieces = [np.zeros(0, dtype=vocabulary.dtype)]
    for start in range(0, len(texts), 256):
        some = list(texts[start : start + 256])
        for encoding in vocabulary.tokenizer.encode_batch_fast(some, add_special_tokens=False):
            pieces.append(np.asarray([*begin, *encoding.ids, vocabulary.end_id], dtype=vocabulary.dtype))
    return np.concatenate(pieces)


class TextWindows(Windows):
    """Windows that begin with the id that every served prompt begins with, for verifiers that have one.

    Such a verifier never sees position 0 hold anything else, and answers oddly when it does.
    """

    def __init__(self, stream: np.ndarray, seed: int, device: str, begin_id: int | None):
        super().__init__(stream, seed, device)
        self.begin_id = begin_id

    def draw(self, batch: int, length: int) -> Tensor:
        """Ids `[batch, length]` as int64, on the stream's device."""
        ids = super().draw(batch, length)
        if self.begin_id is not None:
            ids[:, 0] = self.begin_id
        return ids
