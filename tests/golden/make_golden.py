"""
Writes orpo.json, the golden vectors of ORPO: inputs, loss terms and gradients, computed in 120
digits by tests/oracle.py and never by orpo.py. What the file holds is explained in its own head.

    python -m tests.golden.make_golden        writes orpo.json beside this script: same bytes always
"""

import json
import math
import random
import struct
from pathlib import Path

from tests import oracle
from tests.oracle import mp, mpf

PATH = Path(__file__).with_name("orpo.json")

# Raised whenever a case, a number or the meaning of a field changes, so that a framework that keeps
# a copy of the file knows which one it has. tests/test_orpo.py holds the numbers to it.
VERSION = 1

ABOUT = {
    "what": "Golden vectors for ORPO (Hong, Lee, Thorne: arXiv 2403.07691): inputs, loss terms and "
    "gradients, to check an implementation in any framework and language against.",
    "objective": "loss = nll + lam * mean over pairs of l_or, l_or = -log sigmoid(log odds_w - "
    "log odds_l), odds = P/(1-P), log P = mean over the response's tokens of log p(token). "
    "lam is beta in TRL and alpha in the authors' code.",
    "precision": "Computed in 120 decimal digits with mpmath and rounded once. Results have 17 "
    "significant digits, enough for any double; less are printed where the rest are zeros. "
    'Infinities are the strings "inf" and "-inf"; a result too small for a double is 0. '
    "Inputs are exactly representable in float32, so float32 and float64 read the same numbers.",
    "compare": "x agrees with the expected y if |x - y| <= rtol * s + tiny, with rtol 1e-5 in "
    "float32 and 1e-12 in float64, and tiny the dtype's smallest normal number (1.2e-38, "
    "2.3e-308). s is |y|, except for log_odds_chosen, which crosses zero, where it is max(|y|, 1), "
    "and for a gradient in 'logits', where it is the largest |y| of the array's innermost row (V "
    "numbers). An expected inf asks for inf, or for something beyond the dtype's range. A plain "
    "autograd implementation passes kind 'ordinary'; 'edge' shows whether it survives certainty.",
    "version": "The file's own: raised whenever a case, a number or the meaning of a field "
    "changes. A copy should be checked for the version that its test was written for.",
    "pairs": "One pair a line, starting from mean log-probabilities. chosen_logp, rejected_logp: "
    "log P_w, log P_l. lam. nll: L_SFT = -chosen_logp. log_odds_chosen: the log odds ratio "
    "log odds_w - log odds_l (TRL's name; TRL's log_odds_ratio is the mean of -l_or). l_or: L_OR, "
    "before lam. loss: nll + lam * l_or. l_or_d_chosen, l_or_d_rejected, loss_d_chosen, "
    "loss_d_rejected: derivatives of l_or and of loss with respect to the two inputs. With "
    "delta = 1/(1 + odds_w/odds_l): l_or_d_chosen = -delta/(1-P_w), l_or_d_rejected = "
    "+delta/(1-P_l) (the paper's h has the other sign).",
    "kind": "'ordinary'; 'edge': at or near certainty or impossibility, where the limit is given; "
    "'convention': both certain, where no limit exists and the odds ratio is taken as 1 (loss "
    "ln 2, derivatives -inf and inf): ask only that nothing is NaN. With lam = 0 the loss is nll, "
    "even where l_or is inf.",
    "logits": "Small batches from the logits on. B pairs; T rows, padded on the right; V logits a "
    "row. For chosen and for rejected: logits (B, T, V), where row t predicts targets[b][t] (so "
    "already shifted by one); targets (B, T); response_mask (B, T), 1 where the target is a token "
    "of the response, 0 where it is a token of the prompt or padding (whose logits are noise: they "
    "must not matter); logps (B,): log P; grad (B, T, V): the derivative of the scalar loss with "
    "respect to every logit. chosen has nll_weight (B, T) too: nll = -sum nll_weight * log p. "
    "sft_loss 'response' (the paper's formula): 1/(B * m) on each of a chosen response's m tokens; "
    "'full' (TRL's): 1/n on each row of prompt and chosen, n such rows in the batch. "
    "log_odds_chosen (B,), l_or (B,) as in pairs; nll, loss: scalars, loss = nll + lam * mean "
    "l_or. "
    "Rows are drawn independently: the two branches' prompt rows differ, though a model's would "
    "not. 'lead' in a name: by how many nats the target leads (or, negative, trails) the best "
    "other logit in the response rows of that side.",
}


def float32(x):
    """x rounded to float32, as a Python float."""
    return struct.unpack("f", struct.pack("f", x))[0]


# -----------------------------------------------------------------------------
# The cases


def pair_cases():
    """(kind, chosen, rejected, lam): ordinary values, every pair of edges, other lams."""
    ordinary = [-0.0625, -0.25, -0.5, -1.0, -1.75, -4.0]
    ln2 = float32(math.log(2))
    ulp = 2.0**-24  # the distance to ln2's neighbours in float32
    edges = [0.0, -1e-30, -1e-8, -1e-3, -(ln2 - ulp), -ln2, -(ln2 + ulp), -20.0, -100.0, -1e4]
    for a in ordinary:
        for b in ordinary:
            yield "ordinary", a, b, 0.125
    for a, b in [(-0.5, -1.0), (-1.0, -0.5), (-0.25, -0.25)]:
        for lam in [0.0, 0.5, 1.0, 4.0]:
            yield "ordinary", a, b, lam
    for a in map(float32, edges):
        for b in map(float32, edges):
            yield "convention" if a == b == 0 else "edge", a, b, 0.125
    for a, b in [(0.0, -1.0), (-1.0, 0.0)]:
        for lam in [0.0, 1.0]:
            yield "edge", a, b, lam


# name, kind, lam, V, (prompt tokens, chosen tokens, rejected tokens) a pair, leads or None
LOGITS_CASES = [
    ("one token each", "ordinary", 0.125, 3, [(1, 1, 1)], None),
    ("two pairs", "ordinary", 0.125, 4, [(3, 2, 3), (1, 3, 1)], None),
    ("three pairs, lam 1", "ordinary", 1.0, 5, [(2, 3, 2), (4, 1, 2), (1, 2, 4)], None),
    ("lam 0", "ordinary", 0.0, 3, [(2, 2, 2)], None),
    ("chosen lead 30", "edge", 1.0, 4, [(2, 2, 2), (2, 1, 2)], (30, None)),
    ("rejected lead 30", "edge", 1.0, 4, [(2, 2, 2), (2, 2, 1)], (None, 30)),
    ("both lead 30", "edge", 1.0, 4, [(2, 2, 2), (2, 1, 1)], (30, 30)),
    ("chosen lead 80", "edge", 1.0, 4, [(2, 2, 2)], (80, None)),
    ("rejected lead 80", "edge", 1.0, 4, [(2, 2, 2)], (None, 80)),
    ("both lead 80", "edge", 1.0, 4, [(2, 3, 2)], (80, 80)),
    ("chosen lead -30, rejected lead 30", "edge", 1.0, 4, [(2, 2, 2)], (-30, 30)),
    ("chosen lead -80", "edge", 1.0, 4, [(2, 2, 2)], (-80, None)),
    ("rejected lead -80", "edge", 1.0, 4, [(2, 2, 2)], (None, -80)),
    ("chosen lead 80, rejected lead -80", "edge", 1.0, 4, [(2, 2, 2)], (80, -80)),
    ("chosen lead -80, rejected lead 80", "edge", 1.0, 4, [(2, 2, 2)], (-80, 80)),
]


def draw_branch(rng, n_prompt, n_response, length, vocab, lead):
    """logits (length, vocab), targets, mask of a branch; multiples of 1/16 are exact in float32."""
    n_prompt -= 1  # nothing predicts the first token
    logits, targets = [], []
    for t in range(length):
        row = [math.floor(rng.random() * 96 - 48) / 16 for _ in range(vocab)]
        target = math.floor(rng.random() * vocab)
        if lead is not None and n_prompt <= t < n_prompt + n_response:
            row[target] = max(x for v, x in enumerate(row) if v != target) + lead
        logits.append(row)
        targets.append(target)
    mask = [int(n_prompt <= t < n_prompt + n_response) for t in range(length)]
    return logits, targets, mask


def logits_case(rng, name, kind, lam, vocab, lengths, leads, sft_loss):
    lead_chosen, lead_rejected = leads or (None, None)
    t_chosen = max(p - 1 + c for p, c, _ in lengths)
    t_rejected = max(p - 1 + r for p, _, r in lengths)
    chosen = [draw_branch(rng, p, c, t_chosen, vocab, lead_chosen) for p, c, _ in lengths]
    rejected = [draw_branch(rng, p, r, t_rejected, vocab, lead_rejected) for p, _, r in lengths]
    if sft_loss == "response":
        nll_weight = [[mpf(m) / (len(chosen) * sum(mask)) for m in mask] for _, _, mask in chosen]
    else:
        n_rows = [p - 1 + c for p, c, _ in lengths]
        nll_weight = [[mpf(t < n) / sum(n_rows) for t in range(t_chosen)] for n in n_rows]
    out = oracle.orpo_from_logits(chosen, rejected, lam, nll_weight)

    def side(branches, logps, grad, **more):
        logits, targets, mask = map(list, zip(*branches, strict=True))
        inputs = {"logits": logits, "targets": targets, "response_mask": mask}
        return inputs | more | {"logps": logps, "grad": grad}

    return {
        "name": f"{name}, {sft_loss}",
        "kind": kind,
        "sft_loss": sft_loss,
        "lam": lam,
        "chosen": side(chosen, out["chosen_logps"], out["chosen_grad"], nll_weight=nll_weight),
        "rejected": side(rejected, out["rejected_logps"], out["rejected_grad"]),
        **{key: out[key] for key in ("log_odds_chosen", "l_or", "nll", "loss")},
    }


# -----------------------------------------------------------------------------
# Writing: JSON whose numbers are not doubles yet


def dumps(x):
    """One line of JSON; an mpf is printed with 17 digits."""
    if isinstance(x, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {dumps(v)}" for k, v in x.items()) + "}"
    if isinstance(x, list):
        return "[" + ", ".join(map(dumps, x)) + "]"
    if isinstance(x, mpf):
        if mp.isinf(x):
            return '"inf"' if x > 0 else '"-inf"'
        x = mpf(0) if float(x) == 0 else x
        return mp.nstr(x, 17, min_fixed=-5, max_fixed=17)
    return json.dumps(x)


def pretty(case):
    """A case of many numbers: a line a field, a line a pair."""
    lines = []
    for key, value in case.items():
        if isinstance(value, dict):
            fields = []
            for k, v in value.items():
                deep = isinstance(v[0], list) and isinstance(v[0][0], list)
                rows = ",\n          ".join(map(dumps, v)) if deep else None
                text = f"[\n          {rows}\n        ]" if deep else dumps(v)
                fields.append(f"        {json.dumps(k)}: {text}")
            lines.append(f"      {json.dumps(key)}: {{\n" + ",\n".join(fields) + "\n      }")
        else:
            lines.append(f"      {json.dumps(key)}: {dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n    }"


def golden():
    """The whole file as text."""
    pairs = []
    for kind, a, b, lam in pair_cases():
        inputs = {"kind": kind, "chosen_logp": a, "rejected_logp": b, "lam": lam}
        pairs.append(dumps(inputs | oracle.orpo(a, b, lam)))
    logits = [
        pretty(logits_case(random.Random(seed), *case, sft_loss))  # one seed: the same inputs twice
        for seed, case in enumerate(LOGITS_CASES)
        for sft_loss in ("response", "full")
    ]
    about = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in ABOUT.items())
    return (
        f'{{\n  "version": {VERSION},\n'
        f'  "about": {{\n{about}\n  }},\n'
        '  "pairs": [\n    ' + ",\n    ".join(pairs) + "\n  ],\n"
        '  "logits": [\n    ' + ",\n    ".join(logits) + "\n  ]\n}\n"
    )


if __name__ == "__main__":
    PATH.write_text(golden())
    print(f"{PATH}: {PATH.stat().st_size:,} bytes")
