"""`python -m tests.lab setup` and `python -m tests.lab machine NAME …`."""
import sys
from tests.lab.setup import setup
print(setup())
