"""Run an example in a repository of its own.

python examples/run.py digits|regression|multi_label

Makes examples/build/NAME, a git and DVC repository with this checkout's stages and dvc.yaml and the example's data,
code and parameters, and runs the pipeline there. Run it again, also after a kill: what is done is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from ruamel.yaml import YAML

EXAMPLES = Path(__file__).resolve().parent
ROOT = EXAMPLES.parent
COPIED = (".gitignore", ".dvcignore")


def names() -> list[str]:
    """The examples: every folder here that has a params.yaml."""
    return sorted(path.parent.name for path in EXAMPLES.glob("*/params.yaml"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by its path in it, but what Python compiled."""
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def sync(target: Path, wanted: dict[str, bytes]) -> None:
    """Make the files below `target` those of `wanted`; what is the same already is not touched."""
    found = contents(target)
    for name in found.keys() - wanted.keys():
        (target / name).unlink()
    for name, content in wanted.items():
        if found.get(name) != content:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(content)


def dvc_yaml(params: bytes) -> bytes:
    """The repository's dvc.yaml; where there are columns of numbers, features.json stands for the tokenizer."""
    text = (ROOT / "dvc.yaml").read_bytes()
    if YAML(typ="safe").load(params)["data"]["feature_columns"]:
        text = text.replace(b"- data/tokenized/tokenizer\n", b"- data/tokenized/features.json\n")
    return text


def prepare(example: Path, workspace: Path, environment: dict[str, str]) -> None:
    """Make the workspace, or bring an existing one up to date; its runs, models and cache stay."""
    custom = {f"custom/{name}": content for name, content in contents(example / "custom").items()}
    sync(workspace / "stages", contents(ROOT / "stages") | custom)
    with tempfile.TemporaryDirectory() as made:
        runpy.run_path(str(example / "data.py"))["write"](Path(made))
        sync(workspace / "data" / example.name, contents(Path(made)))
    params = (example / "params.yaml").read_bytes()
    single = {name: (ROOT / name).read_bytes() for name in COPIED}
    single |= {"params.yaml": params, "dvc.yaml": dvc_yaml(params)}
    for name, content in single.items():
        if not (workspace / name).is_file() or (workspace / name).read_bytes() != content:
            (workspace / name).write_bytes(content)
    if not (workspace / ".dvc/config").is_file():  # the last that `dvc init` writes
        subprocess.run(["git", "init", "--quiet"], cwd=workspace, env=environment, check=True)
        dvc = [sys.executable, "-m", "dvc"]
        subprocess.run([*dvc, "init", "--quiet", "--force"], cwd=workspace, env=environment, check=True)


def repro(workspace: Path, environment: dict[str, str]) -> int:
    """Run the pipeline; its exit code, as a shell gives it. Signals are the pipeline's to answer."""
    process = subprocess.Popen([sys.executable, "-m", "stages", "repro"], cwd=workspace, env=environment)
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the pipeline too, which saves
    signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    code = process.wait()
    return code if code >= 0 else 128 - code


def main() -> None:
    """Prepare and run one example, then print how good its model is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=names())
    example = EXAMPLES / parser.parse_args().name
    workspace = EXAMPLES / "build" / example.name
    # A git hook's variables would point git and DVC at another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment |= {"DVC_NO_ANALYTICS": "1", "HF_HUB_OFFLINE": "1"}
    prepare(example, workspace, environment)
    code = repro(workspace, environment)
    if code:
        sys.exit(code)
    best = json.loads((workspace / "metrics/best.json").read_text())
    scores = "  ".join(f"{name} {value:.4f}" for name, value in best["test"].items())
    print(f"{example.name}: test {scores} ({os.path.relpath(workspace)}/metrics/best.json)")


if __name__ == "__main__":
    main()
