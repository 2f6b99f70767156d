"""Which words of a command line are the laboratory's own, beside those of a training run? And where does a
page go?
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path

from trainer.config import Config, ConfigError


def parted(arguments: Sequence[str], own: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Overrides of a run, and the values of the keys that are a command's own."""
    pairs = [argument.partition("=") for argument in arguments]
    overrides = ["".join(pair) for pair in pairs if pair[0] not in own or not pair[1]]
    return overrides, {key: value for key, is_given, value in pairs if key in own and is_given}


def refuse_misspelt(overrides: Sequence[str], own: Sequence[str]) -> None:
    """Raises: ConfigError for a key that no run has and that is nearly one of the command's own."""
    keys = {"experiment", *(field.name for field in fields(Config))}
    for key in {override.split("=")[0] for override in overrides} - keys:
        if near := difflib.get_close_matches(key, own, n=1, cutoff=0.75):
            raise ConfigError(f"{key}: there is no such key (did you mean {near[0]}?)")


def write_page_to(out: Path, write: Callable[[Path], None], *, example: str) -> None:
    """Raises: ConfigError if the file cannot be written."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write(out)
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"out={out}: {why}; give a file that can be written, like out={example}") from None
