"""`python -m tests`: all tests, those of the lab (virtual machines, most of the time) beside all the others.

What pytest says of the others comes in one piece at the end. The exit status is 0 when both have passed.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> int:
    """Run both; the exit status."""
    pytest = [sys.executable, "-m", "pytest"]
    lab = subprocess.Popen([*pytest, HERE / "lab"])
    try:
        others = subprocess.run([*pytest, HERE, f"--ignore={HERE / 'lab'}", "-p", "no:cacheprovider"],
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except BaseException:
        lab.terminate()
        lab.wait()
        raise
    status = lab.wait()
    print("\nThe tests that ran beside those of the lab:\n", flush=True)
    sys.stdout.buffer.write(others.stdout)
    return status or others.returncode


if __name__ == "__main__":
    sys.exit(main())
