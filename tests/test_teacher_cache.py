"""drkl_triton/teacher_cache.py: what is written comes back, an interrupted run goes on, and what
does not fit is refused.
"""

import importlib
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from drkl_triton import SparseTeacher, reverse_kl

pytest.importorskip("safetensors")

from drkl_triton.teacher_cache import load_teacher, save_teacher, saved_keys  # noqa: E402

INF = float("inf")
quiet = dict(progress=False)


def teacher(T, K=3, **more):
    ids = torch.randint(0, 100, (T, K))
    return SparseTeacher(ids, -torch.rand(T, K) - 1, label_log_probs=-torch.rand(T), **more)


def same(x, y, dtype=torch.float32):
    assert torch.equal(x.ids.long(), y.ids) and x.ids.dtype == torch.int32
    assert torch.equal(x.log_probs, y.log_probs.to(dtype)) and x.log_probs.dtype == dtype
    assert torch.equal(x.label_log_probs, y.label_log_probs)
    assert (x.tail, x.normalised) == (y.tail, y.normalised)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    documents = {f"doc{i}": teacher(4 + i, tail="uniform") for i in range(5)}
    assert save_teacher(tmp_path, documents.items(), dtype=dtype, shard_tokens=9, **quiet) == 5
    cache = load_teacher(tmp_path, kind="sparse", temperature=1.0)
    assert cache.keys == list(documents) and len(cache) == 5 and "doc3" in cache
    for key, right in documents.items():
        same(cache[key], right, dtype)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_hidden_states_and_their_batches(tmp_path):
    documents = {"a": torch.randn(5, 8), "b": torch.randn(3, 8)}
    save_teacher(tmp_path, documents.items(), **quiet)
    cache = load_teacher(tmp_path, kind="hidden")
    batch = cache.batch(["b", "a"])
    assert batch.shape == (2, 5, 8)
    assert torch.equal(batch[0, :3], documents["b"]) and (batch[0, 3:] == 0).all()


def test_a_cache_that_was_read_goes_to_other_processes(tmp_path):
    save_teacher(tmp_path, [(i, torch.full((2, 2), float(i))) for i in range(6)], **quiet)
    cache = load_teacher(tmp_path)
    assert (cache[1] == 1).all()
    copied = pickle.loads(pickle.dumps(cache))
    assert (copied[1] == 1).all()
    loader = torch.utils.data.DataLoader(range(6), 3, num_workers=1, collate_fn=cache.batch)
    assert [batch[:, 0, 0].tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5]]


def test_batches_of_unequal_documents(tmp_path):
    documents = {"a": teacher(5), "b": teacher(2)}
    save_teacher(tmp_path, documents.items(), **quiet)
    batch = load_teacher(tmp_path).batch(["a", "b"])
    assert batch.ids.shape == (2, 5, 3)
    assert (batch.ids[1, 2:] == -1).all() and (batch.log_probs[1, 2:] == -INF).all()
    assert torch.equal(batch.log_probs[1, :2], documents["b"].log_probs)


def test_an_interrupted_run_goes_on(tmp_path):
    documents = {f"doc{i}": teacher(10) for i in range(6)}
    computed = []

    def until(stop):
        done = saved_keys(tmp_path)
        for i, (key, value) in enumerate(documents.items()):
            if key in done:
                continue
            if i == stop:
                raise KeyboardInterrupt
            computed.append(key)
            yield key, value

    with pytest.raises(KeyboardInterrupt):
        save_teacher(tmp_path, until(3), shard_tokens=20, **quiet)
    assert saved_keys(tmp_path) == {"doc0", "doc1", "doc2"}
    assert save_teacher(tmp_path, until(None), shard_tokens=20, **quiet) == 3
    assert computed == list(documents)
    cache = load_teacher(tmp_path)
    for key, right in documents.items():
        same(cache[key], right)
    assert save_teacher(tmp_path, documents.items(), **quiet) == 0


KILLED = """
import os, sys, torch
from drkl_triton.teacher_cache import save_teacher

def documents():
    for i in range(4):
        if i == 3:
            os._exit(9)
        yield i, torch.full((10, 2), float(i))

save_teacher(sys.argv[1], documents(), shard_tokens=20, progress=False)
"""


def test_a_killed_run_goes_on(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True)
    assert killed.returncode == 9, killed.stderr.decode()
    assert saved_keys(tmp_path) == {0, 1}  # the shard of the third was not full
    # what a kill leaves in the middle of a shard, and between a shard and the manifest
    (tmp_path / "shard-00001.safetensors.tmp").write_bytes(b"half")
    (tmp_path / "shard-00001.safetensors").write_bytes(b"whole, and unknown to the manifest")
    assert len(load_teacher(tmp_path)) == 2
    rest = ((i, torch.full((10, 2), float(i))) for i in range(4))
    assert save_teacher(tmp_path, rest, **quiet) == 2
    cache = load_teacher(tmp_path)
    assert list(cache) == [0, 1, 2, 3]
    assert all((cache[i] == i).all() for i in cache)
    assert not list(tmp_path.glob("*.tmp"))


def test_keys_keep_their_type(tmp_path):
    documents = {3: torch.zeros(1, 2), "3": torch.ones(1, 2), np.int64(4): torch.ones(2, 2)}
    assert save_teacher(tmp_path, documents.items(), **quiet) == 3
    assert saved_keys(tmp_path) == {3, "3", 4}
    assert save_teacher(tmp_path, documents.items(), **quiet) == 0
    cache = load_teacher(tmp_path)
    assert list(cache) == cache.keys == [3, "3", 4] and 3 in cache and "4" not in cache
    assert (cache[3] == 0).all() and (cache["3"] == 1).all()
    assert cache.batch(torch.tensor([3, 4])).shape == (2, 2, 2)
    with pytest.raises(TypeError, match="strings or integers"):
        save_teacher(tmp_path, [((1, 2), torch.zeros(1, 2))], **quiet)


def test_what_the_caller_does_later_to_its_tensors(tmp_path):
    """Documents are views of one buffer, which is written to before the shard is."""
    buffer = torch.zeros(2, 4, 8)

    def documents():
        yield "a", buffer[0]
        yield "again", buffer[0]
        yield "b", buffer[1].T  # [8, 4]: refused below
        buffer.fill_(7)

    with pytest.raises(ValueError, match="width"):
        save_teacher(tmp_path, documents(), **quiet)

    def square():
        yield "c", buffer[1, :, :8]
        buffer.fill_(7)
        yield "d", buffer[0].expand(4, 8)

    save_teacher(tmp_path, square(), **quiet)
    cache = load_teacher(tmp_path)
    assert [cache[key].unique().tolist() for key in ("a", "again", "c", "d")] == [
        [0],
        [0],
        [0],
        [7],
    ]


def test_log_z_and_documents_without_a_token(tmp_path):
    given = teacher(4, log_z=torch.rand(4, 2))
    none = teacher(0, log_z=torch.rand(0, 2))
    save_teacher(tmp_path, [("a", given), ("none", none)], temperature=2.0, **quiet)
    cache = load_teacher(tmp_path, temperature=2.0)
    assert torch.equal(cache["a"].log_z, given.log_z) and cache["none"].ids.shape == (0, 3)
    batch = cache.batch(["none", "a"])
    assert batch.log_z.shape == (2, 4, 2) and (batch.ids[0] == -1).all()
    loss = reverse_kl(torch.randn(2, 4, 100), batch, temperature=2.0)
    assert loss.isfinite() and loss > 0


def test_vocabulary(tmp_path):
    document = SparseTeacher(torch.tensor([[5, -1]]), torch.tensor([[-0.5, -INF]]))
    save_teacher(tmp_path, [("a", document)], vocabulary=6, **quiet)
    load_teacher(tmp_path, vocabulary=6)
    with pytest.raises(ValueError, match="was written with vocabulary 6, got 7"):
        load_teacher(tmp_path, vocabulary=7)
    with pytest.raises(ValueError, match="its vocabulary is 7, the cache's 6"):
        save_teacher(tmp_path, [], vocabulary=7, **quiet)
    with pytest.raises(ValueError, match="the id 5, outside of the vocabulary of 5"):
        save_teacher(tmp_path / "other", [("a", document)], vocabulary=5, **quiet)


def test_two_writers_are_noticed(tmp_path):
    def documents():
        yield "a", torch.zeros(2, 2)
        save_teacher(tmp_path, [("b", torch.zeros(2, 2))], **quiet)
        yield "c", torch.zeros(2, 2)

    with pytest.raises(ValueError, match="another process wrote"):
        save_teacher(tmp_path, documents(), **quiet)
    assert load_teacher(tmp_path).keys == ["b"]


def test_what_cannot_be_a_teacher(tmp_path):
    for wrong in (torch.zeros(2, 2).long(), torch.zeros(2), [[0.5]]):
        with pytest.raises(ValueError, match=r"hidden states \[T, H\], got"):
            save_teacher(tmp_path, [("a", wrong)], **quiet)
    with pytest.raises(ValueError, match="dtype must be one of torch.float32"):
        save_teacher(tmp_path, [], dtype=torch.int8, **quiet)


def test_the_bar_is_optional(tmp_path, monkeypatch, capsys):
    documents = {"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}
    pytest.importorskip("tqdm")
    save_teacher(tmp_path / "bar", documents.items(), total=2)
    assert "2/2" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert save_teacher(tmp_path / "none", documents.items(), total=2) == 2
    assert capsys.readouterr().err == ""


def test_without_safetensors(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "drkl_triton.teacher_cache")
    with pytest.raises(ImportError, match="pip install safetensors"):
        importlib.import_module("drkl_triton.teacher_cache")


class Tokenizer:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


def test_what_does_not_fit_is_refused(tmp_path):
    ours, other = Tokenizer("a", "b"), Tokenizer("b", "a")
    save_teacher(tmp_path, [("a", teacher(4))], tokenizer=ours, **quiet)
    load_teacher(tmp_path, tokenizer=Tokenizer("a", "b"))
    for wrong, words in (
        (dict(tokenizer=other), "tokenizer"),
        (dict(temperature=2.0), "temperature"),
        (dict(kind="hidden"), "kind"),
    ):
        with pytest.raises(ValueError, match=f"was written with {words}"):
            load_teacher(tmp_path, **wrong)
    for document, options, words in (
        (teacher(4, K=2), {}, "width is 2, the cache's 3"),
        (teacher(4), dict(dtype=torch.bfloat16), "dtype"),
        (teacher(4), dict(temperature=2.0), "temperature"),
        (teacher(4), dict(tokenizer=other), "tokenizer"),
        (teacher(4, tail="drop"), {}, "tail"),
        (torch.randn(4, 8), {}, "kind"),
    ):
        options = {"tokenizer": ours} | options
        with pytest.raises(ValueError, match=words):
            save_teacher(tmp_path, [("b", document)], **options, **quiet)
    assert saved_keys(tmp_path) == {"a"}
    with pytest.raises(ValueError, match="tokenizer"):  # also where nothing is new
        save_teacher(tmp_path, [("a", teacher(4))], tokenizer=other, **quiet)
    with pytest.raises(ValueError, match="one sequence"):
        batch = SparseTeacher(torch.zeros(1, 4, 3).long(), torch.zeros(1, 4, 3))
        save_teacher(tmp_path, [("c", batch)], tokenizer=ours, **quiet)
    with pytest.raises(KeyError, match="no document 'z'"):
        load_teacher(tmp_path)["z"]


def test_what_came_before_an_error_is_kept(tmp_path):
    with pytest.raises(ValueError, match="width"):
        save_teacher(tmp_path, [("a", teacher(4)), ("b", teacher(4, K=2))], **quiet)
    assert saved_keys(tmp_path) == {"a"}


def test_damaged_caches(tmp_path):
    with pytest.raises(FileNotFoundError, match="save_teacher"):
        load_teacher(tmp_path)
    assert saved_keys(tmp_path) == set()
    save_teacher(tmp_path, [("a", teacher(4))], **quiet)
    shard = tmp_path / "shard-00000.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="bytes, not"):
        load_teacher(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match="is missing"):
        load_teacher(tmp_path)
    shard.write_bytes(b"x" * len(whole))
    cache = load_teacher(tmp_path)
    with pytest.raises(ValueError, match="cannot be read"):
        cache["a"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"format": 9}))
    with pytest.raises(ValueError, match="has format 9, this version reads 1"):
        load_teacher(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": 1, "sha')
    with pytest.raises(ValueError, match="manifest.json cannot be read"):
        load_teacher(tmp_path)


def test_no_documents(tmp_path):
    assert save_teacher(tmp_path, [], **quiet) == 0
    with pytest.raises(FileNotFoundError):
        load_teacher(tmp_path)
