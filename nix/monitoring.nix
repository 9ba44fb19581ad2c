# A Prometheus that reads toto and the machines of its fleet, with toto's alerts; an Alertmanager; and a Grafana with
# toto's dashboards: on any machine, toto's own or a different one. docs/monitoring.md says how to use it.
#
#   imports = [ ./toto/nix/monitoring.nix ];   (or nixosModules.monitoring of the flake)
#   services.toto-monitoring = { enable = true; url = "https://toto.example.org"; tokenFile = "/etc/toto-metrics"; };
#
# All of it listens on loopback: whoever may look comes by `ssh -L`, or by a proxy of yours.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.services.toto-monitoring;
  prometheus = config.services.prometheus;

  url = builtins.match "(https?)://([^/]+)/?" cfg.url;
  scheme = builtins.elemAt url 0;
  toto = builtins.elemAt url 1;
  basic_auth = { username = "prometheus"; password_file = "/run/credentials/prometheus.service/toto"; };

  # Where toto says which machines there are, and by which tags they are chosen.
  machines = name: port: cfg.machines // {
    job_name = name;
    http_sd_configs = [{ url = "${scheme}://${toto}/metrics/machines"; inherit basic_auth; }];
    relabel_configs = [
      (if name == "node"
        then { source_labels = [ "__meta_toto_role" "__meta_toto_tags" ]; regex = "(nixos|builder);.*|other;.*,node,.*"; action = "keep"; }
        else { source_labels = [ "__meta_toto_tags" ]; regex = ".*,${name},.*"; action = "keep"; })
      { source_labels = [ "__meta_toto_machine" ]; target_label = "machine"; }
      { source_labels = [ "__meta_toto_machine" ]; target_label = "instance"; }
      { source_labels = [ "__meta_toto_repo" ]; target_label = "repo"; }
      { source_labels = [ "__address__" ]; target_label = "__address__"; replacement = "$1:${toString port}"; }
    ];
  };

  dashboards = pkgs.runCommand "toto-dashboards" { } ''
    ${pkgs.python3}/bin/python3 ${../toto/metrics/dashboards.py} $out
  '';

  secret = description: mkOption {
    type = types.nullOr (types.strMatching "/.+");
    default = null;
    inherit description;
  };
  isInStore = file: file != null && lib.hasPrefix builtins.storeDir file;
in
{
  options.services.toto-monitoring = {
    enable = lib.mkEnableOption "a Prometheus, an Alertmanager and a Grafana for toto and its fleet";
    url = mkOption {
      type = types.strMatching "https://[^/[:space:]]+/?|http://(127[.]0[.]0[.]1|localhost)(:[0-9]+)?/?";
      default = "http://127.0.0.1:4200";
      example = "https://toto.example.org";
      description = "The address of toto's UI: by TLS, unless toto is on this machine.";
    };
    tokenFile = secret "A file that only root reads, with what `toto metrics token` prints.";
    exporters = mkOption {
      type = types.attrsOf types.port;
      example = { bind = 9119; };
      description = ''
        Exporters by their ports, on the machines of the manifest that have a tag of the same name. `node` is on all
        machines of NixOS besides.
      '';
    };
    machines = mkOption {
      type = types.attrsOf types.anything;
      default = { };
      example = { scheme = "https"; tls_config.ca_file = "/etc/ssl/fleet.pem"; };
      description = "What the jobs of all exporters have besides, as Prometheus says it: TLS, credentials.";
    };
    tell = mkOption {
      type = types.submodule {
        options = lib.genAttrs [ "page" "ticket" ] (severity: mkOption {
          type = types.attrsOf types.anything;
          default = { };
          example = { slack_configs = [{ api_url_file = "/run/credentials/alertmanager.service/slack"; channel = "#ops"; }]; };
          description = "Who is told of alerts of this severity: a receiver of Alertmanager, without its name.";
        });
      };
      default = { };
      description = "Who is told of alerts.";
    };
    secrets = mkOption {
      type = types.attrsOf (types.strMatching "/.+");
      default = { };
      example = { slack = "/etc/slack-url"; };
      description = "Files that only root reads, and that Alertmanager has as `/run/credentials/alertmanager.service/NAME`.";
    };
    grafana = {
      enable = mkOption {
        type = types.bool;
        default = true;
        description = "Whether there is a Grafana with toto's dashboards.";
      };
      passwordFile = secret "A file that only root reads, with the password of Grafana's user `admin`.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = cfg.tokenFile != null;
        message = "services.toto-monitoring: tokenFile is missing: write what `toto metrics token` prints into a file of root's.";
      }
      {
        assertion = !cfg.grafana.enable || cfg.grafana.passwordFile != null;
        message = "services.toto-monitoring: grafana.passwordFile is missing: Grafana's own password is known to everybody.";
      }
      {
        assertion = !lib.any isInStore ([ cfg.tokenFile cfg.grafana.passwordFile ] ++ lib.attrValues cfg.secrets);
        message = "services.toto-monitoring: every user can read the nix store, and a secret is there.";
      }
    ];

    services.toto-monitoring.exporters = lib.mapAttrs (_: lib.mkDefault) { node = 9100; nginx = 9113; postgresql = 9187; };

    services.prometheus = {
      enable = true;
      listenAddress = lib.mkDefault "127.0.0.1";
      retentionTime = lib.mkDefault "90d";
      checkConfig = lib.mkDefault "syntax-only";  # (the token's file is not there when it is built)
      globalConfig = { scrape_interval = lib.mkDefault "30s"; evaluation_interval = lib.mkDefault "30s"; };
      ruleFiles = [ ../monitoring/alerts.yml ];
      scrapeConfigs = [{ job_name = "toto"; inherit scheme basic_auth; static_configs = [{ targets = [ toto ]; }]; }]
        ++ lib.mapAttrsToList machines cfg.exporters;
      alertmanagers = [{ static_configs = [{ targets = [ "127.0.0.1:${toString prometheus.alertmanager.port}" ]; }]; }];
      alertmanager = {
        enable = true;
        listenAddress = lib.mkDefault "127.0.0.1";
        extraFlags = [ "--cluster.listen-address=" ];  # there is one
        configuration = {
          route = {
            receiver = "ticket";
            group_by = [ "alertname" "repo" ];
            group_wait = "1m";
            repeat_interval = "1d";
            routes = [{ matchers = [ "severity = \"page\"" ]; receiver = "page"; repeat_interval = "4h"; }];
          };
          inhibit_rules = [{
            source_matchers = [ "alertname = \"ServerDown\"" ];
            target_matchers = [ "alertname =~ \"WorkerDown|FiguresMissing\"" ];
          }];
          receivers = lib.mapAttrsToList (name: receiver: receiver // { inherit name; }) cfg.tell;
        };
      };
    };
    systemd.services.prometheus.serviceConfig.LoadCredential = lib.mkIf (cfg.tokenFile != null) [ "toto:${cfg.tokenFile}" ];
    systemd.services.alertmanager.serviceConfig.LoadCredential = lib.mapAttrsToList (name: file: "${name}:${file}") cfg.secrets;

    services.grafana = lib.mkIf cfg.grafana.enable {
      enable = true;
      settings = {
        server.http_addr = lib.mkDefault "127.0.0.1";
        security.admin_password = "$__file{/run/credentials/grafana.service/password}";
        analytics.reporting_enabled = lib.mkDefault false;
      };
      provision = {
        enable = true;
        datasources.settings.datasources = [{
          name = "Prometheus";
          type = "prometheus";
          url = "http://127.0.0.1:${toString prometheus.port}";
          isDefault = true;
          jsonData.timeInterval = prometheus.globalConfig.scrape_interval;
        }];
        dashboards.settings.providers = [{ name = "toto"; options.path = dashboards; }];
      };
    };
    systemd.services.grafana.serviceConfig.LoadCredential =
      lib.mkIf (cfg.grafana.enable && cfg.grafana.passwordFile != null) [ "password:${cfg.grafana.passwordFile}" ];
  };
}
