"""Where do documents come from, and what makes one unusable?

A source is a sequence of documents with random access; a stream on the hub only reads forward. The source's
constructor is its schema, and configs/data/*.yaml name the constructor. A user's own source is any class with
`source[i]`, `fingerprint` and, unless it is endless, `len`. It raises BadDocument where a document is
unusable, and OSError where reading failed but may succeed when tried again. Sources are read in forked
processes, so a source must not hold a file's position.
"""

import glob
import hashlib
import importlib.util
import math
import os
import re
import sysconfig
from itertools import chain
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from trainer.config import Number, check_numbers

BAD_KINDS = (
    "empty",
    "not_utf8",
    "huge",
    "missing_field",
    "broken_json",
    "corrupt",
    "turns",  # of a conversation: out of order
    "no_label",  # nothing in it is to be learned
)


class Document(NamedTuple):
    """One text, or the tokens of one (then complete: the source itself adds the end of text).

    mask: of the tokens; True where the model shall learn to predict the token. None: everywhere.
    content, num_bytes: the hash (xxh3, 64 bits) and the size in UTF-8 of the text that the tokens were made
    of, where the source knows them.
    """

    where: str  # for people: "corpus/a.jsonl:17"
    text: str | None = None
    tokens: np.ndarray | None = None
    mask: np.ndarray | None = None
    content: int | None = None
    num_bytes: int | None = None


class Tokens(NamedTuple):
    """What a document's tokens carry, the end of text included: arrays of equal length."""

    ids: np.ndarray  # uint32
    mask: np.ndarray | None = None  # bool, as in Document

    def has_label(self, length: int) -> bool:
        """Do its first tokens predict any?"""
        return self.mask is None or bool(self.mask[1 : length + 1].any())


class BadDocument(Exception):
    """A document that cannot be used; `kind` is one of BAD_KINDS."""

    def __init__(self, kind: str, where: str, detail: str) -> None:
        super().__init__(f"{where}: {kind}: {detail}")
        self.kind, self.where, self.detail = kind, where, detail

    def __reduce__(self) -> tuple:
        return BadDocument, (self.kind, self.where, self.detail)


class Source(Protocol):
    """Documents by number. One without `__len__` only reads forward, like HubSource, and has its `seek`. One
    whose documents have masks says so: `masks = True`; and `needs_labels = True` if those without a label are
    to be passed over. One that makes tokens of text itself is handed the tokenizer: `bind(tokenizer, spec)`.
    One whose documents are tokens without masks may hand over many at once: `ready(places)` gives the list of
    their ids (none of a bad one), and arrays of their texts' hashes and sizes, as in Document.
    """

    fingerprint: str  # which corpus this is: equal on every machine that holds the same one

    def __getitem__(self, i: int) -> Document: ...


def find_files(path: str, *, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that a file name, a directory or a glob stands for, sorted; those of a manifest in its own
    order. Raises: ValueError, or the system's OSError with the path and a remedy.
    """
    try:
        return matching_files(path, suffixes=suffixes)
    except OSError as error:
        remedy = "make it readable for this user, or give another path="
        raise type(error)(f"path={path}: {error.filename}: {error.strerror}; {remedy}") from error


def matching_files(path: str, *, suffixes: tuple[str, ...]) -> list[Path]:
    if not path.strip():
        raise ValueError(
            "path is empty (an unset shell variable?); give a file, a directory or a quoted glob"
        )
    root = expanded(path)
    if root.suffix == ".manifest" and root.is_file():
        return manifest_files(root)
    if root.is_dir():
        below = os.walk(root, onerror=raise_it)  # `rglob` passes over what it may not list
        matches = [
            Path(folder, name) for folder, _, names in below for name in names if name.endswith(suffixes)
        ]
    else:
        matches = [root] if root.is_file() else [Path(name) for name in glob.glob(str(root), recursive=True)]
    files = sorted(file for file in matches if not file.is_dir())
    if not files:
        wanted = ", ".join(f"*{suffix}" for suffix in suffixes)
        raise ValueError(
            f"{path}: no file matches; give a file, a directory with {wanted}, a quoted glob or a *.manifest"
        )
    for file in files:
        if not os.access(file, os.R_OK):
            why = "permission denied" if file.exists() else "a link to nothing"
            raise ValueError(f"{file}: cannot be read ({why}); make it readable or take it out of {path}")
    return files


def expanded(path: str) -> Path:
    """Raises: ValueError where `~` stands for a home directory that is not there."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"path={path}: there is no home directory (HOME is not set); give the whole path"
        ) from error


def raise_it(error: OSError) -> None:
    raise error


def manifest_files(manifest: Path) -> list[Path]:
    """The files of a list, one path a line: relative to the list's directory, and inside of it whatever links
    say.
    """
    base, line_of, files = manifest.parent.resolve(), dict[Path, int](), list[Path]()
    lines = manifest.read_text("utf-8-sig", errors="surrogateescape").splitlines()
    for i, name in enumerate(map(str.strip, lines), start=1):
        if not name or name.startswith("#"):
            continue
        file = manifest.parent / name
        refused = why_refused(file, is_absolute=os.path.isabs(name), base=base, line_of=line_of)
        if refused:
            remedy = f"give each file once, by its path below {manifest.parent}"
            raise ValueError(f"{manifest}:{i}: {name}: {refused}; {remedy}")
        line_of[file.resolve()] = i
        files.append(file)
    if not files:
        raise ValueError(
            f"{manifest}: no file is named; give one a line, by its path below {manifest.parent}"
        )
    return files


def why_refused(file: Path, *, is_absolute: bool, base: Path, line_of: dict[Path, int]) -> str | None:
    if is_absolute:
        return "an absolute path"
    if not os.path.isfile(file):  # unlike a Path's, it does not raise where a name cannot be one
        return "a directory" if os.path.isdir(file) else "no such file"
    target = file.resolve()
    if not target.is_relative_to(base):
        return f"leads out of the manifest's directory, to {target}"
    if target in line_of:
        return f"the file of line {line_of[target]} again"
    return None if os.access(target, os.R_OK) else "permission denied"


def hashed(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def hashed_files(files: list[Path], *parts: object) -> str:
    """A hash of sizes and of names below the common directory: cheap, and a corpus may be moved."""
    root = os.path.commonpath([file.parent for file in files])
    return hashed([(file.relative_to(root).as_posix(), file.stat().st_size) for file in files], *parts)


def decoded(data: bytes, *, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadDocument("not_utf8", where, str(error)) from None


def utf8_size(text: str) -> int:
    """[bytes] Python knows of each text whether it is ASCII. Raises: UnicodeEncodeError."""
    return len(text) if text.isascii() else len(text.encode())


def from_field(value: object, *, field: str, where: str) -> Document:
    """A document from one field of a record; None where the record has no such field. Bytes must be UTF-8."""
    if isinstance(value, bytes):
        return Document(where, text=decoded(value, where=where))
    if not isinstance(value, str):
        raise BadDocument("missing_field", where, f"field {field!r} is {type(value).__name__}, not a string")
    try:
        utf8_size(value)  # JSON can spell half a surrogate pair, which no encoding of text can hold
    except UnicodeEncodeError as error:
        raise BadDocument("not_utf8", where, str(error)) from None
    return Document(where, text=value)


def locate(starts: np.ndarray, i: int) -> tuple[int, int]:
    """Document i is number `i - starts[part]` of the part that holds it."""
    part = int(np.searchsorted(starts, i, side="right")) - 1
    return part, i - int(starts[part])


class TextSource:
    """One file, one document. `path`: a file, a directory (*.txt below it), a glob or a *.manifest."""

    def __init__(self, path: str) -> None:
        self.files = find_files(path, suffixes=(".txt",))
        self.fingerprint = hashed_files(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> Document:
        where = str(self.files[i])
        return Document(where, text=decoded(self.files[i].read_bytes(), where=where))


class PythonSource(TextSource):
    """The running interpreter's standard library: real text that every machine has (3.11: 32 MB).

    `match`: a regular expression for the files' names below the library's directory; without it, all.
    `package`: the name of an installed package, whose files are taken in place of the library's.
    """

    def __init__(self, match: str = ".*", package: str | None = None) -> None:
        root = Path(sysconfig.get_path("stdlib")) if package is None else directory_of(package)
        installed = (root / "site-packages", root / "dist-packages")
        packages = [path for path in root.iterdir() if path.is_dir() and path not in installed]
        try:
            wanted = re.compile(match)
        except re.error as error:
            raise ValueError(f"match={match}: is no regular expression ({error})") from None
        files = [root.glob("*.py"), *(package.rglob("*.py") for package in packages)]
        modules = sorted(file for file in chain.from_iterable(files) if file.is_file())
        self.files = [file for file in modules if wanted.fullmatch(file.relative_to(root).as_posix())]
        if not self.files:
            example = modules[0].relative_to(root).as_posix() if modules else "a package with Python files"
            raise ValueError(f"match={match}: none of the {len(modules)} files; an example is {example}")
        self.fingerprint = hashed_files(self.files)


def directory_of(package: str) -> Path:
    """Where an installed package lies; it is not imported. Raises: ValueError."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError) as error:
        raise ValueError(f"package={package}: cannot be looked up ({error})") from None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"package={package}: is no installed package; give one that is, like rich")
    return Path(next(iter(spec.submodule_search_locations)))


RAREST = 6  # [deviations] that one document in a billion exceeds
MAX_LENGTH = 10**8  # [tokens] of a document, made at once
SYNTHETIC = {
    "vocab_size": Number(at_least=1, at_most=2**32, why="tokens are numbers of 32 bits"),
    "num_topics": Number(at_least=1, at_most=10**6, why="each has a number in memory"),
    "topic_skew": Number(at_least=0.0, at_most=100.0, why="one topic has all documents long before"),
    "mean_length": Number(at_least=1.0, at_most=1e8, why="a document is made at once"),
    "length_sigma": Number(at_least=0.0, at_most=10.0, why="of the logarithm of the length"),
    "noise": Number(at_least=0.0, at_most=1.0, why="a share of the tokens"),
    "num_documents": Number(at_least=1, at_most=10**8, why="the order of an epoch takes 16 bytes a document"),
    "seed": Number(at_least=0, at_most=2**63 - 1, why="generators take 63 bits"),
}


class SyntheticSource:
    """Documents about topics, for runs in which a router without balancing must collapse.

    Topics are Zipf distributed, p(topic k) ~ (k + 1) ** -topic_skew: a few own most tokens. A topic has its
    own slice of the vocabulary, where a token is followed by the one `stride` further on (cyclically) or,
    with probability `noise`, by any. Lengths are lognormal; token 0 ends a document. Document i is a function
    of (seed, i).
    """

    def __init__(
        self,
        vocab_size: int,
        num_topics: int = 32,
        topic_skew: float = 1.2,
        mean_length: float = 512.0,
        length_sigma: float = 1.0,
        noise: float = 0.1,
        num_documents: int = 1_000_000,
        seed: int = 0,
    ) -> None:
        check_numbers(
            SYNTHETIC,
            vocab_size=vocab_size,
            num_topics=num_topics,
            topic_skew=topic_skew,
            mean_length=mean_length,
            length_sigma=length_sigma,
            noise=noise,
            num_documents=num_documents,
            seed=seed,
        )
        self.width = (vocab_size - 1) // num_topics  # tokens of a topic
        if self.width < 2:
            remedy = f"use {2 * num_topics + 1} or more, or fewer topics"
            raise ValueError(f"vocab_size={vocab_size} holds no {num_topics} topics of 2 tokens; {remedy}")
        self.vocab_size, self.num_documents, self.noise, self.seed = vocab_size, num_documents, noise, seed
        self.log_mean, self.log_sigma = math.log(mean_length) - length_sigma**2 / 2, length_sigma
        if (longest := math.exp(self.log_mean + RAREST * length_sigma)) > MAX_LENGTH:
            lengths = f"mean_length={mean_length:g} with length_sigma={length_sigma:g}"
            raise ValueError(f"{lengths}: a document could have {longest:.1e} tokens; use less of either")
        self.topic_cdf = (np.arange(1, num_topics + 1) ** -float(topic_skew)).cumsum()
        self.topic_cdf /= self.topic_cdf[-1]
        shape = (vocab_size, num_topics, topic_skew, mean_length, length_sigma, noise)
        self.fingerprint = hashed("synthetic", *shape, num_documents, seed)

    def __len__(self) -> int:
        return self.num_documents

    def __getitem__(self, i: int) -> Document:
        random = np.random.Generator(np.random.Philox(key=[self.seed, i]))
        topic = int(np.searchsorted(self.topic_cdf, random.random(), side="right"))
        length = max(1, round(random.lognormal(self.log_mean, self.log_sigma)))
        steps = random.integers(self.width, size=length)  # uniform: a jump to any token of the slice
        stride = 1 + topic % (self.width - 1)
        steps[1:][random.random(length - 1) >= self.noise] = stride
        tokens = 1 + topic * self.width + steps.cumsum() % self.width
        return Document(f"synthetic:{i}", tokens=np.append(tokens, 0).astype(np.uint32))


def permutation(num_documents: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch. From raw bits: numpy promises to keep those, and not its `permutation`."""
    bits = np.random.Philox(key=[seed, epoch]).random_raw(num_documents)
    return bits.argsort(kind="stable")
