"""The losses from hidden states: a slice of the logits at a time, between library matrix products.

    logits     S = hidden @ weight.T, of both models     for some rows; then bias, scale, softcap
    sums       row_sums(S, T)                            what the losses are made of
    gradient   row_grad(S, T), over S itself             where one is wanted
    products   d hidden = G @ weight,  d weight += G.T @ hidden

The launchers are those of the losses from logits. Rows that are ignored are left
out before the first product.

Where the library multiplies 16-bit matrices into float32 (CUDA), the gradient is rounded once, to
the 16 bits of the weight, into a matrix G of several slices, a *group*: d weight [V, H] is read and
written once a group. Elsewhere 16-bit matrices are converted some columns at a time, the gradient
stays in float32 where it is, over S, and a group is one slice.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import tiled
from ._cells import Cells
from ._layout import rows_in_place, rows_of
from ._loss import Loss
from ._shard import shard_of, widest
from .facts import IGNORED

if TYPE_CHECKING:
    from ._cells import CellLoss
    from ._shard import Shard

MB = 1 << 20
# What both models' slices take by default: this, or on a GPU a quarter of its free memory, if that
# is more, up to the second number. A power of two, so that a little more or less free memory does
# not change the slices, and with them the last bits of the result.
CHUNK_BYTES, MAX_CHUNK_BYTES = 256 * MB, 2048 * MB
# Slices of a group where the gradient has a matrix of its own.
SLICES = 4
# Rows of a buffer are multiples of this long, whatever V is: every row starts at 128 bytes, for
# 16-byte loads, and matrix libraries like it.
COLUMNS = 64
# Elements of a matrix, and columns at the least, that are converted or multiplied at a time where a
# product is made in parts. 2 MB of float32 fit into the second-level cache.
PART, MIN_PART = 1 << 19, 512
# Gradients in float16 are multiplied by a power of two that makes the largest upstream gradient
# 2^FLOAT16_SCALE, so that 1e-10 of it does not vanish. A row that could then exceed 2^15 (a
# divergence of 127 nats) is multiplied by a smaller one (facts.float16_room).
FLOAT16_SCALE = 8


class Head(NamedTuple):
    """A model's output layer: logits = softcap(scale * (hidden @ weight.T + bias))."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H], or of more rows than V; the dtype of hidden
    bias: Tensor | None  # [V]
    scale: Tensor | None
    softcap: Tensor | None

    def logits(self, hidden: Tensor, out: Tensor) -> None:
        """Those of some rows of ``hidden``, written to ``out`` [rows, V]."""
        V = out.shape[1]
        multiply(hidden, self.weight[:V].t(), out)
        if self.bias is not None:
            out.add_(self.bias[:V])
        if self.scale is not None:
            out.mul_(self.scale)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)


class Wanted(NamedTuple):
    """Which gradients of the student's head are."""

    hidden: bool
    weight: bool
    bias: bool


@lru_cache(maxsize=32)
def multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library takes 16-bit matrices and returns the sums in float32. Asked by trying:
    it depends on device and version.
    """
    x, out = (torch.zeros((16, 16), dtype=d, device=device) for d in (dtype, torch.float32))
    try:
        torch.mm(x, x, out_dtype=torch.float32, out=out)
        torch.addmm(out, x, x, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return True


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """out = a @ b, or out += a @ b, summed in the dtype of ``out``."""
    acc, (M, K), N = out.dtype, a.shape, b.shape[1]
    same = a.dtype == b.dtype
    if same and acc == torch.float32 != a.dtype and multiplies_into_float32(a.device, a.dtype):
        if add:
            torch.addmm(out, a, b, out_dtype=acc, out=out)
        else:
            torch.mm(a, b, out_dtype=acc, out=out)
    elif same and a.dtype == acc and not (a.device.type == "cpu" and N > max(M, K)):
        if add:
            torch.addmm(out, a, b, out=out)
        else:
            torch.mm(a, b, out=out)
    else:
        _multiply_in_parts(a, b, out, add)


def _multiply_in_parts(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """The longest dimension, the vocabulary, a part at a time: each part of the operands is
    converted where it has to be, and logits on a CPU are faster so, too.
    """
    acc, (M, K), N = out.dtype, a.shape, b.shape[1]
    _, middle, longest = sorted((M, K, N))
    step = max(MIN_PART, PART // max(1, middle))
    for c in range(0, longest, step):
        part = slice(c, c + step)
        if longest == N:
            a = a.to(acc)
            x, y, z = a, b[:, part].to(acc), out[:, part]
        elif longest == M:
            b = b.to(acc)
            x, y, z = a[part].to(acc), b, out[part]
        else:
            x, y, z = a[:, part].to(acc), b[part].to(acc), out
            add = add or c > 0
        if add:
            torch.addmm(z, x, y, out=z)
        else:
            torch.mm(x, y, out=z)


def free_cuda_memory(device: torch.device) -> int:
    """Bytes that the device has, or that PyTorch's allocator holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def default_chunk_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return CHUNK_BYTES
    quarter = 1 << max(0, (free_cuda_memory(device) // 4).bit_length() - 1)
    return min(max(quarter, CHUNK_BYTES), MAX_CHUNK_BYTES)


class _Rows:
    """The rows that count: all, or those at the indices ``chosen``. In backward those of upstream
    gradient 0 do not, either.
    """

    def __init__(self, label: Tensor, may_skip: bool, upstream: Tensor | None):
        self.total, self.chosen = label.numel(), None
        if may_skip:  # looking waits for the device, here and nowhere else
            counts = label != IGNORED
            if upstream is not None:
                counts &= upstream != 0
            chosen = counts.nonzero()[:, 0]
            self.chosen = chosen if chosen.numel() < self.total else None
        self.count = self.total if self.chosen is None else self.chosen.numel()

    def take(self, x: Tensor, i: int, j: int) -> Tensor:
        """Rows i ... j - 1 of those that count; a view, if all do."""
        return x[i:j] if self.chosen is None else x[self.chosen[i:j]]


class _GivenLogits:
    """The teacher's logits [..., V] where the caller has them. Rows that lie evenly and all count
    are read in place; others are copied a slice at a time.
    """

    def __init__(self, logits: Tensor, V: int, rows: _Rows):
        self.logits, self.rows = logits[..., :V], rows
        layout = rows_in_place(self.logits)
        if layout is not None and layout.inner >= rows.total:
            place = (layout.strides[1], 1), self.logits.storage_offset()
            self.logits = self.logits.as_strided((rows.total, V), *place)
        self.in_place = self.logits.dim() == 2 and rows.chosen is None
        self.itemsize = 0 if self.in_place else logits.element_size()  # of a slice's copy

    def slice(self, i: int, j: int) -> Tensor:
        if self.in_place:
            return self.logits[i:j]
        if self.rows.chosen is None:
            index = torch.arange(i, j, device=self.logits.device)
        else:
            index = self.rows.chosen[i:j]
        return self.logits[torch.unravel_index(index, self.logits.shape[:-1])]


class _NoLogits:
    """Where there is no teacher."""

    itemsize = 0

    def slice(self, i: int, j: int) -> None:
        return None


class _TeacherCells:
    """Of a sparse teacher; with a tail that is spread evenly the logits that they make."""

    def __init__(self, cells: Cells, rows: _Rows, loss: Loss | CellLoss):
        self.cells = cells if rows.chosen is None else cells.rows(rows.chosen)
        self.loss, self.spread = loss, isinstance(loss, Loss)
        self.itemsize = cells.log_p.element_size() if self.spread else 0

    def slice(self, i: int, j: int) -> Cells | Tensor:
        part = self.cells.rows(slice(i, j))
        if not self.spread:
            return part
        return part.spread(self.loss.launchers, self.loss.V, self.loss.inv_temperature)


class _ModelLogits:
    """The teacher's logits where its head makes them."""

    def __init__(self, head: Head, rows: _Rows):
        self.head, self.rows, self.buffer = head, rows, None

    def slice(self, i: int, j: int) -> Tensor:
        t = self.buffer[: j - i]
        self.head.logits(self.rows.take(self.head.hidden, i, j), t)
        return t


class _Gradients:
    """Of the student's head, summed over the groups; that of hidden over the ranks of ``shard``,
    those of a group's rows while the next group is computed.
    """

    def __init__(
        self,
        student: Head,
        wanted: Wanted,
        rows: _Rows,
        V: int,
        acc: torch.dtype,
        shard: Shard | None,
    ):
        self.student, self.rows, self.V, self.shard = student, rows, V, shard
        self.under_way: tuple | None = None  # of d hidden: (what waits for it, rows, where to)
        columns, H = student.weight.shape
        device = student.hidden.device
        self.hidden = self.weight = self.bias = None
        if wanted.hidden:
            self.hidden = tiled.new_output((rows.total, H), acc, device)
            if rows.count < rows.total:
                self.hidden.zero_()
        if wanted.weight:
            self.weight = tiled.new_output((columns, H), acc, device)
            self.weight[V if rows.count else 0 :].zero_()
        if wanted.bias:
            self.bias = torch.zeros(columns, dtype=acc, device=device)

    def add(self, G: Tensor, zero: Tensor, factor: Tensor | None, i: int, j: int) -> None:
        """G [j - i, V] times ``factor`` [j - i]: the gradient of hidden @ weight.T + bias in rows
        i ... j - 1. zero [j - i]: whose upstream gradient is 0, whatever they hold.
        """
        V, chosen = self.V, self.rows.chosen
        if self.hidden is not None:
            part = self.hidden[i:j]
            if chosen is not None:
                part = torch.empty_like(part)
            multiply(G, self.student.weight[:V], part)
            if factor is not None:
                part.mul_(factor[:, None])
            where = None if chosen is None else chosen[i:j]
            if self.shard is None:
                self._place(part, where)
            else:
                self.arrive()
                self.under_way = self.shard.start(part), part, where
        if self.weight is not None:
            hidden = self.rows.take(self.student.hidden, i, j).masked_fill(zero[:, None], 0.0)
            if factor is not None:
                hidden.mul_(factor[:, None])  # a power of two
            multiply(G.t(), hidden, self.weight[:V], add=i > 0)
        if self.bias is not None:
            if factor is None:
                self.bias[:V] += G.sum(0, dtype=self.bias.dtype)
            else:
                multiply(factor.to(G.dtype)[None], G, self.bias[None, :V], add=True)

    def arrive(self) -> None:
        """Wait for the rows of d hidden that are under way."""
        if self.under_way is not None:
            wait, part, where = self.under_way
            wait()
            self._place(part, where)
            self.under_way = None

    def _place(self, part: Tensor, where: Tensor | None) -> None:
        if where is not None:
            self.hidden[where] = part

    def scale(self, factor: Tensor) -> None:
        for x in (self.hidden, self.weight, self.bias):
            if x is not None:
                x.mul_(factor)


def plan(count: int, slice_bytes: int, group_bytes: int, chunk_bytes: int) -> tuple[int, int]:
    """(rows of a group, rows of a slice), both at least 1, of ``count`` rows, when a row takes
    ``slice_bytes`` in a slice's buffers and ``group_bytes`` in a group's (0: a group is a slice).
    """
    slices = SLICES if group_bytes else 1
    fit = max(1, chunk_bytes // (slice_bytes + slices * group_bytes))
    # Libraries multiply whole multiples of these at full speed.
    unit = 128 if fit >= 1024 else 16 if fit >= 16 else 1
    fit = fit // unit * unit
    # Evenly, so that the last slice is not much smaller than the others.
    groups = max(1, -(-count // (slices * fit)))
    height = max(1, -(-count // (slices * groups * unit))) * unit
    return slices * height, height


def walk(
    loss: Loss,
    student: Head,
    teacher: Head | Tensor | Cells | None,
    label: Tensor,
    parameters: Tensor | None,
    upstream: Tensor | None,
    sums: Tensor | None,
    wanted: Wanted,
    may_skip: bool,
    chunk_bytes: int,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(sums [16, N], d hidden [N, H], d weight [V, H], d bias [V]), in the accumulator's dtype.

    teacher: its head, its logits [..., V], its cells, or None. label int64 [N]; parameters of the
    objective [P, N] or [P, 1]. upstream [N]: the gradient of each row's loss; None: no gradient is
    wanted. sums: those of an earlier call, or None. may_skip: whether rows may be ignored, so that
    it must be looked which are.
    """
    acc, device, V = loss.inv_temperature.dtype, label.device, loss.V
    rows = _Rows(label, may_skip, None if sums is None else upstream)
    if isinstance(teacher, Head):
        theirs, itemsize = _ModelLogits(teacher, rows), acc.itemsize
    else:
        if teacher is None:
            theirs = _NoLogits()
        elif isinstance(teacher, Cells):
            theirs = _TeacherCells(teacher, rows, loss)
        else:
            theirs = _GivenLogits(teacher, V, rows)
        itemsize = theirs.itemsize
    dtype = student.weight.dtype
    narrow = upstream is not None and dtype.itemsize == 2 and acc == torch.float32
    narrow = narrow and multiplies_into_float32(device, dtype)
    # The derivative of a softcap needs the student's logits after the gradient is written; so that
    # goes over the teacher's, or where those are the caller's, into a buffer of its own.
    capped = upstream is not None and student.softcap is not None
    extra = capped and not isinstance(theirs, _ModelLogits)

    # every rank cuts the rows in the same way
    columns = -(-widest(loss.launchers, V) // COLUMNS) * COLUMNS
    slice_bytes = columns * (acc.itemsize * (1 + extra) + itemsize)
    group_bytes = columns * dtype.itemsize if narrow else 0
    group, height = plan(rows.count, slice_bytes, group_bytes, chunk_bytes)

    def buffer(height: int, dtype: torch.dtype = acc) -> Tensor:
        return tiled.new_output((height, columns), dtype, device)[:, :V]

    S = buffer(height)
    if isinstance(theirs, _ModelLogits):
        theirs.buffer = buffer(height)
    over = S if not capped else buffer(height) if extra else theirs.buffer
    G = buffer(group, dtype) if narrow else S

    label = rows.take(label, 0, rows.count)
    per_row = parameters is not None and parameters.shape[1] > 1
    if per_row and rows.chosen is not None:
        parameters = parameters[:, rows.chosen]
    if sums is not None:
        table = sums if rows.chosen is None else sums[:, rows.chosen]
    else:
        table = torch.empty((loss.table_rows, rows.count), dtype=acc, device=device)
    if upstream is not None:
        gradients = _Gradients(student, wanted, rows, V, acc, shard_of(loss.launchers))
        upstream = rows.take(upstream, 0, rows.count)
        if student.scale is not None:
            upstream = upstream * student.scale
        zero = upstream == 0
        factor = None  # of the rows of G
        if narrow and dtype == torch.float16:
            scale = _float16_scale(upstream, parameters, loss)
            upstream = upstream * scale
            factor = torch.empty_like(upstream)

    for i in range(0, rows.count, group):
        j = min(rows.count, i + group)
        for k in range(i, j, height):
            e = min(j, k + height)
            s, y = S[: e - k], label[k:e]
            student.logits(rows.take(student.hidden, k, e), s)
            t = theirs.slice(k, e)
            pair = rows_of(s), t if isinstance(t, Cells) else rows_of(s if t is None else t)
            own = parameters[:, k:e] if per_row else parameters
            if sums is None:
                table[:, k:e] = loss.sums(*pair, y, own)
            if upstream is not None:
                g, up = G[k - i : e - i], upstream[k:e]
                out = over[: e - k] if capped else g
                room = None if factor is None else factor[k:e]
                loss.gradient(*pair, y, own, table[:, k:e], up, factor=room, out=out)
                if capped:  # d softcap(z) / dz = 1 - (s / softcap)^2
                    s.div_(student.softcap).square_().neg_().add_(1.0).mul_(out)
                    s.masked_fill_(zero[k:e, None], 0.0)
                    if narrow:
                        g.copy_(s)
        if upstream is not None:
            part = None if factor is None else factor[i:j]
            gradients.add(G[: j - i], zero[i:j], part, i, j)

    if sums is None:
        sums = table
        if rows.chosen is not None:
            sums = torch.zeros((loss.table_rows, rows.total), dtype=acc, device=device)
            sums[:, rows.chosen] = table
    if upstream is None:
        return sums, None, None, None
    gradients.arrive()
    if factor is not None:
        gradients.scale(1 / scale)
    return sums, gradients.hidden, gradients.weight, gradients.bias


def _float16_scale(upstream: Tensor, parameters: Tensor | None, loss: Loss) -> Tensor:
    """The power of two that brings the largest of ``upstream`` to FLOAT16_SCALE, for gradients in
    float16: divided by the number of tokens, one of 1 / V would be 0.
    """
    if upstream.numel() == 0:
        return upstream.new_ones(())
    # a temperature above 1 divides the gradient, and the log-ratios in it
    cooling = loss.inv_temperature * loss.inv_temperature.clamp(max=1.0)
    # a parameter may weigh all of it
    weight = 1.0 if parameters is None else parameters.abs().amax().clamp(min=1.0)
    top = upstream.abs().amax() * cooling * weight
    top = torch.where((top > 0) & top.isfinite(), top, 1.0)
    return torch.exp2((FLOAT16_SCALE - top.log2().ceil()).clamp(-120, 120))


def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x * factor (0-dim), rounded once, to ``dtype``; a factor of 0 makes 0 of whatever x holds."""
    out = tiled.new_output(x.shape, dtype, x.device)
    height = max(1, 8 * PART // max(1, x[:1].numel()))
    for part, result in zip(x.split(height), out.split(height), strict=True):
        # and an ignored row stays 0, whatever the factor is
        result.copy_((part * factor).masked_fill_((factor == 0) | (part == 0), 0.0))
    return out
