"""What a ``_target_`` accepts, read from source files without importing them.

Importing a target to look at its signature would load torch and Lightning (seconds) before the first mistake is
reported. So names are followed through ``import`` statements with `ast`: fast, free of side effects, and it works for
classes whose optional dependencies are missing. Where the static path ends (compiled modules, names made at run time)
the target is imported after all.
"""

from __future__ import annotations

import ast
import copy
import difflib
import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

_DYNAMIC = object()


class TargetError(Exception):
    """A target that does not exist; the message says what is missing and what comes close."""


@dataclass(frozen=True)
class Signature:
    """Arguments of a callable: their names, those without a default, and whether any other name is accepted."""

    names: tuple[str, ...]
    required: tuple[str, ...] = ()
    open: bool = False
    literals: dict[str, object] = field(default_factory=dict, compare=False)  # class-level constants, bases included
    annotations: dict[str, str] = field(default_factory=dict, compare=False)  # of the arguments, as written


@cache
def signature(target: str) -> Signature:
    """Find the callable named ``target`` (dotted path) and describe its arguments.

    Raises:
        TargetError: If the module or the attribute does not exist.
    """
    found = _find(target)
    if found is _DYNAMIC:
        return _imported(target)
    module, node = found
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        names, required, is_open = _arguments(node.args, bound=False)
        return Signature(names, required, is_open, annotations=_annotations(module, node.args))
    described = _class(module, node)
    return _imported(target) if described is None else described


def hint(name: str, known: Iterator[str] | tuple[str, ...] | list[str]) -> str:
    """A suggestion: the closest known name, or all of them."""
    known = sorted(known)
    if close := difflib.get_close_matches(name, known, n=1, cutoff=0.6):
        return f" Did you mean '{close[0]}'?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f" Known: {shown}." if known else ""


def _imported(target: str) -> Signature:
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            thing: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[cut:]:
                thing = getattr(thing, part)
            parameters = inspect.signature(thing).parameters.values()
        except AttributeError as error:
            raise TargetError(f"'{'.'.join(parts[:cut])}' has no '{parts[cut]}'") from error
        except (TypeError, ValueError):  # builtins without a signature
            return Signature((), open=True)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return Signature(tuple(p.name for p in named), tuple(p.name for p in named if p.default is p.empty), is_open)
    raise TargetError(f"no module named '{parts[0]}'")


@cache
def _file(module: str) -> Path | object | None:
    """Source file of a module; None if it does not exist; `_DYNAMIC` if it has no source."""
    head, *rest = module.split(".")
    roots = [Path(entry or ".") for entry in sys.path]
    for name in [head, *rest]:
        packages = [root / name for root in roots if (root / name).is_dir()]
        files = [root / f"{name}.py" for root in roots if (root / f"{name}.py").is_file()]
        compiled = any(list(root.glob(f"{name}.*.so")) for root in roots if root.is_dir())
        roots = packages
        if not packages and not files:
            return _DYNAMIC if compiled or head in sys.builtin_module_names else None
    inits = [p / "__init__.py" for p in packages if (p / "__init__.py").is_file()]
    if inits or files:
        return (inits or files)[0]
    return _DYNAMIC


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Top-level statements, those under ``if`` and ``try`` included."""
    for statement in body:
        yield statement
        for branch in ("body", "orelse", "finalbody"):
            if isinstance(statement, ast.If | ast.Try):
                yield from _statements(getattr(statement, branch, []))
        for handler in getattr(statement, "handlers", []):
            yield from _statements(handler.body)


def _find(target: str):
    """Follow a dotted path to (module, definition node), or `_DYNAMIC`."""
    parts = target.split(".")
    for cut in range(len(parts), 0, -1):
        module = ".".join(parts[:cut])
        path = _file(module)
        if path is _DYNAMIC:
            return _DYNAMIC
        if path is not None:
            break
    else:
        raise TargetError(f"no module named '{parts[0]}'.{hint(parts[0], _top_level())}")
    if cut == len(parts):
        raise TargetError(f"'{target}' is a module, not something to call")
    return _attribute(module, parts[cut:], frozenset())


@cache
def _top_level() -> list[str]:
    return [p.name for p in Path(__file__).parents[1].iterdir() if (p / "__init__.py").is_file()]


def _attribute(module: str, names: list[str], seen: frozenset[tuple[str, str]]):
    """Find ``names[0]`` in ``module`` (and the rest inside it)."""
    name, rest = names[0], names[1:]
    path = _file(module)
    if path is _DYNAMIC or path is None or (module, name) in seen:
        return _DYNAMIC
    seen = seen | {(module, name)}
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    stars, dynamic = [], False
    found = None
    for node in _statements(_tree(path).body):  # the last definition wins, as at run time
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name == name:
                found = (module, node)
            dynamic |= node.name == "__getattr__"
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(node, package)
            for alias in node.names:
                if alias.name == "*":
                    stars.append(source)
                elif (alias.asname or alias.name) == name:
                    found = (source, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname == name:
                    found = (alias.name, None)
                elif alias.asname is None and alias.name.split(".")[0] == name:
                    found = (name, None)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                found = (module, _dotted(node.value)) if _dotted(node.value) else _DYNAMIC
    if found is _DYNAMIC:
        return _DYNAMIC
    if found is not None:
        source, what = found
        if isinstance(what, ast.ClassDef) and rest:
            method = next((n for n in what.body if isinstance(n, ast.FunctionDef) and n.name == rest[0]), None)
            return _DYNAMIC if method is None or rest[1:] or method.decorator_list else (module, method)
        if isinstance(what, ast.AST):
            return found
        following = ([] if what is None else what.split(".")) + rest
        if not following:
            raise TargetError(f"'{module}.{name}' is a module, not something to call")
        submodule = _file(f"{source}.{following[0]}")
        if what is not None and isinstance(submodule, Path) and len(following) > 1:
            return _attribute(f"{source}.{following[0]}", following[1:], seen)
        return _attribute(source, following, seen)
    for star in stars:
        try:
            return _attribute(star, names, seen)
        except TargetError:
            continue
    if dynamic:
        return _DYNAMIC
    statements = list(_statements(_tree(path).body))
    known = {n.name for n in statements if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    if path.name == "__init__.py":  # what a package takes from its modules
        known |= {a.asname or a.name for n in statements if isinstance(n, ast.ImportFrom) for a in n.names}
    public = [k for k in known if not k.startswith("_")]
    if path.name == "__init__.py":
        public += [p.stem for p in path.parent.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()]
    raise TargetError(f"'{module}' has no '{name}'.{hint(name, public)}")


def _absolute(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    base = package.split(".")
    base = base[: len(base) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def _dotted(node: ast.expr | None) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (left := _dotted(node.value)):
        return f"{left}.{node.attr}"
    return None


def _arguments(args: ast.arguments, bound: bool) -> tuple[tuple[str, ...], tuple[str, ...], bool]:
    positional = [*args.posonlyargs, *args.args]
    without_default = positional[: len(positional) - len(args.defaults)]
    if bound:
        positional, without_default = positional[1:], without_default[1:]
    required = [a.arg for a in without_default]
    required += [a.arg for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True) if default is None]
    return tuple(a.arg for a in [*positional, *args.kwonlyargs]), tuple(required), args.kwarg is not None


class _Aliases(ast.NodeTransformer):
    """Replaces the names of aliases (``Mode = Literal["a", "b"]``) that a module defines itself or takes from another.

    Modules of other distributions are not looked into: theirs are long, and name no choices.
    """

    def __init__(self, module: str) -> None:
        self.module, path = module, _file(module)
        self.known: dict[str, ast.expr] = {}
        self.taken: dict[str, tuple[str, str]] = {}  # (module, its name there) by the name here
        if not isinstance(path, Path):
            return
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in _statements(_tree(path).body):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.known[node.targets[0].id] = node.value
            elif isinstance(node, ast.ImportFrom) and _is_near(source := _absolute(node, package), module):
                self.taken |= {alias.asname or alias.name: (source, alias.name) for alias in node.names}

    def visit_Name(self, node: ast.Name) -> ast.expr:
        value = _assigned(self.module, node.id)
        return value if isinstance(value, ast.Subscript | ast.BinOp) else node


def _assigned(module: str, name: str) -> ast.expr | None:
    """What a name of a module was assigned, there or where it comes from; None where that is not found."""
    seen: set[tuple[str, str]] = set()
    while (module, name) not in seen:
        seen.add((module, name))
        aliases = _aliases(module)
        if name in aliases.known or name not in aliases.taken:
            return aliases.known.get(name)
        module, name = aliases.taken[name]
    return None


@cache
def _aliases(module: str) -> _Aliases:
    return _Aliases(module)


def _is_near(source: str, module: str) -> bool:
    """Whether a module belongs to this program, or to the same package as another."""
    head = source.split(".")[0]
    return head == module.split(".")[0] or head in _top_level()


def _annotations(module: str, args: ast.arguments) -> dict[str, str]:
    """Annotations as written, aliases resolved; a default of None is one of the values that are accepted."""
    aliases = _aliases(module)
    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    found = {}
    for argument, default in zip([*positional, *args.kwonlyargs], [*defaults, *args.kw_defaults], strict=True):
        if argument.annotation is not None:
            optional = " | None" if isinstance(default, ast.Constant) and default.value is None else ""
            written = aliases.visit(copy.deepcopy(argument.annotation))
            found[argument.arg] = f"{ast.unparse(written)}{optional}"
    return found


def _class(module: str, node: ast.ClassDef, depth: int = 0) -> Signature | None:
    """Signature of a class's constructor, inherited where it has none; None where that cannot be read statically."""
    if depth > 20:
        return None
    bases, unknown_base = [], False
    for base in node.bases:
        dotted = _dotted(base.value if isinstance(base, ast.Subscript) else base)
        if dotted in {"object", "Protocol", "ABC", "Generic", "NamedTuple"}:
            continue
        located = _DYNAMIC if dotted is None else _attribute_or_dynamic(module, dotted)
        inherited = None
        if located is not _DYNAMIC and isinstance(located[1], ast.ClassDef):
            inherited = _class(*located, depth + 1)
        if inherited is None:
            unknown_base = True
        else:
            bases.append(inherited)
    literals: dict[str, object] = {}
    for inherited in reversed(bases):
        literals |= inherited.literals
    fields: list[tuple[str, bool]] = []
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            if "ClassVar" not in ast.unparse(statement.annotation):
                fields.append((statement.target.id, statement.value is None))
            target, value = statement.target.id, statement.value
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            target, value = statement.targets[0].id, statement.value
        else:
            continue
        try:
            literals[target] = ast.literal_eval(value) if value is not None else None
        except ValueError:
            literals.pop(target, None)
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is not None:
        names, required, is_open = _arguments(init.args, bound=True)
        passed_on = _passed_on(init) if is_open else None
        if passed_on is not None and bases and not unknown_base:
            for inherited in bases:
                names += tuple(n for n in inherited.names if n not in names and n not in passed_on)
            is_open = any(inherited.open for inherited in bases)
        annotations = {k: v for inherited in reversed(bases) for k, v in inherited.annotations.items() if k in names}
        return Signature(names, required, is_open, literals, annotations | _annotations(module, init.args))
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        inherited_names = tuple(n for base in bases for n in base.names)
        names = inherited_names + tuple(n for n, _ in fields if n not in inherited_names)
        required = tuple(n for base in bases for n in base.required) + tuple(n for n, bare in fields if bare)
        return Signature(names, required, unknown_base, literals)
    if unknown_base:
        return None
    if not bases:
        return Signature((), (), False, literals)
    first = bases[0]
    return Signature(first.names, first.required, first.open, literals, first.annotations)


def _passed_on(init: ast.FunctionDef) -> set[str] | None:
    """What ``super().__init__(..., **kwargs)`` sets beside ``**kwargs``; None if the kwargs do not go there."""
    for call in ast.walk(init):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "super().__init__":
            names = {keyword.arg for keyword in call.keywords if keyword.arg}
            unpacked = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None]
            return names if init.args.kwarg.arg in unpacked else None
    return None


def _attribute_or_dynamic(module: str, dotted: str):
    try:
        return _attribute(module, dotted.split("."), frozenset())
    except TargetError:
        return _DYNAMIC
