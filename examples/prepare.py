"""Turns published preference data into the JSON Lines that train.py reads.

    python examples/prepare.py IN [IN ...] --out PAIRS.jsonl

IN is parquet (needs pyarrow), a JSON array, or JSON Lines, each also gzipped (.gz). Columns stay as
they are, but for Anthropic's HH-RLHF, whose rows hold whole dialogues as one text,
"\\n\\nHuman: ... \\n\\nAssistant: ...": these become messages. What cannot be used is counted.
"""

import argparse
import gzip
import importlib.util
import json
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data

ROLES = {"Human": "user", "Assistant": "assistant"}
KEPT = ("prompt", "instruction", "question", "chosen", "rejected", "accept")


def read(path: Path):
    """Yields the rows of a file. Raises FileNotFoundError, or ValueError with the file's name."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".parquet":
        if importlib.util.find_spec("pyarrow") is None:
            raise ValueError(f"{path}: parquet needs pyarrow: pip install pyarrow")
        from pyarrow import parquet

        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as f:
        try:
            if f.read(1) == "[":
                f.seek(0)
                yield from json.load(f)
                return
            f.seek(0)
            yield from (json.loads(line) for line in f if line.strip())
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{path}: broken: {error}") from None


def messages_of(dialogue: str) -> list[dict] | None:
    """ "\\n\\nHuman: a\\n\\nAssistant: b" as messages; None where that is not its form."""
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + dialogue.lstrip("\n"))
    messages = [
        {"role": ROLES[role], "content": text.strip()}
        for role, text in zip(parts[1::2], parts[2::2], strict=True)
    ]
    in_turn = all(m["role"] == ("user", "assistant")[i % 2] for i, m in enumerate(messages))
    return messages if messages and not parts[0].strip() and in_turn else None


def convert(row) -> dict | str:
    """A row for train.py, or why there is none."""
    if not isinstance(row, dict) or not {"chosen", "rejected"} <= set(row):
        return "without chosen and rejected"
    row = {key: row[key] for key in KEPT if row.get(key) is not None}
    sides = row["chosen"], row["rejected"]
    if all(isinstance(s, str) and re.match(r"\s*Human:", s) for s in sides):
        chosen, rejected = map(messages_of, sides)
        if chosen is None or rejected is None:
            return "whose turns are not Human, Assistant, ..."
        if len(chosen) != len(rejected) or chosen[:-1] != rejected[:-1]:
            return "whose dialogues part before the last answer"
        if chosen[-1]["role"] != "assistant":
            return "that end with a question"
        row |= {"chosen": chosen, "rejected": rejected}
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="+", type=Path, metavar="IN")
    parser.add_argument("--out", required=True, type=Path, metavar="PAIRS.jsonl")
    args = parser.parse_args()
    dropped, n = Counter(), 0
    try:
        beside = Path(f"{args.out}.tmp")  # --out may be one of the inputs, and stays if all fails
        with open(beside, "w", encoding="utf-8") as f:
            for row in (convert(row) for path in args.inputs for row in read(path)):
                if isinstance(row, str):
                    dropped[row] += 1
                else:
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")
                    n += 1
        rows = data.load_preferences(beside)
        beside.replace(args.out)
    except (OSError, ValueError) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.out}: {n} rows, {rows[0].form}; dropped: {data.describe(dropped)}")


if __name__ == "__main__":
    main()
