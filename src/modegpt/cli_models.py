"""The commands on models that are there: measure, show, write for other engines, upload."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .cli_options import Device, Dtype, Quiet, Trust
from .data import HUB_DATASETS

if TYPE_CHECKING:
    from .results_file import ResultsFile

Models = Annotated[
    list[str],
    typer.Argument(
        help="Compressed checkpoints, or any MODEL that `compress` takes; the others are compared with the first.",
        metavar="MODEL...",
    ),
]
Numbers = Annotated[Path | None, typer.Option("--output", "-o", help="Also write all numbers into this .json file.")]
Perplexity = Annotated[
    str | None,
    typer.Option(
        help=f"Texts: {', '.join(HUB_DATASETS)} (their test parts), or text files, separated by commas. "
        "wikitext2 where no --tasks are given."
    ),
]
Stride = Annotated[
    int | None,
    typer.Option(
        help="Windows begin every so many tokens, and only tokens that no window before had count. By default they "
        "follow one another."
    ),
]
TaskNames = Annotated[
    str | None,
    typer.Option(help="Tasks of lm-evaluation-harness, separated by commas: arc_easy,piqa,... (needs lm-eval)."),
]
TaskData = Annotated[
    Path | None,
    typer.Option(help="Directory with the tasks' data, TASK_SPLIT.jsonl or .jsonl.gz, in place of the hub's."),
]


def evaluate(
    models: Models,
    perplexity: Perplexity = None,
    samples: Annotated[int | None, typer.Option(help="Windows from the start of a text; all by default.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    stride: Stride = None,
    tasks: TaskNames = None,
    task_data: TaskData = None,
    limit: Annotated[int | None, typer.Option(help="Questions from the start of each task; all by default.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Answered examples before each question; by default what the task says.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in the tokenizer's chat template, as a user's turn.")
    ] = False,
    batch_size: Annotated[int, typer.Option(help="Windows, or answers of a task, run at once.")] = 1,
    output: Numbers = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Measure dense or compressed models, side by side: perplexity on texts, accuracy on tasks.

    Perplexity is exp of the mean negative log-likelihood over windows, without special tokens. Accuracies and their
    standard errors are those of lm-evaluation-harness.

    Example: **modegpt evaluate HuggingFaceTB/SmolLM2-135M small --tasks arc_easy,piqa --perplexity wikitext2,ptb**
    """
    arguments = dict(locals())
    from .comparison import Texts, compare, facts_of, split_names
    from .comparison_tables import print_scores
    from .console import choose_progress
    from .tasks import Tasks

    _goes_with("--perplexity", tasks is None or perplexity is not None, {"samples": samples, "stride": stride})
    options = {"task-data": task_data, "limit": limit, "num-fewshot": num_fewshot}
    _goes_with("--tasks", tasks is not None, options | {"apply-chat-template": "" if apply_chat_template else None})
    texts = asked = None
    if tasks is None or perplexity is not None:
        windows = {"samples": samples, "sequence_length": sequence_length, "stride": stride}
        texts = Texts.parse("wikitext2" if perplexity is None else perplexity, **windows)
    if tasks is not None:
        asked = Tasks(split_names(tasks, "--tasks"), task_data, limit, num_fewshot, apply_chat_template)
    file = _results_file(output, arguments)
    scores = compare(
        models,
        texts,
        asked,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=choose_progress(Console(stderr=True), quiet),
        finished=(lambda found: file.write(facts_of(found))) if file else None,
    )
    print_scores(Console(), scores)


def _results_file(output: Path | None, arguments: dict[str, Any]) -> ResultsFile | None:
    """The file that ``output`` names, with the ``arguments`` of the command."""
    from .results_file import ResultsFile

    settings = {name: value for name, value in arguments.items() if name not in ("models", "output", "quiet")}
    return None if output is None else ResultsFile(output, shlex.join(["modegpt", *sys.argv[1:]]), settings)


def _goes_with(needed: str, given: bool, options: dict[str, Any]) -> None:
    """Refuse ``options`` that say something of what is not measured."""
    from .errors import InvalidRequest

    for name, value in options.items():
        if value is not None and not given:
            raise InvalidRequest(f"{f'--{name} {value}'.strip()}: goes with {needed}, which is not given")


def bench(
    models: Models,
    batch_sizes: Annotated[str, typer.Option(help="Numbers of sequences, separated by commas.")] = "1,8",
    sequence_length: Annotated[str, typer.Option(help="Lengths of prompts in tokens, separated by commas.")] = "256",
    new_tokens: Annotated[int, typer.Option(help="Tokens that follow the first one, one by one.")] = 32,
    repeats: Annotated[int, typer.Option(help="How often each model is measured, in turn with the others.")] = 5,
    threads: Annotated[int | None, typer.Option(help="Processor threads; by default PyTorch's choice.")] = None,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Compile the models first, by torch.compile (needs a C++ compiler or Triton)."),
    ] = False,
    output: Numbers = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Measure how fast dense and compressed models are, side by side in one process.

    Prompts and greedy continuations of random tokens, each model in turn; ratios to the first model are taken within a
    repeat.

    Example: **modegpt bench HuggingFaceTB/SmolLM2-135M small --batch-sizes 1,8 --threads 2**
    """
    arguments = dict(locals())
    import torch

    from .bench import Load, facts_of, measure
    from .comparison_tables import print_speeds
    from .console import choose_progress
    from .errors import InvalidRequest

    sizes, lengths = _numbers("batch-sizes", batch_sizes), _numbers("sequence-length", sequence_length)
    load = Load(sizes, lengths, new_tokens, repeats)
    file = _results_file(output, arguments)
    if threads is not None:
        if threads < 1:
            raise InvalidRequest(f"--threads {threads}: must be at least 1")
        torch.set_num_threads(threads)
    speeds = measure(
        models,
        load,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        compiled=compile,
        progress=choose_progress(Console(stderr=True), quiet),
    )
    if file is not None:
        file.write(facts_of(speeds, load))
    print_speeds(Console(), speeds, load)


def _numbers(option: str, given: str) -> list[int]:
    from .errors import InvalidRequest

    if not all(one.strip().isdecimal() for one in given.split(",")):
        raise InvalidRequest(f"--{option} {given!r}: give whole numbers separated by commas")
    return [int(one) for one in given.split(",")]


def report(
    checkpoints: Annotated[list[Path], typer.Argument(help="Directories of compressed models.", metavar="DIR...")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .html file to write.")] = Path("report.html"),
    evaluation: Annotated[
        list[Path] | None, typer.Option(help="A file of evaluate --output; can be given several times.")
    ] = None,
    bench: Annotated[
        list[Path] | None, typer.Option(help="A file of bench --output; can be given several times.")
    ] = None,
    profile: Annotated[
        list[Path] | None,
        typer.Option(
            help="What modegpt profile wrote, for its curve beside what was measured; can be given several times."
        ),
    ] = None,
    figures: Annotated[Path | None, typer.Option(help="Also write all figures as PNG and SVG files into it.")] = None,
) -> None:
    """Write one page of HTML about compressed models: what they are, how good, how fast, layer by layer.

    It needs nothing but itself: no scripts, no files beside it.

    Example: **modegpt report small-20 small-30 --evaluation quality.json --bench speed.json -o report.html**
    """
    from .console import say
    from .curve import predicted_curve
    from .page import Bench, Checkpoint, Evaluation, Page, check_page, read_results

    check_page(output, figures)
    Page(
        [Checkpoint.read(directory) for directory in checkpoints],
        [read_results(path, Evaluation, "--evaluation") for path in evaluation or ()],
        [read_results(path, Bench, "--bench") for path in bench or ()],
        [predicted_curve(directory) for directory in profile or ()],
    ).write(output, figures)
    say(Console(), f"Written: {output}")


def push(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a compressed model.", metavar="DIR")],
    repository: Annotated[str, typer.Argument(help="Where to on the hub, such as name/smollm2-30.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made now: for the owner alone.")] = False,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Compressed with modegpt",
) -> None:
    """Upload a compressed model to the Hugging Face hub, with its model card.

    Log in first: **hf auth login**, or the environment variable HF_TOKEN.
    """
    from .console import say
    from .hub import push_to_hub

    say(Console(), f"Uploaded: {push_to_hub(checkpoint, repository, private=private, message=message)}")


def generate(
    model: Annotated[str, typer.Argument(help="A compressed checkpoint, or any MODEL that `compress` takes.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt in the model's chat template.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Continue PROMPT greedily."""
    from .address import open_model
    from .evaluation import generate_text

    tokenizer, _, open_it = open_model(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    text = generate_text(open_it(), tokenizer, prompt, max_new_tokens=max_new_tokens, chat=chat)
    print(text)


def export(
    model: Annotated[str, typer.Argument(help="A compressed checkpoint, or any MODEL that `compress` takes.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A .gguf file, or a directory for a stock model.")],
    format: Annotated[
        str,
        typer.Option(
            help="'gguf', a file for llama.cpp; 'stock', a plain Llama or Qwen3 that needs no code of modegpt's; "
            "'onnx', a graph for ONNX Runtime.",
        ),
    ],
    type: Annotated[
        str,
        typer.Option(
            help="What a GGUF file's matrices are stored as: f32, f16, bf16, q8_0, q4_0, ...; q4_k_m and the like."
        ),
    ] = "f16",
    pre_tokenizer: Annotated[
        str | None, typer.Option(help="llama.cpp's name for how the tokenizer splits text, where it cannot be told.")
    ] = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
    quiet: Quiet = False,
) -> None:
    """Write MODEL for other engines, which it computes the same in.

    Where the engine wants all heads or layers alike, zeros fill them up; how many is printed.
    """
    from .console import choose_progress, export_line, say
    from .exports.export import export as carry_out

    facts = carry_out(
        model,
        output,
        format,
        kind=type,
        pre_tokenizer=pre_tokenizer,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        progress=choose_progress(Console(stderr=True), quiet),
    )
    if not quiet:
        say(Console(), export_line(facts))


def inspect(
    directory: Annotated[Path, typer.Argument(help="A compressed checkpoint.", metavar="DIR")],
) -> None:
    """Show what was kept in each layer of a compressed checkpoint, and at what error."""
    from .console import experts_lines, layer_table, say, summary_table
    from .report import CompressionReport, RunFacts

    report = CompressionReport.read(directory)
    console = Console()
    console.print(summary_table(report, RunFacts.read(directory)))
    console.print(layer_table(report))
    for line in experts_lines(report):
        say(console, line)
    say(console, f"Made by: {report.command}")
