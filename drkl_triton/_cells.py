"""Losses over cells: the columns of which a SparseTeacher knows something, and all others together.

    columns  [N, K] int32, ascending and different in each row; V where there is no entry
    log_p    [N, K + 1]: the teacher's, of those columns and then of the rest
    label    [N]: the place of the label among them, or a code as facts.py has them

A scan of the student's logits without the columns, K of them picked out: that is a row of K + 1
logits, whose divergence is computed as any other. Its gradient goes back to the columns, and to
each other column in proportion to its probability.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import _reduction, facts
from ._layout import Rows, rows_of, slices_of
from ._loss import Loss
from ._objective import program
from ._shard import shard_of, vocabulary, widest
from .algebra import AT, AT_WEIGHT, SUMS
from .facts import IGNORED, INVALID, NO_LABEL
from .tiled import new_output

if TYPE_CHECKING:
    from ._objective import Program

INF = float("inf")
LN2 = math.log(2)
SLICE_BYTES = 64 << 20
TAIL_SUMS = 2  # m, d of a row without its columns
TOP = 1  # the largest of the cells' logits in the student
SCALED = [AT_WEIGHT.w1, AT_WEIGHT.w0, AT_WEIGHT.at_label, AT_WEIGHT.w2, AT_WEIGHT.w3, AT_WEIGHT.w4]


class Cells(NamedTuple):
    """A sparse teacher's rows, as above."""

    columns: Tensor
    log_p: Tensor
    label: Tensor

    def rows(self, which: slice | Tensor) -> Cells:
        return Cells(*(x[which] for x in self))

    def spread(self, launchers, V: int, inv_temperature: Tensor) -> Tensor:
        """Logits [N, V]: that of the rest at each other column."""
        log_p = self.log_p / inv_temperature
        rest = log_p[:, -1:].repeat(1, V)
        return _scatter(launchers, rest, self.columns, log_p[:, :-1], V)


def canonical(
    ids: Tensor,
    log_probs: Tensor,
    label_log_probs: Tensor | None,
    codes: Tensor,
    inv_temperature: Tensor,
    log_z: Tensor | None,
    V: int,
    tail: str,
    strict: bool,
    dtype: torch.dtype,
) -> Cells:
    """From ids, log_probs [N, K] and label_log_probs [N, 1]; codes [N], of the labels over the
    vocabulary; log_z [N, 2] or [N, 1] (sparse.SparseTeacher). strict: a label without a cell is
    INVALID, else the row has none. An id outside the vocabulary makes its row NaN. Computed in the
    dtype of inv_temperature, which is to tell 1 - p from 1, and rounded to ``dtype``.
    """
    acc = inv_temperature.dtype

    def at_temperature(x: Tensor) -> Tensor:
        x = x.to(acc)
        if log_z is not None and log_z.shape[1] == 2:
            x = x + log_z[:, :1].to(acc)
        x = x * inv_temperature
        return x if log_z is None else x - log_z[:, -1:].to(acc)

    ids, log_p = ids.long(), at_temperature(log_probs)
    if label_log_probs is not None:
        ids = torch.cat([ids, torch.where(codes >= 0, codes, -1)[:, None]], 1)
        log_p = torch.cat([log_p, at_temperature(label_log_probs)], 1)
    outside = ((ids < -1) | (ids >= V)).any(1, keepdim=True)
    columns = torch.where((ids < 0) | (ids >= V) | (log_p == -INF), V, ids)
    columns, log_p = _sorted(columns, log_p)
    again = torch.zeros_like(columns, dtype=torch.bool)
    again[:, 1:] = columns[:, 1:] == columns[:, :-1]
    columns, log_p = _sorted(torch.where(again, V, columns), log_p)
    log_p = log_p.masked_fill(columns == V, -INF)
    log_p = log_p.masked_fill(outside, float("nan"))

    count = (columns < V).sum(1)
    if tail == "renormalise":
        rest = torch.full_like(log_p[:, 0], -INF)
    else:
        least = -torch.finfo(torch.promote_types(log_probs.dtype, torch.float32)).eps
        whole = log_p.logsumexp(1)
        whole = torch.where(whole > least, least, whole)  # clamp would lose a NaN
        rest = torch.where(count == V, -INF, torch.log(-torch.expm1(whole)))
    if tail == "uniform":
        rest = rest - torch.log((V - count).clamp_min(1).to(acc))
    log_p = torch.cat([log_p, rest[:, None]], 1)
    if tail == "drop" and not strict:  # a sum of the columns' own terms
        label = torch.where(codes < 0, codes, NO_LABEL)
    else:
        label = _place(columns, codes, INVALID if strict else NO_LABEL)
    return Cells(columns.int(), log_p.to(dtype), label)


def _place(columns: Tensor, codes: Tensor, without: int) -> Tensor:
    """Of the labels among the columns; what is no column stays as it is."""
    match = columns == codes[:, None]
    place = torch.where(match.any(1), match.int().argmax(1), without)
    return torch.where(codes < 0, codes, place)


def _sorted(columns: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    columns, order = columns.sort(dim=1, stable=True)
    return columns, values.gather(1, order)


def of_columns(launchers, student: Rows, columns: Tensor, V: int, acc: torch.dtype) -> Tensor:
    """The logits [N, K] at the columns; -inf where there is none here."""
    if V == 0:
        return torch.full(columns.shape, -INF, dtype=acc, device=columns.device)
    shard = shard_of(launchers)
    index = columns.long() - (0 if shard is None else shard.first)
    index = index.view(*student.tensor.shape[:-1], columns.shape[1])
    here = (index >= 0) & (index < V)
    x = student.tensor.gather(-1, torch.where(here, index, 0)).to(acc)
    return torch.where(here, x, -INF).view(columns.shape)


def in_vocabulary(launchers, label: Tensor) -> Tensor:
    """This rank's labels as columns of the vocabulary."""
    shard = shard_of(launchers)
    return label if shard is None else torch.where(label >= 0, label + shard.first, label)


def unsharded(launchers):
    """Those for cells, which every rank has."""
    return launchers if shard_of(launchers) is None else launchers.module


def all_columns(launchers, student: Rows, columns: Tensor, V: int, acc: torch.dtype) -> Tensor:
    """As ``of_columns``, over all ranks."""
    x, shard = of_columns(launchers, student, columns, V, acc), shard_of(launchers)
    return x if shard is None else shard.largest(x)


def top_of(at_columns: Tensor, tail: Tensor) -> Tensor:
    return torch.maximum(at_columns.amax(1), tail[0])


def logits(at_columns: Tensor, tail: Tensor, top: Tensor, inv_temperature: Tensor) -> Tensor:
    """[N, K + 1]: the student's, of the cells, below their maximum and over the temperature."""
    m, d, top = tail[0][:, None], tail[1][:, None], top[:, None]
    rest = torch.where(d == 0, -INF, (m - top) * inv_temperature + d.log())
    return torch.cat([(at_columns - top) * inv_temperature, rest], 1)


def write(
    launchers,
    student: Rows,
    columns: Tensor,
    tail: Tensor,
    inv_temperature: Tensor,
    V: int,
    on_rest: Tensor,
    at_columns: Tensor,
    zero: Tensor,
    out: Tensor | None,
) -> Tensor:
    """The gradient [N, columns of the student]: at_columns [N, K] at the columns, and on_rest [N],
    in proportion to the probabilities, elsewhere. zero [N]: rows of gradient 0, which are not read.
    """
    m, d = tail
    weights = torch.zeros((len(AT_WEIGHT), len(m)), dtype=m.dtype, device=m.device)
    weights[AT_WEIGHT.m_s] = m
    weights[AT_WEIGHT.shift] = torch.where(zero, INF, 0.0)
    weights[AT_WEIGHT.w0] = _each(on_rest, d)
    no_label = torch.full(m.shape, NO_LABEL, dtype=torch.int64, device=m.device)
    out = launchers.row_grad(
        student, student, no_label, inv_temperature, weights, V, slopes=0, out=out
    )
    return _scatter(launchers, out, columns, at_columns.masked_fill(zero[:, None], 0.0), V)


def _each(on_rest: Tensor, d: Tensor) -> Tensor:
    """on_rest / d, 0 where there is no rest, and NaN where it is."""
    return torch.where(on_rest.isnan(), on_rest, facts.divided(on_rest, d))


def _scatter(launchers, out: Tensor, columns: Tensor, values: Tensor, V: int) -> Tensor:
    """Values [N, K] at the columns of ``out``. What is no entry goes where the row's first is, with
    the same value.
    """
    if shard := shard_of(launchers):
        columns, values = shard.columns(columns, values)
        if V == 0:
            return out
    columns = columns.long()
    none = columns[:, :1] == V
    first = torch.where(none, out[:, :1], values[:, :1].to(out.dtype))
    index = torch.where(columns < V, columns, torch.where(none, 0, columns[:, :1]))
    rows = torch.arange(len(out), device=out.device)[:, None]
    # scatter_ makes a float32 copy of 16-bit tensors on a CPU
    out[rows, index] = torch.where(columns < V, values.to(out.dtype), first)
    return out


class CellLoss(NamedTuple):
    """A divergence of cells, with the methods of _loss.Loss; its terms without a teacher are of the
    whole vocabulary. The table of sums is that of the cells, then the ``tail``, then that of the
    terms without a teacher, if there are any.
    """

    launchers: object
    compared: Program
    needs: int
    alone: Loss | None
    inv_temperature: Tensor
    V: int
    tail: str

    @property
    def of_cells(self) -> Loss:
        one = torch.ones_like(self.inv_temperature)
        return Loss(unsharded(self.launchers), self.compared, self.needs, one, None, 0)

    def _problem(
        self, at_columns: Tensor, cells: Cells, tail: Tensor, top: Tensor
    ) -> tuple[Loss, Rows, Rows]:
        """(the divergence of the cells, their logits in the student, in the teacher)."""
        s, t = logits(at_columns, tail, top, self.inv_temperature), cells.log_p
        outside = torch.stack([s[:, -1], t[:, -1]]) if self.tail == "drop" else None
        if self.tail != "bucket":
            s, t = s[:, :-1].contiguous(), t[:, :-1].contiguous()
        loss = self.of_cells._replace(V=s.shape[1], outside=outside)
        return loss, rows_of(s), rows_of(t)

    def sums(self, student: Rows, cells: Cells, label: Tensor, parameters: Tensor | None) -> Tensor:
        """[rows of the table, N]; label: over the vocabulary."""
        scanned = student, cells.columns, cells.label, self.inv_temperature
        tail = self.launchers.row_tail(*scanned, self.V)
        at_columns = all_columns(self.launchers, student, cells.columns, self.V, tail.dtype)
        top = top_of(at_columns, tail)
        loss, s, t = self._problem(at_columns, cells, tail, top)
        tables = [loss.sums(s, t, cells.label, parameters), tail, top[None]]
        if self.alone is not None:
            tables.append(self.alone.sums(student, student, label, parameters))
        return torch.cat(tables)

    def forward(
        self, student, cells, label, parameters, weight, num_items, metrics: bool, reduction: str
    ):
        """As _loss.Loss's."""
        sums = self.sums(student, cells, label, parameters)
        if self.alone is None:
            rest = parameters, weight, num_items, metrics, reduction
            return sums, *self.of_cells.row_losses(sums[None, :SUMS], cells.label, *rest)[1:]
        fields = self.fields(sums, label, cells.label, parameters, metrics)
        result = _reduction.of_rows(fields[0], label, weight, num_items, reduction)
        return sums, *result, torch.stack(fields) if metrics else None

    @property
    def table_rows(self) -> int:
        return SUMS + TAIL_SUMS + TOP + (0 if self.alone is None else SUMS)

    def fields(self, sums, label, cell_label, parameters, metrics: bool) -> tuple[Tensor, ...]:
        """As _loss.Loss's."""
        rest = None, parameters, metrics
        loss, *others = self.of_cells.fields(sums[:SUMS], cell_label, *rest)
        if self.alone is not None:
            loss = loss + self.alone.fields(sums[-SUMS:], label, None, parameters, False)[0]
        return loss, *others

    def gradient(
        self,
        student: Rows,
        cells: Cells,
        label: Tensor,
        parameters: Tensor | None,
        sums: Tensor,
        upstream: Tensor,
        weight: Tensor | None = None,
        denominator: Tensor | None = None,
        factor: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As _loss.Loss's."""
        tail, top = sums[SUMS : SUMS + TAIL_SUMS], sums[SUMS + TAIL_SUMS]
        # of another rank's columns the gradient is that rank's
        at_columns = of_columns(self.launchers, student, cells.columns, self.V, tail.dtype)
        loss, s, t = self._problem(at_columns, cells, tail, top)
        rows, given = (cells.label, parameters, sums[:SUMS]), (upstream, weight, denominator)
        if loss.outside is None:
            weights, on_rest = loss.weights(*rows, *given, factor), torch.zeros_like(tail[0])
        else:
            whole = s if shard_of(self.launchers) is None else None
            weights, on_rest = loss.weights_outside(whole, *rows, *given, factor)
        of_cells = loss.write(s, t, cells.label, parameters, weights)
        if self.tail == "bucket":
            on_rest, of_cells = of_cells[:, -1], of_cells[:, :-1]
        on_rest, of_cells = (x * self.inv_temperature for x in (on_rest, of_cells))
        if self.alone is None:
            zero = (weights[AT_WEIGHT.shift] == INF) | (of_cells == 0).all(1) & (on_rest == 0)
            return write(
                self.launchers, student, cells.columns, tail, self.inv_temperature, self.V, on_rest,
                of_cells, zero, out,
            )  # fmt: skip

        rows = label, parameters, sums[-SUMS:]
        inv_room = None if factor is None else torch.empty_like(factor)
        table = self.alone.weights(*rows, *given, inv_room)
        if factor is not None:  # one power of two for both
            both = torch.maximum(factor, inv_room)
            on_rest, of_cells = on_rest * (factor / both), of_cells * (factor / both)[:, None]
            table[SCALED] *= inv_room / both
            factor.copy_(both)
        picked = rows_of(at_columns)
        own = self.alone._replace(launchers=unsharded(self.launchers), V=cells.columns.shape[1])
        place = _place(cells.columns, in_vocabulary(self.launchers, label), NO_LABEL)
        of_cells = of_cells + own.write(picked, picked, place, parameters, table)

        loss = self.fields(sums, label, cells.label, parameters, False)[0]
        shift = table[AT_WEIGHT.shift]
        nothing = (shift == INF) & (of_cells == 0).all(1) & (on_rest == 0)
        zero = (label == IGNORED) | (loss == INF) | nothing
        table[AT_WEIGHT.shift] = torch.where(zero, INF, torch.where(shift == INF, 0.0, shift))
        # 2^{scale (s - m) - shift} of the table, where the rest has 2^{scale (s - m_rest)} / d
        share, lift = _each(on_rest, tail[1]), table[AT_WEIGHT.m_s] - tail[0]
        lift = torch.exp(lift * self.inv_temperature + shift * LN2)
        table[AT_WEIGHT.w0] += facts.times(share, lift)
        lift = torch.exp((sums[AT.s_label - SUMS] - tail[0]) * self.inv_temperature)
        table[AT_WEIGHT.at_label] += facts.times(share, lift)
        out = self.alone.write(student, student, label, parameters, table, out)
        of_cells = of_cells.masked_fill(zero[:, None], 0.0)
        return _scatter(self.launchers, out, cells.columns, of_cells, self.V)


def of(
    launchers, objective: str, needs: int, inv_temperature: Tensor, V: int, tail: str
) -> CellLoss:
    """An objective, by its key, with a sparse teacher."""
    compared, alone = program(objective, "compared"), program(objective, "alone")
    others = None
    if alone.terms:
        own = 0
        for *_, bits in alone.terms:
            own |= bits
        own &= needs | ~facts.UNTEMPERED
        others = Loss(launchers, alone, own, inv_temperature, None, V)
    needs = needs & ~facts.UNTEMPERED | facts.TEACHER  # of which the weights tell NaN
    return CellLoss(launchers, compared, needs, others, inv_temperature, V, tail)


class Spread(NamedTuple):
    """A loss whose teacher has its tail spread evenly over the vocabulary, with the methods of
    _loss.Loss: that teacher's logits are written out, a slice of the rows at a time.
    """

    loss: Loss

    def _slices(self, student: Rows, cells: Cells, parameters: Tensor | None):
        N, V = cells.label.shape[0], self.loss.V
        launchers = self.loss.launchers
        row_bytes = widest(launchers, V) * cells.log_p.element_size()
        height = max(1, SLICE_BYTES // row_bytes)
        per_row = parameters is not None and parameters.shape[1] > 1
        for i, j, part in slices_of(student, N, height):
            own = parameters[:, i:j] if per_row else parameters
            rows = cells.rows(slice(i, j))
            teacher = rows.spread(launchers, V, self.loss.inv_temperature)
            yield slice(i, j), part, rows_of(teacher), own

    def forward(
        self, student, cells, label, parameters, weight, num_items, metrics: bool, reduction: str
    ):
        parts = [
            self.loss.sums(s, t, label[rows], own)
            for rows, s, t, own in self._slices(student, cells, parameters)
        ]
        sums = torch.cat(parts, 1) if parts else cells.log_p.new_empty(SUMS, 0)
        rest = parameters, weight, num_items, metrics, reduction
        return self.loss.row_losses(sums[None], label, *rest)

    def gradient(
        self, student, cells, label, parameters, sums, upstream, weight=None, denominator=None
    ) -> Tensor:
        shape = label.shape[0], student.tensor.shape[-1]
        out = new_output(shape, student.tensor.dtype, label.device)
        table = self.loss.weights(label, parameters, sums, upstream, weight, denominator)
        for rows, s, t, own in self._slices(student, cells, parameters):
            self.loss.write(s, t, label[rows], own, table[:, rows].contiguous(), out[rows])
        return out


def distinct(ids: Tensor, V: int) -> tuple[Tensor, Tensor]:
    """(columns [N, K] as above, the rows' codes [N]) of ids [N, K]: -1 is no entry, a row without
    one is IGNORED, and one with an id outside of the vocabulary INVALID.
    """
    there = (ids >= 0) & (ids < V)
    columns, _ = torch.where(there, ids, V).sort(dim=1)
    columns[:, 1:].masked_fill_(columns[:, 1:] == columns[:, :-1], V)
    codes = torch.where(there.any(1), NO_LABEL, IGNORED)
    outside = ((ids < -1) | (ids >= V)).any(1)
    return columns.sort(dim=1).values.int(), torch.where(outside, INVALID, codes)


def at_ids(log_q: Tensor, columns: Tensor, ids: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """(log q [N, K] of the ids, of the rest [N]) from those of the cells [N, K + 1]."""
    place = torch.searchsorted(columns, ids.to(columns.dtype).contiguous())
    found = torch.where(ids >= 0, log_q.gather(1, place.clamp(max=columns.shape[1])), -INF)
    rest = torch.where(codes == IGNORED, 0.0, log_q[:, -1])
    bad = codes == INVALID
    return found.masked_fill(bad[:, None], float("nan")), rest.masked_fill(bad, float("nan"))


def to_cells(grad: Tensor, grad_rest: Tensor, columns: Tensor, ids: Tensor) -> Tensor:
    """The transpose of ``at_ids``: the gradient of the cells [N, K + 1]. Those of an id that is
    there several times are added in a fixed order.
    """
    ids, order = ids.sort(dim=1, stable=True)
    grad = torch.where(ids >= 0, grad.gather(1, order), 0.0)
    step, K = 1, ids.shape[1]
    while step < K:  # after it the first of equals holds the sum of twice as many
        same = ids[:, step:] == ids[:, :-step]
        more = torch.where(same, grad[:, step:], 0.0)
        grad = torch.cat([grad[:, :-step] + more, grad[:, -step:]], 1)
        step *= 2
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = torch.searchsorted(columns, ids.to(columns.dtype))
    place = torch.where(first & (ids >= 0), place, K + 1)
    out = grad.new_zeros(len(ids), K + 2).scatter_(1, place, grad)
    out[:, K] = grad_rest
    return out[:, : K + 1]


class LogProbs(NamedTuple):
    """log q at some columns and of the rest (sparse.log_probs_at), with the methods of a loss: its
    table is [2 + K, N], the ``tail`` and the logits at the columns, and its gradient that of the
    cells' log-probabilities times ``parameters`` [K + 1, N].
    """

    launchers: object
    inv_temperature: Tensor
    V: int
    K: int

    @property
    def table_rows(self) -> int:
        return TAIL_SUMS + self.K

    def sums(self, student: Rows, cells: Cells, label: Tensor, parameters: None) -> Tensor:
        scanned = student, cells.columns, label, self.inv_temperature
        tail = self.launchers.row_tail(*scanned, self.V)
        rows = student, cells.columns, self.V, tail.dtype
        return torch.cat([tail, all_columns(self.launchers, *rows).t()])

    def gradient(
        self, student, cells, label, parameters, sums, upstream, *, factor=None, out=None
    ) -> Tensor:
        log_q = log_probabilities(sums, self.inv_temperature)
        g = parameters.t() * (upstream * self.inv_temperature)[:, None]
        if factor is not None:
            room = facts.float16_room(g.abs().sum(1), torch.ones_like(upstream))
            g = g * room[:, None]
            torch.reciprocal(room, out=factor)
        # where there is nothing, no gradient goes
        there = cells.columns < vocabulary(self.launchers, self.V)
        there = torch.cat([there, (sums[1] > 0)[:, None]], 1)
        counts = (there | log_q.isnan()) & (label != IGNORED)[:, None]
        g, log_q = torch.where(counts, g, 0.0), torch.where(counts, log_q, -INF)
        others = g.sum(1, keepdim=True) - g
        g = -torch.expm1(log_q) * g - log_q.exp() * others
        zero = (g == 0).all(1)
        return write(
            self.launchers, student, cells.columns, sums[:TAIL_SUMS], self.inv_temperature, self.V,
            g[:, -1], g[:, :-1], zero, out,
        )  # fmt: skip


def log_probabilities(sums: Tensor, inv_temperature: Tensor) -> Tensor:
    """[N, K + 1], of the cells, from the table of LogProbs."""
    at_columns, tail = sums[TAIL_SUMS:].t(), sums[:TAIL_SUMS]
    x = logits(at_columns, tail, top_of(at_columns, tail), inv_temperature)
    # log1p of all but the largest, which is 1: so log q keeps its digits next to 0
    top = x.argmax(1, keepdim=True)
    x = x - x.gather(1, top)
    others = x.exp().scatter(1, top, 0.0).sum(1, keepdim=True)
    return x - torch.log1p(others)
