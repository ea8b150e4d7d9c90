"""drkl_triton/readers.py, on samples in the form that each producer documents (tests/data)."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from drkl_triton import SparseTeacher, readers, reverse_kl

INF = float("inf")
DATA = Path(__file__).parent / "data"


def sample(name):
    return json.loads((DATA / name).read_text(encoding="utf-8"))


def entries(teacher):
    """{(row, id): log-probability} of one sequence."""
    return {
        (t, i): pytest.approx(x)
        for t, (ids, values) in enumerate(
            zip(teacher.ids.tolist(), teacher.log_probs.tolist(), strict=True)
        )
        for i, x in zip(ids, values, strict=True)
        if i >= 0
    }


def test_vllm():
    given = sample("vllm_prompt_logprobs.json")
    prompt, tokens = given["prompt_logprobs"], given["prompt_token_ids"]
    teacher = readers.vllm_prompt_logprobs(prompt, tokens)
    assert entries(teacher) == {
        (t - 1, int(i)): x["logprob"] for t in range(1, 5) for i, x in prompt[t].items()
    }
    assert teacher.ids.shape == (5, 3) and (teacher.ids[-1] == -1).all()
    assert teacher.label_log_probs.tolist() == pytest.approx(
        [-5.2188, -0.1094, -3.0156, -0.3125, -INF]
    )
    # as the engine has them: integers and objects, and bare numbers
    objects = [None, *({int(i): SimpleNamespace(**x) for i, x in p.items()} for p in prompt[1:])]
    numbers = [None, *({int(i): x["logprob"] for i, x in p.items()} for p in prompt[1:])]
    for same in (objects, numbers):
        assert torch.equal(readers.vllm_prompt_logprobs(same).ids, teacher.ids)
        assert torch.equal(readers.vllm_prompt_logprobs(same).log_probs, teacher.log_probs)


def test_a_batch_of_prompts_is_padded_and_trains():
    given = sample("vllm_prompt_logprobs.json")
    prompts = [given["prompt_logprobs"], given["prompt_logprobs"][:3]]
    tokens = [given["prompt_token_ids"], given["prompt_token_ids"][:3]]
    teacher = readers.vllm_prompt_logprobs(prompts, tokens)
    assert teacher.ids.shape == (2, 5, 3) and (teacher.ids[1, 2:] == -1).all()
    labels = torch.tensor([tokens[0], [*tokens[1], -100, -100]])
    student = torch.randn(2, 5, 10000, requires_grad=True)
    loss = reverse_kl(student, teacher, labels, shift=True)
    loss.backward()
    assert loss > 0 and (student.grad[1, 2:] == 0).all() and (student.grad[0, :4] != 0).any()


def test_sglang_and_tinker():
    given = sample("sglang_logprobs.json")
    teacher = readers.sglang_logprobs(given["input_top_logprobs"], given["input_ids"])
    assert entries(teacher) == {
        (0, 1156): -2.4063, (0, 1850): -2.9688, (1, 315): -0.1094, (1, 323): -3.3594,
    }  # fmt: skip
    # the first label is not among the ids
    assert teacher.label_log_probs.tolist() == pytest.approx([-INF, -0.1094, -INF])
    pairs = [None, *([(i, x) for x, i, _ in row] for row in given["input_top_logprobs"][1:])]
    assert torch.equal(readers.tinker_prompt_logprobs(pairs).ids, teacher.ids)


def test_trl_server():
    given = sample("trl_server.json")
    teacher = readers.trl_server(given["logprobs"], given["logprob_token_ids"])
    assert teacher.ids.tolist() == [[[264, 279], [2025, 3405]], [[13, 0], [-1, -1]]]
    assert teacher.log_probs[1, 0].tolist() == [-0.0625, -3.5]


def test_axolotl():
    teacher = readers.axolotl(sample("axolotl.json"))
    assert entries(teacher) == {
        (0, 279): -0.2231, (0, 264): -1.6094, (1, 1156): -0.0513, (1, 1850): -2.9957,
    }  # fmt: skip
    assert teacher.tail == "renormalise" and not teacher.normalised
    reverse_kl(torch.randn(3, 2000), teacher, temperature=2.0)


def test_nemo_rl():
    logits = torch.randn(1, 3, 50)
    values, ids = logits.topk(4)
    teacher = readers.nemo_rl(values, ids)
    assert teacher.tail == "renormalise"
    whole = readers.nemo_rl(values, ids, logits.logsumexp(-1))
    student = torch.randn(1, 3, 50)
    right = SparseTeacher(ids, logits.log_softmax(-1).gather(-1, ids))
    torch.testing.assert_close(reverse_kl(student, whole), reverse_kl(student, right))


def test_verl():
    log_probs = torch.tensor([[[-0.5, -1.5], [-0.25, 0.0], [0.0, 0.0], [0.0, -INF]]])
    ids = torch.tensor([[[7, 9], [4, 2], [0, 0], [5, 0]]], dtype=torch.int32)
    teacher = readers.verl(log_probs, ids)
    assert teacher.ids.tolist() == [[[7, 9], [4, -1], [-1, -1], [5, 0]]]
    assert teacher.log_probs[0, 1].tolist() == [-0.25, -INF]
    masked = readers.verl(log_probs, ids, torch.tensor([[True, False, True, True]]))
    assert masked.ids[0, 1].tolist() == [-1, -1]


def test_distillkit(tmp_path):
    rows = {
        "token_ids": [[[5, 6], [7, 8]], [[1, 2]]],
        "top_values": [[[-0.5, -1.0]] * 2, [[-1.0, -2.0]]],
    }
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    pq.write_table(pa.table(rows), tmp_path / "teacher.parquet")
    first, second = readers.distillkit_parquet(tmp_path / "teacher.parquet")
    assert first.ids.tolist() == [[5, 6], [7, 8], [-1, -1]]
    assert entries(second) == {(0, 1): -1.0, (0, 2): -2.0}


@pytest.mark.parametrize("prompt, words", [
    ([], "the prompt: expected a list by position"),
    ([None, 5], "position 1: expected a mapping"),
    ([None, {"x": -1.0}], "position 1: expected token ids"),
    ([None, {1.5: -1.0}], "position 1: expected token ids"),
    ([None, {-2: -1.0}], "position 1: expected token ids"),
    ([None, {3: None}], "position 1: expected a log-probability"),
    ([None, {3: math.nan}], "position 1: expected log-probabilities"),
    ([None, {3: -1.0}, {4: 0.7}], "position 2: expected log-probabilities, in nats, of at most 0"),
    ([[None, {3: -1.0}], [None, {4: 0.7}]], "position 1 of sequence 1"),
])  # fmt: skip
def test_what_no_server_writes(prompt, words):
    with pytest.raises(ValueError, match=words):
        readers.vllm_prompt_logprobs(prompt)


def test_what_does_not_fit_together():
    with pytest.raises(ValueError, match="a token a position"):
        readers.vllm_prompt_logprobs([None, {3: -1.0}], [1, 2, 3])
    with pytest.raises(ValueError, match="the shape of the token_ids"):
        readers.trl_server([[[-1.0]]], [[[1, 2]]])
    with pytest.raises(ValueError, match="one value a row"):
        readers.verl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3).long(), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="token_id:123"):
        readers.axolotl([[{"token": "the", "logprob": -1.0}]])
    with pytest.raises(ValueError, match="a list of entries"):
        readers.sglang_logprobs([None, "text"])


def test_ragged_and_unknown_positions():
    teacher = readers.vllm_prompt_logprobs([None, {3: -1.0}, None, {1: -2.0, 2: -3.0, 4: -INF}])
    assert entries(teacher) == {(0, 3): -1.0, (2, 1): -2.0, (2, 2): -3.0}
    assert readers.vllm_prompt_logprobs([None]).ids.tolist() == [[-1]]
