"""Whether classes of Transformers compute the same, by their code: names and annotations aside."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Hashable
from functools import cache
from typing import Any, cast


def forward_code(cls: Any) -> str | None:
    """The code of a class's forward without annotations, decorators and docstring; None where there is none."""
    return _code(getattr(cls, "forward", None))


@cache
def _code(forward: Hashable) -> str | None:
    try:
        tree: Any = ast.parse(textwrap.dedent(inspect.getsource(cast(Any, forward)))).body[0]
    except (OSError, TypeError):
        return None
    tree.decorator_list, tree.returns = [], None
    if ast.get_docstring(tree) is not None:
        tree.body = tree.body[1:]
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
    return ast.dump(tree)
