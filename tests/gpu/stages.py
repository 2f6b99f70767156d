"""Which stages are there, and how does each run in a process of its own, with a limit?"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent.parent
NO_GPU = 69  # EX_UNAVAILABLE of sysexits.h: torch sees no GPU, or too few
HIDDEN = "TRIQUETRA_HIDES_GPUS"  # tests/conftest.py has set CUDA_VISIBLE_DEVICES="", not the user
GRACE_S = 5.0  # between SIGTERM and SIGKILL
REHEARSAL = 20  # times the limit, on a CPU that may be busy


@dataclass(frozen=True, kw_only=True)
class Stage:
    number: str
    module: str  # in tests/gpu
    limit_s: float
    question: str
    num_ranks: int = 1

    @property
    def name(self) -> str:
        return f"{self.number} {self.module}"


ONE_GPU = [
    Stage(
        number="0", module="ceilings", limit_s=40, question="What is this machine, and how fast can it be?"
    ),
    Stage(number="1", module="grouped", limit_s=25, question="Is the grouped GEMM a loop over experts?"),
    Stage(number="2", module="attention", limit_s=75, question="Is flex attention masked attention?"),
    Stage(number="3", module="parts", limit_s=35, question="Does every other part compute what it says?"),
    Stage(number="4", module="models", limit_s=60, question="Is the whole model the one of the CPU?"),
    Stage(number="5", module="waits", limit_s=25, question="Where does the host wait for the GPU?"),
    Stage(number="6", module="runs", limit_s=95, question="Do runs stop, die and go on bit for bit?"),
    Stage(number="7a", module="speed", limit_s=80, question="How fast is Nano, next to others?"),
    Stage(number="7b", module="one_rank", limit_s=45, question="Is one rank of 2,048 what was planned?"),
]
EIGHT_GPUS = [
    Stage(number="8a", module="layouts", limit_s=600, question="Is every layout one GPU?", num_ranks=8),
    Stage(number="8b", module="scaling", limit_s=600, question="How fast are eight GPUs?", num_ranks=8),
]


def stages(num_ranks: int) -> list[Stage]:
    return [stage for stage in ONE_GPU + EIGHT_GPUS if stage.num_ranks == num_ranks]


def environment() -> dict[str, str]:
    """That of a stage: GPUs which tests/conftest.py has hidden from the other tests are seen again."""
    seen = dict(os.environ)
    if seen.pop(HIDDEN, None):
        seen.pop("CUDA_VISIBLE_DEVICES", None)
    return seen | {"HF_HUB_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}


def run_stage(stage: Stage, directory: Path, *, device: str) -> dict[str, Any]:
    """Starts the stage, waits for it, ends it at its limit. Returns its result with `outcome` and `seconds`.

    The stage writes its result after each check, so one that was ended or has died is not lost. Its output
    stands in <number>.log.
    """
    limit_s = stage.limit_s * (REHEARSAL if device == "cpu" else 1)
    result, log = directory / f"{stage.number}.json", directory / f"{stage.number}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tests.gpu.one", stage.module, str(result.resolve()), device]
    start_s = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=environment(), stdout=output, stderr=output, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    told = json.loads(result.read_text()) if result.exists() else {"checks": [], "figures": []}
    seconds = round(time.monotonic() - start_s, 1)
    words = {"stage": stage.name, "question": stage.question, "limit_s": limit_s, "log": log.name}
    return words | told | {"outcome": outcome(code, told), "seconds": seconds}


def outcome(code: int | None, result: Mapping[str, Any]) -> str:
    failed = [check["name"] for check in result["checks"] if check["error"]]
    missed = [figure["name"] for figure in result["figures"] if figure["holds"] is False]
    if code is None:
        return "overran its limit and was ended"
    if code == NO_GPU:
        return "no GPU"
    if code not in (0, 1) or (code == 1 and not failed and not missed):
        return f"died with exit code {code}"
    return "failed" if failed else "missed a bar" if missed else "holds"


def end(process: subprocess.Popen) -> None:
    """The stage and all that it has started: it leads a process group of its own."""
    for number in ("TERM", "KILL"):
        subprocess.run(["kill", f"-{number}", "--", f"-{process.pid}"], stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=GRACE_S)
        except subprocess.TimeoutExpired:
            continue
