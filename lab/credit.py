"""Show where each algorithm puts the credit: the same responses under each, side by side on a page.

    python -m lab.credit
    python -m lab.credit rloo.py grpo.py "ppo.py --lam 0.5" --policy tasks/mini_tldr-sft

Each script's own `main` makes one update on the same responses (see lab/blackbox.py), so a copy
that you have edited can be shown too. A token's color is the number that multiplies the gradient of
its log-prob, read where the gradient arrives. Score, KL, baseline and advantage are the script's
variables `scores`, `kl`, `baseline` (with a critic, `old_values`) and `advantages`, as they are
when its main ends; where there is none of such a name, the page says so. An update on other prompts
comes first, so that a baseline from past rewards has some. dpo.py cannot be shown: it samples
nothing.
"""

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from html import escape
from pathlib import Path
from string import Template

import torch
import tyro
from tqdm import tqdm

from common import rollout
from lab import blackbox
from lab.family import FAMILY, SAMPLING
from plumbing import (RunArgs, as_text, checkpoints, isolated_rng, load_model, load_module,
                      load_tokenizer, one_line, read_settings, require, stop)

ROOT = Path(__file__).resolve().parent.parent
ROLLOUT = ("model", "dataset", "train_split", "k", "prompts_per_step", "temperature",
           "max_new_tokens")
SHARED = {  # flags of a run that are for all scripts; the others are for its own script
    *ROLLOUT, "max_rounds", "reference", "reward", "missing_eos_penalty", "critic",
    *(item.name for item in fields(RunArgs))}


@dataclass
class Args:
    scripts: tyro.conf.Positional[tuple[str, ...]] = tuple(
        f"{name}.py" for name in SAMPLING if not FAMILY[name].binary)
    """scripts to show, each with its flags if it has any; default: all whose scores need not be 0
    or 1"""
    policy: str = "runs/credit-ppo"
    """run folder (policy and critic of its last checkpoint, and its flags) or policy (hub name or
    folder); the default is made by 10 updates of ppo.py, the first time"""
    reference: str | None = None
    """reference policy for the KL; default: that of the run, or tasks/mini_tldr-sft"""
    k: int = 4
    """responses per prompt"""
    prompts_per_step: int = 16
    """held-out prompts in the batch; some algorithms normalize over all of it"""
    prompt: int | None = None
    """which of them to show, from 0; default: the median by the range of its responses' scores"""
    seed: int = 1
    """random seed for sampling"""
    output: str = "runs/credit.html"
    """the page"""


# --------------------------------------------------------------------------------- policy and flags


def make_policy(folder):
    """Make the default policy and its critic: 10 updates of ppo.py into a run folder."""
    ppo = load_module(str(ROOT / "ppo.py"))
    with redirect_stdout(None):
        ppo.main(ppo.Args(num_updates=10, eval_every=0, eval_prompts=1, save_every=0,
                          output=folder))


def read_policy(args):
    """Flags that --policy gives, all that the run has if it is a run folder; and its script.

    Returns: dict, and the name of the run's script, or None.
    """
    if not (Path(args.policy) / "args.json").exists():
        reference = args.reference or "tasks/mini_tldr-sft"
        return {"model": args.policy, "reference": reference}, None
    settings, saved = read_settings(args.policy), checkpoints(args.policy)
    require("k" in settings, f"--policy {args.policy}: a run of {settings['script']}.py, which "
                             f"samples no responses; name {args.policy}/model instead")
    require(saved, f"--policy {args.policy}: has no checkpoint yet")
    critic = saved[-1] / "critic"
    reference = args.reference or settings["reference"] or settings["model"]
    found = {"model": str(saved[-1] / "policy"), "reference": reference,
             "critic": str(critic) if critic.exists() else None}
    return settings | found, settings["script"]


def settings_of(args):
    """Each script's settings, which replace its defaults: dict command -> dict of flags."""
    flags, script = read_policy(args)
    flags |= {"k": args.k, "prompts_per_step": args.prompts_per_step, "seed": args.seed,
              "max_rounds": 1,  # the responses are given; there are no others
              "device": "cpu", "dtype": "float32", "shard": False, "output": None, "gold": "none",
              "train_split": flags.get("test_split", "test")}  # prompts it was not trained on
    shared = {name: value for name, value in flags.items() if name in SHARED}
    return {command: flags if command.split(".")[0] == script else shared
            for command in args.scripts}


def common_flags(jobs):
    """The flags of the rollout, which must be the same in all scripts: the first one's Args."""
    parsed = {command: blackbox.parse(command, **settings)[1]
              for command, settings in jobs.items()}
    first = next(iter(parsed.values()))
    for command, other in parsed.items():
        for name in ROLLOUT:
            require(getattr(other, name) == getattr(first, name),
                    f"{command}: all scripts get the same responses, so "
                    f"--{name.replace('_', '-')} must be the same")
    return first


def sampler(flags, tokenizer):
    """The function (update, prompt_ids, k, greedy) -> Batch: the same responses for all scripts."""
    policy, batches = load_model(flags.model, torch.device("cpu")), {}

    def given(update, prompt_ids, k, greedy):
        if (update, greedy) not in batches:
            with isolated_rng(flags.seed):
                batches[update, greedy] = rollout(policy, tokenizer, prompt_ids, k,
                                                  flags.temperature, flags.max_new_tokens,
                                                  greedy=greedy)
        return batches[update, greedy]

    return given


# ------------------------------------------------------------------------------------- the numbers


def assign_credit(command, given, settings):
    """Run a script on the given responses.

    Returns: its module, its blackbox.Update, and its variables by name.
    """
    module, args = blackbox.parse(command, **settings)
    size, names = args.prompts_per_step, {}

    def note(frame, event, _):
        """Keep main's variables when it returns, and those called baseline of its functions."""
        code, found = frame.f_code, frame.f_locals
        if event == "return" and code.co_filename == module.__file__:
            names.update({name: value for name, value in found.items()
                          if code.co_name == "main" or name == "baseline"})

    sys.setprofile(note)
    try:
        rows = lambda update: range(-update * size, (1 - update) * size)
        (update,) = blackbox.run(command, given, warmup=1, rows=rows, **settings)
    finally:
        sys.setprofile(None)
    for name in ("examples", "scores", "kl"):
        require(name in names,
                f"{command}: its main has no variable {name}, so it cannot be shown")
    if "baseline" in names:
        names["baseline"] = by_token(names["baseline"], update.weights)
    update.weights *= update.batch.response_mask  # what flows into padding ends there
    return module, update, names


def by_token(baseline, like):
    """A baseline, one for all or for each prompt, response or token, as (N, T)."""
    baseline, N = torch.as_tensor(baseline), len(like)
    rows = min(baseline.numel(), N)
    return baseline.reshape(rows, -1).repeat_interleave(N // rows, 0).expand_as(like)


def choose_rows(scores, prompt):
    """The rows to show, best first: those of one prompt, or of the median by the scores' range.

    Args: scores (B, k); prompt (number, or None). Returns: the prompt's number, list of k rows.
    """
    ranges = scores.amax(1) - scores.amin(1)  # (B,)
    prompt = ranges.median(0).indices.item() if prompt is None else prompt
    samples = scores[prompt].argsort(descending=True).tolist()
    return prompt, [prompt * scores.shape[1] + sample for sample in samples]


# ---------------------------------------------------------------------------------------- the page


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Credit assignment</title>
<style>
:root { color-scheme: light dark; --up: 240 140 30; --down: 70 140 240; --quiet: #666; }
@media (prefers-color-scheme: dark) { :root { --up: 176 84 0; --down: 36 92 200; --quiet: #aaa; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 0; } p { margin: .4rem 0; }
section { border-top: 1px solid #8886; padding: .6rem 0; }
.quiet, dl, li::before { color: var(--quiet); font-size: .85rem; }
.bar { display: inline-block; vertical-align: middle; width: 9rem; height: 1rem; border-radius: 3px;
       background: linear-gradient(90deg, rgb(var(--down)), transparent, rgb(var(--up))); }
ol { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr));
     gap: .6rem 1.2rem; list-style: none; margin: .4rem 0; padding: 0; counter-reset: response; }
li { counter-increment: response; } li::before { content: "response " counter(response); }
li p { margin: 0; overflow-wrap: anywhere; }
data { display: inline-block; border-radius: 3px; padding: 0 .2em; margin-bottom: .15em; }
.up { background: rgb(var(--up) / var(--size)); }
.down { background: rgb(var(--down) / var(--size)); }
#numbers:checked ~ main data::after { content: " " attr(value); font-size: .65rem; }
dl { display: flex; flex-wrap: wrap; gap: 0 .8rem; margin: 0; }
dt, dd { display: inline; margin: 0; }
</style>
</head>
<body>
<h1>Credit assignment, token by token</h1>
<p>The same $k responses to one prompt under each algorithm. A token's color is the number that
multiplies the gradient of its log-probability: which way the update pushes this token, and how
hard.</p>
<p>− less likely <span class="bar"></span> more likely +</p>
<p class="quiet">Each algorithm has its own scale: full color is its largest number here, no color
is 0. One color for a whole response: the response is the action. A drift: each token answers for
the KL from there on. Changes from token to token: a critic's opinion, or a KL term in the loss.
Where a number below a response differs between its tokens, the first and the last are given; for
every token's, point at it or tick the box.</p>
<p><strong>Prompt</strong> $prompt</p>
<input type="checkbox" id="numbers"> <label for="numbers">show every token's multiplier</label>
<main>
$sections
</main>
<footer><p class="quiet">Policy $policy, reference $reference, critic $critic. Means and standard
deviations of a batch are over $prompts prompts with $k responses each. DPO has no place here: it
samples nothing.</p></footer>
</body>
</html>
"""


def in_short(values):
    """A response's numbers (t,), one for each token, in a few characters."""
    first, last = f"{values[0]:z.3f}", f"{values[-1]:z.3f}"
    return first if values.amax() - values.amin() < 5e-4 else f"{first} … {last}"


def not_shown(names):
    """What the page says of numbers that a script has no variable for."""
    wanted = {"baseline": ["baseline", "old_values"], "advantage": ["advantages"]}
    return "".join(f" No {number} is shown: there is no variable {' or '.join(variables)}."
                   for number, variables in wanted.items() if not names.keys() & variables)


def show_response(row, update, names, tokenizer, scale):
    """One response as HTML: its tokens, colored, and its numbers."""
    mask = update.batch.response_mask[row]  # (T,), with t True
    weights, kl = update.weights[row][mask], names["kl"][row][mask]  # (t,)
    numbers = {"score": f"{names['scores'][row]:z.3f}", "KL": f"{kl.sum():z.3f}"}
    if "old_values" in names:
        numbers["value"] = in_short(names["old_values"][row][mask])
    elif "baseline" in names:
        numbers["baseline"] = in_short(names["baseline"][row][mask])
    if "advantages" in names:  # (N,) or (N, T)
        numbers["advantage"] = in_short(names["advantages"][row].expand(len(mask))[mask])
    numbers["multiplier"] = in_short(weights)
    items = "".join(f"<div><dt>{name}</dt> <dd>{number}</dd></div>"
                    for name, number in numbers.items())
    tokens = [show_token(tokenizer.decode([token]), *pair, scale) for token, *pair in zip(
        update.batch.responses[row][mask].tolist(), weights.tolist(), kl.tolist())]
    return f'<li><p>{" ".join(tokens)}</p><dl>{items}</dl></li>'


def show_token(word, weight, kl, scale):
    """A token as HTML: its color is its multiplier as a share of the scale."""
    color, share = "up" if weight > 0 else "down", abs(weight) / scale
    return (f'<data value="{weight:z.3f}" title="multiplier {weight:z.3f}, KL {kl:z.3f}" '
            f'class="{color}" style="--size:{share:.2f}">{escape(word.strip() or "␣")}</data>')


def show_script(command, module, update, names, rows, tokenizer):
    """One script as HTML: the first lines of its estimator's docstrings, and the responses."""
    functions = [item for item in vars(module).values()
                 if getattr(item, "__module__", None) == module.__name__]
    estimator = getattr(module, "compute_advantages", functions[0]).__doc__ or ""
    estimator = " ".join(estimator.split()).partition(" Args:")[0]
    title = (module.__doc__ or "").partition("\n")[0].partition(" (")[0].rstrip(".")
    scale = update.weights[rows].abs().max().item()
    responses = "\n".join(show_response(row, update, names, tokenizer, scale or 1.0)
                          for row in rows)
    return (f"<section><h2><code>{escape(command)}</code> {escape(title)}</h2>\n"
            f'<p class="quiet">{escape(estimator)} Full color: ±{scale:.3f}.{not_shown(names)}'
            f"</p>\n<ol>\n{responses}\n</ol></section>")


# --------------------------------------------------------------------------------------------- main


def check_args(args):
    """Exit with a one-line error if a flag has an invalid value, or the page cannot be written."""
    require(args.prompt is None or 0 <= args.prompt < args.prompts_per_step,
            f"--prompt {args.prompt}: must be at least 0 and below --prompts-per-step "
            f"{args.prompts_per_step}")
    for command in args.scripts:
        _, flags = blackbox.parse(command)
        require(hasattr(flags, "k"), f"{command}: samples no responses, so there is nothing to "
                                     "show")
    output = Path(args.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
    except OSError as error:
        stop(f"--output {output}: cannot be written ({one_line(error)}); choose another file")


def main(args):
    check_args(args)
    if args.policy == Args.policy and not Path(args.policy).exists():
        make_policy(args.policy)
    jobs = settings_of(args)
    flags = common_flags(jobs)
    tokenizer = load_tokenizer(flags.model)
    given = sampler(flags, tokenizer)
    found = {command: assign_credit(command, given, settings)
             for command, settings in tqdm(jobs.items(), "scripts")}

    _, _, names = next(iter(found.values()))
    prompt, rows = choose_rows(names["scores"].view(-1, args.k), args.prompt)
    sections = [show_script(command, *parts, rows, tokenizer) for command, parts in found.items()]
    critic = next(iter(jobs.values())).get("critic") or "new"
    text = Template(PAGE).substitute(
        k=args.k, prompts=args.prompts_per_step, sections="\n".join(sections),
        prompt=escape(as_text(names["examples"]["prompt"][prompt])), policy=escape(flags.model),
        reference=escape(flags.reference), critic=escape(critic))
    Path(args.output).write_text(text, encoding="utf-8")
    print(f"open {args.output} in a browser")


if __name__ == "__main__":
    main(tyro.cli(Args))
