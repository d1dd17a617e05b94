"""QR, singular values and linear systems of matrices whose rows or columns are split."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from parallel.array.array import SplitArray
from parallel.array.chunks import offsets
from parallel.array.gram import QUICK_ERROR, squares_of
from parallel.array.products import matmul, tall_product
from parallel.array.rng import Generator
from parallel.array.shaping import transpose

_OVERSAMPLING = 5
_QUICK_LIMIT = 2e-6  # relative error of a singular value up to which products in float32 are kept


def _matrix(a: SplitArray, name: str) -> SplitArray:
    if a.ndim != 2:
        raise ValueError(f"{name} of an array of shape {a.shape}: it takes a matrix")
    if a.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(f"{name} of {a.dtype}: 16 bits are too few for a decomposition; use astype(torch.float32)")
    return a if a.dtype.is_floating_point else a.astype(torch.float64)


# ------------------------------------------------------------------------------------------------------------------ QR


def qr(a: SplitArray) -> tuple[SplitArray, SplitArray]:
    """``a = q r`` with orthonormal columns of ``q`` and ``r`` upper triangular with a diagonal of 0 or more: unique.

    Split 0: TSQR, local factors, then one factorisation of the stacked triangles. Split 1: block Gram-Schmidt, twice,
    the blocks of columns one after the other. There is no pivoting: of rank-deficient matrices ``q`` has some basis.

    Args:
        a: At least as many rows as columns (split 0 or None).

    Returns:
        ``q`` in the layout of ``a``; ``r``, whole (split 0, None) or split along columns (split 1).

    Raises:
        ValueError: For other shapes, or 16-bit types.
    """
    a = _matrix(a, "qr")
    if a.shape[0] < a.shape[1]:
        raise ValueError(f"qr of shape {a.shape}: a matrix with fewer rows than columns; decompose its transpose")
    if a.split == 1 and a.comm.size > 1:
        return _gram_schmidt(a)
    q, r = _tall_qr(a.local)
    if a.split == 0 and a.comm.size > 1:
        # Ranks with fewer rows than columns have triangles that are not square: zeros below change nothing.
        stacked = a.comm.all_gather(r).flatten(0, 1)
        small, r = torch.linalg.qr(stacked)
        f = a.shape[1]
        q = q @ small[a.comm.rank * f : (a.comm.rank + 1) * f]
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(r.dtype)
    q, r = q * sign, r * sign[:, None]
    return a.like(q, a.shape, a.split, a.map or None), a.like(r, r.shape, None)


def _tall_qr(local: Tensor) -> tuple[Tensor, Tensor]:
    """QR of a local part, ``(rows, f)`` and ``(f, f)``; missing rows count as zeros."""
    rows, f = local.shape
    if rows >= f:
        return torch.linalg.qr(local)
    padded = torch.cat([local, local.new_zeros(f - rows, f)])
    q, r = torch.linalg.qr(padded)
    return q[:rows], r


def _gram_schmidt(a: SplitArray) -> tuple[SplitArray, SplitArray]:
    comm, first = a.comm, offsets(a.map)
    q, r = a.local.clone(), torch.zeros(a.shape[1], a.local.shape[1], dtype=a.dtype, device=a.device)
    for owner in range(comm.size):
        if not a.map[owner]:
            continue
        if owner == comm.rank:
            block, triangle = torch.linalg.qr(q)
            sign = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(q.dtype)
            block, triangle = block * sign, triangle * sign[:, None]
            r[first[owner] : first[owner] + a.map[owner]] += triangle
            q = block
        else:
            block = q.new_empty(a.shape[0], a.map[owner])
        block = comm.broadcast(block, owner)
        if comm.rank > owner:
            for _ in range(2):  # twice is enough (Kahan, Parlett)
                overlap = block.mT @ q
                q = q - block @ overlap
                r[first[owner] : first[owner] + a.map[owner]] += overlap
    return a.like(q, a.shape, 1, a.map), a.like(r, (a.shape[1], a.shape[1]), 1, a.map)


# ----------------------------------------------------------------------------------------------------- singular values


class SVD(NamedTuple):
    """``a = u diag(s) v^T`` with some or all singular values; ``u`` and ``v`` are split as ``a`` is.

    Attributes:
        u: Left vectors, ``(m, k)``.
        s: Singular values, descending, on every rank.
        v: Right vectors, ``(n, k)``.
        error: Bound of the relative error of a truncated decomposition in the Frobenius norm; 0 if it is exact.
    """

    u: SplitArray
    s: Tensor
    v: SplitArray
    error: float = 0.0


def svd(a: SplitArray, method: Literal["tsqr", "gram"] = "tsqr", rank: int | None = None) -> SVD:
    """All singular values of a matrix that is much longer one way than the other.

    Args:
        a: Split along its longer axis, or resplit so; the shorter axis has to fit a rank squared.
        method: ``tsqr``, as accurate as LAPACK; ``gram``, eigenvalues of ``a^T a`` in float64, faster, whose error of a
            singular value ``s`` is ``1e-16 s_max^2 / s``; of float32 matrices ``6e-7 s_max^2 / s`` where that is at
            most ``2e-6 s``.
        rank: How many; None: all.
    """
    a = _matrix(a, "svd")
    if a.shape[0] < a.shape[1]:
        found = svd(transpose(a), method, rank)
        return SVD(found.v, found.s, found.u, found.error)
    a = a.resplit(0) if a.split == 1 else a
    if method == "tsqr":
        q, r = qr(a)
        small, s, vh = torch.linalg.svd(r.local)
        u = q.local @ small
    elif method == "gram":
        s, vectors, precise = _gram_eigen(a, rank)
        vh = vectors.mT
        scaled = (vectors / s.clamp(min=torch.finfo(torch.float64).tiny))[:, :rank]
        u = tall_product(a.local, scaled if precise else scaled.to(a.dtype))
    else:
        raise ValueError(f"svd: method={method!r}; choose tsqr or gram")
    k = len(s) if rank is None else rank
    s, vh = s.to(a.dtype), vh.to(a.dtype)
    error = float((s[k:].double().square().sum() / s.double().square().sum().clamp(min=1e-300)).sqrt())
    u = a.like(u[:, :k], (a.shape[0], k), a.split, a.map or None)
    return SVD(u, s[:k], a.like(vh[:k].mT.contiguous(), (a.shape[1], k), None), error)


def _gram_eigen(a: SplitArray, rank: int | None = None) -> tuple[Tensor, Tensor, bool]:
    """Singular values and right vectors of tall matrices, float64, from ``a^T a``, and whether they had to be precise.

    Products of float32 are good enough where no wanted value is much smaller than the largest one: the relative error
    of a value ``s`` is `QUICK_ERROR` ``(s_max / s)^2``.
    """

    def eigen(precise: bool) -> tuple[Tensor, Tensor]:
        squares = squares_of(a.local, precise)
        values, vectors = torch.linalg.eigh(a.comm.all_reduce(squares) if a.split == 0 else squares)
        return values.flip(0).clamp(min=0).sqrt(), vectors.flip(1)

    if a.dtype == torch.float32 and a.shape[1]:
        s, vectors = eigen(False)
        least = float(s[(rank or a.shape[1]) - 1])
        if QUICK_ERROR * float(s[0]) ** 2 <= _QUICK_LIMIT * least**2:
            return s, vectors, False
    return *eigen(True), True


def hsvd(a: SplitArray, rank: int | None = None, rtol: float | None = None) -> SVD:
    """Hierarchical SVD: local truncated ones, whose ``U S`` are merged two by two (Iwen and Ong, 2016).

    Args:
        a: Split along either axis.
        rank: Singular values to keep, with 5 more on the way.
        rtol: In place of ``rank``: relative error in the Frobenius norm that must not be passed.

    Returns:
        With ``error``, the root of all energy that was discarded over the norm of ``a``.

    Raises:
        ValueError: Unless one of rank and rtol is given, or for a rank beyond the matrix.
    """
    a = _matrix(a, "hsvd")
    if (rank is None) == (rtol is None):
        raise ValueError(f"hsvd: rank={rank}, rtol={rtol}; give one of them")
    if rank is not None and not 0 < rank <= min(a.shape):
        raise ValueError(f"hsvd: rank={rank} of a matrix of shape {a.shape}; use 1 to {min(a.shape)}")
    if a.split != 1:
        found = hsvd(transpose(a if a.split == 0 else a.resplit(0)), rank, rtol)
        return SVD(found.v, found.s, found.u, found.error)
    comm = a.comm
    energy = a.local.double().square().sum()
    energy = float(comm.all_reduce(energy))
    budget = 0.0 if rtol is None else rtol**2 * energy / max(2 * comm.size - 1, 1)  # for each truncation
    keep = None if rank is None else rank + _OVERSAMPLING

    def truncated(matrix: Tensor, last: bool = False) -> tuple[Tensor, float]:
        """``U S`` with the wanted number of columns, and the discarded energy."""
        if not matrix.shape[1]:
            return matrix, 0.0
        u, s, _ = torch.linalg.svd(matrix, full_matrices=False)
        squares = s.double().square()
        if rank is not None:
            number = min(rank if last else keep, len(s))
        else:
            tails = squares.flip(0).cumsum(0).flip(0)  # energy from each value on
            number = max(int((tails > budget).sum()), 1)
        return u[:, :number] * s[:number], float(squares[number:].sum())

    part, lost = truncated(a.local)
    step = 1
    while step < comm.size:
        partner = comm.rank ^ step if comm.rank % (2 * step) in (0, step) else None
        widths = comm.gather_counts(part.shape[1])
        if partner is not None and partner < comm.size:
            if comm.rank % (2 * step) == step:
                comm.swap(part.mT.contiguous(), partner, None, partner).wait()
            else:
                other = comm.swap(part.new_empty(0), partner, (widths[partner], a.shape[0]), partner).wait()
                part, more = truncated(torch.cat([part, other.mT], 1))
                lost += more
        step *= 2
    part, more = truncated(part, last=True) if comm.rank == 0 else (part, 0.0)
    lost = float(comm.all_reduce(torch.tensor(lost + more, dtype=torch.float64, device=comm.device)))
    width = comm.gather_counts(part.shape[1])[0]
    part = part if comm.rank == 0 else part.new_empty(a.shape[0], width)
    part = comm.broadcast(part, 0)
    s = part.norm(dim=0)
    u = part / s.clamp(min=torch.finfo(part.dtype).tiny)
    v = (a.local.mT @ u) / s.clamp(min=torch.finfo(part.dtype).tiny)
    error = math.sqrt(max(lost, 0.0) / energy) if energy else 0.0
    return SVD(a.like(u, u.shape, None), s, a.like(v, (a.shape[1], width), 0, a.map), error)


def rsvd(a: SplitArray, rank: int, power: int = 2, oversampling: int = 10, seed: int = 0) -> SVD:
    """Randomised SVD (Halko, Martinsson and Tropp, 2011).

    Args:
        a: Split along either axis.
        rank: Singular values.
        power: Power iterations, each with a QR.
        oversampling: Further directions.
        seed: Of the random directions, which are the same for every number of ranks.
    """
    a = _matrix(a, "rsvd")
    if not 0 < rank <= min(a.shape):
        raise ValueError(f"rsvd: rank={rank} of a matrix of shape {a.shape}; use 1 to {min(a.shape)}")
    if a.split == 1:
        found = rsvd(transpose(a), rank, power, oversampling, seed)
        return SVD(found.v, found.s, found.u, found.error)
    width = min(rank + oversampling, min(a.shape))
    probe = Generator(seed).normal((a.shape[1], width), a.dtype, None, a.comm)
    y = matmul(a, probe)
    for _ in range(power):
        q, _ = qr(y)
        z, _ = torch.linalg.qr(_inner_product(a, q))
        y = matmul(a, a.like(z, z.shape, None))
    q, _ = qr(y)
    b = _inner_product(q, a)  # (width, n)
    small, s, vh = torch.linalg.svd(b, full_matrices=False)
    u = a.like(q.local @ small[:, :rank], (a.shape[0], rank), a.split, a.map or None)
    total = a.local.double().square().sum()
    total = float(a.comm.all_reduce(total) if a.split == 0 else total)
    kept = float(s[:rank].double().square().sum())
    error = math.sqrt(max(total - kept, 0.0) / total) if total else 0.0
    return SVD(u, s[:rank], a.like(vh[:rank].mT.contiguous(), (a.shape[1], rank), None), error)


def _inner_product(a: SplitArray, b: SplitArray) -> Tensor:
    """``a^T b`` of two matrices with rows on the same ranks, on every rank."""
    local = a.local.mT @ b.local
    return a.comm.all_reduce(local) if a.split == 0 else local


# ------------------------------------------------------------------------------------------------------ linear systems


def lstsq(a: SplitArray, b: SplitArray, ridge: float = 0.0, method: Literal["auto", "gram", "tsqr"] = "auto") -> Tensor:
    """``argmin_w |a w - b|^2 + ridge |w|^2``, float64, on every rank.

    Args:
        a: Rows split or whole, ``(n, f)``.
        b: ``(n,)`` or ``(n, targets)``.
        ridge: Penalty.
        method: ``gram``: normal equations by Cholesky; ``tsqr``: QR, for ill-conditioned columns; ``auto``: QR where
            the condition number of the Gram matrix passes 1e10.

    Raises:
        ValueError: If the numbers of rows differ.
    """
    a = _matrix(a, "lstsq")
    a = a.resplit(0) if a.split == 1 else a
    b = b.resplit(0, a.map) if a.split == 0 else b.resplit(None)
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"lstsq: {a.shape[0]} rows on the left, {b.shape[0]} on the right")
    x, y = a.local.double(), b.local.double().reshape(len(b.local), math.prod(b.shape[1:]))
    f = a.shape[1]
    joined = torch.cat([x.mT @ x, x.mT @ y], 1)
    joined = a.comm.all_reduce(joined) if a.split == 0 else joined
    gram = joined[:, :f] + ridge * torch.eye(f, dtype=torch.float64, device=x.device)
    values = torch.linalg.eigvalsh(gram)
    ill = float(values[0]) <= 1e-10 * float(values[-1])
    if method == "tsqr" or (method == "auto" and ill):
        if ridge:
            # Rows sqrt(ridge) I belong to the first rank.
            extra = math.sqrt(ridge) * torch.eye(f, dtype=torch.float64, device=x.device)
            mine = a.comm.rank == 0
            x = torch.cat([x, extra]) if mine else x
            y = torch.cat([y, y.new_zeros(f, y.shape[1])]) if mine else y
        rows = a.comm.gather_counts(len(x)) if a.split == 0 else None
        total = len(x) if rows is None else sum(rows)
        if total < f:
            raise ValueError(f"lstsq: {total} rows do not determine {f} coefficients; use ridge above 0")
        q, r = qr(a.like(x, (total, f), a.split, rows))
        right = q.local.mT @ y
        right = a.comm.all_reduce(right) if a.split == 0 else right
        found = torch.linalg.solve_triangular(r.local, right, upper=True)
    else:
        found = torch.cholesky_solve(joined[:, f:], torch.linalg.cholesky(gram))
    return found.reshape(f, *b.shape[1:])


class Solution(NamedTuple):
    """What `solve` found: ``x`` split as the rows of the matrix, iterations, and the relative residual."""

    x: SplitArray
    iterations: int
    residual: float


def solve(a: SplitArray, b: SplitArray, rtol: float = 1e-10, max_iter: int | None = None) -> Solution:
    """``a x = b`` for a symmetric positive definite matrix by conjugate gradients, several right sides at once.

    Args:
        a: ``(n, n)``, rows split or whole.
        b: ``(n,)`` or ``(n, sides)``.
        rtol: Residual over the norm of ``b`` that is small enough.
        max_iter: Most iterations; None: ``10 n``.

    Raises:
        ValueError: For shapes that do not fit, or a matrix that shows not to be positive definite.
    """
    a = _matrix(a, "solve")
    if a.shape[0] != a.shape[1] or a.shape[0] != b.shape[0]:
        raise ValueError(f"solve: a matrix of shape {a.shape} and a right side of shape {b.shape} do not fit")
    a = a.resplit(0) if a.split == 1 else a
    b = b.resplit(0, a.map) if a.split == 0 else b.resplit(None)
    rhs = b.local.to(a.dtype).reshape(len(b.local), math.prod(b.shape[1:]))

    def total(value: Tensor) -> Tensor:
        value = value.double().sum(0)
        return a.comm.all_reduce(value) if a.split == 0 else value

    def product(p: Tensor) -> Tensor:
        whole = a.comm.all_gather_rows(p.contiguous(), a.map) if a.split == 0 else p
        return a.local @ whole

    x, r = torch.zeros_like(rhs), rhs.clone()
    p, rr, scale = r.clone(), total(r * r), total(rhs * rhs)
    tiny, iterations = torch.finfo(torch.float64).tiny, 0
    while bool((rr > rtol**2 * scale).any()) and iterations < (10 * a.shape[0] if max_iter is None else max_iter):
        ap = product(p)
        curvature = total(p * ap)
        active = rr > rtol**2 * scale
        if bool((curvature[active] <= 0).any()):
            raise ValueError("solve: the matrix is not symmetric positive definite; use lstsq")
        alpha = torch.where(active, rr / curvature.clamp(min=tiny), 0.0).to(a.dtype)
        x, r = x + alpha * p, r - alpha * ap
        new = total(r * r)
        p = r + torch.where(active, new / rr.clamp(min=tiny), 0.0).to(a.dtype) * p
        rr, iterations = new, iterations + 1
    residual = float((rr / scale.clamp(min=tiny)).sqrt().max())
    shape = (a.shape[0], *b.shape[1:])
    return Solution(a.like(x.reshape(len(x), *b.shape[1:]), shape, a.split, a.map or None), iterations, residual)


class Lanczos(NamedTuple):
    """Krylov basis and tridiagonal matrix: ``values`` and ``vectors`` of the wanted end of the spectrum."""

    values: Tensor
    vectors: Tensor


def lanczos(
    product: Callable[[Tensor], Tensor],
    rows: int,
    map_: tuple[int, ...],
    like: SplitArray,
    wanted: int,
    steps: int,
    seed: int = 0,
    tol: float = 1e-9,
) -> Lanczos:
    """Largest eigenvalues of a symmetric operator, descending, with full reorthogonalisation (twice), in float64.

    One start vector meets one direction of every eigenspace: further passes, orthogonal to what was found, look for the
    others, until a pass finds nothing that belongs to the wanted end. So a graph of several parts has all its 1s.

    Args:
        product: ``local rows of A v`` from the local rows of ``v``.
        rows: Of the operator.
        map_: Rows of every rank; empty: all on each.
        like: Tells the ranks.
        wanted: Eigenvalues.
        steps: Largest size of the basis; a pass ends earlier where all residuals are below ``tol``.
        seed: Of the start vectors, the same for every number of ranks.
        tol: Residual norm of a wanted pair.

    Returns:
        ``values`` and the local rows of ``vectors``, ``(local rows, wanted)``.
    """
    local = map_[like.comm.rank] if map_ else rows
    values = torch.empty(0, dtype=torch.float64)
    vectors = torch.zeros(local, 0, dtype=torch.float64, device=like.device)
    for turn in range(wanted):
        if vectors.shape[1] >= rows:
            break
        found = _krylov(product, rows, map_, like, wanted, steps, Generator(seed, stream=turn), tol, vectors)
        known = values
        values, vectors = torch.cat([values, found.values]), torch.cat([vectors, found.vectors], 1)
        order = torch.argsort(values, descending=True, stable=True)[:wanted]
        nothing_new = len(known) >= wanted and float(found.values[0]) <= float(known.min()) + 1e-8
        values, vectors = values[order], vectors[:, order]
        if nothing_new or wanted == 1:
            break
    return Lanczos(values, vectors)


def _krylov(
    product: Callable[[Tensor], Tensor],
    rows: int,
    map_: tuple[int, ...],
    like: SplitArray,
    wanted: int,
    steps: int,
    generator: Generator,
    tol: float,
    locked: Tensor,
) -> Lanczos:
    """One pass in the complement of the columns of ``locked``."""
    comm = like.comm
    start = generator.normal((rows,), torch.float64, 0 if map_ else None, comm)
    v = (start.resplit(0, map_) if map_ else start).local.to(like.device)
    steps = min(steps, rows - locked.shape[1])
    basis = torch.zeros(len(v), steps, dtype=torch.float64, device=like.device)
    alpha: list[float] = []
    beta: list[float] = []

    def total(value: Tensor) -> Tensor:
        return comm.all_reduce(value) if map_ else value

    def orthogonal(w: Tensor, number: int) -> Tensor:
        for _ in range(2):
            both = torch.cat([locked, basis[:, :number]], 1)
            w = w - both @ total(both.mT @ w)
        return w

    v = orthogonal(v, 0)
    v = v / total(v @ v).sqrt()
    for step in range(steps):
        basis[:, step] = v
        w = product(v)
        alpha.append(float(total(v @ w)))
        w = orthogonal(w, step + 1)
        size = float(total(w @ w).sqrt())
        last = step + 1 == steps
        if size < 1e-12 or last or step % 20 == 19:  # an invariant subspace, the end, or time to look
            residual = size * _tridiagonal(alpha, beta)[1][-1].flip(0)[:wanted].abs()
            if size < 1e-12 or last or (step + 1 >= wanted and bool((residual < tol).all())):
                break
        beta.append(size)
        v = w / size
    values, small = _tridiagonal(alpha, beta)
    number = min(wanted, len(alpha))
    small = small.flip(1)[:, :number].to(like.device)
    return Lanczos(values.flip(0)[:number], basis[:, : len(alpha)] @ small)


def _tridiagonal(alpha: list[float], beta: list[float]) -> tuple[Tensor, Tensor]:
    """Eigenvalues (ascending) and vectors of the projected operator."""
    off = torch.tensor(beta[: len(alpha) - 1], dtype=torch.float64)
    small = torch.diag(torch.tensor(alpha, dtype=torch.float64)) + torch.diag(off, 1) + torch.diag(off, -1)
    return torch.linalg.eigh(small)


NAMES = ("qr", "svd", "hsvd", "rsvd", "lstsq", "solve")
