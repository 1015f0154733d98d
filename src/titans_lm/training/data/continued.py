"""Documents and memories that are carried from batch to batch: a document that continues goes on, a new one resets."""

from typing import Any

from titans_lm.models.cache import TitansState


def continue_documents(inputs: dict[str, Any], state: TitansState | None) -> dict[str, Any]:
    """The inputs of a batch whose rows continue `state`. Resets the memory of rows that begin with a new document.

    Positions in a document say where each row is. The model is told of borders alone (`seq_idx`): a memory that was
    reset within a document, after `tbptt_steps` batches, counts its tokens from there.
    """
    if "position_ids" not in inputs:
        return inputs
    inputs = dict(inputs)
    begins = inputs.pop("position_ids") == 0
    if state is not None and bool((new := begins[:, 0]).any()):
        state.reset(new.nonzero()[:, 0].tolist())
    inputs["seq_idx"] = begins.cumsum(1)
    return inputs
