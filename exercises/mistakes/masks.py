"""Mistakes in the sheet's first part: masks, KL and rewards."""

import torch
import torch.nn.functional as F

from exercises.mistakes.shared import TIMES_ZERO, mistake
from exercises.solutions import right

# ------------------------------------------------------------------------------------ response_mask


@mistake("response_mask",
         "EOS is not in your mask, so the end is never trained and responses grow",
         "first EOS itself")
def eos_left_out(responses, eos):
    return right.response_mask(responses, eos) & (responses != eos)


@mistake("response_mask",
         "you mask every EOS and nothing else: the mask has to be found by position, up to the "
         "first EOS, not by id",
         "all up to the first EOS")
def found_by_id(responses, eos):
    return responses != eos


@mistake("response_mask",
         "your mask goes one token too far, into the padding",
         "all up to the first EOS")
def one_token_too_far(responses, eos):
    return F.pad(right.response_mask(responses, eos), (1, -1), value=True)


@mistake("response_mask",
         "you mask out responses that were cut off before an EOS: their tokens were sampled too",
         "cut off")
def cut_off_left_out(responses, eos):
    return right.response_mask(responses, eos) & (responses == eos).any(1, keepdim=True)


@mistake("response_mask",
         "your mask is inverted: True means real",
         "Which tokens belong")
def inverted(responses, eos):
    return ~right.response_mask(responses, eos)


@mistake("response_mask",
         "your mask ends at the last EOS: what follows the first is not part of the response",
         "all up to the first EOS")
def up_to_the_last_eos(responses, eos):
    is_eos = responses == eos
    eos_to_come = is_eos.flip(1).cumsum(1).flip(1) > 0
    return eos_to_come | ~is_eos.any(1, keepdim=True)


# ----------------------------------------------------------------------------------------- token_kl


def kl_unless(estimator, wrong, logprobs, ref_logprobs, mask, kind):
    """The right token_kl, except for one estimator, whose values are `wrong`."""
    if kind == estimator:
        return wrong * mask
    return right.token_kl(logprobs, ref_logprobs, mask, kind)


@mistake("token_kl",
         "k1 has the wrong sign: KL would be rewarded, and the policy would run from the reference",
         "k1 =")
def k1_of_the_wrong_sign(logprobs, ref_logprobs, mask, kind="k1"):
    return kl_unless("k1", ref_logprobs - logprobs, logprobs, ref_logprobs, mask, kind)


@mistake("token_kl",
         "your k1 is an absolute value: single values may be negative, and only so is their mean "
         "the KL",
         "k1 =")
def k1_absolute(logprobs, ref_logprobs, mask, kind="k1"):
    return kl_unless("k1", (logprobs - ref_logprobs).abs(), logprobs, ref_logprobs, mask, kind)


@mistake("token_kl",
         "you weight k1 by the probability of the token: tokens are sampled from pi already",
         "from tokens that were sampled")
def k1_weighted(logprobs, ref_logprobs, mask, kind="k1"):
    weighted = logprobs.exp() * (logprobs - ref_logprobs)
    return kl_unless("k1", weighted, logprobs, ref_logprobs, mask, kind)


@mistake("token_kl",
         "your k2 lacks the factor 1/2",
         "k2 =")
def k2_without_half(logprobs, ref_logprobs, mask, kind="k1"):
    squared = (logprobs - ref_logprobs).square()
    return kl_unless("k2", squared, logprobs, ref_logprobs, mask, kind)


@mistake("token_kl",
         "your k3 has its ratio upside down: it is pi_ref / pi, since the tokens were sampled "
         "from pi",
         "k3 =")
def k3_upside_down(logprobs, ref_logprobs, mask, kind="k1"):
    log_ratio = logprobs - ref_logprobs
    return kl_unless("k3", log_ratio.expm1() - log_ratio, logprobs, ref_logprobs, mask, kind)


@mistake("token_kl",
         "the log in your k3 has the wrong sign, so k3 can be negative",
         "k3 =")
def k3_with_plus_log(logprobs, ref_logprobs, mask, kind="k1"):
    log_ratio = ref_logprobs - logprobs
    return kl_unless("k3", log_ratio.expm1() + log_ratio, logprobs, ref_logprobs, mask, kind)


@mistake("token_kl",
         "your k3 lacks the - 1: it is not 0 where the policies agree",
         "k3 =")
def k3_without_minus_one(logprobs, ref_logprobs, mask, kind="k1"):
    log_ratio = ref_logprobs - logprobs
    return kl_unless("k3", log_ratio.exp() - log_ratio, logprobs, ref_logprobs, mask, kind)


@mistake("token_kl",
         "you forgot the mask: the padding has KL too",
         "0 where masked")
def kl_without_mask(logprobs, ref_logprobs, mask, kind="k1"):
    return right.token_kl(logprobs, ref_logprobs, mask | True, kind)


@mistake("token_kl", TIMES_ZERO, "arbitrary where masked")
def kl_masked_by_multiplying(logprobs, ref_logprobs, mask, kind="k1"):
    return right.token_kl(logprobs, ref_logprobs, mask | True, kind) * mask


# --------------------------------------------------------------------------------- sequence_rewards


@mistake("sequence_rewards",
         "you add the KL: it would be rewarded",
         "R_i =")
def kl_rewarded(scores, kl, beta):
    return right.sequence_rewards(scores, -kl, beta)


@mistake("sequence_rewards",
         "you average the KL over tokens: long responses would get it cheaper",
         "sum of kl")
def kl_averaged(scores, kl, beta):
    return right.sequence_rewards(scores, kl / kl.shape[1], beta)


@mistake("sequence_rewards",
         "beta is missing",
         "beta *")
def sequences_without_beta(scores, kl, beta):
    return right.sequence_rewards(scores, kl, 1.0)


@mistake("sequence_rewards",
         "you sum the KL over the whole batch: each response pays for its own",
         "tokens of response i")
def kl_of_the_whole_batch(scores, kl, beta):
    return right.sequence_rewards(scores, kl.sum().view(1, 1), beta)


@mistake("sequence_rewards",
         "beta multiplies the score too",
         "R_i =")
def beta_times_everything(scores, kl, beta):
    return right.sequence_rewards(beta * scores, kl, beta)


@mistake("sequence_rewards",
         "you charge only the first token's KL",
         "sum of kl")
def first_tokens_kl(scores, kl, beta):
    return right.sequence_rewards(scores, kl[:, :1], beta)


# ------------------------------------------------------------------------------------ token_rewards


def placed(scores, mask):
    """The scores where token_rewards puts them, without any KL: (N, T)."""
    return right.token_rewards(scores, torch.zeros(mask.shape), 0.0, mask)


@mistake("token_rewards",
         "the score lands in the last column, which is padding for most responses",
         "last real token")
def score_in_the_last_column(scores, kl, beta, mask):
    return right.token_rewards(scores, kl, beta, mask | True)


@mistake("token_rewards",
         "every token gets the score: a response of 20 tokens would be paid 20 times",
         "plus the score at the last")
def score_for_every_token(scores, kl, beta, mask):
    return scores.unsqueeze(1) * mask - beta * kl


@mistake("token_rewards",
         "the score lands one token after the last, and is lost where a response fills the row",
         "last real token")
def score_after_the_last(scores, kl, beta, mask):
    return F.pad(placed(scores, mask), (1, -1)) - beta * kl


@mistake("token_rewards",
         "the score lands one token before the last: EOS would not be paid for",
         "last real token")
def score_before_the_last(scores, kl, beta, mask):
    return placed(scores, mask).roll(-1, 1) - beta * kl


@mistake("token_rewards",
         "the score lands on the first token",
         "last real token")
def score_on_the_first(scores, kl, beta, mask):
    return F.pad(scores.unsqueeze(1), (0, mask.shape[1] - 1)) - beta * kl


@mistake("token_rewards",
         "you add the KL: it would be rewarded",
         "r_t =")
def token_kl_rewarded(scores, kl, beta, mask):
    return right.token_rewards(scores, -kl, beta, mask)


@mistake("token_rewards",
         "the score replaces the last token's KL: it has to be added to it",
         "plus the score")
def score_replaces_kl(scores, kl, beta, mask):
    is_last = placed(torch.ones(len(kl)), mask)
    return right.token_rewards(scores, kl * (1 - is_last), beta, mask)


@mistake("token_rewards",
         "beta is missing",
         "beta *")
def tokens_without_beta(scores, kl, beta, mask):
    return right.token_rewards(scores, kl, 1.0, mask)


@mistake("token_rewards",
         "you spread the score evenly over the tokens",
         "at the last real token")
def score_spread_evenly(scores, kl, beta, mask):
    return (scores / mask.sum(1)).unsqueeze(1) * mask - beta * kl


@mistake("token_rewards",
         "the score lands in the last column and is then masked away: only responses that fill the "
         "row get theirs",
         "last real token")
def score_masked_away(scores, kl, beta, mask):
    return score_in_the_last_column(scores, kl, beta, mask) * mask
