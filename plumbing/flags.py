"""The flags that scripts share, the ranges of all flags, and the command line."""

import dataclasses
import gc
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_type_hints

import tyro
from transformers import get_scheduler as transformers_scheduler
from transformers import set_seed

from plumbing.checkpoints import read_settings
from plumbing.errors import require
from plumbing.models import fitting_tokens
from plumbing.processes import pick_device

INF = float("inf")


# ------------------------------------------------------------------------------------------- ranges


class Range(NamedTuple):
    """What values a flag may have. It stands on the flag's type, a student's own flags included:

        alpha: Annotated[float, Between(0, 1)] = 0.5
    """

    allows: object  # function (value) -> bool
    remedy: str  # the end of "--alpha 2: ..."


def Between(low, high):
    return Range(lambda value: low <= value <= high, f"must be between {low} and {high}")


Count = Annotated[int, Range(lambda value: value >= 1, "must be 1 or more")]
Positive = Annotated[float, Range(lambda value: 0 < value < INF, "must be positive and finite")]
NotNegative = Annotated[
    float, Range(lambda value: 0 <= value < INF, "must be 0 or more, and finite")]
CountOrZero = Annotated[
    int, Range(lambda value: 0 <= value < INF, "must be 0 or more, and finite")]
Limit = Annotated[float, Range(lambda value: value > 0, 'must be positive ("inf" disables it)')]
Seed = Annotated[int, Between(0, 2**32 - 2)]


def check_ranges(args):
    """Exit with a one-line error if a flag of `args` (a dataclass) has a value out of its range."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        for limit in ranges_of(hint) if value is not None else []:
            require(limit.allows(value), f"--{name.replace('_', '-')} {value}: {limit.remedy}")


def ranges_of(hint):
    """The Ranges of a type hint, which may be one of several: Count | None."""
    parts = [hint, *getattr(hint, "__args__", [])]
    return [item for part in parts for item in getattr(part, "__metadata__", [])
            if isinstance(item, Range)]


# -------------------------------------------------------------------------------------------- flags


@dataclass
class SystemArgs:
    """Memory, speed, devices, output and checkpoints. A resumed run may change these."""

    microbatch_tokens: Count | None = None
    """maximum tokens per micro-batch, with padding; changes only memory and speed; default: 8192,
    or what fits a CPU"""
    device: str = "auto"
    """auto, cuda, mps or cpu"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """compute dtype; bfloat16 uses autocast, with weights and Adam states in float32"""
    plain: bool = False
    """run models in the plain form of common.py only, without plumbing/fast.py"""
    shard: bool = False
    """shard the weights across processes (FSDP2, needs torchrun), for models that do not fit on
    one device"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    output: str | None = None
    """run folder for args.json, TensorBoard logs, model/ and checkpoints/; default:
    runs/<script>-seed<seed>-<time>"""
    save_every: CountOrZero = 10
    """updates between checkpoints; 0 saves only at the end, or when SIGTERM or Ctrl-C stops the
    run"""
    keep: Count = 2
    """number of recent checkpoints to keep"""
    resume: str | None = None
    """run folder to resume from its last checkpoint, with its flags; the result is as if it had
    never stopped"""


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
    """held-out reward, which judges the win rate; auto: gold_reward in the --dataset file, if any;
    none: no gold"""
    completion_column: str | None = None
    """column of reference responses for the win rate, if it is not called completion"""
    max_prompt_length: Count = 512
    """drop prompts with more tokens than this"""
    eval_every: CountOrZero = 10
    """updates between evaluations; 0 evaluates only before and after training"""
    eval_prompts: Count = 100
    """number of held-out prompts per evaluation, with one sampled response each"""
    eval_batch_size: Count = 256
    """responses to sample at once in an evaluation"""


@dataclass
class RunArgs(EvaluationArgs, DataArgs, SystemArgs):
    """Flags that every RL script has besides its own."""

    rollout_batch_size: Count = 256
    """responses to sample at once on each process; bounds the KV cache's memory"""
    reward_noise: NotNegative = 0.0
    """standard deviation of Gaussian noise on each training score; the true mean is logged as
    objective/true_score"""


# ------------------------------------------------------------------------------------- command line


def parse(Args):
    """Args from the command line. With --resume, the flags of that run are the defaults."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before training starts there is nothing to save
    gc.freeze()  # the packages stay to the end: looking for garbage among them would take a second
    words = [part for word in sys.argv[1:] for part in word.split("=", 1)]
    default = Args()
    if "--resume" in words[:-1]:
        folder = words[words.index("--resume") + 1]
        settings = read_settings(folder)
        script = settings.pop("script")
        del settings["nproc_per_node"]
        unknown = sorted(settings.keys() - {field.name for field in dataclasses.fields(Args)})
        require(not unknown, f"--resume {folder}: this is a run of {script}.py, which has other "
                             f"flags ({', '.join(unknown[:3])})")
        default = Args(**settings | {"resume": folder, "output": None})
    return tyro.cli(Args, default=default)


def setup(args):
    """Check the flags, join torchrun's other processes, and seed. Returns: torch.device."""
    check_ranges(args)
    check_output(args)
    device = pick_device(args)
    if args.microbatch_tokens is None:
        args.microbatch_tokens = fitting_tokens(args.model, device)
    set_seed(args.seed)
    return device


def get_scheduler(name, optimizer, warmup, total):
    """A learning-rate schedule: "constant", "linear" or "cosine", after a linear warm-up.

    transformers.get_scheduler, but "constant" has the warm-up too. The first of `warmup` updates
    has 0, the next 1 / warmup of the learning rate; `total` updates with these.
    """
    name = "constant_with_warmup" if name == "constant" else name
    return transformers_scheduler(name, optimizer, warmup, total)


def check_output(args):
    """Exit with a one-line error if a new run could not have its folder."""
    require(not (args.output and args.resume), f"--output {args.output}: a resumed run continues "
                                               "in its own folder; remove this flag")
    if args.output:
        output = Path(args.output)
        path = next(parent for parent in output.absolute().parents if parent.exists())
        require(path.is_dir(), f"--output {output}: cannot be created, since {path} is a file; "
                               "choose another folder")
        require(not output.is_file(),
                f"--output {output}: already exists; choose another name, or delete that file")
        require(not output.exists() or not any(output.iterdir()),
                f"--output {output}: is not empty; choose another folder, or delete that one")
