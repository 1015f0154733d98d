"""A thread that shares one model among requests: each turn gives every answer a token, and one prompt a piece."""

import logging
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from titans_lm.inference.serve.answer import Answer
from titans_lm.inference.serve.limits import Limits, Refused
from titans_lm.models.modeling import TitansForCausalLM

LOG = logging.getLogger(__name__)


class End(NamedTuple):
    """Sent after the last text, with the reason if the answer is incomplete."""

    refused: Refused | None = None


class Job:
    """A running answer. The worker's thread calls `deliver` with texts and then one `End`."""

    def __init__(self, answer: Answer, deliver: Callable[[str | End], None], seconds: float):
        self.answer, self.deliver = answer, deliver
        self.deadline, self.seconds = time.monotonic() + seconds, seconds
        self._refused: Refused | None = None

    def cancel(self, reason: Refused | None = None) -> None:
        """Stop the job after the running call. Thread-safe."""
        self._refused = self._refused or reason or Refused(499, "the client left")

    def over(self) -> End | None:
        """Its `End` if the job is over, else None."""
        if self._refused is None and self.answer.finish_reason is None and time.monotonic() > self.deadline:
            self.cancel(Refused(504, f"this took longer than {self.seconds:g} seconds"))
        if self._refused is not None:
            return End(self._refused)
        return None if self.answer.finish_reason is None else End()


class Worker:
    """Runs submitted jobs in turns, one forward call per job.

    All answers of a turn read one token each, so a later version may batch them.
    """

    def __init__(self, model: TitansForCausalLM, limits: Limits):
        self.model, self.limits = model, limits
        self.jobs: list[Job] = []
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

    def submit(self, answer: Answer, deliver: Callable[[str | End], None]) -> Job:
        """Add a job. Thread-safe. Raises Refused as `check_room` does."""
        job = Job(answer, deliver, self.limits.seconds)
        with self._changed:
            self.check_room()
            self.jobs.append(job)
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

    def turn(self) -> None:
        """Run one turn: a token for each answer, a piece of the prompt that waited longest. Removes jobs that are
        over."""
        with self._changed:
            jobs = list(self.jobs)
        reading = next((job for job in jobs if job.answer.is_reading and not job.over()), None)
        for job in jobs:
            if job is reading or not job.answer.is_reading:
                self._step(job)
        with self._changed:
            if reading is not None:
                self.jobs.remove(reading)
                self.jobs.append(reading)
            ended = [(job, end) for job in self.jobs if (end := job.over()) is not None]
            self.jobs = [job for job in self.jobs if job not in [job for job, _ in ended]]
        for job, end in ended:
            job.deliver(end)

    def _step(self, job: Job) -> None:
        """One forward call. An error ends only this job."""
        if job.over() is not None:
            return
        answer = job.answer
        try:
            with torch.no_grad():
                ids = answer.next_ids()[None].to(self.model.device)
                out = self.model(ids, past_key_values=answer.state, logits_to_keep=1)
            if text := answer.take(out.logits[0, -1]):
                job.deliver(text)
        except Exception as error:
            LOG.exception("a request failed")
            job.cancel(Refused(500, f"the model failed: {type(error).__name__}: {error}"))
