"""
Everything checked, on a CPU and offline: `python test_all.py [part of a name]`, or pytest.
"""

import collections
import contextlib
import ctypes
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Optional, get_args

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
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import bench
import data
import gumbel
import model
import ppo
import reinforce
import sample
from model import GPT, Discriminator, GPTConfig, load_checkpoint, save_checkpoint

SCRIPTS = [reinforce, ppo, gumbel]


def tiny_gpt(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**dict(block_size=24, vocab_size=13, n_layer=2, n_head=2, n_embd=8),
                            **changes})).eval()


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
    for name, n_layer in ('gpt2', 12), ('distilgpt2', 6):
        torch.manual_seed(0)
        theirs = GPT2LMHeadModel(GPT2Config(n_layer=n_layer)).eval()
        with torch.no_grad():
            wanted = theirs(tokens).logits
        path = folder(name)
        theirs.save_pretrained(path)
        sources = [path, path / 'model.safetensors']
        # the layout of the first releases: no prefix, the causal mask among the weights
        old = {k.removeprefix('transformer.'): v for k, v in theirs.state_dict().items()}
        old |= {f'h.{i}.attn.bias': torch.ones(1, 1, 4, 4) for i in range(n_layer)}
        (path / 'bin').mkdir()
        torch.save(old, path / 'bin' / 'pytorch_model.bin')
        for source in [*sources, path / 'bin', path / 'bin' / 'pytorch_model.bin']:
            ours = GPT.from_pretrained(str(source)).eval()
            with torch.no_grad():
                assert (ours(tokens) - wanted).abs().max() < 1e-4, source
        ours.save_pretrained(path / 'back')
        again = GPT2LMHeadModel.from_pretrained(path / 'back').eval()
        with torch.no_grad():
            assert (again(tokens).logits - wanted).abs().max() < 1e-4
        shutil.rmtree(path)


def test_ids_and_onehots_embed_bit_for_bit():
    gpt, tokens = tiny_gpt(), torch.randint(0, 13, (4, 9))
    onehots = F.one_hot(tokens, 13).float().requires_grad_()
    assert torch.equal(gpt.embed(tokens), gpt.embed(onehots))
    assert torch.equal(gpt(tokens), gpt(onehots))
    gpt(onehots).sum().backward()
    assert onehots.grad.abs().sum() > 0
    scorer = Discriminator(gpt).eval()
    torch.nn.init.normal_(scorer.score.weight)
    prompt, response = tokens[:, :4], tokens[:, 4:]
    pad = torch.zeros(4, dtype=torch.long)
    kinds = response, F.one_hot(response, 13).float()
    assert torch.equal(*(scorer(prompt, pad, kind) for kind in kinds))


def test_a_linear_layer_is_the_same_with_and_without_gradient():
    """Without, a CPU takes oneDNN's own call; with GELU, without a bias, of no rows, in float64."""
    for rows, bias, gelu, dtype, width in itertools.product(
            ((5, 7), (0,), (40,)), (True, False), (True, False), (torch.float32, torch.float64),
            (12, 512)):
        x, weight = torch.randn(*rows, width).to(dtype), torch.randn(600, width).to(dtype)
        b = torch.randn(600).to(dtype) if bias else None
        wanted = x @ weight.t() + (b if bias else 0)
        if gelu:
            wanted = .5 * wanted * (1 + (math.sqrt(2 / math.pi)
                                         * (wanted + .044715 * wanted ** 3)).tanh())
        for grad in True, False:
            with torch.set_grad_enabled(grad):
                got = model.linear(x, weight, b, gelu)
            assert got.shape == wanted.shape and torch.allclose(got, wanted, atol=1e-4)


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
        gpt, prompt = tiny_gpt(dropout=0.).double(), torch.randint(0, 13, (4, 6))
        response, pad = torch.randint(0, 13, (4 * K, R)), torch.tensor([0, 2, 5, 1])
        discriminator = Discriminator(tiny_gpt(1)).double()
        torch.nn.init.normal_(discriminator.score.weight)
        tokens = torch.cat((prompt.repeat_interleave(K, 0), response), 1)
        wanted = gpt.logprobs(tokens, pad.repeat_interleave(K), 6, .7)
        got = gpt.response_logprobs(prompt, pad, response, .7)
        for a, b in zip(wanted, got):
            assert a.shape == b.shape == (4 * K, R) and (a - b).abs().max() < 1e-9
        weight = torch.randn(4 * K, R).double()
        a, b = (gradient(gpt, (z[0] * weight).sum()) for z in (wanted, got))
        assert (a - b).abs().max() < 1e-9 and a.abs().max() > 1e-3
        wanted = discriminator(prompt.repeat_interleave(K, 0), pad.repeat_interleave(K), response)
        for kind in response, F.one_hot(response, 13).double():
            got = discriminator(prompt, pad, kind)
            assert got.shape == (4 * K, R) and (wanted - got).abs().max() < 1e-9
        a, b = (gradient(discriminator, (z * weight).sum()) for z in (wanted, got))
        assert (a - b).abs().max() < 1e-9 and a.abs().max() > 1e-3


def test_bfloat16_keeps_logprobs_of_large_logits():
    gpt, tokens = tiny_gpt(), torch.randint(0, 13, (3, 11))
    with torch.no_grad():
        gpt.wte.weight += 1                          # GPT-2's own logits are around -100
        gpt.ln_f.bias -= 100 / 8
        wanted = gpt.logprobs(tokens)[0]
        assert gpt(tokens).mean() < -90
        with torch.autocast('cpu', torch.bfloat16):
            got = gpt.logprobs(tokens)[0]
    assert (got - wanted).abs().max() < .05


def test_cached_generation_equals_uncached():
    gpt, prompt, K, R, eos = tiny_gpt(), torch.randint(0, 12, (5, 8)), 3, 9, 12
    pad = torch.tensor([0, 3, 7, 1, 5])
    for temperature, top_k in (1.0, None), (.8, 4), (0, None):
        response, mask, noise = gpt.generate(
            prompt, pad, R, eos, K, temperature, top_k, torch.Generator().manual_seed(3), True)
        assert response.shape == mask.shape == (15, R)
        tokens, pads = prompt.repeat_interleave(K, 0), pad.repeat_interleave(K)
        alive = torch.ones(15, dtype=torch.bool)
        for t in range(R):                           # one token at a time, everything recomputed
            logits = gpt(tokens, pads)[:, -1]
            if temperature:
                logits = logits / temperature
                if top_k:
                    kth = logits.sort(-1, descending=True).values[:, top_k - 1:top_k]
                    logits[logits < kth] = -math.inf
                logits = logits + noise[:, t]
            token = logits.argmax(-1).where(alive, eos)
            assert torch.equal(token, response[:, t]) and torch.equal(alive, mask[:, t])
            alive = alive & (token != eos)
            tokens = torch.cat((tokens, token[:, None]), 1)
        logprobs, entropy = gpt.logprobs(tokens, pads, 8, temperature or 1.0)
        full = (gpt(tokens, pads)[:, 7:-1] / (temperature or 1)).log_softmax(-1)
        assert (logprobs - full.gather(-1, response[..., None])[..., 0]).abs().max() < 1e-5
        assert (entropy + (full.exp() * full).sum(-1)).abs().max() < 1e-5
    assert not mask.all() or alive.all()
    again = gpt.generate(prompt, pad, R, eos, rng=torch.Generator().manual_seed(3))[0]
    assert torch.equal(again, gpt.generate(prompt, pad, R, eos,
                                           rng=torch.Generator().manual_seed(3))[0])


def test_bucketed_and_shrinking_generation_equals_the_plain_one():
    """Prompts without their padding, rows dropped as they end, against all rows to the end."""
    gpt = tiny_gpt(block_size=40)
    with torch.no_grad():
        gpt.ln_f.bias[0] = 3.
        gpt.wte.weight[12, 0] = .9                   # eos comes often
    for samples, B in (1, 23), (3, 11), (2, 1):
        prompt, pad = torch.randint(0, 12, (B, 20)), torch.randint(0, 20, (B,))
        found = []
        for gpt.compiled in False, True:             # which asks for static shapes
            rows = []
            with unittest.mock.patch.object(gpt, 'decode', lambda token, *a, rows=rows: (
                    rows.append(len(token)) or GPT.decode(gpt, token, *a))):
                found.append(gpt.generate(prompt, pad, 8, 12, samples=samples, keep_noise=True,
                                          rng=torch.Generator().manual_seed(B)))
            if B > 1:
                assert (min(rows) < B * samples) == (not gpt.compiled), rows
        (response, mask, noise), plain = found
        assert torch.equal(response, plain[0]) and torch.equal(mask, plain[1])
        assert torch.equal(noise[mask], plain[2][mask])
        assert B == 1 or mask.sum(1).min() < mask.sum(1).max()


def test_samples_follow_the_softmax():
    gpt, n = tiny_gpt(vocab_size=5), 20000
    prompt = torch.tensor([[1, 2, 3]])
    response, _, _ = gpt.generate(prompt, torch.zeros(1, dtype=torch.long), 1, 4, n,
                                  rng=torch.Generator().manual_seed(0))
    p = gpt(prompt)[0, -1].softmax(-1)
    counts = torch.bincount(response[:, 0], minlength=5)
    chi2 = ((counts - n * p) ** 2 / (n * p)).sum().item()
    assert chi2 < 18.47, chi2                        # 4 degrees of freedom, one in a thousand


def test_generation_stops_when_all_rows_ended():
    gpt, calls = tiny_gpt(), []
    with torch.no_grad():
        gpt.wte.weight[12] = 50 * gpt.ln_f.bias.copy_(torch.ones(8))     # eos always wins
    decode, gpt.decode = gpt.decode, lambda *a: calls.append(1) or decode(*a)
    response, mask, _ = gpt.generate(torch.ones(4, 3, dtype=torch.long),
                                     torch.zeros(4, dtype=torch.long), 9, 12)
    assert (response == 12).all() and mask.sum() == 4 and not calls


def test_chunked_logprobs_equal_whole_ones():
    gpt, tokens = tiny_gpt(), torch.randint(0, 13, (4, 9))
    grads, values, kept = [], [], model.HEAD_CHUNK
    for chunk in kept, 13 * 5:
        model.HEAD_CHUNK = chunk
        gpt.zero_grad()
        logprobs, _ = gpt.logprobs(tokens)
        logprobs.sum().backward()
        values.append(logprobs)
        grads.append(gpt.wte.weight.grad.clone())
    model.HEAD_CHUNK = kept
    assert (values[0] - values[1]).abs().max() < 1e-6
    assert (grads[0] - grads[1]).abs().max() < 1e-4


def test_checkpoints_are_strict_and_execute_nothing():
    path = folder('files')
    gpt = tiny_gpt()
    gpt.save_pretrained(path)
    raises(FileNotFoundError, ['nowhere', '--init_from'], GPT.from_pretrained, 'nowhere')
    raises(FileNotFoundError, ['model.safetensors'], GPT.from_pretrained, str(folder('empty')))
    weights = model.load_file(path / 'model.safetensors')
    for change, words in (({'h.0.ln_1.bias': None}, ['lacks h.0.ln_1.bias']),
                          ({'h.0.extra': torch.ones(2)}, ['unknown h.0.extra']),
                          ({'ln_f.bias': torch.ones(9)}, ['misshapen ln_f.bias (9,) for (8,)']),
                          ({'lm_head.weight': torch.ones(13, 8)}, ['tied'])):
        wrong = {k: v for k, v in {**weights, **change}.items() if v is not None}
        model.save_file(wrong, path / 'model.safetensors')
        raises(ValueError, words, GPT.from_pretrained, str(path))
    config = json.loads((path / 'config.json').read_text())
    model.save_file(weights, path / 'model.safetensors')
    (path / 'config.json').write_text(json.dumps({**config, 'activation_function': 'relu'}))
    raises(ValueError, ['relu', 'gelu_new'], GPT.from_pretrained, str(path))
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
    raises(FileNotFoundError, ['gone.pt'], load_checkpoint, path / 'gone.pt')
    raises(ValueError, ['n_embd 10', 'n_head 4'], GPTConfig, n_embd=10, n_head=4)


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


def test_em_and_f1_on_hand_made_cases():
    examples = [{'answers': ['the Old Bridge', 'bridge'], 'id': ''}, {'answers': [], 'id': ''}]
    for answers, has, no in ((['Bridge!', 'unanswerable'], (100, 100), (100, 100)),
                             (['an old bridge', ''], (100, 100), (100, 100)),
                             (['new bridge', 'Rome'], (0, 200 / 3), (0, 0)),
                             (['unanswerable', 'Unanswerable.'], (0, 0), (100, 100)),
                             (['tower', 'the'], (0, 0), (100, 100))):
        out = data.score_answers(answers, examples)
        assert np.allclose((out['has_em'], out['has_f1']), has), (answers, out)
        assert np.allclose((out['no_em'], out['no_f1']), no), (answers, out)
        assert math.isclose(out['f1'], (out['has_f1'] + out['no_f1']) / 2)
    assert math.isclose(data.f1('a b b c', 'b b d'), 2 * 2 / (3 + 3))    # `a` is an article


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
    assert sorted(data.order(3, 7, 0, 0)[:3]) == [0, 1, 2]


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

    varied = data.load_examples('toy-varied', 'train')
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
    text = f'[CONTEXT] {dev[0]["context"]}\n[QUESTION] {dev[0]["question"]}\n[ANSWER] größer'
    assert enc.decode(enc.encode_ordinary(text)) == text
    assert len(enc.encode_ordinary(' ' + dev[0]['context'])) == len(dev[0]['context'].split())


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
    assert data.distinct(response[:, :1], mask[:, :1], 2) == 0


def test_passages_are_packed():
    enc = data.load_tokenizer('toy')
    examples = [{'context': 'Ada sold it .'}, {'context': 'Ada sold it .'}, {'context': 'In May .'}]
    rows = data.load_passages('', examples, enc, 4)
    ids = enc.encode_ordinary(' Ada sold it .') + [enc.eot_token] \
        + enc.encode_ordinary(' In May .') + [enc.eot_token]
    assert rows.shape == (len(ids) // 4, 4) and rows.flatten().tolist() == ids[:rows.size]
    assert data.load_passages('', examples, enc, 99).tolist() == [(99 * ids)[:99]]
    path = folder('passages') / 'text.txt'
    raises(FileNotFoundError, ['text.txt', '--pretrain_file'], data.load_passages, path, [], enc, 4)
    for content, word in ((b'', 'empty'), (b'\xff\xfe', 'UTF-8')):
        path.write_bytes(content)
        raises(ValueError, ['text.txt', word], data.load_passages, path, [], enc, 4)
    path.write_text('Who In May .')
    text = enc.decode(data.load_passages(path, [], enc, 7)[0].tolist())
    assert text == 'Who In May .<|endoftext|>'


def squad_file(path, articles):
    path.write_text(json.dumps({'version': 'v2.0', 'data': articles}))


def test_squad_files_are_checked():
    path = folder('squad')
    qa = {'id': 'q7', 'question': 'Who?', 'is_impossible': False,
          'answers': [{'text': 'Ada', 'answer_start': 0}]}
    no = {'id': 'q8', 'question': 'Why?', 'is_impossible': True, 'answers': []}
    file = path / data.FILES['dev']
    raises(FileNotFoundError, ['dev-v2.0.json', '--data'], data.load_examples, str(path), 'dev')
    squad_file(file, [{'title': '', 'paragraphs': [{'context': 'Ada .', 'qas': [qa, no]}]}])
    assert data.load_examples(str(path), 'dev') == [
        {'id': 'q7', 'context': 'Ada .', 'question': 'Who?', 'answers': ['Ada'], 'start': 0},
        {'id': 'q8', 'context': 'Ada .', 'question': 'Why?', 'answers': [], 'start': -1}]
    for change, words in (({'question': None}, ['q7', 'question', 'NoneType']),
                          ({'answers': [{'text': 'Ada'}]}, ['q7', 'answer_start']),
                          ({'answers': []}, ['q7', 'is_impossible']),
                          ({'id': 7}, ['article 0', 'id'])):
        squad_file(file, [{'paragraphs': [{'context': 'Ada .', 'qas': [{**qa, **change}]}]}])
        raises(ValueError, ['dev-v2.0.json', *words], data.load_examples, str(path), 'dev')
    squad_file(file, [])
    raises(ValueError, ['no question'], data.load_examples, str(path), 'dev')
    file.write_text('{"data": [')
    raises(ValueError, ['not JSON'], data.load_examples, str(path), 'dev')


def test_real_squad():
    if not SHARED.is_dir():
        raise unittest.SkipTest('the SQuAD files are not beside this repository')
    enc = data.load_tokenizer('squad')
    dev = data.load_examples(str(SHARED / 'squad'), 'dev')
    assert len(dev) == 1895 and sum(not e['answers'] for e in dev) == 914
    train = data.load_examples(str(SHARED / 'squad'), 'train')
    split = data.Split(train, enc, 128, 32, train=True)
    assert len(split) == 12129 and split.cut_prompts > 5000
    lost = sum(e['answers'][0] not in enc.decode(p.tolist()) for e, p in
               zip(train, split.prompts) if e['answers'])
    assert lost < 20, lost                           # the cut keeps the answer in the prompt


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
    """A float64 policy, its reference, and all 15 responses to one prompt, with rewards of tokens
    that depend on the tokens up to them and on nothing to their right."""
    V, R, eos = 3, 3, 2
    policy, reference = (tiny_gpt(seed, vocab_size=V, n_layer=1).double() for seed in (1, 2))
    response, mask = every_response(V, R, eos)
    tokens = torch.cat((torch.tensor([[0, 1]]).expand(len(response), -1), response), 1)
    with torch.no_grad():
        ref_logprobs = reference.logprobs(tokens, None, 2)[0]
    assert len(response) == 15
    table = torch.randn(V ** R, R, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    prefix = (response * V ** torch.arange(R)).cumsum(1)
    reward = torch.stack([table[prefix[:, t], t] for t in range(R)], 1) * mask
    return policy, tokens, mask, ref_logprobs, reward


def gradient(network, value):
    grads = torch.autograd.grad(value, list(network.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


class Keep(torch.optim.SGD):
    """An optimizer that moves nothing and keeps the gradient it was last given."""

    def __init__(self, network):
        super().__init__(network.parameters(), lr=0.)

    def step(self):
        params = self.param_groups[0]['params']
        self.kept = torch.cat([p.grad.flatten() for p in params if p.grad is not None])


def test_reinforce_gradient_is_exact():
    policy, tokens, mask, ref_logprobs, reward = enumerated()
    beta, n = .3, len(tokens)
    logprobs = policy.logprobs(tokens, None, 2)[0] * mask
    p = logprobs.sum(1).exp()
    assert abs(p.sum().item() - 1) < 1e-9
    log_ratio = (logprobs - ref_logprobs * mask).sum(1)
    exact = gradient(policy, (p * (reward.sum(1) - beta * log_ratio)).sum())
    rewards = (reward - beta * (logprobs - ref_logprobs * mask)).detach()

    logprobs = policy.logprobs(tokens, None, 2)[0]
    A = reinforce.advantages(rewards, 1, 'final', 'mean', .7)
    loss = sum(q * reinforce.policy_loss(logprobs[i:i + 1], A[i:i + 1], mask[i:i + 1])
               for i, q in enumerate(p.detach()))
    assert (gradient(policy, -loss) - exact).abs().max() < 1e-9

    for kind in 'final', 'dense':                    # leave-one-out: all pairs of responses
        logprobs = policy.logprobs(tokens, None, 2)[0]
        loss = 0.
        for i, j in itertools.product(range(n), repeat=2):
            A = reinforce.advantages(rewards[[i, j]], 2, kind, 'loo', 0.)
            loss = loss + p[i].detach() * p[j].detach() / 2 * reinforce.policy_loss(
                logprobs[[i, j]], A, mask[[i, j]])
        assert (gradient(policy, -loss) - exact).abs().max() < 1e-9, kind


def test_reinforce_step_takes_the_gradient_of_its_parts():
    cfg = reinforce.parse(['--tiny', '--beta', '.3', '--micro_batch', '4'])
    policy = tiny_gpt(3)
    batch = data.Batch(torch.randint(0, 12, (4, 5)), torch.tensor([0, 1, 2, 0]),
                       torch.randint(0, 12, (4, 3)), torch.ones(4, 3).bool())
    roll = reinforce.rollout(policy, tiny_gpt(4), batch, 12, torch.Generator().manual_seed(0),
                             replace(cfg, device='cpu', dtype='float32', max_response=3))
    rewards = torch.randn(8, 3) * roll.mask
    optimizer = Keep(policy)
    cfg.device, cfg.dtype = 'cpu', 'float32'
    reinforce.reinforce_step(policy, optimizer, roll, rewards, batch, .5, 0., 0., cfg)
    got = optimizer.kept
    logprobs, _ = policy.logprobs(torch.cat((roll.prompt, roll.response), 1), roll.pad, 5)
    total = rewards - .3 * (logprobs.detach() - roll.ref_logprobs) * roll.mask
    A = reinforce.advantages(total, 2, 'final', 'loo', 0.)
    wanted = gradient(policy, reinforce.policy_loss(logprobs, A, roll.mask) / 8
                      + .5 * reinforce.mle_loss(policy, batch))
    assert (got - wanted).abs().max() < 1e-5


def test_the_policy_that_learns_is_the_one_that_sampled():
    """Away from temperature 1 too: a policy is 0 nats from itself, and its log-probs are of that
    temperature."""
    policy = tiny_gpt(3)
    batch = data.Batch(torch.randint(0, 12, (4, 5)), torch.tensor([0, 1, 2, 0]),
                       torch.randint(0, 12, (4, 3)), torch.ones(4, 3).bool())
    for script in reinforce, ppo:
        cfg = replace(script.parse(['--tiny', '--temperature', '.5']), dtype='float32',
                      max_response=3)
        roll = script.rollout(policy, policy, batch, 12, torch.Generator().manual_seed(0), cfg)
        logits = policy(torch.cat((roll.prompt, roll.response), 1), roll.pad)[:, 4:-1] / .5
        wanted = logits.log_softmax(-1).gather(-1, roll.response[..., None])[..., 0]
        assert (roll.ref_logprobs - wanted).abs().max() < 1e-5
        if script is ppo:
            critic = ppo.Critic(policy)
            assert (ppo.look_back(policy, critic, roll, cfg)[0] - wanted).abs().max() < 1e-5
            figures = ppo.ppo_step(policy, critic, (Keep(policy), Keep(critic)), roll,
                                   torch.randn(8, 3) * roll.mask, batch, None, 0.,
                                   {'beta_factor': 1., 'updates': 0}, (0., 0.),
                                   replace(cfg, pretrain=0.))
            assert figures['approx_kl'] < 1e-9
        else:
            figures = reinforce.reinforce_step(policy, Keep(policy), roll, torch.randn(8, 3), batch,
                                               0., 0., 0., cfg)
        assert abs(figures['kl']) < 1e-5


def test_dense_rewards_telescope_to_the_final_one():
    g = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(50, 6, generator=g)
    lengths = torch.randint(1, 7, (50, 1), generator=g)
    mask = torch.arange(6) < lengths
    ended = torch.rand(50, generator=g) < .7
    args = (scores, mask, ended)
    final, dense = (reinforce.token_rewards(*args, kind, -1.) for kind in ('final', 'dense'))
    assert (final.sum(1) - dense.sum(1)).abs().max() < 1e-5
    assert ((final != 0).sum(1) == 1).all() and not dense[~mask].any()
    assert (final.sum(1)[~ended] == -1).all()
    end = scores.gather(1, lengths - 1)[:, 0]
    assert torch.equal(final.sum(1)[ended], end[ended])


def test_a_reward_is_the_margin_to_the_gold_answer():
    eos = 12
    gold = torch.tensor([[1, 2, eos, eos], [3, eos, eos, eos]])
    gold_mask = torch.arange(4) <= torch.tensor([[2], [1]])
    response = torch.tensor([[1, 2, eos, eos], [1, 5, 6, eos], [eos, eos, eos, eos], [3, 4, 5, 6]])
    mask = torch.arange(4) <= torch.tensor([[2], [3], [0], [3]])
    prompt, pad = torch.randint(0, 12, (2, 5)), torch.tensor([0, 2])
    network = Discriminator(tiny_gpt()).eval()
    torch.nn.init.normal_(network.score.weight)
    cfg = reinforce.parse(['--samples', '2', '--micro_batch', '2', '--reward_clip', '.5'])
    cfg.device, cfg.dtype = 'cpu', 'float32'
    batch = data.Batch(prompt, pad, gold, gold_mask)
    roll = reinforce.Rollout(*(z.repeat_interleave(2, 0) for z in (prompt, pad)), response, mask,
                             None, None)
    running = {'mean': None, 'square': None}
    values, mean = reinforce.prefix_values(network, roll, batch, running, cfg)
    s = network(roll.prompt, roll.pad, response)
    s_gold = network(prompt, pad, gold).repeat_interleave(2, 0)
    ends = [[2, 2], [2, 3], [1, 0], [1, 3]]          # last columns of the gold answer and of ours
    for row, (a, b) in enumerate(ends):
        for t in range(4):
            margin = (s[row, min(t, b)] - s_gold[row, min(t, a)]).item()
            wanted = 2 / (1 + math.exp(-margin)) - 1
            assert abs(values[row, t].item() - wanted) < 1e-5, (row, t)
    assert max(values[0].abs().max(), values[1, 0].abs()) < 1e-6 # the gold answer, its prefix
    end = torch.stack([s[row, b] for row, (_, b) in enumerate(ends)])
    assert abs(mean - end.mean().item()) < 1e-5
    cfg.relative, running = False, {'mean': None, 'square': None}
    values, _ = reinforce.prefix_values(network, roll, batch, running, cfg)
    z = ((end - end.mean()) / end.std(correction=0)).clamp(-.5, .5)
    assert (values[:, -1] - z).abs().max() < 1e-4


def test_discriminator_gradient_is_that_of_the_objective():
    """Of the poster's, log D(x, y*) + log(1 - D(x, y)), written by hand; ties and eos included."""
    eos = 12
    real = torch.tensor([[1, 2, eos, eos], [3, eos, eos, eos], [4, 5, 6, 7]])
    fake = torch.tensor([[1, 3, 3, eos], [3, eos, eos, eos], [eos, eos, eos, eos]])
    ends = {'real': [2, 1, 3], 'fake': [3, 1, 0]}    # columns of the last real token
    masks = [torch.arange(4) <= torch.tensor(e)[:, None] for e in ends.values()]
    prompt, pad = torch.randint(0, 12, (3, 5)), torch.tensor([0, 2, 4])
    pairs = reinforce.Pairs(prompt, pad, real, masks[0], fake, masks[1])
    network = Discriminator(tiny_gpt()).eval()
    torch.nn.init.normal_(network.score.weight)
    optimizer = Keep(network)
    for kind, prefixes in itertools.product(('minimax', 'pair'), (False, True)):
        cfg = reinforce.parse(['--d_loss', kind, '--d_lr', '0'])
        cfg.d_prefixes, cfg.device, cfg.dtype, cfg.micro_batch = prefixes, 'cpu', 'float32', 2
        out = reinforce.discriminator_step(network, optimizer, pairs, 3, False, cfg)
        got = optimizer.kept
        s_real, s_fake = network(prompt, pad, real), network(prompt, pad, fake)
        loss, right = 0., []
        # (row, first difference): row 1 is a tie and in no loss
        for row, first in (0, 1), (2, 0):
            last = max(ends['real'][row], ends['fake'][row])
            columns = range(first, last + 1) if prefixes else [last]
            terms = []
            for t in columns:
                a = s_real[row, min(t, ends['real'][row])]
                b = s_fake[row, min(t, ends['fake'][row])]
                terms.append(-torch.log(torch.sigmoid(a - b)) if kind == 'pair' else
                             -torch.log(torch.sigmoid(a)) - torch.log(1 - torch.sigmoid(b)))
            loss = loss + sum(terms) / len(terms) / 2
            right.append((a > b).item())
        assert (got - gradient(network, loss)).abs().max() < 1e-5, (kind, prefixes)
        assert abs(out['d_loss'] - loss.item()) < 1e-5
        assert abs(out['tie_rate'] - 1 / 3) < 1e-6 and out['d_acc'] == np.mean(right)


def test_a_batch_of_ties_moves_no_discriminator():
    cfg = reinforce.parse(['--tiny'])
    cfg.dtype = 'float32'
    network = Discriminator(tiny_gpt()).eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    ids, mask = torch.ones(4, 3, dtype=torch.long), torch.ones(4, 3).bool()
    pairs = reinforce.Pairs(ids, torch.zeros(4, dtype=torch.long), ids, mask, ids, mask)
    out = reinforce.discriminator_step(network, model.adamw(network), pairs, 4, False, cfg)
    assert out == {'d_loss': None, 'd_norm': None, 'd_acc': None, 'tie_rate': 1.0}
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


def test_eos_is_trained_and_what_follows_it_is_not():
    gpt, eos = tiny_gpt(), 12
    prompt, pad = torch.randint(0, 12, (1, 4)), torch.zeros(1, dtype=torch.long)
    mask = torch.tensor([[True, True, False]])
    losses = [reinforce.mle_loss(gpt, data.Batch(prompt, pad, torch.tensor([[3, eos, t]]), mask))
              for t in (eos, 5)]
    assert torch.equal(*losses)
    before = gpt(torch.cat((prompt, torch.tensor([[3]])), 1))[0, -1].softmax(-1)[eos]
    optimizer = torch.optim.SGD(gpt.parameters(), lr=.1)
    losses[0].backward()
    optimizer.step()
    assert gpt(torch.cat((prompt, torch.tensor([[3]])), 1))[0, -1].softmax(-1)[eos] > before


# -----------------------------------------------------------------------------
# ppo: oracles


def test_gae_equals_the_double_sum():
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 40, 6, generator=g, dtype=torch.double)
    lengths = torch.randint(1, 7, (40,), generator=g)
    mask = torch.arange(6) < lengths[:, None]
    rewards = rewards * mask
    for lam in 0., .3, .95, 1.:
        A, returns = ppo.gae(rewards, values, mask, lam)
        for row, n in enumerate(lengths.tolist()):
            V = [*values[row, :n].tolist(), 0.]      # what stands after eos does not count
            for t in range(n):
                wanted = sum(lam ** (k - t) * (rewards[row, k].item() + V[k + 1] - V[k])
                             for k in range(t, n))
                assert abs(A[row, t].item() - wanted) < 1e-12
                assert abs(returns[row, t].item() - wanted - V[t]) < 1e-12
        assert not A[~mask].any() and not returns[~mask].any()
    w = ppo.whiten(A, mask)
    assert abs(w[mask].mean()) < 1e-12 and abs(w[mask].std(correction=0) - 1) < 1e-6
    assert not w[~mask].any()


def test_ppo_gradient_at_ratio_one_is_exact():
    """It is REINFORCE's with the same baseline, and that of the KL-penalised objective."""
    policy, tokens, mask, ref_logprobs, reward = enumerated()
    beta = .3
    logprobs = policy.logprobs(tokens, None, 2)[0]
    p = (logprobs * mask).sum(1).exp()
    log_ratio = (logprobs - ref_logprobs) * mask
    exact = gradient(policy, (p * (reward.sum(1) - beta * log_ratio.sum(1))).sum())
    logprobs = policy.logprobs(tokens, None, 2)[0]
    old, q = logprobs.detach(), p.detach()
    rewards = reward - beta * (old - ref_logprobs) * mask
    prefix = (tokens[:, 1:-1] * 5 ** torch.arange(3)).cumsum(1)      # a critic of what precedes y_t
    critic = torch.sin(prefix.double())
    for values in torch.full_like(rewards, .7), critic:
        A, _ = ppo.gae(rewards, values, mask, 1.)
        loss = sum(w * ppo.clipped_policy_loss(*(z[i:i + 1] for z in (logprobs, old, A, mask)), 1e9)
                   for i, w in enumerate(q))
        got = gradient(policy, -loss)
        assert (got - exact).abs().max() < 1e-9
        logprobs = policy.logprobs(tokens, None, 2)[0]
    A = reinforce.advantages(rewards, 1, 'final', 'mean', .7)
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


def ppo_case(*flags):
    """Policy, critic, rollout, rewards and the rest that a PPO step wants, small."""
    cfg = ppo.parse(['--tiny', '--samples', '2', '--batch_size', '4', '--minibatch', '8',
                     '--max_response', '5', *flags])
    cfg.device, cfg.dtype = 'cpu', 'float32'
    policy, critic = tiny_gpt(3), ppo.Critic(tiny_gpt(4)).eval()
    torch.nn.init.normal_(critic.score.weight)
    batch = data.Batch(torch.randint(0, 12, (4, 5)), torch.tensor([0, 1, 2, 0]),
                       torch.randint(0, 12, (4, 3)), torch.ones(4, 3).bool())
    roll = ppo.rollout(policy, tiny_gpt(5), batch, 12, torch.Generator().manual_seed(2), cfg)
    assert 0 < roll.mask.sum() < roll.mask.numel()                   # ragged
    rewards = torch.randn(8, 5) * roll.mask
    optimizers = [Keep(net) for net in (policy, critic)]
    return cfg, policy, critic, batch, roll, rewards, optimizers, torch.randint(0, 13, (3, 9))


def test_ppo_update_takes_the_gradient_of_its_parts():
    """In micro-batches, with ratios away from 1; the first ratio is 1; both norms are told."""
    cfg, policy, critic, batch, roll, rewards, optimizers, passages = ppo_case(
        '--pretrain', '.7')
    P, mask = 5, roll.mask
    old, values, entropy = ppo.look_back(policy, critic, roll, cfg)
    tokens = torch.cat((roll.prompt, roll.response), 1)
    assert ((policy.logprobs(tokens[:3], roll.pad[:3], P)[0] - old[:3]).abs() < 1e-5).all()
    full = policy(tokens, roll.pad)[:, P - 1:-1].log_softmax(-1)
    H = -(full.exp() * full).sum(-1)
    assert abs(entropy - H[mask].mean()) < 1e-5
    # the critic's value of a token depends on nothing from that token on
    changed = tokens.clone()
    changed[:, P + 2:] = 7
    assert (critic(roll.prompt, roll.pad, changed[:, P:])[:, :3] - values[:, :3]).abs().max() < 1e-6
    old = old + .3 * torch.randn(old.shape)
    A, returns = ppo.gae(rewards, values, mask, .9)
    past, rows = (old, values - .5, A, returns), torch.tensor([4, 5, 0, 1, 6, 7])
    cfg.micro_batch = 2
    figures = ppo.ppo_update(policy, critic, optimizers, rows, past, roll, batch, passages, .4,
                             (0., 0.), cfg)
    got, got_critic = (o.kept for o in optimizers)
    r = [z[rows] for z in (tokens, roll.pad, mask, *past)]
    gold = data.Batch(*(z[rows // 2] for z in batch))
    n = r[2].sum()
    logprobs, _ = policy.logprobs(r[0], r[1], P)
    main = ppo.clipped_policy_loss(logprobs, r[3], r[5], r[2], .2) / n
    g_main = gradient(policy, main + .4 * ppo.mle_loss(policy, gold))
    logits = policy(passages)[:, :-1].log_softmax(-1)
    extra = -logits.gather(-1, passages[:, 1:, None]).mean()
    g_extra = gradient(policy, .7 * extra)
    assert (got - g_main - g_extra).abs().max() < 1e-5
    v = ppo.value_loss(critic(r[0][:, :P], r[1], r[0][:, P:]), r[4], r[6], r[2], .2) / n
    assert (got_critic - gradient(critic, v)).abs().max() < 1e-5
    ratio = (logprobs - r[3]).exp()[r[2]]
    told = (ppo.clipped_policy_loss(logprobs, r[3], r[5], r[2], .2) / n, v,
            ppo.mle_loss(policy, gold), (ratio - 1 - ratio.log()).mean(),
            ((ratio - 1).abs() > .2).float().mean(), g_main.norm(), g_extra.norm(), extra)
    assert len(figures) == len(told)
    for value, wanted in zip(figures, told):
        assert abs(value - wanted.item()) < 1e-4 * max(1, abs(wanted)), (figures, wanted)


def test_ppo_step_takes_its_gradient_from_scores_to_both_networks():
    """KL into the reward, GAE, whitening, losses: written out here for one update of all rows."""
    cfg, policy, critic, batch, roll, rewards, optimizers, passages = ppo_case(
        '--beta', '.2', '--lam', '.8', '--pretrain_batch_size', '2')
    running = {'beta_factor': 1.5, 'updates': 1}
    tokens, P, mask = torch.cat((roll.prompt, roll.response), 1), 5, roll.mask
    logprobs = policy.logprobs(tokens, roll.pad, P)[0]
    values = critic(roll.prompt, roll.pad, roll.response)
    with torch.no_grad():
        log_ratio = (logprobs - roll.ref_logprobs)[mask]
        r, V = rewards.clone(), values * mask
        r[mask] -= .2 * 1.5 * log_ratio
        A = torch.zeros_like(r)
        for row, t in mask.nonzero().tolist():
            for i in range(t, int(mask[row].sum())):
                after = V[row, i + 1] if i + 1 < r.size(1) else 0
                A[row, t] += .8 ** (i - t) * (r[row, i] + after - V[row, i])
        returns = (A + V)[mask]
        white = torch.zeros_like(A)
        white[mask] = (A[mask] - A[mask].mean()) / A[mask].std(correction=0)
        explained = 1 - A[mask].var() / returns.var()
    drawn = passages[data.order(3, 2, (cfg.seed, 2), 1)]
    loss = (-(white * (logprobs - logprobs.detach()).exp())[mask].mean()
            + .4 * ppo.mle_loss(policy, batch) + cfg.pretrain * ppo.passage_loss(policy, drawn))
    v_loss = .5 * (values[mask] - returns).square().mean()
    wanted = gradient(policy, loss), gradient(critic, v_loss)
    record = ppo.ppo_step(policy, critic, optimizers, roll, rewards, batch, passages.numpy(), .4,
                          running, (0., 0.), cfg)
    for optimizer, grad in zip(optimizers, wanted):
        assert (optimizer.kept - grad).abs().max() < 1e-5 and grad.abs().max() > 1e-3
    for key, value in (('kl', log_ratio.mean()), ('explained_variance', explained), ('beta', .3),
                       ('updates', 1)):
        assert abs(record[key] - value) < 1e-5, (key, record[key], value)
    assert running == {'beta_factor': 1.5, 'updates': 2}


def test_gamma_0_removes_the_pretraining_term_bit_for_bit():
    found = []
    for n in 0, 3:
        cfg, policy, critic, batch, roll, rewards, optimizers, passages = ppo_case(
            '--pretrain', '0')
        old, values, _ = ppo.look_back(policy, critic, roll, cfg)
        past = old, values, *ppo.gae(rewards, values, roll.mask, .9)
        ppo.ppo_update(policy, critic, optimizers, torch.arange(8), past, roll, batch,
                       passages if n else None, .4, (0., 0.), cfg)
        found.append(optimizers[0].kept)
    assert torch.equal(*found)


def test_no_token_after_eos_moves_anything():
    found = []
    for garbage in False, True:
        cfg, policy, critic, batch, roll, rewards, optimizers, passages = ppo_case('--beta', '.1')
        if garbage:
            junk = torch.randint(0, 12, roll.response.shape)
            roll = roll._replace(response=roll.response.where(roll.mask, junk),
                                 ref_logprobs=roll.ref_logprobs.where(roll.mask, -9.))
        torch.manual_seed(0)                         # the order of the minibatches
        record = ppo.ppo_step(policy, critic, optimizers, roll, rewards, batch, passages.numpy(),
                              0., {'beta_factor': 1., 'updates': 0}, (0., 0.), cfg)
        found.append((*(o.kept for o in optimizers), record))
    assert (found[0][0] - found[1][0]).abs().max() < 1e-6
    assert (found[0][1] - found[1][1]).abs().max() < 1e-6
    for key, value in found[0][2].items():
        assert abs(value - found[1][2][key]) < 1e-5, key


def test_ppo_stops_early_and_adapts_beta():
    for flags, updates in (['--approx_kl', '1e-7'], 1), (['--approx_kl', '1e9'], 6):
        cfg, policy, critic, batch, roll, rewards, _, passages = ppo_case(
            '--epochs', '3', '--minibatch', '4', '--beta', '.1', '--kl_target', '.01', *flags)
        optimizers = [model.adamw(net) for net in (policy, critic)]
        running = {'beta_factor': 1., 'updates': 0}
        record = ppo.ppo_step(policy, critic, optimizers, roll, rewards, batch, passages.numpy(),
                              0., running, (1e-3, 1e-3), cfg)
        if updates == 1:                             # the first ratio is 1, the second is not
            assert record['updates'] == 2, record
        else:
            assert record['updates'] == updates
        assert running['updates'] == record['updates']
        factor = 1 + .1 * min(max(record['kl'] / .01 - 1, -.2), .2)
        assert abs(running['beta_factor'] - factor) < 1e-12 and factor != 1


# -----------------------------------------------------------------------------
# gumbel


AT_HALF = gumbel.Config(temperature=.5)


def small_rollout(dtype=torch.float32, cfg=AT_HALF, **changes):
    """A generator, a discriminator whose head is not 0, and a rollout with its noise."""
    gpt, rng = tiny_gpt(**changes).to(dtype), torch.Generator().manual_seed(1)
    discriminator = Discriminator(tiny_gpt(seed=1, **changes)).to(dtype).eval()
    torch.nn.init.normal_(discriminator.score.weight)
    prompt, pad = torch.randint(0, 13, (6, 5)), torch.tensor([0, 2, 1, 0, 3, 0])
    response, mask, noise = gpt.generate(prompt, pad, 4, 12, temperature=cfg.temperature, rng=rng,
                                         keep_noise=True)
    return gpt, discriminator, gumbel.Rollout(prompt, pad, response, mask, mask[:, -1], noise)


def test_the_replayed_pass_gives_the_sampled_tokens():
    for kind, margin in (torch.float32, 0), (torch.bfloat16, .02):   # near ties may flip
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, kind == torch.bfloat16):
            gpt, _, r = small_rollout()
            logits = gumbel.response_logits(gpt, r.prompt, r.pad, r.response, AT_HALF)
        values = logits + r.noise
        lost = values.max(-1).values - values.gather(-1, r.response[..., None])[..., 0]
        assert lost[r.mask].max() <= margin, (kind, lost)
        z = gumbel.relax(logits, r.noise, r.response, r.mask, .7, hard=True)
        assert torch.equal(z, F.one_hot(r.response, 13).float())


def test_exponential_draws_are_exponential():
    for kind in torch.float32, torch.float64:
        rng, N = torch.Generator().manual_seed(0), 400000
        e = model.exponential((N,), torch.empty(0, dtype=kind), rng).double().sort().values
        uniform = torch.arange(1, N + 1).double() / N
        assert (-(-e).expm1() - uniform).abs().max() < 1.95 / math.sqrt(N)   # p = .001
        assert e[0] > 0 and e.log().isfinite().all()
    edge = SimpleNamespace(uniform_=lambda generator: torch.tensor([0., 1 - 2 ** -24, .5]))
    with unittest.mock.patch.object(torch, 'empty', lambda *a, **k: edge):
        e = model.exponential((3,), e, None)
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
    """One token at a time without a cache, its prefix detached, against the one parallel pass."""
    gpt, discriminator, r = small_rollout(torch.float64)
    columns = []
    for t in range(4):
        tokens = torch.cat((r.prompt, r.response[:, :t]), 1)
        y = ((gpt(tokens, r.pad)[:, -1] / .5 + r.noise[:, t]) / .7).softmax(-1)
        onehot = torch.zeros_like(y).scatter(1, r.response[:, t:t + 1], 1.)
        columns.append(torch.where(r.mask[:, t:t + 1], onehot + y - y.detach(), onehot))
    wanted = gradient_of(gpt, discriminator, r, torch.stack(columns, 1))
    z = gumbel.relax(gumbel.response_logits(gpt, r.prompt, r.pad, r.response, AT_HALF), r.noise,
                     r.response, r.mask, .7, hard=True)
    for a, b in zip(wanted, gradient_of(gpt, discriminator, r, z)):
        assert (a - b).abs().max() < 1e-9
    assert max(a.abs().max() for a in wanted) > 1e-4


def gradient_of(gpt, discriminator, r, z):
    """Of the mean score of samples z by the generator's parameters."""
    s = model.hold_last(discriminator(r.prompt, r.pad, z), r.mask)[:, -1]
    return torch.autograd.grad(s.mean(), list(gpt.parameters()))


def test_gumbel_steps_take_the_gradient_of_their_parts():
    """Both networks', by hand: from the first difference on, a tie left out; in micro-batches."""
    gpt, discriminator, r = small_rollout()
    reference, P = tiny_gpt(5), 5
    gold, gold_mask = torch.randint(0, 12, (6, 4)), torch.ones(6, 4).bool()
    gold[0], gold_mask[0] = r.response[0], r.mask[0]                         # a tie
    gold[1, 0], gold[2, 2:], gold_mask[2, 3:] = r.response[1, 0], 12, False
    batch = data.Batch(r.prompt, r.pad, gold, gold_mask)
    pairs = gumbel.Pairs(r.prompt, r.pad, gold, gold_mask, r.response, r.mask)

    def loss(real, fake, sign, scale):
        total = 0.0
        for i in range(1, 6):
            last, gold_last = int(r.mask[i].sum()) - 1, int(gold_mask[i].sum()) - 1
            first = int((r.response[i] != gold[i]).nonzero()[0])
            terms = [F.softplus(sign * (real[i, min(t, gold_last)] - fake[i, min(t, last)]))
                     for t in range(first, max(last, gold_last) + 1)]
            total = total + sum(terms) / len(terms) / scale
        return total

    def encoded(response, mask, soft, rng):
        if not soft:
            return F.one_hot(response, 13).float()
        return gumbel.encode(gpt, r.prompt, r.pad, response, mask, .7, rng, True, cfg)

    # noise is drawn by micro-batch, so where gold answers are relaxed there is one
    for encoding, micro in ('soft', '6'), ('hard', '4'), ('mixed', '6'):
        cfg = gumbel.parse(['--tiny', '--samples', '1', '--d_samples', '1', '--micro_batch', micro,
                            '--beta', '.3', '--encoding', encoding,
                            '--temperature', '.5'])
        cfg.dtype, optimizer = 'float32', Keep(gpt)
        rngs = [torch.Generator().manual_seed(2) for _ in range(2)]
        record = gumbel.gumbel_step(gpt, reference, discriminator, optimizer, r, batch, .4, 0., .7,
                                    rngs[0], cfg)
        tokens = torch.cat((r.prompt, r.response), 1)
        logits, ref_logits = (net(tokens, r.pad)[:, P - 1:-1] / .5 for net in (gpt, reference))
        soft = ((logits + r.noise) / .7).softmax(-1)
        onehots = F.one_hot(r.response, 13)
        value = onehots if encoding == 'hard' else soft.detach()
        z = torch.where(r.mask[..., None], value + soft - soft.detach(), onehots)
        shown = encoded(gold, gold_mask, encoding == 'soft', rngs[1])
        fake, real = (discriminator(r.prompt, r.pad, x) for x in (z, shown))
        g_loss = loss(real.detach(), fake, 1, 6)
        p = logits.softmax(-1)
        kl = ((p * (p.log() - ref_logits.log_softmax(-1))).sum(-1) * r.mask).sum()
        wanted = gradient(gpt, g_loss + .3 * kl / 6 + .4 * gumbel.mle_loss(gpt, batch))
        assert (optimizer.kept - wanted).abs().max() < 1e-5 and wanted.abs().max() > 1e-3
        assert abs(record['g_loss'] - g_loss) < 1e-5
        assert abs(record['kl'] - kl / r.mask.sum()) < 1e-5
        assert all(q.grad is None for q in discriminator.parameters())

        rngs, optimizer = [torch.Generator().manual_seed(2) for _ in range(2)], Keep(discriminator)
        record = gumbel.discriminator_step(discriminator, gpt, optimizer, pairs, 6, False, .7,
                                           rngs[0], cfg)
        real, fake = (discriminator(r.prompt, r.pad, encoded(*answer, soft, rngs[1]))
                      for *answer, soft in ((gold, gold_mask, encoding == 'soft'),
                                            (r.response, r.mask, encoding != 'hard')))
        wanted = gradient(discriminator, loss(real, fake, -1, 5))
        assert (optimizer.kept - wanted).abs().max() < 1e-5 and wanted.abs().max() > 1e-3
        assert all(q.grad is None for q in gpt.parameters())


def test_a_gumbel_step_on_k_samples_is_that_on_as_many_prompts():
    gpt, discriminator, r = small_rollout()
    prompt, pad = (z[::2].repeat_interleave(2, 0) for z in (r.prompt, r.pad))
    r, found = r._replace(prompt=prompt, pad=pad), []
    gold, mask = torch.randint(0, 12, (3, 4)), torch.arange(4) < torch.tensor([[4], [2], [3]])
    for K in 1, 2:
        cfg = replace(gumbel.parse(['--tiny', '--samples', '2', '--encoding', 'hard', '--beta',
                                    '.3', '--micro_batch', '4',
                                    '--temperature', '.5']), samples=K, dtype='float32')
        batch = data.Batch(prompt[::2], pad[::2], gold, mask)
        batch = data.Batch(*(z.repeat_interleave(2 // K, 0) for z in batch))
        optimizer = Keep(gpt)
        record = gumbel.gumbel_step(gpt, tiny_gpt(5), discriminator, optimizer, r, batch, .4, 0.,
                                    .7, None, cfg)
        found.append((optimizer.kept, record))
    (one, first), (two, second) = found
    assert (one - two).abs().max() < 1e-6 and one.abs().max() > 1e-3
    assert all(abs(first[k] - second[k]) < 1e-5 for k in first), found


def test_relaxed_samples_become_one_hot_and_follow_the_softmax():
    torch.manual_seed(0)
    N, logits = 20000, torch.randn(1, 1, 7).expand(20000, 1, 7)
    noise = -torch.empty(N, 1, 7).exponential_().log()
    response = (logits + noise).argmax(-1)
    z = gumbel.relax(logits, noise, response, torch.ones(N, 1).bool(), 1e-5, hard=False)
    assert torch.equal(z.argmax(-1), response) and z.max(-1).values.mean() > .999
    expected = N * logits[0, 0].softmax(-1)
    chi_square = ((z.sum((0, 1)) - expected).square() / expected).sum()
    assert chi_square < 22.5, chi_square             # 6 degrees of freedom, p = .001


def test_gradient_penalty_against_finite_differences():
    _, discriminator, r = small_rollout(torch.float64)

    def score(onehots):
        return model.hold_last(discriminator(r.prompt, r.pad, onehots), r.mask)[:, -1]

    with torch.no_grad():
        onehots, wanted = F.one_hot(r.response, 13).double(), 0.0
        for t, v in itertools.product(range(4), range(13)):
            step = torch.zeros_like(onehots)
            step[:, t, v] = 1e-5
            slope = (score(onehots + step) - score(onehots - step)) / 2e-5   # (6,)
            wanted += slope.square().mean() / 13
    args = r.prompt, r.pad, F.one_hot(r.response, 13), r.mask
    got = gumbel.gradient_penalty(discriminator, *args)
    assert abs(got - wanted) < 1e-8 and got > 1e-4
    p = discriminator.trunk.h[0].attn.c_attn.weight
    grad, = torch.autograd.grad(got, p)
    with torch.no_grad():
        direction, ends = torch.randn_like(p), []
        for sign in 1, -1:
            p.add_(sign * 1e-5 * direction)
            with torch.enable_grad():
                ends.append(gumbel.gradient_penalty(discriminator, *args).item())
            p.sub_(sign * 1e-5 * direction)
    assert abs((ends[0] - ends[1]) / 2e-5 - (grad * direction).sum()) < 1e-7


def test_bias_and_variance_of_the_estimator():
    """
    Two tokens of a vocabulary of 5 from tables of logits, and a score that is not linear in them:
    the gradients of 40,000 samples against the one over all 25 responses. The table is printed.
    """
    torch.manual_seed(0)
    N, V = 40000, 5
    first, second = torch.randn(V).double(), torch.randn(V, V).double()
    weights = torch.randn(V, V).double()

    def score(z):                                    # (n, 2, V) to (n,)
        return 2 * torch.einsum('nu,nv,uv->n', z[:, 0], z[:, 1], weights).tanh()

    pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
    tables = first.clone().requires_grad_(), second.clone().requires_grad_()
    logp = tables[0].log_softmax(-1)[pairs[:, 0]] + tables[1].log_softmax(-1)[tuple(pairs.t())]
    value = (logp.exp() * score(F.one_hot(pairs, V).double())).sum()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(value, tables)])
    noise = -torch.empty(N, 2, V).double().exponential_().log()
    y1 = (first + noise[:, 0]).argmax(-1)
    y = torch.stack((y1, (second[y1] + noise[:, 1]).argmax(-1)), 1)          # (N, 2)
    mask = torch.ones(N, 2).bool()

    def figures(by_logits):                          # (N, 2, V) to bias and deviation
        grads = torch.zeros(N, V + V * V).double()
        grads[:, :V] = by_logits[:, 0]
        grads[:, V:].view(N, V, V)[torch.arange(N), y1] = by_logits[:, 1]
        spread = grads.var(0).sum().sqrt()
        return [(z.norm() / exact.norm()).item() for z in (grads.mean(0) - exact, spread)]

    found, logits = {}, torch.stack((first.expand(N, V), second[y1]), 1)
    for tau in .1, .5, 1., 2., 10.:
        leaf = logits.clone().requires_grad_()
        s = score(gumbel.relax(leaf, noise, y, mask, tau, hard=True))
        found[tau] = figures(torch.autograd.grad(s.sum(), leaf)[0])
    leaf = logits.clone().requires_grad_()
    s, logp = score(F.one_hot(y, V).double()), leaf.log_softmax(-1).gather(-1, y[..., None])
    found['REINFORCE'] = figures(torch.autograd.grad(((s - s.mean()) * logp.sum((1, 2))).sum(),
                                                     leaf)[0])
    for name, (bias, deviation) in found.items():
        print(f'{name:>9}  bias {bias:.3f}  deviation {deviation:.2f}, of the exact norm')
    assert found['REINFORCE'][0] < 5 * found['REINFORCE'][1] / math.sqrt(N)
    assert found[.1][1] > found[1.][1] > found[10.][1]                       # variance by 1 / tau
    assert all(found[tau][0] > .05 for tau in (.1, .5, 1., 2., 10.))         # bias at any


# -----------------------------------------------------------------------------
# sample: judging


def people(n, seed=0):
    """A Split of n prompts, each context twice, with random answers, and other answers to them."""
    enc, rng = data.load_tokenizer('toy'), np.random.default_rng(seed)

    def say():
        return ' '.join(rng.choice(data.CITIES, rng.integers(1, 4)))

    examples = [{'context': f'In {data.YEARS[i // 2 % 30]} Ada did {i // 60} .',
                 'question': f'Where {i % 2} ?', 'answers': [say()]} for i in range(n)]
    others = data.Split([{**e, 'answers': [say()]} for e in examples], enc, 30, 6)
    return data.Split(examples, enc, 30, 6), others.batch(range(n)), enc


def judging(steps):
    return SimpleNamespace(device='cpu', seed=1, batch_size=64, top_k=100, test_steps=steps,
                           test_lr=None)


def test_a_fresh_discriminator_is_right():
    """Two draws of the same human answers are told apart half the time, a planted token always."""
    right = pairs = 0
    for seed in range(3):
        split, other, enc = people(1200, seed)
        trunk = tiny_gpt(vocab_size=enc.n_vocab, n_embd=32, block_size=40)
        fake, mask = other.response, other.mask
        same = sample.fresh_discriminator(trunk, split, fake, mask, judging(50))
        right, pairs = right + same['accuracy'] * same['pairs'], pairs + same['pairs']
        assert abs(same['length_accuracy'] - .5) < .06 and same['eos_accuracy'] == .5
        ties = (fake == split.batch(range(1200)).response).all(1)
        judged = torch.from_numpy(sample.halves(split.examples)[1])
        assert same['ties'] == ties.sum() > 5 and same['pairs'] == (~ties[judged]).sum()
    low, high = sample.interval(right, pairs)
    assert low < .5 < high and high - low < .05, (low, high)

    told, ends = fake.clone(), mask.sum(1) - 1       # a full stop before eos
    told[torch.arange(1200), ends] = enc.encode_ordinary(' .')[0]
    planted = sample.fresh_discriminator(trunk, split, told, other.mask, judging(60))
    assert planted['low'] > .95 and planted['ties'] == 0, planted
    assert planted['eos_accuracy'] == 1 and abs(planted['length_accuracy'] - .5) < .06

    real = split.batch(range(1200))
    tied = sample.fresh_discriminator(trunk, split, real.response, real.mask, judging(1))
    assert tied['ties'] == 1200 and tied['pairs'] == 0 and (tied['low'], tied['high']) == (0, 1)


def test_no_prompt_is_on_both_sides():
    split = people(400)[0]
    learn, judge = sample.halves(split.examples)
    assert sorted([*learn, *judge]) == list(range(400)) and abs(len(learn) - len(judge)) < 4
    for what in (lambda i: split.examples[i]['context'], lambda i: tuple(split.prompts[i])):
        assert not {what(i) for i in learn} & {what(i) for i in judge}
    raises(ValueError, ['one passage'], sample.halves, split.examples[:2])


def test_intervals_and_cheats_by_hand():
    assert np.allclose(sample.interval(8, 10), (.490, .943), atol=1e-3)      # Wilson's, from tables
    assert sample.interval(0, 0) == (0, 1) and sample.interval(5, 5)[1] > .999
    rng = np.random.default_rng(0)                   # a length of 1 is human 90%, machine 20%
    real, fake = 2 - (rng.random(20000) < .9), 2 - (rng.random(20000) < .2)
    rows = np.arange(20000)
    wanted = .9 * .8 + .5 * (.9 * .2 + .1 * .8)
    assert abs(sample.cheat(real, fake, rows[::2], rows[1::2]) - wanted) < .01


def test_kl_and_perplexity_against_sums():
    """KL exact at each token of the model's own samples, by hand from whole logits."""
    split, _, enc = people(6)
    one, base = (tiny_gpt(seed, vocab_size=enc.n_vocab, block_size=40) for seed in (0, 1))
    args = judging(1)
    kl, nll = sample.drift(one, base, split, args)
    batch = split.batch(range(6))
    response, mask, _ = one.generate(batch.prompt, batch.pad, 6, split.eos,
                                     rng=torch.Generator().manual_seed(1))
    with torch.no_grad():
        p, q = (net(torch.cat((batch.prompt, response), 1), batch.pad)[:, 29:-1].softmax(-1)
                for net in (one, base))
        gold = one(torch.cat((batch.prompt, batch.response), 1), batch.pad)[:, 29:-1].softmax(-1)
    wanted = sum((p[i, t] * (p[i, t] / q[i, t]).log()).sum() for i, t in mask.nonzero())
    assert abs(kl - wanted / mask.sum()) < 1e-5 and kl > 0
    wanted = sum(-gold[i, t, batch.response[i, t]].log() for i, t in batch.mask.nonzero())
    assert abs(nll - wanted / batch.mask.sum()) < 1e-4
    assert sample.drift(base, base, split, args)[0] == 0


def printed(*argv):
    """What sample.py prints for these flags, run in this process."""
    kept, sys.stdout = sys.stdout, io.StringIO()
    try:
        sample.main(list(map(str, argv)))
        return sys.stdout.getvalue()
    finally:
        sys.stdout = kept


def test_runs_are_judged_compared_tabled_and_drawn():
    runs = [folder('judged') / f'run-{seed}' for seed in (1, 2)]
    for seed, run in enumerate(runs, 1):
        train(gumbel, run, *SMALL, '--seed', str(seed))
        text = printed('--evaluate', f'sft={run}/sft.pt', f'tuned={run}/ckpt.pt', '--prompts', '40',
                       '--test_steps', '2', '--out', run / 'judged.json')
        assert 'told apart' in text and 'sft: EM' in text and '40 prompts of toy' in text
        found = json.loads((run / 'judged.json').read_text())['results']
        f = found['tuned']
        assert found['sft']['kl'] == 0 < f['kl'] and abs(sum(f['lengths']) - 1) < 1e-3
        wanted = sum(abs(a - b) for a, b in zip(f['lengths'], f['gold_lengths'])) / 2
        assert math.isclose(f['length_distance'], wanted, abs_tol=1e-3)
        assert f['fresh']['pairs'] <= 20 and f['prompts'] == 40
    text = printed('--evaluate', runs[0] / 'ckpt.pt', '--prompts', '9', '--test_steps', '1',
                   '--temperature', '0.5', '1', '--out', folder('swept') / 'sweep.json')
    assert 'T 0.5: EM' in text and 'T 1.0: EM' in text

    files = [run / 'judged.json' for run in runs]
    head, rule, *rows = printed('--table', *files).strip().splitlines()
    assert len(rows) == 2 and all(r.count('|') == head.count('|') == rule.count('|') for r in rows)
    ems = [json.loads(f.read_text())['results']['tuned']['em'] for f in files]
    mean, spread = np.mean(ems), np.std(ems, ddof=1)
    assert rows[1].startswith(f'| tuned | {mean:.1f} ± {spread:.1f} |'), rows[1]
    assert f'[1]({files[0]}) [2]({files[1]})' in rows[1]
    column = head.split(' | ').index('told apart %')
    assert rows[1].split(' | ')[column] == '–'                               # of 20 pairs at most
    for f in files:                                                          # as if of more
        found = json.loads(f.read_text())
        for figures in found['results'].values():
            figures['fresh'] |= {'pairs': 200, 'accuracy': .75}
        f.write_text(json.dumps(found))
    row = printed('--table', *files).strip().splitlines()[-1]
    assert row.split(' | ')[column] == '75.0 ± 0.0', row

    with open(runs[1] / 'metrics.jsonl', 'a') as f:
        f.write(json.dumps({'iter': 3, 'collapsed': 'Oslo Oslo'}) + '\n')
    rows = printed('--table', *runs).strip().splitlines()[2:]
    assert len(rows) == 1 and rows[0].startswith('| run | ') and '| 3 | `Oslo Oslo` |' in rows[0]
    png = runs[0] / 'all.png'
    printed('--plot', *(f'Gumbel={run}' for run in runs), runs[0] / 'metrics.jsonl', '--out', png)
    assert png.stat().st_size > 20000
    text = printed('--compare', f'a|b={runs[0]}/sft.pt', runs[1] / 'ckpt.pt', '--markdown',
                   '--prompts', '3', '--question', 'Who ?', '--context', 'Ada built it .')
    lines = text.strip().splitlines()
    assert len(lines) == 6 and lines[0].startswith('| question | gold | a\\|b | ')
    assert lines[2].startswith('| Who ? |  | ')
    assert sample.smooth([(i, i) for i in range(120)])[0] == .5


# -----------------------------------------------------------------------------
# the road: runs, resumes, command lines

SMALL = ['--tiny', '--n_layer', '1', '--n_embd', '16', '--sft_iters', '4', '--iters', '4',
         '--batch_size', '8', '--eval_interval', '2', '--eval_prompts', '12', '--d_warmup_iters',
         '1', '--d_replay', '.5', '--d_dropout', '.1', '--sft_batch_size', '8']


def train(script, out, *flags, caught=()):
    """A run in this process without its curves, which take most of a small one's time."""
    draw, script.plot_curves = script.plot_curves, lambda out: None
    try:
        return script.train(script.parse([*flags, '--out_dir', str(out)]), caught)
    finally:
        script.plot_curves = draw


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


def resumed_equals_uninterrupted(script, *more):
    whole = folder(f'whole {script.__name__}')
    train(script, whole, *SMALL, *more)
    for key, n in ('sft_iter', 3), ('reward', 2), ('reward', 3):
        parts = folder(f'parts {script.__name__}')
        assert train(script, parts, *SMALL, *more, caught=After(parts, key, n)) is None
        train(script, parts, '--resume')
        assert records(parts) == records(whole), key
        for name in 'ckpt.pt', 'sft.pt':
            a, b = (load_checkpoint(out / name) for out in (whole, parts))
            for saved in a, b:
                assert saved['settings'].pop('out_dir')
            assert same(a, b), (key, n, name)
    assert records(whole)[-1].keys() == {'final'}
    return load_checkpoint(parts / 'ckpt.pt')


def test_a_resumed_reinforce_run_equals_an_uninterrupted_one():
    resumed_equals_uninterrupted(reinforce)


def test_a_resumed_ppo_run_equals_an_uninterrupted_one():
    saved = resumed_equals_uninterrupted(ppo, '--minibatch', '8', '--epochs', '2',
                                         '--kl_target', '1')
    assert saved['running']['beta_factor'] != 1 and saved['running']['updates'] > 4
    assert saved['critic_optimizer']['state']


def test_a_resumed_gumbel_run_equals_an_uninterrupted_one():
    resumed_equals_uninterrupted(gumbel, '--beta', '.1')


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


def killed_and_resumed(script, kills, seed):
    """Kills a run at `kills` random instants and goes on; it must end as if it never was."""
    flags = [*SMALL, '--iters', '30', '--sft_iters', '6']
    flags += ['--minibatch', '8'] if script is ppo else []
    whole, parts = (folder(f'{name} {script.__name__}') for name in ('never killed', 'killed'))

    def child(out, *more):
        pid = os.fork()
        if not pid:                                  # no cleaning up: that is the parent's
            code = 1
            try:
                torch.set_num_threads(1)
                tqdm.set_lock(threading.RLock())     # its own would leak a semaphore at each kill
                slow_save()
                train(script, out, *flags, *more)
                code = 0
            finally:
                os._exit(code)
        return pid

    assert os.waitpid(child(whole), 0)[1] == 0
    rng, hits, kept = np.random.default_rng(seed), 0, set()
    while True:
        begun = any((parts / name).exists() for name in ('sft.pt', 'ckpt.pt'))
        pid = child(parts, '--resume' if begun else '--overwrite')
        if hits < kills:
            time.sleep(rng.uniform(.2, 1.2))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            if hits >= kills or records(parts)[-1].keys() == {'final'}:
                break
        hits += 1
        for name in 'sft.pt', 'ckpt.pt':
            if (parts / name).exists():
                saved = load_checkpoint(parts / name)
                kept.add(saved.get('iter', -1))
    assert records(parts) == records(whole) and records(whole)[-1].keys() == {'final'}
    for name in 'ckpt.pt', 'sft.pt':
        a, b = (load_checkpoint(out / name) for out in (whole, parts))
        for saved in a, b:
            saved['settings'].pop('out_dir')
        assert same(a, b), name
    return hits, len(kept)


def test_a_killed_run_ends_as_if_it_never_was():
    hits, _ = killed_and_resumed(reinforce, 5, 0)
    assert hits >= 3


def long_kills_lose_nothing():
    """25 kills of each script: a run that is over sooner is begun anew."""
    for script in SCRIPTS:
        hits = instants = 0
        while hits < 25:
            more, kept = killed_and_resumed(script, 25 - hits, hits)
            hits, instants = hits + more, instants + kept
        print(f'{script.__name__}: {hits} kills, {instants} checkpoints in between')


def long_runs_stay_as_large_as_they_are():
    """Memory and file handles over 800 iterations of each script, 40 evaluations and curves among
    them: matplotlib's garbage takes a dozen of those to level off."""
    for script in SCRIPTS:
        seen, rollout = [], script.rollout

        def watched(*args, seen=seen, rollout=rollout):
            pages = int(Path('/proc/self/statm').read_text().split()[1])
            handles = len(os.listdir('/proc/self/fd'))
            seen.append((pages * resource.getpagesize() / 2 ** 20, handles))
            return rollout(*args)

        script.rollout = watched
        try:
            script.main([*SMALL, '--iters', '800', '--eval_interval', '20', '--out_dir',
                         str(folder('long haul')),
                         *(['--minibatch', '8'] if script is ppo else [])])
        finally:
            script.rollout = rollout
        memory, handles = np.array(seen).T
        early, late = memory[300:400].mean(), memory[-100:].mean()
        print(f'{script.__name__}: {early:.1f} MiB at iteration 350, {late:.1f} at the end, '
              f'{handles[10]:.0f} and {handles[-1]:.0f} handles')
        assert len(seen) == 800 and late - early < 8, (early, late)
        assert len(set(handles[10:])) == 1, handles


def test_freed_memory_is_kept_until_it_is_trimmed():
    """In a process of its own, 32 tensors of 8 MiB that are freed under one that stays."""
    if not sys.platform.startswith('linux') or not hasattr(ctypes.CDLL(None), 'malloc_trim'):
        raise unittest.SkipTest('only glibc keeps freed memory on request')
    code = '''if True:
        import torch
        from pathlib import Path
        from model import keep_freed_memory, trim_freed_memory
        def pages():
            return int(Path('/proc/self/statm').read_text().split()[1])
        keep_freed_memory()
        before = pages()
        tensors = [torch.ones(2 ** 21) for _ in range(33)]
        last = tensors.pop()
        del tensors
        kept = pages()
        trim_freed_memory()
        print(kept - before, pages() - before)'''
    out = subprocess.run([sys.executable, '-c', code], cwd=HERE, capture_output=True, text=True,
                         check=True).stdout
    kept, trimmed = (int(n) * resource.getpagesize() / 2 ** 20 for n in out.split())
    assert kept > 240 and trimmed < 20, (kept, trimmed)


def test_a_number_that_is_not_finite_ends_the_run():
    """Which and when is named, the last healthy checkpoint stays and can be gone on from."""
    for script, station, at, named in (
            (reinforce, 'mle_loss', 2, 'mle is nan at sft_iter 2'),
            (reinforce, 'policy_loss', 3, 'g_loss is nan at iter'),
            (reinforce, 'discriminator_loss', 2, 'd_loss is nan at iter 2'),
            (reinforce, 'prefix_values', 2, ' is nan at iter'),
            (ppo, 'value_loss', 3, 'is nan at iter'), (ppo, 'passage_loss', 2, 'is nan at iter'),
            (gumbel, 'generator_loss', 2, 'is nan at iter'),
            (gumbel, 'response_logits', 9, 'is nan at iter')):
        out, calls, kept = folder('poisoned'), itertools.count(), getattr(script, station)

        def poisoned(*a, calls=calls, kept=kept, at=at):
            value = kept(*a)
            if next(calls) != at:
                return value
            return (value[0] * math.nan, value[1]) if isinstance(value, tuple) else value * math.nan

        setattr(script, station, poisoned)
        flags = [*SMALL, '--iters', '12', '--eval_interval', '1', '--d_max_acc', '1', '--anchor',
                 '.1', *(['--minibatch', '8'] if script is ppo else [])]
        try:
            raises(FloatingPointError, [named, '--resume'], train, script, out, *flags)
        finally:
            setattr(script, station, kept)
        for name in 'sft.pt', 'ckpt.pt':
            if (out / name).exists():
                state = load_checkpoint(out / name)['model']
                assert all(v.isfinite().all() for v in state.values()), (station, name)
        assert 'NaN' not in (out / 'metrics.jsonl').read_text()
        assert train(script, out, '--resume')['tuned']['f1'] >= 0


def test_a_gradient_that_is_not_finite_moves_nothing():
    gpt = tiny_gpt()
    before, cfg = gpt.wte.weight.clone(), reinforce.parse(['--tiny'])
    gpt(torch.tensor([[1, 2]])).sum().backward()
    gpt.wte.weight.grad[0, 0] = math.inf
    assert not math.isfinite(model.update(gpt, model.adamw(gpt), 1.))
    assert torch.equal(gpt.wte.weight, before)


def sentence_or_result(call, *args):
    """Nothing but a result or one sentence may come of it; which of them did."""
    try:
        call(*args)
        return True
    except (ValueError, FileNotFoundError) as e:
        assert str(e) and '\n' not in str(e), repr(e)
        return False


def strategies():
    """Hypothesis's, which is no requirement of the scripts."""
    try:
        import hypothesis.strategies
    except ImportError as e:
        raise unittest.SkipTest('hypothesis is not installed') from e
    return hypothesis.strategies


def fuzzed(examples):
    """Calls a function of `draw` so many times, with other choices each time."""
    import hypothesis

    def run(function):
        wanted = hypothesis.settings(max_examples=examples, deadline=None, database=None,
                                     derandomize=True, print_blob=False,
                                     suppress_health_check=list(hypothesis.HealthCheck))
        wanted(hypothesis.given(hypothesis.strategies.data())(lambda d: function(d.draw)))()
    return run


def damaged(draw, raw):
    """Bytes with some flipped, cut out or put in, or cut off."""
    st = strategies()
    raw = bytearray(raw)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        kind = draw(st.sampled_from(['flip', 'cut', 'put', 'end']))
        if kind == 'flip' and raw:
            raw[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 'cut':
            del raw[at:at + draw(st.integers(1, 40))]
        elif kind == 'put':
            raw[at:at] = draw(st.binary(min_size=1, max_size=8))
        else:
            del raw[at:]
    return bytes(raw)


def fuzz_squad(examples):
    st = strategies()
    path, counts = folder('fuzz') / 'train-v2.0.json', [0, 0]
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
    anything = st.recursive(scalars, lambda z: st.lists(z, max_size=3)
                            | st.dictionaries(st.text(max_size=5), z, max_size=3), max_leaves=6)
    answer = {'text': 'Ada', 'answer_start': 3}
    qas = [{'id': 'a', 'question': 'Who?', 'is_impossible': False, 'answers': [answer, answer]},
           {'id': 'b', 'question': 'When?', 'is_impossible': True, 'answers': []}]
    good = {'data': [{'title': 't', 'paragraphs': [{'context': 'By Ada.', 'qas': qas}]}]}
    enc = data.load_tokenizer('toy')

    def read():
        rows = list(data.read_squad(str(path)))
        data.Split(rows, enc, 20, 5, train=True).batch(range(len(rows)))

    @fuzzed(examples)
    def one(draw):
        doc = json.loads(json.dumps(good))
        if draw(st.booleans()):
            at, spots = [doc], []
            while at:                                # every place a value stands
                node = at.pop()
                for key in node if isinstance(node, dict) else range(len(node)):
                    spots.append((node, key))
                    if isinstance(node[key], (dict, list)):
                        at.append(node[key])
            node, key = draw(st.sampled_from(range(len(spots))).map(spots.__getitem__))
            if draw(st.booleans()):
                node[key] = draw(anything)
            else:
                del node[key]
            path.write_text(json.dumps(doc), encoding='utf-8')
        else:
            path.write_bytes(damaged(draw, json.dumps(doc).encode()))
        counts[sentence_or_result(read)] += 1
    path.write_text('[' * 100000)
    raises(ValueError, [str(path), 'JSON'], read)
    return counts


def fuzz_checkpoints(examples, kind):
    st = strategies()
    at, counts = folder(f'fuzz {kind}'), [0, 0]
    gpt = tiny_gpt(vocab_size=11, n_layer=1)
    if kind == 'safetensors':
        gpt.save_pretrained(at)
        path = at / 'model.safetensors'
    else:
        path = at / 'ckpt.pt'
        save_checkpoint(path, {'model': gpt.state_dict(), 'gpt_config': asdict(gpt.config),
                               'settings': {'lr': 1e-3}})
    raw = path.read_bytes()
    state = {k: v.clone() for k, v in gpt.state_dict().items()}

    @fuzzed(examples)
    def one(draw):
        if draw(st.booleans()):
            path.write_bytes(damaged(draw, raw))
        else:                                        # a whole file with the wrong things in it
            weights = dict(state)
            name = draw(st.sampled_from(sorted(weights)))
            change = draw(st.sampled_from(['lose', 'rename', 'reshape', 'add', 'type']))
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
            if kind == 'safetensors':
                model.save_file({k: v.contiguous() for k, v in weights.items()}, path)
            else:
                config = asdict(gpt.config)
                if draw(st.booleans()):
                    config[draw(st.sampled_from([*config, 'more']))] = draw(
                        st.none() | st.integers(-2, 3) | st.text(max_size=3))
                save_checkpoint(path, {'model': weights, 'gpt_config': config})
        counts[sentence_or_result(GPT.from_pretrained, path)] += 1
    return counts


def test_damaged_files_are_one_sentence():
    for counts in fuzz_squad(150), *(fuzz_checkpoints(150, k) for k in ('pt', 'safetensors')):
        assert counts[0] > 50, counts


def long_damaged_files_are_one_sentence():
    for name, counts in (('SQuAD JSON', fuzz_squad(4000)), ('.pt', fuzz_checkpoints(4000, 'pt')),
                         ('.safetensors', fuzz_checkpoints(4000, 'safetensors'))):
        print(f'{name}: {sum(counts)} inputs, {counts[0]} refused in a sentence, {counts[1]} read')


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


def steps_of_all_scripts(path, rank):
    """Saves the gradients and figures of every kind of update on this rank's share of 6 prompts."""
    found = {}
    mine = model.shard(np.arange(6))
    rows = (mine[:, None] * 2 + np.arange(2)).ravel()
    gpt, reference, P = tiny_gpt(3), tiny_gpt(5), 5
    discriminator, critic = Discriminator(tiny_gpt(1)).eval(), ppo.Critic(tiny_gpt(4)).eval()
    for network in discriminator, critic:
        torch.nn.init.normal_(network.score.weight)
    prompt, pad = torch.randint(0, 12, (6, P)), torch.tensor([0, 2, 1, 0, 3, 0])
    gold, ends = torch.randint(0, 12, (6, 4)), torch.tensor([3, 1, 2, 3, 0, 3])
    gold_mask = torch.arange(4) <= ends[:, None]
    response, mask, noise = gpt.generate(prompt, pad, 4, 12, samples=2, keep_noise=True,
                                         rng=torch.Generator().manual_seed(1))
    gold[0], gold_mask[0] = response[0], mask[0]                             # a tie, on one rank
    advantage = torch.randn(12, 4)
    batch = data.Batch(*(z[mine] for z in (prompt, pad, gold, gold_mask)))
    prompt, pad = (z.repeat_interleave(2, 0) for z in (prompt, pad))
    with torch.no_grad():
        ref_logprobs, _ = reference.logprobs(torch.cat((prompt, response), 1), pad, P)
    common = [z[rows] for z in (prompt, pad, response, mask, mask[:, -1])]
    flags = ['--tiny', '--beta', '.3', '--micro_batch', '4']
    for script in SCRIPTS:
        name = script.__name__
        cfg = script.parse(flags + {'ppo': ['--epochs', '1', '--minibatch', '12', '--pretrain_batch'
                                            '_size', '4'],
                                    'gumbel': ['--encoding', 'hard', '--r1', '.1']}.get(name, []))
        cfg.dtype, cfg.sft_batch_size = 'float32', 6
        roll = script.Rollout(*common, (noise if script is gumbel else ref_logprobs)[rows])
        keeps = {k: Keep(z) for k, z in (('g', gpt), ('d', discriminator), ('c', critic))}
        split = Sized(6, lambda i, device: data.Batch(*(z[::2][i] for z in (prompt, pad)),
                                                      *(z[i] for z in (gold, gold_mask))))
        figures = dict(zip(('mle', 'mle_norm'),
                           script.mle_step(gpt, keeps['g'], split, 0, 1, cfg)))
        found[name, 'mle'] = keeps['g'].kept
        pairs = script.Pairs(*(z[rows] for z in (prompt, pad)),
                             *(z.repeat_interleave(2, 0) for z in batch[2:]), *common[2:4])
        late = [.7, None] if script is gumbel else []
        early = [gpt] if script is gumbel else []
        figures |= script.discriminator_step(discriminator, *early, keeps['d'], pairs, len(rows),
                                             False, *late, cfg)
        found[name, 'd'] = keeps['d'].kept
        rewards = (advantage * mask)[rows]
        if script is reinforce:
            figures |= reinforce.reinforce_step(gpt, keeps['g'], roll, rewards, batch, .4, 0., 0.,
                                                cfg)
        elif script is ppo:
            running = {'beta_factor': 1., 'updates': 0}
            figures |= ppo.ppo_step(gpt, critic, (keeps['g'], keeps['c']), roll, rewards, batch,
                                    np.arange(36).reshape(4, 9) % 13, .4, running, (0., 0.), cfg)
            found[name, 'c'] = keeps['c'].kept
        else:
            figures |= gumbel.gumbel_step(gpt, reference, discriminator, keeps['g'], roll, batch,
                                          .4, 0., .7, None, cfg)
        found[name, 'g'] = keeps['g'].kept
        cfg.samples = 2
        figures |= script.health(roll, batch, cfg)
        found[name, 'figures'] = figures
    torch.save(found, path / f'{dist.get_world_size() if dist.is_initialized() else 1}-{rank}.pt')


class Sized:
    """As much of a Split as an MLE step needs."""

    def __init__(self, n, batch):
        self.n, self.batch = n, batch

    def __len__(self):
        return self.n


def test_two_ranks_have_the_gradient_of_one():
    path = folder('ranks')
    on_ranks('steps_of_all_scripts', path, 1)
    on_ranks('steps_of_all_scripts', path, 2)
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
        flags = [*SMALL, '--minibatch', '8'] if script is ppo else SMALL
        train(script, whole, *flags)
        assert train(script, parts, *flags, caught=After(parts, 'reward', 2)) is None
        train(script, parts, '--resume')


def test_a_resumed_run_on_two_ranks_equals_an_uninterrupted_one():
    path = folder('two ranks')
    on_ranks('whole_and_resumed', path, 2)
    for name in 'reinforce', 'ppo', 'gumbel':
        whole, parts = path / f'whole {name}', path / f'parts {name}'
        assert records(whole) == records(parts) and records(whole)[-1].keys() == {'final'}
        a, b = (load_checkpoint(out / 'ckpt.pt') for out in (whole, parts))
        for saved in a, b:
            saved['settings'].pop('out_dir')
        assert same(a, b) and len(a['replay']) == 2
        assert not same(*a['replay'])                # each rank has prompts and noise of its own
        raises(ValueError, ['--resume', '2 ranks, not 1'], train, reinforce, path /
               'whole reinforce', '--resume')


def torchrun(script, out, *flags):
    """The process that starts two ranks of a script."""
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2',
         script.__file__, *SMALL, *flags, '--out_dir', out],
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


def long_ranks_end_together_and_resume():
    """A rank that is killed ends the other, SIGTERM has both save, none hangs; after 2 of each at
    random instants a run ends as one left alone."""
    rng, n = np.random.default_rng(0), '30'
    for script in SCRIPTS:
        flags = ['--iters', n, *(['--minibatch', '8'] if script is ppo else [])]
        whole, parts = (folder(f'{name} ranks {script.__name__}') for name in ('whole', 'parts'))
        _, err = torchrun(script, whole, *flags).communicate(timeout=200)
        assert records(whole)[-1].keys() == {'final'}, err[-2000:]
        for turn, number in enumerate((signal.SIGKILL, signal.SIGTERM) * 2):
            process = torchrun(script, parts, *flags, '--resume' if turn else '--overwrite')
            until = After(parts, 'mle', 4 + 6 * turn + int(rng.integers(6)))
            while process.poll() is None and not until:
                time.sleep(.02)
            assert process.poll() is None, process.communicate()
            family = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
            ranks = [pid for pid in map(int, family)
                     if script.__file__ in Path(f'/proc/{pid}/cmdline').read_text()]
            assert len(ranks) == 2, family
            os.kill(ranks[turn // 2] if number == signal.SIGKILL else process.pid, number)
            _, err = process.communicate(timeout=60)
            assert process.returncode and all(load_checkpoint(f) for f in parts.glob('*.pt'))
            assert not any(Path(f'/proc/{pid}').exists() for pid in ranks), err[-2000:]
        _, err = torchrun(script, parts, *flags, '--resume').communicate(timeout=200)
        assert records(parts) == records(whole), err[-2000:]
        a, b = (load_checkpoint(out / 'ckpt.pt') for out in (whole, parts))
        for saved in a, b:
            saved['settings'].pop('out_dir')
        assert same(a, b)


def frozen_parts_hold_nothing(script, station, *more):
    """`station` names the function that is given the generator and the reference first."""
    (kept, adamw), networks, tended = (getattr(script, station), script.adamw), [], []
    setattr(script, station, lambda *a: networks.append(a[:2]) or kept(*a))
    script.adamw = lambda network, cfg: tended.append(network) or adamw(network, cfg)
    try:
        train(script, folder('frozen'), *SMALL, *more)
    finally:
        setattr(script, station, kept)
        script.adamw = adamw
    generator, reference = networks[-1]
    assert generator is not reference and reference not in tended and generator in tended
    assert not any(p.requires_grad for p in reference.parameters())
    for network in reference, *tended:               # learners free theirs after each update
        assert all(p.grad is None for p in network.parameters())


def test_frozen_parts_hold_no_gradients_and_no_optimizer_state():
    frozen_parts_hold_nothing(reinforce, 'rollout')
    frozen_parts_hold_nothing(ppo, 'rollout', '--minibatch', '8')
    frozen_parts_hold_nothing(gumbel, 'gumbel_step')


def test_variants_run():
    poster = ['--baseline', 'mean', '--samples', '1', '--d_samples', '1', '--d_loss', 'minimax',
              '--no-d_prefixes', '--no-context', '--sft_iters', '0', '--anchor', '0',
              '--d_warmup_iters', '0', '--d_max_acc', '1', '--no-relative']
    for script, flags in ((reinforce, poster), (reinforce, ['--reward', 'dense']),
                          (reinforce, ['--dtype', 'bfloat16']), (reinforce, ['--iters', '0']),
                          (reinforce, ['--max_response', '1']),
                          (ppo, ['--minibatch', '7', '--samples', '1', '--d_samples', '1']),
                          (ppo, ['--minibatch', '8', '--dtype', 'bfloat16', '--reward', 'dense']),
                          (ppo, ['--minibatch', '8', '--pretrain', '0', '--no-relative']),
                          (gumbel, ['--encoding', 'mixed', '--d_loss', 'minimax']),
                          (gumbel, ['--encoding', 'hard', '--r1', '.1']),
                          (gumbel, ['--dtype', 'bfloat16', '--samples', '1', '--d_samples', '1'])):
        out = folder('variant')
        result = train(script, out, *SMALL, *flags)
        assert math.isfinite(result['tuned']['f1']), flags


def test_extreme_settings_run():
    """One of everything, nothing learned, every answer a tie or without eos, none answerable."""
    one = ['--batch_size', '1', '--sft_batch_size', '1', '--samples', '1', '--d_samples', '1']
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

        data.toy_examples = examples
        try:
            for script in SCRIPTS:
                more = {'ppo': ['--minibatch', '1' if flags[0] == '--batch_size' or '--samples' in
                                flags else '8'], 'reinforce': ['--baseline', 'mean']}
                result = train(script, folder('extreme'), *SMALL, *flags,
                               *more.get(script.__name__, []))
                assert math.isfinite(result['tuned']['f1'])
                if name == 'unanswerable':           # all ties in the end
                    assert result['tuned']['em'] == 100 and result['tuned']['d_acc'] == .5
        finally:
            data.toy_examples = kept


def test_control_spends_the_time_of_a_run_on_mle():
    run, out = folder('run'), folder('control')
    lines = [{'config': {}}, {'iter': 0, 'dev': {}}, {'iter': 1, 'seconds': {'rollout': .1}},
             {'iter': 0, 'seconds': {'rollout': .3, 'generator': .4}}]
    (run / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    for script in SCRIPTS:
        kept, clock = (script.mle_step, script.time), itertools.count(0., .025)
        script.mle_step = lambda *a: (0., 0.)
        script.time = SimpleNamespace(perf_counter=lambda clock=clock: next(clock))
        try:                                         # 0.8 seconds in steps of 0.025
            cfg = script.parse(['--tiny', '--control', str(run), '--iters', '16'])
            assert script.control_steps(tiny_gpt(), None, cfg) == 2
        finally:
            script.mle_step, script.time = kept
        result = train(script, out, *SMALL, *(['--minibatch', '8'] if script is ppo else []),
                       '--overwrite', '--control', str(run), '--iters', '40', '--eval_interval',
                       '40')
        assert 'more MLE' in result and 'tuned' not in result
        rows = [r for r in records(out) if 'iter' in r and 'dev' not in r]
        assert len(rows) == 40 and all(r.keys() == {'iter', 'mle', 'mle_norm'} for r in rows)
        assert load_checkpoint(out / 'ckpt.pt')['running']['control_steps'] >= 1
        raises(ValueError, ['--control gone', 'holds no run'], train, script, folder('lone'),
               *SMALL, '--control', 'gone', *(['--minibatch', '8'] if script is ppo else []))


def compiled_equals_eager(script, *more):
    if not shutil.which('g++'):
        raise unittest.SkipTest('torch.compile needs g++ on CPU')
    torch._dynamo.reset()                            # what another script compiled is not its own
    figures, graphs, rollout = [], [], script.rollout

    def counted(*args):
        graphs.append(torch._dynamo.utils.counters['stats']['unique_graphs'])
        return rollout(*args)

    for flag in '--no-compile', '--compile':
        out, script.rollout = folder(f'compiled {script.__name__}'), counted
        # evaluation and rollout in batches of one size: a graph for each costs seconds
        train(script, out, *SMALL, '--d_dropout', '0', flag, '--sft_iters', '1', '--iters', '5',
              '--eval_prompts', '8', '--eval_interval', '5', '--d_warmup_iters', '0',
              '--n_layer', '2', *more)
        script.rollout = rollout
        figures.append([r for r in records(out) if 'g_loss' in r])
    assert len(figures[0]) >= 4
    start, first, second, *later = graphs[5:]        # of the compiled run, before each iteration
    assert second > start and all(n == second for n in later), graphs
    assert second - graphs[0] < 16, graphs           # one for all layers, or it were twice as many
    for a, b in zip(*figures):
        for key in 'g_norm', 'kl', 'entropy', 'reward', 'd_loss', 'mle', 'v_loss', 'pretrain':
            if key in a:
                assert abs(a[key] - b[key]) < 1e-4 * max(1, abs(a[key])), (key, a[key], b[key])


def test_compiled_runs_equal_eager_ones():           # one test: they share most kernels
    compiled_equals_eager(reinforce)
    compiled_equals_eager(ppo, '--minibatch', '16')
    compiled_equals_eager(gumbel)


def test_bench_races_and_refuses():
    """That every race of the bench runs, with and without several samples; no figure is judged."""
    tiny = ['--prompt', '8', '--response', '4', '--n_layer', '1', '--n_head', '1', '--n_embd', '8',
            '--repeats', '1', '--device', 'cpu', '--tflops', '1', '--gbs', '100']
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for samples, stations in (2, ['rollout', 'train', 'iterations']), (1, ['iterations']):
            bench.main(['--only', *stations, '--batch', '4', '--samples', str(samples), '--json',
                        str(SCRATCH / 'bench.json'), *tiny])
            races = json.loads((SCRATCH / 'bench.json').read_text())['races']
            assert len(races) == (7 if samples == 2 else 3), races.keys()
            assert all(s > 0 for r in races.values() for s in r.get('seconds', r).values())
    assert 'of the limit' in out.getvalue()
    for batch, samples in ('6', '4'), ('0', '4'), ('8', '0'):
        raises(SystemExit, ['--batch', f'--samples {samples}'], bench.main,
               ['--batch', batch, '--samples', samples])


def test_health_knows_a_collapse():
    cfg = reinforce.parse(['--tiny', '--samples', '1', '--d_samples', '1', '--baseline', 'mean'])
    ids = torch.arange(40).view(8, 5)
    mask, pad = torch.ones(8, 5).bool(), torch.zeros(8, dtype=torch.long)
    batch = data.Batch(ids, pad, ids, mask)
    for response, sick in ((ids, False), (ids.roll(1, 0), False),
                           (torch.full_like(ids, 7), True),                  # could could could
                           (ids[:1].expand(8, -1), True)):                   # one answer to all
        roll = reinforce.Rollout(ids, pad, response, mask, mask[:, 0], torch.zeros(8, 5))
        assert reinforce.health(roll, batch, cfg)['sick'] == sick


def test_a_collapse_stops_the_run():
    out, kept = folder('collapse'), reinforce.health
    reinforce.health = lambda *a: {**kept(*a), 'sick': True}
    try:
        raises(FloatingPointError, ['collapsed by iteration', 'ckpt.pt'], train, reinforce, out,
               *SMALL, '--iters', '40', '--eval_interval', '10')
    finally:
        reinforce.health = kept
    assert load_checkpoint(out / 'ckpt.pt')['iter'] == 0


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
            ('reinforce.py', ['--lr', '-1'], ['--lr -1', 'at least 0'], 1),
            ('reinforce.py', ['--learning_rate', '1'], ['--learning_rate'], 2),
            ('reinforce.py', ['--d_loss', 'wgan'], ['--d_loss', 'minimax'], 2),
            ('reinforce.py', ['--tiny', '--init_from', 'gone.bin', '--out_dir', SCRATCH / 'a'],
             ['gone.bin'], 1),
            ('ppo.py', ['--minibatch', '1000'], ['--minibatch 1000', '--batch_size 64'], 1),
            ('sample.py', ['--ckpt', 'gone.pt', '--question', 'Who?'], ['gone.pt'], 1)):
        err = command(script, *flags, expect=code).stderr.strip()
        assert 'Traceback' not in err and all(w in err for w in words), (flags, err)
        assert code == 2 or '\n' not in err, err
    for flags, words in ((['--table', 'gone.json'], ['gone.json', '--evaluate']),
                         (['--plot', 'gone'], ['gone/metrics.jsonl', 'not found']),
                         (['--plot', f'run={full}'], [str(full), 'no metrics'])):
        raises(SystemExit, words, printed, *flags)
    new = SCRATCH / 'new'
    for script, out, flags, words in (
            (reinforce, new, ['--tiny', '--max_response', '0'], ['--max_response 0', 'at least 1']),
            (reinforce, new, ['--tiny', '--n_embd', '10'], ['n_embd 10', 'n_head']),
            (reinforce, full, ['--tiny'], [str(full), '--resume', '--overwrite']),
            (reinforce, SCRATCH / 'gone', ['--resume'], ['--resume', 'no checkpoint']),
            (reinforce, new, ['--tiny', '--samples', '1', '--d_samples', '1'],
             ['--samples 1', '--baseline mean']),
            (ppo, new, ['--kl_target', '1', '--beta', '0'], ['--kl_target 1.0', '--beta']),
            (ppo, new, ['--clip', '0'], ['--clip 0', 'above 0']),
            (gumbel, new, ['--tau_end', '.05'], ['--tau_end 0.05', 'at least 0.1']),
            (ppo, other, ['--resume'], [str(other), 'another script', '--baseline'])):
        raises((ValueError, FileNotFoundError), words, train, script, out, *flags)


def test_every_flag_refuses_what_it_cannot_take():
    """The wrong type is argparse's to refuse, what is out of range ours: flag, value and remedy."""
    tried = 0
    for script in SCRIPTS:
        for f in fields(script.Config):
            flag, kept = f'--{f.name}', sys.stderr
            kinds = {int: ['x', '1.5', '', 'nan'], float: ['x', '', '1,5']}.get(f.type, [])
            if get_args(f.type) and type(None) not in get_args(f.type):      # a Literal
                kinds = ['x', '', get_args(f.type)[0].upper()]
            if f.type in (bool, Optional[bool]):
                kinds = None
            for value in kinds or []:
                sys.stderr = io.StringIO()
                try:
                    script.parse([flag, value])
                except SystemExit as e:
                    assert e.code == 2 and f'argument {flag}: invalid' in sys.stderr.getvalue()
                else:
                    raise AssertionError(f'{script.__name__} {flag} {value} was taken')
                finally:
                    sys.stderr = kept
                tried += 1
            if kinds is None:
                sys.stderr = io.StringIO()
                try:
                    raises(SystemExit, ['2'], script.parse, [f'{flag}=1'])
                finally:
                    sys.stderr = kept
                tried += 1
            out_of_range = {int: ['-1'], float: ['-1', 'nan', 'inf', '-inf']}.get(f.type, [])
            if f.name == 'no_eos_reward':
                out_of_range = ['nan', 'inf']
            for value in out_of_range:
                number = f.type(value)
                raises(ValueError, [f'{flag} {number}', 'give'], script.parse, [f'{flag}={value}'])
                tried += 1
    print(f'{tried} values of flags refused')
    assert tried > 400


def test_offline_is_one_sentence():
    dead = 'http://127.0.0.1:9'                      # where nothing listens
    env = {**os.environ, 'TIKTOKEN_CACHE_DIR': str(folder('no bpe')), 'HF_HUB_OFFLINE': '1',
           'HTTPS_PROXY': dead, 'https_proxy': dead, 'HF_HOME': str(folder('no hub'))}
    for flags, words in (([], ['BPE', 'TIKTOKEN_CACHE_DIR', '--data toy']),
                         (['--tiny', '--init_from', 'gpt2'], ['gpt2', 'offline', '--init_from'])):
        err = command('reinforce.py', *flags, '--device', 'cpu', '--out_dir', SCRATCH / 'offline',
                      expect=1, env=env).stderr.strip()
        assert '\n' not in err and all(w in err for w in words), err
    raises(FileNotFoundError, ['squad_v2', 'offline', '--data'],
           data.load_examples, 'squad_v2', 'dev')    # this process is told to be offline


def test_out_of_gpu_memory_is_one_sentence():
    def train(cfg, caught):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB.')

    kept, reinforce.train = reinforce.train, train
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        raises(SystemExit, ['out of memory', 'GiB', '--micro_batch'], reinforce.main, ['--tiny'])
    finally:
        reinforce.train = kept
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), handlers):
            signal.signal(number, handler)


def test_folders_that_are_taken_gone_or_oddly_named():
    out = folder('ünï cödé 你好') / 'a run'
    flags = [*SMALL, '--iters', '1', '--eval_interval', '1']
    _, lock = reinforce.prepare(reinforce.parse([*flags, '--out_dir', str(out)]))
    raises(ValueError, [str(out), 'in use'], train, gumbel, out, *flags)
    lock.close()
    assert train(gumbel, out, *flags)['tuned']['f1'] >= 0
    assert GPT.from_pretrained(out / 'ckpt.pt').config.n_layer == 1
    file = out / 'metrics.jsonl'
    err = command('reinforce.py', *SMALL, '--out_dir', file / 'below', expect=1).stderr.strip()
    assert '\n' not in err and 'metrics.jsonl' in err, err
    gone, kept = folder('vanishing'), reinforce.health

    def vanish(*a):
        shutil.rmtree(gone)
        return kept(*a)

    reinforce.health = vanish
    try:
        raises(OSError, [str(gone)], train, reinforce, gone, *SMALL)
    finally:
        reinforce.health = kept


def test_a_signal_saves_and_exits():
    out = folder('signalled')
    for number in signal.SIGINT, signal.SIGTERM:     # the second one goes on from the first
        flags = ['--resume'] if (out / 'sft.pt').exists() else SMALL
        process = subprocess.Popen(
            [sys.executable, HERE / 'reinforce.py', *flags, '--iters', '100000', '--out_dir', out],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before = sum('reward' in r for r in records(out)) if (out / 'sft.pt').exists() else 0
        while process.poll() is None and not After(out, 'reward', before + 5):
            time.sleep(.05)
        process.send_signal(number)
        assert process.wait(60) == 128 + number, process.stderr.read()
        saved = load_checkpoint(out / 'ckpt.pt')
        assert saved['iter'] == max(r['iter'] for r in records(out) if 'reward' in r) + 1


def test_the_commands_of_the_readme():
    out = SCRATCH / 'a run'
    shutil.rmtree(out, ignore_errors=True)
    text = command('reinforce.py', *SMALL, '--out_dir', out).stdout
    assert re.search(r'warm start +[\d.]+.*\ntuned +[\d.]+', text), text
    assert (out / 'samples.txt').read_text().count('question  ') == 12
    assert (out / 'curves.png').stat().st_size > 1000
    ckpt = out / 'ckpt.pt'
    command('sample.py', '--ckpt', ckpt, '--question', 'Who ?', '--context', 'Ada built it .')
    text = command('sample.py', '--compare', out / 'sft.pt', ckpt, '--prompts', '3').stdout
    assert text.count(str(ckpt)) == 3 and text.count('gold  ') == 3
    assert '--no-context' in command('reinforce.py', '--help').stdout


def test_a_run_warns_of_nothing():
    """All that Python would warn of in our files, but for open files at exit, as by default."""
    env = {**os.environ, 'PYTHONWARNINGS': 'always,ignore::ResourceWarning'}
    for script in SCRIPTS:
        name, more = script.__name__, ['--minibatch', '8'] if script is ppo else []
        err = command(f'{name}.py', *SMALL, *more, '--out_dir', folder(f'quiet {name}'),
                      env=env).stderr
        ours = [line for line in err.splitlines() if 'Warning' in line and str(HERE) in line
                and 'site-packages' not in line]
        assert not ours, ours


def test_no_drift():
    """Scripts are alike in all that is not specific to their approach."""
    banners = ['config', 'losses', 'rollout and evaluation', 'training']
    stations = ['setup', 'data', 'models', 'warm start', 'resume', 'evaluate and checkpoint',
                'rollout', 'discriminator step', 'generator step', 'log']
    own = {'train', 'check_approach'}                # same name, another text
    of_gumbel = {'Rollout', 'rollout', 'discriminator_step'}                 # noise, one-hots
    functions, settings = [], []
    for script in SCRIPTS:
        source = inspect.getsource(script)
        lines = re.findall(r'^    (\w+):.*?  # +.*$', inspect.getsource(script.Config), re.M)
        assert lines == [f.name for f in fields(script.Config)]
        assert re.findall(r'^# -+\n# ([\w ]+)', source, re.M) == banners
        body = inspect.getsource(script.train)
        assert re.findall(r'^ +# ([a-z ]+)$', body, re.M) == stations, body
        functions.append({n: inspect.getsource(f) for n, f in vars(script).items()
                          if getattr(f, '__module__', '') == script.__name__
                          and (inspect.isfunction(f) or inspect.isclass(f))
                          and n not in own | {'Config'}
                          and not (script is gumbel and n in of_gumbel)})
        settings.append(dict(re.findall(r'^    (\w+): (.*)$', inspect.getsource(script.Config),
                                        re.M)))
        assert re.sub(r'# .*', '', settings[-1].pop('out_dir')).strip() \
            == f"str = 'out/{script.__name__}'"
    for one, other in itertools.combinations(range(len(SCRIPTS)), 2):
        for found in functions, settings:
            a, b = found[one], found[other]
            shared = [n for n in a if n in b]
            assert shared == [n for n in b if n in a], (shared, [n for n in b if n in a])
            for name in shared:
                assert a[name] == b[name], name
            assert len(shared) > 20


# -----------------------------------------------------------------------------


def run(name):
    """Runs one test in silence; the line to print."""
    start, kept = time.perf_counter(), sys.stdout
    sys.stdout = io.StringIO()
    try:
        globals()[name]()
        verdict = 'ok'
    except unittest.SkipTest as e:
        verdict = f'skipped: {e}'
    except Exception:
        verdict = f'FAILED\n{traceback.format_exc()}'
    finally:
        sys.stdout = kept
    return f'{name}  {time.perf_counter() - start:.1f} s  {verdict}'


def main(part=''):
    """Runs the tests whose name holds `part`; exit code 1 if one fails or none matched."""
    os.environ['OMP_NUM_THREADS'] = '1'              # one core a process, and its subprocesses
    kind = 'long_' if part.startswith('long') else 'test_'          # minutes; asked for by name
    names = [n for n in globals() if n.startswith(kind) and part in n]
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
