"""The memory files that a command may overwrite: those that it loaded or wrote."""

from pathlib import Path

from titans_lm.models.cache import TitansState
from titans_lm.models.cache_file import FileIdentity, check_target, file_identity
from titans_lm.models.modeling import TitansForCausalLM
from titans_lm.utils.memory_lock import MemoryLock


class KnownFiles:
    """Memory files, each with the content that this command loaded or wrote. No other memory is overwritten: somebody
    may have filled it for hours."""

    def __init__(self) -> None:
        self._known: set[FileIdentity] = set()

    def load(self, path: Path, model: TitansForCausalLM) -> TitansState:
        """Raises as `TitansState.load` does."""
        self.add(path)  # first: what another process writes meanwhile is not known
        return TitansState.load(path, model)

    def save(self, state: TitansState, path: Path, lock: MemoryLock | None = None) -> None:
        """Raises as `check` and `TitansState.save` do."""
        if lock is None:
            with MemoryLock(path) as lock:
                return self.save(state, path, lock)
        self.check(path)
        state.save(path, lock)
        self.add(path)

    def add(self, path: Path) -> None:
        """Allow to overwrite what `path` holds now, if it is there."""
        if (found := file_identity(path)) is not None:
            self._known.add(found)

    def check(self, path: Path) -> None:
        """Raises ValueError for a memory that is not known, and what `check_target` raises."""
        check_target(path)
        found = file_identity(path)
        if found is not None and found.size and found not in self._known:
            raise ValueError(
                f"{path} holds a memory that was not loaded here, and is not overwritten: "
                f"continue it with --load-memory {path}, or give another name"
            )
