"""
What RESULTS.md shows of toy-ways beyond `sample.py --evaluate`, as rows for `sample.py --table`.

$ export PYTHONPATH=.
$ python assets/ways.py grid OUT.json JUDGED.json ...       a row a name, a column a temperature
$ python assets/ways.py kinds OUT.json BASE NAME=FILE ...   by kind of prompt
$ python assets/ways.py force OUT.json NAME=FILE ...        the first word given
$ python assets/ways.py learn OUT_DIR SEED T FILE           MLE on the answers of FILE at T; for T 8
                                                            on its discriminator's choices of 8
$ python assets/ways.py shrink OUT.pt FILE.pt               of the same function, smaller weights
"""

import argparse
import collections
import json
import sys
from pathlib import Path

import numpy as np
import torch

import data
import model
import reinforce
import sample

ARGS = argparse.Namespace(device='cpu', dtype='float32', seed=1, top_k=None, batch_size=64,
                          micro_batch=64, test_steps=300, test_lr=2e-3, d_dropout=0.0)
P, R = reinforce.TINY['max_prompt'], reinforce.TINY['max_response']
ENC = data.load_tokenizer('toy-ways')


def split_of(name, n, kind=None, more=0):
    """n examples as a Split, of all prompts or of those that do (True) or do not begin with `one`;
    `more` columns of the prompt are the answer's."""
    examples = [e for e in data.load_examples('toy-ways', name, n)
                if kind in (None, e['question'].startswith('one '))]
    return data.Split(examples, ENC, P + more, R - more)


def is_bound(text, example):
    return text.split()[:1] == ['any' if example['question'].startswith('one ') else 'as']


def row(generator, base, split):
    """Figures of one sample to each prompt at temperature 1."""
    response, mask = sample.answer(generator, split, 1.0, ARGS)
    texts = data.to_text(response, mask, ENC)
    pairs = list(zip(texts, split.examples))
    right = np.array([data.score_answer(*pair)['em'] for pair in pairs])
    bound = np.array([is_bound(*pair) for pair in pairs])
    links = collections.Counter(w for t, b in zip(texts, bound) if b for w in t.split()[2::2]
                                if w in data.LINKS)
    share = np.array([*links.values()]) / max(1, links.total())
    found = sample.told_apart(base, split, response, mask, ARGS)
    return {'right': 100 * right.mean(), 'bound': 100 * bound.mean(),
            'right if bound': 100 * right[bound].mean() if bound.any() else np.nan,
            'right if free': 100 * right[~bound].mean() if (~bound).any() else np.nan,
            'link words': np.exp(-(share * np.log(share)).sum()), 'length': mask.sum(1).float()
            .mean().item(), 'told apart %': 100 * found['accuracy']}


def kinds(base, *named):
    """Rows of networks, by whether `one` stands before."""
    base = model.GPT.from_pretrained(base)
    for (name, file), (one, kind) in ((pair, kind) for pair in sample.names(named) for kind in
                                      ((False, 'without'), (True, 'after'))):
        yield f'{name}, {kind} `one`', row(model.GPT.from_pretrained(file), base,
                                           split_of('dev', 4000, one))


def force(*named):
    """Right in % where the first word of every answer is given: one for all prompts, or the bound
    way's."""
    for name, file in sample.names(named):
        generator, found = model.GPT.from_pretrained(file), {}
        for words in 'as as', 'any any', 'as any':
            rights = []
            for one, word in zip((False, True), words.split()):
                split = split_of('dev', 4000, one, more=1)
                split.prompts = np.roll(split.prompts, -1, 1)
                split.prompts[:, -1], = ENC.encode_ordinary(f' {word}')
                split.pads -= 1
                texts = data.to_text(*sample.answer(generator, split, 1.0, ARGS), ENC)
                rights += [data.score_answer(f'{word} {text}', e)['em']
                           for text, e in zip(texts, split.examples)]
            found[words] = 100 * np.mean(rights)
        yield name, {'`as` to all': found['as as'], '`any` to all': found['any any'],
                     'the bound way\'s': found['as any']}


def grid(*files):
    """Rows by name, a column for each temperature, of right samples in %."""
    rows = collections.defaultdict(lambda: collections.defaultdict(dict))
    for file in files:
        for label, seeds in json.loads(Path(file).read_text())['results'].items():
            for i, figures in enumerate(seeds):
                rows[label.split(', T ')[0]][file, i][f'T {figures["temperature"]:g}'] = figures[
                    'sample_em']
    for name, runs in rows.items():
        for figures in runs.values():
            yield name, figures


def learn(out, seed, how, file):
    """MLE of a new generator, 12,000 steps, on answers of a network to the training prompts: its
    own at a temperature; or, for 8, those of 8 at temperature 1 that its discriminator chooses."""
    generator, train_set = model.GPT.from_pretrained(file), split_of('train', None)
    n = 8 if how == '8' else 1
    ids = sample.answer(generator, train_set, 1.0 if n == 8 else float(how), ARGS, n)
    texts = data.to_text(*ids, ENC)
    if n == 8:
        network = model.load_discriminator(ARGS, None, model.load_checkpoint(file))
        groups = np.array_split(np.arange(len(train_set)), 2000)
        with torch.no_grad():
            scores = sample.scores_of(network, train_set, groups,
                                      *(z.unflatten(0, (-1, n)) for z in ids), ARGS)[..., -1]
        texts = [texts[n * i + k] for i, k in enumerate(scores.argmax(1).tolist())]
    make = data.ways_examples
    data.ways_examples = lambda split, size: make(split, size) if split == 'dev' else [
        {**e, 'answers': [text or data.UNANSWERABLE]} for e, text in zip(make(split, size), texts)]
    better = sample.better           # it ends as its last network: dev's gold answers are others
    sample.better = lambda best, *more: better(None, *more)
    flags = ['--tiny', '--seed', seed, '--sft_iters', '12000', '--iters', '0', '--eval_interval',
             '2000', '--out_dir', out]
    reinforce.train(model.parse(flags, reinforce.__doc__, reinforce.Config, reinforce.TINY,
                                reinforce.BOUNDS, reinforce.check))


def shrink(out, file):
    """The network of a file with what its layer norms read scaled down, which they undo, until its
    embeddings are as small as a fresh one's."""
    saved = model.load_checkpoint(file)
    weights = saved['model']
    scale = .3 / weights['wte.weight'].std()
    for name in weights:
        if name in ('wte.weight', 'wpe.weight') or 'c_proj' in name:
            weights[name] = weights[name] * scale
    model.save_checkpoint(out, {'model': weights, 'gpt_config': saved['gpt_config']})


if __name__ == '__main__':
    what, out, *rest = sys.argv[1:]
    if what in ('learn', 'shrink'):
        {'learn': learn, 'shrink': shrink}[what](out, *rest)
    else:
        results = {}
        for name, figures in {'kinds': kinds, 'force': force, 'grid': grid}[what](*rest):
            results.setdefault(name, []).append({'row': figures})
        sample.write_json(Path(out), {'results': results})
