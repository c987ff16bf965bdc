"""Every script's own `main` against a second implementation, tests/helpers/oracle.py, in float64.

Given rollouts of several prompts with responses that end early, late and never, sampled from
another policy. Compared: the gradient of every optimizer step, of policy and critic, the weights in
the end, and every logged number.
"""

import importlib
import itertools
import math
import re
from dataclasses import fields

import pytest
import torch
from helpers import loop, oracle, small_world

from lab.family import FAMILY, SAMPLING

INF = float("inf")
HERE = f"{loop.ROOT}/tests/helpers/small_world.py"
BASE = dict(model=f"{HERE}:policy", reference=f"{HERE}:reference", critic=f"{HERE}:critic",
            reward=(f"{HERE}:reward",), gold="none", dataset=f"{HERE}:prompts", device="cpu", k=3,
            beta=0.3, temperature=0.7, lr=0.02, critic_lr=0.03, num_updates=3, prompts_per_step=3,
            max_new_tokens=6, missing_eos_penalty=0.5, microbatch_tokens=40, eval_prompts=3,
            eval_every=2, save_every=0, seed=2)
BINARY = dict(reward=(f"{HERE}:right",), missing_eos_penalty=0.0, reward_noise=0.0,
              reward_weights=())
PAIRS = dict(dataset=f"{HERE}:pairs", eval_dataset=f"{HERE}:prompts", batch_size=3)

# The flags of each run. Every flag that changes the algorithm has two values at least: the default
# or that of BASE, and another one.
EVERY_SCRIPT = [  # of all that make rollouts
    {},
    {"beta": 0.0, "missing_eos_penalty": 0.0, "microbatch_tokens": 1, "eval_prompts": 2,
     "max_grad_norm": 1e9, "plain": True},
    {"temperature": 1.0, "microbatch_tokens": 10_000, "k": 2, "eval_every": 0,
     "lr_schedule": "cosine", "warmup_updates": 1, "num_updates": 4, "max_grad_norm": 0.1},
    {"lr_schedule": "constant", "reward": (f"{HERE}:reward", f"{HERE}:brevity"),
     "reward_weights": (0.5, -2.0), "reward_noise": 0.7},
]
ONE_RESPONSE = {"k": 1, "prompts_per_step": 4}
STEPS = [
    {"minibatches": 1, "epochs": 2},
    {"minibatches": 2, "epochs": 2},
    {"minibatches": 4, "lr": 0.2, "critic_lr": 0.2},
    {"clip": 0.05, "minibatches": 3, "max_grad_norm": 1e9},
    {"clip": INF, "minibatches": 2},
]
MORE = {  # of single scripts
    "reinforce_pp": [
        {"reward": (f"{HERE}:constant",), "whiten": False, "missing_eos_penalty": 0.0},
        {"k": 1, "prompts_per_step": 1, "max_new_tokens": 1, "minibatches": 1},
    ],
    "ppo": [{"k": 1, "prompts_per_step": 1, "max_new_tokens": 1, "minibatches": 1}],
    "dapo": [
        {"reward": (f"{HERE}:constant",), "overlong_penalty": 0.0, "max_rounds": 2,
         "missing_eos_penalty": 0.0},  # never full
        {"max_new_tokens": 8},
        {"reward": (f"{HERE}:right", f"{HERE}:brevity"), "reward_weights": (1.0, 0.0),
         "reward_noise": 0.3, "max_rounds": 2},
        {"reward": (f"{HERE}:right",), "overlong_penalty": 0.0, "missing_eos_penalty": 0.0,
         "num_updates": 3},
    ],
    "dpo": [{"dataset": f"{HERE}:tied_pairs", "microbatch_tokens": 1}],
}


def cases(name):
    """The flags of a script's runs. The first: those of BASE alone, and three updates, not two."""
    algorithm, flags = (FAMILY[name],
                        {field.name for field in fields(importlib.import_module(name).Args)})
    if not algorithm.samples:
        return [PAIRS | flags for flags in [{}, *algorithm.variants, *MORE.get(name, [])]]
    found = [*EVERY_SCRIPT, *(STEPS if "minibatches" in flags else []),
             *([ONE_RESPONSE] if algorithm.least_k == 1 else []), *algorithm.variants,
             *MORE.get(name, [])]
    more = BINARY if algorithm.binary else {}
    return [({"num_updates": 2} | flags if flags else {}) | more for flags in found]


def own_flags(name):
    """What a script's data or rewards have to be, if not those of BASE."""
    if name not in SAMPLING:
        return PAIRS
    return BINARY if FAMILY[name].binary else {}


CASES = SAMPLING
RUNS = [(name, flags) for name in FAMILY for flags in cases(name)]
RUNS += [("sft", PAIRS | flags) for flags in [
    {"eval_rows": 2, "eval_every": 1},
    {"lr_schedule": "linear", "warmup_updates": 2, "weight_decay": 0.1, "max_grad_norm": 0.1,
     "num_updates": 4},
    {"lr_schedule": "constant", "max_grad_norm": 1e9, "microbatch_tokens": 1, "batch_size": 5},
]]
RUNS += [("reward_model", PAIRS | {"model": f"{HERE}:critic"} | flags) for flags in [
    {"eval_every": 1},
    {"dataset": f"{HERE}:tied_pairs", "microbatch_tokens": 1, "gold": f"{HERE}:brevity"},
    {"center": 0.5, "gold": f"{HERE}:brevity", "eval_every": 1, "microbatch_tokens": 1,
     "num_updates": 4},
    {"lr_schedule": "linear", "warmup_updates": 2, "weight_decay": 0.1, "max_grad_norm": 0.1},
]]


def given_rollout(update, prompt_ids, args, greedy):
    """The same Rows for the script and for the oracle."""
    policy, tokenizer = small_world.old_policy()
    words = [i for i in range(len(tokenizer))
             if i not in (tokenizer.eos_token_id, tokenizer.pad_token_id)]
    k, seed = (1, f"greedy {update}") if greedy else (args.k, update)
    return loop.random_responses(policy, words, tokenizer.eos_token_id, k, args.temperature,
                                 args.max_new_tokens, seed, prompt_ids)


def score(rows, examples, reward):
    """Put the values of the reward functions into the Rows; `examples` are the dataset's rows."""
    tokenizer = small_world.tokenizer()
    for row, example in zip(rows, examples, strict=True):
        text = " ".join(tokenizer.convert_ids_to_tokens([i for i in row.response
                                                         if i > tokenizer.eos_token_id]))
        for name in (spec.rpartition(":")[2] for spec in reward):
            function = getattr(small_world, name)
            row.parts[name] = function(prompts=[example["prompt"]], completions=[text],
                                       bonus=[example["bonus"]])[0]
    return rows


def encoded(example, column):
    """A given response as a Row, as if it had been sampled: with its EOS."""
    tokenizer = small_world.tokenizer()
    response = tokenizer(example[column])["input_ids"] + [tokenizer.eos_token_id]
    return oracle.Row(tokenizer(example["prompt"])["input_ids"], response, True,
                      [0.0] * len(response), {})


def dataset_of(args):
    return getattr(small_world, args.dataset.rpartition(":")[2])


def updates_of(name, seen):
    """What the oracle is to be given for each update, by the order of data that the script drew."""
    args, dataset = seen.args, dataset_of(seen.args)("train")
    size = args.batch_size if hasattr(args, "batch_size") else args.prompts_per_step
    stream = itertools.chain(*(order for order in seen.orders if len(order) == len(dataset)))
    examples = [[dataset[i] for i in itertools.islice(stream, size)]
                for _ in range(args.num_updates)]
    if name in ("dpo", "reward_model"):
        return [{"pairs": [(encoded(row, "chosen"), encoded(row, "rejected")) for row in rows]}
                for rows in examples]
    if name == "sft":
        return [{"rows": [encoded(row, "completion") for row in rows]} for rows in examples]
    repeat = lambda rows, k: [row for row in rows for _ in range(k)]
    updates, tokenizer, draws = [], small_world.tokenizer(), iter(seen.draws)
    orders = iter([order for order in seen.orders if len(order) == size * args.k != len(dataset)])
    calls, formula = 0, FAMILY[name].formula or name
    by_ids = {tuple(tokenizer(row["prompt"])["input_ids"]): row for row in dataset}

    def add_noise(rows):
        for row, draw in zip(rows, next(draws).tolist(), strict=True) if args.reward_noise else ():
            row.noise = args.reward_noise * draw

    for number, rows in enumerate(examples):
        prompt_ids = [tokenizer(row["prompt"])["input_ids"] for row in rows]
        assert seen.rollouts[calls] == prompt_ids
        update = {"rows": score(given_rollout(calls, prompt_ids, args, False),
                                repeat(rows, args.k), args.reward)}
        calls += 1
        if formula == "remax":
            update["greedy"] = score(given_rollout(number, prompt_ids, args, True), rows,
                                     args.reward)
        for scored in filter(None, (update["rows"], update.get("greedy"))):
            add_noise(scored)
        if formula == "dapo":  # further rounds, for whichever prompts the script has drawn
            rounds = [update["rows"]]
            while not oracle.batch_is_full(rounds, args) and len(rounds) < args.max_rounds:
                rows = [by_ids[tuple(ids)] for ids in seen.rollouts[calls]]
                assert len(rows) == size
                rounds.append(score(given_rollout(calls, seen.rollouts[calls], args, False),
                                    repeat(rows, args.k), args.reward))
                add_noise(rounds[-1])
                calls += 1
            update = {"rows": oracle.dynamic_sampling(rounds, args), "rounds": len(rounds),
                      "sampled": sum(map(len, rounds))}
        if getattr(args, "minibatches", 1) > 1:
            update["orders"] = [next(orders) for _ in range(args.epochs)]
        updates.append(update)
    assert calls == len(seen.rollouts)
    return updates


def assert_close(found, expected, what, tolerance=1e-9):
    assert len(found) == len(expected), what
    for a, b in zip(found, expected):
        a, b = (torch.cat([torch.zeros(0), *(t.double().flatten() for t in x if t is not None)])
                for x in (a, b))
        assert a.shape == b.shape, what
        assert (a - b).abs().max() < tolerance * max(1, b.abs().max()), what


COUNTS = {"rollout/length", "rollout/eos_rate", "rollout/distinct",
          "objective/frac_reward_zero_std", "rewards/accuracies", "accuracy",
          "gold_accuracy"}  # in float32


def assert_same_numbers(found, expected, what, rel=1e-9):
    for name, value in expected.items():
        close = pytest.approx(value, rel=max(rel, 1e-7 * (name in COUNTS)), abs=rel)
        same = math.isnan(found[name]) if math.isnan(value) else found[name] == close
        assert same, f"{what}, {name}: {found[name]} instead of {value}"


def compare(name, seen):
    """Hold what a script's main has done against the oracle, trained from the same weights."""
    args = seen.args
    policy, reference = small_world.policy()[0], small_world.reference()[0]
    critic = small_world.critic()[0]
    trained = critic if name == "reward_model" else policy
    formula = FAMILY[name].formula if name in FAMILY else None
    steps, metrics = oracle.train(formula or name, args, updates_of(name, seen), trained, reference,
                                  critic)
    both = ["policy", "critic"] if name in FAMILY and FAMILY[name].critic else ["policy"]
    assert len(seen.steps) == len(both)
    for kind, found in zip(both, seen.steps):
        assert_close(found, [step[kind] for step in steps], f"{name}: gradients of the {kind}")
    for model, found in zip((trained, critic), seen.models):
        expected = list(model.parameters())
        if name == "reward_model":  # its head has been divided by the rewards' std in the end
            std = (seen.evaluations[args.num_updates]["std"] if seen.evaluations
                   else expected[-1].norm() / found[-1].norm())
            expected[-1] = expected[-1] / std
        # Adam divides a gradient by its size, even one that is only rounding errors (keys' biases).
        assert_close([found], [expected], f"{name}: weights in the end", tolerance=1e-7)
    assert_close([seen.returned], [seen.models[0]], f"{name}: the model that main returns",
                 tolerance=1e-15)
    if seen.metrics:  # of several processes only the first one logs
        assert len(seen.metrics) == args.num_updates
        times = {"time/seconds", "time/tokens_per_second"}
        for update, (found, expected) in enumerate(zip(seen.metrics, metrics), 1):
            assert found.keys() - times == expected.keys(), f"{name}: the logged metrics"
            assert name not in CASES or times <= found.keys()
            assert_same_numbers(found, expected, f"{name}, update {update}")
        compare_samples(name, seen, steps)


def compare_samples(name, seen, steps):
    """TensorBoard's table of responses, after each evaluation but the first: that update's rows."""
    if "samples" not in steps[-1]:
        return
    assert seen.texts.keys() == seen.evaluations.keys() - {0}
    samples = [step["samples"] for step in steps if "samples" in step]
    for update, cells in seen.texts.items():
        assert len(cells) == min(8, len(samples[update - 1]))
        for number, (row, numbers) in enumerate(zip(cells, samples[update - 1])):
            what = f"{name}: row {number} of the samples of update {update}"
            assert [float(cell) for cell in row[2:]] == pytest.approx(numbers, abs=0.0051), what


def compare_saved(name, seen, folder):
    """The model folder and the last checkpoint hold the weights that training ended with."""
    kinds = ["reward"] if name == "reward_model" else ["policy", "critic"][: len(seen.models)]
    last = folder / "checkpoints" / f"{seen.args.num_updates:06d}"
    assert (torch.load(last / "state.pt", weights_only=True)["state"]["step"]
            == seen.args.num_updates)
    for kind, weights in zip(kinds, seen.models):
        model = (small_world.critic if kind in ("reward", "critic") else small_world.policy)()[0]
        for place in [last / kind] + [folder / "model"] * (kind != "critic"):
            saved = [p.detach() for p in
                     type(model).from_pretrained(place, dtype=torch.float64).parameters()]
            if kind == "reward" and place.parent == last:  # not yet divided by the rewards' std
                saved[-1] /= seen.evaluations[seen.args.num_updates]["std"]
            assert_close([saved], [weights], f"{name}: the {kind} in {place.relative_to(folder)}")


def compare_evaluations(name, seen):
    """The held-out numbers: for RL and DPO from each evaluation's samples, else computed anew."""
    args, policy = seen.args, small_world.policy()[0]
    every = args.eval_every or args.num_updates
    steps = sorted({0, args.num_updates, *range(every, args.num_updates, every)})
    if name in ("sft", "reward_model"):
        assert list(seen.evaluations) == steps[1:]
        data = dataset_of(args)("test")
        with torch.no_grad():
            for parameter, weight in zip(policy.parameters(), seen.models[0]):
                parameter.copy_(weight)
    if name == "sft":
        rows = [encoded(example, "completion") for example in list(data)[: args.eval_rows]]
        return assert_same_numbers(seen.evaluations[args.num_updates],
                                   {"perplexity": oracle.perplexity(policy, rows)},
                                   "sft, evaluation")
    if name == "reward_model":
        model = small_world.critic()[0]
        for parameter, weight in zip(model.parameters(), seen.models[0]):
            parameter.data.copy_(weight)
        found = seen.evaluations[args.num_updates]
        model.score.weight.data *= found["std"]  # divided by it after the last evaluation
        sides = [[oracle.classifier_score(model, encoded(row, side)) for row in data]
                 for side in ("chosen", "rejected")]
        golds = ([small_world.brevity(data[side]) for side in ("chosen", "rejected")]
                 if args.gold != "none" else None)
        expected = oracle.pair_metrics(list(zip(*sides)), golds and list(zip(*golds)))
        assert found.keys() == expected.keys()
        return assert_same_numbers(found, expected, "reward_model, evaluation")
    examples = list(small_world.prompts("test"))[: args.eval_prompts]
    reference = small_world.reference()[0]
    assert list(seen.evaluations) == steps and len(seen.samples) == len(steps)
    weights = args.reward_weights or [1.0] * len(args.reward)
    total = lambda row: sum(weight * part for weight, part in zip(weights, row.parts.values()))
    for step, batch in zip(steps, seen.samples):
        rows = score(loop.as_rows(batch), examples, args.reward)
        opponents = score([encoded(example, "completion") for example in examples], examples,
                          args.reward)
        expected = oracle.evaluation(policy, reference, rows, args, [*map(total, rows)],
                                     [*map(total, opponents)])
        if len(args.reward) > 1:
            expected |= {f"reward/{part}": oracle.mean([row.parts[part] for row in rows])
                         for part in rows[0].parts}
        assert seen.evaluations[step].keys() == expected.keys()
        what = f"{name}, evaluation after update {step}"
        assert_same_numbers(seen.evaluations[step], expected, what, rel=1e-6)  # kept in float32
        if step == args.num_updates:
            for parameter, weight in zip(policy.parameters(), seen.models[0]):
                parameter.data.copy_(weight)
        if step in (0, args.num_updates):  # sampled from this moment's policy, at the temperature
            for row in rows:
                logprobs = loop.token_logprobs(policy, row.prompt, row.response, args.temperature)
                assert row.old_logprobs == pytest.approx(logprobs, abs=1e-9)


# "not slow": one run of each script.
RUNS = [pytest.param(name, flags,
                     marks=[pytest.mark.slow] * bool(flags.keys() - PAIRS.keys() - {"model"}))
        for name, flags in RUNS]


@pytest.mark.parametrize("name, flags", RUNS,
                         ids=[f"{run.values[0]}-{i}" for i, run in enumerate(RUNS)])
def test_main_does_what_the_second_implementation_does(name, flags, tmp_path):
    with loop.float64():
        seen = loop.record(name, tmp_path / "run", given_rollout, **BASE | flags)
        assert seen.metrics
        compare(name, seen)
        compare_evaluations(name, seen)
        compare_saved(name, seen, tmp_path / "run")


@pytest.mark.slow
def test_ppo_with_everything_off_is_vanilla_pg(tmp_path):
    """With their own rollouts, over several updates: both draw the same random numbers."""
    off = dict(lam=1.0, clip=INF, value_clip=INF, whiten=False, minibatches=1)
    with loop.float64():
        ppo = loop.record("ppo", tmp_path / "ppo", **BASE | off)
        vanilla_pg = loop.record("vanilla_pg", tmp_path / "vanilla_pg", **BASE)
    for kind in (0, 1):
        assert_close(ppo.steps[kind], vanilla_pg.steps[kind], ("policy", "critic")[kind])
    assert len(ppo.steps[0]) == BASE["num_updates"]
    for ours, theirs in zip(ppo.metrics, vanilla_pg.metrics):
        other = {"time/seconds", "time/tokens_per_second", "policy/loss"}  # its form differs
        assert_same_numbers(ours, {key: value for key, value in theirs.items() if key not in other},
                            "ppo")
        assert ours["policy/clipfrac"] == 0


def infinite_rollout(update, prompt_ids, args, greedy):
    rows = given_rollout(update, prompt_ids, args, greedy)
    rows[-1].old_logprobs[0] = -INF
    return rows


NOT_FINITE = {  # what goes wrong -> (what is named, rollout, flags)
    "a step that is too large": ("loss", given_rollout, {"lr": 1e300, "critic_lr": 1e300}),
    "a gradient that overflows": ("grad_norm", given_rollout, {"model": f"{HERE}:steep"}),
    "an infinite log-prob": ("kl", infinite_rollout, {}),
    "an infinite reward": ("scores", given_rollout, {"reward_weights": (INF,)}),
}
FINITE = [(name, *case) for name in CASES for case in NOT_FINITE.values()
          if not (FAMILY[name].binary and case[0] == "scores")]
FINITE += [(name, *case) for name in ("dpo", "sft", "reward_model")
           for case in list(NOT_FINITE.values())[:2]]
FINITE += [(name, "grad_norm", given_rollout, {"critic": f"{HERE}:steep_critic"})
           for name, algorithm in FAMILY.items() if algorithm.critic]


@pytest.mark.slow
@pytest.mark.parametrize("name, what, rollout, flags", FINITE)
def test_numbers_that_are_not_finite_stop_every_script(name, what, rollout, flags, tmp_path,
                                                       capsys):
    """Before they reach the weights: a script that misses one would save a ruined model."""
    more = own_flags(name)
    if name == "reward_model":
        more = more | {"model": f"{HERE}:critic"}
        flags = {flag: value.replace("steep", "steep_critic") if flag == "model" else value
                 for flag, value in flags.items()}
    with pytest.raises(SystemExit) as stopped:
        loop.record(name, tmp_path / "run", rollout,
                    **BASE | more | {"save_every": 1, "eval_every": 0} | flags)
    error = capsys.readouterr().err
    update, found = re.search(r"update (\d): (\w+) is not finite", error).groups()
    assert stopped.value.code == 1 and found == what
    assert len(list((tmp_path / "run" / "checkpoints").glob("0*"))) == int(update) - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SAMPLING if FAMILY[name].binary])
@pytest.mark.parametrize("flags, message", [
    ({"missing_eos_penalty": 0.5}, "--missing-eos-penalty 0.5: the scores must stay 0 or 1; set"),
    ({"reward_noise": 0.1}, "--reward-noise 0.1: the scores must stay 0 or 1; set it to 0"),
    ({"reward": (f"{HERE}:constant",)}, f"--reward {HERE}:constant: a score is 0.1, and this"),
    ({"reward": (f"{HERE}:right_twice",)}, f"--reward {HERE}:right_twice: a score is 0.5, and"),
])
def test_scores_that_are_not_0_or_1_stop_the_scripts_that_need_them(name, flags, message, tmp_path,
                                                                    capsys):
    """Before there is a folder; or in the first update, if two given responses do not show it."""
    with pytest.raises(SystemExit) as stopped:
        loop.record(name, tmp_path / "run", given_rollout, **BASE | BINARY | flags)
    assert stopped.value.code == 2 and f"error: {message}" in capsys.readouterr().err
    assert (tmp_path / "run").exists() == ("right_twice" in message)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name, what", [*((name, "kl") for name in [*CASES, "dpo"]),
                                        ("sft", "perplexity"), ("reward_model", "mean")])
def test_a_last_step_that_ruins_the_weights_is_not_saved(name, what, tmp_path, capsys):
    more = own_flags(name) | ({"model": f"{HERE}:critic"} if name == "reward_model" else {})
    with pytest.raises(SystemExit):
        loop.record(name, tmp_path / "run", given_rollout,
                    **BASE | more | {"num_updates": 1, "lr": 1e300, "epochs": 1,
                                     "warmup_updates": 0, "minibatches": 1})
    assert f"update 1: {what} is not finite" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, "dpo", "sft", "reward_model"])
def test_a_held_out_row_that_is_too_long_is_found_before_the_run_starts(name, tmp_path, capsys):
    data = f"{HERE}:long_prompt"
    more = {"eval_dataset": data} if name == "dpo" else {"dataset": data}
    more |= {"model": f"{HERE}:critic"} if name == "reward_model" else {}
    with pytest.raises(SystemExit) as stopped:
        loop.record(name, tmp_path / "run", given_rollout,
                    **BASE | own_flags(name) | more)
    assert (stopped.value.code == 2
            and "do not fit the 16 positions of model " in capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
