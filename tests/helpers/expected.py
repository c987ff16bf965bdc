"""The exact expectation of the gradient of a whole script, and the true gradient of E[r] - beta KL.

The world is so small that every response can be written down. A script's own `main` makes one
update for every draw of responses that could have been sampled, with weights that do not move; its
gradients, weighted by the draws' probabilities, add up to the expectation. Works for the path of
any script with the flags of rloo.py.
"""

import itertools

import torch

from helpers import loop, oracle, small_world

HERE = f"{loop.ROOT}/tests/helpers/small_world.py"
MODELS = {name: f"{HERE}:enumerable_{name}" for name in ("policy", "reference", "critic")}
TEMPERATURE, LENGTH, PENALTY = 0.8, 2, 0.5


def all_responses(words, eos):
    """Every response of at most LENGTH tokens: ended by its first EOS, or cut off."""
    for n in range(LENGTH):
        yield from ([*head, eos] for head in itertools.product(words, repeat=n))
    yield from map(list, itertools.product(words, repeat=LENGTH))


class World:
    """Every response to each of a few prompts, with its probability and its score."""

    def __init__(self, dataset="one_prompt", beta=0.3):
        self.beta, self.dataset = beta, f"{HERE}:{dataset}"
        self.tokenizer = small_world.two_words()
        self.policy, self.reference = (small_world.enumerable_policy()[0],
                                       small_world.enumerable_reference()[0])
        words = [i for i in range(len(self.tokenizer)) if i != self.tokenizer.eos_token_id]
        self.groups = {}  # prompt ids -> Rows
        for example in getattr(small_world, dataset)("train"):
            prompt = tuple(self.tokenizer(example["prompt"])["input_ids"])
            self.groups[prompt] = [
                self.row(prompt, response, example)
                for response in all_responses(words, self.tokenizer.eos_token_id)]

    def row(self, prompt, response, example):
        ended = response[-1] == self.tokenizer.eos_token_id
        logprobs = loop.token_logprobs(self.policy, list(prompt), response, TEMPERATURE)
        text = " ".join(self.tokenizer.convert_ids_to_tokens(response[: len(response) - ended]))
        score = small_world.reward([example["prompt"]], [text], [example["bonus"]])[0]
        return oracle.Row(list(prompt), response, ended, logprobs, {"reward": score})

    def greedy(self, prompt):
        """The Row that takes the most probable token at every step."""
        rows = self.groups[tuple(prompt)]
        response = []
        while [*response] not in [row.response for row in rows]:
            logits = self.policy(input_ids=torch.tensor([[*prompt, *response]])).logits[0, -1]
            response.append(logits.argmax().item())
        return next(row for row in rows if row.response == response)

    def true_gradient(self):
        """Gradient of -(E[r] - beta KL), a mean over the prompts, by the sum over all responses."""
        loss = 0.0
        for rows in self.groups.values():
            for row in rows:
                logprob = sum(oracle.token_logprobs(self.policy, row, TEMPERATURE))
                ref_logprob = sum(oracle.reference_logprobs(self.reference, row, TEMPERATURE))
                score = row.parts["reward"] - PENALTY * (not row.ended)
                loss = (loss - logprob.exp() * (score - self.beta * (logprob - ref_logprob))
                        / len(self.groups))
        return torch.cat([g.flatten()
                          for g in torch.autograd.grad(loss, list(self.policy.parameters()))])

    def draws(self, k):
        """Every way to sample k responses for each prompt (prompt -> Rows), and its probability."""
        single = [list(itertools.product(rows, repeat=k)) for rows in self.groups.values()]
        for draw in itertools.product(*single):
            logprob = sum(sum(row.old_logprobs) for rows in draw for row in rows)
            yield dict(zip(self.groups, draw)), torch.tensor(logprob).exp().item()

    def expected_gradient(self, script, output, k, before=None, **flags):
        """The expectation of a script's gradient over all draws: a vector, like `true_gradient`.

        `before` (a number of responses of the first prompt): before every draw an update on these,
        for scripts that remember the rewards of the update before. It is the same one each time,
        and its gradient does not count.
        """
        draws = list(self.draws(k))
        if before is not None:
            fixed = {prompt: (rows[before],) * k for prompt, rows in self.groups.items()}
            draws = [pair for draw in draws for pair in ((fixed, 0.0), draw)]

        def rollout(update, prompt_ids, args, greedy):
            if greedy:
                return [self.greedy(prompt) for prompt in prompt_ids]
            return [row for prompt in prompt_ids for row in draws[update][0][tuple(prompt)]]

        seen = loop.record(
            script, output, rollout, frozen=True, model=MODELS["policy"],
            reference=MODELS["reference"], critic=MODELS["critic"], reward=(f"{HERE}:reward",),
            gold="none", dataset=self.dataset, device="cpu", k=k, beta=self.beta,
            temperature=TEMPERATURE, missing_eos_penalty=PENALTY, max_new_tokens=LENGTH,
            prompts_per_step=len(self.groups), num_updates=len(draws), eval_prompts=1, eval_every=0,
            save_every=0, max_grad_norm=1e9, **flags)
        assert len(seen.steps[0]) == len(draws), "one optimizer step for each rollout"
        return sum(probability * torch.cat([gradient.flatten() for gradient in gradients])
                   for (_, probability), gradients in zip(draws, seen.steps[0]))
