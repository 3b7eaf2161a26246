"""The layer-by-layer engine on tiny models: what it computes, what it leaves alone, what it reports."""

from __future__ import annotations

import copy
from unittest.mock import patch

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import modegpt
from helpers import tiny_llama
from modegpt.budget import LayerRanks, kept_parameters
from modegpt.config import CompressionConfig
from modegpt.data import TokenWindows
from modegpt.decompositions import cr_decomposition, nystrom_decomposition, svd_decomposition
from modegpt.engine import Compression, Engine, compress_model
from modegpt.families import decoder_layers, family_of, model_geometry
from modegpt.layered import resident
from modegpt.methods import METHODS, ModeGPT
from modegpt.results import Choice
from modegpt.runner import LayerRunner

RIDGE = 1e-4
FULL = LayerRanks(mlp=48, qk=4, vo=8)
UNEVEN = [LayerRanks(mlp=30, qk=3, vo=5), LayerRanks(mlp=40, qk=2, vo=7), LayerRanks(mlp=20, qk=4, vo=8)]


def windows(count: int = 6, length: int = 16, seed: int = 1) -> TokenWindows:
    return TokenWindows(torch.randint(0, 128, (count, length), generator=torch.Generator().manual_seed(seed)))


def compress_to(
    model: LlamaForCausalLM, ranks: list[LayerRanks], *, sequential: bool, batch_size: int = 2
) -> Compression:
    engine = Engine(resident(model), windows(), batch_size)
    with engine.active():
        return engine.compress(ModeGPT(RIDGE), Choice(ranks, [{} for _ in ranks]), sequential=sequential)


def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(windows(seed=2).ids if ids is None else ids).logits


@pytest.mark.parametrize("method", METHODS)
def test_layers_run_only_where_something_is_gathered(method: str) -> None:
    """In the layer loop; what ranks are chosen by may have taken runs before."""
    config = CompressionConfig.validated(method=method, ratio=0.3)
    own, engine = METHODS[method].from_config(config), Engine(resident(tiny_llama()), windows(), 2)
    with engine.active():
        choice = engine.choose_ranks(config)
        with patch.object(LayerRunner, "run_layer", autospec=True, side_effect=LayerRunner.run_layer) as run:
            engine.compress(own, choice, sequential=config.statistics == "sequential")
    known = config.allocation == "sensitivity"  # a profile leaves the statistics behind
    assert run.called == bool(own.statistics and not known)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_full_ranks_leave_the_model_unchanged(sequential: bool, biases: bool, groups: int) -> None:
    model = tiny_llama(num_key_value_heads=groups, attention_bias=biases, mlp_bias=biases)
    compressed = compress_to(model, [FULL] * 3, sequential=sequential).model
    torch.testing.assert_close(logits(compressed), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("allocation", ["uniform", "block-influence", "block-influence-split"])
def test_parameter_count_matches_the_request(ratio: float, allocation: str) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=176, num_hidden_layers=6)
    config = CompressionConfig.validated(ratio=ratio, allocation=allocation)
    compressed = compress_model(model, windows(), config).model
    dense, kept = (
        sum(p.numel() for p in nn.ModuleList(decoder_layers(m, family_of(model))).parameters())
        for m in (model, compressed)
    )
    assert abs((1 - kept / dense) - ratio) < 0.005


def test_counted_parameters_are_the_model_s() -> None:
    model = tiny_llama()
    layers = decoder_layers(compress_to(model, UNEVEN, sequential=False).model, family_of(model))
    assert kept_parameters(model_geometry(model), UNEVEN) == sum(p.numel() for p in nn.ModuleList(layers).parameters())


def all_at_once(model: LlamaForCausalLM, ranks: list[LayerRanks]) -> list[dict[str, torch.Tensor]]:
    """The paper's algorithms on dense statistics, from one plain forward over all windows with hooks."""
    seen: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].double().flatten(0, 1)}))
        for name, module in model.named_modules()
        if name.endswith(("v_proj", "down_proj"))
    ]
    logits(model, windows().ids)
    for handle in handles:
        handle.remove()
    cos, sin = (
        x.double()[0] for x in model.model.rotary_emb(torch.zeros(1), torch.arange(windows().ids.shape[1])[None])
    )

    def rotated(x: torch.Tensor, heads: int) -> torch.Tensor:  # (heads, tokens, h)
        x = x.view(*windows().ids.shape, heads, -1)
        half = torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)
        return (x * cos[:, None] + half * sin[:, None]).flatten(0, 1).transpose(0, 1)

    results = []
    for index, (layer, rank) in enumerate(zip(model.model.layers, ranks, strict=True)):
        attention, mlp = layer.self_attn, layer.mlp
        prefix = f"model.layers.{index}"
        x, z = seen[f"{prefix}.self_attn.v_proj"], seen[f"{prefix}.mlp.down_proj"]
        weight = {name: p.detach().double() for name, p in layer.named_parameters()}

        nystrom = nystrom_decomposition(z.T @ z, mlp.down_proj.weight.detach().double().T, rank["mlp"], RIDGE)
        query = rotated(x @ weight["self_attn.q_proj.weight"].T, 4)
        key = rotated(x @ weight["self_attn.k_proj.weight"].T, 2)
        pairs = torch.stack(
            [
                cr_decomposition(
                    torch.stack([query[2 * g + j].T @ query[2 * g + j] for j in range(2)]),
                    key[g].T @ key[g],
                    rank["qk"],
                ).pairs
                for g in range(2)
            ]
        )
        values, outputs = [], []
        for g in range(2):
            w_v = weight["self_attn.v_proj.weight"].T[:, 8 * g : 8 * g + 8]
            w_o = weight["self_attn.o_proj.weight"].T[16 * g : 16 * g + 16].view(2, 8, -1)
            result = svd_decomposition(x.T @ x, w_v, w_o, rank["vo"])
            values.append(result.value)
            outputs.append(result.output)
        results.append(
            {
                "mlp.down_proj.weight": nystrom.output.T,
                "mlp.up_proj.weight": mlp.up_proj.weight.detach()[nystrom.kept],
                "mlp.gate_proj.weight": mlp.gate_proj.weight.detach()[nystrom.kept],
                "self_attn.rotary_pairs": pairs,
                "self_attn.k_proj.weight": torch.cat(
                    [attention.k_proj.weight.detach()[8 * g :][torch.cat((p, p + 4))] for g, p in enumerate(pairs)]
                ),
                # singular vectors are unique only up to sign: compare the products
                "value-output": torch.stack([v @ o for v, o in zip(values, outputs, strict=True)]),
            }
        )
    return results


def test_streaming_equals_all_at_once() -> None:
    model = tiny_llama()
    compressed = compress_to(model, UNEVEN, sequential=False).model
    for layer, rank, expected in zip(
        decoder_layers(compressed, family_of(model)), UNEVEN, all_at_once(model, UNEVEN), strict=True
    ):
        state = layer.state_dict()
        value = state["self_attn.v_proj.weight"].double().T.view(32, 2, rank["vo"]).transpose(0, 1)[:, None]
        output = state["self_attn.o_proj.weight"].double().T.view(2, 2, rank["vo"], 32)
        torch.testing.assert_close(value @ output, expected.pop("value-output"), rtol=1e-4, atol=1e-4)
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name].double(), tensor.double(), rtol=1e-4, atol=1e-4, msg=name)


def test_sequential_statistics_come_from_the_compressed_layers_before() -> None:
    """Sequential layer k equals dense-statistics layer k of a model whose layers before k are lossless stand-ins."""
    model = tiny_llama()
    sequential = compress_to(model, UNEVEN, sequential=True).model
    dense = compress_to(model, UNEVEN, sequential=False).model
    first, second = (decoder_layers(m, family_of(model)) for m in (sequential, dense))
    torch.testing.assert_close(first[0].state_dict(), second[0].state_dict(), rtol=0, atol=0)
    assert not torch.equal(first[1].mlp.down_proj.weight, second[1].mlp.down_proj.weight)

    # The statistics of layer 1, gathered by hand behind the compressed layer 0.
    seen = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    dense_first = model.model.layers[0]
    model.model.layers[0] = first[0]
    logits(model, windows().ids)
    model.model.layers[0] = dense_first
    handle.remove()
    z = seen[0].double().flatten(0, 1)
    weight = model.model.layers[1].mlp.down_proj.weight.detach().double().T
    expected = nystrom_decomposition(z.T @ z, weight, UNEVEN[1]["mlp"], RIDGE).output
    torch.testing.assert_close(first[1].mlp.down_proj.weight.double().T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sequential", [True, False])
def test_batch_size_changes_nothing_but_rounding(sequential: bool) -> None:
    model = tiny_llama()
    one, six = (compress_to(model, UNEVEN, sequential=sequential, batch_size=size).model for size in (1, 6))
    torch.testing.assert_close(logits(one), logits(six), rtol=1e-3, atol=1e-3)


def test_a_repeated_run_is_identical() -> None:
    model = tiny_llama()
    first, second = (compress_to(model, UNEVEN, sequential=True).model.state_dict() for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_reported_errors_are_those_of_the_modules() -> None:
    """Type I and Type III errors of layer 0, measured on the activations of both models."""
    model = tiny_llama()
    result = compress_to(model, UNEVEN, sequential=False)
    reported = result.layers[0].modules
    layer, thin = model.model.layers[0], decoder_layers(result.model, family_of(model))[0]
    seen = {}
    for name in ("self_attn.v_proj", "mlp.down_proj"):
        layer.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    logits(model, windows().ids)

    z = seen["mlp.down_proj"].flatten(0, 1)
    exact = z @ layer.mlp.down_proj.weight.T
    change = exact - z[:, reported["mlp"].kept] @ thin.mlp.down_proj.weight.T
    assert reported["mlp"].relative_error == pytest.approx(float((change.norm() / exact.norm()).detach()), rel=1e-3)

    x = seen["self_attn.v_proj"].flatten(0, 1)
    squares = torch.zeros(2)
    for head in range(4):
        exact, approximate = (
            (x @ attention.v_proj.weight.T.unflatten(1, (2, -1))[:, head // 2])
            @ attention.o_proj.weight.T.unflatten(0, (4, -1))[head]
            for attention in (layer.self_attn, thin.self_attn)
        )
        squares += torch.stack(((exact - approximate).square().sum(), exact.square().sum())).detach()
    assert reported["vo"].relative_error == pytest.approx(float((squares[0] / squares[1]).sqrt()), rel=1e-3)


@pytest.mark.parametrize("module", ["mlp", "qk", "vo", "all"])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("groups", [2, 4])
def test_removing_what_carries_nothing_is_exact(module: str, biases: bool, groups: int) -> None:
    """Dead MLP channels, dead rotary pairs and rank-deficient value heads go without a trace."""
    model = tiny_llama(num_key_value_heads=groups, attention_bias=biases, mlp_bias=biases)
    ranks = {"mlp": 48, "qk": 4, "vo": 8}
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            if module in ("mlp", "all"):
                ranks["mlp"] = 30
                for linear in (layer.mlp.up_proj, layer.mlp.gate_proj):
                    linear.weight[5:23] = 0
                    if biases:
                        linear.bias[5:23] = 0
            if module in ("qk", "all"):
                ranks["qk"] = 3
                for head in range(groups):  # another pair in every group
                    for channel in (head % 4, head % 4 + 4):
                        attention.k_proj.weight[8 * head + channel] = 0
                        if biases:
                            attention.k_proj.bias[8 * head + channel] = 0
            if module in ("vo", "all"):
                ranks["vo"] = 5
                for head in range(groups):
                    rows = slice(8 * head, 8 * head + 8)
                    left, singular, right = torch.linalg.svd(attention.v_proj.weight[rows], full_matrices=False)
                    singular[5:] = 0
                    attention.v_proj.weight[rows] = left * singular @ right
    compressed = compress_to(model, [LayerRanks(**ranks)] * 3, sequential=True).model
    torch.testing.assert_close(logits(compressed), logits(model), rtol=1e-4, atol=2e-4)


def test_the_dense_model_is_left_as_it_was() -> None:
    model = tiny_llama(attn_implementation="eager").train()
    before, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config)
    compress_to(model, UNEVEN, sequential=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.config == config
    assert model.config._attn_implementation == "eager"
    assert model.training
    assert not any("forward" in vars(module) for module in model.modules())


def test_nan_names_the_layer() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(modegpt.NumericalError, match="layer 1"):
        compress_to(model, UNEVEN, sequential=True)
    with pytest.raises(modegpt.NumericalError, match="layer 1"):
        compress_model(model, windows(), CompressionConfig.validated(ratio=0.3))


def test_padding_does_not_change_what_is_learned() -> None:
    """Windows of half length give the same model as the same windows padded to full length."""
    model = tiny_llama()
    short = windows(length=8)
    padded = TokenWindows(
        torch.cat((short.ids, torch.full_like(short.ids, 7)), dim=1),
        torch.cat((torch.ones_like(short.ids), torch.zeros_like(short.ids)), dim=1).bool(),
    )
    config = CompressionConfig.validated(ratio=0.3)
    first, second = (compress_model(model, text, config) for text in (short, padded))
    assert first.choice.ranks == second.choice.ranks
    torch.testing.assert_close(logits(first.model), logits(second.model), rtol=1e-3, atol=1e-3)


def test_modules_not_chosen_stay_whole() -> None:
    result = compress_model(
        tiny_llama(), windows(), CompressionConfig.validated(ratio=0.1, modules="vo", allocation="uniform")
    )
    for layer in result.layers:
        assert layer.modules["mlp"].rank == 48
        assert layer.modules["qk"].rank == 4
        assert layer.modules["vo"].rank < 8


def test_split_scores_give_attention_and_mlp_their_own_sparsity() -> None:
    config = CompressionConfig.validated(ratio=0.3, allocation="block-influence-split")
    result = compress_model(tiny_llama(), windows(), config)
    for layer in result.layers:
        assert layer.sparsity["qk"] == layer.sparsity["vo"]
    assert any(layer.sparsity["qk"] != layer.sparsity["mlp"] for layer in result.layers)
    assert max(max(layer.sparsity.values()) for layer in result.layers) <= 0.8 + 1e-6


def test_block_influence_is_one_minus_the_mean_cosine() -> None:
    model = tiny_llama()
    engine = Engine(resident(model), windows(), batch_size=4)
    with engine.active():
        scores = engine.block_influence()
    with torch.no_grad():
        states = model.model(windows().ids, output_hidden_states=True).hidden_states
    last = {}
    model.model.norm.register_forward_pre_hook(lambda _, args: last.update(x=args[0]))
    middles = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: middles.append(args[0]))
    logits(model, windows().ids)
    states = [*states[:3], last["x"]]
    for index, (whole, attention, mlp) in enumerate(scores):
        pairs = (
            (states[index], states[index + 1]),
            (states[index], middles[index]),
            (middles[index], states[index + 1]),
        )
        expected = [1 - float(nn.functional.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs]
        assert [whole, attention, mlp] == pytest.approx(expected, abs=1e-6)
