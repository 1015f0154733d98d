"""How much of the server one client may have."""

import math
from dataclasses import dataclass


class Refused(Exception):
    """Why a request is not answered: an HTTP status, a message, and the field that is wrong, if it is one."""

    def __init__(self, status: int, message: str, field: str | None = None):
        super().__init__(message)
        self.status, self.message, self.field = status, message, field


@dataclass(frozen=True)
class Limits:
    """Raises ValueError for values that make no sense."""

    max_tokens: int = 4096
    """Of one answer."""
    prompt_bytes: int = 4 * 2**20
    """Of one prompt, or all messages together."""
    stops: int = 4
    """Stop strings of one request."""
    requests: int = 64
    """That are being answered at once. Each holds a memory, of constant size."""
    seconds: float = 600.0
    """A request that takes longer is ended; so is one whose body does not arrive in this time."""
    shutdown_seconds: float = 10.0
    """After SIGTERM, for the requests that are being answered; then they are ended."""

    def __post_init__(self) -> None:
        for option, value in (
            ("--max-tokens", self.max_tokens),
            ("--max-prompt-bytes", self.prompt_bytes),
            ("--max-requests", self.requests),
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
        """Of a request as it is sent: JSON may write one byte of text as six."""
        return 6 * self.prompt_bytes + 2**16
