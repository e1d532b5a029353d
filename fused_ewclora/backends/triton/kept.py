# SPDX-License-Identifier: Apache-2.0
"""Device memory that outlives a call: where it is allocated, who may still read it, when it is let go.

All of it goes through here. It must not come from a private pool of a CUDA graph (torch.compile with
"reduce-overhead" refuses what stays behind in its pool), other streams may read it, and a captured graph
reads it whenever it is replayed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Number = int | float

_of_graphs: list[Tensor] = []  # what captured graphs read; nothing says when one of them is gone
_caches: list[Callable[[], None]] = []
_zeros: dict[tuple[torch.device, int], Tensor] = {}  # by device and stream


def capturing(device: torch.device) -> bool:
    """Whether what is launched now is recorded for a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def stream(device: torch.device) -> int:
    """The current stream: launches of one stream run one after another."""
    return torch._C._cuda_getCurrentRawStream(device.index or 0) if device.type == "cuda" else 0


def outside(make: Callable[[], T], device: torch.device) -> T:
    """What `make` returns, its memory allocated outside of private pools and usable without autograd's modes.

    Pools that are in use without a capture belong to a thread (`_cuda_beginAllocateCurrentThreadToPool`), so
    another thread makes it, on the current stream. Not for use inside a capture, where the stream decides.
    """
    made: list[T] = []
    failures: list[BaseException] = []
    current = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def run() -> None:
        try:
            with torch.cuda.stream(current):  # of None: nothing
                made.append(make())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="fused_ewclora")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return made[0]


def copied(values: Tensor, device: torch.device) -> Tensor:
    """`values`, which are in host memory, on `device` to stay; ready for every stream."""
    return outside(lambda: values.to(device, copy=True), device)


def by_value(values: Tensor, device: torch.device) -> Tensor:
    """The same for this call or graph alone: a graph would read host memory anew in each replay, so that the
    numbers are arguments of the kernels that write them."""
    made = torch.empty(values.shape, dtype=values.dtype, device=device)
    write(made, values.flatten().tolist())
    return made


def write(to: Tensor, values: Sequence[Number]) -> None:
    """Writes numbers in order on the current stream, without waiting and without host memory: they are
    arguments of kernels, about a hundred each."""
    if all(value == values[0] for value in values):
        if values:
            to.fill_(values[0])
        return
    to.zero_()
    torch._foreach_add_(list(to.view(-1).unbind()), list(values))


def zeros(like: Tensor, size: int) -> Tensor:
    """Counters at zero, int32, for launches that leave them so. Two that could run at the same time never
    share them: a stream has its own, and a graph writes its own in every replay."""
    device = like.device
    if device.type != "cuda" or capturing(device):
        return like.new_zeros(size, dtype=torch.int32)
    place = device, stream(device)
    found = _zeros.get(place)
    if found is None or found.numel() < size:
        rounded = 1 << max(size - 1, 0).bit_length()
        # What it replaces was allocated on this stream, which uses it again in its own order.
        found = outside(lambda: torch.zeros(rounded, dtype=torch.int32, device=device), device)
        _zeros[place] = found
    return found


def used(tensors: Iterable[Tensor]) -> None:
    """The current stream reads `tensors`, made on another one: their memory serves no one else before it has
    done so, whenever they are let go."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


def hold(tensors: Iterable[Tensor]) -> None:
    """Keep what the graph that is being captured reads, until `forget`."""
    _of_graphs.extend(tensors)


def cache(clear: Callable[[], None]) -> None:
    """Let `forget` call `clear`, which empties a cache of tensors."""
    _caches.append(clear)


def forget() -> None:
    """Let go of everything; `ops.dispatch` has waited for the GPUs."""
    _of_graphs.clear()
    _zeros.clear()
    for clear in _caches:
        clear()
