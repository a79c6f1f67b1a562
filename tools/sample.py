"""Talks to a model, or has it answer a file of questions for the public judges.

    python -m tools.sample MODEL "question"          one answer, streamed
    python -m tools.sample MODEL                     a dialogue; an empty line ends it
    python -m tools.sample MODEL --file QUESTIONS --out ANSWERS

The model's own chat template is used; a folder without one was trained on plain text, and gets
plain text. QUESTIONS is JSON or JSON Lines: with `instruction` (AlpacaEval's set; or `prompt`,
`question`) ANSWERS is AlpacaEval's output file, with `turns` it is MT-Bench's answer file.
"""

import argparse
import functools
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
from formats.files import model_folder
from model import Transformer
from run.answers import answers
from run.processes import has_bfloat16


def complain(message):
    print(f"sample.py: {message}", file=sys.stderr)


def context_of(model) -> str:
    return f"model's context of {model.config.max_seq_len}"


def prompt_ids(model, tokenizer, messages: list[dict], plain: bool) -> list[int]:
    """What the model is to continue: the dialogue by its template, or just its text. Raises
    ValueError where it has a token that the embedding lacks."""
    if plain:
        text = "\n".join(m["content"] for m in messages)
    else:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids, n = data.encode_prompt(tokenizer, text, chat=not plain), model.config.vocab_size
    if (i := max(ids, default=0)) >= n:
        token = f"the token {tokenizer.decode([i])!r}, {i}, is beyond the embedding"
        raise ValueError(f"{token}, which ends with {n - 1}: leave it out of the text")
    return ids


def stream(model, tokenizer, ids: list[int], max_new: int, **sampling) -> str:
    """Prints an answer as it comes, and returns it."""
    new, shown = [], ""
    # decoded after a fixed token, so that no leading space is taken away
    head, ends = tokenizer.decode(ids[-1:]), tokenizer.end_ids()
    for token in model.stream([ids], max_new, **sampling):
        if token.item() in ends:
            break
        new.append(token.item())
        text = tokenizer.decode([ids[-1], *new])[len(head) :]
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: wait for the rest
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    return shown.strip()


def read_questions(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8-sig")
    lines = text.split("\n")  # not splitlines(), as a text may hold U+2028, which JSON allows
    try:
        whole = text.lstrip().startswith("[")
        rows = json.loads(text) if whole else [json.loads(x) for x in lines if x.strip()]
    except ValueError as error:
        raise ValueError(f"{path}: neither JSON nor JSON Lines: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no questions in it")
    for i, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not turns_of(row):
            raise ValueError(f"{path}: row {i} has no instruction, prompt, question or turns")
        if not all(isinstance(turn, str) for turn in turns_of(row)):
            raise ValueError(f"{path}: row {i}: what is asked must be text")
    return rows


def turns_of(row: dict) -> list:
    """What a row asks, one question or several; empty where it asks nothing."""
    if isinstance(turns := row.get("turns"), list) and turns:
        return turns
    keys = ("turns", "instruction", "prompt", "question")
    asked = next((x for key in keys if (x := row.get(key))), None)
    if isinstance(asked, str) and (more := row.get("input")):
        asked = f"{asked}\n\n{more}"  # Alpaca's, joined as tools/prepare.py joins it
    return [asked] if asked else []


def answer_file(
    model, tokenizer, rows: list[dict], name: str, plain: bool, **options
) -> list[dict]:
    """Every question's answers, turn by turn, in the form that AlpacaEval or MT-Bench reads."""
    asked = [turns_of(row) for row in rows]
    dialogues = [[] for _ in rows]
    for turn in range(max(map(len, asked))):
        active = [i for i in range(len(rows)) if turn < len(asked[i])]
        for i in active:
            dialogues[i].append({"role": "user", "content": asked[i][turn]})
        prompts = []
        for i in active:
            where = f"row {i + 1}, turn {turn + 1}"
            try:
                prompts.append(prompt_ids(model, tokenizer, dialogues[i], plain))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            if (n := len(prompts[-1])) >= model.config.max_seq_len:
                fills = f"fills the {context_of(model)}: its answer is empty"
                complain(f"{where}, has {n} tokens and {fills}")
        for i, text in zip(active, answers(model, tokenizer, prompts, **options), strict=True):
            dialogues[i].append({"role": "assistant", "content": text})
    said = [[m["content"] for m in dialogue[1::2]] for dialogue in dialogues]
    if "turns" not in rows[0]:
        return [
            {"instruction": q[0], "output": a[0], "generator": name}
            for q, a in zip(asked, said, strict=True)
        ]
    return [
        {
            "question_id": row.get("question_id", i),
            "answer_id": f"{name}-{row.get('question_id', i)}",
            "model_id": name,
            "choices": [{"index": 0, "turns": a}],
            "tstamp": time.time(),
        }
        for i, (row, a) in enumerate(zip(rows, said, strict=True))
    ]


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--file", type=Path, metavar="QUESTIONS")
    parser.add_argument("--out", type=Path, metavar="ANSWERS")
    parser.add_argument("--name", help="the model's name in ANSWERS (default: its folder's)")
    parser.add_argument("--plain", action="store_true", help="no chat template")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--batch-tokens",
        type=int,
        default=8192,
        help="of questions and answers in --file that go together, at their longest (default 8192: "
        "up to 4 GB of keys and values for a model of 7B); more is faster",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def talk(model, tokenizer, question: str | None, plain: bool, **options):
    """Answers the question, or where there is none those that are typed, until an empty line."""
    messages = []
    while asked := question or read_line():
        messages = [*([] if plain else messages), {"role": "user", "content": asked}]
        what = "the dialogue" if len(messages) > 1 else "the question"
        try:
            ids = prompt_ids(model, tokenizer, messages, plain)
        except ValueError as error:
            complain(f"{what}: {error}")
            sys.exit(2)
        if len(ids) >= model.config.max_seq_len:
            complain(f"{what} has {len(ids)} tokens and fills the {context_of(model)}")
            sys.exit(2)
        messages.append({"role": "assistant", "content": stream(model, tokenizer, ids, **options)})
        if question:
            break


def read_line() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


def check(args: argparse.Namespace):
    """Raises ValueError where the flags do not go together or are out of range."""
    if args.file and args.question is not None:
        raise ValueError("a question and --file: give one of the two")
    if bool(args.file) != bool(args.out):
        raise ValueError("--file and --out belong together")
    if args.out and not args.out.absolute().parent.is_dir():
        raise ValueError(f"--out {args.out}: there is no folder {args.out.parent}")
    if args.out and args.out.is_dir():
        raise ValueError(f"--out {args.out}: this is a folder; name a file for the answers")
    for name in ("max_new_tokens", "batch_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature {args.temperature}: a number from 0 is wanted")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p {args.top_p}: a number above 0 and up to 1 is wanted")
    if args.top_p is not None and args.temperature == 0:
        raise ValueError("--top-p: has no effect at --temperature 0, the default; give both flags")


def dtype_on(device: str) -> torch.dtype:
    """bfloat16 where the device has it. Raises ValueError where there is no such device."""
    try:
        return torch.bfloat16 if has_bfloat16(torch.device(device)) else torch.float32
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {device}: {reason}") from None


def main(argv=None):
    try:
        run(parse(argv))
    except KeyboardInterrupt:  # as most people leave a dialogue
        complain("stopped by Ctrl-C")
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        complain(f"{error}; lower --max-new-tokens, or --batch-tokens of --file")
        sys.exit(2)


def run(args: argparse.Namespace):
    try:
        check(args)
        dtype = dtype_on(args.device)
        args.model = model_folder(args.model)
        model = Transformer.from_pretrained(args.model, args.device, dtype)
        tokenizer = data.load_tokenizer(args.model)
        rows = read_questions(args.file) if args.file else []
    except (OSError, ValueError, RuntimeError) as error:  # the last: it does not fit the device
        complain(error)
        sys.exit(2)
    # train.py writes the authors' template into the folder of a model trained on messages with it.
    own = (args.model / "chat_template.jinja").is_file()
    plain = args.plain or (not tokenizer.has_chat_template and not own)
    if not plain:
        complain("what is asked goes through the chat template; --plain leaves that out")
    sampling = {"temperature": args.temperature, "top_p": args.top_p}
    sampling["generator"] = torch.Generator(args.device).manual_seed(args.seed)
    options = {"max_new": args.max_new_tokens, **sampling}
    if args.file:
        name = args.name or args.model.resolve().name
        options |= {
            "batch_tokens": args.batch_tokens,
            "progress": functools.partial(tqdm, disable=None),
        }
        try:
            made = answer_file(model, tokenizer, rows, name, plain, **options)
        except ValueError as error:
            complain(f"{args.file}: {error}")
            sys.exit(2)
        lines = "turns" in rows[0]
        text = "\n".join(map(json.dumps, made)) if lines else json.dumps(made, indent=1)
        try:
            args.out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            complain(error)
            sys.exit(2)
        return print(f"{args.out}: {len(made)} answers")
    talk(model, tokenizer, args.question, plain, **options)


if __name__ == "__main__":
    main()
