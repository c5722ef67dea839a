"""Stand-ins for three schedulers: each reads a recipe of examples/schedulers as it is shipped, runs its commands here,
and applies the rule that the scheduler's documentation states for how they ended.

    https://kubernetes.io/docs/tasks/job/pod-failure-policy, and batch/v1's PodFailurePolicyRule
    https://docs.skypilot.co/en/latest/examples/managed-jobs.html#recovering-from-application-failures
    https://docs.github.com/actions: workflow syntax, workflow cancellation, the cache's keys, GITHUB_TOKEN
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "examples/schedulers"
SECONDS = 120.0  # nothing here takes as long


@dataclass
class Ending:
    """How a scheduler left a job, and the exit codes of its starts (128 + the signal of one that was killed)."""

    state: str
    codes: list[int] = field(default_factory=list)


class Place:
    """Where commands of a recipe run: below `folder`, each project a copy of `source`, whose python this one is."""

    def __init__(self, folder: Path, source: Path, env: dict[str, str] | None = None) -> None:
        self.folder, self.source = folder, source
        commands = folder / "bin"
        commands.mkdir(parents=True)
        self.dispatches = folder / "dispatches"
        # What a recipe installs is here already.
        python = f'if [ "$1 $2" = "-m pip" ]; then exit 0; fi\nexec "{sys.executable}" "$@"'
        for name, script in {"python": python, "gh": f'echo "$@" >> "{self.dispatches}"'}.items():
            (commands / name).write_text(f"#!/bin/sh\n{script}\n")
            (commands / name).chmod(0o755)
        path = os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.env = {**os.environ, **(env or {}), "PATH": path}

    def checkout(self, name: str, *ignored: str) -> Path:
        """The project as it was given to the scheduler, in place of what is in that folder."""
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self.source, target, ignore=shutil.ignore_patterns(*ignored), symlinks=True)
        return target

    def start(self, command: list[str], folder: Path, **env: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, cwd=folder, env={**self.env, **env}, start_new_session=True)

    def run(self, command: list[str], folder: Path, **env: str) -> int:
        return exit_code(self.start(command, folder, **env))


def exit_code(process: subprocess.Popen[bytes]) -> int:
    """As a shell and a container's runtime tell it."""
    try:
        code = process.wait(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return 128 - code if code < 0 else code


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> bool:
    """Whether `condition` came true while the process ran."""
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return False


# --- Kubernetes


def kubernetes(
    place: Place,
    change: Callable[[dict[str, Any]], None] = lambda job: None,
    evict: list[Callable[[], bool]] | None = None,
) -> Ending:
    """A Job until it is complete or failed. A pod is evicted as soon as the first of `evict`, which it then loses,
    says so; a pod's container gets SIGTERM, and SIGKILL when its time is over."""
    # Two folders of a pod are two here: its volume, and the project in its image.
    places = {"state": str(place.folder / "volume"), "project": str(place.source)}
    text = (RECIPES / "kubernetes.yaml").read_text()
    text = re.sub(r"(?<![\w/.])/(state|project)\b", lambda match: places[match[1]], text)
    claim, job = yaml.safe_load_all(text)
    change(job)
    pod = job["spec"]["template"]["spec"]
    rules = job["spec"].get("podFailurePolicy", {"rules": []})["rules"]
    (container,) = pod["containers"]
    check_job(claim, pod, rules)
    Path(places["state"]).mkdir()
    ending, failed = Ending("Running"), 0
    while True:
        conditions: list[str] = []
        for first in pod["initContainers"]:
            assert place.run([*first["command"], *first["args"]], place.folder) == 0
        process = place.start(container["command"], Path(container["workingDir"]))
        if evict and wait_for(evict[0], process):
            evict.pop(0)
            conditions.append("DisruptionTarget")
            process.terminate()
            try:
                process.wait(pod["terminationGracePeriodSeconds"])
            except subprocess.TimeoutExpired:
                process.kill()
        code = exit_code(process)
        ending.codes.append(code)
        if code == 0:
            ending.state = "Complete"
            return ending
        action = next((rule["action"] for rule in rules if fits(rule, container["name"], code, conditions)), "Count")
        if action == "FailJob":
            ending.state = "Failed: PodFailurePolicy"
            return ending
        failed += action == "Count"
        if failed > job["spec"]["backoffLimit"]:
            ending.state = "Failed: BackoffLimitExceeded"
            return ending


def fits(rule: dict[str, Any], container: str, code: int, conditions: list[str]) -> bool:
    """Whether a rule is about a pod that ended like this."""
    if exits := rule.get("onExitCodes"):
        named = exits.get("containerName") in (None, container)
        return named and (code in exits["values"]) == (exits["operator"] == "In")
    return any(wanted["type"] in conditions and wanted["status"] == "True" for wanted in rule["onPodConditions"])


def check_job(claim: dict[str, Any], pod: dict[str, Any], rules: list[dict[str, Any]]) -> None:
    """What the API server refuses."""
    assert pod["restartPolicy"] == "Never"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["state"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    for container in (*pod["initContainers"], *pod["containers"]):
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
    for rule in rules:
        assert rule["action"] in ("FailJob", "Ignore", "Count")
        assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
        if exits := rule.get("onExitCodes"):
            assert exits["operator"] in ("In", "NotIn")
            assert exits["values"] == sorted(set(exits["values"])) and 0 not in exits["values"]
            assert exits["containerName"] in {container["name"] for container in pod["containers"]}


# --- SkyPilot


def skypilot(
    place: Place,
    change: Callable[[dict[str, Any]], None] = lambda task: None,
    preempt: list[Callable[[], bool]] | None = None,
) -> Ending:
    """A managed job until it succeeded or failed; each start is on a new machine, which has the volume alone. A machine
    is taken away, without a signal, as soon as the first of `preempt`, which it then loses, says so."""
    volume = place.folder / "volume"
    text = (RECIPES / "skypilot.yaml").read_text()
    task = yaml.safe_load(re.sub(r"(?<![\w/.])/state\b", str(volume), text))
    change(task)
    (mounted,) = task["volumes"]
    assert mounted == str(volume) and task["workdir"] == "."
    recovery = task["resources"]["job_recovery"]
    assert 137 not in recovery["recover_on_exit_codes"]
    volume.mkdir()
    ending, restarts = Ending("RUNNING"), 0
    while True:
        folder = place.checkout("sky_workdir", ".git")
        assert place.run(["bash", "-c", task["setup"]], folder, **task["envs"]) == 0
        process = place.start(["bash", "-c", task["run"]], folder, **task["envs"])
        if preempt and wait_for(preempt[0], process):
            preempt.pop(0)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            continue
        code = exit_code(process)
        ending.codes.append(code)
        if code == 0:
            ending.state = "SUCCEEDED"
            return ending
        if code in recovery["recover_on_exit_codes"]:
            continue
        restarts += 1
        if restarts > recovery["max_restarts_on_errors"]:
            ending.state = "FAILED"
            return ending


# --- GitHub Actions


def github_actions(
    place: Place, change: Callable[[dict[str, Any]], None] = lambda workflow: None, other_steps_minutes: int = 20
) -> Ending:
    """Workflow runs until none starts another one; each is on a new machine, which has the cache alone."""
    ending, cache = Ending("queued"), Cache(place.folder / "cache")
    while True:
        text = (RECIPES / "github-actions.yml").read_text()
        workflow = yaml.safe_load(text)
        change(workflow)
        assert workflow[True] == "workflow_dispatch"  # YAML 1.1 takes `on` for a boolean
        assert workflow["permissions"]["actions"] == "write"
        (job,) = workflow["jobs"].values()
        assert job["timeout-minutes"] <= 360
        known = {
            "github.ref_name": "main",
            "github.ref": "refs/heads/main",
            "github.run_id": str(len(ending.codes)),
            "github.run_attempt": "1",
            "github.token": "token",
        }
        dispatched = count_lines(place.dispatches)
        ending.state = run_job(place, job, known, cache, job["timeout-minutes"] - other_steps_minutes)
        ending.codes.append(int(known.get("steps.repro.outputs.code", -1)))
        if count_lines(place.dispatches) == dispatched:
            return ending


def run_job(place: Place, job: dict[str, Any], known: dict[str, str], cache: Cache, minutes: int) -> str:
    """Its steps: a step is left out once another one has failed or was cancelled, if it has no `always()`."""
    folder, state = place.checkout("runner"), "success"
    for step in job["steps"]:
        if not is_due(step.get("if", "success()"), known, state):
            continue
        action, given = step.get("uses", "").partition("@")[0], step.get("with", {})
        if action == "actions/cache/restore":
            cache.restore(folder, fill(given["key"], known), fill(given["restore-keys"], known).split())
        elif action == "actions/cache/save":
            cache.save(folder, fill(given["key"], known), given["path"].split())
        elif action == "actions/upload-artifact":
            for name in given["path"].split():
                target = place.folder / "artifact" / name
                (shutil.copytree if (folder / name).is_dir() else copy_file)(folder / name, target)
        elif not action:
            output = place.folder / "output"
            output.write_text("")
            env = {name: fill(value, known) for name, value in step.get("env", {}).items()}
            env |= {"GITHUB_OUTPUT": str(output), "LIMIT_MINUTES": str(minutes)}
            env |= {"GITHUB_WORKFLOW": "holdfast", "GITHUB_REPOSITORY": "me/holdfast", "GITHUB_REF_NAME": "main"}
            code = place.run(["bash", "-e", "-c", fill(step["run"], known)], folder, **env)
            for line in output.read_text().splitlines():
                name, _, value = line.partition("=")
                known[f"steps.{step['id']}.outputs.{name}"] = value
            if code:
                state = "cancelled" if code == 128 + signal.SIGKILL else "failure"
    return state


def is_due(condition: str, known: dict[str, str], state: str) -> bool:
    if condition == "always()":
        return True
    if state != "success":
        return False  # a condition without a status function means: and success()
    if condition == "success()":
        return True
    return any(
        known.get(name.strip(), "") == value.strip().strip("'")
        for name, _, value in (part.partition("==") for part in condition.split("||"))
    )


def fill(text: str, known: dict[str, str]) -> str:
    return re.sub(r"\$\{\{ *([\w.]+) *\}\}", lambda match: known[match[1]], text)


class Cache:
    """An entry is written once, and found by its key or by the newest that begins like it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.keys = folder, list[str]()

    def save(self, folder: Path, key: str, paths: list[str]) -> None:
        if key in self.keys:
            return
        self.keys.append(key)
        for path in paths:
            if (folder / path).exists():
                shutil.copytree(folder / path, self.folder / key / path, symlinks=True)

    def restore(self, folder: Path, key: str, prefixes: list[str]) -> None:
        for wanted in (key, *prefixes):
            for found in reversed(self.keys):
                if found == key or (wanted != key and found.startswith(wanted)):
                    shutil.copytree(self.folder / found, folder, dirs_exist_ok=True, symlinks=True)
                    return


def copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


# --- A project without torch


def write_fake_project(folder: Path, units: int = 3, seconds: float = 0.0, minutes: float = 1, **work: Any) -> Path:
    """A project whose `python -m stages repro` is tests/support/fake_repro.py."""
    (folder / "stages").mkdir(parents=True)
    (folder / "stages/__init__.py").touch()
    shutil.copy(Path(__file__).parent / "fake_repro.py", folder / "stages/__main__.py")
    content = {"units": units, "seconds": seconds, "minutes": minutes, **work}
    (folder / "work.json").write_text(json.dumps(content))
    (folder / ".dvc").mkdir()
    (folder / ".dvc/config").touch()
    return folder
