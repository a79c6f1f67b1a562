"""The comparisons of docs/evidence.md: compare.py, sentiment.py, and what they share."""

import concurrent.futures
import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import data
import orpo
import train
from model import Transformer

ROOT = Path(data.__file__).resolve().parent
BASE = ROOT / "examples" / "facts" / "base"

from experiments import (
    compare,
    compare_report,
    evidence,
    methods,
    real_model,
    sentiment,
    sentiment_report,
)
from experiments.methods import Logps, Method

needs_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="matplotlib is not installed"
)
TINY = compare.Sizes(2, 4, (1e-3,), (1e-4,), (0.1,), (1,), n_asked=4, k=2, eval_every=1)

# ---------------------------------------------------------------------------------------------
# methods.py


@pytest.fixture(scope="module")
def base_and_pairs():
    model, _, (pairs, _), _ = compare.load(TINY)
    return model, pairs[:4]


def test_dpo_loss_by_hand():
    """beta 0.1; log-ratios 4 - 2 = 2 and (-1) - (-3) = 2 apart by (-3 + 9) - (-5 + 7) = 4:
    -log sigmoid(0.4) = log(1 + e^-0.4) = 0.5130. And ln 2 where policy and reference agree."""

    def sums(chosen: float, rejected: float) -> Logps:
        x = torch.tensor([chosen]), torch.tensor([rejected])
        return Logps(*x, *x)

    policy, reference = sums(-3.0, -9.0), sums(-5.0, -7.0)
    assert Method("DPO", 0.1).loss(policy, reference).item() == pytest.approx(0.5130153)
    assert Method("DPO", 0.1).loss(policy, policy).item() == pytest.approx(math.log(2))


def test_ratio_loss_by_hand():
    """-0.5 chosen, -1.5 rejected: 0.5 + 0.5 * log(1 + e^-1) = 0.5 + 0.5 * 0.313262; and with
    beta 0.2, 0.5 + 0.5 * log(1 + e^-0.2) = 0.5 + 0.5 * 0.598139."""
    pair = torch.tensor([-0.5]), torch.tensor([-1.5])
    found = Method("ratio", 0.5).loss(Logps(*pair, *pair), None)
    assert found.item() == pytest.approx(0.656631, abs=1e-6)
    assert methods.ratio_loss(*pair, lam=0.5, beta=0.2).item() == pytest.approx(0.79907, abs=1e-5)


@pytest.mark.parametrize(("method", "lam"), [(Method("ORPO", 0.5), 0.5), (Method("SFT"), 0.0)])
def test_orpo_is_train_pys_and_the_chosen_branch_alone_is_sfts(base_and_pairs, method, lam):
    """Values and gradients, by the path of the comparisons and by fused_linear_orpo."""
    model, pairs = base_and_pairs
    batch = methods.pack(pairs, chosen_only=method.kind == "SFT")
    ours = method.loss(methods.logps(model, batch), None)
    ours.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    theirs = train.forward(model, methods.pack(pairs), lam)
    theirs.loss.backward()
    torch.testing.assert_close(ours, theirs.loss, rtol=1e-5, atol=1e-6)
    for p, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-3, atol=1e-5)
    model.zero_grad()


@torch.no_grad()
def test_logps_are_those_of_each_sequence_alone(base_and_pairs):
    """By the plain path: sums are the means of orpo.response_logps times the tokens."""
    model, pairs = base_and_pairs
    found = methods.logps_of(model, pairs, at_a_time=3)
    for side in ("chosen", "rejected"):
        for pair, total, mean in zip(
            pairs, getattr(found, f"{side}_sum"), getattr(found, side), strict=True
        ):
            response = getattr(pair, side)
            tokens = torch.tensor([[*pair.prompt, *response]])
            mask = torch.arange(1, tokens.shape[1])[None] >= len(pair.prompt)
            alone = orpo.response_logps(model(tokens[:, :-1]), tokens[:, 1:], mask)
            assert mean.item() == pytest.approx(alone.item(), abs=1e-5)
            assert total.item() == pytest.approx(alone.item() * len(response), abs=1e-4)


# ---------------------------------------------------------------------------------------------
# evidence.py


def test_resampling_is_paired_and_has_the_error_of_a_mean():
    """Of 400 values with standard deviation 2 the mean has the error 2 / sqrt(400) = 0.1; of two
    columns that differ by 3 everywhere the difference has none."""
    x = 2 * torch.randn(400, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    found = evidence.resampled(torch.stack((x, x + 3), 1))
    assert found.shape == (2000, 2)
    torch.testing.assert_close(found[0], torch.stack((x.mean(), x.mean() + 3)))
    assert found[:, 0].std().item() == pytest.approx(0.1, rel=0.15)
    torch.testing.assert_close(found[:, 1] - found[:, 0], torch.full((2000,), 3.0).double())


@pytest.mark.parametrize(
    ("seeds", "noise", "came_out"),
    [
        ([1.0, 1.1, 0.9], 0.1, "yes"),
        ([1.0, 1.1, -0.1], 0.1, "not shown"),  # the interval is above 0, one seed is not
        ([1.0, 1.1, 0.9], 2.0, "not shown"),
        ([-1.0, -1.1, -0.9], 0.1, "no"),
    ],
)
def test_a_verdict_is_yes_no_or_not_shown(seeds, noise, came_out):
    drawn = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    drawn[0] = 0
    x = torch.tensor(seeds).double() + noise * drawn
    assert evidence.verdict([x]) == came_out
    assert evidence.verdict([torch.ones_like(x), x]) == came_out


def test_a_finished_run_is_not_repeated_but_for_another_key(tmp_path):
    file, calls = tmp_path / "runs" / "a.json", []

    def make(x):
        calls.append(x)
        return {"found": x}

    assert evidence.kept(file, ["key", 1], make, 1) == {"found": 1}
    assert evidence.kept(file, ["key", 1], make, 2) == {"found": 1}
    assert evidence.kept(file, ["key", 2], make, 3) == {"found": 3}
    assert calls == [1, 3]


def test_the_page_says_what_the_published_numbers_say():
    page = evidence.PAGE.read_text(encoding="utf-8")
    files = list(evidence.PUBLISHED.glob("*.json"))
    assert files
    for file in files:
        for came_out, figures in json.loads(file.read_text(encoding="utf-8"))["verdicts"].values():
            assert f"| **{came_out}** | {figures} |" in page


def test_a_table_replaces_what_stands_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n")
    evidence.write_into(page, "x", "| new |\n")
    assert page.read_text() == "a\n<!-- x -->\n| new |\n<!-- /x -->\nb\n"
    with pytest.raises(ValueError, match=r"page.md: the marks <!-- y --> and <!-- /y --> are miss"):
        evidence.write_into(page, "y", "")


# ---------------------------------------------------------------------------------------------
# compare.py


@pytest.mark.parametrize("method", [("DPO", 0.1), compare.ORPO])
def test_a_run_trains_and_measures_and_dpo_starts_from_sft(tmp_path, method):
    sft = compare.run(compare.Job(*compare.SFT, 1e-3, 1), TINY, tmp_path)
    assert [row["step"] for row in sft["curve"]] == [0, 1, 2]
    assert sft["curve"][-1]["chosen"] > sft["curve"][0]["chosen"]
    job = compare.Job(*method, 1e-4, 1, sft_lr=1e-3 if method[0] == "DPO" else None)
    found = compare.run(job, TINY, tmp_path)
    assert [len(answers) for answers in found["sampled"]] == [2] * 4
    assert [len(answers) for answers in found["greedy"]] == [1] * 4
    starts = sft["chosen"] if method[0] == "DPO" else None
    if starts:  # two small steps on, it is near the model that SFT has made
        assert found["chosen"] == pytest.approx(starts, abs=0.05)


def test_the_sweep_holds_facts_out_and_not_only_questions():
    _, _, (pairs, facts), _ = compare.load(TINY)
    (kept, kept_facts), (apart, apart_facts) = compare.without(pairs, facts)
    assert len(kept) + len(apart) == len(pairs) and len(apart) > len(pairs) / 10
    assert not set(kept_facts) & set(apart_facts)


def test_flipped_labels_are_as_many_as_asked_for():
    _, _, (pairs, _), _ = compare.load(TINY)
    flipped = compare.flip(pairs, 0.2, seed=1)
    turned = [a.chosen is b.rejected for a, b in zip(flipped, pairs, strict=True)]
    same = [a.chosen is b.chosen for a, b in zip(flipped, pairs, strict=True)]
    assert sum(turned) == round(0.2 * len(pairs)) and sum(same) == len(pairs) - sum(turned)


def made_up_comparison(**of) -> dict:
    """Two facts, three seeds. Every run ends at (chosen, rejected) and with this share of good
    answers, or where `of` says, by kind of method; "noise" is of those with flipped labels."""
    facts = [compare.load_facts()[0], compare.load_facts()[-1]]

    def one(method, flips, jitter):
        ends = {"chosen": -0.5, "rejected": -1.5, "good": 0.5}
        ends |= of.get("noise", {}) if flips else of.get(method[0], {})
        w, l = ends["chosen"] + jitter, ends["rejected"] - jitter
        good = ["good"] * round(4 * ends["good"]) + ["rude"] * (4 - round(4 * ends["good"]))
        curve = [
            {"step": 0, "chosen": -1.0, "rejected": -1.0},
            {"step": 2, "chosen": w, "rejected": l},
        ]
        return {"curve": curve, "chosen": [w] * 4, "rejected": [l] * 4, "seconds": 1.0,
                "greedy": [good] * 4, "sampled": [good] * 4}  # fmt: skip

    dpo = "DPO", 0.1
    chosen = {m: 1e-3 for m in (compare.SFT, compare.ORPO, compare.RATIO, dpo)}
    settings = [(compare.BASE, 0.0, 0.0), *((m, 1e-3, 0.0) for m in chosen)]
    settings += [(m, compare.LR, 0.0) for m in chosen if m != dpo]
    settings += [(m, compare.LR, f) for f in compare.FLIPS for m in (compare.SFT, compare.ORPO)]
    runs = {(m, lr, f): [one(m, f, j) for j in (0.0, 0.01, 0.02)] for m, lr, f in settings}
    return {
        **{"runs": runs, "chosen": chosen, "swept": {m: {1e-3: 0.5} for m in chosen}},
        **{"facts": [facts[0], facts[1], facts[0], facts[1]], "trained on": facts},
        **{"pairs' own": {"chosen": ["good"] * 4, "rejected": ["rude"] * 4}, "machine": {}},
        **{"lr": compare.LR, "sizes": TINY._asdict()},
    }


LOW = {"chosen": -2.0, "rejected": -2.0}
COMPARED = {  # figures on which a claim holds, and on which it does not
    "raises": ({"base model": LOW}, {"base model": {"chosen": -2.0, "rejected": -1.0}}),
    "separates": ({"SFT": {"rejected": -0.7}}, {"SFT": {"rejected": -3.0}}),
    "better": ({"SFT": {"good": 0.25}}, {"SFT": {"good": 0.75}}),
    "ratio": ({"ratio": {"rejected": -3.0}}, {"ratio": {"rejected": -1.5}}),
    "noise": (
        {"SFT": {"good": 0.25}, "noise": {"good": 0.25}},
        {"SFT": {"good": 0.75}, "noise": {"good": 0.25}},
    ),
}


@pytest.mark.parametrize("claim", compare.CLAIMS)
def test_a_verdict_of_the_comparison_can_come_out_either_way(claim):
    yes, no = (
        compare_report.judge(compare_report.Found(made_up_comparison(**of)))[claim][0]
        for of in COMPARED[claim]
    )
    assert (yes, no) == ("yes", "no")


@needs_matplotlib
def test_the_comparisons_report_is_written_with_its_figures(tmp_path):
    compare_report.write_report(made_up_comparison(), compare.CLAIMS, tmp_path)
    text = (tmp_path / "compare.md").read_text()
    assert all(claim in text for claim, *_ in compare.CLAIMS.values())
    assert "| the pairs' chosen answers | 1.00 | 1.00 | 1.00 |" in text
    for name in ("compare.svg", "noise.svg"):
        assert "<svg" in (tmp_path / name).read_text()


# ---------------------------------------------------------------------------------------------
# sentiment.py

SMALL = sentiment.Sizes(12, 8, 4, 2, 2, 4, (1, 2))


@pytest.fixture(scope="module")
def two_models():
    base, other = (Transformer.from_pretrained(BASE, dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.05)
    tokens = torch.randint(3, 1000, (3, sentiment.OPENING + sentiment.CONTINUATION))
    return base, other, tokens


def test_the_kl_of_a_model_to_itself_is_0(two_models):
    base, _, tokens = two_models
    kl, _ = sentiment.kl_and_fluency(base, base, tokens)
    assert kl.tolist() == [0.0] * 3


@torch.no_grad()
def test_the_kl_is_summed_over_the_continuation_alone(two_models):
    """By its definition, position by position: sum_t sum_v p log(p / q)."""
    base, other, tokens = two_models
    kl, fluency = sentiment.kl_and_fluency(other, base, tokens)
    p, q = (torch.log_softmax(m(tokens).double(), -1) for m in (other, base))
    positions = range(sentiment.OPENING, sentiment.OPENING + sentiment.CONTINUATION)
    by_hand = sum((p[:, t - 1].exp() * (p[:, t - 1] - q[:, t - 1])).sum(1) for t in positions)
    torch.testing.assert_close(kl.double(), by_hand, rtol=1e-3, atol=1e-4)
    own = [q[0, t - 1, tokens[0, t]] for t in positions]
    assert fluency[0].item() == pytest.approx(sum(own).item() / len(own), abs=1e-4)
    assert bool((kl > 0.01).all())


def sequence(opening: int, continuation: int) -> list[int]:
    return [opening] * sentiment.OPENING + [continuation] * sentiment.CONTINUATION


def test_the_higher_score_is_chosen_and_ties_and_known_openings_are_dropped():
    sequences = [sequence(1, 10), sequence(1, 11), sequence(2, 12), sequence(2, 13)]
    sequences += [sequence(3, 14), sequence(3, 15), sequence(4, 16), sequence(4, 17)]
    known = {tuple([4] * sentiment.OPENING)}
    pairs = sentiment.order_pairs(sequences, [0.1, 0.9, 0.5, 0.2, 0.3, 0.3, 0, 1], 0.0, 1, known)
    assert [(p.prompt[0], p.chosen[0], p.rejected[0]) for p in pairs] == [(1, 11, 10), (2, 12, 13)]
    assert {p.lengths for p in pairs} == {(24, 48, 48)}


def test_a_tenth_of_the_labels_is_flipped():
    sequences = [sequence(i // 2, i % 2) for i in range(4000)]
    scores = [float(i % 2) for i in range(4000)]
    flipped = sum(p.chosen[0] == 0 for p in sentiment.order_pairs(sequences, scores, 0.1, 1))
    assert flipped == pytest.approx(200, abs=40)  # three standard errors of 2,000 draws


def test_the_experiment_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """The first call is interrupted in its second run; the next one makes that run alone."""
    jobs = [sentiment.Job(*sentiment.BASE, 0.0, 1), sentiment.Job(*sentiment.ORPO, 1e-3, 1)]
    monkeypatch.setattr(sentiment, "all_jobs", lambda: jobs)
    monkeypatch.setattr(sentiment, "SEEDS", (1,))
    monkeypatch.setattr(
        sentiment, "vader", lambda texts: torch.tensor([len(x) / 99 for x in texts])
    )
    once, run = [], sentiment.run

    def interrupted(job, *rest):
        once.append(job)
        if len(once) == 2:
            raise KeyboardInterrupt
        return run(job, *rest)

    monkeypatch.setattr(sentiment, "pool", lambda n: concurrent.futures.ThreadPoolExecutor(1))
    monkeypatch.setattr(sentiment, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sentiment.experiment(str(BASE), tmp_path, SMALL)
    results, _ = sentiment.experiment(str(BASE), tmp_path, SMALL)
    assert once == [jobs[0], jobs[1], jobs[1]]
    steps = [row["step"] for job in jobs for row in results[job]["checkpoints"]]
    assert steps == [0, 1, 2]
    assert results[jobs[1]]["n_pairs"] == SMALL.n_pairs


def made_up_experiment(**of) -> dict:
    """Every run goes from the base model's (KL, score, ...) to its end, or where `of` says, by
    kind and lam ("ORPO 2") or "shuffled"."""
    start = {
        "kl": 0.0,
        "score": 0.3,
        "second": 1.0,
        "fluency": -1.0,
        "chosen": -1.0,
        "rejected": -1.0,
    }
    results = {}
    for job in sentiment.all_jobs():
        name = "shuffled" if job.flipped == sentiment.SHUFFLED else f"{job.kind} {job.weight:g}"
        rows = []
        for step, share in ((40, 0.5), (120, 1.0)) if job.lr else ((0, 0.0),):
            end = {"kl": 4.0, "score": 0.5, "second": 1.5, "chosen": -0.9, "rejected": -1.5}
            end |= of.get(name, {})
            row = {k: x + share * (end.get(k, x) - x) for k, x in start.items()}
            row = {k: [x + 0.001 * job.seed] * 4 for k, x in row.items()}
            row |= {"step": step, "distinct-2": 0.5, "scores": [0.1, 0.2] * 4}
            rows.append(row)
        results[job] = {"checkpoints": rows}
    return results


ORDERED = {"ORPO 0.1": {"kl": 3.0, "score": 0.4}, "ORPO 2": {"kl": 6.0, "score": 0.6}}
EXPERIMENTS = {
    "raises": ({"SFT 0": {"rejected": -0.8}}, {"SFT 0": {"rejected": -1.2}}),
    "separates": ({"SFT 0": {"rejected": -1.2}}, {"SFT 0": {"rejected": -1.8}}),
    "equal KL": ({"SFT 0": {"score": 0.4}}, {"SFT 0": {"score": 0.5, "kl": 2.0}}),
    "second": ({"SFT 0": {"second": 1.2}}, {"SFT 0": {"second": 1.7}}),
    "lam": (ORDERED, ORDERED | {"ORPO 2": {"kl": 6.0, "score": 0.45}}),
    "control": ({"shuffled": {"score": 0.31}}, {"shuffled": {"score": 0.5}}),
    "ends": ({"SFT 0": {"score": 0.4}}, {"SFT 0": {"score": 0.5, "kl": 2.0}}),
    "dpo": ({"DPO 0.1": {"score": 0.4}}, {"DPO 0.1": {"score": 0.9}}),
}


@pytest.mark.parametrize("claim", sentiment.CLAIMS | sentiment.ADDED)
def test_a_verdict_of_the_experiment_can_come_out_either_way(claim):
    yes, no = (
        sentiment_report.judge(sentiment_report.Found(made_up_experiment(**of)))[claim][0]
        for of in EXPERIMENTS[claim]
    )
    assert (yes, no) == ("yes", "no")


def test_scores_at_equal_kl_lie_on_straight_lines_between_checkpoints():
    """One ends at KL 2 with 0.4. The other passes KL 2 halfway from 0.3 to 0.7: with 0.5. Points
    are read in the order of their KL, whatever the order in training."""
    x, y = torch.tensor([[[0.0, 4.0, 1.0]]]), torch.tensor([[[0.3, 0.7, 0.4]]])
    difference, kl = sentiment_report.at_equal_kl(
        (x, y), (torch.tensor([[[0.0, 2.0]]]), torch.tensor([[[0.3, 0.4]]]))
    )
    assert (kl.item(), difference.item()) == (2.0, pytest.approx(0.1))


@needs_matplotlib
def test_the_experiments_report_is_written_with_its_figure(tmp_path):
    claims = sentiment.CLAIMS | sentiment.ADDED
    sentiment_report.write_report(made_up_experiment(), claims, 0.5, {}, tmp_path)
    text = (tmp_path / "sentiment.md").read_text()
    assert all(claim in text for claim, *_ in claims.values())
    assert "<svg" in (tmp_path / "sentiment.svg").read_text()


# ---------------------------------------------------------------------------------------------
# real_model.py


def ends_of(margins: dict[str, float], rejected: dict[str, float]) -> dict:
    """(20, 2): twenty pairs and two seeds a method, with a little spread, about these means."""
    spread = torch.linspace(-0.01, 0.01, 20)[:, None] + torch.tensor([-0.001, 0.001])
    return {
        name: {
            "rejected": rejected[name] + spread,
            "chosen": rejected[name] + margins[name] + 2 * spread,
        }
        for name in margins
    }


def test_the_claims_about_a_real_model_can_come_out_both_ways():
    sft, small, large = real_model.METHODS
    base = {"chosen": torch.full((20, 1), -2.0), "rejected": torch.full((20, 1), -2.0)}
    margins = {sft: -0.1, small: 0.0, large: 0.5}
    good = ends_of(margins, {sft: -1.5, small: -1.6, large: -2.5})
    assert {k: v[0] for k, v in real_model.judge(base, good).items()} == {
        "raises": "yes",
        "separates": "yes",
        "lam": "yes",
        "prefers": "yes",
    }
    margins = {sft: 0.5, small: 0.6, large: -0.5}
    bad = ends_of(margins, {sft: -2.5, small: -2.5, large: -1.5})
    assert {v[0] for v in real_model.judge(base, bad).values()} == {"no"}
    same = ends_of(dict.fromkeys(real_model.METHODS, 0.0), dict.fromkeys(real_model.METHODS, -2.0))
    assert {v[0] for v in real_model.judge(base, same).values()} == {"not shown"}


def test_distinct_2_counts_neighbouring_words():
    assert real_model.distinct_2(["a b a b", "c"]) == 2 / 3
    assert real_model.distinct_2(["one"]) == 0


def test_a_real_model_is_trained_by_every_method_and_kept(shared, tmp_path, monkeypatch):
    """On stories260K, with few pairs; a second call computes nothing."""
    flags = [shared / "stories260K", shared / "alpaca-pairs" / "train.jsonl"]
    flags += [shared / "alpaca-pairs" / "eval.jsonl", "--try", "--out", tmp_path]
    monkeypatch.setattr("sys.argv", ["real_model", *map(str, flags)])
    real_model.main()
    runs = 1 + len(real_model.SMALL.seeds)  # the choice of a rate, and a run of each seed
    assert len([*tmp_path.iterdir()]) == 1 + runs * len(real_model.METHODS)
    monkeypatch.setattr(real_model, "fit", None)
    monkeypatch.setattr(real_model, "untrained", None)
    real_model.main()
