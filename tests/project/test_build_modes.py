# SPDX-License-Identifier: Apache-2.0
"""What setup.py would build beside which CUDA toolkit and PyTorch; both are made up."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from interpreters import HAS_COMPILER, ROOT, python

pytestmark = pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler and Python's headers")
# Prints what setup() is given instead of building it.
SHOW = """
import os, setuptools
def setup(ext_modules=(), **_):
    for e in ext_modules:
        print("module", e.name, *e.sources)
        print("flags", e.extra_compile_args)
    print("architectures", os.environ.get("TORCH_CUDA_ARCH_LIST"))
    print("toolkit", os.environ.get("CUDA_HOME"))
setuptools.setup = setup
exec(open("setup.py").read(), {"__file__": os.path.abspath("setup.py")})
"""
CPP_EXTENSION = """
from setuptools import Extension
CppExtension = CUDAExtension = lambda *a, extra_compile_args, **k: (
    setattr(e := Extension(*a, **k), "extra_compile_args", extra_compile_args) or e)
BuildExtension = object
"""
NVCC = """#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.88" ;;
  --list-gpu-arch) printf 'compute_80\\ncompute_86\\ncompute_89\\ncompute_90\\n{more}' ;;
  --dryrun*) echo "#$ _HERE_={bin}" >&2 ;;
esac
"""


def toolkit(folder: Path, release: str = "13.0", more: str = "compute_100\\n") -> Path:
    home = folder / f"cuda-{release}"
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(NVCC.format(release=release, more=more, bin=home / "bin"))
    nvcc.chmod(0o755)
    return home


@pytest.fixture
def pytorch(tmp_path: Path) -> Path:
    """A folder with a PyTorch of CUDA 13.0, as far as setup.py looks at one."""
    package = tmp_path / "site" / "torch"
    (package / "utils").mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '2.11.0'\nclass version: cuda = '13.0'\n")
    (package / "utils" / "__init__.py").touch()
    (package / "utils" / "cpp_extension.py").write_text(CPP_EXTENSION)
    return package.parent


def shown(mode: str, site: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(site), "FUSED_EWCLORA_BUILD": mode, **environment}
    return python("-c", SHOW, cwd=ROOT, check=check, **variables)


def modules(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.split()[1] for line in result.stdout.splitlines() if line.startswith("module ")]


@pytest.mark.parametrize("mode", ["auto", "cuda"])
def test_both_built(mode: str, pytorch, tmp_path):
    """With a toolkit and a CUDA build of PyTorch both extensions are built."""
    home = toolkit(tmp_path)
    result = shown(mode, pytorch, CUDA_HOME=str(home))
    assert modules(result) == ["fused_ewclora._C", "fused_ewclora._C_cuda"]
    sources = result.stdout.split("module fused_ewclora._C_cuda")[1].splitlines()[0].split()
    expected = [*(ROOT / "csrc/cuda").glob("*.cu"), *(ROOT / "csrc/cuda/bindings").glob("*.cpp")]
    assert sorted(sources) == sorted(str(path.relative_to(ROOT)) for path in expected)
    assert "architectures 8.0;8.6;8.9;9.0;10.0+PTX" in result.stdout
    assert "'-O3', '-lineinfo'" in result.stdout


def test_unknown_architecture(pytorch, tmp_path):
    """An architecture that `nvcc` does not know is left out."""
    result = shown("cuda", pytorch, CUDA_HOME=str(toolkit(tmp_path, more="")))
    assert "architectures 8.0;8.6;8.9;9.0+PTX" in result.stdout


def test_environment(pytorch, tmp_path):
    """Architectures and jobs of the environment are respected."""
    home = str(toolkit(tmp_path))
    result = shown("cuda", pytorch, CUDA_HOME=home, TORCH_CUDA_ARCH_LIST="9.0", MAX_JOBS="1")
    assert "architectures 9.0\n" in result.stdout and "--threads=1" in result.stdout
    assert "--threads=5" in shown("cuda", pytorch, CUDA_HOME=home, MAX_JOBS="99").stdout


def test_nvcc_script(pytorch, tmp_path):
    """A script called `nvcc` leads to the toolkit that it calls."""
    home = toolkit(tmp_path)
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    (scripts / "nvcc").write_text(f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    (scripts / "nvcc").chmod(0o755)
    assert shutil.which("nvcc", path=str(scripts))
    result = shown("cuda", pytorch, PATH=f"{scripts}:/usr/bin:/bin")
    assert f"toolkit {home}\n" in result.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"CUDA_HOME": "/nonexistent"}, "no CUDA toolkit: /nonexistent/bin/nvcc was not found"),
        ({"cuda": None}, "PyTorch 2.11.0 is not a CUDA build"),
        ({"release": "12.4"}, "cuda-12.4 is of CUDA 12, PyTorch 2.11.0 of CUDA 13.0"),
    ],
)
def test_missing_named(change: dict[str, str | None], message: str, pytorch, tmp_path):
    """What is missing for CUDA is named."""
    if "cuda" in change:
        init = pytorch / "torch" / "__init__.py"
        init.write_text(init.read_text().replace("'13.0'", "None"))
    home = toolkit(tmp_path, change.get("release") or "13.0")
    environment = {"CUDA_HOME": change.get("CUDA_HOME") or str(home)}
    result = shown("cuda", pytorch, check=False, **environment)
    assert result.returncode == 1 and "FUSED_EWCLORA_BUILD=cuda: the CUDA extension" in result.stderr
    assert message in result.stderr
    result = shown("auto", pytorch, **environment)
    assert message in result.stdout and modules(result) == ["fused_ewclora._C"]
