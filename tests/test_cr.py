"""Type II: Algorithm 2, Theorem 2 and appendix B.1."""

from __future__ import annotations

import pytest
import torch

from helpers import mixed, randn, squared
from modegpt.decompositions import channel_scores, cr_decomposition, pair_scores


def attention_data(heads: int, size: int, tokens: int = 50, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Queries of each head and the keys they share, (tokens, size) each."""
    return [mixed(tokens, size, seed=seed + head) for head in range(1, heads + 1)], mixed(tokens, size, seed=seed + 99)


def grams(queries: list[torch.Tensor], keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([query.T @ query for query in queries]), keys.T @ keys


def root(gram: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def channels_of(kept: torch.Tensor, size: int, rotary: bool) -> list[int]:
    return [*kept.tolist(), *(kept + size // 2).tolist()] if rotary else kept.tolist()


def test_diagonal_grams_have_a_known_answer() -> None:
    query = torch.diag(torch.tensor([4.0, 1.0, 9.0, 1.0], dtype=torch.float64))
    key = torch.diag(torch.tensor([1.0, 4.0, 1.0, 25.0], dtype=torch.float64))
    result = cr_decomposition(query[None], key, 2, rotary=False)  # energies 4, 4, 9, 25
    assert result.kept.tolist() == [2, 3]
    assert result.error == pytest.approx(8, rel=1e-15)
    assert result.norm == pytest.approx(42, rel=1e-15)

    paired = cr_decomposition(query[None], key, 1)  # pairs (0, 2): 13 and (1, 3): 29
    assert paired.kept.tolist() == [1]
    assert paired.kept.dtype == torch.int64
    assert paired.error == pytest.approx(13, rel=1e-15)


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_error_and_norm_equal_their_definitions(heads: int, rank: int, rotary: bool) -> None:
    queries, keys = attention_data(heads, 10, seed=rank)
    result = cr_decomposition(*grams(queries, keys), rank, rotary=rotary)
    kept = channels_of(result.kept, 10, rotary)
    assert len(kept) == (2 * rank if rotary else rank)
    expected = sum(squared(query @ keys.T - query[:, kept] @ keys[:, kept].T) for query in queries)
    assert result.error == pytest.approx(expected, rel=1e-11)
    assert result.norm == pytest.approx(sum(squared(query @ keys.T) for query in queries), rel=1e-11)


@pytest.mark.parametrize("heads", [1, 3])
def test_channel_scores_equal_the_published_formula_with_matrix_roots(heads: int) -> None:
    queries, keys = attention_data(heads, 8)
    query_gram, key_gram = grams(queries, keys)
    key_root = root(key_gram)
    expected = []
    for i in range(8):
        terms = [float(root(gram)[:, i].norm() ** 2 * key_root[i, :].norm() ** 2) for gram in query_gram]
        expected.append(sum(terms) ** 0.5)
    torch.testing.assert_close(
        channel_scores(query_gram, key_gram), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0
    )


def test_pair_score_is_the_root_of_the_summed_squares_of_channels_i_and_i_plus_half() -> None:
    scores = torch.tensor([3.0, 0.0, 5.0, 4.0, 1.0, 12.0], dtype=torch.float64)
    torch.testing.assert_close(
        pair_scores(scores), torch.tensor([5.0, 1.0, 13.0], dtype=torch.float64), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("heads", [1, 3])
def test_largest_pair_scores_are_kept(heads: int) -> None:
    queries, keys = attention_data(heads, 12)
    energy = sum(query.square().sum(0) for query in queries) * keys.square().sum(0)
    pairs = [float(energy[p] + energy[p + 6]) for p in range(6)]
    best = sorted(sorted(range(6), key=lambda p: -pairs[p])[:3])
    assert cr_decomposition(*grams(queries, keys), 3).kept.tolist() == best


def test_selection_keeps_whole_pairs_even_where_single_channels_rank_otherwise() -> None:
    """Channels 0 and 1 are the two strongest, but they belong to different pairs."""
    energy = torch.tensor([10.0, 9.0, 0.0, 0.1, 2.0, 0.0], dtype=torch.float64)
    query, key = torch.diag(energy), torch.eye(6, dtype=torch.float64)
    assert cr_decomposition(query[None], key, 2, rotary=False).kept.tolist() == [0, 1]
    result = cr_decomposition(query[None], key, 1)
    assert result.kept.tolist() == [1]  # 9 + 2 against 10 + 0.1
    assert result.error == pytest.approx(10.1, rel=1e-14)


def test_one_selection_serves_the_whole_group() -> None:
    """Each head alone would keep another channel than the group does."""
    queries = torch.stack([torch.diag(torch.tensor(energy)) for energy in ([5.0, 0.0, 4.0], [0.0, 5.0, 4.0])])
    queries, key = queries.double(), torch.eye(3, dtype=torch.float64)
    assert cr_decomposition(queries[:1], key, 1, rotary=False).kept.tolist() == [0]
    assert cr_decomposition(queries[1:], key, 1, rotary=False).kept.tolist() == [1]
    result = cr_decomposition(queries, key, 1, rotary=False)
    assert result.kept.tolist() == [2]
    assert result.error == pytest.approx(10, rel=1e-15)


@pytest.mark.parametrize("rotary", [True, False])
def test_full_rank_keeps_everything_at_no_cost(rotary: bool) -> None:
    queries, keys = attention_data(2, 8)
    rank = 4 if rotary else 8
    result = cr_decomposition(*grams(queries, keys), rank, rotary=rotary)
    assert result.kept.tolist() == list(range(rank))
    assert result.error == 0


@pytest.mark.parametrize("silent", ["queries", "keys"])
def test_dropping_channels_that_are_dead_on_one_side_is_free(silent: str) -> None:
    queries, keys = attention_data(2, 8)
    for x in queries if silent == "queries" else [keys]:
        x[:, [0, 4, 2, 6]] = 0
    result = cr_decomposition(*grams(queries, keys), 2)
    assert result.kept.tolist() == [1, 3]
    assert result.error == 0
    assert result.norm > 0


def test_cancelling_channels_cost_nothing_together() -> None:
    """q_0 k_0 + q_1 k_1 = 0 with both terms alive: the error sees the cross terms, not only the diagonal."""
    query, key = randn(30, 4), randn(30, 4, seed=1)
    query[:, 1], key[:, 1] = query[:, 0], -key[:, 0]
    query[:, 2:] *= 100
    result = cr_decomposition(*grams([query], key), 2, rotary=False)
    assert result.kept.tolist() == [2, 3]
    assert result.error <= 1e-12 * squared(query[:, :1] @ key[:, :1].T)


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_channels_still_give_the_exact_error(tokens: int) -> None:
    queries, keys = attention_data(2, 8, tokens=tokens)
    result = cr_decomposition(*grams(queries, keys), 2)
    kept = channels_of(result.kept, 8, rotary=True)
    expected = sum(squared(query @ keys.T - query[:, kept] @ keys[:, kept].T) for query in queries)
    assert result.error == pytest.approx(expected, rel=1e-11)


def test_all_zero_grams_are_handled() -> None:
    zero = torch.zeros(6, 6, dtype=torch.float64)
    result = cr_decomposition(zero[None], zero, 2)
    assert result.kept.tolist() == [0, 1]
    assert result.error == result.norm == 0
