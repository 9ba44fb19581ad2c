# A machine on which toto may do everything, by sudo. `toto machine setup infra` prints what lets it do less.
{ lib, ... }:
{
  imports = [ ./machine.nix ];
  # Every key in keys/ may log in. toto's own is written to keys/toto.pub.
  users.users.toto = {
    isNormalUser = true;
    extraGroups = [ "wheel" ];
    openssh.authorizedKeys.keyFiles = map (name: ../keys + "/${name}")
      (builtins.filter (lib.hasSuffix ".pub") (builtins.attrNames (builtins.readDir ../keys)));
  };
  nix.settings.trusted-users = [ "toto" ];
}
