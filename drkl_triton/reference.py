r"""The truth: dense, differentiable PyTorch, one definition that tests, benchmarks and documents
are held against.

It holds several tensors of the size of the logits and is meant to be read, not to be fast.
Arithmetic is in the dtype of the logits (the wider of the two): convert to float64 for a truth, to
float32 for what plain PyTorch makes of it. Everything can be differentiated, twice as well.
Arguments and results are those of the functions of the same names in ``drkl_triton``; nothing is
validated.

Every edge is decided by looking at the logits, never at a probability that may have underflowed:

======================================  ========================  ==============
the row                                 loss                      gradient
======================================  ========================  ==============
reverse: teacher -inf, student finite   +inf                      0
forward: student -inf, teacher finite   +inf                      0
cross-entropy: student -inf at label    +inf                      0
both -inf                               the term is 0             0 there
reverse: the student alone -inf         the term is 0             0 there
DRKL: student -inf at the label         -log(1 - p_y) + gamma N   0 at the label
DRKL: student finite at the label only  -log p_y                  0
one side -inf everywhere; NaN or +inf   NaN                       NaN
======================================  ========================  ==============
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from . import facts, objectives
from .algebra import RowMetrics
from .sparse import SparseTeacher

INF = float("inf")


def softmax(logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """exp(x_k / temperature) / sum_j exp(x_j / temperature), [..., V]."""
    return torch.softmax(_relative(logits, temperature), dim=-1)


def log_softmax(logits: Tensor, *, temperature: float | Tensor = 1.0) -> Tensor:
    """x_k / temperature - log sum_j exp(x_j / temperature), [..., V]."""
    return torch.log_softmax(_relative(logits, temperature), dim=-1)


def _relative(x: Tensor, temperature: float | Tensor) -> Tensor:
    """(x - max x) / temperature: scaling before subtracting would round numbers of the size of the
    maximum.
    """
    top = x.detach().amax(-1, keepdim=True)
    return (x - torch.where(top == -INF, 0.0, top)) / temperature


def split(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    support: str = "full",
    filter_value: float = -INF,
    kept: Tensor | bool = True,
):
    """(target_kl, nontarget_kl, u): KL(b_q || b_p), N = KL(q^ || p^), and the log-odds u of q_y,
    each [...].

    labels [...] in [0, V). For rows whose parts are finite; ``reverse_kl`` and ``drkl`` decide the
    others.
    """
    s, t = _on_support(student, teacher, support, filter_value, teacher.dtype)
    y = labels[..., None]
    rest = torch.arange(s.shape[-1], device=s.device) != y
    u, log_q_rest = _log_odds(s, y, rest, temperature)
    v, log_p_rest = _log_odds(t, y, rest, temperature)
    target = _times(_sigmoid(u), logsigmoid(u) - logsigmoid(v), u != -INF)
    target = target + _times(_sigmoid(-u), logsigmoid(-u) - logsigmoid(-v), u != INF)
    return target, _kl(log_q_rest, log_p_rest, kept), u


def _sigmoid(u: Tensor) -> Tensor:
    """torch.sigmoid differentiates to y (1 - y), which is 0 from u = 37 on in float64; this keeps
    exp(-u).
    """
    return logsigmoid(u).exp()


def _log_odds(
    x: Tensor, y: Tensor, rest: Tensor, temperature: float | Tensor
) -> tuple[Tensor, Tensor]:
    """(x_y - logsumexp of the rest, log-probabilities of the rest among themselves, -inf at the
    label).
    """
    others = torch.where(rest, x, -INF)
    z = _relative(others, temperature)
    # with nothing but the label the log-odds are +inf, a constant
    alone = (z == -INF).all(-1, keepdim=True)
    z = torch.where(alone, 0.0, z)
    top = others.detach().amax(-1, keepdim=True)
    x_y = (x.gather(-1, y) - torch.where(top == -INF, 0.0, top)) / temperature
    u = torch.where(alone, INF, x_y - torch.logsumexp(z, -1, keepdim=True))
    # log_softmax, not z - logsumexp(z): sharing the node would add the two parts' gradients before
    # the large terms cancel
    return u[..., 0], torch.where(alone, -INF, torch.log_softmax(z, -1))


def _kl(log_q: Tensor, log_p: Tensor, kept: Tensor | bool = True) -> Tensor:
    """sum_k q_k (log q_k - log p_k) over the columns where log q_k is not -inf; 0 log 0 = 0."""
    return _times(log_q.exp(), log_q - log_p, (log_q != -INF) & kept).sum(-1)


def _times(weight: Tensor, x: Tensor, present: Tensor) -> Tensor:
    """weight * x where ``present``, else 0; both factors are replaced first, so that no inf or NaN
    enters the gradient.
    """
    return torch.where(
        present, torch.where(present, weight, 0.0) * torch.where(present, x, 0.0), 0.0
    )


def _on_support(
    s: Tensor, t: Tensor, support: str, filter_value: float, written_in: torch.dtype
) -> tuple[Tensor, Tensor]:
    if support != "teacher":
        return s, t
    absent = t <= torch.tensor(filter_value, dtype=written_in)
    return torch.where(absent, -INF, s), torch.where(absent, -INF, t)


class _Rows(NamedTuple):
    """Rows that no edge decides, and flat ones in place of the others."""

    s: Tensor  # [..., V]
    t: Tensor
    y: Tensor  # [...], 0 where there is no label
    has_label: Tensor
    temperature: float | Tensor
    kept: Tensor | bool  # [V], the columns that have terms; the others count in the normalisers

    @property
    def log_q(self) -> Tensor:
        return log_softmax(self.s, temperature=self.temperature)

    @property
    def log_p(self) -> Tensor:
        return log_softmax(self.t, temperature=self.temperature)

    def split(self):
        """(KL(b_q || b_p), KL(q^ || p^), log-odds of q_y)."""
        return split(self.s, self.t, self.y, self.temperature, kept=self.kept)

    def kl(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return _kl(log_q, log_p, self.kept)

    def of_columns(self, phi) -> Tensor:
        """sum phi(log q_k, log p_k), 0 where both are -inf."""
        log_q, log_p = self.log_q, self.log_p
        nothing = ((log_q == -INF) & (log_p == -INF)) | ~torch.as_tensor(self.kept)
        log_q, log_p = (torch.where(nothing, 0.0, x) for x in (log_q, log_p))
        return torch.where(nothing, 0.0, phi(log_q, log_p)).sum(-1)


def _reverse_kl(r: _Rows) -> Tensor:
    target, nontarget, u = r.split()
    split_up = target + _sigmoid(-u) * nontarget
    return torch.where(r.has_label, split_up, r.kl(r.log_q, r.log_p))


def _drkl(r: _Rows, gamma) -> Tensor:
    target, nontarget, _ = r.split()
    return target + gamma * nontarget


def _forward_kl(r: _Rows) -> Tensor:
    whole = r.kl(r.log_p, r.log_q)
    if torch.as_tensor(r.kept).all():
        return whole
    target, nontarget, v = split(r.t, r.s, r.y, r.temperature, kept=r.kept)
    return torch.where(r.has_label, target + _sigmoid(-v) * nontarget, whole)


def _dkd(r: _Rows, alpha, beta) -> Tensor:
    target, nontarget, _ = split(r.t, r.s, r.y, r.temperature, kept=r.kept)
    return alpha * target + beta * nontarget


def _cross_entropy(r: _Rows) -> Tensor:
    return -log_softmax(r.s).gather(-1, r.y[..., None])[..., 0]


def _z_loss(r: _Rows) -> Tensor:
    top = r.s.detach().amax(-1)  # at a height of 700 float64 would lose digits of q
    return (top + torch.logsumexp(r.s - top[..., None], -1)) ** 2


def _entropy(r: _Rows, teacher: bool = False) -> Tensor:
    log_q = r.log_p if teacher else r.log_q
    return -_times(log_q.exp(), log_q, (log_q != -INF) & r.kept).sum(-1)


def _gated_kl(r: _Rows, threshold, forward) -> Tensor:
    gate = torch.where(_entropy(r, teacher=True) > threshold, forward, 0.0)
    return _reverse_kl(r) + gate * _forward_kl(r)


def _adaptive_kl(r: _Rows, head) -> Tensor:
    q, p = r.log_q.detach().exp(), r.log_p.exp()
    ranked, _ = p.sort(-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    last = torch.where(before < _column(torch.as_tensor(head, dtype=p.dtype)), ranked, 1.0)
    in_head = p >= last.amin(-1, keepdim=True)
    gap = (q - p).abs() * r.kept
    total = gap.sum(-1)
    w = torch.where(total == 0, 0.5, (gap * in_head).sum(-1) / torch.where(total == 0, 1.0, total))
    return w * _forward_kl(r) + (1 - w) * _reverse_kl(r)


def _teacher_entropy(r: _Rows) -> Tensor:
    return _entropy(r, teacher=True) + 0.0 * torch.where(r.s.isfinite(), r.s, 0.0).sum(-1)


def _logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """torch.logaddexp has a NaN gradient where both are -inf."""
    nothing = (x == -INF) & (y == -INF)
    x, y = (torch.where(nothing, 0.0, z) for z in (x, y))
    return torch.where(nothing, -INF, torch.logaddexp(x, y))


def _mixed(r: _Rows, of_p, of_q) -> tuple[Tensor, Tensor, Tensor]:
    """(log q, log p, log(of_p p + of_q q))."""
    log_q, log_p = r.log_q, r.log_p
    of_p, of_q = (torch.as_tensor(x, dtype=log_q.dtype).log() for x in (of_p, of_q))
    return log_q, log_p, _logaddexp(log_p + _column(of_p), log_q + _column(of_q))


def _column(x: Tensor) -> Tensor:
    return x[..., None] if x.dim() else x


def _jensen_shannon(r: _Rows, beta) -> Tensor:
    log_q, log_p, log_m = _mixed(r, beta, 1 - beta)
    return beta * r.kl(log_p, log_m) + (1 - beta) * r.kl(log_q, log_m)


def _skew_kl(r: _Rows, alpha) -> Tensor:
    _, log_p, log_m = _mixed(r, alpha, 1 - alpha)
    return r.kl(log_p, log_m)


def _skew_reverse_kl(r: _Rows, alpha) -> Tensor:
    log_q, _, log_m = _mixed(r, 1 - alpha, alpha)
    return r.kl(log_q, log_m)


def _total_variation(r: _Rows) -> Tensor:
    return 0.5 * ((r.log_q.exp() - r.log_p.exp()).abs() * r.kept).sum(-1)


def _alpha_beta(r: _Rows, alpha, beta) -> Tensor:
    a, b = (_column(torch.as_tensor(x, dtype=r.s.dtype)) for x in (alpha, beta))

    def phi(log_q, log_p):
        def of_sum(x):
            return ((a + b) * x).exp()

        mean = (a * of_sum(log_p) + b * of_sum(log_q)) / (a + b)
        return (mean - (a * log_p + b * log_q).exp()) / (a * b)

    return r.of_columns(phi)


def _without_beta(r: _Rows, alpha) -> Tensor:
    a = _column(torch.as_tensor(alpha, dtype=r.s.dtype))

    def term(log_q, log_p):
        p, q = (a * log_p).exp(), (a * log_q).exp()
        return (_times(p, a * (log_p - log_q), log_p != -INF) - p + q) / a**2

    return r.of_columns(term)


def _without_alpha(r: _Rows, beta) -> Tensor:
    b = _column(torch.as_tensor(beta, dtype=r.s.dtype))

    def term(log_q, log_p):
        q, p = (b * log_q).exp(), (b * log_p).exp()
        return (_times(q, b * (log_q - log_p), log_q != -INF) - q + p) / b**2

    return r.of_columns(term)


def _without_sum(r: _Rows, alpha) -> Tensor:
    a = _column(torch.as_tensor(alpha, dtype=r.s.dtype))
    return r.of_columns(lambda lq, lp: (a * (lq - lp) + (a * (lp - lq)).exp() - 1) / a**2)


def _at_zero(r: _Rows) -> Tensor:
    return r.of_columns(lambda lq, lp: 0.5 * (lp - lq) ** 2)


# What makes a row +inf: the teacher or the student -inf where the other is not, or at the label.
TEACHER, STUDENT, LABEL = "teacher", "student", "label"
_ROWS = {
    "reverse_kl": (_reverse_kl, {TEACHER}),
    "drkl": (_drkl, {TEACHER}),
    "forward_kl": (_forward_kl, {STUDENT}),
    "dkd": (_dkd, {STUDENT}),
    "cross_entropy": (_cross_entropy, {LABEL}),
    "z_loss": (_z_loss, set()),
    "entropy": (_entropy, set()),
    "gated_kl": (_gated_kl, {TEACHER, STUDENT}),
    "teacher_entropy": (_teacher_entropy, set()),
    "adaptive_kl": (_adaptive_kl, {TEACHER, STUDENT}),
    "jensen_shannon": (_jensen_shannon, set()),
    "skew_kl": (_skew_kl, set()),
    "skew_reverse_kl": (_skew_reverse_kl, set()),
    "total_variation": (_total_variation, set()),
    "general_alpha_beta": (_alpha_beta, set()),
    "alpha_beta_without_beta": (_without_beta, {STUDENT}),
    "alpha_beta_without_alpha": (_without_alpha, {TEACHER}),
    "alpha_beta_without_sum": (_without_sum, {TEACHER, STUDENT}),
    "alpha_beta_at_zero": (_at_zero, {TEACHER, STUDENT}),
}


def divergence(
    objective: objectives.Objective,
    student_logits: Tensor,
    teacher_logits: Tensor | SparseTeacher | None = None,
    labels: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    shift: bool = False,
    vocab_mismatch: str = "error",
    support: str = "full",
    filter_value: float = -INF,
    return_metrics: bool = False,
    dropped: bool = False,
):
    """The sum of the objective's terms. Those written outside of this package have their own
    values, and derivatives by autograd. dropped: the last column counts in the normalisers alone.
    """
    if isinstance(teacher_logits, SparseTeacher):
        return _of_sparse(
            objective, student_logits, teacher_logits, labels, weight=weight, shift=shift,
            temperature=temperature, ignore_index=ignore_index, reduction=reduction,
            num_items=num_items, return_metrics=return_metrics,
        )  # fmt: skip
    student, has_teacher = student_logits, teacher_logits is not None
    teacher = teacher_logits.detach() if has_teacher else student.detach()
    V = min(student.shape[-1], teacher.shape[-1])
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    s, t = student[..., :V].to(dtype), teacher[..., :V].to(dtype)
    s, t = _on_support(s, t, support, filter_value, teacher.dtype)
    compared = objective.needs_teacher or return_metrics
    if not compared:
        t = s.detach()
    if weight is None:
        weight = torch.ones(s.shape[:-1], dtype=dtype, device=s.device)
    y = torch.full(s.shape[:-1], -1, device=s.device) if labels is None else labels.long()
    ignored = weight == 0
    if labels is not None:
        ignored = ignored | (y == ignore_index)
    if shift:
        y, ignored, weight = (torch.roll(x, -1, dims=-1) for x in (y, ignored, weight))
        ignored = ignored | (torch.arange(s.shape[-2], device=s.device) == s.shape[-2] - 1)
    has_label = (y >= 0) & (y < V) & ~ignored
    if objective.labels and not (has_label | ignored).all():
        raise ValueError("labels outside the vocabulary")

    # the edges, by the logits alone
    is_nan = (_is_bad(s) | _is_bad(t)) & ~ignored
    if objective.skew is not None:
        t = _skewed_teacher(s, t, _own(objective.skew, s, shift), temperature)
    here = torch.where(has_label, y, 0)
    kept = torch.arange(V, device=s.device) < V - dropped
    missing = (t == -INF) & (s != -INF) & kept
    reasons = {
        TEACHER: missing.any(-1),
        STUDENT: ((s == -INF) & (t != -INF) & kept).any(-1),
        LABEL: has_label & (s.gather(-1, here[..., None])[..., 0] == -INF),
    }
    is_inf = torch.zeros_like(is_nan)
    for formula, _, _ in objective.terms:
        for reason in _ROWS.get(formula.key, (None, _reasons(formula)))[1]:
            is_inf = is_inf | reasons[reason]
    is_inf = is_inf & ~is_nan
    special = ignored | is_nan | is_inf
    # rows decided by an edge go through the formulas as flat rows, so that no NaN reaches a
    # gradient
    s_row, t_row = (torch.where(special[..., None], 0.0, x) for x in (s, t))
    loss = _terms(objective, _Rows(s_row, t_row, here, has_label, temperature, kept), shift)
    loss = torch.where(is_nan, 0.0, torch.where(is_inf, INF, loss))
    # a NaN row's gradient is NaN in every column; the other rows meet a product of zeros
    poison = torch.where(is_nan, float("nan"), 0.0)[..., None].to(dtype)
    loss = loss + (torch.where(is_nan[..., None], student[..., :V].to(dtype), 0.0) * poison).sum(-1)
    loss = torch.where(ignored, 0.0, loss)

    weight = torch.where(ignored, 0.0, weight.to(dtype))
    connected_zero = 0.0 * torch.where(s_row.isfinite(), s_row, 0.0).sum()
    reduced = _reduce(loss, weight, reduction, num_items, connected_zero)
    if not return_metrics:
        return reduced
    with torch.no_grad():
        metrics = _metrics(
            loss, s, t, y, has_label, missing, ignored, is_nan, temperature, kept,
            labels is not None,
        )  # fmt: skip
    if not has_teacher:
        names = "target_kl", "nontarget_kl", "teacher_target_prob", "teacher_entropy"
        metrics = metrics._replace(**dict.fromkeys(names))
    return reduced, metrics


def log_probs_at(
    logits: Tensor, ids: Tensor, *, temperature: float | Tensor = 1.0, shift: bool = False
) -> tuple[Tensor, Tensor]:
    """(log q of the ids [..., K], -inf where they are -1; log of the sum of q over all other
    columns [...]).
    """
    if shift:
        ids = torch.roll(ids, -1, dims=-2)
        last = torch.arange(ids.shape[-2], device=ids.device) == ids.shape[-2] - 1
        ids = torch.where(last[:, None], -1, ids)
    log_q, there = log_softmax(logits, temperature=temperature), ids >= 0
    at_ids = log_q.gather(-1, torch.where(there, ids, 0).long())
    return torch.where(there, at_ids, -INF), _log_rest(log_q, ids, there)


def _log_rest(log_q: Tensor, ids: Tensor, there: Tensor) -> Tensor:
    """log sum q over the columns that are not among the ids that are there."""
    among = torch.zeros(log_q.shape, device=log_q.device)
    among = among.scatter_reduce(-1, torch.where(there, ids, 0).long(), there.to(among), "amax") > 0
    nothing = (among | (log_q == -INF)).all(-1)
    rest = torch.where(among, -INF, log_q)
    rest = torch.where(nothing[..., None], 0.0, rest)
    return torch.where(nothing, -INF, torch.logsumexp(rest, -1))


def cells(
    student_logits: Tensor, teacher: SparseTeacher, y: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities of the cells [..., C] in the student, in the teacher, and the labels'
    places among them, -1 where they have none); y [...]: the labels' columns or -1. The last cell
    is the rest, which ``tail="renormalise"`` leaves out.
    """
    s, dtype = student_logits, torch.promote_types(student_logits.dtype, teacher.log_probs.dtype)

    def at_temperature(x):
        z, x = teacher.log_z, x.to(dtype)
        if z is None:
            return x / temperature
        if teacher.normalised:
            return (x + z[..., :1].to(dtype)) / temperature - z[..., 1:].to(dtype)
        return x / temperature - z[..., None].to(dtype)

    ids, log_p = teacher.ids.long(), at_temperature(teacher.log_probs)
    if teacher.label_log_probs is not None:
        ids = torch.cat([ids, y[..., None]], -1)
        log_p = torch.cat([log_p, at_temperature(teacher.label_log_probs[..., None])], -1)
    there = (ids >= 0) & (log_p != -INF)
    same = (ids[..., :, None] == ids[..., None, :]) & there[..., None, :]
    there = there & ~same.tril(-1).any(-1)  # the first of each id
    log_q = log_softmax(s, temperature=temperature)
    at_ids = log_q.gather(-1, torch.where(there, ids, 0))
    at_ids, log_p = (torch.where(there, x, -INF) for x in (at_ids, log_p))
    match = there & (ids == y[..., None])
    place = torch.where(match.any(-1), match.int().argmax(-1), -1)
    if teacher.tail == "renormalise":
        return at_ids, log_p, place
    log_rest = _log_rest(log_q, ids, there)
    stored = torch.promote_types(teacher.log_probs.dtype, torch.float32)
    whole = torch.logsumexp(log_p, -1)
    whole = torch.where(whole > -torch.finfo(stored).eps, -torch.finfo(stored).eps, whole)
    rest = torch.where(there.sum(-1) == s.shape[-1], -INF, torch.log(-torch.expm1(whole)))
    log_q = torch.cat([at_ids, log_rest[..., None]], -1)
    return log_q, torch.cat([log_p, rest[..., None]], -1), place


def _of_sparse(
    objective, student, teacher, labels, *, weight, shift, temperature, ignore_index, reduction,
    num_items, return_metrics,
):  # fmt: skip
    """A loss of cells, by the definition: the terms that compare with a teacher of the cells, the
    others of the student's logits.
    """
    dtype = torch.promote_types(student.dtype, teacher.log_probs.dtype)
    s, V = student.to(dtype), student.shape[-1]
    y = torch.full(s.shape[:-1], -1, device=s.device) if labels is None else labels.long()
    weight = torch.ones_like(s[..., 0]).detach() if weight is None else weight.to(dtype)
    ignored = (weight == 0) | (False if labels is None else y == ignore_index)
    terms = objective.terms
    if shift:
        y, ignored, weight = (torch.roll(x, -1, dims=-1) for x in (y, ignored, weight))
        last = torch.arange(s.shape[-2], device=s.device) == s.shape[-2] - 1
        ignored = ignored | last
        terms = [
            (f, [_own(x, s, True) for x in p], None if w is None else _own(w, s, True))
            for f, p, w in terms
        ]
    if objective.needs_teacher:
        known = ((teacher.ids != -1) & (teacher.log_probs != -INF)).any(-1)
        if teacher.label_log_probs is not None:
            known = known | ((teacher.label_log_probs != -INF) & (y >= 0))
        ignored = ignored | ~known
    compared = [t for t in terms if t[0].needs & facts.TEACHER]
    alone = [t for t in terms if not t[0].needs & facts.TEACHER]
    y = torch.where(ignored | (y < 0) | (y >= V), -1, y)
    # the rest of a row that is ignored is not to be NaN
    s = torch.where(ignored[..., None], 0.0, s)
    if teacher.tail == "uniform":
        _, log_p, _ = cells(s.detach(), teacher, y, temperature)
        s_cells, place, dropped = s, y, False
        t_cells = _spread(log_p, teacher, y, V) * temperature
        at = temperature
    else:
        s_cells, t_cells, place = cells(s, teacher, y, temperature)
        dropped, at = teacher.tail == "drop", 1.0
    if dropped and not objective.labels_compared:
        place = torch.full_like(place, -1)  # a sum of the columns' own terms
    place = torch.where(ignored, -100, place)
    common = dict(reduction="none", ignore_index=-100, weight=torch.where(ignored, 0.0, 1.0))
    skew = None if objective.skew is None else _own(objective.skew, s, shift)
    of_cells = objectives.Objective(tuple(compared), skew)
    t_cells = torch.where(ignored[..., None], 0.0, t_cells)
    labelled = None if labels is None else place
    loss = divergence(
        of_cells, s_cells, t_cells, labelled, temperature=at, dropped=dropped,
        return_metrics=return_metrics, **common,
    )  # fmt: skip
    loss, metrics = loss if return_metrics else (loss, None)
    if alone:
        labelled = None if labels is None else torch.where(ignored, -100, y)
        other = objectives.Objective(tuple(alone))
        other = divergence(other, s, None, labelled, temperature=temperature, **common)
        is_inf = (loss == INF) | (other == INF)
        loss = torch.where(is_inf, INF, loss + torch.where(is_inf, 0.0, other))
    connected_zero = 0.0 * torch.where(s.isfinite(), s, 0.0).sum()
    weight = torch.where(ignored, 0.0, weight)
    reduced = _reduce(loss, weight, reduction, num_items, connected_zero)
    return (reduced, metrics._replace(loss=loss.detach())) if return_metrics else reduced


def _spread(log_p: Tensor, teacher: SparseTeacher, y: Tensor, V: int) -> Tensor:
    """Log-probabilities [..., V]: the rest of the cells spread evenly over the other columns."""
    ids = teacher.ids.long()
    if teacher.label_log_probs is not None:
        ids = torch.cat([ids, y[..., None]], -1)
    there = log_p[..., :-1] != -INF
    out = (log_p[..., -1:] - torch.log((V - there.sum(-1, keepdim=True)).to(log_p))).repeat(
        *[1] * (log_p.dim() - 1), V
    )
    for k in range(ids.shape[-1]):
        index = torch.where(there[..., k], ids[..., k], 0)[..., None]
        value = torch.where(there[..., k, None], log_p[..., k, None], out.gather(-1, index))
        out = out.scatter(-1, index, value)
    return out


def _own(x, like: Tensor, shift: bool):
    """A parameter, each row's own where it has one for each."""
    if not isinstance(x, Tensor):
        return x
    x = x.to(like)
    return torch.roll(x, -1, dims=-1) if shift and x.dim() else x


def _skewed_teacher(s: Tensor, t: Tensor, skew, temperature) -> Tensor:
    """temperature log((1 - skew) p + skew q), a constant."""
    log_q, log_p = (log_softmax(x.detach(), temperature=temperature) for x in (s, t))
    of_q, of_p = (_column(torch.as_tensor(x, dtype=s.dtype)).log() for x in (skew, 1 - skew))
    return temperature * _logaddexp(log_q + of_q, log_p + of_p)


def _terms(objective, r: _Rows, shift: bool) -> Tensor:
    loss = 0.0
    for formula, parameters, weight in objective.terms:
        parameters = [_own(x, r.s, shift) for x in parameters]
        if formula.key in _ROWS:
            value = _ROWS[formula.key][0](r, *parameters)
        else:
            value = _of_formula(formula, r, parameters)
        loss = loss + (value if weight is None else _own(weight, r.s, shift) * value)
    return loss


def _of_formula(formula, r: _Rows, parameters) -> Tensor:
    parameters = [torch.as_tensor(x, dtype=r.s.dtype) for x in parameters]
    if formula.is_pointwise:
        columns = [_column(x) for x in parameters]

        def value(*logs):
            return formula.function(*(x.clamp_min(facts.ABSENT) for x in logs), *columns)[0]

        return r.of_columns(value)
    _, qp, u = r.split()
    _, pq, v = split(r.t, r.s, r.y, r.temperature, kept=r.kept)
    u, v = (torch.where(r.has_label, x, -INF) for x in (u, v))
    qp = torch.where(r.has_label, qp, r.kl(r.log_q, r.log_p))
    pq = torch.where(r.has_label, pq, r.kl(r.log_p, r.log_q))
    entropies = []
    for x in (r.s, r.t):
        rest = torch.arange(x.shape[-1]) != torch.where(r.has_label, r.y, -1)[..., None]
        log_rest = log_softmax(torch.where(rest, x, -INF), temperature=r.temperature)
        there = (log_rest != -INF) & r.kept
        entropies.append(-_times(log_rest.exp(), log_rest, there).sum(-1))
    at_label = log_softmax(r.s).gather(-1, r.y[..., None])[..., 0]
    f = facts.Facts(
        u, v, logsigmoid(u), logsigmoid(-u), logsigmoid(v), logsigmoid(-v), qp, pq, *entropies,
        at_label, torch.logsumexp(r.s, -1), None, None,
    )  # fmt: skip
    return formula.function(f, *parameters).loss


def _reasons(formula) -> set:
    return {
        reason
        for bit, reason in ((facts.REVERSE, TEACHER), (facts.FORWARD, STUDENT))
        if formula.needs & bit
    }


def _loss(builder):
    def loss(student_logits, teacher_logits, labels=None, **options):
        own = {name: options.pop(name) for name in names if name in options}
        return divergence(builder(**own), student_logits, teacher_logits, labels, **options)

    names = inspect.signature(builder).parameters
    return loss


reverse_kl = _loss(objectives.reverse_kl)
drkl = _loss(lambda gamma=0.5, skew=0.0: objectives.skewed_teacher(objectives.drkl(gamma), skew))
forward_kl = _loss(objectives.forward_kl)
mixed_kl = _loss(objectives.mixed_kl)
dkd = _loss(objectives.dkd)
js_divergence = _loss(objectives.js_divergence)
adaptive_kl = _loss(objectives.adaptive_kl)
skew_kl = _loss(objectives.skew_kl)
skew_reverse_kl = _loss(objectives.skew_reverse_kl)
total_variation = _loss(objectives.total_variation)
alpha_beta = _loss(objectives.alpha_beta)


def cross_entropy(student_logits: Tensor, labels: Tensor, **options):
    """-log q_y at temperature 1."""
    return divergence(objectives.cross_entropy(), student_logits, None, labels, **options)


def _is_bad(x: Tensor) -> Tensor:
    return (x.isnan() | (x == INF)).any(-1) | (x == -INF).all(-1)


def _reduce(loss, weight, reduction, num_items, connected_zero):
    loss = loss * weight
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    denominator = (
        weight.sum()
        if num_items is None
        else torch.as_tensor(num_items, dtype=loss.dtype, device=loss.device)
    )
    return connected_zero if denominator == 0 else loss.sum() / denominator


def _metrics(loss, s, t, y, has_label, missing, ignored, is_nan, temperature, kept, labelled):
    s, t = (torch.where((ignored | is_nan)[..., None], 0.0, x) for x in (s, t))
    r = _Rows(s, t, torch.where(has_label, y, 0), has_label, temperature, kept)

    def clean(x, unknown):
        return torch.where(ignored, 0.0, torch.where(unknown, float("nan"), x))

    entropies = [clean(_entropy(r, teacher), is_nan) for teacher in (False, True)]
    if not labelled:
        return RowMetrics(loss.detach(), *[None] * 4, *entropies, ~ignored)
    target, nontarget, u = r.split()
    _, _, v = split(t, t, r.y, temperature)
    at_label = missing.gather(-1, r.y[..., None])[..., 0]
    elsewhere = missing.scatter(-1, r.y[..., None], False).any(-1)
    fields = (
        torch.where(at_label, INF, target),
        torch.where(elsewhere, INF, nontarget),
        u.sigmoid(),
        v.sigmoid(),
    )
    unknown = is_nan | ~has_label
    return RowMetrics(loss.detach(), *(clean(x, unknown) for x in fields), *entropies, ~ignored)
