"""Stage 2: a reward model from preference pairs (Bradley-Terry).

    loss = - log sigma(r(x, y_chosen) - r(x, y_rejected)) + c * (r(x, y_chosen) + r(x, y_rejected))^2

The first term is the likelihood of the annotators' choices (Stiennon et al. 2020, equation 1). It leaves a constant
free, which the second, small one fixes: rewards are centred near 0 (Eisenstein et al. 2023, section 3).
Afterwards the head is divided by the standard deviation of the rewards on the held-out pairs, which becomes 1.

The defaults make the reward model that is shipped in tasks/mini_tldr-reward:

    python reward_model.py --output runs/reward
"""

import json
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import get_scheduler, set_seed

from common import classifier_scores, encode, find_gold, load_reward, microbatches
from plumbing import (add_up, batches, check_args, check_finite, check_positions, checkpoint, clip_gradients, close,
                      load_classifier, load_rows, load_tokenizer, log, open_run, parse, pick_device, save, total)


def compute_loss(chosen, rejected, center):
    """Bradley-Terry loss with the centring term, summed over pairs.

    Args: chosen, rejected (n,), the rewards of each pair's two responses; center, the coefficient c.
    Returns: scalar.
    """
    return (-F.logsigmoid(chosen - rejected) + center * (chosen + rejected) ** 2).sum()


@dataclass
class Args:
    model: str = "tasks/mini_tldr-sft"
    """where to start, usually the SFT policy: a hub name or a folder; it gets a new head with one output"""
    dataset: str = "tasks/mini_tldr.py:preferences"
    """rows with the columns prompt, chosen and rejected: a hub name, folder, file, or file.py:function"""
    dataset_config: str | None = None
    """configuration of a hub dataset that has several"""
    prompt_column: str | None = None
    """the dataset's column of prompts, where it has another name"""
    chosen_column: str | None = None
    """the dataset's column of better responses, where it has another name"""
    rejected_column: str | None = None
    """the dataset's column of worse responses, where it has another name"""
    chat: bool = False
    """make prompts that are plain text the user's message of the tokenizer's chat template"""
    system_prompt: str | None = None
    """the system's message before every prompt (and --chat)"""
    train_split: str = "train"
    """split to train on"""
    test_split: str = "test"
    """split for the held-out pairs"""
    gold: str = "auto"
    """a true reward to compare with, only measured: path/to/file.py:function; "auto": the function gold_reward of the
    python file that --dataset names, if it has one; "none": none"""
    num_updates: int = 3000
    """optimizer steps"""
    batch_size: int = 32
    """pairs per step"""
    lr: float = 6e-4
    """AdamW's peak learning rate (for a pretrained model of a billion parameters: 1e-5)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """how the learning rate falls after the warm-up"""
    warmup_updates: int = 30
    """steps over which the learning rate rises from 0"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    center: float = 0.01
    """the coefficient c of the term that keeps the rewards centred"""
    max_grad_norm: float = 1.0
    """the gradient's norm is clipped to this"""
    microbatch_tokens: int = 16384
    """tokens, padding included, that go through the model at once: memory, never the result"""
    max_length: int = 512
    """pairs with a longer prompt and response, in tokens, are left out"""
    truncate_prompts: bool = False
    """cut longer prompts off at their beginning, instead of leaving them out"""
    eval_every: int = 250
    """updates between two evaluations on the held-out pairs; 0 evaluates at the end only"""
    seed: int = 1
    """of the new head and the order of the pairs"""
    output: str | None = None
    """run folder; by default runs/reward_model-seed<seed>-<time>"""
    save_every: int = 10
    """updates between two checkpoints; 0 writes one only at the end, or where SIGTERM or Ctrl-C ends the run"""
    keep: int = 2
    """checkpoints that are kept, the last ones"""
    resume: str | None = None
    """folder of a run that was ended: go on after its last checkpoint, with its flags, as if nothing had happened"""
    device: str = "auto"
    """auto, cuda, mps or cpu"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """float32, or bfloat16 (autocast; the weights stay in float32)"""
    shard: bool = False
    """with torchrun: spread the weights over the processes (FSDP2), for models that do not fit one device"""
    gradient_checkpointing: bool = False
    """keep only the layers' inputs for the backward pass, and compute the rest again there: less memory, more time"""


def spearman(x, y):
    """Rank correlation of x and y (M,), ties ranked by their mean rank."""
    ranks = []
    for values in (x, y):
        _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum(0) - counts / 2)[inverse].double())  # (M,)
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


@torch.no_grad()
def evaluate_pairs(model, tokenizer, pairs, gold, args):
    """Metrics on M held-out pairs: against the annotator, and against the gold reward where there is one."""
    columns = pairs[:]
    rewards, golds = [], []
    for name in ("chosen", "rejected"):
        batch = encode(tokenizer, columns["prompt_ids"], columns[name], model.device)
        scores = torch.zeros(len(batch), device=model.device)
        for rows in microbatches(args.microbatch_tokens, batch):
            scores[rows] = classifier_scores(model, batch[rows])
        rewards.append(add_up(scores).cpu())
        if gold:
            golds.append(gold(batch, columns).cpu())
    rewards = torch.stack(rewards, 1)  # (M, 2)
    right = rewards[:, 0] > rewards[:, 1]  # (M,)
    metrics = {"accuracy": right.float().mean().item(), "mean": rewards.mean().item(), "std": rewards.std().item()}
    if gold:
        golds = torch.stack(golds, 1)  # (M, 2)
        differ = golds[:, 0] != golds[:, 1]
        metrics["gold_accuracy"] = (right == (golds[:, 0] > golds[:, 1]))[differ].float().mean().item()
        metrics["gold_spearman"] = spearman(rewards.flatten(), golds.flatten())
    return metrics


def main(args):
    check_args(args)
    device = pick_device(args)
    set_seed(args.seed)
    tokenizer = load_tokenizer(args.model)
    model = load_classifier(args.model, device, args.dtype, args.shard, args.gradient_checkpointing, new_head=True)
    model.config.pad_token_id = tokenizer.pad_token_id
    gold = find_gold(args.gold, args.dataset)
    gold = gold and load_reward(gold, tokenizer, device, args.dtype, args.microbatch_tokens)
    names = ["prompt", "chosen", "rejected"]
    train, test = (load_rows(args, args.dataset, split, tokenizer, names, args.max_length)
                   for split in (args.train_split, args.test_split))
    check_positions(model, max(train["num_tokens"][:] + test["num_tokens"][:]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup_updates, args.num_updates)
    saved = {"reward": (model, optimizer, scheduler)}  # what checkpoints hold, besides the state
    folder, writer, state = open_run(args, "reward_model", saved)
    state = state or {"step": 0, "metrics": evaluate_pairs(model, tokenizer, test, gold, args)}
    updates = range(state["step"] + 1, args.num_updates + 1)
    bar = tqdm(updates, desc="reward_model", unit="update", disable=writer is None)
    for step, columns in zip(bar, batches(train, args.batch_size, args.seed, state["step"])):
        chosen = encode(tokenizer, columns["prompt_ids"], columns["chosen"], device)
        rejected = encode(tokenizer, columns["prompt_ids"], columns["rejected"], device)
        loss = 0.0
        optimizer.zero_grad()
        for rows in microbatches(args.microbatch_tokens, chosen, rejected):
            rewards = [classifier_scores(model, batch[rows]) for batch in (chosen, rejected)]
            part = compute_loss(*rewards, args.center) / args.batch_size  # rewards: two of (n,)
            part.backward()
            loss += part.item()
        loss, grad_norm = total(loss), clip_gradients(model, args.max_grad_norm)
        check_finite(step, folder, columns, loss=loss, grad_norm=grad_norm)
        optimizer.step()
        log(writer, step, {"loss": loss, "grad_norm": grad_norm, "lr": scheduler.get_last_lr()[0]})
        scheduler.step()
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{state['metrics']['accuracy']:.3f}", refresh=False)
        if step == args.num_updates or (args.eval_every and step % args.eval_every == 0):
            state["metrics"] = metrics = evaluate_pairs(model, tokenizer, test, gold, args)
            check_finite(step, folder, columns, mean=metrics["mean"], std=metrics["std"])
            log(writer, step, {f"eval/{name}": value for name, value in metrics.items()})
        state["step"] = step
        checkpoint(args, folder, writer, tokenizer, saved, state)

    with torch.no_grad():
        model.score.weight /= state["metrics"]["std"]
    metrics = evaluate_pairs(model, tokenizer, test, gold, args)
    save(folder / "model", model, tokenizer)
    if writer:
        print("\n" + "\n".join(f"{name:<16}{value:>8.3f}" for name, value in metrics.items()))
        (folder / "evaluation.json").write_text(json.dumps(metrics, indent=2) + "\n")
        print(f"\nreward model and logs are in {folder}")
    close(writer)
    return model


if __name__ == "__main__":
    main(parse(Args))
