"""Model families: what a Hugging Face architecture calls things, and what makes it what it is.

A family is a row of FAMILIES, and only names and values: model.py knows none of them by name. What
a key means where it is absent is what transformers' own class takes then.
"""

import re
from typing import NamedTuple


class Family(NamedTuple):
    """Keys and values of ModelConfig, names of parameters. Fields that are not set are Llama's."""

    architecture: str
    keys: dict = {}  # our field: its key in config.json  # noqa: RUF012
    values: dict = {}  # fields that config.json need not hold  # noqa: RUF012
    supported: dict = {}  # keys of config.json, and the only values that are built  # noqa: RUF012
    modules: dict = {}  # our module: its name in the checkpoint  # noqa: RUF012
    prefix: str = "model."  # of every name but lm_head's
    conv1d: bool = False  # the matrices of a block are stored transposed, as (in, out)
    windows: bool = False  # attention may have a sliding window


# fmt: off
LLAMA_KEYS = {
    "vocab_size": "vocab_size", "dim": "hidden_size", "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads", "hidden_dim": "intermediate_size",
    "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim", "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta", "max_seq_len": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings", "activation": "hidden_act", "dtype": "torch_dtype",
}
ROPE_NUMBERS = {  # the supported types of rope_scaling, and the numbers that each needs
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
ROPE = {"rope_type": tuple(ROPE_NUMBERS)}
LONGROPE = {"rope_type": (*ROPE_NUMBERS, "longrope")}
BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
GPT = {
    "layer_norm": True, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "gated": False,
    "norm_eps": 1e-5,
}
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", keys=BIASES | {"mlp_bias": "mlp_bias"}, supported=ROPE,
    ),
    "mistral": Family(
        "MistralForCausalLM", values={"n_kv_heads": 8, "max_seq_len": 131072}, supported=ROPE,
        windows=True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", values={"qkv_bias": True, "n_kv_heads": 32, "max_seq_len": 32768},
        supported=ROPE, windows=True,
    ),
    "qwen3": Family(
        # qk_norm adds self_attn.q_norm and k_norm, which have these names in the checkpoint too.
        "Qwen3ForCausalLM", keys=BIASES,
        values={"qk_norm": True, "head_dim": 128, "n_kv_heads": 32, "max_seq_len": 32768},
        supported=ROPE, windows=True,
    ),
    "gemma": Family(
        "GemmaForCausalLM", keys=BIASES,
        values={
            "norm_adds_one": True, "scale_embeddings": True, "tie_embeddings": True,
            "head_dim": 256, "n_kv_heads": 16, "max_seq_len": 8192,
            "activation": "gelu_pytorch_tanh",
        },
        supported={"use_bidirectional_attention": (False,)} | ROPE,
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", keys=BIASES,
        values={"norm_outputs": True, "qk_norm": True, "qk_norm_joint": True, "norm_eps": 1e-5},
        supported=ROPE,
        modules={
            "input_layernorm": "post_attention_layernorm",
            "post_attention_layernorm": "post_feedforward_layernorm",
        },
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        keys=BIASES | {"mlp_bias": "mlp_bias", "rope_layers": "no_rope_layers"},
        values={
            "tie_embeddings": True, "rope_theta": 2e6, "n_kv_heads": 4, "max_seq_len": 32768,
        },
        supported=ROPE, windows=True,
    ),
    "phi3": Family(
        "Phi3ForCausalLM", keys={"rotary_fraction": "partial_rotary_factor"},
        values={"norm_eps": 1e-5, "max_seq_len": 4096}, supported=LONGROPE,
        modules={
            "self_attn.q_proj": "self_attn.qkv_proj", "self_attn.k_proj": "self_attn.qkv_proj",
            "self_attn.v_proj": "self_attn.qkv_proj", "mlp.gate_proj": "mlp.gate_up_proj",
            "mlp.up_proj": "mlp.gate_up_proj",
        },
        windows=True,
    ),
    "phi": Family(
        "PhiForCausalLM",
        keys={"norm_eps": "layer_norm_eps", "rotary_fraction": "partial_rotary_factor"},
        values=GPT | {
            "lm_head_bias": True, "parallel": True, "rotary_fraction": 0.5,
            "activation": "gelu_new",
        },
        supported={"qk_layernorm": (False,), "tie_word_embeddings": (False,)} | ROPE,
        modules={
            "self_attn.o_proj": "self_attn.dense", "mlp.up_proj": "mlp.fc1",
            "mlp.down_proj": "mlp.fc2", "norm": "final_layernorm",
        },
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        keys={
            "dim": "n_embd", "n_layers": "n_layer", "n_heads": "n_head", "hidden_dim": "n_inner",
            "max_seq_len": "n_positions", "norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
        },
        values=GPT | {
            "tie_embeddings": True, "rotary_fraction": 0, "position_offset": 0,
            "activation": "gelu_new", "max_seq_len": 1024,
        },
        supported={
            "scale_attn_by_inverse_layer_idx": (False,), "scale_attn_weights": (True,),
            "add_cross_attention": (False,),
        },
        modules={
            "embed_tokens": "wte", "embed_positions": "wpe", "layers": "h", "norm": "ln_f",
            "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
            "self_attn.q_proj": "attn.c_attn", "self_attn.k_proj": "attn.c_attn",
            "self_attn.v_proj": "attn.c_attn", "self_attn.o_proj": "attn.c_proj",
            "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
        },
        prefix="transformer.", conv1d=True,
    ),
    "opt": Family(
        "OPTForCausalLM",
        keys={
            "hidden_dim": "ffn_dim", "activation": "activation_function",
            "embed_dim": "word_embed_proj_dim", "norm_first": "do_layer_norm_before",
        },
        values=GPT | {
            "tie_embeddings": True, "rotary_fraction": 0, "position_offset": 2,
            "activation": "relu",
        },
        supported={
            "enable_bias": (True,), "layer_norm_elementwise_affine": (True,),
            "_remove_final_layer_norm": (False,),
        },
        modules={
            "self_attn.o_proj": "self_attn.out_proj", "input_layernorm": "self_attn_layer_norm",
            "post_attention_layernorm": "final_layer_norm", "mlp.up_proj": "fc1",
            "mlp.down_proj": "fc2", "norm": "final_layer_norm",
        },
        prefix="model.decoder.",
    ),
}
# fmt: on


def stored_names(family: Family, ours) -> dict[str, list[str]]:
    """{name in a checkpoint, without prefix: our parameters in it}; GPT-2 and Phi-3 store several
    as one matrix."""
    found = {}
    for name in ours:
        *layer, module, leaf = re.fullmatch(r"(?:(layers)\.(\d+)\.)?(.+)\.(\w+)", name).groups()
        stored = f"{family.modules.get(module, module)}.{leaf}"
        if layer[0]:
            stored = f"{family.modules.get('layers', 'layers')}.{layer[1]}.{stored}"
        found.setdefault(stored, []).append(name)
    return found
