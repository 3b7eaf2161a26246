"""A tokenizer in the form that llama.cpp has: its tokens, their kinds, how they merge, and how text is split before.

llama.cpp has two tokenizers of byte-pair encodings: ``gpt2`` works on bytes and lists merges; ``llama`` (SentencePiece)
works on characters and bytes, and merges by the score of what comes out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from ..errors import InvalidRequest

#: How llama.cpp calls the splitting of text by a regular expression, where it splits as Transformers does.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {_GPT2: "gpt-2", _LLAMA3: "llama-bpe", _QWEN2: "qwen2"}
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # as SentencePiece writes a blank


@dataclass(frozen=True)
class TokenizerFields:
    """What a GGUF file says of a tokenizer."""

    model: str
    """``gpt2`` or ``llama``."""
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    special: Mapping[str, int]
    """Ids by what they are for: bos, eos, unk, pad."""
    adds: Mapping[str, bool]
    """Whether text gets a space, a bos and an eos."""
    chat_template: str | None

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Put the fields into ``writer``."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_space_prefix(self.adds["space"])
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def tokenizer_fields(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, pre_tokenizer: str | None = None
) -> TokenizerFields:
    """Those of ``tokenizer`` for a model of ``vocabulary`` embeddings.

    ``pre_tokenizer`` is llama.cpp's name for how text is split, where that cannot be told from the tokenizer. Raises
    :class:`InvalidRequest` for tokenizers that llama.cpp does not have.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    facts = {} if backend is None else json.loads(backend.to_str())
    model = facts.get("model", {})
    if model.get("type") != "BPE":
        kind = model.get("type", type(tokenizer).__name__)
        raise InvalidRequest(f"--format gguf: the tokenizer is no byte-pair encoding but {kind!r}")
    bytewise = _bytewise(facts)
    _check_steps(facts, bytewise)
    tokens, types = _tokens(facts, vocabulary, bytewise)
    merges = [tuple(pair.split(" ", 1)) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return TokenizerFields(
        model="gpt2" if bytewise else "llama",
        pre=pre_tokenizer or (_pre_tokenizer(facts) if bytewise else "default"),
        tokens=tokens,
        types=types,
        merges=[" ".join(pair) for pair in merges] if bytewise else None,
        scores=None if bytewise else _scores(tokens, merges),
        special=_special(tokenizer),
        adds=_adds(tokenizer, facts, bytewise),
        chat_template=_template(tokenizer),
    )


def _parts(entry: Mapping[str, Any] | None, kind: str) -> list[Mapping[str, Any]]:
    """A normalizer's or pre-tokenizer's steps."""
    if entry is None:
        return []
    return list(entry[kind]) if entry["type"] == "Sequence" else [entry]


def _bytewise(facts: Mapping[str, Any]) -> bool:
    return any(part["type"] == "ByteLevel" for part in _parts(facts["pre_tokenizer"], "pretokenizers"))


def _check_steps(facts: Mapping[str, Any], bytewise: bool) -> None:
    """Refuse what changes text before it is encoded, where llama.cpp has nothing of the kind.

    Raises :class:`InvalidRequest`.
    """
    normalizers = [part["type"] for part in _parts(facts["normalizer"], "normalizers")]
    parts = _parts(facts["pre_tokenizer"], "pretokenizers")
    splits = [part["type"] for part in parts]
    # Composed normal forms leave nearly all text as it is; SentencePiece's blanks are what 'llama' does itself.
    known = {"NFC", "NFKC"} if bytewise else {"Prepend", "Replace", "NFC", "NFKC"}
    problem = next((kind for kind in normalizers if kind not in known), None)
    if bytewise and any(part.get("add_prefix_space", False) for part in parts):
        problem = problem or "a blank before text that is split into bytes"
    if not bytewise:
        problem = problem or next((kind for kind in splits if kind != "Metaspace"), None)
        if not facts["model"].get("byte_fallback") and not {"Prepend", "Replace"} & {*normalizers} and not splits:
            problem = problem or "no bytes and no blanks of SentencePiece"
    if problem is not None:
        raise InvalidRequest(f"--format gguf: llama.cpp has no tokenizer with {problem!r}, as this one has")


def strips(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The added tokens that take blanks beside them away, which llama.cpp does for Phi-3 alone."""
    added = tokenizer.added_tokens_decoder.values()
    return [one.content for one in added if one.lstrip or one.rstrip]


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template; of several the default one."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _tokens(facts: Mapping[str, Any], vocabulary: int, bytewise: bool) -> tuple[list[str], list[int]]:
    """All tokens and their types; embeddings without a token get one that is never used."""
    tokens = [f"[PAD{number}]" for number in range(vocabulary)]
    types = [int(TokenType.UNUSED)] * vocabulary
    known = [*facts["model"]["vocab"].values(), *(added["id"] for added in facts["added_tokens"])]
    if max(known) >= vocabulary:
        raise InvalidRequest(f"--format gguf: the tokenizer has token {max(known)}, the model {vocabulary} embeddings")
    for token, number in facts["model"]["vocab"].items():
        byte = not bytewise and len(token) == 6 and token.startswith("<0x")
        tokens[number], types[number] = token, int(TokenType.BYTE if byte else TokenType.NORMAL)
    unknown = facts["model"].get("unk_token")
    for added in facts["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        kind = TokenType.UNKNOWN if added["content"] == unknown and not bytewise else kind
        tokens[added["id"]], types[added["id"]] = added["content"], int(kind)
    return tokens, types


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """The earlier a merge, the higher the score of what comes out; what no merge makes is below all."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault("".join(pair), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _pre_tokenizer(facts: Mapping[str, Any]) -> str:
    """llama.cpp's name for the splitting of a byte-level tokenizer."""
    *before, last = _parts(facts["pre_tokenizer"], "pretokenizers")
    kinds, usual, name = [part["type"] for part in before], last.get("use_regex", True), None
    if usual and not kinds:
        name = "gpt-2"
    elif usual and kinds == ["Digits"] and before[0]["individual_digits"]:
        name = "smollm"
    elif not usual and kinds == ["Split"]:
        name = _SPLITS.get(before[0]["pattern"].get("Regex", ""))
    if name is None:
        raise InvalidRequest(
            "--format gguf: llama.cpp's name for how the tokenizer splits text cannot be told; give it with "
            "--pre-tokenizer (gpt-2, llama-bpe, qwen2, ...)"
        )
    return name


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    return {name: number for name, number in ids.items() if number is not None}


def _adds(tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, Any], bytewise: bool) -> dict[str, bool]:
    """What the tokenizer puts around text, by a text that it is given."""
    ids = list(tokenizer("a")["input_ids"])
    steps = [*_parts(facts["normalizer"], "normalizers"), *_parts(facts["pre_tokenizer"], "pretokenizers")]
    space = not bytewise and any(
        (part["type"] == "Prepend" and part["prepend"] == _SPACE)
        or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in steps
    )
    first, last = ids[:1] == [tokenizer.bos_token_id], ids[-1:] == [tokenizer.eos_token_id]
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    if ids[first : len(ids) - last] != plain:
        added = ", ".join(repr(tokenizer.decode([one])) for one in ids if one not in plain)
        raise InvalidRequest(f"--format gguf: llama.cpp puts no {added} around text, as this tokenizer does")
    return {"space": space, "bos": first, "eos": last}
