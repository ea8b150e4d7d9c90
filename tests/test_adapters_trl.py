"""The TRL adapter against the installed TRL: its function, its trainer."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import pytest
import torch

pytest.importorskip("trl")

import hf  # noqa: E402
from trl.experimental.gkd import GKDTrainer  # noqa: E402

import drkl_triton  # noqa: E402
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
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "without"])
def test_the_fused_loss_has_trls_value_and_gradient(
    option, labelled, beta, inputs, backend, monkeypatch
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
        model=models[0], teacher_model=models[1], args=config(tmp_path, router_aux_loss_coef=0.7),
        train_dataset=hf.conversations(), processing_class=tokenizer,
    )  # fmt: skip
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
    from datasets import Dataset
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


def one_step(folder, batch):
    """The weights after a step over all of eight conversations, of any number of processes."""
    tokenizer = hf.tokenizer()
    args = config(
        folder, max_steps=1, per_device_train_batch_size=batch, optim="sgd", max_grad_norm=0.0,
        learning_rate=0.5,
    )  # fmt: skip
    data = hf.conversations().select(range(8))
    trainer, _ = train(adapter.DRKLTrainer, args, "llama", tokenizer, data)
    if trainer.accelerator.is_main_process:
        weights = [p.detach() for p in trainer.accelerator.unwrap_model(trainer.model).parameters()]
        torch.save((weights, trainer.state.log_history[0]), folder / f"{batch}.pt")


def test_two_processes_take_the_step_of_one(tmp_path):
    code = f"""
    import os, runpy, sys
    from pathlib import Path
    sys.path.append({str(Path(__file__).parent)!r})
    runpy.run_path({__file__!r})["one_step"](Path({str(tmp_path)!r}), 4)
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
    one_step(tmp_path, 8)
    (two, log_two), (one, log_one) = (torch.load(tmp_path / f"{batch}.pt") for batch in (4, 8))
    before = hf.model("llama", len(hf.tokenizer()), seed=0).parameters()
    for a, b, old in zip(two, one, before, strict=True):
        moved = (b - old).abs().max().item()
        assert moved > 1e-5
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4 * moved + 1e-8)
    for name in ("target_kl", "nontarget_kl", "student_entropy"):
        assert abs(log_two[name] - log_one[name]) < 1e-4 * log_one[name], name


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


def test_importing_the_package_does_not_import_trl():
    code = "import sys, drkl_triton; sys.exit(bool({'trl', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert not hasattr(drkl_triton, "DRKLTrainer")
