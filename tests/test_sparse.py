"""Teachers of which K log-probabilities a token are known, against their definition in
reference.py: losses over cells, and log_probs_at.
"""

import sys
from pathlib import Path

import bounds
import losses
import pytest
import selection
import torch
from losses import LOSSES, condition

import drkl_triton
from drkl_triton import (
    SparseTeacher,
    _cells,
    _reduction,
    divergence,
    facts,
    linear_divergence,
    linear_log_probs_at,
    log_probs_at,
    objectives,
    ops,
    reference,
    tiled,
)
from drkl_triton._layout import rows_of
from drkl_triton.facts import plus, scaled

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from timing import allocations  # noqa: E402

INF, NAN = float("inf"), float("nan")
TAILS = ("bucket", "renormalise", "drop", "uniform")
NAMES = list(LOSSES)
ALONE = [n for n in NAMES if any(not f.needs & 1 for f, *_ in LOSSES[n].objective().terms)]


def rows(V, dtype=torch.float32):
    """(student, teacher, labels) [N, V] of every kind: flat, ordinary, peaked, high, low, sure of
    the label, sure against it, equal to the teacher, masked, all but one column masked.
    """
    N = 11
    s, t = torch.randn(N, V) * 2, torch.randn(N, V) * 2
    t += 0.7 * s
    labels = torch.randint(0, V, (N,))
    s[0], t[0] = 0.0, 0.0
    s[2], t[2] = s[2] * 8, t[2] * 8
    s[3] += 700
    s[4], t[4] = s[4] - 700, t[4] + 600
    s[5, labels[5]] += 60
    s[6, labels[6]] -= 60
    s[7] = t[7]
    s[8, ::3] = t[8, ::3] = -INF
    labels[8] = 1
    s[9, 1:], labels[9] = -INF, 0
    s, t = s.to(dtype), t.to(dtype)
    s[10] = t[10] = NAN  # it is ignored
    labels[10] = -100
    return s, t, labels


def defined(name, *tensors):
    """The rows at which the loss is: not the weights of adaptive_kl, the sign of total variation,
    where q = p.
    """
    both = "adaptive_kl", "total_variation"
    return [x[1:7] if name in both else x for x in tensors]


def sparse(t, K, labels, tail="bucket", temperature=1.0, ids=None, **options):
    """The teacher's K largest, with all that can be known of it."""
    t = t.double().nan_to_num(0.0, 0.0, -INF)
    if ids is None:
        ids = t.topk(K, -1).indices
    log_p = t.log_softmax(-1)
    at_label = log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    z = torch.stack([t.logsumexp(-1), (t / temperature).logsumexp(-1)], -1)
    options = {"log_z": z.float(), "label_log_probs": at_label.float()} | options
    return SparseTeacher(ids, log_p.gather(-1, ids).float(), tail=tail, **options)


def run(module, name, student, teacher, labels, upstream, **options):
    x = student.detach().requires_grad_()
    given = dict(reduction="none", **options)
    loss = module.divergence(LOSSES[name].objective(), x, teacher, labels, **given)
    (grad,) = torch.autograd.grad(loss, x, upstream.to(loss.dtype))
    return loss.detach(), grad


def kappa(name, student, teacher, labels, upstream, temperature):
    """The condition [N, V] of the gradient: of the cells', spread over the columns of the rest as
    their probabilities are.
    """
    s, V = student.double(), student.shape[-1]
    count = (labels != -100)[:, None]
    s = torch.where(count, s, 0.0)
    y = torch.where(labels == -100, -1, labels)
    _, log_p, _ = reference.cells(s, teacher, y, temperature)
    if teacher.tail == "renormalise":
        log_p = torch.cat([log_p, torch.full_like(log_p[:, :1], -INF)], -1)
    written = reference._spread(log_p, teacher, y, V).nan_to_num(0.0, INF, -INF) * temperature
    total = 0.0
    if teacher.tail == "uniform" or name in ALONE:
        total, _ = condition(name, s, written, labels, upstream, temperature=temperature)
    if teacher.tail == "uniform":
        return total
    s_cells, t_cells, place = reference.cells(s, teacher, y, temperature)
    at_cells, _ = condition(name, s_cells, t_cells, place, upstream / temperature)
    log_q = reference.log_softmax(s, temperature=temperature)
    at_columns = torch.zeros_like(s)
    if teacher.tail != "renormalise":
        share = log_q - s_cells[:, -1:]
        at_columns = at_cells[:, -1:] * share.exp() * (1 + share.abs().nan_to_num(0, 0, 0))
        at_columns = at_columns.nan_to_num(0, 0, 0)
    ids = teacher.ids.long()
    if teacher.label_log_probs is not None:
        ids = torch.cat([ids, y[:, None]], 1)
    ids = ids.clamp_min(0)
    there = s_cells[:, : ids.shape[1]] != -INF
    values = torch.where(there, at_cells[:, : ids.shape[1]], at_columns.gather(1, ids))
    return total + at_columns.scatter_reduce(1, ids, values, "amax")


def excess(name, student, teacher, labels, upstream, temperature=1.0, **options):
    """(loss, gradient): the largest error over its bound (bounds.py)."""
    given = labels, upstream
    at = dict(temperature=temperature)
    truth = run(reference, name, student.double(), teacher, *given, **at)
    baseline = run(reference, name, student.float(), teacher, *given, **at)
    ours = run(drkl_triton, name, student, teacher, *given, **at, **options)
    eps, out = torch.finfo(torch.float32).eps, torch.finfo(student.dtype)
    weights = LOSSES[name].weights()
    loss_bound = bounds._allowed(baseline[0].double(), truth[0])
    loss_bound = loss_bound + 16 * eps * (1 + weights) * (1 + truth[0].abs())
    rounded = baseline[1].to(student.dtype).double()
    grad_bound = bounds._allowed(rounded, truth[1]) + 2 * out.eps * truth[1].abs()
    grad_bound = grad_bound + 8 * eps * kappa(name, student, teacher, labels, upstream, temperature)
    grad_bound = grad_bound + out.smallest_normal * out.eps + 2.0**-126
    q = reference.softmax(student.double(), temperature=temperature).nan_to_num(0)
    own = 64 * torch.finfo(torch.float64).eps * (1 + weights) * upstream[:, None] / temperature
    grad_bound = grad_bound + own * q  # the truth's
    return (
        bounds.ratio(ours[0], truth[0], loss_bound),
        bounds.ratio(ours[1], truth[1], grad_bound),
    )


# --- values and gradients ---


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", NAMES)
def test_within_the_bound(name, tail):
    for V, K, dtype, temperature in (
        (1000, 1, torch.float32, 1.0),
        (1000, 20, torch.bfloat16, 2.0),
        (50257, 20, torch.float32, 1.0),
        (1000, 128, torch.float16, 0.5),
        (1000, 128, torch.float32, 2.0),
    ):
        student, teacher, labels = defined(name, *rows(V, dtype))
        given = sparse(teacher, K, labels, tail, temperature)
        upstream = torch.rand(len(labels)) + 0.5
        worst = excess(name, student, given, labels, upstream, temperature)
        assert max(worst) <= 1, (V, K, dtype, temperature, worst)


def test_a_dropped_tail_that_is_nearly_all_of_the_vocabulary():
    """The gradient is made of the other columns' probability, 0.002, and not of 1 - 0.998."""
    flat, labels = torch.zeros(1, 1000), torch.tensor([250])
    given = sparse(flat, 1, labels, "drop")
    _, grad = run(drkl_triton, "reverse_kl", flat, given, labels, torch.ones(1))
    _, truth = run(reference, "reverse_kl", flat.double(), given, labels, torch.ones(1))
    torch.testing.assert_close(grad.double(), truth, rtol=2e-6, atol=0)


INTERPRETED = [
    (name, tail)
    for i, name in enumerate(NAMES)
    for tail in TAILS
    if selection.taken(tail, TAILS, i) or selection.taken(tail, TAILS, i + 2)
]


@pytest.mark.parametrize("name, tail", INTERPRETED)
def test_interpreted_within_the_bound(name, tail, wide_tiles):
    turn = NAMES.index(name) + TAILS.index(tail)
    dtype, K = (torch.float32, torch.bfloat16)[turn % 2], (1, 20, 128)[turn % 3]
    student, teacher, labels = (x[::2] for x in defined(name, *rows(301, dtype)))
    given = sparse(teacher, K, labels, tail, 2.0)
    upstream = torch.rand(len(labels)) + 0.5
    worst = excess(name, student, given, labels, upstream, 2.0, backend="triton")
    assert max(worst) <= 1, worst


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", NAMES)
def test_all_columns_known_is_the_dense_loss(name, tail):
    V = 40
    # but the masked ones: of no mass left for the tail, 2^-52 is taken
    student, teacher, labels = defined(name, *(x[:8].double() for x in rows(V)))
    labels = labels.long()
    ids = torch.stack([torch.randperm(V) for _ in labels])
    log_p = reference.log_softmax(teacher).gather(-1, ids)
    known = SparseTeacher(ids, log_p, tail=tail)
    upstream = torch.rand(len(labels)).double() + 0.5
    dense = run(drkl_triton, name, student, teacher, labels, upstream)
    ours = run(drkl_triton, name, student, known, labels, upstream)
    for x, y in zip(ours, dense, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", NAMES)
def test_from_hidden_states(name, tail, reduction):
    N, V, H, K = 14, 90, 8, 5
    hidden, matrix = torch.randn(2, N // 2, H).double(), torch.randn(V, H).double()
    labels = torch.randint(0, V, hidden.shape[:-1])
    labels[0, 2] = -100
    weight = torch.rand(hidden.shape[:-1])
    weight[1, 1] = 0.0
    teacher = sparse(torch.randn(2, N // 2, V), K, labels, tail)
    objective = LOSSES[name].objective()
    options = dict(weight=weight, reduction=reduction, temperature=1.0)

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in (hidden, matrix)]
        loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    ours = gradients(
        lambda h, w: linear_divergence(
            objective, h, w, labels, teacher_logits=teacher, chunk_bytes=4 * V * 8, **options
        )
    )
    truth = gradients(
        lambda h, w: reference.divergence(objective, h @ w.t(), teacher, labels, **options)
    )
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_shift_scale_softcap_and_parameters_of_tokens(tail):
    B, T, V, H, K = 2, 5, 60, 8, 4
    hidden, matrix = torch.randn(B, T, H).double(), torch.randn(V, H).double()
    labels = torch.randint(0, V, (B, T))
    following = torch.roll(labels, -1, -1)
    teacher = sparse(torch.randn(B, T, V), K, following, tail)
    gamma = torch.rand(B, T).double() + 0.5
    objective = objectives.drkl(gamma) + 0.2 * objectives.cross_entropy()
    capped = 9 * torch.tanh(0.5 * (hidden @ matrix.t()) / 9)
    ours = linear_divergence(
        objective, hidden, matrix, labels, teacher_logits=teacher, shift=True, student_scale=0.5,
        student_softcap=9.0, reduction="none",
    )  # fmt: skip
    logits = divergence(objective, capped, teacher, labels, shift=True, reduction="none")
    truth = reference.divergence(objective, capped, teacher, labels, shift=True, reduction="none")
    torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits, truth, rtol=1e-6, atol=1e-6)
    assert (ours[:, -1] == 0).all()


def test_metrics_are_of_the_cells():
    student, teacher, labels = rows(200)
    given = sparse(teacher, 10, labels)
    y = torch.where(labels == -100, -1, labels)
    s, t, place = reference.cells(
        torch.where(labels[:, None] == -100, 0, student).double(), given, y
    )
    place = torch.where(labels == -100, -100, place)
    _, ours = drkl_triton.drkl(student, given, labels, return_metrics=True)
    _, truth = reference.drkl(s, t, place, return_metrics=True)
    for name, x, y in zip(ours._fields, ours, truth, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=2e-5, atol=2e-5, msg=name)
    _, without = drkl_triton.drkl(student, given, labels, return_metrics=True, reduction="none")
    torch.testing.assert_close(ours.loss, without.loss)


@objectives.separable
def regularised(facts):
    """Reverse KL less a third of the entropy, which then is of the cells, too."""
    return plus(objectives.reverse_kl(facts), scaled(-0.3, objectives.entropy(facts)))


@pytest.mark.parametrize("tail", TAILS)
def test_a_term_with_everything_in_it(tail, monkeypatch):
    monkeypatch.setitem(LOSSES, "regularised", losses.Loss(regularised, losses.reverse_kl))
    student, teacher, labels = (x[:8] for x in rows(60, torch.float64))
    given, upstream = sparse(teacher, 7, labels, tail), torch.rand(8).double() + 0.5
    ours = run(drkl_triton, "regularised", student, given, labels, upstream)
    truth = run(reference, "regularised", student, given, labels, upstream)
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("tail", ["bucket", "drop"])
def test_a_gradient_in_float16_comes_with_its_factor(tail):
    """What the losses from hidden states ask for on a GPU (slices.py)."""
    student, teacher, labels = (x[:8] for x in rows(60))
    known = sparse(teacher, 5, labels, tail)
    objective = objectives.drkl(0.5) + 50 * objectives.cross_entropy()
    columns, log_p, cell_label = ops.cells(
        known.ids, known.log_probs, known.label_log_probs, None, labels,
        torch.ones((), dtype=torch.float64), 60, tail, True, torch.float32,
    )  # fmt: skip
    one = torch.ones(())
    parameters = _reduction.parameters(objective.parameters, labels, False, torch.float32)
    loss = _cells.of(tiled, objective.key, objective.needs, one, 60, tail)
    cells, up = _cells.Cells(columns, log_p, cell_label), torch.full((8,), 3e4)
    pair = rows_of(student), cells, labels, parameters
    sums, factor = loss.sums(*pair), torch.full((8,), NAN)
    whole = loss.gradient(*pair, sums, up)
    scaled_down = loss.gradient(*pair, sums, up, factor=factor)
    assert (factor > 1).any() and scaled_down.abs().max() < 65504
    torch.testing.assert_close(scaled_down * factor[:, None], whole, rtol=1e-5, atol=1e-3)


def test_what_the_modes_do_outside_of_the_columns():
    """The gradients that docs/sparse-teachers.md says: of forward KL, by column."""
    student, teacher = torch.randn(1, 50).double(), torch.randn(1, 50).double()
    q, p = student.softmax(-1), teacher.softmax(-1)
    ids = p.topk(8).indices
    log_p = p.log().gather(-1, ids)
    inside = torch.zeros(1, 50, dtype=torch.bool).scatter(-1, ids, True)
    p_rest, q_rest = p[~inside].sum(), q[~inside].sum()
    expected = {
        "bucket": torch.where(inside, q - p, q * (1 - p_rest / q_rest)),
        "renormalise": torch.where(inside, q / (1 - q_rest) - p / (1 - p_rest), 0.0),
        "drop": (1 - p_rest) * q - torch.where(inside, p, 0.0),
        "uniform": q - torch.where(inside, p, p_rest / 42),
    }
    for tail, right in expected.items():
        given = SparseTeacher(ids, log_p, tail=tail)
        upstream = torch.ones(1)
        _, grad = run(drkl_triton, "forward_kl", student, given, None, upstream)
        torch.testing.assert_close(grad, right, rtol=1e-9, atol=1e-12)
        assert tail != "renormalise" or (grad[~inside] == 0).all()


# --- edges ---


def loss_of(student, teacher, labels=None, name="reverse_kl", **options):
    upstream = torch.ones(student.shape[:-1])
    return run(drkl_triton, name, student, teacher, labels, upstream, **options)


def one(ids, log_probs, **options):
    return SparseTeacher(torch.tensor([ids]), torch.tensor([log_probs]), **options)


def test_pads_duplicates_and_order_do_not_count():
    student = torch.randn(1, 30)
    plain = loss_of(student, one([4, 9, 20], [-1.0, -2.0, -3.0]))
    for ids, log_probs in (
        ([20, 4, 9], [-3.0, -1.0, -2.0]),
        ([4, -1, 9, 20, -1], [-1.0, -5.0, -2.0, -3.0, NAN]),
        ([4, 9, 9, 20, 4], [-1.0, -2.0, -0.1, -3.0, -7.0]),
        ([4, 4, 9, 20, 0], [-INF, -1.0, -2.0, -3.0, -INF]),
    ):
        for got, right in zip(loss_of(student, one(ids, log_probs)), plain, strict=True):
            torch.testing.assert_close(got, right, msg=str(ids))
    as_int32 = SparseTeacher(torch.tensor([[4, 9, 20]]).int(), torch.tensor([[-1.0, -2.0, -3.0]]))
    assert torch.equal(loss_of(student, as_int32)[0], plain[0])


@pytest.mark.parametrize("with_alone", [False, True])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", ["reverse_kl", "drkl", "js_divergence"])
def test_a_row_without_an_entry_is_ignored(name, tail, with_alone):
    """It is not read, and a mean does not count it; the label's own log-probability is an entry."""
    student, labels = torch.randn(4, 30), torch.tensor([3, 7, 4, 1])
    student[0] = NAN
    ids = torch.tensor([[-1, -1], [7, -1], [3, 4], [5, 6]])
    log_p = torch.tensor([[0.0, 0.0], [-1.0, -2.0], [-1.0, -2.0], [-INF, -INF]])
    at_label = torch.tensor([-INF, -1.0, -2.0, -1.0])
    teacher = SparseTeacher(ids, log_p, tail=tail, label_log_probs=at_label)
    objective = LOSSES[name].objective()
    if with_alone:
        objective = objective + objectives.cross_entropy()
    found = {}
    for of in (drkl_triton, reference):
        x = student.clone().requires_grad_()
        loss = of.divergence(objective, x, teacher, labels)
        loss.backward()
        assert (x.grad[0] == 0).all()
        rest = of.divergence(objective, student, teacher, labels, reduction="none")[1:]
        torch.testing.assert_close(loss.detach(), rest.mean())
        found[of] = loss.detach(), x.grad
    for ours, right in zip(found[drkl_triton], found[reference], strict=True):
        torch.testing.assert_close(ours, right)
    hidden, matrix = student.clone().requires_grad_(), torch.eye(30)
    loss = linear_divergence(objective, hidden, matrix, labels, teacher_logits=teacher)
    loss.backward()
    torch.testing.assert_close(loss.detach(), found[drkl_triton][0])
    torch.testing.assert_close(hidden.grad, found[drkl_triton][1])


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "drkl", "js_divergence"])
def test_probabilities_of_more_than_1_leave_the_tail_almost_nothing(name):
    student = torch.randn(1, 30)
    teacher = one([3, 5], [-0.5, -0.9])  # 1.013
    loss, grad = loss_of(student, teacher, torch.tensor([3]), name)
    truth = run(reference, name, student.double(), teacher, torch.tensor([3]), torch.ones(1))
    assert loss.isfinite().all() and grad.isfinite().all()
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_all_mass_on_the_columns_and_none(tail):
    for height in (40.0, 90.0, -40.0, -90.0):
        student = torch.randn(1, 500)
        student[0, :4] += height
        teacher = one([0, 1, 2, 3], [-1.2, -1.3, -1.5, -2.5], tail=tail)
        for name in ("reverse_kl", "forward_kl", "js_divergence"):
            worst = excess(name, student, teacher, torch.tensor([-1]), torch.ones(1))
            assert max(worst) <= 1, (height, name, worst)


@pytest.mark.parametrize("backend", ["tiled", pytest.param("triton", id="triton-interpreted")])
def test_rows_that_do_not_count_are_not_read(backend):
    student, teacher, labels = (x[:8] for x in rows(90))
    labels[3] = -100
    given = sparse(teacher, 6, labels)
    right = loss_of(student, given, labels, backend=backend)
    assert right[0][3] == 0 and (right[1][3] == 0).all()
    student[3] = NAN
    given.log_probs[3], given.ids[3] = NAN, 10**6
    got = loss_of(student, given, labels, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(got, right, strict=True))
    student[5, 7], given.log_probs[6, 1] = NAN, NAN
    loss, grad = loss_of(student, given, labels, backend=backend)
    assert loss.isnan().tolist() == [i in (5, 6) for i in range(8)]
    assert torch.equal(grad.isnan().all(-1), loss.isnan())
    assert torch.equal(grad.isnan().any(-1), loss.isnan())


@pytest.mark.parametrize("with_alone", [False, True])
def test_a_row_of_an_invalid_label_is_nan_in_every_column(with_alone):
    """On a GPU, where it is no error."""
    objective = objectives.drkl() + 0.1 * objectives.entropy() if with_alone else objectives.drkl()
    student = torch.randn(2, 30)
    columns = torch.tensor([[4, 9], [4, 9]], dtype=torch.int32)
    log_p = torch.tensor([[-1.0, -2.0, -0.7], [-1.0, -2.0, -0.7]])
    cells = _cells.Cells(columns, log_p, torch.tensor([0, facts.INVALID]))
    parameters = _reduction.parameters(objective.parameters, cells.label, False, torch.float32)
    loss = _cells.of(tiled, objective.key, objective.needs, torch.ones(()), 30, "bucket")
    given = rows_of(student), cells, torch.tensor([4, 7]), parameters
    sums = loss.sums(*given)
    assert torch.stack(
        loss.fields(sums, given[2], cells.label, parameters, False)
    ).isnan().tolist() == [[False, True]]
    grad = loss.gradient(*given, sums, torch.ones(2))
    assert grad[0].isfinite().all() and grad[1].isnan().all()


def test_an_infinite_term_has_no_gradient():
    student = torch.randn(1, 30)
    student[0, 4] = -INF
    teacher = one([4, 9], [-1.0, -2.0])
    for name in ("forward_kl", "mixed_kl"):
        loss, grad = loss_of(student, teacher, name=name)
        assert loss.item() == INF and (grad == 0).all()
    objective = objectives.reverse_kl() + objectives.cross_entropy()
    x = student.clone().requires_grad_()
    loss = divergence(objective, x, teacher, torch.tensor([4]))
    loss.backward()
    assert loss.item() == INF and (x.grad == 0).all()


def test_empty_batches():
    for shape in ((0,), (2, 0)):
        student = torch.randn(*shape, 30, requires_grad=True)
        teacher = SparseTeacher(torch.zeros(*shape, 3).long(), torch.zeros(*shape, 3))
        for tail in TAILS:
            teacher = SparseTeacher(teacher.ids, teacher.log_probs, tail=tail)
            loss = drkl_triton.reverse_kl(student, teacher)
            loss.backward()
            assert loss == 0 and student.grad.shape == student.shape
        log_q, tail = log_probs_at(student, teacher.ids)
        assert log_q.shape == (*shape, 3) and tail.shape == shape


def test_leading_strides_are_read_in_place():
    student = torch.randn(5, 2, 90).transpose(0, 1)
    teacher = sparse(torch.randn(2, 5, 90), 6, torch.zeros(2, 5).long())
    for tail in TAILS:
        given = SparseTeacher(teacher.ids, teacher.log_probs, tail=tail)
        for x, y in zip(loss_of(student, given), loss_of(student.contiguous(), given), strict=True):
            torch.testing.assert_close(x, y)


# --- errors ---


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(ids=[[1.0]]), TypeError, "ids must be int64"),
        (dict(ids=[1]), ValueError, "one shape"),
        (dict(log_probs=[[1]]), TypeError, "log_probs must be float16"),
        (dict(tail="none"), ValueError, "tail must be one of"),
        (dict(normalised=False), ValueError, 'tail="renormalise"'),
        (dict(label_log_probs=[[1.0]]), ValueError, "label_log_probs must have shape"),
        (dict(log_z=[1.0]), ValueError, r"log_z must have shape \(1, 2\)"),
    ],
)
def test_wrong_teachers(change, error, words):
    given = dict(ids=[[1]], log_probs=[[-1.0]]) | change
    given = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in given.items()}
    with pytest.raises(error, match=words):
        SparseTeacher(given.pop("ids"), given.pop("log_probs"), **given)


def test_what_does_not_fit_the_student():
    student, label = torch.randn(1, 30), torch.tensor([5])
    teacher = one([4, 9], [-1.0, -2.0])
    with pytest.raises(ValueError, match="label 5 at .0., which is not among the ids"):
        drkl_triton.drkl(student, teacher, label)
    with pytest.raises(ValueError, match=r"ids must be in \[0, 30\) or -1 .*, got 30 at \[0, 1\]"):
        drkl_triton.reverse_kl(student, one([4, 30], [-1.0, -2.0]))
    with pytest.raises(ValueError, match="log_z"):
        drkl_triton.reverse_kl(student, teacher, temperature=2.0)
    with pytest.raises(ValueError, match="log_z"):
        drkl_triton.reverse_kl(student, teacher, temperature=torch.tensor(2.0))
    with pytest.raises(ValueError, match="looks at the teacher's logits"):
        drkl_triton.reverse_kl(student, teacher, support="teacher")
    with pytest.raises(ValueError, match="leading shape of student_logits"):
        drkl_triton.reverse_kl(student[None], teacher)
    with pytest.raises(ValueError, match="requires grad"):
        SparseTeacher(teacher.ids, teacher.log_probs.clone().requires_grad_())
    drkl_triton.drkl(
        student, one([4, 9], [-1.0, -2.0], label_log_probs=torch.tensor([-3.0])), label
    )
    renormalised = one([4, 9], [-1.0, -2.0], tail="renormalise")
    drkl_triton.reverse_kl(student, renormalised, temperature=2.0)


def test_temperature_from_the_log_partition():
    """The same teacher in both forms, and as logits where all columns are known."""
    student, teacher = torch.randn(3, 40).double(), torch.randn(3, 40).double() * 3
    ids = teacher.topk(6).indices
    z = torch.stack([teacher.logsumexp(-1), (teacher / 3).logsumexp(-1)], -1)
    known = SparseTeacher(ids, teacher.log_softmax(-1).gather(-1, ids), log_z=z)
    raw = SparseTeacher(ids, teacher.gather(-1, ids), normalised=False, log_z=z[:, 1])
    at = SparseTeacher(ids, (teacher / 3).log_softmax(-1).gather(-1, ids))
    right = drkl_triton.reverse_kl(student / 3, at, reduction="none")
    for given in (known, raw):
        loss = drkl_triton.reverse_kl(student, given, temperature=3.0, reduction="none")
        torch.testing.assert_close(loss, right, rtol=1e-9, atol=1e-9)


# --- log_probs_at ---


def probabilities(function, logits, ids, upstream, **options):
    x = logits.detach().requires_grad_()
    log_q, tail = function(x, ids, **options)
    given = [u.to(y.dtype) * y.isfinite() for u, y in zip(upstream, (log_q, tail), strict=True)]
    (grad,) = torch.autograd.grad([log_q, tail], x, given)
    return log_q.detach(), tail.detach(), grad


@pytest.mark.parametrize("K", [1, 20, 128, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_log_probs_at(dtype, K, backend, wide_tiles):
    V = 2050 if backend == "tiled" else 1031
    if backend == "triton" and dtype == torch.float64 and K > 20:
        pytest.skip("one path")
    logits = rows(V)[0][:10].to(dtype)
    logits[1, :K] += 30  # the columns hold 1 - 1e-12
    ids = torch.randint(0, V, (10, K))
    ids[1] = torch.arange(K)
    ids[2, K // 2] = -1
    ids[3, -1] = ids[3, 0]
    ids[4] = -1
    ids[9, 0] = 0
    upstream = torch.randn(10, K), torch.randn(10)
    at = dict(temperature=2.0)
    truth = probabilities(reference.log_probs_at, logits.double(), ids, upstream, **at)
    base = probabilities(
        reference.log_probs_at,
        logits.to(torch.promote_types(dtype, torch.float32)),
        ids,
        upstream,
        **at,
    )
    ours = probabilities(log_probs_at, logits, ids, upstream, backend=backend, **at)
    eps, out = torch.finfo(ours[0].dtype).eps, torch.finfo(dtype)
    for i in range(2):
        bound = bounds._allowed(base[i].double(), truth[i]) + 16 * eps * (1 + truth[i].abs())
        assert bounds.ratio(ours[i], truth[i], bound) <= 1
    q = reference.log_softmax(logits.double(), temperature=2.0)
    rest = truth[1][:, None].masked_fill(truth[1][:, None] == -INF, 0.0)
    g, g_rest = upstream[0].abs().double() * (ids >= 0), upstream[1].abs().double()[:, None]
    terms = q.exp() * (g.sum(-1, keepdim=True) + g_rest) + (q - rest).exp() * g_rest
    terms = terms.scatter_add(1, ids.clamp_min(0), g) * (1 + q.abs().nan_to_num(0, 0, 0)) / 2
    bound = bounds._allowed(base[2].to(dtype).double(), truth[2]) + 8 * eps * terms
    bound = bound + 2 * out.eps * truth[2].abs() + out.smallest_normal * out.eps + 2.0**-126
    assert bounds.ratio(ours[2], truth[2], bound) <= 1
    assert (ours[2][4] == 0).all() and ours[1][4] == 0


def test_log_probs_at_of_the_label_is_log_softmax():
    logits = torch.randn(2, 5, 60, requires_grad=True)
    tokens = torch.randint(0, 60, (2, 5))
    ours = log_probs_at(logits, tokens[..., None], shift=True, return_tail=False)[..., 0]
    right = logits.log_softmax(-1).gather(-1, torch.roll(tokens, -1, 1)[..., None])[..., 0]
    torch.testing.assert_close(ours[:, :-1], right[:, :-1])
    assert (ours[:, -1] == -INF).all()
    (a,) = torch.autograd.grad(ours[:, :-1].sum(), logits)
    (b,) = torch.autograd.grad(right[:, :-1].sum(), logits)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_log_probs_at_edges(backend):
    logits = torch.randn(5, 40)
    logits[0, 7] = NAN
    logits[1, 3] = INF
    logits[2] = -INF
    logits[3, 5:] = -INF
    ids = torch.tensor([[1, 2], [1, 2], [1, 2], [1, 9], [1, 2]])
    log_q, tail = log_probs_at(logits, ids, backend=backend)
    assert log_q[:3].isnan().all() and tail[:3].isnan().all()
    assert log_q[3, 1] == -INF and log_q[3, 0].isfinite()
    full = log_probs_at(logits[4:], torch.arange(40)[None], backend=backend)
    assert full[1].item() == -INF
    torch.testing.assert_close(full[0], logits[4:].log_softmax(-1))


@pytest.mark.parametrize("K", [1, 3, 8, 300])
def test_repeated_ids_add_up(K):
    logits = torch.randn(4, 500).double()
    ids = torch.randint(0, 7, (4, K))
    upstream = torch.randn(4, K).double(), torch.randn(4).double()
    ours = probabilities(log_probs_at, logits, ids, upstream)
    truth = probabilities(reference.log_probs_at, logits, ids, upstream)
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


def test_linear_log_probs_at():
    hidden, matrix = torch.randn(2, 6, 8).double(), torch.randn(70, 8).double()
    bias = torch.randn(70).double()
    ids = torch.randint(-1, 70, (2, 6, 5))
    ids[0, 3] = -1
    upstream = torch.randn(2, 6, 5).double() * (ids >= 0), torch.randn(2, 6).double()
    upstream[1][1, 2] = upstream[0][1, 2, :] = 0.0

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in (hidden, matrix, bias)]
        out = function(*leaves)
        return [*out, *torch.autograd.grad(out, leaves, upstream)]

    options = dict(softcap=5.0, scale=0.7, chunk_bytes=3 * 70 * 8)
    ours = gradients(lambda h, w, b: linear_log_probs_at(h, w, ids, bias=b, **options))
    truth = gradients(
        lambda h, w, b: reference.log_probs_at(5 * torch.tanh(0.7 * (h @ w.t() + b) / 5), ids)
    )
    truth[1] = torch.where((ids >= 0).any(-1), truth[1], 0.0)
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_forward_keeps_little():
    from drkl_triton.graph import LogProbsFunction  # noqa: F401

    logits = torch.randn(64, 5000, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        log_probs_at(logits, torch.randint(0, 5000, (64, 8)))
        drkl_triton.reverse_kl(logits, sparse(torch.randn(64, 5000), 8, torch.zeros(64).long()))
    sizes = [x.numel() for x in kept if x.data_ptr() != logits.data_ptr()]
    assert max(sizes) <= 64 * 34


def test_ids_and_second_derivatives_are_checked():
    logits = torch.randn(3, 20, requires_grad=True)
    with pytest.raises(
        ValueError, match=r"ids must be \[..., K\] with the leading shape of logits"
    ):
        log_probs_at(logits, torch.tensor([1, 2, 3])[None])
    with pytest.raises(ValueError, match=r"got 20 at \[0, 0\]"):
        log_probs_at(logits, torch.tensor([[20], [1], [2]]))
    with pytest.raises(TypeError, match="int64 or int32"):
        log_probs_at(logits, torch.zeros(3, 1))
    with pytest.raises(TypeError, match="weight"):
        linear_log_probs_at(logits, torch.nn.Linear(20, 5), torch.zeros(3, 1).long())
    log_q = log_probs_at(logits, torch.zeros(3, 1).long(), return_tail=False)
    (grad,) = torch.autograd.grad(log_q.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    teacher = sparse(torch.randn(6, 50), 4, torch.zeros(6).long())

    def step(logits, ids, log_probs, labels):
        known = SparseTeacher(ids, log_probs)
        log_q, tail = log_probs_at(logits, ids)
        return drkl_triton.forward_kl(logits, known, labels) + log_q.mean() + tail.mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for function in (step, compiled):
        x = torch.randn(6, 50, generator=torch.Generator().manual_seed(3)).requires_grad_()
        function(x, teacher.ids, teacher.log_probs, torch.zeros(6).long()).backward()
        results.append(x.grad)
    assert torch.equal(*results)


def test_samples_are_unbiased():
    """Forward KL from ids drawn from p, with weights counts / N: the mean of its gradients is that
    of the whole teacher.
    """
    logits, teacher = torch.randn(1, 12).double(), torch.randn(1, 12).double()
    p = teacher.softmax(-1)
    draws = torch.multinomial(p.expand(4000, -1), 8, replacement=True)
    given = drkl_triton.sampled_teacher(draws)
    student = logits.expand(4000, -1)
    _, grads = run(drkl_triton, "forward_kl", student, given, None, torch.ones(4000))
    right = (logits.softmax(-1) - p)[0]
    deviation = grads.std(0) / 4000**0.5
    assert ((grads.mean(0) - right).abs() < 4.5 * deviation).all()


# --- where the columns come from ---


def test_teacher_topk():
    student, teacher = torch.randn(2, 7, 60), torch.randn(2, 7, 60) * 2
    labels = torch.randint(0, 60, (2, 7))
    labels[0, 0] = -100
    given = drkl_triton.teacher_topk(teacher.bfloat16(), 9, labels=labels, temperature=2.0)
    truth = teacher.bfloat16().double().log_softmax(-1)
    torch.testing.assert_close(
        given.log_probs.double(), truth.gather(-1, given.ids), rtol=0, atol=2e-6
    )
    assert given.label_log_probs[0, 0] == -INF
    at_label = truth.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    there = labels >= 0
    torch.testing.assert_close(
        given.label_log_probs.double()[there], at_label[there], rtol=0, atol=3e-6
    )
    cold = SparseTeacher(
        given.ids, (teacher.bfloat16().double() / 2).log_softmax(-1).gather(-1, given.ids)
    )
    right = drkl_triton.reverse_kl(student.double() / 2, cold, labels, reduction="none")
    whole = SparseTeacher(given.ids, given.log_probs, log_z=given.log_z)
    ours = drkl_triton.reverse_kl(student, whole, labels, temperature=2.0, reduction="none")
    torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="k must be from 1 to the vocabulary of 60"):
        drkl_triton.teacher_topk(teacher, 61)


def test_union_ids():
    student = torch.tensor([[5.0, 4.0, 0.0, 0.1, 3.0]])
    teacher = torch.tensor([[0.0, 4.0, 5.0, 0.1, 3.0]])
    for given in (teacher, drkl_triton.teacher_topk(teacher, 3)):
        ids = drkl_triton.union_ids(student, given, 2)
        assert ids.tolist() == [[0, 1, 2, -1]]


def test_sampled_teacher_counts():
    given = drkl_triton.sampled_teacher(torch.tensor([[7, 3, 7, -1, 9, 7], [-1] * 6]))
    pairs = torch.stack([given.ids[0].double(), given.log_probs[0].double().exp()], 1).tolist()
    found = {i: p for i, p in pairs if i >= 0}
    assert found == pytest.approx({3: 0.2, 7: 0.6, 9: 0.2})
    assert (given.ids[1] == -1).all() and given.tail == "drop"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_all_that_is_of_the_size_of_the_logits(dtype):
    """Besides it there is scratch of up to 12.6 MB."""
    N, V = 64, 262144
    student = torch.randn(N, V).to(dtype).requires_grad_()
    teacher = drkl_triton.teacher_topk(torch.randn(N, V), 20)
    with allocations(student.device) as memory:
        drkl_triton.forward_kl(student, teacher).backward()
    assert student.grad.nbytes <= memory.peak <= student.grad.nbytes + 14e6
