"""tasks/gsm8k.py: which number is a response's answer."""

import json
from decimal import Decimal
from pathlib import Path

import pytest

from plumbing import load_module

gsm8k = load_module(str(Path(__file__).parent.parent / "tasks" / "gsm8k.py"))
DATA = Path(__file__).parent.parent.parent / "shared" / "data"


@pytest.mark.parametrize("text, number", [
    ("16 - 3 - 4 = 9, 9 * 2 = 18\n#### 18", "18"),
    ("#### $1,800.00 a month", "1800"),
    (r"so we get \boxed{18}", "18"),
    (r"\boxed{18\text{ dollars}}", "18"),
    (r"\boxed{x = -7}", "-7"),
    (r"\[ \boxed{\$1,234.50} \]", "1234.5"),
    ("The answer is 18.", "18"),
    ("The final answer is: **18**", "18"),
    ("Answer: 1,000,000", "1000000"),
    ("the answer is 3 + 15 = 18 eggs, as 3 and 15 are given", "18"),
    ("The answer is −7.", "-7"),
    ("The answer is -$20.", "-20"),
    ("The answer is .5", "0.5"),
    ("The answer is 18%", "18"),
    ("The answer is 5. No, wait. The answer is 6.", "6"),
    ("#### 5\nIs that right? \\boxed{6}", "6"),
    ("#### 5 of 7\nThe answer is unknown to me", "5"),
    ("The answer is 18. It takes 3 steps.", "18"),
    ("The answer is 2 * 9 = 36 / 2 = 18", "18"),
    ("The answer is 18 or 19 = all of them", "18"),
    (r"so \boxed{18}, as 9 + 9 = 20 - 2", "18"),
    (r"\boxed{\text{about} 18} = 20", "18"),
    (r"\boxed{18", "18"),  # cut off
    ("she has 3 + 2 = 5 left", "5"),
    ("12 apples, 30 pears", "30"),
    ("5 - 3", "3"),
])
def test_final_number(text, number):
    assert gsm8k.final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "I don't know", "####", "The answer is unknown", r"\boxed{}",
                                  "$", "-", ",,."])
def test_no_number_is_no_answer(text):
    assert gsm8k.final_number(text) is None
    assert gsm8k.reward(None, [text], answer=["#### 0"]) == [0.0]


def test_reward_of_texts_and_of_chats():
    answers = ["a #### 18", "b #### 1,800", "#### 2 #### -3"]
    texts = ["#### 18.0", "#### 1801", "The answer is -3"]
    assert gsm8k.reward(None, texts, answer=answers) == [1, 0, 1]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert gsm8k.reward(None, chats, answer=answers) == [1, 0, 1]


@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "gsm8k_train_1000.jsonl"])
def test_the_real_references_are_right_and_shifted_ones_wrong(name):
    if not (DATA / name).is_file():
        pytest.skip(f"{DATA / name} is not here: real data lies outside the repository")
    answers = [json.loads(line)["answer"] for line in (DATA / name).read_text().splitlines()]
    assert gsm8k.reward(None, answers, answer=answers) == [1.0] * len(answers)
    heads, ends = zip(*(answer.rsplit("#### ", 1) for answer in answers))
    for shift in (1, -1):
        shifted = [f"{head}#### {int(end.replace(',', '')) + shift}"
                   for head, end in zip(heads, ends)]
        assert gsm8k.reward(None, shifted, answer=answers) == [0.0] * len(answers)
    boxed = [f"{head}So the answer is \\boxed{{{end}}}." for head, end in zip(heads, ends)]
    assert gsm8k.reward(None, boxed, answer=answers) == [1.0] * len(answers)
