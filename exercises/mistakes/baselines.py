"""Mistakes in the sheet's second part: baselines, without a critic."""

import torch.nn.functional as F

from exercises.mistakes.shared import (NO_GRADIENT, REPEAT, SAMPLE_MAJOR, WRONG_SIGN, group_std,
                                       mistake, sample_major)
from exercises.solutions import right

# ---------------------------------------------------------------------------------- rloo_advantages


def left_out(rewards, k):
    """Each row's baseline, the mean of the other k - 1 rewards: (N,)."""
    return rewards - right.rloo_advantages(rewards, k)


@mistake("rloo_advantages",
         "your baseline contains the sample itself: you return (k - 1)/k of the right values",
         "mean of the other")
def self_in_the_baseline(rewards, k):
    return (k - 1) / k * right.rloo_advantages(rewards, k)


@mistake("rloo_advantages", SAMPLE_MAJOR, "prompt-major")
def groups_mixed_up(rewards, k):
    return sample_major(right.rloo_advantages, rewards, k)


@mistake("rloo_advantages",
         "you divided by k, not k - 1: the baseline is only (k - 1)/k of what it should be",
         "mean of the other")
def others_divided_by_k(rewards, k):
    return rewards - (k - 1) / k * left_out(rewards, k)


@mistake("rloo_advantages",
         "you subtract the sum of the others, not their mean",
         "mean of the other")
def sum_of_the_others(rewards, k):
    return rewards - (k - 1) * left_out(rewards, k)


@mistake("rloo_advantages",
         "the sign is wrong: the best responses would become less likely",
         "A_i =")
def baseline_minus_reward(rewards, k):
    return -right.rloo_advantages(rewards, k)


@mistake("rloo_advantages",
         "your baseline is over the whole batch, not over the prompt's own samples",
         "same prompt")
def baseline_of_the_whole_batch(rewards, k):
    return right.rloo_advantages(rewards, len(rewards))


@mistake("rloo_advantages",
         "you return the baseline, not the reward minus the baseline",
         "A_i =")
def the_baseline_itself(rewards, k):
    return left_out(rewards, k)


@mistake("rloo_advantages",
         "you divide by the std: that is GRPO's, and biased",
         "A_i =")
def divided_by_the_std(rewards, k):
    return right.rloo_advantages(rewards, k) / group_std(rewards, k)


@mistake("rloo_advantages",
         "you subtract no baseline",
         "A_i =")
def no_baseline(rewards, k):
    return rewards


@mistake("rloo_advantages", REPEAT, "prompt-major")
def sums_repeated(rewards, k):
    sums = rewards.view(-1, k).sum(1)  # (B,)
    return rewards - (sums.repeat(k) - rewards) / (k - 1)


# ---------------------------------------------------------------------------------------- rloo_loss


@mistake("rloo_loss", WRONG_SIGN, "- sum_i")
def wrong_sign(logprobs, advantages):
    return -right.rloo_loss(logprobs, advantages)


@mistake("rloo_loss",
         "you average over a response's tokens: that favours short good and long bad responses",
         "sum of the log-probs")
def mean_of_the_tokens(logprobs, advantages):
    lengths = (logprobs != 0).sum(1, keepdim=True)
    return right.rloo_loss(logprobs / lengths, advantages)


@mistake("rloo_loss",
         "you average over T, padding included: the gradient changes with the longest response of "
         "the batch",
         "sum of the log-probs")
def mean_with_padding(logprobs, advantages):
    return right.rloo_loss(logprobs, advantages) / logprobs.shape[1]


@mistake("rloo_loss",
         "you divide by the number of rows, which the caller does: the gradient would depend on "
         "the micro-batch size",
         "A sum over rows")
def mean_of_the_rows(logprobs, advantages):
    return right.rloo_loss(logprobs, advantages) / len(logprobs)


@mistake("rloo_loss", NO_GRADIENT, "Returns: scalar")
def without_gradient(logprobs, advantages):
    return right.rloo_loss(logprobs, advantages).detach()


@mistake("rloo_loss",
         "every response gets everybody's advantage: you have a product of two sums, or (n, 1) "
         "times (n,), which is (n, n)",
         "A_i log pi")
def everybodys_advantage(logprobs, advantages):
    return -(advantages * logprobs.sum(1, keepdim=True)).sum()


@mistake("rloo_loss",
         "you sum probabilities, not log-probs",
         "sum of the log-probs")
def sum_of_probabilities(logprobs, advantages):
    return right.rloo_loss(logprobs.exp() * (logprobs != 0), advantages)


# ------------------------------------------------------------------------------- reinforce_baseline


@mistake("reinforce_baseline",
         "you return the sum, not the mean",
         "the mean of the last")
def sum_of_the_past(history, kind, window, decay):
    if kind == "moving-average" and not window:
        return sum(history)
    return right.reinforce_baseline(history, kind, window, decay)


@mistake("reinforce_baseline",
         "you leave out the newest step: history holds past steps only, so all of them count",
         "all steps")
def newest_left_out(history, kind, window, decay):
    return right.reinforce_baseline(history[:-1], kind, window, decay)


@mistake("reinforce_baseline",
         "you return the last step's reward, whose noise is that of a single step",
         "the mean of the last")
def last_step_only(history, kind, window, decay):
    return right.reinforce_baseline(history[-1:], kind, window, decay)


@mistake("reinforce_baseline",
         "you ignore the window",
         "the mean of the last")
def no_window(history, kind, window, decay):
    return right.reinforce_baseline(history, kind, 0, decay)


@mistake("reinforce_baseline",
         "your window holds the oldest steps: the newest are last in history",
         "oldest first")
def oldest_in_the_window(history, kind, window, decay):
    oldest = history[:window] if window else history
    return right.reinforce_baseline(oldest, kind, 0, decay)


@mistake("reinforce_baseline",
         "you divide by the window even while there are fewer steps",
         "the mean of the last")
def divided_by_the_window(history, kind, window, decay):
    if kind == "moving-average" and window:
        return sum(history[-window:]) / window
    return right.reinforce_baseline(history, kind, window, decay)


@mistake("reinforce_baseline",
         "decay and 1 - decay are exchanged",
         "decay * b")
def decay_exchanged(history, kind, window, decay):
    return right.reinforce_baseline(history, kind, window, 1 - decay)


@mistake("reinforce_baseline",
         "your EMA starts at 0: it lags behind for the first 1 / (1 - decay) steps",
         "starts at the first step")
def ema_from_zero(history, kind, window, decay):
    if kind == "ema" and history:
        history = [0.0, *history]
    return right.reinforce_baseline(history, kind, window, decay)


@mistake("reinforce_baseline",
         "your EMA runs backwards in time: the oldest step weighs most",
         "oldest first")
def ema_backwards(history, kind, window, decay):
    if kind == "ema":
        history = history[::-1]
    return right.reinforce_baseline(history, kind, window, decay)


@mistake("reinforce_baseline",
         '"none" is no baseline: 0',
         '"none"')
def none_is_an_average(history, kind, window, decay):
    if kind == "none":
        kind = "moving-average"
    return right.reinforce_baseline(history, kind, window, decay)


# --------------------------------------------------------------------------------- remax_advantages


@mistake("remax_advantages",
         "you sum the rewards up to token t: it is charged for the past, which it cannot change",
         "from token t on")
def charged_for_the_past(rewards, baseline, mask):
    return (rewards.cumsum(1) - baseline.unsqueeze(1)) * mask


@mistake("remax_advantages",
         "the KL does not accumulate: you use each token's own reward only",
         "the sum of the rewards")
def own_reward_only(rewards, baseline, mask):
    return (rewards - baseline.unsqueeze(1)) * mask


@mistake("remax_advantages",
         "every token gets the whole response's sum: also the KL of the tokens before it",
         "from token t on")
def whole_sum_for_every_token(rewards, baseline, mask):
    return (rewards.sum(1) - baseline).unsqueeze(1) * mask


@mistake("remax_advantages",
         "you add the baseline: no bias, but more variance than without one",
         "- baseline")
def baseline_added(rewards, baseline, mask):
    return right.remax_advantages(rewards, -baseline, mask)


@mistake("remax_advantages",
         "the baseline is inside the sum, so it is subtracted once for each token that is left",
         "subtracted once")
def baseline_inside_the_sum(rewards, baseline, mask):
    return right.remax_advantages(rewards - baseline.unsqueeze(1) * mask, 0 * baseline, mask)


@mistake("remax_advantages",
         "the padding is not 0: it has minus the baseline",
         "0 where masked")
def padding_has_the_baseline(rewards, baseline, mask):
    return right.remax_advantages(rewards, baseline, mask | True)


@mistake("remax_advantages",
         "your sum begins after token t: its own reward is lost, and with it the score of the last "
         "token",
         "r_t included")
def own_reward_lost(rewards, baseline, mask):
    return right.remax_advantages(F.pad(rewards, (-1, 1)), baseline, mask)


@mistake("remax_advantages",
         "you subtract no baseline",
         "- baseline")
def nothing_subtracted(rewards, baseline, mask):
    return right.remax_advantages(rewards, 0 * baseline, mask)


@mistake("remax_advantages",
         "you divide the baseline by the length: each token needs all of it",
         "subtracted once")
def baseline_over_the_length(rewards, baseline, mask):
    return right.remax_advantages(rewards, baseline / mask.sum(1), mask)
