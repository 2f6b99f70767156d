"""`trainer.train` with a fault of a GPU in it, beside those of tests/drills/faulty.py.

python -m tests.gpu.faulty '{"fault": "kernel_without_end", "step": 3, "where": "/tmp/drill"}' <overrides>
"""

import json  # noqa: I001  # the shim of stock.py comes before the trainer
import os
import sys
import traceback
from pathlib import Path

import torch

from tests.gpu import stock  # noqa: F401
from tests.drills import faulty

CYCLES = 2**42  # of a kernel: half an hour


def kernel_without_end(where: Path, *, step: int) -> None:
    """The rank waits for its GPU, for ever."""
    faulty.around_steps(before=lambda run, at: torch.cuda._sleep(CYCLES) if at == step else None)


def note_forks(where: Path) -> None:
    """Each fork by the data workers: had CUDA been started?"""

    def note() -> None:
        if any(frame.filename.endswith("data/workers.py") for frame in traceback.extract_stack()):
            with (where / "forks").open("a") as file:
                file.write(f"{torch.cuda.is_initialized()}\n")

    os.register_at_fork(before=note)


faulty.FAULTS |= {of.__name__: of for of in (kernel_without_end, note_forks)}

if __name__ == "__main__":
    sys.exit(faulty.main(json.loads(sys.argv[1]), sys.argv[2:]))
