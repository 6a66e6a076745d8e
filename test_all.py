"""
Everything checked, on a CPU and offline: `python test_all.py [parts of names]`, or pytest.
"""

import argparse
import ast
import collections
import contextlib
import copy
import ctypes
import functools
import gc
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
import unittest.mock
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent / 'shared' / 'data'
if 'NANOGAF_SCRATCH' not in os.environ:              # the runner's processes share one
    os.environ['NANOGAF_SCRATCH'] = tempfile.mkdtemp(prefix='nanogaf-')
SCRATCH = Path(os.environ['NANOGAF_SCRATCH'])
os.environ['HF_HOME'] = str(SCRATCH / 'hf')          # before `datasets`: its cache is ours to drop
os.environ['HF_HUB_OFFLINE'] = '1'
if (SHARED / 'tiktoken_cache').is_dir():
    os.environ['TIKTOKEN_CACHE_DIR'] = str(SHARED / 'tiktoken_cache')

import numpy as np
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

import bench
import data
import gumbel
import model
import ppo
import reinforce
import sample
from model import GPT, Discriminator, GPTConfig, Rollout, load_checkpoint, save_checkpoint

RESULTS = (HERE / 'assets/RESULTS.md').read_text()
# the flags of data toy in RESULTS.md: what all scripts have, and what ppo.py has of its own
TOY, PPO = (re.search(fr'{name}="(.*?)"', RESULTS, re.S)[1].split() for name in ('TOY', 'PPO'))
SMALL = [*TOY, '--n_layer', '1', '--n_embd', '16', '--sft_iters', '4', '--iters', '4',
         '--batch_size', '8', '--eval_interval', '2', '--eval_prompts', '12', '--d_warmup_iters',
         '1', '--d_dropout', '.1', '--sft_batch_size', '8', '--samples', '2',
         '--anchor', '.1', '--beta', '.01']
# flags of small runs; for the tests of all scripts, another one is another row
SMALL_OF = {reinforce: SMALL, ppo: [*SMALL, *PPO, '--minibatch', '4', '--pretrain', '.1'],
            gumbel: SMALL}
OWN_D = '--d_init_from scratch --d_n_layer 1 --d_n_head 2 --d_n_embd 24'.split()
SCRIPTS = [*SMALL_OF]
patched = unittest.mock.patch.object
unclipped = patched(model, 'GRAD_CLIP', 1e9)


def tiny_gpt(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**dict(block_size=24, vocab_size=13, n_layer=2, n_head=2, n_embd=8),
                            **changes})).eval()


def tiny_discriminator(seed=1, kind=Discriminator, **changes):
    network = kind(tiny_gpt(seed, **changes)).eval()
    torch.nn.init.normal_(network.score.weight)
    return network


def in_rows(prompt, pad, response):
    """K responses (B, K, R) in rows of their own: tokens (B*K, P + R) and pad (B*K,)."""
    K = response.size(1)
    tokens = torch.cat((prompt.repeat_interleave(K, 0), response.flatten(0, 1)), 1)
    return tokens, pad.repeat_interleave(K)


def plain_logprobs(gpt, prompt, pad, response, temperature=1.0):
    """Log-probabilities and entropies (B, K, R) of responses, from whole logits of plain rows."""
    logits = gpt(*in_rows(prompt, pad, response))[:, prompt.size(1) - 1:-1] / temperature
    logp = logits.log_softmax(-1).view(*response.shape, -1)
    return logp.gather(-1, response[..., None])[..., 0], -(logp.exp() * logp).sum(-1)


def plain_scores(discriminator, prompt, pad, response):
    """Scores (B, K, R) of responses, each in a row of its own."""
    tokens, pad = in_rows(prompt, pad, response)
    P = prompt.size(1)
    return discriminator(tokens[:, :P], pad, tokens[:, None, P:]).view(response.shape)


def case(script, *flags, K=2, dtype=torch.float32, device='cpu', activations='float32', **size):
    """
    What the steps of a script want, small and ragged: cfg, generator, reference, discriminator, and
    4 prompts with gold answers and K samples, of which the first is the gold answer, a tie.
    """
    cfg = parse(script, *TOY, '--batch_size', 4, '--samples', K, *flags)
    cfg.device, cfg.dtype, cfg.max_response = device, activations, 4
    networks = [tiny_gpt(3, **size), tiny_gpt(5, **size), tiny_discriminator(**size)]
    prompt, pad = torch.randint(0, 12, (4, 5)), torch.tensor([0, 1, 2, 0])
    gold_mask = torch.arange(4) <= torch.tensor([[3], [2], [2], [1]])
    gold = torch.randint(0, 12, (4, 4)).where(gold_mask, 12)
    ends = torch.tensor([[2, 0], [1, 3], [0, 3], [3, 1]])[:, :K, None]
    response = torch.randint(0, 12, (4, K, 4)).where(torch.arange(4) < ends, 12)
    response[1, -1, 3] = 5                           # one does not end
    roll = Rollout(response, torch.arange(4) <= ends, (response == 12).any(-1))
    gold[0], gold_mask[0], gold[1, 0] = roll.response[0, 0], roll.mask[0, 0], roll.response[1, 0, 0]
    batch = data.Batch(prompt, pad, gold, gold_mask, (gold == 12).any(-1))
    batch, roll = (type(group)(*(z.to(device) for z in group)) for group in (batch, roll))
    return cfg, *(network.to(device, dtype) for network in networks), batch, roll


def parse(script, *flags):
    """The Config of these flags."""
    return model.parse([*map(str, flags)], *command_line(script))


def command_line(script):
    """What a script hands to model.main before its `train`."""
    return script.__doc__, script.Config, script.TINY, script.BOUNDS, script.check


def folder(name):
    path = SCRATCH / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def raises(kind, words, call, *args, **kwargs):
    """The call must raise `kind`, one or several, with one line that holds all of `words`."""
    try:
        call(*args, **kwargs)
    except kind as e:
        assert '\n' not in str(e) and all(w in str(e) for w in words), str(e)
    else:
        raise AssertionError(f'{call} raised nothing, {kind} was due')


# -----------------------------------------------------------------------------
# model

def reference_logits(w, tokens, n_layer, n_head):
    """GPT-2 (Radford et al. 2019) once more, in plain operations on OpenAI's layout (in, out)."""
    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / ((x ** 2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * w[f'{name}.weight'] + w[f'{name}.bias']

    def linear(x, name):
        return x @ w[f'{name}.weight'] + w[f'{name}.bias']

    T, D = tokens.size(1), w['wte.weight'].size(1) // n_head
    x, future = w['wte.weight'][tokens] + w['wpe.weight'][:T], torch.ones(T, T).triu(1).bool()
    for i in range(n_layer):
        z = linear(norm(x, f'h.{i}.ln_1'), f'h.{i}.attn.c_attn').split(D, -1)
        scores = [(q @ k.transpose(1, 2) / math.sqrt(D)).masked_fill(future, -math.inf)
                  for q, k in zip(z[:n_head], z[n_head:])]
        heads = [e.softmax(-1) @ v for e, v in zip(scores, z[-n_head:])]
        x = x + linear(torch.cat(heads, -1), f'h.{i}.attn.c_proj')
        y = linear(norm(x, f'h.{i}.ln_2'), f'h.{i}.mlp.c_fc')
        y = .5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + .044715 * y ** 3)))
        x = x + linear(y, f'h.{i}.mlp.c_proj')
    return norm(x, 'ln_f') @ w['wte.weight'].t()


def test_logits_equal_an_independent_forward():
    """Of each row without the padding at its left, which changes nothing, whatever it holds; of
    one-hots, too, bit for bit, and with gradients to them."""
    gpt, tokens, pad = tiny_gpt(), torch.randint(0, 13, (3, 11)), torch.tensor([0, 4, 9])
    with torch.no_grad():
        for p in gpt.parameters():                   # biases and gains that are not 0 and 1
            p.add_(.1 * torch.randn_like(p))
    path = folder('reference')
    gpt.save_pretrained(path)
    weights = model.load_file(path / 'model.safetensors')
    logits, onehots = gpt(tokens, pad), F.one_hot(tokens, 13).float().requires_grad_()
    changed = gpt(tokens.where(torch.arange(11) >= pad[:, None], 7), pad)
    for row, n in enumerate(pad):
        wanted = reference_logits(weights, tokens[row:row + 1, n:], 2, 2)[0]
        assert (logits[row, n:] - wanted).abs().max() < 1e-5
        assert torch.equal(logits[row, n:], changed[row, n:])
    assert logits.isfinite().all() and torch.equal(gpt(onehots, pad), logits)
    assert torch.autograd.grad(gpt(onehots, pad).sum(), onehots)[0].any(-1)[0].all()


def test_logits_equal_transformers():
    os.environ['TRANSFORMERS_VERBOSITY'] = 'error'
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as e:
        raise unittest.SkipTest('transformers is not installed') from e
    tokens, path = torch.randint(0, 50257, (2, 9)), folder('distilgpt2')
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=6)).eval()
    theirs.save_pretrained(path)
    wanted, ours = theirs(tokens).logits, GPT.from_pretrained(str(path))
    assert (ours(tokens) - wanted).abs().max() < 1e-4
    ours.save_pretrained(path / 'back')
    again = GPT2LMHeadModel.from_pretrained(path / 'back').eval()
    assert (again(tokens).logits - wanted).abs().max() < 1e-4
    # its `generate` samples from the whole vocabulary, and ends where ours does
    small, prompt = tiny_gpt(vocab_size=13), torch.randint(0, 12, (8, 5))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        small.save_pretrained(path / 'small')
    assert "AutoTokenizer.from_pretrained('gpt2')" in said.getvalue()
    again = GPT2LMHeadModel.from_pretrained(path / 'small').eval()
    assert (again.generation_config.do_sample, again.generation_config.top_k) == (True, 0)
    ours = small.generate(prompt, torch.zeros(8, dtype=torch.long), 15, 12, temperature=0)
    found = again.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                           max_new_tokens=15)[:, 5:]
    n = found.size(1)
    assert 1 < len({*ours.mask.sum(-1).flatten().tolist()}) and ours.ended.any()
    assert torch.equal(found, ours.response[:, 0, :n]) and (ours.response[:, 0, n:] == 12).all()


def test_responses_that_share_a_prompt_are_as_if_alone():
    """Log-probs, entropies and scores of K responses in one row against each in its own; their
    gradients; ids and one-hots; responses of one token too."""
    for K, R in (1, 4), (3, 4), (3, 1), (2, 2):
        gpt, discriminator = tiny_gpt().double(), tiny_discriminator().double()
        prompt, pad = torch.randint(0, 13, (4, 6)), torch.tensor([0, 2, 5, 1])
        response, weight = torch.randint(0, 13, (4, K, R)), torch.randn(4, K, R).double()
        scores = plain_scores(discriminator, prompt, pad, response)
        cases = [(gpt, a, b) for a, b in
                 zip(plain_logprobs(gpt, prompt, pad, response, .7),
                     gpt.response_logprobs(prompt, pad, response, .7, entropy=True))]
        cases += [(discriminator, scores, discriminator(prompt, pad, kind))
                  for kind in (response, F.one_hot(response, 13).double())]
        for network, a, b in cases:
            assert a.shape == b.shape == (4, K, R) and (a - b).abs().max() < 1e-9
            if b.requires_grad:                      # all but the entropy
                a, b = (gradient(network, (z * weight).sum()) for z in (a, b))
                assert (a - b).abs().max() < 1e-9 and a.abs().max() > 1e-3


def test_bfloat16_keeps_logprobs_of_large_logits():
    gpt, tokens = tiny_gpt(), torch.randint(0, 13, (3, 11))
    answers = tokens[:, :3], torch.zeros(3, dtype=torch.long), tokens[:, None, 3:]
    with torch.no_grad():
        gpt.wte.weight += 1                          # GPT-2's own logits are around -100
        gpt.ln_f.bias -= 100 / 8
        wanted = gpt.response_logprobs(*answers)[0]
        assert gpt(tokens).mean() < -90
        with torch.autocast('cpu', torch.bfloat16):
            got = gpt.response_logprobs(*answers)[0]
    assert (got - wanted).abs().max() < .05


def test_cached_generation_equals_uncached():
    """K samples under one prompt and one cache, against plain rows recomputed at each token; some
    answers are over long before others."""
    gpt, prompt, R, eos = tiny_gpt(), torch.randint(0, 12, (5, 8)), 9, 12
    pad = torch.tensor([0, 3, 7, 1, 5])
    with torch.no_grad():
        gpt.ln_f.bias[0], gpt.wte.weight[eos, 0] = .5, .5        # eos comes often
    for K, temperature, top_k in (4, 1.0, None), (3, .5, 4), (2, 0, None), (1, 2.0, 4):
        roll = gpt.generate(prompt, pad, R, eos, K, temperature, top_k,
                            torch.Generator().manual_seed(3))
        rng = torch.Generator().manual_seed(3)
        tokens, pads = in_rows(prompt, pad, roll.response[..., :0])
        alive = torch.ones(5, K, dtype=torch.bool)
        for t in range(R):
            logits = gpt(tokens, pads)[:, -1].view(5, K, -1) / (temperature or 1)
            if top_k:
                kth = logits.sort(-1, descending=True).values[..., top_k - 1:top_k]
                logits[logits < kth] = -math.inf
            if temperature:
                logits -= model.exponential(model.uniform(logits.shape, logits, rng)).log()
            token = logits.argmax(-1).where(alive, eos)
            assert torch.equal(token, roll.response[..., t])
            assert torch.equal(alive, roll.mask[..., t])
            alive = alive & (token != eos)
            tokens = torch.cat((tokens, token.view(-1, 1)), 1)
        assert torch.equal(roll.ended, ~alive)
        assert roll.mask.sum(-1).min() < 4 and roll.mask.sum(-1).max() > 6


def test_a_copy_of_a_compiled_gpt_is_its_own():
    gpt, prompt, pad = tiny_gpt(), torch.ones(2, 3).long(), torch.zeros(2).long()
    answers = prompt, pad, torch.ones(2, 1, 2).long()
    gpt.generate(prompt, pad, 2, 12)
    gpt.compile()
    gpt.low = [1]                                    # as on CUDA
    other, wanted = copy.deepcopy(gpt), tiny_gpt(1)
    other.load_state_dict(wanted.state_dict())
    assert torch.equal(other.response_logprobs(*answers)[0], wanted.response_logprobs(*answers)[0])
    assert gpt.caches and not other.caches and other.low is None


def test_few_caches_are_kept():
    gpt, pad = tiny_gpt(), torch.zeros(2).long()
    for P in range(1, 21):
        gpt.generate(torch.ones(2, P).long(), pad, 2, 12)
        assert len(gpt.caches) == min(P, 4)
    for P in (17, 1, 2, 3):                          # one that is used stays
        gpt.generate(torch.ones(2, P).long(), pad, 2, 12)
    assert [shape[2] - 2 for shape, *_ in gpt.caches] == [17, 1, 2, 3]


def test_checkpoints_are_read_or_refused_by_name():
    """OpenAI's layout, transformers', nanoGPT's; strictly, and nothing in them is executed."""
    gpt, path = tiny_gpt(vocab_size=50257), folder('files')
    gpt.save_pretrained(path)
    weights, mine = model.load_file(path / 'model.safetensors'), gpt.state_dict()
    config = json.loads((path / 'config.json').read_text())

    def put(name, content):
        """Writes a file beside good ones, or takes it away; what to open, it or its folder."""
        file = folder('a file') / name
        gpt.save_pretrained(file.parent)
        if content is None:
            file.unlink()
        elif isinstance(content, bytes):
            file.write_bytes(content)
        else:
            (torch.save if file.suffix == '.pt' else model.save_file)(content, file)
        return file if file.suffix == '.pt' or 'one' in name or 'filled' in name else file.parent

    def is_read(source):
        read = GPT.from_pretrained(source).state_dict()
        assert read.keys() == mine.keys() and all(map(torch.equal, read.values(), mine.values()))

    def but(**changes):                              # to config.json
        return 'config.json', json.dumps({**config, **changes}).encode()

    def without(end, names):
        return {k: v for k, v in names.items() if not k.endswith(end)}

    def nanogpt(prefix, *lost, **changes):           # as it saves, compiled and under DDP or not
        theirs = {f'{prefix}transformer.{k}': v for k, v in mine.items()}
        theirs[f'{prefix}lm_head.weight'] = mine['wte.weight']
        args = dict(n_layer=2, n_head=2, n_embd=8, block_size=24, bias=True, vocab_size=50304)
        return {'model': without(lost, theirs), 'model_args': {**args, **changes}, 'iter_num': 3}

    class Bomb:
        def __reduce__(self):
            return os.system, (f'touch {path / "canary"}',)

    bpe = []                                         # GPT-2's own, as its vocab.json has it
    if SHARED.is_dir():
        enc, plain = data.load_tokenizer('squad'), [*range(33, 127), *range(161, 173),
                                                    *range(174, 256)]
        letters = {b: chr(b) for b in plain}             # of bytes; the others from 256 on
        letters |= {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*plain}))}
        bpe = [''.join(letters[b] for b in enc.decode_single_token_bytes(i)) for i in range(50257)]
        assert bpe[262] == 'Ġthe'
    ids = {token: i for i, token in enumerate(bpe)}

    def vocab(ids, name='vocab.json'):
        return name, json.dumps({'model': {'vocab': ids}} if name[0] == 't' else ids).encode()

    save_checkpoint(path / 'whole', {'x': torch.arange(1000)})
    whole, single = (path / 'whole').read_bytes(), 'model.safetensors'
    for name, content, *words in (                   # without words it is read
            ('config.json', b'\xef\xbb\xbf' + but()[1]),        # a byte order mark
            ('one.safetensors', {f'transformer.{k}': v for k, v in weights.items()}),
            # as OpenAI's has it, the causal mask among the weights
            (single, {**weights, 'h.0.attn.bias': torch.ones(1, 1, 4, 4)}),
            *(('filled.safetensors', {**weights, 'wte.weight': wte, 'lm_head.weight': wte * 1})
              for wte in (F.pad(weights['wte.weight'], (0, 0, 0, n), value=1.) for n in (1, 47))),
            *(('ckpt.pt', nanogpt(at)) for at in ('', '_orig_mod.', 'module._orig_mod.')),
            *(vocab(ids | more, name) for name in ('vocab.json', 'tokenizer.json') if bpe
              for more in ({}, {'[PAD]': 50257})),
            *((*vocab(wrong, name), 'tokenizer.json', "GPT-2's BPE") for name in (
                'vocab.json', 'tokenizer.json') for wrong in (
                {'Ġel': 262, 'Ġthe': 263}, ids | {'Ġthe': 286, 'Ġof': 262})),
            ('vocab.json', b'[1]', 'damaged'), ('tokenizer.json', b'{"model": 1}', 'damaged'),
            ('vocab.json', b'{"a": 0, "b": null}', 'damaged'),
            (single, without('h.0.ln_1.bias', weights), 'Missing', 'h.0.ln_1.bias'),
            (single, without('wpe.weight', weights), 'wpe.weight'),
            (single, {**weights, 'h.0.extra': torch.ones(2)}, 'Unexpected', 'h.0.extra'),
            (single, {**weights, 'ln_f.bias': torch.ones(9)}, 'mismatch for ln_f.bias', '[9]'),
            (single, {**weights, 'lm_head.weight': torch.ones(50257, 8)}, 'tied'),
            (single, b'{', single), ('config.json', None, 'n_head None', 'config.json'),
            (*but(activation_function='relu'), 'activation_function', 'relu'),
            *((*but(n_head=n), f'n_head {n}') for n in (3, 0, 2.0, True)),
            ('ckpt.pt', {'model': mine}, 'not a whole GPT-2', 'model_args'),
            ('bomb.pt', {'model': Bomb()}, 'nothing executed'),
            ('ckpt.pt', nanogpt('', '.bias'), 'Missing', 'bias'),
            ('ckpt.pt', nanogpt('', '.bias', bias=False), 'has bias False'),
            *(('cut.pt', whole[:n], 'cut.pt') for n in (0, 1, 100, len(whole) - 1))):
        source = put(name, content)
        if words:
            raises(ValueError, [str(source), *words], GPT.from_pretrained, source)
        else:
            is_read(source)
    assert not (path / 'canary').exists()
    for source in 'nowhere', str(folder('empty')):
        raises(FileNotFoundError, [source, single, 'gpt2-medium'], GPT.from_pretrained, source)
    for text in '{"n_head": {', '[1]', '[' * 100000:
        raises(ValueError, ['config.json', 'damaged'], GPT.from_pretrained,
               put('config.json', text.encode()))


def test_a_save_that_fails_leaves_the_old_checkpoint():
    """For the disk's own reason, and with advice that works."""
    path, sizes = folder('atomic') / 'ckpt.pt', resource.getrlimit(resource.RLIMIT_FSIZE)
    save_checkpoint(path, {'x': 1})
    path.with_name('sft.pt').touch()
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50000, sizes[1]))             # as a full disk does
    try:
        raises(OSError, [str(path), 'File too large', 'stays', '--resume'], save_checkpoint, path,
               {'x': torch.zeros(100000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, sizes)
        signal.signal(signal.SIGXFSZ, kept)
    assert load_checkpoint(path) == {'x': 1} and not [*path.parent.glob('*.part')]
    out = folder('full disk')
    run = shlex.join([sys.executable, reinforce.__file__, *SMALL, '--out_dir', str(out)])
    said = subprocess.run(['bash', '-c', f'ulimit -f 20; {run}'], capture_output=True, text=True,
                          timeout=300)
    assert said.returncode == 1 and 'Traceback' not in said.stderr
    last = said.stderr.splitlines()[-1]
    assert 'sft.pt' in last and 'File too large' in last and last.endswith('--overwrite'), last
    assert os.listdir(out) and not [*out.glob('*.pt*')]
    raises(ValueError, ['metrics.jsonl', 'give --overwrite or'], train, reinforce, out, *SMALL)
    assert train(reinforce, out, *SMALL, '--overwrite')
    raises(ValueError, ['give --resume, --overwrite'], train, reinforce, out, *SMALL)


# -----------------------------------------------------------------------------
# data

def test_em_and_f1_equal_an_independent_computation():
    """SQuAD 2.0's rules once more, by other means, on random answers with several golds or none."""
    def words(text):
        text = re.sub('[%s]' % re.escape('!"#$%&\'()*+,-./:;<=>?@[\\]^_`{|}~'), '', text.casefold())
        return [w for w in re.split(r'\s+', re.sub(r'\b(?:an?|the)\b', ' ', text)) if w]

    def overlap(one, other):
        if not one or not other:
            return float(one == other)
        same = sum(min(one.count(w), other.count(w)) for w in {*one})
        precision, recall = same / len(one), same / len(other)
        return 2 * precision * recall / (precision + recall) if same else 0.0

    rng = np.random.default_rng(0)
    pieces = 'the a an Old old, bridge Bridge! of the- 1,000 rock-n-roll . "' .split()
    texts = [' '.join(rng.choice(pieces, rng.integers(0, 5))) for _ in range(12000)]
    examples = [{'answers': texts[4 * i:4 * i + rng.integers(0, 4)]} for i in range(3000)]
    predictions = [t if rng.random() < .8 else 'unanswerable' for t in texts[3::4]]
    scores = []
    for prediction, example in zip(predictions, examples):
        said = [] if prediction == 'unanswerable' else words(prediction)
        golds = [words(a) for a in example['answers'] if words(a)] or [[]]
        scores.append([max(float(said == g) for g in golds), max(overlap(said, g) for g in golds)])
    out, scores = data.score_answers(predictions, examples), 100 * np.array(scores)
    no = np.array([not e['answers'] for e in examples])
    named = {'f1': 1, 'char_f1': 1, 'has_f1': 1, 'no_f1': 1, 'has_char_f1': 1, 'unanswerable': 1}
    named |= {'sample_' + name: 1 for name in named} | {'loss': 1}
    assert data.metrics_of(named) == ['f1', 'char_f1']
    one = data.score_answer('unanswerable', {'answers': ['Unanswerable', 'Ada']})
    assert one == {'em': 1, 'f1': 1}
    assert .1 < no.mean() < .5 and 10 < scores[:, 0].mean() < scores[:, 1].mean() < 90
    for name, rows in ('', no | ~no), ('has_', ~no), ('no_', no):
        assert np.allclose([out[name + 'em'], out[name + 'f1']], scores[rows].mean(0), rtol=1e-9)
    said = np.mean([words(p) == ['unanswerable'] for p in predictions])
    assert len(out) == 7 and abs(out['unanswerable'] - 100 * said) < 1e-9
    for kind in (True, False):                       # of one class, no means by class
        pairs = [z for z in zip(predictions, examples) if bool(z[1]['answers']) == kind]
        assert data.score_answers(*zip(*pairs)).keys() == {'em', 'f1'}


def test_toy_set():
    enc, cfg = data.load_tokenizer('toy'), parse(reinforce, *TOY)
    train, dev = data.load_examples('toy', 'train'), data.load_examples('toy', 'dev')
    assert train == data.load_examples('toy', 'train')
    facts = [{s for e in split for s in e['context'].split(' . ')} for split in (train, dev)]
    assert not facts[0] & facts[1]
    assert .28 < np.mean([not e['answers'] for e in train]) < .38
    varied = data.load_examples('toy-varied', 'train', 20_000)               # of 100,000
    for examples in train, dev, varied:
        split = data.Split(examples, enc, cfg.max_prompt, cfg.max_response)
        assert not split.cut_prompts and not split.cut_responses
        for said, context in ((e['answers'], e['context']) for e in examples):
            assert len({*said}) == len(said) and all(a in context for a in said)
    places = [e['answers'] for e in varied if e['question'].startswith('Where') and e['answers']]
    assert all(len(e['answers']) != 1 for e in varied)
    assert abs(np.mean([a[0].startswith('in ') for a in places]) - 1 / 3) < .05   # 1 to 1/2


def test_what_is_right_in_toy_ways():
    """By the rule, all of either way and nothing else; sets of words are of one split, answers fit,
    and a batch of one way alone is no collapse."""
    enc, cfg = data.load_tokenizer('toy-ways'), parse(reinforce, '--tiny')
    rng = np.random.default_rng(0)
    parts = {name: data.load_examples('toy-ways', name, 3000) for name in ('train', 'dev')}
    assert parts['train'] == data.load_examples('toy-ways', 'train', 4000)[:3000]
    sets = [{frozenset(e['question'].split()) - {'one'} for e in part} for part in parts.values()]
    assert not sets[0] & sets[1] and {*map(len, sets[0] | sets[1])} == {4}
    for e in parts['train'][:8]:
        words, one = e['question'].split()[-4:], e['question'].startswith('one ')
        free, bound = ('as', 'any') if one else ('any', 'as')
        right = {' '.join([free, *order]) for order in itertools.permutations(words)}
        right |= {' '.join([bound, *itertools.chain(*zip(words, [*links, '']))]).strip()
                  for links in itertools.product(data.LINKS, repeat=3)}
        assert len(right) == 24 + 12 ** 3
        assert all(data.score_answer(text, e) == {'em': 1, 'f1': 1} for text in right)
        a, b, c, d = words
        wrong = {f'{bound} {a} {b} {c} {d}', f'{free} {a} {b} {c}', f'{free} {a} {b} {c} {c}',
                 f'{free} {a} {b} {c} {d} {a}', f'{bound} {b} at {a} by {c} if {d}', '',
                 f'{bound} {a} at {b} by {c} of', f'{bound} {a} at {b} by {c} as {d}',
                 f'{a} {b} {c} {d}', f'{free} {a} at {b} by {c} if {d}',
                 f'one {free} {a} {b} {c} {d}'}
        assert not wrong & right and not any(data.score_answer(text, e)['em'] for text in wrong)
    answers = [e['answers'][0].split() for e in parts['train']]
    one = np.array([e['question'].startswith('one ') for e in parts['train']])
    free = one == [words[0] == 'as' for words in answers]
    assert abs(one.mean() - .5) < .03 and abs(free.mean() - .7) < .03
    assert data.score_answers([' '.join(words) for words in answers], parts['train'])['em'] == 100
    split = data.Split(parts['train'], enc, cfg.max_prompt, cfg.max_response)
    assert not split.cut_prompts and not split.cut_responses and split.lengths.max() == 9
    found = []
    for rows in np.flatnonzero(~free)[:10 * 64].reshape(-1, 64):             # of one way alone
        roll, gold = split.batch(rows), split.batch(rng.integers(3000, size=64))
        found.append(data.health(*(z[:, None] for z in roll[2:4]), torch.ones(64, 1), *gold[2:4]))
    assert not any(data.sick(f, 1.) for f in found) and max(f['distinct2'] for f in found) < .9


def test_the_cut_of_a_prompt_tells_nothing():
    """It depends on neither answer nor class; an answer that is lost by it is `unanswerable`."""
    enc, answer, ask = data.load_tokenizer('toy'), 'Żółć😀', '[QUESTION] Who ?\n[ANSWER]'
    words = (data.FIRST * 17)[:300]
    words[150] = words[290] = answer                 # twice: cut off, and in what stays
    words[120] = 'Lisbon'                            # cut off
    example = {'context': ' ' + ' '.join(words), 'question': 'Who ?'}
    examples = [example | {'answers': said} for said in
                ([answer], ['Lisbon', words[-1]], [words[-1]], ['Otto Falk'], [])]
    for P, end in (64, words[-10:]), (5, []), (3, []):
        cut = {tuple(data.encode_prompt(e, enc, P)[0]) for e in examples}
        assert [len(tokens) for tokens in cut] == [P]
        cut, = cut
        tail = ' '.join(['', *end]) + f'\n{ask}' if P > 3 else ' Who ?\n[ANSWER]'
        assert enc.decode([*cut]).endswith(tail)
        split = data.Split(examples, enc, P, 20)
        found = data.to_text(*split.batch(range(5))[2:4], enc)
        kept = [answer, data.UNANSWERABLE, words[-1]] if end else [data.UNANSWERABLE] * 3
        assert found == [*kept, 'Otto Falk', data.UNANSWERABLE]              # Otto Falk is nowhere
        assert (split.cut_prompts, split.lost_answers) == (5, 1 if end else 3)
        assert split.examples[1]['answers'] == ['Lisbon', words[-1]]         # metrics keep it
    for given, wanted in ({}, f'[CONTEXT]{example["context"]}\n{ask}'), ({'context': False}, ask):
        assert enc.decode(data.encode_prompt(example, enc, 999, **given)[0]) == wanted
        assert not data.Split(examples, enc, 999, 9, **given).lost_answers
    split = data.Split(examples, enc, 3, 2, context=False)
    assert (split.cut_prompts, split.lost_answers, split.cut_responses) == (5, 0, 2)
    # a word is a word, not a part of one; where SQuAD says it stands wins
    boats = 60 * ' The boat left .'
    for passage, said, start, lost in (
            ('yesterday was warm .' + boats, 'yes', None, False),
            ('part of it .' + boats, 'art', None, False), ('17 left .' + boats, '17', 0, True),
            ('17 was 517 .' + boats, '17', None, True),
            ('17 left .' + boats + ' 517 yards .', '17', None, True),
            ('17 left .' + boats + ' 17 yards .', '17', None, False),
            ('17 left .' + boats + ' 17 yards .', '17', 0, True),
            (boats + ' 517 yards .', '17', len(boats) + 2, False),
            # of scripts whose words are not set apart
            ('他在北京工作。' + boats, '北京', None, True),
            ('수도는 서울이다.' + boats, '서울', None, True)):
        example = {'context': f' {passage} ', 'question': 'How many ?', 'answers': [said]}
        example |= {} if start is None else {'answer_start': start + 1}
        split = data.Split([example], enc, 128, 20)
        found, = data.to_text(*split.batch([0])[2:4], enc)
        assert (found == data.UNANSWERABLE) == split.lost_answers == lost, (passage[:30], found)
    example = {'context': 'ab cd ', 'answers': ['cd'], 'answer_start': 3}
    assert data.is_lost(example, 'd') and not data.is_lost(example, 'cd')
    example = {'context': 'The art was here. xyzzyart left', 'answers': ['art']}
    assert all(data.is_lost(example, example['context'][-n:]) for n in range(1, 20))
    example = {'context': 'Ada ' + '😀' * 30, 'question': '?', 'answers': ['😀' * 5]}
    example['answer_start'] = 29
    for P in range(25, 45):                          # half a character holds no answer
        split, left = data.Split([example], enc, P, 40), data.encode_prompt(example, enc, P)[1]
        assert split.lost_answers == (left.count('😀') < 5) and set(left) <= {'😀'}


def test_batches_are_ordered_padded_and_masked():
    """The order is a pure function of seed and step, an epoch holds everything in its own order,
    which is drawn once."""
    with patched(np.random, 'default_rng', unittest.mock.Mock(wraps=np.random.default_rng)) as rng:
        batches = [data.order(10, 4, (7, 9), step) for step in range(5)]
    assert rng.mock_calls == [unittest.mock.call((7, 9, epoch)) for epoch in (0, 1)]
    epochs = np.concatenate(batches).reshape(2, 10)
    assert (np.sort(epochs) == np.arange(10)).all() and (epochs[0] != epochs[1]).any()
    assert np.array_equal(data.order(10, 4, (7, 9), 3), batches[3])
    assert not np.array_equal(data.order(10, 4, (8, 9), 0), batches[0])
    enc = data.load_tokenizer('toy')
    split = data.Split(data.load_examples('toy', 'dev', 20), enc, 45, 7)
    batch = split.batch([3, 5])
    for row, i in enumerate((3, 5)):
        example, pad, n = split.examples[i], batch.pad[row], batch.mask[row].sum()
        answer = (example['answers'] or [data.UNANSWERABLE])[0]
        assert (batch.prompt[row, :pad] == enc.eot_token).all()
        assert enc.decode(batch.prompt[row, pad:].tolist()).endswith('[ANSWER]')
        assert enc.decode(batch.response[row, :n].tolist()) == f' {answer}<|endoftext|>'
        assert (batch.response[row, n:] == enc.eot_token).all() and not batch.mask[row, n:].any()
        assert data.to_text(batch.response, batch.mask, enc)[row] == answer
    assert batch.ended.all() and ('--max_response' in split.cuts()) is False
    said = ['    if x:\n        y', ' Oslo ', '\tx', 'a b c d e f g h i']
    own = [{'context': '', 'question': '?', 'answers': [text]} for text in said]
    split = data.Split(own, enc, 45, 22)
    batch = split.batch(range(4))                    # an indentation stays, a single space does not
    assert data.to_text(batch.response, batch.mask, enc) == [said[0], 'Oslo', *said[2:]]
    hashes = [data.Split([own[0] | change], enc, 45, 22).digest()
              for change in ({}, {'question': '? ?'}, {'answers': ['x']}, {})]
    assert hashes[0] == hashes[3] and len({*hashes}) == 3
    split = data.Split(own, enc, 45, 5)
    assert split.batch(range(4)).ended.tolist() == [False, True, True, False]
    assert '2 answers cut to 5' in split.cuts() and '--max_response' not in split.cuts()
    assert '--max_response' in data.Split(own[:1] + own[2:], enc, 45, 5).cuts()


def test_diversity_figures():
    response = torch.tensor([[1, 1, 1, 2], [1, 2, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    assert data.longest_run(response, mask).tolist() == [3, 1]
    assert data.distinct(response, mask, 2) == 3 / 5      # 11 11 12 | 12 29


def test_passages_are_packed():
    enc = data.load_tokenizer('toy')
    examples = [{'context': 'Ada sold it .'}, {'context': 'Ada sold it .'}, {'context': 'In May .'}]
    cfg = SimpleNamespace(max_prompt=3, max_response=1)
    rows = data.load_passages([*examples, {'context': ' '}], enc, cfg)
    ids = enc.encode(' Ada sold it .<|endoftext|> In May .<|endoftext|>', allowed_special='all')
    assert rows.shape == (len(ids) // 4, 4) and rows.flatten().tolist() == ids[:rows.size]
    cfg.max_prompt = 98
    assert data.load_passages(examples, enc, cfg).tolist() == [(99 * ids)[:99]]
    tokens = unittest.mock.Mock(wraps=np.resize)     # of an array, not of a list of integers
    with patched(np, 'resize', tokens):
        data.load_passages(examples, enc, cfg)
    assert tokens.call_args[0][0].dtype == np.int32


def test_rows_are_read_as_they_are_or_named():
    """SQuAD's files and one's own, by place: text stays text; what is wrong is one sentence."""
    at, found, good = folder('rows'), [{'text': 'Ada'}], [{'prompt': f'{i} ?', 'response': 'a'}
                                                          for i in range(9)]

    def read(name, content, split='train'):
        path = at / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            return data.load_examples(str(path), split)
        finally:
            path.unlink()

    def squad(encoding='utf-8', **change):
        qas = [{'question': 'Who?', 'answers': found, **change},
               {'question': 'Why?', 'is_impossible': True, 'answers': []}]
        root = {'data': [{'paragraphs': [{'context': 'Ada .', 'qas': qas}]}]}
        (at / 'dev-v2.0.json').write_text(json.dumps(root), encoding)
        return data.load_examples(str(at), 'dev')

    assert squad() == squad('utf-8-sig') == [        # a byte order mark
        {'context': 'Ada .', 'question': 'Who?', 'answers': ['Ada']},
        {'context': 'Ada .', 'question': 'Why?', 'answers': []}]
    for change, *words in (({'question': None}, 'has no prompt'),
                           ({'question': 'Who\ud800?'}, 'UTF-8'),
                           ({'answers': [{}]}, "no 'text'"), ({'answers': [{'text': 0}]}, '0'),
                           ({'answers': [{'text': ' '}]}, 'empty')):
        raises(ValueError, ['dev-v2.0.json', *words], squad, **change)
    raises(ValueError, ['article 0, paragraph 0, question 0: '], squad, answers=[{'text': 0}])
    starts = [squad(answers=[{'text': 'Ada', 'answer_start': at}])[0].get('answer_start')
              for at in (0, 1, -5, 9, None, 'x')]    # only what is true is taken
    assert starts == [0, None, None, None, None, None]

    lines = '\n'.join(map(json.dumps, good)) + '\n\n'                      # 9, and an empty one
    last = lines + '{"prompt": " ? ", "response": [], "context": null}'
    assert {'context': '', 'question': ' ? ', 'answers': []} in (
        read('a.jsonl', last) + read('a.jsonl', last, 'dev'))
    for row, word in (
            ('{"prompt": "?"', 'delimiter'),
            ('{"prompt": "?"}', "has no response among 'prompt'"),
            ('{"prompt": "?", "response": null}', 'has no response; a row without an'),
            ('{"prompt": null, "response": []}', 'has no prompt'),
            ('[1]', 'a JSON object on each line'), ('[', 'a JSON object on each line'),
            (f'[{", ".join(1000 * ["{}"])}]', '{},  (.jsonl has'),
            ('{"prompt": "?", "response": ""}', 'empty'), ('"x"', 'has no prompt'), ('1', 'int'),
            ('{"prompt": "?", "response": "a", "Context": "b"}', 'has no context among'),
            ('{"prompt": "?", "response": "a", "passage": "b"}', "'passage'"),
            ('{"prompt": "?", "response": ["a", " "]}', 'empty'), ('[' * 99999, 'recursion'),
            ('{"prompt": "", "response": "a"}', 'empty'), (b'{"prompt": "\xe9", "response": "a"}',
                                                           'UTF-8'),
            ('{"prompt": "?", "response": 1901}', '1901 is no text')):
        row = row if isinstance(row, bytes) else row.encode()
        raises(ValueError, ['x.jsonl, line 11: ', word], read, 'x.jsonl', lines.encode() + row)
    kept = '1901 001 NA null 1.0 2020-01-01 True nan é'.split()
    table = 'prompt,response\n' + ''.join(f'{i} ?,{text}\n' for i, text in enumerate(kept))
    found = [e for split in ('train', 'dev')
             for e in read('a.csv', '\ufeff' + table + '"a,\nb","c, ""d"""\n', split)]
    assert len(found) == 10 and all([text] in [e['answers'] for e in found]
                                    for text in [*kept, 'c, "d"'])
    for rows, line, word in (
            ('"a\nb",c\n?,Paris, France\n', 13, 'more cells'), ('?,\n', 11, 'empty'),
            ('?\n', 11, 'has no response')):
        raises(ValueError, [f'x.csv, line {line}: ', word], read, 'x.csv', table + rows)
    raises(ValueError, ['after line 10: ', 'end of data'], read, 'x.csv', table + '?,"a\n?,b\n')
    raises(ValueError, ['after line 1: ', 'end of data'], read, 'x.csv', table[:16] + '?,"a\n?,b\n')
    for mark in ';\t':                               # what there is, and what should be
        raises(ValueError, ['line 2: ', f'has no prompt among {f"prompt{mark}response"!r}',
                            'commas'], read, 'x.csv', f'prompt{mark}response\na{mark}b\n')
    for name, text, word in (('x.csv', '', 'no question'), ('x.jsonl', lines, '9 different'),
                             ('x.json', '{"data": [', 'x.json: '), ('x.json', '[{}]', '.jsonl'),
                             ('x.json', lines, 'rows are for .jsonl'),
                             ('x.json', '{"data": []}', 'no question')):
        raises(ValueError, [name, word], read, name, text)
    raises(FileNotFoundError, ['x.parquet', 'Arrow'], read, 'x.parquet', 'no table')
    raises(ValueError, ['x.txt is none of', '.csv'], read, 'x.txt', lines)   # not for the hub
    raises(FileNotFoundError, ['gone.csv'], data.load_examples, 'gone.csv', 'dev')
    for names in (), ('train.txt', 'train.csv', 'train.jsonl'):
        for name in names:
            (at / name).touch()
        raises(FileNotFoundError, [f'{2 if names else 0} files', 'train.csv'], data.load_examples,
               str(at), 'train')

    import datasets                                  # the hub, as it answers
    rows = [{'id': '1', 'question': 'Who?', 'context': 'Ada .', 'answers': {
        'text': ['Ada', 'ada'], 'answer_start': [0, 0]}}]
    for name, *asked in (('squad_v2', 'rajpurkar/squad_v2', None), ('a/b:c', 'a/b', 'c'), (
            'adversarial_qa:adversarialQA', 'UCLNLP/adversarial_qa', 'adversarialQA')):
        with patched(datasets, 'load_dataset', return_value=rows) as load:
            assert data.load_examples(name, 'dev') == [
                {'context': 'Ada .', 'question': 'Who?', 'answers': ['Ada', 'ada'],
                 'answer_start': 0}]
        load.assert_called_once_with(*asked, split='validation')
    with patched(datasets, 'load_dataset', return_value=[{'text': 'x'}]):
        raises(ValueError, ['a/b', "no 'question'"], data.load_examples, 'a/b', 'train')
    (at / 'y.jsonl').write_text(lines)
    load = datasets.load_dataset
    with patched(datasets, 'load_dataset', lambda *a, split: load(     # its own words
            'json', data_files=str(at / 'y.jsonl'), split=split)):
        raises(ValueError, ['a/b', "'train'", 'validation'], data.load_examples, 'a/b', 'dev')


def test_a_split_is_drawn_and_divides_what_a_model_sees():
    """Rows in a regular order, rows that `--no-context` or the cut makes alike; where the split is
    given, how many are alike is said."""
    at, enc = folder('regular'), data.load_tokenizer('toy')
    kinds = 'Who What Where When Why'.split()
    own = [{'prompt': f'{kinds[i % 5]} {i} ?', 'response': [str(i)] * (i % 2)} for i in range(1000)]
    path = str(at / 'own.jsonl')

    def write(rows, name='own'):
        (at / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, rows)))

    write(own)
    dev, train = (data.load_examples(path, name) for name in ('dev', 'train'))
    count = collections.Counter(e['question'].split()[0] for e in dev)
    assert len(dev) == 100 and all(5 <= count[kind] <= 40 for kind in kinds), count
    assert dev == data.load_examples(path, 'dev')
    assert len({e['question'] for e in dev + train}) == len(dev + train) == 1000
    write(own[:990])                                 # what was for training is, without ten rows
    assert len({e['question'] for e in data.load_examples(path, 'dev')}
               - {e['question'] for e in dev}) <= 2
    write([{**own[i % 1000], 'prompt': f'{i} ?'} for i in range(4000)], 'dev')
    some = data.load_examples(str(at), 'dev', 2000)
    assert .4 < np.mean([bool(e['answers']) for e in some]) < .6 and len(some) == 2000
    assert [e['question'] for e in some] == sorted((e['question'] for e in some),
                                                   key=lambda q: int(q[:-2]))
    fewer = data.load_examples(str(at), 'dev', 10)
    assert len(fewer) == 10 and all(e in some for e in fewer)

    place = [f'{first} {last} .' for first in data.FIRST for last in data.LAST]
    write([{'prompt': f'{kinds[i % 4]} {i % 14 // 7} {i % 25} ?', 'response': 'a',
            'context': place[i]} for i in range(200)])
    before = set()
    for P, context in (40, False), (9, True), (40, True), (60, True):
        sides = [data.load_split(path, name, enc, P, 6, context) for name in ('train', 'dev')]
        seen = [{*map(bytes, split.prompts)} for split in sides]
        assert all(seen) and not seen[0] & seen[1] and sum(map(len, sides)) == 200
        assert len(seen[1]) == len(seen[0] | seen[1]) // 10
        asked = [e['question'] + e['context'] for e in sides[1].examples]
        assert P < 60 or asked == before             # another cut that makes none alike
        before = asked
    write([{'prompt': f'Why {i % 7} ?', 'response': 'a', 'context': place[i]} for i in range(200)])
    sides = [data.load_split(path, name, enc, 40, 6, False) for name in ('train', 'dev')]
    seen = [{*map(bytes, split.prompts)} for split in sides]
    assert [*map(len, seen)] == [6, 1] and not seen[0] & seen[1] and sum(map(len, sides)) == 200
    for salt in range(6):                            # what is asked often is not always dev's
        write([{'prompt': f'Why {salt} {i % 2 if i < 200 else i} ?', 'response': 'a',
                'context': place[i % 288]} for i in range(218)])
        count.update(often=len(data.load_split(path, 'dev', enc, 40, 6, False)) > 50)
    assert count['often'] < 5
    write([{'prompt': 'Why ?', 'response': 'a', 'context': place[i]} for i in range(20)])
    raises(ValueError, ['1 different'], data.load_split, path, 'dev', enc, 40, 6, False)
    write([{'prompt': f'{i} ?', 'response': 'a'} for i in (1, 7, 7, 7)], 'train')
    write([{'prompt': f'{i} ?', 'response': 'a'} for i in (1, 1, 2, 3)], 'dev')
    cfg = parse(reinforce, '--data', at, '--max_prompt', 20)
    with contextlib.redirect_stdout(io.StringIO()) as said, patched(data, 'load_tokenizer',
                                                                    lambda _: enc):
        data.load(cfg)
    assert '1 of 3 dev prompts stand in train, too' in said.getvalue()
    assert '1 dev rows repeat a prompt: its right responses can be one list' in said.getvalue()
    write([{'prompt': f'{i} ?', 'response': 'a'} for i in (1, 2, 3)], 'dev')
    with contextlib.redirect_stdout(io.StringIO()) as said, patched(data, 'load_tokenizer',
                                                                    lambda _: enc):
        data.load(cfg)
    assert 'repeat' not in said.getvalue()           # in train each response teaches


def test_data_of_ones_own():
    """Three formats, without a passage, through each script and all of sample.py."""
    import datasets
    at, enc = folder('own data'), data.load_tokenizer('toy')
    rows = [{'prompt': f'When did {data.FIRST[i % 18]} sell {i // 18} ?',
             'response': [y, f'In {y}'][:i % 3]} for i, y in enumerate([*data.YEARS, *'abc'])]
    rows[19]['prompt'] += ' ?' * 40
    (at / 'my.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).to_parquet(at / 'my.parquet')
    (at / 'my.csv').write_text('prompt,response\n' + ''.join(
        f'{row["prompt"]},{" ".join(row["response"]) or "no"}\n' for row in rows))
    a, b = (data.load_examples(f'{at}/my.{kind}', 'train') for kind in ('jsonl', 'parquet'))
    dev = data.load_examples(f'{at}/my.jsonl', 'dev')
    assert a == b and (len(a), len(dev)) == (30, 3)
    split, wanted = data.Split(a, enc, 26, 6), f'|[QUESTION] {a[0]["question"]}\n[ANSWER]'
    assert enc.decode(split.prompts[0].tolist()).replace('<|endoftext|>', '|').endswith(wanted)
    assert split.cut_prompts == sum('? ?' in e['question'] for e in a)
    assert len({*sample.groups_of(split)}) == 30                 # none share a passage
    twice = [dict(rows[i % 27], context=['', 'Ada .'][i // 27]) for i in range(54)] + rows
    (at / 'twice.jsonl').write_text('\n'.join(map(json.dumps, twice)))
    parts = [{(e['question'], e['context']) for e in data.load_examples(f'{at}/twice.jsonl', name)}
             for name in ('train', 'dev')]
    assert [*map(len, parts)] == [54, 6] and not parts[0] & parts[1]
    assert {q for q, _ in parts[0]} & {q for q, _ in parts[1]}               # of another passage
    with patched(data, 'load_tokenizer', lambda _: enc):
        for script, kind in zip(SCRIPTS, ('jsonl', 'csv', 'parquet')):
            out, flags = at / f'{script.__name__} {kind}', ['--data', at / f'my.{kind}']
            with contextlib.redirect_stdout(io.StringIO()) as said:
                train(script, out, *SMALL_OF[script], *OWN_D, *flags, '--iters', 2,
                      '--sft_iters', 1)
            assert ('no passages: --pretrain is off' in said.getvalue()) == (script is ppo)
            assert max(map(len, said.getvalue().splitlines())) <= 100
            assert 'question  ' in (text := (out / 'samples.txt').read_text())
            assert 'passage' not in text
        text = printed('--evaluate', out, '--prompts', 3, '--test_steps', 0, '--out', at / 'x.json',
                       '--best_of', 2, '--discriminator', out)
        assert 'F1 possible' in text and '3 prompts of' in text
        assert printed('--compare', out).count('question  ') == 3
        assert printed('--ckpt', out, '--question', 'Where ?')


def test_real_squad():
    if not SHARED.is_dir():
        raise unittest.SkipTest('the SQuAD files are not beside this repository')
    enc, files = data.load_tokenizer('squad'), str(SHARED / 'squad')
    dev, train = (data.load_examples(files, split) for split in ('dev', 'train'))
    assert len(dev) == 1895 and sum(not e['answers'] for e in dev) == 914
    assert sum('answer_start' in e for e in dev) == 981      # of all that are answerable
    split = data.Split(train, enc, 256, 32)
    has = np.array([bool(e['answers']) for e in train])
    cut = np.array([data.encode_prompt(e, enc, 256)[1] is not None for e in train])
    ends = np.array([f'{e["context"].strip()}\n[QUESTION]'[-30:] in enc.decode(p.tolist())
                     for e, p in zip(train, split.prompts)])
    assert ends.all() and cut[has].sum() > 1000 and cut[~has].sum() > 500    # of either class
    responses = data.to_text(*split.batch(np.flatnonzero(has))[2:4], enc)
    assert split.lost_answers == responses.count(data.UNANSWERABLE)
    assert .04 < split.lost_answers / has.sum() < .05      # where the first place counts


# -----------------------------------------------------------------------------
# reinforce: oracles

def enumerated():
    """A float64 policy, its reference, one prompt and all 15 responses to it, (1, 15, 3), with
    rewards of tokens that depend on the tokens up to them and on nothing to their right."""
    V, R, eos = 3, 3, 2
    policy, reference = (tiny_gpt(seed, vocab_size=V, n_layer=1).double() for seed in (1, 2))
    response = torch.tensor([y for y in itertools.product(range(V), repeat=R) if
                             all(b == eos for a, b in zip(y, y[1:]) if a == eos)])
    mask = F.pad(response == eos, (1, -1)).cumsum(1) == 0
    table = torch.randn(V ** R, R, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    prefix = (response * V ** torch.arange(R)).cumsum(1)
    reward = torch.stack([table[prefix[:, t], t] for t in range(R)], 1) * mask
    prompt = torch.tensor([[0, 1]]), torch.tensor([0])
    with torch.no_grad():
        ref_logprobs = reference.response_logprobs(*prompt, response[None])[0]

    def logprobs():
        return policy.response_logprobs(*prompt, response[None])[0]          # (1, 15, 3)
    return policy, logprobs, response[None], mask[None], ref_logprobs, reward[None]


def gradient(network, value):
    grads = torch.autograd.grad(value, list(network.parameters()), retain_graph=True,
                                allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


class Keep(torch.optim.SGD):
    """An optimizer that moves nothing and keeps the gradient it was last given."""

    def __init__(self, network):
        super().__init__(network.parameters(), lr=0.)

    def step(self):
        params = self.param_groups[0]['params']
        self.kept = torch.cat([p.grad.flatten() for p in params if p.grad is not None]).cpu()


def test_policy_gradients_are_exact():
    """REINFORCE's, and PPO's at ratio 1, are that of the KL-penalised objective over all responses,
    with any baseline that does not depend on the token."""
    policy, logprobs, response, mask, ref_logprobs, reward = enumerated()
    now = logprobs()
    p = (now * mask).sum(-1).exp()                                           # (1, 15)
    assert abs(p.sum().item() - 1) < 1e-9
    rewards = reward - .3 * (now - ref_logprobs) * mask
    exact = gradient(policy, (p * rewards.sum(-1)).sum())
    rewards, p = rewards.detach(), p.detach()

    before = F.pad(response[..., :-1] + 1, (1, 0))
    critic = torch.sin((before * 5 ** torch.arange(3)).cumsum(-1).double())   # of what precedes y_t
    baselines = [reinforce.advantages(rewards, 'mean', .7),
                 *(ppo.gae(rewards, values, mask, 1.)[0] for values in (0 * critic + .7, critic))]
    losses = [reinforce.policy_loss, lambda new, A, mask: ppo.clipped_policy_loss(
        new, new.detach(), A, mask, 1e9)]
    found = [sum(p[0, i] * loss(*(z[:, [i]] for z in (now, A, mask))) for i in range(15))
             for A, loss in itertools.product(baselines, losses)]
    # leave-one-out: all pairs of responses
    found.append(sum(p[0, pair].prod() / 2 * reinforce.policy_loss(
        now[:, pair], reinforce.advantages(rewards[:, pair], 'loo', 0.), mask[:, pair])
        for pair in map(list, itertools.product(range(15), repeat=2))))
    for loss in found:
        assert (gradient(policy, -loss) - exact).abs().max() < 1e-9


@unclipped
def test_reinforce_step_takes_the_gradient_of_its_parts():
    """Of the policy that samples, at its temperature; a running mean starts at the first return."""
    for baseline, running in ('loo', 0.), ('mean', .7), ('mean', None):
        cfg, policy, reference, _, batch, roll = case(
            reinforce, '--beta', '.3', '--micro_batch', '3', '--anchor', '.5', '--temperature',
            '.5', '--baseline', baseline)
        rewards, optimizer = torch.randn(4, 2, 4) * roll.mask, Keep(policy)
        figures = reinforce.reinforce_step(policy, reference, optimizer, batch, roll, rewards,
                                           running, 0., cfg)
        logprobs, entropy = plain_logprobs(policy, *batch[:2], roll.response, .5)
        log_ratio = logprobs - plain_logprobs(reference, *batch[:2], roll.response, .5)[0]
        r = (rewards - .3 * log_ratio * roll.mask).detach()
        other = r.sum(-1, keepdim=True).flip(1)      # the return of the prompt's other sample
        less = other if baseline == 'loo' else running or rewards.sum() / 8
        A = r.flip(-1).cumsum(-1).flip(-1) - less
        gold = plain_logprobs(policy, *batch[:2], batch.response[:, None])[0][:, 0]
        mle = -gold[batch.mask].mean()
        loss = -(A * logprobs)[roll.mask].sum() / 8
        wanted = gradient(policy, loss - .5 * gold[batch.mask].sum() / 4)    # both over answers
        assert (optimizer.kept - wanted).abs().max() < 1e-5 and wanted.abs().max() > 1e-3
        told = {'g_loss': loss, 'mle': mle, 'kl': log_ratio[roll.mask].mean(),
                'entropy': entropy[roll.mask].mean(), 'g_norm': wanted.norm(),
                'return_mean': r.sum() / 8}
        assert figures.keys() == told.keys()
        assert all(abs(figures[k] - v.item()) < 1e-4 for k, v in told.items()), (figures, told)


def test_a_reward_is_the_margin_to_the_gold_answer():
    """That of a tie is 0, if it does not end, too; that of others that do not end -1, if the gold
    answer does, but the score is the score; those dealt at random are the same, elsewhere; a match
    reads no score."""
    for kind, prefixes, ends_gold in (('margin', True, True), ('margin', False, True),
                                ('margin', True, False), ('score', True, True),
                                ('random', True, True), ('random-score', False, True),
                                ('match', True, True)):
        cfg, _, _, network, batch, roll = case(reinforce, '--micro_batch', '3', '--reward', kind)
        cfg.d_prefixes = prefixes
        roll.response[3, 0], roll.mask[3, 0], roll.ended[3, 0] = 7, True, False      # a tie
        batch.response[3], batch.mask[3] = 7, True
        batch.ended[1] = ends_gold                   # where the gold answer does not end, either
        s = plain_scores(network, *batch[:2], roll.response)
        s_gold = plain_scores(network, *batch[:2], batch.response[:, None])[:, 0]
        last, gold_last = roll.mask.sum(-1) - 1, batch.mask.sum(-1, keepdim=True) - 1
        ends = s.gather(-1, last[..., None])[..., 0]
        until = torch.minimum(last, gold_last) if prefixes else gold_last.expand(-1, 2)
        worth = 2 / (1 + (s_gold.gather(1, until) - ends).exp()) - 1
        worth[0, 0], worth[3, 0] = 0, 0              # two are ties, and one does not end
        worth[1, 1] = worth[1, 1] if not ends_gold else -1
        if kind == 'match':
            worth = torch.full((4, 2), -1.).index_put((torch.tensor([0, 3]), torch.tensor(0)),
                                                      torch.tensor(0.))
        if kind.endswith('score'):
            worth = ends
        rewards = reinforce.reward(reinforce.score(network, batch, roll, cfg), batch, roll, cfg)
        found = rewards.gather(-1, last[..., None])[..., 0]
        assert rewards.count_nonzero(-1).max() <= 1 and (~roll.ended).sum() == 2
        if kind.startswith('random'):
            assert (found - worth).abs().max() > 1e-3
            found, worth = found.flatten().sort()[0], worth.flatten().sort()[0]
        assert (found - worth).abs().max() < 1e-5, kind


def test_a_prefix_has_no_score_for_what_comes_after_it():
    """Gold and sampled answers begin alike, with a or b; with a, the longer is rare among the gold
    ones, with b among the samples. The best scores of the two first tokens are equal all the same:
    where all scores are 0, the loss of all pairs has no gradient there."""
    a, b, eos = 0, 1, 2
    answers = torch.tensor([[a, eos, eos], [a, a, eos], [b, eos, eos], [b, b, eos]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]] * 2).bool()
    gold_p, fake_p = torch.tensor([[.45, .05, .05, .45], [.05, .45, .45, .05]]).double()
    for script in SCRIPTS:
        w = script.compared(answers.expand(4, 4, 3), mask.expand(4, 4, 3), answers, mask, True)
        scores = torch.zeros(4, 3).double().requires_grad_()
        s = model.hold_last(scores, mask)
        terms = script.discriminator_loss(s[:, None], s, 'pair') * w         # (gold, sample, 3)
        (terms.sum(-1) * gold_p[:, None] * fake_p).sum().backward()
        assert abs(scores.grad[:2, 0].sum()) < 1e-9                          # all that begin with a
        assert scores.grad[0, 1] < -.1 and scores.grad[1, 1] > .1            # second tokens


def pairs_by_hand(s, response, mask, prefixes=True):
    """Scores (gold, sample) to compare, of scores (B, 1 + K, R) of a gold answer and samples: at
    all prefixes from the first difference to where both are over, or there only; none of a tie."""
    for row, k in itertools.product(range(len(s)), range(1, s.size(1))):
        differ = (response[row, k] != response[row, 0]).nonzero()
        if len(differ):
            ends = [int(mask[row, i].sum()) - 1 for i in (0, k)]
            for t in range(int(differ[0]) if prefixes else max(ends), max(ends) + 1):
                yield [s[row, i, min(t, end)] for i, end in zip((0, k), ends)]


@unclipped
def test_discriminator_gradient_is_that_of_the_objective():
    """Of the poster's, log D(x, y*) + log(1 - D(x, y)), and of the pair's, written by hand, whole
    and by prefixes, in micro-batches; eos included, a tie not. Equal scores are half right."""
    for kind, prefixes in itertools.product(('minimax', 'pair'), (False, True)):
        cfg, _, _, network, batch, roll = case(reinforce, '--d_loss', kind, '--micro_batch', '3')
        cfg.d_prefixes, optimizer = prefixes, Keep(network)
        answers = data.beside_gold(batch, roll)[:2]
        s = plain_scores(network, *batch[:2], answers[0])
        losses = [-torch.log(torch.sigmoid(a - b)) if kind == 'pair' else
                  -torch.log(torch.sigmoid(a)) - torch.log(1 - torch.sigmoid(b))
                  for a, b in pairs_by_hand(s, *answers, prefixes)]
        right = [(a > b).item() for a, b in pairs_by_hand(s, *answers, False)]
        loss = sum(losses) / len(losses)
        wanted = gradient(network, loss)
        scores, out = reinforce.discriminator_step(network, optimizer, batch, roll, cfg)
        assert (scores - model.hold_last(s, answers[1])).abs().max() < 1e-5
        assert abs(out['score'] - scores[:, 1:, -1].mean()) < 1e-5
        assert abs(out['gap'] - out['score'] + scores[:, 0, -1].mean()) < 1e-5
        assert (optimizer.kept - wanted).abs().max() < 1e-5 and wanted.abs().max() > 1e-3
        assert abs(out['d_loss'] - loss.item()) < 1e-5 and abs(out['tie_rate'] - 1 / 8) < 1e-6
        assert abs(out['d_acc'] - np.mean(right)) < 1e-6 and len(right) == 7

        ties = Rollout(*(z[:, None].expand(-1, 2, -1) for z in batch[2:4]), roll.ended)
        _, out = reinforce.discriminator_step(network, None, batch, ties, cfg)
        assert out.pop('score') and out == {'d_loss': None, 'd_norm': None, 'd_acc': None,
                                            'tie_rate': 1.0, 'gap': 0.0}
        torch.nn.init.zeros_(network.score.weight)
        _, out = reinforce.discriminator_step(network, optimizer, batch, roll, cfg)
        assert out['d_acc'] == .5


def test_micro_batches_bound_every_pass():
    """No pass that learns, or that the discriminator or the reference makes, has more prompts than
    --micro_batch, the anchor's and the warm start's included."""
    rows, hidden = collections.Counter(), GPT.hidden

    def watched(self, x, pad, P, R, *decoding):
        if not decoding:
            key = torch.is_grad_enabled(), P, R
            rows[key] = max(len(x), rows[key])
        return hidden(self, x, pad, P, R, *decoding)

    for script in SCRIPTS:
        rows.clear()
        with patched(GPT, 'hidden', watched):
            train(script, folder('micro'), *SMALL_OF[script], '--micro_batch', '3')
        learning = [n for (learns, _, _), n in rows.items() if learns]
        assert len(learning) >= 2 and max(learning) == 3, rows
        assert max(rows.values()) <= 6, rows         # evaluations: 3 x 2 answers


# -----------------------------------------------------------------------------
# ppo: oracles

def test_clipping_by_hand():
    policy, value = ppo.clipped_policy_loss, ppo.value_loss
    for loss, new, old, target, wanted, slope in (   # target: the advantage; the return
            (policy, math.log(1.), 0., 2., -2., -2.), (policy, math.log(1.5), 0., 2., -2.4, 0.),
            (policy, math.log(1.5), 0., -2., 3., 3.), (policy, math.log(.5), 0., 2., -1., -1.),
            (policy, math.log(.5), 0., -2., 1.6, 0.), (policy, .1 - 1, -1., -1., 1.1052, 1.1052),
            (value, 1., 1., 3., 2., -2.), (value, 2., 1., 3., 1.62, 0.),
            (value, 2., 1., 0., 2., 2.), (value, 1.1, 1., 3., 1.805, -1.9)):
        new = torch.tensor([[new]], requires_grad=True)
        out = loss(new, *(torch.tensor([[z]]) for z in (old, target, True)), .2)
        out.backward()
        assert abs(out.item() - wanted) < 1e-4 and abs(new.grad.item() - slope) < 1e-4, (new, old)
    # nothing is exponentiated outside the mask
    new, mask = torch.tensor([[-1., 200.]], requires_grad=True), torch.tensor([[True, False]])
    loss = ppo.clipped_policy_loss(new, torch.full((1, 2), -1.), torch.ones(1, 2), mask, .2)
    loss.backward()
    assert loss.item() == -1 and new.grad.tolist() == [[-1., 0.]]


def ppo_case(*flags):
    """`case` with a critic, rewards, optimizers that keep gradients, and passages."""
    cfg, policy, reference, _, batch, roll = case(ppo, '--minibatch', '4', *flags)
    critic = tiny_discriminator(4, ppo.Critic)
    rewards = torch.randn(4, 2, 4) * roll.mask
    optimizers = [Keep(net) for net in (policy, critic)]
    return (cfg, policy, reference, critic, batch, roll, rewards, optimizers,
            torch.randint(0, 13, (3, 9)).numpy())


@unclipped
def test_ppo_takes_its_gradient_from_scores_to_both_networks():
    """KL into the reward, GAE, centring; then an update in micro-batches with ratios away from 1,
    the anchor and the passages that are due: all written out here, away from temperature 1."""
    cfg, policy, reference, critic, batch, roll, rewards, optimizers, passages = ppo_case(
        '--beta', '.3', '--lam', '.8', '--anchor', '.4', '--pretrain', '.7', '--micro_batch', '3',
        '--temperature', '.5')
    mask, running = roll.mask, {'updates': 1}
    past, seen = ppo.look_back(policy, reference, critic, batch, roll, rewards, cfg)
    with torch.no_grad():
        logprobs, entropy = plain_logprobs(policy, *batch[:2], roll.response, .5)
        log_ratio = logprobs - plain_logprobs(reference, *batch[:2], roll.response, .5)[0]
        values = critic(*batch[:2], roll.response)
        r, V, A = (rewards - .3 * log_ratio) * mask, values * mask, torch.zeros_like(rewards)
        for b, k, t in mask.nonzero().tolist():
            for i in range(t, int(mask[b, k].sum())):
                after = V[b, k, i + 1] if i + 1 < r.size(-1) else 0
                A[b, k, t] += .8 ** (i - t) * (r[b, k, i] + after - V[b, k, i])
        wanted = ppo.Past(roll.response, mask, logprobs, values, A - A[mask].mean(), A + V)
        for name, one, other in zip(ppo.Past._fields, past, wanted):
            assert ((one - other.to(one.dtype))[mask].abs().max() < 1e-5
                    if one.is_floating_point() else torch.equal(one, other)), name
        assert abs(seen['kl'] - log_ratio[mask].mean()) < 1e-5
        assert abs(seen['entropy'] - entropy[mask].mean()) < 1e-5
        changed = roll.response.clone()              # a value depends on nothing from its token on
        changed[..., 2:] = 7
        change = (critic(*batch[:2], changed) - values).abs()
        assert change[..., :3].max() < 1e-6 and change[..., 3].max() > 1e-3

    past = past._replace(logprobs=past.logprobs + .3 * torch.randn(past.logprobs.shape),
                         values=past.values - .5)
    logprobs, _ = plain_logprobs(policy, *batch[:2], roll.response, .5)
    ratio = (logprobs - past.logprobs).exp()
    g_loss = -torch.minimum(ratio * past.advantages,
                            ratio.clamp(.8, 1.2) * past.advantages)[mask].sum() / 8
    gold = plain_logprobs(policy, *batch[:2], batch.response[:, None])[0][:, 0][batch.mask]
    mle = -gold.mean()
    drawn = torch.from_numpy(passages)[data.order(3, ppo.PASSAGES, (cfg.seed, 2), 1)]
    extra = -policy(drawn)[:, :-1].log_softmax(-1).gather(-1, drawn[:, 1:, None]).mean()
    values = critic(*batch[:2], roll.response)
    clipped = past.values + (values - past.values).clamp(-.2, .2)
    v_loss = .5 * torch.maximum((values - past.returns) ** 2,
                                (clipped - past.returns) ** 2)[mask].mean()
    wanted = gradient(policy, g_loss - .4 * gold.sum() / 4 + .7 * extra), gradient(critic, v_loss)
    record = ppo.ppo_step(policy, critic, optimizers, batch, past, passages, running, 0., cfg)
    for optimizer, grad in zip(optimizers, wanted):
        assert (optimizer.kept - grad).abs().max() < 1e-5 and grad.abs().max() > 1e-3
    told = {'g_loss': g_loss, 'v_loss': v_loss, 'mle': mle, 'pretrain': extra, 'updates': 1,
            'approx_kl': (ratio - 1 - ratio.log())[mask].mean(), 'g_norm': wanted[0].norm(),
            'v_norm': wanted[1].norm()}
    assert record.keys() == told.keys() and running == {'updates': 2}
    assert all(abs(record[k] - v) < 1e-4 for k, v in told.items()), (record, told)


def test_ppo_takes_minibatches_and_stops_early():
    """The update that would go too far is not taken, by either network, and not counted."""
    # the first ratio is 1, the second is not; the first update is taken in any case
    for limit, updates in (1e-7, 1), (1e9, 6), (-1., 1):
        cfg, policy, reference, critic, batch, roll, rewards, _, passages = ppo_case(
            '--epochs', '3', '--minibatch', '2', '--pretrain', '0', '--anchor', '.1')
        optimizers, running = [model.adamw(net) for net in (policy, critic)], {'updates': 0}
        cfg.lr = cfg.critic_lr = 1e-3
        past, _ = ppo.look_back(policy, reference, critic, batch, roll, rewards, cfg)
        with patched(ppo, 'APPROX_KL', limit):
            record = ppo.ppo_step(policy, critic, optimizers, batch, past, None, running, 1., cfg)
        assert running['updates'] == record['updates'] == updates
        for network, optimizer in zip((policy, critic), optimizers):
            assert optimizer.state[network.trunk.wpe.weight if network is critic else
                                   network.wpe.weight]['step'] == updates
            assert all(p.grad is None for p in network.parameters())
        assert 'pretrain' not in record


# -----------------------------------------------------------------------------
# gumbel

def fixed_noise(logits, response, rng):
    """In `conditional_noise`'s place: no draw, so that the layout does not matter."""
    V = logits.size(-1)
    return 3. * F.one_hot(response, V) + .1 * torch.arange(V, device=logits.device)


def test_conditional_noise_is_the_noise_of_its_tokens():
    """Its argmax is the token asked for; over tokens from the softmax it is Gumbel(0, 1) again."""
    rng = torch.Generator().manual_seed(0)
    N, V = 100000, 4
    logits = torch.tensor([1., -.5, .3, -2.]).double().expand(N, 1, V)
    response = logits[:, 0].softmax(-1).multinomial(1, generator=rng)        # (N, 1)
    noise = gumbel.conditional_noise(logits, response, rng)
    assert torch.equal((logits + noise).argmax(-1), response)
    g = noise[:, 0].sort(0).values                   # Kolmogorov and Smirnov, p = .001 of each
    uniform = torch.arange(1, N + 1).double()[:, None] / N
    assert ((-(-g).exp()).exp() - uniform).abs().max() < 1.95 / math.sqrt(N)
    assert (noise[:, 0].t().corrcoef() - torch.eye(V)).abs().max() < 4 / math.sqrt(N)
    ends = model.exponential(torch.tensor([0., .5, 1 - 2 ** -24]))           # of what is drawn
    assert ends.log().isfinite().all() and ends[0] > ends[1] > ends[2] > 0


@unclipped
def test_gumbel_steps_take_the_gradient_of_their_parts():
    """Both networks', by hand, from answers relaxed one token at a time, without a cache; in
    micro-batches, from the first difference on, a tie left out. Equal scores are half right."""
    for encoding in 'soft', 'hard', 'mixed':
        cfg, gpt, reference, discriminator, batch, roll = case(
            gumbel, '--micro_batch', '3', '--beta', '.3', '--encoding', encoding, '--temperature',
            '.5', '--anchor', '.4')
        response, mask, _ = data.beside_gold(batch, roll)
        logits, ref_logits = (torch.stack([
            net(*in_rows(*batch[:2], response[..., :t]))[:, -1].view(4, 3, 13) / .5
            for t in range(4)], 2) for net in (gpt, reference))
        soft = ((logits + fixed_noise(logits, response, None)) / .7).softmax(-1)
        onehots = F.one_hot(response, 13).float()
        soft = torch.where(mask[..., None], soft, onehots)
        z = {'soft': soft, 'hard': onehots + soft - soft.detach(),
             'mixed': torch.cat((onehots[:, :1], soft[:, 1:]), 1)}[encoding]

        s = discriminator(*batch[:2], z.detach())
        score = s.gather(-1, mask.sum(-1, keepdim=True) - 1)[:, 1:].mean()
        right = [float(a > b) for a, b in pairs_by_hand(s, response, mask, False)]
        terms = [F.softplus(b - a) for a, b in pairs_by_hand(s, response, mask)]
        d_loss = sum(terms) / len(terms)
        wanted_d = gradient(discriminator, d_loss)
        s = discriminator(*batch[:2], z)
        terms = [F.softplus(a.detach() - b) for a, b in pairs_by_hand(s, response, mask)]
        g_loss = sum(terms) / 8
        p = logits.softmax(-1)
        kl = (p * (p.log() - ref_logits.log_softmax(-1))).sum(-1)[:, 1:] * roll.mask
        to_come = kl.detach().flip(-1).cumsum(-1).flip(-1) - kl.detach()
        chosen = p[:, 1:].gather(-1, roll.response[..., None])[..., 0].log()
        gold = plain_logprobs(gpt, *batch[:2], batch.response[:, None])[0][:, 0][batch.mask]
        penalty = (kl + to_come * chosen).sum() / 8
        wanted = gradient(gpt, g_loss + .3 * penalty - .4 * gold.sum() / 4)

        optimizer, d_optimizer, more = Keep(gpt), Keep(discriminator), (.7, None, cfg)
        with patched(gumbel, 'conditional_noise', fixed_noise):
            record = gumbel.gumbel_step(gpt, reference, discriminator, optimizer, batch, roll, 0.,
                                        *more)
            assert all(q.grad is None for q in discriminator.parameters())
            record |= gumbel.discriminator_step(discriminator, gpt, d_optimizer, batch, roll, *more)
            grad_d = d_optimizer.kept
            assert all(q.grad is None for q in gpt.parameters())
            torch.nn.init.zeros_(discriminator.score.weight)
            equal = gumbel.discriminator_step(discriminator, gpt, d_optimizer, batch, roll, *more)
        assert equal['d_acc'] == .5
        for found, grad in (optimizer.kept, wanted), (grad_d, wanted_d):
            assert (found - grad).abs().max() < 1e-5 and grad.abs().max() > 1e-3
        told = {'g_loss': g_loss, 'kl': kl[roll.mask].mean(), 'mle': -gold.mean(),
                'd_loss': d_loss, 'd_acc': sum(right) / 7, 'score': score}
        assert all(abs(record[k] - v) < 1e-5 for k, v in told.items()), (record, told)


def test_kl_penalty_has_the_exact_gradient():
    """In expectation over all answers; without what a token does to later ones it is 16% off."""
    policy, logprobs, response, mask, ref_logprobs, _ = enumerated()
    reference, prompt = tiny_gpt(2, vocab_size=3, n_layer=1).double(), torch.tensor([[0, 1]])
    logits, ref_logits = (net.head(net.response_hidden(prompt, torch.tensor([0]), response))
                          for net in (policy, reference))
    now = logprobs() * mask
    p = now.sum(-1).exp()
    kl = (p * (now - ref_logprobs * mask).sum(-1)).sum()
    per_token, _ = gumbel.kl_penalty(logits, ref_logits.detach(), response, mask)
    assert abs((p * per_token.sum(-1)).sum() - kl) < 1e-9
    exact, found = (gradient(policy, z) for z in (kl, (p.detach() * per_token.sum(-1)).sum()))
    assert (found - exact).norm() / exact.norm() < 1e-9


# -----------------------------------------------------------------------------
# small runs

FEW = dict.fromkeys(data.TOYS, (400, 500))


def train(script, out, *flags, caught=()):
    """A run in this process, of few examples and without its curves: most of a small one's time."""
    with patched(sample, 'draw', lambda *a: None), patched(data, 'TOYS', FEW):
        return script.train(parse(script, *flags, '--out_dir', out), caught)


@functools.cache
def small_run(script, *flags):
    """The folder of a small run, trained once a process: to read, not to write."""
    out = Path(tempfile.mkdtemp(dir=SCRATCH))
    train(script, out, *SMALL, *flags)
    return out


def records(out):
    file = out / 'metrics.jsonl'
    lines = file.read_text().splitlines()[1:] if file.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k != 'seconds'} for line in lines]


class After:
    """Turns true, as a caught signal does, once metrics.jsonl holds n records with `key`."""

    def __init__(self, out, key, n):
        self.out, self.key, self.n = out, key, n

    def __bool__(self):
        return sum(self.key in r for r in records(self.out)) >= self.n


def keeping(function, kept):
    """The function, which also keeps what it returns."""
    return lambda *a, **kw: kept.append(function(*a, **kw)) or kept[-1]


def cut_short(script, out, *flags, at=('score', 2)):
    """A run that a signal ends early."""
    assert train(script, out, *flags, caught=After(out, *at)) is None


def ended_alike(one, other):
    """Two runs' records and checkpoints, bit for bit, but for where they are and their seconds."""
    assert records(one) == records(other) and records(one)[-1].keys() == {'final'}
    for name in 'ckpt.pt', 'sft.pt':
        saved = [load_checkpoint(out / name) for out in (one, other)]
        for state in saved:
            del state['settings']['out_dir'], state['log_size']
        assert len({json.dumps(z, default=torch.Tensor.tolist) for z in saved}) == 1, name


def command(script, *flags, expect=0, **kwargs):
    out = subprocess.run([sys.executable, HERE / script, *map(str, flags)], capture_output=True,
                         text=True, cwd=SCRATCH, timeout=300, **kwargs)
    assert out.returncode == expect, (out.returncode, out.stdout[-500:], out.stderr[-2000:])
    return out


def printed(*argv):
    """What sample.py prints for these flags, run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        sample.main(list(map(str, argv)))
    return out.getvalue()


def refused(words, *argv):
    """The sentence that sample.py ends with: it holds `words`, and names only flags that it has."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            printed(*argv)
        except SystemExit as e:
            said = e.code if isinstance(e.code, str) else err.getvalue().strip().splitlines()[-1]
            has = {*sample.FLAGS, *'ckpt compare evaluate table plot temperature dtype'.split()}
            assert '\n' not in said and {*re.findall(r'--(\w+)', said)} <= has, said
            assert all(w in said for w in words), said
            return said
    raise AssertionError(f'{argv} were taken')


# -----------------------------------------------------------------------------
# sample: judging

def people(n, seed=0):
    """A Split of n prompts, each context twice, with random answers, and other answers to them."""
    enc, rng = data.load_tokenizer('toy'), np.random.default_rng(seed)
    split, others = (data.Split(
        [{'context': f'In {data.YEARS[i // 2 % 30]} Ada did {i // 60} .',
          'question': f'Where {i % 2} ?',
          'answers': [' '.join(rng.choice(data.CITIES, rng.integers(1, 4)))]} for i in range(n)],
        enc, 30, 6) for _ in range(2))
    return split, others.batch(range(n)), enc


def judging(steps):
    return SimpleNamespace(device='cpu', dtype='float32', seed=1, batch_size=64, micro_batch=48,
                           top_k=None, test_steps=steps, test_lr=None)


def test_a_fresh_discriminator_is_right():
    """Two draws of the same human answers are told apart half the time, a planted token always."""
    split, (_, _, fake, mask, _), enc = people(1200, 1)
    trunk, hidden, rows = tiny_gpt(vocab_size=enc.n_vocab, n_embd=32, block_size=40), GPT.hidden, []

    def watched(self, x, *args):
        rows.append(len(x) if torch.is_grad_enabled() else 0)
        return hidden(self, x, *args)

    with patched(GPT, 'hidden', watched):
        same = sample.told_apart(trunk, split, fake, mask, judging(50))
    assert max(rows) == 32                           # 64 in two passes, of at most 48
    assert same['low'] < .5 < same['high'] and same['high'] - same['low'] < .09, same
    ties = (fake == split.batch(range(1200)).response).all(1)
    assert same['ties'] == ties.sum() > 5 and same['pairs'] == 1200 - same['ties']
    assert len(same['judges']) == len({*same['judges']}) == 3  # of halves of their own
    rows, right = sample.fresh_discriminator(trunk, split, fake, mask, (1, 2), judging(50))
    half = sample.halves(sample.groups_of(split), (1, 2))[1]
    assert np.array_equal(rows, half[~ties.numpy()[half]])
    assert right.mean() == same['judges'][2]

    wild = judging(3)
    wild.test_lr = 1e18
    raises(ValueError, ['diverged', '--test_lr'], sample.told_apart, trunk, split, fake, mask, wild)

    told = fake.clone()                              # a full stop before eos
    told[torch.arange(1200), mask.sum(1) - 1] = enc.encode_ordinary(' .')[0]
    planted = sample.told_apart(trunk, split, told, mask, judging(60))
    assert planted['low'] > .95 and planted['ties'] == 0, planted


def test_no_prompt_is_on_both_sides_and_an_interval_by_hand():
    """Nor a passage, where the prompts are questions alone."""
    split = people(400)[0]
    chained = [{'context': f'{i // 2}', 'question': f'{i // 20} {(i % 20 + 1) // 2} ?',
                'answers': []} for i in range(400)]  # i, i + 1 share now a passage, now a question
    chains = data.Split(chained, data.load_tokenizer('toy'), 30, 6, context=False)
    for some in split, chains:
        learn, judge = sample.halves(sample.groups_of(some), 0)
        assert sorted([*learn, *judge]) == list(range(400)) and abs(len(learn) - len(judge)) < 4
        for kind in [e['context'] for e in some.examples], [*map(tuple, some.prompts.tolist())]:
            assert not {kind[i] for i in learn} & {kind[i] for i in judge}

    # its ends are the shares p of which n trials, one a passage, are 1.96 deviations away
    for share, n, each in (.59, 300, 1), (.7, 400, 25), (1., 3, 2), (0., 7, 1), (.5, 1, 9):
        low, high = sample.interval(share, np.arange(n).repeat(each))
        assert 0 <= low <= share <= high <= 1
        for p in low, high:
            assert abs(n * (share - p) ** 2 - 1.96 ** 2 * p * (1 - p)) < 1e-9


def test_kl_and_perplexity_against_sums():
    """KL exact at each token of the model's own samples, by hand from whole logits."""
    split, _, enc = people(6)
    one, base = (tiny_gpt(seed, vocab_size=enc.n_vocab, block_size=40) for seed in (0, 1))
    kl = sample.drift(one, base, split, .5, judging(1))
    loss = sample.gold_loss(one, split, judging(1))
    batch = split.batch(range(6))
    roll = one.generate(batch.prompt, batch.pad, 6, split.eos, temperature=.5,
                        rng=torch.Generator().manual_seed(1))
    with torch.no_grad():
        p, q = ((net(*in_rows(*batch[:2], roll.response))[:, 29:-1] / .5).softmax(-1)
                for net in (one, base))
        gold = one(*in_rows(*batch[:2], batch.response[:, None]))[:, 29:-1].softmax(-1)
    mask = roll.mask[:, 0]
    wanted = sum((p[i, t] * (p[i, t] / q[i, t]).log()).sum() for i, t in mask.nonzero())
    assert abs(kl - wanted / mask.sum()) < 1e-5 and kl > 0
    wanted = sum(-gold[i, t, batch.response[i, t]].log() for i, t in batch.mask.nonzero())
    assert abs(loss - wanted / batch.mask.sum()) < 1e-5


def test_best_of_n_by_hand():
    """A discriminator that knows the F1 chooses the best sample, its negative the worst."""
    split, _, enc = people(11)
    gpt, args = tiny_gpt(vocab_size=enc.n_vocab, block_size=40), judging(1)
    args.best_of, args.batch_size = 3, 12            # 4 rows a batch, the last is cut
    number = {tuple(p): i for i, p in enumerate(split.prompts.tolist())}

    def generate(prompt, pad, R, eos, *_, **__):     # 1, 2 and 1 words of the gold answer
        rows = [number[tuple(p)] for p in prompt.tolist()]
        gold = torch.from_numpy(split.responses[rows]).long()[:, None].repeat(1, 3, 1)
        gold = gold.masked_fill(torch.arange(R) >= torch.tensor([1, 2, 1])[:, None], eos)
        return Rollout(gold, (gold == eos).cumsum(-1) <= 1, torch.ones(gold.shape[:2]).bool())

    def words(prompt, pad, response):                # the more of them, the higher its F1
        return (response != split.eos).sum(-1, keepdim=True).float().expand(response.shape)

    with patched(gpt, 'generate', generate):
        (best, chosen), (worst, _) = (sample.best_of(gpt, judge, split, enc, 1., args)
                                      for judge in (words, lambda *a: -words(*a)))
    f1 = 100 * np.array([[data.score_answer(' '.join(e['answers'][0].split()[:n]), e)['f1']
                          for n in (1, 2, 1)] for e in split.examples])
    assert chosen == [' '.join(e['answers'][0].split()[:2]) for e in split.examples]
    assert best['n'] == 3 and abs(best['chosen']['f1'] - f1.max(1).mean()) < 1e-9
    assert best['possible'] == best['chosen'] and best['any'] == worst['any']
    assert abs(best['any']['f1'] - f1.mean()) < 1e-9
    assert abs(worst['chosen']['f1'] - f1.min(1).mean()) < 1e-9
    assert worst['chosen']['f1'] < best['any']['f1'] < best['chosen']['f1']


def test_runs_are_judged_compared_tabled_and_drawn():
    at, runs = folder('judged'), [small_run(gumbel, '--seed', seed) for seed in (1, 2)]
    files, found, base = [at / 'one.json', at / 'two.json'], [], runs[0] / 'sft.pt'
    chosen = ['--base', base, '--best_of', 2, '--discriminator', runs[0]]    # a run's folder
    for run, file, more in zip(runs, files, ([], chosen)):
        text = printed('--evaluate', f'sft={run}/sft.pt', f'tuned={run}/ckpt.pt', '--prompts', 40,
                       '--test_steps', 2, '--out', file, *more)
        for words in 'pairs that differ', 'sft, at 1.0: EM', '40 prompts of toy', f'from {base}':
            assert words in text, text
        found.append(json.loads(file.read_text())['results'])
        f, = found[-1]['tuned']
        assert f['kl'] > 0 and 0 < f['length_distance'] <= 1
        assert abs(math.log(f['perplexity']) - f['loss']) < 1e-5
        assert f['fresh']['pairs'] <= 40 and f['prompts'] == 40
    assert found[0]['sft'][0]['kl'] == 0 < found[1]['sft'][0]['kl'] and 'F1 chosen' in text
    assert f['best_of']['n'] == 2 and f['best_of']['any']['f1'] <= f['best_of']['possible']['f1']
    assert json.loads(file.read_text())['setup']['base'] == str(base)
    head, rule, *rows = printed('--table', *files).strip().splitlines()
    assert len(rows) == 2 and all(r.count('|') == head.count('|') == rule.count('|') for r in rows)
    ems = [results['tuned'][0]['em'] for results in found]
    assert rows[1].startswith(f'| tuned | {np.mean(ems):.1f} ± {np.std(ems, ddof=1):.1f} |'), rows
    for header, key in ('F1, HasAns', 'has_f1'), ('F1 sampled, NoAns', 'sample_no_f1'):
        found_f1 = [results['tuned'][0][key] for results in found]
        want = f'{np.mean(found_f1):.1f} ± {np.std(found_f1, ddof=1):.1f}'
        assert rows[1].split(' | ')[head.split(' | ').index(header)] == want, (header, rows)
    column = head.split(' | ').index('told apart %')
    assert rows[1].split(' | ')[column] == '–'                               # of 40 pairs at most
    for file, results in zip(files, found):                                  # as if of more
        for figures, in results.values():
            figures['fresh'] |= {'judges': [.75], 'accuracy': .75}
        file.write_text(json.dumps({'results': results}), encoding='utf-8-sig')
    both = at / 'both.json'
    row = printed('--table', *files, '--out', both).strip().splitlines()[-1]
    assert row.split(' | ')[column] == '75.0 ± 0.0' and row.endswith('| – | – | – |'), row
    assert printed('--table', both).strip().splitlines()[-1] == row
    assert 'F1 chosen' in printed('--table', files[1])
    for wrong in (1, 'x', [1], ['x'], [{'em': 1}], [{**f, 'em': 'x'}], [{**f, 'prompts': 0}]):
        both.write_text(json.dumps({'results': {'sft': wrong}}))
        refused(['both.json', 'holds no results'], '--table', both)
    both = at / 'both.jsonl'                         # of several runs, one after the other
    both.write_text(''.join((run / 'metrics.jsonl').read_text() for run in runs))
    text = [printed('--table', *arguments) for arguments in (
        [f'Gumbel={both}'], [f'Gumbel={run}' for run in runs])]
    assert text[0] == text[1] and '±' in text[0]
    own = {'results': {'mine': [{'row': {'EM': n}} for n in (1., 3.)]}}
    both.with_suffix('.json').write_text(json.dumps(own))
    assert '| mine | 2.0 ± 1.4 |' in printed('--table', both.with_suffix('.json'))
    png = at / 'all.png'
    printed('--plot', *(f'Gumbel={run}' for run in runs), runs[0] / 'metrics.jsonl', '--out', png)
    assert png.stat().st_size > 20000
    text = printed('--compare', f'one={base}', runs[1] / 'ckpt.pt', '--prompts', 3)
    assert text.count('question  ') == text.count('one ') == 3
    with contextlib.redirect_stderr(io.StringIO()) as err:
        printed('--plot', *runs, '--out', png)
        assert not err.getvalue()                    # of other seeds, but the same prompts
        printed('--plot', runs[0], small_run(reinforce, '--eval_prompts', 11), '--out', png)
    assert err.getvalue() == 'these runs were evaluated on different dev prompts\n'
    with patched(sample, 'groups_of', lambda split: np.zeros(len(split), int)), \
            patched(sample, 'judge', side_effect=OSError('judged')) as judge:
        judged = '--evaluate', base, '--out'
        refused(['of one passage', '--prompts', '--test_steps 0'], *judged, png)
        refused(['place of a log'], *judged, at / 'metrics.json', '--prompts', 9)
        assert not judge.called                      # of fewer, no fresh discriminator judges
        assert refused([], *judged, at / 'x.json', '--prompts', 199) == 'judged'
    at, values = sample.windows([{'iter': i, 'kl': float(i)} for i in range(295)] + [{'iter': 7}],
                                'iter', 'kl')
    assert [*at[[0, -1]]] == [2, 292] and [*values] == [*at] and len(at) == 59   # of 5 each


def test_a_network_that_diverged_is_judged_beside_others():
    """What is not finite is null in the JSON and – in a table; what is large is short."""
    at, run = folder('diverged'), small_run(reinforce, '--iters', 0)
    for name, scale in ('bad', 1e4), ('worse', 30):
        saved = load_checkpoint(run / 'sft.pt')
        saved['model']['ln_f.weight'] *= scale
        save_checkpoint(at / f'{name}.pt', saved)
    with warnings.catch_warnings():
        warnings.simplefilter('error', RuntimeWarning)
        printed('--evaluate', f'good={run}', f'b|d\n={at}/bad.pt', f'worse={at}/worse.pt',
                f'last={run}', '--prompts', 6, '--test_steps', 0, '--out', at / 'x.json')
        text = printed('--table', at / 'x.json', '--out', at / 'y.json')
    for name in 'x.json', 'y.json':
        found = json.loads((at / name).read_text(), parse_constant=int)['results']
        assert found['b|d\n'][0]['perplexity'] is None and found['good'] == found['last']
    good, bad, worse, last = text.splitlines()[2:]
    assert bad.startswith(r'| b\|d | ') and bad.endswith('| – |') and last.count('|') == 23
    assert re.fullmatch(r'.* \d\.\d\de\+\d\d \|', worse), worse


def test_curves_have_a_name_and_a_look_each():
    """Also what matplotlib would leave out or set as a formula; one evaluation is a dot."""
    from matplotlib.figure import Figure
    names, drawn = ['_a', '$a$', 'a', *map(str, range(9))], []
    dev = {'f1': 1., 'sample_f1': 1.}
    runs = {name: [[{'iter': i, 'dev': dev} for i in range(1 + (name != 'a'))]] for name in names}
    with patched(Figure, 'savefig', lambda self, *a, **k: drawn.append(self)):
        sample.draw(runs, folder('looks') / 'x.png')
    said = [t.get_text().replace(r'\$', '$').strip() for t in drawn[0].legends[0].get_texts()]
    lines = next(ax for ax in drawn[0].axes if ax.get_title() == 'F1 sampled (%)').lines
    assert said == names and len({(z.get_color(), z.get_linestyle()) for z in lines}) == 12
    assert [z.get_marker() == 'o' for z in lines] == [name == 'a' for name in names]
    run = [{'iter': 3, 'd_loss': 0.}, {'iter': 4, 'd_loss': 0.}, {'iter': 5, 'kl': 1.}]
    with patched(Figure, 'savefig', lambda self, *a, **k: drawn.append(self)):
        sample.draw({'moves at 5': [run, run]}, folder('looks') / 'x.png')
    axes = drawn[1].axes
    assert len(drawn[1].legends[0].get_texts()) == 1
    assert [ax.get_xlabel() for ax in axes if ax.get_visible()] == 2 * ['iteration']
    assert len({ax.get_xlim() for ax in axes[:2]}) == 1
    sample.draw({'nothing yet': [[{'config': {}}]]}, folder('looks') / 'x.png')
    run = [{'sft_iter': i, 'dev': {'loss': 2. - i}} for i in (0, 1)] + [{'iter': 0, 'dev': {}}]
    with patched(Figure, 'savefig', lambda self, *a, **k: drawn.append(self)):
        sample.draw({'warm start': [run]}, folder('looks') / 'x.png')
    at, values = drawn[2].axes[0].lines[0].get_data()
    assert drawn[2].axes[0].get_title() == 'loss on dev (nats/token)'
    assert [*at] == [0, 1] and [*values] == [2, 1]
    assert [[*z.get_xdata()] for z in axes[0].lines] == 2 * [[3, 4], [5, 5]]     # a curve, the mark


def test_a_metric_of_ones_own_is_shown_everywhere():
    """That of README, beside EM and F1: in a run's log, on its screen, in its table and curves, in
    `--evaluate`, best of n, `--table`; and every answer that was judged is written."""
    from matplotlib.figure import Figure
    own, = re.findall(r'```python\n(def .*?)```', (HERE / 'README.md').read_text(), re.S)
    scope, plain, drawn, at = {}, data.score_answer, [], folder('own metric')
    exec(own, scope)
    for said, share in ('A dog runs.', .5), ('Catching dogs', 1), ('', 0):
        assert scope['coverage'](said, {'question': 'cat dog'}) == share

    def score_answer(*pair):
        return plain(*pair) | {'coverage': scope['coverage'](*pair)}

    with (patched(data, 'score_answer', score_answer), patched(data, 'TOYS', FEW),
          contextlib.redirect_stdout(io.StringIO()) as screen,
          patched(Figure, 'savefig', lambda self, *a, **k: drawn.append(self))):
        reinforce.train(parse(reinforce, *SMALL, '--out_dir', at / 'run'))
        text = printed('--evaluate', at / 'run', '--best_of', 2, '--discriminator', at / 'run',
                       '--prompts', 8, '--test_steps', 0, '--out', at / 'x.json')
    with patched(data, 'score_answer', lambda *pair: plain(*pair) | {'length': 1}):
        refused(['length', 'rename'], '--evaluate', at / 'run', '--prompts', 8, '--test_steps', 0,
                '--out', at / 'y.json')
    row, lines = printed('--table', at / 'x.json'), screen.getvalue()
    assert re.search(r'^iter 2 .*  f1 \S+  coverage [\d.]+/[\d.]+  on dev$', lines, re.M), lines
    assert ' '.join(lines.splitlines()[-3].split()).startswith(
        'EM F1 coverage EM sampled F1 sampled coverage sampled reward gap')
    titles = {ax.get_title() for ax in drawn[-1].axes}
    assert {'coverage (%)', 'coverage sampled (%)'} <= titles, titles
    for header in ('coverage', 'coverage sampled, NoAns', 'coverage chosen',
                   'coverage of any, HasAns'):
        assert f'{header} ' in text and f'| {header} |' in row, (header, row)
    found, = json.loads((at / 'x.json').read_text())['results'][str(at / 'run')]
    lines = [*map(json.loads, (at / 'x.jsonl').read_text().splitlines())]
    assert len(lines) == 8 and lines[0]['prompt'] == data.load_examples('toy', 'dev')[0]['question']
    for key, prefix in ('greedy', ''), ('sampled', 'sample_'):
        said, examples = zip(*((z[key], {'answers': z['gold'], 'question': z['prompt']})
                               for z in lines))
        with patched(data, 'score_answer', score_answer):
            means = data.score_answers(said, examples)
        assert all(abs(found[prefix + k] - v) < 1e-9 for k, v in means.items())
    chosen = [score_answer(z['chosen'], {'answers': z['gold'], 'question': z['prompt']})
              for z in lines]
    assert abs(100 * np.mean([z['f1'] for z in chosen]) - found['best_of']['chosen']['f1']) < 1e-9
    assert {*lines[0]} == {'name', 'source', 'temperature', 'prompt', 'context', 'gold', 'greedy',
                           'sampled', 'chosen'}


def test_a_run_says_what_its_score_can_teach():
    """At the end of the head start: on dev, with an interval, and in training; chance in curves."""
    from matplotlib.figure import Figure
    dev = {'d_acc': .59, 'd_acc_low': .54, 'd_acc_high': .64}
    for change, training, words, missing in (
            ({}, .6, '59% of dev\'s pairs (54% to 64%) and 60% of its last', ['knows', 'nothing']),
            ({}, .96, '96% of its last training batches: it knows its examples, not', ['nothing']),
            ({'d_acc_low': .5}, .6, 'may be chance, and the score has nothing to', ['knows']),
            ({'d_acc': .8, 'd_acc_high': .84}, .9, '90% of its last', ['knows', 'nothing']),
            ({'d_acc': None}, .5, 'the gold answers: a score has nothing to teach', [])):
        said = sample.lesson(dev | change, training)
        assert words in said and not any(word in said for word in missing), said
    out, drawn = folder('taught'), []
    flags = [*SMALL, '--iters', 16, '--d_warmup_iters', 13, '--d_warmup_acc', 1, '--eval_interval',
             20, '--sft_iters', 0, '--d_loss', 'minimax', '--eval_prompts', 40, '--lr', .1]
    with (patched(data, 'TOYS', FEW), contextlib.redirect_stdout(io.StringIO()) as screen,
          patched(Figure, 'savefig', lambda self, *a, **k: drawn.append(self))):
        reinforce.train(parse(reinforce, *flags, '--out_dir', out))
    rows = records(out)
    split = data.Split(data.load_examples('toy', 'dev', 40), data.load_tokenizer('toy'), 26, 6)
    at, = [i for i, r in enumerate(rows) if r.get('begins')]
    told = rows[at]['dev']
    assert rows[at]['iter'] == 13 and 'begins' not in rows[at + 1] and 'kl' in rows[at + 1]
    assert rows[at]['d_acc_mean'] == rows[at - 1]['d_acc_mean'] != rows[at + 1]['d_acc_mean']
    assert told['tie_rate'] == 0 and len({*sample.groups_of(split)}) == 40
    assert (told['d_acc_low'], told['d_acc_high']) == sample.interval(
        told['d_acc'], np.arange(40))
    text = ' '.join(screen.getvalue().split())
    assert re.search('The discriminator tells [^.]*[.].* iteration 13: the generator begins', text)
    last = np.mean([r['d_acc'] for r in rows[:at] if 'd_loss' in r][3:])
    assert f' and {last:.0%} of its last training batches' in text, (last, text)
    assert [r['iter'] for r in rows if 'dev' in r and 'iter' in r] == [0, 13, 16]
    assert text.count('The discriminator tells') == 2    # not at 0, where it has learned nothing
    chance = {'discriminator loss (nats)': 2 * math.log(2), 'F1 sampled (%)': None,
              'pairs told apart, on dev': .5, 'pairs told apart, in training': .5}
    axes = {ax.get_title(): ax for ax in drawn[-1].axes if ax.get_title() in chance}
    assert axes.keys() == chance.keys()
    for title, level in chance.items():
        assert [z.get_ydata()[0] for z in axes[title].lines if z.get_linestyle() == '--'] == (
            [level] * (level is not None))
    pair = [{'config': {'d_loss': 'pair'}}, {'iter': 0, 'd_loss': .5}]
    with patched(Figure, 'savefig', lambda self, *a, **k: drawn.append(self)):
        sample.draw({'pair': [pair]}, out / 'x.png')
    assert [z.get_ydata()[0] for z in drawn[-1].axes[0].lines[1:]] == [math.log(2)]


def test_a_generator_that_rests_answers_once():
    """Its answers are kept, and the discriminator, which moved, scores them anew."""
    seen, at = [], folder('rests')
    generate = keeping(GPT.generate, seen)
    with (patched(GPT, 'generate', generate), patched(data, 'TOYS', FEW),
          unittest.mock.patch.dict(os.environ, COLUMNS='64'),
          contextlib.redirect_stdout(io.StringIO()) as screen):
        flags = [*SMALL, '--eval_prompts', 6, '--d_lr', .01]
        reinforce.train(parse(reinforce, *flags, '--iters', 0, '--out_dir', at / 'none'))
        assert len(seen) == 3 * 2                    # steps 0, 2, 4 of the warm start, two each
        seen.clear()
        reinforce.train(parse(reinforce, *flags, '--sft_iters', 0, '--iters', 7, '--d_warmup_iters',
                              5, '--d_warmup_acc', 1, '--out_dir', at / 'run'))
    # 7 rollouts; the warm start and iterations 6 and 7, of 0, 2, 4, 5, 6, 7 and it once more
    assert len(seen) == 7 + 3 * 2
    rows = [r['dev'] for r in records(at / 'run') if 'dev' in r and 'iter' in r]
    same = [{k: v for k, v in row.items() if k in ('em', 'sample_f1', 'loss')} for row in rows]
    assert same[0] == same[1] == same[2] == same[3] != same[4]
    assert len({row['gap'] for row in rows}) == 6
    said = screen.getvalue().splitlines()
    assert 'kept: step 0 of 0, loss' in screen.getvalue()
    assert max(len(line) for line in said if '  gold: ' in line) == 64
    text = (at / 'run/samples.txt').read_text()
    assert text.count('greedy  ') == text.count('sampled  ') == 6
    split, _, enc = people(6)
    gpt, args = tiny_gpt(vocab_size=enc.n_vocab, block_size=40), judging(1)
    texts = [sample.examine(gpt, split, enc, 1., args)[1] for args.seed in (1, 2, 1)]
    assert texts[0]['sampled'] == texts[2]['sampled'] != texts[1]['sampled']
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        sample.show(split, [''] * 6)
        sample.show(split, ['x' * 200] * 6)
    said = screen.getvalue().splitlines()
    assert [line.rpartition('sampled: ')[2] for line in said[:3]] == [''] * 3
    assert all(len(line) == 100 and 'xxx' in line for line in said[3:])      # the longest is cut
    assert split.examples[0]['question'] in said[3] and split.examples[0]['answers'][0] in said[3]


def test_only_what_is_named_alike_is_merged():
    at = folder('names')

    def run(name, tail=''):
        (at / name).mkdir(parents=True, exist_ok=True)
        lines = [{'config': {}}, {'iter': 0, 'dev': {'f1': 1.}}, {'iter': 1, 'kl': 1.}]
        text = ''.join(json.dumps(r) + '\n' for r in lines)
        (at / name / 'metrics.jsonl').write_text(text + tail, encoding='utf-8-sig')
        return at / name

    def rows(*paths):
        return [r.removeprefix(f'| {at}/') for r in printed('--table', *paths).splitlines()[2:]]

    for names in ('beta0.02 beta0.05', 'lr1e-5 lr1e-6', 'a/run b/run', 'x x-1', 'lr=0.001 lr=0.01'):
        assert [r.split(' | ')[0] for r in rows(*map(run, names.split()))] == names.split()
    assert len(rows(at / 'a/run/metrics.jsonl', at / 'b/run/metrics.jsonl')) == 2
    fallen = run('b/run', '{"iter": 3, "collapsed": "Oslo Oslo"}\n')
    found = rows(f'A={at}/a/run', f'A={fallen}', f'B={at}/lr=0.01', '--out', at / 'x.json')
    (one, other), again = found, rows(at / 'x.json')
    assert found == again
    assert one.startswith('| A | ') and one.endswith('| 3 | `Oslo Oslo` |')
    assert other.startswith('| B | ')
    with patched(sample, 'draw') as draw:
        printed('--plot', run('half', '{"iter": 2, "k'), f'A={at}/a/run', f'A={fallen}', at / 'x')
    groups, _ = draw.call_args.args
    assert [*map(len, groups.values())] == [1, 2, 1] and len(groups[str(at / 'half')][0]) == 3


def test_each_is_judged_with_its_own_prompts_or_refused():
    at, run = folder('prompts'), small_run(reinforce, '--iters', 0)
    plain, other, saved = f'{run}/sft.pt', f'{at}/other.pt', load_checkpoint(run / 'sft.pt')
    few = '--prompts', '6', '--test_steps', '0', '--out', at / 'judged.json'
    for name, value in (('context', False), ('max_prompt', 25), ('max_response', 5),
                        ('data', 'toy-varied'), ('temperature', .5)):
        save_checkpoint(other, {**saved, 'settings': {**saved['settings'], name: value}})
        words = [name, str(value), str(saved['settings'][name]), plain, other]
        for one, two in (plain, other), (other, plain):
            for flags in (['--compare', one, two, '--prompts', '2'], ['--evaluate', one, two, *few],
                          ['--evaluate', one, '--base', two, *few]):
                said = refused(words, *flags)
                assert ('give --' in said) == (name in ('data', 'temperature')), said
    printed('--compare', plain, other, '--temperature', '.7', '--prompts', '2')
    for size, *said in ((dict(vocab_size=60000), 'has a vocabulary of 60000, --data toy'), (
            dict(vocab_size=data.load_tokenizer('toy').n_vocab, block_size=30), '26', 'size 30')):
        tiny_gpt(**size).save_pretrained(at / 'gpt')
        refused([f'{at}/gpt', *said], '--compare', plain, at / 'gpt')
    at_most = {**saved, 'settings': {**saved['settings'], 'max_response': 1}}
    save_checkpoint(other, at_most)                  # no answer ends within one token
    with contextlib.redirect_stderr(io.StringIO()) as err:
        printed('--evaluate', other, *few)
    assert '6 answers cut to 1 (most of them' in err.getvalue(), err.getvalue()
    refused(['size 30', '256 + max_response 32'], '--compare', at / 'gpt', '--data', 'toy')

    # of one name, all are kept; written as they come, with whatever is wrong with one said before
    named = f'W={plain}', f'P={plain}', f'P={run}/ckpt.pt'
    assert printed('--evaluate', *named, *few).endswith(
        f'written: {at}/judged.json, the answers: {at}/judged.jsonl\n')
    found = json.loads((at / 'judged.json').read_text())['results']
    assert [f['source'] for f in found['P']] == [plain, f'{run}/ckpt.pt']
    text = printed('--compare', *named, '--prompts', '2')
    assert text.count('P         ') == 4 and text.count('W         ') == 2, text
    figures, = found['W']
    fails = unittest.mock.Mock(side_effect=[(figures, {}), (figures, {}), OSError('the third')])
    with patched(sample, 'judge', fails):
        assert refused([], '--evaluate', *named, *few) == 'the third'
        assert json.loads((at / 'judged.json').read_text())['results'].keys() == {'W', 'P'}
        for wrong, words in (([*named, 'gone.pt', *few], ['gone.pt']),
                             ([*named, *few[:-1], at], [str(at)]),
                             ([*named, *few, '--base', at], [str(at), 'model.safetensors'])):
            refused(words, '--evaluate', *wrong)
    assert fails.call_count == 3


def test_a_run_evaluates_the_policy_it_trains():
    """At its temperature, over the whole vocabulary: near 0 that is the greedy answer. In batches
    of any size, the last filled up: with the eos likeliest, nothing is drawn."""
    (split, _, enc), rolls, seen, found = people(20), [], [], []
    generate = keeping(GPT.generate, rolls)
    gpt = tiny_gpt(3, vocab_size=enc.n_vocab, block_size=40)
    network = tiny_discriminator(vocab_size=enc.n_vocab, block_size=40)
    cfg, args = parse(reinforce, *TOY, '--temperature', .01), judging(1)

    def watched(self, *args, temperature, top_k=None, **kwargs):
        seen.append((temperature, top_k))
        return generate(self, *args, temperature=temperature, top_k=top_k, **kwargs)

    with patched(GPT, 'generate', watched):
        figures, sampled = sample.evaluate_run(gpt, network, split, enc, cfg)
    assert set(seen) == {(0, None), (.01, None)} and figures['sample_f1'] == figures['f1']
    answers = data.to_text(*sample.answer(gpt, split, 0, args), enc)
    assert sampled == {'greedy': answers, 'sampled': answers}
    for cfg.d_prefixes, R in (False, 6), (True, 6), (True, 2):   # one meaning there and in training
        split = data.Split(split.examples, enc, 30, R)           # some gold answers do not end in 2
        with patched(GPT, 'generate', watched):
            figures, _ = sample.evaluate_run(gpt, network, split, enc, cfg)
        roll, batch = rolls[-1], split.batch(range(20))
        assert batch.ended.all() == (R == 6) and batch.ended.any() and not roll.ended.any()
        scores, told = reinforce.discriminator_step(network, Keep(network), batch, roll, cfg)
        told['reward'] = reinforce.reward(scores, batch, roll, cfg).sum().item() / 20
        same = 'reward', 'score', 'gap', 'd_acc', 'tie_rate'
        assert all(abs(figures[k] - told[k]) < 1e-5 for k in same)
        assert (figures['d_acc_low'], figures['d_acc_high']) == sample.interval(
            figures['d_acc'], np.arange(10))         # passages, of two prompts each

    split, *_ = people(20)
    gpt.ln_f.bias.data[0], gpt.wte.weight.data[enc.eot_token, 0], cfg.temperature = 60., 9., 1.
    for n in 6, 11, 20:
        cfg.micro_batch, cfg.samples, args.batch_size = n, 1, n
        split.kept.clear()
        assert {len(rows) for rows in sample.batches(split, n)} == {n}
        figures, texts = sample.evaluate_run(gpt, network, split, enc, cfg)
        assert len(texts['sampled']) == len(sample.answer(gpt, split, .8, args)[0]) == 20
        found.append([*figures.values(), sample.drift(gpt, gpt, split, .8, args)])
    assert np.allclose(found, found[:1] * 3, atol=1e-5)


# -----------------------------------------------------------------------------
# runs, resumes, faults

def test_figures_are_from_before_the_discriminators_step():
    """Without its dropout: the next record of one checkpoint is the same with any. `reward` is the
    mean of what the policy is given, and by TINY no gold answer reaches the generator."""
    for script in SCRIPTS:
        out, last, given = folder('figures'), [], []
        flags = [*SMALL_OF[script], '--sft_iters', 20, '--sft_lr', .02, '--d_lr', .02]
        flags += [z for k in ('anchor', 'pretrain') if k in script.TINY for z in
                  (f'--{k}', script.TINY[k])]
        flags += ['--iters', 30, '--d_warmup_iters', 28, '--d_warmup_acc', 1, '--eval_interval', 29,
                  '--micro_batch', 3]
        cut_short(script, out, *flags, at=('score', 29))

        for dropout in .5, 0:
            again = folder('figures again')
            shutil.copytree(out, again, dirs_exist_ok=True)
            with patched(script, 'reward', keeping(vars(script).get('reward'), given), create=True):
                train(script, again, '--resume', '--d_dropout', dropout)
            last.append(next(r for r in records(again) if r.get('iter') == 29 and 'score' in r))
        same = ['score', 'gap', 'd_acc', 'tie_rate', 'd_loss'] + ['reward'] * (script is not gumbel)
        assert all(last[0][name] == last[1][name] for name in same), last
        assert last[0]['d_norm'] != last[1]['d_norm'] and .6 < last[0]['d_acc'] < .9, last[0]
        assert not {'mle', 'pretrain'} & last[0].keys() and 'lr' in last[0]
        for rewards in given:
            assert abs(rewards.sum() / rewards[..., 0].numel() - last[0]['reward']) < 1e-6


def test_tau_falls_from_where_the_generator_begins():
    seen, relax = [], gumbel.relax
    with patched(gumbel, 'relax', lambda *a: seen.append(a[2]) or relax(*a)):
        train(gumbel, folder('tau'), *SMALL, '--iters', 8, '--d_warmup_iters', 4, '--d_warmup_acc',
              1, '--eval_interval', 9)
    first, last = gumbel.TAU
    assert [*dict.fromkeys(seen)] == [first + (last - first) * k / 4 for k in range(4)]
    assert seen.count(first) == 4 + 2                # one each of the discriminator, one of both


def test_a_resumed_run_equals_an_uninterrupted_one():
    """Though what it began from are other networks by then, or gone: it has its own. From where its
    generator began to move another run goes on alike."""
    start, own = (folder('start') / name for name in ('i.pt', 'd.pt'))
    n_vocab = data.load_tokenizer('toy').n_vocab

    def begin_from(n_embd):
        for file, n in (start, n_embd), (own, n_embd + 8):       # of another width, and block size
            gpt = tiny_gpt(vocab_size=n_vocab, block_size=n + 16, n_embd=n)
            save_checkpoint(file, {'model': gpt.state_dict(), 'gpt_config': asdict(gpt.config)})

    for script, *more in ((reinforce, '--baseline', 'mean', '--sft_dropout', '.1'),
                          (ppo, '--epochs', '2'), (gumbel, '--beta', '.1')):
        more = [*SMALL_OF[script], *more, '--init_from', start, '--d_init_from', own]
        begin_from(16)
        whole, parts, name = folder('whole'), folder('parts'), f'{script.__name__}_step'
        steps, seeds, generate = [], [], GPT.generate

        def seeded(*a, rng, seeds=seeds, generate=generate, **kw):
            seeds.append(rng.initial_seed())
            return generate(*a, rng=rng, **kw)

        with patched(script, name, keeping(getattr(script, name), steps)), \
                patched(GPT, 'generate', seeded):
            train(script, whole, *more)
        assert len({*seeds} - {0}) == 4              # each rollout's own; 0 is an evaluation's
        for at in ('sft_iter', 3), ('score', 2), ('score', 3):
            shutil.rmtree(parts)
            begin_from(16)
            cut_short(script, parts, *more, at=at)
            if at == ('score', 3):                   # as if killed before its first checkpoint
                begin_from(24)
                (parts / 'ckpt.pt').unlink()
            else:
                start.unlink()
                own.unlink()
            with open(parts / 'metrics.jsonl', 'a') as f:
                f.write('{"iter": 2, "rew')          # as a crash leaves it
            train(script, parts, '--resume')
            ended_alike(whole, parts)
        saved, sft, begun = (load_checkpoint(parts / f'{n}.pt') for n in ('ckpt', 'sft', 'start'))
        assert saved['d_gpt_config']['n_embd'] == 24 != saved['gpt_config']['n_embd']
        assert all(torch.equal(v, begun['model'][k]) for k, v in sft['model'].items())
        assert begun['iter'] == begun['running']['start'] == 1
        branch = folder('branch')
        shutil.copy(parts / 'start.pt', branch / 'ckpt.pt')
        shutil.copy(parts / 'sft.pt', branch)
        train(script, branch, '--resume')
        with patched(script.Config, 'out_dir', str(branch)):     # not that of the checkpoint
            assert parse(script, '--resume').out_dir == str(branch)
        assert records(branch) == records(whole)[-len(records(branch)):]
        if script is ppo:
            assert saved['running']['updates'] > 4 and saved['critic_optimizer']['state']
        if script is reinforce:                      # the baseline is a running mean
            mean, *later = [s['return_mean'] for s in steps]
            for one in later:
                mean = .9 * mean + .1 * one
            assert abs(saved['running']['baseline'] - mean) < 1e-9 and mean != later[0]


def test_a_run_goes_on_where_its_data_are_now():
    """If they are the same rows; its warm start, too. If not, a sentence, wherever they are."""
    at, enc = folder('moved data'), data.load_tokenizer('toy')
    rows = [{'prompt': f'Who {i} ?', 'response': str(i)} for i in range(40)]
    (at / 'old.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    (at / 'other.jsonl').write_text('\n'.join(map(json.dumps, rows[:39])))
    with patched(data, 'load_tokenizer', lambda _: enc):
        for stage in ('score', 1), ('mle', 1):
            out = folder('moved data/run')
            cut_short(reinforce, out, *SMALL, '--data', at / 'old.jsonl', at=stage)
            (at / 'old.jsonl').rename(at / 'new.jsonl')
            raises(FileNotFoundError, ['old.jsonl'], train, reinforce, out, '--resume')
            raises(ValueError, ['other.jsonl', 'other rows'], train, reinforce, out,
                   '--resume', '--data', at / 'other.jsonl')
            assert train(reinforce, out, '--resume', '--data', at / 'new.jsonl')
            (at / 'new.jsonl').rename(at / 'old.jsonl')


def test_the_first_run_has_a_discriminator_of_its_own():
    """That of --tiny, of each script; where the generator begins to move both are kept, and the one
    chooses among the other's samples."""
    for script in SCRIPTS:
        out = folder('first run')
        found = train(script, out, '--tiny', '--sft_iters', 2, '--iters', 3, '--d_warmup_iters', 2,
                      '--eval_interval', 2, '--eval_prompts', 20)
        assert found['warm start']['sample_em'] == found['tuned']['sample_em'] == 0
        start = load_checkpoint(out / 'start.pt')
        assert (start['iter'], start['gpt_config']['n_embd'], start['d_gpt_config']['n_embd']) == (
            2, 16, 64)
        best, seen = sample.best_of, []
        with patched(sample, 'best_of', lambda g, d, *a, best=best, seen=seen: (
                seen.append(d) or best(g, d, *a))):
            printed('--evaluate', out / 'start.pt', '--best_of', 2, '--discriminator', out /
                    'start.pt', '--prompts', 6, '--test_steps', 0, '--out', out / 'x.json')
        chosen_by = seen[0].state_dict()
        assert all(torch.equal(v, chosen_by[k]) for k, v in start['discriminator'].items())
        for flags in (['--resume', '--d_init_from', 'gpt2'], ['--resume', '--d_n_head', 8]):
            raises(ValueError, [f'{flags[1]} {flags[2]}'], train, script, out, *flags)
    assert train(gumbel, out, '--tiny', '--overwrite', '--iters', 0, '--sft_iters', 1,
                 '--eval_prompts', 20) and not (out / 'start.pt').exists()


def test_gpt2_has_a_discriminator_of_another_width():
    """On data of one's own, by GPT-2's tokens; what both began from is gone at a resume."""
    if not (SHARED / 'tiktoken_cache').is_dir():
        raise unittest.SkipTest('the BPE of GPT-2 is not beside this repository')
    at = folder('gpt2 and another')
    (at / 'my.jsonl').write_text(''.join(
        f'{{"prompt": "Who sold boat {i} ?", "response": "Ada {i}"}}\n' for i in range(40)))
    for script in SCRIPTS:
        for name, n_embd in ('g', 8), ('d', 16):
            tiny_gpt(vocab_size=50257, block_size=64, n_embd=n_embd).save_pretrained(at / name)
        flags = ['--device', 'cpu', '--data', at / 'my.jsonl', '--init_from', at / 'g',
                 '--d_init_from', at / 'd', '--sft_iters', 1, '--iters', 3, '--d_warmup_iters', 1,
                 '--batch_size', 4, '--sft_batch_size', 4, '--samples', 2, '--eval_interval', 1,
                 '--max_prompt', 24, '--max_response', 6]
        flags += ['--minibatch', 4] * (script is ppo)
        out = at / script.__name__
        cut_short(script, out, *flags, at=('score', 2))
        shutil.rmtree(at / 'g')
        shutil.rmtree(at / 'd')
        train(script, out, '--resume')
        assert load_checkpoint(out / 'ckpt.pt')['d_gpt_config']['n_embd'] == 16
        printed('--evaluate', out, '--best_of', 2, '--discriminator', out, '--prompts', 4,
                '--test_steps', 0, '--out', at / 'x.json')


def test_the_warm_start_ends_with_its_best():
    """The network of the least loss on dev, the first of such: the adversarial stage begins from it
    and sft.pt has it, after a resume, too. Dropout is of its steps alone."""
    whole, parts, states = folder('best'), folder('best parts'), {}
    better, evaluate = sample.better, sample.evaluate_run
    losses = {0: 3., 2: 1., 4: 2., 6: 1., 7: 4.}

    def watched(best, step, generator, *more):
        states[step] = copy.deepcopy(generator.state_dict())

        def judged(*a):
            figures, texts = evaluate(*a)
            return figures | {'loss': losses[step]}, texts

        with patched(sample, 'evaluate_run', judged):
            return better(best, step, generator, *more)

    flags = [*SMALL, '--sft_iters', 7, '--iters', 0]
    with patched(sample, 'better', watched):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            train(reinforce, whole, *flags)
        assert re.findall('kept: .*', said.getvalue()) == ['kept: step 2 of 7, loss 1']
        cut_short(reinforce, parts, *flags, at=('mle', 5))
        assert load_checkpoint(parts / 'sft.pt')['best']['loss'] == 1
        raises(ValueError, ['--eval_prompts 9', 'other rows'], train, reinforce, parts,
               '--resume', '--eval_prompts', 9)      # losses of other prompts do not compare
        raises(ValueError, ['--sft_iters 5', f'--init_from {parts}/sft.pt --sft_iters 0'], train,
               reinforce, parts, '--resume', '--sft_iters', 5)
        train(reinforce, parts, '--resume')
    ended_alike(whole, parts)
    assert train(reinforce, parts, '--resume', '--eval_prompts', 9, '--lr', .25)
    changed, = [r for r in records(parts) if 'resumed' in r]
    assert changed['iter'] == 0 and changed['resumed'] == {'eval_prompts': 9, 'lr': .25}
    first = json.loads((whole / 'metrics.jsonl').read_text().splitlines()[0])
    for dev_rows, n in (first['dev_rows'], 12), (changed['dev_rows'], 9):
        dev = data.Split(data.load_examples('toy', 'dev', n), data.load_tokenizer('toy'), 26, 6)
        assert dev_rows == [dev.digest()]
    found = {r['sft_iter']: r['dev'] for r in records(whole) if 'sft_iter' in r and 'dev' in r}
    assert {step: dev['loss'] for step, dev in found.items()} == losses and 'f1' in found[7]
    for file in 'sft.pt', 'ckpt.pt':
        kept = load_checkpoint(whole / file)['model']
        assert all(torch.equal(v, states[2][k]) for k, v in kept.items())
        assert any((v != states[6][k]).any() for k, v in kept.items())
    found = []
    for dropout in 0, .5:
        cfg = parse(reinforce, *SMALL, '--sft_dropout', dropout)
        cfg.resume, split = False, data.Split(data.load_examples('toy', 'dev', 20),
                                              data.load_tokenizer('toy'), 26, 6)
        torch.manual_seed(0)
        gpt, _, _ = model.load_networks(cfg, data.load_tokenizer('toy').n_vocab)
        loss = sample.gold_loss(gpt, split, SimpleNamespace(**vars(cfg) | {'dtype': 'float32'}))
        found.append((reinforce.mle_step(gpt, Keep(gpt), split, 0, cfg)['mle'].item(), loss))
        assert not gpt.training
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1]


def test_wandb_gets_the_records():
    """Offline, where it is installed; where it is not, a sentence."""
    out, logged = folder('wandb'), []
    with unittest.mock.patch.dict(sys.modules, wandb=None):
        raises(ValueError, ['--wandb', 'pip install wandb'], train, reinforce, out, '--tiny',
               '--wandb')
    try:
        import wandb
    except ImportError as e:
        raise unittest.SkipTest('wandb is not installed') from e
    log = wandb.Run.log
    with (unittest.mock.patch.dict(os.environ, WANDB_MODE='offline', WANDB_SILENT='true'),
          patched(wandb.Run, 'log', lambda self, r: logged.append(r) or log(self, r))):
        train(reinforce, out, *SMALL, '--wandb')
        wandb.finish()
    assert [{k: v for k, v in r.items() if k != 'seconds'} for r in logged] == records(out)
    assert list(out.glob('wandb/offline-run-*/*.wandb'))


def test_what_is_for_readers_ends_no_run():
    """wandb that fails, pictures and texts that cannot be written: a line each, and a whole run."""
    class Killed:
        def log(self, record):
            calls.append(record)
            if len(calls) == 3:
                raise BrokenPipeError('the service\nis gone')

    out, calls = folder('for readers'), []
    (out / 'curves.png').mkdir()
    (out / 'samples.txt').mkdir()
    wandb = SimpleNamespace(init=lambda **_: Killed())
    with (unittest.mock.patch.dict(sys.modules, wandb=wandb), patched(data, 'TOYS', FEW),
          contextlib.redirect_stderr(io.StringIO()) as err):
        flags = [*SMALL, '--iters', '2', '--wandb', '--out_dir', out]
        assert reinforce.train(parse(reinforce, *flags))
    said = [line for line in err.getvalue().splitlines() if 'the run goes on' in line]
    assert len(calls) == 3 and records(out)[-1].keys() == {'final'}
    assert [line.split(' failed')[0] for line in said] == [
        f'{out}/samples.txt', '--wandb', *[f'{out}/samples.txt'] * 2,
        *[f'{out}/samples.txt', f'{out}/curves.png'] * 3], said
    assert said[1].endswith('BrokenPipeError: the service is gone')
    import matplotlib
    with matplotlib.rc_context({'text.usetex': True}), patched(shutil, 'which', lambda *_: None):
        raises(ValueError, ['could not be drawn'], sample.plot, SimpleNamespace(
            plot=[str(out)], out=out / 'x.what'))
        if not shutil.which('latex'):
            raises(ValueError, ['could not be drawn'], sample.plot, SimpleNamespace(
                plot=[str(out)], out=out / 'x.png'))
    assert printed('--plot', out, '--out', out / 'x.png') == f'written: {out}/x.png\n'


def test_the_learning_rate_is_reached():
    """By the generator's own steps, however late they begin; so is the warm start's."""
    for steps in 1, 2, 7, 150, 8000:
        shares = [model.schedule(step, steps) for step in range(steps)]
        assert max(shares) == 1 and min(shares) > 0 and (steps < 100 or shares[-1] < .11)
    for script in SCRIPTS:
        train(script, folder('rate'), *SMALL_OF[script], '--iters', '18', '--d_warmup_iters', '12',
              '--d_warmup_acc', '1', '--eval_interval', '20')
        rows = [r for r in records(SCRATCH / 'rate') if 'lr' in r]
        cfg = parse(script, *SMALL_OF[script])
        for peak, kind, n in (cfg.lr, 'iter', 6), (cfg.sft_lr, 'sft_iter', 4):
            rates = [r['lr'] for r in rows if kind in r]
            assert len(rates) == n and max(rates) >= .95 * peak, rates
    # where gradients are small, too: clipped to 1, those of 124M parameters have an RMS of 9e-5
    network = torch.nn.Linear(1, 1, bias=False)
    optimizer, before = model.adamw(network), network.weight.item()
    network.weight.grad = torch.full((1, 1), 1e-7)
    model.update(network, optimizer, .1)
    assert abs(before - network.weight.item() - .1) < .02
    for bad in math.nan, math.inf:                   # no step is taken by it
        before = copy.deepcopy((network.state_dict(), optimizer.state_dict()['state']))
        network.weight.grad = torch.full((1, 1), bad)
        assert not math.isfinite(model.update(network, optimizer, .1))
        after = network.state_dict(), optimizer.state_dict()['state']
        assert all(map(torch.equal, tree_leaves(before), tree_leaves(after)))
    network.weight.grad = torch.ones(1, 1)           # but the next one is
    model.update(network, optimizer, .1)
    assert network.weight.item() != before[0]['weight'].item()
    for bad in math.nan, 1.:                         # nor is a fork's own step in the way of it
        before, network.weight.grad = network.weight.item(), torch.full((1, 1), bad)
        model.update(network, optimizer, .1)
    before, network.weight.grad = network.weight.item(), torch.ones(1, 1)
    optimizer.step()
    assert network.weight.item() != before and not hasattr(optimizer, 'found_inf')


def test_a_killed_run_ends_as_if_it_never_was():
    """By SIGKILL with half a checkpoint on disk; it must end as one that was left alone."""
    whole, parts, saves = folder('never killed'), folder('killed'), itertools.count()

    def dies(state, f, save=torch.save):
        save(state, f)
        if next(saves) == 4:                         # after three of the warm start's, and one
            f.truncate(f.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    flags = [*SMALL, *OWN_D]
    train(reinforce, whole, *flags)
    with patched(torch, 'save', dies):
        process = multiprocessing.get_context('fork').Process(
            target=train, args=(reinforce, parts, *flags))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL and (parts / 'ckpt.pt').exists()
    train(reinforce, parts, '--resume')
    ended_alike(whole, parts)


def test_freed_memory_is_kept_until_it_is_given_back():
    """In a process of its own, 32 tensors of 8 MiB that are freed under one that stays."""
    if not sys.platform.startswith('linux') or not hasattr(ctypes.CDLL(None), 'malloc_trim'):
        raise unittest.SkipTest('only glibc keeps freed memory on request')
    code = """if True:
        import torch
        from model import keep_freed_memory
        pages = lambda: int(open('/proc/self/statm').read().split()[1])
        keep_freed_memory()
        before, tensors = pages(), [torch.ones(2 ** 21) for _ in range(33)]
        last = tensors.pop()
        del tensors
        kept = pages()
        keep_freed_memory(False)
        print(kept - before, pages() - before)"""
    out = subprocess.run([sys.executable, '-c', code], cwd=HERE, capture_output=True, text=True,
                         check=True).stdout
    kept, trimmed = (int(n) * resource.getpagesize() / 2 ** 20 for n in out.split())
    assert kept > 240 and trimmed < 20, (kept, trimmed)


def test_a_number_that_is_not_finite_ends_the_run():
    """Which and when is named, the last healthy checkpoint stays and can be gone on from."""
    for script, station, at, named in (
            (reinforce, 'mle_step', 2, 'mle is nan at sft_iter 2'),
            (reinforce, 'policy_loss', 3, 'g_loss is nan at iter'),
            (reinforce, 'discriminator_loss', 2, 'd_norm is nan at iter 1'),
            (reinforce, 'reward', 2, ' is nan at iter'),
            (ppo, 'value_loss', 3, 'is nan at iter'), (ppo, 'mle_gradient', 9, 'is nan at iter'),
            (gumbel, 'generator_loss', 2, 'is nan at iter'),
            (gumbel, 'response_logits', 9, 'is nan at iter')):
        out, calls, kept = folder('poisoned'), itertools.count(), getattr(script, station)

        def poisoned(*a, calls=calls, kept=kept, at=at):
            value = kept(*a)
            return tree_map(lambda z: z * math.nan, value) if next(calls) == at else value

        flags = [*SMALL_OF[script], '--iters', '12', '--eval_interval', '1']
        with patched(script, station, poisoned):
            raises(FloatingPointError, [named, '--resume'], train, script, out, *flags)
        for file in out.glob('*.pt'):
            state = load_checkpoint(file)['model']
            assert all(v.isfinite().all() for v in state.values()), (station, file)
        assert 'NaN' not in (out / 'metrics.jsonl').read_text()
        assert train(script, out, '--resume')['tuned']['f1'] >= 0
    evaluate = sample.evaluate_run
    with patched(sample, 'evaluate_run', lambda *a: ({'loss': math.inf}, evaluate(*a)[1])):
        raises(FloatingPointError, ['loss is inf at sft_iter 0'], train, gumbel, folder('dev'),
               *SMALL)
    assert 'Infinity' not in (SCRATCH / 'dev' / 'metrics.jsonl').read_text()
    for script, flag, rate, iters, file, words in (
            (reinforce, '--sft_lr', 1e6, 1, 'sft.pt', 'loss is nan at sft_iter 1'),
            (gumbel, '--lr', 9e18, 1, 'ckpt.pt', 'ckpt.pt is not written'),
            (ppo, '--d_lr', 1e8, 2, 'ckpt.pt', 'ckpt.pt is not written')):
        out = folder('diverged run')                 # with finite figures to the end
        raises(FloatingPointError, [words, '--resume'], train, script, out,
               *SMALL_OF[script], '--sft_iters', 1, '--iters', iters, '--d_warmup_iters', 0,
               '--eval_interval', 9, flag, rate)
        saved = load_checkpoint(out / file)
        assert saved.get('iter', saved.get('sft_iter')) == 0
        train(script, out, '--resume', flag, .001)


def test_damaged_checkpoints_are_one_sentence():
    """With bytes flipped, cut out, put in or cut off: a network, or one sentence; mostly that."""
    at, gpt, rng = folder('damaged'), tiny_gpt(vocab_size=11, n_layer=1), random.Random(0)
    gpt.save_pretrained(at)
    save_checkpoint(at / 'ckpt.pt', {'model': gpt.state_dict(), 'gpt_config': asdict(gpt.config)})
    for path in at / 'ckpt.pt', at / 'model.safetensors':
        raw, refused = path.read_bytes(), 0
        for _ in range(150):
            spoilt = bytearray(raw)
            for _ in range(rng.randint(1, 3)):
                i = rng.randint(0, len(spoilt))
                flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in spoilt[i:i + 1])
                n, new = rng.choice([(1, flipped), (rng.randint(1, 40), b''),
                                     (0, rng.randbytes(rng.randint(1, 8))), (len(raw), b'')])
                spoilt[i:i + n] = new
            path.write_bytes(spoilt)
            try:
                GPT.from_pretrained(path)
            except (ValueError, FileNotFoundError) as e:
                assert str(path) in str(e) and '\n' not in str(e), repr(e)
                refused += 1
        path.write_bytes(raw)
        assert refused > 75 and GPT.from_pretrained(path), refused


def steps_of_all_scripts(**where):
    """Gradients and figures of every kind of update on this rank's share of 4 prompts, by script
    and kind; `where` as in `case`."""
    found = {}
    for script in reinforce, ppo, gumbel:
        name = script.__name__
        flags = {'ppo': ['--minibatch', '4', '--pretrain', '.7'],
                 'gumbel': ['--encoding', 'hard']}.get(name, [])
        cfg, gpt, reference, discriminator, batch, roll = case(
            script, '--beta', '.3', '--anchor', '.4', '--micro_batch', '3', *flags, **where)
        size = {k: v for k, v in where.items() if k.startswith('n_')}
        cfg.sft_batch_size, critic = 4, tiny_discriminator(4, ppo.Critic, **size).to(cfg.device)
        rewards = torch.randn(4, 2, 4).to(cfg.device) * roll.mask
        passages = np.arange(36).reshape(4, 9) % 13
        split = unittest.mock.MagicMock(batch=lambda i, device, batch=batch: data.take(batch, i))
        split.__len__.return_value = 4
        mine = model.shard(torch.arange(4))
        batch, roll, rewards = (data.take(z, mine) for z in (batch, roll, rewards))
        keeps = {k: Keep(z) for k, z in (('g', gpt), ('d', discriminator), ('c', critic))}
        figures = script.mle_step(gpt, keeps['g'], split, 0, cfg)
        found[name, 'mle'] = keeps['g'].kept
        early, late = ([gpt], [.7, None]) if script is gumbel else ([], [])
        with patched(gumbel, 'conditional_noise', fixed_noise), unclipped:
            told = script.discriminator_step(discriminator, *early, keeps['d'], batch, roll, *late,
                                             cfg)
            figures |= told if script is gumbel else told[1]
            found[name, 'd'] = keeps['d'].kept
            if script is reinforce:
                figures |= reinforce.reinforce_step(gpt, reference, keeps['g'], batch, roll,
                                                    rewards, 0., 0., cfg)
            elif script is ppo:
                past, seen = ppo.look_back(gpt, reference, critic, batch, roll, rewards, cfg)
                figures |= seen | ppo.ppo_step(gpt, critic, (keeps['g'], keeps['c']), batch, past,
                                               passages, {'updates': 0}, 0., cfg)
                found[name, 'c'] = keeps['c'].kept
            else:
                figures |= gumbel.gumbel_step(gpt, reference, discriminator, keeps['g'], batch,
                                              roll, 0., .7, None, cfg)
        found[name, 'g'] = keeps['g'].kept
        found[name, 'figures'] = figures | data.health(*model.gathered(*roll, *batch[2:4]))
    return found


def steps_agree(wanted, got, bound):
    """Gradients within `bound` of their norm, at worst what is returned; figures of them or 1."""
    assert wanted.keys() == got.keys() and len(wanted) == 3 * 4 + 1
    off = {key: ((got[key] - value).norm() / value.norm()).item()
           for key, value in wanted.items() if key[1] != 'figures'}
    assert all(share < bound for share in off.values()), off
    for name in 'reinforce', 'ppo', 'gumbel':
        a, b = (found[name, 'figures'] for found in (wanted, got))
        assert a.keys() == b.keys()
        assert all(abs(v - b[k]) < bound * max(1, abs(v)) for k, v in a.items()), (a, b)
    return max(off.values())


def as_rank(rank, path):
    """Of one of two: every update, then a run, one that is resumed, and one begun on one rank."""
    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, 'w')
    dist.init_process_group('gloo', init_method=f'file://{path}/meet', rank=rank, world_size=2)
    torch.save(steps_of_all_scripts(), path / f'{rank}.pt')
    for script in SCRIPTS:
        whole, parts, of_one = (path / name / script.__name__ for name in ('whole', 'parts', 'one'))
        given = []
        with patched(script, 'reward', keeping(vars(script).get('reward'), given), create=True):
            train(script, whole, *SMALL_OF[script], *OWN_D)
        torch.save([r.sum((1, 2)) for r in given], whole / f'rewards {rank}.pt')
        cut_short(script, parts, *SMALL_OF[script], *OWN_D)
        for out in parts, of_one:
            train(script, out, '--resume')
        own = (whole, of_one)[rank]                  # what each begins with has to be the same
        new, sets = (path / 'other', *SMALL_OF[script]), ('toy', 'toy-varied')
        for out, *flags in ((own, '--resume', '--iters', 9), (*new, '--seed', rank),
                            (*new, '--data', sets[rank])):
            raises(ValueError, ['ranks begin', '--init_from'], train, script, out, *flags)
    dist.destroy_process_group()


def test_two_ranks_have_the_gradient_of_one_and_resume():
    path, wanted = folder('ranks'), steps_of_all_scripts()
    for script in SCRIPTS:
        cut_short(script, path / 'one' / script.__name__, *SMALL_OF[script], *OWN_D)
    torch.multiprocessing.spawn(as_rank, (path,), 2)
    for rank in 0, 1:
        steps_agree(wanted, torch.load(path / f'{rank}.pt', weights_only=False), 1e-5)
    for script in SCRIPTS:
        ended_alike(*(path / name / script.__name__ for name in ('whole', 'parts')))
        assert records(path / 'one' / script.__name__)[-1].keys() == {'final'}
        whole = path / 'whole' / script.__name__
        given = zip(*(torch.load(whole / f'rewards {rank}.pt') for rank in (0, 1)))
        found = [r['reward'] for r in records(whole) if 'reward' in r]       # of both ranks
        assert np.allclose(found, [torch.cat(r).mean() / 2 for r in given], atol=1e-6)


def test_variants_and_extremes_run():
    """One of everything, nothing learned, every answer a tie or without eos, none answerable."""
    poster = ('--no-context --sft_iters 0 --d_loss minimax --no-d_prefixes --samples 1 --reward '
              'score --baseline mean --beta 0 --anchor 0 --d_warmup_iters 0 '
              '--d_dropout 0')
    rows = [(dict, *row) for row in (
        (reinforce, poster), (reinforce, '--reward random'), (reinforce, '--dtype bfloat16'),
        (ppo, '--minibatch 3 --samples 1 --micro_batch 2'), (ppo, '--pretrain 0 --anchor 0'),
        (ppo, '--dtype bfloat16 --reward score'), (gumbel, '--encoding mixed --d_loss minimax'),
        (gumbel, '--encoding hard --anchor 0'), (gumbel, '--dtype bfloat16 --samples 1'))]
    one, still = '--batch_size 1 --sft_batch_size 1 --samples 1', '--lr 0 --d_lr 0 --sft_lr 0'
    none, long = (lambda e: {'answers': []}), (lambda e: {'answers': [e['context']]})
    own = (reinforce, '--baseline mean'), (ppo, '--minibatch 1'), (gumbel, '')
    rows += [(change, script, f'{flags} {more}')
             for change, flags, scripts in (
                 (dict, f'{one} {still}', own), (none, '--sft_iters 80 --sft_lr .02', own[:1]),
                 (dict, f'{one} --max_prompt 1 --max_response 1', own[1:2]),
                 (long, f'{still} --max_response 2', own[::2])) for script, more in scripts]
    make = data.toy_examples
    for change, script, flags in rows:
        with patched(data, 'toy_examples', lambda split, n, varied=False, change=change: [
                {**e, **change(e)} for e in make(split, 60)]):
            result = train(script, folder('variant'), *SMALL_OF[script], *flags.split())['tuned']
        assert math.isfinite(result['f1']), flags
        if change is none:                           # all ties in the end
            assert result['em'] == 100 and result['d_acc'] is None, result


def graphs(group='stats', name='unique_graphs'):
    return torch._dynamo.utils.counters[group][name]


def compiled_equals_eager(script, *more, bound=1e-3):
    if not shutil.which('g++') and not torch.cuda.is_available():
        raise unittest.SkipTest('torch.compile needs g++ on CPU')
    torch._dynamo.reset()                            # what another script compiled is not its own
    figures, seen, step = [], [], script.discriminator_step
    for flag in '--no-compile', '--compile':
        out = folder(f'compiled {script.__name__}')
        # evaluation and rollout in batches of one size: a graph for each costs seconds
        with patched(script, 'discriminator_step', lambda *a: seen.append(graphs()) or step(*a)):
            train(script, out, *SMALL, '--d_dropout', '0', flag, '--sft_iters', '1', '--iters', '5',
                  '--eval_prompts', '8', '--eval_interval', '5', '--d_warmup_iters', '0',
                  '--n_layer', '2', *more)
        figures.append([r for r in records(out) if 'g_loss' in r])
    assert len(figures[0]) >= 4
    start, first, second, *later = seen[5:]          # of the compiled run, before each iteration
    assert second > start and all(n == second for n in later), seen
    # 15, of PPO 18: one for all layers, or it were nearly twice as many; on CUDA decoding's, too
    assert second - seen[0] <= 18 + 6 * torch.cuda.is_available(), seen
    for a, b in zip(*figures):
        for key in 'g_norm', 'kl', 'entropy', 'score', 'd_loss', 'mle', 'v_loss', 'pretrain':
            if key in a:
                assert abs(a[key] - b[key]) < bound * max(1, abs(a[key])), (key, a[key], b[key])


def test_compiled_runs_equal_eager_ones():           # one test: they share most kernels
    for script in SCRIPTS:
        more = ['--minibatch', '8', '--pretrain', '.1'] if script is ppo else []
        compiled_equals_eager(script, *more)


def test_bench_races():
    """That every race of the bench runs, with and without several samples; no figure is judged."""
    file = folder('bench') / 'bench.json'
    tiny = ('--only rollout train host --batch 4 --prompt 8 --response 4 --n_layer 1 --n_head 1 '
            '--n_embd 8 --repeats 1 --device cpu --tflops 1 --gbs 100').split()
    for samples in '2', '1':
        with contextlib.redirect_stdout(io.StringIO()) as out:
            bench.main([*tiny, '--samples', samples, '--json', str(file)])
        races = json.loads(file.read_text())['races']
        assert len(races) == 5 and all(s > 0 for r in races.values() for s in r['seconds'].values())
        assert 'of the limit' in out.getvalue()


def test_a_collapse_is_known_and_stops_the_run():
    ids, mask = torch.arange(40).view(8, 5), torch.ones(8, 5).bool()
    for response, sick in ((ids, False), (ids.roll(1, 0), False),
                           (torch.full_like(ids, 7), True),                  # could could could
                           (ids[:1].expand(8, -1), True)):                   # one answer to all
        found = data.health(response[:, None], mask[:, None], mask[:, :1], ids, mask)
        assert found['length'] == 5 and found['eos_rate'] == found['gold_distinct2'] == 1
        assert data.sick(found, 1.) == sick and not data.sick(found, found['distinct2'])
    out = folder('collapse')
    with patched(data, 'sick', lambda *_: True):     # the generator moves from iteration 2 on
        raises(FloatingPointError, ['collapsed by iteration 22', 'ckpt.pt'], train, reinforce, out,
               *SMALL, '--iters', '40', '--eval_interval', '10', '--d_warmup_iters', '2')
        assert load_checkpoint(out / 'ckpt.pt')['iter'] == 2
        cut_short(reinforce, out, *SMALL, '--iters', 40, '--overwrite', at=('score', 9))
        assert load_checkpoint(out / 'ckpt.pt')['iter'] == 1     # nor by a signal
        train(reinforce, out, *SMALL, '--iters', '9', '--overwrite')         # the last is kept
        assert load_checkpoint(out / 'ckpt.pt')['iter'] == 9 and 'final' in records(out)[-1]
    # what counts is the fall since the generator moves
    kept, late = data.health, ['--iters', '30', '--d_warmup_iters', '3']
    for first in .1, .9:
        found = iter(4 * [first] + 26 * [.1])        # the fourth is from before the first update

        def health(*a, found=found):
            return kept(*a) | {'gold_distinct2': .9, 'distinct2': next(found)}

        with patched(data, 'health', health):
            if first == .1:
                train(reinforce, out, *SMALL, *late, '--overwrite')
            else:
                raises(FloatingPointError, ['iteration 24'], train, reinforce, out, *SMALL, *late,
                       '--overwrite')


@patched(data, 'TOYS', FEW)
def test_a_mistake_is_one_sentence():
    full, run, later = folder('full'), small_run(reinforce, '--iters', 0), small_run(reinforce)
    (full / 'metrics.jsonl').write_text('')
    lost = folder('lost')
    shutil.copy(later / 'ckpt.pt', lost)
    ask, goes_on = '--ckpt gone.pt --question', f'--out_dir {run} --resume'
    for script, flags, words in (
            (sample, '--table gone.json', ['gone.json', '--evaluate']),
            (sample, f'--plot {HERE}/lr=1.md', ['lr=1.md/metrics.jsonl', 'not found']),
            (sample, f'--plot {HERE}/README.md', ['README.md', 'not found']),
            (sample, f'--plot run={full}', [str(full), 'no metrics']),
            (sample, '--ckpt gone.pt', ['--q']), (sample, f'{ask} x', ['gone.pt']),
            (sample, f'{ask} " "', ['--q']), (sample, f'{ask} x --samples 0', ['--samples 0']),
            *((sample, f'{ask} x --test_lr {lr}', [f'--test_lr {lr}']) for lr in ('nan', '0')),
            *((sample, f'{ask} x --temperature {t}', [f'--temperature {t}', '0, or', '0.01'])
              for t in ('nan', '1e-38', 'inf', '-1.0')),
            *((sample, f'{ask} x --seed {s}', [f'--seed {s}', 'below']) for s in (2 ** 63, -1)),
            (sample, '--evaluate x --temperature .8 .80', ['0.8', 'once']),
            (sample, '--compare x --temperature .8 .5', ['0.5', '--evaluate']),
            (sample, '--evaluate x --best_of 2', ['--discriminator']),
            (reinforce, '--tiny --d_n_embd 15', ['--d_n_embd, --d_n_head: n_embd 15']),
            (reinforce, '--d_n_embd 64', ['--d_n_embd go with --d_init_from scratch']),
            (reinforce, '--tiny --samples 1', ['--samples 1', '--baseline mean']),
            (reinforce, '--tiny --init_from gone.bin', ['gone.bin not found', '.safetensors']),
            (reinforce, '--tiny --init_from gpt2', ['gpt2', 'offline', 'HF_HOME']),
            (reinforce, f'--tiny --data toy --init_from {run}/sft.pt --max_prompt 99',
             ['max_prompt 99', 'block size 32', '--init_from']),
            (reinforce, f'--tiny --d_init_from {run}/sft.pt',
             [f'--d_init_from {run}/sft.pt has a vocabulary']),
            (reinforce, f'--resume --out_dir {run} --data toy-ways', [
                f'{run}/ckpt.pt has a vocabulary', '--data toy-ways']),
            (reinforce, f'--device cpu --data toy --init_from scratch --d_init_from {run}',
             ['max_response 32', 'block size 32 of --d_init_from']),
            (reinforce, f'--tiny --out_dir {full}', [str(full), 'give --overwrite or']),
            (reinforce, f'--tiny --out_dir {full}/metrics.jsonl/below', ['metrics.jsonl']),
            (reinforce, f'--resume --out_dir {full}/gone', ['--resume', 'no checkpoint']),
            *((reinforce, f'{goes_on} --{name} {value}', [f'--{name} {value}', f'has {has}'])
              for name, value, has in (('n_embd', 32, 16), ('max_response', 7, 6),
                                       ('max_prompt', 9, 26), ('sft_iters', 9, 4),
                                       ('d_n_embd', 9, 768))),
            (reinforce, f'{goes_on} --data toy-varied', ['--data toy-varied', 'other rows']),
            (reinforce, f'--iters 3 --out_dir {later} --resume', ['--iters 3', 'is at 4']),
            (reinforce, f'{goes_on} --init_from gpt2', ['--init_from gpt2', 'has scratch']),
            (reinforce, f'--resume --out_dir {lost}', [str(lost), 'no checkpoint sft.pt']),
            (ppo, goes_on, [str(run), 'of reinforce, or', 'of a run of ppo.py']),
            (ppo, '--minibatch 1000', ['--minibatch 1000', '--batch_size 64']),
            (ppo, '--clip 0', ['--clip 0', 'from 0.001']),
            (bench, '--batch 6', ['--batch', '--samples 4']),
            (bench, '--mean_length nan', ['--mean_length nan', 'above 0']),
            (bench, '--prompt 1000', ['--prompt 1000', '--response 32', '1024']),
            (bench, '--n_head 7', ['n_embd 768', 'n_head 7']), (bench, f'--json {full}', ['full'])):
        flags = shlex.split(flags)
        if script is sample:
            refused(words, *flags)
        elif script is bench:
            raises(SystemExit, words, bench.main, [*flags, '--device', 'cpu'])
        else:
            raises((ValueError, OSError), words, lambda script=script, flags=flags: script.train(
                parse(script, '--out_dir', tempfile.mkdtemp(dir=SCRATCH), *flags)))
    raises(FileNotFoundError, ['squad_v2', 'offline', 'HF_HOME'], data.load_examples, 'squad_v2',
           'dev')

    file = folder('older') / 'ckpt.pt'               # what is no run of this version
    file.with_name('sft.pt').touch()
    good = {'format': model.FORMAT, 'script': 'reinforce', 'settings': asdict(reinforce.Config())}
    for state, words in (([1], 'no run'), ({'model': {}, 'model_args': {}}, 'no run'),
                         ({**good, 'format': None}, 'version'), ({**good, 'format': 0}, 'version'),
                         ({**good, 'script': 'ppo'}, 'of ppo, or'),
                         ({**good, 'script': 'mine', 'settings': {}}, 'of mine, or'),
                         ({**good, 'settings': {'mine': 1}}, 'another version')):
        save_checkpoint(file, state)
        raises(ValueError, ['--resume', 'ckpt.pt', words], parse, reinforce, '--resume',
               '--out_dir', file.parent)

    full = unittest.mock.Mock(side_effect=torch.OutOfMemoryError('CUDA out of memory'))
    with patched(signal, 'signal', lambda *a: None), patched(sample, 'ask', full):
        words = ['out of memory', 'GiB', '--micro_batch']
        raises(SystemExit, words, model.main, *command_line(reinforce), full, ['--tiny'])
        raises(SystemExit, words, sample.main, f'{ask} x'.split())
    # what the code says of a user's mistake is a sentence; a fork's own mistakes have their place
    at = folder('mistaken')
    for old, new, end in (
            ('    rewards = reward(', "    raise ValueError('mine')", 'mine'),
            ('    rewards = reward(', '    a, b = 1, 2, 3', 'unpack'),
            ('if cfg.baseline', "raise ValueError('mine')", None)):
        new += '\n' + ' ' * (8 if end else 4) + old.strip()
        (at / 'fork.py').write_text((HERE / 'reinforce.py').read_text().replace(old, new))
        spec = importlib.util.spec_from_file_location('fork', at / 'fork.py')
        fork = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(fork)
        raises(ValueError if end else SystemExit, [end or 'mine'], model.main, *command_line(fork),
               fork.train, [*SMALL, '--iters', '1', '--sft_iters', '0', '--out_dir',
                            tempfile.mkdtemp(dir=SCRATCH)])          # who keeps e keeps a lock
    interrupted = unittest.mock.Mock(side_effect=KeyboardInterrupt)
    for call, *flags in ((model.main, *command_line(reinforce), None, ['--tiny']),
                         (sample.main, ['--table', 'x']), (bench.main, [])):
        with patched(argparse.ArgumentParser, 'parse_args', interrupted):
            raises(SystemExit, ['130'], call, *flags)


def test_every_flag_refuses_what_it_cannot_take():
    """What is out of range: flag, value and remedy; a word that is none of a flag's: argparse."""
    for script in SCRIPTS:
        kinds = {f.name: f.type for f in fields(script.Config) if f.type is not str}
        for name, kind in {'learning_rate': None, **kinds}.items():
            for value in {int: [-1, 2 ** 63], float: [-1., math.nan, math.inf]}.get(kind, []):
                words = [f'--{name} {value}', 'give']
                raises(ValueError, words, parse, script, f'--{name}={value}')
            with contextlib.redirect_stderr(io.StringIO()) as err:
                raises(SystemExit, ['2'], parse, script, f'--{name}=x')
            assert f'--{name}' in err.getvalue(), err.getvalue()
        parse(script, '--tiny', '--seed', 2 ** 32 - 1)           # all that a CPU's generator takes
        raises(ValueError, [f'from 0 to {2 ** 32 - 1}'], parse, script, '--seed', 2 ** 32 + 1)
        raises(ValueError, ['--lr -1.0: give a number of at least 0'], parse, script, '--lr', -1)
        assert parse(script, '--tiny', '--out_dir=~/a run').out_dir == str(Path.home() / 'a run')
    assert sample.names(['A=~/run', '~/run']) == [('A', f'{Path.home()}/run'),
                                                  ('~/run', f'{Path.home()}/run')]


def test_folders_that_are_taken_or_oddly_named():
    out = folder('ünï cödé 你好') / 'a run'
    flags = [*SMALL, '--iters', '1', '--eval_interval', '1']
    _, lock = model.open_folder(parse(reinforce, *flags, '--out_dir', out))
    raises(ValueError, [str(out), 'in use'], train, gumbel, out, *flags)
    lock.release()
    no_locks = unittest.mock.Mock(side_effect=OSError(95, 'no locks'))
    with (patched(model.FileLock, 'acquire', no_locks),
          contextlib.redirect_stderr(io.StringIO()) as said):
        model.open_folder(parse(reinforce, *flags, '--out_dir', out))
    assert 'no locks' in said.getvalue() and str(out) in said.getvalue()
    assert train(gumbel, out, *flags)['tuned']['f1'] >= 0
    assert GPT.from_pretrained(out / 'ckpt.pt').config.n_layer == 1


def test_a_signal_saves_and_exits():
    """Whether somebody reads or not: a closed terminal sends two, itself and by its shell, and
    cannot be written to any more. A scheduler tells torchrun and its ranks, and that tells them
    again; of these one writes and prints, and they go on from one rank's checkpoint."""
    out, done = folder('signalled'), 0
    ranks = '-m torch.distributed.run --standalone --nproc_per_node 2'.split()
    for number, how, flags in ((signal.SIGINT, [], SMALL), (signal.SIGTERM, ranks, ['--resume']),
                               (signal.SIGHUP, [], ['--resume'])):
        terminal, end = os.openpty()
        start = [sys.executable, *how, reinforce.__file__, *flags, '--iters', '100000', '--out_dir']
        process, said = subprocess.Popen(
            [*start, out], stdout=end, stderr=subprocess.PIPE, text=True,  # not as under nohup
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)), b''
        os.close(end)
        os.set_blocking(terminal, False)
        while process.poll() is None and not After(out, 'score', done + 2):
            with contextlib.suppress(OSError):       # it holds 4 kB
                said += os.read(terminal, 4096)
            time.sleep(.05)
        os.close(terminal)
        while process.poll() is None and not After(out, 'score', done + 5):
            time.sleep(.05)                          # and prints
        tree = Path(f'/proc/{process.pid}/task/{process.pid}/children')      # Linux
        workers = tree.read_text().split() if how and tree.exists() else []
        for pid in process.pid, *map(int, workers):
            os.kill(pid, number)
        if number == signal.SIGHUP:
            process.send_signal(number)
        code, err = process.wait(60), process.stderr.read()
        assert code == (1 if how else 128 + number), err
        assert err.count(f'stopping: saving {out}, go on with --resume') == 1, err
        assert said.count(b'tokenizing train') == 1
        assert (f'resumed at iter {done} of 100000'.encode() in said) == ('--resume' in flags)
        done = load_checkpoint(out / 'ckpt.pt')['iter']
        assert done == max(r['iter'] for r in records(out) if 'score' in r) + 1


def test_without_a_reader_a_run_goes_on():
    """Silently, to its end; sample.py, too; so where standard output or error is closed."""
    out, run = folder('unread'), f'reinforce.py {shlex.join(SMALL)} --overwrite --out_dir .'
    more = f'sample.py --compare {small_run(reinforce)} --prompts 200'
    for line in f'{run} 2>&1 | head -n 1', f'{run} >&- 2>&-', f'{more} 2>&1 | head -n 1':
        (out / 'metrics.jsonl').unlink(missing_ok=True)
        done = subprocess.run(
            ['bash', '-c', f'{sys.executable} {HERE}/{line}; echo ${{PIPESTATUS[0]}} >rc'],
            cwd=out, capture_output=True, text=True, timeout=300)
        assert (out / 'rc').read_text() == '0\n' and not done.stderr, done
        assert line.startswith('sample') or records(out)[-1].keys() == {'final'}


def test_main_leaves_a_process_as_it_was():
    """One that goes on, as a notebook, and keeps the exception: no lock, no handler of signals, no
    backend of matplotlib. A thread may call it. A second SIGINT ends a process, but not at once."""
    import matplotlib
    out, numbers = folder('notebook'), (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def state():
        backend = dict.__getitem__(matplotlib.rcParams, 'backend')
        return [*map(signal.getsignal, numbers)], sys.stdout, sys.stderr, backend

    before = state()
    flags, kept = [*SMALL, '--iters', '0', '--out_dir', str(out)], []

    def call(*more):
        try:
            model.main(*command_line(reinforce), reinforce.train, [*flags, *more])
        except SystemExit as e:
            kept.append(e)

    call('--init_from', 'gone.pt')
    with patched(data, 'TOYS', FEW):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert records(out)[-1].keys() == {'final'} and len(kept) == 1 and state() == before

    with patched(data, 'TOYS', FEW), patched(sample, 'draw', lambda *_: signal.raise_signal(2)):
        call('--overwrite')                          # Ctrl-C in the last evaluation
    assert kept[-1].code == 130 and state() == before and 'final' not in records(out)[-1]

    now = [0.]
    with (model.caught_signals('wait') as caught, patched(time, 'monotonic', lambda: now[0]),
          patched(os, '_exit', side_effect=SystemExit) as leave,
          patched(os, 'write', side_effect=OSError) as say):
        for now[0], number in (0., signal.SIGTERM), (.3, signal.SIGTERM), (.4, signal.SIGINT), (
                9., signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert caught == [15, 15, 2, 15] and not leave.called
        raises(SystemExit, [], os.kill, os.getpid(), signal.SIGINT)
        leave.assert_called_with(130)
        say.assert_called_once_with(2, b'\nwait\n')
    with model.caught_signals('wait') as caught:     # once all is saved, each ends it
        thread = threading.Thread(target=model.release_signals)
        thread.start()                               # it cannot, and must not lose any
        thread.join()
        model.release_signals()
        assert state()[0] == before[0]
        raises(KeyboardInterrupt, [], signal.raise_signal, signal.SIGINT)
        assert not caught
    with (patched(time, 'monotonic', lambda: now[0]),
          contextlib.redirect_stderr(io.StringIO()),             # no terminal
          contextlib.redirect_stdout(io.StringIO()) as said):
        now[0] = 0.
        for step in model.progress(range(3, 13), 'steps'):
            now[0] += 25. if step < 9 else 60.
    assert said.getvalue().splitlines() == [
        'steps: 3 of 10, 3 minutes left', 'steps: 6 of 10, 2 minutes left',
        *(f'steps: {n} of 10, {10 - n} minutes left' for n in range(7, 11))]
    for n in range(1, 6):                            # a second one within the first's n-th line
        lines = iter(range(1, 9))

        def at_a_line(frame, event, _, n=n, lines=lines):
            if frame.f_code.co_name == 'catch' and event == 'line' and next(lines, 0) == n:
                signal.raise_signal(signal.SIGTERM)
            return at_a_line

        with model.caught_signals('wait') as caught, patched(os, 'write') as say:
            sys.settrace(at_a_line)
            signal.raise_signal(signal.SIGTERM)      # SIGHUP is ignored under nohup
            sys.settrace(None)
            assert len(caught) == 2
        say.assert_called_once_with(2, b'\nwait\n')


def test_the_commands_of_the_readme():
    """And one offline, and one on a console that lacks characters: it gets question marks."""
    out, dead = SCRATCH / 'a run', 'http://127.0.0.1:9'                      # nothing listens
    shutil.rmtree(out, ignore_errors=True)
    env = {**os.environ, 'PYTHONWARNINGS': 'always,ignore::ResourceWarning'}
    done = command('reinforce.py', *SMALL, '--out_dir', out, env=env)
    said = done.stdout
    assert max(map(len, said.splitlines())) <= 100
    for line in (r'warm start +[\d.]+.*\ntuned +[\d.]+.*', 'tokenizing train',
                 r'sft_iter 0  loss \S+  em [\d.]+/[\d.]+  f1 [\d.]+/[\d.]+  on dev',
                 r'kept: step \d of 4, loss [\d.]+',
                 r'train: 2\d+ of 8000 have no answer, now `unanswerable`',
                 r'sft_iter 0  mle \S+  \S+ s',
                 'head start until d_acc 0.93 or iteration 1',
                 r'iter 0  reward \S+  gap \S+  d_acc \S+  d_acc_mean 0.5  em \S+  f1 \S+  on dev',
                 r'iter 0  reward \S+  gap \S+  d_acc \S+  d_acc_mean \S+  \S+ s',
                 'iteration 1: the generator begins to move'):
        assert re.search(f'^{line}$', said, re.M), (line, said)
    assert said.count('  gold: ') == said.count('  sampled: ') == 3 * (3 + 2)    # it rests till 1
    assert not [line for line in done.stderr.splitlines() if 'Warning' in line
                and str(HERE) in line and 'site-packages' not in line], done.stderr
    text = (out / 'samples.txt').read_text()
    assert text.count('question  ') == text.count('passage  ') == 12
    assert (out / 'curves.png').stat().st_size > 1000
    command('sample.py', '--ckpt', out / 'ckpt.pt', '--question', 'Who ?', '--context', 'Ada is .')
    text = command('sample.py', '--compare', out / 'sft.pt', out / 'ckpt.pt', '--prompts', 3).stdout
    assert text.count(f'{out}/ckpt.pt') == text.count('gold  ') == text.count('passage  ') == 3
    text = command('sample.py', '--evaluate', f'你好±={out}/sft.pt', '--prompts', 4,
                   '--test_steps', 0, '--out', out / 'judged.json',
                   env={**env, 'PYTHONIOENCODING': 'ascii'}).stdout
    assert '??' in text and '4 prompts of toy' in text
    assert '你好±' in json.loads((out / 'judged.json').read_text())['results']
    text = command('reinforce.py', '--help').stdout
    assert '--no-context' in text and 'prompts of a backward pass' in text
    for script in (*SCRIPTS, sample, bench):
        script.__doc__.encode('ascii')               # for --help on such a console
    env |= {'TIKTOKEN_CACHE_DIR': str(folder('no bpe')), 'HTTPS_PROXY': dead, 'https_proxy': dead}
    err = command('reinforce.py', '--device', 'cpu', '--out_dir', SCRATCH / 'offline', expect=1,
                  env=env).stderr.strip()
    assert '\n' not in err, err
    assert all(w in err for w in ('BPE', 'TIKTOKEN_CACHE_DIR', '--data toy')), err


def test_flags_need_no_comments():
    """Of a text without them, as a notebook's cell is, --help has less to say."""
    text = (HERE / 'reinforce.py').read_text()
    scope = {'__name__': 'a cell'}
    exec(re.sub('  # .*', '', text), scope)
    cell = [scope[name] for name in ('__doc__', 'Config', 'TINY', 'BOUNDS', 'check')]
    assert asdict(model.parse(['--tiny'], *cell)) == asdict(parse(reinforce, '--tiny'))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        raises(SystemExit, ['0'], model.parse, ['--help'], *cell)
    assert 'MICRO_BATCH (default: 0)' in ' '.join(said.getvalue().split())


def test_forks_and_controls_of_the_pages():
    """A reward of one's own as README has it; the signs that RESULTS.md turns round, each once."""
    pages = [(HERE / page).read_text() for page in ('README.md', 'assets/RESULTS.md')]
    text, at, kept = (HERE / 'reinforce.py').read_text(), folder('own') / 'fork.py', []
    own, = re.findall(r'```python\n( .*?)```', pages[0], re.S)
    line = '        rewards = reward(scores, batch, roll, cfg)\n'
    scope = {'__name__': 'fork', 'kept': kept}
    own += '        kept.append((texts, rewards, data.to_text(batch.response, batch.mask, enc)))\n'
    at.write_text(text.replace(line, line + own))
    exec(compile(at.read_text(), at, 'exec'), scope)
    with patched(sample, 'draw', lambda *a: None):   # learns to say `unanswerable`
        scope['train'](parse(reinforce, *SMALL, '--sft_iters', 80, '--sft_lr', .02, '--out_dir',
                             at.parent / 'run'))
    for texts, rewards, gold in kept:                # (8 2,), (8, 2, R), (8,)
        assert rewards.count_nonzero(-1).max() == 1
        assert all(text != said or abs(r - 1) < 1e-6 for text, said, r in
                   zip(texts, np.repeat(gold, 2), rewards.sum(-1).flatten()))
    edits = re.findall(r"""sed (['"])(.*)\1 (\S+) > """, pages[1])
    for _, edit, file in edits:                      # each one line
        text = (HERE / file).read_text()
        edited = subprocess.run(['sed', edit], input=text, capture_output=True, text=True).stdout
        (old, *more), new = ([*{*a.splitlines()} - {*b.splitlines()}]
                             for a, b in ((text, edited), (edited, text)))
        turned = [old.replace('return ', 'return -', 1)]
        assert not more and len(new) <= 1 and ('return' not in edit or new == turned), edit
    assert len(edits) == 3                           # two turned, labels


def test_figures_of_the_pages_are_those_of_their_files():
    """Each table of RESULTS.md is `--table` of a JSON, but for columns left out, README's rows, and
    what has a ± in either text, are of these; README begins with the end of a run."""
    from matplotlib.figure import Figure

    def rows(table):                                 # {label: {header: cell}}
        head, _, *lines = (re.split(r' ?(?<!\\)\| ?', row)[1:-1] for row in table.splitlines())
        return {name: dict(zip(head[1:], cells, strict=True)) for name, *cells in lines}

    assets, kept = HERE / 'assets', []
    readme, results = (HERE / 'README.md').read_text(), (assets / 'RESULTS.md').read_text()
    first, shown = ([*map(rows, re.findall(r'(?:^\|.*\n)+', page, re.M))]
                    for page in (readme, results))
    for path in sorted(assets.glob('*.json')):
        if not path.stem.startswith('speed'):
            made = rows(printed('--table', path))
            table, = (table for table in shown if [*table] == [*made])       # all rows, in order
            for name, row in table.items():
                assert row.items() <= made[name].items(), (path, name, made[name])
            kept += table.values()
    assert len(kept) == sum(map(len, shown))         # no table without a file
    for name, row in (pair for table in first for pair in table.items()):
        assert {'ratio', '`--d_lr`'} & {*row} or any(
            row.items() <= one.items() for one in kept), name
    cells = {cell for row in kept for cell in row.values()}
    assert {*re.findall(r'-?[\d.]+ ± [\d.]*\d', readme + results)} <= cells
    for path in assets.rglob('*.jsonl'):             # with what is missing in the old ones
        with patched(Figure, 'savefig'):
            printed('--plot', path, '--out', SCRATCH / 'x.png')
    spec = importlib.util.spec_from_file_location('ways', assets / 'ways.py')
    spec.loader.exec_module(ways := importlib.util.module_from_spec(spec))
    gpt = tiny_gpt(vocab_size=data.load_tokenizer('toy-ways').n_vocab)
    assert ways.row(gpt, gpt, ways.split_of('dev', 8))['right'] == 0
    last = sample.read_runs(assets / 'ways/score.jsonl')[0][-1]['final']
    keys = 'em', 'f1', 'sample_em', 'sample_f1', 'reward', 'gap', 'd_acc', 'distinct2'
    for name, f in last.items():
        assert name.ljust(12) + ''.join(f'{f[k]:11.3f}' for k in keys) + '\n' in readme, name
    for path in assets.rglob('*.*'):                 # none that no page names
        assert re.sub(r'-\d\.jsonl', '-', path.name) in readme + results, path


def test_no_drift():
    """Functions and flags of a name are one text in all scripts; `train` has the same stations."""
    banners = ['config', 'losses', 'scores and rewards', 'training']
    stations = ['setup', 'data and models', 'warm start', 'resume', 'evaluate and checkpoint',
                'rollout', 'discriminator step', 'generator step', 'log']
    for script in SCRIPTS:
        name, config = script.__name__, script.Config
        text, body, notes = map(inspect.getsource, (script, script.train, config))
        assert re.findall(r'^    (\w+):.*?  # +.*', notes, re.M) == [f.name for f in fields(config)]
        assert re.findall(r'^# -+\n# ([\w ]+)', text, re.M) == banners, f'{name}: banners'
        assert re.findall(r'^ +# ([a-z ]+)$', body, re.M) == stations, f'{name}: stations'
        assert (config.script, config.out_dir) == (name, f'out/{name}')
        assert config.lr == (5e-6 if script is ppo else 1e-5)    # of four updates a rollout, of one
    for one, other in itertools.combinations(SCRIPTS, 2):
        assert not (found := drift(one, other)), found
    fork = SimpleNamespace(**vars(reinforce) | {'__name__': 'fork', 'reward': lambda scores: 0})
    assert drift(reinforce, fork)[0].startswith('fork.py, reward: ')
    assert 'reinforce.py: def reward(' in drift(reinforce, fork)[0]


def code_of(script):
    """The functions and flags that a script may share, by name: lines, without comments."""
    found = {n: ast.unparse(ast.parse(inspect.getsource(f).strip())).splitlines()
             for n, f in vars(script).items() if inspect.isfunction(f)
             and f.__module__ != 'model' and n not in ('train', 'check')}
    if script is gumbel:                             # the discriminator is shown relaxed answers
        del found['discriminator_step']
    return found | {f'--{f.name}': [f'{f.type} = {f.default}'] for f in fields(script.Config)
                    if f.name not in ('out_dir', 'lr')}


def drift(one, other):
    """A sentence on each function and flag of one name that differs in two scripts."""
    a, b = code_of(one), code_of(other)
    shared = [n for n in a if n in b]
    lines = {n: [p for p in itertools.zip_longest(a[n], b[n], fillvalue='') if len({*p}) > 1]
             for n in shared}
    found = [f'{other.__name__}.py, {n}: {p[0][1]} | {one.__name__}.py: {p[0][0]}'
             for n, p in lines.items() if p]
    moved = shared != [n for n in b if n in a]
    return found + [f'{other.__name__}.py: in another order than {one.__name__}.py'] * moved


# -----------------------------------------------------------------------------
# CUDA, on a GPU that is not there: devices, waits, graphs

aten, make_rng = torch.ops.aten, torch.Generator


class Pretend(torch.Tensor):
    """A tensor that says cuda:0 and computes on the CPU."""

    @staticmethod
    def __new__(cls, kept):
        with torch._C._DisableTorchDispatch():
            shell = torch.empty_strided(kept.size(), kept.stride(), dtype=kept.dtype, device='meta')
        made = torch.Tensor._make_subclass(cls, shell, False,
                                           device_for_backend_keys=torch.device('cuda:0'))
        made.kept = kept
        return made

    device = property(lambda self: torch.device('cuda:0'))
    is_cuda = property(lambda self: True)
    is_meta = is_cpu = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Gpu.now.__torch_dispatch__(func, types, args, kwargs)

    def tolist(self):
        Gpu.now.waits['tolist'] += 1
        return self.kept.detach().tolist()

    def __reduce_ex__(self, protocol):               # a checkpoint holds an ordinary one
        return self.kept.detach().__reduce_ex__(protocol)


class Gpu(TorchDispatchMode):
    """
    Within it there is a GPU, for one who only looks, in float32. It refuses, as a real one does,
    operands on two devices and a generator of another. `waits` counts what would make the host
    wait, by name. Other faults than these go unseen.
    """
    reads = {aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero,
             aten.masked_select, aten.unique_consecutive}
    indexing = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}

    def __init__(self, bf16=True, room=80):
        super().__init__()
        self.bf16, self.room, self.waits, self.rngs = bf16, room, collections.Counter(), {}

    def rng(self, device='cpu'):
        made = make_rng('cpu')
        if torch.device(device).type == 'cuda':
            self.rngs[made._cdata] = made
        return made

    def __enter__(self):
        Gpu.now, self.stack = self, contextlib.ExitStack()
        told = dict(_lazy_init=None, is_available=True, set_device=None, synchronize=None,
                    get_device_name='pretend', is_bf16_supported=self.bf16,
                    is_current_stream_capturing=False, current_device=0,
                    mem_get_info=(0, self.room * 2 ** 30))
        told = {name: lambda *a, value=value, **k: value for name, value in told.items()}
        for change in (unittest.mock.patch.multiple(torch.cuda, **told),
                       patched(torch, 'Generator', self.rng),
                       patched(F, 'scaled_dot_product_attention', attention),
                       patched(torch.Tensor, 'pin_memory', lambda z: z),
                       torch.autograd.set_multithreading_enabled(False)):
            self.stack.enter_context(change)
        overwrite = torch.__future__.set_overwrite_module_params_on_conversion
        overwrite(True)
        self.stack.callback(overwrite, False)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, op = dict(kwargs or {}), func.overloadpacket
        tensors = [z for z in tree_leaves((args, kwargs)) if isinstance(z, torch.Tensor)]
        ours = [z for z in tensors if isinstance(z, Pretend)]
        others = [z for z in tensors if not isinstance(z, Pretend)]
        device = kwargs.get('device')
        there = device is not None and torch.device(device).type in ('cuda', 'meta')
        if not ours and not there:
            return func(*args, **kwargs)
        rng = kwargs.get('generator')
        if rng is not None and rng._cdata not in self.rngs:      # pytest adds lines to an assert
            raise AssertionError(f'{func}: a generator of another device')
        away = ours and device is not None and not there
        by_mask = op in self.indexing and any(z is not None and z.dtype == torch.bool
                                              for z in args[1])
        if op in self.indexing:
            assert isinstance(args[0], Pretend), f'{func}: indices of another device'
        elif op is not aten.copy_ and ours and any(z.dim() for z in others):
            raise AssertionError(f'{func}: operands on two devices')
        if (op in self.reads or away or by_mask
                or ours and others and op in (aten.copy_, *self.indexing)):
            self.waits[str(op)] += 1
        if device is not None:
            kwargs |= {'device': 'cpu', 'pin_memory': False}
        kept = tree_map(lambda z: z.kept if isinstance(z, Pretend) else z, (args, kwargs))
        made = func(*kept[0], **kept[1])
        if away or op is aten.copy_ and not isinstance(args[0], Pretend):
            return made
        if func._schema.name.endswith('_') and isinstance(made, torch.Tensor):
            return args[0]
        return tree_map(lambda z: Pretend(z) if isinstance(z, torch.Tensor) else z, made)


def attention(q, k, v, attn_mask):
    """By hand, for torch's own looks for a kernel of the device's."""
    scores = q @ k.transpose(-1, -2) * q.size(-1) ** -.5
    return scores.masked_fill(~attn_mask, -math.inf).softmax(-1) @ v


def near(one, other, bound):
    """That two runs logged the same, numbers within `bound`, relative where over 1."""
    (a, keys), (b, other_keys) = (tree_flatten(records(out)) for out in (one, other))
    assert keys == other_keys
    for x, y in zip(a, b):
        assert x == y or abs(x - y) <= bound * max(1, abs(x)), (a, b)


def test_a_run_that_moves_to_a_gpu_goes_on():
    """A run on the CPU with everything auto, cut short and resumed on a pretend GPU: in the end it
    has the figures of one that stayed, and on the way no operands on two devices."""
    for script in SCRIPTS:
        stayed, moved = folder(f'stayed {script.__name__}'), folder(f'moved {script.__name__}')
        flags = [*SMALL_OF[script], '--device', 'auto', '--no-compile']
        train(script, stayed, *flags)
        cut_short(script, moved, *flags)
        with Gpu(bf16=False):                        # as on a T4, so float32
            train(script, moved, '--resume')
        header = json.loads((moved / 'metrics.jsonl').read_text().splitlines()[0])
        assert header['device'] == 'cpu'             # where it began
        near(stayed, moved, 1e-3)
        settings = load_checkpoint(moved / 'ckpt.pt')['settings']
        assert settings['device'] == settings['dtype'] == 'auto' and settings['compile'] is False


def test_flags_left_to_auto_take_what_the_gpu_has():
    triton = importlib.util.find_spec('triton') is not None
    for given, bf16, room, *wanted in (
            ({}, True, 80, 'cuda:0', 'bfloat16', triton, 64),
            ({}, False, 16, 'cuda:0', 'float32', triton, 16),
            ({'dtype': 'bfloat16', 'compile': False}, False, 39.4, 'cuda:0', 'bfloat16', False, 64),
            ({'device': 'cuda:1', 'micro_batch': 3}, True, 80, 'cuda:1', 'bfloat16', triton, 3)):
        cfg, calls = reinforce.Config(**given), []
        with (Gpu(bf16, room), patched(torch.cuda, 'set_device', calls.append), patched(
                torch, 'empty', lambda n, device: SimpleNamespace(device=torch.device(
                    device if ':' in device else f'{device}:0')))):
            before = model.open_device(cfg)
        assert [cfg.device, cfg.dtype, cfg.compile, cfg.micro_batch] == wanted
        assert calls == [torch.device(wanted[0])]
        assert reinforce.Config(**before) == reinforce.Config(**given)
    raises(ValueError, ['--device cuda:99', 'another'], model.open_device,
           reinforce.Config(device='cuda:99'))


def test_without_a_compiler_or_ranks_a_run_is_eager_and_alone():
    """Or, where --compile was given, it is a sentence. TF32 is for CUDA."""
    def opened(gpu=None, **given):
        cfg = reinforce.Config(**given)
        with gpu or contextlib.nullcontext(), contextlib.redirect_stderr(io.StringIO()) as err:
            model.open_device(cfg)
        return cfg.compile, err.getvalue()

    empty = str(folder('no compiler'))
    said = command('reinforce.py', *SMALL, '--compile', '--out_dir', f'{empty}/run', expect=1,
                   env={k: v for k, v in os.environ.items() if k != 'CXX'} | {'PATH': empty}).stderr
    assert said.startswith('--compile needs') and said.count('\n') == 1, said
    torch.set_float32_matmul_precision('highest')
    with (unittest.mock.patch.dict(os.environ, PATH=str(folder('no compiler')), LOCAL_RANK='3'),
          patched(importlib.util, 'find_spec', lambda name: name)):
        os.environ.pop('CC', None), os.environ.pop('CXX', None)
        assert opened(device='cpu') == (False, '') and not dist.is_initialized()
        assert torch.get_float32_matmul_precision() == 'highest'
        compiled, said = opened(Gpu(), device='cuda:0')
        assert not compiled and 'nothing is compiled' in said and 'gcc' in said
        assert torch.get_float32_matmul_precision() == 'high'
        torch.set_float32_matmul_precision('highest')
        for gpu, device, name in (None, 'cpu', 'g++'), (Gpu(), 'cuda:0', 'gcc'):
            raises(ValueError, ['--compile', name], opened, gpu, device=device, compile=True)
        for name, device in ('CXX', 'cpu'), ('CC', 'cuda:0'):        # one's own, wherever it is
            os.environ[name] = sys.executable
            gpu = Gpu() if name == 'CC' else None
            assert opened(gpu, device=device, compile=True) == (True, '')


def test_the_token_loop_makes_no_host_wait():
    """But for one look every eight tokens, whether all answers are over."""
    with Gpu() as gpu:
        generator = tiny_gpt(block_size=64).to('cuda:0')
        prompt, pad = torch.ones(3, 5).long().to('cuda:0'), torch.zeros(3).long().to('cuda:0')
        for eos, R, steps, looks in (99, 8, 7, 0), (99, 30, 29, 3), (None, 30, 7, 1):
            generator.wte.weight.data.mul_(0 if eos is None else 1)          # all logits 0: token 0
            gpu.waits.clear()
            decode = unittest.mock.Mock(side_effect=generator.decode)
            with patched(generator, 'decode', decode):
                roll = generator.generate(prompt, pad, R, eos or 0, 2, 0 if eos is None else 1.,
                                          rng=torch.Generator('cuda:0'))
            assert decode.call_count == steps and roll.mask.kept.sum() == 6 * (R if eos else 1)
            assert sum(gpu.waits.values()) == looks, gpu.waits
        raises(AssertionError, ['of another device'], generator.generate, prompt, pad, 8, 99, 2,
               rng=torch.Generator())
        raises(AssertionError, ['on two devices'], generator, prompt, torch.zeros(3).long())


def test_a_step_makes_no_host_wait():
    """But for what is decided by: whether pairs differ, d_acc, and how far PPO's pi is already."""
    most = dict(mle_step=0, discriminator_step=3, look_back=0, reinforce_step=0, ppo_step=1,
                gumbel_step=0, update=0)
    for script in SCRIPTS:
        seen = collections.defaultdict(set)
        with Gpu(bf16=False) as gpu, contextlib.ExitStack() as stack:
            def counting(name, step, seen=seen, gpu=gpu):
                def counted(*args):
                    before = gpu.waits.total()
                    result = step(*args)
                    seen[name].add(gpu.waits.total() - before)
                    return result
                return counted

            for name in {*most} & {*vars(script)}:
                stack.enter_context(patched(script, name, counting(name, vars(script)[name])))
            train(script, folder('waits'), *SMALL_OF[script], '--device', 'cuda:0', '--no-compile',
                  '--micro_batch', '4', '--d_warmup_iters', '0', '--sft_iters', '1', '--iters', '1')
        assert len(seen) >= 4 and all(max(seen[name]) <= most[name] for name in seen), seen


def of_many_and_few(gpt, device):
    """Log-probabilities and entropies of 512 tokens and of 16, whose head is not worth a copy, and
    the gradient."""
    torch.manual_seed(0)
    inputs = torch.randint(0, 13, (64, 5)), torch.arange(64) % 5, torch.randint(0, 13, (64, 2, 4))
    found = []
    for n in 64, 2:
        found += gpt.response_logprobs(*(z[:n].to(device) for z in inputs), entropy=True)
        (found[-2] * torch.arange(4.).to(device)).sum().backward()
    return [z.detach().cpu() for z in (*found, *(p.grad for p in gpt.parameters()))]


def test_a_large_head_is_padded():
    """On a pretend GPU: products have whole tiles of 64, what comes of them does not change."""
    wanted, linear, columns = of_many_and_few(tiny_gpt(), 'cpu'), F.linear, []
    with Gpu(), patched(F, 'linear', lambda x, weight, bias=None: columns.append(
            len(weight)) or linear(x, weight, bias)):
        got = of_many_and_few(tiny_gpt().to('cuda:0'), 'cuda:0')
    assert sorted(n for n in columns if n in (13, 64)) == [13, 64]
    assert all((a - b).norm() < 1e-5 * a.norm() for a, b in zip(wanted, got, strict=True))


def made_by(code):
    """The sizes of the tensors that inductor's code makes."""
    return [math.prod(map(int, shape.split(','))) for shape in
            re.findall(r'empty_strided\w*\(\(([\d, ]+?),?\s*\)', code)]


def test_matrices_are_cast_once_a_rollout():
    """And again for the next, after a step; tokens are those of autocast's casts."""
    fast, plain = tiny_gpt(block_size=64), tiny_gpt(block_size=64)
    fast.low = []                                    # as on CUDA, where decoding is compiled
    prompt, pad = torch.randint(0, 12, (4, 9)), torch.arange(4)
    for seed in range(2):
        with torch.autocast('cpu', torch.bfloat16):
            rolls = [g.generate(prompt, pad, 12, 12, 2, rng=torch.Generator().manual_seed(seed))
                     for g in (fast, plain)]
        assert all(map(torch.equal, *rolls))
        assert {p.dtype for p in fast.low[0].parameters()} == {torch.bfloat16, torch.float32}
        for g in fast, plain:
            g.h[0].mlp.c_fc.weight.data.neg_()
    assert len(fast.state_dict()) == len(plain.state_dict())
    fast.generate(prompt, pad, 2, 12)
    assert not fast.low and plain.low is None        # float32 again


def test_decoding_writes_its_cache_in_place():
    """What inductor makes of it: nothing as large as one layer's keys, and everything that is
    written, the cache, of a fixed address, or CUDA graphs would be left out."""
    if not shutil.which('g++'):
        raise unittest.SkipTest('torch.compile needs g++ on CPU')
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.utils import run_and_get_code
    gpt, B, K, P, R = tiny_gpt(n_layer=2, n_embd=32, block_size=64), 6, 2, 20, 9
    fixed, written = set(), []

    def inner(gm, inputs, **kwargs):
        fixed.update(kwargs['static_input_idxs'])
        place = {node: i for i, node in enumerate(gm.graph.find_nodes(op='placeholder'))}
        written.extend(place[node.args[0]] for node in gm.graph.nodes if node.target in (
            aten.copy_.default, aten.index_put_.default, aten.index_copy_.default))
        return compile_fx_inner(gm, inputs, **kwargs)

    torch._dynamo.reset()
    step = torch.compile(gpt.decode, backend=lambda gm, inputs: compile_fx(
        gm, inputs, inner_compile=inner))
    with (torch.no_grad(), torch.autocast('cpu', torch.bfloat16),
          torch._inductor.config.patch(force_disable_caches=True)):
        cache = gpt.cache(B, P + K * R)
        _, code = run_and_get_code(step, torch.ones(B, K).long(), torch.zeros(B).long(), P, R,
                                   cache, torch.ones(1).long())
    code = '\n'.join(code)
    sizes = made_by(code)
    assert sizes and max(sizes) < cache[0][0].numel(), sizes
    assert 'aten.index_put.default' not in code and 'aten.index_copy.default' not in code
    assert len(written) == 4 and fixed >= set(written), (written, fixed)


# -----------------------------------------------------------------------------
# CUDA, on a GPU: python test_all.py cuda

CUDA = 'cuda:0'
SIZE = dict(n_embd=128, n_head=2)                    # heads of 64 channels, which kernels are for
CARD = {reinforce: (12, 24), ppo: (16, 24), gumbel: (16, 38)}        # GiB that should do


def needs_a_gpu():
    if not torch.cuda.is_available():
        raise unittest.SkipTest('there is no GPU here')


def test_cuda_steps_equal_the_cpus():
    """Every update's gradient and figures: of the norm 1e-4 in float32, 5% in bfloat16."""
    needs_a_gpu()
    wanted = steps_of_all_scripts(**SIZE)
    for how, activations, bound in ('highest', 'float32', 1e-4), ('high', 'bfloat16', .05):
        torch.set_float32_matmul_precision(how)      # high: TF32
        got = steps_of_all_scripts(device=CUDA, activations=activations, **SIZE)
        print(f'# {activations}: {steps_agree(wanted, got, bound):.1e}')


def test_cuda_logits_and_tokens_equal_the_cpus():
    """In float32; tokens under one noise, eager and compiled, decoding under CUDA graphs, in one
    shape after the other and back."""
    needs_a_gpu()
    from torch._inductor.cudagraph_trees import CUDAGraphNode
    plain = tiny_gpt(block_size=96, n_layer=3, **SIZE)
    eager, fast = (copy.deepcopy(plain).to(CUDA) for _ in range(2))
    fast.compile()
    draw, record, recorded = model.uniform, CUDAGraphNode.__init__, []
    noises = patched(model, 'uniform', lambda shape, like, rng: draw(
        shape, torch.empty(0), rng).to(like.device))
    watched = patched(CUDAGraphNode, '__init__', lambda *a, **k: recorded.append(a) or record(
        *a, **k))
    torch.set_float32_matmul_precision('highest')
    with noises, watched, torch.no_grad():
        for turn, (B, K, P) in enumerate([(5, 3, 24), (16, 1, 24), (5, 3, 40)] * 3):
            if turn == 3:
                before = graphs(), len(recorded)
            prompt, pad = torch.randint(0, 12, (B, P)), torch.arange(B) % 7
            there = prompt.to(CUDA), pad.to(CUDA)
            assert (eager(*there).cpu() - plain(prompt, pad)).abs().max() < 1e-4
            wanted, *rolls = [network.generate(*where, 20, 12, K,
                                               rng=torch.Generator().manual_seed(turn))
                              for network, *where in ((plain, prompt, pad), (eager, *there),
                                                      (fast, *there))]
            for roll in rolls:
                assert all(torch.equal(a, b.cpu()) for a, b in zip(wanted, roll)), turn
            print('#', turn, graphs(), len(recorded))
    assert (graphs(), len(recorded)) == before and recorded
    assert not graphs('inductor', 'cudagraph_skips')         # of which inductor says nothing


def test_cuda_large_head_equals_the_cpus():
    """Padded, eager and in a compiled loss."""
    needs_a_gpu()
    torch.set_float32_matmul_precision('highest')
    wanted = of_many_and_few(tiny_gpt(**SIZE), 'cpu')
    for compiled in False, True:
        gpt = tiny_gpt(**SIZE).to(CUDA)
        if compiled:
            gpt.compile()
        got = of_many_and_few(gpt, CUDA)
        assert all((a - b).norm() < 1e-4 * a.norm() for a, b in zip(wanted, got, strict=True))


def test_cuda_token_loop_does_not_wait():
    needs_a_gpu()
    gpt, rng = tiny_gpt(block_size=96, **SIZE).to(CUDA), torch.Generator(CUDA)
    prompt, pad = torch.ones(8, 24).long().to(CUDA), torch.zeros(8).long().to(CUDA)
    for compiled in False, True:
        if compiled:
            gpt.compile()
        for mode in 'default', 'default', 'error':   # kernels are made, then graphs
            torch.cuda.set_sync_debug_mode(mode)
            try:
                gpt.generate(prompt, pad, 8, 12, 4, rng=rng)
            finally:
                torch.cuda.set_sync_debug_mode('default')


def test_cuda_bfloat16_keeps_tokens_and_ratios():
    """Relaxed answers have the sampled tokens as argmax at GPT-2's vocabulary. PPO's first ratio is
    1 but for what passes with and without gradient round, which is printed."""
    needs_a_gpu()
    where = dict(device=CUDA, activations='bfloat16', vocab_size=50257, **SIZE)
    cfg, gpt, _, _, batch, roll = case(gumbel, **where)
    answers, mask, _ = gumbel.encode(gpt, batch, roll, .5, torch.Generator(CUDA), cfg)
    assert torch.equal(answers.argmax(-1)[mask], data.beside_gold(batch, roll)[0][mask])
    cfg = case(ppo, '--minibatch', 4, **where)[0]
    critic = tiny_discriminator(4, ppo.Critic, **SIZE).to(CUDA)
    for compiled in False, True:
        if compiled:
            gpt.compile()
        past, _ = ppo.look_back(gpt, gpt, critic, batch, roll, 0. * roll.mask, cfg)
        with model.autocast(cfg):
            now, _ = gpt.response_logprobs(batch.prompt, batch.pad, roll.response)
        off = ((now - past.logprobs).exp() - 1)[roll.mask].abs().max().item()
        print(f'# compiled {compiled}: {off:.1e}')
        assert off < .05


def test_cuda_runs_compile_and_resume():
    """With everything left to auto, as `python reinforce.py --device cuda` has it, under graphs in
    bfloat16. Compiled against eager, with no graph after the second iteration; a resume against
    none: without TF32, whose rounding would make a token another one here and there."""
    needs_a_gpu()
    out, skipped = folder('auto'), graphs('inductor', 'cudagraph_skips')
    train(reinforce, out, *SMALL, '--n_embd', '128', '--n_head', '2', '--device', 'cuda')
    config = json.loads((out / 'metrics.jsonl').read_text().splitlines()[0])['config']
    assert [config[k] for k in ('device', 'dtype', 'compile')] == ['cuda:0', 'bfloat16', True]
    assert graphs('inductor', 'cudagraph_skips') == skipped
    for script, *more in (reinforce,), (ppo, '--minibatch', '8'), (gumbel,):
        flags = ['--device', CUDA, '--dtype', 'float32', *more]
        whole, parts = folder('whole cuda'), folder('parts cuda')
        torch.set_float32_matmul_precision('highest')
        with patched(torch, 'set_float32_matmul_precision', lambda _: None):
            compiled_equals_eager(script, *flags, '--n_layer', '1', bound=.01)
            flags = [*SMALL_OF[script], *flags, '--no-compile']
            train(script, whole, *flags)
            cut_short(script, parts, *flags)
            train(script, parts, '--resume')
        near(whole, parts, .01)


def at_the_defaults(script, device, *flags):
    """Two steps of each station of a script, eager, in sizes that are the defaults' but for flags;
    of the task, nothing but the sizes is right."""
    cfg = parse(script, '--device', device, '--dtype', 'bfloat16', '--no-compile', '--init_from',
                'scratch', '--sft_iters', 2, '--iters', 2, '--d_warmup_iters', 0, '--out_dir',
                folder('sizes'), *flags)
    enc = SimpleNamespace(n_vocab=50257, eot_token=50256, decode=str,
                          encode_ordinary=lambda text: [len(text)] * cfg.max_prompt)
    examples = [{'context': str(i), 'question': '', 'answers': ['a']} for i in range(64)]
    split = data.Split(examples, enc, cfg.max_prompt, cfg.max_response)
    with (patched(data, 'load', lambda cfg: [enc, split, split]),
          patched(script, 'save', lambda *a, **k: None)):
        script.train(cfg)


def test_cuda_memory_is_what_was_promised():
    needs_a_gpu()
    for script, n in itertools.product(CARD, (16, 64)):
        most = CARD[script][n == 64]
        if torch.cuda.mem_get_info(CUDA)[1] < most * 2 ** 30:
            continue
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        at_the_defaults(script, CUDA, '--micro_batch', n)
        used = torch.cuda.max_memory_allocated() / 2 ** 30
        print(f'# {script.__name__}, micro-batches of {n}: {used:.1f} GiB')
        assert used < most, (script.__name__, n, used)


def run(name):
    """Runs one test in silence; its verdict, and a line with what it said that begins with #."""
    start, said = time.perf_counter(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            globals()[name]()
        verdict, notes = 'ok', ''
    except unittest.SkipTest as e:
        verdict, notes = 'skipped', f': {e}'
    except (Exception, SystemExit):                  # whose code may be 0
        verdict, notes = 'FAILED', f'\n{traceback.format_exc()}'
    notes += ''.join(f'\n    {z}' for z in said.getvalue().splitlines() if z.startswith('# '))
    return verdict, f'{name}  {time.perf_counter() - start:.1f} s  {verdict}{notes}'


def main(*parts):
    """Runs the tests whose name holds one of parts; exit code 1 if one fails or none matched."""
    os.environ['OMP_NUM_THREADS'] = '1'              # one core a process, and its subprocesses
    os.environ['TORCHINDUCTOR_COMPILE_THREADS'] = '2'
    names = [n for n in globals() if n.startswith('test_') and any(p in n for p in parts or [''])]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context('spawn')) as pool:
        longest_first = sorted(names, key=lambda n: 'compiled' not in n)
        started, counts = {n: pool.submit(run, n) for n in longest_first}, collections.Counter()
        for name in names:
            verdict, line = started[name].result()
            counts[verdict] += 1
            print(line, flush=True)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    print('{ok} passed, {FAILED} failed, {skipped} skipped'.format_map(counts))
    sys.exit(1 if counts['FAILED'] or not names else 0)


if __name__ == '__main__':
    main(*sys.argv[1:])
