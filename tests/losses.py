"""The one table of losses that the tests walk through: how each is called, what it needs, and the
condition of its gradient (bounds.py). A new loss is one row here.

A condition is a list of pairs (mass, terms), [..., V] each: an element of the gradient is a sum of
products of the two, and its condition the sum of their absolute values.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import logsigmoid

import drkl_triton
from drkl_triton import objectives as o
from drkl_triton import reference

INF = float("inf")


class Row:
    """What conditions are made of, in float64: log-probabilities (0 where a logit is -inf) and,
    with labels, their parts.
    """

    def __init__(self, student, teacher, labels, temperature):
        s, t = student.double(), teacher.double()
        log_q, log_p = (reference.log_softmax(x, temperature=temperature) for x in (s, t))
        self.there, self.there_t = (s != -INF).double(), (t != -INF).double()
        self.log_q, self.log_p = (
            torch.where(s == -INF, 0.0, log_q),
            torch.where(t == -INF, 0.0, log_p),
        )
        self.q, self.p = log_q.exp() * self.there, log_p.exp() * self.there_t
        self.labels, self.logits, self.temperature = labels, s, temperature
        self.at_1 = self if temperature == 1 else Row(student, teacher, labels, 1.0)
        if labels is None:
            return
        self.y = y = labels.clamp_min(0)[..., None]
        _, n, u = reference.split(s, t, y[..., 0], temperature)
        _, m, v = reference.split(t, s, y[..., 0], temperature)
        self.n, self.m, u, v = (torch.where(x.isfinite(), x, 0.0)[..., None] for x in (n, m, u, v))
        self.v = v
        self.log_qy, self.log_rest = logsigmoid(u), logsigmoid(-u)
        self.log_py, self.log_p_rest = logsigmoid(v), logsigmoid(-v)
        self.log_q_hat, self.log_p_hat = self.log_q - self.log_rest, self.log_p - self.log_p_rest

    def at_label(self, pairs, mass, terms):
        """The pairs with the label's own in its column."""
        first, *others = pairs
        first = tuple(x.scatter(-1, self.y, z) for x, z in zip(first, (mass, terms), strict=True))
        zero = torch.zeros_like(mass)
        return [first, *(tuple(x.scatter(-1, self.y, zero) for x in pair) for pair in others)]


def pull(r):
    logs = r.log_qy.abs() + r.log_rest.abs()
    return (r.log_qy + r.log_rest).exp(), (logs + r.v.abs()) * (1 + logs), logs


def reverse_kl(r):
    rkl = (r.q * (r.log_q - r.log_p)).sum(-1, keepdim=True).abs()
    pairs = [(r.q, (r.log_q.abs() + r.log_p.abs() + rkl) * (1 + r.log_q.abs()))]
    if r.labels is None:
        return pairs
    both, terms, logs = pull(r)
    return r.at_label(pairs, both, terms + r.n * (1 + logs))


def drkl(r, gamma=0.5):
    both, terms, _ = pull(r)
    hats = r.log_q_hat.abs() + r.log_p_hat.abs() + r.n
    pair = r.log_q_hat.exp() * r.there, (gamma * hats + both * terms) * (1 + r.log_q_hat.abs())
    return r.at_label([pair], both, terms)


def forward_kl(r):
    return [(r.q, 1 + r.log_q.abs()), (r.p, 1 + r.log_p.abs())]


def dkd(r, alpha=1.0, beta=8.0):
    q, p = r.log_qy.exp(), r.log_py.exp()
    apart = p * r.log_rest.exp() + q * r.log_p_rest.exp()
    logs = 1 + r.log_qy.abs() + r.log_rest.abs() + r.log_py.abs() + r.log_p_rest.abs()
    q_hat, p_hat = r.log_q_hat.exp() * r.there, r.log_p_hat.exp() * r.there_t
    pairs = [
        (q_hat, (beta + alpha * apart * logs) * (1 + r.log_q_hat.abs())),
        (p_hat, beta * (1 + r.log_p_hat.abs())),
    ]
    return r.at_label(pairs, alpha * apart, logs)


def untempered(condition):
    """Of what is at temperature 1, whatever the loss's is."""
    return lambda r: [(mass, r.temperature * terms) for mass, terms in condition(r.at_1)]


@untempered
def cross_entropy(r):
    pairs = [(r.q, 1 + r.log_q.abs())]
    return r.at_label(pairs, r.log_rest.exp(), 1 + r.log_rest.abs())


@untempered
def z_loss(r):
    # a maximum and the logarithm of a sum, which may cancel
    z = r.logits.amax(-1, keepdim=True).abs() + math.log(r.logits.shape[-1])
    return [(r.q, (1 + 2 * z) * (2 + r.log_q.abs()))]


def entropy(r):
    h = (r.q * r.log_q.abs()).sum(-1, keepdim=True)
    return [(r.q, (r.log_q.abs() + h) * (1 + r.log_q.abs()))]


def adaptive_kl(r):
    """Also the gaps' errors, which move the weight of two sums that may be of any size."""
    kl = ((r.q - r.p) * (r.log_q - r.log_p)).sum(-1, keepdim=True).abs()
    pairs = reverse_kl(r) + forward_kl(r)
    ratio, apart = r.q * (r.log_q - r.log_p).abs(), (r.q - r.p).abs()
    gap = apart.sum(-1, keepdim=True)  # whose parts' errors are those of q and p
    return [*pairs, (ratio + r.q + r.p, 1 + kl), (ratio + apart, (1 + kl) / gap.clamp_min(1e-300))]


def of_columns(r, pairs):
    """Of a pointwise divergence, from the pairs of its slopes: q_k times their sum besides."""
    total = sum(torch.where(m == 0, 0.0, m * t).sum(-1, keepdim=True) for m, t in pairs)
    return [*pairs, (r.q, total * (1 + r.log_q.abs()))]


def mixtures(r, *, squared=1.0, **_):
    """Those that compare with a mixture m of both: log m is no larger than either's, or about."""
    logs = torch.minimum(r.log_q.abs(), r.log_p.abs()) + r.log_q.abs() + 4
    return of_columns(r, [(r.q, squared * logs * (1 + r.log_q.abs() + r.log_p.abs()))])


def total_variation(r):
    # where the two can hardly be told apart the slope is either half
    tie = (r.log_q - r.log_p).abs() < 1e-5 * (1 + r.log_q.abs() + r.log_p.abs())
    return of_columns(r, [(r.q, 1 + r.log_q.abs()), (r.q * tie, torch.full_like(r.q, 1e16))])


def alpha_beta(r, alpha=0.6, beta=0.3):
    both = alpha * r.log_p + beta * r.log_q
    logs = 1 + abs(alpha) * r.log_p.abs() + abs(beta) * r.log_q.abs()
    if alpha == 0:
        power, terms = (beta * r.log_q).exp(), (r.log_q.abs() + r.log_p.abs()) * logs
        return of_columns(r, [(power * r.there, terms)])
    powers = both.exp(), ((alpha + beta) * r.log_q).exp()
    return of_columns(r, [(x * r.there, logs / abs(alpha)) for x in powers])


def at_zero(r, alpha=0.0, beta=0.0):
    logs = r.log_q.abs() + r.log_p.abs()
    return of_columns(r, [(r.there, 1 + logs)])


def drkl_spread(s, t, labels, q, temperature, options):
    y = labels.clamp_min(0)[..., None]
    _, _, u = reference.split(s, t, y[..., 0], temperature)
    rest = u.neg().sigmoid()[..., None]
    return (q / rest * (options.get("gamma", 0.5) + rest)).scatter(-1, y, q.gather(-1, y))


def with_teacher(factor):
    """Where the teacher's probabilities stand in the gradient beside the student's."""

    def spread(s, t, labels, q, temperature, options):
        return factor * (q + reference.softmax(t, temperature=temperature))

    return spread


def dkd_spread(s, t, labels, q, temperature, options):
    y = labels.clamp_min(0)[..., None]
    both = 0.0
    for x, z in ((s, q), (t, reference.softmax(t, temperature=temperature))):
        _, _, u = reference.split(x, x, y[..., 0], temperature)
        both = both + (z / u.neg().sigmoid()[..., None] * 9).scatter(-1, y, z.gather(-1, y))
    return both


@dataclass(frozen=True)
class Loss:
    """``objective`` makes it of its parameters; ``function``: the name of the public function,
    where there is one; labels: "must" or "may".
    """

    objective: Callable
    condition: Callable
    function: str | None = None
    labels: str = "may"
    weights: Callable = lambda **_: 1.0  # the sum of its terms' weights
    spread: Callable | None = None  # what an element moves by when a logit does (bounds.py)
    skew: float = 0.0  # of the teacher

    def teacher(self, student, teacher, temperature):
        """In float64, as the loss sees it."""
        s, t = student.double(), teacher.double()
        if not self.skew:
            return t
        log_q, log_p = (reference.log_softmax(x, temperature=temperature) for x in (s, t))
        of_q, of_p = log_q + math.log(self.skew), log_p + math.log1p(-self.skew)
        m = torch.logaddexp(of_q, of_p).masked_fill((s == -INF) & (t == -INF), -INF)
        return temperature * m

    def split(self, options):
        """(its parameters, the other options)."""
        own = {k: v for k, v in options.items() if k in PARAMETERS}
        return own, {k: v for k, v in options.items() if k not in PARAMETERS}


PARAMETERS = ("gamma", "forward", "alpha", "beta", "threshold", "head")


def _mix():
    return 0.9 * o.drkl(0.5) + 0.1 * o.cross_entropy() + 1e-3 * o.z_loss()


def _all():
    return (
        0.4 * o.js_divergence(0.3) + 0.3 * o.forward_kl() + 0.2 * o.reverse_kl() - 0.1 * o.entropy()
    )


def _sum(*parts):
    return lambda r, **own: [pair for part in parts for pair in part(r)]


LOSSES = {
    "reverse_kl": Loss(o.reverse_kl, reverse_kl, "reverse_kl"),
    "drkl": Loss(o.drkl, drkl, "drkl", "must", lambda gamma=0.5: 1 + gamma, drkl_spread),
    "forward_kl": Loss(o.forward_kl, forward_kl, "forward_kl", spread=with_teacher(1)),
    "mixed_kl": Loss(o.mixed_kl, _sum(reverse_kl, forward_kl), "mixed_kl", spread=with_teacher(1)),
    "dkd": Loss(o.dkd, dkd, "dkd", "must", lambda alpha=1.0, beta=8.0: alpha + beta, dkd_spread),
    "cross_entropy": Loss(o.cross_entropy, cross_entropy, "cross_entropy", "must"),
    "z_loss": Loss(o.z_loss, z_loss),
    "entropy": Loss(o.entropy, entropy),
    "adaptive_kl": Loss(o.adaptive_kl, adaptive_kl, "adaptive_kl", weights=lambda **_: 2.0),
    "gated_kl": Loss(o.gated_kl, _sum(reverse_kl, forward_kl), weights=lambda **_: 2.0),
    "js_divergence": Loss(o.js_divergence, mixtures, "js_divergence"),
    "skew_kl": Loss(o.skew_kl, mixtures, "skew_kl"),
    "skew_reverse_kl": Loss(o.skew_reverse_kl, mixtures, "skew_reverse_kl"),
    "total_variation": Loss(o.total_variation, total_variation, "total_variation"),
    "alpha_beta": Loss(
        partial(o.alpha_beta, 0.6, 0.3), alpha_beta, weights=lambda **_: 3 / (0.6 * 0.3)
    ),
    "alpha_beta (beta 0)": Loss(
        partial(o.alpha_beta, 0.7, 0), partial(alpha_beta, alpha=0.7, beta=0),
        weights=lambda **_: 4.0,
    ),
    "alpha_beta (alpha 0)": Loss(
        partial(o.alpha_beta, 0, 0.7), partial(alpha_beta, alpha=0, beta=0.7),
        weights=lambda **_: 4.0,
    ),
    "drkl + cross_entropy": Loss(
        _mix, _sum(drkl, cross_entropy, z_loss), labels="must", weights=lambda **_: 1.5
    ),
    "drkl (skewed teacher)": Loss(
        lambda gamma=0.5: o.skewed_teacher(o.drkl(gamma), 0.1), drkl, labels="must",
        weights=lambda gamma=0.5: 1 + gamma, spread=drkl_spread, skew=0.1,
    ),
    "kls (skewed teacher)": Loss(
        lambda: o.skewed_teacher(0.7 * o.reverse_kl() + 0.3 * o.forward_kl(), 0.4),
        _sum(reverse_kl, forward_kl), skew=0.4,
    ),
    "js + kl - entropy": Loss(_all, _sum(mixtures, forward_kl, reverse_kl, entropy)),
}  # fmt: skip

# (name, with labels); labels make no other code run where a loss only reads what they split
CASES = [(name, "must" == loss.labels) for name, loss in LOSSES.items()]
CASES += [
    (name, True) for name in ("reverse_kl", "forward_kl", "mixed_kl", "entropy", "js_divergence")
]
IDS = [name.replace(" ", "") + ("-labelled" if labelled else "") for name, labelled in CASES]


def call(module, name):
    """The loss as function(student, teacher, labels, **options), of drkl_triton or its
    reference.
    """
    loss = LOSSES[name]
    if name == "cross_entropy":
        return lambda s, t, y, **options: module.cross_entropy(s, y, **options)
    if loss.function:
        return getattr(module, loss.function)

    def function(student, teacher, labels, **options):
        own, options = loss.split(options)
        return module.divergence(loss.objective(**own), student, teacher, labels, **options)

    return function


ours = partial(call, drkl_triton)
truth = partial(call, reference)


def is_defined(name, student, teacher, labels, temperature=1.0, head=0.5):
    """Whether float32 can tell which columns belong to the head of adaptive_kl."""
    if name != "adaptive_kl":
        return True
    t = teacher.double()
    p, _ = reference.softmax(t, temperature=temperature).sort(-1, descending=True)
    before = p.cumsum(-1) - p
    last = torch.where(before < head, p, 1.0).amin(-1, keepdim=True)
    near = ((p - last).abs() < 1e-3 * last) & (p != last)
    return not (near.any() or ((before - head).abs() < 1e-3).any())


def condition(name, student, teacher, labels, upstream, *, temperature=1.0, **options):
    """(kappa, kappa'), [..., V] in float64: with and without the masses."""
    own, _ = LOSSES[name].split(options)
    row = Row(student, LOSSES[name].teacher(student, teacher, temperature), labels, temperature)
    scale = upstream.double().abs()[..., None] / temperature
    kappa, terms = 0.0, 0.0
    for mass, size in LOSSES[name].condition(row, **own):
        size = size * scale
        # 0 times what has overflowed: masks are the lowest finite number, here of any dtype
        kappa = kappa + torch.where(mass == 0, 0.0, mass * size)
        terms = terms + size
    return kappa, terms
