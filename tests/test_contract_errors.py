"""Every way to call the public functions wrongly: what was expected, what came, what to do."""

import inspect
import re
import typing
from fractions import Fraction

import losses
import numpy as np
import pytest
import torch

import drkl_triton
from drkl_triton import (
    DRKLLoss,
    ReverseKLLoss,
    _options,
    drkl,
    linear_drkl,
    linear_reverse_kl,
    log_softmax,
    reverse_kl,
    softmax,
)

N, V = 4, 7
STUDENT, TEACHER = torch.randn(N, V), torch.randn(N, V)
LABELS = torch.tensor([0, 3, -100, 6])
META = dict(device="meta")
NAN, INF = float("nan"), float("inf")

# What to do is a clause of its own, behind what came.
DO = (
    r"; [^;]*\b(call|cast|check|choose|compute|convert|detach|drop|flatten|give|install|leave|make|"
    r"mask|move|pass|remove|set|shift|slice|stack|use|write)\b"
)


def must_raise(error, parts, function, *args, **options):
    """``function`` raises exactly ``error``, no subclass, and its message holds all ``parts``."""
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*args, **options)
    assert caught.type is error, caught
    message = str(caught.value)
    for part in parts:
        what = "what to do" if part == DO else repr(part)
        assert re.search(part, message, re.DOTALL), f"the message does not say {what}: {message}"


def of(name, **changes):
    """A correct call of a loss, with ``changes``."""
    arguments = dict(student_logits=STUDENT, teacher_logits=TEACHER, labels=LABELS) | changes
    return getattr(drkl_triton, name)(**arguments)


LOSSES = pytest.mark.parametrize("name", ["reverse_kl", "drkl"])
BOTH_LOGITS = pytest.mark.parametrize("which", ["student_logits", "teacher_logits"])

FLOATS = "float16, bfloat16, float32 or float64"
BAD_LOGITS = {
    "list": (STUDENT.tolist(), TypeError, "Tensor", "list"),
    "numpy": (STUDENT.numpy(), TypeError, "Tensor", "ndarray"),
    "None": (None, TypeError, "Tensor", "None"),
    "int": (STUDENT.long(), TypeError, FLOATS, "int64"),
    "bool": (STUDENT > 0, TypeError, FLOATS, "bool"),
    "complex": (STUDENT.to(torch.complex64), TypeError, FLOATS, "complex64"),
    "float8": (STUDENT.to(torch.float8_e4m3fn), TypeError, FLOATS, "float8_e4m3fn"),
    "coo": (STUDENT.to_sparse(), TypeError, "dense", "sparse_coo"),
    "mkldnn": (STUDENT[None].to_mkldnn(), TypeError, "dense", "mkldnn"),
    "0-dim": (torch.tensor(1.0), ValueError, r"\[\.\.\., V\]|last dimension", r"\(\)"),
    "no columns": (torch.zeros(N, 0), ValueError, "at least one column", r"\(4, 0\)"),
    "no rows, no columns": (torch.zeros(0, 0), ValueError, "at least one column", r"\(0, 0\)"),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@LOSSES
@BOTH_LOGITS
@pytest.mark.parametrize("case", BAD_LOGITS)
def test_logits(name, which, case):
    value, error, expected, came = BAD_LOGITS[case]
    must_raise(error, [which, expected, came, DO], of, name, **{which: value})


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("function", [softmax, log_softmax])
@pytest.mark.parametrize("case", BAD_LOGITS)
def test_logits_of_softmax(function, case):
    value, error, expected, came = BAD_LOGITS[case]
    must_raise(error, ["logits", expected, came, DO], function, value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_logits(layout):
    nested = torch.nested.nested_tensor([torch.randn(2, V), torch.randn(3, V)], layout=layout)
    must_raise(TypeError, ["logits", "dense", "(?i)nested|jagged", DO], softmax, nested)


@LOSSES
@pytest.mark.parametrize(
    "shape",
    # one row less; would broadcast; as many rows in another shape; no leading dimension
    [(3, V), (1, V), (2, 2, V), (V,)],
)
def test_leading_shapes_differ(name, shape):
    came = re.escape(f"{(N, V)}") + ".*" + re.escape(f"{shape}")
    parts = ["student_logits.*teacher_logits", "same leading shape", came, DO]
    must_raise(ValueError, parts, of, name, teacher_logits=torch.randn(shape))


@LOSSES
@pytest.mark.parametrize("which", ["teacher_logits", "labels", "weight"])
def test_devices_differ(name, which):
    other = dict(
        teacher_logits=torch.empty(N, V, **META),
        labels=torch.empty(N, dtype=torch.long, **META),
        weight=torch.empty(N, **META),
    )
    must_raise(
        ValueError,
        [which, "student_logits.*cpu", "got meta", DO],
        of,
        name,
        **{which: other[which]},
    )


@LOSSES
@pytest.mark.parametrize("columns", [V - 1, V + 2])
def test_vocabularies_differ(name, columns):
    parts = ["student_logits.*7", f"teacher_logits.*{columns}", 'pass vocab_mismatch="truncate"']
    must_raise(ValueError, parts, of, name, teacher_logits=torch.randn(N, columns))


@LOSSES
@pytest.mark.parametrize("requires", ["leaf", "non-leaf", "the student itself"])
def test_teacher_requires_grad(name, requires):
    leaf = torch.randn(N, V, requires_grad=True)
    student = leaf if requires == "the student itself" else STUDENT
    teacher = leaf * 2 if requires == "non-leaf" else leaf
    parts = ["teacher_logits", "requires grad", r"student alone", r"\.detach\(\)"]
    must_raise(ValueError, parts, of, name, student_logits=student, teacher_logits=teacher)


@LOSSES
@pytest.mark.parametrize("shape", [(N, 1), (N - 1,), (N, V), ()])
@pytest.mark.parametrize("which", ["labels", "weight"])
def test_shape_of_labels_and_weight(name, which, shape):
    value = torch.zeros(shape, dtype=torch.long)
    parts = [which, r"leading shape.*\(4,\)", "got " + re.escape(f"{shape}"), DO]
    must_raise(ValueError, parts, of, name, **{which: value})


@LOSSES
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bool, torch.uint8, torch.int16, torch.complex64]
)
def test_dtype_of_labels(name, dtype):
    labels = torch.zeros(N, dtype=dtype)
    must_raise(TypeError, ["labels", "int64.*int32", f"got {dtype}", DO], of, name, labels=labels)


@LOSSES
def test_complex_weight(name):
    weight = torch.ones(N, dtype=torch.complex64)
    must_raise(TypeError, ["weight", "real", "got torch.complex64", DO], of, name, weight=weight)


@LOSSES
@pytest.mark.parametrize("which", ["labels", "weight"])
@pytest.mark.parametrize("value", [[1, 2, 3, 4], np.ones(N, dtype=np.int64), 2], ids=type)
def test_labels_and_weight_are_tensors(name, which, value):
    parts = [which, "Tensor", f"got.*{type(value).__name__}", DO]
    must_raise(TypeError, parts, of, name, **{which: value})


@LOSSES
@pytest.mark.parametrize("which", ["labels", "weight"])
def test_sparse_labels_and_weight(name, which):
    value = torch.tensor([1, 0, 2, 3]).to_sparse()
    must_raise(TypeError, [which, "dense", "sparse_coo", DO], of, name, **{which: value})


def test_drkl_needs_labels():
    must_raise(
        TypeError, ["labels", "drkl needs", "got None", "reverse_kl"], of, "drkl", labels=None
    )
    with pytest.raises(TypeError, match="labels"):
        drkl(STUDENT, TEACHER)


# A label outside the vocabulary: the message names it.


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("label", [V, -1, -2, -3, -99, 2**31 - 1, -(2**31)])
def test_label_outside_the_vocabulary(backend, label, dtype):
    labels = torch.tensor([0, 3, label, 6], dtype=dtype)
    parts = ["labels", r"\[0, 7\).*-100", rf"got {label}\b.*\b2\b", DO]
    must_raise(ValueError, parts, of, "drkl", labels=labels, backend=backend)


@pytest.mark.parametrize("label", [2**63 - 1, -(2**63), 2**32])
def test_label_that_int32_would_wrap(backend, label):
    labels = torch.tensor([0, 3, label, 6])
    must_raise(ValueError, [f"got {label}"], of, "drkl", labels=labels, backend=backend)


@pytest.mark.parametrize(
    "labels, options, ok",
    [
        # ignore_index is what the caller says, also inside the vocabulary and among our own codes
        ([-1, 1, 2, 3], dict(ignore_index=-1), True),
        ([-2, 1, 2, 3], dict(ignore_index=-2), True),
        ([-3, 1, 2, 3], dict(ignore_index=-3), True),
        ([0, 1, 2, 3], dict(ignore_index=0), True),
        ([99, 1, 2, 3], dict(ignore_index=99), True),
        ([-100, 1, 2, 3], dict(ignore_index=-1), False),
        # a token of weight 0 is ignored, whatever its label
        ([99, 1, 2, 3], dict(weight=torch.tensor([0.0, 1, 1, 1])), True),
        ([99, 1, 2, 3], dict(weight=torch.tensor([1.0, 0, 0, 0])), False),
        # V is the truncated one
        ([5, 1, 2, 3], dict(teacher_logits=TEACHER[:, :5], vocab_mismatch="truncate"), False),
        ([4, 1, 2, 3], dict(teacher_logits=TEACHER[:, :5], vocab_mismatch="truncate"), True),
    ],
)
def test_which_labels_drkl_takes(backend, labels, options, ok):
    options = dict(labels=torch.tensor(labels), backend=backend) | options
    if ok:
        assert of("drkl", **options).isfinite()
    else:
        must_raise(ValueError, ["labels", f"got {labels[0]}"], of, "drkl", **options)


@pytest.mark.parametrize("at, ok", [(0, True), (1, False), (2, False)])
def test_first_label_of_a_sequence_scores_nothing(backend, at, ok):
    labels = torch.tensor([[1, 2, 3], [4, 5, 6]])
    labels[1, at] = 77
    arguments = (torch.randn(2, 3, V), torch.randn(2, 3, V), labels)
    if ok:
        assert drkl(*arguments, shift=True, backend=backend).isfinite()
    else:
        must_raise(ValueError, ["got 77"], drkl, *arguments, shift=True, backend=backend)


# Options. The list of what is allowed says what to do.


@LOSSES
@pytest.mark.parametrize(
    "option, allowed",
    [
        ("reduction", ["mean", "sum", "none"]),
        ("support", ["full", "teacher"]),
        ("vocab_mismatch", ["error", "truncate"]),
        ("backend", ["auto", "triton", "tiled"]),
    ],
)
@pytest.mark.parametrize("value", ["batchmean", "", "Mean", None, True])
def test_choices(name, option, allowed, value):
    parts = [option, "must be one of", ".*".join(allowed), re.escape(f"got {value!r}")]
    must_raise(ValueError, parts, of, name, **{option: value})


@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_backend_of_softmax(function):
    parts = ["backend", "must be one of", "auto.*triton.*tiled", "got 'cuda'"]
    must_raise(ValueError, parts, function, STUDENT, backend="cuda")


POSITIVE = [
    (0, ValueError, "got 0"),
    (0.0, ValueError, "got 0"),
    (-1.5, ValueError, "got -1.5"),
    (NAN, ValueError, "got nan"),
    (INF, ValueError, "got inf"),
    (-INF, ValueError, "got -inf"),
    (True, TypeError, "got.*bool"),
    ("1", TypeError, "got.*str"),
    (None, TypeError, "got.*None"),
    ([1.0], TypeError, "got.*list"),
    (1j, TypeError, "got.*complex"),
    (torch.tensor([1.0]), ValueError, r"got.*\(1,\)"),
    (torch.ones(N), ValueError, r"got.*\(4,\)"),
    (torch.tensor(1j), ValueError, "got.*complex"),
    (np.ones(1), TypeError, "got.*ndarray"),
    (10**400, ValueError, "got"),  # finite, but no float
]
positive = pytest.mark.parametrize(
    "value, error, came",
    POSITIVE,
    ids=[f"{v!r:.20}" if not isinstance(v, int) or v < 9 else "10**400" for v, *_ in POSITIVE],
)


@LOSSES
@positive
def test_temperature(name, value, error, came):
    must_raise(error, ["temperature", "positive", came, DO], of, name, temperature=value)


@pytest.mark.parametrize("function", [softmax, log_softmax])
@positive
def test_temperature_of_softmax(function, value, error, came):
    must_raise(error, ["temperature", "positive", came, DO], function, STUDENT, temperature=value)


@positive
def test_gamma(value, error, came):
    if isinstance(value, torch.Tensor) and value.dim():  # may be one per token, which this is not
        words = ["gamma", r"leading shape .*\(3,\)|got \(", DO]
        must_raise(error, words, of, "drkl", gamma=torch.ones(7))
    elif isinstance(value, torch.Tensor) and value.is_complex():
        must_raise(TypeError, ["gamma", "positive", "complex", DO], of, "drkl", gamma=value)
    else:
        must_raise(error, ["gamma", "positive", came, DO], of, "drkl", gamma=value)


@pytest.mark.parametrize("option", ["gamma", "temperature"])
@pytest.mark.parametrize(
    "value", [2, np.float32(0.5), np.float64(0.5), np.int64(2), Fraction(1, 2)]
)
def test_any_positive_number_will_do(option, value):
    assert torch.equal(of("drkl", **{option: value}), of("drkl", **{option: float(value)}))


@pytest.mark.parametrize("option", ["gamma", "temperature"])
@pytest.mark.parametrize("value", [1e300, 1e-300])
def test_positive_numbers_beyond_float32(option, value):
    """They are positive numbers: what float32 makes of them, or a message, not a crash."""
    try:
        loss = of("drkl", **{option: value})
    except ValueError as error:
        assert re.search(option, str(error))
    else:
        assert loss.shape == ()


def test_reverse_kl_has_no_gamma():
    with pytest.raises(TypeError, match="gamma"):
        of("reverse_kl", gamma=0.5)


@LOSSES
@pytest.mark.parametrize("option", ["shift", "return_metrics"])
@pytest.mark.parametrize("value", [1, 0, None, "yes", torch.tensor(True)], ids=repr)
def test_flags(name, option, value):
    parts = [option, "True or False", "got " + re.escape(f"{value!r}")]
    must_raise(TypeError, parts, of, name, **{option: value})


@LOSSES
@pytest.mark.parametrize("value", [1.5, None, "pad", True, torch.tensor(3)], ids=repr)
def test_ignore_index(name, value):
    parts = ["ignore_index", r"\bint\b", f"got.*{type(value).__name__}", DO]
    must_raise(TypeError, parts, of, name, ignore_index=value)


@LOSSES
def test_ignore_index_of_numpy(name):
    assert torch.equal(of(name, ignore_index=np.int64(-100)), of(name))


@LOSSES
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("num_items", [3, torch.tensor(3.0)], ids=["number", "tensor"])
def test_num_items_without_a_mean(name, reduction, num_items):
    parts = ["num_items", "mean", f"got.*{reduction}", DO]
    must_raise(ValueError, parts, of, name, reduction=reduction, num_items=num_items)


@LOSSES
@pytest.mark.parametrize(
    "value, error, came",
    [
        (-1, ValueError, "got -1"),
        (NAN, ValueError, "got nan"),
        (INF, ValueError, "got inf"),
        (True, TypeError, "got.*bool"),
        ("3", TypeError, "got.*str"),
        ([3], TypeError, "got.*list"),
        (torch.tensor([3.0]), ValueError, r"got.*\(1,\)"),
        (torch.tensor(3j), ValueError, "got.*complex"),
    ],
    ids=str,
)
def test_num_items(name, value, error, came):
    expected = "number|finite|negative"
    must_raise(error, ["num_items", expected, came, DO], of, name, num_items=value)


@LOSSES
@pytest.mark.parametrize("shape", [(N, V), (V,)])
def test_shift_needs_sequences(name, shape):
    logits, labels = torch.randn(shape), torch.zeros(shape[:-1], dtype=torch.long)
    parts = ["shift", r"\[B, T, V\]", "got shape " + re.escape(f"{shape}"), DO]
    must_raise(
        ValueError, parts, getattr(drkl_triton, name), logits, logits.clone(), labels, shift=True
    )


def test_a_wrong_option_is_an_error_in_an_empty_batch_too():
    empty = torch.zeros(0, V)
    must_raise(ValueError, ["reduction"], reverse_kl, empty, empty, reduction="avg")


# The modules take options in __init__, and refuse them there.


@pytest.mark.parametrize("module", [ReverseKLLoss, DRKLLoss])
@pytest.mark.parametrize(
    "options, error",
    [
        (dict(temperature=0), ValueError),
        (dict(temperature="1"), TypeError),
        (dict(temperature=torch.ones(2)), ValueError),
        (dict(ignore_index=None), TypeError),
        (dict(reduction="avg"), ValueError),
        (dict(shift=1), TypeError),
        (dict(vocab_mismatch="pad"), ValueError),
        (dict(support="student"), ValueError),
        (dict(backend="cuda"), ValueError),
        (dict(return_metrics=1), TypeError),
    ],
    ids=str,
)
def test_modules_check_their_options(module, options, error):
    (option,) = options
    must_raise(error, [option, "got"], module, **options)


@positive
def test_module_checks_gamma(value, error, came):
    if isinstance(value, torch.Tensor):
        if not value.is_complex():
            DRKLLoss(gamma=value)  # may be one per token
            return
        error = TypeError
    must_raise(error, ["gamma", "positive", came], DRKLLoss, gamma=value)


@pytest.mark.parametrize("module", [ReverseKLLoss, DRKLLoss])
def test_modules_refuse_unknown_and_positional_options(module):
    with pytest.raises(TypeError, match="label_smoothing"):
        module(label_smoothing=0.1)
    with pytest.raises(TypeError, match="positional"):
        module(2.0)


def test_reverse_kl_module_has_no_gamma():
    with pytest.raises(TypeError, match="gamma"):
        ReverseKLLoss(gamma=0.5)


# The public signatures: other code is written against them.

COMMON = dict(
    weight=None,
    temperature=1.0,
    ignore_index=-100,
    reduction="mean",
    num_items=None,
    shift=False,
    vocab_mismatch="error",
    support="full",
    filter_value=float("-inf"),
    backend="auto",
    group=None,
    vocab_start=None,
    return_metrics=False,
)


@pytest.mark.parametrize(
    "function, positional, keyword",
    [
        (softmax, ["logits"], dict(temperature=1.0, backend="auto")),
        (log_softmax, ["logits"], dict(temperature=1.0, backend="auto")),
        (reverse_kl, ["student_logits", "teacher_logits", "labels"], COMMON),
        (drkl, ["student_logits", "teacher_logits", "labels"], dict(gamma=0.5, skew=0.0) | COMMON),
    ],
)
def test_signature(function, positional, keyword):
    parameters = inspect.signature(function).parameters.values()
    by_kind = {p.name: p.kind for p in parameters}
    assert [
        n for n, kind in by_kind.items() if kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
    ] == positional
    assert {
        p.name: p.default for p in parameters if p.kind == inspect.Parameter.KEYWORD_ONLY
    } == keyword
    assert inspect.signature(reverse_kl).parameters["labels"].default is None
    assert inspect.signature(drkl).parameters["labels"].default is inspect.Parameter.empty


@pytest.mark.parametrize(
    "function, options",
    [
        (reverse_kl, _options.Keywords),
        (drkl, _options.Keywords),
        (linear_reverse_kl, _options.LinearKeywords),
        (linear_drkl, _options.LinearKeywords),
    ],
)
def test_options_for_type_checkers_are_those_of_the_signature(function, options):
    keyword = {
        p.name: p.annotation
        for p in inspect.signature(function).parameters.values()
        if p.kind == inspect.Parameter.KEYWORD_ONLY
    }
    assert keyword.pop("return_metrics") == "bool"
    keyword = {k: v for k, v in keyword.items() if k not in ("gamma", "skew")}
    names = {
        "Tensor": torch.Tensor,
        "SparseTeacher": drkl_triton.SparseTeacher,
        "ProcessGroup": torch.distributed.ProcessGroup,
    }
    assert typing.get_type_hints(options, localns=names) == {
        name: eval(hint, names) for name, hint in keyword.items()
    }


def test_every_parameter_is_known_to_type_checkers():
    own = typing.get_type_hints(_options.OwnParameters)
    for name, loss in losses.LOSSES.items():
        if loss.function and name != "cross_entropy":
            keyword = inspect.signature(getattr(drkl_triton, loss.function)).parameters
            extra = keyword.keys() - {"student_logits", "teacher_logits", "labels"}
            assert extra - set(_options.Options._fields) <= own.keys()


def test_no_public_function_returns_any():
    """Nor a module's forward."""
    for name in drkl_triton.__all__:
        thing = getattr(drkl_triton, name)
        for function in (thing, getattr(thing, "forward", None)):
            returned = getattr(function, "__annotations__", {}).get("return", "")
            assert "Any" not in str(returned), name


DOCUMENTED = {
    reverse_kl: [r"\[\.\.\., V\]", "float16", "int64", "nats", "copied", "Raises"],
    drkl: ["2604.00223", "our reading of its Equation 9", r"default\s+``gamma`` is ours"],
    softmax: [r"\[\.\.\., V\]", "float16", "copied", "Raises"],
}


@pytest.mark.parametrize("function", DOCUMENTED, ids=lambda function: function.__name__)
def test_docstrings(function):
    """Shapes, dtypes, units, errors, the source of the formula, and which inputs are copied."""
    text = inspect.getdoc(function)
    assert [word for word in DOCUMENTED[function] if not re.search(word, text)] == []
