"""Jobs: executables of the infra repo that toto runs on request, on a schedule or after another job.

The layout of the folder and what a job is given are laminar's (https://laminar.ohwg.net); docs/jobs.md says where toto
differs.
"""
