"""Tiny random checkpoints of the model families that people bring, and tokenizers trained here."""

import torch
from tokenizers import (Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
                        trainers)
from transformers import (AutoModelForCausalLM, Gemma3TextConfig, GemmaConfig, GPT2Config,
                          GPTNeoXConfig, LlamaConfig, MistralConfig, OPTConfig,
                          PreTrainedTokenizerFast, Qwen2Config, Qwen3Config)

CORPUS = [
    "The cat sat on the mat, and the dog ran after the cat.",
    "Natalia sold 48 clips in April. How many clips did she sell in May?",
    "What is 2 + 3? The answer is 5. Was können wir tun? 我们 走 吧 🙂",
    "user assistant system please tell me a joke about the weather in London",
] * 8

CHATML = ("{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
          "{{ message['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA_CHAT = ("{{ bos_token }}{% for message in messages %}"
              "[{{ message['role'] }}] {{ message['content'] }}"
              "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
              "{% if add_generation_prompt %}[assistant] {% endif %}")


def byte_level(special, **kwargs):
    """GPT-2's kind: BPE over bytes, no text is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **kwargs)


def sentencepiece_like(adds_bos=True, **kwargs):
    """Llama's kind: BPE over text with "▁" for spaces, byte fallback, and a BOS of its own."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                 normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=380,
                                                              special_tokens=special))
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A",
                                                                 special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>",
                                   eos_token="</s>", **kwargs)


def shape(tokenizer, padded=0, heads=2, **kwargs):
    return dict(vocab_size=len(tokenizer) + padded, hidden_size=32, num_hidden_layers=2,
                num_attention_heads=heads, max_position_embeddings=256, initializer_range=0.2,
                bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=None) | kwargs


def gpt2():  # absolute positions, tied head, no pad token, EOS = BOS
    tokenizer = byte_level(["<|endoftext|>"], eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    return tokenizer, GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2,
                                 n_positions=256, initializer_range=0.2, bos_token_id=0,
                                 eos_token_id=0)


def neox():  # Pythia: rotary on part of each head, untied head, vocabulary padded
    tokenizer = byte_level(["<|endoftext|>"], eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    return tokenizer, GPTNeoXConfig(**shape(tokenizer, padded=13), intermediate_size=64)


def llama():  # sentencepiece, BOS added by the tokenizer, pad = EOS, untied head
    tokenizer = sentencepiece_like(pad_token="</s>", chat_template=LLAMA_CHAT)
    return tokenizer, LlamaConfig(**shape(tokenizer), intermediate_size=64, num_key_value_heads=1)


def qwen2():  # two EOS ids, a pad token of its own, tied head, sampling settings in its config
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level(special, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                           chat_template=CHATML)
    return tokenizer, Qwen2Config(**shape(tokenizer, padded=20), intermediate_size=64,
                                  num_key_value_heads=1, tie_word_embeddings=True)


def qwen3():  # norms on queries and keys, head size of its own
    tokenizer, _ = qwen2()
    return tokenizer, Qwen3Config(**shape(tokenizer), intermediate_size=64, num_key_value_heads=1,
                                  head_dim=8)


def gemma():  # scaled embeddings, tied head, one key-value head
    tokenizer = sentencepiece_like(pad_token="<unk>", chat_template=LLAMA_CHAT)
    return tokenizer, GemmaConfig(**shape(tokenizer), intermediate_size=64, num_key_value_heads=1,
                                  head_dim=16)


def gemma3():  # layers with a sliding window and without take turns
    tokenizer, _ = gemma()
    return tokenizer, Gemma3TextConfig(
        **shape(tokenizer), intermediate_size=64, num_key_value_heads=1, head_dim=16,
        sliding_window=8, layer_types=["sliding_attention", "full_attention"])


def opt():  # absolute positions with an offset, BOS added by the tokenizer
    tokenizer = byte_level(["<pad>", "</s>"], eos_token="</s>", bos_token="</s>", pad_token="<pad>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", tokenizer.eos_token_id)])
    config = shape(tokenizer, ffn_dim=64, word_embed_proj_dim=32, init_std=0.05)
    return tokenizer, OPTConfig(**config | {"pad_token_id": tokenizer.pad_token_id})


def mistral():  # a sliding window that is shorter than the prompts
    tokenizer = sentencepiece_like(chat_template=LLAMA_CHAT)
    return tokenizer, MistralConfig(**shape(tokenizer), intermediate_size=64, num_key_value_heads=1,
                                    sliding_window=8)


FAMILIES = {family.__name__: family
            for family in (gpt2, neox, llama, qwen2, qwen3, gemma, gemma3, opt, mistral)}


def save_family(folder, name):
    """Write the checkpoint to folder, as the hub would have it; returns the path."""
    tokenizer, config = FAMILIES[name]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    if name == "qwen2":
        model.generation_config.update(
            do_sample=True, top_p=0.8, top_k=20, repetition_penalty=1.1, temperature=0.7,
            eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
