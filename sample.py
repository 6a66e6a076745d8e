"""
Looking at the result, and judging it.

$ python sample.py --ckpt out/reinforce/ckpt.pt --question "Who built it?" --context "Ada built it."
$ python sample.py --compare gpt2 out/reinforce/sft.pt out/reinforce/ckpt.pt
$ python sample.py --evaluate sft=out/ppo/sft.pt PPO=out/ppo/ckpt.pt --out out/ppo.json
$ python sample.py --plot PPO=out/ppo-1 PPO=out/ppo-2          or --table, of those or of .json

Wherever several files are given, each may be named: NAME=FILE; files of one name are the seeds of
one thing. A run is its folder or its metrics.jsonl.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from model import (GPT, Discriminator, autocast, hold_last, keep_freed_memory, load_checkpoint,
                   memory_full, open_device)

JUDGES, PAIRS = 3, 200           # fresh discriminators to a figure; fewer pairs are not judged
DEFAULTS = dict(data='squad_v2', context=True, max_prompt=256, max_response=32, temperature=1.0)

# -----------------------------------------------------------------------------
# checkpoints, runs and their names


def task_of(sources, args, examples=None):
    """
    The tokenizer, a Split of --prompts dev examples, or of those given, and the settings, as our
    .pt files among sources were trained, which have to agree; DEFAULTS if there is none. --data
    and --temperature win; the latter is set if it was not given. Reads all sources, so that a
    mistake in the last does not cost what the first took.
    """
    settings, first, sizes = None, None, {}
    given = {k: v for k, v in (('data', args.data), ('temperature', args.temperature)) if v}
    for source in dict.fromkeys(sources):
        sizes[source] = GPT.from_pretrained(source).config
        trained = Path(source).suffix == '.pt' and load_checkpoint(source).get('settings')
        if not trained:                              # not of ours
            continue
        own = {name: trained.get(name, value) for name, value in DEFAULTS.items()} | given
        settings, first = settings or own, first or source
        for name in own:
            if own[name] != settings[name]:
                raise ValueError(
                    f'{source} was trained with {name} {own[name]}, {first} with {settings[name]}: '
                    + (f'give --{name}' if name in ('data', 'temperature') else 'take one of them'))
    settings = settings or DEFAULTS | given
    args.temperature = args.temperature or [settings['temperature']]
    enc = data.load_tokenizer(settings['data'])
    for source, config in sizes.items():
        if config.vocab_size != enc.n_vocab:
            raise ValueError(f'{source} has a vocabulary of {config.vocab_size}, --data '
                             f'{settings["data"]} one of {enc.n_vocab}: give a matching pair')
        if not first:                                # a short one has short prompts and answers
            settings['max_response'] = min(settings['max_response'], config.block_size // 4)
            settings['max_prompt'] = min(settings['max_prompt'],
                                         config.block_size - settings['max_response'])
        elif config.block_size < settings['max_prompt'] + settings['max_response']:
            raise ValueError(f'{source} takes {config.block_size} tokens, the prompts and answers '
                             f'of {first} have more: take one of them')
    if examples is None:
        examples = data.load_examples(settings['data'], 'dev', args.prompts)
    else:
        settings['context'] = args.context is not None
    split = data.Split(examples, enc, settings['max_prompt'], settings['max_response'],
                       settings['context'])
    if split.cut_prompts:
        print(f'{split.cut_prompts} of {len(split)} prompts cut to {settings["max_prompt"]} tokens '
              'from the left', file=sys.stderr)
    return enc, split, settings


def load(source, args):
    """A GPT from whatever `from_pretrained` takes, on the device."""
    return GPT.from_pretrained(source).to(args.device).eval()


def names(arguments):
    """(name, file) pairs of NAME=FILE arguments; a FILE, also one with = in it, is its own name."""
    pairs = []
    for a in arguments:
        name, _, file = a.partition('=')
        named = file and not Path(a).exists() and (Path(file).exists() or '/' not in name)
        pairs.append((name, file) if named else (a, a))
    return pairs


def read_run(path):
    """The records of a run, its header first, from its folder or its metrics.jsonl; half a record
    at the end, of a run that writes or was killed, is left out."""
    path = Path(path)
    file = path if path.suffix == '.jsonl' else path / 'metrics.jsonl'
    try:
        lines = file.read_text(encoding='utf-8-sig').split('\n')[:-1]
        records = [dict(json.loads(line)) for line in lines if line]
        records[0]['config']
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f'{file} not found: give the out_dir of a run') from None
    except (ValueError, IndexError, KeyError, TypeError) as e:
        raise ValueError(f'{file} holds no metrics: give the out_dir of a run') from e
    return records


# -----------------------------------------------------------------------------
# looking


def batches(split, size):
    """Example numbers of a split in batches of one size, which graphs and kept caches want; the
    last goes on with the first examples, so cut what comes of them to len(split)."""
    n = min(size, len(split))
    return np.resize(np.arange(len(split)), (-(-len(split) // n), n))


@torch.no_grad()
def answer(generator, split, temperature, args):
    """One sampled response to each example of a split, as ids (N, R) and mask (N, R)."""
    rng, parts = torch.Generator(args.device).manual_seed(args.seed), []
    for rows in batches(split, args.batch_size):
        batch = split.batch(rows, args.device)
        with autocast(args):
            roll = generator.generate(batch.prompt, batch.pad, split.responses.shape[1], split.eos,
                                      temperature=temperature, top_k=args.top_k, rng=rng)
        parts.append((roll.response[:, 0], roll.mask[:, 0]))
    return [torch.cat(z)[:len(split)] for z in zip(*parts)]


def ask(args):
    """Answers args.question with args.ckpt."""
    example = {'question': args.question, 'context': args.context or '', 'answers': []}
    enc, split, _ = task_of([args.ckpt], args, [example] * args.samples)
    ids = answer(load(args.ckpt, args), split, args.temperature[0], args)
    print('\n'.join(data.to_text(*ids, enc)))


def compare(args):
    """Prints the answers of all checkpoints to the same dev prompts."""
    named = names(args.compare)
    enc, split, _ = task_of([source for _, source in named], args)
    texts = [[e['question'] for e in split.examples],
             [' | '.join(dict.fromkeys(e['answers'])) or data.UNANSWERABLE for e in split.examples]]
    for _, source in named:
        ids = answer(load(source, args), split, args.temperature[0], args)
        texts.append(data.to_text(*ids, enc))
    heads = ['question', 'gold', *(name for name, _ in named)]
    width = max(map(len, heads))
    for row in zip(*texts):
        print('\n'.join(f'{head:{width}}  {text}' for head, text in zip(heads, row)) + '\n')


# -----------------------------------------------------------------------------
# what a script shows of its own run


@torch.no_grad()
def evaluate_run(generator, discriminator, split, enc, cfg):
    """
    Figures of a generator on a split, and its sampled answers.

    em and f1 are of greedy answers, in percent (has_ and no_: of answerable and unanswerable
    questions); sample_f1, reward (mean score in logits), d_acc (share of pairs told apart, a tie
    counting half), length (tokens with eos) and distinct2 of one sample of each prompt, drawn as
    in a rollout.
    """
    rng = torch.Generator(cfg.device).manual_seed(0)        # the same noise at every evaluation
    N, greedy, sampled, kept = len(split), [], [], []
    for rows in batches(split, cfg.micro_batch * cfg.samples):
        batch = split.batch(rows, cfg.device)
        with autocast(cfg):
            for temperature, answers in (0, greedy), (cfg.temperature, sampled):
                response, mask, _ = generator.generate(
                    batch.prompt, batch.pad, cfg.max_response, split.eos,
                    temperature=temperature, rng=rng)                        # (n, 1, R)
                answers += data.to_text(response[:, 0], mask[:, 0], enc)
            pair = torch.cat((batch.response[:, None], response), 1)         # (n, 2, R)
            scores = hold_last(discriminator(batch.prompt, batch.pad, pair),
                               torch.cat((batch.mask[:, None], mask), 1))[..., -1]
        # by the tokens: in one row, scores of equal answers differ by rounding
        tie = (pair[:, 0] == pair[:, 1]).all(-1)
        right = torch.where(tie, .5, ((scores[:, 0] - scores[:, 1]).sign() + 1) / 2)
        kept.append((response[:, 0], mask[:, 0], scores[:, 1], right))
    response, mask, fake, right = (torch.cat(z)[:N] for z in zip(*kept))
    greedy, sampled = greedy[:N], sampled[:N]
    figures = data.score_answers(greedy, split.examples)
    figures |= {'sample_f1': data.score_answers(sampled, split.examples)['f1'],
                'reward': fake.mean().item(), 'd_acc': right.mean().item(),
                'length': mask.sum(1).float().mean().item(),
                'distinct2': data.distinct(response, mask, 2)}
    return figures, sampled


def finish(networks, discriminator, split, enc, out, cfg):
    """Evaluates networks by name, the last of a run, on a split, prints their table, writes one
    sample of each to out/samples.txt; returns the figures by name."""
    rows = {name: evaluate_run(network, discriminator, split, enc, cfg)
            for name, network in networks.items()}
    blocks = []
    for example, *answers in list(zip(split.examples, *(texts for _, texts in rows.values())))[:20]:
        lines = [f'question    {example["question"]}',
                 f'gold        {" | ".join(example["answers"]) or data.UNANSWERABLE}']
        lines += [f'{name:12}{text}' for name, text in zip(rows, answers)]
        blocks.append('\n'.join(lines))
    (out / 'samples.txt').write_text('\n\n'.join(blocks) + '\n', encoding='utf-8')
    columns = {'em': 'EM', 'f1': 'F1', 'sample_f1': 'F1 sampled', 'reward': 'reward',
               'd_acc': 'd_acc', 'length': 'length', 'distinct2': 'distinct-2'}
    print(' ' * 12 + ''.join(f'{title:>12}' for title in columns.values()))
    for name, (figures, _) in rows.items():
        print(f'{name:12}' + ''.join(f'{figures[key]:12.3f}' for key in columns), flush=True)
    return {name: figures for name, (figures, _) in rows.items()}


# -----------------------------------------------------------------------------
# judging


def interval(right, passages):
    """95% interval of the mean of right (n,), each of a passage, by its number: bootstrap over the
    passages (Efron 1979), for trials on one passage are not independent. What another training of
    the judges would change is not in it."""
    sums, counts = np.bincount(passages, right), np.bincount(passages)
    sums, counts, rng = sums[counts > 0], counts[counts > 0], np.random.default_rng(0)
    drawn = [rng.integers(len(sums), size=len(sums)) for _ in range(2000)]
    return np.quantile([sums[d].sum() / counts[d].sum() for d in drawn], (.025, .975)).tolist()


def passages_of(examples):
    """The number of each example's passage, (N,)."""
    number = {}
    return np.array([number.setdefault(e['context'], len(number)) for e in examples])


def halves(passages, seed):
    """Numbers of the examples of either half; no passage (N,), so no prompt, is in both."""
    n = passages.max() + 1
    if n < 2:
        raise ValueError(f'--prompts {len(passages)} share one passage: give more')
    side = np.random.default_rng(seed).permutation(n) % 2
    return [np.flatnonzero(side[passages] == half) for half in (0, 1)]


def fresh_discriminator(trunk, split, fake, fake_mask, seed, args):
    """
    Whether a new discriminator is right about pairs of a gold and a sampled answer to prompts that
    it has not seen.

    trunk            a GPT that its weights start from
    fake, fake_mask  (N, R) a response to each example of the split; equal answers are left out
    seed             a tuple of int: of the halves of the passages, the order of the pairs, dropout
    returns          numbers of the examples judged (n,); right (n,), 1, 0, or .5 for equal scores
    """
    gold = split.batch(range(len(split)), args.device)
    differ = (gold.response != fake).cumsum(1) > 0                           # (N, R)
    where, untied = differ & (gold.mask | fake_mask), differ[:, -1].cpu().numpy()
    learn, judge = (rows[untied[rows]] for rows in halves(passages_of(split.examples), seed))
    if not len(learn) or not len(judge):
        raise ValueError(f'all {untied.sum()} answers that differ are on one half of the passages: '
                         'give more --prompts')
    torch.manual_seed(hash(seed) % 2 ** 31)
    network = Discriminator(trunk, dropout=.1).to(args.device)
    lr, steps = args.test_lr or .064 / trunk.config.n_embd, args.test_steps
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=.01)

    def margins(rows):
        """Score of the gold answer over the sampled one's at every column, (n, R)."""
        b, sampled, sampled_mask = split.batch(rows, args.device), fake[rows], fake_mask[rows]
        with autocast(args):
            scores = hold_last(network(b.prompt, b.pad, torch.stack((b.response, sampled), 1)),
                               torch.stack((b.mask, sampled_mask), 1))       # (n, 2, R)
        return scores[:, 0] - scores[:, 1]

    network.train()
    for step in tqdm(range(steps), 'fresh discriminator', disable=None, leave=False):
        rows = learn[data.order(len(learn), min(args.batch_size, len(learn)), seed, step)]
        for part in np.array_split(rows, -(-len(rows) // args.micro_batch)):
            loss = F.softplus(-margins(part)) * where[part]
            (loss.sum() / where[rows].sum()).backward()      # each prefix the same, as in training
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.param_groups[0]['lr'] = lr * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    with torch.no_grad():
        ends = torch.cat([margins(rows)[:, -1] for rows in
                          np.array_split(judge, -(-len(judge) // args.batch_size))])
    if not ends.isfinite().all():
        raise ValueError('a fresh discriminator diverged: give a lower --test_lr')
    return judge, (ends.sign().cpu().numpy() + 1) / 2


def told_apart(trunk, split, fake, fake_mask, args):
    """
    The classifier two-sample test of Lopez-Paz and Oquab 2017, of JUDGES fresh discriminators, each
    with halves of its own: how many pairs they tell; 50% cannot be told apart.

    returns  dict: accuracy, of all judgements; low, high (its 95% interval); judges (the accuracy
             of each), shares, not percent; pairs, ties (of the whole split: answers that
             differ, that do not). With fewer than PAIRS pairs or no steps, judges is empty, and
             the interval is all of it
    """
    ties = int((split.batch(range(len(split))).response == fake.cpu()).all(1).sum())
    figures = {'accuracy': .5, 'low': 0., 'high': 1., 'judges': [], 'pairs': len(split) - ties,
               'ties': ties}
    if figures['pairs'] < PAIRS or not args.test_steps:
        return figures
    found = [fresh_discriminator(trunk, split, fake, fake_mask, (args.seed, k), args)
             for k in range(JUDGES)]
    rows, right = (np.concatenate(z) for z in zip(*found))
    figures |= {'accuracy': right.mean().item(), 'judges': [r.mean().item() for _, r in found]}
    figures['low'], figures['high'] = interval(right, passages_of(split.examples)[rows])
    return figures


@torch.no_grad()
def drift(generator, base, split, temperature, args):
    """Nats per token: KL(generator || base) at the temperature, over the whole vocabulary, as a run
    logs it, but exact at each token of samples; -log probability, at 1, of the gold answers."""
    temperature = temperature or 1.0                 # greedy answers have none
    rng, sums = torch.Generator(args.device).manual_seed(args.seed), []
    for rows in batches(split, args.batch_size):
        batch = split.batch(rows, args.device)
        with autocast(args):
            roll = generator.generate(batch.prompt, batch.pad, batch.response.size(1), split.eos,
                                      temperature=temperature, rng=rng)
            logp, base_logp = (                                              # (n, 1, R, V)
                g.head(g.response_hidden(batch.prompt, batch.pad, roll.response) / temperature)
                .log_softmax(-1) for g in (generator, base))
            logprobs, _ = generator.response_logprobs(batch.prompt, batch.pad,
                                                      batch.response[:, None])
        kl = (logp.exp() * (logp - base_logp)).sum(-1) * roll.mask           # (n, 1, R)
        sums.append([z.flatten(1).sum(1).cpu() for z in
                     (kl, roll.mask, -logprobs[:, 0] * batch.mask, batch.mask)])
    kl, tokens, nll, gold_tokens = (torch.cat(z)[:len(split)].double().sum().item()
                                  for z in zip(*sums))
    return kl / tokens, nll / gold_tokens


@torch.no_grad()
def best_of(generator, discriminator, split, enc, temperature, args):
    """EM and F1 in percent of one of args.best_of samples to each prompt: the one with the highest
    score, any one (their mean), and the best there is. It says whether a discriminator knows what
    the generator does not."""
    rng = torch.Generator(args.device).manual_seed(args.seed)
    n, scores, found = args.best_of, [], []
    for rows in batches(split, max(1, args.batch_size // n)):
        batch = split.batch(rows, args.device)
        with autocast(args):
            roll = generator.generate(batch.prompt, batch.pad, split.responses.shape[1], split.eos,
                                      n, temperature, args.top_k, rng)
            scores.append(hold_last(discriminator(batch.prompt, batch.pad, roll.response),
                                    roll.mask)[..., -1].cpu())               # (b, n)
        texts = data.to_text(roll.response.flatten(0, 1), roll.mask.flatten(0, 1), enc)
        found += [data.score_answer(text, split.examples[i])
                  for text, i in zip(texts, np.repeat(rows, n))]
    found = 100 * np.array(found).reshape(-1, n, 2)[:len(split)]             # EM and F1
    chosen = torch.cat(scores)[:len(split)].argmax(1).numpy()
    means = {'chosen': found[np.arange(len(split)), chosen], 'any': found.mean(1),
             'possible': found.max(1)}
    return {'n': n} | {name: dict(zip(('em', 'f1'), z.mean(0).tolist()))
                       for name, z in means.items()}


def judge(generator, base, discriminator, split, enc, temperature, args):
    """All figures of one checkpoint at one temperature, as a dict; the table's are percent. With a
    discriminator, those of `best_of` too."""
    greedy = data.to_text(*answer(generator, split, 0, args), enc)
    response, mask = answer(generator, split, temperature, args)
    figures = data.score_answers(greedy, split.examples)
    figures['sample_f1'] = data.score_answers(data.to_text(response, mask, enc),
                                              split.examples)['f1']
    figures['fresh'] = told_apart(base, split, response, mask, args)
    figures['distinct2'] = data.distinct(response, mask, 2)
    figures['length'] = mask.sum(1).float().mean().item()
    shares = [np.bincount(n, minlength=response.size(1) + 1) / len(split)
              for n in (mask.sum(1).cpu().numpy(), split.lengths)]
    figures['length_distance'] = float(np.abs(shares[0] - shares[1]).sum() / 2)
    figures['kl'], nll = drift(generator, base, split, temperature, args)
    figures['perplexity'] = math.exp(nll)
    if discriminator is not None:
        figures['best_of'] = best_of(generator, discriminator, split, enc, temperature, args)
    return figures


def accuracy(figures):
    """Of the fresh discriminators, a share; NaN where none judged."""
    return figures['fresh']['accuracy'] if figures['fresh'].get('judges', True) else math.nan


COLUMNS = {  # header: format, value of the figures
    'EM': ('.1f', lambda f: f['em']), 'F1': ('.1f', lambda f: f['f1']),
    'F1 sampled': ('.1f', lambda f: f['sample_f1']),
    'told apart %': ('.1f', lambda f: 100 * accuracy(f)),
    'of all %': ('.1f', lambda f: 100 * accuracy(f) + 100 * f['fresh']['ties'] / f['prompts']
                 * (.5 - accuracy(f))),                                      # a tie counts half
    'ties %': ('.1f', lambda f: 100 * f['fresh']['ties'] / f['prompts']),
    'distinct-2': ('.3f', lambda f: f['distinct2']),
    'length dist.': ('.3f', lambda f: f['length_distance']),
    'KL': ('.3f', lambda f: f['kl']), 'perplexity': ('.2f', lambda f: f['perplexity'])}
BEST_OF = {  # the same, of --best_of: F1 of the sample that the discriminator chose, and beside it
    'F1 chosen': ('.1f', lambda f: f['best_of']['chosen']['f1']),
    'F1 of any': ('.1f', lambda f: f['best_of']['any']['f1']),
    'F1 possible': ('.1f', lambda f: f['best_of']['possible']['f1'])}


def columns_of(figures):
    """Columns of --table for the figures of --evaluate: format and value by header."""
    columns = COLUMNS | (BEST_OF if 'best_of' in figures else {})
    return {header: (spec, float(value(figures))) for header, (spec, value) in columns.items()}


def load_discriminator(path, args):
    """The discriminator of a run's ckpt.pt."""
    trunk, state = load(path, args), load_checkpoint(path).get('discriminator', {})
    if not state or not state['score.weight'].any():
        raise ValueError(f'--discriminator {path} holds none that has learned: give the ckpt.pt of '
                         'a run')
    discriminator = Discriminator(trunk)
    discriminator.load_state_dict(state)
    return discriminator.to(args.device).eval()


def evaluate(args):
    """Judges each checkpoint on held-out prompts: a table, and args.out with every figure."""
    named = names(args.evaluate)
    args.base = args.base or named[0][1]
    sources = [*(source for _, source in named), args.base]
    if args.best_of:
        sources.append(args.discriminator)
    enc, split, settings = task_of(sources, args)
    base, discriminator = load(args.base, args), None
    if args.best_of:
        discriminator = load_discriminator(args.discriminator, args)
    out = Path(args.out or 'out/evaluation.json')
    out.parent.mkdir(parents=True, exist_ok=True)
    open(out, 'a').close()                           # now, if it cannot be written
    setup = {'torch': torch.__version__, 'settings': settings} | {name: getattr(args, name) for name
             in 'device dtype base discriminator seed top_k test_steps test_lr batch_size'.split()}
    gold = split.batch(range(len(split)))
    print(f'{len(split)} prompts of {settings["data"]}; gold answers: distinct-2 '
          f'{data.distinct(gold.response, gold.mask, 2):.3f}, length {split.lengths.mean():.2f}; '
          f'fresh discriminators start from {args.base}, KL is from it, in nats per token')
    results = defaultdict(list)
    for name, source in named:
        generator = load(source, args)
        for temperature in args.temperature:
            f = judge(generator, base, discriminator, split, enc, temperature, args)
            f |= {'prompts': len(split), 'temperature': temperature, 'source': source}
            label = name if len(args.temperature) == 1 else f'{name}, T {temperature}'
            results[label].append(f)
            keep_freed_memory(False)
            print(f'\n{label}, at {temperature}: ' + ', '.join(
                f'{header} {value:{spec}}' for header, (spec, value) in columns_of(f).items()
                if not math.isnan(value)))
            print('  {pairs} pairs that differ, {ties} ties'.format(**f['fresh']) + (
                  '; told apart {accuracy:.1%} [{low:.1%}, {high:.1%}]'.format(**f['fresh'])
                  if f['fresh']['judges'] else f': none judged, for want of {PAIRS} or of steps'),
                  flush=True)
            out.write_text(json.dumps({'setup': setup, 'results': results}, indent=1) + '\n')


def read_results(path):
    """What --evaluate wrote: by name, figures and columns of each seed."""
    try:
        results = json.loads(Path(path).read_text(encoding='utf-8-sig'))['results']
        return {name: [(f, columns_of(f)) for f in seeds] for name, seeds in results.items()}
    except FileNotFoundError:
        raise FileNotFoundError(f'{path} not found: --evaluate writes it') from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
            RecursionError) as e:
        raise ValueError(f'{path} holds no results: give what --evaluate wrote') from e


def table(args):
    """Markdown of evaluations or of runs: mean and standard deviation (over n - 1) of what has one
    name, a dash for what one of them lacks. With --out, the evaluations in one file."""
    rows, judged = defaultdict(list), defaultdict(list)      # of each seed, by name
    for name, path in names(args.table):
        if Path(path).suffix != '.json':
            rows[name].append(last_figures(read_run(path)))
            continue
        for label, seeds in read_results(path).items():
            judged[label] += [figures for figures, _ in seeds]
            rows[label] += [columns for _, columns in seeds]
    if args.out and not judged:
        raise ValueError(f'--out {args.out} is for evaluations, .json files, and none is given')
    if args.out:
        Path(args.out).write_text(json.dumps({'results': judged}, indent=1) + '\n')

    def cell(found):
        (spec, first), values = found[0], [value for _, value in found]
        if isinstance(first, str):
            return ', '.join(dict.fromkeys(v for v in values if v)) or '–'
        if any(map(math.isnan, values)):
            return '–'
        spread = f' ± {np.std(values, ddof=1):{spec}}' if len(values) > 1 else ''
        return f'{np.mean(values):{spec}}{spread}'

    columns = list(dict.fromkeys(c for seeds in rows.values() for row in seeds for c in row))
    print('| ' + ' | '.join(['', *columns]) + ' |\n|' + '---|' * (1 + len(columns)))
    for label, seeds in rows.items():
        cells = [cell([row.get(c, ('', math.nan)) for row in seeds]) for c in columns]
        print('| ' + ' | '.join([label, *cells]) + ' |')


def last_figures(records):
    """Columns of --table for a run: its last evaluation, and whether it collapsed."""
    dev = next((r['dev'] for r in reversed(records) if 'dev' in r), {})
    last = next((r for r in reversed(records) if 'longest_run' in r), {})
    fall = next((r for r in records if 'collapsed' in r), {})
    return {'EM': ('.1f', dev.get('em', math.nan)), 'F1': ('.1f', dev.get('f1', math.nan)),
            'F1 sampled': ('.1f', dev.get('sample_f1', math.nan)),
            'distinct-2': ('.3f', dev.get('distinct2', math.nan)),
            'longest run': ('.1f', last.get('longest_run', math.nan)),
            'stopped at': ('', str(fall.get('iter', ''))),
            'answers like': ('', f'`{fall["collapsed"] or " "}`' if fall else '')}


# -----------------------------------------------------------------------------
# curves

PANELS = {  # title: value of a record, None where it has none
    'generator reward (mean score, logits)': lambda r: r.get('reward'),
    'discriminator loss (nats)': lambda r: r.get('d_loss'),
    'pairs told apart (running mean)': lambda r: r.get('d_acc_mean'),
    'KL from the warm start (nats/token)': lambda r: r.get('kl'),
    'F1 on dev (%)': lambda r: r.get('dev', {}).get('f1'),
    'F1 of sampled answers (%)': lambda r: r.get('dev', {}).get('sample_f1'),
    'distinct-2 of sampled answers': lambda r: r.get('dev', {}).get('distinct2'),
    'longest run of a token': lambda r: r.get('longest_run')}
COLOURS = '#4c8dd6 #e0823d #3fa66a #b565c9 #d1555b #8f8a2f #30a5b5 #9a7b5f #d66fa6'.split()


def curves(runs, value):
    """Iterations at which any of runs, lists of records, has a value, and the values there of all
    runs that reach so far: means of at most 60 windows, interpolated between them."""
    found = []
    for records in runs:
        points = [(r['iter'], value(r)) for r in records if 'iter' in r and value(r) is not None]
        width = max(1, -(-len(points) // 60))
        found.append([np.mean(points[k:k + width], 0) for k in range(0, len(points), width)])
    at = sorted({x for windows in found for x, _ in windows})
    return at, [[np.interp(x, *zip(*windows)) for windows in found
                 if windows and windows[0][0] <= x <= windows[-1][0]] for x in at]


def draw(groups, out):
    """A PNG of runs, lists of records, by name: the mean over those of a name, and their band."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    grey = '#858c95'                                 # reads on white and on black
    figure, axes = plt.subplots(2, 4, figsize=(15, 6.2), facecolor='none')
    for ax, (title, value) in zip(axes.flat, PANELS.items()):
        for colour, (name, runs) in zip(COLOURS * len(groups), groups.items()):
            at, values = curves(runs, value)
            ax.plot(at, [np.mean(v) for v in values], color=colour, linewidth=1.8,
                    label=name.replace('$', r'\$'))
            ax.fill_between(at, [min(v) for v in values], [max(v) for v in values], color=colour,
                            alpha=.2, linewidth=0)
        ax.set_title(title, color=grey, fontsize=11)
        ax.set_facecolor('none')
        ax.tick_params(colors=grey, labelsize=9)
        ax.spines[:].set_color(grey)
        ax.grid(color=grey, alpha=.25)
    lines = -(-len(groups) // 6)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='lower center', frameon=False,
                  ncols=min(len(groups), 6), labelcolor=grey, fontsize=11)
    # by hand: a layout engine would render the figure once more
    figure.subplots_adjust(.035, .07 + .05 * lines, .99, .94, .17, .28)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def plot(args):
    """One PNG of several runs; those of one name are its seeds."""
    groups = defaultdict(list)
    for name, path in names(args.plot):
        groups[name].append(read_run(path))
    draw(groups, Path(args.out or 'out/curves.png'))


FLAGS = {  # type, default, help
    'question': (str, None, 'with --ckpt'),
    'context': (str, None, 'the passage that the answer to --question is in'),
    'samples': (int, 1, 'answers, with --ckpt'),
    'prompts': (int, None, 'dev prompts: 10 to compare, 4000 to evaluate'),
    'out': (str, None, 'file to write (out/evaluation.json, out/curves.png)'),
    'data': (str, None, 'as in training; by default what the checkpoint says'),
    'top_k': (int, None, 'sample among so many tokens; by default among all'),
    'seed': (int, 1, 'of the sampling noise'),
    'batch_size': (int, 64, 'prompts at a time, those that are learned from included'),
    'micro_batch': (int, 16, 'prompts of one backward pass; lower it to save memory'),
    'base': (str, None, 'with --evaluate, what judges and KL start from; else the first file'),
    'test_steps': (int, 400, 'of a fresh discriminator, with --evaluate; 0 for none'),
    'test_lr': (float, None, 'its learning rate, .064 / n_embd'),
    'best_of': (int, None, 'with --evaluate, so many samples for --discriminator to choose from'),
    'discriminator': (str, None, 'the ckpt.pt of a run, whose discriminator chooses'),
    'device': (str, 'auto', 'cuda, cuda:1, mps or cpu; auto takes the first there is')}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--ckpt', help='to ask: gpt2, a .pt, .safetensors or .bin file, or a folder')
    what.add_argument('--compare', nargs='+', metavar='CKPT', help='to set side by side')
    what.add_argument('--evaluate', nargs='+', metavar='CKPT', help='to judge on held-out prompts')
    what.add_argument('--table', nargs='+', metavar='FILE', help='Markdown of evaluations or runs')
    what.add_argument('--plot', nargs='+', metavar='RUN', help='to draw the curves of')
    parser.add_argument('--temperature', type=float, nargs='+',
                        help='0 for greedy; several with --evaluate; by default what the files '
                        "were trained at (the poster's: .8, with --top_k 100)")
    parser.add_argument('--dtype', choices=['auto', 'bfloat16', 'float32'], default='auto',
                        help='of activations; auto: bfloat16 on CUDA (default: auto)')
    for name, (kind, default, note) in FLAGS.items():
        parser.add_argument(f'--{name}', type=kind, default=default,
                            help=note if default is None else f'{note} (default: {default})')
    args = parser.parse_args(argv, argparse.Namespace(compile=False))
    args.prompts = (4000 if args.evaluate else 10) if args.prompts is None else args.prompts
    if args.ckpt and not (args.question or '').strip():
        parser.error('--ckpt needs a --question')
    if (args.best_of is None) != (args.discriminator is None) or args.best_of and not args.evaluate:
        parser.error('--best_of goes with --discriminator and --evaluate: give all or none')
    if args.best_of and 0 in (args.temperature or []):
        parser.error('--best_of with --temperature 0: all answers would be one, give another')
    temperatures = args.temperature or [0]
    if len({*temperatures}) < len(temperatures) or temperatures[1:] and not args.evaluate:
        parser.error(f'--temperature {temperatures}: give one, or several once each to --evaluate')
    numbers = [(name, getattr(args, name)) for name in FLAGS]
    for name, value in numbers + [('temperature', t) for t in temperatures if t]:
        least = {'seed': 0, 'test_steps': 0, 'test_lr': 1e-9, 'temperature': .01}.get(name, 1)
        if isinstance(value, (int, float)) and not least <= value < 2 ** 63:
            zero = '0, or ' * (name == 'temperature')
            parser.error(f'--{name} {value}: give {zero}a number of at least {least}, below 2^63')
    if hasattr(sys.stdout, 'reconfigure'):           # what a console lacks is a question mark there
        sys.stdout.reconfigure(errors='replace')
    chosen = next(f for f in (compare, evaluate, table, plot, ask)
                  if f is ask or getattr(args, f.__name__))
    try:
        if chosen not in (table, plot):
            open_device(args)
        chosen(args)
    except (ValueError, OSError) as e:
        sys.exit(str(e))
    except torch.OutOfMemoryError:
        sys.exit(memory_full())


if __name__ == '__main__':
    main()
