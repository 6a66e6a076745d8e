"""
Speed, side by side in one run: contestants take turns, medians are compared, only ratios count.

$ python bench.py                             rollouts and a train step
$ python bench.py --only rollout --dtype bfloat16 --batch 32 --json speed.json
$ python bench.py --only host --compile       what the host takes to launch a train step

The model is a GPT-2 of random weights; its peer is the same weights in `transformers`, left out
where that is not installed. A tilted bias makes <|endoftext|> as likely at each token as
--mean_length says, for the ragged rollout; elsewhere it never comes. On a CPU ours runs with the
allocator as our scripts set it, the peer with glibc's own settings.
"""

import argparse
import copy
import ctypes
import json
import os
import sys
import tempfile
import time

import numpy as np
import torch

import data
import reinforce
from model import (GPT, GPTConfig, adamw, autocast, command_line, keep_freed_memory, open_device,
                   update)

EOS = 50256
# the makers' figures: TFLOP/s in dense bfloat16, GB/s of memory
PEAKS = {'H100 80GB HBM3': (989, 3350), 'H200': (989, 4800), 'A100-SXM4-80GB': (312, 2039)}


def give_memory_back():
    """Undoes `keep_freed_memory`: glibc's thresholds where they end up by themselves."""
    try:
        libc = ctypes.CDLL(None)
        settings = (-4, 65536), (-3, 2 ** 25), (-1, 2 ** 26)     # mappings, their size, trimming
        for parameter, value in settings:
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass


def race(contestants, args, alike=False):
    """Seconds of each function by name: the median of `repeats` turns, after a warm-up. `alike`:
    the peer, too, runs with the allocator as our scripts set it."""
    seconds = {name: [] for name in contestants}
    for turn in range(args.repeats + 1):
        for name, run in contestants.items():
            torch.manual_seed(turn)
            keep_freed_memory() if alike or name.startswith('ours') else give_memory_back()
            start = time.perf_counter()
            run()
            if args.device.startswith('cuda'):
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(s[1:])) for name, s in seconds.items()}


def report(title, seconds, found, tokens=None, limit=None):
    """Prints and keeps one race: the first contestant is ours, ratios are to it. With `limit`, the
    seconds that the device's peaks allow, shares of it too."""
    ours = next(iter(seconds.values()))
    found[title] = {'seconds': seconds, 'ratios': {n: s / ours for n, s in seconds.items()}}
    line = []
    for name, s in seconds.items():
        line.append(f'{name} {s:.3g} s')
        if tokens and name.startswith('ours'):
            line[-1] += f', {tokens / s:.0f} tokens/s'
        if limit:
            found[title].setdefault('of_limit', {})[name] = limit / s
            line[-1] += f', {limit / s:.0%} of the limit'
        if name != 'ours':
            line[-1] += f' ({s / ours:.2f}x)'
    print(f'{title}: ' + '; '.join(line), flush=True)


def peaks(args):
    """TFLOP/s and GB/s of the device; None where neither flags nor, for bfloat16, PEAKS tell."""
    name = torch.cuda.get_device_name() if args.device.startswith('cuda') else ''
    known = [peak for key, peak in PEAKS.items() if key in name and args.dtype == 'bfloat16']
    tflops, gbs = known[0] if known else (None, None)
    return args.tflops or tflops, args.gbs or gbs


def rollout_limit(gpt, prompts, K, args):
    """Seconds that arithmetic of the prompts and traffic of the tokens take at the peaks, or None:
    each step reads all weights once, the head in float32, and a prompt's keys and values once for
    its K answers."""
    tflops, gbs = peaks(args)
    if not tflops or not gbs:
        return None
    c, size = gpt.config, 2 if args.dtype == 'bfloat16' else 4
    trunk, head = sum(p.numel() for p in gpt.h.parameters()), c.vocab_size * c.n_embd
    P, R, width = args.prompt, args.response, c.n_layer * c.n_embd
    flops = prompts * (P * (2 * trunk + 2 * P * width) + 2 * head)
    cached = sum(P + K * t for t in range(1, R)) * prompts * 2 * width       # keys, values
    traffic = (R - 1) * (trunk * size + head * 4) + cached * size
    return flops / tflops / 1e12 + traffic / gbs / 1e9


def train_limit(gpt, rows, args):
    """Seconds of a training step's arithmetic at the peak, so that the share of it is the MFU, or
    None: forward and twice as much backward, attention causal, the head at the response alone."""
    tflops, _ = peaks(args)
    if not tflops:
        return None
    c, T = gpt.config, args.prompt + args.response
    trunk, head = sum(p.numel() for p in gpt.h.parameters()), c.vocab_size * c.n_embd
    forward = T * (2 * trunk + 2 * T * c.n_layer * c.n_embd) + args.response * 2 * head
    return 3 * rows * forward / tflops / 1e12


def ours(network, args):
    """Copies by a contestant's name: as the scripts run it on this device, and eager too."""
    copies = {'ours': copy.deepcopy(network)}
    if args.compile:
        copies['ours, eager'] = copy.deepcopy(network)
        copies['ours'].compile()
    return copies


def twin(gpt, args):
    """The same weights in `transformers`, or None."""
    try:
        os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
        from transformers import GPT2LMHeadModel
        from transformers.utils import logging
    except ImportError:
        return None
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        gpt.save_pretrained(folder)
        return GPT2LMHeadModel.from_pretrained(folder).to(args.device).eval()


def lean_to_eos(gpt, mean_length):
    """Evens the logits out and shifts that of eos, so that 1 token in mean_length is eos."""
    with torch.no_grad():
        tokens = torch.randint(0, EOS, (4, 64), device=gpt.wte.weight.device)
        gpt.ln_f.weight *= .1                        # else the share of eos varies from row to row
        direction = torch.zeros_like(gpt.ln_f.bias)
        direction[0] = 10.0
        gpt.ln_f.bias += direction                   # all logits move by 10 wte[:, 0]
        gpt.wte.weight[:, 0] = 0
        logits = gpt(tokens).flatten(0, 1)
        others = logits[:, :EOS].logsumexp(-1).mean()
        wanted = others - np.log(max(mean_length - 1, 1e-3))
        gpt.wte.weight[EOS] = 0
        x = gpt.hidden(gpt.embed(tokens), torch.zeros_like(tokens[:, 0]), tokens.size(1), 1)
        gpt.wte.weight[EOS, 0] = wanted / x[..., 0].mean()
    return gpt


def prompts(n, args, ragged, n_vocab=EOS):
    """Random ids (n, P), left-padded where ragged: lengths as SQuAD's prompts have them."""
    rng = np.random.default_rng(0)
    lengths = np.full(n, args.prompt)
    if ragged:                                       # mean 166 and deviation 59 tokens of 256
        lengths = np.clip(rng.lognormal(5.05, .35, n), 40, args.prompt).astype(int)
    ids = torch.from_numpy(rng.integers(0, n_vocab, (n, args.prompt)))
    pad = torch.from_numpy(args.prompt - lengths)
    ids[torch.arange(args.prompt) < pad[:, None]] = EOS
    return ids.to(args.device), pad.to(args.device)


def bench_rollout(gpt, args, found):
    """Prompts of one length and all R tokens; K samples of each; real lengths of both."""
    peer = twin(gpt, args)
    leaning = lean_to_eos(copy.deepcopy(gpt), args.mean_length)
    leaning_peer = twin(leaning, args)
    plain, leaning = ours(gpt, args), ours(leaning, args)

    def rollout(model, ids, pad, K, eos):
        def run():
            with autocast(args):
                model.generate(ids, pad, args.response, eos, samples=K)
        return run

    def theirs(model, ids, pad, K, least):
        mask = torch.arange(ids.size(1), device=ids.device) >= pad[:, None]

        def run():
            with torch.no_grad(), autocast(args):
                model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0,
                               max_new_tokens=args.response, min_new_tokens=least,
                               num_return_sequences=K, pad_token_id=EOS, eos_token_id=EOS)
        return run

    for B in args.batch:
        for title, one, other, K, ragged in (
                ('equal lengths', plain, peer, 1, False), (f'{args.samples} samples of each prompt',
                                                           plain, peer, args.samples, False),
                ('ragged, early ends', leaning, leaning_peer, 1, True)):
            ids, pad = prompts(B // K, args, ragged)
            eos = EOS if ragged else EOS + 1
            runs = {name: rollout(network, ids, pad, K, eos) for name, network in one.items()}
            if other is not None:
                runs['transformers'] = theirs(other, ids, pad, K, 0 if ragged else args.response)
            report(f'rollout {args.dtype}, batch {B}, {title}', race(runs, args), found,
                   *(() if ragged else (B * args.response, rollout_limit(gpt, B // K, K, args))))


def bench_train(gpt, args, found, host=False):
    """An Adam step on -log pi of the response, from forward to weights, the peer's with all rows at
    once; `host`: ours so, too, and beside it in two micro-batches."""
    B, V = args.batch[0] // 2, gpt.config.vocab_size - 1
    ids, pad = prompts(B, args, False, V)
    response = torch.randint(0, V, (B, args.response), device=args.device)
    batch = data.Batch(ids, pad, response, torch.ones_like(response).bool(),
                       torch.ones_like(pad).bool())
    labels = torch.cat((torch.full_like(ids, -100), response), 1)
    tokens = torch.cat((ids, response), 1)
    peer, runs = twin(gpt, args), {}

    def training(network, n):
        optimizer = adamw(network)
        cfg = reinforce.Config(device=args.device, dtype=args.dtype, micro_batch=n)

        def run():
            reinforce.mle_gradient(network, batch, 1.0, cfg)
            update(network, optimizer, 1e-5)
        return run

    for n in (B, B // 2) if host else (args.micro_batch,):
        for name, network in ours(gpt, args).items():
            runs[f'{name}, by {n}' if host else name] = training(network, n)
    if peer is not None:
        peer_optimizer = torch.optim.Adam(peer.parameters(), lr=1e-5, fused=True)

        def step():
            with autocast(args):
                loss = peer(input_ids=tokens, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
            peer_optimizer.step()
            peer_optimizer.zero_grad()
        runs['transformers'] = step
    title = f'{"host of a " * host}train step {args.dtype}, {B} x ({args.prompt} + {args.response})'
    report(title, race(runs, args, host), found, *(() if host else (
        B * (args.prompt + args.response), train_limit(gpt, B, args))))


def bench_host(gpt, args, found):
    """A train step of the same depth, by one thread, so small that what is left is the host's time
    to launch it."""
    config = GPTConfig(64, 64, args.n_layer, args.n_head, 4 * args.n_head)
    small = argparse.Namespace(**vars(args) | dict(
        dtype='float32', batch=[8], prompt=10, response=8, repeats=10 * args.repeats))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    bench_train(GPT(config).to(args.device).eval(), small, found, host=True)
    torch.set_num_threads(threads)


@command_line()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    stations = {'rollout': bench_rollout, 'train': bench_train, 'host': bench_host}
    parser.add_argument('--only', nargs='+', choices=stations, default=['rollout', 'train'])
    parser.add_argument('--batch', type=int, nargs='+', default=[16, 32], help='responses (16 32)')
    parser.add_argument('--samples', type=int, default=4, help='K (4)')
    parser.add_argument('--prompt', type=int, default=256, help='P, tokens (256)')
    parser.add_argument('--response', type=int, default=32, help='R, tokens (32)')
    parser.add_argument('--mean_length', type=float, default=4.5, help='of ragged responses (4.5)')
    parser.add_argument('--micro_batch', type=int, default=0, help='prompts of a backward pass; 0: '
                        'as in training')
    parser.add_argument('--repeats', type=int, default=3, help='turns that count (3)')
    parser.add_argument('--n_layer', type=int, default=12)
    parser.add_argument('--n_head', type=int, default=12)
    parser.add_argument('--n_embd', type=int, default=768)
    parser.add_argument('--dtype', choices=['auto', 'float32', 'bfloat16'], default='auto')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--compile', action=argparse.BooleanOptionalAction,
                        help='our networks, and eager ones beside them; on CUDA by default')
    parser.add_argument('--tflops', type=float, help="the device's peak, where PEAKS has none")
    parser.add_argument('--gbs', type=float, help='of its memory')
    parser.add_argument('--json', help='file to write')
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) in (int, float) and not 0 < (value or name == 'micro_batch') < float('inf'):
            sys.exit(f'--{name} {value}: give a number above 0')
    if any(n < 2 or n % args.samples for n in args.batch):
        sys.exit(f'--batch {args.batch} with --samples {args.samples}: give multiples, at least 2')
    if args.prompt + args.response > 1024:
        sys.exit(f'--prompt {args.prompt} + --response {args.response}: give at most 1024')
    open_device(args)
    if args.json:
        open(args.json, 'a').close()                 # now, if it cannot be written
    config = GPTConfig(1024, EOS + 1, args.n_layer, args.n_head, args.n_embd)
    torch.manual_seed(0)
    gpt = GPT(config).to(args.device).eval()
    found = {}
    name = torch.cuda.get_device_name() if args.device.startswith('cuda') else 'CPU'
    print(f'{name}, {torch.get_num_threads()} threads, torch {torch.__version__}')
    for only in args.only:
        stations[only](gpt, args, found)
    if args.json:
        with open(args.json, 'w') as f:
            json.dump({'device': name, 'torch': torch.__version__, 'args': vars(args),
                       'threads': torch.get_num_threads(), 'races': found}, f, indent=1)


if __name__ == '__main__':
    main()
