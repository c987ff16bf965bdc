"""RLOO on one page: one process, no helpers, only torch and transformers. Copy it and edit it.

For each prompt x, sample k responses y_1 ... y_k from the policy, score them, and push the
log-probability of each up or down by how much better it is than the mean of the others
(Ahmadian et al. 2024, "Back to Basics", arXiv:2402.14740, sections 2.3 and 2):

    gradient = 1/k sum_i [ R(y_i, x) - 1/(k-1) sum_{j != i} R(y_j, x) ] grad log pi(y_i | x)
    R(y, x)  = r(x, y) - beta log( pi(y|x) / pi_ref(y|x) )

    python rloo_minimal.py --k 4

The two functions below are yours to replace, and --model names your own policy (hub name or
folder). rloo.py is the same loop with evaluation, checkpoints, micro-batches and several devices.
"""

import copy
import functools
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import transformers
import tyro
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          set_seed)


def load_prompts():
    """The prompts to train on: a list of texts."""
    if not os.path.isdir("tasks"):
        raise SystemExit("error: there is no folder tasks here; copy it, or replace load_prompts "
                         "and reward by your own, and give --model")
    from tasks.mini_tldr import prompts

    return prompts("train")["prompt"][:]


def reward(prompts, completions):
    """r(x, y) of each prompt and completion (texts): a list of floats. Here a reward model's."""
    tokenizer, model = load_reward_model()
    texts = [f"{x} {y} {tokenizer.eos_token}" for x, y in zip(prompts, completions)]
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        hidden = model.base_model(**inputs, position_ids=positions(inputs["attention_mask"]))
        return model.score(hidden.last_hidden_state[:, -1]).squeeze(1).tolist()


@functools.cache
def load_reward_model(name="tasks/mini_tldr-reward"):
    model = AutoModelForSequenceClassification.from_pretrained(name, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(name), model.eval()


@dataclass
class Args:
    k: int = 4
    """responses per prompt, at least 2"""
    beta: float = 0.05
    """weight of the KL penalty in the reward"""
    temperature: float = 0.7
    """sampling temperature; all log-probs are under softmax(logits / temperature)"""
    lr: float = 1e-3
    """Adam's first learning rate (for a pretrained model of billions of parameters: 1e-6)"""
    max_grad_norm: float = 1.0
    """maximum gradient norm"""
    num_updates: int = 80
    """optimizer steps, each on a fresh rollout"""
    prompts_per_step: int = 16
    """prompts per rollout, with k responses each"""
    max_new_tokens: int = 32
    """maximum response length in tokens"""
    missing_eos_penalty: float = 1.0
    """subtracted from the score of a response without EOS"""
    model: str = "tasks/mini_tldr-sft"
    """initial policy: hub name or folder"""
    output: str = "runs/rloo_minimal"
    """folder for the trained policy"""
    seed: int = 1
    """random seed for prompts and sampling"""


def compute_advantages(rewards, k):
    """A_i = R_i - mean of the other k - 1 rewards for the same prompt.

    Args: rewards (N,), row = prompt * k + sample; k >= 2. Returns: advantages (N,).
    """
    rewards = rewards.view(-1, k)  # (B, k)
    baseline = (rewards.sum(1, keepdim=True) - rewards) / (k - 1)  # (B, k)
    return (rewards - baseline).flatten()


def compute_loss(logprobs, advantages):
    """- sum_i A_i log pi(y_i | x). Args: logprobs (N, T), 0 where masked; advantages (N,)."""
    return -(advantages * logprobs.sum(1)).sum()


def positions(mask):
    """Position ids that count real tokens only, so that left padding does not shift a prompt."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def rollout(policy, tokenizer, prompts, k, temperature, max_new_tokens):
    """Sample k responses to each prompt (a text).

    Returns: ids and mask (N, P + T), prompts padded on the left; P; ended (N,), whether it has EOS.
    """
    texts = [prompt for prompt in prompts for _ in range(k)]
    inputs = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()  # (N, P)
    ended, cache = torch.zeros(len(ids), dtype=torch.bool), None  # (N,)
    for _ in range(max_new_tokens):
        new = ids if cache is None else ids[:, -1:]
        output = policy(input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True,
                        position_ids=positions(mask)[:, -new.shape[1] :])
        cache = output.past_key_values
        probs = (output.logits[:, -1] / temperature).softmax(-1)  # (N, V)
        tokens = torch.multinomial(probs, 1).masked_fill(ended.unsqueeze(1), tokenizer.pad_token_id)
        ids, mask = torch.cat([ids, tokens], 1), torch.cat([mask, ~ended.unsqueeze(1)], 1)
        ended = ended | (tokens.squeeze(1) == tokenizer.eos_token_id)
        if ended.all():
            break
    return ids, mask, inputs["input_ids"].shape[1], ended


def token_logprobs(model, ids, mask, P, temperature):
    """Log-prob of each token after the first P, under softmax(logits / temperature): (N, T)."""
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
    logprobs = F.log_softmax(logits[:, P - 1 : -1] / temperature, dim=-1)  # (N, T, V)
    return logprobs.gather(2, ids[:, P:].unsqueeze(2)).squeeze(2) * mask[:, P:]


def main(args):
    if args.k < 2:
        raise SystemExit(f"error: --k {args.k}: the baseline is the mean of the other k - 1 "
                         "responses; use at least 2")
    transformers.logging.disable_progress_bar()
    set_seed(args.seed)
    train = load_prompts()
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    except (OSError, ValueError):
        raise SystemExit(f"error: --model {args.model}: neither a model folder nor one on the hub")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda u: 1 - u / args.num_updates)

    print("update  score     KL  length")
    for update in range(args.num_updates):
        # 1. rollout: k responses per prompt
        prompts = [train[i] for i in torch.randint(len(train), (args.prompts_per_step,)).tolist()]
        ids, mask, P, ended = rollout(policy, tokenizer, prompts, args.k, args.temperature,
                                      args.max_new_tokens)  # N rows

        # 2. score: one number per response
        completions = [tokenizer.decode(row[keep], skip_special_tokens=True)
                       for row, keep in zip(ids[:, P:], mask[:, P:])]
        repeated = [prompt for prompt in prompts for _ in range(args.k)]
        scores = torch.tensor(reward(repeated, completions))  # (N,)
        scores -= args.missing_eos_penalty * ~ended

        # 3. shape: the KL to the reference becomes part of the reward
        logprobs = token_logprobs(policy, ids, mask, P, args.temperature)  # (N, T), with gradients
        with torch.no_grad():
            ref_logprobs = token_logprobs(reference, ids, mask, P, args.temperature)  # (N, T)
        kl = logprobs.detach() - ref_logprobs  # (N, T)
        rewards = scores - args.beta * kl.sum(1)  # (N,)

        # 4. advantages: how much better each response is than the others for the same prompt
        advantages = compute_advantages(rewards, args.k)  # (N,)

        # 5. update: one optimizer step on the whole batch
        loss = compute_loss(logprobs, advantages) / len(ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        optimizer.step()
        scheduler.step()

        # 6. log
        if update % 10 == 9 or update + 1 == args.num_updates:
            print(f"{update + 1:6d}{scores.mean():7.2f}{kl.sum(1).mean():7.2f}"
                  f"{mask[:, P:].sum(1).float().mean():8.1f}")

    policy.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"the policy is in {args.output}")
    return policy


if __name__ == "__main__":
    main(tyro.cli(Args))
