"""The public functions of logits. Shapes, dtypes, errors and formulas are in their docstrings;
semantics in docs/semantics.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

import torch
from torch import Tensor

from . import _checks, _options, _reduction, _shard, objectives
from ._named import named
from ._options import Options
from .algebra import RowMetrics
from .graph import Call, DivergenceFunction, SoftmaxFunction
from .sparse import SparseTeacher

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._objective import Objective, Parameter
    from ._options import Keywords, Parameters

__all__ = [
    "adaptive_kl",
    "alpha_beta",
    "cross_entropy",
    "divergence",
    "dkd",
    "drkl",
    "forward_kl",
    "js_divergence",
    "log_softmax",
    "mixed_kl",
    "reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "softmax",
    "total_variation",
]


def softmax(logits: Tensor, *, temperature: float | Tensor = 1.0, backend: str = "auto") -> Tensor:
    """``exp(x / temperature)`` normalised over the last dimension, as one scan and one pass that
    writes.

    Args:
        logits: ``[..., V]``, float16, bfloat16, float32 or float64. Leading strides that reduce to
            two are read in place; a strided last dimension, or more leading strides, are copied.
        temperature: positive number, or 0-dim tensor (not validated, no gradient).
        backend: ``"auto"`` (Triton on a GPU, tiled PyTorch elsewhere), ``"triton"`` or ``"tiled"``.

    Returns:
        ``[..., V]``, contiguous, in the dtype of ``logits``; computed in float32 (float64 for
        float64). Columns at -inf get 0; a row that is -inf everywhere, or holds NaN or +inf, is
        NaN.

    Raises:
        TypeError: not a tensor, or a dtype, layout or subclass that is not supported.
        ValueError: no columns, ``temperature`` not positive, ``backend`` unknown or not available
            here.

    The backward pass recomputes the probabilities from ``logits``; nothing of size V is kept.
    Second derivatives raise.
    """
    return _softmax(logits, temperature, backend, log=False)


def log_softmax(
    logits: Tensor, *, temperature: float | Tensor = 1.0, backend: str = "auto"
) -> Tensor:
    """Logarithm of :func:`softmax`: ``x / temperature - logsumexp(x / temperature)`` over the last
    dimension.

    Arguments, errors and memory as in :func:`softmax`. Columns at -inf get -inf, and their upstream
    gradient is passed on unchanged (over the temperature), as in ``torch.log_softmax``.
    """
    return _softmax(logits, temperature, backend, log=True)


def _softmax(logits: Tensor, temperature: float | Tensor, backend: str, log: bool) -> Tensor:
    _checks.logits("logits", logits)
    _checks.positive("temperature", temperature)
    _checks.one_of("backend", backend, _checks.BACKENDS)
    backend = _checks.backend(backend, logits)
    acc = torch.promote_types(logits.dtype, torch.float32)
    inv_temperature = _reduction.inverse(temperature, logits.device, acc)
    return SoftmaxFunction.apply(logits, inv_temperature, log, backend)


class LossFunction(Protocol):
    """A loss of logits, called with :class:`Options` and its own parameters."""

    __name__: str

    @overload
    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | SparseTeacher,
        labels: Tensor | None = None,
        *,
        return_metrics: Literal[False] = False,
        **options: Unpack[Parameters],
    ) -> Tensor: ...
    @overload
    def __call__(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | SparseTeacher,
        labels: Tensor | None = None,
        *,
        return_metrics: Literal[True],
        **options: Unpack[Parameters],
    ) -> tuple[Tensor, RowMetrics]: ...


@overload
def divergence(
    objective: Objective,
    student_logits: Tensor,
    teacher_logits: Tensor | SparseTeacher | None = None,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[Keywords],
) -> Tensor: ...
@overload
def divergence(
    objective: Objective,
    student_logits: Tensor,
    teacher_logits: Tensor | SparseTeacher | None = None,
    labels: Tensor | None = None,
    *,
    return_metrics: Literal[True],
    **options: Unpack[Keywords],
) -> tuple[Tensor, RowMetrics]: ...
def divergence(
    objective: Objective,
    student_logits: Tensor,
    teacher_logits: Tensor | SparseTeacher | None = None,
    labels: Tensor | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, RowMetrics]:
    """Any sum of divergences, out of one scan of the logits and one gradient:
    ``divergence(0.9 * objectives.drkl() + 0.1 * objectives.cross_entropy(), student_logits,
    teacher_logits, labels)``.

    Args:
        objective: made by the functions of :mod:`drkl_triton.objectives`. Parameters and weights
            that are tensors, 0-dim or one per token, may change without recompilation; they have no
            gradient.
        teacher_logits: None where no term compares with a teacher.
        labels: required where a term needs them (DRKL, DKD, cross-entropy).

    The other arguments, the result and the errors are those of :func:`reverse_kl`. A row is +inf,
    with gradient 0, where any of its terms is, whatever that term's weight. ``temperature`` divides
    the logits of all terms but cross-entropy and the z-loss, which are at temperature 1: at another
    they cost one more exponential.
    """
    return _loss("divergence", objective, student_logits, teacher_logits, labels, options)


def _loss(name, objective, student, teacher, labels, options: dict):
    if hasattr(student, "device_mesh"):
        given = "student_logits", student, -1, options.get("group")
        student, options["group"] = _shard.of_dtensor(*given)
    if options.get("group") is None:
        return _checked(name, objective, student, teacher, labels, options)
    _checks.group(options["group"], options.get("vocab_start"))
    with _shard.together(options["group"]):
        teacher = _shard.teacher_logits(teacher, options["group"])
        return _checked(name, objective, student, teacher, labels, options)


def _checked(name, objective, student, teacher, labels, options: dict):
    (options,) = _options.taken(name, options, Options)
    _checks.objective(objective)
    if objective.needs_teacher and teacher is None:
        _checks.logits("teacher_logits", teacher)
    sparse = isinstance(teacher, SparseTeacher)
    shard = None
    if options.group is not None:
        _checks.logits("student_logits", student, sharded=True)
        kind = "none" if teacher is None else type(teacher).__name__
        shard = options.agreed(name, objective, student, student.shape[-1], labels, kind)
        if not sparse:
            teacher = _shard.part_of(teacher, shard, -1)
    if sparse:
        V = _checks.logits_and_cells(student, teacher, shard)
    else:
        V = _checks.logits_pair(student, teacher, options.vocab_mismatch, shard)
    vocabulary = V if shard is None else shard.vocabulary
    _checks.labels_given(name, objective, labels)
    _checks.rows(labels, options.weight, options.shift, student, "student_logits")
    _checks.parameters(objective, student, "student_logits")
    _checks.teacher_support(options.support, teacher is not None, sparse)
    backend = _checks.backend(options.backend, student)
    metrics, reduction = options.return_metrics, options.reduction
    acc = torch.promote_types(student.dtype, torch.float32)
    if teacher is not None:
        acc = torch.promote_types(acc, teacher.log_probs.dtype if sparse else teacher.dtype)
        if not (objective.needs_teacher or metrics or options.support == "teacher"):
            teacher, sparse = None, False
    has_teacher = teacher is not None
    rows = _options.rows(
        objective, student, vocabulary, labels, options, has_teacher, acc, backend,
        teacher if sparse else None,
    )  # fmt: skip
    tail, cells = "", (teacher, None, None)
    if sparse:
        tail, cells = teacher.tail, teacher.cells(objective, rows, vocabulary, options.temperature)
    teacher, columns, cell_label = cells
    num_items = options.num_items
    if num_items is not None:
        num_items = _reduction.scalar(num_items, acc, student.device)
    label, key = rows.codes, ""
    if shard is not None:
        label, key = shard.labels(label), shard.key
    loss, fields = DivergenceFunction.apply(
        Call(V, objective.key, rows.needs, metrics, reduction, tail, backend, key),
        student,
        teacher,
        label.view(-1),
        rows.inv_temperature,
        rows.parameters,
        rows.filter_value,
        None if rows.weights is None else rows.weights.view(-1),
        num_items,
        columns,
        cell_label,
    )
    if reduction == "none":
        loss = loss.view(rows.codes.shape)
    if not metrics:
        return loss
    return loss, RowMetrics.of(fields, rows.codes, labels is not None, has_teacher)


def _named(builder) -> LossFunction:
    """A public function out of one that makes its objective: its parameters and docstring are those
    of the loss.
    """

    def loss(student_logits, teacher_logits, labels=None, **options):
        objective = builder(**{k: options.pop(k) for k in own if k in options})
        return _loss(name, objective, student_logits, teacher_logits, labels, options)

    own, name = named(loss, builder, Options)
    return loss


@_named
def reverse_kl() -> Objective:
    r"""Reverse Kullback-Leibler divergence ``KL(q || p)`` of the student's ``q`` from the teacher's
    ``p``, per token.

    .. math:: \mathrm{RKL} = \sum_k q_k (\log q_k - \log p_k), \quad q = \mathrm{softmax}(s/\tau),\
    p = \mathrm{softmax}(t/\tau)

    Args:
        student_logits, teacher_logits: ``[..., V]``, float16, bfloat16, float32 or float64, same
            leading shape and device; the dtypes may differ. Leading strides that reduce to two
            (slices and transposes of ``[B, T, V]``, expanded teachers) are read in place; a strided
            last dimension, or more leading strides, are copied. The teacher may be a
            :class:`SparseTeacher`, too, of which K log-probabilities are known.
        labels: ``[...]`` int64 or int32. Rows at ``ignore_index`` are not read: loss, gradient and
            metrics 0. The other labels do not change the loss; they fill the target fields of the
            metrics and let the arithmetic run in log-odds, which keeps its precision where the
            student is sure of the label. A label outside ``[0, V)`` makes that row's target metrics
            NaN.
        weight: ``[...]``, real. Weight of each token, without a gradient; a token of weight 0 is
            ignored.
        temperature: divides both logits. Positive number, or 0-dim tensor (not validated, no
            gradient). There is no hidden factor ``temperature**2``.
        ignore_index: the label of rows to leave out.
        reduction: ``"mean"`` (sum of weight x loss over sum of weights of the rows not ignored),
            ``"sum"`` (of weight x loss) or ``"none"`` (weight x loss, ``[...]``).
        num_items: number or 0-dim tensor that replaces the denominator of ``"mean"``: the tokens of
            the whole batch under gradient accumulation or data parallelism.
        shift: next-token form for ``[B, T, V]``: row t is scored with label and weight t + 1, the
            last row is ignored (also without labels). Nothing is sliced or copied.
        vocab_mismatch: ``"error"``, or ``"truncate"``: columns beyond the smaller vocabulary are
            left out of both distributions and get gradient 0.
        support: ``"full"``, or ``"teacher"``: columns that the teacher's logits leave out are left
            out of both distributions.
        filter_value: with ``support="teacher"``, the largest logit that means left out: what the
            mask was filled with, before the temperature (-1e4, -1e9 or ``torch.finfo(dtype).min``,
            as it is in the teacher's dtype), or anything between it and the real logits.
        backend: ``"auto"`` (Triton on a GPU, tiled PyTorch elsewhere), ``"triton"`` or ``"tiled"``.
        group: a ``torch.distributed.ProcessGroup`` over whose ranks the vocabulary is shared
            (docs/tensor-parallel.md): logits hold this rank's columns (the teacher's may be whole),
            labels and ids are of the whole vocabulary, every rank gets the same loss and the
            gradient of its own columns. Logits that are DTensors bring their group along.
        vocab_start: with ``group``, the first column of this rank; by default its columns follow
            those of the ranks before.
        return_metrics: also return :class:`RowMetrics`, detached, from the same scan.

    Returns:
        The loss in nats, float32 (float64 where either side is float64): a 0-dim tensor, or
        ``[...]`` for ``"none"``. With ``return_metrics`` the pair ``(loss, RowMetrics)``. Without a
        row that counts, or with a denominator of 0, the mean is 0, connected to the graph, with
        zero gradients. The gradient goes to ``student_logits`` alone, in its dtype.

        A row whose teacher is -inf where the student is finite has loss +inf and gradient 0. A row
        with NaN or +inf, or with one side -inf everywhere, is NaN, loss and gradient; other rows
        are not touched.

    Raises:
        TypeError: wrong types, dtypes, layouts; a tensor inside a ``torch.func`` transform.
        ValueError: shapes, devices, vocabularies or options that do not fit; ``teacher_logits``
            that require grad.
        RuntimeError: differentiating the gradient (second derivatives).
    """
    return objectives.reverse_kl()


@_named
def drkl(gamma: Parameter = 0.5, skew: Parameter = 0.0) -> Objective:
    r"""Diversity-aware reverse KL: reverse KL with the weight of its non-target part made constant,
    per token.

    .. math:: \mathrm{DRKL} = \mathrm{KL}(b_q \| b_p) + \gamma\, \mathrm{KL}(\hat q \| \hat p)

    with ``b_q = (q_y, 1 - q_y)`` at the label ``y`` and ``q^`` the distribution over the other
    columns, renormalised. Reverse KL is the same sum with ``1 - q_y`` in place of ``gamma``.
    Source: Luong, Tran, Chen, "Diversity-Aware Reverse Kullback-Leibler Divergence for Large
    Language Model Distillation", arXiv 2604.00223; this is our reading of its Equation 9, and the
    default ``gamma`` is ours.

    Args:
        labels: ``[...]`` int64 or int32, required. A label outside ``[0, V)`` that is not
            ``ignore_index`` (or of weight 0) is a ValueError when the labels are on the CPU; on a
            GPU, where looking would stall the device, the row's loss and gradient are NaN.
        gamma: weight of the non-target part. Positive number, or tensor, 0-dim or ``[...]``, one
            per token (not validated, no gradient); under ``shift`` at the place of the label.
        skew: replaces the teacher by ``(1 - skew) p + skew q``, without a gradient; from 0 to below
            1, or a tensor like gamma. The logits are then read twice in the forward pass, and
            metrics are of that teacher.

    All other arguments, the result and the errors are those of :func:`reverse_kl`. With
    ``support="teacher"`` and a teacher that leaves out the label, the target part is 0. Where the
    student is -inf at the label, the loss is ``-log(1 - p_y) + gamma N``; where it is finite at the
    label only, ``-log p_y``, with gradient 0.
    """
    return objectives.skewed_teacher(objectives.drkl(gamma), skew)


@_named
def forward_kl() -> Objective:
    r"""Forward Kullback-Leibler divergence ``KL(p || q)`` of the teacher's ``p`` from the student's
    ``q``, per token: the loss of classic distillation.

    .. math:: \mathrm{FKL} = \sum_k p_k (\log p_k - \log q_k)

    A row whose student is -inf where the teacher is finite has loss +inf and gradient 0; where the
    teacher is -inf the term is 0. All else is as in :func:`reverse_kl`.
    """
    return objectives.forward_kl()


@_named
def mixed_kl(forward: Parameter = 0.5) -> Objective:
    """``forward * KL(p || q) + (1 - forward) * KL(q || p)``, per token.

    Args:
        forward: number from 0 to 1, or tensor, 0-dim or ``[...]`` (not validated, no gradient).

    A row is +inf, with gradient 0, where either of the two is. All else is as in
    :func:`reverse_kl`.
    """
    return objectives.mixed_kl(forward)


@_named
def dkd(alpha: Parameter = 1.0, beta: Parameter = 8.0) -> Objective:
    r"""Decoupled knowledge distillation, per token: forward KL with free weights on its target and
    non-target parts.

    .. math:: \mathrm{DKD} = \alpha\, \mathrm{KL}(b_p \| b_q) + \beta\, \mathrm{KL}(\hat p \|
        \hat q)

    Source: Zhao et al., "Decoupled Knowledge Distillation", arXiv 2203.08679. ``labels`` are
    required, as in :func:`drkl`; infinities are as in :func:`forward_kl`.

    Args:
        alpha, beta: positive numbers, or tensors, 0-dim or ``[...]`` (not validated, no gradient).
            Forward KL has alpha 1 and beta ``1 - p_y``.
    """
    return objectives.dkd(alpha, beta)


@_named
def js_divergence(beta: Parameter = 0.5) -> Objective:
    r"""Generalised Jensen-Shannon divergence, per token, as in GKD (arXiv 2306.13649) and TRL.

    .. math:: \mathrm{JSD}_\beta = \beta\, \mathrm{KL}(p \| m) + (1 - \beta)\, \mathrm{KL}(q \| m),
        \quad m = \beta p + (1 - \beta) q

    Args:
        beta: 0 to 1. The number 0 gives forward KL and the number 1 reverse KL, as in TRL; the
            formula's own limit at both is 0. A tensor must lie between them.

    It is finite wherever both rows are distributions. All else is as in :func:`reverse_kl`.
    """
    return objectives.js_divergence(beta)


@_named
def skew_kl(alpha: Parameter = 0.1) -> Objective:
    """``KL(p || alpha p + (1 - alpha) q)``, per token (DistiLLM, arXiv 2402.03898); alpha between 0
    and 1. It is finite wherever both rows are distributions. All else is as in :func:`reverse_kl`.
    """
    return objectives.skew_kl(alpha)


@_named
def skew_reverse_kl(alpha: Parameter = 0.1, detach_mixture: bool = False) -> Objective:
    """``KL(q || alpha q + (1 - alpha) p)``, per token (DistiLLM, arXiv 2402.03898); alpha between 0
    and 1. It is finite wherever both rows are distributions. All else is as in :func:`reverse_kl`.

    Args:
        detach_mixture: take the mixture for a constant teacher. Otherwise the gradient goes through
            it as well.
    """
    if detach_mixture:
        return objectives.skewed_teacher(objectives.reverse_kl(), alpha)
    return objectives.skew_reverse_kl(alpha)


@_named
def total_variation() -> Objective:
    """``sum |q - p| / 2``, per token. All else is as in :func:`reverse_kl`."""
    return objectives.total_variation()


@_named
def alpha_beta(alpha: Parameter, beta: Parameter) -> Objective:
    r"""Alpha-beta divergence, per token (ABKD, arXiv 2505.04560).

    .. math:: -\frac{1}{\alpha \beta} \sum_k \Bigl(p_k^\alpha q_k^\beta -
        \frac{\alpha}{\alpha+\beta} p_k^{\alpha+\beta} -
        \frac{\beta}{\alpha+\beta} q_k^{\alpha+\beta}\Bigr)

    Args:
        alpha, beta: numbers, or tensors, 0-dim or ``[...]`` (not validated, no gradient). At 0, and
            where they sum to 0, the divergence is the formula's limit: ``alpha=1, beta=0`` is
            forward KL, ``alpha=0, beta=1`` reverse KL. Tensors must not be there.

    All else is as in :func:`reverse_kl`.
    """
    return objectives.alpha_beta(alpha, beta)


@_named
def adaptive_kl(head: Parameter = 0.5) -> Objective:
    """Adaptive KL, per token: ``w KL(p || q) + (1 - w) KL(q || p)`` with ``w`` the head's part of
    ``sum |p - q|``, without a gradient (AKL, arXiv 2404.02657).

    Args:
        head: the teacher's head is the fewest of its most likely columns that have this mass;
            between 0 and 1, or a tensor, 0-dim or ``[...]`` (not validated, no gradient).

    The head is found without a sort, by 15 sweeps over the teacher's logits and one over both: in
    the forward pass this is the most expensive loss here. A row is +inf, with gradient 0, where
    either divergence is. All else is as in :func:`reverse_kl`.
    """
    return objectives.adaptive_kl(head)


@overload
def cross_entropy(
    student_logits: Tensor,
    labels: Tensor,
    *,
    return_metrics: Literal[False] = False,
    **options: Unpack[Keywords],
) -> Tensor: ...
@overload
def cross_entropy(
    student_logits: Tensor,
    labels: Tensor,
    *,
    return_metrics: Literal[True],
    **options: Unpack[Keywords],
) -> tuple[Tensor, RowMetrics]: ...
def cross_entropy(
    student_logits: Tensor, labels: Tensor, **options: Any
) -> Tensor | tuple[Tensor, RowMetrics]:
    """``-log q_y`` of the label, per token, at temperature 1.

    ``labels`` are required, as in :func:`drkl`. A row whose student is -inf at the label has loss
    +inf and gradient 0. All else is as in :func:`reverse_kl`, where it does not concern a teacher.
    """
    objective = objectives.cross_entropy()
    return _loss("cross_entropy", objective, student_logits, None, labels, options)
