"""Plumbing: processes, models, data, one-line error messages. No RL in here."""

import copy
import functools
import importlib.util
import itertools
import os
import random
import signal
import sys
import threading
import time
import timeit
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import datasets
import numpy
import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          GenerationConfig, set_seed)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()


# ------------------------------------------------------------------------------------------------ devices and processes
# `torchrun --nproc-per-node 4 rloo.py` starts four processes ("ranks"). Each samples, scores and backpropagates its
# slice of the rows, and the results are shared, so anything computed from a batch (advantages, statistics, metrics) is
# the same on every rank, and the same as with one process. Without torchrun there is nothing to share.


def pick_device(args):
    """Join the other processes, if torchrun has started several. Returns this process's torch.device."""
    several, local = int(os.environ.get("WORLD_SIZE", 1)) > 1, int(os.environ.get("LOCAL_RANK", 0))
    require(several or not args.shard, "--shard: there is only one process; launch with torchrun --nproc-per-node 2")
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    name = best if args.device == "auto" else args.device
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


def pick_threads(model, count=None):
    """Use fewer threads if the model is clearly faster so, as on a busy machine; or `count`. Returns the number."""
    most, ids, seconds = torch.get_num_threads(), torch.zeros((16, 16), dtype=torch.long), {}
    if model.device.type == "cpu" and not dist.is_initialized() and "OMP_NUM_THREADS" not in os.environ:
        for number in {count or 1, count or -(-most // 2), count or most}:
            torch.set_num_threads(number)
            calls, total = timeit.Timer(lambda: model.base_model(ids)).autorange()  # 0.2 s or more
            seconds[number] = total / calls * (1 if number == most else 1.5)
        torch.set_num_threads(min(seconds, key=seconds.get))
        print(f"{torch.get_num_threads()} of {most} threads (fewer on a busy machine; OMP_NUM_THREADS overrides)")
    return torch.get_num_threads()


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

    By hand, since DistributedDataParallel averages, and wraps the model, so that every call would have to unwrap it.
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
        return (f"{pickles[0] if pickles else 'its weights'} is a pickle, which can run arbitrary code when loaded, so "
                "it is refused; if you trust it, load it in transformers and save it with save_pretrained, as "
                "safetensors")
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
    tokenizer = load_function(name)()[1] if ".py:" in name else from_pretrained("tokenizer", AutoTokenizer, name)
    require(tokenizer.eos_token_id is not None, f"tokenizer {name}: has no EOS token, so no response could ever end")
    if tokenizer.pad_token_id is None:  # any id will do: masks are built from positions, never from ids
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name, device, dtype="float32", shard=False, gradient_checkpointing=False,
               auto_class=AutoModelForCausalLM, new=(), **kwargs):
    """Load a model from a hub name, a folder, or a "file.py:function" that returns (model, tokenizer).

    Weights stay in float32, since Adam's small steps would vanish in bfloat16; dtype "bfloat16" runs the forward passes
    under autocast. Dropout is always off (eval mode), so that sampling and updates see the same policy. Only
    safetensors are loaded, and code from the hub is never run. `gradient_checkpointing` is done by hand, since
    transformers supports it only in train mode. `new` names weights that may be missing.
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


def fitting_tokens(name, device):
    """How many tokens have activations and logits of half a GB in an update; more at once are slower on a CPU."""
    if device.type != "cpu" or ".py:" in name:
        return 8192
    config = from_pretrained("model", AutoConfig, name).get_text_config()
    return min(8192, 2**27 // (24 * config.hidden_size * config.num_hidden_layers + 3 * config.vocab_size))


def fix_generation_config(model):
    """Replace a generation config that transformers loads but refuses to save; some models on the hub have one."""
    config = getattr(model, "generation_config", None)
    try:
        _ = config and config.validate(strict=True)
    except ValueError:
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ids)


def select_rows(cache, rows):
    """A copy of a cache with the given rows, differentiable."""
    # As flat rows: several times as fast as states[rows], and backward too.
    select = lambda states: states.flatten(1).index_select(0, rows).unflatten(1, states.shape[1:])
    part = copy.copy(cache)
    part.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in part.layers:
        if isinstance(layer, RoomyLayer):
            layer.buffers = [select(states) for states in layer.buffers]
            layer.keys, layer.values = (states[:, :, : layer.keys.shape[2]] for states in layer.buffers)
        else:
            layer.keys, layer.values = select(layer.keys), select(layer.values)
    return part


class RoomyLayer(DynamicLayer):
    """Keys and values of a layer, with room for more tokens: each step writes its own, and copies no others."""

    def __init__(self, layer, room):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys.to(layer.values.dtype), layer.values  # which autocast does at each token
        self.buffers = [torch.nn.functional.pad(states, (0, 0, 0, room)) for states in (self.keys, self.values)]

    def update(self, keys, values, *args, **kwargs):
        start, end = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
        for buffer, states in zip(self.buffers, (keys, values)):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values


def eos_ids(policy, tokenizer):
    """Every token id that ends a response: the tokenizer's EOS and those in the model's generation config."""
    more = getattr(getattr(policy, "generation_config", None), "eos_token_id", None)
    return torch.tensor(sorted({tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])} - {None}))


def check_positions(model, length):
    """Exit if a row of `length` tokens does not fit the model's context."""
    limit = getattr(model.config, "max_position_embeddings", None)
    require(not limit or length <= limit, f"rows of up to {length} tokens, including the response, do not fit the "
            f"model's {limit} positions; lower --max-prompt-length, --max-length or --max-new-tokens")


def freeze(model, dtype):
    """No gradients for a model that is not trained, and its weights cast for good where autocast would at each pass."""
    whole = not any(isinstance(weight, DTensor) for weight in model.parameters())
    for module in model.base_model.modules() if whole and dtype == "bfloat16" else []:
        if isinstance(module, (torch.nn.Linear, Conv1D)):
            module.to(torch.bfloat16)
    return model.requires_grad_(False)


def load_reference(args, tokenizer, device):
    """The frozen reference policy for the KL: args.reference, or args.model if that is None, of the same vocabulary."""
    name = args.reference or args.model
    require(args.reference or ".py:" not in name,
            f"model {name}: a second call of the function may return other weights; give --reference as well")
    same = load_tokenizer(name).get_vocab() == tokenizer.get_vocab()
    require(same, f"reference {name}: its vocabulary is not the policy's, so there is no KL between them")
    return freeze(load_model(name, device, args.dtype, args.shard), args.dtype)


def load_classifier(name, device, dtype="float32", shard=False, gradient_checkpointing=False, new_head=False):
    """Like load_model, for a reward model: a causal model with a one-label head called `score`, trained or new."""
    new, kwargs = (["score.weight"], {"num_labels": 1}) if new_head else ([], {})
    model = load_model(name, device, dtype, shard, gradient_checkpointing, AutoModelForSequenceClassification, new,
                       **kwargs)
    require(hasattr(model, "score"), f"model {name}: not a classifier on a causal model; wrap it in a python function")
    require(model.config.num_labels == 1, f"model {name}: has {model.config.num_labels} labels; a reward model has 1")
    return model


def load_critic(args, tokenizer, device):
    """The value model: args.critic; by default the reward model or, if it is a function, the policy and a new head."""
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

    Args: name; split ("train", "test", ...; ignored for a single file); config (for a hub dataset that has several).
    """
    function = load_function(name) if ".py:" in name else check_path("dataset", name)
    require(not os.path.isfile(name) or os.path.getsize(name) > 0, f"dataset {name}: is empty")
    try:
        if function:
            dataset = function(split)
        elif any(os.path.isfile(f"{name}/{file}") for file in ("dataset_dict.json", "dataset_info.json")):
            dataset = datasets.load_from_disk(name)
            dataset = dataset[split] if isinstance(dataset, datasets.DatasetDict) else dataset
        elif os.path.isfile(name):
            kind = Path(name).suffix[1:].replace("jsonl", "json")
            dataset = datasets.load_dataset(kind, data_files=name, split="train")
        else:
            main = "main" if not config and "main" in datasets.get_dataset_config_names(name) else None
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


def prompt_tokens(tokenizer, prompts, what):
    """Token ids of prompts: text with the tokenizer's own special tokens, messages through its chat template."""
    if not prompts or isinstance(prompts[0], str):
        ids, end = tokenizer(prompts)["input_ids"] if prompts else [], tokenizer.eos_token_id
        return [row[:-1] if row and row[-1] == end and not text.endswith(tokenizer.eos_token) else row
                for row, text in zip(ids, prompts)]  # some tokenizers append EOS, but the response is still to come
    require(tokenizer.chat_template, f"{what}: the prompts are chat messages, but the tokenizer has no chat template; "
                                     "use an instruction-tuned model, or plain-text prompts")
    try:
        texts = tokenizer.apply_chat_template(prompts, tokenize=False, add_generation_prompt=True)
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

    A conversation ("messages") is a prompt and a final reply. Chosen and rejected texts without a prompt have an
    implicit one: their common prefix, up to the last "Assistant:" if there is one. `sources`: dict target -> column.
    """
    row = row | {target: row[sources[target]] for target in ("prompt", "chosen", "rejected") if target in sources}
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

    Args: args (a script's flags); split; tokenizer; columns ("prompt", and required responses); max_length (tokens of
    prompt, longest response and its EOS; default: args.max_prompt_length); first (maximum number of rows).
    Returns: datasets.Dataset with prompt (text, or messages), prompt_ids, num_tokens (with the longest response),
    completion, chosen and rejected (texts) if it has them, and the dataset's other columns unchanged.
    """
    name, max_length = args.dataset, max_length or args.max_prompt_length
    what, dataset = f"dataset {name}, split {split}", load_dataset(name, split, args.dataset_config).with_format(None)
    names, has = dataset[0], f"it has {', '.join(dataset.column_names)}"
    given = {column: getattr(args, f"{column}_column", None) for column in ("prompt", *RESPONSES)}
    sources = {column: source for column, source in given.items() if source in dataset.column_names}
    with suppress(Exception):
        names = split_row(names, sources)
    for item in columns:
        require(item in sources or not given[item],
                f"--{item}-column {given[item]}: dataset {name} has no such column; {has}")
        require(item in names, f"dataset {name}: has no column {item!r}; {has}; name one with --{item}-column")
    wrap, system, shorter = bool(args.chat or args.system_prompt), args.system_prompt, args.truncate_prompts
    chat = wrap or not isinstance(names["prompt"], str)

    def prepare(row, index):
        try:
            row = split_row(row, sources)
        except Exception as error:
            stop(f"{what}: row {index} does not follow TRL's conventions: {type(error).__name__}: {one_line(error)}")
        if wrap and isinstance(row["prompt"], str):
            row["prompt"] = [{"role": "user", "content": row["prompt"]}] if row["prompt"] else []
        turns = row["prompt"] if chat and isinstance(row["prompt"], list) else []
        require(isinstance(row["prompt"], list if chat else str)
                and all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in turns),
                f"{what}: column 'prompt' must hold text, or lists of messages with role and content; "
                f"row {index} does not")
        if system and row["prompt"] and row["prompt"][0]["role"] != "system":
            row["prompt"] = [{"role": "system", "content": system}, *row["prompt"]]
        for column in row.keys() & RESPONSES:
            require(isinstance(row[column], str), f"{what}: column {column!r} must hold text; row {index} does not")
        return row

    def tokenize(values, indices, code):
        rows = [prepare(dict(zip(values, row)), index) for index, row in zip(indices, zip(*values.values()))]
        new = {column: [row[column] for row in rows] for column in {"prompt", *RESPONSES} & names.keys()}
        found = iter(prompt_tokens(tokenizer, [prompt for prompt in new["prompt"] if prompt], what))
        prompt_ids = [next(found) if prompt else [] for prompt in new["prompt"]]
        responses = [tokenizer(new[column], add_special_tokens=False)["input_ids"] for column in columns[1:]]
        longest = [max(map(len, lists)) + 1 for lists in zip(*responses)] or [0] * len(rows)
        if shorter:
            prompt_ids = [ids and shorten(ids, max_length - more, tokenizer) for ids, more in zip(prompt_ids, longest)]
        lengths = [len(ids) + more if ids else 0 for ids, more in zip(prompt_ids, longest)]  # 0: an empty prompt
        return new | {"prompt_ids": prompt_ids, "num_tokens": lengths}

    text, number = datasets.Value("string"), datasets.Value("int32")  # do not guess: first rows may be null
    features = {column: text if column in RESPONSES else dataset.features.get(column) for column in names}
    features |= {"prompt": datasets.Json() if chat else text, "prompt_ids": [number], "num_tokens": number}
    if len(dataset) > 50_000 and rank_and_world_size()[0] == 0:
        datasets.enable_progress_bars()
    dataset = dataset.map(  # found again in the cache of datasets by the next run, unless this file has changed
        tokenize, batched=True, with_indices=True, fn_kwargs={"code": Path(__file__).read_text()}, desc="tokenize",
        features=datasets.Features(features), remove_columns=list(dataset.features.keys() - features),
        keep_in_memory=not all(os.access(Path(file["filename"]).parent, os.W_OK) for file in dataset.cache_files))
    datasets.disable_progress_bars()
    lengths = numpy.array(dataset["num_tokens"][:])
    empty, long = lengths == 0, lengths > max_length
    require(not empty.all(), f"{what}: every prompt is empty")
    require(not (empty | long).all(),
            f"{what}: every row has more than {max_length} tokens; raise --max-prompt-length or --max-length")
    for why, drop in (("an empty prompt", empty), (f"more than {max_length} tokens", long)):
        if drop.any() and rank_and_world_size()[0] == 0:
            print(f"{what}: dropped {drop.sum()} of {len(dataset)} rows with {why}")
    return dataset.select(numpy.flatnonzero(~(empty | long))[:first])


def batches(dataset, size, seed, skip=0):
    """Yield dicts of columns (lists of `size` values) forever, reshuffled after each pass, without the first `skip`."""
    generator = torch.Generator().manual_seed(seed)
    order = (i for _ in itertools.count() for i in torch.randperm(len(dataset), generator=generator).tolist())
    stream = itertools.islice(order, skip * size, None)
    while True:
        yield dataset[list(itertools.islice(stream, size))]


def call_reward(name, function, examples, completions):
    """Call a python reward function, as TRL does: function(prompts, completions, **columns) -> numbers.

    The dataset's other columns are lists of one value per completion. Completions are texts, or one-message lists for
    chat prompts. With several processes, each calls the function for its slice of the prompts.

    Args: name (for a one-line error); function; examples (dict of columns, lists of B values); completions (N texts,
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
