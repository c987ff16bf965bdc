"""The world of the questions, so small that it can be enumerated: two tables, seven responses."""

import torch

from common import token_rewards

BETA = 2.0
RESPONSES = [".", "a.", "aa", "ab", "b.", "ba", "bb"]


class World:
    """A policy with the tokens a, b and "." (the end), in float64.

    A response has at most T = 2 tokens, so there are M = 7.
    """

    def __init__(self, seed=1):
        generator = torch.Generator().manual_seed(seed)
        rows = [0.2, 0.3, 0.5], [0.1, 0.3, 0.6], [0.15, 0.25, 0.6]
        # (3, 3), state (start, a, b) x token (a, b, .)
        self.policy = torch.stack([shuffled(row, generator) for row in rows])
        self.reference = torch.stack([shuffled(row, generator) for row in rows])
        self.scores = shuffled([-3.0, -1.0, 0.0, 0.5, 1.0, 2.0, 6.0], generator)  # (M,)
        self.values = shuffled([-1.5, 1.0, 3.0], generator)  # (3,), by a critic that knows nothing
        tokens = [["ab.".index(token) for token in f"{text:.<2}"] for text in RESPONSES]
        self.tokens = torch.tensor(tokens)  # (M, T)
        self.mask = torch.tensor([[True, len(text) == 2] for text in RESPONSES])  # (M, T)
        start = torch.zeros(7, dtype=torch.long)  # (M,)
        self.states = torch.stack([start, (self.tokens[:, 0] + 1) % 3], 1)  # (M, T)
        self.logits = self.policy.log()  # (3, 3), the parameters
        self.logprobs = self.token_logprobs(self.logits)  # (M, T)
        self.probs = self.logprobs.sum(1).exp()  # (M,)
        self.ref_logprobs = self.token_logprobs(self.reference.log())  # (M, T)
        self.ref_probs = self.ref_logprobs.sum(1).exp()  # (M,)
        jacobian = torch.autograd.functional.jacobian(self.token_logprobs, self.logits)
        self.score_functions = jacobian.flatten(2)  # (M, T, 9), each token's grad log pi

    def token_logprobs(self, logits):
        return logits.log_softmax(1)[self.states, self.tokens] * self.mask

    def gradient(self, rewards):
        """The true gradient (9,) of E[rewards]. The rewards (M,) do not depend on the logits."""
        return (self.probs * rewards) @ self.score_functions.sum(1)

    def draws(self, k):
        """Every draw of k responses, in every order.

        Returns: row numbers (7^k, k), and the probability of each draw (7^k,).
        """
        rows = torch.cartesian_prod(*[torch.arange(7)] * k).view(-1, k)
        return rows, self.probs[rows].prod(1)

    def estimates(self, advantages, k, length_mean=False):
        """The gradient that every draw gives: 1/k sum_i A_i grad log pi(y_i).

        Args: advantages (7^k * k,); k; length_mean (divide log pi by the length).
        Returns: (7^k, 9).
        """
        rows, _ = self.draws(k)
        gradients = self.score_functions.sum(1)  # (M, 9)
        if length_mean:
            gradients = gradients / self.mask.sum(1, keepdim=True)
        return (advantages.view(-1, k, 1) * gradients[rows]).mean(1)

    def token_gradient(self, advantages):
        """The expected gradient (9,) of sum_t A_t grad log pi(y_t). Args: advantages (M, T)."""
        weights = self.probs.unsqueeze(1) * advantages.double()  # (M, T)
        return torch.einsum("mt, mtg -> g", weights, self.score_functions)

    def token_rewards(self):
        """The score on the last token of each response, without KL: (M, T)."""
        return token_rewards(self.scores, torch.zeros_like(self.logprobs), 0.0, self.mask)

    def tables(self):
        """The world in Markdown."""
        numbers = lambda row: [f"{x:g}".replace("-", "−") for x in row.tolist()]
        states = torch.cat([self.policy, self.reference, self.values.view(3, 1)], 1)  # (3, 7)
        lines = [
            ["state", "π(a)", "π(b)", "π(.)", "π_ref(a)", "π_ref(b)", "π_ref(.)", "V"],
            ["---"] * 8,
            *[[name, *numbers(row)] for name, row in zip(("start", "after a", "after b"), states)],
            [],
            ["response", *(f"`{text}`" for text in RESPONSES)],
            ["---"] * 8,
            ["score r", *numbers(self.scores)]]
        return "\n".join(map(table_line, lines))


def shuffled(values, generator):
    order = torch.randperm(len(values), generator=generator)
    return torch.tensor(values, dtype=torch.float64)[order]


def table_line(cells):
    if cells[:1] == ["---"]:
        return "|---" * len(cells) + "|"
    return f"| {' | '.join(cells)} |" if cells else ""


def kl_of(probs, ref_probs):
    return (probs * (probs / ref_probs).log()).sum().item()


def cosine_and_projection(expected, true):
    product, length = expected @ true, true.norm()
    return [(product / expected.norm() / length).item(), (product / length**2).item()]
