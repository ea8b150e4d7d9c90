"""An objective's launches: which sums, which sweeps, which weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import algebra, facts, objectives
from ._objective import Objective, Program, program
from ._shard import vocabulary
from .algebra import AT, AT_WEIGHT, SUMS, formula_arguments

if TYPE_CHECKING:
    from ._layout import Rows

# That find the teacher's head: of ln(2 V), about 13, they leave 1e-6.
SWEEPS = 15


class Loss(NamedTuple):
    """A divergence of rows of logits, and the launchers that compute it."""

    launchers: object  # the module of a backend
    program: Program
    needs: int
    inv_temperature: Tensor
    filter_value: Tensor | None
    V: int
    # [2, N]: the logits of a column that counts in the normalisers alone (a dropped tail)
    outside: Tensor | None = None

    @property
    def sums_needed(self) -> int:
        """Also what tells which columns are left out."""
        return self.needs if self.filter_value is None else self.needs | facts.TEACHER

    def sum_parts(
        self, student: Rows, teacher: Rows, label: Tensor, parameters: Tensor | None
    ) -> Tensor:
        """[splits, 16, N]; [1, 16, N] where a second sweep needs them whole."""
        if self.sweeps:
            return self.sums(student, teacher, label, parameters)[None]
        return self.launchers.row_sum_parts(
            student, teacher, label, self.inv_temperature, self.V, needs=self.sums_needed,
            filter_value=self.filter_value,
        )  # fmt: skip

    def forward(
        self, student, teacher, label, parameters, weight, num_items, metrics: bool, reduction: str
    ):
        """(the table of sums, the loss [N] or reduced, the denominator of a mean, the fields of
        RowMetrics [7, N] where they are asked for).
        """
        parts = self.sum_parts(student, teacher, label, parameters)
        rest = parameters, weight, num_items, metrics, reduction
        return self.row_losses(parts, label, *rest)

    def row_losses(self, parts, label, parameters, weight, num_items, metrics, reduction):
        return self.launchers.row_losses(
            parts, label, self.inv_temperature, parameters, weight, num_items,
            program=self.program, needs=self.needs, metrics=metrics, reduction=reduction,
        )  # fmt: skip

    @property
    def table_rows(self) -> int:
        return SUMS

    def fields(self, sums, label, cell_label, parameters, metrics: bool) -> tuple[Tensor, ...]:
        """The loss [N] of merged sums and, with metrics, the other fields of RowMetrics."""
        rows = formula_arguments(sums, label, self.inv_temperature, parameters)
        out = facts.losses(*rows, self.program.terms, self.program.phis, self.needs, metrics)
        return out if metrics else out[:1]

    @property
    def sweeps(self) -> bool:
        """Whether the logits are read again in the forward pass."""
        return bool(self.program.phis) or self.program.head >= 0 or self.program.skewed

    def _gaps(
        self, student: Rows, teacher: Rows, label: Tensor, sums: Tensor, head: Tensor
    ) -> tuple[Tensor, Tensor]:
        """sum |q - p| over the teacher's head, and over the rest. The head's lowest log-probability
        lies between that of a flat rest and 0; every sweep cuts that to a third, without a sort.
        """
        found = facts.Sums(*sums)
        f, row = facts.facts(found, label, self.inv_temperature, self.needs)
        logs = [(f.log_q, f.log_p)]  # that the sweep leaves out
        if self.outside is not None:
            x, z = self.outside
            to_q, to_p = facts.normalisers(found, f, row)
            x = (x - found.m_s) * self.inv_temperature + to_q
            logs.append((x, (z - found.m_t) * self.inv_temperature + to_p))

        def swept(formula, *thresholds):
            """Over all columns; of the gaps, without that outside."""
            phis = ((formula.function, -1, 0, len(thresholds), 0),)
            rows = student, teacher, label, self.inv_temperature, torch.stack(thresholds)
            self.launchers.row_phi(*rows, sums, self.V, phis=phis, filter_value=self.filter_value)
            total = sums[AT.phi], sums[AT.phi_slope]
            for log_q, log_p in logs[: 1 if formula is objectives.gaps else None]:
                both = facts.floored(log_q), facts.floored(log_p)
                own = facts.pointwise(*both, thresholds, phis)
                total = total[0] + own[0], total[1] + own[1]
            return total

        low = torch.log((1 - head) / (vocabulary(self.launchers, self.V) + len(logs)))
        high = torch.zeros_like(low)
        for _ in range(SWEEPS):
            third = (high - low) / 3
            one, two = low + third, high - third
            from_one, from_two = swept(objectives.masses_above, one, two)
            high = torch.where(from_two >= head, high, torch.where(from_one >= head, two, one))
            low = torch.where(from_two >= head, two, torch.where(from_one >= head, one, low))
        found = swept(objectives.gaps, low)
        sums[AT.phi], sums[AT.phi_slope] = 0.0, 0.0
        return found

    def _scan(self, rows: tuple, **options) -> Tensor:
        sums = self.launchers.row_sums(*rows, self.V, **options)
        if self.outside is None:
            return sums
        x, z = self.outside
        if options.get("mixture") is not None:
            mixture = facts.Mixture(*options["mixture"])
            z = facts.skewed(x, z, mixture, self.inv_temperature)
        return algebra.with_outside(sums, x, z, self.inv_temperature)

    def _skewed_sums(self, rows: tuple, skew: Tensor, options: dict) -> Tensor:
        """Both models' sums make the teacher, whose are found by a second scan."""
        _, _, label, inv_temperature = rows
        sums = self._scan(rows, needs=facts.TEACHER, **options)
        mixture, at_label = facts.mixture(facts.Sums(*sums), label, inv_temperature, skew)
        options = dict(needs=self.sums_needed, mixture=torch.stack(mixture), **options)
        sums = self._scan(rows, **options)
        sums[AT.t_label], sums[AT.gap_head :] = at_label, options["mixture"]
        return sums

    def sums(
        self, student: Rows, teacher: Rows, label: Tensor, parameters: Tensor | None
    ) -> Tensor:
        """[16, N]."""
        rows, program = (student, teacher, label, self.inv_temperature), self.program
        options = dict(filter_value=self.filter_value)
        if program.skewed:
            return self._skewed_sums(rows, parameters[0], options)
        sums = self._scan(rows, needs=self.sums_needed, **options)
        if program.head >= 0:
            head = parameters[program.head].expand(label.shape)
            sums[AT.gap_head], sums[AT.gap_tail] = self._gaps(student, teacher, label, sums, head)
        if program.phis:
            self.launchers.row_phi(*rows, parameters, sums, self.V, phis=program.phis, **options)
        return sums

    def gradient(
        self,
        student: Rows,
        teacher: Rows,
        label: Tensor,
        parameters: Tensor | None,
        sums: Tensor,
        upstream: Tensor,
        weight: Tensor | None = None,
        denominator: Tensor | None = None,
        factor: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """factor [rows]: the gradient is kept inside float16, and what it is to be multiplied with
        afterwards is written here.
        """
        weights = self.weights(label, parameters, sums, upstream, weight, denominator, factor)
        return self.write(student, teacher, label, parameters, weights, out)

    def weights(
        self,
        label: Tensor,
        parameters: Tensor | None,
        sums: Tensor,
        upstream: Tensor,
        weight: Tensor | None = None,
        denominator: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        """The table of weights [13, N]."""
        return self.launchers.row_weights(
            sums, label, self.inv_temperature, parameters, upstream, weight, denominator,
            program=self.program, needs=self.needs, inv_room=factor,
        )  # fmt: skip

    def weights_outside(
        self, student: Rows | None, label, parameters, sums, upstream, weight=None,
        denominator=None, factor=None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``weights`` and the gradient [N] of the column outside, whose term the sums leave out:
        with q^_o its probability and N = sum q^_k log(q^_k / p^_k) without it,

            dN/ds_k = q^_k (log(q^_k / p^_k) - N + q^_o)     dN/ds_o = q^_o (q^_o - 1 - N)

        and likewise for the other Facts that are sums over columns. student: None where other ranks
        have some of its columns.
        """
        if denominator is not None:
            upstream = facts.divided(upstream, denominator)
        upstream = upstream.expand(label.shape) if weight is None else upstream * weight
        table = self.weights(label, parameters, sums, upstream, factor=factor)
        W = facts.Weights(*table)
        x, z = self.outside
        rows = formula_arguments(sums, label, self.inv_temperature, parameters)
        S = rows[0]
        if self.program.skewed:
            mixture = facts.Mixture(W.m_s, W.log_q, W.phi, W.log_p)
            z = facts.skewed(x, z, mixture, self.inv_temperature)
        q = facts.divided(torch.exp((x - S.m_s) * self.inv_temperature), S.d_s)
        p = facts.divided(torch.exp((z - S.m_t) * self.inv_temperature), S.d_t)
        f, row = facts.facts(*rows[:3], self.needs)
        slopes, _ = facts.objective(f, row, rows[3], self.program.terms, self.program.phis)
        inside = 1 - q
        if student is not None:  # that has few digits where nearly all lies outside
            inside = torch.exp((student.tensor - S.m_s[:, None]) * self.inv_temperature)
            of_label = torch.arange(self.V, device=label.device) == label[:, None]
            inside = facts.divided(inside.masked_fill(of_label, 0.0).sum(1), S.d_s)
        moved = (slopes.qp - slopes.entropy) * q - slopes.pq * p
        level = facts.times(slopes.qp, f.qp + inside)
        level += facts.times(slopes.entropy, f.entropy - inside)
        at_outside = q * (facts.on_rest(slopes, torch.exp(f.log_rest)) - slopes.pq * p - level)
        if factor is not None:
            upstream = upstream / factor
        upstream = upstream * self.inv_temperature
        live = (W.shift != facts.INF) & ~W.w0.isnan()
        room = facts.divided(upstream, S.d_s) * torch.exp2(W.shift)
        table[AT_WEIGHT.w0] += torch.where(live, room * moved, 0.0)
        return table, torch.where(live, upstream * at_outside, W.w0 * 0.0)

    def write(
        self,
        student: Rows,
        teacher: Rows,
        label: Tensor,
        parameters: Tensor | None,
        weights: Tensor,
        out: Tensor | None = None,
    ) -> Tensor:
        """The gradient [N, columns of the student]."""
        slopes = self.program.slopes
        if not self.needs & facts.UNTEMPERED:
            slopes &= ~facts.UNTEMPERED
        if self.filter_value is not None:
            slopes |= facts.TEACHER
        return self.launchers.row_grad(
            student, teacher, label, self.inv_temperature, weights, self.V, slopes=slopes,
            phis=self.program.phis, parameters=parameters, filter_value=self.filter_value, out=out,
        )  # fmt: skip


def of(launchers, objective: Objective, inv_temperature: Tensor, V: int) -> Loss:
    """At temperature 1 or without a term that is always there."""
    needs = objective.needs & ~facts.UNTEMPERED
    return Loss(launchers, program(objective.key), needs, inv_temperature, None, V)
