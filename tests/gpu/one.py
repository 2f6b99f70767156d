"""Runs the checks of one stage in this process, one after another, whatever becomes of each.

    python -m tests.gpu.one MODULE RESULT.json DEVICE

Exit codes: 0 all bars hold · 1 one does not, or a check failed · 69 no GPU.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tests.gpu import stock  # noqa: F401  # before the trainer
from tests.gpu.bench import Bench
from tests.gpu.stages import NO_GPU


def main(module_name: str, path: str, device: str) -> int:
    module = import_module(f"tests.gpu.{module_name}")
    num_ranks = getattr(module, "RANKS", 1)
    if device == "cuda" and torch.cuda.device_count() < num_ranks:
        print(f"torch {torch.__version__} sees {torch.cuda.device_count()} GPUs, {num_ranks} are needed")
        return NO_GPU
    on = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    result = run(module, on=on, results=Path(path).parent, report=lambda result: write(Path(path), result))
    is_good = all(check["error"] is None for check in result["checks"])
    return int(not is_good or any(figure["holds"] is False for figure in result["figures"]))


def run(
    module: ModuleType,
    *,
    on: torch.device,
    results: Path,
    report: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Every check of a stage; `report` hears of the result after each. A CPU runs without the compiler, which
    takes minutes there.
    """
    bench, checks = Bench(on=on, results=results, flex=on.type == "cuda"), list[dict[str, Any]]()
    for check in module.CHECKS:
        bench.check, start_s, error = check.__name__, time.perf_counter(), None
        print(f"-- {check.__name__}", flush=True)
        try:
            with torch.compiler.set_stance("default" if bench.is_gpu else "force_eager"):
                check(bench, module.SIZES[on.type])
        except Exception:  # noqa: BLE001  # the next check may still have something to say
            error = traceback.format_exc()
            print(error, flush=True)
        free(on)
        seconds = round(time.perf_counter() - start_s, 2)
        checks.append({"name": check.__name__, "seconds": seconds, "error": error})
        result = {"checks": checks, "figures": [asdict(figure) for figure in bench.figures]}
        report(result)
    return result


def free(on: torch.device) -> None:
    if on.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(on)


def write(path: Path, result: dict[str, Any]) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(result, indent=1))
    draft.rename(path)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
