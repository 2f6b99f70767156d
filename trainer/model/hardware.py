"""What does a configuration ask of the device and of libraries, and is it there?

Said before anything is built, in one line. What a type or other keys forbid is in config/limits.py.
"""

import logging
from collections.abc import Callable
from importlib.util import find_spec

from trainer.config import ALIGNED, MXFP8, Config, ConfigError, whole_rows
from trainer.model.dispatch import Dispatch
from trainer.ranks.device import Hardware

MIN_HEAD_DIM = 16  # of flex attention's kernels
FLOAT32_ROW = 4  # [float32 numbers] in 16 bytes
SCALED = 32  # [numbers] that share a scale in MXFP8
MXFP8_ROWS = 128  # of one expert, a multiple for torchao's fastest quantisation on sm_100; 32 for the others
# of one expert on a CPU in bfloat16: oneDNN makes a kernel for each number of rows (0.6 ms) and keeps 1,024
CPU_ROWS = 32
LIBRARY = "deep_ep"  # DeepEP and HybridEP come in one package
log = logging.getLogger(__name__)


def check_hardware(config: Config, on: Hardware, *, has_library: Callable[[str], object] = find_spec) -> None:
    """Raises: ConfigError with the key, what is missing, and the remedy."""
    _check_mxfp8(config, on, has_library)
    _check_dispatcher(config, on, has_library)
    if on.type != "cuda":
        return
    m = config.model
    if m.head_dim < MIN_HEAD_DIM:
        raise ConfigError(
            f"model.head_dim={m.head_dim}: flex attention on a GPU wants at least {MIN_HEAD_DIM}; "
            f"use model.head_dim={MIN_HEAD_DIM}"
        )
    whole_rows(config, num=FLOAT32_ROW if (m.expert_dtype or config.dtype) == "float32" else ALIGNED)


def _check_mxfp8(config: Config, on: Hardware, has_library: Callable[[str], object]) -> None:
    m = config.model
    if m.expert_dtype != MXFP8:
        return
    if on.capability < (10, 0):
        raise _refused(f"model.expert_dtype={MXFP8}", "a GPU of compute capability 10.0", on)
    if not has_library("torchao"):
        raise ConfigError(
            f"model.expert_dtype={MXFP8} needs torchao, which is not installed; install it, or use bfloat16"
        )
    if config.dtype != "bfloat16":
        raise ConfigError(
            f"model.expert_dtype={MXFP8} with dtype={config.dtype}: it is made from bfloat16; "
            "use dtype=bfloat16"
        )
    for key in ("dim", "expert_dim"):
        if (size := getattr(m, key)) % SCALED:
            raise ConfigError(
                f"model.{key}={size} with model.expert_dtype={MXFP8}: must be a multiple of {SCALED}, as so "
                f"many numbers share a scale; use model.{key}={-(-size // SCALED) * SCALED}"
            )
    if config.parallel.dispatcher == "deepep":
        raise ConfigError(
            f"parallel.dispatcher=deepep with model.expert_dtype={MXFP8}: it does not pad the rows of an "
            "expert; use parallel.dispatcher=hybridep or all_to_all"
        )


def _check_dispatcher(config: Config, on: Hardware, has_library: Callable[[str], object]) -> None:
    name, ep = config.parallel.dispatcher, config.parallel.ep
    key = f"parallel.dispatcher={name}"
    if name == "all_to_all":
        return
    least = (10, 0) if name == "hybridep" else (9, 0)
    if on.capability < least:
        raise _refused(key, f"a GPU of compute capability {least[0]}.{least[1]}", on, instead="all_to_all")
    if not has_library(LIBRARY):
        raise ConfigError(f"{key} needs {LIBRARY}, which is not installed; install it, or use all_to_all")
    if ep == 1:
        raise ConfigError(f"{key} with parallel.ep=1: no token changes its rank; use all_to_all")
    if on.are_linked is False:
        raise ConfigError(f"{key}: the GPUs of this host do not reach each other's memory; use all_to_all")
    if config.dtype != "bfloat16":
        raise ConfigError(f"{key} with dtype={config.dtype}: it sends bfloat16; use dtype=bfloat16")


def _refused(key: str, needs: str, on: Hardware, *, instead: str = "bfloat16") -> ConfigError:
    here = (
        f"compute capability {on.capability[0]}.{on.capability[1]}" if on.type == "cuda" else f"a {on.type}"
    )
    return ConfigError(f"{key} needs {needs} or later, and here is {here}; use {instead}")


def warn_of_dtype(config: Config, on: Hardware) -> None:
    """Of one that is slow here, which a stranger does not expect."""
    if config.dtype == "bfloat16" and not on.has_bfloat16:
        log.warning("dtype=bfloat16: this processor has no instructions for it; dtype=float32 is faster")
    if on.type == "cuda" and config.dtype == "float32":
        log.warning(
            "dtype=float32 on a GPU: no tensor cores, and the host waits for each expert; dtype=bfloat16 is "
            "many times faster"
        )


def dispatch_of(config: Config, on: Hardware, *, max_tokens: int) -> Dispatch:
    """max_tokens: of a microbatch on one rank, in the whole run."""
    name, dtype = config.parallel.dispatcher, config.model.expert_dtype or config.dtype
    is_padded_cpu = (on.type, dtype) == ("cpu", "bfloat16")
    multiple = MXFP8_ROWS if dtype == MXFP8 else CPU_ROWS if is_padded_cpu else 1
    if is_padded_cpu and config.parallel.ep == 1:
        name = "local"
    return Dispatch(name=name, multiple=multiple, max_tokens=max_tokens)
