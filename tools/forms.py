"""The forms in which preference data is published, each as the row that train.py reads.

A form is recognised by its columns. READERS turn the special ones into prompt, chosen and rejected;
`convert` does the rest, which is the same for all of them: questions become messages, `system` and
`history` go in front of them, `input` after an instruction. docs/recipes.md has them as a table.
"""

import math
import re

from formats.messages import messages_of, tools_of
from formats.rows import Preference, preference, read_answers

# The columns of the better and the worse answer, where they have other names.
ANSWERS = {
    "chosen_response": "rejected_response",
    "response_chosen": "response_rejected",
    "response_j": "response_k",  # stack-exchange-paired
    "preferred_output": "non_preferred_output",  # OpenAI
    "messages": "rejected_messages",  # ms-swift
}
# What asks: the first of these that has something is the prompt.
QUESTIONS = ("instruction", "question", "query", "input")
DIALOGUES = ("messages", "conversations", "conversation", "trajectory", "context")
SCORES = (
    *(("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")),
    *(("rating_chosen", "rating_rejected"), ("chosen-rating", "rejected-rating")),
    *(("chosen_rating", "rejected_rating"), ("chosen_avg_rating", "rejected_avg_rating")),
)


def convert(
    row, where: str, column: str | None = None, answers: dict[str, str] | None = None
) -> tuple[Preference, str]:
    """A row of any form as train.py's, and what was made of it, in words. column: the one that
    asks, where the user names it; answers: those of chosen and rejected, where the user names them.
    Raises ValueError with the reason why there is none."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is expected, not {type(row).__name__}")
    row, form = {key: value for key, value in row.items() if value is not None}, ""
    if answers:
        found, form = convert(with_answers(row, answers), where, column)
        replaced = tuple(key for key in answers if key in row and key not in answers.values())
        return found._replace(ignored=(*replaced, *found.ignored)), form
    if column:
        check_named(row, "--prompt", column)
    if not {"chosen", "rejected"} & row.keys():
        row, form = read_form(row)
    if not {"chosen", "rejected"} & row.keys():
        return preference(row, where), ""  # which says why this is no pair
    if {"chosen", "rejected"} <= row.keys():
        row |= dict(zip(("chosen", "rejected"), read_answers(row), strict=True))
    sides = row.get("chosen"), row.get("rejected")
    if all(map(is_hh if row.get("prompt") else begins_as_hh, sides)):
        row |= {key: hh_dialogue(row[key]) for key in ("chosen", "rejected")}
        check_hh(row["chosen"], row["rejected"])
        form = form or "dialogues as text (HH-RLHF)"
    if column == "chosen":  # both answers begin with the question
        kept = ("chosen", "rejected", "accept", "tools", "chat_template_kwargs")
        known = {key: row[key] for key in kept if key in row}
        found, made = preference(known, where), ""
        found = found._replace(ignored=tuple(key for key in row if key not in known))
    else:
        before = row.get("prompt")
        row, made = ask(row, column)
        found = preference(row, where)
        if column not in (None, "prompt") and before not in ("", None, asked_of(found)):
            # replaced by the column that the user names
            found = found._replace(ignored=("prompt", *found.ignored))
    form = form or made or ("strings" if isinstance(found.prompt, str) else "messages")
    if is_list(found.prompt):
        found, used = with_earlier(found, row)
        form += f", after {' and '.join(used)}" if used else ""
    return found._replace(key="prompt"), form  # which is its name in PAIRS.jsonl


def check_named(row: dict, flag: str, column: str):
    """Raises ValueError where the row has nothing in the column that a flag names."""
    if not row.get(column):
        problem = "it is empty" if column in row else "the row has none"
        raise ValueError(f"{flag} names the column {column!r}, and {problem}")


def with_answers(row: dict, names: dict[str, str]) -> dict:
    """The row with the columns that the user names as chosen and rejected."""
    for key, name in names.items():
        check_named(row, f"--{key}", name)
    rest = {key: row[key] for key in row if key not in (*names, *names.values())}
    return rest | {key: row[name] for key, name in names.items()}


def asked_of(row: Preference):
    """The prompt, or the text of its last message."""
    return row.prompt if isinstance(row.prompt, str) else row.prompt[-1]["content"]


def ask(row: dict, column: str | None) -> tuple[dict, str]:
    """The row with a prompt of messages where its answers are, and how that was made, in words.
    Strings with a `prompt` stay strings, unless the user names that column. Whole dialogues, and
    rows without anything that asks, stay as they are."""
    sides = row.get("chosen"), row.get("rejected")
    texts = all(isinstance(side, str) for side in sides)
    last_answers = all(isinstance(side, list) and len(side) == 1 for side in sides)
    whole = all(isinstance(side, list) and len(side) > 1 for side in sides)
    name, prompt = (None, None) if whole and not column else asking(row, column)
    if name is None:
        return row, ""
    form = ""
    if isinstance(prompt, str) and is_hh(prompt) and (texts or last_answers):
        prompt = hh_dialogue(prompt)
        prompt = prompt if prompt[-1]["content"] else prompt[:-1]  # "Assistant:" asks for more
        sides = tuple(hh_text(side) if texts else side for side in sides)
        form = "a dialogue as text (HH-RLHF) and its answers"
    chat = "system" in row or bool(row.get("history") or tools_of(row.get("tools")))
    asks = chat or column is not None or name != "prompt"  # else it is a text to be continued
    if isinstance(prompt, str) and (last_answers or (texts and asks)):
        form = f"{name} as the user's message"
        if name != "input" and isinstance(more := row.get("input"), str):
            row = {key: value for key, value in row.items() if key != "input"}
            prompt = f"{prompt}\n\n{more}" if more else prompt
            form = f"{name} and input as the user's message"
        prompt = [{"role": "user", "content": prompt}]
        if name == "prompt" and texts:  # without the space by which they continued it
            sides = tuple(re.sub(r"^ (?=\S)", "", side) for side in sides)
    if is_list(prompt):
        sides = tuple(
            [{"role": "assistant", "content": side}] if isinstance(side, str) else side
            for side in sides
        )
    answered = is_list(prompt) and is_list(sides[0]) and prompt[-1:] == sides[0]
    if answered and len(prompt) > 1:  # a dialogue that already ends with the chosen answer
        prompt = prompt[:-1]
    row = {key: value for key, value in row.items() if key != name or name == "prompt"}
    made = dict(zip(("chosen", "rejected"), sides, strict=True))
    made = {key: side for key, side in made.items() if side is not None}
    return row | made | {"prompt": prompt}, form


def asking(row: dict, column: str | None):
    """The column that asks, and the messages or the text in it; None, None where there is none."""
    for key in (column,) if column else ("prompt", *QUESTIONS, *DIALOGUES):
        if row.get(key):
            value = messages_of(row[key])
            if is_list(value) or (isinstance(value, str) and (column or key not in DIALOGUES)):
                return key, value
    return None, None


def is_list(value) -> bool:
    return isinstance(value, list)


def with_earlier(found: Preference, row: dict) -> tuple[Preference, list[str]]:
    """With the columns system and history (pairs of question and answer) before the prompt's
    messages, and which of the two were put there."""
    prompt, used = found.prompt, []
    if "history" in found.ignored and (turns := turns_of(row["history"])) is not None:
        begins = prompt[0]["role"] == "system"
        prompt, used = [*prompt[:begins], *turns, *prompt[begins:]], ["history"]
    system = row["system"] if "system" in found.ignored else None
    if isinstance(system, str) and prompt[0]["role"] != "system":
        prompt, used = [{"role": "system", "content": system}, *prompt], ["system", *used]
    ignored = tuple(key for key in found.ignored if key not in used)
    return found._replace(prompt=prompt, ignored=ignored), used


def turns_of(history) -> list[dict] | None:
    """[[question, answer], ...] as messages; messages as they are; None where it is neither."""
    if not isinstance(history, list):
        return None
    if all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        pairs = (zip(("user", "assistant"), turn, strict=True) for turn in history)
        history = [{"role": role, "content": text} for pair in pairs for role, text in pair]
    return messages_of(history)


# ---------------------------------------------------------------------------------------------
# HH-RLHF: a dialogue is one text.


def begins_as_hh(value) -> bool:
    return isinstance(value, str) and re.match(r"\s*Human:", value) is not None


def is_hh(value) -> bool:
    """Whether a text is a dialogue, and does not only begin with the word."""
    return begins_as_hh(value) and "\n\nAssistant:" in value


def hh_text(said: str) -> str:
    """What is said, without the space and the newlines around it; an indentation stays."""
    return said.removeprefix(" ").strip("\n").rstrip()


def hh_dialogue(text: str) -> list[dict]:
    """ "\\n\\nHuman: a\\n\\nAssistant: b" as messages."""
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip("\n"))
    roles = {"Human": "user", "Assistant": "assistant"}
    said = zip(parts[1::2], parts[2::2], strict=True)
    messages = [{"role": roles[role], "content": hh_text(text)} for role, text in said]
    in_turn = all(m["role"] == ("user", "assistant")[i % 2] for i, m in enumerate(messages))
    if parts[0].strip() or not in_turn:
        raise ValueError("turns are not Human, Assistant, ...")
    return messages


def check_hh(chosen: list[dict], rejected: list[dict]):
    if len(chosen) != len(rejected) or chosen[:-1] != rejected[:-1]:
        raise ValueError("dialogues part before the last answer")
    if chosen[-1]["role"] != "assistant":
        raise ValueError("dialogues end with a question")


# ---------------------------------------------------------------------------------------------
# Rows without chosen and rejected: each reader takes the row, and gives prompt, chosen, rejected.


def read_form(row: dict) -> tuple[dict, str]:
    """The row with chosen and rejected, by the first form whose columns it has, and the form's
    name; as it is where none fits."""
    for name, (columns, reader) in READERS.items():
        if columns <= row.keys():
            try:
                made = reader(row)
            except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
                problem = f"{type(error).__name__}: {error!s:.60}"
                raise ValueError(
                    f"its columns are those of {name}, its values are not: {problem}"
                ) from None
            return {key: row[key] for key in row if key not in columns} | made, name
    for better, worse in ANSWERS.items():
        if {better, worse} <= row.keys():
            rest = {key: value for key, value in row.items() if key not in (better, worse)}
            return rest | {"chosen": row[better], "rejected": row[worse]}, f"{better} and {worse}"
    return row, ""


def of_two(first, second, preference: float) -> dict:
    """preference: below 0 where the first answer is the better one, above 0 where the second is."""
    if preference == 0:
        raise ValueError("both answers are rated alike")
    chosen, rejected = (first, second) if preference < 0 else (second, first)
    return {"chosen": chosen, "rejected": rejected}


def number(value) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise ValueError(f"a rating is not a number but {value!r:.40}")
    return found


def index(value) -> int:
    """Which of two answers is the better one."""
    if number(value) == 0.5:
        raise ValueError("both answers are rated alike")
    if number(value) not in (0, 1):
        raise ValueError(f"the better answer must be 0 or 1, not {value!r:.40}")
    return int(value)


def best_and_worst(answers: list, text: str, score: str, sign: int = 1) -> dict:
    """Of several answers with scores: the pair whose difference is the largest."""
    known = [answer for answer in answers if answer.get(score) is not None]
    rated = [(sign * number(answer[score]), answer[text]) for answer in known]
    if len(rated) < 2:
        raise ValueError("fewer than two answers with a rating")
    (high, best), (low, worst) = max(rated, key=first_of), min(rated, key=first_of)
    return of_two(best, worst, low - high)


def first_of(rated: tuple):
    return rated[0]


def openai(row: dict) -> dict:
    asked = row["input"]
    more = {key: value for key, value in asked.items() if key != "messages"}
    return {
        "prompt": asked["messages"],
        "chosen": row["preferred_output"],
        "rejected": row["non_preferred_output"],
    } | more


def swift(row: dict) -> dict:
    dialogue = messages_of(row["messages"])
    answers = {"chosen": [dialogue[-1]], "rejected": row["rejected_response"]}
    return {"prompt": dialogue[:-1]} | answers


def summaries(row: dict) -> dict:
    """A post or an article, and two of its summaries, as the authors' prompt (TL;DR)."""
    info, (first, second) = row["info"], (row["summaries"][i]["text"] for i in (0, 1))
    title = f"TITLE: {info['title']}\n\n" if info.get("title") else ""
    if info.get("subreddit"):
        title = f"SUBREDDIT: r/{info['subreddit']}\n\n" + title
    post = info.get("post") or info.get("article") or ""
    prompt = f"{title}POST: {post.strip()}\n\nTL;DR:"
    return {"prompt": prompt} | of_two(first, second, 2 * index(row["choice"]) - 1)


def judged(row: dict) -> dict:
    """MT-Bench, the chatbot arena: two dialogues, of which `turn` questions count, and who won."""
    if row["winner"] not in ("model_a", "model_b"):
        raise ValueError("both answers are rated alike")
    dialogues = [messages_of(row[key]) for key in ("conversation_a", "conversation_b")]
    if "turn" in row:
        n = 2 * int(number(row["turn"])) + (dialogues[0][0]["role"] == "system")
        dialogues = [dialogue[:n] for dialogue in dialogues]
    if dialogues[0][:-1] != dialogues[1][:-1]:
        raise ValueError("dialogues part before the last answer")
    return of_two(*dialogues, -1 if row["winner"] == "model_a" else 1)


def webgpt(row: dict) -> dict:
    difference = number(row["score_1"]) - number(row["score_0"])
    question = row["question"]
    asked = question["full_text"] if isinstance(question, dict) else question
    return {"question": asked} | of_two(row["answer_0"], row["answer_1"], difference)


def alpaca_outputs(row: dict) -> dict:
    if not isinstance(row["output"], list) or len(row["output"]) != 2:
        raise ValueError("output is one answer; chosen and rejected are needed")
    return {"instruction": row["instruction"], **of_two(*row["output"], -1)}


def alpaca_verdict(row: dict) -> dict:
    """1 is the first answer, 2 the second; a judge's weighted verdict lies between them."""
    if not 1 <= number(row["preference"]) <= 2:
        raise ValueError(f"the preference must be from 1 to 2, not {row['preference']!r:.40}")
    verdict = of_two(row["output_1"], row["output_2"], number(row["preference"]) - 1.5)
    return {"instruction": row["instruction"]} | verdict


def pku(row: dict) -> dict:
    answers, better = (row["response_0"], row["response_1"]), index(row["better_response_id"])
    return {"question": row["prompt"]} | of_two(*answers, 2 * better - 1)


def helpsteer(asks: str, first: str, second: str, strength: str):
    def reader(row: dict) -> dict:
        asked = helpsteer_turns(row[asks])
        return {"question": asked} | of_two(row[first], row[second], number(row[strength]))

    return reader


def helpsteer_turns(asked):
    """A prompt of several turns as messages, which HelpSteer2 writes as one text:
    QUESTION<extra_id_1>Assistant ANSWER<extra_id_1>User QUESTION, on lines of their own."""
    if not isinstance(asked, str) or "<extra_id_1>" not in asked:
        return asked
    first, *later = re.split(r"\n?<extra_id_1>(User|Assistant)\n", asked)
    turns = [("user", first), *zip(map(str.lower, later[::2]), later[1::2], strict=True)]
    return [{"role": role, "content": text} for role, text in turns]


READERS = {
    "OpenAI's preference format": ({"input", "preferred_output", "non_preferred_output"}, openai),
    "messages and rejected_response (ms-swift)": ({"messages", "rejected_response"}, swift),
    "better_response_id (PKU-SafeRLHF)": (
        {"prompt", "response_0", "response_1", "better_response_id"},
        pku,
    ),
    "labels (SHP)": (
        {"history", "human_ref_A", "human_ref_B", "labels"},
        lambda row: (
            {"question": row["history"]}
            | of_two(row["human_ref_A"], row["human_ref_B"], 1 - 2 * index(row["labels"]))
        ),
    ),
    "summaries and choice (Summarize-from-feedback)": ({"info", "summaries", "choice"}, summaries),
    "preference_strength (HelpSteer2)": (
        {"prompt", "response_1", "response_2", "preference_strength"},
        helpsteer("prompt", "response_1", "response_2", "preference_strength"),
    ),
    "overall_preference (HelpSteer3)": (
        {"context", "response1", "response2", "overall_preference"},
        helpsteer("context", "response1", "response2", "overall_preference"),
    ),
    "conversations and winner (MT-Bench, arena)": (
        {"conversation_a", "conversation_b", "winner"},
        judged,
    ),
    "score_0 and score_1 (WebGPT)": (
        {"question", "answer_0", "answer_1", "score_0", "score_1"},
        webgpt,
    ),
    "output_1, output_2 and preference (AlpacaFarm, AlpacaEval)": (
        {"instruction", "output_1", "output_2", "preference"},
        alpaca_verdict,
    ),
    "answers by rank, best and worst (Nectar)": (
        {"prompt", "answers"},
        lambda row: (
            {"prompt": row["prompt"]} | best_and_worst(row["answers"], "answer", "rank", sign=-1)
        ),
    ),
    "answers by pm_score, best and worst (stack-exchange-preferences)": (
        {"question", "answers"},
        lambda row: (
            {"question": row["question"]} | best_and_worst(row["answers"], "text", "pm_score")
        ),
    ),
    "completions by overall_score, best and worst (UltraFeedback, original)": (
        {"instruction", "completions"},
        lambda row: (
            {"instruction": row["instruction"]}
            | best_and_worst(row["completions"], "response", "overall_score")
        ),
    ),
    "two outputs (LLaMA-Factory's older ranking files)": (
        {"instruction", "output"},
        alpaca_outputs,
    ),
}


def scored_against(row) -> str | None:
    """What is odd in the scores that a row itself gives to its answers; None where nothing is."""
    for better, worse in SCORES if isinstance(row, dict) else ():
        scores = row.get(better), row.get(worse)
        if all(isinstance(score, int | float) for score in scores):
            if scores[0] < scores[1]:
                return f"have a lower {better} than {worse}"
            return f"have {better} and {worse} alike" if scores[0] == scores[1] else None
    return None
