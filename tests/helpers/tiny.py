"""Small models, data and processes for the tests: all made on the spot, nothing is downloaded."""

import importlib
import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (AutoConfig, AutoModelForSequenceClassification, GPT2Config,
                          GPT2ForSequenceClassification, GPT2LMHeadModel, LlamaConfig,
                          LlamaForCausalLM, PreTrainedTokenizerFast)

from common import make_batch, reward_scores
from plumbing import load_reward

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
UNSAVED = {"architectures", "dtype", "_name_or_path"}  # of a config, what is set when it is saved


def data_args(dataset, **more):
    """What load_rows reads from a script's args."""
    flags = dict(dataset=dataset, dataset_config=None, chat=False, system_prompt=None,
                 truncate_prompts=False)
    return SimpleNamespace(**flags | more)


def reward_args(max_tokens=1000, **more):
    """What load_reward and load_rewards read from a script's args."""
    flags = dict(dtype="float32", shard=False, plain=False, microbatch_tokens=max_tokens,
                 gold="none", dataset="")
    return SimpleNamespace(**flags | more)


def load_scorer(name, tokenizer, max_tokens=1000):
    """A function (batch, examples) -> (N,), what the reward of this name says."""
    reward = load_reward(name, reward_args(max_tokens), CPU)
    return lambda batch, examples: reward_scores(reward, tokenizer, batch, examples)


def make_tokenizer(words, pad="<pad>", eos="<eos>"):
    """Word-level tokenizer; pad=None leaves the pad token out, pad=eos makes them one."""
    special = list(dict.fromkeys(token for token in (pad, eos) if token))
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=eos)


def token_ids(tokenizer, prompts):
    return tokenizer(prompts)["input_ids"]


def encode(tokenizer, prompt_ids, completions, device, ended=None):
    """A Batch of texts, where `ended` (default: everywhere) with an EOS."""
    ended = ended or [True] * len(completions)
    ids = [ids + [tokenizer.eos_token_id] * end
           for ids, end in zip(token_ids(tokenizer, completions), ended)]
    return make_batch(tokenizer, prompt_ids, ids, device, ended)


def make_policy(vocab_size, eos_token_id, seed=0, dtype=torch.float32, hidden=16, layers=2):
    """A random Llama whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden,
        num_hidden_layers=layers, num_attention_heads=2, max_position_embeddings=128,
        initializer_range=0.5, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=eos_token_id, pad_token_id=None)
    return LlamaForCausalLM(config).to(dtype).eval()


def make_float64_policy(vocab_size, seed):
    """A random GPT-2 in float64. (Llama's RMSNorm computes in float32 whatever the weights are.)"""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=vocab_size, n_embd=8, n_layer=1, n_head=2, n_positions=16,
                        initializer_range=0.5)
    return GPT2LMHeadModel(config).double().eval()


def make_float64_critic(vocab_size, seed):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=vocab_size, n_embd=8, n_layer=1, n_head=2, n_positions=16,
                        initializer_range=0.5, num_labels=1)
    return GPT2ForSequenceClassification(config).double().eval()


def save_policy(folder, tokenizer, **kwargs):
    make_policy(len(tokenizer), tokenizer.eos_token_id, **kwargs).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def new_config(task):
    """The shape of a task's untrained model."""
    config = task.new_model()[0].config.to_dict()
    return {name: value for name, value in config.items() if name not in UNSAVED}


def saved_config(folder):
    config = AutoConfig.from_pretrained(folder).to_dict()
    return {name: value for name, value in config.items() if name not in UNSAVED}


def save_classifier(folder, policy_folder, tokenizer, labels=1):
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(policy_folder, num_labels=labels)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def scalars(folder):
    """The curves in a run folder's TensorBoard log: dict name -> list of (step, value)."""
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in log.Scalars(name)]
            for name in log.Tags()["scalars"]}


def wait_for(condition, process, seconds=120):
    """Look until condition() holds; fail if the process ends before, or time is up."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with exit code {process.poll()}"
        assert time.monotonic() < end, f"not so after {seconds} seconds"
        time.sleep(0.02)


class Child:
    """A process of a multiprocessing context that runs function(*args), used like a Popen.

    It writes its output to two files, since it shares those of its parent.
    """

    def __init__(self, context, folder, function, *args, **environment):
        folder.mkdir(parents=True, exist_ok=True)
        self.files = folder / "stdout", folder / "stderr"
        self.process = context.Process(target=child, args=(self.files, environment, function, args))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {timeout} seconds")
        return self.process.exitcode

    @property
    def stdout(self):
        return self.files[0].read_text() if self.files[0].exists() else ""

    @property
    def stderr(self):
        return self.files[1].read_text() if self.files[1].exists() else ""


def child(files, environment, function, args):
    """In the new process: the work of Child."""
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ |= environment
    os.chdir(ROOT)
    torch.set_num_threads(1)
    function(*args)


def command_line(flags):
    """Flags of Args as words of a command line."""
    words = []
    for name, value in flags.items():
        if value is not False:
            values = () if value is True else value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return words


def call_script(script, flags, positional=()):
    """python script.py with these flags, in a process that is there already."""
    module = importlib.import_module(script)
    sys.argv = [f"{script}.py", *positional, *command_line(flags)]
    module.main(getattr(module, "parse", tyro.cli)(module.Args))


def start_two(context, folder, function, *args, **environment):
    """function(*args) in two processes that know each other: like torchrun, without its imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]),
                   "WORLD_SIZE": "2"}
    return [Child(context, folder / f"rank{rank}", function, *args, RANK=rank, LOCAL_RANK=rank,
                  **address, **environment) for rank in ("0", "1")]


def end_two(both, seconds=120):
    """Wait for both; where one fails, the other is ended. Returns: returncode, stdout, stderr."""
    end, ending = time.monotonic() + seconds, False
    while any(process.poll() is None for process in both):
        time.sleep(0.02)
        if not ending and any(process.poll() for process in both):
            ending, end = True, time.monotonic() + 30
            for process in both:
                process.process.terminate()
        if time.monotonic() > end:
            for process in both:
                process.process.kill()
    return SimpleNamespace(
        returncode=next((process.poll() for process in both if process.poll()), 0),
        stdout="".join(process.stdout for process in both),
        stderr="".join(process.stderr for process in both))


def run_two(*args, **environment):
    """Start two processes, and wait for both."""
    return end_two(start_two(*args, **environment))
