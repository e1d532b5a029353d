# SPDX-License-Identifier: Apache-2.0
"""Builds the package; metadata is in pyproject.toml.

FUSED_EWCLORA_BUILD chooses what is compiled:
    auto   the CPU extension if a compiler, Python's headers and PyTorch are there, else as none; with nvcc
           and a CUDA build of PyTorch the CUDA extension as well (default)
    none   a pure-Python install that runs on the reference backend
    cpu    the CPU extension, or an error that names what is missing
    cuda   both extensions, or an error that names what is missing
FUSED_EWCLORA_SANITIZE, "address" (with undefined behaviour) or "thread", compiles the CPU extension for
sanitizers, as `make sanitize` does.
MAX_JOBS limits the number of parallel compiler processes, TORCH_CUDA_ARCH_LIST names other GPU architectures,
CUDA_HOME the folder of the CUDA toolkit.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
LEAST_SETUPTOOLS = 77  # as in pyproject.toml, which older ones refuse for reasons that do not name their age
MODES = ("auto", "none", "cpu", "cuda")
SANITIZERS = {  # vptr: PyTorch hides the types that it would look for
    "address": ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}
ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0")  # later GPUs compile the PTX of the last one


if int(setuptools.__version__.split(".")[0]) < LEAST_SETUPTOOLS:
    sys.exit(
        f"setuptools: expected version {LEAST_SETUPTOOLS} or newer, got {setuptools.__version__}; "
        "pip install -U setuptools (builds without isolation take the one that is installed)"
    )


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


def toolkit():
    """The folder of the CUDA toolkit, or None. What is called nvcc may be a script that calls another one."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return Path(named)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        usual = Path("/usr/local/cuda")
        return usual if (usual / "bin" / "nvcc").exists() else None
    said = subprocess.run([nvcc, "--dryrun", os.devnull], capture_output=True, text=True).stderr
    here = re.search(r"^#\$ _HERE_=(.+)$", said, re.MULTILINE)
    binaries = Path(here.group(1)) if here else Path(nvcc).resolve().parent
    return binaries.resolve().parent


def nvcc_says(home, option):
    return subprocess.run([home / "bin" / "nvcc", option], capture_output=True, text=True).stdout


def missing_for_cuda(home):
    """What keeps the CUDA extension from being built, as a sentence, or None."""
    if home is None:
        return "no CUDA toolkit: nvcc was not found (CUDA_HOME names the toolkit's folder)"
    if not (home / "bin" / "nvcc").exists():
        return f"no CUDA toolkit: {home / 'bin' / 'nvcc'} was not found"
    import torch

    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is not a CUDA build: install one that is"
    release = re.search(r"release (\d+)\.", nvcc_says(home, "--version"))
    if release is None or release.group(1) != torch.version.cuda.split(".")[0]:
        found = f"CUDA {release.group(1)}" if release else "no version"
        return f"nvcc of {home} is of {found}, PyTorch {torch.__version__} of CUDA {torch.version.cuda}"
    return None


def architectures(home):
    """The value of TORCH_CUDA_ARCH_LIST: those of ARCHITECTURES that this nvcc knows, and PTX."""
    known = nvcc_says(home, "--list-gpu-arch").split()
    found = [arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known]
    return ";".join(found) + "+PTX"


def sanitizer():
    """The name of the sanitizer to compile for, or None."""
    name = os.environ.get("FUSED_EWCLORA_SANITIZE") or None
    if name is not None and name not in SANITIZERS:
        sys.exit(f"FUSED_EWCLORA_SANITIZE: expected one of {', '.join(SANITIZERS)}, got '{name}'")
    return name


def cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    # at::parallel_for is header code: it runs in parallel only in sources compiled with OpenMP.
    linked = ["-fopenmp", "-ldl"] if sys.platform == "linux" else []
    sanitized, files = SANITIZERS.get(sanitizer(), []), sources("cpu/*.cpp")
    for folder in ("driver", "plans", "eager", "penalty"):
        files += sources(f"{folder}/*.cpp")
    compiled = [
        *linked,
        *(["-O1", "-g1", "-fno-omit-frame-pointer", *sanitized] if sanitized else ["-O3", "-g0"]),
    ]
    if sanitizer() == "thread":
        files += sources("cpu/sanitizer/*.cpp")
        linked.append("-Wl,--wrap=GOMP_parallel")
    return CppExtension(
        "fused_ewclora._C",
        files,
        include_dirs=[str(ROOT / "csrc")],
        depends=[
            *sources("cpu/*.h"),
            *sources("cpu/*.inl"),
            *sources("autograd/*.h"),
            *sources("*.h"),
            *sources("driver/*.h"),
            *sources("plans/*.h"),
            *sources("eager/*.h"),
            *sources("penalty/*.h"),
        ],
        # No -march: files choose instruction sets by pragmas. PyTorch 2.9 would add C++17.
        extra_compile_args=["-std=c++20", "-Wall", "-fvisibility=hidden", *compiled],
        extra_link_args=[*linked, *sanitized],
    )


def cuda_extension(home):
    from torch.utils.cpp_extension import CUDAExtension

    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(home))
    kernels = sources("cuda/*.cu")
    # Cores that files leave idle compile architectures of one file side by side.
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    threads = max(1, min(len(ARCHITECTURES), jobs // max(len(kernels), 1)))
    return CUDAExtension(
        "fused_ewclora._C_cuda",
        [*kernels, *sources("cuda/bindings/*.cpp")],
        include_dirs=[str(ROOT / "csrc" / "cuda")],
        depends=[*sources("cuda/**/*.h"), *sources("cuda/*.cuh"), *sources("autograd/*.h"), *sources("*.h")],
        extra_compile_args={
            "cxx": ["-O2", "-g0", "-Wall", "-fvisibility=hidden"],
            "nvcc": ["-O3", "-lineinfo", f"--threads={threads}", "-Xcompiler=-fvisibility=hidden"],
        },
    )


def refused(mode, which, reason):
    """Says why an extension is not built: where it was asked for, that is an error."""
    if mode != "auto":
        sys.exit(f"FUSED_EWCLORA_BUILD={mode}: the {which} extension cannot be built, {reason}")
    print(f"fused_ewclora: the {which} extension is not built, {reason}.")


def recording(mode, missing=None):
    """The command that copies the package, and writes beside it what was asked for and what kept the CPU
    extension from being built: pip hides what a build prints, but the first use can say it."""
    from setuptools.command.build_py import build_py

    class Recorded(build_py):
        def run(self):
            super().run()
            if not self.editable_mode:
                target = Path(self.build_lib, "fused_ewclora", "backends", "built.json")
                target.write_text(json.dumps({"mode": mode, "missing": missing}))

    return Recorded


def build_options(mode):
    if mode not in MODES:
        sys.exit(f"FUSED_EWCLORA_BUILD: expected one of {', '.join(MODES)}, got '{mode}'")
    if mode == "none":
        return {"cmdclass": {"build_py": recording(mode)}}
    home = toolkit() if mode in ("auto", "cuda") else None
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)  # PyTorch looks for it when it is imported
    if missing := missing_for_cpu():
        refused(mode, "CPU", f"{missing}. The reference backend remains" if mode == "auto" else missing)
        return {"cmdclass": {"build_py": recording(mode, missing)}}
    extensions = [cpu_extension()]
    if mode in ("auto", "cuda"):
        if missing := missing_for_cuda(home):
            refused(mode, "CUDA", missing)
        else:
            extensions.append(cuda_extension(home))
    from torch.utils.cpp_extension import BuildExtension

    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildExtension, "build_py": recording(mode)},
    }


setup(
    # kernels/ and benchmarks/ of the package are links to folders beside it; in archives they are folders.
    # kernels/ has no __init__.py: as a package at the root it would shadow the unrelated package `kernels`.
    packages=[*find_packages(include=["fused_ewclora", "fused_ewclora.*"]), "fused_ewclora.kernels"],
    package_data={
        "fused_ewclora": ["py.typed"],
        "fused_ewclora.backends": ["*.json"],
        "fused_ewclora.backends.triton": ["configs/*.json"],
        "fused_ewclora.kernels": ["py.typed"],
        "fused_ewclora.benchmarks": ["*_schema.json"],
        "fused_ewclora.benchmarks.continual": ["record_schema.json", "configurations/**/*.json"],
    },
    **build_options(os.environ.get("FUSED_EWCLORA_BUILD", "auto")),
)
