"""tools/speed.py: responses end when they should, counts are right, every phase is clocked."""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, LlamaConfig

from plumbing import fast
from tools import speed

ROOT = Path(__file__).parent.parent
TINY = dict(vocab_size=10, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=16)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Args of a run that takes a moment, and the folder with what it needs."""
    monkeypatch.setitem(speed.SIZES, "S", TINY | {"vocab_size": 300})
    args = speed.Args(prompts=3, k=2, prompt_tokens=(4, 7), new_tokens=5, updates=2, rounds=2)
    (tmp_path / "args.json").write_text(json.dumps(asdict(args)))
    speed.make(args, tmp_path)
    return args, tmp_path


def test_models_and_workloads_are_those_of_the_page():
    page = (ROOT / "docs" / "speed.md").read_text()
    rows = re.findall(r"^\| ([SM])\b.*?\| (\d+) to (\d+), (up to )?(\d+) \|", page, re.MULTILINE)
    names = ("s-full", "s-ragged", "tldr-s", "tldr-m", "m-full")
    assert [speed.WORKLOADS[name] for name in names] == [
        {"size": size, "prompt_tokens": (int(low), int(high)), "ragged": bool(ragged),
         "new_tokens": int(new)} for size, low, high, ragged, new in rows]
    assert speed.WORKLOADS["m-ragged"] == speed.WORKLOADS["s-ragged"] | {"size": "M"}
    assert vars(speed.Args()).items() >= speed.WORKLOADS["s-full"].items()
    for size, parameters in (("S", 922_752), ("M", 33_694_208)):
        config = LlamaConfig(**speed.SIZES[size], tie_word_embeddings=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
        assert f"{size} ({parameters / 1e6:.1f} million parameters)" in page


def test_operations_are_those_counted_by_hand():
    """Weights of the layers: 2 x (4 x 8 x 8 + 3 x 8 x 16) = 1280. Their width: 2 x 8 = 16."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    # 3 + 2 tokens, of which the last one is not run; 2 logits.
    logprobs = 4 * 2 * 1280 + (1 + 2 + 3 + 4) * 4 * 16 + 2 * 2 * 8 * 10
    scores = 5 * 2 * 1280 + (1 + 2 + 3 + 4 + 5) * 4 * 16 + 2 * 8
    assert (logprobs, scores) == (11200, 13776)
    needed = speed.operations(model, [3], [2])
    assert needed == {"rollout": 11200, "score": 13776, "reference": 11200, "forward": 11200,
                      "backward": 22400, "optimizer": 0}
    more = speed.operations(model, [3, 3, 3], [2, 2, 2])
    assert more == {phase: 3 * number for phase, number in needed.items()}


def test_operations_of_a_model_without_head_dim():
    """Weights: 2 x (8 x 24 + 8 x 8 + 2 x 8 x 16) = 1024. Width, as above: 16."""
    model = AutoModelForCausalLM.from_config(GPTNeoXConfig(**TINY))
    assert speed.operations(model, [3], [2])["forward"] == (
        4 * 2 * 1024 + 10 * 4 * 16 + 2 * 2 * 8 * 10)


def test_operations_are_those_that_torch_counts():
    """Eager attention also multiplies for the tokens to come: n (n - 1) / 2 more pairs."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY, attn_implementation="eager"))
    needed = speed.operations(model, [6], [4])
    with FlopCounterMode(display=False) as forward:
        logits = model(torch.ones((1, 9), dtype=torch.long), logits_to_keep=4).logits
    with FlopCounterMode(display=False) as backward:
        logits.sum().backward()
    to_come = 36 * 4 * 16
    assert forward.get_total_flops() == needed["forward"] + to_come
    assert backward.get_total_flops() == needed["backward"] + 2 * to_come


@pytest.mark.parametrize("ragged", [False, True])
def test_eos_has_the_same_probability_at_every_token(ragged, tmp_path):
    speed.make(speed.Args(ragged=ragged, prompts=2), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy").eval()
    ids = torch.randint(1, model.config.vocab_size, (2, 40))
    with torch.no_grad():
        probabilities = (model(ids).logits / speed.TEMPERATURE).softmax(2)[:, :, 0]
    if ragged:
        torch.testing.assert_close(probabilities, torch.full((2, 40), 1 / 32), rtol=0.02, atol=0)
    else:
        assert probabilities.max() < 1e-30


def test_every_character_is_one_token_also_where_texts_are_joined(small):
    args, folder = small
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    prompts = speed.datasets.load_from_disk(folder / "prompts")["prompt"][:]
    assert len(prompts) == 3 * (speed.WARMUP + 2)
    assert {len(prompt) for prompt in prompts} <= {4, 5, 6, 7}
    ids = tokenizer(prompts[0] + prompts[1])["input_ids"]
    assert ids == tokenizer(prompts[0])["input_ids"] + tokenizer(prompts[1])["input_ids"]
    assert tokenizer.decode(ids) == prompts[0] + prompts[1]
    assert 0 < min(ids) and max(ids) < 300


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loop_runs_through_every_phase(small, dtype, monkeypatch):
    args, folder = small
    monkeypatch.setattr(speed, "matmul_speed", {dtype: 1e9}.get)
    optimizers = []

    def adam(parameters, lr, adam=torch.optim.Adam):
        optimizers.append(adam(parameters, lr))
        return optimizers[0]

    monkeypatch.setattr(torch.optim, "Adam", adam)
    result = speed.measure_ours(speed.replace(args, dtype=dtype), folder)
    assert result["limit"] == 1e9 and optimizers[0].defaults["lr"] == 1e-6
    steps = {state["step"].item() for state in optimizers[0].state.values()}
    assert steps == {4}  # with the warm-up; each with gradients
    assert len(result["updates"]) == 2
    for update in result["updates"]:
        assert list(update["seconds"]) == speed.PHASES
        assert min(update["seconds"].values()) > 0
        assert update["tokens"] == 3 * 2 * 5
        assert update["operations"]["backward"] == 2 * update["operations"]["forward"] > 0


def test_no_prompt_is_too_long(small, monkeypatch):
    monkeypatch.setattr(speed, "matmul_speed", lambda dtype: 1e9)
    args = speed.Args(prompts=1, k=2, prompt_tokens=(600, 600), new_tokens=2, updates=1)
    speed.make(args, small[1])
    assert [update["tokens"] for update in speed.measure_ours(args, small[1])["updates"]] == [4]


def test_each_process_measures_what_its_name_says(small, monkeypatch):
    _, folder = small

    def note(name):
        monkeypatch.setattr(speed, name,
                            lambda _, where, *more, **mode: {"called": [name, *more, mode]})

    for name in ("make", "measure_ours", "measure_trl", "measure_without"):
        note(name)
    tuned = {"bf16": False, "gradient_checkpointing": False}
    expected = {"make": ["make", {}], "ours": ["measure_ours", {}],
                "trl default": ["measure_trl", 8, {}], "trl tuned": ["measure_trl", 16, tuned]}
    expected |= {f"without {name}": ["measure_without", name, {}] for name in speed.REMEDIES}
    for what, called in expected.items():
        speed.child(what, str(folder))
        found = json.loads((folder / "result.json").read_text())
        assert found["called"] == called and 10 < found["peak"] < 100_000  # MB


def test_matmul_speed_is_positive():
    assert speed.matmul_speed("float32", size=32) > 0


def test_contenders_are_measured_by_turns_in_fresh_processes(small, monkeypatch):
    """The code that a process is given is run here, with a fake `child`."""
    args, _ = small
    calls, remedy = [], "without room in the cache"

    def process(command, env, capture_output, text):
        assert env["OMP_NUM_THREADS"] == "1" and capture_output and text
        assert command[1] == "-c"
        calls.append([command[0]])
        exec(command[2])
        return SimpleNamespace(returncode=0, stderr="")

    def child(what, folder):
        calls[-1].append(what)
        assert json.loads(Path(folder, "args.json").read_text())["k"] == 2
        found = {"peak": len(calls), "updates": [len(calls)], "limit": -len(calls)}
        Path(folder, "result.json").write_text(json.dumps(found))

    monkeypatch.setattr(speed.subprocess, "run", process)
    monkeypatch.setattr(speed, "child", child)
    results = speed.measure(speed.replace(args, against="trl", trl_python="trl/python",
                                          without=("room in the cache",)))
    turn = [[sys.executable, "ours"], ["trl/python", "trl default"], ["trl/python", "trl tuned"],
            [sys.executable, remedy]]
    assert calls == [[sys.executable, "make"], *turn, *turn]
    assert results["ours"] == {"updates": [2, 6], "peak": 6, "limit": 0}
    assert results["trl tuned"]["updates"] == [4, 8] and results[remedy]["updates"] == [5, 9]


@pytest.mark.parametrize("remedy", speed.REMEDIES)
def test_a_remedy_that_is_taken_back_is_replaced_where_it_is_used(remedy, small, monkeypatch):
    """In the loop too: `ask` tries the cache with room once for each of the three models."""
    args, folder = small
    target, replacement = speed.REMEDIES[remedy]
    spy = Mock(side_effect=replacement)
    monkeypatch.setitem(speed.REMEDIES, remedy, (target, spy))
    monkeypatch.setattr(speed, "matmul_speed", lambda dtype: 1e9)
    found = speed.measure_without(args, folder, remedy)
    assert spy.call_count > (3 if remedy == "room in the cache" else 0)
    assert [update["tokens"] for update in found["updates"]] == [30, 30]


def test_without_everything_nothing_of_fast_runs(small, monkeypatch):
    args, folder = small
    monkeypatch.setattr(speed, "matmul_speed", lambda dtype: 1e9)
    passes = {name: Mock(side_effect=getattr(fast, name))
              for name in ("divide", "sample", "at_responses")}
    for name, used in passes.items():
        monkeypatch.setattr(fast, name, used)
    speed.measure_without(args, folder, "everything")
    assert not any(used.called for used in passes.values())
    speed.measure_ours(args, folder)
    assert all(used.called for used in passes.values())


def test_a_process_that_fails_is_reported_in_one_line(small, monkeypatch, capsys):
    failed = SimpleNamespace(returncode=1, stderr="Traceback\nValueError: no\n")
    monkeypatch.setattr(speed.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SystemExit):
        speed.measure(small[0])
    assert capsys.readouterr().err == "error: make: ValueError: no\n"


def test_trl_makes_one_step_per_rollout_with_the_same_settings(small, monkeypatch):
    args, folder = small

    class Trainer:
        def __init__(self, model, reward, config, callbacks, train_dataset):
            assert model == f"{folder}/policy" and reward == f"{folder}/reward"
            assert len(train_dataset) == 3 * (speed.WARMUP + args.updates)
            self.config, self.callbacks = config, callbacks
            self._metrics = {"train": {"completions/mean_length": []}}

        def train(self):
            config = self.config
            assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 3 * 2
            assert (config.num_generations, config.max_completion_length) == (2, 5)
            assert config.temperature == 0.7
            assert (config.beta, config.learning_rate, config.bf16) == (0.05, 1e-6, False)
            for length in range(config.max_steps):
                self.callbacks[0].on_step_begin()
                self._metrics["train"]["completions/mean_length"].append(length)
                self.callbacks[0].on_step_end()

    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(RLOOConfig=SimpleNamespace,
                                                            RLOOTrainer=Trainer))
    updates = speed.measure_trl(args, folder, 16, bf16=False)["updates"]
    assert [update["tokens"] for update in updates] == [12, 18]  # the first two are left out
    assert all(update["seconds"]["update"] >= 0 for update in updates)


def test_tables():
    seconds = dict(zip(speed.PHASES, (3.0, 1.0, 1.0, 1.0, 3.0, 1.0)))
    operations = dict(zip(speed.PHASES, (30, 50, 50, 75, 150, 0)))
    ours = {"updates": [{"seconds": seconds, "tokens": 20, "operations": operations}],
            "limit": 100, "peak": 512.4}
    assert speed.phase_table(ours) == (
        "| phase | CPU s | share | tokens / s | of the matmul limit |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| rollout | 3.000 | 30% | 7 | 10% |\n"
        "| score | 1.000 | 10% | 20 | 50% |\n"
        "| reference | 1.000 | 10% | 20 | 50% |\n"
        "| forward | 1.000 | 10% | 20 | 75% |\n"
        "| backward | 3.000 | 30% | 7 | 50% |\n"
        "| optimizer | 1.000 | 10% | 20 | – |\n"
        "| update | 10.000 | 100% | 2 | 36% |\n"
    )
    trl = {"updates": [{"seconds": {"update": second}, "tokens": 30}
                       for second in (12.0, 15.0, 24.0)], "peak": 1024.0}
    assert speed.contender_table({"ours": ours, "trl tuned": trl}, 10).splitlines()[2:] == [
        "| ours | 10.000 | 10.000 – 10.000 | 1.00 | 2 | 20 | 2.0 | 512 |",
        "| trl tuned | 15.000 | 12.000 – 24.000 | 1.50 | 2 | 30 | 3.0 | 1,024 |",
    ]


def test_main_prints_both_tables_and_keeps_the_numbers(small, monkeypatch, capsys):
    args, folder = small
    update = {"seconds": dict.fromkeys(speed.PHASES, 1.0), "tokens": 6,
              "operations": dict.fromkeys(speed.PHASES, 5e8)}
    found = {"make": {"updates": [], "parameters": 1e6},
             "ours": {"limit": 1e9, "peak": 1.0, "updates": [update]}}
    monkeypatch.setattr(speed, "measure", lambda workload: json.loads(json.dumps(found)))
    speed.main(speed.replace(args, workload=("s-full", "tldr-m"),
                             json=str(folder / "numbers.json")))
    printed = capsys.readouterr().out
    assert ("tldr-m: 1.0 million parameters, float32; 3 prompts of 300 to 400 tokens, k 2, "
            "53 new tokens; ") in printed
    assert printed.count("| update | 6.000 | 100% | 1 | 50% |") == 2
    numbers = json.loads((folder / "numbers.json").read_text())
    assert numbers["s-full"]["args"]["size"] == "S"
    assert numbers["tldr-m"]["args"]["new_tokens"] == 53
    assert numbers["tldr-m"]["ours"] == found["ours"]


@pytest.mark.parametrize("flags, message", [
    (dict(workload=("s-full", "big")), "--workload big: choose from s-full, "),
    (dict(without=("bfloat16",)), "--without bfloat16: choose from everything, shared prompts, "),
    (dict(against="trl", trl_python="no/python"), "--trl-python no/python: cannot import trl"),
    (dict(against="trl-tuned", trl_python="/bin/false"),
     "--trl-python /bin/false: cannot import trl"),
])
def test_mistakes_are_reported_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit):
        speed.main(speed.Args(**flags))
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
