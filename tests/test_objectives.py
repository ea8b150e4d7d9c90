"""Divergences as objects: their algebra, those that users write, their edges, what they cost."""

import copy
import itertools
import math
import pickle
from functools import partial

import losses
import pytest
import selection
import torch
from bounds import excess, linear_excess, linear_ours, run, run_linear
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import drkl_triton
from drkl_triton import _loss, divergence, objectives, ops, reference
from drkl_triton.objectives import Slopes, pointwise, separable, tl

INF = float("inf")
V = 37


def data(*shape, dtype=torch.float64):
    s, t = 3 * torch.randn(*shape, V, dtype=dtype), 3 * torch.randn(*shape, V, dtype=dtype)
    return s, t, torch.randint(V, shape)


# --- slopes ---


@pytest.mark.parametrize("name", losses.LOSSES)
def test_slopes_are_derivatives(name):
    objectives.check(losses.LOSSES[name].objective())


@separable
def jeffreys(f):
    """KL(p || q) + KL(q || p), as a user would write it."""
    r, k = objectives.reverse_kl(f), objectives.forward_kl(f)
    return Slopes(r.loss + k.loss, r.u, k.log_q, k.log_rest, qp=r.qp, pq=k.pq)


@pointwise(positive=("order",))
def squared_hellinger(log_q, log_p, order=2.0):
    """1 - sum sqrt(p q), written as a sum that is 0 where both are."""
    q, both = tl.exp(log_q), tl.exp((log_q + log_p) / order)
    return (q - both), q - both / order


@separable
def wrong_separable(f):
    return Slopes(-f.log_q, log_q=-1.0, entropy=f.entropy)


@pointwise
def wrong_pointwise(log_q, log_p):
    return tl.exp(log_q), 2.0 * tl.exp(log_q)


@pointwise
def not_zero(log_q, log_p):
    return tl.exp(log_q) + 1.0, tl.exp(log_q)


def test_wrong_slopes_are_found():
    with pytest.raises(ValueError, match="wrong_separable: the slope by entropy is .* where .* 0"):
        objectives.check(wrong_separable())
    with pytest.raises(ValueError, match="wrong_pointwise: the slope by log_q"):
        objectives.check(wrong_pointwise())
    with pytest.raises(ValueError, match="phi must be 0 where both"):
        objectives.check(not_zero())
    with pytest.raises(TypeError, match="call it first"):
        objectives.check(objectives.drkl)


@pytest.mark.parametrize(
    "make", [jeffreys, squared_hellinger, lambda: 0.5 * jeffreys() + squared_hellinger()]
)
@pytest.mark.parametrize("labelled", [False, True])
def test_divergences_of_users(make, labelled, backend):
    objective = make()
    objectives.check(objective)
    s, t, y = data(6)
    s[0, 3:9] = t[0, 3:9] = -INF
    y[0] = 1
    upstream = torch.linspace(-1, 2, 6)
    options = dict(labels=y if labelled else None, temperature=0.7)

    def call(module, **more):
        return run(lambda s, t, _, **o: module.divergence(objective, s, t, **options, **o), s, t,
                   None, upstream, **more)  # fmt: skip

    for ours, truth in zip(call(drkl_triton, backend=backend), call(reference), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)


def test_jeffreys_is_the_sum_of_both(backend):
    s, t, y = data(5)
    both = objectives.forward_kl() + objectives.reverse_kl()
    one, other = (divergence(x, s, t, y, backend=backend) for x in (jeffreys(), both))
    assert one.item() == pytest.approx(other.item(), rel=1e-14)


# --- algebra ---


def test_sums_and_multiples(backend):
    s, t, y = data(2, 3)
    o = objectives
    parts = [o.drkl(0.3), o.cross_entropy(), o.js_divergence(0.2)]
    values = torch.stack([divergence(p, s, t, y, backend=backend) for p in parts])
    weights = torch.tensor([0.5, 2.0, -0.25], dtype=torch.float64)
    for objective in (
        0.5 * parts[0] + parts[1] * 2 - 0.25 * parts[2],
        sum(w * p for w, p in zip(weights, parts, strict=True)),
        (parts[0] + 4 * parts[1] - parts[2] / 2) / 2,
        -(0.25 * parts[2] - 2 * parts[1] - 0.5 * parts[0]),
    ):
        loss = divergence(objective, s, t, y, backend=backend)
        assert loss.item() == pytest.approx((weights @ values).item(), rel=1e-12)
    assert repr(0.9 * o.drkl(gamma=0.5) + o.reverse_kl()) == (
        "0.9 * drkl(gamma=0.5) + reverse_kl()"
    )


@pytest.mark.parametrize("linear", [False, True])
def test_parameters_may_be_one_per_token(linear, backend):
    s, t, y = data(2, 4)
    gamma, weight = 0.1 + torch.rand(2, 4), torch.rand(2, 4)
    objective = objectives.drkl(gamma) + weight * objectives.cross_entropy()
    options = dict(labels=y, shift=True, reduction="none", backend=backend)
    y[1, 2] = -100
    if linear:
        matrix = torch.randn(V, 5, dtype=torch.float64)
        hidden = torch.randn(2, 4, 5, dtype=torch.float64)
        s = hidden @ matrix.T
        loss = drkl_triton.linear_divergence(objective, hidden, matrix, teacher_logits=t, **options)
    else:
        loss = divergence(objective, s, t, **options)
    for row in range(2):
        for i in range(4):
            counts = i < 3 and y[row, i + 1] != -100
            expected = 0.0
            if counts:  # the token that is scored is the next one
                args = s[row, i], t[row, i], y[row, i + 1]
                expected = drkl_triton.drkl(*args, gamma=gamma[row, i + 1].item()).item()
                entropy = drkl_triton.cross_entropy(s[row, i], y[row, i + 1]).item()
                expected += weight[row, i + 1].item() * entropy
            assert loss[row, i].item() == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_an_objective_may_be_copied_and_pickled():
    s, t, y = data(4)
    module = drkl_triton.DivergenceLoss(0.9 * objectives.drkl(0.4) + 0.1 * jeffreys(), shift=False)
    expected = module(s, t, y)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(s, t, y), expected)
    assert "0.9 * drkl(gamma=0.4) + 0.1 * jeffreys()" in repr(module)


def test_limits_of_the_families(backend):
    s, t, y = data(5)
    run = lambda f, **o: f(s, t, backend=backend, **o)  # noqa: E731
    d = drkl_triton
    assert torch.equal(run(d.js_divergence, beta=0), run(d.forward_kl))
    assert torch.equal(run(d.js_divergence, beta=1.0), run(d.reverse_kl))
    forward, reverse = run(d.forward_kl).item(), run(d.reverse_kl).item()
    assert run(d.mixed_kl, forward=0.25).item() == pytest.approx(0.25 * forward + 0.75 * reverse)
    assert run(d.alpha_beta, alpha=1, beta=0).item() == pytest.approx(forward)
    assert run(d.alpha_beta, alpha=0, beta=1).item() == pytest.approx(reverse)
    for alpha, beta in ((0.7, 0), (0, 0.7), (0.6, -0.6), (0, 0)):
        near = run(d.alpha_beta, alpha=alpha + 1e-5, beta=beta + 2e-5).item()
        assert run(d.alpha_beta, alpha=alpha, beta=beta).item() == pytest.approx(near, rel=1e-3)
    # a factor 1 / alpha, which is easily lost, is there
    p = t.softmax(-1) ** 0.5
    q = s.softmax(-1) ** 0.5
    by_hand = 4 * (p * (p / q).log() - p + q).sum(-1).mean()
    assert run(d.alpha_beta, alpha=0.5, beta=0).item() == pytest.approx(by_hand.item())


def test_against_torch(backend):
    s, t, y = data(6)
    y[2] = -100
    ours = drkl_triton.cross_entropy(s, y, backend=backend)
    assert ours.item() == pytest.approx(F.cross_entropy(s, y).item())
    ours = divergence(objectives.z_loss(), s, labels=y, backend=backend)
    kept = y != -100
    assert ours.item() == pytest.approx((torch.logsumexp(s, -1) ** 2)[kept].mean().item())
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="sum") / 6
    assert drkl_triton.forward_kl(s, t, backend=backend).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("temperature", [2.0, torch.tensor(2.0)], ids=["number", "tensor"])
@pytest.mark.parametrize("linear", [False, True])
def test_cross_entropy_and_z_loss_are_at_temperature_1(temperature, linear, backend):
    s, t, y = data(5)
    mix = 0.5 * objectives.forward_kl() + objectives.cross_entropy() + 0.1 * objectives.z_loss()
    matrix = torch.randn(V, 6, dtype=torch.float64)
    hidden = torch.randn(5, 6, dtype=torch.float64).requires_grad_()
    options = dict(labels=y, temperature=temperature)
    if linear:
        loss = drkl_triton.linear_divergence(
            mix, hidden, matrix, teacher_logits=t, backend=backend, **options
        )
    else:
        loss = divergence(mix, hidden @ matrix.T, t, backend=backend, **options)
    x = hidden.detach().requires_grad_()
    s = x @ matrix.T
    truth = F.cross_entropy(s, y) + 0.1 * (torch.logsumexp(s, -1) ** 2).mean()
    truth = truth + 0.5 * reference.forward_kl(s, t, **options)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-12)
    (ours,), (expected,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(truth, x)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("linear", [False, True])
def test_a_skewed_teacher_is_the_constant_mixture(linear, backend):
    """Computed as such, with a skew of its own for each token; the label's column included."""
    s, t, y = data(2, 5)
    skew = torch.rand(2, 5, dtype=torch.float64) * 0.8 + 0.1
    mixture = (skew[..., None] * s.softmax(-1) + (1 - skew[..., None]) * t.softmax(-1)).log()
    options = dict(reduction="none", backend=backend)
    for objective, named in (
        (objectives.drkl(0.3), partial(drkl_triton.drkl, gamma=0.3, skew=skew)),
        (
            objectives.reverse_kl(),
            partial(drkl_triton.skew_reverse_kl, alpha=skew, detach_mixture=True),
        ),
    ):
        expected = run(partial(reference.divergence, objective), s, mixture, y, torch.ones(2, 5))
        found = [run(named, s, t, y, torch.ones(2, 5), backend=backend)]
        if linear:
            eye, x = torch.eye(V, dtype=torch.float64), s.clone().requires_grad_()
            skewed = objectives.skewed_teacher(objective, skew)
            loss = drkl_triton.linear_divergence(skewed, x, eye, y, teacher_logits=t, **options)
            found = [(loss.detach(), torch.autograd.grad(loss.sum(), x)[0])]
        for ours, right in zip(found[0], expected, strict=True):
            torch.testing.assert_close(ours, right)


def test_a_gate_by_the_teachers_entropy(backend):
    s, t, _ = data(40)
    t[::2] *= 0.2
    _, metrics = drkl_triton.reverse_kl(s, t, backend=backend, return_metrics=True)
    threshold = metrics.teacher_entropy.median().item()
    sure = metrics.teacher_entropy <= threshold
    options = dict(reduction="none", backend=backend)
    loss = divergence(objectives.gated_kl(threshold, forward=0.3), s, t, **options)
    reverse, forward = (
        f(s, t, **options) for f in (drkl_triton.reverse_kl, drkl_triton.forward_kl)
    )
    torch.testing.assert_close(loss, torch.where(sure, reverse, reverse + 0.3 * forward))


# --- edges ---


S, T = [0.3, -1.0, 2.0, 0.7, 0.1], [1.3, 0.0, -0.4, 0.2, 0.9]
FORWARD = ["forward_kl", "mixed_kl", "dkd"]
FINITE = ["js_divergence", "skew_kl", "skew_reverse_kl", "total_variation"]


def without(row, *columns):
    return [-INF if k in columns else x for k, x in enumerate(row)]


def one(name, s, t, y, implementation):
    function = losses.truth(name) if implementation == "reference" else losses.ours(name)
    options = {} if implementation == "reference" else {"backend": implementation}
    s, t = torch.tensor([s]), torch.tensor([t])
    loss, grad = run(function, s, t, torch.tensor([y]), torch.tensor([1.5]), **options)
    return loss.item(), grad[0]


@pytest.fixture(params=["tiled", "triton", "reference"])
def implementation(request):
    return request.param


def test_total_variation_has_its_sign_at_any_probability(backend):
    """Where the difference is below the smallest float32, too."""
    s = torch.tensor([[0.0, 0.5, -89.2, -300.0]]).double().requires_grad_()
    t = torch.tensor([[0.0, 0.9, -89.5, -200.0]]).double()
    loss = drkl_triton.total_variation(s, t, backend=backend, reduction="sum")
    (grad,) = torch.autograd.grad(loss, s)
    q, p = s.detach().softmax(-1), t.softmax(-1)
    slope = torch.tensor([0.5, -0.5, 0.5, -0.5]).double()
    right = q * (slope - (q * slope).sum())
    torch.testing.assert_close(grad, right, rtol=1e-9, atol=0)
    torch.testing.assert_close(loss, 0.5 * (q - p).abs().sum(), rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("column", [1, 2])  # 2 is the label
def test_student_excludes_what_the_teacher_allows(name, column, implementation):
    loss, grad = one(name, without(S, column), T, 2, implementation)
    assert loss == INF and (grad == 0).all()


@pytest.mark.parametrize("name", ["forward_kl", "dkd"])
def test_forward_where_the_teacher_excludes(name, implementation):
    loss, grad = one(name, S, without(T, 1, 4), 2, implementation)
    q = torch.tensor(S).softmax(0)
    assert math.isfinite(loss) and (grad[[1, 4]] > 0).all()
    if name == "forward_kl":
        torch.testing.assert_close(grad[[1, 4]], 1.5 * q[[1, 4]])
    loss, grad = one(name, S, without(T, 0, 1, 3, 4), 2, implementation)  # the label is all
    if name == "forward_kl":
        assert loss == pytest.approx(-q[2].log().item(), rel=1e-5)


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("column", [1, 2])
@pytest.mark.parametrize("who", ["student", "teacher", "both"])
def test_where_nothing_is_infinite(name, column, who, implementation):
    s = without(S, column) if who != "teacher" else S
    t = without(T, column) if who != "student" else T
    loss, grad = one(name, s, t, 2, implementation)
    assert 0 < loss < 20 and grad.isfinite().all()
    if who != "teacher":
        assert grad[column] == 0


def test_cross_entropy_of_an_excluded_label(implementation):
    loss, grad = one("cross_entropy", without(S, 2), T, 2, implementation)
    assert loss == INF and (grad == 0).all()
    loss, grad = one("cross_entropy", without(S, 0, 1, 3, 4), T, 2, implementation)
    assert loss == 0 and (grad == 0).all()


def test_a_z_loss_of_the_label_alone(backend):
    loss, grad = one("z_loss", without(S, 0, 1, 3, 4), T, 2, backend)
    assert loss == pytest.approx(S[2] ** 2)
    assert grad.tolist() == pytest.approx([0, 0, 2 * S[2] * 1.5, 0, 0])


@pytest.mark.parametrize("name, labelled", losses.CASES, ids=losses.IDS)
def test_broken_rows_are_nan_and_only_they(name, labelled, backend, monkeypatch):
    """NaN and +inf of the student, of the teacher, at the label and beside it, among good rows."""
    monkeypatch.setattr(_loss, "SWEEPS", 2)  # of adaptive_kl: as good here
    broken = [*itertools.product((0, 1), (1, 2), (float("nan"), INF))]
    count = 2 * len(broken) + 1
    y, upstream = torch.full((count,), 2) if labelled else None, torch.arange(1.0, count + 1)
    # of 16 columns: the end of an array that is no whole vector may round otherwise
    rows = [torch.tensor([[*x, *[-3.0] * 11]] * count) for x in (S, T)]
    clean = run(losses.ours(name), *rows, y, upstream, backend=backend)
    is_nan = torch.zeros(count, dtype=torch.bool)
    for i, (who, column, bad) in enumerate(broken):
        rows[who][2 * i + 1, column] = bad
        is_nan[2 * i + 1] = who == 0 or losses.LOSSES[name].objective().needs_teacher
    value, grad = run(losses.ours(name), *rows, y, upstream, backend=backend)
    assert torch.equal(value.isnan(), is_nan)
    assert torch.equal(grad.isnan(), is_nan[:, None].expand_as(grad))
    assert torch.equal(value[~is_nan], clean[0][~is_nan])
    assert torch.equal(grad[~is_nan], clean[1][~is_nan])


@pytest.mark.parametrize("name, labelled", losses.CASES, ids=losses.IDS)
def test_masks_that_both_share(name, labelled, backend):
    """Also written with the lowest finite number, and in rows of several tiles."""
    s, t, upstream = torch.randn(4, 3000), torch.randn(4, 3000), torch.randn(4)
    masked = torch.zeros(4, 3000, dtype=torch.bool)
    masked[0, 2000:], masked[1, ::3], masked[2, :2500] = True, True, True
    y = torch.tensor([0, 1, 2999, 5]) if labelled else None
    low = torch.finfo(torch.float32).min
    for fill in (-INF,) if "alpha_beta" in name else (-INF, low):
        x, z = s.masked_fill(masked, fill), t.masked_fill(masked, fill)
        assert max(excess(name, x, z, y, upstream, backend=backend)) <= 1, fill


@pytest.mark.parametrize(
    "name", ["js_divergence", "skew_kl", "skew_reverse_kl", "js + kl - entropy"]
)
def test_columns_whose_probabilities_are_nearly_0(name, backend):
    """They are not yet: a gap of 1 % counts at 1e-301, too."""
    x = torch.tensor([[0.0, -691.5, -688.5, -681.5, -346.0]] * 2, dtype=torch.float64)
    z = x + torch.tensor([0.0, 0.01, -0.01, 0.02, 0.01])
    upstream = torch.tensor([1.0, -0.7], dtype=torch.float64)
    assert max(excess(name, x, z, torch.tensor([0, 0]), upstream, backend=backend)) <= 1


# --- costs ---


def test_a_mixture_costs_no_more_than_its_dearest_term(monkeypatch):
    """Kernels that read logits, and what they sum."""
    seen = []
    for name in ("row_sums", "row_phi", "row_grad"):
        module = __import__(f"drkl_triton.kernels.{name}", fromlist=["x"])
        kernel = getattr(module, f"{name}_kernel")

        class Spy:
            def __init__(self, kernel, name):
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                def launch(*args, **flags):
                    seen.append((self.name, flags.get("NEEDS", flags.get("SLOPES"))))
                    return self.kernel[grid](*args, **flags)

                return launch

        monkeypatch.setattr(module, f"{name}_kernel", Spy(kernel, name))
    s, t, y = data(3)

    def launched(objective):
        seen.clear()
        divergence(objective, s.requires_grad_(), t, y, backend="triton").backward()
        return list(seen)

    o = objectives
    alone = launched(o.drkl())
    assert [name for name, _ in alone] == ["row_sums", "row_grad"]
    assert launched(0.9 * o.drkl() + 0.1 * o.cross_entropy() + 1e-4 * o.z_loss()) == alone
    forward = launched(o.forward_kl())
    assert launched(o.dkd()) == forward and forward != alone
    assert [name for name, _ in launched(o.js_divergence() + o.drkl())] == [
        "row_sums",
        "row_phi",
        "row_grad",
    ]


def test_a_teacher_that_no_term_reads_is_not_read(backend):
    s, t, y = data(4)
    nothing = torch.full_like(t, float("nan"))
    expected = drkl_triton.cross_entropy(s, y, backend=backend)
    assert torch.equal(
        divergence(objectives.cross_entropy(), s, nothing, y, backend=backend), expected
    )
    _, metrics = drkl_triton.cross_entropy(s, y, backend=backend, return_metrics=True)
    assert metrics.teacher_entropy is None and metrics.target_kl is None
    assert metrics.student_target_prob.isfinite().all()
    _, metrics = divergence(
        objectives.cross_entropy(), s, t, y, backend=backend, return_metrics=True
    )
    assert metrics.target_kl.isfinite().all()


# --- errors ---


def test_errors():
    s, t, y = data(3)
    o = objectives
    with pytest.raises(TypeError, match="dkd and cross_entropy needs? labels"):
        divergence(o.dkd() + o.cross_entropy(), s, t)
    with pytest.raises(TypeError, match="objective must be an Objective"):
        divergence(o.drkl, s, t, y)
    with pytest.raises(TypeError, match="reverse_kl must be given its options alone, got gamma"):
        drkl_triton.reverse_kl(s, t, gamma=0.5)
    with pytest.raises(ValueError, match="alpha must be between 0 and 1, got 1.5"):
        o.skew_kl(1.5)
    with pytest.raises(ValueError, match="gamma must be positive"):
        o.drkl(-1.0)
    with pytest.raises(TypeError, match="takes the parameters"):
        o.drkl(delta=1.0)
    with pytest.raises(TypeError, match="needs the parameter beta"):
        o.jensen_shannon()
    with pytest.raises(ValueError, match="gamma must be .* leading shape .* got \\(2,\\)"):
        divergence(o.drkl(torch.ones(2)), s, t, y)
    with pytest.raises(TypeError, match="teacher_logits must be a torch.Tensor"):
        divergence(o.reverse_kl(), s)
    with pytest.raises(ValueError, match='support="teacher" leaves out'):
        drkl_triton.cross_entropy(s, y, support="teacher")
    with pytest.raises(ValueError, match="requires grad"):
        o.drkl(torch.tensor(0.5, requires_grad=True))
    with pytest.raises(ValueError, match="no divergence is registered as 'nothing'"):
        ops.program("nothing")
    with pytest.raises(ValueError, match="has no parameters"):
        separable(lambda f: Slopes(f.u), positive=("gamma",))
    with pytest.raises(TypeError, match="must return Slopes"):
        separable(lambda f: f.u)
    with pytest.raises(AttributeError, match="Facts have"):
        separable(lambda f: Slopes(f.nothing))
    with pytest.raises(ValueError, match="takes an objective with a plain teacher"):
        o.skewed_teacher(o.cross_entropy(), 0.1)
    with pytest.raises(ValueError, match="takes separable divergences"):
        o.skewed_teacher(o.js_divergence() + o.drkl(), 0.1)
    with pytest.raises(ValueError, match="skew must be between 0 and 1, got 1.0"):
        drkl_triton.drkl(s, t, y, skew=1.0)
    skewed = o.skewed_teacher(o.drkl(), 0.1)
    with pytest.raises(ValueError, match="got skews 0.1 and None"):
        skewed + o.forward_kl()
    with pytest.raises(ValueError, match="takes an objective with a plain teacher"):
        o.skewed_teacher(skewed + o.cross_entropy(), 0.1)


# --- compiled ---


def compiled(function):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", losses.LOSSES)
def test_every_loss_compiles_whole(name, fresh_compiler):
    s, t, y = data(4, dtype=torch.float32)
    y[1] = -100
    upstream = torch.linspace(-1, 1, 4)
    function, counter = compiled(losses.ours(name))
    for found, expected in zip(
        run(function, s, t, y, upstream), run(losses.ours(name), s, t, y, upstream), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_new_parameters_and_weights_do_not_recompile(fresh_compiler):
    s, t, y = data(4, dtype=torch.float32)

    def step(s, t, y, gamma, weight, beta, temperature):
        o = objectives
        mix = o.drkl(gamma) + weight * o.cross_entropy() + o.jensen_shannon(beta)
        return divergence(mix, s, t, y, temperature=temperature)

    function, counter = compiled(step)
    for k in range(4):
        numbers = (0.3 + k, 0.1 * k, 0.2 + 0.1 * k, 1.5 + k)
        tensors = [torch.tensor(x) for x in numbers]
        expected = step(s, t, y, *numbers)
        torch.testing.assert_close(function(s, t, y, *tensors), expected)
    assert counter.frame_count == 1
    function, counter = compiled(step)
    for k in range(4):
        numbers = (0.3 + k, 0.1 + 0.1 * k, 0.2 + 0.1 * k, 1.5 + k)
        torch.testing.assert_close(function(s, t, y, *numbers), step(s, t, y, *numbers))
    assert counter.frame_count <= 2  # numbers become symbols when they first change


# --- from hidden states ---


COLUMNS = (2, 37, 301, 4097, 50257, 151936) if selection.ALL else (301,)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(
    "backend, dtype, name, labelled",
    selection.over_losses([torch.float32, torch.bfloat16, torch.float16]),
)
def test_from_hidden_states_within_the_bound(backend, columns, dtype, name, labelled, request):
    if columns > 10_000:
        request.getfixturevalue("wide_tiles")
    N, H = 12 if columns < 1000 else 4, 8
    draw = torch.Generator().manual_seed(1)

    def model(scale):
        hidden = torch.randn(N, H, generator=draw)
        matrix, bias = scale * torch.randn(columns, H, generator=draw), torch.randn(columns)
        return tuple(x.to(dtype) for x in (hidden, matrix, bias)) + (1.0, None)

    student, teacher = model(0.7), model(1.0)
    y = torch.randint(columns, (N,), generator=draw) if labelled else None
    upstream = torch.randn(N, generator=draw)
    ours = run_linear(
        linear_ours(name, backend, reduction="none", chunk_bytes=5 * columns * 8),
        student,
        teacher,
        y,
        upstream,
    )
    assert max(linear_excess(name, student, teacher, y, upstream, ours=ours)) <= 1
