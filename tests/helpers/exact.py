"""Every response of a tiny policy, in float64: exact expectations and gradients, not samples."""

import itertools
import math

import torch
from helpers.tiny import make_float64_critic, make_float64_policy

from common import Batch, sequence_rewards, token_kl, token_logprobs, token_rewards, token_values


def all_responses(length, words, eos):
    """Every response of at most `length` tokens: ended by its first EOS, or cut off."""
    for n in range(length):
        yield from ((*head, eos) for head in itertools.product(words, repeat=n))
    yield from itertools.product(words, repeat=length)


class Enumeration:
    """All M responses of a policy of a few words and EOS to a prompt, each with a random reward."""

    def __init__(self, words, length=3, temperature=0.8):
        eos = words  # token ids: 0 ... words - 1, then EOS
        self.policy = make_float64_policy(words + 1, seed=3)
        reference = make_float64_policy(words + 1, seed=4)
        rows = list(all_responses(length, range(words), eos))
        responses = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows])  # (M, T)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row))
                             for row in rows]).bool()  # (M, T)
        prompts = torch.tensor([[1, 0, 1]]).expand(len(rows), -1)  # (M, 3)
        ended = torch.tensor([row[-1] == eos for row in rows])  # (M,)
        self.batch = Batch(prompts, torch.ones_like(prompts).bool(), responses, mask, ended,
                           torch.zeros(mask.shape))
        self.logprobs = token_logprobs(self.policy, self.batch, temperature)  # (M, T), not detached
        self.ref_logprobs = token_logprobs(reference, self.batch, temperature).detach()  # (M, T)
        self.probs = self.logprobs.sum(1).exp()  # (M,)
        self.scores = 2 * torch.randn(len(rows), generator=torch.Generator().manual_seed(5),
                                      dtype=torch.float64)  # (M,)

        self.kl = token_kl(self.logprobs.detach(), self.ref_logprobs, mask)  # (M, T)
        self.mask = mask  # (M, T)
        self.greedy = self.greedy_row(rows)
        with torch.no_grad():  # an arbitrary critic, far from the truth
            self.values = 3 * token_values(make_float64_critic(words + 1, seed=6),
                                           self.batch)  # (M, T)

    def greedy_row(self, rows):
        """Number of the response that takes the most probable token at every step."""
        alive, prefix = list(range(len(rows))), ()
        while len(alive) > 1:
            t = len(prefix)
            best = max(alive, key=lambda row: self.logprobs[row, t].item())
            prefix = (*prefix, rows[best][t])
            alive = [row for row in alive if rows[row][: t + 1] == prefix]
        return alive[0]

    def sequence_rewards(self, beta):
        return sequence_rewards(self.scores, self.kl, beta)  # (M,)

    def token_rewards(self, beta):
        return token_rewards(self.scores, self.kl, beta, self.mask)  # (M, T)

    def expected_gradient(self, loss, draws):
        """Gradient of the mean of loss(rows) over every draw of `draws` responses.

        Each draw counts with its probability. The loss must not depend on the order of the rows, so
        one order of each draw stands for all.
        """
        expectation = 0.0
        for number, draw in enumerate(
                itertools.combinations_with_replacement(range(len(self.probs)), draws)):
            rows = torch.tensor(draw)
            orders = (math.factorial(draws)
                      // math.prod(math.factorial(draw.count(row)) for row in set(draw)))
            expectation = expectation + orders * self.probs[rows].prod().detach() * loss(rows)
            if number % 20 == 0:
                torch.testing.assert_close(loss(rows.roll(1)), loss(rows), rtol=1e-9, atol=1e-12)
        return self.gradient(expectation)

    def gradient(self, loss):
        gradients = torch.autograd.grad(loss, list(self.policy.parameters()), retain_graph=True)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def true_gradient(self, beta):
        """Gradient of -(E[r] - beta KL(pi || pi_ref)), from the sum over all responses."""
        log_ratio = self.logprobs.sum(1) - self.ref_logprobs.sum(1)  # (M,)
        return self.gradient(-(self.probs * (self.scores - beta * log_ratio)).sum())
