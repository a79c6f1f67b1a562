"""Turns published preference data into the JSON Lines that train.py reads.

    python -m tools.prepare IN [IN ...] --out PAIRS.jsonl [--split NAME]
        [--prompt COLUMN] [--chosen COLUMN] [--rejected COLUMN]

IN is parquet or arrow (both need pyarrow), a JSON array, or JSON Lines, each also gzipped (.gz), or
a folder as `hf download` or `save_to_disk` leaves it, of which the split "train" is taken. A row is
read as

    messages    role and content, or ShareGPT's from and value; content may be in parts of text.
                Whole dialogues, or their last answers beside `prompt` or `conversations`; every
                other key of a message is kept, and `tools` too
    questions   `question`, `instruction`, `query` or `input` (or --prompt), and answers as text:
                they become messages; `input` is put after an instruction, `system` and `history`
                become turns before it
    strings     `prompt` and its continuations, which stay as they are; --prompt prompt makes them
                messages, too
    others      HH-RLHF, UltraFeedback with scores, SHP, PKU-SafeRLHF, HelpSteer, Nectar, OpenAI's
                and more: docs/recipes.md has the table

and written as prompt, chosen, rejected (and accept, tools, chat_template_kwargs). What cannot be
used is counted by reason, and what is ignored by column. --split names another split of a folder;
of a file it takes the rows with that name in a column `split`.
"""

import gzip
import importlib.util
import json
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

from formats.messages import without_nulls
from formats.rows import Preference, parse_json, warnings_of
from run.flags import page_parser
from tools.forms import convert, scored_against

SUFFIXES = (".parquet", ".arrow", ".json", ".jsonl", ".json.gz", ".jsonl.gz")
ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")


# ---------------------------------------------------------------------------------------------
# Files.


def files_of(path: Path, split: str | None) -> list[Path]:
    """The file itself, or of a folder the files of one split. Raises FileNotFoundError, ValueError.

    A file's split is its name up to "-00000-of-00003"; or its folder's name, where it is "0000" or
    of `save_to_disk`.
    """
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file or folder")
        return [path]
    splits = {}
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        hidden = any(part.startswith(".") for part in parts)
        if file.name.endswith(SUFFIXES) and file.name not in ABOUT and not hidden:
            shard = re.fullmatch(r"(.+?)-\d+-of-\d+.*", file.name)
            name = shard[1] if shard else file.name.split(".")[0]
            from_folder = name.isdigit() or (name == "data" and file.suffix == ".arrow")
            splits.setdefault(file.parent.name if from_folder else name, []).append(file)
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
    columnar = path.suffix in (".parquet", ".arrow")
    if columnar and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"{path}: {path.suffix[1:]} needs pyarrow: pip install pyarrow")
    try:
        if columnar:
            yield from enumerate(read_columns(path), 1)
            return
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as f:
            first = next((line for line in f if line.removeprefix(b"\xef\xbb\xbf").strip()), b"")
            f.seek(0)
            if first.startswith(b"version https://git-lfs"):
                raise ValueError("a Git LFS pointer, not the file itself: git lfs pull")
            if first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
                yield from enumerate(json.loads(f.read().decode("utf-8-sig")), 1)
                return
            for number, line in enumerate(f, 1):
                if line := line.removeprefix(b"\xef\xbb\xbf").strip():
                    yield number, parsed(line)
    except (ValueError, OSError, EOFError, RecursionError, zlib.error) as error:
        raise ValueError(f"{path}: broken: {error!s:.300}") from None


def rows_of(files: dict[Path, str | None], seen: Counter):
    """Yields (FILE:NUMBER, row): of a file that has a split here only the rows with this name in a
    column `split`. `seen` counts all rows by (file, that name). Raises ValueError."""
    for file, split in files.items():
        for number, row in read(file):
            name = row.get("split") if isinstance(row, dict) else None
            seen[file, name if isinstance(name, str) else None] += 1
            if split in (None, name) or isinstance(row, ValueError):
                yield f"{file}:{number}", row
    asked = [(file, split) for file, split in files.items() if split]
    if asked and not any(seen[key] for key in asked):
        named = ", ".join(str(file) for file, _ in asked)
        raise ValueError(
            f"{named}: no row has {asked[0][1]!r} in a column `split`, as --split asks"
        )


def about_splits(files: dict[Path, str | None], n_used: int, seen: Counter) -> list[str]:
    """What a user should know of the splits that rows_of has counted, in lines."""
    lines = [f"warning: {file}: no rows" for file in files if not any(file == f for f, _ in seen)]
    if others := seen.total() - n_used:
        lines.append(f"left out: {others} rows of other splits")
    whole = {file for file, split in files.items() if not split}
    names = Counter()
    for (file, name), n in seen.items():
        names[name] += n if file in whole and name else 0
    if len(+names) > 1:
        counted = ", ".join(f"{name} {n}" for name, n in names.most_common(5))
        advice = "name the file itself and --split to have one of them"
        lines.append(f"warning: the rows are of several splits ({counted}): {advice}")
    return lines


def parsed(line: bytes):
    try:
        return parse_json(line)
    except UnicodeError:
        return ValueError("not UTF-8")
    except (ValueError, RecursionError):
        return ValueError("not JSON")


def read_columns(path: Path):
    """The rows of a parquet or an arrow file."""
    import pyarrow
    from pyarrow import parquet

    try:
        if path.suffix == ".parquet":
            batches = parquet.ParquetFile(path).iter_batches()
        else:
            batches = pyarrow.ipc.open_stream(path)
        for batch in batches:
            yield from map(without_nulls, batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise ValueError(error) from None


def line_of(row: Preference) -> bytes:
    """A date, or another value that JSON has no form for, becomes text. Raises ValueError where a
    text has half a surrogate pair, which is nothing in UTF-8."""
    kept = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    kept |= {"accept": row.accept, "tools": row.tools}
    kept["chat_template_kwargs"] = row.template_kwargs
    kept = {key: value for key, value in kept.items() if value is not None}
    return json.dumps(kept, ensure_ascii=False, default=str).encode() + b"\n"


# ---------------------------------------------------------------------------------------------


def main(argv=None):
    parser = page_parser(__doc__, "prepare.py")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="IN")
    parser.add_argument("--out", required=True, type=Path, metavar="PAIRS.jsonl")
    about = "the column that asks; chosen: both answers begin with the question"
    parser.add_argument("--prompt", metavar="COLUMN", help=about)
    parser.add_argument("--chosen", metavar="COLUMN", help="the column of the better answer")
    parser.add_argument("--rejected", metavar="COLUMN", help="the column of the worse answer")
    about = 'of a folder (default: "train", or the only one); of a file: its rows with this `split`'
    parser.add_argument("--split", help=about)
    args = parser.parse_args(argv)
    try:
        answers = {"chosen": args.chosen, "rejected": args.rejected}
        answers = {key: name for key, name in answers.items() if name is not None}
        names = [*answers.values()] + ([args.prompt] if args.prompt not in (None, "chosen") else [])
        if args.prompt == "rejected":
            raise ValueError("--prompt rejected: that is an answer; name the column that asks")
        if len({*names}) < len(names):
            raise ValueError("--prompt, --chosen and --rejected name the same column twice")
        prepare(args.inputs, args.out, args.split, args.prompt, answers)
    except (OSError, ValueError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        sys.exit(2)


def prepare(
    inputs: list[Path],
    out: Path,
    split: str | None,
    column: str | None = None,
    answers: dict[str, str] | None = None,
):
    """Writes `out`, which may be one of the inputs and stays as it is where there is an error.
    Raises OSError and ValueError with the name of a file."""
    files = {
        file: None if path.is_dir() else split  # a folder's split is some of its files
        for path in inputs
        for file in files_of(path, split)
    }
    if any(path.is_dir() for path in inputs):
        print(f"taken: {', '.join(map(str, files))}")
    rows, n, forms, seen, dropped, odd = [], 0, Counter(), Counter(), Counted(), Counted()
    target = out.resolve()  # of a link, so that it stays one
    if target.exists() and not target.is_file():
        raise ValueError(f"{out}: is not a file; name one for the pairs")
    beside = target.with_name(target.name + ".tmp")
    try:
        with open(beside, "wb") as f:
            for where, row in rows_of(files, seen):
                n += 1
                try:
                    found, form = convert(row, where, column, answers)
                    f.write(line_of(found))
                except ValueError as error:
                    dropped.add(f"{error!s:.250}", where)
                    continue
                rows.append(found)
                forms[form] += 1
                if not answers and (note := scored_against(row)):  # scores are of other columns
                    odd.add(note, where)
        if not rows:
            reasons = "; ".join(dropped.lines()) or "the files are empty"
            raise ValueError(f"{next(iter(files))}: no pairs left of {n} rows: {reasons}")
        beside.replace(target)
    except OSError as error:  # of writing: `read` makes its own a ValueError
        raise OSError(f"{out}: cannot be written: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)
    print(f"{out}: {len(rows)} pairs of {seen.total()} rows")
    for form, k in forms.most_common():
        print(f"  {k} from {form}")
    texts = [row.where for row in rows if isinstance(row.prompt, str)]
    if 0 < len(texts) < len(rows):
        text = f"{len(texts)} rows are text (first: {texts[0]}), and the others are messages; only"
        more = "messages get the chat template; --prompt prompt makes messages of all"
        print(f"  warning: {text} {more}")
    lines = about_splits(files, n, seen)
    lines += [f"dropped: {line}" for line in dropped.lines()]
    lines += [f"warning: {line}" for line in odd.lines()]
    for line in lines + warnings_of(rows):
        print(f"  {line}")


class Counted(Counter):
    """How often something was met, and where first."""

    def __init__(self):
        super().__init__()
        self.first: dict[str, str] = {}

    def add(self, what: str, where: str):
        self[what] += 1
        self.first.setdefault(what, where)

    def lines(self) -> list[str]:
        lines = [f"{k} {what} (first: {self.first[what]})" for what, k in self.most_common(10)]
        others = self.total() - sum(k for _, k in self.most_common(10))
        return lines + [f"{others} others"] * bool(others)


if __name__ == "__main__":
    main()
