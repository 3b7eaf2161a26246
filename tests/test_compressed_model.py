"""The compressed model as a Transformers model: from disk and back, caches, kernels, gradients, bad files."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel, pipeline

import modegpt
from helpers import assert_loads_alone, tiny_llama, tiny_tokenizer
from modegpt import modeling
from modegpt.budget import LayerRanks
from modegpt.data import TokenWindows
from modegpt.engine import Engine
from modegpt.layered import resident
from modegpt.methods import ModeGPT
from modegpt.modeling import CompactAttention
from modegpt.modeling.modeling_sizes import LayerSizes
from modegpt.results import Choice

RANKS = [LayerRanks(mlp=30, qk=3, vo=4), LayerRanks(mlp=20, qk=2, vo=7), LayerRanks(mlp=48, qk=4, vo=8)]
IDS = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(3))


def compressed(**overrides: object) -> PreTrainedModel:
    """Layers with values narrower than, wider than, and as wide as queries and keys."""
    model = tiny_llama(**overrides)
    windows = TokenWindows(torch.randint(0, 128, (8, 16), generator=torch.Generator().manual_seed(1)))
    engine = Engine(resident(model), windows, 4)
    with engine.active():
        return engine.compress(ModeGPT(1e-4), Choice(RANKS, [{}] * 3), sequential=True).model


@pytest.fixture(scope="module", params=["grouped", "multi-head", "biased", "tied"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    overrides = {
        "grouped": {},
        "multi-head": {"num_key_value_heads": 4},
        "biased": {"attention_bias": True, "mlp_bias": True},
        "tied": {"tie_word_embeddings": True},
    }
    return compressed(**overrides[request.param])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    modegpt.save(compressed(), tmp_path / "model")
    return tmp_path / "model"


def logits(model: nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(**(inputs or {"input_ids": IDS})).logits


def greedy(model: PreTrainedModel, ids: torch.Tensor = IDS, **options: object) -> torch.Tensor:
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": 0,
    } | options
    return model.generate(ids, eos_token_id=None, **options)


def test_loaded_equals_in_memory_bit_for_bit(model: PreTrainedModel, tmp_path: Path) -> None:
    modegpt.save(model, tmp_path / "model")
    for loaded in (modegpt.load(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")):
        assert torch.equal(logits(loaded), logits(model))
        assert loaded.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])


def test_base_model_loads_alone(saved: Path) -> None:
    base = AutoModel.from_pretrained(saved).eval()
    whole = modegpt.load(saved)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_checkpoint_holds_the_small_tensors_only(saved: Path) -> None:
    tensors = load_file(saved / "model.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.weight"].shape == (4 * 6, 32)
    assert tensors["model.layers.0.self_attn.v_proj.weight"].shape == (2 * 4, 32)
    assert tensors["model.layers.1.self_attn.o_proj.weight"].shape == (32, 4 * 7)
    assert tensors["model.layers.1.mlp.down_proj.weight"].shape == (32, 20)
    assert tensors["model.layers.0.self_attn.rotary_pairs"].shape == (2, 3)
    assert tensors["model.layers.0.self_attn.rotary_pairs"].dtype == torch.int64
    assert not list(saved.glob("*.bin"))


def test_config_keeps_the_dense_values_and_gives_widths_per_layer(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["model_type"] == "modegpt_llama"
    assert (config["head_dim"], config["intermediate_size"]) == (8, 48)
    assert config["per_layer_config"]["1"] == {"intermediate_size": 20, "qk_head_dim": 4, "v_head_dim": 7}
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}


@pytest.mark.parametrize(
    ("widths", "dense", "served"),
    [
        ((20, 30), 64, 32),
        ((34, 58), 64, 64),
        ((66, 20), 128, 80),
        ((40, 44), 48, 48),
        ((6, 7), 8, 8),
        ((257, 3), 320, 320),
    ],
)
def test_kernels_and_engines_get_a_head_size_that_they_have(widths: tuple[int, int], dense: int, served: int) -> None:
    sizes = LayerSizes(16, *widths)
    assert sizes.head_dim(dense) == sizes.to_config(dense, 1)["head_dim"] == served


def test_loads_without_modegpt_installed(saved: Path, tmp_path: Path) -> None:
    assert_loads_alone({"alone": modegpt.load(saved)}, IDS, tmp_path)


def test_travelling_code_needs_nothing_but_torch_and_transformers(saved: Path) -> None:
    """Neither what Llama sends along nor any other family's file: each comes with those of ours that it imports."""
    files = {path.name: path.read_text() for path in Path(modeling.__file__).parent.glob("modeling_*.py")}
    assert files.keys() >= {f"{family.config.__module__.split('.')[-1]}.py" for family in modeling.FAMILIES.values()}
    parts = ("modegpt", "description", "sizes", "norm", "factors", "slices", "modegpt_llama")
    sent = {f"modeling_{part}.py" for part in parts}
    assert {path.name: path.read_text() for path in saved.glob("*.py")} == {name: files[name] for name in sent}
    allowed = {*sys.stdlib_module_names, "torch", "transformers", *(f".{name.removesuffix('.py')}" for name in files)}
    for name, text in files.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, name
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                assert ("." * node.level + module if node.level else module.split(".")[0]) in allowed, name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_cached_generation_equals_uncached(model: PreTrainedModel, implementation: str) -> None:
    model.set_attn_implementation(implementation)
    try:
        expected = greedy(model, use_cache=False)
        assert torch.equal(greedy(model), expected)
        assert torch.equal(greedy(model, cache_implementation="static", disable_compile=True), expected)
    finally:
        model.set_attn_implementation("sdpa")


def test_sdpa_and_eager_agree(model: PreTrainedModel) -> None:
    fused = logits(model)
    model.set_attn_implementation("eager")
    try:
        attentions = {m.config._attn_implementation for m in model.modules() if isinstance(m, CompactAttention)}
        assert attentions == {"eager"}
        torch.testing.assert_close(logits(model), fused, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            weights = model(IDS, output_attentions=True).attentions
        assert len(weights) == 3
        torch.testing.assert_close(weights[0].sum(-1), torch.ones(2, 4, 12))
    finally:
        model.set_attn_implementation("sdpa")


def test_left_padded_batch_equals_single(model: PreTrainedModel) -> None:
    short = IDS[1:, 4:]
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.int64), short), dim=1)
    batch = torch.cat((IDS[:1], padded))
    mask = torch.ones_like(batch)
    mask[1, :4] = 0
    together = greedy(model, batch, attention_mask=mask)[:, 12:]
    alone = [greedy(model, ids)[:, ids.shape[1] :] for ids in (IDS[:1], short)]
    assert torch.equal(together, torch.cat(alone))


def test_beams_and_chunked_prefill_run(model: PreTrainedModel) -> None:
    assert greedy(model, num_beams=3).shape == (2, 24)
    assert torch.equal(greedy(model, prefill_chunk_size=5), greedy(model))


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    model = compressed()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(logits(compiled, input_ids=IDS, use_cache=False), logits(model), rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_parameter(model: PreTrainedModel) -> None:
    model.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    model.zero_grad()


def test_casting_keeps_the_rotary_pairs(saved: Path) -> None:
    loaded = modegpt.load(saved, dtype="bfloat16")
    attention = loaded.model.layers[0].self_attn
    assert attention.q_proj.weight.dtype == torch.bfloat16
    assert attention.rotary_pairs.dtype == torch.int64
    error = (logits(loaded).float() - logits(modegpt.load(saved))).norm() / logits(modegpt.load(saved)).norm()
    assert error < 0.05


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 32},
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_embeddings_survive(rope: dict[str, object], tmp_path: Path) -> None:
    parameters = {"rope_parameters": {"rope_theta": 10000.0, **rope}}
    dense = tiny_llama(**parameters)
    engine = Engine(resident(dense), TokenWindows(IDS), 2)
    with engine.active():
        full = engine.compress(
            ModeGPT(1e-4), Choice([LayerRanks(mlp=48, qk=4, vo=8)] * 3, [{}] * 3), sequential=True
        ).model
    long = torch.arange(100)[None]
    torch.testing.assert_close(logits(full, input_ids=long), logits(dense, input_ids=long), rtol=1e-4, atol=1e-4)
    thin = compressed(**parameters)
    modegpt.save(thin, tmp_path / "model")
    assert torch.equal(logits(modegpt.load(tmp_path / "model"), input_ids=long), logits(thin, input_ids=long))


def test_saved_from_transformers_stays_complete(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.save_pretrained(tmp_path / "again")
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == {path.name for path in saved.glob("*.py")}
    assert torch.equal(logits(modegpt.load(tmp_path / "again")), logits(model))
    assert AutoConfig.from_pretrained(tmp_path / "again").auto_map == AutoConfig.from_pretrained(saved).auto_map


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["per_layer_config"]["0"] |= changes
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "changes",
    [
        *({"qk_head_dim": value} for value in (5, -2, None)),
        *({"v_head_dim": value} for value in (9, "4")),
        *({"intermediate_size": value} for value in (49, 31, True)),
    ],
)
def test_nonsense_widths_are_refused(saved: Path, changes: dict[str, object]) -> None:
    edit_config(saved, **changes)
    with pytest.raises(modegpt.CheckpointError):
        modegpt.load(saved)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "range", "order", "truncated", "absent"])
def test_damaged_weights_are_refused(saved: Path, damage: str) -> None:
    path = saved / "model.safetensors"
    tensors = load_file(path)
    pairs = tensors["model.layers.0.self_attn.rotary_pairs"]
    match damage:
        case "missing":
            del tensors["model.layers.0.self_attn.rotary_pairs"]
        case "extra":
            tensors["model.layers.0.mlp.another.weight"] = torch.zeros(1)
        case "shape":
            tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(32, 21)
        case "range":
            pairs[0, -1] = 4
        case "order":
            pairs[0] = pairs[0].flip(0)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "absent":
        path.unlink()
    else:
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(modegpt.CheckpointError):
        modegpt.load(saved)


def test_a_dense_model_is_not_a_compressed_checkpoint(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(modegpt.CheckpointError, match="model type 'llama'"):
        modegpt.load(tmp_path / "dense")
    shutil.rmtree(tmp_path / "dense")
    with pytest.raises(modegpt.CheckpointError):
        modegpt.load(tmp_path / "dense")


@pytest.mark.parametrize("known", [False, True])
def test_loading_never_runs_code_from_the_directory(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Not even when the question Transformers would ask is answered with yes."""
    canary = tmp_path / "canary"
    (saved / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    config = json.loads((saved / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    config["model_type"] = config["model_type"] if known else "evil"
    (saved / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    if known:
        modegpt.load(saved)
    else:
        with pytest.raises(modegpt.CheckpointError):
            modegpt.load(saved)
    assert not canary.exists()


def test_text_generation_pipeline_runs() -> None:
    tokenizer = tiny_tokenizer("a few words " * 20)
    generate = pipeline("text-generation", model=compressed(vocab_size=320), tokenizer=tokenizer)
    assert generate("a few", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("a few")
