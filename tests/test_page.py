"""exercises/page.py: rloo_minimal.py changed into ReMax passes, and what went wrong is named."""

from pathlib import Path

import pytest
import torch
from torch.optim import optimizer

from exercises import page

ROOT = Path(__file__).parent.parent
REMAX = [  # what a student changes
    ('''    if args.k < 2:
        raise SystemExit(f"error: --k {args.k}: the baseline is the mean of the other k - 1 "
                         "responses; use at least 2")
''', ""),
    ('''    rewards = rewards.view(-1, k)  # (B, k)
    baseline = (rewards.sum(1, keepdim=True) - rewards) / (k - 1)  # (B, k)
    return (rewards - baseline).flatten()
''', '''    rewards, baseline, mask = rewards
    return (rewards.flip(1).cumsum(1).flip(1) - baseline.unsqueeze(1)) * mask
'''),
    ("(advantages * logprobs.sum(1))", "(advantages * logprobs)"),
    ("k, temperature, max_new_tokens):", "k, temperature, max_new_tokens, greedy=False):"),
    ("        tokens = torch.multinomial(probs, 1).masked_fill(",
     "        tokens = probs.argmax(1, keepdim=True) if greedy else torch.multinomial(probs, 1)\n"
     "        tokens = tokens.masked_fill("),
    ('''        scores -= args.missing_eos_penalty * ~ended
''', '''        scores -= args.missing_eos_penalty * ~ended
        best, keep, Q, stopped = rollout(policy, tokenizer, prompts, 1, args.temperature,
                                         args.max_new_tokens, greedy=True)
        texts = [tokenizer.decode(row[real], skip_special_tokens=True)
                 for row, real in zip(best[:, Q:], keep[:, Q:])]
        baseline = torch.tensor(reward(prompts, texts))  # (B,)
        baseline -= args.missing_eos_penalty * ~stopped
'''),
    ('''        rewards = scores - args.beta * kl.sum(1)  # (N,)
''', '''        real = mask[:, P:]
        rewards = -args.beta * kl  # (N, T)
        rewards[torch.arange(len(rewards)), real.sum(1) - 1] += scores
        rewards = rewards, baseline.repeat_interleave(args.k), real
'''),
]
WRONG = [  # further edits of the right page, and what they are called
    ([("baseline.unsqueeze(1)", "0.0")], "no baseline is subtracted"),
    ([("- baseline.unsqueeze(1)", "+ baseline.unsqueeze(1)")], "the baseline is added"),
    ([("rewards.flip(1).cumsum(1).flip(1)", "rewards.sum(1, keepdim=True)")],
     "every token is charged for the KL of the whole response"),
    ([("rewards = -args.beta * kl", "rewards = 0 * kl")], "the KL is missing"),
    ([("        baseline -= args.missing_eos_penalty * ~stopped\n", "")],
     "a greedy response without EOS has to pay"),
    ([("baseline.repeat_interleave(args.k)", "baseline.repeat(args.k)")],
     "the greedy scores are on other prompts' rows"),
    ([("        real = mask[:, P:]\n", '''        real = mask[:, P:]
        with torch.no_grad():
            of_best = (token_logprobs(policy, best, keep, Q, args.temperature)
                       - token_logprobs(reference, best, keep, Q, args.temperature))
        baseline = baseline - args.beta * of_best.sum(1)
''')], "the baseline is the greedy response's score"),
    ([("greedy=True)", "greedy=False)")], "your gradient is another: cosine to ReMax's "),
    ([("/ len(ids)\n", "/ len(ids) * 2\n")], "cosine to ReMax's 1.000, length along it 2.000"),
    ([("repeated = [prompt for prompt in prompts for _ in range(args.k)]",
       "repeated = prompts * args.k")],
     "reward does not get k responses"),
    ([("        optimizer.step()\n        scheduler.step()\n", "")],
     "it makes 0 steps in 2 updates"),
    ([("len(ids)\n", "len(idz)\n")], "NameError: name 'idz' is not defined"),
]


def write(path, *edits):
    text = (ROOT / "rloo_minimal.py").read_text()
    for old, new in edits:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    return str(path)


def test_the_page_as_it_is(tmp_path):
    assert page.judge(write(tmp_path / "rloo.py")) == "with --k 2: the gradient is still RLOO's"
    path = write(tmp_path / "wrong.py", *REMAX[1:])
    assert "SystemExit: error: --k 1: " in page.judge(path)


def test_remax(tmp_path, capsys, monkeypatch):
    """And nothing is left behind: no file, no hook, no other default type."""
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "remax.py", *REMAX)
    assert page.main(page.Args(path))
    assert capsys.readouterr().out == f"{path}: it is ReMax\n"
    assert {file.name for file in tmp_path.iterdir()} <= {"remax.py", "__pycache__"}
    assert not optimizer._global_optimizer_pre_hooks and torch.get_default_dtype() == torch.float32


def test_the_world_tells(tmp_path, monkeypatch):
    """With two responses to each prompt: lengths and ends differ, and the KL is not 0 for long."""
    path, found = write(tmp_path / "remax.py", *REMAX), []
    monkeypatch.setattr(page, "what_is_wrong", lambda pairs: found.extend(pairs))
    monkeypatch.setattr(page, "all_alike", lambda pairs, advantages: False)
    page.judge(path)
    for _, parts in found:
        assert {1, page.T} <= set(parts.mask.sum(1).tolist())
        assert len(set(parts.penalties.tolist())) == 2 and parts.greedy.unique().numel() > 2
    assert len(found) == 2 and found[1][1].kl.abs().max() > 0.1


def test_the_greedy_response_may_come_first(tmp_path):
    """The sampled rows are found in both orders."""
    penalized, with_greedy = REMAX[5]
    greedy = with_greedy.removeprefix(penalized)
    scored = "        scores = torch.tensor(reward(repeated, completions))  # (N,)\n"
    first = scored + penalized, greedy + scored + penalized
    path = write(tmp_path / "remax.py", *REMAX[:5], first, REMAX[6])
    assert page.judge(path) is None


@pytest.mark.parametrize("edits, sentence", WRONG, ids=range(len(WRONG)))
def test_a_mistake_is_named(edits, sentence, tmp_path):
    assert sentence in page.judge(write(tmp_path / "wrong.py", *REMAX, *edits))
