{
  description = "The lab: a small NixOS-shaped system of real derivations, for toto's demo and tests";

  outputs = { self }:
    let
      lib = import ./lib // {
        nixosSystem = args: import ./nixos/eval-config.nix ({ system = null; } // args);
      };
    in
    {
      inherit lib;
      legacyPackages = lib.genAttrs [ "x86_64-linux" "aarch64-linux" ] (system: import ./. { inherit system; });
    };
}
