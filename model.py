"""The Llama 2 transformer (§2.2, Table 1, A.2.1) and how to sample from it.

Pre-norm blocks of RMSNorm, rotary attention and SwiGLU, without a single bias and with an output matrix of
its own. One attention module covers multi-head, grouped-query and multi-query attention (Ainslie et al., 2023).
Parameter names are those of the released weights. This file imports nothing of ours, but for its command line:
copy it away.

    model = Transformer(PRESETS["toy"])
    logits = model(tokens)                                         # (batch, seq, vocab)
    log_probs = model(tokens, targets=targets)                     # (batch, seq), without all the logits at once
    answers = generate(model, prompts, max_new_tokens=64, temperature=0.6, top_p=0.9, stop=(eos_id,))

    python model.py convert llama-2-7b out/llama-2-7b --to ours    # Meta's release or a Hugging Face folder; or --to hf
    python model.py generate out/pretrain --prompt "One day"
"""
import argparse
import json
import math
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

IGNORE = -1  # a target that is not learned: prompts, padding, the tail of the last batch
CACHE_BYTES = 2**34  # keys and values alive at once in sampling
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**26}  # logits alive at once when log-probabilities are asked for (fp32: 64, 256 MiB)
# Attention kernels for lengths that change: cuDNN's, not among them, takes 60 ms to plan each new one
ANY_LENGTH = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class ModelError(ValueError):
    """Bad input to the model, said in one sentence; the command lines print it and exit with code 2."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model. The published shapes are in `PRESETS` (Table 1 and the released params.json)."""
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int  # n_heads: multi-head; 1: multi-query; between: grouped-query
    ffn_hidden: int
    vocab_size: int = 32000
    max_seq_len: int = 4096
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    def __post_init__(self):
        if min(self.dim, self.n_layers, self.n_heads, self.n_kv_heads, self.ffn_hidden, self.vocab_size) < 1:
            raise ModelError(f"every size of a model must be at least 1: {self}")
        if not 0 < self.norm_eps < 1 or not self.rope_theta > 1:
            raise ModelError(f"norm_eps {self.norm_eps} must lie between 0 and 1, and rope_theta {self.rope_theta} above 1")
        if self.n_layers > 1000:  # such a model can't even be laid out in reasonable time
            raise ModelError(f"n_layers is {self.n_layers}, more than any Llama has")
        if self.dim % (2 * self.n_heads) or self.n_heads % self.n_kv_heads:
            raise ModelError(f"dim {self.dim} must be an even multiple of n_heads {self.n_heads}, "
                             f"and n_heads a multiple of n_kv_heads {self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        """The width of a head."""
        return self.dim // self.n_heads


def swiglu_hidden(dim: int, multiple_of: int = 256, multiplier: float = 1.0) -> int:
    """The width of the feed-forward layer: 2/3 of 4·dim, scaled, rounded up (the released code's rule)."""
    hidden = int(multiplier * int(2 * 4 * dim / 3))
    return multiple_of * math.ceil(hidden / multiple_of)


def _preset(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, max_seq_len: int, multiple_of: int = 256,
            multiplier: float = 1.0, **more: float) -> ModelConfig:
    return ModelConfig(dim, n_layers, n_heads, n_kv_heads, swiglu_hidden(dim, multiple_of, multiplier),
                       max_seq_len=max_seq_len, **more)


PRESETS = {
    "toy-s": _preset(64, 3, 4, 2, 1024, 32),  # toy sizes: our choice; the vocabulary comes from the tokenizer
    "toy": _preset(128, 4, 4, 2, 1024, 32),  # 1.0M parameters at 1,024 pieces
    "toy-m": _preset(192, 6, 6, 3, 1024, 32),
    "toy-l": _preset(384, 8, 6, 3, 1024, 32),  # 15M at 2,048 pieces
    "7b": _preset(4096, 32, 32, 32, 4096),
    "13b": _preset(5120, 40, 40, 40, 4096),
    "34b": _preset(8192, 48, 64, 8, 4096),  # never released; the shape of Code Llama 34B, which grew from it
    "70b": _preset(8192, 80, 64, 8, 4096, 4096, 1.3),
    "llama1-7b": _preset(4096, 32, 32, 32, 2048, norm_eps=1e-6),
    "llama1-13b": _preset(5120, 40, 40, 40, 2048, norm_eps=1e-6),
    "llama1-33b": _preset(6656, 60, 52, 52, 2048, norm_eps=1e-6),
    "llama1-65b": _preset(8192, 80, 64, 64, 2048),  # norm_eps 1e-5 in most public copies
}


# ---------------------------------------------------------------------------------------------- the model


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε) · weight, the mean over the last dimension in fp32 (§2.2; Zhang and Sennrich, 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., dim) → the same."""
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a table that sampling made serves training too
def rope_table(head_dim: int, seq_len: int, theta: float, device: torch.device) -> Tensor:
    """Cosine and sine of the angles position · θ^(-2k/head_dim) as (seq_len, head_dim / 2, 2) (§2.2; RoPE)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    angle = torch.outer(torch.arange(seq_len, device=device).float(), frequency)  # (seq_len, head_dim / 2)
    return torch.view_as_real(torch.polar(torch.ones_like(angle), angle))


def apply_rope(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of neighbours (2k, 2k+1) of x by its angle, in fp32 (the released layout, not half-split).

    x: (batch, seq, heads, head_dim). rotation: cosines and sines, (batch or 1, seq, 1, head_dim / 2, 2).
    """
    pairs = x.float().unflatten(-1, (-1, 2))  # (batch, seq, heads, head_dim / 2, 2)
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic, and leaves complex numbers alone
        (a, b), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
    else:  # (a + ib) · (cos + i sin)
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).type_as(x)


class Attention(nn.Module):
    """Causal attention in which n_heads / n_kv_heads query heads share one key and value head (A.2.1)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)
        self.grouped = config.n_kv_heads < config.n_heads

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | list[int] | None, cache: "KVCache | None",
                layer: int) -> Tensor:
        """x: (batch, seq, dim) → the same. rotation: see `apply_rope`.

        mask: None is causal; what a query may see, as bool (batch, 1, seq, seq) or, with a cache, as 0 / -inf (batch, 1, 1,
        columns); or the lengths of packed documents (see `attention_by_document`).
        """
        q = self.wq(x).unflatten(-1, (-1, self.head_dim))  # (batch, seq, n_heads, head_dim)
        k = self.wk(x).unflatten(-1, (-1, self.head_dim))  # (batch, seq, n_kv_heads, head_dim)
        v = self.wv(x).unflatten(-1, (-1, self.head_dim))  # (batch, seq, n_kv_heads, head_dim)
        q, k = apply_rope(q, rotation), apply_rope(k, rotation)
        if isinstance(mask, list):
            return self.wo(attention_by_document(q, k, v, mask).flatten(2))  # (batch, seq, dim)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (batch, n_kv_heads, seq, head_dim)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (batch, n_kv_heads, columns, head_dim)
        if q.shape[1] == 1:  # a group's heads stand as a sequence before their key and value head: fewer, larger products
            q = q.view(len(q), k.shape[1], -1, self.head_dim)  # (batch, n_kv_heads, group, head_dim)
            if q.is_cuda:  # as plain products: for so few queries PyTorch's kernels are slower there, up to 1.8 times a token
                scores = (q @ k.mT).float() * self.head_dim**-0.5  # (batch, n_kv_heads, group, columns)
                y = torch.softmax(scores if mask is None else scores + mask, dim=-1).type_as(q) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.wo(y.reshape(len(q), 1, -1))  # (batch, 1, dim)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, is_causal=mask is None, enable_gqa=self.grouped)
        return self.wo(y.transpose(1, 2).flatten(2))  # (batch, seq, dim)


def attention_by_document(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention inside each packed document: what a mask gives, without the work on what it would hide.

    q: (batch, seq, n_heads, head_dim). k, v: (batch, seq, n_kv_heads, head_dim). lengths: tokens of each document, row after
    row. Returns (batch, seq, n_heads, head_dim).
    """
    documents = zip(*(x.flatten(0, 1).split(lengths) for x in (q, k, v)))  # each (tokens, heads, head_dim)
    with sdpa_kernel(ANY_LENGTH):
        y = [F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in document), is_causal=True, enable_gqa=True)
             for document in documents]  # each (1, n_heads, tokens, head_dim)
    return torch.cat(y, dim=2)[0].transpose(0, 1).view_as(q)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x) (§2.2; Shazeer, 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_hidden, bias=False)
        self.w2 = nn.Linear(config.ffn_hidden, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, seq, dim) → the same."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """One layer: h = x + attention(norm(x)); out = h + feed_forward(norm(h)) (§2.2, pre-normalisation)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.layer = layer
        self.checkpointing = False  # recompute this block in the backward pass instead of keeping its insides

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | list[int] | None = None,
                cache: "KVCache | None" = None) -> Tensor:
        """x: (batch, seq, dim) → the same. The others: see `Attention.forward`."""
        if self.checkpointing and cache is None and torch.is_grad_enabled():
            return checkpoint(self.compute, x, rotation, mask, None, use_reentrant=False)
        return self.compute(x, rotation, mask, cache)

    def compute(self, x: Tensor, rotation: Tensor, mask: Tensor | list[int] | None, cache: "KVCache | None") -> Tensor:
        """The layer itself, which checkpointing runs twice."""
        h = x + self.attention(self.attention_norm(x), rotation, mask, cache, self.layer)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """A Llama 2 language model. Weights are drawn from `seed` (see `initial_weight`)."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.compiled = False  # compiled blocks keep documents apart by a mask: other lengths would compile them again
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if not parameter.is_meta:
                    parameter.copy_(initial_weight(name, parameter.shape, config.n_layers, seed, parameter.device))

    def forward(self, tokens: Tensor, targets: Tensor | None = None, documents: Tensor | None = None,
                cache: "KVCache | None" = None, temperature: float = 1.0) -> Tensor:
        """Logits (batch, seq, vocab) in fp32; or, with targets, the log-probability of each target (batch, seq).

        tokens: (batch, seq) ids. targets: (batch, seq) ids, `IGNORE` where nothing is asked (its log-probability
        is 0). documents: (batch, seq), the number of the packed document that each token belongs to: attention
        stays inside it and positions start again (§3.1 does not say; our choice). temperature divides the logits
        before the softmax of the log-probabilities. With a cache: logits (batch, vocab) after each row's last token.
        """
        seq = tokens.shape[1]
        config = self.config
        positions, mask = torch.arange(seq, device=tokens.device)[None], None  # (1, seq)
        if cache is not None:
            positions, mask = cache.positions(seq), cache.mask()
        elif documents is not None:
            positions = document_positions(documents)
            mask = document_mask(documents) if self.compiled else document_lengths(positions)
        if seq > config.max_seq_len:
            raise ModelError(f"a sequence of {seq} tokens is longer than the model's context of {config.max_seq_len}")
        rotation = rope_table(config.head_dim, config.max_seq_len, config.rope_theta, tokens.device)
        rotation = rotation[positions][:, :, None]  # (batch or 1, seq, 1, head_dim / 2, 2)
        h = self.tok_embeddings(tokens)  # (batch, seq, dim)
        for block in self.layers:
            h = block(h, rotation, mask, cache)
        if cache is not None:
            h = cache.advance(h)  # (batch, dim)
        h = self.norm(h)
        if targets is None:
            return self.output(h).float()
        return target_log_probs(h, self.output.weight, targets, temperature, self.compiled)


def initial_weight(name: str, shape: torch.Size, n_layers: int, seed: int, device: torch.device) -> Tensor:
    """A whole parameter before training: norm gains 1, matrices N(0, 0.02²), wo and w2 smaller by √(2 n_layers).

    The paper does not state its initialisation: our choice, GPT-2's. The numbers depend on the seed, the
    parameter's name and the kind of device alone, so every rank of any world size draws the same ones.
    """
    if len(shape) == 1:
        return torch.ones(shape, device=device)
    residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
    generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    return torch.randn(shape, generator=generator, device=device) * (0.02 / math.sqrt(2 * n_layers if residual else 1))


def document_positions(documents: Tensor) -> Tensor:
    """How far each token stands behind the first of its document: (batch, seq), 0 at every new document."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(first, index, 0).cummax(dim=1).values


def document_lengths(positions: Tensor) -> list[int]:
    """Tokens of each document, row after row, by the positions (batch, seq) that start again in each."""
    starts = (positions.flatten() == 0).nonzero()[:, 0]  # (documents,)
    return starts.diff(append=starts.new_tensor([positions.numel()])).tolist()


def document_mask(documents: Tensor) -> Tensor:
    """True where a query (row) may see a key (column): not later, same document. (batch, 1, seq, seq)."""
    same = documents[:, :, None] == documents[:, None, :]  # (batch, seq, seq)
    return same.tril()[:, None]


def target_log_probs(h: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, compiled: bool = False) -> Tensor:
    """log softmax(h weightᵀ / temperature) at the targets, in fp32, a chunk of tokens at a time.

    h: (batch, seq, dim). weight: (vocab, dim). targets: (batch, seq), `IGNORE` gives 0. Only `CHUNK_LOGITS` logits
    are alive at once: if there are more, the backward pass computes each chunk again. compiled: by torch.compile.
    """
    losses = torch.compile(target_losses) if compiled else target_losses
    rows, wanted = h.flatten(0, 1), targets.flatten()  # (batch · seq, dim), (batch · seq,)
    chunk = max(1, CHUNK_LOGITS.get(h.device.type, CHUNK_LOGITS["cpu"]) // len(weight))
    if len(rows) <= chunk:
        return -losses(rows, weight, wanted, temperature).view_as(targets)
    pairs = zip(rows.split(chunk), wanted.split(chunk))
    found = [checkpoint(losses, rows, weight, wanted, temperature, use_reentrant=False) for rows, wanted in pairs]
    return -torch.cat(found).view_as(targets)


def target_losses(h: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The cross-entropy of each of the targets (n,) in fp32, `IGNORE` gives 0. h: (n, dim). weight: (vocab, dim)."""
    logits = F.linear(h, weight).float()  # (n, vocab)
    logits = logits if temperature == 1 else logits / temperature
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")  # (n,)


# ---------------------------------------------------------------------------------------------- sampling


class KVCache:
    """Keys and values of the tokens read so far, for a batch of prompts of unequal length.

    Prompts are padded on the right to a common number of columns and every new token takes the next column, for
    all rows at once. A short prompt so leaves a gap of columns, which the mask hides; positions ignore it. After the prompts each
    call takes one token a row.
    """

    def __init__(self, config: ModelConfig, lengths: Tensor, columns: int):
        """lengths: (batch,) tokens of each prompt. columns: room for the longest prompt and all new tokens."""
        self.columns, self.max_seq_len = columns, config.max_seq_len
        self.end = None  # (1,) the column that the next token takes, once `freeze` was called
        self.memory = []  # of each layer: keys and values, (batch, n_kv_heads, columns, head_dim)
        self.lengths = lengths  # (batch,) tokens read so far
        self.used = 0  # columns that are filled
        width = int(lengths.max())
        self.hidden = None  # (batch, 1, 1, columns): 0, or -inf in the gap behind a short prompt
        if int(lengths.min()) < width:
            column = torch.arange(columns, device=lengths.device)
            gap = (column >= lengths[:, None]) & (column < width)  # (batch, columns)
            self.hidden = torch.zeros(gap.shape, device=gap.device).masked_fill_(gap, -math.inf)[:, None, None]

    def positions(self, seq: int) -> Tensor:
        """(1, seq) while the prompts are read; (batch, 1) afterwards, held at the last one for rows that are full."""
        if self.used == 0:
            return torch.arange(seq, device=self.lengths.device)[None]
        return self.lengths[:, None].clamp(max=self.max_seq_len - 1)

    def mask(self) -> Tensor | None:
        """None while the prompts are read, which is plain causal: padding stands behind all that is real."""
        if self.end is not None:
            return self.hidden.masked_fill(torch.arange(self.columns, device=self.end.device) > self.end, -math.inf)
        return None if self.used == 0 or self.hidden is None else self.hidden[..., : self.used + 1]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (batch, n_kv_heads, seq, head_dim) of the new columns; return all columns so far."""
        if self.used == 0:
            room = *k.shape[:2], self.columns, k.shape[3]
            self.memory.append([k.new_zeros(room), v.new_zeros(room)])  # not empty: a NaN shows through a mask
        keys, values = self.memory[layer]
        if self.end is not None:
            return keys.index_copy_(2, self.end, k), values.index_copy_(2, self.end, v)
        end = self.used + k.shape[2]
        keys[:, :, self.used : end] = k
        values[:, :, self.used : end] = v
        return (k, v) if self.used == 0 else (keys[:, :, :end], values[:, :, :end])

    def advance(self, h: Tensor) -> Tensor:
        """Of h (batch, seq, dim), what stands over each row's newest token (batch, dim); the columns are now filled."""
        if self.used == 0:
            newest = h[torch.arange(len(h), device=h.device), self.lengths - 1]
            self.hidden = None if self.hidden is None else self.hidden.to(h.dtype)
        else:
            newest = h[:, 0]
            if self.end is None:
                self.lengths = self.lengths + 1
            else:  # in place, where the graph finds them
                self.lengths += 1
                self.end += 1
        self.used += h.shape[1]
        return newest

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows only, in this order; a row may be named several times (N samples of a prompt)."""
        for pair in self.memory:
            for i, old in enumerate(pair):
                pair[i] = old.new_zeros(len(rows), *old.shape[1:])
                pair[i][:, :, : self.used] = old[rows, :, : self.used]
        self.lengths = self.lengths[rows]
        self.hidden = None if self.hidden is None else self.hidden[rows]

    def freeze(self) -> None:
        """From here on each step has the same shapes and addresses: it attends all columns, the empty ones under the mask."""
        self.end = torch.tensor([self.used], device=self.lengths.device)
        if self.hidden is None:
            self.hidden = self.memory[0][0].new_zeros(len(self.lengths), 1, 1, self.columns)


@lru_cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of this device: the one that torch would take belongs to the device of the first capture."""
    return torch.cuda.Stream(device)


def captured(model: nn.Module, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """model(tokens, cache=cache) for one token a row as a CUDA graph: one launch instead of many hundreds (our choice).

    Call it in inference mode once the prompts are in the cache: what a first pass sets up can't be set up during a capture,
    a compilation neither. The logits that it returns are overwritten by the next call. A cache that has lost rows needs
    another graph.
    """
    if cache.end is None:
        cache.freeze()
    tokens, graph, used = torch.zeros_like(cache.lengths)[:, None], torch.cuda.CUDAGraph(), cache.used
    capture = torch.cuda.graph(graph, stream=capture_stream(tokens.device), capture_error_mode="thread_local")
    with capture:  # notes what is launched, computes nothing
        logits = model(tokens, cache=cache)
    cache.used = used

    def step(new: Tensor) -> Tensor:
        tokens.copy_(new)
        graph.replay()
        cache.used += 1
        return logits

    return step


def uniforms(seed: int, rows: Tensor, samples: Tensor, steps: int) -> Tensor:
    """(rows, steps) numbers in [0, 1), each a hash of (seed, row, sample, step) alone: SplitMix64 of each in turn.

    What is drawn for a row so does not depend on the batch it was drawn in, on the world size, or on a restart.
    """
    def mix(x: Tensor) -> Tensor:  # SplitMix64 with int64 arithmetic, which wraps; the masks make shifts logical
        x = x + (0x9E3779B97F4A7C15 - 2**64)
        x = (x ^ (x >> 30 & (1 << 34) - 1)) * (0xBF58476D1CE4E5B9 - 2**64)
        x = (x ^ (x >> 27 & (1 << 37) - 1)) * (0x94D049BB133111EB - 2**64)
        return x ^ (x >> 31 & (1 << 33) - 1)

    key = mix(torch.full_like(rows, seed & (1 << 63) - 1))
    key = mix(mix(key ^ rows) ^ samples)  # (rows,)
    bits = mix(key[:, None] ^ torch.arange(steps, device=rows.device))  # (rows, steps)
    return (bits >> 11 & (1 << 53) - 1).double() * 2.0**-53


def sample(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-probability at this temperature (at 1 if greedy), before top-p: both (batch,).

    logits: (batch, vocab). uniform: (batch,) in [0, 1), turned into a token by the inverse of the cumulative
    distribution. temperature 0 is greedy. top_p keeps the likeliest tokens until their mass exceeds it (released code).
    """
    if temperature == 0:
        probs = torch.softmax(logits, dim=-1)  # (batch, vocab)
        tokens = logits.argmax(-1, keepdim=True)  # (batch, 1)
    else:
        probs = torch.softmax(logits / temperature, dim=-1)  # (batch, vocab)
        mass = (nucleus(probs, top_p) if top_p < 1 else probs).cumsum(-1, dtype=torch.double)  # (batch, vocab)
        tokens = torch.searchsorted(mass, uniform[:, None] * mass[:, -1:], right=True)  # (batch, 1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # of NaN it would be one more
    return tokens[:, 0], probs.gather(-1, tokens)[:, 0].log()


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """probs (batch, vocab), 0 for all but the likeliest tokens, which stay until their mass exceeds top_p.

    So do all that are as likely as the last of them (our choice). To sort a vocabulary takes longer than a small model: all is
    sorted only if the 64 likeliest are too few for a row.
    """
    k = min(64, probs.shape[-1])
    ordered = probs.topk(k).values  # (batch, k)
    if (ordered.sum(-1) <= top_p).any():
        ordered = probs.sort(descending=True).values  # (batch, vocab)
    before = ordered.cumsum(-1) - ordered  # the mass of all likelier tokens
    least = ordered.masked_fill(before > top_p, 1).amin(-1, keepdim=True)  # (batch, 1) the least likely token that stays
    return probs.masked_fill(probs < least, 0)


class Sample(NamedTuple):
    """What `generate` returns for a row when log-probabilities are asked for."""
    tokens: list[int]
    log_probs: list[float]


def generate(model: Transformer, prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float = 0.6,
             top_p: float = 0.9, stop: Sequence[int] = (), seed: int = 0, n_samples: int = 1,
             rows: Sequence[int] | None = None, batch_size: int = 256, log_probs: bool = False,
             on_token: Callable[[int, int], None] | None = None) -> list[list[int]] | list[Sample]:
    """Continue prompts of any lengths; return the new tokens of each, the stop token included if one came.

    prompts: lists of token ids, none empty. temperature and top_p default to the released values; temperature 0 is
    greedy. The n_samples continuations of a prompt share its prefill; that of prompt i and sample k stands at
    i · n_samples + k. A row ends at a stop token, or where the context is full. The random number of token t of
    sample k depends on (seed, rows[i], k, t) only, with rows[i] = i by default. batch_size: continuations drawn at
    once (those of one prompt stay together), fewer where their keys and values would take more than `CACHE_BYTES`.
    log_probs: return `Sample`s, with the log-probability of each token at this temperature, before top-p.
    on_token(index, token) is called as tokens come. Raises ModelError for an empty or too long prompt and for ids
    outside the vocabulary. The model must hold its full weights (see `gathered` in pretrain.py), or all ranks must
    draw equally many tokens.
    """
    check_prompts(prompts, model.config)
    if not (temperature == 0 or temperature >= 1e-6) or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ModelError(f"temperature {temperature} must be 0 or at least 1e-6, top_p {top_p} above 0 and at most 1, and "
                         f"max_new_tokens {max_new_tokens} at least 1")
    rows = range(len(prompts)) if rows is None else rows
    sharded = hasattr(model, "reshard")  # by FSDP: what it gathers in inference mode can't be trained on
    results: list = [None] * (len(prompts) * n_samples)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding in a batch
    c, each = model.config, model.tok_embeddings.weight.element_size()
    column = 2 * c.n_layers * c.n_kv_heads * c.head_dim * each * n_samples  # bytes of a prompt's keys and values
    while by_length:
        batch = by_length[: max(1, batch_size // n_samples)]
        while len(batch) > 1:
            columns = min(len(prompts[batch[-1]]) + max_new_tokens, c.max_seq_len)
            if len(batch) * columns * column <= CACHE_BYTES:
                break
            batch.pop()
        by_length = by_length[len(batch) :]
        indices = [i * n_samples + k for i in batch for k in range(n_samples)]
        with torch.no_grad() if sharded else torch.inference_mode(), sdpa_kernel(ANY_LENGTH):
            drawn = generate_batch(model, [prompts[i] for i in batch], [rows[i] for i in batch], n_samples, max_new_tokens,
                                   temperature, top_p, set(stop), seed,
                                   on_token and (lambda row, token: on_token(indices[row], token)))
        for index, result in zip(indices, drawn):
            results[index] = result if log_probs else result.tokens
    return results


def check_prompts(prompts: Sequence[Sequence[int]], config: ModelConfig) -> None:
    """Raise ModelError if a prompt is empty, as long as the context, or holds an id outside the vocabulary."""
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ModelError(f"prompt {i} is empty; begin it with the BOS token")
        if len(prompt) >= config.max_seq_len:
            raise ModelError(f"prompt {i} has {len(prompt)} tokens, which leaves no room in a context of "
                             f"{config.max_seq_len}; shorten it")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            bad = next(token for token in prompt if not 0 <= token < config.vocab_size)
            raise ModelError(f"prompt {i} holds the token id {bad}, outside the vocabulary of {config.vocab_size}; "
                             "was it made with another tokenizer?")


def generate_batch(model: Transformer, prompts: list, rows: list[int], n_samples: int, max_new_tokens: int,
                   temperature: float, top_p: float, stop: set[int], seed: int,
                   on_token: Callable[[int, int], None] | None) -> list[Sample]:
    """One batch of `generate`: read the prompts once, then token by token; finished rows leave the batch."""
    device = model.tok_embeddings.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths.max())
    steps = min(max_new_tokens, model.config.max_seq_len - int(lengths.min()))
    room = (model.config.max_seq_len - lengths).repeat_interleave(n_samples).tolist()  # new tokens a row may have
    padded = torch.tensor([list(prompt) + [0] * (width - len(prompt)) for prompt in prompts], device=device)
    random = uniforms(seed, torch.tensor(rows, device=device).repeat_interleave(n_samples),
                      torch.arange(n_samples, device=device).repeat(len(prompts)), steps)  # (samples, steps)
    results = [Sample([], []) for _ in room]
    alive = list(range(len(results)))  # results[alive[j]] is what row j of the batch writes

    cache = KVCache(model.config, lengths, math.ceil((width + steps) / 8) * 8)  # bf16 products on a GPU want eights
    logits = model(padded, cache=cache)  # (prompts, vocab)
    if n_samples > 1:
        copies = torch.arange(len(prompts), device=device).repeat_interleave(n_samples)
        cache.keep(copies)
        logits = logits[copies]  # (samples, vocab)
    as_graph = device.type == "cuda" and not hasattr(model, "reshard")  # FSDP's gathering can't be captured
    decode = None if as_graph else partial(model, cache=cache)
    for step in range(steps):
        tokens, log_probs = sample(logits, temperature, top_p, random[:, step])  # (alive,), (alive,)
        still = []  # the rows that go on
        for j, (token, log_prob) in enumerate(zip(tokens.tolist(), log_probs.tolist())):
            result = results[alive[j]]
            if len(result.tokens) == room[alive[j]] or (result.tokens and result.tokens[-1] in stop):
                continue  # finished, and not yet out of the batch
            if math.isnan(log_prob):
                raise ModelError("the model computes no numbers any more; its weights are damaged, or too large for their type")
            result.tokens.append(token)
            result.log_probs.append(log_prob)
            if on_token:
                on_token(alive[j], token)
            if token not in stop and len(result.tokens) < room[alive[j]]:
                still.append(j)
        if not still or step + 1 == steps:
            break
        if len(still) <= (0.5 if as_graph else 0.75) * len(alive):  # moving the cache costs, and a new graph more
            kept = torch.tensor(still, device=device)
            cache.keep(kept)
            tokens, random, alive = tokens[kept], random[kept], [alive[j] for j in still]
            decode = None if as_graph else decode  # the old graph's memory goes before the new one comes
        decode = decode or captured(model, cache)
        logits = decode(tokens[:, None])  # (alive, vocab)
    return results


def count_parameters(config: ModelConfig) -> int:
    """The number of parameters of a model of this shape (Table 1)."""
    with torch.device("meta"):
        return sum(p.numel() for p in Transformer(config).parameters())


def with_vocab(config: ModelConfig, vocab_size: int) -> ModelConfig:
    """The same shape for another vocabulary."""
    return replace(config, vocab_size=vocab_size)


# ---------------------------------------------------------------------------------------------- weights in and out

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # what weights may be stored in
HF_NAMES = {  # released name → transformers' name, inside a layer and outside
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
}


def hf_name(name: str) -> str:
    """layers.3.attention.wq.weight → model.layers.3.self_attn.q_proj.weight."""
    layer, _, inside = name.removeprefix("layers.").partition(".") if name.startswith("layers.") else ("", "", name)
    return (f"model.layers.{layer}." if layer else "") + HF_NAMES[inside.removesuffix(".weight")] + ".weight"


def swap_rope_layout(weight: Tensor, head_dim: int, to_hf: bool) -> Tensor:
    """Reorder the rows of wq or wk, head by head: neighbours (2k, 2k+1), as released, ↔ halves (k, k + head_dim / 2)."""
    pairs = (head_dim // 2, 2) if to_hf else (2, head_dim // 2)
    return weight.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2)


def read_json(path: Path) -> dict:
    """A JSON object from a folder of weights; ModelError if it is missing, none, or says something twice."""
    def once(pairs: list[tuple]) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice in one object")
        return found

    try:
        found = json.loads(path.read_bytes(), object_pairs_hook=once)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: can't be read as JSON ({error}); fetch it again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: holds no JSON object; fetch it again")
    return found


def positive_number(path: Path, values: dict, key: str, kind: type = int, default: float | None = None) -> int | float:
    """A number of a JSON file, above 0 and below 2^24 (int) or 1e12, or the default; else ModelError names file and key."""
    value = default if values.get(key) is None else values[key]
    if not isinstance(value, (int, kind)) or isinstance(value, bool) or not 0 < value < (2**24 if kind is int else 1e12):
        raise ModelError(f"{path}: {key} is {value!r:.60}, not a number above 0 that makes sense; fetch the file again")
    return value


def config_of(path: Path, *values: float) -> ModelConfig:
    """The shape that a file tells; ModelError names the file if there is no such shape."""
    try:
        return ModelConfig(*values)
    except ModelError as error:
        raise ModelError(f"{path}: {error}; fetch the file again") from None


def import_safetensors() -> ModuleType:
    """The safetensors package, or a sentence on how to get it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ModelError("Hugging Face folders need safetensors: pip install safetensors") from None
    return safetensors.torch


def open_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth or .bin file by name, memory-mapped, without rotary tables (computed here).

    Nothing that is hidden in a file is executed. Raises ModelError if it is cut short, or holds other than plain weights.
    """
    options = dict(map_location="cpu", mmap=True, weights_only=True)
    read = import_safetensors().load_file if file.suffix == ".safetensors" else partial(torch.load, **options)
    try:
        found = read(file)
    except Exception as error:  # many kinds, for a file that is missing, cut, absurd, or holds code
        raise ModelError(f"{file}: is no whole file of weights alone ({type(error).__name__}); fetch it again") from None
    if not isinstance(found, dict) or not all(isinstance(w, Tensor) and isinstance(name, str) for name, w in found.items()):
        raise ModelError(f"{file}: holds other things than tensors by name; save the model's state_dict alone")
    for name, weight in found.items():
        if weight.dtype not in DTYPES.values() or weight.layout != torch.strided or weight.is_meta:
            raise ModelError(f"{file}: {name} is stored as {weight.dtype}, {weight.layout} on {weight.device}; fetch the model "
                             "unquantised, in fp32, bf16 or fp16")
    return {name: weight.detach() for name, weight in found.items() if not name.endswith(("rope.freqs", "rotary_emb.inv_freq"))}


def whole_weights(folder: Path, config: ModelConfig, shards: list[dict[str, Tensor]], name_in: Callable[[str], str]) -> Callable:
    """weight_of(name, shape) → one whole parameter, after a check that the shards hold those of `config` and no others.

    Each shard holds an equal part of a parameter, cut along any dimension, or all of it. name_in(name): its name there.
    """
    found = set().union(*shards)
    numbers = re.findall(r"^(?:model\.)?layers\.(\d{1,9})\.", "\n".join(found), re.M)
    held = 1 + max(map(int, numbers), default=-1)
    if held != config.n_layers:  # asked before a model of however many layers is built
        raise ModelError(f"{folder}: the weights have {held} layers, not {config.n_layers} as is written beside them; "
                         "is a file missing, or changed?")
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Transformer(config).named_parameters()}
    if strange := sorted(found - {name_in(name) for name in shapes}):
        raise ModelError(f"{folder}: the weights have {strange[0]}, which a Llama 2 does not; they can't be read as one")
    cut = {}  # name → the dimension along which the shards cut it, None where each holds all of it
    for name, shape in shapes.items():
        if not all(name_in(name) in shard for shard in shards):
            raise ModelError(f"{folder}: the weights lack {name_in(name)}; is a file missing?")
        parts = {tuple(shard[name_in(name)].shape) for shard in shards}
        ways = {(*shape[:d], size / len(shards), *shape[d + 1:]): d for d, size in enumerate(shape)} | {shape: None}
        if len(parts) > 1 or not parts <= set(ways):
            raise ModelError(f"{folder}: {name_in(name)} has shape {' and '.join(map(str, parts))} in {len(shards)} files, "
                             f"which does not make {shape}; is one missing?")
        cut[name] = ways[parts.pop()]

    def weight_of(name: str, shape: tuple) -> Tensor:
        parts = [shard[name_in(name)] for shard in shards]
        whole = parts[0] if cut[name] is None else torch.cat(parts, cut[name])
        if not whole.isfinite().all():
            raise ModelError(f"{folder}: {name_in(name)} holds numbers that are not finite; fetch the weights again")
        return whole

    return weight_of


def meta_weights(folder: str | Path, max_seq_len: int = 4096) -> tuple[ModelConfig, Callable]:
    """Meta's release (params.json, consolidated.NN.pth): the config, and weight_of(name, shape) → one whole parameter.

    Raises ModelError for a release that is damaged, or no Llama 2.
    """
    folder = Path(folder)
    path = folder / "params.json"
    params = read_json(path)
    if params.get("use_scaled_rope"):
        raise ModelError(f"{path} scales its rotary positions (Llama 3.1), which a Llama 2 does not; it can't be read as one")
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files or [f.name for f in files] != [f"consolidated.{i:02d}.pth" for i in range(len(files))]:
        raise ModelError(f"{folder}: consolidated.00.pth and its successors are not all there: {[f.name for f in files]}; "
                         "fetch the others")
    shards = [open_weights(file) for file in files]
    first = [shards[0].get(name) for name in ("layers.0.feed_forward.w1.weight", "output.weight")]
    if any(weight is None or weight.ndim != 2 for weight in first):
        raise ModelError(f"{files[0]}: lacks the matrices of the first layer and of the output; fetch it again")
    ffn_hidden, vocab_size = (len(weight) * len(shards) for weight in first)  # params.json leaves them open
    if params.get("vocab_size") not in (None, -1, vocab_size):
        raise ModelError(f"{path}: vocab_size is {params['vocab_size']!r:.60}, not {vocab_size} as the weights have; is a file "
                         "missing?")
    number = partial(positive_number, path, params)
    n_heads = number("n_heads")
    config = config_of(path, number("dim"), number("n_layers"), n_heads, number("n_kv_heads", default=n_heads), ffn_hidden,
                       vocab_size, max_seq_len, number("norm_eps", float, 1e-5), number("rope_theta", float, 10000.0))
    return config, whole_weights(folder, config, shards, lambda name: name)


def hf_files(folder: Path) -> list[Path]:
    """The files of weights of a Hugging Face folder: safetensors, or else pytorch_model.bin."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(isinstance(f, str) and Path(f).name == f for f in weight_map.values()):
                raise ModelError(f"{index}: has no weight_map from names to files of this folder; fetch it again")
            return [folder / file for file in sorted(set(weight_map.values()))]
        if (folder / single).exists():
            return [folder / single]
    raise ModelError(f"{folder}: has neither model.safetensors nor pytorch_model.bin; is a file missing?")


def hf_weights(folder: str | Path) -> tuple[ModelConfig, Callable]:
    """A Hugging Face folder: the config, and weight_of(name, shape) → one whole parameter in our layout.

    A tied output is the embedding again. Raises ModelError for what a Llama 2 does not have: another head size, scaled
    rotary positions, biases, quantised weights, another architecture.
    """
    folder = Path(folder)
    path = folder / "config.json"
    hf = read_json(path)
    if "stage" in hf:
        raise ModelError(f"{folder}: this run has no checkpoint; start it again, or name one of a stage that trains a model")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    plain_rope = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) == "default"
    for what, is_so in {
        f"has the model_type {hf.get('model_type')!r:.60}": hf.get("model_type") != "llama",
        "scales its rotary positions": not plain_rope,
        "has biases": hf.get("attention_bias") or hf.get("mlp_bias"),
        f"has {hf.get('hidden_act')!r:.60} in place of silu": hf.get("hidden_act", "silu") != "silu",
        "is quantised": hf.get("quantization_config"),
    }.items():
        if is_so:
            raise ModelError(f"{path} {what}, which a Llama 2 does not; it can't be read as one")
    number = partial(positive_number, path, hf | {"rope_theta": rope.get("rope_theta", hf.get("rope_theta"))})
    dim, n_heads = number("hidden_size"), number("num_attention_heads")
    if number("head_dim", float, dim / n_heads) != dim / n_heads:
        raise ModelError(f"{path} has heads of {hf['head_dim']}, not {dim} / {n_heads}; it can't be read as a Llama 2")
    config = config_of(  # what is missing has the value that transformers gives it
        path, dim, number("num_hidden_layers"), n_heads, number("num_key_value_heads", default=n_heads),
        number("intermediate_size"), number("vocab_size"), number("max_position_embeddings", default=2048),
        number("rms_norm_eps", float, 1e-6), number("rope_theta", float, 10000.0))
    weights: dict[str, Tensor] = {}
    for file in hf_files(folder):
        found = open_weights(file)
        if twice := sorted(found.keys() & weights.keys()):
            raise ModelError(f"{file}: {twice[0]} is in another file too; fetch the folder again")
        weights |= found
    if hf.get("tie_word_embeddings") and "model.embed_tokens.weight" in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    theirs = whole_weights(folder, config, [weights], hf_name)

    def weight_of(name: str, shape: tuple) -> Tensor:
        weight = theirs(name, shape)
        return swap_rope_layout(weight, config.head_dim, to_hf=False) if name.endswith(("wq.weight", "wk.weight")) else weight

    return config, weight_of


def load_weights(config: ModelConfig, weight_of: Callable, dtype: torch.dtype | None = torch.float32,
                 kind: type[Transformer] = Transformer) -> Transformer:
    """A plain model with the weights of a reader; with dtype None in the files' own, not to be trained (it may share memory)."""
    with torch.device("meta"):
        model = kind(config)
    copied = (lambda weight: weight) if dtype is None else lambda weight: weight.to(dtype, copy=True)
    model.load_state_dict({name: copied(weight_of(name, p.shape)) for name, p in model.named_parameters()}, assign=True)
    return model


def load_meta(folder: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """Meta's released weights as a plain model."""
    return load_weights(*meta_weights(folder), dtype)


def load_hf(folder: str | Path, dtype: torch.dtype = torch.float32) -> Transformer:
    """A Hugging Face Llama as a plain model."""
    return load_weights(*hf_weights(folder), dtype)


@contextmanager
def folder_aside(folder: str | Path) -> Iterator[Path]:
    """A folder that is made whole or not at all: written aside, renamed when the block ends. ModelError if it is there."""
    if Path(folder).exists():
        raise ModelError(f"{folder} is there already; name a new folder")
    aside = Path(f"{Path(folder)}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # what is left of it if the block failed


def write_hf(config: ModelConfig, weight_of: Callable, folder: Path, dtype: torch.dtype | None = None,
             max_bytes: int = 5 * 10**9) -> None:
    """Stream a reader's weights to a new folder that transformers and llama.cpp's converter load; dtype None keeps theirs.

    config.json and safetensors of at most max_bytes; about 2.5 times as much is in memory at once. The tokenizer's files
    are the caller's to add.
    """
    save_file = import_safetensors().save_file
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}
    files, tensors = [], {}  # the names in each file that is written, what the next one will hold

    def flush() -> None:
        files.append({name: weight.nbytes for name, weight in tensors.items()})
        save_file(tensors, folder / f"{len(files)}.safetensors", metadata={"format": "pt"})
        tensors.clear()

    for name, shape in shapes.items():
        weight = weight_of(name, shape)
        if name.endswith(("wq.weight", "wk.weight")):
            weight = swap_rope_layout(weight, config.head_dim, to_hf=True)
        weight = weight.to(dtype or weight.dtype, copy=True).contiguous()
        if tensors and sum(w.nbytes for w in tensors.values()) + weight.nbytes > max_bytes:
            flush()
        tensors[hf_name(name)] = weight
    flush()
    weight_map = {}
    for i, names in enumerate(files, 1):
        file = "model.safetensors" if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(files) > 1:
        index = {"metadata": {"total_size": sum(sum(names.values()) for names in files)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    hf = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": config.dim,
          "vocab_size": config.vocab_size, "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
          "num_key_value_heads": config.n_kv_heads, "intermediate_size": config.ffn_hidden, "hidden_act": "silu",
          "max_position_embeddings": config.max_seq_len, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
          "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2,
          "torch_dtype": str(weight.dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(hf, indent=1))


def reader(model: Transformer) -> Callable:
    """weight_of(name, shape) of a plain model."""
    return lambda name, shape: model.get_parameter(name).detach()


def save_hf(model: Transformer, folder: str | Path, dtype: torch.dtype | None = None, max_bytes: int = 5 * 10**9) -> None:
    """A plain model as a folder that transformers and llama.cpp's converter load; see `write_hf`."""
    with folder_aside(folder) as aside:
        write_hf(model.config, reader(model), aside, dtype, max_bytes)


def pool_kv_heads(config: ModelConfig, weight_of: Callable, n_kv_heads: int, how: str = "mean",
                  seed: int = 0) -> tuple[ModelConfig, Callable]:
    """A reader that turns multi-head attention into grouped-query or multi-query attention (Ainslie et al., 2023, §2.1).

    Each group's new key and value head is the mean of its heads, or the `first`, or `random` weights (their Figure 4
    compares the three). Raises ModelError if n_kv_heads does not divide the heads there are.
    """
    if how not in ("mean", "first", "random") or n_kv_heads < 1 or config.n_kv_heads % n_kv_heads:
        raise ModelError(f"{config.n_kv_heads} key and value heads can't be pooled to {n_kv_heads} by {how}")
    size = config.n_kv_heads // n_kv_heads  # heads of a group

    def pooled(name: str, shape: tuple) -> Tensor:
        if not name.endswith(("wk.weight", "wv.weight")):
            return weight_of(name, shape)
        old = weight_of(name, (size * shape[0], shape[1]))  # (n_kv_heads · size · head_dim, dim)
        if how == "random":
            return initial_weight(name, shape, config.n_layers, seed, old.device).to(old.dtype)
        heads = old.unflatten(0, (n_kv_heads, size, config.head_dim))  # (n_kv_heads, size, head_dim, dim)
        return (heads.mean(1) if how == "mean" else heads[:, 0]).flatten(0, 1)

    return replace(config, n_kv_heads=n_kv_heads), pooled


# ---------------------------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """A command line whose errors are one sentence, without the list of all flags before it."""

    def error(self, message: str) -> None:
        """Raise it, instead of printing and leaving."""
        raise ModelError(f"{message}; --help lists what there is")


def tokenizer_beside(folder: str | Path, config: ModelConfig) -> str:
    """The tokenizer's file in a folder of weights, which may be missing. ModelError if its ids are not those of the weights."""
    from tokenizer import Tokenizer
    file = Path(folder, "tokenizer.model")
    if file.exists() and (size := Tokenizer(file).vocab_size) > config.vocab_size:  # weights may be padded to a round number
        raise ModelError(f"{file} has {size} pieces, the weights beside it only {config.vocab_size}; put back the one that they "
                         "came with")
    return str(file)


def read_any(folder: str) -> tuple[ModelConfig, Callable, str]:
    """(config, weight_of, tokenizer file) of a folder of ours, of Meta's, or of Hugging Face's."""
    here = Path(folder)
    if (here / "params.json").exists():
        config, weight_of = meta_weights(here)
    elif list(here.glob("step-*[0-9]")):
        from pretrain import stored_weights
        config, weight_of = stored_weights(folder)
    elif (here / "config.json").exists():
        config, weight_of = hf_weights(here)
    else:
        raise ModelError(f"{folder} holds no weights that are known here: no params.json, no config.json, no step-* folder; "
                         "name one that does")
    return config, weight_of, tokenizer_beside(here, config)


def main() -> None:
    """Convert weights between formats, or continue a prompt."""
    parser = Parser(description="Convert weights, or continue a prompt.")
    commands = parser.add_subparsers(dest="command", required=True)
    convert = commands.add_parser("convert", help="from Meta's, Hugging Face's or our folder to Hugging Face's or ours")
    convert.add_argument("source")
    convert.add_argument("target")
    convert.add_argument("--to", choices=["hf", "ours"], required=True)
    convert.add_argument("--n_kv_heads", type=int, help="pool the key and value heads to so many (Ainslie et al., 2023)")
    convert.add_argument("--pool", choices=["mean", "first", "random"], default="mean")
    convert.add_argument("--dtype", choices=["same", *DTYPES], default="same", help="same: as they are (fp32 from a run of ours)")
    speak = commands.add_parser("generate", help="continue a prompt")
    speak.add_argument("source")
    speak.add_argument("--prompt", default="")
    speak.add_argument("--max_new_tokens", type=int, default=128)
    speak.add_argument("--temperature", type=float, default=0.6)
    speak.add_argument("--top_p", type=float, default=0.9)
    speak.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if os.environ.get("RANK", "0") != "0":
        return  # one process of torchrun's is enough
    config, weight_of, tokenizer_file = read_any(args.source)
    if args.command == "generate":
        from tokenizer import TextStream, Tokenizer
        tokenizer = Tokenizer(tokenizer_file)
        model = load_weights(config, weight_of).to("cuda" if torch.cuda.is_available() else "cpu")
        stream = TextStream(tokenizer)
        prompt = tokenizer.encode(args.prompt, bos=True, eos=False)
        print("".join(stream.push(token) for token in prompt), end="", flush=True)  # the space behind it is the answer's
        generate(model, [prompt], args.max_new_tokens, args.temperature, args.top_p, (tokenizer.eos_id,), args.seed,
                 on_token=lambda _, token: print(stream.push(token), end="", flush=True))
        print(stream.flush())
        return
    if args.n_kv_heads is not None:
        config, weight_of = pool_kv_heads(config, weight_of, args.n_kv_heads, args.pool)
    dtype = DTYPES.get(args.dtype)  # None: as they are
    if args.to == "hf":
        with folder_aside(args.target) as aside:
            write_hf(config, weight_of, aside, dtype)
            if Path(tokenizer_file).exists():
                shutil.copy(tokenizer_file, aside)
    else:
        from pretrain import save_model
        save_model(load_weights(config, weight_of, dtype), args.target, tokenizer_file)
    print(args.target)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # ModelError, the errors of the other files, and a disk that is full or not ours
        print(f"model.py: {error}", file=sys.stderr)
        sys.exit(2)
