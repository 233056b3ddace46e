"""Processes of their own: the number of devices, and of processes, is fixed when JAX starts."""

import os
import socket


def many_devices(count: int) -> dict[str, str]:
    """The environment of a process that sees so many CPU devices."""
    return os.environ | dict(JAX_NUM_CPU_DEVICES=str(count), JAX_PLATFORMS="cpu")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
