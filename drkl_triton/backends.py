"""The custom ops through which the two implementations are called.

The ops are what ``torch.compile`` sees: opaque calls with fake implementations. They take the
logits as they come and find the rows inside, so that strides never end in a compiled graph. None of
them writes to its inputs or waits for the device.

torch.compile traces nothing in this file: Dynamo skips every path with "triton/backends" in it, and
"drkl_triton/backends.py" is one. So what is traced (choosing a backend, say) stands elsewhere.
"""

import contextlib
import sys

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import slices, tiled
from ._layout import rows_of
from .algebra import SUMS

# A copy of the package under another name (from Hugging Face's Hub, say) registers its own ops.
NAMESPACE = __package__.replace(".", "_")


def _no_autocast(device: str):
    """Where products have the dtypes of their operands. Some devices, such as meta, have no
    autocast.
    """
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _implementation(name: str):
    """The module with the launchers of a backend; both modules have the same functions."""
    if name == "triton":
        from . import kernels

        return kernels
    return tiled


@torch.library.custom_op(
    f"{NAMESPACE}::row_labels",
    mutates_args=(),
    schema="(Tensor like, Tensor? labels, Tensor? weight, SymInt ignore_index, SymInt V, "
    "bool shift, bool strict, str backend) -> Tensor",
)
def row_labels(like, labels, weight, ignore_index, V, shift, strict, backend):
    """int64 [...]: the column to take out of each row's sums, or NO_LABEL, IGNORED, INVALID.

    ``like`` [..., V] gives shape and device. shift: row t is scored with label and weight t + 1.
    strict (DRKL): a label outside [0, V) is an error on the CPU and INVALID elsewhere; otherwise
    such a row has NO_LABEL.
    """
    if strict and labels is not None and labels.device.type == "cpu":
        _check_labels(labels, weight, ignore_index, V, shift)
    return _implementation(backend).row_labels(
        labels, weight, like.shape[:-1], ignore_index, V, like.device, shift=shift, strict=strict
    )


def _check_labels(labels, weight, ignore_index, V, shift):
    outside = (labels != ignore_index) & ((labels < 0) | (labels >= V))
    if weight is not None:
        outside &= weight != 0
    if shift:
        outside[..., :1] = False  # no row is scored with the first label
    if outside.any():
        where = outside.nonzero()[0].tolist()
        raise ValueError(
            f"labels must be in [0, {V}) or ignore_index ({ignore_index}), got "
            f"{labels[tuple(where)].item()} at {where}; "
            "mask it with ignore_index or check the tokenizer's vocabulary against the logits'"
        )


@row_labels.register_fake
def _(like, labels, weight, ignore_index, V, shift, strict, backend):
    return torch.empty(like.shape[:-1], dtype=torch.int64, device=like.device)


def _as_written(filter_value, logits):
    """The number that the dtype of the logits has in its place: -1e9 is -998244352 in bfloat16."""
    if filter_value is None or logits is None:
        return filter_value
    return filter_value.to(logits.dtype).to(filter_value.dtype)


@torch.library.custom_op(
    f"{NAMESPACE}::divergence",
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, Tensor label, Tensor inv_temperature, Tensor? gamma, "
    "Tensor? filter_value, Tensor? weight, Tensor? num_items, SymInt V, bool labelled, "
    "bool metrics, str reduction, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def divergence(
    student, teacher, label, inv_temperature, gamma, filter_value, weight, num_items, V, labelled,
    metrics, reduction, backend,
):  # fmt: skip
    """(sums [9, N], the loss [N] or reduced, the denominator of a mean without num_items, the
    fields of RowMetrics [6, N]); of the last two no elements where there is none. label, weight
    [N].
    """
    launchers = _implementation(backend)
    parts = launchers.row_sum_parts(
        rows_of(student),
        rows_of(teacher),
        label,
        inv_temperature,
        V,
        filter_value=_as_written(filter_value, teacher),
        entropy=metrics,
    )
    sums, loss, denominator, fields = launchers.row_losses(
        parts, label, inv_temperature, gamma, weight, num_items,
        labelled=labelled, metrics=metrics, reduction=reduction,
    )  # fmt: skip
    if reduction != "mean" or num_items is not None:
        denominator = sums.new_empty(0)
    return sums, loss, denominator, sums.new_empty(0) if fields is None else fields


@divergence.register_fake
def _(
    student, teacher, label, inv_temperature, gamma, filter_value, weight, num_items, V, labelled,
    metrics, reduction, backend,
):  # fmt: skip
    N, empty = label.numel(), inv_temperature.new_empty
    denominator = empty(()) if reduction == "mean" and num_items is None else empty(0)
    loss = empty((N,) if reduction == "none" else ())
    return empty((SUMS, N)), loss, denominator, empty((6, N) if metrics else 0)


@torch.library.custom_op(
    f"{NAMESPACE}::divergence_backward",
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, Tensor label, Tensor inv_temperature, Tensor? gamma, "
    "Tensor? filter_value, Tensor? weight, Tensor? denominator, Tensor sums, Tensor upstream, "
    "SymInt V, bool labelled, str backend) -> Tensor",
)
def divergence_backward(
    student, teacher, label, inv_temperature, gamma, filter_value, weight, denominator, sums,
    upstream, V, labelled, backend,
):  # fmt: skip
    """The gradient of the student's logits, contiguous. upstream [N] or 0-dim."""
    launchers = _implementation(backend)
    table = launchers.gradient_table(
        sums, label, inv_temperature, gamma, upstream, weight, denominator, labelled=labelled
    )
    out = launchers.row_grad(
        rows_of(student),
        rows_of(teacher),
        label,
        inv_temperature,
        table,
        V,
        filter_value=_as_written(filter_value, teacher),
    )
    return out.view(student.shape)


@divergence_backward.register_fake
def _(
    student, teacher, label, inv_temperature, gamma, filter_value, weight, denominator, sums,
    upstream, V, labelled, backend,
):  # fmt: skip
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


@torch.library.custom_op(
    f"{NAMESPACE}::softmax",
    mutates_args=(),
    schema="(Tensor logits, Tensor inv_temperature, bool log, str backend) -> (Tensor, Tensor)",
)
def softmax(logits, inv_temperature, log, backend):
    """(output like logits, state [2, N]) (kernels/softmax.py)."""
    N = logits.numel() // logits.shape[-1]
    y, state = _implementation(backend).softmax_forward(
        rows_of(logits), inv_temperature, N, log=log
    )
    return y.view(logits.shape), state


@softmax.register_fake
def _(logits, inv_temperature, log, backend):
    N = logits.numel() // logits.shape[-1]
    state = torch.empty((2, N), dtype=inv_temperature.dtype, device=logits.device)
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device), state


@torch.library.custom_op(
    f"{NAMESPACE}::softmax_backward",
    mutates_args=(),
    schema="(Tensor logits, Tensor grad, Tensor inv_temperature, Tensor state, bool log, "
    "str backend) -> Tensor",
)
def softmax_backward(logits, grad, inv_temperature, state, log, backend):
    """The gradient of the logits, contiguous, in their dtype."""
    out = _implementation(backend).softmax_backward(
        rows_of(logits), rows_of(grad), inv_temperature, state, log=log
    )
    return out.view(logits.shape)


@softmax_backward.register_fake
def _(logits, grad, inv_temperature, state, log, backend):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


@torch.library.custom_op(
    f"{NAMESPACE}::linear",
    mutates_args=(),
    schema="(Tensor student_hidden, Tensor student_weight, Tensor? student_bias, "
    "Tensor? student_scale, Tensor? student_softcap, ScalarType student_dtype, "
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? teacher_scale, Tensor? teacher_softcap, ScalarType? teacher_dtype, "
    "Tensor? teacher_logits, Tensor label, Tensor inv_temperature, Tensor? gamma, "
    "Tensor? filter_value, Tensor? upstream, Tensor? sums, SymInt V, bool labelled, bool entropy, "
    "bool[] wanted, bool may_skip, SymInt? chunk_bytes, str backend) -> Tensor[]",
)
def linear(
    student_hidden, student_weight, student_bias, student_scale, student_softcap, student_dtype,
    teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap, teacher_dtype,
    teacher_logits, label, inv_temperature, gamma, filter_value, upstream, sums, V, labelled,
    entropy, wanted, may_skip, chunk_bytes, backend,
):  # fmt: skip
    """[sums [9, N], d hidden, d weight, d bias] (slices.walk), in the accumulator's dtype; with
    ``sums`` given the first, and what is not ``wanted`` of the others, has no elements.

    The dtypes are those of the matrix products: autocast's, where it is on.
    """

    def head(hidden, weight, bias, scale, softcap, dtype):
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return slices.Head(hidden.to(dtype), weight.to(dtype), bias, scale, softcap)

    teacher = teacher_logits
    if teacher is None:
        teacher = head(
            teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap,
            teacher_dtype,
        )  # fmt: skip
    with _no_autocast(label.device.type):
        found, dhidden, *others = slices.walk(
            slices.Loss(
                _implementation(backend), inv_temperature, gamma,
                _as_written(filter_value, teacher_logits), V, labelled, entropy,
            ),  # fmt: skip
            head(
                student_hidden, student_weight, student_bias, student_scale, student_softcap,
                student_dtype,
            ),
            teacher,
            label,
            upstream,
            sums,
            slices.Wanted(*wanted),
            may_skip,
            chunk_bytes or slices.default_chunk_bytes(label.device),
        )  # fmt: skip
    nothing = inv_temperature.new_empty(0)
    if dhidden is not None:
        dhidden = dhidden.view(student_hidden.shape)
    out = [None if sums is not None else found, dhidden, *others]
    return [nothing.clone() if x is None else x for x in out]


@linear.register_fake
def _(
    student_hidden, student_weight, student_bias, student_scale, student_softcap, student_dtype,
    teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap, teacher_dtype,
    teacher_logits, label, inv_temperature, gamma, filter_value, upstream, sums, V, labelled,
    entropy, wanted, may_skip, chunk_bytes, backend,
):  # fmt: skip
    shapes = [
        (SUMS, label.numel()) if sums is None else (0,),
        *(
            x.shape if want and upstream is not None else (0,)
            for x, want in zip((student_hidden, student_weight, student_bias), wanted, strict=True)
        ),
    ]
    return [inv_temperature.new_empty(shape) for shape in shapes]


def count_flops():
    """Make FlopCounterMode count ``linear``, where its module, which imports Triton, is loaded."""
    module, op = sys.modules.get("torch.utils.flop_counter"), getattr(torch.ops, NAMESPACE).linear
    if module is None:
        return
    if op not in module.flop_registry:
        module.register_flop_formula(op, get_raw=True)(_linear_flops)
    for mode in _get_current_dispatch_mode_stack():  # one made before has a copy of the registry
        if registry := getattr(getattr(mode, "counter", None), "flop_registry", None):
            registry.setdefault(op, _linear_flops)


def _linear_flops(*args, out_val=None, **kwargs):
    """Of the matrix products: both models' logits, d hidden and d weight."""
    hidden, teacher_hidden = args[0], args[6]
    upstream, sums, V, wanted = args[17], args[18], args[19], args[22]
    products = (sums is None or upstream is not None) + sum(wanted[:2]) * (upstream is not None)
    width = hidden.shape[-1] * products
    if teacher_hidden is not None:
        width += teacher_hidden.shape[-1]
    return 2 * (hidden.numel() // hidden.shape[-1]) * V * width


@torch.library.custom_op(
    f"{NAMESPACE}::scaled",
    mutates_args=(),
    schema="(Tensor x, Tensor factor, ScalarType dtype) -> Tensor",
)
def scaled(x, factor, dtype):
    """x * factor (slices.py)."""
    return slices.scaled(x, factor, dtype)


@scaled.register_fake
def _(x, factor, dtype):
    return x.new_empty(x.shape, dtype=dtype)


count_flops()
