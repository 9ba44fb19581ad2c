"""`python -m tests`: all tests, in two processes side by side; each has virtual machines of its own.

What pytest says of the second comes in one piece at the end. The exit status is 0 when both have passed.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LAB = HERE / "lab"
BESIDE = [LAB / name for name in ("test_whole.py", "test_lab.py", "test_kube.py", "test_second_user.py")]  # half


def main() -> int:
    """Run both; the exit status."""
    # Whatever ends us ends them, as Ctrl-C does: with their machines and servers.
    pytest = ["setpriv", "--pdeathsig", "INT", sys.executable, "-m", "pytest"]
    others = sorted(set(HERE.rglob("test_*.py")) - set(BESIDE))
    with tempfile.TemporaryFile() as said:
        beside = subprocess.Popen([*pytest, *BESIDE, "-p", "no:cacheprovider"], stdout=said, stderr=subprocess.STDOUT)
        try:
            status = subprocess.run([*pytest, *others], check=False).returncode
            status = beside.wait() or status
        finally:
            beside.terminate()
            beside.wait()
        print("\nThe tests that ran beside those:\n", flush=True)
        said.seek(0)
        shutil.copyfileobj(said, sys.stdout.buffer)
    return status


if __name__ == "__main__":
    sys.exit(main())
