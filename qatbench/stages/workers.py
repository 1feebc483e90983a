"""Run parts of a recipe in worker processes: small models leave most of a GPU idle otherwise.

A worker is this very command line with a narrower selection; artifacts are made under locks, so
workers never make the same thing twice.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qatbench.errors import QatbenchError
from qatbench.stages.common import Progress

POLL_SECONDS = 0.2


class WorkerError(QatbenchError):
    """A worker ended with an error; carries the worker's exit code."""

    def __init__(self, message: str, *, hint: str, exit_code: int) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Job:
    """One worker's part: arguments after `qatbench`, and the jobs that must be done before."""

    name: str
    arguments: tuple[str, ...]
    needs: frozenset[str] = frozenset()


def run_jobs(jobs: Sequence[Job], workers: int, logs: Path, progress: Progress) -> None:
    """Run all jobs, at most `workers` at a time, each in its own process with its own log.

    After a failure no further job starts; those that run are waited for.

    Raises: WorkerError naming the first job that failed, with its exit code.
    """
    logs.mkdir(parents=True, exist_ok=True)
    waiting, done = list(jobs), set[str]()
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[tuple[str, int]] = []
    names = {job.name for job in jobs}
    try:
        while running or (waiting and not failed):
            for job in [] if failed else _ready(waiting, done, names)[: workers - len(running)]:
                waiting.remove(job)
                running[job.name] = _start(job, logs, workers)
            time.sleep(POLL_SECONDS)
            for name, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[name]
                if code:
                    failed.append((name, code))
                done.add(name)
                progress("Parts done", len(done), len(jobs))
    finally:
        for process in running.values():
            process.terminate()
    if failed:
        name, code = failed[0]
        raise WorkerError(
            f"{name} failed: {_last_error(logs / f'{name}.log')}",
            hint=f"see {logs / f'{name}.log'}; the same command goes on where it stopped",
            exit_code=code if code > 0 else 70,
        )


def _ready(waiting: Sequence[Job], done: set[str], names: set[str]) -> list[Job]:
    return [job for job in waiting if job.needs & names <= done]


def _start(job: Job, logs: Path, workers: int) -> subprocess.Popen[bytes]:
    # Workers that each take all cores wait for one another many times longer than they compute.
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    with (logs / f"{job.name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "qatbench", *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"OMP_NUM_THREADS": threads, **os.environ},
        )


def _last_error(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1].removeprefix("error: ")
