"""The flags of train.py: what they are, what they may be, and which of them a run keeps.

A field of TrainConfig is a flag, and a key of the JSON file that --config takes. Flags win over
that file, and the file over the defaults. What is unknown, of a wrong type or out of range is
refused in one sentence. By hand over argparse, because one definition serves the flags, the JSON
file, --help and what --resume compares.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches
from pathlib import Path

from formats.files import HUB_NAME, read_json


def flag(group: str, default, help: str, choices=None, least=None, below=math.inf, **more):
    """A field of TrainConfig. bare=: its value where the flag is given without one. trl=: the
    default of TRL's ORPOTrainer, for --help, where another one matters."""
    limits = {"choices": choices, "least": least, "below": below, "bare": None, "trl": None}
    return dataclasses.field(
        default=default, metadata={"group": group, "help": help} | limits | more
    )


SCHEDULES = ("cosine", "linear", "constant", "inverse_sqrt")
ENDLESS = ("constant", "inverse_sqrt")  # schedules that do not depend on the number of steps
PATHS = ("model", "data", "eval_data", "chat_template", "out")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
IO, OBJECTIVE, OPTIMIZER = "input and output", "objective", "optimizer"
LENGTH, MEMORY, RUN = "length", "memory", "run"


@dataclass
class TrainConfig:
    """The settings of a run. A field is a flag; `check` says what it may be."""

    model: str = flag(IO, None, "folder of the Hugging Face checkpoint to train or evaluate")
    data: str = flag(IO, None, "file of preference pairs to train on (JSON Lines)")
    eval_data: str = flag(IO, None, "file of held-out pairs for evaluation")
    eval_fraction: float = flag(IO, 0.0, "share of --data's prompts to hold out", least=0, below=1)
    chat_template: str = flag(IO, None, "Jinja file to use instead of the model's chat template")
    date: str = flag(
        IO, None, "day that a chat template writes, YYYY-MM-DD (default: the first start's)"
    )
    out: str = flag(IO, None, "folder for the metrics, the checkpoints and the trained model")
    overwrite: bool = flag(IO, False, "replace an earlier run in --out")
    lam: float = flag(OBJECTIVE, 0.1, "weight of L_OR; TRL calls it beta", least=0)
    sft_loss: str = flag(
        OBJECTIVE,
        "response",
        "tokens under L_SFT: those of the chosen response, or of the prompt too",
        choices=("response", "full"),
        trl="full",
    )
    lr: float = flag(OPTIMIZER, 8e-6, "peak learning rate of AdamW", least=0, trl=1e-6)
    lr_schedule: str = flag(OPTIMIZER, "cosine", "shape after the warm-up", SCHEDULES, trl="linear")
    warmup_steps: int = flag(OPTIMIZER, 10, "steps up to the peak learning rate", least=0, trl=0)
    weight_decay: float = flag(OPTIMIZER, 0.0, "decay of matrices, not of other weights", least=0)
    grad_clip: float = flag(OPTIMIZER, 1.0, "largest gradient norm; 0 disables clipping", least=0)
    adam_beta1: float = flag(OPTIMIZER, 0.9, "decay of the first moment", least=0, below=1)
    adam_beta2: float = flag(OPTIMIZER, 0.999, "decay of the second moment", least=0, below=1)
    epochs: int = flag(LENGTH, 1, "passes over the training pairs", least=1, trl=3)
    max_steps: int = flag(LENGTH, None, "number of updates; replaces --epochs", least=1)
    batch_size: int = flag(
        LENGTH,
        32,
        "pairs in a step, over all processes together",
        least=1,
        trl="8 in each process",
    )
    micro_batch_tokens: int = flag(
        MEMORY,
        None,
        "tokens at a time in each process; the result does not depend on it (default: 8192 on "
        "cuda, 2048 on cpu)",
        least=1,
    )
    shard: bool = flag(MEMORY, False, "divide weights and optimizer state over all processes")
    activation_checkpointing: int = flag(
        MEMORY,
        False,
        "blocks that each process computes twice, to save memory; without a number: all",
        least=0,
        bare=True,
    )
    lora_rank: int = flag(MEMORY, 0, "rank of LoRA adapters; 0 trains the whole model", least=0)
    lora_alpha: float = flag(MEMORY, 16.0, "adapters are scaled by alpha / rank", least=1e-3)
    lora_adapters: bool = flag(MEMORY, False, "also write OUT/adapters, which peft loads")
    max_length: int = flag(
        MEMORY, 2048, "tokens of prompt and response; longer responses are cut", least=2, trl=1024
    )
    max_prompt_length: int = flag(MEMORY, 1792, "pairs with longer prompts are dropped", least=1)
    seed: int = flag(RUN, 42, "seed of the order of pairs and of sampling", least=0, below=2**63)
    device: str = flag(RUN, None, "cpu, cuda or cuda:N (default: cuda if there is one)")
    dtype: str = flag(
        RUN,
        None,
        "dtype of matrix products (default: bfloat16 on a GPU that has it, else float32)",
        choices=("float32", "bfloat16"),
    )
    compile: bool = flag(RUN, False, "compile the blocks (torch.compile), which takes minutes")
    log_every: int = flag(RUN, 1, "steps between rows of OUT/metrics.jsonl", least=1)
    eval_every: int = flag(
        RUN, 0, "steps between evaluations, for OUT/best too; 0: only before and after", least=0
    )
    save_every: int = flag(RUN, 500, "steps between checkpoints, the last too; 0: none", least=0)
    keep: int = flag(RUN, 2, "number of checkpoints that are kept, the newest", least=1)
    resume: bool = flag(RUN, False, "continue the run in --out from its newest checkpoint")
    eval_only: bool = flag(RUN, False, "evaluate --model and print one JSON object")
    dry_run: bool = flag(RUN, False, "print the plan, try the largest micro-batch, and stop")

    @property
    def token_budget(self) -> int:
        """Of a micro-batch. A CPU is no faster with more at a time, and its memory is smaller."""
        on_gpu = (self.device or "").startswith("cuda")
        return self.micro_batch_tokens or (8192 if on_gpu else 2048)

    def check(self, source: str = ""):
        """Raises ValueError with the first flag whose value is of the wrong type or range."""
        for f in dataclasses.fields(self):
            value, name = getattr(self, f.name), f"{source}--{dashed(f.name)}"
            if value is None:
                continue
            wanted = (int, float) if f.type is float else f.type
            a_flag = f.type is bool or f.metadata["bare"] is not None  # may be true or false
            if not isinstance(value, wanted) or (isinstance(value, bool) and not a_flag):
                raise ValueError(f"{name} must be {KINDS[f.type]}, not {value!r}")
            choices, least, below = (f.metadata[key] for key in ("choices", "least", "below"))
            if choices and value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
            if least is not None and not least <= value < below:
                limit = f" and below {below}" if below < math.inf else ""
                raise ValueError(f"{name} must be at least {least}{limit}, not {value}")
        if self.date is not None:
            try:
                date.fromisoformat(self.date)
            except ValueError:
                raise ValueError(f"{source}--date must be YYYY-MM-DD, not {self.date!r}") from None
        if self.shard and self.lora_rank:
            raise ValueError(
                f"{source}--shard and --lora-rank do not go together: a frozen model is not sharded"
            )
        if self.lora_adapters and not self.lora_rank:
            raise ValueError(f"{source}--lora-adapters needs --lora-rank, which makes adapters")
        if self.dry_run and self.eval_only:
            raise ValueError(f"{source}--dry-run plans a training run, and --eval-only is none")

    def check_together(self):
        """Raises ValueError where a flag is missing that the others ask for, or two contradict."""
        if self.eval_only:
            needed = ["model", "data" if self.eval_fraction else "eval_data"]
        else:
            needed = ["model", "data"] if self.dry_run else ["model", "data", "out"]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"--{dashed(name)} is needed (see python train.py --help)")
        if self.resume and self.out is None:
            raise ValueError("--resume needs --out, the folder of the run that it continues")
        if self.eval_fraction and self.eval_data:
            raise ValueError("--eval-fraction and --eval-data do not go together: give one of them")
        if self.eval_every and not (self.eval_data or self.eval_fraction):
            raise ValueError(
                "--eval-every needs evaluation data: add --eval-data or --eval-fraction"
            )


def dashed(name: str) -> str:
    return name.replace("_", "-")


def settings_of(config: TrainConfig) -> dict:
    """The flags as --config takes them from any folder, on any machine: all except those that say
    where this start of the run writes and computes."""
    settings = dataclasses.asdict(config) | {
        name: str(Path(path).resolve()) for name in PATHS if (path := getattr(config, name))
    }
    left_out = ("out", "overwrite", "resume", "device")
    return {name: value for name, value in settings.items() if name not in left_out}


SETTINGS = "run.json"  # a name that no Hugging Face folder has


def read_settings(folder: Path) -> dict | None:
    """The settings of a run or of a checkpoint; None where there are none that can be read. Older
    versions called the file config.json, as a model's is called too."""
    for name in (SETTINGS, "config.json"):
        with contextlib.suppress(OSError, ValueError):
            settings = json.loads((folder / name).read_text(encoding="utf-8"))
            if isinstance(settings, dict) and "lam" in settings:
                return settings
    return None


# ---------------------------------------------------------------------------------------------
# Resuming.

LENGTHS = ("epochs", "max_steps")
FREE_ON_RESUME = (
    *("data", "eval_data", "chat_template"),  # the pairs that they give are compared
    *("keep", "shard", "micro_batch_tokens", "activation_checkpointing", "compile"),
    *("log_every", "eval_every", "save_every", "lora_adapters"),
)


def refuse_other_settings(config: TrainConfig, then: dict, where: Path, may_move: bool = False):
    """Raises ValueError with the first flag that is not what it was, and may not change. may_move:
    --model may be another folder, as its weights are compared elsewhere (load_checkpoint)."""
    endless = config.lr_schedule in ENDLESS
    for name, now in settings_of(config).items():
        before = then.get(name, getattr(TrainConfig, name))
        if name in PATHS and before:
            before = str(Path(before).resolve())
        if now == before or name in FREE_ON_RESUME or (name in LENGTHS and endless):
            continue
        if name == "date" and before is None:  # a run of an older version, which did not keep it
            continue
        if name == "model" and may_move:
            continue
        advice = ""
        if name in LENGTHS:
            advice = (
                f"; the {config.lr_schedule} schedule ends with its last step, so train longer by "
                "a new run with this run's model folder as --model"
            )
        raise ValueError(f"--resume: {name} was {before!r} in {where}, now {now!r}{advice}")


# ---------------------------------------------------------------------------------------------
# The command line.

BUILTIN = Path(__file__).parents[1] / "examples" / "facts" / "train.json"

# Flags of TRL, transformers and the authors' repository, by ours that do the same. The table of
# docs/trl.md is this one; a test holds the two together.
ELSEWHERE = {
    "model": "model-name-or-path model-name",
    "data": "dataset-name dataset train-file",
    "eval-data": "eval-file validation-file",
    "out": "output-dir",
    "overwrite": "overwrite-output-dir",
    "lam": "beta alpha lambda",
    "lr": "learning-rate",
    "lr-schedule": "lr-scheduler-type",
    "warmup-steps": "warmup-ratio num-warmup-steps",
    "grad-clip": "max-grad-norm",
    "epochs": "num-train-epochs num-epochs",
    "batch-size": "per-device-train-batch-size train-batch-size",
    "micro-batch-tokens": "gradient-accumulation-steps per-device-eval-batch-size",
    "shard": "fsdp deepspeed",
    "activation-checkpointing": "gradient-checkpointing",
    "lora-rank": "lora-r use-peft",
    "max-length": "max-seq-length response-max-length",
    "max-prompt-length": "prompt-max-length",
    "dtype": "bf16 fp16 torch-dtype",
    "compile": "torch-compile",
    "log-every": "logging-steps",
    "eval-every": "eval-steps eval-strategy",
    "save-every": "save-steps save-strategy",
    "keep": "save-total-limit",
    "resume": "resume-from-checkpoint",
    "eval-only": "do-eval",
}


def did_you_mean(names: list[str]) -> str:
    """For flags that are unknown here: those of ours that are meant, with their help, or ""."""
    ours = {dashed(f.name): f.metadata["help"] for f in dataclasses.fields(TrainConfig)}
    elsewhere = {theirs: name for name in ELSEWHERE for theirs in ELSEWHERE[name].split()}
    meant = []
    for name in (dashed(name.strip("-")) for name in names):
        close = get_close_matches(name, [*ours, *elsewhere], 1)
        meant += [elsewhere.get(name, name) for name in ([name] if name in elsewhere else close)]
    meant = [f"--{name} ({ours[name].split(' (')[0]})" for name in dict.fromkeys(meant)]
    return f"; did you mean {' and '.join(meant)}?" if meant else ""


class Parser(argparse.ArgumentParser):
    def error(self, message):  # without the dump of the usage
        if message.startswith("unrecognized"):
            message += did_you_mean(re.findall(r"(?<!\S)--[\w-]+", message))
        raise ValueError(f"{message} (see python train.py --help)")


def page_parser(page: str, prog: str | None = None) -> argparse.ArgumentParser:
    """A parser whose help is this page, for instance __doc__; it already says how to call it."""
    shape = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=prog, usage=argparse.SUPPRESS, description=page, formatter_class=shape
    )


class Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=28, width=100)


def make_parser(about: str) -> Parser:
    """A flag for each field of TrainConfig, in its group; only what is given is set."""
    parser = Parser(
        prog="train.py",
        usage="python train.py [--model DIR --data FILE --out DIR] [--config FILE] [flags]",
        description=about,
        formatter_class=Help,
        allow_abbrev=False,
    )
    groups = {}
    for f in dataclasses.fields(TrainConfig):
        group, choices, bare = (f.metadata[key] for key in ("group", "choices", "bare"))
        groups.setdefault(group, parser.add_argument_group(group))
        shown = "" if f.default is None or f.default is False else f" (default: {f.default})"
        if f.metadata["trl"] is not None:
            shown = shown.replace(")", f"; in TRL: {f.metadata['trl']})")
        options = {"help": f.metadata["help"] + shown, "default": argparse.SUPPRESS}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": f.type, "choices": choices}
            kind = "PATH" if f.name in PATHS else f.type.__name__.upper()
            options["metavar"] = None if choices else kind
            if bare is not None:
                options |= {"nargs": "?", "const": bare}
        groups[group].add_argument(f"--{dashed(f.name)}", **options)
    groups[IO].add_argument(
        "--config", metavar="PATH", help="JSON file of flags; its paths are relative to its folder"
    )
    return parser


def with_negatives(argv: list[str] | None) -> list[str]:
    """--lr -1e-5 as --lr=-1e-5: argparse takes a negative power of ten for a flag."""
    argv = sys.argv[1:] if argv is None else argv
    joined = []
    for word in argv:
        if joined and joined[-1].startswith("--") and re.fullmatch(r"-[\d.]+e[+-]?\d+", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


# A flag that is given by hand, and what it replaces in the file of --config beside its own value.
REPLACED = (
    ("out", "overwrite"),  # which is about the folder that the file names itself
    ("epochs", "max_steps"),
    ("eval_data", "eval_fraction"),
    ("eval_fraction", "eval_data"),
)


def parse(argv: list[str] | None, about: str = "") -> TrainConfig:
    """Flags over --config over defaults. about: what --help says first. Raises ValueError,
    FileNotFoundError."""
    given = vars(make_parser(about).parse_args(with_negatives(argv)))
    config_file = given.pop("config")
    if config_file is None and not {"model", "data"} & set(given):
        config_file = BUILTIN
    if config_file is not None:
        settings = read_config(Path(config_file))
    else:
        settings = settings_to_evaluate(given) if {"eval_only", "model"} <= set(given) else {}
    for flag_by_hand, of_the_file in REPLACED:
        if flag_by_hand in given:
            settings.pop(of_the_file, None)
    config = TrainConfig(**(settings | given))
    config.check()
    config.check_together()
    if config.resume and config.dtype is None:  # another device may have another default
        config.dtype = (read_settings(Path(config.out)) or {}).get("dtype")
        config.check()
    return config


# What the numbers of an evaluation depend on, beside the weights.
HELD_OUT = ("data", "eval_data", "eval_fraction")
EVALUATION = (
    *("lam", "sft_loss", "chat_template", "date"),
    *("max_length", "max_prompt_length", "seed", "dtype"),
)


def settings_to_evaluate(given: dict) -> dict:
    """How the run in whose folder --model lies evaluates, less what is given by hand; {} where the
    model lies in no run. Says so."""
    out = Path(os.path.abspath(given["model"])).parent
    then = read_settings(out) or {}
    own_template = (Path(given["model"]) / "chat_template.jinja").is_file()
    if own_template or not Path(str(then.get("chat_template"))).is_file():
        then.pop("chat_template", None)  # the model's is that with which it was trained
    names = EVALUATION if set(HELD_OUT) & set(given) else (*HELD_OUT, *EVALUATION)
    taken = {name: then[name] for name in names if then.get(name) is not None}
    taken = {name: value for name, value in taken.items() if name not in given}
    TrainConfig(**taken).check(f"{out / SETTINGS}: ")
    if taken and os.environ.get("RANK", "0") == "0":
        words = " ".join(f"--{dashed(name)} {value}" for name, value in taken.items())
        print(f"train.py: as the run in {out}: {words}", file=sys.stderr)
    return taken


def read_config(file: Path) -> dict:
    """A JSON object of flag names, its paths made relative to the current folder."""
    settings = read_json(file, "--config takes a JSON file of flags")
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    if unknown := sorted(set(settings) - set(names)):
        meant = did_you_mean(unknown) or f"; known: {', '.join(names)}"
        raise ValueError(f"{file}: unknown: {', '.join(unknown)}{meant}")
    for name in PATHS:
        if isinstance(value := settings.get(name), str):
            beside = os.path.relpath(file.parent / value)
            # ORG/NAME may be a model on the hub, if there is no such folder. One in the current
            # folder is not meant, but shows that the value is a path.
            is_path = os.path.exists(beside) or os.path.exists(value)
            may_be_on_hub = name == "model" and "/" in value and re.fullmatch(HUB_NAME, value)
            settings[name] = value if may_be_on_hub and not is_path else beside
    TrainConfig(**settings).check(f"{file}: ")
    return settings
