"""Collects the Rust sources of this workspace's own dependencies and pins them in a manifest.

Owns which crates and files count as text worth learning (licence, generated code, duplicates) and
the split by crate. Reads only what cargo and the toolchain already have on disk; never downloads
anything. The standard library comes from the source pages that the toolchain's documentation ships:
its documentation is in there as comments.
"""

import hashlib
import html
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PERMISSIVE = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "ISC",
    "MIT", "MIT-0", "Unicode-3.0", "Unicode-DFS-2016", "Unlicense", "Zlib",
}
# Declarations of a foreign interface, written by a generator or listing thousands of constants.
BINDINGS = {
    "hermit-abi", "js-sys", "libc", "linux-raw-sys", "r-efi", "redox_syscall", "wasi", "wasip2",
    "web-sys", "windows-link", "windows-sys", "windows-targets", "wit-bindgen",
}
# Unseen crates of different styles. With the first group choices are made (shapes, rates, losses): an
# error type, buffers, a hash map, middleware, a file walker. The second group is only ever measured
# on, once a pair is final: a parser, iterator adaptors, version rules, small stores, files, names.
UNSEEN = {
    "validation": {"anyhow", "bytes", "indexmap", "tower", "walkdir"},
    "test": {"heck", "httparse", "itertools", "semver", "slab", "tempfile"},
}
SPLITS = ("train", *UNSEEN)
STANDARD_LIBRARY = ("alloc", "core", "proc_macro", "std", "test")
SOURCE_LINE = re.compile(r"<a href=#\d+ id=\d+ data-nosnippet>\d+</a>")
TAG = re.compile(r"<[^>]*>")
GENERATED_FOLDERS = {"bindings", "generated", "tables", "target", "third_party", "vendor"}
GENERATED_MARK = re.compile(r"@generated|auto(matically |-)?generated|generated (by|from|with)|do not edit", re.I)


@dataclass(frozen=True)
class SourceFile:
    """One file of a crate; `path` is relative to the crate's root."""

    path: str
    text: str


@dataclass(frozen=True)
class Crate:
    """One crate with the files that passed every filter."""

    name: str
    version: str
    license: str
    files: tuple[SourceFile, ...]

    @property
    def split(self) -> str:
        """`validation` or `test` for the unseen crates, else `train`."""
        return next((split for split, names in UNSEEN.items() if self.name in names), "train")

    @property
    def bytes(self) -> int:
        """Size of the kept text in UTF-8 bytes."""
        return sum(len(file.text.encode()) for file in self.files)

    @property
    def digest(self) -> str:
        """SHA-256 over paths and contents in path order."""
        state = hashlib.sha256()
        for file in self.files:
            state.update(f"{file.path}\0{len(file.text.encode())}\0".encode())
            state.update(file.text.encode())
        return state.hexdigest()


def is_permissive(expression: str | None) -> bool:
    """Whether an SPDX expression can be met by permissive licences alone (`/` is an old `OR`)."""
    if not expression:
        return False
    flat = expression.replace("/", " OR ").replace("(", " ").replace(")", " ")
    if " AND " in flat:
        # Conservative for mixed expressions: each side of every AND needs a permissive choice.
        return all(is_permissive(part) for part in flat.split(" AND "))
    return any(" ".join(choice.split()) in PERMISSIVE for choice in flat.split(" OR "))


def output_of(command: list[str], workspace: Path) -> str:
    """What a command prints; its own complaints are shown, and a failure is an error of one line."""
    done = subprocess.run(command, cwd=workspace, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise ValueError(f"`{' '.join(command)}` failed; did `cargo fetch` run?")
    return done.stdout


def version_key(version: str) -> tuple[int, ...]:
    """Orders versions by their numbers, enough to prefer the newest of one crate."""
    return tuple(int(number) for number in re.findall(r"\d+", version.split("+")[0]))


def dependency_packages(workspace: Path) -> list[dict]:
    """The registry packages of `cargo metadata --locked`, newest version of each name, by name."""
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--offline"]
    metadata = json.loads(output_of(command, workspace))
    newest: dict[str, dict] = {}
    for package in metadata["packages"]:
        if package["source"] is None or not is_permissive(package["license"]) or package["name"] in BINDINGS:
            continue
        known = newest.get(package["name"])
        if known is None or version_key(package["version"]) > version_key(known["version"]):
            newest[package["name"]] = package
    return [newest[name] for name in sorted(newest)]


def looks_generated(text: str) -> bool:
    """True for tables, bindings and other text that no person wrote line by line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    solid = "".join(lines)
    if len(solid) < 200 or len(text) > 300_000:
        return True
    if max(map(len, lines)) > 400 or GENERATED_MARK.search(text[:600]):
        return True
    digits = sum(character.isdigit() for character in solid)
    if digits > 0.12 * len(solid):
        return True
    long_lines = Counter(line for line in lines if len(line) > 12)
    repeated = sum(count - 1 for count in long_lines.values())
    return len(lines) > 60 and repeated > 0.45 * len(lines)


def keep_new(files: Iterable[SourceFile], seen: set[str]) -> tuple[SourceFile, ...]:
    """Leaves out generated text and contents already `seen`, white space aside."""
    kept = []
    for file in files:
        content = hashlib.sha256("".join(file.text.split()).encode()).hexdigest()
        if content not in seen and not looks_generated(file.text):
            seen.add(content)
            kept.append(file)
    return tuple(kept)


def crate_files(root: Path) -> Iterator[SourceFile]:
    """The hand-written Rust files below a crate's root, in path order."""
    for path in sorted(root.rglob("*.rs")):
        relative = path.relative_to(root)
        if GENERATED_FOLDERS & {part.lower() for part in relative.with_suffix("").parts}:
            continue
        try:
            yield SourceFile(relative.as_posix(), path.read_text(encoding="utf-8").replace("\r\n", "\n"))
        except UnicodeDecodeError:
            continue


def page_text(page: str) -> str:
    """The Rust source inside one source page of rustdoc: what follows each line's number, without tags."""
    body = page[page.index("<pre class=\"rust\">") : page.rindex("</pre>")]
    lines = [html.unescape(TAG.sub("", line)) for line in SOURCE_LINE.split(body)[1:]]
    return "".join(lines).removesuffix("\n") + "\n"


def library_files(root: Path) -> Iterator[SourceFile]:
    """The files of one crate of the standard library, read from its source pages."""
    for path in sorted(root.rglob("*.rs.html")):
        relative = path.relative_to(root).as_posix().removesuffix(".html")
        yield SourceFile(relative, page_text(path.read_text(encoding="utf-8")))


def standard_library(workspace: Path, seen: set[str]) -> list[Crate]:
    """The standard library as the workspace's toolchain ships it."""
    sysroot = output_of(["rustc", "--print", "sysroot"], workspace).strip()
    release = output_of(["rustc", "--version"], workspace)
    pages = Path(sysroot) / "share" / "doc" / "rust" / "html" / "src"
    if not pages.is_dir():
        raise ValueError("the toolchain's documentation is absent: rustup component add rust-docs")
    return [
        Crate(name, release.split()[1], "MIT OR Apache-2.0", keep_new(library_files(pages / name), seen))
        for name in STANDARD_LIBRARY
    ]


def collect(workspace: Path) -> list[Crate]:
    """Reads all usable crates; unseen crates first, so that a duplicate never lands in two splits."""
    unseen = set().union(*UNSEEN.values())
    packages = sorted(dependency_packages(workspace), key=lambda p: (p["name"] not in unseen, p["name"]))
    seen: set[str] = set()
    crates = []
    for package in packages:
        files = keep_new(crate_files(Path(package["manifest_path"]).parent), seen)
        crates.append(Crate(package["name"], package["version"], package["license"], files))
    crates += standard_library(workspace, seen)
    return sorted((crate for crate in crates if crate.files), key=lambda crate: crate.name)


def manifest(crates: list[Crate]) -> dict:
    """The record of what was read: per crate and as one digest over all."""
    rows = [
        {
            "name": crate.name, "version": crate.version, "license": crate.license,
            "files": len(crate.files), "bytes": crate.bytes, "sha256": crate.digest, "split": crate.split,
        }
        for crate in crates
    ]
    pinned = "".join(f"{row['name']} {row['version']} {row['split']} {row['sha256']}\n" for row in rows)
    totals = {split: sum(row["bytes"] for row in rows if row["split"] == split) for split in SPLITS}
    return {"sha256": hashlib.sha256(pinned.encode()).hexdigest(), "bytes": totals, "crates": rows}


def texts(crates: list[Crate], split: str) -> list[str]:
    """All file contents of one split, in crate and path order."""
    return [file.text for crate in crates if crate.split == split for file in crate.files]
