"""The kernels' sums and gradients in plain PyTorch, tile by tile in reused scratch: any device, no
Triton.

Same signatures, same tables and same edges as ``drkl_triton.kernels``, and the same two ways to sum
a row: as if every logit were finite, and with care where one is not.

On the CPU, ``torch.get_num_threads()`` Python threads take rows from one list, and each does its
operations alone; PyTorch leaves the interpreter's lock while it computes. PyTorch's own way, all
threads at one operation and then waiting for each other, is as fast on a quiet machine and several
times slower as soon as anything else runs on it.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _reduction, facts
from ._layout import Rows
from ._tile import LOG2E, Tile
from .algebra import AT, SUMS, formula_arguments, merge
from .facts import (
    ENTROPY,
    FORWARD,
    IGNORED,
    INVALID,
    MISSING,
    NO_LABEL,
    PHI_ALONE,
    REVERSE,
    SKEWED,
    TEACHER,
    TEACHER_ENTROPY,
    UNIT,
    UNTEMPERED,
    Sums,
    tl,
)

if TYPE_CHECKING:
    from ._objective import Program

# Elements of scratch, of all threads together: 12.6 MB in float32. Divided among two threads and
# three buffers, an operation takes 100 microseconds and what it costs besides its work is small.
SCRATCH = 3 << 20
# Tiles that pointwise terms are computed in; more are allocated where they need them.
PHI_BUFFERS = 9
# A scan with one of them is faster in tiles as small as with three: it reads its own six times.
TAIL_BUFFERS = 3
# Elements that one thread takes in one chunk: handing them out would take longer.
SMALL = 1 << 16
# Chunks of rows a thread gets at least, where there are enough rows: so that none waits long for
# the last.
CHUNKS = 4
# What stands for the label's logit in the sums: its exponential is 0. A row of nothing lower is
# summed with care.
LEFT_OUT = -1e36
HUGE_PAGE = 2 << 20
INF = float("inf")


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
    """Some buffers of one tile, of up to ``height`` rows, handed out as [rows, columns]. Every
    thread has its own.
    """

    def __init__(self, buffers: int, height: int, elements: int, V: int, dtype, device):
        count = max(1, -(-V // elements))
        self.spans = [(V * k // count, V * (k + 1) // count) for k in range(count)]
        self._buffers = new_output((buffers, height * -(-V // count)), dtype, device)
        self._tiles: dict[tuple[int, int], list[Tensor]] = {}

    def tiles(self, rows: int, columns: int) -> list[Tensor]:
        shape = rows, columns
        if shape not in self._tiles:
            self._tiles[shape] = [b[: rows * columns].view(shape) for b in self._buffers]
        return self._tiles[shape]

    def log_probabilities(self, x, z, to_q, to_p, inv_temperature, first: int) -> tuple[Tile, Tile]:
        """Floored, of what x and z are raw; in the buffers from the first, which may hold them.
        inv_temperature None: 1.
        """
        free = self.tiles(*x.shape)[first:]
        logs = []
        for raw, normaliser in ((x, to_q), (z, to_p)):
            log = Tile(free.pop(0), free)
            if inv_temperature is not None:
                raw = torch.mul(raw, inv_temperature, out=log.x)
            torch.add(raw, normaliser, out=log.x).clamp_min_(facts.ABSENT)
            logs.append(log)
        return logs[0], logs[1]


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
    """work(rows, scratch) for all N rows but those that are ``skipped`` [N], some at a time: a
    slice of rows that are evenly spaced in every operand, or a tensor of their numbers. On the CPU
    in several threads. A scratch has ``buffers`` tiles.
    """
    device = operands[0].tensor.device
    small = N * V <= SMALL
    threads = torch.get_num_threads() if device.type == "cpu" and not small else 1
    elements = max(1, SCRATCH // (buffers * threads))
    height = max(1, min(elements // max(1, V), -(-N // (1 if small else CHUNKS * threads))))
    chunks = list(_chunks(N, height, operands, skipped))
    threads = min(threads, len(chunks))
    todo = iter(chunks)  # threads may share it: next() on it holds the interpreter's lock
    scratches = [_Scratch(buffers, height, elements, V, acc, device) for _ in range(threads)]

    # These modes belong to a thread; a tensor made in one cannot be written outside of it.
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad

    def run(scratch: _Scratch) -> None:
        with mode():
            for rows in todo:
                work(rows, scratch)

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


def _chunks(N: int, height: int, operands, skipped: Tensor | None):
    """The rows that are not skipped, ``height`` at a time."""
    kept = torch.arange(N) if skipped is None else (~skipped).nonzero()[:, 0]
    for rows in kept.split(height) if len(kept) else ():
        i, j = int(rows[0]), int(rows[-1]) + 1
        even = j - i == len(rows) and all(i // r.inner == (j - 1) // r.inner for r in operands)
        yield slice(i, j) if even else rows


def _tile(rows: Rows, which: slice | Tensor, c: int, e: int) -> Tensor:
    """Columns c:e of some rows: a view of a slice of them, a copy of a list."""
    (outer, inner), start = rows.strides, rows.tensor.storage_offset() + c
    if isinstance(which, slice):
        i, j = which.start, which.stop
        start += (i // rows.inner) * outer + (i % rows.inner) * inner
        return rows.tensor.as_strided((j - i, e - c), (inner, 1), start)
    # Rows whose places have the common divisor of both strides between them, and some among them.
    step = max(1, math.gcd(outer, inner))
    places = (which // rows.inner) * (outer // step) + (which % rows.inner) * (inner // step)
    grid = rows.tensor.as_strided((int(places.max()) + 1, e - c), (step, 1), start)
    return grid.index_select(0, places)


def _put(out: Tensor, which: slice | Tensor, c: int, e: int, x: Tensor) -> None:
    """Write x to columns c:e of some rows of ``out``, in its dtype."""
    if isinstance(which, slice):
        out[which, c:e].copy_(x)
    else:
        out[:, c:e].index_copy_(0, which.to(out.device), x.to(out.dtype))


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
    needs: int,
    filter_value: Tensor | None = None,
    mixture: Tensor | None = None,
) -> Tensor:
    """The table of sums [16, N] (kernels/row_sums.py). Rows that are not read hold 0."""
    N, acc, device = label.numel(), inv_temperature.dtype, label.device
    sums = torch.zeros(SUMS, N, dtype=acc, device=device)
    unread = (label == IGNORED) | (label == INVALID)
    scale = inv_temperature * LOG2E
    spread = partial(_spread, (student, teacher), N, V, acc)

    def carefully(rows, scratch):
        for c, e in scratch.spans:
            s, t = _tile(student, rows, c, e), _tile(teacher, rows, c, e)
            x, z, *spare = scratch.tiles(*s.shape)
            of_rows = None if mixture is None else mixture[:, rows, None]
            _see(s, t, x, z, filter_value, of_rows, inv_temperature)
            part = _sum_carefully(x, z, label[rows] - c, scale, spare, needs)
            sums[:, rows] = part if c == 0 else merge(sums[:, rows], part, inv_temperature)

    if device.type != "cpu":  # there, looking at a number would stall the device
        spread(carefully, 5)
        return torch.where(unread, 0.0, sums)
    seen = filter_value is not None or mixture is not None  # through something
    if seen or V < 2 or not float(inv_temperature) > 1e-30:
        spread(carefully, 5, skipped=unread)
        return sums

    has_teacher = needs & TEACHER
    operands = [(student, AT.m_s, AT.s_label)]
    if has_teacher:
        operands += [(teacher, AT.m_t, AT.t_label)]
    for operand, maximum, at_label in operands:
        logits = _whole(operand, N)[..., :V]
        sums[at_label] = _at_label(logits, label.view(logits.shape[:2])).flatten()
        sums[maximum] = LEFT_OUT
        # A padded vocabulary has its -inf at the end: the row is not even started.
        sums[AT.care] = torch.maximum(sums[AT.care], (logits[..., V - 1] == -INF).flatten())

    def rest(operand, rows, span, buffer):
        """The columns without the label; in the buffer, but for what can be taken as it is."""
        x, y = _tile(operand, rows, *span), label[rows]
        if x.dtype == acc and (y < 0).all():
            return x
        return _leave_out(buffer.copy_(x), y - span[0], LEFT_OUT)

    def top(operand, rows, scratch):
        def buffer(span):
            return scratch.tiles(len(label[rows]), span[1] - span[0])[0]

        tops = [rest(operand, rows, span, buffer(span)).amax(1) for span in scratch.spans]
        return torch.stack(tops).amax(0)

    def as_if_finite(rows, scratch):
        count, in_one = len(label[rows]), len(scratch.spans) == 1
        if not in_one:
            m_s = top(student, rows, scratch)
            m_t = top(teacher, rows, scratch) if has_teacher else None
        d_s, a, h, d_t, b, g, c = torch.zeros(7, count, dtype=acc)
        for span in scratch.spans:
            x, q, z, *spare = scratch.tiles(count, span[1] - span[0])
            s = rest(student, rows, span, x)
            if in_one:
                m_s = s.amax(1)
            torch.sub(s, m_s[:, None], out=x)
            d_s += torch.mul(x, scale, out=q).exp2_().sum(1)
            if needs & ENTROPY:
                h += torch.mul(x, q, out=z).sum(1)
            if needs & UNTEMPERED:
                c += torch.exp(x, out=z).sum(1)
            if not has_teacher:
                continue
            t = rest(teacher, rows, span, z)
            if in_one:
                m_t = t.amax(1)
            torch.sub(t, m_t[:, None], out=z)
            x.sub_(z)
            if needs & TEACHER_ENTROPY:
                p = torch.mul(z, scale, out=spare[0]).exp2_()
                g += z.mul_(p).sum(1)
            else:
                p = z.mul_(scale).exp2_()
            d_t += p.sum(1)
            if needs & FORWARD:
                b -= p.mul_(x).sum(1)
            if needs & REVERSE:
                a += x.mul_(q).sum(1)
        sums[AT.m_s, rows], sums[AT.d_s, rows] = m_s, d_s
        if has_teacher:
            sums[AT.m_t, rows], sums[AT.d_t, rows] = m_t, d_t
        for place, x in ((AT.a, a), (AT.h, h), (AT.b, b), (AT.g, g)):
            sums[place, rows] = x * UNIT
        sums[AT.c, rows] = c

    buffers = 4 if needs & TEACHER_ENTROPY else 3
    spread(as_if_finite, buffers, skipped=unread | (sums[AT.care] > 0))
    # an infinite logit makes a NaN or an infinity of these: 0 * inf, e * inf, inf - inf
    good = sums[AT.m_s] > LEFT_OUT
    for place in (AT.a, AT.h, AT.b, AT.g):
        good &= sums[place].isfinite()
    if has_teacher:
        good &= sums[AT.m_t] > LEFT_OUT
    sums[:, unread] = 0.0
    if not (good | unread).all():
        spread(carefully, 5, skipped=good | unread)
    return sums


def _leave_out(x: Tensor, label: Tensor, value: float) -> Tensor:
    """x [rows, columns] with ``value`` at each row's label, where that is a column."""
    inside = ((label >= 0) & (label < x.shape[1]))[:, None]
    column = torch.where(inside, label[:, None], 0)
    return x.scatter_(1, column, torch.where(inside, value, x.gather(1, column)))


def _minus(x: Tensor, m: Tensor, out: Tensor) -> Tensor:
    """x - m, in the dtype of ``out``."""
    if x.dtype != out.dtype:
        x = out.copy_(x)  # sub could convert, too, but takes memory for it
    return torch.sub(x, m, out=out)


def _see(s, t, x, z, filter_value, mixture=None, inv_temperature=None) -> None:
    """Logits into the buffers x, z as kernels/row_walk.py's ``seen`` has them."""
    x.copy_(s)
    z.copy_(t)
    if filter_value is not None:
        absent = z <= filter_value
        x.masked_fill_(absent, -INF)
        z.masked_fill_(absent, -INF)
    if mixture is not None:
        z.copy_(facts.skewed(x, z, facts.Mixture(*mixture), inv_temperature))


def _at_label(x: Tensor, label: Tensor) -> Tensor:
    """x [..., columns] at each row's label [...], -inf where that is no column."""
    inside = (label >= 0) & (label < x.shape[-1])
    column = torch.where(inside, label, 0)[..., None]
    return torch.where(inside, x.gather(-1, column)[..., 0], -INF)


def _sum_carefully(x, z, label, scale, buffers, needs):
    """Sums [16, rows] of one tile, whatever it holds; x and z are lost. ``label`` counts from its
    first column.
    """
    q, p, spare = buffers
    s_label, t_label = (_at_label(b, label) for b in (x, z))
    for b in (x, z):  # the label's column is not part of the sums
        _leave_out(b, label, -INF)
    floor = torch.finfo(x.dtype).min
    m_s = x.amax(1).clamp_min_(floor)
    m_t = z.amax(1).clamp_min_(floor)
    absent, absent_t = x == -INF, z == -INF
    missing = (absent_t & ~absent).any(1)
    x.sub_(m_s[:, None])
    z.sub_(m_t[:, None])
    d_s = torch.mul(x, scale, out=q).exp2_().sum(1)
    d_t = torch.mul(z, scale, out=p).exp2_().sum(1)
    a, b, h, g, c = torch.zeros(5, len(d_s), dtype=x.dtype, device=x.device)

    def total(mass, x, absent):
        return x.masked_fill_(absent, 0.0).mul_(mass).sum(1)

    if needs & UNTEMPERED:
        c = torch.exp(x, out=spare).sum(1)
    x.mul_(UNIT)
    z.mul_(UNIT)
    if needs & REVERSE:
        a = total(q, torch.sub(x, z, out=spare), absent)
    if needs & FORWARD:
        b = total(p, torch.sub(z, x, out=spare), absent_t)
    if needs & ENTROPY:
        h = total(q, x, absent)
    if needs & TEACHER_ENTROPY:
        g = total(p, z, absent_t)
    care = torch.where(missing, MISSING, torch.ones_like(a))
    none = torch.zeros_like(a)
    found = Sums(m_s, d_s, a, h, m_t, d_t, b, g, c, s_label, t_label, care, none, none, none, none)
    return torch.stack(found)


def row_grad(
    student: Rows,
    teacher: Rows,
    label: Tensor,
    inv_temperature: Tensor,
    weights: Tensor,
    V: int,
    *,
    slopes: int,
    phis: tuple = (),
    parameters: Tensor | None = None,
    filter_value: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient [N, columns of the student] from the table of weights (kernels/row_grad.py).

    ``out``: where to write it; the logits of either side, of the accumulator's dtype, may be there.
    """
    N, columns, acc = label.numel(), student.tensor.shape[-1], inv_temperature.dtype
    on_cpu = label.device.type == "cpu"
    if out is None:
        out = new_output((N, columns), student.tensor.dtype, label.device)
    out[:, V:].zero_()
    W = facts.Weights(*weights[:, :, None].unbind(0))
    zero = W.shift[:, 0] == INF
    # Rows of gradient 0 are not read, nor those that are NaN.
    unread = zero | W.w0[:, 0].isnan()
    scale = inv_temperature * LOG2E
    # Elsewhere than on the CPU, looking at a number would stall the device.
    any_of = torch.any if on_cpu else lambda flags: True
    careful, shifted = (W.care != 0) | (filter_value is not None), W.shift != 0
    with_logits = slopes & (REVERSE | ENTROPY)
    beside = bool(slopes & (FORWARD | UNTEMPERED) or phis)
    alone = slopes & PHI_ALONE
    inv_t = None if on_cpu and inv_temperature == 1 else inv_temperature

    def work(rows, scratch):
        for c, e in scratch.spans:
            s, t = _tile(student, rows, c, e), _tile(teacher, rows, c, e)
            x, z, *spare = scratch.tiles(*s.shape)
            if slopes & SKEWED or filter_value is not None:
                mixture = None
                if slopes & SKEWED:
                    mixture = W.m_s[rows], W.log_q[rows], W.phi[rows], W.log_p[rows]
                _see(s, t, x, z, filter_value, mixture, inv_temperature)
                s, t = x, z
            _minus(s, W.m_s[rows], x)
            if slopes & TEACHER:
                _minus(t, W.m_t[rows], z)
            if phis:
                normalisers = W.log_q[rows], W.log_p[rows], inv_t
                log_q, log_p = scratch.log_probabilities(x, z, *normalisers, 0 if alone else 4)
                _, slope = facts.pointwise(log_q, log_p, _of_rows(parameters, rows), phis)
                if alone:
                    g = tl.exp(log_q) * W.w0[rows] + slope
                    put(rows, c, e, g.x, W.phi[rows])
                    continue
                slope = slope * W.phi[rows]
            others = []
            if slopes & FORWARD:
                p = torch.mul(z, scale, out=spare[0] if with_logits else z).exp2_()
                others.append(p.mul_(W.w2[rows]))
            if slopes & UNTEMPERED:
                others.append(torch.exp(x, out=spare[1]).mul_(W.w4[rows]))
            if phis:
                others.append(slope.x)
            level = W.w0[rows]
            if slopes & REVERSE:
                level = torch.sub(x, z, out=z).mul_(W.w1[rows]).add_(level)
                if slopes & ENTROPY:
                    level.addcmul_(x, W.w3[rows])
            elif slopes & ENTROPY:
                level = torch.mul(x, W.w3[rows], out=z).add_(level)
            x.mul_(scale)
            if any_of(shifted[rows]):
                x.sub_(W.shift[rows])
            x.exp2_()
            if with_logits and any_of(careful[rows]):
                # The student leaves the column out, or as good as: 0, whatever the teacher says.
                level.masked_fill_(x == 0, 0.0)
            put(rows, c, e, x, level, others)

    def put(rows, c, e, x, factor, others=()):
        """x * factor and the sum of the others; x is lost."""
        function, operand = torch.mul, factor
        for other in others:
            function(x, operand, out=x)
            function, operand = torch.add, other
        if isinstance(rows, slice) and out.dtype == acc:
            function(x, operand, out=out[rows, c:e])
        else:  # it could convert, too, but takes twice as long
            _put(out, rows, c, e, function(x, operand, out=x))

    buffers = PHI_BUFFERS if alone else 2 + 2 * beside + PHI_BUFFERS * bool(phis)
    skipped = unread if on_cpu else None
    _spread((student, teacher), N, V, acc, work, buffers, skipped=skipped)
    fill = torch.where(zero, 0.0, torch.full_like(W.w0[:, 0], float("nan")))[:, None]
    if on_cpu:
        out[unread, :V] = fill[unread].to(out.dtype)
    else:
        out[:, :V] = torch.where(unread[:, None], fill.to(out.dtype), out[:, :V])
    has_label = ~zero & (label >= 0)
    where = torch.arange(N, device=label.device), torch.where(has_label, label, 0)
    out[where] = torch.where(has_label, W.at_label[:, 0].to(out.dtype), out[where])
    return out


def _of_rows(parameters: Tensor | None, rows: slice | Tensor) -> tuple[Tensor, ...]:
    """[rows, 1] or [1, 1] each, of parameters [P, N] or [P, 1]."""
    if parameters is None:
        return ()
    if parameters.shape[1] > 1:
        parameters = parameters[:, rows]
    return parameters[:, :, None].unbind(0)


def row_phi(
    student: Rows,
    teacher: Rows,
    label: Tensor,
    inv_temperature: Tensor,
    parameters: Tensor | None,
    sums: Tensor,
    V: int,
    *,
    phis: tuple,
    filter_value: Tensor | None = None,
) -> None:
    """The second sweep, into the last two rows of ``sums`` (kernels/row_phi.py)."""
    N, acc = label.numel(), inv_temperature.dtype
    found = Sums(*sums)
    to_q, to_p = facts.normalised(found, label, inv_temperature, TEACHER)
    m_s, m_t, to_q, to_p = (x[:, None] for x in (found.m_s, found.m_t, to_q, to_p))
    inv_t = None if label.device.type == "cpu" and inv_temperature == 1 else inv_temperature

    def work(rows, scratch):
        own = _of_rows(parameters, rows)
        phi, phi_slope = torch.zeros(2, len(label[rows]), dtype=acc, device=label.device)
        for c, e in scratch.spans:
            s, t = _tile(student, rows, c, e), _tile(teacher, rows, c, e)
            x, z, *_ = scratch.tiles(*s.shape)
            if filter_value is not None:
                _see(s, t, x, z, filter_value)
                s, t = x, z
            _minus(s, m_s[rows], x)
            _minus(t, m_t[rows], z)
            for b in (x, z):
                _leave_out(b, label[rows] - c, -INF)
            normalisers = to_q[rows], to_p[rows], inv_t
            log_q, log_p = scratch.log_probabilities(x, z, *normalisers, 0)
            value, slope = facts.pointwise(log_q, log_p, own, phis)
            phi += value.x.sum(1)
            phi_slope += slope.x.sum(1)
        sums[AT.phi, rows], sums[AT.phi_slope, rows] = phi, phi_slope

    unread = (label == IGNORED) | (label == INVALID)
    skipped = unread if label.device.type == "cpu" else None
    _spread((student, teacher), N, V, acc, work, PHI_BUFFERS, skipped=skipped)


def row_tail(
    student: Rows, columns: Tensor, label: Tensor, inv_temperature: Tensor, V: int
) -> Tensor:
    """(m, d) [2, N] of each row without its columns (kernels/row_tail.py)."""
    N, acc = label.numel(), inv_temperature.dtype
    tail = torch.zeros(2, N, dtype=acc, device=label.device)
    scale, floor = inv_temperature * LOG2E, torch.finfo(acc).min
    places = {}  # of all rows, by span: for a few rows it takes as long

    def work(rows, scratch):
        m = d = None
        for c, e in scratch.spans:
            if (c, e) not in places:
                places[c, e] = _places(columns.long() - c, e - c)
            index, none = (y[rows] for y in places[c, e])
            x = scratch.tiles(len(index), e - c)[0].copy_(_tile(student, rows, c, e))
            x.scatter_(1, index, torch.where(none, x[:, :1], -INF).expand(index.shape))
            top = x.amax(1).clamp_min_(floor)
            top = top if m is None else torch.maximum(top, m)
            mass = x.sub_(top[:, None]).mul_(scale).exp2_().sum(1)
            if m is not None:
                mass += d * torch.exp2((m - top) * scale)
            m, d = top, mass
        tail[0, rows], tail[1, rows] = m, d

    unread = (label == IGNORED) | (label == INVALID)
    skipped = unread if label.device.type == "cpu" else None
    _spread((student,), N, V, acc, work, TAIL_BUFFERS, skipped=skipped)
    return tail


def _places(columns: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(index [N, K], none [N, 1]) of columns counted from a tile's first: those outside of it are
    where the first inside is, or, in a row without one, at 0.
    """
    inside = (columns >= 0) & (columns < width)
    first = torch.where(inside, columns, width).amin(1, keepdim=True)
    none = first == width
    return torch.where(inside, columns, torch.where(none, 0, first)), none


def row_sum_parts(*args, **flags) -> Tensor:
    """``row_sums`` as the one share that it is, [1, 16, N]."""
    return row_sums(*args, **flags)[None]


def row_labels(labels, weight, shape, ignore_index, V, device, *, shift, strict) -> Tensor:
    """Labels and weight [...] as codes, int64 [...]: a column, or NO_LABEL, IGNORED, INVALID."""
    codes = torch.full(shape, NO_LABEL, dtype=torch.int64, device=device)
    if labels is not None:
        labels = labels.long()
        outside = (labels < 0) | (labels >= V)
        codes = torch.where(outside, INVALID if strict else NO_LABEL, labels)
        codes = torch.where(labels == ignore_index, IGNORED, codes)
    if weight is not None:
        codes = torch.where(weight == 0, IGNORED, codes)
    if shift:
        codes = torch.cat([codes[..., 1:], torch.full_like(codes[..., :1], IGNORED)], dim=-1)
    return codes.contiguous()  # where() keeps the strides of transposed labels; the fake has none


def row_losses(
    parts: Tensor,
    label: Tensor,
    inv_temperature: Tensor,
    parameters: Tensor | None,
    weight: Tensor | None,
    num_items: Tensor | None,
    *,
    program: Program,
    needs: int,
    metrics: bool,
    reduction: str,
):
    """(sums, result, denominator, fields) (kernels/row_map.py); parts [1, 16, N]."""
    (sums,) = parts
    formulas = formula_arguments(sums, label, inv_temperature, parameters)
    out = facts.losses(*formulas, program.terms, program.phis, needs, metrics)
    loss, fields = out[0], torch.stack(out) if metrics else None
    return sums, *_reduction.of_rows(loss, label, weight, num_items, reduction), fields


def row_weights(
    sums: Tensor,
    label: Tensor,
    inv_temperature: Tensor,
    parameters: Tensor | None,
    upstream: Tensor,
    weight: Tensor | None = None,
    denominator: Tensor | None = None,
    *,
    program: Program,
    needs: int,
    inv_room: Tensor | None = None,
) -> Tensor:
    """The table of weights [13, N] (kernels/row_map.py)."""
    if denominator is not None:
        upstream = facts.divided(upstream, denominator)
    upstream = upstream.expand(label.shape) if weight is None else upstream * weight
    formulas = formula_arguments(sums, label, inv_temperature, parameters)
    objective = program.terms, program.phis, needs
    if inv_room is not None:
        room = facts.float16_room(facts.gradient_bound(*formulas, *objective), upstream)
        upstream = upstream * room
        torch.reciprocal(room, out=inv_room)
    return torch.stack(facts.weights(*formulas, upstream, *objective))


def softmax_forward(
    logits: Rows, inv_temperature: Tensor, N: int, *, log: bool = False
) -> tuple[Tensor, Tensor]:
    """(output [N, V], state [2, N]) (kernels/softmax.py)."""
    V, acc, device = logits.tensor.shape[-1], inv_temperature.dtype, logits.tensor.device
    y = new_output((N, V), logits.tensor.dtype, device)
    state = new_output((2, N), acc, device)
    floor = torch.finfo(acc).min
    scale = inv_temperature * LOG2E

    def work(rows, scratch):
        tiles = [_tile(logits, rows, c, e) for c, e in scratch.spans]
        tops = [x.amax(1, keepdim=True) for x in tiles]
        m = torch.cat(tops, 1).amax(1, keepdim=True).to(acc).clamp_min_(floor)
        d = sum(_exponent(x, m, scale, scratch).exp2_().sum(1, keepdim=True) for x in tiles)
        log_d = d.log()
        for x, (c, e) in zip(tiles, scratch.spans, strict=True):
            z = _minus(x, m, scratch.tiles(*x.shape)[0])
            z = z.mul_(inv_temperature).sub_(log_d) if log else z.mul_(scale).exp2_().div_(d)
            _put(y, rows, c, e, z)
        state[0, rows], state[1, rows] = m[:, 0], d[:, 0]

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
    m, d = state[:, :, None]
    scale = inv_temperature * LOG2E

    def probability(rows, c, e, scratch):
        x = _exponent(_tile(logits, rows, c, e), m[rows], scale, scratch)
        return x.exp2_().div_(d[rows])

    def work(rows, scratch):
        dot = torch.zeros_like(m[rows])
        for c, e in scratch.spans:
            g = _tile(grad, rows, c, e)
            if not log:
                g = probability(rows, c, e, scratch).mul_(g)
            dot += g.sum(1, keepdim=True, dtype=state.dtype)
        for c, e in scratch.spans:
            p = probability(rows, c, e, scratch)
            g = scratch.tiles(*p.shape)[1].copy_(_tile(grad, rows, c, e))
            out = g.sub_(p.mul_(dot)) if log else g.sub_(dot).mul_(p)
            _put(dx, rows, c, e, out.mul_(inv_temperature))

    _spread((logits, grad), N, V, state.dtype, work, 2)
    return dx
