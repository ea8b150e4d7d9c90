"""For TRL (https://github.com/huggingface/trl): its ``generalized_jsd_loss`` fused, and its two
distillation trainers with DRKL, or another objective, as their loss. Needs trl; tested with the
release that constraints.txt names.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from .. import _checks, functional, linear, objectives
from ..algebra import RowMetrics
from ..objectives import Formula, Objective

try:
    from trl.experimental.gkd import GKDConfig, GKDTrainer
    from trl.models.utils import unwrap_model_for_generation
    from trl.trainer import distillation_trainer as trl_distillation
    from trl.trainer.distillation_config import DistillationConfig
except ImportError as error:
    raise ImportError(
        "drkl_triton.adapters.trl needs a TRL that has trl.experimental.gkd and a stable "
        f"DistillationTrainer, and its dependencies ({error}). Install them with: "
        "pip install 'trl>=1.16'"
    ) from error

__all__ = [
    "DRKLConfig",
    "DRKLDistillationConfig",
    "DRKLDistillationTrainer",
    "DRKLTrainer",
    "generalized_jsd_loss",
]

# Taken at import, so that it stays TRL's when a caller puts ours in its place.
_trl_jsd = GKDTrainer.generalized_jsd_loss
# Options of js_divergence that a caller may pass beside TRL's own arguments.
_FUSED_OPTIONS = frozenset({"backend", "filter_value", "support", "vocab_mismatch"})
# The fields of RowMetrics that the trainers log.
_LOGGED = (
    "student_entropy",
    "target_kl",
    "nontarget_kl",
    "student_target_prob",
    "teacher_target_prob",
)
# What collators and trainers put into a batch that is no input of a model.
_PROMPTS = frozenset({"prompts", "prompt_attention_mask"})
_NOT_INPUTS = _PROMPTS | {
    "labels", "byte_offsets", "completion_mask", "original_prompt_text", "original_completion_text",
    "skip_logits",
}  # fmt: skip
_PACKED = (
    "pass sequences that are packed already, lmbda=0 and "
    "data_collator=DataCollatorForLanguageModeling(pad_token_id, padding_free=True)"
)
_LABELS = "the loss is of the tokens whose label is not -100; pass a data_collator that sets them"
# Options of TRL's that this loss does not follow, what they must stay, and what to do.
_IGNORED_OPTIONS = {
    "loss_type": (("nll",), "the loss is that of objective, gamma and loss_temperature"),
    "label_smoothing_factor": (
        (0, 0.0),
        "there is none here; raise loss_temperature for softer rows",
    ),
    "use_liger_kernel": ((False,), "it would keep the logits from this loss; leave it out"),
    "packing": ((False,), _PACKED),
    "eval_packing": ((False, None), _PACKED),
    "padding_free": ((False,), _PACKED),
    "completion_only_loss": ((None, True), _LABELS),
    "assistant_only_loss": ((False,), _LABELS),
    "pad_to_multiple_of": (("auto", None), "pass a data_collator that pads"),
}
# What models do to their logits after the output layer, by the names in their configs. Other names
# are found in the first step.
_LOGIT_CHANGES = (
    "final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling",
    "lm_head_multiplier", "output_multiplier",
)  # fmt: skip
_NO_LINEAR = "leave linear out, which takes the model's own logits"


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: float | Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """TRL's generalized Jensen-Shannon divergence (arXiv 2306.13649, Eq. 1), computed by
    :func:`drkl_triton.js_divergence` where it is summed: with ``"batchmean"``, ``"sum"`` or
    ``num_items_in_batch``. All else is handed to TRL's own function.

    Args:
        student_logits, teacher_logits: ``[B, T, V]``, already shifted. Fused, they must have the
            same shape, and the teacher must not require grad.
        labels: ``[B, T]``, int64; positions at -100 do not count. None: all count. Fused, int64 or
            int32, of the logits' leading shape.
        beta: 0 is KL(teacher || student), 1 is KL(student || teacher), between them the mixture.
        temperature: divides both logits.
        reduction: ``"batchmean"`` (sum over the positions that count / their number; without labels
            / B), ``"sum"``, or TRL's ``"mean"`` and ``"none"``, which are elementwise over the
            vocabulary.
        num_items_in_batch: number, or tensor of one element on any device; where given, the result
            is sum / num_items_in_batch, whatever ``reduction`` says. A tensor of several elements
            goes to TRL's function.
        kwargs: ``backend``, ``filter_value``, ``support``, ``vocab_mismatch`` of
            :func:`drkl_triton.js_divergence`, for calls that are fused. With any other the call
            goes to TRL's function.

    Returns:
        0-dim loss in nats. Fused, it is float32 (float64 where either side is float64) also for
        16-bit logits, in whose dtype TRL computes outside of autocast. The fused form differs in
        two more cases: a student at -inf adds 0, where 0 x -inf makes TRL's NaN; and
        num_items_in_batch of 0 gives 0, where TRL divides by 0.

    Raises:
        TypeError, ValueError: fused, as :func:`drkl_triton.js_divergence`; else TRL's. TypeError
            for an option of ours in a call that is not fused.
    """
    several = isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() != 1
    summed = num_items_in_batch is not None or reduction in ("batchmean", "sum")
    fused = summed and not several
    ours = sorted(kwargs.keys() & _FUSED_OPTIONS)
    if ours and not fused:
        raise TypeError(
            f"{', '.join(ours)} must go with a call that is fused, got reduction={reduction!r}; "
            "pass a reduction of batchmean or sum, or one num_items_in_batch, or leave them out"
        )
    if not (fused and kwargs.keys() <= _FUSED_OPTIONS):
        return _trl_jsd(
            student_logits,
            teacher_logits,
            labels=labels,
            beta=beta,
            temperature=temperature,
            reduction=reduction,
            num_items_in_batch=num_items_in_batch,
            **kwargs,
        )
    if num_items_in_batch is not None:
        kwargs |= {"reduction": "mean", "num_items": _first(num_items_in_batch)}
    elif reduction == "sum":
        kwargs["reduction"] = "sum"
    elif labels is None:
        kwargs |= {"reduction": "mean", "num_items": max(student_logits.size(0), 1)}
    return functional.js_divergence(
        student_logits, teacher_logits, labels, beta=beta, temperature=temperature, **kwargs
    )


def _first(count: float | Tensor) -> float | Tensor:
    """0-dim. With several GPUs in one process the Trainer passes the same number for each."""
    return count.reshape(-1)[0] if isinstance(count, Tensor) and count.dim() else count


# What can be named in a string: the functions of objectives that make an Objective.
_BUILDERS = {
    name: builder
    for name in objectives.__all__
    if isinstance(builder := getattr(objectives, name), Formula)
    or getattr(builder, "__annotations__", {}).get("return") == "Objective"
}
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _value(node: ast.AST) -> float | Objective:
    """Of a parsed sum of objectives: numbers, the builders and four operators, nothing else."""
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
        case ast.Name(id=name) if name in _BUILDERS:
            return _BUILDERS[name]()
        case ast.Call(func=ast.Name(id=name), args=args, keywords=named) if name in _BUILDERS:
            named = {keyword.arg or "**": _value(keyword.value) for keyword in named}
            return _BUILDERS[name](*map(_value, args), **named)
    raise ValueError(f"{ast.unparse(node)!r} is none of numbers, losses and + - * /")


def _parsed(text: str) -> Objective:
    try:
        objective = _value(ast.parse(text.strip(), mode="eval").body)
        _checks.objective(objective)
    except (ArithmeticError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"objective must be a sum such as '0.9 * drkl(gamma=0.5) + 0.1 * cross_entropy()', got "
            f"{text!r}: {error}. The losses are {', '.join(sorted(_BUILDERS))}; one of your own is "
            "passed as an Objective"
        ) from error
    return objective


@dataclass
class _LossOptions:
    """What both configs add to TRL's."""

    gamma: float = field(default=0.5, metadata={"help": "Weight of DRKL's non-target part."})
    objective: Objective | str | None = field(
        default=None,
        metadata={
            "help": "The loss, if it is not DRKL with gamma: a sum of drkl_triton.objectives, such "
            "as '0.9 * drkl(gamma=0.5) + 0.1 * cross_entropy()'."
        },
    )
    beta: float = field(default=1.0, metadata={"help": "Not used by DRKL; must stay 1."})

    def __post_init__(self):
        super().__post_init__()
        _checks.positive("gamma", self.gamma)
        self.loss_objective()
        if self.beta != 1:
            raise ValueError(
                f"beta is not used by DRKL and must stay 1, got {self.beta!r}. Leave it out; the "
                f"generalized Jensen-Shannon divergence is objective='js_divergence({self.beta})'."
            )

    def loss_objective(self) -> Objective:
        """The Objective that ``objective`` and ``gamma`` say."""
        if self.objective is None:
            return objectives.drkl(self.gamma)
        if self.gamma != 0.5:
            raise ValueError(
                f"gamma is that of the default objective, got gamma={self.gamma!r} beside "
                f"objective={str(self.objective)!r}; write it there, as drkl(gamma={self.gamma!r})"
            )
        if isinstance(self.objective, str):
            return _parsed(self.objective)
        _checks.objective(self.objective)
        return self.objective

    def to_dict(self) -> dict[str, Any]:
        options = super().to_dict()  # is written as JSON
        if self.objective is not None:
            options["objective"] = str(self.objective)
        return options


@dataclass
class DRKLConfig(_LossOptions, GKDConfig):
    """TRL's ``GKDConfig`` with the loss of this package.

    Args:
        gamma: positive; the weight of the non-target part of DRKL.
        objective: the loss, if it is not DRKL: an Objective of :mod:`drkl_triton.objectives`, or a
            sum of them as a string, which may come from a command line:
            ``"0.9 * drkl(gamma=0.5) + 0.1 * cross_entropy()"``.
        loss_temperature: positive; divides both models' logits in the loss. TRL's ``temperature``
            is that of sampling, and its GKD trainer, too, computes the loss at 1.
        linear: compute the loss from hidden states, a slice of the logits at a time.

    ``beta``, which interpolates TRL's divergence, has no meaning here and must stay 1. ``lmbda``,
    ``seq_kd`` and the rest are TRL's.
    """

    loss_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both distributions in the loss."}
    )
    linear: bool = field(
        default=False, metadata={"help": "Compute the loss from hidden states, without logits."}
    )

    def __post_init__(self):
        super().__post_init__()
        _checks.positive("loss_temperature", self.loss_temperature)
        _checks.flag("linear", self.linear)


@dataclass
class DRKLDistillationConfig(_LossOptions, DistillationConfig):
    """TRL's ``DistillationConfig`` with the loss of this package: ``gamma`` and ``objective`` are
    those of :class:`DRKLConfig`, ``beta`` must stay 1. ``temperature`` is that of sampling and of
    the loss, as in TRL.
    """


class _LogsMetrics:
    """The part that both trainers share: which config they take, and what they log."""

    _config_class: type

    def __init__(self, *args: Any, **kwargs: Any):
        self._config(args, kwargs)
        super().__init__(*args, **kwargs)
        self._sums: dict[str, Tensor] = {}  # of the metrics over tokens, and the tokens' number

    def _config(self, args: tuple, kwargs: dict):
        config = kwargs.get("args", args[2] if len(args) > 2 else None)
        if not isinstance(config, self._config_class):
            raise TypeError(
                f"{type(self).__name__} needs args to be a {self._config_class.__name__}, got "
                f"{type(config).__name__}. It takes everything that "
                f"{self._config_class.__bases__[-1].__name__} takes, gamma and objective."
            )
        return config

    def _add(self, metrics: RowMetrics) -> None:
        sums = torch.stack([getattr(metrics, name).sum() for name in (*_LOGGED, "counted")])
        mode = "train" if self.model.training else "eval"
        self._sums[mode] = self._sums.get(mode, 0) + sums.float()

    def train(self, *args: Any, **kwargs: Any):
        self._sums.clear()
        return super().train(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any):
        self._sums.pop("eval", None)  # of predict, or of an evaluation that did not end
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # the entry of a training step, or of the evaluation of one of several data sets
        losses = [key for key in logs if key == "loss" or re.fullmatch("eval.*_loss", key)]
        for key in losses[:1]:
            mode = "train" if key == "loss" else "eval"
            if mode in self._sums:
                *sums, count = self.accelerator.reduce(self._sums.pop(mode)).tolist()
                for name, total in zip(_LOGGED, sums, strict=True):
                    logs[key.removesuffix("loss") + name] = total / max(count, 1)
        super().log(logs, *args, **kwargs)


class DRKLTrainer(_LogsMetrics, GKDTrainer):
    """TRL's ``GKDTrainer``, minimising :func:`drkl_triton.drkl` with ``args.gamma``, or
    ``args.objective``: the same arguments, data, collator and on-policy generation, a
    :class:`DRKLConfig` for ``args``.

    Logs besides TRL's, as means over the tokens that count, on all processes:
    ``student_entropy``, ``target_kl``, ``nontarget_kl``, ``student_target_prob`` and
    ``teacher_target_prob`` of :class:`drkl_triton.RowMetrics` (nats and probabilities), before them
    in evaluation what stands before ``loss``: ``eval_``, or ``eval_NAME_`` of several data sets.

    The loss of a micro-batch is its sum over the tokens that the whole step counts, on all
    processes, so neither gradient accumulation nor the number of processes changes the gradient.
    Answers that are generated (``lmbda``, ``seq_kd``) are generated before they are counted. Every
    input of a batch reaches both models, which run without a cache: position_ids of packed
    sequences, pixel values. A mixture of experts keeps TRL's auxiliary loss. Under ``bf16=True``
    accelerate hands in float32 logits; docs/migrate.md says how to have them in 16 bits.

    With ``args.linear`` the student's output layer computes the loss in place of its logits, inside
    of the model's own forward, so whatever wraps the model finds the layer's gradient. Both output
    layers must be plain ``torch.nn.Linear``, with or without a bias, tied or not, and their results
    the models' logits as they are. Evaluation gives losses and no predictions; with
    ``return_outputs`` the outputs have no logits.

    Raises:
        TypeError: ``args`` is no :class:`DRKLConfig`; with ``linear``, an output layer that is no
            plain ``torch.nn.Linear`` (an adapter, a quantised layer).
        ValueError: an option of TRL's that would be ignored; generated answers to inputs that
            generation does not see; ``shift_labels``; prompt tuning; with ``linear``, a model that
            scales or caps its logits, functions of predictions, ``torch_compile``.
    """

    _tag_names = ["trl", "gkd", "drkl"]
    _config_class = DRKLConfig

    def __init__(self, *args: Any, **kwargs: Any):
        config = self._config(args, kwargs)
        for name, (allowed, advice) in _IGNORED_OPTIONS.items():
            if (value := getattr(config, name, allowed[0])) not in allowed:
                raise ValueError(
                    f"{name} must be {allowed[0]!r} for DRKLTrainer, got {value!r}: {advice}"
                )
        if kwargs.get("formatting_func") is not None:
            raise ValueError(
                "formatting_func must be left out: DRKLTrainer does not prepare data; apply "
                "it with datasets.Dataset.map"
            )
        super().__init__(*args, **kwargs)
        # The Trainer is to count num_items_in_batch, whatever the model accepts, and as this loss
        # shifts the labels.
        self.model_accepts_loss_kwargs = self._loss_shifts_labels = True
        if config.linear:
            self._check_linear()
        self._heads_seen = False  # that neither model changes what its output layer makes

    def _check_linear(self) -> None:
        for name in ("compute_metrics", "preprocess_logits_for_metrics"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} must be None with linear=True, got {getattr(self, name)!r}: no logits "
                    f"are made; leave it out, or {_NO_LINEAR}"
                )
        if self.args.torch_compile or hasattr(self.model, "_orig_mod"):
            raise ValueError(
                "torch_compile must be False with linear=True, got a model to compile: its output "
                f"layer is replaced for the time of the loss; leave it out, or {_NO_LINEAR}"
            )
        for name, model in (("student", self.model), ("teacher", self.teacher_model)):
            model = self.accelerator.unwrap_model(model)
            head = model.get_output_embeddings()
            if type(head) is not torch.nn.Linear:
                raise TypeError(
                    f"the {name}'s output layer must be a plain torch.nn.Linear with linear=True, "
                    f"got {type(head).__name__}; an adapter or a quantised layer is more than the "
                    f"matrix: {_NO_LINEAR}"
                )
            config = model.config.get_text_config()
            for change in _LOGIT_CHANGES:
                if (value := getattr(config, change, None)) not in (None, 1):
                    raise ValueError(
                        f"the {name} must take its output layer's result as logits with "
                        f"linear=True, got {change}={value!r} in the config of "
                        f"{type(model).__name__}; {_NO_LINEAR}, or take DRKLDistillationTrainer, "
                        "which applies those that TRL knows"
                    )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """A step's micro-batches, generated where they are to be, and then counted."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._generated(batch) for batch in batches]
        return batches, self._get_num_items_in_batch(batches, device)

    def _generated(self, batch):
        if not (self.lmbda or self.seq_kd):
            return batch
        others = sorted(batch.keys() - _NOT_INPUTS - {"input_ids", "attention_mask"})
        if others or not _PROMPTS <= batch.keys():
            found = f"with {', '.join(others)}" if others else "without prompts"
            raise ValueError(
                f"answers are generated (lmbda={self.lmbda}, seq_kd={self.seq_kd}) to prompts and "
                f"prompt_attention_mask alone, got a batch {found}; set lmbda=0 and seq_kd=False"
            )
        if random.random() <= self.lmbda:
            writer, options = self.model_wrapped, self.args.gradient_checkpointing_kwargs
        elif self.seq_kd:
            writer, options = self.teacher_model, None
        else:
            return batch
        batch = self._prepare_inputs(batch)
        with unwrap_model_for_generation(
            writer,
            self.accelerator,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=options,
        ) as model:
            ids, mask, labels = self.generate_on_policy_outputs(
                model, batch, self.generation_config
            )
        return {**batch, "input_ids": ids, "attention_mask": mask, "labels": labels}

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return super(GKDTrainer, self).training_step(*args, **kwargs)  # generated already

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "shift_labels" in inputs:
            raise ValueError(
                "shift_labels is not supported, got a batch with it (context parallelism, or a "
                "collator that shifts); pass labels as long as input_ids"
            )
        labels = inputs["labels"]
        inputs = {key: value for key, value in inputs.items() if key not in _NOT_INPUTS}
        # with a cache transformers drops the mask of packed sequences
        inputs |= {"use_cache": False}
        counted = num_items_in_batch is not None
        options = {
            "temperature": self.args.loss_temperature,
            "num_items": _first(num_items_in_batch) if counted else None,
            "shift": True,
            "return_metrics": True,
        }
        self.teacher_model.eval()
        losses = self._linear_loss if self.args.linear else self._loss
        loss, metrics, outputs = losses(model, inputs, labels, options)
        if counted and self.args.average_tokens_across_devices:
            # several GPUs in one process share the loss of the whole batch
            if self.args.n_gpu <= 1:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        if self.aux_loss_enabled:
            # a mean of the micro-batch; in training the Trainer does not divide what was counted
            divide = counted and self.model.training
            steps = self.current_gradient_accumulation_steps if divide else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / steps
        self._add(metrics)
        return (loss, outputs) if return_outputs else loss

    def _student(self, model, inputs):
        return model(**inputs, **({"output_router_logits": True} if self.aux_loss_enabled else {}))

    def _loss(self, model, inputs, labels, options):
        outputs = self._student(model, inputs)
        _one_each(labels, outputs.logits, "logits")
        with torch.no_grad():
            teacher_logits = self.teacher_model(**inputs).logits
        loss, metrics = functional.divergence(
            self.args.loss_objective(), outputs.logits, teacher_logits, labels, **options
        )
        return loss, metrics, outputs

    def _linear_loss(self, model, inputs, labels, options):
        student, teacher = (
            self.accelerator.unwrap_model(x).get_output_embeddings()
            for x in (model, self.teacher_model)
        )
        seen = []  # the teacher's hidden states, the student's metrics

        def hidden_states(hidden):
            seen.append(hidden)
            return hidden.new_ones(2)

        def loss_of(hidden):
            _one_each(labels, hidden, "hidden states")
            bias = None if teacher.bias is None else teacher.bias.detach()
            loss, metrics = linear.linear_divergence(
                self.args.loss_objective(), hidden, student.weight, labels,
                student_bias=student.bias, teacher_hidden=seen[0],
                teacher_weight=teacher.weight.detach(), teacher_bias=bias, **options,
            )  # fmt: skip
            seen.append(metrics)
            return torch.stack([loss, torch.ones_like(loss)])

        with torch.no_grad(), _replaced(teacher, "forward", hidden_states):
            from_teacher = self.teacher_model(**inputs)
        # Inside of the model's forward, so that what wraps it sees the use of the matrix.
        with _replaced(student, "forward", loss_of):
            outputs = self._student(model, inputs)
        if not self._heads_seen:
            for name, x in (("teacher", from_teacher.logits), ("student", outputs.logits)):
                if x.shape != (2,) or x[1] != 1 or len(seen) != 2:
                    raise ValueError(
                        f"the {name} must take its output layer's result as logits with "
                        f"linear=True, got a model that changes it, or runs the layer more than "
                        f"once; {_NO_LINEAR}"
                    )
            self._heads_seen = True
        loss = outputs.logits[0]
        outputs = type(outputs)(**{k: v for k, v in outputs.items() if k != "logits"})
        return loss, seen[1], outputs

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        alone = prediction_loss_only or self.args.linear
        return super().prediction_step(model, inputs, alone, ignore_keys)


def _one_each(labels: Tensor, rows: Tensor, name: str) -> None:
    if rows.shape[:-1] != labels.shape:
        raise ValueError(
            f"the student's {name} must be one for each label, got {tuple(labels.shape)} "
            f"labels and {tuple(rows.shape)} {name} (prompt tuning adds positions); "
            "use an adapter that adds none, such as LoRA"
        )


@contextmanager
def _replaced(owner: Any, name: str, value: Any):
    """``owner.name`` is ``value`` meanwhile."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


class DRKLDistillationTrainer(_LogsMetrics, trl_distillation.DistillationTrainer):
    """TRL's stable ``DistillationTrainer``, which generates the answers to its prompts and computes
    its loss from hidden states, with the loss of this package: :func:`drkl_triton.drkl` with
    ``args.gamma``, or ``args.objective``. The same arguments; a :class:`DRKLDistillationConfig` for
    ``args``. The labels are the tokens that the student generated.

    Logs besides TRL's the metrics of :class:`DRKLTrainer`. Models that scale or cap their logits
    are supported as far as TRL knows them.

    Raises:
        TypeError: ``args`` is no :class:`DRKLDistillationConfig`.
        ImportError: a TRL whose trainer has no such loss to replace.
    """

    _tag_names = ["trl", "distillation", "drkl"]
    _config_class = DRKLDistillationConfig

    def __init__(self, *args: Any, **kwargs: Any):
        if not hasattr(trl_distillation, "_chunked_divergence_loss"):
            raise ImportError(
                "DRKLDistillationTrainer replaces _chunked_divergence_loss of "
                "trl.trainer.distillation_trainer, which the installed TRL does not have; install "
                "the release that constraints.txt names"
            )
        super().__init__(*args, **kwargs)

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        labels = inputs["completion_ids"].masked_fill(mask == 0, -100)
        loss = partial(self._divergence, labels)
        # TRL's method passes on no labels
        with _replaced(trl_distillation, "_chunked_divergence_loss", loss):
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

    def _divergence(
        self,
        labels,
        student_hidden_states,
        teacher_hidden_states,
        student_lm_head_weight,
        teacher_lm_head_weight,
        completion_mask,
        beta,
        num_items_in_batch=None,
        student_lm_head_bias=None,
        teacher_lm_head_bias=None,
        student_logit_scale=1.0,
        teacher_logit_scale=1.0,
        student_final_logit_softcapping=None,
        teacher_final_logit_softcapping=None,
        temperature=1.0,
    ):
        """In the place of TRL's function, with its arguments and results."""
        student, teacher = student_hidden_states, teacher_hidden_states.detach()
        loss, metrics = linear.linear_divergence(
            self.args.loss_objective(),
            student,
            _whole(student_lm_head_weight, student),
            labels.to(student.device),
            student_bias=_whole(student_lm_head_bias, student),
            student_scale=student_logit_scale,
            student_softcap=student_final_logit_softcapping,
            teacher_hidden=teacher,
            teacher_weight=_whole(teacher_lm_head_weight, teacher).detach(),
            teacher_bias=_whole(teacher_lm_head_bias, teacher),
            teacher_scale=teacher_logit_scale,
            teacher_softcap=teacher_final_logit_softcapping,
            temperature=temperature,
            num_items=None if num_items_in_batch is None else _first(num_items_in_batch),
            return_metrics=True,
        )
        self._add(metrics)
        return loss, metrics.student_entropy.sum(), metrics.counted.sum()


def _whole(parameter: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Of FSDP2 the whole; in the dtype of the hidden states."""
    if parameter is None:
        return None
    if isinstance(parameter, DTensor):
        # the gradient is the mean over the processes, as FSDP makes it of its own parameters
        average = [Partial("avg")] * parameter.device_mesh.ndim
        parameter = parameter.full_tensor(grad_placements=average)
    return parameter.to(hidden.dtype)
