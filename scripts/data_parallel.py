"""Training by several processes (``torchrun --nproc_per_node N``), or by one, which sends nothing and never waits."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from machine_limits import check_device
from pydantic import BaseModel, Field
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from user_input import WholeNumberText, reason_of, validated

from sd_plugin import UsageError


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        count: how many there are; rank: this one's number, from 0.
        device: what this one computes on.
    """

    count: int
    rank: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, text: Tensor) -> Tensor:
        """This process's columns of a text ``[n, B]``, on its device; they may be none if B is less than ``count``."""
        return text[:, self.rank :: self.count].contiguous().to(self.device)

    def wrap(self, model: nn.Module) -> nn.Module:
        """``model``, in which each backward pass then leaves the mean of all processes' gradients."""
        return DistributedDataParallel(model, gradient_as_bucket_view=True) if self.count > 1 else model

    def sum(self, values: Tensor) -> Tensor:
        """``values`` added up over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The ``value`` of each process, by rank."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            distributed.all_gather_object(values, value)
        return values


class Variables(BaseModel):
    """The environment variables by which torchrun says which process is which."""

    WORLD_SIZE: Annotated[WholeNumberText, Field(ge=1)] = 1
    RANK: Annotated[WholeNumberText, Field(ge=0)] = 0
    LOCAL_RANK: Annotated[WholeNumberText, Field(ge=0)] = 0

    @classmethod
    def read(cls) -> "Variables":
        """Those of this process; UsageError if one has no such value."""
        found = validated(cls, {name: os.environ[name] for name in cls.model_fields if name in os.environ})
        if found.RANK >= found.WORLD_SIZE:
            raise UsageError(f"RANK must be less than WORLD_SIZE, which is {found.WORLD_SIZE}, got {found.RANK}")
        return found


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did: by gloo on CPUs, by NCCL on CUDA devices.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``. Of several processes each takes the ``cuda`` device of its local rank.

    Raises:
        UsageError: there is no such device, or a numbered one for several processes; the variables by which they are to
            find each other are not valid, or they do not.
    """
    variables = Variables.read()
    count, rank, local = variables.WORLD_SIZE, variables.RANK, variables.LOCAL_RANK
    if count > 1 and ":" in device:
        raise UsageError(f"--device {device}: {count} processes need a device each; give --device cuda")
    found = _device(f"cuda:{local}" if device == "cuda" else device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if count == 1:
        yield Processes(1, 0, found)
        return
    try:
        distributed.init_process_group("nccl" if found.type == "cuda" else "gloo")
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"the {count} processes did not find each other: {reason_of(error)}") from None
    try:
        yield Processes(count, rank, found)
    finally:
        distributed.destroy_process_group()


def _device(name: str) -> torch.device:
    """The device called ``name``, if this machine and this PyTorch have it."""
    check_device(name)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device
