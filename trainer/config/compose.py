"""How do a command line and the YAML files under configs/ become a checked Config?"""

import difflib
import math
from collections.abc import Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from trainer.config.bounds import ConfigError, check_values, shown
from trainer.config.fill import filled, nearest
from trainer.config.limits import check
from trainer.config.plain import read_plain
from trainer.config.schema import Config, LengthBiasConfig, SpanConfig
from trainer.config.targets import check_targets

# Hydra and OmegaConf have errors of their own; what they did not think of fails inside them as the others.
THEIRS = (HydraException, OmegaConfBaseException, YAMLError)
REFUSALS = (*THEIRS, ValueError, TypeError, AttributeError, AssertionError, RecursionError)

PARSER = OverridesParser.create()
CONFIG_DIR = Path(__file__).parent.parent / "configs"  # of a wheel; beside a wheel may lie anybody's folder
if not CONFIG_DIR.is_dir():  # a checkout
    CONFIG_DIR = Path(__file__).parent.parent.parent / "configs"


def load(overrides: list[str]) -> Config:
    """Composes configs/train.yaml with Hydra overrides and checks every value.

    Raises: ConfigError.
    """
    config = composed("train", overrides)
    assert isinstance(config, Config)
    _fill_length_bias(config)
    check(config)
    config.stage = {name: _span(name, values) for name, values in config.stage.items()}
    batches = [span.global_batch for span in config.stage.values()] or [None]
    batches[0] = batches[0] or config.global_batch  # a first span with its own leaves no step for the run's
    config.data.num_streams = config.data.num_streams or math.gcd(*filter(None, batches))
    return config


def reread(path: Path, overrides: list[str] | None = None) -> Config:
    """The configuration that a run wrote as its config.yaml, perhaps elsewhere: nothing in it is resolved.
    overrides: key=value and group=choice, as on a command line; then all of it is checked.

    Raises: ConfigError if it has other keys than this version, or a shape that no model has.
    """
    values = read_plain(path)
    if overrides is not None:
        _check_text(overrides)
        for override in overrides:
            _override(values, override)
        check_targets(OmegaConf.create(values))
    config = filled(Config, values, where=f"{path}: ")
    check_values(config.model, where=f"{path}: model.")
    _fill_length_bias(config)
    if overrides is not None:
        check(config)
    config.stage = {name: _span(name, values) for name, values in config.stage.items()}
    return config


def _override(values: dict[str, Any], override: str) -> None:
    """Sets one key of nested values. Raises: ConfigError."""
    name, is_given, text = override.partition("=")
    *path, key = name.split(".")
    if not is_given or not all([*path, key]):
        raise ConfigError(f"{override!r}: must be key=value or group=choice")
    file = CONFIG_DIR / name / f"{text}.yaml"
    if not path and (CONFIG_DIR / name).is_dir() and not text.startswith("{"):
        if not file.is_file():
            names = ", ".join(sorted(file.stem for file in (CONFIG_DIR / name).glob("*.yaml")))
            raise ConfigError(f"{override!r}: must be one of {names}")
        value = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    else:
        try:
            value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)["value"]
        except REFUSALS as error:
            raise ConfigError(f"{override!r}: is no YAML ({' '.join(str(error).split())})") from None
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{override!r}: {part} has no keys")
    values[key] = value


def _span(name: str, values: Any) -> SpanConfig:
    if not isinstance(values, dict):
        raise ConfigError(
            f"stage.{name}={values}: must be a span, like {{steps: 100}}; ~stage.{name} leaves it out"
        )
    return filled(SpanConfig, values, where=f"stage.{name}: ")


def _fill_length_bias(config: Config) -> None:
    for name, values in config.data.length_bias.items():
        key = f"data.length_bias.{name}"
        if not isinstance(values, dict):
            raise ConfigError(
                f"{key}={values}: must be {{}}, or numbers like {{long: 131072}}; ~{key} leaves it out"
            )
        config.data.length_bias[name] = filled(LengthBiasConfig, values, where=f"{key}: ")


def composed(root: str, overrides: list[str]) -> Any:
    """configs/<root>.yaml with Hydra overrides as the dataclass of its schema; keys and types are checked,
    limits are not.
    """
    _check_text(overrides)
    try:
        node = _node(root, *_any_key_of_known_spans(root, _any_source(overrides)))
        check_targets(node)
        if missing := sorted(OmegaConf.missing_keys(node)):
            raise ConfigError(
                f"not set: {', '.join(missing)}. Choose an experiment (experiment=demo) or set them."
            )
        return OmegaConf.to_object(node)
    except ConfigError:
        raise
    except REFUSALS as error:
        raise ConfigError(_explain(error, overrides, root)) from None


def _node(root: str, *overrides: str) -> DictConfig:
    """Hydra composes the files that are chosen; values go on top as it puts them there."""
    values = [override for override in PARSER.parse_overrides(list(overrides)) if _is_value(override)]
    on_top = {override.input_line for override in values}
    node = deepcopy(_chosen(root, *(override for override in overrides if override not in on_top)))
    ConfigLoaderImpl._apply_overrides_to_config(values, node)
    return node


@lru_cache(maxsize=64)  # a tenth of a second each
def _chosen(root: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR.resolve()), version_base="1.3"):
        return compose(root, list(overrides))


def _is_value(override: Override) -> bool:
    """Neither the choice of a file, nor Hydra's own business."""
    name = override.key_or_group.split(".")[0]
    return not (
        name == "hydra"
        or override.package is not None
        or override.is_sweep_override()
        or (CONFIG_DIR / override.key_or_group).is_dir()
    )


def _check_text(overrides: list[str]) -> None:
    """What no file name and no file in UTF-8 can hold."""
    for override in overrides:
        if "\0" in override or any("\ud800" <= letter <= "\udfff" for letter in override):
            raise ConfigError(f"{override!a}: must be text in UTF-8, without a zero byte")


def _any_key_of_known_spans(root: str, overrides: list[str]) -> list[str]:
    """A span of the program may be given keys that its file leaves out (++); a new span must be announced by
    a +.
    """
    ours = [override for override in overrides if override.startswith("stage.")]
    if not ours:
        return overrides
    known = list(_node(root, *(override for override in overrides if override not in ours)).stage)
    for override in ours:
        name = override.split("=")[0].split(".")[1]
        if name not in known:
            raise ConfigError(
                f"{override!r}: there is no span {name}{nearest(name, known)}; +stage.{name}... adds one"
            )
    return [f"++{override}" if override in ours else override for override in overrides]


def _any_source(overrides: list[str]) -> list[str]:
    """Sources and evaluations have names of the user's own, so they may be added without a +; what is wrong
    is found later.
    """
    named = ("data.sources", "data.mixture", "data.length_bias", "evaluate.")
    return [f"++{o}" if o.startswith(named) else o for o in overrides]


def resolved_yaml(config: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def looked_up(overrides: list[str], doc: str | None) -> str | None:
    """What --help or --cfg job asks for, in place of doing anything; None if neither does. Raises:
    ConfigError.
    """
    if {"-h", "--help"} & set(overrides):
        return usage(doc)
    if "--cfg" in overrides:
        return resolved_yaml(load([o for o in overrides if o not in ("--cfg", "job")])).rstrip("\n")
    return None


def usage(doc: str | None) -> str:
    """What `--help` of trainer/train.py prints: its docstring `doc` and the choices of each group."""
    others = {"ablation", "device", "level", "scores"}  # of the other programs
    groups = sorted(path for path in CONFIG_DIR.iterdir() if path.is_dir() and path.name not in others)
    options = "\n".join(
        f"    {g.name + '=':12s} {' | '.join(sorted(o.stem for o in g.glob('*.yaml')))}" for g in groups
    )
    return f"""{doc}
    --cfg job    prints the resolved configuration and trains nothing

Choices:
{options}

Any value of the configuration can be overridden: steps=100 model.dim=64 optim.lr=1e-3 name=mine"""


def _explain(error: Exception, overrides: list[str], root: str) -> str:
    """Hydra's message, shortened, with the nearest valid keys for the override that it is about."""
    if isinstance(error, OverrideParseException):
        return _unreadable(next((o for o in overrides if error.override.endswith(o)), error.override))
    if not isinstance(error, THEIRS) and (choice := _no_choice(overrides)):
        return choice
    text = str(error.__cause__ or error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    noise = ("full_key", "object_type", "reference_type", "Config search path", "provider=", "See https")
    message = " ".join(line for line in lines if not line.startswith(noise))
    text = f"{error} {text}"
    keys = {override: override.split("=")[0].lstrip("+~") for override in overrides}
    meant = [override for override, key in keys.items() if key and (key in text or override in text)]
    if not meant:
        return message
    # the one that is quoted, or optim.lr=x rather than optim=muon
    override = max(meant, key=lambda override: (override in text, len(keys[override])))
    groups = [other for other, key in keys.items() if "." not in key and other != override]
    return f"{override!r}: {message}{_nearest(keys[override], root, groups)}"


def _unreadable(override: str) -> str:
    key, equals, _ = override.partition("=")
    if not equals or not key.lstrip("+~").replace(".", "").replace("_", "").isalnum():
        return f"{shown(override)}: must be key=value, like steps=100"
    letters = "letters beyond ASCII, and =,~(){}[] and quotes in a value"
    return f"{shown(override)}: cannot be read; {letters} need quotes around it: '{key}=\"...\"'"


def _no_choice(overrides: list[str]) -> str | None:
    """The first override that chooses what its group does not have; Hydra takes names and lists of names."""
    groups = {path.name: path for path in CONFIG_DIR.iterdir() if path.is_dir()}
    for override in overrides:
        key, _, value = override.partition("=")
        if key in groups and value not in (names := sorted(path.stem for path in groups[key].glob("*.yaml"))):
            return f"{override!r}: must be one of {', '.join(names)}"
    return None


def _nearest(key: str, root: str, groups: list[str]) -> str:
    """groups: overrides that choose what the keys are, like optim=muon."""
    try:
        valid = list(_all_keys(root, groups))
    except REFUSALS:
        valid = list(_all_keys(root, []))
    if key in valid:
        return ""
    by_leaf = [v for v in valid if v.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = list(dict.fromkeys(difflib.get_close_matches(key, valid, n=4, cutoff=0.6) + by_leaf))[:4]
    if near:
        return f" (did you mean {', '.join(near)}?)"
    return f" (top-level keys: {', '.join(sorted({v.split('.')[0] for v in valid}))})"


def _all_keys(root: str, groups: list[str]) -> Iterator[str]:
    """Every key of the schema, those of the chosen `_target_` nodes included, and the config groups."""
    node = _node(root, *groups)

    def walk(node: DictConfig, prefix: str) -> Iterator[str]:
        for key in node:
            yield f"{prefix}{key}"
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
                yield from walk(child, f"{prefix}{key}.")

    yield from walk(node, "")
    yield from ("experiment",) if root == "train" else ("level",)
