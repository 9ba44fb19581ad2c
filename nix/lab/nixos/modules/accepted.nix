# Options of NixOS that do nothing in the lab. They are accepted, so that a host file of the lab is also a
# valid file for the real NixOS; outside these trees an unknown option is an error, as it is there.
{ lib, ... }:
let
  tree = { _freeform = true; };
in
{
  options = {
    _freeform = false;
    boot = tree;
    console = tree;
    documentation = tree;
    fileSystems = tree;
    hardware = tree;
    i18n = tree;
    networking = tree;
    nixpkgs = tree;
    powerManagement = tree;
    swapDevices = lib.mkOption { type = lib.types.anything; default = [ ]; };
    systemd.network = tree;
    systemd.slices = tree;
    time = tree;
    virtualisation = tree;
    programs = tree;
  };
}
