"""Properties that hold for every input, tried on inputs that nobody chose.

`make test` tries a few of each, anew each time, and prints the seed; `make fuzz` thousands. To see
a failure again: --hypothesis-seed=N, or the @reproduce_failure line that is printed.
"""

import bounds
import losses
import pytest
import torch

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, assume, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import drkl_triton  # noqa: E402
from drkl_triton import (  # noqa: E402
    drkl,
    linear_drkl,
    linear_reverse_kl,
    reference,
    reverse_kl,
)

OPS = ["reverse_kl", "drkl"]
OURS = {"reverse_kl": reverse_kl, "drkl": drkl}
INF = float("inf")

# The fixtures of conftest.py may serve all the examples of a test.
properties = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    print_blob=True,
)
backends = st.sampled_from(["tiled", "tiled", "triton"])  # the interpreter is slow
dtypes = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
# one column; few; around a vector, a lane and a tile; odd and even
vocabularies = st.one_of(
    st.integers(1, 9),
    st.integers(10, 300),
    st.sampled_from([1023, 1024, 1025, 2049, 4095, 4097, 8200]),
)
seeds = st.integers(0, 2**32 - 1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


@st.composite
def rows(draw, dtype=None, vocabulary=vocabularies, masks=True):
    """Student and teacher logits [N, V] of any spread, distance and height, and what goes with
    them. The numbers come from a seed that is drawn.
    """
    g = generator(draw(seeds))
    N, V = draw(st.integers(1, 4)), draw(vocabulary)
    spread = draw(st.sampled_from([0.0, 1e-3, 1.0, 8.0, 60.0]))
    distance = draw(st.sampled_from([0.0, 1e-3, 1.0, 20.0]))
    height, teacher_height = (draw(st.sampled_from([0.0, 0.0, 700.0, -700.0])) for _ in range(2))
    student = spread * torch.randn(N, V, generator=g, dtype=torch.float64)
    teacher = student + distance * torch.randn(N, V, generator=g, dtype=torch.float64)
    student, teacher = student + height, teacher + teacher_height
    if masks and draw(st.booleans()):
        p = draw(st.sampled_from([0.02, 0.5, 0.98]))
        out = torch.rand(N, V, generator=g) < p
        out[:, int(torch.randint(V, (), generator=g))] = False  # a column is left
        student = student.masked_fill(out, -INF)
        if draw(st.booleans()):
            teacher = teacher.masked_fill(out, -INF)
    labels = torch.randint(V, (N,), generator=g)
    upstream = torch.randn(N, generator=g, dtype=torch.float64)
    dtypes_of = [draw(dtypes) if dtype is None else dtype for _ in range(2)]
    return student.to(dtypes_of[0]), teacher.to(dtypes_of[1]), labels, upstream


@pytest.mark.parametrize("op", losses.LOSSES)
@properties
@given(
    rows(),
    st.booleans(),
    st.sampled_from([0.05, 0.5, 3.0]),
    st.sampled_from([0.3, 1.0, 1.0, 5.0]),
    backends,
)
def test_equal_to_the_reference_within_the_bound(op, data, labelled, gamma, temperature, backend):
    student, teacher, labels, upstream = data
    options = {"temperature": temperature, "backend": backend}
    if op == "drkl":
        options["gamma"] = gamma
    elif not labelled and losses.LOSSES[op].labels != "must":
        labels = None
    if backend == "triton" and torch.bfloat16 in (student.dtype, teacher.dtype):
        # the interpreter truncates to bfloat16
        student = student.to(torch.float32)
    assume(losses.is_defined(op, student, teacher, labels, temperature))
    excess = bounds.excess(op, student, teacher, labels, upstream, **options)
    assert max(excess) <= 1, excess


SPECIAL = [float("nan"), INF, -INF, 3e38, -3e38, 0.0, -0.0, 1e-40]


@st.composite
def broken(draw):
    """Rows with any of SPECIAL anywhere, and labels that may be anything."""
    student, teacher, labels, upstream = draw(rows(vocabulary=st.integers(1, 40), masks=False))
    g = generator(draw(seeds))
    density = draw(st.sampled_from([0.03, 0.3, 0.9]))
    special = torch.tensor(draw(st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=4)))
    for x in (student, teacher):
        where = torch.rand(x.shape, generator=g) < density
        picked = special[torch.randint(len(special), x.shape, generator=g)]
        x[where] = picked.to(x.dtype)[where]
    labels[torch.rand(labels.shape, generator=g) < 0.3] = -100
    return student, teacher, labels, upstream


# z_loss squares 3e38; the limits of alpha-beta take -3e38 for -inf, as objectives.py says.
@pytest.mark.parametrize("op", [op for op in losses.LOSSES if op != "z_loss" and " 0)" not in op])
@properties
@given(broken(), st.sampled_from(["full", "teacher"]), backends)
def test_nan_and_inf_are_where_the_contract_has_them(op, data, support, backend):
    """float64, so that nothing under- or overflows on one side alone."""
    student, teacher, labels, upstream = (x.double() if x.is_floating_point() else x for x in data)
    options = {"support": support, "reduction": "none"}
    if not losses.LOSSES[op].objective().needs_teacher:
        options.pop("support")
    results = []
    for function, more in (
        (losses.ours(op), {"backend": backend}),
        (losses.truth(op), {}),
    ):
        s = student.clone().requires_grad_()
        loss = function(s, teacher, labels, **options, **more)
        (grad,) = torch.autograd.grad(loss, s, upstream)
        results.append((loss.detach(), grad))
    (loss, grad), (loss_ref, grad_ref) = results
    for ours, truth in ((loss, loss_ref), (grad, grad_ref)):
        assert torch.equal(ours.isnan(), truth.isnan())
        assert torch.equal(ours.isinf(), truth.isinf())
    assert (grad[labels == -100] == 0).all() and (loss[labels == -100] == 0).all()


@st.composite
def layouts(draw, x):
    """``x`` [B, T, V] again, lying in memory in some other way."""
    how = draw(st.sampled_from(["dense", "transposed", "sliced", "wide", "strided", "batched"]))
    B, T, V = x.shape
    if how == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "sliced":
        return torch.cat([x[:, :1], x, x[:, :1]], 1)[:, 1:-1]
    if how == "wide":
        return torch.cat([x[..., :1], x, x[..., :2]], -1)[..., 1 : V + 1]
    if how == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    if how == "batched":
        return torch.stack([x, x], 1).transpose(0, 1)[1]
    return x


@st.composite
def problems(draw):
    """A call with any options, in float64, so that equality is exact up to rounding."""
    g = generator(draw(seeds))
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    V = draw(st.one_of(st.integers(1, 60), st.sampled_from([1025, 2051])))
    student, teacher = 4 * torch.randn(2, B, T, V, generator=g, dtype=torch.float64)
    labels = torch.randint(V, (B, T), generator=g)
    options = {
        "temperature": draw(st.sampled_from([0.5, 1.0, 3.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "shift": draw(st.booleans()),
        "support": draw(st.sampled_from(["full", "teacher"])),
        "ignore_index": draw(st.sampled_from([-100, 0, -1])),
    }
    labels[torch.rand(B, T, generator=g) < 0.3] = options["ignore_index"]
    if draw(st.booleans()):
        options["weight"] = torch.rand(B, T, generator=g).masked_fill(labels % 3 == 0, 0.0)
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["num_items"] = draw(st.sampled_from([0, 3, 7.5]))
    if draw(st.booleans()):
        options["vocab_mismatch"] = "truncate"
        extra = draw(st.integers(1, 9))
        more = torch.randn(B, T, extra, generator=g, dtype=torch.float64)
        if draw(st.booleans()):
            student = torch.cat([student, more], -1)
        else:
            teacher = torch.cat([teacher, more], -1)
    if draw(st.booleans()):
        out = torch.rand(V, generator=g) < 0.3
        out[0] = False
        labels = labels.where(~out[labels.clamp_min(0)], 0)
        student[..., :V] = student[..., :V].masked_fill(out, -INF)
        teacher[..., :V] = teacher[..., :V].masked_fill(out, -INF)
    return draw(layouts(student)), draw(layouts(teacher)), labels, options


def outcome(function, student, teacher, labels, **options):
    s = student.detach().requires_grad_()
    loss, metrics = function(s, teacher, labels, return_metrics=True, **options)
    upstream = torch.cos(torch.arange(loss.numel()) + 1.0).view(loss.shape).double()
    (grad,) = torch.autograd.grad(loss, s, upstream)
    return [loss.detach(), grad, *(x for x in metrics if x is not None)]


@properties
@given(problems(), st.sampled_from(OPS), st.booleans(), backends)
def test_every_option_in_every_layout_is_the_references(problem, op, labelled, backend):
    student, teacher, labels, options = problem
    if op == "reverse_kl" and not labelled:
        labels = None
    ours = outcome(OURS[op], student, teacher, labels, backend=backend, **options)
    more = {k: v for k, v in options.items() if k != "vocab_mismatch"}
    truth = outcome(getattr(reference, op), student, teacher, labels, **more)
    for a, e in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12, equal_nan=True)


@properties
@given(
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.integers(2, 300), seeds,
    st.integers(-3, 3), st.integers(-3, 3), st.sampled_from(OPS), backends,
)  # fmt: skip
def test_a_constant_added_to_a_row_changes_nothing(dtype, V, seed, a, b, op, backend):
    """Logits in steps that leave room for the constant: it is exact in every dtype."""
    g = generator(seed)
    step = {torch.bfloat16: 1.0, torch.float16: 1 / 4, torch.float32: 2**-12}[dtype]
    student, teacher = (
        (torch.randint(-16, 17, (3, V), generator=g) * step).to(dtype) for _ in range(2)
    )
    labels = torch.randint(V, (3,), generator=g)
    moved = [(x.double() + 32 * step * k).to(dtype) for x, k in ((student, a), (teacher, b))]
    for x, y, k in ((student, moved[0], a), (teacher, moved[1], b)):
        assert torch.equal(y.double() - x.double(), torch.full(x.shape, 32.0 * step * k).double())
    options = {"reduction": "none", "backend": backend}
    results = [outcome(OURS[op], s, t, labels, **options) for s, t in ((student, teacher), moved)]
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@properties
@given(rows(), st.sampled_from(OPS), st.booleans(), backends)
def test_a_divergence_is_not_negative(data, op, labelled, backend):
    student, teacher, labels, _ = data
    labels = labels if labelled or op == "drkl" else None
    loss = OURS[op](student, teacher, labels, reduction="none", backend=backend)
    eps = torch.finfo(loss.dtype).eps
    assert (loss.isnan() | (loss >= -16 * eps)).all(), loss


@properties
@given(rows(masks=False), st.sampled_from(OPS), st.booleans(), backends)
def test_the_gradient_is_zero_where_the_student_is_the_teacher(data, op, labelled, backend):
    student, _, labels, _ = data
    labels = labels if labelled or op == "drkl" else None
    x = student.clone().requires_grad_()
    loss = OURS[op](x, student, labels, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    eps = torch.finfo(loss.dtype).eps
    assert (loss.abs() <= 16 * eps).all(), loss
    q = reference.softmax(student.double())
    assert (grad.double().abs() <= 32 * eps * (q + eps)).all()


@properties
@given(rows(dtype=torch.float64), st.sampled_from(OPS), seeds, backends)
def test_permuting_columns_permutes_the_gradient(data, op, seed, backend):
    student, teacher, labels, upstream = data
    order = torch.randperm(student.shape[1], generator=generator(seed))
    where = order.argsort()
    options = {"backend": backend}
    loss, grad = bounds.run(OURS[op], student, teacher, labels, upstream, **options)
    permuted = student[:, order], teacher[:, order], where[labels], upstream
    loss_p, grad_p = bounds.run(OURS[op], *permuted, **options)
    torch.testing.assert_close(loss_p, loss, rtol=1e-9, atol=1e-11, equal_nan=True)
    torch.testing.assert_close(grad_p, grad[:, order], rtol=1e-7, atol=1e-12, equal_nan=True)


@properties
@given(
    st.integers(1, 12), st.integers(1, 9), st.integers(1, 40), seeds, st.sampled_from(OPS),
    st.booleans(), st.sampled_from([1, 300, 1500, 10**6]), st.booleans(),
    st.sampled_from([None, 2.0]), st.sampled_from(["mean", "sum", "none"]), backends,
)  # fmt: skip
def test_hidden_states_are_logits(
    N, H, V, seed, op, labelled, chunk, recompute, softcap, reduction, backend
):
    g = generator(seed)
    hidden, teacher_hidden = torch.randn(2, N, H, generator=g, dtype=torch.float64)
    matrix, teacher_matrix = torch.randn(2, V, H, generator=g, dtype=torch.float64)
    labels = torch.randint(V, (N,), generator=g)
    labels[torch.rand(N, generator=g) < 0.3] = -100
    labels = labels if labelled or op == "drkl" else None
    leaves = [x.requires_grad_() for x in (hidden, matrix)]
    linear = {"reverse_kl": linear_reverse_kl, "drkl": linear_drkl}[op]
    losses = (
        linear(
            hidden, matrix, labels, teacher_hidden=teacher_hidden, teacher_weight=teacher_matrix,
            student_softcap=softcap, chunk_bytes=chunk, recompute=recompute, reduction=reduction,
            backend=backend,
        ),
        OURS[op](
            bounds.logits_of(hidden, matrix, softcap=softcap), teacher_hidden @ teacher_matrix.t(),
            labels, reduction=reduction, backend=backend,
        ),
    )  # fmt: skip
    results = []
    for loss in losses:
        upstream = torch.cos(torch.arange(loss.numel()) + 1.0).view(loss.shape).double()
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves, upstream)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


@properties
@given(rows(), st.booleans(), st.sampled_from([0.3, 1.0, 5.0]), backends)
def test_softmax_is_a_distribution_and_the_references(data, log, temperature, backend):
    x = data[0]
    name = "log_softmax" if log else "softmax"
    ours = getattr(drkl_triton, name)(x, temperature=temperature, backend=backend).double()
    log_p = reference.log_softmax(x.double(), temperature=temperature)
    truth = log_p if log else log_p.exp()
    out, eps = torch.finfo(x.dtype), torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
    # the exponent's rounding; the result's, which the interpreter truncates; denormals
    bound = 16 * eps * (1 + log_p.abs()) * (1 if log else truth) + out.eps * truth.abs()
    bound = bound + out.smallest_normal * out.eps + 2e-38
    assert ((ours == truth) | ((ours - truth).abs() <= bound)).all()
    if not log:
        assert ((ours >= 0) & (ours <= 1)).all()


def test_the_settings_are_those_of_the_profile(pytestconfig):
    """That a run tries as many examples as it says."""
    expected = {"test": 15, "fuzz": 300}[pytestconfig.getoption("hypothesis_profile") or "test"]
    assert settings().max_examples == expected
    assert pytestconfig.getoption("hypothesis_seed") is not None
    tests = [x for name, x in globals().items() if hasattr(x, "hypothesis")]
    assert expected * len(tests) >= {15: 100, 300: 2000}[expected]


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors: threads cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
