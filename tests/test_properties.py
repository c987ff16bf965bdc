"""Whatever data and rewards hold: a result that keeps its promises, or one line and exit code 2."""

import json
import math
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.families import save_family
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from helpers.tiny import CPU, data_args, encode, load_scorer

from common import decode
from plumbing import load_module, load_rows, load_tokenizer, one_line, prompt_tokens
from plumbing.data import shorten

ROOT = Path(__file__).parent.parent
gsm8k = load_module(str(ROOT / "tasks" / "gsm8k.py"))

quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck),
                 derandomize=True)
texts = st.text(max_size=40) | st.sampled_from([
    "", " ", "\n", "a" * 50_000, "🙂👩‍👩‍👧", "\u202eabc", "\x00", "\ufeffx", "é\u0301"])
values = st.none() | st.booleans() | st.integers() | st.floats() | texts
messages = st.lists(
    st.fixed_dictionaries({"role": texts | st.just("user"), "content": texts}), max_size=3)
cells = (values | messages | st.lists(values, max_size=2)
         | st.dictionaries(st.text(max_size=3), values, max_size=2))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return load_tokenizer(save_family(tmp_path_factory.mktemp("qwen"), "qwen2"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("data") / "data.jsonl"


def attempt(call, capsys):
    """The result of call(), or None where it stopped as it should: one line, exit code 2."""
    capsys.readouterr()
    try:
        return call()
    except SystemExit as stopped:
        lines = capsys.readouterr().err.splitlines()
        assert stopped.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines


@pytest.mark.slow
@quick
@given(rows=st.lists(
    st.dictionaries(st.sampled_from(["prompt", "completion", "chosen", "rejected", "messages"]),
                    cells, max_size=4), min_size=1, max_size=3))
def test_any_json_rows_are_read_or_refused_in_one_line(rows, qwen, path, capsys):
    path.write_text("\n".join(map(json.dumps, rows)))
    for columns in (["prompt"], ["prompt", "completion"]):
        read = attempt(lambda: load_rows(data_args(str(path)), "train", qwen, columns, 10_000),
                       capsys)
        for row in read or []:
            assert row["prompt_ids"] and len(row["prompt_ids"]) <= 10_000
            assert isinstance(row.get("completion", ""), str)


@pytest.mark.slow
@quick
@given(lines=st.lists(st.binary(max_size=30) | texts.map(str.encode), min_size=1, max_size=3))
def test_any_bytes_are_read_or_refused_in_one_line(lines, qwen, path, capsys):
    path.write_bytes(b'{"prompt": "a"}\n' + b"\n".join(lines))
    attempt(lambda: load_rows(data_args(str(path)), "train", qwen, ["prompt"], 100), capsys)


@pytest.mark.slow
@quick
@given(text=st.text(min_size=1, max_size=200), response=st.text(max_size=200))
def test_byte_level_text_comes_back_as_it_was(text, response, qwen):
    (ids,) = prompt_tokens(qwen, [text], "test")
    assert qwen.decode(ids, clean_up_tokenization_spaces=False) == text or "<|" in text
    batch = encode(qwen, [ids], [response], CPU)
    assert batch.response_mask.sum() >= 1 and batch.responses[0, -1] == qwen.eos_token_id
    assert decode(qwen, batch) == [response] or "<|" in response


@quick
@given(ids=st.lists(st.integers(0, 5), min_size=1, max_size=12), length=st.integers(1, 12))
def test_shortened_prompts_keep_their_end_and_their_bos(ids, length):
    short = shorten(ids, length, SimpleNamespace(bos_token_id=0))
    assert 1 <= len(short) <= max(length, 1) and short[-1] == ids[-1]
    assert len(short) == min(length, len(ids))
    if ids[0] == 0 and length > 1:
        assert short[0] == 0


anything = values | st.sampled_from([1e300, -1e39, 3e38, 5e-324, 10**400, "1e5", b"1", [1.0],
                                     torch.tensor(2.0)])


@quick
@given(answer=anything | st.lists(anything, max_size=4) | st.just([1.0, 2.0, 3.0]))
def test_any_answer_of_a_reward_function_is_numbers_or_refused(answer, qwen, path, capsys):
    module = load_module(str(reward_file(path)))
    module.answer = answer
    reward = load_scorer(f"{reward_file(path)}:reward", qwen)
    batch = encode(qwen, [[1]] * 3, ["a", "b", "c"], CPU)
    scores = attempt(lambda: reward(batch, {"prompt": ["a", "b", "c"]}), capsys)
    if scores is not None:
        assert scores.dtype == torch.float32 and not scores.isinf().any()
        numbers = [math.nan if value is None else float(value) for value in answer]
        assert scores.tolist() == pytest.approx(numbers, rel=1e-6, nan_ok=True)
    elif isinstance(answer, list) and len(answer) == 3:
        assert not all(type(value) is float and abs(value) < 3e38 for value in answer)


def reward_file(path):
    file = path.with_name("reward.py")
    if not file.exists():
        file.write_text("answer = None\n\n\ndef reward(**_):\n    return answer\n")
    return file


@quick
@given(text=st.text(max_size=60) | st.from_regex(
    r"(####|\\boxed\{|answer is) ?[-$−]{0,2}[\d,.]{0,12}[}%.a-z]{0,3}"))
def test_gsm8k_finds_a_number_or_none_in_any_text(text):
    number = gsm8k.final_number(text)
    assert number is None or (isinstance(number, Decimal) and number.is_finite())
    assert gsm8k.reward(None, [text], answer=["#### 7"]) in ([0.0], [1.0])


@quick
@given(value=st.decimals(-(10**9), 10**9, places=2), text=st.text(alphabet="ab ,.\n$", max_size=10))
def test_gsm8k_finds_the_number_that_is_marked(value, text):
    assert gsm8k.final_number(f"{text} 3 + 4\n#### {value:,}") == value
    assert gsm8k.final_number(f"{text} \\boxed{{{value}}} {text}") == value


@quick
@given(text=st.text(alphabet=st.characters(), max_size=50) | st.just("\ud800"))
def test_error_texts_can_always_be_printed(text):
    line = one_line(ValueError(text))
    assert "\n" not in line and line.encode() is not None


def test_a_number_that_float32_cannot_hold_is_not_a_number(qwen, path, capsys):
    assert math.isinf(torch.tensor(1e300).item())
    module = load_module(str(reward_file(path)))
    module.answer = [1e300]
    reward = load_scorer(f"{reward_file(path)}:reward", qwen)
    assert attempt(lambda: reward(encode(qwen, [[1]], ["a"], CPU), {"prompt": ["a"]}),
                   capsys) is None
