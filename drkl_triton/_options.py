"""The keyword options of the losses: their names and defaults, checked once and passed whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch import Tensor

from . import _checks, _reduction, _shard, facts, ops

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ._objective import Objective
    from .sparse import SparseTeacher


class Options(NamedTuple):
    """Of every loss; :func:`drkl_triton.reverse_kl` says what they mean."""

    weight: Tensor | None = None
    temperature: float | Tensor = 1.0
    ignore_index: int = -100
    reduction: str = "mean"
    num_items: float | Tensor | None = None
    shift: bool = False
    vocab_mismatch: str = "error"
    support: str = "full"
    filter_value: float = float("-inf")
    backend: str = "auto"
    group: ProcessGroup | None = None
    vocab_start: int | None = None
    return_metrics: bool = False

    def check(self) -> None:
        """All that can be said of them without the logits."""
        _checks.one_of("vocab_mismatch", self.vocab_mismatch, ("error", "truncate"))
        _checks.one_of("reduction", self.reduction, _checks.REDUCTIONS)
        _checks.one_of("support", self.support, ("full", "teacher"))
        _checks.mask_value(self.filter_value, self.support)
        _checks.one_of("backend", self.backend, _checks.BACKENDS)
        _checks.integer("ignore_index", self.ignore_index, "-100")
        _checks.flag("shift", self.shift)
        _checks.flag("return_metrics", self.return_metrics)
        _checks.positive("temperature", self.temperature)
        _checks.denominator(self.num_items, self.reduction)
        _checks.group(self.group, self.vocab_start)

    def agreed(self, function, objective, like, width, labels, teacher) -> _shard.Shard:
        """This rank's columns, once the ranks of the group have found that they call the same.
        like: of the rows; teacher: what its columns are given as.
        """
        said = {"function": function, "rows": [*like.shape[:-1]], "dtype": str(like.dtype)}
        said |= {
            "objective": objective.key,
            "parameters": [
                "a tensor" if isinstance(x, Tensor) else x for x in objective.parameters
            ],
        }
        said |= {"teacher": teacher, "labels": labels is not None, **self.said()}
        return _shard.agree(self.group, said, width, self.vocab_start)

    def said(self) -> dict:
        """What the ranks of a group must say alike, by name: tensors, and num_items, which changes
        with every step, only whether they are there.
        """
        own = {name: x for name, x in self._asdict().items() if name not in ("group", "backend")}
        own |= {name: own[name] is not None for name in ("weight", "num_items", "vocab_start")}
        return {name: "a tensor" if isinstance(x, Tensor) else x for name, x in own.items()}


class LinearOptions(NamedTuple):
    """Of the losses from hidden states; :func:`drkl_triton.linear_reverse_kl` says what they
    mean.
    """

    student_bias: Tensor | None = None
    student_scale: float = 1.0
    student_softcap: float | None = None
    teacher_hidden: Tensor | None = None
    teacher_weight: Tensor | None = None
    teacher_bias: Tensor | None = None
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None
    teacher_logits: Tensor | SparseTeacher | None = None
    chunk_bytes: int | None = None
    recompute: bool = False

    def check(self) -> None:
        """All that can be said of them without the tensors."""
        _checks.head_numbers("student", self.student_scale, self.student_softcap)
        _checks.head_numbers("teacher", self.teacher_scale, self.teacher_softcap)
        _checks.linear_options(chunk_bytes=self.chunk_bytes, recompute=self.recompute)

    def agreed(self, function, objective, hidden, matrix, labels, options) -> _shard.Shard:
        """As Options.agreed."""
        given = {
            name: "none" if x is None else type(x).__name__ if hasattr(x, "dtype") else x
            for name, x in self._asdict().items()
            if name != "teacher_logits"
        }
        kind = "none" if self.teacher_logits is None else type(self.teacher_logits).__name__
        given |= {"teacher_logits": kind, "H": hidden.shape[-1]}
        kind = ", ".join(f"{name} {x}" for name, x in given.items())
        return options.agreed(function, objective, hidden, matrix.shape[0], labels, kind)


def taken(function: str, given: dict, *kinds) -> list:
    """Those of ``given`` that each kind of options has, checked; nothing may be left over."""
    found = [
        kind(**{name: given.pop(name) for name in kind._fields if name in given}) for kind in kinds
    ]
    _checks.known_options(function, given)
    for options in found:
        options.check()
    return found


class Rows(NamedTuple):
    """What the options make of the rows, as tensors: the first inputs of the ops after the logits,
    and what depends on no tensor's contents.
    """

    codes: Tensor  # [...], facts.NO_LABEL and the like
    inv_temperature: Tensor
    parameters: Tensor | None
    filter_value: Tensor | None
    weights: Tensor | None  # [...]
    needs: int


def rows(
    objective: Objective,
    like: Tensor,
    V: int,
    labels: Tensor | None,
    options: Options,
    teacher: bool,
    acc: torch.dtype,
    backend: str,
    sparse: SparseTeacher | None = None,
) -> Rows:
    """like: of the leading shape and device of the logits; teacher: whether there is one."""
    weight = None if options.weight is None else options.weight.detach()
    codes = ops.row_labels(
        like.detach(), labels, weight, options.ignore_index, V, options.shift, objective.labels,
        backend,
    )  # fmt: skip
    if sparse is not None and objective.needs_teacher:
        codes = torch.where(sparse.known(codes), codes, facts.IGNORED)
    needs = objective.needs
    if needs & facts.UNTEMPERED:
        temperature = options.temperature
        if not isinstance(temperature, Tensor) and temperature == 1:
            needs &= ~facts.UNTEMPERED
    if options.return_metrics:
        needs |= facts.METRICS if teacher else facts.ENTROPY
    device = like.device
    return Rows(
        codes,
        _reduction.inverse(options.temperature, device, acc),
        _reduction.parameters(objective.parameters, codes, options.shift, acc),
        _reduction.scalar(options.filter_value, acc, device)
        if options.support == "teacher" and teacher
        else None,
        _reduction.weights(codes, weight, options.shift, acc),
        needs,
    )


# For type checkers: the same names once more. tests/test_contract_errors.py holds them together.


class Keywords(TypedDict, total=False):
    weight: Tensor | None
    temperature: float | Tensor
    ignore_index: int
    reduction: str
    num_items: float | Tensor | None
    shift: bool
    vocab_mismatch: str
    support: str
    filter_value: float
    backend: str
    group: ProcessGroup | None
    vocab_start: int | None


class LinearKeywords(Keywords, total=False):
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_logits: Tensor | SparseTeacher | None
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    student_softcap: float | None
    teacher_softcap: float | None
    student_scale: float
    teacher_scale: float
    chunk_bytes: int | None
    recompute: bool


class OwnParameters(TypedDict, total=False):
    gamma: float | Tensor
    skew: float | Tensor
    detach_mixture: bool
    forward: float | Tensor
    alpha: float | Tensor
    beta: float | Tensor
    head: float


class Parameters(Keywords, OwnParameters, total=False):
    pass


class LinearParameters(LinearKeywords, OwnParameters, total=False):
    pass
