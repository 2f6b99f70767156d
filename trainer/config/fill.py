"""How does a dataclass get its values from YAML, and what does a person hear who mistyped a key?"""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer.config.bounds import ConfigError


def filled(schema: type, source: Path | DictConfig | dict, *, where: str = "") -> Any:
    """An instance of a dataclass from YAML or values. Raises: ConfigError with the nearest valid key, after
    `where`.
    """
    where = f"{source}: " if isinstance(source, Path) else where
    try:
        values = OmegaConf.load(source) if isinstance(source, Path) else source
        node = OmegaConf.merge(OmegaConf.structured(schema), values)
        if missing := sorted(OmegaConf.missing_keys(node)):
            raise ConfigError(f"{where}not set: {', '.join(missing)}")
        return OmegaConf.to_object(node)
    except ConfigError:
        raise
    except (OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        key = str(getattr(error, "full_key", None) or "")
        owner = getattr(error, "object_type", None)
        known = [f.name for f in dataclasses.fields(owner)] if dataclasses.is_dataclass(owner) else []
        hint = "" if not known or key.rsplit(".", 1)[-1] in known else nearest(key.rsplit(".", 1)[-1], known)
        message = " ".join(
            line.strip()
            for line in str(error).splitlines()
            if "_type=" not in line and "full_key" not in line
        )
        raise ConfigError(f"{where}{key}{': ' if key else ''}{message}{hint}") from None


def nearest(key: str, valid: list[str]) -> str:
    near = difflib.get_close_matches(key, valid, n=3, cutoff=0.5)
    return f" (did you mean {', '.join(near)}?)" if near else f" (there are: {', '.join(valid)})"
