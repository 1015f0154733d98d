"""The thread of the model: it runs an engine for the requests of other threads, and tells each what came of it."""

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from titans_lm.inference.serve.answer import Answer
from titans_lm.inference.serve.engine import Engine
from titans_lm.inference.serve.limits import Limits, Refused
from titans_lm.models.modeling import TitansForCausalLM

LOG = logging.getLogger(__name__)


class End(NamedTuple):
    """Sent after the last text, with the reason if the answer is incomplete."""

    refused: Refused | None = None


class Job:
    """A running answer. The worker's thread calls `deliver` with texts and then one `End`.

    Without `stream` there is one text, the whole: who waits for it need not wake for each token, which would take the
    interpreter's lock from the worker."""

    def __init__(self, answer: Answer, deliver: Callable[[str | End], None], seconds: float, stream: bool = True):
        self.answer, self.deliver, self.stream = answer, deliver, stream
        self._held: list[str] = []
        self.deadline, self.seconds = time.monotonic() + seconds, seconds
        self._refused: Refused | None = None

    def cancel(self, reason: Refused | None = None) -> None:
        """Stop the job after the running call. Thread-safe."""
        self._refused = self._refused or reason or Refused(499, "the client left")

    def add(self, text: str) -> None:
        """Take text of the answer."""
        if self.stream:
            self.deliver(text)
        else:
            self._held.append(text)

    def end(self, end: End) -> None:
        """Deliver what is held, then `end`."""
        if self._held:
            self.deliver("".join(self._held))
        self.deliver(end)

    def over(self) -> End | None:
        """Its `End` if the job is over, else None."""
        if self._refused is None and self.answer.finish_reason is None and time.monotonic() > self.deadline:
            self.cancel(Refused(504, f"this took longer than {self.seconds:g} seconds"))
        if self._refused is not None:
            return End(self._refused)
        return None if self.answer.finish_reason is None else End()


class Worker:
    """Runs submitted jobs together, by an engine that only its own thread uses."""

    def __init__(self, model: TitansForCausalLM, limits: Limits):
        self.limits = limits
        self.engine = self._new_engine(model)
        self.jobs: list[Job] = []
        self._new: list[Job] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="titans-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    def check_room(self) -> None:
        """Raises Refused if there are too many jobs, or the server is shutting down."""
        if self._closed:
            raise Refused(503, "the server is shutting down")
        if len(self.jobs) >= self.limits.requests:
            raise Refused(429, f"{len(self.jobs)} requests are being answered; try again later")

    def submit(self, answer: Answer, deliver: Callable[[str | End], None], stream: bool = True) -> Job:
        """Add a job. Thread-safe. Raises Refused as `check_room` does."""
        job = Job(answer, deliver, self.limits.seconds, stream)
        with self._changed:
            self.check_room()
            self.jobs.append(job)
            self._new.append(job)
            self._changed.notify()
        return job

    def cancel_all(self, reason: Refused) -> int:
        """Cancel all jobs, and return their number."""
        with self._changed:
            for job in self.jobs:
                job.cancel(reason)
            return len(self.jobs)

    def close(self) -> None:
        """Cancel all jobs and refuse new ones."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self.cancel_all(Refused(503, "the server is shutting down"))

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.jobs or self._closed)
                if not self.jobs:
                    return
            self.turn()

    def _new_engine(self, model: TitansForCausalLM) -> Engine:
        return Engine(model, self.limits.batch_size, self.limits.prefill_chunk_size)

    def turn(self) -> None:
        """One step of the engine, between which jobs are added and those that are over removed.

        An error of the engine, such as no memory for one more row, ends the jobs and leaves the worker alive."""
        with self._changed:
            jobs, new, self._new = list(self.jobs), self._new, []
        for job in new:
            try:
                self.engine.add(job.answer)
            except Exception as error:  # such as a memory that cannot be read beside those of the others
                self._fail(job, error)
        self._discard([job.answer for job in jobs if job.over() is not None], jobs)
        self._step({id(job.answer): job for job in jobs})
        ended = [(job, end) for job in jobs if (end := job.over()) is not None]
        self._discard([job.answer for job, _ in ended], jobs)
        with self._changed:
            self.jobs = [job for job in self.jobs if not any(job is other for other, _ in ended)]
        for job, end in ended:
            job.end(end)

    def _step(self, jobs: dict[int, Job]) -> None:
        """A step of the engine for these jobs, by the `id` of their answers."""
        running = [job for job in jobs.values() if job.over() is None]
        try:
            events = self.engine.step()
        except Exception as error:  # an answer that this step completed has lost its last text
            self._fail_all(running, error)
            return
        for answer, result in events:
            if isinstance(result, Exception):
                self._fail(jobs[id(answer)], result)
            elif result:
                jobs[id(answer)].add(result)

    def _discard(self, answers: list[Answer], jobs: list[Job]) -> None:
        try:
            self.engine.discard(answers)  # copies the rows of the others
        except Exception as error:
            self._fail_all([job for job in jobs if job.over() is None], error)

    def _fail_all(self, jobs: list[Job], error: Exception) -> None:
        for job in jobs:
            self._fail(job, error)
        self.engine = self._new_engine(self.engine.model)

    def _fail(self, job: Job, error: Exception) -> None:
        LOG.error("a request failed", exc_info=error)
        job.cancel(Refused(500, f"the model failed: {type(error).__name__}: {error}"))
