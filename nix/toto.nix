# The server of toto on NixOS, as a user who may do nothing on this machine: docs/operations.md says how to use it.
#
#   imports = [ ./toto/nix/toto.nix ];   (or nixosModules.toto of the flake)
#   services.toto = { enable = true; firstAdmin = { name = "alice"; key = "ssh-ed25519 AAAA…"; }; };
#
# The units: `toto`, the server, with the web server that machines ask in a cell; `toto-nix-daemon`, the only part that
# runs as root; and, where wanted, `toto-backup`. sshd lets pushers in, nginx who has the UI's password.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.services.toto;
  state = "/var/lib/toto";
  repos = "${state}/server/repos";

  # On PATH of toto, of its commands and of its cells, which see the closure of all this, and of nothing else.
  programs = [
    config.nix.package
    cfg.package.python
    # making cells, and their networks
    pkgs.bubblewrap
    pkgs.slirp4netns
    pkgs.nftables
    pkgs.iproute2
    pkgs.util-linux
    # rehearsing (a host's VM brings its own QEMU; this one tells whether KVM works)
    pkgs.qemu_kvm
    # the git host, its hooks, and the machines
    pkgs.git
    pkgs.gnupg
    pkgs.curl
    config.programs.ssh.package
    # what every script expects
    pkgs.bash
    pkgs.coreutils
    pkgs.diffutils
    pkgs.findutils
    pkgs.gawk
    pkgs.gnugrep
    pkgs.gnused
    pkgs.gnutar
    pkgs.gzip
    pkgs.xz
    cfg.helm
  ] ++ lib.optional (cfg.terraform != null) terraform ++ cfg.programs;

  database = lib.optional (cfg.postgresql != null) cfg.postgresql;

  # toto calls it `terraform`, whichever it is.
  terraform = pkgs.runCommand "terraform" { } ''
    mkdir -p $out/bin
    ln -s ${lib.getExe cfg.terraform} $out/bin/terraform
  '';

  # /bin/sh and /usr/bin/env, which cells have as well, are links into the store.
  links = pkgs.writeText "toto-links" "${config.environment.binsh} ${toString config.environment.usrbinenv}";

  # Of toto's daemon, too: builds that fetch use the same kind of uplink.
  networks = lib.optionalAttrs (cfg.allowedNetworks != [ ]) {
    TOTO_ALLOWED_NETWORKS = lib.concatStringsSep "," cfg.allowedNetworks;
  };

  own = {
    HOME = state;
    TOTO_STATE = state;
    TOTO_TOOLS = "${pkgs.writeClosure (programs ++ [ links ])}";
    NIX_REMOTE = "unix:///run/toto-nix/client/socket";
  };

  # What every unit of the user toto has. The server's own says why there is no more.
  hardened = {
    User = "toto";
    Group = "toto";
    StateDirectory = "toto";
    StateDirectoryMode = "0700";
    WorkingDirectory = state;
    UMask = "0077";
    CapabilityBoundingSet = "";
    AmbientCapabilities = "";
    NoNewPrivileges = true;
    ProtectSystem = "strict";
    ProtectHome = true;
    PrivateTmp = true;
    PrivateIPC = true;
    ProtectClock = true;
    ProtectControlGroups = true;
    ProtectKernelModules = true;
    LockPersonality = true;
    RestrictRealtime = true;
    RestrictSUIDSGID = true;
    SystemCallArchitectures = "native";
  };

  # What the units without cells have besides.
  enclosed = hardened // {
    PrivateDevices = true;
    ProtectHostname = true;
    ProtectKernelLogs = true;
    ProtectKernelTunables = true;
    RestrictNamespaces = true;
    MemoryDenyWriteExecute = true;
    SystemCallFilter = "@system-service";  # (setpriv, by which toto starts processes, sets its capabilities: to none)
    SystemCallErrorNumber = "EPERM";
  };

  environment = networks // own // cfg.environment // lib.optionalAttrs (cfg.nixPath != [ ]) {
    NIX_PATH = lib.concatStringsSep ":" cfg.nixPath;
  };

  # `toto` for the administrator: in the environment of the server, as its user.
  command = pkgs.writeShellScriptBin "toto" ''
    case $(id -un) in
      toto) ;;
      root) exec ${pkgs.util-linux}/bin/runuser -u toto -- "$0" "$@" ;;
      *) exec sudo -u toto -- "$0" "$@" ;;
    esac
    ${lib.concatStrings (lib.mapAttrsToList (name: value: "export ${name}=${lib.escapeShellArg value}\n") environment)}
    export PATH=${lib.makeBinPath (programs ++ database)}:$PATH
    exec ${lib.getExe cfg.package} "$@"
  '';

  # Where machines that pull ask.
  machines =
    let host = cfg.machines.listen;
    in "${if lib.hasInfix ":" host then "[${host}]" else host}:${toString cfg.machines.port}";

  builders = (pkgs.formats.toml { }).generate "toto-builders.toml" {
    builders = lib.mapAttrs (_: each: removeAttrs each [ "hostKey" ] // { host_key = each.hostKey; }) cfg.builders;
    fleet_builders = lib.mapAttrs (_: each: { inherit (each) user; host_key = each.hostKey; }) cfg.fleetBuilders;
  };

  # For the assertions.
  isInStore = lib.hasPrefix builtins.storeDir;
  sets = lib.any (name: cfg.environment ? ${name});
  hasCertificate = host: host.enableACME || host.useACMEHost != null || (builtins.tryEval host.sslCertificate).success;
  letsIn = setting:
    let allowed = config.services.openssh.settings.${setting} or null;
    in allowed == null || lib.elem "toto" allowed;
in
{
  options.services.toto = {
    enable = lib.mkEnableOption "toto, the deployment server of a NixOS fleet";

    package = mkOption {
      type = types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = lib.literalExpression "pkgs.callPackage ./package.nix { }";
      description = "The package of toto.";
    };

    firstAdmin = mkOption {
      type = types.nullOr (types.submodule {
        options = {
          name = mkOption {
            type = types.strMatching "[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}";
            example = "alice";
            description = "The name of the user on the git host.";
          };
          key = mkOption {
            type = types.strMatching "(ssh|ecdsa|sk)-[a-z0-9@.-]+ [A-Za-z0-9+/]+=*( [^\n]*)?";
            example = "ssh-ed25519 AAAA… alice@laptop";
            description = "Their public ssh key.";
          };
        };
      });
      default = null;
      description = ''
        Who may do everything on the git host when it is made, at the first start. From then on a push to
        `toto-admin` changes who may do what, and this option does nothing.
      '';
    };

    gitHost = mkOption {
      type = types.bool;
      default = true;
      description = "Whether sshd lets the users of `access.toml` push and fetch, as the user `toto`.";
    };

    port = mkOption {
      type = types.port;
      default = 4200;
      description = "The port of the UI and the API, on the loopback.";
    };

    uiUrl = mkOption {
      type = types.nullOr (types.strMatching "https://[^[:space:]]+");
      default = if cfg.nginx.enable then "https://${cfg.nginx.virtualHost}" else null;
      defaultText = lib.literalMD "that of `nginx`, where it is enabled";
      example = "https://toto.example.org";
      description = ''
        The address of the UI in a browser, where a proxy on this machine does TLS for it and connects to the port on
        the loopback. Without one the UI is reached on this machine only, such as by `ssh -L`.
      '';
    };

    nginx = {
      enable = lib.mkEnableOption "a proxy with TLS for the UI, on this machine";
      virtualHost = mkOption {
        type = types.strMatching "[A-Za-z0-9.-]+";
        default = config.networking.fqdnOrHostName;
        defaultText = lib.literalExpression "config.networking.fqdnOrHostName";
        example = "toto.example.org";
        description = ''
          Its name in a browser. The certificate is yours to give, by `services.nginx.virtualHosts.NAME.enableACME`, or
          by `sslCertificate` and `sslCertificateKey` there.
        '';
      };
    };

    machines = {
      listen = mkOption {
        type = types.nullOr (types.strMatching "[0-9a-fA-F.:]+");
        default = null;
        example = "10.0.0.2";
        description = ''
          The address of this machine at which machines that pull ask what they should be; null for none. It needs no
          proxy: it has TLS by an authority of its own, ${state}/api/ca.pem, which the machines are given.
        '';
      };
      port = mkOption {
        type = types.port;
        default = 4201;
        description = "Its port. The firewall is yours to open.";
      };
      names = mkOption {
        type = types.listOf (types.strMatching "[A-Za-z0-9.:-]+");
        default = [ config.networking.fqdnOrHostName ];
        defaultText = lib.literalExpression "[ config.networking.fqdnOrHostName ]";
        description = "The host names and addresses by which machines reach it, for its certificate.";
      };
    };

    backup = {
      enable = lib.mkEnableOption "a backup of toto (`toto backup`) at regular times";
      folder = mkOption {
        type = types.strMatching "/[^[:space:]%]+";
        default = "/var/lib/toto-backup";
        description = ''
          Where the backups are, a file for each. Whoever reads one has every key of toto's. Copy them to elsewhere: what
          is on this machine is lost with it. A different folder must be there, and the user toto's.
        '';
      };
      at = mkOption {
        type = types.str;
        default = "daily";
        description = "When, as systemd.time(7) says it.";
      };
      keep = mkOption {
        type = types.ints.positive;
        default = 14;
        description = "How many of the newest ones are kept.";
      };
    };

    blockKey = {
      file = mkOption {
        type = types.nullOr (types.strMatching "/.+");
        default = null;
        example = "/etc/toto/blocks.cred";
        description = ''
          The file with the key of the secrets in Prefect's blocks, 32 bytes in URL-safe base64. The unit gets it as the
          credential `toto-blocks`. Without a file, toto makes a key in ${state}/keys.
        '';
      };
      encrypted = mkOption {
        type = types.bool;
        default = true;
        description = "Whether the file is what `systemd-creds encrypt --name=toto-blocks` has made.";
      };
    };

    environment = mkOption {
      type = types.attrsOf types.str;
      default = { };
      example = { TOTO_CELL_MEMORY = "8000"; };
      description = "More variables of toto's environment: docs/operations.md lists them. All users can read them.";
    };

    environmentFile = mkOption {
      type = types.nullOr (types.strMatching "/.+");
      default = null;
      description = "A file with variables that are secret, which only root can read, such as `TOTO_DATABASE_URL=…`.";
    };

    allowedNetworks = mkOption {
      type = types.listOf (types.strMatching "[0-9.]+/[0-9]+");
      default = [ ];
      example = [ "192.168.7.0/24" ];
      description = "What cells and builds with an uplink reach besides the internet; see docs/security.md.";
    };

    builders = mkOption {
      type = types.attrsOf (types.submodule {
        options = {
          address = mkOption {
            type = types.strMatching "[A-Za-z0-9:][A-Za-z0-9.:-]*";
            example = "10.0.0.7";
            description = "Its host name or IP address.";
          };
          port = mkOption { type = types.port; default = 22; description = "Where its sshd listens."; };
          user = mkOption {
            type = types.strMatching "[A-Za-z0-9_][A-Za-z0-9._-]*";
            default = "builder";
            description = "As whom toto logs in; nix trusts that user there.";
          };
          hostKey = mkOption {
            type = types.strMatching "(ssh|ecdsa|sk)-[A-Za-z0-9@.-]+ [A-Za-z0-9+/]+=*( [^\n]*)?";
            example = "ssh-ed25519 AAAA…";
            description = "Its public host key. A machine with a different one builds nothing.";
          };
          systems = mkOption {
            type = types.nonEmptyListOf (types.strMatching "[a-z0-9_]+-[a-z0-9]+");
            example = [ "aarch64-linux" ];
            description = "The platforms that it builds for.";
          };
          jobs = mkOption { type = types.ints.positive; default = 1; description = "Builds at once."; };
          speed = mkOption {
            type = types.ints.positive;
            default = 1;
            description = "Of several builders with room, the fastest for its load gets a build.";
          };
          features = mkOption {
            type = types.listOf (types.strMatching "[A-Za-z0-9_-]+");
            default = [ ];
            example = [ "big-parallel" "kvm" ];
            description = "What derivations may require of it.";
          };
        };
      });
      default = { };
      description = "Machines that build for toto, by names of yours; docs/builders.md says how to make one.";
    };

    fleetBuilders = mkOption {
      type = types.attrsOf (types.submodule {
        options = {
          user = mkOption {
            type = types.strMatching "[A-Za-z0-9_][A-Za-z0-9._-]*";
            default = "builder";
            description = "As whom toto logs in; nix trusts that user there.";
          };
          hostKey = mkOption {
            type = types.strMatching "(ssh|ecdsa|sk)-[A-Za-z0-9@.-]+ [A-Za-z0-9+/]+=*( [^\n]*)?";
            example = "ssh-ed25519 AAAA…";
            description = "Its public host key. A machine with a different one builds nothing.";
          };
        };
      });
      default = { };
      example = lib.literalExpression ''{ "infra/pi".hostKey = "ssh-ed25519 AAAA…"; }'';
      description = ''
        Machines with `role: builder` that may build for toto, by `REPO/MACHINE`: the rest is in their manifests; see
        docs/builders.md.
      '';
    };

    nixPath = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = lib.literalExpression ''[ "nixpkgs=''${pkgs.path}" ]'';
      description = "The NIX_PATH of evaluations, for hosts without a flake. All who may push can read what it names.";
    };

    terraform = mkOption {
      type = types.nullOr types.package;
      default = pkgs.opentofu;
      defaultText = lib.literalExpression "pkgs.opentofu";
      example = lib.literalExpression "pkgs.terraform";
      description = "What plans and applies terraform roots; null for nothing. (`pkgs.terraform` is not free.)";
    };

    helm = mkOption {
      type = types.package;
      default = pkgs.kubernetes-helm;
      defaultText = lib.literalExpression "pkgs.kubernetes-helm";
      description = "What renders and upgrades helm releases.";
    };

    postgresql = mkOption {
      type = types.nullOr types.package;
      default = pkgs.postgresql_16;
      defaultText = lib.literalExpression "pkgs.postgresql_16";
      description = ''
        What a PostgreSQL of toto's own is run with; null for SQLite, for trying out. Take a newer major version only
        together with `toto database upgrade`.
      '';
    };

    programs = mkOption {
      type = types.listOf types.package;
      default = [ ];
      example = lib.literalExpression "[ pkgs.jq pkgs.dnsutils ]";
      description = "Programs that test scripts may run besides those that are always there.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = config.nix.enable;
        message = "services.toto: it needs nix, and nix.enable is false.";
      }
      {
        assertion = config.security.allowUserNamespaces;
        message = "services.toto: cells are user namespaces, and security.allowUserNamespaces is false.";
      }
      {
        assertion = (config.boot.kernelPackages.kernel.isHardened or false)
          -> config.security.unprivilegedUsernsClone;
        message = "services.toto: on a hardened kernel, cells need security.unprivilegedUsernsClone = true.";
      }
      {
        assertion = cfg.blockKey.file == null || cfg.blockKey.encrypted || !isInStore cfg.blockKey.file;
        message = "services.toto: every user can read the nix store, and blockKey.file is there, not encrypted.";
      }
      {
        assertion = cfg.environmentFile == null || !isInStore cfg.environmentFile;
        message = "services.toto: every user can read the nix store, and environmentFile is there.";
      }
      {
        assertion = !sets [ "TOTO_AUTH" "TOTO_DATABASE_URL" ];
        message = "services.toto: every user can read what environment says; secrets belong into environmentFile.";
      }
      {
        assertion = !sets ([ "PATH" "TOTO_NIX_SOCKET" "TOTO_ALLOWED_NETWORKS" ] ++ lib.attrNames own);
        message = "services.toto: environment names a variable that the module sets.";
      }
    ] ++ lib.optionals cfg.nginx.enable [
      {
        assertion = hasCertificate config.services.nginx.virtualHosts.${cfg.nginx.virtualHost};
        message = "services.toto: nginx needs a certificate: set enableACME or sslCertificate in "
          + "services.nginx.virtualHosts.\"${cfg.nginx.virtualHost}\".";
      }
    ] ++ lib.optionals cfg.gitHost [
      {
        assertion = config.services.openssh.enable;
        message = "services.toto: the git host is reached by sshd: set services.openssh.enable, or gitHost = false.";
      }
      {
        assertion = letsIn "AllowUsers";
        message = "services.toto: services.openssh.settings.AllowUsers lacks toto, as whom everybody pushes.";
      }
      {
        assertion = letsIn "AllowGroups";
        message = "services.toto: services.openssh.settings.AllowGroups lacks toto, as whom everybody pushes.";
      }
    ];

    users.users.toto = {
      isSystemUser = true;
      group = "toto";
      home = state;
      description = "toto";
      shell = pkgs.bash;  # (sshd runs the forced command with it.)
      packages = database;  # pg_dump, for backups
    };
    users.groups.toto = { };

    # git is looked for on the PATH of whoever pushes.
    environment.systemPackages = [ command pkgs.git ];

    # An uplink needs a tap device, and nftables without the right to load its modules.
    boot.kernelModules = [ "tun" "nf_tables" "nft_ct" "nft_reject_inet" ];

    services.openssh.extraConfig = lib.mkIf cfg.gitHost (lib.mkAfter ''
      Match User toto
        AuthorizedKeysFile none
        AuthorizedKeysCommand /etc/ssh/toto-keys
        AuthorizedKeysCommandUser toto
        AuthenticationMethods publickey
        AcceptEnv GIT_PROTOCOL
      Match All
    '');

    # (A file of its own: sshd runs no command in a folder that a group may write to, such as the store. `mode` says so.)
    environment.etc."ssh/toto-keys" = lib.mkIf cfg.gitHost {
      mode = "0755";
      text = ''
        #!${pkgs.runtimeShell}
        export PATH=${lib.makeBinPath [ pkgs.git pkgs.coreutils ]} TOTO_STATE=${state}
        exec ${cfg.package}/bin/toto-git-shell --repos ${repos} keys
      '';
    };

    systemd.services.toto = {
      description = "toto, the deployment server";
      wantedBy = [ "multi-user.target" ];
      wants = [ "network-online.target" "toto-nix-daemon.service" ];
      after = [ "network-online.target" "toto-nix-daemon.service" ];
      path = programs ++ database;
      inherit environment;
      preStart = lib.mkIf (cfg.firstAdmin != null) ''
        if [ ! -e ${repos}/toto-admin.git ]; then
          ${lib.getExe cfg.package} repo admin ${cfg.firstAdmin.name} ${pkgs.writeText "key.pub" cfg.firstAdmin.key}
        fi
      '';
      # A deployment of this machine by toto goes on to its end, and is recorded: then toto is started anew.
      reloadIfChanged = true;
      serviceConfig = hardened // {
        ExecReload = "${pkgs.coreutils}/bin/kill -HUP $MAINPID";
        ExecStart = lib.escapeShellArgs ([ (lib.getExe cfg.package) "serve" "--port" (toString cfg.port) ]
          ++ lib.optionals (cfg.uiUrl != null) [ "--behind-proxy" "--ui-url" cfg.uiUrl ]
          ++ lib.optional (cfg.postgresql == null) "--sqlite"
          ++ lib.optionals (cfg.machines.listen != null) ([ "--machines" machines ]
            ++ lib.concatMap (name: [ "--machines-name" name ]) cfg.machines.names));
        SupplementaryGroups = [ "kvm" ];
        EnvironmentFile = lib.mkIf (cfg.environmentFile != null) cfg.environmentFile;
        ${if cfg.blockKey.encrypted then "LoadCredentialEncrypted" else "LoadCredential"} =
          lib.mkIf (cfg.blockKey.file != null) "toto-blocks:${cfg.blockKey.file}";
        Restart = "always";
        RestartSec = 5;
        KillMode = "mixed";
        TimeoutStartSec = 600;  # (a slow machine has much to do after a boot; what does not start says so itself)
        TimeoutStopSec = 180;  # terraform may take a minute to save its state, and then toto's PostgreSQL one to stop
        OOMPolicy = "continue";  # (a cell that took too much memory is not a reason to stop toto)

        # By what is there it asks the nix daemon: docs/builders.md. (The daemon may be started before it or after it.)
        RuntimeDirectory = "toto-nix/asked";
        RuntimeDirectoryMode = "0770";
        RuntimeDirectoryPreserve = true;

        # What keeps toto from the machine, besides `hardened`. setup/systemd/toto.service, for Debian, has the same lines.
        DevicePolicy = "closed";
        DeviceAllow = [ "/dev/kvm rw" "/dev/net/tun rw" ];
        RestrictAddressFamilies = [ "AF_UNIX" "AF_INET" "AF_INET6" "AF_NETLINK" ];
        SystemCallFilter = "~@clock @cpu-emulation @module @obsolete @raw-io @reboot @swap";
        SystemCallErrorNumber = "EPERM";
        # What is not there, since cells end with it:
        # - RestrictNamespaces, SystemCallFilter=@system-service: a cell is namespaces and mounts.
        # - ProtectKernelTunables, ProtectKernelLogs, ProtectProc, ProcSubset: they cover a part of /proc, and then the
        #   kernel lets no cell mount a /proc of its own.
        # - ProtectHostname: a cell has a host name of its own.
        # - PrivateDevices: /dev/kvm and /dev/net/tun would be gone. PrivateNetwork: so would the network.
        # - MemoryDenyWriteExecute: QEMU without KVM writes the code that it runs.
        # PrivateUsers would not end them, and adds nothing: toto has no capability, whose user it is.
      };
    };

    services.nginx = lib.mkIf cfg.nginx.enable {
      enable = true;
      virtualHosts.${cfg.nginx.virtualHost} = {
        forceSSL = lib.mkDefault true;
        locations."/" = {
          proxyPass = "http://127.0.0.1:${toString cfg.port}";
          proxyWebsockets = true;
          recommendedProxySettings = true;  # (toto answers under its own names)
        };
      };
    };

    systemd.services.toto-backup = lib.mkIf cfg.backup.enable {
      description = "a backup of toto";
      startAt = cfg.backup.at;
      after = [ "toto.service" ];
      path = [ pkgs.git pkgs.coreutils pkgs.util-linux config.programs.ssh.package ] ++ database;
      inherit environment;
      script = ''
        cd ${lib.escapeShellArg cfg.backup.folder}
        ${lib.getExe cfg.package} backup "toto-$(date -u +%Y%m%d-%H%M%S).tar"
        ls | grep -x 'toto-[0-9]*-[0-9]*[.]tar' | sort | head -n -${toString cfg.backup.keep} | xargs -r rm --
      '';
      serviceConfig = enclosed // {
        Type = "oneshot";
        EnvironmentFile = lib.mkIf (cfg.environmentFile != null) cfg.environmentFile;
        StateDirectory = [ "toto" ] ++ lib.optional (cfg.backup.folder == "/var/lib/toto-backup") "toto-backup";
        ReadWritePaths = lib.mkIf (cfg.backup.folder != "/var/lib/toto-backup") [ cfg.backup.folder ];
        RestrictAddressFamilies = [ "AF_UNIX" ];
      };
    };
    systemd.timers.toto-backup = lib.mkIf cfg.backup.enable {
      timerConfig = { Persistent = true; RandomizedDelaySec = "10min"; };
    };

    # The builders are root's to name. (The daemon sees a change within seconds.)
    systemd.tmpfiles.settings.toto-builders = {
      "/var/lib/toto-nix".d = { mode = "0700"; user = "root"; group = "root"; };
      "/var/lib/toto-nix/server.toml"."L+".argument = toString builders;
    };

    # As root: it owns the store, and changes to nix's build users.
    systemd.services.toto-nix-daemon = {
      description = "the nix daemon of toto";
      wantedBy = [ "multi-user.target" ];
      unitConfig.RequiresMountsFor = "/nix/store";
      path = [
        config.nix.package
        pkgs.bubblewrap
        pkgs.slirp4netns
        pkgs.nftables
        pkgs.iproute2
        pkgs.util-linux
        pkgs.gzip
        pkgs.busybox-sandbox-shell  # /bin/sh of builds
        config.programs.ssh.package  # remote builders
      ];
      environment = networks // { TOTO_STATE = "/var/lib/toto-nix"; };
      reloadIfChanged = true;  # (it ends when it has no client, and is started anew)
      serviceConfig = {
        Type = "notify";
        ExecReload = "${pkgs.coreutils}/bin/kill -HUP $MAINPID";
        ExecStart = "${lib.getExe cfg.package} nix-daemon --group toto";
        StateDirectory = "toto-nix";
        StateDirectoryMode = "0700";
        Restart = "always";
        RestartSec = 5;
        KillMode = "mixed";
        TimeoutStartSec = 600;  # (as above)
        OOMPolicy = "continue";
        LimitNOFILE = 1048576;
        # Builds mount, make namespaces and devices, change owners, users and personalities, and have a /proc of their
        # own. So it keeps its capabilities and devices (ProtectClock would take of both), and this is all:
        PrivateTmp = true;
        ProtectSystem = "full";
        RestrictRealtime = true;
      };
    };
  };
}
