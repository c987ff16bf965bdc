"""Stage 2: a reward model trained on preference pairs (Bradley-Terry).

    loss = - log sigma( r(x, y+) - r(x, y-) ) + c ( r(x, y+) + r(x, y-) )^2

for pairs of a chosen response y+ and a rejected response y-.

The first term is the negative log-likelihood of the annotators' choices (Stiennon et al. 2020,
equation 1). It leaves an additive constant free; the small second term keeps rewards centred near 0
(Eisenstein et al. 2023, section 3). After training, the head is divided by the standard deviation
of the rewards on the held-out pairs, to make it 1.

The defaults train the reward model that ships in tasks/mini_tldr-reward:

    python reward_model.py --output runs/reward
"""

import json
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

try:
    from common import classifier_scores, make_batch, microbatches, reward_scores
    from plumbing import (Count, CountOrZero, DataArgs, NotNegative, Positive, Reward, Run, Seed,
                          SystemArgs, clip_gradients, find_gold, get_scheduler, is_first, leave,
                          load_classifier, load_reward, load_rows, load_tokenizer, parse, setup,
                          sum_gradients, sum_over_ranks, try_out)
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}; copy common.py, plumbing/ and tasks/ along with this "
                     "script, and install requirements.txt")


def compute_loss(chosen, rejected, center):
    """Bradley-Terry loss plus the centring term, summed over pairs.

    Args: chosen, rejected (n,), the rewards of each pair's two responses; center, the coefficient
    c.
    Returns: scalar.
    """
    return (-F.logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2).sum()


@dataclass
class Args(DataArgs, SystemArgs):  # see plumbing/flags.py
    model: str = "tasks/mini_tldr-sft"
    """initial model, usually the SFT policy: hub name or folder; it gets a new head with one
    output"""
    dataset: str = "tasks/mini_tldr.py:preferences"
    """preference pairs (prompt, chosen, rejected): hub name, path, or path/to/file.py:function"""
    chosen_column: str | None = None
    """column of preferred responses, if it is not called chosen"""
    rejected_column: str | None = None
    """column of dispreferred responses, if it is not called rejected"""
    gold: str = "auto"
    """true reward to compare with, for logging only: path/to/file.py:function; auto: the function
    gold_reward in the --dataset file, if there is one; none: no gold reward"""
    num_updates: Count = 3000
    """optimizer steps"""
    batch_size: Count = 32
    """pairs per step"""
    lr: Positive = 6e-4
    """AdamW's peak learning rate (for a pretrained model with billions of parameters: 1e-5)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """learning-rate schedule after the warm-up"""
    warmup_updates: CountOrZero = 30
    """linear warm-up updates"""
    weight_decay: NotNegative = 0.0
    """AdamW's weight decay"""
    center: NotNegative = 0.01
    """coefficient c of the centring term"""
    max_grad_norm: Positive = 1.0
    """maximum gradient norm"""
    microbatch_tokens: Count = 16384
    """maximum tokens per micro-batch, padding included; affects memory and speed, never the
    gradient"""
    max_length: Count = 512
    """drop pairs with more tokens than this (prompt plus longer response)"""
    eval_every: CountOrZero = 250
    """updates between evaluations; 0 evaluates only at the end"""
    eval_rows: Count = 2000
    """number of held-out pairs per evaluation"""
    seed: Seed = 1
    """random seed for the new head and the pair order"""


def spearman(x, y):
    """Rank correlation of x and y (M,); ties get their mean rank."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0) - counts / 2)[inverse].double())  # (M,)
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


@torch.no_grad()
def evaluate_pairs(model, tokenizer, pairs, gold, args):
    """Metrics on M held-out pairs: agreement with the annotator, and with the gold reward, if
    any."""
    examples, rewards, golds = pairs[:], [], []
    own = Reward("own", model=model, tokenizer=tokenizer, max_tokens=args.microbatch_tokens)
    for name in ("chosen", "rejected"):
        batch = make_batch(tokenizer, examples["prompt_ids"], examples[f"{name}_ids"],
                           model.device)
        rewards.append(reward_scores(own, tokenizer, batch, examples).cpu())
        if gold:
            golds.append(reward_scores(gold, tokenizer, batch, examples).cpu())
    rewards = torch.stack(rewards, 1)  # (M, 2)
    right = rewards[:, 0] > rewards[:, 1]  # (M,)
    metrics = {"accuracy": right.float().mean().item(), "mean": rewards.mean().item(),
               "std": rewards.std().item()}
    if gold:
        golds = torch.stack(golds, 1)  # (M, 2)
        known = ~golds.isnan()  # (M, 2), False where the gold reward is None
        agree = right == (golds[:, 0] > golds[:, 1])  # (M,)
        differ = known.all(1) & (golds[:, 0] != golds[:, 1])  # (M,)
        metrics["gold_accuracy"] = agree[differ].float().mean().item()
        metrics["gold_spearman"] = spearman(rewards[known], golds[known])
    return metrics


def main(args):
    device = setup(args)
    tokenizer = load_tokenizer(args.model)
    model = load_classifier(args.model, device, args.dtype, args.shard, args.plain,
                            args.gradient_checkpointing, new_head=True)
    model.config.pad_token_id = tokenizer.pad_token_id
    gold = find_gold(args.gold, args.dataset)
    gold = gold and load_reward(gold, args, device)
    names = ["prompt", "chosen", "rejected"]
    train = load_rows(args, args.train_split, tokenizer, names, args.max_length)
    test = load_rows(args, args.test_split, tokenizer, names, args.max_length, args.eval_rows)
    try_out(model, [train, test], args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup_updates, args.num_updates)

    run = Run(__file__, args, tokenizer, reward=(model, optimizer, scheduler))
    for examples in run.updates(train, args.batch_size):
        prompt_ids = examples["prompt_ids"]
        chosen = make_batch(tokenizer, prompt_ids, examples["chosen_ids"], device)
        rejected = make_batch(tokenizer, prompt_ids, examples["rejected_ids"], device)
        loss = 0.0
        optimizer.zero_grad()
        for rows in microbatches(model, args.microbatch_tokens, chosen, rejected):
            rewards = [classifier_scores(model, batch[rows]) for batch in (chosen, rejected)]
            part = compute_loss(*rewards, args.center) / args.batch_size  # rewards: two of (n,)
            part.backward()
            loss += part.item()
        loss = sum_over_ranks(loss)
        sum_gradients(model)  # over all processes
        grad_norm = clip_gradients(model, args.max_grad_norm)
        run.check_finite(examples, loss=loss, grad_norm=grad_norm)
        optimizer.step()
        run.log({"loss": loss, "grad_norm": grad_norm, "lr": scheduler.get_last_lr()[0]})
        scheduler.step()
        if run.evaluation_is_due():
            run.state["metrics"] = metrics = evaluate_pairs(model, tokenizer, test, gold, args)
            run.check_finite(examples, mean=metrics["mean"], std=metrics["std"])
            run.log({f"eval/{name}": value for name, value in metrics.items()})
        run.checkpoint()  # if due; also exits after Ctrl-C or SIGTERM

    with torch.no_grad():
        model.score.weight /= run.state["metrics"]["std"]
    metrics = evaluate_pairs(model, tokenizer, test, gold, args)
    run.save_model(model)
    run.finish()
    if is_first():
        print("\n" + "\n".join(f"{name:<16}{value:>8.3f}" for name, value in metrics.items()))
        (run.folder / "evaluation.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"\nreward model and logs are in {run.folder}")
    return model


if __name__ == "__main__":
    main(parse(Args))
    leave()
