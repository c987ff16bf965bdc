"""lab/credit.py: its page is sound HTML, with the numbers of the scripts' own functions."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import common
import grpo
import maxrl
import plumbing
import ppo
import reinforce_pp
import reinforce_pp_baseline
import remax
import rloo
import vanilla_pg
from lab import credit
from lab.family import FAMILY, SAMPLING

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
K, PROMPTS = 3, 4
SHOWN = 2  # a prompt with a response that ends
VOID = {"meta", "input"}  # elements without an end tag
SCRIPTS = (*(f"{name}.py" for name in SAMPLING if not FAMILY[name].binary), "grpo.py --beta 0",
           "gspo.py --beta 0", "cispo.py --beta 0 --minibatches 1",
           "dapo.py --beta 0 --minibatches 1", "reinforce_pp_baseline.py --beta 0",
           "lab/rloo_token.py")
TOKEN_MEAN = ("cispo.py --beta 0 --minibatches 1", "dapo.py --beta 0 --minibatches 1")


class Page(HTMLParser):
    """The tokens on a page.

    sections[script] is a list of responses, each with its text, multipliers and numbers.
    """

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sections, self.prompt, self.names = [], [], {}, "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "li":
            self.responses.append(SimpleNamespace(words=[], multipliers=[], classes=[], sizes=[],
                                                  numbers={}))
        if tag == "data":
            attrs, last = dict(attrs), self.responses[-1]
            last.multipliers.append(float(attrs["value"]))
            last.classes.append(attrs["class"])
            last.sizes.append(float(attrs["style"].removeprefix("--size:")))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-2:] == ["h2", "code"]:
            self.responses = self.sections[data] = []
        elif self.open[-1:] == ["data"]:
            self.responses[-1].words.append(data)
        elif self.open[-1:] == ["dt"]:
            self.name = data
        elif self.open[-1:] == ["dd"]:
            self.responses[-1].numbers[self.name] = data
        elif self.open[-1:] == ["p"] and data.strip() and not self.sections:
            self.prompt = data.strip()


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A run folder of ppo.py whose policy is not its reference, on prompts that look like HTML."""
    folder = tmp_path_factory.mktemp("credit")
    rows = [{"prompt": f"<b> {word} & <script>alert('$k')</script> c", "completion": "a"}
            for word in "abcdef" * 2]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = world.flags | {"num_updates": 2, "eval_every": 0, "dataset": str(folder / "data.jsonl")}
    ppo.main(ppo.Args(**flags, beta=0.2, lam=0.6, output=str(folder / "run")))
    return folder / "run"


@pytest.fixture(scope="module")
def shown(run, tmp_path_factory):
    """The page of all scripts; and, for each, its update and variables."""
    output, seen = tmp_path_factory.mktemp("page") / "new" / "page.html", {}

    def assign_credit(command, given, settings, real=credit.assign_credit):
        module, update, names = real(command, given, settings)
        more = {"batch": update.batch, "weights": update.weights}
        seen[command] = SimpleNamespace(**names | more)
        return module, update, names

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(credit, "assign_credit", assign_credit)
        credit.main(credit.Args(SCRIPTS, policy=str(run), k=K, prompts_per_step=PROMPTS,
                                prompt=SHOWN, output=str(output)))
    return SimpleNamespace(text=output.read_text(encoding="utf-8"),
                           page=Page(output.read_text(encoding="utf-8")), scripts=seen,
                           rows=range(SHOWN * K, SHOWN * K + K), run=run)


def rewards_of(script):
    return common.sequence_rewards(script.scores, script.kl, script.args.beta)


def original(name):
    """The script of which this one is a copy under another name; else itself."""
    stem = name.split(".py")[0]
    return f"{FAMILY[stem].formula}.py" if stem in FAMILY and FAMILY[stem].formula else name


def expected(name, script):
    """What multiplies the gradients, (N,) or (N, T), by functions of the script and common.py."""
    batch, beta = script.batch, script.args.beta
    mask = batch.response_mask
    if name == "rloo.py":
        return rloo.compute_advantages(rewards_of(script), K)
    if name == "reinforce.py":
        return rewards_of(script) - script.baseline[:, 0]
    if name == "grpo.py --beta 0":
        return grpo.compute_advantages(script.scores, K) / mask.sum(1)
    if name == "gspo.py --beta 0":  # on policy it is GRPO
        return grpo.compute_advantages(script.scores, K) / mask.sum(1)
    if name in TOKEN_MEAN:
        return grpo.compute_advantages(script.scores, K) * len(batch) / mask.sum()
    if name == "raft.py":
        best = rewards_of(script).view(-1, K).argmax(1) + K * torch.arange(PROMPTS)
        return torch.zeros(len(batch)).index_fill(0, best, len(batch) / mask[best].sum())
    rewards = common.token_rewards(script.scores, script.kl, beta, mask)
    if name == "lab/rloo_token.py":
        return plumbing.load_module(str(ROOT / name)).compute_advantages(rewards, mask, K)
    if name == "remax.py":
        return remax.compute_advantages(rewards, script.greedy_scores.repeat_interleave(K), mask)
    if name == "vanilla_pg.py":
        return vanilla_pg.compute_advantages(rewards, script.old_values, mask)[0]
    if name == "ppo.py":  # --lam 0.6 as in the run
        advantages, _ = ppo.compute_advantages(rewards, script.old_values, mask, 1.0, 0.6)
        return ppo.whiten_advantages(advantages, mask)
    if name == "reinforce_pp.py":
        shaped = reinforce_pp.normalize_scores(script.scores, 10.0)
        rewards = common.token_rewards(shaped, script.kl, beta, mask)
        return reinforce_pp.compute_advantages(rewards, mask)
    assert name == "reinforce_pp_baseline.py --beta 0"
    centered = reinforce_pp_baseline.center_scores(script.scores, K)
    rewards = common.token_rewards(centered, script.kl, 0.0, mask)
    return reinforce_pp_baseline.compute_advantages(rewards, mask)


@pytest.mark.parametrize("name", sorted(
    {*SCRIPTS} - {"grpo.py", "gspo.py", "cispo.py", "dapo.py", "reinforce_pp_baseline.py"}))
def test_multipliers_are_those_of_the_scripts_own_functions(shown, name):
    script = shown.scripts[name]
    wanted = expected(original(name), script)
    wanted = wanted.view(len(script.batch), -1) * script.batch.response_mask
    assert script.weights.abs().sum() > 0
    torch.testing.assert_close(script.weights, wanted, atol=1e-5, rtol=1e-4)


def test_what_a_reader_should_see(shown):
    mask = shown.scripts["rloo.py"].batch.response_mask
    weights = {name: script.weights for name, script in shown.scripts.items()}
    ranges = {name: [(row[own].amax() - row[own].amin()).item() for row, own in zip(rows, mask)]
              for name, rows in weights.items()}  # within each response
    for name in ("rloo.py", "reinforce.py", "grpo.py --beta 0", "gspo.py --beta 0",
                 *TOKEN_MEAN, "raft.py"):  # one color
        assert max(ranges[name]) < 1e-6, name
    for name in ("remax.py", "reinforce_pp.py", "vanilla_pg.py", "ppo.py", "grpo.py"):
        assert max(ranges[name]) > 1e-2, name
    torch.testing.assert_close(weights["rloo.py"][:, 0].view(-1, K).sum(1), torch.zeros(PROMPTS),
                               atol=1e-5, rtol=0)
    assert ((weights["raft.py"][:, 0].view(-1, K) > 0).sum(1) == 1).all()


def test_all_scripts_get_the_same_responses(shown):
    batch, *others = [script.batch for script in shown.scripts.values()]
    assert all(other is batch for other in others) and len(batch) == K * PROMPTS
    assert shown.scripts["rloo.py"].kl.abs().sum() > 0  # the policy has left its reference


def test_the_page_shows_these_numbers(shown):
    """Best response first; words, multipliers, colors and the numbers below."""
    assert list(shown.page.sections) == list(SCRIPTS)
    for name, responses in shown.page.sections.items():
        script = shown.scripts[name]
        rows = sorted(shown.rows, key=lambda row: -script.scores[row].item())
        assert len(responses) == K
        largest = script.weights[list(shown.rows)].abs().max()
        for row, response in zip(rows, responses):
            own = script.batch.response_mask[row]
            ids = script.batch.responses[row][own]
            assert response.words == [script.tokenizer.decode([token]) for token in ids.tolist()]
            weights, numbers = script.weights[row][own], response.numbers
            assert response.multipliers == pytest.approx(weights.tolist(), abs=5.1e-4)
            assert response.sizes == pytest.approx((weights.abs() / largest).tolist(), abs=5.1e-3)
            assert response.classes == ["up" if weight > 0 else "down" for weight in weights]
            score, kl = script.scores[row].item(), script.kl[row].sum().item()
            assert float(numbers["score"]) == pytest.approx(score, abs=5.1e-4)
            assert float(numbers["KL"]) == pytest.approx(kl, abs=5.1e-4)
        assert max(size for response in responses for size in response.sizes) == 1


def test_baselines_values_and_advantages(shown):
    """They are there for the algorithms that have them, and fit together."""
    with_baseline = ("rloo.py", "reinforce.py", "remax.py", "lab/rloo_token.py")
    for name, responses in shown.page.sections.items():
        for numbers in (response.numbers for response in responses):
            assert ("baseline" in numbers) == (original(name) in with_baseline)
            assert ("value" in numbers) == (original(name) in ("vanilla_pg.py", "ppo.py"))
            assert ("advantage" in numbers) == (original(name) != "raft.py")
    for name in ("rloo.py", "reinforce.py"):
        for numbers in (response.numbers for response in shown.page.sections[name]):
            reward = float(numbers["score"]) - 0.05 * float(numbers["KL"])
            advantage = reward - float(numbers["baseline"])
            assert float(numbers["advantage"]) == pytest.approx(advantage, abs=2e-3)
    script = shown.scripts["lab/rloo_token.py"]
    mask = script.batch.response_mask
    returns = common.token_rewards(script.scores, script.kl, 0.05, mask).flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(script.baseline[mask], (returns - script.advantages)[mask],
                               atol=1e-5, rtol=1e-4)
    script = shown.scripts["reinforce.py"]
    assert (script.baseline == script.history[0]).all()
    assert script.history[0] != rewards_of(script).mean().item()
    script = shown.scripts["vanilla_pg.py"]
    critic = plumbing.load_classifier(str(shown.run / "checkpoints/000002/critic"),
                                      torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(script.old_values, common.token_values(critic, script.batch),
                                   atol=1e-5, rtol=1e-4)


def test_maxrl_where_scores_are_0_or_1(world, tmp_path):
    """With the reward of a run folder: -1 for wrong responses, the more for right ones the rarer.

    RLOO beside it gives a right one no more than 1.
    """
    reward, output = tmp_path / "reward.py", tmp_path / "page.html"
    reward.write_text("def right(prompts, completions, **_):\n"
                      "    return [float('a' in text.split()) for text in completions]\n")
    flags = world.flags | {"num_updates": 1, "eval_every": 0, "reward": (f"{reward}:right",),
                           "missing_eos_penalty": 0.0, "beta": 0.0, "k": 4}
    maxrl.main(maxrl.Args(**flags, output=str(tmp_path / "run")))
    credit.main(credit.Args(("maxrl.py", "rloo.py --beta 0"), policy=str(tmp_path / "run"), k=4,
                            prompts_per_step=PROMPTS, output=str(output)))
    ours, theirs = Page(output.read_text(encoding="utf-8")).sections.values()
    right = [float(response.numbers["score"]) for response in ours]
    share = sum(right) / 4
    assert 0 < share < 1 and sorted(right, reverse=True) == right
    for score, mine, others in zip(right, ours, theirs):
        wanted = (score - share) / share
        assert mine.multipliers == pytest.approx([wanted] * len(mine.words), abs=5.1e-4)
        leave_one_out = (score - share) * 4 / 3
        assert others.multipliers == pytest.approx([leave_one_out] * len(mine.words), abs=5.1e-4)


def told_missing(text):
    """What each section of a page says of numbers that it does not show: dict script -> str."""
    sections = re.findall(r"<h2><code>(.*?)</code>.*?<p class=\"quiet\">(.*?)</p>", text, re.DOTALL)
    return {name: " ".join(re.findall(r"No \w+ is shown: [^.]*\.", told))
            for name, told in sections}


def test_the_page_says_which_numbers_a_script_has_no_variable_for(shown):
    no_baseline = "No baseline is shown: there is no variable baseline or old_values."
    no_advantage = "No advantage is shown: there is no variable advantages."
    told = dict.fromkeys(("rloo.py", "reinforce.py", "remax.py", "vanilla_pg.py", "ppo.py",
                          "lab/rloo_token.py"), "")
    told |= {"raft.py": f"{no_baseline} {no_advantage}"}
    assert told_missing(shown.text) == {name: told.get(original(name), no_baseline)
                                        for name in SCRIPTS}


def test_a_runs_flags_are_for_its_own_script(shown):
    """What defines the task is for all."""
    assert (shown.scripts["ppo.py"].args.lam, shown.scripts["ppo.py"].args.beta) == (0.6, 0.2)
    assert shown.scripts["vanilla_pg.py"].args.beta == shown.scripts["rloo.py"].args.beta == 0.05
    assert {script.args.max_new_tokens for script in shown.scripts.values()} == {6}


def test_nothing_comes_from_elsewhere_and_text_is_text(shown):
    assert not re.search(r"https?:|//|@import|url\(", shown.text)
    assert not {"script", "link", "img", "iframe", "base"} & {tag for tag, _ in shown.page.tags}
    attributes = {name for _, attrs in shown.page.tags for name in attrs}
    assert attributes == {"lang", "charset", "name", "content", "class", "id", "type", "for",
                          "value", "title", "style"}
    assert shown.page.prompt == "<b> c & <script>alert('$k')</script> c"
    assert "&lt;eos&gt;" in shown.text and "<eos>" not in shown.text
    filled = shown.text.replace(r"$k&#x27;", "")  # the prompt's
    assert not re.search(r"\$\w", filled)


def test_a_script_is_introduced_by_its_docstrings(shown):
    """By the first line without its sources, and what the estimator is without its arguments."""
    assert "<code>rloo.py</code> RLOO, REINFORCE leave-one-out</h2>" in shown.text
    assert "<code>lab/rloo_token.py</code> RLOO with tokens as actions: a copy of" in shown.text
    assert '<p class="quiet">A_i = R_i - mean of the other k - 1 rewards' in shown.text
    assert "Args:" not in shown.text


def test_the_prompt_with_the_median_range_of_scores_is_shown(shown, tmp_path):
    output = tmp_path / "page.html"
    credit.main(credit.Args(("rloo.py",), str(shown.run), k=K, prompts_per_step=PROMPTS,
                            output=str(output)))
    script = shown.scripts["rloo.py"]  # which has the same responses
    ranges = [max(group) - min(group) for group in script.scores.view(PROMPTS, K).tolist()]
    median = ranges.index(sorted(ranges)[(PROMPTS - 1) // 2])
    assert len(set(ranges)) == PROMPTS
    assert Page(output.read_text()).prompt == script.examples["prompt"][median]


def test_numbers_in_short():
    for values, text in (([1.0], "1.000"), ([1.0, 1.0004], "1.000"),
                         ([1.0, 1.0006], "1.000 … 1.001"),
                         ([-0.0001, 2.0, -0.5], "0.000 … -0.500"),
                         ([1.0, 3.0, 1.0], "1.000 … 1.000")):
        assert credit.in_short(torch.tensor(values)) == text


def test_edited_copies(shown, tmp_path):
    """One with the wrong sign, and one with the same baseline for each response to a prompt."""
    source, output = (ROOT / "rloo.py").read_text(), tmp_path / "page.html"
    edits = {"sign": ("return -(advantages *", "return (advantages *"),
             "mean": ("(rewards.sum(1, keepdim=True) - rewards) / (k - 1)",
                      "rewards.mean(1, keepdim=True)")}
    copies = {name: tmp_path / f"{name}.py" for name in edits}
    for name, edit in edits.items():
        assert edit[0] in source
        copies[name].write_text(source.replace(*edit))
    scripts = tuple(map(str, copies.values()))
    credit.main(credit.Args(scripts, str(shown.run), k=K, prompts_per_step=PROMPTS, prompt=SHOWN,
                            output=str(output)))
    sign, mean = Page(output.read_text()).sections.values()
    for wrong, centered, right in zip(sign, mean, shown.page.sections["rloo.py"]):
        assert wrong.words == centered.words == right.words and any(right.multipliers)
        assert wrong.multipliers == [-multiplier for multiplier in right.multipliers]
        smaller = [multiplier * (K - 1) / K for multiplier in right.multipliers]
        assert centered.multipliers == pytest.approx(smaller, abs=1e-3)
        baseline = centered.numbers["baseline"]
        assert baseline == mean[0].numbers["baseline"] != right.numbers["baseline"]


def test_a_copy_with_other_names(shown, tmp_path):
    """Its page has the same colors, and says what it does not show.

    That compute_loss calls an argument `advantages` makes no difference.
    """
    output, copy = tmp_path / "page.html", tmp_path / "my.py"
    head, main = (ROOT / "rloo.py").read_text().split("def main(args)")
    copy.write_text(head.replace("baseline = ", "others = ").replace("- baseline)", "- others)")
                    + "def main(args)" + main.replace("advantages", "credit").replace(
                        "compute_credit", "compute_advantages"))
    credit.main(credit.Args((str(copy),), str(shown.run), k=K, prompts_per_step=PROMPTS,
                            prompt=SHOWN, output=str(output)))
    text = output.read_text()
    assert told_missing(text) == {str(copy): (
        "No baseline is shown: there is no variable baseline or old_values. "
        "No advantage is shown: there is no variable advantages.")}
    (responses,) = Page(text).sections.values()
    for mine, right in zip(responses, shown.page.sections["rloo.py"]):
        assert mine.multipliers == right.multipliers
        assert mine.numbers.keys() == {"score", "KL", "multiplier"}


@pytest.mark.parametrize("flags, message", [
    ({"scripts": ("rloo.py", "dpo.py")}, "dpo.py: samples no responses"),
    ({"scripts": ("rloo.py", "grpo.py --k 2")},
     "grpo.py --k 2: all scripts get the same responses, so --k must"),
    ({"scripts": ("rloo.py", "ppo.py --temperature 1")}, "so --temperature must be the same"),
    ({"scripts": ("nothing.py",)}, "nothing.py: no such file"),
    ({"scripts": ("common.py",)}, "common.py: has no Args"),
    ({"prompt": 4}, "--prompt 4: must be at least 0 and below --prompts-per-step 4"),
    ({"prompts_per_step": 0}, "--prompts-per-step 0: must be 1 or more"),
    ({"policy": "./nothing"}, "./nothing: no such file or folder"),
    ({"output": __file__ + "/page.html"}, "cannot be written"),
])
def test_bad_input_gets_one_line(run, tmp_path, capsys, flags, message):
    defaults = {"scripts": ("rloo.py",), "policy": str(run), "prompts_per_step": PROMPTS,
                "output": str(tmp_path / "x")}
    with pytest.raises(SystemExit):
        credit.main(credit.Args(**defaults | flags))
    (error,) = re.findall("error: .*", capsys.readouterr().err)
    assert message in error


@pytest.mark.parametrize("name", ["examples", "scores", "kl"])
def test_a_script_without_its_variables_gets_one_line(run, tmp_path, capsys, name):
    text, path = (ROOT / "rloo.py").read_text(), tmp_path / "my.py"
    path.write_text(text.replace("        run.checkpoint()",
                                 f"        run.checkpoint()\n        del {name}"))
    with pytest.raises(SystemExit):
        credit.main(credit.Args((str(path),), str(run), prompts_per_step=PROMPTS,
                                output=str(tmp_path / "page.html")))
    (error,) = re.findall("error: .*", capsys.readouterr().err)
    assert f"{path}: its main has no variable {name}, so it cannot be shown" in error


def test_runs_that_cannot_be_shown(run, tmp_path, capsys):
    new, pairs = shutil.copytree(run, tmp_path / "new"), shutil.copytree(run, tmp_path / "pairs")
    shutil.rmtree(new / "checkpoints")
    (pairs / "args.json").write_text(json.dumps({"script": "dpo", "nproc_per_node": 1}))
    for folder, message in ((new, "has no checkpoint yet"),
                            (pairs, "a run of dpo.py, which samples no responses")):
        with pytest.raises(SystemExit):
            credit.main(credit.Args(policy=str(folder), output=str(tmp_path / "page.html")))
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_default_policy_is_made_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").symlink_to(ROOT / "tasks")
    ppo = credit.load_module(str(ROOT / "ppo.py"))
    train = ppo.main
    monkeypatch.setattr(ppo, "main", lambda args: train(replace(args, num_updates=1)))  # not 10
    for _ in range(2):
        credit.main(credit.Args(("vanilla_pg.py",), prompts_per_step=2))
        monkeypatch.setattr(ppo, "main", None)
    assert "000001/critic" in (tmp_path / "runs/credit.html").read_text()
