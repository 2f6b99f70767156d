"""Runs drills under a real Slurm on this machine, one after another, and prints what held.

    python -m tests.slurm [name ...] [--short]

Exit codes: 0 all held, or Slurm cannot run here (then one line says so) · 1 one did not · 2 no such drill.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time

# before torch is imported
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def main() -> int:
    from tests.drills.table import as_markdown, run
    from tests.slurm.cluster import INSTALL, missing
    from tests.slurm.drills import DRILLS

    parser = argparse.ArgumentParser(prog="python -m tests.slurm", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(DRILLS)}; none: all")
    parser.add_argument("--short", action="store_true", help="the set that CI runs")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(DRILLS):
        print(f"error: no drill {', '.join(sorted(unknown))}; there are {', '.join(DRILLS)}", file=sys.stderr)
        return 2
    if absent := missing():
        print(f"skipped: this machine lacks {', '.join(absent)}; Slurm is installed by {INSTALL}")
        return 0
    names = asked.names or [drill.name for drill in DRILLS.values() if drill.in_short_set or not asked.short]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a cluster ends with its drill
    rows, failures, start_s = [], {}, time.monotonic()
    scratch = tempfile.mkdtemp(prefix="slurm-")
    os.environ["TMPDIR"] = tempfile.tempdir = scratch  # all of it goes when they are done
    try:
        for number, name in enumerate(names, 1):
            print(f"[{number}/{len(names)}] {name}: ", end="", file=sys.stderr, flush=True)
            row, failure = run(DRILLS[name], short=asked.short)
            rows.append(row)
            print(f"{'FAILED' if failure else 'held'}, {row[-1]} s", file=sys.stderr, flush=True)
            if failure:
                failures[name] = failure
                print(failure, file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(as_markdown(rows))
    print(f"\n{len(rows) - len(failures)} of {len(rows)} drills held, {time.monotonic() - start_s:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
