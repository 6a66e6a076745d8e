"""
GPT-2 by hand, a discriminator on top of it, and their files.

What is left out on purpose: training loops (each script has its own), attention dropout (only
embeddings and residual branches drop, and only in a discriminator's own step), weights of other
families than GPT-2.

Dimension key: B batch, K samples of a prompt, P prompt, R response, T = P + R, C channels,
H heads, D head size, V vocabulary, L layers.
Layout: prompts are left-padded to P and responses right-padded to R. `pad` (B,) counts the padding
tokens on the left; positions count real tokens only. What stands right of <|endoftext|> needs no
mask in here: attention is causal.
"""

import ctypes
import json
import math
import os
import pickle
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# -----------------------------------------------------------------------------
# GPT-2 (Radford et al. 2019)


@dataclass
class GPTConfig:
    block_size: int = 1024    # longest sequence, tokens
    vocab_size: int = 50257   # GPT-2's BPE
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0      # of embeddings and residual branches, in train() mode only

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f'{name} is {value!r}: give a whole number of at least 1')
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout <= 1:
            raise ValueError(f'dropout is {self.dropout!r}: give a number from 0 to 1')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: '
                             'change one of them')


# how compiled code calls oneDNN; it knows no gradient
ONEDNN = (getattr(torch.ops.mkldnn, '_linear_pointwise', None)
          if torch.backends.mkldnn.is_available() else None)


def linear(x, weight, bias=None, gelu=False):
    """
    F.linear, then GELU's tanh form on request; by oneDNN where that is faster than the BLAS: on a
    CPU, in float32, without gradient, and not in toys: it keeps code for each number of rows that
    it has met, up to a GiB in all.
    """
    if (torch.compiler.is_compiling() or torch.is_grad_enabled() or x.device.type != 'cpu'
            or x.dtype != torch.float32 or torch.is_autocast_enabled('cpu')
            or weight.numel() < 2 ** 18 or ONEDNN is None):
        y = F.linear(x, weight, bias)
        return F.gelu(y, approximate='tanh') if gelu else y
    return ONEDNN(x, weight, bias, 'gelu' if gelu else 'none', [], 'tanh' if gelu else '')


class Linear(nn.Linear):

    def forward(self, x, gelu=False):
        return linear(x, self.weight, self.bias, gelu)


class Attention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head

    def forward(self, x, mask, cache=None, columns=None):
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2)         # (B, H, T, D) each
                   for z in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            # the cache may have K rows for each row of x: the prefill of a prompt serves them all
            for buffer, z in zip(cache, (k, v)):                         # (B*K, H, P + R, D)
                rows = buffer.unflatten(0, (B, -1))
                rows.index_copy_(3, columns, z[:, None].to(rows.dtype).expand(
                    -1, rows.size(1), -1, -1, -1))
            if mask is not None and mask.size(-1) > T:                   # decoding, not prefill
                k, v = cache
        if mask is not None:
            q = q[:, :, -mask.size(-2):]                                 # few in the last block
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.c_proj(y.transpose(1, 2).reshape(B, q.size(2), C))

    def prefill(self, x, runs, cache, P, last):
        """
        Whole prompts without padding, one after another, each attending to itself.

        x        (N, C), in runs of (rows, tokens) of one length
        cache    keys and values (2, B*K, H, P + R, D), to be written up to column P
        last     ask for each prompt's last token alone
        returns  (N, C), or (B, C) with last
        """
        qkv = self.c_attn(x).view(len(x), 3, self.n_head, -1)
        caches, row, out = cache.unflatten(1, (sum(rows for rows, _ in runs), -1)), 0, []
        for part, (rows, T) in zip(qkv.split([rows * T for rows, T in runs]), runs):
            q, k, v = part.unflatten(0, (rows, T)).permute(2, 0, 3, 1, 4)    # (rows, H, T, D) each
            for buffer, z in zip(caches, (k, v)):                            # (B, K, H, P + R, D)
                buffer[row:row + rows, :, :, P - T:P] = z[:, None]
            y = F.scaled_dot_product_attention(q[:, :, -1:] if last else q, k, v,
                                               is_causal=not last)
            out.append(y.transpose(1, 2).flatten(2).flatten(0, 1))
            row += rows
        return self.c_proj(torch.cat(out))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        # the tanh form is what the weights were trained with; the exact one is 4.7e-4 off
        return self.c_proj(self.c_fc(x, gelu=True))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, cache=None, columns=None):
        y = self.attn(self.ln_1(x), mask, cache, columns)
        x = x[:, -y.size(1):] + self.dropout(y)
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """Pre-LN GPT-2 with a tied head; the parameters have OpenAI's names."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.kept_cache = None            # reused: fresh memory is slow memory
        self.compiled = False
        self.init_weights()

    def init_weights(self):
        """
        Fan-in scaling for training from scratch: matrices 1/sqrt(fan_in), embeddings .3, the last
        gain .5, which halves the logits. GPT-2's own std .02 is small for a model as narrow as
        the toy's.
        """
        for name, p in self.named_parameters():
            if p.dim() == 2:
                std = .3 if name in ('wte.weight', 'wpe.weight') else p.size(1) ** -.5
                if name.endswith('c_proj.weight'):
                    std /= math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(p, std=std)
            else:
                nn.init.zeros_(p) if name.endswith('bias') else nn.init.ones_(p)
        nn.init.constant_(self.ln_f.weight, .5)

    def embed(self, tokens):
        """
        Token embeddings of ids or of one-hots; equal bit for bit on CPU in float32.

        tokens   (B, T) integer ids, or (B, T, V) floating one-hots, which get the gradient
        returns  (B, T, C)
        """
        if tokens.is_floating_point():
            return tokens @ self.wte.weight
        return self.wte(tokens)

    def hidden(self, x, pad=None, cache=None, slot=None, last=None, shared=None):
        """
        The trunk: token embeddings in, the last layer norm's output out.

        x        (B, T, C) token embeddings
        pad      (B,) padding tokens at the left of each row; None for none
        cache    (2, L, B*K, H, P + R, D) keys and values, written in place; needs `pad`
        slot     (1,) column of the one token of a decoding step; None for a pass over whole rows
        last     so many columns on the right are wanted, and the last block, unless compiled,
                 computes no others; None for all
        shared   (P, R): P columns of prompt, then responses of R columns each that go on from it
                 and are blind to one another; needs `pad`. None for one sequence a row
        returns  (B, last, C), or (B, T, C)
        """
        B, T, _ = x.shape
        columns = torch.arange(T, device=x.device) if slot is None else slot
        positions, mask, places = columns.expand(B, T), None, columns
        if shared is not None:
            P, R = shared
            whose = torch.where(columns < P, -1, (columns - P) // R)         # -1: the prompt's
            places = torch.where(columns < P, columns, P + (columns - P) % R)
        if pad is not None:
            positions = (places - pad[:, None]).clamp(min=0)                 # (B, T)
            keys = columns if slot is None else torch.arange(cache.size(4), device=x.device)
            # rows without padding take plain causal attention, which is faster; not on a GPU, where
            # the host would wait to know, nor compiled, where there would be two graphs
            if shared or slot is not None or self.compiled or pad.is_cuda or pad.any():
                # the diagonal too: a padding query sees no key, and a softmax over nothing is NaN
                mask = (keys >= pad[:, None])[:, None] & (keys <= columns[:, None])
                mask = (mask | (keys == columns[:, None]))[:, None]          # (B, 1, T, keys)
                if shared is not None:
                    mask = mask & ((whose < 0) | (whose == whose[:, None]))
        x = self.dropout(x + self.wpe(positions))
        for i, block in enumerate(self.h):
            # not compiled, where a narrower block would be one more graph for each size
            if i == len(self.h) - 1 and last is not None and last < T and not self.compiled:
                if mask is None:
                    mask = (columns <= columns[:, None])[None, None]         # (1, 1, T, T)
                mask = mask[:, :, -last:]
            x = block(x, mask, None if cache is None else cache[:, i], columns)
        return self.ln_f(x if last is None else x[:, -last:])

    def prefill(self, prompt, pad, cache):
        """
        Trunk outputs (B, C) at the end of prompts, as `hidden` has them; no padding is computed.

        prompt   (B, P) ids, sorted by pad (B,), their padding tokens on the left
        cache    (2, L, B*K, H, P + R, D) keys and values, written in place
        """
        P = prompt.size(1)
        lengths, rows = (P - pad).unique_consecutive(return_counts=True)
        runs = list(zip(rows.tolist(), lengths.tolist()))
        positions = torch.arange(P, device=pad.device) - pad[:, None]        # (B, P)
        real = positions >= 0
        x = self.embed(prompt[real]) + self.wpe(positions[real])             # (N, C)
        for i, block in enumerate(self.h):
            last = i == len(self.h) - 1
            y = block.attn.prefill(block.ln_1(x), runs, cache[:, i], P, last)
            x = y + (x[(P - pad).cumsum(0) - 1] if last else x)
            x = x + block.mlp(block.ln_2(x))
        return self.ln_f(x)

    def head(self, x):
        """Logits (..., V) of trunk outputs (..., C)."""
        return linear_in_float32(x, self.wte.weight)

    def forward(self, tokens, pad=None):
        """Logits (B, T, V) of ids or one-hots; for training use `logprobs`, which holds fewer."""
        return self.head(self.hidden(self.embed(tokens), pad))

    def logprobs(self, tokens, pad=None, start=1, temperature=1.0):
        """
        Log-probabilities of tokens[:, start:], each given all that stands to its left.

        The head runs over those columns alone, in chunks that the backward pass computes again,
        so no (B, T, V) is ever held.

        tokens    (B, T) ids
        pad       (B,) padding tokens at the left of each row; None for none
        start     first column wanted, P for the response alone
        temperature  divides the logits
        returns   logprobs (B, T - start) in nats, with gradient,
                  entropy (B, T - start) of the predicting distribution in nats, no gradient
        """
        assert 1 <= start < tokens.size(1), (start, tokens.shape)
        targets = tokens[:, start:]
        x = self.hidden(self.embed(tokens[:, :-1]), pad, last=targets.size(1))
        return self.token_logprobs(x, targets, temperature)

    def response_logprobs(self, prompt, pad, response, temperature=1.0):
        """
        Like `logprobs`, of K responses to each prompt, which runs through the model once for them.

        prompt    (B, P) ids, pad (B,) padding tokens at the left of each row
        response  (B*K, R) ids, those of one prompt side by side
        returns   logprobs, entropy (B*K, R) in nats
        """
        return self.token_logprobs(self.response_hidden(prompt, pad, response), response,
                                   temperature)

    def response_hidden(self, prompt, pad, response):
        """Trunk outputs (B*K, R, C) that each token of responses (B*K, R) is predicted from."""
        B, P = prompt.shape
        K, R = len(response) // B, response.size(1)
        assert len(response) == K * B, (prompt.shape, response.shape)
        tail = response[:, :-1].reshape(B, K * (R - 1))
        x = self.hidden(self.embed(torch.cat((prompt, tail), 1)), pad, last=1 + tail.size(1),
                        shared=(P, R - 1) if K > 1 and R > 1 else None)
        x = torch.cat((x[:, :1].expand(-1, K, -1)[:, :, None], x[:, 1:].unflatten(1, (K, R - 1))),
                      2)                                                     # (B, K, R, C)
        return x.flatten(0, 1)

    def token_logprobs(self, x, targets, temperature):
        """Log-probabilities and entropies (N, R) of targets (N, R) from trunk outputs (N, R, C)."""
        rows = max(1, HEAD_CHUNK // self.config.vocab_size)
        parts = list(zip(x.flatten(0, 1).split(rows), targets.flatten().split(rows)))
        if len(parts) > 1 and torch.is_grad_enabled():
            out = [checkpoint(self.chunk_logprobs, *part, temperature, use_reentrant=False)
                   for part in parts]
        else:
            out = [self.chunk_logprobs(*part, temperature) for part in parts]
        logprobs, entropy = (torch.cat(z).view(targets.shape) for z in zip(*out))
        return logprobs, entropy

    def chunk_logprobs(self, x, targets, temperature):
        """Log-probabilities and entropies (N,) of targets (N,) under trunk outputs (N, C)."""
        logits = self.head(x / temperature)                                  # (N, V)
        logprobs = -F.cross_entropy(logits, targets, reduction='none')
        with torch.no_grad():
            logp = F.log_softmax(logits, dim=-1)
            entropy = -(logp.exp() * logp).sum(-1)
        return logprobs, entropy

    @torch.no_grad()
    def generate(self, prompt, pad, max_response, eos, samples=1, temperature=1.0, top_k=None,
                 rng=None, keep_noise=False):
        """
        Samples K responses to each prompt, by the Gumbel-max trick and with cached keys and values.

        prompt       (B, P) ids, left-padded
        pad          (B,) padding tokens at the left of each row
        max_response, eos  at most R tokens; the id that ends a response and fills what follows it
        samples      K; the prompt runs through the model once for all of them
        temperature  divides the logits; 0 takes the most likely token
        top_k        sample among the k most likely tokens only; None for the full vocabulary
        rng          torch.Generator on the prompt's device; None for the global one
        returns      response (B*K, R) ids, rows of one prompt side by side,
                     mask (B*K, R) True up to and including eos,
                     noise (B*K, R, V) if keep_noise else None: the response is
                     argmax(logits / temperature + noise), where top_k leaves a choice
        Source: Maddison et al. 2014 (Gumbel-max).
        """
        B, P = prompt.shape
        if P + max_response > self.config.block_size:
            raise ValueError(f'prompt of {P} + response of {max_response} tokens exceed the '
                             f'block size {self.config.block_size}: lower --max_prompt or '
                             '--max_response')
        N, device = B * samples, prompt.device
        static = self.compiled or device.type == 'cuda'          # graphs want one shape
        cache, noises = self.cache(N, P + max_response), []
        order = torch.arange(B, device=device) if static else pad.argsort(stable=True)
        if static:
            x = self.hidden(self.embed(prompt), pad, cache, last=1)[:, 0]    # (B, C)
        else:
            x = self.prefill(prompt[order], pad[order], cache)
        rows = (order[:, None] * samples + torch.arange(samples, device=device)).flatten()
        x, pad = x.repeat_interleave(samples, 0), pad[order].repeat_interleave(samples, 0)
        response = torch.full((N, max_response), eos, device=device)
        mask = torch.zeros((N, max_response), dtype=torch.bool, device=device)
        alive = torch.ones(N, dtype=torch.bool, device=device)
        for t in range(max_response):
            logits = self.head(x / temperature if temperature > 0 else x)    # (n, V)
            if temperature > 0:
                if top_k is not None and top_k < logits.size(-1):
                    least = logits.topk(top_k).values[:, -1:]
                    logits = logits.masked_fill(logits < least, -math.inf)
                # -log(Exponential(1)) is Gumbel(0, 1). Noise is drawn for all rows, so that no
                # row's depends on when others end
                noise = exponential((N, logits.size(-1)), logits, rng).log_().neg_()
                logits = logits + (noise if static else noise[rows])
                if keep_noise:
                    noises.append(noise)
            token = torch.where(alive, logits.argmax(-1), eos)               # (n,)
            response[rows, t], mask[rows, t] = token, alive
            alive = alive & (token != eos)
            if t + 1 == max_response or (device.type != 'cuda' and not alive.any()):
                break           # on CUDA the look at `alive` would make the host wait each token
            if not static and 2 * alive.sum() <= len(alive):     # half of the rows are over
                kept, cache = alive.nonzero()[:, 0], cache[:, :, alive]
                rows, token, pad, alive = (z[kept] for z in (rows, token, pad, alive))
            slot = torch.full((1,), P + t, device=device)
            x = self.decode(token, pad, cache if static else cache[..., :P + t + 1, :], slot)
        noise = None
        if keep_noise:
            noise = torch.zeros(N, max_response, self.config.vocab_size, device=device)
            for t, step in enumerate(noises):
                noise[:, t] = step
        return response, mask, noise

    def decode(self, token, pad, cache, slot):
        """Trunk output (N, C) of one more token (N,) of every row, at column `slot` (1,)."""
        return self.hidden(self.embed(token[:, None]), pad, cache, slot)[:, 0]

    def cache(self, rows, columns):
        """Keys and values (2, L, rows, H, columns, D), zeros at first, kept for the next call."""
        c, weight = self.config, self.wte.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        shape = (2, c.n_layer, rows, c.n_head, columns, c.n_embd // c.n_head)
        kept = self.kept_cache
        if kept is None or (kept.shape, kept.dtype, kept.device) != (shape, dtype, weight.device):
            self.kept_cache = None                  # let go of the old one before the new one
            self.kept_cache = torch.zeros(shape, dtype=dtype, device=weight.device)
            # it is written in place, which CUDA graphs allow at a fixed address only
            torch._dynamo.mark_static_address(self.kept_cache)
        return self.kept_cache

    def compile(self):
        """
        Compiles in place: each block (one graph serves all layers) and the decoding step, on CUDA
        under CUDA graphs. Copy a model before, not after.
        """
        self.compiled = True
        for block in self.h:
            block.compile()
        if self.wte.weight.is_cuda:
            self.decode = torch.compile(self.decode, mode='reduce-overhead')

    @classmethod
    def from_pretrained(cls, source):
        """
        A GPT from OpenAI's weights or ours.

        source  gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2 (downloaded); a folder with
                config.json and model.safetensors or pytorch_model.bin; one .safetensors or .bin
                file; one of our .pt files
        raises  FileNotFoundError, ValueError: one sentence with the file and what is wrong with it
        """
        path = download(source) if source in HUB else Path(source)
        if path.suffix == '.pt':
            saved = load_checkpoint(path)
            try:
                config, weights = GPTConfig(**saved['gpt_config']), dict(saved['model'])
                if not all(type(k) is str and torch.is_tensor(v) for k, v in weights.items()):
                    raise TypeError
            except (TypeError, KeyError) as e:
                raise ValueError(f'{path} holds no model of ours: give a ckpt.pt or sft.pt') from e
        else:
            weights, settings = read_openai(path)
            config = infer_config(weights, settings, path)
        blocks = {k.split('.')[1] for k in weights if k.startswith('h.')}
        if len(blocks) != config.n_layer:
            raise ValueError(f'{source} has {len(blocks)} blocks of {config.n_layer}: not a whole '
                             'GPT-2')
        with torch.device('meta'):
            cls(config).load_strictly(weights, source)           # checked before memory is taken
        model = cls.uninitialised(config)
        model.load_strictly(weights, source)
        return model

    @classmethod
    def uninitialised(cls, config):
        """A GPT on the CPU whose weights are still to be loaded: drawing 124M takes seconds."""
        with torch.device('meta'):
            model = cls(config)
        return model.to_empty(device='cpu')

    def load_strictly(self, weights, source):
        """Copies a dict of tensors in; a missing, extra or misshapen one is a ValueError."""
        own = dict(self.named_parameters())
        missing, extra = (sorted(ascii(k)[1:-1] for k in z) for z in (
            own.keys() - weights.keys(), weights.keys() - own.keys()))
        wrong = [f'{k} {tuple(weights[k].shape)} for {tuple(own[k].shape)}'
                 for k in own.keys() & weights.keys() if weights[k].shape != own[k].shape]
        for what, names in ('lacks', missing), ('has unknown', extra), ('has misshapen', wrong):
            if names:
                raise ValueError(f'{source} {what} {", ".join(names[:3])}'
                                 f'{" ..." if len(names) > 3 else ""}: not a GPT-2 of this shape')
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(weights[name])

    def save_pretrained(self, folder):
        """Writes config.json and model.safetensors: transformers.GPT2LMHeadModel opens them."""
        c, folder = self.config, Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu() for k, v in self.named_parameters()}
        weights = {k: (v.t() if is_conv1d(k) else v).contiguous() for k, v in weights.items()}
        save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
        config = {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'],
                  'n_positions': c.block_size, 'n_ctx': c.block_size, 'vocab_size': c.vocab_size,
                  'n_layer': c.n_layer, 'n_head': c.n_head, 'n_embd': c.n_embd,
                  'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
                  'bos_token_id': c.vocab_size - 1, 'eos_token_id': c.vocab_size - 1}
        (folder / 'config.json').write_text(json.dumps(config, indent=2) + '\n')


HEAD_CHUNK = 2 ** 26              # logits held at once, elements (256 MiB in float32)


def linear_in_float32(x, weight, bias=None):
    """
    F.linear outside of autocast, in float32; in float64, which tests use, where it comes so.

    GPT-2's logits are around -100, where bfloat16 has steps of 0.5: a log-probability rounded so
    is off by a tenth of a nat, and two passes over the same tokens disagree.
    """
    with torch.autocast(x.device.type, enabled=False):
        return linear(x.to(weight.dtype), weight, bias)


def exponential(shape, like, rng):
    """
    Exponential(1) draws of the dtype and on the device of `like`, by rng; never 0, so that their
    logarithm is finite. On a CPU five times as fast as exponential_(), and as fine as it is on a
    GPU: uniform draws of float32 have 24 bits.
    """
    uniform = torch.empty(shape, dtype=like.dtype, device=like.device).uniform_(generator=rng)
    return uniform.log_().neg_().clamp_(1e-30, 1e30)


# -----------------------------------------------------------------------------
# discriminator


class Discriminator(nn.Module):
    """
    A GPT-2 trunk and a scalar head: s_t is the score of (x, y_<=t), in logits.

    trunk  a GPT to copy; the head starts at zero, so every score does
    """

    def __init__(self, trunk, dropout=0.0):
        super().__init__()
        self.trunk = GPT.uninitialised(replace(trunk.config, dropout=dropout))
        self.trunk.load_state_dict(trunk.state_dict())
        self.score = nn.Linear(trunk.config.n_embd, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, prompt, pad, response):
        """
        prompt    (B, P) ids, or (B, P, V) one-hots
        pad       (B,) padding tokens at the left of each row
        response  (B*K, R) ids, or (B*K, R, V) one-hots, through which gradients flow; those of one
                  prompt, which runs through the trunk once for them, side by side
        returns   (B*K, R) scores at every response position, float32
        """
        B, P, N, R = *prompt.shape[:2], *response.shape[:2]
        assert N % B == 0, (prompt.shape, response.shape)
        x = torch.cat((self.trunk.embed(prompt),
                       self.trunk.embed(response).view(B, N // B * R, -1)), dim=1)
        x = self.trunk.hidden(x, pad, last=N // B * R, shared=(P, R) if N > B else None)
        return linear_in_float32(x, self.score.weight, self.score.bias).view(N, R)

    def compile(self):
        """Compiles the trunk in place."""
        self.trunk.compile()


def hold_last(scores, mask):
    """Scores (B, R) with what follows the mask's end replaced by s(x, y), the last real one."""
    columns = torch.arange(scores.size(1), device=scores.device)
    return scores.gather(1, torch.minimum(columns, mask.sum(1, keepdim=True) - 1))


# -----------------------------------------------------------------------------
# files in OpenAI's layout

HUB = {'gpt2': 'openai-community/gpt2', 'gpt2-medium': 'openai-community/gpt2-medium',
       'gpt2-large': 'openai-community/gpt2-large', 'gpt2-xl': 'openai-community/gpt2-xl',
       'distilgpt2': 'distilbert/distilgpt2'}


def download(name):
    """The folder of a hub checkpoint, from the Hugging Face cache or the network."""
    from huggingface_hub import snapshot_download           # comes with `datasets`
    try:
        return Path(snapshot_download(HUB[name], allow_patterns=['config.json',
                                                                 'model.safetensors']))
    except Exception as e:
        raise FileNotFoundError(f'{name} could not be downloaded ({type(e).__name__}): offline, '
                                'give --init_from a folder, a file or scratch') from e


def is_conv1d(name):
    """OpenAI keeps these matrices as (in, out), nn.Linear as (out, in)."""
    return name.endswith(('c_attn.weight', 'c_fc.weight', 'c_proj.weight'))


def read_openai(path):
    """Weights under our names and the settings of config.json ({} where there is none)."""
    if path.is_dir():
        files = [path / 'model.safetensors', path / 'pytorch_model.bin']
        file = next((f for f in files if f.is_file()), None)
        if file is None:
            raise FileNotFoundError(f'{path} has neither model.safetensors nor pytorch_model.bin: '
                                    'give --init_from a folder that has')
    else:
        file = path
    if not file.is_file():
        raise FileNotFoundError(f'{file} not found: give --init_from one of {", ".join(HUB)}, '
                                'scratch, a folder or a file')
    config_file, settings = file.parent / 'config.json', {}
    try:
        if file.suffix == '.safetensors':
            raw = load_file(file)
        elif file.suffix == '.bin':
            raw = load_checkpoint(file)
        else:
            raise ValueError(f'{file} is no .safetensors, .bin or .pt file: give --init_from one')
        if config_file.is_file():
            settings = json.loads(config_file.read_text())
    except SafetensorError as e:
        raise ValueError(f'{file} is not a readable safetensors file ({e}): get it again') from e
    except json.JSONDecodeError as e:
        raise ValueError(f'{config_file} is not JSON ({e}): get it again') from e
    weights = {}
    for name, tensor in raw.items():
        name = name.removeprefix('transformer.')
        if name.endswith(('.attn.bias', '.attn.masked_bias')):               # the causal mask
            continue
        weights[name] = tensor.t() if is_conv1d(name) and tensor.dim() == 2 else tensor
    head = weights.pop('lm_head.weight', None)
    wte = weights.get('wte.weight')
    if head is not None and wte is not None and not torch.equal(head, wte):
        raise ValueError(f'{file} has an lm_head that is not wte: not a GPT-2, whose head is tied')
    return weights, settings


def infer_config(weights, settings, path):
    """The GPTConfig of a dict of weights; what shapes cannot tell comes from config.json."""
    for name in 'wte.weight', 'wpe.weight':
        if name not in weights:
            raise ValueError(f'{path} lacks {name}: not a GPT-2')
        if weights[name].dim() != 2:
            raise ValueError(f'{path} has {name} of {weights[name].dim()} dimensions: not a GPT-2')
    fixed = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
             'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False}
    for key, value in fixed.items():
        if settings.get(key, value) != value:
            raise ValueError(f'{path} has {key} {settings[key]!r}: GPT-2 has {value!r}')
    vocab_size, n_embd = weights['wte.weight'].shape
    layers = [int(n) for k in weights for n in re.findall(r'^h\.(\d{1,4})\.', k)]
    config = GPTConfig(block_size=weights['wpe.weight'].size(0), vocab_size=vocab_size,
                       n_layer=max(layers, default=-1) + 1, n_embd=n_embd,
                       n_head=settings.get('n_head', max(1, n_embd // 64)))  # 64 in all GPT-2s
    return config


# -----------------------------------------------------------------------------
# optimizer

GRAD_CLIP = 1.0                   # largest gradient norm, of each network


def adamw(network):
    """The optimizer of a network; `update` sets its learning rate."""
    device = next(network.parameters()).device
    return torch.optim.AdamW(network.parameters(), lr=0.0, betas=(.9, .95), eps=1e-5,
                             weight_decay=0.0, fused=device.type != 'mps')


def schedule(step, steps, updates, warmup):
    """Share of the peak learning rate: linear over `warmup` updates, cosine decay to a tenth."""
    return min(1, updates / max(1, warmup)) * (.55 + .45 * math.cos(math.pi * step / steps))


def update(network, optimizer, lr):
    """Sums the gradient over ranks, clips it, takes a step unless it is not finite; its norm."""
    sum_gradients(network.parameters())
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), GRAD_CLIP)
    for group in optimizer.param_groups:
        group['lr'] = lr
    if norm.isfinite():                              # otherwise the log ends the run
        optimizer.step()
    optimizer.zero_grad()            # now: the next network's backward pass needs the memory
    return norm.item()


# -----------------------------------------------------------------------------
# ranks of torchrun; without it there is one, and each of these gives back what it is given


def join_ranks(device):
    """Meets the other ranks, once; returns this rank's device."""
    if 'LOCAL_RANK' not in os.environ:
        return device
    cuda = device.startswith('cuda')
    if cuda:
        device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group('nccl' if cuda else 'gloo')
    return device


def ranks():
    """This rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shard(index):
    """This rank's part of an array that is the same on all."""
    rank, n = ranks()
    return np.array_split(index, n)[rank]


def all_sum(x):
    """The sum over the ranks of a tensor, as a new one without gradient, or of a number."""
    if ranks()[1] == 1:
        return x
    number = not torch.is_tensor(x)
    if number:
        x = torch.tensor(float(x), dtype=torch.float64,
                         device='cuda' if dist.get_backend() == 'nccl' else 'cpu')
    x = x.detach().clone()
    dist.all_reduce(x)
    return x.item() if number else x


def sum_gradients(parameters):
    """Replaces each gradient by its sum over the ranks, all in one message."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if ranks()[1] == 1 or not grads:
        return
    flat = all_sum(torch.cat([g.flatten() for g in grads]))
    for g, summed in zip(grads, flat.split([g.numel() for g in grads])):
        g.copy_(summed.view_as(g))


def from_ranks(value):
    """A list of every rank's value, tensors on the CPU or plain."""
    values = [value] * ranks()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def gathered(*tensors):
    """Each tensor with the rows of all ranks, in their order, on the CPU."""
    parts = from_ranks([z.cpu() for z in tensors])
    return [torch.cat(z) for z in zip(*parts)]


# -----------------------------------------------------------------------------
# memory of the host


def keep_freed_memory():
    """
    Has glibc's malloc keep freed memory for the next large tensor instead of giving it back: on a
    CPU, much of a step's time goes into the kernel's clearing of fresh pages. Elsewhere a no-op.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(-4, 0)                                   # M_MMAP_MAX: no mappings of their own,
    mallopt(-1, -1)                                  # M_TRIM_THRESHOLD: no giving back


def trim_freed_memory():
    """Gives back what `keep_freed_memory` has kept, which in time lies in pieces too small for a
    large tensor: between evaluations it is a gain, over a long run it would double the memory."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass


# -----------------------------------------------------------------------------
# checkpoints: tensors and plain values only


def save_checkpoint(path, state):
    """
    Writes a temporary file, flushes it to disk, renames it: a crash leaves the old one whole.

    raises  OSError, one sentence, for a full disk and the like
    """
    path = Path(path)
    part = path.with_name(path.name + '.part')
    try:
        with open(part, 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as e:             # torch turns some of the first into the second
        part.unlink(missing_ok=True)
        reason = str(e).splitlines()[0]
        raise OSError(f'{path} could not be written ({reason}): the one before it is whole, make '
                      'room and --resume') from e


def load_checkpoint(path):
    """
    Reads what `save_checkpoint` wrote, onto the CPU; executes nothing it finds.

    raises  FileNotFoundError, or ValueError for a truncated file or one that holds code
    """
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f'{path} not found: give the path of a checkpoint') from None
    except pickle.UnpicklingError as e:
        raise ValueError(f'{path} refused, nothing executed: it is damaged, or holds more than '
                         'tensors and plain values') from e
    except Exception as e:           # bytes that are no pickle end in an error of any kind
        raise ValueError(f'{path} is not a readable checkpoint (truncated?): use another') from e


# -----------------------------------------------------------------------------
# a run: its device, folder, checkpoints and log


def open_device(cfg):
    """
    Joins the ranks and resolves the device, dtype and compile of a script's Config.

    raises  ValueError naming the flag
    """
    if cfg.device == 'auto':
        cfg.device = ('cuda' if torch.cuda.is_available() else
                      'mps' if torch.backends.mps.is_available() else 'cpu')
    try:
        cfg.device = join_ranks(cfg.device)
        torch.empty(1, device=cfg.device)
    except (RuntimeError, AssertionError) as e:
        raise ValueError(f'--device {cfg.device} is not to be had here: give another') from e
    cuda = cfg.device.startswith('cuda')
    cfg.dtype = ('bfloat16' if cuda else 'float32') if cfg.dtype == 'auto' else cfg.dtype
    cfg.compile = cuda if cfg.compile is None else cfg.compile
    if not cuda:
        keep_freed_memory()
    torch.set_float32_matmul_precision('high')                               # TF32 on CUDA
    # a block has a graph for each of: with gradient, without, prefill, decoding, sizes of batches
    torch._dynamo.config.cache_size_limit = 64     # recompile_limit since torch 2.7
    n_ranks = ranks()[1]
    for name in 'batch_size', 'sft_batch_size', 'minibatch':
        multiple = n_ranks * (cfg.samples if name == 'minibatch' else 1)
        if getattr(cfg, name, 0) % multiple:
            raise ValueError(f'--{name} {getattr(cfg, name)} cannot be shared by {n_ranks} ranks: '
                             f'give a multiple of {multiple}')


def open_folder(cfg):
    """
    Makes out_dir, unless it holds a run, and returns it and its lock, which holds as long as it is
    kept. Rank 0 writes and prints for all.

    raises  ValueError naming the flag, OSError
    """
    out, lock = Path(cfg.out_dir), None
    if ranks()[0]:
        sys.stdout = open(os.devnull, 'w')
    else:
        old = [name for name in ('ckpt.pt', 'sft.pt', 'metrics.jsonl') if (out / name).exists()]
        if old and not (cfg.resume or cfg.overwrite):
            raise ValueError(f'--out_dir {out} holds a run ({old[0]}): give --resume, --overwrite '
                             'or another --out_dir')
        out.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(out)
        if cfg.overwrite:
            for name in old:
                (out / name).unlink()
    all_sum(0)                                       # the others wait for the folder
    return out, lock


def lock_folder(folder):
    """An open file that locks a folder while it lives, with its process; ValueError if one does."""
    try:
        import fcntl
    except ImportError:                              # Windows
        return None
    lock = open(folder / 'lock', 'w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f'--out_dir {folder} is in use by another run: give another') from None
    return lock


def catch_signals():
    """A list that SIGINT or SIGTERM puts its number into; a second one ends the process at once."""
    caught = []

    def handler(number, _):
        if caught:
            os._exit(128 + number)
        caught.append(number)

    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, handler)
    return caught


def autocast(cfg):
    """bfloat16 activations on request; weights, losses and optimizers stay float32."""
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16, cfg.dtype == 'bfloat16')


def peak_memory(device):
    """The most memory this process has held, GiB: of the GPU, or of the machine on a CPU."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    import resource                                  # not on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2 ** (30 if sys.platform == 'darwin' else 20)


class Stopwatch:
    """Seconds by station of one iteration; waits for the GPU only when a station ends."""

    def __init__(self, device):
        self.cuda, self.seconds = device.startswith('cuda'), {}
        self.start = time.perf_counter()

    def __call__(self, station):
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[station], self.start = now - self.start, now
        return self.seconds


class Log:
    """
    Appends records to out_dir/metrics.jsonl, below a header with the config; rank 0 does.

    size    bytes of the file that the checkpoint to go on from knew of: the rest is cut off
    raises  FloatingPointError for a number that is not finite
    """

    def __init__(self, out, cfg, size=0):
        self.out, self.path, self.writes = out, out / 'metrics.jsonl', not ranks()[0]
        if not self.writes:
            return
        if size and self.path.exists():
            os.truncate(self.path, min(size, self.size()))
            return
        cuda = cfg.device.startswith('cuda')
        header = {'config': asdict(cfg), 'python': sys.version.split()[0],
                  'torch': torch.__version__, 'threads': torch.get_num_threads(),
                  'device': torch.cuda.get_device_name(cfg.device) if cuda else cfg.device}
        self.path.write_text(json.dumps(header) + '\n')

    def size(self):
        """Bytes written so far, for a checkpoint."""
        return self.path.stat().st_size if self.writes else 0

    def __call__(self, record, show):
        """Writes a record, a dict, and prints its numbers on request."""
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                where = next(f'{k} {record[k]}' for k in ('iter', 'sft_iter') if k in record)
                raise FloatingPointError(
                    f'{name} is {value} at {where}: the checkpoint in {self.out} is from before; '
                    'give a lower learning rate, a flag that ends in lr, and --resume')
        if not self.writes:
            return
        with open(self.path, 'a') as f:
            f.write(json.dumps(record) + '\n')
        if show:
            flat = {**record, **record.get('dev', {})}
            tqdm.write('  '.join(f'{k} {v:.3f}' if isinstance(v, float) else f'{k} {v}'
                                 for k, v in flat.items() if not isinstance(v, (dict, list))
                                 and v is not None), file=sys.stdout)
            sys.stdout.flush()


def save(path, generator, cfg, log, **more):
    """Rank 0's checkpoint, which GPT.from_pretrained reads; with the settings, how much of the log
    it knows of, and what else is given."""
    if ranks()[0]:
        return
    settings = {k: v for k, v in asdict(cfg).items() if k not in ('resume', 'overwrite')}
    save_checkpoint(path, {'model': generator.state_dict(), 'gpt_config': asdict(generator.config),
                           'settings': settings, 'log_size': log.size(), **more})
