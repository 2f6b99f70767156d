"""How is a file read that anybody may have written?

Every function returns what a file holds, or raises DamagedError: one line with the file and what is wrong
with it. Nothing in a file is run or resolved.
"""

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open

MAX_INTEGER = 2**63 - 1  # of int64
MAX_SHOWN = 200  # characters of a foreign name or message
MAX_YAML_DEPTH = 50
MAX_YAML_BYTES = 1_000_000  # a config.yaml has some 5 thousand
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  # what safetensors calls the dtypes of a state
FAILURES = (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OverflowError,
    RecursionError,
    MemoryError,
    SafetensorError,
    yaml.YAMLError,
    OmegaConfBaseException,
)


class DamagedError(ValueError):
    """A checkpoint that cannot be used; the message says which file of it, and what is wrong."""


@contextmanager
def reading(where: Path | str) -> Iterator[None]:
    """Turns whatever fails while a file is read into a DamagedError of one line."""
    try:
        yield
    except DamagedError:
        raise
    except FAILURES as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise DamagedError(f"{where}: {kind}{shown(error)}") from None


def shown(value: Any) -> str:
    """A foreign text on one line, without control characters, cut."""
    text = " ".join(str(value).split())
    text = "".join(letter if letter.isprintable() else "?" for letter in text[: MAX_SHOWN + 1])
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def size_of(path: Path) -> int:
    """[bytes] of a regular file that lies here itself. Raises: DamagedError."""
    with reading(path):
        try:
            status = path.lstat()
        except FileNotFoundError:
            raise DamagedError(f"{path} is missing") from None
        if not stat.S_ISREG(status.st_mode):
            kinds = {stat.S_ISLNK: "a symbolic link", stat.S_ISDIR: "a directory", stat.S_ISFIFO: "a pipe"}
            kind = next((name for is_one, name in kinds.items() if is_one(status.st_mode)), "a device")
            raise DamagedError(f"{path} is {kind}, must be a regular file")
        return status.st_size


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in which every key stands once and every number is one. Raises: DamagedError."""
    with reading(path):
        return json_of(path.read_bytes())


def json_of(text: str | bytes) -> dict[str, Any]:
    """Raises: ValueError."""
    content = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number)
    if not isinstance(content, dict):
        raise ValueError("must be a JSON object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise ValueError(f"{twice!r} stands in it twice")
    return content


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def check_yaml(path: Path) -> None:
    """Raises: DamagedError unless it is a mapping of plain values: without tags, anchors, aliases and
    interpolations, which would be resolved where a configuration is read.
    """
    with reading(path):
        if (size := size_of(path)) > MAX_YAML_BYTES:
            raise DamagedError(f"{path} has {size} bytes, at most {MAX_YAML_BYTES} are read")
        depth = 0
        for event in yaml.parse(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader):
            line = f"{path}, line {event.start_mark.line + 1}"
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_YAML_DEPTH:
                raise DamagedError(f"{line}: more than {MAX_YAML_DEPTH} levels")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise DamagedError(f"{line}: an anchor or alias, must be plain values")
            if getattr(event, "tag", None):
                raise DamagedError(f"{line}: a tag, {shown(event.tag)!r}, must be plain values")
            if "${" in getattr(event, "value", ""):
                raise DamagedError(f"{line}: {shown(event.value)!r}, nothing is resolved here")
        if not OmegaConf.is_dict(OmegaConf.load(path)):
            raise DamagedError(f"{path}: must be a mapping")


def read_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor: (safetensors' code of its dtype, shape)} of a safetensors file, from its header. The library
    checks that header, dtypes, shapes and offsets fit each other and the file. Raises: DamagedError.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # it is no dict
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except FAILURES as error:
        raise DamagedError(f"{path}: cannot be read as safetensors: {shown(error)}") from None


# -- values -------------------------------------------------------------------------------------------------


def plain_name(value: Any) -> str:
    """The name of a file that can lie nowhere but in the directory itself. Raises: ValueError."""
    if not isinstance(value, str) or value in ("", ".", "..") or "/" in value or "\0" in value:
        name = shown(repr(value))
        raise ValueError(f"{name} must be a plain file name: only plain names in the directory are read")
    return value


def natural(value: Any) -> int:
    """Raises: ValueError."""
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        raise ValueError(f"{shown(repr(value))}: must be a whole number from 0 to 2^63 - 1")
    return value


def naturals(values: Any) -> tuple[int, ...]:
    """Raises: ValueError."""
    if not isinstance(values, list):
        raise ValueError(f"{shown(repr(values))}: must be a list of whole numbers")
    return tuple(natural(value) for value in values)
