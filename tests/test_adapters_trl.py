"""The TRL adapter against the installed TRL: its function, its trainer."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import selection
import torch

pytest.importorskip("trl")

import hf  # noqa: E402
import transformers  # noqa: E402
from datasets import Dataset  # noqa: E402
from trl import DistillationConfig, DistillationTrainer  # noqa: E402
from trl.experimental.gkd import GKDTrainer  # noqa: E402

import drkl_triton  # noqa: E402
from drkl_triton import objectives as o  # noqa: E402
from drkl_triton.adapters import trl as adapter  # noqa: E402

THEIRS = GKDTrainer.generalized_jsd_loss
B, T, V = 2, 6, 53


@pytest.fixture
def inputs():
    labels = torch.randint(V, (B, T))
    labels[0, :3] = labels[1, 4:] = -100
    student, teacher = 3 * torch.randn(2, B, T, V, dtype=torch.float64)
    return student.requires_grad_(), teacher, labels


def value_and_gradient(function, student, teacher, labels, **options):
    loss = function(student, teacher, labels, **options)
    (grad,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), grad


# name -> options; all with labels and without
OPTIONS = {
    "batchmean": {},
    "sum": {"reduction": "sum"},
    "num_items": {"num_items_in_batch": 11},
    "num_items, tensor": {"num_items_in_batch": torch.tensor(11)},
    "num_items, tensor of one": {"num_items_in_batch": torch.tensor([11])},
    "num_items outranks sum": {"num_items_in_batch": 11, "reduction": "sum"},
    "num_items outranks none": {"num_items_in_batch": 11, "reduction": "none"},
    "temperature": {"temperature": 2.5},
}


@pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    "option, backend",
    [
        (option, backend)
        for option in OPTIONS
        for backend in ("tiled", "triton")
        if backend == "tiled" or option in ("batchmean", "temperature") or selection.ALL
    ],
)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "without"])
def test_the_fused_loss_has_trls_value_and_gradient(
    option, backend, labelled, beta, inputs, monkeypatch
):
    options = {"beta": beta, **OPTIONS[option]}
    student, teacher, labels = inputs
    labels = labels if labelled else None
    expected = value_and_gradient(THEIRS, student, teacher, labels, **options)
    monkeypatch.setattr(adapter, "_trl_jsd", None)  # must not be needed
    ours = value_and_gradient(
        adapter.generalized_jsd_loss, student, teacher, labels, backend=backend, **options
    )
    if option == "num_items, tensor of one":
        assert expected[0].shape == (1,) and ours[0].shape == ()
        expected = (expected[0][0], expected[1])
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "none"},
        {"beta": 0, "reduction": "mean"},
        {"beta": 1, "reduction": "none"},
        {"beta": 1, "reduction": "mean"},
    ],
    ids=str,
)
def test_the_rest_is_trls_own(options, inputs):
    ours = value_and_gradient(adapter.generalized_jsd_loss, *inputs, **options)
    expected = value_and_gradient(THEIRS, *inputs, **options)
    assert all(map(torch.equal, ours, expected))


def test_defaults_and_names_are_trls():
    import inspect

    theirs = inspect.signature(THEIRS).parameters.values()
    ours = list(inspect.signature(adapter.generalized_jsd_loss).parameters.values())
    assert ours.pop().kind is inspect.Parameter.VAR_KEYWORD
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def test_what_trl_does_not_know_is_trls_error(inputs):
    with pytest.raises(TypeError, match="chunk"):
        adapter.generalized_jsd_loss(*inputs, beta=1, chunk=3)


def test_several_counts_are_trls(inputs):
    count = torch.tensor([[8], [8]])  # the Trainer's, for two GPUs in one process
    options = {"beta": 1, "num_items_in_batch": count}
    ours = adapter.generalized_jsd_loss(*inputs, **options)
    assert ours.shape == (2, 1) and torch.equal(ours, THEIRS(*inputs, **options))


def test_our_options_go_with_fused_calls_only(inputs):
    for options in ({"reduction": "none"}, {"beta": 1, "reduction": "mean"}):
        with pytest.raises(TypeError, match="backend must go with a call that is fused.*batchmean"):
            adapter.generalized_jsd_loss(*inputs, backend="tiled", **options)


def test_no_valid_token_and_the_dtype(inputs):
    student, teacher, labels = inputs
    for options in ({"beta": 1}, {"beta": 1, "num_items_in_batch": 3}):
        loss, grad = value_and_gradient(
            adapter.generalized_jsd_loss, student, teacher, labels * 0 - 100, **options
        )
        assert loss == 0 and (grad == 0).all()
    half = adapter.generalized_jsd_loss(student.bfloat16(), teacher.bfloat16(), labels, beta=1)
    assert half.dtype == torch.float32


def test_a_masked_student_is_not_nan(inputs):
    student, teacher, labels = inputs
    student, teacher = student.detach().clone(), teacher.clone()
    student[..., 7] = teacher[..., 7] = -torch.inf
    labels[labels == 7] = 8
    assert THEIRS(student, teacher, labels, beta=1).isnan()
    rest = torch.arange(V) != 7
    expected = THEIRS(student[..., rest], teacher[..., rest], labels, beta=1)
    ours = adapter.generalized_jsd_loss(student, teacher, labels, beta=1)
    torch.testing.assert_close(ours, expected)


# --- real runs ---


@pytest.fixture(scope="module")
def tokenizer():
    return hf.tokenizer()


def config(folder, cls=adapter.DRKLConfig, **options):
    defaults = dict(
        output_dir=str(folder), max_steps=20, per_device_train_batch_size=4, learning_rate=5e-3,
        lmbda=0.0, logging_steps=1, report_to=[], use_cpu=True, max_length=64, bf16=False,
        save_strategy="no", activation_checkpointing=False, disable_tqdm=True, max_new_tokens=8,
        lr_scheduler_type="constant",
    )  # fmt: skip
    return cls(**defaults | options)


def make(trainer_class, args, kind, tokenizer, data=None, **options):
    vocab = len(tokenizer)
    return trainer_class(
        model=hf.model(kind, vocab, seed=0), teacher_model=hf.model(kind, vocab, seed=1),
        args=args, train_dataset=data or hf.conversations(), processing_class=tokenizer, **options,
    )  # fmt: skip


def train(*args, **options):
    trainer = make(*args, **options)
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(("kind", "lmbda"), [("llama", 0.0), ("qwen", 0.5)])
def test_twenty_steps_of_the_drkl_trainer(kind, lmbda, tokenizer, tmp_path):
    args = config(tmp_path, gamma=0.7, lmbda=lmbda, gradient_accumulation_steps=2)
    trainer, log = train(
        adapter.DRKLTrainer, args, kind, tokenizer, eval_dataset=hf.conversations()
    )
    first, last = (sum(x["loss"] for x in part) / 5 for part in (log[:5], log[-5:]))
    assert len(log) == 20 and last < 0.7 * first, (first, last)
    for entry in log:
        # the step's loss is the mean over its tokens of what the metrics are the parts of
        parts = entry["target_kl"] + 0.7 * entry["nontarget_kl"]
        assert abs(entry["loss"] - parts) < 1e-4 * max(1, parts)
        assert 0 < entry["student_entropy"] < 6 and 0 < entry["teacher_target_prob"] < 1
    result = trainer.evaluate()
    parts = result["eval_target_kl"] + 0.7 * result["eval_nontarget_kl"]
    assert abs(result["eval_loss"] - parts) < 0.02 * parts  # a mean of batches, and one of tokens


def test_metrics_are_those_of_their_own_steps(tokenizer, tmp_path):
    """Evaluations in between, of two data sets, a prediction, and a step that is never logged."""
    data = hf.conversations()
    args = config(
        tmp_path, max_steps=5, logging_steps=2, eval_strategy="steps", eval_steps=3,
        learning_rate=0.0, per_device_train_batch_size=16,
    )  # fmt: skip
    sets = {"a": data.select(range(2)), "b": data}
    trainer = make(adapter.DRKLTrainer, args, "llama", tokenizer, eval_dataset=sets)
    trainer.train()
    trainer.predict(data)
    trainer.evaluate()

    def check(entry, prefix):
        parts = entry[f"{prefix}target_kl"] + 0.5 * entry[f"{prefix}nontarget_kl"]
        assert abs(parts - entry[f"{prefix}loss"]) < 0.02 * parts, (prefix, entry)
        return entry[f"{prefix}target_kl"]

    entries = trainer.state.log_history
    train = [check(entry, "") for entry in entries if "loss" in entry]
    assert len(train) == 2 and abs(train[0] - train[1]) < 1e-5  # nothing is learnt
    for name in sets:
        found = [check(e, f"eval_{name}_") for e in entries if f"eval_{name}_loss" in e]
        assert len(found) == 3 and max(found) - min(found) < 1e-5
    assert not any("target_kl" in entry for entry in entries if "train_loss" in entry)


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor([7]), torch.tensor([[7], [7]])])
def test_the_trainers_loss_is_that_of_the_sliced_logits(num_items, tokenizer, tmp_path):
    args = config(tmp_path, gamma=0.7, loss_temperature=1.5)
    trainer = make(adapter.DRKLTrainer, args, "llama", tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(
        trainer.model, batch, return_outputs=True, num_items_in_batch=num_items
    )
    tokens = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = batch["labels"][:, 1:]
    assert (labels == -100).any() and (labels != -100).any()
    with torch.no_grad():
        s, t = (m(**tokens).logits[:, :-1].double() for m in (trainer.model, trainer.teacher_model))
    options = {"gamma": 0.7, "temperature": 1.5}
    rows = drkl_triton.reference.drkl(s, t, labels, reduction="sum", **options)
    expected = rows / ((labels != -100).sum() if num_items is None else 7)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(outputs.logits[:, :-1].double(), s, rtol=1e-4, atol=1e-5)


def test_tokens_are_counted_after_they_are_generated(tokenizer, tmp_path):
    args = config(tmp_path, lmbda=1.0, gradient_accumulation_steps=2)
    trainer = make(adapter.DRKLTrainer, args, "llama", tokenizer)
    given = list(trainer.get_train_dataloader())[:2]
    batches, count = trainer.get_batch_samples(iter(given), 2, torch.device("cpu"))
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in batches]
    assert count == sum(counts)
    for batch, before in zip(batches, given, strict=True):
        assert batch["prompts"] is before["prompts"]
        assert batch["labels"] is not before["labels"]
    with pytest.raises(ValueError, match="pixel_values; set lmbda=0"):
        trainer.get_batch_samples(iter([{**given[0], "pixel_values": 0}]), 1, torch.device("cpu"))
    del given[0]["prompts"]  # of a collator that is not TRL's
    with pytest.raises(ValueError, match="prompts.*lmbda=0 and seq_kd=False"):
        trainer.get_batch_samples(iter(given), 1, torch.device("cpu"))


def test_tokens_are_counted_for_a_model_without_loss_keywords(tokenizer, tmp_path, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    trainer = make(adapter.DRKLTrainer, config(tmp_path), "llama", tokenizer)
    batches, count = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), 2, torch.device("cpu")
    )
    assert count == sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)


def test_packed_sequences_do_not_see_each_other(tokenizer, tmp_path):
    """No attention_mask, but position_ids that begin anew: what a padding-free collator makes."""
    trainer = make(adapter.DRKLTrainer, config(tmp_path), "llama", tokenizer)
    batch, alone = hf.packed(3, len(tokenizer))
    count = (batch["labels"] != -100).sum()
    whole = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    parts = [trainer.compute_loss(trainer.model, x, num_items_in_batch=count) for x in alone]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-5, atol=0)


def test_pixel_values_reach_both_models(tokenizer, tmp_path, monkeypatch):
    trainer = make(adapter.DRKLTrainer, config(tmp_path), "llama", tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    seen = []
    for model in (trainer.model, trainer.teacher_model):

        def spy(*args, forward=model.forward, pixel_values=None, token_type_ids=None, **kwargs):
            seen.append((pixel_values, token_type_ids, sorted(kwargs)))
            return forward(*args, **kwargs)

        monkeypatch.setattr(model, "forward", spy)
    more = {"pixel_values": torch.ones(2), "token_type_ids": torch.zeros_like(batch["input_ids"])}
    # of TRL's collators and trainers, for neither model
    not_inputs = {"original_prompt_text": ["a"], "original_completion_text": ["b"]}
    not_inputs |= {"skip_logits": True, "prompts": batch["prompts"]}
    trainer.compute_loss(trainer.model, {**batch, **more, **not_inputs})
    assert len(seen) == 2
    for pixels, types, others in seen:
        assert pixels is more["pixel_values"] and types is more["token_type_ids"]
        assert others == ["attention_mask", "input_ids", "use_cache"]


def test_a_mixture_of_experts_keeps_its_load_balanced(tokenizer, tmp_path):
    models = [hf.experts(len(tokenizer)) for _ in range(2)]
    trainer = adapter.DRKLTrainer(
        model=models[0],
        teacher_model=models[1],
        args=config(tmp_path, router_aux_loss_coef=0.7),
        train_dataset=hf.conversations(),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    with torch.no_grad():
        tokens = {key: batch[key] for key in ("input_ids", "attention_mask")}
        teacher = models[1](**tokens).logits
    alone = drkl_triton.drkl(outputs.logits, teacher, batch["labels"], shift=True)
    torch.testing.assert_close(loss, alone + 0.7 * outputs.aux_loss)
    trainer.current_gradient_accumulation_steps = 4
    trainer.model.train()
    count = (batch["labels"][:, 1:] != -100).sum()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
    torch.testing.assert_close(loss, alone + 0.7 * outputs.aux_loss / 4, rtol=1e-4, atol=1e-5)
    trainer.model.eval()  # nothing is accumulated
    loss, outputs = trainer.compute_loss(trainer.model, batch, True, count)
    torch.testing.assert_close(loss, alone + 0.7 * outputs.aux_loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "option",
    [
        {"loss_type": "dft"},
        {"label_smoothing_factor": 0.1},
        {"packing": True},
        {"padding_free": 1},
        {"use_liger_kernel": True},
        {"eval_packing": True},
        {"completion_only_loss": False},
        {"assistant_only_loss": True},
        {"pad_to_multiple_of": 8},
    ],
    ids=str,
)
def test_options_that_would_be_ignored_are_errors(option, tokenizer, tmp_path):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name} must be .* for DRKLTrainer, got"):
        make(adapter.DRKLTrainer, config(tmp_path, **option), "llama", tokenizer)


def test_a_formatting_function_would_be_ignored(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="formatting_func.*Dataset.map"):
        make(adapter.DRKLTrainer, config(tmp_path), "llama", tokenizer, formatting_func=str)


def test_the_advice_for_packing_trains_as_padding_does(tokenizer, tmp_path):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [tokenizer(text)["input_ids"] for text in hf.SENTENCES]
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])
    losses = []
    for padding_free in (True, False):
        collator = DataCollatorForLanguageModeling(
            tokenizer.pad_token_id, padding_free=padding_free
        )
        _, log = train(
            adapter.DRKLTrainer, config(tmp_path, max_steps=2), "llama", tokenizer, data,
            data_collator=collator,
        )  # fmt: skip
        losses.append([entry["loss"] for entry in log])
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=0)


def test_labels_that_do_not_fit_are_errors(tokenizer, tmp_path, monkeypatch):
    trainer = make(adapter.DRKLTrainer, config(tmp_path), "llama", tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match="shift_labels is not supported"):
        trainer.compute_loss(trainer.model, {**batch, "shift_labels": batch["labels"]})
    with pytest.raises(ValueError, match="one for each label.*prompt tuning.*LoRA"):
        trainer.compute_loss(trainer.model, {**batch, "labels": batch["labels"][:, 1:]})


def test_one_line_in_trls_own_trainer_changes_no_number(tokenizer, tmp_path, monkeypatch):
    from trl.experimental.gkd import GKDConfig

    logs, calls = [], []

    def ours(*args, **kwargs):
        calls.append(1)
        return adapter.generalized_jsd_loss(*args, **kwargs)

    monkeypatch.setattr(adapter, "_trl_jsd", None)  # must not be needed
    for function in (THEIRS, ours):
        monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(function))
        args = config(tmp_path, GKDConfig, beta=1.0, max_steps=4)
        logs.append([x["loss"] for x in train(GKDTrainer, args, "llama", tokenizer)[1]])
    torch.testing.assert_close(*map(torch.tensor, logs), rtol=1e-4, atol=1e-5)
    assert len(calls) == 4


def test_gradient_accumulation_does_not_change_the_run(tokenizer, tmp_path):
    weights = []
    for batch, steps in ((8, 1), (2, 4)):
        args = config(
            tmp_path, max_steps=2, per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps, optim="sgd", max_grad_norm=0.0, learning_rate=0.5,
        )  # fmt: skip
        trainer, _ = train(adapter.DRKLTrainer, args, "llama", tokenizer)
        weights.append([p.detach() for p in trainer.model.parameters()])
    before = hf.model("llama", len(tokenizer), seed=0).parameters()
    for a, b, old in zip(*weights, before, strict=True):
        moved = (b - old).abs().max().item()
        assert moved > 1e-5
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4 * moved + 1e-8)


# The options of the runs that must take the same step.
STEPS = {
    "logits": {},
    "hidden states": {"linear": True},
    # DDP then looks for the parameters that the forward did not use
    "hidden states, unused": {"linear": True, "ddp_find_unused_parameters": True},
}


def steps(folder, batch):
    """The weights after a step over all of eight conversations, of any number of processes."""
    tokenizer = hf.tokenizer()
    for name, options in STEPS.items():
        args = config(
            folder, max_steps=1, per_device_train_batch_size=batch, optim="sgd", max_grad_norm=0.0,
            learning_rate=0.5, **options,
        )  # fmt: skip
        data = hf.conversations().select(range(8))
        trainer, _ = train(adapter.DRKLTrainer, args, "llama", tokenizer, data)
        weights = [p.detach() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()]
        rank = trainer.accelerator.process_index
        torch.save((weights, trainer.state.log_history[0]), folder / f"{name} {batch} {rank}.pt")


def sharded(folder):
    """In two processes: the gradients of both trainers under fully_shard are those of one process,
    from logits and from TRL's own loss, with the output layer in a group of its own, too.
    """
    from torch.distributed.fsdp import fully_shard

    tokenizer = hf.tokenizer()
    rank = torch.distributed.get_rank()
    mine = slice(4 * rank, 4 * rank + 4)
    torch.manual_seed(3)
    ids = torch.randint(3, len(tokenizer), (8, 12))
    ones = torch.ones_like(ids)
    batch = {"input_ids": ids, "attention_mask": ones, "labels": ids}
    parts = {"prompt": slice(4), "completion": slice(4, None)}
    generated = {f"{k}_ids": ids[:, part] for k, part in parts.items()}
    generated |= {f"{k}_mask": ones[:, part] for k, part in parts.items()}

    def from_conversations():
        trainer = linear_trainer(folder, tokenizer, average_tokens_across_devices=False)
        trainer.args.linear = False
        yield trainer, batch, torch.tensor(88)
        trainer.args.linear = True
        yield trainer, {k: x[mine] for k, x in batch.items()}, torch.tensor(44)

    def from_prompts():
        options = {"objective": "reverse_kl"}
        ours, theirs = (
            distillation(
                folder, cls, tokenizer, **(options if cls is not DistillationTrainer else {})
            )
            for cls in (adapter.DRKLDistillationTrainer, DistillationTrainer)
        )
        yield theirs, generated, torch.tensor(64)
        yield ours, {k: x[mine] for k, x in generated.items()}, torch.tensor(32)

    for runs in (from_conversations, from_prompts):
        for own_group in (False, True):
            found = []
            for step, (trainer, x, count) in enumerate(runs()):
                model = trainer.model.eval()
                model.zero_grad()
                if step:
                    groups = [*model.model.layers, model.lm_head][: 3 if own_group else 2]
                    for module in (*groups, model):
                        fully_shard(module)
                trainer.compute_loss(model, x, num_items_in_batch=count).backward()
                grads = [p.grad for p in model.parameters()]
                found.append([g.full_tensor() if step else g.clone() for g in grads])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item())


def test_two_processes_do_as_one(tmp_path):
    code = f"""
    import os, runpy, sys
    from pathlib import Path
    sys.path.append({str(Path(__file__).parent)!r})
    tests = runpy.run_path({__file__!r})
    tests["steps"](Path({str(tmp_path)!r}), 4)
    tests["sharded"](Path({str(tmp_path)!r}))
    # Past PyTorch's destructors: at exit, and in destroy_process_group, too, the main thread waits
    # for gloo's, which waits for the interpreter's lock to drop a tensor. It hangs or aborts.
    os._exit(0)
    """
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(code))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run(
        [*command, script], check=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    steps(tmp_path, 8)
    one, log_one = torch.load(tmp_path / "logits 8 0.pt")
    before = hf.model("llama", len(hf.tokenizer()), seed=0).parameters()
    moved = [(b - old).abs().max().item() for b, old in zip(one, before, strict=True)]
    assert min(moved) > 1e-5
    for run in [f"{name} 8 0" for name in STEPS] + [f"{n} 4 {r}" for n in STEPS for r in (0, 1)]:
        weights, log = torch.load(tmp_path / f"{run}.pt")
        for a, b, size in zip(weights, one, moved, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-4 * size + 1e-8, msg=run)
        if run.endswith("0"):  # the main process logs what all of them counted
            for name in ("target_kl", "nontarget_kl", "student_entropy"):
                assert abs(log[name] - log_one[name]) < 1e-4 * log_one[name], (run, name)


def test_errors_of_the_trainer(tokenizer, tmp_path):
    from trl.experimental.gkd import GKDConfig

    with pytest.raises(ValueError, match="beta is not used by DRKL"):
        config(tmp_path, beta=0.5)
    with pytest.raises(ValueError, match="gamma"):
        config(tmp_path, gamma=-1.0)
    with pytest.raises(ValueError, match="loss_temperature"):
        config(tmp_path, loss_temperature=0)
    with pytest.raises(TypeError, match="DRKLConfig, got GKDConfig"):
        train(adapter.DRKLTrainer, config(tmp_path, GKDConfig), "llama", tokenizer)


# --- any objective ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reverse_kl", o.reverse_kl()),
        (
            "0.9*drkl(gamma=0.7) + cross_entropy()*.1 - z_loss/1e4",
            0.9 * o.drkl(0.7) + 0.1 * o.cross_entropy() - 1e-4 * o.z_loss(),
        ),
        (" -2*(mixed_kl(0.25) + dkd(1, beta=4.0))", -2 * (o.mixed_kl(0.25) + o.dkd(1, 4.0))),
    ],
)
def test_a_string_names_an_objective(text, expected, tmp_path):
    objective = config(tmp_path, objective=text).loss_objective()
    assert str(objective) == str(expected) and objective.key == expected.key


def test_every_loss_can_be_named(tmp_path):
    """All that have a function of their own; and no decorator, type or helper."""
    losses = set(drkl_triton.functional.__all__) - {"divergence", "softmax", "log_softmax"}
    assert adapter._BUILDERS.keys() >= losses | {"entropy", "z_loss", "gated_kl", "symmetric_kl"}
    assert not adapter._BUILDERS.keys() & {"separable", "check", "times", "target_kl", "Objective"}
    for name in losses - {"alpha_beta"}:  # whose parameters have no defaults
        assert config(tmp_path, objective=name).loss_objective().terms


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("dkl()", "'dkl..' is none of numbers, losses"),
        ("", "invalid syntax"),
        ("drkl(gamma=-1)", "gamma must be positive"),
        ("drkl(beta=1)", "takes the parameters .'gamma'.*got beta"),
        ("mixed_kl(x=1)", "unexpected keyword"),
        ("0.5", "must be an Objective, got float"),
        ("1 + drkl()", "unsupported operand"),
        ("drkl() * drkl()", "unsupported operand"),
        ("drkl() / 0", "division by zero"),
        ("True * drkl()", "'True' is none of"),
        ("drkl(**{'gamma': 1})", "is none of"),
        ("__import__('os').getcwd()", "is none of"),
        ("drkl.function()", "is none of"),
    ],
)
def test_what_a_string_may_not_say(text, reason, tmp_path):
    with pytest.raises(
        ValueError, match=f"(?s)objective must be a sum.*{reason}.*losses are.*drkl"
    ):
        config(tmp_path, objective=text)


def test_objectives_that_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"gamma=0.7 beside.*write it there, as drkl\(gamma=0.7\)"):
        config(tmp_path, objective="drkl", gamma=0.7)
    with pytest.raises(TypeError, match="must be an Objective, got Formula"):
        config(tmp_path, objective=o.drkl)
    with pytest.raises(ValueError, match=r"objective='js_divergence\(0.5\)'"):
        config(tmp_path, beta=0.5)


@pytest.mark.parametrize("cls", [adapter.DRKLConfig, adapter.DRKLDistillationConfig])
def test_configs_are_written_and_parsed(cls, tmp_path):
    from transformers import HfArgumentParser

    text = "0.9 * drkl(gamma=0.7) + 0.1 * cross_entropy()"
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", "--objective", text]
    more = ["--linear", "True"] if cls is adapter.DRKLConfig else []
    (args,) = HfArgumentParser(cls).parse_args_into_dataclasses(line + more)
    objective = 0.9 * o.drkl(0.7) + 0.1 * o.cross_entropy()
    given = cls(str(tmp_path), use_cpu=True, bf16=False, objective=objective)
    torch.save(given, tmp_path / "args.bin")  # as checkpoints have them
    loaded = torch.load(tmp_path / "args.bin", weights_only=False)
    for x in (args, given, loaded):
        assert json.loads(x.to_json_string())["objective"] == text
        assert str(x.loss_objective()) == text
    plain = cls(str(tmp_path), use_cpu=True, bf16=False, gamma=0.3)
    assert json.loads(plain.to_json_string())["objective"] is None
    assert str(plain.loss_objective()) == "drkl(gamma=0.3)"
    if more:
        assert args.linear is True and plain.linear is False


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "linear"])
@pytest.mark.parametrize(
    "objective", ["js_divergence(0.3)", 0.8 * o.dkd() + 0.2 * o.cross_entropy(), "cross_entropy"]
)
def test_the_trainer_minimises_the_objective(objective, linear, tokenizer, tmp_path):
    args = config(tmp_path, objective=objective, linear=linear, loss_temperature=1.5)
    trainer = make(adapter.DRKLTrainer, args, "llama", tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(9))
    s, t = logits_of(trainer, batch)
    expected = drkl_triton.divergence(
        args.loss_objective(), s.double(), t.double(), batch["labels"], shift=True,
        temperature=1.5, num_items=9,
    )  # fmt: skip
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


# --- from hidden states ---


def logits_of(trainer, batch):
    tokens = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return [m(**tokens).logits for m in (trainer.model, trainer.teacher_model)]


def tie(model):
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight


def add_bias(model):
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.lm_head.out_features))


def freeze(model):
    model.lm_head.requires_grad_(False)


def linear_trainer(folder, tokenizer, student=None, teacher=None, **options):
    student, teacher = (
        x or hf.model("llama", len(tokenizer), seed=i) for i, x in enumerate((student, teacher))
    )
    return adapter.DRKLTrainer(
        model=student,
        teacher_model=teacher,
        args=config(folder, linear=True, **options),
        train_dataset=hf.conversations(),
        processing_class=tokenizer,
    )


def loss_and_gradients(trainer, batch, linear, num_items=None):
    trainer.args.linear = linear
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_items)
    loss.backward()
    grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    assert len(grads) == sum(p.requires_grad for p in trainer.model.parameters())
    return loss.detach(), grads


def same_from_both(trainer, num_items=None):
    batch = next(iter(trainer.get_train_dataloader()))
    (ours, grads), (expected, others) = (
        loss_and_gradients(trainer, batch, linear, num_items) for linear in (True, False)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    for a, b in zip(grads, others, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item())


@pytest.mark.parametrize("num_items", [None, torch.tensor([7])], ids=["mean", "num_items"])
@pytest.mark.parametrize("change", [len, tie, add_bias, freeze], ids=lambda f: f.__name__)
def test_from_hidden_states_as_from_logits(change, num_items, tokenizer, tmp_path):
    models = [hf.model("llama", len(tokenizer), seed=seed) for seed in (0, 1)]
    if change is not len:
        for model in models:
            change(model)
    same_from_both(linear_trainer(tmp_path, tokenizer, *models, loss_temperature=1.5), num_items)


def test_a_mixture_of_experts_from_hidden_states(tokenizer, tmp_path):
    models = [hf.experts(len(tokenizer)) for _ in range(2)]
    same_from_both(linear_trainer(tmp_path, tokenizer, *models, router_aux_loss_coef=0.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_states_under_mixed_precision(dtype, tokenizer, tmp_path):
    """A step of float32 weights under autocast, the teacher's in 16 bits or not."""
    steps = []
    for bf16, teacher in ((True, dtype), (False, torch.float32)):
        trainer = linear_trainer(
            tmp_path, tokenizer, None, hf.model("llama", len(tokenizer), 1).to(teacher), bf16=bf16,
            max_steps=1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
        )  # fmt: skip
        before = torch.cat([p.detach().clone().flatten() for p in trainer.model.parameters()])
        trainer.train()
        steps.append(before - torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.cosine_similarity(*steps, dim=0) > 0.99 and not torch.equal(*steps)


def test_models_in_bfloat16_from_hidden_states(tokenizer, tmp_path):
    models = [hf.model("llama", len(tokenizer), seed).bfloat16() for seed in (0, 1)]
    trainer = linear_trainer(tmp_path, tokenizer, *models)
    batch = next(iter(trainer.get_train_dataloader()))
    (loss, _), (expected, _) = (loss_and_gradients(trainer, batch, x) for x in (True, False))
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)


def test_no_logits_are_made(tokenizer, tmp_path, monkeypatch):
    """No allocation is as large as the logits, of one model, of the tokens that count."""
    monkeypatch.setattr(drkl_triton.slices, "CHUNK_BYTES", 100_000)
    trainer = linear_trainer(tmp_path, tokenizer)
    ids = torch.randint(3, len(tokenizer), (16, 96))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    size = 4 * batch["labels"][:, 1:].numel() * len(tokenizer)
    largest = []
    for linear in (True, False):
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            loss_and_gradients(trainer, batch, linear)
        events = profile.kineto_results.events()
        largest.append(max(e.nbytes() for e in events if e.name() == "[memory]"))
    assert largest[0] < size / 2 and largest[1] >= size, (largest, size)


def test_evaluation_and_generation_from_hidden_states(tokenizer, tmp_path):
    data = hf.conversations()
    trainer = linear_trainer(tmp_path, tokenizer, max_steps=2, lmbda=1.0)
    trainer.train()  # the student writes, with its own output layer
    losses = []
    for linear in (True, False):
        trainer.args.linear = linear
        losses.append(trainer.evaluate(data)["eval_loss"])
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[1]
    trainer.args.linear = True
    output = trainer.predict(data)
    assert output.predictions is None and abs(output.metrics["test_loss"] - losses[1]) < 1e-4
    batch = next(iter(trainer.get_train_dataloader()))
    _, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    assert outputs.logits is None
    assert trainer.model(batch["input_ids"]).logits.shape[-1] == len(tokenizer)


def small(cls, **options):
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(cls(**sizes | options))


CHANGED = {
    "final_logit_softcapping": (transformers.Gemma2Config, {}),
    "logit_scale": (transformers.CohereConfig, {}),
    "logits_scaling": (transformers.GraniteConfig, {"logits_scaling": 8.0}),
}


@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("name", CHANGED)
def test_models_that_change_their_logits_are_errors(name, whose, tokenizer, tmp_path):
    cls, options = CHANGED[name]
    models = {whose: small(cls, vocab_size=len(tokenizer), **options)}
    with pytest.raises(ValueError, match=f"the {whose} must take.*{name}=.*leave linear out"):
        linear_trainer(tmp_path, tokenizer, **models)


def test_a_scale_of_1_is_none(tokenizer, tmp_path):
    model = small(transformers.GraniteConfig, vocab_size=len(tokenizer), logits_scaling=1.0)
    same_from_both(linear_trainer(tmp_path, tokenizer, model))


class Halves(transformers.LlamaForCausalLM):
    """No name in the config says it."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits / 2
        return outputs


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_what_no_config_says_is_found_in_the_first_step(whose, tokenizer, tmp_path):
    model = hf.model("llama", len(tokenizer), seed=0)
    model.__class__ = Halves
    trainer = linear_trainer(tmp_path, tokenizer, **{whose: model})
    with pytest.raises(ValueError, match=f"the {whose} must take.*a model that changes it"):
        trainer.train()


def test_errors_of_linear(tokenizer, tmp_path):
    class Adapter(torch.nn.Linear):
        pass

    for whose in ("student", "teacher"):
        model = hf.model("llama", len(tokenizer), seed=0)
        model.lm_head.__class__ = Adapter
        with pytest.raises(TypeError, match=f"the {whose}'s output layer must be a plain.*Adapter"):
            linear_trainer(tmp_path, tokenizer, **{whose: model})
    with pytest.raises(ValueError, match="torch_compile must be False with linear=True"):
        linear_trainer(tmp_path, tokenizer, torch_compile=True)
    with pytest.raises(TypeError, match="linear must be True or False, got 1"):
        config(tmp_path, linear=1)
    for name in ("compute_metrics", "preprocess_logits_for_metrics"):
        with pytest.raises(ValueError, match=f"{name} must be None with linear=True"):
            make(
                adapter.DRKLTrainer,
                config(tmp_path, linear=True),
                "llama",
                tokenizer,
                **{name: len},
            )
    trainer = linear_trainer(tmp_path, tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match="hidden states must be one for each label"):
        trainer.compute_loss(trainer.model, {**batch, "labels": batch["labels"][:, 1:]})
    # the output layers are their own again
    assert "forward" not in vars(trainer.model.lm_head) | vars(trainer.teacher_model.lm_head)


def test_adapters_of_peft_below_the_output_layer(tokenizer, tmp_path):
    peft = pytest.importorskip("peft")

    def adapted(**options):
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **options)
        return peft.get_peft_model(hf.model("llama", len(tokenizer), seed=0), lora)

    same_from_both(linear_trainer(tmp_path, tokenizer, adapted(init_lora_weights=False)))
    with pytest.raises(TypeError, match="the student's output layer must be a plain"):
        linear_trainer(tmp_path, tokenizer, adapted(modules_to_save=["lm_head"]))


# --- TRL's stable trainer ---


def distillation(folder, trainer_class, tokenizer, models=None, **options):
    defaults = dict(
        output_dir=str(folder), max_steps=10, per_device_train_batch_size=4, learning_rate=5e-3,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        activation_checkpointing=False, disable_tqdm=True, max_completion_length=8,
        lr_scheduler_type="constant",
    )  # fmt: skip
    ours = issubclass(trainer_class, adapter.DRKLDistillationTrainer)
    args = (adapter.DRKLDistillationConfig if ours else DistillationConfig)(**defaults | options)
    student, teacher = models or (hf.model("llama", len(tokenizer), seed=i) for i in (0, 1))
    data = Dataset.from_list([{"prompt": " ".join(x.split()[:3])} for x in hf.SENTENCES * 4])
    tokenizer.padding_side = "left"
    return trainer_class(
        model=student, teacher_model=teacher, args=args, train_dataset=data, eval_dataset=data,
        processing_class=tokenizer,
    )  # fmt: skip


def generated(trainer):
    """A batch as the trainer makes it, with tokens of a tool and without the last of one answer."""
    torch.manual_seed(5)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    batch["completion_mask"][1, -3:] = 0
    batch["tool_mask"] = torch.ones_like(batch["completion_mask"])
    batch["tool_mask"][2, 2:4] = 0
    return batch


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_the_replaced_loss_has_trls_value_and_gradient(beta, tokenizer, tmp_path):
    results, batch = [], None
    both = (DistillationTrainer, {"beta": beta}), (
        adapter.DRKLDistillationTrainer, {"objective": f"js_divergence({beta})"},
    )  # fmt: skip
    for cls, options in both:
        trainer = distillation(tmp_path, cls, tokenizer, temperature=1.5, **options)
        batch = batch or generated(trainer)
        for training in (True, False):  # counted over the step, or a mean
            trainer.model.train(training).zero_grad()
            loss = trainer.compute_loss(trainer.model, batch)
            loss.backward()
            mode = "train" if training else "eval"
            (entropy,) = trainer._metrics[mode].pop("entropy")
            grads = [p.grad.clone() for p in trainer.model.parameters()]
            results.append((loss.item(), entropy, grads))
    for ours, theirs in zip(results[2:], results[:2], strict=True):
        assert ours[:2] == pytest.approx(theirs[:2], rel=1e-5)
        for a, b in zip(ours[2], theirs[2], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5 * b.abs().max().item())


def test_the_labels_of_the_replaced_loss_are_the_generated_tokens(tokenizer, tmp_path):
    """Through a teacher that scales its logits and a student that caps them, too."""
    vocab = len(tokenizer)
    models = (
        small(transformers.Gemma2Config, vocab_size=vocab),
        small(transformers.GraniteConfig, vocab_size=vocab, logits_scaling=0.5),
    )
    for parameters in (x.parameters() for x in models):
        for p in parameters:
            p.data.mul_(4) if p.dim() > 1 else None
    trainer = distillation(
        tmp_path, adapter.DRKLDistillationTrainer, tokenizer, models, gamma=0.7, temperature=1.5
    )
    batch = generated(trainer)
    trainer.model.eval()
    loss = trainer.compute_loss(trainer.model, batch)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    labels = batch["completion_ids"].clone()
    labels[(batch["completion_mask"] * batch["tool_mask"]) == 0] = -100
    assert 0 < (labels == -100).sum() < labels.numel()
    with torch.no_grad():
        s, t = (
            m(input_ids=ids, attention_mask=mask).logits[:, -labels.shape[1] - 1 : -1].double()
            for m in models
        )
    expected = drkl_triton.reference.drkl(s, t, labels, gamma=0.7, temperature=1.5)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_the_stable_trainer_learns_and_logs(tokenizer, tmp_path):
    from trl.trainer import distillation_trainer

    theirs = distillation_trainer._chunked_divergence_loss
    trainer = distillation(
        tmp_path, adapter.DRKLDistillationTrainer, tokenizer, gamma=0.7, max_steps=20,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 20 and log[-1]["loss"] < 0.8 * log[0]["loss"]
    for entry in log:
        parts = entry["target_kl"] + 0.7 * entry["nontarget_kl"]
        assert abs(entry["loss"] - parts) < 1e-4 * parts
        assert abs(entry["entropy"] - entry["student_entropy"]) < 0.02 * entry["entropy"]
    metrics = trainer.evaluate()
    parts = metrics["eval_target_kl"] + 0.7 * metrics["eval_nontarget_kl"]
    assert abs(metrics["eval_loss"] - parts) < 0.05 * parts
    assert distillation_trainer._chunked_divergence_loss is theirs


def test_errors_of_the_stable_trainer(tokenizer, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="beta is not used by DRKL"):
        distillation(tmp_path, adapter.DRKLDistillationTrainer, tokenizer, beta=0.5)
    theirs = DistillationConfig(str(tmp_path), use_cpu=True, bf16=False)
    models = [hf.model("llama", len(tokenizer), seed=0)] * 2
    with pytest.raises(TypeError, match="DRKLDistillationConfig, got DistillationConfig"):
        adapter.DRKLDistillationTrainer(*models, theirs)
    monkeypatch.delattr("trl.trainer.distillation_trainer._chunked_divergence_loss")
    with pytest.raises(ImportError, match="constraints.txt"):
        distillation(tmp_path, adapter.DRKLDistillationTrainer, tokenizer)


def test_importing_the_package_does_not_import_trl():
    code = "import sys, drkl_triton; sys.exit(bool({'trl', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert not hasattr(drkl_triton, "DRKLTrainer")
