# A whole machine for toto: `nixos-rebuild switch -I nixos-config=…/examples/toto.nix`, or a host of a flake.
# Change what is marked; docs/operations.md, "On NixOS", goes on from here.
{ pkgs, ... }:
let
  alice = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGr2d1b6cs9o1bfVn2dP7Wt6zD0mQyAqH1xS5dOJ1k2f alice@laptop";  # change
in
{
  imports = [
    ../nix/toto.nix
    # ./hardware-configuration.nix  # of `nixos-generate-config`, in place of the next lines
  ];
  boot.loader.systemd-boot.enable = true;
  boot.loader.efi.canTouchEfiVariables = true;
  fileSystems."/" = { device = "/dev/disk/by-label/nixos"; fsType = "ext4"; };
  fileSystems."/boot" = { device = "/dev/disk/by-label/boot"; fsType = "vfat"; };

  networking.hostName = "toto";  # change
  networking.domain = "example.org";  # change
  networking.firewall.allowedTCPPorts = [ 22 80 443 4201 ];
  system.stateVersion = "24.11";

  # Who looks after this machine.
  users.users.alice = {  # change
    isNormalUser = true;
    extraGroups = [ "wheel" ];
    openssh.authorizedKeys.keys = [ alice ];
  };

  services.openssh = {
    enable = true;
    settings.PasswordAuthentication = false;
  };

  services.toto = {
    enable = true;
    # The first user of the git host, who may do everything there.
    firstAdmin = { name = "alice"; key = alice; };  # change
    # Made by the command that docs/operations.md has. Without it the key lies in /var/lib/toto/keys.
    # blockKey.file = "/etc/toto/blocks.cred";
    # For hosts without a flake: the nixpkgs of this machine.
    # nixPath = [ "nixpkgs=${pkgs.path}" ];
    # The UI, with TLS; its certificate is below.
    nginx.enable = true;
    # Where machines that pull ask what they should be.
    machines.listen = "0.0.0.0";
    # Copy /var/lib/toto-backup to elsewhere.
    backup.enable = true;
    # What test scripts run besides the usual programs.
    programs = [ pkgs.jq ];
  };

  security.acme = { acceptTerms = true; defaults.email = "alice@example.org"; };  # change
  services.nginx.virtualHosts."toto.example.org".enableACME = true;  # change

  # Rehearsals build whole systems: keep room.
  nix.gc = { automatic = true; dates = "weekly"; options = "--delete-older-than 30d"; };
}
