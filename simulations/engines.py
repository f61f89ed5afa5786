"""Where the jobs of a sweep run: this process, processes beside it, or Ray. The rows are the same, but for the time.

Processes are spawned and spoken to over a pipe each, as in `local_grid.py`. `ProcessPoolExecutor` would queue all jobs
at once and wait for the running ones when somebody presses Ctrl-C; here the processes are ended and their jobs lost,
which costs less than a minute, because what was finished is on disk.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import traceback
from collections import deque
from collections.abc import Generator
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch

from client.stopping import ignore
from common.errors import ConfigurationError, WardroundError
from simulations.planning import Job
from simulations.rows import Row
from simulations.run_job import run_job

Engine = Literal["local", "ray"]
Answer = Row | WardroundError
Answers = Generator[tuple[Job, Answer], None, None]  # closing it ends the processes


def run_jobs(jobs: list[Job], code: str, *, workers: int = 1, engine: Engine = "local") -> Answers:
    """Run the jobs and yield each with its row, or with why there is none, in the order in which they end.

    Args:
        jobs: begun in this order.
        code: digest of the code.
        workers: processes of one thread each; on Ray, CPUs of this machine, unless RAY_ADDRESS names a cluster.
        engine: `local` or `ray`.

    Raises:
        ConfigurationError: Ray is not installed.
        WardroundError: a process ended.
    """
    if engine == "ray":
        return _on_ray(jobs, code, workers)
    if workers == 1 or len(jobs) < 2:
        return ((job, attempt(job, code)) for job in jobs)
    return _on_processes(jobs, code, workers)


def attempt(job: Job, code: str) -> Answer:
    """The job's row, or the error as an answer: one line that cannot be trained does not end the sweep."""
    try:
        return run_job(job, code)
    except WardroundError as error:
        return error
    except Exception as error:  # its text may hold a patient's value; its place does not
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return WardroundError(f"{type(error).__name__} at {frame.filename}:{frame.lineno}; this is a defect, report it")


def _on_processes(jobs: list[Job], code: str, workers: int) -> Answers:
    context = multiprocessing.get_context("spawn")
    waiting, processes = deque(jobs), []
    busy: dict[Connection, Job] = {}
    try:
        for _ in range(min(workers, len(jobs))):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, code), daemon=True)
            process.start()
            processes.append(process)
            theirs.close()
            busy[pipe] = waiting.popleft()
            pipe.send(busy[pipe])
        while busy:
            ended = wait(list(busy))
            for pipe in [pipe for pipe in busy if pipe in ended]:
                job = busy.pop(pipe)
                try:
                    answer = pipe.recv()
                except (EOFError, OSError):
                    raise WardroundError(
                        f"the process of `{job.title}` ended; it may have run out of memory: use fewer --workers. "
                        "Finished rows are kept"
                    ) from None
                if waiting:
                    busy[pipe] = waiting.popleft()
                    pipe.send(busy[pipe])
                yield job, answer
    finally:
        for process in processes:
            process.kill()
            process.join()


def _work(pipe: Connection, code: str) -> None:
    """A process: one job after the other, until its parent closes the pipe or ends."""
    ignore()  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
            pipe.send(attempt(job, code))
        except (EOFError, OSError):
            return


def _on_ray(jobs: list[Job], code: str, workers: int) -> Answers:
    """The same jobs as Ray tasks; on several machines, the sweep's folder and the records must be visible to all."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigurationError("--engine ray needs Ray: pip install 'wardround[ray]', or use --engine local")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing reaches outside
    ray: Any = importlib.import_module("ray")
    here: dict[str, Any] = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers, "include_dashboard": False}
    ray.init(log_to_driver=False, logging_level="error", **here)
    try:
        task = ray.remote(num_cpus=1)(attempt)
        running = {task.remote(job, code): job for job in jobs}
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            yield running.pop(done), ray.get(done)
    finally:
        ray.shutdown()
