# Users, groups, authorized keys and sudo. The lab has no passwords: users log in by key.
{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  users = lib.attrValues config.users.users;
  keysOf = user: user.openssh.authorizedKeys.keys
    ++ map (file: lib.fileContents file) user.openssh.authorizedKeys.keyFiles;
  rule = { users ? [ ], runAs ? "ALL:ALL", commands, ... }: lib.concatMapStrings
    (user: lib.concatMapStrings
      (each: "${user} ALL=(${runAs}) ${lib.concatMapStrings (option: "${option}: ") each.options or [ ]}${each.command}\n")
      commands)
    users;
in
{
  options.users = {
    mutableUsers = mkOption { type = types.bool; default = true; };
    groups = mkOption {
      default = { };
      type = types.attrsOf (types.submodule { options._freeform = true; });
    };
    users = mkOption {
      default = { };
      type = types.attrsOf (types.submodule ({ name, config, ... }: {
        options = {
          _freeform = true;
          name = mkOption { type = types.str; default = name; };
          uid = mkOption { type = types.nullOr types.int; default = null; };
          isNormalUser = mkOption { type = types.bool; default = false; };
          isSystemUser = mkOption { type = types.bool; default = false; };
          group = mkOption { type = types.str; default = if config.isNormalUser then "users" else "nogroup"; };
          extraGroups = mkOption { type = types.listOf types.str; default = [ ]; };
          home = mkOption { type = types.str; default = if config.isNormalUser then "/home/${name}" else "/var/empty"; };
          shell = mkOption { type = types.path; default = "/run/current-system/sw/bin/${if config.isNormalUser then "bash" else "nologin"}"; };
          openssh.authorizedKeys = {
            keys = mkOption { type = types.listOf types.str; default = [ ]; };
            keyFiles = mkOption { type = types.listOf types.path; default = [ ]; };
          };
        };
      }));
    };
  };
  options.security = {
    wrappers = mkOption { type = types.attrsOf types.anything; default = { }; };
    sudo = {
      enable = mkOption { type = types.bool; default = true; };
      wheelNeedsPassword = mkOption { type = types.bool; default = true; };
      execWheelOnly = mkOption { type = types.bool; default = false; };
      extraRules = mkOption { type = types.listOf types.anything; default = [ ]; };
      extraConfig = mkOption { type = types.lines; default = ""; };
    };
  };

  config = {
    users.users.root = { uid = 0; group = "root"; home = "/root"; shell = "/run/current-system/sw/bin/bash"; };
    users.users.sshd = { uid = 105; isSystemUser = true; };
    users.users.nobody = { uid = 65534; isSystemUser = true; };

    environment.etc = {
      # The activation reads this, and gives each user without a uid a permanent one.
      "lab/users".text = lib.concatMapStrings
        (u: "${u.name} ${if u.uid == null then "-" else toString u.uid} ${u.group} ${u.home} ${u.shell} ${lib.concatStringsSep "," u.extraGroups}\n")
        users;
      "lab/groups".text = lib.concatMapStrings (g: g + "\n") (lib.attrNames config.users.groups);
      "nsswitch.conf".text = "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n";
      "pam.d/other".text = "auth required pam_deny.so\naccount required pam_deny.so\nsession required pam_deny.so\npassword required pam_deny.so\n";
      "pam.d/sudo".text = "auth required pam_unix.so\naccount required pam_permit.so\nsession required pam_permit.so\n";
      sudoers = {
        mode = "0440";
        text = ''
          Defaults secure_path="/run/wrappers/bin:/run/current-system/sw/bin"
          Defaults !fqdn
          root ALL=(ALL:ALL) ALL
          %wheel ALL=(ALL:ALL) ${lib.optionalString (!config.security.sudo.wheelNeedsPassword) "NOPASSWD: "}ALL
          ${lib.concatMapStrings rule config.security.sudo.extraRules}
          ${config.security.sudo.extraConfig}
        '';
      };
    } // lib.listToAttrs (map
      (u: lib.nameValuePair "ssh/authorized_keys.d/${u.name}" { mode = "0444"; text = lib.concatLines (keysOf u); })
      (lib.filter (u: keysOf u != [ ]) users));
  };
}
