"""
Looking at the result, and judging it.

$ python sample.py --ckpt out/reinforce --question "Who built it?" --context "Ada built it."
$ python sample.py --compare gpt2 out/reinforce/sft.pt out/reinforce/ckpt.pt
$ python sample.py --evaluate sft=out/ppo/sft.pt PPO=out/ppo/ckpt.pt --out out/ppo.json
$ python sample.py --plot PPO=out/ppo-1 PPO=out/ppo-2          or --table, of those or of .json

Wherever several files are given, each may be named: NAME=FILE; files of one name are the seeds of
one thing. A run is its folder or its metrics.jsonl; the folder is its last checkpoint, too.
"""

import argparse
import json
import math
import re
import shutil
import sys
import textwrap
from os.path import expanduser
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import (GPT, Discriminator, all_sum, autocast, check_fit, checksum, command_line,
                   for_readers, hold_last, keep_freed_memory, last_checkpoint, load_checkpoint,
                   load_discriminator, margin, open_device, progress, rank,
                   release_signals, update)

JUDGES, PAIRS = 3, 200           # fresh discriminators to a figure; fewer pairs are not judged
DEFAULTS = dict(data='squad_v2', context=True, max_prompt=256, max_response=32, temperature=1.0)

# -----------------------------------------------------------------------------
# checkpoints, runs, answers

def task_of(sources, args, examples=None):
    """The tokenizer, a Split of --prompts dev examples, or of those given, and the settings: those
    of our .pt files among sources, which have to agree, or DEFAULTS. --data and --temperature win;
    the latter is set if it was not given. All are read before the work on the first."""
    given = {k: v for k, v in (('data', args.data), ('temperature', args.temperature)) if v}
    configs, ours = {}, {}
    for source in dict.fromkeys(sources):
        configs[source] = GPT.from_pretrained(source).config
        file = last_checkpoint(source)
        if saved := file and load_checkpoint(file).get('settings'):
            ours[source] = {k: saved.get(k, v) for k, v in DEFAULTS.items()} | given
    first, settings = next(iter(ours.items()), (None, DEFAULTS | given))
    for source, own in ours.items():
        for name in DEFAULTS:
            if own[name] != settings[name]:
                remedy = f'give --{name}' if name in ('data', 'temperature') else 'take one of them'
                raise ValueError(f'{source} was trained with {name} {own[name]}, {first} with '
                                 f'{settings[name]}: {remedy}')
    args.temperature = args.temperature or [settings['temperature']]
    enc = data.load_tokenizer(settings['data'])
    P, R = settings['max_prompt'], settings['max_response']
    for source, config in configs.items():
        check_fit(source, config, enc.n_vocab, settings)
    context = settings['context'] if examples is None else args.context is not None
    settings |= {'context': context}
    split = (data.Split(examples, enc, P, R, context) if examples else
             data.load_split(settings['data'], 'dev', enc, P, R, context, args.prompts))
    if split.cut_prompts or not examples and split.cut_responses:
        print(f'the prompt is cut to {P} tokens' if examples else
              f'of {len(split)} examples {split.cuts()}', file=sys.stderr)
    return enc, split, settings


def names(arguments):
    """(name, file) pairs of NAME=FILE arguments; a FILE, also one with = in it, is its own name."""
    pairs = []
    for a in arguments:
        name, _, file = a.partition('=')
        file = expanduser(file)
        named = file and not Path(a).exists() and (Path(file).exists() or '/' not in name)
        pairs.append((name, file) if named else (a, expanduser(a)))
    return pairs


def read(file, parse, what, remedy):
    """What `parse` makes of a file's text; where it cannot, an error that says so."""
    try:
        return parse(Path(file).read_text(encoding='utf-8-sig'))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f'{file} not found: {remedy}') from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise ValueError(f'{file} holds no {what}: {remedy}') from e


def read_runs(path):
    """The records of a run, its header first, from its folder or its metrics.jsonl, or of several
    from theirs, one after the other; half a record at the end, of a run that writes or was killed,
    is left out."""
    def parse(text):
        records = [dict(json.loads(line)) for line in text.split('\n')[:-1] if line]
        records[0]['config']
        starts = [i for i, record in enumerate(records) if 'config' in record]
        return [records[i:j] for i, j in zip(starts, [*starts[1:], None])]

    file = path if Path(path).suffix == '.jsonl' else Path(path) / 'metrics.jsonl'
    return read(file, parse, 'metrics', 'give the out_dir of a run')


def batches(split, size):
    """Example numbers of a split in batches of one size, which graphs and kept caches want; the
    last goes on with the first examples, so cut what comes of them to len(split)."""
    n = min(size, len(split))
    yield from progress(np.resize(np.arange(len(split)), (-(-len(split) // n), n)), 'dev')


def answer(generator, split, temperature, args, samples=1):
    """Sampled responses, K to each example of a split, as ids (N K, R) and mask (N K, R)."""
    rng, parts = torch.Generator(args.device).manual_seed(args.seed), []
    for rows in batches(split, max(1, args.batch_size // samples)):
        batch = split.batch(rows, args.device)
        with autocast(args):
            roll = generator.generate(batch.prompt, batch.pad, batch.response.size(1), split.eos,
                                      samples, temperature=temperature, top_k=args.top_k, rng=rng)
        parts.append((roll.response, roll.mask))
    return [torch.cat(z)[:len(split)].flatten(0, 1) for z in zip(*parts)]


@torch.no_grad()
def gold_loss(generator, split, args):
    """-log pi of the gold answers at temperature 1, in nats a token."""
    losses = []
    for rows in batches(split, args.batch_size):
        batch = split.batch(rows, args.device)
        with autocast(args):
            logprobs, _ = generator.response_logprobs(*batch[:2], batch.response[:, None])
        losses.append(-(logprobs[:, 0] * batch.mask).sum(1).cpu().double())
    return torch.cat(losses)[:len(split)].sum().item() / int(split.lengths.sum())


def examine(generator, split, enc, temperature, args):
    """Figures of a greedy and of a sampled answer to each prompt; texts, lists by their names, of
    both; ids and mask of the sampled. A generator that rests is not asked again."""
    this = checksum(generator), args.seed, args.top_k, args.batch_size

    def kept(make, *more):                           # for the last four generators
        key = make, *more, *this
        split.kept[key] = split.kept.pop(key, None) or make(generator, split, *more, args)
        while len(split.kept) > 12:
            del split.kept[next(iter(split.kept))]
        return split.kept[key]

    texts = {'greedy': data.to_text(*kept(answer, 0), enc)}
    response, mask = kept(answer, temperature)
    texts['sampled'] = data.to_text(response, mask, enc)
    greedy, sampled = (data.score_answers(said, split.examples) for said in texts.values())
    others = {'loss': kept(gold_loss), 'length': mask.sum(1).float().mean().item(),
              'distinct2': data.distinct(response, mask, 2)}
    if taken := greedy.keys() & {*others, 'reward', 'score', 'gap', 'd_acc', 'tie_rate', 'kl'}:
        raise ValueError(f'score_answer of data.py names {taken} what is another figure: rename it')
    return greedy | {f'sample_{key}': value for key, value in sampled.items()} | others, texts, \
        response, mask


def scores_of(discriminator, split, groups, response, mask, args):
    """Scores (n, K, R) of answers, of response and mask (N, K, R), to groups of example numbers."""
    scores = []
    for rows in groups:
        b = split.batch(rows, args.device)
        with autocast(args):
            scores.append(hold_last(discriminator(b.prompt, b.pad, response[rows]), mask[rows]))
    return torch.cat(scores)


def side_by_side(examples, answers):
    """Text of examples, with the passage if there is one, and, (name, texts) pairs, their answers;
    a blank line between examples."""
    gold = [' | '.join(dict.fromkeys(e['answers'])) or data.UNANSWERABLE for e in examples]
    rows = [('passage', [e['context'] for e in examples]),
            ('question', [e['question'] for e in examples]), ('gold', gold), *answers]
    width = max(len(name) for name, _ in rows)
    return '\n'.join(''.join(f'{name:{width}}  {" ".join(texts[i].split())}\n'
                             for name, texts in rows if name != 'passage' or texts[i])
                     for i in range(len(examples)))


def ask(args):
    """Asks gpt2, a .pt or .safetensors file, or a folder, the --question."""
    example = {'question': args.question, 'context': args.context or '', 'answers': []}
    enc, split, _ = task_of([args.ckpt], args, [example] * args.samples)
    ids = answer(GPT.from_pretrained(args.ckpt).to(args.device), split, args.temperature[0], args)
    print('\n'.join(data.to_text(*ids, enc)))


def compare(args):
    """Sets the answers of checkpoints to dev prompts side by side."""
    named, answers = names(args.compare), []
    enc, split, _ = task_of([source for _, source in named], args)
    for name, source in named:
        ids = answer(GPT.from_pretrained(source).to(args.device), split, args.temperature[0], args)
        answers.append((name, data.to_text(*ids, enc)))
    print(side_by_side(split.examples, answers))


# -----------------------------------------------------------------------------
# what a script shows of its own run

@torch.no_grad()
def evaluate_run(generator, discriminator, split, enc, cfg):
    """Figures of a generator, and answers to each prompt, drawn as in a rollout: those of
    `examine`; with a discriminator, of the sampled reward (the mean margin, whatever --reward is),
    score, gap, d_acc, its 95% interval d_acc_low, d_acc_high, and tie_rate, as a run logs them;
    Gumbel-softmax logs those of relaxed answers, these are of ids."""
    size = cfg.micro_batch * cfg.samples             # with one seed: always the same noise
    args = argparse.Namespace(**vars(cfg) | {'batch_size': size, 'seed': 0, 'top_k': None})
    figures, texts, response, mask = examine(generator, split, enc, cfg.temperature, args)
    if discriminator is None:
        return figures, texts
    gold = split.batch(range(len(split)), cfg.device)
    pairs = [torch.stack(z, 1) for z in ((gold.response, response), (gold.mask, mask))]
    scores = scores_of(discriminator, split, batches(split, size), *pairs, args)[:len(split)]
    worth = margin(scores, *pairs, pairs[0][..., -1] == split.eos, cfg.d_prefixes)
    differ = (gold.response != response).any(1, keepdim=True)
    told = data.told(scores, differ)
    if told['d_acc'] is not None:
        told['d_acc_low'], told['d_acc_high'] = interval(
            told['d_acc'], groups_of(split)[differ[:, 0].cpu().numpy()])
    return figures | {'reward': worth.mean().item(), **told}, texts


def report(at, generator, discriminator, split, enc, out, log, cfg):
    """Evaluates a run for its log, where `at` is its key and number, samples.txt, curves.png and
    the screen, which gets three answers, if they are others than before, and what there is to
    learn; returns figures and answers."""
    figures, texts = evaluate_run(generator, discriminator, split, enc, cfg)
    log({**at, 'dev': figures}, data.metrics_of(figures))
    if texts != split.shown:
        show(split, texts['sampled'])
    split.shown = texts
    with for_readers(out / 'samples.txt'):
        (out / 'samples.txt').write_text(side_by_side(split.examples[:20], texts.items()), 'utf-8')
    if discriminator:
        with for_readers(out / 'curves.png'):
            runs = read_runs(out)
            # not d_acc_mean: the .5 that it began at is in it
            last = [r['d_acc'] for r in runs[-1] if r.get('d_acc') is not None][-10:]
            if last or at.get('begins'):
                tqdm.write(textwrap.fill(lesson(figures, float(np.mean(last or [.5]))), 99))
            draw({'this run': runs}, out / 'curves.png')
    if at.get('begins'):
        tqdm.write(f'iteration {at["iter"]}: the generator begins to move')
    return figures, texts


def show(split, texts):
    """Prints three answers, in lines as wide as the terminal, 100 columns where there is none."""
    rows = sorted(range(len(split)), key=lambda i: not split.examples[i]['answers'])
    said = [[repr(text)[1:-1] for text in (                  # whatever is in it, one line
        e['question'], (e['answers'] or [data.UNANSWERABLE])[0], texts[i])]
        for i in rows[:2] + rows[2:][-1:] for e in [split.examples[i]]]      # of both kinds
    widths = [max(map(len, column)) for column in zip(*said)]
    while sum(widths) > max(30, shutil.get_terminal_size((100, 24)).columns - 21):
        widths[widths.index(max(widths))] -= 1
    for cells in said:
        tqdm.write('  {:{q}.{q}}  gold: {:{g}.{g}}  sampled: {:.{s}}'.format(
            *cells, **dict(zip('qgs', widths))))


def lesson(figures, training):
    """What a score has to teach, in words: by a discriminator's figures on dev, where .5 is chance,
    and the share of its last training batches' pairs that it told before it learned from them."""
    d_acc, low, high = (figures.get(key) for key in ('d_acc', 'd_acc_low', 'd_acc_high'))
    if d_acc is None:
        return 'All samples on dev are the gold answers: a score has nothing to teach.'
    knows = training > high and training - .5 > 2 * (d_acc - .5)
    return (f"The discriminator tells {d_acc:.0%} of dev's pairs ({low:.0%} to {high:.0%}) and "
            f'{training:.0%} of its last training batches'
            + ': it knows its examples, not the task' * knows
            + '. That may be chance, and the score has nothing to teach yet: raise --d_lr or '
              '--d_warmup_iters, take more data, of dev too, or another --d_init_from' * (low <= .5)
            + '.')


def better(best, step, generator, split, enc, out, log, cfg):
    """Evaluates the warm start at a step. Returns loss on dev, step and weights of the generator
    or, if its loss was no more, `best`, which was them: by F1 the best would be the most mute."""
    loss = torch.zeros((), device=cfg.device)
    if rank() == 0:
        loss += report({'sft_iter': step}, generator, None, split, enc, out, log, cfg)[0]['loss']
    loss = all_sum(loss).item()                      # the same on all ranks
    if not best or best['loss'] > loss:
        best = {'loss': loss, 'step': step, 'model': {
            name: weight.to('cpu', copy=True) for name, weight in generator.state_dict().items()}}
    if step == cfg.sft_iters:
        print(f'kept: step {best["step"]} of {step}, loss {best["loss"]:.3g}')
    return best


def finish(reference, generator, discriminator, split, enc, out, log, cfg):
    """The end of a run, by rank 0: evaluates the warm start and, the last report, the tuned model;
    prints their table, logs and returns the figures. A signal from here on ends it at once."""
    release_signals()
    if rank():
        return None
    warm, _ = evaluate_run(reference, discriminator, split, enc, cfg)
    tuned, _ = report({'iter': cfg.iters}, generator, discriminator, split, enc, out, log, cfg)
    figures = {'warm start': warm, 'tuned': tuned}
    columns = {key: header for key, header in headers(warm).items()          # none by class
               if key.removeprefix('sample_') in data.metrics_of(warm)}
    columns |= {'reward': 'reward', 'gap': 'gap', 'd_acc': 'd_acc', 'distinct2': 'distinct-2'}
    widths = [max(11, len(header) + 1) for header in columns.values()]
    for name, row in {'': columns, **figures}.items():
        cells = (z if isinstance(z, str) else '-' if z is None else f'{z:.3f}'
                 for z in (row[key] for key in columns))
        print(f'{name:12}' + ''.join(f'{z:>{n}}' for z, n in zip(cells, widths)), flush=True)
    log({'final': figures})
    return figures


# -----------------------------------------------------------------------------
# judging

def interval(share, groups):
    """95% interval of a share of trials of these groups, an array of their numbers, as of one trial
    a group, for those of one are not independent (Wilson 1927). That judges differ by their
    training is not in it."""
    z2 = 1.96 ** 2 / len({*groups})
    middle, half = share + z2 / 2, math.sqrt(z2 * share * (1 - share) + z2 ** 2 / 4)
    return (middle - half) / (1 + z2), (middle + half) / (1 + z2)


def groups_of(split):
    """The number of each example's group, (N,): of one passage, or without it of one prompt, or
    linked by such."""
    _, passages = np.unique([e['context'] or e['question'] for e in split.examples],
                            return_inverse=True)
    _, prompts = np.unique(split.prompts, axis=0, return_inverse=True)
    groups, before = np.arange(len(split)), None
    while not np.array_equal(groups, before):        # all take the least number beside them
        before = groups
        for kind in passages, prompts.flatten():
            least = np.full(len(split), len(split))
            np.minimum.at(least, kind, groups)
            groups = least[kind]
    return np.unique(groups, return_inverse=True)[1]


def halves(groups, seed):
    """Numbers of the examples of either half; no group (N,), so no prompt, is in both."""
    side = np.random.default_rng(seed).permutation(groups.max() + 1) % 2
    return [np.flatnonzero(side[groups] == half) for half in (0, 1)]


def fresh_discriminator(trunk, split, fake, fake_mask, seed, args):
    """Whether a new discriminator, of trunk's weights, tells gold answers from fake ones (N, R), to
    prompts that it has not seen: numbers of the examples judged (n,), without those whose answers
    are equal; right (n,), 1, 0, or .5 for equal scores. The seed, a tuple of int, is that of the
    halves of the passages, of the order of the pairs and of dropout."""
    gold = split.batch(range(len(split)), args.device)
    pairs = [torch.stack(z, 1) for z in ((gold.response, fake), (gold.mask, fake_mask))]
    differ = (gold.response != fake).cumsum(1) > 0                           # (N, R)
    where, untied = differ & (gold.mask | fake_mask), differ[:, -1].cpu().numpy()
    learn, judge = (rows[untied[rows]] for rows in halves(groups_of(split), seed))
    if not len(learn) or not len(judge):
        raise ValueError('all that differ are on one half of the passages: give more --prompts')
    torch.manual_seed(hash(seed) % 2 ** 31)
    network = Discriminator(trunk, dropout=.1).to(args.device)
    lr, steps = args.test_lr or .064 / trunk.config.n_embd, args.test_steps
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=.01, fused=True)
    for step in progress(range(steps), 'fresh discriminator'):
        rows = learn[data.order(len(learn), min(args.batch_size, len(learn)), seed, step)]
        for part in np.array_split(rows, -(-len(rows) // args.micro_batch)):
            scores = scores_of(network, split, [part], *pairs, args)         # (n, 2, R)
            loss = F.softplus(scores[:, 1] - scores[:, 0]) * where[part]
            (loss.sum() / where[rows].sum()).backward()      # each prefix the same, as in training
        update(network, optimizer, lr * (1 - step / steps))
    groups = np.array_split(judge, -(-len(judge) // args.batch_size))
    with torch.no_grad():
        ends = scores_of(network.eval(), split, groups, *pairs, args)[..., -1]       # (n, 2)
    if not ends.isfinite().all():
        raise ValueError('a fresh discriminator diverged: give a lower --test_lr')
    return judge, ((ends[:, 0] - ends[:, 1]).sign().cpu().numpy() + 1) / 2


def told_apart(trunk, split, fake, fake_mask, args):
    """The two-sample test of Lopez-Paz and Oquab 2017, by JUDGES fresh discriminators, each with
    halves of its own: accuracy, a share, .5 being chance; low, high, its 95% interval; judges, the
    accuracy of each, none for fewer than PAIRS pairs or no steps; pairs and ties, how many answers
    differ from the gold ones and how many do not."""
    ties = int((split.batch(range(len(split))).response == fake.cpu()).all(1).sum())
    figures = {'accuracy': .5, 'low': 0., 'high': 1., 'judges': [], 'pairs': len(split) - ties,
               'ties': ties}
    if figures['pairs'] < PAIRS or not args.test_steps:
        return figures
    found = [fresh_discriminator(trunk, split, fake, fake_mask, (args.seed, k), args)
             for k in range(JUDGES)]
    rows, right = (np.concatenate(z) for z in zip(*found))
    figures |= {'accuracy': right.mean().item(), 'judges': [r.mean().item() for _, r in found]}
    figures['low'], figures['high'] = interval(figures['accuracy'], groups_of(split)[rows])
    return figures


@torch.no_grad()
def drift(generator, base, split, temperature, args):
    """KL(generator || base) at the temperature, nats per token, over the whole vocabulary, as a run
    logs it, but exact at each token of samples."""
    temperature = temperature or 1.0                 # greedy answers have none
    whole = argparse.Namespace(**vars(args) | {'top_k': None})
    (response, mask), sums = answer(generator, split, temperature, whole), []
    for rows in batches(split, args.batch_size):
        batch = split.batch(rows, args.device)
        with autocast(args):
            logp, base_logp = (                                              # (n, 1, R, V)
                g.head(g.response_hidden(batch.prompt, batch.pad, response[rows][:, None])
                       / temperature).log_softmax(-1) for g in (generator, base))
        kl = (logp.exp() * (logp - base_logp)).sum(-1)[:, 0] * mask[rows]    # (n, R)
        sums.append(kl.sum(1).cpu().double())
    return torch.cat(sums)[:len(split)].sum().item() / mask.sum().item()


@torch.no_grad()
def best_of(generator, discriminator, split, enc, temperature, args):
    """Means of `by_class` of one of args.best_of samples to each prompt: the discriminator's
    choice, any (their mean), the best; and the chosen texts. Does it know what the generator does
    not?"""
    n = args.best_of
    ids = answer(generator, split, temperature, args, n)                     # (N n, R)
    texts = data.to_text(*ids, enc)
    rows = [data.score_answer(text, split.examples[i // n]) for i, text in enumerate(texts)]
    groups = batches(split, max(1, args.batch_size // n))
    scores = scores_of(discriminator, split, groups, *(z.unflatten(0, (-1, n)) for z in ids), args)
    chosen = scores[:len(split), :, -1].argmax(1).cpu().numpy() + n * np.arange(len(split))
    each = [rows[i:i + n] for i in range(0, len(rows), n)]
    ranked = {'chosen': [rows[i] for i in chosen], **{
        which: [{name: pick([row[name] for row in group]) for name in rows[0]} for group in each]
        for which, pick in (('any', np.mean), ('possible', max))}}
    figures = {which: data.by_class(found, split.examples) for which, found in ranked.items()}
    return {'n': n, **figures}, [texts[i] for i in chosen]


def judge(generator, base, discriminator, split, enc, temperature, args):
    """All figures of one checkpoint at one temperature, and its answers, texts by name; with a
    discriminator, `best_of` too."""
    figures, texts, response, mask = examine(generator, split, enc, temperature, args)
    figures['fresh'] = told_apart(base, split, response, mask, args)
    shares = [np.bincount(n, minlength=response.size(1) + 1) / len(split)
              for n in (mask.sum(1).cpu().numpy(), split.lengths)]
    figures['length_distance'] = float(np.abs(shares[0] - shares[1]).sum() / 2)
    figures['kl'] = drift(generator, base, split, temperature, args)
    figures['perplexity'] = torch.tensor(figures['loss']).exp().item()       # inf, if it is
    if discriminator:
        figures['best_of'], texts['chosen'] = best_of(generator, discriminator, split, enc,
                                                      temperature, args)
    return figures, texts


def evaluate(args):
    """Judges checkpoints on held-out prompts; --out has every figure, and beside it, in a .jsonl,
    every answer."""
    named, discriminator, results, lines = names(args.evaluate), None, {}, []
    args.base = args.base or named[0][1]
    sources = [source for _, source in named] + [args.base]
    enc, split, settings = task_of(sources + [args.discriminator] * bool(args.best_of), args)
    base = GPT.from_pretrained(args.base).to(args.device)
    if args.best_of:
        file = last_checkpoint(args.discriminator)
        saved = load_checkpoint(file) if file else {}
        if 'd_gpt_config' not in saved or not saved['discriminator']['score.weight'].any():
            raise ValueError(f'{args.discriminator} has no trained discriminator of this version: '
                             'give a ckpt.pt or start.pt')
        plain = argparse.Namespace(device=args.device, d_dropout=0.0)
        discriminator = load_discriminator(plain, None, saved)
    none = f'; none judged: give {PAIRS} --prompts or more, --test_steps'
    if args.test_steps and len(split) >= PAIRS and not groups_of(split).any():
        raise ValueError(f'the {len(split)} prompts are of one passage, which has no two halves to '
                         'judge by: give more --prompts or --test_steps 0')
    out = Path(args.out or 'out/evaluation.json')
    answers = out.with_name(out.name.removesuffix('.json') + '.jsonl')
    if answers.name == 'metrics.jsonl':
        raise ValueError(f'--out {out}: its answers would take the place of a log: give another')
    out.parent.mkdir(parents=True, exist_ok=True)
    for file in out, answers:
        open(file, 'a').close()                      # now, if it cannot be written
    setup = {'torch': torch.__version__, 'settings': settings, **vars(args)}
    gold = split.batch(range(len(split)))
    print(f'{len(split)} prompts of {settings["data"]}; gold answers: distinct-2 '
          f'{data.distinct(gold.response, gold.mask, 2):.3f}, length {split.lengths.mean():.2f}; '
          f'fresh discriminators start from {args.base}, KL is from it, in nats per token'
          + none * (len(split) < PAIRS or not args.test_steps))
    for name, source in named:
        generator = GPT.from_pretrained(source).to(args.device)
        for temperature in args.temperature:
            f, texts = judge(generator, base, discriminator, split, enc, temperature, args)
            f |= {'prompts': len(split), 'temperature': temperature, 'source': source}
            label = name if len(args.temperature) == 1 else f'{name}, T {temperature}'
            lines += [json.dumps({
                'name': label, 'source': source, 'temperature': temperature,
                'prompt': e['question'], 'context': e['context'], 'gold': e['answers'],
                **dict(zip(texts, said))}) + '\n'
                for e, *said in zip(split.examples, *texts.values())]
            results.setdefault(label, []).append(f)
            keep_freed_memory(False)
            row = [f'{header} {cell(header, [value])}' for header, value in row_of(f).items()]
            test = '; told apart {accuracy:.1%} [{low:.1%}, {high:.1%}]'
            test = ('{pairs} pairs that differ, {ties} ties'
                    + (test if f['fresh']['judges'] else none)).format(**f['fresh'])
            print(f'\n{label}, at {temperature}: {", ".join(row)}\n  {test}', flush=True)
            write_json(out, {'setup': setup, 'results': results})
            answers.write_text(''.join(lines))
    print(f'\nwritten: {out}, the answers: {answers}')


def write_json(path, value):
    """Writes a value as JSON, in which what is not finite, at any depth, is null."""
    strict = json.loads(json.dumps(value), parse_constant=lambda _: None)
    path.write_text(json.dumps(strict, indent=1) + '\n')


# -----------------------------------------------------------------------------
# tables and curves

def headers(figures):
    """What the metrics among the figures of an evaluation are called, by their keys: of greedy
    answers, then of sampled ones."""
    called = {f'{of}{kind}{name}': {'em': 'EM', 'f1': 'F1'}.get(name, name) + said + group
              for of, said in (('', ''), ('sample_', ' sampled'))
              for kind, group in (('', ''), ('has_', ', HasAns'), ('no_', ', NoAns'))
              for name in data.metrics_of(figures)}
    called |= {'unanswerable': 'unanswerable %', 'sample_unanswerable': 'sampled unanswerable %'}
    return {key: header for key, header in called.items() if key in figures}


def row_of(f):
    """Columns for what `judge` found, or for the end of a run, NaN if not known; 'of all' counts a
    tie as a half."""
    if 'run' in f:
        return row_of_run(f['run'])
    if 'row' in f:                                   # a table of one's own
        return f['row']
    fresh, ties = f['fresh'], 100 * f['fresh']['ties'] / f['prompts']
    right = 100 * fresh['accuracy'] if fresh.get('judges', True) else np.nan
    called = headers(f)
    row = {header: f[key] for key, header in called.items()} | {
        'told apart %': right, 'of all %': right + ties / 100 * (50 - right), 'ties %': ties,
        'distinct-2': f['distinct2'], 'length dist.': f['length_distance'], 'KL': f['kl'],
        'perplexity': f['perplexity']}
    best = {'chosen': 'chosen', 'any': 'of any', 'possible': 'possible'} if 'best_of' in f else {}
    for which, said in best.items():                 # F1 chosen, HasAns
        row |= {re.sub('(?=,)|$', ' ' + said, called[key], count=1): value
                for key, value in f['best_of'][which].items()}
    return {header: float(value) for header, value in row.items()}


def row_of_run(last):
    """Columns for the last values of a run: its evaluation, and whether a collapse ended it."""
    dev = last.get('dev', {})
    row = {header: dev[key] for key, header in headers(dev).items()}
    return row | {'distinct-2': dev.get('distinct2', np.nan),
                  'longest run': last.get('longest_run', np.nan),
                  'stopped at': str(last['iter']) if 'collapsed' in last else '',
                  'answers like': f'`{last["collapsed"] or " "}`' if 'collapsed' in last else ''}


def in_cell(text):
    """A text for a cell of a Markdown table: of one line, its | no borders."""
    return ' '.join(text.split()).replace('|', r'\|')


def cell(header, values):
    """Mean and standard deviation (over n - 1) of a column's numbers; of texts, those there are."""
    if any(value != value for value in values):      # NaN
        return '–'
    if isinstance(values[0], str):
        return in_cell(', '.join(dict.fromkeys(filter(None, values)))) or '–'
    digits = {'distinct-2': 3, 'length dist.': 3, 'KL': 3, 'perplexity': 2}.get(header, 1)
    figures = [np.mean(values), np.std(values, ddof=1)] if len(values) > 1 else values
    return ' ± '.join(f'{z:.{digits}f}' if z < 1e6 else f'{z:.2e}' for z in figures)


def table(args):
    """Prints evaluations or runs as Markdown; --out has their figures, in one file."""
    def parse(text):                                 # by name, figures and row of each seed
        found = json.loads(text, object_hook=lambda d: {
            k: math.nan if v is None else v for k, v in d.items()})
        return {name: [(f, row_of(f)) for f in seeds] for name, seeds in found['results'].items()}

    rows, results = {}, {}                           # of each seed, by name
    for name, path in names(args.table):
        if Path(path).suffix == '.json':
            found = read(path, parse, 'results', 'give what --evaluate wrote')
        else:
            runs = [{k: value for record in run for k, value in record.items()
                     if k in ('iter', 'dev', 'longest_run', 'collapsed')}    # the last of each
                    for run in read_runs(path)]
            found = {name: [({'run': run}, row_of_run(run)) for run in runs]}
        for label, seeds in found.items():
            results.setdefault(label, []).extend(figures for figures, _ in seeds)
            rows.setdefault(label, []).extend(row for _, row in seeds)
    if args.out:
        write_json(Path(args.out), {'results': results})
    columns = list(dict.fromkeys(h for seeds in rows.values() for row in seeds for h in row))
    print('| ' + ' | '.join(['', *columns]) + ' |\n|' + '---|' * (1 + len(columns)))
    for label, seeds in rows.items():
        cells = [cell(h, [row.get(h, np.nan) for row in seeds]) for h in columns]
        print('| ' + ' | '.join([in_cell(label), *cells]) + ' |')


def panels(figures, warm):
    """Titles of curves, by all figures of evaluations, with the key of a record or, after dev, of
    its evaluation."""
    names, called = data.metrics_of(figures), headers(figures)
    found = {f'{called[key].removesuffix(" %")} (%)': f'dev {key}' for key in called
             if key.removeprefix('sample_') in names or warm and not key.startswith('sample_')}
    if warm:
        return {'loss on dev (nats/token)': 'dev loss', **found}
    return found | {
        'distinct-2 of samples': 'dev distinct2', 'reward on dev (mean margin)': 'dev reward',
        'discriminator loss (nats)': 'd_loss', 'pairs told apart, in training': 'd_acc_mean',
        'pairs told apart, on dev': 'dev d_acc', 'KL from warm start (nats/token)': 'kl'}


STYLES = '-', '--', ':', '-.'        # of as many runs as there are colours, each
COLOURS = '#4c8dd6 #e0823d #3fa66a #b565c9 #d1555b #8f8a2f #30a5b5 #9a7b5f #d66fa6'.split()


def windows(records, number, key):
    """Numbers, of iterations or of steps of the warm start, at which a run has a value of a key of
    `panels`, and the values, as means of at most 60 windows."""
    flat = [r | {f'dev {k}': v for k, v in r.get('dev', {}).items()} for r in records]
    points = [(r[number], r[key]) for r in flat if number in r and r.get(key) is not None]
    size = max(1, -(-len(points) // 60))
    return np.reshape([np.mean(points[k:k + size], 0) for k in range(0, len(points), size)],
                      (-1, 2)).T


def draw(groups, out):
    """A PNG of runs, lists of records, by name; those of a name look alike. Of iterations, with a
    dotted line where the generator begins to move; of the warm starts if there is no other yet.
    A dashed line is chance: what a discriminator that knows nothing has."""
    from matplotlib.figure import Figure             # here, for it takes half a second
    looks = [(style, hue) for style in STYLES for hue in COLOURS]
    every = [r for runs in groups.values() for run in runs for r in run]
    warm = any('sft_iter' in r for r in every) and not any(r.get('iter') for r in every)
    number, axis = ('sft_iter', 'MLE step') if warm else ('iter', 'iteration')
    kinds = {r['config'].get('d_loss') for r in every if 'config' in r}
    chance = {'dev d_acc': [.5], 'd_acc_mean': [.5],
              'd_loss': [math.log(2) * (1 + (kind == 'minimax')) for kind in kinds]}
    shown = []                                       # title, lines at chance, curves of each group
    figures = {k: 0 for r in every for k in r.get('dev', {})}
    for title, key in panels(figures, warm).items():
        curves = [[windows(run, number, key) for run in runs] for runs in groups.values()]
        if any(curve.size for runs in curves for curve in runs):
            shown.append((title, chance.get(key, []), curves))
    rows, grey = max(2, -(-len(shown) // 5)), '#858c95'
    figure = Figure((18, 3.1 * rows), facecolor='none')
    axes = figure.subplots(rows, 5, sharex=True)
    # by hand, for a layout that measures takes most of a picture's two seconds
    below = (.2 + .09 * -(-len(groups) // 6)) / rows
    figure.subplots_adjust(.03, below, .99, 1 - .12 / rows, .17, .3)
    for ax in axes.flat[len(shown):]:
        ax.set_visible(False)
    for i, (ax, (title, levels, curves)) in enumerate(zip(axes.flat, shown)):
        for (style, hue), (name, runs), of in zip(looks * len(groups), groups.items(), curves):
            label = ' ' + name.replace('$', r'\$')       # with a _ first it would not be shown
            for records, (at, values) in zip(runs, of):
                ax.plot(at, values, color=hue, ls=style, lw=1.4, ms=5, label=label,
                        marker='o' * (len(at) == 1))
                label = '_'
                begin = next((r['iter'] for r in records if 'kl' in r), 0)
                if begin and len(at):
                    ax.axvline(begin, color=hue, lw=1, ls=':')
        for level in levels:
            ax.axhline(level, color=grey, lw=1, ls='--')
        ax.set_title(title, color=grey, fontsize=11)
        ax.set_xlabel(axis * (i + 5 >= len(shown)), color=grey, fontsize=9)    # the last below
        ax.set_facecolor('none')
        ax.tick_params(colors=grey, labelsize=9, labelbottom=True)
        ax.spines[:].set_color(grey)
        ax.grid(color=grey, alpha=.25)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc='lower center', frameon=False,
                  ncols=min(len(groups), 6), labelcolor=grey, fontsize=11)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)


def plot(args):
    """Draws the curves of runs into one PNG."""
    groups = {}
    for name, path in names(args.plot):
        groups.setdefault(name, []).extend(read_runs(path))
    prompts = {str(r['dev_rows']) for runs in groups.values() for run in runs for r in run
               if 'dev_rows' in r}
    if len(prompts) > 1:
        print('these runs were evaluated on different dev prompts', file=sys.stderr)
    out = Path(args.out or 'out/curves.png')
    try:
        draw(groups, out)
    except (ValueError, RuntimeError) as e:          # of matplotlib: a format, a font
        raise ValueError(f'{out} could not be drawn: {" ".join(str(e).split())}') from e
    print(f'written: {out}')


FLAGS = {  # as argparse takes them
    'question': dict(help='with --ckpt'),
    'context': dict(help='the passage that the answer to --question is in'),
    'samples': dict(type=int, default=1, help='answers, with --ckpt'),
    'prompts': dict(type=int, help='dev prompts: 10 to compare, 4000 to evaluate'),
    'out': dict(type=expanduser, help='file to write (out/evaluation.json, with the answers in a '
                                      '.jsonl beside it; out/curves.png)'),
    'data': dict(type=expanduser, help='as in training; by default as the checkpoint says'),
    'temperature': dict(type=float, nargs='+', help='0: greedy; by default as in training'),
    'top_k': dict(type=int, help='sample among so many tokens; by default among all'),
    'seed': dict(type=int, default=1, help='of the sampling noise'),
    'batch_size': dict(type=int, default=64, help='prompts at a time, those learned from included'),
    'micro_batch': dict(type=int, default=0, help='prompts of one backward pass, as in training'),
    'base': dict(type=expanduser, help='what judges and KL start from; else the first file'),
    'test_steps': dict(type=int, default=400, help='of a fresh discriminator; 0 for none'),
    'test_lr': dict(type=float, help='its learning rate, .064 / n_embd'),
    'best_of': dict(type=int, help='to --evaluate so many samples that --discriminator ranks, too'),
    'discriminator': dict(type=expanduser, help='a run, whose discriminator chooses'),
    'dtype': dict(choices=['auto', 'bfloat16', 'float32'], default='auto', help='of activations'),
    'device': dict(default='auto', help='cuda, cuda:1, mps or cpu; auto takes the first there is')}
LEAST = {'seed': 0, 'micro_batch': 0, 'test_steps': 0, 'test_lr': 1e-9, 'temperature': .01}  # or 1


@command_line()
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = {'ckpt': ask, 'compare': compare, 'evaluate': evaluate, 'table': table, 'plot': plot}
    what = parser.add_mutually_exclusive_group(required=True)
    for name, run in modes.items():
        several = {'type': expanduser} if name == 'ckpt' else {'nargs': '+'}
        what.add_argument(f'--{name}', metavar='FILE', help=run.__doc__, **several)
    for name, flag in FLAGS.items():
        default = ' (default: %(default)s)' if 'default' in flag else ''
        parser.add_argument(f'--{name}', **flag | {'help': flag['help'] + default})
    args = parser.parse_args(argv)
    mode = next(name for name in modes if getattr(args, name) is not None)
    temperatures = args.temperature or [1.0]
    if mode == 'ckpt' and not (args.question or '').strip():
        parser.error('--ckpt needs a --question')
    if (args.best_of is None) != (args.discriminator is None) or args.best_of and (
            mode != 'evaluate' or 0 in temperatures):
        parser.error('--best_of goes with --discriminator, --evaluate and a --temperature above 0')
    if len({*temperatures}) < len(temperatures) or temperatures[1:] and mode != 'evaluate':
        parser.error(f'--temperature {temperatures}: give one, or several once each to --evaluate')
    for name, value in [*vars(args).items(), *(('temperature', t) for t in temperatures if t)]:
        if isinstance(value, (int, float)) and not LEAST.get(name, 1) <= value < 2 ** 32:
            zero = '0, or ' if name == 'temperature' else ''
            parser.error(f'--{name} {value}: give {zero}at least {LEAST.get(name, 1)}, below 2^32')
    args.prompts, args.compile = args.prompts or (4000 if mode == 'evaluate' else 10), False
    if mode not in ('table', 'plot'):
        open_device(args)
    modes[mode](args)


if __name__ == '__main__':
    main()
