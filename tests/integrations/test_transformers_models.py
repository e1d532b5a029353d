# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of transformers beside explicit dense copies of them, in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import fused_ewclora as fe
from fused_ewclora.integrations.transformers import next_tokens

VOCABULARY, TOKENS, SAMPLES = 19, 5, 4
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0,
    "pad_token_id": 0,
}  # fmt: skip
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIT = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}


@dataclass(frozen=True)
class Case:
    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    slices: tuple[str, ...] | None = None
    batch: str = "causal"

    def model(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        torch.manual_seed(0)
        return self.make().to(dtype).eval()

    def adapted(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        model = self.model(dtype)
        config = fe.LoRAConfig(r=2, lora_alpha=3, target_modules=self.targets, slices=self.slices)
        fe.inject(model, config)
        with torch.no_grad():
            for layer in fe.adapters(model).values():
                for _, _, lora_b in layer.adapter_parameters():
                    lora_b.normal_(0, 0.2)
        return model


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            n_layer=1, n_embd=16, n_head=2, vocab_size=VOCABULARY, n_positions=16, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0,
            decoder_start_token_id=0, feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def falcon() -> nn.Module:
    return hf.FalconForCausalLM(
        hf.FalconConfig(
            **TEXT, hidden_dropout=0.0, attention_dropout=0.0, new_decoder_architecture=True, num_kv_heads=1,
            num_ln_in_parallel_attn=2,
        )
    )  # fmt: skip


QKV_BY_HEAD = ("query_key_value",)
CASES = {
    "vit": Case(lambda: hf.ViTForImageClassification(hf.ViTConfig(**{**TEXT, **QUIET, **VIT})),
                ("query", "value", "intermediate.dense", "fc1"), batch="images"),
    "bert": Case(lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, **QUIET, num_labels=3)),
                 ("query", "value", "intermediate.dense"), batch="classes"),
    "t5": Case(t5, ("q", "v", "wi_0", "wo"), batch="seq2seq"),
    "llama": Case(lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=1)),
                  ("q_proj", "v_proj", "down_proj")),
    "gpt2": Case(gpt2, ("c_attn",), ("q", "v")),
    "gpt2-conv1d": Case(gpt2, ("c_attn", "c_proj", "c_fc")),
    "gpt_neox": Case(lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT)), QKV_BY_HEAD, ("q", "v")),
    "phi3": Case(lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**TEXT, num_key_value_heads=1)),
                 ("qkv_proj",), ("k", "v")),
    "phi3-mlp": Case(lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**TEXT)), ("gate_up_proj",), ("up",)),
    "falcon": Case(falcon, QKV_BY_HEAD, ("q", "k")),
}  # fmt: skip
each_model = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def batch_of(case: Case, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Samples with equally many labels, so that the mean over tokens is one over samples."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (SAMPLES, TOKENS), generator=generator)
    classes = torch.randint(0, 3, (SAMPLES,), generator=generator)
    if case.batch == "images":
        pixels = torch.randn(SAMPLES, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
        return {"pixel_values": pixels, "labels": classes}
    return {"input_ids": ids, "labels": classes if case.batch == "classes" else ids}


def sample_of(batch: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {key: value[index : index + 1] for key, value in batch.items()}


def dense(case: Case, adapted: nn.Module) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The plain model with weights W + s B A on the rows of each adapter, and these weights by layer name."""
    plain, weights = case.model(), {}
    for name, layer in fe.adapters(adapted).items():
        weight = plain.get_submodule(name).weight
        view = weight.detach().t() if layer.transposed else weight.detach()
        for piece, lora_a, lora_b in layer.adapter_parameters():
            view[rows_of(piece)] += piece.scaling * (lora_b @ lora_a).detach()
        weights[name] = weight
    return plain, weights


def rows_of(piece: Any) -> list[int]:
    return [row for start, stop in piece.rows for row in range(start, stop)]


def dense_gradients(
    case: Case, adapted: nn.Module, loss: Tensor, weights: dict[str, nn.Parameter]
) -> Iterator[Any]:
    """(Fisher key, slice, lora_A, lora_B, gradient of the rows of W + s B A) per adapter."""
    gradients = torch.autograd.grad(loss, list(weights.values()))
    for (name, layer), gradient in zip(fe.adapters(adapted).items(), gradients, strict=True):
        gradient = gradient.t() if layer.transposed else gradient
        for piece, lora_a, lora_b in layer.adapter_parameters():
            key = f"{name}.{piece.name}" if piece.name else name
            yield key, piece, lora_a, lora_b, gradient[rows_of(piece)]


def close(a: Tensor, b: Tensor) -> None:
    """Two fp64 evaluations of a model of a few thousand operations per number."""
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@each_model
def test_injection_changes_no_output(case):
    batch = batch_of(case)
    plain = case.model()
    expected = plain(**batch).logits
    fe.inject(plain, fe.LoRAConfig(r=2, target_modules=case.targets, slices=case.slices))
    close(plain(**batch).logits, expected)


@each_model
def test_matches_dense_weights(case):
    """Outputs and gradients are those of the dense weights."""
    model, batch = case.adapted(), batch_of(case)
    plain, weights = dense(case, model)
    output, expected = model(**batch), plain(**batch)
    close(output.logits, expected.logits)
    output.loss.backward()
    for key, piece, lora_a, lora_b, gradient in dense_gradients(case, model, expected.loss, weights):
        assert gradient.abs().max() > 0, key
        close(lora_a.grad, piece.scaling * lora_b.detach().t() @ gradient)
        close(lora_b.grad, piece.scaling * gradient @ lora_a.detach().t())


def log_loss(case: Case, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """-log p of the labels, summed over tokens; causal models predict the label of the next position."""
    logits, labels = model(**batch).logits, batch["labels"]
    if case.batch not in ("classes", "images", "seq2seq"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum")


@each_model
def test_fisher_mapping_batches(case):
    """The Fisher of batches that are mappings is the mean square of the single-sample gradients of -log p."""
    model, batch = case.adapted(), batch_of(case)
    ewc = fe.EWC(model, 1.0, fisher_dtype=torch.float64)
    halves = [{key: value[i : i + 2] for key, value in batch.items()} for i in (0, 2)]
    plain, weights = dense(case, model)
    expected: dict[str, Any] = {}
    for i in range(SAMPLES):
        loss = log_loss(case, plain, sample_of(batch, i))
        for key, _, _, _, gradient in dense_gradients(case, model, loss, weights):
            expected[key] = expected.get(key, 0) + gradient.square() / SAMPLES
    ewc.end_task(halves)
    assert expected.keys() == ewc.fishers.keys()
    for key, fisher in ewc.fishers.items():
        torch.testing.assert_close(fisher, expected[key], rtol=1e-8, atol=1e-18)


@each_model
def test_saved_without_adapters(case, tmp_path):
    """A model without its adapters is saved and loaded by plain transformers."""
    model, batch = case.adapted(torch.float32), batch_of(case, torch.float32)
    before = model(**batch).logits
    classes = {name: type(module) for name, module in case.model().named_modules()}
    fe.eject(model, merge=True)
    assert {name: type(module) for name, module in model.named_modules()} == classes
    expected = model(**batch).logits
    torch.testing.assert_close(expected, before, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(loaded.eval()(**batch).logits, expected)


@each_model
def test_all_linear_excludes_head(case):
    """Targeting `all-linear` leaves out the head."""
    model = case.model()
    fe.inject(model, fe.LoRAConfig(r=2, target_modules="all-linear"))
    names = set(fe.adapters(model))
    linear = {
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "LoRAConv1D"
    }
    left_out = linear - names
    heads = ("lm_head", "embed_out", "classifier")  # embed_out: GPT-NeoX in transformers 5.0 and before
    assert left_out == {name for name in linear if name.split(".")[-1] in heads}
    assert len(names) >= 4


def test_classifier_without_base():
    """Targeting `all-linear` leaves out the classifier of a model that is its own `base_model`."""
    vision = {**TEXT, **VIT, "num_labels": 2}
    config = hf.SiglipConfig(text_config=TEXT, vision_config=vision, num_labels=3)
    model = hf.SiglipForImageClassification(config)
    assert model.base_model is model
    fe.inject(model, fe.LoRAConfig(r=2, target_modules="all-linear"))
    assert type(model.classifier) is nn.Linear and len(fe.adapters(model)) >= 6


@pytest.mark.filterwarnings("ignore:.*_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "gpt_neox", "t5"])
def test_activation_checkpointing(name, reentrant):
    """Activation checkpointing gives the same gradients and the same Fisher."""
    case = CASES[name]
    batch, results = batch_of(case), []
    for checkpointed in (False, True):
        model = case.adapted().train()  # transformers recomputes in training mode only; there is no dropout
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()  # without it reentrant checkpoints of frozen layers do nothing
        ewc = fe.EWC(model, 1.0, fisher_dtype=torch.float64)
        calls = count_calls(model)
        with ewc.accumulate_fisher():
            model(**batch).loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if "lora_" in n}
        ewc.consolidate()
        results.append((gradients, ewc.fishers, calls))
    (gradients, fishers, plain_calls), (again, fishers_again, calls) = results
    assert len(calls) > len(plain_calls), "something was recomputed"
    for key, gradient in gradients.items():
        close(again[key], gradient)
    for key, fisher in fishers.items():
        assert fisher.sum() > 0
        torch.testing.assert_close(fishers_again[key], fisher, rtol=1e-8, atol=1e-18)


def count_calls(model: nn.Module) -> list[None]:
    calls: list[None] = []
    for layer in fe.adapters(model).values():
        layer.register_forward_pre_hook(lambda module, args: calls.append(None))
    return calls


@pytest.mark.parametrize("name", ["llama", "gpt2-conv1d", "gpt_neox", "phi3"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_lm_padding_fisher(name, side):
    """Padding does not change the Fisher of a language model."""
    case = CASES[name]
    samples = [{"input_ids": torch.arange(1, length + 1) * 3 % VOCABULARY} for length in (5, 3, 4)]
    padded = {"input_ids": [], "attention_mask": [], "labels": [], "position_ids": []}
    for sample in samples:
        ids = sample["input_ids"]
        missing = TOKENS - len(ids)
        pad = (0, missing) if side == "right" else (missing, 0)
        padded["input_ids"].append(F.pad(ids, pad, value=7))
        padded["attention_mask"].append(F.pad(torch.ones_like(ids), pad))
        padded["labels"].append(F.pad(ids, pad, value=-100))
        padded["position_ids"].append(F.pad(torch.arange(len(ids)), pad))
    batch = {key: torch.stack(values) for key, values in padded.items()}
    single = [{"input_ids": s["input_ids"][None], "labels": s["input_ids"][None]} for s in samples]
    fishers = []
    for loader in ([batch], single):
        ewc = fe.EWC(case.adapted(), 1.0, fisher_dtype=torch.float64)
        ewc.end_task(loader, forward=next_tokens)
        fishers.append(ewc.fishers)
    for key, fisher in fishers[0].items():
        assert fisher.sum() > 0
        # Norms and softmax of these models are fp32 whatever their dtype, here over other numbers of terms.
        assert (fisher - fishers[1][key]).abs().max() <= 1e-5 * fisher.max(), key


def test_sampled_tokens_fisher():
    """Over many draws the mean of squared gradients is their expectation, here for one token to predict."""
    case = CASES["llama"]
    model = case.adapted()
    ids = torch.tensor([[3, 8, 5]])
    # The second position alone counts. The first attends to itself alone, whatever its queries and keys are.
    batch = {"input_ids": ids, "labels": torch.tensor([[-100, -100, 5]])}
    plain, weights = dense(case, model)
    log_p = plain(input_ids=ids).logits[0, 1].log_softmax(-1)
    expected: dict[str, Any] = {}
    for token in range(VOCABULARY):
        grads = torch.autograd.grad(log_p[token], list(weights.values()), retain_graph=True)
        for (name, _), gradient in zip(fe.adapters(model).items(), grads, strict=True):
            expected[name] = expected.get(name, 0) + log_p[token].exp().detach() * gradient.square()
    draws = 400
    many = {key: value.expand(draws, -1) for key, value in batch.items()}
    ewc = fe.EWC(model, 1.0, fisher_dtype=torch.float64)
    ewc.end_task([many], labels="sampled", forward=next_tokens, generator=torch.Generator().manual_seed(0))
    for name, fisher in ewc.fishers.items():
        ratio = float(fisher.sum() / expected[name].sum())
        assert abs(ratio - 1) < 0.2, (name, ratio)  # 4 standard errors of 400 draws of spread ~ their mean


def test_next_tokens_need_labels():
    model = CASES["llama"].adapted()
    ewc = fe.EWC(model, 1.0, fisher_dtype=torch.float64)
    for batch in ({"input_ids": torch.ones(1, 2, dtype=torch.long)}, (torch.ones(1, 2), torch.ones(1))):
        with pytest.raises(fe.ArgumentError, match='expected a mapping with "labels"'):
            ewc.estimate_fisher([batch], forward=next_tokens)


def test_tied_embeddings():
    """Tied embeddings train but refuse to merge."""
    model = CASES["gpt2"].model()
    with pytest.warns(UserWarning, match=r"the weight of 'lm_head' is also transformer\.wte\.weight"):
        fe.inject(model, fe.LoRAConfig(r=2, target_modules=["lm_head"]))
    batch = batch_of(CASES["gpt2"])
    model(**batch).loss.backward()
    assert model.lm_head.lora_B.grad.abs().max() > 0
    before = model.transformer.wte.weight.detach().clone()
    ewc = fe.EWC(model, 1.0, fisher_dtype=torch.float64)
    for action in (lambda: fe.merge(model), lambda: fe.eject(model), lambda: ewc.end_task([batch])):
        with pytest.raises(fe.TargetError, match=r"also transformer\.wte\.weight, and would change with it"):
            action()
        assert torch.equal(model.transformer.wte.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "bert"])
def test_half_precision_masters(name, dtype):
    """Models in half precision train their adapters in fp32."""
    case = CASES[name]
    model, batch = case.adapted(dtype), batch_of(case, dtype)
    output = model(**batch)
    assert output.logits.dtype == dtype
    output.loss.backward()
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            assert parameter.dtype == torch.float32 == parameter.grad.dtype
            assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0, key
    ewc = fe.EWC(model, 1.0)
    ewc.end_task([batch])
    assert all(torch.isfinite(fisher).all() and fisher.sum() > 0 for fisher in ewc.fishers.values())


def test_t5_fp32_wo(tmp_path):
    """T5 keeps `wo` in fp32 beside fp16, and its adapter works."""
    CASES["t5"].model(torch.float32).save_pretrained(tmp_path)
    model = hf.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    wo = [m for n, m in model.named_modules() if n.endswith("wo")]
    assert {m.weight.dtype for m in wo} == {torch.float32} and model.shared.weight.dtype == torch.float16
    fe.inject(model, fe.LoRAConfig(r=2, target_modules=["wo", "q"]))
    model(**batch_of(CASES["t5"])).loss.backward()
    assert all(m.lora_B.grad.abs().max() > 0 for m in wo)


def test_plain_checkpoint_loads():
    """A plain checkpoint loads into the injected model."""
    case = CASES["gpt2"]
    model, other = case.adapted(), case.model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert not result.unexpected_keys and all("lora_" in key for key in result.missing_keys)
    batch = batch_of(case)
    with fe.disabled(model):
        assert torch.equal(model(**batch).logits, other(**batch).logits)


def test_cached_generation():
    """Generation with a cache equals that of the merged model."""
    model = CASES["gpt2"].adapted()
    ids = torch.tensor([[3, 5, 8]])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(ids, **options)
    fe.merge(model)
    assert torch.equal(model.generate(ids, **options), tokens) and tokens.shape == (1, 7)


def test_copies_independent():
    """Copies of a model are independent."""
    model = CASES["gpt2"].adapted()
    other = copy.deepcopy(model)
    batch = batch_of(CASES["gpt2"])
    with torch.no_grad():
        other.transformer.h[0].attn.c_attn.lora_B_q.mul_(2)
    assert not torch.equal(other(**batch).logits, model(**batch).logits)


WAVLM = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    "conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_labels": 2,
}  # fmt: skip
BLOOM = {
    "vocab_size": 19, "hidden_size": 8, "n_layer": 1, "n_head": 2, "pretraining_tp": 2,
    "slow_but_exact": True,
}  # fmt: skip
MAMBA = {"vocab_size": 19, "hidden_size": 8, "num_hidden_layers": 1, "state_size": 4, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("make", "refused"),
    [
        (lambda: hf.MambaForCausalLM(hf.MambaConfig(**MAMBA)), "dt_proj"),
        (lambda: hf.WavLMForSequenceClassification(hf.WavLMConfig(**WAVLM)), "out_proj"),
        (lambda: hf.BloomForCausalLM(hf.BloomConfig(**BLOOM)), "dense"),
    ],
    ids=["mamba", "wavlm", "bloom"],
)
def test_bypassed_refused(make, refused):
    """Layers whose weights a model uses without calling them are left out by "all-linear", and refused when
    they are named."""
    model = make()
    report = fe.inject(model, fe.LoRAConfig(r=2, target_modules="all-linear"))
    assert "without calling it" in str(report)
    assert not any(name.endswith(refused) for name in fe.adapters(model))
    with pytest.raises(fe.TargetError, match=rf"{refused}: .*uses .* without calling it"):
        fe.inject(make(), fe.LoRAConfig(r=2, target_modules=[refused]))
