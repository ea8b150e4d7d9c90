"""What the losses' options mean: ignored rows, weights, reductions, shift, vocabularies, metrics.

Logits are float64, so that "equal" can mean equal: the accuracy of the other dtypes is tested
elsewhere.
"""

import pytest
import torch

import drkl_triton
from drkl_triton import RowMetrics, drkl, log_softmax, ops, reference, reverse_kl, softmax

V = 37  # not a multiple of any vector
NAN, INF = float("nan"), float("inf")
FIELDS = RowMetrics._fields
TARGET_FIELDS = ("target_kl", "nontarget_kl", "student_target_prob", "teacher_target_prob")

LOSSES = {
    "rkl-without-labels": lambda module: lambda s, t, y, **o: module.reverse_kl(s, t, **o),
    "rkl": lambda module: module.reverse_kl,
    "drkl": lambda module: lambda s, t, y, **o: module.drkl(s, t, y, gamma=0.7, **o),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from a second one, and lose to whatever else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The kernels do not know which loss they serve: with labels, one of the two is enough for them.
LABELLED = [("rkl", "tiled"), ("drkl", "tiled"), ("drkl", "triton")]
CASES = [("rkl-without-labels", "tiled"), ("rkl-without-labels", "triton"), *LABELLED]
labelled = pytest.mark.parametrize("case", LABELLED, ids="-".join)


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    return request.param


@pytest.fixture
def name(case):
    return case[0]


@pytest.fixture
def loss(case):
    """The loss of the package, called as loss(student, teacher, labels, **options)."""
    name, backend = case
    function = LOSSES[name](drkl_triton)
    return lambda *args, **options: function(*args, backend=backend, **options)


@pytest.fixture
def truth(name):
    return LOSSES[name](reference)


def data(*shape, columns=V, teacher_columns=V):
    """Student, teacher, labels without an ignored one."""
    student = 3 * torch.randn(*shape, columns, dtype=torch.float64)
    teacher = 3 * torch.randn(*shape, teacher_columns, dtype=torch.float64)
    return student, teacher, torch.randint(min(columns, teacher_columns), shape)


def run(function, student, teacher, labels, *, upstream=None, **options):
    """(what the loss returned, gradient of the student)."""
    student = student.detach().clone().requires_grad_()
    out = function(student, teacher, labels, **options)
    value = out[0] if options.get("return_metrics") else out
    if upstream is None:
        upstream = 1.5 if value.dim() == 0 else torch.linspace(-1, 2, value.numel()).view_as(value)
    if not isinstance(upstream, torch.Tensor):
        upstream = value.new_tensor(upstream)
    value.backward(upstream.to(value.dtype).expand_as(value))
    return out, student.grad


def close(actual, expected, tolerance=1e-11):
    """Equal up to rounding on the scale of the tensor; NaN and infinities in the same places."""
    assert type(actual) is type(expected)
    if isinstance(actual, tuple):
        for one, other in zip(actual, expected, strict=True):
            close(one, other, tolerance)
    elif expected is not None:
        finite = expected[expected.isfinite()].double().abs()
        atol = tolerance * finite.max().item() if finite.numel() else 0.0
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=atol, equal_nan=True)


def same(actual, expected):
    """The same bits, where -0.0 is 0.0 and a NaN a NaN."""
    if isinstance(actual, tuple):
        for one, other in zip(actual, expected, strict=True):
            same(one, other)
    elif expected is not None:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# Reductions and weights


OPTIONS = {
    "mean": {},
    "sum": dict(reduction="sum"),
    "none": dict(reduction="none"),
    "weight": dict(weight=torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.0, 3.0]])),
    "weight, sum": dict(reduction="sum", weight=torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.0, 3.0]])),
    "weight, none": dict(reduction="none", weight=torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.0, 3.0]])),
    "int weight": dict(weight=torch.tensor([[1, 2, 0], [1, 0, 3]])),
    "bool weight": dict(weight=torch.tensor([[True, True, False], [True, False, True]])),
    "bfloat16 weight": dict(weight=torch.tensor([[0.5, 2, 0], [1, 0, 3]], dtype=torch.bfloat16)),
    "negative weight": dict(weight=torch.tensor([[0.5, -2.0, 0.0], [1.0, 0.0, 3.0]])),
    "num_items": dict(num_items=7),
    "num_items, float": dict(num_items=2.5),
    "num_items, tensor": dict(num_items=torch.tensor(7.0)),
    "num_items, integer tensor": dict(num_items=torch.tensor(7)),
    "num_items, weight": dict(num_items=4, weight=torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.0, 3.0]])),
    "temperature": dict(temperature=0.6),
    "temperature, weight, none": dict(
        temperature=2.5,
        reduction="none",
        weight=torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.0, 3.0]]),
    ),
    "shift": dict(shift=True),
    "shift, weight": dict(shift=True, weight=torch.tensor([[9.0, 2.0, 0.0], [9.0, 0.0, 3.0]])),
    "shift, none": dict(shift=True, reduction="none"),
    "support": dict(support="teacher"),
}


@pytest.mark.parametrize("case", [CASES[0], *LABELLED], ids="-".join)
@pytest.mark.parametrize("option", OPTIONS)
def test_options_mean_what_the_reference_says(loss, truth, option):
    s, t, y = data(2, 3)
    y[0, 1] = -100
    options = OPTIONS[option] | dict(return_metrics=True)
    (value, metrics), grad = run(loss, s, t, y, **options)
    (true_value, true_metrics), true_grad = run(truth, s, t, y, **options)
    close(value, true_value)
    close(grad, true_grad)
    close(metrics, true_metrics)
    assert value.shape == ((2, 3) if options.get("reduction") == "none" else ())


def test_reductions_by_hand(loss, name):
    """Not by the reference: Σ w·loss / Σ w over the rows not ignored."""
    s, t, y = data(2, 3)
    weight = torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.25, 3.0]], dtype=torch.float64)
    counted = weight != 0
    if name != "rkl-without-labels":
        y[1, 2] = -100
        counted[1, 2] = False
    rows = torch.stack([loss(s[i], t[i], y[i], reduction="none") for i in range(2)])
    rows = torch.where(counted, rows, 0.0)
    close(loss(s, t, y, weight=weight, reduction="none"), weight * rows)
    close(loss(s, t, y, weight=weight, reduction="sum"), (weight * rows).sum())
    mean = (weight * rows).sum() / weight[counted].sum()
    close(loss(s, t, y, weight=weight), mean)
    close(loss(s, t, y, weight=weight, num_items=2), (weight * rows).sum() / 2)


def test_gradient_is_per_row_and_scales(loss):
    """mean's gradient is none's under the upstream w / Σ w; an upstream reaches its row only."""
    s, t, y = data(5)
    weight = torch.rand(5, dtype=torch.float64)
    _, of_mean = run(loss, s, t, y, weight=weight, upstream=1.0)
    _, of_none = run(loss, s, t, y, reduction="none", upstream=weight / weight.sum())
    close(of_mean, of_none)
    upstream = torch.tensor([0.0, -2.0, 0.0, 1e-3, 0.0], dtype=torch.float64)
    _, grad = run(loss, s, t, y, reduction="none", upstream=upstream)
    for row in range(5):
        _, alone = run(loss, s[row], t[row], y[row], upstream=upstream[row])
        close(grad[row], alone)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 3), (2, 2, 1, 2)])
def test_any_leading_shape(loss, shape):
    s, t, y = data(*shape)
    (value, metrics), grad = run(loss, s, t, y, reduction="none", return_metrics=True)
    assert value.shape == shape and grad.shape == s.shape
    assert {x.shape for x in metrics if x is not None} == {torch.Size(shape)}
    flat, _ = run(loss, s.reshape(-1, V), t.reshape(-1, V), y.reshape(-1), reduction="none")
    close(value.reshape(-1), flat)


def test_one_row_without_leading_dimensions_can_be_ignored(loss):
    s, t, y = data()
    (value, metrics), grad = run(loss, s, t, y, weight=torch.tensor(0.0), return_metrics=True)
    assert value == 0 and (grad == 0).all() and all(x == 0 for x in metrics if x is not None)


@labelled
def test_labels_may_be_int32(loss):
    s, t, y = data(2, 3)
    y[1, 1] = -100
    for options in ({}, dict(shift=True)):
        same(
            run(loss, s, t, y.int(), return_metrics=True, **options),
            run(loss, s, t, y, return_metrics=True, **options),
        )


@labelled
@pytest.mark.parametrize("shift", [False, True])
def test_labels_and_weight_of_any_stride(loss, shift):
    s, t, y = data(2, 3)
    w = torch.rand(2, 3)
    options = dict(reduction="none", shift=shift, return_metrics=True)
    expected = run(loss, s, t, y, weight=w, **options)
    same(run(loss, s, t, y.T.contiguous().T, weight=w.T.contiguous().T, **options), expected)
    wide_y, wide_w = y.repeat_interleave(2, 1)[:, ::2], w.repeat_interleave(2, 1)[:, ::2]
    same(run(loss, s, t, wide_y, weight=wide_w, **options), expected)
    first = y[:1].expand(2, 3), w[:1].expand(2, 3)
    expected = run(loss, s, t, first[0].clone(), weight=first[1].clone(), **options)
    same(run(loss, s, t, first[0], weight=first[1], **options), expected)


@labelled
@pytest.mark.parametrize("index", [0, 5, -1, -2, -3, 10**6])
def test_any_ignore_index(loss, index):
    """Also a token of the vocabulary (padding), and the numbers the kernels use for themselves."""
    s, t, y = data(4)
    y[:] = torch.tensor([1, index, 2, index])
    (value, metrics), grad = run(loss, s, t, y, ignore_index=index, return_metrics=True)
    close(value, loss(s[[0, 2]], t[[0, 2]], y[[0, 2]]))
    assert (grad[[1, 3]] == 0).all() and all((x[[1, 3]] == 0).all() for x in metrics)


# Nothing to average


def nothing_counts(why):
    s, t, y = data(2, 3)
    options = dict(
        labels={},
        weight=dict(weight=torch.zeros(2, 3)),
        zero=dict(num_items=0),
        tensor=dict(num_items=torch.tensor(0)),
        shift=dict(shift=True),
        negative=dict(weight=torch.tensor([[1.0, -1, 1], [-1, 1, -1]])),
    )[why]
    if why == "labels":
        y[:] = -100
    if why == "shift":
        s, t, y = (x[:, :1] for x in (s, t, y))
    return s, t, y, options


@pytest.mark.parametrize(
    "case, why",
    [
        (case, why)
        for case in CASES
        for why in ("labels", "weight", "zero", "tensor", "shift", "negative")
        if case in LABELLED or why != "labels"
    ],
)
def test_zero_connected_to_the_graph(loss, why):
    s, t, y, options = nothing_counts(why)
    value, grad = run(loss, s, t, y, **options)
    assert value == 0 and value.shape == () and value.requires_grad
    assert grad.shape == s.shape and (grad == 0).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_zero_items_whatever_the_rows_say(loss, bad):
    """A denominator of 0: the value is 0 and the gradients are zero, also of a NaN or +inf row."""
    s, t, y = data(3)
    t[1, 4] = bad
    value, grad = run(loss, s, t, y, num_items=0)
    assert value == 0 and (grad == 0).all()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3), (2, 0, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batch(loss, shape, reduction):
    s, t, y = torch.zeros(*shape, V), torch.zeros(*shape, V), torch.zeros(shape, dtype=torch.long)
    options = dict(reduction=reduction, return_metrics=True, weight=torch.ones(shape))
    (value, metrics), grad = run(loss, s, t, y, **options)
    assert value.shape == (shape if reduction == "none" else ()) and (value == 0).all()
    assert value.requires_grad and value.dtype == torch.float32
    assert grad.shape == s.shape
    assert all(x.shape == shape for x in metrics if x is not None)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (2, 1)])
def test_shift_without_a_token_to_score(loss, shape):
    s, t, y = data(*shape)
    value, grad = run(loss, s, t, y, shift=True)
    assert value == 0 and value.requires_grad and (grad == 0).all()


@pytest.mark.parametrize("function", [softmax, log_softmax])
@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_empty_softmax(function, shape, backend):
    x = torch.zeros(*shape, V, requires_grad=True)
    y = function(x, backend=backend)
    y.backward(torch.zeros_like(y))
    assert y.shape == x.shape == x.grad.shape


@labelled
def test_one_column(loss):
    """V = 1: both distributions are the point at the label, and the loss is 0."""
    s, t, y = data(3, columns=1, teacher_columns=1)
    (value, metrics), grad = run(loss, s, t, y, reduction="none", return_metrics=True)
    assert (value == 0).all() and (grad == 0).all()
    assert (metrics.student_target_prob == 1).all() and (metrics.student_entropy == 0).all()


# Ignored rows are never read


GARBAGE = [NAN, INF, -INF]


def ignoring(how, rows):
    """Options or labels that ignore the rows of [2, 4] whose index is in ``rows``."""
    mask = torch.zeros(8, dtype=torch.bool).scatter(0, torch.tensor(rows), True).view(2, 4)
    weight = torch.arange(1.0, 9.0).view(2, 4)
    if how == "weight":
        return dict(weight=torch.where(mask, 0.0, weight)), None
    return {}, mask


@pytest.mark.parametrize("rows", [[0, 3, 4], [0, 1, 2, 4, 5, 6, 7]], ids=str)
@pytest.mark.parametrize(
    "case, how", [*((case, "weight") for case in CASES), *((case, "labels") for case in LABELLED)]
)
def test_ignored_rows_are_not_read(loss, how, rows):
    """Garbage in logits and upstream gradient there changes no bit of the other rows."""
    s, t, y = data(2, 4)
    options, mask = ignoring(how, rows)
    if mask is not None:
        y[mask] = -100
    elif how == "weight":
        y.view(-1)[rows] = 10**9  # nor is the label of a row of weight 0
    options |= dict(reduction="none", return_metrics=True)
    upstream = torch.randn(2, 4, dtype=torch.float64)
    (value, metrics), grad = run(loss, s, t, y, upstream=upstream, **options)
    ignored = torch.zeros(8, dtype=torch.bool).scatter(0, torch.tensor(rows), True).view(2, 4)
    assert (value[ignored] == 0).all() and (grad[ignored] == 0).all()
    assert all((x[ignored] == 0).all() for x in metrics if x is not None)
    assert not value[~ignored].eq(0).any()
    for x in (s, t, upstream):
        x[ignored] = torch.tensor(GARBAGE).double()[torch.randint(3, x[ignored].shape)]
    again, grad_again = run(loss, s, t, y, upstream=upstream, **options)
    same(again, (value, metrics))
    same(grad_again, grad)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_nan_rows_do_not_reach_the_reduction(loss, truth, reduction):
    s, t, y = data(6)
    weight = torch.tensor([1.0, 0, 2, 0, 0, 1])
    keep = weight != 0
    expected, expected_grad = run(truth, s, t, y, weight=weight, reduction=reduction)
    s[~keep], t[~keep] = NAN, INF
    value, grad = run(loss, s, t, y, weight=weight, reduction=reduction)
    close(value, expected)
    close(grad, expected_grad)


@labelled
def test_weight_of_an_ignored_label_is_not_read(loss):
    s, t, y = data(4)
    y[2] = -100
    weight = torch.tensor([1.0, 2.0, 5.0, 1.0])
    value, grad = run(loss, s, t, y, weight=weight)
    weight[2] = NAN
    again, grad_again = run(loss, s, t, y, weight=weight)
    same((again, grad_again), (value, grad))


@labelled
def test_a_nan_row_that_counts_is_nan_alone(loss):
    s, t, y = data(6)
    _, clean = run(loss, s, t, y, reduction="none")
    s[3, 5] = NAN
    (value, metrics), grad = run(loss, s, t, y, reduction="none", return_metrics=True)
    others = [0, 1, 2, 4, 5]
    assert value[3].isnan() and grad[3].isnan().all() and all(x[3].isnan() for x in metrics[:-1])
    assert value[others].isfinite().all()
    close(grad[others], clean[others])


# shift


@pytest.mark.parametrize(
    "reduction, weighted", [("mean", False), ("mean", True), ("sum", True), ("none", False)]
)
def test_shift_is_slicing(loss, name, reduction, weighted):
    s, t, y = data(2, 4)
    if name != "rkl-without-labels":
        y[0, 2], y[1, 0] = -100, -100
    weight = None
    if weighted:
        weight = torch.rand(2, 4, dtype=torch.float64)
        weight[0, 0], weight[1, 3] = NAN, 0.0  # the first weight scores nothing
    options = dict(reduction=reduction, return_metrics=True)
    upstream = torch.randn(2, 4, dtype=torch.float64) if reduction == "none" else 1.5
    (value, metrics), grad = run(
        loss, s, t, y, shift=True, weight=weight, upstream=upstream, **options
    )
    (expected, expected_metrics), expected_grad = run(
        loss,
        s[:, :-1],
        t[:, :-1],
        y[:, 1:],
        weight=None if weight is None else weight[:, 1:],
        upstream=upstream[:, :-1] if reduction == "none" else upstream,
        **options,
    )
    if reduction == "none":
        assert value.shape == (2, 4) and (value[:, -1] == 0).all()
        value = value[:, :-1]
    close(value, expected)
    assert (grad[:, -1] == 0).all()
    close(grad[:, :-1], expected_grad)
    for one, other in zip(metrics, expected_metrics, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == (2, 4) and (one[:, -1] == 0).all()
            close(one[:, :-1], other)


def test_shift_does_not_read_the_last_position(loss):
    s, t, y = data(2, 4)
    expected = run(loss, s, t, y, shift=True)
    s[:, -1], t[:, -1] = NAN, NAN
    same(run(loss, s, t, y, shift=True), expected)


def test_shift_with_num_items(loss):
    s, t, y = data(2, 4)
    value, grad = run(loss, s, t, y, shift=True, num_items=11)
    expected, expected_grad = run(loss, s[:, :-1], t[:, :-1], y[:, 1:], num_items=11)
    close(value, expected)
    close(grad[:, :-1], expected_grad)


# vocab_mismatch="truncate"


@pytest.mark.parametrize(
    "columns, teacher_columns, fill",
    # the larger one on either side; nothing to truncate; one column left
    [(41, V, NAN), (V, 48, INF), (V, 40, NAN), (V, V, 0.0), (4, 1, NAN), (1, 4, INF)],
)
def test_truncate_is_slicing(loss, columns, teacher_columns, fill):
    s, t, y = data(1, 3, columns=columns, teacher_columns=teacher_columns)
    v = min(columns, teacher_columns)
    s[..., v:], t[..., v:] = fill, fill  # the columns beyond are not read
    options = dict(reduction="none", return_metrics=True, upstream=torch.randn(1, 3).double())
    out, grad = run(loss, s, t, y, vocab_mismatch="truncate", **options)
    expected, expected_grad = run(loss, s[..., :v], t[..., :v], y, **options)
    close(out, expected)
    assert grad.shape == s.shape and (grad[..., v:] == 0).all()
    close(grad[..., :v], expected_grad)


def test_truncate_and_shift(loss):
    s, t, y = data(2, 4, columns=40)
    value, grad = run(loss, s, t, y, vocab_mismatch="truncate", shift=True)
    expected, expected_grad = run(loss, s[..., :V], t, y, shift=True)
    close(value, expected)
    close(grad[..., :V], expected_grad)
    assert (grad[..., V:] == 0).all()


@pytest.mark.parametrize("columns, teacher_columns", [(40, V), (V, 40)])
def test_label_beyond_the_truncated_vocabulary(backend, columns, teacher_columns):
    s, t, y = data(3, columns=columns, teacher_columns=teacher_columns)
    y[1] = V  # a column of the larger one
    options = dict(vocab_mismatch="truncate", backend=backend)
    with pytest.raises(ValueError, match=rf"labels.*\[0, {V}\).*got {V}\b"):
        drkl(s, t, y, **options)
    value, metrics = reverse_kl(s, t, y, reduction="none", return_metrics=True, **options)
    close(value, reverse_kl(s, t, reduction="none", **options))
    assert metrics.target_kl[1].isnan() and metrics.target_kl[[0, 2]].isfinite().all()


# support="teacher"


def masked_teacher():
    """Rows of one mask, so that its columns can be dropped by hand; labels outside the mask."""
    s, t, y = data(6)
    gone = torch.zeros(V, dtype=torch.bool)
    gone[[0, 5, 6, 20, V - 1]] = True
    kept = (~gone).nonzero()[:, 0]
    t[:, gone] = -INF
    where = torch.randint(len(kept), (6,))
    return s, t, kept[where], gone, where


LOWEST = torch.finfo(torch.float64).min


@pytest.mark.parametrize("mask", [-INF, LOWEST])
@pytest.mark.parametrize("fill", [None, NAN, INF, -INF])
def test_teacher_support_is_dropping_the_columns(loss, fill, mask):
    s, t, y, gone, where = masked_teacher()
    t[:, gone] = mask
    t[0, gone] = -INF  # whatever the filter
    if fill is not None:
        s[:, gone] = fill  # what is left out of both is not looked at
    options = dict(
        reduction="none", return_metrics=True, temperature=0.8, upstream=torch.randn(6).double()
    )
    out, grad = run(loss, s, t, y, support="teacher", filter_value=mask, **options)
    expected, expected_grad = run(loss, s[:, ~gone], t[:, ~gone], where, **options)
    close(out, expected)
    close(grad[:, ~gone], expected_grad)
    assert (grad[:, gone] == 0).all()


def test_a_gamma_of_1_minus_q_is_reverse_kl_without_its_pull_on_the_target(backend):
    """docs/faithfulness.md: what is left out is the derivative of 1 - q_y, times the tail's KL."""
    s, t, y = data(6)
    options = dict(reduction="none", upstream=torch.ones(6).double(), backend=backend)
    (loss, metrics), grad = run(reverse_kl, s, t, y, return_metrics=True, **options)
    q = metrics.student_target_prob
    value, without = run(drkl, s, t, y, gamma=1 - q, **options)
    close(value, loss)
    one_hot = torch.nn.functional.one_hot(y, V)
    pull = -(q * metrics.nontarget_kl)[:, None] * (one_hot - reference.softmax(s))
    assert (pull.gather(1, y[:, None]) < 0).all()
    close(grad - without, pull)


@labelled
@pytest.mark.parametrize("fill", [None, NAN, -INF])
def test_teacher_support_without_the_label(loss, case, fill):
    """Its part is then 0: what remains is (gamma times) reverse KL over the other columns."""
    s, t, _, gone, _ = masked_teacher()
    y = torch.tensor([0, 5, 6, 20, V - 1, 0])
    if fill is not None:
        s[:, gone] = fill
    options = dict(reduction="none", upstream=torch.randn(6).double())
    (value, metrics), grad = run(loss, s, t, y, support="teacher", return_metrics=True, **options)
    rest = (s[:, ~gone], t[:, ~gone], None)
    expected, expected_grad = run(reverse_kl, *rest, backend=case[1], **options)
    factor = 0.7 if case[0] == "drkl" else 1.0
    close(value, factor * expected)
    close(grad[:, ~gone], factor * expected_grad)
    assert (grad[:, gone] == 0).all()
    close(metrics.nontarget_kl, expected.detach())
    for zero in (metrics.target_kl, metrics.student_target_prob, metrics.teacher_target_prob):
        assert (zero == 0).all()
    close(metrics.student_entropy, -(p := reference.softmax(rest[0])).xlogy(p).sum(-1))


@pytest.mark.parametrize("teacher", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask", [-1e4, -1e9, "lowest"])
def test_filter_value_is_what_the_teachers_dtype_makes_of_it(loss, teacher, mask):
    """-1e9 is -998244352 in bfloat16, which is more, and -inf in float16."""
    mask = torch.finfo(teacher).min if mask == "lowest" else mask
    s, t, y, gone, _ = masked_teacher()
    s, t = s.float(), t.to(teacher)
    options = dict(support="teacher", reduction="none")
    expected = run(loss, s, t, y, **options)
    assert expected[0].isfinite().all()
    t[:, gone] = torch.tensor(mask).to(teacher)
    same(run(loss, s, t, y, filter_value=mask, **options), expected)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(filter_value=-1e9), ValueError, 'pass support="teacher"'),
        (dict(filter_value=INF, support="teacher"), ValueError, "below"),
        (dict(filter_value=NAN, support="teacher"), ValueError, "below"),
        (dict(filter_value=torch.tensor(-1.0), support="teacher"), TypeError, "number"),
        (dict(filter_value=None), TypeError, "number"),
    ],
)
def test_filter_values_that_are_none(loss, options, error, message):
    with pytest.raises(error, match=message):
        loss(*data(3), **options)


@pytest.mark.parametrize("mask", [-INF, -1e9])
def test_teacher_support_of_nothing(loss, mask):
    s, t, y = data(3)
    t[1] = mask
    value, grad = run(loss, s, t, y, support="teacher", filter_value=mask, reduction="none")
    assert value.isnan().tolist() == [False, True, False]
    assert grad.isnan().all(-1).tolist() == [False, True, False]


def test_full_support_of_a_masked_teacher(loss):
    """The default: +inf with gradient 0 where the student has mass that the teacher forbids."""
    s, t, y, gone, _ = masked_teacher()
    s[::2, gone] = -INF
    value, grad = run(loss, s, t, y, reduction="none")
    assert value.isinf().tolist() == [False, True] * 3
    assert (grad[1::2] == 0).all() and grad[::2].abs().amax(-1).gt(0).all()


# Metrics


def test_metrics(loss, truth, name):
    s, t, y = data(2, 3)
    weight = torch.tensor([[2.0, 1, 5], [0, 3, 1]])
    options = dict(return_metrics=True, temperature=1.7, weight=weight)
    value, metrics = loss(s.requires_grad_(), t, y, **options)
    close(metrics, truth(s, t, y, **options)[1])
    assert isinstance(metrics, RowMetrics) and metrics._fields == FIELDS
    assert FIELDS == ("loss", *TARGET_FIELDS, "student_entropy", "teacher_entropy", "counted")
    assert torch.equal(metrics.counted, weight != 0)
    assert value.requires_grad and not any(x is not None and x.requires_grad for x in metrics)
    # unweighted, except that weight 0 ignores the row
    rows = loss(s, t, y, temperature=1.7, reduction="none").detach()
    close(metrics.loss, torch.where(weight == 0, 0.0, rows))
    if name == "rkl-without-labels":
        assert [f for f in FIELDS if getattr(metrics, f) is None] == list(TARGET_FIELDS)
    same(value, loss(s, t, y, temperature=1.7, weight=weight))


def test_means_of_metrics_are_over_the_rows_that_count(loss, name):
    s, t, y = data(6)
    y[[1, 4]] = -100
    if name == "rkl-without-labels":
        weight = (y != -100).double()
        value, metrics = loss(s, t, y, weight=weight, return_metrics=True)
    else:
        value, metrics = loss(s, t, y, return_metrics=True)
    mean = metrics.mean()
    close(mean.loss, value)
    assert mean.counted == 4 and metrics.loss.mean() < 0.7 * value
    assert (mean.target_kl is None) == (name == "rkl-without-labels")
    _, nothing = loss(s, t, y * 0 - 100, weight=torch.zeros(6), return_metrics=True)
    assert nothing.mean().loss == 0 and nothing.mean().counted == 0


@labelled
def test_metrics_by_hand(loss, name):
    s, t, y = data(5)
    _, metrics = loss(s, t, y, return_metrics=True)
    q, p = torch.softmax(s, -1), torch.softmax(t, -1)
    q_y, p_y = (x.gather(-1, y[:, None])[:, 0] for x in (q, p))
    close(metrics.student_target_prob, q_y)
    close(metrics.teacher_target_prob, p_y)
    close(metrics.student_entropy, -(q * q.log()).sum(-1))
    close(metrics.teacher_entropy, -(p * p.log()).sum(-1))
    target = q_y * (q_y / p_y).log() + (1 - q_y) * ((1 - q_y) / (1 - p_y)).log()
    close(metrics.target_kl, target, 1e-9)
    rest = torch.arange(V) != y[:, None]
    q_hat, p_hat = (x[rest].view(5, V - 1) / (1 - x_y)[:, None] for x, x_y in ((q, q_y), (p, p_y)))
    close(metrics.nontarget_kl, (q_hat * (q_hat / p_hat).log()).sum(-1), 1e-9)
    factor = 0.7 if name == "drkl" else 1 - q_y
    close(metrics.loss, metrics.target_kl + factor * metrics.nontarget_kl, 1e-9)


@pytest.mark.parametrize("bad", [V, 10**6, -1, -2, -3, 2**40, -(2**63), 2**63 - 1])
def test_reverse_kl_with_a_label_outside(backend, bad):
    """Only the row's target metrics are NaN: neither loss nor gradient is."""
    s, t, y = data(4)
    options = dict(reduction="none", return_metrics=True, backend=backend)
    (_, clean), clean_grad = run(reverse_kl, s, t, y, **options)
    y[2] = bad
    (value, metrics), grad = run(reverse_kl, s, t, y, **options)
    expected, expected_grad = run(reverse_kl, s, t, None, reduction="none", backend=backend)
    close(value, expected)
    close(grad, expected_grad)
    same(grad[[0, 1, 3]], clean_grad[[0, 1, 3]])
    for field in FIELDS:
        now, before = getattr(metrics, field), getattr(clean, field)
        same(now[[0, 1, 3]], before[[0, 1, 3]])
        if field in TARGET_FIELDS:
            assert now[2].isnan()
        else:
            close(now[2], before[2])


def test_metrics_do_not_cost_the_loss(loss):
    """The same bits with and without them."""
    s, t, y = data(5)
    (value, _), grad = run(loss, s, t, y, return_metrics=True)
    same((value, grad), run(loss, s, t, y))


# dtypes and the backend


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("case", [CASES[0], *LABELLED[1:]], ids="-".join)
@pytest.mark.parametrize("teacher", FLOATS)
@pytest.mark.parametrize("student", FLOATS)
def test_dtypes_of_results(loss, student, teacher):
    s, t, y = data(2)
    s, t = s.to(student), t.to(teacher)
    wide = torch.float64 if torch.float64 in (student, teacher) else torch.float32
    (value, metrics), grad = run(loss, s, t, y, return_metrics=True, weight=torch.ones(2).double())
    *metrics, counted = metrics
    assert value.dtype == wide and {x.dtype for x in metrics if x is not None} == {wide}
    assert counted.dtype == torch.bool
    assert grad.dtype == student and t.grad is None


@pytest.mark.parametrize("function", [softmax, log_softmax])
@pytest.mark.parametrize("dtype", FLOATS)
def test_softmax(function, dtype, backend):
    x = (3 * torch.randn(2, 3, V)).to(dtype).requires_grad_()
    y = function(x, temperature=0.7, backend=backend)
    upstream = torch.randn(2, 3, V).to(dtype)
    y.backward(upstream)
    truth_x = x.detach().double().requires_grad_()
    truth_y = getattr(reference, function.__name__)(truth_x, temperature=0.7)
    truth_y.backward(upstream.double())
    assert y.dtype == x.grad.dtype == dtype and y.shape == x.shape and y.is_contiguous()
    eps = max(torch.finfo(dtype).eps, 1e-14)
    close(y.double(), truth_y, 8 * eps)
    close(x.grad.double(), truth_x.grad, 16 * eps)


@pytest.mark.parametrize("function", ["reverse_kl", "drkl", "softmax"])
def test_auto_is_tiled_on_the_cpu(function, monkeypatch):
    """Under the interpreter too."""
    used = []
    real = ops._implementation
    monkeypatch.setattr(
        ops, "_implementation", lambda name, *shard: used.append(name) or real(name, *shard)
    )
    s, t, y = data(2)
    args = (s,) if function == "softmax" else (s, t, y)
    args[0].requires_grad_()
    for backend in ("auto", "tiled", "triton"):
        used.clear()
        getattr(drkl_triton, function)(*args, backend=backend).sum().backward()
        assert set(used) == {"triton" if backend == "triton" else "tiled"}


def test_results_do_not_follow_the_default_dtype_and_device(loss):
    s, t, y = data(4)
    s, t = s.float(), t.float()
    expected = run(loss, s, t, y, weight=torch.ones(4), num_items=3, return_metrics=True)
    with torch.device("meta"):
        torch.set_default_dtype(torch.float64)
        try:
            out = run(
                loss, s, t, y, weight=y.new_ones(4), num_items=3, return_metrics=True,
                upstream=expected[0][0].new_full((), 1.5),
            )  # fmt: skip
        finally:
            torch.set_default_dtype(torch.float32)
    same(out, expected)


@pytest.mark.parametrize("option", ["temperature", "gamma"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
def test_0_dim_tensors_are_numbers(backend, option, dtype):
    """A schedule's tensor: its value, in the accumulator's precision."""
    s, t, y = data(4)
    number = 3 if dtype == torch.int64 else 0.625
    scalar = torch.tensor(number, dtype=dtype)
    out = run(drkl, s, t, y, backend=backend, return_metrics=True, **{option: scalar})
    expected = run(drkl, s, t, y, backend=backend, return_metrics=True, **{option: number})
    close(out, expected)


@pytest.mark.parametrize("option", ["temperature", "gamma", "num_items"])
def test_0_dim_float64_tensor_with_float32_logits(backend, option):
    s, t, y = data(4)
    call = dict(student_logits=s.float(), teacher_logits=t.float(), labels=y, backend=backend)
    value = drkl(**call, **{option: torch.tensor(0.3, dtype=torch.float64)})
    assert value.dtype == torch.float32
    close(value, drkl(**call, **{option: 0.3}), 1e-5)


def test_temperature_divides_both_logits_and_nothing_else(loss):
    """No hidden factor temperature²."""
    s, t, y = data(4)
    value, grad = run(loss, s, t, y, temperature=2.0)
    expected, expected_grad = run(loss, s / 2, t / 2, y)
    close(value, expected)
    close(grad, expected_grad / 2)
    for function in (softmax, log_softmax):
        close(function(s, temperature=2.0), function(s / 2))


@pytest.mark.parametrize("V, spread", [(50, 0.1), (1000, 3.0), (30000, 0.1), (1000, 10.0)])
@pytest.mark.parametrize("log", [False, True])
def test_softmax_is_as_precise_as_torchs(V, spread, log, backend):
    """Mean relative error in float32. Ours rounds x log2(e), too, which costs a factor of 1.5. A
    log p nearer to 0 than 0.1 hangs on the last bit of the sum, in both: it counts as 0.1.
    """
    x = torch.randn(8, V) * spread
    ours, theirs = (log_softmax, torch.log_softmax) if log else (softmax, torch.softmax)
    truth = theirs(x.double(), -1)
    error, allowed = (
        ((y - truth) / truth.abs().clamp_min(0.1 * log)).abs().mean()
        for y in (ours(x, backend=backend), theirs(x, -1))
    )
    assert error < 1.6 * allowed


def test_softmax_of_nothing(backend):
    for x in (torch.empty(0, 8)[:, ::2], torch.empty(0, 8), torch.empty(3, 0, 8)[..., ::2]):
        x.requires_grad_()
        for function in (softmax, log_softmax):
            function(x, backend=backend).sum().backward()
        assert x.grad.shape == x.shape
