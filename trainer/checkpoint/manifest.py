"""Is this checkpoint what was written?

    manifest.json   {step, tokens, ...: about the run; files: {name: {bytes, xxh3}}; xxh3: of all this}

It is written last, so a directory without one is not a checkpoint.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from trainer.checkpoint.foreign import (
    DamagedError,
    check_yaml,
    json_of,
    natural,
    plain_name,
    read_json,
    reading,
    shown,
    size_of,
)
from trainer.checkpoint.storage import INDEX, check_shard, read_index, write_durably

MANIFEST = "manifest.json"


def write_manifest(directory: Path, about: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    content = {**about, "files": dict(sorted(files.items()))}
    write_durably(directory / MANIFEST, _text_of(content))


def read_manifest(directory: Path) -> dict[str, Any]:
    """Raises: DamagedError if there is none, or one that was changed after it was written."""
    path = directory / MANIFEST
    if not os.path.lexists(path):
        raise DamagedError(
            f"{path} is missing: the checkpoint was not completed, or an older version wrote it"
        )
    with reading(path):
        size_of(path)
        text = path.read_bytes().decode()
        content = json_of(text)
        content.pop("xxh3")
        natural(content["step"])
        natural(content.get("tokens", 0))
        for name, entry in content["files"].items():
            plain_name(name)
            natural(entry["bytes"])
            str.encode(entry["xxh3"])
        if not isinstance(content.get("data", {}), dict):
            raise ValueError("data must be an object")
        if INDEX not in content["files"]:
            raise ValueError(f"it lists no {INDEX}")
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
    names = sorted(files)[share]
    damaged = {name: wrong for name in names if (wrong := _changed(directory / name, files[name], hashes))}
    if hashes and INDEX not in damaged:
        damaged |= _misread(directory, [name for name in names if name not in damaged], listed=files)
    return sorted(damaged.values())


def _changed(path: Path, entry: Mapping[str, Any], hashes: bool) -> str | None:
    """Is a file another one than what was written?"""
    try:
        with reading(path):
            if (size := size_of(path)) != entry["bytes"]:
                return f"{path} has {size} bytes, {entry['bytes']} were written"
            if hashes and (xxh3 := file_entry(path)["xxh3"]) != entry["xxh3"]:
                written = shown(entry["xxh3"])
                return f"{path} was changed after it was written: its xxh3 is {xxh3}, it was {written}"
    except DamagedError as error:
        return str(error)
    return None


def _misread(directory: Path, names: Iterable[str], *, listed: Collection[str]) -> dict[str, str]:
    """{file: why nobody could read it}, of files that are what was written."""
    try:
        index = read_index(directory)
    except DamagedError as error:
        return {INDEX: str(error)}
    files = {piece.file for entry in index.values() for piece in entry.pieces}
    if unlisted := sorted(files - set(listed)):
        return {INDEX: f"{directory / INDEX} names {shown(unlisted[0])}, which {MANIFEST} does not list"}
    checks = {".safetensors": partial(check_shard, index=index), ".yaml": check_yaml, ".json": read_json}
    damaged = {}
    for name in names:
        try:
            checks.get(Path(name).suffix, size_of)(directory / name)
        except DamagedError as error:
            damaged[name] = str(error)
    return damaged


def _text_of(content: Mapping[str, Any]) -> str:
    return json.dumps({**content, "xxh3": _digest_of(content)}, indent=1)


def _digest_of(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()
