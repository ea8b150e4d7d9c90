"""examples/pretrained: the stages on a small random teacher, and its numbers by hand."""

import hashlib
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

for _name in ("tokenizers", "matplotlib", "tqdm", "transformers", "safetensors"):
    pytest.importorskip(_name)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path += [str(EXAMPLES / "pretrained"), str(EXAMPLES / "distill")]  # as study.py has it
fetch, intervals, measure, smollm, student, study, summary, text = (
    importlib.import_module(name)
    for name in (
        *("fetch", "intervals", "measure", "smollm", "student", "study", "summary", "text"),
    )
)
InputError = study.InputError


class Bytes:
    """A tokenizer."""

    def __call__(self, text):
        return {"input_ids": list(text.encode())}

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")

    def get_vocab(self):
        return {chr(i): i for i in range(256)}


def tiny(layers=5):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


DOCUMENTS = [(f"{1790 + i}_speech", f"In the year {1790 + i} " * 40) for i in range(14)]
SMALL = (
    *("--layers", "2", "--context", "64", "--pool", "8", "--start-tokens", "512"),
    *("--tokens", "512", "--lr-tokens", "256", "--test", "4", "--validation", "2"),
    *("--prompts", "3", "--samples", "2", "--sample-length", "8", "--main-seeds", "3"),
    *("--other-seeds", "1", "--looks", "2", "--lrs", "1e-3", "1e-2"),
)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(fetch, "weights", lambda folder: folder / "none.gguf")
    monkeypatch.setattr(fetch, "texts", lambda folder: DOCUMENTS)
    monkeypatch.setattr(smollm, "load", lambda gguf, device: (tiny().to(device), Bytes()))


def run(folder, *more):
    return study.main(
        [*SMALL, "--out", str(folder / "out"), "--cache", str(folder / "cache"), *more]
    )


FOUR = "--objectives", "reverse_kl", "drkl:0.5", "drkl:favourite", "forward_kl"


def test_whole_study(offline, tmp_path, capsys, monkeypatch):
    assert run(tmp_path, *FOUR) == 0
    out = capsys.readouterr().out
    assert "DRKL γ=0.5" in out and "42 comparisons: by chance alone 2 " in out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    figures = {"differences.png", "plane.png", "pull.png"}
    assert names == figures | {"table.md", "about.json", "intervals.csv", "runs"}
    runs = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "out/runs").iterdir()}
    assert len(runs) == 2 + 4 * 2 + 3 * 3 + 1  # teacher and start, rates, students
    one = runs["drkl-0.5-1"]
    assert len(one["documents"]) == 4 and len(one["prompts"]) == 3
    assert [point["tokens"] for point in one["history"]["held_out"]] == [0, 256, 512]
    assert runs["forward_kl-0"]["history"]["held_out"] == []
    # a teacher is its own teacher
    for document in runs["teacher"]["documents"].values():
        assert document["kl_student_teacher"] == pytest.approx(0, abs=2e-3)  # the cache is float16
        assert document["agreement"] > 0.95
    # objectives differ, seeds differ, the start is the same
    losses = {name: run["history"]["loss"] for name, run in runs.items() if "history" in run}
    assert len({tuple(loss) for loss in losses.values()}) == len(losses)

    # a second start makes nothing anew
    monkeypatch.setattr(student, "train", None)
    monkeypatch.setattr(smollm, "hidden", None)
    assert run(tmp_path, *FOUR) == 0
    assert capsys.readouterr().out == out


def test_interrupted_it_goes_on_to_the_same_numbers(offline, tmp_path, monkeypatch):
    arguments = "--objectives", "reverse_kl", "--main-seeds", "2"
    assert run(tmp_path / "whole", *arguments) == 0
    train, calls = student.train, []

    def interrupted(*args, **keywords):
        calls.append(args)
        if len(calls) == 4:  # the start, two rates, the first student
            raise KeyboardInterrupt
        return train(*args, **keywords)

    monkeypatch.setattr(student, "train", interrupted)
    assert run(tmp_path / "parts", *arguments) == 130
    assert run(tmp_path / "parts", *arguments) == 0
    assert len(calls) == 4 + 2
    tables = [(tmp_path / part / "out/intervals.csv").read_text() for part in ("whole", "parts")]
    assert tables[0] == tables[1]


def test_out_of_time(offline, tmp_path, capsys):
    assert run(tmp_path, "--objectives", "reverse_kl", "--seconds", "0") == 2
    assert "goes on from what is done" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--samples", "1"), "at least 2"),
        (("--tokens", "0"), "--tokens must be at least 1"),
        (("--context", "32"), "--context must be at least 64"),
        (("--layers", "6"), "--layers must be from 1 to the teacher's 5, got 6"),
        (("--test", "13"), "14 documents cannot be split"),
        (("--tokens", "64"), "fewer than --batch 4"),
    ],
)
def test_bad_input_is_explained(arguments, message, offline, tmp_path, capsys):
    assert run(tmp_path, "--objectives", "reverse_kl", *arguments) == 2
    assert message in capsys.readouterr().err


# --- the parts ---


def test_a_student_of_all_layers_is_the_teacher():
    teacher = tiny()
    tokens = torch.randint(0, 256, (2, 9))
    same = smollm.hidden(smollm.student_of(teacher, 5), tokens)
    assert torch.equal(same, smollm.hidden(teacher, tokens))
    half = smollm.student_of(teacher, 3)
    kept = [layer.mlp.up_proj.weight for layer in half.model.layers]
    of_teacher = [layer.mlp.up_proj.weight for layer in teacher.model.layers]
    for one, other in zip(kept, (of_teacher[i] for i in (0, 2, 4)), strict=True):
        assert torch.equal(one, other)
    assert smollm.matrix(half) is half.model.embed_tokens.weight


def test_split_by_document():
    names = [name for name, _ in DOCUMENTS]
    parts = text.split(names, 4, 2)
    assert [len(parts[part]) for part in text.PARTS] == [8, 2, 4]
    assert sorted(sum(parts.values(), [])) == names
    assert text.split(names[::-1], 4, 2) == parts


def test_windows_and_their_order():
    found = text.windows(Bytes(), "a", "x" * 130 + "y" * 70, 50)
    assert [window.key for window in found] == ["a/0", "a/1", "a/2", "a/3"]
    assert all(len(window.tokens) == 50 for window in found)
    some = text.windows(Bytes(), "a", "x" * 500, 50, most=3)
    assert [window.key for window in some] == ["a/0", "a/4", "a/9"]
    one, other = (text.drawn(found, 10, salt) for salt in "ab")
    assert [w.key for w in one] != [w.key for w in other]
    for i in (0, 4):
        assert len({w.key for w in one[i : i + 4]}) == 4
    assert text.drawn(found, 10, "a") == one


def test_samples_of_a_model_follow_its_distribution():
    model = tiny()
    prompts = torch.tensor([[7, 8, 9]])
    drawn = measure.sample(model, prompts, 4000, 1, 0)[0, :, 0]
    q = torch.softmax(model(prompts).logits[0, -1], -1)
    found = torch.bincount(drawn, minlength=256) / 4000
    assert (found - q).abs().max() < 5 * (q.max() / 4000).sqrt()


def test_samples_heed_all_that_came_before():
    model, prompts = tiny(), torch.tensor([[7, 8, 9]])
    for matrix in model.parameters():  # so large that attention changes what is drawn
        if matrix.dim() == 2:
            matrix.mul_(20)
    several = measure.sample(model, prompts, 2, 5, 1)
    assert torch.equal(several, measure.sample(model, prompts, 2, 5, 1))
    without_a_cache, generator = prompts.expand(2, 3), torch.Generator().manual_seed(1)
    for _ in range(5):
        new = measure.draw(model(without_a_cache).logits[:, -1], generator)
        without_a_cache = torch.cat([without_a_cache, new], 1)
    assert torch.equal(several[0], without_a_cache[:, 3:])
    whole = torch.cat([prompts.expand(2, 3), several[0]], 1)
    log_p = model(whole).logits[:, 2:-1].log_softmax(-1)
    right = log_p.gather(-1, several[0, :, :, None]).mean()
    (got,) = measure.log_likelihood(model, prompts, several)
    assert got == pytest.approx(right.item(), rel=1e-5)


def test_repetition_by_hand():
    assert measure.repetition([1, 2, 3, 4, 5]) == 0
    assert measure.repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert measure.repetition([1, 1, 1, 1, 1, 1]) == pytest.approx(2 / 3)
    assert measure.repetition([1, 2]) == 0


def test_the_pull_is_the_derivative(tmp_path):
    """Of (1 - q_y) N with respect to the target's logit."""
    model, other = tiny(2), tiny(3)
    windows = [text.Window("a/0", "a", torch.randint(0, 256, (64,)))]
    given = smollm.hidden(other, windows[0].tokens[None])
    cache = type("Cache", (), {"batch": lambda self, keys: given})()
    setting = student.Setting(smollm.matrix(other), cache, 1, torch.device("cpu"), torch.float32)
    found = measure.pull(model, setting, windows)
    logits = model(windows[0].tokens[None]).logits[0, :-1].double().requires_grad_()
    teacher = (given @ smollm.matrix(other).T)[0, :-1].double()
    labels = windows[0].tokens[1:, None]
    log_q, log_p = logits.log_softmax(-1), teacher.log_softmax(-1)
    q, p = (x.gather(-1, labels)[:, 0].exp() for x in (log_q, log_p))
    rest = [x.scatter(-1, labels, -math.inf).log_softmax(-1) for x in (logits, teacher)]
    N = (rest[0].exp() * (rest[0] - rest[1]).nan_to_num()).sum(-1)
    (grad,) = torch.autograd.grad(((1 - q) * N).sum(), logits)
    slope = -grad.gather(-1, labels)[:, 0]
    assert found["pull"] == pytest.approx(slope[q >= p].mean().item(), rel=1e-4)
    assert found["tail_student_teacher"] == pytest.approx(N.mean().item(), rel=1e-4)
    assert found["sure"] == pytest.approx((q >= p).double().mean().item())


# --- intervals ---


def made(values, metric="entropy"):
    """A run whose documents have these values."""
    return {"documents": {f"d{i}": {metric: x} for i, x in enumerate(values)}}


ENTROPY = intervals.BY_KEY["entropy"]


def test_a_difference_pairs_seeds_and_documents():
    """What a seed or a document does to both sides is not in the interval."""
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(5, 40, generator=draw, dtype=torch.float64) * 3
    noise = torch.randn(5, 40, generator=draw, dtype=torch.float64) * 0.1
    runs = {i: made((base[i] + 0.5 + noise[i]).tolist()) for i in range(5)}
    other = {i: made(base[i % 5].tolist()) for i in range(6)}
    found = intervals.interval(runs, ENTROPY, other)
    assert found.mean == pytest.approx((0.5 + noise.mean()).item())
    assert found.low < found.mean < found.high and found.high - found.low < 0.1
    assert found.seeds == 5 and found.apart
    alone = intervals.interval(runs, ENTROPY)
    assert alone.high - alone.low > 0.5
    # Student's t by hand
    each = noise.mean(1) + 0.5
    half = 2.776 * each.std().item() / math.sqrt(5)
    assert found.t_high - found.mean == pytest.approx(half, rel=1e-3)


def test_intervals_hold_what_they_should_about_as_often_as_they_say():
    draw = torch.Generator().manual_seed(1)
    hits, trials = 0, 200
    for _ in range(trials):
        seeds = torch.randn(8, 1, generator=draw) + torch.randn(8, 30, generator=draw)
        runs = {i: made(row) for i, row in enumerate(seeds.double().tolist())}
        found = intervals.interval(runs, ENTROPY, draws=300)
        hits += found.low <= 0 <= found.high
    assert 0.82 < hits / trials < 0.99  # too narrow with few seeds; hence the second interval


def test_two_seeds_are_never_apart():
    runs = {i: made([5.0, 5.1]) for i in range(2)}
    assert not intervals.interval(runs, ENTROPY, {i: made([0.0, 0.0]) for i in range(2)}).apart


def test_the_spread_between_seeds_over_training():
    def run(*values):
        points = [{"tokens": 10 * i, "kl_student_teacher": x} for i, x in enumerate(values)]
        return {"history": {"held_out": points}}

    nothing = {0: {"history": {"held_out": []}}}
    runs = {
        "forward_kl": nothing,
        "reverse_kl": {0: run(2.0, 1.0), 1: run(2.0, 3.0), 2: run(2.0, 2.0)},
        "drkl:0.5": {1: run(2.0, 3.5), 2: run(2.0, 2.1)},
    }
    found = summary.spread({"runs": runs})
    half = math.sqrt(0.5)
    assert found[0] == [0, 0, 0]
    assert found[10] == pytest.approx([1.0, 1.4 * half, 0.4 * half])
    assert summary.spread({"runs": {"reverse_kl": {0: run(1.0)}}}) == {}
    assert summary.spread({"runs": {"forward_kl": nothing}}) == {}


def test_calibration_error_is_that_of_all_tokens():
    """Two documents that are off in opposite directions in the same bin are calibrated together."""
    ece = intervals.BY_KEY["calibration_error"]
    bins = [
        {"count": [10.0, 0.0], "confidence": [3.0, 0.0], "accuracy": [right, 0.0]}
        for right in (1.0, 5.0)
    ]
    run = {"documents": {f"d{i}": {"reliability": b} for i, b in enumerate(bins)}}
    assert intervals.value(run, ece) == pytest.approx(0.0)
    run["documents"].pop("d1")
    assert intervals.value(run, ece) == pytest.approx(0.2)


# --- fetching ---


def test_a_file_that_is_there_is_checked_and_not_downloaded(tmp_path):
    content = b"weights"
    right = hashlib.sha256(content).hexdigest()
    package = fetch.Package("a.whl", right, ("no-such-command", "a==1"))
    (tmp_path / "a.whl").write_bytes(content)
    assert package.fetch(tmp_path) == tmp_path / "a.whl"
    (tmp_path / "a.whl").write_bytes(b"other")
    with pytest.raises(InputError, match=f"must have the SHA-256 {right}, has .*delete it"):
        package.fetch(tmp_path)


def test_what_cannot_be_downloaded_is_said(tmp_path):
    package = fetch.Package("a.whl", "ab" * 32, ("no-such-command", "a==1"))
    with pytest.raises(InputError, match="no-such-command is not installed.*put a.whl"):
        package.fetch(tmp_path)
    code = "import sys; sys.exit('no route to host')"
    package = fetch.Package("a.whl", "ab" * 32, (sys.executable, "-c", code))
    with pytest.raises(InputError, match="did not bring a.whl: no route to host; is there"):
        package.fetch(tmp_path)
