"""The losses from hidden states: right against float64 logits, whatever the option, and small."""

import sys
from pathlib import Path

import bounds
import losses
import pytest
import selection
import torch

import drkl_triton
from drkl_triton import (
    _loss,
    _reduction,
    algebra,
    drkl,
    facts,
    linear_drkl,
    linear_reverse_kl,
    reverse_kl,
    slices,
    tiled,
)
from drkl_triton._layout import rows_of

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
from timing import allocations  # noqa: E402

OPS = ["reverse_kl", "drkl"]
LOGITS = {"reverse_kl": reverse_kl, "drkl": drkl}
LINEAR = {"reverse_kl": linear_reverse_kl, "drkl": linear_drkl}


def head(leading, H, V, dtype=torch.float64, bias=False, scale=1.0, softcap=None):
    """(hidden, weight, bias, scale, softcap) whose logits have a spread of about 3 nats."""
    hidden = torch.randn(*leading, H, dtype=torch.float64).to(dtype)
    weight = (3 * torch.randn(V, H, dtype=torch.float64) / H**0.5).to(dtype)
    return hidden, weight, torch.randn(V).to(dtype) if bias else None, scale, softcap


# --- right, element by element ---

# (tokens, H, teacher's H, V): several slices each; one column a tile's worth; GPT-2's and Qwen's
# vocabularies; the widest hidden states
SIZES = [(7, 64, 96, 37), (5, 1024, 64, 4097), (3, 64, 128, 50257), (3, 64, 128, 151936)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def cases():
    """Everything with everything; the longest rows once, tiled, in the usual dtypes."""
    for turn, size in enumerate(SIZES):
        long = size[3] > 5000
        for dtype in DTYPES[: 2 if long else 4]:
            if long and not selection.taken(dtype, DTYPES[:2], turn):
                continue
            wide = dtype == torch.float64 and not selection.ALL
            for recompute in (False,) if long or wide else (False, True):
                for backend in ("tiled",) if long else ("tiled", "triton"):
                    name = f"H{size[1]}-{size[2]}-V{size[3]}-{dtype}-{backend}"
                    name += "-recompute" * recompute
                    yield pytest.param(size, dtype, recompute, backend, id=name)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("size", "dtype", "recompute", "backend"), list(cases()))
def test_loss_and_gradients_are_right(op, size, dtype, recompute, backend):
    N, H, teacher_H, V = size
    student = head((N,), H, V, dtype, bias=True)
    teacher = head((N,), teacher_H, V, dtype, bias=True)
    labels = torch.randint(V, (N,))
    upstream = torch.randn(N, dtype=torch.float64)
    ours = run_ours(op, student, teacher, labels, upstream, recompute, backend, V)
    excess = bounds.linear_excess(op, student, teacher, labels, upstream, ours=ours)
    assert max(excess) <= 1, excess


def run_ours(op, student, teacher, labels, upstream, recompute, backend, V, **options):
    """Per-row losses and gradients in slices of two rows. Where the gradients are made in forward,
    the loss is the weighted sum of the rows.
    """
    options = {"chunk_bytes": 2 * 2 * 8 * (V + 64), "backend": backend, **options}
    call = bounds.linear_ours(op, **options)
    if recompute:
        return bounds.run_linear(call, student, teacher, labels, upstream, reduction="none")

    def weighted(student, teacher, labels):
        more = {"weight": upstream, "reduction": "sum", "return_metrics": True}
        return call(student, teacher, labels, **more)

    leaves = [None if x is None else x.detach().requires_grad_() for x in student[:3]]
    loss, metrics = weighted((*leaves, *student[3:]), teacher, labels)
    factor = torch.tensor(1.7, dtype=loss.dtype)  # an upstream gradient, taken out again below
    grads = torch.autograd.grad(loss, [x for x in leaves if x is not None], factor)
    return metrics.loss, [g / 1.7 if g.dtype.itemsize >= 4 else g.double() / 1.7 for g in grads]


def test_a_softcap_and_a_scale_are_in_the_bound_too(backend):
    student = head((6,), 64, 101, torch.float32, scale=0.7, softcap=5.0)
    teacher = head((6,), 32, 101, torch.float32, bias=True, scale=1.3, softcap=8.0)
    labels, upstream = torch.randint(101, (6,)), torch.randn(6, dtype=torch.float64)
    inputs = ("drkl", student, teacher, labels, upstream)
    ours = run_ours(*inputs, False, backend, 101)
    assert max(bounds.linear_excess(*inputs, ours=ours)) <= 1


def test_rounding_the_logits_first_would_break_the_bound():
    student, teacher = (head((6,), 64, 997, torch.bfloat16) for _ in range(2))
    labels, upstream = torch.randint(997, (6,)), torch.randn(6, dtype=torch.float64)

    def rounded(student, teacher, labels):
        s, t = (bounds.logits_of(*x).float() for x in (student, teacher))
        return drkl(s, t, labels, reduction="none")

    ours = bounds.run_linear(rounded, student, teacher, labels, upstream)
    excess = bounds.linear_excess("drkl", student, teacher, labels, upstream, ours=ours)
    assert excess[0] > 2 and max(excess[1:]) > 2, excess


# --- every option, against the losses from float64 logits ---

B, T, V, H = 2, 5, 23, 12


def labels_and_weight():
    labels = torch.randint(V - 3, (B, T))
    labels[0, 1] = labels[1, 3] = -100
    weight = torch.rand(B, T, dtype=torch.float64)
    weight[1, 0] = 0.0
    return labels, weight


OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "recompute": {"recompute": True},
    "one row a slice": {"chunk_bytes": 1},
    "temperature": {"temperature": 1.7},
    "0-dim temperature": {"temperature": torch.tensor(0.6)},
    "weight": {"weight": ...},
    "weight, none": {"weight": ..., "reduction": "none"},
    "num_items": {"num_items": 3.5},
    "0-dim num_items": {"num_items": torch.tensor(7)},
    "num_items of 0": {"num_items": 0},
    "shift": {"shift": True},
    "shift, weight": {"shift": True, "weight": ..., "reduction": "sum"},
    "ignore_index": {"ignore_index": 3},
    "truncated teacher": {"vocab_mismatch": "truncate", "teacher_V": V - 3},
    "truncated student": {"vocab_mismatch": "truncate", "teacher_V": V + 4},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "softcap, recompute": {"softcap": 4.0, "recompute": True},
    "scale": {"scale": 0.3},
    "bias, scale, softcap": {"bias": True, "scale": 0.3, "softcap": 2.0},
    "teacher_logits": {"given": "plain"},
    "teacher_logits, transposed": {"given": "transposed"},
    "teacher_logits, expanded": {"given": "expanded"},
    "teacher_logits, strided": {"given": "strided"},
    "teacher_logits, softcap": {"given": "plain", "softcap": 4.0},
    "support": {"given": "masked", "support": "teacher"},
    "finite mask": {"given": "finite mask", "support": "teacher", "filter_value": -1e9},
    "masked teacher": {"given": "masked"},
}
GIVEN = {
    "plain": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda x: x[:1].expand(B, T, -1),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "masked": lambda x: x.masked_fill(x < x.quantile(0.2), -torch.inf),
    "finite mask": lambda x: x.masked_fill(x < x.quantile(0.2), -1e9),
}


# without labels the interpreted kernels have some
FEW = "plain", "weight", "shift", "masked teacher"
CASES = [
    pytest.param(op, option, backend, id=f"{backend}-{op}-{option}")
    for backend in ("tiled", "triton")
    for op in OPS
    for option in OPTIONS
    if op == "drkl" or option != "ignore_index"
    if op == "drkl" or backend == "tiled" or option in FEW or selection.ALL
]


@pytest.mark.parametrize("op, option, backend", CASES)
def test_every_option_does_what_it_does_for_logits(op, option, backend):
    options, labelled = dict(OPTIONS[option]), op == "drkl"
    labels, weight = labels_and_weight()
    if op == "drkl":
        options["gamma"] = 0.3
        if option == "ignore_index":
            labels[labels == -100] = 3
    if "weight" in options:
        options["weight"] = weight
    numbers = {k: options.pop(k, None) for k in ("scale", "softcap", "bias", "given", "teacher_V")}
    layer = {"bias": bool(numbers["bias"]), "scale": numbers["scale"] or 1.0}
    layer["softcap"] = numbers["softcap"]
    student = head((B, T), H, V, **layer)
    teacher = head((B, T), H + 3, numbers["teacher_V"] or V, **layer)
    if numbers["given"]:
        teacher = GIVEN[numbers["given"]](bounds.logits_of(*teacher))
    more = {k: options.pop(k) for k in ("recompute", "chunk_bytes") if k in options}
    options |= {"return_metrics": True}

    def run(function):
        leaves = [None if x is None else x.detach().requires_grad_() for x in student[:3]]
        loss, metrics = function((*leaves, *student[3:]), teacher, labels if labelled else None)
        upstream = torch.sin(torch.arange(loss.numel()) + 1.0).view_as(loss).double()
        grads = torch.autograd.grad(loss, [x for x in leaves if x is not None], upstream)
        return loss.detach(), *grads, *(x for x in metrics if x is not None)

    def from_logits(student, teacher, labels):
        t = teacher if isinstance(teacher, torch.Tensor) else bounds.logits_of(*teacher)
        return LOGITS[op](bounds.logits_of(*student), t, labels, backend=backend, **options)

    actual = run(bounds.linear_ours(op, backend, **{"chunk_bytes": 1500} | more, **options))
    for a, e in zip(actual, run(from_logits), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-13, equal_nan=True)


# --- edges ---


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_row_of_nan_stays_alone_in_d_hidden_and_an_ignored_one_is_not_read(reduction, backend):
    hidden, weight, *_ = head((4,), H, V, torch.float32)
    hidden[1] = hidden[2] = float("nan")
    hidden.requires_grad_()
    labels = torch.tensor([1, -100, 2, 3])
    loss = linear_drkl(
        hidden, weight, labels, teacher_logits=torch.randn(4, V), reduction=reduction,
        backend=backend,
    )  # fmt: skip
    loss.sum().backward()
    assert hidden.grad[2].isnan().all() and (hidden.grad[1] == 0).all()
    assert hidden.grad[[0, 3]].isfinite().all()
    hidden.grad = None
    loss = linear_drkl(hidden, weight, labels, teacher_logits=torch.randn(4, V), backend=backend)
    (loss * 0.0).backward()  # an upstream gradient of 0, as for logits
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_row_of_upstream_gradient_0_has_gradient_0_whatever_it_holds(
    softcap, bad, labelled, backend
):
    hidden, weight, bias, *_ = head((4,), H, V, torch.float64, bias=True)
    hidden[2] = bad
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    labels = torch.randint(V, (4,)) if labelled else None
    teacher = {"teacher_hidden": torch.randn(4, H).double(), "teacher_weight": weight.detach()}

    def grads(upstream, rows=slice(None), **options):
        loss = linear_reverse_kl(
            hidden[rows], weight, None if labels is None else labels[rows], student_bias=bias,
            teacher_hidden=teacher["teacher_hidden"][rows], teacher_weight=weight.detach(),
            student_softcap=softcap, backend=backend, **options,
        )  # fmt: skip
        return torch.autograd.grad(loss, leaves, upstream)

    ours = grads(torch.tensor([1.0, 2.0, 0.0, 3.0]), reduction="none")
    rest = grads(torch.tensor([1.0, 2.0, 3.0]), [0, 1, 3], reduction="none")
    torch.testing.assert_close(ours, rest)
    for g in grads(torch.tensor(1.0), num_items=0):
        assert (g == 0).all()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (3,)])
def test_without_a_row_that_counts_all_is_zero(shape, backend):
    hidden, weight, *_ = head(shape, H, V, torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    labels = torch.full(shape, -100)
    for options in ({}, {"recompute": True}):
        loss = linear_reverse_kl(
            hidden, weight, labels, teacher_hidden=hidden.detach(), teacher_weight=weight.detach(),
            backend=backend, **options,
        )  # fmt: skip
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert loss == 0 and all((g == 0).all() and g.dtype == torch.bfloat16 for g in grads)


def test_frozen_and_tied_matrices():
    hidden, weight, *_ = head((5,), H, V, torch.float32)
    teacher = {"teacher_logits": torch.randn(5, V)}
    labels = torch.randint(V, (5,))
    hidden.requires_grad_()
    linear_drkl(hidden, weight, labels, **teacher).backward()
    assert weight.grad is None
    tokens = torch.randint(V, (5,))
    grads = []
    for function in (
        lambda h, w: linear_drkl(h, w, labels, **teacher),
        lambda h, w: drkl(h @ w.t(), teacher["teacher_logits"], labels),
    ):
        tied = weight.detach().clone().requires_grad_()
        function(tied[tokens] * 2, tied).backward()
        grads.append(tied.grad)
    torch.testing.assert_close(*grads)


def test_a_frozen_matrix_costs_no_product(monkeypatch):
    calls = []
    multiply = slices.multiply
    monkeypatch.setattr(slices, "multiply", lambda *a, **k: (calls.append(1), multiply(*a, **k)))
    hidden, weight, *_ = head((5,), H, V, torch.float32)
    teacher = {"teacher_hidden": hidden, "teacher_weight": weight}

    def products(hidden, weight, **options):
        calls.clear()
        loss = linear_reverse_kl(hidden, weight, **teacher, **options)
        if loss.requires_grad:
            loss.sum().backward()
        return len(calls)

    leaf, matrix = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    assert products(hidden, weight) == 2
    assert products(leaf, weight) == 3
    assert products(leaf, matrix) == 4
    assert products(leaf, matrix, recompute=True) == 6
    assert products(leaf, matrix, reduction="none") == 6
    with torch.no_grad():
        assert products(leaf, matrix) == 2


# --- memory ---


@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=["in-forward", "recompute"])
def test_memory_is_what_chunk_bytes_says_however_many_tokens(options):
    chunk, V, H = 4 << 20, 20_000, 16
    peaks = []
    for N in (256, 1024):
        hidden, weight, *_ = head((N,), H, V, torch.float32)
        teacher = {"teacher_hidden": hidden.clone(), "teacher_weight": weight.clone()}
        hidden.requires_grad_(), weight.requires_grad_()
        with allocations(torch.device("cpu")) as count:
            loss = linear_reverse_kl(hidden, weight, **teacher, chunk_bytes=chunk, **options)
            grads = torch.autograd.grad(loss, (hidden, weight))
        outputs = sum(g.nbytes for g in grads)
        # the float32 gradients before they are multiplied, and the tiled backend's scratch
        assert count.peak < chunk + 2 * outputs + 14e6
        peaks.append(count.peak - 2 * outputs)
    assert peaks[1] < peaks[0] + 0.5e6


def test_plan_keeps_to_its_bytes():
    for count in (0, 1, 5, 100, 4096, 10_000):
        for slice_bytes, group_bytes in ((8, 0), (8, 2), (1000, 250), (10**9, 10**8)):
            for chunk in (1, 10_000, 10**6, 10**9):
                group, height = slices.plan(count, slice_bytes, group_bytes, chunk)
                assert height >= 1 and group % height == 0
                taken = height * slice_bytes + group * group_bytes
                if height > 1:
                    assert taken <= chunk


# --- 16-bit products with float32 sums, as CUDA has them ---


@pytest.fixture
def wide_products(monkeypatch):
    """Emulates torch.mm(..., out_dtype=torch.float32), which the CPU lacks."""

    def multiply(a, b, out, add=False):
        assert a.dtype == b.dtype
        product = a.double() @ b.double()
        out.copy_(out + product if add else product)

    monkeypatch.setattr(slices, "multiply", multiply)
    monkeypatch.setattr(slices, "multiplies_into_float32", lambda device, dtype: True)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_gradients_rounded_to_16_bits_for_the_product_are_right(
    op, dtype, softcap, backend, wide_products
):
    N = 37 if backend == "tiled" else 8
    student = head((N,), 64, 101, dtype, bias=True, softcap=softcap)
    teacher = head((N,), 32, 101, dtype)
    labels, upstream = torch.randint(101, (N,)), torch.randn(N, dtype=torch.float64)
    inputs = (op, student, teacher, labels, upstream)
    # half a unit; the interpreter truncates to bfloat16
    rounding = torch.finfo(dtype).eps / (1 if backend == "triton" else 2)
    for recompute in (False, True):
        ours = run_ours(*inputs, recompute, backend, 101)
        excess = bounds.linear_excess(*inputs, ours=ours, rounding=rounding)
        assert max(excess) <= 1, excess


def test_a_float16_gradient_divided_by_many_tokens_does_not_vanish(wide_products):
    student, teacher = (head((3,), 64, 101, torch.float16) for _ in range(2))
    hidden, weight = student[0].requires_grad_(), student[1].requires_grad_()
    logits = bounds.logits_of(*teacher)
    options = {"teacher_logits": logits, "num_items": 1e7}
    loss = linear_reverse_kl(hidden, weight, **options)
    grads = torch.autograd.grad(loss, (hidden, weight), torch.tensor(65536.0 * 16))
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = torch.autograd.grad(
        reverse_kl(wide[0] @ wide[1].t(), logits.double(), num_items=1e7),
        wide,
        torch.tensor(65536.0 * 16, dtype=torch.float64),
    )
    for g, e in zip(grads, expected, strict=True):
        torch.testing.assert_close(g.double(), e, rtol=0.02, atol=0.02 * e.abs().max().item())


HOT = {
    "masked teacher": {},
    "temperature 0.5, gamma 50": {"temperature": 0.5, "gamma": 50.0},
    "temperature 0.2, gamma 50": {"temperature": 0.2, "gamma": 50.0},
    "temperature 1e4": {"temperature": 1e4},
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("case", HOT)
def test_float16_gradients_neither_overflow_nor_vanish(op, case, wide_products):
    """Rounded to 11 bits, no worse, and finite where the divergence is in the thousands."""
    hidden, weight, bias, *_ = head((64,), 32, 200, torch.float16, bias=True)
    logits = torch.randn(64, 200).half()
    if case == "masked teacher":
        logits[:, 150:] = -1e4
    labels = torch.randint(150, (64,))
    options = {k: v for k, v in HOT[case].items() if op == "drkl" or k != "gamma"}
    grads = []
    for dtype in (torch.float16, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, bias)]
        loss = LINEAR[op](
            leaves[0], leaves[1], labels, student_bias=leaves[2], teacher_logits=logits.to(dtype),
            **options,
        )  # fmt: skip
        upstream = torch.tensor(65536.0, dtype=loss.dtype)  # loss scaling
        grads.append([g.double() for g in torch.autograd.grad(loss, leaves, upstream)])
    for ours, truth in zip(*grads, strict=True):
        size = truth.abs().max().item()
        if size < 6e4:
            torch.testing.assert_close(ours, truth, rtol=0.01, atol=0.004 * size + 1e-7)
        else:  # float16 itself does not hold them
            assert not ours.isnan().any()


def test_the_bound_of_a_gradient_holds():
    for spread in (0.1, 3.0, 30.0, 3000.0):
        s, t = spread * torch.randn(2, 500, 11, dtype=torch.float64)
        y = torch.randint(-1, 11, (500,))
        inv = torch.tensor(0.7, dtype=torch.float64)
        for name, entry in losses.LOSSES.items():
            objective = entry.objective()
            parameters = _reduction.parameters(objective.parameters, y, False, torch.float64)
            needs = objective.needs
            loss = _loss.of(tiled, objective, inv, 11)._replace(needs=needs)
            sums = loss.sums(rows_of(s), rows_of(t), y, parameters)
            formulas = algebra.formula_arguments(sums, y, inv, parameters)
            bound = facts.gradient_bound(*formulas, loss.program.terms, loss.program.phis, needs)
            has = y >= 0
            x = s.clone().requires_grad_()
            value = losses.truth(name)(x[has], t[has], y[has], temperature=1 / 0.7, reduction="sum")
            (grad,) = torch.autograd.grad(value, x)
            assert (grad.abs().amax(1) <= bound * (1 + 1e-9))[has].all(), (name, spread)


def test_teacher_logits_that_cannot_be_read_in_place_are_not_copied_whole():
    N, V = 2000, 4000
    wide = torch.randn(N, 2 * V)[:, ::2]
    hidden, weight = torch.randn(N, 8).requires_grad_(), torch.randn(V, 8)
    for logits in (wide, torch.randn(V, N).t()):
        with allocations(torch.device("cpu")) as count:
            linear_reverse_kl(hidden, weight, teacher_logits=logits, chunk_bytes=1 << 20)
        assert count.peak < 20e6 < N * V * 4


def test_modules_are_the_functions():
    hidden, weight, *_ = head((5,), H, V, torch.float32)
    labels = torch.randint(V, (5,))
    teacher = {"teacher_hidden": hidden + 1, "teacher_weight": weight, "num_items": 7}
    options = {"student_softcap": 3.0, "teacher_scale": 0.5, "chunk_bytes": 999}
    module = drkl_triton.LinearDRKLLoss(gamma=0.2, **options)
    expected = linear_drkl(hidden, weight, labels, gamma=0.2, **teacher, **options)
    assert torch.equal(module(hidden, weight, labels, **teacher), expected)
    module = drkl_triton.LinearReverseKLLoss(**options)
    expected = linear_reverse_kl(hidden, weight, labels, **teacher, **options)
    assert torch.equal(module(hidden, weight, labels, **teacher), expected)
    assert "student_softcap=3.0" in repr(module) and not module.state_dict()
    with pytest.raises(ValueError, match="teacher_scale"):
        drkl_triton.LinearReverseKLLoss(teacher_scale=-1.0)
