"""The losses that are timed: each as people write it in PyTorch, and as this package has it."""

from collections.abc import Callable
from math import log
from typing import NamedTuple

import torch
from torch.nn import functional as F

from drkl_triton import objectives as o

GAMMA = 0.5


class Loss(NamedTuple):
    """``dense``: (student, teacher [N, V], labels [N]) to losses [N]: float32 inside, no copy that
    the formula does not need. ``size``: about the sum of its terms' weights, for truth.py.
    """

    dense: Callable
    objective: object
    size: float = 1.0

    @property
    def read(self):
        """Tensors of logits."""
        return 2 if self.objective.needs_teacher else 1


def log_probabilities(*logits):
    return (F.log_softmax(x, dim=-1, dtype=torch.float32) for x in logits)


def of_logs(formula):
    return lambda student, teacher, labels: formula(*log_probabilities(student, teacher), labels)


def kl(log_x, log_y):
    return (log_x.exp() * (log_x - log_y)).sum(-1)


def decoupled(log_x, log_y, labels, of_target, of_rest):
    """KL(x || y) - KL(b_x || b_y) = (1 - x_label) N, so N costs only arithmetic on [N] beside the
    KL: of the dense formulas the fastest, twice as fast as masking the label's column out.
    """
    whole = kl(log_x, log_y)
    x, y = (z.gather(-1, labels[:, None])[:, 0] for z in (log_x, log_y))
    x_rest, y_rest = torch.log1p(-x.exp()), torch.log1p(-y.exp())
    target = x.exp() * (x - y) + x_rest.exp() * (x_rest - y_rest)
    return of_target * target + of_rest * (whole - target) / x_rest.exp()


def log_mixture(log_q, log_p, of_p):
    return torch.logaddexp(log_q + log(1 - of_p), log_p + log(of_p))


def js_divergence(log_q, log_p, _, beta=0.5):
    log_m = log_mixture(log_q, log_p, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def adaptive_kl(log_q, log_p, _, head=0.5):
    with torch.no_grad():
        q, p = log_q.exp(), log_p.exp()
        ranked, _ = p.sort(-1, descending=True)
        in_head = ranked.cumsum(-1) - ranked < head
        last = torch.where(in_head, ranked, 1.0).amin(-1, keepdim=True)
        gap = (q - p).abs()
        w = (gap * (p >= last)).sum(-1) / gap.sum(-1)
    return w * kl(log_p, log_q) + (1 - w) * kl(log_q, log_p)


def gated_kl(log_q, log_p, _, threshold=0.8):
    uncertain = -(log_p.exp() * log_p).sum(-1) > threshold
    return kl(log_q, log_p) + uncertain * kl(log_p, log_q)


def cross_entropy(student, _, labels):
    return F.cross_entropy(student.float(), labels, reduction="none")


def entropy(student, *_):
    (log_q,) = log_probabilities(student)
    return -(log_q.exp() * log_q).sum(-1)


def drkl(log_q, log_p, labels):
    return decoupled(log_q, log_p, labels, 1.0, GAMMA)


def skewed_drkl(log_q, log_p, labels):
    return drkl(log_q, log_mixture(log_q.detach(), log_p, 0.9), labels)


# In the formulas q and p are logarithms.
LOSSES = {
    "reverse_kl": Loss(of_logs(lambda q, p, y: kl(q, p)), o.reverse_kl()),
    "drkl": Loss(of_logs(drkl), o.drkl(GAMMA)),
    "drkl-skewed": Loss(of_logs(skewed_drkl), o.skewed_teacher(o.drkl(GAMMA), 0.1)),
    "forward_kl": Loss(of_logs(lambda q, p, y: kl(p, q)), o.forward_kl()),
    "mixed_kl": Loss(of_logs(lambda q, p, y: 0.3 * kl(p, q) + 0.7 * kl(q, p)), o.mixed_kl(0.3)),
    "symmetric_kl": Loss(
        of_logs(lambda q, p, y: 0.5 * ((q.exp() - p.exp()) * (q - p)).sum(-1)), o.symmetric_kl()
    ),
    "js_divergence": Loss(of_logs(js_divergence), o.js_divergence()),
    "skew_kl": Loss(of_logs(lambda q, p, y: kl(p, log_mixture(q, p, 0.1))), o.skew_kl()),
    "skew_reverse_kl": Loss(
        of_logs(lambda q, p, y: kl(q, log_mixture(q, p, 0.9))), o.skew_reverse_kl()
    ),
    "total_variation": Loss(
        of_logs(lambda q, p, y: 0.5 * (q.exp() - p.exp()).abs().sum(-1)), o.total_variation()
    ),
    "alpha_beta": Loss(
        of_logs(lambda q, p, y: (2 * (q.exp() + p.exp()) - 4 * (0.5 * (q + p)).exp()).sum(-1)),
        o.alpha_beta(0.5, 0.5),
        8.0,
    ),
    "dkd": Loss(of_logs(lambda q, p, y: decoupled(p, q, y, 1.0, 8.0)), o.dkd(), 9.0),
    "adaptive_kl": Loss(of_logs(adaptive_kl), o.adaptive_kl()),
    "gated_kl": Loss(of_logs(gated_kl), o.gated_kl(), 2.0),
    "cross_entropy": Loss(cross_entropy, o.cross_entropy()),
    "entropy": Loss(entropy, o.entropy()),
    "z_loss": Loss(lambda s, t, y: s.float().logsumexp(-1).square(), o.z_loss(), 40.0),
    "drkl+cross_entropy": Loss(
        of_logs(lambda q, p, y: 0.9 * drkl(q, p, y) + 0.1 * F.nll_loss(q, y, reduction="none")),
        0.9 * o.drkl(GAMMA) + 0.1 * o.cross_entropy(),
        1.5,
    ),
}
