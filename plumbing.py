"""Plumbing: processes, models, data, one-line error messages. No RL in here."""

import copy
import functools
import importlib.util
import itertools
import math
import os
import random
import signal
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import datasets
import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig,
                          set_seed)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()


# ------------------------------------------------------------------------------------------------ devices and processes
#
# `torchrun --nproc-per-node 4 rloo.py` starts four processes ("ranks"). Each samples, scores and backpropagates its
# slice of the rows, and the results are shared, so anything computed from a batch (advantages, statistics, metrics) is
# the same on every rank, and the same as with one process. Without torchrun there is nothing to share.


def pick_device(args):
    """Join the other processes, if torchrun has started several. Returns this process's torch.device.

    Args: args (device: "cpu", "cuda", "mps", or "auto" for the best available; shard).
    """
    several, local = int(os.environ.get("WORLD_SIZE", 1)) > 1, int(os.environ.get("LOCAL_RANK", 0))
    require(several or not args.shard, "--shard: there is only one process; launch with torchrun --nproc-per-node 2")
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    require(not several or ":" not in name,
            f"--device {name}: with several processes, each takes its own; use cuda or cpu")
    if several and name == "cuda":
        count = torch.cuda.device_count()
        require(local < count, f"--nproc-per-node: there are more processes than GPUs ({count}); use {count}")
        name = f"cuda:{local}"
    try:
        device = torch.empty(0, device=name).device
    except Exception:
        stop(f"--device {args.device}: not available here; use auto or cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if several and not dist.is_initialized():
        timeout = timedelta(hours=2)  # the others wait while rank 0 writes a large checkpoint
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    return device


def leave():
    """The last line of a script: with torchrun, wait for the other processes, then exit."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # a normal exit, through the destructors of torch's threads, aborted in 3 of 25 runs


def rank_and_world_size():
    """This process's rank, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def rank_slice(n):
    """The range within 0 ... n - 1 that this process works on. (Simpler than DistributedSampler, which pads.)"""
    rank, size = rank_and_world_size()
    return range(rank * n // size, (rank + 1) * n // size)


def sum_over_ranks(value):
    """Sum a tensor (of any shape and dtype) or a number over all processes."""
    if not dist.is_initialized():
        return value
    if not torch.is_tensor(value):
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return sum_over_ranks(torch.tensor(float(value), device=device)).item()
    numbers = value.int() if value.dtype == torch.bool else value.contiguous()
    dist.all_reduce(numbers)
    return numbers.to(value.dtype)


def rank_generator(device):
    """A random generator for sampling that differs between processes; None (torch's own) with a single process."""
    rank, size = rank_and_world_size()
    if size > 1:  # all processes draw the same number here, so they stay in sync
        return torch.Generator(device).manual_seed(torch.randint(2**62, ()).item() + rank)


def random_states():
    """The states of all random number generators, as tensors and plain containers."""
    name, keys, *rest = numpy.random.get_state()
    states = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [name, keys.tolist(), *rest]}
    for name in ("cuda", "mps"):
        if getattr(torch, name).is_available():
            states[name] = getattr(torch, name).get_rng_state()
    return states


def set_random_states(states):
    """Restore what `random_states` returned."""
    torch.set_rng_state(states["torch"])
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    for name in ("cuda", "mps"):
        if name in states and getattr(torch, name).is_available():
            getattr(torch, name).set_rng_state(states[name])


@contextmanager
def isolated_rng(seed):
    """Seed all random number generators, and restore them afterwards."""
    states = random_states()
    set_seed(seed)
    yield
    set_random_states(states)


def clip_gradients(model, max_norm):
    """Sum the gradients over all processes and clip the norm of the sum. Returns the norm before clipping.

    Done by hand rather than with DistributedDataParallel, which averages the gradients and wraps the model, so that
    every call would have to unwrap it.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for gradient in gradients if dist.is_initialized() else []:
        if isinstance(gradient, DTensor):
            gradient.mul_(dist.get_world_size())  # undoes fully_shard's averaging
        else:
            dist.all_reduce(gradient)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def shard_model(model, device):
    """Shard the weights across processes (FSDP2): each layer is gathered only while it runs."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    for layer in max(blocks, key=lambda block: sum(p.numel() for p in block.parameters()), default=[]):
        fully_shard(layer, mesh=mesh)
    # A classifier's body and head are called separately.
    for part in (model.base_model, model.score) if hasattr(model, "score") else (model,):
        fully_shard(part, mesh=mesh)


# --------------------------------------------------------------------------------------------------------------- models


@functools.cache
def load_module(path):
    """Import the python file at `path`, once."""
    require(os.path.isfile(path), f"{path}: no such file")
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
    """The text of an error as a single line that can always be printed."""
    return " ".join(str(error).encode(errors="replace").decode().split())[:300]


def check_path(what, name):
    """Exit if `name` looks like a local path, rather than a hub name, and does not exist."""
    owner, _, rest = name.partition("/")
    is_path = name.startswith((".", "/", "~")) or "/" in rest or (rest and os.path.isdir(owner))
    is_path = is_path or name.endswith((".json", ".jsonl", ".csv", ".parquet"))
    require(not is_path or os.path.exists(name), f"{what} {name}: no such file or folder; give a path or a hub name")


def explain(what, name, error):
    """The rest of an error message: why `name` could not be loaded, and what to do about it."""
    text, folder = one_line(error), Path(name)
    config = folder / "config.json"
    if "trust_remote_code" in text or (config.is_file() and "auto_map" in config.read_text(errors="replace")):
        return "needs code from its repository, which is never run; use a model that is built into transformers"
    if "ignore_mismatched_sizes" in text:
        return "its weights have the wrong shapes (a reward model or critic needs a head with one label)"
    files = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    pickles = sorted(name for name in files if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if (pickles and not any(name.endswith(".safetensors") for name in files)) or "use_safetensors" in text:
        pickles = pickles[0] if pickles else "its weights"
        return (f"{pickles} is a pickle, which can run arbitrary code when loaded, so it is refused; if you trust it, "
                "load it in transformers and save it with save_pretrained, as safetensors")
    if not folder.exists() and isinstance(error, OSError):  # raised by transformers and datasets without a connection
        return (f"not a local folder, and the hub cannot be reached or does not have it; if you are offline, set "
                f"HF_HUB_OFFLINE=1 to use cached downloads at once, or fetch it elsewhere with `hf download "
                f"{'--repo-type dataset ' * (what == 'dataset')}{name} --local-dir FOLDER` and name that folder")
    return f"cannot be loaded from a folder or the hub: {type(error).__name__}: {text}"


def from_pretrained(what, auto_class, name, **kwargs):
    """auto_class.from_pretrained(name), from a local folder or the hub; exit with a one-line error if it fails."""
    check_path(what, name)
    require(not os.path.isdir(name) or any(Path(name).glob("*config.json")),
            f"{what} {name}: not a model folder (it has no config.json)")
    try:
        return auto_class.from_pretrained(name, trust_remote_code=False, **kwargs)
    except Exception as error:
        stop(f"{what} {name}: {explain(what, name, error)}")


def load_tokenizer(name):
    """Load a tokenizer from a hub name, a folder, or a "file.py:function" that returns (model, tokenizer)."""
    if ".py:" in name:
        tokenizer = load_function(name)()[1]
    else:
        tokenizer = from_pretrained("tokenizer", AutoTokenizer, name)
    require(tokenizer.eos_token_id is not None, f"tokenizer {name}: has no EOS token, so no response could ever end")
    if tokenizer.pad_token_id is None:  # any id will do: masks are built from positions, never from ids
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name, device, dtype="float32", shard=False, gradient_checkpointing=False,
               auto_class=AutoModelForCausalLM, new=(), **kwargs):
    """Load a model from a hub name, a folder, or a "file.py:function" that returns (model, tokenizer).

    Weights stay in float32, since Adam's small steps would vanish in bfloat16; dtype "bfloat16" runs the forward passes
    under autocast. Dropout is always off (eval mode), so that sampling and updates see the same policy. Only
    safetensors are loaded, and code from the hub is never run. `shard` shards the weights across processes (FSDP2).
    `gradient_checkpointing` keeps only each layer's input for the backward pass; it is done by hand, since transformers
    supports it only in train mode. `new` names weights that may be missing.
    """
    if ".py:" in name:
        model, tokenizer = load_function(name)()
    else:
        tokenizer = load_tokenizer(name)
        model, info = from_pretrained("model", auto_class, name, dtype=torch.float32, use_safetensors=True,
                                      output_loading_info=True, **kwargs)
        missing = sorted(set(info["missing_keys"]) - set(new))
        require(not missing,
                f"model {name}: the weights {', '.join(missing[:3])} are missing, so it is another kind of model")
    fix_generation_config(model)
    words = max(tokenizer.vocab_size, tokenizer.eos_token_id + 1, tokenizer.pad_token_id + 1)
    rows = model.get_input_embeddings().num_embeddings
    require(words <= rows, f"model {name}: has embeddings for {rows} tokens, but its tokenizer has {words}; they do "
                           "not belong together")
    if dtype == "bfloat16":
        for module in (model, model.base_model):
            module.forward = torch.autocast(device.type, torch.bfloat16)(module.forward)
    if gradient_checkpointing:
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.forward = functools.partial(recompute_in_backward, layer.forward, use_reentrant=False)
    model.shares_prompts = not (gradient_checkpointing or shard)  # see common.forward
    if shard:
        shard_model(model, device)
    return model.to(device).eval()


def fix_generation_config(model):
    """Replace a generation config that transformers loads but refuses to save; some models on the hub have one."""
    config = getattr(model, "generation_config", None)
    try:
        _ = config and config.validate(strict=True)
    except ValueError:
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ids)


def select_rows(cache, rows, room=0):
    """A copy of a cache with the given rows, differentiable, and with room for that many more tokens."""
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    for i, layer in enumerate(part.layers):  # selected as flat rows, which is several times as fast, and backward too
        layer.keys, layer.values = (states.flatten(1).index_select(0, rows).unflatten(1, states.shape[1:])
                                    for states in (layer.keys, layer.values))
        if room and not layer.is_sliding:
            part.layers[i] = RoomyLayer(layer.keys, layer.values, room)
    return part


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer, with room for the tokens to come: each step writes its own and copies no others."""

    def __init__(self, keys, values, room):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.buffers = [F.pad(states, (0, 0, 0, room)) for states in (keys, values)]
        self.keys, self.values = keys, values

    def update(self, keys, values, *args, **kwargs):
        start, end = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
        for buffer, states in zip(self.buffers, (keys, values)):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


def eos_ids(policy, tokenizer):
    """Every token id that ends a response: the tokenizer's EOS and those in the model's generation config."""
    config = getattr(policy, "generation_config", None)
    more = getattr(config, "eos_token_id", None)
    more = more if isinstance(more, list) else [] if more is None else [more]
    return torch.tensor(sorted({tokenizer.eos_token_id, *more}))


def check_positions(model, length):
    """Exit if a row of `length` tokens does not fit the model's context."""
    limit = getattr(model.config, "max_position_embeddings", None) or math.inf
    require(length <= limit, f"rows of up to {length} tokens, including the response, do not fit the model's {limit} "
                             "positions; lower --max-prompt-length, --max-length or --max-new-tokens")


def load_reference(args, tokenizer, device):
    """The frozen reference policy for the KL: args.reference, or args.model if that is None.

    Its vocabulary must be that of `tokenizer`, the policy's.
    """
    name = args.reference or args.model
    require(args.reference or ".py:" not in name,
            f"model {name}: a second call of the function may return other weights; give --reference as well")
    same = load_tokenizer(name).get_vocab() == tokenizer.get_vocab()
    require(same, f"reference {name}: its vocabulary is not the policy's, so there is no KL between them")
    return load_model(name, device, args.dtype, args.shard).requires_grad_(False)


def load_classifier(name, device, dtype="float32", shard=False, gradient_checkpointing=False, new_head=False):
    """Like load_model, for a reward model: a causal model with a one-label head called `score`, trained or new."""
    new, kwargs = (["score.weight"], {"num_labels": 1}) if new_head else ([], {})
    model = load_model(name, device, dtype, shard, gradient_checkpointing, AutoModelForSequenceClassification, new,
                       **kwargs)
    require(hasattr(model, "score"), f"model {name}: not a classifier on a causal model; wrap it in a python function")
    require(model.config.num_labels == 1, f"model {name}: has {model.config.num_labels} labels; a reward model has 1")
    return model


def load_critic(args, tokenizer, device):
    """The value model: args.critic; by default the reward model, or the policy if the reward is a function.

    A policy gets a new head; a reward model or a critic keeps its own.
    """
    name = args.critic or (args.model if ".py:" in args.reward[0] else args.reward[0])
    same = load_tokenizer(name).get_vocab() == tokenizer.get_vocab()
    require(same, f"critic {name}: its vocabulary is not the policy's; choose another --critic")
    return load_classifier(name, device, args.dtype, args.shard, args.gradient_checkpointing, new_head=True)


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def reshard(model):
    """Free a sharded model's gathered weights: a forward pass without gradients leaves the root gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def write_model(folder, model, tokenizer):
    """Write a Hugging Face folder. All processes must call it, since each may hold a part of the weights."""
    reshard(model)
    weights = get_model_state_dict(model, options=WHOLE)
    tied = getattr(model, "all_tied_weights_keys", None) or {}  # a head tied to the embedding is saved once
    if rank_and_world_size()[0] == 0:
        model.save_pretrained(folder, state_dict={name: weights[name] for name in weights if name not in tied})
        tokenizer.save_pretrained(folder)


def read_model(folder, model):
    """Load the weights of a Hugging Face folder into a model of the same shape."""
    weights = type(model).from_pretrained(folder, dtype=torch.float32, use_safetensors=True).state_dict()
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))


def optimizer_state(model, optimizer):
    """The optimizer's full state, on the CPU. All processes must call it, since each may hold a part of it."""
    reshard(model)
    return get_optimizer_state_dict(model, optimizer, options=WHOLE)


def load_optimizer_state(model, optimizer, state):
    """Give each process its part of what `optimizer_state` returned."""
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))


# ----------------------------------------------------------------------------------------------------------------- data


def load_dataset(name, split, config=None):
    """Load a hub dataset, a folder written by save_to_disk, a .json/.jsonl/.csv/.parquet file, or a python function.

    Args: name ("owner/name", a path, or "file.py:function" called with the split); split ("train", "test", ...;
    ignored for a single file); config (for a hub dataset that has several).
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
            names = [] if config else datasets.get_dataset_config_names(name)  # several: "main", or datasets says which
            main = "main" if len(names) > 1 and "main" in names else None
            dataset = datasets.load_dataset(name, config or main, split=split)
    except Exception as error:
        cause = one_line(error.__cause__ or "")  # names the row that is not valid JSON
        require(not cause.startswith("JSON"), f"dataset {name}, split {split}: not valid JSON ({cause}, counting from "
                                              "0); fix or remove that row")
        stop(f"dataset {name}, split {split}: {explain('dataset', name, error)}")
    require(isinstance(dataset, datasets.Dataset),
            f"dataset {name}: the function must return a datasets.Dataset, not {type(dataset)}")
    require(len(dataset) > 0, f"dataset {name}, split {split}: is empty")
    return dataset


def as_text(prompt):
    """A prompt as plain text: itself, or its chat messages, one per line."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def prompt_tokens(tokenizer, prompts, what):
    """Token ids of prompts: text with the tokenizer's own special tokens, messages through its chat template."""
    if isinstance(prompts[0], str):
        ids, end = tokenizer(prompts)["input_ids"], tokenizer.eos_token_id
        return [row[:-1] if row and row[-1] == end and not text.endswith(tokenizer.eos_token) else row
                for row, text in zip(ids, prompts)]  # some tokenizers append EOS, but the response is still to come
    require(tokenizer.chat_template, f"{what}: the prompts are chat messages, but the tokenizer has no chat template; "
                                     "use an instruction-tuned model, or plain-text prompts")
    try:
        texts = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
                 for prompt in prompts]
    except Exception as error:
        stop(f"{what}: the tokenizer's chat template rejects its messages: {one_line(error)}")
    return tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has added them


def pad(rows, pad_id, side, device):
    """N lists of ids -> ids (N, L) and bool mask (N, L), padded on the "left" or "right"."""
    rows = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.bool().to(device)


RESPONSES = {"completion", "chosen", "rejected"}  # columns that hold responses


def split_row(row, sources):
    """Find a row's prompt, and its completion, chosen and rejected if it has them, by TRL's conventions.

    A conversation ("messages") is a prompt and a final reply. Chosen and rejected texts without a prompt, as in
    Anthropic's HH, have an implicit one: their common prefix, up to the last "Assistant:" if there is one.
    `sources` (dict target -> column) names columns to use instead.
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
    """The last `length` token ids, at least one, with any BOS kept at the front."""
    head = ids[:1] if ids[0] == tokenizer.bos_token_id and length > 1 else []
    return ids if len(ids) <= length else head + ids[-max(1, length - len(head)) :]


def load_rows(args, split, tokenizer, columns=("prompt",), max_length=None, first=None):
    """Load the (first) rows of a dataset split that are not too long; print how many rows are dropped.

    Args: args (dataset, dataset_config, max_prompt_length, chat, system_prompt, truncate_prompts; prompt_column,
    completion_column, chosen_column and rejected_column if the script has them); split; tokenizer; columns ("prompt",
    and the response columns that are required); max_length (in tokens, of the prompt plus the longest response and its
    EOS; default: args.max_prompt_length); first (maximum number of rows).
    Returns: datasets.Dataset with prompt (text, or chat messages), prompt_ids, num_tokens (with the longest response),
    completion, chosen and rejected (texts) if it has them, and the dataset's other columns unchanged.
    """
    name, max_length = args.dataset, max_length or args.max_prompt_length
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
        for column in row.keys() & RESPONSES:
            require(isinstance(row[column], str), f"{what}: column {column!r} must hold text; row {index} does not")
        return row | {"prompt": prompt}

    rows = [row for row in (prepare(row, index) for index, row in enumerate(dataset)) if row["prompt"]]
    prompt_ids = prompt_tokens(tokenizer, [row["prompt"] for row in rows], what) if rows else []
    rows, prompt_ids = [row for row, ids in zip(rows, prompt_ids) if ids], [ids for ids in prompt_ids if ids]
    require(rows, f"{what}: every prompt is empty")
    responses = [tokenizer([row[column] for row in rows], add_special_tokens=False)["input_ids"]
                 for column in columns[1:]]
    longest = [max(map(len, lists)) + 1 for lists in zip(*responses)] if responses else [0] * len(rows)
    if args.truncate_prompts:
        prompt_ids = [shorten(ids, max_length - more, tokenizer) for ids, more in zip(prompt_ids, longest)]
    lengths = [len(ids) + more for ids, more in zip(prompt_ids, longest)]
    fits = [i for i in range(len(rows)) if lengths[i] <= max_length]
    require(fits, f"{what}: every row has more than {max_length} tokens; raise --max-prompt-length or --max-length")
    if rank_and_world_size()[0] == 0:
        for count, why in ((len(dataset) - len(rows), "an empty prompt"),
                           (len(rows) - len(fits), f"more than {max_length} tokens")):
            if count:
                print(f"{what}: dropped {count} of {len(dataset)} rows with {why}")
    return datasets.Dataset.from_list([rows[i] | {"prompt_ids": prompt_ids[i], "num_tokens": lengths[i]}
                                       for i in fits[:first]])


def batches(dataset, size, seed, skip=0):
    """Yield dicts of columns (lists of `size` values) forever, reshuffled after each pass over the dataset.

    The first `skip` batches are left out: a resumed run has already used them.
    """

    def order():
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from torch.randperm(len(dataset), generator=generator).tolist()

    stream = itertools.islice(order(), skip * size, None)
    while True:
        yield dataset[list(itertools.islice(stream, size))]


def call_reward(name, function, examples, completions):
    """Call a python reward function, as TRL does: function(prompts, completions, **columns) -> numbers.

    The dataset's other columns are lists of one value per completion. Completions are texts, or one-message lists for
    chat prompts. With several processes, each calls the function for its slice of the prompts. Exits with a one-line
    error if the function fails.

    Args: name (for the error); function; examples (dict of columns, lists of B values); completions (N texts,
    prompt-major). Returns: (N,), 0 in rows that other processes handle.
    """
    k, mine = len(completions) // len(examples["prompt"]), rank_slice(len(examples["prompt"]))
    rewards = torch.zeros(len(completions))  # (N,)
    columns = {key: [values[i] for i in mine for _ in range(k)] for key, values in examples.items()
               if key not in ("prompt_ids", "num_tokens")}  # ours, not the dataset's
    columns["prompts"] = columns.pop("prompt")
    columns["completions"] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(columns["prompts"], completions[k * mine.start : k * mine.stop])]
    if not len(mine):
        return rewards
    try:
        values = [float(value) for value in function(**columns)]
    except Exception as error:
        stop(f"reward {name}: raised {type(error).__name__}: {one_line(error)}")
    count = len(columns["completions"])
    require(len(values) == count, f"reward {name}: returned {len(values)} values for {count} completions")
    bad = [value for value in values if not abs(value) < torch.finfo(torch.float32).max]
    require(not bad, f"reward {name}: returned {bad[:1]}; every value must be a finite number")
    rewards[k * mine.start : k * mine.stop] = torch.tensor(values)
    return rewards


# --------------------------------------------------------------------------------------------- one-line error messages


def stop(message, code=2):
    """Exit with a one-line error on standard error (code 2: a mistake on the command line)."""
    if int(os.environ.get("RANK", 0)) > 0:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # so that torchrun can end this one once rank 0 has reported
        time.sleep(5 if dist.is_initialized() else 30)  # after joining, all are in sync; before, one may be importing
    tqdm.write(f"error: {message}", file=sys.stderr)  # clears a progress bar first
    raise SystemExit(code)


def require(ok, message):
    """Exit with `message` unless `ok`: for user errors, before any long work starts."""
    if not ok:
        stop(message)
