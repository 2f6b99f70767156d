"""Which directory does a model speak from?

    runs/x           its newest checkpoint, or that of --step, exported into runs/x/exports once
    runs/x/checkpoints/step-00000200
    out              what `triquetra export` has made
    owner/name       the same, from the hub

An export in a run's directory is named by its step and by the hash of its checkpoint's manifest: after a
rewind the same step is another model.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from trainer.checkpoint import manifest_hash, read_manifest
from trainer.config import ConfigError
from trainer.ranks.lock import InUseError, lock
from trainer.weights.export import checkpoint_of, export_to, is_run, origin_of
from trainer.weights.pretrained import HUB_NAME, directory_of

WAIT_S = 600  # [s] for another process that exports into the same run


class Origin(NamedTuple):
    """Where a model comes from."""

    name: str  # as a person calls it
    directory: Path  # of weights, config.json, tokenizer
    step: int | None  # of a run


def origin(spec: str, step: int | None) -> Origin:
    """Raises: ConfigError, DamagedError, ValueError, OSError."""
    path = Path(spec).expanduser()
    if is_run(path):
        return from_run(path, step)
    if step is not None:
        raise ConfigError(f"--step={step}: {spec} is no run; leave --step out")
    if not path.exists() and not HUB_NAME.fullmatch(spec):
        raise ConfigError(f"{spec}: there is no such run, export or hub name")
    directory = directory_of(spec, key="")
    if not (directory / "config.json").is_file():
        raise ConfigError(f"{spec}: no run with a checkpoint, and no export: it has no config.json")
    if not (directory / "tokenizer.json").is_file():
        raise ConfigError(f"{spec}: no tokenizer.json; a model of tokens alone has no text to say")
    return Origin(spec, directory, None)


def from_run(path: Path, step: int | None) -> Origin:
    checkpoint = checkpoint_of(path, step)
    step = read_manifest(checkpoint)["step"]
    if not (checkpoint / "tokenizer.json").is_file():
        raise ConfigError(f"{path}: its source gives tokens, so it has no tokenizer and no text to say")
    kept = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    out = kept / "exports" / f"step-{step:08d}-{manifest_hash(checkpoint)[:8]}"
    if not out.is_dir():
        try:
            with lock(out.parent, wait_s=WAIT_S):
                if not out.is_dir():
                    print(f"exporting step {step} of {path} into {out}", file=sys.stderr, flush=True)
                    export_to(origin_of(checkpoint), out)
        except InUseError as error:
            raise ConfigError(f"{error}, which exports; try again later") from error
        except OSError as error:
            raise ConfigError(f"{error}; export to another place: triquetra export {path} OUT") from error
    return Origin(str(path), out, step)
