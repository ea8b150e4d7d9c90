"""An objective's launches: which sums, which sweeps, which weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import facts, objectives
from ._objective import Objective, Program, program
from .algebra import AT

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
        f, _ = facts.facts(facts.Sums(*sums), label, self.inv_temperature, self.needs)

        def swept(formula, *thresholds):
            """Over all columns: the sweep leaves out the label's."""
            phis = ((formula.function, -1, 0, len(thresholds), 0),)
            rows = student, teacher, label, self.inv_temperature, torch.stack(thresholds)
            self.launchers.row_phi(*rows, sums, self.V, phis=phis, filter_value=self.filter_value)
            label_logs = facts.floored(f.log_q), facts.floored(f.log_p)
            at_label = facts.pointwise(*label_logs, thresholds, phis)
            return sums[AT.phi] + at_label[0], sums[AT.phi_slope] + at_label[1]

        low = torch.log((1 - head) / self.V)
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

    def _skewed_sums(self, rows: tuple, skew: Tensor, options: dict) -> Tensor:
        """Both models' sums make the teacher, whose are found by a second scan."""
        _, _, label, inv_temperature = rows
        sums = self.launchers.row_sums(*rows, self.V, needs=facts.TEACHER, **options)
        mixture, at_label = facts.mixture(facts.Sums(*sums), label, inv_temperature, skew)
        options = dict(needs=self.sums_needed, mixture=torch.stack(mixture), **options)
        sums = self.launchers.row_sums(*rows, self.V, **options)
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
        sums = self.launchers.row_sums(*rows, self.V, needs=self.sums_needed, **options)
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
