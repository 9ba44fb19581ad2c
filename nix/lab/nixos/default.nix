# `import <nixpkgs/nixos> { configuration = ./host.nix; }`, as in NixOS.
{ configuration, system ? builtins.currentSystem }:
let
  eval = import ./eval-config.nix { inherit system; modules = [ configuration ]; };
in
{
  inherit (eval) pkgs config options;
  system = eval.config.system.build.toplevel;
  vm = eval.config.system.build.vm;
}
