"""Which functions of NumPy split arrays have: ``python -m parallel.array.coverage > docs/arrays_coverage.md``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType

import numpy as np

import parallel.array as pa
from parallel.array import decompositions, distance, learning, store

# By what they do; the rest of NumPy's functions are other names of these, or not about arrays.
GROUPS = {
    "Making arrays": """
        arange empty empty_like eye full full_like linspace logspace ones ones_like zeros zeros_like identity
        geomspace meshgrid tri vander fromfunction indices
    """,
    "Elements": """
        abs add arccos arccosh arcsin arcsinh arctan arctan2 arctanh bitwise_and bitwise_invert bitwise_or
        bitwise_xor bitwise_left_shift bitwise_right_shift cbrt ceil clip conj copysign cos cosh deg2rad divide
        equal exp exp2 expm1 floor floor_divide fmax fmin fmod gcd greater greater_equal heaviside hypot imag
        invert isclose isfinite isinf isnan isneginf isposinf lcm ldexp less less_equal log log10 log1p log2
        logaddexp logaddexp2 logical_and logical_not logical_or logical_xor maximum minimum mod multiply
        nan_to_num negative nextafter not_equal positive power rad2deg real reciprocal remainder rint round sign
        signbit sin sinc sinh sqrt square subtract tan tanh true_divide trunc where angle i0 interp frexp modf
    """,
    "Reductions": """
        all any argmax argmin average count_nonzero cumprod cumsum max mean min nansum prod ptp std sum var
        nanmax nanmin nanmean nanstd nanvar nanprod nanargmax nanargmin nancumsum nancumprod trapezoid
    """,
    "Shapes": """
        broadcast_to column_stack concatenate diagonal expand_dims flip hstack moveaxis pad ravel repeat reshape
        roll squeeze stack swapaxes tile transpose tril triu vstack array_split split rot90 rollaxis atleast_1d
        atleast_2d delete insert append resize dstack block
    """,
    "Indexing": """
        nonzero take argwhere flatnonzero choose compress extract select take_along_axis put_along_axis place
        put
    """,
    "Order and counts": """
        argsort bincount digitize histogram median percentile quantile searchsorted sort unique argpartition
        partition lexsort histogram2d histogramdd nanmedian nanpercentile nanquantile unique_counts isin
        intersect1d union1d setdiff1d setxor1d
    """,
    "Products and signals": """
        convolve cov diff dot matmul outer trace vdot corrcoef correlate cross ediff1d einsum gradient inner
        kron tensordot
    """,
}
LINALG = """
    norm qr svd solve lstsq cholesky det eig eigh eigvals eigvalsh inv matrix_power matrix_rank pinv slogdet cond
"""


def _table(names: list[str], ours: ModuleType | dict[str, object], prefix: str) -> Iterator[str]:
    have = ours if isinstance(ours, dict) else vars(ours)
    yield "| NumPy | split arrays |"
    yield "|---|---|"
    for name in sorted(names, key=lambda n: (n not in have, n)):
        found = have.get(name)
        doc = (inspect.getdoc(found) or "").splitlines()[0] if found is not None else "-"
        yield f"| `{prefix}{name}` | {doc} |"


def page() -> str:
    """The page, as Markdown."""
    groups = {title: names.split() for title, names in GROUPS.items()}
    known = {n for names in groups.values() for n in names}
    linear = {name: getattr(decompositions, name) for name in decompositions.NAMES} | {"norm": pa.norm}
    have = [n for n in known if n in pa.__all__] + [n for n in LINALG.split() if n in linear]
    lines = [
        "# NumPy's functions on split arrays",
        "",
        "Written by `python -m parallel.array.coverage > docs/arrays_coverage.md`; a test checks that it is current.",
        f"Of {len(known) + len(LINALG.split())} functions {len(have)} are there, "
        "in `parallel.array` and `parallel.array.decompositions`.",
        "Operators, slices, masks, arrays of indices and assignment are those of `SplitArray`.",
        "Other than in NumPy, types are promoted as torch does (int64 and float32 give float32), and whole numbers to "
        "a negative power are 0, not an error (but for 1 and -1).",
        "",
    ]
    for title, names in groups.items():
        lines += [f"## {title}", "", *_table(names, {n: getattr(pa, n) for n in names if n in pa.__all__}, "np."), ""]
    lines += ["## Linear algebra", "", *_table(LINALG.split(), linear, "np.linalg."), ""]
    own = sorted(set(pa.__all__) - known - {"Comm", "CommError", "SplitArray"})
    lines += ["## Beyond NumPy", "", "| function | |", "|---|---|"]
    more = {n: getattr(pa, n) for n in own} | {n: linear[n] for n in linear if n not in LINALG.split()}
    more |= {n: getattr(distance, n) for n in distance.NAMES} | {
        n: getattr(store, n) for n in ("load", "save", "open_store")
    }
    lines += [f"| `{n}` | {(inspect.getdoc(f) or '').splitlines()[0]} |" for n, f in sorted(more.items())]
    lines += ["", "## Estimators", "", "| class | |", "|---|---|"]
    for name in learning.__all__:
        item = getattr(learning, name)
        if inspect.isclass(item) and issubclass(item, learning.Estimator) and item is not learning.Estimator:
            lines.append(f"| `{name}` | {(inspect.getdoc(item) or '').splitlines()[0]} |")
    return "\n".join(lines) + "\n"


def unknown() -> list[str]:
    """Names of the tables that NumPy does not have."""
    names = [n for names in GROUPS.values() for n in names.split()]
    return [n for n in names if not hasattr(np, n)] + [n for n in LINALG.split() if not hasattr(np.linalg, n)]


if __name__ == "__main__":
    print(page(), end="")
