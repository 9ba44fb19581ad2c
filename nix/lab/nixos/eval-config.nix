# Evaluates the modules of a host together with those of the lab. Returns the same as in nixpkgs:
# { config, options, pkgs, lib, extendModules }.
{ system ? null, modules, specialArgs ? { }, lib ? import ../lib, ... }:
let
  pkgs = import ../. { system = if system != null then system else builtins.currentSystem; };

  evaluate = { modules, specialArgs }@given:
    let
      # A host's VM is the same host with `virtualisation.vmVariant` merged in. It is a
      # separate evaluation, so nothing in it can change the derivation of the host's toplevel.
      inVariant = specialArgs.isVmVariant or false;
      variant = evaluate {
        modules = modules ++ [ eval.config.virtualisation.vmVariant ];
        specialArgs = specialArgs // { isVmVariant = true; };
      };
      eval = lib.evalModules {
        modules = import ./modules ++ modules;
        specialArgs = {
          inherit pkgs;
          modulesPath = toString ./modules;
          isVmVariant = false;
          vmConfig = if inVariant then eval.config else variant.config;
        } // specialArgs;
      };
    in
    {
      # As with NixOS's option, whoever reads `virtualisation.vmVariant` finds the VM's configuration.
      config = eval.config // {
        virtualisation = eval.config.virtualisation // { vmVariant = variant.config; };
      };
      inherit (eval) options;
      inherit pkgs lib;
      extendModules = { modules ? [ ], specialArgs ? { }, ... }:
        evaluate { modules = given.modules ++ modules; specialArgs = given.specialArgs // specialArgs; };
    };
in
evaluate { inherit modules specialArgs; }
