"""TRL's ORPOTrainer beside ours: equal where it computes the paper's objective, pinned where not.

    python -m pytest tests/peers/test_trl.py      (with requirements-peers.txt installed)

The equality tests give both sides the same weights and the same token ids, and compare every
metric of ten optimizer steps. The others run TRL's own code and state one difference each; when
one of them fails, TRL has changed, and the README's table for those who come from it with it.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import orpo
import train
from tests.small import some_pairs, tokens

from . import tiny

peer = pytest.importorskip(f"{__package__}.trl_orpo")  # a skip names the package that is missing
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl.experimental.orpo.orpo_trainer")

# ---------------------------------------------------------------------------------------------
# Where both compute the same: ten optimizer steps side by side.


def run_ours(out, model, rows, *flags):
    """train.py on `rows`. Returns its rows of metrics.jsonl."""
    source = tiny.write_jsonl(out.parent / f"{out.name}.jsonl", rows)
    argv = ["--model", model, "--data", source, "--out", out, "--device", "cpu", *flags]
    train.main([str(arg) for arg in argv])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def encoded(model, rows):
    """The rows as token ids, by our tokenizer: what TRL is given."""
    tokenizer = data.load_tokenizer(model)
    return [
        (
            tokenizer.encode(row["prompt"], bos=True),
            tokenizer.encode(row["chosen"], eos=True, continuation=True),
            tokenizer.encode(row["rejected"], eos=True, continuation=True),
        )
        for row in rows
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama with a sentencepiece tokenizer, as a checkpoint folder."""
    path = tmp_path_factory.mktemp("tiny")
    tiny.random_llama(path, vocab_size=tiny.train_sentencepiece(path))
    return path


@pytest.fixture(params=["random", "random_tied", "stories260K"])
def real_or_random(request, folder, tmp_path_factory):
    """(model folder, 80 preference rows for training, 24 held out)"""
    if request.param == "stories260K":
        lines = tiny.shared("politeness-pairs.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines[:110]]
        rows = [row for row in rows if row["chosen"] != row["rejected"]]
        return tiny.shared("stories260K"), rows[:80], rows[80:104]
    rows = tiny.preference_rows(104)
    if request.param == "random_tied":
        folder = tmp_path_factory.mktemp("tied")
        size = tiny.train_sentencepiece(folder)
        tiny.random_llama(folder, vocab_size=size, tie_word_embeddings=True, num_key_value_heads=6)
    return folder, rows[:80], rows[80:]


def assert_within(ours, theirs, names, tolerance=1e-3):
    for name in names:
        assert ours[name] == pytest.approx(theirs[name], abs=tolerance), (name, theirs["step"])


@pytest.mark.parametrize("lam", [0.1, 1.0])
def test_ten_steps_equal_trl(tmp_path, real_or_random, lam):
    """Same weights, token ids and pairs; eight pairs a step in one micro-batch, AdamW at 1e-3,
    clipping at 1. Every metric within 1e-3 at every step, and the weights at the end.
    """
    model, rows, held_out = real_or_random
    seed = 7
    order = data.epoch_permutation(len(rows), seed, 0)
    pairs, eval_pairs = encoded(model, rows), encoded(model, held_out)
    theirs, their_model, _ = peer.run_trl(
        model, [pairs[i] for i in order], eval_pairs, max_steps=10, lr=1e-3, lam=lam
    )
    flags = ["--sft-loss", "full", "--lr", 1e-3, "--lr-schedule", "constant", "--warmup-steps", 0]
    flags += ["--lam", lam, "--batch-size", 8, "--micro-batch-tokens", 10**6, "--max-steps", 10]
    eval_data = tiny.write_jsonl(tmp_path / "eval.jsonl", held_out)
    ours = run_ours(tmp_path / "out", model, rows, *flags, "--seed", seed, "--eval-data", eval_data)

    def select(metrics, key):
        return {row["step"]: row for row in metrics if key in row}

    steps, their_steps = select(ours, "loss"), select(theirs, "loss")
    assert list(steps) == list(their_steps) == list(range(1, 11))
    assert their_steps[10]["loss"] < their_steps[1]["loss"] - 0.3  # something was learned
    for step, row in steps.items():
        assert_within(row, their_steps[step], [*peer.SHARED_METRICS, "learning_rate"])

    evals, their_evals = select(ours, "eval_loss"), select(theirs, "eval_loss")
    assert list(evals) == list(their_evals) == [0, 10]
    names = [f"eval_{name}" for name in peer.SHARED_METRICS if name != "grad_norm"]
    for step, row in evals.items():
        assert_within(row, their_evals[step], names)

    trained = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    for (name, a), b in zip(
        trained.state_dict().items(), their_model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0, msg=name)


def test_learning_rates_after_warm_up_equal_transformers(tmp_path, folder):
    """Cosine and linear decay reach the same rates from the end of the warm-up on."""
    rows = tiny.preference_rows(16)
    for schedule in ("cosine", "linear"):
        settings = {"max_steps": 8, "lr_schedule": schedule, "warmup_steps": 3}
        theirs, _, _ = peer.run_trl(folder, encoded(folder, rows), **settings)
        flags = ["--lr", 1e-3, "--lr-schedule", schedule, "--warmup-steps", 3, "--max-steps", 8]
        ours = run_ours(tmp_path / schedule, folder, rows, *flags, "--batch-size", 8)
        for a, b in list(zip(ours, theirs, strict=True))[3:]:
            assert a["learning_rate"] == pytest.approx(b["learning_rate"], abs=1e-9), a["step"]


def test_our_step_is_the_same_however_it_is_cut(tmp_path, folder):
    """One micro-batch of eight pairs, some of a few, or eight of one: the same loss and gradient.
    See test_trl_gradient_depends_on_the_micro_batch_cut.
    """
    rows = tiny.preference_rows(8)
    flags = ["--sft-loss", "full", "--lr", 1e-3, "--max-steps", 3, "--batch-size", 8]
    runs = [
        run_ours(tmp_path / str(budget), folder, rows, *flags, "--micro-batch-tokens", budget)
        for budget in (10**6, 200, 1)
    ]
    for whole, *cut in zip(*runs, strict=True):
        for row in cut:
            for name in peer.SHARED_METRICS:
                assert row[name] == pytest.approx(whole[name], rel=1e-4, abs=1e-5), name


# ---------------------------------------------------------------------------------------------
# Where TRL differs from the paper, or surprises. TRL's own code runs, ours stands beside it.


def random_triples(n, seed=0, vocab_size=320):
    """n triples of token ids: BOS and up to 24 tokens, two responses of up to 24 and EOS."""
    pairs = some_pairs(n, seed, 24, vocab_size)
    return [([1, *p], [*c, 2], [*r, 2]) for p, c, r in map(tokens, pairs)]


def trl_loss(chosen_logps, rejected_logps, lam=0.1):
    """TRL's odds_ratio_loss as it stands, without building a trainer around it."""
    trainer = SimpleNamespace(beta=lam, accelerator=SimpleNamespace(device="cpu"))
    return trl.ORPOTrainer.odds_ratio_loss(trainer, chosen_logps, rejected_logps)


def test_trl_loss_equals_ours_away_from_certainty():
    """Same L_OR and derivatives in float32 for mean log-probabilities from -20 to -0.01."""
    rng = torch.Generator().manual_seed(0)
    logps = -torch.exp(torch.empty(2, 200).uniform_(math.log(0.01), math.log(20), generator=rng))
    theirs, ours = (logps.clone().requires_grad_() for _ in range(2))
    losses = trl_loss(*theirs, lam=1.0)[0]
    (-losses.sum()).backward()
    expected = orpo.odds_ratio_loss(*ours)
    expected.sum().backward()
    # exp(x) close to 1 costs TRL's float32 two digits at -0.01; ours works in float64.
    torch.testing.assert_close(-losses, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(theirs.grad, ours.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("value", [-1e-8, 0.0])
def test_trl_gradient_is_nan_at_certainty(value):
    """TRL: NaN where P rounds to 1 in float32. Ours: the limit, by hand.

    `torch.where` in TRL's log1mexp picks the right value, but multiplies the gradient of the
    branch it leaves out, which is infinite, by 0. With P_l = 1/2, a = log P_w = 0: the derivatives
    are -P_l/(1-P_l) = -1 and 0.
    """
    x = torch.tensor([value], requires_grad=True)
    trl.log1mexp(x).sum().backward()
    assert x.grad.isnan().all()

    half = math.log(0.5)
    theirs = torch.tensor([[value], [half]], requires_grad=True)
    trl_loss(*theirs)[0].sum().backward()
    assert theirs.grad.isnan().any()

    ours = torch.tensor([[value], [half]], requires_grad=True)
    orpo.odds_ratio_loss(*ours).sum().backward()
    torch.testing.assert_close(ours.grad, torch.tensor([[-1.0], [0.0]]), rtol=1e-6, atol=2e-8)


def test_trl_log_odds_ratio_is_a_log_sigmoid_and_log_odds_chosen_the_log_odds_ratio():
    """Four names that mislead, and their meaning: metrics of ours are called the same.

    P_w = 3/4 and P_l = 1/2: odds 3 and 1, so the log odds ratio is ln 3 and L_OR is ln(4/3).
    `losses` is lam * log sigmoid, which get_batch_loss_metrics subtracts; a "reward" is lam times
    a mean log-probability, with no reference model in it.
    """
    pair = torch.tensor([[math.log(0.75)], [math.log(0.5)]])
    losses, chosen_rewards, rejected_rewards, log_odds_ratio, log_odds_chosen = trl_loss(*pair)
    assert log_odds_chosen.item() == pytest.approx(math.log(3), rel=1e-5)
    assert log_odds_ratio.item() == pytest.approx(-math.log(4 / 3), rel=1e-5)
    assert losses.item() == pytest.approx(-0.1 * math.log(4 / 3), rel=1e-5)
    assert chosen_rewards.item() == pytest.approx(0.1 * math.log(0.75), rel=1e-5)
    assert rejected_rewards.item() == pytest.approx(0.1 * math.log(0.5), rel=1e-5)


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def test_trl_nll_covers_the_prompt_too(folder, tmp_path):
    """L_SFT of the paper is of the response given the prompt; TRL's is of prompt and response.

    Its mean is over tokens of the whole micro-batch, so a long pair counts more: ours with
    `--sft-loss full`. The first token is left out, as nothing predicts it. EOS is trained.
    """
    model = tiny.random_llama()
    pairs = random_triples(4)
    trainer = peer.make_trainer(model, pairs, out=str(tmp_path), per_device_train_batch_size=4)
    theirs = trainer.concatenated_forward(model, first_batch(trainer))[4]

    nll, tokens, response_nll = 0.0, 0, 0.0
    for prompt, chosen, _ in pairs:
        ids = torch.tensor(prompt + chosen)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        nll += F.cross_entropy(logits, ids[1:], reduction="sum").item()
        tokens += len(ids) - 1
        response_nll += F.cross_entropy(logits[len(prompt) - 1 :], torch.tensor(chosen)).item() / 4
    assert theirs.item() == pytest.approx(nll / tokens, rel=1e-5)
    assert abs(theirs.item() - response_nll) > 0.01


class KeepGradient(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).clone()


def trl_gradient(folder, pairs, micro_batch_size, out):
    """The gradient of one optimizer step over `pairs`, as TRL hands it to the optimizer."""
    keep = KeepGradient()
    trainer = peer.make_trainer(
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        pairs,
        out=str(out),
        per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=len(pairs) // micro_batch_size,
        max_steps=1,
        max_grad_norm=1e9,
    )
    trainer.add_callback(keep)
    trainer.train()
    return keep.gradient


def test_trl_gradient_depends_on_the_micro_batch_cut(folder, tmp_path):
    """TRL averages the tokens of a micro-batch, then the micro-batches: a token in a batch of
    short pairs counts more. The same eight pairs cut as 8, 2 x 4 and 8 x 1 give three gradients.
    Ours gives one: see test_our_step_is_the_same_however_it_is_cut.
    """
    pairs = sorted(random_triples(8), key=lambda pair: sum(map(len, pair)))
    whole = trl_gradient(folder, pairs, 8, tmp_path)
    for micro_batch_size in (4, 1):
        cut = trl_gradient(folder, pairs, micro_batch_size, tmp_path)
        assert (cut - whole).norm() / whole.norm() > 0.03


def words_tokenizer():
    """One token a word, so that lengths can be read off the text."""
    vocab = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def text_trainer(rows, out, tokenizer=None, **settings):
    """TRL as its users run it: text in, its own tokenize_row."""
    model = tiny.random_llama(vocab_size=32)
    return peer.make_trainer(
        model,
        trl.Dataset.from_list(rows),
        out=str(out),
        trainer=trl.ORPOTrainer,
        tokenizer=tokenizer or words_tokenizer(),
        **settings,
    )


def test_trl_cuts_the_response_and_never_the_prompt(tmp_path):
    """max_length 8 and BOS + 4 words of prompt leave 3 tokens of a response: EOS goes first.

    A prompt of BOS + 9 words is over max_length alone; it is kept whole (10 tokens in all), and
    no token of either response is left. Ours drops such a pair and counts it.
    """
    rows = [
        {"prompt": "a b c d", "chosen": " e f g h", "rejected": " e"},
        {"prompt": "a b c d e f g h a", "chosen": " b", "rejected": " c d"},
    ]
    data = text_trainer(rows, tmp_path, max_length=8).train_dataset
    a, e = 4, 8
    assert data[0]["chosen_input_ids"] == [1, a, a + 1, a + 2, a + 3, e, e + 1, e + 2]
    assert data[0]["rejected_input_ids"] == [1, a, a + 1, a + 2, a + 3, e, 2]
    for side in ("chosen", "rejected"):
        assert len(data[1][f"{side}_input_ids"]) == 10
        assert set(data[1][f"{side}_labels"]) == {-100}


@pytest.mark.filterwarnings("ignore")
def test_trl_one_overlong_prompt_turns_every_weight_into_nan_and_logs_a_loss_of_zero(tmp_path):
    """The empty response above is a mean over nothing, 0/0. The step is taken all the same, and
    the Trainer's filter (logging_nan_inf_filter) replaces a NaN loss by the mean of those before
    it since the last row, here none: the log says 0.
    """
    rows = [{"prompt": "a b c d e f g h a", "chosen": " b", "rejected": " c d"}]
    trainer = text_trainer(rows, tmp_path, max_length=8, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == 0
    assert all(p.isnan().any() for p in trainer.model.parameters())


def test_trl_tokenises_prompt_and_response_as_one_string(tmp_path):
    """A merge across the border takes the prompt's last token into the chosen response only.

    Vocabulary a, b, c, ab: prompt "a", chosen "b" and rejected "c" become BOS | ab and BOS a | c:
    the two responses are of different prompts, and neither is what generation will see after
    BOS a. Ours encodes the prompt once and a response as its continuation: BOS a | b, BOS a | c.
    """
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5, "ab": 6}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("a", "b")])),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    row = text_trainer(rows, tmp_path, tokenizer=tokenizer).train_dataset[0]
    assert row["chosen_input_ids"] == [1, 6, 2] and row["chosen_labels"] == [-100, 6, 2]
    assert row["rejected_input_ids"] == [1, 3, 5, 2]
    assert row["rejected_labels"] == [-100, -100, 5, 2]


AUTHORS_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)


def test_trl_adds_a_second_eos_behind_what_a_template_writes_after_the_first(tmp_path):
    """The authors' template, like Zephyr's, ends a turn with EOS and a newline. TRL looks at the
    last token only, so the response becomes b EOS newline EOS, the last two of which no
    generation reaches and of which the mean is taken all the same. Ours ends at the first EOS.
    """
    vocab = {c: i for i, c in enumerate(["<pad>", "<s>", "</s>", "\n", *"<|>aesuirtnbc"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = AUTHORS_TEMPLATE
    texts = {"prompt": ("user", "a"), "chosen": ("assistant", "b"), "rejected": ("assistant", "c")}
    row = {key: [{"role": r, "content": text}] for key, (r, text) in texts.items()}
    row = text_trainer([row], tmp_path, tokenizer=tokenizer).train_dataset[0]
    trained_on = [i for i in row["chosen_labels"] if i != -100]
    assert tokenizer.convert_ids_to_tokens(trained_on) == ["b", "</s>", "\n", "</s>"]


def parts(row, tmp_path):
    """A row's prompt, chosen and rejected as TRL finds them, and as ours does."""
    [ours] = data.load_preferences(tiny.write_jsonl(tmp_path / "row.jsonl", [row]))
    theirs = trl.maybe_extract_prompt(row)
    return [theirs[key] for key in ("prompt", "chosen", "rejected")], list(ours[:3])


def test_a_prompt_in_common_messages_is_found_as_in_trl(tmp_path):
    messages = [{"role": "user", "content": "Which colour?"}]
    row = {
        key: [*messages, {"role": "assistant", "content": text}]
        for key, text in (("chosen", "Blue, I think."), ("rejected", "Blue."))
    }
    theirs, ours = parts(row, tmp_path)
    assert ours == theirs == [messages, row["chosen"][1:], row["rejected"][1:]]


def test_trl_cuts_a_common_beginning_of_texts_within_a_word(tmp_path):
    """Without a prompt TRL takes all letters in common, so the answers here are "ack" and "ue";
    ours goes back to the end of a word.
    """
    row = {"chosen": "Which colour? It is black", "rejected": "Which colour? It is blue"}
    theirs, ours = parts(row, tmp_path)
    assert theirs == ["Which colour? It is bl", "ack", "ue"]
    assert ours == ["Which colour? It is", " black", " blue"]


def test_trl_trains_on_pairs_whose_responses_are_equal_or_empty(tmp_path):
    """The paper drops y_w = y_l and empty responses (section 5.1), and so does ours; TRL keeps
    them. An equal pair has L_OR = ln 2 and gives the odds ratio term no gradient direction.
    """
    rows = [
        {"prompt": "a b", "chosen": " c", "rejected": " c"},
        {"prompt": "a b", "chosen": " c d", "rejected": ""},
    ]
    assert len(text_trainer(rows, tmp_path).train_dataset) == 2


def test_trl_evaluation_is_a_mean_of_batch_means(tmp_path):
    """Three pairs in batches of two: the third counts for a half. Ours: the mean over the pairs."""
    model = tiny.random_llama()
    pairs = random_triples(3)
    settings = {"out": str(tmp_path), "per_device_eval_batch_size": 2}
    key = "eval_logps/chosen"
    by_twos = peer.make_trainer(model, pairs, pairs, **settings).evaluate()[key]
    alone = [peer.make_trainer(model, pairs, [p], **settings).evaluate()[key] for p in pairs]
    assert by_twos == pytest.approx(((alone[0] + alone[1]) / 2 + alone[2]) / 2, rel=1e-5)
    assert by_twos != pytest.approx(sum(alone) / 3, rel=1e-5)


def test_trl_warm_up_begins_at_zero_and_so_the_first_update_changes_nothing(folder):
    """With warm-up the learning rate of update 1 is 0 in transformers; ours is lr/warmup_steps."""
    settings = {"max_steps": 3, "warmup_steps": 2, "lr_schedule": "linear"}
    rows, _, _ = peer.run_trl(folder, random_triples(8), **settings)
    assert [row["learning_rate"] for row in rows] == [0, 5e-4, 1e-3]


def test_trl_defaults_are_bf16_with_recomputation():
    """ORPOConfig switches bf16 autocast and gradient checkpointing on; learning rate 1e-6."""
    config = trl.ORPOConfig(output_dir="unused", use_cpu=True)
    assert config.bf16 and config.gradient_checkpointing
    assert (config.learning_rate, config.beta, config.max_length) == (1e-6, 0.1, 1024)
