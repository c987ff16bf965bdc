"""What a run tells: tables, warnings, and the evaluations before and after."""

import math
import sys

from tqdm import tqdm

from plumbing.processes import is_first
from plumbing.rewards import as_text

PATIENCE = 20  # updates


def warn_if_collapsed(state, metrics, max_new_tokens):
    """Warn once if the policy has been degenerate for many updates in a row.

    Counts are in state["extremes"].
    """
    length, entropy = metrics["rollout/length"].item(), metrics["objective/entropy"].item()
    extremes = {
        "no response has ended with EOS: all are truncated, so the reward only sees beginnings; "
        "raise --max-new-tokens or --missing-eos-penalty": metrics["rollout/eos_rate"].item() == 0,
        "every response is empty: ending at once is what reward and KL penalty favor; check the "
        "reward of an empty text": length <= 1 < max_new_tokens,
        "the entropy is close to 0: the policy writes the same response again and again, so there "
        "is nothing left to compare; raise --beta or --temperature, or lower --lr":
            entropy < 0.01 * length and length > 1,
    }
    counts = state.setdefault("extremes", {})
    for message, extreme in extremes.items():
        counts[message] = counts.get(message, 0) + 1 if extreme else min(0, counts.get(message, 0))
        if counts[message] == PATIENCE:
            counts[message] = -math.inf  # once
            if is_first():
                tqdm.write(f"warning: for {PATIENCE} updates, {message}", file=sys.stderr)


def table(header, rows):
    """A Markdown table, which TensorBoard's text tab renders."""
    clean = lambda cell: str(cell).replace("|", "\\|").replace("\n", "<br>")
    lines = [header, ["---"] * len(header), *([clean(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_evaluations(prompt, before, after):
    """Print the means of two evaluations side by side, and a response to `prompt` of each.

    Args: prompt (of the first response); before and after (as `evaluate` returns them).
    Returns: dict of the two, each a dict name -> mean.
    """
    means = [{name: value.nanmean().item() for name, value in values.items()}
             for values, _ in (before, after)]
    print(f"\n{'held-out prompts':<20}{'before':>10}{'after':>10}")
    for name in means[0]:
        print(f"{name:<20}{means[0][name]:>z10.3f}{means[1][name]:>z10.3f}")
    print(f"\nprompt   {as_text(prompt)}\nbefore   {before[1][0]}\nafter    {after[1][0]}")
    return dict(zip(("before", "after"), means))
