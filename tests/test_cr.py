"""Type II: Algorithm 2, Theorem 2 and appendix B.1."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers import mixed, randn, squared
from modegpt.decompositions import CRDecomposition, channel_scores, couples, cr_decomposition


def attention_data(heads: int, size: int, tokens: int = 50, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Queries of each head and the keys they share, (tokens, size) each."""
    return [mixed(tokens, size, seed=seed + head) for head in range(1, heads + 1)], mixed(tokens, size, seed=seed + 99)


def grams(queries: list[torch.Tensor], keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.stack([query.T @ query for query in queries]), keys.T @ keys


def root(gram: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T


def pairs_of(result: CRDecomposition) -> list[int]:
    assert result.pairs is not None
    return result.pairs.tolist()


def test_diagonal_grams_have_a_known_answer() -> None:
    query = torch.diag(torch.tensor([4.0, 1.0, 9.0, 1.0], dtype=torch.float64))
    key = torch.diag(torch.tensor([1.0, 4.0, 1.0, 25.0], dtype=torch.float64))
    result = cr_decomposition(query[None], key, 2, rotary=0)  # energies 4, 4, 9, 25
    assert result.channels.tolist() == [2, 3]
    assert result.error == pytest.approx(8, rel=1e-15)
    assert result.norm == pytest.approx(42, rel=1e-15)
    assert result.scores.square().tolist() == pytest.approx([4, 4, 9, 25], rel=1e-15)

    paired = cr_decomposition(query[None], key, 1)  # pairs (0, 2): 13 and (1, 3): 29
    assert pairs_of(paired) == [1]
    assert paired.channels.tolist() == [1, 3]
    assert paired.channels.dtype == torch.int64
    assert paired.error == pytest.approx(13, rel=1e-15)
    assert paired.scores.square().tolist() == pytest.approx([13, 29], rel=1e-15)


@pytest.mark.parametrize("neighbours", [True, False])
@pytest.mark.parametrize("rotary", [None, 0, 4, 6])
@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_error_and_norm_equal_their_definitions(heads: int, rank: int, rotary: int | None, neighbours: bool) -> None:
    queries, keys = attention_data(heads, 10, seed=rank)
    result = cr_decomposition(*grams(queries, keys), rank, rotary=rotary, neighbours=neighbours)
    kept = result.channels.tolist()
    assert len(set(kept)) == (rank if rotary == 0 else 2 * rank)
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


def test_rotary_channels_go_in_pairs_and_the_others_two_by_two_from_the_best() -> None:
    scores = torch.tensor([3.0, 0.0, 5.0, 4.0, 1.0, 12.0, 7.0, 2.0], dtype=torch.float64)
    halves, neighbours = couples(scores, 4, neighbours=False), couples(scores, 4, neighbours=True)
    assert [x.tolist() for x in halves] == [[0, 1, 5, 7], [2, 3, 6, 4], [0, 1, 2, 2]]
    assert [x.tolist() for x in neighbours] == [[0, 2, 5, 7], [1, 3, 6, 4], [0, 1, 2, 2]]


@pytest.mark.parametrize("rotary", [4, 6])
@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_partial_rotary_keeps_the_best_of_all_selections(rank: int, rotary: int) -> None:
    """Brute force over all sets of whole pairs and single channels of the same size, for two groups."""
    queries, keys = zip(*(attention_data(2, 10, seed=seed) for seed in (0, 7)), strict=True)
    query = torch.stack([grams(q, k)[0] for q, k in zip(queries, keys, strict=True)])
    key = torch.stack([k.T @ k for k in keys])
    result = cr_decomposition(query, key, rank, rotary=rotary)
    assert result.pairs is not None
    for group, scores in enumerate(channel_scores(query, key)):
        units = [(p, p + rotary // 2) for p in range(rotary // 2)] + [(i,) for i in range(rotary, 10)]
        sets = [
            sum(chosen, ())
            for count in range(rank, 2 * rank + 1)
            for chosen in itertools.combinations(units, count)
            if len(sum(chosen, ())) == 2 * rank
        ]
        best = max(sets, key=lambda kept: float(scores[list(kept)].square().sum()))
        assert sorted(result.channels[group].tolist()) == sorted(best)
        first, second = result.channels[group].chunk(2)
        for pair, one, other in zip(result.pairs[group].tolist(), first.tolist(), second.tolist(), strict=True):
            still = pair == rotary // 2
            assert (min(one, other) >= rotary) if still else ((one, other) == (pair, pair + rotary // 2))


@pytest.mark.parametrize("heads", [1, 3])
def test_largest_pair_scores_are_kept(heads: int) -> None:
    queries, keys = attention_data(heads, 12)
    energy = sum(query.square().sum(0) for query in queries) * keys.square().sum(0)
    pairs = [float(energy[p] + energy[p + 6]) for p in range(6)]
    best = sorted(sorted(range(6), key=lambda p: -pairs[p])[:3])
    result = cr_decomposition(*grams(queries, keys), 3)
    assert pairs_of(result) == best


def test_selection_keeps_whole_pairs_even_where_single_channels_rank_otherwise() -> None:
    """Channels 0 and 1 are the two strongest, but they belong to different pairs."""
    energy = torch.tensor([10.0, 9.0, 0.0, 0.1, 2.0, 0.0], dtype=torch.float64)
    query, key = torch.diag(energy), torch.eye(6, dtype=torch.float64)
    assert cr_decomposition(query[None], key, 2, rotary=0).channels.tolist() == [0, 1]
    result = cr_decomposition(query[None], key, 1)
    assert pairs_of(result) == [1]  # 9 + 2 against 10 + 0.1
    assert result.error == pytest.approx(10.1, rel=1e-14)


def test_one_selection_serves_the_whole_group() -> None:
    """Each head alone would keep another channel than the group does."""
    queries = torch.stack([torch.diag(torch.tensor(energy)) for energy in ([5.0, 0.0, 4.0], [0.0, 5.0, 4.0])])
    queries, key = queries.double(), torch.eye(3, dtype=torch.float64)
    assert cr_decomposition(queries[:1], key, 1, rotary=0).channels.tolist() == [0]
    assert cr_decomposition(queries[1:], key, 1, rotary=0).channels.tolist() == [1]
    result = cr_decomposition(queries, key, 1, rotary=0)
    assert result.channels.tolist() == [2]
    assert result.error == pytest.approx(10, rel=1e-15)


@pytest.mark.parametrize("rotary", [None, 0, 4])
def test_full_rank_keeps_everything_at_no_cost(rotary: int | None) -> None:
    queries, keys = attention_data(2, 8)
    result = cr_decomposition(*grams(queries, keys), 8 if rotary == 0 else 4, rotary=rotary)
    assert sorted(result.channels.tolist()) == list(range(8))
    assert result.error == 0


@pytest.mark.parametrize("silent", ["queries", "keys"])
def test_dropping_channels_that_are_dead_on_one_side_is_free(silent: str) -> None:
    queries, keys = attention_data(2, 8)
    for x in queries if silent == "queries" else [keys]:
        x[:, [0, 4, 2, 6]] = 0
    result = cr_decomposition(*grams(queries, keys), 2)
    assert pairs_of(result) == [1, 3]
    assert result.error == 0
    assert result.norm > 0


def test_cancelling_channels_cost_nothing_together() -> None:
    """q_0 k_0 + q_1 k_1 = 0 with both terms alive: the error sees the cross terms, not only the diagonal."""
    query, key = randn(30, 4), randn(30, 4, seed=1)
    query[:, 1], key[:, 1] = query[:, 0], -key[:, 0]
    query[:, 2:] *= 100
    result = cr_decomposition(*grams([query], key), 2, rotary=0)
    assert result.channels.tolist() == [2, 3]
    assert result.error <= 1e-12 * squared(query[:, :1] @ key[:, :1].T)


@pytest.mark.parametrize("tokens", [1, 3])
def test_fewer_tokens_than_channels_still_give_the_exact_error(tokens: int) -> None:
    queries, keys = attention_data(2, 8, tokens=tokens)
    result = cr_decomposition(*grams(queries, keys), 2)
    kept = result.channels.tolist()
    expected = sum(squared(query @ keys.T - query[:, kept] @ keys[:, kept].T) for query in queries)
    assert result.error == pytest.approx(expected, rel=1e-11)


def test_all_zero_grams_are_handled() -> None:
    zero = torch.zeros(6, 6, dtype=torch.float64)
    result = cr_decomposition(zero[None], zero, 2)
    assert pairs_of(result) == [0, 1]
    assert result.error == result.norm == 0
