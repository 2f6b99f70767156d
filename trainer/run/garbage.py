"""When does Python collect its garbage? On all ranks after the same steps.

Left alone, the collector runs when it likes, on each rank at another time, and a step is as long as that of
its slowest rank: of 2,048 one pauses in almost every step. What the build has made is frozen: it is not
looked through again.
"""

import gc

EVERY = 10  # [steps] a step leaves some 10,000 objects in cycles, which may hold tensors


class Garbage:
    """As a context: Python collects no garbage by itself, `begin` does; afterwards all is as it was."""

    def __enter__(self) -> "Garbage":
        self.was_enabled = gc.isenabled()
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def __exit__(self, *error: object) -> None:
        gc.unfreeze()
        if self.was_enabled:
            gc.enable()

    def begin(self, step: int) -> None:
        """Before this step."""
        if step % EVERY == 0:
            gc.collect()
