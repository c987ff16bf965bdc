"""Mistakes of a user: one clear line and exit code 2, before any training, and nothing changed."""

import json

import pytest
import torch
from safetensors.torch import load_file
from helpers.tiny import Child, call_script, make_tokenizer, save_classifier, save_policy

import cispo
import dapo
import dpo
import evaluate
import grpo
import gspo
import maxrl
import plot
import ppo
import raft
import reinforce
import reinforce_pp
import reinforce_pp_baseline
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
def silent(prompts, completions, **_):
    return [1.0] + [None] * (len(completions) - 1)
def one(prompts, completions, **_):
    return [1.0] * len(completions)
"""


@pytest.fixture(scope="module")
def bad(world, tmp_path_factory):
    """A folder with things that are wrong."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "syntax.py").write_text("def f(:\n")
    (folder / "empty.jsonl").write_text("")
    for name in ("rows.xlsx", "a::b.jsonl"):
        (folder / name).write_text(json.dumps({"prompt": "a"}))
    (folder / "column.jsonl").write_text(json.dumps({"query": "a", "answer": "b"}))
    (folder / "numbers.jsonl").write_text(json.dumps({"prompt": 1}) + "\n"
                                          + json.dumps({"prompt": 2}))
    (folder / "blank.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n"
                                        + json.dumps({"prompt": ""}))
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "b"}]
    (folder / "blank2.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "used").mkdir()
    (folder / "used" / "args.json").write_text("{}")
    (folder / "nothing").mkdir()
    save_policy(folder / "headless", world.tokenizer)
    save_policy(folder / "other", make_tokenizer("x y z".split()))
    (folder / "spaces.jsonl").write_text(json.dumps({"prompt": "a"}) + "\n"
                                         + json.dumps({"prompt": "   "}))
    (folder / "strings.jsonl").write_text(json.dumps({"prompt": ["a", "b"]}))
    (folder / "long.jsonl").write_text(json.dumps({"prompt": "a " * 200, "completion": "b c"}))
    (folder / "list.py").write_text("def rows(split):\n    return [{'prompt': 'a'}]\n")
    (folder / "null.jsonl").write_text('{"prompt": "a", "completion": "b"}\n'
                                       '{"prompt": "a", "completion": null}\n')
    save_classifier(folder / "two_labels", world.policy, world.tokenizer, labels=2)
    (folder / "half.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c", "compl')
    (folder / "halves").mkdir()
    (folder / "halves" / "train.jsonl").write_text('{"prompt": "a"}\nprompt: b\n')
    (folder / "halves" / "test.jsonl").write_text('{"prompt": "a"}\n')
    chat = [{"prompt": [{"role": "user", "content": "a"}]},
            {"prompt": [{"role": "user", "content": "b"}]}]
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, chat)))
    (folder / "no_roles.jsonl").write_text(json.dumps({"prompt": [{"text": "a"}]}))
    (folder / "pairs.jsonl").write_text(json.dumps({"chosen": "a b", "rejected": "c d"}))
    save_policy(folder / "pickle", world.tokenizer)
    torch.save(load_file(folder / "pickle" / "model.safetensors"),
               folder / "pickle" / "pytorch_model.bin")
    (folder / "pickle" / "model.safetensors").unlink()
    save_policy(folder / "cut", world.tokenizer)
    cut = (folder / "cut" / "model.safetensors").read_bytes()[:-100]
    (folder / "cut" / "model.safetensors").write_bytes(cut)
    for name in ("remote", "small"):
        save_policy(folder / name, world.tokenizer)
    config = json.loads((folder / "remote" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "mine.Model",
                                                  "AutoConfig": "mine.Config"}}
    (folder / "remote" / "config.json").write_text(json.dumps(config))
    (folder / "remote" / "mine.py").write_text("raise SystemExit('this code must not run')")
    make_tokenizer("a b c d e f g h".split(), pad="<eos>").save_pretrained(folder / "small")
    return folder


FILES = (".json, .jsonl, .ndjson, .csv, .tsv, .parquet, .txt, or one of these compressed as .gz, "
         ".bz2, .xz, .zst")


RLOO = [  # flags, and the line that a person sees; … stands for another library's words
    ({"k": 1}, "--k 1: the baseline is the mean of the other k - 1 responses; use at least 2"),
    ({"k": 0}, "--k 0: the baseline is the mean of the other k - 1 responses; use at least 2"),
    ({"prompts_per_step": 0}, "--prompts-per-step 0: must be 1 or more"),
    ({"num_updates": 0}, "--num-updates 0: must be 1 or more"),
    ({"max_new_tokens": 0}, "--max-new-tokens 0: must be 1 or more"),
    ({"microbatch_tokens": -1}, "--microbatch-tokens -1: must be 1 or more"),
    ({"eval_prompts": 0}, "--eval-prompts 0: must be 1 or more"),
    ({"temperature": 0.0}, "--temperature 0.0: must be positive and finite"),
    ({"temperature": -1.0}, "--temperature -1.0: must be positive and finite"),
    ({"temperature": float("nan")}, "--temperature nan: must be positive and finite"),
    ({"lr": 0.0}, "--lr 0.0: must be positive and finite"),
    ({"lr": float("inf")}, "--lr inf: must be positive and finite"),
    ({"max_grad_norm": 0.0}, "--max-grad-norm 0.0: must be positive and finite"),
    ({"beta": -0.1}, "--beta -0.1: must be 0 or more, and finite"),
    ({"missing_eos_penalty": -1.0}, "--missing-eos-penalty -1.0: must be 0 or more, and finite"),
    ({"eval_every": -1}, "--eval-every -1: must be 0 or more, and finite"),
    ({"device": "cuda:99"}, "--device cuda:99: not available here; use auto or cpu"),
    ({"device": "cpu:x"}, "--device cpu:x: not available here; use auto or cpu"),
    ({"device": "gpu"}, "--device gpu: not available here; use auto or cpu"),
    ({"model": "{bad}/no_model"},
     "model {bad}/no_model: no such file or folder; give a path or a hub name"),
    ({"model": "{bad}/nothing"}, "model {bad}/nothing: not a model folder (it has no config.json)"),
    ({"reference": "{bad}/no_model"},
     "tokenizer {bad}/no_model: no such file or folder; give a path or a hub name"),
    ({"reward": ("{bad}/no_reward",)},
     "tokenizer {bad}/no_reward: no such file or folder; give a path or a hub name"),
    ({"reward": ("{bad}/no_file.py:f",)}, "{bad}/no_file.py: no such file"),
    ({"reward": ("{bad}/rewards.py:absent",)},
     "{bad}/rewards.py:absent: {bad}/rewards.py has no function absent"),
    ({"reward": ("{bad}/syntax.py:f",)}, "{bad}/syntax.py: cannot be imported: SyntaxError…"),
    ({"reward": ("{bad}/rewards.py:fails",)},
     "reward {bad}/rewards.py:fails: raised KeyError: 'no such answer'"),
    ({"reward": ("{bad}/rewards.py:short",)},
     "reward {bad}/rewards.py:short: returned 1 values for 2 completions"),
    ({"reward": ("{bad}/rewards.py:nan",)},
     "reward {bad}/rewards.py:nan: returned [nan]; every value must be a finite number, or "
     "None"),
    ({"reward": ("{bad}/rewards.py:text",)},
     "reward {bad}/rewards.py:text: returned ['good', 'good']; it must return a list of numbers"),
    ({"reward": ("{bad}/rewards.py:none",)},
     "reward {bad}/rewards.py:none: returned None; it must return a list of numbers"),
    ({"gold": "{bad}/rewards.py:nan"},
     "reward {bad}/rewards.py:nan: returned [nan]; every value must be a finite number, or "
     "None"),
    ({"reward": ("{bad}/headless",)},
     "model {bad}/headless: the weights score.weight are missing, so it is another kind of model"),
    ({"reference": "{bad}/other"},
     "reference {bad}/other: its vocabulary is not the policy's, so there is no KL between them"),
    ({"reward": ("{bad}/two_labels",)},
     "model {bad}/two_labels: has 2 labels; a reward model has 1"),
    ({"dataset": "{bad}/no_data.jsonl"},
     "dataset {bad}/no_data.jsonl: no such file or folder; give a folder, a hub name, or a file: "
     + FILES),
    ({"dataset": "no_data.xlsx"},
     "dataset no_data.xlsx: no such file or folder; give a folder, a hub name, or a file: "
     + FILES),
    ({"dataset": "{bad}/rows.xlsx"},
     "dataset {bad}/rows.xlsx: files of this kind cannot be read; give a folder, a hub name, or a "
     "file: " + FILES),
    ({"dataset": "{bad}/a::b.jsonl"},
     "dataset {bad}/a::b.jsonl: `datasets` cannot read a path with ::; rename it"),
    ({"reward": ("{bad}/rewards.py:silent",)},
     "reward {bad}/rewards.py:silent: returned None for a response, and no other reward has a "
     "number for it; return a number, or add a reward that does"),
    ({"dataset": "{bad}/nothing"},
     "dataset {bad}/nothing, split train: cannot be loaded from a folder or the hub: …"),
    ({"dataset": "{bad}/empty.jsonl"}, "dataset {bad}/empty.jsonl: is empty"),
    ({"dataset": "{bad}/column.jsonl"},
     "dataset {bad}/column.jsonl: has no column 'prompt'; it has query, answer; name one with "
     "--prompt-column"),
    ({"dataset": "{bad}/list.py:rows"},
     "dataset {bad}/list.py:rows: the function must return a datasets.Dataset, not <class 'list'>"),
    ({"dataset": "{bad}/null.jsonl"},
     "dataset {bad}/null.jsonl, split train: column 'completion' must hold text; row 1 does not"),
    ({"dataset": "{bad}/numbers.jsonl"},
     "dataset {bad}/numbers.jsonl, split train: column 'prompt' must hold text, or lists of "
     "messages with role and content; row 0 does not"),
    ({"dataset": "tasks/mini_tldr.py:prompts", "train_split": "dev"},
     "dataset tasks/mini_tldr.py:prompts, split dev: cannot be loaded from a folder or the hub: …"),
    ({"max_prompt_length": 0}, "--max-prompt-length 0: must be 1 or more"),
    ({"dataset": "{bad}/half.jsonl"}, "dataset {bad}/half.jsonl, split train: not valid JSON (…"),
    ({"dataset": "{bad}/halves"}, "dataset {bad}/halves, split train: not valid JSON (…"),
    ({"dataset": "{bad}/chat.jsonl"},
     "dataset {bad}/chat.jsonl, split train: the prompts are chat messages, but the tokenizer has "
     "no chat template; use an instruction-tuned model, or plain-text prompts"),
    ({"dataset": "{bad}/no_roles.jsonl"},
     "dataset {bad}/no_roles.jsonl, split train: column 'prompt' must hold text, or lists of "
     "messages with role and content; row 0 does not"),
    ({"dataset": "{bad}/pairs.jsonl"},
     "dataset {bad}/pairs.jsonl, split train: every row has an empty prompt"),
    ({"chat": True},
     "dataset {world}/data.jsonl, split train: the prompts are chat messages, but the tokenizer "
     "has no chat template; use an instruction-tuned model, or plain-text prompts"),
    ({"system_prompt": "Be brief."},
     "dataset {world}/data.jsonl, split train: the prompts are chat messages, but the tokenizer "
     "has no chat template; use an instruction-tuned model, or plain-text prompts"),
    ({"prompt_column": "text"},
     "--prompt-column text: dataset {world}/data.jsonl has no such column; it has prompt, "
     "completion, chosen, rejected"),
    ({"max_new_tokens": 500},
     "rows of up to 505 tokens, including the response, do not fit the 128 positions of "
     "model {world}/policy; lower --max-prompt-length, --max-length or --max-new-tokens"),
    ({"seed": -1}, "--seed -1: must be between 0 and 4294967294"),
    ({"rollout_batch_size": 0}, "--rollout-batch-size 0: must be 1 or more"),
    ({"reward_noise": -0.5}, "--reward-noise -0.5: must be 0 or more, and finite"),
    ({"reward": ("{bad}/rewards.py:one", "{bad}/rewards.py:one")},
     "--reward: {bad}/rewards.py:one is given twice; use --reward-weights instead"),
    ({"dataset": "{bad}/strings.jsonl", "system_prompt": "Be brief."},
     "dataset {bad}/strings.jsonl, split train: column 'prompt' must hold text, or lists of "
     "messages with role and content; row 0 does not"),
    ({"reward_weights": (1.0, 2.0)},
     "--reward-weights: 2 weights for 1 rewards; give one for each"),
    ({"model": "{bad}/pickle"},
     "model {bad}/pickle: pytorch_model.bin is a pickle, which can run arbitrary code when loaded, "
     "so it is refused; if you trust it, load it in transformers and save it with save_pretrained, "
     "as safetensors"),
    ({"model": "{bad}/cut"}, "model {bad}/cut: cannot be loaded from a folder or the hub: …"),
    ({"model": "{bad}/remote"},
     "model {bad}/remote: needs code from its repository, which is never run; use a model that is "
     "built into transformers"),
    ({"model": "{bad}/small"},
     "model {bad}/small: has embeddings for 7 tokens, but its tokenizer has 9; they do not "
     "belong together"),
    ({"reward": ("{bad}/small",)},
     "model {bad}/small: the weights score.weight are missing, so it is another kind of model"),
    ({"model": "some-owner/some-model"},
     "model some-owner/some-model: not a local folder, and the hub cannot be reached …"),
    ({"dataset": "some-owner/some-data"},
     "dataset some-owner/some-data, split train: not a local folder, and the hub cannot be "
     "reached …"),
    ({"shard": True},
     "--shard: there is only one process; launch with torchrun --nproc-per-node 2"),
    ({"output": "{bad}/used"},
     "--output {bad}/used: is not empty; choose another folder, or delete that one"),
    ({"output": "{bad}/rewards.py/run"},
     "--output {bad}/rewards.py/run: cannot be created, since {bad}/rewards.py is a file; choose "
     "another folder"),
    ({"output": "{bad}/rewards.py"},
     "--output {bad}/rewards.py: already exists; choose another name, or delete that file"),
]


def check(capsys, run, expected, bad, world):
    before = {path: path.read_bytes() for path in bad.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        run()
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 500, captured.err
    beginning, cut, _ = expected.format(bad=bad, world=world.folder).partition("…")
    assert lines[0].startswith(f"error: {beginning}") if cut else lines[0] == f"error: {beginning}"
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
    check(capsys, lambda: rloo.main(args), expected, bad, world)
    assert not (tmp_path / "run").exists()


OTHERS = [
    (ppo, {"epochs": 0}, "--epochs 0: must be 1 or more"),
    (ppo, {"minibatches": 0}, "--minibatches 0: must be 1 or more"),
    (ppo, {"k": 1, "prompts_per_step": 3, "minibatches": 4},
     "--minibatches 4: a rollout has only 3 responses to divide"),
    (ppo, {"clip": 0.0}, '--clip 0.0: must be positive ("inf" disables it)'),
    (ppo, {"value_clip": -1.0}, '--value-clip -1.0: must be positive ("inf" disables it)'),
    (ppo, {"lam": 1.5}, "--lam 1.5: must be between 0 and 1"),
    (ppo, {"gamma": -0.1}, "--gamma -0.1: must be between 0 and 1"),
    (ppo, {"critic_lr": 0.0}, "--critic-lr 0.0: must be positive and finite"),
    (ppo, {"critic": "{bad}/other"},
     "critic {bad}/other: its vocabulary is not the policy's; choose another --critic"),
    (ppo, {"critic": "{bad}/no_critic"},
     "tokenizer {bad}/no_critic: no such file or folder; give a path or a hub name"),
    (ppo, {"critic": "{bad}/two_labels"},
     "model {bad}/two_labels: its weights have the wrong shapes (a reward model or critic needs a "
     "head with one label)"),
    (reinforce, {"decay": 1.0}, "--decay 1.0: must be at least 0 and below 1"),
    (reinforce, {"window": -1}, "--window -1: must be 0 or more, and finite"),
    (grpo, {"k": 1}, "--k 1: the baseline is the mean of the k responses; use at least 2"),
    *[(script, {"k": 1}, "--k 1: the baseline is the mean of the k responses; use at least 2")
      for script in (gspo, cispo, dapo)],
    *[(script, {"k": 2, "prompts_per_step": 1, "minibatches": 3},
       "--minibatches 3: a rollout has only 2 responses to divide")
      for script in (gspo, cispo, dapo)],
    (gspo, {"clip_high": 0.0}, '--clip-high 0.0: must be positive ("inf" disables it)'),
    (cispo, {"max_ratio": 0.0}, '--max-ratio 0.0: must be positive ("inf" disables it)'),
    (dapo, {"max_rounds": 0}, "--max-rounds 0: must be 1 or more"),
    (dapo, {"overlong_buffer": 0}, "--overlong-buffer 0: must be 1 or more"),
    (maxrl, {"k": 1},
     "--k 1: the baseline is the mean of the other k - 1 responses; use at least 2"),
    (maxrl, {"missing_eos_penalty": 0.0},
     "--reward {world}/reward: a score is …"),
    (raft, {"k": 1}, "--k 1: the best of the k responses is kept; use at least 2"),
    (reinforce_pp_baseline, {"k": 1},
     "--k 1: the baseline is the mean of the k responses; use at least 2"),
    (reinforce_pp, {"clip_scores": 0.0}, '--clip-scores 0.0: must be positive ("inf" disables it)'),
    (dpo, {"dataset": "{bad}/column.jsonl"},
     "dataset {bad}/column.jsonl: has no column 'prompt'; it has query, answer; name one with "
     "--prompt-column"),
    (dpo, {"eval_dataset": "{bad}/no_data.jsonl"},
     "dataset {bad}/no_data.jsonl: no such file or folder; give a folder, a hub name, or a file: "
     + FILES),
    (dpo, {"max_length": 1},
     "dataset {world}/data.jsonl, split train: every row has more than 1 tokens; raise "
     "--max-prompt-length or --max-length"),
    (sft, {"model": "{bad}/no_model"},
     "model {bad}/no_model: no such file or folder; give a path or a hub name"),
    (sft, {"dataset": "{bad}/column.jsonl"},
     "dataset {bad}/column.jsonl: has no column 'prompt'; it has query, answer; name one with "
     "--prompt-column"),
    (sft, {"batch_size": 0}, "--batch-size 0: must be 1 or more"),
    (sft, {"dataset": "{bad}/blank.jsonl"},
     "dataset {bad}/blank.jsonl: has no column 'completion'; it has prompt; name one with "
     "--completion-column"),
    (sft, {"dataset": "{bad}/long.jsonl"},
     "rows of up to 203 tokens, including the response, do not fit the 128 positions of "
     "model {world}/policy; lower --max-prompt-length, --max-length or --max-new-tokens"),
    (sft, {"max_length": 1},
     "dataset {world}/data.jsonl, split train: every row has more than 1 tokens; raise "
     "--max-prompt-length or --max-length"),
    (sft, {"output": "{bad}/used"},
     "--output {bad}/used: is not empty; choose another folder, or delete that one"),
    (reward_model, {"dataset": "{bad}/column.jsonl"},
     "dataset {bad}/column.jsonl: has no column 'prompt'; it has query, answer; name one with "
     "--prompt-column"),
    (reward_model, {"gold": "{bad}/rewards.py:absent"},
     "{bad}/rewards.py:absent: {bad}/rewards.py has no function absent"),
    (reward_model, {"max_length": 1},
     "dataset {world}/data.jsonl, split train: every row has more than 1 tokens; raise "
     "--max-prompt-length or --max-length"),
    (reward_model, {"output": "{bad}/used"},
     "--output {bad}/used: is not empty; choose another folder, or delete that one"),
    (evaluate, {"policies": ("{bad}/no_model",)},
     "tokenizer {bad}/no_model: no such file or folder; give a path or a hub name"),
    (evaluate, {"judge": "gold"},
     "--judge gold: there is no gold reward; give one with --gold, or use --judge reward"),
    (evaluate, {"judge": "best"}, "--judge best: choose gold, reward, or path/to/file.py:function"),
    (evaluate, {"k": 0}, "--k 0: must be 1 or more"),
    (evaluate, {"output": "{bad}/used/args.json"},
     "--output {bad}/used/args.json: already exists; choose another name, or delete that file"),
    (plot, {"runs": ("{bad}/nothing",)},
     "{bad}/nothing: is not a run folder (it has no args.json)"),
    (plot, {"runs": ("{bad}/used",)}, "{bad}/used: its TensorBoard log holds no scalars"),
    (plot, {"runs": ("{bad}/used",), "output": "{bad}/used/args.json"},
     "--output {bad}/used/args.json: must be a .png file"),
    (plot, {"runs": ("{bad}/used",), "x": "days"},
     "--x days: unknown; choose from updates, samples, seconds, kl"),
]


@pytest.mark.parametrize("script, flags, expected", OTHERS,
                         ids=lambda value: getattr(value, "__name__", str(value)[:50]))
def test_other_scripts(script, flags, expected, world, bad, tmp_path, capsys):
    flags = {name: (tuple(part.format(bad=bad) for part in value)
                    if isinstance(value, tuple) else value)
             for name, value in fill(flags, bad).items()}
    base = {
        sft: dict(model=world.policy, dataset=world.data, device="cpu",
                  output=str(tmp_path / "run")),
        reward_model: dict(model=world.policy, dataset=world.data, gold="none", device="cpu",
                           output=str(tmp_path / "run")),
        evaluate: dict(policies=(world.policy,), reference=world.policy, reward=(world.reward,),
                       gold="none", judge="reward", dataset=world.data, device="cpu",
                       output=str(tmp_path / "run")),
        plot: dict(runs=(), output=str(tmp_path / "run.png")),
        dpo: dict(model=world.policy, reward=(world.reward,), dataset=world.data,
                  eval_dataset=world.data, device="cpu", output=str(tmp_path / "run")),
    }.get(script, world.flags | dict(output=str(tmp_path / "run")))
    check(capsys, lambda: script.main(script.Args(**base | flags)), expected, bad, world)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_from_the_command_line(context, tmp_path):
    """A mistake found late, when the models have been loaded: still nothing else is printed."""
    flags = {"device": "cpu", "dataset": "no_such.jsonl", "output": tmp_path / "run"}
    process = Child(context, tmp_path, call_script, "rloo", flags)
    assert process.wait(timeout=60) == 2 and process.stdout == ""
    assert process.stderr.startswith("error: dataset no_such.jsonl")
    assert len(process.stderr.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_tokenizer_without_eos(world, tmp_path, capsys):
    tokenizer = make_tokenizer("a b c".split(), eos=None)
    folder = save_policy(tmp_path / "policy", tokenizer)
    with pytest.raises(SystemExit) as stopped:
        rloo.main(rloo.Args(**world.flags | {"model": folder, "output": str(tmp_path / "run")}))
    assert stopped.value.code == 2
    assert "has no EOS token" in capsys.readouterr().err
