"""Conversations: what is trained is what the chat template renders, up to the end of the turn."""

import importlib
import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.families import byte_level, sentencepiece_like
from helpers.tiny import (CPU, data_args, load_scorer, make_policy, reward_args, save_classifier,
                          scalars)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_outputs import CausalLMOutputWithPast

import common
from common import evaluate, make_batch
from plumbing import eos_ids, load_rewards, load_rows, prompt_tokens, reply_tokens
from plumbing.chat import turn_end

CHATML = """{% for turn in messages %}{{ '<|im_start|>' + turn['role'] + '\n' }}\
{% if turn['role'] == 'system' and tools %}{{ 'tools: ' + (tools | tojson) + '\n' }}{% endif %}\
{{ turn['content'] }}{% for call in turn['tool_calls'] or [] %}\
{{ '<call>' + (call['function'] | tojson) + '</call>' }}{% endfor %}{{ '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + (opening or '') }}\
{% endif %}"""
GEMMA = """{{ bos_token }}{% for turn in messages %}{{ '<start_of_turn>' + \
('model' if turn['role'] == 'assistant' else turn['role']) + '\n' + turn['content'] | trim + \
'<end_of_turn>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
LLAMA3 = """{{ bos_token }}{% for turn in messages %}{{ '<|start|>' + turn['role'] + \
'<|stop|>\n\n' + turn['content'] | trim + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"""
TEMPLATES = {  # name -> (special tokens, of which BOS and EOS; what ends a turn, the template)
    "chatml": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|im_end|>",
               CHATML),
    "gemma": (["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"], "<bos>", "<eos>",
              "<end_of_turn>", GEMMA),
    "llama3": (["<pad>", "<|bos|>", "<|end_of_text|>", "<|start|>", "<|stop|>", "<|eot_id|>"],
               "<|bos|>", "<|end_of_text|>", "<|eot_id|>", LLAMA3),
}


def tokenizer_of(name):
    special, bos, eos, _, template = TEMPLATES[name]
    return byte_level(special, bos_token=bos, eos_token=eos, pad_token=special[0],
                      chat_template=template)


def turn(role, content):
    return {"role": role, "content": content}


HI, HELLO = turn("user", "Hi, you?"), turn("assistant", "Hello. 5 + 3 is 8.")
TALK = [turn("system", "Be brief."), HI, HELLO, turn("user", "And 2 + 3?")]
ANSWER, OTHER = turn("assistant", "It is 5."), turn("assistant", "None of your business.")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> folder of a tiny policy, with a reward model in its folder `reward`."""
    found = {}
    for name in TEMPLATES:
        folder, tokenizer = tmp_path_factory.mktemp(name), tokenizer_of(name)
        model = make_policy(len(tokenizer), tokenizer.eos_token_id)
        model.config.max_position_embeddings = 512
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_classifier(folder / "reward", folder, tokenizer)
        found[name] = str(folder)
    return found


@pytest.fixture
def rows(tmp_path):
    """Write rows to a file, and read them back through load_rows."""
    def read(rows, columns=("prompt",), name="chatml", **flags):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        tokenizer = tokenizer_of(name)
        found = load_rows(data_args(str(path), **flags), "train", tokenizer, columns, 400)
        return [{column[:-4]: tokenizer.decode(row[column])
                 for column in row if column.endswith("_ids")} for row in found]

    return read


def refused(capsys, call):
    with pytest.raises(SystemExit):
        call()
    (line,) = capsys.readouterr().err.splitlines()
    return line


# ------------------------------------------------------------------------------- from turn to token


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_reply_are_the_template_character_for_character(name, rows):
    end = TEMPLATES[name][3]
    whole = tokenizer_of(name).apply_chat_template([*TALK, ANSWER], tokenize=False)
    opened = tokenizer_of(name).apply_chat_template(TALK, tokenize=False,
                                                    add_generation_prompt=True)
    for given in ({"messages": [*TALK, ANSWER]}, {"prompt": TALK, "completion": [ANSWER]},
                  {"prompt": TALK, "completion": "It is 5."}):
        (found,) = rows([given], ["prompt", "completion"], name)
        assert found == {"prompt": opened, "completion": f"It is 5.{end}"}
        assert whole.startswith(found["prompt"] + found["completion"])
    assert turn_end(tokenizer_of(name)) == tokenizer_of(name).convert_tokens_to_ids(end)


def test_a_turn_that_the_prompt_ends_with_is_continued(rows):
    begun = turn("assistant", "<think>\nI")
    (found,) = rows([{"prompt": [HI, begun], "completion": [turn("assistant", " am.")]}],
                    ["prompt", "completion"])
    assert found["prompt"] == ("<|im_start|>user\nHi, you?<|im_end|>\n"
                               "<|im_start|>assistant\n<think>\nI")
    assert found["completion"] == " am.<|im_end|>"
    for name, text in (("gemma", "<start_of_turn>model\n<think>\nI"),
                       ("llama3", "<|start|>assistant<|stop|>\n\n<think>\nI")):
        assert rows([{"prompt": [HI, begun]}], name=name)[0]["prompt"].endswith(text)


def test_pairs_are_all_that_follows_what_they_share(rows):
    names = ["prompt", "chosen", "rejected"]
    early = {"chosen": [HI, HELLO, turn("user", "Why?"), ANSWER],
             "rejected": [HI, OTHER, turn("user", "Why?"), ANSWER]}
    more = "<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nIt is 5.<|im_end|>"
    for given in (early, {"prompt": [HI]} | {name: talk[1:] for name, talk in early.items()},
                  {"prompt": [HI]} | early):  # the prompt once more: it does not count twice
        assert rows([given], names) == [{
            "prompt": "<|im_start|>user\nHi, you?<|im_end|>\n<|im_start|>assistant\n",
            "chosen": HELLO["content"] + more, "rejected": OTHER["content"] + more}]
    users = {"chosen": [HI, HELLO, turn("user", "Why?"), ANSWER],
             "rejected": [HI, HELLO, turn("user", "How?"), OTHER]}
    (found,) = rows([users], names)  # they differ from the user's turn on, which is not opened
    assert found["prompt"].endswith("5 + 3 is 8.<|im_end|>\n")
    assert found["rejected"] == ("<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n"
                                 "None of your business.<|im_end|>")
    short = {"chosen": [HI, ANSWER], "rejected": [HI, ANSWER, turn("user", "No."), OTHER]}
    (found,) = rows([short], names)  # one is the beginning of the other
    assert found["chosen"] == "It is 5.<|im_end|>" and found["rejected"].startswith("It is 5.<|im")


def test_conversations_beside_a_text_that_is_called_prompt(rows):
    """UltraFeedback: the prompt is text, and chosen and rejected are conversations with it."""
    system = turn("system", "Be kind.")
    row = {"prompt": "Hi, you?", "chosen": [system, HI, ANSWER], "rejected": [system, HI, OTHER],
           "messages": [system, HI, ANSWER], "score_chosen": 8.5}
    opened = ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi, you?<|im_end|>\n"
              "<|im_start|>assistant\n")
    for flags in ({}, {"chat": True}, {"system_prompt": "Be brief."}):
        (found,) = rows([row], ["prompt", "chosen", "rejected"], **flags)
        assert found["prompt"] == opened and found["chosen"] == "It is 5.<|im_end|>"
        (found,) = rows([row], ["prompt", "completion"], **flags)
        assert found["prompt"] == opened and found["completion"] == "It is 5.<|im_end|>"
    alone = {"prompt": "Hi, you?", "completion": [ANSWER]}
    assert rows([alone], ["prompt", "completion"])[0]["prompt"] == (
        "<|im_start|>user\nHi, you?<|im_end|>\n<|im_start|>assistant\n")


def test_identical_pairs_are_dropped_and_counted(rows, capsys):
    pair = {"chosen": [HI, ANSWER], "rejected": [HI, OTHER]}
    texts = {"prompt": "a", "chosen": " b", "rejected": " c"}
    for given, same in ((pair, {"chosen": [HI, ANSWER], "rejected": [HI, ANSWER]}),
                        (texts, texts | {"rejected": " b"})):
        assert len(rows([given, same], ["prompt", "chosen", "rejected"])) == 1
        assert "dropped 1 of 2 rows with the same response twice" in capsys.readouterr().out
    assert len(rows([same])) == 1  # prompts alone
    line = refused(capsys, lambda: rows([same], ["prompt", "chosen", "rejected"]))
    assert line.endswith("every row has the same response twice")


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "int"}}}}
CALL = {"role": "assistant", "content": None,
        "tool_calls": [{"type": "function",
                        "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}]}


def test_tools_and_arguments_of_the_template_are_rendered(rows, capsys):
    system, result = turn("system", "Use tools."), turn("tool", "5")
    given = [{"messages": [system, HI, CALL, result, ANSWER], "tools": [TOOL]},
             {"messages": [system, HI, CALL, result, OTHER], "tools": json.dumps([TOOL])},
             {"messages": [system, HI, HELLO], "tools": None}]
    first, second, third = rows(given, ["prompt", "completion"])
    for text in ('tools: [{"type": "function", "function": {"name": "add", "parameters": '
                 '{"a": {"type": "int"}}}}]\nUse tools.<|im_end|>',
                 '<call>{"name": "add", "arguments": {"a": 2, "b": 3}}</call><|im_end|>\n'
                 '<|im_start|>tool\n5<|im_end|>\n'):
        assert text in first["prompt"] and text in second["prompt"]
        assert text not in third["prompt"]
    assert first["completion"] == "It is 5.<|im_end|>"
    line = refused(capsys, lambda: rows([given[2] | {"tools": "add"}], ["prompt", "completion"]))
    assert "row 0 does not follow TRL's conventions: JSONDecodeError" in line
    thinking = {"prompt": [HI], "chat_template_kwargs": {"opening": "<think>\n"}}
    assert rows([thinking])[0]["prompt"].endswith("<|im_start|>assistant\n<think>\n")


@pytest.mark.parametrize("given, message", [
    ({"messages": [HI, HELLO, turn("user", "thanks, bye")]}, "last turn of column 'completion'"),
    ({"messages": [HI, CALL]}, "last turn of column 'completion'"),
    ({"messages": [HI, turn("assistant", "  ")]}, "last turn of column 'completion'"),
    ({"prompt": [HI], "completion": [ANSWER, HI]}, "last turn of column 'completion'"),
    ({"prompt": [HI], "completion": [{"text": "a"}]}, "column 'completion' must hold text, or li"),
])
def test_a_last_turn_that_is_no_text_of_the_assistant(given, message, rows, capsys):
    right = {name: value[:-1] + [ANSWER] if name == "completion" else [HI, ANSWER]
             for name, value in given.items()}
    right |= {"prompt": [HI]} if "prompt" in given else {}
    line = refused(capsys, lambda: rows([right, given], ["prompt", "completion"]))
    assert message in line and "row 1" in line
    if "messages" in given:  # as prompts alone they are right
        assert rows([given], prompt_column="messages")


def test_turns_that_need_a_closer_look(rows, capsys):
    end = "<|im_end|>"
    parts = turn("user", [{"type": "text", "text": "Hi, "}, {"type": "text", "text": "you?"}])
    for given in ({"prompt": [parts], "completion": [turn("assistant", f"It is 5.{end}")]},
                  {"prompt": [HI], "completion": f"It is 5.{end}"},  # the end is there already
                  {"prompt": [turn("system", "a"), HI], "completion": [HI, ANSWER]}):
        (found,) = rows([given], ["prompt", "completion"])
        assert found["prompt"].endswith(f"user\nHi, you?{end}\n<|im_start|>assistant\n")
        assert found["prompt"].count("you?") == 1 and found["completion"] == f"It is 5.{end}"
    called = {"prompt": [HI, CALL], "completion": "It is 5."}  # a call is not continued
    assert rows([called], ["prompt", "completion"])[0]["prompt"].endswith("</call><|im_end|>\n"
                                                                         "<|im_start|>assistant\n")
    picture = {"prompt": [turn("user", [{"type": "image", "image": "a.png"}])]}
    assert "row 0 does not" in refused(capsys, lambda: rows([picture]))
    developer = {"prompt": [turn("developer", "a"), HI]}
    assert "system" not in rows([developer], system_prompt="b")[0]["prompt"]


def test_empty_responses_and_prompts_without_tokens(rows, capsys):
    given = [{"prompt": "a", "completion": text} for text in (" b", "", "  ")]
    assert len(rows(given, ["prompt", "completion"])) == 1
    assert "dropped 2 of 3 rows with an empty response" in capsys.readouterr().out
    assert len(rows(given)) == 3  # prompts alone


def test_implicit_prompts_of_texts(rows):
    for chosen, rejected, prompt in (
            ("Q: x\nyes", "Q: x\nno", "Q: x\n"), ("Say: hello there", "Say: help me", "Say: "),
            ("\n\nHuman: a\n\nAssistant: My Assistant: b", "\n\nHuman: a\n\nAssistant: My c",
             "\n\nHuman: a\n\nAssistant:")):
        (found,) = rows([{"chosen": chosen, "rejected": rejected}],
                        ["prompt", "chosen", "rejected"])
        assert found["prompt"] == prompt and prompt + found["chosen"] == f"{chosen}<|im_end|>"


def test_the_end_of_a_turn_in_odd_templates():
    wants_system = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = wants_system + CHATML
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain = byte_level(["<eos>"], eos_token="<eos>", pad_token="<eos>", chat_template=CHATML)
    ids = prompt_tokens(plain, [[HI]], "x")
    done, cut = (plain.decode(reply_tokens(plain, [[HI]], ids, ["It is"], "x", ended=[ended])[0])
                 for ended in (True, False))
    assert turn_end(plain) is None and (done, cut) == ("It is<|im_end|><eos>", "It is")


def test_a_bos_that_is_written_is_not_added_again():
    tokenizer = sentencepiece_like()
    written, added = prompt_tokens(tokenizer, ["<s>The cat", "The cat"], "x")
    assert written == added and written.count(tokenizer.bos_token_id) == 1
    ids = reply_tokens(tokenizer, ["<s>The cat,", "The cat,"], [added, added], ["a", "a"], "x")
    assert ids[0] == ids[1]


def test_a_template_that_rewrites_earlier_turns(tmp_path, capsys):
    """As those that leave out what was thought before the last turn."""
    tokenizer = tokenizer_of("chatml")
    tokenizer.chat_template = ("{% for turn in messages %}[{{ turn['role'] }} of {{ loop.length }}]"
                               "{{ turn['content'] }}{% endfor %}")
    line = refused(capsys, lambda: reply_tokens(tokenizer, [[HI]], [[1]], ["a"], "dataset x"))
    assert line.startswith("error: dataset x: the chat template renders the prompt in another way")


# --------------------------------------------------------------------------------------- plain text


def test_eos_is_added_only_where_it_is_missing(rows):
    for name, eos in (("chatml", "<|im_end|>"), ("gemma", "<eos>"), ("llama3", "<|end_of_text|>")):
        given = [{"prompt": "a", "completion": text} for text in (" one", f" one{eos}")]
        assert {row["completion"] for row in rows(given, ["prompt", "completion"], name)} == {
            f" one{eos}"}


def test_ids_are_those_that_prompt_and_completion_have_together():
    """Llama 2's kind of tokenizer puts a space before a text that stands alone."""
    tokenizer = sentencepiece_like()
    prompts = ["The cat,", "The cat, "]
    ids = prompt_tokens(tokenizer, prompts, "x")
    replies = reply_tokens(tokenizer, prompts, ids, ["the dog"] * 2, "x")
    eos = tokenizer.eos_token_id
    assert replies[0] == tokenizer("The cat,the dog")["input_ids"][len(ids[0]):] + [eos]
    assert tokenizer("the dog", add_special_tokens=False)["input_ids"] != replies[0][:-1]
    for prompt, start, reply in zip(prompts, ids, replies):
        assert tokenizer.decode(start + reply, skip_special_tokens=True) == f"{prompt}the dog"


def test_a_reply_that_has_not_ended_has_no_end():
    for name in TEMPLATES:
        tokenizer = tokenizer_of(name)
        for prompt in ("Hi.", [HI]):
            ids = prompt_tokens(tokenizer, [prompt], "x")
            ended, cut = (reply_tokens(tokenizer, [prompt], ids, [" a b"], "x", ended=[end])[0]
                          for end in (True, False))
            assert cut == ended[:-1] and tokenizer.decode(cut).strip() == "a b"


# ------------------------------------------------------------------------------------------ rewards


@pytest.mark.parametrize("name", ["gemma", "llama3"])
def test_a_reward_model_reads_a_reply_by_its_own_template(name, folders):
    """Up to the end of its turn, as its model card would say."""
    ours, reward = tokenizer_of("chatml"), f"{folders[name]}/reward"
    (ids,) = prompt_tokens(ours, [TALK], "x")
    (reply,) = reply_tokens(ours, [TALK], [ids], [[ANSWER]], "x")
    batch = make_batch(ours, [ids], [reply], CPU)
    own = AutoTokenizer.from_pretrained(reward)
    text = own.apply_chat_template([*TALK, ANSWER], tokenize=False)
    text = text[: text.rindex(TEMPLATES[name][3]) + len(TEMPLATES[name][3])]
    model = AutoModelForSequenceClassification.from_pretrained(reward)
    card = model(**own(text, return_tensors="pt", add_special_tokens=False)).logits.item()
    found = load_scorer(reward, ours)(batch, {"prompt": [TALK]}).item()
    assert found == pytest.approx(card, abs=1e-5)


def test_a_reward_model_with_the_same_tokens_and_another_template(folders, tmp_path):
    tokenizer = tokenizer_of("chatml")
    (ids,) = prompt_tokens(tokenizer, [[HI]], "x")
    (reply,) = reply_tokens(tokenizer, [[HI]], [ids], [[ANSWER]], "x")
    batch, scores = make_batch(tokenizer, [ids], [reply], CPU), []
    for name, template in (("same", CHATML), ("none", None), ("own", f"{{{{ '!' }}}}{CHATML}")):
        model = AutoModelForSequenceClassification.from_pretrained(f"{folders['chatml']}/reward")
        model.save_pretrained(tmp_path / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
        tokenizer.chat_template = CHATML
        scores.append(load_scorer(str(tmp_path / name), tokenizer)(batch, {"prompt": [[HI]]}))
    text = "!" + tokenizer.decode(ids + reply)
    own = model(**tokenizer(text, return_tensors="pt")).logits.item()
    assert scores[0] == scores[1] != scores[2] and scores[2].item() == pytest.approx(own, abs=1e-5)


def test_rows_too_long_for_a_reward_model_of_its_own(folders, capsys):
    tokenizer, long = tokenizer_of("chatml"), "a b c " * 200
    batch = make_batch(tokenizer, [[5]], [[6] * 40], CPU)
    scorer = load_scorer(f"{folders['gemma']}/reward", tokenizer)
    line = refused(capsys, lambda: scorer(batch, {"prompt": [long]}))
    assert "do not fit the 512 positions of model" in line


def test_the_same_text_is_a_tie_in_the_win_rate(folders, rows, tmp_path):
    """A reference and a sample both end in what ends a turn, by the template."""
    tokenizer = tokenizer_of("gemma")
    policy = AutoModelForCausalLM.from_pretrained(folders["gemma"])
    end = turn_end(tokenizer)
    assert end in eos_ids(policy, tokenizer).tolist() != [tokenizer.eos_token_id]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": [HI], "completion": [ANSWER]}))
    dataset = load_rows(data_args(str(path)), "train", tokenizer, ["prompt", "completion"], 100)
    wanted = dataset[0]["completion_ids"]
    assert wanted[-1] == end

    class Certain(torch.nn.Module):
        """A policy that says the reference's tokens."""

        device, config, is_fast = CPU, policy.config, False

        def forward(self, input_ids, attention_mask=None, past_key_values=None, **_):
            step = attention_mask.sum(1) - len(dataset[0]["prompt_ids"])  # (N,)
            step = step.view(-1, 1) if past_key_values else (
                torch.arange(input_ids.shape[1]) - len(dataset[0]["prompt_ids"]) + 1)[None]
            ids = torch.tensor([*wanted, end])[step.clamp(0, len(wanted) - 1)]
            logits = F.one_hot(ids, len(tokenizer)) * 1e4
            return CausalLMOutputWithPast(logits=logits.float(), past_key_values=(1,))

    args = type("Args", (), dict(temperature=1.0, max_new_tokens=30, microbatch_tokens=999,
                                 eval_batch_size=9, seed=1))
    rewards = load_rewards(reward_args(reward=(f"{folders['gemma']}/reward",), reward_weights=()),
                           CPU)
    values, texts = evaluate(Certain(), policy, tokenizer, rewards, dataset, args)
    assert texts == ["It is 5."] and values["win_rate"].tolist() == [0.5]


# ------------------------------------------------------------------------------------ whole scripts


def run(script, folder, tmp_path, monkeypatch, rows, **flags):
    """Run main on rows. Returns: the texts of the batches that it made, and its log."""
    module, made = importlib.import_module(script), []

    def spy(tokenizer, *ids):
        made.append((tokenizer, *ids))
        return make_batch(tokenizer, *ids)

    for where in (module, common):
        if hasattr(where, "make_batch"):
            monkeypatch.setattr(where, "make_batch", spy)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "reward.py").write_text("def size(completions, **_):\n"
                                        "    return [len(c[0]['content']) for c in completions]\n")
    flags = dict(model=folder, dataset=str(path), eval_dataset=str(path), test_split="train",
                 num_updates=1, batch_size=len(rows), prompts_per_step=2, k=2, eval_prompts=2,
                 reward=(f"{tmp_path}/reward.py:size",), gold="none", max_new_tokens=4,
                 max_length=400, device="cpu", lr=1e-3, lr_schedule="constant", warmup_updates=0,
                 output=str(tmp_path / script)) | flags
    known = {name: flags[name] for name in flags.keys() & module.Args.__dataclass_fields__.keys()}
    module.main(module.Args(**known))
    texts = {tokenizer.decode(start + reply, skip_special_tokens=False)
             for tokenizer, starts, replies, *_ in made for start, reply in zip(starts, replies)}
    return texts, scalars(tmp_path / script)


PAIRS = [{"chosen": [HI, HELLO, turn("user", "And you?"), ANSWER],
          "rejected": [HI, OTHER, turn("user", "And you?"), ANSWER]},
         {"chosen": [*TALK, ANSWER], "rejected": [*TALK, OTHER]}]


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("script", ["sft", "reward_model", "dpo", "rloo"])
def test_scripts_train_what_the_template_renders(script, name, folders, tmp_path, monkeypatch):
    tokenizer, end = tokenizer_of(name), TEMPLATES[name][3]

    def rendered(talk):
        text = tokenizer.apply_chat_template(talk, tokenize=False)
        return text[: text.rindex(end) + len(end)]

    talks = [[*TALK, ANSWER], [HI, OTHER]]
    given = PAIRS if script in ("reward_model", "dpo") else [{"messages": talk} for talk in talks]
    texts, log = run(script, folders[name], tmp_path, monkeypatch, given)
    if script in ("reward_model", "dpo"):
        talks = [talk for pair in PAIRS for talk in (pair["chosen"], pair["rejected"])]
    print(*sorted(texts), sep="\n")
    if script == "rloo":  # from the references of the win rate
        assert texts == set(map(rendered, talks)) and log["eval/win_rate"]
    else:
        assert set(map(rendered, talks)) <= texts
        assert script == "dpo" or texts == set(map(rendered, talks))


@pytest.mark.slow
def test_the_loss_of_pairs_that_differ_early_is_the_plain_one(folders, tmp_path, monkeypatch):
    """From whole forwards of what the template renders; with the last turns alone it is log 2."""
    tokenizer, reference = tokenizer_of("chatml"), make_policy(len(tokenizer_of("chatml")), 2, 7)
    reference.save_pretrained(tmp_path / "reference")
    tokenizer.save_pretrained(tmp_path / "reference")
    _, log = run("dpo", folders["chatml"], tmp_path, monkeypatch, PAIRS[:1], beta=0.5,
                 reference=str(tmp_path / "reference"), temperature=1.0)
    policy, margins = AutoModelForCausalLM.from_pretrained(folders["chatml"]), []
    start = tokenizer.apply_chat_template([HI], tokenize=False, add_generation_prompt=True)
    for name in ("chosen", "rejected"):
        text = tokenizer.apply_chat_template(PAIRS[0][name], tokenize=False).removesuffix("\n")
        ids, P = torch.tensor(tokenizer(text)["input_ids"]), len(tokenizer(start)["input_ids"])
        both = [model(ids[None]).logits[0, :-1].log_softmax(1).gather(1, ids[1:, None])[P - 1 :]
                for model in (policy, reference)]
        margins.append((both[0] - both[1]).sum().item())
    expected = -math.log(1 / (1 + math.exp(-0.5 * (margins[0] - margins[1]))))
    (loss,) = [value for _, value in log["policy/loss"]]
    assert loss == pytest.approx(expected, rel=1e-4) and abs(loss - math.log(2)) > 0.01


LAYOUTS = {
    "ultrafeedback": {"prompt": "Hi, you?", "prompt_id": "3f", "chosen": [HI, ANSWER],
                      "rejected": [HI, OTHER], "messages": [HI, ANSWER], "score_chosen": 8.5,
                      "score_rejected": 5.0},
    "hh": {"chosen": "\n\nHuman: Hi, you?\n\nAssistant: It is 5.",
           "rejected": "\n\nHuman: Hi, you?\n\nAssistant: None of your business."},
    "tools": {"prompt": [turn("system", "Use tools."), HI, CALL, turn("tool", "5")],
              "chosen": [ANSWER], "rejected": [OTHER], "tools": [TOOL], "completion": [ANSWER]},
    "turns": PAIRS[0],
}


@pytest.mark.slow
@pytest.mark.parametrize("layout, script", [
    ("ultrafeedback", "sft"), ("ultrafeedback", "dpo"), ("ultrafeedback", "rloo"), ("hh", "dpo"),
    ("hh", "reward_model"), ("tools", "sft"), ("tools", "dpo"), ("turns", "reward_model")])
def test_layouts_train_end_to_end(layout, script, folders, tmp_path, monkeypatch):
    row = LAYOUTS[layout]
    texts, log = run(script, folders["chatml"], tmp_path, monkeypatch, [row, row], num_updates=2,
                     reward=(f"{folders['chatml']}/reward",))
    assert any("It is 5.<|im_end|>" in text for text in texts)
    name = {"sft": "loss", "reward_model": "loss"}.get(script, "policy/loss")
    assert len(log[name]) == 2 and all(math.isfinite(value) for _, value in log[name])
