"""What an objective is, and how divergences are registered (objectives.py has the divergences).

A custom op takes strings and tensors, not objects. So an Objective is a *key*, which says which
divergences it has and which of them are weighted, and a list of parameters; :func:`program` finds
the functions of a key.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor

from . import _checks, facts
from .facts import Facts, Slopes

if TYPE_CHECKING:
    from collections.abc import Callable

    Parameter = float | Tensor

_FORMULAS: dict[str, Formula] = {}
SKEW = "skewed teacher: "  # what the key of such an objective begins with

# The sums behind a Fact and behind a slope.
_NEEDS = {
    "v": facts.TEACHER,
    "log_p": facts.TEACHER,
    "log_p_rest": facts.TEACHER,
    "qp": facts.TEACHER | facts.REVERSE,
    "pq": facts.TEACHER | facts.FORWARD,
    "entropy": facts.ENTROPY,
    "teacher_entropy": facts.TEACHER | facts.TEACHER_ENTROPY,
    "label_log_prob": facts.UNTEMPERED,
    "log_z": facts.UNTEMPERED,
    "gap_head": facts.TEACHER | facts.GAPS,
    "gap_tail": facts.TEACHER | facts.GAPS,
}


class Formula:
    """A divergence: called with its parameters it makes an :class:`Objective`, called with Facts
    (or, where it is pointwise, with log-probabilities) what the function below it returns.
    """

    def __init__(
        self, function: Callable, is_pointwise: bool, labels: bool, ranges: dict[str, str]
    ):
        self.function, self.is_pointwise, self.labels = function, is_pointwise, labels
        self.ranges = ranges
        ours = function.__module__ == f"{__package__}.objectives"
        self.key = function.__name__ if ours else f"{function.__module__}.{function.__qualname__}"
        parameters = list(inspect.signature(function).parameters.values())[1 + is_pointwise :]
        self.parameters = tuple(p.name for p in parameters)
        self.defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        if unknown := ranges.keys() - set(self.parameters):
            raise ValueError(
                f"{self.key} has no parameters {sorted(unknown)}; it has {list(self.parameters)}"
            )
        self.__doc__, self.__name__ = function.__doc__, function.__name__
        self.__module__, self.__qualname__ = function.__module__, function.__qualname__
        self.__signature__ = inspect.Signature(parameters)
        self.needs, self.slopes = (facts.TEACHER,) * 2 if is_pointwise else self._trace()
        _FORMULAS[self.key] = self
        program.cache_clear()

    @overload
    def __call__(self, facts: Facts, /, *parameters: Any) -> Slopes: ...
    @overload
    def __call__(self, *parameters: Parameter, **named: Parameter) -> Objective: ...
    def __call__(self, *args: Any, **named: Any) -> Slopes | tuple[Tensor, Tensor] | Objective:
        too_many = len(args) > len(self.parameters)
        # a tuple: the Dynamo of torch 2.8 does not know unions
        if args and isinstance(args[0], (Facts, _Reader)) or self.is_pointwise and too_many:
            return self.function(*args, **named)
        if too_many:
            raise TypeError(
                f"{self.__name__} takes the parameters {list(self.parameters)}, got {len(args)} "
                "arguments"
            )
        given = dict(zip(self.parameters[: len(args)], args, strict=True))
        for name in named:
            if name not in self.parameters or name in given:
                raise TypeError(
                    f"{self.__name__} takes the parameters {list(self.parameters)}, each once, "
                    f"got {name}"
                )
        given = {**self.defaults, **given, **named}
        values = []
        for name in self.parameters:
            if name not in given:
                raise TypeError(f"{self.__name__} needs the parameter {name}; pass {name}=...")
            _checks.parameter(name, given[name], self.ranges.get(name, "real"))
            values.append(given[name])
        return Objective(((self, tuple(values), None),))

    def __reduce__(self):
        return _find, (self.key,)

    def __repr__(self) -> str:
        return f"<divergence {self.key}>"

    def _trace(self) -> tuple[int, int]:
        """(the sums that it reads, those that its gradient does), from calling it once."""
        reader = _Reader()
        numbers = [torch.full((1,), 0.5, dtype=torch.float64) for _ in self.parameters]
        out = self.function(reader, *numbers)
        if not isinstance(out, Slopes):
            raise TypeError(f"{self.key} must return Slopes, got {type(out).__name__}")
        moved = [
            name
            for name, slope in zip(Slopes._fields, out, strict=True)
            if isinstance(slope, Tensor) or slope != 0
        ]
        slopes = _bits(moved)
        return _bits(reader.read) | slopes, slopes


class _Reader:
    """Facts that note which of them are read."""

    def __init__(self):
        self.read = set()

    def __getattr__(self, name: str) -> Tensor:
        if name not in Facts._fields:
            raise AttributeError(f"Facts have {', '.join(Facts._fields)}, not {name}")
        self.read.add(name)
        return torch.full((1,), -0.7, dtype=torch.float64)


def _bits(names) -> int:
    bits = 0
    for name in names:
        bits |= _NEEDS.get(name, 0)
    return bits


def _find(key: str) -> Formula:
    if key not in _FORMULAS:
        raise ValueError(
            f"no divergence is registered as {key!r}; import the module that defines it with "
            "@separable or @pointwise, in this process, too"
        )
    return _FORMULAS[key]


def _decorator(is_pointwise, function, labels, positive, fraction):
    ranges = dict.fromkeys(positive, "positive") | dict.fromkeys(fraction, "fraction")
    if function is None:
        return partial(Formula, is_pointwise=is_pointwise, labels=labels, ranges=ranges)
    return Formula(function, is_pointwise, labels, ranges)


@overload
def separable(function: Callable[..., Slopes]) -> Formula: ...
@overload
def separable(
    *, labels: bool = False, positive: tuple[str, ...] = (), fraction: tuple[str, ...] = ()
) -> Callable[[Callable[..., Slopes]], Formula]: ...
def separable(
    function: Callable | None = None,
    *,
    labels: bool = False,
    positive: tuple[str, ...] = (),
    fraction: tuple[str, ...] = (),
) -> Formula | Callable[..., Formula]:
    """Make a divergence of ``function(facts, *parameters) -> Slopes``.

    Args:
        function: module-level, in the language that objectives.py describes. Its parameters are
            what callers may set, [N] or [1] inside of it, and may have defaults. It may call other
            divergences with ``facts``.
        labels: every row needs a label; those without one are an error or NaN.
        positive, fraction: names of parameters that must be above 0, and between 0 and 1.

    Which sums it needs is found by calling it once, so it may not choose what it reads.
    """
    return _decorator(False, function, labels, positive, fraction)


@overload
def pointwise(function: Callable[..., tuple[Tensor, Tensor]]) -> Formula: ...
@overload
def pointwise(
    *, labels: bool = False, positive: tuple[str, ...] = (), fraction: tuple[str, ...] = ()
) -> Callable[[Callable[..., tuple[Tensor, Tensor]]], Formula]: ...
def pointwise(
    function: Callable | None = None,
    *,
    labels: bool = False,
    positive: tuple[str, ...] = (),
    fraction: tuple[str, ...] = (),
) -> Formula | Callable[..., Formula]:
    """Make a divergence of ``function(log_q, log_p, *parameters) -> (phi, dphi/dlog_q)``, summed
    over the columns.

    A probability of 0 has the logarithm -1e30, so that 0 times it is 0. Both results must be 0
    where both probabilities are, and the derivative where q is. The arguments are as in
    :func:`separable`.
    """
    return _decorator(True, function, labels, positive, fraction)


class Objective:
    """A weighted sum of divergences; made by the functions of ``drkl_triton.objectives``, by adding
    such objects and by multiplying them with numbers (or tensors, which may change without
    recompilation and have no gradient).
    """

    def __init__(self, terms: tuple, skew: Parameter | None = None):
        self.terms = terms  # (formula, its parameters, its weight or None)
        self.skew = skew  # of objectives.skewed_teacher

    def __add__(self, other: Objective) -> Objective:
        if not isinstance(other, Objective):
            return NotImplemented
        skews = [o.skew for o in (self, other) if o.needs_teacher]
        if len(skews) == 2 and skews[0] is not skews[1] and skews[0] != skews[1]:
            raise ValueError(
                f"terms of one objective have one teacher, got skews {skews[0]} and {skews[1]}; "
                "add the terms first, and call skewed_teacher on their sum"
            )
        return Objective(self.terms + other.terms, skews[0] if skews else None)

    def __radd__(self, other: Any) -> Objective:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # sum()

    def __sub__(self, other: Objective) -> Objective:
        return self + -1.0 * other

    def __neg__(self) -> Objective:
        return -1.0 * self

    def __mul__(self, weight: Parameter) -> Objective:
        if isinstance(weight, Objective):
            return NotImplemented
        _checks.parameter("an objective's weight", weight, "real")
        weighted = ((f, p, weight if w is None else w * weight) for f, p, w in self.terms)
        return Objective(tuple(weighted), self.skew)

    __rmul__ = __mul__

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """tensor * objective, which a tensor would try by itself."""
        if function in (Tensor.mul, Tensor.__mul__, torch.mul) and len(args) == 2:
            return args[1].__mul__(args[0])  # spelt so for Dynamo
        return NotImplemented

    def __truediv__(self, divisor: Parameter) -> Objective:
        return self * (1 / divisor)

    def __repr__(self) -> str:
        def term(formula, parameters, weight):
            given = zip(formula.parameters, parameters, strict=True)
            call = f"{formula.__name__}({', '.join(f'{k}={v!r}' for k, v in given)})"
            return call if weight is None else f"{weight!r} * {call}"

        total = " + ".join(term(*t) for t in self.terms)
        return total if self.skew is None else f"skewed_teacher({total}, {self.skew!r})"

    @property
    def labels(self) -> bool:
        """Whether every row needs a label."""
        return any(f.labels for f, _, _ in self.terms)

    @property
    def labels_compared(self) -> bool:
        """Whether the teacher's log-probability of every label is needed."""
        return any(f.labels and f.needs & facts.TEACHER for f, _, _ in self.terms)

    @property
    def needs(self) -> int:
        """The sums that its terms read, bits of facts.py."""
        bits = 0 if self.skew is None else facts.SKEWED
        for formula, _, _ in self.terms:
            bits |= formula.needs
        return bits

    @property
    def needs_teacher(self) -> bool:
        return bool(self.needs & facts.TEACHER)

    def _ordered(self) -> list:
        first = [t for t in self.terms if not t[0].is_pointwise]
        return first + [t for t in self.terms if t[0].is_pointwise]

    @property
    def key(self) -> str:
        terms = "+".join(("" if w is None else "*") + f.key for f, _, w in self._ordered())
        return terms if self.skew is None else SKEW + terms

    @property
    def parameters(self) -> list:
        """The skew, then those of all terms in the order of the key, a term's weight first."""
        numbers = [] if self.skew is None else [self.skew]
        for _, parameters, weight in self._ordered():
            numbers += [*parameters] if weight is None else [weight, *parameters]
        return numbers


@dataclass(frozen=True)
class Program:
    """What a key stands for: see facts.objective for the two tuples."""

    terms: tuple
    phis: tuple
    slopes: int  # the sums that its gradient reads
    head: int = -1  # where the head's mass is among the parameters, with facts.GAPS
    skewed: bool = False  # the skew is the first parameter


@lru_cache(maxsize=1024)
def program(key: str, side: str = "") -> Program:
    """side: "compared", of the terms that compare with a teacher alone, or "alone", of the others;
    the parameters are those of the whole.
    """
    skewed = key.startswith(SKEW)
    terms, phis, slopes, place, head = [], [], skewed * facts.SKEWED, int(skewed), -1
    for part in key.removeprefix(SKEW).split("+"):
        formula, weighted = _find(part.lstrip("*")), part.startswith("*")
        count = len(formula.parameters)
        weight = place if weighted else -1
        term = (formula.function, weight, place + weighted, count, formula.needs)
        wanted = "compared" if formula.needs & facts.TEACHER else "alone"
        if side in ("", wanted):
            (phis if formula.is_pointwise else terms).append(term)
            slopes |= formula.slopes
        if formula.needs & facts.GAPS and side != "alone":
            if head >= 0:
                raise ValueError("an objective can have one adaptive_kl; add up their weights")
            head = place + weighted
        place += weighted + count
    if phis and not terms:
        slopes |= facts.PHI_ALONE
    if side == "alone":
        slopes, skewed = slopes & ~(facts.SKEWED | facts.PHI_ALONE), False
    return Program(tuple(terms), tuple(phis), slopes, head, skewed)


def check(objective: Objective, rows: int = 64, tolerance: float = 1e-8) -> None:
    """That the slopes of every term are its derivatives: those of float64 autograd, at random
    Facts.

    Raises:
        ValueError: naming the term and the slope that is not.
    """
    if not isinstance(objective, Objective):
        raise TypeError(f"check takes an Objective, got {type(objective).__name__}; call it first")
    generator = torch.Generator().manual_seed(0)

    def numbers(count):
        return [torch.randn(rows, generator=generator, dtype=torch.float64) for _ in range(count)]

    for formula, parameters, _ in objective.terms:
        parameters = [torch.as_tensor(x).double() for x in parameters]
        with torch.enable_grad():
            if formula.is_pointwise:
                _check_pointwise(formula, parameters, numbers(2), tolerance)
            else:
                _check_separable(formula, parameters, numbers(8), tolerance)


def _check_pointwise(formula, parameters, numbers, tolerance):
    log_q, log_p = (-x.abs() for x in numbers)
    log_q.requires_grad_()
    value, slope = formula.function(log_q, log_p, *parameters)
    (truth,) = torch.autograd.grad(value.sum(), log_q)
    _compare(formula, "log_q", slope, truth, tolerance)
    nothing = torch.full((1,), facts.ABSENT, dtype=torch.float64)
    value, slope = formula.function(nothing, nothing, *parameters)
    for name, x in (("phi", value), ("its slope", slope)):
        if not (x == 0).all():
            raise ValueError(
                f"{formula.key}: {name} must be 0 where both probabilities are 0 (their logarithms "
                f"-1e30), got {x.tolist()}"
            )


def _check_separable(formula, parameters, numbers, tolerance):
    u, v, *rest = numbers
    qp, pq, entropy, entropy_t, label, log_z = (x.abs() for x in rest)
    f = Facts(
        u, v, facts.log_sigmoid(u), facts.log_sigmoid(-u), facts.log_sigmoid(v),
        facts.log_sigmoid(-v), qp, pq, entropy, entropy_t, -label, log_z, entropy, entropy_t,
    )  # fmt: skip
    moved = ("u", "qp", "pq", "entropy", "label_log_prob", "log_z")
    leaves = {name: getattr(f, name).detach().requires_grad_() for name in moved}
    u = leaves["u"]
    f = f._replace(**leaves, log_q=facts.log_sigmoid(u), log_rest=facts.log_sigmoid(-u))
    S = formula.function(f, *parameters)
    loss = S.loss + 0.0 * sum(leaves.values())
    truth = torch.autograd.grad(loss.sum(), tuple(leaves.values()))
    q = torch.sigmoid(u)
    found = S._asdict() | {"u": S.u + S.log_q * (1 - q) - S.log_rest * q}
    for name, expected in zip(moved, truth, strict=True):
        _compare(formula, name, found[name], expected, tolerance)


def _compare(formula, name, slope, truth, tolerance):
    error = (slope - truth).abs() / (1 + truth.abs())
    worst = error.argmax()
    if not error[worst] <= tolerance:
        found = (slope + 0 * truth)[worst]
        raise ValueError(
            f"{formula.key}: the slope by {name} is {found.item():.6g} where the derivative is "
            f"{truth[worst].item():.6g}"
        )
