"""Turns published preference data into the JSON Lines that train.py reads.

    python -m tools.prepare IN [IN ...] --out PAIRS.jsonl

IN is parquet (needs pyarrow), a JSON array, or JSON Lines, each also gzipped (.gz), or a folder as
`hf download` leaves it, of which the split "train" is taken (or --split). A row is read as

    messages    role and content, or ShareGPT's from and value; content may be in parts of text.
                Whole dialogues, or their last answers beside `prompt` or `conversations`
    HH-RLHF     whole dialogues as one text, "\\n\\nHuman: ... \\n\\nAssistant: ..."
    questions   `question`, `instruction` or `input`, and answers as text: they become messages;
                `input` is put after an instruction, and `system` becomes a turn of its own
    strings     `prompt` and its continuations, which stay as they are

and written as prompt, chosen, rejected (and accept). What cannot be used is counted by reason, and
what is ignored by column.
"""

import gzip
import importlib.util
import json
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

from formats.rows import Preference, parse_json, preference, warnings_of
from run.flags import page_parser

ROLES = {"Human": "user", "Assistant": "assistant"}  # HH-RLHF's
ROLES |= {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"}
QUESTIONS = ("instruction", "question", "input")
SUFFIXES = (".parquet", ".json", ".jsonl", ".json.gz", ".jsonl.gz")


# ---------------------------------------------------------------------------------------------
# Files.


def files_of(path: Path, split: str | None) -> list[Path]:
    """The file itself, or of a folder the files of one split. Raises FileNotFoundError, ValueError.

    A file's split is its name up to "-00000-of-00003", or where it is "0000" its folder's name.
    """
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file or folder")
        return [path]
    splits = {}
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        hidden = any(part.startswith(".") for part in parts)
        if file.name.endswith(SUFFIXES) and file.name != "dataset_infos.json" and not hidden:
            name = re.split(r"-\d+-of-\d+|\.", file.name)[0]
            splits.setdefault(file.parent.name if name.isdigit() else name, []).append(file)
    if not splits:
        raise ValueError(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}")
    names = [split] if split else ["train"] if "train" in splits else list(splits)
    if not split and len(names) > 1:
        names = [name for name in names if name.startswith("train")] or names
    if len(names) > 1 or names[0] not in splits:
        raise ValueError(f"{path}: its splits are {', '.join(splits)}: name one with --split")
    return splits[names[0]]


def read(path: Path):
    """Yields (number, row): a ValueError in place of a row that is not JSON. Numbers are lines in
    JSON Lines, else rows, from 1. Raises ValueError where the file itself is broken."""
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path}: parquet needs pyarrow: pip install pyarrow")
    try:
        if path.suffix == ".parquet":
            yield from enumerate(read_parquet(path), 1)
            return
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            first = next((line for line in f if line.removeprefix(b"\xef\xbb\xbf").strip()), b"")
            f.seek(0)
            if first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                yield from enumerate(json.loads(f.read().decode("utf-8-sig")), 1)
                return
            for number, line in enumerate(f, 1):
                if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                    yield number, parsed(line)
    except (ValueError, OSError, EOFError, RecursionError, zlib.error) as error:
        raise ValueError(f"{path}: broken: {error!s:.300}") from None


def parsed(line: bytes):
    try:
        return parse_json(line)
    except UnicodeError:
        return ValueError("not UTF-8")
    except (ValueError, RecursionError):
        return ValueError("not JSON")


def read_parquet(path: Path):
    import pyarrow
    from pyarrow import parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(error) from None


# ---------------------------------------------------------------------------------------------
# Rows.


def dialogue_of(text: str) -> list[dict]:
    """ "\\n\\nHuman: a\\n\\nAssistant: b" as messages."""
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip("\n"))
    messages = [
        {"role": ROLES[role], "content": said.strip()}
        for role, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    in_turn = all(m["role"] == ("user", "assistant")[i % 2] for i, m in enumerate(messages))
    if parts[0].strip() or not in_turn:
        raise ValueError("turns are not Human, Assistant, ...")
    return messages


def messages_of(value):
    """Messages of every form as role and content; anything else as it is. A system message without
    content is left out."""
    if not isinstance(value, dict | list):
        return value
    messages = []
    for m in [value] if isinstance(value, dict) else value:
        if not isinstance(m, dict):
            raise ValueError("a message is not an object")
        role, content = (
            m.get(new) if m.get(new) is not None else m.get(old)
            for new, old in (("role", "from"), ("content", "value"))
        )
        if isinstance(content, list):
            texts = [p.get("text") if isinstance(p, dict) else None for p in content]
            if not all(isinstance(text, str) for text in texts):
                raise ValueError("a message's content has parts that are not text")
            content = "".join(texts)
        if role == "system" and not content:
            continue
        if content is None:
            raise ValueError("a message's content is null")
        messages.append({"role": ROLES.get(role, role), "content": content})
    return messages


def line_of(row: Preference) -> bytes:
    """Raises ValueError where a text has half a surrogate pair, which is nothing in UTF-8."""
    kept = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    kept |= {} if row.accept is None else {"accept": row.accept}
    return json.dumps(kept, ensure_ascii=False).encode() + b"\n"


def convert(row, where: str) -> tuple[Preference, str]:
    """A row of any form as train.py's, and what was made of it, in words. Raises ValueError with
    the reason why there is none."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is expected, not {type(row).__name__}")
    row = {key: value for key, value in row.items() if value is not None}
    row |= {key: messages_of(row[key]) for key in ("chosen", "rejected") if key in row}
    sides = row.get("chosen"), row.get("rejected")
    if all(isinstance(side, str) and re.match(r"\s*Human:", side) for side in sides):
        sides = chosen, rejected = tuple(map(dialogue_of, sides))
        if len(chosen) != len(rejected) or chosen[:-1] != rejected[:-1]:
            raise ValueError("dialogues part before the last answer")
        if chosen[-1]["role"] != "assistant":
            raise ValueError("dialogues end with a question")
    texts = all(isinstance(side, str) for side in sides)
    last_answers = all(isinstance(side, list) and len(side) == 1 for side in sides)

    name = next((key for key in ("prompt", *QUESTIONS, "conversations") if row.get(key)), "prompt")
    prompt, system, form = messages_of(row.pop(name, None)), row.get("system"), ""
    if isinstance(prompt, str) and (last_answers or (texts and (name in QUESTIONS or system))):
        form = f"{name} as the user's message"
        if name in ("instruction", "question") and isinstance(row.get("input"), str):
            if more := row.pop("input"):
                prompt = f"{prompt}\n\n{more}"
            form = f"{name} and input as the user's message"
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list) and texts:
        sides = [[{"role": "assistant", "content": side}] for side in sides]
    if "chosen" in row and "rejected" in row:
        row |= {"chosen": sides[0], "rejected": sides[1]}
    found = preference(row | ({} if prompt is None else {"prompt": prompt}), where)
    form = form or ("strings" if isinstance(found.prompt, str) else "messages")
    unused = "system" in found.ignored and isinstance(system, str)
    if unused and isinstance(found.prompt, list) and found.prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": system}, *found.prompt]
        ignored = tuple(key for key in found.ignored if key != "system")
        found = found._replace(prompt=prompt, ignored=ignored)
        form += ", system as a message"
    return found, form


# ---------------------------------------------------------------------------------------------


def main(argv=None):
    parser = page_parser(__doc__, "prepare.py")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="IN")
    parser.add_argument("--out", required=True, type=Path, metavar="PAIRS.jsonl")
    parser.add_argument("--split", help='of a folder (default: "train", or the only one)')
    args = parser.parse_args(argv)
    try:
        prepare(args.inputs, args.out, args.split)
    except (OSError, ValueError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        sys.exit(2)


def prepare(inputs: list[Path], out: Path, split: str | None):
    """Writes `out`, which may be one of the inputs and stays as it is where there is an error.
    Raises OSError and ValueError with the name of a file."""
    files = [file for path in inputs for file in files_of(path, split)]
    if any(path.is_dir() for path in inputs):
        print(f"taken: {', '.join(map(str, files))}")
    rows, forms, n, dropped, first = [], Counter(), 0, Counter(), {}
    beside = out.with_name(out.name + ".tmp")
    try:
        with open(beside, "wb") as f:
            for where, row in ((f"{file}:{i}", row) for file in files for i, row in read(file)):
                n += 1
                try:
                    found, form = convert(row, where)
                    f.write(line_of(found))
                    rows.append(found)
                    forms[form] += 1
                except ValueError as error:
                    reason = f"{error!s:.200}"
                    dropped[reason] += 1
                    first.setdefault(reason, where)
        drops = [f"{k} {why} (first: {first[why]})" for why, k in dropped.most_common(10)]
        if len(dropped) > 10:
            drops.append(f"{n - len(rows) - sum(k for _, k in dropped.most_common(10))} others")
        if not rows:
            reasons = "; ".join(drops) or "the files are empty"
            raise ValueError(f"{files[0]}: no pairs left of {n} rows: {reasons}")
        beside.replace(out)
    except OSError as error:  # of writing: `read` makes its own a ValueError
        raise OSError(f"{out}: cannot be written: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)
    print(f"{out}: {len(rows)} pairs of {n} rows")
    for form, k in forms.most_common():
        print(f"  {k} from {form}")
    for line in [f"dropped: {line}" for line in drops] + warnings_of(rows):
        print(f"  {line}")


if __name__ == "__main__":
    main()
