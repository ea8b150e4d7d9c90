"""How the losses from hidden states behave in PyTorch, and what they say to wrong arguments."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from drkl_triton import drkl, linear_drkl, linear_reverse_kl, ops, slices

N, H, V = 6, 8, 29
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def data(dtype=torch.float32):
    """(student_hidden, student_weight, labels, the teacher), the first two leaves."""
    hidden, weight = (torch.randn(n, H, dtype=dtype).requires_grad_() for n in (N, V))
    labels = torch.randint(V, (N,))
    labels[1] = -100
    teacher = {"teacher_hidden": torch.randn(N, H + 2, dtype=dtype)}
    teacher["teacher_weight"] = torch.randn(V, H + 2, dtype=dtype)
    return hidden, weight, labels, teacher


def dense(hidden, weight, labels, teacher, **options):
    t = F.linear(teacher["teacher_hidden"].double(), teacher["teacher_weight"].double())
    return drkl(F.linear(hidden.double(), weight.double()), t, labels, **options)


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def close(actual, expected, tolerance=1e-5):
    for a, e in zip(actual, expected, strict=True):
        a, e = a.detach().double(), e.detach().double()
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance * e.abs().max().item())


WAYS = {"in forward": {}, "recompute": {"recompute": True}, "none": {"reduction": "none"}}
ways = pytest.mark.parametrize("way", WAYS)


@ways
def test_backward_twice_accumulates_and_changes_no_input(way):
    hidden, weight, labels, teacher = data()
    before = [x.detach().clone() for x in (hidden, weight, *teacher.values())]
    loss = linear_drkl(hidden, weight, labels, **teacher, **WAYS[way]).sum()
    (3 * loss).backward(retain_graph=True)
    first = [x.grad.clone() for x in (hidden, weight)]
    loss.backward()
    close([hidden.grad, weight.grad], [g * 4 / 3 for g in first])
    for x, y in zip((hidden, weight, *teacher.values()), before, strict=True):
        assert torch.equal(x.detach(), y)


@ways
def test_second_derivatives_raise(way):
    hidden, weight, labels, teacher = data()
    loss = linear_drkl(hidden, weight, labels, **teacher, **WAYS[way]).sum()
    grads = torch.autograd.grad(loss, (hidden, weight), create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="second derivatives"):
            torch.autograd.grad(grad.sum(), hidden, retain_graph=True)


def test_same_inputs_same_bits():
    hidden, weight, labels, teacher = data()
    runs = [
        gradients(linear_drkl(hidden, weight, labels, **teacher, chunk_bytes=999), hidden, weight)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "way, compiler", [*((way, "aot_eager") for way in WAYS), ("in forward", "inductor")]
)
def test_compile_takes_one_graph_for_all_sizes(way, compiler):
    torch._dynamo.reset()
    options = WAYS[way]

    def function(hidden, weight, labels, t_hidden, t_weight):
        return linear_drkl(
            hidden, weight, labels, teacher_hidden=t_hidden, teacher_weight=t_weight,
            return_metrics=True, **options,
        )  # fmt: skip

    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(function, fullgraph=True, backend=counter, dynamic=True)
    found = []
    for rows in (6, 4, 5):
        hidden, weight, labels, teacher = data()
        leaf = hidden.detach()[:rows].clone().requires_grad_()
        theirs = teacher["teacher_hidden"][:rows].clone(), teacher["teacher_weight"]
        arguments = (labels[:rows].clone(), *theirs)
        results = []
        for run in (compiled, function):
            loss, metrics = run(leaf, weight, *arguments)
            results.append((loss, *gradients(loss.sum(), leaf, weight), *metrics))
        close(*results)
        # an empty graph is counted, too
        found.append(len([g for g in counter.graphs if len(g.graph.nodes)]))
    # torch 2.8 begins the first one a second time
    assert found == [2 if torch.__version__ < "2.9" else 1] * 3
    torch._dynamo.reset()


@ways
def test_autocast_multiplies_in_its_dtype(way):
    hidden, weight, labels, teacher = data()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_drkl(hidden, weight, labels, **teacher, **WAYS[way])
    grads = gradients(loss.sum(), hidden, weight)
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in grads)
    rounded = [x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight)]
    theirs = {k: x.bfloat16() for k, x in teacher.items()}
    reduction = WAYS[way].get("reduction", "mean")
    expected = dense(*rounded, labels, theirs, reduction=reduction)
    close([loss, *grads], [expected, *gradients(expected.sum(), *rounded)])
    with torch.autocast("cpu", torch.bfloat16):  # as after a layer: hidden states are 16-bit
        loss = linear_drkl(hidden.bfloat16(), weight, labels, **teacher, **WAYS[way])
    close([loss], [expected])


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    hidden, weight, labels, teacher = data()

    def step(x):
        return linear_drkl(torch.tanh(x), weight, labels, **teacher)

    expected = gradients(step(hidden), hidden, weight)
    checkpoint(step, hidden, use_reentrant=reentrant).backward()
    close([hidden.grad, weight.grad], expected)


@ways
def test_no_grad_and_inference_mode(way):
    hidden, weight, labels, teacher = data()
    expected = linear_drkl(hidden, weight, labels, **teacher, **WAYS[way])
    with torch.no_grad():
        loss = linear_drkl(hidden, weight, labels, **teacher, **WAYS[way])
    assert not loss.requires_grad and torch.equal(loss, expected)
    with torch.inference_mode():
        loss = linear_drkl(hidden, weight, labels, **teacher, **WAYS[way])
        theirs = {k: x.clone() for k, x in teacher.items()}
    assert torch.equal(loss, expected)
    loss = linear_drkl(hidden, weight, labels, **theirs, **WAYS[way])
    close(gradients(loss.sum(), hidden, weight), gradients(expected.sum(), hidden, weight))


def test_several_threads_at_once():
    hidden, weight, labels, teacher = data()
    expected = gradients(linear_drkl(hidden, weight, labels, **teacher), hidden, weight)
    results = [None] * 6

    def work(i):
        loss = linear_drkl(hidden, weight, labels, **teacher)
        results[i] = gradients(loss, hidden, weight)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(results))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


# --- errors ---


class Adapter(torch.nn.Module):
    base_layer = torch.nn.Linear(H, V)


def parameter_without_elements():
    return torch.nn.Parameter(torch.empty(0))


WRONG = {
    "a module": (dict(student_weight=torch.nn.Linear(H, V)), TypeError, "pass its .weight"),
    "an adapter": (dict(student_weight=Adapter()), TypeError, "LoRA.*merge"),
    "ZeRO-3": (dict(student_weight=parameter_without_elements()), ValueError, "register_ext"),
    "quantised": (
        dict(student_weight=torch.zeros(V, H, dtype=torch.uint8)),
        TypeError,
        "got torch.uint8.*dequantise",
    ),
    "transposed": (dict(student_weight=torch.randn(H, V)), ValueError, "not its transpose"),
    "dtypes": (dict(student_weight=torch.randn(V, H).half()), TypeError, "same dtype"),
    "integers": (dict(student_hidden=torch.zeros(N, H, dtype=torch.int64)), TypeError, "float16"),
    "a list": (dict(student_hidden=[1.0]), TypeError, "student_hidden must be a torch.Tensor"),
    "bias": (dict(student_bias=torch.randn(V + 1)), ValueError, r"student_bias must be \[V\]"),
    "no teacher": (dict(teacher_hidden=None, teacher_weight=None), TypeError, "none of them"),
    "half a teacher": (dict(teacher_weight=None), TypeError, "teacher_hidden alone; pass"),
    "two teachers": (dict(teacher_logits=torch.randn(N, V)), TypeError, "got both"),
    "teacher grad": (
        dict(teacher_weight=torch.randn(V, H + 2).requires_grad_()),
        ValueError,
        r"teacher_weight requires grad.*teacher_weight\.detach\(\)",
    ),
    "vocabularies": (
        dict(teacher_weight=torch.randn(V + 1, H + 2)),
        ValueError,
        "student_weight has a vocabulary of 29 and teacher_weight of 30.*truncate",
    ),
    "tokens": (dict(teacher_hidden=torch.randn(N - 1, H + 2)), ValueError, "same leading shape"),
    "labels": (dict(labels=torch.zeros(N + 1, dtype=torch.int64)), ValueError, "student_hidden"),
    "a label": (dict(labels=torch.full((N,), V)), ValueError, f"got {V} at"),
    "no labels": (dict(labels=None), TypeError, "linear_drkl needs labels.*linear_reverse_kl"),
    "shift": (dict(shift=True), ValueError, r"\[B, T, H\].*student_hidden\[None\]"),
    "scale": (dict(student_scale=0.0), ValueError, "student_scale must be positive"),
    "softcap": (dict(teacher_softcap=True), TypeError, "teacher_softcap must be a number"),
    "chunk_bytes": (dict(chunk_bytes=0), ValueError, "chunk_bytes must be positive"),
    "recompute": (dict(recompute=1), TypeError, "recompute must be True or False"),
    "gamma": (dict(gamma=-1.0), ValueError, "gamma must be positive"),
    "num_items": (dict(num_items=3, reduction="sum"), ValueError, "num_items"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_say_what_to_do(case):
    hidden, weight, labels, teacher = data()
    given = dict(student_hidden=hidden, student_weight=weight, labels=labels, **teacher)
    changes, error, message = WRONG[case]
    with pytest.raises(error, match=f"(?s){message}"):
        linear_drkl(**(given | changes))


def test_layer_options_do_not_belong_to_teacher_logits():
    hidden, weight, labels, _ = data()
    for extra in ({"teacher_scale": 2.0}, {"teacher_softcap": 3.0}, {"teacher_bias": labels}):
        with pytest.raises(ValueError, match="belong to teacher_hidden"):
            linear_reverse_kl(hidden, weight, teacher_logits=torch.randn(N, V), **extra)


def test_torch_func_is_an_error():
    hidden, weight, labels, teacher = data()
    with pytest.raises(TypeError, match="torch.func"):
        torch.func.grad(lambda h: linear_drkl(h, weight, labels, **teacher))(hidden.detach())


def test_the_default_of_chunk_bytes_is_in_force(monkeypatch):
    hidden, weight, labels, teacher = data()
    expected = linear_drkl(hidden, weight, labels, **teacher)
    heights = []
    plan = slices.plan
    monkeypatch.setattr(slices, "plan", lambda *a: heights.append(plan(*a)) or heights[-1])
    monkeypatch.setattr(slices, "CHUNK_BYTES", 1)
    torch.testing.assert_close(linear_drkl(hidden, weight, labels, **teacher), expected)
    assert heights == [(1, 1)]


# --- what a review found ---


def test_an_inference_tensor_does_not_hide_a_write_to_another():
    hidden, weight, labels, teacher = data()
    with torch.inference_mode():
        teacher["teacher_hidden"] = teacher["teacher_hidden"] * 1.0
    hidden.requires_grad_()
    loss = linear_drkl(hidden, weight, labels, reduction="none", **teacher).sum()
    teacher["teacher_weight"].mul_(0.5)  # an exponential moving average, say
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("what", ["gamma", "student_bias", "teacher_hidden", "labels"])
@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=["in forward", "recompute"])
def test_inference_tensors_are_taken_everywhere(what, options):
    hidden, weight, labels, teacher = data()
    given = dict(teacher, gamma=torch.tensor(0.3), student_bias=torch.randn(V), labels=labels)
    hidden.requires_grad_()
    results = []
    for _ in range(2):
        loss = linear_drkl(hidden, weight, **given, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss, hidden)))
        with torch.inference_mode():
            given[what] = given[what].clone()
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=["in forward", "recompute"])
def test_a_second_derivative_of_the_bias_alone_raises(options):
    hidden, weight, labels, teacher = data()
    bias = torch.zeros(V, requires_grad=True)
    fixed = hidden.detach(), weight.detach()
    loss = linear_drkl(*fixed, labels, student_bias=bias, **teacher, **options)
    (grad,) = torch.autograd.grad(loss, bias, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        grad.pow(2).sum().backward()


def test_a_frozen_matrix_is_not_kept():
    hidden, weight, labels, teacher = data()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: (kept.append(x.shape), x)[1], lambda x: x
    ):
        linear_drkl(hidden, weight.detach(), labels, **teacher)
    assert weight.shape not in kept


def test_meta_tensors_get_shapes():
    hidden, weight, labels, teacher = data()
    hidden.requires_grad_(), weight.requires_grad_()
    names = dict(teacher, student_hidden=hidden, student_weight=weight, labels=labels)
    meta = {k: v.detach().to("meta").requires_grad_(v.requires_grad) for k, v in names.items()}
    for options in ({}, {"reduction": "none"}):
        loss = linear_drkl(**meta, **options)
        assert loss.device.type == "meta" and loss.shape == linear_drkl(**names, **options).shape
        loss.sum().backward()
        assert meta["student_weight"].grad.shape == weight.shape


def test_ignored_rows_stay_zero_under_an_infinite_upstream_gradient():
    hidden, weight, labels, teacher = data()
    labels[1] = -100
    hidden.requires_grad_()
    for options in ({}, {"recompute": True}):
        loss = linear_reverse_kl(hidden, weight, labels, **teacher, **options)
        (grad,) = torch.autograd.grad(loss, hidden, torch.tensor(torch.inf))
        assert (grad[1] == 0).all() and not grad[0].isfinite().all()


def test_metrics_are_no_view_of_the_loss():
    hidden, weight, labels, teacher = data()
    loss, metrics = linear_drkl(
        hidden, weight, labels, reduction="none", return_metrics=True, **teacher
    )
    before = metrics.loss.clone()
    loss.zero_()
    assert torch.equal(metrics.loss, before)


def test_transforms_over_labels_and_numbers_are_a_clear_error():
    hidden, weight, labels, teacher = data()
    for call in (
        lambda: torch.vmap(lambda y: linear_drkl(hidden, weight, y, **teacher))(labels[None]),
        lambda: torch.vmap(lambda g: linear_drkl(hidden, weight, labels, gamma=g, **teacher))(
            torch.ones(2)
        ),
    ):
        with pytest.raises(TypeError, match="torch.func"):
            call()


@pytest.mark.parametrize(
    "options, products",
    [({}, 3), ({"recompute": True}, 4), ({"reduction": "none"}, 4)],
    ids=["in forward", "recompute", "none"],
)
def test_flops_are_those_of_the_matrix_products(options, products):
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight, labels, teacher = data()
    hidden.requires_grad_()
    weight.requires_grad_()
    counter = FlopCounterMode(display=False)
    op = getattr(torch.ops, ops.NAMESPACE).linear
    counter.flop_registry.pop(op, None)  # as if made before the first call
    with counter:
        linear_drkl(hidden, weight, labels, **teacher, **options).sum().backward()
    both = 2 if products == 4 else 1
    assert counter.get_total_flops() == 2 * N * V * (H * products + (H + 2) * both)


@pytest.mark.parametrize("name", ["gamma", "temperature", "weight", "num_items"])
def test_numbers_that_require_grad_are_errors(name):
    """Their gradient would be silently missing."""
    hidden, weight, labels, teacher = data()
    value = torch.ones(N if name == "weight" else ()).requires_grad_()
    with pytest.raises(ValueError, match=rf"{name} requires grad.*{name}\.detach\(\)"):
        linear_drkl(hidden, weight, labels, **teacher, **{name: value})
    with pytest.raises(ValueError, match=rf"{name} requires grad"):
        drkl(torch.randn(N, V), torch.randn(N, V), labels, **{name: value})


def test_wrapped_matrices_are_named_for_what_they_are():
    class Wrapped(torch.Tensor):
        def __tensor_flatten__(self):
            return [], None

    class Quantised(Wrapped):
        def dequantize(self):
            return self

    hidden, weight, labels, teacher = data()
    for cls, advice in ((Wrapped, "plain tensor that it stands for"), (Quantised, "dequantize")):
        wrapped = weight.detach().as_subclass(cls)
        with pytest.raises(TypeError, match=f"got {cls.__name__}; .*{advice}"):
            linear_drkl(hidden, wrapped, labels, **teacher)
