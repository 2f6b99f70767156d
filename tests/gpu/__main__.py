"""Runs the stages one after another, each in a process of its own with a limit, and says what held.

    python -m tests.gpu [number ...] [--out DIRECTORY] [--device cuda]
    RANKS=8 python -m tests.gpu

Writes gpu.json (every figure), gpu.md (tables), calibration.json (for the planner) and a log of each stage.
--device cpu rehearses at tiny sizes what can run on a CPU; speeds are not judged then.

Exit codes: 0 every bar holds · 1 one does not, or a stage failed, died or overran · 2 no such stage
· 69 no GPU
"""

import argparse
import os
import sys
from pathlib import Path

from tests.gpu import report
from tests.gpu.stages import NO_GPU, run_stage, stages


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("numbers", nargs="*", metavar="number", help="of a stage, as 3 or 7a; none: all")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    asked = parser.parse_args(arguments)
    offered = stages(int(os.environ.get("RANKS", "1")))
    if unknown := set(asked.numbers) - {stage.number for stage in offered}:
        numbers = ", ".join(stage.number for stage in offered)
        print(f"error: no stage {', '.join(sorted(unknown))}; there are {numbers or 'none'}", file=sys.stderr)
        return 2
    asked.out.mkdir(parents=True, exist_ok=True)
    results = []
    for stage in offered:
        if asked.numbers and stage.number not in asked.numbers:
            continue
        print(f"[{stage.name}] {stage.question} ", end="", flush=True)
        results.append(result := run_stage(stage, asked.out, device=asked.device))
        print(f"{result['outcome']}, {result['seconds']:.0f} s", flush=True)
        if result["outcome"] == "no GPU":
            print(f"no GPU: {(asked.out / result['log']).read_text().strip()}")
            return NO_GPU
        for line in report.troubles(result):
            print(f"    {line}")
        report.write(asked.out, results)  # whatever becomes of the next stage
    print(f"\n{report.table(results)}\n{asked.out}: gpu.md, gpu.json, a log of each stage")
    return 0 if report.is_good(results) else 1


if __name__ == "__main__":
    sys.exit(main())
