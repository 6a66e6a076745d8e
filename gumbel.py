"""
Gumbel-softmax: the discriminator's gradient reaches the generator through its own samples.

    y_t ~ pi(. | x, y_<t)                               sampled, and kept as a token
    z_t = softmax((logits_t + g_t) / tau)               Jang et al. (2017), g ~ Gumbel(0, 1) drawn
                                so that y_t is the argmax of logits_t + g_t, Maddison et al. (2014)
    z*_t                                                the same of the gold answer's y*_t
    max_D  E[ log sigmoid(s(x, z*_<=t) - s(x, z_<=t)) ]           t: from where they differ
    min_G  E[ sum_t -log sigmoid(s(x, z_<=t) - s(x, z*_<=t)) ] + beta KL(pi || pi_SFT)
                                                                  an MLE anchor rides along

$ python gumbel.py --device cuda      GPT-2 124M on SQuAD 2.0
$ python gumbel.py --tiny             a toy, on a CPU, in minutes

Left out on purpose: the score's gradient through later logits, for the generator reads the sampled
ids (the KL has that gradient, by score function), so that it cannot change the way of an answer,
which is what --tiny asks for; relaxed samples in evaluation.
"""

import copy
from dataclasses import dataclass
from typing import Literal, Optional

import torch
import torch.nn.functional as F

import data
import sample
from model import (Log, adamw, all_sum, autocast, exponential, gathered, hold_last, load_checkpoint,
                   load_networks, main, open_device, open_folder, progress, rank, save, schedule,
                   shard, signalled, uniform, update, world)

# -----------------------------------------------------------------------------
# config: every field is a flag, its comment is the flag's --help

@dataclass
class Config:
    script = 'gumbel'                # no flag: whose runs it resumes; a fork's own
    # i/o
    out_dir: str = 'out/gumbel'      # where checkpoints, metrics, curves and samples go
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
    lr: float = 1e-5                 # peak learning rate of the generator
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
    # gumbel
    encoding: Literal['soft', 'hard', 'mixed'] = 'soft'  # relaxed; one-hot; relaxed but for golds


TINY = dict(
    data='toy-ways', init_from='scratch', n_layer=1, n_head=2, n_embd=16, max_prompt=7,
    max_response=9, device='cpu', sft_iters=2000, sft_batch_size=64, sft_lr=2e-2, iters=650,
    batch_size=64, samples=4, micro_batch=64, beta=0.0, anchor=0.0, lr=2e-4,
    d_init_from='scratch', d_n_layer=2, d_n_head=4, d_n_embd=64, d_lr=2e-3,
    d_warmup_iters=400, d_warmup_acc=1.0, d_dropout=0.0, eval_interval=50,
    eval_prompts=500)
BOUNDS = dict(seed=(0, 2 ** 32 - 1), micro_batch=(0, None), sft_iters=(0, None), iters=(0, None),
              d_warmup_iters=(0, None), d_warmup_acc=(0, 1), d_dropout=(0, 1),
              sft_dropout=(0, 1), temperature=(.01, 1e9))
TAU = 1.0, .5                        # temperature of the relaxed samples, first and last


def check(cfg):
    """Any settings of Gumbel-softmax go together."""


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
    largest = largest - exponential(uniform(largest.shape, logits, rng)).log_()
    noise = exponential(uniform(logits.shape, logits, rng))
    noise.add_((logits - largest).exp_()).log_().neg_()
    return noise.scatter_(-1, response[..., None],
                          largest - logits.gather(-1, response[..., None]))


def relax(logits, response, tau, rng):
    """softmax((logits + noise) / tau), (..., R, V), through which gradients reach the logits; the
    noise is one that samples the response (..., R), so its tokens are the argmax."""
    return ((logits + conditional_noise(logits.detach(), response, rng)) / tau).softmax(-1)


def kl_penalty(logits, ref_logits, response, mask):
    """
    KL(pi || reference) of samples, whose gradient is the exact one in expectation.

    logits, ref_logits  (B, K, R, V), the first with gradient; response, mask (B, K, R)
    returns  the KL at each token; its gradient is that KL's own plus, by score function, the
             token's grad log pi times the KL still to come, for what it does to later tokens;
             the entropy of pi without gradient; (B, K, R), nats, 0 outside the mask
    """
    logp, ref_logp = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    p = logp.exp()
    kl = (p * (logp - ref_logp)).sum(-1) * mask
    with torch.no_grad():
        entropy = -(p * logp).sum(-1) * mask
        to_come = kl.flip(-1).cumsum(-1).flip(-1) - kl
    chosen = logp.gather(-1, response[..., None])[..., 0]
    return kl + to_come * (chosen - chosen.detach()), entropy


# -----------------------------------------------------------------------------
# scores and rewards

def response_logits(network, batch, response, cfg):
    """Logits / temperature, (B, N, R, V), of N answers (B, N, R) to each prompt of a Batch."""
    with autocast(cfg):
        return network.head(network.response_hidden(batch.prompt, batch.pad, response)
                            / cfg.temperature)


def encode(generator, batch, roll, tau, rng, cfg):
    """
    The gold answer and the samples for the discriminator, (B, 1 + K, R, V), with gradients to the
    generator's logits; their mask (B, 1 + K, R); those logits.

    soft   all relaxed, so that a gold answer looks like a sample that happens to be right; beside
           one-hots, relaxed samples would be told at sight
    hard   one-hots with the gradient of the relaxed answer (straight-through, Jang et al. 2017)
    mixed  relaxed samples beside one-hot gold answers: the poster's trap
    """
    response, mask, _ = data.beside_gold(batch, roll)
    logits = response_logits(generator, batch, response, cfg)
    onehots = torch.zeros_like(logits).scatter_(-1, response[..., None], 1.0)
    answers = relax(logits, response, tau, rng)
    if cfg.encoding == 'hard':
        answers = onehots + (answers - answers.detach())
    if cfg.encoding == 'mixed':
        answers = torch.cat((onehots[:, :1], answers[:, 1:]), 1)
    return answers, mask, logits


def score_shown(discriminator, batch, answers, mask, cfg):
    """Scores s_t, logits, of answers as `encode` shows them: (B, 1 + K, R), where an answer that is
    over keeps its last."""
    with autocast(cfg):
        return hold_last(discriminator(batch.prompt, batch.pad, answers), mask)


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


def discriminator_step(discriminator, generator, optimizer, batch, roll, tau, rng, cfg):
    """
    Scores the answers, as `encode` shows them, without dropout, and then takes a step on those of
    them that differ from the gold ones.

    returns  dict: d_loss (from before the step, in nats per prefix, None if all tie), d_norm, and
             what `data.told` tells
    """
    where, kept = compared(roll.response, roll.mask, batch.response, batch.mask, cfg.d_prefixes), []
    n_places = all_sum(where.sum()).item()
    for part, r, w in data.parts(cfg.micro_batch, batch, roll, where):
        with torch.no_grad():
            answers, mask, _ = encode(generator, part, r, tau, rng, cfg)
            kept.append(score_shown(discriminator.eval(), part, answers, mask, cfg))
        if n_places:
            scores = score_shown(discriminator.train(), part, answers, mask, cfg)
            loss = discriminator_loss(scores[:, :1], scores[:, 1:], cfg.d_loss) * w
            (loss.sum() / n_places).backward()
    discriminator.eval()
    scores = torch.cat(kept)
    loss = discriminator_loss(scores[:, :1], scores[:, 1:], cfg.d_loss) * where
    d_loss = all_sum(loss.sum()) / n_places if n_places else None
    d_norm = update(discriminator, optimizer, cfg.d_lr) if n_places else None
    figures = data.told(*gathered(scores, where.any(-1)))
    return figures | {'d_loss': d_loss, 'd_norm': d_norm}


def gumbel_step(generator, reference, discriminator, optimizer, batch, roll, lr, tau, rng, cfg):
    """
    One update by the discriminator's gradient through the relaxed samples, with the MLE anchor.

    Of an answer the loss is the sum over the prefixes that the discriminator learns from, for whole
    answers alone say little about which token to change; of answers, ties too, it and the KL are
    means. The discriminator is the one after its step.
    returns  dict: g_loss, g_norm, mle, kl and entropy (nats per token)
    """
    n = roll.ended.numel() * world()
    where = compared(roll.response, roll.mask, batch.response, batch.mask, cfg.d_prefixes)
    sums = torch.zeros(4, device=where.device)
    for part, r, w in data.parts(cfg.micro_batch, batch, roll, where):
        answers, mask, logits = encode(generator, part, r, tau, rng, cfg)
        shown = answers.detach().requires_grad_()
        scores = score_shown(discriminator, part, shown, mask, cfg)
        loss = generator_loss(scores[:, :1].detach(), scores[:, 1:], cfg.d_loss) * w
        loss = loss.sum() / n
        grad, = torch.autograd.grad(loss, shown)     # the discriminator's weights get none
        with torch.no_grad():
            ref_logits = response_logits(reference, part, r.response, cfg)
        kl, entropy = kl_penalty(logits[:, 1:], ref_logits, r.response, r.mask)
        ((answers * grad).sum() + cfg.beta * kl.sum() / n).backward()
        sums += torch.stack((loss.detach(), kl.detach().sum(), entropy.sum(), r.mask.sum()))
    g_loss, kl, entropy, tokens = all_sum(sums)
    figures = {'g_loss': g_loss, 'kl': kl / tokens, 'entropy': entropy / tokens}
    if cfg.anchor:
        figures['mle'] = mle_gradient(generator, batch, cfg.anchor / len(batch.pad) / world(), cfg)
    figures['g_norm'] = update(generator, optimizer, lr)
    return figures


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
    optimizer, d_optimizer = adamw(generator), adamw(discriminator)
    stateful = dict(discriminator=discriminator, optimizer=optimizer, d_optimizer=d_optimizer)
    # d_acc, a running mean, begins at chance; distinct2 is the least before the generator moves
    start, running = 0, dict(d_acc=.5, start=None, sick=0, distinct2=1.0)
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
        for network in reference, discriminator.trunk:
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
        share = (it - running['start']) / (cfg.iters - running['start']) if moving else 0
        tau = TAU[0] + (TAU[1] - TAU[0]) * share
        record |= discriminator_step(discriminator, generator, d_optimizer, batch, roll, tau, rng,
                                     cfg)
        if record['d_acc'] is not None:
            running['d_acc'] = .9 * running['d_acc'] + .1 * record['d_acc']
        record['d_acc_mean'] = running['d_acc']
        log.lap('discriminator')

        # generator step
        if moving:
            record['lr'] = cfg.lr * schedule(it - running['start'], cfg.iters - running['start'])
            record |= gumbel_step(generator, reference, discriminator, optimizer, batch, roll,
                                  record['lr'], tau, rng, cfg)
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
