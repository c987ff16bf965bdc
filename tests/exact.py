"""Every response of a tiny policy, in float64: expectations and gradients computed exactly, not sampled."""

import itertools

import torch
from tiny import make_float64_policy

from common import Batch, token_logprobs


def all_responses(length, words, eos):
    """Every response of at most `length` tokens: ended by its first EOS, or cut off."""
    for n in range(length):
        yield from ((*head, eos) for head in itertools.product(words, repeat=n))
    yield from itertools.product(words, repeat=length)


class Enumeration:
    """All M responses of a policy with a few words and an EOS to one prompt, with a random reward for each."""

    def __init__(self, words, length=3, temperature=0.8):
        eos = words  # token ids: 0 ... words - 1, then EOS
        self.policy = make_float64_policy(words + 1, seed=3)
        reference = make_float64_policy(words + 1, seed=4)
        rows = list(all_responses(length, range(words), eos))
        responses = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])  # (M, T)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]).bool()  # (M, T)
        prompts = torch.tensor([[1, 0, 1]]).expand(len(rows), -1)  # (M, 3)
        ended = torch.tensor([row[-1] == eos for row in rows])  # (M,)
        self.batch = Batch(prompts, torch.ones_like(prompts).bool(), responses, mask, ended, torch.zeros(mask.shape))
        self.logprobs = token_logprobs(self.policy, self.batch, temperature)  # (M, T), with gradients
        self.ref_logprobs = token_logprobs(reference, self.batch, temperature).detach()  # (M, T)
        self.probs = self.logprobs.sum(1).exp()  # (M,)
        self.scores = 2 * torch.randn(
            len(rows), generator=torch.Generator().manual_seed(5), dtype=torch.float64
        )  # (M,)

    def gradient(self, loss):
        gradients = torch.autograd.grad(loss, list(self.policy.parameters()), retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def true_gradient(self, beta):
        """Gradient of -(E[r] - beta KL(pi || pi_ref)), by differentiating the sum over all responses."""
        log_ratio = self.logprobs.sum(1) - self.ref_logprobs.sum(1)  # (M,)
        return self.gradient(-(self.probs * (self.scores - beta * log_ratio)).sum())
