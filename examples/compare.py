"""SFT, SFT then DPO, ORPO, and ORPO by probability ratio: the same base model, pairs and updates.

    python examples/compare.py                             the built-in task, into examples/compare/
    python examples/compare.py --real MODEL PAIRS.jsonl --out OUT --report FOLDER         your own

Every method has the same code path: a packed forward pass, the log-probability of each response,
a loss of a few lines (`LOSSES`), one AdamW step. It gets the same pairs in the same order and the
same number of updates; SFT then DPO divides them, half to each phase, each with its own warm-up
and decay. The learning rate is chosen among the same values for each method, on one seed, by
training pairs that are held out for that alone (of SFT then DPO it is the second phase's; the first
has SFT's best). Then three seeds, with all pairs. What is reported is of the held-out questions,
and those chose nothing.

The answers of a built-in pair are in two manners, and the chosen one is only the better of them,
so that SFT, which sees nothing else, imitates what is seldom good.

DPO and the probability ratio are here to stand beside the real objective, and nowhere else. A
finished run is a file in OUT/runs, so an interrupted comparison goes on where it stopped; remove
OUT to start again, after a change of the code for instance. Two processes run side by side, with a
thread each. Needs matplotlib (requirements-dev.txt).
"""

import argparse
import concurrent.futures
import copy
import functools
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # two runs side by side are faster than two threads in one

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "bench")]

import compare_measures as measures  # noqa: E402
from compare_report import DPO, ONCE, ORPO, RATIO, SFT, write_report  # noqa: E402

import data  # noqa: E402
import train  # noqa: E402
from data import Batch, Pair  # noqa: E402
from model import Segments, Transformer  # noqa: E402
from orpo import orpo_loss  # noqa: E402

DPO_BETA, RATIO_BETA = 0.1, 1.0
EVAL_EVERY = 10

# ---------------------------------------------------------------------------------------------
# The objectives.


class Logps(NamedTuple):
    """Log-probabilities of B pairs, each (B,): sums over a response's tokens, and means."""

    chosen_sum: Tensor
    rejected_sum: Tensor
    chosen: Tensor
    rejected: Tensor  # NaN where only the chosen branch ran


def dpo_loss(policy: Logps, reference: Logps, beta: float = DPO_BETA) -> Tensor:
    """-log sigmoid(beta ((log p_w - log p_l) - (the same of the reference))), of sums. A scalar."""
    margin = policy.chosen_sum - policy.rejected_sum
    margin = margin - (reference.chosen_sum - reference.rejected_sum)
    return -F.logsigmoid(beta * margin).mean()


def ratio_loss(chosen: Tensor, rejected: Tensor, lam: float, beta: float = RATIO_BETA) -> Tensor:
    """L_SFT - lam log sigmoid(beta (log P_w - log P_l)): ORPO, but for the 1 - P in the odds."""
    return -chosen.mean() - lam * F.logsigmoid(beta * (chosen - rejected)).mean()


LOSSES = {  # of this batch's Logps x, and the reference's
    SFT: lambda x, reference: -x.chosen.mean(),
    DPO: lambda x, reference: dpo_loss(x, reference),
    ORPO[0.1]: lambda x, reference: orpo_loss(x.chosen, x.rejected, 0.1),
    ORPO[0.5]: lambda x, reference: orpo_loss(x.chosen, x.rejected, 0.5),
    ORPO[1.0]: lambda x, reference: orpo_loss(x.chosen, x.rejected, 1.0),
    RATIO: lambda x, reference: ratio_loss(x.chosen, x.rejected, 0.5),
}


def pack(pairs: list[Pair], chosen_only: bool) -> Batch:
    """The pairs as one micro-batch; chosen_only leaves the rejected branch out, as SFT does."""
    (batch,) = data.micro_batches(pairs, sys.maxsize, "response")
    if not chosen_only:
        return batch
    runs = [[True] * (p + c) + [False] * r for p, c, r in (pair.lengths for pair in pairs)]
    token = torch.tensor(list(itertools.chain(*runs)))
    row = batch.response % 2 == 0
    return batch._replace(
        q_lens=batch.q_lens[0::2],
        k_lens=batch.k_lens[0::2],
        key_index=torch.arange(int(token.sum())),
        tokens=batch.tokens[token],
        positions=batch.positions[token],
        predict=(token.cumsum(0) - 1)[batch.predict[row]],
        targets=batch.targets[row],
        response=batch.response[row],
    )


def logps(model: Transformer, batch: Batch) -> Logps:
    segments = Segments.of(batch.q_lens, batch.k_lens, batch.key_index)
    hidden = model.hidden_states(batch.tokens, batch.positions, segments)  # (N, D)
    hidden, lm_head = model.projection(hidden.index_select(0, batch.predict))  # (P, D), (V, D)
    tokens = torch.log_softmax(hidden @ lm_head.t(), -1).gather(1, batch.targets[:, None])  # (P, 1)
    sums = torch.zeros(len(batch.response_lengths)).index_add(0, batch.response, tokens.squeeze(1))
    lengths = torch.bincount(batch.response, minlength=len(sums))
    means = sums / lengths
    return Logps(sums[0::2], sums[1::2], means[0::2], means[1::2])


def update(method: str, model, reference, optimizer, pairs: list[Pair]):
    batch = pack(pairs, chosen_only=method == SFT)
    with torch.no_grad():  # first, while the policy has nothing yet to keep for its backward pass
        frozen = reference(batch) if reference else None
    LOSSES[method](logps(model, batch), frozen).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


# ---------------------------------------------------------------------------------------------
# A run.


class Task(NamedTuple):
    model: str
    train: str
    held_out: str
    checked: bool  # rows list the answers they accept (of a training row, the chosen one is)
    methods: list[str]
    lrs: list[float]
    seeds: list[int]
    steps: int
    batch_size: int
    n_asked: int  # held-out questions that are answered, K times each
    max_new: int


BASE = "base model"


class Job(NamedTuple):
    method: str
    lr: float
    sft_lr: float | None  # of DPO's first phase
    seed: int
    sweep: bool


def phases(job: Job, steps: int) -> list[tuple[str, int, float]]:
    """(loss, updates, peak learning rate) of each phase."""
    if job.method == BASE:
        return []
    if job.method == DPO:
        return [(SFT, steps // 2, job.sft_lr), (DPO, steps - steps // 2, job.lr)]
    return [(job.method, steps, job.lr)]


def load(task: Task):
    """The base model, its tokenizer, and (pairs, rows) of training and of the held-out set."""
    model = Transformer.from_pretrained(task.model, dtype=torch.float32)
    tokenizer, length = data.load_tokenizer(task.model), model.config.max_seq_len
    files = task.train, task.held_out
    rows = (data.load_preferences(file) for file in files)
    sets = []
    for some in rows:
        pairs, _ = data.encode_rows(tokenizer, some, length, length)
        row_at = {row.where: row for row in some}
        sets.append((pairs, [row_at[pair.where] for pair in pairs]))
    return model, tokenizer, *sets


def text_of(answer: str | list[dict]) -> str:
    """What an answer says, be it a string or a message."""
    return answer.strip() if isinstance(answer, str) else answer[0]["content"]


def without(pairs: list[Pair], rows: list, every: int = 8):
    """Training pairs without those of each eighth right answer, and these: two (pairs, rows).

    By answer and not by prompt: a fact that is asked about in other words is no new fact.
    """
    right = [row.accept[0] if row.accept else text_of(row.chosen) for row in rows]
    number = {answer: i for i, answer in enumerate(dict.fromkeys(right))}
    apart = [number[answer] % every == 0 for answer in right]
    both = list(zip(pairs, rows, strict=True))
    parts = ([x for x, a in zip(both, apart, strict=True) if a == side] for side in (False, True))
    return tuple(tuple(map(list, zip(*part, strict=True))) for part in parts)


@torch.no_grad()
def held_out_logps(model, pairs: list[Pair], near: list[bool]) -> dict[str, float]:
    """Means over the held-out pairs; near: those whose rejected answer begins like the chosen."""
    x = logps(model, pack(pairs, chosen_only=False))
    row = {"chosen": x.chosen, "rejected": x.rejected, "margin": x.chosen - x.rejected}
    row |= {"near": x.rejected[torch.tensor(near)], "accuracy": (x.chosen > x.rejected).float()}
    return {name: round(values.mean().item(), 5) for name, values in row.items()}


def centre(base: Transformer, tokenizer, rows: list) -> Tensor:
    """(D,): the mean embedding of the held-out pairs' own answers, the same for every method.

    What all answers share makes every cosine large: less this, they tell answers apart.
    """
    own = [text_of(answer) for row in rows for answer in (row.chosen, row.rejected)]
    return measures.embed(base, tokenizer, own).mean(0)


def fit(job: Job, task: Task, model: Transformer, pairs: list[Pair], watch):
    """Trains the model; calls watch(step) after each update; returns what the loss refers to."""
    done, reference = 0, None
    for method, n, lr in phases(job, task.steps):
        config = train.TrainConfig(lr=lr, batch_size=task.batch_size, seed=job.seed)
        optimizer = train.make_optimizer(model, config)
        if method == DPO:  # the model that SFT has made stays as it is beside the one that goes on
            reference = functools.partial(logps, copy.deepcopy(model))
        for step in range(1, n + 1):
            for group in optimizer.param_groups:
                group["lr"] = train.lr_at(step, n, config)
            members = train.step_pairs(pairs, done + step, config)
            update(method, model, reference, optimizer, members)
            watch(done + step)
        done += n
    return reference


def run(job: Job, task: Task) -> dict:
    """Trains and measures; of a sweep's run little but its score."""
    torch.set_num_threads(1)
    train.keep_freed_memory()
    start = time.perf_counter()
    base, tokenizer, (pairs, rows), (held_out, held_out_rows) = load(task)
    if job.sweep:
        (pairs, rows), (apart, apart_rows) = without(pairs, rows)
    both = [(text_of(row.chosen), text_of(row.rejected)) for row in held_out_rows]
    near = [rejected[: (n := len(chosen) // 2)] == chosen[:n] for chosen, rejected in both]
    model, curve = copy.deepcopy(base), []

    def watch(step: int):
        if step in (0, task.steps) or (step % EVAL_EVERY == 0 and not job.sweep):
            curve.append({"step": step} | held_out_logps(model, held_out, near))

    watch(0)
    reference = fit(job, task, model, pairs, watch)
    result = {"curve": curve}
    if job.sweep and task.checked:
        texts = measures.sample(model, tokenizer, apart, 1, task.max_new, job.seed)
        hits = measures.hits(texts, apart_rows)
        result["score"] = statistics.mean(itertools.chain(*hits))
    elif job.sweep:  # as the paper chooses: by the method's own evaluation loss
        with torch.no_grad():
            batch = pack(apart, chosen_only=False)
            frozen = reference(batch) if reference else None
            result["score"] = -LOSSES[job.method](logps(model, batch), frozen).item()
    else:
        asked, asked_rows = held_out[: task.n_asked], held_out_rows[: task.n_asked]
        texts = measures.sample(model, tokenizer, asked, measures.K, task.max_new, job.seed)
        if task.checked:
            result["sampled"] = measures.hits(texts, asked_rows)
            greedy = measures.sample(model, tokenizer, asked, 0, task.max_new, job.seed)
            result["greedy"] = measures.hits(greedy, asked_rows)
        x = measures.embed(base, tokenizer, list(itertools.chain(*texts)))
        result["PID raw"], result["AID raw"] = measures.diversity(x)
        x = x - centre(base, tokenizer, held_out_rows)
        result["PID"], result["AID"] = measures.diversity(x)
        result["answers"] = [t[:2] for t in texts[:3]]
    return result | {"seconds": time.perf_counter() - start}


def cost(name: str, task: Task, n_steps: int) -> dict:
    """What a step of a method costs, in a process that does nothing else."""
    torch.set_num_threads(1)
    method, holders, reference = DPO if name == ONCE else name, [], None
    model, _, (pairs, _), _ = load(task)
    imported = measures.resident()
    config = train.TrainConfig(lr=1e-4, batch_size=task.batch_size)
    optimizer = train.make_optimizer(model, config)
    steps = [train.step_pairs(pairs, 1 + i, config) for i in range(n_steps + 4)]
    frozen = Transformer.from_pretrained(task.model, dtype=torch.float32) if method == DPO else None
    counts = [measures.count_forward(x) for x in (model, frozen) if x]
    if method == DPO:
        holders, reference = [frozen], functools.partial(logps, frozen)
    if name == ONCE:
        with torch.no_grad():
            known = iter([reference(pack(members, chosen_only=False)) for members in steps])
        holders, reference, frozen = [], lambda batch: next(known), None
    once = sum(x["responses"] for x in counts) / sum(map(len, steps))

    def step():
        update(method, model, reference, optimizer, steps.pop())

    for _ in range(3):
        step()
    grown = measures.resident() - imported
    tensors = measures.peak_of_tensors(step, model, optimizer, *holders)
    train.keep_freed_memory()
    for x in counts:
        x |= dict.fromkeys(x, 0)
    n_pairs = sum(map(len, steps))
    seconds, cpu_seconds = zip(*(measures.seconds_of(step) for _ in range(n_steps)), strict=True)
    passes, tokens = (sum(x[key] for x in counts) / n_pairs for key in ("responses", "tokens"))
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "responses": passes,  # forward passes a pair, in every step
        "once": once,  # and before the first
        "tokens": tokens,
        "tensor_bytes": tensors,
        "process_bytes": grown,
        "weight_bytes": sum(4 * p.numel() for p in model.parameters()),
    }


# ---------------------------------------------------------------------------------------------
# The comparison.


def pool(n: int, **options):
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(n, mp_context=context, **options)


def kept(file: Path, key, make, *arguments) -> dict:
    """make(*arguments), from the file where an earlier call with the same key has left it."""
    key = json.loads(json.dumps(key))
    if file.is_file() and (old := json.loads(file.read_text())).pop("key") == key:
        return old
    result = make(*arguments)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(result | {"key": key}))
    os.replace(temporary, file)
    return result


def file_name(*parts) -> str:
    return "-".join(map(str, parts)).replace(" ", "").replace(",", "") + ".json"


def run_all(jobs: list[Job], task: Task, out: Path, workers) -> dict[Job, dict]:
    """The jobs, as many at a time as there are workers; a finished one is read from its file."""
    settings = task._replace(methods=[], lrs=[], seeds=[])  # a run knows nothing of the others
    futures = {}
    for job in jobs:
        file = out / "runs" / file_name(*job)
        futures[workers.submit(kept, file, [job, settings], run, job, task)] = job
    results = {}
    for i, future in enumerate(concurrent.futures.as_completed(futures), 1):
        job, result = futures[future], future.result()
        results[job] = result
        score = f"score {result['score']:.3f}" if job.sweep else f"seed {job.seed}"
        end = "log P chosen {chosen:.3f} rejected {rejected:.3f}".format(**result["curve"][-1])
        print(f"[{i}/{len(jobs)}] {job.method}, lr {job.lr:g}: {score}, {end}", flush=True)
    return results


def sweep(task: Task, out: Path, workers) -> dict[str, dict[float, dict]]:
    """{method: {lr: run}}, of the first seed. DPO comes after SFT, whose best rate it needs."""
    first, seed = [m for m in task.methods if m != DPO], task.seeds[0]
    runs = run_all(
        [Job(m, lr, None, seed, True) for m in first for lr in task.lrs], task, out, workers
    )
    by_lr = {m: {lr: runs[Job(m, lr, None, seed, True)] for lr in task.lrs} for m in first}
    sft_lr = best(by_lr[SFT])
    runs = run_all([Job(DPO, lr, sft_lr, seed, True) for lr in task.lrs], task, out, workers)
    by_lr[DPO] = {lr: runs[Job(DPO, lr, sft_lr, seed, True)] for lr in task.lrs}
    return {m: by_lr[m] for m in task.methods}


def best(by_lr: dict[float, dict]) -> float:
    """The learning rate with the highest score; of equals the smallest."""
    return max(sorted(by_lr), key=lambda lr: by_lr[lr]["score"])


def compare(task: Task, out: Path, rounds: int = 3) -> dict:
    """All runs, and the figures that `compare_report` judges."""
    start, clock, n_files = time.perf_counter(), out / "seconds.txt", len(list(out.rglob("*.json")))
    with pool(2) as workers:
        swept = sweep(task, out, workers)
        lrs = {m: best(by_lr) for m, by_lr in swept.items()}
        jobs = {
            m: [Job(m, lr, lrs[SFT] if m == DPO else None, seed, False) for seed in task.seeds]
            for m, lr in ({BASE: 0.0} | lrs).items()
        }
        final = run_all(list(itertools.chain(*jobs.values())), task, out, workers)
    costs = {name: [] for name in (SFT, ORPO[0.5], RATIO, DPO, ONCE)}
    n_steps = min(20, task.steps)
    with pool(1, max_tasks_per_child=1) as worker:  # nothing beside it, a fresh process each
        for i, name in itertools.product(range(rounds), costs):
            file, key = out / "costs" / file_name(name, i), [name, task.model, task.train, n_steps]
            measured = functools.partial(worker.submit, cost, name, task, n_steps)
            costs[name].append(kept(file, key, lambda submit=measured: submit().result()))
            ms = 1000 * statistics.median(costs[name][-1]["seconds"])
            print(f"cost of {name}: {ms:.0f} ms a step", flush=True)
    base, tokenizer, _, (_, rows) = load(task)
    chosen = measures.embed(base, tokenizer, [text_of(row.chosen) for row in rows[: task.n_asked]])
    of_chosen = {"AID": measures.similarity(chosen - centre(base, tokenizer, rows))}
    of_chosen["AID raw"] = measures.similarity(chosen)
    spent = float(clock.read_text()) if clock.is_file() else 0.0  # by interrupted calls
    if len(list(out.rglob("*.json"))) > n_files:
        spent += time.perf_counter() - start
        clock.write_text(str(spent))
    every = [*final.values(), *(r for by_lr in swept.values() for r in by_lr.values())]
    machine = {"cpu": measures.cpu_name(), "cores": os.cpu_count(), "torch": torch.__version__}
    machine |= {"python": platform.python_version(), "date": date.today().isoformat()}
    machine["command"] = " ".join(["python", "examples/compare.py", *sys.argv[1:]])
    return {
        "task": task._asdict(),
        "dpo_beta": DPO_BETA,
        "ratio_beta": RATIO_BETA,
        "k": measures.K,
        "sweep": {m: {f"{lr:g}": r for lr, r in by_lr.items()} for m, by_lr in swept.items()},
        "lr": lrs,
        "runs": {m: [final[job] for job in jobs[m]] for m in jobs},
        "chosen answers": of_chosen,
        "cost": costs,
        "seconds": {
            "by the clock": spent,
            "all runs, added up": sum(r["seconds"] for r in every),
        },
        "machine": machine,
    }


def main(argv=None):
    """Chooses the task that the flags name, compares, and writes the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", nargs=2, type=Path, metavar=("MODEL", "PAIRS"), help="see above")
    parser.add_argument("--out", type=Path, default=Path("out/compare"), help="finished runs")
    parser.add_argument("--report", type=Path, default=HERE / "compare", help="tables and figures")
    args = parser.parse_args(argv)
    facts = HERE / "facts"
    files = facts / "base", facts / "train.jsonl", facts / "eval.jsonl"
    sizes = {"lrs": [1e-5, 3e-5, 1e-4, 3e-4, 1e-3], "seeds": [42, 43, 44], "steps": 180,
             "batch_size": 32, "n_asked": 210, "max_new": 40}  # fmt: skip
    if args.real:
        from tests.peers.politeness import write_split

        files = args.real[0], *write_split(args.real[1], args.out, n_train=900)
        sizes |= {"lrs": [1e-4, 3e-4, 1e-3, 3e-3], "batch_size": 8, "n_asked": 40, "max_new": 64}
    paths = [os.path.relpath(file) for file in files]
    results = compare(Task(*paths, not args.real, list(LOSSES), **sizes), args.out)
    write_report(results, args.report)


if __name__ == "__main__":
    main()
