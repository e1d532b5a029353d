# SPDX-License-Identifier: Apache-2.0
"""What wheels and source distributions contain, how each build mode behaves, and what an import costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from interpreters import HAS_COMPILER, ROOT, python

CONTINUAL = ROOT / "benchmarks" / "continual"
FILES = tuple(
    path.name
    for pattern in (
        "*.md",
        "*.toml",
        "*.txt",
        "*.yml",
        "setup.py",
        "MANIFEST.in",
        "LICENSE",
        "Makefile",
        "CITATION.cff",
    )
    for path in sorted(ROOT.glob(pattern))
)
LINKED = ("kernels/", "benchmarks/")  # from inside the package
FOLDERS = ("fused_ewclora", "kernels", "benchmarks", "csrc", "docs", "tests")
IMPORT_LIMIT = 0.1  # of the time of importing torch
# The smallest extension that compiles: it stands for csrc, which takes minutes.
TINY_EXTENSION = """#include <Python.h>
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&definition); }
"""
# Where the kernels are, and which names beside the package are not parts of it.
LOST = ["fused_ewclora.tests.conftest", "fused_ewclora.fused_ewclora.errors", "fused_ewclora.setup"]
WHERE = f"""
import importlib
import fused_ewclora.kernels
import fused_ewclora.benchmarks.case
print(*fused_ewclora.kernels.__path__)
for name in {LOST}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        print(name)
"""


def kernels_of(folder: Path) -> list[str]:
    """What WHERE should print for a package in `folder`."""
    return [str(folder / "fused_ewclora" / "kernels"), *LOST]


def python_with(site: Path, code: str) -> str:
    """Output of `code` with the packages in `site`, without this environment's links to checkouts."""
    paths = f"site.addsitedir({str(site)!r}); sys.path.append({sysconfig.get_path('purelib')!r})"
    start = f"import site, sys; {paths}\n"
    return python("-S", "-W", "ignore", "-c", start + code, cwd=site).stdout


def copy_of_sources(folder: Path) -> Path:
    """The checkout without what was built in it, its links as links."""
    skip = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=skip, symlinks=True)
    for name in FILES:
        shutil.copy(ROOT / name, folder / name)
    return folder


def wheel(source: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    return python("setup.py", "bdist_wheel", "--dist-dir", "dist", cwd=source, check=check, **environment)


def pip_install(*arguments: str | Path, cwd: Path) -> None:
    options = ("--quiet", "--no-build-isolation", "--no-deps", "--no-index")
    python("-m", "pip", "install", *options, *arguments, cwd=cwd, FUSED_EWCLORA_BUILD="none")


def names(archive: Path) -> list[str]:
    if archive.suffix == ".whl":
        return zipfile.ZipFile(archive).namelist()
    with tarfile.open(archive) as tar:
        return [name.partition("/")[2] for name in tar.getnames()]


def only(paths: Sequence[Path]) -> Path:
    assert len(paths) == 1, paths
    return paths[0]


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = copy_of_sources(tmp_path_factory.mktemp("pure"))
    (source / "fused_ewclora" / "_C.cpython-39-stale.so").touch()  # left over from an earlier build in place
    wheel(source, FUSED_EWCLORA_BUILD="none")
    return only(list((source / "dist").glob("*.whl")))


@pytest.fixture(scope="module")
def installed(pure_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    pip_install("--target", target, pure_wheel, cwd=target)
    return target


def test_pure_wheel(pure_wheel: Path):
    """A pure wheel holds the package, the kernels and nothing else."""
    files = names(pure_wheel)
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert {"fused_ewclora/py.typed", "fused_ewclora/kernels/py.typed"} <= set(files)
    tables = ("measured_choice", "predicted_choice")
    assert {f"fused_ewclora/backends/{name}.json" for name in tables} <= set(files)
    assert not [name for name in files if name.endswith((".so", ".cpp", ".h", ".inl", ".cu", ".cuh"))]
    assert {name.split("/")[0].partition("-")[0] for name in files} == {"fused_ewclora"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fused_ewclora").rglob("*.py")}
    assert modules <= set(files)
    linked = [path for name in LINKED for path in (ROOT / name).rglob("*.py")]
    tools = {f"fused_ewclora/{path.relative_to(ROOT)}" for path in linked}
    schemas = {f"fused_ewclora/benchmarks/{name}_schema.json" for name in ("record", "large_model")}
    assert {*tools, *schemas} <= set(files)
    data = {f"fused_ewclora/{path.relative_to(ROOT)}" for path in CONTINUAL.rglob("*.json")}
    assert {"record_schema.json", "language.json", "vision.json"} <= {Path(name).name for name in data}
    assert data <= set(files)
    assert not [name for name in files if name.endswith(".jsonl")]
    assert not [name for name in files if name.endswith("kernels/__init__.py")]


@pytest.fixture(scope="module")
def source_distribution(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = copy_of_sources(tmp_path_factory.mktemp("source"))
    python("setup.py", "sdist", "--dist-dir", "dist", cwd=source, FUSED_EWCLORA_BUILD="none")
    return only(list((source / "dist").glob("*.tar.gz")))


def test_sdist_complete(source_distribution: Path):
    """A source distribution holds what builds, tests and pages need; links are folders there."""
    packed = set(names(source_distribution))
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    built = (".so", ".jsonl", ".pyc")  # records of measurements are in the repository alone
    wanted = {str(path.relative_to(ROOT)) for path in files if path.suffix not in built}
    wanted = {f"fused_ewclora/{name}" if name.startswith(LINKED) else name for name in wanted}
    wanted = {name for name in wanted if "/results/" not in name}
    assert not wanted - packed
    assert set(FILES) <= packed
    assert not [name for name in packed if name.startswith(LINKED) or name.endswith(built)]


def test_sdist_runs(source_distribution: Path, tmp_path: Path):
    """A source distribution works where it is unpacked, and the wheel made from it once installed."""
    with tarfile.open(source_distribution) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    source = only(list((tmp_path / "unpacked").iterdir()))
    assert python("-c", WHERE, cwd=source).stdout.split() == kernels_of(source)
    wheel(source, FUSED_EWCLORA_BUILD="none")
    site = tmp_path / "site"
    pip_install("--target", site, only(list((source / "dist").glob("*.whl"))), cwd=tmp_path)
    assert python_with(site, WHERE).split() == kernels_of(site)


def test_installed_pure(installed: Path):
    """Installed without an extension, the package computes on the reference."""
    code = """
import warnings
import torch, fused_ewclora, fused_ewclora.kernels
warnings.simplefilter("error", fused_ewclora.EWCLoRAWarning)  # built so on purpose
from fused_ewclora import functional as FE
assert fused_ewclora.__file__.startswith({site!r}), fused_ewclora.__file__
assert list(fused_ewclora.kernels.__path__)[0].startswith({site!r}), fused_ewclora.kernels.__path__
assert fused_ewclora.available_backends()["cpu"] is not None
x, w, a, b = (torch.randn(*s, dtype=torch.float64) for s in ((3, 5), (4, 5), (2, 5), (4, 2)))
torch.testing.assert_close(FE.lora_linear(x, w, None, a, b, 0.5), x @ (w + 0.5 * b @ a).T)
""".format(site=str(installed))
    python_with(installed, code)


def test_kernels_in_checkout():
    """The kernels import from the checkout, and nothing else of it becomes a part of the package."""
    assert python("-c", WHERE, cwd=ROOT).stdout.split() == kernels_of(ROOT)
    outside = python("-c", "import kernels; print(kernels.__file__)", cwd=ROOT).stdout.strip()
    assert outside == "None", "a regular package here would shadow the unrelated package `kernels`"


def test_kernels_in_editable_install(tmp_path: Path):
    """An editable install imports the kernels of its checkout, and nothing else as a part of the package."""
    source = copy_of_sources(tmp_path / "source")
    site = tmp_path / "site"
    pip_install("--target", site, "--editable", source, cwd=tmp_path)
    assert python_with(site, WHERE).split() == kernels_of(source)


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler and Python's headers")
def test_compiled_wheel(tmp_path: Path):
    """Compiled wheel holds the extension beside the package."""
    source = copy_of_sources(tmp_path)
    shutil.rmtree(source / "csrc")
    (source / "csrc" / "cpu").mkdir(parents=True)
    (source / "csrc" / "cpu" / "tiny.cpp").write_text(TINY_EXTENSION)
    wheel(source, FUSED_EWCLORA_BUILD="cpu")
    built = only(list((source / "dist").glob("*.whl")))
    assert "none-any" not in built.name
    assert f"fused_ewclora/_C{sysconfig.get_config_var('EXT_SUFFIX')}" in names(built)


def test_auto_without_compiler(tmp_path: Path):
    """Mode "auto" without a compiler says so and builds pure Python."""
    source = copy_of_sources(tmp_path)
    result = wheel(source, CC="/nonexistent", CXX="/nonexistent")
    assert "no C++ compiler: '/nonexistent' was not found" in result.stdout
    built = only(list((source / "dist").glob("*.whl")))
    assert built.name.endswith("-py3-none-any.whl")
    site = tmp_path / "site"
    pip_install("--target", site, built, cwd=tmp_path)
    # pip hides what a build prints: the first use says it, once, and so do the reasons of backends.
    code = """
import warnings, torch, fused_ewclora as fe
from fused_ewclora import functional as FE
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(2):
        FE.lora_linear(*(torch.ones(2, 2) for _ in range(2)), None, torch.ones(1, 2), torch.ones(2, 1))
print([str(one.message) for one in told if "without kernels" in str(one.message)])
print(fe.available_backends()["cpu"])
"""
    warned, reason = python_with(site, code).splitlines()
    assert warned.count("built without kernels for the CPU: no C++ compiler") == 1
    assert "--no-build-isolation" in warned and "no C++ compiler" in reason


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("cpu", "=cpu: the CPU extension cannot be built, no C++ compiler: '/nonexistent'"),
        ("cuda", "=cuda: the CPU extension cannot be built, no C++ compiler: '/nonexistent'"),
        ("abacus", ": expected one of auto, none, cpu, cuda, got 'abacus'"),
    ],
)
def test_mode_cannot_build(mode: str, message: str):
    """A mode that cannot be built stops with the reason."""
    environment = {"CXX": "/nonexistent", "FUSED_EWCLORA_BUILD": mode}
    result = python("setup.py", "--version", cwd=ROOT, check=False, **environment)
    assert result.returncode == 1
    assert f"FUSED_EWCLORA_BUILD{message}" in result.stderr


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler and Python's headers")
def test_old_setuptools(tmp_path: Path):
    """Setuptools that cannot read the metadata is named."""
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\nfind_packages = setup = None\n")
    result = python(ROOT / "setup.py", "--version", cwd=ROOT, check=False, PYTHONPATH=str(tmp_path))
    assert result.returncode and "expected version 77 or newer, got 65.5.0" in result.stderr
    assert "setuptools>=77" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.skipif(os.environ.get("FUSED_EWCLORA_BUILD") == "none", reason="built without it on purpose")
def test_extension_loads():
    """The extension loads where it could be built."""
    code = "import fused_ewclora; print(fused_ewclora.available_backends()['cpu'])"
    assert python("-c", code, cwd=ROOT).stdout.strip() == "None"


def test_import_time():
    """Importing the package adds little to importing torch."""
    # Beside torch in one process, and the least of several: all else measures what the machine does.
    code = """
import time
start = time.process_time()
import torch
middle = time.process_time()
import fused_ewclora
print((time.process_time() - middle) / (middle - start))
"""
    shares: list[float] = []
    while not shares or (min(shares) > IMPORT_LIMIT and len(shares) < 5):
        shares.append(float(python("-c", code, cwd=ROOT).stdout))
    assert min(shares) <= IMPORT_LIMIT, shares


def test_import_is_light():
    """Importing the package loads neither extras nor compilers."""
    heavy = ("sklearn", "matplotlib", "scipy", "triton", "timm", "transformers", "peft", "fused_ewclora.demo")
    code = f"import torch, sys; before = set(sys.modules); import fused_ewclora; print([m for m in {heavy} "
    code += "if m in set(sys.modules) - before])"
    assert python("-c", code, cwd=ROOT).stdout.strip() == "[]"
