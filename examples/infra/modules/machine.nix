# What every machine is: its hardware, and an administrator who logs in with the keys in keys/.
{ lib, ... }:
{
  services.openssh.enable = true;
  users.users.admin = {
    isNormalUser = true;
    extraGroups = [ "wheel" ];
    openssh.authorizedKeys.keyFiles = map (name: ../keys + "/${name}")
      (builtins.filter (lib.hasSuffix ".pub") (builtins.attrNames (builtins.readDir ../keys)));
  };
  security.sudo.wheelNeedsPassword = false;

  fileSystems."/".device = "/dev/vda";
  fileSystems."/".fsType = "ext4";
  boot.loader.grub.device = "/dev/vda";
  system.stateVersion = "24.11";
}
