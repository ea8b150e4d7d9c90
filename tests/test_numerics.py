"""Errors against float64, element by element, for the tiled backend and the interpreted kernels
(bounds.py).
"""

from functools import lru_cache

import bounds
import losses
import mpmath
import pytest
import selection
import torch
from bounds import INF, excess, ratio
from torch.autograd import gradcheck

import drkl_triton
from drkl_triton import drkl, reference
from drkl_triton.kernels import tuning

# one tile holds 1024 columns of bfloat16, 512 of float32
VOCABULARIES = [
    2,  # head and tail only
    37,  # one partial tile
    4097,  # some tiles and a tail of one
    50257,  # GPT-2: odd, so every row starts at another distance from a 16-byte boundary
    151936,  # Qwen: long rows, few of them, so they are split over programs
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
over_losses = pytest.mark.parametrize("name, labelled", losses.CASES, ids=losses.IDS)


def generator(seed):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


@lru_cache(maxsize=4)
def regimes(V, dtype):
    """(student, teacher, labels, upstream): one row a regime; the upstream gradient is random,
    never ones.
    """
    draw = generator(V)
    s, t = (torch.randn(7, V, generator=draw) for _ in range(2))
    y = torch.randint(V, (7,), generator=draw)
    s[0], t[0] = 0.01 * s[0], 0.01 * t[0]  # flat
    s[1], t[1] = 10 * s[1], 10 * t[1]  # peaked
    s[2], t[2] = 3 * s[2] + 700, 3 * t[2] - 700  # the two models' logits at different heights
    s[3], t[3] = 3 * s[3] - 700, 3 * t[3] + 700
    rest = s.scatter(1, y[:, None], -INF).logsumexp(1)
    s[4, y[4]] = rest[4] + 69  # 1 - q_y is 1e-30
    s[5, y[5]] = rest[5] - 69  # q_y is 1e-30
    t[6] = s[6]  # q = p but for rounding
    return s.to(dtype), t.to(dtype), y, torch.randn(7, generator=draw)


LONG = 10_000
ALWAYS = "reverse_kl", "drkl", "js_divergence"


def is_asked(backend, V, dtype, name, place):
    """Each dtype is with each size of row for these, and with each loss and each size for some."""
    if name in ALWAYS and (backend == "tiled" or V < LONG or name == "drkl"):
        return True
    if backend == "tiled":
        return V < 1e5 or selection.ALL or dtype == torch.bfloat16
    return selection.taken(dtype, DTYPES, place + VOCABULARIES.index(V))


GRID = [
    pytest.param(backend, V, dtype, *case, id=f"{backend}-{V}-{dtype}-{label}")
    for backend in ("tiled", "triton")
    for V in VOCABULARIES
    for dtype in DTYPES
    for place, (case, label) in enumerate(zip(losses.CASES, losses.IDS, strict=True))
    if is_asked(backend, V, dtype, case[0], place)
]


@pytest.mark.parametrize("backend, V, dtype, name, labelled", GRID)
def test_loss_and_gradient_within_bound(backend, V, dtype, name, labelled, request):
    if V > LONG:
        request.getfixturevalue("wide_tiles")
    s, t, y, upstream = regimes(V, dtype)
    loss, grad = excess(name, s, t, y if labelled else None, upstream, backend=backend)
    assert loss <= 1
    assert grad <= 1


@pytest.mark.parametrize("backend, temperature, name, labelled", selection.over_losses([0.5, 4.0]))
def test_temperature(backend, temperature, name, labelled):
    s, t, y, upstream = regimes(4097, torch.bfloat16)
    labels = y if labelled else None
    loss, grad = excess(name, s, t, labels, upstream, backend=backend, temperature=temperature)
    assert max(loss, grad) <= 1


@pytest.mark.parametrize("gamma", [1e-3, 1.0, 20.0])
def test_gamma(gamma, backend):
    s, t, y, upstream = regimes(4097, torch.float32)
    assert max(excess("drkl", s, t, y, upstream, backend=backend, gamma=gamma)) <= 1


@pytest.mark.parametrize("student", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("teacher", [torch.float16, torch.float32, torch.float64], ids=str)
def test_mixed_dtypes(student, teacher, backend):
    s, t, y, upstream = regimes(517, torch.float16)
    s, t = s.to(student), t.to(teacher)
    loss = drkl_triton.drkl(s, t, y, backend=backend)
    assert loss.dtype == torch.promote_types(torch.promote_types(student, teacher), torch.float32)
    loss, grad = excess("drkl", s, t, y, upstream, backend=backend)
    assert loss <= 1
    # float64: the truth is float64 autograd itself, whose own rounding is of the size of the bound
    assert grad <= (1 if torch.float64 not in (student, teacher) else 4)


@pytest.mark.parametrize("temperature", [0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_are_sure_of_a_column_far_down_the_row(dtype, temperature, backend, monkeypatch):
    """There log q - log p - KL is nearly 0, but a difference of large numbers if sums and gradient
    count from the first columns.
    """
    N = 200 if backend == "tiled" else 4
    draw = generator(3)
    s, t = (torch.randn(N, 5001, generator=draw) - 40 for _ in range(2))
    low, high = (5, 8) if dtype == torch.float32 else (11, 15)
    for x in (s, t):
        x[:, [1, 2100, 2600]] = 8 * torch.rand(N, 3, generator=draw) - 6  # of two parts, if split
        x[:, 3500] = low + (high - low) * torch.rand(N, generator=draw)
    # The last rows: both rise alike above what their own part begins with, but not above the row's.
    last = s[N // 2 :], t[N // 2 :]
    for x in last:
        x[:, [1, 2100, 2600]] = 0.0
        x[:, 3500] = low + 0.99 * (high - low) + 0.01 * torch.rand(len(x), generator=draw)
    last[1][:, [2100, 2600, 3500]] -= 3.0
    s, t = (temperature * s).to(dtype), (temperature * t).to(dtype)
    upstream = torch.randn(N, generator=draw)
    options = dict(backend=backend, temperature=temperature)
    choose = tuning.choose
    for splits in (1, 2) if backend == "triton" else (1,):
        monkeypatch.setattr(
            tuning, "choose", lambda *a, n=splits, **k: choose(*a, **k | {"splits": n})
        )
        for name, y in (("reverse_kl", None), ("drkl", torch.full((N,), 17))):
            assert max(excess(name, s, t, y, upstream, **options)) <= 1, (name, splits)


# adaptive_kl's weights and a skewed teacher move with the student and have no gradient
CONSTANTS = {"adaptive_kl", *(name for name, loss in losses.LOSSES.items() if loss.skew)}


@pytest.mark.parametrize(
    "name, labelled", [case for case in losses.CASES if case[0] not in CONSTANTS]
)
def test_gradcheck(name, labelled, backend):
    # V = 19: head, one vector masked in the last tile, tail and label apart
    s = torch.randn(3, 19, dtype=torch.float64, requires_grad=True)
    t = torch.randn(3, 19, dtype=torch.float64)
    y = torch.tensor([0, 9, 18]) if labelled else None
    loss = losses.ours(name)
    call = lambda x: loss(x, t, y, temperature=1.5, reduction="none", backend=backend)  # noqa: E731
    assert gradcheck(call, s, fast_mode=backend == "triton")


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_gradcheck(name, backend):
    x = torch.randn(3, 19, dtype=torch.float64, requires_grad=True)
    call = lambda x: getattr(drkl_triton, name)(x, temperature=1.5, backend=backend)  # noqa: E731
    assert gradcheck(call, x, fast_mode=backend == "triton")


# the longest rows in one dtype
SOFTMAX_CASES = [(V, d) for V in VOCABULARIES for d in DTYPES if V < 1e5 or d == torch.bfloat16]


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("V, dtype", SOFTMAX_CASES, ids=str)
def test_softmax_within_bound(V, dtype, name, backend, request):
    if V > 1e4:
        request.getfixturevalue("wide_tiles")
    x, _, _, _ = regimes(V, dtype)
    g = torch.randn(x.shape).to(dtype)
    wide = torch.float32

    def run(function, x, g, **options):
        x = x.detach().requires_grad_()
        y = function(x, temperature=2.0, **options)
        return y.detach(), torch.autograd.grad(y, x, g)[0]

    y, dx = run(getattr(drkl_triton, name), x, g, backend=backend)
    assert y.dtype == dx.dtype == dtype
    truth, dtruth = run(getattr(reference, name), x.double(), g.double())
    base, dbase = (
        z.to(dtype).double() for z in run(getattr(reference, name), x.to(wide), g.to(wide))
    )

    eps, out = torch.finfo(wide).eps, torch.finfo(dtype)
    log_p = reference.log_softmax(x.double(), temperature=2.0)
    p, g = log_p.exp(), g.double().abs()
    if name == "softmax":
        kappa, dkappa = (
            p * (1 + log_p.abs()),
            p * (g + (p * g).sum(-1, keepdim=True)) * (1 + log_p.abs()) / 2,
        )
    else:
        kappa, dkappa = 1 + log_p.abs(), (g + p * g.sum(-1, keepdim=True) * (1 + log_p.abs())) / 2
    floor = out.smallest_normal * out.eps + torch.finfo(wide).smallest_normal
    bound = 2 * (base - truth).abs() + 8 * eps * kappa + 2 * out.eps * truth.abs() + floor
    dbound = 2 * (dbase - dtruth).abs() + 8 * eps * dkappa + 2 * out.eps * dtruth.abs() + floor
    assert ratio(y, truth, bound) <= 1
    assert ratio(dx, dtruth, dbound) <= 1


def test_gradient_is_exactly_zero_where_the_distributions_agree(backend):
    s = torch.randn(3, 700).requires_grad_()
    for labels in (None, torch.tensor([0, 350, 699])):
        loss = drkl_triton.reverse_kl(s, s.detach(), labels, reduction="none", backend=backend)
        (grad,) = torch.autograd.grad(loss, s, torch.randn(3))
        assert (loss == 0).all()
        assert (grad == 0).all()


def test_a_row_that_float64_cannot_tell(backend):
    """Off the label the student is sure of one column: its gradient is minus what the others have,
    1e-33, while the logarithms that it is made of differ from 0 by less than eps64. By mpmath.
    """
    student = torch.tensor([[-724.0, -682.5, -753.0, -698.0, -663.875, -618.0]])
    teacher = torch.tensor([[-26.75, 25.25, -62.25, -14.5, 39.5, 96.5]])
    label, gamma, temperature = 5, 0.0625, 0.25
    with mpmath.workdps(60):
        s, t = (
            [mpmath.mpf(v) / mpmath.mpf(temperature) for v in x[0].tolist()]
            for x in (student, teacher)
        )
        rest = [k for k in range(len(s)) if k != label]
        log_sums = [mpmath.log(sum(mpmath.exp(x[k]) for k in rest)) for x in (s, t)]
        log_q, log_p = ({k: x[k] - z for k in rest} for x, z in zip((s, t), log_sums, strict=True))
        n = sum(mpmath.exp(log_q[k]) * (log_q[k] - log_p[k]) for k in rest)
        u, v = s[label] - log_sums[0], t[label] - log_sums[1]
        c = (u - v) * mpmath.exp(-u) / (1 + mpmath.exp(-u)) ** 2
        exact = [mpmath.exp(log_q[k]) * (gamma * (log_q[k] - log_p[k] - n) - c) for k in rest]
        exact.insert(label, c)
        exact = torch.tensor([float(g / temperature) for g in exact]).double()
    inputs = (student, teacher, torch.tensor([label]), torch.ones(1, dtype=torch.float64))
    options = {"gamma": gamma, "temperature": temperature}
    _, grad = bounds.run(drkl, *inputs, backend=backend, **options)
    assert exact.abs().max() > 1e-36  # float32 has it
    torch.testing.assert_close(grad[0].double(), exact, rtol=1e-5, atol=1e-38)
    (_, truth), _ = bounds.truth_and_baseline("drkl", *inputs, **options)
    assert (truth[0] - exact).abs().max() > 0.5 * exact.abs().max()
    assert max(bounds.excess("drkl", *inputs, backend=backend, **options)) <= 1
