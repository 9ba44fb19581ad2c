# A machine that builds for toto: docs/builders.md says how to use it. Whoever has the key of the user `builder` is root
# on it: to build there is to write to its store. So it is a machine of its own, on which nothing else runs, and not one
# that toto deploys to with `writableStore` (that builds nothing).
# On toto:
#
#   services.toto.builders.builder = {
#     address = "builder.example.org";
#     hostKey = "ssh-ed25519 AAAA…";  # of /etc/ssh/ssh_host_ed25519_key.pub, on the builder
#     systems = [ "aarch64-linux" ]; jobs = 4; features = [ "big-parallel" ];
#   };
{ config, ... }:
{
  # ./hardware-configuration.nix, in place of the next lines
  boot.loader.systemd-boot.enable = true;
  boot.loader.efi.canTouchEfiVariables = true;
  fileSystems."/" = { device = "/dev/disk/by-label/nixos"; fsType = "ext4"; };
  fileSystems."/boot" = { device = "/dev/disk/by-label/boot"; fsType = "vfat"; };

  networking.hostName = "builder";  # change
  system.stateVersion = "24.11";

  users.groups.builder = { };
  users.users.builder = {
    isSystemUser = true;
    group = "builder";
    useDefaultShell = true;
    # The public half of toto's key (`toto key builders`), for nix and nothing else.  # change
    openssh.authorizedKeys.keys = [
      ''restrict,command="nix-store --serve --write" ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGr2d1b6cs9o1bfVn2dP7Wt6zD0mQyAqH1xS5dOJ1k2f toto''
    ];
  };
  services.openssh = { enable = true; settings.PasswordAuthentication = false; };
  nix.settings = {
    trusted-users = [ "builder" ];
    max-jobs = "auto";
  };
  nix.gc = { automatic = true; dates = "weekly"; options = "--delete-older-than 14d"; };

  assertions = [{
    assertion = config.nix.settings.max-jobs != 0;
    message = "a builder builds: no nix.settings.max-jobs = 0, and no services.flying-monkey.writableStore here";
  }];
}
