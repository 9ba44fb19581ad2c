"""The fleet as people see it: every target, how its last run ended, and the newest runs; read-only."""
