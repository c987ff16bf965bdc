"""Evaluate saved policies side by side, with the metrics used in the papers.

    python evaluate.py tasks/mini_tldr-sft runs/rloo-*/model
    python evaluate.py runs/a/model --against runs/b/model --judge reward

For each policy, on held-out prompts (Ahmadian et al. 2024, section 4.2 and table 2):

    score, variance    mean reward; its variance across a prompt's samples, averaged over prompts
    gold               mean of a held-out reward that training never sees, if there is one
    win_rate           share of responses that the judge scores above the reference text (or the
                       other policy's response); ties count one half; +- is the standard error
                       over prompts
    perplexity         of the dataset's preferred responses under the policy: what tuning cost in
                       fluency
    pass@1, @2, ...    if every score is 0 or 1: the probability that the best of so many samples
                       has a 1 (the unbiased estimate of Chen et al. 2021, arXiv:2107.03374)
    distinct           distinct responses to a prompt / all its samples, averaged over prompts
    entropy            of the next-token distribution at the sampling temperature, over the whole
                       vocabulary, in nats: mean over a response's tokens, then over responses
    diversity_1, _2    distinct words (word pairs) in a response / all of them, averaged over
                       responses
    length, eos_rate   tokens per response; share of responses that end with EOS
    kl                 KL(policy || reference) of whole responses, estimated from the samples
"""

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from common import (dry_run, evaluate, log_softmax, make_batch, microbatches, model_inputs,
                    no_grad_logprobs, wins)
from plumbing import (Count, Positive, Seed, check_ranges, find_gold, is_first, leave, load_model,
                      load_reference, load_reward, load_rewards, load_rows, load_tokenizer,
                      pick_device, reply_tokens, require, sum_over_ranks)


@dataclass
class Args:
    policies: Annotated[tuple[str, ...], tyro.conf.Positional]
    """policies to evaluate: hub names or folders"""
    reference: str = "tasks/mini_tldr-sft"
    """reference policy for the KL; all policies must share its tokenizer"""
    reward: tuple[str, ...] = ("tasks/mini_tldr-reward",)
    """one-label classifier (hub name or folder) or path/to/file.py:function; several are summed"""
    reward_weights: tuple[float, ...] = ()
    """weights of the rewards, if there are several; default: all 1"""
    gold: str = "auto"
    """held-out reward; auto: the function gold_reward in the --dataset file, if there is one; none:
    no gold reward"""
    judge: str = "gold"
    """what decides the win rate: gold, reward, or path/to/file.py:function"""
    against: str | None = None
    """opponent policy for the win rate (hub name or folder); default: the dataset's completion
    column"""
    dataset: str = "tasks/mini_tldr.py:prompts"
    """prompts, and reference responses (completion): hub name, path, or path/to/file.py:function"""
    dataset_config: str | None = None
    """configuration of a hub dataset that has several"""
    prompt_column: str | None = None
    """prompt column, if it is not called prompt"""
    completion_column: str | None = None
    """column of reference responses, if it is not called completion"""
    chat: bool = False
    """wrap plain-text prompts as a user message in the chat template"""
    system_prompt: str | None = None
    """system message to put before every prompt; implies --chat"""
    test_split: str = "test"
    """evaluation split"""
    preferred_column: str | None = None
    """column of preferred responses, for the perplexity; default: completion or chosen, if there is
    one"""
    eval_prompts: Count = 1000
    """number of prompts"""
    k: Count = 4
    """responses per prompt"""
    greedy: bool = False
    """decode greedily instead of sampling; omits variance and KL"""
    temperature: Positive = 0.7
    """sampling temperature; the KL uses log-probs under softmax(logits / temperature)"""
    max_prompt_length: Count = 512
    """drop prompts with more tokens than this"""
    truncate_prompts: bool = False
    """truncate long prompts on the left instead of dropping them"""
    max_new_tokens: Count = 32
    """maximum response length in tokens"""
    eval_batch_size: Count = 512
    """responses to sample at once"""
    microbatch_tokens: Count = 4096
    """maximum tokens per micro-batch, padding included"""
    seed: Seed = 1
    """random seed for sampling"""
    output: str | None = None
    """JSON file to write; default: runs/evaluation-<time>.json"""
    device: str = "auto"
    """auto, cuda, mps or cpu"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute dtype; bfloat16 uses autocast"""
    plain: bool = False
    """run models in the plain form of common.py only, without plumbing/fast.py"""
    shard: bool = False
    """shard the weights across processes (FSDP2, needs torchrun), for models that do not fit on one
    device"""


def diversity(texts, n):
    """Mean over texts of distinct word n-grams / all word n-grams (n is 1 or 2; shorter texts are
    skipped)."""
    ratios = []
    for text in texts:
        grams = text.split() if n == 1 else list(pairwise(text.split()))
        if grams:
            ratios.append(len(set(grams)) / len(grams))
    return sum(ratios) / len(ratios) if ratios else math.nan


def perplexity(policy, tokenizer, dataset, column, args):
    """exp of the mean negative log-prob per token, EOS included, of the texts in a column."""
    total = tokens = 0
    for start in range(0, len(dataset), args.eval_batch_size):
        examples = dataset[start : start + args.eval_batch_size]
        prompt_ids, prompts = examples["prompt_ids"], examples["prompt"]
        response_ids = examples.get(f"{column}_ids") or reply_tokens(
            tokenizer, prompts, prompt_ids, examples[column], f"column {column}")
        batch = make_batch(tokenizer, prompt_ids, response_ids, policy.device)
        total += no_grad_logprobs(policy, batch, 1.0, args.microbatch_tokens).sum().item()
        tokens += batch.response_mask.sum().item()
    return math.exp(-total / tokens)


@torch.no_grad()
def entropies(policy, batch, temperature, max_tokens):
    """Mean over a response's tokens of the entropy of softmax(logits / temperature) at each:
    (N,)."""
    found, T = torch.zeros(len(batch), device=policy.device), batch.responses.shape[1]  # (N,)
    for rows in microbatches(policy, max_tokens, batch):
        logits = policy(**model_inputs(batch[rows]), logits_to_keep=T + 1).logits[:, :-1]
        logprobs, mask = log_softmax(logits, temperature), batch.response_mask[rows]  # (n, T, V)
        entropy = -(logprobs.exp() * logprobs).sum(2) * mask  # (n, T)
        found[rows] = (entropy.sum(1) / mask.sum(1)).float()
    return sum_over_ranks(found)


def pass_at(correct, n):
    """Probability that n of a prompt's k samples, drawn without replacement, have a correct one,
    averaged over prompts.

    1 - C(k - c, n) / C(k, n) for c correct ones. (Chen et al. 2021, equation 1.) Args: correct (B,
    k) bool; n <= k.
    """
    k = correct.shape[1]
    return sum(1 - math.comb(k - c, n) / math.comb(k, n)
               for c in correct.sum(1).tolist()) / len(correct)


def summarize(values, completions, k):
    """Metrics of one policy from evaluate()'s values (dict name -> (N,), prompt-major) and
    completions (N texts)."""
    metrics = {"score": values["score"].mean().item()}
    scores = values["score"].view(-1, k)  # (B, k)
    if k > 1:
        metrics["variance"] = scores.var(1).mean().item()
        if torch.isin(scores, torch.tensor([0.0, 1.0])).all():
            metrics |= {
                f"pass@{n}": pass_at(scores == 1, n)
                for n in (2**i for i in range(k.bit_length())) if n <= k
            }
        groups = [completions[i : i + k] for i in range(0, len(completions), k)]
        metrics["distinct"] = sum(len(set(group)) for group in groups) / len(completions)
    if "gold" in values:
        metrics["gold"] = values["gold"].nanmean().item()
    if "win_rate" in values:
        per_prompt = values["win_rate"].view(-1, k).nanmean(1)  # (B,)
        per_prompt = per_prompt[~per_prompt.isnan()]  # where the judge returned a number
        metrics["win_rate"] = per_prompt.mean().item()
        metrics["win_rate+-"] = per_prompt.std().item() / math.sqrt(len(per_prompt))
    for n in (1, 2):
        metrics[f"diversity_{n}"] = diversity(completions, n)
    more = ("entropy", "length", "eos_rate", "kl")
    return metrics | {name: values[name].mean().item() for name in more if name in values}


def main(args):
    # Check everything that can go wrong before evaluating the first policy.
    require(args.policies, "name at least one policy (a folder or a hub name)")
    check_ranges(args)
    device = pick_device(args)
    output = Path(args.output or f"runs/evaluation-{time.strftime('%Y%m%d-%H%M%S')}.json")
    require(not output.exists(),
            f"--output {output}: already exists; choose another name, or delete that file")
    require(args.judge in ("gold", "reward") or ".py:" in args.judge,
            f"--judge {args.judge}: choose gold, reward, or path/to/file.py:function")
    require(args.judge != "gold" or find_gold(args.gold, args.dataset),
            "--judge gold: there is no gold reward; give one with --gold, or use --judge reward")
    tokenizer = load_tokenizer(args.reference)
    for name in (*args.policies, args.against):
        same = name is None or load_tokenizer(name).get_vocab() == tokenizer.get_vocab()
        require(same, f"policy {name}: its vocabulary is not that of --reference {args.reference}; "
                      "evaluate it separately")
    reference = load_reference(args, tokenizer, device)
    reward_fns = load_rewards(args, device)
    reward_fns.judge = {"gold": "gold", "reward": "score"}.get(args.judge, "judge")
    if reward_fns.judge == "judge":
        reward_fns.held_out["judge"] = load_reward(args.judge, args, device)
    dataset = load_rows(args, args.test_split, tokenizer, first=args.eval_prompts)
    columns = [args.preferred_column] if args.preferred_column else ["completion", "chosen"]
    preferred = next((column for column in columns if column in dataset.column_names), None)
    require(preferred or not args.preferred_column,
            f"--preferred-column {args.preferred_column}: the dataset has no such column")
    dry_run(reference, tokenizer, [dataset], reward_fns, args)

    k, opponents, results = 1 if args.greedy else args.k, None, {}
    load = lambda name: load_model(name, device, args.dtype, args.shard,
                                   args.plain).requires_grad_(False)
    if args.against:  # with a different seed, so that the two policies share no random numbers
        other = replace(args, seed=args.seed + 1)
        opponents, _ = evaluate(load(args.against), reference, tokenizer, reward_fns, dataset,
                                other, k, args.greedy)
    for name in tqdm(args.policies, desc="evaluate", unit="policy", disable=not is_first()):
        policy = load(name)
        entropy = lambda batch: {"entropy": entropies(policy, batch, args.temperature,
                                                      args.microbatch_tokens)}
        values, completions = evaluate(policy, reference, tokenizer, reward_fns, dataset, args, k,
                                       args.greedy, entropy)
        if opponents:
            values["win_rate"] = wins(values[reward_fns.judge], opponents[reward_fns.judge])
        if args.greedy:
            del values["kl"]  # estimating it takes samples
        results[name] = summarize(values, completions, k)
        if preferred:
            results[name]["perplexity"] = perplexity(policy, tokenizer, dataset, preferred, args)

    if is_first():
        print("".join([f"{'':<12}", *(f"  {name:>10}" for name in results)]))
        for metric in next(iter(results.values())):
            numbers = (f"  {metrics[metric]:>z{max(10, len(name))}.3f}"
                       for name, metrics in results.items())
            print(f"{metric:<12}" + "".join(numbers))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(
            json.dumps({"settings": asdict(args), "policies": results}, indent=2) + "\n")
        print(f"wrote {output}")
    return results


if __name__ == "__main__":
    main(tyro.cli(Args))
    leave()
