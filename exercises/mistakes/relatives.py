"""Mistakes in the sheet's last part: the relatives GRPO, RAFT and DPO."""

import torch
import torch.nn.functional as F

from exercises.mistakes.shared import (NO_GRADIENT, REPEAT, SAMPLE_MAJOR, WRONG_SIGN, group_std,
                                       mistake, sample_major)
from exercises.solutions import right

# ---------------------------------------------------------------------------------- grpo_advantages


def centred(rewards, k):
    return right.grpo_advantages(rewards, k, scale_std=False)


@mistake("grpo_advantages",
         "your std has N in its denominator, not N - 1",
         "k - 1 in its")
def std_by_n(rewards, k, scale_std=True):
    return centred(rewards, k) / (group_std(rewards, k, correction=0) + 1e-4)


@mistake("grpo_advantages",
         "mean and std are over the whole batch, not over the prompt's own samples",
         "of the same prompt")
def one_group(rewards, k, scale_std=True):
    return right.grpo_advantages(rewards, len(rewards), scale_std)


@mistake("grpo_advantages",
         "your mean leaves the response out: that is RLOO's baseline",
         "r_i included")
def self_left_out(rewards, k, scale_std=True):
    return k / (k - 1) * right.grpo_advantages(rewards, k, scale_std)


@mistake("grpo_advantages", SAMPLE_MAJOR, "prompt-major")
def groups_mixed_up(rewards, k, scale_std=True):
    return sample_major(right.grpo_advantages, rewards, k, scale_std)


@mistake("grpo_advantages",
         "nothing is added to the std: a prompt whose rewards are all equal gives 0 / 0",
         "1e-4")
def nothing_added_to_the_std(rewards, k, scale_std=True):
    return centred(rewards, k) / group_std(rewards, k)


@mistake("grpo_advantages",
         "you add 1e-8 to the std, as some codes do: here it is 1e-4",
         "1e-4")
def little_added_to_the_std(rewards, k, scale_std=True):
    return centred(rewards, k) / (group_std(rewards, k) + 1e-8)


@mistake("grpo_advantages",
         "you never divide by the std",
         "(r_i - mean) /")
def never_divided(rewards, k, scale_std=True):
    return centred(rewards, k)


@mistake("grpo_advantages",
         "you divide by the std even with scale_std=False",
         "scale_std=False")
def always_divided(rewards, k, scale_std=True):
    return right.grpo_advantages(rewards, k)


@mistake("grpo_advantages",
         "you divide by the variance, not by the std",
         "(r_i - mean) /")
def divided_by_the_variance(rewards, k, scale_std=True):
    return centred(rewards, k) / (group_std(rewards, k).square() + 1e-4)


@mistake("grpo_advantages",
         "the sign is wrong: the best responses would become less likely",
         "(r_i - mean) /")
def mean_minus_reward(*given):
    return -right.grpo_advantages(*given)


@mistake("grpo_advantages",
         "your std is that of the whole batch: that is another algorithm (Lite PPO)",
         "of the same prompt")
def std_of_the_batch(rewards, k, scale_std=True):
    return centred(rewards, k) / (rewards.std() + 1e-4 if scale_std else 1.0)


@mistake("grpo_advantages", REPEAT, "prompt-major")
def means_repeated(rewards, k, scale_std=True):
    groups = rewards.view(-1, k)
    std = groups.std(1).repeat(k) + 1e-4 if scale_std else 1.0
    return (rewards - groups.mean(1).repeat(k)) / std


# ---------------------------------------------------------------------------------------- raft_best


@mistake("raft_best",
         "you return the number within the group: the row is prompt * k + that",
         "in the whole batch")
def number_within_the_group(rewards, k):
    return right.raft_best(rewards, k) % k


@mistake("raft_best",
         "you pick the worst response",
         "highest reward")
def worst(rewards, k):
    return right.raft_best(-rewards, k)


@mistake("raft_best", SAMPLE_MAJOR, "prompt-major")
def best_of_mixed_groups(rewards, k):
    B = len(rewards) // k
    sample = right.raft_best(rewards.view(k, -1).t().flatten(), k) % k  # (B,)
    return sample * B + torch.arange(B)


@mistake("raft_best",
         "you return the rewards of the best responses, not their row numbers",
         "The row number")
def rewards_of_the_best(rewards, k):
    return rewards[right.raft_best(rewards, k)]


@mistake("raft_best",
         "you pick the best of the whole batch: each prompt has to keep one",
         "of each prompt")
def best_of_the_batch(rewards, k):
    return rewards.topk(len(rewards) // k).indices.sort().values


@mistake("raft_best",
         "you pick the best of the whole batch, in order of reward: each prompt has to keep one",
         "of each prompt")
def best_of_the_batch_by_reward(rewards, k):
    return rewards.topk(len(rewards) // k).indices


@mistake("raft_best",
         "you add the prompt's number: its rows begin at prompt * k",
         "in the whole batch")
def times_k_forgotten(rewards, k):
    return right.raft_best(rewards, k) % k + torch.arange(len(rewards) // k)


# ----------------------------------------------------------------------------------------- dpo_loss


def implicit_rewards(chosen, rejected, chosen_ref, rejected_ref, beta):
    """Of the chosen and of the rejected responses, with gradients: (n,) each."""
    return beta * (chosen - chosen_ref).sum(1), beta * (rejected - rejected_ref).sum(1)


@mistake("dpo_loss",
         "the reference is missing: nothing keeps the policy near it",
         "log(pi / pi_ref)")
def no_reference(chosen, rejected, chosen_ref, rejected_ref, beta):
    return right.dpo_loss(chosen, rejected, 0 * chosen_ref, 0 * rejected_ref, beta)


@mistake("dpo_loss",
         "beta is missing",
         "beta *")
def no_beta(*given):
    return right.dpo_loss(*given[:4], 1.0)


@mistake("dpo_loss",
         "your margin has the wrong sign: the rejected responses would become more likely",
         "r_chosen - r_rejected")
def margin_of_the_wrong_sign(*given):
    chosen, rejected = implicit_rewards(*given)
    return -F.logsigmoid(rejected - chosen).sum(), chosen.detach(), rejected.detach()


@mistake("dpo_loss",
         "chosen and rejected are exchanged",
         "r_chosen - r_rejected")
def pairs_exchanged(chosen, rejected, chosen_ref, rejected_ref, beta):
    return right.dpo_loss(rejected, chosen, rejected_ref, chosen_ref, beta)


@mistake("dpo_loss",
         "your ratio is upside down: pi_ref / pi",
         "log(pi / pi_ref)")
def ratio_upside_down(chosen, rejected, chosen_ref, rejected_ref, beta):
    return right.dpo_loss(chosen_ref, rejected_ref, chosen, rejected, beta)


@mistake("dpo_loss",
         "you average over a response's tokens: DPO's ratio is that of whole responses",
         "sum of the log-probs")
def mean_of_the_tokens(*given):
    *logprobs, beta = given
    return right.dpo_loss(*(x / (x != 0).sum(1, keepdim=True) for x in logprobs), beta)


@mistake("dpo_loss",
         "you average over the pairs: the loss is a sum, which the caller divides",
         "sum over pairs")
def mean_of_the_pairs(*given):
    loss, *rewards = right.dpo_loss(*given)
    return loss / len(given[0]), *rewards


@mistake("dpo_loss",
         "the log is missing",
         "log sigmoid")
def log_missing(*given):
    chosen, rejected = implicit_rewards(*given)
    return -(chosen - rejected).sigmoid().sum(), chosen.detach(), rejected.detach()


@mistake("dpo_loss", WRONG_SIGN, "- sum over pairs")
def wrong_sign(*given):
    loss, *rewards = right.dpo_loss(*given)
    return -loss, *rewards


@mistake("dpo_loss",
         "beta is outside the sigmoid: it belongs to the implicit rewards",
         "with the implicit reward")
def beta_outside(*given):
    beta, (chosen, rejected) = given[4], implicit_rewards(*given)
    loss = -beta * F.logsigmoid((chosen - rejected) / beta).sum()
    return loss, chosen.detach(), rejected.detach()


@mistake("dpo_loss", NO_GRADIENT, "scalar with gradients")
def without_gradient(*given):
    loss, *rewards = right.dpo_loss(*given)
    return loss.detach(), *rewards


@mistake("dpo_loss",
         "the implicit rewards still carry gradients: they would keep the whole graph in memory",
         "without gradients")
def rewards_with_gradients(*given):
    return right.dpo_loss(*given)[0], *implicit_rewards(*given)


@mistake("dpo_loss",
         "log(sigmoid(x)) is -inf for very negative x: use a function that computes both at once",
         "Margins of -100")
def log_of_sigmoid(*given):
    chosen, rejected = implicit_rewards(*given)
    return -(chosen - rejected).sigmoid().log().sum(), chosen.detach(), rejected.detach()


@mistake("dpo_loss",
         "you average over T, padding included: DPO's ratio is that of whole responses",
         "sum of the log-probs")
def mean_with_padding(*given):
    *logprobs, beta = given
    return right.dpo_loss(*logprobs, beta / logprobs[0].shape[1])


@mistake("dpo_loss",
         "you take the sigmoid of each token's margin: the margin is that of whole responses",
         "sum of the log-probs")
def sigmoid_of_each_token(*given):
    chosen, rejected, chosen_ref, rejected_ref, beta = given
    margins = beta * (chosen - chosen_ref - rejected + rejected_ref)  # (n, T)
    return -F.logsigmoid(margins).sum(), *right.dpo_loss(*given)[1:]
