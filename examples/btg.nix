# The machine that looks at the others: Prometheus, Alertmanager and Grafana, on a machine of the fleet that is not toto's.
# Change what is marked; docs/monitoring.md says step by step how it gets there. Each machine has (see pulled.nix):
#
#   services.flying-monkey.metrics.folder = "/var/lib/node-exporter";
#   services.prometheus.exporters.node = { enable = true; enabledCollectors = [ "textfile" ];
#     extraFlags = [ "--collector.textfile.directory=/var/lib/node-exporter" ]; };
{
  imports = [
    ../nix/monitoring.nix  # in an infra repo: toto's, by an input of its flake or pinned
    # ./hardware-configuration.nix, in place of the next lines
  ];
  boot.loader.systemd-boot.enable = true;
  boot.loader.efi.canTouchEfiVariables = true;
  fileSystems."/" = { device = "/dev/disk/by-label/nixos"; fsType = "ext4"; };
  fileSystems."/boot" = { device = "/dev/disk/by-label/boot"; fsType = "vfat"; };

  networking.hostName = "btg";  # change
  system.stateVersion = "24.11";
  services.openssh = { enable = true; settings.PasswordAuthentication = false; };

  services.toto-monitoring = {
    enable = true;
    url = "https://toto.example.org";  # change
    tokenFile = "/etc/toto-metrics";  # what `toto metrics token` prints on toto
    grafana.passwordFile = "/etc/grafana-password";
    secrets.slack = "/etc/slack-url";
    tell.page.slack_configs = [{
      api_url_file = "/run/credentials/alertmanager.service/slack";
      channel = "#alarm";  # change
      title = "{{ .CommonLabels.alertname }}";
      text = "{{ range .Alerts }}{{ .Annotations.summary }} ({{ .Annotations.runbook_url }})\n{{ end }}";
    }];
  };
  services.prometheus.exporters.node.enable = true;  # it looks at itself, too

  # Whoever may look does so by `ssh -L 3000:127.0.0.1:3000 -L 9090:127.0.0.1:9090`.
  users.users.alice = {  # change
    isNormalUser = true;
    extraGroups = [ "wheel" ];
    openssh.authorizedKeys.keys = [ "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGr2d1b6cs9o1bfVn2dP7Wt6zD0mQyAqH1xS5dOJ1k2f alice@laptop" ];
  };
}
