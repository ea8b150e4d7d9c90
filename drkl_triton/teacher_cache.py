"""Teachers on disk: K log-probabilities a token, or the last hidden states, by document.

A folder holds ``manifest.json`` and shards, safetensors files of some documents each. A shard is
written whole or not at all, and counts from when the manifest names it: what was interrupted goes
on where it stopped. Hidden states take H numbers a token, some hundred times less than logits; the
losses from hidden states take them as ``teacher_hidden``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
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

FORMAT = 1
MANIFEST = "manifest.json"
OPTIONAL = ("label_log_probs", "log_z")


def tokenizer_hash(tokenizer: Any) -> str | None:
    """16 hex digits of its vocabulary (anything with ``get_vocab()``); a string stays as it is."""
    if tokenizer is None or isinstance(tokenizer, str):
        return tokenizer
    vocabulary = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def saved_keys(folder: str | Path) -> set[str]:
    """The documents that are there; empty where there is no cache yet."""
    manifest = _manifest(Path(folder))
    return (
        set()
        if manifest is None
        else {key for shard in manifest["shards"] for key in shard["keys"]}
    )


def save_teacher(
    folder: str | Path,
    documents: Iterable[tuple[str, SparseTeacher | Tensor]],
    *,
    tokenizer: Any = None,
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
        temperature: what the log-probabilities are at.
        dtype: of the log-probabilities, or hidden states: float32, bfloat16 or float16. Sums of
            bfloat16 probabilities are off by 1 %, which is the tail's.
        shard_tokens: tokens of a shard, which is in memory until it is written.
        total: of the progress bar (tqdm, where it is installed).

    Returns:
        How many documents were added.

    Raises:
        ValueError: what does not fit the cache that is there, in kind, K or H, dtype, tail,
            tokenizer or temperature. What was written before stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest = _manifest(folder)
    known = saved_keys(folder)
    given = {"tokenizer": tokenizer_hash(tokenizer), "temperature": float(temperature)}
    waiting: list[tuple[str, dict]] = []
    tokens = added = 0

    def flush() -> None:
        nonlocal waiting, tokens, added
        if waiting:
            _write_shard(folder, manifest, waiting)
            added += len(waiting)
        waiting, tokens = [], 0

    for key, teacher in _bar(documents, total, progress):
        key = str(key)
        if key in known:
            continue
        tensors, kind = _tensors(key, teacher, dtype)
        kind |= given | {"dtype": str(dtype).removeprefix("torch.")}
        if manifest is None:
            manifest = {"format": FORMAT, **kind, "shards": []}
        for name, value in kind.items():
            if manifest.get(name) != value:
                flush()
                raise ValueError(
                    f"document {key!r} does not fit the cache in {folder}: its {name} is "
                    f"{value!r}, the cache's {manifest.get(name)!r}; pass the same, or another "
                    "folder"
                )
        known.add(key)
        waiting.append((key, tensors))
        tokens += len(next(iter(tensors.values())))
        if tokens >= shard_tokens:
            flush()
    flush()
    return added


def _bar(documents: Iterable, total: int | None, progress: bool) -> Iterable:
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return documents
        return tqdm(documents, total=total, desc="teacher", unit=" documents")
    return documents


def _tensors(key: str, teacher: SparseTeacher | Tensor, dtype: torch.dtype) -> tuple[dict, dict]:
    """(what is stored, what all documents of a cache must have in common)."""
    if isinstance(teacher, SparseTeacher):
        if teacher.ids.dim() != 2:
            raise ValueError(
                f"document {key!r} must be one sequence [T, K], got ids of shape "
                f"{tuple(teacher.ids.shape)}; save each sequence under its own key"
            )
        tensors = {"ids": teacher.ids.to(torch.int32), "log_probs": teacher.log_probs.to(dtype)}
        extra = [name for name in OPTIONAL if getattr(teacher, name) is not None]
        tensors |= {name: getattr(teacher, name).float() for name in extra}
        kind = {"kind": "sparse", "width": teacher.ids.shape[-1], "extra": extra}
        kind |= {"tail": teacher.tail, "normalised": teacher.normalised}
    else:
        if not isinstance(teacher, Tensor) or teacher.dim() != 2:
            got = tuple(teacher.shape) if isinstance(teacher, Tensor) else type(teacher).__name__
            raise ValueError(
                f"document {key!r} must be a SparseTeacher [T, K] or hidden states [T, H], got "
                f"{got}; save each sequence under its own key"
            )
        tensors = {"hidden": teacher.to(dtype)}
        kind = {"kind": "hidden", "width": teacher.shape[-1], "extra": []}
    return {name: x.detach().cpu().contiguous() for name, x in tensors.items()}, kind


def _write_shard(folder: Path, manifest: dict, documents: list[tuple[str, dict]]) -> None:
    name = f"shard-{len(manifest['shards']):05d}.safetensors"
    tensors = {
        f"{i}.{part}": x for i, (_, parts) in enumerate(documents) for part, x in parts.items()
    }
    temporary = folder / f"{name}.{os.getpid()}.tmp"
    save_file(tensors, temporary)
    os.replace(temporary, folder / name)
    lengths = [len(next(iter(parts.values()))) for _, parts in documents]
    keys = [key for key, _ in documents]
    bytes_ = (folder / name).stat().st_size
    manifest["shards"].append({"file": name, "bytes": bytes_, "keys": keys, "tokens": lengths})
    temporary = folder / f"{MANIFEST}.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)


def _manifest(folder: Path) -> dict | None:
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {manifest.get('format')!r}, this version reads {FORMAT}; use the "
            "version of drkl_triton that wrote it, or write the cache anew"
        )
    return manifest


class TeacherCache:
    """What :func:`load_teacher` returns: teachers by key, read when they are asked for."""

    def __init__(self, folder: Path, manifest: dict, device: str | torch.device):
        self.folder, self.manifest, self.device = folder, manifest, device
        self._places = {
            key: (shard["file"], i)
            for shard in manifest["shards"]
            for i, key in enumerate(shard["keys"])
        }

    @property
    def keys(self) -> list[str]:
        return list(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return str(key) in self._places

    def __getitem__(self, key: str) -> SparseTeacher | Tensor:
        """A document's SparseTeacher ``[T, K]`` or hidden states ``[T, H]``."""
        if str(key) not in self._places:
            raise KeyError(f"no document {key!r} in {self.folder}, which has {len(self)}")
        file, i = self._places[str(key)]
        names = ["hidden"] if self.manifest["kind"] == "hidden" else ["ids", "log_probs"]
        names += self.manifest["extra"]
        try:
            with safe_open(self.folder / file, "pt", device=str(self.device)) as shard:
                parts = {name: shard.get_tensor(f"{i}.{name}") for name in names}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.folder / file} cannot be read ({error}); {_AGAIN}") from error
        if self.manifest["kind"] == "hidden":
            return parts["hidden"]
        return SparseTeacher(
            parts.pop("ids"), parts.pop("log_probs"), tail=self.manifest["tail"],
            normalised=self.manifest["normalised"], **parts,
        )  # fmt: skip

    def batch(self, keys: Sequence[str]) -> SparseTeacher | Tensor:
        """Several documents, ``[B, T, ...]``: the shorter ones are followed by rows without an
        entry, or hidden states of 0.
        """
        found = [self[key] for key in keys]
        if not found:
            raise ValueError("a batch needs at least one key, got none")
        if self.manifest["kind"] == "hidden":
            return _padded(found, 0.0)
        fills = {
            "ids": -1,
            "log_probs": float("-inf"),
            "label_log_probs": float("-inf"),
            "log_z": 0,
        }
        parts = {
            name: _padded([getattr(x, name) for x in found], fill)
            for name, fill in fills.items()
            if getattr(found[0], name) is not None
        }
        first = found[0]
        return SparseTeacher(
            parts.pop("ids"), parts.pop("log_probs"), tail=first.tail, normalised=first.normalised,
            **parts,
        )  # fmt: skip


_AGAIN = "write the cache anew, or copy it again"


def _padded(tensors: list[Tensor], fill: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)


def load_teacher(
    folder: str | Path,
    *,
    tokenizer: Any = None,
    temperature: float | None = None,
    kind: str | None = None,
    device: str | torch.device = "cpu",
) -> TeacherCache:
    """The cache in ``folder``; what is given must be what it was written with.

    Args:
        tokenizer: the student's, whose ids must mean the same.
        temperature: that the log-probabilities are to be at.
        kind: ``"sparse"`` or ``"hidden"``.

    Raises:
        FileNotFoundError: no cache there.
        ValueError: what does not fit; a shard that is missing or cut short.
    """
    folder = Path(folder)
    manifest = _manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"no {MANIFEST} in {folder}; write one with save_teacher")
    wanted = {"tokenizer": tokenizer_hash(tokenizer), "temperature": temperature, "kind": kind}
    for name, value in wanted.items():
        if value is not None and manifest[name] != value:
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
