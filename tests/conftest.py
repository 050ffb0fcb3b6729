"""What tests of several folders share. No torch up here: some run where it must not be loaded."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # One process a core, of one thread each: pools of several would get in each other's way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch computes in one thread: for tiny models, where a second would only wait for it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def in_processes() -> Callable[[list[str], int], None]:
    """Runs a command as so many ranks of one group on this machine's CPU; all have to succeed."""

    def run(command: list[str], processes: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        begun = [
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(processes)
        ]  # fmt: skip
        for process in begun:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output.decode()[-3000:]

    return run
