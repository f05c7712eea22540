"""Collective operations between the shards of a stage (`models.sharding.ShardGroup`).

`DistributedShardGroup` uses torch.distributed, `LocalShardGroup` connects threads of one process.
In both, every shard gets the same bits of a sum, so that all shards compute the same states.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from llmpq.errors import NeighbourLost
from llmpq.models.sharding import ShardGroup
from llmpq.runtime.transport import TIMEOUT, ThreadExchange


class DistributedShardGroup:
    """A group of processes of torch.distributed; `ranks` holds their ranks in order of shards.

    `device` is the card that NCCL sends from; None sends tensors from where they are.
    """

    def __init__(
        self, ranks: Sequence[int], group: dist.ProcessGroup, device: torch.device | None = None
    ) -> None:
        self.rank, self.size = list(ranks).index(dist.get_rank()), len(ranks)
        self._first, self._group, self._device = ranks[0], group, device

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of everyone's tensors, in place."""
        self._travel(tensor, lambda t: dist.all_reduce(t, group=self._group))
        return tensor

    def broadcast(self, tensor: Tensor) -> None:
        """The first shard's values into everyone's tensor."""
        self._travel(tensor, lambda t: dist.broadcast(t, self._first, group=self._group))

    def _travel(self, tensor: Tensor, exchange: Callable[[Tensor], object]) -> None:
        sent = tensor.to(self._device or tensor.device).contiguous()
        try:
            exchange(sent)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise NeighbourLost(f"shard {self.rank}: another shard was lost ({reason})") from None
        if sent is not tensor:
            tensor.copy_(sent)


def distributed_shard_group(
    stages: Sequence[Sequence[int]], backend: str, device: torch.device
) -> DistributedShardGroup | None:
    """The group of this process's stage; None where its stage has one device.

    `stages` holds the ranks of each stage, `device` is the device of this process. Every process
    must call this with the same `stages`.
    """
    own = None
    for ranks in stages:
        if len(ranks) > 1:  # torch.distributed wants every process to make every group
            group = dist.new_group(list(ranks), backend=backend, timeout=TIMEOUT)
            if dist.get_rank() in ranks:
                own = DistributedShardGroup(ranks, group, device if backend == "nccl" else None)
    return own


class LocalShardHub(ThreadExchange):
    """The state that the threads of a `LocalShardGroup` share."""

    def __init__(self, size: int) -> None:
        super().__init__(size, "shard")

    def groups(self) -> list[ShardGroup]:
        """A group object for each shard."""
        return [LocalShardGroup(rank, self) for rank in range(self.size)]


class LocalShardGroup:
    """Connects threads of this process. Sums are taken in the order of the shards."""

    def __init__(self, rank: int, hub: LocalShardHub) -> None:
        self.rank, self.size, self._hub = rank, hub.size, hub

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of everyone's tensors, in place."""
        first, *others = self._hub.exchange(self.rank, tensor.clone())
        tensor.copy_(first)
        for other in others:
            tensor.add_(other)
        return tensor

    def broadcast(self, tensor: Tensor) -> None:
        """The first shard's values into everyone's tensor."""
        tensor.copy_(self._hub.exchange(self.rank, tensor.clone())[0])
