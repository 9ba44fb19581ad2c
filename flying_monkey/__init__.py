"""The agent on a machine: it obeys signed documents that say what the machine should be.

Standard library only, and nothing of toto: it runs on every host.
"""
