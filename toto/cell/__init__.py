"""Cells: where a process that runs something pushed is kept."""
