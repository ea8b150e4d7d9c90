"""Who takes part: plain PyTorch, this package, and the public kernels that take the same work.

A provider's function gets (student, teacher, labels), logits [N, V] and labels [N], and returns the
mean loss of the rows (softmax: probabilities [N, V] of the student). The baselines are written as a
careful user would: float32 inside, no copy that the formula does not need.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

import torch
from torch.nn import functional as F

import drkl_triton
from drkl_triton import _loss, _reduction, objectives, tiled
from drkl_triton._layout import rows_of
from drkl_triton.facts import NO_LABEL

GAMMA = 0.5
OBJECTIVES = {"reverse_kl": objectives.reverse_kl(), "drkl": objectives.drkl(GAMMA)}
OPS = ("reverse_kl", "drkl", "softmax")


# --- plain PyTorch ---


def _log_probabilities(student, teacher):
    return (F.log_softmax(x, dim=-1, dtype=torch.float32) for x in (student, teacher))


def reverse_kl_rows(student, teacher, labels):
    log_q, log_p = _log_probabilities(student, teacher)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def drkl_rows(student, teacher, labels):
    """RKL - KL(b_q || b_p) = (1 - q_y) N, so N costs only arithmetic on [N] beside RKL: of the
    dense formulas the fastest, twice as fast as masking the label's column out.
    """
    log_q, log_p = _log_probabilities(student, teacher)
    reverse_kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    log_qy, log_py = (x.gather(-1, labels[:, None])[:, 0] for x in (log_q, log_p))
    log_q_rest, log_p_rest = torch.log1p(-log_qy.exp()), torch.log1p(-log_py.exp())
    target = log_qy.exp() * (log_qy - log_py) + log_q_rest.exp() * (log_q_rest - log_p_rest)
    nontarget = (reverse_kl - target) / log_q_rest.exp()
    return target + GAMMA * nontarget


def dense_reverse_kl(student, teacher, labels):
    return reverse_kl_rows(student, teacher, labels).mean()


def dense_drkl(student, teacher, labels):
    return drkl_rows(student, teacher, labels).mean()


def dense_softmax(student, teacher, labels):
    return torch.softmax(student, dim=-1)


def kl_div_reverse_kl(student, teacher, labels):
    log_q, log_p = _log_probabilities(student, teacher)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")


def compiled(function):
    """For one shape: every case makes its own, and none falls back to dynamic shapes."""
    return lambda: torch.compile(function, fullgraph=True, dynamic=False)


# --- this package ---


def ours(op, backend):
    def reverse_kl(student, teacher, labels):
        return drkl_triton.reverse_kl(student, teacher, labels, backend=backend)

    def drkl(student, teacher, labels):
        return drkl_triton.drkl(student, teacher, labels, gamma=GAMMA, backend=backend)

    def softmax(student, teacher, labels):
        return drkl_triton.softmax(student, backend=backend)

    functions = {"reverse_kl": reverse_kl, "drkl": drkl, "softmax": softmax}
    return lambda: functions[op]


class _Kernels(torch.autograd.Function):
    """The two launches alone. What is computed from their sums on [N] is kept in ``state`` from the
    first call on, for all that follow.
    """

    @staticmethod
    def forward(ctx, student, teacher, labels, op, state):
        from drkl_triton import kernels

        s, t, V = rows_of(student), rows_of(teacher), student.shape[-1]
        if not state:
            objective = OBJECTIVES[op]
            one = torch.ones((), device=student.device)
            state["code"] = labels if objective.labels else torch.full_like(labels, NO_LABEL)
            state["parameters"] = _reduction.parameters(
                objective.parameters, labels, False, one.dtype
            )
            state["loss"] = _loss.of(kernels, objective, one, V)
        loss, rows = state["loss"], (s, t, state["code"], state["parameters"])
        sums = loss.sums(*rows)
        if "value" not in state:
            state["value"] = tiled.row_losses(
                sums[None], rows[2], loss.inv_temperature, rows[3], None, None,
                program=loss.program, needs=loss.needs, metrics=False, reduction="mean",
            )[1]  # fmt: skip
            state["sums"] = sums
        ctx.rows, ctx.state = rows, state
        return state["value"].detach()

    @staticmethod
    def backward(ctx, upstream):
        loss, rows, state = ctx.state["loss"], ctx.rows, ctx.state
        if "weights" not in state:
            state["weights"] = loss.weights(
                rows[2], rows[3], state["sums"], (upstream / len(rows[2])).expand(len(rows[2]))
            )
        return loss.write(*rows, state["weights"]), None, None, None, None


def launches(op):
    def make():
        state = {}
        return lambda *case: _Kernels.apply(*case, op, state)

    return make


# --- public kernels, as far as they take logits of both models ---


def liger_reverse_kl():
    from liger_kernel.transformers.jsd import LigerJSD

    loss = LigerJSD(beta=1.0)  # takes log-probabilities; their softmax is PyTorch's
    return lambda student, teacher, labels: loss(*_log_probabilities(student, teacher))


def liger_softmax():
    from liger_kernel.ops import LigerSoftmaxFunction

    return lambda student, teacher, labels: LigerSoftmaxFunction.apply(student)


def quack_softmax():
    from quack.softmax import softmax

    return lambda student, teacher, labels: softmax(student)


def trl_reverse_kl():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer
    loss = GKDTrainer.generalized_jsd_loss
    return lambda student, teacher, labels: loss(student, teacher, beta=1.0, reduction="batchmean")


def speculators_reverse_kl():
    from speculators.losses.fused import fused_reverse_kl_div_loss as loss

    return lambda student, teacher, labels: loss(student[None], teacher[None]).mean()


class _GradientInForward(torch.autograd.Function):
    """For kernels that write the gradient in the same launch as the loss and are told the upstream
    gradient then. ``launch(student, teacher, labels, upstream)`` returns (loss, gradient).
    """

    @staticmethod
    def forward(ctx, student, teacher, labels, upstream, launch):
        loss, grad = launch(student, teacher, labels, upstream)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        return ctx.saved_tensors[0], None, None, None, None


def orda_reverse_kl():
    """Its public functions take hidden states; this is the kernel inside, which turns the student's
    logits into their gradient.
    """
    from orda_kernel.ops._kernels.precomputed.tokenwise import _precomputed_student_fwdbwd as kernel

    def launch(student, teacher, labels, upstream):
        unused, loss = torch.empty((2, len(labels)), device=student.device)
        options = {"student_scale": 0.0, "kl_weight": 1.0, "kl_temperature": 1.0}
        scale = torch.full((), upstream / len(labels), device=student.device)
        kernel(
            student.detach(),
            teacher,
            labels,
            unused,
            loss,
            kl_divergence="reverse",
            gradient_materialization_factor=scale,
            assume_valid=True,
            **options,
        )
        return loss.mean(), student.detach()

    return lambda *case: _GradientInForward.apply(*case, launch)


def fast_llm_reverse_kl():
    from fast_llm.functional.config import EntropyLossType, TargetFormat
    from fast_llm.functional.triton.entropy_loss import triton_entropy_loss_forward_backward

    def launch(student, teacher, labels, upstream):
        return triton_entropy_loss_forward_backward(
            student.detach(),
            teacher,
            loss_mask=None,
            grad_output=upstream,
            logits_scale_factor=1.0,
            target_format=TargetFormat.logits,
            entropy_loss_type=EntropyLossType.reverse_kl,
        )

    return lambda *case: _GradientInForward.apply(*case, launch)


# --- the list ---


@dataclass(frozen=True)
class Provider:
    name: str
    what: str
    ops: dict[str, Callable[[], Callable]]  # op -> what makes the function
    distribution: str = "torch"
    module: str = "torch"
    gpu_only: bool = False
    own: bool = False
    foreign: bool = False
    overwrites: bool = (
        False  # the student's logits become the gradient: it is handed a copy, untimed
    )
    upstream_first: bool = False  # takes the upstream gradient as a fourth argument

    def obstacle(self, op, device):
        """Why it cannot take part, or None."""
        if op not in self.ops:
            return f"does not compute {op}"
        if find_spec(self.module) is None:
            return "not installed"
        if self.gpu_only and device.type == "cpu":
            return "needs a GPU"
        return None

    @property
    def version(self):
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return ""


def _package(name, what, **options):
    makers = {op: ours(op, name) for op in OPS}
    names = {"distribution": "drkl-triton", "module": "drkl_triton"}
    return Provider(name, what, makers, own=True, **names, **options)


def _dense(wrap):
    return {
        "reverse_kl": wrap(dense_reverse_kl),
        "drkl": wrap(dense_drkl),
        "softmax": wrap(dense_softmax),
    }


def _kernel(name, what, distribution, module, ops, **options):
    return Provider(name, what, ops, distribution, module, foreign=True, **options)


ALL = (
    Provider("dense", "plain PyTorch in float32", _dense(lambda function: lambda: function)),
    Provider("kl_div", "F.kl_div of log-softmaxes", {"reverse_kl": lambda: kl_div_reverse_kl}),
    Provider("compile", "torch.compile of dense", _dense(compiled)),
    _package("tiled", "this package, PyTorch in tiles"),
    _package("triton", "this package, Triton kernels", gpu_only=True),
    Provider(
        "kernels",
        "the two launches alone",
        {op: launches(op) for op in ("reverse_kl", "drkl")},
        "drkl-triton",
        "drkl_triton",
        gpu_only=True,
        own=True,
    ),
    _kernel(
        "liger",
        "Liger Kernel: JSD with beta 1; softmax",
        "liger-kernel",
        "liger_kernel",
        {"reverse_kl": liger_reverse_kl, "softmax": liger_softmax},
        gpu_only=True,
    ),
    _kernel(
        "orda",
        "orda-kernel: its row kernel",
        "orda-kernel",
        "orda_kernel",
        {"reverse_kl": orda_reverse_kl},
        gpu_only=True,
        overwrites=True,
        upstream_first=True,
    ),
    _kernel(
        "speculators",
        "vLLM speculators: fused reverse KL",
        "speculators",
        "speculators",
        {"reverse_kl": speculators_reverse_kl},
        gpu_only=True,
    ),
    _kernel(
        "fast_llm",
        "Fast-LLM: its Triton loss",
        "fast-llm",
        "fast_llm",
        {"reverse_kl": fast_llm_reverse_kl},
        gpu_only=True,
        upstream_first=True,
    ),
    _kernel(
        "trl",
        "TRL: GKD's generalized JSD with beta 1",
        "trl",
        "trl",
        {"reverse_kl": trl_reverse_kl},
    ),
    _kernel(
        "quack",
        "QuACK: softmax",
        "quack-kernels",
        "quack",
        {"softmax": quack_softmax},
        gpu_only=True,
    ),
)
BY_NAME = {provider.name: provider for provider in ALL}
