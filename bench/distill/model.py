"""A small decoder-only transformer, and sampling from it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .task import CHARACTERS, END, PROMPT, RESPONSE

WEIGHTS = Path(__file__).with_name("weights.pt")  # both models; pretrain.py makes it
SIZES = {
    "teacher": {"width": 64, "layers": 3, "heads": 4},
    "student": {"width": 48, "layers": 2, "heads": 4},
}
Cache = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [B, heads, T, width / heads]


class Layer(nn.Module):
    """Causal self-attention and a GELU network, each behind a layer norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Cache]:
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x)), [(k, v)]


class Model(nn.Module):
    """Learned positions, tied embeddings."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(CHARACTERS), width)
        self.position = nn.Embedding(PROMPT + RESPONSE, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.embed, self.position):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, tokens: Tensor, first: int = 0) -> Tensor:
        """Logits [B, T - first, V] of the words after tokens [B, T], from position `first` on."""
        return self.extend(tokens, [], first)[0]

    def extend(self, tokens: Tensor, past: Cache, first: int = 0) -> tuple[Tensor, Cache]:
        """Logits after each of [B, T] further tokens (one, if there is a past), and the cache."""
        start = past[0][0].shape[2] if past else 0
        places = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.embed(tokens) + self.position(places)
        cache: Cache = []
        for i, layer in enumerate(self.layers):
            x, new = layer(x, past[i] if past else None)
            cache += new
        return F.linear(self.norm(x[:, first:]), self.embed.weight), cache


@torch.no_grad()
def respond(model: Model, prompts: Tensor, generator: torch.Generator | None) -> Tensor:
    """Responses [B, RESPONSE] to prompts [B, PROMPT]; greedy without a generator."""
    out = torch.full((prompts.shape[0], RESPONSE), END, device=prompts.device)
    logits, cache = model.extend(prompts, [])
    alive = torch.ones_like(out[:, :1], dtype=torch.bool)
    for t in range(RESPONSE):
        last = logits[:, -1]
        if generator is None:
            word = last.argmax(-1, keepdim=True)
        else:
            word = last.softmax(-1).multinomial(1, generator=generator)
        out[:, t : t + 1] = torch.where(alive, word, END)
        alive &= word != END
        if t + 1 < RESPONSE and alive.any():
            logits, cache = model.extend(word, cache)
        else:
            break
    return out
