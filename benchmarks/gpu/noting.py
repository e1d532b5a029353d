# SPDX-License-Identifier: Apache-2.0
"""What calls of the library would launch on a GPU that is not here: their Triton kernels, noted on tensors
without data.

Calls are made as they are anywhere else, with tensors on the device "meta". Below autograd each op is handed
to the Triton host that would serve it on the architecture, and the host's launches are noted, not run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_ewclora.backends import triton as hosts
from fused_ewclora.backends.candidate import Call, Candidate, LinearShape, bucket
from fused_ewclora.backends.triton import cost_model, launch
from fused_ewclora.ops import checks, dispatch, schemas


def _call(op: str, args: Sequence[Any], arch: str) -> Call:
    """What decides between the algorithms of Triton, as `schemas` says it for tensors on a GPU."""
    tensor, named = schemas.defining(op, args), dict(zip(schemas.ARGUMENTS[op], args, strict=True))
    if not op.startswith("lora_linear"):
        return Call("cuda", tensor.dtype, arch)
    rows = tensor.numel() // max(tensor.shape[-1], 1)
    d_out, d_in = named["weight"].shape
    rank = sum(a.shape[0] for a in named["lora_as"])
    shape = LinearShape(bucket(rows), d_in, d_out, rank, named["dropout_p"] > 0.0)
    return Call("cuda", tensor.dtype, arch, shape)


def serving(op: str, args: Sequence[Any], arch: str) -> Candidate:
    """The algorithm of Triton that serves a call on `arch`: the one asked for, or the one expected to be
    fastest."""
    found, call = hosts.candidates(op), _call(op, args, arch)
    algorithm = args[-1].partition(":")[2]
    if algorithm and any(algorithm in c.keys for c in found):
        return next(c for c in found if algorithm in c.keys)
    possible = [c for c in found if not c.keys or cost_model.impossible(op, c.keys[0], call) is None]
    return next(c for c in possible if c.outperformed(call) is None)


class _OnTriton(TorchDispatchMode):
    """Ops of this library run the hosts of Triton. Values that are read are those of finite tensors."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.arch = arch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        space, _, op = func._schema.name.partition("::")
        if space == "fused_ewclora" and op in schemas.SCHEMAS:
            return serving(op, args, self.arch).run(*args[:-1])
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        given = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and given.get("device") == CPU:
            return torch.zeros(args[0].shape, dtype=given.get("dtype") or args[0].dtype)
        return func(*args, **given)


CPU = torch.device("cpu")


@contextlib.contextmanager
def noting(arch: str) -> Iterator[list[launch.Launch]]:
    """The launches that calls inside would make on `arch`, with every backend asked for taken as there."""
    every = dict.fromkeys(dispatch.available_backends())
    with (
        mock.patch.object(dispatch, "available_backends", lambda: every),
        mock.patch.object(checks, "offsets", lambda *_: None),  # whose values are not there
        launch.noting(arch) as launches,
        _OnTriton(arch),
    ):
        yield launches
