"""Does another process write into this directory?

A POSIX record lock: the kernel gives it back when its process ends, however it ends; it holds over NFS, and
no child inherits it.
"""

import errno
import fcntl
import logging
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import TextIO

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
SHORT_S = 3.0  # for a process that is just ending
log = logging.getLogger(__name__)


class InUseError(RuntimeError):
    """Another process writes here; the message says which one."""


def lock(directory: Path, *, wait_s: float = SHORT_S) -> TextIO:
    """Holds `directory`/lock until the returned file is closed. wait_s: for a process that is ending; who
    waits for long says so. Raises: InUseError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / "lock").open("a+")
    began_s, is_told = time.monotonic(), False
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_LOCKS:
                log.warning(
                    "%s: this file system has no locks; a second run in this directory would not be noticed",
                    directory,
                )
                return file
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            file.seek(0)
            in_use = f"{directory} is in use by {file.read().strip() or 'another process'}"
            waited_s = time.monotonic() - began_s
            if waited_s >= wait_s:
                file.close()
                raise InUseError(in_use) from None
            if waited_s >= SHORT_S and not is_told:
                log.warning("%s; it may leave within %g s", in_use, wait_s)
                is_told = True
            time.sleep(0.1)
            continue
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()}, since "
            f"{datetime.now().isoformat(timespec='seconds')}"
        )
        file.flush()
        return file
