# What a machine of the lab runs before toto ever deployed it: ssh, nix, and the user that toto logs in as.
{ name, keys }:
{
  networking.hostName = name;
  services.openssh.enable = true;
  users.users.root.openssh.authorizedKeys.keys = keys;
  users.users.toto = {
    isNormalUser = true;
    extraGroups = [ "wheel" ];
    openssh.authorizedKeys.keys = keys;
  };
  security.sudo.wheelNeedsPassword = false;
  nix.settings.trusted-users = [ "toto" ];
  fileSystems."/".device = "/dev/vda";
  boot.loader.grub.device = "/dev/vda";
  system.stateVersion = "24.11";
}
