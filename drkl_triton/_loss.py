"""An objective's launches: which sums, which sweeps, which weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from . import facts
from ._objective import Objective, Program, program

if TYPE_CHECKING:
    from ._layout import Rows


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
        """[splits, 14, N]; [1, 14, N] where a second sweep needs them whole."""
        launchers, rows = self.launchers, (student, teacher, label, self.inv_temperature)
        options = dict(filter_value=self.filter_value)
        if not self.program.phis:
            return launchers.row_sum_parts(*rows, self.V, needs=self.sums_needed, **options)
        sums = launchers.row_sums(*rows, self.V, needs=self.sums_needed, **options)
        launchers.row_phi(*rows, parameters, sums, self.V, phis=self.program.phis, **options)
        return sums[None]

    def sums(
        self, student: Rows, teacher: Rows, label: Tensor, parameters: Tensor | None
    ) -> Tensor:
        """[14, N]."""
        if self.program.phis:
            return self.sum_parts(student, teacher, label, parameters)[0]
        rows = student, teacher, label, self.inv_temperature, self.V
        return self.launchers.row_sums(
            *rows, needs=self.sums_needed, filter_value=self.filter_value
        )

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
