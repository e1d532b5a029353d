# SPDX-License-Identifier: Apache-2.0
"""What is particular to bitsandbytes: calls that change their layer, and weights that cannot be adapted."""

from __future__ import annotations

import copy

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from quantised_models import D_IN, HIDDEN, MLP, TARGETS, adapted, batch, model_of, trained
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import fused_ewclora as fe
from fused_ewclora.integrations.bitsandbytes import LoRALinear4bit, LoRALinear8bitLt, SteadyLinear4bit

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def four(d_in: int, d_out: int, bias: bool = True) -> nn.Module:
    return bnb.nn.Linear4bit(d_in, d_out, bias=bias, quant_type="nf4", compute_dtype=torch.bfloat16)


def refused(model: nn.Module, message: str) -> None:
    """Injection raises, and changes nothing."""
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(fe.TargetError, match=message):
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["fc1"]))
    assert [type(module) for module in model.modules()] == kinds


def test_calls_change_nothing():
    """Calls in eval mode neither pack a weight nor cast a bias in place, of layers with and without adapters,
    and gradients flow through both afterwards."""
    model = MLP(four).to("cpu")
    report = fe.inject(model, fe.LoRAConfig(r=4, target_modules=["fc1"], quantised_merge="residual"))
    assert "SteadyLinear4bit" in str(report) and type(model.fc2) is SteadyLinear4bit
    trained(model, 1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    x, y = batch(0)
    with torch.no_grad():
        evaluated = model.eval()(x)
    torch.testing.assert_close(model.train()(x), evaluated)
    F.cross_entropy(model(x), y).backward()
    assert model.fc1.lora_A.grad.any() and model.fc1.bias.dtype == torch.float32
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    fe.eject(model, merge=False)
    assert type(model.fc1) is type(model.fc2) is bnb.nn.Linear4bit


def eight(d_in: int, d_out: int, bias: bool = True) -> nn.Module:
    return bnb.nn.Linear8bitLt(d_in, d_out, bias=bias, has_fp16_weights=False)


@pytest.mark.parametrize("kind", [bnb.nn.LinearNF4, eight])
def test_injected_later(kind):
    """Layers that an earlier injection left without adapters get them in a later one, and eject restores the
    classes of all."""
    model = MLP(kind).to("cpu")
    classes = [type(module) for module in model.modules()]
    for name in TARGETS:
        fe.inject(model, fe.LoRAConfig(r=4, target_modules=[name], quantised_merge="requantise"))
    assert list(fe.adapters(model)) == TARGETS
    trained(model, 1, size=0.5)
    fe.EWC(model, 1.0).end_task([batch(0)], F.cross_entropy)
    fe.eject(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("called", [False, True])
def test_copies_of_8_bits(called):
    """What a merge writes is what a copy's state_dict has, whether it was called before or not."""
    model = copy.deepcopy(adapted("int8", "requantise"))
    if called:
        model(batch(0)[0])
    before = model.state_dict()["fc1.weight"].clone()
    fe.merge(model)
    state = model.state_dict()
    assert torch.equal(state["fc1.weight"], model.fc1.state.CB) and not torch.equal(
        state["fc1.weight"], before
    )
    assert torch.equal(state["fc1.SCB"], model.fc1.state.SCB)


def test_resumed_elsewhere(tmp_path):
    """A model that was evaluated is saved, and loads into one that was not; other scales of a layer without
    adapters are noticed."""

    def make():
        model = MLP(four).to("cpu")
        fe.inject(model, fe.LoRAConfig(r=4, target_modules=["fc1"], quantised_merge="residual"))
        return model

    model = make()
    with torch.no_grad():
        model.eval()(batch(0)[0])
    fe.save_pretrained(tmp_path, model)
    fe.load_pretrained(tmp_path, make())
    other = make()
    other.fc2.weight.quant_state.absmax.mul_(2)
    fe.load_pretrained(tmp_path, other)  # small tensors are part of a checkpoint
    assert torch.equal(other.fc2.weight.quant_state.absmax, model.fc2.weight.quant_state.absmax)


@pytest.mark.parametrize("kind", [bnb.nn.LinearNF4, bnb.nn.LinearFP4])
def test_named_classes(kind):
    """The classes of one type of codes become their own adapted classes."""
    model = MLP(kind).to("cpu")
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=TARGETS, quantised_merge="residual"))
    assert type(model.fc1).__name__ == f"LoRA{kind.__name__}" and isinstance(model.fc1, LoRALinear4bit)
    fe.EWC(model, 1.0).end_task([batch(0)], F.cross_entropy)
    assert {row["weight"] for row in fe.rounding(model).rows} == {
        kind.__name__.removeprefix("Linear").lower()
    }


def test_unfit_weights():
    """Weights that are not quantised (yet, or any more) are refused, with what was expected and what came."""
    refused(MLP(four), r"fc1: its weight is expected to be quantised, and still holds torch.float32 numbers")
    model = MLP(four).to("cpu")
    model.fc1.weight = nn.Parameter(torch.zeros(HIDDEN, D_IN), requires_grad=False)
    refused(
        model, "fc1: its weight is expected to be a quantised Params4bit, and is Parameter of torch.float32"
    )
    refused(
        MLP(bnb.nn.Linear8bitLt).to("cpu"),
        "fc1: it keeps its weight in floating point.*has_fp16_weights=False",
    )
    refused(MLP(eight), r"fc1: its weight is expected to be quantised to int8, and still holds torch.float32")


def test_packed_weights():
    """A weight that bitsandbytes has packed for inference is refused, also when a layer is called."""
    model = MLP(four).to("cpu")
    model.fc1.weight.quant_state.packing_format_for_cpu = True  # as a call in eval mode does on some CPUs
    refused(model, r"fc1: bitsandbytes has packed its weight for inference")
    model.fc1.weight.quant_state.packing_format_for_cpu = False
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["fc1"]))
    model.fc1.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(fe.TargetError, match=r"packed its weight"):
        model(batch(0)[0])


def test_overflow_of_8_bits():
    """bitsandbytes makes int8 from fp16: a sum that fp16 cannot hold is refused, and nothing is changed."""
    model = adapted("int8", "requantise")
    with torch.no_grad():
        model.fc1.lora_B[0] = 1e6
    before = [tensor.clone() for tensor in model.fc1.weight_state().values()]
    with pytest.raises(fe.ArgumentError, match=r"fc1: merge: .*expected finite values"):
        fe.merge(model)
    assert all(map(torch.equal, before, model.fc1.weight_state().values())) and not model.fc1.merged


def test_subclasses_are_refused():
    """A subclass may compute something else, and is left out with a reason."""

    class Other(bnb.nn.Linear4bit):
        pass

    refused(MLP(Other).to("cpu"), r"fc1: Other is a subclass of Linear")


def test_eval_quantises_inputs():
    """Of Linear8bitLt the product in eval mode is the library's own too, which quantises inputs."""
    model, plain = model_of("int8"), model_of("int8").eval()
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=TARGETS))
    x, _ = batch(0)
    assert isinstance(model.fc1, LoRALinear8bitLt)
    assert torch.equal(model.eval()(x), plain(x)) and not torch.equal(model.train()(x), plain(x))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:transformers")
def test_transformers_loads(tmp_path):
    """A model that transformers quantises while it loads it is adapted, trained and consolidated."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).save_pretrained(tmp_path)
    for options, kind in (({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, LoRALinear4bit),
                          ({"load_in_8bit": True}, LoRALinear8bitLt)):  # fmt: skip
        config = BitsAndBytesConfig(**options)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
        config = fe.LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], quantised_merge="residual")
        fe.inject(model, config)
        layer = model.model.layers[0].self_attn.q_proj
        assert type(layer) is kind
        ids = torch.randint(0, 32, (3, 6), generator=torch.Generator().manual_seed(0))
        ewc = fe.EWC(model, 1.0)
        model(input_ids=ids, labels=ids).loss.backward()
        assert layer.lora_B.grad.any()
        trained(model, 1)
        before = model(input_ids=ids).logits
        ewc.end_task([{"input_ids": ids, "labels": ids}])
        torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=0.02)
