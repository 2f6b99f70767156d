"""What does a step spend its time on, kernel by kernel?

<run>/profile/steps-00003-00005.rank0.json      every operator and kernel: chrome://tracing, ui.perfetto.dev
                                    .txt       a table of them, those that take longest first
                                    .pickle    on a GPU: who holds which memory, for pytorch.org/memory_viz
"""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from trainer.records import write_text

ROWS = 60  # of the table
MOST_EVENTS = 200_000  # allocations that the memory's history holds
log = logging.getLogger(__name__)


class Profile:
    """As a context: writes what torch's profiler sees from before step `first` to after step `last`.

    A run that resumes between the two is profiled from there, and one that ends between them to its end. A
    file that cannot be written is warned of: it is a record, not the run.
    """

    def __init__(self, directory: Path, *, first: int, last: int, rank: int, device: torch.device) -> None:
        self.first, self.last, self.device, self.running = first, last, device, None
        self.path = directory / "profile" / f"steps-{first:05d}-{last:05d}.rank{rank}"

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *error: object) -> None:
        if self.running is not None:
            self._stop(self.running)

    def begin(self, step: int) -> None:
        """Before this step."""
        if self.running is None and self.first <= step <= self.last:
            self._start()
        elif self.running is not None and step > self.last:
            self._stop(self.running)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
        self.running = profile(activities=activities)
        self.running.start()

    def _stop(self, running: profile) -> None:
        running.stop()
        self.running = None
        spent = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(f"{self.path}.json")
            if self.device.type == "cuda":
                torch.cuda.memory._dump_snapshot(f"{self.path}.pickle")
                torch.cuda.memory._record_memory_history(enabled=None)
        except (OSError, RuntimeError) as error:
            log.warning("%s: the profile cannot be written (%s); the run goes on", self.path, error)
        table = running.key_averages().table(sort_by=spent, row_limit=ROWS)
        write_text(Path(f"{self.path}.txt"), table)
