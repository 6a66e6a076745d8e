"""
PPO: InstructGPT's objective with the discriminator's score in the reward model's place.

    max_G  E[ r(x, y) - beta log(pi(y | x) / pi_SFT(y | x)) ] + gamma E[ log pi(passage_t) ]
                            Ouyang et al. (2022), equation 2; an MLE anchor rides along
    step   E[ sum_t min(w_t A_t, clip(w_t, 1 - eps, 1 + eps) A_t) ]    Schulman et al. (2017)
           w_t = pi / pi_old of token t, A_t by GAE from a critic      Schulman et al. (2016)
    max_D  E[ log sigmoid(s(x, y*) - s(x, y)) ]          or the minimax form, Goodfellow (2014)

$ python ppo.py --device cuda      GPT-2 124M on SQuAD 2.0
$ python ppo.py --tiny             a toy, on a CPU, in minutes

Left out on purpose: discounting (answers are short), a critic that shares the policy's trunk.
"""

import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple, Optional

import torch
import torch.nn.functional as F

import data
import sample
from model import (Discriminator, Log, adamw, all_sum, autocast, gathered, hold_last,
                   linear_in_float32, load_checkpoint, load_networks, main, margin, open_device,
                   open_folder, progress, rank, save, schedule, shard, signalled, update, world)

# -----------------------------------------------------------------------------
# config: every field is a flag, its comment is the flag's --help

@dataclass
class Config:
    script = 'ppo'                   # no flag: whose runs it resumes; a fork's own
    # i/o
    out_dir: str = 'out/ppo'         # where checkpoints, metrics, curves and samples go
    seed: int = 1                    # of new weights, the order of examples, the sampling noise
    device: str = 'auto'             # cuda, cuda:1, mps, cpu; auto takes the first there is
    dtype: Literal['auto', 'bfloat16', 'float32'] = 'auto'  # of activations; auto: bfloat16 on CUDA
    compile: Optional[bool] = None   # torch.compile; None: on CUDA only
    resume: bool = False             # go on from out_dir, with its settings; flags given here win
    overwrite: bool = False          # start anew in an out_dir that holds a run
    wandb: bool = False              # Weights & Biases gets what metrics.jsonl does
    tiny: bool = False               # toy-ways and its settings: CPU, no downloads, minutes
    eval_interval: int = 100         # steps between evaluations, and checkpoints
    eval_prompts: int = 2000         # dev prompts of an evaluation; metrics take all gold answers
    # data
    data: str = 'squad_v2'           # squad_v2, squad, toy[-varied|-ways]; own.jsonl, .csv, folder
    context: bool = True             # put the passage into the prompt; README's poster did not
    max_prompt: int = 256            # P, tokens
    max_response: int = 32           # R, tokens, with <|endoftext|>
    # model
    init_from: str = 'gpt2'          # gpt2[-medium|-large|-xl], distilgpt2, a path, or scratch
    n_layer: int = 12                # layers, with --init_from scratch
    n_head: int = 12                 # heads of a layer, with --init_from scratch
    n_embd: int = 768                # channels, with --init_from scratch
    # warm start
    sft_iters: int = 8000            # MLE steps on first gold answers; 0 for none
    sft_batch_size: int = 32         # examples of an MLE step
    sft_lr: float = 3e-5             # peak learning rate of the warm start
    sft_dropout: float = 0.0         # of the generator, in the warm start
    # adversarial stage
    iters: int = 2000                # rollouts
    batch_size: int = 64             # prompts of a rollout
    samples: int = 4                 # K, answers to each prompt
    temperature: float = 1.0         # of rollouts, of the policy learned, and of evaluation
    micro_batch: int = 0             # prompts of a backward pass; 0: 64 on a card of 40 GB, else 16
    beta: float = 0.02               # weight of the KL from the warm start, per nat
    anchor: float = 0.03             # weight of MLE on a gold answer, the sum over its tokens
    lr: float = 5e-6                 # peak learning rate of the generator
    # discriminator
    d_init_from: str = ''            # its trunk: '' for the generator's; else as --init_from
    d_n_layer: int = 12              # layers, with --d_init_from scratch
    d_n_head: int = 12               # heads of a layer, with --d_init_from scratch
    d_n_embd: int = 768              # channels, with --d_init_from scratch
    d_loss: Literal['pair', 'minimax'] = 'pair'  # relativistic on one prompt, or the poster's
    d_prefixes: bool = True          # learn the score of every prefix, not of whole answers alone
    d_lr: float = 5e-5               # learning rate of the discriminator
    d_warmup_iters: int = 500        # at most so many iterations until the generator moves
    d_warmup_acc: float = 0.65       # it moves sooner at this running pair accuracy; 1: never
    d_dropout: float = 0.1           # of the discriminator, as it learns
    reward: Literal['margin', 'score', 'match', 'random', 'random-score'] = 'margin'  # or a control
    # ppo
    epochs: int = 1                  # passes over a rollout; few, for the reward moves with D
    minibatch: int = 16              # prompts of an update
    clip: float = 0.2                # epsilon: of ratios around 1, and of values around old ones
    lam: float = 0.95                # lambda of the advantage estimate; 1 trusts the returns alone
    critic_lr: float = 9e-6          # peak learning rate of the critic
    pretrain: float = 0.1            # gamma: weight of the likelihood of passages; 0 for none


TINY = dict(
    data='toy-ways', init_from='scratch', n_layer=1, n_head=2, n_embd=16, max_prompt=7,
    max_response=9, device='cpu', sft_iters=2000, sft_batch_size=64, sft_lr=2e-2, iters=650,
    batch_size=64, samples=4, micro_batch=64, beta=0.0, anchor=0.0, lr=3e-4,
    d_init_from='scratch', d_n_layer=2, d_n_head=4, d_n_embd=64, d_prefixes=False, d_lr=2e-3,
    d_warmup_iters=400, d_warmup_acc=1.0, d_dropout=0.0, eval_interval=50,
    eval_prompts=500, reward='score', minibatch=32, critic_lr=2e-3, pretrain=0.0)
BOUNDS = dict(seed=(0, 2 ** 32 - 1), micro_batch=(0, None), sft_iters=(0, None), iters=(0, None),
              d_warmup_iters=(0, None), d_warmup_acc=(0, 1), d_dropout=(0, 1),
              sft_dropout=(0, 1), temperature=(.01, 1e9), clip=(.001, 1e9), lam=(0, 1))


def check(cfg):
    """Raises a ValueError naming the flag, its value and the remedy."""
    if cfg.minibatch > cfg.batch_size:
        raise ValueError(f'--minibatch {cfg.minibatch}: give at most --batch_size {cfg.batch_size}')


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
    last column, where both, filled up with eos, are over. All weigh the same, for by the length of
    its pair a prefix's weight would depend on tokens that are not in it.
    """
    differ = (response != gold[:, None]).cumsum(-1) > 0
    if prefixes:
        return differ & (mask | gold_mask[:, None])
    whole = torch.zeros_like(differ)
    whole[..., -1] = differ[..., -1]
    return whole


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
    old_logprobs  (B, K, R) before the rollout's first update; no gradient, nor have advantages
    returns       a sum: divide it by the number of samples, a constant, not by their tokens
    """
    ratio = ((logprobs - old_logprobs) * mask).exp()
    return -(torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
             * mask).sum()


def value_loss(values, old_values, returns, mask, clip):
    """
    Half the squared error of the critic, summed over tokens: of the value or of the value clipped
    to old_values +- clip, whichever is larger, as in OpenAI's baselines. All (B, K, R).
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.maximum((values - returns).square(), (clipped - returns).square())
    return .5 * (errors * mask).sum()


# -----------------------------------------------------------------------------
# scores and rewards

def score(discriminator, batch, roll, cfg):
    """Scores s_t, logits, of the gold answer and, after it, the samples of each prompt:
    (B, 1 + K, R), where an answer that is over keeps its last."""
    response, mask, _ = data.beside_gold(batch, roll)
    with autocast(cfg):
        return hold_last(discriminator(batch.prompt, batch.pad, response), mask)


def reward(scores, batch, roll, cfg):
    """
    Rewards of the sampled answers, (B, K, R), 0 but at the last token; scores (B, 1 + K, R).

    margin  tanh((s - s*) / 2), s* the gold answer's score: see model.margin
    score   s itself, the poster's, of answers that do not end, too
    match   0 for the gold answer, -1 else: a control that reads no score
    random, random-score  margins or scores dealt out at random among a rank's samples: controls
    """
    values = margin(scores, *data.beside_gold(batch, roll), cfg.d_prefixes)      # (B, K)
    if cfg.reward.endswith('score'):
        values = scores[:, 1:, -1]
    if cfg.reward == 'match':
        values = (roll.response == batch.response[:, None]).all(-1).float() - 1
    if cfg.reward.startswith('random'):
        values = values.flatten()[torch.randperm(values.numel())].view_as(values)
    last = roll.mask & ~F.pad(roll.mask[..., 1:], (0, 1))
    return values[..., None] * last


# -----------------------------------------------------------------------------
# training

def mle_gradient(generator, batch, weight, cfg):
    """Adds this rank's gradient of weight times the sum of -log pi over the tokens of a Batch's
    gold answers or passages, in micro-batches; the mean over all ranks' tokens, in nats, ()."""
    total = torch.zeros((), device=batch.mask.device)
    for part, in data.parts(cfg.micro_batch, batch):
        with autocast(cfg):
            logprobs, _ = generator.response_logprobs(part.prompt, part.pad, part.response[:, None])
        loss = -(logprobs[:, 0] * part.mask).sum()
        (weight * loss).backward()
        total += loss.detach()
    return all_sum(total) / all_sum(batch.mask.sum())


def mle_step(generator, optimizer, train_set, step, cfg):
    """Update number `step` of the warm start; dict: mle, in nats per token, mle_norm, lr."""
    index = data.order(len(train_set), cfg.sft_batch_size, (cfg.seed, 0), step)     # stream 0
    lr = cfg.sft_lr * schedule(step, cfg.sft_iters)
    batch = train_set.batch(shard(index), cfg.device)
    torch.manual_seed(hash((cfg.seed, step, 2)) % 2 ** 31 + rank())  # dropout's, in a resume too
    generator.train(cfg.sft_dropout > 0)             # if it must: a mode is one more compiled graph
    loss = mle_gradient(generator, batch, 1 / all_sum(batch.mask.sum()), cfg)
    generator.eval()
    return {'mle': loss, 'mle_norm': update(generator, optimizer, lr), 'lr': lr}


def discriminator_step(discriminator, optimizer, batch, roll, cfg):
    """
    Scores the answers, without dropout, and then takes a step on the pairs that differ.

    returns  the scores (B, 1 + K, R); dict: d_loss (of them, in nats per prefix, None if all tie),
             d_norm, and what `data.told` tells
    """
    where, kept = compared(roll.response, roll.mask, batch.response, batch.mask, cfg.d_prefixes), []
    n_places = all_sum(where.sum()).item()
    for part, r, w in data.parts(cfg.micro_batch, batch, roll, where):
        with torch.no_grad():
            kept.append(score(discriminator.eval(), part, r, cfg))           # (b, 1 + K, R)
        if n_places:
            scores = score(discriminator.train(), part, r, cfg)
            loss = discriminator_loss(scores[:, :1], scores[:, 1:], cfg.d_loss) * w
            (loss.sum() / n_places).backward()
    discriminator.eval()
    scores = torch.cat(kept)
    loss = discriminator_loss(scores[:, :1], scores[:, 1:], cfg.d_loss) * where
    d_loss = all_sum(loss.sum()) / n_places if n_places else None
    d_norm = update(discriminator, optimizer, cfg.d_lr) if n_places else None
    figures = data.told(*gathered(scores, where.any(-1)))
    return scores, figures | {'d_loss': d_loss, 'd_norm': d_norm}


PASSAGES = 16                        # of one update
APPROX_KL = .02                      # farther from pi_old, nats a token, a rollout's updates end


class Critic(Discriminator):
    """V(x, y_<t), the return to expect before token t: by a discriminator's trunk and scalar head,
    inherited, which starts at zero."""

    def forward(self, prompt, pad, response):
        """Values (B, K, R) of answers (B, K, R); each sees what stands left of its token."""
        x = self.trunk.response_hidden(prompt, pad, response)
        return linear_in_float32(x, self.score.weight, self.score.bias)[..., 0]


class Past(NamedTuple):
    """A rollout as it was before its first update: (B, K, R) each, without gradient."""
    response: torch.Tensor       # ids
    mask: torch.Tensor           # True up to and including eos
    logprobs: torch.Tensor       # of the policy that sampled, nats
    values: torch.Tensor         # of the critic
    advantages: torch.Tensor     # of the policy, centred
    returns: torch.Tensor        # the critic's target


@torch.no_grad()
def look_back(generator, reference, critic, batch, roll, rewards, cfg):
    """
    What the updates on a rollout look back at. It is cut into other micro-batches here than there,
    so the first ratio is 1 only up to rounding.

    rewards  (B, K, R) of the discriminator; the KL penalty is taken off here
    returns  a Past; dict: kl and entropy, nats per token
    """
    kept = []
    for part, r in data.parts(cfg.micro_batch, batch, roll):
        answers = part.prompt, part.pad, r.response, cfg.temperature
        with autocast(cfg):
            logprobs, entropy = generator.response_logprobs(*answers, entropy=True)
            ref_logprobs, _ = reference.response_logprobs(*answers)
            values = critic(part.prompt, part.pad, r.response)
        kept.append((logprobs, ref_logprobs, values, entropy))
    logprobs, ref_logprobs, values, entropy = (torch.cat(z) for z in zip(*kept))
    # k1 of Schulman 2020, whose mean is the KL; k3 explodes where pi is far below the reference
    log_ratio = (logprobs - ref_logprobs) * roll.mask
    advantages, returns = gae(rewards - cfg.beta * log_ratio, values, roll.mask, cfg.lam)
    sums = torch.stack((log_ratio.sum(), (entropy * roll.mask).sum(), roll.mask.sum()))
    kl, entropy, tokens = all_sum(sums)
    return Past(roll.response, roll.mask, logprobs, values, centre(advantages, roll.mask),
                returns), {'kl': kl / tokens, 'entropy': entropy / tokens}


def ppo_gradient(generator, critic, batch, past, cfg):
    """Adds a minibatch's gradients of policy and critic; dict: g_loss, v_loss, approx_kl, mle."""
    n, n_tokens = past.mask.flatten(0, 1).size(0) * world(), all_sum(past.mask.sum())
    sums = torch.zeros(3, device=past.mask.device)
    for part, old in data.parts(cfg.micro_batch, batch, past):
        answers = part.prompt, part.pad, old.response
        with autocast(cfg):
            logprobs, _ = generator.response_logprobs(*answers, cfg.temperature)
        g_loss = clipped_policy_loss(logprobs, old.logprobs, old.advantages, old.mask, cfg.clip) / n
        g_loss.backward()
        with autocast(cfg):
            values = critic(*answers)
        v_loss = value_loss(values, old.values, old.returns, old.mask, cfg.clip) / n_tokens
        v_loss.backward()
        log_ratio = (logprobs.detach() - old.logprobs) * old.mask
        approx_kl = (log_ratio.expm1() - log_ratio).sum() / n_tokens         # k3, Schulman 2020
        sums += torch.stack((g_loss.detach(), v_loss.detach(), approx_kl))
    figures = dict(zip(('g_loss', 'v_loss', 'approx_kl'), all_sum(sums)))
    if cfg.anchor:
        figures['mle'] = mle_gradient(generator, batch, cfg.anchor / len(batch.pad) / world(), cfg)
    return figures


def ppo_step(generator, critic, optimizers, batch, past, passages, running, share, cfg):
    """
    Epochs of minibatch updates on one rollout, left early once pi is too far from pi_old.

    passages  (N, T) ids; each update takes its own by the count in running; None for none
    share     of the peak learning rates
    returns   dict: updates, how many; means over them of `ppo_gradient`'s, pretrain, g_norm, v_norm
    """
    minibatches = [rows for _ in range(cfg.epochs)
                   for rows in torch.randperm(len(past.mask)).split(cfg.minibatch // world())]
    updates = []
    for rows in minibatches:
        part, old = (data.take(z, rows.to(past.mask.device)) for z in (batch, past))
        figures = ppo_gradient(generator, critic, part, old, cfg)
        if updates and figures['approx_kl'] > APPROX_KL:     # at the first, pi is pi_old
            for optimizer in optimizers:
                optimizer.zero_grad()                # of this one, which is not taken
            break
        if passages is not None:
            index = data.order(len(passages), PASSAGES, (cfg.seed, 2), running['updates'])
            drawn = data.passage_batch(passages[shard(index)], cfg.device)
            weight = cfg.pretrain / all_sum(drawn.mask.sum())
            figures['pretrain'] = mle_gradient(generator, drawn, weight, cfg)
        figures['g_norm'] = update(generator, optimizers[0], cfg.lr * share)
        figures['v_norm'] = update(critic, optimizers[1], cfg.critic_lr * share)
        updates.append(figures)
        running['updates'] += 1
    means = {name: sum(f[name] for f in updates) / len(updates) for name in updates[0]}
    return means | {'updates': len(updates)}


def warm_start(generator, own, train_set, dev_set, enc, out, log, caught, cfg):
    """MLE on gold answers, resumed from out/sft.pt; False if a signal cut it short. Generator and
    sft.pt end as the network that, at an evaluation, had the least loss on dev. `own`, a dict, is a
    discriminator that does not start as the generator: sft.pt keeps it for a resume."""
    path, optimizer, start, best = out / 'sft.pt', adamw(generator), 0, None
    if cfg.resume and path.exists():
        saved = load_checkpoint(path)
        generator.load_state_dict(saved['model'])
        start = saved['sft_iter']
        if start == cfg.sft_iters:
            return True
        optimizer.load_state_dict(saved['optimizer'])
        best = saved['best']
    for step in progress(range(start, cfg.sft_iters), 'warm start'):
        due, stop = step % cfg.eval_interval == 0, signalled(caught)
        if stop or due:
            save(path, generator, log, sft_iter=step, optimizer=optimizer, best=best, **own)
        if stop:
            return False
        if due:
            best = sample.better(best, step, generator, dev_set, enc, out, log, cfg)
        log.lap()
        record = {'sft_iter': step, **mle_step(generator, optimizer, train_set, step, cfg)}
        log.lap('warm start')
        log({**record, 'seconds': log.seconds})
    best = sample.better(best, cfg.sft_iters, generator, dev_set, enc, out, log, cfg)
    generator.load_state_dict(best['model'])
    save(path, generator, log, sft_iter=cfg.sft_iters, **own)
    return True


def train(cfg, caught=()):
    """
    Warm start, adversarial stage, evaluation; writes everything into out_dir.

    caught   a list that a signal handler fills; once it is not empty, train saves and returns None
    returns  dict: the final figures of `warm start` and `tuned`; on rank 0
    raises   ValueError, OSError, FloatingPointError: one sentence for the user
    """
    # setup
    given = open_device(cfg)                         # as flagged; cfg's own auto are resolved
    out, lock = open_folder(cfg)                     # the lock holds as long as it is kept
    torch.manual_seed(cfg.seed)
    # data and models
    enc, train_set, dev_set = data.load(cfg)
    generator, discriminator, saved = load_networks(cfg, enc.n_vocab, train_set, dev_set)
    passages = data.load_passages(train_set.examples, enc, cfg) if cfg.pretrain else None
    if cfg.compile:
        generator.compile()
    log = Log(out, cfg, given, saved)
    # warm start
    own = {'discriminator': discriminator} if cfg.d_init_from else {}
    if not warm_start(generator, own, train_set, dev_set, enc, out, log, caught, cfg):
        return None
    reference = copy.deepcopy(generator)             # trainable, to share compiled graphs
    if not cfg.d_init_from:
        discriminator.trunk.load_state_dict(generator.state_dict())
    critic = Critic(discriminator.trunk).to(cfg.device).eval()
    optimizer, d_optimizer, critic_optimizer = map(adamw, (generator, discriminator, critic))
    stateful = dict(discriminator=discriminator, optimizer=optimizer, d_optimizer=d_optimizer,
                    critic=critic, critic_optimizer=critic_optimizer)
    # d_acc, a running mean, begins at chance; distinct2 is the least before the generator moves
    start, running = 0, dict(d_acc=.5, start=None, sick=0, distinct2=1.0, updates=0)
    # resume
    if 'running' in saved:                           # beyond the warm start
        start, running = saved['iter'], saved['running']
        generator.load_state_dict(saved['model'])
        for name, part in stateful.items():
            part.load_state_dict(saved[name])
    if running['start'] is None and start < min(cfg.iters, cfg.d_warmup_iters):
        print(f'head start until d_acc {cfg.d_warmup_acc} or iteration {cfg.d_warmup_iters}')
    del saved                                        # gigabytes that the networks have now
    if cfg.compile:
        for network in reference, discriminator.trunk, critic.trunk:
            network.compile()

    for it in progress(range(start, cfg.iters), 'iterations'):
        # evaluate and checkpoint
        moving = (running['start'] is not None or running['d_acc'] >= cfg.d_warmup_acc
                  or it >= cfg.d_warmup_iters)
        begins = moving and running['start'] is None
        due, stop = begins or it % cfg.eval_interval == 0, signalled(caught)
        if (stop or due) and not running['sick']:            # the last healthy one is kept
            save(out / 'ckpt.pt', generator, log, iter=it, running=running, **stateful)
        if stop:
            return None
        if due and rank() == 0:
            at = {'iter': it, 'd_acc_mean': running['d_acc'], 'begins': begins}
            sample.report(at, generator, discriminator, dev_set, enc, out, log, cfg)

        # rollout
        log.lap()
        # seeds of dropout and of sampling, the same in a resumed run: hash() salts no ints
        torch.manual_seed(hash((cfg.seed, it)) % 2 ** 31 + rank())
        rng = torch.Generator(cfg.device).manual_seed(hash((cfg.seed, it, 1)) % 2 ** 31 + rank())
        index = data.order(len(train_set), cfg.batch_size, (cfg.seed, 1), it)       # stream 1
        batch = train_set.batch(shard(index), cfg.device)
        with autocast(cfg):
            roll = generator.generate(batch.prompt, batch.pad, cfg.max_response, dev_set.eos,
                                      cfg.samples, cfg.temperature, rng=rng)
        record = {'iter': it, **data.health(*gathered(*roll, batch.response, batch.mask))}
        log.lap('rollout')

        # discriminator step
        if running['start'] is None:
            running['distinct2'] = min(running['distinct2'], record['distinct2'])
        if begins:
            running['start'] = it
            save(out / 'start.pt', generator, log, iter=it, running=running, **stateful)
        scores, figures = discriminator_step(discriminator, d_optimizer, batch, roll, cfg)
        record |= figures
        if record['d_acc'] is not None:
            running['d_acc'] = .9 * running['d_acc'] + .1 * record['d_acc']
        record['d_acc_mean'] = running['d_acc']
        log.lap('discriminator')

        # generator step
        rewards = reward(scores, batch, roll, cfg)
        record['reward'] = all_sum(rewards.sum()) / (roll.ended.numel() * world())
        if moving:
            if running['start'] == it:
                critic.trunk.load_state_dict(discriminator.trunk.state_dict())   # V is 0 at first
            share = schedule(it - running['start'], cfg.iters - running['start'])
            past, figures = look_back(generator, reference, critic, batch, roll, rewards, cfg)
            record |= {'lr': cfg.lr * share, **figures}
            record |= ppo_step(generator, critic, (optimizer, critic_optimizer), batch, past,
                               passages, running, share, cfg)
        log.lap('generator')

        # log
        sick = moving and data.sick(record, running['distinct2'])
        running['sick'] = running['sick'] + 1 if sick else 0
        log({**record, 'seconds': log.seconds})
        if running['sick'] > 20:                     # iterations in a row
            log.collapsed(it, data.to_text(roll.response[:, 0], roll.mask[:, 0], enc))

    save(out / 'ckpt.pt', generator, log, iter=cfg.iters, running=running, **stateful)
    return sample.finish(reference, generator, discriminator, dev_set, enc, out, log, cfg)


if __name__ == '__main__':
    main(__doc__, Config, TINY, BOUNDS, check, train)
