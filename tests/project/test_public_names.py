# SPDX-License-Identifier: Apache-2.0
"""Module paths and public names of earlier versions stay importable, and their pickles loadable."""

from __future__ import annotations

import ast
import importlib
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import adapted, data

import fused_ewclora as fe
from fused_ewclora import _moved
from fused_ewclora.ewc.controller import EWC

ROOT = Path(__file__).resolve().parents[2]

# Every module path, and the names that users of the module import from it.
NAMES = {
    "fused_ewclora": """
        AdaptedLinear ArgumentError BackendError CheckpointError DtypeError EWC EWCLoRAError EWCLoRAWarning
        EightBitFisher FactoredFisher FisherError IntegrationError KroneckerFisher LayoutError LoRAConfig
        LoRAConv1d LoRAConv2d LoRALinear LoRAPart NotExactlyRepresentable Part QKVLayout Report Structure
        TargetError adapters available_backends check_bypass
        convert_lambda disabled eject explain export_peft forget_tables import_peft inject integrations
        load_pretrained memory merge register_call register_layout register_parts
        reset_optimizer_state_ save_pretrained
        unmerge use_backend verify_forward
    """,
    "fused_ewclora.adapted": "AdaptedLinear Composer Location",
    "fused_ewclora.backends": "",
    "fused_ewclora.backends.candidate": "",
    "fused_ewclora.backends.cuda": "",
    "fused_ewclora.backends.measured_choice": "",
    "fused_ewclora.backends.native": "",
    "fused_ewclora.backends.reference": "",
    "fused_ewclora.backends.triton": "",
    "fused_ewclora.backends.triton.aot": """
        Resources Specialisation build count cuobjdump parse_amdgcn parse_usage specialise target
    """,
    "fused_ewclora.backends.triton.autotune": """
        Config Run Timer Trial Tuned keys measure neighbours preferred runs search time_on_gpu tune
    """,
    "fused_ewclora.backends.triton.ewc_penalty": "",
    "fused_ewclora.backends.triton.fisher_accumulate": "",
    "fused_ewclora.backends.triton.launch": "",
    "fused_ewclora.backends.triton.lora_linear": "",
    "fused_ewclora.backends.triton.lowrank": "",
    "fused_ewclora.backends.triton.measured": "",
    "fused_ewclora.backends.triton.merge": "",
    "fused_ewclora.backends.triton.occupancy": "Limits Occupancy occupancy",
    "fused_ewclora.backends.triton.regimes": "Rates impossible modelled padded slower",
    "fused_ewclora.backends.triton.tables": "",
    "fused_ewclora.backends.triton.workloads": "Make Sizes Workload noted workloads",
    "fused_ewclora.check": "Measured render run",
    "fused_ewclora.checkpoint": """
        Updates changed_rows check_layers describe is_changed load_pretrained pack parsed_ewc row_updates
        save_pretrained trained_tensors unpack
    """,
    "fused_ewclora.compile_report": """
        Noted Survey collect described missing problems render show_progress survey unexercised
    """,
    "fused_ewclora.config": """
        ALL_LINEAR LoRAConfig QKVLayout Rows Targets finite matches positive probability segment_names
    """,
    "fused_ewclora.demo": "",
    "fused_ewclora.demo.cost": "",
    "fused_ewclora.demo.data": "",
    "fused_ewclora.demo.formats": "",
    "fused_ewclora.demo.job": "",
    "fused_ewclora.demo.plot": "",
    "fused_ewclora.demo.protocol": "",
    "fused_ewclora.demo.report": "",
    "fused_ewclora.demo.scenario": "",
    "fused_ewclora.demo.vit": "",
    "fused_ewclora.distributed": "reduced",
    "fused_ewclora.errors": """
        ArgumentError BackendError CheckpointError DtypeError EWCLoRAError FisherError IntegrationError
        LayoutError NotExactlyRepresentable TargetError
    """,
    "fused_ewclora.ewc": "EWC",
    "fused_ewclora.explain": "bypassed check_bypass explain verify_forward",
    "fused_ewclora.fisher": """
        Batch Forward LabelPolicy LossFunction batch_size_of check_labels check_loss check_max_batches
        default_forward default_logits default_loss evaluation_mode exact_terms gradients_untouched
        leading_size limited negative_log_likelihood sample_labels to_device unwrapped
    """,
    "fused_ewclora.functional": """
        Adapter Geometry ewc_penalty ewc_penalty_grad_ fisher_accumulate_ l1_penalty lora_conv_adapters
        lora_linear lora_linear_adapters
        lora_linear_slices merge_ soft_threshold_
    """,
    "fused_ewclora.info": "collect render",
    "fused_ewclora.inject": "adapters check_mergeable disabled eject inject merge unmerge",
    "fused_ewclora.integrations": "",
    "fused_ewclora.integrations.avalanche": "EWCLoRAPlugin TRANSFORMS",
    "fused_ewclora.integrations.open_clip": "CallingAttentionPool2d PROJECTIONS bypass_settings",
    "fused_ewclora.integrations.peft": "accelerate_ attach_ewc restore_",
    "fused_ewclora.integrations.timm": "Unpack layout_of targets",
    "fused_ewclora.integrations.torchvision": "layout_of targets",
    "fused_ewclora.integrations.transformers": "EWCCallback LoRAConv1D LoRAFalconLinear next_tokens targets",
    "fused_ewclora.interchange": "Planned export_peft import_peft",
    "fused_ewclora.layers": "AdapterSlice LoRALinear fingerprint fisher_key",
    "fused_ewclora.matching": """
        HeadRule LayoutRule Match Plan ancestors is_linear known_layout load_libraries plan
        register_adapted_class register_heads register_layout register_library shorten
    """,
    "fused_ewclora.methods": """
        CLLoRA CoDyRA EWCLoRA FactorEWC IEL ITA InfLoRA KeepLoRA LoRA Method NLoRA OLoRA PerturbAndMerge
        SDLoRA
    """,
    "fused_ewclora.methods.cl_lora": "CLLoRA VARIANTS",
    "fused_ewclora.methods.codyra": "CoDyRA GATE_INITS SCHEDULES STAIRS THRESHOLDS dead_zone_",
    "fused_ewclora.methods.ewc_lora": "EWCLoRA",
    "fused_ewclora.methods.factor_ewc": "FactorEWC",
    "fused_ewclora.methods.iel": "IEL",
    "fused_ewclora.methods.inflora": "InfLoRA",
    "fused_ewclora.methods.ita": "ITA",
    "fused_ewclora.methods.keep_lora": "KeepLoRA",
    "fused_ewclora.methods.lora": "LoRA",
    "fused_ewclora.methods.method": "Loader Loss Method",
    "fused_ewclora.methods.n_lora": "NLoRA VARIANTS",
    "fused_ewclora.methods.o_lora": "OLoRA VARIANTS",
    "fused_ewclora.methods.perturb_and_merge": "PerturbAndMerge",
    "fused_ewclora.methods.sd_lora": "Ranks SDLoRA",
    "fused_ewclora.metrics": "AVERAGES ContinualMetrics PROTOCOLS TransferMetrics",
    "fused_ewclora.ops": "",
    "fused_ewclora.ops.capture": "",
    "fused_ewclora.ops.ewc_penalty": "",
    "fused_ewclora.ops.lora_linear": "",
    "fused_ewclora.optimizers": "reset_optimizer_state_",
    "fused_ewclora.profiling": "disable enable",
    "fused_ewclora.reference": "",
    "fused_ewclora.reference.ewc_penalty": "",
    "fused_ewclora.reference.fisher_accumulate": "",
    "fused_ewclora.reference.lora_linear": "",
    "fused_ewclora.reference.merge": "",
    "fused_ewclora.reference.philox": "",
    "fused_ewclora.report": "Report",
    "fused_ewclora.slices": "AdapterSlice fingerprint fisher_key plan_slices",
    "fused_ewclora.structures": """
        CovarianceSums Dense DenseSums EightBit Extent Factored Fisher Kronecker MarginalSums Parts Structure
        Sums Term Uniform Weights
    """,
    "fused_ewclora.tuning": "missing render run",
}

# The paths under which classes and functions are found in pickled models and controllers.
PICKLED = {
    "fused_ewclora.layers": ("LoRALinear",),
    "fused_ewclora.slices": ("AdapterSlice",),
    "fused_ewclora.ewc": ("EWC",),
}

# Modules that import an optional library; their names are read from their sources.
OPTIONAL = {
    "fused_ewclora.integrations.avalanche",
    "fused_ewclora.integrations.peft",
    "fused_ewclora.integrations.torchvision",
    "fused_ewclora.integrations.transformers",
}


def top_level(path: Path) -> set[str]:
    """The names that a module defines or imports at its top level."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


FUNCTIONS = "assert type(fe.inject) is type(fe.explain) is type(lambda: 0)"
AS_FUNCTIONS = [
    "\n".join((*lines, "import fused_ewclora as fe", FUNCTIONS))
    for lines in (
        ("import fused_ewclora.inject", "import fused_ewclora.explain", "import fused_ewclora as fe"),
        ("from fused_ewclora import explain, inject", "assert callable(inject) and callable(explain)"),
        ("from fused_ewclora.inject import adapters", "from fused_ewclora.explain import check_bypass"),
        ("import fused_ewclora.layers.inject", "import fused_ewclora.diagnostics.explain"),
        ("import fused_ewclora as fe", FUNCTIONS, "import fused_ewclora.inject, fused_ewclora.explain"),
        ("import fused_ewclora.checkpoint, fused_ewclora.info, fused_ewclora.fisher, fused_ewclora.check",),
        (
            "import importlib, fused_ewclora",
            "importlib.import_module('fused_ewclora.inject').adapters",
            "importlib.import_module('fused_ewclora.explain').bypassed",
        ),
    )
]
AS_MODULES = """
import sys, fused_ewclora.inject, fused_ewclora.explain
from fused_ewclora.layers import inject
from fused_ewclora.diagnostics import explain
assert sys.modules['fused_ewclora.inject'] is inject
assert sys.modules['fused_ewclora.explain'] is explain
"""
OLD_PATHS = "\n".join(
    f"import fused_ewclora.{old}"
    for old, new in sorted(_moved.MOVED.items())
    if not old.startswith("backends") and "tools" not in new
)
PROGRAMS = [*AS_FUNCTIONS, AS_MODULES, OLD_PATHS]
# Runs programs, each in a process of its own that has PyTorch and nothing of this package, and prints their
# exit statuses.
FORKS = """
import json, os, sys, traceback
import torch
statuses = []
for code in json.load(sys.stdin):
    if not (child := os.fork()):
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            print(code, file=sys.stderr)
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    statuses.append(os.waitpid(child, 0)[1])
json.dump(statuses, sys.stdout)
"""


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """Programs that failed, with what they wrote; a warning about a module of the package is an error."""
    options = ["-W", "error::DeprecationWarning", "-W", "error::ImportWarning"]
    done = subprocess.run(
        [sys.executable, *options, "-c", FORKS], cwd=ROOT, input=json.dumps(PROGRAMS), text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    statuses = json.loads(done.stdout)
    return {code: done.stderr for code, status in zip(PROGRAMS, statuses, strict=True) if status}


@pytest.mark.parametrize("path", NAMES)
def test_names_are_importable(path: str):
    names = set(NAMES[path].split())
    if path in OPTIONAL:
        source = ROOT / Path(*path.split(".")).with_suffix(".py")
        assert names <= top_level(source), names - top_level(source)
        return
    if path.startswith("fused_ewclora.backends.triton"):
        pytest.importorskip("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = importlib.import_module(path)
    missing = {name for name in names if not hasattr(module, name)}
    assert not missing


def test_names_in_all():
    """The public names of the package are in all."""
    assert set(NAMES["fused_ewclora"].split()) <= set(fe.__all__)


@pytest.mark.parametrize("old", sorted(_moved.MOVED))
def test_old_paths_same_module(old: str):
    """An old path is the module of the new path."""
    if "triton" in _moved.MOVED[old]:
        pytest.importorskip("triton")
    module = importlib.import_module(f"fused_ewclora.{old}")
    assert module is importlib.import_module(f"fused_ewclora.{_moved.MOVED[old]}")


@pytest.mark.parametrize("code", AS_FUNCTIONS, ids=lambda code: code.splitlines()[0])
def test_functions_not_hidden(code: str, failures: dict[str, str]):
    """Inject and explain are functions whatever is imported."""
    assert code not in failures, failures[code]


def test_modules_named_like_functions(failures: dict[str, str]):
    """Modules named like functions are found by their paths."""
    assert AS_MODULES not in failures, failures[AS_MODULES]


def test_old_paths_silent(failures: dict[str, str]):
    """Old paths of a fresh program warn about nothing."""
    assert OLD_PATHS not in failures, failures[OLD_PATHS]


def test_old_pickles(monkeypatch: pytest.MonkeyPatch):
    """Pickles name classes by module, and those of earlier versions name the old modules."""
    model = adapted()
    ewc = EWC(model, merge_mode="factors", fisher_dtype=torch.float64)
    ewc.end_task([data(4)], F.cross_entropy)
    ewc.estimate_fisher([data(4, seed=1)], F.cross_entropy)
    with monkeypatch.context() as old:
        for path, names in PICKLED.items():
            for name in names:
                old.setattr(getattr(importlib.import_module(path), name), "__module__", path)
        content = pickle.dumps((model, ewc))
    for path, names in PICKLED.items():
        for name in (path, *names):
            assert name.encode() in content
    for path in ("layers.linear", "layers.slices", "ewc.controller"):
        assert f"fused_ewclora.{path}".encode() not in content
    loaded, controller = pickle.loads(content)
    assert type(loaded.fc) is fe.LoRALinear and type(controller) is fe.EWC
    x = data(4)[0]
    assert torch.equal(loaded(x), model(x))
    for key, fisher in ewc.fishers.items():
        assert torch.equal(controller.fishers[key], fisher)
    for controlled in (ewc, controller):
        controlled.consolidate()
    assert controller.history == ewc.history and controller.tasks == 2
