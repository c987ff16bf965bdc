"""One training run: its flags, folder, log, progress bar and checkpoints. A Run never calls a script's code."""

import functools
import gc
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from safetensors import SafetensorError
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import set_seed

from common import classifier_scores, decode, encode, microbatches, repeat
from plumbing import (batches, call_reward, check_positions, fitting_tokens, freeze, load_classifier, load_function,
                      load_module, load_optimizer_state, load_tokenizer, one_line, optimizer_state, pick_device,
                      pick_threads, prompt_tokens, random_states, rank_and_world_size, read_model, require,
                      set_random_states, stop, sum_over_ranks, write_model)


# ---------------------------------------------------------------------------------------------------------------- flags

@dataclass
class SystemArgs:
    """Memory, devices, output and checkpoints."""

    microbatch_tokens: int | None = None
    """maximum tokens per micro-batch, with padding; changes only memory and speed; default: 8192, or what fits a CPU"""
    device: str = "auto"
    """auto, cuda, mps or cpu"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute dtype; bfloat16 uses autocast, with weights and Adam states in float32"""
    shard: bool = False
    """shard the weights across processes (FSDP2, needs torchrun), for models that do not fit on one device"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    output: str | None = None
    """run folder for args.json, TensorBoard logs, model/ and checkpoints/; default: runs/<script>-seed<seed>-<time>"""
    save_every: int = 10
    """updates between checkpoints; 0 saves only at the end, or when SIGTERM or Ctrl-C stops the run"""
    keep: int = 2
    """number of recent checkpoints to keep"""
    resume: str | None = None
    """run folder to resume from its last checkpoint, with its flags; the result is as if it had never stopped"""


@dataclass
class DataArgs:
    """Which rows and columns of the dataset are used, and how prompts are formatted."""

    dataset_config: str | None = None
    """configuration of a hub dataset that has several"""
    prompt_column: str | None = None
    """prompt column, if it is not called prompt"""
    chat: bool = False
    """wrap plain-text prompts as a user message in the chat template"""
    system_prompt: str | None = None
    """system message to put before every prompt; implies --chat"""
    train_split: str = "train"
    """training split"""
    test_split: str = "test"
    """evaluation split"""
    truncate_prompts: bool = False
    """truncate long prompts on the left instead of dropping them"""


@dataclass
class EvaluationArgs:
    """Evaluation: sampled responses to held-out prompts."""

    reward_weights: tuple[float, ...] = ()
    """weights of the rewards, if there are several; default: all 1"""
    gold: str = "auto"
    """held-out reward, which judges the win rate; auto: gold_reward in the --dataset file, if any; none: no gold"""
    completion_column: str | None = None
    """column of reference responses for the win rate, if it is not called completion"""
    max_prompt_length: int = 512
    """drop prompts with more tokens than this"""
    eval_every: int = 40
    """updates between evaluations; 0 evaluates only before and after training"""
    eval_prompts: int = 256
    """number of held-out prompts per evaluation, with one sampled response each"""
    eval_batch_size: int = 256
    """responses to sample at once in an evaluation"""


@dataclass
class RunArgs(EvaluationArgs, DataArgs, SystemArgs):
    """Flags that every RL script has besides its own."""

    rollout_batch_size: int = 256
    """responses to sample at once on each process; bounds the KV cache's memory"""
    reward_noise: float = 0.0
    """standard deviation of Gaussian noise on each training score; the true mean is logged as objective/true_score"""


def parse(Args):
    """Args from the command line. With --resume, the flags of that run are the defaults."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before training starts there is nothing to save
    gc.freeze()  # the packages stay to the end: looking for garbage among them would cost a second
    flags = [part for flag in sys.argv[1:] for part in flag.split("=", 1)]
    default = Args()
    if "--resume" in flags[:-1]:
        folder = flags[flags.index("--resume") + 1]
        settings = read_settings(folder)
        unknown = settings.keys() - {item.name for item in fields(Args)} - {"script", "nproc_per_node"}
        require(not unknown, f"--resume {folder}: this is a run of {settings['script']}.py, which has other flags "
                             f"({', '.join(sorted(unknown)[:3])})")
        values = {name: value for name, value in settings.items() if name not in ("script", "nproc_per_node")}
        default = Args(**values | {"resume": folder, "output": None})
    groups = vars(tyro.cli(grouped(Args, default))).values()
    return Args(**{name: getattr(group, name) for group in groups for name in group.__dataclass_fields__})


def grouped(Args, default):
    """The groups of --help: a dataclass with a field for each class that Args is made of, the script's own first.

    Each holds the flags that its class adds, as a subclass, because tyro reads descriptions from the source.
    """
    groups, seen = [], set()
    for cls in filter(is_dataclass, Args.__mro__):
        own = {name: item for name, item in Args.__dataclass_fields__.items()
               if name in cls.__annotations__ and name not in seen}
        seen |= own.keys()
        view = type(cls.__name__, (cls,), {"__dataclass_fields__": own})
        values = functools.partial(view, **{name: getattr(default, name) for name in own})
        title = cls.__name__.removesuffix("Args").lower() or "algorithm"
        groups.append((title, tyro.conf.OmitArgPrefixes[view], field(default_factory=values)))
    return make_dataclass("Flags", groups)


def setup(args):
    """Check the flags, join torchrun's other processes, and seed. Returns this process's torch.device."""
    check_args(args)
    device = pick_device(args)
    if args.microbatch_tokens is None:
        args.microbatch_tokens = fitting_tokens(args.model, device)
    set_seed(args.seed)
    return device


def check_args(args):
    """Exit with a one-line error if a flag that several scripts share has an invalid value."""
    values = vars(args)
    require(not (args.output and getattr(args, "resume", None)),
            f"--output {args.output}: a resumed run continues in its own folder; remove this flag")
    if args.output:
        output = Path(args.output)
        path = next(parent for parent in output.absolute().parents if parent.exists())
        require(path.is_dir(), f"--output {output}: cannot be created, since {path} is a file; choose another folder")
        require(not output.is_file(), f"--output {output}: already exists; choose another name, or delete that file")
        require(not output.exists() or not any(output.iterdir()),
                f"--output {output}: is not empty; choose another folder, or delete that one")

    def check(name, ok, remedy):
        if name in values:
            require(values[name] is None or ok(values[name]), f"--{name.replace('_', '-')} {values[name]}: {remedy}")

    for name in ("prompts_per_step", "num_updates", "batch_size", "max_new_tokens", "max_prompt_length", "max_length",
                 "microbatch_tokens", "eval_prompts", "eval_rows", "eval_batch_size", "k", "epochs", "minibatches",
                 "keep", "rollout_batch_size"):
        check(name, lambda value: value >= 1, "must be 1 or more")
    responses = values.get("prompts_per_step", 0) * values.get("k", 0)
    check("minibatches", lambda value: value <= responses, f"a rollout has only {responses} responses to divide")
    for name in ("clip", "value_clip", "clip_scores"):
        check(name, lambda value: value > 0, 'must be positive ("inf" disables it)')
    check("seed", lambda value: 0 <= value < 2**32 - 1, "must be between 0 and 4294967294")
    for name in ("lam", "gamma"):
        check(name, lambda value: 0 <= value <= 1, "must be between 0 and 1")
    check("decay", lambda value: 0 <= value < 1, "must be at least 0 and below 1")
    for name in ("temperature", "lr", "critic_lr", "max_grad_norm"):
        check(name, lambda value: 0 < value < float("inf"), "must be positive and finite")
    for name in ("beta", "missing_eos_penalty", "eval_every", "warmup_updates", "weight_decay", "center", "window",
                 "save_every", "reward_noise"):
        check(name, lambda value: 0 <= value < float("inf"), "must be 0 or more, and finite")


# -------------------------------------------------------------------------------------------------------------- rewards

def as_text(prompt):
    """A prompt as plain text: itself, or its chat messages, one per line."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def find_gold(gold, dataset):
    """Resolve --gold: "auto" is the function gold_reward in the python file of --dataset, if it has one."""
    path = dataset.rpartition(":")[0]
    if gold == "auto" and path.endswith(".py") and hasattr(load_module(path), "gold_reward"):
        return f"{path}:gold_reward"
    return None if gold in ("auto", "none") else gold


@functools.cache  # a model that several flags name is loaded once
def load_reward(name, tokenizer, device, dtype, max_tokens, shard=False):
    """A function reward(batch, examples) -> (N,), from a classifier or from "path/to/file.py:function".

    A classifier is any one-label AutoModelForSequenceClassification on a causal model. It gets the rollout's token ids
    if it shares the policy's tokenizer; otherwise the text is tokenized again (messages by its own chat template), with
    an EOS if the response has one. `examples` holds the dataset's B rows of the N = B * k rows of `batch`, as columns.
    """
    if ".py:" in name:
        function = load_function(name)
        return lambda batch, examples: sum_over_ranks(
            call_reward(name, function, examples, decode(tokenizer, batch)).to(device))
    model = freeze(load_classifier(name, device, dtype, shard), dtype)
    reward_tokenizer, rows_of_embedding = load_tokenizer(name), model.get_input_embeddings().num_embeddings
    same_ids = reward_tokenizer.get_vocab() == tokenizer.get_vocab()

    @torch.no_grad()
    def reward(batch, examples):
        # A policy's vocabulary may be padded beyond the tokenizer's, and the extra ids can be sampled.
        if not same_ids or batch.responses.max() >= rows_of_embedding:
            k = len(batch) // len(examples["prompt"])
            prompt_ids = repeat(prompt_tokens(reward_tokenizer, examples["prompt"], f"reward {name}"), k)
            batch = encode(reward_tokenizer, prompt_ids, decode(tokenizer, batch), device, batch.ended.tolist())
        rewards = torch.zeros(len(batch), device=device)  # (N,)
        for rows in microbatches(model, max_tokens, batch):
            rewards[rows] = classifier_scores(model, batch[rows])
        return sum_over_ranks(rewards)

    return reward


def load_rewards(args, tokenizer, device):
    """The reward functions of a run: "score", which is maximized, and "gold", if any, which is only logged.

    Each is a function (batch, examples) -> dict name -> (N,). If --reward names several, "score" is their sum weighted
    by --reward-weights, and its dict also holds each one as "reward/<name>".

    Args: args (a script's flags); tokenizer (the policy's); device.
    """
    load = lambda name: load_reward(name, tokenizer, device, args.dtype, args.microbatch_tokens, args.shard)
    weights = args.reward_weights or [1.0] * len(args.reward)
    require(len(weights) == len(args.reward),
            f"--reward-weights: {len(weights)} weights for {len(args.reward)} rewards; give one for each")
    names = [Path(name).name.rpartition(":")[2] for name in args.reward]
    names = [short if names.count(short) == 1 else full for short, full in zip(names, args.reward)]
    require(len(set(names)) == len(names), f"--reward: {args.reward[0]} is given twice; use --reward-weights instead")
    functions = [load(name) for name in args.reward]

    def score(batch, examples):
        parts = [function(batch, examples) for function in functions]  # of (N,) each
        named = {f"reward/{name}": part for name, part in zip(names, parts)} if len(parts) > 1 else {}
        return {"score": sum(weight * part for weight, part in zip(weights, parts)), **named}

    gold = (name := find_gold(args.gold, args.dataset)) and load(name)
    return {"score": score} | ({"gold": lambda batch, examples: {"gold": gold(batch, examples)}} if gold else {})


def dry_run(policy, tokenizer, datasets, reward_fns, args):
    """Catch, before the run starts, what would stop it later: prompts too long for the model, a reward that fails.

    Args: policy; tokenizer; datasets (list of what load_rows returns); reward_fns (see load_rewards); args.
    """
    size = sum(parameter.numel() for parameter in policy.parameters())
    if size > 20e6 and getattr(args, "lr", 0) > 1e-4 and rank_and_world_size()[0] == 0:
        print(f"warning: --lr {args.lr} is for tiny models; with {size / 1e6:.0f} million parameters, try 1e-6 to 1e-5")
    check_positions(policy, max(max(dataset["num_tokens"]) for dataset in datasets) + args.max_new_tokens)
    examples = datasets[0][:2]
    texts = examples.get("completion", [as_text(prompt) for prompt in examples["prompt"]])
    for reward_fn in reward_fns.values():
        reward_fn(encode(tokenizer, examples["prompt_ids"], texts, policy.device), examples)


# -------------------------------------------------------------------------------------------------------------- the run

class Run:
    """Folder, log, progress bar, state and checkpoints of one run. The training loop stays in the script.

        run = Run(__file__, args, tokenizer, policy=(policy, optimizer, scheduler))  # what checkpoints hold
        for examples in run.updates(train, args.prompts_per_step):
            run.check_finite(examples, loss=loss)      # before optimizer.step()
            run.log(metrics, samples=len(batch))
            run.checkpoint()                           # if due; also exits after Ctrl-C or SIGTERM
        run.finish(test)

    `run.state` is saved with every checkpoint: step, samples, seconds, threads, and what a script adds (numbers,
    tensors, plain containers). With torchrun, only the first process writes files; `run.writer` is None in the others.
    """

    def __init__(self, script, args, tokenizer, **trained):
        """Create the run folder, or reopen that of --resume. From here on, Ctrl-C and SIGTERM save and exit.

        Args: script (__file__); args; tokenizer; trained (name=(model, optimizer, scheduler): what checkpoints
        save and restore).
        """
        self.name, self.args, self.tokenizer, self.trained = Path(script).stem, args, tokenizer, trained
        self.state = {"step": 0, "samples": 0, "seconds": 0.0}
        self.shown = {}  # after the progress bar
        settings = {"script": self.name, **asdict(args), "resume": None, "nproc_per_node": rank_and_world_size()[1]}
        if args.resume:
            self.folder = Path(args.resume)
            old = read_settings(self.folder)
            compare_settings(self.folder, old, settings)
            self.state |= load_checkpoint(self.folder, trained)
            require(args.num_updates > self.step or args.num_updates == old["num_updates"],
                    f"--num-updates {args.num_updates}: the run in {self.folder} has already made {self.step}; "
                    "give more")
        else:
            self.folder = Path(args.output or f"runs/{self.name}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}")
        if dist.is_initialized():  # use the first process's clock
            names = [str(self.folder)]
            dist.broadcast_object_list(names)
            self.folder = Path(names[0])
        self.writer = self.open_log(settings) if rank_and_world_size()[0] == 0 else None
        self.state["threads"] = pick_threads(next(iter(trained.values()))[0], self.state.get("threads"))
        self.signals = catch_signals()

    def open_log(self, settings):
        """Write args.json and open TensorBoard's writer."""
        try:
            self.folder.mkdir(parents=True, exist_ok=bool(self.args.output or self.args.resume))
            (self.folder / "args.json.new").write_text(json.dumps(settings, indent=2) + "\n")
            (self.folder / "args.json.new").rename(self.folder / "args.json")
        except OSError as error:
            stop(f"--output {self.folder}: cannot be created ({one_line(error)}); choose another folder")
        # Points logged after the checkpoint that a run resumes from would appear twice: TensorBoard drops them.
        writer = SummaryWriter(self.folder, purge_step=self.step + 1 if self.step else None)
        self.excepthook = threading.excepthook
        threading.excepthook = self.on_thread_failure
        if not self.step:
            writer.add_text("hyperparameters", table(["flag", "value"], settings.items()))
        print(f"resuming after update {self.step}" if self.step else f"logs and model go to {self.folder}")
        return writer

    def on_thread_failure(self, failure):
        """Print no traceback if TensorBoard's own thread cannot write: the next `log` reports it in one line."""
        if type(failure.thread).__module__.partition(".")[0] != "tensorboard":
            self.excepthook(failure)

    @property
    def step(self):
        """The number of the current update, from 1; 0 before the first one."""
        return self.state["step"]

    def updates(self, dataset, size):
        """Yield `size` rows (dict of columns) per update, up to --num-updates, starting where a resumed run stopped."""
        bar = tqdm(range(self.step, self.args.num_updates), desc=self.name, unit="update", disable=self.writer is None)
        for _, examples in zip(bar, batches(dataset, size, self.args.seed, self.step)):
            self.start = time.perf_counter()
            self.state["step"] += 1
            self.noise = np.random.default_rng((self.args.seed, self.step))  # the same after --resume
            yield examples
            bar.set_postfix(self.shown, refresh=False)

    def add_noise(self, parts):
        """Add N(0, --reward-noise^2) to each score (Ahmadian et al. 2024, section 5.2.2), and keep "true_score".

        Args: parts (dict name -> (N,): "score", and others, which stay as they are). Returns: such a dict.
        """
        score, sigma = parts["score"], self.args.reward_noise
        noise = torch.as_tensor(self.noise.normal(0, sigma, len(score))).to(score)  # (N,)
        return parts | {"score": score + noise, "true_score": score} if sigma else parts

    def check_finite(self, examples, **values):
        """Exit before a NaN or infinity reaches the weights, and save the prompts it came from.

        Args: examples (of this update; their B prompts have N = B * k rows); values (numbers, or tensors (N,) and
        (N, T)). Writes not_finite.json to the run folder.
        """
        prompts = examples.get("prompt", [])
        for name, value in values.items():
            value = torch.as_tensor(value)
            if torch.isfinite(value).all():
                continue
            if value.ndim and prompts:
                k = len(value) // len(prompts)
                rows = (~torch.isfinite(value.view(len(prompts), k, -1))).flatten(1).any(1).tolist()  # B
                prompts = [prompt for prompt, bad in zip(prompts, rows) if bad]
            if self.writer:
                found = {"update": self.step, "not finite": name, "prompts": prompts}
                (self.folder / "not_finite.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
            stop(f"update {self.step}: {name} is not finite ({float(value.float().sum())}); the checkpoints in "
                 f"{self.folder} are from before this update, and not_finite.json lists its prompts; try a smaller "
                 "--lr or --max-grad-norm, and check the rewards", code=1)

    def log(self, metrics, samples=0, tokens=0):
        """Log metrics (dict name -> number) to TensorBoard, and show the most important ones after the progress bar.

        Args: metrics; samples and tokens (how many this update generated, for the time/ metrics).
        """
        if samples:
            elapsed = time.perf_counter() - self.start
            self.state["samples"] += samples
            self.state["seconds"] += elapsed
            metrics = metrics | {"time/samples": self.state["samples"], "time/seconds": self.state["seconds"]}
            metrics |= {"time/tokens_per_second": tokens / elapsed} if tokens else {}
        with one_line_failure("log"):
            for name, value in metrics.items() if self.writer else []:
                self.writer.add_scalar(name, float(value), self.step)
        self.shown |= {short: f"{float(metrics[name]):z.2f}" for name, short in SHOWN.items() if name in metrics}
        if "rollout/eos_rate" in metrics:
            warn_if_collapsed(self.state, metrics, self.args.max_new_tokens)

    def evaluation_is_due(self):
        """Whether to evaluate now: every --eval-every updates, and after the last one."""
        every = self.args.eval_every
        return self.step == self.args.num_updates or (every > 0 and self.step % every == 0)

    def log_evaluation(self, evaluation):
        """Log the means of what `evaluate` returns, and keep the first and last evaluation for the final table."""
        self.check_finite({}, kl=evaluation[0]["kl"].mean())
        self.state.setdefault("before", evaluation)
        self.state["after"] = evaluation
        self.log({f"eval/{name}": value.mean() for name, value in evaluation[0].items()})

    def log_samples(self, examples, batch, scores, kl, advantages, rows=8):
        """Log a rollout's first responses to TensorBoard's text tab. Of advantages (N, T), only the first is shown."""
        if not self.writer:
            return
        advantages = advantages if advantages.ndim == 1 else advantages[:, 0]
        prompts = map(as_text, repeat(examples["prompt"], len(batch) // len(examples["prompt"])))
        numbers = torch.stack([scores, kl.sum(1), advantages], 1).tolist()
        cells = [[prompt, response, *(f"{value:.2f}" for value in row)]
                 for prompt, response, row in zip(prompts, decode(self.tokenizer, batch[:rows]), numbers)]
        self.writer.add_text("samples", table(["prompt", "response", "score", "KL", "advantage"], cells), self.step)

    def save_model(self, model):
        """Save model/ for from_pretrained; the old one stays until the new one is complete."""
        folder, new, old = (self.folder / name for name in ("model", "model.new", "model.old"))
        with one_line_failure(f"model {folder}", new):
            write_model(new, model, self.tokenizer)
            if self.writer:
                shutil.rmtree(old, ignore_errors=True)
                if folder.exists():
                    folder.rename(old)
                new.rename(folder)
                shutil.rmtree(old, ignore_errors=True)

    def checkpoint(self):
        """Save everything needed to resume: every --save-every updates, at the end, and after a signal.

        checkpoints/000010 holds a Hugging Face folder for each trained model, and in state.pt the optimizers,
        schedules, random states and `run.state`. A killed or failed write leaves earlier checkpoints intact.
        """
        args, asked = self.args, sum_over_ranks(len(self.signals))
        if not (asked or self.step == args.num_updates or (args.save_every and self.step % args.save_every == 0)):
            return
        if asked and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it to all when the first process ends
        contents = {
            "state": self.state,
            "random": random_states(),
            "optimizers": {name: optimizer_state(*both) for name, (*both, _) in self.trained.items()},
            "schedules": {name: scheduler.state_dict() for name, (_, _, scheduler) in self.trained.items()},
        }
        base, new = self.folder / "checkpoints", self.folder / "checkpoints/unfinished"
        with one_line_failure(f"checkpoint of update {self.step}", new):
            if self.writer:
                self.writer.flush()
                shutil.rmtree(new, ignore_errors=True)
            for name, (model, _, _) in self.trained.items():
                write_model(new / name, model, self.tokenizer)
            if self.writer:
                torch.save(contents, new / "state.pt")
                (new / "checksums.json").write_text(json.dumps(checksums(new), indent=2) + "\n")
                shutil.rmtree(base / f"{self.step:06d}", ignore_errors=True)
                new.rename(base / f"{self.step:06d}")
                for old in checkpoints(self.folder)[: -args.keep]:
                    shutil.rmtree(old, ignore_errors=True)
        if asked and self.step < args.num_updates:
            self.stop_early()

    def stop_early(self):
        """After Ctrl-C or SIGTERM, once a checkpoint is saved: print the command that resumes the run, and exit."""
        if self.writer:
            self.writer.close()
            launch = f"torchrun --nproc-per-node {rank_and_world_size()[1]}" if dist.is_initialized() else "python"
            tqdm.write(f"stopped after update {self.step}; to resume: {launch} {self.name}.py --resume {self.folder}")
        if dist.is_initialized():
            dist.barrier()  # otherwise torchrun would end the first process while it is writing
        raise SystemExit(128 + (self.signals or [signal.SIGTERM])[0])

    def finish(self, test=None):
        """Close the log, and print the first and last evaluation, and responses to one prompt of `test`, if any."""
        if self.writer:
            self.writer.close()
            threading.excepthook = self.excepthook
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.writer is None or test is None:
            return
        (old, old_texts), (new, new_texts) = self.state["before"], self.state["after"]
        old, new = ({name: value.mean().item() for name, value in values.items()} for values in (old, new))
        (self.folder / "evaluation.json").write_text(json.dumps({"before": old, "after": new}, indent=2) + "\n")
        print(f"\n{'held-out prompts':<20}{'before':>10}{'after':>10}")
        for name in old:
            print(f"{name:<20}{old[name]:>z10.3f}{new[name]:>z10.3f}")
        print(f"\nprompt   {as_text(test[0]['prompt'])}\nbefore   {old_texts[0]}\nafter    {new_texts[0]}")
        print(f"\nthe policy is in {self.folder}/model; to see the curves: tensorboard --logdir {self.folder.parent}")


SHOWN = {"objective/scores": "score", "objective/kl": "kl", "rollout/length": "length", "loss": "loss",
         "rewards/accuracies": "accuracy", "rewards/margins": "margin", "eval/accuracy": "accuracy"}
PATIENCE = 20  # updates


def warn_if_collapsed(state, metrics, max_new_tokens):
    """Warn once if the policy has been degenerate for many updates in a row. Counts are in state["extremes"]."""
    length, entropy = metrics["rollout/length"].item(), metrics["objective/entropy"].item()
    extremes = {
        "no response has ended with EOS: all are truncated, so the reward only sees beginnings; raise --max-new-tokens "
        "or --missing-eos-penalty": metrics["rollout/eos_rate"].item() == 0,
        "every response is empty: ending at once is what reward and KL penalty favor; check the reward of an empty "
        "text": length <= 1 < max_new_tokens,
        "the entropy is close to 0: the policy writes the same response again and again, so there is nothing left to "
        "compare; raise --beta or --temperature, or lower --lr": entropy < 0.01 * length and length > 1,
    }
    counts = state.setdefault("extremes", {})
    for message, extreme in extremes.items():
        counts[message] = counts.get(message, 0) + 1 if extreme else min(0, counts.get(message, 0))
        if counts[message] == PATIENCE:
            counts[message] = -math.inf  # once
            if rank_and_world_size()[0] == 0:
                tqdm.write(f"warning: for {PATIENCE} updates, {message}", file=sys.stderr)


def table(header, rows):
    """A Markdown table, which TensorBoard's text tab renders."""
    clean = lambda cell: str(cell).replace("|", "\\|").replace("\n", "<br>")
    lines = [header, ["---"] * len(header), *([clean(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@contextmanager
def one_line_failure(what, unfinished=None):
    """If writing fails (a full disk, say), remove the unfinished folder and exit with a one-line error."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if unfinished and rank_and_world_size()[0] == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        stop(f"the {what} cannot be written ({one_line(error)}); everything saved earlier is intact: free some space "
             "and continue with --resume", code=1)


def catch_signals():
    """From now on, the first Ctrl-C or SIGTERM lets the update finish, the second exits. Returns: list of signals."""
    signals = []

    def note(number, frame):
        signals.append(number)
        for again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(again, signal.SIG_DFL)
        os.write(2, b"\nsaving a checkpoint and exiting after this update; press Ctrl-C again to quit now\n")

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, note)
    return signals


# ------------------------------------------------------------------------------------------------------------- resuming

def read_settings(folder):
    """An earlier run's flags and script, from its args.json."""
    require(Path(folder, "args.json").is_file(), f"--resume {folder}: not a run folder (it has no args.json)")
    try:
        settings = json.loads(Path(folder, "args.json").read_text())
        assert isinstance(settings["script"], str) and isinstance(settings["nproc_per_node"], int)
    except Exception:
        stop(f"--resume {folder}: args.json is damaged; the run cannot be resumed without it")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


SILENT = {"output", "resume", "device", "save_every", "keep"}  # flags that may change on --resume, without a note
FREE = {  # flags that may change with a note; the others define what is learned, and from what
    "num_updates", "lr", "critic_lr", "lr_schedule", "warmup_updates", "max_grad_norm", "beta", "clip", "value_clip",
    "microbatch_tokens", "gradient_checkpointing", "dtype", "eval_every", "eval_prompts", "eval_rows",
    "eval_batch_size", "gold", "max_new_tokens", "missing_eos_penalty", "weight_decay", "rollout_batch_size",
    "nproc_per_node",
}


def compare_settings(folder, old, new):
    """Print which flags of a resumed run have changed, and exit if it would be a different run."""
    require(old["script"] == new["script"],
            f"--resume {folder}: this is a run of {old['script']}.py; resume it with that script")
    changed = [name for name in new if old.get(name) != new[name] and name not in SILENT]
    for name in changed:
        flag = f"--{name.replace('_', '-')}"
        require(name in FREE, f"{flag} {new[name]}: the run in {folder} has {old.get(name)}, and a different value "
                              "would make it a different run; remove the flag, or start a new run")
        if rank_and_world_size()[0] == 0:
            print(f"note: {flag} changed from {old.get(name)} to {new[name]}")


def checkpoints(folder):
    """The checkpoints of a run, oldest first."""
    return sorted((folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))


def checksums(folder):
    """dict file -> SHA-256 of a checkpoint's files, to detect a truncated or damaged one before resuming from it."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "checksums.json"):
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def load_checkpoint(folder, trained):
    """Restore models, optimizers, schedules and random states from a run's last checkpoint; returns its state."""
    found = checkpoints(folder)
    require(found, f"--resume {folder}: has no checkpoint; the run stopped before its first one (see --save-every)")
    last = found[-1]
    remedy = "delete that folder to resume from the one before" if len(found) > 1 else "start the run again"
    try:
        expected, present = json.loads((last / "checksums.json").read_text()), checksums(last)
        damaged = sorted(name for name in expected.keys() | present.keys() if expected.get(name) != present.get(name))
    except Exception:
        damaged = ["checksums.json"]
    require(not damaged, f"checkpoint {last}: {damaged[0] if damaged else ''} is damaged or missing; {remedy}")
    try:
        contents = torch.load(last / "state.pt", map_location="cpu", weights_only=True)  # runs no code
        for name, (model, optimizer, scheduler) in trained.items():
            read_model(last / name, model)
            rates, decays = scheduler.base_lrs, [group["weight_decay"] for group in optimizer.param_groups]
            load_optimizer_state(model, optimizer, contents["optimizers"][name])
            scheduler.load_state_dict(contents["schedules"][name])
            set_rates(optimizer, scheduler, rates, decays)
    except Exception as error:
        stop(f"checkpoint {last}: does not fit this run's models ({type(error).__name__}: {one_line(error)[:160]}); "
             f"{remedy}")
    set_random_states(contents["random"])
    return contents["state"]


def set_rates(optimizer, scheduler, rates, decays):
    """Make a restored optimizer and schedule follow the current flags (--lr, --num-updates, --lr-schedule, ...)."""
    scheduler.base_lrs = rates
    scheduler._last_lr = [rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas)]
    for group, rate, now, decay in zip(optimizer.param_groups, rates, scheduler._last_lr, decays):
        group |= {"initial_lr": rate, "lr": now, "weight_decay": decay}
