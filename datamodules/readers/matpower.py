"""MATPOWER case files (``.m``): tables, names, and the arithmetic with which some files convert their units."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.readers.matlab_expression import CannotEvaluate, Environment, assign, evaluate

BUS = ("bus_i", "type", "Pd", "Qd", "Gs", "Bs", "area", "Vm", "Va", "baseKV", "zone", "Vmax", "Vmin")
GEN = ("bus", "Pg", "Qg", "Qmax", "Qmin", "Vg", "mBase", "status", "Pmax", "Pmin")
BRANCH = ("fbus", "tbus", "r", "x", "b", "rateA", "rateB", "rateC", "ratio", "angle", "status", "angmin", "angmax")
COLUMNS = {"bus": BUS, "gen": GEN, "branch": BRANCH}
"""Columns of the tables as the manual of MATPOWER names them; what follows them (an earlier solution) is left out."""

# What a table must have, and what its other columns are where an old file lacks them.
_NEEDED = {"bus": 10, "gen": 6, "branch": 5}
_MISSING = {
    "bus": {"zone": 1.0, "Vmax": 1.1, "Vmin": 0.9},
    "gen": {"mBase": np.nan, "status": 1.0, "Pmax": np.inf, "Pmin": -np.inf},
    "branch": {"rateA": 0.0, "rateB": 0.0, "rateC": 0.0, "ratio": 0.0, "angle": 0.0, "status": 1.0}
    | {"angmin": -360.0, "angmax": 360.0},
}
# Limits may be infinite, nothing may be NaN.
_FINITE = {
    "bus": ("bus_i", "type", "Pd", "Qd", "Gs", "Bs", "Vm", "Va", "baseKV"),
    "gen": ("bus", "Pg", "Vg", "status"),
    "branch": ("fbus", "tbus", "r", "x", "b", "ratio", "angle", "status"),
}
_ASSIGNMENT = re.compile(r"\s*(?:(\w+)\.)?(\w+)\s*(\([^=]*\))?\s*=(?!=)\s*(.*)", re.DOTALL)
_FUNCTION = re.compile(r"\s*function\s+(?:(\w+)|\[([^\]]*)\])\s*=\s*(\w+)")


class _Statement(NamedTuple):
    """A statement without comments, on one line, with the number of its first line."""

    line: int
    text: str


def read_case(path: Path | str) -> dict[str, Any]:
    """Read a case file of version 1 or 2.

    Comments, continued lines, several rows on a line, and columns that old files lack are understood, and so are
    assignments with the usual arithmetic: ``mpc.bus(:, [PD, QD]) = mpc.bus(:, [PD, QD]) / 1e3;`` converts kW to MW in
    distribution cases. Costs, DC lines and other fields are passed over.

    Args:
        path: The file.

    Returns:
        ``name``, ``base_mva`` and the tables ``bus`` (bus, 13), ``gen`` (generator, 10) and ``branch`` (branch, 13) as
        float64 in MATPOWER's units (MW, MVAr, p.u., degrees, kV), rows and bus numbers as in the file, and
        ``bus_names``: those of the file, else ``bus <number>``; a name that occurs twice gets the number of its bus.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: Names file, line and column, and what is wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no case file {path}")
    reader = _Reader(path)
    reader.run(path.read_text(encoding="utf-8", errors="replace").splitlines())
    return reader.case()


def write_case(case: Mapping[str, Any], path: Path | str, comment: str = "") -> None:
    """Write a case as a compact file of version 2; `read_case` gives the same numbers back.

    Args:
        case: As `read_case` returns it.
        path: The file.
        comment: Lines for its head.
    """
    lines = [f"function mpc = {Path(path).stem}", *(f"% {line}".rstrip() for line in comment.splitlines())]
    lines += ["mpc.version = '2';", f"mpc.baseMVA = {_number(case['base_mva'])};"]
    for table, columns in COLUMNS.items():
        lines += [f"% {' '.join(columns)}", f"mpc.{table} = ["]
        lines += ["\t".join(map(_number, row)) + ";" for row in np.asarray(case[table])[:, : len(columns)]]
        lines.append("];")
    names = case.get("bus_names")
    if names is not None and list(names) != _default_names(case["bus"][:, 0]):
        lines += ["mpc.bus_name = {", *("'{}';".format(name.replace("'", "''")) for name in names), "};"]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _number(value: float) -> str:
    value = float(value)
    if not np.isfinite(value):
        return "NaN" if np.isnan(value) else "Inf" if value > 0 else "-Inf"
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _default_names(numbers: np.ndarray) -> list[str]:
    return [f"bus {int(number)}" for number in numbers]


class _Reader:
    """Goes through the lines of a file, keeps tables and variables."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.struct: str | None = "mpc"
        self.values = Environment()
        self.rows: dict[str, list[int]] = {}  # line of every row of a table
        self.names: list[str] | None = None
        self.names_line = 0

    def fail(self, line: int, what: str, column: str | None = None) -> ValueError:
        where = f", column {column}" if column else ""
        return ValueError(f"{self.path}, line {line}{where}: {what}")

    # ------------------------------------------------------------------------------------------------------- lines

    def run(self, lines: list[str]) -> None:
        skipping = 0  # depth of a block whose condition is false
        for statement in self._statements(lines):
            word = (statement.text.split("(")[0].split() or [""])[0]
            if skipping:
                skipping += word in ("if", "for", "while", "switch")
                skipping -= word == "end"
            elif word == "function":
                self._function(statement)
            elif word == "if":
                skipping = 0 if self._holds(statement) else 1
            elif word in ("end", "return", "define_constants", "else") or not word:
                skipping = int(word == "else")
            else:
                self._execute(statement)

    def _statements(self, lines: list[str]) -> Iterator[_Statement]:
        """Statements; tables and lists of names are read on the way, since they are most of a file."""
        position, depth = 0, 0
        while position < len(lines):
            start, text = position + 1, lines[position]
            position += 1
            if text.strip() in ("%{", "%}"):
                depth += 1 if text.strip() == "%{" else -1
                continue
            text = _without_comment(text)
            if depth > 0 or not text.strip():
                continue
            match = _ASSIGNMENT.match(text)
            if match and match[3] is None and match[4][:1] in ("[", "{"):
                position, text = self._block(lines, position - 1, match)
                start = position
            while text.rstrip().endswith("...") and position < len(lines):
                text = text.rstrip()[:-3] + " " + _without_comment(lines[position])
                position += 1
            for part in _split(text):
                if part:
                    yield _Statement(start, part)

    def _block(self, lines: list[str], position: int, match: re.Match[str]) -> tuple[int, str]:
        """Read ``name = [ ... ]`` or ``{ ... }`` from this line on; the position after it, the rest of its line."""
        name, closing = match[2], {"[": "]", "{": "}"}[match[4][0]]
        ours = match[1] in (self.struct, None)
        wanted = ours and name in COLUMNS and closing == "]"
        start, text = position, match[4][1:]
        pieces: list[tuple[int, str]] = []
        while True:
            end = _find_closing(text, closing)
            if wanted or (ours and name == "bus_name"):
                pieces.append((position + 1, text if end is None else text[:end]))
            if end is not None:
                break
            position += 1
            if position == len(lines):
                raise self.fail(start + 1, f"the table {name} has no end ('{closing}' is missing)")
            text = _without_comment(lines[position])
        if wanted:
            self._table(name, start + 1, pieces)
        elif ours and name == "bus_name":
            quoted = r"'((?:[^']|'')*)'|\"([^\"]*)\""
            found = [(a or b).replace("''", "'") for _, piece in pieces for a, b in re.findall(quoted, piece)]
            self.names, self.names_line = [" ".join(n.split()) for n in found], start + 1
        rest = text[end + 1 :].lstrip(" \t;")
        if rest and wanted and rest[0] in "'*/+-.(":
            raise self.fail(position + 1, f"{rest!r} behind the table {name} is not understood; {_RESAVE}")
        return position + 1, rest

    def _table(self, name: str, start: int, pieces: list[tuple[int, str]]) -> None:
        rows: list[list[float]] = []
        numbers: list[int] = []
        pending: list[str] = []
        for line, piece in pieces:
            text = piece.replace(",", " ")
            continued = text.rstrip().endswith("...")
            parts = (text.rstrip()[:-3] if continued else text).split(";")
            for i, part in enumerate(parts):
                pending += part.split()
                if pending and not (continued and i == len(parts) - 1):
                    rows.append(self._row(name, line, pending))
                    numbers.append(line)
                    pending = []
        if not rows:
            raise self.fail(start, f"the table {name} is empty")
        for row, line in zip(rows, numbers, strict=True):
            if len(row) != len(rows[0]):
                raise self.fail(
                    line, f"a row of {name} has {len(row)} values, the first one (line {numbers[0]}) {len(rows[0])}"
                )
        if len(rows[0]) < _NEEDED[name]:
            columns = COLUMNS[name]
            raise self.fail(
                numbers[0],
                f"the rows of {name} have {len(rows[0])} values; {_NEEDED[name]} are needed: "
                f"{', '.join(columns[: _NEEDED[name]])}",
                columns[len(rows[0])],
            )
        self.values.fields[name], self.rows[name] = np.array(rows), numbers

    def _row(self, name: str, line: int, tokens: list[str]) -> list[float]:
        try:
            return list(map(float, tokens))
        except ValueError:
            return [self._entry(name, line, i, token) for i, token in enumerate(tokens)]

    def _entry(self, name: str, line: int, index: int, token: str) -> float:
        """A number, or arithmetic such as ``50/3``."""
        try:
            return float(token)
        except ValueError:
            try:
                return float(evaluate(token, self.values))
            except (CannotEvaluate, TypeError, ValueError):
                columns = COLUMNS[name]
                column = columns[index] if index < len(columns) else str(index + 1)
                raise self.fail(line, f"{token!r} in {name} is not a number", column) from None

    # -------------------------------------------------------------------------------------------------- statements

    def _function(self, statement: _Statement) -> None:
        match = _FUNCTION.match(statement.text)
        if match is None:
            raise self.fail(statement.line, "this is no case: expected 'function mpc = name'")
        self.struct = match[1]  # version 1 returns the tables themselves

    def _holds(self, statement: _Statement) -> bool:
        condition = statement.text.split(None, 1)[1] if " " in statement.text else statement.text[2:]
        try:
            return bool(evaluate(condition, self.values, self.struct))
        except CannotEvaluate as error:
            raise self.fail(statement.line, f"{error}; {_RESAVE}") from None

    def _execute(self, statement: _Statement) -> None:
        """Do an assignment; one that we cannot do is an error only where it would change the grid."""
        match = _ASSIGNMENT.match(statement.text)
        if match is None:
            return
        owner, name, index, value = match.groups()
        ours = owner == self.struct if owner else (name in COLUMNS or name == "baseMVA") and self.struct is None
        if owner and not ours:
            return
        concerns_us = ours and name in (*COLUMNS, "baseMVA")
        if ours and not concerns_us:
            return
        try:
            target = self.values.fields if ours else self.values.variables
            assign(target, name, index, evaluate(value, self.values, self.struct), self.values, self.struct)
        except CannotEvaluate as error:
            if concerns_us:
                raise self.fail(statement.line, f"{error}; {_RESAVE}") from None

    # ------------------------------------------------------------------------------------------------------ result

    def case(self) -> dict[str, Any]:
        """What was read, with all columns, checked."""
        fields = self.values.fields
        for name in (*COLUMNS, "baseMVA"):
            if name not in fields:
                raise ValueError(f"{self.path}: this is no MATPOWER case: it has no {name}")
        base = float(np.asarray(fields["baseMVA"]).reshape(-1)[0])
        if not (np.isfinite(base) and base > 0):
            raise ValueError(f"{self.path}: baseMVA={base:g} must be above 0")
        tables = {name: self._completed(name, fields[name]) for name in COLUMNS}
        tables["gen"][:, 6] = np.where(np.isnan(tables["gen"][:, 6]), base, tables["gen"][:, 6])
        self._check(tables)
        return {"name": self.path.stem, "base_mva": base, **tables, "bus_names": self._bus_names(tables["bus"][:, 0])}

    def _completed(self, name: str, table: np.ndarray) -> np.ndarray:
        columns = COLUMNS[name]
        out = np.empty((len(table), len(columns)))
        for i, column in enumerate(columns):
            out[:, i] = table[:, i] if i < table.shape[1] else _MISSING[name][column]
        for column in _FINITE[name]:
            wrong = ~np.isfinite(out[:, columns.index(column)])
            if wrong.any():
                row = int(wrong.argmax())
                raise self.fail(self.rows[name][row], f"{out[row, columns.index(column)]:g} in {name}", column)
        return out

    def _check(self, tables: dict[str, np.ndarray]) -> None:
        numbers = tables["bus"][:, 0]
        first: dict[float, int] = {}
        for row, number in enumerate(numbers):
            line = self.rows["bus"][row]
            if number != int(number) or number < 1:
                raise self.fail(line, f"{number:g} is no number of a bus: use whole numbers from 1", "bus_i")
            if number in first:
                raise self.fail(line, f"bus {number:g} is there already (line {first[number]})", "bus_i")
            first[number] = line
            if tables["bus"][row, 1] not in (1, 2, 3, 4):
                raise self.fail(
                    line, f"type {tables['bus'][row, 1]:g}: use 1 (PQ), 2 (PV), 3 (slack) or 4 (isolated)", "type"
                )
        for name, columns in (("gen", ("bus",)), ("branch", ("fbus", "tbus"))):
            for column in columns:
                ends = tables[name][:, COLUMNS[name].index(column)]
                unknown = ~np.isin(ends, numbers)
                if unknown.any():
                    row = int(unknown.argmax())
                    raise self.fail(self.rows[name][row], f"{name} names bus {ends[row]:g}, which bus lacks", column)

    def _bus_names(self, numbers: np.ndarray) -> list[str]:
        if self.names is None:
            return _default_names(numbers)
        if len(self.names) != len(numbers):
            raise self.fail(self.names_line, f"bus_name has {len(self.names)} names for {len(numbers)} buses")
        count = Counter(self.names)
        return [
            name if name and count[name] == 1 else f"{name} ({int(number)})".strip()
            for name, number in zip(self.names, numbers, strict=True)
        ]


_RESAVE = "save the case with MATPOWER's savecase, which writes plain tables"


def _unquoted(text: str) -> Iterator[tuple[int, str]]:
    """Positions and characters outside of quotes; an apostrophe behind a value is a transpose and opens none."""
    i, quote = 0, ""
    while i < len(text):
        c = text[i]
        if quote:
            if c == quote and text[i + 1 : i + 2] == quote:
                i += 1  # a doubled quote stands for itself
            elif c == quote:
                quote = ""
        elif c == '"' or (c == "'" and not (i and (text[i - 1].isalnum() or text[i - 1] in ")]}_'."))):
            quote = c
        else:
            yield i, c
        i += 1


def _without_comment(text: str) -> str:
    """Cut at ``%``, and behind ``...``, what follows which is a comment too."""
    if "%" not in text and "..." not in text:
        return text
    for i, c in _unquoted(text):
        if c == "%":
            return text[:i]
        if c == "." and text[i : i + 3] == "...":
            return text[: i + 3]
    return text


def _find_closing(text: str, closing: str) -> int | None:
    """Position of the bracket."""
    return next((i for i, c in _unquoted(text) if c == closing), None) if closing in text else None


def _split(text: str) -> Iterator[str]:
    """Statements of a line, separated by ``;`` outside of brackets."""
    depth, begin = 0, 0
    for i, c in _unquoted(text):
        depth += (c in "([{") - (c in ")]}")
        if c == ";" and depth == 0:
            yield text[begin:i].strip()
            begin = i + 1
    if text[begin:].strip():
        yield text[begin:].strip()
