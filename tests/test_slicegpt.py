"""A residual stream of fewer directions: through the real pipeline, against the dense model projected, from disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

import modegpt
from family_table import BY_NAME, ROWS, layers_of
from helpers import assert_loads_alone, random_text, run_cli, tiny_llama, token_windows
from modegpt.activations import DiskActivations
from modegpt.budget import kept_parameters
from modegpt.config import CompressionConfig, RunConfig
from modegpt.data import TokenWindows
from modegpt.decompositions import principal_directions
from modegpt.engine import Compression, Engine
from modegpt.families import model_geometry
from modegpt.journal import Journal, work_directory
from modegpt.layered import resident
from modegpt.methods import SliceGPT
from modegpt.pipeline import compress_to_directory, read_texts
from modegpt.report import CompressionReport
from modegpt.results import Choice
from modegpt.slicing import Slicer, sliceable
from modegpt.sources import ModelSource

SLICED = [
    row.name for row in ROWS if row.model.startswith(("Llama", "Mis", "Min", "Qwen2", "Qwen3For", "Phi3", "GemmaF"))
]
#: One of each kind for what takes longer: tied, biases, two kinds of layers, normed queries, fused maps, scaled
#: embeddings with norms of 1 + weight.
KINDS = ["llama-gqa", "llama-tied", "llama-biases", "ministral", "qwen2-window", "qwen3", "phi3", "gemma"]


@cache
def dense(name: str) -> PreTrainedModel:
    """A row's stock model, not to be changed."""
    return BY_NAME[name].build()


def compress_to(
    model: PreTrainedModel, width: int, *, sequential: bool = True, windows: TokenWindows | None = None
) -> Compression:
    ranks = [{"stream": width} for _ in layers_of(model)]
    engine = Engine(resident(model), windows or token_windows(16), 4)
    with engine.active():
        return engine.compress(SliceGPT(), Choice(ranks, [{} for _ in ranks]), sequential=sequential)


def logits(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(token_windows(4, seed=2).ids if ids is None else ids, use_cache=False).logits


def deviation(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference in units of the largest value."""
    return float((actual - expected).abs().max() / expected.abs().max())


def test_the_families_that_can_be_sliced_are_found_by_what_their_layers_are() -> None:
    assert [row.name for row in ROWS if sliceable(layers_of(row.build())[0])] == [
        *SLICED,
        *(name for name in ("qwen3-moe", "qwen3-moe-normalised")),  # refused for their experts
    ]


# What it computes


@pytest.mark.parametrize("name", SLICED)
def test_with_all_directions_nothing_changes(name: str) -> None:
    result = compress_to(dense(name), 32)
    assert deviation(logits(result.model), logits(dense(name))) < 5e-5
    for layer in result.layers:
        assert layer.modules["stream"].relative_error == 0
    assert deviation(logits(compress_to(dense(name), 20).model), logits(dense(name))) > 1e-2


def confine(model: PreTrainedModel, width: int) -> None:
    """Let everything that writes the residual stream write but a few directions."""
    noise = torch.randn(32, width, generator=torch.Generator().manual_seed(5))
    directions = torch.linalg.qr(noise).Q
    projection = directions @ directions.T
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings.copy_(embeddings @ projection)
        for layer in layers_of(model):
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight.copy_(projection @ linear.weight)
                if linear.bias is not None:
                    linear.bias.copy_(projection @ linear.bias)


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", SLICED)
def test_directions_that_nothing_writes_go_without_a_trace(name: str, sequential: bool) -> None:
    model = BY_NAME[name].build(tie_word_embeddings=name in ("llama-tied", "gemma"))
    confine(model, 20)
    result = compress_to(model, 20, sequential=sequential)
    assert deviation(logits(result.model), logits(model)) < 1e-4
    for layer in result.layers:
        assert layer.modules["stream"].relative_error < 1e-3


def projected_stream(model: PreTrainedModel, windows: TokenWindows, width: int, *, sequential: bool) -> torch.Tensor:
    """The logits of a dense Llama whose stream is projected on its principal directions, calibrated on these windows.

    Written down as the paper has it, for all tokens at once.
    """
    decoder = model.model
    positions = decoder.rotary_emb(decoder.embed_tokens(windows.ids), torch.arange(windows.ids.shape[1])[None])

    def project(calibrated: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        rows = calibrated.double().flatten(0, 1)
        leading = principal_directions(rows.T @ rows).basis[:, :width]
        return (state.double() @ leading @ leading.T).float()

    with torch.no_grad():
        state = calibrated = decoder.embed_tokens(windows.ids)
        for layer in decoder.layers:
            for part, norm in ((layer.self_attn, layer.input_layernorm), (layer.mlp, layer.post_attention_layernorm)):
                options = {"position_embeddings": positions, "attention_mask": None} if part is layer.self_attn else {}

                def step(x: torch.Tensor, part: Any = part, norm: Any = norm, options: Any = options) -> torch.Tensor:
                    found = part(norm(x), **options)
                    return x + (found[0] if isinstance(found, tuple) else found)

                state = step(project(calibrated, state))
                calibrated = state if sequential else step(calibrated)
        return model.lm_head(decoder.norm(state))


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases"])
def test_it_is_the_dense_model_with_a_projected_stream(name: str, sequential: bool) -> None:
    windows = token_windows(16)
    found = logits(compress_to(dense(name), 22, sequential=sequential, windows=windows).model, windows.ids)
    expected = projected_stream(dense(name), windows, 22, sequential=sequential)
    assert deviation(found, expected) < 1e-4
    other = projected_stream(dense(name), windows, 22, sequential=not sequential)
    assert deviation(found, other) > 1e-2


def test_padding_does_not_count() -> None:
    ids, mask = token_windows(16).ids.clone(), torch.ones(16, 16, dtype=torch.bool)
    mask[:, 12:] = False
    results = []
    for filler in (0, 7):
        ids[:, 12:] = filler
        results.append(compress_to(dense("llama-gqa"), 20, windows=TokenWindows(ids, mask)).model)
    for name, tensor in results[0].state_dict().items():
        torch.testing.assert_close(tensor, results[1].state_dict()[name], rtol=1e-4, atol=1e-4)


def test_errors_are_the_share_of_energy_that_is_lost() -> None:
    model, windows = dense("llama-gqa"), token_windows(16)
    seen: list[torch.Tensor] = []
    layer = model.model.layers[0]
    handles = [
        getattr(layer, norm).register_forward_pre_hook(lambda _, args: seen.append(args[0].double().flatten(0, 1)))
        for norm in ("input_layernorm", "post_attention_layernorm")
    ]
    logits(model, windows.ids)
    for handle in handles:
        handle.remove()
    energies = [torch.linalg.svdvals(x).square() for x in seen]
    expected = sum(float(e[20:].sum() / e.sum()) for e in energies) / 2
    found = compress_to(model, 20, sequential=False).layers[0].modules["stream"]
    assert found.relative_error == pytest.approx(expected**0.5, rel=1e-4)


# The whole way


OPTIONS = {"method": "slicegpt", "ratio": 0.3, "samples": 6, "sequence_length": 32, "batch_size": 4}


@pytest.mark.parametrize("name", KINDS)
def test_the_whole_way(
    name: str, checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nothing here survives a crash of the machine anyhow
    directory = checkpoint(name)
    config = RunConfig.validated(model=str(directory), output=tmp_path / "whole", calibration=str(text_file), **OPTIONS)
    report = compress_to_directory(config)
    loaded = modegpt.load(tmp_path / "whole")

    # In memory the same comes out, with the same report.
    source = ModelSource(str(directory))
    stock, texts = source.model(), read_texts(config, source.tokenizer())
    before = {key: tensor.clone() for key, tensor in stock.state_dict().items()}
    thin = modegpt.compress(stock, calibration=texts.calibration, **OPTIONS)
    torch.testing.assert_close(dict(loaded.state_dict()), dict(thin.state_dict()), rtol=0, atol=0)
    assert [layer.modules for layer in report.layers] == [layer.modules for layer in thin.compression_report.layers]
    (held_out,) = texts.evaluation.values()
    measured = [modegpt.perplexity(model, held_out, batch_size=4) for model in (stock, thin)]
    assert report.perplexity is not None
    assert [report.perplexity.dense, report.perplexity.compressed] == pytest.approx(measured, rel=1e-5)

    # The dense model is as it was, and shares nothing with the other.
    torch.testing.assert_close(dict(stock.state_dict()), before, rtol=0, atol=0)
    addresses = {parameter.data_ptr() for parameter in stock.parameters()}
    assert addresses.isdisjoint(parameter.data_ptr() for parameter in thin.parameters())

    assert_counted(stock, loaded, report, tmp_path / "whole")

    # It generates with a cache as without.
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ids = token_windows(2, 9).ids
    expected = loaded.generate(ids, use_cache=False, **settings)
    assert torch.equal(loaded.generate(ids, **settings), expected)
    static = loaded.generate(ids, cache_implementation="static", disable_compile=True, **settings)
    assert torch.equal(static, expected)


def assert_counted(stock: PreTrainedModel, loaded: PreTrainedModel, report: CompressionReport, directory: Path) -> None:
    """All numbers of the report are those of the tensors on disk: adapters, narrow embeddings and untied head."""
    tensors = load_file(directory / "model.safetensors")
    weights = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    inside = [tensor.numel() for name, tensor in weights.items() if ".layers." in name]
    assert report.block_parameters.compressed == sum(inside) == sum(p.numel() for p in layers_of(loaded).parameters())
    assert report.parameters.compressed == sum(tensor.numel() for tensor in weights.values())
    assert report.bytes.compressed == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    ranks = [{"stream": layer.modules["stream"].rank} for layer in report.layers]
    geometry = model_geometry(stock, SliceGPT().geometry)
    assert kept_parameters(geometry, ranks) == sum(inside)

    width, vocabulary = ranks[0]["stream"], stock.config.vocab_size
    assert {rank["stream"] for rank in ranks} == {width}
    assert weights["model.embed_tokens.weight"].shape == (vocabulary, width)
    assert weights["lm_head.weight"].shape == (vocabulary, 32)
    adapters = [tuple(tensor.shape) for name, tensor in weights.items() if "adapter" in name]
    assert sorted(adapters) == [*[(width, width)] * 5, (32, width)]
    # One direction more or less would be further from what was asked for.
    sizes = [kept_parameters(geometry, [{"stream": width + step}] * 3) for step in (-1, 0, 1)]
    wanted = 0.7 * report.block_parameters.dense
    assert min(sizes, key=lambda size: abs(size - wanted)) == sizes[1]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "phi3"])
def test_an_interrupted_run_gives_the_same(
    name: str,
    offload: bool,
    checkpoint: Callable[[str], Path],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped wherever anything is finished: after each layer and, on disk, at every point."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    folder = {"offload_folder": tmp_path / "states"} if offload else {}

    def run(output: str) -> CompressionReport:
        return compress_to_directory(
            RunConfig.validated(
                model=str(checkpoint(name)), output=tmp_path / output, calibration=str(text_file), **OPTIONS, **folder
            )
        )

    report, done, steps = run("whole"), set[str](), []

    def stopping(original: Callable[..., None], kind: str) -> Callable[..., None]:
        def method(self: Any, index: int, *arguments: Any) -> None:
            original(self, index, *arguments)
            place = getattr(self, "_folder", tmp_path).name.partition("-")[0] if kind == "point" else kind
            steps.append(f"{place} {index}")
            if steps[-1] not in done:
                done.add(steps[-1])
                raise KeyboardInterrupt

        return method

    with (
        patch.object(Journal, "keep_layer", stopping(Journal.keep_layer, "layer")),
        patch.object(DiskActivations, "complete", stopping(DiskActivations.complete, "point")),
    ):
        for _ in range(20):
            try:
                resumed = run("resumed")
                break
            except KeyboardInterrupt:
                continue
    assert [step for step in steps if step.startswith("layer")] == ["layer 0", "layer 1", "layer 2"]
    if offload:  # from where it was: what was interrupted between its two parts is all that is repeated
        passed = [step for step in steps if step.partition(" ")[0] in ("compress", "middle")]
        first = ["compress 0", *["compress 0", "middle 0"] * 3]
        assert passed == [*first, "compress 1", *["middle 1"] * 3, "compress 2", *["middle 2"] * 2]
    assert resumed.layers == report.layers
    assert resumed.perplexity == report.perplexity
    whole, again = (load_file(tmp_path / output / "model.safetensors") for output in ("whole", "resumed"))
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert not work_directory(tmp_path / "resumed").exists()
    assert not offload or not list((tmp_path / "states").iterdir())


def test_a_damaged_layer_is_done_again(checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    config = RunConfig.validated(
        model=str(checkpoint("llama-gqa")), output=tmp_path / "out", calibration=str(text_file), **OPTIONS
    )
    whole = compress_to_directory(config.model_copy(update={"output": tmp_path / "whole"}))
    with patch("modegpt.pipeline._perplexities", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        compress_to_directory(config)
    (work_directory(tmp_path / "out") / "layers" / "00001.safetensors").write_bytes(b"damaged")
    written: list[int] = []
    write = Slicer._write

    def watched(self: Slicer, index: int, *arguments: Any) -> None:
        written.append(index)
        write(self, index, *arguments)

    with patch.object(Slicer, "_write", watched):
        report = compress_to_directory(config)
    assert written == [1]
    assert report.layers == whole.layers
    files = [load_file(tmp_path / output / "model.safetensors") for output in ("out", "whole")]
    torch.testing.assert_close(*files, rtol=0, atol=0)


def test_loads_without_modegpt_installed(tmp_path: Path) -> None:
    models = {name: compress_to(dense(name), 20).model for name in ("llama-tied", "phi3", "gemma")}
    assert_loads_alone(models, token_windows(4, seed=2).ids, tmp_path)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", KINDS)
def test_gradients_reach_every_parameter(name: str) -> None:
    small = compress_to(dense(name), 20).model.train()
    small.gradient_checkpointing_enable()
    ids = token_windows(2, seed=4).ids
    small(ids, labels=ids, use_cache=False).loss.backward()
    used = {key: parameter for key, parameter in small.named_parameters() if parameter.requires_grad}
    assert [key for key, parameter in used.items() if parameter.grad is None or not bool(parameter.grad.any())] == []


def test_dropouts_on_the_way_stay(tmp_path: Path) -> None:
    small = compress_to(BY_NAME["phi3"].build(resid_pdrop=0.5), 20).model
    same = logits(small)
    small.train()
    assert deviation(logits(small), same) > 1e-2


# What is refused


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "model"
    modegpt.save(compress_to(tiny_llama(), 20).model, directory)
    return directory


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stream_width": 0}, r"per_layer_config\[1\].stream_width is 0"),
        ({"stream_width": 33}, r"per_layer_config\[1\].stream_width is 33; expected 1 to 32"),
        ({"stream_width": "20"}, r"per_layer_config\[1\].stream_width is '20'"),
        ({"stream_width": True}, r"per_layer_config\[1\].stream_width is True"),
        ({"stream_width": 19}, "mismatched"),
        ({"stream_width": None}, r"per_layer_config\[1\].stream_width is missing"),
        ({"factor_ranks": {"q_proj": 3}}, r"per_layer_config\[1\].stream_width: not together"),
    ],
    ids=str,
)
def test_nonsense_widths_are_refused(saved: Path, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    for path in saved.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    values = json.loads((directory / "config.json").read_text())
    for layer in values["per_layer_config"].values():  # what some layers have, all have
        layer |= {name: {} for name in changes if name == "factor_ranks"}
    values["per_layer_config"]["1"] |= changes
    (directory / "config.json").write_text(json.dumps(values))
    with pytest.raises(modegpt.CheckpointError, match=words):
        modegpt.load(directory)


def test_a_stream_that_cannot_be_sliced_is_refused_in_a_config(tmp_path: Path) -> None:
    model = dense("gpt2")
    small = modegpt.compress(model, ratio=0.2, method="svd")
    modegpt.save(small, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    values = json.loads(file.read_text())
    for layer in values["per_layer_config"].values():
        layer |= {"stream_width": 20, "factor_ranks": {}}
    file.write_text(json.dumps(values))
    with pytest.raises(modegpt.CheckpointError, match="stream_width: a GPT2Block cannot be sliced"):
        modegpt.load(tmp_path / "model")


def refused(model: Path, text_file: Path, output: Path, *options: object) -> str:
    """The one line that a command is refused with, before it has written anything."""
    outcome = run_cli(
        *("compress", model, "--method", "slicegpt", "--output", output),
        *("--calibration", text_file, "--samples", 4, "--sequence-length", 32, *options),
    )
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert not output.exists()
    assert not work_directory(output).exists()
    return outcome.err


OTHERS = ["gemma2", "gemma3", "phi", "opt", "gpt2", "gpt-neox", "gpt-neox-sequential", "stablelm", "olmo2", "granite"]
OTHERS += ["cohere", "starcoder2", "mixtral", "qwen3-moe"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_layers_are_refused(
    name: str, checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    line = refused(checkpoint(name), text_file, tmp_path / "out", "--ratio", 0.3)
    assert "--method slicegpt needs layers" in line
    assert "use greedy or modegpt" in line
    with pytest.raises(modegpt.InvalidRequest, match="--method slicegpt needs layers"):
        modegpt.compress(dense(name), ratio=0.3, method="slicegpt", calibration=token_windows().ids)


def test_what_cannot_be_reached_is_refused(checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    model = checkpoint("llama-gqa")

    def line(*options: object) -> str:
        return refused(model, text_file, tmp_path / "out", *options)

    assert "at most 0.678 of the decoder blocks' parameters can go" in line("--ratio", 0.7, "--align", 8)
    assert "--align 32: at most 0 of" in line("--ratio", 0.1, "--align", 32)
    assert "--allocation" in line("--ratio", 0.3, "--allocation", "uniform")
    assert "--layers" in line("--ratio", 0.3, "--layers", "1-2")
    assert "use stream" in line("--ratio", 0.3, "--modules", "mlp")
    assert "--target-parameters: --method slicegpt resizes the embeddings" in line("--target-parameters", "20K")
    assert "--target-size: --method slicegpt" in line("--target-size", "80KB")


def test_what_enters_the_stream_elsewhere_is_refused() -> None:
    model = tiny_llama()
    model.model.positions = nn.Parameter(torch.zeros(32))
    with pytest.raises(modegpt.InvalidRequest, match="--method slicegpt: positions of MODEL"):
        modegpt.compress(model, ratio=0.3, method="slicegpt", calibration=token_windows().ids)


def test_it_has_nothing_to_profile(checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    outcome = run_cli(
        *("profile", checkpoint("llama-gqa"), "--method", "slicegpt", "--output", tmp_path / "profile"),
        *("--calibration", text_file),
    )
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert "slicegpt" in outcome.err


@pytest.mark.parametrize("align", [1, 4, 8])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_the_width_is_the_nearest_multiple(ratio: float, align: int) -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=96)
    small = modegpt.compress(model, ratio=ratio, method="slicegpt", align=align, calibration=token_windows().ids)
    report = small.compression_report
    width = report.layers[0].modules["stream"].rank
    assert width % align == 0
    geometry = model_geometry(model, SliceGPT().geometry)
    sizes = {one: kept_parameters(geometry, [{"stream": one}] * 3) for one in range(align, 64, align)}
    wanted = (1 - ratio) * report.block_parameters.dense
    assert width == min(sizes, key=lambda one: abs(sizes[one] - wanted))
    assert report.block_parameters.compressed == sizes[width]


def test_the_overview_names_it_and_a_plan_is_made(
    checkpoint: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    outcome = run_cli("plan", checkpoint("llama-tied"), "--method", "slicegpt", "--ratio", 0.3, "--sequence-length", 32)
    assert (outcome.code, outcome.err) == (0, "")
    assert "calibrate" in outcome.out
    assert "scores" not in outcome.out
    config = CompressionConfig.validated(method="slicegpt", ratio=0.3)
    assert (config.allocation, config.statistics, config.modules) == ("own", "sequential", ("stream",))
    text = tmp_path / "long.txt"
    text.write_text(random_text(100, seed=3))
    options = ("--samples", 4, "--sequence-length", 32, "--quiet")
    arguments = ("--ratio", 0.3, "--output", tmp_path / "out", "--calibration", text, *options)
    assert run_cli("compress", checkpoint("llama-tied"), "--method", "slicegpt", *arguments).code == 0
    shown = run_cli("inspect", tmp_path / "out")
    assert shown.code == 0
    assert "STREAM" in shown.out
