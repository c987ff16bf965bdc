"""A world so small that every response can be written down, in float64.

lab/gradient.py sets `world`; scripts then get it by their ordinary flags, for example --model
lab/tiny_world.py:policy. The models are GPT-2s of one layer with random weights, since Llama's
RMSNorm computes in float32 whatever the weights.
"""

import copy
import functools
import itertools
from dataclasses import replace

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel,
                          PreTrainedTokenizerFast)

from common import Batch, pad, token_kl, token_logprobs, token_rewards, token_values

# No prompt begins with another: its responses would lead to the other's states.
PROMPTS = ["b a b", "a", "b b", "b a a b"]
world = None  # what the functions at the end give out


def make_tokenizer(words):
    """A tokenizer of the words a, b, c ... (ids 0, 1, 2 ...) and EOS, which has the last id.

    EOS stands for unknown words too.
    """
    vocabulary = {word: i for i, word in enumerate([*"abcdef"[:words], "<eos>"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def make_model(kind, vocab_size, seed, **kwargs):
    """A small GPT-2 with weights so large that its outputs differ a lot between inputs."""
    config = GPT2Config(vocab_size=vocab_size, n_embd=8, n_layer=1, n_head=2, n_positions=16,
                        initializer_range=0.5, eos_token_id=vocab_size - 1, **kwargs)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).double().eval()


def all_responses(words, length):
    """Every response of at most `length` tokens, ended by its first EOS (id `words`) or cut off."""
    for n in range(length):
        yield from ((*head, words) for head in itertools.product(range(words), repeat=n))
    yield from itertools.product(range(words), repeat=length)


class World:
    """B prompts, and all M responses to each: a Batch of B * M rows, row = prompt * M + response.

    Args: words (besides EOS); length (most tokens of a response); prompts (B, at most 4);
    temperature, beta and penalty (for a response without EOS): as in the scripts, for the means of
    the scores and the critic; constant (mean score, less the penalty); spread (how far the prompts'
    means lie from it, above and below by turns); peaked (factor on the logits of policy and
    reference); critic_error (standard deviation of the critic's error); at_optimum (whether the
    scores are those that make the policy the optimum of E[r] - beta KL, instead of random ones);
    toy (another number draws other weights and scores); binary (a score is 1 where it is above the
    prompt's median, and 0 elsewhere).
    """

    def __init__(self, words, length, prompts, temperature, beta, penalty, constant, spread, peaked,
                 critic_error, at_optimum=False, toy=0, binary=False):
        self.temperature, self.beta, self.penalty = temperature, beta, penalty
        self.critic_error, self.seed = critic_error, 10 * toy
        self.tokenizer = make_tokenizer(words)
        prompt_ids = self.tokenizer(PROMPTS[:prompts])["input_ids"]
        self.prompts = self.tokenizer.batch_decode(prompt_ids)
        self.policy, self.reference = (make_model(GPT2LMHeadModel, words + 1, self.seed + n)
                                       for n in (3, 4))
        with torch.no_grad():
            for model in (self.policy, self.reference):
                model.transformer.ln_f.weight *= peaked
                model.transformer.ln_f.bias *= peaked
        self.sampler = self.policy  # lab/stale.py moves the policy away from it
        responses = list(all_responses(words, length))
        self.M = len(responses)
        self.batch = self.make_batch(responses)
        texts = self.tokenizer.batch_decode(self.batch.responses, skip_special_tokens=True)
        self.texts = [(self.prompts[row // self.M], text)  # (B M,), no two are equal
                      for row, text in enumerate(texts)]
        self.scores = self.make_scores(constant, spread)  # (B M,)
        if binary:
            groups = self.scores.view(-1, self.M)  # (B, M)
            self.scores = (groups > groups.median(1, keepdim=True).values).double().flatten()
        if at_optimum:  # pi = pi_ref exp(r / beta), where the score has the penalty taken off
            ref_logprobs = self.logprobs(temperature, self.reference).detach()  # (B M, T)
            log_ratio = (self.batch.old_logprobs - ref_logprobs).sum(1)  # (B M,)
            self.scores = beta * log_ratio + penalty * ~self.batch.ended

    def make_batch(self, responses):
        """The Batch of all M responses (tuples of ids) to each prompt."""
        B, eos = len(self.prompts), self.tokenizer.eos_token_id
        prompt_ids = self.tokenizer(self.prompts)["input_ids"]
        prompts = pad([ids for ids in prompt_ids for _ in responses], eos, "left", "cpu")
        ended = torch.tensor([response[-1] == eos for response in responses * B])  # (B M,)
        batch = Batch(*prompts, *pad(responses * B, eos, "right", "cpu"), ended, None)
        logprobs = token_logprobs(self.policy, batch, self.temperature)  # (B M, T)
        return replace(batch, old_logprobs=logprobs.detach())

    def make_scores(self, constant, spread):
        """Random scores (B M,), whose means under the policy are what the world's flags say."""
        B, generator = len(self.prompts), torch.Generator().manual_seed(self.seed + 5)
        scores = 2 * torch.randn(B * self.M, generator=generator, dtype=torch.float64)
        probabilities = self.batch.old_logprobs.sum(1).exp()  # (B M,)
        lowered = scores - self.penalty * ~self.batch.ended  # (B M,)
        means = (probabilities * lowered).view(B, -1).sum(1)  # (B,)
        wanted = constant + spread * torch.tensor([1.0, -1.0, 1.0, -1.0])[:B]  # (B,)
        return scores + (wanted - means).repeat_interleave(self.M)

    def logprobs(self, temperature, model=None):
        """Log-probs of the tokens of every response: (B M, T), with gradients."""
        return token_logprobs(model or self.policy, self.batch, temperature)

    def greedy(self, prompt):
        """The row that takes the most probable token at every step."""
        rows, t = range(prompt * self.M, (prompt + 1) * self.M), 0
        while len(rows) > 1:
            best = max(rows, key=lambda row: self.batch.old_logprobs[row, t])
            token = self.batch.responses[best, t]
            rows, t = [row for row in rows if self.batch.responses[row, t] == token], t + 1
        return rows[0]

    def true_gradient(self, prompts, temperature, beta, penalty):
        """That of -(E[r] - beta KL(pi || pi_ref)), averaged over these prompts (numbers): (P,).

        By differentiating the sum over all responses.
        """
        logprobs = self.logprobs(temperature).sum(1)  # (B M,)
        ref_logprobs = self.logprobs(temperature, self.reference).sum(1)  # (B M,)
        scores = self.scores - penalty * ~self.batch.ended  # (B M,)
        rewards = scores - beta * (logprobs - ref_logprobs)  # (B M,)
        values = (logprobs.exp() * rewards).view(-1, self.M).sum(1)  # (B,)
        gradients = torch.autograd.grad(-values[prompts].mean(), list(self.policy.parameters()))
        return torch.cat([gradient.flatten() for gradient in gradients])

    def loss_gradient(self):
        """The true gradient over all prompts, under the world's own settings: (P,)."""
        return self.true_gradient(range(len(self.prompts)), self.temperature, self.beta,
                                  self.penalty)

    @functools.cached_property
    def critic(self):
        """A critic trained on each state's true value, plus an error."""
        model = make_model(GPT2ForSequenceClassification, len(self.tokenizer), self.seed + 6,
                           num_labels=1)
        mask, targets = self.batch.response_mask, self.noisy_values()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=1000, max_eval=2000,
                                      tolerance_grad=1e-12, tolerance_change=1e-16,
                                      line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            error = (token_values(model, self.batch) - targets)[mask].square().mean()
            error.backward()
            return error

        optimizer.step(loss)
        optimizer.zero_grad()
        return model

    def noisy_values(self):
        """Each state's value (the mean reward to go of what can follow) plus an error: (B M, T)."""
        mask, generator = self.batch.response_mask, torch.Generator().manual_seed(self.seed + 6)
        ref_logprobs = self.logprobs(self.temperature, self.reference).detach()  # (B M, T)
        kl = token_kl(self.batch.old_logprobs, ref_logprobs, mask)  # (B M, T)
        scores = self.scores - self.penalty * ~self.batch.ended  # (B M,)
        rewards = token_rewards(scores, kl, self.beta, mask)  # (B M, T)
        returns = rewards.flip(1).cumsum(1).flip(1)  # (B M, T)
        states = {}  # prompt, and tokens so far -> rows that begin like this
        for row, t in mask.nonzero().tolist():
            tokens = self.batch.responses[row, :t].tolist()
            states.setdefault((row // self.M, *tokens), []).append(row)
        probabilities, values = self.batch.old_logprobs.sum(1).exp(), torch.zeros_like(returns)
        for (_, *tokens), rows in states.items():
            value = probabilities[rows] @ returns[rows, len(tokens)] / probabilities[rows].sum()
            error = self.critic_error * torch.randn((), generator=generator)
            values[rows, len(tokens)] = value + error
        return values


# ----------------------------------------------------------------------- what a script's flags name


def policy():
    return copy.deepcopy(world.policy), world.tokenizer


def reference():
    return copy.deepcopy(world.reference), world.tokenizer


def critic():
    return copy.deepcopy(world.critic), world.tokenizer


def reward(prompts, completions, **_):
    scores = dict(zip(world.texts, world.scores.tolist()))
    # 0 for the texts of a dry run
    return [scores.get(pair, 0.0) for pair in zip(prompts, completions)]


def prompts(split):
    return Dataset.from_dict({"prompt": world.prompts})


def pairs(split):
    """Every ordered pair of responses to each prompt: B * M * M rows."""
    rows = [(*chosen, rejected) for chosen in world.texts
            for prompt, rejected in world.texts if prompt == chosen[0]]
    return Dataset.from_dict(dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*rows)))))


def make_batch(tokenizer, prompt_ids, response_ids, device):
    """Like common.make_batch, but a response that was cut off has no EOS."""
    prompts = tokenizer.batch_decode(prompt_ids)
    texts = tokenizer.batch_decode(response_ids, skip_special_tokens=True)
    return world.batch[[world.texts.index(pair) for pair in zip(prompts, texts)]]
