"""The implementations of ORPO that conformance/run.py checks, each one function.

A new one is one function more under @implementation. How many arguments it takes says where it
starts; it computes in the dtype that it is given, or as it likes, and autograd does the rest.

    f(chosen_logps, rejected_logps)    mean log-probabilities, each (B,) -> L_OR (B,), or its sum
    f(batch)                           a Batch -> the scalar L_SFT + lam * mean of L_OR

Ours, TRL's and Liger's is the code itself. LLaMA-Factory's and the authors' is typed from their
definitions, as their packages cannot be had beside the others; a comment says where they stand.
"""

import importlib.metadata
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import orpo


class Side(NamedTuple):
    """The chosen or the rejected half of a batch, padded on the right; row t predicts targets[t].

    The last row of a response predicts EOS.
    """

    logits: Tensor  # (B, T, V)
    targets: Tensor  # (B, T) int64
    response: Tensor  # (B, T) bool: the target is a token of the response
    real: Tensor  # (B, T) bool: of the prompt or the response, not padding


class Batch(NamedTuple):
    """A micro-batch of B pairs. The last two fields are of its whole optimizer step."""

    chosen: Side
    rejected: Side
    lam: float
    nll_weight: Tensor  # (B, T): of -log p(target) in L_SFT, over the chosen rows
    n_pairs: int

    def pair(self, i: int) -> "Batch":
        """Pair i alone, as a micro-batch of the same step."""
        chosen, rejected = (Side(*(x[i : i + 1] for x in side)) for side in self[:2])
        return self._replace(chosen=chosen, rejected=rejected, nll_weight=self.nll_weight[[i]])

    def stacked(self) -> Side:
        """Chosen over rejected as one Side, (2B, T, V) with the longer T."""
        t = max(side.targets.shape[1] for side in self[:2])
        parts = [
            [F.pad(x, (0, 0) * (x.dim() - 2) + (0, t - x.shape[1])) for x in s] for s in self[:2]
        ]
        return Side(*map(torch.cat, zip(*parts, strict=True)))


class Implementation(NamedTuple):
    name: str
    version: str
    function: Callable
    level: str  # "pairs" or "logits": where it starts
    metric: Callable | None  # (chosen_logps, rejected_logps) -> what is logged as log odds ratio


IMPLEMENTATIONS = []


def level_of(function: Callable) -> str:
    """A function of one argument, a Batch, starts from "logits"; one of two from "pairs"."""
    n = len(inspect.signature(function).parameters)
    if n not in (1, 2):
        raise ValueError(f"takes {n} arguments, not (batch) or (chosen_logps, rejected_logps)")
    return ("logits", "pairs")[n - 1]


def implementation(name: str, version: str, metric: Callable | None = None):
    """Adds a row to the tables: the function underneath, as described at the top of this file."""

    def add(function):
        IMPLEMENTATIONS.append(Implementation(name, version, function, level_of(function), metric))
        return function

    return add


def version_of(package: str) -> str:
    """Its version; where it is missing, its rows fail when they are run, and main() says so."""
    found = importlib.util.find_spec(package)
    return importlib.metadata.version(package) if found else "missing"


TRL, LIGER = version_of("trl"), version_of("liger_kernel")


# train.py logs the mean log sigmoid under TRL's name, knowingly.
@implementation("ours", "this", metric=lambda w, l: -orpo.odds_ratio_loss(w, l).mean())
def ours_pairs(chosen_logps, rejected_logps):
    return orpo.odds_ratio_loss(chosen_logps, rejected_logps)


@implementation("ours", "this")
def ours(batch):
    """The fused path. The identity as lm_head makes the hidden states the logits."""
    w, l = batch[:2]
    pair = torch.arange(len(w.targets))[:, None]
    response = [torch.where(s.response, 2 * pair + side, -1) for side, s in enumerate((w, l))]
    weights = [batch.nll_weight, torch.zeros_like(l.targets, dtype=batch.nll_weight.dtype)]
    rows = [w.real, l.response]

    def gather(both):
        return torch.cat([x[keep] for x, keep in zip(both, rows, strict=True)])

    hidden = gather([w.logits, l.logits])
    lm_head = torch.eye(hidden.shape[1], dtype=hidden.dtype)
    data = gather([w.targets, l.targets]), gather(response), gather(weights)
    return orpo.fused_linear_orpo(hidden, lm_head, *data, batch.lam, batch.n_pairs).loss


@implementation("ours, plain path", "this")
def ours_plain(batch):
    """response_logps and autograd, as a reader would join them: the definition, not the code."""
    w, l = (orpo.response_logps(s.logits, s.targets, s.response) for s in batch[:2])
    logps = batch.chosen.logits.to(w.dtype).log_softmax(-1)
    nll = logps.gather(-1, batch.chosen.targets[..., None])[..., 0] * batch.nll_weight
    return -nll.sum() + batch.lam * orpo.odds_ratio_loss(w, l).sum() / batch.n_pairs


def trl_trainer(lam: float):
    """TRL's ORPOTrainer with only the attributes that its loss reads: no model, no data."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = ORPOTrainer.__new__(ORPOTrainer)
    trainer.accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer.beta, trainer.padding_value = lam, 0
    trainer.is_encoder_decoder = trainer.aux_loss_enabled = False
    return trainer


@implementation("TRL", TRL, metric=lambda w, l: trl_trainer(1.0).odds_ratio_loss(w, l)[3])
def trl_pairs(chosen_logps, rejected_logps):
    return -trl_trainer(1.0).odds_ratio_loss(chosen_logps, rejected_logps)[0]


@implementation("TRL", TRL)
def trl(batch):
    """Its get_batch_loss_metrics, in which a model that knows these logits stands for a real one.

    TRL shifts by itself, so a first token, which nothing predicts, is put in front. (Its default
    bf16 hands on float32 logits, rounded: accelerate converts what the model returns.)
    """
    inputs = {}
    for name, s in zip(("chosen", "rejected"), batch[:2], strict=True):
        labels = torch.where(s.response, s.targets, -100)
        inputs[f"{name}_input_ids"] = F.pad(s.targets, (1, 0))
        inputs[f"{name}_attention_mask"] = F.pad(s.real.long(), (1, 0), value=1)
        inputs[f"{name}_labels"] = F.pad(labels, (1, 0), value=-100)
    logits = F.pad(batch.stacked().logits, (0, 0, 0, 1))

    def model(*_, **__):
        return SimpleNamespace(logits=logits)

    return trl_trainer(batch.lam).get_batch_loss_metrics(model, inputs)[0]


def liger_terms(chosen_logps, rejected_logps):
    from liger_kernel.chunked_loss.orpo_loss import LigerFusedLinearORPOFunction as Liger

    # It divides by the pairs of full_target, here one: so these are sums.
    return Liger.preference_loss_fn(chosen_logps, rejected_logps, torch.empty(2, 1), beta=1.0)


@implementation("Liger", LIGER, metric=lambda w, l: liger_terms(w, l)[3])
def liger_pairs(chosen_logps, rejected_logps):
    return liger_terms(chosen_logps, rejected_logps)[0]


@implementation("Liger", LIGER)
def liger(batch):
    """LigerFusedLinearORPOLoss with the SFT labels that a TRL user would hand it: all real ones."""
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    s = batch.stacked()
    lm_head = torch.eye(s.logits.shape[2], dtype=s.logits.dtype)
    targets, nll = (torch.where(rows, s.targets, -100) for rows in (s.response, s.real))
    fused = LigerFusedLinearORPOLoss(beta=batch.lam, compiled=False)
    return fused(lm_head, s.logits, targets, nll_target=nll)[0]


# hiyouga/LLaMA-Factory, src/llamafactory/train/dpo/trainer.py as of commit 000526908ae9: the logits
# in float32, log P the mean over the response, L_SFT = -log P, log1p(-exp) for log(1 - P).


@implementation("LLaMA-Factory", "0005269")
def llama_factory_pairs(chosen_logps, rejected_logps):
    w, l = chosen_logps, rejected_logps
    log_odds_w, log_odds_l = (x - torch.log1p(-x.exp()) for x in (w, l))
    return -F.logsigmoid(log_odds_w - log_odds_l)


@implementation("LLaMA-Factory", "0005269")
def llama_factory(batch):
    w, l = (response_mean(s._replace(logits=s.logits.float()), s.response) for s in batch[:2])
    return (-w + batch.lam * llama_factory_pairs(w, l)).mean()


def response_mean(s: Side, terms: Tensor) -> Tensor:
    """Mean over `terms` (B, T) of log p(target), as most write it: (B,)."""
    logps = s.logits.log_softmax(-1).gather(-1, s.targets[..., None])[..., 0]
    return (logps * terms).sum(1) / terms.sum(1)


# xfactlab/orpo, src/orpo_trainer.py: as public with the paper, and as of its last commit 208d2d6.
# Log-probabilities are turned into float64, the loss into bfloat16.


def authors_l_or(chosen_logps, rejected_logps, log1mexp):
    w, l = chosen_logps.double(), rejected_logps.double()
    return -torch.log(torch.sigmoid((w - log1mexp(w)) - (l - log1mexp(l))))


def authors_logps(s: Side):
    """Their mask, the difference of two shifted ones, also holds the first pad behind EOS."""
    terms = s.response | F.pad(s.response, (1, 0))[:, :-1]
    return response_mean(s, terms).double()


# wandb's "Log Odds Ratio" is the mean of log(sigmoid(.)).
@implementation("authors, first", "2024-03", metric=lambda w, l: -authors_first_pairs(w, l).mean())
def authors_first_pairs(chosen_logps, rejected_logps):
    return authors_l_or(chosen_logps, rejected_logps, lambda x: torch.log(1 - torch.exp(x)))


@implementation("authors, last", "208d2d6", metric=lambda w, l: -authors_last_pairs(w, l).mean())
def authors_last_pairs(chosen_logps, rejected_logps):
    return authors_l_or(chosen_logps, rejected_logps, lambda x: torch.log1p(-torch.exp(x)))


@implementation("authors, first", "2024-03")
def authors_first(batch):
    """L_SFT: the mean over every position of the padded row, padding included."""
    w, l = map(authors_logps, batch[:2])
    nll = F.cross_entropy(batch.chosen.logits.mT, batch.chosen.targets, reduction="none").mean(1)
    return (nll + batch.lam * authors_first_pairs(w, l)).mean().bfloat16()


@implementation("authors, last", "208d2d6")
def authors_last(batch):
    """L_SFT: transformers' mean over the labels that are not pad. Pad is EOS, so EOS is not one."""
    s = batch.chosen
    eos = s.response & ~F.pad(s.response, (0, 1))[:, 1:]
    labels = torch.where(s.real & ~eos, s.targets, -100)
    nll = F.cross_entropy(s.logits.float().mT, labels)
    w, l = map(authors_logps, batch[:2])
    return (nll + batch.lam * authors_last_pairs(w, l)).mean().bfloat16()
