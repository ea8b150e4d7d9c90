"""The kernels' sums and gradients in plain PyTorch, tile by tile in reused scratch: any device, no
Triton.

Same signatures, same tables and same edges as ``drkl_triton.kernels``, and the same two ways to sum
a row: relative to the maxima of its first columns, and with care where that goes wrong.

On the CPU a tile is so small (128 KB a buffer) that PyTorch does each operation on it in the
calling thread. To wake its own threads and wait for them would cost more than the work, and far
more on a machine that is shared. Instead ``torch.get_num_threads()`` Python threads take rows from
one list; PyTorch leaves the interpreter's lock while it computes.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ._layout import Rows
from .algebra import IGNORED, INVALID, SUMS, merge

# Elements of a tile on the CPU: PyTorch's own threads take part from 32,768 on, and three float32
# buffers of this size fit into a core's second-level cache.
TILE = 32767
# Elsewhere each operation is a launch: a tile as large as 12 MB of scratch allow (24 in float64).
DEVICE_TILE = 1 << 20
# Rows a thread takes at a time: short ones, as many as fill a tile but no more than this; longer
# than a tile, this many, so that what is done once a row is done for several at once.
SHORT_ROWS, LONG_ROWS = 32, 8
# The columns whose maxima a row's sums are relative to at first, and how far, in powers of two,
# sums and (for a gradient of 32 bits) exponentials may rise above them (kernels/online_softmax.py).
FIRST, MAX_SUM, MAX_RISE = 2048, 2.0**22, 11.5
INF = float("inf")
LOG2E = 1.4426950408889634


def new_output(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory. The tests replace this function to fill it with NaN first."""
    return torch.empty(shape, dtype=dtype, device=device)


class _Scratch:
    """Three buffers of one tile, handed out as [rows, columns]. Every thread has its own."""

    def __init__(self, dtype: torch.dtype, device: torch.device, V: int):
        elements = TILE if device.type == "cpu" else DEVICE_TILE
        count = max(1, -(-V // elements))
        self.spans = [(V * k // count, V * (k + 1) // count) for k in range(count)]
        columns = max(1, *(e - c for c, e in self.spans))
        self.rows = max(1, min(SHORT_ROWS, elements // columns))
        self._buffers = new_output((3, self.rows * columns), dtype, device)

    def tiles(self, rows: int, columns: int) -> list[Tensor]:
        return [b[: rows * columns].view(rows, columns) for b in self._buffers]

    def blocks(self, i: int, j: int):
        """Ranges of the rows i:j, as many as fit into a tile."""
        return [(k, min(k + self.rows, j)) for k in range(i, j, self.rows)]


def _spread(chunks, work, dtype: torch.dtype, device: torch.device, V: int) -> None:
    """work(i, j, scratch) for every chunk (i, j); on the CPU in as many threads as PyTorch has."""
    chunks = list(chunks)
    todo = iter(chunks)  # threads may share it: next() on it holds the interpreter's lock
    errors: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad():  # grad mode belongs to a thread
                scratch = _Scratch(dtype, device, V)
                for i, j in todo:
                    if errors:
                        break
                    work(i, j, scratch)
        except BaseException as error:
            errors.append(error)

    count = min(torch.get_num_threads() if device.type == "cpu" else 1, len(chunks))
    threads = [threading.Thread(target=run) for _ in range(count - 1)]
    for thread in threads:
        thread.start()
    run()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _tile(rows: Rows, i: int, j: int, c: int, e: int) -> Tensor:
    """Rows i:j (evenly spaced), columns c:e, as a view."""
    start = (
        rows.tensor.storage_offset()
        + (i // rows.inner) * rows.strides[0]
        + (i % rows.inner) * rows.strides[1]
        + c
    )
    return rows.tensor.as_strided((j - i, e - c), (rows.strides[1], 1), start)


def _chunks(N: int, V: int, *operands: Rows, skipped: list[bool] | None = None):
    """Ranges (i, j) of rows that are evenly spaced in every operand, without rows that are not
    read.
    """
    on_cpu = operands[0].tensor.device.type == "cpu"
    fit = (TILE if on_cpu else DEVICE_TILE) // max(1, V)
    height = min(SHORT_ROWS, fit) or LONG_ROWS
    i = 0
    while i < N:
        if skipped and skipped[i]:
            i += 1
            continue
        stop = min(N, i + height, *((i // r.inner + 1) * r.inner for r in operands))
        j = i + 1
        while j < stop and not (skipped and skipped[j]):
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
    N, acc, device = label.numel(), inv_temperature.dtype, label.device
    sums = torch.zeros(SUMS, N, dtype=acc, device=device)
    unread = (label == IGNORED) | (label == INVALID)
    # Elsewhere than on the CPU, looking at a number would stall the device.
    on_cpu = device.type == "cpu"
    labels = label.tolist() if on_cpu else []
    try_first = on_cpu and not teacher_support and float(inv_temperature) > 1e-30

    def carefully(i, j, scratch):
        for k, end in scratch.blocks(i, j):
            for c, e in scratch.spans:
                s, t = _tile(student, k, end, c, e), _tile(teacher, k, end, c, e)
                args = label[k:end] - c, inv_temperature, scratch.tiles(end - k, e - c)
                part = _sum_carefully(s, t, *args, teacher_support, entropy)
                sums[:, k:end] = part if c == 0 else merge(sums[:, k:end], part, inv_temperature)

    def work(i, j, scratch):
        if not try_first:
            return carefully(i, j, scratch)
        s, t = _tile(student, i, j, 0, V), _tile(teacher, i, j, 0, V)
        part, rise = _sum_at_first_maxima(s, t, labels[i:j], inv_temperature, scratch, entropy)
        at_label = [_at_label(x, label[i:j]).to(acc) for x in (s, t)]
        sums[:, i:j] = torch.stack([*part, *at_label, torch.zeros_like(part[0])])
        for row, good in enumerate(_sums_are_good(part, rise)):
            if not good:
                carefully(i + row, i + row + 1, scratch)

    skipped = unread.tolist() if on_cpu else None
    _spread(_chunks(N, V, student, teacher, skipped=skipped), work, acc, device, V)
    return sums if on_cpu else torch.where(unread, 0.0, sums)


def _minus(x: Tensor, m: Tensor, out: Tensor) -> Tensor:
    """x - m, in the dtype of ``out``."""
    if x.dtype == out.dtype:
        return torch.sub(x, m, out=out)
    return out.copy_(x).sub_(m)  # sub could convert, too, but takes memory for it


def _at_label(x: Tensor, label: Tensor) -> Tensor:
    """x [rows, columns] at each row's label, -inf where that is no column."""
    inside = (label >= 0) & (label < x.shape[1])
    return torch.where(inside, x.gather(1, torch.where(inside, label, 0)[:, None])[:, 0], -INF)


def _sum_at_first_maxima(s, t, labels, inv_temperature, scratch, entropy):
    """(m_s, d_s, a, h, m_t, d_t), each [rows], of whole rows, relative to the maxima of their first
    columns; and how far the maxima rise above those, if it matters.
    """
    R, V = s.shape
    x, z, _ = scratch.tiles(R, min(V, FIRST))
    m_s, m_t = (_first_maximum(a, labels, out) for a, out in ((s, x), (t, z)))
    scale = inv_temperature * LOG2E
    sums, rises = [], []
    for k, end in scratch.blocks(0, R):
        s_rows, t_rows, top_s, top_t = (a[k:end] for a in (s, t, m_s, m_t))
        for c, e in scratch.spans:
            x, z, q = scratch.tiles(end - k, e - c)
            _minus(s_rows[:, c:e], top_s, x)
            _minus(t_rows[:, c:e], top_t, z)
            for row, y in enumerate(labels[k:end]):
                if c <= y < e:  # not part of the sums: exponentials and ratio become 0
                    x[row, y - c] = z[row, y - c] = -1e36
            torch.mul(x, scale, out=q).exp2_()
            h = torch.mul(x, q).sum(1) if entropy else None
            if s.element_size() >= 4:
                rises += [x.amax(1), z.amax(1)]
            x.sub_(z)
            d_s, d_t, a = q.sum(1), z.mul_(scale).exp2_().sum(1), x.mul_(q).sum(1)
            sums.append(torch.stack([d_s, a, torch.zeros_like(a) if h is None else h, d_t]))
    sums = torch.cat(sums, 1).view(4, -1, len(scratch.spans), min(scratch.rows, R))
    d_s, a, h, d_t = sums.sum(2).flatten(1)
    rise = None
    if rises:  # per block, per span, student's and teacher's
        rise = torch.cat(rises).view(-1, 2 * len(scratch.spans), min(scratch.rows, R))
        rise = rise.amax(1).flatten() * scale
    return (m_s[:, 0], d_s, a, h, m_t[:, 0], d_t), rise


def _first_maximum(x, labels, out):
    """[rows, 1]: the maximum of the first columns, the label's aside."""
    K = out.shape[1]
    out.copy_(x[:, :K])
    for row, y in enumerate(labels):
        if 0 <= y < K:
            out[row, y] = -INF
    return out.amax(1, keepdim=True).clamp_min_(torch.finfo(out.dtype).min)


def _sums_are_good(sums, rise) -> list[bool]:
    """kernels/online_softmax.py: a finite `a` means that no logit is infinite. False with a NaN."""
    _, d_s, a, h, _, d_t = sums
    good = (d_s < MAX_SUM) & (d_t < MAX_SUM) & a.isfinite() & h.isfinite()
    return (good if rise is None else good & (rise < MAX_RISE)).tolist()


def _sum_carefully(s, t, label, inv_temperature, buffers, teacher_support, entropy):
    """Sums [9, rows] of one tile, whatever it holds. ``label`` counts from its first column."""
    x, z, ratio = buffers
    x.copy_(s)
    z.copy_(t)
    if teacher_support:
        x.masked_fill_(z == -INF, -INF)
    at_label = [_at_label(b, label) for b in (x, z)]
    inside = ((label >= 0) & (label < x.shape[1]))[:, None]
    column = torch.where(inside, label[:, None], 0)
    for b in (x, z):  # the label's column is not part of the sums
        b.scatter_(1, column, torch.where(inside, -INF, b.gather(1, column)))
    floor = torch.finfo(x.dtype).min
    m_s = x.amax(1).clamp_min_(floor)
    m_t = z.amax(1).clamp_min_(floor)
    absent = x == -INF
    x.sub_(m_s[:, None])
    z.sub_(m_t[:, None])
    torch.sub(x, z, out=ratio).masked_fill_(absent, 0.0)
    scale = inv_temperature * LOG2E
    d_t = z.mul_(scale).exp2_().sum(1)
    e = torch.mul(x, scale, out=z).exp2_()
    d_s = e.sum(1)
    h = x.masked_fill_(absent, 0.0).mul_(e).sum(1) if entropy else torch.zeros_like(d_s)
    a = ratio.mul_(e).sum(1)
    return torch.stack([m_s, d_s, a, h, m_t, d_t, *at_label, torch.ones_like(a)])


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
    on_cpu = label.device.type == "cpu"
    out = new_output((N, columns), student.tensor.dtype, label.device)
    out[:, V:].zero_()
    m_s, m_t, shift, w1, w0, at_label, care = scalars[:, :, None].unbind(0)
    zero = shift[:, 0] == INF
    nan = torch.where(w0[:, 0].isnan(), w0[:, 0], 0.0)
    # Rows of gradient 0 are not read, nor those without a valid label.
    unread = zero | (label == IGNORED) | (label == INVALID)
    scale = inv_temperature * LOG2E
    careful = (care[:, 0] != 0).tolist() if on_cpu and not teacher_support else [True] * N
    shifted = (shift[:, 0] != 0).tolist() if on_cpu else [True] * N
    low = -(torch.finfo(acc).max ** 0.5)  # exp2(low) = 0, and low * w1 stays finite

    def work(i, j, scratch):
        care, shifts = any(careful[i:j]), any(shifted[i:j])
        for k, end in scratch.blocks(i, j):
            top_s, top_t, down, slope, constant = (a[k:end] for a in (m_s, m_t, shift, w1, w0))
            for c, e in scratch.spans:
                x, z, _ = scratch.tiles(end - k, e - c)
                t = _tile(teacher, k, end, c, e)
                _minus(_tile(student, k, end, c, e), top_s, x)
                _minus(t, top_t, z)
                if care:
                    # A column the student leaves out has exponential 0, and a finite ratio makes
                    # the product 0. The teacher's -inf stands only at such columns: a row where it
                    # meets a finite student has loss +inf and gradient 0.
                    if teacher_support:
                        x.masked_fill_(t == -INF, low)
                    x.clamp_min_(low)
                    z.clamp_min_(low)
                torch.sub(x, z, out=z).mul_(slope).add_(constant)
                x.mul_(scale)
                if shifts:
                    x.sub_(down)
                g = out[k:end, c:e]
                if g.dtype == acc:
                    torch.mul(x.exp2_(), z, out=g)
                else:  # mul could convert, too, but takes twice as long
                    g.copy_(x.exp2_().mul_(z))

    skipped = unread.tolist() if on_cpu else None
    _spread(_chunks(N, V, student, teacher, skipped=skipped), work, acc, label.device, V)
    fill = torch.where(zero, 0.0, nan)[:, None]
    if on_cpu:
        out[unread, :V] = fill[unread].to(out.dtype)
    else:
        out[:, :V] = torch.where(unread[:, None], fill.to(out.dtype), out[:, :V])
    has_label = ~unread & (label >= 0)
    where = torch.arange(N, device=label.device), torch.where(has_label, label, 0)
    out[where] = torch.where(has_label, at_label[:, 0].to(out.dtype), out[where])
    return out


def softmax_forward(
    logits: Rows, inv_temperature: Tensor, N: int, *, log: bool = False
) -> tuple[Tensor, Tensor]:
    """(output [N, V], state [2, N]) (kernels/softmax.py)."""
    V, acc, device = logits.tensor.shape[-1], inv_temperature.dtype, logits.tensor.device
    y = new_output((N, V), logits.tensor.dtype, device)
    state = new_output((2, N), acc, device)
    floor = torch.finfo(acc).min
    scale = inv_temperature * LOG2E

    def work(i, j, scratch):
        for k, end in scratch.blocks(i, j):
            tiles = [_tile(logits, k, end, c, e) for c, e in scratch.spans]
            tops = [x.amax(1, keepdim=True) for x in tiles]
            m = torch.cat(tops, 1).amax(1, keepdim=True).to(acc).clamp_min_(floor)
            d = sum(_exponent(x, m, scale, scratch).exp2_().sum(1, keepdim=True) for x in tiles)
            log2d = d.log2()
            for x, (c, e) in zip(tiles, scratch.spans, strict=True):
                p = _exponent(x, m, scale, scratch).sub_(log2d)
                y[k:end, c:e] = p.mul_(1 / LOG2E) if log else p.exp2_()
            state[0, k:end], state[1, k:end] = m[:, 0], log2d[:, 0]

    _spread(_chunks(N, V, logits), work, acc, device, V)
    return y, state


def _exponent(x: Tensor, m: Tensor, scale: Tensor, scratch: _Scratch) -> Tensor:
    """scale (x - m), in the first buffer."""
    return _minus(x, m, scratch.tiles(*x.shape)[0]).mul_(scale)


def softmax_backward(
    logits: Rows, grad: Rows, inv_temperature: Tensor, state: Tensor, *, log: bool = False
) -> Tensor:
    """The gradient [N, V] in the logits' dtype (kernels/softmax.py)."""
    V, N, device = logits.tensor.shape[-1], state.shape[-1], state.device
    dx = new_output((N, V), logits.tensor.dtype, device)
    m, log2d = state[:, :, None]
    scale = inv_temperature * LOG2E

    def probability(i, j, c, e, scratch):
        x = _exponent(_tile(logits, i, j, c, e), m[i:j], scale, scratch)
        return x.sub_(log2d[i:j]).exp2_()

    def work(i, j, scratch):
        for k, end in scratch.blocks(i, j):
            dot = torch.zeros_like(m[k:end])
            for c, e in scratch.spans:
                g = _tile(grad, k, end, c, e)
                if not log:
                    g = probability(k, end, c, e, scratch).mul_(g)
                dot += g.sum(1, keepdim=True, dtype=state.dtype)
            for c, e in scratch.spans:
                p = probability(k, end, c, e, scratch)
                g = scratch.tiles(end - k, e - c)[1].copy_(_tile(grad, k, end, c, e))
                out = g.sub_(p.mul_(dot)) if log else g.sub_(dot).mul_(p)
                dx[k:end, c:e] = out.mul_(inv_temperature)

    _spread(_chunks(N, V, logits, grad), work, state.dtype, device, V)
    return dx
