"""Text sources, token windows, and text sampled from the model."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from helpers import random_text, tiny_llama, tiny_tokenizer
from modegpt import data
from modegpt.data import (
    HUB_DATASETS,
    HubDataset,
    TokenWindows,
    check_source,
    first_windows,
    random_windows,
    read_text,
    row_text,
    sample_from_model,
    split_held_out,
    tokenize,
)
from modegpt.errors import InvalidRequest, NumericalError

TEXT = "First line.\nZweite Zeile: äöü, 漢字, 🙂.\n\nLast line"
RECORDS = ["One record\nof two lines.", "Ein zweiter: äöü, 漢字."]
IDS = torch.arange(1000, 1100)


def json_lines(rows: list[object]) -> bytes:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


def write_parquet(path: Path, rows: list[dict[str, str]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


# Reading text


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_text_file_is_read_as_it_is(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / ("text.txt" if compress is bytes else "text.txt.gz")
    path.write_bytes(compress(TEXT.encode()))
    assert read_text(str(path)) == TEXT


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_records_of_json_lines_are_joined_by_blank_lines(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    path = tmp_path / ("text.jsonl" if compress is bytes else "text.jsonl.gz")
    path.write_bytes(compress(json_lines([{"text": record, "id": 3} for record in RECORDS]) + b"\n\n"))
    assert read_text(str(path)) == "\n\n".join(RECORDS)


def test_rows_of_parquet_are_joined_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "text.parquet"
    write_parquet(path, [{"id": "x", "text": record} for record in RECORDS])
    assert read_text(str(path)) == "\n\n".join(RECORDS)


@pytest.mark.parametrize("separator", ["\u2028", "\u0085"], ids=["line separator", "next line"])
def test_only_newlines_separate_json_lines(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_bytes(json_lines([{"text": f"before{separator}after"}]))
    assert read_text(str(path)) == f"before{separator}after"


ALPACA = {"instruction": "Add.", "input": "1 and 2", "output": "3"}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("plain", "plain"),
        ({"text": "a", "sentence": "b"}, "a"),
        ({"sentence": "b"}, "b"),
        ({"content": "c"}, "c"),
        (ALPACA, "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n3"),
        (ALPACA | {"input": ""}, "### Instruction:\nAdd.\n\n### Response:\n3"),
        ({"instruction": "Add.", "output": "3"}, "### Instruction:\nAdd.\n\n### Response:\n3"),
        (ALPACA | {"text": "the whole prompt"}, "the whole prompt"),
        (
            {
                "prompt": "Hi.",
                "messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}],
            },
            "User: Hi.\n\nAssistant: Ho.",
        ),
        ({"question": "who", "passage": "p", "label": True}, "p"),
        ({"context": "c", "continuation": "d"}, "c"),
    ],
)
def test_text_of_a_record(row: object, text: str) -> None:
    assert row_text(row) == text


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.txt.gz", gzip.compress(b"some text " * 100, mtime=0)[:-20]),
        ("plain.txt.gz", b"not compressed"),
        ("latin1.txt", "Äpfel".encode("latin-1")),
        ("broken.jsonl", b'{"text": "a"}\n{"text": '),
        ("broken.parquet", b"PAR1 and no more"),
        ("empty.parquet", b""),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidRequest) as caught:
        read_text(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"title": "two\nlines"},
        {"text": None},
        {"instruction": "only"},
        {"instruction": "i", "context": ""},
        5,
        None,
        [],
    ],
)
def test_a_record_without_text_is_refused_in_one_line(tmp_path: Path, row: object) -> None:
    path = tmp_path / "other.jsonl"
    path.write_bytes(json_lines([{"text": "fine"}, row]))
    with pytest.raises(InvalidRequest, match="needs a 'text'") as caught:
        read_text(str(path))
    assert "\n" not in str(caught.value)


def test_parquet_without_a_text_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    write_parquet(path, [{"title": "x"}])
    with pytest.raises(InvalidRequest, match="needs a 'text'"):
        read_text(str(path))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_files_of_known_kinds_are_sources(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(InvalidRequest, match="no such file"):
        check_source(str(path), option="--evaluate")
    path.touch()
    check_source(str(path), option="--evaluate")


@pytest.mark.parametrize("name", [*HUB_DATASETS, "self"])
def test_named_sources_need_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match="no such file"):
        check_source(f"{name}.", option="--calibration", allow_self=True)
    check_source(name, option="--calibration", allow_self=True)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("self", "no such file"),
        ("c5", "no such file"),
        ("missing.txt", "no such file"),
        ("page.html", "known kind"),
        ("directory.txt", "known kind"),
    ],
)
def test_other_sources_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, problem: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.html").touch()
    (tmp_path / "directory.txt").mkdir()
    with pytest.raises(InvalidRequest, match=f"--evaluate '{source}': .*{problem}.*wikitext2"):
        check_source(source, option="--evaluate")


# Data sets on the hub


WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1", None)
# The main branch of this one is a loading script, which datasets 4 and later refuses.
PTB = ("ptb-text-only/ptb_text_only", None, "refs/convert/parquet")
ALPACA_ON_HUB = ("tatsu-lab/alpaca", None, None)


@pytest.mark.parametrize(
    ("source", "evaluation", "address", "split", "rows", "text"),
    [
        ("wikitext2", False, WIKITEXT, "train", [{"text": ""}, {"text": "a"}], "\n\na"),
        ("wikitext2", True, WIKITEXT, "test", [{"text": "a"}], "a"),
        ("ptb", False, PTB, "train", [{"sentence": "a"}, {"sentence": "b"}], "a b"),
        ("ptb", True, PTB, "test", [{"sentence": "a"}], "a"),
        ("alpaca", False, ALPACA_ON_HUB, "train[:90%]", [{"text": "a"}, {"text": "b"}], "a\n\nb"),
        ("alpaca", True, ALPACA_ON_HUB, "train[90%:]", [{"text": "a"}], "a"),
    ],
)
def test_hub_data_sets_are_asked_for_and_joined(
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    evaluation: bool,
    address: tuple[str, str | None, str | None],
    split: str,
    rows: list[dict[str, str]],
    text: str,
) -> None:
    load_dataset = Mock(return_value=rows)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_text(source, evaluation=evaluation) == text
    path, name, revision = address
    load_dataset.assert_called_once_with(path, name, split=split, revision=revision)


ROWS = [{"text": f"row {number}"} for number in range(10)]


@pytest.mark.parametrize(("evaluation", "first"), [(False, 0), (True, 4)])
def test_of_a_large_data_set_the_first_rows_calibrate_and_the_next_ones_are_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluation: bool, first: int
) -> None:
    """With the data sets library itself, on a directory instead of the hub."""
    write_parquet(tmp_path / "train.parquet", ROWS)
    large = HubDataset(str(tmp_path), None, "train", "train", "|", rows=4)
    monkeypatch.setattr(data, "HUB_DATASETS", {"large": large})
    expected = "|".join(row["text"] for row in ROWS[first : first + 4])
    assert read_text("large", evaluation=evaluation) == expected


def test_only_the_named_file_of_a_large_data_set_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "en").mkdir()
    files = {"train": "en/train.0.json.gz", "validation": "en/validation.0.json.gz"}
    for split, name in files.items():
        (tmp_path / name).write_bytes(gzip.compress(json_lines([{"text": f"{split} {n}"} for n in range(5)])))
    (tmp_path / "en/train.1.json.gz").write_bytes(b"never read")
    large = HubDataset(str(tmp_path), None, "train", "validation", "|", files=files, rows=3)
    monkeypatch.setattr(data, "HUB_DATASETS", {"large": large})
    assert read_text("large") == "train 0|train 1|train 2"
    assert read_text("large", evaluation=True) == "validation 0|validation 1|validation 2"


@pytest.mark.parametrize("source", ["fineweb-edu", "c4", "ultrachat", "codeparrot"])
@pytest.mark.parametrize("evaluation", [False, True])
def test_large_data_sets_are_streamed(monkeypatch: pytest.MonkeyPatch, source: str, evaluation: bool) -> None:
    stream = datasets.IterableDataset.from_generator(lambda: iter([{"content": "a"}, {"content": "b"}] * 6000))
    load_dataset = Mock(return_value=stream)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = HUB_DATASETS[source].rows
    assert rows is not None
    assert read_text(source, evaluation=evaluation) == "\n\n".join(["a", "b"] * (rows // 2))
    assert load_dataset.call_args.kwargs["streaming"] is True


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ConnectionError("Couldn't reach the Hub\n(ConnectError)")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=error))
    with pytest.raises(InvalidRequest) as caught:
        read_text("wikitext2")
    assert str(caught.value) == (
        "data set Salesforce/wikitext could not be loaded from the hub: Couldn't reach the Hub (ConnectError); "
        "without it, give files and text that the model writes: --calibration FILE,self"
    )


# Windows


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


def test_tokenize_adds_no_special_tokens(tokenizer: PreTrainedTokenizerBase, text_file: Path) -> None:
    text = text_file.read_text()
    assert tokenizer(text)["input_ids"][0] == tokenizer.bos_token_id, "this tokenizer would add one"
    ids = tokenize(tokenizer, text)
    assert ids.dtype == torch.int64
    assert not set(tokenizer.all_special_ids) & set(ids.tolist())
    assert tokenizer.decode(ids) == text


def test_first_windows_are_consecutive_and_unpadded() -> None:
    windows = first_windows(IDS, 3, 7, what="text")
    assert windows.mask is None
    assert windows.ids.shape == (3, 7)
    assert windows.ids.flatten().tolist() == IDS[:21].tolist()


def test_random_windows_are_different_windows_of_the_consecutive_cut() -> None:
    cut = {tuple(window) for window in IDS[:98].view(14, 7).tolist()}
    windows = random_windows(IDS, 10, 7, seed=0, what="text")
    chosen = [tuple(window) for window in windows.ids.tolist()]
    assert windows.mask is None
    assert len(set(chosen)) == 10
    assert set(chosen) <= cut


def test_all_windows_can_be_drawn() -> None:
    windows = random_windows(IDS, 20, 5, seed=0, what="text")
    assert windows.ids.flatten().sort().values.tolist() == IDS.tolist()


def test_the_seed_decides_which_windows_are_drawn() -> None:
    first, again, other = (random_windows(IDS, 10, 5, seed, what="text").ids for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first.sort(0).values, other.sort(0).values), "other windows, not only another order"


def test_drawing_windows_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    random_windows(IDS, 10, 5, seed=1, what="text")
    assert torch.equal(torch.get_rng_state(), before)


def test_too_few_tokens_are_refused_with_both_numbers() -> None:
    ids = torch.arange(1999)
    for cut in (
        lambda: first_windows(ids, 4, 500, what="--calibration x.txt"),
        lambda: random_windows(ids, 4, 500, 0, what="--calibration x.txt"),
    ):
        with pytest.raises(InvalidRequest, match=r"^--calibration x\.txt: 4 .* 500 .*\b2,000 tokens.*\b1,999\b"):
            cut()


@pytest.mark.parametrize(("tokens", "length"), [(100, 10), (1000, 10), (95, 20), (30, 20), (20, 20), (5, 20), (0, 20)])
def test_the_held_out_part_is_the_tail_and_overlaps_nothing(tokens: int, length: int) -> None:
    ids = torch.arange(tokens)
    calibration, held_out = split_held_out(ids, length)
    assert torch.cat((calibration, held_out)).tolist() == ids.tolist()
    assert len(held_out) == min(tokens, max(length, tokens // 10))


@pytest.mark.parametrize(
    "ids",
    [
        torch.arange(4),
        torch.zeros(1, 2, 3, dtype=torch.int64),
        torch.zeros(2, 3, dtype=torch.int32),
        torch.zeros(2, 3),
        torch.zeros(0, 3, dtype=torch.int64),
        torch.zeros(3, 0, dtype=torch.int64),
    ],
    ids=lambda ids: f"{tuple(ids.shape)} {ids.dtype}",
)
def test_windows_must_be_a_matrix_of_int64(ids: torch.Tensor) -> None:
    with pytest.raises(InvalidRequest, match="int64 tensor, got"):
        TokenWindows(ids)


@pytest.mark.parametrize("mask", [torch.ones(2, 3, dtype=torch.int64), torch.ones(3, 2, dtype=torch.bool)])
def test_a_mask_must_be_bool_and_shaped_like_the_ids(mask: torch.Tensor) -> None:
    with pytest.raises(InvalidRequest, match="mask must be bool"):
        TokenWindows(torch.zeros(2, 3, dtype=torch.int64), mask)


def test_a_mask_must_leave_a_token() -> None:
    with pytest.raises(InvalidRequest, match="leaves no token"):
        TokenWindows(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool))


def padded() -> TokenWindows:
    ids = torch.arange(15).view(5, 3)
    return TokenWindows(ids, ids > 1)


def test_windows_count_real_tokens() -> None:
    assert len(padded()) == 5
    assert padded().tokens == 13
    assert TokenWindows(padded().ids).tokens == 15


def test_a_mask_without_padding_is_no_mask() -> None:
    ids = padded().ids
    windows = TokenWindows(ids, torch.ones_like(ids, dtype=torch.bool))
    assert windows.mask is None
    assert windows.sha256() == TokenWindows(ids).sha256()


def test_the_hash_is_that_of_shape_and_little_endian_ids() -> None:
    ids = padded().ids
    expected = hashlib.sha256(b"(5, 3)" + b"".join(value.to_bytes(8, "little") for value in range(15))).hexdigest()
    assert TokenWindows(ids).sha256() == expected
    assert TokenWindows(ids.T.contiguous().T).sha256() == expected, "whatever the memory layout"


def test_the_hash_changes_with_ids_order_shape_and_mask() -> None:
    ids, mask = padded().ids, padded().mask
    assert mask is not None
    changed = ids.clone()
    changed[4, 2] += 1
    other_mask = mask.clone()
    other_mask[0, 2] = False
    windows = [
        *(TokenWindows(ids), TokenWindows(changed), TokenWindows(ids.flip(0)), TokenWindows(ids.view(3, 5))),
        *(TokenWindows(ids, mask), TokenWindows(ids, other_mask)),
    ]
    assert len({each.sha256() for each in windows}) == len(windows)


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_batches_hold_every_window_once_with_its_mask(size: int) -> None:
    windows = padded()
    batches = list(windows.batches(size))
    assert [len(batch) for batch in batches[:-1]] == [min(size, 5)] * (len(batches) - 1)
    assert len(batches) == -(-5 // size)
    masks = [torch.ones_like(batch.ids, dtype=torch.bool) if batch.mask is None else batch.mask for batch in batches]
    assert torch.equal(torch.cat([batch.ids for batch in batches]), windows.ids)
    assert torch.equal(torch.cat(masks), windows.mask)


# Text sampled from the model


@cache
def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of 320 tokens, two of them special, that puts its token 0 before every text."""
    return tiny_tokenizer(random_text(20, seed=0))


@pytest.fixture
def model() -> LlamaForCausalLM:
    return tiny_llama(initializer_range=0.1, vocab_size=len(letters()))


def sampled(model: LlamaForCausalLM, seed: int = 0) -> torch.Tensor:
    """Forty windows of twelve tokens."""
    windows = sample_from_model(model, letters(), 40, 12, seed)
    assert windows.mask is None
    return windows.ids


def test_sampled_windows_have_the_asked_shape(model: LlamaForCausalLM) -> None:
    ids = sampled(model)
    assert ids.shape == (40, 12)
    assert ids.unique().numel() > 20
    assert 0 <= int(ids.min()) <= int(ids.max()) < model.config.vocab_size


def test_windows_begin_with_different_ordinary_tokens(model: LlamaForCausalLM) -> None:
    starts = sampled(model)[:, 0]
    assert starts.unique().numel() > 25
    assert not set(starts.tolist()) & set(letters().all_special_ids)


def test_long_windows_are_rows_of_pieces_that_know_nothing_of_each_other(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pieces as from windows of a piece each, the last one cut."""
    monkeypatch.setattr(data, "PIECE", 5)
    long = sample_from_model(model, letters(), 6, 12, 3).ids
    pieces = sample_from_model(model, letters(), 18, 4, 3).ids
    assert long.shape == (6, 12)
    assert torch.equal(long, pieces.reshape(6, 12))
    monkeypatch.setattr(data, "PIECE", 6)
    long, pieces = (sample_from_model(model, letters(), *shape, 3).ids for shape in ((2, 11), (4, 6)))
    assert torch.equal(long, pieces.view(2, 12)[:, :11])


def test_a_piece_is_what_the_model_writes_after_its_first_token(model: LlamaForCausalLM) -> None:
    """Greedily, that can be told: the beginning-of-text token is before it where the tokenizer puts it there."""
    model.lm_head.weight.data *= 1e4  # sampling at temperature 1 becomes greedy
    rows = sampled(model)[:3]
    model.generation_config = GenerationConfig(max_new_tokens=11, do_sample=False, pad_token_id=0)
    for row in rows:
        prompt = torch.tensor([[letters().bos_token_id, int(row[0])]])
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt))
        assert row.tolist() == expected[0, 1:].tolist()


def test_samples_are_decided_by_the_seed(model: LlamaForCausalLM) -> None:
    first = sampled(model, seed=1)
    torch.rand(7)
    assert torch.equal(sampled(model, seed=1), first)
    assert not torch.equal(sampled(model, seed=2), first)


@pytest.mark.parametrize("stop", [1, list(range(320))], ids=["one", "every token"])
def test_end_of_text_does_not_end_a_window(model: LlamaForCausalLM, stop: int | list[int]) -> None:
    model.generation_config.eos_token_id = None
    free = sampled(model)
    model.generation_config.eos_token_id = stop
    assert torch.equal(sampled(model), free)
    assert model.generation_config.eos_token_id == stop


@pytest.mark.parametrize(
    "setting", [("temperature", 0.1), ("top_k", 1), ("top_p", 0.1), ("do_sample", False), ("max_length", 3)], ids=str
)
def test_samplers_in_the_generation_config_are_overridden(model: LlamaForCausalLM, setting: tuple[str, object]) -> None:
    plain = sampled(model)
    setattr(model.generation_config, *setting)
    assert torch.equal(sampled(model), plain)


@pytest.mark.parametrize("setting", [("repetition_penalty", 3.0), ("min_p", 0.9), ("num_beams", 2)], ids=str)
def test_other_generation_settings_do_not_shape_the_samples(
    model: LlamaForCausalLM, setting: tuple[str, object]
) -> None:
    model.lm_head.weight.data *= 5  # a model with few favourites
    plain = sampled(model)
    setattr(model.generation_config, *setting)
    assert torch.equal(sampled(model), plain)


def test_sampling_from_nan_is_a_numerical_error(model: LlamaForCausalLM) -> None:
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(NumericalError, match=r"^sampling text from the model failed: .*nan"):
        sampled(model)


def test_sampling_leaves_no_trace(model: LlamaForCausalLM) -> None:
    random_state, settings = torch.get_rng_state(), model.generation_config.to_dict()
    sampled(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.generation_config.to_dict() == settings


def test_a_failure_while_sampling_leaves_no_trace(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        torch.rand(3)
        raise RuntimeError("no memory")

    monkeypatch.setattr(model, "generate", fail)
    random_state, settings = torch.get_rng_state(), model.generation_config.to_dict()
    with pytest.raises(NumericalError, match="no memory"):
        sampled(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert model.generation_config.to_dict() == settings
