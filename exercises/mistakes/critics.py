"""Mistakes in the sheet's third part: with a critic and a ratio."""

import torch
import torch.nn.functional as F

from exercises.mistakes.masks import placed
from exercises.mistakes.shared import NO_GRADIENT, TIMES_ZERO, WRONG_SIGN, mistake
from exercises.solutions import INF, right

# ----------------------------------------------------------------------------------- ppo_advantages


def deltas(rewards, values, mask, gamma):
    return right.ppo_advantages(rewards, values, mask, gamma, 0.0)[0]


def accumulated(delta, values, mask, decay):
    """Advantages and returns from given deltas."""
    advantages = right.ppo_advantages(delta, torch.zeros_like(delta), mask, decay, 1.0)[0]
    return advantages, (advantages + values) * mask


@mistake("ppo_advantages",
         "you ignore lam",
         "A_t =")
def lam_ignored(rewards, values, mask, gamma, lam):
    return right.ppo_advantages(rewards, values, mask, gamma, 1.0)


@mistake("ppo_advantages",
         "you ignore gamma",
         "delta_t =")
def gamma_ignored(rewards, values, mask, gamma, lam):
    return right.ppo_advantages(rewards, values, mask, 1.0, lam)


@mistake("ppo_advantages",
         "these are the deltas: nothing accumulates from later tokens",
         "A_t =")
def deltas_only(rewards, values, mask, gamma, lam):
    return right.ppo_advantages(rewards, values, mask, gamma, 0.0)


@mistake("ppo_advantages",
         "your delta has V_t twice: the first has to be V_{t+1}, that of the next state",
         "delta_t =")
def own_value_twice(rewards, values, mask, gamma, lam):
    return accumulated(rewards + (gamma - 1) * values, values, mask, gamma * lam)


@mistake("ppo_advantages",
         "the values are shifted by one token: you read V after the action, which it must not see",
         "before token t")
def values_after_the_action(rewards, values, mask, gamma, lam):
    return right.ppo_advantages(rewards, F.pad(values, (-1, 1)), mask, gamma, lam)


@mistake("ppo_advantages",
         "the last token bootstraps from its own V: after the last token there is no value",
         "After the last real token")
def own_value_at_the_end(rewards, values, mask, gamma, lam):
    is_last = placed(torch.ones(len(mask)), mask)
    return right.ppo_advantages(rewards + gamma * values * is_last, values, mask, gamma, lam)


@mistake("ppo_advantages",
         "A_{t+1} is multiplied by lam alone: gamma is missing there",
         "A_t =")
def gamma_missing(rewards, values, mask, gamma, lam):
    return accumulated(deltas(rewards, values, mask, gamma), values, mask, lam)


@mistake("ppo_advantages",
         "lam has crept into the delta: V_{t+1} is multiplied by gamma alone",
         "delta_t =")
def lam_in_the_delta(rewards, values, mask, gamma, lam):
    return accumulated(deltas(rewards, values, mask, gamma * lam), values, mask, gamma * lam)


@mistake("ppo_advantages",
         "you accumulate from the first token on: advantages look forward in time, so start at the "
         "last",
         "back to the first")
def forward_in_time(rewards, values, mask, gamma, lam):
    delta = deltas(rewards, values, mask, gamma)
    advantages, _ = accumulated(delta.flip(1), values, mask | True, gamma * lam)
    advantages = advantages.flip(1) * mask
    return advantages, (advantages + values) * mask


@mistake("ppo_advantages",
         "advantages are shifted by one token",
         "A_t =")
def shifted(*given):
    advantages, returns = right.ppo_advantages(*given)
    return F.pad(advantages, (1, -1)), F.pad(returns, (1, -1))


@mistake("ppo_advantages",
         "your returns are the plain sums of rewards: the critic's target here is A + V",
         "returns_t =")
def returns_are_sums(rewards, values, mask, gamma, lam):
    advantages, _ = right.ppo_advantages(rewards, values, mask, gamma, lam)
    return advantages, right.ppo_advantages(rewards, values, mask, gamma, 1.0)[1]


@mistake("ppo_advantages",
         "your returns lack + V",
         "returns_t =")
def returns_are_advantages(*given):
    advantages, _ = right.ppo_advantages(*given)
    return advantages, advantages


@mistake("ppo_advantages",
         "advantages and returns are exchanged",
         "Returns: advantages and returns")
def outputs_exchanged(*given):
    advantages, returns = right.ppo_advantages(*given)
    return returns, advantages


@mistake("ppo_advantages",
         "your returns are plain sums of the rewards to come, without gamma or the critic: its "
         "target here is A + V",
         "returns_t =")
def returns_are_plain_sums(rewards, values, mask, gamma, lam):
    advantages, _ = right.ppo_advantages(rewards, values, mask, gamma, lam)
    return advantages, right.ppo_advantages(rewards, values, mask, 1.0, 1.0)[1]


@mistake("ppo_advantages",
         "gamma is missing in delta: V_{t+1} is multiplied by it",
         "delta_t =")
def gamma_missing_in_delta(rewards, values, mask, gamma, lam):
    return accumulated(deltas(rewards, values, mask, 1.0), values, mask, gamma * lam)


# -------------------------------------------------------------------------------- whiten_advantages


def centred(advantages, mask):
    return (advantages - advantages[mask].mean()) * mask


@mistake("whiten_advantages",
         "your std has N in its denominator, not N - 1",
         "n - 1")
def whitened_by_n(advantages, mask):
    n = mask.sum()
    return right.whiten_advantages(advantages, mask) * (n / (n - 1)).sqrt()


@mistake("whiten_advantages",
         "mean and std count the padding",
         "over all real tokens")
def whitened_with_padding(advantages, mask):
    return right.whiten_advantages(advantages, mask | True) * mask


@mistake("whiten_advantages",
         "mean and std count the padding, as zeros: responses of other lengths would change them",
         "over all real tokens")
def whitened_with_zeros(advantages, mask):
    return right.whiten_advantages(advantages * mask, mask | True) * mask


@mistake("whiten_advantages",
         "you whiten each response by itself: all would be equally good on average",
         "of the batch together")
def each_whitened_by_itself(advantages, mask):
    rows = zip(advantages.split(1), mask.split(1))
    return torch.cat([right.whiten_advantages(row, keep) for row, keep in rows])


@mistake("whiten_advantages",
         "the mean is not subtracted",
         "(A - mean)")
def mean_not_subtracted(advantages, mask):
    return advantages / (advantages[mask].std() + 1e-8) * mask


@mistake("whiten_advantages",
         "you do not divide by the std",
         "(A - mean)")
def not_divided(advantages, mask):
    return centred(advantages, mask)


@mistake("whiten_advantages",
         "you divide by the variance, not by the std",
         "(A - mean)")
def divided_by_the_variance(advantages, mask):
    return centred(advantages, mask) / (advantages[mask].var() + 1e-8)


@mistake("whiten_advantages",
         "the padding is not 0 afterwards",
         "0 where masked")
def padding_not_zero(advantages, mask):
    real = advantages[mask]
    return (advantages - real.mean()) / (real.std() + 1e-8)


@mistake("whiten_advantages",
         "a single token has no std: NaN, and with it every weight, after one such batch",
         "single token")
def nan_for_a_single_token(advantages, mask):
    std = advantages[mask].std() if len(mask) > 1 else float("nan")
    return centred(advantages, mask) / std


@mistake("whiten_advantages", TIMES_ZERO, "arbitrary where masked")
def whitened_and_multiplied(advantages, mask):
    return right.whiten_advantages(advantages, mask) + 0 * advantages


# ---------------------------------------------------------------------------------- first_step_loss


@mistake("first_step_loss",
         "gradient flows through old_logprobs: it cancels that of logprobs, and nothing is learned",
         "pi_old is a constant")
def gradient_cancelled(logprobs, advantages):
    return right.ppo_loss(logprobs, logprobs, advantages, INF)[0]


@mistake("first_step_loss",
         "the loss carries no gradient: only pi_old is a constant, the numerator of the ratio is "
         "not",
         "its gradient is not 0")
def all_is_constant(logprobs, advantages):
    return right.first_step_loss(logprobs, advantages).detach()


@mistake("first_step_loss",
         "you use log pi where the ratio stands: the gradient is right, but the value is another",
         "- sum_t ratio_t")
def log_pi_for_the_ratio(logprobs, advantages):
    return -(logprobs * advantages).sum()


@mistake("first_step_loss", WRONG_SIGN, "- sum_t ratio_t")
def first_step_of_the_wrong_sign(logprobs, advantages):
    return -right.first_step_loss(logprobs, advantages)


@mistake("first_step_loss",
         "you do not divide by pi_old: frequent tokens would get larger steps",
         "ratio_t = pi")
def pi_for_the_ratio(logprobs, advantages):
    return -(logprobs.exp() * advantages).sum()


@mistake("first_step_loss",
         "you average over all positions, padding included: the loss is a sum",
         "- sum_t ratio_t")
def mean_of_the_first_step(logprobs, advantages):
    return right.first_step_loss(logprobs, advantages) / logprobs.numel()


# ----------------------------------------------------------------------------------------- ppo_loss


def surrogate(ratio, advantages, low, high):
    """A loss like PPO's for something that is not its ratio, and the clipped tokens."""
    free, bounded = ratio * advantages, ratio.clamp(low, high) * advantages
    return -torch.min(free, bounded).sum(), (bounded < free).sum()


def outside(logprobs, old_logprobs, clip):
    """Whether a token's ratio is outside the range: (n, T)."""
    return ((logprobs - old_logprobs).exp() - 1).abs() > clip


@mistake("ppo_loss",
         "max instead of min: you take the optimistic of the two terms, so clipping no longer "
         "holds the policy back",
         "min( ratio_t")
def max_instead_of_min(logprobs, old_logprobs, advantages, clip):
    loss, clipped = right.ppo_loss(logprobs, old_logprobs, -advantages, clip)
    return -loss, clipped


@mistake("ppo_loss",
         "you use the clipped term alone: a token that went too far the wrong way could never come "
         "back",
         "min( ratio_t")
def clipped_ratio_alone(logprobs, old_logprobs, advantages, clip):
    bounded = (logprobs - old_logprobs).exp().clamp(1 - clip, 1 + clip)
    _, clipped = right.ppo_loss(logprobs, old_logprobs, advantages, clip)
    return -(bounded * advantages).sum(), clipped


@mistake("ppo_loss",
         "nothing is clipped",
         "clip(ratio_t")
def ratio_not_clipped(logprobs, old_logprobs, advantages, clip):
    return right.ppo_loss(logprobs, old_logprobs, advantages, INF)


@mistake("ppo_loss",
         "your ratio is upside down: pi_old / pi",
         "pi(y_t) / pi_old(y_t)")
def ratio_upside_down(logprobs, old_logprobs, advantages, clip):
    return right.ppo_loss(old_logprobs, logprobs, advantages, clip)


@mistake("ppo_loss", WRONG_SIGN, "- sum_t")
def ppo_of_the_wrong_sign(*given):
    loss, clipped = right.ppo_loss(*given)
    return -loss, clipped


@mistake("ppo_loss",
         "your ratio is a difference of log-probs: exp is missing",
         "pi(y_t) / pi_old(y_t)")
def exp_missing(logprobs, old_logprobs, advantages, clip):
    return surrogate(logprobs - old_logprobs, advantages, 1 - clip, 1 + clip)


@mistake("ppo_loss",
         "you clip the ratio to -clip ... clip: the range is around 1",
         "1 - clip")
def range_around_zero(logprobs, old_logprobs, advantages, clip):
    return surrogate((logprobs - old_logprobs).exp(), advantages, -clip, clip)


@mistake("ppo_loss",
         "you divide by the number of rows, which the caller does",
         "A sum over rows")
def ppo_mean_of_the_rows(logprobs, *given):
    loss, clipped = right.ppo_loss(logprobs, *given)
    return loss / len(logprobs), clipped


@mistake("ppo_loss",
         "you average over all positions, padding included: the gradient changes with the longest "
         "response",
         "A sum over rows")
def ppo_mean_of_the_tokens(logprobs, *given):
    loss, clipped = right.ppo_loss(logprobs, *given)
    return loss / logprobs.numel(), clipped


@mistake("ppo_loss",
         "you use one ratio for the whole response: that is another algorithm (GSPO, TRL's RLOO)",
         "per token")
def ratio_of_the_response(logprobs, old_logprobs, advantages, clip):
    ratio = (logprobs - old_logprobs).sum(1, keepdim=True).exp()
    return surrogate(ratio, advantages, 1 - clip, 1 + clip)


@mistake("ppo_loss", NO_GRADIENT, "scalar with gradients")
def ppo_without_gradient(*given):
    loss, clipped = right.ppo_loss(*given)
    return loss.detach(), clipped


@mistake("ppo_loss",
         "your ratio is always 1: you detached logprobs instead of using old_logprobs",
         "pi(y_t) / pi_old(y_t)")
def ratio_always_one(logprobs, old_logprobs, advantages, clip):
    return right.ppo_loss(logprobs, logprobs.detach(), advantages, clip)


@mistake("ppo_loss",
         "your count of clipped tokens counts padding too, and tokens whose gradient is not cut",
         "counts as clipped")
def padding_counted(logprobs, old_logprobs, advantages, clip):
    loss, _ = right.ppo_loss(logprobs, old_logprobs, advantages, clip)
    return loss, outside(logprobs, old_logprobs, clip).sum()


@mistake("ppo_loss",
         "your count of clipped tokens has all outside the range, also those whose gradient is not "
         "cut",
         "counts as clipped")
def all_outside_counted(logprobs, old_logprobs, advantages, clip):
    loss, _ = right.ppo_loss(logprobs, old_logprobs, advantages, clip)
    return loss, (outside(logprobs, old_logprobs, clip) & (logprobs != 0)).sum()


@mistake("ppo_loss",
         "you return the share of clipped tokens: the number is wanted, which can be summed over "
         "micro-batches",
         "the number of clipped tokens")
def share_of_clipped_tokens(logprobs, *given):
    loss, clipped = right.ppo_loss(logprobs, *given)
    return loss, clipped / logprobs.numel()


# --------------------------------------------------------------------------------------- value_loss


def squared_errors(values, returns):
    return (values - returns).square()


def near(values, old_values, value_clip):
    """The values, kept within +- value_clip of the old ones: (n, T)."""
    return old_values + (values - old_values).clamp(-value_clip, value_clip)


@mistake("value_loss",
         "the factor 1/2 is missing",
         "1/2")
def half_missing(*given):
    return 2 * right.value_loss(*given)


@mistake("value_loss",
         "min instead of max: you take the smaller error, so the clip does not hold V back",
         "max(")
def min_instead_of_max(values, old_values, returns, value_clip):
    free = squared_errors(values, returns)
    bounded = squared_errors(near(values, old_values, value_clip), returns)
    return torch.min(free, bounded).sum() / 2


@mistake("value_loss",
         "you keep V itself within +- value_clip: the range is around the old value",
         "within V_old_t")
def value_itself_clipped(values, old_values, returns, value_clip):
    free = squared_errors(values, returns)
    bounded = squared_errors(values.clamp(-value_clip, value_clip), returns)
    return torch.max(free, bounded).sum() / 2


@mistake("value_loss",
         "the clip does nothing: it is missing, or its range is around the return instead of the "
         "old value",
         "within V_old_t")
def value_not_clipped(values, old_values, returns, value_clip):
    return squared_errors(values, returns).sum() / 2


@mistake("value_loss",
         "you use the clipped term alone: where V is too far from V_old, it gets no gradient back",
         "max(")
def clipped_value_alone(values, old_values, returns, value_clip):
    return squared_errors(near(values, old_values, value_clip), returns).sum() / 2


@mistake("value_loss",
         "you average over all positions, padding included: the loss is a sum",
         "sum_t max(")
def mean_of_the_errors(values, *given):
    return right.value_loss(values, *given) / values.numel()


@mistake("value_loss", NO_GRADIENT, "Returns: scalar")
def value_without_gradient(*given):
    return right.value_loss(*given).detach()
