# What a machine of the lab runs before toto ever deployed it: ssh, nix, the user that toto logs in as, and an
# administrator's.
{ name, keys }:
let
  user = {
    isNormalUser = true;
    extraGroups = [ "wheel" ];
    openssh.authorizedKeys.keys = keys;
  };
in
{
  networking.hostName = name;
  services.openssh.enable = true;
  users.users.root.openssh.authorizedKeys.keys = keys;
  users.users.toto = user;
  users.users.admin = user;
  security.sudo.wheelNeedsPassword = false;
  nix.settings.trusted-users = [ "toto" ];
  fileSystems."/".device = "/dev/vda";
  boot.loader.grub.device = "/dev/vda";
  system.stateVersion = "24.11";
}
