"""A tiny random model of any causal family of transformers, by its model_type."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

# The names that families have for the same things; a config takes those that it knows.
SHAPE = dict(
    hidden_size=32, n_embd=32, d_model=32, intermediate_size=64, n_inner=64, ffn_dim=64, d_ff=64,
    expansion_ratio=2, num_hidden_layers=2, n_layer=2, num_layers=2, n_layers=2,
    num_attention_heads=2, n_head=2, num_heads=2, n_heads=2, num_key_value_heads=2,
    max_position_embeddings=256, n_positions=256, max_seq_len=256, rotary_dim=8, sliding_window=6,
    initializer_range=0.2, bos_token_id=0, eos_token_id=None, pad_token_id=0, num_experts=4,
    num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    word_embed_proj_dim=32)
SSM = dict(mamba_d_state=4, mamba_n_heads=4, mamba_d_head=16, mamba_expand=2, mamba_n_groups=1,
           mamba_chunk_size=4)
DECODER = dict(decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=64)
SPECIAL = {
    "bamba": SSM | dict(attn_layer_indices=[1]),
    "bart": DECODER, "mbart": DECODER, "pegasus": DECODER, "blenderbot": DECODER,
    "codegen": dict(n_head=4, num_attention_heads=4),
    "deepseek_v3": dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
                        v_head_dim=8, n_group=1, topk_group=1, first_k_dense_replace=1),
    "gemma": dict(head_dim=16), "gemma2": dict(head_dim=16),
    "gemma3_text": dict(head_dim=16, layer_types=["sliding_attention", "full_attention"]),
    "glm": dict(head_dim=16), "gpt_oss": dict(head_dim=16),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], window_size=6),
    "granitemoehybrid": SSM | dict(layer_types=["mamba", "attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2,
                  expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4,
                  use_mamba_kernels=False),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "mamba": dict(state_size=4), "falcon_mamba": dict(state_size=4),
    "mamba2": dict(state_size=4, num_heads=4, head_dim=16, expand=2, n_groups=1, chunk_size=4),
    "qwen3": dict(head_dim=16), "qwen3_moe": dict(head_dim=16),
    "qwen3_next": dict(head_dim=16, linear_key_head_dim=8, linear_value_head_dim=8,
                       linear_num_key_heads=2, linear_num_value_heads=2,
                       shared_expert_intermediate_size=16,
                       layer_types=["linear_attention", "full_attention"]),
    "recurrent_gemma": dict(lru_width=32, block_types=["recurrent", "attention"]),
    "rwkv": dict(attention_hidden_size=32),
}


def tiny_model(model_type, vocab_size, **more):
    """A causal LM of this family whose outputs are far from uniform; `more` is for its config."""
    family = CONFIG_MAPPING[model_type]
    known = family()
    shape = {name: value for name, value in SHAPE.items() if hasattr(known, name)}
    config = family(**shape | SPECIAL.get(model_type, {}) | {"vocab_size": vocab_size} | more)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for weight in model.parameters():
        if weight.dim() > 1 and weight.std() < 0.05:
            torch.nn.init.normal_(weight, std=0.1)
    return model
