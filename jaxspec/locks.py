"""File locks that end with the process that holds them."""

from __future__ import annotations

import fcntl
import warnings


def lock(descriptor: int, name: str, remedy: str) -> None:
    """Locks an open file or folder for this process until it is closed.

    Warns and continues without a lock where the file system has none.

    Raises:
      ValueError: another process holds it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another process is writing {name}; {remedy}") from error
    except OSError as error:
        warnings.warn(
            f"{name} cannot be locked ({error}); let no other process write it", stacklevel=2
        )
