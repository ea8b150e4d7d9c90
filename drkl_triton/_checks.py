"""Everything that is checked about a caller's arguments, in one place. Messages say what was
expected, what came, what to do.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from numbers import Integral, Real

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("auto", "triton", "tiled")
REDUCTIONS = ("mean", "sum", "none")

# Triton is optional. Only its own presence is asked for: a missing drkl_triton.kernels is a broken
# install and raises.
HAS_TRITON = find_spec("triton") is not None
# Triton reads this when it decorates the kernels, so a later change would have no effect either.
INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

_TRITON_DEVICES = ("cuda", "xpu")  # ROCm calls itself cuda


def logits(name: str, x: Tensor) -> None:
    """One tensor of logits, [..., V]."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor [..., V], got {type(x).__name__}; convert it with "
            "torch.as_tensor, or pass the model output's .logits"
        )
    if not torch.compiler.is_compiling():
        _plain_tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; convert it "
            "with .float()"
        )
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{name} must have a vocabulary of at least one column in its last dimension, got "
            f"shape {tuple(x.shape)}; pass logits of shape [..., V]"
        )


def _plain_tensor(name: str, x: Tensor) -> None:
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        raise TypeError(
            f"{name} is inside a torch.func transform (vmap, grad, jvp), which these kernels do "
            "not support; "
            "use loss.backward() or torch.autograd.grad, and batch along the leading dimensions "
            "instead of vmap"
        )
    dense(name, x)
    if hasattr(x, "device_mesh"):
        raise TypeError(
            f"{name} is a DTensor, got placements {x.placements}; pass its full_tensor() or the "
            "local rows of it"
        )


def dense(name: str, x: Tensor) -> None:
    if x.layout != torch.strided or x.is_nested:
        layout = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(
            f"{name} must be a dense (strided) tensor, got {layout}; convert it with .to_dense(), "
            "or pad a nested tensor"
        )


def logits_pair(student: Tensor, teacher: Tensor, vocab_mismatch: str) -> int:
    """Both logits; returns the number of columns that count."""
    one_of("vocab_mismatch", vocab_mismatch, ("error", "truncate"))
    logits("student_logits", student)
    logits("teacher_logits", teacher)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student_logits and teacher_logits must have the same leading shape, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}; shift or slice both the same way"
        )
    same_device("teacher_logits", teacher, student)
    if teacher.requires_grad:
        raise ValueError(
            "teacher_logits requires grad, but gradients flow to the student alone; "
            "compute the teacher under torch.no_grad() or pass teacher_logits.detach()"
        )
    V, teacher_V = student.shape[-1], teacher.shape[-1]
    if V != teacher_V and vocab_mismatch == "error":
        raise ValueError(
            f"student_logits has {V} columns and teacher_logits {teacher_V}; if the first "
            f"{min(V, teacher_V)} mean the same "
            'tokens in both, pass vocab_mismatch="truncate"'
        )
    return min(V, teacher_V)


def same_device(name: str, x: Tensor, student: Tensor) -> None:
    if x.device != student.device:
        raise ValueError(
            f"{name} must be on the device of student_logits, {student.device}, got {x.device}; "
            f"move it with .to(student_logits.device)"
        )


def row_tensor(
    name: str, x: Tensor, student: Tensor, dtypes: tuple[torch.dtype, ...] | None, what: str
) -> None:
    """labels or weight: one value a row."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor of {what}, got {type(x).__name__}; convert it with "
            "torch.as_tensor"
        )
    dense(name, x)
    if (dtypes is not None and x.dtype not in dtypes) or x.is_complex():
        raise TypeError(f"{name} must be {what}, got {x.dtype}; convert it with .to()")
    if x.shape != student.shape[:-1]:
        raise ValueError(
            f"{name} must have the leading shape of student_logits, {tuple(student.shape[:-1])}, "
            f"got {tuple(x.shape)}; "
            "give one value per token"
        )
    same_device(name, x, student)


def labels(x: Tensor | None, student: Tensor) -> None:
    if x is not None:
        row_tensor("labels", x, student, (torch.int64, torch.int32), "int64 (or int32)")


def weight(x: Tensor | None, student: Tensor) -> None:
    if x is not None:
        row_tensor("weight", x, student, None, "real numbers")


def one_of(name: str, value, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, "
            f"got {value!r}; choose one of them"
        )


def positive(name: str, value: float | Tensor) -> None:
    """temperature, gamma: a positive number, or a 0-dim tensor whose value is not looked at."""
    _number(
        name, value, "a positive number or a 0-dim tensor", "a value per token is not supported"
    )
    # the bounds keep the number and its reciprocal inside float32
    if not isinstance(value, Tensor) and not 1e-37 <= value <= 1e37:
        raise ValueError(
            f"{name} must be positive, from 1e-37 to 1e37, got {value!r}; pass a number such as 1.0"
        )


def _number(name: str, value, expected: str, hint: str) -> None:
    """A real number that is no bool, or a real 0-dim tensor."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.is_complex():
            raise ValueError(
                f"{name} must be {expected}, got a {value.dtype} tensor of shape "
                f"{tuple(value.shape)}; {hint}, pass a float or a 0-dim real tensor"
            )
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be {expected}, got {type(value).__name__}; pass a float or a 0-dim tensor"
        )


def integer(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{name} must be an int, got {type(value).__name__}; pass a Python int such as -100"
        )
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must fit into int64, got {value}; pass a number such as -100")


def flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}; pass a bool")


def denominator(num_items: float | Tensor | None, reduction: str) -> None:
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(
            'num_items replaces the denominator of reduction="mean", got '
            f"reduction={reduction!r}; leave num_items out"
        )
    _number("num_items", num_items, "a number or a 0-dim tensor", "it is one count for the batch")
    if not isinstance(num_items, Tensor) and not 0 <= num_items <= 1e37:
        raise ValueError(
            f"num_items must be finite and not negative, got {num_items!r}; pass the number of "
            "tokens that count"
        )


def shift_shape(student: Tensor) -> None:
    if student.dim() < 3:
        raise ValueError(
            f"shift=True needs [B, T, V] logits, got shape {tuple(student.shape)}: flattened rows "
            "would be scored with the "
            "next sequence's first label; pass the unflattened tensors (logits[None] for one "
            "sequence)"
        )


def divergence_options(
    *, reduction, support, backend, ignore_index, shift, return_metrics, temperature, num_items
) -> None:
    """The options that reverse_kl, drkl and their modules share."""
    one_of("reduction", reduction, REDUCTIONS)
    one_of("support", support, ("full", "teacher"))
    one_of("backend", backend, BACKENDS)
    integer("ignore_index", ignore_index)
    flag("shift", shift)
    flag("return_metrics", return_metrics)
    positive("temperature", temperature)
    denominator(num_items, reduction)


def backend(backend: str, tensor: Tensor) -> str:
    """ "triton" or "tiled" for a checked ``backend`` argument and the device of ``tensor``."""
    device = tensor.device.type
    if backend == "auto":
        return "triton" if HAS_TRITON and device in _TRITON_DEVICES else "tiled"
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError(
                'backend="triton" needs the triton package, which is not installed; install it or '
                'use backend="tiled"'
            )
        if device not in _TRITON_DEVICES and not (device == "cpu" and INTERPRETING):
            raise ValueError(
                f'backend="triton" needs tensors on a GPU, got {device}; move them, use '
                'backend="tiled", or set '
                "TRITON_INTERPRET=1 before the import to run the kernels in Triton's interpreter "
                "on the CPU"
            )
    return backend
