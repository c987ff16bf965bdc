"""Where the time of an RLOO update goes, by phase, next to what matrix products cost, and to TRL.

    python -m tools.speed                                   # one workload, given by flags
    python -m tools.speed --workload s-full s-ragged tldr-s # named ones
    python -m tools.speed --without everything "shared prompts" "room in the cache"
    python -m tools.speed --against trl --trl-python .venv-trl/bin/python   # see docs/speed.md

It makes a policy, a reward model of the same size (Llamas with random weights) and random prompts,
and runs rloo.py's loop on them on the CPU, in a fresh process that reads a clock after each phase.
The clock is the process's CPU time (user + system, all threads), which other processes change
little. The tables show medians over updates.

"Of the matmul limit": 100% would be a phase that does nothing but the matrix products that its rows
need, as fast as torch multiplies large square matrices of that dtype in the same process. Counted
are real tokens, without padding, as if no two rows had the same prompt: a phase that runs a prompt
once for its k responses may be above 100%. A token costs 2 operations for each weight of the
layers, and in each layer 4 x width for every token that it attends to. Logits are needed for
response tokens only, and the last response token need not be run, except to score it. The backward
pass needs twice the forward pass's operations; the optimizer none that are matrix products.

All token embeddings have one large number in common, which the last norm turns into a constant, and
EOS's row of the head reads nothing else. So EOS has the same probability at every token, 0 or with
--ragged 1/32, in a plain Llama.

--without: the same without something that makes it fast, by turns. Without "everything" it is what
--plain does: the passes of common.py alone, without plumbing/fast.py.

TRL: its RLOOTrainer with the same models, prompts, k, lengths, temperature, beta, learning rate and
clipping, one step per rollout, without logging and saving. "trl default" keeps RLOOConfig's
bfloat16, gradient checkpointing, and 8 rows at a time; "trl tuned" has float32, no checkpointing,
and --trl-rows. Each measurement is a fresh process, by turns.
"""

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Literal
from unittest.mock import patch

import datasets
import torch
import tyro
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          LlamaConfig, PreTrainedTokenizerFast)

from plumbing import (clip_gradients, load_policy, load_reference, load_rewards, load_rows,
                      load_tokenizer, require)
from plumbing.models import fitting_tokens, from_pretrained

SIZES = {
    "S": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=344,
              vocab_size=512),
    "M": dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1376,
              vocab_size=8192),
}
FULL = dict(ragged=False, prompt_tokens=(32, 64), new_tokens=48)
TLDR = dict(ragged=False, prompt_tokens=(300, 400), new_tokens=53)
WORKLOADS = {
    "s-full": FULL | {"size": "S"},
    "s-ragged": FULL | {"size": "S", "ragged": True},
    "m-full": FULL | {"size": "M"},
    "m-ragged": FULL | {"size": "M", "ragged": True},
    "tldr-s": TLDR | {"size": "S"},
    "tldr-m": TLDR | {"size": "M"},
}
CONTENDERS = {"none": ["ours"], "trl": ["ours", "trl default", "trl tuned"],
              "trl-tuned": ["ours", "trl tuned"]}
PHASES = "rollout score reference forward backward optimizer".split()
REMEDIES = {  # name -> what takes its place in a measurement without it
    "everything": ("plumbing.fast.fits", lambda model: False),  # what --plain does
    # No two rows have the same prompt.
    "shared prompts": ("plumbing.fast.prompt_numbers", lambda batch: torch.arange(len(batch))),
    "room in the cache": ("plumbing.fast.with_room", lambda cache, room: cache),
    "fitting micro-batches": ("tools.speed.fitting_tokens", lambda model, device: 8192),
}
TEMPERATURE, BETA = 0.7, 0.05
LR = 1e-6  # so small a step leaves EOS's probability as it is
WARMUP = 2  # updates of each process that are not counted


@dataclass
class Args:
    workload: tuple[str, ...] = ()
    """s-full, s-ragged, m-full, m-ragged, tldr-s, tldr-m: values for --size, --prompt-tokens,
    --new-tokens, --ragged"""
    size: str = "S"
    """S (0.9 million parameters), M (33.7 million), or hub name or folder of a model whose shape
    is taken"""
    prompts: int = 16
    """prompts per update"""
    k: int = 4
    """responses per prompt"""
    prompt_tokens: tuple[int, int] = (32, 64)
    """length of the shortest and of the longest prompt"""
    new_tokens: int = 48
    """length of the longest response"""
    ragged: bool = False
    """end a response at each token with probability 1/32; default: all have the full length"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute dtype, as in the scripts"""
    microbatch_tokens: int | None = None
    """as in the scripts"""
    updates: int = 5
    """measured updates of each process"""
    rounds: int = 2
    """processes of each kind, by turns"""
    threads: int = 1
    """threads of each process"""
    against: Literal["none", "trl", "trl-tuned"] = "none"
    """also measure TRL's RLOOTrainer, in both modes or only in the tuned one"""
    without: tuple[str, ...] = ()
    """also measure rloo.py without 'shared prompts', 'room in the cache', 'fitting micro-batches'
    or 'everything' (or several)"""
    trl_python: str = sys.executable
    """python of an environment that has this project's requirements and TRL"""
    trl_rows: int = 16
    """responses that the tuned TRL runs at a time"""
    json: str | None = None
    """file for all numbers"""


def make(args, folder):
    """Write policy, reward model, and the prompts of all updates."""
    torch.manual_seed(0)
    ids = dict(bos_token_id=None, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False,
               num_labels=1)
    config = (LlamaConfig(**SIZES[args.size], **ids) if args.size in SIZES
              else from_pretrained("model", AutoConfig, args.size, **ids))
    words = ["<eos>", *(chr(0x20000 + i) for i in range(1, config.vocab_size))]
    tokenizer = make_tokenizer(words)
    policy = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        embedding = policy.get_input_embeddings().weight
        head = policy.get_output_embeddings().weight
        embedding[:, 0] = 1000.0  # after the last norm sqrt(hidden size), whatever layers add
        head[:, 0] = head[0] = 0.0  # all other logits are close to 0
        logit = TEMPERATURE * math.log((config.vocab_size - 1) / 31) if args.ragged else -100.0
        head[0, 0] = logit / config.hidden_size**0.5
    reward = AutoModelForSequenceClassification.from_config(config).float()
    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    (low, high), count = args.prompt_tokens, args.prompts * (WARMUP + args.updates)
    lengths = torch.randint(low, high + 1, (count,)).tolist()
    prompts = ["".join(words[i] for i in torch.randint(1, len(words), (length,)))
               for length in lengths]
    datasets.Dataset.from_dict({"prompt": prompts}).save_to_disk(folder / "prompts")
    return {"parameters": sum(parameter.numel() for parameter in policy.parameters())}


def make_tokenizer(words):
    """A tokenizer to which every character is one token. The first word is EOS."""
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>",
                                   pad_token="<eos>")


# --------------------------------------------------------------------------------- the measurements


def operations(model, prompt_lengths, response_lengths):
    """Operations that each phase needs for rows of these lengths: dict phase -> number."""
    config = model.config
    weights = sum(part.weight.numel() for part in model.base_model.modules()
                  if isinstance(part, torch.nn.Linear))
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    width *= config.num_hidden_layers * heads  # of all layers
    pairs = lambda n: n * (n + 1) // 2  # a token attends to those before it and itself
    body = lambda n: n * 2 * weights + pairs(n) * 4 * width
    head = 2 * config.hidden_size * config.vocab_size
    rows = list(zip(prompt_lengths, response_lengths))
    logprobs = sum(body(P + T - 1) + T * head for P, T in rows)
    scores = sum(body(P + T) + 2 * config.hidden_size for P, T in rows)
    return dict(zip(PHASES, (logprobs, scores, logprobs, logprobs, 2 * logprobs, 0)))


def matmul_speed(dtype, size=1024):
    """Operations per CPU second of a large square matrix product: the best of several."""
    a, b = torch.randn(2, size, size, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(6):
        start = time.process_time()
        torch.nn.functional.linear(a, b)  # as models do: in bfloat16, a @ b can be much slower
        seconds.append(time.process_time() - start)
    return 2 * size**3 / min(seconds)


class Clock:
    """CPU seconds of each phase: a lap goes to the phase that has ended."""

    def __init__(self):
        self.seconds, self.last = dict.fromkeys(PHASES, 0.0), time.process_time()

    def lap(self, phase):
        now = time.process_time()
        self.seconds[phase] += now - self.last
        self.last = now


def measure_ours(args, folder):
    """rloo.py's loop with a clock.

    Returns: updates (list of dicts: seconds and operations by phase, tokens), limit.
    """
    # These, and what they import, are imported here so that TRL's process does not hold them.
    import rloo
    from common import (microbatches, no_grad_logprobs, rollout, score, sequence_rewards, token_kl,
                        token_logprobs)

    device = torch.device("cpu")
    flags = rloo.Args(model=f"{folder}/policy", reward=(f"{folder}/reward",),
                      dataset=f"{folder}/prompts", dtype=args.dtype, k=args.k,
                      max_prompt_length=10**9, max_new_tokens=args.new_tokens,
                      temperature=TEMPERATURE, beta=BETA, lr=LR)
    flags.microbatch_tokens = args.microbatch_tokens or fitting_tokens(flags.model, device)
    tokenizer, policy = load_tokenizer(flags.model), load_policy(flags, device)
    reference = load_reference(flags, tokenizer, device, policy)
    reward_fns = load_rewards(flags, device)
    train = load_rows(flags, "train", tokenizer)
    optimizer = torch.optim.Adam(policy.parameters(), lr=flags.lr)
    limit, updates = matmul_speed(args.dtype), []
    for start in range(0, len(train), args.prompts):
        examples, clock = train[start : start + args.prompts], Clock()
        batch = rollout(policy, tokenizer, examples["prompt_ids"], flags.k, flags.temperature,
                        flags.max_new_tokens, flags.rollout_batch_size)
        clock.lap("rollout")
        scores = score(reward_fns, tokenizer, batch, examples)["score"]
        clock.lap("score")
        ref_logprobs = no_grad_logprobs(reference, batch, flags.temperature,
                                        flags.microbatch_tokens)
        kl = token_kl(batch.old_logprobs, ref_logprobs, batch.response_mask)
        advantages = rloo.compute_advantages(sequence_rewards(scores, kl, flags.beta), flags.k)
        clock.lap("reference")
        optimizer.zero_grad()
        for rows in microbatches(policy, flags.microbatch_tokens, batch):
            logprobs = token_logprobs(policy, batch[rows], flags.temperature)
            loss = rloo.compute_loss(logprobs, advantages[rows]) / len(batch)
            clock.lap("forward")
            loss.backward()
            clock.lap("backward")
        clip_gradients(policy, flags.max_grad_norm)
        optimizer.step()
        clock.lap("optimizer")
        lengths = batch.response_mask.sum(1).tolist()
        needed = operations(policy, batch.prompt_mask.sum(1).tolist(), lengths)
        updates.append({"seconds": clock.seconds, "tokens": sum(lengths), "operations": needed})
    return {"updates": updates[WARMUP:], "limit": max(limit, matmul_speed(args.dtype))}


def measure_without(args, folder, remedy):
    with patch(*REMEDIES[remedy]):
        return measure_ours(args, folder)


def measure_trl(args, folder, rows_at_a_time, **mode):
    """RLOOTrainer's steps with a clock. Returns: updates (list of dicts: seconds, tokens)."""
    from transformers import TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    rows, updates = args.prompts * args.k, []
    at_a_time = math.gcd(rows, rows_at_a_time)
    config = RLOOConfig(
        per_device_train_batch_size=at_a_time, gradient_accumulation_steps=rows // at_a_time,
        num_generations=args.k, max_completion_length=args.new_tokens, temperature=TEMPERATURE,
        beta=BETA, learning_rate=LR, max_grad_norm=1.0, lr_scheduler_type="constant",
        max_steps=WARMUP + args.updates, shuffle_dataset=False, use_cpu=True,
        output_dir=folder / "trl", report_to="none", logging_strategy="no", save_strategy="no",
        disable_tqdm=True, **mode)

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.process_time()

        def on_step_end(self, *_, **__):
            seconds = {"update": time.process_time() - self.start}
            length = trainer._metrics["train"]["completions/mean_length"][-1]
            updates.append({"seconds": seconds, "tokens": round(length * rows)})

    trainer = RLOOTrainer(f"{folder}/policy", f"{folder}/reward", config, callbacks=[Watch()],
                          train_dataset=datasets.load_from_disk(f"{folder}/prompts"))
    trainer.train()
    return {"updates": updates[WARMUP:]}


def child(what, folder):
    """In a fresh process: make the models, or measure a contender. Writes result.json."""
    folder = Path(folder)
    args = Args(**json.loads((folder / "args.json").read_text()))
    tuned = dict(bf16=False, gradient_checkpointing=False)
    result = {
        "make": lambda: make(args, folder),
        "ours": lambda: measure_ours(args, folder),
        "trl default": lambda: measure_trl(args, folder, 8),
        "trl tuned": lambda: measure_trl(args, folder, args.trl_rows, **tuned),
        **{f"without {remedy}": lambda remedy=remedy: measure_without(args, folder, remedy)
           for remedy in REMEDIES},
    }[what]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB
    (folder / "result.json").write_text(json.dumps(result | {"peak": peak}))


def measure(args):
    """All contenders by turns, on the same models and prompts.

    Returns: dict name -> updates, peak, limit of its processes.
    """
    results = {}
    turn = CONTENDERS[args.against] + [f"without {name}" for name in args.without]
    threads = {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "args.json").write_text(json.dumps(asdict(args)))
        for what in ["make"] + args.rounds * turn:
            python = args.trl_python if what.startswith("trl") else sys.executable
            code = f"from tools import speed; speed.child({what!r}, {folder!r})"
            process = subprocess.run([python, "-c", code], env=os.environ | threads,
                                     capture_output=True, text=True)
            error = (process.stderr.strip().splitlines() or [""])[-1].removeprefix("error: ")
            require(process.returncode == 0,
                    f"{what}: {error or f'exit code {process.returncode}'}")
            found = json.loads((Path(folder) / "result.json").read_text())
            result = results.setdefault(what, {"updates": []})
            result["updates"] += found.pop("updates", [])
            result |= {key: max(value, result.get(key, 0)) for key, value in found.items()}
    return results


# --------------------------------------------------------------------------------------- the tables


def table(head, *lines):
    lines = (head, ["---"] * len(head), *lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def phase_table(ours):
    """A line for each phase of our updates, and one for all: medians."""
    updates, lines = ours["updates"], []
    tokens = median(update["tokens"] for update in updates)

    def total(column, phases):
        return median(sum(update[column][phase] for phase in phases) for update in updates)

    for name, phases in [*((phase, [phase]) for phase in PHASES), ("update", PHASES)]:
        seconds, needed = total("seconds", phases), total("operations", phases)
        lines.append([name, f"{seconds:.3f}", f"{seconds / total('seconds', PHASES):.0%}",
                      f"{tokens / seconds:,.0f}",
                      f"{needed / seconds / ours['limit']:.0%}" if needed else "–"])
    return table(["phase", "CPU s", "share", "tokens / s", "of the matmul limit"], *lines)


def contender_table(results, rows):
    """A line for each contender, with what shows whether all have done the same work.

    Args: results (see measure); rows (responses per update).
    """
    lines, ours = [], None
    for name, result in results.items():
        seconds = [sum(update["seconds"].values()) for update in result["updates"]]
        tokens, middle = [update["tokens"] for update in result["updates"]], median(seconds)
        ours = ours or middle
        lines.append([name, f"{middle:.3f}", f"{min(seconds):.3f} – {max(seconds):.3f}",
                      f"{middle / ours:.2f}", f"{median(tokens) / middle:,.0f}",
                      f"{mean(tokens):,.0f}", f"{mean(tokens) / rows:.1f}",
                      f"{result['peak']:,.0f}"])
    return table(["", "CPU s / update", "from – to", "times ours", "tokens / s", "tokens / update",
                  "mean length", "peak MB"], *lines)


# --------------------------------------------------------------------------------------------- main


def check_args(args):
    """Exit with a one-line error if a flag has an invalid value."""
    for name in args.workload:
        require(name in WORKLOADS, f"--workload {name}: choose from {', '.join(WORKLOADS)}")
    for name in args.without:
        require(name in REMEDIES, f"--without {name}: choose from {', '.join(REMEDIES)}")
    if args.against != "none":
        works = os.access(args.trl_python, os.X_OK) and not subprocess.run(
            [args.trl_python, "-c", "import trl, tyro"], capture_output=True).returncode
        require(works, f"--trl-python {args.trl_python}: cannot import trl and this project's "
                       "requirements; see docs/speed.md")


def main(args):
    check_args(args)
    numbers = {}
    for name in args.workload or ["flags"]:
        workload = replace(args, **WORKLOADS.get(name, {}))
        results = measure(workload)
        numbers[name] = {"args": asdict(workload), **results}
        low, high = workload.prompt_tokens
        print(f"{name}: {results.pop('make')['parameters'] / 1e6:.1f} million parameters, "
              f"{workload.dtype}; {workload.prompts} prompts of {low} to {high} tokens, "
              f"k {workload.k}, {'up to ' * workload.ragged}{workload.new_tokens} new tokens; "
              f"limit: {results['ours']['limit'] / 1e9:.0f} billion operations per CPU second\n")
        print(phase_table(results["ours"]))
        print(contender_table(results, workload.prompts * workload.k), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
