"""Who started this rank? It ends with its launcher, however that one ends."""

import ctypes
import os
import signal
import sys

LAUNCHER = "TRIQUETRA_LAUNCHER"  # in the environment of ranks: the process id of trainer.torchrun
PR_SET_PDEATHSIG = 1  # prctl.h


def end_with_launcher() -> None:
    """Asks the kernel to kill this process when the trainer.torchrun that started it has ended. Without its
    launcher nobody would notice the end of a rank; the next start finds the last checkpoint. Other systems
    than Linux: does nothing.
    """
    launcher, parent = int(os.environ.get(LAUNCHER, 0)), os.getppid()
    if not launcher or not sys.platform.startswith("linux"):
        return
    if parent == launcher:  # and no script in between
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent or parent == 1 != launcher:  # the launcher ended before the kernel was asked
        os.kill(os.getpid(), signal.SIGKILL)
