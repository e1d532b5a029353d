"""Builds the package; metadata is in pyproject.toml.

FUSED_EWCLORA_BUILD chooses what is compiled:
    auto   the CPU extension if a compiler, Python's headers and PyTorch are there, else as none (default)
    none   a pure-Python install that runs on the reference backend
    cpu    the CPU extension, or an error that names what is missing
    cuda   refused: this version has no CUDA sources
MAX_JOBS limits the number of parallel compiler processes.
"""

import os
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
MODES = ("auto", "none", "cpu", "cuda")


def sources(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def missing_for_cpu():
    """What keeps the CPU extension from being built, as a sentence, or None."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))[0]
    if shutil.which(compiler) is None:
        return f"no C++ compiler: '{compiler}' was not found (CXX names another one)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.exists():
        return f"no Python headers: {header} was not found (they come with python3-dev or python3-devel)"
    try:
        import torch.utils.cpp_extension  # noqa: F401
    except ImportError as error:
        return f"PyTorch cannot be imported ({error}): install it first and build with --no-build-isolation"
    return None


def cpu_extension():
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # at::parallel_for is header code: it runs in parallel only in sources compiled with OpenMP.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    extension = CppExtension(
        "fused_ewclora._C",
        sources("cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        depends=[*sources("**/*.h"), *sources("**/*.inl")],
        # No -march: files choose instruction sets by pragmas. No -std: PyTorch adds the one it needs.
        extra_compile_args=["-O3", "-g0", "-Wall", "-fvisibility=hidden", *openmp],
        extra_link_args=openmp,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


def build_options(mode):
    if mode not in MODES:
        sys.exit(f"FUSED_EWCLORA_BUILD: expected one of {', '.join(MODES)}, got '{mode}'")
    if mode == "cuda":
        sys.exit("FUSED_EWCLORA_BUILD=cuda: this version has no CUDA sources; use auto, cpu or none")
    missing = None if mode == "none" else missing_for_cpu()
    if mode == "none" or (mode == "auto" and missing):
        if missing:
            print(f"fused_ewclora: the CPU extension is not built, {missing}. The reference backend remains.")
        return {}
    if missing:
        sys.exit(f"FUSED_EWCLORA_BUILD=cpu: the CPU extension cannot be built, {missing}")
    return cpu_extension()


setup(
    packages=[*find_packages(include=["fused_ewclora", "fused_ewclora.*"]), "fused_ewclora.kernels"],
    # kernels/ has no __init__.py: as a package at the root it would shadow the unrelated package `kernels`.
    package_dir={"fused_ewclora": "fused_ewclora", "fused_ewclora.kernels": "kernels"},
    package_data={
        "fused_ewclora": ["py.typed"],
        "fused_ewclora.backends.triton": ["configs/*.json"],
        "fused_ewclora.kernels": ["py.typed"],
    },
    **build_options(os.environ.get("FUSED_EWCLORA_BUILD", "auto")),
)
