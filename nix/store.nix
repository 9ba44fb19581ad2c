# What machines fetch from toto by NFS, on toto's own machine: docs/store.md says how to use it. (By HTTP they fetch from
# toto itself, `services.toto.machines`.)
#
#   imports = [ ./toto/nix/toto.nix ./toto/nix/store.nix ];   (or nixosModules.store of the flake)
#   services.toto-store = { enable = true; address = "10.100.0.1"; privateKeyFile = "/etc/wireguard.key"; machines = { … }; };
#
# NFS believes addresses. So it is inside WireGuard, which binds an address to a key.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.services.toto-store;
  granted = "/var/lib/toto/store/granted";
  address = types.strMatching "[0-9]+([.][0-9]+){3}";
  name = types.strMatching "[A-Za-z0-9_]([A-Za-z0-9._-]{0,127}[A-Za-z0-9_-])?";

  # The folder of a repo in toto's state, as `toto.base.paths.repo_folder` names it.
  folder = repo: "${repo}-${lib.substring 0 8 (builtins.hashString "sha256" "/var/lib/toto/server/repos/${repo}.git")}";

  nix = "/run/toto-store/nix";
  settings = {
    inherit granted nix;
    machines = lib.mapAttrs (_: each: { inherit (each) address diskless; repo = folder each.repo; }) cfg.machines;
  };
in
{
  options.services.toto-store = {
    enable = lib.mkEnableOption "the export of what machines may fetch, by NFS inside WireGuard";
    address = mkOption {
      type = address;
      example = "10.100.0.1";
      description = "The address of this machine inside WireGuard.";
    };
    port = mkOption {
      type = types.port;
      default = 51820;
      description = "Where WireGuard listens. The firewall lets it in, and NFS from inside it.";
    };
    privateKeyFile = mkOption {
      type = types.strMatching "/.+";
      example = "/etc/wireguard.key";
      description = "A file that only root reads, with what `wg genkey` prints.";
    };
    machines = mkOption {
      type = types.attrsOf (types.submodule {
        options = {
          repo = mkOption { type = name; example = "infra"; description = "The name of its infra repo on toto."; };
          address = mkOption { type = address; example = "10.100.0.7"; description = "Its address inside WireGuard."; };
          publicKey = mkOption { type = types.strMatching "[A-Za-z0-9+/]{43}="; description = "Its key of WireGuard."; };
          diskless = mkOption {
            type = types.bool;
            default = false;
            description = ''
              Whether it also has its store paths themselves, for the lower layer of its store. They take no room: they
              are hard links, below /nix/toto-store. The store must be on the file system of /nix.
            '';
          };
        };
      });
      default = { };
      description = "The machines that mount what they are granted, by their names in `machines.yaml`.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = config.services.toto.enable;
        message = "services.toto-store: it is for toto's own machine: set services.toto.enable";
      }
      {
        assertion = lib.all name.check (lib.attrNames cfg.machines);
        message = "services.toto-store.machines: these are the names of machines.yaml";
      }
      {
        assertion = lib.allUnique (lib.mapAttrsToList (_: each: each.address) cfg.machines ++ [ cfg.address ]);
        message = "services.toto-store: each machine has an address of its own";
      }
      {
        assertion = !lib.hasPrefix builtins.storeDir cfg.privateKeyFile;
        message = "services.toto-store: every user can read the nix store, and privateKeyFile is there.";
      }
    ];

    networking.wireguard.interfaces.toto-store = {
      ips = [ "${cfg.address}/32" ];
      listenPort = cfg.port;
      inherit (cfg) privateKeyFile;
      peers = lib.mapAttrsToList
        (_: each: { inherit (each) publicKey; allowedIPs = [ "${each.address}/32" ]; })
        cfg.machines;
    };
    networking.firewall.allowedUDPPorts = [ cfg.port ];
    networking.firewall.interfaces.toto-store.allowedTCPPorts = [ 2049 ];

    services.nfs.server = { enable = true; hostName = cfg.address; };
    services.nfs.settings.nfsd = { vers3 = false; "vers4.0" = false; "vers4.1" = false; "vers4.2" = true; udp = false; };
    systemd.services.nfs-server = {
      requires = [ "wireguard-toto-store.service" ];
      after = [ "wireguard-toto-store.service" ];
    };

    environment.etc."toto-store.json".text = builtins.toJSON settings;

    # Root's part: it believes nothing that toto has written (toto/store/exports.py).
    systemd.services.toto-store = {
      description = "exports what machines may fetch from toto";
      wantedBy = [ "multi-user.target" ];
      after = [ "nfs-server.service" "toto.service" ];
      requires = [ "nfs-server.service" ];
      startAt = "hourly";  # (a change that came while it ran is not seen by its path unit)
      path = [ pkgs.nfs-utils pkgs.coreutils ];
      unitConfig.ConditionPathIsDirectory = granted;
      script = ''
        mkdir -p /etc/exports.d
        until seen=$(cat ${granted}/changed); test "$seen" = "''${last-}"; do
          last=$seen
          ${config.services.toto.package.python}/bin/python3 -IS ${../toto/store/exports.py} /etc/toto-store.json > /etc/exports.d/.toto
          mv /etc/exports.d/.toto /etc/exports.d/toto.exports
          exportfs -ra
        done
      '';
      serviceConfig = {
        Type = "oneshot";
        # /nix/store is a mount of its own, and nothing is linked out of a mount. Here is /nix without that mount.
        BindPaths = [ "/nix:${nix}:norbind" ];
        PrivateTmp = true;
        PrivateDevices = true;
        ProtectHome = true;
        ProtectKernelModules = true;
        ProtectClock = true;
        RestrictAddressFamilies = [ "AF_UNIX" ];
        NoNewPrivileges = true;
        Nice = 10;
      };
    };
    systemd.paths.toto-store = {
      description = "what machines may fetch has changed";
      wantedBy = [ "multi-user.target" ];
      pathConfig.PathChanged = "${granted}/changed";
    };
  };
}
