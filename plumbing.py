"""The plumbing: processes, models, data, run folders and logs, mistakes told in one line. No RL is in here."""

import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import getproxies

import datasets
import huggingface_hub
import numpy
import torch
import torch.distributed as dist
import transformers
import tyro
from safetensors import SafetensorError
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as run_again_backward
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig,
                          set_seed)
from transformers.modeling_layers import GradientCheckpointingLayer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()


# ------------------------------------------------------------------------------------------------ devices and processes
#
# `torchrun --nproc-per-node 4 rloo.py` starts four processes. Each samples, scores and back-propagates its share of
# the rows, and all get all the numbers: what is computed from a batch (advantages, statistics, metrics) is the same in
# each, and the same as in one process. Without torchrun all of these functions do nothing.


def pick_device(args):
    """Join the other processes, if torchrun has started several; returns this process's torch.device.

    Args: args (device: "cpu", "cuda", "mps", or "auto" for the best one there is; shard).
    """
    several, local = int(os.environ.get("WORLD_SIZE", 1)) > 1, int(os.environ.get("LOCAL_RANK", 0))
    require(several or not args.shard, "--shard: there is one process; start several with torchrun --nproc-per-node 2")
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    require(not several or ":" not in name, f"--device {name}: several processes each take their own; give cuda or cpu")
    if several and name == "cuda":
        count = torch.cuda.device_count()
        require(local < count, f"--nproc-per-node: there are more processes than GPUs ({count}); start {count}")
        name = f"cuda:{local}"
    try:
        device = torch.empty(0, device=name).device
    except Exception:
        stop(f"--device {args.device}: not available here; use auto or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if several and not dist.is_initialized():
        patience = timedelta(hours=2)  # while the first process writes a large checkpoint, the others wait
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=patience)
    return device


def processes():
    """This process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share(n):
    """The numbers, of 0 ... n - 1, that this process works on: a range."""
    rank, size = processes()
    return range(rank * n // size, (rank + 1) * n // size)


def add_up(tensor):
    """The sum of all processes' tensors, each of which is 0 where another process did the work."""
    if not dist.is_initialized():
        return tensor
    numbers = tensor.int() if tensor.dtype == torch.bool else tensor.contiguous()
    dist.all_reduce(numbers)
    return numbers.to(tensor.dtype)


def total(value):
    """The sum of all processes' numbers."""
    return add_up(torch.tensor(float(value), device=own_device())).item() if dist.is_initialized() else value


def own_device():
    """Where the tensors must lie that the processes exchange."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def own_generator(device):
    """Random numbers for sampling that differ between the processes; in a single one, torch's own."""
    rank, size = processes()
    if size > 1:  # all draw the same number here, and stay in step
        return torch.Generator(device).manual_seed(torch.randint(2**62, ()).item() + rank)


def clip_gradients(model, max_norm):
    """Add up the gradients of all processes, and clip the norm of the sum; returns the norm before."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for gradient in gradients if dist.is_initialized() else []:
        if isinstance(gradient, DTensor):
            gradient.mul_(dist.get_world_size())  # fully_shard has taken the mean
        else:
            dist.all_reduce(gradient)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def shard_model(model, device):
    """Spread the weights over the processes (FSDP2): a layer is put together only while it runs."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for layer in max(blocks, key=lambda block: sum(p.numel() for p in block.parameters()), default=[]):
        fully_shard(layer, mesh=mesh)
    if hasattr(model, "score"):  # of a classifier, the body and the head are run one by one
        fully_shard(model.base_model, mesh=mesh)
        fully_shard(model.score, mesh=mesh)
    else:
        fully_shard(model, mesh=mesh)


# --------------------------------------------------------------------------------------------------------------- models


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
    """The text of an error in one line, of which nothing can fail to be printed."""
    return " ".join(str(error).encode(errors="replace").decode().split())[:300]


@functools.cache
def look_for_the_hub():
    """Without a network, use what earlier runs have fetched at once, rather than after minutes of vain attempts."""
    if getproxies():
        return  # then a direct connection says nothing
    address = urlparse(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=10).close()
    except OSError:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def check_path(what, name):
    """Stop if `name` is meant as a local path, rather than as a name on the hub, and is not there."""
    owner, _, rest = name.partition("/")
    is_path = name.startswith((".", "/", "~")) or "/" in rest or (rest and os.path.isdir(owner))
    is_path = is_path or name.endswith((".json", ".jsonl", ".csv", ".parquet"))
    require(not is_path or os.path.exists(name), f"{what} {name}: no such file or folder; give a path or a hub name")
    if not os.path.exists(name):
        look_for_the_hub()


def explain(what, name, error):
    """The rest of the line that says why `name` could not be loaded, and what to do."""
    text, folder = one_line(error), Path(name)
    config = folder / "config.json"
    if "trust_remote_code" in text or (config.is_file() and "auto_map" in config.read_text(errors="replace")):
        return "needs program code from its repository, which is never run; use a model that transformers has built in"
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than are wanted here (a reward model or critic has a head with one label)"
    files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    pickles = sorted(name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if (pickles and not any(name.endswith(".safetensors") for name in files)) or "use_safetensors" in text:
        pickles = pickles[0] if pickles else "its weights"
        return (f"{pickles} is a pickle, which can run any code when it is read, so it is refused; where you trust it, "
                "load it in transformers and save it again with save_pretrained, as safetensors")
    if not folder.exists() and any(word in text.lower() for word in ("connect", "offline", "reach", "network")):
        return (f"the hub cannot be reached (offline?), and there is no such folder here; where there is a network, "
                f"fetch it with `hf download {'--repo-type dataset ' * (what == 'dataset')}{name} --local-dir FOLDER`, "
                "and name that folder")
    return f"cannot be loaded from a folder or the hub: {type(error).__name__}: {text}"


def from_pretrained(what, auto_class, name, **kwargs):
    """auto_class.from_pretrained(name), from a local folder or the hub; stop in one line where it cannot be loaded."""
    check_path(what, name)
    require(not os.path.isdir(name) or any(Path(name).glob("*config.json")),
            f"{what} {name}: has no config.json, so it is no model's folder")
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:
        stop(f"{what} {name}: {explain(what, name, error)}")


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


def load_model(name, device, dtype="float32", shard=False, gradient_checkpointing=False,
               auto_class=AutoModelForCausalLM, new=(), **kwargs):
    """Model of a hub name, a folder, or "file.py:function" that returns (model, tokenizer).

    Weights are kept in float32, since Adam's small steps vanish in bfloat16; dtype "bfloat16" runs the forward passes
    in it by autocast. Dropout is off (eval mode) for good: the sampler and the update must see the same policy.
    Only safetensors are read, and code from the hub never runs. `shard` spreads the weights over the processes;
    `gradient_checkpointing` keeps only each layer's input for the backward pass, and runs the layer again there.
    `new` names the weights that may be missing.
    """
    if ".py:" in name:
        model, tokenizer = load_function(name)()
    else:
        tokenizer = load_tokenizer(name)
        model, info = from_pretrained("model", auto_class, name, dtype=torch.float32, use_safetensors=True,
                                      output_loading_info=True, **kwargs)
        missing = sorted(set(info["missing_keys"]) - set(new))
        require(not missing, f"model {name}: lacks the weights {', '.join(missing[:3])}, so it is no such model")
    fix_generation_config(model)
    words = max(tokenizer.vocab_size, tokenizer.eos_token_id + 1, tokenizer.pad_token_id + 1)
    rows = model.get_input_embeddings().num_embeddings
    require(words <= rows, f"model {name}: has embeddings for {rows} tokens, and its tokenizer has {words}; they do "
                           "not belong together")
    if dtype == "bfloat16":
        for module in (model, model.base_model):
            module.forward = torch.autocast(device.type, torch.bfloat16)(module.forward)
    if gradient_checkpointing:
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = functools.partial(run_again_backward, layer.forward, use_reentrant=False)
    if shard:
        shard_model(model, device)
    return model.to(device).eval()


def fix_generation_config(model):
    """Replace a generation config that transformers reads but refuses to write, as some on the hub are."""
    config = getattr(model, "generation_config", None)
    try:
        _ = config and config.validate(strict=True)
    except ValueError:
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ids)


def check_positions(model, length):
    """Stop if a row of that many tokens is longer than the model has positions."""
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    require(length <= limit, f"rows of up to {length} tokens, the response included: more than the {limit} positions "
                             "of the model; lower --max-prompt-length, --max-length or --max-new-tokens")


@functools.cache
def load_frozen_classifier(name, device, dtype, shard):
    """A reward model that is not trained: loaded once, however often it is used."""
    return load_classifier(name, device, dtype, shard).requires_grad_(False)


def load_reference(args, tokenizer, device):
    """The frozen policy that the KL is measured to: args.reference, or where that is None args.model.

    It must have the vocabulary of `tokenizer`, the policy's.
    """
    name = args.reference or args.model
    require(args.reference or ".py:" not in name,
            f"model {name}: a function may return other weights when it is called again; name the --reference too")
    same = load_tokenizer(name).get_vocab() == tokenizer.get_vocab()
    require(same, f"reference {name}: has another vocabulary than the policy, so there is no KL between them")
    return load_model(name, device, args.dtype, args.shard).requires_grad_(False)


def load_classifier(name, device, dtype="float32", shard=False, gradient_checkpointing=False, new_head=False):
    """Like load_model, for a reward model: a causal model with a one-label head called `score`, trained or new."""
    new, kwargs = (["score.weight"], {"num_labels": 1}) if new_head else ([], {})
    model = load_model(name, device, dtype, shard, gradient_checkpointing, AutoModelForSequenceClassification, new,
                       **kwargs)
    require(hasattr(model, "score"), f"model {name}: is no classifier on a causal model; wrap it in a python function")
    require(model.config.num_labels == 1, f"model {name}: has {model.config.num_labels} labels; a reward model has 1")
    return model


def load_critic(args, tokenizer, device):
    """The value model: args.critic, or where that is None the reward model, or where that is a function the policy.

    A policy gets a new head; a reward model or a critic keeps its own.
    """
    name = args.critic or (args.model if ".py:" in args.reward[0] else args.reward[0])
    same = load_tokenizer(name).get_vocab() == tokenizer.get_vocab()
    require(same, f"critic {name}: has another vocabulary than the policy; name another with --critic")
    return load_classifier(name, device, args.dtype, args.shard, args.gradient_checkpointing, new_head=True)


# ----------------------------------------------------------------------------------------------------------------- data


def load_dataset(name, split, config=None):
    """Rows of a hub dataset, a folder written by save_to_disk, a .json/.jsonl/.csv/.parquet file, or a python function.

    Args: name ("owner/name", a path, or "file.py:function" called with the split); split ("train", "test", ...; of a
    single file, which has no splits, any); config (of a hub dataset that has several).
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
            dataset = datasets.load_dataset(name, config or main_config(name), split=split)
    except Exception as error:
        bad_line = find_bad_line(name, split)
        require(not bad_line, f"dataset {bad_line}")
        stop(f"dataset {name}, split {split}: {explain('dataset', name, error)}")
    require(isinstance(dataset, datasets.Dataset), f"dataset {name}: must be a datasets.Dataset, not {type(dataset)}")
    require(len(dataset) > 0, f"dataset {name}, split {split}: is empty")
    return dataset


def main_config(name):
    """Of a dataset's configurations, if there are several, the one called main; else None, datasets' own choice."""
    names = datasets.get_dataset_config_names(name)
    return "main" if len(names) > 1 and "main" in names else None


def find_bad_line(name, split):
    """Where the first line is that is not JSON, in a .jsonl file or in a folder's files of that split, if there is."""
    paths = [Path(name)] if os.path.isfile(name) else Path(name).glob(f"*{split}*.jsonl")
    for path in paths:
        if path.suffix == ".jsonl":
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                try:
                    json.loads(line or "0")
                except ValueError as error:
                    return f"{path}, line {number}: is not JSON ({one_line(error)[:80]}); repair or remove that line"


def as_text(prompt):
    """A prompt as text to show or to compare: itself, or its chat messages."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def as_replies(prompts, texts):
    """Responses as reward functions get them: the texts, or where the prompt is a chat, lists of one message."""
    return [text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts)]


def prompt_tokens(tokenizer, prompts, what):
    """Token ids of prompts: text with the tokenizer's own special tokens, messages by its chat template."""
    if isinstance(prompts[0], str):
        ids, end = tokenizer(prompts)["input_ids"], tokenizer.eos_token_id
        return [row[:-1] if row and row[-1] == end and not text.endswith(tokenizer.eos_token) else row
                for row, text in zip(ids, prompts)]  # some tokenizers end every text, but the response is to follow
    require(tokenizer.chat_template, f"{what}: has chat messages for prompts, but the tokenizer has no chat template; "
                                     "use an instruction-tuned model, or prompts that are plain text")
    try:
        texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
                 for prompt in prompts]
    except Exception as error:
        stop(f"{what}: the tokenizer's chat template refuses its messages: {one_line(error)}")
    return tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has written them already


RESPONSES = {"completion", "chosen", "rejected"}  # columns that hold what a policy could have said


def split_row(row, sources):
    """TRL's conventions -> a prompt, and completion, chosen and rejected as far as the row has them.

    A conversation ("messages") is prompt and last reply. Chosen and rejected texts without a prompt, as in
    Anthropic's HH, have one in common: what they share, up to the last "Assistant:" where there is one.
    `sources` names columns that are meant instead (dict target -> column).
    """
    row = dict(row)
    row |= {target: row[sources[target]] for target in ("prompt", "chosen", "rejected") if target in sources}
    if "prompt" not in row and "messages" in row:
        row["prompt"], row["completion"] = row["messages"][:-1], row.pop("messages")[-1:]
    if "prompt" not in row and "chosen" in row and "rejected" in row:
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(row["chosen"], row["rejected"])))
        shared = row["chosen"][:same]
        if isinstance(row["chosen"], str):
            turn = shared.rfind("Assistant:")
            shared = shared[: turn + len("Assistant:")] if turn >= 0 else shared[: shared.rfind(" ") + 1]
        row["prompt"] = shared
        row["chosen"], row["rejected"] = row["chosen"][len(shared) :], row["rejected"][len(shared) :]
    if "prompt" not in row and "question" in row:
        row["prompt"] = row["question"]
    if "completion" in sources:  # after the split: it may be the chosen response
        row["completion"] = row[sources["completion"]]
    for name in row.keys() & RESPONSES:
        if isinstance(row[name], list) and row[name]:
            row[name] = row[name][-1]["content"]
    return row


def shorten(ids, length, tokenizer):
    """The last `length` token ids, at least one; a BOS stays in front."""
    head = ids[:1] if ids[0] == tokenizer.bos_token_id and length > 1 else []
    return ids if len(ids) <= length else head + ids[-max(1, length - len(head)) :]


def load_rows(args, name, split, tokenizer, columns, max_length, first=None):
    """The (first) rows of a dataset whose prompt, with the longest response and its EOS, has at most max_length tokens.

    Args: args (dataset_config; prompt_column, completion_column, chosen_column, rejected_column where the script has
    them; chat; system_prompt; truncate_prompts); name and split (see load_dataset); tokenizer; columns ("prompt", and
    the response columns that must be there); max_length; first (how many rows at most). Says how many were too long.
    Returns: datasets.Dataset with prompt (text, or chat messages), prompt_ids, num_tokens (with the longest response),
    completion, chosen and rejected (texts) as far as there are, and the other columns of the dataset as they are.
    """
    what = f"dataset {name}, split {split}"
    dataset = load_dataset(name, split, args.dataset_config)
    sources = {target: getattr(args, f"{target}_column", None) for target in ("prompt", *RESPONSES)}
    for target, source in sources.items():
        require(not source or source in dataset.column_names or target not in columns,
                f"--{target}-column {source}: dataset {name} has no such column; "
                f"it has {', '.join(dataset.column_names)}")
    sources = {target: source for target, source in sources.items() if source in dataset.column_names}
    try:
        names = split_row(dataset[0], sources)
    except Exception:
        names = dataset[0]
    for column in columns:
        require(column in names, f"dataset {name}: has no column {column!r}; it has {', '.join(dataset.column_names)}; "
                                 f"name one with --{column}-column")

    def prepare(row, index):
        try:
            row = split_row(row, sources)
        except Exception as error:
            stop(f"{what}: row {index} does not follow TRL's conventions: {type(error).__name__}: {one_line(error)}")
        prompt = row["prompt"]
        if isinstance(prompt, str) and (args.chat or args.system_prompt) and prompt:
            prompt = [{"role": "user", "content": prompt}]
        chat = isinstance(prompt, list) and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys()
                                                for turn in prompt)
        if chat and args.system_prompt and prompt and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": args.system_prompt}, *prompt]
        require(isinstance(prompt, str) or chat, f"{what}: column 'prompt' must hold text, or lists of messages with "
                                                 f"role and content; row {index} does not")
        require(prompt, f"{what}: row {index} has an empty prompt")
        for column in row.keys() & RESPONSES:
            require(isinstance(row[column], str), f"{what}: column {column!r} must hold text; row {index} does not")
        return row | {"prompt": prompt}

    rows = [prepare(row, index) for index, row in enumerate(dataset)]
    prompt_ids = prompt_tokens(tokenizer, [row["prompt"] for row in rows], what)
    empty = [index for index, ids in enumerate(prompt_ids) if not ids]
    require(not empty, f"{what}: row {empty[:1]} has a prompt without tokens")
    responses = [tokenizer([row[column] for row in rows], add_special_tokens=False)["input_ids"]
                 for column in columns[1:]]
    longest = [max(map(len, lists)) + 1 for lists in zip(*responses)] if responses else [0] * len(rows)
    if args.truncate_prompts:
        prompt_ids = [shorten(ids, max_length - more, tokenizer) for ids, more in zip(prompt_ids, longest)]
    fits = [i for i in range(len(rows)) if len(prompt_ids[i]) + longest[i] <= max_length]
    require(fits, f"{what}: every row has more than {max_length} tokens; allow more")
    left_out = len(rows) - len(fits)
    if left_out and processes()[0] == 0:
        print(f"{what}: left out {left_out} of {len(rows)} rows, which are longer than {max_length} tokens")
    lengths = [len(ids) + more for ids, more in zip(prompt_ids, longest)]
    return datasets.Dataset.from_list([rows[i] | {"prompt_ids": prompt_ids[i], "num_tokens": lengths[i]}
                                       for i in fits[:first]])


def batches(dataset, size, seed, skip=0):
    """Yield dicts of columns (lists of `size` values) for ever, reshuffled every time the dataset has been used up.

    `skip` batches are left out at the beginning: those that a resumed run has used already.
    """

    def order():
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.randperm(len(dataset), generator=generator).tolist()

    stream = itertools.islice(order(), skip * size, None)
    while True:
        yield dataset[list(itertools.islice(stream, size))]


# -------------------------------------------------------------------------------------------------- run folder and logs


def parse(Args):
    """Args from the command line; with --resume, every flag that is not given is that run's own."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training starts, Ctrl-C has nothing to finish
    flags = [part for flag in sys.argv[1:] for part in flag.split("=", 1)]
    if "--resume" not in flags[:-1]:
        return tyro.cli(Args)
    folder = flags[flags.index("--resume") + 1]
    settings = read_settings(folder)
    unknown = settings.keys() - {field.name for field in fields(Args)} - {"script", "nproc_per_node"}
    require(not unknown, f"--resume {folder}: is a run of {settings['script']}.py, which has other flags "
                         f"({', '.join(sorted(unknown)[:3])})")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    del values["script"], values["nproc_per_node"]
    return tyro.cli(Args, default=Args(**values | {"resume": folder, "output": None}))


def read_settings(folder):
    """The flags of an earlier run, and its script, from its args.json."""
    path = Path(folder) / "args.json"
    require(path.is_file(), f"--resume {folder}: is not a run folder (it has no args.json)")
    try:
        settings = json.loads(path.read_text())
        assert isinstance(settings["script"], str) and isinstance(settings["nproc_per_node"], int)
    except Exception:
        stop(f"--resume {folder}: args.json is damaged; without it the run cannot go on")
    return settings


def open_run(args, script, saved):
    """Make the run folder, or with --resume go on in one; from here on SIGTERM and Ctrl-C end the run in good order.

    Args: args; script (its name); saved (what checkpoints hold, see `checkpoint`).
    Returns: (folder, TensorBoard writer, state); the folder holds args.json and the log, and later model/ and
    checkpoints/ beside them; state is that of the checkpoint, or {} in a new run. Of several processes only the first
    has a writer (the others: None) and writes files.
    """
    first = processes()[0] == 0
    settings = {"script": script, **asdict(args), "resume": None, "nproc_per_node": processes()[1]}
    if args.resume:
        folder = Path(args.resume)
        old = read_settings(folder)
        compare_settings(folder, old, settings)
        state = load_checkpoint(folder, saved)
        require(args.num_updates > state["step"] or args.num_updates == old["num_updates"],
                f"--num-updates {args.num_updates}: the run in {folder} has made {state['step']} already; give more")
    else:
        folder, state = Path(args.output or f"runs/{script}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"), {}
    if dist.is_initialized():  # of the clocks of several processes the first one's counts
        names = [str(folder)]
        dist.broadcast_object_list(names)
        folder = Path(names[0])
    writer = None
    if first:
        try:
            folder.mkdir(parents=True, exist_ok=bool(args.output or args.resume))
            (folder / "args.json.new").write_text(json.dumps(settings, indent=2) + "\n")
            (folder / "args.json.new").rename(folder / "args.json")
        except OSError as error:
            stop(f"--output {folder}: cannot be made ({one_line(error)}); name another folder")
        # Points that a run has logged after the checkpoint at which it goes on would be there twice: TensorBoard
        # forgets them.
        writer = SummaryWriter(folder, purge_step=state["step"] + 1 if state else None)
        threading.excepthook = lambda failure: None  # where the log's thread fails, `log` will say so
        if not state:
            writer.add_text("hyperparameters", table(["flag", "value"], settings.items()))
        print(f"goes on after update {state['step']}" if state else f"logs and model go to {folder}")
    listen()
    return folder, writer, state


SILENT = {"output", "resume", "device", "save_every", "keep"}  # flags that may differ without a word
FREE = {  # and those that may, with one; the others say what is learned from, and from where
    "num_updates", "lr", "critic_lr", "lr_schedule", "warmup_updates", "max_grad_norm", "beta", "clip", "value_clip",
    "microbatch_tokens", "gradient_checkpointing", "dtype", "eval_every", "eval_prompts", "eval_rows",
    "eval_batch_size", "gold", "max_new_tokens", "missing_eos_penalty", "weight_decay", "rollout_batch_size",
    "nproc_per_node",
}


def compare_settings(folder, old, new):
    """Say which flags of a resumed run differ, and stop where it would be another run."""
    require(old["script"] == new["script"],
            f"--resume {folder}: is a run of {old['script']}.py; go on with that script, or name another run")
    old = {name: tuple(value) if isinstance(value, list) else value for name, value in old.items()}
    changed = [name for name in new if old.get(name) != new[name] and name not in SILENT]
    for name in changed:
        flag = f"--{name.replace('_', '-')}"
        require(name in FREE, f"{flag} {new[name]}: the run in {folder} has {old.get(name)}, and with another it would "
                              f"not be the same run; leave the flag out, or start a new run")
        if processes()[0] == 0:
            print(f"note: {flag} was {old.get(name)}, and is {new[name]} from here on")


asked_to_stop = []  # the number of the signal that has come, SIGTERM or Ctrl-C


def listen():
    """From now on the first SIGTERM or Ctrl-C lets the running update end (see `checkpoint`), the second ends all."""

    def note(number, frame):
        asked_to_stop.append(number)
        for again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(again, signal.SIG_DFL)
        os.write(2, b"\nending after this update, with a checkpoint; once more to end at once\n")

    asked_to_stop.clear()
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, note)


def random_states():
    """The states of all random number generators, as tensors and plain containers."""
    name, keys, *rest = numpy.random.get_state()
    states = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
    for name in ("cuda", "mps"):
        if getattr(torch, name).is_available():
            states[name] = getattr(torch, name).get_rng_state()
    return states


def set_random_states(states):
    """Go on from what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    for name in ("cuda", "mps"):
        if name in states and getattr(torch, name).is_available():
            getattr(torch, name).set_rng_state(states[name])


@contextmanager
def own_randomness(seed):
    """Seed all random number generators, and afterwards leave them as they were."""
    states = random_states()
    set_seed(seed)
    yield
    set_random_states(states)


def checkpoint(args, folder, writer, tokenizer, saved, state):
    """Every --save-every updates, at the end, and where SIGTERM or Ctrl-C has come: write what the future depends on.

    folder/checkpoints/000010 holds a Hugging Face folder for each trained model, and in state.pt its optimizer and
    schedule, the random states and `state`. A killed or failed write leaves the checkpoints before it as they were.

    Args: args (save_every, keep, num_updates); folder, writer (see open_run); tokenizer; saved (dict name -> (model,
    optimizer, scheduler)); state (dict of numbers, tensors and plain containers; "step" is the update that has ended).
    """
    step, asked = state["step"], total(len(asked_to_stop))
    if not asked and step < args.num_updates and (args.save_every == 0 or step % args.save_every):
        return
    if asked and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it again, to all, when the first process ends
    optimizers = {name: optimizer_state(model, optimizer) for name, (model, optimizer, _) in saved.items()}
    schedules = {name: scheduler.state_dict() for name, (_, _, scheduler) in saved.items()}
    contents = {"state": state, "random": random_states(), "optimizers": optimizers, "schedules": schedules}
    base = folder / "checkpoints"
    new = base / "unfinished"
    with readable_failure(f"checkpoint of update {step}", new):
        if writer:
            writer.flush()
            shutil.rmtree(new, ignore_errors=True)
        for name, (model, _, _) in saved.items():
            write_model(new / name, model, tokenizer)
        if writer:
            torch.save(contents, new / "state.pt")
            (new / "checksums.json").write_text(json.dumps(checksums(new), indent=2) + "\n")
            shutil.rmtree(base / f"{step:06d}", ignore_errors=True)
            new.rename(base / f"{step:06d}")
            for old in checkpoints(folder)[: -args.keep]:
                shutil.rmtree(old, ignore_errors=True)
    if asked and step < args.num_updates:
        if writer:
            writer.close()
            launch = f"torchrun --nproc-per-node {processes()[1]}" if dist.is_initialized() else "python"
            script = read_settings(folder)["script"]
            tqdm.write(f"ended after update {step}; to go on: {launch} {script}.py --resume {folder}")
        if dist.is_initialized():
            dist.barrier()  # or torchrun would end the first process, while it is writing, with the others
        raise SystemExit(128 + (asked_to_stop or [signal.SIGTERM])[0])


def checkpoints(folder):
    """The checkpoints of a run, the last one last."""
    return sorted((folder / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))


def checksums(folder):
    """dict file -> SHA-256, of all files of a checkpoint but the list itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "checksums.json")
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def load_checkpoint(folder, saved):
    """Put the last checkpoint of a run into the models, optimizers, schedules and generators; returns its state."""
    found = checkpoints(folder)
    require(found, f"--resume {folder}: has no checkpoint; the run ended before its first one (see --save-every)")
    last = found[-1]
    remedy = "remove that folder to go on from the checkpoint before" if len(found) > 1 else "start the run again"
    try:
        expected = json.loads((last / "checksums.json").read_text())
        present = checksums(last)
        damaged = sorted(name for name in expected.keys() | present.keys() if expected.get(name) != present.get(name))
    except Exception:
        damaged = ["checksums.json"]
    require(not damaged, f"checkpoint {last}: {damaged[0] if damaged else ''} is damaged or missing; {remedy}")
    try:
        contents = torch.load(last / "state.pt", map_location="cpu", weights_only=True)  # which runs no code
        state = contents["state"]
        for name, (model, optimizer, scheduler) in saved.items():
            read_model(last / name, model)
            rates, decays = scheduler.base_lrs, [group["weight_decay"] for group in optimizer.param_groups]
            set_optimizer_state(model, optimizer, contents["optimizers"][name])
            scheduler.load_state_dict(contents["schedules"][name])
            set_rates(optimizer, scheduler, rates, decays)
    except Exception as error:
        stop(f"checkpoint {last}: does not fit this run's models ({type(error).__name__}: {one_line(error)[:160]}); "
             f"{remedy}")
    set_random_states(contents["random"])
    return state


def set_rates(optimizer, scheduler, rates, decays):
    """Make a loaded optimizer and schedule go by the flags of now (--lr, --num-updates, --lr-schedule, ...)."""
    scheduler.base_lrs = rates
    scheduler._last_lr = [rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas)]
    for group, rate, now, decay in zip(optimizer.param_groups, rates, scheduler._last_lr, decays):
        group |= {"initial_lr": rate, "lr": now, "weight_decay": decay}


def table(header, rows):
    """A Markdown table, which TensorBoard's text tab renders."""
    clean = lambda cell: str(cell).replace("|", "\\|").replace("\n", "<br>")
    lines = [header, ["---"] * len(header), *([clean(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def log(writer, step, metrics):
    """Write numbers (dict name -> number) to TensorBoard's log, in the process that has a writer."""
    with readable_failure("log"):
        for name, value in metrics.items() if writer else []:
            writer.add_scalar(name, float(value), step)


def show(bar, metrics):
    """Write reward, KL and length of the last rollout behind the progress bar."""
    names = {"score": "objective/scores", "kl": "objective/kl", "length": "rollout/length"}
    bar.set_postfix({short: f"{metrics[name].item():z.2f}" for short, name in names.items()}, refresh=False)


def log_evaluation(writer, step, evaluation):
    """Write the means of what `evaluate` returns to TensorBoard's log."""
    log(writer, step, {f"eval/{name}": value.mean() for name, value in evaluation[0].items()})


def close(writer):
    """End the log; of several processes, end the process too."""
    if writer:
        writer.close()
    for number in (signal.SIGTERM, signal.SIGINT):
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # the ordinary way out, through the destructors of torch's threads, aborted 3 of 25 runs


def check_finite(step, folder, columns, **values):
    """Stop before a number that is not finite reaches the weights, and write down which prompts it came with.

    Args: step; folder (of the run: gets not_finite.json); columns (of the batch; their B prompts have N = B * k rows);
    values (numbers, or tensors (N,) and (N, T)).
    """
    prompts = columns.get("prompt", [])
    for name, value in values.items():
        value = torch.as_tensor(value)
        if not torch.isfinite(value).all():
            if value.ndim and prompts:
                k = len(value) // len(prompts)
                rows = (~torch.isfinite(value.view(len(prompts), k, -1))).flatten(1).any(1).tolist()  # B
                prompts = [prompt for prompt, odd in zip(prompts, rows) if odd]
            if processes()[0] == 0:
                found = {"update": step, "not finite": name, "prompts": prompts}
                (folder / "not_finite.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
            stop(f"update {step}: {name} is not finite ({float(value.float().sum())}), so the run ends here; the "
                 f"checkpoints in {folder} are from before, and the prompts are in not_finite.json there; try a "
                 "smaller --lr or --max-grad-norm, and look at the rewards", code=1)


PATIENCE = 20  # updates


def watch(state, metrics, max_new_tokens):
    """Warn, once, about a policy that has gone to an extreme for many updates. Counts in state["extremes"]."""
    length, entropy = metrics["rollout/length"].item(), metrics["objective/entropy"].item()
    extremes = {
        "no response has ended by itself: all are cut off, so the reward sees only beginnings; raise --max-new-tokens "
        "or --missing-eos-penalty": metrics["rollout/eos_rate"].item() == 0,
        "every response is empty: the policy ends at once, because that is what the reward and the KL penalty favour; "
        "look at the reward of an empty text": length <= 1 < max_new_tokens,
        "the policy is almost certain of every token: it writes the same response again and again, and has nothing "
        "left to compare; raise --beta or --temperature, or lower --lr": entropy < 0.01 * length and length > 1,
    }
    counts = state.setdefault("extremes", {})
    for message, extreme in extremes.items():
        counts[message] = counts.get(message, 0) + 1 if extreme else min(0, counts.get(message, 0))
        if counts[message] == PATIENCE:
            counts[message] = -math.inf  # once
            if processes()[0] == 0:
                tqdm.write(f"warning: for {PATIENCE} updates, {message}", file=sys.stderr)


def report(folder, dataset, before, after):
    """Print what training changed: a table of the two evaluations, and one prompt with both policies' responses."""
    if processes()[0] > 0:
        return
    (old, old_texts), (new, new_texts) = before, after
    old, new = ({name: value.mean().item() for name, value in values.items()} for values in (old, new))
    (folder / "evaluation.json").write_text(json.dumps({"before": old, "after": new}, indent=2) + "\n")
    print(f"\n{'held-out prompts':<20}{'before':>10}{'after':>10}")
    for name in old:
        print(f"{name:<20}{old[name]:>z10.3f}{new[name]:>z10.3f}")
    print(f"\nprompt   {as_text(dataset[0]['prompt'])}\nbefore   {old_texts[0]}\nafter    {new_texts[0]}")
    print(f"\nthe policy is in {folder / 'model'}; to see the curves: tensorboard --logdir {folder.parent}")


def is_sharded(model):
    """Whether the weights are spread over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def reshard(model):
    """Take a sharded model apart again: a forward pass without gradients leaves its root whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def write_model(folder, model, tokenizer):
    """Write a Hugging Face folder; all processes must call it, since each may hold a part of the weights."""
    weights = {}
    reshard(model)
    if is_sharded(model):
        whole = get_model_state_dict(model, options=WHOLE)
        tied = getattr(model, "all_tied_weights_keys", None) or {}  # the head, where it is the embedding
        weights = {"state_dict": {name: weight for name, weight in whole.items() if name not in tied}}
    if processes()[0] == 0:
        model.save_pretrained(folder, **weights)
        tokenizer.save_pretrained(folder)


def read_model(folder, model):
    """Put the weights of a Hugging Face folder into a model of that very shape."""
    weights = type(model).from_pretrained(folder, dtype=torch.float32, use_safetensors=True).state_dict()
    if is_sharded(model):
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(weights)


def optimizer_state(model, optimizer):
    """The optimizer's whole state on the CPU; all processes must call it, since each may hold a part of it."""
    reshard(model)
    return get_optimizer_state_dict(model, optimizer, options=WHOLE) if is_sharded(model) else optimizer.state_dict()


def set_optimizer_state(model, optimizer, state):
    """Give each process its part of what `optimizer_state` returned."""
    if is_sharded(model):
        set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
    else:
        optimizer.load_state_dict(state)


@contextmanager
def readable_failure(what, unfinished=None):
    """A full disk or the like ends the run with one line, and what was half written is removed."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        if unfinished and processes()[0] == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        stop(f"the {what} cannot be written ({one_line(error)}); what was saved before is whole: make room, and go on "
             "with --resume", code=1)


def save(folder, model, tokenizer):
    """Write a Hugging Face folder that from_pretrained loads; the old one stays until the new one is whole."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    with readable_failure(f"model {folder}", new):
        write_model(new, model, tokenizer)
        if processes()[0] == 0:
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
            shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------- mistakes, told in one line


def stop(message, code=2):
    """End the program with one line on standard error and the exit code (2: a mistake on the command line)."""
    if int(os.environ.get("RANK", 0)) > 0:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torchrun ends this one once the first has told
        time.sleep(5 if dist.is_initialized() else 30)  # once joined, all are in step; before, one may be importing
    tqdm.write(f"error: {message}", file=sys.stderr)  # which clears a progress bar first
    raise SystemExit(code)


def require(ok, message):
    """Stop with `message` unless `ok`: for what a user can get wrong, before any long work starts."""
    if not ok:
        stop(message)


def check_args(args):
    """Stop at the first flag, of those that several scripts share, whose value cannot work."""
    values = vars(args)
    require(not (args.output and getattr(args, "resume", None)),
            f"--output {args.output}: a resumed run goes on in its own folder; leave it out")
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
                 "microbatch_tokens", "eval_prompts", "eval_rows", "eval_batch_size", "k", "epochs", "minibatches",
                 "keep", "rollout_batch_size"):
        check(name, lambda value: value >= 1, "must be 1 or more")
    if "minibatches" in values:
        responses = args.prompts_per_step * args.k
        check("minibatches", lambda value: value <= responses, f"a rollout has only {responses} responses to divide")
    check("temperature", lambda value: 0 < value < float("inf"), "must be above 0, and finite")
    for name in ("clip", "value_clip", "clip_scores"):
        check(name, lambda value: value > 0, 'must be above 0 ("inf" switches it off)')
    check("seed", lambda value: 0 <= value < 2**32 - 1, "must be from 0 to 4294967294")
    for name in ("lam", "gamma"):
        check(name, lambda value: 0 <= value <= 1, "must be from 0 to 1")
    for name in ("lr", "critic_lr", "max_grad_norm"):
        check(name, lambda value: 0 < value < float("inf"), "must be above 0, and finite")
    for name in ("beta", "missing_eos_penalty", "eval_every", "warmup_updates", "weight_decay", "center", "window",
                 "save_every"):
        check(name, lambda value: 0 <= value < float("inf"), "must be 0 or more, and finite")
