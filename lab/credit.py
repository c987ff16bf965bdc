"""Show where each algorithm puts the credit: the same responses to one prompt under each, side by side on a page.

    python lab/credit.py
    python lab/credit.py rloo.py grpo.py "ppo.py --lam 0.5" --policy tasks/mini_tldr-sft

Each script's own `main` makes one update on the same responses (see lab/blackbox.py), so a copy that you have edited
can be shown too. A token's color is the number that multiplies the gradient of its log-prob, read where the gradient
arrives. Score, KL, baseline and advantage are the script's variables `scores`, `kl`, `baseline` (with a critic,
`old_values`) and `advantages`. An update on other prompts comes first, so that a baseline from past rewards has some.
dpo.py cannot be shown: it samples nothing.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import blackbox  # noqa: E402
from common import rollout  # noqa: E402
from plumbing import isolated_rng, load_model, load_module, load_tokenizer, one_line, require, stop  # noqa: E402
from runs import RunArgs, as_text, checkpoints, read_settings  # noqa: E402

SCRIPTS = ("rloo", "reinforce", "remax", "grpo", "reinforce_pp", "reinforce_pp_baseline", "vanilla_pg", "ppo", "raft")
ROLLOUT = ("model", "dataset", "train_split", "k", "prompts_per_step", "temperature", "max_new_tokens")
SHARED = {  # flags of a run that are for all scripts; the others are for its own script
    *ROLLOUT, "reference", "reward", "missing_eos_penalty", "critic", *(item.name for item in fields(RunArgs))}


@dataclass
class Args:
    scripts: tyro.conf.Positional[tuple[str, ...]] = tuple(f"{name}.py" for name in SCRIPTS)
    """scripts to show, each with its flags if it has any"""
    policy: str = "runs/credit-ppo"
    """run folder (policy and critic of its last checkpoint, and its flags) or policy (hub name or folder); the default
    is made by 10 updates of ppo.py, the first time"""
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


def read_policy(args):
    """Returns: flags, all that the run has if --policy is a run folder; and the name of its script, or None."""
    if not (Path(args.policy) / "args.json").exists():
        return {"model": args.policy, "reference": args.reference or "tasks/mini_tldr-sft"}, None
    settings, saved = read_settings(args.policy), checkpoints(Path(args.policy))
    require("k" in settings, f"--policy {args.policy}: a run of {settings['script']}.py, which samples no responses; "
                             f"name {args.policy}/model instead")
    require(saved, f"--policy {args.policy}: has no checkpoint yet")
    flags = settings | {"reference": args.reference or settings["reference"] or settings["model"],
                        "model": str(saved[-1] / "policy")}
    critic = saved[-1] / "critic"
    return flags | {"critic": str(critic) if critic.exists() else None}, settings["script"]


def sampler(flags, tokenizer):
    """The function (update, prompt_ids, k, greedy) -> Batch that gives every script the same responses."""
    policy, batches = load_model(flags.model, torch.device("cpu")), {}

    def given(update, prompt_ids, k, greedy):
        if (update, greedy) not in batches:
            with isolated_rng(flags.seed):
                batches[update, greedy] = rollout(policy, tokenizer, prompt_ids, k, flags.temperature,
                                                  flags.max_new_tokens, greedy=greedy)
        return batches[update, greedy]

    return given


def assign_credit(command, given, settings):
    """Run a script on the given responses. Returns: its module, its blackbox.Update, and its variables by name."""
    module, args = blackbox.parse(command, **settings)
    size, names = args.prompts_per_step, {}

    def note(frame, event, _):
        if event == "return" and frame.f_code.co_filename == module.__file__:
            names.update(frame.f_locals)  # main returns last, so its variables replace others of the same name

    sys.setprofile(note)
    try:
        (update,) = blackbox.run(command, given, warmup=1, **settings,
                                 rows=lambda update: range(-update * size, (1 - update) * size))
    finally:
        sys.setprofile(None)
    for name in ("examples", "scores", "kl"):
        require(name in names, f"{command}: its main has no variable {name}, so it cannot be shown")
    if "baseline" in names:  # one for all, or for each prompt, response or token
        baseline = torch.as_tensor(names["baseline"])
        rows = min(baseline.numel(), len(update.batch))
        baseline = baseline.reshape(rows, -1).repeat_interleave(len(update.batch) // rows, 0)  # (N, 1) or (N, T)
        names["baseline"] = baseline.expand_as(update.weights)
    update.weights *= update.batch.response_mask  # what flows into padding ends there
    return module, update, names


# ------------------------------------------------------------------------------------------------------------- the page

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
ol { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: .6rem 1.2rem;
     list-style: none; margin: .4rem 0; padding: 0; counter-reset: response; }
li { counter-increment: response; } li::before { content: "response " counter(response); }
li p { margin: 0; overflow-wrap: anywhere; }
data { display: inline-block; border-radius: 3px; padding: 0 .2em; margin-bottom: .15em; }
.up { background: rgb(var(--up) / var(--size)); } .down { background: rgb(var(--down) / var(--size)); }
#numbers:checked ~ main data::after { content: " " attr(value); font-size: .65rem; }
dl { display: flex; flex-wrap: wrap; gap: 0 .8rem; margin: 0; } dt, dd { display: inline; margin: 0; }
</style>
</head>
<body>
<h1>Credit assignment, token by token</h1>
<p>The same $k responses to one prompt under each algorithm. A token's color is the number that multiplies the gradient
of its log-probability: which way the update pushes this token, and how hard.</p>
<p>− less likely <span class="bar"></span> more likely +</p>
<p class="quiet">Each algorithm has its own scale: full color is its largest number here, no color is 0. One color for
a whole response: the response is the action. A drift: each token answers for the KL from there on. Changes from token
to token: a critic's opinion, or a KL term in the loss. Where a number below a response differs between its tokens, the
first and the last are given; for every token's, point at it or tick the box.</p>
<p><strong>Prompt</strong> $prompt</p>
<input type="checkbox" id="numbers"> <label for="numbers">show every token's multiplier</label>
<main>
$sections
</main>
<footer><p class="quiet">Policy $policy, reference $reference, critic $critic. Means and standard deviations of a batch
are over $prompts prompts with $k responses each. DPO has no place here: it samples nothing.</p></footer>
</body>
</html>
"""


def in_short(values):
    """A response's numbers (t,), one for each token, in a few characters."""
    first, last = f"{values[0]:z.3f}", f"{values[-1]:z.3f}"
    return first if values.amax() - values.amin() < 5e-4 else f"{first} … {last}"


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
    items = "".join(f"<div><dt>{name}</dt> <dd>{number}</dd></div>" for name, number in numbers.items())
    words = [escape(tokenizer.decode([token]).strip() or "␣") for token in update.batch.responses[row][mask].tolist()]
    tokens = [f'<data value="{weight:z.3f}" title="multiplier {weight:z.3f}, KL {part:z.3f}" '
              f'class="{"up" if weight > 0 else "down"}" style="--size:{abs(weight) / scale:.2f}">{word}</data>'
              for word, weight, part in zip(words, weights.tolist(), kl.tolist())]
    return f'<li><p>{" ".join(tokens)}</p><dl>{items}</dl></li>'


def show_script(command, module, update, names, rows, tokenizer):
    """One script as HTML: what the first lines of its docstrings say of its estimator, and the responses."""
    functions = [item for item in vars(module).values() if getattr(item, "__module__", None) == module.__name__]
    estimator = " ".join((getattr(module, "compute_advantages", functions[0]).__doc__ or "").split())
    title = (module.__doc__ or "").partition("\n")[0].partition(" (")[0]
    scale = update.weights[rows].abs().max().item()
    responses = "\n".join(show_response(row, update, names, tokenizer, scale or 1.0) for row in rows)
    return (f"<section><h2><code>{escape(command)}</code> {escape(title)}</h2>\n"
            f'<p class="quiet">{escape(estimator.partition(" Args:")[0])} Full color: ±{scale:.3f}.</p>\n'
            f"<ol>\n{responses}\n</ol></section>")


def main(args):
    require(args.prompt is None or 0 <= args.prompt < args.prompts_per_step,
            f"--prompt {args.prompt}: must be at least 0 and below --prompts-per-step {args.prompts_per_step}")
    for command in args.scripts:
        _, flags = blackbox.parse(command)
        require(hasattr(flags, "k"), f"{command}: samples no responses, so there is nothing to show")
    output = Path(args.output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
    except OSError as error:
        stop(f"--output {output}: cannot be written ({one_line(error)}); choose another file")
    if args.policy == Args.policy and not Path(args.policy).exists():
        ppo = load_module(str(ROOT / "ppo.py"))
        with redirect_stdout(None):
            ppo.main(ppo.Args(num_updates=10, eval_every=0, eval_prompts=1, save_every=0, output=args.policy))
    flags, script = read_policy(args)
    flags |= {"k": args.k, "prompts_per_step": args.prompts_per_step, "seed": args.seed,
              "device": "cpu", "dtype": "float32", "shard": False, "output": None, "gold": "none",
              "train_split": flags.get("test_split", "test")}  # prompts that the policy has not been trained on
    jobs = {command: {name: value for name, value in flags.items() if name in SHARED or command.split(".")[0] == script}
            for command in args.scripts}
    parsed = {command: blackbox.parse(command, **settings)[1] for command, settings in jobs.items()}
    first = next(iter(parsed.values()))
    for command, other in parsed.items():
        for name in ROLLOUT:
            require(getattr(other, name) == getattr(first, name), f"{command}: all scripts get the same responses, so "
                                                                  f"--{name.replace('_', '-')} must be the same")
    tokenizer = load_tokenizer(first.model)
    given = sampler(first, tokenizer)
    found = {command: assign_credit(command, given, settings) for command, settings in tqdm(jobs.items(), "scripts")}

    _, _, names = next(iter(found.values()))
    scores = names["scores"].view(-1, args.k)  # (B, k)
    ranges = scores.amax(1) - scores.amin(1)  # (B,)
    prompt = ranges.median(0).indices.item() if args.prompt is None else args.prompt
    rows = [prompt * args.k + sample for sample in scores[prompt].argsort(descending=True).tolist()]  # best first
    sections = [show_script(command, *parts, rows, tokenizer) for command, parts in found.items()]
    output.write_text(Template(PAGE).substitute(
        k=args.k, prompts=args.prompts_per_step, prompt=escape(as_text(names["examples"]["prompt"][prompt])),
        sections="\n".join(sections), policy=escape(first.model), reference=escape(first.reference),
        critic=escape(flags.get("critic") or "new")), encoding="utf-8")
    print(f"open {output} in a browser")


if __name__ == "__main__":
    main(tyro.cli(Args))
