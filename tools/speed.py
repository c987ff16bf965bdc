"""Where the time of an RLOO update goes: CPU seconds of each phase, next to what matrix products cost, and to TRL.

    python lab/speed.py                                                   # one workload, given by flags
    python lab/speed.py --workload s-full s-ragged tldr-s                 # named ones
    python lab/speed.py --against trl --trl-python .venv-trl/bin/python     # docs/speed.md says how to make it
    python lab/speed.py --without "shared prompts" "room in the cache"    # what each is worth: all by turns

It makes a policy, a reward model of the same size (Llamas with random weights) and random prompts, and runs rloo.py's
loop on them on the CPU, in a fresh process that reads a clock after each phase. The clock is the process's CPU time
(user + system, all threads), which other processes change little. The tables show medians over updates.

"Of the matmul limit": 100% would be a phase that does nothing but the matrix products that its rows need, as fast as
torch multiplies large square matrices of that dtype in the same process. Counted are real tokens, without padding, as
if no two rows had the same prompt: a phase that runs a prompt once for its k responses may be above 100%. A token costs
2 operations for each weight of the layers, and in each layer 4 x width for every token that it attends to. Logits are
needed for response tokens only, and the last response token need not be run, except to score it. The backward pass
needs twice the forward pass's operations; the optimizer none that are matrix products.

All token embeddings have one large number in common, which the last norm turns into a constant, and EOS's row of the
head reads nothing else. So EOS has the same probability at every token, 0 or with --ragged 1/32, in a plain Llama.

TRL: its RLOOTrainer with the same models, prompts, k, lengths, temperature, beta, learning rate and clipping, one step
per rollout, without logging and saving. "trl default" keeps RLOOConfig's bfloat16, gradient checkpointing, and 8 rows
at a time; "trl tuned" has float32, no checkpointing, and --trl-rows. Each measurement is a fresh process, by turns.
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
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig,
                          PreTrainedTokenizerFast)

LAB = Path(__file__).resolve().parent
sys.path.insert(0, str(LAB.parent))

from plumbing import (clip_gradients, fitting_tokens, from_pretrained, load_model, load_reference,  # noqa: E402
                      load_rows, load_tokenizer, require)

SIZES = {
    "S": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=344, vocab_size=512),
    "M": dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1376, vocab_size=8192),
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
CONTENDERS = {"none": ["ours"], "trl": ["ours", "trl default", "trl tuned"], "trl-tuned": ["ours", "trl tuned"]}
PHASES = "rollout score reference forward backward optimizer".split()
REMEDIES = {  # name -> what takes its place in a measurement without it
    "shared prompts": ("common.prompt_numbers", lambda batch: torch.arange(len(batch))),  # no two rows have the same
    "room in the cache": ("common.RoomyLayer", lambda layer, room: layer),
    "fitting micro-batches": ("speed.fitting_tokens", lambda model, device: 8192),
}
TEMPERATURE, BETA, LR = 0.7, 0.05, 1e-6  # so small a step leaves EOS's probability as it is
WARMUP = 2  # updates of each process that are not counted


@dataclass
class Args:
    workload: tuple[str, ...] = ()
    """s-full, s-ragged, m-full, m-ragged, tldr-s, tldr-m: values for --size, --prompt-tokens, --new-tokens, --ragged"""
    size: str = "S"
    """S (0.9 million parameters), M (33.7 million), or hub name or folder of a model whose shape is taken"""
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
    """also measure rloo.py without 'shared prompts', 'room in the cache' or 'fitting micro-batches' (or several)"""
    trl_python: str = sys.executable
    """python of an environment that has this project's requirements and TRL"""
    trl_rows: int = 16
    """responses that the tuned TRL runs at a time"""
    json: str | None = None
    """file for all numbers"""


def make(args, folder):
    """Write policy, reward model, and the prompts of all updates. Every character of the tokenizer is one token."""
    torch.manual_seed(0)
    ids = dict(bos_token_id=None, eos_token_id=0, pad_token_id=0, tie_word_embeddings=False, num_labels=1)
    config = (LlamaConfig(**SIZES[args.size], **ids) if args.size in SIZES
              else from_pretrained("model", AutoConfig, args.size, **ids))
    words = ["<eos>", *(chr(0x20000 + i) for i in range(1, config.vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")

    policy = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        embedding, head = policy.get_input_embeddings().weight, policy.get_output_embeddings().weight
        embedding[:, 0] = 1000.0  # after the last norm sqrt(hidden size), whatever the layers have added
        head[:, 0] = head[0] = 0.0  # all other logits are close to 0
        logit = TEMPERATURE * math.log((config.vocab_size - 1) / 31) if args.ragged else -100.0
        head[0, 0] = logit / config.hidden_size**0.5
    reward = AutoModelForSequenceClassification.from_config(config).float()
    for name, model in (("policy", policy), ("reward", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    low, high = args.prompt_tokens
    lengths = torch.randint(low, high + 1, (args.prompts * (WARMUP + args.updates),)).tolist()
    prompts = ["".join(words[i] for i in torch.randint(1, len(words), (length,))) for length in lengths]
    datasets.Dataset.from_dict({"prompt": prompts}).save_to_disk(folder / "prompts")
    return {"parameters": sum(parameter.numel() for parameter in policy.parameters())}


def operations(model, prompt_lengths, response_lengths):
    """Operations that each phase needs for rows of these lengths (see above): dict phase -> number."""
    config = model.config
    weights = sum(part.weight.numel() for part in model.base_model.modules() if isinstance(part, torch.nn.Linear))
    width = config.num_hidden_layers * config.num_attention_heads * (  # of all layers
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    body = lambda n: n * 2 * weights + n * (n + 1) // 2 * 4 * width  # a token attends to those before it and itself
    rows = list(zip(prompt_lengths, response_lengths))
    logprobs = sum(body(P + T - 1) + T * 2 * config.hidden_size * config.vocab_size for P, T in rows)
    scores = sum(body(P + T) + 2 * config.hidden_size for P, T in rows)
    return dict(zip(PHASES, (logprobs, scores, logprobs, logprobs, 2 * logprobs, 0)))


def matmul_speed(dtype, size=1024):
    """Operations per CPU second of a large square matrix product: the best of several."""
    a, b = torch.randn(2, size, size, dtype=getattr(torch, dtype))
    seconds = []
    for _ in range(6):
        start = time.process_time()
        torch.nn.functional.linear(a, b)  # what models call: for bfloat16 on a CPU, a @ b can be much slower
        seconds.append(time.process_time() - start)
    return 2 * size**3 / min(seconds)


def measure_ours(args, folder):
    """rloo.py's loop with a clock. Returns: updates (list of dicts: seconds and operations by phase, tokens), limit."""
    import rloo  # and what it imports, here, so that TRL's process does not hold it
    from common import microbatches, no_grad_logprobs, rollout, sequence_rewards, token_kl, token_logprobs
    from runs import load_rewards

    device = torch.device("cpu")
    flags = rloo.Args(model=f"{folder}/policy", reward=(f"{folder}/reward",), dataset=f"{folder}/prompts",
                      dtype=args.dtype, k=args.k, max_prompt_length=10**9, max_new_tokens=args.new_tokens,
                      microbatch_tokens=args.microbatch_tokens, temperature=TEMPERATURE, beta=BETA, lr=LR)
    flags.microbatch_tokens = args.microbatch_tokens or fitting_tokens(flags.model, device)
    tokenizer = load_tokenizer(flags.model)
    policy = load_model(flags.model, device, flags.dtype)
    reference = load_reference(flags, tokenizer, device)
    reward_fns = load_rewards(flags, tokenizer, device)
    train = load_rows(flags, "train", tokenizer)
    optimizer = torch.optim.Adam(policy.parameters(), lr=flags.lr)
    limit, updates = matmul_speed(args.dtype), []
    for start in range(0, len(train), args.prompts):
        examples, seconds, last = train[start : start + args.prompts], dict.fromkeys(PHASES, 0.0), time.process_time()

        def lap(phase):
            nonlocal last
            now = time.process_time()
            seconds[phase] += now - last
            last = now

        batch = rollout(policy, tokenizer, examples["prompt_ids"], flags.k, flags.temperature, flags.max_new_tokens,
                        flags.rollout_batch_size)
        lap("rollout")
        scores = reward_fns["score"](batch, examples)["score"]
        lap("score")
        ref_logprobs = no_grad_logprobs(reference, batch, flags.temperature, flags.microbatch_tokens)
        kl = token_kl(batch.old_logprobs, ref_logprobs, batch.response_mask)
        advantages = rloo.compute_advantages(sequence_rewards(scores, kl, flags.beta), flags.k)
        lap("reference")
        optimizer.zero_grad()
        for rows in microbatches(policy, flags.microbatch_tokens, batch):
            logprobs = token_logprobs(policy, batch[rows], flags.temperature)
            loss = rloo.compute_loss(logprobs, advantages[rows]) / len(batch)
            lap("forward")
            loss.backward()
            lap("backward")
        clip_gradients(policy, flags.max_grad_norm)
        optimizer.step()
        lap("optimizer")
        lengths = batch.response_mask.sum(1).tolist()
        needed = operations(policy, batch.prompt_mask.sum(1).tolist(), lengths)
        updates.append({"seconds": seconds, "tokens": sum(lengths), "operations": needed})
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
        per_device_train_batch_size=at_a_time, gradient_accumulation_steps=rows // at_a_time, num_generations=args.k,
        max_completion_length=args.new_tokens, temperature=TEMPERATURE, beta=BETA, learning_rate=LR, max_grad_norm=1.0,
        lr_scheduler_type="constant", max_steps=WARMUP + args.updates, shuffle_dataset=False, use_cpu=True,
        output_dir=folder / "trl", report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True,
        **mode,
    )

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.process_time()

        def on_step_end(self, *_, **__):
            seconds = {"update": time.process_time() - self.start}
            length = trainer._metrics["train"]["completions/mean_length"][-1]
            updates.append({"seconds": seconds, "tokens": round(length * rows)})

    trainer = RLOOTrainer(f"{folder}/policy", f"{folder}/reward", config, callbacks=[Clock()],
                          train_dataset=datasets.load_from_disk(f"{folder}/prompts"))
    trainer.train()
    return {"updates": updates[WARMUP:]}


def child(what, folder):
    """In a fresh process: make the models, or measure a contender. Writes result.json."""
    folder = Path(folder)
    args = Args(**json.loads((folder / "args.json").read_text()))
    result = {
        "make": lambda: make(args, folder),
        "ours": lambda: measure_ours(args, folder),
        "trl default": lambda: measure_trl(args, folder, 8),
        "trl tuned": lambda: measure_trl(args, folder, args.trl_rows, bf16=False, gradient_checkpointing=False),
        **{f"without {remedy}": lambda remedy=remedy: measure_without(args, folder, remedy) for remedy in REMEDIES},
    }[what]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MB
    (folder / "result.json").write_text(json.dumps(result | {"peak": peak}))


def measure(args):
    """All contenders by turns, on the same models and prompts: dict name -> updates, peak, limit of its processes."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "args.json").write_text(json.dumps(asdict(args)))
        for what in ["make"] + args.rounds * (CONTENDERS[args.against] + [f"without {name}" for name in args.without]):
            python = args.trl_python if what.startswith("trl") else sys.executable
            code = f"import sys; sys.path.insert(0, {str(LAB)!r}); import speed; speed.child({what!r}, {folder!r})"
            threads = {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
            process = subprocess.run([python, "-c", code], env=os.environ | threads, capture_output=True, text=True)
            error = (process.stderr.strip().splitlines() or [""])[-1].removeprefix("error: ")
            require(process.returncode == 0, f"{what}: {error or f'exit code {process.returncode}'}")
            found = json.loads((Path(folder) / "result.json").read_text())
            result = results.setdefault(what, {"updates": []})
            result["updates"] += found.pop("updates", [])
            result |= {key: max(value, result.get(key, 0)) for key, value in found.items()}
    return results


def table(head, *lines):
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)) + "\n"


def phase_table(ours):
    """A line for each phase of our updates, and one for all: medians."""
    updates, lines = ours["updates"], []
    tokens = median(update["tokens"] for update in updates)
    total = lambda column, phases: median(sum(update[column][phase] for phase in phases) for update in updates)
    for name, phases in [*((phase, [phase]) for phase in PHASES), ("update", PHASES)]:
        seconds, needed = total("seconds", phases), total("operations", phases)
        lines.append([name, f"{seconds:.3f}", f"{seconds / total('seconds', PHASES):.0%}", f"{tokens / seconds:,.0f}",
                      f"{needed / seconds / ours['limit']:.0%}" if needed else "–"])
    return table(["phase", "CPU s", "share", "tokens / s", "of the matmul limit"], *lines)


def contender_table(results, rows):
    """A line for each contender, with what shows whether all have done the same work. `rows`: responses per update."""
    lines, ours = [], None
    for name, result in results.items():
        seconds = [sum(update["seconds"].values()) for update in result["updates"]]
        tokens, middle = [update["tokens"] for update in result["updates"]], median(seconds)
        ours = ours or middle
        lines.append([name, f"{middle:.3f}", f"{min(seconds):.3f} – {max(seconds):.3f}", f"{middle / ours:.2f}",
                      f"{median(tokens) / middle:,.0f}", f"{mean(tokens):,.0f}", f"{mean(tokens) / rows:.1f}",
                      f"{result['peak']:,.0f}"])
    return table(["", "CPU s / update", "from – to", "times ours", "tokens / s", "tokens / update", "mean length",
                  "peak MB"], *lines)


def main(args):
    for name in args.workload:
        require(name in WORKLOADS, f"--workload {name}: choose from {', '.join(WORKLOADS)}")
    for name in args.without:
        require(name in REMEDIES, f"--without {name}: choose from {', '.join(REMEDIES)}")
    if args.against != "none":
        require(os.access(args.trl_python, os.X_OK) and not subprocess.run(
            [args.trl_python, "-c", "import trl, tyro"], capture_output=True).returncode,
            f"--trl-python {args.trl_python}: cannot import trl and this project's requirements; see docs/speed.md")
    numbers = {}
    for name in args.workload or ["flags"]:
        workload = replace(args, **WORKLOADS.get(name, {}))
        results = measure(workload)
        numbers[name] = {"args": asdict(workload), **results}
        low, high = workload.prompt_tokens
        print(f"{name}: {results.pop('make')['parameters'] / 1e6:.1f} million parameters, {workload.dtype}; "
              f"{workload.prompts} prompts of {low} to {high} tokens, k {workload.k}, "
              f"{'up to ' * workload.ragged}{workload.new_tokens} new tokens; "
              f"limit: {results['ours']['limit'] / 1e9:.0f} billion operations per CPU second\n")
        print(phase_table(results["ours"]))
        print(contender_table(results, workload.prompts * workload.k), flush=True)
        if args.json:
            Path(args.json).write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args))
