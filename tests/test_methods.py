"""What every registered method has to have."""

from __future__ import annotations

import inspect

import pytest

from modegpt.config import CompressionConfig
from modegpt.methods import METHODS, Method, OwnAllocation


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_method_has_a_solver_for_each_of_its_modules(method: type[Method]) -> None:
    assert not inspect.isabstract(method)
    made = method.from_config(CompressionConfig.validated(method=method.name, ratio=0.3))
    assert type(made) is method
    own_way = method.compress is not Method.compress  # through the layers, without solvers
    assert made.solvers().keys() == (set() if own_way else set(method.modules) - {"layer"})


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_method_chooses_ranks_exactly_where_it_says_so(method: type[Method]) -> None:
    assert issubclass(method, OwnAllocation) == ("own" in method.allocations) == hasattr(method, "choose")
    assert method.allocation in method.allocations
