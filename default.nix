# toto without flakes: `nix-build -A toto`, and `imports = [ (import ./toto { }).nixosModules.toto ];` (the path of the
# module itself, ./toto/nix/toto.nix, is as good).
{ pkgs ? import <nixpkgs> { } }:
{
  toto = pkgs.callPackage ./nix/package.nix { };
  flying-monkey = pkgs.callPackage ./nix/flying-monkey-package.nix { };
  nixosModules = {
    toto = ./nix/toto.nix;
    flying-monkey = ./nix/flying-monkey.nix;
    monitoring = ./nix/monitoring.nix;
    store = ./nix/store.nix;
    default = ./nix/toto.nix;
  };
  # In virtual machines: `nix-build -A tests.toto`.
  tests = {
    toto = import ./nix/tests/toto.nix { inherit pkgs; };
    flying-monkey = import ./nix/tests/flying-monkey.nix { inherit pkgs; };
  };
}
