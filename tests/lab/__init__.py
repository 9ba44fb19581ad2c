"""The lab: a small NixOS-shaped system of real derivations, and virtual "physical" machines that run it."""
