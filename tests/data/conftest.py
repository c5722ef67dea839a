"""What tests of reading data share as a fixture."""

from __future__ import annotations

import pytest

from stages import tokenize as stage
from stages.ground.running import run_command
from tests.support.project import Project
from tests.support.reading import Refused


def written(project: Project) -> list[str]:
    """All that is in the folder of the project, but what a start after a kill goes on from, and locks."""
    names = {path.relative_to(project.folder).as_posix() for path in project.folder.rglob("*")}
    return sorted(name for name in names - {"data"} if not name.startswith((".dvc", "runs")) or name.endswith(".tmp"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs the stage, which must refuse: exit code 2, one line on stderr, nothing written. Returns the line."""

    def run(project: Project) -> str:
        capsys.readouterr()
        before = written(project)
        with pytest.raises(SystemExit) as exit_:
            run_command(stage.main)
        assert exit_.value.code == 2
        printed = capsys.readouterr()
        lines = printed.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), printed.err
        assert not printed.out
        assert written(project) == before
        return lines[0]

    return run
