"""How far an implementation may be from the truth, in code:

    truth      drkl_triton.reference in float64 on the same inputs
    baseline   drkl_triton.reference in float32 (float64 inputs: float64), gradient rounded once
    gradients  |ours - truth| <= 2 |baseline - truth| + 8 eps kappa + 2 eps_out |truth|  elementwise
    losses     |ours - truth| <= 2 |baseline - truth| + 16 eps (1 + gamma) (1 + |truth|)

kappa is an element's condition: the absolute values of the terms it is made of, times 1 + |log q|
for the exponential.
"""

import torch

from drkl_triton import drkl, reference, reverse_kl

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
    function = getattr(reference, name)
    truth = run(function, student.double(), teacher.double(), labels, upstream, **options)
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    loss, grad = run(function, student.to(wide), teacher.to(wide), labels, upstream, **options)
    return truth, (loss.double(), grad.to(student.dtype).double())


def condition(name, student, teacher, labels, upstream, *, gamma=0.5, temperature=1.0, **_):
    """kappa [..., V] in float64."""
    s, t = student.double(), teacher.double()
    log_q, log_p = (reference.log_softmax(x, temperature=temperature) for x in (s, t))
    log_q, log_p = torch.where(s == -INF, 0.0, log_q), torch.where(t == -INF, 0.0, log_p)
    present = (s != -INF).double()
    rkl = (log_q.exp() * present * (log_q - log_p)).sum(-1, keepdim=True).abs()
    kappa = log_q.exp() * (log_q.abs() + log_p.abs() + rkl) * (1 + log_q.abs())
    if labels is not None:
        y = labels.clamp_min(0)[..., None]
        _, n, u = reference.split(s, t, y[..., 0], temperature)
        _, _, v = reference.split(t, t, y[..., 0], temperature)
        n, u, v = (torch.where(x.isfinite(), x, 0.0)[..., None] for x in (n, u, v))
        lq, lr = torch.nn.functional.logsigmoid(u), torch.nn.functional.logsigmoid(-u)
        logs = lq.abs() + lr.abs()
        pull = (lq + lr).exp() * (logs + v.abs()) * (1 + logs)
        if name == "drkl":
            lqh, lph = log_q - lr, log_p - torch.nn.functional.logsigmoid(-v)
            terms = gamma * (lqh.abs() + lph.abs() + n) + pull
            kappa = lqh.exp() * terms * (1 + lqh.abs())
            at_label = pull
        else:
            at_label = pull + (lq + lr).exp() * n * (1 + logs)
        kappa = kappa.scatter(-1, y, at_label)
    return kappa * present * upstream.double().abs()[..., None] / temperature


def excess(name, student, teacher, labels, upstream, *, backend, **options):
    """(loss, gradient): the largest error over its bound; right means both are at most 1."""
    ours_fn = {"drkl": drkl, "reverse_kl": reverse_kl}[name]
    inputs = (student, teacher, labels, upstream)
    (loss, grad), (loss_b, grad_b) = truth_and_baseline(name, *inputs, **options)
    ours_loss, ours_grad = run(ours_fn, *inputs, backend=backend, **options)
    eps = torch.finfo(ours_loss.dtype).eps
    out = torch.finfo(student.dtype)
    gamma = options.get("gamma", 0.5) if name == "drkl" else 1.0

    loss_bound = 2 * (loss_b - loss).abs() + 16 * eps * (1 + gamma) * (1 + loss.abs())
    kappa = condition(name, *inputs, **options)
    denormal = out.smallest_normal * out.eps + torch.finfo(ours_loss.dtype).smallest_normal
    grad_bound = 2 * (grad_b - grad).abs() + 8 * eps * kappa + 2 * out.eps * grad.abs() + denormal
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
