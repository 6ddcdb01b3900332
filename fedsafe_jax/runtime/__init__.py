"""Surroundings of a run: files and checkpoints, several processes, signals, progress, libraries.

`run_files` and `checkpoint` write the workdir so that a killed run continues where it was;
`preemption` and `multihost` end it after the same round in all processes; `progress` is what the
terminal shows, and `libraries` sets up what the package builds on.
"""
