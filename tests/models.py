"""Small random models."""

import pytest
import torch

from model import ModelConfig, Transformer

V = 31  # the vocabulary of random_model
KINDS = [{"n_kv_heads": k, "tie_embeddings": t} for k in (4, 2, 1) for t in (False, True)]
kinds = pytest.mark.parametrize(
    "kind", KINDS, ids=[f"kv{k['n_kv_heads']}{'-tied' * k['tie_embeddings']}" for k in KINDS]
)


def random_model(dtype=torch.float64, seed=0, **config) -> Transformer:
    """Weights large enough for logits of a few nats: near-uniform ones would hide mistakes."""
    shape = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "n_kv_heads": 2}
    model = Transformer(ModelConfig(**({"vocab_size": V, "max_seq_len": 64} | shape | config)))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng, dtype=torch.float64)
            if p.dim() == 2:
                p.copy_(0.4 * noise)
            else:
                p.copy_(0.3 * noise + (0 if name.endswith("bias") else 1))
    return model.to(dtype).eval()


def tiny(dtype=torch.float32, **changes) -> Transformer:
    """As training begins: small weights in float32, products in dtype."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 211, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    model = Transformer(ModelConfig(**sizes | {"n_kv_heads": 2} | changes))
    model.compute_dtype = dtype
    return model
