"""
Everything checked, on a CPU and offline: `python test_all.py [part of a name]`, or pytest.
"""

import collections
import contextlib
import ctypes
import gc
import importlib.util
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import resource
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
import weakref
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
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from tqdm import tqdm

import bench
import data
import gumbel
import model
import ppo
import reinforce
import sample
from model import GPT, Discriminator, GPTConfig, Rollout, load_checkpoint, save_checkpoint

SCRIPTS = [reinforce, ppo, gumbel]
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
    cfg = script.parse(['--tiny', '--batch_size', '4', '--samples', str(K), *flags])
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
    batch = data.Batch(prompt, pad, gold, gold_mask)
    batch, roll = (type(group)(*(z.to(device) for z in group)) for group in (batch, roll))
    return cfg, *(network.to(device, dtype) for network in networks), batch, roll


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


def reference_logits(weights, tokens, n_layer, n_head):
    """GPT-2 (Radford et al. 2019) once more, in plain operations on OpenAI's layout (in, out)."""
    def norm(x, g, b):
        mean = x.mean(-1, keepdim=True)
        return (x - mean) / ((x - mean) ** 2).mean(-1, keepdim=True).add(1e-5).sqrt() * g + b

    w, T = weights, tokens.size(1)
    x = w['wte.weight'][tokens] + w['wpe.weight'][:T]
    for i in range(n_layer):
        p = {k.removeprefix(f'h.{i}.'): v for k, v in w.items() if k.startswith(f'h.{i}.')}
        y = norm(x, p['ln_1.weight'], p['ln_1.bias']) @ p['attn.c_attn.weight']
        heads = []
        C = x.size(-1)
        y, D = y + p['attn.c_attn.bias'], C // n_head
        for h in range(n_head):
            q, k, v = (y[..., n * C + h * D:n * C + h * D + D] for n in range(3))
            scores = q @ k.transpose(1, 2) / math.sqrt(D)
            scores = scores + torch.full((T, T), -math.inf).triu(1)
            e = (scores - scores.max(-1, keepdim=True).values).exp()
            heads.append(e / e.sum(-1, keepdim=True) @ v)
        x = x + torch.cat(heads, -1) @ p['attn.c_proj.weight'] + p['attn.c_proj.bias']
        y = norm(x, p['ln_2.weight'], p['ln_2.bias']) @ p['mlp.c_fc.weight'] + p['mlp.c_fc.bias']
        y = .5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + .044715 * y ** 3)))
        x = x + y @ p['mlp.c_proj.weight'] + p['mlp.c_proj.bias']
    return norm(x, w['ln_f.weight'], w['ln_f.bias']) @ w['wte.weight'].t()


def test_logits_equal_an_independent_forward():
    gpt, tokens = tiny_gpt(), torch.randint(0, 13, (3, 11))
    with torch.no_grad():
        for p in gpt.parameters():                   # biases and gains that are not 0 and 1
            p.add_(.1 * torch.randn_like(p))
    path = folder('reference')
    gpt.save_pretrained(path)
    weights = model.load_file(path / 'model.safetensors')
    assert (reference_logits(weights, tokens, 2, 2) - gpt(tokens)).abs().max() < 1e-5


def test_logits_equal_transformers_in_both_layouts():
    try:
        os.environ['TRANSFORMERS_VERBOSITY'] = 'error'
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as e:
        raise unittest.SkipTest('transformers is not installed') from e
    tokens = torch.randint(0, 50257, (2, 9))
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=6)).eval()
    path = folder('distilgpt2')
    theirs.save_pretrained(path)
    # the layout of the first releases: no prefix, the causal mask among the weights
    old = {k.removeprefix('transformer.'): v for k, v in theirs.state_dict().items()}
    old |= {f'h.{i}.attn.bias': torch.ones(1, 1, 4, 4) for i in range(6)}
    (path / 'bin').mkdir()
    torch.save(old, path / 'bin' / 'pytorch_model.bin')
    with torch.no_grad():
        wanted = theirs(tokens).logits
        for source in path, path / 'model.safetensors', path / 'bin':
            ours = GPT.from_pretrained(str(source)).eval()
            assert (ours(tokens) - wanted).abs().max() < 1e-4, source
        ours.save_pretrained(path / 'back')
        again = GPT2LMHeadModel.from_pretrained(path / 'back').eval()
        assert (again(tokens).logits - wanted).abs().max() < 1e-4


def test_ids_and_onehots_embed_bit_for_bit():
    gpt, tokens = tiny_gpt(), torch.randint(0, 13, (4, 9))
    onehots = F.one_hot(tokens, 13).float().requires_grad_()
    assert torch.equal(gpt.embed(tokens), gpt.embed(onehots))
    assert torch.equal(gpt(tokens), gpt(onehots))
    gpt(onehots).sum().backward()
    assert onehots.grad.abs().sum() > 0
    scorer = tiny_discriminator()
    prompt, response = tokens[:, :4], tokens[:, 4:8].view(4, 2, 2)
    pad = torch.zeros(4, dtype=torch.long)
    kinds = response, F.one_hot(response, 13).float()
    assert torch.equal(*(scorer(prompt, pad, kind) for kind in kinds))


def test_left_padding_changes_no_logit():
    gpt, tokens = tiny_gpt(), torch.randint(0, 13, (3, 10))
    pad = torch.tensor([0, 4, 9])
    logits = gpt(tokens, pad)
    assert logits.isfinite().all()
    for row, n in enumerate(pad.tolist()):
        alone = gpt(tokens[row:row + 1, n:])[0]
        assert (logits[row, n:] - alone).abs().max() < 1e-5
        changed = tokens.clone()
        changed[row, :n] = 7
        assert torch.equal(gpt(changed, pad)[row, n:], logits[row, n:])


def test_responses_that_share_a_prompt_are_as_if_alone():
    """Log-probs, entropies and scores of K responses in one row against each in its own; their
    gradients; ids and one-hots; responses of one token too."""
    for K, R in (1, 4), (3, 4), (3, 1), (2, 2):
        gpt, discriminator = tiny_gpt().double(), tiny_discriminator().double()
        prompt, pad = torch.randint(0, 13, (4, 6)), torch.tensor([0, 2, 5, 1])
        response, weight = torch.randint(0, 13, (4, K, R)), torch.randn(4, K, R).double()
        wanted = plain_logprobs(gpt, prompt, pad, response, .7)
        got = gpt.response_logprobs(prompt, pad, response, .7, entropy=True)
        for a, b in zip(wanted, got):
            assert a.shape == b.shape == (4, K, R) and (a - b).abs().max() < 1e-9
        a, b = (gradient(gpt, (z[0] * weight).sum()) for z in (wanted, got))
        assert (a - b).abs().max() < 1e-9 and a.abs().max() > 1e-3
        wanted = plain_scores(discriminator, prompt, pad, response)
        for kind in response, F.one_hot(response, 13).double():
            got = discriminator(prompt, pad, kind)
            assert got.shape == (4, K, R) and (wanted - got).abs().max() < 1e-9
        a, b = (gradient(discriminator, (z * weight).sum()) for z in (wanted, got))
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
    """K samples under one prompt and one cache, against plain rows recomputed at each token."""
    gpt, prompt, R, eos = tiny_gpt(), torch.randint(0, 12, (5, 8)), 9, 12
    pad = torch.tensor([0, 3, 7, 1, 5])
    for K, temperature, top_k in (3, 1.0, None), (1, .8, 4), (2, 0, None):
        roll = gpt.generate(prompt, pad, R, eos, K, temperature, top_k,
                            torch.Generator().manual_seed(3))
        rng = torch.Generator().manual_seed(3)
        assert roll.response.shape == roll.mask.shape == (5, K, R)
        tokens, pads = in_rows(prompt, pad, roll.response[..., :0])
        alive = torch.ones(5, K, dtype=torch.bool)
        for t in range(R):
            logits = gpt(tokens, pads)[:, -1].view(5, K, -1)
            if temperature and alive.any():
                logits = logits / temperature
                if top_k:
                    kth = logits.sort(-1, descending=True).values[..., top_k - 1:top_k]
                    logits[logits < kth] = -math.inf
                noise = model.exponential(model.uniform(logits.shape, logits, rng)).log()
                logits = logits - noise
            token = logits.argmax(-1).where(alive, eos)
            assert torch.equal(token, roll.response[..., t])
            assert torch.equal(alive, roll.mask[..., t])
            alive = alive & (token != eos)
            tokens = torch.cat((tokens, token.view(-1, 1)), 1)
        assert torch.equal(roll.ended, ~alive)


def test_a_rollout_that_shrinks_equals_one_that_does_not():
    """Prompts leave once all their answers are over, except where graphs want one shape."""
    gpt = tiny_gpt(block_size=40)
    with torch.no_grad():
        gpt.ln_f.bias[0] = 3.
        gpt.wte.weight[12, 0] = .9                   # eos comes often
    for K, B in (1, 23), (3, 11), (2, 1):
        prompt, pad = torch.randint(0, 12, (B, 20)), torch.randint(0, 20, (B,))
        found = []
        for gpt.compiled in False, True:             # which asks for static shapes
            sizes = []
            with patched(gpt, 'decode', lambda token, *a, sizes=sizes: (
                    sizes.append(len(token)) or GPT.decode(gpt, token, *a))):
                found.append(gpt.generate(prompt, pad, 8, 12, K,
                                          rng=torch.Generator().manual_seed(B)))
            if B > 1:
                assert (min(sizes) < B) == (not gpt.compiled), sizes
        assert all(map(torch.equal, *found))
        assert B == 1 or found[0].mask.sum(-1).min() < found[0].mask.sum(-1).max()


def test_checkpoints_are_strict_and_execute_nothing():
    path = folder('files')
    gpt = tiny_gpt()
    gpt.save_pretrained(path)
    raises(FileNotFoundError, ['nowhere', 'gpt2-medium'], GPT.from_pretrained, 'nowhere')
    raises(FileNotFoundError, ['model.safetensors'], GPT.from_pretrained, str(folder('empty')))
    weights = model.load_file(path / 'model.safetensors')
    for change, words in (({'h.0.ln_1.bias': None}, ['Missing', 'h.0.ln_1.bias']),
                          ({'h.0.extra': torch.ones(2)}, ['Unexpected', 'h.0.extra']),
                          ({'ln_f.bias': torch.ones(9)}, ['size mismatch for ln_f.bias', '[9]']),
                          ({'wpe.weight': None}, ['wpe.weight']),
                          ({'lm_head.weight': torch.ones(13, 8)}, ['tied'])):
        wrong = {k: v for k, v in {**weights, **change}.items() if v is not None}
        model.save_file(wrong, path / 'model.safetensors')
        raises(ValueError, [str(path), *words], GPT.from_pretrained, str(path))
    config = json.loads((path / 'config.json').read_text())
    model.save_file(weights, path / 'model.safetensors')
    for key, value in (('activation_function', 'relu'), ('n_head', 3), ('n_head', 0),
                       ('n_head', 2.0), ('n_head', True)):
        (path / 'config.json').write_text(json.dumps({**config, key: value}))
        raises(ValueError, [str(value), key], GPT.from_pretrained, str(path))
    (path / 'model.safetensors').write_bytes(b'{')
    raises(ValueError, ['model.safetensors'], GPT.from_pretrained, str(path))

    canary = path / 'canary'

    class Bomb:
        def __reduce__(self):
            return os.system, (f'touch {canary}',)

    torch.save({'model': Bomb()}, path / 'bomb.pt')
    raises(ValueError, ['bomb.pt', 'nothing executed'], load_checkpoint, path / 'bomb.pt')
    assert not canary.exists()
    save_checkpoint(path / 'good.pt', {'x': torch.arange(1000)})
    whole = (path / 'good.pt').read_bytes()
    for cut in 0, 1, 100, len(whole) // 2, len(whole) - 1:
        (path / 'cut.pt').write_bytes(whole[:cut])
        raises(ValueError, ['cut.pt'], load_checkpoint, path / 'cut.pt')


def test_checkpoints_of_others_are_read_or_refused_by_name():
    path = folder('of others')
    gpt = tiny_gpt(vocab_size=50257, n_layer=2)
    gpt.save_pretrained(path)
    (path / 'config.json').write_text((path / 'config.json').read_text(), encoding='utf-8-sig')
    weights, mine = model.load_file(path / 'model.safetensors'), gpt.state_dict()

    def is_read(source):
        read = GPT.from_pretrained(source).state_dict()
        assert read.keys() == mine.keys() and all(map(torch.equal, read.values(), mine.values()))

    is_read(path)                                    # a byte order mark in its config
    model.save_file({f'transformer.{k}': v for k, v in weights.items()}, path / 'one.safetensors')
    is_read(path / 'one.safetensors')
    for rows in 50258, 50304:                        # a [PAD]; filled up to a multiple of 64
        more = torch.cat((weights['wte.weight'], torch.ones(rows - 50257, 8)))
        torch.save({**weights, 'wte.weight': more, 'lm_head.weight': more}, path / 'padded.bin')
        is_read(path / 'padded.bin')

    args = dict(n_layer=2, n_head=2, n_embd=8, block_size=gpt.config.block_size, bias=True,
                vocab_size=50304, dropout=0.)        # as nanoGPT saves, compiled and under DDP
    for prefix in '', '_orig_mod.', 'module._orig_mod.':
        theirs = {f'{prefix}transformer.{k}': v for k, v in mine.items()}
        theirs[f'{prefix}lm_head.weight'] = mine['wte.weight']
        torch.save({'model': theirs, 'model_args': args, 'iter_num': 3}, path / 'ckpt.pt')
        is_read(path / 'ckpt.pt')
    torch.save(['abc'], path / 'list.bin')
    raises(ValueError, ['list.bin', 'damaged'], GPT.from_pretrained, path / 'list.bin')
    theirs = {k: v for k, v in theirs.items() if not k.endswith('.bias')}    # its default
    torch.save({'model': theirs, 'model_args': args}, path / 'ckpt.pt')
    raises(ValueError, ['ckpt.pt', 'Missing', 'bias'], GPT.from_pretrained, path / 'ckpt.pt')
    torch.save({'model': theirs, 'model_args': {**args, 'bias': False}}, path / 'ckpt.pt')
    raises(ValueError, ['ckpt.pt', 'has bias False'], GPT.from_pretrained, path / 'ckpt.pt')
    torch.save(mine, path / 'ckpt.pt')
    raises(ValueError, ['ckpt.pt', 'no model of'], GPT.from_pretrained, path / 'ckpt.pt')

    (path / 'model.safetensors').unlink()            # in shards
    names = sorted(weights)
    shards = {f'model-{i}.safetensors': names[i::2] for i in range(2)}
    for shard, held in shards.items():
        model.save_file({k: weights[k] for k in held}, path / shard)
    index = path / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': {k: s for s, held in shards.items() for k in held}}))
    is_read(path)
    (path / 'model-1.safetensors').unlink()
    raises(FileNotFoundError, [str(path), 'model-1.safetensors'], GPT.from_pretrained, path)
    for text in '{"weight_map": {', '[1]', '[' * 100000:
        index.write_text(text)
        raises(ValueError, [str(index), 'damaged'], GPT.from_pretrained, path)

    alone = folder('without config')                 # n_head is 64 channels in OpenAI's sizes alone
    model.save_file(weights, alone / 'model.safetensors')
    raises(ValueError, [str(alone), 'no config.json', 'n_head'], GPT.from_pretrained, alone)
    with torch.device('meta'):
        big = GPT(GPTConfig(8, 11)).to_empty(device='cpu')
    for p in big.parameters():
        p.data.zero_()
    big.save_pretrained(alone)
    (alone / 'config.json').unlink()
    assert GPT.from_pretrained(alone).config.n_head == 12
    big.wpe.weight.data[3] = math.nan
    big.save_pretrained(alone)
    raises(ValueError, [str(alone), 'not finite'], GPT.from_pretrained, alone)
    raises(FileNotFoundError, [str(SCRATCH), 'holds no weights'], GPT.from_pretrained, SCRATCH)


def test_a_save_that_fails_leaves_the_old_checkpoint():
    path = folder('atomic') / 'ckpt.pt'
    save_checkpoint(path, {'x': 1})

    class Unsavable:
        def __reduce__(self):
            raise OSError('disk full')

    raises(OSError, ['disk full'], save_checkpoint, path, {'x': Unsavable()})
    assert load_checkpoint(path) == {'x': 1}
    sizes = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50000, sizes[1]))             # as a full disk does
    try:
        raises(OSError, [str(path), 'could not be written', 'whole', '--resume'], save_checkpoint,
               path, {'x': torch.zeros(100000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, sizes)
        signal.signal(signal.SIGXFSZ, kept)
    assert load_checkpoint(path) == {'x': 1} and os.listdir(path.parent) == ['ckpt.pt']


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
        left = list(other)
        for w in one:
            if w in left:
                left.remove(w)
        same = len(other) - len(left)
        precision, recall = same / len(one), same / len(other)
        return 2 * precision * recall / (precision + recall) if same else 0.0

    rng = np.random.default_rng(0)
    pieces = 'the a an Old old, bridge Bridge! of the- 1,000 rock-n-roll . "' .split()

    def text():
        return ' '.join(rng.choice(pieces, rng.integers(0, 5)))

    examples = [{'answers': [text() for _ in range(rng.integers(0, 4))]} for _ in range(3000)]
    predictions = [text() if rng.random() < .8 else 'unanswerable' for _ in examples]
    em, f1 = [], []
    for prediction, example in zip(predictions, examples):
        said = [] if prediction == 'unanswerable' else words(prediction)
        golds = [words(a) for a in example['answers'] if words(a)] or [[]]
        em.append(max(float(said == g) for g in golds))
        f1.append(max(overlap(said, g) for g in golds))
    out = data.score_answers(predictions, examples)
    no = np.array([not e['answers'] for e in examples])
    assert .1 < no.mean() < .5 and .1 < np.mean(em) < np.mean(f1) < .9
    for name, rows in ('', no | ~no), ('has_', ~no), ('no_', no):
        assert math.isclose(out[f'{name}em'], 100 * np.mean(np.array(em)[rows]))
        assert math.isclose(out[f'{name}f1'], 100 * np.mean(np.array(f1)[rows]))


def test_order_is_a_pure_function_and_an_epoch_holds_everything():
    batches = [data.order(10, 4, 7, step) for step in range(5)]
    assert sorted(np.concatenate(batches)[:10]) == sorted(np.concatenate(batches)[10:]) \
        == list(range(10))
    assert np.array_equal(data.order(10, 4, 7, 3), batches[3])
    assert not np.array_equal(data.order(10, 4, 8, 0), batches[0])


def test_toy_set():
    enc = data.load_tokenizer('toy')
    train, dev = data.load_examples('toy', 'train'), data.load_examples('toy', 'dev')
    assert train == data.load_examples('toy', 'train')
    contexts = [{s for e in split for s in e['context'].split(' . ')} for split in (train, dev)]
    assert not contexts[0] & contexts[1]
    for e in train + dev:
        assert all(e['context'][e['start']:].startswith(a) for a in e['answers'])
    share = np.mean([not e['answers'] for e in train])
    assert .28 < share < .38, share
    cfg = reinforce.parse(['--tiny'])
    for split in (data.Split(s, enc, cfg.max_prompt, cfg.max_response) for s in (train, dev)):
        assert not split.cut_prompts and not split.cut_responses

    varied = data.load_examples('toy-varied', 'train', 20_000)               # of 100,000
    first = collections.Counter()
    for e in varied:
        assert len(set(e['answers'])) == len(e['answers']) != 1
        assert all(a in e['context'] for a in e['answers'])
        assert not e['answers'] or e['context'][e['start']:].startswith(e['answers'][0])
        if e['question'].startswith('Where') and e['answers']:
            first[e['answers'][0].split()[0] == 'in'] += 1
    assert abs(first[True] / first.total() - 1 / 3) < .05, first              # 1 to 1/2
    split = data.Split(varied, enc, cfg.max_prompt, cfg.max_response)
    assert not split.cut_prompts and not split.cut_responses


def test_prompts_are_cut_where_they_should_be():
    enc = data.load_tokenizer('toy')
    words = [f'{a} {b}' for a in data.FIRST[:5] for b in data.LAST[:2]]
    context = ' '.join(words)
    for at in 0, 9, 19:
        answer = context.split()[at]
        example = {'context': context, 'question': 'Who ?', 'answers': [answer],
                   'start': context.index(answer)}
        tokens, cut = data.encode_prompt(example, enc, 12, train=True)
        assert cut and len(tokens) == 12 and answer in enc.decode(tokens)
        tokens, cut = data.encode_prompt(example, enc, 12)
        assert enc.decode(tokens).split('\n')[0].endswith(context.split()[-1])
    assert enc.decode(data.encode_prompt(example, enc, 99)[0]) == \
        f'[CONTEXT] {context}\n[QUESTION] Who ?\n[ANSWER]'
    assert enc.decode(data.encode_prompt(example, enc, 99, context=False)[0]) == \
        '[QUESTION] Who ?\n[ANSWER]'
    split = data.Split([example], enc, 3, 1, train=True)
    assert (split.cut_prompts, split.cut_responses, split.lengths.tolist()) == (1, 1, [1])


def test_a_cut_prompt_keeps_its_answer():
    """In its middle, wherever answer_start says it is: behind blanks, 3 too far, in UTF-16 units or
    in bytes; with a blank at its end; where it just fits. Elsewhere it is cut from the left."""
    enc = data.load_tokenizer('toy')
    words = (data.FIRST * 17)[:300]
    words[150] = 'Żółć😀'
    context = ' '.join(words)
    at = context.index('Żółć😀')
    late = '😀' * 40 + ' Ada met Żółć😀 ' + context
    place = late.index('Żółć😀')
    units = len(late[:place].encode('utf-16-le')) // 2, len(late[:place].encode())
    examples = [dict(context='   ' * 20 + context, answers=['Żółć😀'], start=at + 60),
                *(dict(context=context, answers=['Żółć😀'], start=n) for n in (at, at + 3, 0)),
                *(dict(context=late, answers=['Żółć😀'], start=n) for n in units),
                dict(context=context.replace('😀', '. '), answers=['Żółć '], start=at)]
    for example in examples:
        example['question'], answer = 'Who ?', example['answers'][0].strip()
        tokens, cut = data.encode_prompt(example, enc, 64, train=True)
        body = enc.decode(tokens).removeprefix('[CONTEXT]').split('\n')[0]
        assert cut and len(tokens) == 64 and body.count(answer) == 1
        assert (' met ' in body) == (example['context'] == late)
        ids = enc.encode_ordinary(answer)            # 1 token before the body, 4 after it
        left = next(i for i in range(64) if tokens[i:i + len(ids)] == ids) - 1
        assert abs(left - (59 - left - len(ids))) <= 1, (left, len(ids))
    early = {**examples[1], 'context': 'Żzz Ada ' + context, 'answers': ['Żzz'], 'start': 0}
    tokens, _ = data.encode_prompt(early, enc, 64, train=True)
    assert enc.decode(tokens).startswith('[CONTEXT] Żzz Ada ')
    tokens, _ = data.encode_prompt(examples[1], enc, 12 + 5, train=True)     # 12 bytes fit
    assert tokens[1:13] == enc.encode_ordinary('Żółć😀')
    for n in 1, 2, 5, 40:                            # answers of as many tokens as there is room
        for first in 0, 100, 300 - n:
            answer = ' '.join(data.FIRST[(first + k) % 18] for k in range(n))
            example = {'context': ' '.join(data.FIRST * 17), 'question': 'Who ?',
                       'answers': [answer], 'start': 0}
            example['start'] = example['context'].index(answer)
            tokens, _ = data.encode_prompt(example, enc, n + 5, train=True)
            assert enc.decode(tokens) == f'[CONTEXT] {answer}\n[QUESTION] Who ?\n[ANSWER]'
    gone = {**early, 'answers': ['Otto Falk']}
    for train in False, True:
        tokens, _ = data.encode_prompt(gone, enc, 64, train=train)
        assert words[-1] in enc.decode(tokens)
    split = data.Split([*examples, early, gone], enc, 64, 9, train=True)
    assert split.moved == 6                          # all but three
    assert data.locate({'context': '1-1-1', 'answers': ['1-1'], 'start': 2}) == (2, 5)


def test_batches_are_padded_and_masked():
    enc = data.load_tokenizer('toy')
    split = data.Split(data.toy_examples('dev', 20), enc, 45, 7)
    batch = split.batch([3, 5])
    for row, i in enumerate((3, 5)):
        example, pad, n = split.examples[i], batch.pad[row], batch.mask[row].sum()
        assert (batch.prompt[row, :pad] == enc.eot_token).all()
        assert enc.decode(batch.prompt[row, pad:].tolist()).endswith('[ANSWER]')
        answer = example['answers'][0] if example['answers'] else data.UNANSWERABLE
        assert enc.decode(batch.response[row, :n].tolist()) == f' {answer}<|endoftext|>'
        assert (batch.response[row, n:] == enc.eot_token).all() and not batch.mask[row, n:].any()
    assert data.to_text(batch.response, batch.mask, enc)[0] == (
        split.examples[3]['answers'] or [data.UNANSWERABLE])[0]


def test_diversity_figures():
    response = torch.tensor([[1, 1, 1, 2], [1, 2, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    assert data.longest_run(response, mask).tolist() == [3, 1]
    assert data.distinct(response, mask, 2) == 3 / 5      # 11 11 12 | 12 29


def test_passages_are_packed():
    enc = data.load_tokenizer('toy')
    examples = [{'context': 'Ada sold it .'}, {'context': 'Ada sold it .'}, {'context': 'In May .'}]
    rows = data.load_passages(examples, enc, 4)
    ids = enc.encode_ordinary(' Ada sold it .') + [enc.eot_token] \
        + enc.encode_ordinary(' In May .') + [enc.eot_token]
    assert rows.shape == (len(ids) // 4, 4) and rows.flatten().tolist() == ids[:rows.size]
    assert data.load_passages(examples, enc, 99).tolist() == [(99 * ids)[:99]]
    gpt, passages = tiny_gpt(), torch.randint(0, 13, (3, 9))
    batch, cfg = data.passage_batch(passages.numpy(), 'cpu'), reinforce.Config(device='cpu')
    logp = gpt(passages)[:, :-1].log_softmax(-1)
    wanted = -logp.gather(-1, passages[:, 1:, None]).mean()
    assert abs(reinforce.mle_gradient(gpt, batch, 1., cfg) - wanted) < 1e-5


def test_squad_files_are_checked():
    path = folder('squad')
    qa = {'id': 'q7', 'question': 'Who?', 'is_impossible': False,
          'answers': [{'text': 'Ada', 'answer_start': 0}]}
    no = {'id': 'q8', 'question': 'Why?', 'is_impossible': True, 'answers': []}
    file = path / data.FILES['dev']
    raises(FileNotFoundError, ['dev-v2.0.json', '--data'], data.load_examples, str(path), 'dev')
    file.write_text(json.dumps({'data': [{'paragraphs': [{'context': 'Ada .', 'qas': [qa, no]}]}]}))
    assert data.load_examples(str(path), 'dev') == [
        {'id': 'q7', 'context': 'Ada .', 'question': 'Who?', 'answers': ['Ada'], 'start': 0},
        {'id': 'q8', 'context': 'Ada .', 'question': 'Why?', 'answers': [], 'start': -1}]
    for change, words in (({'question': None}, ['q7', 'question', 'NoneType']),
                          ({'answers': [{'text': 'Ada'}]}, ['q7', 'answer_start']),
                          ({'answers': [{'text': 'Ada', 'answer_start': 10 ** 20}]},
                           ['q7', 'answer_start', '0000']),
                          ({'answers': [{'text': 'Ada', 'answer_start': True}]}, ['q7', 'bool']),
                          ({'question': 'Who\ud800?'}, ['q7', 'question', 'surrogate']),
                          ({'answers': [{'text': ' ', 'answer_start': 0}]}, ['q7', 'empty']),
                          ({'id': 'q\udc00'}, ['article 0', 'id', 'surrogate']),
                          ({'answers': []}, ['q7', 'is_impossible False']),
                          ({'id': 7.5}, ['article 0', 'id', 'float'])):
        paragraph = {'context': 'Ada .', 'qas': [{**qa, **change}]}
        file.write_text(json.dumps({'data': [{'paragraphs': [paragraph]}]}))
        raises(ValueError, ['dev-v2.0.json', *words], data.load_examples, str(path), 'dev')
    del no['is_impossible']
    text = json.dumps({'data': [{'paragraphs': [{'context': 'Ada .', 'qas': [qa, no]}]}]})
    file.write_text(text)
    raises(ValueError, ['q8', "no 'is_impossible'"], data.load_examples, str(path), 'dev')
    qa['id'], no['is_impossible'] = 7, True
    text = json.dumps({'data': [{'paragraphs': [{'context': 'Ada .', 'qas': [qa, no]}]}]})
    file.write_text(text, encoding='utf-8-sig')      # with a byte order mark
    assert [e['id'] for e in data.load_examples(str(path), 'dev')] == ['7', 'q8']
    file.write_text('{"data": []}')
    raises(ValueError, ['no question'], data.load_examples, str(path), 'dev')
    file.write_text('{"data": [')
    raises(ValueError, ['not JSON'], data.load_examples, str(path), 'dev')


def test_real_squad():
    if not SHARED.is_dir():
        raise unittest.SkipTest('the SQuAD files are not beside this repository')
    enc = data.load_tokenizer('squad')
    dev = data.load_examples(str(SHARED / 'squad'), 'dev')
    assert len(dev) == 1895 and sum(not e['answers'] for e in dev) == 914
    some = data.load_examples(str(SHARED / 'squad'), 'dev', 1000)           # evenly spread
    assert len(some) == 1000 and some[0] == dev[0] and some[-1] in dev[-3:]
    train = data.load_examples(str(SHARED / 'squad'), 'train')
    split = data.Split(train, enc, 128, 32, train=True)
    assert len(split) == 12129 and split.cut_prompts > 5000
    lost = sum(e['answers'][0] not in enc.decode(p.tolist()) for e, p in
               zip(train, split.prompts) if e['answers'])
    assert lost == split.moved == 0                  # the cut keeps the answer in the prompt


# -----------------------------------------------------------------------------
# reinforce: oracles


def every_response(V, R, eos):
    """All responses of at most R tokens as (n, R) ids filled with eos, and their mask."""
    rows = []
    for y in itertools.product(range(V), repeat=R):
        end = next((t for t, token in enumerate(y) if token == eos), R - 1)
        if all(token == eos for token in y[end + 1:]):
            rows.append((y, [t <= end for t in range(R)]))
    return torch.tensor([y for y, _ in rows]), torch.tensor([m for _, m in rows])


def enumerated():
    """A float64 policy, its reference, one prompt and all 15 responses to it, (1, 15, 3), with
    rewards of tokens that depend on the tokens up to them and on nothing to their right."""
    V, R, eos = 3, 3, 2
    policy, reference = (tiny_gpt(seed, vocab_size=V, n_layer=1).double() for seed in (1, 2))
    response, mask = every_response(V, R, eos)
    assert len(response) == 15
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
    grads = torch.autograd.grad(value, list(network.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def gradient_of_both(network, *values):
    return [torch.cat([g.flatten() for g in torch.autograd.grad(
        v, list(network.parameters()), retain_graph=True, allow_unused=True) if g is not None])
        for v in values]


class Keep(torch.optim.SGD):
    """An optimizer that moves nothing and keeps the gradient it was last given."""

    def __init__(self, network):
        super().__init__(network.parameters(), lr=0.)

    def step(self):
        params = self.param_groups[0]['params']
        self.kept = torch.cat([p.grad.flatten() for p in params if p.grad is not None]).cpu()


def test_reinforce_gradient_is_exact():
    policy, logprobs, _, mask, ref_logprobs, reward = enumerated()
    beta, n, now = .3, 15, logprobs() * mask
    p = now.sum(-1).exp()                                                    # (1, 15)
    assert abs(p.sum().item() - 1) < 1e-9
    log_ratio = now - ref_logprobs * mask
    exact = gradient(policy, (p * (reward - beta * log_ratio).sum(-1)).sum())
    rewards, p = (reward - beta * log_ratio).detach(), p.detach()

    now = logprobs()
    A = reinforce.advantages(rewards, 'mean', .7)
    loss = sum(p[0, i] * reinforce.policy_loss(now[:, [i]], A[:, [i]], mask[:, [i]])
               for i in range(n))
    assert (gradient(policy, -loss) - exact).abs().max() < 1e-9

    now, loss = logprobs(), 0.                       # leave-one-out: all pairs of responses
    for pair in itertools.product(range(n), repeat=2):
        pair = list(pair)
        A = reinforce.advantages(rewards[:, pair], 'loo', 0.)
        loss = loss + p[0, pair].prod() / 2 * reinforce.policy_loss(now[:, pair], A, mask[:, pair])
    assert (gradient(policy, -loss) - exact).abs().max() < 1e-9


@unclipped
def test_reinforce_step_takes_the_gradient_of_its_parts():
    cfg, policy, reference, _, batch, roll = case(reinforce, '--beta', '.3', '--micro_batch', '3',
                                                  '--anchor', '.5')
    rewards, optimizer = torch.randn(4, 2, 4) * roll.mask, Keep(policy)
    figures = reinforce.reinforce_step(policy, reference, optimizer, batch, roll, rewards, 0., 0.,
                                       cfg)
    logprobs, entropy = plain_logprobs(policy, *batch[:2], roll.response)
    log_ratio = logprobs - plain_logprobs(reference, *batch[:2], roll.response)[0]
    A = reinforce.advantages((rewards - .3 * log_ratio * roll.mask).detach(), 'loo', 0.)
    gold = plain_logprobs(policy, *batch[:2], batch.response[:, None])[0][:, 0]
    mle = -gold[batch.mask].mean()
    loss = -(A * logprobs)[roll.mask].sum() / 8
    wanted = gradient(policy, loss + .5 * mle)
    assert (optimizer.kept - wanted).abs().max() < 1e-5 and wanted.abs().max() > 1e-3
    told = {'g_loss': loss, 'mle': mle, 'kl': log_ratio[roll.mask].mean(),
            'entropy': entropy[roll.mask].mean(), 'g_norm': wanted.norm(),
            'return_mean': (rewards - .3 * log_ratio * roll.mask).sum() / 8}
    assert figures.keys() == told.keys()
    assert all(abs(figures[k] - v.item()) < 1e-4 for k, v in told.items()), (figures, told)


def test_a_running_mean_starts_at_the_first_return():
    """An equal return of all samples moves nothing, be it the first step and far from 0."""
    cfg, policy, reference, _, batch, roll = case(reinforce, '--baseline', 'mean', '--anchor', '0',
                                                  '--micro_batch', '3')
    last = roll.mask & ~F.pad(roll.mask[..., 1:], (0, 1))
    optimizer = Keep(policy)
    figures = reinforce.reinforce_step(policy, reference, optimizer, batch, roll, 5. * last, None,
                                       0., cfg)
    assert figures['return_mean'] == 5 and optimizer.kept.abs().max() == 0


def test_the_policy_that_learns_is_the_one_that_sampled():
    """Away from temperature 1 too: a policy is 0 nats from itself, and its log-probs are of that
    temperature."""
    for script in reinforce, ppo:
        cfg, policy, _, _, batch, roll = case(script, '--temperature', '.5', '--anchor', '0', *(
            ['--minibatch', '4', '--pretrain', '0'] if script is ppo else []))
        rewards = torch.randn(4, 2, 4) * roll.mask
        if script is ppo:
            critic = tiny_discriminator(4, ppo.Critic)
            wanted = plain_logprobs(policy, *batch[:2], roll.response, .5)[0]
            past = ppo.look_back(policy, policy, critic, batch, roll, cfg)
            assert all((z - wanted).abs().max() < 1e-5 for z in past[:2])
            figures = ppo.ppo_step(policy, policy, critic, (Keep(policy), Keep(critic)), batch,
                                   roll, rewards, None, {'updates': 0}, (0., 0.), cfg)
            assert figures['approx_kl'] < 1e-9 and 'mle' not in figures
        else:
            figures = reinforce.reinforce_step(policy, policy, Keep(policy), batch, roll, rewards,
                                               0., 0., cfg)
        assert abs(figures['kl']) < 1e-5


def test_a_reward_is_the_margin_to_the_gold_answer():
    for kind, whole in ('margin', ''), ('margin', '--no-d_prefixes'), ('score', ''), ('none', ''):
        cfg, _, _, network, batch, roll = case(reinforce, '--micro_batch', '3', '--reward', kind,
                                               *filter(None, [whole]))
        rewards, mean = reinforce.reward(network, batch, roll, cfg)
        s = plain_scores(network, *batch[:2], roll.response)
        s_gold = plain_scores(network, *batch[:2], batch.response[:, None])
        ends = []
        for row, k in itertools.product(range(4), range(2)):
            last, gold_last = int(roll.mask[row, k].sum()) - 1, int(batch.mask[row].sum()) - 1
            gold_last = gold_last if whole else min(last, gold_last)
            margin = (s[row, k, last] - s_gold[row, 0, gold_last]).item()
            wanted = {'margin': 2 / (1 + math.exp(-margin)) - 1, 'score': s[row, k, last].item(),
                      'none': 0.}[kind] if roll.ended[row, k] else -1.
            assert abs(rewards[row, k, last].item() - wanted) < 1e-5, (kind, row, k)
            assert rewards[row, k].count_nonzero() <= 1
            ends.append(s[row, k, last].item())
        assert abs(mean - np.mean(ends)) < 1e-5
        assert kind != 'margin' or abs(rewards[0, 0].sum()) < 1e-6           # the gold answer


def test_a_prefix_has_no_score_for_what_comes_after_it():
    """
    Gold and sampled answers begin alike, with one of two tokens, and go on differently: one of the
    two is longer among the gold answers, the other among the samples. The best score of a prefix,
    from a table, by all pairs, is the same for both tokens; Gumbel-softmax has the same places.
    """
    a, b, eos = 0, 1, 2
    answers = torch.tensor([[a, eos, eos], [a, a, eos], [b, eos, eos], [b, b, eos]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]] * 2).bool()
    gold_p, fake_p = torch.tensor([[.45, .05, .05, .45], [.05, .45, .45, .05]]).double()
    table = torch.zeros(3, 9, dtype=torch.double, requires_grad=True)        # by column and prefix
    prefix = (answers * 3 ** torch.arange(3)).cumsum(1) % 9
    pairs = gold_p[:, None] * fake_p                                         # (gold, sample)
    for script in SCRIPTS:
        w = script.compared(answers.expand(4, 4, 3), mask.expand(4, 4, 3), answers, mask, True)
        torch.nn.init.zeros_(table)
        optimizer = torch.optim.Adam([table], .1)
        for step in range(400):
            s = model.hold_last(table[torch.arange(3), prefix], mask)
            terms = script.discriminator_loss(s[:, None], s, 'pair') * w
            optimizer.zero_grad()
            (terms.sum(-1) * pairs).sum().backward()
            optimizer.param_groups[0]['lr'] = .1 * (1 - step / 400)
            optimizer.step()
        apart = (table[0, a] - table[0, b]).item()
        print(f'# {script.__name__}: first tokens apart by {apart:.5f}')
        assert abs(apart) < 1e-3
        assert (table[1, prefix[0, 1]] - table[1, prefix[1, 1]]).item() > 1   # and second ones are


def test_equal_scores_count_half():
    for script in SCRIPTS:
        minibatch = ['--minibatch', '4'] if script is ppo else []
        cfg, gpt, _, network, batch, roll = case(script, *minibatch)
        torch.nn.init.zeros_(network.score.weight)
        first = (network, gpt) if script is gumbel else (network,)
        more = (.7, torch.Generator()) if script is gumbel else ()
        record = script.discriminator_step(*first, None, batch, roll, False, *more, cfg)
        assert record['d_acc'] == .5, record


@unclipped
def test_discriminator_gradient_is_that_of_the_objective():
    """Of the poster's, log D(x, y*) + log(1 - D(x, y)), and of the pair's, written by hand, whole
    and by prefixes, in micro-batches; a tie and eos included."""
    for kind, prefixes in itertools.product(('minimax', 'pair'), (False, True)):
        cfg, _, _, network, batch, roll = case(reinforce, '--d_loss', kind, '--micro_batch', '3')
        cfg.d_prefixes, optimizer = prefixes, Keep(network)
        out = reinforce.discriminator_step(network, optimizer, batch, roll, True, cfg)
        s = plain_scores(network, *batch[:2], roll.response)
        s_gold = plain_scores(network, *batch[:2], batch.response[:, None])[:, 0]
        losses, right = [], []
        for row, k in itertools.product(range(4), range(2)):
            if torch.equal(roll.response[row, k], batch.response[row]):
                continue                             # a tie is in no loss
            ends = int(batch.mask[row].sum()) - 1, int(roll.mask[row, k].sum()) - 1
            first = int((roll.response[row, k] != batch.response[row]).nonzero()[0])
            terms = []
            for t in range(first if prefixes else max(ends), max(ends) + 1):
                a, b = s_gold[row, min(t, ends[0])], s[row, k, min(t, ends[1])]
                terms.append(-torch.log(torch.sigmoid(a - b)) if kind == 'pair' else
                             -torch.log(torch.sigmoid(a)) - torch.log(1 - torch.sigmoid(b)))
            losses += terms
            right.append((a > b).item())
        loss = sum(losses) / len(losses)
        assert len(right) == 7
        wanted = gradient(network, loss)
        assert (optimizer.kept - wanted).abs().max() < 1e-5 and wanted.abs().max() > 1e-3
        assert abs(out['d_loss'] - loss.item()) < 1e-5 and abs(out['tie_rate'] - 1 / 8) < 1e-6
        assert abs(out['d_acc'] - np.mean(right)) < 1e-6


def test_a_batch_of_ties_moves_no_discriminator():
    cfg, _, _, network, batch, _ = case(reinforce)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    roll = Rollout(*(z[:, None].expand(-1, 2, -1) for z in batch[2:]), torch.ones(4, 2).bool())
    out = reinforce.discriminator_step(network, model.adamw(network), batch, roll, True, cfg)
    assert out == {'d_loss': None, 'd_norm': None, 'd_acc': None, 'tie_rate': 1.0}
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_eos_is_trained_and_what_follows_it_is_not():
    gpt, eos, cfg = tiny_gpt(), 12, reinforce.Config(device='cpu')
    prompt, pad = torch.randint(0, 12, (1, 4)), torch.zeros(1, dtype=torch.long)
    mask, found = torch.tensor([[True, True, False]]), []
    for t in eos, 5:
        gpt.zero_grad()
        batch = data.Batch(prompt, pad, torch.tensor([[3, eos, t]]), mask)
        found.append((reinforce.mle_gradient(gpt, batch, 1., cfg), gpt.wpe.weight.grad.clone()))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    before = gpt(torch.cat((prompt, torch.tensor([[3]])), 1))[0, -1].softmax(-1)[eos]
    torch.optim.SGD(gpt.parameters(), lr=.1).step()
    assert gpt(torch.cat((prompt, torch.tensor([[3]])), 1))[0, -1].softmax(-1)[eos] > before


def test_micro_batches_bound_every_pass():
    """No pass that learns, or that the discriminator or the reference makes, has more prompts than
    --micro_batch, the anchor's and the warm start's included."""
    for script in SCRIPTS:
        rows, hidden = {}, GPT.hidden

        def watched(self, x, pad, P, R, cache=None, t=None, rows=rows, hidden=hidden):
            if cache is None:
                key = torch.is_grad_enabled(), P, R
                rows[key] = max(len(x), rows.get(key, 0))
            return hidden(self, x, pad, P, R, cache, t)

        with patched(GPT, 'hidden', watched):
            train(script, folder('micro'), *SMALL, '--micro_batch', '3', '--eval_prompts', '6',
                  *(['--minibatch', '8'] if script is ppo else []))
        learning = {key: n for key, n in rows.items() if key[0]}
        assert len(learning) >= 2 and max(learning.values()) == 3, rows
        assert max(rows.values()) <= 6, rows         # evaluations: 3 x 2 answers


# -----------------------------------------------------------------------------
# ppo: oracles


def test_gae_equals_the_double_sum():
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 20, 2, 6, generator=g, dtype=torch.double)
    lengths = torch.randint(1, 7, (20, 2), generator=g)
    mask = torch.arange(6) < lengths[..., None]
    rewards = rewards * mask
    for lam in 0., .3, .95, 1.:
        A, returns = ppo.gae(rewards, values, mask, lam)
        for at in itertools.product(range(20), range(2)):
            n = int(lengths[at])
            V = [*values[at][:n].tolist(), 0.]       # what stands after eos does not count
            for t in range(n):
                wanted = sum(lam ** (k - t) * (rewards[at][k].item() + V[k + 1] - V[k])
                             for k in range(t, n))
                assert abs(A[at][t].item() - wanted) < 1e-12
                assert abs(returns[at][t].item() - wanted - V[t]) < 1e-12
        assert not A[~mask].any() and not returns[~mask].any()
    centred = ppo.centre(A, mask)
    assert abs(centred[mask].mean()) < 1e-12 and not centred[~mask].any()
    # noise stays as small as it is
    assert (centred - (A - A[mask].mean()))[mask].abs().max() < 1e-12


def test_ppo_gradient_at_ratio_one_is_exact():
    """It is REINFORCE's with the same baseline, and that of the KL-penalised objective."""
    policy, logprobs, response, mask, ref_logprobs, reward = enumerated()
    beta, now = .3, logprobs()
    p = (now * mask).sum(-1).exp()
    log_ratio = (now - ref_logprobs) * mask
    exact = gradient(policy, (p * (reward - beta * log_ratio).sum(-1)).sum())
    rewards, p = (reward - beta * log_ratio).detach(), p.detach()
    before = F.pad(response[..., :-1] + 1, (1, 0))
    critic = torch.sin((before * 5 ** torch.arange(3)).cumsum(-1).double())   # of what precedes y_t
    for values in torch.full_like(rewards, .7), critic:
        A, _ = ppo.gae(rewards, values, mask, 1.)
        now = logprobs()
        loss = sum(p[0, i] * ppo.clipped_policy_loss(
            *(z[:, [i]] for z in (now, now.detach(), A, mask)), 1e9) for i in range(15))
        assert (gradient(policy, -loss) - exact).abs().max() < 1e-9
    A = reinforce.advantages(rewards, 'mean', .7)
    same_A, _ = ppo.gae(rewards, torch.full_like(rewards, .7), mask, 1.)
    assert ((A - same_A) * mask).abs().max() < 1e-12


def test_clipping_by_hand():
    eps, one = .2, torch.ones(1, 1).bool()
    # ratio, advantage, loss, whether a gradient flows
    for ratio, A, loss, flows in ((1., 2., -2., True), (1.5, 2., -2.4, False), (1.5, -2., 3., True),
                                  (.5, 2., -1., True), (.5, -2., 1.6, False),
                                  (1.1, -1., 1.1, True)):
        new = torch.tensor([[math.log(ratio) - 1]], requires_grad=True)
        out = ppo.clipped_policy_loss(new, torch.tensor([[-1.]]), torch.tensor([[A]]), one, eps)
        out.backward()
        assert abs(out.item() - loss) < 1e-5 and bool(new.grad) == flows, (ratio, A)
        assert not flows or abs(new.grad.item() + ratio * A) < 1e-5
    # value, its old one, return, loss, whether a gradient flows
    for value, old, target, loss, flows in ((1., 1., 3., 2., True), (2., 1., 3., 1.62, False),
                                            (2., 1., 0., 2., True), (1.1, 1., 3., 1.805, True)):
        new = torch.tensor([[value]], requires_grad=True)
        out = ppo.value_loss(new, torch.tensor([[old]]), torch.tensor([[target]]), one, eps)
        out.backward()
        assert abs(out.item() - loss) < 1e-5 and bool(new.grad) == flows, (value, old, target)


def test_nothing_is_exponentiated_outside_the_mask():
    mask = torch.tensor([[[True, False]]])
    new = torch.tensor([[[-1., 200.]]], requires_grad=True)
    loss = ppo.clipped_policy_loss(new, torch.full((1, 1, 2), -1.), torch.ones(1, 1, 2), mask, .2)
    loss.backward()
    assert loss.item() == -1 and new.grad.tolist() == [[[-1., 0.]]]


def ppo_case(*flags):
    """`case` with a critic, rewards, optimizers that keep gradients, and passages."""
    cfg, policy, reference, _, batch, roll = case(ppo, '--minibatch', '4', *flags)
    critic = tiny_discriminator(4, ppo.Critic)
    rewards = torch.randn(4, 2, 4) * roll.mask
    optimizers = [Keep(net) for net in (policy, critic)]
    return (cfg, policy, reference, critic, batch, roll, rewards, optimizers,
            torch.randint(0, 13, (3, 9)).numpy())


@unclipped
def test_ppo_update_takes_the_gradient_of_its_parts():
    """In micro-batches, with ratios away from 1."""
    cfg, policy, reference, critic, batch, roll, rewards, optimizers, passages = ppo_case(
        '--pretrain', '.7', '--anchor', '.4', '--micro_batch', '2')
    mask = roll.mask
    old, _, values, entropy = ppo.look_back(policy, reference, critic, batch, roll, cfg)
    for z, wanted in zip((old, entropy), plain_logprobs(policy, *batch[:2], roll.response)):
        assert (z - wanted).abs().max() < 1e-5
    # the critic's value of a token depends on nothing from that token on
    changed = roll.response.clone()
    changed[..., 2:] = 7
    again = critic(*batch[:2], changed)
    assert (again[..., :3] - values[..., :3]).abs().max() < 1e-6
    assert (again[..., 3] - values[..., 3]).abs().max() > 1e-3
    old = old + .3 * torch.randn(old.shape)
    A, returns = ppo.gae(rewards, values, mask, .9)
    past = old, values - .5, A, returns
    figures = ppo.ppo_update(policy, critic, optimizers, batch, roll, past,
                             data.passage_batch(passages, 'cpu'), (0., 0.), cfg)
    logprobs, _ = plain_logprobs(policy, *batch[:2], roll.response)
    loss = ppo.clipped_policy_loss(logprobs, old, A, mask, .2) / mask.sum()
    mle = -plain_logprobs(policy, *batch[:2], batch.response[:, None])[0][:, 0][batch.mask].mean()
    ids = torch.from_numpy(passages)
    extra = -policy(ids)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
    wanted = gradient(policy, loss + .4 * mle + .7 * extra)
    assert (optimizers[0].kept - wanted).abs().max() < 1e-5 and wanted.abs().max() > 1e-3
    v_loss = ppo.value_loss(critic(*batch[:2], roll.response), values - .5, returns, mask, .2
                            ) / mask.sum()
    wanted_critic = gradient(critic, v_loss)
    assert (optimizers[1].kept - wanted_critic).abs().max() < 1e-5
    ratio = (logprobs - old).exp()[mask]
    told = {'g_loss': loss, 'v_loss': v_loss, 'approx_kl': (ratio - 1 - ratio.log()).mean(),
            'mle': mle, 'pretrain': extra, 'g_norm': wanted.norm(), 'v_norm': wanted_critic.norm()}
    assert figures.keys() == told.keys()
    assert all(abs(figures[k] - v.item()) < 1e-4 for k, v in told.items()), (figures, told)


@unclipped
def test_ppo_step_takes_its_gradient_from_scores_to_both_networks():
    """KL into the reward, GAE, centring, losses: written out here for one update of all rows."""
    cfg, policy, reference, critic, batch, roll, rewards, optimizers, passages = ppo_case(
        '--beta', '.3', '--lam', '.8', '--anchor', '.4')
    running, mask = {'updates': 1}, roll.mask
    logprobs = plain_logprobs(policy, *batch[:2], roll.response)[0]
    values = critic(*batch[:2], roll.response)
    with torch.no_grad():
        ref_logprobs = plain_logprobs(reference, *batch[:2], roll.response)[0]
        log_ratio = (logprobs - ref_logprobs)[mask]
        r, V = rewards.clone(), values * mask
        r[mask] -= .3 * log_ratio
        A = torch.zeros_like(r)
        for b, k, t in mask.nonzero().tolist():
            for i in range(t, int(mask[b, k].sum())):
                after = V[b, k, i + 1] if i + 1 < r.size(-1) else 0
                A[b, k, t] += .8 ** (i - t) * (r[b, k, i] + after - V[b, k, i])
        returns = (A + V)[mask]
        centred = A - A[mask].mean()
    drawn = torch.from_numpy(passages)[data.order(3, ppo.PASSAGES, (cfg.seed, 2), 1)]
    gold = plain_logprobs(policy, *batch[:2], batch.response[:, None])[0][:, 0]
    extra = -policy(drawn)[:, :-1].log_softmax(-1).gather(-1, drawn[:, 1:, None]).mean()
    loss = (-(centred * (logprobs - logprobs.detach()).exp())[mask].mean()
            - .4 * gold[batch.mask].mean() + cfg.pretrain * extra)
    v_loss = .5 * (values[mask] - returns).square().mean()
    wanted = gradient(policy, loss), gradient(critic, v_loss)
    record = ppo.ppo_step(policy, reference, critic, optimizers, batch, roll, rewards, passages,
                          running, (0., 0.), cfg)
    for optimizer, grad in zip(optimizers, wanted):
        assert (optimizer.kept - grad).abs().max() < 1e-5 and grad.abs().max() > 1e-3
    assert abs(record['kl'] - log_ratio.mean()) < 1e-4 and record['updates'] == 1
    assert running == {'updates': 2}


def test_no_token_after_eos_moves_anything():
    found = []
    for garbage in False, True:
        cfg, policy, reference, critic, batch, roll, rewards, optimizers, passages = ppo_case(
            '--beta', '.1')
        if garbage:
            junk = torch.randint(0, 12, roll.response.shape)
            roll = roll._replace(response=roll.response.where(roll.mask, junk))
        torch.manual_seed(0)                         # the order of the minibatches
        record = ppo.ppo_step(policy, reference, critic, optimizers, batch, roll, rewards, passages,
                              {'updates': 0}, (0., 0.), cfg)
        found.append((*(o.kept for o in optimizers), record))
    assert (found[0][0] - found[1][0]).abs().max() < 1e-6
    assert (found[0][1] - found[1][1]).abs().max() < 1e-6
    for key, value in found[0][2].items():
        assert abs(value - found[1][2][key]) < 1e-5, key


def test_ppo_takes_minibatches_and_stops_early():
    for limit, updates in (1e-7, 2), (1e9, 6):       # the first ratio is 1, the second is not
        cfg, policy, reference, critic, batch, roll, rewards, _, passages = ppo_case(
            '--epochs', '3', '--minibatch', '2', '--pretrain', '0', '--anchor', '0')
        optimizers, running = [model.adamw(net) for net in (policy, critic)], {'updates': 0}
        with patched(ppo, 'APPROX_KL', limit):
            record = ppo.ppo_step(policy, reference, critic, optimizers, batch, roll, rewards, None,
                                  running, (1e-3, 1e-3), cfg)
        assert running['updates'] == record['updates'] == updates
        assert 'pretrain' not in record and 'mle' not in record


# -----------------------------------------------------------------------------
# gumbel


def fixed_noise(logits, response, rng):
    """In `conditional_noise`'s place: no draw, so that the layout does not matter."""
    V = logits.size(-1)
    return 3. * F.one_hot(response, V) + .1 * torch.arange(V, device=logits.device)


def test_relaxed_answers_have_their_tokens_as_argmax():
    for kind in torch.float32, torch.bfloat16:
        cfg, gpt, _, _, batch, roll = case(gumbel, '--temperature', '.5')
        cfg.dtype = str(kind).split('.')[1]
        answers, mask, logits = gumbel.encode(gpt, batch, roll, .7, torch.Generator(), cfg)
        response, wanted_mask = gumbel.beside_gold(batch, roll)
        assert torch.equal(answers.argmax(-1), response) and torch.equal(mask, wanted_mask)
        assert logits.dtype == torch.float32 and (answers.sum(-1) - 1).abs().max() < 1e-5
        onehots = F.one_hot(response, 13).float()
        assert torch.equal(answers[~mask], onehots[~mask])           # what follows eos
        assert (answers - onehots)[mask].abs().max() > .1
        cfg.encoding = 'hard'
        answers, _, _ = gumbel.encode(gpt, batch, roll, .7, torch.Generator(), cfg)
        assert (answers - onehots).abs().max() < 1e-6 and answers.requires_grad
        cfg.encoding = 'mixed'
        answers, _, _ = gumbel.encode(gpt, batch, roll, .7, torch.Generator(), cfg)
        assert torch.equal(answers[:, 0], onehots[:, 0])
        assert (answers - onehots)[:, 1:].abs().max() > .1


def test_exponential_draws_are_exponential():
    for kind in torch.float32, torch.float64:
        rng, N = torch.Generator().manual_seed(0), 400000
        draws = model.uniform((N,), torch.empty(0, dtype=kind), rng)
        e = model.exponential(draws).double().sort().values
        uniform = torch.arange(1, N + 1).double() / N
        assert (-(-e).expm1() - uniform).abs().max() < 1.95 / math.sqrt(N)   # p = .001
        assert e[0] > 0 and e.log().isfinite().all()
    e = model.exponential(torch.tensor([0., 1 - 2 ** -24, .5]))
    assert e.log().isfinite().all() and e[0] > e[2] > e[1] > 0


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
    # another token than the likeliest, by rejection
    free = -torch.empty(N, V).double().exponential_(generator=rng).log()
    wanted = free[(logits[:, 0] + free).argmax(-1) == 1]
    got = gumbel.conditional_noise(logits, torch.ones(N, 1, dtype=torch.long), rng)[:, 0]
    for a, b in ((z.mean(0), z.var(0)) for z in (got, wanted)), :
        assert (a[0] - b[0]).abs().max() < .05 and (a[1] - b[1]).abs().max() < .1, (a, b)


def test_gumbel_gradient_is_that_of_the_sequential_sampler():
    """One token at a time without a cache, its prefix detached, against the one parallel pass,
    under the same noise; straight-through."""
    cfg, gpt, _, discriminator, batch, roll = case(gumbel, '--temperature', '.5', '--encoding',
                                                   'hard', dtype=torch.float64)
    response, mask = gumbel.beside_gold(batch, roll)
    columns = []
    for t in range(4):
        logits = gpt(*in_rows(*batch[:2], response[..., :t]))[:, -1].view(4, 3, -1) / .5
        y = ((logits + fixed_noise(logits, response[..., t], None)) / .7).softmax(-1)
        onehot = F.one_hot(response[..., t], 13)
        columns.append(torch.where(mask[..., t, None], onehot + y - y.detach(), onehot))
    with patched(gumbel, 'conditional_noise', fixed_noise):
        z, _, _ = gumbel.encode(gpt, batch, roll, .7, None, cfg)
    grads = [gradient(gpt, gumbel.score(discriminator, batch, answers, mask, cfg)[..., -1].mean())
             for answers in (torch.stack(columns, 2), z)]
    assert (grads[0] - grads[1]).abs().max() < 1e-9 and grads[0].abs().max() > 1e-4


def pair_loss_by_hand(s, response, mask, sign):
    """Of scores (B, 1 + K, R) of a gold answer and samples, at all prefixes from the first
    difference on, a list; sign 1 for the generator, -1 for the discriminator."""
    terms = []
    for row, k in itertools.product(range(len(s)), range(1, s.size(1))):
        if torch.equal(response[row, k], response[row, 0]):
            continue                                 # a tie
        gold_last, last = (int(mask[row, j].sum()) - 1 for j in (0, k))
        first = int((response[row, k] != response[row, 0]).nonzero()[0])
        real = s[row, 0].detach() if sign > 0 else s[row, 0]
        terms += [F.softplus(sign * (real[min(t, gold_last)] - s[row, k, min(t, last)]))
                  for t in range(first, max(last, gold_last) + 1)]
    return terms


@unclipped
def test_gumbel_steps_take_the_gradient_of_their_parts():
    """Both networks', by hand: from the first difference on, a tie left out; in micro-batches."""
    for encoding in 'soft', 'hard', 'mixed':
        cfg, gpt, reference, discriminator, batch, roll = case(
            gumbel, '--micro_batch', '3', '--beta', '.3', '--encoding', encoding, '--temperature',
            '.5', '--anchor', '.4')
        response, mask = gumbel.beside_gold(batch, roll)
        logits, ref_logits = (
            (net(*in_rows(*batch[:2], response))[:, 4:-1] / .5).view(4, 3, 4, 13)
            for net in (gpt, reference))
        soft = ((logits + fixed_noise(logits, response, None)) / .7).softmax(-1)
        onehots = F.one_hot(response, 13).float()
        z = torch.where(mask[..., None], soft, onehots)
        z = onehots + z - z.detach() if encoding == 'hard' else z
        z = torch.cat((onehots[:, :1], z[:, 1:]), 1) if encoding == 'mixed' else z

        optimizer, d_optimizer = Keep(gpt), Keep(discriminator)
        with patched(gumbel, 'conditional_noise', fixed_noise):
            record = gumbel.gumbel_step(gpt, reference, discriminator, optimizer, batch, roll, 0.,
                                        .7, None, cfg)
            assert all(q.grad is None for q in discriminator.parameters())
            d_record = gumbel.discriminator_step(discriminator, gpt, d_optimizer, batch, roll, True,
                                                 .7, None, cfg)
            assert all(q.grad is None for q in gpt.parameters())
        s = discriminator(*batch[:2], z.detach())
        terms = pair_loss_by_hand(s, response, mask, -1)
        wanted = gradient(discriminator, sum(terms) / len(terms))
        assert (d_optimizer.kept - wanted).abs().max() < 1e-5 and wanted.abs().max() > 1e-3
        scores = gumbel.score(discriminator, batch, z, mask, cfg)[:, 1:, -1]
        assert abs(d_record['reward'] - scores.mean()) < 1e-5
        terms = pair_loss_by_hand(discriminator(*batch[:2], z), response, mask, 1)
        g_loss = sum(terms) / roll.mask.sum()
        p = logits.softmax(-1)
        kl = (p * (p.log() - ref_logits.log_softmax(-1))).sum(-1)[:, 1:] * roll.mask
        to_come = kl.detach().flip(-1).cumsum(-1).flip(-1) - kl.detach()
        chosen = p[:, 1:].gather(-1, roll.response[..., None])[..., 0].log()
        gold = plain_logprobs(gpt, *batch[:2], batch.response[:, None])[0][:, 0][batch.mask]
        penalty = (kl + to_come * chosen).sum() / 8
        wanted = gradient(gpt, g_loss + .3 * penalty - .4 * gold.mean())
        assert (optimizer.kept - wanted).abs().max() < 1e-5 and wanted.abs().max() > 1e-3
        assert abs(record['g_loss'] - g_loss) < 1e-5
        assert abs(record['kl'] - kl[roll.mask].mean()) < 1e-5


def test_kl_penalty_has_the_exact_gradient():
    """In expectation over all answers; without what a token does to later ones it is 16% off."""
    policy, _, response, mask, _, _ = enumerated()
    reference, prompt = tiny_gpt(2, vocab_size=3, n_layer=1).double(), torch.tensor([[0, 1]])
    logits, ref_logits = (net.head(net.response_hidden(prompt, torch.tensor([0]), response))
                          for net in (policy, reference))
    logp, ref_logp = (z.log_softmax(-1).gather(-1, response[..., None])[..., 0] * mask
                      for z in (logits, ref_logits))
    p = logp.sum(-1).exp()
    kl = (p * (logp - ref_logp).sum(-1)).sum()
    per_token, _ = gumbel.kl_penalty(logits, ref_logits.detach(), response, mask)
    assert abs((p * per_token.sum(-1)).sum() - kl) < 1e-9
    exact, found = gradient_of_both(policy, kl, (p.detach() * per_token.sum(-1)).sum())
    assert (found - exact).norm() / exact.norm() < 1e-9


def test_bias_and_variance_of_the_estimator():
    """
    Two tokens of a vocabulary of 5 from tables of logits, and a score that is not linear in them:
    the gradients of 40,000 samples against the one over all 25 responses. The table is printed.
    """
    torch.manual_seed(0)
    N, V = 40000, 5
    first, second, weights = (torch.randn(*shape).double() for shape in ((V,), (V, V), (V, V)))

    def score(z):                                    # (n, 2, V) to (n,)
        return 2 * torch.einsum('nu,nv,uv->n', z[:, 0], z[:, 1], weights).tanh()

    def by_tables(grads, y1):                        # (n, 2, V) to (n, V + V * V)
        table = torch.zeros(len(y1), V, V).double()
        table[torch.arange(len(y1)), y1] = grads[:, 1]
        return torch.cat((grads[:, 0], table.flatten(1)), 1)

    every = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    y1 = first.softmax(-1).multinomial(N, replacement=True)
    drawn = torch.stack((y1, second[y1].softmax(-1).multinomial(1)[:, 0]), 1)
    found = {}
    for name, y in ('exact', every), ('REINFORCE', drawn), *((t, drawn) for t in (.1, .5, 1., 10.)):
        leaf = torch.stack((first.expand(len(y), V), second[y[:, 0]]), 1).requires_grad_()
        onehots = F.one_hot(y, V).double()
        logp, s = leaf.log_softmax(-1).gather(-1, y[..., None]).sum((1, 2)), score(onehots)
        if isinstance(name, float):
            z = gumbel.relax(leaf, y, name, None)
            value = score(onehots + z - z.detach()).sum()
        else:
            value = (logp.exp() * s if name == 'exact' else (s - s.mean()) * logp).sum()
        grads = by_tables(torch.autograd.grad(value, leaf)[0], y[:, 0])
        if name == 'exact':
            exact = grads.sum(0)
            continue
        found[name] = [(z.norm() / exact.norm()).item() for z in
                       (grads.mean(0) - exact, grads.var(0).sum().sqrt())]
        print('# {}: bias {:.3f}, deviation {:.2f}, of the exact norm'.format(name, *found[name]))
    assert found['REINFORCE'][0] < 5 * found['REINFORCE'][1] / math.sqrt(N)
    assert found[.1][1] > found[1.][1] > found[10.][1]                       # variance by 1 / tau
    assert all(found[tau][0] > .05 for tau in (.1, .5, 1., 10.))             # bias at any


# -----------------------------------------------------------------------------
# sample: judging


def people(n, seed=0):
    """A Split of n prompts, each context twice, with random answers, and other answers to them."""
    enc, rng = data.load_tokenizer('toy'), np.random.default_rng(seed)

    def say():
        return ' '.join(rng.choice(data.CITIES, rng.integers(1, 4)))

    examples = [{'context': f'In {data.YEARS[i // 2 % 30]} Ada did {i // 60} .',
                 'question': f'Where {i % 2} ?', 'answers': [say()], 'start': 0}
                for i in range(n)]
    others = data.Split([{**e, 'answers': [say()]} for e in examples], enc, 30, 6)
    return data.Split(examples, enc, 30, 6), others.batch(range(n)), enc


def judging(steps):
    return SimpleNamespace(device='cpu', dtype='float32', seed=1, batch_size=64, micro_batch=48,
                           top_k=None, test_steps=steps, test_lr=None)


def test_a_fresh_discriminator_is_right():
    """Two draws of the same human answers are told apart half the time, a planted token always."""
    split, other, enc = people(1200, 1)
    trunk = tiny_gpt(vocab_size=enc.n_vocab, n_embd=32, block_size=40)
    fake, mask = other.response, other.mask
    same = sample.told_apart(trunk, split, fake, mask, judging(50))
    assert same['low'] < .5 < same['high'] and same['high'] - same['low'] < .09, same
    ties = (fake == split.batch(range(1200)).response).all(1)
    assert same['ties'] == ties.sum() > 5 and same['pairs'] == 1200 - same['ties']
    # three judges, on halves of their own
    assert len(same['judges']) == len(set(same['judges'])) == 3
    rows, right = sample.fresh_discriminator(trunk, split, fake, mask, (1, 2), judging(50))
    half = sample.halves(sample.passages_of(split.examples), (1, 2))[1]
    assert np.array_equal(rows, half[~ties.numpy()[half]])
    assert right.mean() == same['judges'][2]

    wild = judging(3)
    wild.test_lr = 1e18
    raises(ValueError, ['diverged', '--test_lr'], sample.told_apart, trunk, split, fake, mask, wild)

    told, ends = fake.clone(), mask.sum(1) - 1       # a full stop before eos
    told[torch.arange(1200), ends] = enc.encode_ordinary(' .')[0]
    planted = sample.told_apart(trunk, split, told, other.mask, judging(60))
    assert planted['low'] > .95 and planted['ties'] == 0, planted


def test_no_prompt_is_on_both_sides():
    split = people(400)[0]
    learn, judge = sample.halves(sample.passages_of(split.examples), 0)
    assert sorted([*learn, *judge]) == list(range(400)) and abs(len(learn) - len(judge)) < 4
    for what in (lambda i: split.examples[i]['context'], lambda i: tuple(split.prompts[i])):
        assert not {what(i) for i in learn} & {what(i) for i in judge}


def test_an_interval_by_hand():
    rng = np.random.default_rng(0)
    trials = (rng.random(400) < .7).astype(float)    # 400 passages with a trial each, or with 25
    for right in trials, trials.repeat(25):
        low, high = sample.interval(right, np.arange(400).repeat(len(right) // 400))
        half = 1.96 * trials.std() / 20              # the trials of one passage are all alike
        assert abs(low - trials.mean() + half) < .005 and abs(high - trials.mean() - half) < .005


def test_kl_and_perplexity_against_sums():
    """KL exact at each token of the model's own samples, by hand from whole logits."""
    split, _, enc = people(6)
    one, base = (tiny_gpt(seed, vocab_size=enc.n_vocab, block_size=40) for seed in (0, 1))
    args = judging(1)
    kl, nll = sample.drift(one, base, split, .5, args)
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
    assert abs(nll - wanted / batch.mask.sum()) < 1e-4


def test_best_of_n_by_hand():
    """A discriminator that knows the F1 chooses the best sample, its negative the worst."""
    split, _, enc = people(11)
    gpt, args = tiny_gpt(vocab_size=enc.n_vocab, block_size=40), judging(1)
    args.best_of, args.batch_size, found = 3, 12, []         # 4 rows a batch, the last is cut

    def knows(sign):
        def scores(prompt, pad, response):
            rows = [next(i for i in range(11) if np.array_equal(p, split.prompts[i]))
                    for p in prompt.numpy()]
            ids = response.flatten(0, 1)
            texts = data.to_text(ids, torch.ones_like(ids) > 0, enc)
            f1 = [data.score_answer(text, split.examples[i])[1]
                  for text, i in zip(texts, np.repeat(rows, 3))]
            found.append(f1)
            return sign * torch.tensor(f1).view(-1, 3, 1).expand(response.shape)
        return scores

    def like_gold(prompt, pad, R, eos, n, temperature, top_k, rng):         # of 1 to 3 words
        rows = [next(i for i in range(11) if np.array_equal(p, split.prompts[i]))
                for p in prompt.numpy()]
        gold = torch.from_numpy(split.responses[rows]).long()[:, None].expand(-1, n, -1).clone()
        cut = torch.arange(R) >= torch.tensor([1, 2, 1])[:, None]
        gold = gold.masked_fill(cut, eos)
        return Rollout(gold, (gold == eos).cumsum(-1) <= 1, torch.ones(gold.shape[:2]).bool())

    with patched(gpt, 'generate', like_gold):
        best, worst = (sample.best_of(gpt, knows(sign), split, enc, 1., args) for sign in (1, -1))
    f1 = 100 * np.array(sum(found[:3], [])).reshape(-1, 3)[:11]
    assert best['n'] == 3 and abs(best['chosen']['f1'] - f1.max(1).mean()) < 1e-9
    assert best['possible'] == best['chosen'] and best['any'] == worst['any']
    assert abs(best['any']['f1'] - f1.mean()) < 1e-9
    assert abs(worst['chosen']['f1'] - f1.min(1).mean()) < 1e-9
    assert worst['chosen']['f1'] < best['any']['f1'] < best['chosen']['f1']


def printed(*argv):
    """What sample.py prints for these flags, run in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        sample.main(list(map(str, argv)))
    return out.getvalue()


def test_runs_are_judged_compared_tabled_and_drawn():
    runs = [folder('judged') / f'run-{seed}' for seed in (1, 2)]
    for seed, run in enumerate(runs, 1):
        train(gumbel, run, *SMALL, '--seed', str(seed))
        text = printed('--evaluate', f'sft={run}/sft.pt', f'tuned={run}/ckpt.pt', '--prompts', '40',
                       '--test_steps', '2', '--out', run / 'judged.json')
        assert 'pairs that differ' in text and 'sft, at 1.0: EM' in text
        assert '40 prompts of toy' in text
        found = json.loads((run / 'judged.json').read_text())['results']
        f, = found['tuned']
        assert found['sft'][0]['kl'] == 0 < f['kl'] and 0 < f['length_distance'] <= 1
        assert f['fresh']['pairs'] <= 40 and f['prompts'] == 40
    files = [run / 'judged.json' for run in runs]
    head, rule, *rows = printed('--table', *files).strip().splitlines()
    assert len(rows) == 2 and all(r.count('|') == head.count('|') == rule.count('|') for r in rows)
    ems = [json.loads(f.read_text())['results']['tuned'][0]['em'] for f in files]
    mean, spread = np.mean(ems), np.std(ems, ddof=1)
    assert rows[1].startswith(f'| tuned | {mean:.1f} ± {spread:.1f} |'), rows[1]
    column = head.split(' | ').index('told apart %')
    assert rows[1].split(' | ')[column] == '–'                               # of 40 pairs at most
    for f in files:                                                          # as if of more
        found = json.loads(f.read_text())
        for figures, in found['results'].values():
            figures['fresh'] |= {'judges': [.75], 'accuracy': .75}
        f.write_text(json.dumps(found))
    found = json.loads(files[0].read_text())         # a byte order mark is read, damage refused
    bad = runs[0] / 'bad.json'
    bad.write_text(json.dumps(found), encoding='utf-8-sig')
    assert printed('--table', bad)
    for wrong in (1, 'x', [1], ['x'], [{'em': 1}], [{**found['results']['sft'][0], 'em': None}],
                  [{**found['results']['sft'][0], 'prompts': 0}]):
        bad.write_text(json.dumps({'results': {'sft': wrong}}))
        raises(SystemExit, ['bad.json', 'holds no results'], printed, '--table', bad)
    one = runs[0] / 'one.json'
    row = printed('--table', *files, '--out', one).strip().splitlines()[-1]
    assert row.split(' | ')[column] == '75.0 ± 0.0', row
    assert printed('--table', one).strip().splitlines()[-1] == row

    with open(runs[1] / 'metrics.jsonl', 'a') as f:
        f.write(json.dumps({'iter': 3, 'collapsed': 'Oslo Oslo'}) + '\n')
    rows = printed('--table', *(f'both={run}' for run in runs)).strip().splitlines()[2:]
    assert len(rows) == 1 and rows[0].startswith('| both | ')
    assert rows[0].endswith('| 3 | `Oslo Oslo` |')
    png = runs[0] / 'all.png'
    printed('--plot', *(f'Gumbel={run}' for run in runs), runs[0] / 'metrics.jsonl', '--out', png)
    assert png.stat().st_size > 20000
    text = printed('--evaluate', runs[0] / 'ckpt.pt', '--prompts', '20', '--test_steps', '2',
                   '--base', runs[1] / 'sft.pt', '--best_of', '2', '--discriminator',
                   runs[1] / 'ckpt.pt', '--out', runs[0] / 'best.json')
    assert 'F1 chosen' in text and f'start from {runs[1]}/sft.pt' in text, text
    found = json.loads((runs[0] / 'best.json').read_text())
    f, = found['results'][str(runs[0] / 'ckpt.pt')]
    assert f['kl'] > 0 and found['setup']['base'] == str(runs[1] / 'sft.pt')
    assert f['best_of']['n'] == 2 and 'F1 chosen' in printed('--table', runs[0] / 'best.json')
    assert f['best_of']['any']['f1'] <= f['best_of']['possible']['f1']
    text = printed('--compare', f'one={runs[0]}/sft.pt', runs[1] / 'ckpt.pt', '--prompts', '3')
    assert text.count('question  ') == text.count('one ') == 3
    runs = [[{'iter': i, 'kl': v} for i in range(n)] for n, v in ((300, 0.), (200, 1.))]
    at, values = sample.curves(runs, sample.PANELS['KL from the warm start (nats/token)'])
    assert max(at) > 296 and all(v == ([0, 1] if x < 198 else [0]) for x, v in zip(at, values)
                                 if x >= 2)


def refused(*argv):
    """The sentence that sample.py ends with, which may name only flags that it has."""
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            printed(*argv)
    except SystemExit as e:
        said = e.code if isinstance(e.code, str) else err.getvalue().strip().splitlines()[-1]
        has = {*sample.FLAGS, *'ckpt compare evaluate table plot temperature dtype'.split()}
        assert '\n' not in said and {*re.findall(r'--(\w+)', said)} <= has, said
        return said
    raise AssertionError(f'{argv} were taken')


def test_only_what_is_named_alike_is_merged():
    at = folder('names')

    def run(name, tail=''):
        (at / name).mkdir(parents=True, exist_ok=True)
        lines = [{'config': {}}, {'iter': 0, 'dev': {'f1': 1.}}, {'iter': 1, 'kl': 1.}]
        text = ''.join(json.dumps(r) + '\n' for r in lines)
        (at / name / 'metrics.jsonl').write_text(text + tail, encoding='utf-8-sig')
        return at / name

    def rows(*paths):
        return [r.split(' | ')[0][2:].replace(f'{at}/', '') for r in
                printed('--table', *paths).strip().splitlines()[2:]]

    for first, second in (('beta0.02', 'beta0.05'), ('lr1e-5', 'lr1e-6'), ('a/run', 'b/run'),
                          ('x', 'x-1'), ('lr=0.001', 'lr=0.01')):
        assert rows(run(first), run(second)) == [first, second]
    assert len(rows(at / 'a/run/metrics.jsonl', at / 'b/run/metrics.jsonl')) == 2
    assert rows(f'A={at}/a/run', f'A={at}/b/run', f'B={at}/lr=0.01') == ['A', 'B']
    groups = []
    with patched(sample, 'draw', lambda found, out: groups.append(found)):
        printed('--plot', run('half', '{"iter": 2, "k'), f'A={at}/a/run', f'A={at}/b/run',
                at / 'lr=0.01')
    half, = groups[0][str(at / 'half')]
    assert [*map(len, groups[0].values())] == [1, 2, 1] and len(half) == 3
    raises(ValueError, [f'--control {at}/half', 'no timed'], reinforce.control_steps, None, None,
           SimpleNamespace(control=str(at / 'half')))


def test_each_is_judged_with_its_own_prompts_or_refused():
    at, base = folder('prompts'), [*SMALL, '--iters', '0']
    runs = {'plain': [], 'bare': ['--no-context'], 'short': ['--max_prompt', '25'],
            'brief': ['--max_response', '5'], 'cold': ['--temperature', '.5'],
            'varied': ['--data', 'toy-varied']}
    files = {}
    for name, flags in runs.items():
        train(reinforce, at / name, *base, *flags)
        files[name] = str(at / name / 'sft.pt')
    few = '--prompts', '6', '--test_steps', '0', '--out', at / 'judged.json'
    for name, words in (('bare', ['context', 'True', 'False']), ('short', ['max_prompt', '25']),
                        ('brief', ['max_response', '5']), ('cold', ['temperature', '0.5']),
                        ('varied', ['data', 'toy-varied'])):
        for pair in (files['plain'], files[name]), (files[name], files['plain']):
            for said in (refused('--compare', *pair, '--prompts', '2'),
                         refused('--evaluate', *pair, *few),
                         refused('--evaluate', pair[0], '--base', pair[1], *few)):
                assert all(w in said for w in [*words, *pair]), said
                assert ('give --' in said) == (words[0] in ('data', 'temperature')), said
    with contextlib.redirect_stderr(io.StringIO()):
        printed('--compare', files['plain'], files['cold'], '--temperature', '.7', '--prompts', '2')

    # of one name, all are kept; written as they come, with whatever is wrong with one said before
    named = f'W={files["plain"]}', f'P={files["plain"]}', f'P={at}/plain/ckpt.pt'
    printed('--evaluate', *named, *few)
    found = json.loads((at / 'judged.json').read_text())['results']
    assert [f['source'] for f in found['P']] == [files['plain'], f'{at}/plain/ckpt.pt']
    text = printed('--compare', *named, '--prompts', '2')
    assert text.count('P         ') == 4 and text.count('W         ') == 2, text
    judge, judged = sample.judge, []

    def fails(*args):
        if len(judged) == 2:
            raise ValueError('the third')
        judged.append(1)
        return judge(*args)

    (at / 'judged.json').unlink()
    with patched(sample, 'judge', fails):
        assert refused('--evaluate', *named, *few) == 'the third'
        assert len(json.loads((at / 'judged.json').read_text())['results']) == 2
        judged.clear()
        for wrong, words in (([*named, 'gone.pt', *few], ['gone.pt']),
                             ([*named, *few[:-1], at], [str(at)]),
                             ([*named, *few, '--base', at], [str(at), 'model.safetensors'])):
            said = refused('--evaluate', *wrong)
            assert all(w in said for w in words) and not judged, said


def test_a_console_without_the_characters_gets_question_marks():
    at = folder('console')
    train(reinforce, at, *SMALL, '--iters', '0')
    for encoding in 'ascii', 'cp1252':
        env = {**os.environ, 'PYTHONIOENCODING': encoding}
        text = command('sample.py', '--evaluate', f'你好±={at}/sft.pt', '--prompts', '4',
                       '--test_steps', '0', '--out', at / 'judged.json', env=env,
                       errors='replace').stdout
        assert '??' in text and '4 prompts of toy' in text
    assert '你好±' in json.loads((at / 'judged.json').read_text())['results']
    for script in ('reinforce.py', 'ppo.py', 'gumbel.py', 'sample.py', 'bench.py'):
        (HERE / script).read_text(encoding='utf-8').split('"""')[1].encode('ascii')      # --help


def test_sample_refuses_what_it_cannot_take():
    asked = '--ckpt', 'gone.pt', '--question'
    for flags, words in (
            ((*asked, ''), ['--question']), ((*asked, ' '), ['--question']), (asked[:2], ['--q']),
            ((*asked, 'x'), ['gone.pt']),
            ((*asked, 'x', '--samples', '0'), ['--samples 0', 'at least 1']),
            ((*asked, 'x', '--top_k', '0'), ['--top_k 0', 'at least 1']),
            ((*asked, 'x', '--test_lr', 'nan'), ['--test_lr nan']),
            (('--evaluate', 'x', '--temperature', '.8', '.80'), ['0.8', 'once']),
            (('--compare', 'x', '--temperature', '.8', '.5'), ['0.5', '--evaluate']),
            ((*asked, 'x', '--test_lr', '0'), ['--test_lr 0']),
            (('--evaluate', 'x', '--best_of', '2'), ['--discriminator']),
            *(((*asked, 'x', '--temperature', t), [f'--temperature {float(t)}', '0, or', '0.01'])
              for t in ('nan', '1e-38', 'inf', '-1')),
            *(((*asked, 'x', '--seed', s), [f'--seed {s}', 'below']) for s in (2 ** 63, -1))):
        said = refused(*flags)
        assert all(w in said for w in words), said
    err = command('reinforce.py', '--tiny', '--seed', 2 ** 63, expect=1).stderr.strip()
    assert '\n' not in err and f'--seed {2 ** 63}' in err and str(2 ** 63 - 1) in err, err
    for script in SCRIPTS:
        raises(ValueError, ['--seed', str(2 ** 63)], script.parse, ['--seed', str(2 ** 63)])
        script.parse(['--tiny', '--seed', str(2 ** 63 - 1)])


def test_a_gpt2_of_few_positions_can_be_asked():
    """And is told what of the passage it did not get."""
    at, n = folder('few positions'), data.load_tokenizer('toy').n_vocab
    for positions in 288, 128, 30, 8:
        tiny_gpt(vocab_size=n, block_size=positions).save_pretrained(at / str(positions))
    asked = '--data', 'toy', '--question', 'Who ?', '--context', 'Ada sold it . ' * 60
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert printed('--ckpt', at / '128', *asked)
        assert printed('--ckpt', at / '288', *asked)         # 256 + 32, as a run from scratch has
    assert err.getvalue() == '1 of 1 prompts cut to 96 tokens from the left\n'
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert printed('--ckpt', at / '30', *asked) and printed('--ckpt', at / '8', *asked)
    assert 'cut to 23 tokens' in err.getvalue() and 'cut to 6 tokens' in err.getvalue()
    save_checkpoint(at / 'odd.pt', {'model': tiny_gpt(vocab_size=n).state_dict(), 'settings': None,
                                    'gpt_config': {'n_head': 2}})
    with contextlib.redirect_stderr(err):
        assert printed('--ckpt', at / 'odd.pt', *asked)
    train(reinforce, at / 'run', *SMALL, '--iters', '0')
    said = refused('--compare', at / 'run/sft.pt', at / '30', '--prompts', '2')
    assert str(at / '30') in said and 'takes 30 tokens' in said and 'sft.pt' in said
    tiny_gpt(vocab_size=60000).save_pretrained(at / 'other')
    said = refused('--compare', at / 'run/sft.pt', at / 'other')
    assert f'{at}/other has a vocabulary of 60000' in said and '--data toy' in said


def test_a_run_evaluates_the_policy_it_trains():
    """At its temperature, over the whole vocabulary: near 0 that is the greedy answer."""
    cfg, gpt, _, network, _, _ = case(reinforce, '--temperature', '.01')
    split, _, enc = people(20)
    cfg.max_response, size = 6, dict(vocab_size=enc.n_vocab, block_size=40)
    gpt, network, generate, seen = tiny_gpt(3, **size), tiny_discriminator(**size), GPT.generate, []

    def watched(self, *args, temperature, top_k=None, **kwargs):
        seen.append((temperature, top_k))
        return generate(self, *args, temperature=temperature, top_k=top_k, **kwargs)

    with patched(GPT, 'generate', watched):
        figures, sampled = sample.evaluate_run(gpt, network, split, enc, cfg)
    assert set(seen) == {(0, None), (.01, None)} and figures['sample_f1'] == figures['f1']
    assert sampled == data.to_text(*sample.answer(gpt, split, 0, judging(1)), enc)


# -----------------------------------------------------------------------------
# runs, resumes, command lines


SMALL = ['--tiny', '--n_layer', '1', '--n_embd', '16', '--sft_iters', '4', '--iters', '4',
         '--batch_size', '8', '--eval_interval', '2', '--eval_prompts', '12', '--d_warmup_iters',
         '1', '--d_dropout', '.1', '--sft_batch_size', '8']
SMALL_OF = {reinforce: SMALL, ppo: [*SMALL, '--minibatch', '4'], gumbel: SMALL}


def train(script, out, *flags, caught=()):
    """A run in this process, of few examples and without its curves: most of a small one's time."""
    few = {'train': (400, 400), 'dev': (500, 500)}
    with patched(sample, 'draw', lambda *a: None), patched(data, 'TOY_SIZE', few):
        return script.train(script.parse([*flags, '--out_dir', str(out)]), caught)


class After:
    """Turns true, as a caught signal does, once metrics.jsonl holds n records with `key`."""

    def __init__(self, out, key, n):
        self.path, self.key, self.n = out / 'metrics.jsonl', key, n

    def __bool__(self):
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return sum(self.key in json.loads(line) for line in lines) >= self.n


def records(out):
    rows = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()[1:]]
    return [{k: v for k, v in row.items() if k != 'seconds'} for row in rows]


def same(a, b):
    """Equality bit for bit of nested values with tensors."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def ended_alike(one, other):
    """Two runs' records and checkpoints, but for where they are and how long they took."""
    assert records(one) == records(other) and records(one)[-1].keys() == {'final'}
    for name in 'ckpt.pt', 'sft.pt':
        a, b = (load_checkpoint(out / name) for out in (one, other))
        for saved in a, b:
            del saved['settings']['out_dir'], saved['log_size']
        assert same(a, b), name


def resumed_equals_uninterrupted(script, *more):
    whole, parts = folder(f'whole {script.__name__}'), folder(f'parts {script.__name__}')
    train(script, whole, *SMALL_OF[script], *more)
    for key, n in ('sft_iter', 3), ('reward', 2), ('reward', 3):
        shutil.rmtree(parts)
        assert train(script, parts, *SMALL_OF[script], *more, caught=After(parts, key, n)) is None
        with open(parts / 'metrics.jsonl', 'a') as f:
            f.write('{"iter": 2, "rew')              # as a crash leaves it
        train(script, parts, '--resume')
        ended_alike(whole, parts)
    return load_checkpoint(parts / 'ckpt.pt')


def test_a_resumed_reinforce_run_equals_an_uninterrupted_one():
    resumed_equals_uninterrupted(reinforce, '--baseline', 'mean')


def test_a_resumed_ppo_run_equals_an_uninterrupted_one():
    saved = resumed_equals_uninterrupted(ppo, '--epochs', '2')
    assert saved['running']['updates'] > 4 and saved['critic_optimizer']['state']


def test_a_resumed_gumbel_run_equals_an_uninterrupted_one():
    resumed_equals_uninterrupted(gumbel, '--beta', '.1')


def test_an_older_checkpoint_is_not_gone_on_from():
    for script in SCRIPTS:
        out = folder('older')
        save_checkpoint(out / 'ckpt.pt', {'settings': asdict(script.Config()),
                                          'running': {'d_acc': .5, 'g_steps': 3, 'sick': 0}})
        raises(ValueError, ['--resume', 'ckpt.pt', 'older version'], script.parse,
               ['--resume', '--out_dir', str(out)])
        for state, words in (({'model': {}, 'model_args': {}}, 'no run'), ([1], 'no run'),
                             ({'settings': [1]}, 'no run'), ({'settings': {}}, 'no run'),
                             ({'settings': {'lr': .1}}, 'no run')):
            save_checkpoint(out / 'ckpt.pt', state)
            raises(ValueError, ['--resume', 'ckpt.pt', words], script.parse,
                   ['--resume', '--out_dir', str(out)])


def test_the_learning_rate_is_reached():
    """By the generator's own steps, however late they begin; so is the warm start's."""
    for steps in 1, 2, 7, 150, 8000:
        shares = [model.schedule(step, steps) for step in range(steps)]
        assert max(shares) == 1 and min(shares) > 0 and (steps < 100 or shares[-1] < .11)
    for script in SCRIPTS:
        train(script, folder('rate'), *SMALL_OF[script], '--iters', '18', '--d_warmup_iters', '12',
              '--d_warmup_acc', '1', '--eval_interval', '20')
        rows = [r for r in records(SCRATCH / 'rate') if 'lr' in r]
        for peak, kind in (script.TINY['lr'], 'iter'), (script.TINY['sft_lr'], 'sft_iter'):
            rates = [r['lr'] for r in rows if kind in r]
            assert len(rates) == (6 if kind == 'iter' else 4) and max(rates) >= .95 * peak, rates


def test_adam_moves_where_gradients_are_small():
    """Clipped to a norm of 1, those of 124M parameters have a root mean square of 9e-5 at most."""
    network = torch.nn.Linear(1, 1)
    optimizer = model.adamw(network)
    before = network.weight.item()
    network.weight.grad, network.bias.grad = torch.full((1, 1), 1e-7), torch.ones(1)
    with unclipped:
        model.update(network, optimizer, .1)
    assert abs(before - network.weight.item() - .1) < .02


def slow_save(save=torch.save):
    """Makes every checkpoint take a tenth of a second, half of it on disk meanwhile."""
    def halting(state, f):
        whole = io.BytesIO()
        save(state, whole)
        half = len(whole.getvalue()) // 2
        for part in whole.getvalue()[:half], whole.getvalue()[half:]:
            f.write(part)
            f.flush()
            time.sleep(.05)
    torch.save = halting


def test_a_killed_run_ends_as_if_it_never_was():
    """SIGKILL at six random instants, in saves too; it must end as one that was left alone."""
    whole, parts = (folder(name) for name in ('never killed', 'killed'))

    def child(out, *more):
        pid = os.fork()
        if not pid:                                  # no cleaning up: that is the parent's
            code = 1
            try:
                torch.set_num_threads(1)
                tqdm.set_lock(threading.RLock())     # its own would leak a semaphore at each kill
                slow_save()
                train(reinforce, out, *SMALL, '--iters', '30', *more)
                code = 0
            finally:
                os._exit(code)
        return pid

    assert os.waitpid(child(whole), 0)[1] == 0
    rng, hits = np.random.default_rng(0), 0
    for turn in range(7):
        begun = any((parts / name).exists() for name in ('sft.pt', 'ckpt.pt'))
        pid = child(parts, '--resume' if begun else '--overwrite')
        if turn < 6:
            time.sleep(rng.uniform(.2, 1.2))
            os.kill(pid, signal.SIGKILL)
        hits += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert hits >= 3
    ended_alike(whole, parts)


def test_freed_memory_is_kept_until_it_is_given_back():
    """In a process of its own, 32 tensors of 8 MiB that are freed under one that stays."""
    if not sys.platform.startswith('linux') or not hasattr(ctypes.CDLL(None), 'malloc_trim'):
        raise unittest.SkipTest('only glibc keeps freed memory on request')
    code = """if True:
        import torch
        from pathlib import Path
        from model import keep_freed_memory
        pages = lambda: int(Path('/proc/self/statm').read_text().split()[1])
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
            (reinforce, 'discriminator_loss', 2, 'd_loss is nan at iter 2'),
            (reinforce, 'reward', 2, ' is nan at iter'),
            (ppo, 'value_loss', 3, 'is nan at iter'), (ppo, 'mle_gradient', 9, 'is nan at iter'),
            (gumbel, 'generator_loss', 2, 'is nan at iter'),
            (gumbel, 'response_logits', 9, 'is nan at iter')):
        out, calls, kept = folder('poisoned'), itertools.count(), getattr(script, station)

        def poisoned(*a, calls=calls, kept=kept, at=at):
            value = kept(*a)
            if next(calls) != at:
                return value
            if isinstance(value, dict):
                return value | {'mle': math.nan}
            return (value[0] * math.nan, value[1]) if isinstance(value, tuple) else value * math.nan

        flags = [*SMALL_OF[script], '--iters', '12', '--eval_interval', '1', '--d_max_acc', '1']
        with patched(script, station, poisoned):
            raises(FloatingPointError, [named, '--resume'], train, script, out, *flags)
        for name in 'sft.pt', 'ckpt.pt':
            if (out / name).exists():
                state = load_checkpoint(out / name)['model']
                assert all(v.isfinite().all() for v in state.values()), (station, name)
        assert 'NaN' not in (out / 'metrics.jsonl').read_text()
        assert train(script, out, '--resume')['tuned']['f1'] >= 0


def fuzz(target, path, raw, spoil):
    """
    150 damaged files, the same each time: bytes flipped, cut out, put in or cut off, or what
    `spoil` writes by hypothesis's choices. Nothing but a result or one sentence may come of them.
    """
    try:
        import hypothesis
        from hypothesis import strategies as st
    except ImportError as e:
        raise unittest.SkipTest('hypothesis is not installed') from e
    refused = []

    def one(d):
        if d.draw(st.booleans()):
            spoil(d.draw, st)
        else:
            spoilt = bytearray(raw)
            for _ in range(d.draw(st.integers(1, 3))):
                at = d.draw(st.integers(0, len(spoilt)))
                kind = d.draw(st.sampled_from(['flip', 'cut', 'put', 'end']))
                if kind == 'flip' and at < len(spoilt):
                    spoilt[at] ^= 1 << d.draw(st.integers(0, 7))
                elif kind == 'cut':
                    del spoilt[at:at + d.draw(st.integers(1, 40))]
                elif kind == 'put':
                    spoilt[at:at] = d.draw(st.binary(min_size=1, max_size=8))
                else:
                    del spoilt[at:]
            path.write_bytes(bytes(spoilt))
        try:
            target()
        except (ValueError, FileNotFoundError) as e:
            assert str(e) and '\n' not in str(e), repr(e)
            refused.append(e)

    settings = hypothesis.settings(
        max_examples=150, deadline=None, database=None, derandomize=True, print_blob=False,
        suppress_health_check=list(hypothesis.HealthCheck))
    settings(hypothesis.given(st.data())(one))()
    assert len(refused) > 50, len(refused)


def test_damaged_squad_files_are_one_sentence():
    path, enc = folder('fuzz') / 'train-v2.0.json', data.load_tokenizer('toy')
    answer = {'text': 'Ada', 'answer_start': 3}
    qas = [{'id': 'a', 'question': 'Who?', 'is_impossible': False, 'answers': [answer, answer]},
           {'id': 'b', 'question': 'When?', 'is_impossible': True, 'answers': []}]
    good = {'data': [{'title': 't', 'paragraphs': [{'context': 'By Ada.', 'qas': qas}]}]}

    def read():
        rows = data.squad_examples(path.parent, 'train')
        data.Split(rows, enc, 20, 5, train=True).batch(range(len(rows)))

    def spoil(draw, st):
        """Another value, or none, in any one place."""
        scalars = (st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
                   | st.sampled_from(['\ud800', 'Ada\udfff', '\ufeff', 10 ** 20, -2, 2 ** 31]))
        values = st.recursive(scalars, lambda z: st.lists(z, max_size=3)
                              | st.dictionaries(st.text(max_size=5), z, max_size=3), max_leaves=6)
        doc = json.loads(json.dumps(good))
        at, spots = [doc], []
        while at:
            node = at.pop()
            for key in node if isinstance(node, dict) else range(len(node)):
                spots.append((node, key))
                if isinstance(node[key], (dict, list)):
                    at.append(node[key])
        node, key = spots[draw(st.integers(0, len(spots) - 1))]
        if draw(st.booleans()):
            node[key] = draw(values)
        else:
            del node[key]
        path.write_text(json.dumps(doc), encoding=draw(st.sampled_from(['utf-8', 'utf-8-sig'])))

    fuzz(read, path, json.dumps(good).encode(), spoil)
    path.write_text('[' * 100000)
    raises(ValueError, [str(path), 'JSON'], read)


def test_damaged_checkpoints_are_one_sentence():
    gpt, at = tiny_gpt(vocab_size=11, n_layer=1), folder('fuzz checkpoints')
    for path in at / 'ckpt.pt', at / 'model.safetensors':
        def write(weights, config, path=path):
            if path.suffix == '.pt':
                save_checkpoint(path, {'model': weights, 'gpt_config': config})
            else:
                model.save_file({k: v.contiguous() for k, v in weights.items()}, path)

        def spoil(draw, st, write=write):
            """A whole file with a wrong thing in it."""
            weights = {k: v.clone() for k, v in gpt.state_dict().items()}
            config = asdict(gpt.config)
            name = draw(st.sampled_from(sorted(weights)))
            change = draw(st.sampled_from(['lose', 'rename', 'reshape', 'add', 'type', 'config']))
            if change in ('lose', 'rename'):
                tensor = weights.pop(name)
            if change == 'rename':
                weights[draw(st.sampled_from(['h.', 'h.x.y', 'wte', 'h.7.ln_1.bias', '']))] = tensor
            if change == 'reshape':
                weights[name] = torch.zeros(draw(st.lists(st.integers(0, 4), max_size=3)))
            if change == 'add':
                weights[draw(st.text(max_size=4))] = torch.zeros(2)
            if change == 'type':
                weights[name] = weights[name].to(torch.int64)
            if change == 'config':
                config[draw(st.sampled_from([*config, 'more']))] = draw(
                    st.none() | st.integers(-2, 3) | st.text(max_size=3) | st.just(10 ** 9))
            write(weights, config)

        write(gpt.state_dict(), asdict(gpt.config))
        fuzz(lambda path=path: GPT.from_pretrained(path), path, path.read_bytes(), spoil)


def on_ranks(name, path, n):
    """Calls the function `name`(path, rank) of this file on each of n ranks at once."""
    code = 'import sys, test_all; test_all.as_rank(*sys.argv[1:])'
    processes = [subprocess.Popen([sys.executable, '-c', code, name, path, str(rank), str(n)],
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                  cwd=HERE) for rank in range(n)]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-2000:]


def as_rank(name, path, rank, n):
    torch.set_num_threads(1)
    if int(n) > 1:
        dist.init_process_group('gloo', init_method=f'file://{path}/meet', rank=int(rank),
                                world_size=int(n))
    globals()[name](Path(path), rank)
    if int(n) > 1:
        dist.destroy_process_group()


def steps_of_all_scripts(rank=0, **where):
    """Gradients and figures of every kind of update on this rank's share of 4 prompts, by script
    and kind; `where` as in `case`."""
    found = {}
    for script in SCRIPTS:
        name = script.__name__
        flags = {'ppo': ['--minibatch', '4'], 'gumbel': ['--encoding', 'hard']}.get(name, [])
        cfg, gpt, reference, discriminator, batch, roll = case(
            script, '--beta', '.3', '--micro_batch', '3', *flags, **where)
        size = {k: v for k, v in where.items() if k.startswith('n_')}
        cfg.sft_batch_size, critic = 4, tiny_discriminator(4, ppo.Critic, **size).to(cfg.device)
        rewards = torch.randn(4, 2, 4).to(cfg.device) * roll.mask
        passages = np.arange(36).reshape(4, 9) % 13
        split = Sized(4, lambda i, device, batch=batch: data.take(batch, i))
        mine = model.shard(torch.arange(4))
        batch, roll, rewards = (data.take(z, mine) for z in (batch, roll, rewards))
        keeps = {k: Keep(z) for k, z in (('g', gpt), ('d', discriminator), ('c', critic))}
        figures = script.mle_step(gpt, keeps['g'], split, 0, 0, 1, cfg)
        found[name, 'mle'] = keeps['g'].kept
        early, late = ([gpt], [.7, None]) if script is gumbel else ([], [])
        with patched(gumbel, 'conditional_noise', fixed_noise), unclipped:
            figures |= script.discriminator_step(discriminator, *early, keeps['d'], batch, roll,
                                                 True, *late, cfg)
            found[name, 'd'] = keeps['d'].kept
            if script is reinforce:
                figures |= reinforce.reinforce_step(gpt, reference, keeps['g'], batch, roll,
                                                    rewards, 0., 0., cfg)
                figures['reward'] = reinforce.reward(discriminator, batch, roll, cfg)[1]
            elif script is ppo:
                figures |= ppo.ppo_step(gpt, reference, critic, (keeps['g'], keeps['c']), batch,
                                        roll, rewards, passages, {'updates': 0}, (0., 0.), cfg)
                found[name, 'c'] = keeps['c'].kept
            else:
                figures |= gumbel.gumbel_step(gpt, reference, discriminator, keeps['g'], batch,
                                              roll, 0., .7, None, cfg)
        found[name, 'g'] = keeps['g'].kept
        found[name, 'figures'] = figures | data.health(*model.gathered(*roll, *batch[2:]))
    return found


def save_steps(path, rank):
    torch.save(steps_of_all_scripts(rank), path / f'{model.ranks()[1]}-{rank}.pt')


class Sized:
    """As much of a Split as an MLE step needs."""

    def __init__(self, n, batch):
        self.n, self.batch = n, batch

    def __len__(self):
        return self.n


def test_two_ranks_have_the_gradient_of_one():
    path = folder('ranks')
    on_ranks('save_steps', path, 1)
    on_ranks('save_steps', path, 2)
    one, first, second = (torch.load(path / f'{name}.pt', weights_only=False)
                          for name in ('1-0', '2-0', '2-1'))
    assert len(one) == 3 * 4 + 1
    for key, wanted in one.items():
        for got in first[key], second[key]:
            if key[1] == 'figures':
                assert wanted.keys() == got.keys()
                for k, v in wanted.items():
                    assert abs(v - got[k]) < 1e-5 * max(1, abs(v)), (key, k, v, got[k])
            else:
                assert (got - wanted).abs().max() < 1e-6 and wanted.abs().max() > 1e-3, key


def whole_and_resumed(path, rank):
    for script in SCRIPTS:
        whole, parts = path / f'whole {script.__name__}', path / f'parts {script.__name__}'
        train(script, whole, *SMALL_OF[script])
        assert train(script, parts, *SMALL_OF[script], caught=After(parts, 'reward', 2)) is None
        train(script, parts, '--resume')
        train(script, path / f'of one {script.__name__}', '--resume')


def test_a_resumed_run_on_two_ranks_equals_an_uninterrupted_one():
    """And one that was begun on one rank runs on, on two."""
    path = folder('two ranks')
    for script in SCRIPTS:
        out = path / f'of one {script.__name__}'
        assert train(script, out, *SMALL_OF[script], caught=After(out, 'reward', 2)) is None
    on_ranks('whole_and_resumed', path, 2)
    for name in 'reinforce', 'ppo', 'gumbel':
        ended_alike(path / f'whole {name}', path / f'parts {name}')
        assert records(path / f'of one {name}')[-1].keys() == {'final'}


def torchrun(script, out, *flags):
    """The process that starts two ranks of a script."""
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
         script.__file__, *SMALL_OF[script], *flags, '--out_dir', out],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_torchrun_trains_and_a_signal_ends_it():
    out = folder('torchrun')
    process = torchrun(reinforce, out, '--iters', '100000')
    while process.poll() is None and not After(out, 'reward', 3):
        time.sleep(.05)
    process.send_signal(signal.SIGTERM)
    text, err = process.communicate(timeout=60)
    rows = [r for r in records(out) if 'reward' in r]
    assert load_checkpoint(out / 'ckpt.pt')['iter'] == rows[-1]['iter'] + 1, err[-2000:]
    assert text.count('train: ') == 1                # rank 0 speaks for all


def test_variants_run():
    poster = ['--no-context', '--sft_iters', '0', '--d_loss', 'minimax', '--no-d_prefixes',
              '--samples', '1', '--reward', 'score', '--baseline', 'mean', '--beta', '0',
              '--anchor', '0', '--d_warmup_iters', '0', '--d_max_acc', '1', '--d_dropout', '0']
    for script, flags in ((reinforce, poster), (reinforce, ['--reward', 'none']),
                          (reinforce, ['--dtype', 'bfloat16']), (reinforce, ['--iters', '0']),
                          (reinforce, ['--max_response', '1']),
                          (ppo, ['--minibatch', '3', '--samples', '1', '--micro_batch', '2']),
                          (ppo, ['--dtype', 'bfloat16', '--reward', 'score']),
                          (ppo, ['--pretrain', '0', '--anchor', '0']),
                          (gumbel, ['--encoding', 'mixed', '--d_loss', 'minimax']),
                          (gumbel, ['--encoding', 'hard', '--anchor', '0']),
                          (gumbel, ['--dtype', 'bfloat16', '--samples', '1'])):
        out = folder('variant')
        result = train(script, out, *SMALL_OF[script], *flags)
        assert math.isfinite(result['tuned']['f1']), flags


def test_extreme_settings_run():
    """One of everything, nothing learned, every answer a tie or without eos, none answerable."""
    one = ['--batch_size', '1', '--sft_batch_size', '1', '--samples', '1']
    still = ['--lr', '0', '--d_lr', '0', '--sft_lr', '0']
    kept = data.toy_examples
    for name, flags in (('plain', one + still), ('plain', ['--max_prompt', '1', '--max_response',
                                                           '1', *one]),
                        ('unanswerable', ['--sft_iters', '80', '--sft_lr', '.02']),
                        ('endless', ['--max_response', '2', *still])):
        def examples(split, n=None, varied=False, name=name):
            rows = kept(split, 60)
            if name == 'unanswerable':
                return [{**e, 'answers': [], 'start': -1} for e in rows]
            return [{**e, 'answers': [e['context']]} for e in rows] if name == 'endless' else rows

        with patched(data, 'toy_examples', examples):
            for script in SCRIPTS:
                more = {ppo: ['--minibatch', '1'], reinforce: ['--baseline', 'mean']}
                result = train(script, folder('extreme'), *SMALL, *flags, *more.get(script, []))
                assert math.isfinite(result['tuned']['f1'])
                if name == 'unanswerable':           # all ties in the end
                    assert result['tuned']['em'] == 100 and result['tuned']['d_acc'] == .5, result


def test_control_spends_the_time_of_a_run_on_mle():
    run, out = folder('run'), folder('control')
    lines = [{'config': {}}, {'iter': 0, 'dev': {}}, {'iter': 0, 'seconds': {'rollout': .1}},
             {'iter': 1, 'seconds': {'rollout': .3, 'generator': .1}},
             {'iter': 2, 'seconds': {'rollout': .1}}, {'iter': 3, 'seconds': {'rollout': 9.}}]
    (run / 'metrics.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in lines))
    clock = itertools.count(0., .025)                # .1, .4, .1, and three medians of .25
    with (patched(reinforce, 'mle_step', lambda *a: {}),
          patched(reinforce, 'time', SimpleNamespace(perf_counter=lambda: next(clock)))):
        cfg = reinforce.parse(['--tiny', '--control', str(run)])
        assert reinforce.control_steps(tiny_gpt(), None, cfg) == round(1.35 / .025)
    seen, order = [], data.order
    with patched(data, 'order', lambda *a: seen.append(a[2]) or order(*a)):
        result = train(reinforce, out, *SMALL, '--control', str(run))
    assert set(seen) == {(1, 3)}                     # other batches than the warm start's, (1, 0)
    rows = [r for r in records(out) if 'mle' in r]
    assert result.keys() == {'more MLE'} and len(rows) > 4
    assert all(r.keys() == {'sft_iter', 'mle', 'mle_norm', 'lr'} for r in rows)
    assert load_checkpoint(out / 'ckpt.pt')['settings']['sft_iters'] == len(rows)
    assert train(reinforce, out, '--resume') == result


def compiled_equals_eager(script, *more, bound=1e-3):
    if not shutil.which('g++') and not torch.cuda.is_available():
        raise unittest.SkipTest('torch.compile needs g++ on CPU')
    torch._dynamo.reset()                            # what another script compiled is not its own
    figures, seen, step = [], [], script.discriminator_step

    def counted(*args):
        seen.append(graphs())
        return step(*args)

    for flag in '--no-compile', '--compile':
        out = folder(f'compiled {script.__name__}')
        # evaluation and rollout in batches of one size: a graph for each costs seconds
        with patched(script, 'discriminator_step', counted):
            train(script, out, *SMALL, '--d_dropout', '0', flag, '--sft_iters', '1', '--iters', '5',
                  '--eval_prompts', '8', '--eval_interval', '5', '--d_warmup_iters', '0',
                  '--n_layer', '2', *more)
        figures.append([r for r in records(out) if 'g_loss' in r])
    assert len(figures[0]) >= 4
    start, first, second, *later = seen[5:]          # of the compiled run, before each iteration
    assert second > start and all(n == second for n in later), seen
    assert second - seen[0] < 16, seen               # one for all layers, or it were twice as many
    for a, b in zip(*figures):
        for key in 'g_norm', 'kl', 'entropy', 'reward', 'd_loss', 'mle', 'v_loss', 'pretrain':
            if key in a:
                assert abs(a[key] - b[key]) < bound * max(1, abs(a[key])), (key, a[key], b[key])


def test_compiled_runs_equal_eager_ones():           # one test: they share most kernels
    compiled_equals_eager(reinforce)
    compiled_equals_eager(ppo, '--minibatch', '8')
    compiled_equals_eager(gumbel)


def test_bench_races_and_refuses():
    """That every race of the bench runs, with and without several samples; no figure is judged."""
    tiny = ['--prompt', '8', '--response', '4', '--n_layer', '1', '--n_head', '1', '--n_embd', '8',
            '--repeats', '1', '--device', 'cpu', '--tflops', '1', '--gbs', '100']
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for samples in '2', '1':
            bench.main(['--only', 'rollout', 'train', '--batch', '4', '--samples', samples,
                        '--json', str(SCRATCH / 'bench.json'), *tiny])
            races = json.loads((SCRATCH / 'bench.json').read_text())['races']
            assert len(races) == 4 and all(s > 0 for r in races.values()
                                           for s in r['seconds'].values()), races
    assert 'of the limit' in out.getvalue()
    for flags, words in ((['--batch', '6'], ['--batch', '--samples 4']),
                         (['--repeats', '0'], ['--repeats 0', 'above 0']),
                         (['--mean_length', 'nan'], ['--mean_length nan', 'above 0']),
                         (['--prompt', '1000'], ['--prompt 1000', '--response 32', '1024']),
                         (['--n_head', '7'], ['n_embd 768', 'n_head 7']),
                         (['--json', str(SCRATCH)], [str(SCRATCH)])):
        raises(SystemExit, words, bench.main, [*flags, '--device', 'cpu'])


def test_health_knows_a_collapse():
    ids = torch.arange(40).view(8, 5)
    mask = torch.ones(8, 5).bool()
    for response, sick in ((ids, False), (ids.roll(1, 0), False),
                           (torch.full_like(ids, 7), True),                  # could could could
                           (ids[:1].expand(8, -1), True)):                   # one answer to all
        found = data.health(response[:, None], mask[:, None], mask[:, :1], ids, mask)
        assert found['sick'] == sick and found['length'] == 5 and found['eos_rate'] == 1


def test_a_collapse_stops_the_run():
    out, kept = folder('collapse'), data.health
    with patched(data, 'health', lambda *a: {**kept(*a), 'sick': True}):
        raises(FloatingPointError, ['collapsed by iteration 20', 'ckpt.pt'], train, reinforce, out,
               *SMALL, '--iters', '40', '--eval_interval', '10')
        assert load_checkpoint(out / 'ckpt.pt')['iter'] == 0
        train(reinforce, out, *SMALL, '--iters', '9', '--overwrite')         # the last is kept
        assert load_checkpoint(out / 'ckpt.pt')['iter'] == 9 and 'final' in records(out)[-1]


def command(script, *flags, expect=0, **kwargs):
    out = subprocess.run([sys.executable, HERE / script, *map(str, flags)], capture_output=True,
                         text=True, cwd=SCRATCH, timeout=300, **kwargs)
    assert out.returncode == expect, (out.returncode, out.stdout[-500:], out.stderr[-2000:])
    return out


def test_a_mistake_is_one_sentence():
    full, other = folder('full'), folder('of another script')
    (full / 'metrics.jsonl').write_text('')
    train(reinforce, other, *SMALL, '--iters', '0')
    for script, flags, words, code in (              # some as commands, which take seconds each
            ('reinforce.py', ['--learning_rate', '1'], ['--learning_rate'], 2),
            ('reinforce.py', ['--tiny', '--init_from', 'gone.bin', '--out_dir', SCRATCH / 'a'],
             ['gone.bin'], 1),
            ('sample.py', ['--ckpt', 'gone.pt', '--question', 'Who?'], ['gone.pt'], 1)):
        err = command(script, *flags, expect=code).stderr.strip()
        assert 'Traceback' not in err and all(w in err for w in words), (flags, err)
        assert code == 2 or '\n' not in err, err
    for flags, words in ((['--table', 'gone.json'], ['gone.json', '--evaluate']),
                         (['--plot', 'gone'], ['gone/metrics.jsonl', 'not found']),
                         (['--plot', f'run={full}'], [str(full), 'no metrics']),
                         (['--plot', 'out/lr=1'], ['out/lr=1/metrics.jsonl', 'not found']),
                         (['--plot', str(HERE / 'README.md')], ['README.md', 'not found']),
                         (['--table', str(other), '--out', str(full / 'x.json')], ['--out'])):
        raises(SystemExit, words, printed, *flags)
    new = SCRATCH / 'new'
    for script, out, flags, words in (
            (reinforce, new, ['--tiny', '--n_embd', '10'], ['n_embd 10', 'n_head']),
            (reinforce, full, ['--tiny'], [str(full), '--resume', '--overwrite']),
            (reinforce, SCRATCH / 'gone', ['--resume'], ['--resume', 'no checkpoint']),
            (reinforce, new, ['--tiny', '--samples', '1'], ['--samples 1', '--baseline mean']),
            (reinforce, new, ['--tiny', '--control', str(other)], ['--control', 'no timed']),
            (reinforce, new, ['--tiny', '--init_from', str(other / 'sft.pt'), '--max_prompt', '99'],
             ['--max_prompt 99', 'block size 32']),
            (ppo, new, ['--minibatch', '1000'], ['--minibatch 1000', '--batch_size 64']),
            (ppo, new, ['--clip', '0'], ['--clip 0', 'from 0.001']),
            (reinforce, other, ['--resume', '--n_embd', '32'], ['--n_embd 32', 'has 16']),
            (reinforce, other, ['--resume', '--control', 'x'], ['--control x', 'the run has']),
            (reinforce, other, ['--resume', '--max_response', '7'], ['--max_response 7', 'has 6']),
            (reinforce, other, ['--resume', '--max_prompt', '9'], ['--max_prompt 9', 'has 26']),
            (reinforce, other, ['--resume', '--data', 'toy-varied'], ['--data toy-varied', 'toy']),
            (reinforce, new, ['--tiny', '--device', 'meta'], ['--device meta', 'another']),
            (reinforce, other, ['--resume', '--sft_iters', '9'], ['--sft_iters 9', 'has 4']),
            (ppo, other, ['--resume'], [str(other), 'another script', '--baseline'])):
        raises((ValueError, FileNotFoundError), words, train, script, out, *flags)


def test_every_flag_refuses_what_it_cannot_take():
    """What is out of range: flag, value and remedy; a word that is none of a flag's: argparse."""
    for script in SCRIPTS:
        for f in fields(script.Config):
            for value in {int: ['-1'], float: ['-1', 'nan', 'inf', '-inf']}.get(f.type, []):
                raises(ValueError, [f'--{f.name} {f.type(value)}', 'give'], script.parse,
                       [f'--{f.name}={value}'])
            if f.type is not str:
                with contextlib.redirect_stderr(io.StringIO()) as err:
                    raises(SystemExit, ['2'], script.parse, [f'--{f.name}=x'])
                assert f'--{f.name}' in err.getvalue(), err.getvalue()


def test_offline_is_one_sentence():
    dead = 'http://127.0.0.1:9'                      # where nothing listens
    env = {**os.environ, 'TIKTOKEN_CACHE_DIR': str(folder('no bpe')), 'HF_HUB_OFFLINE': '1',
           'HTTPS_PROXY': dead, 'https_proxy': dead, 'HF_HOME': str(folder('no hub'))}
    for flags, words in (([], ['BPE', 'TIKTOKEN_CACHE_DIR', '--data toy']),
                         (['--tiny', '--init_from', 'gpt2'], ['gpt2', 'offline', 'a folder'])):
        err = command('reinforce.py', *flags, '--device', 'cpu', '--out_dir', SCRATCH / 'offline',
                      expect=1, env=env).stderr.strip()
        assert '\n' not in err and all(w in err for w in words), err
    raises(FileNotFoundError, ['squad_v2', 'offline'], data.load_examples, 'squad_v2', 'dev')


def test_out_of_gpu_memory_is_one_sentence():
    def train(cfg, caught):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')

    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    handlers = list(map(signal.getsignal, numbers))
    try:
        with patched(reinforce, 'train', train):
            raises(SystemExit, ['out of memory', 'GiB', '--micro_batch'], reinforce.main,
                   ['--tiny'])
        with patched(sample, 'ask', lambda args: train(None, None)):
            raises(SystemExit, ['out of memory', 'GiB', '--micro_batch'], sample.main,
                   ['--ckpt', 'x', '--question', 'y', '--device', 'cpu'])
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


def test_folders_that_are_taken_gone_or_oddly_named():
    out = folder('ünï cödé 你好') / 'a run'
    flags = [*SMALL, '--iters', '1', '--eval_interval', '1']
    _, lock = model.open_folder(reinforce.parse([*flags, '--out_dir', str(out)]))
    raises(ValueError, [str(out), 'in use'], train, gumbel, out, *flags)
    lock.close()
    with (patched(model.fcntl, 'flock', unittest.mock.Mock(side_effect=OSError(95, 'no locks'))),
          contextlib.redirect_stderr(io.StringIO()) as said):
        model.open_folder(reinforce.parse([*flags, '--out_dir', str(out)]))
    assert 'no locks' in said.getvalue() and str(out) in said.getvalue()
    assert train(gumbel, out, *flags)['tuned']['f1'] >= 0
    assert GPT.from_pretrained(out / 'ckpt.pt').config.n_layer == 1
    file = out / 'metrics.jsonl'
    err = command('reinforce.py', *SMALL, '--out_dir', file / 'below', expect=1).stderr.strip()
    assert '\n' not in err and 'metrics.jsonl' in err, err


def test_a_signal_saves_and_exits():
    """A closed terminal sends two, itself and by its shell, and cannot be written to any more."""
    out = folder('signalled')
    for number, flags in ((signal.SIGINT, SMALL), (signal.SIGTERM, ['--resume']),
                          (signal.SIGHUP, ['--resume', '--eval_interval', '1'])):
        terminal, end = os.openpty()
        process = subprocess.Popen(
            [sys.executable, HERE / 'reinforce.py', *flags, '--iters', '100000', '--out_dir', out],
            stdout=end, stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # unless under nohup
        os.close(end)
        os.set_blocking(terminal, False)
        before = sum('reward' in r for r in records(out)) if (out / 'sft.pt').exists() else 0
        while process.poll() is None and not After(out, 'reward', before + 2):
            with contextlib.suppress(OSError):       # it holds 4 kB
                os.read(terminal, 4096)
            time.sleep(.05)
        process.send_signal(number)
        if number == signal.SIGHUP:
            os.close(terminal)
            process.send_signal(number)
        assert process.wait(60) == 128 + number, process.stderr.read()
        if number != signal.SIGHUP:
            os.close(terminal)
        saved = load_checkpoint(out / 'ckpt.pt')
        assert saved['iter'] == max(r['iter'] for r in records(out) if 'reward' in r) + 1


def test_the_commands_of_the_readme():
    out = SCRATCH / 'a run'
    shutil.rmtree(out, ignore_errors=True)
    env = {**os.environ, 'PYTHONWARNINGS': 'always,ignore::ResourceWarning'}
    done = command('reinforce.py', *SMALL, '--out_dir', out, env=env)
    assert re.search(r'warm start +[\d.]+.*\ntuned +[\d.]+', done.stdout), done.stdout
    assert not [line for line in done.stderr.splitlines() if 'Warning' in line
                and str(HERE) in line and 'site-packages' not in line], done.stderr
    assert (out / 'samples.txt').read_text().count('question  ') == 12
    assert (out / 'curves.png').stat().st_size > 1000
    ckpt = out / 'ckpt.pt'
    command('sample.py', '--ckpt', ckpt, '--question', 'Who ?', '--context', 'Ada built it .')
    text = command('sample.py', '--compare', out / 'sft.pt', ckpt, '--prompts', '3').stdout
    assert text.count(str(ckpt)) == 3 and text.count('gold  ') == 3
    text = command('reinforce.py', '--help').stdout
    assert '--no-context' in text and 'lower it to save memory' in text


def test_no_drift():
    """Scripts are alike in all that is not specific to their approach."""
    banners = ['config', 'losses', 'scores and rewards', 'training']
    stations = ['setup', 'data and models', 'warm start', 'resume', 'evaluate and checkpoint',
                'rollout', 'discriminator step', 'generator step', 'log']
    own = {'Config', 'train', 'check', 'check_approach'}     # same name, another text
    functions, settings = [], []
    for script in SCRIPTS:
        source, body = inspect.getsource(script), inspect.getsource(script.train)
        lines = re.findall(r'^    (\w+):.*?  # +.*$', inspect.getsource(script.Config), re.M)
        assert lines == [f.name for f in fields(script.Config)]
        assert re.findall(r'^# -+\n# ([\w ]+)', source, re.M) == banners
        assert re.findall(r'^ +# ([a-z ]+)$', body, re.M) == stations, body
        functions.append({n: inspect.getsource(f) for n, f in vars(script).items()
                          if inspect.isroutine(f) and f.__module__ == script.__name__
                          and n not in own})
        settings.append(dict(re.findall(r'^    (\w+): (.*)$', inspect.getsource(script.Config),
                                        re.M)))
        assert f"str = 'out/{script.__name__}'" in settings[-1].pop('out_dir')
    del functions[2]['discriminator_step']           # Gumbel-softmax shows it relaxed answers
    for one, other in itertools.combinations(range(len(SCRIPTS)), 2):
        for found, least in (functions, 10), (settings, 30):
            shared = [n for n in found[one] if n in found[other]]
            assert shared == [n for n in found[other] if n in found[one]]
            assert all(found[one][n] == found[other][n] for n in shared) and len(shared) >= least


# -----------------------------------------------------------------------------
# CUDA, on a GPU that is not there: devices, waits, memory, graphs

aten, make_rng = torch.ops.aten, torch.Generator


class Pretend(torch.Tensor):
    """A tensor that says cuda:0 and computes on the CPU or, for its size alone, on meta."""

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
        return (torch.ones(self.shape) if self.kept.is_meta else self.kept.detach()).tolist()

    def __deepcopy__(self, memo):
        copied = Pretend(self.kept.detach().clone()).requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        return copied

    def __reduce_ex__(self, protocol):               # a checkpoint holds an ordinary one
        return self.kept.detach().__reduce_ex__(protocol)


class Gpu(TorchDispatchMode):
    """
    Within it there is a GPU, for one who only looks. It refuses, as a real one does, operands on
    two devices and a generator of another. `waits` counts what would make the host wait, by name.
    With place='meta' nothing is computed, what is read is 1, and `peak` is the most bytes that the
    tensors had at once. Other faults than these go unseen.
    """
    reads = {aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.nonzero,
             aten.masked_select, aten.unique_consecutive}
    indexing = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}

    def __init__(self, place='cpu', bf16=True):
        super().__init__()
        self.place, self.bf16, self.waits = place, bf16, collections.Counter()
        self.rngs, self.bytes, self.peak, self.live = set(), 0, 0, set()

    def rng(self, device='cpu'):
        made = make_rng('cpu')
        self.rngs |= {made} if torch.device(device).type == 'cuda' else set()
        return made

    def __enter__(self):
        Gpu.now, self.stack = self, contextlib.ExitStack()
        told = dict(_lazy_init=None, is_available=True, set_device=None, synchronize=None,
                    get_device_name='pretend', is_bf16_supported=self.bf16,
                    is_current_stream_capturing=False, current_device=0)
        for owner, name, value in (
                (torch, 'Generator', self.rng), (F, 'scaled_dot_product_attention', attention),
                (torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False),
                (torch.Tensor, 'pin_memory', lambda z: z),
                *((torch.cuda, name, lambda *a, value=value, **k: value)
                  for name, value in told.items())):
            self.stack.enter_context(patched(owner, name, value))
        self.stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        self.stack.enter_context(CudaRules())
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
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
        away = ours and device is not None and not there
        by_mask = op in self.indexing and any(z is not None and z.dtype == torch.bool
                                              for z in args[1])
        if op in self.indexing:
            assert isinstance(args[0], Pretend), f'{func}: indices of another device'
        elif op is not aten.copy_ and ours:
            assert not any(z.dim() for z in others), f'{func}: operands on two devices'
        if (op in self.reads or away or by_mask
                or ours and others and op in (aten.copy_, *self.indexing)):
            self.waits[str(op)] += 1
        if device is not None:
            kwargs |= {'device': self.place if there else device, 'pin_memory': False}
        if self.place == 'meta' and ours:
            if op in self.reads:
                return {torch.bool: True, torch.long: 1}.get(args[0].dtype, 1.)
            if away:
                return torch.ones(args[0].shape, dtype=kwargs.get('dtype') or args[0].dtype)
            if others and op is aten.copy_ or by_mask and op is aten.index:
                return args[0]
        made = func(*tree_map(self.kept, args), **tree_map(self.kept, kwargs))
        if away or op is aten.copy_ and not isinstance(args[0], Pretend):
            return made
        if func._schema.name.endswith('_') and isinstance(made, torch.Tensor):
            return args[0]
        return tree_map(lambda z: self.account(z) if isinstance(z, torch.Tensor) else z, made)

    def kept(self, z):
        if isinstance(z, Pretend):
            return z.kept
        return z.to('meta') if isinstance(z, torch.Tensor) and self.place == 'meta' else z

    def account(self, kept):
        storage = kept.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if self.place == 'meta' and key not in self.live:
            self.add(key, size)
            kept.storage = storage                   # one object as long as there are tensors of it
            weakref.finalize(storage, self.add, key, -size)
        return Pretend(kept)

    def add(self, key, size):
        self.live ^= {key}
        self.bytes += size
        self.peak = max(self.peak, self.bytes)


def attention(q, k, v, attn_mask):
    """By hand; on meta, what CUDA makes of a boolean mask, a bias for its memory-efficient one."""
    if Gpu.now.place == 'cpu':
        scores = q @ k.transpose(-1, -2) * q.size(-1) ** -.5
        return scores.masked_fill(~attn_mask, -math.inf).softmax(-1) @ v
    if torch.is_autocast_enabled('cuda'):
        q, k, v = (z.to(torch.bfloat16) for z in (q, k, v))
    n = attn_mask.size(-1)
    bias = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~attn_mask, -1)
    bias = F.pad(bias, (0, -n % 16))[..., :n].expand(*q.shape[:3], n)
    learns = torch.is_grad_enabled() and any(z.requires_grad for z in (q, k, v))
    return aten._scaled_dot_product_efficient_attention(q, k, v, bias, learns)[0]


class CudaRules(TorchFunctionMode):
    """CUDA's autocast of the operations used here, torch's own sees no CUDA tensor; generators."""
    low = {F.linear, torch.Tensor.matmul, torch.Tensor.__matmul__}
    high = {F.layer_norm, F.softplus, torch.Tensor.softmax, torch.Tensor.log_softmax,
            torch.Tensor.exp, torch.Tensor.sum, torch.Tensor.cumsum}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get('generator') is not None and isinstance(args[0], Pretend):
            assert kwargs['generator'] in Gpu.now.rngs, f'{func}: a generator of another device'
        if torch.is_autocast_enabled('cuda') and func in self.low | self.high:
            dtype = torch.bfloat16 if func in self.low else torch.float32
            args, kwargs = tree_map(lambda z: z.to(dtype) if isinstance(z, Pretend)
                                    and z.is_floating_point() else z, (args, kwargs))
        return func(*args, **kwargs)


def floats(record):
    """The numbers of a record and of what is nested in it, by their keys."""
    inner = {f'{k} {name}': v for k, z in record.items() if isinstance(z, dict)
             for name, v in floats(z).items()}
    return inner | {k: v for k, v in record.items() if isinstance(v, float)}


def near(one, other, bound):
    """That two runs' records hold the same numbers within `bound`, relative where over 1."""
    for a, b in zip(map(floats, one), map(floats, other), strict=True):
        assert a.keys() == b.keys()
        assert all(abs(v - b[k]) <= bound * max(1, abs(v)) for k, v in a.items()), (a, b)


def test_a_run_that_moves_to_a_gpu_goes_on():
    """A run on the CPU with everything auto, cut short and resumed on a pretend GPU: in the end it
    has the figures of one that stayed, and on the way no operands on two devices."""
    for script in SCRIPTS:
        stayed, moved = folder(f'stayed {script.__name__}'), folder(f'moved {script.__name__}')
        flags = [*SMALL_OF[script], '--device', 'auto', '--no-compile']
        train(script, stayed, *flags)
        assert train(script, moved, *flags, caught=After(moved, 'reward', 2)) is None
        with Gpu(bf16=False):                        # as on a T4, so float32
            train(script, moved, '--resume')
        header = json.loads((moved / 'metrics.jsonl').read_text().splitlines()[0])
        assert header['device'] == 'cpu'             # where it began
        near(records(stayed), records(moved), 1e-3)
        settings = load_checkpoint(moved / 'ckpt.pt')['settings']
        assert settings['device'] == settings['dtype'] == 'auto' and settings['compile'] is False


def test_flags_left_to_auto_take_what_the_gpu_has():
    triton = importlib.util.find_spec('triton') is not None
    for given, bf16, wanted in (({}, True, ['cuda:0', 'bfloat16', triton]),
                                ({}, False, ['cuda:0', 'float32', triton]),
                                ({'dtype': 'bfloat16', 'compile': False}, False,
                                 ['cuda:0', 'bfloat16', False])):
        cfg, calls = reinforce.Config(**given), []
        with Gpu(bf16=bf16), patched(torch.cuda, 'set_device', calls.append):
            before = model.open_device(cfg)
        assert [cfg.device, cfg.dtype, cfg.compile] == wanted and calls == [torch.device('cuda:0')]
        assert reinforce.Config(**before) == reinforce.Config(**given)
    cfg, calls = reinforce.Config(device='cuda:1'), []
    with (Gpu(), patched(torch.cuda, 'set_device', calls.append), patched(
            torch, 'empty', lambda n, device: SimpleNamespace(device=torch.device(device)))):
        model.open_device(cfg)
    assert cfg.device == 'cuda:1' and calls == [torch.device('cuda:1')]
    raises(ValueError, ['--device cuda:99', 'another'], model.open_device,
           reinforce.Config(device='cuda:99'))


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


class Shapes:
    """A Split, and a tokenizer, of which nothing but the sizes is right."""
    eos = eot_token = 50256
    n_vocab, decode = 50257, str

    def __init__(self, n, cfg):
        self.examples = [dict(context=str(i), question='', answers=['a']) for i in range(n)]
        self.shape = cfg.max_prompt, cfg.max_response
        self.responses = np.ones((n, cfg.max_response), int)
        self.lengths = self.responses[:, 0]

    def __len__(self):
        return len(self.examples)

    def batch(self, rows, device='cpu'):
        ids = [torch.ones(len(rows), width).long().to(device) for width in self.shape]
        return data.Batch(ids[0], torch.zeros(len(rows)).long().to(device), ids[1], ids[1] > 0)


def at_the_defaults(script, device, *flags):
    """One step of each station of a script, eager, in sizes that are the defaults' but for flags;
    without the decoding, which takes little more than its cache."""
    cfg = script.parse(['--device', device, '--dtype', 'bfloat16', '--no-compile', '--init_from',
                        'scratch', '--sft_iters', '1', '--iters', '1', '--d_warmup_iters', '0',
                        '--out_dir', str(folder(f'sizes {script.__name__}')), *flags])

    def used(network, adamw=script.adamw):           # as from its second step on
        optimizer = adamw(network)
        for p in network.parameters():
            optimizer.state[p] = {'step': torch.zeros((), device=p.device),
                                  'exp_avg': torch.zeros_like(p), 'exp_avg_sq': torch.zeros_like(p)}
        return optimizer

    passages = np.ones((64, cfg.max_prompt + cfg.max_response), int)
    with (patched(data, 'load', lambda cfg: [Shapes(n, cfg) for n in (64, 1000, 64)]),
          patched(data, 'load_passages', lambda *a: passages), patched(script, 'adamw', used),
          patched(GPT, 'init_weights', lambda self: None),
          patched(GPT, 'decode', lambda self, token, *a: self.embed(token)),
          patched(script, 'save', lambda *a, **k: None), patched(sample, 'draw', lambda *a: None),
          patched(sample, 'finish', lambda *a: {})):
        script.train(cfg)


CARD = {reinforce: 12, ppo: 16, gumbel: 16}          # GiB, as the README has it


def peak(script, *flags):
    """GiB that the tensors of a pretend GPU had at most."""
    with Gpu('meta') as gpu:
        at_the_defaults(script, 'cuda:0', *flags)
    return gpu.peak / 2 ** 30


def test_reinforce_fits_its_card():                  # a test each: they take long
    assert 8 < peak(reinforce) < 9 < CARD[reinforce]


def test_ppo_fits_its_card():
    assert 10.4 < peak(ppo) < 11.4 < CARD[ppo]


def test_gumbel_fits_its_card():
    assert 12.1 < peak(gumbel) < 13.1 < CARD[gumbel]


def test_micro_batches_save_memory():
    few = ['--n_layer', '1', '--batch_size', '16', '--sft_batch_size', '16']
    for script in reinforce, gumbel:
        most, least = (peak(script, *few, '--micro_batch', n) for n in ('16', '8'))
        assert least < .85 * most, (script.__name__, least, most)


def test_a_judge_fits_its_card():
    args = SimpleNamespace(device='cuda:0', dtype='bfloat16', seed=1, batch_size=64, micro_batch=16,
                           top_k=None, test_steps=2, test_lr=None, best_of=2)
    split = Shapes(130, reinforce.Config())          # two batches and two more
    with (patched(GPT, 'init_weights', lambda self: None), Gpu('meta') as gpu,
          patched(GPT, 'decode', lambda self, token, *a: self.embed(token)),
          patched(sample, 'JUDGES', 1)):             # one after the other
        generator, base = (GPT(GPTConfig()).to('cuda:0').eval() for _ in range(2))
        sample.judge(generator, base, Discriminator(base).to('cuda:0'), split, split, .8, args)
    assert gpu.peak < 8 * 2 ** 30, gpu.peak / 2 ** 30


def test_caches_of_three_shapes_are_kept():
    gpt = tiny_gpt()
    kept = [gpt.cache(rows, 9) for rows in (1, 2, 3)]
    assert all(gpt.cache(rows, 9) is kept[rows - 1] for rows in (2, 3, 1))
    gpt.cache(4, 9)                                  # in place of what was asked for first
    assert len(gpt.caches) == 3 and gpt.cache(1, 9) is kept[0] and gpt.cache(3, 9) is kept[2]
    assert gpt.cache(2, 9) is not kept[1]
    address = [z.data_ptr() for z in sum(gpt.cache(1, 9), [])]
    assert len(set(address)) == 4                    # keys and values of two layers


def test_an_evaluation_is_the_same_in_batches_of_any_size():
    """What is drawn apart: with the eos likeliest, that is nothing."""
    split, _, enc = people(7)
    gpt = tiny_gpt(vocab_size=enc.n_vocab, block_size=40)
    judge = tiny_discriminator(vocab_size=enc.n_vocab, block_size=40)
    found, args = [], judging(1)
    with torch.no_grad():
        gpt.ln_f.bias[0], gpt.wte.weight[enc.eot_token, 0] = 60., 9.
    for n in 3, 5, 7:
        cfg, args.batch_size = reinforce.Config(device='cpu', dtype='float32', max_response=6,
                                                micro_batch=n, samples=1), n
        assert {len(rows) for rows in sample.batches(split, n)} == {n}
        figures, texts = sample.evaluate_run(gpt, judge, split, enc, cfg)
        assert len(texts) == len(sample.answer(gpt, split, .8, args)[0]) == 7
        found.append([*figures.values(), *sample.drift(gpt, gpt, split, .8, args)])
    assert np.allclose(found[0], found[2], atol=1e-5) and np.allclose(found[1], found[2], atol=1e-5)


def graphs():
    return torch._dynamo.utils.counters['stats']['unique_graphs']


def test_a_second_cycle_compiles_nothing():
    """After warm start, evaluation and two rollouts with what they teach; in two micro-batches, an
    evaluation in two batches of which the last is not full."""
    def compile_all(network):
        network.compiled = True
        for block in network.h:
            block.compile(backend='eager')
        network.decode = torch.compile(network.decode, backend='eager')

    torch._dynamo.reset()
    seen, evaluate = [], sample.evaluate_run
    with (patched(GPT, 'compile', compile_all), patched(
            sample, 'evaluate_run', lambda *a: seen.append(graphs()) or evaluate(*a))):
        train(reinforce, folder('cycles'), *SMALL, '--compile', '--n_layer', '2', '--iters', '6',
              '--d_warmup_iters', '0', '--micro_batch', '4')
    assert seen[0] < seen[1] == seen[2] == seen[3] < seen[0] + 16, seen


def test_matrices_are_cast_once_a_rollout():
    """And again for the next, after a step; tokens are those of autocast's casts."""
    fast, plain = tiny_gpt(block_size=64), tiny_gpt(block_size=64)
    plain.load_state_dict(fast.state_dict())
    fast.compiled = plain.compiled = True
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
    sizes = [math.prod(map(int, shape.split(','))) for shape in
             re.findall(r'empty_strided\w*\(\(([\d, ]+?),?\s*\)', code)]
    assert sizes and max(sizes) < cache[0][0].numel(), sizes
    assert 'aten.index_put.default' not in code and 'aten.index_copy.default' not in code
    assert len(written) == 4 and fixed >= set(written), (written, fixed)


# -----------------------------------------------------------------------------
# CUDA, on a GPU: python test_all.py cuda

CUDA = 'cuda:0'
SIZE = dict(n_embd=128, n_head=2)                    # heads of 64 channels, which kernels are for


def needs_a_gpu():
    if not torch.cuda.is_available():
        raise unittest.SkipTest('there is no GPU here')


@contextlib.contextmanager
def precision(name):
    """Of float32 products: highest, or high, which is TF32 on CUDA."""
    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(kept)


def test_cuda_steps_equal_the_cpus():
    """Every update's gradient and figures: of the norm 1e-4 in float32, 5% in bfloat16."""
    needs_a_gpu()
    wanted = steps_of_all_scripts(**SIZE)
    for how, activations, bound in ('highest', 'float32', 1e-4), ('high', 'bfloat16', .05):
        with precision(how):
            got = steps_of_all_scripts(device=CUDA, activations=activations, **SIZE)
        for key, value in wanted.items():
            if key[1] == 'figures':
                for k, v in value.items():
                    assert abs(v - got[key][k]) < bound * max(1, abs(v)), (key, k, v, got[key][k])
            else:
                off = ((got[key] - value).norm() / value.norm()).item()
                print('#', activations, *key, f'{off:.1e}')
                assert off < bound, (activations, key, off)


def test_cuda_logits_and_tokens_equal_the_cpus():
    """In float32; tokens under one noise, eager and compiled, decoding under CUDA graphs, in one
    shape after the other and back."""
    needs_a_gpu()
    from torch._inductor.cudagraph_trees import CUDAGraphNode
    plain = tiny_gpt(block_size=96, n_layer=3, **SIZE)
    eager, fast = (GPT(plain.config).to(CUDA).eval() for _ in range(2))
    for copied in eager, fast:
        copied.load_state_dict(plain.state_dict())
    fast.compile()
    draw, record, recorded = model.uniform, CUDAGraphNode.__init__, []
    noises = patched(model, 'uniform', lambda shape, like, rng: draw(
        shape, torch.empty(0), rng).to(like.device))
    watched = patched(CUDAGraphNode, '__init__', lambda *a, **k: recorded.append(a) or record(
        *a, **k))
    with precision('highest'), noises, watched, torch.no_grad():
        for turn, (B, K, P) in enumerate([(5, 3, 24), (16, 1, 24), (5, 3, 40)] * 3):
            if turn == 3:
                before = graphs(), len(recorded)
            rng = torch.Generator().manual_seed(turn)
            prompt, pad = torch.randint(0, 12, (B, P), generator=rng), torch.arange(B) % 7
            wanted = plain(prompt, pad)
            assert (eager(prompt.to(CUDA), pad.to(CUDA)).cpu() - wanted).abs().max() < 1e-4
            rolls = [network.generate(prompt.to(device), pad.to(device), 20, 12, K, rng=torch
                                      .Generator().manual_seed(turn)) for network, device in
                     ((plain, 'cpu'), (eager, CUDA), (fast, CUDA))]
            for roll in rolls[1:]:
                assert all(torch.equal(a, b.cpu()) for a, b in zip(rolls[0], roll)), turn
            print('#', turn, graphs(), len(recorded), skipped())
    assert (graphs(), len(recorded)) == before and recorded and not skipped()


def skipped():
    """How often inductor left CUDA graphs out, of which it says nothing."""
    return torch._dynamo.utils.counters['inductor']['cudagraph_skips']


def test_cuda_defaults_decode_under_graphs_in_bfloat16():
    """Everything left to auto, as `python reinforce.py --device cuda` has it."""
    needs_a_gpu()
    out = folder('auto')
    train(reinforce, out, *SMALL, '--n_embd', '128', '--n_head', '2', '--device', 'cuda')
    header = json.loads((out / 'metrics.jsonl').read_text().splitlines()[0])
    assert header['config']['dtype'] == 'bfloat16' and header['config']['compile'] is True
    assert header['config']['device'] == 'cuda:0' and not skipped()


def test_cuda_token_loop_does_not_wait():
    needs_a_gpu()
    gpt, rng = tiny_gpt(block_size=96, **SIZE).to(CUDA), torch.Generator(CUDA)
    prompt, pad = torch.ones(8, 24).long().to(CUDA), torch.zeros(8).long().to(CUDA)
    for compiled in False, True:
        if compiled:
            gpt.compile()
        gpt.generate(prompt, pad, 8, 12, 4, rng=rng)                         # kernels, graphs
        gpt.generate(prompt, pad, 8, 12, 4, rng=rng)
        torch.cuda.set_sync_debug_mode('error')
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
    assert torch.equal(answers.argmax(-1)[mask], gumbel.beside_gold(batch, roll)[0][mask])
    critic = tiny_discriminator(4, ppo.Critic, **SIZE).to(CUDA)
    for compiled in False, True:
        if compiled:
            gpt.compile()
        past = ppo.look_back(gpt, gpt, critic, batch, roll, cfg)[0]
        with model.autocast(cfg):
            now, _ = gpt.response_logprobs(batch.prompt, batch.pad, roll.response)
        off = ((now - past).exp() - 1)[roll.mask].abs().max().item()
        print(f'# compiled {compiled}: {off:.1e}')
        assert off < .05


def cuda_run(script, *more):
    """Compiled against eager, with no graph after the second iteration; a resume against none.
    Without TF32, whose rounding would make a token another one here and there."""
    needs_a_gpu()
    flags = ['--device', CUDA, '--dtype', 'float32', *more]
    whole, parts = (folder(f'{name} cuda {script.__name__}') for name in ('whole', 'parts'))
    with precision('highest'), patched(torch, 'set_float32_matmul_precision', lambda name: None):
        compiled_equals_eager(script, *flags, '--n_layer', '1', bound=.01)
        flags = [*SMALL_OF[script], *flags, '--no-compile']
        train(script, whole, *flags)
        assert train(script, parts, *flags, caught=After(parts, 'reward', 2)) is None
        train(script, parts, '--resume')
    near(records(whole), records(parts), .01)


def test_cuda_reinforce_runs():
    cuda_run(reinforce)


def test_cuda_ppo_runs():
    cuda_run(ppo, '--minibatch', '8')


def test_cuda_gumbel_runs():
    cuda_run(gumbel)


def test_cuda_memory_is_what_was_promised():
    """Eager, as on the pretend GPU."""
    needs_a_gpu()
    for script, most in CARD.items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        at_the_defaults(script, CUDA)
        used = torch.cuda.max_memory_allocated() / 2 ** 30
        print(f'# {script.__name__}: {used:.1f} GiB')
        assert used < most, (script.__name__, used)


# -----------------------------------------------------------------------------


def run(name):
    """Runs one test in silence; the line to print, and those of its own that begin with #."""
    start, kept = time.perf_counter(), sys.stdout
    sys.stdout = said = io.StringIO()
    try:
        globals()[name]()
        verdict = 'ok'
    except unittest.SkipTest as e:
        verdict = f'skipped: {e}'
    except Exception:
        verdict = f'FAILED\n{traceback.format_exc()}'
    finally:
        sys.stdout = kept
    notes = [f'\n    {line}' for line in said.getvalue().splitlines() if line.startswith('# ')]
    return f'{name}  {time.perf_counter() - start:.1f} s  {verdict}{"".join(notes)}'


def main(part=''):
    """Runs the tests whose name holds `part`; exit code 1 if one fails or none matched."""
    os.environ['OMP_NUM_THREADS'] = '1'              # one core a process, and its subprocesses
    os.environ['TORCHINDUCTOR_COMPILE_THREADS'] = '2'
    names = [n for n in globals() if n.startswith('test_') and part in n]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context('spawn')) as pool:
        longest_first = sorted(names, key=lambda n: 'compiled' not in n)
        started = {n: pool.submit(run, n) for n in longest_first}
        lines = []
        for name in names:
            lines.append(started[name].result())
            print(lines[-1], flush=True)
    shutil.rmtree(SCRATCH, ignore_errors=True)
    counts = [sum(f' s  {verdict}' in line for line in lines)
              for verdict in ('ok', 'FAILED', 'skipped')]
    print('{} passed, {} failed, {} skipped'.format(*counts))
    sys.exit(1 if counts[1] or not names else 0)


if __name__ == '__main__':
    main(*sys.argv[1:2])
