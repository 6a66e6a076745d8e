"""
Looking at the result: answers of one checkpoint, or of several side by side.

$ python sample.py --ckpt out/reinforce/ckpt.pt --question "Who built it?" --context "Ada built it."
$ python sample.py --compare gpt2 out/reinforce/sft.pt out/reinforce/ckpt.pt
"""

import argparse
import sys
from pathlib import Path

import torch

import data
from model import GPT, load_checkpoint

DEFAULTS = dict(data='squad_v2', context=True, max_prompt=256, max_response=32)


def settings_of(source):
    """What a run of ours was trained with, as far as sampling needs it; DEFAULTS for others."""
    if Path(source).suffix != '.pt':
        return dict(DEFAULTS)
    saved = load_checkpoint(source)
    if 'settings' not in saved:
        raise ValueError(f'{source} holds no settings: give a ckpt.pt or sft.pt of ours')
    return {name: saved['settings'][name] for name in DEFAULTS}


def load(source, enc, device):
    """A GPT from whatever --init_from takes, checked against the tokenizer."""
    generator = GPT.from_pretrained(source)
    if generator.config.vocab_size != enc.n_vocab:
        raise ValueError(f'{source} has a vocabulary of {generator.config.vocab_size}, the '
                         f'tokenizer one of {enc.n_vocab}: give --data as it was trained')
    return generator.to(device).eval()


def answer(generator, examples, enc, settings, args):
    """One sampled answer (a string) to each example."""
    split = data.Split(examples, enc, settings['max_prompt'], settings['max_response'],
                       settings['context'])
    batch = split.batch(range(len(examples)), args.device)
    response, mask, _ = generator.generate(
        batch.prompt, batch.pad, settings['max_response'], split.eos,
        temperature=args.temperature, top_k=args.top_k,
        rng=torch.Generator(args.device).manual_seed(args.seed))
    return data.to_text(response, mask, enc)


def ask(args):
    """Answers args.question with args.ckpt."""
    settings = settings_of(args.ckpt)
    settings['context'] = args.context is not None
    enc = data.load_tokenizer(args.data or settings['data'])
    generator = load(args.ckpt, enc, args.device)
    example = {'id': '', 'question': args.question, 'context': args.context or '', 'answers': []}
    for text in answer(generator, [example] * args.samples, enc, settings, args):
        print(text)


def compare(args):
    """Prints the answers of all checkpoints to the same dev prompts."""
    trained = next((source for source in args.compare if Path(source).suffix == '.pt'), None)
    settings = settings_of(trained) if trained else dict(DEFAULTS)
    name = args.data or settings['data']
    enc = data.load_tokenizer(name)
    examples = data.load_examples(name, 'dev')
    examples = examples[::max(1, len(examples) // args.prompts)][:args.prompts]
    answers = {source: answer(load(source, enc, args.device), examples, enc, settings, args)
               for source in args.compare}
    width = max(map(len, [*args.compare, 'question']))
    for i, example in enumerate(examples):
        print(f'{"question":{width}}  {example["question"]}')
        print(f'{"gold":{width}}  {" | ".join(example["answers"]) or data.UNANSWERABLE}')
        for source, texts in answers.items():
            print(f'{source:{width}}  {texts[i]}')
        print()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--ckpt', help='a checkpoint to ask: .pt of ours, or what --init_from takes')
    what.add_argument('--compare', nargs='+', metavar='CKPT', help='to set side by side')
    parser.add_argument('--question', help='with --ckpt')
    parser.add_argument('--context', help='with --ckpt: the passage the answer is in')
    parser.add_argument('--samples', type=int, default=1, help='with --ckpt: answers (default 1)')
    parser.add_argument('--prompts', type=int, default=10, help='with --compare: dev prompts (10)')
    parser.add_argument('--data', help='as in training; by default what the checkpoint says')
    parser.add_argument('--temperature', type=float, default=.8, help='0 for greedy (default .8)')
    parser.add_argument('--top_k', type=int, default=100, help='default 100')
    parser.add_argument('--seed', type=int, default=1, help='of the sampling noise (default 1)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args(argv)
    if args.ckpt and not args.question:
        parser.error('--ckpt needs --question')
    for name, least in ('samples', 1), ('prompts', 1), ('top_k', 1), ('temperature', 0):
        if getattr(args, name) < least:
            parser.error(f'--{name} {getattr(args, name)}: give at least {least}')
    try:
        ask(args) if args.ckpt else compare(args)
    except (ValueError, FileNotFoundError) as e:
        sys.exit(str(e))


if __name__ == '__main__':
    main()
