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
teacher -inf where student is finite    +inf                      0
both -inf, or the student alone         the term is 0             0 there
student -inf at the label               -log(1 - p_y) + gamma N   0 at the label
student finite at the label only        -log p_y                  0
one side -inf everywhere; NaN or +inf   NaN                       NaN
======================================  ========================  ==============
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .algebra import RowMetrics

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


def reverse_kl(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None, **options
):
    """KL(q || p); with labels computed as KL(b_q || b_p) + (1 - q_y) KL(q^ || p^), which is exactly
    the same.
    """
    return _divergence(student_logits, teacher_logits, labels, None, **options)


def drkl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    gamma: float | Tensor = 0.5,
    **options,
):
    """KL(b_q || b_p) + gamma KL(q^ || p^): our reading of Equation 9 of arXiv 2604.00223."""
    return _divergence(student_logits, teacher_logits, labels, gamma, **options)


def split(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    support: str = "full",
    filter_value: float = -INF,
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
    return target, _kl(log_q_rest, log_p_rest), u


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


def _kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """sum_k q_k (log q_k - log p_k) over the columns where log q_k is not -inf; 0 log 0 = 0."""
    return _times(log_q.exp(), log_q - log_p, log_q != -INF).sum(-1)


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


def _divergence(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    gamma: float | Tensor | None,
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
):
    V = min(student.shape[-1], teacher.shape[-1])
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    s, t = student[..., :V].to(dtype), teacher[..., :V].detach().to(dtype)
    s, t = _on_support(s, t, support, filter_value, teacher.dtype)
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
    if gamma is not None and not (has_label | ignored).all():
        raise ValueError("labels outside the vocabulary")

    # the edges, by the logits alone
    is_nan = (_is_bad(s) | _is_bad(t)) & ~ignored
    missing = (t == -INF) & (s != -INF)
    is_inf = missing.any(-1) & ~is_nan
    special = ignored | is_nan | is_inf
    # rows decided by an edge go through the formulas as flat rows, so that no NaN reaches a
    # gradient
    s_row, t_row = (torch.where(special[..., None], 0.0, x) for x in (s, t))
    target, nontarget, u = split(s_row, t_row, torch.where(has_label, y, 0), temperature)
    loss = _kl(
        log_softmax(s_row, temperature=temperature), log_softmax(t_row, temperature=temperature)
    )
    if labels is not None:
        weight_of_rest = _sigmoid(-u) if gamma is None else gamma
        loss = torch.where(has_label, target + weight_of_rest * nontarget, loss)
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
        return reduced, _metrics(
            loss, s, t, y, has_label, missing, ignored, is_nan, temperature, labels is not None
        )


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


def _metrics(loss, s, t, y, has_label, missing, ignored, is_nan, temperature, labelled):
    s, t = (torch.where((ignored | is_nan)[..., None], 0.0, x) for x in (s, t))
    log_q = log_softmax(s, temperature=temperature)
    entropy = -_times(log_q.exp(), log_q, log_q != -INF).sum(-1)

    def clean(x, unknown):
        return torch.where(ignored, 0.0, torch.where(unknown, float("nan"), x))

    if not labelled:
        return RowMetrics(loss.detach(), *[None] * 4, clean(entropy, is_nan), ~ignored)
    y = torch.where(has_label, y, 0)
    target, nontarget, u = split(s, t, y, temperature)
    _, _, v = split(t, t, y, temperature)
    at_label = missing.gather(-1, y[..., None])[..., 0]
    elsewhere = missing.scatter(-1, y[..., None], False).any(-1)
    fields = (
        torch.where(at_label, INF, target),
        torch.where(elsewhere, INF, nontarget),
        u.sigmoid(),
        v.sigmoid(),
    )
    unknown = is_nan | ~has_label
    fields = [*(clean(x, unknown) for x in fields), clean(entropy, is_nan)]
    return RowMetrics(loss.detach(), *fields, ~ignored)
