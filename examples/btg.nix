# Prometheus on a machine of its own: it reads what the machines' agents say of themselves, by node_exporter.
# Each machine has (see pulled.nix):
#
#   services.flying-monkey.metrics.folder = "/var/lib/node-exporter";
#   services.prometheus.exporters.node = { enable = true; enabledCollectors = [ "textfile" ];
#     extraFlags = [ "--collector.textfile.directory=/var/lib/node-exporter" ]; };
{
  # ./hardware-configuration.nix, in place of the next lines
  boot.loader.systemd-boot.enable = true;
  boot.loader.efi.canTouchEfiVariables = true;
  fileSystems."/" = { device = "/dev/disk/by-label/nixos"; fsType = "ext4"; };
  fileSystems."/boot" = { device = "/dev/disk/by-label/boot"; fsType = "vfat"; };

  networking.hostName = "btg";  # change
  system.stateVersion = "24.11";
  services.openssh = { enable = true; settings.PasswordAuthentication = false; };

  services.prometheus = {
    enable = true;
    listenAddress = "127.0.0.1";
    retentionTime = "90d";
    scrapeConfigs = [{
      job_name = "machines";
      scrape_interval = "30s";
      static_configs = [{ targets = [ "web1.example.org:9100" "web3.example.org:9100" ]; }];  # change
    }];
    rules = [
      (builtins.toJSON {
        groups = [{
          name = "machines of toto";
          rules = [
            {
              alert = "MachineSilent";
              expr = "time() - flying_monkey_contact_timestamp_seconds > 3600";
              annotations.summary = "{{ $labels.instance }} has not reached toto for an hour";
            }
            {
              alert = "UpdateFailed";
              expr = "flying_monkey_failed == 1";
              annotations.summary = "the newest update of {{ $labels.instance }} did not end well";
            }
            {
              alert = "MachineDrifted";
              expr = "flying_monkey_drift == 1";
              "for" = "15m";
              annotations.summary = "{{ $labels.instance }} is not what toto made it";
            }
            {
              alert = "RebootNeeded";
              expr = "flying_monkey_reboot_needed == 1";
              "for" = "7d";
              annotations.summary = "{{ $labels.instance }} runs an old kernel";
            }
          ];
        }];
      })
    ];
  };

  # Whoever may look does so by `ssh -L 9090:127.0.0.1:9090`.
  users.users.alice = {  # change
    isNormalUser = true;
    extraGroups = [ "wheel" ];
    openssh.authorizedKeys.keys = [ "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGr2d1b6cs9o1bfVn2dP7Wt6zD0mQyAqH1xS5dOJ1k2f alice@laptop" ];
  };
}
