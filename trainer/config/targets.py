"""Does a `_target_` node fit the signature of the constructor that it names?"""

import difflib
import inspect
import logging
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf

from trainer.config.bounds import ConfigError

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # what it logs, it raises too


def check_targets(node: Any, path: str = "") -> None:
    """Checks each `_target_` node against the signature that it names: known keys, right types."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    if "_target_" in node:
        _check_target(node, path)
    for key in node:
        child = node._get_node(key)
        check_targets(child, f"{path}.{key}" if path else str(key))


def _check_target(node: DictConfig, path: str) -> None:
    try:
        target = get_method(node._target_) if isinstance(node._target_, str) else None
    except Exception as error:  # noqa: BLE001  # whatever the import of a user's module raises
        why = " ".join(str(error).split())
        raise ConfigError(f"{path}._target_={node._target_}: cannot be imported ({why})") from None
    if target is None:
        raise ConfigError(f"{path}._target_={node._target_}: not a dotted name")
    parameters, hints = _signature(target)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    arguments = [key for key in node if key not in ("_target_", "_partial_")]
    for key in arguments:
        if key not in parameters and not takes_any:
            near = difflib.get_close_matches(str(key), list(parameters), n=3, cutoff=0.5) or list(parameters)
            raise ConfigError(
                f"{path}.{key}: {node._target_} has no such argument (did you mean {', '.join(near)}?)"
            )
        if OmegaConf.is_missing(node, key):
            raise ConfigError(f"{path}.{key} is not set: give it on the command line, {path}.{key}=...")
        value = node[key]
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path}.{key}={value}: must be finite")
        if key in hints and not _fits(value, hints[key]):
            raise ConfigError(f"{path}.{key}={value!r}: {node._target_} wants {_type_name(hints[key])}")
    if not node.get("_partial_", False):
        named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        absent = [name for name, p in named.items() if p.default is p.empty and name not in arguments]
        if absent:
            raise ConfigError(f"{path}: {node._target_} needs {', '.join(absent)}")


def _signature(target: Any) -> tuple[Mapping[str, inspect.Parameter], dict[str, Any]]:
    """The parameters of a constructor or function, and their types where they can be known."""
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):  # names that only a type checker imports
        hints = {}
    return inspect.signature(target).parameters, hints


def _fits(value: Any, hint: Any) -> bool:
    """Whether a configured value may be passed where `hint` is annotated; unknown kinds of hint pass."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if typing.get_origin(hint) in (Sequence, list):
        return OmegaConf.is_list(value) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if typing.get_origin(hint) is tuple:
        return OmegaConf.is_list(value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    return True


def _type_name(hint: Any) -> str:
    return hint.__name__ if inspect.isclass(hint) else str(hint)
