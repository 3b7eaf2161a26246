"""Several processes on one compression: what they exchange, over ``torch.distributed``.

Every worker runs the same engine on its own share of the windows. The first one, rank 0, reads and
writes what is on disk and speaks to the user.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from .errors import InvalidRequest

_T = TypeVar("_T")

#: How long a worker waits for the others; a layer of a very large model can take long to solve.
TIMEOUT = timedelta(hours=6)


class Workers:
    """A lone worker: nothing to exchange. The base of :class:`ProcessGroup`."""

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this is the worker that reads, writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[_T]) -> list[_T]:
        """What this worker does of ``items``."""
        return list(items[self.rank :: self.size])

    def sum(self, tensor: torch.Tensor) -> None:
        """Add up ``tensor`` over all workers, in place."""

    def copy(self, tensor: torch.Tensor, source: int) -> None:
        """Overwrite ``tensor`` by that of the worker ``source``, in place."""

    def tell(self, value: _T, source: int = 0) -> _T:
        """The ``value`` that the worker ``source`` has."""
        return value

    def tensors(
        self, own: Mapping[str, torch.Tensor] | None, source: int, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """The tensors that the worker ``source`` has (its ``own``), on ``device``, for everybody."""
        layout = None if own is None else {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
        result = {}
        for name, (shape, dtype) in (self.tell(layout, source) or {}).items():
            if own is None:
                result[name] = torch.empty(shape, dtype=dtype, device=device)
            else:
                result[name] = own[name].to(device).contiguous()  # backends pass on memory, not strides
            self.copy(result[name], source)
        return result


class ProcessGroup(Workers):
    """The processes that ``torchrun`` started."""

    def __init__(self) -> None:
        self.rank = distributed.get_rank()
        self.size = distributed.get_world_size()

    def sum(self, tensor: torch.Tensor) -> None:
        distributed.all_reduce(tensor)

    def copy(self, tensor: torch.Tensor, source: int) -> None:
        distributed.broadcast(tensor, source)

    def tell(self, value: _T, source: int = 0) -> _T:
        box = [value]
        distributed.broadcast_object_list(box, source)
        return box[0]


def launched() -> bool:
    """Whether ``torchrun`` started this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def processes(devices: int | str, device: str) -> int:
    """How many processes share the work: those ``torchrun`` started, or what ``--devices`` asks for.

    'auto' is one for every GPU, where ``device`` is one. Raises :class:`InvalidRequest` for more than there are GPUs.
    """
    on_gpu = torch.device(device).type == "cuda"
    gpus = torch.cuda.device_count() if on_gpu else 0
    count = max(1, gpus) if devices == "auto" else int(devices)
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else count
    if on_gpu and here > gpus:
        raise InvalidRequest(f"--devices {here}: this machine has {gpus} GPUs; use at most that")
    return int(os.environ["WORLD_SIZE"]) if launched() else count


def processes_here(devices: int | str, device: str) -> int:
    """Those of :func:`processes` that run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else processes(devices, device)


def restarts() -> int:
    """How often ``torchrun`` has started this group of processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def first_process() -> bool:
    """Whether this process speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run ``modegpt`` with ``arguments`` in several processes on this machine; returns the exit code."""
    threads = max(1, (os.cpu_count() or 1) // count)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    process = subprocess.Popen(
        [*torchrun, "--max-restarts=1", "-m", "modegpt", *arguments],
        env={"OMP_NUM_THREADS": str(threads), **os.environ},
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    previous = signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # torchrun then ends its workers
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def _end_with_parent() -> None:
    """Have Linux send this process a SIGTERM when its parent is gone, however that ended."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def local_device(name: str) -> str:
    """The device of this process: with several processes on one machine's GPUs, each takes its own."""
    if launched() and torch.device(name).type == "cuda":
        return f"cuda:{int(os.environ['LOCAL_RANK'])}"
    return name


@contextmanager
def workers(device: str) -> Iterator[Workers]:
    """The workers of this run: the processes of ``torchrun``, or this process alone."""
    if not launched():
        yield Workers()
        return
    if not distributed.is_available():
        raise InvalidRequest("this build of PyTorch has no torch.distributed; run a single process")
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # torchrun keeps its store when it starts the processes again, and with it the addresses of the dead.
        store = PrefixStore(f"start-{restarts()}", store)
    # Objects and host tensors go over gloo, device tensors over NCCL.
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    yield ProcessGroup()
    distributed.destroy_process_group()  # after an error others may be waiting for this process: torchrun ends them
