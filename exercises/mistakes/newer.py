"""Mistakes in the sheet's fourth part: MaxRL, GSPO, CISPO and DAPO's mean over tokens."""

import torch

from exercises.mistakes.shared import (NO_GRADIENT, SAMPLE_MAJOR, WRONG_SIGN, group_std, mistake,
                                       sample_major)
from exercises.solutions import INF, right

UPSIDE_DOWN = "your ratio is upside down: pi_old / pi"
MAX = "max instead of min: you take the optimistic of the two terms, so the clip holds nothing back"
BOUNDS = "the bounds are exchanged: clip_low is below 1, clip_high above"
SYMMETRIC = "you use clip_low on both sides: above 1 it is clip_high"
CLIPPED_ALONE = ("you use the clipped term alone: what went too far the wrong way could never come "
                 "back")


def negated(function, logprobs, old_logprobs, advantages, *rest):
    """Minus a loss of minus the advantages: its max is a min, and the other way round."""
    found = function(logprobs, old_logprobs, -advantages, *rest)
    return (-found[0], found[1]) if isinstance(found, tuple) else -found


def token_ratios(logprobs, old_logprobs, mask):
    return (logprobs - old_logprobs).exp() * mask


# --------------------------------------------------------------------------------- maxrl_advantages


def means(rewards, k):
    """Each row's mean over its prompt: (N,)."""
    return rewards.view(-1, k).mean(1).repeat_interleave(k)


@mistake("maxrl_advantages",
         "a prompt whose responses all fail gives 0 / 0",
         "or 0 if all")
def zero_over_zero(rewards, k):
    mean = means(rewards, k)
    return (rewards - mean) / mean


@mistake("maxrl_advantages",
         "you divide by the std: that is GRPO's, and climbs another function of p",
         "/ mean")
def divided_by_the_std(rewards, k):
    return (rewards - means(rewards, k)) / (group_std(rewards, k) + 1e-4)


@mistake("maxrl_advantages",
         "you never divide by the mean: that is RLOO's up to a factor, and climbs p",
         "/ mean")
def never_divided(rewards, k):
    return rewards - means(rewards, k)


@mistake("maxrl_advantages",
         "you subtract no mean: on average that is log p cut off one term later",
         "(r_i - mean)")
def nothing_subtracted(rewards, k):
    return rewards / means(rewards, k).clamp(min=1 / k)


@mistake("maxrl_advantages",
         "the mean that you subtract leaves the response out: you return k/(k - 1) of the right "
         "values",
         "r_i included")
def self_left_out(rewards, k):
    return k / (k - 1) * right.maxrl_advantages(rewards, k)


@mistake("maxrl_advantages",
         "you divide by the sum of the rewards, not by their mean",
         "/ mean")
def divided_by_the_sum(rewards, k):
    return right.maxrl_advantages(rewards, k) / k


@mistake("maxrl_advantages",
         "your mean is over the whole batch, not over the prompt's own samples",
         "same prompt")
def mean_of_the_batch(rewards, k):
    return right.maxrl_advantages(rewards, len(rewards))


@mistake("maxrl_advantages",
         "you add 1e-4 to the mean, as GRPO does to the std: here only a mean of 0 is special",
         "or 0 if all")
def something_added(rewards, k):
    mean = means(rewards, k)
    return (rewards - mean) / (mean + 1e-4)


@mistake("maxrl_advantages", SAMPLE_MAJOR, "prompt-major")
def groups_mixed_up(rewards, k):
    return sample_major(right.maxrl_advantages, rewards, k)


# ---------------------------------------------------------------------------------------- gspo_loss


def clipped(ratio, advantages, clip_low, clip_high, loss=lambda free, bounded: torch.min(
        free, bounded)):
    """A clipped loss of any ratio and advantages that fit, and where it is clipped."""
    free, bounded = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -loss(free, bounded).sum(), bounded < free


def gspo_of(ratio):
    """A gspo_loss with another ratio (n,), a function of the tokens' log-ratios and the mask."""
    def gspo_loss(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
        loss, where = clipped(ratio(logprobs - old_logprobs, mask), advantages, clip_low, clip_high)
        return loss, (where * mask.sum(1)).sum()
    return gspo_loss


@mistake("gspo_loss",
         "you use a ratio for every token: that is GRPO's, here a response has one",
         "one ratio per response")
def ratio_of_each_token(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    loss, where = clipped(token_ratios(logprobs, old_logprobs, mask),
                          advantages.unsqueeze(1) * mask, clip_low, clip_high)
    return loss, where.sum()


@mistake("gspo_loss",
         "the power 1/|y_i| is missing: yours is the importance weight of the whole response",
         "to the power of")
def power_missing(*given):
    return gspo_of(lambda log_ratios, mask: log_ratios.sum(1).exp())(*given)


@mistake("gspo_loss",
         "your power is 1/T, padding included: the ratio changes with the longest response of the "
         "batch",
         "number of real tokens")
def power_with_padding(*given):
    return gspo_of(lambda log_ratios, mask: log_ratios.mean(1).exp())(*given)


@mistake("gspo_loss",
         "you average the tokens' ratios: the power 1/|y_i| of their product is the mean of their "
         "logs",
         "to the power of")
def mean_of_the_ratios(*given):
    return gspo_of(lambda log_ratios, mask: (log_ratios.exp() * mask).sum(1) / mask.sum(1))(*given)


@mistake("gspo_loss", UPSIDE_DOWN, "pi(y_i) / pi_old(y_i)")
def gspo_upside_down(logprobs, old_logprobs, *rest):
    return right.gspo_loss(old_logprobs, logprobs, *rest)


@mistake("gspo_loss", WRONG_SIGN, "- sum_i")
def gspo_of_the_wrong_sign(*given):
    loss, count = right.gspo_loss(*given)
    return -loss, count


@mistake("gspo_loss", MAX, "min( s_i")
def gspo_max(*given):
    return negated(right.gspo_loss, *given)


@mistake("gspo_loss", CLIPPED_ALONE, "min( s_i")
def gspo_clipped_alone(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    ratio = ((logprobs - old_logprobs).sum(1) / mask.sum(1)).exp()
    loss, _ = clipped(ratio, advantages, clip_low, clip_high, lambda free, bounded: bounded)
    return loss, right.gspo_loss(logprobs, old_logprobs, advantages, mask, clip_low, clip_high)[1]


@mistake("gspo_loss", BOUNDS, "1 - clip_low")
def gspo_bounds_exchanged(*given):
    *given, clip_low, clip_high = given
    return right.gspo_loss(*given, clip_high, clip_low)


@mistake("gspo_loss", SYMMETRIC, "1 - clip_low")
def gspo_symmetric(*given):
    *given, clip_low, _ = given
    return right.gspo_loss(*given, clip_low, clip_low)


@mistake("gspo_loss",
         "you count clipped responses: their tokens are wanted",
         "the number of tokens in")
def responses_counted(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    given = (logprobs, old_logprobs, advantages, mask, clip_low, clip_high)
    ratio = ((logprobs - old_logprobs).sum(1) / mask.sum(1)).exp()
    return right.gspo_loss(*given)[0], clipped(ratio, advantages, clip_low, clip_high)[1].sum()


@mistake("gspo_loss",
         "you divide by the number of rows, which the caller does",
         "A sum over rows")
def gspo_mean_of_the_rows(logprobs, *rest):
    loss, count = right.gspo_loss(logprobs, *rest)
    return loss / len(logprobs), count


@mistake("gspo_loss", NO_GRADIENT, "scalar with gradients")
def gspo_without_gradient(*given):
    loss, count = right.gspo_loss(*given)
    return loss.detach(), count


# --------------------------------------------------------------------------------------- cispo_loss


def cispo_of(weight):
    """A cispo_loss with other weights (n, T), a function of the tokens' ratios and max_ratio."""
    def cispo_loss(logprobs, old_logprobs, advantages, mask, max_ratio):
        ratio = (logprobs - old_logprobs).exp()
        gain = weight(ratio, max_ratio) * advantages.unsqueeze(1) * logprobs * mask
        return -gain.sum(), ((ratio > max_ratio) & mask).sum()
    return cispo_loss


@mistake("cispo_loss",
         "the weight carries gradients: it is a constant, so detach it",
         "is a constant")
def weight_with_gradients(*given):
    return cispo_of(lambda ratio, most: ratio.clamp(max=most))(*given)


@mistake("cispo_loss",
         "that is PPO's loss: a token above the limit has no gradient any more",
         "No token loses")
def clipped_as_in_ppo(logprobs, old_logprobs, advantages, mask, max_ratio):
    return right.dapo_loss(logprobs, old_logprobs, advantages, mask, INF, max_ratio - 1, 1), (
        right.cispo_loss(logprobs, old_logprobs, advantages, mask, max_ratio)[1])


@mistake("cispo_loss",
         "you drop the tokens above the limit: they keep their gradient, with the weight max_ratio",
         "No token loses")
def dropped_above_the_limit(*given):
    return cispo_of(lambda ratio, most: ratio.detach() * (ratio <= most))(*given)


@mistake("cispo_loss",
         "log pi is missing: the weight is a constant, so nothing carries a gradient",
         "log pi(y_it)")
def log_pi_missing(logprobs, old_logprobs, advantages, mask, max_ratio):
    ratio = token_ratios(logprobs, old_logprobs, mask)
    _, count = right.cispo_loss(logprobs, old_logprobs, advantages, mask, max_ratio)
    return -(ratio.detach().clamp(max=max_ratio) * advantages.unsqueeze(1)).sum(), count


@mistake("cispo_loss",
         "you cut off at 1 + max_ratio: max_ratio is the bound itself",
         "w_it =")
def one_too_high(*given):
    *given, max_ratio = given
    return right.cispo_loss(*given, 1 + max_ratio)


@mistake("cispo_loss",
         "nothing is cut off",
         "w_it =")
def no_limit(*given):
    *given, max_ratio = given
    return right.cispo_loss(*given, INF)[0], right.cispo_loss(*given, max_ratio)[1]


@mistake("cispo_loss",
         "the weights are missing, or always 1: that is right only while pi_old is pi",
         "w_it A_i")
def no_weights(*given):
    return cispo_of(lambda ratio, most: torch.ones_like(ratio))(*given)


@mistake("cispo_loss", UPSIDE_DOWN, "pi(y_it) / pi_old(y_it)")
def cispo_upside_down(*given):
    return (cispo_of(lambda ratio, most: (1 / ratio).detach().clamp(max=most))(*given)[0],
            right.cispo_loss(given[1], given[0], *given[2:])[1])


@mistake("cispo_loss", WRONG_SIGN, "- sum_it")
def cispo_of_the_wrong_sign(*given):
    loss, count = right.cispo_loss(*given)
    return -loss, count


@mistake("cispo_loss",
         "you divide by the number of tokens, which the caller does: the gradient would depend on "
         "the micro-batch size",
         "A sum over rows")
def cispo_mean_of_the_tokens(*given):
    loss, count = right.cispo_loss(*given)
    return loss / given[3].sum(), count


# ---------------------------------------------------------------------------------------- dapo_loss


@mistake("dapo_loss",
         "you divide by the tokens of these rows: a token of a small micro-batch would weigh more",
         "num_tokens counts")
def tokens_of_the_micro_batch(*given):
    *given, _ = given
    return right.dapo_loss(*given, given[3].sum())


@mistake("dapo_loss",
         "you divide by the number of rows: that is another algorithm's mean",
         "1/num_tokens")
def divided_by_the_rows(*given):
    *given, _ = given
    return right.dapo_loss(*given, len(given[0]))


@mistake("dapo_loss",
         "you average over T, padding included: the gradient changes with the longest response of "
         "the batch",
         "1/num_tokens")
def mean_with_padding(*given):
    *given, _ = given
    return right.dapo_loss(*given, given[0].numel())


@mistake("dapo_loss",
         "you average within each response first: that is GRPO's mean, in which the tokens of long "
         "responses weigh less",
         "a token has the same weight")
def mean_of_the_responses(*given):
    *given, _ = given
    rows = [given[0].split(1), given[1].split(1), given[2].split(1), given[3].split(1)]
    losses = [right.dapo_loss(*row, *given[4:], row[3].sum()) for row in zip(*rows)]
    return torch.stack(losses).mean()


@mistake("dapo_loss",
         "you do not divide",
         "1/num_tokens")
def not_divided(*given):
    *given, _ = given
    return right.dapo_loss(*given, 1)


@mistake("dapo_loss",
         "the padding has an advantage: its ratio is 1, and it counts",
         "0 where masked")
def padding_has_an_advantage(*given):
    return right.dapo_loss(*given[:3], given[3] | True, *given[4:])


@mistake("dapo_loss", BOUNDS, "1 - clip_low")
def dapo_bounds_exchanged(*given):
    *given, clip_low, clip_high, num_tokens = given
    return right.dapo_loss(*given, clip_high, clip_low, num_tokens)


@mistake("dapo_loss", SYMMETRIC, "1 - clip_low")
def dapo_symmetric(*given):
    *given, clip_low, _, num_tokens = given
    return right.dapo_loss(*given, clip_low, clip_low, num_tokens)


@mistake("dapo_loss", MAX, "min( ratio_it")
def dapo_max(*given):
    return negated(right.dapo_loss, *given)


@mistake("dapo_loss", CLIPPED_ALONE, "min( ratio_it")
def dapo_clipped_alone(logprobs, old_logprobs, advantages, mask, clip_low, clip_high, num_tokens):
    loss, _ = clipped(token_ratios(logprobs, old_logprobs, mask), advantages.unsqueeze(1) * mask,
                      clip_low, clip_high, lambda free, bounded: bounded)
    return loss / num_tokens


@mistake("dapo_loss",
         "you use one ratio for the whole response: that is GSPO's",
         "for every token")
def ratio_of_the_response(logprobs, old_logprobs, advantages, mask, clip_low, clip_high,
                          num_tokens):
    ratio = ((logprobs - old_logprobs).sum(1) / mask.sum(1)).exp()
    loss, _ = clipped(ratio.unsqueeze(1), advantages.unsqueeze(1) * mask, clip_low, clip_high)
    return loss / num_tokens


@mistake("dapo_loss", WRONG_SIGN, "- 1/num_tokens")
def dapo_of_the_wrong_sign(*given):
    return -right.dapo_loss(*given)


@mistake("dapo_loss", NO_GRADIENT, "Returns: scalar")
def dapo_without_gradient(*given):
    return right.dapo_loss(*given).detach()
