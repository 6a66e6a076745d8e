"""
PPO: InstructGPT's objective with the discriminator's score in the reward model's place.

    max_G  E[ r(x, y) - beta log(pi(y | x) / pi_SFT(y | x)) ] + gamma E[ log pi(passage) ]
                            Ouyang et al. (2022), equation 2; an MLE anchor rides along
    step   mean_t min( w_t A_t, clip(w_t, 1 - eps, 1 + eps) A_t )      Schulman et al. (2017)
           w_t = pi / pi_old of token t, A_t by GAE from a critic      Schulman et al. (2016)
    max_D  E[ log sigmoid(s(x, y*) - s(x, y)) ]          or the minimax form, Goodfellow (2014)

$ python ppo.py --device cuda      GPT-2 124M on SQuAD 2.0
$ python ppo.py --tiny             a toy, on a CPU, in minutes

Left out on purpose: discounting (answers are short), a critic that shares the policy's trunk.
"""

import argparse
import copy
import inspect
import re
import sys
from dataclasses import asdict, dataclass, fields
from typing import Literal, Optional, get_args

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import sample
from model import (GPT, Discriminator, GPTConfig, Log, adamw, all_sum, autocast, catch_signals,
                   gathered, hold_last, linear_in_float32, load_checkpoint, memory_full,
                   open_device, open_folder, ranks, save, schedule, settings_to_resume, shard,
                   update)

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
    samples: int = 4                 # K, answers to each prompt
    temperature: float = 1.0         # of rollouts, of the policy learned, and of evaluation
    micro_batch: int = 16            # prompts of one backward pass; lower it to save memory
    beta: float = 0.02               # weight of the KL from the warm start, per nat
    anchor: float = 0.1              # weight of MLE on the gold answers beside the score
    lr: float = 5e-6                 # peak learning rate of the generator
    # discriminator
    d_loss: Literal['pair', 'minimax'] = 'pair'  # relativistic on one prompt, or the poster's
    d_prefixes: bool = True          # learn the score of every prefix, not of whole answers alone
    d_lr: float = 1e-5               # its learning rate
    d_warmup_iters: int = 200        # at most so many iterations before the generator moves
    d_warmup_acc: float = 0.75       # or until the running pair accuracy is there; 1: never
    d_max_acc: float = 0.85          # it rests while the running pair accuracy is above; 1: never
    d_dropout: float = 0.1           # in its own step only
    # reward
    reward: Literal['margin', 'score', 'none'] = 'margin'  # over the gold answer's, or the score
    # ppo
    epochs: int = 1                  # passes over a rollout; few, for the reward moves with D
    minibatch: int = 16              # prompts of an update
    clip: float = 0.2                # epsilon: how far a ratio may leave 1, a value its old one
    lam: float = 0.95                # lambda of the advantage estimate; 1 trusts the returns alone
    critic_lr: float = 9e-6          # peak learning rate of the critic
    pretrain: float = 1.0            # gamma: weight of the likelihood of passages; 0 for none


TINY = dict(
    data='toy', init_from='scratch', n_layer=2, n_head=4, n_embd=64, max_prompt=26, max_response=6,
    device='cpu', sft_iters=90, sft_batch_size=64, sft_lr=4e-3, iters=300, batch_size=128,
    samples=2, micro_batch=128, beta=0.01, anchor=4.0, lr=4e-3, d_lr=2e-3,
    d_warmup_iters=250, d_warmup_acc=.93, d_max_acc=.95, d_dropout=0.0, eval_interval=25,
    minibatch=64, critic_lr=4e-3, pretrain=.7,
)
FROM_0 = 'seed', 'sft_iters', 'iters', 'd_warmup_iters'     # other whole numbers are from 1
BOUNDS = dict(d_warmup_acc=(0, 1), d_max_acc=(0, 1), d_dropout=(0, 1), temperature=(.01, 1e9),
              clip=(.001, 1e9), lam=(0, 1))
NO_EOS_REWARD = -1.0                 # of an answer that does not end
APPROX_KL = .02                      # a rollout is left when pi is so far from pi_old, nats a token
PASSAGES = 16                        # of an update


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
            kind = dict(type=f.type)
        parser.add_argument('--' + f.name, default=argparse.SUPPRESS,
                            help=f'{notes[f.name]} (default: {f.default})', **kind)
    given = vars(parser.parse_args(argv))
    settings = dict(TINY) if given.get('tiny') else {}
    if given.get('resume'):
        given.setdefault('out_dir', Config.out_dir)
        settings = settings_to_resume(given, Config.__dataclass_fields__.keys())
    cfg = Config(**{**settings, **given})
    check(cfg)
    return cfg


def check(cfg):
    """Raises a ValueError naming the flag, its value and the remedy."""
    for name, value in asdict(cfg).items():
        if type(value) in (int, float):
            from_1 = type(value) is int and name not in FROM_0
            least, most = BOUNDS.get(name, (int(from_1), 2 ** 63 - 1))
            if not least <= value <= most:
                raise ValueError(f'--{name} {value}: give a number from {least} to {most}')
    if cfg.resume and cfg.overwrite:
        raise ValueError('--resume with --overwrite: give one of them')
    check_approach(cfg)


def check_approach(cfg):
    """Like `check`, of what is PPO's alone."""
    if cfg.minibatch > cfg.batch_size:
        raise ValueError(f'--minibatch {cfg.minibatch} exceeds the rollout, --batch_size '
                         f'{cfg.batch_size}: lower it')



# -----------------------------------------------------------------------------
# losses: functions of tensors


def discriminator_loss(real, fake, kind):
    """
    What the discriminator minimises, elementwise, in nats.

    real, fake  scores, logits, of a gold and of a sampled answer to one prompt; they broadcast
    kind        pair: -log sigmoid(real - fake), Jolicoeur-Martineau 2019;
                minimax: -log D(real) - log(1 - D(fake)), D = sigmoid(score), Goodfellow 2014
    """
    if kind == 'pair':
        return F.softplus(fake - real)
    return F.softplus(-real) + F.softplus(fake)


def compared(response, mask, gold, gold_mask, prefixes):
    """
    Where samples (B, K, R) and gold answers (B, R) are to be told apart, (B, K, R) bool: nowhere in
    a tie; with prefixes, from the first difference to the end of the longer answer; else at the
    last column, where both are over. All places of a batch weigh the same: by shares of its pair, a
    prefix would weigh by what comes after it.
    """
    differ = (response != gold[:, None]).cumsum(-1) > 0
    if prefixes:
        return differ & (mask | gold_mask[:, None])
    return F.pad(differ[..., -1:], (differ.size(-1) - 1, 0))


def gae(rewards, values, mask, lam):
    """
    Generalised advantage estimation without discount: A_t = sum_l lam^l delta_(t+l), where
    delta_t = r_t + V_(t+1) - V_t and V is 0 once the answer is over (Schulman et al. 2016).

    rewards, values, mask  (B, K, R), with V(x, y_<t) of the critic
    returns  advantages, and returns = A + V, the critic's target; (B, K, R), 0 outside the mask
    """
    following = F.pad(values * mask, (0, 1))[..., 1:]                        # V_(t+1)
    advantages = (rewards + following - values) * mask                       # delta_t so far
    for t in reversed(range(mask.size(-1) - 1)):
        advantages[..., t] += lam * advantages[..., t + 1]
    return advantages, (advantages + values) * mask


def centre(x, mask):
    """x (B, K, R) less its mean over the mask, 0 outside it. Dividing by the deviation too, as is
    usual, would blow up noise where nearly all answers equal the gold one."""
    return (x - all_sum((x * mask).sum()) / all_sum(mask.sum())) * mask


def clipped_policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """
    -sum_t min(w A, clip(w, 1 - eps, 1 + eps) A), w = pi / pi_old (Schulman et al. 2017, eq. 7).

    logprobs      (B, K, R) log-probabilities of the sampled tokens, nats, with gradient
    old_logprobs  (B, K, R) before the rollout's first update; as advantages, without gradient
    returns       a sum: divide it by the tokens of the whole minibatch
    """
    ratio = ((logprobs - old_logprobs) * mask).exp()
    return -(torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
             * mask).sum()


def value_loss(values, old_values, returns, mask, clip):
    """
    Half the squared error of the critic, a sum over tokens, the worse of the value and of itself
    clipped to old_values +- clip: as in OpenAI's baselines. All (B, K, R); values with gradient.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.maximum((values - returns).square(), (clipped - returns).square())
    return .5 * (errors * mask).sum()


# -----------------------------------------------------------------------------
# scores and rewards


def beside_gold(batch, roll):
    """The gold answer and, after it, the samples of each prompt: ids and mask (B, 1 + K, R)."""
    return (torch.cat((batch.response[:, None], roll.response), 1),
            torch.cat((batch.mask[:, None], roll.mask), 1))


def score(discriminator, batch, response, mask, cfg):
    """Scores s_t, logits, of N answers to each prompt, (B, N, R) ids or (B, N, R, V) one-hots:
    (B, N, R), where an answer that is over keeps its last."""
    with autocast(cfg):
        return hold_last(discriminator(batch.prompt, batch.pad, response), mask)


@torch.no_grad()
def reward(discriminator, batch, roll, cfg):
    """
    Rewards of the sampled answers, (B, K, R), 0 but at the last token; the mean score in logits.

    margin  tanh((s - s*) / 2) = 2 sigmoid(s - s*) - 1, s* of the gold answer as far as that token,
            or of all of it where prefixes have no score: 0 where the two cannot be told apart, -1
            for a sure fake, however sure
    score   s itself, the poster's
    none    0: what is left is the KL penalty and the anchor
    Whichever it is, an answer that does not end gets -1.
    """
    scores = torch.cat([score(discriminator, part, *beside_gold(part, r), cfg)
                        for part, r in data.parts(cfg.micro_batch, batch, roll)])
    gold, scores = scores[:, :1], scores[:, 1:]                              # (B, 1, R), (B, K, R)
    if not cfg.d_prefixes:
        gold = gold[..., -1:]
    values = {'margin': ((scores - gold) / 2).tanh(), 'score': scores,
              'none': torch.zeros_like(scores)}[cfg.reward]
    values = torch.where(roll.ended[..., None], values, NO_EOS_REWARD)
    last = roll.mask & ~F.pad(roll.mask[..., 1:], (0, 1))
    return values * last, all_sum(scores[..., -1].mean()).item() / ranks()[1]


# -----------------------------------------------------------------------------
# training


def mle_gradient(generator, batch, weight, cfg):
    """Adds the gradient of weight x -log pi of a Batch's gold answers with their eos, in
    micro-batches; returns -log pi, nats per token of all ranks."""
    n_tokens, total = all_sum(batch.mask.sum()), torch.zeros((), device=batch.mask.device)
    for part, in data.parts(cfg.micro_batch, batch):
        with autocast(cfg):
            logprobs, _ = generator.response_logprobs(part.prompt, part.pad, part.response[:, None])
        loss = -(logprobs[:, 0] * part.mask).sum() / n_tokens
        (weight * loss).backward()
        total += loss.detach()
    return all_sum(total).item()


def mle_step(generator, optimizer, train_set, stream, step, steps, cfg):
    """MLE update number `step` of `steps`; dict: mle, the loss in nats per token, mle_norm, lr. The
    stream of batches: 0 a warm start's; 1 is the rollouts', 2 the passages', 3 a control's."""
    index = data.order(len(train_set), cfg.sft_batch_size, (cfg.seed, stream), step)
    lr = cfg.sft_lr * schedule(step, steps)
    loss = mle_gradient(generator, train_set.batch(shard(index), cfg.device), 1.0, cfg)
    return {'mle': loss, 'mle_norm': update(generator, optimizer, lr), 'lr': lr}


def discriminator_step(discriminator, optimizer, batch, roll, learn, cfg):
    """
    One update on all pairs of a gold and a sampled answer that differ.

    learn    False to measure only
    returns  dict: d_loss in nats per prefix, d_norm, d_acc (None if all tie), tie_rate
    """
    where = compared(*roll[:2], *batch[2:], cfg.d_prefixes)                  # (B, K, R)
    n, n_pairs = where[..., 0].numel() * ranks()[1], all_sum(where.any(-1).sum()).item()
    n_places = max(all_sum(where.sum()).item(), 1)
    learn = learn and n_pairs > 0
    discriminator.train(learn)
    sums = torch.zeros(2, device=where.device)
    for part, r, w in data.parts(cfg.micro_batch, batch, roll, where):
        with torch.set_grad_enabled(learn):
            scores = score(discriminator, part, *beside_gold(part, r), cfg)  # (b, 1 + K, R)
            real, fake = scores[:, :1], scores[:, 1:]
            loss = (discriminator_loss(real, fake, cfg.d_loss) * w).sum() / n_places
        if learn:
            loss.backward()
        right = ((real - fake)[..., -1].sign() + 1) / 2 * w.any(-1)          # .5 of equal scores
        sums += torch.stack((loss.detach(), right.sum()))
    discriminator.eval()
    d_norm = update(discriminator, optimizer, cfg.d_lr) if learn else None
    d_loss, n_right = all_sum(sums).tolist()
    return {'d_loss': d_loss if n_pairs else None, 'd_norm': d_norm,
            'd_acc': n_right / n_pairs if n_pairs else None, 'tie_rate': 1 - n_pairs / n}


class Critic(Discriminator):
    """V(x, y_<t), the return to expect before token t, by a network like the discriminator."""

    def forward(self, prompt, pad, response):
        """Values (B, K, R) of answers (B, K, R); each sees what stands left of its token."""
        x = self.trunk.response_hidden(prompt, pad, response)
        return linear_in_float32(x, self.score.weight, self.score.bias)[..., 0]


@torch.no_grad()
def look_back(generator, reference, critic, batch, roll, cfg):
    """Log-probs, the reference's, values and entropies (B, K, R) before the first update, in the
    updates' micro-batches, so that the first ratio is 1 but for rounding in bfloat16."""
    kept = []
    for part, r in data.parts(cfg.micro_batch, batch, roll):
        answers = part.prompt, part.pad, r.response
        with autocast(cfg):
            logprobs, entropy = generator.response_logprobs(*answers, cfg.temperature,
                                                            entropy=True)
            ref_logprobs, _ = reference.response_logprobs(*answers, cfg.temperature)
            kept.append((logprobs, ref_logprobs, critic(*answers), entropy))
    return [torch.cat(z) for z in zip(*kept)]


def ppo_update(generator, critic, optimizers, batch, roll, past, passages, lrs, cfg):
    """
    One update of policy and critic on a minibatch, in micro-batches.

    past      log-probs, values, advantages and returns of the rollout, each (B, K, R)
    passages  a Batch for the pretraining term; None for none
    returns   dict: g_loss, v_loss, approx_kl, mle, pretrain, g_norm, v_norm
    """
    n_tokens = all_sum(roll.mask.sum())
    sums = torch.zeros(3, device=roll.mask.device)
    for part, r, *old in data.parts(cfg.micro_batch, batch, roll, *past):
        old_logprobs, old_values, advantages, returns = old
        answers = part.prompt, part.pad, r.response
        with autocast(cfg):
            logprobs, _ = generator.response_logprobs(*answers, cfg.temperature)
        g_loss = clipped_policy_loss(logprobs, old_logprobs, advantages, r.mask,
                                     cfg.clip) / n_tokens
        g_loss.backward()
        with autocast(cfg):
            values = critic(*answers)
        v_loss = value_loss(values, old_values, returns, r.mask, cfg.clip) / n_tokens
        v_loss.backward()
        log_ratio = (logprobs.detach() - old_logprobs) * r.mask
        approx_kl = (log_ratio.expm1() - log_ratio).sum() / n_tokens         # k3, Schulman 2020
        sums += torch.stack((g_loss.detach(), v_loss.detach(), approx_kl))
    figures = dict(zip(('g_loss', 'v_loss', 'approx_kl'), all_sum(sums).tolist()))
    if cfg.anchor:
        figures['mle'] = mle_gradient(generator, batch, cfg.anchor, cfg)
    if passages is not None:
        figures['pretrain'] = mle_gradient(generator, passages, cfg.pretrain, cfg)
    figures['g_norm'] = update(generator, optimizers[0], lrs[0])
    figures['v_norm'] = update(critic, optimizers[1], lrs[1])
    return figures


def ppo_step(generator, reference, critic, optimizers, batch, roll, rewards, passages, running, lrs,
             cfg):
    """
    Epochs of minibatch updates on one rollout, left early once pi is too far from pi_old.

    rewards   (B, K, R) of the discriminator; the KL penalty is taken off here
    passages  (N, T) ids; each update takes its own by the count in running; None for none
    returns   dict: the means of ppo_update's figures, kl and entropy (nats per token), updates
    """
    logprobs, ref_logprobs, values, entropy = look_back(generator, reference, critic, batch, roll,
                                                        cfg)
    mask, log_ratio = roll.mask, (logprobs - ref_logprobs) * roll.mask
    advantages, returns = gae(rewards - cfg.beta * log_ratio, values, mask, cfg.lam)
    past = logprobs, values, centre(advantages, mask), returns
    # k1 of Schulman 2020, whose mean is the KL; k3 explodes where pi is far below the reference
    kl, entropy = (all_sum((z * mask).sum()).item() / all_sum(mask.sum()).item()
                   for z in (log_ratio, entropy))
    minibatches = [rows for _ in range(cfg.epochs)
                   for rows in torch.randperm(len(mask)).split(cfg.minibatch // ranks()[1])]
    figures = []
    for rows in minibatches:
        drawn = None
        if passages is not None:
            index = data.order(len(passages), PASSAGES, (cfg.seed, 2), running['updates'])
            drawn = data.passage_batch(passages[shard(index)], cfg.device)
        part, r, *old = (data.take(z, rows.to(mask.device)) for z in (batch, roll, *past))
        figures.append(ppo_update(generator, critic, optimizers, part, r, old, drawn, lrs, cfg))
        running['updates'] += 1
        if figures[-1]['approx_kl'] > APPROX_KL:
            break
    record = {name: sum(f[name] for f in figures) / len(figures) for name in figures[0]}
    return record | {'kl': kl, 'entropy': entropy, 'updates': len(figures)}


def load_generator(cfg, enc):
    """The generator that --init_from names, on the device."""
    if cfg.init_from == 'scratch':
        generator = GPT(GPTConfig(max(cfg.max_prompt + cfg.max_response, 2), enc.n_vocab,
                                  cfg.n_layer, cfg.n_head, cfg.n_embd))
    else:
        generator = GPT.from_pretrained(cfg.init_from)
    data.check_fit(generator.config, enc, cfg)
    return generator.to(cfg.device).eval()


def warm_start(generator, train_set, stream, out, log, caught, cfg):
    """MLE on gold answers up to out/sft.pt, resumed from there; False if a signal cut it short."""
    path, optimizer, start = out / 'sft.pt', adamw(generator), 0
    if cfg.resume and path.exists():
        saved = load_checkpoint(path)
        generator.load_state_dict(saved['model'])
        start = saved['sft_iter']
        if start < cfg.sft_iters:
            optimizer.load_state_dict(saved['optimizer'])
    for step in tqdm(range(start, cfg.sft_iters + 1), 'warm start', disable=None):
        stop, over = all_sum(bool(caught)) > 0, step == cfg.sft_iters
        if stop or over or step % cfg.eval_interval == 0:
            save(path, generator, log, sft_iter=step,
                 optimizer=None if over else optimizer.state_dict())
        if stop:
            return False
        if not over:
            log({'sft_iter': step, **mle_step(generator, optimizer, train_set, stream, step,
                                              cfg.sft_iters, cfg)})
    return True


def train(cfg, caught=()):
    """
    Warm start, adversarial stage, evaluation; writes everything into out_dir.

    caught   a list that a signal handler fills; once it is not empty, train saves and returns None
    returns  dict: the final figures of `warm start` and `tuned`; on rank 0
    raises   ValueError, OSError, FloatingPointError: one sentence for the user
    """
    # setup
    given = open_device(cfg)
    out, lock = open_folder(cfg)                     # the lock holds as long as it is kept
    rank = ranks()[0]
    torch.manual_seed(cfg.seed)
    # data and models
    enc, train_set, dev_set = data.load(cfg)
    generator = load_generator(cfg, enc)
    passages = data.load_passages(train_set.examples, enc, cfg.max_prompt + cfg.max_response
                                  ) if cfg.pretrain else None
    reference = copy.deepcopy(generator).requires_grad_(False)               # before it is compiled
    if cfg.compile:
        generator.compile()
    # warm start
    files = [out / 'ckpt.pt', out / 'sft.pt'] if cfg.resume else []
    saved = next((load_checkpoint(file) for file in files if file.exists()), {})
    log = Log(out, cfg, given, saved.get('log_size', 0))
    if not warm_start(generator, train_set, 0, out, log, caught, cfg):
        return None
    reference.load_state_dict(generator.state_dict())
    discriminator = Discriminator(generator, cfg.d_dropout).to(cfg.device).eval()
    critic = Critic(generator).to(cfg.device).eval()
    optimizer, d_optimizer = adamw(generator), adamw(discriminator)
    critic_optimizer = adamw(critic)
    stateful = dict(discriminator=discriminator, optimizer=optimizer, d_optimizer=d_optimizer,
                    critic=critic, critic_optimizer=critic_optimizer)
    running = {'d_acc': .5, 'start': None, 'sick': 0, 'updates': 0}          # d_acc: chance
    # resume
    if 'running' in saved:
        generator.load_state_dict(saved['model'])
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
        running = saved['running']
    if cfg.compile:
        for network in reference, discriminator.trunk, critic.trunk:
            network.compile()

    for it in tqdm(range(saved.get('iter', 0), cfg.iters + 1), 'iterations', disable=None):
        # evaluate and checkpoint
        due = it % cfg.eval_interval == 0 or it == cfg.iters
        stop = all_sum(bool(caught)) > 0
        if stop or it == cfg.iters or (due and not running['sick']):
            save(out / 'ckpt.pt', generator, log, iter=it, running=running,
                 **{name: part.state_dict() for name, part in stateful.items()})
        if due and rank == 0:
            figures, _ = sample.evaluate_run(generator, discriminator, dev_set, enc, cfg)
            log({'iter': it, 'dev': figures})
            sample.draw({'this run': [sample.read_run(out)]}, out / 'curves.png')
        if stop:
            return None
        if it == cfg.iters:
            break

        # rollout
        log.lap()
        # of dropout and of sampling, so that a resumed run draws the same
        torch.manual_seed(hash((cfg.seed, it)) % 2 ** 31 + rank)
        rng = torch.Generator(cfg.device).manual_seed(hash((cfg.seed, it, 1)) % 2 ** 31 + rank)
        index = data.order(len(train_set), cfg.batch_size, (cfg.seed, 1), it)
        batch = train_set.batch(shard(index), cfg.device)
        with autocast(cfg):
            roll = generator.generate(batch.prompt, batch.pad, cfg.max_response, dev_set.eos,
                                      cfg.samples, cfg.temperature, rng=rng)
        record = {'iter': it, **data.health(*gathered(*roll, *batch[2:]))}
        running['sick'] = running['sick'] + 1 if record.pop('sick') else 0
        log.lap('rollout')

        # discriminator step
        moving = (running['start'] is not None or running['d_acc'] >= cfg.d_warmup_acc
                  or it >= cfg.d_warmup_iters)
        learn = not moving or running['d_acc'] <= cfg.d_max_acc
        record |= discriminator_step(discriminator, d_optimizer, batch, roll, learn, cfg)
        if record['d_acc'] is not None:
            running['d_acc'] = .9 * running['d_acc'] + .1 * record['d_acc']
        record['d_acc_mean'] = running['d_acc']
        log.lap('discriminator')

        # generator step
        rewards, record['reward'] = reward(discriminator, batch, roll, cfg)
        if moving:
            if running['start'] is None:             # the discriminator's trunk knows prefixes
                running['start'] = it
                critic.load_state_dict(discriminator.state_dict())
                torch.nn.init.zeros_(critic.score.weight)
                torch.nn.init.zeros_(critic.score.bias)
            share = schedule(it - running['start'], cfg.iters - running['start'])
            record['lr'] = cfg.lr * share
            record |= ppo_step(generator, reference, critic, (optimizer, critic_optimizer), batch,
                               roll, rewards, passages, running,
                               (record['lr'], cfg.critic_lr * share), cfg)
        log.lap('generator')

        # log
        log({**record, 'seconds': log.seconds})
        if running['sick'] > 20:                     # iterations in a row
            log.collapsed(it, data.to_text(roll.response[:, 0], roll.mask[:, 0], enc))

    if rank:
        return None
    figures = sample.finish({'warm start': reference, 'tuned': generator}, discriminator, dev_set,
                            enc, out, cfg)
    log({'final': figures})
    return figures


def main(argv=None):
    """The command line: a user's mistake is one sentence and exit code 1, a signal 128 + it."""
    caught = catch_signals()
    try:
        train(parse(argv), caught)
    except (ValueError, OSError, FloatingPointError) as e:
        sys.exit(str(e))
    except torch.OutOfMemoryError:
        sys.exit(memory_full())
    if caught:
        sys.exit(128 + caught[0])


if __name__ == '__main__':
    main()
