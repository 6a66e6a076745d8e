"""
Gumbel-softmax: the discriminator's gradient reaches the generator through its own samples.

    y_t = argmax(logits_t + g_t)                        g ~ Gumbel(0, 1), Maddison et al. (2014)
    z_t = softmax((logits_t + g_t) / tau)               Jang et al. (2017); y_t goes on as a token
    z*_t                                                the same, g drawn so that y*_t is the argmax
    min_G  E[ -log sigmoid(s(x, z) - s(x, z*)) ] + beta KL(pi || pi_SFT)
    max_D  E[ log sigmoid(s(x, z*) - s(x, z)) ]

$ python gumbel.py --device cuda      GPT-2 124M on SQuAD 2.0
$ python gumbel.py --tiny             a toy, on a CPU, in minutes

Left out on purpose: gradients through what a token does to later ones (each prefix is ids, as it
was sampled), samples of the relaxed distribution in evaluation.
"""

import argparse
import copy
import inspect
import math
import re
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple, Optional, get_args

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import sample
from model import (GPT, Discriminator, GPTConfig, Log, Stopwatch, adamw, all_sum, autocast,
                   catch_signals, exponential, gathered, hold_last, load_checkpoint,
                   open_device, open_folder, peak_memory, ranks, save, schedule, shard,
                   trim_freed_memory, update)

# -----------------------------------------------------------------------------
# config: every field is a flag, its comment is the flag's --help


@dataclass
class Config:
    # i/o
    out_dir: str = 'out/gumbel'      # where checkpoints, metrics, curves and samples go
    seed: int = 1                    # of new weights, the order of examples, the sampling noise
    device: str = 'auto'             # cuda, cuda:1, mps, cpu; auto takes the first there is
    dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'  # of activations; auto: bfloat16 on CUDA
    compile: Optional[bool] = None   # torch.compile; None: on CUDA only
    resume: bool = False             # go on from out_dir, with its settings; flags given here win
    overwrite: bool = False          # start anew in an out_dir that holds a run
    tiny: bool = False               # the toy preset: CPU, no downloads, minutes; other flags win
    eval_interval: int = 50          # iterations from one evaluation and checkpoint to the next
    eval_prompts: int = 500          # dev prompts of an evaluation
    # data
    data: str = 'squad_v2'           # squad_v2 (hub), toy, toy-varied, or a folder of its files
    context: bool = True             # put the passage into the prompt; the poster did not
    max_prompt: int = 256            # P, tokens
    max_response: int = 32           # R, tokens, with <|endoftext|>
    # model
    init_from: str = 'gpt2'          # gpt2[-medium|-large|-xl], distilgpt2, a path, or scratch
    n_layer: int = 12                # of scratch
    n_head: int = 12                 # of scratch
    n_embd: int = 768                # of scratch
    # warm start
    sft_iters: int = 8000            # MLE steps on gold answers; 0 for none
    sft_batch_size: int = 32         # examples of an MLE step
    sft_lr: float = 3e-5             # its peak learning rate
    # adversarial stage
    iters: int = 1000                # rollouts
    batch_size: int = 64             # prompts of a rollout
    samples: int = 4                 # K, responses to each prompt
    temperature: float = 1.0         # of rollouts and of the policy learned; evaluation takes .8
    micro_batch: int = 64            # responses of one backward pass; lower it to save memory
    beta: float = 0.02               # weight of the KL from the warm start, per nat
    anchor: float = 0.1              # weight of MLE on the gold answers beside the score
    lr: float = 5e-6                 # peak learning rate of the generator
    # discriminator
    d_loss: Literal['pair', 'minimax'] = 'pair'  # relativistic on one prompt, or the poster's
    d_prefixes: bool = True          # learn the score of every prefix, not of whole answers alone
    d_lr: float = 1e-5               # its learning rate
    d_warmup_iters: int = 200        # at most so many iterations before the generator moves
    d_warmup_acc: float = 0.75       # or until the running pair accuracy gets there
    d_max_acc: float = 0.85          # steps are skipped while the running pair accuracy is above
    d_dropout: float = 0.1           # in its own step only
    # gumbel
    tau: float = 1.0                 # temperature of the relaxed samples, at the start
    tau_end: float = 0.5             # and at the end
    encoding: Literal['soft', 'hard', 'mixed'] = 'soft'  # relaxed; one-hot; relaxed but for golds


TINY = dict(
    data='toy', init_from='scratch', n_layer=2, n_head=4, n_embd=64, max_prompt=26, max_response=6,
    device='cpu', sft_iters=100, sft_batch_size=64, sft_lr=4e-3, iters=350, batch_size=128,
    samples=2, micro_batch=256, beta=0.0, anchor=4.0, lr=4e-3, d_lr=2e-3,
    d_warmup_iters=180, d_warmup_acc=.9, d_max_acc=.95, d_dropout=0.0,
    eval_interval=25,
)


LOG_INTERVAL = 10            # iterations from one printed line to the next
SHARES = 'd_warmup_acc d_max_acc d_dropout'.split()                 # lie in [0, 1]
ABOVE_0 = 'temperature'.split()                                    # may not be 0


def parse(argv=None):
    """A Config from flags: their names, types, defaults and help are those of its fields."""
    notes = dict(re.findall(r'^    (\w+):.*?  # +(.*)$', inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage='%(prog)s [--flag value ...]; %(prog)s --help lists them', allow_abbrev=False)
    for f in fields(Config):
        if f.type in (bool, Optional[bool]):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif get_args(f.type):
            kind = dict(choices=get_args(f.type))
        else:
            kind = dict(type=f.type, metavar=f.type.__name__.upper())
        parser.add_argument('--' + f.name, default=argparse.SUPPRESS,
                            help=f'{notes[f.name]} (default: {f.default})', **kind)
    given = vars(parser.parse_args(argv))
    settings = dict(TINY) if given.get('tiny') else {}
    if given.get('resume'):
        out = Path(given.get('out_dir', settings.get('out_dir', Config.out_dir)))
        files = [out / 'ckpt.pt', out / 'sft.pt']
        file = next((f for f in files if f.exists()), None)
        if file is None:
            raise ValueError(f'--resume: {out} holds no checkpoint: run without --resume, or give '
                             'the --out_dir of a run')
        settings = load_checkpoint(file)['settings']
        unknown = settings.keys() - Config.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(f'--resume: {file} is of another script, which has --{min(unknown)}: '
                             'give the --out_dir of a run of this one')
    cfg = Config(**{**settings, **given})
    check(cfg)
    return cfg


def check(cfg):
    """Raises a ValueError naming the flag, its value and the remedy."""
    may_be_0 = 'seed sft_iters iters d_warmup_iters'.split()
    for name, value in asdict(cfg).items():
        least = 1 if type(value) is int and name not in may_be_0 else 0
        least, most = (0, 1) if name in SHARES else (least, math.inf)
        if type(value) in (int, float) and not (least <= value <= most and math.isfinite(value)):
            raise ValueError(f'--{name} {value}: give a number of at least {least:g}' + (
                f' and at most {most}' if name in SHARES else ''))
    for name in ABOVE_0:
        if getattr(cfg, name) == 0:
            raise ValueError(f'--{name} 0: give a number above 0')
    for name in 'micro_batch', 'minibatch':
        if getattr(cfg, name, 0) % cfg.samples:
            raise ValueError(f'--{name} {getattr(cfg, name)} with --samples {cfg.samples}: give a '
                             'multiple, the samples of a prompt are learned from together')
    if cfg.resume and cfg.overwrite:
        raise ValueError('--resume with --overwrite: give one of them')
    check_approach(cfg)


def check_approach(cfg):
    """Like `check`, of what is Gumbel-softmax's alone."""
    for name in 'tau', 'tau_end':
        if getattr(cfg, name) < .1:
            raise ValueError(f'--{name} {getattr(cfg, name)}: give at least 0.1, the gradient '
                             'grows as its inverse')


# -----------------------------------------------------------------------------
# losses: functions of tensors


def mle_loss(generator, batch, n_tokens=None):
    """-log pi of the gold answers with their eos, nats per token: a Batch's sum over n_tokens, by
    default its own; a scalar."""
    logprobs, _ = generator.response_logprobs(batch.prompt, batch.pad, batch.response)
    return -(logprobs * batch.mask).sum() / (batch.mask.sum() if n_tokens is None else n_tokens)


def discriminator_loss(real, fake, kind):
    """
    What the discriminator minimises, elementwise, in nats.

    real, fake  scores of the gold and of the sampled answer to one prompt, logits, any one shape
    kind        pair: -log sigmoid(real - fake), Jolicoeur-Martineau 2019;
                minimax: -log D(real) - log(1 - D(fake)), D = sigmoid(score), Goodfellow 2014
    """
    if kind == 'pair':
        return F.softplus(fake - real)
    return F.softplus(-real) + F.softplus(fake)


def generator_loss(real, fake, kind):
    """
    What the generator minimises, elementwise, in nats; scores as in `discriminator_loss`.

    kind  pair: -log sigmoid(fake - real); minimax: log(1 - D(fake)), the poster's, which has little
          gradient where the discriminator is sure (Goodfellow 2014)
    """
    return F.softplus(real - fake) if kind == 'pair' else -F.softplus(fake)


def conditional_noise(logits, response, rng):
    """
    Gumbel noise (..., R, V), given that it sampled the response: response = argmax(logits + noise).

    The largest of all logits + noise is Gumbel(logsumexp(logits)) whichever it is; the others are
    Gumbel too, cut off there (Maddison et al. 2014). With e ~ Exponential(1), -log(e) is Gumbel and
    -log(e + exp(logit - largest)) the noise of one so cut. Over responses that were sampled, it has
    the law of the noise that sampled them. logits (..., R, V), response (..., R) ids.
    """
    largest = logits.logsumexp(-1, keepdim=True)
    largest = largest - exponential(largest.shape, logits, rng).log_()
    noise = exponential(logits.shape, logits, rng).add_((logits - largest).exp_()).log_().neg_()
    return noise.scatter_(-1, response[..., None],
                          largest - logits.gather(-1, response[..., None]))


def relax(logits, response, mask, tau, rng):
    """
    Answers (..., R, V) through which gradients reach the logits, relaxed as if these had sampled
    them: softmax((logits + noise) / tau), whose argmax is the response (Jang et al. 2017).

    logits    (..., R, V) of each response token, given those before it
    response  (..., R) ids, mask (..., R) True up to and including eos: what follows is one-hot
    """
    noise = conditional_noise(logits.detach(), response, rng)
    onehots = torch.zeros_like(logits).scatter_(-1, response[..., None], 1.0)
    return torch.where(mask[..., None], ((logits + noise) / tau).softmax(-1), onehots)


def exact_kl(logits, ref_logits, mask):
    """KL(pi || reference) and the entropy of pi, no gradient, at each token (B, R) from logits
    (B, R, V), nats; 0 outside the mask."""
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    p = logp.exp()
    with torch.no_grad():
        entropy = -(p * logp).sum(-1) * mask
    return (p * (logp - ref_logp)).sum(-1) * mask, entropy


# -----------------------------------------------------------------------------
# rollout and evaluation


class Rollout(NamedTuple):
    prompt: torch.Tensor         # (B*K, P) ids, the K samples of a prompt side by side
    pad: torch.Tensor            # (B*K,) padding tokens on the left
    response: torch.Tensor       # (B*K, R) sampled ids
    mask: torch.Tensor           # (B*K, R) True up to and including eos
    ended: torch.Tensor          # (B*K,) whether eos came within R


@torch.no_grad()
def rollout(generator, batch, eos, rng, cfg):
    """K samples of each prompt, over the full vocabulary."""
    with autocast(cfg):
        response, mask, _ = generator.generate(batch.prompt, batch.pad, cfg.max_response, eos,
                                               samples=cfg.samples,
                                               temperature=cfg.temperature, rng=rng)
    prompt, pad = (z.repeat_interleave(cfg.samples, 0) for z in (batch.prompt, batch.pad))
    return Rollout(prompt, pad, response, mask, ((response == eos) & mask).any(1))


def encode(logits, response, mask, tau, rng, soft):
    """Given responses (n, R) for the discriminator, (n, R, V): relaxed if soft, else one-hots."""
    if soft:
        return relax(logits, response, mask, tau, rng)
    return torch.zeros_like(logits).scatter_(-1, response[..., None], 1.0)


def response_logits(network, prompt, pad, response, cfg):
    """Logits (B*K, R, V) over the temperature of K responses, side by side, to each prompt (B, P),
    in one parallel pass."""
    return network.head(network.response_hidden(prompt, pad, response) / cfg.temperature)


@torch.no_grad()
def score(discriminator, prompt, pad, response, cfg):
    """Scores s_t (B*K, R) of K responses, side by side, to each prompt (B, P), logits."""
    K = len(response) // len(prompt)
    n = max(1, cfg.micro_batch // K)
    parts = zip(prompt.split(n), pad.split(n), response.split(n * K))
    with autocast(cfg):
        return torch.cat([discriminator(*part) for part in parts])


# -----------------------------------------------------------------------------
# training


class Pairs(NamedTuple):
    prompt: torch.Tensor      # (N, P) ids
    pad: torch.Tensor         # (N,) padding tokens on the left
    real: torch.Tensor        # (N, R) ids of the gold answer
    real_mask: torch.Tensor   # (N, R) True up to and including eos
    fake: torch.Tensor        # (N, R) ids of a sampled answer to the same prompt
    fake_mask: torch.Tensor   # (N, R)


def mle_step(generator, optimizer, train_set, step, steps, cfg):
    """MLE update number `step` of `steps`; the loss in nats per token, the gradient's norm."""
    index = data.order(len(train_set), cfg.sft_batch_size, (cfg.seed, 0), step)
    batch = train_set.batch(shard(index), cfg.device)
    with autocast(cfg):
        loss = mle_loss(generator, batch, all_sum(batch.mask.sum()))
    loss.backward()
    norm = update(generator, optimizer, cfg.sft_lr * schedule(step, steps, step + 1, 50))
    return all_sum(loss).item(), norm


def discriminator_step(discriminator, generator, optimizer, pairs, skip, tau, rng, cfg):
    """
    One update on pairs. Ties, whose sampled answer is the gold one, are left out.

    With d_prefixes the loss is the mean over all prefixes from the first difference on, an answer
    that is over keeping its last score; otherwise that of the whole answers. Soft answers are
    relaxed by the generator's logits and noise from rng, at temperature tau.
    skip     measure only
    returns  dict: d_loss in nats, d_norm, d_acc (None if all tie), tie_rate, reward (mean score)
    """
    differ = (pairs.real != pairs.fake).cumsum(1) > 0                        # (N, R)
    untied = differ[:, -1]
    where = differ & (pairs.real_mask | pairs.fake_mask)
    if not cfg.d_prefixes:
        where = F.pad(untied[:, None], (where.size(1) - 1, 0))
    n_untied = all_sum(untied.sum()).clamp(min=1)
    weights = where / where.sum(1, keepdim=True).clamp(min=1) / n_untied
    learn = all_sum(untied.sum()).item() > 0 and not skip
    discriminator.train(learn)
    losses, margins, ends = [], [], []
    for rows in torch.arange(len(untied), device=untied.device).split(cfg.micro_batch):
        p = Pairs(*(z[rows] for z in pairs))
        with autocast(cfg), torch.no_grad():
            gold, sampled = (encode(response_logits(generator, p.prompt, p.pad, answer, cfg),
                                    answer, mask, tau, rng, soft)
                             for answer, mask, soft in (
                                 (p.real, p.real_mask, cfg.encoding == 'soft'),
                                 (p.fake, p.fake_mask, cfg.encoding != 'hard')))
        with autocast(cfg), torch.set_grad_enabled(learn):
            response, mask = (torch.stack(z, 1).flatten(0, 1) for z in (
                (gold, sampled), (p.real_mask, p.fake_mask)))
            scores = hold_last(discriminator(p.prompt, p.pad, response), mask)   # (2 n, R)
            real, fake = scores[::2], scores[1::2]
            loss = (discriminator_loss(real, fake, cfg.d_loss) * weights[rows]).sum()
        if learn:
            loss.backward()
        losses.append(loss.detach())
        margins.append((real - fake)[:, -1].detach())
        ends.append(fake[:, -1].detach())
    discriminator.eval()
    d_norm = update(discriminator, optimizer, cfg.d_lr) if learn else None
    right = (torch.cat(margins) > 0)[untied]
    n_right, n_pairs, n_all = (all_sum(n) for n in (
        right.sum().item(), len(right), len(untied)))
    return {'d_loss': all_sum(sum(losses)).item() if all_sum(untied.sum()).item() else None,
            'd_norm': d_norm, 'd_acc': n_right / n_pairs if n_pairs else None,
            'tie_rate': 1 - n_pairs / n_all,
            'reward': all_sum(torch.cat(ends).sum()).item() / n_all}


def gumbel_step(generator, reference, discriminator, optimizer, roll, batch, lr, tau, rng,
                cfg):
    """
    One update by the discriminator's gradient through the replayed samples, with its MLE anchor.

    The loss is over the prefixes that the discriminator learns from: whole answers alone say little
    about which token to change. A tie, whose sample is the gold answer, has none.
    returns   dict: g_loss, g_norm, mle, kl and entropy (nats per token)
    """
    N, K = len(roll.response) * ranks()[1], cfg.samples
    sums = torch.zeros(4, device=roll.mask.device)
    for rows in torch.arange(len(roll.response), device=roll.mask.device).split(cfg.micro_batch):
        r = Rollout(*(z[rows] for z in roll))
        gold, gold_mask = batch.response[rows // K], batch.mask[rows // K]
        prompt, pad = r.prompt[::K], r.pad[::K]
        with autocast(cfg):
            logits = response_logits(generator, prompt, pad, r.response, cfg)
            with torch.no_grad():
                ref_logits = response_logits(reference, prompt, pad, r.response, cfg)
                gold_logits = response_logits(generator, prompt, pad, gold, cfg)
                encoded = encode(gold_logits, gold, gold_mask, tau, rng, cfg.encoding == 'soft')
                real = hold_last(discriminator(prompt, pad, encoded), gold_mask)
        z = relax(logits, r.response, r.mask, tau, rng)
        if cfg.encoding == 'hard':                   # straight-through, Jang et al. 2017
            z = encode(logits, r.response, r.mask, tau, rng, False) + z - z.detach()
        shown = z.detach().requires_grad_()          # the discriminator's weights get no gradient
        with autocast(cfg):
            fake = hold_last(discriminator(prompt, pad, shown), r.mask)
        differ = (r.response != gold).cumsum(1) > 0                          # (n, R)
        where = differ & (r.mask | gold_mask)
        if not cfg.d_prefixes:
            where = F.pad(differ[:, -1:], (where.size(1) - 1, 0))
        weights = where / where.sum(1, keepdim=True).clamp(min=1) / N
        loss = (generator_loss(real, fake, cfg.d_loss) * weights).sum()
        grad, = torch.autograd.grad(loss, shown)
        with torch.set_grad_enabled(cfg.beta > 0):
            kl, entropy = exact_kl(logits, ref_logits, r.mask)
        if cfg.beta:
            torch.autograd.backward((z, cfg.beta * kl.sum() / N), (grad, None))
        else:
            z.backward(grad)
        sums += torch.stack((loss, kl.sum(), entropy.sum(), r.mask.sum())).detach()
    with autocast(cfg), torch.set_grad_enabled(cfg.anchor > 0):
        mle = mle_loss(generator, batch, all_sum(batch.mask.sum()))
    if cfg.anchor:
        (cfg.anchor * mle).backward()
    g_norm = update(generator, optimizer, lr)
    g_loss, kl, entropy, tokens = all_sum(sums).tolist()
    return {'g_loss': g_loss, 'g_norm': g_norm, 'mle': all_sum(mle).item(), 'kl': kl / tokens,
            'entropy': entropy / tokens}


def load_data(cfg):
    """The tokenizer, the training and the dev Split; says how much was cut."""
    enc = data.load_tokenizer(cfg.data)
    splits = [data.Split(data.load_examples(cfg.data, name), enc, cfg.max_prompt,
                         cfg.max_response, cfg.context, train=name == 'train')
              for name in ('train', 'dev')]
    for name, s in zip(('train', 'dev'), splits):
        print(f'{name}: {len(s)} examples, {s.cut_prompts} prompts cut to {cfg.max_prompt} tokens, '
              f'{s.cut_responses} answers cut to {cfg.max_response}', flush=True)
    return enc, *splits


def load_generator(cfg, enc):
    """The generator that --init_from names, on the device."""
    if cfg.init_from == 'scratch':
        generator = GPT(GPTConfig(max(cfg.max_prompt + cfg.max_response, 2), enc.n_vocab,
                                  cfg.n_layer, cfg.n_head, cfg.n_embd))
    else:
        generator = GPT.from_pretrained(cfg.init_from)
    c = generator.config
    if c.vocab_size != enc.n_vocab:
        raise ValueError(f'--init_from {cfg.init_from} has a vocabulary of {c.vocab_size}, --data '
                         f'{cfg.data} one of {enc.n_vocab}: give a matching pair')
    if cfg.max_prompt + cfg.max_response > c.block_size:
        raise ValueError(f'--max_prompt {cfg.max_prompt} + --max_response {cfg.max_response} '
                         f'exceed the block size {c.block_size} of {cfg.init_from}: lower them')
    return generator.to(cfg.device).eval()


def warm_start(generator, train_set, out, log, caught, cfg):
    """MLE on gold answers up to out/sft.pt, resumed from there; False if a signal cut it short."""
    path, optimizer, start = out / 'sft.pt', adamw(generator), 0
    if cfg.resume and path.exists():
        saved = load_checkpoint(path)
        generator.load_strictly(saved['model'], path)
        start = saved['sft_iter']
        if start < cfg.sft_iters:
            optimizer.load_state_dict(saved['optimizer'])
    for step in tqdm(range(start, cfg.sft_iters), 'warm start', disable=None):
        stop = all_sum(bool(caught)) > 0
        if stop or step % cfg.eval_interval == 0:
            save(path, generator, cfg, log, sft_iter=step, optimizer=optimizer.state_dict())
        if stop:
            return False
        mle, norm = mle_step(generator, optimizer, train_set, step, cfg.sft_iters, cfg)
        log({'sft_iter': step, 'mle': mle, 'mle_norm': norm}, step % LOG_INTERVAL == 0)
    if start < cfg.sft_iters or not path.exists():
        save(path, generator, cfg, log, sft_iter=cfg.sft_iters)
    return True


def train(cfg, caught=()):
    """
    The whole road: warm start, adversarial stage, evaluation; writes everything into out_dir.

    caught   a list that a signal handler fills; once it is not empty, train saves and returns None
    returns  dict: the final figures of `warm start` and `tuned`, or `more MLE`; None but on rank 0
    raises   ValueError, OSError, FloatingPointError: one sentence for the user
    """
    # setup
    open_device(cfg)
    out, lock = open_folder(cfg)
    rank = ranks()[0]
    torch.manual_seed(cfg.seed)
    # data
    enc, train_set, dev_set = load_data(cfg)
    # models
    generator = load_generator(cfg, enc)
    reference = copy.deepcopy(generator).requires_grad_(False)               # before it is compiled
    if cfg.compile:
        generator.compile()
    # warm start
    files = [out / 'ckpt.pt', out / 'sft.pt'] if cfg.resume else []
    saved = next((load_checkpoint(file) for file in files if file.exists()), {})
    log = Log(out, cfg, saved.get('log_size', 0))
    if not warm_start(generator, train_set, out, log, caught, cfg):
        return None
    reference.load_state_dict(generator.state_dict())
    discriminator = Discriminator(generator, cfg.d_dropout).to(cfg.device).eval()
    optimizer, d_optimizer = adamw(generator), adamw(discriminator)
    # d_acc starts at chance
    running = {'d_acc': .5, 'g_steps': 0, 'sick': 0, 'control_steps': 0}
    # resume
    if 'discriminator' in saved:
        generator.load_strictly(saved['model'], out / 'ckpt.pt')
        discriminator.load_state_dict(saved['discriminator'])
        optimizer.load_state_dict(saved['optimizer'])
        d_optimizer.load_state_dict(saved['d_optimizer'])
        running = saved['running']
    if cfg.compile:
        for network in reference, discriminator:
            network.compile()

    for it in tqdm(range(saved.get('iter', 0), cfg.iters + 1), 'iterations', disable=None):
        # evaluate and checkpoint
        due = it % cfg.eval_interval == 0 or it == cfg.iters
        stop = all_sum(bool(caught)) > 0
        if (due or stop) and not running['sick']:
            save(out / 'ckpt.pt', generator, cfg, log, iter=it,
                 discriminator=discriminator.state_dict(),
                 optimizer=optimizer.state_dict(), d_optimizer=d_optimizer.state_dict(),
                 running=running)
        if due and rank == 0:
            figures, _ = sample.evaluate_run(generator, discriminator, dev_set, enc, cfg)
            log({'iter': it, 'dev': figures}, True)
            sample.draw({'this run': [sample.read_run(out)]}, out / 'curves.png')
        if due:
            trim_freed_memory()
        if stop:
            return None
        if it == cfg.iters:
            break

        # rollout
        lap = Stopwatch(cfg.device)
        index = data.order(len(train_set), cfg.batch_size, (cfg.seed, 1), it)
        batch = train_set.batch(shard(index), cfg.device)
        torch.manual_seed(hash((cfg.seed, it)) % 2 ** 31 + rank)             # dropout
        rng = torch.Generator(cfg.device).manual_seed(hash((cfg.seed, it, 1)) % 2 ** 31 + rank)
        roll = rollout(generator, batch, dev_set.eos, rng, cfg)
        tau = cfg.tau + (cfg.tau_end - cfg.tau) * it / cfg.iters
        answers = gathered(*(z.unflatten(0, (-1, cfg.samples)) for z in roll[2:5]), *batch[2:])
        record = {'iter': it, **data.health(*answers)}
        running['sick'] = running['sick'] + 1 if record.pop('sick') else 0
        lap('rollout')

        # discriminator step
        gold = (z.repeat_interleave(cfg.samples, 0) for z in batch[2:])
        pairs = Pairs(roll.prompt, roll.pad, *gold, roll.response, roll.mask)
        moving = (running['g_steps'] > 0 or running['d_acc'] >= cfg.d_warmup_acc
                  or it >= cfg.d_warmup_iters)
        skip = moving and running['d_acc'] > cfg.d_max_acc
        record |= discriminator_step(discriminator, generator, d_optimizer, pairs, skip, tau,
                                     rng, cfg)
        if record['d_acc'] is not None:
            running['d_acc'] = .9 * running['d_acc'] + .1 * record['d_acc']
        record['d_acc_mean'] = running['d_acc']
        lap('discriminator')

        # generator step
        if moving:
            running['g_steps'] += 1
            lr = cfg.lr * schedule(it, cfg.iters, running['g_steps'], 20)
            record |= gumbel_step(generator, reference, discriminator, optimizer, roll, batch,
                                  lr, tau, rng, cfg)
        seconds = lap('generator')

        # log
        log({**record, 'seconds': seconds}, it % LOG_INTERVAL == 0)
        if running['sick'] > 20:                     # iterations in a row
            answers = data.to_text(roll.response, roll.mask, enc)
            answer = max(answers, key=answers.count)
            log({'iter': it, 'collapsed': answer}, False)
            raise FloatingPointError(
                f'the answers collapsed by iteration {it} (distinct-2 {record["distinct2"]:.2f}, '
                f'longest run {record["longest_run"]:.0f}, many like {answer!r}): ckpt.pt is the '
                'last healthy one; give a lower --lr or a higher --anchor or --beta')

    if rank:
        return None
    figures = sample.finish({'warm start': reference, 'tuned': generator}, discriminator, dev_set,
                            enc, out, cfg)
    log({'final': figures}, False)
    print(f'peak memory {peak_memory(cfg.device):.2f} GiB', flush=True)
    return figures


def main(argv=None):
    """The command line: a user's mistake is one sentence and exit code 1, a signal 128 + it."""
    caught = catch_signals()
    try:
        train(parse(argv), caught)
    except (ValueError, OSError, FloatingPointError) as e:
        sys.exit(str(e))
    except torch.OutOfMemoryError:
        peak = torch.cuda.max_memory_allocated() / 2 ** 30
        sys.exit(f'CUDA is out of memory, {peak:.1f} GiB were reached: lower --micro_batch, then '
                 '--batch_size, --max_prompt or --sft_batch_size')
    if caught:
        sys.exit(128 + caught[0])


if __name__ == '__main__':
    main()
