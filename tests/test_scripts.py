"""sft.py, reward_model.py, evaluate.py and plot.py on tiny data, checked against other ways to get the numbers."""

import json
import math
import re
import signal

import matplotlib.image
import pytest
import torch
from datasets import Dataset
from helpers.tiny import CPU, make_tokenizer, save_policy, scalars, token_ids
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import evaluate
import plot
import reward_model
import rloo
import sft
from common import encode, token_logprobs
from plumbing import load_model, load_tokenizer


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
    args = sft.Args(
        model=world.policy,
        dataset=world.data,
        test_split="train",
        num_updates=40,
        batch_size=12,
        lr=1e-2,
        warmup_updates=0,
        device="cpu",
        output=str(tmp_path / "run"),
    )
    sft.main(args)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    ids = tokenizer("a b c", return_tensors="pt")["input_ids"]
    text = tokenizer.decode(policy.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, 3:])
    assert text == "a b <eos>"
    told = re.search(r"held-out perplexity ([\d.]+); policy and logs are in (.*)", capsys.readouterr().out)
    (*_, (step, perplexity)) = scalars(tmp_path / "run")["eval/perplexity"]
    assert step == 40 and told.groups() == (f"{perplexity:.3f}", str(tmp_path / "run"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # no longer to save a checkpoint


def test_sft_reports_the_perplexity_of_held_out_completions(world, tmp_path):
    """Of 5 rows, EOS included, after an update that changes nothing: against the loss that transformers computes."""
    flags = dict(model=world.policy, dataset=world.data, eval_rows=5, num_updates=1, lr=1e-30, warmup_updates=0)
    policy = sft.main(sft.Args(**flags, device="cpu", output=str(tmp_path / "run")))
    total = 0.0
    for row in list(Dataset.from_json(world.data, cache_dir=str(tmp_path / "cache")))[:5]:
        ids = torch.tensor([load_tokenizer(world.policy)(row["prompt"] + " a b <eos>")["input_ids"]])
        labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 3, -100, ids)
        total += 3 * policy(ids, labels=labels).loss.item()
    assert scalars(tmp_path / "run")["eval/perplexity"] == [(1, pytest.approx(math.exp(total / 15), rel=1e-5))]


def test_reward_loss_by_hand():
    loss = reward_model.compute_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), 0.1)
    by_hand = math.log(1 + math.exp(-1)) + 0.1 * 1 + math.log(1 + math.exp(2)) + 0.1 * 4
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


def test_spearman():
    x, y = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 30.0, 20.0, 40.0])
    assert reward_model.spearman(x, y) == pytest.approx(0.8)
    assert reward_model.spearman(x, x.exp()) == pytest.approx(1) and reward_model.spearman(x, -x) == pytest.approx(-1)
    assert reward_model.spearman(torch.tensor([1.0, 1, 2]), torch.tensor([1.0, 2, 2])) == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [20, 16384])
def test_reward_model_learns_the_pairs(world, tmp_path, tokens, capsys):
    (tmp_path / "length.py").write_text(
        "def words(prompts, completions, **_):\n    return [len(c.split()) for c in completions]\n"
    )
    args = reward_model.Args(
        model=world.policy,
        dataset=world.data,
        test_split="train",
        num_updates=30,
        batch_size=12,
        lr=1e-2,
        warmup_updates=0,
        gold=f"{tmp_path}/length.py:words",
        device="cpu",
        microbatch_tokens=tokens,
        output=str(tmp_path / "run"),
    )
    reward_model.main(args)
    metrics = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert metrics["accuracy"] == 1 and metrics["gold_accuracy"] == 1
    told = re.findall(r"^(\w+) +(-?[\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert told == [(name, f"{value:.3f}") for name, value in metrics.items()]
    assert metrics["std"] == pytest.approx(1, abs=1e-3) and abs(metrics["mean"]) < 0.2
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    good, bad = (
        model(**tokenizer(text, return_tensors="pt")).logits.item() for text in ("a a b c <eos>", "a d e <eos>")
    )
    assert good > bad + 1  # plain transformers, without our reading of the last token, says the same


def test_evaluate_table_and_json(world, tmp_path, capsys):
    flags = dict(
        reference=world.policy,
        reward=(world.reward,),
        gold="none",
        judge="reward",
        dataset=world.data,
        test_split="train",
        eval_batch_size=5,
        k=2,
        max_new_tokens=5,
        device="cpu",
    )
    results = evaluate.main(evaluate.Args(policies=(world.policy,), output=str(tmp_path / "a.json"), **flags))
    metrics = results[world.policy]
    assert json.loads((tmp_path / "a.json").read_text())["policies"] == results
    assert abs(metrics["kl"]) < 1e-5 and metrics["variance"] > 0 and 0 <= metrics["win_rate"] <= 1
    table = capsys.readouterr().out
    for name in (
        "score",
        "variance",
        "win_rate",
        "perplexity",
        "diversity_1",
        "diversity_2",
        "distinct",
        "entropy",
        "length",
        "eos_rate",
        "kl",
    ):
        assert name in table and math.isfinite(metrics[name])

    policy, tokenizer = load_model(world.policy, CPU), load_tokenizer(world.policy)
    losses = []  # perplexity of the completions "a b", by transformers' own loss
    for row in Dataset.from_json(world.data, cache_dir=str(tmp_path / "cache")):
        ids = torch.tensor([tokenizer(row["prompt"] + " a b <eos>")["input_ids"]])
        labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 3, -100, ids)
        losses.append(policy(ids, labels=labels).loss.item())
    assert metrics["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)

    flags |= {"greedy": True, "against": world.policy}
    results = evaluate.main(evaluate.Args(policies=(world.policy,), output=str(tmp_path / "b.json"), **flags))
    assert results[world.policy]["win_rate"] == 0.5 and "kl" not in results[world.policy]


def test_evaluate_looks_at_everything_before_it_starts(world, tmp_path, capsys, monkeypatch):
    other = save_policy(tmp_path / "other", make_tokenizer("x y z".split()))
    flags = dict(reference=world.policy, reward=(world.reward,), judge="reward", dataset=world.data, device="cpu")
    for name, expected in ((str(tmp_path / "typo"), "no such file or folder"),
                           (other, "its vocabulary is not that of --reference")):
        with pytest.raises(SystemExit) as stopped:
            evaluate.main(evaluate.Args(policies=(world.policy, name), output=str(tmp_path / "c.json"), **flags))
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
    assert evaluate.pass_at(correct, 2) == pytest.approx((1 / 2 + 1) / 3)  # of two draws, one in 3 of 6 pairs; always
    assert evaluate.pass_at(correct, 4) == pytest.approx(2 / 3)
    values = {name: torch.zeros(12) for name in ("length", "eos_rate", "kl")} | {"score": correct.flatten().float()}
    metrics = evaluate.summarize(values, ["a", "b", "b", "b", *"cdef", *"gggg"], 4)
    assert metrics["distinct"] == pytest.approx((2 + 4 + 1) / 12)
    assert [name for name in metrics if name.startswith("pass@")] == ["pass@1", "pass@2", "pass@4"]
    assert metrics["pass@2"] == evaluate.pass_at(correct, 2)
    half = values | {"score": values["score"] / 2}
    assert not any(name.startswith("pass@") for name in evaluate.summarize(half, ["a"] * 12, 4))


def test_each_policy_is_evaluated_by_its_own_numbers(world, tmp_path):
    """One that knows nothing has entropy log V, and its perplexity is V."""
    policy = load_model(world.policy, CPU)
    torch.nn.init.zeros_(policy.lm_head.weight)
    policy.save_pretrained(tmp_path / "uniform")
    load_tokenizer(world.policy).save_pretrained(tmp_path / "uniform")
    names, output = (str(tmp_path / "uniform"), world.policy), str(tmp_path / "new" / "a.json")
    results = evaluate.main(evaluate.Args(
        names, world.policy, (world.reward,), gold="none", judge="reward", dataset=world.data, eval_prompts=3, k=2,
        max_new_tokens=5, device="cpu", output=output))
    V = policy.config.vocab_size
    assert results[names[0]]["entropy"] == pytest.approx(math.log(V), rel=1e-5) != results[names[1]]["entropy"]
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
        probs = (policy(ids).logits[0, len(prompt.split()) - 1 :] / 0.7).softmax(-1)  # one for each token and EOS
        assert value == pytest.approx(torch.distributions.Categorical(probs).entropy().mean().item(), rel=1e-5)


def test_diversity_by_hand():
    assert evaluate.diversity(["a b a b", "c d"], 1) == pytest.approx((0.5 + 1) / 2)
    assert evaluate.diversity(["a b a b", "c d", "e"], 2) == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.slow
def test_plot_groups_seeds_and_draws_every_axis(world, tmp_path, capsys):
    for k, seed in ((2, 1), (2, 2), (3, 1)):
        rloo.main(rloo.Args(**world.flags | {"k": k}, seed=seed, output=str(tmp_path / f"k{k}-{seed}")))
    runs = tuple(str(path) for path in sorted(tmp_path.iterdir()))
    settings, curves = plot.read_run(runs[0])
    assert plot.label(settings, [settings, settings | {"k": 3}]) == "rloo --k 2"
    points = plot.curve(curves, "samples", "eval/score")
    assert [points[step][0] for step in (0, 2, 3)] == [0, 16, 24]
    assert plot.curve(curves, "updates", "eval/score")[3] == (3, curves["eval/score"][3])
    plot.main(plot.Args(runs=runs, output=str(tmp_path / "curves.png")))
    image = matplotlib.image.imread(tmp_path / "curves.png")
    assert image.shape[0] > 200 and image.shape[1] > 800 and image.std() > 0.05


def write_run(folder, **scalars):
    with SummaryWriter(folder) as writer:
        for name, value in scalars.items():
            writer.add_scalar(f"eval/{name}", value, 1)
    (folder / "args.json").write_text(json.dumps({"script": "rloo", "k": 2}))
    return str(folder)


def test_plot_says_what_it_cannot_draw(tmp_path, capsys):
    run, empty, output = write_run(tmp_path / "run", score=1.0), write_run(tmp_path / "empty"), str(tmp_path / "a.png")
    for flags, message in [
        ({"runs": ()}, "name at least one run folder"),
        ({"runs": (str(tmp_path),)}, f"{tmp_path}: is not a run folder (it has no args.json)"),
        ({"runs": (run, empty)}, f"{empty}: its TensorBoard log holds no scalars"),
        ({"runs": (run,), "y": ("eval/gold", "eval/kl")}, "--y eval/gold eval/kl: no run has any of these metrics"),
        ({"runs": (run,), "x": ("updates", "steps")}, "--x steps: unknown; choose from updates, samples, seconds, kl"),
        ({"runs": (run,), "output": "a.pdf"}, "--output a.pdf: must be a .png file"),
    ]:
        with pytest.raises(SystemExit):
            plot.main(plot.Args(**{"output": output} | flags))
        assert capsys.readouterr().err == f"error: {message}\n"
