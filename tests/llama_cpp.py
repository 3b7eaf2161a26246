"""Real engines for exported models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp (the package xllamacpp) is not installed")

#: Shows in the names of the tests.
LLAMA_CPP = pytest.mark.parametrize("engine", [f"xllamacpp-{xllamacpp.__version__}"])


@contextmanager
def llama_cpp(path: Path) -> Iterator[Any]:
    """llama.cpp with the model in ``path``, all in float32 that the file does not say otherwise."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx, parameters.n_parallel, parameters.cpuparams.n_threads = 256, 1, 1
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    yield xllamacpp.Server(parameters)


def next_token(server: Any, prompt: str | list[int]) -> dict[int, float]:
    """The log-probabilities of the five likeliest next tokens; none where the first begins a character."""
    request = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "n_probs": 5, "ignore_eos": True}
    logprobs = server.handle_completions(request)["choices"][0]["logprobs"]
    return {one["id"]: one["logprob"] for one in logprobs["content"][0]["top_logprobs"]} if logprobs else {}


def following(server: Any, prompt: str, count: int) -> list[int]:
    """The ``count`` tokens that follow, greedily."""
    request = {"prompt": prompt, "max_tokens": count, "temperature": 0, "n_probs": 1}
    return [one["id"] for one in server.handle_completions(request)["choices"][0]["logprobs"]["content"]]


def answer(server: Any, messages: list[dict[str, str]], count: int) -> str:
    """What follows on a chat in the file's own template, greedily."""
    request = {"messages": messages, "max_tokens": count, "temperature": 0}
    text: str = server.handle_chat_completions(request)["choices"][0]["message"]["content"]
    return text
