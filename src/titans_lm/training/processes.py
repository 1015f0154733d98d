"""Several processes of one run, as torchrun and accelerate start them: what they decide together, and which rows of a
batch are whose."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from torch import distributed
from torch.utils.data import Sampler

T = TypeVar("T")


class FailedElsewhere(SystemExit):
    """Another process of the run has failed, and says why. This one ends without words."""

    def __init__(self, status: int = 2):
        super().__init__(status)


class Processes:
    """The processes of this run: `index` of `count`. Alone it is one process, and nothing is sent.

    Every method but `together` and the properties is a collective call: all processes make it, in the same order.
    """

    def __init__(self) -> None:
        """Join the processes that a launcher started, if one did. Raises ValueError where accelerate was asked for
        several processes and started one."""
        _refuse_one_of_several()
        state = PartialState(cpu=not torch.cuda.is_available())
        self.count, self.index = state.num_processes, state.process_index
        self._group: Any = None
        if self.count > 1 and distributed.get_backend() != "gloo":
            self._group = distributed.new_group(backend="gloo")  # plain numbers do not wait for the GPU's queue

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def gather(self, value: T) -> list[T]:
        """The value of each process."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(values, value, group=self._group)
        return values

    def of_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, which alone calls it. Its error ends all processes."""
        made = None
        with self.together():
            made = make() if self.is_first else None
        return self.gather(made)[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A context that ends in all processes or fails in all: the first process that fails raises its error, others
        `FailedElsewhere`. Contexts nest: the error stays that of the process where it arose. A context must hold no
        collective call that only some processes would reach."""
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            if self.count == 1:
                raise
            error = raised
        failed = self.gather(_failure(error)) if self.count > 1 else []
        own = [index for index, (_, here) in enumerate(failed) if here]
        first = next(iter(own or [index for index, (status, _) in enumerate(failed) if status]), None)
        if first is None:
            return
        if first == self.index:
            assert error is not None
            raise error
        raise FailedElsewhere(failed[first][0]) from None

    def said_once(self, error: BaseException, status: int = 2) -> BaseException:
        """`error`, which all processes have, in the first one; in others what ends them without words."""
        return error if self.is_first else FailedElsewhere(status)


def _failure(error: BaseException | None) -> tuple[int, bool]:
    """The exit status that an error asks for, 0: none; and whether it arose in this process."""
    if isinstance(error, FailedElsewhere):
        return int(error.code or 2), False
    return (0, False) if error is None else (130 if isinstance(error, KeyboardInterrupt) else 2, True)


def _refuse_one_of_several() -> None:
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if launched and not any(name in os.environ for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")):
        raise ValueError(
            "accelerate launch was asked for several processes and started one, as it does on CPUs without mpirun; "
            "there, use torchrun --nproc-per-node N -m titans_lm train CONFIG"
        )


class OwnOrder(Sampler[int]):
    """This process's rows of each batch in the `order` of all processes' rows."""

    def __init__(self, order: Any, rows: int, processes: Processes):
        self.order, self.rows, self.processes = order, rows, processes

    def set_epoch(self, epoch: int) -> None:
        self.order.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.order) // self.processes.count

    def __iter__(self) -> Iterator[int]:
        for number, index in enumerate(self.order):
            if number // self.rows % self.processes.count == self.processes.index:
                yield index
