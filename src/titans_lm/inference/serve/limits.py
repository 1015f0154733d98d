"""Limits of the server."""

import math
from dataclasses import dataclass


class Refused(Exception):
    """A refused request: HTTP status, message, and the invalid field, if any."""

    def __init__(self, status: int, message: str, field: str | None = None):
        super().__init__(message)
        self.status, self.message, self.field = status, message, field


@dataclass(frozen=True)
class Limits:
    """Raises ValueError for invalid values."""

    max_tokens: int = 4096
    """Maximum tokens of an answer."""
    prompt_bytes: int = 4 * 2**20
    """Maximum bytes of a prompt, or of all messages together."""
    stops: int = 4
    """Maximum stop strings of a request."""
    requests: int = 64
    """Maximum concurrent requests: those that are being answered, and those that wait for a row."""
    batch_size: int = 32
    """Rows: requests that are answered together. Each holds a memory of constant size."""
    prefill_chunk_size: int = 512
    """Prompt tokens per step, shared by the prompts that are being read."""
    seconds: float = 600.0
    """Time limit of a request, and of the arrival of its body."""
    shutdown_seconds: float = 10.0
    """Time for running requests to finish after SIGTERM."""

    def __post_init__(self) -> None:
        for option, value in (
            ("--max-tokens", self.max_tokens),
            ("--max-prompt-bytes", self.prompt_bytes),
            ("--max-requests", self.requests),
            ("--max-batch-size", self.batch_size),
            ("--prefill-chunk-size", self.prefill_chunk_size),
        ):
            if value < 1:
                raise ValueError(f"{option} must be at least 1, got {value}")
        if self.stops < 0:
            raise ValueError(f"--max-stops must not be negative, got {self.stops}")
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"--request-seconds must be a number above 0, got {self.seconds}")
        if not (math.isfinite(self.shutdown_seconds) and self.shutdown_seconds >= 0):
            raise ValueError(f"--shutdown-seconds must be a number, not negative, got {self.shutdown_seconds}")

    @property
    def body_bytes(self) -> int:
        """Maximum bytes of a request body: JSON may take six bytes for one byte of text."""
        return 6 * self.prompt_bytes + 2**16
