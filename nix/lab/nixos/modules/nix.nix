{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  show = value:
    if lib.isList value then lib.concatMapStringsSep " " show value
    else if value == true then "true" else if value == false then "false" else toString value;
in
{
  options.nix = {
    enable = mkOption { type = types.bool; default = true; };
    settings = mkOption { type = types.attrsOf types.anything; default = { }; };
    gc = { _freeform = true; };
    optimise = { _freeform = true; };
    extraOptions = mkOption { type = types.lines; default = ""; };
  };

  config = {
    nix.settings = {
      build-users-group = lib.mkDefault "";
      substituters = lib.mkDefault [ ];
      sandbox = lib.mkDefault false;
      trusted-users = [ "root" ];
    };
    environment.etc."nix/nix.conf".text =
      lib.concatStrings (lib.mapAttrsToList (name: value: "${name} = ${show value}\n") config.nix.settings)
      + config.nix.extraOptions;
    systemd.services.nix-daemon = {
      description = "Nix Daemon";
      wantedBy = [ "multi-user.target" ];
      restartTriggers = [ (lib.hashString "sha256" config.environment.etc."nix/nix.conf".text) ];
      serviceConfig = { ExecStart = "${pkgs.base}/bin/nix-daemon"; Restart = "always"; };
    };
  };
}
