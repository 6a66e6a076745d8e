"""
The task: SQuAD 2.0 (Rajpurkar et al. 2018) in, prompts and responses out, and the answers' metrics.

    prompt    [CONTEXT] {context}\n[QUESTION] {question}\n[ANSWER]
    response   {answer}<|endoftext|>, or  unanswerable<|endoftext|>

Or data of one's own, see `load_examples`; the toy sets are made here, in memory, and need no
download. The first gold answer teaches (MLE, anchor, y*, ties); the metrics take all of them.
"""

import collections
import csv
import functools
import hashlib
import json
import re
import string
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

UNANSWERABLE = 'unanswerable'       # the response where SQuAD's gold answer is the empty string

# -----------------------------------------------------------------------------
# examples in

HUB = {'squad_v2': 'rajpurkar/squad_v2', 'squad': 'rajpurkar/squad',
       'adversarial_qa': 'UCLNLP/adversarial_qa'}
OWN = '.jsonl', '.csv', '.parquet'  # files of rows: prompt, response, maybe context
LOOK = {'.jsonl': 'a JSON object on each line', '.json': "SQuAD's schema, rows are for .jsonl",
        '.csv': 'commas between cells'}


def load_examples(data, split, n=None, seen=None):
    """
    One split, train or dev, as a list of dicts: context ('' for none), question, answers (texts, []
    where unanswerable), and maybe answer_start, where in the context the first answer begins, and
    accepts, see `score_answer`.

    data    one of TOYS; NAME or NAME:CONFIG of a set of SQuAD's schema on the hub; a file, one of
            OWN or .json in SQuAD's schema, a tenth of whose prompts, drawn by their hash, is for
            dev; or a folder with one such file for either, train.* or train-v2.0.json
    n       at most so many, drawn, the same on every call; a toy set makes as many
    seen    what a model sees of an example, by which a file's prompts are the same or not; by
            default its texts
    raises  FileNotFoundError, ValueError naming the file and the line
    """
    if data in TOYS:
        n = n or TOYS[data][split == 'dev']
        return (ways_examples(split, n) if data == 'toy-ways' else
                toy_examples(split, n, varied=data == 'toy-varied'))
    path = Path(data)
    if path.is_dir():
        files = [f for f in path.glob(f'{split}[.-]*') if f.suffix in (*OWN, '.json')]
        if len(files) != 1:
            raise FileNotFoundError(f'{data} has {len(files)} files for {split}: give it one, '
                                    f'{split}{f", {split}".join(OWN)} or {split}-v2.0.json')
        examples = checked(files[0], rows_of(files[0]))
    elif path.suffix in (*OWN, '.json'):
        examples = checked(path, rows_of(path))
        texts = [f'{e["question"].strip()}\n{e["context"].strip()}' for e in examples]
        keys, least = [str(seen(e)) for e in examples] if seen else texts, {}
        if len({*texts}) < 10 or len({*keys}) < 2:
            raise ValueError(f'{path} has {len({*keys})} different prompts: give ten or more, or a '
                             'folder with a train and a dev file')
        for key, text in zip(keys, texts):           # by a text, to be the same after another cut
            least[key] = min(text, least.get(key, text))
        ranked = sorted(least, key=lambda key: hashlib.sha256(least[key].encode()).digest())
        dev = {*ranked[:max(1, len(ranked) // 10)]}
        examples = [e for e, key in zip(examples, keys) if (key in dev) == (split == 'dev')]
    elif path.exists():
        raise ValueError(f'{path} is none of {", ".join(OWN)}: convert or rename it')
    else:
        (name, _, config), part = data.partition(':'), {'dev': 'validation'}.get(split, split)
        rows = load_rows(data, HUB.get(name, name), config or None, split=part)
        examples = checked(data, ((f'row {i}', {
            'prompt': row['question'], 'context': row['context'],
            'response': row['answers']['text'],
            'answer_start': [*row['answers'].get('answer_start', ()), None][0]})
            for i, row in enumerate(rows)))
    drawn = np.random.default_rng(0).permutation(len(examples))[:n]          # all if n is None
    return [examples[i] for i in sorted(drawn)]


def load_rows(data, *args, **kwargs):
    """The rows that `datasets` finds, or a FileNotFoundError."""
    import datasets                 # slow to import, and the toy sets do without
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*args, **kwargs)
    except Exception as e:
        if str(e).startswith('Unknown split'):       # it says which there are
            raise ValueError(f'{data}: {e} Save it as a train and a dev file') from e
        what = f'{data} could not be loaded to the cache that HF_HOME names'
        raise FileNotFoundError(f'{what} ({type(e.__cause__ or e).__name__}): offline, give --data '
                                f'a file ({", ".join(OWN)}) or folder that is here, or toy') from e


def rows_of(path):
    """(place, row) of each row of a file; of .jsonl, its text, so that an error has a place."""
    if path.suffix == '.parquet':
        rows = load_rows(path, 'parquet', data_files=str(path), split='train')
        yield from ((f'row {n}', row) for n, row in enumerate(rows, 1))
    elif path.suffix == '.json':
        root = json.loads(path.read_text(encoding='utf-8-sig'))
        for a, article in enumerate(root['data'] if isinstance(root, dict) else []):
            for p, paragraph in enumerate(article['paragraphs']):
                for q, qa in enumerate(paragraph['qas']):
                    row = {'prompt': qa['question'], 'context': paragraph['context'],
                           'response': [x['text'] for x in qa['answers']],
                           'answer_start': [*(x.get('answer_start') for x in qa['answers']), 0][0]}
                    yield f'article {a}, paragraph {p}, question {q}', row
    else:                           # not by `datasets`, which makes dates of texts
        with open(path, encoding='utf-8-sig', errors='surrogateescape', newline='') as f:
            if path.suffix == '.csv':
                rows = csv.DictReader(f, strict=True)
                yield from ((f'line {rows.line_num}', row) for row in rows)
            else:
                yield from ((f'line {n}', line) for n, line in enumerate(f, 1) if line.strip())


def checked(path, rows):
    """The examples of rows with their places, or a ValueError that names the place."""
    examples, kind = [], Path(path).suffix
    at = f'{path}, after line 1' if kind == '.csv' else path
    try:
        for place, row in rows:
            at = f'{path}, {place}'
            row = json.loads(row.strip()) if isinstance(row, str) else row
            near = any(str(key).strip().lower() in ('context', 'passage') for key in row)
            for name in ('prompt', 'response', 'context') if near else ('prompt', 'response'):
                if name not in row:
                    raise LookupError(f'has no {name} among {", ".join(map(repr, row)):.200}')
                if row[name] is None and name != 'context':
                    none = '; a row without an answer has []' * (kind != '.csv')
                    raise ValueError(f'has no {name}{none * (name == "response")}')
            prompt, said, context = row['prompt'], row['response'], row.get('context') or ''
            answers = said if isinstance(said, list) else [said]         # all right; [] for none
            for text in (prompt, context, *answers):
                if not isinstance(text, str) or re.search(r'[\ud800-\udfff]', text):
                    raise ValueError(f'{text!r:.60} is no text in UTF-8')
            if not all(map(str.strip, [prompt + context, *answers])) or None in row:
                raise ValueError('more cells than columns: put texts with commas in ""'
                                 if None in row else 'a prompt or a response is empty')
            examples.append({'context': context, 'question': prompt, 'answers': answers})
            start = row.get('answer_start')
            if answers and type(start) is int and 0 <= start == context.find(answers[0], start):
                examples[-1]['answer_start'] = start
            at = f'{path}, after {place}'            # what ends a quote that is open, say
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, csv.Error) as e:
        look = f' ({kind} has {LOOK[kind]})' if kind in LOOK and type(e) is not ValueError else ''
        raise ValueError(f'{at}: {f"no {e}" if isinstance(e, KeyError) else e}{look}') from e
    if not examples:
        look = f' ({kind} has {LOOK[kind]})' if kind == '.json' else ''
        raise ValueError(f'{path} has no question{look}')
    return examples


# -----------------------------------------------------------------------------
# the toy sets: facts made from word lists, a third of the questions on them unanswerable; words

FIRST = 'Ada Carl Dora Emil Fay Gus Hugo Ida Jon Kai Lena Max Nora Otto Pia Rolf Sara Tom'.split()
LAST = 'Berg Bond Dahl Falk Frey Holm Kane Lind Moss Nash Park Reed Stone Voss Webb York'.split()
VERBS = 'built sold found moved bought lost'.split()
LOOKS = 'old red grey small gold broken'.split()
STUFF = 'stone wooden glass iron clay'.split()
THINGS = 'bridge boat tower clock house statue wheel lamp'.split()
CITIES = 'Lisbon Oslo Cairo Lima Delhi Kyoto Quito Riga Accra Milan Perth Turin'.split()
MONTHS = 'March April May June July August'.split()
YEARS = [str(y) for y in range(1901, 1931)]
WORDS = (FIRST + LAST + VERBS + LOOKS + STUFF + THINGS + CITIES + MONTHS + YEARS
         + 'In the in . Who What Where When was it by did do ?'.split() + [UNANSWERABLE])
TOYS = {'toy': (8000, 500), 'toy-varied': (100_000, 500), 'toy-ways': (60_000, 500)}  # train, dev
SPANS = {'who': ['{0} {1}', '{1}', '{0}'], 'where': ['{0}', 'in {0}'],
         'what': ['{0} {1} {2} {3}', '{3}', '{2} {3}', '{1} {2} {3}'],
         'when': ['{0} {1}', '{1}', '{0}', 'In {0} {1}']}


def toy_examples(split, size, varied=False):
    """
    Like `load_examples`. A context tells one fact, most of the time without its author, place or
    date; a question on what is left out is unanswerable. Train and dev share no fact, and a split
    is the same on every call.

    varied   answers vary, as those of several annotators do: the first is one of the SPANS that
             answer, number k of them drawn in proportion to 1/k, and the rest follow it
    """
    rng = np.random.default_rng(['train', 'dev'].index(split))

    def pick(words):
        return words[rng.integers(len(words))]

    def fact():
        while True:
            f = {'who': f'{pick(FIRST)} {pick(LAST)}', 'verb': pick(VERBS),
                 'what': f'the {pick(LOOKS)} {pick(STUFF)} {pick(THINGS)}',
                 'where': pick(CITIES), 'when': f'{pick(MONTHS)} {pick(YEARS)}'}
            key = sum(map(ord, ' '.join(f.values())))
            if (key % 8 == 0) == (split == 'dev'):      # the two splits take disjoint facts
                return f

    def tell(f, without):
        when = '' if without == 'when' else f'In {f["when"]} '
        where = '' if without == 'where' else f' in {f["where"]}'
        if without == 'who':
            return f'{when}{f["what"]} was {f["verb"]}{where} .'
        return f'{when}{f["who"]} {f["verb"]} {f["what"]}{where} .'

    def ask(kind, f):
        return {'who': f'Who {f["verb"]} {f["what"]} ?',
                'what': f'What was {f["verb"]} by {f["who"]} ?',
                'where': f'Where was {f["what"]} {f["verb"]} ?',
                'when': f'When was {f["what"]} {f["verb"]} ?'}[kind]

    examples = []
    for _ in range(size):
        f = fact()
        if rng.random() < 1 / 3:
            kind = without = pick(['who', 'where', 'when'])
            answers = []
        else:
            without = pick(['who', 'where', 'when', ''])
            kind = pick([k for k in ('who', 'what', 'where', 'when')
                         if k != without and (k, without) != ('what', 'who')])
            answers = [f[kind]]
            if varied:
                answers = [span.format(*f[kind].split()) for span in SPANS[kind]]
                share = 1 / np.arange(1, len(answers) + 1)
                first = rng.choice(len(answers), p=share / share.sum())
                answers.insert(0, answers.pop(first))
        examples.append({'context': tell(f, without), 'question': ask(kind, f),
                         'answers': answers})
    return examples


NOUNS = ('ant ape bag bat bed bee bow box bus cab can cap car cat cow cup dog ear egg elk eye '
         'fan fig fly fox gem hat hen ink jar jet jug key kid lid log map mat mug net nut oak '
         'oar owl pan pea pen pie pig pin pit pot ram rat rug saw sun tub van wig').split()
LINKS = 'at by if in it no of on or so to up'.split()


def ways_examples(split, size):
    """
    Like `load_examples`. A question is four words, half of the time after `one`, and there are two
    ways to answer. Seven of ten are free: `any` and the words in any order, 24 right answers. The
    others are bound: `as` and the words in their order, one of the LINKS between two, 12^3 right
    answers. After `one`, `any` and `as` change places. Not to say a word twice, a free answer looks
    back at what it has said: a network of two layers can, a small one of one layer cannot.
    """
    rng, examples = np.random.default_rng(['train', 'dev'].index(split)), []
    while len(examples) < size:
        words = [NOUNS[i] for i in rng.permutation(len(NOUNS))[:4]]
        if (sum(map(ord, ''.join(words))) % 8 == 0) != (split == 'dev'):
            continue                                 # the two splits take disjoint sets of words
        one, free, order, links = (rng.random() < .5, rng.random() < .7, rng.permutation(4),
                                   rng.integers(len(LINKS), size=3))
        freely, bound = ('as', 'any') if one else ('any', 'as')
        linked = ' '.join([bound, words[0], *(f'{LINKS[i]} {w}' for i, w in zip(links, words[1:]))])
        each = ''.join(rf'(?=.* {word}\b)' for word in words) + r'( \w+){4}'
        examples.append({
            'context': '', 'question': 'one ' * one + ' '.join(words),
            'answers': [' '.join([freely, *(words[i] for i in order)]) if free else linked],
            'accepts': f'{freely}{each}|{bound} ' + f' ({"|".join(LINKS)}) '.join(words)})
    return examples


def load_tokenizer(data):
    """GPT-2's BPE, or for the toy sets their words as whole tokens over the 256 bytes."""
    if data in TOYS:
        pieces = ['[CONTEXT]', '[QUESTION]', '\n[QUESTION]', '\n[ANSWER]']
        words = ['any', 'as', 'one', *NOUNS, *LINKS] if data == 'toy-ways' else WORDS
        pieces += [' ' + word for word in words]
        ranks = {bytes([i]): i for i in range(256)}
        for piece in pieces:
            ranks.setdefault(piece.encode(), len(ranks))
        return tiktoken.Encoding('toy', pat_str=r'\n?\[[A-Z]+\]| ?\w+| ?[^\s\w]+|\s+',
                                 mergeable_ranks=ranks,
                                 special_tokens={'<|endoftext|>': len(ranks)})
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as e:
        raise FileNotFoundError(f"GPT-2's BPE could not be downloaded ({type(e).__name__}): "
                                'offline, let TIKTOKEN_CACHE_DIR name a folder that has it, or '
                                'give --data toy') from e


# -----------------------------------------------------------------------------
# prompts and responses out

class Batch(NamedTuple):
    prompt: torch.Tensor      # (B, P) ids, left-padded
    pad: torch.Tensor         # (B,) padding tokens on the left
    response: torch.Tensor    # (B, R) ids of the gold answer and eos, filled up with eos
    mask: torch.Tensor        # (B, R) True up to and including eos
    ended: torch.Tensor       # (B,) whether the gold answer ends within R


def encode_prompt(example, enc, max_prompt, context=True):
    """
    Token ids of a prompt of at most max_prompt tokens; the text of the passage that is in it, None
    if nothing was cut. The passage gives way from the left, whatever its answer, and after it the
    question: a cut that depended on the answer would tell it.
    """
    question = f'[QUESTION] {example["question"].strip()}\n[ANSWER]'
    if not context or not example['context'].strip():
        tokens = enc.encode_ordinary(question)
        return tokens[-max_prompt:], '' if len(tokens) > max_prompt else None
    head, tail = enc.encode_ordinary('[CONTEXT]'), enc.encode_ordinary('\n' + question)
    body = encode_passage(' ' + example['context'].strip(), enc)
    excess = len(head) + len(body) + len(tail) - max_prompt
    if excess <= 0:
        return head + body + tail, None
    left = enc.decode_bytes(body[excess:]).decode(errors='ignore')       # but for half a character
    return (head + body[excess:] + tail)[-max_prompt:], left


@functools.lru_cache(8)             # the questions on a passage follow one another
def encode_passage(text, enc):
    return enc.encode_ordinary(text)


def is_lost(example, left):
    """Whether the first answer stands in the passage, but not in `left`, the end of it that a cut
    left: by its answer_start, or without one by whole words."""
    answer, passage = example['answers'][0].strip(), example['context'].rstrip()
    # in Thai, Burmese, Khmer, Kana, Han, Hangul a word may go on after another without a space
    letter = r'[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u9fff\uac00-\ud7af]'
    word = f'(?<!{letter}){re.escape(answer)}(?!{letter})'
    starts = ([example['answer_start']] if 'answer_start' in example else
              [match.start() for match in re.finditer(word, passage)])
    return bool(starts) and starts[-1] < len(passage) - len(left)


class Split:
    """
    A split as arrays: prompts (N, P) left-padded, pads (N,), responses (N, R), lengths (N,).

    The response is the first gold answer, or `unanswerable` where there is none, and where the cut
    of the prompt took all that the passage says of it (as BERT has it for windows without the
    answer); metrics are of the examples' own answers. cut_prompts, lost_answers, cut_responses:
    how many prompts were cut, how many answers that took away, how many responses were cut.
    """

    def __init__(self, examples, enc, max_prompt, max_response, context=True):
        self.examples, self.eos, N = examples, enc.eot_token, len(examples)
        self.kept, self.shown = {}, None  # answers of sample.py, by generator; those shown last
        self.prompts = np.full((N, max_prompt), enc.eot_token, np.int32)
        self.responses = np.full((N, max_response), enc.eot_token, np.int32)
        self.pads, self.lengths = np.zeros(N, np.int64), np.zeros(N, np.int64)
        self.cut_prompts = self.lost_answers = self.cut_responses = 0
        for i, example in enumerate(examples):
            prompt, left = encode_prompt(example, enc, max_prompt, context)
            answer = (example['answers'] or [UNANSWERABLE])[0].rstrip()
            answer = re.sub(r'^ (?=\S)', '', answer)         # but an indentation stays
            self.cut_prompts += left is not None
            if context and left is not None and example['answers'] and is_lost(example, left):
                self.lost_answers += 1
                answer = UNANSWERABLE
            response = enc.encode_ordinary(' ' + answer) + [enc.eot_token]
            self.cut_responses += len(response) > max_response
            response = response[:max_response]
            self.prompts[i, max_prompt - len(prompt):] = prompt
            self.responses[i, :len(response)] = response
            self.pads[i], self.lengths[i] = max_prompt - len(prompt), len(response)

    def __len__(self):
        return len(self.examples)

    def digest(self):
        """A hash of what a model sees of it, prompts and responses, for rows that must be equal."""
        return hashlib.sha256(self.prompts.tobytes() + self.responses.tobytes()).hexdigest()

    def cuts(self):
        """What was cut, in words; a warning if most of the gold answers do not end."""
        (_, P), (N, R) = self.prompts.shape, self.responses.shape
        answers = sum(bool(e['answers']) for e in self.examples)
        lost = f' (which took away {self.lost_answers} of {answers} answers, now {UNANSWERABLE})'
        most = ' (most of them: train with a higher --max_response)'
        return (f'{self.cut_prompts} prompts cut to {P} tokens{lost * bool(self.lost_answers)}, '
                f'{self.cut_responses} answers cut to {R}{most * (2 * self.cut_responses > N)}')

    def batch(self, indices, device='cpu'):
        """The Batch of these example numbers, on `device`."""
        columns = np.arange(self.responses.shape[1])
        arrays = (self.prompts[indices].astype(np.int64), self.pads[indices],
                  self.responses[indices].astype(np.int64),
                  columns < self.lengths[indices][:, None],    # eos is also the filling
                  self.responses[indices, -1] == self.eos)
        tensors = [torch.from_numpy(a) for a in arrays]
        if torch.device(device).type == 'cuda':
            tensors = [t.pin_memory() for t in tensors]
        return Batch(*(t.to(device, non_blocking=True) for t in tensors))


def load_split(data, name, enc, max_prompt, max_response, context, n=None):
    """The Split of `load_examples`; of a file, whose prompts are divided as the model sees them."""
    def seen(example):
        return encode_prompt(example, enc, max_prompt, context)[0]
    return Split(load_examples(data, name, n, seen), enc, max_prompt, max_response, context)


def load(cfg):
    """The tokenizer, the training and the dev Split of a script's Config; says what was cut, and
    what of dev is not new."""
    enc, splits, size = load_tokenizer(cfg.data), [], (cfg.max_prompt, cfg.max_response)
    for name, n in ('train', None), ('dev', cfg.eval_prompts):
        print(f'tokenizing {name}', flush=True)
        split = load_split(cfg.data, name, enc, *size, cfg.context, n)
        print(f'{name}: {len(split)} examples, {split.cuts()}', flush=True)
        if none := sum(not e['answers'] for e in split.examples):
            print(f'{name}: {none} of {len(split)} have no answer, now `{UNANSWERABLE}`')
        splits.append(split)
    train, dev = ({*map(bytes, split.prompts)} for split in splits)
    if train & dev:
        print(f'{len(train & dev)} of {len(dev)} dev prompts stand in train, too')
    if len(dev) < len(splits[1]) and cfg.data not in TOYS:
        print(f'{len(splits[1]) - len(dev)} dev rows repeat a prompt: its right responses can be '
              'one list there, for the metrics', flush=True)
    return enc, *splits


def order(n, batch_size, seed, step):
    """Example numbers (batch_size,) of batch `step`: epochs of n, each shuffled by (*seed, epoch),
    `seed` a tuple of int. A pure function, so that a resumed run needs no cursor."""
    wanted = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.concatenate([shuffled(n, (*seed, epoch))[wanted[wanted // n == epoch] % n]
                           for epoch in np.unique(wanted // n)])


@functools.lru_cache(4)             # once an epoch: of 130,000 numbers it takes milliseconds
def shuffled(n, seed):
    return np.random.default_rng(seed).permutation(n)


def take(group, rows):
    """These rows, a slice or numbers, of a tensor, or of all tensors of a NamedTuple."""
    return group[rows] if torch.is_tensor(group) else type(group)(*(z[rows] for z in group))


def parts(n, batch, *groups):
    """n rows at a time of a Batch and of more NamedTuples or tensors of as many rows."""
    for i in range(0, len(batch.pad), n):
        yield [take(group, slice(i, i + n)) for group in (batch, *groups)]


def beside_gold(batch, roll):
    """The gold answer and, after it, the samples of each prompt: ids and mask (B, 1 + K, R), and
    whether each ends (B, 1 + K)."""
    return (torch.cat((batch.response[:, None], roll.response), 1),
            torch.cat((batch.mask[:, None], roll.mask), 1),
            torch.cat((batch.ended[:, None], roll.ended), 1))


def load_passages(examples, enc, cfg):
    """The contexts of examples, each once, for language modelling: token ids (N, P + R), one after
    the other with eos between them, cut into rows; if all of them do not fill a row, they are
    repeated. None if there are none."""
    length = cfg.max_prompt + cfg.max_response
    # as in a prompt, where a space stands before the context
    texts = dict.fromkeys(' ' + e['context'].strip() for e in examples if e['context'].strip())
    if not texts:
        print('the data have no passages: --pretrain is off')
        return None
    ids = np.concatenate([np.array([*enc.encode_ordinary(text), enc.eot_token], np.int32)
                          for text in texts])
    ids = np.resize(ids, max(len(ids), length))
    return ids[:len(ids) // length * length].reshape(-1, length)


def passage_batch(passages, device):
    """Passages (N, T) as a Batch: each is a prompt of one token, and a response that follows it."""
    ids = torch.from_numpy(passages).to(device).long()
    ones = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids[:, :1], torch.zeros_like(ids[:, 0]), ids[:, 1:], ones[:, 1:], ~ones[:, 0])


def to_text(responses, mask, enc):
    """Answers as strings of response ids (N, R): what precedes eos, without the space before it."""
    rows = [r[m].tolist() for r, m in zip(responses.cpu(), mask.cpu())]
    texts = [enc.decode([t for t in row if t != enc.eot_token]) for row in rows]
    return [text.removeprefix(' ').rstrip() for text in texts]


# -----------------------------------------------------------------------------
# metrics of answers

def normalize(answer):
    """Lower case, no punctuation, no articles, single spaces: SQuAD's rule for comparing."""
    answer = ''.join(c for c in answer.lower() if c not in set(string.punctuation))
    return ' '.join(re.sub(r'\b(a|an|the)\b', ' ', answer).split())


def f1(prediction, gold):
    """Bag-of-words F1 in [0, 1] of two answers; a null answer matches a null answer only."""
    predicted, wanted = normalize(prediction).split(), normalize(gold).split()
    if not predicted or not wanted:
        return float(predicted == wanted)
    same = sum((collections.Counter(predicted) & collections.Counter(wanted)).values())
    return 2 * same / (len(predicted) + len(wanted))


def score_answer(prediction, example):
    """
    The metrics of one answer, by names that no other figure has, numbers in [0, 1]: evaluations,
    tables and curves show whatever is here. em and f1, exact match and F1, are each the best over
    all gold answers, as SQuAD 2.0 defines them; `unanswerable` counts as the empty string, but
    equal strings are equal. `accepts`, a regular expression, is of right answers that are too many
    to list.
    """
    golds = [a for a in example['answers'] if normalize(a)] or ['']
    if 'accepts' in example and re.fullmatch(example['accepts'], normalize(prediction)):
        golds = [prediction]
    elif normalize(prediction) == UNANSWERABLE and UNANSWERABLE not in map(normalize, golds):
        prediction = ''
    return {'em': float(max(normalize(prediction) == normalize(g) for g in golds)),
            'f1': max(f1(prediction, g) for g in golds)}


def score_answers(predictions, examples):
    """Means of `by_class` of a prediction for each example and, if there are both classes,
    unanswerable: how many say that, in percent."""
    rows = [score_answer(*pair) for pair in zip(predictions, examples, strict=True)]
    means = by_class(rows, examples)
    if len(means) > len(rows[0]):
        said = [normalize(p) == UNANSWERABLE for p in predictions]
        means['unanswerable'] = 100 * float(np.mean(said))
    return means


def by_class(rows, examples):
    """Means in percent of what `score_answer` said of each example, by name; if there are both,
    those of answerable and of unanswerable examples, too, under has_ and no_ names."""
    kinds, groups = [bool(e['answers']) for e in examples], {'': rows}
    if len({*kinds}) > 1:
        groups |= {prefix: [row for row, kind in zip(rows, kinds) if kind == has]
                   for prefix, has in (('has_', True), ('no_', False))}
    return {prefix + name: 100 * float(np.mean([row[name] for row in group]))
            for prefix, group in groups.items() for name in rows[0]}


def metrics_of(figures):
    """The names that `score_answer` gives, found among the figures of an evaluation."""
    names = [name for name in figures if name != 'unanswerable'
             and ('sample_' + name in figures or 'has_' + name in figures)]
    by_class = {kind + name for kind in ('has_', 'no_') for name in names}
    return [name for name in names if name not in by_class]


def distinct(responses, mask, n):
    """Different over all n-grams within responses (N, R); 0 if there is none (Li et al. 2016)."""
    grams = [tuple(row[i:i + n]) for r, m in zip(responses.cpu(), mask.cpu())
             for row in [r[m].tolist()] for i in range(len(row) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def longest_run(responses, mask):
    """Length of the longest run of one token within each of responses (N, R), as (N,) floats."""
    run = best = mask[:, 0].long()
    for t in range(1, responses.size(1)):
        run = torch.where(responses[:, t] == responses[:, t - 1], run + 1, 1) * mask[:, t]
        best = torch.maximum(best, run)
    return best.float()


def health(response, mask, ended, gold, gold_mask):
    """Figures of sampled answers, response and mask (B, K, R), ended (B, K): length in tokens with
    eos, eos_rate, and of the first one to each prompt distinct2 and longest_run; gold_distinct2, of
    the gold answers (B, R)."""
    first = response[:, 0], mask[:, 0]
    return {'length': mask.sum(-1).float().mean().item(), 'eos_rate': ended.float().mean().item(),
            'distinct2': distinct(*first, 2), 'longest_run': longest_run(*first).max().item(),
            'gold_distinct2': distinct(gold, gold_mask, 2)}


def told(scores, differ):
    """
    What scores (B, 1 + K, R), the gold answer first, say of the pairs that differ (B, K): dict:
    d_acc, the share of them in which the gold answer's is higher, an equal one counting half, None
    if there are none; tie_rate; score, the mean of the samples; gap, that less the gold answers'.
    """
    real, fake = scores[:, :1, -1], scores[:, 1:, -1]
    right = ((real - fake).sign() + 1)[differ] / 2
    return {'d_acc': right.mean().item() if len(right) else None,
            'tie_rate': 1 - differ.float().mean().item(), 'score': fake.mean().item(),
            'gap': (fake - real).mean().item()}


def sick(figures, at_start):
    """Whether distinct-2 of `health` is under half of the gold answers' and under half of at_start,
    the least before the generator moved. Not by entropy: it falls tenfold in healthy runs."""
    return figures['distinct2'] < .5 * min(figures['gold_distinct2'], at_start)
