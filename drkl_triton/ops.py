"""The custom ops through which the two implementations are called.

The ops are what ``torch.compile`` sees: opaque calls with fake implementations. They take the
logits as they come and find the rows inside, so that strides never end in a compiled graph. None of
them writes to its inputs or waits for the device. An objective comes as its key and its parameters
(_objective.py).
"""

from __future__ import annotations

import contextlib
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import facts, slices, tiled
from ._layout import rows_of
from ._loss import Loss
from ._objective import program
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
    strict (the objective needs labels): a label outside [0, V) is an error on the CPU and INVALID
    elsewhere; otherwise such a row has NO_LABEL.
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


def _schema(inputs: type, rest: str, returns: str) -> str:
    """Of an op that takes the tensors of a NamedTuple, one after the other (in a list torch.func's
    transforms would not see them), and then the rest.
    """
    hints = inputs.__annotations__.items()
    optional = {name: "None" in getattr(hint, "__forward_arg__", hint) for name, hint in hints}
    tensors = (f"Tensor{'?' * maybe} {name}" for name, maybe in optional.items())
    return f"({', '.join(tensors)}, {rest}) -> {returns}"


class Inputs(NamedTuple):
    """Of the losses from logits."""

    student: Tensor  # [..., V]
    teacher: Tensor | None
    label: Tensor  # int64 [N]
    inv_temperature: Tensor  # 0-dim, as filter_value and num_items are
    parameters: Tensor | None  # [P, N] or [P, 1], of the objective
    filter_value: Tensor | None
    weight: Tensor | None  # [N]
    num_items: Tensor | None


def _parts(inputs: type, arguments: tuple):
    """(the tensors by name, the rest of an op's arguments)."""
    count = len(inputs._fields)
    return inputs(*arguments[:count]), arguments[count:]


def _logits_loss(x, V, objective, needs, backend):
    teacher = x.student if x.teacher is None else x.teacher
    return Loss(
        _implementation(backend), program(objective), needs, x.inv_temperature,
        _as_written(x.filter_value, x.teacher), V,
    ), rows_of(x.student), rows_of(teacher)  # fmt: skip


@torch.library.custom_op(
    f"{NAMESPACE}::divergence",
    mutates_args=(),
    schema=_schema(
        Inputs,
        "SymInt V, str objective, int needs, bool metrics, str reduction, str backend",
        "(Tensor, Tensor, Tensor, Tensor)",
    ),
)
def divergence(*arguments):
    """(sums [16, N], the loss [N] or reduced, the denominator of a mean without num_items, the
    fields of RowMetrics [7, N]); of the last two no elements where there is none. needs: the sums
    (bits of facts.py) of objective and metrics.
    """
    x, (V, objective, needs, metrics, reduction, backend) = _parts(Inputs, arguments)
    loss, student, teacher = _logits_loss(x, V, objective, needs, backend)
    parts = loss.sum_parts(student, teacher, x.label, x.parameters)
    sums, result, denominator, fields = loss.launchers.row_losses(
        parts, x.label, x.inv_temperature, x.parameters, x.weight, x.num_items,
        program=loss.program, needs=needs, metrics=metrics, reduction=reduction,
    )  # fmt: skip
    if reduction != "mean" or x.num_items is not None:
        denominator = sums.new_empty(0)
    return sums, result, denominator, sums.new_empty(0) if fields is None else fields


@divergence.register_fake
def _(*arguments):
    x, (V, objective, needs, metrics, reduction, backend) = _parts(Inputs, arguments)
    N, empty = x.label.numel(), x.inv_temperature.new_empty
    denominator = empty(()) if reduction == "mean" and x.num_items is None else empty(0)
    loss = empty((N,) if reduction == "none" else ())
    return (
        empty((SUMS, N)),
        loss,
        denominator,
        empty((len(facts.METRIC_FIELDS), N) if metrics else 0),
    )


@torch.library.custom_op(
    f"{NAMESPACE}::divergence_backward",
    mutates_args=(),
    schema=_schema(
        Inputs,
        "Tensor? denominator, Tensor sums, Tensor upstream, SymInt V, str objective, int needs, "
        "str backend",
        "Tensor",
    ),
)
def divergence_backward(*arguments):
    """The gradient of the student's logits, contiguous. upstream [N] or 0-dim."""
    x, rest = _parts(Inputs, arguments)
    denominator, sums, upstream, V, objective, needs, backend = rest
    loss, student, teacher = _logits_loss(x, V, objective, needs, backend)
    out = loss.gradient(
        student, teacher, x.label, x.parameters, sums, upstream, x.weight, denominator
    )
    return out.view(x.student.shape)


@divergence_backward.register_fake
def _(*arguments):
    student = arguments[0]
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


class LinearInputs(NamedTuple):
    """Of the losses from hidden states, which have either the teacher's hidden states and matrix or
    its logits, or no teacher.
    """

    student_hidden: Tensor  # [..., H]
    student_weight: Tensor  # [V, H]
    student_bias: Tensor | None
    student_scale: Tensor | None
    student_softcap: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_scale: Tensor | None
    teacher_softcap: Tensor | None
    teacher_logits: Tensor | None
    label: Tensor
    inv_temperature: Tensor
    parameters: Tensor | None
    filter_value: Tensor | None

    @property
    def student(self):
        return self[:5]

    @property
    def teacher(self):
        return self[5:10]


@torch.library.custom_op(
    f"{NAMESPACE}::linear",
    mutates_args=(),
    schema=_schema(
        LinearInputs,
        "Tensor? upstream, Tensor? sums, ScalarType student_dtype, ScalarType? teacher_dtype, "
        "SymInt V, str objective, int needs, bool[] wanted, bool may_skip, SymInt? chunk_bytes, "
        "str backend",
        "Tensor[]",
    ),
)
def linear(*arguments):
    """[sums [16, N], d hidden, d weight, d bias] (slices.walk), in the accumulator's dtype; with
    ``sums`` given the first, and what is not ``wanted`` of the others, has no elements.

    The dtypes are those of the matrix products: autocast's, where it is on.
    """
    x, rest = _parts(LinearInputs, arguments)
    upstream, sums, student_dtype, teacher_dtype, V, objective, needs, *rest = rest
    wanted, may_skip, chunk_bytes, backend = rest

    def head(hidden, weight, bias, scale, softcap, dtype):
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return slices.Head(hidden.to(dtype), weight.to(dtype), bias, scale, softcap)

    teacher = x.teacher_logits
    if x.teacher_hidden is not None:
        teacher = head(*x.teacher, teacher_dtype)
    with _no_autocast(x.label.device.type):
        found, dhidden, *others = slices.walk(
            Loss(
                _implementation(backend), program(objective), needs, x.inv_temperature,
                _as_written(x.filter_value, x.teacher_logits), V,
            ),  # fmt: skip
            head(*x.student, student_dtype),
            teacher,
            x.label,
            x.parameters,
            upstream,
            sums,
            slices.Wanted(*wanted),
            may_skip,
            chunk_bytes or slices.default_chunk_bytes(x.label.device),
        )  # fmt: skip
    nothing = x.inv_temperature.new_empty(0)
    if dhidden is not None:
        dhidden = dhidden.view(x.student_hidden.shape)
    out = [None if sums is not None else found, dhidden, *others]
    return [nothing.clone() if y is None else y for y in out]


@linear.register_fake
def _(*arguments):
    x, (upstream, sums, *rest) = _parts(LinearInputs, arguments)
    wanted = rest[5]
    shapes = [
        (SUMS, x.label.numel()) if sums is None else (0,),
        *(
            y.shape if want and upstream is not None else (0,)
            for y, want in zip(x.student[:3], wanted, strict=True)
        ),
    ]
    return [x.inv_temperature.new_empty(shape) for shape in shapes]


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


def _linear_flops(*arguments, out_val=None, **kwargs):
    """Of the matrix products: both models' logits, d hidden and d weight."""
    x, (upstream, sums, _, _, V, _, _, wanted, *_) = _parts(LinearInputs, arguments)
    products = (sums is None or upstream is not None) + sum(wanted[:2]) * (upstream is not None)
    width = x.student_hidden.shape[-1] * products
    if x.teacher_hidden is not None:
        width += x.teacher_hidden.shape[-1]
    return 2 * x.label.numel() * V * width


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
