# SPDX-License-Identifier: Apache-2.0
"""The steps of the GPU check that build the CUDA extension and run it under a sanitizer, with fake tools."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nvcc
import pytest
import torch

import fused_ewclora as fe
from benchmarks import gpu_check, steps
from benchmarks.gpu import build, sanitize, side_by_side, small_calls

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, log: Path, name: str = "a step") -> steps.Outcome:
    one = steps.Step(name, [sys.executable, "-c", code], 30.0, log)
    return steps.run(one, steps.Deadline(60.0), ROOT)


def planned(*more: str) -> dict[str, steps.Step]:
    args = gpu_check.arguments(["--out", "/nonexistent/out", *more])
    return {one.name: one for one in gpu_check.plan(args, Path("/nonexistent/work"))}


# Plan and outcomes


def test_step_order():
    """Steps come in order of value and fit within ten minutes."""
    plan = planned()
    assert tuple(plan) == gpu_check.NAMES
    assert list(plan)[:6] == ["environment", "kernels", "calls", "build", "cuda calls", "graphs"]
    assert plan["calls"].limit <= 60.0
    # Limits are for what goes wrong; a minute more than the budget would be cut by the deadline.
    assert sum(one.limit for name, one in plan.items() if name != "all tests") < 1.4 * gpu_check.BUDGET
    assert gpu_check.BUDGET <= 540.0


def test_limits_grow():
    """Limits grow where steps would leave time unused."""
    one, *later = planned("--steps", "lora_linear", "merge", "all tests").values()
    assert [step.name for step in later] == ["merge", "all tests"]
    grown = gpu_check.stretched(one, later, 600.0)
    assert grown.limit == pytest.approx(600.0 * one.limit / (one.limit + later[0].limit))
    assert gpu_check.stretched(one, later, 10.0).limit == one.limit  # the deadline cuts it
    assert gpu_check.stretched(later[1], [], 900.0).limit == pytest.approx(900.0)


def test_unknown_step_refused():
    """Only known steps can be asked for."""
    assert list(planned("--steps", "all tests")) == ["all tests"]
    with pytest.raises(SystemExit):
        planned("--steps", "lora-linear")


def test_gpu_tests_first():
    """Only tests that need a GPU come first."""
    first, others = gpu_check.test_files()
    assert {"backends/cuda/test_fisher.py", "ops/test_lora_linear.py", "backends/test_gpu.py"} <= set(first)
    assert all((ROOT / "tests" / name).is_file() for name in (*first, *others))
    everything = planned()["all tests"].command
    for name in (
        "benchmarks/test_gpu_check_steps.py",
        "benchmarks/test_gpu.py",
        "backends/test_choose.py",
        "integrations/test_peft.py",
    ):
        assert name not in first and f"tests/{name}" not in everything
    host = "backends/cuda/test_build.py"
    assert host not in (*first, *others) and f"tests/{host}" in everything


def test_unrunnable_step_skipped(tmp_path: Path):
    """A step that cannot run here is skipped with its reason."""
    code = "print('much'); print('nvcc was not found'); raise SystemExit(77)"
    outcome = run(code, tmp_path / "log", "build")
    assert (outcome.status, outcome.detail) == (steps.SKIPPED, "nvcc was not found")
    args = gpu_check.arguments(["--out", str(tmp_path / "out"), "--rehearse"])
    text, status = gpu_check.report(args, [outcome])
    assert status == 0 and "nvcc was not found" in text


def test_tests_without_pytest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tests that cannot run are skipped; the small calls need no library of theirs."""
    monkeypatch.setattr(gpu_check, "REQUIRED", ("pytest", "a_module_that_nobody_has"))
    plan = planned()
    assert tuple(plan) == gpu_check.NAMES
    for name in ("tests", "all tests"):
        one = steps.Step(name, plan[name].command, 30.0, tmp_path / "log")
        outcome = steps.run(one, steps.Deadline(60.0), ROOT)
        assert outcome.status == steps.SKIPPED and outcome.detail == "not installed: a_module_that_nobody_has"


def test_step_says_results(tmp_path: Path):
    """The last lines of a step that says results stand in the summary."""
    for says, detail, notes in ((0, "", ()), (1, "b", ()), (2, "", ("a", "b"))):
        one = steps.Step("x", [sys.executable, "-c", "print('a\\nb')"], 30.0, tmp_path / "log", says=says)
        outcome = steps.run(one, steps.Deadline(60.0), ROOT)
        assert (outcome.status, outcome.detail, outcome.notes) == (steps.OK, detail, notes)


def test_kernels_folder(monkeypatch: pytest.MonkeyPatch):
    """Every step finds the kernels that an earlier one has compiled; a rehearsal compiles none."""
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    folders = {one.environment["TRITON_CACHE_DIR"] for one in planned().values()}
    assert folders == {str(ROOT / "build" / "gpu-kernels")}
    assert str(ROOT / "build" / "gpu-cache") in planned()["kernels"].command
    assert all("TRITON_CACHE_DIR" not in one.environment for one in planned("--rehearse").values())


# Build


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout whose setup.py is to be written, in which the package is this one."""
    (tmp_path / "fused_ewclora").symlink_to(ROOT / "fused_ewclora")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MAX_JOBS", raising=False)
    return tmp_path


def test_setup_architecture(fake: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """The setup script is run for the architecture of this GPU."""
    lines = ["import os, sys", "print(sys.argv[1:])"]
    names = ("FUSED_EWCLORA_BUILD", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")
    lines += [f"print({name!r}, os.environ[{name!r}])" for name in names]
    (fake / "setup.py").write_text("\n".join(lines))
    monkeypatch.setattr(build, "LOADS", "print('loaded')")
    assert build.build(fake, (9, 0)) == 0
    told = capfd.readouterr().out
    assert "['build_ext', '--inplace']" in told and "FUSED_EWCLORA_BUILD cuda" in told and "loaded" in told
    assert "TORCH_CUDA_ARCH_LIST 9.0" in told
    assert f"MAX_JOBS {len(os.sched_getaffinity(0))}" in told


def test_setup_missing_skipped(fake: Path, capfd):
    """What the setup script misses is a reason to skip."""
    said = "FUSED_EWCLORA_BUILD=cuda: the CUDA extension cannot be built, no CUDA toolkit: nvcc was not found"
    (fake / "setup.py").write_text(f"import sys; sys.exit({said!r})")
    assert build.build(fake, (9, 0)) == steps.SKIP
    assert capfd.readouterr().out.splitlines()[-1] == "no CUDA toolkit: nvcc was not found"


def test_setup_missing_message(capfd):
    """On a machine whose PyTorch is no CUDA build; the sentence must be the one that is looked for."""
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch is a CUDA build: it would be built for")
    code = build.build(ROOT, (9, 0))
    told = capfd.readouterr().out.splitlines()[-1]
    assert code == steps.SKIP and ("not a CUDA build" in told or "no CUDA toolkit" in told)


def test_compile_error_summary(fake: Path, tmp_path: Path):
    """A compilation that fails shows its first error in the summary."""
    compiler = [
        "ok.cu",
        "a.cu(12): error: identifier x is undefined",
        "  x = 1;",
        *["more"] * 40,
        "ninja: stopped",
    ]
    (fake / "setup.py").write_text(f"print({chr(10).join(compiler)!r}); raise SystemExit(1)")
    code = "import pathlib, sys; from benchmarks.gpu import build; "
    code += f"raise SystemExit(build.build(pathlib.Path({str(fake)!r}), (9, 0)))"
    outcome = run(code, tmp_path / "log", "build")
    assert outcome.status == steps.FAILED
    assert any("a.cu(12): error" in note for note in outcome.notes)
    args = gpu_check.arguments(["--out", str(tmp_path / "out"), "--rehearse"])
    text, status = gpu_check.report(args, [outcome])
    assert status == 1 and "a.cu(12): error: identifier x" in text


def test_extension_load_failure(fake: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """An extension that does not load is a failure."""
    (fake / "setup.py").write_text("")
    monkeypatch.setattr(build, "LOADS", "raise ImportError('undefined symbol: launch')")
    assert build.build(fake, (9, 0)) == 1
    assert "undefined symbol: launch" in capfd.readouterr().out.partition("the first error:")[2]


def test_no_gpu_no_build(monkeypatch: pytest.MonkeyPatch, capsys):
    """Nothing is built without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, said in (
        ([], "no CUDA device to build for"),
        (["--rehearse"], "a rehearsal builds nothing"),
    ):
        monkeypatch.setattr(sys, "argv", ["build", *options])
        assert build.main() == steps.SKIP
        assert capsys.readouterr().out.splitlines() == [said]


def test_without_ninja(fake: Path):
    """Without ninja, files are compiled side by side."""
    setup = "from setuptools import Extension, setup\n"
    setup += "setup(name='x', ext_modules=[Extension('xx', ['a.c', 'b.c'])])"
    (fake / "setup.py").write_text(setup)
    (fake / "a.c").write_text(
        "#include <Python.h>\nint seven(void);\n"
        'static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "xx", 0, -1, 0};\n'
        "PyMODINIT_FUNC PyInit_xx(void) {\n"
        '  PyObject* m = PyModule_Create(&module); PyModule_AddIntConstant(m, "n", seven()); return m; }\n'
    )
    assert build.command(ninja=True) == [sys.executable, "setup.py", "build_ext", "--inplace"]
    for body, code in (("return x;", 1), ("return 7;", 0)):
        (fake / "b.c").write_text(f"int seven(void) {{ {body} }}\n")
        ran = subprocess.run(build.command(ninja=False), cwd=fake, capture_output=True, text=True)
        assert ran.returncode == code, ran.stderr
        if code:
            assert "b.c did not compile" in ran.stderr and "error:" in "".join(
                build.first_error(ran.stderr.splitlines())
            )
    loaded = subprocess.run(
        [sys.executable, "-c", "import xx; print(xx.n)"], cwd=fake, capture_output=True, text=True
    )
    assert loaded.stdout == "7\n"


def test_compiler_jobs_limit(tmp_path: Path):
    """No more compilers run than were asked for."""

    class Compiler:
        def object_filenames(self, sources: list[str], output_dir: str) -> list[str]:
            return [f"{output_dir}/{name}.o" for name in sources]

    marks = tmp_path / "marks"

    def compile_files(self: Compiler, sources: list[str], output_dir: str) -> list[str]:
        with marks.open("a") as file:
            file.write(f"{os.getpid()} {sources[0]}\n")
        return []

    run_all = side_by_side.all_at_once(compile_files, 2, RuntimeError)
    assert run_all(Compiler(), ["a", "b", "c"], "out") == ["out/a.o", "out/b.o", "out/c.o"]
    pids, names = zip(*(line.split() for line in marks.read_text().splitlines()), strict=True)
    assert sorted(names) == ["a", "b", "c"] and len(set(pids)) == 3 and str(os.getpid()) not in pids


# Sanitizer

SLEEP = "[sys.executable, '-c', 'import time; time.sleep(60)']"  # a child, as the tools have one
CONTENT = "print('========= COMPUTE-SANITIZER'); print('========= ERROR SUMMARY: 0 errors')"
FAULT = (
    "print('========= COMPUTE-SANITIZER\\n========= Invalid __global__ read of size 4 bytes\\n"
    "=========     at walk_kernel+0x1d0 in lowrank_walk.cu:99\\n"
    "=========     by thread (1,0,0) in block (0,0,0)\\n"
    "right: merge_, float32\\n========= ERROR SUMMARY: 1 error'); raise SystemExit(86)"
)


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts a compute-sanitizer on PATH that runs some Python, and lets the CUDA backend be there."""

    def install(code: str) -> Path:
        path = tmp_path / "bin" / "compute-sanitizer"
        path.parent.mkdir(exist_ok=True)
        told = "repr([sys.argv, os.environ.get('PYTORCH_NO_CUDA_MEMORY_CACHING')]) + '\\n'"
        log = f"open({str(tmp_path / 'called')!r}, 'a').write({told})"
        path.write_text(f"#!{sys.executable}\nimport os, sys\n{log}\n{code}")
        path.chmod(0o755)
        return tmp_path / "called"

    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sanitize, "available_backends", lambda: {"cuda": None, "triton": "no Triton"})
    return install


def test_memcheck_and_racecheck(tool, capfd):
    """Both tools watch our kernels, and nothing hides in a cache."""
    called = tool(CONTENT)
    assert sanitize.under_all(list(sanitize.TOOLS), 60.0) == 0
    assert "memcheck of cuda, racecheck of cuda: no complaints" in capfd.readouterr().out
    memcheck, racecheck = (eval(line) for line in called.read_text().splitlines())
    assert (memcheck[1], racecheck[1]) == ("1", None)
    for told, _ in (memcheck, racecheck):
        assert told[-5:] == ["-m", "benchmarks.gpu.sanitize", "--calls", "--backends", "cuda"]
        assert "--error-exitcode" in told and "kernel_substring=walk_kernel" in told


def test_every_kernel_is_watched():
    """Memcheck watches every kernel, racecheck those of Triton that it can follow."""
    assert set(sanitize.watched("memcheck", "cuda")) == nvcc.MATRIX | nvcc.OTHERS
    assert sanitize.watched("racecheck", "cuda") == sanitize.watched("memcheck", "cuda")
    assert set(sanitize.watched("racecheck", "triton")) == sanitize.FOLLOWED


def test_both_backends_under_tools(tool, monkeypatch: pytest.MonkeyPatch, capfd):
    """Each tool runs on each backend that is there; a missing one is named."""
    called = tool(CONTENT)
    monkeypatch.setattr(sanitize, "available_backends", lambda: {"cuda": None, "triton": None})
    assert sanitize.under_all(list(sanitize.TOOLS), 60.0) == 0
    told = [eval(line)[0][-1] for line in called.read_text().splitlines()]
    assert told == ["cuda", "triton"] * 2
    monkeypatch.setattr(sanitize, "available_backends", lambda: {"cuda": "not built", "triton": None})
    assert sanitize.under_all(["memcheck"], 60.0) == 0
    told = capfd.readouterr().out
    assert "the cuda backend is not available: not built" in told
    assert told.splitlines()[-1] == "memcheck of triton: no complaints"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (FAULT, ["memcheck of cuda: errors", "Invalid __global__ read", "at walk_kernel", ": 1 error"]),
        ("print('wrong: merge_: error 1'); raise SystemExit(1)", ["exit status 1", "wrong: merge_"]),
        ("print('========= RACECHECK SUMMARY: 3 hazards displayed (0 errors, 3 warnings)')", ["3 hazards"]),
        ("print('right: merge_')", ["memcheck of cuda: exit status 0", "right: merge_"]),
        (f"import subprocess; subprocess.run({SLEEP})", ["memcheck of cuda: no result in"]),
    ],
)  # fmt: skip
def test_tool_last_lines(code: str, said: list[str], tool, capfd):
    """What a tool says is in the last lines."""
    tool(code)
    assert sanitize.under_all(["memcheck"], 9.0 if "sleep" in code else 60.0) == 1
    last = "\n".join(capfd.readouterr().out.splitlines()[-10:])
    assert all(words in last for words in said), last


def test_tools_run_independently(tool, capfd):
    """A complaint from one tool does not keep the other from running."""
    called = tool(f"if 'memcheck' in sys.argv:\n    {FAULT}\n{CONTENT}")
    assert sanitize.under_all(list(sanitize.TOOLS), 60.0) == 1
    assert len(called.read_text().splitlines()) == 2
    told = capfd.readouterr().out
    assert "memcheck of cuda: errors" in told and "racecheck of" not in told.splitlines()[-1]


def test_sanitizer_skipped(monkeypatch: pytest.MonkeyPatch, capfd):
    """The sanitizer is skipped where something is missing."""
    monkeypatch.setattr(
        sanitize, "available_backends", lambda: dict.fromkeys(sanitize.BACKENDS, "was not built")
    )
    assert sanitize.under_all(["memcheck"], 60.0) == steps.SKIP
    assert "was not built" in capfd.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(sanitize, "available_backends", lambda: dict.fromkeys(sanitize.BACKENDS))
    monkeypatch.setattr(sanitize, "sanitizer", lambda: None)
    assert sanitize.under_all(["memcheck"], 60.0) == steps.SKIP
    assert "compute-sanitizer was not found" in capfd.readouterr().out.splitlines()[-1]


# Calls

BACKENDS = [name for name in ("cuda", "reference") if fe.available_backends()[name] is None]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_call_is_right(backend: str, capfd):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert small_calls.run_calls(backend, device) == 0, capfd.readouterr().out
    assert f"{backend}: 0 of" in capfd.readouterr().out


def test_op_dtype_mode_coverage():
    """Calls cover every op, dtype and mode."""
    from fused_ewclora.ops.schemas import SCHEMAS

    names = [call.name for call in small_calls.calls()]
    assert len(set(names)) == len(names)
    for op in SCHEMAS:
        assert any(name.startswith(op.removesuffix("_backward")) for name in names), op
    for word in ("dropout", "slices", "T=1", "cu_seqlens", "batch", "fp16", "medium", "float16"):
        assert any(word in name for name in names), word


@pytest.mark.parametrize("call", list(small_calls.calls()), ids=lambda call: call.name)
def test_noop_call_wrong(call: small_calls.Call):
    """A call that computes nothing is wrong."""

    def nothing(values: small_calls.Values, backend: str) -> list[torch.Tensor]:
        if backend == "reference":
            return call.method(values, backend)
        idle = call.method(values, "reference")
        return [torch.zeros_like(t) for t in idle]

    assert "error" in str(small_calls.wrong(call._replace(method=nothing), "idle", "cpu"))


@pytest.mark.parametrize("op", ["merge_", "soft_threshold_", "fisher_accumulate_"])
def test_unchanged_argument_noticed(op: str, monkeypatch: pytest.MonkeyPatch):
    """An op that leaves its argument unchanged is noticed."""
    real = getattr(small_calls.FE, op)

    def lazy(*args: object, backend: str, **options: object) -> object:
        return real(*args, backend=backend, **options) if backend == "reference" else None

    monkeypatch.setattr(small_calls.FE, op, lazy)
    found = [call for call in small_calls.calls() if call.name.startswith(op)]
    assert found and all(small_calls.wrong(call, "idle", "cpu") for call in found)
