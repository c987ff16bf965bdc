"""A world so small that every response can be written down: policy, reference, critic, rewards and prompts, in float64.

lab/gradient.py sets `world`; scripts then get it by their ordinary flags, for example --model lab/tiny_world.py:policy.
The models are GPT-2s of one layer with random weights, since Llama's RMSNorm computes in float32 whatever the weights.
"""

import copy
import functools
import itertools
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import Batch, token_kl, token_logprobs, token_rewards, token_values  # noqa: E402
from plumbing import pad  # noqa: E402

PROMPTS = ["b a b", "a", "b b", "b a a b"]  # none begins with another: its responses would lead to the other's states
world = None  # what the functions at the end give out


def make_tokenizer(words):
    """A tokenizer of the words a, b, c ... (ids 0, 1, 2 ...) and EOS (the last id), which stands for others too."""
    vocabulary = {word: i for i, word in enumerate([*"abcdef"[:words], "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make_model(kind, vocab_size, seed, **kwargs):
    """A small GPT-2 with weights so large that its outputs differ a lot between inputs."""
    config = GPT2Config(vocab_size=vocab_size, n_embd=8, n_layer=1, n_head=2, n_positions=16, initializer_range=0.5,
                        eos_token_id=vocab_size - 1, **kwargs)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).double().eval()


def all_responses(words, length):
    """Every response of at most `length` tokens: ended by its first EOS (id `words`), or cut off."""
    for n in range(length):
        yield from ((*head, words) for head in itertools.product(range(words), repeat=n))
    yield from itertools.product(range(words), repeat=length)


class World:
    """B prompts, and all M responses to each: a Batch of B * M rows, row = prompt * M + response.

    Args: words (besides EOS); length (most tokens of a response); prompts (B, at most 4); temperature, beta and penalty
    (for a response without EOS): as in the scripts, for the means of the scores and the critic; constant (mean score,
    less the penalty); spread (how far the prompts' means lie from it, above and below by turns); peaked (factor on the
    logits of policy and reference); critic_error (standard deviation of the critic's error); at_optimum (whether the
    scores are those that make the policy the optimum of E[r] - beta KL, instead of random ones); toy (another number
    draws other weights and scores).
    """

    def __init__(self, words, length, prompts, temperature, beta, penalty, constant, spread, peaked, critic_error,
                 at_optimum=False, toy=0):
        self.temperature, self.beta, self.penalty, self.critic_error = temperature, beta, penalty, critic_error
        self.seed = 10 * toy
        self.tokenizer = make_tokenizer(words)
        self.prompts = self.tokenizer.batch_decode(self.tokenizer(PROMPTS[:prompts])["input_ids"])
        self.policy, self.reference = (make_model(GPT2LMHeadModel, words + 1, self.seed + n) for n in (3, 4))
        with torch.no_grad():
            for model in (self.policy, self.reference):
                model.transformer.ln_f.weight *= peaked
                model.transformer.ln_f.bias *= peaked
        responses = list(all_responses(words, length))
        self.M = len(responses)
        prompt_ids = [prompt for prompt in self.tokenizer(self.prompts)["input_ids"] for _ in responses]
        response_ids, response_mask = pad(responses * prompts, words, "right", "cpu")  # (B M, T)
        ended = torch.tensor([response[-1] == words for response in responses * prompts])  # (B M,)
        self.batch = Batch(*pad(prompt_ids, words, "left", "cpu"), response_ids, response_mask, ended, None)
        self.batch.old_logprobs = self.logprobs(temperature).detach()  # (B M, T)
        texts = self.tokenizer.batch_decode(self.batch.responses, skip_special_tokens=True)
        self.texts = [(self.prompts[row // self.M], text) for row, text in enumerate(texts)]  # (B M,), no two are equal

        generator = torch.Generator().manual_seed(self.seed + 5)
        self.scores = 2 * torch.randn(len(self.batch), generator=generator, dtype=torch.float64)  # (B M,)
        probabilities = self.batch.old_logprobs.sum(1).exp()  # (B M,)
        means = (probabilities * (self.scores - penalty * ~ended)).view(prompts, -1).sum(1)  # (B,)
        wanted = constant + spread * torch.tensor([1.0, -1.0, 1.0, -1.0])[:prompts]  # (B,)
        self.scores += (wanted - means).repeat_interleave(self.M)
        if at_optimum:  # pi = pi_ref exp(r / beta), where the score has the penalty taken off
            log_ratio = self.batch.old_logprobs - self.logprobs(temperature, self.reference).detach()  # (B M, T)
            self.scores = beta * log_ratio.sum(1) + penalty * ~ended

    def logprobs(self, temperature, model=None):
        """Log-probs of the tokens of every response: (B M, T), with gradients."""
        return token_logprobs(model or self.policy, self.batch, temperature)

    def greedy(self, prompt):
        """The row that takes the most probable token at every step."""
        rows, t = range(prompt * self.M, (prompt + 1) * self.M), 0
        while len(rows) > 1:
            best = max(rows, key=lambda row: self.batch.old_logprobs[row, t])
            rows = [row for row in rows if self.batch.responses[row, t] == self.batch.responses[best, t]]
            t += 1
        return rows[0]

    def true_gradient(self, prompts, temperature, beta, penalty):
        """Of -(E[r] - beta KL(pi || pi_ref)), averaged over these prompts (numbers): (P,), by differentiating the sum
        over all responses."""
        logprobs = self.logprobs(temperature).sum(1)  # (B M,)
        ref_logprobs = self.logprobs(temperature, self.reference).sum(1)  # (B M,)
        rewards = self.scores - penalty * ~self.batch.ended - beta * (logprobs - ref_logprobs)  # (B M,)
        values = (logprobs.exp() * rewards).view(-1, self.M).sum(1)  # (B,)
        gradients = torch.autograd.grad(-values[prompts].mean(), list(self.policy.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients])

    @functools.cached_property
    def critic(self):
        """A critic trained on each state's true value (the mean reward to go of what can follow), plus an error."""
        model = make_model(GPT2ForSequenceClassification, len(self.tokenizer), self.seed + 6, num_labels=1)
        mask, generator = self.batch.response_mask, torch.Generator().manual_seed(self.seed + 6)
        kl = token_kl(self.batch.old_logprobs, self.logprobs(self.temperature, self.reference).detach(), mask)
        rewards = token_rewards(self.scores - self.penalty * ~self.batch.ended, kl, self.beta, mask)
        returns = rewards.flip(1).cumsum(1).flip(1)  # (B M, T)
        probabilities, targets = self.batch.old_logprobs.sum(1).exp(), torch.zeros_like(returns)
        states = {}  # prompt, and tokens so far -> rows that begin like this
        for row, t in mask.nonzero().tolist():
            states.setdefault((row // self.M, *self.batch.responses[row, :t].tolist()), []).append(row)
        for (_, *tokens), rows in states.items():
            value = probabilities[rows] @ returns[rows, len(tokens)] / probabilities[rows].sum()
            targets[rows, len(tokens)] = value + self.critic_error * torch.randn((), generator=generator)
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1000, max_eval=2000, tolerance_grad=1e-12,
                                      tolerance_change=1e-16, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            error = (token_values(model, self.batch) - targets)[mask].square().mean()
            error.backward()
            return error

        optimizer.step(loss)
        optimizer.zero_grad()
        return model


# ----------------------------------------------------------------------------------------- what a script's flags name

def policy():
    return copy.deepcopy(world.policy), world.tokenizer


def reference():
    return copy.deepcopy(world.reference), world.tokenizer


def critic():
    return copy.deepcopy(world.critic), world.tokenizer


def reward(prompts, completions, **_):
    scores = dict(zip(world.texts, world.scores.tolist()))
    return [scores.get(pair, 0.0) for pair in zip(prompts, completions)]  # 0 for the texts of a dry run


def prompts(split):
    return Dataset.from_dict({"prompt": world.prompts})


def pairs(split):
    """Every ordered pair of responses to each prompt: B * M * M rows."""
    rows = [(*chosen, rejected) for chosen in world.texts for prompt, rejected in world.texts if prompt == chosen[0]]
    return Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*rows)))))


def encode(tokenizer, prompt_ids, completions, device):
    """Like common.encode, but a response that was cut off gets no EOS."""
    prompts = tokenizer.batch_decode(prompt_ids)
    return world.batch[[world.texts.index(pair) for pair in zip(prompts, completions)]]
