"""ORPO by fused_linear_orpo on a model of transformers, for a loop of your own.

    python -m examples.hugging_face MODEL PAIRS.jsonl     (needs transformers)

The vocabulary projection, tied or not, is applied to a pair at a time and only where a response is
predicted. A model that does more than that projection to its logits (a bias, a scale, a soft cap)
needs the plain path: response_logps and orpo_loss.
"""

import sys
from itertools import pairwise

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

import data
from orpo import ORPOOutput, fused_linear_orpo


def orpo(model, pairs: list[data.Pair], lam: float) -> ORPOOutput:
    """The loss of B pairs, as one micro-batch and as a whole step."""
    both = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    sequences = [torch.tensor([*prompt, *answer]) for prompt, answer in both]
    tokens = pad_sequence(sequences, batch_first=True)  # (2B, T); no response token sees padding
    response = torch.full_like(tokens, -1)  # 2 * pair at a chosen token, 2 * pair + 1 at a rejected
    for row, (prompt, answer) in enumerate(both):
        response[row, len(prompt) : len(prompt) + len(answer)] = row
    tokens, response = tokens.to(model.device), response.to(model.device)

    # The hidden state at a token predicts the next one. P of them predict a token of a response.
    predicts = response[:, 1:] >= 0  # (2B, T-1)
    hidden = model.base_model(tokens).last_hidden_state[:, :-1][predicts]  # (P, D)
    targets, response = tokens[:, 1:][predicts], response[:, 1:][predicts]  # each (P,)
    lengths = torch.bincount(response)  # (2B,)
    nll_weight = (response % 2 == 0) / (len(pairs) * lengths[response])  # chosen, a mean per pair
    ends = lengths.cumsum(0)[1::2].tolist()  # a pair's rows lie together, and go together
    groups = [*pairwise([0, *ends])]
    lm_head = model.get_output_embeddings().weight  # (V, D)
    step = lam, len(pairs), lengths, groups
    return fused_linear_orpo(hidden, lm_head, targets, response, nll_weight, *step)


if __name__ == "__main__":
    folder, file = sys.argv[1:]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = data.load_tokenizer(folder)
    pairs, _ = data.encode_pairs(tokenizer, data.load_preferences(file), 512, 448)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.0)
    for step in range(1, 21):
        output = orpo(model, data.step_pairs(pairs, step, 8, seed=42), lam=0.1)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accuracy = (output.chosen_logps > output.rejected_logps).double().mean()
        print(f"step {step}: loss {output.loss:.4f}, accuracy {accuracy:.2f}", flush=True)
