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


def logits(name: str, x: Tensor, sharded: bool = False) -> None:
    """One tensor of logits, [..., V]; of a shard, which may have no column."""
    _floats(name, x, "[..., V]", "convert it with torch.as_tensor, or pass the output's .logits")
    if x.dim() == 0 or (x.shape[-1] == 0 and not sharded):
        raise ValueError(
            f"{name} must have a vocabulary of at least one column in its last dimension, got "
            f"shape {tuple(x.shape)}; pass logits of shape [..., V]"
        )


def _floats(name: str, x, shape: str, hint: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {shape}, got {type(x).__name__}; {hint}")
    if not torch.compiler.is_compiling():
        _plain_tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}; convert it "
            "with .float()"
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
            f"{name} is a DTensor, got placements {x.placements}; pass its to_local() where each "
            "process has whole rows of its own, or its full_tensor() where all processes compute "
            "the loss of the same rows (tensor parallelism)"
        )


def dense(name: str, x: Tensor) -> None:
    if x.layout != torch.strided or x.is_nested:
        layout, hint = f"layout {x.layout}", "convert it with .to_dense()"
        if x.is_nested:
            layout, hint = "a nested tensor", "make it dense with .to_padded_tensor(0.0)"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {layout}; {hint}")


def logits_pair(student: Tensor, teacher: Tensor | None, vocab_mismatch: str, shard=None) -> int:
    """Both logits; returns the number of columns that count."""
    logits("student_logits", student, shard is not None)
    if teacher is None:
        return student.shape[-1]
    logits("teacher_logits", teacher, shard is not None)
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "student_logits and teacher_logits must have the same leading shape, got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}; shift or slice both the same way"
        )
    same_device("teacher_logits", teacher, student, "student_logits")
    detached("teacher_logits", teacher)
    sizes = student.shape[-1], teacher.shape[-1]
    if shard is not None:
        return same_shard(*sizes, "student_logits", "teacher_logits", shard)
    return vocabulary(*sizes, ("student_logits", "teacher_logits", ""), vocab_mismatch)


def detached(name: str, x: Tensor) -> None:
    if x.requires_grad:
        # a parameter requires grad under no_grad, too
        other = "teacher.requires_grad_(False)" if x.is_leaf else "torch.no_grad()"
        raise ValueError(
            f"{name} requires grad, but gradients flow to the student alone; "
            f"compute the teacher under {other} or pass {name}.detach()"
        )


def no_gradient(name: str, x: Tensor) -> None:
    """gamma, temperature, num_items, weight."""
    if x.requires_grad:
        raise ValueError(
            f"{name} requires grad, but the loss has no gradient for it; pass {name}.detach()"
        )


def vocabulary(V: int, teacher_V: int, names: tuple[str, str, str], vocab_mismatch: str) -> int:
    """The number of columns that count. names: of student and teacher, and a hint or ""."""
    if V != teacher_V and vocab_mismatch == "error":
        student, teacher, hint = names
        raise ValueError(
            f"{student} has a vocabulary of {V} and {teacher} of {teacher_V}; if the first "
            f"{min(V, teacher_V)} mean the same "
            f'tokens in both, pass vocab_mismatch="truncate"{hint}'
        )
    return min(V, teacher_V)


def same_shard(width: int, teacher_width: int, student: str, teacher: str, shard) -> int:
    if width != teacher_width:
        raise ValueError(
            f"with group= {teacher} must have the {width} columns that {student} has on this rank, "
            f"or the whole vocabulary's {shard.vocabulary}, got {teacher_width}; split both "
            "models' vocabularies in the same way"
        )
    return width


# --- a few log-probabilities of a teacher ---

TAILS = ("bucket", "renormalise", "drop", "uniform")


def token_ids(name: str, x: Tensor) -> None:
    """ids [..., K]."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor [..., K], got {type(x).__name__}; convert it with "
            "torch.as_tensor"
        )
    if not torch.compiler.is_compiling():
        _plain_tensor(name, x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int64 or int32, got {x.dtype}; pass token ids")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(
            f"{name} must be [..., K] with K of at least 1, got shape {tuple(x.shape)}; for one id "
            "a row pass ids[..., None]"
        )


def sparse_teacher(teacher) -> None:
    """The fields of a SparseTeacher among themselves."""
    ids, log_probs = teacher.ids, teacher.log_probs
    token_ids("ids", ids)
    _floats("log_probs", log_probs, "[..., K]", "convert it with torch.as_tensor")
    if ids.shape != log_probs.shape:
        raise ValueError(
            f"ids and log_probs must have one shape [..., K], got {tuple(ids.shape)} and "
            f"{tuple(log_probs.shape)}; give each log-probability its id (-1: no entry)"
        )
    one_of("tail", teacher.tail, TAILS)
    flag("normalised", teacher.normalised)
    rows = tuple(ids.shape[:-1])
    wanted = {"label_log_probs": rows, "log_z": (*rows, 2) if teacher.normalised else rows}
    meaning = {
        "label_log_probs": "the teacher's log-probability of each row's label",
        "log_z": "the logsumexp of the teacher's logits"
        + (" at temperature 1 and at the loss's, in this order" if teacher.normalised else ""),
    }
    for name, shape in wanted.items():
        x = getattr(teacher, name)
        if x is not None:
            _floats(name, x, str(list(shape)), "convert it with torch.as_tensor")
            if tuple(x.shape) != shape:
                raise ValueError(
                    f"{name} must have shape {shape}, that of the ids "
                    f"({tuple(ids.shape)}), got {tuple(x.shape)}; pass {meaning[name]}"
                )
    for name in ("log_probs", "log_z", "label_log_probs"):
        x = getattr(teacher, name)
        if x is not None:
            detached(name, x)
            same_device(name, x, ids, "ids")
    if not teacher.normalised and teacher.log_z is None and teacher.tail != "renormalise":
        raise ValueError(
            f'tail="{teacher.tail}" needs the teacher\'s mass outside the K columns, which logits '
            "that are not normalised do not tell, got normalised=False without log_z; pass log_z "
            '(the logsumexp of all its logits), or tail="renormalise"'
        )


def logits_and_cells(student, teacher, shard=None) -> int:
    """Student logits and a SparseTeacher; returns the number of columns."""
    logits("student_logits", student, shard is not None)
    cells_of(teacher, student, "student_logits")
    return student.shape[-1]


def rows_of_ids(ids: Tensor, like: Tensor, of: str) -> None:
    if ids.shape[:-1] != like.shape[:-1]:
        raise ValueError(
            f"ids must be [..., K] with the leading shape of {of}, {tuple(like.shape[:-1])}, got "
            f"{tuple(ids.shape)}; give K ids per row (labels[..., None] for one), -1 for none"
        )
    same_device("ids", ids, like, of)


def cells_of(teacher, student: Tensor, of: str) -> None:
    """That a SparseTeacher has the rows of the student's tensor, which is called ``of``."""
    if teacher.ids.shape[:-1] != student.shape[:-1]:
        raise ValueError(
            f"the SparseTeacher's ids must have the leading shape of {of}, "
            f"{tuple(student.shape[:-1])}, got {tuple(teacher.ids.shape)}; give K entries per row, "
            "-1 where there is none"
        )
    same_device("the SparseTeacher", teacher.ids, student, of)


def sparse_temperature(teacher, one: bool) -> None:
    """one: that the temperature is the number 1."""
    if not one and teacher.log_z is None and teacher.tail != "renormalise":
        raise ValueError(
            "K log-probabilities at temperature 1 do not tell those at another, because what they "
            "are divided by depends on the whole vocabulary; pass temperature=1, or "
            "SparseTeacher(..., log_z=...) with the logsumexp of the teacher's logits at 1 and at "
            'the loss\'s temperature, or tail="renormalise", which needs none'
        )


# --- hidden states and output matrices ---


def head(who: str, hidden, weight, bias, sharded: bool = False) -> None:
    """The tensors of a model's output layer. who: "student", "teacher", or "" for the only one."""
    names = [f"{who}_{part}".lstrip("_") for part in ("hidden", "weight", "bias")]
    _floats(
        names[0], hidden, "[..., H]", "pass the model's last hidden states, .last_hidden_state say"
    )
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(
            f"{names[0]} must be [..., H] with at least one column, got shape "
            f"{tuple(hidden.shape)}; pass what goes into the output layer"
        )
    matrix(names[1], weight, names[0], hidden, sharded)
    if bias is not None:
        _floats(names[2], bias, "[V]", "pass the output layer's .bias")
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{names[2]} must be [V], one number a row of {names[1]} {tuple(weight.shape)}, "
                f"got shape {tuple(bias.shape)}; pass the bias of the same layer"
            )
        same_device(names[2], bias, hidden, names[0])


def head_numbers(who: str, scale, softcap) -> None:
    _positive_number(f"{who}_scale".lstrip("_"), scale, "what the model multiplies its logits with")
    if softcap is not None:
        hint = "the cap of cap * tanh(logits / cap), or None"
        _positive_number(f"{who}_softcap".lstrip("_"), softcap, hint)


def matrix(name: str, weight, hidden_name: str, hidden: Tensor, sharded: bool = False) -> None:
    """An output matrix [V, H] for ``hidden`` [..., H]."""
    if isinstance(weight, torch.nn.Module):
        raise TypeError(_module_message(name, weight))
    if isinstance(weight, Tensor) and not torch.compiler.is_compiling():
        if weight.numel() == 0 and weight.layout == torch.strided and not sharded:
            raise ValueError(
                f"{name} has no elements, got shape {tuple(weight.shape)}; pass [V, H]. If ZeRO-3 "
                "or FSDP has partitioned it, compute the loss in the forward of the module that is "
                "wrapped (README: several processes); where ZeRO-3 does not gather it there, see "
                "deepspeed.zero.register_external_parameter(module, weight)"
            )
        if hasattr(weight, "device_mesh"):
            # full_tensor() alone takes the gradient of one process for that of all
            raise TypeError(
                f"{name} is a DTensor, got placements {weight.placements}; compute the loss in the "
                "forward of the module that fully_shard wraps, which has it whole, or pass "
                'weight.full_tensor(grad_placements=[Partial("avg")] * weight.device_mesh.ndim); '
                "under tensor parallelism, where all processes have the same tokens, pass group="
            )
        _says_whose_gradient(name, weight)
        if weight.dtype not in FLOATS or weight.is_quantized:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {weight.dtype} "
                f"({type(weight).__name__}); dequantise a quantised matrix first, convert another, "
                "or pass teacher_logits if it is the teacher's"
            )
        if hasattr(type(weight), "__tensor_flatten__"):  # stands for other tensors
            advice = "pass the plain tensor that it stands for"
            if type(weight).dequantize is not Tensor.dequantize:
                advice = "a quantised matrix must be made dense first, with .dequantize()"
            raise TypeError(
                f"{name} must be a plain tensor [V, H], got {type(weight).__name__}; {advice}"
            )
    _floats(name, weight, "[V, H]", "pass the output layer's .weight")
    empty = weight.dim() == 2 and weight.shape[0] == 0 and not sharded
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or empty:
        raise ValueError(
            f"{name} must be [V, H] with the H of {hidden_name} {tuple(hidden.shape)}, got shape "
            f"{tuple(weight.shape)}; pass the .weight of a Linear layer from {hidden.shape[-1]} "
            "features, not its transpose"
            + ("; logits belong in teacher_logits" if name == "teacher_weight" else "")
        )
    same_device(name, weight, hidden, hidden_name)


def _says_whose_gradient(name: str, weight: Tensor) -> None:
    """That full_tensor() was told what becomes of the gradient. Without being told it takes that of
    this process for that of all, which it is only where all have the same tokens.
    """
    made = weight.grad_fn
    if type(made).__name__ != "_ToTorchTensorBackward" or made.grad_placements is not None:
        return
    mesh = made.dtensor_spec.mesh
    if mesh.size() > 1 and all(place.is_replicate() for place in made.dtensor_spec.placements):
        raise ValueError(
            f"{name} comes from a DTensor's full_tensor(), which takes the gradient of this "
            "process for that of all; say whose it is: "
            f'full_tensor(grad_placements=[Partial("avg")] * {mesh.ndim}) where each process has '
            "tokens of its own (FSDP, data parallelism), or "
            f"full_tensor(grad_placements=[Replicate()] * {mesh.ndim}) where all have the same "
            "(tensor parallelism)"
        )


def _module_message(name: str, module: torch.nn.Module) -> str:
    got = f"{name} must be a torch.Tensor [V, H], got the module {type(module).__name__}; "
    if hasattr(module, "base_layer"):
        return got + (
            "an adapter (LoRA) is no matrix: merge it and pass .weight, or pass "
            ".base_layer.weight plus its update, which keeps the adapter's gradients"
        )
    return got + "pass its .weight (and its .bias, if it has one)"


def autocasting(device: str) -> bool:
    """Whether autocast is on; there are devices, such as meta, that have none."""
    if torch.compiler.is_compiling():  # PyTorch 2.11 cannot trace the other question
        has_one = device != "meta"
    else:
        has_one = torch.amp.is_autocast_available(device)
    return has_one and torch.is_autocast_enabled(device)


def product_dtype(name: str, weight: Tensor, hidden_name: str, hidden: Tensor) -> torch.dtype:
    """The dtype in which ``hidden`` and ``weight`` are multiplied, as a Linear layer would."""
    wide = torch.float64 in (hidden.dtype, weight.dtype)
    if autocasting(hidden.device.type) and not wide:
        return torch.get_autocast_dtype(hidden.device.type)
    if hidden.dtype != weight.dtype:
        where = ", float64 under autocast, too," if wide else " outside of autocast"
        raise TypeError(
            f"{hidden_name} and {name} must have the same dtype{where}, got "
            f"{hidden.dtype} and {weight.dtype}; call the loss inside the autocast block that made "
            f"the hidden states, or convert one, {hidden_name}.to({name}.dtype) for example"
        )
    return weight.dtype


def heads(student, teacher, teacher_logits, vocab_mismatch: str, needs_teacher: bool, shard=None):
    """Both output layers, (hidden, weight, bias, scale, softcap) each; returns (the number of
    columns that count, the dtypes of the student's and of the teacher's matrix product).
    """
    sharded = shard is not None
    head("student", *student[:3], sharded)
    if not _teacher_is_one(*teacher, teacher_logits, needs_teacher):
        dtype = product_dtype("student_weight", student[1], "student_hidden", student[0])
        return student[1].shape[0], dtype, None
    hidden, matrix = student[:2]
    dtype = product_dtype("student_weight", matrix, "student_hidden", hidden)
    if hasattr(teacher_logits, "log_probs"):  # a SparseTeacher
        cells_of(teacher_logits, hidden, "student_hidden")
        return matrix.shape[0], dtype, None
    if teacher_logits is None:
        head("teacher", *teacher[:3], sharded)
        source, source_name = teacher[0], "teacher_hidden"
        teacher_dtype = product_dtype("teacher_weight", teacher[1], source_name, source)
        sizes = matrix.shape[0], teacher[1].shape[0]
        names = "student_weight", "teacher_weight", ""
    else:
        logits("teacher_logits", teacher_logits, sharded)
        source, source_name, teacher_dtype = teacher_logits, "teacher_logits", None
        sizes = matrix.shape[0], teacher_logits.shape[-1]
        names = "student_weight", "teacher_logits", "; hidden states belong in teacher_hidden"
    if hidden.shape[:-1] != source.shape[:-1]:
        raise ValueError(
            f"student_hidden and {source_name} must have the same leading shape, got "
            f"{tuple(hidden.shape)} and {tuple(source.shape)}; shift or slice both the same way"
        )
    same_device(source_name, source, hidden, "student_hidden")
    theirs = ("teacher_hidden", teacher[0]), ("teacher_weight", teacher[1])
    for name, x in (*theirs, ("teacher_bias", teacher[2]), ("teacher_logits", teacher_logits)):
        if x is not None:
            detached(name, x)
    if sharded:
        return same_shard(*sizes, *names[:2], shard), dtype, teacher_dtype
    return vocabulary(*sizes, names, vocab_mismatch), dtype, teacher_dtype


def _teacher_is_one(hidden, weight, bias, scale, softcap, logits, needed: bool) -> bool:
    """That the teacher comes either as hidden states and matrix, or as logits; or, where none is
    needed, not at all: returns whether there is one.
    """
    if logits is None:
        if not needed and hidden is None and weight is None:
            return False
        if hidden is None or weight is None:
            got, missing = "none of them", "both of the first, or the last"
            if hidden is not None:
                got, missing = "teacher_hidden alone", "teacher_weight, too"
            elif weight is not None:
                got, missing = "teacher_weight alone", "teacher_hidden, too"
            raise TypeError(
                "the teacher must be given as teacher_hidden [..., H] and teacher_weight [V, H], "
                f"or as teacher_logits [..., V], got {got}; pass {missing}"
            )
        return True
    if hidden is not None or weight is not None:
        raise TypeError(
            "the teacher must be given as teacher_hidden and teacher_weight, or as "
            "teacher_logits, got both; leave one out"
        )
    if bias is not None or scale != 1.0 or softcap is not None:
        raise ValueError(
            "teacher_bias, teacher_scale and teacher_softcap belong to teacher_hidden, got "
            "teacher_logits, which are taken as they are; apply them to the logits before"
        )
    return True


def linear_options(*, chunk_bytes, recompute) -> None:
    """The options of the losses from hidden states alone."""
    if chunk_bytes is not None:
        integer("chunk_bytes", chunk_bytes, "256 * 2**20")
        if chunk_bytes < 1:
            raise ValueError(
                f"chunk_bytes must be positive, got {chunk_bytes}; pass the bytes that a slice of "
                "both models' logits may take, or None"
            )
    flag("recompute", recompute)


def _positive_number(name: str, value, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be a number ({what}), got {type(value).__name__}; pass a float"
        )
    if not 1e-37 <= value <= 1e37:
        raise ValueError(
            f"{name} must be positive, from 1e-37 to 1e37 ({what}), got {value!r}; pass a float"
        )


# --- all losses ---


def same_device(name: str, x: Tensor, student: Tensor, of: str) -> None:
    if x.device != student.device:
        raise ValueError(
            f"{name} must be on the device of {of}, {student.device}, got {x.device}; "
            f"move it with .to({of}.device)"
        )


def row_tensor(
    name: str, x: Tensor, student: Tensor, of: str, dtypes: tuple | None, what: str, hint: str
) -> None:
    """labels or weight: one value a row of the student's tensor, which is called ``of``."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor of {what}, got {type(x).__name__}; convert it with "
            "torch.as_tensor"
        )
    if not torch.compiler.is_compiling():
        _plain_tensor(name, x)
    if x.shape != student.shape[:-1]:
        shifted = x.dim() > 1 and x.shape == (*student.shape[:-2], student.shape[-2] - 1)
        raise ValueError(
            f"{name} must have the leading shape of {of}, {tuple(student.shape[:-1])}, "
            f"got {tuple(x.shape)}; "
            "give one value per token" + (", unshifted, and pass shift=True" if shifted else "")
        )
    if (dtypes is not None and x.dtype not in dtypes) or x.is_complex():
        raise TypeError(f"{name} must be {what}, got {x.dtype}; {hint}")
    same_device(name, x, student, of)


def labels_given(function: str, objective, labels: Tensor | None) -> None:
    if labels is None and objective.labels:
        subject, linear = function, "linear_" * function.startswith("linear_")
        if function.endswith("divergence"):
            subject = " and ".join(f.__name__ for f, _, _ in objective.terms if f.labels)
        raise TypeError(
            f"{subject} needs labels [...] (the target column of each row), got None; "
            f"{linear}reverse_kl works without"
        )


def objective(objective) -> None:
    if not hasattr(objective, "terms"):
        got = type(objective).__name__
        raise TypeError(
            f"objective must be an Objective, got {got}; make one with drkl_triton.objectives, "
            "objectives.drkl(gamma=0.5) say, and pass it first"
        )


def teacher_support(support: str, teacher: bool, sparse: bool = False) -> None:
    if support == "teacher" and sparse:
        raise ValueError(
            'support="teacher" looks at the teacher\'s logits, got a SparseTeacher; leave support '
            'out, or pass SparseTeacher(..., tail="renormalise")'
        )
    if support == "teacher" and not teacher:
        raise ValueError(
            'support="teacher" leaves out what the teacher does, got no teacher; pass one, or '
            "leave support out"
        )


def parameters(objective, student: Tensor, of: str) -> None:
    """Those of an objective that have a value a token."""
    for formula, values, weight in objective.terms:
        named = [*zip(formula.parameters, values, strict=True), ("weight", weight)]
        for name, x in named:
            if isinstance(x, Tensor) and x.dim() > 0:
                if x.shape != student.shape[:-1]:
                    raise ValueError(
                        f"{formula.__name__}'s {name} must be a number, a 0-dim tensor, or of the "
                        f"leading shape of {of}, {tuple(student.shape[:-1])}, got "
                        f"{tuple(x.shape)}; give one value, or one per token"
                    )
                same_device(f"{formula.__name__}'s {name}", x, student, of)


def parameter(name: str, value, kind: str) -> None:
    """A parameter of a divergence; kind: "positive", "fraction" or "real"."""
    expected = {"positive": "a positive number", "fraction": "a number between 0 and 1"}
    expected = expected.get(kind, "a finite number")
    if isinstance(value, Tensor):
        if not torch.compiler.is_compiling():
            _plain_tensor(name, value)
        no_gradient(name, value)
        if value.is_complex():
            raise TypeError(
                f"{name} must be {expected} or a real tensor, got a {value.dtype} tensor; "
                "pass real numbers"
            )
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be {expected}, or a tensor of one or of one per token, got "
            f"{type(value).__name__}; pass a float or a tensor"
        )
    if kind == "positive":
        positive(name, value)
    elif kind == "fraction" and not 0 < value < 1:
        raise ValueError(
            f"{name} must be between 0 and 1, got {value!r}; pass a number such as 0.1"
        )
    elif not abs(value) <= 1e37:
        raise ValueError(f"{name} must be finite, up to 1e37, got {value!r}; pass such a number")


def rows(labels: Tensor | None, weight: Tensor | None, shift: bool, student: Tensor, of: str):
    """What there is one of a token."""
    if labels is not None:
        hint = "pass token ids (a mask belongs in weight, or is ignore_index in the labels)"
        dtypes = torch.int64, torch.int32
        row_tensor("labels", labels, student, of, dtypes, "int64 (or int32)", hint)
    if weight is not None:
        row_tensor("weight", weight, student, of, None, "real numbers", "convert it with .to()")
        no_gradient("weight", weight)
    if shift:
        shift_shape(student, of)


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
        if not torch.compiler.is_compiling():
            _plain_tensor(name, value)
        no_gradient(name, value)
        if value.dim() != 0 or value.is_complex():
            raise ValueError(
                f"{name} must be {expected}, got a {value.dtype} tensor of shape "
                f"{tuple(value.shape)}; {hint}, pass a float or a 0-dim real tensor"
            )
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} must be {expected}, got {type(value).__name__}; pass a float or a 0-dim tensor"
        )


def integer(name: str, value, example: str) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{name} must be an int, got {type(value).__name__}; pass a Python int such as "
            f"{example}"
        )
    if not -(2**63) <= value < 2**63:
        raise ValueError(
            f"{name} must fit into int64, got {value}; pass a number such as {example}"
        )


def mask_value(filter_value: float, support: str) -> None:
    if isinstance(filter_value, bool) or not isinstance(filter_value, Real):
        raise TypeError(
            f"filter_value must be a number, got {type(filter_value).__name__}; pass the number "
            "that the teacher's mask was filled with, such as -1e9"
        )
    if not filter_value < float("inf"):
        raise ValueError(
            f"filter_value must be below +inf, got {filter_value}; pass the number that the "
            "teacher's mask was filled with, such as -1e9"
        )
    if filter_value != float("-inf") and support != "teacher":
        raise ValueError(
            'filter_value says what support="teacher" leaves out, got filter_value='
            f'{filter_value} with support={support!r}; pass support="teacher", or leave '
            "filter_value out"
        )


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


def shift_shape(student: Tensor, of: str) -> None:
    if student.dim() < 3:
        raise ValueError(
            f"shift=True needs {of} of shape [B, T, {'V' if of.endswith('logits') else 'H'}], got "
            f"shape {tuple(student.shape)}: flattened rows "
            "would be scored with the "
            f"next sequence's first label; pass the unflattened tensors ({of}[None] for one "
            "sequence)"
        )


def group(group, vocab_start: int | None) -> None:
    """A torch.distributed.ProcessGroup, and where this rank's columns begin."""
    if group is None:
        if vocab_start is not None:
            raise ValueError(
                f"vocab_start={vocab_start} needs group=, the process group whose ranks share the "
                "vocabulary"
            )
        return
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(
            f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}; pass "
            "torch.distributed.group.WORLD, new_group(...) or a device mesh's get_group(...)"
        )
    if vocab_start is not None:
        integer("vocab_start", vocab_start, "0")
        if vocab_start < 0:
            raise ValueError(f"vocab_start must be 0 or more, got {vocab_start}")


def known_options(name: str, unknown: dict) -> None:
    """That nothing is left over of the options that a loss or its module was given."""
    if unknown:
        names = ", ".join(unknown)
        hint = f"help(drkl_triton.{name}) lists them"
        if name[0].isupper() and unknown.keys() & {"weight", "num_items"}:
            hint = "weight and num_items belong to the call, module(..., weight=..., num_items=...)"
        raise TypeError(f"{name} must be given its options alone, got {names}; {hint}")


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
