"""Runs drills one after another and prints what held.

    python -m tests.drills [name ...] [--short]

Exit codes: 0 all held · 1 one did not · 2 no such drill.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# before torch is imported
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
NAMESPACE = "TRIQUETRA_DRILLS_NAMESPACE"


def main() -> int:
    from tests.drills.disks import can_mount
    from tests.drills.every import DRILLS
    from tests.drills.table import as_markdown, run

    parser = argparse.ArgumentParser(prog="python -m tests.drills", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(DRILLS)}; none: all")
    parser.add_argument(
        "--short", action="store_true", help="the set that `make test-all` runs, with fewer trials"
    )
    given = parser.parse_args()
    if unknown := set(given.names) - set(DRILLS):
        print(f"error: no drill {', '.join(sorted(unknown))}; there are {', '.join(DRILLS)}", file=sys.stderr)
        return 2
    chosen = [
        d
        for d in DRILLS.values()
        if d.name in given.names or (not given.names and (d.in_short_set or not given.short))
    ]
    if not can_mount() and NAMESPACE not in os.environ and may_unshare():
        os.environ[NAMESPACE] = "1"
        os.execvp("unshare", ["unshare", "-rm", sys.executable, "-m", "tests.drills", *sys.argv[1:]])
    rows, failures, start_s = [], {}, time.monotonic()
    scratch = tempfile.mkdtemp(prefix="drills-")
    os.environ["TMPDIR"] = tempfile.tempdir = scratch  # all of it goes when they are done
    try:
        for number, of in enumerate(chosen, 1):
            print(f"[{number}/{len(chosen)}] {of.name}: ", end="", file=sys.stderr, flush=True)
            row, failure = run(of, short=given.short)
            rows.append(row)
            print(f"{'FAILED' if failure else 'held'}, {row[-1]} s", file=sys.stderr, flush=True)
            if failure:
                failures[of.name] = failure
                print(failure, file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    print(as_markdown(rows))
    print(f"\n{len(rows) - len(failures)} of {len(rows)} drills held, {time.monotonic() - start_s:.0f} s")
    for name, failure in failures.items():
        print(f"\n{name} FAILED: {failure}")
    return 1 if failures else 0


def may_unshare() -> bool:
    """Is there a namespace to be had in which a tmpfs can be mounted?"""
    if shutil.which("unshare") is None:
        return False
    with tempfile.TemporaryDirectory() as directory:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", Path(directory)]
        return subprocess.run(command, capture_output=True).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
