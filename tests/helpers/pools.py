# SPDX-License-Identifier: Apache-2.0
"""A private memory pool of a CUDA graph, modelled on the CPU: what is allocated in it, and what stays behind.

torch.compile with "reduce-overhead" warms a function up and records it in such a pool, which belongs to the
thread that does so, and raises if anything but results is left in it afterwards.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_ewclora.ops import dispatch


class Pool(TorchDispatchMode):
    """Notes the memory of everything that this thread computes."""

    def __init__(self) -> None:
        super().__init__()
        self._owner = threading.get_ident()
        self._seen: dict[int, tuple[StorageWeakRef, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        given = {storage(t) for t in leaves if isinstance(t, Tensor)}
        given |= {int(t._cdata) for t in leaves if isinstance(t, UntypedStorage)}
        result = func(*args, **(kwargs or {}))
        if threading.get_ident() != self._owner:  # a thread of its own allocates outside of the pool
            return result
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, Tensor)
                and tensor.untyped_storage().nbytes()
                and storage(tensor) not in given
            ):
                where = StorageWeakRef(tensor.untyped_storage())
                self._seen[where.cdata] = (where, f"{func} {list(tensor.shape)} {tensor.dtype}")
        return result

    def left_behind(self, results: Iterable[Tensor]) -> list[str]:
        """What made the memory in it that is alive beside that of `results`."""
        gc.collect()
        known = {storage(t) for t in results}
        return [
            made for where, made in self._seen.values() if not where.expired() and where.cdata not in known
        ]


def storage(tensor: Tensor) -> int:
    """What identifies the memory of a tensor."""
    return int(tensor.untyped_storage()._cdata)


@contextlib.contextmanager
def private_pool(results: list[Tensor]) -> Iterator[None]:
    """Fails if memory of the pool but that of `results`, which the caller fills in, outlives the block."""
    pool = Pool()

    def inside(op: str, candidate: dispatch.Candidate) -> dispatch.Candidate:
        """The mode ends where the kernel of an operation begins; it goes on inside."""

        def run(*arguments: Any) -> Any:
            with pool:
                return candidate.run(*arguments)

        return candidate._replace(run=run, linear=None)

    before = dispatch.annotate(inside)
    try:
        with pool:
            yield
    finally:
        dispatch.annotate(before)
    left = pool.left_behind(results)
    assert not left, f"in a private pool of a CUDA graph, not tracked as outputs: {left}"
