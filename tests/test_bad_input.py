"""Mistakes of a user: one clear line, exit code 2, before any training and without touching what is there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_tokenizer, save_classifier, save_policy

import dpo
import evaluate
import grpo
import plot
import ppo
import raft
import reinforce
import reinforce_pp
import reward_model
import rloo
import sft

REWARDS = """
def fails(prompts, completions, **_):
    raise KeyError("no such answer")
def short(prompts, completions, **_):
    return [1.0] * (len(completions) - 1)
def nan(prompts, completions, **_):
    return [float("nan")] * len(completions)
def text(prompts, completions, **_):
    return ["good"] * len(completions)
def none(prompts, completions, **_):
    pass
"""


@pytest.fixture(scope="module")
def bad(world, tmp_path_factory):
    """A folder with things that are wrong."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "syntax.py").write_text("def f(:\n")
    (folder / "empty.jsonl").write_text("")
    (folder / "column.jsonl").write_text(json.dumps({"query": "a", "answer": "b"}))
    (folder / "numbers.jsonl").write_text(json.dumps({"prompt": 1}) + "\n" + json.dumps({"prompt": 2}))
    (folder / "blank.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": ""}))
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}]
    (folder / "blank2.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "used").mkdir()
    (folder / "used" / "args.json").write_text("{}")
    (folder / "nothing").mkdir()
    save_policy(folder / "headless", world.tokenizer)
    save_policy(folder / "other", make_tokenizer("x y z".split()))
    (folder / "list.py").write_text("def rows(split):\n    return [{'prompt': 'a'}]\n")
    (folder / "null.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": null}\n')
    save_classifier(folder / "two_labels", world.policy, world.tokenizer, labels=2)
    (folder / "half.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c", "compl')
    (folder / "halves").mkdir()
    (folder / "halves" / "train.jsonl").write_text('{"prompt": "a"}\nprompt: b\n')
    (folder / "halves" / "test.jsonl").write_text('{"prompt": "a"}\n')
    chat = [{"prompt": [{"role": "user", "content": "a"}]}, {"prompt": [{"role": "user", "content": "b"}]}]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, chat)))
    (folder / "no_roles.jsonl").write_text(json.dumps({"prompt": [{"text": "a"}]}))
    (folder / "pairs.jsonl").write_text(json.dumps({"chosen": "a b", "rejected": "c d"}))
    save_policy(folder / "pickle", world.tokenizer)
    torch.save(load_file(folder / "pickle" / "model.safetensors"), folder / "pickle" / "pytorch_model.bin")
    (folder / "pickle" / "model.safetensors").unlink()
    save_policy(folder / "cut", world.tokenizer)
    cut = (folder / "cut" / "model.safetensors").read_bytes()[:-100]
    (folder / "cut" / "model.safetensors").write_bytes(cut)
    for name in ("remote", "small"):
        save_policy(folder / name, world.tokenizer)
    config = json.loads((folder / "remote" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Model", "AutoConfig": "mine.Config"}}
    (folder / "remote" / "config.json").write_text(json.dumps(config))
    (folder / "remote" / "mine.py").write_text("raise SystemExit('this code must not run')")
    make_tokenizer("a b c d e f g h".split(), pad="<eos>").save_pretrained(folder / "small")
    return folder


RLOO = [  # flags, and what the line must name: the flag or file, and the remedy or reason
    ({"k": 1}, ["--k 1", "use 2 or more"]),
    ({"k": 0}, ["--k 0", "use 2 or more"]),
    ({"prompts_per_step": 0}, ["--prompts-per-step 0", "1 or more"]),
    ({"num_updates": 0}, ["--num-updates 0", "1 or more"]),
    ({"max_new_tokens": 0}, ["--max-new-tokens 0", "1 or more"]),
    ({"microbatch_tokens": -1}, ["--microbatch-tokens -1", "1 or more"]),
    ({"eval_prompts": 0}, ["--eval-prompts 0", "1 or more"]),
    ({"temperature": 0.0}, ["--temperature 0.0", "above 0"]),
    ({"temperature": -1.0}, ["--temperature -1.0", "above 0"]),
    ({"temperature": float("nan")}, ["--temperature nan", "above 0"]),
    ({"lr": 0.0}, ["--lr 0.0", "above 0"]),
    ({"lr": float("inf")}, ["--lr inf", "above 0"]),
    ({"max_grad_norm": 0.0}, ["--max-grad-norm 0.0", "above 0"]),
    ({"beta": -0.1}, ["--beta -0.1", "0 or more"]),
    ({"missing_eos_penalty": -1.0}, ["--missing-eos-penalty -1.0", "0 or more"]),
    ({"eval_every": -1}, ["--eval-every -1", "0 or more"]),
    ({"device": "cuda:99"}, ["--device cuda:99", "not available"]),
    ({"device": "cpu:x"}, ["--device cpu:x", "not available"]),
    ({"device": "gpu"}, ["--device gpu", "auto or cpu"]),
    ({"model": "{bad}/no_model"}, ["model", "{bad}/no_model", "no such file or folder"]),
    ({"model": "{bad}/nothing"}, ["{bad}/nothing", "cannot be loaded"]),
    ({"reference": "{bad}/no_model"}, ["{bad}/no_model", "no such file or folder"]),
    ({"reward": ("{bad}/no_reward",)}, ["{bad}/no_reward", "no such file or folder"]),
    ({"reward": ("{bad}/no_file.py:f",)}, ["{bad}/no_file.py", "there is no such file"]),
    ({"reward": ("{bad}/rewards.py:absent",)}, ["{bad}/rewards.py", "no function absent"]),
    ({"reward": ("{bad}/syntax.py:f",)}, ["{bad}/syntax.py", "SyntaxError"]),
    ({"reward": ("{bad}/rewards.py:fails",)}, ["rewards.py:fails", "KeyError", "no such answer"]),
    ({"reward": ("{bad}/rewards.py:short",)}, ["rewards.py:short", "1 values for 2 completions"]),
    ({"reward": ("{bad}/rewards.py:nan",)}, ["rewards.py:nan", "nan", "finite"]),
    ({"reward": ("{bad}/rewards.py:text",)}, ["rewards.py:text", "could not convert string to float: 'good'"]),
    ({"reward": ("{bad}/rewards.py:none",)}, ["rewards.py:none", "NoneType"]),
    ({"gold": "{bad}/rewards.py:nan"}, ["rewards.py:nan", "nan", "finite"]),
    ({"reward": ("{bad}/headless",)}, ["{bad}/headless", "lacks the weights score.weight"]),
    ({"reference": "{bad}/other"}, ["reference {bad}/other", "another vocabulary"]),
    ({"reward": ("{bad}/two_labels",)}, ["{bad}/two_labels", "2 labels", "has 1"]),
    ({"dataset": "{bad}/no_data.jsonl"}, ["{bad}/no_data.jsonl", "no such file"]),
    ({"dataset": "{bad}/nothing"}, ["dataset {bad}/nothing", "cannot be loaded"]),
    ({"dataset": "{bad}/empty.jsonl"}, ["{bad}/empty.jsonl", "is empty"]),
    ({"dataset": "{bad}/column.jsonl"}, ["{bad}/column.jsonl", "no column 'prompt'", "query, answer"]),
    ({"dataset": "{bad}/list.py:rows"}, ["{bad}/list.py:rows", "must be a datasets.Dataset"]),
    ({"dataset": "{bad}/null.jsonl"}, ["{bad}/null.jsonl", "'completion' must hold text", "row 1"]),
    ({"dataset": "{bad}/numbers.jsonl"}, ["{bad}/numbers.jsonl", "'prompt' must hold text", "row 0"]),
    ({"dataset": "{bad}/blank.jsonl"}, ["{bad}/blank.jsonl", "row 1 has an empty prompt"]),
    ({"dataset": "tasks/mini_tldr.py:prompts", "train_split": "dev"}, ["split dev", "cannot be loaded"]),
    ({"max_prompt_length": 0}, ["--max-prompt-length 0", "1 or more"]),
    ({"dataset": "{bad}/half.jsonl"}, ["{bad}/half.jsonl, line 3", "is not JSON"]),
    ({"dataset": "{bad}/halves"}, ["{bad}/halves/train.jsonl, line 2", "is not JSON"]),
    ({"dataset": "{bad}/chat.jsonl"}, ["{bad}/chat.jsonl", "has no chat template", "plain text"]),
    ({"dataset": "{bad}/no_roles.jsonl"}, ["{bad}/no_roles.jsonl", "messages with role and content", "row 0"]),
    ({"dataset": "{bad}/pairs.jsonl"}, ["{bad}/pairs.jsonl", "row 0 has an empty prompt"]),
    ({"chat": True}, ["has no chat template", "plain text"]),
    ({"system_prompt": "Be brief."}, ["has no chat template", "plain text"]),
    ({"prompt_column": "text"}, ["--prompt-column text", "it has prompt, completion, chosen, rejected"]),
    ({"max_prompt_length": 0}, ["--max-prompt-length 0", "1 or more"]),
    ({"max_new_tokens": 500}, ["--max-new-tokens 500", "more than the 128 positions"]),
    ({"reward_weights": (1.0, 2.0)}, ["--reward-weights", "2 numbers for 1 rewards"]),
    ({"model": "{bad}/pickle"}, ["model {bad}/pickle", "pytorch_model.bin is a pickle", "refused", "save_pretrained"]),
    ({"model": "{bad}/cut"}, ["model {bad}/cut", "cannot be loaded"]),
    ({"model": "{bad}/remote"}, ["{bad}/remote", "needs program code", "never run"]),
    ({"model": "{bad}/small"}, ["model {bad}/small", "embeddings for 7 tokens", "tokenizer has 9"]),
    ({"reward": ("{bad}/small",)}, ["model {bad}/small"]),
    ({"model": "some-owner/some-model"}, ["some-owner/some-model", "offline", "hf download", "--local-dir"]),
    ({"dataset": "some-owner/some-data"}, ["some-owner/some-data", "offline", "--repo-type dataset", "--local-dir"]),
    ({"shard": True}, ["--shard", "torchrun --nproc-per-node 2"]),
    ({"output": "{bad}/used"}, ["--output {bad}/used", "already holds files"]),
    ({"output": "{bad}/rewards.py/run"}, ["--output {bad}/rewards.py/run", "is a file"]),
    ({"output": "{bad}/rewards.py"}, ["--output {bad}/rewards.py", "already exists"]),
]


def check(capsys, run, expected, bad):
    before = {path: path.read_bytes() for path in bad.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        run()
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 500, captured.err
    for part in expected:
        assert part.format(bad=bad) in lines[0]
    assert {path: path.read_bytes() for path in bad.rglob("*") if path.is_file()} == before


def fill(flags, bad):
    def put(value):
        if isinstance(value, tuple):
            return tuple(map(put, value))
        return value.format(bad=bad) if isinstance(value, str) else value

    return {name: put(value) for name, value in flags.items()}


@pytest.mark.parametrize("flags, expected", RLOO, ids=lambda value: str(value)[:50])
def test_rloo(flags, expected, world, bad, tmp_path, capsys):
    output = {"output": str(tmp_path / "run")} if "output" not in flags else {}
    args = rloo.Args(**world.flags | output | fill(flags, bad))
    check(capsys, lambda: rloo.main(args), expected, bad)
    assert not (tmp_path / "run").exists()


OTHERS = [
    (ppo, dict(epochs=0), ["--epochs 0", "1 or more"]),
    (ppo, dict(minibatches=0), ["--minibatches 0", "1 or more"]),
    (ppo, dict(clip=0.0), ["--clip 0.0", "above 0"]),
    (ppo, dict(value_clip=-1.0), ["--value-clip -1.0", "above 0"]),
    (ppo, dict(lam=1.5), ["--lam 1.5", "from 0 to 1"]),
    (ppo, dict(gamma=-0.1), ["--gamma -0.1", "from 0 to 1"]),
    (ppo, dict(critic_lr=0.0), ["--critic-lr 0.0", "above 0"]),
    (ppo, dict(critic="{bad}/other"), ["critic {bad}/other", "another vocabulary"]),
    (ppo, dict(critic="{bad}/no_critic"), ["{bad}/no_critic", "no such file or folder"]),
    (ppo, dict(critic="{bad}/two_labels"), ["{bad}/two_labels"]),
    (reinforce, dict(decay=1.0), ["--decay 1.0", "below 1"]),
    (reinforce, dict(window=-1), ["--window -1", "0 or more"]),
    (grpo, dict(k=1), ["--k 1", "use 2 or more"]),
    (raft, dict(k=1), ["--k 1", "use 2 or more"]),
    (reinforce_pp, dict(k=1, baseline="group"), ["--k 1", "--baseline group needs 2 or more"]),
    (reinforce_pp, dict(clip_scores=0.0), ["--clip-scores 0.0", "above 0"]),
    (dpo, dict(dataset="{bad}/column.jsonl"), ["no column 'prompt'", "query, answer"]),
    (dpo, dict(eval_dataset="{bad}/no_data.jsonl"), ["{bad}/no_data.jsonl", "no such file"]),
    (dpo, dict(max_length=1), ["more than 1 tokens"]),
    (sft, dict(model="{bad}/no_model"), ["{bad}/no_model", "no such file or folder"]),
    (sft, dict(dataset="{bad}/column.jsonl"), ["no column 'prompt'", "query, answer"]),
    (sft, dict(batch_size=0), ["--batch-size 0", "1 or more"]),
    (sft, dict(dataset="{bad}/blank.jsonl"), ["no column 'completion'"]),
    (sft, dict(dataset="{bad}/blank2.jsonl"), ["row 1 has an empty prompt"]),
    (sft, dict(max_length=1), ["more than 1 tokens"]),
    (sft, dict(output="{bad}/used"), ["--output {bad}/used", "already holds files"]),
    (reward_model, dict(dataset="{bad}/column.jsonl"), ["no column 'prompt'", "query, answer"]),
    (reward_model, dict(gold="{bad}/rewards.py:absent"), ["{bad}/rewards.py", "no function absent"]),
    (reward_model, dict(max_length=1), ["more than 1 tokens"]),
    (reward_model, dict(output="{bad}/used"), ["--output {bad}/used", "already holds files"]),
    (evaluate, dict(policies=("{bad}/no_model",)), ["{bad}/no_model", "no such file or folder"]),
    (evaluate, dict(judge="gold"), ["--judge gold", "--gold"]),
    (evaluate, dict(judge="best"), ["--judge best", "choose gold, reward"]),
    (evaluate, dict(k=0), ["--k 0", "1 or more"]),
    (evaluate, dict(output="{bad}/used/args.json"), ["--output {bad}/used/args.json", "already exists"]),
    (plot, dict(runs=("{bad}/nothing",)), ["{bad}/nothing", "is not a run folder"]),
    (plot, dict(runs=("{bad}/used",)), ["{bad}/used", "no scalars"]),
    (plot, dict(runs=("{bad}/used",), output="{bad}/used/args.json"), ["--output {bad}/used/args.json", ".png"]),
    (plot, dict(runs=("{bad}/used",), x=("days",)), ["--x days", "updates, samples, seconds, kl"]),
]


@pytest.mark.parametrize(
    "script, flags, expected", OTHERS, ids=lambda value: getattr(value, "__name__", str(value)[:50])
)
def test_other_scripts(script, flags, expected, world, bad, tmp_path, capsys):
    flags = {
        name: tuple(part.format(bad=bad) for part in value) if isinstance(value, tuple) else value
        for name, value in fill(flags, bad).items()
    }
    base = {
        sft: dict(model=world.policy, dataset=world.data, device="cpu", output=str(tmp_path / "run")),
        reward_model: dict(
            model=world.policy, dataset=world.data, gold="none", device="cpu", output=str(tmp_path / "run")
        ),
        evaluate: dict(
            policies=(world.policy,),
            reference=world.policy,
            reward=(world.reward,),
            gold="none",
            judge="reward",
            dataset=world.data,
            device="cpu",
            output=str(tmp_path / "run"),
        ),
        plot: dict(runs=(), output=str(tmp_path / "run.png")),
        dpo: dict(
            model=world.policy,
            reward=(world.reward,),
            dataset=world.data,
            eval_dataset=world.data,
            device="cpu",
            output=str(tmp_path / "run"),
        ),
    }.get(script, world.flags | dict(output=str(tmp_path / "run")))
    check(capsys, lambda: script.main(script.Args(**base | flags)), expected, bad)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", [["--k", "1"], ["--dataset", "no_such.jsonl"]])
def test_from_the_command_line(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "rloo.py", "--device", "cpu", *command, "--output", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: {command[0] if command[0] == '--k' else 'dataset'} {command[1]}")
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_tokenizer_without_eos(world, tmp_path, capsys):
    tokenizer = make_tokenizer("a b c".split(), eos=None)
    folder = save_policy(tmp_path / "policy", tokenizer)
    with pytest.raises(SystemExit) as stopped:
        rloo.main(rloo.Args(**world.flags | {"model": folder, "output": str(tmp_path / "run")}))
    assert stopped.value.code == 2
    assert "has no EOS token" in capsys.readouterr().err
