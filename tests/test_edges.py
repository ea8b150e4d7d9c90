"""-inf, NaN and +inf: the table of edges (reference.py), value and gradient, by hand and against
the reference.
"""

import math

import pytest
import selection
import torch
from bounds import INF, excess, run

import drkl_triton
from drkl_triton import kernels, reference, tiled

NAN = float("nan")
LOSSES = [("reverse_kl", False), ("reverse_kl", True), ("drkl", True)]
over_losses = pytest.mark.parametrize("name, labelled", LOSSES, ids=["rkl", "rkl-labelled", "drkl"])


def one(name, labelled, s, t, y, backend, **options):
    """(loss, gradient row) of a single row."""
    function = getattr(reference if backend == "reference" else drkl_triton, name)
    if backend != "reference":
        options["backend"] = backend
    s, t = torch.as_tensor([s]), torch.as_tensor([t])
    loss, grad = run(
        function, s, t, torch.tensor([y]) if labelled else None, torch.tensor([1.5]), **options
    )
    return loss[0].item(), grad[0]


@pytest.fixture(params=["tiled", "triton", "reference"])
def implementation(request):
    return request.param


S, T = [0.3, -1.0, 2.0, 0.7, 0.1], [1.3, 0.0, -0.4, 0.2, 0.9]


def without(row, *columns):
    return [-INF if k in columns else x for k, x in enumerate(row)]


@over_losses
@pytest.mark.parametrize("y", [0, 2])
def test_columns_out_of_both_or_out_of_the_student_are_as_if_absent(
    name, labelled, y, implementation
):
    keep = [0, 2, 3]
    s, t = [S[k] for k in keep], [T[k] for k in keep]
    small, dsmall = one(name, labelled, s, t, keep.index(y), implementation)
    loss, grad = one(name, labelled, without(S, 1, 4), without(T, 1, 4), y, implementation)
    assert loss == pytest.approx(small, rel=1e-6)
    torch.testing.assert_close(grad[keep], dsmall)
    assert (grad[[1, 4]] == 0).all()
    # the student alone: the teacher's mass there still counts in its normaliser
    loss, grad = one(name, labelled, without(S, 1, 4), T, y, implementation)
    assert math.isfinite(loss) and loss > small
    assert (grad[[1, 4]] == 0).all() and grad.isfinite().all()


@over_losses
@pytest.mark.parametrize("column", [1, 2])  # 2 is the label
@pytest.mark.parametrize(
    "logit", [-1.0, -200.0]
)  # -200: the student's mass underflows, its logit is finite all the same
def test_teacher_excludes_what_the_student_allows(name, labelled, column, logit, implementation):
    s = list(S)
    s[column] = logit
    loss, grad = one(name, labelled, s, without(T, column), 2, implementation)
    assert loss == INF
    assert (grad == 0).all()


def test_student_excludes_the_label(implementation):
    p_y = torch.tensor(T).softmax(0)[2].item()
    keep = [0, 1, 3, 4]
    log_q, log_p = (torch.tensor([x[k] for k in keep]).log_softmax(0) for x in (S, T))
    n = (log_q.exp() * (log_q - log_p)).sum().item()
    loss, grad = one("drkl", True, without(S, 2), T, 2, implementation, gamma=0.25)
    assert loss == pytest.approx(-math.log(1 - p_y) + 0.25 * n, rel=1e-5)
    assert grad[2] == 0 and (grad[keep] != 0).all()
    loss, grad = one("reverse_kl", True, without(S, 2), T, 2, implementation)
    assert loss == pytest.approx(-math.log(1 - p_y) + n, rel=1e-5)


@over_losses
def test_student_finite_at_the_label_only(name, labelled, implementation):
    p_y = torch.tensor(T).softmax(0)[2].item()
    loss, grad = one(name, labelled, without(S, 0, 1, 3, 4), T, 2, implementation)
    assert loss == pytest.approx(-math.log(p_y), rel=1e-5)
    # a GPU fuses one of the two products that cancel at the label, and rounds the other
    assert grad[2].abs() <= (2**-23 * loss if grad.is_cuda else 0)
    assert (grad[[0, 1, 3, 4]] == 0).all()
    loss, grad = one(
        name, labelled, without(S, 0, 1, 3, 4), without(T, 0, 1, 3, 4), 2, implementation
    )
    assert loss == 0 and (grad == 0).all()


@over_losses
def test_one_column(name, labelled, implementation):
    loss, grad = one(name, labelled, [3.0], [-2.0], 0, implementation)
    assert loss == 0 and (grad == 0).all()


NOTHING = [-INF] * 5
BROKEN = {
    "student-nan": ([0.3, NAN, 2.0, 0.7, 0.1], T),
    "student-nan-at-label": ([0.3, 1.0, NAN, 0.7, 0.1], T),
    "teacher-nan": (S, [0.3, NAN, 2.0, 0.7, 0.1]),
    "teacher-nan-at-label": (S, [0.3, 1.0, NAN, 0.7, 0.1]),
    "student-inf": ([0.3, INF, 2.0, 0.7, 0.1], T),
    "student-inf-at-label": ([0.3, 1.0, INF, 0.7, 0.1], T),
    "teacher-inf": (S, [0.3, INF, 2.0, 0.7, 0.1]),
    "teacher-inf-at-label": (S, [0.3, 1.0, INF, 0.7, 0.1]),
    "student-nothing": (NOTHING, T),
    "teacher-nothing": (S, NOTHING),
    "both-nothing": (NOTHING, NOTHING),
    "nan-outranks-inf": ([0.3, NAN, 2.0, 0.7, 0.1], without(T, 3)),
    "teacher-nan-where-student-is-out": (without(S, 1), [0.3, NAN, 2.0, 0.7, 0.1]),
    "nan-beside-minus-inf": ([0.3, NAN, 2.0, -INF, 0.1], without(T, 3)),
    "label-only-and-teacher-nan": (without(S, 0, 1, 3, 4), [0.3, NAN, 2.0, 0.7, 0.1]),
}


@over_losses
@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows_are_nan_and_only_they(name, labelled, case, implementation):
    s, t = BROKEN[case]
    loss, grad = one(name, labelled, s, t, 2, implementation)
    assert math.isnan(loss)
    assert grad.isnan().all()

    function = getattr(reference if implementation == "reference" else drkl_triton, name)
    options = {} if implementation == "reference" else {"backend": implementation}
    labels = torch.tensor([2, 2, 2]) if labelled else None
    upstream = torch.tensor([0.5, -1.0, 2.0])
    loss, grad = run(
        function, torch.tensor([S, s, S]), torch.tensor([T, t, T]), labels, upstream, **options
    )
    clean, dclean = run(
        function, torch.tensor([S, S, S]), torch.tensor([T, T, T]), labels, upstream, **options
    )
    assert loss[1].isnan() and grad[1].isnan().all()
    assert torch.equal(loss[::2], clean[::2]) and torch.equal(grad[::2], dclean[::2])


LONG = 4500  # four full tiles of bfloat16 and a rest; eight of float32
REGIONS = {
    "first-tile": slice(0, 2048),
    "first-tile-and-more": slice(0, 2300),
    "last": slice(4100, None),
    "scattered": slice(3, None, 5),
}
WHO = ["both", "student", "teacher", "both-but-label"]


@over_losses
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("who", WHO)
def test_masked_regions_of_long_rows(name, labelled, region, who, backend):
    s, t, upstream = torch.randn(4, LONG), torch.randn(4, LONG), torch.randn(4)
    labels = (
        torch.tensor([2305, 2500, 2900, 4000])
        if who != "both-but-label"
        else torch.tensor([3, 2043, 13, 4103])
    )
    at_label = [x.gather(1, labels[:, None]) for x in (s, t)]
    if who != "teacher":
        s[:, REGIONS[region]] = -INF
    if who != "student":
        t[:, REGIONS[region]] = -INF
    if who == "both-but-label":
        s.scatter_(1, labels[:, None], at_label[0])
        t.scatter_(1, labels[:, None], at_label[1])
    dtypes, turn = (torch.float32, torch.bfloat16), [*REGIONS].index(region) + WHO.index(who)
    for dtype in dtypes:
        if backend != "tiled" and not selection.taken(dtype, dtypes, turn):
            continue
        x, y = s.to(dtype), t.to(dtype)
        assert max(excess(name, x, y, labels if labelled else None, upstream, backend=backend)) <= 1


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax_edges(name, implementation):
    module, options = (
        (reference, {})
        if implementation == "reference"
        else (drkl_triton, {"backend": implementation})
    )
    function = getattr(module, name)
    x = torch.tensor([without(S, 1), NOTHING, [1.0, INF, 0.0, 0.0, 0.0], [NAN, 0.0, 0.0, 0.0, 0.0]])
    y = function(x, **options)
    torch.testing.assert_close(y[0], getattr(torch, name)(x[0], -1))
    assert y[1:].isnan().all()
    big = torch.tensor([[-3e38, 3e38, -INF]])  # the difference overflows
    expected = [[0.0, 1.0, 0.0]] if name == "softmax" else [[-INF, 0.0, -INF]]
    assert function(big, **options).tolist() == expected


def test_finite_extremes_do_not_turn_into_nan(backend):
    """Masks are often written with finfo.min instead of -inf."""
    low = torch.finfo(torch.float32).min
    s, t = torch.randn(2, 700), torch.randn(2, 700)
    s[:, ::3], t[:, ::3] = low, low
    assert max(excess("drkl", s, t, torch.tensor([1, 4]), torch.randn(2), backend=backend)) <= 1
    s[0], t[0] = low, low  # a row that is masked as a whole is flat
    loss, grad = run(drkl_triton.reverse_kl, s, t, None, torch.ones(2), backend=backend)
    assert loss[0] == 0 and (grad[0] == 0).all()


@over_losses
@pytest.mark.parametrize("who", ["both", "student", "one-column"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_written_with_the_lowest_finite_number(name, labelled, who, dtype, backend):
    """Also where a lane has seen several of them before its maximum moves."""
    low = torch.finfo(dtype).min
    s, t = torch.randn(4, 5000).to(dtype), torch.randn(4, 5000).to(dtype)
    masked = slice(7, 8) if who == "one-column" else slice(16, 4900)
    s[:, masked] = low
    if who == "both":
        t[:, masked] = low
    labels = torch.tensor([0, 10, 4950, 4999]) if labelled else None
    upstream = 100 * torch.randn(4)  # also large enough to overflow a product with the mask
    for splits in (s, t), (s.flip(1), t.flip(1)):
        assert max(excess(name, *splits, labels, upstream, backend=backend)) <= 1
    options = dict(labels=labels, return_metrics=True)
    _, ours = getattr(drkl_triton, name)(s, t, backend=backend, **options)
    _, truth = getattr(reference, name)(s.double(), t.double(), **options)
    torch.testing.assert_close(
        ours.student_entropy, truth.student_entropy.float(), rtol=1e-5, atol=1e-5
    )


@over_losses
def test_large_gradients_stay_zero_where_the_student_is_out(name, labelled, backend):
    """Loss scaling multiplies the upstream gradient by 65,536 and more; 0 * inf must not appear."""
    s, t, y = torch.randn(2, 70), torch.randn(2, 70), torch.tensor([3, 4])
    s[:, 10:20], t[0, 10:15] = -INF, -INF
    labels = y if labelled else None
    upstream = torch.tensor([3e9, -1e6])
    assert max(excess(name, s, t, labels, upstream, backend=backend, temperature=0.4)) <= 1


LOW = torch.finfo(torch.float32).min


def right(name, labelled, s, t, y, backend, **options):
    """Whether loss and gradient of single rows are within the bound."""
    s, t = torch.as_tensor(s), torch.as_tensor(t)
    labels = torch.as_tensor(y) if labelled else None
    upstream = torch.linspace(0.5, 1.5, len(s))
    return max(excess(name, s, t, labels, upstream, backend=backend, **options)) <= 1


@over_losses
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_one_hot_student_of_finite_logits(name, labelled, temperature, backend):
    """Nothing is absent, so the tail still has its gradient, below a temperature of 1, too."""
    s, t = torch.full((1, 9), LOW), torch.randn(1, 9)
    s[0, 3] = 0.0
    assert right(name, labelled, s, t, [3], backend, temperature=temperature)
    _, grad = run(
        drkl_triton.drkl, s, t, torch.tensor([3]), torch.ones(1), backend=backend,
        temperature=temperature,
    )  # fmt: skip
    assert grad.count_nonzero() == 8


@over_losses
def test_masks_of_the_lowest_finite_number_that_overlap_in_part(name, labelled, backend):
    s = [[1.0, 0.0, 0.0, 0.0, LOW, LOW, LOW, LOW]]
    t = [[0.0, 1.0, 0.0, 0.0, 0.0, 0.0, LOW, LOW]]
    assert right(name, labelled, s, t, [0], backend)
    if name == "drkl":
        loss = drkl_triton.drkl(
            torch.tensor(s), torch.tensor(t), torch.tensor([0]), backend=backend
        )
        assert loss.item() == pytest.approx(0.5888, abs=5e-5)


@over_losses
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_such_masks_anywhere_in_long_rows(name, labelled, dtype, splits, backend, monkeypatch):
    """Lanes, splits and spans that see nothing but masks of one side, or of both."""
    if splits > 1 and backend == "tiled":
        monkeypatch.setattr(tiled, "SCRATCH", 9000)  # more spans
    choose = kernels.tuning.choose
    monkeypatch.setattr(
        kernels.tuning, "choose", lambda *a, **k: choose(*a, **k | {"splits": splits})
    )
    low, V = torch.finfo(dtype).min, 9001
    s, t = torch.randn(6, V).to(dtype), torch.randn(6, V).to(dtype)
    masked = torch.zeros(6, V, dtype=torch.bool)
    for row, columns in enumerate((slice(4000), slice(5000, V), slice(0, V, 2), slice(1, V, 64))):
        masked[row, columns] = True
    masked[4:] = torch.rand(2, V) < 0.98
    s[masked] = low
    t[masked & (torch.rand(6, V) < 0.7)] = low
    labels = torch.tensor([0, 8999, 4500, 1, 77, 9000])
    assert right(name, labelled, s, t, labels, backend)


@pytest.mark.parametrize("columns", [100, 3000])
def test_a_teacher_of_masks_the_student_does_not_share(columns, backend):
    """The sum of 50 such differences is no number of float32 any more, their mean is."""
    s, t = torch.zeros(1, columns), torch.zeros(1, columns)
    t[0, ::2] = LOW
    assert right("reverse_kl", False, s, t, None, backend)
    loss = drkl_triton.reverse_kl(s, t, backend=backend)
    assert loss.item() == pytest.approx(-LOW / 2, rel=1e-5)


@over_losses
@pytest.mark.parametrize("temperature", [1.0, 0.9, 0.01])
def test_a_label_at_the_lowest_finite_number(name, labelled, temperature, backend):
    s, t = [[LOW, 1.0, 3.0]], [[0.0, 1.0, 2.0]]
    assert right(name, labelled, s, t, [0], backend, temperature=temperature)
    options = dict(backend=backend, temperature=temperature, return_metrics=True)
    _, metrics = drkl_triton.drkl(torch.tensor(s), torch.tensor(t), torch.tensor([0]), **options)
    assert all(x.isfinite().all() for x in metrics)
    if name == "reverse_kl" and temperature == 0.9:
        loss, _ = one(name, labelled, s[0], t[0], 0, backend, temperature=0.9)
        assert loss == pytest.approx(0.1514, abs=5e-5)


@over_losses
@pytest.mark.parametrize("exponent", [*range(-37, -11, 4), -9, -3, 3, 13, 25, 37])
def test_every_temperature_that_is_documented(name, labelled, exponent, backend):
    temperature = 10.0**exponent
    s, t = torch.randn(3, 40), torch.randn(3, 40)
    s[1, 5:9], t[1, 5:9] = LOW, LOW
    s[2, 20:], t[2, 20:] = -INF, -INF
    y, upstream = torch.tensor([1, 2, 3]) if labelled else None, torch.tensor([1.0, -300.0, 1e-4])
    inputs, options = (s, t, y, upstream), dict(backend=backend, temperature=temperature)
    _, grad = run(getattr(drkl_triton, name), *inputs, **options)
    assert not grad.isnan().any()
    if exponent > -16:  # below, what float32 may be off is more than float32 can hold
        assert max(excess(name, *inputs, **options)) <= 1


def test_a_teacher_from_inference_mode(backend):
    """The usual way to run a teacher; plain PyTorch could not save such a tensor."""
    s, y = torch.randn(4, 70), torch.tensor([0, 1, 2, -100])
    plain = torch.randn(4, 70)
    with torch.inference_mode():
        teacher = plain.clone()
    ours = run(drkl_triton.drkl, s, teacher, y, torch.ones(4), backend=backend)
    same = run(drkl_triton.drkl, s, plain, y, torch.ones(4), backend=backend)
    assert all(map(torch.equal, ours, same))


@over_losses
def test_a_denominator_of_zero_in_the_reference(name, labelled):
    s, t = torch.tensor([S, S, without(S, 1)]).requires_grad_(), torch.tensor([T, T, T])
    t[0, 0], t[1, 0] = NAN, -INF
    labels = torch.tensor([2, 2, 2]) if labelled else None
    loss = getattr(reference, name)(s, t, labels, num_items=0)
    (grad,) = torch.autograd.grad(loss, s)
    assert loss == 0 and (grad == 0).all()
