# A machine's side of toto: a user that may ask for a few things, or an agent that asks toto by itself; and a helper that
# obeys signed documents and nothing else. See docs/flying-monkey.md.
#
#   imports = [ ./toto/nix/flying-monkey.nix ];   (or nixosModules.flying-monkey of the flake)
#   services.flying-monkey = { enable = true; repo = "infra"; signers = [ "ssh-ed25519 AAAA…" ]; loginKeys = [ … ]; };
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.services.flying-monkey;
  # The path that sudo compares, the same for every version.
  helper = "/run/current-system/sw/bin/flying-monkey-helper";
  key = types.strMatching "(ssh|ecdsa|sk)-[a-z0-9@.-]+ [A-Za-z0-9+/]+=*";
  name = types.strMatching "[A-Za-z0-9_]([A-Za-z0-9._-]{0,127}[A-Za-z0-9_-])?";
  pulls = cfg.url != null;
  letsIn = cfg.loginKeys != [ ];

  # A hardened machine lets members of wheel start sudo, and nobody else. The user toto is none, and has its own way to it,
  # for the one rule below.
  ownSudo = letsIn && config.security.sudo.execWheelOnly;

  # The machine's own programs, by the folders of /etc/flying-monkey in which the agent looks for them.
  folders = { "prepare.d" = cfg.prepareHooks; "finish.d" = cfg.finishHooks; "checks.d" = cfg.checks; };
  programs = lib.concatMapAttrs
    (folder: lib.mapAttrs' (name: text: lib.nameValuePair "flying-monkey/${folder}/${name}" {
      # (In a folder of its own: the agent runs nothing from one that a group may write to, such as the store.)
      source = "${pkgs.writeShellScriptBin name text}/bin/${name}";
    }))
    folders;
  scripts = example: what: mkOption {
    type = types.attrsOf types.lines;
    default = { };
    inherit example;
    description = what;
  };
in
{
  options.services.flying-monkey = {
    enable = lib.mkEnableOption "flying-monkey, a machine's side of toto";

    package = mkOption {
      type = types.package;
      default = pkgs.callPackage ./flying-monkey-package.nix { };
      defaultText = lib.literalExpression "pkgs.callPackage ./flying-monkey-package.nix { }";
      description = "The package of flying-monkey.";
    };

    repo = mkOption {
      type = name;
      example = "infra";
      description = "The name of the infra repo on toto that this machine obeys.";
    };

    machine = mkOption {
      type = name;
      default = config.networking.hostName;
      defaultText = lib.literalExpression "config.networking.hostName";
      description = "This machine's name in `machines.yaml`.";
    };

    signers = mkOption {
      type = types.nonEmptyListOf key;
      example = [ "ssh-ed25519 AAAA…" "ssh-ed25519 BBBB…" ];
      description = ''
        The public keys whose documents this machine obeys: toto's, and one of an administrator's that is kept offline,
        for the day on which toto's is lost. Each may also vouch for a new key of toto's, by a certificate.
      '';
    };

    revokedKeys = mkOption {
      type = types.listOf key;
      default = [ ];
      description = "Public keys whose documents it does not obey any more, whatever `signers` has.";
    };

    loginKeys = mkOption {
      type = types.listOf types.singleLineStr;
      default = [ ];
      example = [ "ssh-ed25519 AAAA… toto" ];
      description = ''
        The public ssh keys with which toto logs in as the user `toto`. Without any, there is no such user.
      '';
    };

    writableStore = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether toto may copy closures to this machine's store over ssh. They must be signed by a key of
        `nix.settings.trusted-public-keys`. Then this machine builds nothing: who writes to a store can build in it.
      '';
    };

    url = mkOption {
      type = types.nullOr (types.strMatching "https://[^[:space:]]+");
      default = null;
      example = "https://toto.example.org:4201";
      description = "Where this machine asks toto what it should be; null for one that is only pushed to.";
    };

    ca = mkOption {
      type = types.nullOr types.path;
      default = null;
      example = lib.literalExpression "./keys/toto-ca.pem";
      description = ''
        The certificate of the authority by which toto's is trusted, and no other: `/var/lib/toto/api/ca.pem` of toto.
        Null for the authorities that this machine trusts anyway, where a proxy does TLS for toto.
      '';
    };

    prepareHooks = scripts { "10-drain" = "curl --fail -X POST http://127.0.0.1:8080/drain"; } ''
      Shell scripts that run as root before an update, by their names; those that the document names. One that fails
      stops the update.
    '';

    finishHooks = scripts { "10-undrain" = "curl --fail -X POST http://127.0.0.1:8080/undrain"; } ''
      Shell scripts that run as root after an update, also after one that was not kept.
    '';

    checks = scripts { "10-page" = "echo 1..1; curl --fail -s http://127.0.0.1/ && echo ok || echo not ok"; } ''
      Shell scripts that say in TAP whether the machine is well; a new system that is not is not kept.
    '';

    tests = mkOption {
      type = types.bool;
      default = true;
      description = "Whether toto's tests may run commands here, as a user of no rights.";
    };

    metrics = {
      folder = mkOption {
        type = types.nullOr (types.strMatching "/[^[:space:]%]+");
        default = null;
        example = "/var/lib/node-exporter";
        description = "The folder of node_exporter's textfile collector, where the agent keeps `flying-monkey.prom`.";
      };
      port = mkOption {
        type = types.nullOr types.port;
        default = null;
        description = "A port of the loopback at which the same is served.";
      };
    };

    garbage = {
      enable = mkOption {
        type = types.bool;
        default = true;
        description = ''
          Whether old generations and garbage are removed by a timer, while no update is under way. What runs, boots,
          was booted or was kept last always stays.
        '';
      };
      at = mkOption {
        type = types.str;
        default = "daily";
        description = "When, as systemd.time(7) says it.";
      };
      generations = mkOption {
        type = types.ints.positive;
        default = 10;
        description = "How many of the newest generations of the system stay.";
      };
      free = mkOption {
        type = types.ints.unsigned;
        default = 2000;
        description = "Garbage is collected until so many MB of the store's disk are free, and no further.";
      };
    };

    built = mkOption {
      type = types.ints.unsigned;
      default = 0;
      example = lib.literalExpression "inputs.self.lastModified";
      description = "Seconds since 1970 that have passed for sure: a clock that is behind that is wrong.";
    };
  };

  config = lib.mkIf cfg.enable {
    assertions = [
      {
        assertion = config.services.openssh.enable || !letsIn;
        message = "services.flying-monkey.loginKeys: toto logs in by ssh; set services.openssh.enable";
      }
      {
        assertion = letsIn -> config.security.sudo.enable;
        message = "services.flying-monkey.loginKeys: the user toto needs security.sudo for its one helper";
      }
      {
        assertion = letsIn || pulls;
        message = "services.flying-monkey: set loginKeys for a machine that is pushed to, or url for one that pulls";
      }
      {
        assertion = lib.all (lib.all (each: name.check each)) (map lib.attrNames (lib.attrValues folders));
        message = "services.flying-monkey: the name of a hook or check has letters, digits and . _ - only";
      }
      {
        assertion = letsIn -> !lib.any (each: lib.elem each [ "toto" "@toto" "*" ]) config.nix.settings.trusted-users;
        message = "nix.settings.trusted-users lets toto become root: leave it out there";
      }
    ];

    environment.systemPackages = [ cfg.package ];
    environment.etc = {
      "flying-monkey/config.json".text = builtins.toJSON ({
        inherit (cfg) repo built;
        name = cfg.machine;
        signers = "/etc/flying-monkey/signers";
        inherit helper;
        writable_store = cfg.writableStore;
      }
      // lib.optionalAttrs ownSudo { sudo = "/run/wrappers/bin/flying-monkey-sudo"; }
      // lib.optionalAttrs (!cfg.tests) { tests = false; }
      // lib.optionalAttrs pulls { inherit (cfg) url; user = "flying-monkey"; }
      // lib.optionalAttrs (cfg.ca != null) { ca = "${cfg.ca}"; }
      // lib.optionalAttrs (cfg.metrics.folder != null) { metrics = "${cfg.metrics.folder}/flying-monkey.prom"; }
      // lib.optionalAttrs (cfg.metrics.port != null) { metrics_port = cfg.metrics.port; }
      // lib.optionalAttrs (cfg.revokedKeys != [ ]) { revoked = "/etc/flying-monkey/revoked"; });
      "flying-monkey/signers".text =
        lib.concatMapStrings
          (each: lib.concatMapStrings
            (options: "${cfg.repo} ${options}namespaces=\"desired@toto\" ${each}\n") [ "" "cert-authority," ])
          cfg.signers;
      "flying-monkey/revoked" = lib.mkIf (cfg.revokedKeys != [ ]) { text = lib.concatLines cfg.revokedKeys; };
    } // programs;
    systemd.tmpfiles.rules = [ "d /var/lib/flying-monkey 0700 root root -" ]
      ++ lib.optional (cfg.metrics.folder != null) "d ${cfg.metrics.folder} 0755 root root -";

    # It reads what comes from the network.
    users.users.flying-monkey = lib.mkIf pulls { isSystemUser = true; group = "flying-monkey"; };
    users.groups.flying-monkey = lib.mkIf pulls { };

    # An update that changes the agent goes on, and then the agent ends by itself, and is started anew.
    systemd.services.flying-monkey = lib.mkIf pulls {
      description = "asks toto what this machine should be";
      wantedBy = [ "multi-user.target" ];
      after = [ "network.target" "time-sync.target" ];
      restartIfChanged = false;
      unitConfig.StartLimitIntervalSec = 0;
      serviceConfig = {
        ExecStart = "${cfg.package}/bin/flying-monkey-agent";
        Restart = "always";
        RestartSec = 5;
        KillMode = "mixed";
        # (Updates have units of their own.)
        MemoryMax = "1G";
        TasksMax = 256;
        OOMPolicy = "continue";
        RuntimeDirectory = "flying-monkey";
        RuntimeDirectoryMode = "0700";
      };
    };
    # What toto's tests run here, all of it together.
    systemd.slices.flying-monkey-tests = lib.mkIf (letsIn && cfg.tests) {
      sliceConfig = { MemoryMax = "1G"; TasksMax = 256; };
    };
    # What a power cut ended is completed, or undone.
    systemd.services.flying-monkey-resume = {
      description = "goes on with an update that the last boot ended";
      wantedBy = [ "multi-user.target" ];
      restartIfChanged = false;
      serviceConfig = {
        Type = "oneshot";
        RemainAfterExit = true;
        ExecStart = "${cfg.package}/bin/flying-monkey-update resume";
      };
    };

    systemd.services.flying-monkey-garbage = lib.mkIf cfg.garbage.enable {
      description = "removes old generations and garbage";
      startAt = cfg.garbage.at;
      restartIfChanged = false;
      serviceConfig = {
        Type = "oneshot";
        ExecStart = lib.concatStringsSep " " [
          "${cfg.package}/bin/flying-monkey-garbage"
          (toString cfg.garbage.generations)
          (toString (cfg.garbage.free * 1000000))
        ];
        Nice = 19;
        IOSchedulingClass = "idle";
      };
    };
    systemd.timers.flying-monkey-garbage = lib.mkIf cfg.garbage.enable {
      timerConfig = { Persistent = true; RandomizedDelaySec = "1h"; };
    };

    users.groups.toto = lib.mkIf letsIn { };
    users.users.toto = lib.mkIf letsIn {
      isSystemUser = true;
      group = "toto";
      home = "/var/empty";
      createHome = false;
      hashedPassword = "!";
      shell = "${cfg.package}${cfg.package.shellPath}";
      openssh.authorizedKeys.keys = cfg.loginKeys;
    };
    # (After what others add there: a Match goes up to the next one.)
    services.openssh.extraConfig = lib.mkIf letsIn (lib.mkOrder 2000 ''
      Match User toto
        ForceCommand flying-monkey
        AuthorizedKeysFile /etc/ssh/authorized_keys.d/toto
        PasswordAuthentication no
        DisableForwarding yes
        PermitTTY no
        PermitUserRC no
      Match all
    '');
    security.sudo.extraRules = lib.mkIf letsIn [{
      users = [ "toto" ];
      runAs = "root:root";
      commands = [{ command = "${helper} \"\""; options = [ "NOPASSWD" ]; }];
    }];
    security.wrappers = lib.optionalAttrs ownSudo {
      flying-monkey-sudo = {
        source = "${config.security.sudo.package}/bin/sudo";
        owner = "root";
        group = "toto";
        setuid = true;
        permissions = "u+rx,g+x";
      };
    };
    nix.settings.max-jobs = lib.mkIf cfg.writableStore 0;
  };
}
