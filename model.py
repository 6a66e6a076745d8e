"""
Functions of tensors first: GPT-2 by hand, a discriminator on top of it, OpenAI's files. Then, from
`flags` on, what every run needs: its flags and command line, optimizer, ranks, device, folder,
checkpoints, log. Left out on purpose: training loops, attention dropout, other families than GPT-2.

Dimension key: B batch, K answers to a prompt, P prompt, R response, T columns, C channels, H heads,
D head size, V vocabulary.
Layout: a row is a prompt of P columns, left-padded, and after it K answers of R columns each,
right-padded, which go on from the prompt and are blind to one another: a prompt runs through a
network once for all its answers. `pad` (B,) counts the padding tokens on the left; positions count
real tokens only. What stands right of <|endoftext|> needs no mask here: attention is causal.
"""

import argparse
import contextlib
import copy
import ctypes
import hashlib
import importlib.util
import json
import linecache
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple, Optional, get_args

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
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
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: '
                             'change one of them')


class Rollout(NamedTuple):
    response: torch.Tensor       # (B, K, R) sampled ids, filled up with eos
    mask: torch.Tensor           # (B, K, R) True up to and including eos
    ended: torch.Tensor          # (B, K) whether eos came within R


class Attention(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head

    def forward(self, x, mask, columns, cache=None):
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2)             # (B, H, T, D) each
                   for z in self.c_attn(x).split(C, dim=2))
        if cache is not None:
            keys, values = cache                                             # (B, H, P + K*R, D)
            keys.index_copy_(2, columns, k.to(keys.dtype))
            values.index_copy_(2, columns, v.to(values.dtype))
            if mask.size(-1) > T:                    # decoding, not the prompt's own pass
                k, v = keys, values
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        # the tanh form is what the weights were trained with; the exact one is 4.7e-4 off
        return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))


class Block(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask, columns, cache=None):
        x = x + self.dropout(self.attn(self.ln_1(x), mask, columns, cache))
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
        self.caches = {}                  # kept, for CUDA graphs want the same ones
        self.low = None                   # once compiled on CUDA: blocks as cast, [] for none yet
        self.init_weights()

    def init_weights(self):
        """Fan-in scaling for a start from scratch: matrices 1/sqrt(fan_in), embeddings .3, the last
        gain .5, which halves the logits. GPT-2's own std .02 is small for models like the toy."""
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
        """Token embeddings (B, T, C) of ids (B, T), or of one-hots (B, T, V), which get the
        gradient; equal bit for bit on a CPU in float32."""
        if tokens.is_floating_point():
            return tokens @ self.wte.weight
        return self.wte(tokens)

    def hidden(self, x, pad, P, R, cache=None, t=None):
        """
        The trunk: token embeddings in, the last layer norm's output out.

        x        (B, T, C) token embeddings of a row's first T columns: its prompt, maybe answers
        pad      (B,) padding tokens at the left of each row
        P, R     columns of the prompt, and of an answer
        cache    keys and values of each layer, two of (B, H, P + K*R, D), written in place
        t        (1,) with it, x (B, K, C) is token number t of each of the K answers instead
        """
        columns = torch.arange(x.size(1), device=x.device)    # of x; with t, 0 to K - 1 as yet
        keys = columns
        if t is not None:
            columns, keys = P + R * columns + t, torch.arange(cache[0][0].size(2), device=x.device)
        #              sees:  prompt  answer 0  answer 1        # all of it
        #   prompt              \         .         .           \ up to its own column
        #   answer 0            #         \         .           . nothing
        #   answer 1            #         .         \           and nobody the padding
        # of each key: the number of its answer, -1 for the prompt; its column, were that alone
        answer = torch.where(keys < P, -1, (keys - P) // R)
        place = torch.where(keys < P, keys, P + (keys - P) % R)
        mask = (answer < 0) | (answer == answer[columns, None])              # (T, keys)
        mask = mask & (place <= place[columns, None]) & (place >= pad[:, None, None])
        # the diagonal too: a padding token sees no other, and a softmax over nothing is NaN
        mask = (mask | (keys == columns[:, None]))[:, None]                  # (B, 1, T, keys)
        x = self.dropout(x + self.wpe((place[columns] - pad[:, None]).clamp(min=0)))
        for i, block in enumerate(self.h if t is None or not self.low else self.low):
            x = block(x, mask, columns, None if cache is None else cache[i])
        return self.ln_f(x)

    def head(self, x):
        """Logits (..., V) of trunk outputs (..., C)."""
        weight, V = self.wte.weight, self.config.vocab_size
        # tensor cores want whole tiles, 50257 is odd; decoding's few rows are not worth a copy
        if x.is_cuda and x.shape[:-1].numel() >= 512:
            weight = F.pad(weight, (0, 0, 0, -V % 64))
        return linear_in_float32(x, weight)[..., :V]

    def forward(self, tokens, pad=None):
        """Logits (B, T, V) of ids or one-hots; training asks for `response_logprobs`."""
        if pad is None:
            pad = torch.zeros(len(tokens), dtype=torch.long, device=tokens.device)
        return self.head(self.hidden(self.embed(tokens), pad, tokens.size(1), 1))

    def response_hidden(self, prompt, pad, response):
        """Trunk outputs (B, K, R, C) that each token of responses (B, K, R) is predicted from."""
        P, (K, R) = prompt.size(1), response.shape[1:]
        tokens = torch.cat((prompt, response[:, :, :-1].flatten(1)), 1)
        x = self.hidden(self.embed(tokens), pad, P, max(R - 1, 1))
        first = x[:, None, P - 1:P].expand(-1, K, -1, -1)                    # of the first tokens
        return torch.cat((first, x[:, P:].unflatten(1, (K, R - 1))), 2)

    def response_logprobs(self, prompt, pad, response, temperature=1.0, entropy=False):
        """
        Log-probabilities of K responses to each prompt, each token given all to its left.

        prompt       (B, P) ids, pad (B,) padding tokens at the left of each row
        response     (B, K, R) ids
        temperature  divides the logits
        entropy      whether it is wanted, for it takes passes over the logits
        returns      logprobs (B, K, R) in nats, with gradient,
                     entropy (B, K, R) of the predicting distribution in nats, no gradient, or None
        """
        x = self.response_hidden(prompt, pad, response) / temperature
        return self.logprobs_and_entropy(x, response, entropy)

    def logprobs_and_entropy(self, x, response, entropy):
        """What `response_logprobs` returns, of trunk outputs (B, K, R, C) over the temperature."""
        logp = self.head(x).log_softmax(-1)                                  # (B, K, R, V)
        # compiled, nll_loss takes, beside the logits, only their gradient; gather as much again
        logprobs = -F.nll_loss(logp.flatten(0, -2), response.flatten(), reduction='none')
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1) if entropy else None
        return logprobs.view(response.shape), entropy

    @torch.no_grad()
    def generate(self, prompt, pad, max_response, eos, samples=1, temperature=1.0, top_k=None,
                 rng=None):
        """
        Samples K responses to each prompt, by the Gumbel-max trick (Maddison et al. 2014) and with
        cached keys and values.

        prompt       (B, P) ids, left-padded, pad (B,) padding tokens at the left of each row
        max_response, eos  at most R tokens; the id that ends a response and fills what follows it
        samples      K
        temperature  divides the logits; 0 takes the most likely token
        top_k        sample among the k most likely tokens only; None for the full vocabulary
        rng          torch.Generator on the prompt's device; None for the global one
        returns      a Rollout
        """
        (B, P), K, R, device = prompt.shape, samples, max_response, prompt.device
        assert P + R <= self.config.block_size, (P, R)
        response = torch.full((B, K, R), eos, device=device)
        alive = torch.ones((B, K), dtype=torch.bool, device=device)
        cache = self.cache(B, P + K * R)
        self.cast()
        x = self.hidden(self.embed(prompt), pad, P, R, cache)[:, -1:].expand(-1, K, -1)
        for t in range(R):
            logits = self.head(x / (temperature or 1))                       # (B, K, V)
            if top_k is not None and top_k < logits.size(-1):
                least = logits.topk(top_k).values[..., -1:]
                logits = logits.masked_fill(logits < least, -math.inf)
            token = (self.pick(logits, uniform(logits.shape, logits, rng)) if temperature else
                     logits.argmax(-1)).where(alive, eos)                    # (B, K)
            response[:, :, t] = token
            alive = alive & (token != eos)
            # on CUDA the host waits for a look at `alive`: every eighth token is enough
            if t + 1 == R or ((device.type != 'cuda' or t % 8 == 7) and not alive.any()):
                break
            x = self.decode(token, pad, P, R, cache, torch.full((1,), t, device=device))
        over = response == eos
        return Rollout(response, over.cumsum(-1) <= over, over[..., -1])

    def decode(self, token, pad, P, R, cache, t):
        """Trunk outputs (B, K, C) of tokens (B, K), number t (1,) of each answer."""
        return self.hidden(self.embed(token), pad, P, R, cache, t)

    @staticmethod
    def pick(logits, u):
        """Samples (B, K) of logits (B, K, V) by uniform u; -log(Exponential(1)) is Gumbel(0, 1)."""
        return (logits - exponential(u.clone()).log_()).argmax(-1)

    def cast(self):
        """Casts the blocks' matrices for a rollout where decoding is compiled: under autocast it
        would cast them at each token. The copies are kept, for graphs want one address."""
        device = self.wte.weight.device.type
        if self.low is None:
            return
        if not torch.is_autocast_enabled(device):
            self.low = []
            return
        if not self.low:
            self.low = list(copy.deepcopy(self.h).requires_grad_(False).eval())      # eager again
            for m in (m for block in self.low for m in block.modules() if isinstance(m, nn.Linear)):
                m.to(torch.get_autocast_dtype(device))
        torch._foreach_copy_([p for block in self.low for p in block.parameters()],
                             list(self.h.parameters()))

    def cache(self, rows, columns):
        """Keys and values of each layer, (rows, H, columns, D), kept for four shapes: a run has
        its rollouts' and its evaluations'."""
        c, weight = self.config, self.wte.weight
        dtype = weight.dtype
        if torch.is_autocast_enabled(weight.device.type):
            dtype = torch.get_autocast_dtype(weight.device.type)
        shape = rows, c.n_head, columns, c.n_embd // c.n_head
        key = shape, dtype, weight.device
        if key not in self.caches:
            # a tensor each, so that a compiled step writes in place instead of copying the cache;
            # CUDA graphs take that because the address is marked as static
            cache = [[torch.zeros(shape, dtype=dtype, device=weight.device) for _ in range(2)]
                     for _ in range(c.n_layer)]
            for z in sum(cache, []):
                torch._dynamo.mark_static_address(z, guard=False)
            self.caches[key] = cache
            if len(self.caches) > 4:
                del self.caches[next(iter(self.caches))]         # the one used the longest ago
        self.caches[key] = self.caches.pop(key)      # now the last
        return self.caches[key]

    def __getstate__(self):
        """A copy is not compiled: what is belongs to these weights."""
        compiled = 'logprobs_and_entropy', 'decode', 'pick'
        state = {k: v for k, v in super().__getstate__().items() if k not in compiled}
        return state | {'caches': {}, 'low': None}

    def compile(self):
        """Compiles in place, for each shape anew: each block (one graph serves all layers) and the
        loss, on CUDA sampling and, under CUDA graphs, decoding."""
        for block in self.h:
            block.compile(dynamic=False)
        self.logprobs_and_entropy = torch.compile(self.logprobs_and_entropy, dynamic=False)
        if self.wte.weight.is_cuda:
            self.decode = torch.compile(self.decode, mode='reduce-overhead', dynamic=False)
            self.pick = torch.compile(self.pick)
            self.low = []                 # from now on `cast` fills it

    @classmethod
    def from_pretrained(cls, source):
        """
        A GPT, in eval mode, from OpenAI's weights, ours or nanoGPT's.

        source  gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2 (downloaded); a folder with
                config.json and model.safetensors, or the latter; a .pt file of ours or of
                nanoGPT, whose exact GELU is run as the tanh form; a run's folder, for its last
                checkpoint. Up to 47 tokens beyond GPT-2's 50257 are left out; a vocab.json or
                tokenizer.json beside the weights has to be GPT-2's
        raises  FileNotFoundError, ValueError: one sentence with the file and what is wrong with it
        """
        path = download(source) if source in HUB else Path(source)
        try:
            weights, config = read_weights(path)
            with torch.device('meta'):               # nothing is drawn, no memory taken
                model = cls(config)
            model.load_state_dict({k: v.float() for k, v in weights.items()}, assign=True)
        except (AttributeError, LookupError, RuntimeError, TypeError, ZeroDivisionError) as e:
            reason = ' '.join(ascii(str(e)).replace('\\n', ' ').replace('\\t', ' ').split())
            raise ValueError(f'{source} is not a whole GPT-2: {reason[:300]}') from e
        return model.eval()

    def save_pretrained(self, folder):
        """Writes what transformers.GPT2LMHeadModel opens: weights, config.json and, to sample from
        the whole vocabulary, generation_config.json. The last id ends an answer, as in GPT-2."""
        c, folder = self.config, Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().cpu() for k, v in self.named_parameters()}
        weights = {k: (v.t() if k.endswith(TURNED) else v).contiguous() for k, v in weights.items()}
        save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
        ends = dict.fromkeys(('bos_token_id', 'eos_token_id'), c.vocab_size - 1)
        config = {'model_type': 'gpt2', 'architectures': ['GPT2LMHeadModel'], **ends,
                  'n_positions': c.block_size, 'vocab_size': c.vocab_size, 'n_layer': c.n_layer,
                  'n_head': c.n_head, 'n_embd': c.n_embd}
        how = {**ends, 'pad_token_id': c.vocab_size - 1, 'do_sample': True, 'top_k': 0}
        for name, settings in ('config.json', config), ('generation_config.json', how):
            (folder / name).write_text(json.dumps(settings, indent=2) + '\n')
        print(f"written: {folder}, without a tokenizer: take AutoTokenizer.from_pretrained('gpt2')")


def linear_in_float32(x, weight, bias=None):
    """F.linear outside of autocast: GPT-2's logits are around -100, where bfloat16 has steps of
    .5, and two passes over the same tokens would disagree; TF32 errs by .01 to .02 (simulated)."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(weight.dtype), weight, bias)


def uniform(shape, like, rng):
    """Draws from [0, 1) of the dtype and on the device of `like`, by rng."""
    return torch.empty(shape, dtype=like.dtype, device=like.device).uniform_(generator=rng)


def exponential(u):
    """Exponential(1) in place of uniform draws, never 0; on a CPU 5 x as fast as exponential_()."""
    return u.log_().neg_().clamp_(1e-30, 1e30)


# -----------------------------------------------------------------------------
# discriminator

class Discriminator(nn.Module):
    """A copy of a GPT-2 trunk and a scalar head: s_t is the score of (x, y_<=t), in logits; the
    head starts at zero, so every score does."""

    def __init__(self, trunk, dropout=0.0):
        super().__init__()
        with torch.device('meta'):                   # nothing is drawn: the weights are copies
            self.trunk = GPT(replace(trunk.config, dropout=dropout))
        self.trunk.load_state_dict({k: v.clone() for k, v in trunk.state_dict().items()},
                                   assign=True)
        self.score = nn.Linear(trunk.config.n_embd, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, prompt, pad, response):
        """
        prompt    (B, P) ids, pad (B,) padding tokens at the left of each row
        response  (B, N, R) ids, or (B, N, R, V) one-hots, through which gradients flow: N answers
                  to each prompt
        returns   (B, N, R) scores at every response position, float32
        """
        P, (N, R) = prompt.size(1), response.shape[1:3]
        x = torch.cat((self.trunk.embed(prompt), self.trunk.embed(response.flatten(1, 2))), 1)
        x = self.trunk.hidden(x, pad, P, R)[:, P:]
        return linear_in_float32(x, self.score.weight, self.score.bias).unflatten(1, (N, R))[..., 0]


def hold_last(scores, mask):
    """Scores (..., R) with what follows the mask's end replaced by s(x, y), the last real one."""
    columns = torch.arange(scores.size(-1), device=scores.device)
    return scores.gather(-1, torch.minimum(columns, mask.sum(-1, keepdim=True) - 1))


def margin(scores, response, mask, ended, prefixes=True):
    """
    What a sampled answer is worth beside the gold one, (B, K): tanh((s - s*) / 2), which is
    2 sigmoid(s - s*) - 1, in [-1, 1]; 0 for the gold answer itself, -1 for one that does not end
    where the gold answer does.

    scores, response, mask  (B, 1 + K, R), the gold answer first; scores as `hold_last` leaves them
    ended     (B, 1 + K) whether eos came within R
    prefixes  s* is the gold answer's score as far as the sample goes; without, of all of it
    """
    ends = mask[:, 1:].sum(-1) - 1                                           # (B, K) columns
    gold = scores[:, 0].gather(1, ends) if prefixes else scores[:, :1, -1]
    values = ((scores[:, 1:, -1] - gold) / 2).tanh().where(ended[:, 1:] | ~ended[:, :1], -1.0)
    return torch.where((response[:, 1:] == response[:, :1]).all(-1), 0.0, values)


# -----------------------------------------------------------------------------
# files in OpenAI's layout

HUB = {'gpt2': 'openai-community/gpt2', 'gpt2-medium': 'openai-community/gpt2-medium',
       'gpt2-large': 'openai-community/gpt2-large', 'gpt2-xl': 'openai-community/gpt2-xl',
       'distilgpt2': 'distilbert/distilgpt2'}
TURNED = 'c_attn.weight', 'c_fc.weight', 'c_proj.weight'     # (in, out) there, (out, in) here
# of the tokens in GPT-2's vocab.json with their ids, in this order: see `read_files`
BPE_SHA256 = '8efac2735c7c394b8055a6fea486f511d485d155a3a5f03475447e494d4eca24'
FIXED = {'model_type': 'gpt2', 'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
         'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False, 'bias': True}


def download(name):
    """The folder of a hub checkpoint, from the Hugging Face cache or the network."""
    from huggingface_hub import snapshot_download           # comes with `datasets`
    try:
        return Path(snapshot_download(HUB[name], allow_patterns=['config.json',
                                                                 'model.safetensors']))
    except Exception as e:
        raise FileNotFoundError(f'{name} could not be downloaded to the cache that HF_HOME names '
                                f'({type(e).__name__}): offline, give a folder or a file') from e


def read_files(path):
    """Tensors as a folder or file names them, its settings, and whether its layout is OpenAI's."""
    if file := last_checkpoint(path):
        saved = load_checkpoint(file)                # ours, or nanoGPT's
        return saved['model'], saved.get('gpt_config') or saved['model_args'], False
    file = path / 'model.safetensors' if path.is_dir() else path
    if not file.is_file() or file.suffix != '.safetensors':
        raise FileNotFoundError(
            f'{path} {"holds no weights" if path.exists() else "not found"}: give one of '
            f'{", ".join(HUB)}, a .pt or .safetensors file, or a folder with model.safetensors')

    def beside(name):
        """What a JSON file beside it holds; {} if there is none."""
        other = file.with_name(name)
        return dict(json.loads(other.read_text('utf-8-sig'))) if other.is_file() else {}

    try:
        settings, tensors = beside('config.json'), load_file(file)
        tokens = beside('vocab.json') or beside('tokenizer.json').get('model', {}).get('vocab', {})
        own = str(sorted((i, token) for token, i in dict(tokens).items())[:50257])
    except (SafetensorError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f'{file}, its config.json or tokenizer is damaged: {ascii(str(e))}') from e
    if tokens and hashlib.sha256(own.encode()).hexdigest() != BPE_SHA256:
        raise ValueError(f'{file.parent} has a vocab.json or tokenizer.json of other tokens than '
                         "GPT-2's BPE, or in another order: give a GPT-2 with that BPE")
    return tensors, settings, True


def read_weights(path):
    """Weights under our names, and their GPTConfig: by their shapes, which do not tell n_head."""
    raw, settings, turned = read_files(path)
    for key, value in FIXED.items():
        if settings.get(key, value) != value:
            raise ValueError(f'{path} has {key} {settings[key]!r}: GPT-2 has {value!r}')
    weights = {}
    for name, tensor in raw.items():                 # of torch.compile, DDP and transformers
        name = re.sub(r'^(_orig_mod\.|module\.|transformer\.)*', '', name)
        if not name.endswith(('.attn.bias', '.attn.masked_bias')):           # the causal mask
            weights[name] = tensor.t().contiguous() if turned and name.endswith(TURNED) else tensor
    wte, wpe = weights['wte.weight'], weights['wpe.weight']
    head = weights.pop('lm_head.weight', None)
    if head is not None and not torch.equal(head, wte):
        raise ValueError(f'{path} has an lm_head that is not wte: not a GPT-2, whose head is tied')
    if 50257 < len(wte) <= 50304:                    # GPT-2's, filled up for speed or by a [PAD]
        wte = weights['wte.weight'] = wte[:50257].clone()
    n_head, n_embd = settings.get('n_head'), wte.size(1)
    if type(n_head) is not int or n_head < 1 or n_embd % n_head:
        raise ValueError(f'{path}: n_head {n_head} does not divide n_embd {n_embd}: give it the '
                         'config.json of its own')
    layers = [int(n) + 1 for k in weights for n in re.findall(r'^h\.(\d{1,3})\.', k)]
    return weights, GPTConfig(wpe.size(0), wte.size(0), max(layers, default=0), n_head, n_embd)


# -----------------------------------------------------------------------------
# flags and the command line of a script, from its Config

def parse(argv, doc, Config, tiny, bounds, check):
    """A Config from flags: their names, types, defaults and help are those of its fields. `bounds`:
    name to (least, most); else from 1, a float from 0, without a most. `check` may raise, too."""
    # the text by check's file, for a profiler's __main__ is another module; '' if there is none
    source = ''.join(linecache.getlines(check.__code__.co_filename))
    source = source.partition('class Config')[2].partition('\n\n\n')[0]
    notes = dict(re.findall(r'^    (\w+): .*?  # +(.*)$', source, re.M))
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='%(prog)s [--flag value ...]; %(prog)s --help lists them', allow_abbrev=False)
    for f in fields(Config):
        if f.type in (bool, Optional[bool]):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif get_args(f.type):
            kind = dict(choices=get_args(f.type))
        else:
            kind = dict(type=os.path.expanduser if f.type is str else f.type)
        note = f'{notes.get(f.name, "")} (default: {f.default})'.replace('%', '%%')
        parser.add_argument('--' + f.name, default=argparse.SUPPRESS, help=note, **kind)
    given = vars(parser.parse_args(argv))
    settings = dict(tiny) if given.get('tiny') else {}
    if given.get('resume'):
        settings = settings_to_resume({'out_dir': Config.out_dir, **given}, Config)
    cfg = Config(**{**settings, **given})
    for name, value in asdict(cfg).items():
        if type(value) in (int, float):
            least, most = bounds.get(name, (1 if type(value) is int else 0, None))
            if not least <= value <= (most or 2 ** 63 - 1):
                rule = f'from {least} to {most}' if most else f'of at least {least}, below 2^63'
                raise ValueError(f'--{name} {value}: give a number {rule}')
    if cfg.d_init_from != 'scratch' and not cfg.resume and any(k[:4] == 'd_n_' for k in given):
        raise ValueError('--d_n_layer, --d_n_head, --d_n_embd go with --d_init_from scratch')
    if cfg.resume and cfg.overwrite:
        raise ValueError('--resume with --overwrite: give one of them')
    check(cfg)
    return cfg


def main(doc, Config, tiny, bounds, check, train, argv=None):
    """The command line of a script; a signal that came ends it with 128 + its number."""
    with command_line():
        cfg = parse(argv, doc, Config, tiny, bounds, check)
        with caught_signals(f'stopping: saving {cfg.out_dir}, go on with --resume') as caught:
            train(cfg, caught)
        if caught:
            sys.exit(128 + caught[0])


@contextlib.contextmanager
def command_line():
    """What is run within ends with a user's mistake in one sentence and exit code 1, and prints
    whether somebody reads or not."""
    with (contextlib.redirect_stdout(Output(sys.stdout)),
          contextlib.redirect_stderr(Output(sys.stderr))):
        try:
            yield
        except KeyboardInterrupt:
            sys.exit(130)
        except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as e:
            last = traceback.extract_tb(e.__traceback__)[-1]
            ours = last.name == 'check' or Path(last.filename).stem in ('model', 'data', 'sample')
            if isinstance(e, ValueError) and not (ours and last.line.startswith('raise')):
                raise                                # a mistake in the code, maybe a fork's
            # who keeps e, as a notebook does, keeps its frames: their networks, and a folder's lock
            traceback.clear_frames(e.__traceback__)
            if isinstance(e, torch.OutOfMemoryError):
                e = (f'CUDA is out of memory at {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} '
                     'GiB: lower --micro_batch, then --batch_size')
            sys.exit(str(e))


class Output:
    """A stream that is printed to. Without a reader, from the start or from a write on that fails,
    what is printed is dropped; a character that its encoding lacks is a question mark."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, 'w')            # None: it was closed
        if hasattr(self.stream, 'reconfigure'):
            self.stream.reconfigure(errors='replace')

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:              # by its number, for there may be text left in its buffer
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


@contextlib.contextmanager
def caught_signals(notice):
    """A list that gets the number of each SIGINT, SIGTERM and SIGHUP (not if ignored, as under
    nohup); at the first, rank 0 says the notice. They may come twice, from torchrun, too; but a
    SIGINT later than a second after the first is by hand, and ends the process at once."""
    caught, times, notices = [], [], iter([notice])

    def catch(number, _):                            # a second signal may come within it
        times.append(time.monotonic())
        if number == signal.SIGINT and times[-1] > times[0] + 1:
            os._exit(128 + number)
        caught.append(number)
        for text in notices if not rank() else ():   # once
            with contextlib.suppress(OSError):       # not by print, which may be at work
                os.write(2, f'\n{text}\n'.encode())

    if threading.current_thread() is threading.main_thread():    # no other can catch any
        for name in 'SIGINT', 'SIGTERM', 'SIGHUP':
            number = getattr(signal, name, None)     # Windows has no SIGHUP
            if number and (name != 'SIGHUP' or signal.getsignal(number) != signal.SIG_IGN):
                HANDLERS[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        release_signals()


HANDLERS = {}                     # those of before, while `caught_signals` has its own


def release_signals():
    """From here on a signal ends the process, or does what it did before `caught_signals`."""
    while HANDLERS and threading.current_thread() is threading.main_thread():
        signal.signal(*HANDLERS.popitem())


def progress(steps, what):
    """Yields what is in `steps`, a sequence; a bar on a terminal, elsewhere a line a minute."""
    shown = 0, time.monotonic()
    bar = tqdm(steps, what, disable=None, leave=False, delay=1)
    for n, step in enumerate(bar, 1):
        yield step
        now = time.monotonic()
        if bar.disable and now - shown[1] >= 60:     # at the pace since the last line
            left = (len(steps) - n) * (now - shown[1]) / (n - shown[0]) / 60
            print(f'{what}: {n} of {len(steps)}, {left:.0f} minutes left')
            shown = n, now


def load_gpt(source, of, cfg, n_vocab):
    """A GPT from a source that --init_from takes; the flags of its size begin with `of`."""
    if source != 'scratch':
        return GPT.from_pretrained(source)
    size = (getattr(cfg, of + name) for name in ('n_layer', 'n_head', 'n_embd'))
    try:
        return GPT(GPTConfig(cfg.max_prompt + cfg.max_response, n_vocab, *size))
    except ValueError as e:
        raise ValueError(f'--{of}n_embd, --{of}n_head: {e}') from e


def check_fit(source, config, n_vocab, settings):
    """Raises a ValueError if a GPTConfig does not fit the tokenizer and the settings of a run."""
    if config.vocab_size != n_vocab:
        raise ValueError(f'{source} has a vocabulary of {config.vocab_size}, --data '
                         f'{settings["data"]} one of {n_vocab}: give a matching pair')
    P, R = settings['max_prompt'], settings['max_response']
    if P + R > config.block_size:
        raise ValueError(f'max_prompt {P} + max_response {R}, flags of training, exceed the block '
                         f'size {config.block_size} of {source}: lower them, or give another')


def load_networks(cfg, n_vocab, *splits):
    """The generator and the discriminator that the flags name, or of the run to resume, and its
    checkpoint, with the hashes of the splits as `rows`. Raises a ValueError if a network does not
    fit, if ranks begin differently, or if a run would go on with other examples than before."""
    file, rows = last_checkpoint(cfg.out_dir) if cfg.resume else None, [z.digest() for z in splits]
    generator = load_gpt(file or cfg.init_from, '', cfg, n_vocab).to(cfg.device).eval()
    for module in generator.modules():
        if isinstance(module, nn.Dropout):
            module.p = cfg.sft_dropout               # in train() mode, the warm start's
    saved = load_checkpoint(file) if file else {}
    discriminator = load_discriminator(cfg, generator, saved)
    for flag, gpt in ('init_from', generator), ('d_init_from', discriminator.trunk):
        check_fit(file or f'--{flag} {getattr(cfg, flag)}', gpt.config, n_vocab, vars(cfg))
    if world() > 1:
        starts = [None] * world()
        dist.all_gather_object(starts, [rows, saved.get('sft_iter'), saved.get('iter'),
                                        checksum(generator), checksum(discriminator)])
        if any(start != starts[0] for start in starts):
            raise ValueError('the ranks begin with different rows, steps or weights: give all the '
                             'same --data, --init_from, --d_init_from and --out_dir')
    # of dev there may be more or fewer, but not while `best` has a loss of these
    fewer = saved and cfg.eval_prompts != saved['settings']['eval_prompts'] and 'best' not in saved
    if saved and saved['rows'][:1 if fewer else 2] != rows[:1 if fewer else 2]:
        raise ValueError(f'--data {cfg.data}, --eval_prompts {cfg.eval_prompts}: other rows than '
                         f'the run in {cfg.out_dir} began with: give those, or start another')
    return generator, discriminator, saved | {'rows': rows}


def checksum(network):
    """Of each of a network's tensors, in float32, the sum of its bits, which learning changes."""
    return tuple(p.view(torch.int32).sum().item() for p in network.state_dict().values())


def load_discriminator(cfg, generator, saved):
    """The discriminator, on the device: that of `saved`, a checkpoint, if it has one; else of the
    trunk that --d_init_from names, or of a copy of the generator."""
    if 'discriminator' in saved:
        network = Discriminator(GPT(GPTConfig(**saved['d_gpt_config'])), cfg.d_dropout)
        network.load_state_dict(saved['discriminator'])
    else:
        network = Discriminator(load_gpt(cfg.d_init_from, 'd_', cfg, generator.config.vocab_size)
                                if cfg.d_init_from else generator, cfg.d_dropout)
    return network.to(cfg.device).eval()


# -----------------------------------------------------------------------------
# learning: optimizer, ranks

GRAD_CLIP = 1.0                   # largest gradient norm, of each network


def adamw(network):
    """The optimizer of a network, AdamW without decay, which is Adam; `update` sets its rate."""
    return torch.optim.AdamW(network.parameters(), lr=0.0, betas=(.9, .95), eps=1e-8,
                             weight_decay=0.0, fused=True)


def schedule(step, steps):
    """Share of the peak learning rate for update `step` of `steps`: linear over the first tenth of
    them, then down a cosine to a tenth."""
    warmup = steps / 10
    over = max(0, step - warmup) / (steps - warmup)
    return min(1, (step + 1) / warmup) * (.55 + .45 * math.cos(math.pi * over))


def update(network, optimizer, lr):
    """Sums the gradient over ranks, clips it, steps if it is finite; its norm before, a tensor."""
    for p in network.parameters():
        if world() > 1 and p.grad is not None:
            dist.all_reduce(p.grad)
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), GRAD_CLIP)
    for group in optimizer.param_groups:
        group['lr'] = lr
    # a fused step leaves out by itself, without a wait, what is not finite, but not yet on MPS
    # (pytorch #186360); the log ends the run
    if norm.device.type != 'mps' or norm.isfinite():
        optimizer.found_inf = 1 - norm.isfinite().float()
        optimizer.step()
        del optimizer.found_inf      # a step of a fork's own has none
    optimizer.zero_grad()            # now: the next network's backward pass needs the memory
    return norm


def rank():
    """This rank's number among those of torchrun; 0 without it."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shard(index):
    """This rank's part of an array that is the same on all."""
    return index[rank()::world()]


def all_sum(x):
    """The sum of a tensor over the ranks, without gradient."""
    total = x.detach().clone()
    if world() > 1:
        dist.all_reduce(total)
    return total


def gathered(*tensors):
    """Each tensor with the rows of all ranks, in their order, on the CPU."""
    tensors = [z.cpu() for z in tensors]
    parts = [tensors] * world()
    if len(parts) > 1:
        dist.all_gather_object(parts, tensors)
    return [torch.cat(z) for z in zip(*parts)]


def signalled(caught):
    """Whether a signal came on any of the ranks, which all ask at the same place."""
    return bool(gathered(torch.tensor([bool(caught)]))[0].any())


# -----------------------------------------------------------------------------
# a run: checkpoints of tensors and plain values only, device, folder, log

FORMAT = 6                        # of checkpoints: add 1 whenever they come to hold something else
SCREEN = {'iter': 'reward gap d_acc d_acc_mean kl', 'sft_iter': 'mle loss'}


def save_checkpoint(path, state):
    """Writes a temporary file, flushes it to disk, renames it: a crash leaves the old one whole.
    Raises an OSError, one sentence, for a full disk and the like."""
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
        while isinstance(e, RuntimeError) and e.__context__:
            e = e.__context__                        # the disk's own reason
        remedy = '--resume' if run_of(path.parent) else '--overwrite'
        raise OSError(f'{path} could not be written ({str(e).splitlines()[0]}): what was saved '
                      f'before it stays, make room and give {remedy}') from e


def load_checkpoint(path):
    """Reads what `save_checkpoint` wrote, onto the CPU, and executes nothing it finds. Raises a
    ValueError for a truncated file or one that holds code."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:           # bytes that are no pickle end in an error of any kind
        raise ValueError(f'{path} refused, nothing executed: it is truncated or damaged, or holds '
                         'more than tensors and plain values') from e


def last_checkpoint(path):
    """The file to go on from of a run, by its folder; a .pt file itself; None if there is none."""
    path = Path(path)
    files = [path / 'ckpt.pt', path / 'sft.pt'] + [path] * (path.suffix == '.pt')
    return next((file for file in files if file.is_file()), None)


def run_of(folder):
    """The checkpoint that a run would go on from, by its folder; None if there is none to go on."""
    return last_checkpoint(folder) if (Path(folder) / 'sft.pt').exists() else None


def settings_to_resume(given, Config):
    """Settings of the run in given['out_dir']; raises a ValueError if it cannot go on by the script
    of the Config, or with the flags given."""
    file = run_of(given['out_dir'])
    if file is None:
        raise ValueError(f'--resume: no checkpoint sft.pt in {given["out_dir"]}: give another')
    saved = load_checkpoint(file)
    of = saved['script'] if isinstance(saved, dict) and saved.get('format') == FORMAT else 'no run'
    if of != Config.script or saved['settings'].keys() - Config.__dataclass_fields__.keys():
        raise ValueError(f'--resume: {file} is of {of}, or of another version: give the --out_dir '
                         f'of a run of {Config.script}.py, as it is now')
    settings = {**saved['settings'], 'out_dir': given['out_dir']}       # it may be a copy
    if given.get('iters', math.inf) < saved.get('iter', 0):
        raise ValueError(f'--resume with --iters {given["iters"]}: the run is at {saved["iter"]}: '
                         'give as many or more')
    for name in ('init_from context max_prompt max_response n_layer n_head n_embd sft_iters '
                 'd_init_from d_n_layer d_n_head d_n_embd'.split()):
        if name in given and given[name] != settings[name]:
            how = f' with --init_from {Path(given["out_dir"]) / "sft.pt"} --sft_iters 0'
            raise ValueError(f'--resume with --{name} {given[name]}: the run has {settings[name]}; '
                             f'leave it, or start another{how * (name == "sft_iters")}')
    return settings


def open_device(cfg):
    """Joins the ranks of torchrun and resolves device, dtype, compile and micro_batch of a script's
    Config; returns them as they were, for a run to be resumed elsewhere. Raises a ValueError naming
    the flag."""
    given = {name: getattr(cfg, name) for name in ('device', 'dtype', 'compile', 'micro_batch')}
    if cfg.device == 'auto':
        cfg.device = ('cuda' if torch.cuda.is_available() else
                      'mps' if torch.backends.mps.is_available() else 'cpu')
    # one alone of these is left over from elsewhere
    ranks = {'LOCAL_RANK', 'RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'} <= {*os.environ}
    try:
        if ranks and cfg.device.startswith('cuda'):
            cfg.device = f'cuda:{os.environ["LOCAL_RANK"]}'
        device = torch.empty(1, device=cfg.device).device
        cfg.device = str(device)                     # with its number
    except (RuntimeError, AssertionError) as e:      # the latter of a torch without CUDA
        raise ValueError(f'--device {cfg.device} is not to be had here: give another') from e
    cuda = device.type == 'cuda'
    if cuda:
        torch.cuda.set_device(device)                # for timers, messages and ranks too
    if cfg.dtype == 'auto':
        fast = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        cfg.dtype = 'bfloat16' if fast else 'float32'
    if cfg.compile is None:
        cfg.compile = cuda
    name, known = (('CC', ['gcc', 'clang']) if cuda else                     # Triton's, inductor's
                   ('CXX', [{'darwin': 'clang++', 'win32': 'cl'}.get(sys.platform, 'g++')]))
    compilers = [os.environ[name]] if os.environ.get(name) else known
    missing = [] if any(map(shutil.which, compilers)) else [' or '.join(compilers)]
    if cuda and not importlib.util.find_spec('triton'):
        missing = ['triton']
    if cfg.compile and missing:
        if given['compile']:
            raise ValueError(f'--compile needs {missing[0]}: install it, or leave the flag')
        print(f'no {missing[0]} here: nothing is compiled', file=sys.stderr)
        cfg.compile = False
    large = cuda and torch.cuda.mem_get_info(device)[1] > 38 * 2 ** 30       # sold as 40 GB
    cfg.micro_batch = cfg.micro_batch or (64 if large else 16)
    if ranks and not dist.is_initialized():
        dist.init_process_group('nccl' if cuda else 'gloo')
    if cuda:
        torch.set_float32_matmul_precision('high')                           # TF32
    else:
        keep_freed_memory()
    # a block has a graph for each shape, with gradient and without, of training and evaluations
    torch._dynamo.config.recompile_limit = 64
    for name in 'batch_size', 'sft_batch_size', 'minibatch':
        if getattr(cfg, name, 0) % world():
            raise ValueError(f'--{name} {getattr(cfg, name)} cannot be shared by {world()} ranks: '
                             'give a multiple')
    return given


def keep_freed_memory(keep=True):
    """Has glibc's malloc keep freed memory: on a CPU, clearing fresh pages takes half of a step.
    With False, gives back what was kept, whose pieces in time would double the memory."""
    calls = [('mallopt', -4, 0), ('mallopt', -1, -1)]            # M_MMAP_MAX, M_TRIM_THRESHOLD
    try:
        for function, *values in calls if keep else [('malloc_trim', 0)]:
            getattr(ctypes.CDLL(None), function)(*values)
    except (AttributeError, OSError, TypeError):     # not glibc
        pass


def open_folder(cfg):
    """Makes out_dir; returns it and its lock, which holds while it is kept. Rank 0 writes and
    prints for all. Raises an OSError, or a ValueError if the folder is in use or holds a run."""
    out = Path(cfg.out_dir)
    lock = FileLock(out / 'lock', timeout=0)
    if rank():
        sys.stdout = open(os.devnull, 'w')
    else:
        old = [name for name in ('ckpt.pt', 'sft.pt', 'start.pt', 'metrics.jsonl')
               if (out / name).exists()]
        if old and not (cfg.resume or cfg.overwrite):
            resume = '--resume, ' * bool(run_of(out))
            raise ValueError(f'--out_dir {out} holds a run ({old[0]}): give {resume}--overwrite or '
                             'another --out_dir')
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout as e:
            raise ValueError(f'--out_dir {out} is in use by another run: give another') from e
        except (OSError, NotImplementedError) as e:  # some network file systems have no locks
            print(f'{out} cannot be locked ({e}): start no other run in it', file=sys.stderr)
    signalled(())                                    # the others wait for the folder
    return out, lock


def autocast(cfg):
    """bfloat16 activations on request; weights, losses and optimizers stay float32."""
    return torch.autocast(torch.device(cfg.device).type, torch.bfloat16, cfg.dtype == 'bfloat16')


@contextlib.contextmanager
def for_readers(what):
    """What is made here, a copy of the log or a picture of it, is for reading: where it cannot be
    made, a line says so and the run goes on."""
    try:
        yield
    except Exception as e:           # of any library
        reason = ' '.join(str(e).split())[:200]
        print(f'{what} failed, the run goes on: {type(e).__name__}: {reason}', file=sys.stderr)


class Log:
    """
    Appends records, dicts, to out_dir/metrics.jsonl, on rank 0, below a header with the config and
    the device that it began on; prints what SCREEN names of evaluations, with their `metrics` of
    greedy/sampled answers, and of every tenth of the others. Tensors in one are read here, when all
    of a step is on its way; a number that is not finite is a FloatingPointError. To go on from
    `saved`, a checkpoint, the file is cut to what it was then; settings that are other than then
    are a record, `resumed`. Checkpoints take `settings`, those that `open_device` resolves as
    `given`, and the `rows` of `saved`.
    """

    def __init__(self, out, cfg, given, saved):
        self.rows = saved['rows']
        size = saved.get('log_size', 0)
        self.path, self.writes, self.script = out / 'metrics.jsonl', not rank(), cfg.script
        self.settings = {**asdict(cfg), **given, 'resume': False, 'overwrite': False}
        self.cuda, self.seconds, self.start = cfg.device.startswith('cuda'), {}, 0.0
        self.wandb = None
        if cfg.wandb and self.writes:
            try:
                import wandb
                self.wandb = wandb.init(project='nanogaf', name=cfg.out_dir, dir=cfg.out_dir,
                                        config=asdict(cfg))
            except Exception as e:
                raise ValueError(f'--wandb: {" ".join(str(e).split())} (pip install wandb, wandb '
                                 'login, or let WANDB_MODE be offline)') from e
        if self.writes and size and self.path.exists():
            os.truncate(self.path, min(size, self.path.stat().st_size))
        elif self.writes:                            # a new run, all inputs loaded; or metrics lost
            for old in [] if cfg.resume else ['ckpt.pt', 'sft.pt', 'start.pt']:
                (out / old).unlink(missing_ok=True)
            name = torch.cuda.get_device_name(cfg.device) if self.cuda else cfg.device
            header = {'config': asdict(cfg), 'python': sys.version.split()[0], 'device': name,
                      'torch': torch.__version__, 'threads': torch.get_num_threads(),
                      'dev_rows': self.rows[1:]}
            self.path.write_text(json.dumps(header) + '\n')
        if 'model' in saved:
            stage, then = 'iter' if 'iter' in saved else 'sft_iter', saved['settings']
            changed = {k: v for k, v in self.settings.items() if v != then.get(k, v)}
            changed.pop('out_dir', None)             # it may be a copy
            if changed:
                self({stage: saved[stage], 'resumed': changed, 'dev_rows': self.rows[1:]})
            print(f'resumed at {stage} {saved[stage]} of {getattr(cfg, stage + "s")}',
                  f'with {changed}' * bool(changed))
            if saved.get('iter') == cfg.iters:
                print('nothing is left but the evaluation: more --iters go on')

    def lap(self, station=None):
        """Notes in `seconds` what passed since the last lap, as the station's; else begins anew."""
        if self.cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds = {**self.seconds, station: now - self.start} if station else {}
        self.start = now

    def __call__(self, record, metrics=()):
        record = {k: v.item() if torch.is_tensor(v) else v for k, v in record.items()}
        stage = next((k for k in SCREEN if k in record), None)
        at = f'{stage} {record[stage]}' if stage else 'the end'
        figures = {**record, **record.get('dev', {})}
        for name, value in figures.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise FloatingPointError(
                    f'{name} is {value} at {at}: the checkpoints beside {self.path} were finite '
                    'when saved; give a lower learning rate, a flag that ends in lr, and --resume')
        if not self.writes:
            return
        with open(self.path, 'a') as f:
            f.write(json.dumps(record, allow_nan=False) + '\n')
        if self.wandb:
            run, self.wandb = self.wandb, None
            with for_readers('--wandb'):
                run.log(record)
                self.wandb = run
        if 'dev' in record or 'seconds' in record and record[stage] % 10 == 0:
            said = [f'{k} {figures[k]:.3g}' for k in SCREEN[stage].split()
                    if figures.get(k) is not None]
            said += [f'{k} {figures[k]:.3g}/{figures["sample_" + k]:.3g}' for k in metrics]
            took = sum(record.get('seconds', {}).values())
            tqdm.write('  '.join([at, *said, f'{took:.3g} s' if took else 'on dev']))

    def collapsed(self, it, answers):
        """Writes down that the answers are sick for good, and ends the run."""
        answer = max(answers, key=answers.count)
        self({'iter': it, 'collapsed': answer})
        raise FloatingPointError(
            f'the answers collapsed by iteration {it}, many are like {answer!r}: ckpt.pt is the '
            'last healthy one; give a lower --lr or a higher --anchor or --beta')


def save(path, generator, log, **more):
    """Rank 0's checkpoint, which GPT.from_pretrained reads; `more` is values, and modules and
    optimizers for their states. If a network has diverged, the file stays as it was, and all ranks
    raise a FloatingPointError. A time to give back freed memory, too."""
    keep_freed_memory(False)
    tokens = torch.zeros(1, 32, dtype=torch.long, device=generator.wpe.weight.device)
    trunks = [generator, *(z.trunk for z in more.values() if isinstance(z, Discriminator))]
    with torch.no_grad(), torch.compiler.set_stance('force_eager'):          # no graph for this
        diverged = not all(trunk(tokens[:, :trunk.config.block_size]).isfinite().all()
                           for trunk in trunks)
    if diverged:
        raise FloatingPointError(
            f'{path} is not written, for a network has diverged; what was saved before it stays: '
            'give a lower learning rate, a flag that ends in lr, and --resume')
    if not rank():
        if 'discriminator' in more:
            more['d_gpt_config'] = asdict(more['discriminator'].trunk.config)
        more = {k: z.state_dict() if hasattr(z, 'state_dict') else z for k, z in more.items()}
        save_checkpoint(path, {
            'format': FORMAT, 'script': log.script, 'settings': log.settings, 'rows': log.rows,
            'model': generator.state_dict(), 'gpt_config': asdict(generator.config),
            'log_size': log.path.stat().st_size, **more})
