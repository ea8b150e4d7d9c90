"""The kernels' sums and gradients in plain PyTorch, tile by tile in reused scratch: any device, no
Triton.

Same signatures, same tables and same edges as ``drkl_triton.kernels``, and the same two ways to sum
a row: relative to the maxima of its first columns, and with care where that goes wrong.

On the CPU, ``torch.get_num_threads()`` Python threads take rows from one list, and each does its
operations alone; PyTorch leaves the interpreter's lock while it computes. PyTorch's own way, all
threads at one operation and then waiting for each other, is as fast on a quiet machine and several
times slower as soon as anything else runs on it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import torch
from torch import Tensor

from ._layout import Rows
from .algebra import IGNORED, INVALID, MISSING, SUMS, UNIT, merge

# Elements of scratch, of all threads together: 12.6 MB in float32. Divided among two threads and
# three buffers, an operation takes 100 microseconds and what it costs besides its work is small.
SCRATCH = 3 << 20
# Chunks of rows a thread gets at least, where there are enough rows: so that none waits long for
# the last.
CHUNKS = 4
# Rows looked at together where it must be settled whether sums are good.
CHUNK_ROWS = 8
# Blocks that a tile's exponentials are summed in, to see whether one of them holds nearly all.
BLOCKS = 16
# The columns whose maxima a row's sums are relative to at first, and how far, in powers of two,
# sums and (for a gradient of 32 bits) exponentials may rise above them; and how many times an
# element's condition the terms may be that it is the difference of (kernels/online_softmax.py).
FIRST, MAX_SUM, MAX_RISE, MAX_OFFSET = 2048, 2.0**22, 11.5, 4.0
HUGE_PAGE = 2 << 20
INF = float("inf")
LOG2E = 1.4426950408889634


def new_output(shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory. The tests replace this function to fill it with NaN first."""
    out = torch.empty(shape, dtype=dtype, device=device)
    if device.type == "cpu" and out.nbytes >= HUGE_PAGE:
        _ask_for_huge_pages(out)
    return out


def _ask_for_huge_pages(memory: Tensor) -> None:
    """Linux hands out fresh memory in pages of 4 KB, zeroed one by one when they are first written,
    which takes longer than the gradient itself. In pages of 2 MB it takes a tenth.
    """
    if _madvise is None or type(memory) is not Tensor:
        return
    start = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (memory.data_ptr() + memory.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise(start, length, mmap.MADV_HUGEPAGE)  # where it is refused, nothing changes


def _find_madvise():
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise


_madvise = _find_madvise()


class _Scratch:
    """Some buffers of one tile, handed out as [rows, columns]. Every thread has its own."""

    def __init__(self, buffers: int, elements: int, V: int, dtype: torch.dtype, device):
        count = max(1, -(-V // elements))
        self.spans = [(V * k // count, V * (k + 1) // count) for k in range(count)]
        self._buffers = new_output((buffers, elements), dtype, device)

    def tiles(self, rows: int, columns: int) -> list[Tensor]:
        return [b[: rows * columns].view(rows, columns) for b in self._buffers]


def _work_alone() -> None:
    torch.get_num_threads()  # on its first use a thread takes over the number of the others
    torch.set_num_threads(1)


@lru_cache(maxsize=8)
def _workers(threads: int) -> ThreadPoolExecutor:
    """Threads in each of which PyTorch works alone."""
    together = threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, "drkl_triton", _work_alone)
    # so that every thread is there before the number for new threads is restored
    list(pool.map(lambda _: together.wait(), range(threads)))
    torch.set_num_threads(threads)
    return pool


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_workers.cache_clear)


def _spread(operands, N: int, V: int, acc: torch.dtype, work, buffers: int, skipped=None) -> None:
    """work(i, j, scratch) for ranges of rows that are evenly spaced in every operand, without the
    rows that are ``skipped`` [N]; on the CPU in several threads. A scratch has ``buffers`` tiles.
    """
    device = operands[0].tensor.device
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    elements = max(1, SCRATCH // (buffers * threads))
    height = max(1, min(elements // max(1, V), -(-N // (CHUNKS * threads))))
    chunks = list(_ranges(N, height, operands, skipped))
    threads = min(threads, len(chunks))
    todo = iter(chunks)  # threads may share it: next() on it holds the interpreter's lock
    scratches = [_Scratch(buffers, elements, V, acc, device) for _ in range(threads)]

    # These modes belong to a thread; a tensor made in one cannot be written outside of it.
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def run(scratch: _Scratch) -> None:
        with mode():
            for i, j in todo:
                work(i, j, scratch)

    started = []
    if threads > 1:
        try:
            for scratch in scratches:
                started.append(_workers(torch.get_num_threads()).submit(run, scratch))
        except RuntimeError:  # the interpreter is shutting down and starts no threads
            pass
    for done in started:
        done.result()
    if scratches and not started:
        run(scratches[0])


def _ranges(N: int, height: int, operands, skipped: Tensor | None):
    skip = None if skipped is None else skipped.tolist()
    i = 0
    while i < N:
        if skip and skip[i]:
            i += 1
            continue
        stop = min(N, i + height, *((i // r.inner + 1) * r.inner for r in operands))
        j = i + 1
        while j < stop and not (skip and skip[j]):
            j += 1
        yield i, j
        i = j


def _tile(rows: Rows, i: int, j: int, c: int, e: int) -> Tensor:
    """Rows i:j (evenly spaced), columns c:e, as a view."""
    start = (
        rows.tensor.storage_offset()
        + (i // rows.inner) * rows.strides[0]
        + (i % rows.inner) * rows.strides[1]
        + c
    )
    return rows.tensor.as_strided((j - i, e - c), (rows.strides[1], 1), start)


def _whole(rows: Rows, N: int) -> Tensor:
    """All N rows as [outer, inner, columns], a view."""
    tensor, inner = rows.tensor, rows.inner
    shape = (N // inner, inner, tensor.shape[-1])
    return tensor.as_strided(shape, (*rows.strides, 1), tensor.storage_offset())


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
    scale = inv_temperature * LOG2E
    # Elsewhere than on the CPU, looking at a number would stall the device.
    on_cpu = device.type == "cpu"
    spread = partial(_spread, (student, teacher), N, V, acc)

    def carefully(i, j, scratch):
        for c, e in scratch.spans:
            s, t = _tile(student, i, j, c, e), _tile(teacher, i, j, c, e)
            args = label[i:j] - c, scale, scratch.tiles(j - i, e - c)
            part = _sum_carefully(s, t, *args, teacher_support, entropy)
            sums[:, i:j] = part if c == 0 else merge(sums[:, i:j], part, inv_temperature)

    if not on_cpu:
        spread(carefully, 3)
        return torch.where(unread, 0.0, sums)
    if teacher_support or V < 2 or not float(inv_temperature) > 1e-30:
        spread(carefully, 3, skipped=unread)
        return sums

    for rows, top, at_label in ((student, 0, 6), (teacher, 4, 7)):
        logits = _whole(rows, N)[..., :V]
        sums[top] = _first_maximum(logits, label)
        sums[at_label] = _at_label(logits, label.view(logits.shape[:2])).flatten()
    m_s, m_t = sums[0, :, None], sums[4, :, None]

    labelled = bool(((label >= 0) | unread).all())
    top = torch.zeros_like(sums[0])

    def at_first_maxima(i, j, scratch):
        _, d_s, a, h, _, d_t, *_ = sums[:, i:j]
        y = label[i:j, None]
        for c, e in scratch.spans:
            x, z, q, *spare = scratch.tiles(j - i, e - c)
            _minus(_tile(student, i, j, c, e), m_s[i:j], x)
            _minus(_tile(teacher, i, j, c, e), m_t[i:j], z)
            # The label is not part of the sums: its exponentials and its ratio become 0.
            if labelled and e - c == V:
                x.scatter_(1, y, -1e36)
                z.scatter_(1, y, -1e36)
            else:
                row = ((y >= c) & (y < e)).nonzero()[:, 0]
                at = row, y[row, 0] - c
                x[at] = z[at] = -1e36
            blocks = _block_sums(torch.mul(x, scale, out=q).exp2_())
            d_s.add_(blocks.sum(1))
            if entropy:
                h.add_(torch.mul(x, q, out=spare[0]).sum(1))
            x.sub_(z)
            blocks_t = _block_sums(z.mul_(scale).exp2_())
            d_t.add_(blocks_t.sum(1))
            a.add_(x.mul_(q).sum(1))
            torch.maximum(top[i:j], blocks.mul_(blocks_t).amax(1), out=top[i:j])

    spread(at_first_maxima, 4 if entropy else 3, skipped=unread)
    good = _sums_are_good(sums, top, student, teacher, V, scale)
    sums[2:4] *= UNIT
    sums[:, unread] = 0.0
    if not good.all():
        spread(carefully, 3, skipped=good | unread)
    return sums


def _first_maximum(logits: Tensor, label: Tensor) -> Tensor:
    """[N]: the maximum of the first columns, or of those after them where the label is one."""
    K = min(FIRST, logits.shape[2] // 2)
    first, second = (logits[..., k : k + K].amax(2).flatten() for k in (0, K))
    return torch.where((label >= 0) & (label < K), second, first)


def _block_sums(x: Tensor) -> Tensor:
    """[rows, blocks]: the sums of x [rows, columns], a block of columns at a time."""
    width = max(1, x.shape[1] // BLOCKS)
    count = x.shape[1] // width
    whole = x[:, : count * width].unflatten(1, (count, width)).sum(2)
    rest = x[:, count * width :]
    return torch.cat([whole, rest.sum(1, keepdim=True)], 1) if rest.shape[1] else whole


def _sums_are_good(sums, top, student, teacher, V, scale) -> Tensor:
    """[N]: kernels/online_softmax.py; a finite `a` means that no logit is infinite. False with a
    NaN. top [N]: no less than the largest product of a column's two exponentials.
    """
    m_s, d_s, a, h, m_t, d_t, s_y, t_y, _ = sums
    d = torch.maximum(d_s, d_t)
    good = (d < MAX_SUM) & a.isfinite() & h.isfinite()
    mean = a / d_s * scale
    kl = (mean + (d_t / d_s).log2()).abs()
    doubt = (d_s * d_t / top).log2()
    good &= ~(mean.abs() > MAX_OFFSET * (doubt + kl))
    if student.tensor.element_size() >= 4:
        # an exponential is no larger than its sum; where that does not settle it, look
        N = d.numel()
        for i, j in _ranges(N, CHUNK_ROWS, (student, teacher), ~(good & (d >= 2**MAX_RISE))):
            for rows, m, at_label in ((student, m_s, s_y), (teacher, m_t, t_y)):
                tile = _tile(rows, i, j, 0, V)
                if ((tile.amax(1) - m[i:j]) * scale < MAX_RISE).all():
                    continue
                # the label's logit may be the largest, and does not count
                first, second = tile.topk(2, dim=1).values.unbind(1)
                largest = torch.where(at_label[i:j] == first, second, first)
                good[i:j] &= (largest - m[i:j]) * scale < MAX_RISE
    return good


def _minus(x: Tensor, m: Tensor, out: Tensor) -> Tensor:
    """x - m, in the dtype of ``out``."""
    if x.dtype != out.dtype:
        x = out.copy_(x)  # sub could convert, too, but takes memory for it
    return torch.sub(x, m, out=out)


def _at_label(x: Tensor, label: Tensor) -> Tensor:
    """x [..., columns] at each row's label [...], -inf where that is no column."""
    inside = (label >= 0) & (label < x.shape[-1])
    column = torch.where(inside, label, 0)[..., None]
    return torch.where(inside, x.gather(-1, column)[..., 0], -INF)


def _sum_carefully(s, t, label, scale, buffers, teacher_support, entropy):
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
    missing = (z == -INF).logical_and_(~absent).any(1)
    x.sub_(m_s[:, None])
    z.sub_(m_t[:, None])
    torch.mul(z, UNIT, out=ratio).neg_().add_(x, alpha=UNIT).masked_fill_(absent, 0.0)
    d_t = z.mul_(scale).exp2_().sum(1)
    e = torch.mul(x, scale, out=z).exp2_()
    d_s = e.sum(1)
    h = x.masked_fill_(absent, 0.0).mul_(UNIT).mul_(e).sum(1) if entropy else torch.zeros_like(d_s)
    a = ratio.mul_(e).sum(1)
    care = torch.where(missing, MISSING, torch.ones_like(a))
    return torch.stack([m_s, d_s, a, h, m_t, d_t, *at_label, care])


def row_grad(
    student: Rows,
    teacher: Rows,
    label: Tensor,
    inv_temperature: Tensor,
    scalars: Tensor,
    V: int,
    *,
    teacher_support: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient [N, columns of the student] from the table of scalars (kernels/row_grad.py).

    ``out``: where to write it; the logits of either side, of the accumulator's dtype, may be there.
    """
    N, columns, acc = label.numel(), student.tensor.shape[-1], inv_temperature.dtype
    on_cpu = label.device.type == "cpu"
    if out is None:
        out = new_output((N, columns), student.tensor.dtype, label.device)
    out[:, V:].zero_()
    m_s, m_t, shift, w1, w0, at_label, care = scalars[:, :, None].unbind(0)
    zero = shift[:, 0] == INF
    # Rows of gradient 0 are not read, nor those that are NaN.
    unread = zero | w0[:, 0].isnan()
    scale = inv_temperature * LOG2E
    careful = (care[:, 0] != 0).tolist() if on_cpu and not teacher_support else [True] * N
    shifted = (shift[:, 0] != 0).tolist() if on_cpu else [True] * N

    def work(i, j, scratch):
        care, shifts = any(careful[i:j]), any(shifted[i:j])
        for c, e in scratch.spans:
            x, z = scratch.tiles(j - i, e - c)
            t = _tile(teacher, i, j, c, e)
            _minus(_tile(student, i, j, c, e), m_s[i:j], x)
            _minus(t, m_t[i:j], z)
            if teacher_support:
                x.masked_fill_(t == -INF, -INF)
            torch.sub(x, z, out=z).mul_(w1[i:j]).add_(w0[i:j])
            x.mul_(scale)
            if shifts:
                x.sub_(shift[i:j])
            x.exp2_()
            if care:
                # The student leaves the column out, or as good as: 0, whatever the teacher says.
                z.masked_fill_(x == 0, 0.0)
            g = out[i:j, c:e]
            if g.dtype == acc:
                torch.mul(x, z, out=g)
            else:  # mul could convert, too, but takes twice as long
                g.copy_(x.mul_(z))

    _spread((student, teacher), N, V, acc, work, 2, skipped=unread if on_cpu else None)
    fill = torch.where(zero, 0.0, torch.full_like(w0[:, 0], float("nan")))[:, None]
    if on_cpu:
        out[unread, :V] = fill[unread].to(out.dtype)
    else:
        out[:, :V] = torch.where(unread[:, None], fill.to(out.dtype), out[:, :V])
    has_label = ~zero & (label >= 0)
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
        tiles = [_tile(logits, i, j, c, e) for c, e in scratch.spans]
        tops = [x.amax(1, keepdim=True) for x in tiles]
        m = torch.cat(tops, 1).amax(1, keepdim=True).to(acc).clamp_min_(floor)
        d = sum(_exponent(x, m, scale, scratch).exp2_().sum(1, keepdim=True) for x in tiles)
        log2d = d.log2()
        for x, (c, e) in zip(tiles, scratch.spans, strict=True):
            p = _exponent(x, m, scale, scratch).sub_(log2d)
            y[i:j, c:e] = p.mul_(1 / LOG2E) if log else p.exp2_()
        state[0, i:j], state[1, i:j] = m[:, 0], log2d[:, 0]

    _spread((logits,), N, V, acc, work, 1)
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
        dot = torch.zeros_like(m[i:j])
        for c, e in scratch.spans:
            g = _tile(grad, i, j, c, e)
            if not log:
                g = probability(i, j, c, e, scratch).mul_(g)
            dot += g.sum(1, keepdim=True, dtype=state.dtype)
        for c, e in scratch.spans:
            p = probability(i, j, c, e, scratch)
            g = scratch.tiles(j - i, e - c)[1].copy_(_tile(grad, i, j, c, e))
            out = g.sub_(p.mul_(dot)) if log else g.sub_(dot).mul_(p)
            dx[i:j, c:e] = out.mul_(inv_temperature)

    _spread((logits, grad), N, V, state.dtype, work, 2)
    return dx
