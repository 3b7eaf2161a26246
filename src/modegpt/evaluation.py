"""Perplexity and text generation, the same for dense and compressed models."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import TokenWindows
from .errors import InvalidRequest, NumericalError
from .progress import Progress


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, windows: TokenWindows, batch_size: int = 1, progress: Progress | None = None
) -> float:
    """Exp of the mean negative log-likelihood of every predicted real token; each window starts without context.

    ``progress`` advances once for every batch.
    """
    total, count = 0.0, 0
    training = model.training
    model.eval()
    for batch in windows.batches(batch_size):
        ids = batch.ids.to(model.device)
        mask = torch.ones_like(ids, dtype=torch.bool) if batch.mask is None else batch.mask.to(model.device)
        logits = model(input_ids=ids, attention_mask=None if batch.mask is None else mask, use_cache=False).logits
        predicted = mask[:, 1:] & mask[:, :-1]
        loss = nn.functional.cross_entropy(logits[:, :-1][predicted].float(), ids[:, 1:][predicted], reduction="sum")
        total += float(loss)
        count += int(predicted.sum())
        if progress is not None:
            progress.advance()
    model.train(training)
    if count == 0:
        raise InvalidRequest("the text has no two real tokens in a row: there is nothing to predict")
    if not math.isfinite(total):
        raise NumericalError("the model's loss is NaN or infinite")
    return math.exp(min(total / count, 700.0))  # exp overflows a float beyond 709


@torch.no_grad()
def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    chat: bool = False,
) -> str:
    """Greedy continuation of ``prompt``, without the prompt; ``chat`` puts it in the tokenizer's chat template."""
    if chat and not tokenizer.chat_template:
        raise InvalidRequest("--chat needs a tokenizer with a chat template, which this model's has not")
    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    output = model.generate(  # type: ignore[operator]
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
