"""What `compare.py` measures of a trained model's answers, and of the cost of a step."""

import functools
import itertools
import resource
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._tools.mem_tracker import MemTracker  # no public interface: torch is pinned

import train
from model import Segments, Transformer

K = 5  # answers sampled to a question, as in the paper's Sec. 6.4


def sample(model, tokenizer, pairs: list, k: int, max_new: int, seed: int) -> list[list[str]]:
    """k answers to each pair's prompt at temperature 1; where k is 0, the greedy one."""
    options = {"temperature": 1.0, "generator": torch.Generator().manual_seed(seed)} if k else {}
    k = max(k, 1)
    prompts = [pair.prompt for pair in pairs for _ in range(k)]
    texts = train.answers(model, tokenizer, prompts, max_new, **options)
    return [texts[i : i + k] for i in range(0, len(texts), k)]


def hits(texts: list[list[str]], rows: list) -> list[list[bool]]:
    """Which answers are accepted: those that a row lists, or else its chosen one."""
    accept = [row.accept or [row.chosen.strip()] for row in rows]
    return [[text in right for text in t] for t, right in zip(texts, accept, strict=True)]


@torch.no_grad()
def embed(base: Transformer, tokenizer, texts: list[str]) -> Tensor:
    """(n, D): the base model's last hidden states of each answer alone, a mean over its tokens."""
    means = []
    for start in range(0, len(texts), 128):
        ids = [tokenizer.encode(text, continuation=True) for text in texts[start : start + 128]]
        ids = [[tokenizer.bos_id, *x, tokenizer.eos_id] for x in ids]  # EOS: none is empty
        lens = list(map(len, ids))
        positions = torch.cat([torch.arange(n) for n in lens])
        tokens = torch.tensor(list(itertools.chain(*ids)))
        hidden = base.hidden_states(tokens, positions, Segments.of(lens, lens))
        means += [h[1:].mean(0) for h in hidden.split(lens)]
    return torch.stack(means)


def similarity(x: Tensor) -> float:
    """Mean cosine over the pairs of n embeddings (n, D): 2/(n(n-1)) sum_{i<j} cos(h_i, h_j)."""
    total, n = F.normalize(x.double(), dim=-1).sum(0), len(x)
    return ((total @ total - n) / (n * (n - 1))).item()


def diversity(x: Tensor, k: int = K) -> tuple[float, float]:
    """PID and AID (Eq. 14, 15) of embeddings (questions * k, D), the k of a question together."""
    per_input = [similarity(part) for part in x.split(k)]
    return statistics.mean(per_input), similarity(x[::k])


def count_forward(model: Transformer) -> dict[str, int]:
    """Counts what goes through the model from now on: tokens; responses, each with its prompt."""
    hidden_states, counts = model.hidden_states, {"tokens": 0, "responses": 0}

    @functools.wraps(hidden_states)
    def counted(tokens, positions, segments, cache=None):
        counts["tokens"] += len(tokens)
        counts["responses"] += len(segments.lengths)
        return hidden_states(tokens, positions, segments, cache)

    model.hidden_states = counted
    return counts


def resident() -> int:
    """The largest size that this process has had, in bytes (Linux counts in KB)."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def peak_of_tensors(step, *holders) -> int:
    """Bytes of all tensors alive at the peak of a step; of holders (models, optimizers) all are."""
    tracker = MemTracker()
    tracker.track_external(*holders)
    with tracker:
        step()
    (peak,) = (kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values())
    return peak


def seconds_of(step) -> tuple[float, float]:
    """By the clock, and of this process's CPU, which others on the machine disturb less."""
    start, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - start, time.process_time() - cpu


def cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), "unknown CPU")
