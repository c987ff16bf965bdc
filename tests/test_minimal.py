"""rloo_minimal.py: its own main against the second implementation in float64, and its sampler."""

import pytest
from helpers.tiny import encode
import rloo_minimal
import torch
from helpers import loop, oracle, small_world
from test_loops import BASE, assert_close, score

import common
import rloo
from plumbing import load_rewards, load_tokenizer
from tasks import mini_tldr

FLAGS = {name: BASE[name] for name in ("k", "beta", "temperature", "lr", "num_updates", "seed",
                                       "prompts_per_step", "max_new_tokens",
                                       "missing_eos_penalty")}
EXAMPLES = {row["prompt"]: row for row in small_world.prompts("train")}


@pytest.fixture
def page(monkeypatch):
    """The page as a student changes it: with prompts, a reward and a policy of one's own."""
    reward = lambda prompts, completions: small_world.reward(
        prompts, completions, [EXAMPLES[prompt]["bonus"] for prompt in prompts])
    monkeypatch.setattr(rloo_minimal, "load_prompts", lambda: list(EXAMPLES))
    monkeypatch.setattr(rloo_minimal, "reward", reward)
    monkeypatch.setattr(rloo_minimal.AutoModelForCausalLM, "from_pretrained",
                        lambda name, dtype: small_world.policy()[0])
    monkeypatch.setattr(rloo_minimal.AutoTokenizer, "from_pretrained",
                        lambda name: small_world.tokenizer())
    with loop.float64():
        yield rloo_minimal


def given_rollout(updates):
    """A rollout whose responses end early, late and never. Its Rows are appended to `updates`."""
    def rollout(policy, tokenizer, prompts, k, temperature, max_new_tokens):
        ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        words = [tokenizer.convert_tokens_to_ids(word) for word in small_world.WORDS]
        rows = loop.random_responses(policy, words, tokenizer.eos_token_id, k, temperature,
                                     max_new_tokens, len(updates), ids)
        score(rows, [EXAMPLES[prompt] for prompt in prompts for _ in range(k)], BASE["reward"])
        updates.append({"rows": rows})
        batch = loop.as_batch(rows, tokenizer.pad_token_id)
        ids = torch.cat([batch.prompts, batch.responses], 1)
        mask = torch.cat([batch.prompt_mask, batch.response_mask], 1)
        return ids, mask, batch.prompts.shape[1], batch.ended

    return rollout


@pytest.mark.parametrize("flags", [
    {},
    {"k": 2, "beta": 0.0, "temperature": 1.0, "max_grad_norm": 0.1, "num_updates": 4},
    {"max_grad_norm": 1e9, "missing_eos_penalty": 0.0, "prompts_per_step": 1},
])
def test_main_does_what_the_second_implementation_does(flags, page, monkeypatch, tmp_path, capsys):
    """What it does of rloo.py: every gradient, the weights in the end, and what is printed."""
    args = page.Args(**FLAGS | flags, output=str(tmp_path / "out"))
    updates, gradients, step = [], [], torch.optim.Adam.step

    def recorded(adam, *args, **kwargs):
        parameters = adam.param_groups[0]["params"]
        gradients.append(loop.clone(parameter.grad for parameter in parameters))
        return step(adam, *args, **kwargs)

    monkeypatch.setattr(page, "rollout", given_rollout(updates))
    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    policy = page.main(args)

    expected, reference = small_world.policy()[0], small_world.policy()[0]
    steps, metrics = oracle.train("rloo", rloo.Args(**FLAGS | flags), updates, expected, reference)
    assert len(gradients) == len(steps) == args.num_updates >= 3
    assert_close(gradients, [step["policy"] for step in steps], "gradients")
    assert_close([policy.parameters()], [expected.parameters()], "weights", tolerance=1e-7)
    saved = type(policy).from_pretrained(args.output, dtype=torch.float64)
    assert_close([saved.parameters()], [policy.parameters()], "saved", tolerance=1e-15)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [str(args.num_updates), *(f"{metrics[-1][name]:.{digits}f}" for name, digits in (
        ("objective/scores", 2), ("objective/kl", 2), ("rollout/length", 1)))] in table


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_it_samples_from_the_policy(temperature, page, monkeypatch):
    """Each token is from the distribution of its row alone, up to the first EOS; then padding."""
    policy, tokenizer = small_world.policy()
    seen = []

    def multinomial(probs, count, real=torch.multinomial):
        seen.append(probs)
        return real(probs, count)

    monkeypatch.setattr(torch, "multinomial", multinomial)
    torch.manual_seed(0)
    prompts, k, length = list(EXAMPLES), 8, 6
    ids, mask, P, ended = page.rollout(policy, tokenizer, prompts, k, temperature, length)
    assert len(ids) == k * len(prompts) and ids.shape[1] == P + len(seen) <= P + length
    assert ended.any() and not ended.all()
    for row in range(len(ids)):
        prompt = tokenizer(prompts[row // k])["input_ids"]
        assert ids[row, :P][mask[row, :P]].tolist() == prompt
        response = ids[row, P:][mask[row, P:]].tolist()
        assert mask[row, P:].tolist() == [t < len(response) for t in range(len(seen))]
        assert [token == tokenizer.eos_token_id for token in response] == [
            t + 1 == len(response) and bool(ended[row]) for t in range(len(response))]
        logits = policy(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        for t, expected in enumerate((logits / temperature).softmax(-1)):
            torch.testing.assert_close(seen[t][row], expected, rtol=1e-9, atol=1e-12)
    logprobs = page.token_logprobs(policy, ids, mask, P, temperature)
    chosen = torch.stack(seen, 1).gather(2, ids[:, P:].unsqueeze(2)).squeeze(2).log() * mask[:, P:]
    torch.testing.assert_close(logprobs, chosen, rtol=1e-9, atol=1e-9)


def test_one_response_has_no_others_to_compare_with(page):
    with pytest.raises(SystemExit, match="--k 1"):
        page.main(page.Args(k=1))


def test_its_reward_is_that_of_the_task(monkeypatch):
    """That of rloo.py's default, for responses that have ended."""
    monkeypatch.chdir(loop.ROOT)
    args = rloo.Args(reward=("tasks/mini_tldr-reward",), gold="none", microbatch_tokens=8192)
    rewards, rows = load_rewards(args, torch.device("cpu")), mini_tldr.prompts("test")[:20]
    tokenizer = load_tokenizer("tasks/mini_tldr-reward")
    completions = [" ".join(text.split()[: number % 5]) for number, text in
                   enumerate(rows["completion"])]
    batch = encode(tokenizer, tokenizer(rows["prompt"])["input_ids"], completions, "cpu")
    expected = common.score(rewards, tokenizer, batch, rows)["score"].tolist()
    assert rloo_minimal.reward(rows["prompt"], completions) == pytest.approx(expected, abs=1e-4)


def test_a_model_that_is_not_there(monkeypatch):
    monkeypatch.setattr(rloo_minimal, "load_prompts", lambda: ["a"])
    with pytest.raises(SystemExit, match="--model nowhere: neither a model folder nor one on"):
        rloo_minimal.main(rloo_minimal.Args(model="nowhere"))
