"""The divergences, and what they are written with.

An :class:`Objective` is a sum of terms, each a divergence with its parameters and a weight:

    objective = 0.9 * objectives.drkl(gamma=0.5) + 0.1 * objectives.cross_entropy()
    loss = drkl_triton.divergence(objective, student_logits, teacher_logits, labels)

All terms come out of the same scan of the logits and the same gradient. Divergences are of two
kinds:

- *separable* ones are functions of a few numbers a row, its :class:`Facts`, and say how they move
  with them, in :class:`Slopes`;
- *pointwise* ones are a sum over the columns of phi(log q_k, log p_k), and give phi and its
  derivative by log q_k. They read the logits once more in the forward pass. To them a
  log-probability below -1e30 is one of -inf.

Both can be written outside of this package, with :func:`separable` and :func:`pointwise`: the body
may use arithmetic, comparisons, other such functions and ``tl.exp log where maximum minimum abs``,
and runs as it stands in PyTorch and in Triton kernels. :func:`check` compares slopes with float64
derivatives.

Notation: q, p are the student's and the teacher's distributions, y is the label, b_q = (q_y, 1 -
q_y), and q^ is q without column y, renormalised; b_p and p^ likewise.
"""

from __future__ import annotations

from torch import Tensor

from . import _checks
from ._objective import Formula, Objective, check, pointwise, separable
from .facts import (
    ABSENT,
    GAPS,
    INF,
    Facts,
    Slopes,
    target_kl,
    times,
    tl,
    two_point_kl,
    whole_entropy,
)

__all__ = [
    "Facts",
    "Formula",
    "Objective",
    "Slopes",
    "adaptive_kl",
    "alpha_beta",
    "check",
    "cross_entropy",
    "dkd",
    "drkl",
    "entropy",
    "forward_kl",
    "gated_kl",
    "js_divergence",
    "mixed_kl",
    "pointwise",
    "reverse_kl",
    "separable",
    "skew_kl",
    "skew_reverse_kl",
    "skewed_teacher",
    "symmetric_kl",
    "target_kl",
    "teacher_entropy",
    "times",
    "tl",
    "total_variation",
    "z_loss",
]


@separable
def reverse_kl(f):
    """KL(q || p) = KL(b_q || b_p) + (1 - q_y) KL(q^ || p^)."""
    rest = tl.exp(f.log_rest)
    u = times(tl.exp(f.log_q + f.log_rest), f.u - f.v - f.qp)
    return Slopes(target_kl(f) + times(rest, f.qp), u=u, qp=rest)


@separable(labels=True, positive=("gamma",))
def drkl(f, gamma=0.5):
    """KL(b_q || b_p) + gamma KL(q^ || p^): our reading of Equation 9 of arXiv 2604.00223 (Luong,
    Tran, Chen, "Diversity-Aware Reverse Kullback-Leibler Divergence for Large Language Model
    Distillation").
    """
    u = times(tl.exp(f.log_q + f.log_rest), f.u - f.v)
    return Slopes(target_kl(f) + times(gamma, f.qp), u=u, qp=gamma)


def teacher_target_kl(f):
    """KL(b_p || b_q)."""
    return two_point_kl(f.log_p, f.log_p_rest, f.log_q, f.log_rest)


@separable
def forward_kl(f):
    """KL(p || q) = KL(b_p || b_q) + (1 - p_y) KL(p^ || q^)."""
    rest = tl.exp(f.log_p_rest)
    loss = teacher_target_kl(f) + times(rest, f.pq)
    return Slopes(loss, log_q=-tl.exp(f.log_p), log_rest=-rest, pq=rest)


@separable(labels=True, positive=("alpha", "beta"))
def dkd(f, alpha=1.0, beta=8.0):
    """alpha KL(b_p || b_q) + beta KL(p^ || q^), decoupled knowledge distillation (arXiv
    2203.08679); the defaults are that paper's for most of its pairs.
    """
    p, rest = tl.exp(f.log_p), tl.exp(f.log_p_rest)
    loss = alpha * teacher_target_kl(f) + times(beta, f.pq)
    return Slopes(loss, log_q=-alpha * p, log_rest=-alpha * rest, pq=beta)


@separable(labels=True)
def cross_entropy(f):
    """-log q_y, at temperature 1 whatever the loss's is."""
    return Slopes(-f.label_log_prob, label_log_prob=-1.0)


@separable
def z_loss(f):
    """The square of the student's log-partition, logsumexp(s)^2, at temperature 1 (arXiv
    2204.02311, section 5).
    """
    return Slopes(f.log_z * f.log_z, log_z=2.0 * f.log_z)


@separable
def entropy(f):
    """-sum q log q. With a negative weight a bonus for it."""
    q, rest = tl.exp(f.log_q), tl.exp(f.log_rest)
    loss = whole_entropy(f.log_q, f.log_rest, f.entropy)
    return Slopes(loss, u=times(q * rest, -(f.u + f.entropy)), entropy=rest)


@separable
def teacher_entropy(f):
    """-sum p log p: a constant, as far as the student goes."""
    return Slopes(whole_entropy(f.log_p, f.log_p_rest, f.teacher_entropy))


@separable(fraction=("head",))
def adaptive_kl(f, head=0.5):
    """w KL(p || q) + (1 - w) KL(q || p), with w the head's part of sum |p - q|, a constant for the
    gradient (AKL, arXiv 2404.02657). The teacher's head is the fewest of its most likely columns
    that have the mass ``head``; those within 1e-6 of the last one's log-probability are in it.
    """
    total = f.gap_head + f.gap_tail
    w = tl.where(total == 0, 0.5, f.gap_head / tl.where(total == 0, 1.0, total))
    r, k = reverse_kl(f), forward_kl(f)
    return Slopes(
        times(1.0 - w, r.loss) + times(w, k.loss), times(1.0 - w, r.u), w * k.log_q, w * k.log_rest,
        qp=(1.0 - w) * r.qp, pq=w * k.pq,
    )  # fmt: skip


@separable(positive=("threshold", "forward"))
def gated_kl(f, threshold=0.8, forward=1.0):
    """Reverse KL, plus ``forward`` times forward KL where the teacher's entropy is above
    ``threshold`` nats: where many continuations are right, cover them.
    """
    uncertain = whole_entropy(f.log_p, f.log_p_rest, f.teacher_entropy) > threshold
    w = tl.where(uncertain, forward, 0.0 * forward)
    r, k = reverse_kl(f), forward_kl(f)
    return Slopes(r.loss + times(w, k.loss), r.u, w * k.log_q, w * k.log_rest, qp=r.qp, pq=w * k.pq)


def mixed_kl(forward: float | Tensor = 0.5) -> Objective:
    """``forward`` KL(p || q) + (1 - ``forward``) KL(q || p)."""
    return forward * forward_kl() + (1 - forward) * reverse_kl()


def symmetric_kl() -> Objective:
    """(KL(p || q) + KL(q || p)) / 2."""
    return mixed_kl(0.5)


def skewed_teacher(objective: Objective, skew: float | Tensor) -> Objective:
    """The objective with the teacher replaced by the distribution (1 - skew) p + skew q, a constant
    for the gradient: finite wherever the student is, and closer to it (the mixture of arXiv
    2402.03898 as a target). skew is between 0 and 1; a tensor, 0-dim or [...], is not validated and
    has no gradient. The number 0 leaves the objective as it is.

    The logits are read twice in the forward pass.

    Raises:
        ValueError: the objective reads no teacher, has one already, or has pointwise terms or
            adaptive_kl, which are not defined over it.
    """
    if not isinstance(skew, Tensor) and skew == 0:
        return objective
    _checks.parameter("skew", skew, "fraction")
    if not objective.needs_teacher or objective.skew is not None:
        raise ValueError(f"skewed_teacher takes an objective with a plain teacher, got {objective}")
    if any(f.is_pointwise or f.needs & GAPS for f, _, _ in objective.terms):
        raise ValueError(
            f"skewed_teacher takes separable divergences other than adaptive_kl, got {objective}"
        )
    return Objective(objective.terms, skew)


# --- pointwise ---


def log_sum(a, b):
    """log(a + b) of what is not negative, a number also where both are 0: what is below the
    smallest normal number counts as about that.
    """
    m = a + b
    if m.dtype == tl.float64:
        return tl.log(tl.maximum(m, 2.3e-308))
    else:
        return tl.log(tl.maximum(m, 1.2e-38))


@pointwise
def jensen_shannon(log_q, log_p, beta):
    """phi of :func:`js_divergence`."""
    of_q, of_p = (1.0 - beta) * tl.exp(log_q), beta * tl.exp(log_p)
    log_m = log_sum(of_q, of_p)
    slope = of_q * (log_q - log_m)
    return slope + of_p * (log_p - log_m), slope


def js_divergence(beta: float | Tensor = 0.5) -> Objective:
    """The generalised Jensen-Shannon divergence, beta KL(p || m) + (1 - beta) KL(q || m) with m =
    beta p + (1 - beta) q (GKD, arXiv 2306.13649).

    beta is 0 to 1. The number 0 is forward KL and the number 1 reverse KL, as TRL has it, and not
    the limits of the formula, which are 0. A tensor is taken to lie between them.
    """
    if not isinstance(beta, Tensor):
        if beta == 0:
            return forward_kl()
        if beta == 1:
            return reverse_kl()
    return jensen_shannon(beta)


@pointwise(fraction=("alpha",))
def skew_kl(log_q, log_p, alpha=0.1):
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898)."""
    of_q, p = (1.0 - alpha) * tl.exp(log_q), tl.exp(log_p)
    ratio = log_p - log_sum(of_q, alpha * p)
    return p * ratio, -of_q * tl.exp(ratio)


@pointwise(fraction=("alpha",))
def skew_reverse_kl(log_q, log_p, alpha=0.1):
    """KL(q || alpha q + (1 - alpha) p) (DistiLLM, arXiv 2402.03898)."""
    q, p = tl.exp(log_q), tl.exp(log_p)
    ratio = log_q - log_sum(alpha * q, (1.0 - alpha) * p)
    value = q * ratio
    return value, value + q * (1.0 - alpha * tl.exp(ratio))


@pointwise
def masses_above(log_q, log_p, low, high):
    """Those of p from either threshold on, not a divergence: see _loss.py."""
    p = tl.exp(log_p)
    return tl.where(log_p >= low, p, 0.0), tl.where(log_p >= high, p, 0.0)


@pointwise
def gaps(log_q, log_p, threshold):
    """|q - p| from the threshold on and below it, not a divergence: see _loss.py."""
    gap = tl.abs(tl.exp(log_q) - tl.exp(log_p))
    return tl.where(log_p >= threshold, gap, 0.0), tl.where(log_p >= threshold, 0.0, gap)


@pointwise
def total_variation(log_q, log_p):
    """sum |q - p| / 2."""
    q = tl.exp(log_q)
    half_sign = tl.maximum(tl.minimum(1e38 * (log_q - log_p), 0.5), -0.5)
    return 0.5 * tl.abs(q - tl.exp(log_p)), q * half_sign


@pointwise
def general_alpha_beta(log_q, log_p, alpha, beta):
    """phi of :func:`alpha_beta`, none of alpha, beta and their sum 0."""
    both = tl.exp(alpha * log_p + beta * log_q)
    total = alpha + beta
    q, p = tl.exp(total * log_q), tl.exp(total * log_p)
    value = (alpha / total) * p + (beta / total) * q - both
    return (1.0 / (alpha * beta)) * value, (1.0 / alpha) * (q - both)


@pointwise
def alpha_beta_without_beta(log_q, log_p, alpha):
    """phi of :func:`alpha_beta`, beta = 0."""
    p, q = tl.exp(alpha * log_p), tl.exp(alpha * log_q)
    slope = (q - p) / alpha
    value = (p * (log_p - log_q) + slope) / alpha
    return tl.where(left_out(log_q, log_p), INF, value), slope


@pointwise
def alpha_beta_without_alpha(log_q, log_p, beta):
    """phi of :func:`alpha_beta`, alpha = 0."""
    p, q = tl.exp(beta * log_p), tl.exp(beta * log_q)
    slope = q * (log_q - log_p)
    value = (slope + (p - q) / beta) / beta
    return tl.where(left_out(log_p, log_q), INF, value), slope


def left_out(log_x, log_y):
    """Where the one leaves out a column that the other does not."""
    return (log_x == ABSENT) & (log_y > ABSENT)


@pointwise
def alpha_beta_without_sum(log_q, log_p, alpha):
    """phi of :func:`alpha_beta`, beta = -alpha."""
    x = alpha * (log_p - log_q)
    slope = (1.0 - tl.exp(x)) / alpha
    value = -(x / alpha + slope) / alpha
    return tl.where(left_out(log_q, log_p) | left_out(log_p, log_q), INF, value), slope


@pointwise
def alpha_beta_at_zero(log_q, log_p):
    """phi of :func:`alpha_beta`, alpha = beta = 0."""
    x = log_q - log_p
    value = 0.5 * x * x
    return tl.where(left_out(log_q, log_p) | left_out(log_p, log_q), INF, value), x


def alpha_beta(alpha: float | Tensor, beta: float | Tensor) -> Objective:
    """The alpha-beta divergence (ABKD, arXiv 2505.04560; Cichocki et al., Entropy 2011),

        -1 / (alpha beta) sum_k (p^alpha q^beta - (alpha p^(alpha+beta) + beta q^(alpha+beta))
                                                  / (alpha + beta))

    At numbers where that is 0 / 0 it is its limit: alpha = 1, beta = 0 is forward KL, alpha = 0,
    beta = 1 reverse KL. Close to such a number float32 loses digits like 1e-7 / (alpha beta). A
    tensor is taken to be none of them. A row is +inf where the teacher (alpha = 0) or the student
    (beta = 0) leaves out a column that the other does not, and where either does with beta =
    -alpha; what other negative numbers make of such a column is not defined.
    """
    numbers = not (isinstance(alpha, Tensor) or isinstance(beta, Tensor))
    if numbers and alpha == 0:
        return alpha_beta_at_zero() if beta == 0 else alpha_beta_without_alpha(beta)
    if numbers and beta == 0:
        return alpha_beta_without_beta(alpha)
    if numbers and alpha + beta == 0:
        return alpha_beta_without_sum(alpha)
    return general_alpha_beta(alpha, beta)
