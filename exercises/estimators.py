"""Fill in these functions. Each docstring has the formula, the shapes, the source and an example.

    python -m exercises.check                     # all of them
    python -m exercises.check rloo_advantages     # one of them

B prompts with k responses each make N = B * k rows, row = prompt * k + sample ("prompt-major"); T
is the length of the longest response. Responses are padded on the right. Do not change what you are
given: return new tensors. A right function can be pasted over the one of the scripts that its
docstring names.
"""

import torch

# ---------------------------------------------------------------------------- masks, KL and rewards


def response_mask(responses, eos):
    """Which tokens belong to the response: all up to the first EOS, and the first EOS itself.

    The EOS is an action: a policy that is never trained on it does not learn to stop. What follows
    it is padding, whose id is often that of EOS too. A response without an EOS was cut off, and
    every token of it is real.

    Args: responses (N, T) token ids; eos (int).
    Returns: (N, T) bool.
    Source: common.sample, which builds it while sampling.

    >>> response_mask(torch.tensor([[5, 2, 2], [5, 6, 7]]), eos=2)
    tensor([[ True,  True, False],
            [ True,  True,  True]])
    """
    raise NotImplementedError


def token_kl(logprobs, ref_logprobs, response_mask, estimator="k1"):
    """Per-token estimates of KL(pi || pi_ref), from tokens that were sampled from pi.

    k1 = log pi - log pi_ref
    k2 = 1/2 (log pi - log pi_ref)^2
    k3 = pi_ref / pi - log(pi_ref / pi) - 1

    Args: logprobs, ref_logprobs (N, T), arbitrary where masked, inf and NaN included;
    response_mask (N, T) bool; estimator (name).
    Returns: (N, T), 0 where masked.
    Source: Schulman, "Approximating KL divergence" (2020); common.token_kl.

    >>> mask = torch.tensor([[True, False]])
    >>> token_kl(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -9.0]]), mask)
    tensor([[0.5000, 0.0000]])
    """
    raise NotImplementedError


def sequence_rewards(scores, kl, beta):
    """R_i = score_i - beta * (the sum of kl over the tokens of response i).

    For algorithms in which the whole response is one action.

    Args: scores (N,); kl (N, T), 0 where masked; beta (float).
    Returns: (N,).
    Source: Ahmadian et al. 2024 (arXiv:2402.14740), section 2; common.sequence_rewards.

    >>> sequence_rewards(torch.tensor([1.0, 2.0]), torch.tensor([[0.5, 0.5], [4.0, 0.0]]), 0.5)
    tensor([0.5000, 0.0000])
    """
    raise NotImplementedError


def token_rewards(scores, kl, beta, response_mask):
    """r_t = -beta * kl_t at every token, plus the score at the last real token of the response.

    For algorithms in which each token is an action.

    Args: scores (N,); kl (N, T), 0 where masked; beta (float); response_mask (N, T) bool, each row
    with a True.
    Returns: (N, T), 0 where masked; each row sums to its sequence_rewards.
    Source: Ziegler et al. 2019 (arXiv:1909.08593); common.token_rewards.

    >>> mask = torch.tensor([[True, True]])
    >>> token_rewards(torch.tensor([3.0]), torch.tensor([[1.0, 2.0]]), 0.5, mask)
    tensor([[-0.5000,  2.0000]])
    """
    raise NotImplementedError


# ---------------------------------------------------------------------- baselines, without a critic


def rloo_advantages(rewards, k):
    """A_i = R_i - mean of the other k - 1 rewards of the same prompt.

    Args: rewards (N,), prompt-major: row = prompt * k + sample; k >= 2.
    Returns: (N,); the advantages of a prompt sum to 0.
    Source: Ahmadian et al. 2024 (arXiv:2402.14740), section 2.3; rloo.compute_advantages.

    >>> rloo_advantages(torch.tensor([1.0, 3.0, 0.0, 8.0]), k=2)
    tensor([-2.,  2., -8.,  8.])
    """
    raise NotImplementedError


def rloo_loss(logprobs, advantages):
    """- sum_i A_i log pi(y_i | x), with the log-prob of the whole response i.

    That is the sum of the log-probs of its tokens.
    A sum over rows, not a mean: the caller divides by the number of rows in the whole batch.

    Args: logprobs (n, T), with gradients, 0 where masked; advantages (n,).
    Returns: scalar, with gradients.
    Source: Williams 1992; rloo.compute_loss.

    >>> rloo_loss(torch.tensor([[-1.0, -2.0], [-4.0, 0.0]]), torch.tensor([2.0, -1.0]))
    tensor(2.)
    """
    raise NotImplementedError


def reinforce_baseline(history, kind, window, decay):
    """The baseline of REINFORCE: an average of the mean rewards of past steps.

    "none": 0
    "moving-average": the mean of the last `window` steps, or of all steps if window is 0
    "ema": starts at the first step's reward; then, for each step, b = decay * b + (1 - decay) * r

    It is 0 at the first step, which has no past.

    Args: history (list of float, one for each past step, oldest first); kind (str); window (int);
    decay (float).
    Returns: float.
    Source: Williams 1992; Ahmadian et al. 2024, section 2.2; reinforce.compute_baseline.

    >>> reinforce_baseline([1.0, 2.0, 6.0], "moving-average", window=2, decay=0.9)
    4.0
    """
    raise NotImplementedError


def remax_advantages(rewards, baseline, response_mask):
    """A_t = (the sum of the rewards from token t on, r_t included) - baseline.

    A token cannot change the KL of the tokens before it, so it is charged only for the KL from its
    own position on. The baseline is the score of the greedy response to the same prompt. It is
    subtracted once from each token's sum.

    Args: rewards (N, T), see token_rewards; baseline (N,); response_mask (N, T) bool.
    Returns: (N, T), 0 where masked.
    Source: Li et al. 2023 (arXiv:2310.10505), algorithm 1; remax.compute_advantages.

    >>> mask = torch.tensor([[True, True]])
    >>> remax_advantages(torch.tensor([[-0.5, 2.0]]), torch.tensor([1.0]), mask)
    tensor([[0.5000, 1.0000]])
    """
    raise NotImplementedError


# ------------------------------------------------------------------------ with a critic and a ratio


def ppo_advantages(rewards, values, response_mask, gamma, lam):
    """Generalized advantage estimation (GAE), from the last token back to the first.

    delta_t = r_t + gamma * V_{t+1} - V_t
    A_t = delta_t + gamma * lam * A_{t+1}
    returns_t = A_t + V_t

    V_t is the value of the state before token t. After the last real token V and A are 0.

    Args: rewards, values (N, T), 0 where masked; response_mask (N, T) bool; gamma, lam (float).
    Returns: advantages and returns, each (N, T), 0 where masked.
    Source: Schulman et al. 2016 (arXiv:1506.02438), equation 16; ppo.compute_advantages.

    >>> mask = torch.tensor([[True, True]])
    >>> ppo_advantages(torch.tensor([[0.0, 4.0]]), torch.tensor([[1.0, 2.0]]), mask, 1.0, 0.5)
    (tensor([[2., 2.]]), tensor([[3., 4.]]))
    """
    raise NotImplementedError


def whiten_advantages(advantages, response_mask):
    """(A - mean) / (std + 1e-8), or 0 if all are equal.

    Mean and std are over all real tokens of the batch together.
    The std has n - 1 in its denominator, where n is the number of real tokens.
    A single token gives 0, too.

    Args: advantages (N, T), arbitrary where masked, inf and NaN included; response_mask (N, T)
    bool.
    Returns: (N, T), 0 where masked.
    Source: Ziegler et al. 2019, code; ppo.whiten_advantages.

    >>> mask = torch.tensor([[True, True], [True, False]])
    >>> whiten_advantages(torch.tensor([[-1.0, -3.0], [-5.0, -7.0]]), mask)
    tensor([[ 1.,  0.],
            [-1.,  0.]])
    """
    raise NotImplementedError


def first_step_loss(logprobs, advantages):
    """- sum_t ratio_t A_t at the first step after a rollout, when pi_old is still pi itself.

    ratio_t = pi(y_t) / pi_old(y_t) is 1, but its gradient is not 0: pi_old is a constant. The
    gradient of this loss is that of - sum_t A_t log pi(y_t).

    Args: logprobs (n, T), with gradients, 0 where masked; advantages (n, T), 0 where masked.
    Returns: scalar, with gradients.
    Source: Schulman et al. 2017 (arXiv:1707.06347), section 2.2; ppo.compute_loss, if old_logprobs
    is logprobs.

    >>> first_step_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([[3.0, 1.0]]))
    tensor(-4.)
    """
    raise NotImplementedError


def ppo_loss(logprobs, old_logprobs, advantages, clip):
    """- sum_t min( ratio_t A_t, clip(ratio_t, 1 - clip, 1 + clip) A_t ), per token.

    ratio_t = pi(y_t) / pi_old(y_t)

    A sum over rows and tokens: the caller divides by the number of rows in the whole mini-batch.
    A token counts as clipped where the clipped term is the smaller one, so that its gradient is 0.

    Args: logprobs (n, T), with gradients; old_logprobs (n, T); advantages (n, T), 0 where masked;
    clip (float).
    Returns: scalar with gradients, and the number of clipped tokens.
    Source: Schulman et al. 2017 (arXiv:1707.06347), equation 7; ppo.compute_loss.

    >>> ppo_loss(torch.tensor([[1.5, 0.5]]).log(), torch.zeros(1, 2), torch.ones(1, 2), 0.25)
    (tensor(-1.7500), tensor(1))
    """
    raise NotImplementedError


def value_loss(values, old_values, returns, value_clip):
    """1/2 sum_t max( (V_t - G_t)^2, (W_t - G_t)^2 ), where W_t is the clipped V_t.

    W_t is V_t, kept within V_old_t +- value_clip.

    Args: values (n, T), with gradients; old_values, returns G (n, T), 0 where masked; value_clip
    (float).
    Returns: scalar, with gradients.
    Source: the PPO code of OpenAI baselines; ppo.compute_value_loss.

    >>> value_loss(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[5.0]]), 0.5)
    tensor(6.1250)
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------------------- relatives


def grpo_advantages(rewards, k, scale_std=True):
    """A_i = (r_i - mean) / (std + 1e-4).

    Mean and std are over the k rewards of the same prompt, r_i included. The std has k - 1 in its
    denominator. With scale_std=False there is no division: A_i = r_i - mean.

    Args: rewards (N,), prompt-major: row = prompt * k + sample; k >= 2; scale_std (bool).
    Returns: (N,).
    Source: Shao et al. 2024 (arXiv:2402.03300), section 4.1.2; grpo.compute_advantages.

    >>> grpo_advantages(torch.tensor([1.0, 3.0, 0.0, 8.0]), k=2, scale_std=False)
    tensor([-1.,  1., -4.,  4.])
    """
    raise NotImplementedError


def raft_best(rewards, k):
    """The row number, in the whole batch, of the response with the highest reward of each prompt.

    Args: rewards (N,), prompt-major: row = prompt * k + sample; k >= 1.
    Returns: (B,) integers, one for each prompt.
    Source: Dong et al. 2023 (arXiv:2304.06767); raft.select_best.

    >>> raft_best(torch.tensor([1.0, 3.0, 2.0, 9.0, 8.0, 7.0]), k=3)
    tensor([1, 3])
    """
    raise NotImplementedError


def dpo_loss(chosen_logprobs, rejected_logprobs, chosen_ref_logprobs, rejected_ref_logprobs, beta):
    """- sum over pairs of log sigmoid(r_chosen - r_rejected), with the implicit rewards r.

    r = beta * log(pi / pi_ref)

    log pi and log pi_ref are of the whole response: the sum of the log-probs of its tokens.
    Margins of -100 and less must give a finite loss and a gradient that is not 0.
    The implicit rewards are only logged, so they are returned without gradients.

    Args: four (n, T) tensors of token log-probs, 0 where masked, the first two with gradients; beta
    (float).
    Returns: scalar with gradients; the implicit rewards of the chosen and of the rejected
    responses, (n,) each.
    Source: Rafailov et al. 2023 (arXiv:2305.18290), equation 7; dpo.compute_loss.

    >>> dpo_loss(*(torch.tensor([[x]]) for x in (-1.0, -2.0, -1.0, -2.0)), beta=0.1)
    (tensor(0.6931), tensor([0.]), tensor([0.]))
    """
    raise NotImplementedError


# ---------------------------------------------------------------------- estimators of 2025 and 2026


def maxrl_advantages(rewards, k):
    """A_i = (r_i - mean) / mean, or 0 if all k rewards of the prompt are 0.

    The mean is over the k rewards of the same prompt, r_i included.

    Args: rewards (N,) of 0 and 1, prompt-major: row = prompt * k + sample; k >= 2.
    Returns: (N,); the advantages of a prompt sum to 0.
    Source: "MaxRL" (2026, arXiv:2602.02710), algorithm 1; maxrl.compute_advantages.

    >>> maxrl_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), k=4)
    tensor([ 3., -1., -1., -1.])
    """
    raise NotImplementedError


def gspo_loss(logprobs, old_logprobs, advantages, response_mask, clip_low, clip_high):
    """- sum_i min( s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i ), one ratio per response.

    s_i = (pi(y_i) / pi_old(y_i)) to the power of 1 / |y_i|

    pi(y_i) is the probability of the whole response, and |y_i| its number of real tokens.
    A sum over rows: the caller divides by the number of rows in the whole mini-batch.
    A response counts as clipped where the clipped term is the smaller one.

    Args: logprobs (n, T), with gradients; old_logprobs (n, T), both 0 where masked; advantages
    (n,); response_mask (n, T) bool; clip_low, clip_high (float).
    Returns: scalar with gradients, and the number of tokens in clipped responses.
    Source: Zheng et al. 2025 (arXiv:2507.18071), section 4; gspo.compute_loss without its KL.

    >>> mask = torch.tensor([[True, True]])
    >>> logprobs, old = torch.tensor([[2.0, 8.0]]).log(), torch.zeros(1, 2)
    >>> gspo_loss(logprobs, old, torch.tensor([1.0]), mask, 0.5, 1.0)
    (tensor(-2.), tensor(2))
    """
    raise NotImplementedError


def cispo_loss(logprobs, old_logprobs, advantages, response_mask, max_ratio):
    """- sum_it w_it A_i log pi(y_it), where the weight w_it is a constant.

    w_it = min( pi(y_it) / pi_old(y_it), max_ratio )

    No token loses its gradient, whatever its ratio is.
    A sum over rows and tokens: the caller divides by the number of tokens in the whole mini-batch.

    Args: logprobs (n, T), with gradients; old_logprobs (n, T), both 0 where masked; advantages
    (n,); response_mask (n, T) bool; max_ratio (float).
    Returns: scalar with gradients, and the number of tokens whose ratio is above max_ratio.
    Source: MiniMax-M1 (2025, arXiv:2506.13585), section 3.1; cispo.compute_loss without its KL.

    >>> mask = torch.tensor([[True, True]])
    >>> logprobs, old = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -9.0]])
    >>> cispo_loss(logprobs, old, torch.tensor([1.0]), mask, 5.0)
    (tensor(11.), tensor(1))
    """
    raise NotImplementedError


def dapo_loss(logprobs, old_logprobs, advantages, response_mask, clip_low, clip_high, num_tokens):
    """- 1/num_tokens sum_it min( ratio_it A_i, clip(ratio_it, 1 - clip_low, 1 + clip_high) A_i ).

    ratio_it = pi(y_it) / pi_old(y_it), for every token

    num_tokens counts the real tokens of the whole mini-batch: these rows may be a part of it, a
    micro-batch. So a token has the same weight in a short and in a long response, and in every
    micro-batch.

    Args: logprobs (n, T), with gradients; old_logprobs (n, T), both 0 where masked; advantages
    (n,); response_mask (n, T) bool; clip_low, clip_high (float); num_tokens (int).
    Returns: scalar, with gradients.
    Source: Yu et al. 2025 (arXiv:2503.14476), section 3; dapo.compute_loss without its KL, divided.

    >>> mask = torch.tensor([[True, True]])
    >>> logprobs, old = torch.tensor([[2.0, 1.0]]).log(), torch.zeros(1, 2)
    >>> dapo_loss(logprobs, old, torch.tensor([1.0]), mask, 0.2, 0.5, num_tokens=10)
    tensor(-0.2500)
    """
    raise NotImplementedError
