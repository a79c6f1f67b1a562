"""What a published table needs: Markdown, and where, when and with what it was made.

For the reports of bench/, conformance/ and experiments/.
"""

import importlib.metadata
import os
import platform
import sys
from datetime import date
from pathlib import Path


def table(rows: list) -> str:
    """Markdown; the first row is the heads."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(map(str, row)) + " |\n" for row in rows)


def processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def about_machine() -> dict:
    """What a reader needs to know of where something ran."""
    machine = {"cpu": processor(), "cores": os.cpu_count()}
    machine |= {"torch": importlib.metadata.version("torch"), "python": platform.python_version()}
    return machine | {"date": date.today().isoformat()}


def head(threads: int) -> str:
    """The same as text, with the versions of peers and the command."""
    versions = []
    for package in ("torch", "trl", "transformers", "liger_kernel"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    module = os.path.relpath(sys.argv[0]).removesuffix(".py").replace(os.sep, ".")
    command = " ".join(["python -m", module, *sys.argv[1:]])
    return (
        f"{date.today()}, {processor()}, {threads} of {os.cpu_count()} cores\n"
        f"python {platform.python_version()}, {', '.join(versions)}\n`{command}`\n"
    )


def write(text: str, out: Path, append: bool = False):
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a" if append else "w", encoding="utf-8") as file:
        file.write(text)
