"""The kernels' sums and gradients in plain PyTorch, a few rows at a time in reused scratch: any
device, no Triton.

Same signatures, same tables and same edges as ``drkl_triton.kernels``. A tile is at most TILE
elements, so the extra memory is 12 MB (24 in float64) whatever the size of the logits. A row
longer than TILE is walked in several tiles whose sums are merged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._layout import Rows
from .algebra import IGNORED, INVALID, SUMS, merge

# Elements of a tile. Every operation on it ends with all threads waiting for each other, so a tile
# is as large as 12 MB of scratch allow (three float32 buffers): a fourth of it took 1.15 to 1.2
# times as long with spinning threads, 1.9 to 2.3 times with OMP_WAIT_POLICY=passive (V = 50257, two
# cores).
TILE = 1 << 20
# Rows of a tile at most: short rows gain nothing from more.
TILE_ROWS = 32
INF = float("inf")
LN2 = 0.6931471805599453


def new_output(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory. The tests replace this function to fill it with NaN first."""
    return torch.empty(shape, dtype=dtype, device=device)


class _Scratch:
    """Three buffers of TILE elements, handed out as [rows, columns]."""

    def __init__(self, dtype: torch.dtype, device: torch.device, columns: int):
        self.columns = min(columns, TILE)
        self.rows = max(1, min(TILE_ROWS, TILE // max(1, self.columns)))
        self._buffers = new_output((3, self.rows * self.columns), dtype, device)

    def tiles(self, rows: int, columns: int):
        return [b[: rows * columns].view(rows, columns) for b in self._buffers]

    def column_tiles(self, V: int):
        return [(c, min(c + self.columns, V)) for c in range(0, V, self.columns)]


def _tile(rows: Rows, i: int, j: int, c: int, e: int) -> Tensor:
    """Rows i:j (evenly spaced), columns c:e, as a view."""
    start = (
        rows.tensor.storage_offset()
        + (i // rows.inner) * rows.strides[0]
        + (i % rows.inner) * rows.strides[1]
        + c
    )
    return rows.tensor.as_strided((j - i, e - c), (rows.strides[1], 1), start)


def _slabs(N: int, height: int, *operands: Rows, label: Tensor | None = None):
    """Ranges (i, j) of at most ``height`` rows that are evenly spaced in every operand, without
    rows that are not read.

    On the CPU the labels are looked at; elsewhere that would stall the device, so all rows are
    walked and masked afterwards.
    """
    skipped = [False] * N
    if label is not None and label.device.type == "cpu":
        skipped = ((label == IGNORED) | (label == INVALID)).tolist()
    i = 0
    while i < N:
        if skipped[i]:
            i += 1
            continue
        stop = min(N, i + height, *((i // r.inner + 1) * r.inner for r in operands))
        j = i + 1
        while j < stop and not skipped[j]:
            j += 1
        yield i, j
        i = j


def row_sums(
    student: Rows,
    teacher: Rows,
    label: Tensor,
    inv_temperature: Tensor,
    V: int,
    *,
    teacher_support: bool = False,
    entropy: bool = False,
) -> Tensor:
    """The table of sums [9, N] (kernels/row_sums.py). Rows that are not read hold 0."""
    N, acc = label.numel(), inv_temperature.dtype
    sums = torch.zeros(SUMS, N, dtype=acc, device=label.device)
    scratch = _Scratch(acc, label.device, V)
    for i, j in _slabs(N, scratch.rows, student, teacher, label=label):
        parts = None
        for c, e in scratch.column_tiles(V):
            s, t = _tile(student, i, j, c, e), _tile(teacher, i, j, c, e)
            args = (
                s,
                t,
                label[i:j] - c,
                inv_temperature,
                scratch.tiles(j - i, e - c),
                teacher_support,
                entropy,
            )
            part = _tile_sums(*args, careful=label.device.type != "cpu")
            if not (label.device.type != "cpu" or part[2].isfinite().all()):
                part = _tile_sums(*args, careful=True)
            parts = part if parts is None else merge(parts, part, inv_temperature)
        sums[:, i:j] = parts
    if label.device.type != "cpu":
        sums = torch.where((label == IGNORED) | (label == INVALID), 0.0, sums)
    return sums


def _tile_sums(s, t, label, inv_temperature, buffers, teacher_support, entropy, careful):
    """Sums [9, rows] of one tile. ``label`` counts from the tile's first column. Not ``careful``:
    `a` is NaN on any -inf.
    """
    x, z, ratio = buffers
    x.copy_(s)
    z.copy_(t)
    if teacher_support:
        x.masked_fill_(z == -INF, -INF)
    inside = (label >= 0) & (label < x.shape[1])
    column = torch.where(inside, label, 0)[:, None]
    at_label = [torch.where(inside, b.gather(1, column)[:, 0], -INF) for b in (x, z)]
    for b in (x, z):  # the label's column is not part of the sums
        b.scatter_(1, column, torch.where(inside[:, None], -INF, b.gather(1, column)))
    floor = torch.finfo(x.dtype).min
    m_s = x.amax(1).clamp_min_(floor)
    m_t = z.amax(1).clamp_min_(floor)
    absent = x == -INF if careful else None
    x.sub_(m_s[:, None])
    z.sub_(m_t[:, None])
    torch.sub(x, z, out=ratio)
    if careful:
        ratio.masked_fill_(absent, 0.0)
    else:
        ratio.scatter_(1, column, torch.where(inside[:, None], 0.0, ratio.gather(1, column)))
    d_t = z.mul_(inv_temperature).exp_().sum(1)
    e = torch.mul(x, inv_temperature, out=z).exp_()
    d_s = e.sum(1)
    h = torch.zeros_like(d_s)
    if entropy:
        h = x.masked_fill_(x == -INF, 0.0).mul_(e).sum(1)
    a = ratio.mul_(e).sum(1)
    return torch.stack([m_s, d_s, a, h, m_t, d_t, *at_label, torch.full_like(a, careful)])


def row_grad(
    student: Rows,
    teacher: Rows,
    label: Tensor,
    inv_temperature: Tensor,
    scalars: Tensor,
    V: int,
    *,
    teacher_support: bool = False,
) -> Tensor:
    """The gradient [N, columns of the student] from the table of scalars (kernels/row_grad.py)."""
    N, columns, acc = label.numel(), student.tensor.shape[-1], inv_temperature.dtype
    out = new_output((N, columns), student.tensor.dtype, label.device)
    out[:, V:].zero_()
    scratch = _Scratch(acc, label.device, V)
    m_s, m_t, shift, w1, w0, at_label, _ = scalars[:, :, None].unbind(0)
    zero = shift == INF
    fill = torch.where(w0.isnan(), w0, 0.0)
    # rows of gradient 0 are not read: the labels of the rows that remain
    read = torch.where(zero[:, 0], IGNORED, torch.where(label == INVALID, IGNORED, label))
    if label.device.type == "cpu":
        out[read == IGNORED, :V] = fill[read == IGNORED].to(out.dtype)
    log_d = shift * LN2
    low = -(torch.finfo(acc).max ** 0.5)  # exp(low) = 0, and low * w1 stays finite
    for i, j in _slabs(N, scratch.rows, student, teacher, label=read):
        rows = slice(i, j)
        for c, e in scratch.column_tiles(V):
            x, z, ratio = scratch.tiles(j - i, e - c)
            x.copy_(_tile(student, i, j, c, e))
            z.copy_(_tile(teacher, i, j, c, e))
            if teacher_support:
                x.masked_fill_(z == -INF, -INF)
            # A column the student leaves out has e = 0, and a finite ratio makes the product 0. The
            # teacher's -inf stands only at such columns: a row where it meets a finite student has
            # loss +inf and gradient 0.
            x.sub_(m_s[rows]).clamp_min_(low)
            z.sub_(m_t[rows]).clamp_min_(low)
            torch.sub(x, z, out=ratio).mul_(w1[rows]).add_(w0[rows])
            x.mul_(inv_temperature).sub_(log_d[rows]).exp_().mul_(ratio).add_(fill[rows])
            tile = out[rows, c:e]
            tile.copy_(x)
            inside = (read[rows] >= c) & (read[rows] < e)
            column = torch.where(inside, read[rows] - c, 0)[:, None]
            tile.scatter_(
                1,
                column,
                torch.where(inside[:, None], at_label[rows].to(tile.dtype), tile.gather(1, column)),
            )
    if label.device.type != "cpu":
        out[:, :V] = torch.where(zero, 0.0, out[:, :V])
    return out


def softmax_forward(
    logits: Rows, inv_temperature: Tensor, N: int, *, log: bool = False
) -> tuple[Tensor, Tensor]:
    """(output [N, V], state [2, N]) (kernels/softmax.py)."""
    V, acc, device = logits.tensor.shape[-1], inv_temperature.dtype, logits.tensor.device
    y = new_output((N, V), logits.tensor.dtype, device)
    state = new_output((2, N), acc, device)
    scratch = _Scratch(acc, device, V)
    floor = torch.finfo(acc).min
    for i, j in _slabs(N, scratch.rows, logits):
        m = _tile(logits, i, j, 0, V).amax(1, keepdim=True).to(acc).clamp_min_(floor)
        d = torch.zeros_like(m)
        spans = scratch.column_tiles(V)
        for c, e in spans:
            d += (
                _exponents(logits, i, j, c, e, m, inv_temperature, scratch)[0]
                .exp_()
                .sum(1, keepdim=True)
            )
        log_d = d.log()
        for c, e in spans:
            x = _exponents(logits, i, j, c, e, m, inv_temperature, scratch)[0].sub_(log_d)
            y[i:j, c:e] = x if log else x.exp_()
        state[0, i:j], state[1, i:j] = m[:, 0], d[:, 0].log2()
    return y, state


def _exponents(logits: Rows, i, j, c, e, m, inv_temperature, scratch):
    """((x - m) / temperature of a tile, the two buffers left)."""
    x, *rest = scratch.tiles(j - i, e - c)
    return x.copy_(_tile(logits, i, j, c, e)).sub_(m).mul_(inv_temperature), *rest


def softmax_backward(
    logits: Rows, grad: Rows, inv_temperature: Tensor, state: Tensor, *, log: bool = False
) -> Tensor:
    """The gradient [N, V] in the logits' dtype (kernels/softmax.py)."""
    V, N, device = logits.tensor.shape[-1], state.shape[-1], state.device
    dx = new_output((N, V), logits.tensor.dtype, device)
    scratch = _Scratch(state.dtype, device, V)
    m, log_d = state[0, :, None], state[1, :, None] * LN2
    for i, j in _slabs(N, scratch.rows, logits, grad):

        def probability_and_grad(c, e, i=i, j=j):
            x, g, spare = _exponents(logits, i, j, c, e, m[i:j], inv_temperature, scratch)
            return x.sub_(log_d[i:j]).exp_(), g.copy_(_tile(grad, i, j, c, e)), spare

        dot = torch.zeros_like(m[i:j])
        for c, e in scratch.column_tiles(V):
            if log:
                dot += _tile(grad, i, j, c, e).sum(1, keepdim=True, dtype=state.dtype)
            else:
                p, g, spare = probability_and_grad(c, e)
                dot += torch.mul(p, g, out=spare).sum(1, keepdim=True)
        for c, e in scratch.column_tiles(V):
            p, g, _ = probability_and_grad(c, e)
            out = g.sub_(p.mul_(dot)) if log else g.sub_(dot).mul_(p)
            dx[i:j, c:e] = out.mul_(inv_temperature)
    return dx
