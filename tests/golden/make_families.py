"""
Writes families/*.json, a row of logits of a tiny model of each family, computed by transformers and
never by model.py, so that the tests of a mere clone hold every family to it.

    python -m tests.golden.make_families      needs transformers (make test-peers installs it)

A file holds config.json as transformers writes it, less its defaults; the names and shapes of the
stored tensors; the tokens, and the logits after the last of them. The weights are not stored: each
tensor is drawn by `weights` from its name, by a generator whose numbers NumPy has frozen.
tests/test_families.py builds the models again from that, and tests/peers/test_families.py holds the
files to the installed transformers.
"""

import json
import zlib
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).with_name("families")

SIZES = {"vocab_size": 23, "num_hidden_layers": 2, "max_position_embeddings": 32}
SIZES |= {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 24}
GROUPED = SIZES | {"num_key_value_heads": 2, "rms_norm_eps": 0.05}
ROPE = {"rope_theta": 100.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16, "rope_type": "llama3"}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.25, 3.0], "long_factor": [2.0, 8.0]}
PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.5}
WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
GPT2 = {"vocab_size": 23, "n_layer": 2, "n_positions": 32, "n_embd": 16, "n_head": 4}
OPT = {key: value for key, value in SIZES.items() if key != "intermediate_size"}
# Values that nothing would take for granted: an eps of 0.05, a quarter of each head turned.
CASES = {
    "llama": ("Llama", GROUPED | {"rope_parameters": {"rope_type": "default"} | ROPE}),
    "llama-linear-rope": (
        "Llama",
        GROUPED | {"rope_parameters": {"rope_type": "linear", "factor": 4.0} | ROPE},
    ),
    "llama-llama3-rope": ("Llama", GROUPED | {"head_dim": 8, "rope_parameters": LLAMA3 | ROPE}),
    "mistral-window": ("Mistral", GROUPED | {"sliding_window": 5}),
    "qwen2-window-above": ("Qwen2", GROUPED | WINDOW | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 8}),
    "phi": (
        "Phi",
        SIZES | {"num_attention_heads": 2, "partial_rotary_factor": 0.25, "layer_norm_eps": 0.05},
    ),
    "gpt2": ("GPT2", GPT2 | {"n_inner": 24, "layer_norm_epsilon": 0.05}),
    "opt": ("OPT", OPT | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "opt-350m": (
        "OPT",
        OPT | {"ffn_dim": 24, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
    ),
    "gemma": (
        "Gemma",
        GROUPED | {"head_dim": 8, "rope_parameters": {"rope_type": "default"} | ROPE},
    ),
    "olmo2": ("Olmo2", GROUPED | {"rope_parameters": {"rope_type": "default"} | ROPE}),
    "smollm3-window": (
        "SmolLM3",
        GROUPED
        | WINDOW
        | {"no_rope_layer_interval": 2, "rope_parameters": {"rope_type": "default"} | ROPE},
    ),
    "phi3-longrope": (
        "Phi3",
        GROUPED
        | {"num_attention_heads": 2, "rope_parameters": LONGROPE | ROPE}
        | {"max_position_embeddings": 96, "original_max_position_embeddings": 24}
        | {"partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    ),
    "phi3": ("Phi3", GROUPED | {"partial_rotary_factor": 0.5, "rope_parameters": PARTIAL | ROPE}),
}
TOKENS = [7 * i * i % 23 for i in range(21)]


def weights(name: str, shape: list[int]) -> np.ndarray:
    """A stored tensor, float32, made from its name: norms near 1, biases and matrices near 0."""
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    is_norm = len(shape) == 1 and name.endswith(".weight")
    return ((1 if is_norm else 0) + (0.3 if len(shape) == 1 else 0.5) * noise).astype(np.float32)


def case(name: str) -> dict:
    """What the file of this name holds."""
    import torch
    import transformers

    family, settings = CASES[name]
    nothing = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = getattr(transformers, f"{family}Config")(**settings | nothing)
    config._attn_implementation = "eager"
    suffix = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, family + suffix)(config).eval()
    tied = model.config.tie_word_embeddings
    shapes = {
        key: list(p.shape)
        for key, p in model.state_dict().items()
        if not (tied and key == "lm_head.weight")
    }
    with torch.no_grad():
        model.load_state_dict(
            {key: torch.from_numpy(weights(key, shape)) for key, shape in shapes.items()},
            strict=False,
        )
        logits = model.double()(torch.tensor([TOKENS])).logits[0, -1]
    about = {k: v for k, v in config.to_diff_dict().items() if v is not None}
    version = about.pop("transformers_version", transformers.__version__)
    about.pop("layer_types", None)  # published configs say it by max_window_layers
    return {
        "transformers": version,
        "config": about | {"model_type": config.model_type},
        "shapes": shapes,
        "tokens": TOKENS,
        "logits": [round(x, 6) for x in logits.tolist()],
    }


def main():
    FOLDER.mkdir(exist_ok=True)
    for name in CASES:
        lines = (f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in case(name).items())
        path = FOLDER / f"{name}.json"
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
