"""Collective operations of a worker group. All ranks must call them in the same order."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn


@dataclass(frozen=True)
class Ranks:
    """This worker's rank among `world` workers."""

    rank: int
    world: int
    device: str

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over all ranks; `values` on `device` is changed."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def first_decides(self, value: bool) -> bool:
        """Rank 0's `value`, on every rank."""
        decision = torch.tensor(float(self.rank == 0 and value), device=self.device)
        return bool(self.sum(decision).item())

    def from_first(self, value: Any) -> Any:
        """Rank 0's `value`, any picklable object, on every rank."""
        values = [value]
        if self.world > 1:
            distributed.broadcast_object_list(values, 0)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The `value` of each rank, in order of rank, on every rank."""
        values = [value]
        if self.world > 1:
            values = [None] * self.world
            distributed.all_gather_object(values, value)
        return values

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of rank 0 to every rank: the ranks have different batch norm statistics,
        but evaluation and checkpoints must use the same."""
        if self.world > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)
