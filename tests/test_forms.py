"""Published forms of preference data: what tools/prepare.py makes of a row in each."""

import json
from datetime import date
from pathlib import Path

import pytest

import data
from tests.test_examples import messages, prepared, said
from tools.forms import READERS, convert
from tools.prepare import line_of

RECIPES = Path(data.__file__).resolve().parent / "docs" / "recipes.md"
ASKED = messages("u:Name a lake.")
GARDA = {"prompt": ASKED, "chosen": messages("a:Garda."), "rejected": messages("a:No.")}
BRIEF = messages("s:Be brief.")
TALK = messages("u:Name a river.", "a:The Elbe.")
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "map"}}}
TOOLS = [{"type": "function", "function": {"name": "look"}}]
HH = "\n\nHuman: Name a lake.\n\nAssistant:"
TWO = ("Garda.", "No.")


def answers(better: str, worse: str) -> dict:
    return {better: TWO[0], worse: TWO[1]}


def rated(text: str, score: str, best, middle, worst) -> list[dict]:
    scores = {"Po": middle, "No.": worst, "Garda.": best}
    return [{text: answer, score: x} for answer, x in scores.items()]


FORMS = {  # what: (the row, the row as written)
    "stack-exchange": ({"question": "Name a lake."} | answers("response_j", "response_k"), GARDA),
    "argilla's older": (
        {"instruction": "Name a lake."} | answers("chosen_response", "rejected_response"),
        GARDA,
    ),
    "MedicalGPT": (
        {
            "system": "Be brief.",
            "history": [["Name a river.", "The Elbe."]],
            "question": "Name a lake.",
        }
        | answers("response_chosen", "response_rejected"),
        GARDA | {"prompt": BRIEF + TALK + ASKED},
    ),
    "LLaMA-Factory's alpaca": (
        {"instruction": "Name a lake.", "input": "", "history": [["Name a river.", "The Elbe."]]}
        | answers("chosen", "rejected"),
        GARDA | {"prompt": TALK + ASKED},
    ),
    "LLaMA-Factory's older": ({"instruction": "Name a lake.", "input": "", "output": TWO}, GARDA),
    "OpenAI": (
        {
            "input": {"messages": BRIEF + ASKED, "tools": TOOLS, "parallel_tool_calls": True},
            "preferred_output": GARDA["chosen"],
            "non_preferred_output": GARDA["rejected"],
        },
        GARDA | {"prompt": BRIEF + ASKED, "tools": TOOLS},
    ),
    "ms-swift": (
        {"messages": BRIEF + ASKED + GARDA["chosen"], "rejected_response": "No."},
        GARDA | {"prompt": BRIEF + ASKED},
    ),
    "ms-swift, rejected_messages": (
        {"messages": ASKED + GARDA["chosen"], "rejected_messages": ASKED + GARDA["rejected"]},
        GARDA,
    ),
    "SHP": (
        {"history": "Name a lake.", "human_ref_A": "No.", "human_ref_B": "Garda.", "labels": 0},
        GARDA,
    ),
    "PKU-SafeRLHF": (
        {"prompt": "Name a lake.", "response_0": "No.", "response_1": "Garda."}
        | {"better_response_id": 1, "safer_response_id": 0},
        GARDA,
    ),
    "HelpSteer2": (
        {"prompt": "Name a lake.", "response_1": "No.", "response_2": "Garda."}
        | {"preference_strength": 2},
        GARDA,
    ),
    "HelpSteer3": (
        {"context": ASKED, "response1": "Garda.", "response2": "No.", "overall_preference": -1},
        GARDA,
    ),
    "WebGPT": (
        {"question": {"full_text": "Name a lake."}, "answer_0": "No.", "answer_1": "Garda."}
        | {"score_0": -0.5, "score_1": 0.5},
        GARDA,
    ),
    "AlpacaEval, weighted": (
        {"instruction": "Name a lake.", "output_1": "No.", "output_2": "Garda."}
        | {"preference": 1.83, "generator_1": "x", "raw_completion": {"text": "M"}},
        GARDA,
    ),
    "AlpacaFarm, with an input": (
        {"instruction": "Name a lake.", "input": "In Italy.", "output_1": "Garda."}
        | {"output_2": "No.", "preference": 1},
        GARDA | {"prompt": messages("u:Name a lake.\n\nIn Italy.")},
    ),
    "MT-Bench, first turn": (
        {
            "conversation_a": ASKED + GARDA["rejected"] + messages("u:More.", "a:x"),
            "conversation_b": ASKED + GARDA["chosen"] + messages("u:More.", "a:y"),
            "winner": "model_b",
            "turn": 1,
        },
        GARDA,
    ),
    "MT-Bench, behind a system message": (
        {
            "conversation_a": BRIEF + ASKED + GARDA["chosen"] + messages("u:More.", "a:x"),
            "conversation_b": BRIEF + ASKED + GARDA["rejected"] + messages("u:More.", "a:y"),
            "winner": "model_a",
            "turn": 1,
        },
        GARDA | {"prompt": BRIEF + ASKED},
    ),
    "history behind a system message": (
        GARDA | {"prompt": BRIEF + ASKED, "history": [["Name a river.", "The Elbe."]]},
        GARDA | {"prompt": BRIEF + TALK + ASKED},
    ),
    "history of messages behind a system column": (
        GARDA | {"system": "Be brief.", "history": TALK},
        GARDA | {"prompt": BRIEF + TALK + ASKED},
    ),
    "OpenAI's answers beside a prompt": (
        {"prompt": ASKED, "preferred_output": GARDA["chosen"]}
        | {"non_preferred_output": GARDA["rejected"]},
        GARDA,
    ),
    "Nectar": (
        {
            "prompt": HH + " ",
            "answers": [
                {"answer": x, "rank": r} for x, r in (("Po", 2), ("No.", 3), ("Garda.", 1))
            ],
        },
        GARDA,
    ),
    "stack-exchange-preferences": (
        {
            "question": "Name a lake.",
            "answers": [
                {"text": x, "pm_score": s} for x, s in (("Po", 2), ("No.", 0), ("Garda.", 5))
            ],
        },
        GARDA,
    ),
    "UltraFeedback, original": (
        {
            "instruction": "Name a lake.",
            "completions": [
                {"response": x, "overall_score": s}
                for x, s in (("Po", 5), ("No.", 2), ("Garda.", 8.5))
            ],
        },
        GARDA,
    ),
    "TL;DR": (
        {
            "info": {"post": "Long. ", "title": "dog", "subreddit": "dogs"},
            "summaries": [{"text": " No."}, {"text": " Garda."}],
            "choice": 1,
        },
        {
            "prompt": "SUBREDDIT: r/dogs\n\nTITLE: dog\n\nPOST: Long.\n\nTL;DR:",
            "chosen": " Garda.",
            "rejected": " No.",
        },
    ),
    "UltraInteract": (
        {"trajectory": said("u:Name a lake.")} | answers("chosen", "rejected"),
        GARDA,
    ),
    "HH's prompt apart": ({"prompt": HH, "chosen": " Garda.", "rejected": " No."}, GARDA),
    "dialogues beside the answer that was published first": (
        {
            "messages": ASKED + messages("a:Water."),
            "chosen": ASKED + GARDA["chosen"],
            "rejected": ASKED + GARDA["rejected"],
        },
        GARDA,
    ),
    "a query": ({"query": "Name a lake."} | answers("chosen", "rejected"), GARDA),
    "ShareGPT with tools": (
        {
            "tools": json.dumps(TOOLS),
            "conversations": [
                *said("u:Name a lake."),
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "blue"},
            ],
        }
        | answers("chosen", "rejected"),
        GARDA
        | {
            "prompt": [
                *ASKED,
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "blue"},
            ],
            "tools": TOOLS,
        },
    ),
    "SmolTalk's with template arguments": (
        GARDA | {"chat_template_kwargs": {"enable_thinking": False}},
        GARDA | {"chat_template_kwargs": {"enable_thinking": False}},
    ),
    "an empty system column": (
        {"system": "", "prompt": "Name a lake.", "chosen": "Garda.", "rejected": "No."},
        GARDA,
    ),
    "TRL's with tools": (GARDA | {"tools": TOOLS},) * 2,
    "a struct of lists": (
        {
            "chosen": {"role": ["user", "assistant"], "content": ["Name a lake.", "Garda."]},
            "rejected": {"role": ["user", "assistant"], "content": ["Name a lake.", "No."]},
        },
        GARDA,
    ),
}


@pytest.mark.parametrize("what", FORMS)
def test_a_form_becomes_its_pair(what, tmp_path):
    """By the command, and as train.py then reads it."""
    row, wanted = FORMS[what]
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    prepared(tmp_path / "rows.json", "--out", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == wanted
    (got,) = data.load_preferences(tmp_path / "out.jsonl")
    assert (got.prompt, got.chosen, got.rejected) == tuple(
        wanted[key] for key in ("prompt", "chosen", "rejected")
    )
    assert got.tools == wanted.get("tools") and not got.ignored


OTHER_WAY_ROUND = {  # what makes the other answer the better one
    "SHP": {"labels": 1},
    "PKU-SafeRLHF": {"better_response_id": 0},
    "HelpSteer2": {"preference_strength": -2},
    "HelpSteer3": {"overall_preference": 1},
    "WebGPT": {"score_1": -1.5},
    "AlpacaEval, weighted": {"preference": 1.00001},
    "AlpacaFarm, with an input": {"preference": 2},
    "MT-Bench, first turn": {"winner": "model_a"},
    "MT-Bench, behind a system message": {"winner": "model_b"},
    "TL;DR": {"choice": 0},
}


@pytest.mark.parametrize("what", OTHER_WAY_ROUND)
def test_the_other_answer_may_be_the_better_one(what):
    row, wanted = FORMS[what]
    found, _ = convert(row | OTHER_WAY_ROUND[what], "FILE:1")
    assert (found.chosen, found.rejected) == (wanted["rejected"], wanted["chosen"])


@pytest.mark.parametrize(
    "info, prompt",
    [
        ({"article": "Long."}, "POST: Long.\n\nTL;DR:"),
        ({"post": "Long.", "article": "no", "title": ""}, "POST: Long.\n\nTL;DR:"),
        ({"post": None, "article": "Long.", "title": "dog"}, "TITLE: dog\n\nPOST: Long.\n\nTL;DR:"),
    ],
)
def test_a_post_or_an_article_is_summarised(info, prompt):
    found, _ = convert(FORMS["TL;DR"][0] | {"info": info}, "FILE:1")
    assert found.prompt == prompt


TIES = {
    "PKU-SafeRLHF": {"better_response_id": 0.5},
    "HelpSteer2": {"preference_strength": 0},
    "HelpSteer3": {"overall_preference": 0},
    "WebGPT": {"score_1": -0.5},
    "AlpacaEval, weighted": {"preference": 1.5},
    "MT-Bench, first turn": {"winner": "tie"},
    "Nectar": {"answers": [{"answer": x, "rank": 1} for x in TWO]},
}


@pytest.mark.parametrize("what", TIES)
def test_a_tie_is_no_pair(what):
    with pytest.raises(ValueError, match="both answers are rated alike"):
        convert(FORMS[what][0] | TIES[what], "FILE:1")


@pytest.mark.parametrize(
    "row, words",
    [
        (
            {"prompt": "q", "completion": "a", "label": True},
            "completion and label are unpaired ratings, as KTO takes them",
        ),
        ({"conversations": ASKED, "label": True}, "completion and label are unpaired ratings"),
        (
            {"instruction": "q", "x": 1},
            "neither chosen nor rejected is among the row's keys: ['ins",
        ),
        (GARDA | {"images": ["a.jpg"]}, "images is not text"),
        ({"instruction": "q", "output": "a"}, "output is one answer; chosen and rejected are need"),
        (FORMS["MT-Bench, first turn"][0] | {"turn": 2}, "dialogues part before the last answer"),
        ({"info": 3, "summaries": [], "choice": 0}, "its columns are those of summaries and choi"),
        ({"prompt": "q", "answers": [{"answer": "a", "rank": 1}]}, "fewer than two answers"),
        ({"prompt": "q", "answers": [{"answer": "a"}] * 2}, "fewer than two answers with a rating"),
        (FORMS["Nectar"][0] | {"answers": rated("answer", "rank", 1, "x", 3)}, "a rating is not a"),
        (FORMS["HelpSteer2"][0] | {"preference_strength": float("nan")}, "a rating is not a numbe"),
        (FORMS["AlpacaEval, weighted"][0] | {"preference": -1}, "the preference must be from 1"),
        (FORMS["SHP"][0] | {"labels": 2}, "the better answer must be 0 or 1, not 2"),
        (FORMS["PKU-SafeRLHF"][0] | {"better_response_id": -1}, "the better answer must be 0 or"),
        (FORMS["MT-Bench, first turn"][0] | {"turn": 1e400}, "a rating is not a number but inf"),
        (GARDA | {"chosen": [{"role": None, "1": 2}]}, "chosen: a message has no role; its"),
        ({"prompt": "q", "answers": 3}, "its columns are those of answers by rank"),
        (
            {"context": "A long text.", "chosen": "a", "rejected": "b"},
            "there is no prompt, but tex",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_pair_is_counted_with_its_reason(row, words, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps(GARDA))
    printed = prepared(file, "--out", tmp_path / "out.jsonl")
    assert "1 pairs of 2 rows" in printed and f"dropped: 1 {words}" in printed
    assert f"(first: {file}:1)" in printed


def test_a_vote_without_a_turn_is_about_the_whole_dialogue():
    row = {
        "conversation_a": ASKED + messages("a:x", "u:More.") + GARDA["chosen"],
        "conversation_b": ASKED + messages("a:x", "u:More.") + GARDA["rejected"],
        "winner": "model_a",
    }
    found, _ = convert(row, "FILE:1")
    assert (len(found.prompt), found.chosen) == (3, GARDA["chosen"])


def test_a_helpsteer_prompt_of_several_turns_becomes_messages():
    asked = "Name a lake.\n<extra_id_1>Assistant\nGarda.\n\n<extra_id_1>User\nIn Asia?\nOne only."
    row = {"prompt": asked, "response_1": "Baikal.", "response_2": "No.", "preference_strength": -1}
    found, _ = convert(row, "FILE:1")
    assert found.prompt == messages("u:Name a lake.", "a:Garda.\n", "u:In Asia?\nOne only.")
    assert (found.chosen, found.rejected) == (messages("a:Baikal."), messages("a:No."))


@pytest.mark.parametrize("column", ["context", "messages", "conversations"])
def test_text_in_a_column_that_holds_dialogues_elsewhere_asks_where_the_user_says_so(column):
    row = {column: "2 + 2?", "chosen": "4", "rejected": "5"}
    found, _ = convert(row, "FILE:1", column)
    assert (found.prompt, found.chosen) == (messages("u:2 + 2?"), messages("a:4"))


def test_text_that_only_begins_with_human_is_text():
    for prompt in ("Human: A Brief History is a book by whom?", "Human: hi\nAssistant:"):
        found, form = convert({"prompt": prompt} | answers("chosen", "rejected"), "FILE:1")
        assert (found.prompt, form) == (prompt, "strings")


def test_an_indentation_of_an_hh_answer_stays():
    row = {"prompt": HH, "chosen": "     x = 1\n    y = 2\n", "rejected": " No."}
    found, _ = convert(row, "FILE:1")
    assert found.chosen[0]["content"] == "    x = 1\n    y = 2"


@pytest.mark.parametrize(
    "row, column, ignored",
    [
        ({"prompt": "Be a pirate.", "question": "Name a lake."}, "question", ("prompt",)),
        ({"prompt": "Name a lake.", "question": "Name a lake."}, "question", ()),
        ({"prompt": "Name a lake.", "instruction": "Be kind to us."}, None, ("instruction",)),
        (
            {"prompt": "In French, please.", "chosen": ASKED + GARDA["chosen"]}
            | {"rejected": ASKED + GARDA["rejected"]},
            None,
            ("prompt",),
        ),
    ],
)
def test_what_else_asks_is_named_as_not_used(row, column, ignored):
    found, _ = convert(answers("chosen", "rejected") | row, "FILE:1", column)
    assert found.ignored == ignored


def test_both_answers_may_begin_with_the_question(tmp_path):
    """Beside notes that hold sentences, among which no column asks."""
    row = {"source": "Anthropic HH", "chosen": "What is it? yes", "rejected": "What is it? no"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    words = [tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl"]
    assert "--prompt chosen" in prepared(*words, code=2)
    assert "ignored columns: source (1 rows)" in prepared(*words, "--prompt", "chosen")
    (got,) = data.load_preferences(tmp_path / "out.jsonl")
    assert (got.prompt, got.chosen, got.rejected) == ("What is it?", " yes", " no")


def test_what_json_has_no_form_for_becomes_text(tmp_path):
    found, _ = convert(GARDA | {"prompt": [ASKED[0] | {"at": date(2024, 1, 2)}]}, "FILE:1")
    assert json.loads(line_of(found))["prompt"][0]["at"] == "2024-01-02"


def test_the_user_names_the_column_that_asks(tmp_path):
    row = {"prompt": "p-17", "ask me": "Name a lake."} | answers("chosen", "rejected")
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(GARDA))
    words = [tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl", "--prompt", "ask me"]
    printed = prepared(*words)
    assert "1 from ask me as the user's message" in printed
    assert "dropped: 1 --prompt names the column 'ask me', and the row has none" in printed
    (got,) = data.load_preferences(tmp_path / "out.jsonl")
    assert got.prompt == ASKED


@pytest.mark.parametrize("flags", [(), ("--prompt", "prompt")])
def test_text_under_prompt_becomes_a_message_only_if_the_user_names_it(flags, tmp_path):
    row = {"prompt": "Name a lake.", "chosen": "Garda.", "rejected": "No."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    if flags:  # the space by which it continues a prompt is no part of a message
        row["chosen"] = " Garda."
        (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    printed = prepared(tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl", *flags)
    assert ("1 from prompt as the user's message" in printed) == bool(flags)
    assert json.loads((tmp_path / "out.jsonl").read_text()) == (GARDA if flags else row)


@pytest.mark.parametrize(
    ("row", "flags", "ignored"),
    [
        ({"good": "Garda.", "bad": "No."}, ("--chosen", "good", "--rejected", "bad"), None),
        ({"good": "Garda.", "rejected": "No."}, ("--chosen", "good"), None),
        (
            {"chosen": "No.", "rejected": "Garda."},
            ("--chosen", "rejected", "--rejected", "chosen"),
            None,
        ),
        ({"chosen": "x y", "good": "Garda.", "rejected": "No."}, ("--chosen", "good"), "chosen"),
        ({"good": messages("a:Garda."), "rejected": messages("a:No.")}, ("--chosen", "good"), None),
    ],
)
def test_the_user_names_the_columns_of_the_answers(row, flags, ignored, tmp_path):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_text(json.dumps({"question": "Name a lake."} | row) + '\n{"question": "a b"}')
    printed = prepared(file, "--out", out, *flags)
    assert json.loads(out.read_text()) == GARDA
    name = flags[1]
    assert f"dropped: 1 --chosen names the column {name!r}, and the row has none" in printed
    assert (f"ignored columns: {ignored} (1 rows)" in printed) == bool(ignored)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--chosen", "good", "--rejected", "good"), "name the same column twice"),
        (("--prompt", "good", "--chosen", "good"), "name the same column twice"),
        (("--prompt", "rejected"), "--prompt rejected: that is an answer"),
        (("--chosen", ""), "--chosen names the column '', and the row has none"),
    ],
)
def test_columns_that_cannot_be_meant_are_refused(flags, words, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "Name a lake.", "good": "Garda.", "rejected": "No."}))
    assert words in prepared(file, "--out", tmp_path / "out.jsonl", *flags, code=2)


def test_scores_are_not_those_of_columns_that_the_user_names(tmp_path):
    row = {"question": "Name a lake.", "chosen": "No.", "rejected": "Garda."}
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row | {"score_chosen": 1, "score_rejected": 5}))
    words = file, "--out", tmp_path / "out.jsonl"
    assert "have a lower score_chosen" in prepared(*words)
    swapped = prepared(*words, "--chosen", "rejected", "--rejected", "chosen")
    assert "have a lower score_chosen" not in swapped


SCORES = [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")]
SCORES += [("chosen_score", "rejected_score"), ("rating_chosen", "rating_rejected")]
SCORES += [("chosen_rating", "rejected_rating"), ("chosen_avg_rating", "rejected_avg_rating")]


@pytest.mark.parametrize(("better", "worse"), SCORES)
def test_scores_that_contradict_the_order_are_counted(better, worse, tmp_path):
    rows = [GARDA | {better: x, worse: y} for x, y in ((2, 1), (1, 2), (1.5, 1.5), (0, 1))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    printed = prepared(tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl")
    assert "4 pairs of 4 rows" in printed
    for n, line, words in (
        (2, 2, f"have a lower {better} than {worse}"),
        (1, 3, f"have {better} and {worse} alike"),
    ):
        assert f"warning: {n} {words} (first: {tmp_path / 'rows.jsonl'}:{line})" in printed


def test_a_system_column_beside_a_system_message_is_not_used_and_named():
    row = GARDA | {"prompt": BRIEF + ASKED, "system": "Be long and detailed."}
    found, _ = convert(row, "FILE:1")
    assert found.prompt == BRIEF + ASKED and found.ignored == ("system",)


def test_the_table_of_forms_is_this_one():
    """docs/recipes.md names every reader, as prepare.py prints it."""
    text = RECIPES.read_text(encoding="utf-8")
    assert [name for name in READERS if f"| {name} |" not in text] == []
