"""sft.py, reward_model.py, evaluate.py and plot.py on tiny data, checked in other ways."""

import json
import math
import re
import signal
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from datasets import Dataset
from helpers.tiny import CPU, encode, make_tokenizer, save_policy, scalars, token_ids
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import evaluate
import plot
import reward_model
import rloo
import sft
from common import token_logprobs
from lab.family import FAMILY
from plumbing import Reward, load_model, load_tokenizer


def test_sft_loss_is_the_models_own_on_responses_with_eos(world):
    """Against the loss that transformers computes from labels with -100 on the prompt."""
    policy, tokenizer = load_model(world.policy, CPU), load_tokenizer(world.policy)
    batch = encode(tokenizer, token_ids(tokenizer, ["a b c"]), ["d e"], CPU)
    ids = torch.cat([batch.prompts, batch.responses], 1)
    labels = ids.clone()
    labels[:, : batch.prompts.shape[1]] = -100
    assert (labels != -100).sum() == 3  # two words and EOS
    ours = sft.compute_loss(token_logprobs(policy, batch, 1.0)) / 3
    torch.testing.assert_close(ours, policy(ids, labels=labels).loss)


def test_sft_learns_the_completions_and_to_end(world, tmp_path, capsys):
    args = sft.Args(model=world.policy, dataset=world.data, test_split="train", num_updates=40,
                    batch_size=12, lr=1e-2, warmup_updates=0, device="cpu",
                    output=str(tmp_path / "run"))
    before = signal.getsignal(signal.SIGINT)
    sft.main(args)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    ids = tokenizer("a b c", return_tensors="pt")["input_ids"]
    text = tokenizer.decode(policy.generate(ids, max_new_tokens=5, do_sample=False,
                                            pad_token_id=0)[0, 3:])
    assert text == "a b <eos>"
    told = re.search(r"held-out perplexity ([\d.]+); policy and logs are in (.*)",
                     capsys.readouterr().out)
    (*_, (step, perplexity)) = scalars(tmp_path / "run")["eval/perplexity"]
    assert step == 40 and told.groups() == (f"{perplexity:.3f}", str(tmp_path / "run"))
    # Ctrl-C no longer saves a checkpoint.
    assert signal.getsignal(signal.SIGINT) is before


def test_sft_reports_the_perplexity_of_held_out_completions(world, tmp_path):
    """Of 5 rows, EOS included, against transformers' own loss. The update changes nothing."""
    flags = dict(model=world.policy, dataset=world.data, eval_rows=5, num_updates=1, lr=1e-30,
                 warmup_updates=0)
    policy = sft.main(sft.Args(**flags, device="cpu", output=str(tmp_path / "run")))
    total = 0.0
    for row in list(Dataset.from_json(world.data, cache_dir=str(tmp_path / "cache")))[:5]:
        ids = torch.tensor(
            [load_tokenizer(world.policy)(row["prompt"] + " a b <eos>")["input_ids"]])
        labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 3, -100, ids)
        total += 3 * policy(ids, labels=labels).loss.item()
    assert scalars(tmp_path / "run")["eval/perplexity"] == [
        (1, pytest.approx(math.exp(total / 15), rel=1e-5))]


def test_reward_loss_by_hand():
    loss = reward_model.compute_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), 0.1)
    by_hand = math.log(1 + math.exp(-1)) + 0.1 * 1 + math.log(1 + math.exp(2)) + 0.1 * 4
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


def test_spearman():
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 30.0, 20.0, 40.0])
    assert reward_model.spearman(x, y) == pytest.approx(0.8)
    assert (reward_model.spearman(x, x.exp()) == pytest.approx(1)
            and reward_model.spearman(x, -x) == pytest.approx(-1))
    assert reward_model.spearman(torch.tensor([1.0, 1, 2]),
                                 torch.tensor([1.0, 2, 2])) == pytest.approx(0.5)
    # Ranks 2, 2, 2, 4 and 1, 2, 3, 4.
    assert reward_model.spearman(torch.tensor([1.0, 1, 1, 2]),
                                 torch.tensor([1.0, 2, 3, 4])) == pytest.approx(3 / 15**0.5)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [20, 16384])
def test_reward_model_learns_the_pairs(world, tmp_path, tokens, capsys):
    (tmp_path / "length.py").write_text("def words(prompts, completions, **_):\n"
                                        "    return [len(c.split()) for c in completions]\n")
    args = reward_model.Args(
        model=world.policy, dataset=world.data, test_split="train", num_updates=30, batch_size=12,
        lr=1e-2, warmup_updates=0, gold=f"{tmp_path}/length.py:words", device="cpu",
        microbatch_tokens=tokens, output=str(tmp_path / "run"))
    reward_model.main(args)
    metrics = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert metrics["accuracy"] == 1 and metrics["gold_accuracy"] == 1
    told = re.findall(r"^(\w+) +(-?[\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert told == [(name, f"{value:.3f}") for name, value in metrics.items()]
    assert metrics["std"] == pytest.approx(1, abs=1e-3) and abs(metrics["mean"]) < 0.2
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    good, bad = (model(**tokenizer(text, return_tensors="pt")).logits.item()
                 for text in ("a a b c <eos>", "a d e <eos>"))
    assert good > bad + 1  # plain transformers says the same, without our reading of the last token


def test_a_gold_reward_that_is_none_leaves_a_pair_out(world):
    model = AutoModelForSequenceClassification.from_pretrained(world.reward)
    tokenizer, texts = load_tokenizer(world.reward), ["a b", "c", "d d", "e", "f", "a"]
    ids = [ids + [tokenizer.eos_token_id] for ids in token_ids(tokenizer, texts)]
    pairs = Dataset.from_dict({"prompt": ["a"] * 3, "prompt_ids": [[2]] * 3, "chosen_ids": ids[:3],
                               "rejected_ids": ids[3:]})
    known = dict(zip(texts, [3.0, 2.0, 1.0, 0.0, 5.0, None]))
    gold = Reward("gold", function=lambda completions, **_: [known[text] for text in completions])
    args = SimpleNamespace(microbatch_tokens=99)
    found, first = (reward_model.evaluate_pairs(model, tokenizer, rows, gold, args)
                    for rows in (pairs, pairs.select([0, 1])))
    assert found["gold_accuracy"] == first["gold_accuracy"]  # the third pair has one None
    assert math.isfinite(found["gold_spearman"])


def test_evaluate_table_and_json(world, tmp_path, capsys):
    flags = dict(reference=world.policy, reward=(world.reward,), gold="none", judge="reward",
                 dataset=world.data, test_split="train", k=2, max_new_tokens=5, device="cpu")
    results = evaluate.main(evaluate.Args(policies=(world.policy,), output=str(tmp_path / "a.json"),
                                          **flags))
    metrics = results[world.policy]
    assert json.loads((tmp_path / "a.json").read_text())["policies"] == results
    assert abs(metrics["kl"]) < 1e-5 and metrics["variance"] > 0 and 0 <= metrics["win_rate"] <= 1
    table = capsys.readouterr().out
    for name in ("score", "variance", "win_rate", "perplexity", "diversity_1", "diversity_2",
                 "distinct", "entropy", "length", "eos_rate", "kl"):
        assert name in table and math.isfinite(metrics[name])

    policy, tokenizer = load_model(world.policy, CPU), load_tokenizer(world.policy)
    losses = []  # perplexity of the completions "a b", by transformers' own loss
    for row in Dataset.from_json(world.data, cache_dir=str(tmp_path / "cache")):
        ids = torch.tensor([tokenizer(row["prompt"] + " a b <eos>")["input_ids"]])
        labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 3, -100, ids)
        losses.append(policy(ids, labels=labels).loss.item())
    assert metrics["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)

    flags |= {"against": world.policy}  # two samples of one policy: equally good, not the same
    results = evaluate.main(evaluate.Args(policies=(world.policy,),
                                          output=str(tmp_path / "even.json"), **flags))
    assert (results[world.policy]["score"] == metrics["score"]
            and results[world.policy]["win_rate+-"] > 0.01)

    flags |= {"greedy": True}
    results = evaluate.main(evaluate.Args(policies=(world.policy,), output=str(tmp_path / "b.json"),
                                          **flags))
    assert results[world.policy]["win_rate"] == 0.5 and "kl" not in results[world.policy]


def test_evaluate_looks_at_everything_before_it_starts(world, tmp_path, capsys, monkeypatch):
    other = save_policy(tmp_path / "other", make_tokenizer("x y z".split()))
    flags = dict(reference=world.policy, reward=(world.reward,), judge="reward", dataset=world.data,
                 device="cpu")
    for name, expected in ((str(tmp_path / "typo"), "no such file or folder"),
                           (other, "its vocabulary is not that of --reference")):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(evaluate.Args(policies=(world.policy, name),
                                        output=str(tmp_path / "c.json"), **flags))
        captured = capsys.readouterr()
        assert stopped.value.code == 2 and name in captured.err and expected in captured.err
        assert captured.out == "" and not (tmp_path / "c.json").exists()
    flags |= {"policies": (world.policy,), "max_new_tokens": 125}  # the model has 128 positions
    monkeypatch.setattr(evaluate, "evaluate", None)
    with pytest.raises(SystemExit):
        evaluate.main(evaluate.Args(**flags, output=str(tmp_path / "c.json")))
    assert "128" in capsys.readouterr().err


def test_pass_at_k_and_distinct_by_hand():
    correct = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    assert evaluate.pass_at(correct, 1) == pytest.approx((1 / 4 + 3 / 4) / 3)
    assert evaluate.pass_at(correct, 2) == pytest.approx((1 / 2 + 1) / 3)  # in 3 of 6 pairs; always
    assert evaluate.pass_at(correct, 4) == pytest.approx(2 / 3)
    values = ({name: torch.zeros(12) for name in ("length", "eos_rate", "kl")}
              | {"score": correct.flatten().float()})
    metrics = evaluate.summarize(values, ["a", "b", "b", "b", *"cdef", *"gggg"], 4)
    assert metrics["distinct"] == pytest.approx((2 + 4 + 1) / 12)
    assert [name for name in metrics if name.startswith("pass@")] == ["pass@1", "pass@2", "pass@4"]
    assert metrics["pass@2"] == evaluate.pass_at(correct, 2)
    half = values | {"score": values["score"] / 2}
    assert not any(name.startswith("pass@") for name in evaluate.summarize(half, ["a"] * 12, 4))


def test_summary_by_hand():
    """Three prompts with two responses: variance is within a prompt, the error between prompts."""
    values = {"score": [1.0, 3, 10, 10, -2, 2], "gold": [6.0, 0, 0, 0, 0, 0],
              "win_rate": [1.0, 1, 0, 0.5, 0, 0], "kl": [0.0, 6, 0, 0, 0, 0],
              "length": [1.0, 2, 3, 4, 5, 9], "eos_rate": [1.0, 1, 1, 0, 0, 0],
              "entropy": [2.0] * 6}
    metrics = evaluate.summarize({name: torch.tensor(row) for name, row in values.items()},
                                 ["a a", "b"] * 3, 2)
    assert metrics == pytest.approx({
        "score": 4, "variance": (2 + 0 + 8) / 3, "distinct": 1, "gold": 1,
        "win_rate": (1 + 0.25 + 0) / 3,
        "win_rate+-": math.sqrt(((7 / 12) ** 2 + (2 / 12) ** 2 + (5 / 12) ** 2) / 2 / 3),
        "diversity_1": 0.75, "diversity_2": 1, "entropy": 2, "length": 4, "eos_rate": 0.5, "kl": 1})


def test_each_policy_is_evaluated_by_its_own_numbers(world, tmp_path):
    """One that knows nothing has entropy log V, and its perplexity is V."""
    policy = load_model(world.policy, CPU)
    torch.nn.init.zeros_(policy.lm_head.weight)
    policy.save_pretrained(tmp_path / "uniform")
    load_tokenizer(world.policy).save_pretrained(tmp_path / "uniform")
    names, output = (str(tmp_path / "uniform"), world.policy), str(tmp_path / "new" / "a.json")
    results = evaluate.main(evaluate.Args(
        names, world.policy, (world.reward,), gold="none", judge="reward", dataset=world.data,
        eval_prompts=3, k=2, max_new_tokens=5, device="cpu", output=output))
    V = policy.config.vocab_size
    assert (results[names[0]]["entropy"] == pytest.approx(math.log(V), rel=1e-5)
            != results[names[1]]["entropy"])
    assert results[names[0]]["perplexity"] == pytest.approx(V, rel=1e-4)
    assert results[names[0]]["kl"] > 0.1 > abs(results[names[1]]["kl"])


@pytest.mark.parametrize("max_tokens", [1, 10_000])
def test_entropy_is_that_of_the_whole_vocabulary_at_each_token(world, max_tokens):
    policy, tokenizer = load_model(world.policy, CPU), load_tokenizer(world.policy)
    prompts, texts = ["a b c", "d", "a b c"], ["d e", "f", ""]
    batch = encode(tokenizer, token_ids(tokenizer, prompts), texts, CPU, ended=[True, True, True])
    found = evaluate.entropies(policy, batch, 0.7, max_tokens)
    for prompt, text, value in zip(prompts, texts, found.tolist()):
        ids = torch.tensor([tokenizer(f"{prompt} {text}")["input_ids"]])
        # One distribution for each token and EOS.
        probs = (policy(ids).logits[0, len(prompt.split()) - 1 :] / 0.7).softmax(-1)
        assert value == pytest.approx(
            torch.distributions.Categorical(probs).entropy().mean().item(), rel=1e-5)


def test_diversity_by_hand():
    assert evaluate.diversity(["a b a b", "c d"], 1) == pytest.approx((0.5 + 1) / 2)
    assert evaluate.diversity(["a b a b", "c d", "e"], 2) == pytest.approx((2 / 3 + 1) / 2)


def write_run(folder, settings, **metrics):
    """A run folder with a log: each metric is a dict step -> value."""
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"script": "rloo"} | settings))
    with SummaryWriter(folder) as writer:
        for name, points in metrics.items():
            for step, value in points.items():
                writer.add_scalar(name.replace("_", "/", 1), value, step)
    return str(folder)


@pytest.fixture
def figures(monkeypatch):
    """The pictures that are drawn."""
    found = []
    monkeypatch.setattr(plot.plt, "close", found.append)
    return found


def lines_of(axis):
    """The lines of a panel that have points: lists of (x, y)."""
    return [line.get_xydata().tolist() for line in axis.lines if len(line.get_xydata())]


def band_of(area):
    """The corners of a band, as a set."""
    return {tuple(point) for point in area.get_paths()[0].vertices.round(5).tolist()}


def write_seeds(tmp_path):
    """Three runs: two seeds with k 2, one with k 3. Each evaluates after 0, 5 and 9 updates."""
    return tuple(
        write_run(tmp_path / name, {"k": k, "seed": seed, "output": name, "nproc_per_node": seed},
                  eval_score={0: 1.0, 5: score, 9: 4.0}, eval_kl={0: 0.0, 5: kl, 9: 3.0},
                  objective_scores={1: 0.5, 2: score}, policy_loss={5: 9.0},
                  time_samples={n: 4.0 * n * k for n in range(1, 10)},
                  time_seconds={5: 10.0 * seed, 9: 20.0})
        for name, k, seed, score, kl in (("a", 2, 1, 2.0, 1.0), ("b", 2, 2, 6.0, 2.0),
                                         ("c", 3, 1, 8.0, 5.0)))


@pytest.mark.parametrize("x, name, ours, theirs, first", [
    ("updates", "updates", (0, 5, 9), (0, 5, 9), (1, 2)),
    ("samples", "sampled responses", (0, 40, 72), (0, 60, 108), (8, 16)),
    ("seconds", "seconds of training", (0, 15, 20), (0, 10, 20), ()),
    ("kl", "KL to the reference (nats)", (0, 1.5, 3), (0, 5, 3), ())])
def test_plotted_curves_by_hand(x, name, ours, theirs, first, tmp_path, figures):
    """Two seeds are one curve, their mean with a band of one std; another flag is another curve.

    The dots of training are means too, where the x-axis was logged.
    """
    plot.main(plot.Args(runs=write_seeds(tmp_path), x=x, y=("eval/score", "eval/none"),
                        output=f"{tmp_path}/new/a.png"))
    ((axis,),) = [figure.axes for figure in figures]
    assert axis.get_xlabel() == name and axis.get_title() == "score"
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        "rloo --k 2 (2 seeds)", "rloo --k 3 (1 seed)", "dots: rollouts of training"]
    lines = [[list(point) for point in zip(ours, (1, 4, 4))],
             [list(point) for point in zip(theirs, (1, 8, 4))]]
    dots = [[list(point) for point in zip(first, (0.5, 4))],
            [list(point) for point in zip([4 * 3 * n if x == "samples" else n for n in (1, 2)],
                                          (0.5, 8))]]
    assert lines_of(axis) == ([dots[0], lines[0], dots[1], lines[1]] if first else lines)
    if x == "kl":  # which can decrease
        assert not axis.collections
    else:  # of one seed there is none
        (area,) = axis.collections
        assert band_of(area) == {(a, m + sign * s) for a, m, s in zip(ours, (1, 4, 4), (0, 2, 0))
                                 for sign in (-1, 1)}


def test_dots_and_bands_can_be_left_out(tmp_path, figures):
    plot.main(plot.Args(runs=write_seeds(tmp_path), y=("eval/score",), training=False, bands=False,
                        output=f"{tmp_path}/a.png"))
    (axis,) = figures[0].axes
    assert len(lines_of(axis)) == 2 and not axis.collections
    assert len(figures[0].legends[0].get_texts()) == 2


def test_a_band_stays_where_the_metric_can_be(tmp_path, figures):
    """A KL not below 0, a win rate not above 1; a score has no bounds."""
    runs = tuple(write_run(tmp_path / f"{seed}", {"seed": seed}, eval_score={0: score},
                           eval_win_rate={0: rate}, eval_kl={0: kl})
                 for seed, score, rate, kl in ((1, -1.0, 0.7, 0.0), (2, 1.0, 1.0, 1.0),
                                               (3, 0.0, 1.0, 5.0)))
    plot.main(plot.Args(runs=runs, output=f"{tmp_path}/a.png"))
    ends = [sorted({y for _, y in band_of(axis.collections[0])}) for axis in figures[0].axes[:3]]
    assert ends == [pytest.approx([-((2 / 3) ** 0.5), (2 / 3) ** 0.5], abs=1e-5),
                    pytest.approx([0.9 - 0.02**0.5, 1], abs=1e-5),
                    pytest.approx([0, 2 + (14 / 3) ** 0.5], abs=1e-5)]


def test_a_second_run_does_not_stretch_the_axes_unseen(tmp_path, figures, capsys):
    """The same flags and seed again are the same curve; a longer run is another, and is named."""
    write = lambda name, number, score: write_run(
        tmp_path / name, {"seed": 1, "num_updates": number},
        eval_score={step: score for step in range(0, number + 1, 2)})
    runs = write("rloo-1", 4, 1.0), write("rloo-2", 4, 2.0)
    plot.main(plot.Args(runs=runs, output=f"{tmp_path}/a.png"))
    assert capsys.readouterr().out == f"rloo (1 seed): 4 updates\nwrote {tmp_path}/a.png\n"
    assert lines_of(figures[0].axes[0]) == [[[0, 2], [2, 2], [4, 2]]]
    plot.main(plot.Args(runs=(*runs, write("rloo-3", 8, 3.0)), output=f"{tmp_path}/a.png"))
    assert capsys.readouterr().out == (
        "rloo --num-updates 4 (1 seed): 4 updates\nrloo --num-updates 8 (1 seed): 8 updates\n"
        "note: these curves do not end at the same update; to see one closely, name its runs "
        f"alone\nwrote {tmp_path}/a.png\n")


def test_every_algorithm_has_a_style_of_its_own():
    """No two curves of one picture look alike, whatever they are, and none has a colour alone."""
    assert len(plot.STYLES) >= len(FAMILY) >= 14
    assert len({(one["color"], one["marker"]) for one in plot.STYLES}) == len(plot.STYLES)
    assert len({(one["color"], one["linestyle"]) for one in plot.STYLES}) == len(plot.STYLES)
    assert plot.styles(FAMILY) == {name: plot.style(name) for name in FAMILY}
    names = ["mine", "ppo.py --lam 1", "ppo, no clip", "lab/rloo_token.py", "rloo --k 2 (1 seed)"]
    found = plot.styles(names)
    assert list(found) == names
    assert found["ppo.py --lam 1"] == plot.style("ppo")
    assert found["rloo --k 2 (1 seed)"] == plot.style("rloo")
    assert len({str(one) for one in found.values()}) == 5
    many = plot.styles([f"run{i}" for i in range(30)])
    assert len({str(one) for one in list(many.values())[:28]}) == 28 and len(many) == 30


@pytest.mark.slow
def test_plot_groups_seeds_and_draws_every_metric(world, tmp_path, capsys):
    for k, seed in ((2, 1), (2, 2), (3, 1)):
        rloo.main(rloo.Args(**world.flags | {"k": k}, seed=seed,
                            output=str(tmp_path / f"k{k}-{seed}")))
    runs = tuple(str(path) for path in sorted(tmp_path.iterdir()))
    settings, scalars = plot.read_run(runs[0])
    assert plot.label(settings, [settings, settings | {"k": 3}]) == "rloo --k 2"
    x, ys = plot.points([scalars], "samples", "eval/score")
    assert x.tolist() == [0, 16, 24] and ys.tolist() == [list(scalars["eval/score"].values())]
    assert plot.points([scalars], "updates", "objective/scores")[0].tolist() == [1, 2, 3]
    x, _ = plot.points([scalars], "kl", "objective/scores")
    assert x.tolist() == list(scalars["objective/kl"].values())
    plot.main(plot.Args(runs=runs, output=str(tmp_path / "curves.png")))
    image = matplotlib.image.imread(tmp_path / "curves.png")
    assert image.shape[0] > 400 and image.shape[1] == 1245 and image.std() > 0.05


def test_plot_says_what_it_cannot_draw(tmp_path, capsys):
    run, empty, output = (write_run(tmp_path / "run", {"k": 2}, eval_score={1: 1.0}),
                          write_run(tmp_path / "empty", {}), str(tmp_path / "a.png"))
    for flags, message in [
        ({"runs": ()}, "name at least one run folder"),
        ({"runs": (str(tmp_path),)}, f"{tmp_path}: is not a run folder (it has no args.json)"),
        ({"runs": (run, empty)}, f"{empty}: its TensorBoard log holds no scalars"),
        ({"runs": (run,), "y": ("eval/gold", "eval/kl")},
         "--y eval/gold eval/kl: no run has any of these metrics"),
        ({"runs": (run,), "x": "steps"},
         "--x steps: unknown; choose from updates, samples, seconds, kl"),
        ({"runs": (run,), "output": "a.pdf"}, "--output a.pdf: must be a .png file"),
    ]:
        with pytest.raises(SystemExit):
            plot.main(plot.Args(**{"output": output} | flags))
        assert capsys.readouterr().err == f"error: {message}\n"
