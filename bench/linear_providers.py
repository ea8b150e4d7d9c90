"""Who takes part where the losses are made from hidden states.

A provider's function gets (student_hidden [N, H], student_weight [V, H], teacher_hidden [N, H'],
teacher_weight [V, H'], labels [N]) and returns the mean loss of the rows whose label is not
IGNORED. That of `products` returns tensors of the two gradients' sizes instead.
"""

import torch
from divergences import LOSSES
from providers import BETAS, Provider, compiled, each, package, public
from torch.nn import functional as F

import drkl_triton
from drkl_triton.slices import default_chunk_bytes

OPS = tuple(op for op, loss in LOSSES.items() if loss.read == 2)
IGNORED = -100

# --- the floor ---

PART = 2048  # columns of logits that a CPU multiplies best


def products(student_hidden, student_weight, teacher_hidden, teacher_weight, labels):
    """The four matrix products of a loss, in slices of rows, and no loss: what is left cannot be
    saved. Two slices are reused, and the sums are float32. The gradient's place is taken by the
    student's logits. Of 16-bit matrices a GPU's library makes float32 logits; a CPU's does not,
    so that they are converted, the matrices some columns at a time.
    """
    device, dtype = student_hidden.device, student_hidden.dtype
    (V, H), kept = student_weight.shape, (labels != IGNORED).nonzero()[:, 0]
    N, every = len(kept), len(kept) == len(labels)
    columns = -(-V // 64) * 64
    fit = max(1, default_chunk_bytes(device) // (8 * columns))
    height = -(-N // -(-N // fit)) if N else 1
    S, T = torch.empty((2, height, columns), device=device)[:, :, :V]
    narrow = device.type == "cuda" and dtype != torch.float32
    G = torch.empty((height, columns), dtype=dtype, device=device)[:, :V] if narrow else S
    hidden = (torch.empty if every else torch.zeros)((len(labels), H), dtype=dtype, device=device)
    weight = torch.empty((V, H), device=device)
    for i in range(0, N, height):
        rows = slice(i, i + height) if every else kept[i : i + height]
        s, t, g = (x[: min(height, N - i)] for x in (S, T, G))
        h = student_hidden[rows]
        if narrow:
            torch.mm(h, student_weight.t(), out_dtype=torch.float32, out=s)
            torch.mm(teacher_hidden[rows], teacher_weight.t(), out_dtype=torch.float32, out=t)
            if i == 0:
                g.copy_(s)  # some numbers; zeros would be multiplied at a higher clock
            hidden[rows] = torch.mm(g, student_weight)
            if i == 0:
                torch.mm(g.t(), h, out_dtype=torch.float32, out=weight)
            else:
                torch.addmm(weight, g.t(), h, out_dtype=torch.float32, out=weight)
        else:
            h, part = h.float(), PART if device.type == "cpu" else V
            _logits(h, student_weight, part, s)
            _logits(teacher_hidden[rows].float(), teacher_weight, part, t)
            part = V if dtype == torch.float32 else part
            hidden[rows] = _gradients(s, h, student_weight, weight, part, i > 0).to(dtype)
    return hidden, weight.to(dtype)


def _logits(h, matrix, part, out):
    for c in range(0, len(matrix), part):
        torch.mm(h, matrix[c : c + part].float().t(), out=out[:, c : c + part])


def _gradients(g, h, matrix, weight, part, add):
    """g @ matrix; and g.T @ h is written to ``weight``, or added."""
    hidden = torch.zeros_like(h)
    for c in range(0, len(matrix), part):
        columns = slice(c, c + part)
        torch.addmm(hidden, g[:, columns], matrix[columns].float(), out=hidden)
        beta = 1 if add else 0
        out = weight[columns]
        torch.addmm(out, g[:, columns].t(), h, beta=beta, out=out)
    return hidden


# --- plain PyTorch ---


def dense(op):
    def loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels):
        student = F.linear(student_hidden, student_weight)
        teacher = F.linear(teacher_hidden, teacher_weight)
        return _mean(LOSSES[op].dense(student, teacher, labels.clamp_min(0)), labels)

    return loss


def _mean(loss, labels):
    kept = labels != IGNORED
    return loss.masked_fill(~kept, 0.0).sum() / kept.sum()


# --- this package ---


def ours(op, **options):
    def loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels):
        return drkl_triton.linear_divergence(
            LOSSES[op].objective, student_hidden, student_weight, labels,
            teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, **options,
        )  # fmt: skip

    return loss


# --- public losses that take the same work ---


def liger(op):
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def loss(student_hidden, *others):
        options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": BETAS[op]}
        function = LigerFusedLinearJSDLoss(
            **options, ignore_index=IGNORED, temperature=1.0, compiled=student_hidden.is_cuda
        )
        return function(student_hidden, *others)

    return loss


def trl(op):
    """What DistillationTrainer does around the function: on a GPU only rows that count go in."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels):
        kept = labels != IGNORED
        if labels.is_cuda:
            student_hidden, teacher_hidden = student_hidden[kept], teacher_hidden[kept]
            labels = labels[kept]
        student, teacher = (student_hidden, student_weight), (teacher_hidden, teacher_weight)
        divergence, _entropy = ChunkedDivergenceFunction.apply(
            *student, None, *teacher, None, BETAS[op]
        )
        return _mean(divergence, labels)

    return loss


# --- the list ---

ROUNDED = ("logits", "gradient")
ALL = (
    Provider("products", "the four products", each(lambda op: products, *OPS), floor=True),
    Provider("dense", "F.linear, then float32", each(dense, *OPS), rounds=ROUNDED, held=7),
    Provider(
        "compile", "torch.compile of dense", each(lambda op: compiled(dense(op)), *OPS),
        rounds=ROUNDED, held=4,
    ),
    package("tiled", "this package, PyTorch in tiles", each(ours, *OPS, backend="tiled")),
    package("triton", "this package, Triton kernels", each(ours, *OPS, backend="triton"),
            gpu_only=True),
    package("recompute", "this package, logits twice", each(ours, *OPS, recompute=True)),
    public("liger", "Liger Kernel: fused linear JSD", "liger_kernel", each(liger, *BETAS),
           "liger-kernel", rounds=ROUNDED),
    public("trl", "TRL: chunked divergence", "trl", each(trl, *BETAS), rounds=("gradient",)),
)  # fmt: skip
