"""What did a real GPU reach? A JSON file that tests/gpu writes and `calibration=` reads.

    {
      "format": 1,
      "device": "h200",                      a file of configs/device
      "gpu": "NVIDIA H200",                  as the driver calls it
      "torch": "2.13.0+cu128",
      "measured": {                          any of these; what is missing stays as configs/device has it
        "matmul": 7.9e14,                    [FLOP/s] of a bfloat16 product, as large as the model's
        "experts": 5.8e14,                   [FLOP/s] of a grouped product
        "attention": 3.6e14,                 [FLOP/s] forward and backward, 4 and 10 x head_dim a pair
        "hbm": 4.3e12,                       [B/s] read and written together, of a copy
        "nvlink": 3.6e11,                    [B/s] received by a GPU in an all-gather inside a node
        "nic": 4.2e10,                       [B/s] received by a GPU in an all-gather between nodes
        "all_to_all_nvlink": 2.8e11,         [B/s] sent to other GPUs of the node by a GPU
        "all_to_all_nic": 2.9e10             [B/s] sent to other nodes by a GPU
      },
      "launch_s": 5.0e-6,                    [s] of the host for a kernel; may be missing, as the next two
      "wait_s": 2.0e-5,                      [s] that a wait of the host for the device costs beside the wait
      "fused": 0.4,                          bytes of elementwise kernels with compile=true over those without
      "runs": [                              whole steps; may be empty
        {
          "overrides": ["experiment=trinity_mini", "parallel.dp_shard=8"],   as for triquetra train
          "ranks": 8,                        GPUs; 1 with "traced_ranks": one rank of many that are not there
          "step_s": 1.23,                    [s] median of an optimizer step
          "peak_bytes": 9.1e10               torch.cuda.max_memory_allocated of the worst rank
        }
      ]
    }

Times are ranges: twofold without a calibration, 1.5-fold once all that a step is made of was measured, and
1.25-fold with a run.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config import ConfigError

FORMAT = 1
MEASURED = (
    "matmul", "experts", "attention", "hbm", "nvlink", "nic", "all_to_all_nvlink", "all_to_all_nic"
)  # fmt: skip
OPTIONAL = ("launch_s", "wait_s", "fused")
MOST = 1e18  # [FLOP/s] of no single device
UNMEASURED, PARTS, RUN = 2.0, 1.5, 1.25  # the longest time of a range over its shortest


@dataclass(frozen=True)
class Calibration:
    device: str = ""
    measured: dict[str, float] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)  # of OPTIONAL
    runs: tuple[dict[str, Any], ...] = ()

    @property
    def width(self) -> float:
        """The longest time over the shortest one."""
        if self.runs:
            return RUN
        return PARTS if {"matmul", "experts", "attention", "hbm"} <= set(self.measured) else UNMEASURED


def read(path: Path, *, device: str) -> Calibration:
    """Raises: ConfigError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"calibration={path}: {error.strerror}; tests/gpu writes such a file") from None
    except ValueError as error:
        raise ConfigError(
            f"calibration={path}: is not JSON ({error}); tests/gpu writes such a file"
        ) from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ConfigError(
            f"calibration={path}: must be an object with format={FORMAT}; tests/gpu writes such a file"
        )
    if values.get("device") != device:
        raise ConfigError(
            f"calibration={path}: was measured on {values.get('device')}, but device={device}; use "
            f"device={values.get('device')}, or a file of its own"
        )
    for key, kind in {"measured": dict, "runs": list}.items():
        if not isinstance(values.get(key, kind()), kind):
            what = "an object of speeds" if kind is dict else "a list of steps"
            raise ConfigError(
                f"calibration={path}: {key}={values[key]}: must be {what}; leave it out, or run tests/gpu"
            )
    measured, others = values.get("measured", {}), {key: values[key] for key in OPTIONAL if key in values}
    for key, value in {**measured, **others}.items():
        if key not in (*MEASURED, *OPTIONAL):
            raise ConfigError(f"calibration={path}: measured.{key}: use one of {', '.join(MEASURED)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST:
            raise ConfigError(
                f"calibration={path}: {key}={value}: must be a number above 0 and below {MOST:g}, in B/s, "
                "FLOP/s or s"
            )
    return Calibration(device, measured, others, tuple(values.get("runs", ())))
