"""What can a device do? configs/device/*.yaml: every figure with its source."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from omegaconf import MISSING

from trainer.config import CONFIG_DIR, ConfigError, filled, nearest, read_plain
from trainer.lab.plan.calibration import Calibration

SOURCES = ("measured", "datasheet", "assumed")
DEVICES = CONFIG_DIR / "device"


@dataclass
class Figure:
    value: float = MISSING
    source: str = MISSING  # one of SOURCES
    note: str = ""


@dataclass
class Efficiency:
    """What a kernel or a collective reaches, as a share of the peak that it is measured against."""

    matmul: Figure = field(default_factory=Figure)  # of the peak of its dtype
    experts: Figure = field(default_factory=Figure)  # grouped products
    attention: Figure = field(default_factory=Figure)
    hbm: Figure = field(default_factory=Figure)
    nvlink: Figure = field(default_factory=Figure)
    nic: Figure = field(default_factory=Figure)
    all_to_all_nvlink: Figure = field(default_factory=Figure)
    all_to_all_nic: Figure = field(default_factory=Figure)


@dataclass
class Hardware:
    name: str = MISSING
    peak_bf16: Figure = field(default_factory=Figure)  # [FLOP/s] dense
    peak_float32: Figure = field(
        default_factory=Figure
    )  # [FLOP/s] without TF32, which a float32 run turns off
    hbm: Figure = field(default_factory=Figure)  # [B/s]
    memory: Figure = field(default_factory=Figure)  # [GiB] that torch can have
    nvlink: Figure = field(default_factory=Figure)  # [B/s] one way, of a GPU
    nic: Figure = field(default_factory=Figure)  # [B/s] one way, of a GPU
    per_node: Figure = field(default_factory=Figure)  # GPUs
    launch_s: Figure = field(default_factory=Figure)  # [s] of the host for a kernel
    wait_s: Figure = field(default_factory=Figure)  # [s] that a wait of the host costs beside the wait
    fused: Figure = field(default_factory=Figure)  # bytes of elementwise kernels, compiled over not
    fragments: Figure = field(default_factory=Figure)  # of what lives, lost to the allocator
    reserved: Figure = field(default_factory=Figure)  # [GiB] of the CUDA context and NCCL
    efficiency: Efficiency = field(default_factory=Efficiency)

    def speed(self, kind: str, dtype: str = "bfloat16") -> float:
        """[FLOP/s] in dtype, or [B/s], that a kind of work reaches."""
        peaks = {"hbm": self.hbm, "nvlink": self.nvlink, "all_to_all_nvlink": self.nvlink}
        peaks |= {"nic": self.nic, "all_to_all_nic": self.nic}
        peak = {"bfloat16": self.peak_bf16, "float32": self.peak_float32}[dtype]
        return peaks.get(kind, peak).value * getattr(self.efficiency, kind).value


def hardware(name: str, calibration: Calibration | None = None) -> Hardware:
    """Raises: ConfigError."""
    names = sorted(path.stem for path in DEVICES.glob("*.yaml"))
    if name not in names:
        raise ConfigError(f"device={name}: there is no such device{nearest(name, names)}")
    path = DEVICES / f"{name}.yaml"
    device = filled(Hardware, read_plain(path), where=f"{path.name}: ")
    check(device, path)
    return calibrated(device, calibration) if calibration else device


def check(hardware: Hardware, path: Path) -> None:
    for figure in figures(hardware).values():
        if figure.source not in SOURCES or not figure.value > 0:
            raise ConfigError(
                f"{path.name}: {figure.value} from {figure.source}: a figure is above 0 and one of "
                f"{', '.join(SOURCES)}"
            )


def figures(hardware: Hardware) -> dict[str, Figure]:
    every = {part.name: getattr(hardware, part.name) for part in fields(Hardware)}
    efficiency = every.pop("efficiency")
    every.pop("name")
    return every | {f"efficiency.{part.name}": getattr(efficiency, part.name) for part in fields(Efficiency)}


def calibrated(hardware: Hardware, calibration: Calibration) -> Hardware:
    for kind, reached in calibration.measured.items():
        figure = getattr(hardware.efficiency, kind)
        figure.value *= reached / hardware.speed(kind)
        figure.source, figure.note = "measured", "calibration="
    for key, value in calibration.others.items():
        setattr(hardware, key, Figure(value, "measured", "calibration="))
    return hardware
