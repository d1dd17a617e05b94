"""Whether a value of a configuration fits a plain annotation: ``int``, ``float | None``, ``Literal["a", "b"]``, ...

Annotations with any other name in them (tensors, modules, aliases) are not judged: a check must never refuse what the
program would accept.
"""

from __future__ import annotations

import ast
from typing import Any

PLAIN = {"int", "float", "bool", "str", "None"}


def mismatch(annotation: str, value: Any) -> str | None:
    """What the annotation expects, if ``value`` is not it; None where it fits or cannot be judged."""
    members = _members(ast.parse(annotation, mode="eval").body)
    if members is None or not isinstance(value, int | float | bool | str | None) or _fits(members, value):
        return None
    return " or ".join(dict.fromkeys(what if kind == "type" else repr(what) for kind, what in members))


def _members(node: ast.expr) -> list[tuple[str, Any]] | None:
    """The alternatives as ("type", name) and ("value", literal); None if one of them is not plain."""
    if isinstance(node, ast.Constant) and node.value is None:
        return [("type", "None")]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a quoted annotation
        return _members(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.Name):
        return [("type", node.id)] if node.id in PLAIN else None
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _all([node.left, node.right])
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if node.value.id == "Optional":
            return _all([*inner, ast.Constant(None)])
        if node.value.id == "Union":
            return _all(inner)
        if node.value.id == "Literal" and all(isinstance(i, ast.Constant) for i in inner):
            return [("value", i.value) for i in inner]
    return None


def _all(nodes: list[ast.expr]) -> list[tuple[str, Any]] | None:
    found = [_members(node) for node in nodes]
    return None if any(f is None for f in found) else [member for f in found for member in f]


def _fits(members: list[tuple[str, Any]], value: Any) -> bool:
    for kind, what in members:
        if kind == "value":
            if value == what and isinstance(value, bool) == isinstance(what, bool):
                return True
        elif what == "None":
            if value is None:
                return True
        elif what == "float":
            if isinstance(value, int | float) and not isinstance(value, bool):
                return True
        elif what == "int":
            if isinstance(value, int) and not isinstance(value, bool):
                return True
        elif isinstance(value, bool if what == "bool" else str):
            return True
    return False
