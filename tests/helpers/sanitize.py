# SPDX-License-Identifier: Apache-2.0
"""`make sanitize`: the compiled kernels under sanitizers, built into build/sanitize.

    python tests/helpers/sanitize.py [address] [thread]

"address": AddressSanitizer and UndefinedBehaviorSanitizer, over the CPU extension and the emulator of the
CUDA kernels. "thread": ThreadSanitizer, over the CPU extension. Python and PyTorch are as they always are:
what happens inside of them is not watched.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
COMMON = [
    *(f"tests/ops/test_{name}.py" for name in (
        "lora_linear", "ewc_penalty", "ewc_penalty_grad", "fisher_accumulate", "merge_weights",
        "merge_grouped", "dropout", "recorded", "versions", "arguments",
    )),
    *(f"tests/backends/test_{name}.py" for name in ("zero_sizes", "wrong_shapes")),
]  # fmt: skip
EMULATOR = [
    "tests/backends/test_zero_sizes.py",
    *(
        f"tests/backends/cuda/test_{name}.py"
        for name in ("fisher", "linear", "merge", "penalty", "structured")
    ),
]
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
# Leaks: Python's own objects at exit. Modules that are not instrumented: PyTorch and NumPy, whose threads and
# memory functions are not followed.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1:second_deadlock_stack=1",
}
SETS = ("", "avx2", "baseline")  # instruction sets of the CPU kernels: the widest of the processor, others


def build(sanitizer: str) -> Path:
    """A copy of the package with the extension compiled for `sanitizer`."""
    folder = ROOT / "build" / "sanitize" / sanitizer
    environment = {**os.environ, "FUSED_EWCLORA_BUILD": "cpu", "FUSED_EWCLORA_SANITIZE": sanitizer}
    command = [
        "setup.py",
        "--quiet",
        "build",
        "--build-base",
        str(folder),
        "--build-lib",
        str(folder / "lib"),
    ]
    subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)
    return folder / "lib"


def preloaded(sanitizer: str) -> str:
    """The sanitizer's library, which has to be there before Python starts."""
    compiler = os.environ.get("CXX", "c++").split()
    names = [LIBRARIES[sanitizer], "libstdc++.so.6"]  # whose functions the sanitizer looks up at its start
    found = [subprocess.check_output([*compiler, f"-print-file-name={name}"], text=True) for name in names]
    return ":".join(path.strip() for path in found)


def tests(sanitizer: str, package: Path, instructions: str | None) -> int:
    """Runs the tests of the CPU kernels with an instruction set, or with None those of the CUDA kernels in
    the emulator; the exit status of pytest, or of the sanitizer that ended it."""
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": preloaded(sanitizer),
        "PYTHONPATH": os.pathsep.join([str(package), *(path for path in others if Path(path) != ROOT)]),
        "FUSED_EWCLORA_SANITIZE": sanitizer,
        "FUSED_EWCLORA_TEST_THREADS": "3",
        "TRITON_INTERPRET": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    if instructions is not None:
        environment |= {"FUSED_EWCLORA_CPU_ISA": instructions, "FUSED_EWCLORA_BUILD": "none"}  # no emulator
    selected = f"{'cuda' if instructions is None else 'cpu'} and not compile"
    # -P: the package is the copy, not the one in the folder that this runs in.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selected]
    command.append("--capture=sys")  # a report goes to the file of standard error, and ends the process
    command += EMULATOR if instructions is None else COMMON
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def main(sanitizers: list[str]) -> int:
    for sanitizer in sanitizers:
        package = build(sanitizer)
        emulated = sanitizer == "address" and not torch.cuda.is_available()
        for instructions in (*SETS, *((None,) if emulated else ())):
            what = "CUDA kernels" if instructions is None else f"{instructions or 'widest'} instruction set"
            print(f"--- {sanitizer}, {what}", flush=True)
            if (status := tests(sanitizer, package, instructions)) != 0:
                return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(LIBRARIES)))
