# `import <nixpkgs> { }`: the lab's packages.
{ system ? builtins.currentSystem, ... }:
import ./pkgs { inherit system; lib = import ./lib; pinned = import ./pinned.nix; }
