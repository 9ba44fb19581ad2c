# A machine that asks toto by itself what it should be, and lets nobody of toto's in: a host of an infra repo.
# Change what is marked; docs/machines.md says step by step how a machine gets there.
{ pkgs, ... }:
{
  imports = [
    ../nix/flying-monkey.nix  # in an infra repo: toto's, by an input of its flake or pinned
    # ./hardware-configuration.nix  # of `nixos-generate-config`, in place of the next lines
  ];
  boot.loader.systemd-boot.enable = true;
  boot.loader.systemd-boot.configurationLimit = 10;
  boot.loader.efi.canTouchEfiVariables = true;
  fileSystems."/" = { device = "/dev/disk/by-label/nixos"; fsType = "ext4"; };
  fileSystems."/boot" = { device = "/dev/disk/by-label/boot"; fsType = "vfat"; };

  networking.hostName = "web3";  # change; the name in machines.yaml
  system.stateVersion = "24.11";

  services.flying-monkey = {
    enable = true;
    repo = "infra";
    # toto's signer (`/var/lib/toto/signer/key.pub`), and a key of yours that is kept offline.  # change
    signers = [
      "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGr2d1b6cs9o1bfVn2dP7Wt6zD0mQyAqH1xS5dOJ1k2f"
      "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHb3e2c7dt0p2cgWo3eQ8Xu7aE1nRzBrI2yT6ePK2l3g"
    ];
    url = "https://toto.example.org:4201";  # change
    # ca = ./toto-ca.pem;  # /var/lib/toto/api/ca.pem of toto
    prepareHooks."10-drain" = "rm -f /run/web/ready";
    finishHooks."10-undrain" = "mkdir -p /run/web && touch /run/web/ready";
    checks."10-page" = ''
      echo 1..1
      ${pkgs.curl}/bin/curl --fail --silent --max-time 10 http://127.0.0.1/ > /dev/null && echo ok || echo not ok
    '';
    metrics.folder = "/var/lib/node-exporter";
  };
  # What toto signs for this machine, and nothing else, comes into its store from elsewhere.
  nix.settings.trusted-public-keys = [ "infra-1:2q0XbzsyXPlzKsnrbUYh0nSHZ1vJ5Nn1S+ISzTXmGqc=" ];  # change: `toto key infra cache`

  services.nginx = { enable = true; virtualHosts.default = { default = true; root = pkgs.writeTextDir "index.html" "here"; }; };
  services.prometheus.exporters.node = {
    enable = true;
    enabledCollectors = [ "textfile" ];
    extraFlags = [ "--collector.textfile.directory=/var/lib/node-exporter" ];
  };
  networking.firewall.allowedTCPPorts = [ 22 80 9100 ];

  # Somebody who looks after it, when toto cannot.
  services.openssh = { enable = true; settings.PasswordAuthentication = false; };
  users.users.alice = {  # change
    isNormalUser = true;
    extraGroups = [ "wheel" ];
    openssh.authorizedKeys.keys = [ "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGr2d1b6cs9o1bfVn2dP7Wt6zD0mQyAqH1xS5dOJ1k2f alice@laptop" ];
  };
}
