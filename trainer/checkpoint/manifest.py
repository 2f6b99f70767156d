"""Is this checkpoint what was written?

    manifest.json   {step, tokens, ...: about the run; files: {name: {bytes, xxh3}}; xxh3: of all this}

It is written last, so a directory without one is not a checkpoint.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import xxhash

import trainer
from trainer.checkpoint.storage import INDEX, DamagedError, write_durably

MANIFEST = "manifest.json"


def write_manifest(directory: Path, about: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    content = {**about, "files": dict(sorted(files.items()))}
    write_durably(directory / MANIFEST, _text_of(content))


def read_manifest(directory: Path) -> dict[str, Any]:
    """Raises: DamagedError if there is none, or one that was changed after it was written."""
    path = directory / MANIFEST
    try:
        text = path.read_bytes().decode()
        content = json.loads(text)
        content.pop("xxh3")
        sizes = {name: (int(of["bytes"]), str(of["xxh3"])) for name, of in content["files"].items()}
        if type(content["step"]) is not int or any(Path(name).name != name for name in sizes):
            raise ValueError("step must be a number, files plain names")
        if INDEX not in sizes:
            raise ValueError(f"it lists no {INDEX}")
    except FileNotFoundError as error:
        raise DamagedError(
            f"{path} is missing: the checkpoint was not completed, or an older version wrote it"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if text != _text_of(content):
        raise DamagedError(f"{path} was changed after it was written")
    return content


def manifest_hash(directory: Path) -> str:
    """Of a checkpoint's manifest, and with it of all that is in the checkpoint. Raises: OSError."""
    return file_entry(directory / MANIFEST)["xxh3"]


def file_entry(path: Path) -> dict[str, Any]:
    """{bytes, xxh3}. xxh3 finds every accident at the speed of memory; it does not stop somebody who
    forges.
    """
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "xxh3": hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()}


def problems(directory: Path, *, hashes: bool = True, share: slice = slice(None)) -> list[str]:
    """What is wrong with a checkpoint, in words; [] if all is well. Without `hashes`: existence and size of
    its files only.

    share: of its files, where several ranks verify together.
    """
    try:
        manifest = read_manifest(directory)
    except DamagedError as error:
        return [str(error)]
    named = re.fullmatch(r"step-(\d+)", directory.name)
    if named and int(named[1]) != manifest["step"]:
        return [f"{directory} holds step {manifest['step']}: it was renamed or copied"]
    files = manifest["files"]
    found = (_problem(directory / name, files[name], hashes=hashes) for name in sorted(files)[share])
    return [*filter(None, found)]


def _problem(path: Path, said: Mapping[str, Any], *, hashes: bool) -> str | None:
    try:
        if (size := path.stat().st_size) != said["bytes"]:
            return f"{path} has {size} bytes, {said['bytes']} were written"
        if hashes and (found := file_entry(path)["xxh3"]) != said["xxh3"]:
            return f"{path} was changed after it was written: its xxh3 is {found}, it was {said['xxh3']}"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read: {error}"
    return None


@cache
def code_version() -> str:
    """Of this package: its version, and a hash of its source files."""
    root = Path(trainer.__file__).parent
    digest = xxhash.xxh3_64()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return f"{trainer.__version__}+{digest.hexdigest()[:8]}"


def _text_of(content: Mapping[str, Any]) -> str:
    return json.dumps({**content, "xxh3": _digest_of(content)}, indent=1)


def _digest_of(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
