"""DPO, direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290, equation 7).

    loss = - log sigma( beta [ log pi(y+|x)/pi_ref(y+|x) - log pi(y-|x)/pi_ref(y-|x) ] )

for pairs of a chosen response y+ and a rejected response y-, collected beforehand. beta
log(pi/pi_ref) is the policy's implicit reward: the one for which the policy is the optimum of E[r]
- beta KL.

    python dpo.py

What differs from rloo.py: the data are preference pairs (--dataset, with prompt, chosen and
rejected), evaluation has its own dataset (--eval-dataset), and the reward model is used only to
evaluate. Log-probs are summed over the response, EOS included, as in the paper; some
implementations average them, which is a different loss. The logits of policy and reference are
divided by --temperature, so that the loss trains the policy that is evaluated; the paper and TRL do
not divide (--temperature 1).

The gradient at pi = pi_ref is beta/2 times that of log pi(y-) - log pi(y+). Nothing in the loss
keeps the chosen response's probability up: only the difference matters, and both often fall
(rewards/chosen below 0 is normal).

What to watch: rewards/margins and rewards/accuracies, which should rise from 0 and 0.5;
eval/length, since DPO tends towards longer responses; eval/kl, which is bounded only by the shape
of the loss.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

try:
    from common import (dry_run, evaluate, make_batch, microbatches, no_grad_logprobs,
                        token_logprobs)
    from plumbing import (Count, CountOrZero, DataArgs, EvaluationArgs, NotNegative, Positive, Run,
                          Seed, SystemArgs, clip_gradients, get_scheduler, leave, load_policy,
                          load_reference, load_rewards, load_rows, load_tokenizer, parse, setup,
                          sum_gradients, sum_over_ranks)
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}; copy common.py, plumbing/ and tasks/ along with this "
                     "script, and install requirements.txt")


def compute_loss(chosen_logprobs, rejected_logprobs, chosen_ref_logprobs, rejected_ref_logprobs,
                 beta):
    """- log sigma of the difference between the two responses' implicit rewards beta
    log(pi/pi_ref).

    A sum: the caller divides by the number of pairs in the whole batch.

    Args: four (n, T) tensors of token log-probs, 0 where masked; beta.
    Returns: scalar, and the implicit rewards of the chosen and of the rejected responses, (n,)
    each.
    """
    chosen = beta * (chosen_logprobs - chosen_ref_logprobs).sum(1)  # (n,)
    rejected = beta * (rejected_logprobs - rejected_ref_logprobs).sum(1)  # (n,)
    return -F.logsigmoid(chosen - rejected).sum(), chosen.detach(), rejected.detach()


@dataclass
class Args(EvaluationArgs, DataArgs, SystemArgs):  # see plumbing/flags.py
    beta: NotNegative = 0.1
    """strength of the implicit KL penalty; higher values stay closer to the reference"""
    temperature: Positive = 0.7
    """sampling temperature; all log-probs are under softmax(logits / temperature)"""
    lr: Positive = 1e-3
    """Adam's peak learning rate (for a pretrained model of billions of parameters: 1e-6 to 3e-6)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """learning-rate schedule after the warm-up"""
    warmup_updates: CountOrZero = 0
    """linear warm-up updates"""
    max_grad_norm: Positive = 1.0
    """maximum gradient norm; policy/grad_clipped logs how often gradients are clipped"""
    num_updates: Count = 80
    """optimizer steps"""
    batch_size: Count = 32
    """preference pairs per step"""
    max_length: Count = 512
    """drop pairs with more tokens than this (prompt plus longer response)"""
    max_new_tokens: Count = 32
    """maximum response length in tokens, in evaluation"""
    model: str = "tasks/mini_tldr-sft"
    """initial policy: hub name, folder, or path/to/file.py:function"""
    reference: str | None = None
    """reference policy; default: a frozen copy of --model"""
    reward: tuple[str, ...] = ("tasks/mini_tldr-reward",)
    """reward that is only logged: one-label classifier (hub name or folder) or
    path/to/file.py:function; several are summed"""
    dataset: str = "tasks/mini_tldr.py:comparisons"
    """preference pairs (prompt, chosen, rejected): hub name, path, or path/to/file.py:function"""
    chosen_column: str | None = None
    """column of preferred responses, if it is not called chosen"""
    rejected_column: str | None = None
    """column of dispreferred responses, if it is not called rejected"""
    eval_dataset: str = "tasks/mini_tldr.py:prompts"
    """evaluation prompts, and reference responses (completion) for the win rate: hub name, path, or
    path/to/file.py:function"""
    eval_prompt_column: str | None = None
    """prompt column of the evaluation dataset, if it is not called prompt"""
    seed: Seed = 1
    """random seed for pair order and sampling"""


def main(args):
    device = setup(args)
    tokenizer = load_tokenizer(args.model)
    policy = load_policy(args, device)
    reference = load_reference(args, tokenizer, device, policy)
    reward_fns = load_rewards(args, device)  # only logged
    train = load_rows(args, args.train_split, tokenizer, ["prompt", "chosen", "rejected"],
                      args.max_length)
    prompts = replace(args, dataset=args.eval_dataset, prompt_column=args.eval_prompt_column)
    test = load_rows(prompts, args.test_split, tokenizer, first=args.eval_prompts)
    dry_run(policy, tokenizer, [test, train], reward_fns, args, reference)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr)
    scheduler = get_scheduler(args.lr_schedule, optimizer, args.warmup_updates, args.num_updates)

    run = Run(__file__, args, tokenizer, policy=(policy, optimizer, scheduler))
    if run.step == 0:
        run.log_evaluation(evaluate(policy, reference, tokenizer, reward_fns, test, args))
    for examples in run.updates(train, args.batch_size):
        # 1. instead of a rollout: preference pairs
        prompt_ids = examples["prompt_ids"]
        chosen = make_batch(tokenizer, prompt_ids, examples["chosen_ids"], device)  # N rows each
        rejected = make_batch(tokenizer, prompt_ids, examples["rejected_ids"], device)

        # 2. score, 3. shape: only the reference's log-probs are needed
        chosen_ref_logprobs = no_grad_logprobs(reference, chosen, args.temperature,
                                               args.microbatch_tokens)  # (N, T)
        rejected_ref_logprobs = no_grad_logprobs(reference, rejected, args.temperature,
                                                 args.microbatch_tokens)

        # 4. advantages: none. 5. update: one optimizer step on the whole batch, in micro-batches
        loss = 0.0
        optimizer.zero_grad()
        chosen_rewards, rejected_rewards = torch.zeros(2, len(chosen), device=device)  # (N,) each
        for rows in microbatches(policy, args.microbatch_tokens, chosen, rejected):
            chosen_logprobs = token_logprobs(policy, chosen[rows], args.temperature)  # (n, T)
            rejected_logprobs = token_logprobs(policy, rejected[rows], args.temperature)  # (n, T)
            part, chosen_rewards[rows], rejected_rewards[rows] = compute_loss(
                chosen_logprobs, rejected_logprobs, chosen_ref_logprobs[rows],
                rejected_ref_logprobs[rows], args.beta)
            (part / len(chosen)).backward()
            loss += part.item() / len(chosen)
        loss = sum_over_ranks(loss)
        sum_gradients(policy)  # over all processes
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        run.check_finite(examples, loss=loss, grad_norm=grad_norm)
        optimizer.step()

        # 6. log, evaluate, save
        chosen_rewards = sum_over_ranks(chosen_rewards)
        rejected_rewards = sum_over_ranks(rejected_rewards)
        metrics = {
            "rewards/chosen": chosen_rewards.mean(),
            "rewards/rejected": rejected_rewards.mean(),
            "rewards/margins": (chosen_rewards - rejected_rewards).mean(),
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float().mean(),
            "policy/loss": loss, "policy/grad_norm": grad_norm,
            "policy/grad_clipped": grad_norm > args.max_grad_norm,
            "policy/lr": scheduler.get_last_lr()[0],
        }
        run.log(metrics, samples=2 * len(chosen))
        scheduler.step()
        if run.evaluation_is_due():
            run.log_evaluation(evaluate(policy, reference, tokenizer, reward_fns, test, args))
            run.save_model(policy)
        run.checkpoint()  # if due; also exits after Ctrl-C or SIGTERM

    run.finish(test)
    return policy


if __name__ == "__main__":
    main(parse(Args))
    leave()
