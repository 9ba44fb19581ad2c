"""Real git repos for tests: a bare one, as on toto, and a clone to commit in."""

import os
import subprocess
from pathlib import Path


def git(*arguments: str | Path, cwd: Path) -> str:
    """Run git as a person would, without the config of whoever runs the tests."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=clean
        | {
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_AUTHOR_NAME": "op",
            "GIT_AUTHOR_EMAIL": "op@example.org",
            "GIT_COMMITTER_NAME": "op",
            "GIT_COMMITTER_EMAIL": "op@example.org",
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class InfraRepo:
    """A bare repo at `bare` and a clone of it at `work`."""

    def __init__(self, directory: Path) -> None:
        self.bare, self.work = directory / "infra.git", directory / "work"
        directory.mkdir(parents=True, exist_ok=True)
        git("init", "--quiet", "--bare", "--initial-branch=main", self.bare, cwd=directory)
        git("clone", "--quiet", self.bare, self.work, cwd=directory)
        git("checkout", "--quiet", "-B", "main", cwd=self.work)

    def commit(self, files: dict[str, str | None], message: str = "change") -> str:
        """Write (None: remove) files, commit, push; the commit's hash."""
        for name, text in files.items():
            path = self.work / name
            if text is None:
                path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                if text.startswith("#!"):
                    path.chmod(0o755)
        git("add", "--all", cwd=self.work)
        git("commit", "--quiet", "--allow-empty", "-m", message, cwd=self.work)
        git("push", "--quiet", "origin", "main", cwd=self.work)
        return git("rev-parse", "HEAD", cwd=self.work)
