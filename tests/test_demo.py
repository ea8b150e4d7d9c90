"""examples/distill: its metrics against numbers by hand, its data split, and one tiny run of it."""

import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for name in ("matplotlib", "tokenizers", "tqdm"):
    pytest.importorskip(name)

DEMO = Path(__file__).resolve().parents[1] / "examples" / "distill"
sys.path.append(str(DEMO))  # as `python examples/distill/run.py` would have it
data, evaluate, memory, model, report, train = (
    importlib.import_module(name)
    for name in ("data", "evaluate", "memory", "model", "report", "train")
)
_spec = importlib.util.spec_from_file_location("demo_run", DEMO / "run.py")  # bench has a run
run = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run)
ln = math.log

TINY = """--max-mb 0.3 --vocab 300 --context 32 --batch 2 --threads 2
    --teacher-steps 6 --teacher-width 16 --teacher-layers 1
    --student-steps 4 --pretrain-steps 2 --student-width 8 --evaluations 2
    --windows 4 --prompts 2 --samples 2 --quick --dtype float32""".split()


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# --- diversity ---


def test_distinct_2_by_hand():
    # Bigrams 12 21 12 and 12 23: three different ones of five.
    assert evaluate.distinct([[1, 2, 1, 2], [1, 2, 3]]) == pytest.approx(3 / 5)
    assert evaluate.distinct([[1], [2]]) == 0.0


@pytest.mark.parametrize(
    ("hypothesis", "references", "expected"),
    [
        ([1, 2, 3, 4], [[1, 2, 3, 4]], 1.0),
        ([1, 2, 3, 4], [[5, 6, 7, 8]], 0.0),
        # Precisions 3/4, 2/3, 1/2, 0 of 1 (smoothed to 0.1); one token short of the reference.
        (
            [1, 2, 3, 4],
            [[1, 2, 3, 5, 6]],
            math.exp(1 - 5 / 4) * (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25,
        ),
        # Four 1s count no more often than in the reference; the hypothesis is longer: no penalty.
        ([1, 1, 1, 1], [[1, 2]], (1 / 4 * 0.1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25),
        # Each n-gram's allowance is the largest of any reference, not their sum: 1 1 of 1 1 1.
        ([1, 1, 1], [[1, 1, 2], [1, 2, 1]], (2 / 3 * 1 / 2 * 0.1 / 1 * 0.1 / 1) ** 0.25),
        # References one shorter and one longer: the shorter one counts, so no penalty.
        ([1, 2, 3], [[1, 2], [9, 9, 9, 9]], (2 / 3 * 1 / 2 * 0.1 / 1 * 0.1 / 1) ** 0.25),
    ],
)
def test_bleu_by_hand(hypothesis, references, expected):
    assert evaluate.bleu(hypothesis, references) == pytest.approx(expected, rel=1e-12)


def test_self_bleu_by_hand():
    same, other = [1, 2, 3, 4], [5, 6, 7, 8]
    assert evaluate.self_bleu([same, same, same]) == pytest.approx(1.0)
    # The first two find each other, the third nobody.
    assert evaluate.self_bleu([same, same, other]) == pytest.approx(2 / 3)
    samples = torch.tensor([[same, same], [same, other]])
    expected = {"distinct_2": (3 / 6 + 6 / 6) / 2, "self_bleu": (1.0 + 0.0) / 2}
    assert evaluate.diversity(samples) == pytest.approx(expected)


# --- divergences and calibration ---


def test_token_metrics_by_hand():
    q, p = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    # Logits at the first position; the second has no next token and must not matter.
    student = torch.stack([q.log() + 3.0, torch.full((3,), 50.0)])[None]
    teacher = torch.stack([p.log() - 5.0, torch.tensor([9.0, 0.0, 0.0])])[None]
    metrics = evaluate.token_metrics(student, teacher, torch.tensor([[2, 0]]))  # the label is 0
    expected = {
        "cross_entropy": ln(2),
        "kl_teacher_student": 0.25 * ln(1 / 2) + 0.5 * ln(2),
        "kl_student_teacher": 0.5 * ln(2) + 0.25 * ln(1 / 2),
        # Without the label: q̂ = (1/2, 1/2), p̂ = (1/3, 2/3).
        "tail_student_teacher": 0.5 * ln(3 / 2) + 0.5 * ln(3 / 4),
        "tail_teacher_student": 1 / 3 * ln(2 / 3) + 2 / 3 * ln(4 / 3),
        "agreement": 0.0,
        "accuracy": 1.0,
        "confidence": 0.5,
        "label_probability": 0.5,
        "label_probability_teacher": 0.25,
        "entropy": 0.5 * ln(2) + 2 * 0.25 * ln(4),
    }
    assert {key: value.shape for key, value in metrics.items()} == dict.fromkeys(expected, (1,))
    got = {key: value.item() for key, value in metrics.items()}
    assert got == pytest.approx(expected, rel=1e-5)


def test_forward_kl_objective_by_hand():
    q, p = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    student = torch.stack([q.log(), q.log(), p.log()])[None]
    teacher = torch.stack([p.log(), q.log(), q.log()])[None]
    tokens = torch.tensor([[0, 1, 2]])
    label, objective = train.make_objective("fkl")
    # The mean of the first two positions; the last predicts nothing.
    assert objective(student, teacher, tokens).item() == pytest.approx(0.25 * ln(2) / 2, rel=1e-5)
    assert label == "forward KL"


def test_kl_leaves_out_what_p_excludes():
    inf = math.inf
    log_p, log_q = torch.tensor([0.0, -inf, -inf]), torch.tensor([ln(0.5), ln(0.5), -inf])
    assert evaluate.kl(log_p, log_q).item() == pytest.approx(ln(2))
    assert evaluate.kl(log_q, log_p).item() == inf


def test_calibration_error_by_hand():
    # Bins of 1/15: the first two share one (accuracy 1/2), 0.5 is alone and right.
    confidence, correct = torch.tensor([0.95, 0.97, 0.5]), torch.tensor([1.0, 0.0, 1.0])
    bins = evaluate.reliability_bins(confidence, correct)
    assert bins["count"] == [0.0] * 7 + [1.0] + [0.0] * 6 + [2.0]
    expected = 2 / 3 * abs(0.5 - 0.96) + 1 / 3 * abs(1.0 - 0.5)
    assert evaluate.expected_calibration_error(bins) == pytest.approx(expected, rel=1e-6)
    edges = evaluate.reliability_bins(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert edges["count"] == [1.0] + [0.0] * 13 + [1.0]


# --- numbers over seeds ---


def test_intervals_by_hand():
    assert report.summary([3.0]) == (3.0, None)
    # Mean 2, standard deviation 1, t(2 degrees) = 4.303.
    assert report.summary([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.303 / math.sqrt(3)))
    for freedom, published in ((11, 2.201), (15, 2.131), (30, 2.042), (120, 1.980)):
        assert report.t_quantile(freedom) == pytest.approx(published, abs=0.003)


# --- data ---


@pytest.fixture
def sources(tmp_path):
    folder = tmp_path / "sources"
    for i in range(60):
        path = folder / f"part{i % 3}" / f"file{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def f{i}(x):\n    return x + {i}\n" * 3)
    (folder / "part0" / "copy.py").write_text((folder / "part0" / "file0.py").read_text())
    (folder / "part0" / "empty.py").write_text("\n")
    (folder / "tests").mkdir()
    (folder / "tests" / "test_it.py").write_text("skipped = True\n")
    return folder


def test_split_shares_no_file_and_is_the_same_each_time(sources, tmp_path):
    corpus, again = (data.load_corpus(sources, tmp_path, vocab=300, max_mb=1.0) for _ in range(2))
    train_files, held_out = set(corpus.train_files), set(corpus.held_out_files)
    assert not train_files & held_out
    assert len(train_files | held_out) == 60  # the copy, the empty file and the test are left out
    assert 0 < len(held_out) < 20
    assert (again.train_files, again.held_out_files) == (corpus.train_files, corpus.held_out_files)
    assert torch.equal(again.train, corpus.train)
    assert torch.equal(again.held_out, corpus.held_out)


def test_split_of_a_file_does_not_depend_on_the_others(sources, tmp_path):
    before = data.load_corpus(sources, tmp_path, vocab=300, max_mb=1.0)
    for i in range(30):
        (sources / "part1" / f"new{i}.py").write_text(f"new = {i}\n")
    after = data.load_corpus(sources, tmp_path, vocab=300, max_mb=1.0)
    assert len(after.train_files) + len(after.held_out_files) == 90
    assert set(before.train_files) < set(after.train_files)
    assert set(before.held_out_files) < set(after.held_out_files)


def test_size_cap(sources):
    capped = data.find_sources(sources, max_mb=0.0015)
    assert capped == data.find_sources(sources)[: len(capped)]
    assert 0 < sum(len(text) for _, text in capped) <= 1500


def test_tokens_are_the_text_again(sources, tmp_path):
    corpus = data.load_corpus(sources, tmp_path, vocab=300, max_mb=1.0)
    text = corpus.tokenizer.decode(corpus.held_out.tolist(), skip_special_tokens=True)
    assert text == "".join((sources / name).read_text() for name in corpus.held_out_files)


def test_batches_depend_on_salt_and_step_alone():
    tokens = torch.arange(1000)
    one = data.training_batch(tokens, 4, 16, "students/0", 3)
    assert torch.equal(one, data.training_batch(tokens, 4, 16, "students/0", 3))
    assert not torch.equal(one, data.training_batch(tokens, 4, 16, "students/1", 3))
    assert not torch.equal(one, data.training_batch(tokens, 4, 16, "students/0", 4))
    assert torch.equal(one - one[:, :1], torch.arange(16).expand(4, 16))


def test_held_out_windows_do_not_overlap():
    windows = data.held_out_windows(torch.arange(1000), 20, 16)
    assert windows.shape == (20, 16)
    assert windows.flatten().unique().numel() == windows.numel()
    assert data.held_out_windows(torch.arange(40), 20, 16).shape == (2, 16)


# --- model and sampling ---


def small_model(seed=0):
    torch.manual_seed(seed)
    return model.Transformer(model.ModelConfig(vocab=50, width=16, layers=2, heads=2))


@torch.no_grad()
def test_model_is_causal_and_its_cache_changes_nothing():
    network, tokens = small_model(), torch.randint(50, (2, 12))
    logits = network(tokens)
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 50
    torch.testing.assert_close(network(changed)[:, :8], logits[:, :8])
    caches = [{} for _ in network.blocks]
    steps = [network(tokens[:, :5], caches)]
    steps += [network(tokens[:, t : t + 1], caches) for t in range(5, 12)]
    torch.testing.assert_close(torch.cat(steps, 1), logits)


def test_samples_follow_the_distribution():
    class Constant(torch.nn.Module):
        config, blocks = model.ModelConfig(3, 1, 1, 1), ()

        def forward(self, tokens, caches):
            return torch.tensor([ln(0.7), -math.inf, ln(0.3)]).expand(*tokens.shape, 3)

    prompts = torch.zeros(2, 4, dtype=torch.long)
    samples = evaluate.sample(Constant(), prompts, per_prompt=50, length=100, seed=0)
    assert samples.shape == (2, 50, 100)
    share = torch.bincount(samples.flatten(), minlength=3) / samples.numel()
    assert share[1] == 0
    assert share[0].item() == pytest.approx(0.7, abs=5 * math.sqrt(0.7 * 0.3 / samples.numel()))


@torch.no_grad()
def test_sample_nll_scores_the_samples_alone():
    network, prompts = small_model(), torch.randint(50, (2, 5))
    samples = torch.randint(50, (2, 3, 7))
    whole = torch.cat([prompts.repeat_interleave(3, 0), samples.flatten(0, 1)], 1)
    losses = torch.nn.functional.cross_entropy(
        network(whole)[:, :-1].transpose(1, 2), whole[:, 1:], reduction="none"
    )
    expected = losses[:, 4:].mean().item()
    assert evaluate.sample_nll(network, prompts, samples) == pytest.approx(expected, rel=1e-5)


# --- training ---


def train_two(path, objective_of_first=None):
    """Two students of 8 steps, two evaluations; their weights and history."""
    names = ("rkl", "drkl:0.5")
    learners = {name: train.Learner(small_model(), train.make_objective(name)[1]) for name in names}
    if objective_of_first:
        learners["rkl"].objective = objective_of_first
    torch.manual_seed(1)
    history, _ = train.train(
        learners,
        torch.randint(50, (500,)),
        train.TrainConfig(steps=8, batch=2, context=16, lr=1e-2, evaluations=2),
        salt="test",
        device=torch.device("cpu"),
        dtype=torch.float32,
        path=path,
        evaluate=lambda: {name: {"cross_entropy": 1.0} for name in names},
        teacher=small_model(seed=5).requires_grad_(False),
    )
    return {name: learner.model.state_dict() for name, learner in learners.items()}, history


def test_interrupted_training_goes_on_bit_for_bit(tmp_path):
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    expected = train_two(tmp_path / "whole.pt")
    calls = []

    def interrupting(student_logits, teacher_logits, tokens):
        calls.append(None)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return train.make_objective("rkl")[1](student_logits, teacher_logits, tokens)

    with pytest.raises(KeyboardInterrupt):
        train_two(tmp_path / "parts.pt", interrupting)
    assert len(calls) == 3
    assert signal.getsignal(signal.SIGINT) is before
    assert train.cache.load(tmp_path / "parts.pt")["step"] == 3
    weights, history = train_two(tmp_path / "parts.pt")
    assert history == expected[1]
    assert [len(history["rkl"][key]) for key in ("loss", "gradient_norm", "held_out")] == [8, 8, 3]
    for name, state in expected[0].items():
        assert all(torch.equal(weights[name][key], value) for key, value in state.items())
    assert train_two(tmp_path / "parts.pt")[1] == history  # finished: nothing is trained again


def test_learning_rate_schedule():
    config = train.TrainConfig(steps=100, batch=1, context=8, lr=1.0, evaluations=5)
    assert [config.lr_at(step) for step in (0, 4, 5)] == pytest.approx([0.2, 1.0, 1.0])
    assert config.lr_at(99) == pytest.approx(0.1, abs=1e-3)
    assert config.evaluation_steps() == {20, 40, 60, 80, 100}


# --- from hidden states ---


def distinct_model(seed):
    """Logits of some nats, so that the divergences between two such models are far above the
    rounding of their sums."""
    network = small_model(seed)
    network.embedding.weight.data *= 30
    return network


class Counted(torch.nn.Module):
    """A teacher that counts what is asked of it."""

    def __init__(self):
        super().__init__()
        self.network, self.heads, self.logits = distinct_model(5).requires_grad_(False), 0, 0

    def head(self, tokens):
        self.heads += 1
        head, counts = self.network.head(tokens), self

        class Watched(model.Head):
            def logits(self):
                counts.logits += 1
                return super().logits()

        return Watched(*head)


# In bfloat16 the logits of the one are rounded and those of the other are not.
@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 2e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("others", [(), ("ce",)])
def test_linear_objectives_train_the_same(dtype, rel, others, tmp_path):
    names, options = ("rkl", "drkl:0.25", "drkl:2"), {"temperature": 1.5}

    def learn(file, make_linear, others=()):
        learners = {}
        for name in (*names, *others):
            objective = make_linear(name, **options)
            linear = objective is not None
            if not linear:
                objective = train.make_objective(name, **options)[1]
            learners[name] = train.Learner(distinct_model(0), objective, linear)
        teacher = Counted()
        torch.manual_seed(1)
        history, _ = train.train(
            learners,
            torch.randint(50, (500,)),
            train.TrainConfig(steps=6, batch=2, context=16, lr=1e-2, evaluations=1),
            salt="test",
            device=torch.device("cpu"),
            dtype=dtype,
            path=tmp_path / file,
            evaluate=lambda: {name: {"cross_entropy": 1.0} for name in learners},
            teacher=teacher,
        )
        assert teacher.heads == 6  # once a batch, for all learners
        assert teacher.logits == (0 if all(one.from_hidden for one in learners.values()) else 6)
        return history

    # 31 rows of 64 columns, 512 bytes for both models: four rows a slice.
    def linear(name, **options):
        return train.make_linear_objective(name, chunk_bytes=2048, **options)

    expected = learn("logits.pt", lambda name, **options: None)
    got = learn("hidden.pt", linear, others)
    for name in names:
        for key in ("loss", "gradient_norm"):
            assert got[name][key] == pytest.approx(expected[name][key], rel=rel), (name, key)
    # Far from each other and from 0: the agreement above is that of one objective alone.
    losses = sorted(expected[name]["loss"][0] for name in names)
    assert losses[0] > 0.1 and all(b > 1.2 * a for a, b in zip(losses, losses[1:], strict=False))


def test_peak_memory_by_hand():
    def allocate():
        a, b = torch.empty(1000), torch.empty(500)
        del a
        return b, torch.empty(900)

    assert memory.peak_of(allocate, torch.device("cpu")) == 4 * 1500


def test_memory_saved_is_that_of_the_logits():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config, cpu = model.ModelConfig(vocab=4096, width=8, layers=1, heads=2), torch.device("cpu")
    student, teacher = model.Transformer(config), model.Transformer(config).requires_grad_(False)
    tokens = torch.randint(4096, (2, 64))
    rows = train.make_linear_objective("rkl", chunk_bytes=8 * 8 * 4096)  # 8 of 126 in a slice
    peaks = [
        memory.measure(learner, teacher, tokens, cpu, torch.float32)
        for learner in (
            train.Learner(student, train.make_objective("rkl")[1]),
            train.Learner(student, rows, from_hidden=True),
        )
    ]
    # Three matrices [128, V]: the logits of both models and the gradient; against two [8, V].
    saved = 4 * (3 * 128 - 2 * 8) * 4096
    scratch = 4 * 3 * 128 // 4 * 4096  # three tiles of a quarter of the rows
    for part in ("loss", "step"):
        assert peaks[0][part] - peaks[1][part] == pytest.approx(saved + scratch, rel=0.1)
    assert all(peak["step"] > peak["loss"] > 0 for peak in peaks)
    assert all(p.grad is None for p in student.parameters())


# --- the whole ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], 'cannot use --device "abacus"'),
        (["--vocab", "100"], "--vocab must be at least 257"),
        (["--student-steps", "0"], "--student-steps must be positive, got 0"),
        (["--student-lr", "nan"], "--student-lr must be positive, got nan"),
        (["--samples", "1"], "--samples must be at least 2"),
        (["--student-width", "30", "--student-heads", "4"], "--student-width must be a multiple"),
        (["--objectives", "rkl", "drkl"], 'GAMMA > 0, got "drkl"'),
        (["--objectives", "drkl:-1"], 'GAMMA > 0, got "drkl:-1"'),
        (["--objectives", "rkl", "rkl"], "names one twice"),
        (["--linear", "--objectives", "ce"], "objectives with a teacher, got ce"),
        (["--linear", "--chunk-mb", "0"], "--chunk-mb must be positive, got 0"),
        (["--sources", "nowhere"], "no such folder: nowhere"),
        (["--sources", "."], "found 0 and 0"),
        (["--out", "file/inside"], "cannot write to file"),
    ],
)
def test_bad_input_is_explained(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert run.main([*TINY, *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err.replace(os.sep, "/")
    assert printed.out == ""


def test_whole_run(tmp_path, capsys):
    command = [sys.executable, str(DEMO / "run.py"), *TINY, "--seeds", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["demo-quick"]
    out = tmp_path / "runs" / "demo-quick"
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert results["seeds"] == [0, 1]
    assert results["data"]["vocab"] == 300
    objectives = results["students"]["objectives"]
    assert list(objectives) == ["fkl", "rkl", "mixed", "jsd", "dkd", "drkl:0.5"]
    for objective in objectives.values():
        assert [len(history["loss"]) for history in objective["history"]] == [4, 4]
        for metric in report.METRICS:
            assert math.isfinite(objective["mean"][metric.key])
            assert objective["interval95"][metric.key] >= 0
    assert results["teacher"]["metrics"]["kl_student_teacher"] == pytest.approx(0, abs=1e-6)
    assert set(results["paired"]["differences"]) == set(objectives) - {"rkl"}
    for name in ("training", "heldout", "reliability", "metrics", "diversity"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "table.txt").read_text(encoding="utf-8")
    assert table.strip() in done.stdout
    assert all(metric.row in table for metric in report.METRICS)
    assert "JSD" in table and "minus RKL, paired by seed" in table
    assert "DRKL γ=0.5, sample 2" in (out / "samples.txt").read_text(encoding="utf-8")
    assert "teacher: 6/6" in done.stderr and len(done.stderr) < 5000
    # The same settings again: everything comes from the cache, to the same numbers.
    stored = sorted((out / "cache").iterdir())
    times = [path.stat().st_mtime_ns for path in stored]
    assert run.main([*TINY, "--seeds", "2", "--out", str(out)]) == 0
    assert table.strip() in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in sorted((out / "cache").iterdir())] == times


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(importlib.import_module("figures"), "write_figures", lambda *_: [])


def test_run_with_a_few_log_probabilities(tmp_path, capsys, no_figures):
    """All columns are the whole teacher; a few are another run, from the same cache."""
    losses, files = {}, {}
    for topk in ("0", "300", "5"):
        names = ["--objectives", "fkl", "rkl", "drkl:0.5", "jsd"]
        options = ["--teacher-topk", topk, "--out", str(tmp_path)]
        assert run.main([*TINY, *names, *options]) == 0
        printed = capsys.readouterr().err
        assert ("log-probabilities a token" in printed) == (topk != "0")
        results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        found = results["students"]["objectives"]
        losses[topk] = [found[name]["history"][0]["loss"] for name in names[1:]]
        files[topk] = len(list((tmp_path / "cache").iterdir()))
    for whole, known, few in zip(*losses.values(), strict=True):
        assert known == pytest.approx(whole, rel=2e-3, abs=1e-6)
        assert few[0] < 0.9 * whole[0]  # of the cells, no more than of all columns
    assert files["0"] + 2 == files["300"] == files["5"] - 2
    for options in (["--teacher-topk", "301"], ["--teacher-topk", "5", "--linear"]):
        assert run.main([*TINY, *options, "--out", str(tmp_path)]) != 0


def test_linear_run(tmp_path, capsys, no_figures):
    results, files = {}, {}
    for way in ((), ("--linear", "--chunk-mb", "0.02")):
        names = ["--objectives", "fkl", "rkl", "drkl:0.5"]
        assert run.main([*TINY, *names, "--out", str(tmp_path), *way]) == 0
        printed = capsys.readouterr().out
        assert ("Peak memory" in printed) == bool(way)
        results[way] = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
        files[way] = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()}
    logits, linear = results.values()
    # Text, teacher and pretrained student are those of the first run, and the students are not.
    before, after = files.values()
    assert before.items() <= after.items()
    assert sorted(p.name.split("-")[0] for p in set(after) - set(before)) == [
        "measured",
        "students",
    ]
    for name, objective in logits["students"]["objectives"].items():
        other = linear["students"]["objectives"][name]
        loss, ce = objective["history"][0]["loss"], objective["mean"]["cross_entropy"]
        rel = 1e-3  # these losses are small differences of large sums
        assert other["history"][0]["loss"] == pytest.approx(loss, rel=rel, abs=0.0)
        assert other["mean"]["cross_entropy"] == pytest.approx(ce, rel=1e-5)
    assert "memory" not in logits
    found = linear["memory"]
    assert found["objective"] == "fkl" and found["tokens"] == 2 * 32
    for part in ("loss", "step"):
        assert 0 < found["hidden"][part] < found["logits"][part]
    saved = found["logits"]["loss"] - found["hidden"]["loss"]
    assert f"({saved / 1e6:.1f} MB saved)" in printed
    assert "V = 300, 64 tokens" in printed
    assert "Peak memory" in (tmp_path / "table.txt").read_text(encoding="utf-8")
