"""The recipes for Kubernetes, SkyPilot and GitHub Actions, under the rule that each documents for an exit code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.project import Checkout
from tests.support.schedulers import (
    RECIPES,
    Ending,
    Place,
    count_lines,
    github_actions,
    kubernetes,
    skypilot,
    write_fake_project,
)
from tests.support.train_stage import SAVES

SCHEDULERS = [kubernetes, skypilot, github_actions]
DONE = {"kubernetes": "Complete", "skypilot": "SUCCEEDED", "github_actions": "success"}
FAILED = {"kubernetes": "Failed: PodFailurePolicy", "skypilot": "FAILED", "github_actions": "failure"}
# Where the state of the runs is, in each of their places.
STATE = {"kubernetes": "volume/project/runs", "skypilot": "volume/runs", "github_actions": "runner/runs"}
Scheduler = Callable[..., Ending]


@pytest.fixture
def make_place(tmp_path: Path) -> Callable[..., Place]:
    """Makes a place for a scheduler, with a project of which `work` tells what happens to it."""

    def make(**work: Any) -> Place:
        return Place(tmp_path / "place", write_fake_project(tmp_path / "source", **work))

    return make


def reached(place: Place, scheduler: Scheduler, unit: int) -> Callable[[], bool]:
    """Tells whether so many units of the work are done."""
    progress = place.folder / STATE[scheduler.__name__] / "progress"
    return lambda: progress.exists() and int(progress.read_text()) >= unit


def starts(place: Place, scheduler: Scheduler) -> int:
    return count_lines(place.folder / STATE[scheduler.__name__] / "starts")


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_run_that_is_killed_ends_done(scheduler: Scheduler, make_place: Callable[..., Place]) -> None:
    place = make_place(units=4, dies=True)
    ending = scheduler(place)
    assert ending.state == DONE[scheduler.__name__], ending
    assert ending.codes == [137 if scheduler is kubernetes else 75] * 4 + [0]


def test_kubernetes_an_evicted_pod_does_not_count(make_place: Callable[..., Place]) -> None:
    place = make_place(units=40, seconds=0.02)

    def change(job: dict[str, Any]) -> None:
        job["spec"]["backoffLimit"] = 0

    evict = [reached(place, kubernetes, unit) for unit in (5, 15, 25)]
    assert kubernetes(place, change, evict) == Ending("Complete", [75, 75, 75, 0])
    assert (place.folder / "volume/project/models/best/model").exists()


def test_skypilot_a_lost_machine_is_replaced(make_place: Callable[..., Place]) -> None:
    place = make_place(units=40, seconds=0.02)
    preempt = [reached(place, skypilot, unit) for unit in (5, 15, 25)]
    assert skypilot(place, preempt=preempt) == Ending("SUCCEEDED", [0])
    assert starts(place, skypilot) == 4
    assert (place.folder / "volume/result/best/model").exists()
    assert "dvc-cache" in (place.folder / "sky_workdir/.dvc/config.local").read_text()


def test_github_actions_stays_below_its_limit(make_place: Callable[..., Place]) -> None:
    place = make_place(units=30, minutes=30)
    assert github_actions(place) == Ending("success", [75, 75, 0])
    assert place.dispatches.read_text() == "workflow run holdfast --repo me/holdfast --ref main\n" * 2
    assert (place.folder / "artifact/models/best/model").exists()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("code", [2, 1])
def test_a_wrong_parameter_and_a_fault_are_tried_once(
    scheduler: Scheduler, code: int, make_place: Callable[..., Place]
) -> None:
    place = make_place(code=code)
    assert scheduler(place) == Ending(FAILED[scheduler.__name__], [code])
    assert starts(place, scheduler) == 1


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_run_that_is_killed_without_progress_stops(scheduler: Scheduler, make_place: Callable[..., Place]) -> None:
    place = make_place(stuck=True, dies=True)
    ending = scheduler(place)
    assert ending.state == FAILED[scheduler.__name__], ending
    assert ending.codes[-1] == 1 and starts(place, scheduler) == 4


def test_kubernetes_a_run_that_is_evicted_without_progress_stops(make_place: Callable[..., Place]) -> None:
    place = make_place(stuck=True, seconds=0.02)

    def has_started(number: int) -> Callable[[], bool]:
        return lambda: starts(place, kubernetes) == number

    ending = kubernetes(place, evict=[has_started(number) for number in (1, 2, 3)])
    assert ending == Ending(FAILED["kubernetes"], [75, 75, 75, 1])


def test_github_actions_a_run_that_needs_more_than_a_job_stops(make_place: Callable[..., Place]) -> None:
    place = make_place(minutes=7 * 60)
    assert github_actions(place) == Ending(FAILED["github_actions"], [75, 75, 75, 1])


def test_the_rules_are_what_stops_it(make_place: Callable[..., Place], tmp_path: Path) -> None:
    """Without them, or with others, these stand-ins would try a wrong parameter again."""

    def no_policy(job: dict[str, Any]) -> None:
        del job["spec"]["podFailurePolicy"]
        job["spec"]["backoffLimit"] = 2

    def restarts(task: dict[str, Any]) -> None:
        task["resources"]["job_recovery"]["max_restarts_on_errors"] = 2

    def too_long(workflow: dict[str, Any]) -> None:
        (step,) = (step for step in workflow["jobs"]["repro"]["steps"] if step.get("id") == "repro")
        step["run"] = step["run"].replace("--stop-after 5h30m", "")

    place = make_place(code=2)
    assert kubernetes(place, no_policy) == Ending("Failed: BackoffLimitExceeded", [2, 2, 2])
    assert skypilot(Place(tmp_path / "sky", place.source), restarts) == Ending("FAILED", [2, 2, 2])
    long = write_fake_project(tmp_path / "long", units=30, minutes=30)
    assert github_actions(Place(tmp_path / "github", long), too_long).state == "cancelled"


def test_kubernetes_with_the_pipeline_itself(tiny_model: Path, tmp_path: Path) -> None:
    source = Checkout(tmp_path / "source", tiny_model, {"train": SAVES})
    place = Place(tmp_path / "place", source.folder, source.env)
    project = Checkout.at(place.folder / "volume/project", source.env)
    ending = kubernetes(place, evict=[lambda: any(project.folder.glob("runs/*/checkpoints/step-*"))])
    assert ending == Ending("Complete", [75, 0])
    assert (project.folder / "models/best/model.safetensors").exists()

    source.set_params({"train": {"learning_rate": -1}})
    wrong = Place(tmp_path / "wrong", source.folder, source.env)
    assert kubernetes(wrong) == Ending(FAILED["kubernetes"], [2])


def test_github_actions_with_the_pipeline_itself(tiny_model: Path, tmp_path: Path) -> None:
    """Each job has a new folder, with what the cache kept: no out, and dvc.lock as it was committed."""
    source = Checkout(tmp_path / "source", tiny_model, {"train": SAVES})
    place = Place(tmp_path / "place", source.folder, source.env)

    def shorter(workflow: dict[str, Any]) -> None:
        (step,) = (step for step in workflow["jobs"]["repro"]["steps"] if step.get("id") == "repro")
        # The first job is told to stop in the middle, wherever that is.
        limit = "1h" if place.dispatches.exists() else "5s"
        step["run"] = step["run"].replace("--stop-after 5h30m", f"--stop-after {limit}")

    assert github_actions(place, shorter) == Ending("success", [75, 0])
    assert (place.folder / "artifact/models/best/model.safetensors").exists()


def test_what_is_to_be_edited_is_marked() -> None:
    recipes = [path for path in RECIPES.iterdir() if path.suffix != ".md"]
    assert len(recipes) == 4
    assert all("EDIT" in path.read_text() for path in recipes)
