"""A small causal transformer: pre-norm blocks, rotary positions, tied embeddings.

tokens [B, T] -> logits [B, T, V]; position t sees tokens 0..t and predicts token t+1.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class ModelConfig:
    vocab: int
    width: int
    layers: int
    heads: int


class Head(NamedTuple):
    """The end of a model: its last hidden states, and the matrix that makes logits of them."""

    hidden: torch.Tensor  # [B, T, width], after the last norm
    matrix: torch.Tensor  # [V, width]

    def logits(self):
        return F.linear(self.hidden, self.matrix)


def rotary(x, start):
    """Rotate x [B, H, T, D] by its positions start..start+T-1, each pair at its own rate."""
    length, half = x.shape[-2], x.shape[-1] // 2
    rate = 10_000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    position = torch.arange(start, start + length, device=x.device, dtype=torch.float32)
    angle = position[:, None] * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm_attention = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x, cache=None):
        """x [B, T, width]; cache, if given, is a dict that keeps the keys and values so far."""
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
        start = cache["k"].shape[2] if cache else 0
        q, k = rotary(q, start), rotary(k, start)
        if cache is not None:
            if cache:
                k, v = torch.cat((cache["k"], k), 2), torch.cat((cache["v"], v), 2)
            cache["k"], cache["v"] = k, v
        # A cached call brings one token, which may look at everything before it.
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(
                    parameter, std=0.02 / (2 * config.layers) ** 0.5 if residual else 0.02
                )

    def head(self, tokens, caches=None):
        """caches: None, or one dict a block (empty at first; afterwards one token a call)."""
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i])
        return Head(self.norm(x), self.embedding.weight)

    def forward(self, tokens, caches=None):
        return self.head(tokens, caches).logits()

    def parameter_count(self):
        return sum(p.numel() for p in self.parameters())
