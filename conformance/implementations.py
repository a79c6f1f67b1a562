"""The implementations of ORPO that conformance/run.py checks, each one function.

A new one is a Project and one function under @implementation(project). How many arguments the
function takes says where it starts; it computes in the dtype that it is given, or as it likes, and
autograd does the rest.

    f(chosen_logps, rejected_logps)    mean log-probabilities, each (B,) -> L_OR (B,), or its sum
    f(batch)                           a Batch -> the scalar L_SFT + lam * mean of L_OR

Ours, TRL's and Liger's code is run. All others are written here in PyTorch from their definitions,
as their packages need other frameworks or cannot be installed beside these. The commit that was
read is the version. What these formulas cannot show is another framework's rounding: JAX and MLX
compute in float32 what we also give here in float64.
"""

import importlib.metadata
import importlib.util
import inspect
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}

import torch
import torch.nn.functional as F
from torch import Tensor

import orpo

LN2 = 0.6931471805599453


# ---------------------------------------------------------------------------------------------
# What an implementation gets.


class Side(NamedTuple):
    """The chosen or the rejected half of a batch, padded on the right; row t predicts targets[t].

    The last row of a response predicts EOS.
    """

    logits: Tensor  # (B, T, V)
    targets: Tensor  # (B, T) int64
    response: Tensor  # (B, T) bool: the target is a token of the response
    real: Tensor  # (B, T) bool: of the prompt or the response, not padding


class Batch(NamedTuple):
    """A micro-batch of B pairs. The last three fields are of its whole optimizer step."""

    chosen: Side
    rejected: Side
    lam: float
    nll_weight: Tensor  # (B, T): of -log p(target) in L_SFT, over the chosen rows
    n_pairs: int
    n_tokens: int  # real rows of the chosen sides

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


# ---------------------------------------------------------------------------------------------
# The list of them.


class Project(NamedTuple):
    name: str
    version: str  # of the package, or the commit that was read
    source: str  # repository and path
    computes: str  # in one line, where it differs from the paper's formula


class Implementation(NamedTuple):
    project: Project
    function: Callable
    level: str  # "pairs" or "logits": where it starts
    metric: Callable | None  # (chosen_logps, rejected_logps) -> what is logged as log odds ratio

    @property
    def name(self) -> str:
        return self.project.name


IMPLEMENTATIONS: list[Implementation] = []


def level_of(function: Callable) -> str:
    """A function of one argument, a Batch, starts from "logits"; one of two from "pairs".

    Raises ValueError for any other number of arguments.
    """
    n = len(inspect.signature(function).parameters)
    if n not in (1, 2):
        raise ValueError(f"takes {n} arguments, not (batch) or (chosen_logps, rejected_logps)")
    return ("logits", "pairs")[n - 1]


def implementation(project: Project, metric: Callable | None = None):
    """Adds a row to the tables: the function underneath, as described at the top of this file."""

    def add(function):
        IMPLEMENTATIONS.append(Implementation(project, function, level_of(function), metric))
        return function

    return add


def version_of(package: str) -> str:
    """Its version; where it is missing, its rows fail when they are run, and main() says so."""
    found = importlib.util.find_spec(package)
    return importlib.metadata.version(package) if found else "missing"


# ---------------------------------------------------------------------------------------------
# Parts that several of them share.


def token_logps(s: Side) -> Tensor:
    """log p(target) of every row, (B, T), as a log-softmax gives it."""
    return s.logits.log_softmax(-1).gather(-1, s.targets[..., None])[..., 0]


def mean_over(s: Side, rows: Tensor) -> Tensor:
    """The mean of log p(target) over `rows` (B, T) bool, a number a pair: (B,)."""
    return (token_logps(s) * rows).sum(1) / rows.sum(1)


def and_the_next(rows: Tensor) -> Tensor:
    """`rows` (B, T) and the row after each: what a mask over inputs, not targets, selects.

    Where the last row is selected already, there is none after it.
    """
    return rows | F.pad(rows, (1, 0))[:, :-1]


def as_float32(s: Side) -> Side:
    return s._replace(logits=s.logits.float())


def log_odds_ratio(chosen_logps, rejected_logps, log1mexp):
    """log odds_w - log odds_l, (B,), with somebody's log1mexp(x) = log(1 - e^x)."""
    w, l = chosen_logps, rejected_logps
    return (w - l) - (log1mexp(w) - log1mexp(l))


def log1p_of_exp(x):
    """log(1 - e^x) as log1p(-e^x): -inf, with a gradient of NaN, once e^x rounds to 1."""
    return torch.log1p(-torch.exp(x))


def log_of_1_minus_exp(x):
    """log(1 - e^x) written out: the same, as e^x has been rounded before."""
    return torch.log(1 - torch.exp(x))


def l_or_log1p(chosen_logps, rejected_logps):
    """L_OR by log1p(-e^x) and log sigmoid, as most write it: (B,)."""
    return -F.logsigmoid(log_odds_ratio(chosen_logps, rejected_logps, log1p_of_exp))


# ---------------------------------------------------------------------------------------------
# Ours.

OURS = Project("ours", "this", "orpo.py", "the paper's formula, its limits at certainty included")
OURS_PLAIN = Project(
    "ours, plain path", "this", "orpo.py", "the same by a log-softmax and autograd: the definition"
)


# train.py logs the mean log sigmoid under TRL's name, knowingly.
@implementation(OURS, metric=lambda w, l: -orpo.odds_ratio_loss(w, l).mean())
def ours_pairs(chosen_logps, rejected_logps):
    return orpo.odds_ratio_loss(chosen_logps, rejected_logps)


@implementation(OURS)
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


@implementation(OURS_PLAIN)
def ours_plain(batch):
    """response_logps and autograd, as a reader would join them: the definition, not the code."""
    w, l = (orpo.response_logps(s.logits, s.targets, s.response) for s in batch[:2])
    logps = batch.chosen.logits.to(w.dtype).log_softmax(-1)
    nll = logps.gather(-1, batch.chosen.targets[..., None])[..., 0] * batch.nll_weight
    return -nll.sum() + batch.lam * orpo.odds_ratio_loss(w, l).sum() / batch.n_pairs


# ---------------------------------------------------------------------------------------------
# TRL and Liger: their code.

TRL = Project(
    "TRL",
    version_of("trl"),
    "huggingface/trl, trl/experimental/orpo/orpo_trainer.py",
    "the formula in float32, the prompt in L_SFT; NaN gradient where e^x rounds to 1",
)
LIGER = Project(
    "Liger",
    version_of("liger_kernel"),
    "linkedin/Liger-Kernel, src/liger_kernel/chunked_loss/orpo_loss.py",
    "the formula, logits in float32, the prompt in L_SFT; NaN gradient where e^x rounds to 1",
)


def trl_trainer(lam: float):
    """TRL's ORPOTrainer with only the attributes that its loss reads: no model, no data."""
    from trl.experimental.orpo import ORPOTrainer

    trainer = ORPOTrainer.__new__(ORPOTrainer)
    trainer.accelerator = SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x)
    trainer.beta, trainer.padding_value = lam, 0
    trainer.is_encoder_decoder = trainer.aux_loss_enabled = False
    return trainer


@implementation(TRL, metric=lambda w, l: trl_trainer(1.0).odds_ratio_loss(w, l)[3])
def trl_pairs(chosen_logps, rejected_logps):
    return -trl_trainer(1.0).odds_ratio_loss(chosen_logps, rejected_logps)[0]


@implementation(TRL)
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


@implementation(LIGER, metric=lambda w, l: liger_terms(w, l)[3])
def liger_pairs(chosen_logps, rejected_logps):
    return liger_terms(chosen_logps, rejected_logps)[0]


@implementation(LIGER)
def liger(batch):
    """LigerFusedLinearORPOLoss with the SFT labels that a TRL user would hand it: all real ones."""
    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

    s = batch.stacked()
    lm_head = torch.eye(s.logits.shape[2], dtype=s.logits.dtype)
    targets, nll = (torch.where(rows, s.targets, -100) for rows in (s.response, s.real))
    fused = LigerFusedLinearORPOLoss(beta=batch.lam, compiled=False)
    return fused(lm_head, s.logits, targets, nll_target=nll)[0]


# ---------------------------------------------------------------------------------------------
# LLaMA-Factory. The logits in float32, log P the mean over the response, L_SFT = -log P.

LLAMA_FACTORY = Project(
    "LLaMA-Factory",
    "0005269",
    "hiyouga/LLaMA-Factory, src/llamafactory/train/dpo/trainer.py",
    "the formula, logits in float32; NaN gradient where e^x rounds to 1",
)


@implementation(LLAMA_FACTORY)
def llama_factory_pairs(chosen_logps, rejected_logps):
    return l_or_log1p(chosen_logps, rejected_logps)


@implementation(LLAMA_FACTORY)
def llama_factory(batch):
    w, l = (mean_over(as_float32(s), s.response) for s in batch[:2])
    return (-w + batch.lam * llama_factory_pairs(w, l)).mean()


# ---------------------------------------------------------------------------------------------
# The authors, as public with the paper and as of their last commit. Log-probabilities are turned
# into float64, the loss into bfloat16. Their mask, the difference of two masks shifted against
# each other, also holds the row after the response, whose target is the first padding.

AUTHORS = "xfactlab/orpo, src/orpo_trainer.py"
AUTHORS_FIRST = Project(
    "authors, first",
    "2024-03",
    AUTHORS,
    "m + 1 terms in log P; L_SFT over padding too; the loss in bfloat16",
)
AUTHORS_LAST = Project(
    "authors, last",
    "208d2d6",
    AUTHORS,
    "m + 1 terms in log P; L_SFT without EOS; the loss in bfloat16",
)


def authors_logps(s: Side):
    return mean_over(s, and_the_next(s.response)).double()


def authors_l_or(chosen_logps, rejected_logps, log1mexp):
    w, l = chosen_logps.double(), rejected_logps.double()
    return -torch.log(torch.sigmoid(log_odds_ratio(w, l, log1mexp)))


# wandb's "Log Odds Ratio" is the mean of log(sigmoid(.)).
@implementation(AUTHORS_FIRST, metric=lambda w, l: -authors_first_pairs(w, l).mean())
def authors_first_pairs(chosen_logps, rejected_logps):
    return authors_l_or(chosen_logps, rejected_logps, log_of_1_minus_exp)


@implementation(AUTHORS_LAST, metric=lambda w, l: -authors_last_pairs(w, l).mean())
def authors_last_pairs(chosen_logps, rejected_logps):
    return authors_l_or(chosen_logps, rejected_logps, log1p_of_exp)


def nll_of_padded_rows(s: Side) -> Tensor:
    """The mean of -log p over every row of each padded pair, (B,): padding counts as tokens."""
    return F.cross_entropy(s.logits.mT, s.targets, reduction="none").mean(1)


@implementation(AUTHORS_FIRST)
def authors_first(batch):
    w, l = map(authors_logps, batch[:2])
    loss = nll_of_padded_rows(batch.chosen) + batch.lam * authors_first_pairs(w, l)
    return loss.mean().bfloat16()


@implementation(AUTHORS_LAST)
def authors_last(batch):
    """L_SFT: transformers' mean over the labels that are not pad. Pad is EOS, so EOS is not one."""
    s = batch.chosen
    eos = s.response & ~F.pad(s.response, (0, 1))[:, 1:]
    labels = torch.where(s.real & ~eos, s.targets, -100)
    nll = F.cross_entropy(s.logits.float().mT, labels)
    w, l = map(authors_logps, batch[:2])
    return (nll + batch.lam * authors_last_pairs(w, l)).mean().bfloat16()


# ---------------------------------------------------------------------------------------------
# axolotl: AxolotlTrainer.orpo_compute_loss, taken from the authors' first version in March 2024
# without its float64. Since pull request 1551 (April 2024) `rl: orpo` trains with TRL's trainer;
# orpo_compute_loss still runs for training arguments with orpo_alpha. Pull request 3910, which
# would have changed it, was closed without a merge.

AXOLOTL = Project(
    "axolotl, orpo_compute_loss",
    "000724e",
    "axolotl-ai-cloud/axolotl, src/axolotl/core/trainers/base.py",
    "m + 1 terms in log P; L_SFT over padding too; the loss in bfloat16",
)


@implementation(AXOLOTL, metric=lambda w, l: -axolotl_pairs(w, l).mean())
def axolotl_pairs(chosen_logps, rejected_logps):
    ratio = log_odds_ratio(chosen_logps, rejected_logps, log_of_1_minus_exp)
    return -torch.log(torch.sigmoid(ratio))


@implementation(AXOLOTL)
def axolotl(batch):
    w, l = (mean_over(s, and_the_next(s.response)) for s in batch[:2])
    loss = nll_of_padded_rows(batch.chosen) + batch.lam * axolotl_pairs(w, l)
    return loss.mean().bfloat16()


# ---------------------------------------------------------------------------------------------
# tunix. At 51ad966 compute_logps returns sums over the response. Pull request 1574 (June 2026)
# divides them by the lengths, by default, and keeps log P below -1e-7; the SFT term then covers the
# prompt too, a mean over the tokens of each pair. (It was read in a copy without its commit.)

TUNIX = Project(
    "tunix",
    "51ad966",
    "google/tunix, tunix/sft/dpo/dpo_trainer.py",
    "odds of the product of the token probabilities, not of their geometric mean",
)
TUNIX_1574 = Project(
    "tunix, after #1574",
    "#1574",
    TUNIX.source,
    "the formula, the prompt in L_SFT, a mean per pair; no gradient of L_OR above log P = -1e-7",
)


@implementation(TUNIX)
def tunix(batch):
    w, l = ((token_logps(s) * s.response).sum(1) for s in batch[:2])
    nll = -w / batch.chosen.response.sum(1)
    return (nll + batch.lam * l_or_log1p(w, l)).mean()


@implementation(TUNIX_1574)
def tunix_1574_pairs(chosen_logps, rejected_logps):
    return l_or_log1p(chosen_logps.clamp(max=-1e-7), rejected_logps.clamp(max=-1e-7))


@implementation(TUNIX_1574)
def tunix_1574(batch):
    w, l = (mean_over(s, s.response) for s in batch[:2])
    nll = -mean_over(batch.chosen, batch.chosen.real)
    return (nll + batch.lam * tunix_1574_pairs(w, l)).mean()


# ---------------------------------------------------------------------------------------------
# mlx-lm-lora. At a65a3f1 the model ran outside of the function that is differentiated, so
# every gradient was 0, and the loss was -beta * log sigmoid(log P_w - log P_l), with the prompt in
# log P. Its issues 65, 67 and 68 (gradient, odds, SFT), 79 (prompt) and 80 (mask) were closed with
# pull requests 66, 86 and 88. In bb30d98 a row counts only if its input is of the response too, so
# the first token of each response is left out.

MLX_LM_LORA = Project(
    "mlx-lm-lora",
    "a65a3f1",
    "Goekdeniz-Guelmez/mlx-lm-lora, mlx_lm_lora/trainer/orpo_trainer.py",
    "no odds and no SFT term; the prompt in log P; the gradient never reaches the model",
)
MLX_LM_LORA_FIXED = Project(
    "mlx-lm-lora, after #88",
    "bb30d98",
    MLX_LM_LORA.source,
    "the formula without the first token of a response; no gradient of L_OR above log P = -1e-7",
)


@implementation(MLX_LM_LORA)
def mlx_lm_lora_pairs(chosen_logps, rejected_logps):
    return -F.logsigmoid(chosen_logps - rejected_logps)


@implementation(MLX_LM_LORA)
def mlx_lm_lora(batch):
    # train_orpo's step computes log P before nn.value_and_grad: to its loss it is a constant.
    w, l = (mean_over(s, and_the_next(s.real)).detach() for s in batch[:2])
    return batch.lam * mlx_lm_lora_pairs(w, l).mean()


def log1mexp_below(x, limit: float):
    """log(1 - e^x) of min(x, limit) in two branches, both finite there: no NaN arises."""
    x = x.clamp(max=limit)
    return torch.where(x > -LN2, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


@implementation(MLX_LM_LORA_FIXED)
def mlx_lm_lora_fixed_pairs(chosen_logps, rejected_logps):
    ratio = log_odds_ratio(chosen_logps, rejected_logps, lambda x: log1mexp_below(x, -1e-7))
    return -F.logsigmoid(ratio)


@implementation(MLX_LM_LORA_FIXED)
def mlx_lm_lora_fixed(batch):
    """A response of one token has no row left, and log P = 0."""
    means = []
    for s in batch[:2]:
        rows = s.response & F.pad(s.response, (1, 0))[:, :-1]
        logps = token_logps(s).clamp(-1000, 0) * rows
        means.append(logps.sum(1) / rows.sum(1).clamp(min=1))
    w, l = means
    return (-w + batch.lam * mlx_lm_lora_fixed_pairs(w, l)).mean()


# ---------------------------------------------------------------------------------------------
# mlx-vlm. By default (train_on_completions=False) the prompt is in log P, and the row after the
# response too; L_SFT is -log P. The floor of -1e-8 has no effect in float32, where e^-1e-8 is 1.

MLX_VLM = Project(
    "mlx-vlm",
    "0746dab",
    "Blaizzy/mlx-vlm, mlx_vlm/trainer/orpo_trainer.py",
    "odds of the mean over prompt, response and one padding",
)


@implementation(MLX_VLM)
def mlx_vlm_pairs(chosen_logps, rejected_logps):
    return l_or_log1p(chosen_logps.clamp(max=-1e-8), rejected_logps.clamp(max=-1e-8))


@implementation(MLX_VLM)
def mlx_vlm(batch):
    w, l = (mean_over(as_float32(s), and_the_next(s.real)) for s in batch[:2])
    return (-w.clamp(max=-1e-8) + batch.lam * mlx_vlm_pairs(w, l)).mean()


# ---------------------------------------------------------------------------------------------
# unsloth on MLX (_orpo_scores and _orpo_log_odds). On CUDA unsloth trains with TRL's code. L_SFT is
# over prompt and response, normalised by the tokens of the whole step.

UNSLOTH = Project(
    "unsloth, MLX",
    "0570e8e",
    "unslothai/unsloth-zoo, unsloth_zoo/mlx/preference.py",
    "the formula in float32, the prompt in L_SFT, with 1 - P kept at 1e-12 or above",
)


@implementation(UNSLOTH, metric=lambda w, l: -unsloth_pairs(w, l).mean())
def unsloth_pairs(chosen_logps, rejected_logps):
    def log1mexp(x):
        return torch.log((-torch.expm1(x)).clamp(min=1e-12))

    w, l = chosen_logps.float(), rejected_logps.float()
    return -F.logsigmoid(log_odds_ratio(w, l, log1mexp))


@implementation(UNSLOTH)
def unsloth(batch):
    w, l = (mean_over(s, s.response) for s in batch[:2])
    nll = -(token_logps(batch.chosen) * batch.chosen.real).sum() / batch.n_tokens
    return nll + batch.lam * unsloth_pairs(w, l).sum() / batch.n_pairs


# ---------------------------------------------------------------------------------------------
# The RLHF book. Before pull request 243 (February 2026) log P was a sum over the response.

RLHF_BOOK = Project(
    "RLHF book",
    "09076e5",
    "natolambert/rlhf-book, code/direct_alignment/loss.py and train.py",
    "the formula in float32; no gradient of L_OR above log P = -1e-6",
)


@implementation(RLHF_BOOK, metric=lambda w, l: rlhf_book_log_odds(w, l).mean())
def rlhf_book_pairs(chosen_logps, rejected_logps):
    return -F.logsigmoid(rlhf_book_log_odds(chosen_logps, rejected_logps))


def rlhf_book_log_odds(chosen_logps, rejected_logps):
    w, l = (x.float().clamp(max=-1e-6) for x in (chosen_logps, rejected_logps))
    return log_odds_ratio(w, l, lambda x: log1mexp_below(x, -1e-6))


@implementation(RLHF_BOOK)
def rlhf_book(batch):
    w, l = (mean_over(s, s.response) for s in batch[:2])
    return (-w + batch.lam * rlhf_book_pairs(w, l)).mean()


# ---------------------------------------------------------------------------------------------
# ColossalAI (loss.py at e07e3e6, trainer/orpo.py at 39e2597). The log odds are of each token, their
# mean is over the tokens of all chosen (or rejected) responses of the micro-batch, and there is one
# log sigmoid of the difference. L_SFT is the model's own loss over the padded chosen sequences.
# Pull request 6407, which would have taken out 1.0001, was closed without a merge.

COLOSSAL_AI = Project(
    "ColossalAI",
    "e07e3e6",
    "hpcaitech/ColossalAI, applications/ColossalChat/coati/models/loss.py, trainer/orpo.py",
    "the mean of per-token log odds over the micro-batch, with 1.0001 - p; L_SFT over padding too",
)


def colossal_ai_log_odds(logps):
    return logps - torch.log(1.0001 - torch.exp(logps))


def colossal_ai_l_or(chosen_log_odds, rejected_log_odds):
    return -torch.log(torch.sigmoid(chosen_log_odds - rejected_log_odds)).bfloat16()


def colossal_ai_metric(chosen_logps, rejected_logps):
    w, l = map(colossal_ai_log_odds, (chosen_logps, rejected_logps))
    return (w - l).mean()


@implementation(COLOSSAL_AI, metric=colossal_ai_metric)
def colossal_ai_pairs(chosen_logps, rejected_logps):
    """Responses of one token each, a micro-batch a pair: then its odds are those of log P."""
    w, l = (colossal_ai_log_odds(x.float()) for x in (chosen_logps, rejected_logps))
    return colossal_ai_l_or(w, l)


@implementation(COLOSSAL_AI)
def colossal_ai(batch):
    w, l = map(as_float32, batch[:2])
    odds = [(colossal_ai_log_odds(token_logps(s)) * s.response).sum() for s in (w, l)]
    means = [x / s.response.sum() for x, s in zip(odds, (w, l), strict=True)]
    nll = F.cross_entropy(w.logits.mT, w.targets)
    return nll + batch.lam * colossal_ai_l_or(*means)
