"""The error of a run whose loss is no longer a number."""

from pathlib import Path


class NotFinite(ValueError):
    """The loss is NaN or infinite."""

    def __init__(self, step: int, kept: str = ""):
        self.step = step
        super().__init__(
            f"the loss is not a number at step {step}: lower training.learning_rate, or model.memory_lr, or keep "
            f"model.memory_clip and the residual form{kept}"
        )

    def after(self, checkpoint: Path | None) -> "NotFinite":
        """The same error, naming the last checkpoint, which is good, if there is one."""
        return NotFinite(self.step, "" if checkpoint is None else f"; {checkpoint} is from before, and good")
