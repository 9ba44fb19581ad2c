# A machine's side of toto: a user that may ask for a few things, and a helper that obeys signed documents and nothing else.
#
#   imports = [ ./toto/nix/flying-monkey.nix ];   (or nixosModules.flying-monkey of the flake)
#   services.flying-monkey = { enable = true; repo = "infra"; signers = [ "ssh-ed25519 AAAA…" ]; loginKeys = [ … ]; };
#
# toto itself does not deploy by it yet: this is for trying it out. See docs/flying-monkey.md.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.services.flying-monkey;
  # The path that sudo compares, the same for every version.
  helper = "/run/current-system/sw/bin/flying-monkey-helper";
  key = types.strMatching "(ssh|ecdsa|sk)-[a-z0-9@.-]+ [A-Za-z0-9+/]+=*";
  name = types.strMatching "[A-Za-z0-9_]([A-Za-z0-9._-]{0,127}[A-Za-z0-9_-])?";
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
        for the day on which toto's is lost.
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
      description = "The public ssh keys with which toto logs in as the user `toto`. Without any, nobody does.";
    };

    writableStore = mkOption {
      type = types.bool;
      default = false;
      description = ''
        Whether toto may copy closures to this machine's store over ssh. They must be signed by a key of
        `nix.settings.trusted-public-keys`. Then this machine builds nothing: who writes to a store can build in it.
      '';
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
        assertion = config.services.openssh.enable || cfg.loginKeys == [ ];
        message = "services.flying-monkey.loginKeys: toto logs in by ssh; set services.openssh.enable";
      }
      {
        assertion = !lib.any (each: lib.elem each [ "toto" "@toto" "*" ]) config.nix.settings.trusted-users;
        message = "nix.settings.trusted-users lets toto become root: leave it out there";
      }
      {
        assertion = !config.security.sudo.execWheelOnly;
        message = "security.sudo.execWheelOnly does not let the user toto run its one helper: set it to false";
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
      } // lib.optionalAttrs (cfg.revokedKeys != [ ]) { revoked = "/etc/flying-monkey/revoked"; });
      "flying-monkey/signers".text =
        lib.concatMapStrings (each: "${cfg.repo} namespaces=\"desired@toto\" ${each}\n") cfg.signers;
      "flying-monkey/revoked" = lib.mkIf (cfg.revokedKeys != [ ]) { text = lib.concatLines cfg.revokedKeys; };
    };
    systemd.tmpfiles.rules = [ "d /var/lib/flying-monkey 0700 root root -" ];

    users.groups.toto = { };
    users.users.toto = {
      isSystemUser = true;
      group = "toto";
      home = "/var/empty";
      createHome = false;
      hashedPassword = "!";
      shell = "${cfg.package}${cfg.package.shellPath}";
      openssh.authorizedKeys.keys = cfg.loginKeys;
    };
    # (After what others add there: a Match goes up to the next one.)
    services.openssh.extraConfig = lib.mkOrder 2000 ''
      Match User toto
        AuthorizedKeysFile /etc/ssh/authorized_keys.d/toto
        PasswordAuthentication no
        DisableForwarding yes
        PermitTTY no
        PermitUserRC no
      Match all
    '';
    security.sudo.extraRules = [{
      users = [ "toto" ];
      runAs = "root:root";
      commands = [{ command = "${helper} \"\""; options = [ "NOPASSWD" ]; }];
    }];
    nix.settings.max-jobs = lib.mkIf cfg.writableStore 0;
  };
}
