"""docs/migrate.md: every "before" and "after" runs, and where it says "same numbers" they are.

TRL is installed whole. Of ms-swift and torchtune, whose requirements fit neither each other nor
the rest, the wheels are there without their dependencies, and the one file with the loss, which
needs torch alone, is imported from them.
"""

import importlib
import re
import sys
import types
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from drkl_triton import reference

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
BLOCKS = {
    (kind, name): code
    for kind, name, code in re.findall(r"```python\n# (\w+): (\w+)\n(.*?)```", PAGE, re.DOTALL)
}
B, T, V = 2, 6, 41


def inputs():
    torch.manual_seed(3)
    labels = torch.randint(V, (B, T))
    labels[0, :2] = labels[1, 4:] = -100
    student, teacher = (3 * torch.randn(B, T, V) for _ in range(2))
    return {"student_logits": student.requires_grad_(), "teacher_logits": teacher, "labels": labels}


def run(kind, name, names=None):
    names = inputs() if names is None else names
    code = BLOCKS[kind, name].replace(
        'output_dir="out"', 'output_dir="out", use_cpu=True, bf16=False'
    )
    exec(compile(code, f"docs/migrate.md {kind} {name}", "exec"), names)
    return names


def same_numbers(name, losses=("loss",)):
    before, after = run("before", name), run("after", name)
    for loss in losses:
        torch.testing.assert_close(after[loss], before[loss], rtol=2e-5, atol=0)
        grads = [torch.autograd.grad(x[loss], x["student_logits"])[0] for x in (before, after)]
        size = grads[0].abs().max().item()
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6 * size)


def installed(package):
    try:
        return version(package)
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")


@pytest.fixture
def one_file(monkeypatch):
    """one_file("a.b.c"): that module out of an installed package, without running the package."""

    def load(name):
        *parents, _ = name.split(".")
        if find_spec(parents[0]) is None:
            pytest.skip(f"{parents[0]} is not installed")
        folder = Path(find_spec(parents[0]).submodule_search_locations[0])
        for depth in range(len(parents)):
            package = types.ModuleType(".".join(parents[: depth + 1]))
            package.__path__ = [str(folder.joinpath(*parents[1 : depth + 1]))]
            monkeypatch.setitem(sys.modules, package.__name__, package)
            if depth:
                setattr(sys.modules[".".join(parents[:depth])], parents[depth], package)
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module, package

    return load


def test_trl(monkeypatch):
    pytest.importorskip("trl")
    from trl.experimental.gkd import GKDTrainer

    original = GKDTrainer.generalized_jsd_loss
    monkeypatch.setattr(GKDTrainer, "generalized_jsd_loss", staticmethod(original))  # put back
    same_numbers("trl")
    assert GKDTrainer.generalized_jsd_loss is not original
    run("example", "trl")


def test_an_objective_in_a_string():
    pytest.importorskip("trl")
    names = run("example", "objective", {})
    assert str(names["args"].loss_objective()) == str(names["same"].loss_objective())
    assert names["args"].linear


def test_trls_stable_trainer(tmp_path, monkeypatch):
    """The same loss and gradient of the same generated tokens."""
    pytest.importorskip("trl")
    import hf
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    tokenizer = hf.tokenizer()
    tokenizer.padding_side = "left"
    results, batch = [], None
    for kind in ("before", "after"):
        student, teacher = (hf.model("llama", len(tokenizer), seed=seed) for seed in (0, 1))
        names = {"student": student, "teacher": teacher, "tokenizer": tokenizer}
        names["prompts"] = Dataset.from_list([{"prompt": "the cat"}, {"prompt": "a dog ran"}] * 4)
        trainer = run(kind, "stable", names)["trainer"]
        trainer.max_completion_length = trainer.generation_config.max_new_tokens = 6
        batch = batch or trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        loss = trainer.compute_loss(trainer.model, batch)
        results.append([loss, *torch.autograd.grad(loss, list(trainer.model.parameters()))])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5 * theirs.abs().max().item())


@pytest.fixture
def one_rank(tmp_path):
    """A group of this process alone."""
    dist = pytest.importorskip("torch.distributed")
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_megatron(one_rank, monkeypatch):
    names = inputs()
    state = types.SimpleNamespace(get_tensor_model_parallel_group=lambda: one_rank)
    core = types.ModuleType("megatron.core")
    core.parallel_state = state
    monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.core", core)
    loss_func = run("example", "megatron", {})["loss_func"]
    mask = (names["labels"] != -100).float()
    labels, student = names["labels"].clamp_min(0), names["student_logits"]
    loss, count, _ = loss_func(mask, labels, names["teacher_logits"], student)
    right = reference.drkl(student, names["teacher_logits"], labels, reduction="none")
    torch.testing.assert_close(loss, (right * mask).sum().to(loss.dtype), rtol=1e-5, atol=0)
    assert count == mask.sum()


def test_nemo_rl(one_rank):
    names, K = inputs(), 5
    student, (logits, ids) = names["student_logits"], names["teacher_logits"].topk(K)
    mask = torch.ones(B, T)
    mask[0, 2] = 0
    data = {"teacher_topk_logits": logits, "teacher_topk_indices": ids, "token_mask": mask,
            "sample_mask": torch.tensor([1.0, 0.0])}  # fmt: skip
    loss_fn = run("example", "nemo_rl", {})["distillation_loss"]
    loss = loss_fn(student, data, torch.tensor(7.0), one_rank)
    log_p = logits.log_softmax(-1)
    log_q = student.gather(-1, ids).log_softmax(-1)
    rows = 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    right = rows[0, :-1][mask[0, 1:] > 0].sum() / 7
    torch.testing.assert_close(loss, right, rtol=1e-5, atol=0)


def test_packing_and_num_items():
    """The gradient is that of each sequence alone, and is not where there is a cache."""
    pytest.importorskip("transformers")
    import hf

    def gradients(step, code):
        student, teacher = (hf.model("llama", V, seed=seed) for seed in (0, 1))
        exec(code, {"student": student, "teacher": teacher, "micro_batches": step})
        return torch.cat([p.grad.flatten() for p in student.parameters()])

    def packs():
        return [hf.packed(rows, V, seed=rows) for rows in (2, 3)]

    step = [row for row, _ in packs()]
    for row in step:
        row["labels"] = row["input_ids"].clone()
    packed = gradients(step, BLOCKS["example", "packing"])
    student, teacher = (hf.model("llama", V, seed=seed) for seed in (0, 1))
    total = count = 0
    for x in (x for _, alone in packs() for x in alone):
        s, t = (m(input_ids=x["input_ids"]).logits[:, :-1].double() for m in (student, teacher))
        total += reference.drkl(s, t.detach(), x["labels"][:, 1:], reduction="sum")
        count += x["labels"].shape[1] - 1
    (total / count).backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters()])
    size = expected.abs().max().item()
    torch.testing.assert_close(packed, expected, rtol=0, atol=1e-4 * size)
    code = BLOCKS["example", "packing"].replace("use_cache=False", "use_cache=True")
    cached = gradients([row for row, _ in packs()], code)
    assert (cached - expected).abs().max() > 0.05 * size


def test_logits_in_bfloat16(tmp_path, monkeypatch):
    """A step in each of three ways: the recipe's logits are autocast's, its gradient the same."""
    pytest.importorskip("trl")
    import hf

    from drkl_triton.adapters import trl as adapter

    seen = []
    divergence = adapter.functional.divergence

    def spy(objective, student, teacher, *args, **options):
        seen.append((student.dtype, teacher.dtype))
        return divergence(objective, student, teacher, *args, **options)

    monkeypatch.setattr(adapter.functional, "divergence", spy)
    tokenizer = hf.tokenizer()

    def step(trainer_class, **options):
        args = adapter.DRKLConfig(
            str(tmp_path), max_steps=1, per_device_train_batch_size=2, lmbda=0.0, report_to=[],
            use_cpu=True, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, save_strategy="no",
            lr_scheduler_type="constant", disable_tqdm=True, activation_checkpointing=False,
            **options,
        )  # fmt: skip
        student, teacher = (hf.model("llama", len(tokenizer), seed=seed) for seed in (0, 1))
        before = torch.cat([p.detach().clone().flatten() for p in student.parameters()])
        trainer_class(
            model=student,
            teacher_model=teacher,
            args=args,
            train_dataset=hf.conversations(),
            processing_class=tokenizer,
        ).train()
        return before - torch.cat([p.detach().flatten() for p in student.parameters()])

    recipe = step(run("example", "bfloat16", {})["BFloat16LogitsTrainer"])
    wrapped, exact = step(adapter.DRKLTrainer), step(adapter.DRKLTrainer, bf16=False)
    assert seen == [(torch.bfloat16,) * 2, (torch.float32,) * 2, (torch.float32,) * 2]
    for gradient in (recipe, wrapped):
        assert torch.cosine_similarity(gradient, exact, dim=0) > 0.99
    assert torch.cosine_similarity(recipe, wrapped, dim=0) > 0.999


def test_ms_swift(one_file, monkeypatch):
    theirs = one_file("swift.rlhf_trainers.gkd_loss")[0].jsd_loss
    same_numbers("swift")
    # a vocabulary that is split, and another beta, still go to their function
    gkd = sys.modules["swift.rlhf_trainers.gkd_loss"]
    s, t = torch.randn(2, 4, V)
    calls = []

    def log_softmax(x):
        calls.append(1)
        return x.log_softmax(-1)

    gkd.jsd_loss(s, t, 1, log_softmax, gkd.default_kl_div, 512)
    assert len(calls) == 2
    # vocabularies of different sizes: columns filled in from the other model
    for sizes in ((V, V - 2), (V - 2, V)):
        x = inputs()
        student = x["student_logits"].detach()[..., : sizes[0]].clone().requires_grad_()
        teacher = x["teacher_logits"][..., : sizes[1]]
        losses = []
        for function in (run("before", "swift")["gkd"].jsd_loss, theirs):
            monkeypatch.setattr(gkd, "jsd_loss", function)
            out = gkd.TeacherOutput(full_logits=teacher.clone(), labels=x["labels"])
            losses.append(gkd.gkd_loss(student.clone(), out, x["labels"], 1.0, 2.0)[0])
        grads = [torch.autograd.grad(loss, student)[0] for loss in losses]
        torch.testing.assert_close(losses[0], losses[1])
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
    assert gkd.jsd_loss(s, t, 0.5) > 0


def test_torchtune(one_file):
    module, package = one_file("torchtune.modules.loss.kd_losses")
    package.ReverseKLLoss = module.ReverseKLLoss
    same_numbers("torchtune", ("loss", "total"))


def test_kl_div():
    same_numbers("kl_div")
    x = inputs()
    log_q, log_p = (x[k].log_softmax(-1) for k in ("student_logits", "teacher_logits"))
    from drkl_triton import reverse_kl

    for reduction, ours in (
        ("mean", reverse_kl(x["student_logits"], x["teacher_logits"]) / V),
        ("sum", reverse_kl(x["student_logits"], x["teacher_logits"], reduction="sum")),
    ):
        theirs = F.kl_div(log_p, log_q, log_target=True, reduction=reduction)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["distillm", "minillm"])
def test_distillm_and_minillm(name):
    from drkl_triton import drkl

    x = inputs()
    batch = {"label": x["labels"]}
    names = {"logits": x["student_logits"], "teacher_logits": x["teacher_logits"]}
    names["no_model_batch"] = batch
    after = run("after", name, names)
    expected = drkl(x["student_logits"], x["teacher_logits"], x["labels"], gamma=0.5)
    key = "loss_drkl" if name == "distillm" else "distil_loss"
    assert torch.equal(after[key], expected)
    # tests/test_adapters_distillm.py holds its reverse_kl against the dense formula


def test_what_is_to_be_installed_can_be():
    """This package from a clone, others by their names, TRL as the extra asks for it."""
    (wanted,) = re.findall(r'"trl": \["(.+?)"\]', (ROOT / "setup.py").read_text())
    files = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("drkl_triton/**/*.py")]
    advice = [
        (file.name, name)
        for file in files
        for name in re.findall(r"pip install '?([^'\"`\s]+)", file.read_text(encoding="utf-8"))
    ]
    assert {name for _, name in advice} == {".", wanted, "safetensors", "pyarrow"}, advice


def test_the_page_names_the_releases_it_was_tried_with():
    names = {"TRL": "trl", "ms-swift": "ms-swift", "torchtune": "torchtune"}
    for title, package in names.items():
        pattern = rf"\[{re.escape(title)}\]\(#[\w-]+\) (\S+),"
        assert re.search(pattern, PAGE).group(1) == installed(package), title


def test_links():
    anchors = {
        re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^##+ (.+)$", PAGE, re.MULTILINE)
    }
    for target in re.findall(r"\]\(#([\w-]+)\)", PAGE):
        assert target in anchors, target
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
