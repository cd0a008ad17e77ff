"""``inductor.fuse`` on unmodified models of ``transformers``, with random weights. Skipped where it is not installed:
``spelled.py`` has the same spellings."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from test_fuse import assert_as_right, short, traced_by

from torch_jit_ops.inductor import fuse, objections

transformers = pytest.importorskip("transformers")

LAYERS = 2
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "pad_token_id": 0,
}

# By model, what each layer gets, and what the whole gets besides. In the first layer nothing was added yet.
PRE_NORM = {"fused_add_rmsnorm": 2, "silu_mul": 1, "rope_qk": 1}, {"rmsnorm": 1}
TWO_LAYER_NORMS = {"layernorm": 2}, {"layernorm": 1}
TWO_AND_ROPE = {"layernorm": 2, "rope_qk": 1}, {"layernorm": 1}
PACKED = {"fused_add_rmsnorm": 2, "silu_and_mul": 1, "rope_qk": 1}, {"rmsnorm": 1}
MODELS: dict[str, tuple[str, str, tuple[dict[str, int], dict[str, int]]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", PRE_NORM),
    "mistral": ("MistralConfig", "MistralForCausalLM", PRE_NORM),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", PRE_NORM),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", ({**PRE_NORM[0], "rmsnorm": 2}, {"rmsnorm": 1})),
    "gemma": (
        "GemmaConfig",
        "GemmaForCausalLM",
        ({"gemma_fused_add_rmsnorm": 2, "gelu_tanh_mul": 1, "rope_qk": 1}, {"gemma_rmsnorm": 1}),
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        ({"gemma_fused_add_rmsnorm": 2, "gemma_rmsnorm": 2, "gelu_tanh_mul": 1, "rope_qk": 1}, {"gemma_rmsnorm": 1}),
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        ({"gemma_fused_add_rmsnorm": 2, "gemma_rmsnorm": 4, "gelu_tanh_mul": 1, "rope_qk": 1}, {"gemma_rmsnorm": 1}),
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", TWO_LAYER_NORMS),
    "phi": ("PhiConfig", "PhiForCausalLM", ({"layernorm": 1, "rope_qk": 1}, {"layernorm": 1})),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", TWO_AND_ROPE),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", TWO_AND_ROPE),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", ({"layernorm": 2, "relu2": 1, "rope_qk": 1}, {"layernorm": 1})),
    "arcee": ("ArceeConfig", "ArceeForCausalLM", ({"fused_add_rmsnorm": 2, "relu2": 1, "rope_qk": 1}, {"rmsnorm": 1})),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", PACKED),
    "glm": ("GlmConfig", "GlmForCausalLM", PACKED),
    "cohere": ("CohereConfig", "CohereForCausalLM", ({"layernorm": 1, "silu_mul": 1, "rope_qk": 1}, {"layernorm": 1})),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", ({"rmsnorm": 4, "silu_mul": 1, "rope_qk": 1}, {"fused_add_rmsnorm": 1})),
    "vit": ("ViTConfig", "ViTModel", TWO_LAYER_NORMS),
    "dinov2": ("Dinov2Config", "Dinov2Model", TWO_LAYER_NORMS),
}
PICTURES = {"vit", "dinov2"}
# GPT-2 has names of its own for sizes, and Phi as many heads of keys as of queries.
OPTIONS = {
    "gpt2": {"n_embd": 64, "n_layer": LAYERS, "n_head": 4},
    "phi": {"num_key_value_heads": 4},
    **{name: {"image_size": 32, "patch_size": 8} for name in PICTURES},
}


@pytest.fixture(autouse=True)
def _kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objections, "served", lambda op: {"cpu", "cuda"})
    logging.getLogger("transformers").setLevel(logging.ERROR)


def build(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The model in ``dtype``, and in fp64."""
    config, model, _ = MODELS[name]
    options = {**SMALL, **OPTIONS.get(name, {})}
    pair = [getattr(transformers, model)(getattr(transformers, config)(**options)).eval() for _ in range(2)]
    with torch.no_grad():
        for parameter in pair[0].parameters():  # norms start as ones, which would hide a missing weight
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model, truth = pair[0].to(dtype), pair[1].double()
    truth.load_state_dict(model.state_dict())
    return model, truth


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def results(name: str, dtype: torch.dtype, batch: int, *models: Any) -> list[torch.Tensor]:
    """What the models make of the same input; the last one in fp64."""
    if name not in PICTURES:
        ids = torch.randint(1, 100, (batch, 9 - batch))
        return [logits(model, ids) for model in models]
    pictures = torch.randn(batch, 3, 32, 32, dtype=dtype)
    return [model(pictures.to(of)).last_hidden_state for model, of in zip(models, (dtype, dtype, torch.float64), strict=True)]


def expected(name: str) -> dict[str, int]:
    of_layer, besides = MODELS[name][2]
    counts = {op: LAYERS * count for op, count in of_layer.items()}
    return {op: counts.get(op, 0) + besides.get(op, 0) for op in {**counts, **besides}}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_gets_the_ops_everywhere(name: str, dtype: torch.dtype) -> None:
    model, truth = build(name, dtype)
    rewrite = fuse()
    compiled = torch.compile(model, fullgraph=True, backend=traced_by(rewrite))
    with torch.no_grad():
        for batch in (2, 3):  # the second one is traced with symbolic sizes
            assert_as_right(*results(name, dtype, batch, compiled, model, truth))
    assert short(rewrite.report().counts()) == expected(name)
    assert rewrite.report().missed == ()


def test_where_a_model_got_them() -> None:
    model, _ = build("llama")
    rewrite = fuse(where="model.layers.1.*")
    with torch.no_grad():
        logits(torch.compile(model, fullgraph=True, backend=traced_by(rewrite)), torch.randint(1, 100, (2, 7)))
    assert [(entry.op.removeprefix("jitk::"), entry.module) for entry in rewrite.report().done] == [
        ("fused_add_rmsnorm", "model.layers.1.input_layernorm"),
        ("rope_qk", "model.layers.1.self_attn"),
        ("fused_add_rmsnorm", "model.layers.1.post_attention_layernorm"),
        ("silu_mul", "model.layers.1.mlp"),
    ]


@pytest.mark.parametrize("name", ["qwen3", "phi", "glm"])
def test_a_model_is_trained(name: str) -> None:
    model, truth = build(name)
    rewrite = fuse()
    ids = torch.randint(1, 100, (2, 7))
    grads = []
    compiled = torch.compile(model, fullgraph=True, backend=traced_by(rewrite))
    for function, module in ((compiled, model), (model, model), (truth, truth)):
        module.zero_grad()
        logits(function, ids).double().square().mean().backward()
        grads.append([parameter.grad.clone() for parameter in module.parameters()])
    for grad, plain, exact in zip(*grads, strict=True):
        assert_as_right(grad, plain, exact)
    counts = {op: count for op, count in expected(name).items() if op != "fused_add_rmsnorm"}
    added = expected(name).get("fused_add_rmsnorm", 0)  # which has no derivative: the addition stays
    assert short(rewrite.report().counts()) == counts | ({"rmsnorm": counts["rmsnorm"] + added} if added else {})


@pytest.mark.parametrize("name", ["llama", "glm"])
def test_decoding_with_a_cache_of_fixed_size(name: str) -> None:
    """Keys are written into the cache behind the op, and the next layer's queries turn behind that."""
    model, truth = build(name)
    rewrite = fuse(["rope_qk"])
    compiled = torch.compile(model, fullgraph=True, backend=traced_by(rewrite))
    ids = torch.randint(1, 100, (2, 7))
    found = []
    with torch.no_grad():
        for function, module in ((compiled, model), (model, model), (truth, truth)):
            cache = transformers.StaticCache(config=module.config, max_cache_len=12)
            for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
                last = function(part, past_key_values=cache, use_cache=True).logits
            found.append(last)
    assert_as_right(*found)
    assert short(rewrite.report().counts()) == {"rope_qk": LAYERS}


def test_through_inductor() -> None:
    model, truth = build("qwen3")
    rewrite = fuse()
    compiled = torch.compile(model, fullgraph=True, options=rewrite.options())
    ids = torch.randint(1, 100, (2, 7))
    with torch.no_grad():
        assert_as_right(logits(compiled, ids), logits(model, ids), logits(truth, ids))
    assert short(rewrite.report().counts()) == expected("qwen3")
