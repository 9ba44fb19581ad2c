{ config, lib, pkgs, ... }:
let
  inherit (lib) mkOption types;
  cfg = config.services.openssh;
  sshdConfig = pkgs.writeText "sshd_config" ''
    ${lib.concatMapStrings (port: "Port ${toString port}\n") cfg.ports}
    ${lib.concatMapStrings (key: "HostKey ${key.path}\n") cfg.hostKeys}
    AuthorizedKeysFile /etc/ssh/authorized_keys.d/%u .ssh/authorized_keys
    PasswordAuthentication no
    KbdInteractiveAuthentication no
    UsePAM no
    UseDNS no
    # (The other one, after quantum computers, is a fifth of a login on an emulated machine.)
    KexAlgorithms curve25519-sha256
    PrintMotd no
    PidFile none
    SetEnv PATH=/run/wrappers/bin:/run/current-system/sw/bin
    Subsystem sftp ${pkgs.base}/lib/openssh/sftp-server
    ${lib.concatStrings (lib.mapAttrsToList (name: value: lib.optionalString (value != null)
      "${name} ${if value == true then "yes" else if value == false then "no" else toString value}\n") cfg.settings)}
    ${cfg.extraConfig}
  '';
in
{
  options.services.openssh = {
    enable = mkOption { type = types.bool; default = false; };
    ports = mkOption { type = types.listOf types.port; default = [ 22 ]; };
    hostKeys = mkOption {
      type = types.listOf types.anything;
      default = [ { type = "ed25519"; path = "/etc/ssh/ssh_host_ed25519_key"; } ];
    };
    listenAddresses = mkOption { type = types.listOf types.anything; default = [ ]; }; # ignored: it listens on all
    startWhenNeeded = mkOption { type = types.bool; default = false; };
    openFirewall = mkOption { type = types.bool; default = true; };
    settings = mkOption { type = types.attrsOf types.anything; default = { }; };
    extraConfig = mkOption { type = types.lines; default = ""; };
  };

  config = lib.mkIf cfg.enable {
    environment.etc."ssh/sshd_config".source = sshdConfig;
    # A restart ends only the listener: sessions have their own processes, and go on.
    systemd.services.sshd = {
      description = "SSH Daemon";
      wantedBy = [ "multi-user.target" ];
      restartTriggers = [ sshdConfig ];
      preStart = ''
        mkdir -p /run/sshd
        ${lib.concatMapStrings (key: ''
          [ -s ${key.path} ] || ssh-keygen -q -t ${key.type} -N "" -f ${key.path}
        '') cfg.hostKeys}
      '';
      serviceConfig = { ExecStart = "${pkgs.base}/bin/sshd -D -e -f /etc/ssh/sshd_config"; Restart = "always"; };
    };
  };
}
