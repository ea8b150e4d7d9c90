"""Teachers on disk: K log-probabilities a token, or the last hidden states, by document.

A folder holds ``manifest.json`` and shards, safetensors files of some documents each. A shard is
written whole or not at all, and counts from when the manifest names it: what was interrupted goes
on where it stopped. One process writes to a folder; several take a folder each. Hidden states take
H numbers a token, some hundred times less than logits; the losses from hidden states take them as
``teacher_hidden``.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .sparse import SparseTeacher

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
except ImportError as error:
    raise ImportError("caching teachers needs safetensors; pip install safetensors") from error

__all__ = ["TeacherCache", "load_teacher", "save_teacher", "saved_keys"]

INF = float("inf")
FORMAT = 1
MANIFEST = "manifest.json"
OPTIONAL = ("label_log_probs", "log_z")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_AGAIN = "write the cache anew, or copy it again"


def tokenizer_hash(tokenizer: Any) -> str | None:
    """16 hex digits of its vocabulary (anything with ``get_vocab()``); a string stays as it is."""
    if tokenizer is None or isinstance(tokenizer, str):
        return tokenizer
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def saved_keys(folder: str | Path) -> set[str | int]:
    """The documents that are there; empty where there is no cache yet."""
    manifest = _manifest(Path(folder))
    return {key for shard in (manifest or {"shards": []})["shards"] for key in shard["keys"]}


def save_teacher(
    folder: str | Path,
    documents: Iterable[tuple[str | int, SparseTeacher | Tensor]],
    *,
    tokenizer: Any = None,
    vocabulary: int | None = None,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    shard_tokens: int = 1 << 18,
    total: int | None = None,
    progress: bool = True,
) -> int:
    """Add documents to the cache in ``folder``, which is made if it is missing.

    Args:
        documents: pairs of a key and a SparseTeacher ``[T, K]``, or hidden states ``[T, H]``: one
            of the two in a folder, with one K or H. A key that is there already is left out, after
            its teacher was computed: skip those of :func:`saved_keys` before.
        tokenizer: an object with ``get_vocab()``, or a string that stands for it.
        vocabulary: the number of columns of the student's logits; ids outside are refused.
        temperature: that of the loss that the log-probabilities are for: not 1 where ``log_z`` is
            for another.
        dtype: of the log-probabilities, or hidden states: float32, bfloat16 or float16. Sums of
            bfloat16 probabilities are off by 1 %, which is the tail's.
        shard_tokens: tokens of a shard, which is in memory until it is written.
        total: of the progress bar (tqdm, where it is installed).

    Returns:
        How many documents were added.

    Raises:
        TypeError: a key that is no string or integer.
        ValueError: what does not fit the cache that is there, in kind, K or H, dtype, tail,
            tokenizer, vocabulary or temperature.

    What came before an error, from here or from ``documents``, is written.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _manifest(folder)
    given = {"tokenizer": tokenizer_hash(tokenizer), "vocabulary": vocabulary}
    given |= {"temperature": float(temperature), "dtype": str(dtype).removeprefix("torch.")}
    known = saved_keys(folder)
    if manifest is not None:
        _fits(manifest, given, "what is passed", folder)
    waiting: list[tuple[str | int, dict]] = []
    tokens = added = 0

    def flush() -> None:
        nonlocal waiting, tokens, added
        if waiting:
            documents, waiting, tokens = waiting, [], 0
            _write_shard(folder, manifest, documents)
            added += len(documents)

    try:
        for key, teacher in _bar(documents, total, progress):
            key = _key(key)
            if key in known:
                continue
            tensors, kind = _tensors(key, teacher, dtype, vocabulary)
            if manifest is None:
                manifest = {"format": FORMAT, **kind, **given, "shards": []}
            _fits(manifest, kind, f"document {key!r}", folder)
            known.add(key)
            waiting.append((key, tensors))
            tokens += len(next(iter(tensors.values())))
            if tokens >= shard_tokens:
                flush()
    finally:
        flush()
    return added


def _key(key: Any) -> str | int:
    if isinstance(key, str):
        return key
    try:
        return operator.index(key)
    except TypeError:
        raise TypeError(f"keys must be strings or integers, got {key!r}; pass str(key)") from None


def _fits(manifest: dict, kind: dict, what: str, folder: Path) -> None:
    for name, value in kind.items():
        if manifest.get(name) != value:
            raise ValueError(
                f"{what} does not fit the cache in {folder}: its {name} is {value!r}, the cache's "
                f"{manifest.get(name)!r}; pass the same, or another folder"
            )


def _bar(documents: Iterable, total: int | None, progress: bool) -> Iterable:
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return documents
        return tqdm(documents, total=total, desc="teacher", unit=" documents")
    return documents


def _tensors(
    key: str | int, teacher: SparseTeacher | Tensor, dtype: torch.dtype, vocabulary: int | None
) -> tuple[dict, dict]:
    """(what is stored, what all documents of a cache must have in common)."""
    sparse = isinstance(teacher, SparseTeacher)
    x = teacher.log_probs if sparse else teacher
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"document {key!r} must be one sequence, a SparseTeacher [T, K] or hidden states "
            f"[T, H], got {got}; save each sequence under its own key"
        )
    kind = {"kind": "sparse" if sparse else "hidden", "width": x.shape[-1], "extra": []}
    if sparse:
        if vocabulary is not None and (teacher.ids >= vocabulary).any():
            raise ValueError(
                f"document {key!r} has the id {int(teacher.ids.max())}, outside of the vocabulary "
                f"of {vocabulary}; pass the number of columns of the student's logits"
            )
        tensors = {"ids": teacher.ids.to(torch.int32), "log_probs": x.to(dtype)}
        kind["extra"] = [name for name in OPTIONAL if getattr(teacher, name) is not None]
        tensors |= {name: getattr(teacher, name).float() for name in kind["extra"]}
        kind |= {"tail": teacher.tail, "normalised": teacher.normalised}
    else:
        tensors = {"hidden": x.to(dtype)}
    # copies: the caller may write to its tensors before the shard is full
    tensors = {name: x.detach().cpu() for name, x in tensors.items()}
    return {k: x.clone(memory_format=torch.contiguous_format) for k, x in tensors.items()}, kind


def _write_shard(folder: Path, manifest: dict, documents: list[tuple[str | int, dict]]) -> None:
    on_disk = _manifest(folder) or {"shards": []}
    if on_disk["shards"] != manifest["shards"]:
        raise ValueError(
            f"another process wrote to {folder}; let each write to a folder of its own"
        )
    name = f"shard-{len(manifest['shards']):05d}.safetensors"
    tensors = {
        f"{i}.{part}": x for i, (_, parts) in enumerate(documents) for part, x in parts.items()
    }
    size = _write(folder / name, lambda path: save_file(tensors, path))
    lengths = [len(next(iter(parts.values()))) for _, parts in documents]
    keys = [key for key, _ in documents]
    manifest["shards"].append({"file": name, "bytes": size, "keys": keys, "tokens": lengths})
    text = json.dumps(manifest, indent=1)
    _write(folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))


def _write(path: Path, write: Callable[[Path], Any]) -> int:
    """A file that is there whole or not at all, also after a power cut; its size."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path.stat().st_size


def _manifest(folder: Path) -> dict | None:
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest.get("format")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {_AGAIN}") from error
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version!r}, this version reads {FORMAT}; use the version of "
            "drkl_triton that wrote it, or write the cache anew"
        )
    return manifest


class TeacherCache:
    """What :func:`load_teacher` returns: teachers by key, read when they are asked for."""

    def __init__(self, folder: Path, manifest: dict, device: str | torch.device):
        self.folder, self.manifest, self.device = folder, manifest, device
        self._shards: dict[str, Any] = {}  # opened when they are read
        self._places = {
            key: (shard["file"], i)
            for shard in manifest["shards"]
            for i, key in enumerate(shard["keys"])
        }

    @property
    def keys(self) -> list[str | int]:
        return list(self._places)

    def __iter__(self) -> Iterator[str | int]:
        return iter(self._places)

    def __getstate__(self) -> dict:  # for the workers of a DataLoader
        return self.__dict__ | {"_shards": {}}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str | int) -> bool:
        return key in self._places

    def __getitem__(self, key: str | int) -> SparseTeacher | Tensor:
        """A document's SparseTeacher ``[T, K]`` or hidden states ``[T, H]``."""
        key = _key(key)
        if key not in self._places:
            raise KeyError(f"no document {key!r} in {self.folder}, which has {len(self)}")
        file, i = self._places[key]
        names = ["hidden"] if self.manifest["kind"] == "hidden" else ["ids", "log_probs"]
        names += self.manifest["extra"]
        try:
            if file not in self._shards:
                self._shards[file] = safe_open(self.folder / file, "pt", device=str(self.device))
            parts = {name: self._shards[file].get_tensor(f"{i}.{name}") for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder / file} cannot be read ({error}); {_AGAIN}") from error
        if self.manifest["kind"] == "hidden":
            return parts["hidden"]
        return SparseTeacher(
            parts.pop("ids"),
            parts.pop("log_probs"),
            tail=self.manifest["tail"],
            normalised=self.manifest["normalised"],
            **parts,
        )

    def batch(self, keys: Iterable[str | int]) -> SparseTeacher | Tensor:
        """Several documents, ``[B, T, ...]``: the shorter ones are followed by rows without an
        entry, or hidden states of 0.
        """
        found = [self[key] for key in keys]
        if not found:
            raise ValueError("a batch needs at least one key, got none")
        if self.manifest["kind"] == "hidden":
            return _padded(found, 0.0)
        fills = {"ids": -1, "log_probs": -INF, "label_log_probs": -INF, "log_z": 0}
        parts = {
            name: _padded([getattr(x, name) for x in found], fill)
            for name, fill in fills.items()
            if getattr(found[0], name) is not None
        }
        return replace(found[0], **parts)


def _padded(tensors: list[Tensor], fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


def load_teacher(
    folder: str | Path,
    *,
    tokenizer: Any = None,
    vocabulary: int | None = None,
    temperature: float | None = None,
    kind: str | None = None,
    device: str | torch.device = "cpu",
) -> TeacherCache:
    """The cache in ``folder``; what is given must be what it was written with.

    Args:
        tokenizer: the student's, whose ids must mean the same.
        vocabulary: the number of columns of the student's logits.
        temperature: that of the loss.
        kind: ``"sparse"`` or ``"hidden"``.

    Raises:
        FileNotFoundError: no cache there.
        ValueError: what does not fit; a shard that is missing or cut short.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"no {MANIFEST} in {folder}; write one with save_teacher")
    wanted = {"tokenizer": tokenizer_hash(tokenizer), "vocabulary": vocabulary}
    wanted |= {"temperature": temperature, "kind": kind}
    for name, value in wanted.items():
        if value is not None and manifest.get(name) != value:
            raise ValueError(
                f"the cache in {folder} was written with {name} {manifest[name]!r}, got {value!r}; "
                "write it anew for this one, or leave the argument out if they are the same to you"
            )
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        size = path.stat().st_size if path.exists() else None
        if size != shard["bytes"]:
            got = "is missing" if size is None else f"has {size:,} bytes, not {shard['bytes']:,}"
            raise ValueError(f"{path} {got}; {_AGAIN}")
    return TeacherCache(folder, manifest, device)
