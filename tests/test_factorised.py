"""Methods whose result is linear maps of two thin ones, through the real pipeline and back from disk."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import modegpt
from family_table import BY_NAME, ROWS, attention_of, has_experts, layers_of
from helpers import assert_loads_alone, compress_arguments, run_cli, tiny_llama, token_windows
from modegpt.budget import LayerRanks, kept_parameters, whole
from modegpt.config import CompressionConfig, RunConfig
from modegpt.data import TokenWindows
from modegpt.engine import Compression, Engine
from modegpt.errors import InvalidRequest
from modegpt.layered import resident
from modegpt.methods import METHODS, SVD, SVDLLM, JointRankK
from modegpt.methods.factorised import FactorGeometry, Factorised, Stack
from modegpt.modeling.modeling_factors import factorise
from modegpt.pipeline import compress_to_directory, read_texts
from modegpt.results import Choice
from modegpt.sources import ModelSource

FACTORISED = [name for name, method in METHODS.items() if issubclass(method, Factorised)]
EXPERTS = [row.name for row in ROWS if has_experts(layers_of(row.build())[0])]
DENSE = [row.name for row in ROWS if row.name not in EXPERTS]
#: One of each kind: biases, fused maps, Conv1D, norms of one head and of all, partial rotary, neighbours, no rotary.
KINDS = ["llama-biases", "qwen3", "olmo2", "phi3", "gpt2", "gpt-neox", "opt", "cohere-norms", "stablelm-everything"]


def windows(count: int = 8, length: int = 16, *, seed: int = 1) -> TokenWindows:
    return TokenWindows(torch.randint(0, 128, (count, length), generator=torch.Generator().manual_seed(seed)))


@cache
def dense(name: str) -> PreTrainedModel:
    """A row's stock model, not to be changed."""
    return BY_NAME[name].build()


def shares(model: PreTrainedModel, method: Factorised, *kept: float) -> list[LayerRanks]:
    """The ranks of all layers with this share of each module kept: MLP, queries and keys, values and output."""
    with Engine(resident(model), None, 1).active():
        geometry = Engine(resident(model), None, 1).geometry(method)
    return [
        {
            module: max(1, round(share * layer.modules[module].full))
            for module, share in zip(("mlp", "qk", "vo"), kept, strict=True)
        }
        for layer in geometry
    ]


def compress_to(model: PreTrainedModel, method: Factorised, ranks: list[LayerRanks]) -> Compression:
    engine = Engine(resident(model), windows() if method.statistics else None, 4)
    with engine.active():
        return engine.compress(method, Choice(ranks, [{} for _ in ranks]), sequential=True)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(windows(4, seed=2).ids).logits


def deviation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference in units of the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def blocks(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in layers_of(model).parameters())


# Every family


@pytest.mark.parametrize("method", [SVD, JointRankK])
@pytest.mark.parametrize("name", DENSE)
def test_full_ranks_leave_the_model_unchanged(name: str, method: type[Factorised]) -> None:
    result = compress_to(dense(name), method(), shares(dense(name), method(), 1, 1, 1))
    assert deviation(logits(result.model), logits(dense(name))) < 1e-5
    assert all(module.relative_error == 0 for layer in result.layers for module in layer.modules.values())


def project_inputs(model: PreTrainedModel, rank: int) -> None:
    """Give all linear maps of a layer that have one width of input the same few input directions."""
    for number, layer in enumerate(layers_of(model)):
        maps = [(name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        for _, module in maps:
            weight = module.weight.data if isinstance(module, Conv1D) else module.weight.data.T
            noise = torch.randn(len(weight), rank, generator=torch.Generator().manual_seed(number + len(weight)))
            directions = torch.linalg.qr(noise).Q
            weight.copy_(directions @ (directions.T @ weight))


@pytest.mark.parametrize("method", FACTORISED)
@pytest.mark.parametrize("name", DENSE)
def test_maps_of_truly_low_rank_are_factorised_without_loss(name: str, method: str, tmp_path: Path) -> None:
    model, chosen = copy.deepcopy(dense(name)), METHODS[method].from_config(config(method))
    assert isinstance(chosen, Factorised)
    project_inputs(model, 3)
    ranks = shares(model, chosen, 0.5, 0.5, 0.8)
    small = compress_to(model, chosen, ranks).model
    assert small.config.per_layer_config[0].factor_ranks
    assert deviation(logits(small), logits(model)) < 2e-4
    if name in KINDS:
        modegpt.save(small, tmp_path / "model")
        assert torch.equal(logits(modegpt.load(tmp_path / "model")), logits(small))
        lost = compress_to(dense(name), chosen, ranks).model  # of full rank, there is something to lose
        assert deviation(logits(lost), logits(dense(name))) > 1e-2


@pytest.mark.parametrize(
    "method",
    [SVD(), SVD(align=4), JointRankK(), JointRankK(joint_only=True)],
    ids=["svd", "svd-aligned", "joint", "joint-only"],
)
@pytest.mark.parametrize("name", DENSE)
def test_counted_parameters_are_the_model_s(name: str, method: Factorised) -> None:
    model = dense(name)
    geometry = Engine(resident(model), None, 1).geometry(method)
    full = [whole(layer) for layer in geometry]
    for kept in ((0.3, 0.6, 0.9), (1, 0.5, 0.1), (0.02, 1, 1)):
        ranks = shares(model, method, *kept)
        ranks[1] = full[1]  # one layer stays whole
        small = compress_to(model, method, ranks).model
        assert blocks(small) == kept_parameters(geometry, ranks)
    assert kept_parameters(geometry, full) == sum(layer.parameters + layer.extra for layer in geometry)


@pytest.mark.parametrize("method", [SVD, JointRankK])
@pytest.mark.parametrize("name", KINDS)
def test_cached_generation_equals_uncached(name: str, method: type[Factorised]) -> None:
    model = compress_to(dense(name), method(), shares(dense(name), method(), 0.6, 0.6, 0.6)).model
    ids = windows(2, 10, seed=3).ids
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings["attention_mask"] = torch.ones_like(ids)
    expected = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, **settings), expected)
    assert torch.equal(model.generate(ids, cache_implementation="static", disable_compile=True, **settings), expected)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("method", FACTORISED)
def test_experts_are_refused(name: str, method: str) -> None:
    with pytest.raises(InvalidRequest, match=f"--method {method} does not factorise experts"):
        modegpt.compress(dense(name), ratio=0.2, method=method, calibration=windows().ids)


# What is stored, and that nothing else is needed


def test_a_shared_factor_is_stored_once() -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    small = compress_to(model, JointRankK(), shares(model, JointRankK(), 0.5, 0.5, 0.5)).model
    ranks, layer = small.config.per_layer_config[0].factor_ranks, small.model.layers[0]
    state = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items() if "norm" not in name}
    qk, gate_up, down = ranks["q_proj+k_proj"], ranks["gate_proj+up_proj"], ranks["down_proj"]
    assert state == {
        "self_attn.shared_input.weight": (qk, 32),
        "self_attn.q_proj.weight": (32, qk),
        "self_attn.q_proj.bias": (32,),
        "self_attn.k_proj.weight": (16, qk),
        "self_attn.k_proj.bias": (16,),
        "self_attn.v_proj.first.weight": (ranks["v_proj"], 32),
        "self_attn.v_proj.second.weight": (16, ranks["v_proj"]),
        "self_attn.o_proj.first.weight": (ranks["o_proj"], 32),
        "self_attn.o_proj.second.weight": (32, ranks["o_proj"]),
        "self_attn.o_proj.second.bias": (32,),
        "self_attn.rotary_pairs": (2, 4),
        "mlp.shared_input.weight": (gate_up, 32),
        "mlp.gate_proj.weight": (48, gate_up),
        "mlp.gate_proj.bias": (48,),
        "mlp.up_proj.weight": (48, gate_up),
        "mlp.up_proj.bias": (48,),
        "mlp.down_proj.first.weight": (down, 48),
        "mlp.down_proj.second.weight": (32, down),
        "mlp.down_proj.second.bias": (32,),
    }


def test_gradients_reach_every_parameter() -> None:
    model = tiny_llama(attention_bias=True)
    small = compress_to(model, JointRankK(), shares(model, JointRankK(), 0.5, 0.5, 0.5)).model.train()
    ids = windows(2, seed=4).ids
    small(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in small.parameters() if p.requires_grad)


def test_loads_without_modegpt_installed(tmp_path: Path) -> None:
    models = {
        name: compress_to(dense(name), JointRankK(), shares(dense(name), JointRankK(), 0.5, 0.5, 0.5)).model
        for name in ("llama-biases", "phi3", "opt", "gpt2")
    }
    assert_loads_alone(models, windows(4, seed=2).ids, tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, directory = tiny_llama(), tmp_path_factory.mktemp("saved") / "model"
    modegpt.save(compress_to(model, JointRankK(), shares(model, JointRankK(), 0.5, 0.5, 0.5)).model, directory)
    return directory


@pytest.mark.parametrize(
    "ranks",
    [
        {"q_proj": 0},
        {"q_proj": True},
        {"q_proj": 4.0},
        {"q_proj": 33},
        {"k_proj": 17},
        {"elsewhere": 3},
        {"q_proj+v_proj": 3},
        {"q_proj": 3, "q_proj+k_proj": 3},
        {"q_proj+k_proj": 3},  # not the rank of the tensors
        ["q_proj"],
        7,
    ],
    ids=str,
)
def test_nonsense_ranks_are_refused(saved: Path, ranks: object, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    for path in saved.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    values = json.loads((directory / "config.json").read_text())
    values["per_layer_config"]["1"]["factor_ranks"] = ranks
    (directory / "config.json").write_text(json.dumps(values))
    with pytest.raises(modegpt.CheckpointError):
        modegpt.load(directory)


# Ranks and errors


def config(method: str, **options: Any) -> CompressionConfig:
    return CompressionConfig.validated(**{"ratio": 0.3, "method": method} | options)


@pytest.mark.parametrize("allocation", ["uniform", "block-influence", "block-influence-split", "sensitivity"])
@pytest.mark.parametrize("method", FACTORISED)
def test_every_allocation_meets_the_ratio(method: str, allocation: str) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    small = modegpt.compress(model, ratio=0.3, method=method, allocation=allocation, calibration=windows().ids)
    report = small.compression_report
    unit = 64 + 96  # one more direction of one map
    assert abs(report.block_parameters.removed - 0.3) * report.block_parameters.dense <= 2 * unit
    assert report.block_parameters.compressed == blocks(small)
    assert report.parameters.compressed == sum(parameter.numel() for parameter in small.parameters())


@pytest.mark.parametrize("method", ["svd", "joint-rank-k"])
@pytest.mark.parametrize("share", [0.55, 0.7, 0.83, 0.96])
def test_targets_are_met(method: str, share: float) -> None:
    model = tiny_llama()
    whole, unit = sum(parameter.numel() for parameter in model.parameters()), 3 * (32 + 48)
    target = round(share * whole)
    small = modegpt.compress(model, target_parameters=target, method=method)
    assert target - 2 * unit <= sum(parameter.numel() for parameter in small.parameters()) <= target
    small = modegpt.compress(model, target_size=4 * target, method=method)
    assert 4 * (target - 2 * unit) <= small.compression_report.bytes.compressed <= 4 * target


@pytest.mark.parametrize("align", [1, 8])
def test_ranks_are_shares_of_break_even_and_counts_never_fall(align: int) -> None:
    stacks = [Stack((0,), 64, 64), Stack((1,), 64, 16), Stack((2,), 30, 2), Stack((3,), 1, 5)]
    geometry = FactorGeometry.of(stacks, align)
    assert geometry.full == 32
    counts = [geometry.parameters_at(rank) for rank in range(1, geometry.full + 1)]
    assert counts == sorted(counts)
    assert counts[-1] == geometry.parameters == 64 * 64 + 64 * 16 + 60 + 5
    for rank in range(1, geometry.full):
        own = geometry.ranks(rank)
        assert own[3] is None  # two factors of it are larger at any rank
        for stack, found in zip(stacks[:3], own, strict=False):
            assert found is not None
            assert 1 <= found <= stack.limit
            assert found % min(align, stack.limit) == 0
            assert abs(found - rank / 32 * stack.limit) <= max(align, 1)
    assert geometry.ranks(geometry.full) == [None] * 4


@pytest.mark.parametrize("method", ["svd", "asvd", "svd-llm", "joint-rank-k"])
def test_align_makes_every_rank_a_multiple(method: str) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    small = modegpt.compress(model, ratio=0.4, method=method, align=4, calibration=windows().ids)
    for layer in small.config.per_layer_config:
        assert layer.factor_ranks
        assert all(rank % 4 == 0 for rank in layer.factor_ranks.values())


def output_changes(model: PreTrainedModel, thin: PreTrainedModel) -> dict[str, float]:
    """||X W - X A B||^2 / ||X W||^2 of every map of the first layer on what enters it in the dense model."""
    layer, seen = model.model.layers[0], {}
    paths = [f"mlp.{name}_proj" for name in ("gate", "up", "down")] + [f"self_attn.{name}_proj" for name in "qkvo"]
    hooks = [
        layer.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen.__setitem__(path, args[0].flatten(0, -2).double())
        )
        for path in paths
    ]
    with torch.no_grad():
        model(windows().ids)
    for hook in hooks:
        hook.remove()
    bias = layer.self_attn.v_proj.bias.detach().double().view(2, 8).repeat_interleave(2, 0)
    seen["self_attn.o_proj"] = seen["self_attn.o_proj"] - bias.flatten()  # it goes straight to the output
    changes = {}
    for path in paths:
        weight = layer.get_submodule(path).weight.detach().double().T
        factors = thin.model.layers[0].get_submodule(path)
        product = factors.first.weight.detach().double().T @ factors.second.weight.detach().double().T
        x = seen[path]
        changes[path] = float((x @ (weight - product)).square().sum() / (x @ weight).square().sum())
    return changes


def test_svd_llm_reports_the_relative_change_of_the_outputs() -> None:
    model, method = tiny_llama(attention_bias=True), SVDLLM(1e-9)
    result = compress_to(model, method, shares(model, method, 0.4, 0.4, 0.4))
    changes = output_changes(model, result.model)
    for module, paths in {"mlp": ("gate", "up", "down"), "qk": "qk", "vo": "vo"}.items():
        found = [change for path, change in changes.items() if path[:-5].rpartition(".")[2] in paths]
        assert len(found) == len(paths)
        expected = (sum(found) / len(found)) ** 0.5
        assert result.layers[0].modules[module].relative_error == pytest.approx(expected, rel=1e-3)


def test_whitened_factors_change_no_output_more_than_plain_ones() -> None:
    model = tiny_llama(attention_bias=True)
    plain, whitened = (
        output_changes(model, compress_to(model, method, shares(model, method, 0.4, 0.4, 0.4)).model)
        for method in (SVD(), SVDLLM(1e-9))
    )
    assert all(whitened[path] <= change for path, change in plain.items())
    assert sum(whitened.values()) < 0.95 * sum(plain.values())


# Without text, of some layers, of what is touched


def test_joint_rank_k_reads_no_text(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with patch("modegpt.pipeline.read_text", side_effect=AssertionError("text was read")):
        outcome = run_cli(
            "compress", tiny_checkpoint, "--method", "joint-rank-k", "--ratio", 0.2, "-o", tmp_path / "small"
        )
    assert outcome.code == 0, outcome.err
    report = modegpt.CompressionReport.read(tmp_path / "small")
    assert (report.calibration.source, report.calibration.windows, report.calibration.tokens) == ("none", 0, 0)
    assert report.evaluation is None
    assert abs(report.block_parameters.removed - 0.2) < 0.01
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    counted = sum(t.numel() for name, t in tensors.items() if ".layers." in name and "rotary_pairs" not in name)
    assert counted == report.block_parameters.compressed
    found = run_cli("inspect", tmp_path / "small")
    assert found.code == 0
    assert "joint-rank-k" in found.out


@pytest.mark.parametrize("method", ["svd", "joint-rank-k"])
def test_in_memory_nothing_but_the_model_is_needed(method: str) -> None:
    small = modegpt.compress(tiny_llama(), ratio=0.2, method=method)
    assert small.compression_report.calibration.source == "none"
    assert "factor_ranks" in small.config.to_dict()["per_layer_config"]["0"]


def test_it_reads_text_where_the_allocation_needs_it(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("--method", "joint-rank-k", "--allocation", "block-influence")
    outcome = run_cli(*compress_arguments(tiny_checkpoint, tmp_path / "small", text_file, *options))
    assert outcome.code == 0, outcome.err
    report = modegpt.CompressionReport.read(tmp_path / "small")
    assert report.calibration.windows == 8
    assert report.perplexity is not None


def test_perplexity_can_be_measured_without_calibrating(tiny_checkpoint: Path, text_file: Path, tmp_path: Path) -> None:
    options = ("--method", "svd", "--evaluate", text_file, "--sequence-length", 32)
    outcome = run_cli("compress", tiny_checkpoint, "--ratio", 0.2, "-o", tmp_path / "small", *options)
    assert outcome.code == 0, outcome.err
    report = modegpt.CompressionReport.read(tmp_path / "small")
    assert report.perplexity is not None
    assert report.calibration.tokens == 0


def test_plan_without_text_has_no_hidden_states(tiny_checkpoint: Path) -> None:
    outcome = run_cli("plan", tiny_checkpoint, "--method", "joint-rank-k", "--ratio", 0.2)
    assert outcome.code == 0, outcome.err
    assert "calibrate" not in outcome.out
    assert "solve" in outcome.out


@pytest.mark.parametrize("method", ["svd-llm", "joint-rank-k"])
def test_a_profile_serves_later_compressions(
    method: str, tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    own = ("--method", method, *(("--joint-only",) if method == "joint-rank-k" else ()))
    text = ("--calibration", text_file, "--samples", 4, "--sequence-length", 32)
    made = run_cli("profile", tiny_checkpoint, "-o", tmp_path / "profile", *own, *text)
    assert made.code == 0, made.err
    with patch("modegpt.pipeline.read_text", side_effect=AssertionError("text was read")):
        kept = run_cli(
            *("compress", tiny_checkpoint, "--profile-from", tmp_path / "profile", "--ratio", 0.2),
            *("-o", tmp_path / "small", *own),
        )
    assert kept.code == 0, kept.err
    options = (*own, *text, "--allocation", "sensitivity", "--evaluate", "none")
    at_once = run_cli("compress", tiny_checkpoint, "--ratio", 0.2, "-o", tmp_path / "at-once", *options)
    assert at_once.code == 0, at_once.err
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "at-once"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("method", ["svd-llm", "joint-rank-k"])
def test_from_disk_to_disk_is_the_same_as_in_memory(
    method: str, tiny_checkpoint: Path, text_file: Path, tmp_path: Path
) -> None:
    options = {"ratio": 0.3, "method": method, "allocation": "sensitivity", "samples": 6, "sequence_length": 32}
    request = RunConfig.validated(
        model=str(tiny_checkpoint), output=tmp_path / "small", calibration=str(text_file), **options
    )
    report = compress_to_directory(request)
    source = ModelSource(str(tiny_checkpoint))
    texts = read_texts(request, source.tokenizer())
    model = source.model("float32")
    engine = Engine(resident(model), texts.calibration, 1, probe=texts.probe_windows)
    with engine.active():
        expected = engine.run(request)
    written = modegpt.load(tmp_path / "small").state_dict()
    state = expected.model.state_dict()
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in state.items())
    assert [layer.modules for layer in report.layers] == [layer.modules for layer in expected.layers]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if "uniform" in method.allocations])
def test_layers_not_chosen_stay_whole(method: str) -> None:
    model = tiny_llama(num_hidden_layers=4, num_key_value_heads=4)
    options = {"layers": "1-2", "allocation": "uniform", "calibration": windows().ids}
    small = modegpt.compress(model, ratio=0.2, method=method, **options)
    report = small.compression_report
    kept = [{one.rank == one.full for one in layer.modules.values()} for layer in report.layers]
    assert kept[0] == kept[3] == {True}
    assert False in kept[1] | kept[2]
    assert abs(report.block_parameters.removed - 0.2) < 0.01


@pytest.mark.parametrize("allocation", ["block-influence", "sensitivity"])
def test_layers_can_be_chosen_with_every_allocation(allocation: str) -> None:
    small = modegpt.compress(
        tiny_llama(), ratio=0.2, method="svd-llm", layers="0,2", allocation=allocation, calibration=windows().ids
    )
    report = small.compression_report
    assert all(one.rank == one.full for one in report.layers[1].modules.values())
    assert abs(report.block_parameters.removed - 0.2) < 0.01


@pytest.mark.parametrize("joint_only", [False, True])
@pytest.mark.parametrize("layers", ["all", "1-2"])
def test_the_ratio_can_be_of_what_is_touched(joint_only: bool, layers: str) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=96, num_hidden_layers=4)
    small = modegpt.compress(
        model, ratio=0.25, method="joint-rank-k", joint_only=joint_only, layers=layers, ratio_of="touched"
    )
    count = 4 if layers == "all" else 2
    joint = 2 * 64 * 96 + 64 * (64 + 32)
    touched = count * (joint if joint_only else joint + 64 * 96 + 64 * (64 + 32))
    report = small.compression_report
    gone = report.block_parameters.dense - report.block_parameters.compressed
    assert abs(gone - 0.25 * touched) < 2 * (64 + 2 * 96)
    names = set(small.config.per_layer_config[1].factor_ranks)
    assert names == {"q_proj+k_proj", "gate_proj+up_proj"} | (
        set() if joint_only else {"v_proj", "o_proj", "down_proj"}
    )


def test_joint_only_leaves_maps_without_a_partner_bit_for_bit() -> None:
    model = tiny_llama()
    small = modegpt.compress(model, ratio=0.2, method="joint-rank-k", joint_only=True)
    for layer, thin in zip(model.model.layers, small.model.layers, strict=True):
        for path in ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"):
            assert torch.equal(layer.get_submodule(path).weight, thin.get_submodule(path).weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "2-1"}, "--layers '2-1': a range ends before it begins"),
        ({"layers": "one"}, "--layers 'one': use 'all' or numbers"),
        ({"layers": "1-5"}, "--layers 1-5: MODEL has layers 0 to 2"),
        ({"method": "shortgpt", "layers": "1-2"}, "--method shortgpt chooses among all layers itself"),
        ({"method": "svd", "joint_only": True}, "--joint-only True: only --method joint-rank-k"),
        ({"method": "svd", "ratio_of": "heads"}, "--ratio-of 'heads'"),
        ({"method": "joint-rank-k", "joint_only": True, "ratio": 0.9}, "--ratio 0.9 is out of reach"),
        ({"method": "joint-rank-k", "joint_only": True, "modules": "vo"}, "--ratio 0.2 is out of reach"),
        ({"method": "svd", "modules": "heads"}, "--modules 'heads': unknown module"),
        (
            {"method": "svd", "ratio_of": "touched", "ratio": None, "target_parameters": 5000},
            "--ratio-of touched goes with --ratio, not --target-parameters",
        ),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        modegpt.compress(tiny_llama(), calibration=windows().ids, **{"ratio": 0.2} | options)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "none"}, "--calibration 'none': --method and --allocation need text"),
        (
            {"method": "svd", "allocation": "sensitivity", "calibration": "none"},
            "--calibration 'none': --method and --allocation need text",
        ),
        ({"method": "svd", "evaluate": "held-out"}, "--evaluate 'held-out': there is no calibration text"),
    ],
)
def test_text_that_is_missing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        RunConfig.validated(model="m", output="o", ratio=0.2, **options)
    assert message in str(refused.value)


def test_attention_modules_of_whole_layers_have_no_shared_input() -> None:
    model = tiny_llama()
    ranks = shares(model, JointRankK(), 0.5, 1, 1)
    small = compress_to(model, JointRankK(), ranks).model
    assert all(attention_of(layer).shared_input is None for layer in layers_of(small))


@pytest.mark.parametrize("method", ["svd", "joint-rank-k"])
@pytest.mark.parametrize("part", ["mlp", "self_attn"])
def test_modules_with_factors_are_of_another_class_than_whole_ones(method: str, part: str, tmp_path: Path) -> None:
    """Engines that look at one module of a class take all others for alike."""
    model = tiny_llama()
    small = modegpt.compress(model, calibration=token_windows(8, 32), ratio=0.2, method=method, layers="1-2")
    modegpt.save(small, tmp_path / "small")
    for one in (small, modegpt.load(tmp_path / "small")):
        whole, *factorised = (type(getattr(layer, part)) for layer in layers_of(one))
        assert len(set(factorised)) == 1
        assert whole not in factorised
        assert issubclass(factorised[0], whole)


def test_modules_with_other_maps_in_two_are_of_another_class() -> None:
    layers = [tiny_llama().model.layers[0] for _ in range(3)]
    for layer, path in zip(layers, ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_proj"), strict=True):
        factorise(layer, {path: [path]}, {path: 4})
    one, other, again = (type(layer.mlp) for layer in layers)
    assert one is again
    assert one is not other
    assert one.__name__ == other.__name__ == "FactorisedLlamaMLP"
