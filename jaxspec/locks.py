"""File locks that end with the process that holds them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import warnings
from collections.abc import Iterator
from pathlib import Path


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


@contextlib.contextmanager
def claimed(folder: Path, remedy: str) -> Iterator[None]:
    """Creates a folder if needed, and locks it for this process.

    Raises:
      ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock(descriptor, str(folder), remedy)
        yield
    finally:
        os.close(descriptor)
