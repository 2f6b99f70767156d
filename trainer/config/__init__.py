"""What can be set, with which default and limit?

Plain dataclasses (schema); the YAML files under configs/ fill them through Hydra (compose). A key that is not
named there, a value of the wrong type, out of its limits (bounds) or at odds with others (limits) is refused
before anything is built: `ConfigError` names the key, the value, the limit and what would work.

`_target_` nodes (rules, optimizers, sources, trackers) have no dataclass: the constructor they name is their
schema, and its signature is checked (targets). Imports nothing of ours.
"""

from trainer.config.bounds import ConfigError, Number, check_numbers, check_values, number, path
from trainer.config.compose import CONFIG_DIR, composed, load, looked_up, reread, resolved_yaml, usage
from trainer.config.fill import filled, nearest
from trainer.config.limits import ALIGNED, check_name, divisors, whole_rows
from trainer.config.parts import ATOMS, PARTS, atoms_of
from trainer.config.plain import read_plain
from trainer.config.schema import (
    AUTO,
    MXFP8,
    BalanceConfig,
    Config,
    DataConfig,
    GuardConfig,
    ModelConfig,
    ParallelConfig,
    RouterLossWeights,
    SpanConfig,
)

__all__ = [
    "ALIGNED",
    "ATOMS",
    "AUTO",
    "CONFIG_DIR",
    "MXFP8",
    "PARTS",
    "BalanceConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "GuardConfig",
    "ModelConfig",
    "Number",
    "ParallelConfig",
    "RouterLossWeights",
    "SpanConfig",
    "atoms_of",
    "check_name",
    "check_numbers",
    "check_values",
    "composed",
    "divisors",
    "filled",
    "load",
    "looked_up",
    "nearest",
    "number",
    "path",
    "read_plain",
    "reread",
    "resolved_yaml",
    "usage",
    "whole_rows",
]
