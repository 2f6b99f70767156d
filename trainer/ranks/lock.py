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
log = logging.getLogger(__name__)


class InUseError(RuntimeError):
    """Another process writes here; the message says which one."""


def lock(directory: Path, *, wait_s: float = 3.0) -> TextIO:
    """Holds `directory`/lock until the returned file is closed. wait_s: for a process that is just ending.
    Raises: InUseError.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / "lock").open("a+")
    deadline_s = time.monotonic() + wait_s
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
            if time.monotonic() < deadline_s:
                time.sleep(0.1)
                continue
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise InUseError(f"{directory} is in use by {owner or 'another process'}") from None
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()}, since "
            f"{datetime.now().isoformat(timespec='seconds')}"
        )
        file.flush()
        return file
