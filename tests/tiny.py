"""Small models and data for the tests: everything is made on the spot, nothing is downloaded."""

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CPU = torch.device("cpu")
DATA_ARGS = SimpleNamespace(dataset_config=None, chat=False, system_prompt=None, truncate_prompts=False)


def make_tokenizer(words, pad="<pad>", eos="<eos>"):
    """Word-level tokenizer; pad=None leaves the pad token out, pad=eos makes them one."""
    special = list(dict.fromkeys(token for token in (pad, eos) if token))
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=eos)


def token_ids(tokenizer, prompts):
    return tokenizer(prompts)["input_ids"]


def make_policy(vocab_size, eos_token_id, seed=0, dtype=torch.float32, hidden=16, layers=2):
    """A random Llama whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def make_float64_policy(vocab_size, seed):
    """A random GPT-2 in float64. (Llama's RMSNorm computes in float32 whatever the weights are.)"""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=vocab_size, n_embd=8, n_layer=1, n_head=2, n_positions=16, initializer_range=0.5)
    return GPT2LMHeadModel(config).double().eval()


def make_float64_critic(vocab_size, seed):
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=8, n_layer=1, n_head=2, n_positions=16, initializer_range=0.5, num_labels=1
    )
    return GPT2ForSequenceClassification(config).double().eval()


def save_policy(folder, tokenizer, **kwargs):
    make_policy(len(tokenizer), tokenizer.eos_token_id, **kwargs).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_classifier(folder, policy_folder, tokenizer, labels=1):
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(policy_folder, num_labels=labels)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
