"""Every family of models and kind of tokenizer: rollout, updates, saved folders, chat, rewards."""

import importlib
import itertools
import json
import shutil

import pytest
import torch
from helpers.families import FAMILIES, save_family
from helpers.tiny import load_scorer, save_classifier
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer,
                          pipeline)

import reinforce
from common import Batch, decode, rollout, token_logprobs
from plumbing import eos_ids, fast, load_model, load_tokenizer, prompt_tokens
from plumbing.checkpoints import write_model
from plumbing.sharding import without_rows

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
PROMPTS = ["The cat sat", "What is 2 + 3? Natalia sold 48 clips in April.", "走",
           "please tell me a joke about dogs"]
SCRIPTS = ("rloo reinforce remax grpo reinforce_pp reinforce_pp_baseline vanilla_pg ppo raft dpo "
           "sft reward_model").split()
THREE = ["neox", "llama", "qwen2"]  # of nine families: tokenizers that differ most


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("families")
    return {name: save_family(base / name, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A chat dataset in JSONL with what every script needs, and a python reward for chats."""
    folder = tmp_path_factory.mktemp("chat")
    says = lambda role, content: {"role": role, "content": content}
    rows = [{"prompt": [says("user", f"What is {i} + {i + 1}?")],
             "completion": [says("assistant", f"The answer is {2 * i + 1}.")],
             "chosen": [says("assistant", str(2 * i + 1))],
             "rejected": [says("assistant", "the dog ran")],
             "number": 2 * i + 1} for i in range(8)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "reward.py").write_text(
        "def digits(prompts, completions, number, **_):\n"
        "    assert all(turns[-1]['role'] == 'user' for turns in prompts)\n"
        "    assert all(f'is {(n - 1) // 2} +' in turns[-1]['content'] "
        "for n, turns in zip(number, prompts))\n"
        "    texts = [turns[0]['content'] for turns in completions]\n"
        "    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in texts]\n")
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sampler_and_a_plain_forward_pass_agree(name, folders):
    """Left padding, dropped rows, cache, sliding windows: log-probs are those of each row alone."""
    policy, tokenizer = load_model(folders[name], CPU), load_tokenizer(folders[name])
    plain = AutoModelForCausalLM.from_pretrained(folders[name])
    torch.manual_seed(0)
    prompt_ids = prompt_tokens(tokenizer, PROMPTS, "test")
    batch = rollout(policy, tokenizer, prompt_ids, 12, 0.9, 32)
    lengths = batch.response_mask.sum(1)
    assert lengths.min() < lengths.max()  # rows have been dropped
    again = token_logprobs(policy, batch, 0.9)
    torch.testing.assert_close(again.detach(), batch.old_logprobs, rtol=0, atol=2e-4)
    for row in range(0, len(batch), 5):
        prompt = batch.prompts[row][batch.prompt_mask[row]]
        assert prompt.tolist() == prompt_ids[row // 12]
        response = batch.responses[row][batch.response_mask[row]]
        with torch.no_grad():
            logits = plain(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits / 0.9).log_softmax(-1).gather(1, response[:, None])[:, 0]
        torch.testing.assert_close(batch.old_logprobs[row, : len(response)], logprobs,
                                   rtol=0, atol=2e-4)
    assert all(isinstance(text, str) for text in decode(tokenizer, batch))


@pytest.mark.parametrize("name", FAMILIES)
def test_one_update_with_gradient_checkpointing_or_without_is_the_same(name, folders, tmp_path):
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"prompt": prompt})
                                                   for prompt in PROMPTS))
    (tmp_path / "reward.py").write_text("def size(completions, **_):\n"
                                        "    return [len(c) / 9 for c in completions]\n")
    weights = []
    for checkpointing in (False, True):
        # k is 1, since with checkpointing siblings would not share their prompt.
        policy = reinforce.main(reinforce.Args(
            model=folders[name], dataset=str(tmp_path / "data.jsonl"),
            reward=(f"{tmp_path}/reward.py:size",), gradient_checkpointing=checkpointing,
            num_updates=1, prompts_per_step=4, k=1, max_new_tokens=8, eval_every=0, eval_prompts=2,
            device="cpu", output=str(tmp_path / str(checkpointing))))
        weights.append(torch.cat([parameter.detach().flatten()
                                  for parameter in policy.parameters()]))
    assert torch.equal(*weights)
    before = load_model(folders[name], CPU)
    assert not torch.equal(weights[0],
                           torch.cat([p.detach().flatten() for p in before.parameters()]))


def test_gradient_checkpointing_keeps_less(folders):
    """Saved for the backward pass: with checkpointing little more than each layer's input."""
    saved = {}
    for checkpointing in (False, True):
        model = load_model(folders["llama"], CPU, gradient_checkpointing=checkpointing)
        ids = torch.ones((2, 40), dtype=torch.long)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x,
                                                      lambda x: x):
            output = model.model(ids).last_hidden_state
        saved[checkpointing] = sum(sizes)
        output.sum().backward()
    assert saved[True] < 0.5 * saved[False]


@pytest.mark.parametrize("script, name", sorted(
    {*zip(SCRIPTS, itertools.cycle(THREE)), *itertools.product(["rloo", "ppo"], THREE)}))
def test_every_script_trains_on_a_chat_dataset_and_saves_what_transformers_loads(
        script, name, folders, data, tmp_path):
    module = importlib.import_module(script)
    flags = dict(model=folders[name], dataset=str(data), num_updates=2, lr=1e-2, device="cpu",
                 max_length=128)
    flags |= dict(reward=(f"{data}/reward.py:digits",), gold="none", max_new_tokens=8, k=2,
                  prompts_per_step=2)
    flags |= dict(test_split="train", eval_prompts=2, eval_dataset=str(data), batch_size=4,
                  eval_every=1)
    known = {field: flags[field]
             for field in flags.keys() & module.Args.__dataclass_fields__.keys()}
    module.main(module.Args(**known, output=str(tmp_path / "run")))
    saved = str(tmp_path / "run" / "model")
    if script == "reward_model":
        scores = pipeline("text-classification", model=saved,
                          function_to_apply="none")(["The cat sat", "dog"])
        assert scores[0]["score"] != scores[1]["score"]
        return
    policy, tokenizer = load_model(saved, CPU), load_tokenizer(saved)
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    batch = rollout(policy, tokenizer, prompt_tokens(tokenizer, [messages], "test"), 1, 1.0, 8,
                    greedy=True)
    plain = pipeline("text-generation", model=saved)
    (answer,) = plain(messages, max_new_tokens=8, do_sample=False, repetition_penalty=1.0)
    assert decode(tokenizer, batch) == [answer["generated_text"][-1]["content"]]


def test_a_rollout_in_parts_is_one_batch(folders):
    policy, tokenizer = load_model(folders["gpt2"], CPU), load_tokenizer(folders["gpt2"])
    prompt_ids = prompt_tokens(tokenizer, PROMPTS, "test")
    torch.manual_seed(0)
    batch = rollout(policy, tokenizer, prompt_ids, 6, 0.9, 24, at_once=12)  # 2 prompts at a time
    assert len(batch) == 24 and batch.ended.any() and not batch.ended.all()
    for row in range(24):
        assert batch.prompts[row][batch.prompt_mask[row]].tolist() == prompt_ids[row // 6]
    assert (batch.responses[~batch.response_mask] == tokenizer.pad_token_id).all()
    torch.testing.assert_close(token_logprobs(policy, batch, 0.9).detach(), batch.old_logprobs,
                               rtol=0, atol=2e-4)
    torch.manual_seed(0)
    first = rollout(policy, tokenizer, prompt_ids[:2], 6, 0.9, 24)
    T = first.responses.shape[1]
    assert torch.equal(first.responses, batch.responses[:12, :T])


def test_a_generation_config_that_cannot_be_written_is_replaced(folders, tmp_path):
    shutil.copytree(folders["llama"], tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text())
                               | {"do_sample": False, "temperature": 0.9}))
    model, tokenizer = (load_model(str(tmp_path / "model"), CPU),
                        load_tokenizer(str(tmp_path / "model")))
    write_model(tmp_path / "saved", model, tokenizer)
    assert (load_model(str(tmp_path / "saved"), CPU).generation_config.eos_token_id
            == tokenizer.eos_token_id)


def test_sampling_settings_of_the_hub_are_ignored_and_every_eos_id_counts(folders):
    policy, tokenizer = load_model(folders["qwen2"], CPU), load_tokenizer(folders["qwen2"])
    assert policy.generation_config.top_k == 20  # it is there
    assert eos_ids(policy, tokenizer).tolist() == sorted([tokenizer.eos_token_id,
                                                          tokenizer.pad_token_id])
    torch.manual_seed(0)
    n, prompt_ids = 4000, prompt_tokens(tokenizer, PROMPTS[:1], "test")
    batch = rollout(policy, tokenizer, prompt_ids, n, 1.0, 1)
    with torch.no_grad():
        probs = policy(torch.tensor(prompt_ids)).logits[0, -1].softmax(-1)
    counts = torch.bincount(batch.responses[:, 0], minlength=len(probs))
    top = probs.topk(20).indices
    rest = torch.ones_like(probs, dtype=torch.bool).index_fill(0, top, False)
    assert abs(counts[rest].sum() / n - probs[rest].sum()) < 4 * (probs[rest].sum() / n) ** 0.5
    assert probs[rest].sum() > 0.1
    log_ratio = batch.old_logprobs[:, 0].exp() - probs[batch.responses[:, 0]]
    assert log_ratio.abs().max() < 1e-5


def test_the_tokenizers_own_bos_is_there_once_for_text_and_chat(folders):
    tokenizer = load_tokenizer(folders["llama"])
    messages = [{"role": "system", "content": "Be brief."},
                {"role": "user", "content": "What is 2 + 3?"}]
    for prompts in (["What is 2 + 3?"], [messages]):
        (ids,) = prompt_tokens(tokenizer, prompts, "test")
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    assert (tokenizer.decode(ids).endswith("[assistant] ")
            or tokenizer.decode(ids).endswith("[assistant]"))


def test_a_reward_model_with_another_chat_template_gets_the_messages_in_its_own(folders, tmp_path):
    policy, tokenizer = load_model(folders["qwen2"], CPU), load_tokenizer(folders["qwen2"])
    other = AutoTokenizer.from_pretrained(folders["llama"])
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folders["llama"], num_labels=1)
    model.save_pretrained(tmp_path / "reward")
    other.save_pretrained(tmp_path / "reward")
    messages = [[{"role": "user", "content": f"What is {i} + 3?"}] for i in range(2)]
    batch = rollout(policy, tokenizer, prompt_tokens(tokenizer, messages, "test"), 2, 1.0, 6)
    reward = load_scorer(str(tmp_path / "reward"), tokenizer)
    scores = reward(batch, {"prompt": messages})
    for row, text in enumerate(decode(tokenizer, batch)):
        talk = [*messages[row // 2], {"role": "assistant", "content": text}]
        whole = other.apply_chat_template(talk, tokenize=False).rpartition("</s>")[0]
        prompt, line, after = (other(start, add_special_tokens=False)["input_ids"] for start in
                               (whole.removesuffix(text), "\n", "\n" + text))
        ids = prompt + after[len(line) :]  # no further space after "[assistant] "
        ids += [other.eos_token_id] * batch.ended[row].item()
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(scores[row], model.score(hidden)[0], rtol=1e-4, atol=1e-5)


def test_ids_that_only_the_policy_has_do_not_reach_the_reward_model(folders, tmp_path):
    """Pythia pads its vocabulary; a reward model with fewer rows gets the text instead of ids."""
    policy, tokenizer = load_model(folders["neox"], CPU), load_tokenizer(folders["neox"])
    small = save_classifier(tmp_path / "reward", folders["neox"], tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(small)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(small)
    prompt_ids = prompt_tokens(tokenizer, PROMPTS, "test")
    batch = rollout(policy, tokenizer, prompt_ids, 4, 1.0, 8)
    batch.responses[3, 0] = len(tokenizer) + 5  # an id without a word
    scores = load_scorer(small, tokenizer)(batch, {"prompt": PROMPTS})
    assert scores.isfinite().all() and len(scores) == 16


def test_a_row_that_is_longer_than_the_budget_and_empty_batches(folders):
    """A process without rows takes part in every pass of a sharded model, and gets no results."""
    policy, tokenizer = load_model(folders["gpt2"], CPU), load_tokenizer(folders["gpt2"])
    policy.forward, policy.shares_prompts = without_rows(policy.forward), False
    batch = rollout(policy, tokenizer, prompt_tokens(tokenizer, PROMPTS, "test"), 1, 1.0, 8)
    none = batch[torch.tensor([], dtype=torch.long)]
    assert isinstance(none, Batch) and len(none) == 0
    logprobs = token_logprobs(policy, none, 1.0)
    assert logprobs.shape == (0, batch.responses.shape[1])
    logprobs.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any()
               for parameter in policy.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_with_room_changes_nothing(dtype, folders, monkeypatch):
    """Neither by its room nor, in bfloat16, by keeping the keys as attention would cast them."""
    policy, tokenizer = load_model(folders["llama"], CPU, dtype), load_tokenizer(folders["llama"])
    prompt_ids = prompt_tokens(tokenizer, PROMPTS, "test")
    batches = []
    for with_room in (fast.with_room, lambda cache, room: cache):
        monkeypatch.setattr(fast, "with_room", with_room)
        torch.manual_seed(0)
        batches.append(rollout(policy, tokenizer, prompt_ids, 6, 0.9, 16))
    assert all(torch.equal(getattr(batches[0], name), getattr(batches[1], name))
               for name in vars(batches[0]))
