"""gradient_in_forward=True: what it returns is what the loss and backward() return without it."""

import pytest
import torch

from drkl_triton import DRKLLoss, ReverseKLLoss, drkl, reverse_kl
from drkl_triton.kernels import tuning

INF, NAN = float("inf"), float("nan")
V = 281  # a tile of float64, and ends


@pytest.fixture(params=["tiled", "triton-interpreted"])
def backend(request, monkeypatch):
    monkeypatch.setattr(tuning, "team", lambda *args: 2)
    return request.param.partition("-")[0]


def data():
    s, t = 3 * torch.randn(2, 2, 2, V, dtype=torch.float64)
    y = torch.randint(V, (2, 2))
    y[0, 1] = -100
    s[1, 0, 7] = -INF
    s[1, 1, 200:] = t[1, 1, 200:] = -INF
    return s, t, y


def run(function, s, *args, factor=1.0, **options):
    s = s.detach().clone().requires_grad_()
    out = function(s, *args, **options)
    loss, metrics = out if isinstance(out, tuple) else (out, ())
    (factor * loss).backward()
    return loss.detach(), s.grad, *(x for x in metrics if x is not None)


def assert_same(actual, expected, tolerance=1e-12):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance, equal_nan=True)


OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum", "gamma": 0.3},
    "metrics": {"return_metrics": True, "temperature": 0.7},
    "weight, shift": {"weight": torch.tensor([[0.0, 2.0], [1.0, 0.5]]), "shift": True},
    "num_items": {"num_items": torch.tensor(7.0)},
    "num_items of 0": {"num_items": 0},
    "support": {"support": "teacher", "filter_value": -3.0},
    "reverse_kl": {"loss": reverse_kl, "num_items": 5.0},
    "without labels": {"loss": reverse_kl, "labels": None, "return_metrics": True},
}


@pytest.mark.parametrize(
    ("option", "factor"), [*((o, 1.0) for o in OPTIONS), ("mean", -2.5), ("weight, shift", 0.0)]
)
def test_is_the_same_loss_and_gradient(option, factor, backend):
    options = dict(OPTIONS[option])
    s, t, y = data()
    function, labels = options.pop("loss", drkl), options.pop("labels", y)
    args = (function, s, t, labels)
    expected = run(*args, factor=factor, backend=backend, **options)
    assert_same(
        run(*args, factor=factor, backend=backend, gradient_in_forward=True, **options), expected
    )
    assert (expected[1] != 0).any() == (factor != 0 and option != "num_items of 0")


def test_rows_that_have_no_number(backend):
    """A NaN, an infinity and a teacher that leaves out too much; times 0 they are 0."""
    s, t, y = data()
    s[0, 0, 5], t[1, 1, 9], t[1, 0, 11] = NAN, INF, -INF
    for factor in (1.0, 0.0):
        options = dict(factor=factor, backend=backend)
        expected = run(drkl, s, t, y, **options)
        assert_same(run(drkl, s, t, y, gradient_in_forward=True, **options), expected)
        assert expected[1].isnan().any() == (factor != 0)


def test_vocabularies_that_differ(backend):
    s, t, y = data()
    options = dict(vocab_mismatch="truncate", backend=backend)
    args = (drkl, s, t[..., :-20].contiguous(), y % 200)
    assert_same(run(*args, gradient_in_forward=True, **options), run(*args, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_is_the_students(dtype, backend):
    s, t, y = data()
    args = (drkl, s.to(dtype), t.float(), y)
    results = run(*args, gradient_in_forward=True, backend=backend)
    assert results[0].dtype == torch.float32 and results[1].dtype == dtype
    assert_same(results, run(*args, backend=backend), torch.finfo(dtype).eps)


def test_without_a_gradient_there_is_none(backend):
    s, t, y = data()
    options = dict(gradient_in_forward=True, backend=backend)
    expected = drkl(s, t, y, backend=backend)
    assert_same([drkl(s, t, y, **options)], [expected])
    with torch.no_grad():
        assert_same([drkl(s.requires_grad_(), t, y, **options)], [expected.detach()])


def test_backward_goes_once(backend):
    s, t, y = data()
    loss = drkl(s.requires_grad_(), t, y, gradient_in_forward=True, backend=backend)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward\\(\\) once"):
        loss.backward()


def test_second_derivatives_raise(backend):
    s, t, y = data()
    loss = drkl(s.requires_grad_(), t, y, gradient_in_forward=True, backend=backend)
    (grad,) = torch.autograd.grad(loss, s, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.sum().backward()


def test_compiled(backend):
    s, t, y = data()
    options = dict(gradient_in_forward=True, return_metrics=True, backend=backend)
    compiled = torch.compile(drkl, fullgraph=True, backend="aot_eager")
    assert_same(run(compiled, s, t, y, **options), run(drkl, s, t, y, **options))
    torch._dynamo.reset()


def test_errors():
    s, t, y = data()
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        drkl(s, t, y, gradient_in_forward=True, reduction="none")
    with pytest.raises(ValueError, match="float16"):
        drkl(s.half(), t, y, gradient_in_forward=True)
    with pytest.raises(TypeError, match="True or False"):
        reverse_kl(s, t, gradient_in_forward=1)
    with pytest.raises(ValueError, match="'mean' or 'sum'"):
        ReverseKLLoss(gradient_in_forward=True, reduction="none")


def test_a_program_alone_waits_for_itself(backend, monkeypatch):
    monkeypatch.setattr(tuning, "team", lambda *args: 1)
    s, t, y = data()
    args = (drkl, s, t, y)
    assert_same(run(*args, gradient_in_forward=True, backend=backend), run(*args, backend=backend))


def test_module(backend):
    s, t, y = data()
    module = DRKLLoss(gradient_in_forward=True, backend=backend)
    assert_same(run(module, s, t, y), run(drkl, s, t, y, backend=backend))
