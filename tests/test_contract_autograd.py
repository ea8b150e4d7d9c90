"""How the functions behave in PyTorch: graphs, modes, transforms, threads, memory, modules."""

import copy
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import drkl_triton
from drkl_triton import DRKLLoss, ReverseKLLoss, drkl, log_softmax, ops, reverse_kl, softmax
from drkl_triton._layout import rows_of

V = 37


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small gain nothing from a second one, and lose to whatever else runs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Each takes (student, teacher, labels) and gives one value per row or more.
FUNCTIONS = {
    "rkl": lambda s, t, y, **o: reverse_kl(s, t, reduction="none", **o),
    "drkl": lambda s, t, y, **o: drkl(s, t, y, reduction="none", **o),
    "softmax": lambda s, t, y, **o: softmax(s, **o),
    "log_softmax": lambda s, t, y, **o: log_softmax(s, **o),
}
# rkl and drkl run the same kernels, and so do the two softmaxes.
CASES = [*((name, "tiled") for name in FUNCTIONS), ("drkl", "triton"), ("softmax", "triton")]
functions = pytest.mark.parametrize("name, backend", CASES)


def data(*shape, dtype=torch.float32):
    student = 3 * torch.randn(*shape, V, dtype=dtype)
    return student, 3 * torch.randn(*shape, V, dtype=dtype), torch.randint(V, shape)


def loss_of(name, backend):
    """name as a scalar, whose upstream gradient per element is not constant."""

    def loss(s, t, y):
        out = FUNCTIONS[name](s, t, y, backend=backend)
        return (out * torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum()

    return loss


def grad_of(name, backend, s, t, y):
    s = s.detach().clone().requires_grad_()
    return torch.autograd.grad(loss_of(name, backend)(s, t, y), s)[0]


# Backward


@functions
def test_backward_twice(name, backend):
    s, t, y = data(3)
    expected = grad_of(name, backend, s, t, y)
    s.requires_grad_()
    loss = loss_of(name, backend)(s, t, y)
    loss.backward(retain_graph=True)
    assert torch.equal(s.grad, expected)
    s.grad = None
    loss.backward()
    assert torch.equal(s.grad, expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@functions
def test_gradients_accumulate(name, backend):
    s, t, y = data(4)
    s.requires_grad_()
    loss = loss_of(name, backend)
    for rows in (slice(0, 2), slice(2, 4), slice(0, 2)):
        loss(s[rows], t[rows], y[rows]).backward()
    first = grad_of(name, backend, s[:2], t[:2], y[:2])
    second = grad_of(name, backend, s[2:], t[2:], y[2:])
    torch.testing.assert_close(s.grad, torch.cat([2 * first, second]))


def test_num_items_adds_up_over_micro_batches(backend):
    """Gradient accumulation: the micro-batches' means with the whole batch's count are its mean."""
    s, t, y = data(5, dtype=torch.float64)
    y[1] = -100
    s.requires_grad_()
    whole = drkl(s, t, y, backend=backend)
    (expected,) = torch.autograd.grad(whole, s)
    parts = [drkl(s[i], t[i], y[i], num_items=4, backend=backend) for i in ([0, 1], [2, 3, 4])]
    sum(parts).backward()
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(s.grad, expected)


@functions
def test_gradient_reaches_what_made_the_student(name, backend):
    """A non-leaf, in a model, beside another loss."""
    x, (_, t, y) = torch.randn(3, 5), data(3)
    layer = torch.nn.Linear(5, V)
    logits = layer(x)
    (loss_of(name, backend)(logits, t, y) + logits.logsumexp(-1).sum()).backward()
    (by_hand,) = torch.autograd.grad(layer(x).logsumexp(-1).sum(), layer.weight)
    by_hand += grad_of(name, backend, logits, t, y).T @ x
    torch.testing.assert_close(layer.weight.grad, by_hand)


@functions
def test_student_without_grad(name, backend):
    s, t, y = data(2)
    assert not FUNCTIONS[name](s, t, y, backend=backend).requires_grad


@functions
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_grad(name, backend, mode):
    s, t, y = data(2)
    expected = FUNCTIONS[name](s, t, y, backend=backend)
    with mode():
        for student in (s, s.clone().requires_grad_()):
            out = FUNCTIONS[name](student, t, y, backend=backend)
            assert not out.requires_grad and torch.equal(out, expected)


def test_teacher_of_a_no_grad_block_is_fine(backend):
    s, t, y = data(2)
    teacher = torch.nn.Linear(V, V)
    with torch.no_grad():
        logits = teacher(t)
    s.requires_grad_()
    drkl(s, logits, y, backend=backend).backward()
    assert s.grad.abs().max() > 0 and teacher.weight.grad is None


@functions
def test_autocast(name, backend):
    """Float32 logits stay float32; a layer's bfloat16 logits give a bfloat16 gradient to it."""
    s, t, y = data(2)
    expected = FUNCTIONS[name](s, t, y, backend=backend), grad_of(name, backend, s, t, y)
    layer = torch.nn.Linear(4, V)
    with torch.autocast("cpu", torch.bfloat16):
        out = FUNCTIONS[name](s, t, y, backend=backend), grad_of(name, backend, s, t, y)
        logits = layer(torch.randn(2, 4))
        logits.retain_grad()
        loss_of(name, backend)(logits, t, y).backward()
    assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])
    assert logits.dtype == logits.grad.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.abs().max() > 0


def test_autocast_metrics_are_float32(backend):
    s, t, y = data(2)
    options = dict(backend=backend, return_metrics=True, weight=torch.tensor([0.3, 2.0]))
    loss, metrics = drkl(s, t, y, **options)
    with torch.autocast("cpu", torch.bfloat16):
        cast, cast_metrics = drkl(s, t, y, **options)
    assert torch.equal(cast, loss)
    assert all(torch.equal(a, b) for a, b in zip(cast_metrics, metrics, strict=True))


# Second derivatives: an error, never a gradient that is quietly cut from the graph


@functions
@pytest.mark.parametrize(
    "upstream", ["constant", "random", "requires grad", "depends on the student"]
)
def test_second_derivatives_raise(name, backend, upstream):
    s, t, y = data(2)
    s.requires_grad_()
    out = FUNCTIONS[name](s, t, y, backend=backend)
    weight = torch.rand(out.shape, requires_grad=upstream == "requires grad")
    loss = {
        "constant": lambda: out.sum(),
        "random": lambda: (out * weight).sum(),
        "requires grad": lambda: (out * weight).sum(),
        "depends on the student": lambda: (out * out).sum(),
    }[upstream]()
    (grad,) = torch.autograd.grad(loss, s, create_graph=True)
    assert grad.requires_grad
    message = r"second derivatives.*create_graph.*reference"
    with pytest.raises(RuntimeError, match=message):
        grad.square().sum().backward(retain_graph=True)
    if upstream == "requires grad":  # the mixed derivative is one too
        with pytest.raises(RuntimeError, match=message):
            torch.autograd.grad(grad.sum(), weight)


@pytest.mark.filterwarnings("ignore:Using backward")
@functions
def test_create_graph_gives_the_same_first_derivative(name, backend):
    s, t, y = data(2)
    expected = grad_of(name, backend, s, t, y)
    s.requires_grad_()
    loss_of(name, backend)(s, t, y).backward(create_graph=True)
    assert torch.equal(s.grad.detach(), expected)
    with pytest.raises(RuntimeError, match="second derivatives"):
        s.grad.sum().backward()
    s.grad = None  # break the cycle


@functions
def test_second_derivatives_of_a_mean_raise(name, backend):
    """reduction="mean" and a penalty on the gradient, as a user would write it."""
    s, t, y = data(2)
    s.requires_grad_()
    loss = FUNCTIONS[name](s, t, y, backend=backend).mean()
    (grad,) = torch.autograd.grad(loss, s, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        (loss + grad.norm()).backward()


# Transforms


def test_checkpoint(backend):
    s, t, y = data(3)
    expected = grad_of("drkl", backend, s, t, y)
    for reentrant in (False, True):
        s = s.detach().requires_grad_()
        out = checkpoint(loss_of("drkl", backend), s, t, y, use_reentrant=reentrant)
        out.backward()
        assert torch.equal(s.grad, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@functions
@pytest.mark.parametrize("transform", ["vmap", "grad", "jacrev", "jvp", "vmap of grad"])
def test_torch_func_is_a_clear_error(name, backend, transform):
    s, t, y = data(2, 3)
    loss = loss_of(name, backend)
    calls = {
        "vmap": lambda: torch.func.vmap(loss)(s, t, y),
        "grad": lambda: torch.func.grad(loss)(s, t, y),
        "jacrev": lambda: torch.func.jacrev(loss)(s, t, y),
        "jvp": lambda: torch.func.jvp(lambda s: loss(s, t, y), (s,), (s,)),
        "vmap of grad": lambda: torch.func.vmap(torch.func.grad(loss))(s, t, y),
    }
    with pytest.raises(TypeError, match=r"torch\.func.*not support.*; use ") as caught:
        calls[transform]()
    assert "vmap" in str(caught.value) and "logits" in str(caught.value)


@pytest.mark.parametrize("which", ["teacher", "labels", "weight", "temperature", "gamma"])
def test_vmap_over_anything_else_is_a_clear_error(backend, which):
    s, t, y = data(3)
    batched = dict(
        teacher=torch.randn(2, 3, V),
        labels=torch.randint(V, (2, 3)),
        weight=torch.rand(2, 3),
        temperature=torch.rand(2) + 0.5,
        gamma=torch.rand(2),
    )[which]

    def loss(x):
        call = dict(teacher=t, labels=y) | {which: x}
        return drkl(s, call.pop("teacher"), call.pop("labels"), backend=backend, **call)

    with pytest.raises((TypeError, RuntimeError), match=r"(?i)vmap.*(not support|must|use)"):
        torch.func.vmap(loss)(batched)


def test_batched_gradients_are_right_or_refused(backend):
    """is_grads_batched runs the backward pass alone under vmap."""
    s, t, y = data(3)
    s.requires_grad_()
    out = FUNCTIONS["drkl"](s, t, y, backend=backend)
    upstream = torch.randn(2, 3)
    expected = [torch.autograd.grad(out, s, u, retain_graph=True)[0] for u in upstream]
    try:
        (grads,) = torch.autograd.grad(out, s, upstream, is_grads_batched=True)
    except (RuntimeError, TypeError) as error:
        assert "vmap" in str(error)
    else:
        torch.testing.assert_close(grads, torch.stack(expected))


@functions
def test_forward_mode_is_refused(name, backend):
    """A dual number's tangent is never dropped quietly."""
    s, t, y = data(2)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(s, torch.ones_like(s))
        with pytest.raises((RuntimeError, NotImplementedError, TypeError), match="jvp|forward"):
            FUNCTIONS[name](dual, t, y, backend=backend)


# Inputs


@functions
@pytest.mark.parametrize("layout", ["contiguous", "strided", "half"])
def test_inputs_are_never_written(name, backend, layout):
    """Neither their bits nor their version counters, nor the memory between their rows."""
    dtype = torch.bfloat16 if layout == "half" else torch.float32
    step = 2 if layout == "strided" else 1
    base = dict(s=torch.randn(6, V + 8), t=torch.randn(6, V + 8), w=torch.ones(6))
    base = {k: x.to(dtype) for k, x in base.items()} | dict(y=torch.randint(V, (6,)))
    base["y"][2], base["w"][4] = -100, 0.0
    base["s"][3, 5], base["t"][3, 5] = float("nan"), float("-inf")
    scalars = dict(temperature=torch.tensor(0.7), num_items=torch.tensor(3.0))
    before = {k: x.clone() for k, x in (base | scalars).items()}
    student = base["s"][::step, 4 : 4 + V].requires_grad_()
    teacher = base["t"][::step, 4 : 4 + V]
    options = dict(backend=backend, temperature=scalars["temperature"])
    versions = [x._version for x in (base | scalars).values()]
    if name in ("rkl", "drkl"):
        function = getattr(drkl_triton, dict(rkl="reverse_kl", drkl="drkl")[name])
        options |= dict(weight=base["w"][::step], num_items=scalars["num_items"])
        out = function(student, teacher, base["y"][::step], return_metrics=True, **options)[0]
    else:
        out = getattr(drkl_triton, name)(student, **options)
    upstream = torch.randn(out.shape).to(out.dtype)
    kept = upstream.clone()
    out.backward(upstream)
    assert torch.equal(upstream, kept) and upstream._version == 0
    assert [x._version for x in (base | scalars).values()] == versions
    for key, x in (base | scalars).items():
        assert torch.equal(x.nan_to_num(), before[key].nan_to_num()), key


@functions
def test_writing_to_an_input_before_backward_is_noticed(name, backend):
    for which in (0, 1):
        s, t, y = data(2)
        s.requires_grad_()
        student = s * 1
        out = FUNCTIONS[name](student, t, y, backend=backend)
        (student, t)[which].data.mul_(1)  # .data hides a write: no error may come of it
        out.sum().backward(retain_graph=True)
        if which == 1 and "softmax" in name:
            continue
        with torch.no_grad():
            (student, t)[which].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


LAYOUTS = {
    # what callers make of [B, T, V] in memory
    "contiguous": lambda x: x,
    "one row": lambda x: x[1, 2],
    "shifted slice": lambda x: x[1:, :-1],
    "columns of a wider one": lambda x: x[:2, :2, 3:30],
    "every other sequence": lambda x: x[::2, :2],
    "every other position": lambda x: x[:2, 1::2],
    "last position": lambda x: x[:, -1],
    "transposed": lambda x: x[:2].transpose(0, 1),
    "transposed slice": lambda x: x[1:, :3].transpose(0, 1),
    "expanded over sequences": lambda x: x[:1, 1:3].expand(3, -1, -1),
    "expanded over positions": lambda x: x[:2, :1].expand(-1, 3, -1),
    "one row for all": lambda x: x[0, 0].expand(2, 3, -1),
    "overlapping rows": lambda x: x.flatten().unfold(0, V, 2)[:4],
    "four dimensions that reduce": lambda x: x.view(3, 2, 2, V)[::2],
    "four dimensions, one of size 1": lambda x: x.view(3, 2, 2, V)[:2].permute(2, 1, 0, 3)[:, :1],
    "ones between": lambda x: x[:2, None, ::2, None],
    "one column": lambda x: x[:2, :2, 5:6],
    "empty": lambda x: x[:, :0],
}
COPIED = {
    "strided last dimension": lambda x: x[:2, :2, ::2],
    "vocabulary first in memory": lambda x: (
        x[:2, :3].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    ),
    "columns expanded": lambda x: x[:2, :2, :1].expand(-1, -1, V),
    "three irreducible dimensions": lambda x: x.view(3, 2, 2, V)[:2].permute(2, 1, 0, 3),
}


def base(dtype):
    return (3 * torch.randn(3, 4, V)).to(dtype)


def in_place(x):
    return rows_of(x).tensor.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_are_read_in_place(layout):
    x = LAYOUTS[layout](base(torch.float32))
    assert in_place(x) and rows_of(x).tensor.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("layout", COPIED)
def test_layouts_that_are_copied(layout):
    """As the docstrings say. Should one be read in place some day, move it to the others."""
    assert not in_place(COPIED[layout](base(torch.float32)))


@pytest.mark.parametrize("name, backend", CASES[:-1])
@pytest.mark.parametrize("layout", [*LAYOUTS, *COPIED])
def test_layouts(name, backend, layout, monkeypatch):
    """As for a contiguous copy; and the backend gets the caller's memory, forward and backward."""
    seen = []
    monkeypatch.setattr(ops, "rows_of", lambda x: seen.append(x) or rows_of(x))
    make = (LAYOUTS | COPIED)[layout]
    s, t = make(base(torch.float64)), make(base(torch.float64))
    s.requires_grad_()
    y = torch.randint(s.shape[-1], s.shape[:-1])
    out = FUNCTIONS[name](s, t, y, backend=backend)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    (grad,) = torch.autograd.grad(out, s, upstream)
    assert {(x.data_ptr(), x.stride()) for x in seen} <= {
        (x.data_ptr(), x.stride()) for x in (s, t, upstream)
    }
    assert len(seen) == (3 if "softmax" in name else 4)
    assert grad.is_contiguous()
    copy_of_s = s.detach().contiguous().requires_grad_()
    expected = FUNCTIONS[name](copy_of_s, t.contiguous(), y, backend="tiled")
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    (expected,) = torch.autograd.grad(expected, copy_of_s, upstream)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)


@functions
def test_strided_upstream_gradient(name, backend):
    """What reaches backward may be expanded or strided too."""
    for make in (
        lambda g: g[:1].expand(2, *g.shape[1:]),
        lambda g: g.repeat_interleave(2, -1)[..., ::2],
        lambda g: g.mT.contiguous().mT,
    ):
        s, t, y = data(2, 3)
        s.requires_grad_()
        out = FUNCTIONS[name](s, t, y, backend=backend)
        upstream = make(torch.randn_like(out))
        (grad,) = torch.autograd.grad(out, s, upstream, retain_graph=True)
        (expected,) = torch.autograd.grad(out, s, upstream.contiguous())
        torch.testing.assert_close(grad, expected)


@functions
def test_expanded_student(name, backend):
    """The gradient of an expanded student is summed over its copies by autograd."""
    s, t, y = torch.randn(1, 3, V), torch.randn(2, 3, V), torch.randint(V, (2, 3))
    s.requires_grad_()
    loss_of(name, backend)(s.expand(2, -1, -1), t, y).backward()
    grad = grad_of(name, backend, s.expand(2, -1, -1), t, y)
    torch.testing.assert_close(s.grad, grad.sum(0, keepdim=True))


@functions
@pytest.mark.parametrize("which", ["student", "teacher", "both"])
def test_lazy_negation(name, backend, which):
    """A view that PyTorch negates only when it is read: the kernels must not read past the flag."""
    s, t, y = data(2)
    expected = FUNCTIONS[name](s, t, y, backend=backend)
    lazy_s, lazy_t = (torch.complex(x, -x).conj().imag for x in (s, t))
    assert lazy_s.is_neg() and torch.equal(lazy_s, s)
    student, teacher = dict(student=(lazy_s, t), teacher=(s, lazy_t), both=(lazy_s, lazy_t))[which]
    out = FUNCTIONS[name](student, teacher, y, backend=backend)
    torch.testing.assert_close(out, expected)
    grad = grad_of(name, backend, s, t, y)
    student = student.detach().requires_grad_()
    (lazy_grad,) = torch.autograd.grad(loss_of(name, backend)(student, teacher, y), student)
    torch.testing.assert_close(lazy_grad, grad)


@functions
def test_forward_keeps_nothing_of_the_logits_size(name, backend):
    """Beside its inputs: a few numbers a row."""
    kept = []
    s, t, y = data(3)
    s.requires_grad_()
    own = {s.data_ptr(), t.data_ptr()}
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        FUNCTIONS[name](s, t, y, backend=backend)
    beside = sum(x.numel() for x in kept if x.data_ptr() not in own)
    assert 0 < beside <= 18 * 3 + 2


@functions
def test_saved_tensors_may_be_moved(name, backend):
    """Hooks such as save_on_cpu replace what is saved by copies."""
    s, t, y = data(2)
    expected = grad_of(name, backend, s, t, y)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x.clone()):
        assert torch.equal(grad_of(name, backend, s, t, y), expected)


@pytest.mark.parametrize("name", ["rkl", "drkl"])
def test_nothing_waits_for_the_device(name):
    """On fake tensors anything that reads a value (.item(), bool()) raises."""
    with FakeTensorMode():
        s, t = torch.empty(2, 3, V, requires_grad=True), torch.empty(2, 3, V)
        options = dict(
            weight=torch.empty(2, 3),
            shift=True,
            temperature=torch.empty(()),
            num_items=torch.empty(()),
            return_metrics=True,
            backend="tiled",
        )
        labels = torch.empty(2, 3, dtype=torch.long)
        function = reverse_kl if name == "rkl" else drkl
        loss, _ = function(s, t, labels, **options)
        loss.backward()
        softmax(s, temperature=torch.empty(())).sum().backward()
        assert s.grad.shape == s.shape


# Determinism and threads


@functions
def test_same_bits_again(name, backend):
    s, t, y = data(5)
    first = FUNCTIONS[name](s, t, y, backend=backend), grad_of(name, backend, s, t, y)
    torch.use_deterministic_algorithms(True)
    try:
        again = FUNCTIONS[name](s.clone(), t.clone(), y, backend=backend)
        again = again, grad_of(name, backend, s.clone(), t.clone(), y)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@functions
def test_eight_threads_at_once(name, backend):
    """Each of its own size, so that mixed-up scratch memory or grid positions would show."""
    inputs = [data(1 + i % 3) for i in range(8)]
    expected = [grad_of(name, backend, *x) for x in inputs]
    results, start = [[] for _ in inputs], threading.Barrier(8)

    def work(i):
        start.wait()
        for _ in range(2):
            results[i].append(grad_of(name, backend, *inputs[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, wanted in zip(results, expected, strict=True):
        assert len(got) == 2 and all(torch.equal(x, wanted) for x in got)


def test_threads_that_raise_do_not_block_the_others(backend):
    """An error between two launches leaves no lock behind."""
    s, t, y = data(2)
    with pytest.raises(ValueError, match="labels"):
        drkl(s, t, y + V, backend=backend)
    done = []
    thread = threading.Thread(target=lambda: done.append(drkl(s, t, y, backend=backend)))
    thread.start()
    thread.join(30)
    assert len(done) == 1


# Modules


MODULES = {
    "rkl": lambda **o: ReverseKLLoss(temperature=1.5, reduction="sum", **o),
    "drkl": lambda **o: DRKLLoss(gamma=0.3, ignore_index=0, support="teacher", **o),
    "tensors": lambda **o: DRKLLoss(gamma=torch.tensor(0.3), temperature=torch.tensor(2.0), **o),
}
modules = pytest.mark.parametrize("which", MODULES)


@modules
def test_module_is_the_function(which, backend):
    module = MODULES[which](backend=backend, return_metrics=True)
    s, t, y = data(4)
    weight = torch.rand(4)
    options = dict(
        rkl=dict(temperature=1.5, reduction="sum"),
        drkl=dict(gamma=0.3, ignore_index=0, support="teacher"),
        tensors=dict(gamma=0.3, temperature=2.0),
    )[which]
    function = reverse_kl if which == "rkl" else drkl
    loss, metrics = module(s, t, y, weight=weight)
    expected, expected_metrics = function(
        s, t, y, weight=weight, backend=backend, return_metrics=True, **options
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics, expected_metrics)


def test_modules_take_num_items_and_no_labels(backend):
    s, t, y = data(4)
    module = ReverseKLLoss(backend=backend)
    torch.testing.assert_close(module(s, t), reverse_kl(s, t, backend=backend))
    value = DRKLLoss(backend=backend)(s, t, y, num_items=9)
    torch.testing.assert_close(value, drkl(s, t, y, num_items=9, backend=backend))
    with pytest.raises(TypeError, match="labels"):
        DRKLLoss(backend=backend)(s, t)


@modules
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "save"])
def test_modules_can_be_copied(which, how):
    module = MODULES[which]()
    if how == "pickle":
        other = pickle.loads(pickle.dumps(module))
    elif how == "deepcopy":
        other = copy.deepcopy(module)
    else:
        torch.save(module, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    args = data(3)
    assert torch.equal(other(*args), module(*args))
    assert repr(other) == repr(module)


@modules
def test_modules_have_no_state(which):
    """So that a checkpoint written without the loss loads into a model that holds it."""
    module = MODULES[which]()
    assert dict(module.state_dict()) == {} and not list(module.parameters())
    module.load_state_dict({})
    module.to(torch.float64).train().eval().requires_grad_(False)
    holder = torch.nn.Sequential(torch.nn.Linear(2, 2))
    saved = holder.state_dict()
    holder.loss = module
    holder.load_state_dict(saved)


@pytest.mark.parametrize(
    "which, words",
    [("rkl", ["ReverseKLLoss", "1.5", "'sum'"]), ("drkl", ["DRKLLoss", "gamma=0.3"])],
)
def test_repr(which, words):
    text = repr(MODULES[which]())
    assert all(word in text for word in words)
    assert "temperature=" in text and "\n" not in text


def test_functional_call_of_a_module():
    s, t, y = data(3)
    assert torch.equal(functional_call(DRKLLoss(), {}, (s, t, y)), drkl(s, t, y))


@modules
def test_gradient_through_a_module(which, backend):
    s, t, y = data(3)
    s.requires_grad_()
    MODULES[which](backend=backend)(s, t, y + (which == "drkl")).backward()
    assert s.grad.abs().max() > 0


# Nothing else


def test_against_what_pytorch_has(backend):
    """Functions we did not write. kl_div(log p, log q) is KL(q || p)."""
    s, t, _ = data(3, dtype=torch.float64)
    by_torch = F.kl_div(t.log_softmax(-1), s.log_softmax(-1), reduction="none", log_target=True)
    torch.testing.assert_close(
        reverse_kl(s, t, reduction="none", backend=backend), by_torch.sum(-1)
    )
    torch.testing.assert_close(softmax(s, backend=backend), s.softmax(-1))
    torch.testing.assert_close(log_softmax(s, backend=backend), s.log_softmax(-1))


@pytest.mark.parametrize("way", ["logits", "linear"])
def test_what_inference_mode_made_is_saved_as_anything_else(way, backend):
    """Hooks (offloading, checkpoints) see it, and backward frees it, though the loss lives on."""
    with torch.inference_mode():
        teacher, labels = torch.randn(6, V), torch.randint(V, (6,))
    student = torch.randn(6, V, requires_grad=True)
    seen = []

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor
            seen.append((weakref.ref(self), tensor.untyped_storage().data_ptr()))

    call = {
        "logits": lambda: drkl(student, teacher, labels, backend=backend),
        "linear": lambda: drkl_triton.linear_drkl(
            student, torch.eye(V), labels, teacher_logits=teacher, recompute=True, backend=backend
        ),
    }[way]
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        loss = call()
    assert teacher.untyped_storage().data_ptr() in {at for _, at in seen}
    loss.backward()
    assert student.grad.isfinite().all() and loss.isfinite()
    assert not any(kept() for kept, _ in seen)
