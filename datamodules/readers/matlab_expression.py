"""The arithmetic that case files use to convert units: numbers, columns of tables, ``+ - * / ^``, a few functions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_TOKEN = re.compile(
    r"""\s*(?:
        (\d+\.?\d*(?:[eEdD][-+]?\d+)?|\.\d+(?:[eEdD][-+]?\d+)?)  # number
        |([A-Za-z]\w*)                                             # name
        |(\.[*/^]|==|~=|<=|>=|[-+*/^()\[\],:.<>~])                 # sign
    )""",
    re.VERBOSE,
)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos, "tan": np.tan, "acos": np.arccos, "asin": np.arcsin,
    "atan": np.arctan, "abs": np.abs, "exp": np.exp, "log": np.log, "isinf": np.isinf, "isnan": np.isnan,
}  # fmt: skip
_CONSTANTS = {"pi": np.pi, "Inf": np.inf, "inf": np.inf, "NaN": np.nan, "eps": np.finfo(float).eps}
# Names of columns by their number, as MATPOWER's idx_bus, idx_gen and idx_brch define them.
_INDICES = {
    "idx_bus": "BUS_I BUS_TYPE PD QD GS BS BUS_AREA VM VA BASE_KV ZONE VMAX VMIN LAM_P LAM_Q MU_VMAX MU_VMIN",
    "idx_gen": "GEN_BUS PG QG QMAX QMIN VG MBASE GEN_STATUS PMAX PMIN PC1 PC2",
    "idx_brch": "F_BUS T_BUS BR_R BR_X BR_B RATE_A RATE_B RATE_C TAP SHIFT BR_STATUS ANGMIN ANGMAX",
}
COLUMN_NUMBERS = {name: i for names in _INDICES.values() for i, name in enumerate(names.split(), start=1)}
COLUMN_NUMBERS |= {"PQ": 1, "PV": 2, "REF": 3, "NONE": 4}


class CannotEvaluate(Exception):
    """The expression goes beyond what is understood here; the message says where."""


@dataclass
class Environment:
    """Values that expressions may use.

    Attributes:
        fields: Tables and numbers of the case, by name.
        variables: Other variables of the file.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, Any] = field(default_factory=dict)


def evaluate(text: str, environment: Environment, struct: str | None = None) -> Any:
    """The value of an expression: a float, or an array (row, column).

    Args:
        text: The expression.
        environment: What its names stand for.
        struct: Name of the case in the file (``mpc``); None where the tables are variables themselves.

    Raises:
        CannotEvaluate: For anything beyond the arithmetic of the module.
    """
    parser = _Parser(text, environment, struct)
    with np.errstate(all="ignore"):
        value = parser.comparison()
    parser.done()
    return value


def assign(
    target: dict[str, Any], name: str, index: str | None, value: Any, environment: Environment, struct: str | None
) -> None:
    """Do ``name = value`` or ``name(rows, columns) = value``; the table is replaced, not changed in place.

    Raises:
        CannotEvaluate: If the index cannot be read or the shapes do not fit.
    """
    if index is None:
        target[name] = value
        return
    if not isinstance(target.get(name), np.ndarray):
        raise CannotEvaluate(f"{name}{index} is assigned before {name}")
    parser = _Parser(index, environment, struct)
    rows, columns = parser.indices(target[name])
    parser.done()
    table = target[name].copy()
    try:
        table[np.ix_(rows, columns)] = value
    except ValueError:
        raise CannotEvaluate(f"the value for {name}{index} has another shape") from None
    target[name] = table


class _Parser:
    """Recursive descent over the tokens of one expression."""

    def __init__(self, text: str, environment: Environment, struct: str | None) -> None:
        self.text, self.environment, self.struct = text.strip(), environment, struct
        self.tokens: list[tuple[str, str]] = []
        position = 0
        while position < len(self.text):
            match = _TOKEN.match(self.text, position)
            if match is None:
                raise CannotEvaluate(f"{self.text!r} is not understood")
            kind = "number" if match[1] else "name" if match[2] else "sign"
            self.tokens.append((kind, match[1] or match[2] or match[3]))
            position = match.end()
        self.next = 0

    def peek(self) -> str:
        return self.tokens[self.next][1] if self.next < len(self.tokens) else ""

    def take(self, *signs: str) -> str | None:
        if self.next < len(self.tokens) and self.tokens[self.next][1] in signs:
            self.next += 1
            return self.tokens[self.next - 1][1]
        return None

    def expect(self, sign: str) -> None:
        if not self.take(sign):
            raise CannotEvaluate(f"{self.text!r}: {sign!r} is missing")

    def done(self) -> None:
        if self.next < len(self.tokens):
            raise CannotEvaluate(f"{self.text!r}: {self.peek()!r} is not understood")

    # From the weakest operator to the strongest.

    def comparison(self) -> Any:
        left = self.sum()
        if sign := self.take("==", "~=", "<", ">", "<=", ">="):
            names = {"==": "equal", "~=": "not_equal", "<": "less", ">": "greater"}
            names |= {"<=": "less_equal", ">=": "greater_equal"}
            return getattr(np, names[sign])(left, self.sum())
        return left

    def sum(self) -> Any:
        value = self.product()
        while sign := self.take("+", "-"):
            right = self.product()
            value = value + right if sign == "+" else value - right
        return value

    def product(self) -> Any:
        value = self.signed()
        while sign := self.take("*", "/", ".*", "./"):
            right = self.signed()
            if np.ndim(value) and np.ndim(right) and not sign.startswith("."):
                raise CannotEvaluate(f"{self.text!r}: products of matrices are not understood")
            value = value * right if sign.endswith("*") else value / right
        return value

    def signed(self) -> Any:
        if sign := self.take("-", "+"):
            value = self.signed()
            return -value if sign == "-" else value
        if self.take("~"):
            return np.logical_not(self.signed())
        value = self.atom()
        if self.take("^", ".^"):
            return value ** self.signed()
        return value

    def atom(self) -> Any:
        if self.next == len(self.tokens):
            raise CannotEvaluate(f"{self.text!r} ends too early")
        kind, token = self.tokens[self.next]
        self.next += 1
        if kind == "number":
            return float(token.lower().replace("d", "e"))
        if token == "(":
            value = self.comparison()
            self.expect(")")
            return value
        if token == "[":
            return self.list()
        if kind == "name":
            return self.named(token)
        raise CannotEvaluate(f"{self.text!r}: {token!r} is not understood")

    def list(self) -> np.ndarray:
        values = []
        while not self.take("]"):
            values.append(float(self.sum()))
            self.take(",")
        return np.array([values])

    def named(self, name: str) -> Any:
        if name == self.struct:
            self.expect(".")
            name = self.tokens[self.next][1] if self.next < len(self.tokens) else ""
            self.next += 1
            found = self.environment.fields.get(name)
        elif name in self.environment.variables:
            found = self.environment.variables[name]
        elif self.struct is None and name in self.environment.fields:
            found = self.environment.fields[name]
        elif name in COLUMN_NUMBERS:
            found = float(COLUMN_NUMBERS[name])
        elif name in _CONSTANTS:
            found = _CONSTANTS[name]
        elif name in _FUNCTIONS and self.take("("):
            value = self.comparison()
            self.expect(")")
            return _FUNCTIONS[name](value)
        else:
            raise CannotEvaluate(f"{name!r} in {self.text!r} is not known")
        if found is None:
            raise CannotEvaluate(f"{name!r} in {self.text!r} is not known")
        if self.peek() == "(":
            rows, columns = self.indices(np.atleast_2d(found))
            part = np.atleast_2d(found)[np.ix_(rows, columns)]
            return float(part[0, 0]) if part.size == 1 else part
        return found

    def indices(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(rows, columns)``, counted from 0."""
        self.expect("(")
        rows = self.index(table.shape[0])
        self.expect(",")
        columns = self.index(table.shape[1])
        self.expect(")")
        return rows, columns

    def index(self, size: int) -> np.ndarray:
        if self.take(":"):
            return np.arange(size)
        first = np.atleast_1d(np.asarray(self.sum(), dtype=float)).reshape(-1)
        if self.take(":"):
            last = float(np.asarray(self.sum()))
            first = np.arange(first[0], last + 1)
        if (first != np.floor(first)).any() or first.min(initial=1) < 1 or first.max(initial=1) > size:
            raise CannotEvaluate(f"{self.text!r}: an index lies outside of 1..{size}")
        return first.astype(int) - 1
