"""From a model's address to a compressed checkpoint: refuse early, then read, compress, evaluate, write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, cast, get_args

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from .checkpoint import check_output, load, publish, published
from .config import HELD_OUT, NONE, RunConfig
from .data import (
    HUB_DATASETS,
    SELF,
    TokenWindows,
    check_length,
    check_source,
    first_windows,
    other_windows,
    random_windows,
    read_text,
    sample_from_model,
    split_held_out,
    start_token,
    tokenize,
)
from .engine import Compression, Engine
from .errors import InvalidRequest
from .evaluation import perplexity
from .families import check_family, check_model
from .journal import Journal, check_unfinished, open_journal
from .layered import LayeredModel
from .modeling import is_compressed
from .parallel import Workers, local_device, processes, restarts, workers
from .plan import Plan, Shape, check_plan, make_plan
from .profile import probe_windows
from .progress import Progress
from .report import (
    CompressionReport,
    Pair,
    RunFacts,
    TextFacts,
    build_report,
    peak_device_memory,
    peak_memory,
    versions,
)
from .sources import Dtype, ModelSource, check_vocabulary, usable_device


@dataclass(frozen=True)
class Request:
    """A compression that was found possible, and what was read to find out."""

    config: RunConfig
    source: ModelSource
    model_config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    plan: Plan


@dataclass(frozen=True)
class Texts:
    """The windows of a run; None where they can only be made once the model is loaded, or are not wanted."""

    calibration: TokenWindows | None
    evaluation: TokenWindows | None
    probe: TokenWindows | None = None
    """What sensitivities are measured on; None where that is some of the calibration windows."""


def compress_to_directory(
    config: RunConfig,
    progress: Progress | None = None,
    *,
    command: str | None = None,
    show: Callable[[Plan], object] | None = None,
) -> CompressionReport:
    """Carry out ``config``: everything wrong is refused before any weight is loaded.

    An interrupted run of the same config goes on where it was. Under ``torchrun`` the processes share the work.
    ``command`` is what the report says to repeat it with; without, this call. ``show`` is called with the plan.
    """
    request = check_request(config, timed=show is not None)
    if show is not None:
        show(request.plan)
    with workers(request.config.device) as crew:
        return _compress(request, (progress or Progress()) if crew.first else Progress(), crew, command)


def check_request(config: RunConfig, *, timed: bool) -> Request:
    """Refuse whatever is wrong with ``config`` or does not fit this machine; ``timed`` plans take some seconds more."""
    # Of a group that torchrun started again, nothing is to be thrown away a second time.
    config = config.model_copy(
        update={"device": local_device(config.device), "restart": config.restart and restarts() == 0}
    )
    source = ModelSource(config.model, config.trust_remote_code)
    source.check()
    texts_read = [name for name in (config.calibration, config.evaluate) if Path(name).is_file()]
    finished = published(config.output) and not config.restart
    if not finished:
        check_output(config.output, overwrite=config.overwrite, inputs=[config.model, *texts_read])
    if config.calibration != NONE:
        check_source(config.calibration, option="--calibration", allow_self=True)
    if config.evaluate not in (HELD_OUT, NONE):
        check_source(config.evaluate, option="--evaluate")
    if len(texts_read) == 2 and Path(config.evaluate).samefile(config.calibration):
        raise InvalidRequest(
            f"--evaluate {config.evaluate!r} is the calibration text; use 'held-out' to keep a part of it"
        )
    batches = math.ceil(config.samples / config.batch_size)
    count = processes(config.devices, config.device)
    if config.calibrates and count > batches:
        raise InvalidRequest(
            f"--devices {count}: there are {batches} batches to share; use fewer processes, more "
            "--samples or a smaller --batch-size"
        )
    model_config, plan, shape = plan_request(config, timed=timed)
    if not finished:
        check_plan(plan, config, shape)
    tokenizer = source.tokenizer()
    check_vocabulary(tokenizer, model_config)
    if config.calibration == SELF:
        start_token(tokenizer)
    return Request(config, source, model_config, tokenizer, plan)


def check_start(config: RunConfig) -> None:
    """Refuse, before processes are started, whatever they would refuse."""
    request = check_request(config, timed=False)
    check_unfinished(config.output, _fingerprint(request, read_texts(config, request.tokenizer)), config.restart)


def plan_request(config: RunConfig, *, timed: bool = True) -> tuple[PreTrainedConfig, Plan, Shape]:
    """The model's config, what ``config`` will take, and the shape that this follows from."""
    source = ModelSource(config.model, config.trust_remote_code)
    model_config = source.config()
    check_family(model_config)
    if config.calibrates or config.evaluate != NONE:
        check_length(config.sequence_length, model_config)
    return model_config, *make_plan(config, source, model_config, timed=timed)


def _compress(request: Request, progress: Progress, crew: Workers, command: str | None) -> CompressionReport:
    config, source = request.config, request.source
    with progress.phase("text"):
        texts = read_texts(config, request.tokenizer)
    with progress.phase("load"):
        dense = source.streamed(request.model_config, config.dtype, config.device)
    check_model(dense.model, loaded=False)
    with _journal(request, texts, crew) as journal:
        if crew.tell(journal is not None and published(config.output)):
            report = CompressionReport.read(config.output)
            if journal is not None:
                journal.remove()
            return report
        if journal is not None and journal.starts > 1:
            again = f"; done again because damaged: {', '.join(map(str, journal.broken))}" if journal.broken else ""
            progress.note(f"Going on with an interrupted run: {len(journal.finished)} layers are finished{again}")
        calibration, evaluation = _sampled(request, texts, journal, crew, progress)
        batch_size = config.batch_size
        engine = Engine(
            dense, calibration, batch_size, probe=texts.probe, progress=progress, workers=crew, journal=journal
        )
        with engine.active():
            result = engine.run(config)
        report = build_report(
            dense.model,
            result,
            config,
            TextFacts.of(config.calibration, calibration),
            command=command or f"modegpt.compress_to_directory({config!r})",
            source=config.model,
            evaluation=_evaluation_facts(config, evaluation),
            perplexity=_perplexities(engine, result, evaluation, journal, crew, progress),
        )
        if journal is not None:
            _publish(request, journal, result, report, crew, progress)
        return report


def _publish(
    request: Request,
    journal: Journal,
    result: Compression,
    report: CompressionReport,
    crew: Workers,
    progress: Progress,
) -> None:
    """Put the checkpoint in its place, with what the run took beside it."""
    facts = RunFacts(
        seconds=progress.seconds,
        peak_memory_bytes=peak_memory(),
        peak_device_memory_bytes=peak_device_memory(result.thin.device),
        processes=crew.size,
        starts=journal.starts,
        planned=request.plan.model_dump(mode="json"),
    )
    config = request.config
    publish(
        journal,
        result.thin,
        config.output,
        tokenizer=request.tokenizer,
        report=report,
        run=facts,
        overwrite=config.overwrite,
    )


@contextmanager
def _journal(request: Request, texts: Texts, crew: Workers) -> Iterator[Journal | None]:
    """The run's journal, for the first worker."""
    if not crew.first:
        yield None
        return
    config = request.config
    fingerprint = _fingerprint(request, texts)
    with open_journal(config.output, fingerprint, restart=config.restart, offload=config.offload_folder) as journal:
        yield journal


def _fingerprint(request: Request, texts: Texts) -> dict[str, Any]:
    """Everything that the result depends on."""
    config = request.config
    options = {f"--{name.replace('_', '-')}": value for name, value in config.settings().items()}
    del options["--model"], options["--trust-remote-code"]  # what counts is the model that was found there
    options["--device"] = torch.device(config.device).type
    tokens = {"calibration": texts.calibration, "evaluation": texts.evaluation, "probe": texts.probe}
    return {
        "the model's config": sha256(request.model_config.to_json_string().encode()).hexdigest(),
        "the model's weights": request.source.fingerprint(),
        **options,
        **{f"the {name} tokens": None if windows is None else windows.sha256() for name, windows in tokens.items()},
        **{f"the version of {name}": number for name, number in versions().items()},
    }


def read_texts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Calibration and evaluation windows. Held-out windows never overlap calibration windows."""
    length, count = config.sequence_length, config.evaluation_samples
    calibration_what, evaluation_what = f"--calibration {config.calibration}", f"--evaluate {config.evaluate}"
    held_out: torch.Tensor | None = None
    calibration: TokenWindows | None = None
    probe: TokenWindows | None = None
    reads = config.calibrates or config.evaluate == HELD_OUT
    if config.calibration not in (SELF, NONE) and reads:
        ids = tokenize(tokenizer, read_text(config.calibration))
        reserved = 0
        if config.evaluate == HELD_OUT and config.calibration in HUB_DATASETS:
            held_out = tokenize(tokenizer, read_text(config.calibration, evaluation=True))
        elif config.evaluate == HELD_OUT:
            ids, held_out = split_held_out(ids, length)
            reserved = len(held_out)
        if config.calibrates:
            calibration = random_windows(
                ids, config.samples, length, config.seed, what=calibration_what, reserved=reserved
            )
        if config.allocation == "sensitivity":
            probe = other_windows(ids, probe_windows(length), length, config.seed, but=config.samples)
    if config.evaluate not in (HELD_OUT, NONE):
        held_out = tokenize(tokenizer, read_text(config.evaluate, evaluation=True))
    if held_out is None:
        return Texts(calibration, None, probe)
    available = max(1, min(count, len(held_out) // length))
    return Texts(calibration, first_windows(held_out, available, length, what=evaluation_what), probe)


def _sampled(
    request: Request, texts: Texts, journal: Journal | None, crew: Workers, progress: Progress
) -> tuple[TokenWindows | None, TokenWindows | None]:
    """Calibration and evaluation windows; for ``self``, sampled from the model, where not yet done."""
    config = request.config
    extra = config.evaluation_samples if config.evaluate == HELD_OUT else 0
    count = config.samples if config.calibrates else 0
    if config.calibration != SELF or not count + extra:
        return texts.calibration, texts.evaluation
    windows = journal.windows() if journal else None
    if crew.first and windows is None:
        with progress.phase("sample"):
            model = request.source.model(config.dtype, config.device)
            start = start_token(request.tokenizer)
            windows = sample_from_model(model, start, count + extra, config.sequence_length, config.seed)
            del model
        assert journal is not None
        journal.keep_windows(windows)
    ids = crew.tell(None if windows is None else windows.ids)
    assert ids is not None
    calibration = TokenWindows(ids[:count].contiguous()) if count else None
    # Those held out were sampled after the others.
    return calibration, TokenWindows(ids[count:].contiguous()) if extra else texts.evaluation


def _perplexities(
    engine: Engine,
    result: Compression,
    windows: TokenWindows | None,
    journal: Journal | None,
    crew: Workers,
    progress: Progress,
) -> Pair | None:
    """Perplexity of both models, one layer at a time."""
    if windows is None:
        return None
    models: dict[str, LayeredModel] = {"dense": engine.dense, "compressed": result.thin}
    values = {}
    with progress.phase("evaluate", sum(len(model.layers) for model in models.values())):
        for name, model in models.items():
            known = crew.tell(journal.perplexity(name) if journal else None)
            values[name] = engine.perplexity(model, windows) if known is None else known
            if journal is not None and known is None:
                journal.keep_perplexity(name, values[name])
    return Pair(**values)


def _evaluation_facts(config: RunConfig, windows: TokenWindows | None) -> TextFacts | None:
    if windows is None:
        return None
    return TextFacts.of(f"{config.calibration}, held out" if config.evaluate == HELD_OUT else config.evaluate, windows)


def open_model(
    address: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig, Callable[[], PreTrainedModel]]:
    """A dense or compressed model's tokenizer, its config, and how to load it for inference, once all is checked."""
    source = ModelSource(address, trust_remote_code)
    source.check()
    device = usable_device(device)
    if dtype not in get_args(Dtype):
        raise InvalidRequest(f"--dtype {dtype!r}: use one of {', '.join(get_args(Dtype))}")
    config, tokenizer = source.config(), source.tokenizer()
    check_vocabulary(tokenizer, config)
    if is_compressed(config.model_type):
        return tokenizer, config, lambda: load(address, dtype=dtype, device=device)
    return tokenizer, config, lambda: source.model(cast(Dtype, dtype), device)


def evaluate_perplexity(
    address: str,
    text: str,
    *,
    samples: int | None = None,
    sequence_length: int = 2048,
    batch_size: int = 1,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[float, TokenWindows]:
    """Perplexity of the model at ``address`` on the first ``samples`` windows of ``text`` (all where None)."""
    progress = progress or Progress()
    check_source(text, option="--perplexity")
    least = {"samples": (samples, 1), "sequence-length": (sequence_length, 2), "batch-size": (batch_size, 1)}
    for name, (value, smallest) in least.items():
        if value is not None and value < smallest:
            raise InvalidRequest(f"--{name} {value}: must be at least {smallest}")
    tokenizer, config, open_it = open_model(address, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    check_length(sequence_length, config)
    with progress.phase("text"):
        ids = tokenize(tokenizer, read_text(text, evaluation=True))
    count = max(1, len(ids) // sequence_length) if samples is None else samples
    windows = first_windows(ids, count, sequence_length, what=f"--perplexity {text}")
    with progress.phase("load"):
        model = open_it()
    with progress.phase("evaluate", math.ceil(len(windows) / batch_size)):
        return perplexity(model, windows, batch_size, progress), windows
