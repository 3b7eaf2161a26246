"""What vLLM's Transformers backend relies on, checked without vLLM; ``make test-vllm`` runs the real one."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import modegpt
from family_table import BY_NAME
from helpers import token_windows
from modegpt.modeling import CompactAttention

NAMES = ("llama-gqa", "mistral-window", "qwen2", "qwen3", "phi3", "olmo2", "starcoder2", "mixtral")
#: With a number of heads of its own in every layer.
FEWER_HEADS = (("obc", "llama-gqa"), ("obc", "qwen3"), ("obc", "gpt2"), ("flap", "llama-gqa"), ("flap", "opt"))


@pytest.fixture(scope="module", params=[*(("modegpt", name) for name in NAMES), *FEWER_HEADS], ids="-".join)
def small(request: pytest.FixtureRequest) -> PreTrainedModel:
    method, name = request.param
    model = BY_NAME[name].build()
    return modegpt.compress(model, calibration=token_windows(8, 16), ratio=0.3, method=method)


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters go to the meta device when they are registered, buffers stay where they were made."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def test_the_class_says_that_it_can(small: PreTrainedModel) -> None:
    assert type(small).is_backend_compatible()
    assert type(AutoModel.from_config(small.config)).is_backend_compatible()


def test_attention_is_looked_up_by_name_once_in_its_forward() -> None:
    """Bound to a name that is called once, with a scale that is an attribute: so vLLM finds it in the source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(CompactAttention.forward)))
    names = [
        (ast.unparse(target), ast.unparse(node.value))
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value)
        for target in node.targets
    ]
    ((name, lookup),) = names
    assert lookup.startswith("ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, ")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]
    (call,) = calls
    assert {word.arg: ast.unparse(word.value) for word in call.keywords}["scaling"] == "self.scaling"


def test_maps_of_attention_are_not_fused_by_their_source() -> None:
    """vLLM takes three maps of one input for queries, keys and values of one head size."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(CompactAttention.forward)))
    inputs = {
        ast.unparse(node.func): ast.unparse(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("self.q_proj", "self.k_proj", "self.v_proj")
    }
    assert len(inputs) == 3
    assert inputs["self.v_proj"] not in (inputs["self.q_proj"], inputs["self.k_proj"])


def test_heads_that_are_shared_out_are_refused(small: PreTrainedModel) -> None:
    """As tensor parallelism would: the rotary pairs are those of all key-value heads."""
    small = copy.deepcopy(small)
    attention = max(
        (module for module in small.modules() if isinstance(module, CompactAttention)),
        key=lambda module: module.k_proj.out_features,
    )
    if attention.rotary_pairs is None:
        pytest.skip("positions are no rotations here")
    groups = len(attention.rotary_pairs)
    assert groups > 1
    for name in ("q_proj", "k_proj", "v_proj"):
        linear = getattr(attention, name)
        linear.weight = nn.Parameter(linear.weight[: len(linear.weight) // groups])
        linear.bias = None if linear.bias is None else nn.Parameter(linear.bias[: len(linear.weight)])
    with pytest.raises(NotImplementedError, match=f"1 of {groups} key-value heads.*tensor parallelism"):
        small(token_windows(1, 8).ids)


def test_modules_have_a_number_and_a_scale(small: PreTrainedModel) -> None:
    attention = [module for module in small.modules() if isinstance(module, CompactAttention)]
    assert [module.layer_idx for module in attention] == list(range(len(attention)))
    assert all(type(module.scaling) is float for module in attention)


def test_the_base_model_is_found_by_the_checkpoint(small: PreTrainedModel, tmp_path: Path) -> None:
    modegpt.save(small, tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    base = AutoModel.from_config(config)
    assert config.auto_map["AutoModel"].endswith(f".{type(base).__name__}")
    assert {name: x.shape for name, x in base.state_dict().items()} == {
        name: x.shape for name, x in small.base_model.state_dict().items()
    }


def test_buffers_are_real_where_parameters_are_built_on_meta(small: PreTrainedModel) -> None:
    with parameters_on_meta():
        base = AutoModel.from_config(small.config)
    assert all(parameter.is_meta for parameter in base.parameters())
    assert not any(buffer.is_meta for buffer in base.buffers())


def geometry(layer: Any) -> tuple[int, int, int]:
    """Query heads, key-value heads and head size of a layer, by the names that vLLM looks for in its config."""
    heads = layer.num_attention_heads
    return heads, getattr(layer, "num_key_value_heads", heads), layer.head_dim


def test_an_attention_function_gets_the_heads_that_the_config_names(small: PreTrainedModel) -> None:
    """As an engine's own function sees it: q, k and v of the layer's heads and ``head_dim``, contiguous values."""
    seen = {}

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen[module.layer_idx] = query.shape[1], key.shape[1], query.shape[3]
        assert key.shape == value.shape
        assert query.shape[3] == key.shape[3]
        assert value.is_contiguous()
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    ids = token_windows(2, 12).ids
    with torch.no_grad():
        expected = small(ids, use_cache=False).logits
    before = small.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register("an-engine", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("an-engine", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        small.set_attn_implementation("an-engine")
        with torch.no_grad():
            found = small(ids, use_cache=False).logits
    finally:
        small.set_attn_implementation(before)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert seen == {index: geometry(layer) for index, layer in enumerate(small.config.per_layer_config)}


@pytest.mark.parametrize("method", ["obc", "flap"])
def test_layers_with_fewer_heads_say_so_under_the_usual_names(method: str, tmp_path: Path) -> None:
    model = BY_NAME["llama-gqa"].build()
    small = modegpt.compress(model, calibration=token_windows(8, 16), ratio=0.5, method=method)
    modegpt.save(small, tmp_path / "model")
    layers = AutoConfig.from_pretrained(tmp_path / "model").per_layer_config
    counts = [(layer.num_attention_heads, layer.num_key_value_heads) for layer in layers]
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    assert any(own < groups for _, own in counts)
    assert all(own * heads == groups * queries for queries, own in counts)
