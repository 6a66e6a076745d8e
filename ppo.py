"""
PPO: InstructGPT's objective with the discriminator's score in the reward model's place.

    max_G  E[ r(x, y) - beta log(pi(y | x) / pi_SFT(y | x)) ] + gamma E[ log pi(passage) ]
                            Ouyang et al. (2022), equation 2; an MLE anchor rides along
    step   mean_t min( w_t A_t, clip(w_t, 1 - eps, 1 + eps) A_t )      Schulman et al. (2017)
           w_t = pi / pi_old of token t, A_t by GAE from a critic      Schulman et al. (2016)
    max_D  E[ log sigmoid(s(x, y*) - s(x, y)) ]          or the minimax form, Goodfellow (2014)

$ python ppo.py --device cuda      GPT-2 124M on SQuAD 2.0
$ python ppo.py --tiny             a toy, on a CPU, in minutes

Left out on purpose: discounting (answers are short), a critic that shares the policy's trunk,
a replay of old rollouts.
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

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import sample
from model import (GPT, Discriminator, GPTConfig, Log, Stopwatch, adamw, all_sum, autocast,
                   catch_signals, gathered, hold_last, linear_in_float32,
                   load_checkpoint, open_device, open_folder, peak_memory, ranks, save, schedule,
                   shard, trim_freed_memory, update)

# -----------------------------------------------------------------------------
# config: every field is a flag, its comment is the flag's --help


@dataclass
class Config:
    # i/o
    out_dir: str = 'out/ppo'         # where checkpoints, metrics, curves and samples go
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
    # reward
    reward: Literal['margin', 'score', 'none'] = 'margin'  # see `reward`
    # ppo
    epochs: int = 1                  # passes over a rollout; few, for the reward moves with D
    minibatch: int = 64              # responses of an update, whole prompts' samples
    clip: float = 0.2                # epsilon: how far a ratio may leave 1, a value its old one
    lam: float = 0.95                # lambda of the advantage estimate; 1 trusts the returns alone
    critic_lr: float = 9e-6          # peak learning rate of the critic
    pretrain: float = 1.0            # gamma: weight of the likelihood of passages; 0 for none


TINY = dict(
    data='toy', init_from='scratch', n_layer=2, n_head=4, n_embd=64, max_prompt=26, max_response=6,
    device='cpu', sft_iters=100, sft_batch_size=64, sft_lr=4e-3, iters=450, batch_size=128,
    samples=2, micro_batch=256, beta=0.01, anchor=4.0, lr=4e-3, d_lr=2e-3,
    d_warmup_iters=250, d_warmup_acc=.93, d_max_acc=.95, d_dropout=0.0,
    eval_interval=25, minibatch=128, critic_lr=4e-3, pretrain=.7,
)
LOG_INTERVAL = 10            # iterations from one printed line to the next
NO_EOS_REWARD = -1.0         # in place of the reward of a response that does not end
APPROX_KL = .02              # a rollout is left when pi is so far from pi_old, nats per token
PASSAGES = 16                # of an update
SHARES = 'd_warmup_acc d_max_acc d_dropout lam'.split()             # lie in [0, 1]
ABOVE_0 = 'clip temperature'.split()  # may not be 0


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
    """Like `check`, of what is PPO's alone."""
    if cfg.minibatch > cfg.batch_size * cfg.samples:
        raise ValueError(f'--minibatch {cfg.minibatch} exceeds the rollout, --batch_size '
                         f'{cfg.batch_size} x --samples {cfg.samples}: lower it')


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


def gae(rewards, values, mask, lam):
    """
    Generalised advantage estimation without discount: A_t = sum_l lam^l delta_(t+l), where
    delta_t = r_t + V_(t+1) - V_t and V is 0 once the response is over (Schulman et al. 2016).

    rewards  (B, R); values (B, R) V(x, y_<t) of the critic; mask (B, R) True up to and with eos
    lam      in [0, 1]; at 1, A_t is the return-to-go minus V_t
    returns  advantages (B, R), returns (B, R) = A + V, the critic's target; 0 outside the mask
    """
    following = F.pad(values * mask, (0, 1))[:, 1:]                          # V_(t+1)
    deltas = (rewards + following - values) * mask
    advantage, columns = torch.zeros_like(deltas[:, 0]), []
    for delta in deltas.flip(1).unbind(1):
        advantage = delta + lam * advantage
        columns.append(advantage)
    advantages = torch.stack(columns[::-1], 1)
    return advantages, (advantages + values) * mask


def whiten(x, mask):
    """x (B, R) with mean 0 and deviation 1 over the mask, 0 outside it."""
    n = all_sum(mask.sum())
    centred = (x - all_sum((x * mask).sum()) / n) * mask
    return centred / (all_sum(centred.square().sum()) / n + 1e-8).sqrt()


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """
    -sum_t min(w A, clip(w, 1 - eps, 1 + eps) A), w = pi / pi_old (Schulman et al. 2017, eq. 7).

    logprobs      (B, R) log-probabilities of the sampled tokens, nats, with gradient
    old_logprobs  (B, R) the same before the rollout's first update, no gradient
    advantages    (B, R) no gradient; mask (B, R) True up to and including eos
    returns       a sum: divide it by the tokens of the whole minibatch
    """
    ratio = (logprobs - old_logprobs).exp()
    return -(torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
             * mask).sum()


def value_loss(values, old_values, returns, mask, clip):
    """
    Half the squared error of the critic, a sum over tokens, the worse of the value and of itself
    clipped to old_values +- clip: as in OpenAI's baselines. All (B, R); values with gradient.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.maximum((values - returns).square(), (clipped - returns).square())
    return .5 * (errors * mask).sum()


def passage_loss(generator, passages):
    """Mean -log pi of passages (B, T) after their first token, nats per token."""
    return -generator.logprobs(passages)[0].mean()


# -----------------------------------------------------------------------------
# rollout and evaluation


class Rollout(NamedTuple):
    prompt: torch.Tensor         # (B*K, P) ids, the K samples of a prompt side by side
    pad: torch.Tensor            # (B*K,) padding tokens on the left
    response: torch.Tensor       # (B*K, R) sampled ids
    mask: torch.Tensor           # (B*K, R) True up to and including eos
    ended: torch.Tensor          # (B*K,) whether eos came within R
    ref_logprobs: torch.Tensor   # (B*K, R) of the response under the reference, nats


class Critic(Discriminator):
    """V(x, y_<t), the return to expect before token t, by a network like the discriminator."""

    def forward(self, prompt, pad, response):
        """Values (B*K, R) of K responses, side by side, to each prompt (B, P), one for each token;
        each sees what stands to the left of its token."""
        x = self.trunk.response_hidden(prompt, pad, response)
        return linear_in_float32(x, self.score.weight, self.score.bias).squeeze(-1)

    def start_from(self, discriminator):
        """Takes its trunk, which can judge prefixes already, under a head that says 0."""
        self.trunk.load_state_dict(discriminator.trunk.state_dict())
        torch.nn.init.zeros_(self.score.weight)
        torch.nn.init.zeros_(self.score.bias)


@torch.no_grad()
def rollout(generator, reference, batch, eos, rng, cfg):
    """K samples of each prompt, over the full vocabulary, and what the reference thinks of them at
    the same temperature: the policy that samples is the policy that is scored."""
    with autocast(cfg):
        response, mask, _ = generator.generate(batch.prompt, batch.pad, cfg.max_response, eos,
                                               samples=cfg.samples,
                                               temperature=cfg.temperature, rng=rng)
        n = max(1, cfg.micro_batch // cfg.samples)
        parts = zip(batch.prompt.split(n), batch.pad.split(n), response.split(n * cfg.samples))
        ref_logprobs = torch.cat([reference.response_logprobs(*part, cfg.temperature)[0]
                                  for part in parts])
    prompt, pad = (z.repeat_interleave(cfg.samples, 0) for z in (batch.prompt, batch.pad))
    return Rollout(prompt, pad, response, mask, ((response == eos) & mask).any(1), ref_logprobs)


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


def discriminator_step(discriminator, optimizer, pairs, skip, cfg):
    """
    One update on pairs. Ties, whose sampled answer is the gold one, are left out.

    With d_prefixes the loss is the mean over all prefixes from the first difference on, an answer
    that is over keeping its last score; otherwise that of the whole answers.
    skip     measure only
    returns  dict: d_loss in nats, d_norm, d_acc (None if all tie), tie_rate
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
    losses, margins = [], []
    for rows in torch.arange(len(untied), device=untied.device).split(cfg.micro_batch):
        p = Pairs(*(z[rows] for z in pairs))
        with autocast(cfg), torch.set_grad_enabled(learn):
            response, mask = (torch.stack(z, 1).flatten(0, 1) for z in (
                (p.real, p.fake), (p.real_mask, p.fake_mask)))
            scores = hold_last(discriminator(p.prompt, p.pad, response), mask)   # (2 n, R)
            real, fake = scores[::2], scores[1::2]
            loss = (discriminator_loss(real, fake, cfg.d_loss) * weights[rows]).sum()
        if learn:
            loss.backward()
        losses.append(loss.detach())
        margins.append((real - fake)[:, -1].detach())
    discriminator.eval()
    d_norm = update(discriminator, optimizer, cfg.d_lr) if learn else None
    right = (torch.cat(margins) > 0)[untied]
    n_right, n_pairs, n_all = (all_sum(n) for n in (
        right.sum().item(), len(right), len(untied)))
    return {'d_loss': all_sum(sum(losses)).item() if all_sum(untied.sum()).item() else None,
            'd_norm': d_norm, 'd_acc': n_right / n_pairs if n_pairs else None,
            'tie_rate': 1 - n_pairs / n_all}


def reward(discriminator, roll, batch, cfg):
    """
    Rewards of the sampled answers, (B*K, R): 0 but at the last token, and the mean score in logits.

    margin  tanh((s - s*) / 2) = 2 sigmoid(s - s*) - 1, s* of the gold answer as far as that token:
            0 where the two cannot be told apart, -1 for a sure fake, however sure
    score   s itself, the poster's
    none    0: what is left is the KL penalty and the anchor
    An answer that does not end gets -1 in its place.
    """
    response, mask = (torch.cat((gold[:, None], sampled.unflatten(0, (-1, cfg.samples))), 1)
                      .flatten(0, 1) for gold, sampled in ((batch.response, roll.response),
                                                           (batch.mask, roll.mask)))
    scores = hold_last(score(discriminator, batch.prompt, batch.pad, response, cfg), mask)
    scores = scores.unflatten(0, (-1, cfg.samples + 1))                      # (B, 1 + K, R)
    gold, scores = scores[:, :1], scores[:, 1:]
    values = {'margin': ((scores - gold) / 2).tanh(), 'score': scores,
              'none': torch.zeros_like(scores)}[cfg.reward].flatten(0, 1)
    values = torch.where(roll.ended[:, None], values, NO_EOS_REWARD)
    last = roll.mask & ~F.pad(roll.mask[:, 1:], (0, 1))
    mean = all_sum(scores[..., -1].sum()).item() / len(values) / ranks()[1]
    return values * last, mean


@torch.no_grad()
def look_back(generator, critic, roll, cfg):
    """Log-probs and values (B, R) before the first update, from the forward pass of the updates
    (so that the first ratio is 1), and the mean entropy of the policy, nats per token."""
    K, parts = cfg.samples, []
    for rows in torch.arange(len(roll.response), device=roll.mask.device).split(cfg.micro_batch):
        part = roll.prompt[rows][::K], roll.pad[rows][::K], roll.response[rows]
        with autocast(cfg):
            parts.append((*generator.response_logprobs(*part, cfg.temperature), critic(*part)))
    logprobs, entropy, values = (torch.cat(z) for z in zip(*parts))
    return logprobs, values, all_sum((entropy * roll.mask).sum()) / all_sum(roll.mask.sum())


def ppo_update(generator, critic, optimizers, rows, past, roll, batch, passages, lrs, cfg):
    """
    One update of policy and critic on the responses `rows`, all K of each prompt side by side, in
    micro-batches.

    past      old_logprobs, old_values, advantages, returns, each (B*K, R)
    passages  (n, T) ids for the pretraining term; None for none
    returns   list of figures: g_loss, v_loss, mle, approx_kl, clip_fraction, g_norm (of policy
              loss and anchor), pretrain_norm (of the pretraining term), pretrain
    """
    K, params = cfg.samples, list(generator.parameters())
    n_tokens = all_sum(roll.mask[rows].sum())
    gold_tokens = all_sum(batch.mask[rows[::K] // K].sum())
    sums = torch.zeros(5, device=roll.mask.device)
    pretrain, pretrain_norm, kept = 0.0, 0.0, []
    if passages is not None:
        with autocast(cfg):
            loss = passage_loss(generator, passages) * len(passages) / PASSAGES
        (cfg.pretrain * loss).backward()
        pretrain, kept = all_sum(loss).item(), [p.grad for p in params]
        pretrain_norm = torch.nn.utils.get_total_norm([all_sum(g) for g in kept]).item()
        optimizers[0].zero_grad()
    for part in rows.split(cfg.micro_batch):
        r = Rollout(*(z[part] for z in roll))
        old_logprobs, old_values, advantages, returns = (z[part] for z in past)
        gold = data.Batch(*(z[part[::K] // K] for z in batch))
        with autocast(cfg):
            logprobs, _ = generator.response_logprobs(gold.prompt, gold.pad, r.response,
                                                      cfg.temperature)
            values = critic(gold.prompt, gold.pad, r.response)
            with torch.set_grad_enabled(cfg.anchor > 0):
                mle = mle_loss(generator, gold, gold_tokens)
        g_loss = clipped_policy_loss(logprobs, old_logprobs, advantages, r.mask,
                                     cfg.clip) / n_tokens
        v_loss = value_loss(values, old_values, returns, r.mask, cfg.clip) / n_tokens
        (g_loss + cfg.anchor * mle + v_loss).backward()
        with torch.no_grad():
            log_ratio = (logprobs - old_logprobs) * r.mask
            ratio = log_ratio.exp()
            approx_kl = (log_ratio.expm1() - log_ratio).sum() / n_tokens     # k3, Schulman 2020
            clipped = ((ratio - 1).abs() > cfg.clip).sum() / n_tokens
            sums += torch.stack((g_loss, v_loss, mle, approx_kl, clipped))
    g_norm = torch.nn.utils.get_total_norm([all_sum(p.grad) for p in params]).item()
    for p, grad in zip(params, kept):
        p.grad += grad
    for network, optimizer, lr in zip((generator, critic), optimizers, lrs):
        update(network, optimizer, lr)
    return [*all_sum(sums).tolist(), g_norm, pretrain_norm, pretrain]


def ppo_step(generator, critic, optimizers, roll, rewards, batch, passages, running, lrs,
             cfg):
    """
    Epochs of minibatch updates on one rollout, left early once pi is too far from pi_old.

    rewards   (B*K, R) of the discriminator; the KL penalty is taken off here
    passages  (N, T) ids; each update takes its own by the count in running
    returns   dict: the means of ppo_update's figures, and kl, entropy (nats per token)
              explained_variance of the returns by the old values, updates
    """
    old_logprobs, old_values, entropy = look_back(generator, critic, roll, cfg)
    log_ratio = (old_logprobs - roll.ref_logprobs) * roll.mask               # k1, (B*K, R)
    kl, mask = (all_sum(log_ratio.sum()) / all_sum(roll.mask.sum())).item(), roll.mask
    advantages, returns = gae(rewards - cfg.beta * log_ratio, old_values, mask, cfg.lam)
    old, new, seen = gathered(old_values, returns, mask)
    unexplained = ((new - old)[seen].var(correction=0)
                   / new[seen].var(correction=0).clamp(min=1e-8))
    past = old_logprobs, old_values, whiten(advantages, mask), returns
    figures = []
    K, columns = cfg.samples, torch.arange(cfg.samples)
    for _ in range(cfg.epochs):
        order = (torch.randperm(len(mask) // K)[:, None] * K + columns).flatten().to(mask.device)
        for rows in order.split(cfg.minibatch // ranks()[1]):
            drawn = None
            if cfg.pretrain:
                index = data.order(len(passages), PASSAGES, (cfg.seed, 2),
                                   running['updates'])
                drawn = torch.from_numpy(passages[shard(index)]).to(mask.device)
            figures.append(ppo_update(generator, critic, optimizers, rows, past, roll, batch, drawn,
                                      lrs, cfg))
            running['updates'] += 1
            if figures[-1][3] > APPROX_KL:
                break
        if figures[-1][3] > APPROX_KL:
            break
    names = 'g_loss v_loss mle approx_kl clip_fraction g_norm pretrain_norm pretrain'.split()
    record = dict(zip(names, np.mean(figures, 0).tolist()))
    record |= {'kl': kl, 'entropy': entropy.item(),
               'explained_variance': 1 - unexplained.item(), 'updates': len(figures)}
    return record


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
    passages = data.load_passages(train_set.examples, enc,
                                  cfg.max_prompt + cfg.max_response) if cfg.pretrain else None
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
    critic = Critic(generator).to(cfg.device).eval()
    optimizer, d_optimizer = adamw(generator), adamw(discriminator)
    critic_optimizer = adamw(critic)
    # d_acc starts at chance
    running = {'d_acc': .5, 'g_steps': 0, 'sick': 0, 'updates': 0}
    # resume
    if 'discriminator' in saved:
        generator.load_strictly(saved['model'], out / 'ckpt.pt')
        discriminator.load_state_dict(saved['discriminator'])
        optimizer.load_state_dict(saved['optimizer'])
        d_optimizer.load_state_dict(saved['d_optimizer'])
        critic.load_state_dict(saved['critic'])
        critic_optimizer.load_state_dict(saved['critic_optimizer'])
        running = saved['running']
    if cfg.compile:
        for network in reference, discriminator, critic:
            network.compile()

    for it in tqdm(range(saved.get('iter', 0), cfg.iters + 1), 'iterations', disable=None):
        # evaluate and checkpoint
        due = it % cfg.eval_interval == 0 or it == cfg.iters
        stop = all_sum(bool(caught)) > 0
        if (due or stop) and not running['sick']:
            save(out / 'ckpt.pt', generator, cfg, log, iter=it,
                 discriminator=discriminator.state_dict(),
                 optimizer=optimizer.state_dict(), d_optimizer=d_optimizer.state_dict(),
                 critic=critic.state_dict(), critic_optimizer=critic_optimizer.state_dict(),
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
        roll = rollout(generator, reference, batch, dev_set.eos, rng, cfg)
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
        record |= discriminator_step(discriminator, d_optimizer, pairs, skip, cfg)
        if record['d_acc'] is not None:
            running['d_acc'] = .9 * running['d_acc'] + .1 * record['d_acc']
        record['d_acc_mean'] = running['d_acc']
        lap('discriminator')

        # generator step
        rewards, record['reward'] = reward(discriminator, roll, batch, cfg)
        if moving:
            if running['g_steps'] == 0:
                critic.start_from(discriminator)
            running['g_steps'] += 1
            share = schedule(it, cfg.iters, running['g_steps'], 20)
            record |= ppo_step(generator, critic, (optimizer, critic_optimizer), roll, rewards,
                               batch, passages, running,
                               (cfg.lr * share, cfg.critic_lr * share), cfg)
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
