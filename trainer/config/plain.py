"""What does a YAML file hold that this process has not written? Mappings, lists and plain values, or nothing.

A checkpoint may come from anywhere: nothing in it is resolved, imported or expanded.
"""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.bounds import ConfigError

MAX_BYTES = 2**20
MAX_DEPTH = 32
AT_ROOT = 2  # the event after the stream's and the document's start
TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq"))


def read_plain(path: Path) -> dict[str, Any]:
    """Raises: ConfigError, in one line with the file's name."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{path}: is larger than {MAX_BYTES} bytes; no run writes such a config.yaml")
        text = data.decode()
        _check_events(path, text)
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not YAML of settings ({' '.join(str(error).split())})") from None
    return values


def _check_events(path: Path, text: str) -> None:
    """Before anything is built of them: depth, aliases (which multiply), tags and interpolations."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = f"{path}, line {event.start_mark.line + 1}"
        tag = getattr(event, "tag", None)
        if number == AT_ROOT and not isinstance(event, yaml.MappingStartEvent):
            raise ConfigError(f"{line}: is no mapping of settings")
        if depth > MAX_DEPTH:
            raise ConfigError(f"{line}: is nested more than {MAX_DEPTH} deep; settings are not")
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{line}: has an alias, *{event.anchor}; a run writes none")
        if tag is not None and tag not in TAGS:
            raise ConfigError(f"{line}: has the tag {tag}; settings are plain values")
        if isinstance(event, yaml.ScalarEvent) and "${" in event.value:
            raise ConfigError(f"{line}: has an interpolation, {event.value!r}; a run writes none")
