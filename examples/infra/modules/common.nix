# What all hosts share: the user that toto logs in as, and the hardware.
{ lib, ... }:
let
  # Every key in keys/ may log in. toto's own is written to keys/toto.pub.
  keys = map (name: ../keys + "/${name}")
    (builtins.filter (lib.hasSuffix ".pub") (builtins.attrNames (builtins.readDir ../keys)));
in
{
  services.openssh.enable = true;
  users.users.toto = {
    isNormalUser = true;
    extraGroups = [ "wheel" ];
    openssh.authorizedKeys.keyFiles = keys;
  };
  security.sudo.wheelNeedsPassword = false;
  nix.settings.trusted-users = [ "toto" ];

  fileSystems."/".device = "/dev/vda";
  fileSystems."/".fsType = "ext4";
  boot.loader.grub.device = "/dev/vda";
  system.stateVersion = "24.11";
}
