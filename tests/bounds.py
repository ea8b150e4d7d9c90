"""How far an implementation may be from the truth, in code:

    truth      drkl_triton.reference in float64 on the same inputs
    baseline   drkl_triton.reference in float32 (float64 inputs: float64), gradient rounded once
    gradients  |ours - truth| <= 2 |baseline - truth| + 8 eps kappa + 2 eps_out |truth|
                                 + 2^-126 kappa'                                       elementwise
    losses     |ours - truth| <= 2 |baseline - truth| + 16 eps (1 + weights) (1 + |truth|)

kappa is an element's condition: the absolute values of the terms it is made of, times 1 + |log q|
for the exponential (losses.py); kappa' is the same without it, which a GPU makes 0 where it is
below float32's smallest normal number (``ex2.approx.ftz``). Beside it stands what the truth itself
is off: its log q (log q^ for DRKL), a difference of numbers of order 1, has an absolute error of
about eps64, where the exact one may be -1e-22 (``own_error``). tests/test_numerics.py has such a
row in 60 digits. A baseline that has overflowed to inf or NaN where the truth is finite allows
nothing.
"""

from functools import partial

import losses
import torch
from losses import LOSSES, condition

from drkl_triton import linear_divergence, linear_drkl, linear_reverse_kl, reference

INF = float("inf")


def run(function, student, teacher, labels, upstream, **options):
    """(per-row loss, gradient) of a loss with a random upstream gradient per row."""
    student = student.detach().requires_grad_()
    loss = function(student, teacher, labels, reduction="none", **options)
    (grad,) = torch.autograd.grad(loss, student, upstream.to(loss.dtype))
    return loss.detach(), grad


def truth_and_baseline(name, student, teacher, labels, upstream, **options):
    """Two (loss, gradient) pairs from the reference: in float64, and in float32 rounded to the
    student's dtype.
    """
    function = losses.truth(name)
    truth = run(function, student.double(), teacher.double(), labels, upstream, **options)
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    loss, grad = run(function, student.to(wide), teacher.to(wide), labels, upstream, **options)
    return truth, (loss.double(), grad.to(student.dtype).double())


def _allowed(baseline, truth):
    """Twice the baseline's error."""
    return (2 * (baseline - truth).abs()).nan_to_num(0.0, 0.0)


def own_error(name, student, teacher, labels, upstream, *, gamma=0.5, temperature=1.0, **_):
    """[..., V], of the gradient in float64."""
    s, weight = student.double(), 1.0
    if name == "drkl":
        s, weight = s.scatter(-1, labels.clamp_min(0)[..., None], -INF), gamma
    q = reference.softmax(s, temperature=temperature).nan_to_num(0.0)  # no column but the label's
    scale = weight * upstream.abs()[..., None] / temperature
    return 8 * torch.finfo(torch.float64).eps * q * scale


def excess(name, student, teacher, labels, upstream, *, backend, **options):
    """(loss, gradient): the largest error over its bound; right means both are at most 1."""
    inputs = (student, teacher, labels, upstream)
    ours = run(losses.ours(name), *inputs, backend=backend, **options)
    return excess_of(ours, name, *inputs, **options)


def excess_of(ours, name, student, teacher, labels, upstream, **options):
    """As ``excess``, of a (loss, gradient)."""
    inputs, (ours_loss, ours_grad) = (student, teacher, labels, upstream), ours
    (loss, grad), (loss_b, grad_b) = truth_and_baseline(name, *inputs, **options)
    eps = torch.finfo(ours_loss.dtype).eps
    out = torch.finfo(student.dtype)
    weights = LOSSES[name].weights(**LOSSES[name].split(options)[0])

    loss_bound = _allowed(loss_b, loss) + 16 * eps * (1 + weights) * (1 + loss.abs())
    kappa, flushed = condition(name, *inputs, **options)
    tiny = torch.finfo(ours_loss.dtype).smallest_normal
    grad_bound = _allowed(grad_b, grad) + 8 * eps * kappa + 2 * out.eps * grad.abs()
    grad_bound = grad_bound + out.smallest_normal * out.eps + tiny * (1 + flushed)
    grad_bound = grad_bound + own_error(name, *inputs, **options)
    return ratio(ours_loss, loss, loss_bound), ratio(ours_grad, grad, grad_bound)


def ratio(ours, truth, bound):
    """max |ours - truth| / bound; NaN and infinities must agree exactly, or it is inf."""
    ours = ours.double()
    finite = truth.isfinite()
    same = torch.where(finite, ours.isfinite(), (ours == truth) | (ours.isnan() & truth.isnan()))
    if not same.all():
        return INF
    if not finite.any():
        return 0.0
    return ((ours - truth).abs() / bound)[finite].max().item()


# --- from hidden states ---


def capped(x, softcap):
    return x if softcap is None else softcap * torch.tanh(x / softcap)


def logits_of(hidden, weight, bias=None, scale=1.0, softcap=None):
    """softcap(scale (hidden @ weight.T + bias)) in the dtype of the operands."""
    z = torch.nn.functional.linear(hidden, weight, bias)
    return capped(scale * z, softcap)


def run_linear(function, student, teacher, labels, upstream, **options):
    """(per-row loss, gradients of the student's tensors). function takes both models' heads,
    (hidden, weight, bias, scale, softcap), or the teacher's logits.
    """
    leaves = [None if x is None else x.detach().requires_grad_() for x in student[:3]]
    loss = function((*leaves, *student[3:]), teacher, labels, **options)
    wanted = [x for x in leaves if x is not None]
    return loss.detach(), torch.autograd.grad(loss, wanted, upstream.to(loss.dtype))


def linear_truth(name, student, teacher, labels, upstream, dtype, **options):
    """(per-row loss, gradients) of plain PyTorch: logits in ``dtype``, then the reference."""

    def function(student, teacher, labels):
        s = logits_of(*(_to(x, dtype) for x in student))
        t = teacher if isinstance(teacher, torch.Tensor) else logits_of(*teacher)
        return losses.truth(name)(s, t, labels, reduction="none", **options)

    student, teacher = (
        _to(x, dtype) if isinstance(x, torch.Tensor) else [_to(y, dtype) for y in x]
        for x in (student, teacher)
    )
    return run_linear(function, student, teacher, labels, upstream)


def _to(x, dtype):
    return x.to(dtype) if isinstance(x, torch.Tensor) else x


def linear_ours(name, backend, **options):
    """The public function, called with heads as above."""
    loss = LOSSES[name]
    own, options = loss.split(options)
    if name in ("drkl", "reverse_kl"):
        function = {"drkl": linear_drkl, "reverse_kl": linear_reverse_kl}[name]
        options |= own
    else:
        function = partial(linear_divergence, loss.objective(**own))

    def call(student, teacher, labels, **more):
        keys = ("hidden", "weight", "bias", "scale", "softcap")
        given = {f"student_{k}": x for k, x in zip(keys, student, strict=True)}
        if isinstance(teacher, torch.Tensor):
            given["teacher_logits"] = teacher
        else:
            given |= {f"teacher_{k}": x for k, x in zip(keys, teacher, strict=True)}
        hidden, weight = given.pop("student_hidden"), given.pop("student_weight")
        return function(hidden, weight, labels, **given, backend=backend, **options, **more)

    return call


def linear_excess(name, student, teacher, labels, upstream, *, ours, rounding=0.0, **options):
    """[loss, d hidden, d weight, ...]: the largest error over its bound; right means at most 1.

    ours: per-row losses and gradients of this package under ``upstream``. The bounds are those
    above, and what float32 costs before and after the loss:

        a logit is a sum of products and may be off by eps delta, where
        delta = |hidden| |weight|^T + |bias|;
        an element of the gradient of the logits moves by no more than its mass (1 + the terms of
        its own condition) times the row's largest delta; the products then sum condition and
        elements with absolute values.

    rounding: the relative error of rounding the gradient of the logits before these products, where
    that is done (to the 16 bits that tensor cores multiply).
    """
    inputs = (name, student, teacher, labels, upstream)
    loss, grads = linear_truth(*inputs, torch.float64, **options)
    wide = torch.promote_types(student[0].dtype, torch.float32)
    loss_b, grads_b = linear_truth(*inputs, wide, **options)
    ours_loss, ours_grads = ours
    eps, out = torch.finfo(ours_loss.dtype).eps, torch.finfo(student[0].dtype)
    hidden, weight, bias, scale, softcap = [_to(x, torch.float64) for x in student]

    z = scale * logits_of(hidden, weight, bias)
    s, delta_s = capped(z, softcap), _delta(*student)
    if isinstance(teacher, torch.Tensor):
        t, delta_t = teacher.double(), torch.zeros_like(delta_s)
    else:
        t = logits_of(*(_to(x, torch.float64) for x in teacher))
        delta_t = _delta(*teacher)
    delta = delta_s.amax(-1, keepdim=True) + delta_t.amax(-1, keepdim=True)
    kappa, g = linear_condition(name, s, t, labels, upstream, delta, **options)
    if softcap is not None:
        y = s / softcap
        kappa = kappa + g.abs() * (1 + y * y + 2 * y.abs() * delta_s / softcap)
        g = g * (1 - y * y)
    kappa, g = kappa.flatten(0, -2) * scale, g.flatten(0, -2).abs() * scale
    h, w = hidden.flatten(0, -2).abs(), weight.abs()
    # each element of the gradient counts itself, too: the products add up rounded terms
    terms = 8 * eps * (kappa + g) + rounding * g
    own = [(terms @ w).view(hidden.shape), terms.t() @ h, terms.sum(0)]

    gamma = options.get("gamma", 0.5) if name == "drkl" else 1.0
    p_and_q = reference.softmax(s) + reference.softmax(t)
    moved = (p_and_q * (1 + (s - t).abs().clamp_max(1e3))).sum(-1) * delta[..., 0]
    bound = 2 * (loss_b.double() - loss).abs() + 16 * eps * (1 + gamma) * (1 + loss.abs())
    ratios = [ratio(ours_loss, loss, bound + 8 * eps * moved)]
    denormal = out.smallest_normal * out.eps + torch.finfo(ours_loss.dtype).smallest_normal
    for ours_g, truth, base, o in zip(ours_grads, grads, grads_b, own, strict=False):
        base = base.to(student[0].dtype).double()
        o = o + 2 * out.eps * truth.abs() + denormal
        ratios.append(ratio(ours_g, truth, 2 * (base - truth).abs() + o))
    return ratios


def _delta(hidden, weight, bias, scale, softcap):
    """By how many eps a logit may be off: the terms it is the sum of."""
    h, w = hidden.double().abs(), weight.double().abs()
    return logits_of(h, w, None if bias is None else bias.double().abs(), scale)


def linear_condition(name, s, t, labels, upstream, delta, *, temperature=1.0, **options):
    """(kappa, gradient) of the logits, both [..., V]."""
    options["temperature"] = temperature
    _, g = run(losses.truth(name), s, t, labels, upstream, **options)
    kappa, _ = condition(name, s, t, labels, upstream, **options)
    mass = reference.softmax(s, temperature=temperature)
    if LOSSES[name].spread:
        t = LOSSES[name].teacher(s, t, temperature)
        mass = LOSSES[name].spread(s, t, labels, mass, temperature, options)
    mass = mass * upstream.double().abs()[..., None] / temperature
    return kappa + (kappa + mass) * delta / temperature, g
