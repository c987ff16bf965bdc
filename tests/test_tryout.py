"""What a model can do is asked of it: families, positions, tokens without embeddings, adapters."""

import json
import re
import types

import pytest
import torch
from helpers.sweep import tiny_model
from helpers.tiny import CPU, ROOT, make_policy, make_tokenizer, save_classifier, scalars
from transformers import (AutoModelForSequenceClassification, BertConfig, BertForMaskedLM,
                          LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration)

import ppo
import rloo
import sft
from common import sample, token_logprobs
from plumbing import load_model, models, tryout

WORDS = [f"w{i}" for i in range(58)]
TOKENIZER = make_tokenizer(WORDS)  # 60 tokens
PROMPTS = [[7, 9, 30, 12, 55, 21, 8, 40, 11], [5], [33, 34, 35, 36]]
PAGE = (ROOT / "docs/your-own.md").read_text()
LONGROPE = dict(max_position_embeddings=64, original_max_position_embeddings=16, rope_parameters={
    "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8,
    "rope_theta": 10000.0, "original_max_position_embeddings": 16})


def families(path):
    """The families of one row of the table in docs/your-own.md, by how the row begins."""
    (row,) = re.findall(rf"^\| {path}[^|]*\|([^|]*)\|", PAGE, re.MULTILINE)
    return re.findall(r"`([^`]+)`", row)


FAST, CACHE, NO_CACHE = map(families, ("fast", "plain, with a cache", "plain, without"))
ENCODERS, UNPADDED = map(families, ("refused: a later", "refused: padding"))


def gap(model, batch):
    """How far the sampler's and the training pass's log-probs are from plain unpadded forwards."""
    found = token_logprobs(model, batch, 0.7).detach()
    gaps = []
    for row in range(len(batch)):
        prompt = batch.prompts[row][batch.prompt_mask[row]]
        response = batch.responses[row][batch.response_mask[row]]
        with torch.no_grad():
            ids = torch.cat([prompt, response])[None]
            logits = model(input_ids=ids, use_cache=False).logits[0]
        expected = (logits / 0.7).log_softmax(-1)[len(prompt) - 1 : -1].gather(1, response[:, None])
        gaps += [(logprobs[row, : len(response)] - expected[:, 0]).abs().max().item()
                 for logprobs in (batch.old_logprobs, found)]
    return max(gaps)


def test_the_sweep_is_wide():
    assert len(FAST) >= 35 and len(CACHE) >= 5 and len(NO_CACHE) >= 3
    assert len(ENCODERS) >= 3 and len(UNPADDED) >= 5


@pytest.mark.parametrize("family", FAST + CACHE + NO_CACHE)
def test_sampler_training_pass_and_plain_forwards_agree(family):
    """With left padding, and rows longer than the sliding windows of 6."""
    model = tiny_model(family, len(TOKENIZER))
    tryout.ask(family, model, TOKENIZER)
    assert (model.is_fast, model.keeps_cache) == (family in FAST, family not in NO_CACHE)
    model.shares_prompts = True
    for model.is_fast in {model.is_fast, False}:
        torch.manual_seed(1)
        batch = sample(model, TOKENIZER, PROMPTS, 2, 0.7, 8)
        assert gap(model, batch) < 1e-4


@pytest.mark.parametrize("family", ENCODERS + UNPADDED)
def test_families_that_would_give_wrong_log_probs_are_refused(family, capsys):
    with pytest.raises(SystemExit):
        tryout.ask(family, tiny_model(family, len(TOKENIZER)), TOKENIZER)
    why = "a later token changes" if family in ENCODERS else "padding changes"
    assert capsys.readouterr().err.startswith(f"error: model {family}: {why}")


def test_asking_draws_no_random_number():
    torch.manual_seed(3)
    model, state = tiny_model("mixtral", 60), torch.get_rng_state()
    tryout.ask("x", model, TOKENIZER)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cache_that_is_nearly_right_is_not_used(capsys):
    """Its values are off by 0.1% after the prompt: sampled log-probs would be, too."""
    model = make_policy(60, 1)
    inner = model.forward

    def forward(past_key_values=None, **inputs):
        for layer in past_key_values.layers if past_key_values else []:
            layer.values *= 1.001
        return inner(past_key_values=past_key_values, **inputs)

    model.forward = forward
    tryout.ask("off", model, TOKENIZER)
    assert not model.keeps_cache and not model.is_fast
    assert "model off: runs in the plain form" in capsys.readouterr().out
    batch = sample(model, TOKENIZER, PROMPTS, 1, 0.7, 8)
    assert gap(model, batch) < 1e-5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A policy, data and a reward, and flags of a short run."""
    folder = tmp_path_factory.mktemp("world")
    save(folder / "policy", make_policy(60, 1))
    (folder / "data.jsonl").write_text("".join(
        json.dumps({"prompt": f"w{i} w3 w4 w5 w6 w7 w8 w9 w1 w2", "completion": "w1 w2"}) + "\n"
        for i in range(4)))
    (folder / "reward.py").write_text("def f(completions, **_):\n"
                                      "    return [float(len(text)) for text in completions]\n")
    return folder


def save(folder, model, tokenizer=TOKENIZER):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def flags(world, **more):
    return dict(model=str(world / "policy"), dataset=str(world / "data.jsonl"), num_updates=1,
                reward=(f"{world}/reward.py:f",), gold="none", k=2, prompts_per_step=2,
                eval_prompts=2, max_new_tokens=4, temperature=1.0, device="cpu",
                save_every=0) | more


def message(capsys, world, output, script=rloo, **more):
    """Run a script that is to stop with one line before its folder exists; returns the line."""
    known = script.Args.__dataclass_fields__
    given = {name: value for name, value in flags(world, **more).items() if name in known}
    with pytest.raises(SystemExit):
        script.main(script.Args(**given, output=str(output)))
    assert not output.exists()
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("error: ")


def test_kinds_of_models_that_cannot_be_trained(world, tmp_path, capsys):
    torch.manual_seed(0)
    shape = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=64)
    bert = save(tmp_path / "bert", BertForMaskedLM(BertConfig(**shape)))
    assert message(capsys, world, tmp_path / "run", model=bert) == (
        f"model {bert}: a later token changes what BertLMHeadModel says of earlier ones, so it is "
        "an encoder, not a causal model; use a decoder-only one")
    t5 = save(tmp_path / "t5", T5ForConditionalGeneration(T5Config(
        vocab_size=60, d_model=32, d_ff=64, d_kv=16, num_layers=2, num_heads=2)))
    assert message(capsys, world, tmp_path / "run", model=t5) == (
        f"model {t5}: is not built as a causal language model in transformers (an encoder-decoder, "
        "an encoder, or no language model); use a decoder-only one, such as Llama or Qwen")
    bart = save(tmp_path / "bart", tiny_model("bart", 60))
    assert message(capsys, world, tmp_path / "run", model=bart).startswith(
        f"model {bart}: padding changes what BartForCausalLM says of a row")
    four = save(tmp_path / "four", make_policy(60, 1))
    config = json.loads((tmp_path / "four/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "four/config.json").write_text(json.dumps(config))
    assert message(capsys, world, tmp_path / "run", model=four) == (
        f"model {four}: is quantized, so its weights cannot be trained; name the model that it was "
        "made from, in float32 or bfloat16")


@pytest.mark.parametrize("family", ["mamba", "qwen3_next"])
def test_state_space_and_hybrid_models_train(family, world, tmp_path):
    model = save(tmp_path / family, tiny_model(family, len(TOKENIZER)))
    policy = rloo.main(rloo.Args(**flags(world, model=model), output=str(tmp_path / "run")))
    assert not policy.is_fast and policy.keeps_cache == (family == "qwen3_next")
    curves = scalars(tmp_path / "run")
    assert abs(curves["objective/kl"][0][1]) < 1e-4 and curves["policy/grad_norm"][0][1] > 0.01


def test_a_reward_model_that_is_not_causal(world, tmp_path, capsys):
    """Its classes have a head called `score`, but its attention looks ahead."""
    config = tiny_model("gemma3_text", 60).config
    config.use_bidirectional_attention, config.num_labels = True, 1
    torch.manual_seed(0)
    reward = save(tmp_path / "reward", AutoModelForSequenceClassification.from_config(config))
    assert message(capsys, world, tmp_path / "run", reward=(reward,)).startswith(
        f"model {reward}: a later token changes what Gemma3TextForSequenceClassification says")


# ----------------------------------------------------------------------------------------- LongRoPE


def test_longrope_is_read_up_to_its_switch():
    model = tiny_model("phi3", 60, **LONGROPE)
    tryout.ask("x", model, TOKENIZER)
    assert (model.is_fast, model.longest) == (True, 16)
    model.shares_prompts, gaps = True, {}
    for model.is_fast in (True, False):
        for T in (7, 24):  # 9 prompt tokens and 7: 16
            torch.manual_seed(0)
            gaps[model.is_fast, T] = gap(model, sample(model, TOKENIZER, PROMPTS[:1], 4, 0.7, T))
    assert max(gaps[True, 7], gaps[False, 7]) < 1e-5
    assert min(gaps[True, 24], gaps[False, 24]) > 0.3  # what the sentence prevents
    assert tryout.longest_row(tiny_model("llama", 60), torch.tensor([[3, 4, 5]])) == 256


def test_rows_beyond_the_switch_stop_and_others_have_no_kl(world, tmp_path, capsys):
    phi = save(tmp_path / "phi", tiny_model("phi3", 60, **LONGROPE))
    line = ("rows of up to 17 tokens, including the response: beyond 16, model {} changes its "
            "position embeddings, so that the sampler and the update would see different log-probs;"
            " lower --max-prompt-length, --max-length or --max-new-tokens")
    # A row: 10 prompt tokens, then the longer of its completion and EOS, 3, and what is sampled.
    assert message(capsys, world, tmp_path / "run", model=phi, max_new_tokens=7) == line.format(phi)
    rloo.main(rloo.Args(**flags(world, model=phi, max_new_tokens=6), output=str(tmp_path / "run")))
    curves = scalars(tmp_path / "run")
    assert abs(curves["objective/kl"][0][1]) < 1e-4 and abs(curves["eval/kl"][0][1]) < 1e-4


@pytest.mark.parametrize("reader", ["reference", "reward", "critic"])
def test_every_model_that_reads_the_rows_is_asked_for_its_longest(reader, world, tmp_path, capsys):
    """A reference, reward model or critic with 8 positions, where the policy has 128."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, eos_token_id=1))
    short = save(tmp_path / "causal", model)
    if reader != "reference":
        short = save_classifier(tmp_path / "short", short, TOKENIZER)
    found = message(capsys, world, tmp_path / "run", ppo,
                    **{reader: (short,) if reader == "reward" else short})
    assert found.endswith(f"do not fit the 8 positions of model {short}; lower --max-prompt-length,"
                          " --max-length or --max-new-tokens")


# ------------------------------------------------------------------------ tokens without embeddings


def test_tokens_that_were_added_beyond_the_embedding(world, tmp_path, capsys):
    tokenizer = make_tokenizer(WORDS)
    tokenizer.add_tokens(["<think>", "</think>"])  # ids 60 and 61 of a model with 60 rows
    policy = save(tmp_path / "policy", make_policy(60, 1), tokenizer)
    # They may stand in the tokenizer, as in Gemma 3's, as long as no row has one.
    rloo.main(rloo.Args(**flags(world, model=policy), output=str(tmp_path / "unused")))
    capsys.readouterr()
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": "w1 w2", "completion": "w3"}, {"prompt": "w1 <think>", "completion": "w3"}]
    for script, second in ((rloo, {}), (sft, {"prompt": "w1", "completion": "<think> w1"})):
        data.write_text("".join(json.dumps(row | second) + "\n" for row in rows))
        found = message(capsys, world, tmp_path / "run", script, model=policy, dataset=str(data),
                        test_split="train", batch_size=1, eval_rows=1)
        assert re.sub(r"row \d", "row i", found) == (
            f"model {policy}: row i of the dataset has the token <think>, which was added to the "
            "tokenizer, but has no embedding; load the model in transformers, call model."
            "resize_token_embeddings(len(tokenizer)), save it and name that folder")
    tokenizer.chat_template = "<think>{{ messages[0]['content'] }}"
    save(tmp_path / "policy", make_policy(60, 1), tokenizer)
    assert message(capsys, world, tmp_path / "run", model=policy).startswith(
        f"model {policy}: its chat template has the token <think>, which was added")
    # After the remedy, and where the embedding is larger than the tokenizer, all is right.
    for rows in (62, 80):
        tokenizer.chat_template = None
        save(tmp_path / "policy", make_policy(rows, 1), tokenizer)
        assert load_model(policy, CPU).unembedded == []
        rloo.main(rloo.Args(**flags(world, model=policy, dataset=str(data)),
                            output=str(tmp_path / f"run{rows}")))


# ----------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("flag", ["model", "reference", "reward", "critic"])
def test_an_adapter_folder_is_refused_and_its_base_named(flag, world, tmp_path, capsys):
    adapter = tmp_path / "lora"
    adapter.mkdir()
    TOKENIZER.save_pretrained(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 4,
        "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}))
    (adapter / "adapter_model.safetensors").touch()
    value = (str(adapter),) if flag == "reward" else str(adapter)
    assert message(capsys, world, tmp_path / "run", ppo, **{flag: value}) == (
        f"model {adapter}: is a LoRA adapter and not a whole model; merge it into its base once, "
        f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('some/base'), '{adapter}')"
        ".merge_and_unload().save_pretrained(FOLDER), save the tokenizer there too, and name that "
        "folder")


@pytest.mark.parametrize("peft", [False, True])
def test_an_adapter_on_the_hub_is_refused(peft, tmp_path, monkeypatch, capsys):
    """Without PEFT, loading fails; with it, the base and the adapter would be loaded together."""
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    monkeypatch.setattr(models, "find_adapter_config_file", lambda name: str(config))
    monkeypatch.setattr(models, "load_tokenizer", lambda name: TOKENIZER)

    def from_pretrained(name, **kwargs):
        if not peft:
            raise OSError("no file named config.json")
        model = make_policy(60, 1)
        model._hf_peft_config_loaded = True
        return model, {"missing_keys": []}

    with pytest.raises(SystemExit):
        load_model("me/lora", CPU,
                   auto_class=types.SimpleNamespace(from_pretrained=from_pretrained))
    assert capsys.readouterr().err.startswith("error: model me/lora: is a LoRA adapter and not a "
                                              "whole model; merge it into its base once, "
                                              "PeftModel.from_pretrained(AutoModelForCausalLM."
                                              "from_pretrained('some/base'), 'me/lora')")
