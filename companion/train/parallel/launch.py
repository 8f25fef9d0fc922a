"""Start worker processes that compute together, from a notebook or a script, and get their answers back.

Every worker is a Python of its own, which starts from nothing on every system. So a script needs no ``__main__``
guard, and a function that is defined in a notebook cell can be sent to it (by cloudpickle). The workers find each other
through a file, so that no port can be taken.
"""

import faulthandler
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import torch
from torch import distributed

from companion.errors import CompanionError

_PROGRAM = "from companion.train.parallel.launch import _work; _work()"
_LOOPBACK = {"linux": "lo", "darwin": "lo0"}
_GRACE = 2.0  # seconds in which workers that ran out of time say where they are


class WorkerError(CompanionError):
    """A worker failed; the message is one sentence, and what the worker said is in ``detail`` and shown below it."""

    def __init__(self, sentence: str, detail: str = "") -> None:
        super().__init__(sentence)
        self.detail = detail.strip()
        if self.detail:
            self.add_note(self.detail)


def launch(
    function: Callable[..., Any],
    workers: int,
    *arguments: Any,
    backend: str | None = None,
    timeout: float = 120.0,
    threads: int = 1,
) -> list[Any]:
    """Call ``function(*arguments)`` in ``workers`` new processes at once, joined by torch.distributed.

    In each, the default process group is ready: ``torch.distributed.get_rank()`` tells which one it is, `device` where
    it computes. What workers print appears here when all are done, in their order. No worker outlives this call, also
    if it is interrupted or this process is killed.

    Args:
        function: any function that the workers can import, or one of a notebook or script.
        workers: how many processes.
        arguments: for each of them the same; anything that can be pickled.
        backend: ``nccl`` (one GPU for each worker) or ``gloo`` (CPU); None takes nccl where there are GPUs enough.
        timeout: seconds, the workers' start (a few seconds) included, until all of this counts as hung.
        threads: CPU threads of each worker.

    Returns:
        What the workers returned, by rank.

    Raises:
        WorkerError: a worker raised, died or did not end in time. The others are stopped at once.
        CompanionError: arguments out of range, or a function that cannot be sent to a process.
    """
    if not isinstance(workers, int) or not 1 <= workers <= 256:
        raise CompanionError(f"workers is {workers!r}: give a whole number from 1 to 256.")
    if not timeout > 0:
        raise CompanionError(f"timeout is {timeout!r}: give seconds, more than 0.")
    gpus = torch.cuda.device_count()
    backend = backend or ("nccl" if gpus >= workers else "gloo")
    if backend not in ("gloo", "nccl"):
        raise CompanionError(f"there is no backend {backend!r}: choose gloo or nccl.")
    if backend == "nccl" and gpus < workers:
        raise CompanionError(f"{workers} workers over nccl need as many GPUs, and there are {gpus}: use gloo.")
    with tempfile.TemporaryDirectory(prefix="companion-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        deadline = time.time() + timeout
        task = (function, arguments, workers, backend, deadline, threads)
        try:
            (folder / "task").write_bytes(cloudpickle.dumps(task))
        except Exception as error:  # pickling runs anybody's code
            raise CompanionError(f"the function or its arguments cannot be sent to a process: {error}.") from error
        with _processes(workers, folder, threads) as processes:
            try:
                return _results(processes, folder, deadline + _GRACE, timeout)
            finally:
                for rank in range(workers):
                    for line in _output(folder, rank).splitlines():
                        print(f"[{rank}] {line}")


def device() -> torch.device:
    """Where this worker computes: its GPU under nccl, else the CPU."""
    if distributed.get_backend() == "nccl":
        return torch.device("cuda", distributed.get_rank() % torch.cuda.device_count())
    return torch.device("cpu")


@contextmanager
def _processes(workers: int, folder: Path, threads: int) -> Iterator[list[subprocess.Popen]]:
    """Started, and in any case gone afterwards, with all that they started."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": str(threads)}
    if sys.platform in _LOOPBACK:  # else Gloo asks the network what this machine is called
        environment.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK[sys.platform])
    processes: list[subprocess.Popen] = []
    try:
        for rank in range(workers):
            with (folder / f"{rank}.out").open("wb") as out:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-c", _PROGRAM, str(folder), str(rank)],
                        stdin=subprocess.PIPE,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        start_new_session=True,  # so that its own children end with it, and Ctrl-C is ours alone
                    )
                )
        yield processes
    finally:
        for process in processes:
            if hasattr(os, "killpg"):
                with suppress(ProcessLookupError, PermissionError):  # it is gone; the second is macOS's word for it
                    os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process in processes:
            process.communicate()


def _results(processes: list[subprocess.Popen], folder: Path, deadline: float, timeout: float) -> list[Any]:
    workers = len(processes)
    results: dict[int, tuple[float, bool, Any]] = {}
    failed = False
    while True:
        for rank in range(workers):
            if rank not in results and (folder / f"{rank}.result").exists():
                results[rank] = cloudpickle.loads((folder / f"{rank}.result").read_bytes())
        if len(results) == workers and all(ok for _, ok, _ in results.values()):
            return [results[rank][2] for rank in range(workers)]
        # If one fails, those that wait for it fail next: what counts is who died, for none does that raised, or else
        # who raised first.
        for rank, process in enumerate(processes):
            code = process.poll()
            if code is not None and rank not in results and not (folder / f"{rank}.result").exists():
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                raise WorkerError(f"worker {rank} of {workers} {how}.", _output(folder, rank))
        failures = sorted((when, rank, text) for rank, (when, ok, text) in results.items() if not ok)
        if failures and not failed:
            failed = True
            time.sleep(0.2)  # one that died is not always known to be dead when the others notice
            continue
        if failures:
            _, rank, (reason, text) = failures[0]
            raise WorkerError(f"worker {rank} of {workers} failed: {reason.rstrip('.')}.", text)
        if time.time() > deadline:
            late = [rank for rank in range(workers) if rank not in results]
            detail = "\n".join(f"worker {rank}:\n{_output(folder, rank, 'stack')}" for rank in late)
            who = "worker" if len(late) == 1 else "workers"
            raise WorkerError(
                f"{who} {' and '.join(map(str, late))} of {workers} did not end within {timeout:g} s.", detail
            )
        time.sleep(0.01)


def _output(folder: Path, rank: int, kind: str = "out") -> str:
    path = folder / f"{rank}.{kind}"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _work() -> None:
    """The whole life of a worker."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    orphaned = threading.Thread(target=_end_with_the_parent, daemon=True)
    orphaned.start()
    stacks = (folder / f"{rank}.stack").open("w")
    try:
        function, arguments, workers, backend, deadline, threads = cloudpickle.loads((folder / "task").read_bytes())
        faulthandler.dump_traceback_later(max(0.1, deadline - time.time()), file=stacks)
        torch.set_num_threads(threads)
        if backend == "nccl":
            torch.cuda.set_device(rank)
        distributed.init_process_group(
            backend,
            store=distributed.FileStore(str(folder / "store"), workers),
            rank=rank,
            world_size=workers,
            timeout=timedelta(days=1),  # the launcher gives up first, and knows more
        )
        result = cloudpickle.dumps((time.time(), True, function(*arguments)))
    except BaseException as error:
        own = error.__traceback__.tb_next if error.__traceback__ else None  # without this function's line
        text = "".join(traceback.format_exception(error.with_traceback(own)))
        # Its first line, for a CUDA error has several, and a note comes last.
        reason = traceback.format_exception_only(error)[0].splitlines()[0]
        result = cloudpickle.dumps((time.time(), False, (reason, text)))
    sys.stdout.flush()
    sys.stderr.flush()
    part = folder / f"{rank}.part"
    part.write_bytes(result)
    part.replace(folder / f"{rank}.result")
    orphaned.join()  # the others may still need the connections of this one


def _end_with_the_parent() -> None:
    sys.stdin.buffer.read()  # ends when the launcher does, however it ends
    if hasattr(os, "killpg"):
        os.killpg(0, signal.SIGKILL)  # this worker's own group: itself, and what it started
    os._exit(0)
