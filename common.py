"""What every script of this project shares. No estimator and no policy loss lives here: those are the scripts' own.

First what a training step is made of, in the order in which it uses it: rows of tokens, rollout, log-probs and KL,
reward scoring, evaluation. Then the plumbing: models and data, run folder and logs, mistakes. Names and shapes are the
same everywhere:

    B prompts, k samples for each, N = B * k rows; row = prompt * k + sample ("prompt-major")
    P prompt tokens (padded on the left), T response tokens (padded on the right), V words in the vocabulary
"""

import functools
import importlib.util
import itertools
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import datasets
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()


# ------------------------------------------------------------------------------------------------------- rows of tokens


@dataclass
class Batch:
    """N rows, each a prompt and one response."""

    prompts: torch.Tensor  # (N, P) token ids, padded on the left
    prompt_mask: torch.Tensor  # (N, P) bool
    responses: torch.Tensor  # (N, T) token ids, padded on the right
    response_mask: torch.Tensor  # (N, T) bool, True up to and including the first EOS
    ended: torch.Tensor  # (N,) bool, True where the response has an EOS
    old_logprobs: torch.Tensor  # (N, T) log-probs under the policy that sampled the responses, 0 where masked

    def __len__(self):
        return len(self.responses)

    def __getitem__(self, rows):
        return Batch(*(getattr(self, field.name)[rows] for field in fields(self)))


def pad(rows, pad_id, side, device):
    """Lists of ids -> ids (N, L) and bool mask (N, L), padded on the "left" or "right"."""
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.bool().to(device)


def encode(tokenizer, prompts, completions, device, ended=True):
    """Batch of given texts, as if they had been sampled: a completion gets an EOS where `ended` (bool or N bools)."""
    ended = [ended] * len(prompts) if isinstance(ended, bool) else list(ended)
    responses = tokenizer(completions, add_special_tokens=False)["input_ids"]
    responses = [ids + [tokenizer.eos_token_id] * end for ids, end in zip(responses, ended)]
    responses, response_mask = pad(responses, tokenizer.pad_token_id, "right", device)
    prompts = pad(tokenizer(prompts)["input_ids"], tokenizer.pad_token_id, "left", device)
    unknown = torch.zeros(responses.shape, device=device)
    return Batch(*prompts, responses, response_mask, torch.tensor(ended, device=device), unknown)


def decode(tokenizer, batch):
    """The N responses as text, without special tokens."""
    rows = [ids[mask].tolist() for ids, mask in zip(batch.responses, batch.response_mask)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def join(batch):
    """Each row's prompt and response in one: ids and mask (N, P + T), and T; without the columns that all rows pad."""
    P, T = batch.prompt_mask.sum(1).max().item(), batch.response_mask.sum(1).max().item()
    ids = torch.cat([batch.prompts[:, -P:], batch.responses[:, :T]], 1)
    return ids, torch.cat([batch.prompt_mask[:, -P:], batch.response_mask[:, :T]], 1), T


def repeat(values, k):
    """[a, b] -> [a, a, ..., b, b, ...]: what belongs to B prompts, for the N = B * k rows."""
    return [value for value in values for _ in range(k)]


def positions(mask):
    """Position ids (N, L) that count real tokens only: left padding must not shift a prompt."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def microbatches(max_tokens, *groups):
    """Yield index tensors that together cover all rows once, rows of like length together.

    Row i of every group goes together (one Batch; or two, of chosen and rejected responses). A micro-batch has at most
    `max_tokens` tokens, padding included; a single row that is longer comes alone. What is summed over micro-batches
    and divided by the whole batch's count does not depend on `max_tokens`: only memory and time do.
    """
    prompt_lengths = torch.stack([batch.prompt_mask.sum(1) for batch in groups]).amax(0).tolist()
    lengths = torch.stack([batch.response_mask.sum(1) for batch in groups]).amax(0).tolist()
    rows, P, T = [], 0, 0
    for row in sorted(range(len(lengths)), key=lambda row: (lengths[row], prompt_lengths[row])):
        P, T = max(P, prompt_lengths[row]), max(T, lengths[row])
        if rows and (len(rows) + 1) * (P + T) * len(groups) > max_tokens:
            yield torch.tensor(rows)
            rows, P, T = [], prompt_lengths[row], lengths[row]
        rows.append(row)
    yield torch.tensor(rows)


# -------------------------------------------------------------------------------------------------------------- rollout


def eos_ids(policy, tokenizer):
    """Every token id that ends a response: the tokenizer's EOS and those of the model's generation config."""
    config = getattr(policy, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    more = more if isinstance(more, list) else [] if more is None else [more]
    return torch.tensor(sorted({tokenizer.eos_token_id, *more}))


def log_softmax(logits, temperature):
    """Log-probs of softmax(logits / temperature), in float32 at least."""
    return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)


@torch.no_grad()
def rollout(policy, tokenizer, prompts, k, temperature, max_new_tokens, greedy=False):
    """Sample k responses for each prompt from exactly softmax(logits / temperature): no top-k, no top-p.

    The prompt runs through the model once for its k samples, and rows that have ended leave the batch.

    Args: policy (causal LM); tokenizer; prompts (list of B str); k; temperature; max_new_tokens; greedy (take the
    most probable token instead of a sample).
    Returns: Batch of N = B * k rows, prompt-major.
    """
    device = policy.device
    ends = eos_ids(policy, tokenizer).to(device)
    prompts, prompt_mask = pad(tokenizer(prompts)["input_ids"], tokenizer.pad_token_id, "left", device)  # (B, P)
    output = policy(input_ids=prompts, attention_mask=prompt_mask, position_ids=positions(prompt_mask),
                    use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(k)
    logits = output.logits[:, -1].repeat_interleave(k, 0)  # (N, V)
    prompts, prompt_mask = prompts.repeat_interleave(k, 0), prompt_mask.repeat_interleave(k, 0)  # (N, P)

    N = len(prompts)
    responses = torch.full((N, max_new_tokens), tokenizer.pad_token_id, device=device)  # (N, T)
    response_mask = torch.zeros((N, max_new_tokens), dtype=torch.bool, device=device)  # (N, T)
    old_logprobs = torch.zeros((N, max_new_tokens), dtype=log_softmax(logits[:1], 1).dtype, device=device)  # (N, T)
    ended = torch.zeros(N, dtype=torch.bool, device=device)  # (N,)
    alive, mask = torch.arange(N, device=device), prompt_mask  # the n rows still being written, and their context
    for t in range(max_new_tokens):
        logprobs = log_softmax(logits, temperature)  # (n, V)
        # The Gumbel-max trick: the argmax of log-probs plus Gumbel noise is a sample from the softmax.
        noise = 0.0 if greedy else -torch.empty_like(logprobs).exponential_().log()
        tokens = (logprobs + noise).argmax(1, keepdim=True)  # (n, 1)
        responses[alive, t] = tokens.squeeze(1)
        response_mask[alive, t] = True
        old_logprobs[alive, t] = logprobs.gather(1, tokens).squeeze(1)
        over = torch.isin(tokens.squeeze(1), ends)  # (n,)
        ended[alive[over]] = True
        if over.all() or t + 1 == max_new_tokens:
            break
        if over.any():
            going = (~over).nonzero().squeeze(1)
            alive, mask, tokens = alive[going], mask[going], tokens[going]
            cache.batch_select_indices(going)
        mask = F.pad(mask, (0, 1), value=True)  # (n, P + t + 1)
        output = policy(input_ids=tokens, attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
                        past_key_values=cache, use_cache=True)
        logits = output.logits[:, -1]
    T = t + 1
    return Batch(prompts, prompt_mask, responses[:, :T], response_mask[:, :T], ended, old_logprobs[:, :T])


# ----------------------------------------------------------------------------------------------------- log-probs and KL


def token_logprobs(model, batch, temperature):
    """Log-prob of each response token under softmax(logits / temperature), with gradients.

    Returns: (N, T), 0 where masked.
    """
    ids, mask, T = join(batch)
    # The logits at a position predict the next token: the last prompt position up to the last but one of the response.
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False,
                   logits_to_keep=T + 1)
    logprobs = log_softmax(output.logits[:, :-1], temperature)  # (N, T, V)
    logprobs = logprobs.gather(2, batch.responses[:, :T, None]).squeeze(2)  # (N, T)
    logprobs = logprobs.masked_fill(~batch.response_mask[:, :T], 0.0)
    return F.pad(logprobs, (0, batch.responses.shape[1] - T))


@torch.no_grad()
def frozen_logprobs(model, batch, temperature, max_tokens):
    """`token_logprobs` of a model that is not being trained, in micro-batches, without gradients. Returns (N, T)."""
    logprobs = torch.zeros_like(batch.old_logprobs)
    for rows in microbatches(max_tokens, batch):
        logprobs[rows] = token_logprobs(model, batch[rows], temperature).to(logprobs.dtype)
    return logprobs


def token_kl(logprobs, ref_logprobs, response_mask):
    """Per-token estimate k1 = log pi - log pi_ref of KL(pi || pi_ref), for tokens sampled from pi. Returns (N, T).

    Unbiased, and the one that belongs in a reward: its expected gradient there is that of the KL. Single values, and
    means of small batches, are often negative. (Schulman 2020, "Approximating KL divergence")
    """
    return (logprobs - ref_logprobs) * response_mask


def sequence_rewards(scores, kl, beta):
    """R(x, y) = r(x, y) - beta * log(pi(y|x) / pi_ref(y|x)), one per response (Ahmadian et al. 2024, section 2).

    Args: scores (N,); kl (N, T); beta. Returns: (N,).
    """
    return scores - beta * kl.sum(1)


def token_rewards(scores, kl, beta, response_mask):
    """r_t = -beta * kl_t, plus the score on the last token of the response, EOS where there is one.

    Args: scores (N,); kl (N, T); beta; response_mask (N, T). Returns: (N, T), 0 where masked; each row sums to
    sequence_rewards.
    """
    rewards = -beta * kl  # (N, T)
    last = response_mask.sum(1) - 1  # (N,)
    rewards[torch.arange(len(scores), device=scores.device), last] += scores.to(rewards.dtype)
    return rewards


# ------------------------------------------------------------------------------------------------------- reward scoring


def classifier_scores(model, batch):
    """Output of a one-label sequence classifier at each row's last real token, with gradients. Returns (N,).

    The position comes from the mask. transformers itself looks for the last id that is not the pad id, which is the
    wrong one where pad and EOS are the same.
    """
    ids, mask, T = join(batch)
    output = model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    last = ids.shape[1] - T + batch.response_mask.sum(1) - 1  # (N,)
    hidden = output.last_hidden_state[torch.arange(len(ids), device=last.device), last]  # (N, hidden)
    return model.score(hidden.to(model.score.weight.dtype)).squeeze(1)


def token_values(critic, batch):
    """A one-label classifier's output at the state before each response token, with gradients.

    The value of a state must not see the action: V of response token t is read at the position before it, the last
    prompt token for the first one. Returns: (N, T), 0 where masked.
    """
    ids, mask, T = join(batch)
    output = critic.base_model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    hidden = output.last_hidden_state[:, -T - 1 : -1]  # (N, T, hidden)
    values = critic.score(hidden.to(critic.score.weight.dtype)).squeeze(2)  # (N, T)
    return F.pad(values.masked_fill(~batch.response_mask[:, :T], 0.0), (0, batch.responses.shape[1] - T))


@torch.no_grad()
def frozen_values(critic, batch, max_tokens):
    """`token_values` in micro-batches, without gradients. Returns (N, T)."""
    values = torch.zeros_like(batch.old_logprobs)
    for rows in microbatches(max_tokens, batch):
        values[rows] = token_values(critic, batch[rows]).to(values.dtype)
    return values


def load_reward(name, tokenizer, device, dtype, max_tokens):
    """A function score(batch, columns) -> (N,) from a classifier or from "path/to/file.py:function".

    A classifier is any one-label AutoModelForSequenceClassification on a causal model. It is given the very ids of the
    rollout where its tokenizer is the policy's, and the text encoded anew, with an EOS where the response has one,
    where it is not. A python function is called as TRL does: function(prompts=..., completions=..., **columns), where
    columns are the dataset's other columns, each a list with one value per completion; it returns that many numbers.

    `columns` holds the dataset's rows (lists of B values) that the N = B * k rows of `batch` belong to.
    """
    if ".py:" in name:
        function = load_function(name)

        def score(batch, columns):
            k = len(batch) // len(columns["prompt"])
            columns = {key: repeat(values, k) for key, values in columns.items()}
            columns["prompts"] = columns.pop("prompt")
            columns["completions"] = decode(tokenizer, batch)
            try:
                values = [float(value) for value in function(**columns)]
            except Exception as error:
                stop(f"reward {name}: raised {type(error).__name__}: {one_line(error)}")
            require(len(values) == len(batch),
                    f"reward {name}: returned {len(values)} values for {len(batch)} completions")
            odd = [value for value in values if not math.isfinite(value)]
            require(not odd, f"reward {name}: returned {odd[:1]}; every value must be a finite number")
            return torch.tensor(values, device=device)  # (N,)

        return score

    model = load_classifier(name, device, dtype).requires_grad_(False)
    reward_tokenizer = load_tokenizer(name)
    same_ids = reward_tokenizer.get_vocab() == tokenizer.get_vocab()

    @torch.no_grad()
    def score(batch, columns):
        if not same_ids:
            prompts = repeat(columns["prompt"], len(batch) // len(columns["prompt"]))
            batch = encode(reward_tokenizer, prompts, decode(tokenizer, batch), device, batch.ended.tolist())
        scores = torch.zeros(len(batch), device=device)
        for rows in microbatches(max_tokens, batch):
            scores[rows] = classifier_scores(model, batch[rows])
        return scores

    return score


def find_gold(gold, dataset):
    """What --gold means: "auto" is the function gold_reward of the python file that --dataset names, if it has one."""
    path = dataset.rpartition(":")[0]
    if gold == "auto" and path.endswith(".py") and hasattr(load_module(path), "gold_reward"):
        return f"{path}:gold_reward"
    return None if gold in ("auto", "none") else gold


def load_measures(args, tokenizer, device):
    """The rewards of a run by name: "score", which is trained on, and "gold", only measured, where there is one.

    Args: args (reward, gold, dataset, dtype, microbatch_tokens); tokenizer (the policy's); device.
    """
    names = {"score": args.reward, "gold": find_gold(args.gold, args.dataset)}
    return {key: load_reward(name, tokenizer, device, args.dtype, args.microbatch_tokens)
            for key, name in names.items() if name}


# ----------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(policy, reference, tokenizer, measures, dataset, args, k=1, greedy=False, judge=None, rivals=None):
    """Sample k responses to each held-out prompt and measure them. Leaves the training's random numbers alone.

    Args: policy and reference (causal LMs); measures (dict name -> score function of load_reward); dataset (rows with
    prompt); args (temperature, max_new_tokens, microbatch_tokens, eval_batch_size, seed); judge (name of the measure
    that decides the win rate; by default the last); rivals (N texts to win against, and for each whether it ended; by
    default the dataset's completion column, if there is one).
    Returns: (values, completions): dict name -> (N,) floats on the CPU, and the N responses as text, prompt-major.
    """
    if rivals is None and "completion" in dataset.column_names:
        rivals = repeat(dataset["completion"][:], k), [True] * len(dataset) * k
    values, completions, judge = {}, [], judge or list(measures)[-1]
    with torch.random.fork_rng():
        torch.manual_seed(args.seed)
        size = max(1, args.eval_batch_size // k)
        for start in range(0, len(dataset), size):
            columns = dataset[start : start + size]
            batch = rollout(policy, tokenizer, columns["prompt"], k, args.temperature, args.max_new_tokens, greedy)
            ref_logprobs = frozen_logprobs(reference, batch, args.temperature, args.microbatch_tokens)  # (n, T)
            found = {name: measure(batch, columns) for name, measure in measures.items()}  # name -> (n,)
            if rivals:
                texts, ended = (part[len(completions) :][: len(batch)] for part in rivals)
                others = encode(tokenizer, repeat(columns["prompt"], k), texts, policy.device, ended)
                found["win_rate"] = wins(found[judge], measures[judge](others, columns))
            found["kl"] = token_kl(batch.old_logprobs, ref_logprobs, batch.response_mask).sum(1)
            found["length"] = batch.response_mask.sum(1)
            found["eos_rate"] = batch.ended
            for name, value in found.items():
                values.setdefault(name, []).append(value.float().cpu())
            completions += decode(tokenizer, batch)
    return {name: torch.cat(parts) for name, parts in values.items()}, completions


def wins(scores, other_scores):
    """1 where the first is better, 0 where it is worse, 1/2 where they are equal. Returns (N,)."""
    return (torch.sign(scores - other_scores) + 1) / 2


def try_rewards(tokenizer, dataset, device, measures):
    """Call each reward once on two rows of the dataset, so that a broken one stops the run before it starts."""
    columns = dataset[:2]
    texts = columns.get("completion", columns["prompt"])
    for measure in measures.values():
        measure(encode(tokenizer, columns["prompt"], texts, device), columns)


# ------------------------------------------------------------------------------------------------------ models and data


def pick_device(name):
    """torch.device for "cpu", "cuda", "mps", or the best one there is for "auto"."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except Exception:
        stop(f"--device {name}: not available here; use auto or cpu")


@functools.cache
def load_module(path):
    """The python file at `path`, imported once."""
    require(os.path.isfile(path), f"{path}: there is no such file")
    spec = importlib.util.spec_from_file_location(path, path)
    module = sys.modules[path] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        stop(f"{path}: cannot be imported: {type(error).__name__}: {one_line(error)}")
    return module


def load_function(spec):
    """The function named by "path/to/file.py:function"."""
    path, name = spec.rsplit(":", 1)
    function = getattr(load_module(path), name, None)
    require(callable(function), f"{spec}: {path} has no function {name}")
    return function


def one_line(error):
    return " ".join(str(error).split())


def check_path(what, name):
    """Stop if `name` is meant as a local path, rather than as a name on the hub, and is not there."""
    owner, _, rest = name.partition("/")
    is_path = name.startswith((".", "/", "~")) or "/" in rest or (rest and os.path.isdir(owner))
    is_path = is_path or name.endswith((".json", ".jsonl", ".csv", ".parquet"))
    require(not is_path or os.path.exists(name), f"{what} {name}: no such file or folder; give a path or a hub name")


def from_pretrained(what, auto_class, name, **kwargs):
    """auto_class.from_pretrained(name), from a local folder or the hub; stop in one line where it cannot be loaded."""
    check_path(what, name)
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:
        stop(f"{what} {name}: cannot be loaded from a folder or the hub: {one_line(error)[:300]}")


def load_tokenizer(name):
    """Tokenizer of a hub name, a folder, or "file.py:function" that returns (model, tokenizer)."""
    if ".py:" in name:
        tokenizer = load_function(name)()[1]
    else:
        tokenizer = from_pretrained("tokenizer", AutoTokenizer, name)
    require(tokenizer.eos_token_id is not None, f"tokenizer {name}: has no EOS token, so a response could never end")
    if tokenizer.pad_token_id is None:  # any id will do: masks go by position, never by id
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name, device, dtype="float32", auto_class=AutoModelForCausalLM, new=(), **kwargs):
    """Model of a hub name, a folder, or "file.py:function" that returns (model, tokenizer).

    Weights are kept in float32, since Adam's small steps vanish in bfloat16; dtype "bfloat16" runs the forward passes
    in it by autocast. Dropout is off (eval mode) for good: the sampler and the update must see the same policy.
    Only safetensors are read, and code from the hub never runs. `new` names the weights that may be missing.
    """
    if ".py:" in name:
        model = load_function(name)()[0]
    else:
        model, info = from_pretrained("model", auto_class, name, dtype=torch.float32, use_safetensors=True,
                                      output_loading_info=True, **kwargs)
        missing = sorted(set(info["missing_keys"]) - set(new))
        require(not missing, f"model {name}: lacks the weights {', '.join(missing[:3])}, so it is no such model")
    if dtype == "bfloat16":
        for module in (model, model.base_model):
            module.forward = torch.autocast(device.type, torch.bfloat16)(module.forward)
    return model.to(device).eval()


def load_reference(name, tokenizer, device, dtype="float32"):
    """The frozen policy that the KL is measured to; it must have the vocabulary of `tokenizer`, the policy's."""
    require(".py:" not in name, f"reference {name}: must be a hub name or a folder; a function would make new weights")
    same = load_tokenizer(name).get_vocab() == tokenizer.get_vocab()
    require(same, f"reference {name}: has another vocabulary than the policy, so there is no KL between them")
    return load_model(name, device, dtype).requires_grad_(False)


def load_classifier(name, device, dtype="float32", new_head=False):
    """Like load_model, for a reward model: a causal model with a one-label head called `score`, trained or new."""
    new, kwargs = (["score.weight"], {"num_labels": 1}) if new_head else ([], {})
    model = load_model(name, device, dtype, AutoModelForSequenceClassification, new, **kwargs)
    require(hasattr(model, "score"), f"model {name}: is no classifier on a causal model; wrap it in a python function")
    require(model.config.num_labels == 1, f"model {name}: has {model.config.num_labels} labels; a reward model has 1")
    return model


def load_critic(args, tokenizer, device):
    """The value model: args.critic, or where that is None the reward model, or where that is a function the policy.

    A policy gets a new head; a reward model or a critic keeps its own.
    """
    name = args.critic or (args.model if ".py:" in args.reward else args.reward)
    same = load_tokenizer(name).get_vocab() == tokenizer.get_vocab()
    require(same, f"critic {name}: has another vocabulary than the policy; name another with --critic")
    return load_classifier(name, device, args.dtype, new_head=True)


def load_dataset(name, split):
    """Rows of a hub dataset, a folder written by save_to_disk, a .json/.jsonl/.csv/.parquet file, or a python function.

    Args: name ("owner/name", a path, or "file.py:function" called with the split); split ("train", "test", ...; of a
    single file, which has no splits, any).
    """
    function = load_function(name) if ".py:" in name else check_path("dataset", name)
    require(not os.path.isfile(name) or os.path.getsize(name) > 0, f"dataset {name}: is empty")
    try:
        if function:
            dataset = function(split)
        elif os.path.isfile(os.path.join(name, "dataset_dict.json")):
            dataset = datasets.load_from_disk(name)[split]
        elif os.path.isfile(os.path.join(name, "dataset_info.json")):
            dataset = datasets.load_from_disk(name)
        elif os.path.isfile(name):
            kind = Path(name).suffix[1:].replace("jsonl", "json")
            dataset = datasets.load_dataset(kind, data_files=name, split="train")
        else:
            dataset = datasets.load_dataset(name, split=split)
    except Exception as error:
        stop(f"dataset {name}, split {split}: cannot be loaded: {type(error).__name__}: {one_line(error)[:300]}")
    require(isinstance(dataset, datasets.Dataset), f"dataset {name}: must be a datasets.Dataset, not {type(dataset)}")
    require(len(dataset) > 0, f"dataset {name}, split {split}: is empty")
    return dataset


def load_rows(name, split, tokenizer, columns, max_length, first=None):
    """The (first) rows of a dataset whose prompt, with the longest response and its EOS, has at most max_length tokens.

    Args: name and split (see load_dataset); tokenizer; columns ("prompt", and the response columns that must be
    there); max_length; first (how many rows at most). Says how many rows were too long.
    """
    dataset = load_dataset(name, split)
    for column in columns:
        require(column in dataset.column_names,
                f"dataset {name}: has no column {column!r}; it has {', '.join(dataset.column_names)}")
    for column in {"prompt", "completion", "chosen", "rejected"} & set(dataset.column_names):
        odd = [i for i, text in enumerate(dataset[column][:]) if not isinstance(text, str)]
        require(not odd, f"dataset {name}, split {split}: column {column!r} must hold text; row {odd[:1]} does not")

    prompts, *responses = ([len(ids) for ids in tokenizer(dataset[column][:], add_special_tokens=column == "prompt")
                            ["input_ids"]] for column in columns)
    require(min(prompts) > 0, f"dataset {name}, split {split}: row {prompts.index(min(prompts))} has an empty prompt")
    longest = [max(lengths) + 1 for lengths in zip(*responses)] if responses else [0] * len(dataset)
    fits = [i for i in range(len(dataset)) if prompts[i] + longest[i] <= max_length]
    require(fits, f"dataset {name}, split {split}: every row has more than {max_length} tokens; allow more")
    if len(fits) < len(dataset):
        print(f"dataset {name}, split {split}: left out {len(dataset) - len(fits)} of {len(dataset)} rows, which are "
              f"longer than {max_length} tokens")
    return dataset.select(fits[:first])


def batches(dataset, size, seed):
    """Yield dicts of columns (lists of `size` values) for ever, reshuffled every time the dataset has been used up."""

    def order():
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.randperm(len(dataset), generator=generator).tolist()

    stream = order()
    while True:
        yield dataset[list(itertools.islice(stream, size))]


# -------------------------------------------------------------------------------------------------- run folder and logs


def open_run(args, script):
    """Make the run folder: args.output (check_args has refused one that is in use), or a new one under runs/.

    Returns: (folder, TensorBoard writer); the folder holds args.json and the log, and later model/ beside them.
    """
    folder = Path(args.output or f"runs/{script}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        folder.mkdir(parents=True, exist_ok=bool(args.output))
    except OSError as error:
        stop(f"--output {folder}: cannot be made ({one_line(error)}); name another folder")
    settings = {"script": script, **asdict(args)}
    (folder / "args.json").write_text(json.dumps(settings, indent=2) + "\n")
    writer = SummaryWriter(folder)
    writer.add_text("hyperparameters", table(["flag", "value"], settings.items()))
    print(f"logs and model go to {folder}")
    return folder, writer


def table(header, rows):
    """A Markdown table, which TensorBoard's text tab renders."""
    clean = lambda cell: str(cell).replace("|", "\\|").replace("\n", "<br>")
    lines = [header, ["---"] * len(header), *([clean(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def log(writer, step, metrics):
    for name, value in metrics.items():
        writer.add_scalar(name, float(value), step)


def rollout_metrics(batch, scores, kl, rewards, k):
    """What every algorithm logs about a rollout: means over its N responses, and over its B prompts."""
    groups = scores.view(-1, k)  # (B, k)
    return {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/kl": kl.sum(1).mean(),
        "objective/rewards": rewards.mean(),
        "objective/frac_reward_zero_std": (groups.amax(1) == groups.amin(1)).float().mean(),
        "objective/entropy": -batch.old_logprobs.sum(1).mean(),
        "rollout/length": batch.response_mask.sum(1).float().mean(),
        "rollout/eos_rate": batch.ended.float().mean(),
    }


def show(bar, metrics):
    """Write reward, KL and length of the last rollout behind the progress bar."""
    names = {"score": "objective/scores", "kl": "objective/kl", "length": "rollout/length"}
    bar.set_postfix({short: f"{metrics[name].item():z.2f}" for short, name in names.items()}, refresh=False)


def log_evaluation(writer, step, evaluation):
    log(writer, step, {f"eval/{name}": value.mean() for name, value in evaluation[0].items()})


def log_samples(writer, step, columns, tokenizer, batch, scores, kl, advantages, rows=8):
    """The first responses of a rollout, for TensorBoard's text tab."""
    prompts = repeat(columns["prompt"], len(batch) // len(columns["prompt"]))
    numbers = [[f"{value:.2f}" for value in row.tolist()] for row in torch.stack([scores, kl.sum(1), advantages], 1)]
    cells = [[p, c, *n] for p, c, n in zip(prompts, decode(tokenizer, batch[:rows]), numbers)]
    writer.add_text("samples", table(["prompt", "response", "score", "KL", "advantage"], cells), step)


def check_finite(step, folder, **values):
    """Stop before a number that is not finite reaches the weights."""
    for name, value in values.items():
        if not math.isfinite(value):
            stop(f"update {step}: {name} is {float(value)}, so the run ends here; what was saved and logged until now "
                 f"stays in {folder}; try a smaller --lr or --max-grad-norm, and look at the rewards", code=1)


def report(folder, dataset, before, after):
    """Print what training changed: a table of the two evaluations, and one post with both policies' responses."""
    (old, old_texts), (new, new_texts) = before, after
    old, new = ({name: value.mean().item() for name, value in values.items()} for values in (old, new))
    (folder / "evaluation.json").write_text(json.dumps({"before": old, "after": new}, indent=2) + "\n")
    print(f"\n{'held-out prompts':<20}{'before':>10}{'after':>10}")
    for name in old:
        print(f"{name:<20}{old[name]:>z10.3f}{new[name]:>z10.3f}")
    print(f"\nprompt   {dataset[0]['prompt']}\nbefore   {old_texts[0]}\nafter    {new_texts[0]}")
    print(f"\nthe policy is in {folder / 'model'}; to see the curves: tensorboard --logdir {folder.parent}")


def save(folder, model, tokenizer):
    """Write a Hugging Face folder that from_pretrained loads; the old one stays until the new one is whole."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    model.save_pretrained(new)
    tokenizer.save_pretrained(new)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------- mistakes, told in one line


def stop(message, code=2):
    """End the program with one line on standard error and the exit code (2: a mistake on the command line)."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # which clears a progress bar first
    raise SystemExit(code)


def require(ok, message):
    """Stop with `message` unless `ok`: for what a user can get wrong, before any long work starts."""
    if not ok:
        stop(message)


def check_args(args):
    """Stop at the first flag, of those that several scripts share, whose value cannot work."""
    values = vars(args)
    if args.output:
        output = Path(args.output)
        parent = next(parent for parent in output.absolute().parents if parent.exists())
        require(parent.is_dir(), f"--output {output}: cannot be made, for {parent} is a file; name another")
        require(not output.is_file(), f"--output {output}: already exists; name another, or remove that file")
        require(not output.exists() or not any(output.iterdir()),
                f"--output {output}: already holds files; name a new folder, or remove that one")

    def check(name, ok, remedy):
        if name in values:
            require(ok(values[name]), f"--{name.replace('_', '-')} {values[name]}: {remedy}")

    for name in ("prompts_per_step", "num_updates", "batch_size", "max_new_tokens", "max_prompt_length", "max_length",
                 "microbatch_tokens", "eval_prompts", "eval_rows", "eval_batch_size", "k", "epochs", "minibatches"):
        check(name, lambda value: value >= 1, "must be 1 or more")
    check("temperature", lambda value: 0 < value < float("inf"), "must be above 0, and finite")
    for name in ("clip", "value_clip", "clip_scores"):
        check(name, lambda value: value > 0, 'must be above 0 ("inf" switches it off)')
    for name in ("lam", "gamma"):
        check(name, lambda value: 0 <= value <= 1, "must be from 0 to 1")
    for name in ("lr", "critic_lr", "max_grad_norm"):
        check(name, lambda value: 0 < value < float("inf"), "must be above 0, and finite")
    for name in ("beta", "missing_eos_penalty", "eval_every", "warmup_updates", "weight_decay", "center", "window"):
        check(name, lambda value: 0 <= value < float("inf"), "must be 0 or more, and finite")
