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

from . import _cells, _shard, facts, slices, tiled
from ._layout import rows_of
from ._loss import Loss
from ._objective import program

# A copy of the package under another name (from Hugging Face's Hub, say) registers its own ops.
NAMESPACE = __package__.replace(".", "_")


def _no_autocast(device: str):
    """Where products have the dtypes of their operands. Some devices, such as meta, have no
    autocast.
    """
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _implementation(name: str, shard: str = ""):
    """The launchers of a backend: a module, of which both have the same functions, or of a shard
    (_shard.agree) an object with these.
    """
    module = tiled
    if name == "triton":
        from . import kernels as module
    return _shard.Sharded(module, _shard.of_key(shard)) if shard else module


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


@torch.library.custom_op(
    f"{NAMESPACE}::cells",
    mutates_args=(),
    schema="(Tensor ids, Tensor log_probs, Tensor? label_log_probs, Tensor? log_z, Tensor codes, "
    "Tensor inv_temperature, SymInt V, str tail, bool strict, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor)",
)
def cells(ids, log_probs, label_log_probs, log_z, codes, inv_temperature, V, tail, strict, dtype):
    """A sparse teacher's rows as _cells.Cells: ids, log_probs [..., K], the others [...] or
    [..., 2]; codes [...] of the labels. An id outside of the vocabulary, and with strict a label
    without a cell, is an error on the CPU and makes its row NaN elsewhere.
    """

    def flat(x, width):
        return None if x is None else x.reshape(-1, width)

    K, codes = ids.shape[-1], codes.reshape(-1)
    if codes.device.type == "cpu":
        _check_ids(ids, codes.view(ids.shape[:-1]), V)
    found = _cells.canonical(
        flat(ids, K), flat(log_probs, K), flat(label_log_probs, 1), codes, inv_temperature,
        None if log_z is None else flat(log_z, 2 if log_z.dim() == ids.dim() else 1), V, tail,
        strict, dtype,
    )  # fmt: skip
    if strict and codes.device.type == "cpu":
        lost = (found.label == facts.INVALID) & (codes >= 0)
        if lost.any():
            row = int(lost.nonzero()[0])
            where = [int(i) for i in torch.unravel_index(torch.tensor(row), ids.shape[:-1])]
            raise ValueError(
                f"the loss needs each label's own log-probability in the teacher, got label "
                f"{int(codes[row])} at {where}, which is not among the ids there; pass it as "
                "SparseTeacher(..., label_log_probs=...), or ignore the row"
            )
    return tuple(found)


def _check_ids(ids, codes, V):
    outside = ((ids < -1) | (ids >= V)) & (codes != facts.IGNORED)[..., None]
    if outside.any():
        where = outside.nonzero()[0].tolist()
        raise ValueError(
            f"ids must be in [0, {V}) or -1 (no entry), got {ids[tuple(where)].item()} at {where}; "
            "check the teacher's tokenizer against the student's vocabulary"
        )


@cells.register_fake
def _(ids, log_probs, label_log_probs, log_z, codes, inv_temperature, V, tail, strict, dtype):
    N, K = codes.numel(), ids.shape[-1] + int(label_log_probs is not None)
    return (
        torch.empty((N, K), dtype=torch.int32, device=ids.device),
        torch.empty((N, K + 1), dtype=dtype, device=ids.device),
        torch.empty(N, dtype=torch.int64, device=ids.device),
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
    columns: Tensor | None  # [N, K] of a sparse teacher, whose log_p [N, K + 1] are ``teacher``
    cell_label: Tensor | None  # [N] (_cells.Cells)


def _parts(inputs: type, arguments: tuple):
    """(the tensors by name, the rest of an op's arguments)."""
    count = len(inputs._fields)
    return inputs(*arguments[:count]), arguments[count:]


def loss_of(x, filter_value, V, objective, needs, tail, backend, shard):
    """The loss of either kind of inputs ``x``; with objective "" their log-probabilities. tail: of
    a sparse teacher, or "". backend None: it launches nothing. V: of the columns that are here.
    """
    launchers = None if backend is None else _implementation(backend, shard)
    if not objective:
        return _cells.LogProbs(launchers, x.inv_temperature, V, x.columns.shape[1])
    if tail in ("", "uniform"):
        return Loss(launchers, program(objective), needs, x.inv_temperature, filter_value, V)
    return _cells.of(launchers, objective, needs, x.inv_temperature, V, tail)


def _logits_loss(x, V, objective, needs, tail, backend, shard):
    """(the loss, the student's rows, the teacher's or its cells)."""
    filter_value = _as_written(x.filter_value, x.teacher)
    loss = loss_of(x, filter_value, V, objective, needs, tail, backend, shard)
    if x.columns is None:
        return loss, rows_of(x.student), rows_of(x.student if x.teacher is None else x.teacher)
    cells = _cells.Cells(x.columns, x.teacher, x.cell_label)
    return _cells.Spread(loss) if tail == "uniform" else loss, rows_of(x.student), cells


@torch.library.custom_op(
    f"{NAMESPACE}::divergence",
    mutates_args=(),
    schema=_schema(
        Inputs,
        "SymInt V, str objective, int needs, bool metrics, str reduction, str tail, str backend, "
        "str shard",
        "(Tensor, Tensor, Tensor, Tensor)",
    ),
)
def divergence(*arguments):
    """(sums [16, N], the loss [N] or reduced, the denominator of a mean without num_items, the
    fields of RowMetrics [7, N]); of the last two no elements where there is none. needs: the sums
    (bits of facts.py) of objective and metrics.
    """
    x, (V, objective, needs, metrics, reduction, *rest) = _parts(Inputs, arguments)
    loss, student, teacher = _logits_loss(x, V, objective, needs, *rest)
    sums, result, denominator, fields = loss.forward(
        student, teacher, x.label, x.parameters, x.weight, x.num_items, metrics, reduction
    )
    if reduction != "mean" or x.num_items is not None:
        denominator = sums.new_empty(0)
    return sums, result, denominator, sums.new_empty(0) if fields is None else fields


@divergence.register_fake
def _(*arguments):
    x, (V, objective, needs, metrics, reduction, tail, *_) = _parts(Inputs, arguments)
    loss = loss_of(x, None, V, objective, needs, tail, None, "")
    N, empty = x.label.numel(), x.inv_temperature.new_empty
    denominator = empty(()) if reduction == "mean" and x.num_items is None else empty(0)
    result = empty((N,) if reduction == "none" else ())
    return (
        empty((loss.table_rows, N)),
        result,
        denominator,
        empty((len(facts.METRIC_FIELDS), N) if metrics else 0),
    )


@torch.library.custom_op(
    f"{NAMESPACE}::divergence_backward",
    mutates_args=(),
    schema=_schema(
        Inputs,
        "Tensor? denominator, Tensor sums, Tensor upstream, SymInt V, str objective, int needs, "
        "str tail, str backend, str shard",
        "Tensor",
    ),
)
def divergence_backward(*arguments):
    """The gradient of the student's logits, contiguous. upstream [N] or 0-dim."""
    x, rest = _parts(Inputs, arguments)
    denominator, sums, upstream, *rest = rest
    loss, student, teacher = _logits_loss(x, *rest)
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


@torch.library.custom_op(
    f"{NAMESPACE}::distinct",
    mutates_args=(),
    schema="(Tensor ids, SymInt V) -> (Tensor, Tensor)",
)
def distinct(ids, V):
    """(columns [N, K], codes [N]) of ids [..., K] (_cells.distinct); one outside of the vocabulary
    is an error on the CPU.
    """
    if ids.device.type == "cpu":
        _check_ids(ids, torch.zeros(ids.shape[:-1]), V)
    return _cells.distinct(ids.reshape(-1, ids.shape[-1]), V)


@distinct.register_fake
def _(ids, V):
    N, K = ids.numel() // ids.shape[-1], ids.shape[-1]
    columns = torch.empty((N, K), dtype=torch.int32, device=ids.device)
    return columns, torch.empty(N, dtype=torch.int64, device=ids.device)


def _log_probs(columns, codes, inv_temperature, V, backend, shard):
    launchers = _implementation(backend, shard)
    loss = _cells.LogProbs(launchers, inv_temperature, V, columns.shape[1])
    return loss, _cells.Cells(columns, columns, codes)


@torch.library.custom_op(
    f"{NAMESPACE}::log_probs_at",
    mutates_args=(),
    schema="(Tensor logits, Tensor columns, Tensor codes, Tensor inv_temperature, str backend, "
    "str shard) -> Tensor",
)
def log_probs_at(logits, columns, codes, inv_temperature, backend, shard):
    """The table of _cells.LogProbs."""
    rest = inv_temperature, logits.shape[-1], backend, shard
    loss, cells = _log_probs(columns, codes, *rest)
    return loss.sums(rows_of(logits), cells, codes, None)


@log_probs_at.register_fake
def _(logits, columns, codes, inv_temperature, backend, shard):
    N, K = columns.shape
    return inv_temperature.new_empty((_cells.TAIL_SUMS + K, N))


@torch.library.custom_op(
    f"{NAMESPACE}::log_probs_at_backward",
    mutates_args=(),
    schema="(Tensor logits, Tensor columns, Tensor codes, Tensor inv_temperature, Tensor table, "
    "Tensor grad, str backend, str shard) -> Tensor",
)
def log_probs_at_backward(logits, columns, codes, inv_temperature, table, grad, backend, shard):
    """The gradient of the logits; grad [K + 1, N] of the cells' log-probabilities."""
    rest = inv_temperature, logits.shape[-1], backend, shard
    loss, cells = _log_probs(columns, codes, *rest)
    upstream = torch.ones_like(table[0])
    out = loss.gradient(rows_of(logits), cells, codes, grad, table, upstream)
    return out.view(logits.shape)


@log_probs_at_backward.register_fake
def _(logits, columns, codes, inv_temperature, table, grad, backend, shard):
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
    columns: Tensor | None  # of a sparse teacher, as above, with ``teacher_logits``
    cell_label: Tensor | None

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
        "str tail, str backend, str shard",
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
    wanted, may_skip, chunk_bytes, tail, backend, shard = rest

    def head(hidden, weight, bias, scale, softcap, dtype):
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return slices.Head(hidden.to(dtype), weight.to(dtype), bias, scale, softcap)

    teacher = x.teacher_logits
    if x.teacher_hidden is not None:
        teacher = head(*x.teacher, teacher_dtype)
    elif x.columns is not None:
        teacher = _cells.Cells(
            x.columns,
            x.columns if x.teacher_logits is None else x.teacher_logits,
            x.label if x.cell_label is None else x.cell_label,
        )
    filter_value = _as_written(x.filter_value, x.teacher_logits)
    with _no_autocast(x.label.device.type):
        found, dhidden, *others = slices.walk(
            loss_of(x, filter_value, V, objective, needs, tail, backend, shard),
            head(*x.student, student_dtype),
            teacher,
            x.label,
            x.parameters,
            upstream,
            sums,
            slices.Wanted(*wanted),
            may_skip,
            chunk_bytes or slices.default_chunk_bytes(x.label.device),
        )
    nothing = x.inv_temperature.new_empty(0)
    if dhidden is not None:
        dhidden = dhidden.view(x.student_hidden.shape)
    out = [None if sums is not None else found, dhidden, *others]
    return [nothing.clone() if y is None else y for y in out]


@linear.register_fake
def _(*arguments):
    x, (upstream, sums, _, _, V, objective, needs, wanted, *rest) = _parts(LinearInputs, arguments)
    loss = loss_of(x, None, V, objective, needs, rest[2], None, "")
    shapes = [
        (loss.table_rows, x.label.numel()) if sums is None else (0,),
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
