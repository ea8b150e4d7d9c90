"""Who takes part: plain PyTorch, this package, and the public kernels that take the same work.

A provider's function gets (student, teacher, labels), logits [N, V] and labels [N], and returns the
mean loss of the rows (softmax: probabilities [N, V] of the student).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

import torch
from divergences import LOSSES, log_probabilities
from torch.nn import functional as F

import drkl_triton
from drkl_triton import _loss, _reduction, tiled
from drkl_triton._layout import rows_of
from drkl_triton.facts import NO_LABEL

OPS = (*LOSSES, "softmax")
# What Liger and TRL call these.
BETAS = {"forward_kl": 0.0, "js_divergence": 0.5, "reverse_kl": 1.0}


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
    overwrites: bool = False  # the student's logits become the gradient: it gets a copy, untimed
    upstream_first: bool = False  # takes the upstream gradient as a fourth argument
    floor: bool = False  # returns gradients, and has nothing to check
    rounds: tuple[str, ...] = ()  # to 16 bits, if the inputs have those: "logits", "gradient"
    held: int = 0  # tensors of the size of all logits in float32, at most; 0: too few to count

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

    def rounds_on(self, device):
        """A GPU's library multiplies 16-bit matrices only with one another; so all who use it
        round the gradient of the logits.
        """
        return self.rounds if device.type == "cpu" else {*self.rounds, "gradient"}


def package(name, what, ops, **options):
    return Provider(name, what, ops, "drkl-triton", "drkl_triton", own=True, **options)


def public(name, what, module, ops, distribution=None, **options):
    return Provider(name, what, ops, distribution or module, module, foreign=True, **options)


# --- plain PyTorch ---


def dense(op):
    if op == "softmax":
        return lambda student, teacher, labels: torch.softmax(student, dim=-1)
    return lambda *rows: LOSSES[op].dense(*rows).mean()


def compiled(function):
    """For one shape: every case makes its own, and none falls back to dynamic shapes."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def kl_div(op):
    def loss(student, teacher, labels):
        log_q, log_p = log_probabilities(student, teacher)
        x, y = (log_q, log_p) if op == "reverse_kl" else (log_p, log_q)
        return F.kl_div(y, x, log_target=True, reduction="batchmean")

    return loss


# --- this package ---


def ours(op, backend):
    if op == "softmax":
        return lambda student, teacher, labels: drkl_triton.softmax(student, backend=backend)
    loss = LOSSES[op]

    def function(student, teacher, labels):
        teacher = teacher if loss.read == 2 else None
        return drkl_triton.divergence(loss.objective, student, teacher, labels, backend=backend)

    return function


class Launches:
    """The kernels that read logits, and what is computed on [N] between them."""

    def __init__(self, op, student, teacher, labels):
        from drkl_triton import kernels

        objective, one = LOSSES[op].objective, torch.ones((), device=student.device)
        code = labels if objective.labels else torch.full_like(labels, NO_LABEL)
        parameters = _reduction.parameters(objective.parameters, labels, False, one.dtype)
        self.between = code, parameters
        self.loss = _loss.of(kernels, objective, one, student.shape[-1])
        self.rows_are(student, teacher)

    def rows_are(self, student, teacher):
        self.rows = rows_of(student), rows_of(teacher), *self.between

    def sums(self):
        return self.loss.sums(*self.rows)

    def losses(self, sums, reduction):
        code, parameters = self.between
        return tiled.row_losses(
            sums[None], code, self.loss.inv_temperature, parameters, None, None,
            program=self.loss.program, needs=self.loss.needs, metrics=False, reduction=reduction,
        )[1]  # fmt: skip

    def weights(self, sums, upstream):
        return self.loss.weights(*self.between, sums, upstream)

    def write(self, weights):
        return self.loss.write(*self.rows, weights)


class _Kernels(torch.autograd.Function):
    """What is between the launches is kept in ``state`` from the first call on, for all that
    follow.
    """

    @staticmethod
    def forward(ctx, student, teacher, labels, op, state):
        if not state:
            state["launches"] = Launches(op, student, teacher, labels)
        state["launches"].rows_are(student, teacher)
        sums = state["launches"].sums()
        if "value" not in state:
            state["value"], state["sums"] = state["launches"].losses(sums, "mean"), sums
        ctx.state, ctx.N = state, len(labels)
        return state["value"].detach()

    @staticmethod
    def backward(ctx, upstream):
        state, N = ctx.state, ctx.N
        if "weights" not in state:
            upstream = (upstream / N).expand(N)
            state["weights"] = state["launches"].weights(state["sums"], upstream)
        return state["launches"].write(state["weights"]), None, None, None, None


def launches(op):
    def make():
        state = {}
        return lambda *case: _Kernels.apply(*case, op, state)

    return make


# --- public kernels, as far as they take logits of both models ---


def liger_jsd(op):
    from liger_kernel.transformers.jsd import LigerJSD

    loss = LigerJSD(beta=BETAS[op])  # takes log-probabilities; their softmax is PyTorch's
    return lambda student, teacher, labels: loss(*log_probabilities(student, teacher))


def liger_softmax():
    from liger_kernel.ops import LigerSoftmaxFunction

    return lambda student, teacher, labels: LigerSoftmaxFunction.apply(student)


def quack_softmax():
    from quack.softmax import softmax

    return lambda student, teacher, labels: softmax(student)


def trl(op):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer
    loss = GKDTrainer.generalized_jsd_loss
    return lambda student, teacher, labels: loss(
        student, teacher, beta=BETAS[op], reduction="batchmean"
    )


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
            student.detach(), teacher, labels, unused, loss, kl_divergence="reverse",
            gradient_materialization_factor=scale, assume_valid=True, **options,
        )  # fmt: skip
        return loss.mean(), student.detach()

    return lambda *case: _GradientInForward.apply(*case, launch)


def fast_llm_reverse_kl():
    from fast_llm.functional.config import EntropyLossType, TargetFormat
    from fast_llm.functional.triton.entropy_loss import triton_entropy_loss_forward_backward

    def launch(student, teacher, labels, upstream):
        return triton_entropy_loss_forward_backward(
            student.detach(), teacher, loss_mask=None, grad_output=upstream,
            logits_scale_factor=1.0, target_format=TargetFormat.logits,
            entropy_loss_type=EntropyLossType.reverse_kl,
        )  # fmt: skip

    return lambda *case: _GradientInForward.apply(*case, launch)


# --- the list ---


def each(make, *ops, **options):
    return {op: lambda op=op: make(op, **options) for op in ops}


ALL = (
    Provider("dense", "plain PyTorch in float32", each(dense, *OPS)),
    Provider("kl_div", "F.kl_div of log-softmaxes", each(kl_div, "reverse_kl", "forward_kl")),
    Provider("compile", "torch.compile of dense", each(lambda op: compiled(dense(op)), *OPS)),
    package("tiled", "this package, PyTorch in tiles", each(ours, *OPS, backend="tiled")),
    package(
        "triton", "this package, Triton kernels", each(ours, *OPS, backend="triton"),
        gpu_only=True,
    ),
    package(
        "kernels", "the launches alone", {op: launches(op) for op in LOSSES}, gpu_only=True
    ),
    public(
        "liger", "Liger Kernel: JSD; softmax", "liger_kernel",
        each(liger_jsd, *BETAS) | {"softmax": liger_softmax}, "liger-kernel", gpu_only=True,
    ),
    public(
        "orda", "orda-kernel: its row kernel", "orda_kernel", {"reverse_kl": orda_reverse_kl},
        "orda-kernel", gpu_only=True, overwrites=True, upstream_first=True,
    ),
    public(
        "speculators", "vLLM speculators: fused reverse KL", "speculators",
        {"reverse_kl": speculators_reverse_kl}, gpu_only=True,
    ),
    public(
        "fast_llm", "Fast-LLM: its Triton loss", "fast_llm", {"reverse_kl": fast_llm_reverse_kl},
        "fast-llm", gpu_only=True, upstream_first=True,
    ),
    public("trl", "TRL: GKD's generalized JSD", "trl", each(trl, *BETAS)),
    public("quack", "QuACK: softmax", "quack", {"softmax": quack_softmax}, "quack-kernels",
           gpu_only=True),
)  # fmt: skip
