"""torch.compile(fullgraph=True), forward and backward, and the registered ops it sees.

Most tests compile with aot_eager: it traces what inductor traces, without a C++ compiler's seconds.
"""

import pytest
import selection
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend

from drkl_triton import (
    DRKLLoss,
    ReverseKLLoss,
    SparseTeacher,
    divergence,
    drkl,
    linear_drkl,
    linear_log_probs_at,
    linear_reverse_kl,
    log_probs_at,
    log_softmax,
    objectives,
    reverse_kl,
    softmax,
)

V = 37
NAMES_TEXTS = torch.__version__ >= "2.9"  # torch's version compares as versions do
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    # no pool of compiler processes for a kernel or two
    with torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


FUNCTIONS = {
    "rkl": lambda s, t, y, **o: reverse_kl(s, t, y, **o),
    "rkl without labels": lambda s, t, y, **o: reverse_kl(s, t, reduction="sum", **o),
    "drkl": lambda s, t, y, **o: drkl(s, t, y, gamma=0.3, temperature=1.5, **o),
    "softmax": lambda s, t, y, **o: softmax(s, **o),
    "log_softmax": lambda s, t, y, **o: log_softmax(s, temperature=0.5, **o),
}


def data(*shape):
    s, t = 3 * torch.randn(*shape, V), 3 * torch.randn(*shape, V)
    y = torch.randint(V, shape)
    y.view(-1)[:1] = -100
    return s, t, y


def compiled(function, backend="aot_eager", **options):
    """(compiled function, how often its frame was compiled)."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter, **options), counter


def run(function, s, t, y, **options):
    """What the function returns, and the student's gradient under a random upstream."""
    s = s.detach().clone().requires_grad_()
    out = function(s, t, y, **options)
    first = out[0] if isinstance(out, tuple) else out
    upstream = torch.sin(torch.arange(first.numel()) + 1.0).view_as(first)
    (grad,) = torch.autograd.grad(first, s, upstream)
    return out, grad


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    "name, backend", [*((name, "tiled") for name in FUNCTIONS), ("drkl", "triton")]
)
def test_fullgraph(name, backend):
    args = data(2, 3)
    function, counter = compiled(FUNCTIONS[name])
    close(run(function, *args, backend=backend), run(FUNCTIONS[name], *args, backend=backend))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor():
    """One graph of all functions, with what users compile around them, by the default backend."""

    def step(x, t, y, weight, gamma):
        s = torch.tanh(x) * 5
        a, metrics = drkl(
            s, t, y, gamma=gamma, weight=weight, shift=True, vocab_mismatch="truncate",
            num_items=weight.sum(), temperature=gamma + 1, support="teacher", return_metrics=True,
        )  # fmt: skip
        b = reverse_kl(s, t[..., :V], reduction="none").square().mean()
        c = (softmax(s) * log_softmax(s, temperature=2.0)).sum(-1).mean()
        return (a + b + c, *metrics)

    s, t, y = data(2, 4)
    t = torch.cat([t, t[..., :5]], -1)
    args = s, t, y
    options = dict(weight=torch.rand(2, 4), gamma=torch.tensor(0.4))
    function, counter = compiled(step, "inductor")
    close(run(function, *args, **options), run(step, *args, **options))
    assert counter.frame_count == 1


OPTIONS = {
    "none": dict(reduction="none"),
    "weight": dict(weight=torch.rand(2, 3)),
    "shift": dict(shift=True, reduction="none"),
    "truncate": dict(vocab_mismatch="truncate"),
    "support": dict(support="teacher"),
    "num_items": dict(num_items=5),
    "num_items tensor": dict(num_items=torch.tensor(5.0)),
    "metrics": dict(return_metrics=True),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option):
    s, t, y = data(2, 3)
    if option == "truncate":
        s = torch.cat([s, s[..., :4]], -1)
    function, _ = compiled(FUNCTIONS["drkl"])
    args = (s, t, y)
    close(run(function, *args, **OPTIONS[option]), run(FUNCTIONS["drkl"], *args, **OPTIONS[option]))


@pytest.mark.parametrize("module", [ReverseKLLoss(), DRKLLoss(gamma=0.3, temperature=2.0)])
def test_modules(module):
    args = data(4)
    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(module, fullgraph=True, backend=counter)
    close(run(function, *args), run(module, *args))
    assert counter.frame_count == 1


@pytest.mark.parametrize("name, dynamic", [("rkl", True), ("softmax", True), ("drkl", None)])
def test_batch_sizes_do_not_recompile(name, dynamic):
    """The first size, and one graph for all the others.

    dynamic=True makes a symbol of temperature=1.0 as well, and starts over when it is a constant.
    """
    function, counter = compiled(FUNCTIONS[name], dynamic=dynamic)
    for shape in [(2, 3), (4, 3), (3, 3), (9, 3)] + [(3, 5), (5, 7)] * bool(dynamic):
        args = data(*shape)
        close(run(function, *args), run(FUNCTIONS[name], *args))
    assert counter.frame_count <= 2


def test_marked_batch_size_compiles_once():
    function, counter = compiled(FUNCTIONS["drkl"])
    for n in (5, 7, 12):
        args = data(n)
        for x in args:
            torch._dynamo.mark_dynamic(x, 0)
        close(function(*args), FUNCTIONS["drkl"](*args))
    assert counter.frame_count == 1


def test_schedules_do_not_recompile():
    """gamma and temperature as 0-dim tensors: their values are not in the graph."""

    def loss(s, t, y, gamma, temperature):
        return drkl(s, t, y, gamma=gamma, temperature=temperature)

    args = data(4)
    function, counter = compiled(loss)
    for step in range(4):
        options = dict(gamma=torch.tensor(0.1 + step), temperature=torch.tensor(1.0 + step))
        close(run(function, *args, **options), run(loss, *args, **options))
    assert counter.frame_count == 1


NUMBERS = {
    "logits": ("gamma", "temperature", "num_items"),
    "hidden states": ("gamma", "temperature", "num_items", "scale", "softcap"),
    "recompute": ("gamma", "softcap"),
}


@pytest.mark.parametrize("way, number", [(way, n) for way in NUMBERS for n in NUMBERS[way]])
def test_a_changing_number_costs_one_more_graph(way, number):
    """From the second value on, the float is a symbol; fullgraph allows eight graphs."""
    s, t, y = data(4)
    fixed = {}
    if way == "logits":
        function, keys = drkl, (number,)
    else:
        keys = (f"student_{number}", f"teacher_{number}")
        keys = keys if number in ("scale", "softcap") else (number,)
        fixed = dict(teacher_hidden=t, teacher_weight=torch.eye(V), recompute=way == "recompute")

        def function(s, t, y, **options):
            return linear_drkl(s, torch.eye(V), y, **fixed, **options)

    def loss(s, t, y, value):
        return function(s, t, y, **dict.fromkeys(keys, value))

    compiled_loss, counter = compiled(loss)
    for step in range(14):
        actual = run(lambda s, t, y: compiled_loss(s, t, y, 1.5 + step / 4), s, t, y)  # noqa: B023
        close(actual, run(lambda s, t, y: loss(s, t, y, 1.5 + step / 4), s, t, y))  # noqa: B023
    assert counter.frame_count == 2


def test_modules_that_differ_in_a_number():
    """One code, several instances: the float is a symbol from the second on."""
    args = data(3)
    for module in (DRKLLoss(gamma=0.3), DRKLLoss(gamma=0.4), DRKLLoss(gamma=0.5, temperature=2.0)):
        function = torch.compile(module, fullgraph=True, backend="aot_eager")
        close(run(function, *args), run(module, *args))


@pytest.mark.parametrize("how", ["aot_eager", "eager"])
def test_label_error_is_raised_from_the_graph(how):
    """Also by a graph that was compiled with good labels."""
    s, t, y = data(4)
    function, counter = compiled(FUNCTIONS["drkl"], how)
    function(s, t, y)
    y[2] = 99
    with pytest.raises(ValueError, match=r"labels must be in \[0, 37\).*got 99 at \[2\]"):
        function(s, t, y)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda s, t, y: (s, t[:3], y), ValueError, "same leading shape"),
        (lambda s, t, y: (s, t[:, :5], y), ValueError, "vocab_mismatch"),
        (lambda s, t, y: (s, t, y.float()), TypeError, "labels must be"),
        (lambda s, t, y: (s.long(), t, y), TypeError, "float16, bfloat16"),
    ],
    ids=["shape", "vocabulary", "labels", "dtype"],
)
def test_wrong_arguments_are_reported_while_tracing(change, error, message):
    """By Dynamo's own exception. Before torch 2.9 that names the type and leaves out the text."""
    function, _ = compiled(FUNCTIONS["drkl"])
    expected = message if NAMES_TEXTS else f"<class '{error.__name__}'>"
    with pytest.raises((error, torch._dynamo.exc.TorchDynamoException), match=expected):
        function(*change(*data(4)))


def test_ignored_rows(backend):
    """The rows' NaN stays where nobody reads it, and their gradient is 0."""
    s, t, y = data(4)
    y[2] = -100
    s[2], t[2] = float("nan"), float("nan")
    function, _ = compiled(FUNCTIONS["drkl"])
    loss, grad = run(function, s, t, y, backend=backend)
    assert loss.isfinite() and (grad[2] == 0).all() and grad[1].abs().max() > 0
    y[:] = -100
    loss, grad = run(function, s, t, y, backend=backend)
    assert loss == 0 and (grad == 0).all()


def test_strides_that_change_do_not_end_in_the_graph():
    """Compiled for slices, called with other slices, transposed, expanded and contiguous logits."""
    s, t, y = data(4, 6)
    function, _ = compiled(FUNCTIONS["drkl"])
    for args in [
        (s[:2, :3], t[:2, :3], y[:2, :3]),
        (s[::2, 1:4], t[2:, ::2], y[:2, :3]),
        (s.transpose(0, 1)[:2, :3], t[:1, :3].expand(2, -1, -1), y[:2, 1:4]),
        (s[:2, :3].contiguous(), t[:2, :3].contiguous(), y[:2, :3].contiguous()),
    ]:
        close(run(function, *args), run(FUNCTIONS["drkl"], *args))


def test_second_derivatives_raise_in_a_compiled_function():
    s, t, y = data(2)
    function, _ = compiled(FUNCTIONS["drkl"])
    s.requires_grad_()
    (grad,) = torch.autograd.grad(function(s, t, y), s, create_graph=True)
    with pytest.raises(RuntimeError, match="(?i)second derivative|double backward"):
        grad.square().sum().backward()


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_transforms_inside_a_compiled_function_are_right_or_refused(transform):
    """The tracer takes them apart before we could see them: never a quietly wrong result."""
    s, t, y = torch.randn(2, 3, V), torch.randn(2, 3, V), torch.randint(V, (2, 3))
    loss = FUNCTIONS["drkl"]
    if transform == "vmap":
        expected = torch.stack([loss(*row) for row in zip(s, t, y, strict=True)])
    else:
        x = s.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(x, t, y), x)
    function = torch.compile(getattr(torch.func, transform)(loss), backend="aot_eager")
    try:
        close(function(s, t, y), expected)
    except (RuntimeError, TypeError, torch._dynamo.exc.TorchDynamoException) as error:
        assert "transform" in str(error) or "drkl_triton" in str(error)


def test_backward_inside_the_compiled_function():
    """A compiled training step that calls autograd itself has to break the graph, but is right."""

    def step(s, t, y):
        loss = FUNCTIONS["drkl"](s, t, y)
        return torch.autograd.grad(loss, s)[0]

    s, t, y = data(3)
    s.requires_grad_()
    close(torch.compile(step, backend="aot_eager")(s, t, y), step(s, t, y))


def test_compiled_autocast_and_no_grad():
    s, t, y = data(3)
    function, _ = compiled(FUNCTIONS["drkl"])
    with torch.autocast("cpu", torch.bfloat16):
        close(run(function, s, t, y), run(FUNCTIONS["drkl"], s, t, y))
    with torch.no_grad():
        out = function(s.requires_grad_(), t, y)
    assert not out.requires_grad
    close(out, FUNCTIONS["drkl"](s, t, y).detach())


def test_export():
    """torch.export takes the loss as one graph with our ops in it."""

    class Loss(torch.nn.Module):
        def forward(self, s, t, y):
            return FUNCTIONS["drkl"](s, t, y)

    args = data(3)
    program = torch.export.export(Loss(), args)
    assert any("drkl_triton" in str(node.target) for node in program.graph.nodes)
    close(program.module()(*args), FUNCTIONS["drkl"](*args))


# The ops. Nobody calls them by hand, so they are taken from a recorded call of the functions.


def recorded(backend, dtype=torch.float32):
    """(op, arguments) of every op of ours in forward and backward of all functions."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "drkl_triton":
                calls.append((function, args, kwargs or {}))
            return function(*args, **(kwargs or {}))

    s, t, y = data(2, 3)
    # dense but transposed, and not dense: an op's result must not take over such strides
    s, t = s.to(dtype).transpose(0, 1), torch.cat([t, t[..., :3]], -1).transpose(0, 1)[..., :-1]
    y = y.T.int()
    s.requires_grad_()
    options = dict(vocab_mismatch="truncate", backend=backend)
    weight = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 1.0]])
    with Record():
        drkl(s, t, y, weight=weight, shift=True, return_metrics=True, **options)[0].backward()
        reverse_kl(s, t, y, weight=weight, support="teacher", **options).backward()
        reverse_kl(s, t, weight=weight.T.contiguous().T, **options)
        drkl(s, t, y, num_items=3, **options).backward()
        softmax(s, backend=backend).sum().backward()
        log_softmax(s, backend=backend)[..., 0].sum().backward()
        head = torch.randn(3, 2, 4, dtype=dtype).transpose(0, 1).requires_grad_()
        matrix, bias = (torch.randn(*n, dtype=dtype).requires_grad_() for n in ((V, 4), (V,)))
        teacher = dict(teacher_hidden=head.detach(), teacher_weight=matrix.detach())
        for more in ({}, {"recompute": True}):
            linear_drkl(
                head, matrix, y.T, **teacher, student_bias=bias, backend=backend, **more
            ).backward()
        linear_reverse_kl(head, matrix, teacher_logits=s.detach()[..., :V].transpose(0, 1),
                          backend=backend, student_softcap=3.0).backward()  # fmt: skip
        ids = y.T.long()[..., None] - torch.arange(3)
        known = SparseTeacher(ids.clamp_min(-1), torch.full(ids.shape, -2.0))
        s_rows = s.transpose(0, 1)
        options = dict(backend=backend)
        drkl(s_rows, known, y.T, return_metrics=True, **options)[0].backward()
        for tail in ("drop", "uniform"):
            few = SparseTeacher(known.ids, known.log_probs, tail=tail)
            reverse_kl(s_rows, few, y.T, **options).backward()
        mixed = objectives.forward_kl() + objectives.cross_entropy()
        divergence(mixed, s_rows, known, y.T, backend=backend).backward()
        linear_reverse_kl(head, matrix, teacher_logits=known, backend=backend).backward()
        log_probs_at(s_rows, known.ids, backend=backend)[1].sum().backward()
        linear_log_probs_at(head, matrix, known.ids, backend=backend)[1].sum().backward()
    return calls


def test_ops_pass_opcheck(backend):
    """Schema, fake implementation and dynamic tracing agree with what each op does."""
    calls = recorded(backend)
    if backend != "tiled" and not selection.ALL:  # what is asked here is outside of the kernels
        calls = {function: (function, *more) for function, *more in calls}.values()
    names = {function._schema.name.split("::")[1] for function, _, _ in calls}
    logits = {"row_labels", "divergence", "divergence_backward", "softmax", "softmax_backward"}
    sparse = {"cells", "distinct", "log_probs_at", "log_probs_at_backward"}
    assert names == logits | sparse | {"linear", "scaled"}
    for function, args, kwargs in calls:
        args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(function, args, kwargs, test_utils=tests)


def tensors_of(result):
    return (result,) if torch.is_tensor(result) else result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fake_results_are_those_of_the_ops(backend, dtype):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for function, args, kwargs in recorded(backend, dtype):
        real = function(*args, **kwargs)
        with FakeTensorMode() as mode:
            fake = function(*(mode.from_tensor(x) if torch.is_tensor(x) else x for x in args))
        for one, other in zip(tensors_of(real), tensors_of(fake), strict=True):
            assert (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)
            assert one.stride() == other.stride()


def test_ops_return_new_memory(backend):
    """An op that handed back its input would be an alias that compiled graphs do not know of."""
    for function, args, kwargs in recorded(backend):
        given = {x.untyped_storage().data_ptr() for x in args if torch.is_tensor(x)}
        out = function(*args, **kwargs)
        for x in tensors_of(out):
            assert x.untyped_storage().data_ptr() not in given
